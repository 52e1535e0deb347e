"""The run folder: flags, lock, stages with their seconds and files, metrics, results.

The same command continues: what is finished is found by its file and not done again, what is damaged is made again.
"""

import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common import inputs, listing, metrics
from common.cli import SPEED_FLAGS, end_with, set_stage
from common.files import lock, plain, read_json, remove_unfinished, write_json
from common.files import write_metadata as write_metadata
from common.launch import UserError, command_line, git_commit, versions
from common.reopen import COPY, FLAGS, compare, flags_of, has_work, some, unread

if TYPE_CHECKING:
    from common.datasets import Images
    from common.distributed import Dist

T = TypeVar("T")
RESULTS = ("results.json", "samples.png", "report.html")  # of the last stage
SECONDS_BETWEEN_SAVES = 15  # how often a running stage notes its time, for the sum over attempts that were killed


def _on_rank_0(work: Callable[[], T], dist: "Dist") -> T:
    if dist.world == 1:
        return work()
    from common.distributed import on_rank_0

    return on_rank_0(work, dist)


class Run:
    """A run folder in use; `open_run` makes it. Every rank has one; what writes a file does so on rank 0 only."""

    def __init__(self, folder: Path, dist: "Dist", script: str, args: dict[str, Any]):
        self.dir, self.dist, self.script, self.args = folder, dist, script, args
        self.stages: list[str] = list(args.get("stages") or [])
        self.info: dict[str, Any] = {}  # the content of args.json
        self.notes: list[str] = []  # what stands below the first table of the report
        self._track: Callable[[int, dict[str, float]], None] | None = None
        self._running: dict[str, Callable[[], float]] = {}  # stage -> its seconds so far
        self._announced: set[str] = set()
        self._untouched: dict[str, str | None] = {}  # the training at work while it has left nothing -> its memory flag
        self._release: Callable[[], Any] = lambda: None

    def path(self, *parts: str) -> Path:
        """Inside the folder."""
        return self.dir.joinpath(*map(str, parts))

    def _stage_file(self, stage: str, kind: str = ".json") -> Path:
        return self.path("stages", stage + kind)  # .json: finished; .partial.json: at work; .begun: see timed; .files

    def _say(self, stage: str, text: str) -> None:
        if self.dist.main:
            number = f"[{self.stages.index(stage) + 1}/{len(self.stages)}] " if stage in self.stages else ""
            print(f"{number}{stage}{text}", flush=True)

    def todo(self, stage: str) -> bool:
        """False when the stage is finished, which is then printed once. All ranks must call, rank 0 looks.

        A finished stage whose manifest or files are damaged (see `check`) is opened again, without those files.
        """
        finished = _on_rank_0(lambda: self._finished(stage), self.dist)
        if finished and stage not in self._announced:
            self._announced.add(stage)
            self._say(stage, ": done, skipped")
        return not finished

    def _finished(self, stage: str) -> bool:
        manifest = self._stage_file(stage)
        if not manifest.exists():
            return False
        try:
            bad = self.check(stage)
        except (UserError, TypeError, ValueError):  # cut, or no longer a dict
            bad = [f"stages/{stage}.json"]
        if not bad:
            return True
        self._say(stage, f": {some(bad)} missing or damaged, made again")
        write_json(self._stage_file(stage, ".partial.json"), {"seconds": _seconds(manifest)})
        beside = [f"{os.path.dirname(name)}/metrics.json" for name in bad]  # by which a training counts as finished
        for file in map(self.path, [*bad, *beside, f"stages/{stage}.json"]):
            if file.parent.resolve().is_relative_to(self.dir.resolve()):  # never what a damaged list may name elsewhere
                file.unlink(missing_ok=True)
        return False

    def check(self, stage: str) -> list[str]:
        """Files of a finished stage, as `done` was told, that are missing, cut or edited since: names in the folder.
        See common.listing. UserError when the manifest itself is damaged."""
        expected = self.manifest(stage).get("n_files", 0)
        return listing.damaged(self._stage_file(stage, ".files"), self.dir, expected) if expected else []

    def under(self, *names: str | Path) -> Iterator[str]:
        """All files in these folders of the run (or these files), for `done`."""
        return listing.under(self.dir, map(self._name, names))

    def _name(self, file: str | Path) -> str:
        return os.fspath(file).removeprefix(f"{self.dir}/")

    @contextmanager
    def timed(self, stage: str, memory_flag: str | None = None, trains: bool = False) -> Iterator[None]:
        """`with run.timed("train"):` counts the stage's seconds, over interrupted attempts too.

        memory_flag: the flag to name when the memory does not suffice, say "--gen-micro-batch". trains: all that the
        stage makes comes from loops that log; until the first of them has logged, its flags may still be changed.
        """
        before, start, over = _seconds(self._stage_file(stage, ".partial.json")), time.monotonic(), threading.Event()
        self._running[stage] = lambda: before + time.monotonic() - start
        set_stage(stage, memory_flag)
        self._say(stage, "")
        if trains and not self._stage_file(stage, ".begun").exists():
            self._untouched[stage] = memory_flag
        elif trains:
            set_stage(stage, memory_flag, begun=True)

        def keep_noting() -> None:
            while not over.wait(SECONDS_BETWEEN_SAVES):
                try:
                    self._note(stage, self._running[stage](), trains)
                except UserError as error:  # disk full, or the folder is gone
                    return end_with(str(error))

        noting = threading.Thread(target=keep_noting, daemon=True)
        if self.dist.main:
            self._note(stage, before, trains)
            noting.start()
        try:
            yield
        finally:
            over.set()
            self._untouched.clear()
            if self.dist.main:
                noting.join()
            seconds = self._running.pop(stage)()
            # If the folder is gone, this error takes the place of whatever that caused.
            self._note(stage, seconds, trains)
        set_stage("", None)  # not after an error, whose message names them
        self._say(stage, f": {seconds:.1f} s")

    def _note(self, stage: str, seconds: float, trains: bool) -> None:
        """Note the seconds of a stage at work. UserError when someone has removed the folder under the run."""
        if not self.path(FLAGS).exists():
            raise UserError(f"{self.dir}: removed while the run was at work; run the same command again")
        if self.dist.main:
            write_json(self._stage_file(stage, ".partial.json"), {"seconds": seconds, "trains": trains})

    def done(self, stage: str, files: Iterable[str | Path] | None = None, **manifest: Any) -> None:
        """Close a stage once every rank is here: stages/<stage>.json with its seconds and the manifest.

        files: what the stage wrote and later runs need, listed for `check`.
        """

        def close() -> None:
            metrics.tidy(self.dir)
            partial = self._stage_file(stage, ".partial.json")
            about = {"stage": stage, "seconds": round(_seconds(partial), 3)}
            if files is not None:
                about["n_files"] = listing.write(self._stage_file(stage, ".files"), self.dir, map(self._name, files))
            write_json(self._stage_file(stage), about | manifest)
            partial.unlink(missing_ok=True)
            self._stage_file(stage, ".begun").unlink(missing_ok=True)

        _on_rank_0(lambda: None, self.dist)  # a barrier: what the others wrote is there
        _on_rank_0(close, self.dist)
        self._announced.add(stage)

    def manifest(self, stage: str) -> dict[str, Any]:
        """What `done` was given, with "stage" and "seconds"; {} for a stage that is not finished."""
        file = self._stage_file(stage)
        return dict(read_json(file)) if file.exists() else {}

    def seconds(self) -> dict[str, float]:
        """{stage: seconds}, finished stages and the running one, in the script's order."""
        found = {file.name.split(".")[0]: _seconds(file) for file in self.path("stages").glob("*.json")}
        found |= {stage: elapsed() for stage, elapsed in self._running.items()}
        order = [*self.stages, *sorted(set(found) - set(self.stages))]
        return {stage: round(found[stage], 3) for stage in order if stage in found}

    def log(self, step: int, **scalars: float) -> None:
        """Append to metrics.jsonl. Names are "<chart>/<value>" or "<chart>/<line>/<value>", as in train/seed0/loss.

        Any rank may log; what several log alike, or an attempt logs again, counts once (the last value).
        """
        row = {key: float(value) for key, value in scalars.items()}
        self.made()
        metrics.append(self.dir, self.dist.rank, int(step), row)
        if self._track:
            self._track(int(step), row)

    def made(self) -> None:
        """The training at work leaves figures or a checkpoint behind: from now on its flags may not change."""
        while self._untouched:
            stage, flag = self._untouched.popitem()
            self._stage_file(stage, ".begun").touch()
            set_stage(stage, flag, begun=True)

    def results(self, **fields: Any) -> None:
        """results.json: script, dataset, preset, seed and seconds, and the fields paper, metrics, baselines, images."""
        if self.dist.main:
            known = {key: self.args.get(key) for key in ("dataset", "preset", "seed")}
            fields = {**known, "seconds": self.seconds(), **({"notes": self.notes} if self.notes else {}), **fields}
            write_json(self.path("results.json"), {"script": self.script, **fields})

    def close(self) -> None:
        """Release the folder; the end of the process does the same."""
        self._release()


