"""The run folder and the frame around a script: command line, errors, signals, atomic files, stages, metrics, report.

Two promises hold for everything here. Nothing half-written ever has a final name: files are written under a temporary
name in the same folder, flushed to disk and renamed. And the same command continues: what is finished is found by its
file and not done again. Importing this module is cheap; torch comes in only when a tensor is saved.
"""

import dataclasses
import errno
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import queue
import re
import secrets
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import unicodedata
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from common.report import contact_sheet, format_table, page, tracker

if TYPE_CHECKING:  # both come from modules that import torch
    import torch

    from common.distributed import Dist

ROOT = Path(__file__).resolve().parents[1]
TEMPORARY = ".cleansynth-tmp-"  # start of the name of every unfinished file
PACKAGES = "torch torchvision diffusers transformers peft open_clip_torch timm numpy pillow safetensors tyro".split()
OUT_OF_MEMORY = r"out of memory|not enough memory: you tried|CUBLAS_STATUS_ALLOC_FAILED"  # CUDA and MPS, CPU, cuBLAS
LOST_CONTACT = r"(closed|reset) by peer|Broken pipe|Timed out waiting"  # gloo's words for a process that is gone
SECONDS_FOR_RANK_0 = 10  # how long another rank waits for rank 0 to report the same error
SECONDS_BETWEEN_SAVES = 15  # how often a running stage notes its time, for the sum over attempts that were killed


class UserError(Exception):
    """Something the user can put right. The message is one line: what, where, what to do. Exit code 2, no traceback."""


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by the first SIGINT or SIGTERM. Not an Exception, so no library swallows it."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """How this process was started: its rank, its number on this host, all processes, processes on this host."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1
    slurm: bool = False


