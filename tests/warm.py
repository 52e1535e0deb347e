"""A warm process: it has imported all five scripts once and is forked for each command, so that a command that ends at
its first checks takes a second instead of the ten of a new interpreter.

    with Warm() as warm:
        done = warm("datadream.py", ["--shots", "0"], cwd=folder)  # code, out, err, seconds

The child runs what the script's last lines run: parse and start. It hears signals and ends as a command would.
"""

import atexit
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("datadream", "realfake", "gafi", "synthetic_recognition", "distdiff")


class Warm:
    """See the top of this file."""

    def __init__(self, scripts=SCRIPTS):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PMI_"))}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            clean.pop(name, None)
        words = [sys.executable, str(Path(__file__).resolve()), *scripts]
        pipe = subprocess.PIPE
        self.server = subprocess.Popen(words, env=clean, stdin=pipe, stdout=pipe, text=True, cwd=tempfile.gettempdir())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.stdin.close()
        try:
            self.server.wait(5)
        except subprocess.TimeoutExpired:  # the tests were interrupted in the middle of a command
            self.server.kill()
            self.server.wait()

    def __call__(self, script, words, cwd, timeout=60, signals=(), **env):
        """Run `python <script> <words>` in cwd. timeout: it is killed then, code None. signals: [(seconds, number)]"""
        words = [os.fsdecode(word) if isinstance(word, bytes) else str(word) for word in words]
        asked = dict(script=script.removesuffix(".py"), words=words, cwd=str(cwd), timeout=timeout, env=env)
        self.server.stdin.write(json.dumps(asked | dict(signals=list(signals))) + "\n")
        self.server.stdin.flush()
        return SimpleNamespace(**json.loads(self.server.stdout.readline()))


def child(asked, out, err):
    """The forked process: as if Python had just been started on the script."""
    os.setsid()
    os.chdir(asked["cwd"])
    os.environ.update(asked["env"])
    for stream, number in ((out, 1), (err, 2)):
        os.dup2(stream.fileno(), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = open(1, "w", buffering=1, closefd=False, encoding="utf-8")
    sys.stderr = open(2, "w", buffering=1, closefd=False, encoding="utf-8", errors="backslashreplace")
    file = str(ROOT / f"{asked['script']}.py")
    sys.argv, sys.orig_argv = [file, *asked["words"]], [sys.executable, file, *asked["words"]]
    from common import cli

    script = importlib.import_module(asked["script"])
    code = 1
    try:
        cli.start(script.main, cli.parse(script.Args, script.PRESETS, script.__doc__))
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()  # the lock of a run folder is given back there
            sys.stdout.flush()
        os._exit(code)


def serve(scripts):
    for name in scripts:
        importlib.import_module(name)
    import torch

    from common.models import check_models

    torch.set_num_threads(1)  # a pool of threads would not survive the forks
    check_models([("", "tiny", kind) for kind in ("generator", "clip", "captioner", "seq2seq")])  # imports much
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers goes there
    for line in sys.stdin:
        asked, start = json.loads(line), time.monotonic()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            if not (pid := os.fork()):
                child(asked, out, err)
            todo, code = sorted(asked["signals"]), None
            while time.monotonic() - start < asked["timeout"]:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    code = os.waitstatus_to_exitcode(status)
                    break
                while todo and time.monotonic() - start >= todo[0][0]:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, todo.pop(0)[1])
                time.sleep(0.01)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # loader processes too
            if code is None:
                os.waitpid(pid, 0)
            texts = []
            for stream in (out, err):
                stream.seek(0)
                texts.append(stream.read().decode(errors="replace"))
        answer = dict(code=code, out=texts[0], err=texts[1], seconds=time.monotonic() - start)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("MPLBACKEND", "Agg")
    serve(sys.argv[1:])
