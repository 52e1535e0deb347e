"""Kill runs at random until the time is over, continue them, and compare every final byte. Not collected by pytest.

    python tests/soak.py --minutes 60
    python tests/soak.py --scripts gafi distdiff --minutes 10 --seed 1 --disk-mb 1 --report soak.json

Of each script one run, shrunk to seconds, is left alone. Every other run of it is started with one to three processes
and disturbed after a random time, again and again with other numbers of processes, until it comes to its end by itself:

    kill       SIGKILL for all processes at once, as an out-of-memory killer or a power cut does
    one        SIGKILL for one of several processes; the others have to notice
    term, int  the orderly end: exit code 143 or 130, and a line that says how to go on
    disk       a full disk (a small tmpfs, needs root): exit code 2 and one line; then the disk grows
    short      every file is cut at a random size (RLIMIT_FSIZE), as a spent quota does
    damaged    when all is done, a file of every stage is removed, emptied, cut or edited; then the command runs again

At the end its files must be those of the undisturbed run: the same names, and the same bytes in all but those that hold
seconds, commands or versions, which are compared without them. Processes are forks of this one, so that a start costs
no import.
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from conftest import free_port  # noqa: E402
from warm import SCRIPTS, child  # noqa: E402

# What makes the miniatures of the tests smaller still.
SMALLER = {
    "datadream": "--shots 1 --sd-epochs 3 --gen-images-per-class 2 --gen-steps 2 --clf-seeds 1 "
    "--clf-batch 16 --arms pooled",
    "realfake": "--gen-versions 1 --net-versions 1 --gen-steps 2 --mia-models 0 --ablations --tune-epochs 3",
    "gafi": "--clf-seeds 1 --class-samples 5 --attempts 1 --real-epochs 2 --resnet-epochs 2 --resnet-drops 1 2 "
    "--sigma-grid 1 1 1 --threshold-grid 0 0 0.5 --search-period 4 --export-images 1",
    "synthetic_recognition": "--sentences 2 --gen-images-per-class 3 --filter-keep 2 --head-epochs 1",
    "distdiff": "--rows real sd distdiff --clf-copies 1 --gen-copies 1 --gen-steps 4 --gen-step-from-end 2 "
    "--energy-probe 2",
}
NO_BYTES = ("args.json", ".args.json", "report.html")  # seconds, commands, versions
PATIENCE = 900  # seconds for one start


# ---------------------------------------------------------------------------------------
# One start


class Start:
    """The processes of one start of a script; all of one group, with what they say in a file."""

    def __init__(self, script, words, world, cwd, limit=None):
        self.said, port, self.pids = tempfile.TemporaryFile(), free_port(), []
        env = {} if world == 1 else dict(WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1")
        for rank in range(world):
            own = {} if world == 1 else dict(RANK=rank, LOCAL_RANK=rank, MASTER_PORT=port)
            asked = dict(script=script, words=words, cwd=str(cwd), env={k: str(v) for k, v in (env | own).items()})
            if not (pid := os.fork()):
                if limit:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                child(asked, self.said, self.said)
            self.pids.append(pid)
        self.codes = {}

    def poll(self):
        """Exit codes of all processes, None while one is at work."""
        for pid in set(self.pids) - set(self.codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return [self.codes[pid] for pid in self.pids] if len(self.codes) == len(self.pids) else None

    def wait(self, seconds):
        end = time.monotonic() + seconds
        while (codes := self.poll()) is None and time.monotonic() < end:
            time.sleep(0.02)
        return codes

    def send(self, number, pids=None):
        for pid in set(pids or self.pids) - set(self.codes):
            os.killpg(pid, number)  # with its loader processes; `child` makes a session of its own

    def text(self):
        self.said.seek(0)
        return self.said.read().decode(errors="replace")


# ---------------------------------------------------------------------------------------
# What is left at the end


def final(folder):
    """{name: hash} of all files of a finished run; see the top of this file."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir()):
        name, data = path.relative_to(folder).as_posix(), path.read_bytes()
        if name in NO_BYTES:
            data = b""
        elif name == "results.json" or (name.startswith("stages/") and name.endswith(".json")):
            data = json.dumps({k: v for k, v in json.loads(data).items() if k != "seconds"}).encode()
        elif name.endswith(".files"):  # the list of what is compared here itself
            rows = (line.split(b" ", 2) for line in data.split(b"\0")[:-1])
            data = b"".join(row[2] if row[2] in (b"results.json", b"report.html") else b" ".join(row) for row in rows)
        elif name == "metrics.jsonl":
            from common.metrics import read

            data = json.dumps(read(folder), sort_keys=True).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def differences(want, have):
    """Between two results of `final`, a line for each file."""
    both = sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
    state = lambda name: "missing" if name not in have else "left over" if name not in want else "other bytes"  # noqa: E731
    return [f"{name}: {state(name)}" for name in both]