def launched_as() -> Launch:
    """Read torchrun's or SLURM's variables; without either this is the only process."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        world = int(env["WORLD_SIZE"])
        return Launch(int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), world, int(env.get("LOCAL_WORLD_SIZE", world)))
    # Trap: a batch script has SLURM_PROCID=0 and the job's SLURM_NTASKS too, but only srun starts that many processes.
    in_batch_script = env.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in env
    world = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
    if "SLURM_PROCID" in env and world > 1 and not in_batch_script:
        hosts = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1)
        return Launch(int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", 0)), world, -(-world // hosts), True)
    return Launch()


# ---------------------------------------------------------------------------------------
# The command line and the end of a run


def cli(main: Callable[[Any], None], Args: type, presets: dict[str, dict[str, Any]], doc: str) -> None:
    """The entry point of a script: parse the command line into `Args`, call `main(args)`, end in an orderly way.

    Args: dataclass with defaults, one docstring per field, and a field `preset`. presets: {name: {field: value}}, the
    first is the default; flags override it. UserError, full disk and too little memory end with one line on stderr
    and exit code 2; SIGINT and SIGTERM with the command that continues, 130 and 143; everything else keeps its
    traceback.
    """
    launch = launched_as()
    _listen_to_signals(launch)
    try:
        args = _parse(Args, presets, doc, quiet=launch.rank != 0)
        _state.micro_batch = {flag(f): value for f, value in vars(args).items() if f.endswith("micro_batch")}
        _state.stage, _state.memory_flag = "", None  # of a run before this one in the same process
        main(args)
    except SystemExit as end:  # tyro's: --help, or a wrong flag that rank 0 explains
        if launch.rank != 0 and end.code:
            _let_rank_0_speak()
        raise
    except BaseException as error:
        _end(error, launch)
        raise


def _parse(Args: type, presets: dict[str, dict[str, Any]], doc: str, quiet: bool) -> Any:
    import tyro

    names = {field.name for field in dataclasses.fields(Args)}
    for name, values in presets.items():
        assert set(values) <= names, f"preset {name}: {sorted(set(values) - names)} are no fields of Args"

    chosen, words = next(iter(presets)), sys.argv[1:]
    for i, word in enumerate(words):
        if word.startswith("--preset="):
            chosen = word.partition("=")[2]
        elif word == "--preset" and i + 1 < len(words):  # a missing name is tyro's to explain
            chosen = words[i + 1]
    if chosen not in presets:
        raise UserError(f"--preset {chosen}: unknown preset; choose one of: {', '.join(presets)}")
    default = dataclasses.replace(Args(), preset=chosen, **presets[chosen])
    return tyro.cli(Args, default=default, description=doc, console_outputs=not quiet)


# What the handlers need to know: the signal received, whether its message was printed, the exit code once the end is
# decided, and what fills the memory just now.
_state = SimpleNamespace(signal=0, told=False, exit_code=None, owner=0, stage="", memory_flag=None, micro_batch={})


def _listen_to_signals(launch: Launch) -> None:
    _state.owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != _state.owner:  # a forked data loader: its parent ends it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if _state.exit_code is not None:
            os._exit(_state.exit_code)
        if _state.signal:  # the second one: leave at once; atomic writes make that safe
            _farewell(launch)
            os._exit(128 + _state.signal)
        _state.signal = number
        raise Stopped

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def _farewell(launch: Launch) -> None:
    if launch.rank == 0 and not _state.told:
        _state.told = True
        os.write(2, f"\nstopped; continue with: {command_line()}\n".encode())  # print is not allowed in a handler


def command_line() -> str:
    """The command that started this run, ready to paste into a shell."""
    launch, env = launched_as(), os.environ
    if launch.world == 1:
        return shlex.join(sys.orig_argv)
    if launch.slurm:
        return shlex.join(["srun", f"--ntasks={launch.world}", *sys.orig_argv])
    start = ["torchrun", f"--nproc-per-node={launch.local_world}"]
    if int(env.get("GROUP_WORLD_SIZE", 1)) > 1:
        start += [f"--nnodes={env['GROUP_WORLD_SIZE']}", f"--node-rank={env.get('GROUP_RANK', 0)}"]
        start += [f"--master-addr={env.get('MASTER_ADDR', '')}", f"--master-port={env.get('MASTER_PORT', '')}"]
    else:
        start.append("--standalone")
    return shlex.join([*start, *sys.argv])


def _end(error: BaseException, launch: Launch) -> None:
    """Leave the process with a message; returns when the error should end it with its traceback."""
    if _state.signal:  # a signal in the middle of library code may arrive here as that library's error
        _farewell(launch)
        _quit(128 + _state.signal, launch)
    line = _explain(error, launch)
    if line is None:
        if launch.world == 1:
            return
        sys.stderr.write(f"rank {launch.rank}: {traceback.format_exc()}")
        _quit(1, launch)
    if launch.rank != 0:
        _let_rank_0_speak()
    print("error:" if launch.rank == 0 else f"error on rank {launch.rank}:", line, file=sys.stderr)
    _quit(2, launch)


def _explain(error: BaseException, launch: Launch) -> str | None:
    """The one line for an error that needs no traceback, else None."""
    text = str(error)
    if isinstance(error, UserError):
        if "Original Traceback" in text:  # a data loader process wraps the message into its own traceback
            text = text.strip().splitlines()[-1].partition("UserError: ")[2]
        return text
    if _disk_full(error):
        place = getattr(error, "filename", None)
        return f"disk full{f' at {place}' if place else ''}; free some space and run the same command again"
    if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, text):
        flags = [_state.memory_flag] if _state.memory_flag else list(_state.micro_batch)
        advice = " or ".join(f"{name} (now {_state.micro_batch.get(name, '?')})" for name in flags)
        where = f" in stage {_state.stage}" if _state.stage else ""
        return f"out of memory{where}; halve {advice or 'the batch size'} and run the same command again"
    if launch.world > 1 and isinstance(error, RuntimeError) and re.search(LOST_CONTACT, text):
        return f"lost contact with another process, whose own message tells why ({text.splitlines()[0]})"
    return None


def flag(field: str) -> str:
    """A field of Args as it is typed: gen_micro_batch -> --gen-micro-batch."""
    return "--" + field.replace("_", "-")


def _let_rank_0_speak() -> None:
    """Most errors hit every rank; rank 0 reports them, and the launcher then ends this process quietly."""
    _state.exit_code = 2
    time.sleep(SECONDS_FOR_RANK_0)


def _quit(code: int, launch: Launch) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if launch.world == 1:
        sys.exit(code)
    os._exit(code)  # an orderly exit could wait for the others in a collective for ever


# ---------------------------------------------------------------------------------------
# Files: written under a temporary name, flushed, renamed


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """`with atomic(path) as temporary:` write to `temporary`; a block that ends well gives it its name.

    Makes the folder. Raises UserError when the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(TEMPORARY + secrets.token_hex(8))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if _disk_full(error):
            raise UserError(f"disk full at {path}; free some space and run the same command again") from error
        raise


