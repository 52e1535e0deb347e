"""Do the tests notice? Puts one fault at a time into a copy of the checkout and runs the fast tests of that file.

    python tests/sabotage.py                      # all faults of all files
    python tests/sabotage.py datadream -k clip    # those of one file whose name has "clip" in it
    python tests/sabotage.py --list
    python tests/sabotage.py --jobs 4             # four copies at once

For each fault: the test that turned red, or NOT NOTICED. Exit code 1 when one was not noticed, or no longer applies.
"""

import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]


def sabotaged(source: str, fault: Fault) -> str:
    """The source with the fault in it. Raises ValueError when it no longer applies, SyntaxError if it is no Python."""
    if (times := source.count(fault.old)) != 1:
        raise ValueError(f"the fault no longer applies: its old text stands {times} times in the file")
    changed = source.replace(fault.old, fault.new)
    compile(changed, fault.name, "exec")
    return changed


def selection(file: str, fault: Fault) -> list[str]:
    """What pytest is given: "common/loop.py" has its tests in tests/test_common_loop.py."""
    own = f"tests/test_{file.removesuffix('.py').replace('/', '_')}.py"
    return [word if "/" in word else f"{own}::{word}" for word in fault.tests.split()] or [own]


class Copy:
    """A copy of the checkout to break, with the tests in it."""

    def __init__(self, root: Path, folder: Path):
        self.folder, self.process = folder, None
        folder.mkdir()
        # Copies, not links: the tests find the checkout from their own resolved path.
        for entry in root.iterdir():
            if entry.is_file():
                shutil.copy(entry, folder)
            elif entry.name in ("common", "docs", "shell", "tests"):
                shutil.copytree(entry, folder / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
        if sys.prefix != sys.base_prefix:
            (folder / ".venv").symlink_to(sys.prefix)

    def run(self, tests: list[str], limit: float | None) -> tuple[int | None, str]:
        """pytest, up to the first failure -> exit code (None: out of time), what it says about the failure."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE", "-m", "not slow"]
        command += ["-p", "no:cacheprovider", f"--basetemp={self.folder / 'tmp'}", *tests]
        # Trap: a .pyc is taken for fresh when size and second of change agree, which two faults can share.
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
        with open(self.folder / "output.txt", "w+", encoding="utf-8") as output:
            streams = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            self.process = subprocess.Popen(command, cwd=self.folder, env=env, start_new_session=True, **streams)
            try:
                code = self.process.wait(limit)
            except subprocess.TimeoutExpired:
                self.stop()
                return None, f"no end within {limit:g} s"
            output.seek(0)
            lines = [line.strip() for line in output if line.strip()] or ["pytest said nothing"]
        failures = [line for line in lines if line.startswith(("FAILED ", "ERROR"))]
        return code, (failures or lines)[0 if failures else -1]

    def stop(self):
        """End the tests and every process that they started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def tried(self, file: str, fault: Fault, limit: float) -> tuple[bool, str]:
        """Put the fault in, run the tests, take it out again -> was it noticed, a line that says by what."""
        path, begun = self.folder / file, time.monotonic()
        source = path.read_text(encoding="utf-8")
        try:
            changed = sabotaged(source, fault)
        except (ValueError, SyntaxError) as error:
            return False, f"DOES NOT APPLY: {error}"
        path.write_text(changed, encoding="utf-8")
        code, line = self.run(selection(file, fault), limit)
        path.write_text(source, encoding="utf-8")
        after = f"({time.monotonic() - begun:.0f} s)"
        if code == 1:  # a test failed; other codes are of runs that did not come so far
            return True, f"noticed by {line.partition(' ')[2]} {after}"
        return False, f"NOT NOTICED {after}" if code == 0 else f"NOT NOTICED, the tests did not run: {line} {after}"


def main(words: list[str] | None = None, root: Path = ROOT, faults: dict[str, list[Fault]] | None = None) -> int:
    """The command line; see the top of the file. -> exit code"""
    faults = FAULTS if faults is None else faults
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", help=f"of {', '.join(faults)}; default all")
    parser.add_argument("-k", default="", metavar="NAME", help="only faults with this in their name")
    parser.add_argument("--list", action="store_true", help="name the faults and their tests, run nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="copies at once (default 1)")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="for the tests of one fault")
    args = parser.parse_args(words)
    wanted = [name.removesuffix(".py") + ".py" for name in args.files]
    if unknown := [name for name in wanted if name not in faults]:
        parser.error(f"no faults for {', '.join(unknown)}; there are some for {', '.join(faults)}")
    chosen = [(f, x) for f in faults for x in faults[f] if f in (wanted or faults) and args.k in x.name]
    if not chosen:
        parser.error(f"no fault has {args.k!r} in its name")
    if args.list:
        for file, fault in chosen:
            print(f"{file}: {fault.name}: {' '.join(selection(file, fault))}")
        return 0

    with tempfile.TemporaryDirectory(prefix="sabotage-") as temporary, ThreadPoolExecutor(max(1, args.jobs)) as pool:
        copies = [Copy(root, Path(temporary) / f"copy{i}") for i in range(max(1, args.jobs))]
        free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for copy in copies:
            free.put(copy)

        def attempt(job):
            copy = free.get()
            try:
                return copy.tried(*job, args.limit)
            finally:
                free.put(copy)

        try:
            # Red tests notice everything: they must be green first.
            tests = list(dict.fromkeys(test for job in chosen for test in selection(*job)))
            code, line = copies[0].run(tests, None)
            if code != 0:
                print(f"error: the tests fail without any fault: {line}")
                return 1
            print(f"{len(chosen)} faults; without one, all is well: {line}", flush=True)
            missed = 0
            for (file, fault), (noticed, line) in zip(chosen, pool.map(attempt, chosen), strict=True):
                missed += not noticed
                print(f"{file}: {fault.name}: {line}", flush=True)
        except BaseException:  # Ctrl-C: the threads wait for their tests
            pool.shutdown(wait=False, cancel_futures=True)
            for copy in copies:
                copy.stop()
            raise
    print(f"{missed} of {len(chosen)} faults were not noticed" if missed else f"all {len(chosen)} faults were noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