def damage(run, rng):
    """Spoil one listed file of every stage of a finished run: remove, empty, cut, edit. Their names."""
    names = []
    for listed in sorted(run.glob("stages/*.files")):
        rows = [line.decode().split(" ", 2) for line in listed.read_bytes().split(b"\0")[:-1]]
        if not rows:
            continue
        names.append(rng.choice(rows)[2])
        file, kind = run / names[-1], rng.choice(["remove", "empty", "cut", "edit"])
        content = file.read_bytes() if file.exists() else b""
        file.unlink(missing_ok=True)
        if kind != "remove":
            file.write_bytes(dict(empty=b"", cut=content[:-1], edit=content[:-1] + bytes([255 - content[-1]]))[kind])
    return names


# ---------------------------------------------------------------------------------------
# A run and its accidents


def disturbed(script, words, folder, want, seconds, rng, count, disk_mb):
    """Run into folder, disturbed until it ends by itself. What was wrong with it, as a list of lines."""
    wrong, run, disk = [], folder / "run", 0
    folder.mkdir(parents=True)
    if disk_mb and rng.random() < 0.25:
        disk = disk_mb
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={disk}m", "tmpfs", folder], check=True)
    try:
        for attempt in range(60):
            kinds = ["kill", "kill", "term", "int", "short", "nothing"] + ["one"] * 2
            kind, world = rng.choice(kinds if attempt < 12 else ["nothing"]), rng.choice([1, 1, 2, 3])
            kind = "kill" if kind == "one" and world == 1 else kind
            limit = int(10 ** rng.uniform(4.3, 5.7)) if kind == "short" else None
            start = Start(script, [*words, "--output-dir", str(run)], world, folder, limit)
            count["starts"] += 1
            longest = rng.choice([0.15, 0.3, 0.6]) * seconds
            codes = start.wait(PATIENCE if kind in ("short", "nothing") else rng.uniform(0.5, max(1, longest)))
            if codes is None and kind == "one":
                start.send(signal.SIGKILL, [rng.choice(start.pids)])
                codes = start.wait(120)
            elif codes is None and kind != "nothing":
                start.send(dict(kill=signal.SIGKILL, term=signal.SIGTERM, int=signal.SIGINT)[kind])
                codes = start.wait(120)
            if codes is None:
                start.send(signal.SIGKILL)
                start.wait(10)
                return [*wrong, f"{kind}, {world} processes: did not end\n{start.text()[-2000:]}"]
            text = start.text()
            if not any(codes):
                break
            if "Traceback" in text:
                wrong.append(f"{kind}, {world} processes, exit {codes}: traceback\n{text[-3000:]}")
            full = "disk full" in text or "File too large" in text
            count[f"{kind}: full" if full else kind] += 1
            expected = {"term": {143, 0, -15}, "int": {130, 0, -2}, "short": {0, 2}, "nothing": {0, 2}}.get(kind)
            # Of several that are told to stop, one may first notice that another is gone; the other says how to go on.
            lost = {2} if kind in ("term", "int") and "lost contact" in text and "continue with" in text else set()
            if expected and not full and not set(codes) <= expected | lost:
                wrong.append(f"{kind}, {world} processes: exit {codes}\n{text[-2000:]}")
            if kind in ("term", "int") and not full and "continue with" not in text:
                wrong.append(f"{kind}, {world} processes: no line that continues\n{text[-2000:]}")
            if kind == "nothing" and not full:
                return [*wrong, f"undisturbed, {world} processes: exit {codes}\n{text[-3000:]}"]
            if full and disk:
                disk *= 2
                subprocess.run(["mount", "-o", f"remount,size={disk}m", folder], check=True)
        else:
            return [*wrong, "never came to its end"]
        wrong += differences(want, final(run))
        if disk:  # what is made again needs room beside what is there
            subprocess.run(["mount", "-o", "remount,size=200m", folder], check=True)
        if rng.random() < 0.5:
            names, start = damage(run, rng), Start(script, [*words, "--output-dir", str(run)], 1, folder)
            count["damaged"] += len(names)
            if start.wait(PATIENCE) != [0]:
                return [*wrong, f"damaged {names}:\n{start.text()[-2000:]}"]
            wrong += [f"damaged {names}: {line}" for line in differences(want, final(run))]
        count["compared"] += len(want)
        return wrong
    finally:
        if disk:
            subprocess.run(["umount", "-l", folder], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk-mb", type=int, default=0, help="first size of the small disks; 0: none (needs root)")
    parser.add_argument("--report", default="soak.json")
    parser.add_argument("--keep", action="store_true", help="keep the folders of runs that went wrong")
    args = parser.parse_args()

    os.environ |= dict(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg", OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)  # a pool of threads would not survive the forks
    for script in args.scripts:
        importlib.import_module(script)
    end, rng, root = time.monotonic() + 60 * args.minutes, random.Random(args.seed), Path(tempfile.mkdtemp())
    words = {script: list(importlib.import_module(f"test_{script}").SMALL) for script in args.scripts}
    words = {script: [*flags, *SMALLER[script].split(), "--workers", "0"] for script, flags in words.items()}
    want, seconds, report = {}, {}, {script: dict(runs=0, wrong=[], counts={}) for script in args.scripts}
    for script in args.scripts:
        begin, start = time.monotonic(), Start(script, [*words[script], "--output-dir", "run"], 1, root)
        if start.wait(PATIENCE) != [0]:
            sys.exit(f"{script} does not run:\n{start.text()[-3000:]}")
        seconds[script], want[script] = time.monotonic() - begin, final(root / "run")
        shutil.rmtree(root / "run")
        print(f"{script}: undisturbed {seconds[script]:.0f} s, {len(want[script])} files", flush=True)
    while time.monotonic() < end:
        script = min(args.scripts, key=lambda s: (report[s]["runs"] * seconds[s], s))  # equal time for all
        row, folder = report[script], root / f"{script}-{report[script]['runs']}"
        count = Counter(row["counts"])
        wrong = disturbed(script, words[script], folder, want[script], seconds[script], rng, count, args.disk_mb)
        row["runs"], row["counts"], row["wrong"] = row["runs"] + 1, dict(count), row["wrong"] + wrong
        print(
            f"{script}: run {row['runs']}, {count['starts']} starts, {len(wrong)} wrong",
            *wrong,
            sep="\n  ",
            flush=True,
        )
        if not (wrong and args.keep):
            shutil.rmtree(folder, ignore_errors=True)
        Path(args.report).write_text(json.dumps(report, indent=2))
    for script, row in report.items():
        print(f"{script}: {row['runs']} runs, {len(row['wrong'])} wrong, {row['counts']}")
    sys.exit(any(row["wrong"] for row in report.values()))


if __name__ == "__main__":
    main()