def _disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, obj: Any) -> None:
    """Write JSON atomically. Dataclasses, paths, tensors and arrays become plain values, nan and inf become null."""
    write_bytes(path, (json.dumps(_plain(obj), indent=2, ensure_ascii=False) + "\n").encode())


def _plain(obj: Any) -> Any:
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        obj = {field.name: getattr(obj, field.name) for field in dataclasses.fields(obj)}
    if hasattr(obj, "tolist"):  # numpy and torch, scalars included
        obj = obj.tolist()
    if isinstance(obj, dict):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_plain(value) for value in obj]
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return str(obj) if isinstance(obj, Path) else obj


def save_tensors(path: str | Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; tensors may lie on any device, be views, or share memory.

    Equal tensors and metadata give equal bytes. (The library's save_file puts the metadata in random order, needs
    contiguous tensors that share no memory, and leaves a file that only its owner can read.)
    """
    import torch

    kinds = "float64 F64 float32 F32 float16 F16 bfloat16 BF16 int64 I64 int32 I32 int16 I16 int8 I8 uint8 U8 bool BOOL"
    code = {getattr(torch, name): kind for name, kind in zip(kinds.split()[::2], kinds.split()[1::2], strict=True)}
    # The widest type first: every tensor then starts at a multiple of its own width.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": code[tensors[name].dtype], "shape": list(tensors[name].shape)}
        header[name]["data_offsets"] = [begin, end]
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with atomic(path) as temporary, open(temporary, "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            f.write(memoryview(flat.view(torch.uint8).numpy()))


def load_tensors(path: str | Path) -> "dict[str, torch.Tensor]":
    """Read a safetensors file to the CPU. Raises UserError when it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); delete it and run again") from error


class ImageWriter:
    """`with ImageWriter() as writer: writer.save(path, image)`: threads encode PNG (lossless) and write atomically.

    At most `waiting` images wait, so memory stays flat and save() blocks when the disk is the slower side. The first
    error is raised by the next save() or at the end of the block, which waits until every image has its final name.
    """

    def __init__(self, threads: int = 4, waiting: int = 64, compress_level: int = 1):
        self.compress_level = compress_level
        self.queue: queue.Queue = queue.Queue(waiting)
        self.error: Exception | None = None
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def save(self, path: str | Path, image: Any) -> None:
        """image: uint8 array [H, W, 3], uint8 tensor [3, H, W] or PIL image; copied, so the caller may reuse it."""
        if self.error:
            raise self.error
        self.queue.put((Path(path), to_pil(image)))

    def _work(self) -> None:
        while (item := self.queue.get()) is not None:
            if self.error:
                continue  # keep emptying the queue, or save() would block for ever
            path, image = item
            try:
                with atomic(path) as temporary:
                    image.save(temporary, format="PNG", compress_level=self.compress_level)
            except UserError as error:
                self.error = error
            except Exception as error:
                self.error = RuntimeError(f"{path}: cannot be written: {error!r}")

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for _ in self.threads:
            self.queue.put(None)
        for thread in self.threads:
            thread.join()
        if self.error and error is None:
            raise self.error


def to_pil(image: Any) -> Any:
    """uint8 array [H, W, 3], uint8 tensor [3, H, W] or PIL image -> a PIL image with its own memory."""
    import numpy as np
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.copy()
    array = image.permute(1, 2, 0).cpu().numpy() if hasattr(image, "permute") else np.asarray(image)
    assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3, (
        f"uint8 array [H, W, 3] or tensor [3, H, W] expected; as [H, W, C] it is {array.dtype} {array.shape}"
    )
    return Image.fromarray(np.array(array))