def _seconds(file: Path) -> float:
    """Those in a stage's file; 0 for none, or a damaged one."""
    with suppress(UserError, KeyError, TypeError, ValueError):
        return float(read_json(file)["seconds"])
    return 0.0


# ---------------------------------------------------------------------------------------
# Opening a run folder


def _folder(script: str, values: dict[str, Any]) -> Path:
    default = f"runs/{script}/{values.get('preset', 'run')}-seed{values.get('seed', 0)}"
    return Path(values.get("output_dir") or default).expanduser()


def stage_finished(script: str, args: Any, stage: str) -> bool:
    """Before the run is opened, what it would say if nothing is damaged."""
    return (_folder(script, plain(args)) / "stages" / f"{stage}.json").exists()


def open_run(
    script: str,
    args: Any,
    dist: "Dist",
    speed_flags: Sequence[str] = (),
    models: dict[str, Any] | None = None,
    later: dict[str, str] | None = None,
    pictures: "dict[str, Images | None] | None" = None,
) -> Run:
    """Make or continue the run folder args.output_dir, default runs/<script>/<preset>-seed<seed>. All ranks must call.

    args: dataclass or dict of all flags. speed_flags: those that, besides the frame's own, may differ when a run is
    continued, because they do not change the result. models: {field: hash of what the flag names}; they may not differ
    either. later: {stage: "field prefix_ ..."}, what no stage before this one reads: it may change while the stage has
    not begun. pictures: {split: its images}, all that stages read; they are looked at first, and may not differ.
    Raises UserError, on every rank, for a folder in use, made with other flags, or not a run folder.
    """
    values = plain(args)
    free = {*SPEED_FLAGS, *speed_flags}
    assert free - set(SPEED_FLAGS) <= set(values), f"no flags of this script: {sorted(free - set(values))}"
    run = Run(_folder(script, values), dist, script, values)

    def work() -> tuple[dict[str, Any], list[str]]:
        try:
            if pictures:
                inputs.readable(pictures, dist)
            _open(run, free, plain(models or {}), later or {})
            if pictures and (note := inputs.held(run.dir, pictures, dist)):
                run.notes.append(note)
                print(f"warning: {note}", flush=True)
        except UserError:
            run.close()
            raise
        except (OSError, ValueError) as error:
            run.close()
            raise UserError(
                f"{run.dir}: {getattr(error, 'strerror', None) or error}; choose another --output-dir"
            ) from error
        return run.info, run.notes

    run.info, run.notes = _on_rank_0(work, dist)
    return run


