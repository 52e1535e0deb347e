"""Shared by all tests: where the golden files are, how a script is launched, how a folder is compared.

Nothing here needs a network: the hub is switched off for the tests and for every process that they start.
"""

import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or ROOT / "tests" / "golden")

# Set before anything imports torch or huggingface_hub: both read these once, at import. Waiting threads that
# spin would starve the other processes of a two-process test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("CLEANSYNTH_CACHE", os.path.join(tempfile.gettempdir(), f"cleansynth-tests-{os.getuid()}"))
sys.path.insert(0, str(ROOT))


class Golden:
    """One golden file: `g["key"]` is a tensor and is remembered as read; `g.unread()` names what no test read."""

    def __init__(self, path: Path):
        from safetensors.torch import load_file

        self.tensors = load_file(path)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return self.tensors[key]

    def keys(self):
        return self.tensors.keys()

    def unread(self) -> list[str]:
        return sorted(set(self.tensors) - self.read)


@pytest.fixture(scope="session")
def golden():
    """`golden("datadream")` -> Golden of that script's file, the same object for the whole session."""
    opened = {}

    def open_golden(name: str) -> Golden:
        if name not in opened:
            opened[name] = Golden(GOLDEN_DIR / f"{name}.safetensors")
        return opened[name]

    return open_golden


class Launch:
    """Runs a script of the checkout as a user would; see the fixture `launch`."""

    def __init__(self, cwd: Path, hub_home: Path):
        self.cwd, self.hub_home = cwd, hub_home

    def command(self, script: str, *flags, processes: int = 1) -> list[str]:
        """The command line: plain python for one process, torchrun for more."""
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return [*start, str(ROOT / script), *map(str, flags)]

    def env(self, processes: int = 1, **extra) -> dict[str, str]:
        """The environment: no hub, no user cache, one thread: other tests run on the other cores."""
        ours = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.hub_home)}
        ours |= {"PYTHONUNBUFFERED": "1", "COLUMNS": "120", "NO_COLOR": "1"}
        inherited = {**os.environ, "OMP_NUM_THREADS": "1"}
        return {**inherited, **ours, **{k: str(v) for k, v in extra.items()}}

    def __call__(self, script, *flags, processes=1, check=True, timeout=540, env=None):
        """Run to the end -> CompletedProcess with text stdout and stderr; check=True fails the test on exit != 0."""
        done = subprocess.run(
            self.command(script, *flags, processes=processes),
            env=self.env(processes, **(env or {})),
            cwd=self.cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            tail = f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
            pytest.fail(f"exit {done.returncode}: {script} {' '.join(map(str, flags))}\n{tail}", pytrace=False)
        return done


QUIET = dict(log=lambda *_, **__: None, made=lambda: None)  # what a Loop wants of a run


@pytest.fixture
def launch(tmp_path, tmp_path_factory):
    """`launch("datadream.py", "--seed", 1, processes=2, check=False)` -> CompletedProcess, run in tmp_path.

    `launch.command(...)` and `launch.env(...)` are there for tests that start the process themselves (to kill it).
    """
    return Launch(tmp_path, tmp_path_factory.getbasetemp() / "hub")


@pytest.fixture
def tree_hash():
    """`tree_hash(folder, "**/*.png")` -> sha256 over the relative names and the bytes of all matching files."""

    def hash_folder(folder, pattern: str = "**/*") -> str:
        digest = hashlib.sha256()
        folder = Path(folder)
        files = sorted(p for p in folder.glob(pattern) if p.is_file())
        assert files, f"no file matches {pattern} in {folder}"
        for path in files:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
        return digest.hexdigest()

    return hash_folder


def free_port() -> int:
    """A port of this machine that nobody listens on just now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def forks():
    """A process that has imported torch once and is forked for each rank: seconds instead of an import per rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "common.loop"])
    return context