def existing_images(folder: str | Path) -> set[int]:
    """Numbers k for which <folder>/<k>.png exists; one listing, no file is opened. Empty if there is no folder."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries]
    except FileNotFoundError:
        return set()
    return {int(name[:-4]) for name in names if name.endswith(".png") and re.fullmatch(r"[0-9]+", name[:-4])}


def slug(name: str, maxlen: int = 80) -> str:
    """A class name as part of a file name: letters and digits of any script, other runs become "_".

    Never empty, at most `maxlen` bytes, lower case, no separators, dots or control characters.
    """
    plain = unicodedata.normalize("NFKD", name)
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    plain = re.sub(r"[\W_]+", "_", unicodedata.normalize("NFC", plain).lower())
    return plain.encode()[:maxlen].decode(errors="ignore").strip("_") or "class"


def class_folders(class_names: Sequence[str]) -> list[str]:
    """["sea lake", "forest"] -> ["00_sea_lake", "01_forest"]; sorted order is label order.

    Raises UserError when two classes have the same name, or the same slug (they look alike to a reader of the folder).
    """
    width = max(2, len(str(len(class_names) - 1)))
    slugs = [slug(name) for name in class_names]
    for i, s in enumerate(slugs):
        if (j := slugs.index(s)) < i:
            raise UserError(
                f"classes {j} and {i}, {class_names[j]!r} and {class_names[i]!r}, have the same name {s!r}; rename one"
            )
    return [f"{i:0{width}d}_{s}" for i, s in enumerate(slugs)]


def write_metadata(folder: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """<folder>/metadata.jsonl, the hub's imagefolder convention; each row has file_name, relative to the folder."""
    lines = [json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows]
    write_bytes(Path(folder) / "metadata.jsonl", "".join(lines).encode())


# ---------------------------------------------------------------------------------------
# The run folder


def _from_rank_0(obj: Any, dist: "Dist") -> Any:
    if dist.world == 1:
        return obj
    from common.distributed import barrier, broadcast_object

    barrier(dist)  # a broadcast alone lets rank 0 go on before the others have come
    return broadcast_object(obj, dist)