def _open(run: Run, free: set[str], models: dict[str, Any], later: dict[str, str]) -> None:
    folder = run.dir
    if has_work(folder) or run.path(FLAGS).exists():
        flags_of(folder)  # someone else's folder is refused before anything is put into it
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run._release = weakref.finalize(run, lock(run.path(".lock")))
    except UserError as error:
        raise UserError(f"{folder}: {error}; wait for it, or choose another --output-dir") from error

    info = dict(script=run.script, args=run.args, models=models, command=command_line(), id=secrets.token_hex(6))
    info |= dict(world=run.dist.world, device=str(run.dist.device), threads=getattr(run.dist, "threads", None))
    info |= dict(versions=versions(), **git_commit())
    write = True
    # Flags alone are no work: a run that failed on its first check does not occupy the folder.
    if has_work(folder):
        if not run.args.get("resume", True):
            raise UserError(f"{folder}: holds a run already; give a new --output-dir, or leave out --no-resume")
        old, found_in = flags_of(folder)
        changed = compare(run, old, info, free, unread(run, later))
        if found_in != FLAGS:
            print(f"note: {run.path(FLAGS)} was damaged; restored from {found_in}")
        if old.get("git_commit") != info["git_commit"]:
            print(f"note: {folder} was begun at commit {old.get('git_commit')}, the code is now {info['git_commit']}")
        info, write = old, changed or found_in != FLAGS
    else:
        run.path(inputs.RECORD).unlink(missing_ok=True)
    for name in (COPY, FLAGS) if write else ():
        write_json(run.path(name), info)
    run.info = info
    remove_unfinished(folder)
    metrics.tidy(folder)
    kind = run.args.get("track", "none")
    try:
        run._track = metrics.tracker(kind, run.script, folder, run.args, info.get("id", ""))
    except ImportError as error:
        raise UserError(f"--track {kind}: {error}; pip install {kind}") from error