class Run:
    """A run folder in use; `open_run` makes it. Every rank has one; what writes a file does so on rank 0 only."""

    def __init__(self, folder: Path, dist: "Dist", script: str, args: dict[str, Any]):
        self.dir, self.dist, self.script, self.args = folder, dist, script, args
        self.stages: list[str] = list(args.get("stages") or [])
        self.info: dict[str, Any] = {}  # the content of args.json
        self._track: Callable[[int, dict[str, float]], None] | None = None
        self._running: dict[str, Callable[[], float]] = {}  # stage -> its seconds so far
        self._announced: set[str] = set()
        self._release: Callable[[], Any] = lambda: None

    def path(self, *parts: str) -> Path:
        """A path inside the folder."""
        return self.dir.joinpath(*map(str, parts))

    def _say(self, stage: str, text: str) -> None:
        if self.dist.main:
            number = f"[{self.stages.index(stage) + 1}/{len(self.stages)}] " if stage in self.stages else ""
            print(f"{number}{stage}{text}", flush=True)

    def todo(self, stage: str) -> bool:
        """False when the stage is finished, which is then printed once. Rank 0 looks; all ranks must call."""
        finished = _from_rank_0(self.path("stages", f"{stage}.json").exists(), self.dist)
        if finished and stage not in self._announced:
            self._announced.add(stage)
            self._say(stage, ": done, skipped")
        return not finished

    @contextmanager
    def timed(self, stage: str, memory_flag: str | None = None) -> Iterator[None]:
        """`with run.timed("train"):` counts the stage's seconds, over interrupted attempts too.

        memory_flag: the flag to name when the memory does not suffice, say "--gen-micro-batch".
        """
        file, start = self.path("stages", f"{stage}.partial.json"), time.monotonic()
        before = json.loads(file.read_text())["seconds"] if file.exists() else 0.0
        self._running[stage] = lambda: before + time.monotonic() - start
        _state.stage, _state.memory_flag = stage, memory_flag
        self._say(stage, "")
        over = threading.Event()

        def keep_saving() -> None:
            while not over.wait(SECONDS_BETWEEN_SAVES):
                with suppress(UserError, OSError):  # a full disk will stop the main thread soon enough
                    write_json(file, {"seconds": self._running[stage]()})

        saver = threading.Thread(target=keep_saving, daemon=True)
        if self.dist.main:
            saver.start()
        try:
            yield
        finally:
            over.set()
            if self.dist.main:
                saver.join()
                write_json(file, {"seconds": self._running[stage]()})
            seconds = self._running.pop(stage)()
        _state.stage, _state.memory_flag = "", None  # not after an error, whose message names them
        self._say(stage, f": {seconds:.1f} s")

    def done(self, stage: str, **manifest: Any) -> None:
        """Close a stage once every rank is here: stages/<stage>.json with its seconds and the manifest."""
        _from_rank_0(None, self.dist)  # a barrier
        if self.dist.main:
            tidy_metrics(self.dir)
            partial = self.path("stages", f"{stage}.partial.json")
            seconds = json.loads(partial.read_text())["seconds"] if partial.exists() else 0.0
            write_json(self.path("stages", f"{stage}.json"), {"stage": stage, "seconds": round(seconds, 3), **manifest})
            partial.unlink(missing_ok=True)
        self._announced.add(stage)
        _from_rank_0(None, self.dist)  # from here on every rank sees the file

    def manifest(self, stage: str) -> dict[str, Any]:
        """What `done` was given, with "stage" and "seconds"; {} for a stage that is not finished."""
        file = self.path("stages", f"{stage}.json")
        return json.loads(file.read_text()) if file.exists() else {}

    def seconds(self) -> dict[str, float]:
        """{stage: seconds}, finished stages and the running one, in the script's order."""
        found = {file.stem: json.loads(file.read_text())["seconds"] for file in self.path("stages").glob("*.json")}
        found = {name.removesuffix(".partial"): value for name, value in found.items()}
        found |= {stage: elapsed() for stage, elapsed in self._running.items()}
        order = [*self.stages, *sorted(set(found) - set(self.stages))]
        return {stage: round(found[stage], 3) for stage in order if stage in found}

    def log(self, step: int, **scalars: float) -> None:
        """Append to metrics.jsonl. Names are "<chart>/<value>" or "<chart>/<line>/<value>", as in train/seed0/loss.

        Any rank may log; what several log alike, or an attempt logs again, counts once (the last value).
        """
        row = {"step": int(step), **{key: float(value) for key, value in scalars.items()}}
        name = "metrics.jsonl" if self.dist.main else f"metrics.rank{self.dist.rank}.jsonl"
        with open(self.path(name), "a") as f:
            f.write(json.dumps(_plain(row)) + "\n")
        if self._track:
            self._track(step, {key: value for key, value in row.items() if key != "step"})

    def results(self, **fields: Any) -> None:
        """results.json: script, dataset, preset, seed and seconds, and the fields paper, metrics, baselines, images."""
        if self.dist.main:
            known = {key: self.args.get(key) for key in ("dataset", "preset", "seed")}
            write_json(self.path("results.json"), {"script": self.script, **known, "seconds": self.seconds(), **fields})

    def close(self) -> None:
        """Release the folder; the end of the process does the same."""
        self._release()


def open_run(
    script: str,
    args: Any,
    dist: "Dist",
    speed_flags: Sequence[str] = (),
    models: dict[str, Any] | None = None,
) -> Run:
    """Make or continue the run folder args.output_dir, default runs/<script>/<preset>-seed<seed>. All ranks must call.

    args: dataclass or dict of all flags. speed_flags: those that may differ when a run is continued, because they do
    not change the result. models: ids and hashes for args.json; they may not differ either. Raises UserError, on every
    rank, for a folder in use, made with other flags, or not a run folder.
    """
    values = _plain(args)
    assert set(speed_flags) <= set(values), f"no flags of this script: {sorted(set(speed_flags) - set(values))}"
    default = f"runs/{script}/{values.get('preset', 'run')}-seed{values.get('seed', 0)}"
    run = Run(Path(values.get("output_dir") or default).expanduser(), dist, script, values)
    problem = None
    if dist.main:
        try:
            _open(run, set(speed_flags), _plain(models or {}))
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{run.dir}: {error.strerror or error}; choose another --output-dir"
        if problem:
            run.close()
    problem, run.info = _from_rank_0((problem, run.info), dist)
    if problem:
        raise UserError(problem)
    return run


def _open(run: Run, speed_flags: set[str], models: dict[str, Any]) -> None:
    folder, file = run.dir, run.path("args.json")
    if _has_work(folder) or file.exists():
        _flags_of(folder)  # someone else's folder is refused before anything is put into it
    folder.mkdir(parents=True, exist_ok=True)
    run._release = _lock(run)

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    world = dict(world=run.dist.world, device=str(run.dist.device))
    code = dict(versions=versions, **git_commit())
    info = dict(script=run.script, args=run.args, speed_flags=sorted(speed_flags), models=models)
    info |= dict(command=command_line(), **world, **code)
    # Flags alone are no work: a run that failed on its first check does not occupy the folder.
    if _has_work(folder):
        if not run.args.get("resume", True):
            raise UserError(f"{folder}: holds a run already; give a new --output-dir, or leave out --no-resume")
        old = _flags_of(folder)
        _refuse_other_flags(folder, old, info)
        if old.get("git_commit") != info["git_commit"]:
            print(f"note: {folder} was begun at commit {old.get('git_commit')}, the code is now {info['git_commit']}")
        info = old
    else:
        write_json(file, info)
    run.info = info
    for leftover in folder.rglob(TEMPORARY + "*"):
        leftover.unlink(missing_ok=True)
    tidy_metrics(folder)
    kind = run.args.get("track", "none")
    try:
        run._track = tracker(kind, run.script, folder, run.args)
    except ImportError as error:
        raise UserError(f"--track {kind}: {error}; pip install {kind}") from error


def _flags_of(folder: Path) -> dict[str, Any]:
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):
        info = json.loads((folder / "args.json").read_text())
        if isinstance(info, dict) and {"script", "args", "models"} <= set(info):
            return info
    raise UserError(f"{folder}: not empty and not a run folder; choose a new --output-dir")


def _has_work(folder: Path) -> bool:
    """Is there anything in the folder but flags, a lock, dashboards and what a killed process left?"""
    empty = re.compile(rf"args\.json|\.lock|.*\.partial\.json|{re.escape(TEMPORARY)}.*")
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("tensorboard", "wandb")]
        if any(not empty.fullmatch(name) for name in names):
            return True
    return False


def _refuse_other_flags(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    if old["script"] != new["script"]:
        raise UserError(f"{folder}: made by {old['script']}, not by {new['script']}; choose a new --output-dir")
    free, rows = set(new["speed_flags"]), []
    for kind, named in (("args", flag), ("models", "model {}".format)):
        for key in [*new[kind], *(key for key in old[kind] if key not in new[kind])]:
            pair = [json.dumps(side[kind].get(key), ensure_ascii=False) for side in (old, new)]
            if pair[0] != pair[1] and not (kind == "args" and key in free):
                rows.append([named(key), *pair])
    if rows:
        table = format_table(["flag", "folder has", "you asked"], rows)
        raise UserError(f"{folder}: made with other flags; use those again or choose a new --output-dir\n{table}")


def _lock(run: Run) -> Callable[[], Any]:
    """Take the folder for this process, or raise UserError. -> function that releases it."""
    path = run.path(".lock")
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(fd, 200).decode(errors="replace") or "another process"
            os.close(fd)
            raise UserError(f"{run.dir}: in use by {holder}; wait for it, or choose another --output-dir") from error
        except OSError as error:  # some network file systems have no locks
            print(f"note: {run.dir} cannot be locked ({error.strerror}); start only one run in it")
        # Another process may have released, that is removed, the file between our open and our lock.
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                break
        os.close(fd)
    os.ftruncate(fd, 0)
    os.write(fd, f"process {os.getpid()} on {socket.gethostname()}".encode())
    owner, held = os.getpid(), [fd]

    def release() -> None:
        if held and os.getpid() == owner:
            path.unlink(missing_ok=True)
            os.close(held.pop())

    def forget_in_child() -> None:  # a forked data loader that outlives a killed run must not keep its lock
        if held and os.getpid() != owner:
            os.close(held.pop())

    os.register_at_fork(after_in_child=forget_in_child)
    return weakref.finalize(run, release)


def git_commit() -> dict[str, Any]:
    """{"git_commit": hash or None outside a git checkout, "git_dirty": were tracked files changed}."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        top, commit = git("rev-parse", "--show-toplevel", "HEAD").split("\n")
        if Path(top) == ROOT:  # not when the files merely lie inside someone else's repository
            return {"git_commit": commit, "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, ValueError, subprocess.SubprocessError):
        pass
    return {"git_commit": None, "git_dirty": None}


# ---------------------------------------------------------------------------------------
# Numbers and pictures


def _metric_rows(folder: Path) -> list[dict[str, float]]:
    rows = []
    for file in sorted(Path(folder).glob("metrics*.jsonl")):
        for line in file.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # the line that a killed process was writing
                rows.append(json.loads(line))
    return rows


def tidy_metrics(folder: str | Path) -> None:
    """Put what the ranks logged into metrics.jsonl, each (name, step) once: the last value."""
    seen, kept = set(), []
    for row in reversed(_metric_rows(Path(folder))):
        fresh = {key: value for key, value in row.items() if key != "step" and (key, row["step"]) not in seen}
        seen |= {(key, row["step"]) for key in fresh}
        if fresh:
            kept.append(json.dumps({"step": row["step"], **fresh}) + "\n")
    file, content = Path(folder) / "metrics.jsonl", "".join(reversed(kept)).encode()
    if kept and not (file.exists() and file.read_bytes() == content):  # a finished run is left untouched
        write_bytes(file, content)
    for file in Path(folder).glob("metrics.rank*.jsonl"):
        file.unlink()


def read_metrics(folder: str | Path) -> dict[str, dict[int, float | None]]:
    """{name: {step: value}}, steps ascending; None stands for a value that was not finite."""
    found: dict[str, dict[int, float | None]] = {}
    for row in _metric_rows(Path(folder)):
        for key, value in row.items():
            if key != "step":
                found.setdefault(key, {})[row["step"]] = value
    return {key: dict(sorted(values.items())) for key, values in found.items()}


def check_finite(value: float, where: str) -> None:
    """Stop the run when a loss is nan or infinite. where: stage and step, for the message."""
    if not math.isfinite(float(value)):
        raise UserError(
            f"{where}: the loss is {float(value)}; stopped, the last checkpoint is kept. "
            "Try a lower learning rate or --precision fp32 in a new --output-dir"
        )


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table, call it on rank 0."""
    print("\n" + format_table(header, rows) + "\n", flush=True)


def samples_grid(
    path: str | Path,
    rows: Sequence[Sequence[Any]],
    row_names: Sequence[str],
    col_names: Sequence[str] | None = None,
    size: int = 96,
) -> None:
    """Contact sheet as PNG. rows: lists of images as ImageWriter.save takes them, None leaves a gap.

    size: pixels of a cell. Bands of 12 columns; of more than 96 columns 96 are shown, evenly chosen.
    """
    import io

    pictures = [[None if image is None else to_pil(image) for image in row] for row in rows]
    data = io.BytesIO()
    contact_sheet(pictures, row_names, col_names, size).save(data, format="PNG")
    write_bytes(path, data.getvalue())


def report(
    run: Run,
    title: str,
    summary: str,
    tables: dict[str, tuple[Sequence[str], Sequence[Sequence[Any]]]],
    pictures: dict[str, str] | None = None,
    confusion: Any = None,
    class_names: Sequence[str] = (),
) -> None:
    """report.html: one page without outside links. Call it on rank 0.

    tables: {caption: (header, rows)}, results first; cells are shown as they are ("93.1 ± 0.4"). pictures: {caption:
    file in the run folder}, default samples.png if it exists; they are embedded. confusion: counts [C, C], row = true
    class. The curves come from metrics.jsonl, one chart for each "<chart>/.../<value>".
    """
    if pictures is None:
        pictures = {"Real and generated samples": "samples.png"} if run.path("samples.png").exists() else {}
    html = page(
        title=title,
        summary=summary,
        tables=tables,
        pictures={caption: run.path(file).read_bytes() for caption, file in pictures.items()},
        curves=read_metrics(run.dir),
        confusion=_plain(confusion),
        class_names=class_names,
        seconds=run.seconds(),
        info=run.info,
    )
    write_bytes(run.path("report.html"), html.encode())
