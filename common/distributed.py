"""One program on one process or many: set-up, small collectives, seeds, orders, progress bars.

`python X.py` and `torchrun --nproc-per-node N X.py` give the same result. Three habits make it so: everything random
comes from a generator seeded with what it is for (`generator(seed, "crop", key)`), work is split by
`items[rank::world]`, and what is added up over processes is added in one fixed order (`common.loop`).
"""

import hashlib
import json
import operator
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.distributed as td
from tqdm import tqdm

from common.launch import Launch, UserError, launched_as
from common.meeting import PATIENCE, leave, meet, watch

T = TypeVar("T")
_as_list = json.JSONEncoder(separators=(",", ":"))  # of seed_of; json.dumps would build one per seed
LINE_SECONDS = 10.0  # progress without a terminal: one line per so many seconds
# Where the processes met; progress bars that they have filled together; size of teams -> the group of this process's.
_meeting = SimpleNamespace(store=None, bars=0, teams={})


@dataclass(frozen=True)
class Dist:
    """This process among the others."""

    rank: int
    local_rank: int
    world: int
    device: torch.device
    group: Any = None  # torch's process group of a team; None: all processes

    @property
    def main(self) -> bool:
        """True on rank 0, which writes and prints."""
        return self.rank == 0

    @property
    def threads(self) -> int:
        """CPU threads of a process. They decide the order in which CPU kernels add, and with it the last bits."""
        return torch.get_num_threads()

    def alone(self) -> "Dist":
        """This process for work that it does by itself."""
        return Dist(0, self.local_rank, 1, self.device)


def setup_distributed(device: str = "auto", deterministic: bool = True) -> Dist:
    """Join the other processes (torchrun's, if any) and choose the device.

    device: auto (cuda, else mps, else cpu), cpu, cuda, cuda:N (one process only) or mps. Raises UserError for a device
    that this machine does not have.
    """
    launch = launched_as()
    chosen = _pick_device(device, launch)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = not deterministic  # the fastest kernel of the moment may round differently
        torch.backends.cudnn.deterministic = deterministic
    _set_threads(launch, chosen)
    if launch.world > 1 and not td.is_initialized():
        # gloo beside nccl: objects and barriers then never touch the GPU
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        _meeting.store = meet(launch)
        watch(_meeting.store, launch)
        settings = dict(store=_meeting.store, rank=launch.rank, world_size=launch.world, timeout=PATIENCE)
        td.init_process_group(backend, **settings)
    return Dist(launch.rank, launch.local_rank, launch.world, chosen)


def _pick_device(name: str, launch: Launch) -> torch.device:
    if name == "auto":
        apple = torch.backends.mps.is_available() and launch.world == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if apple else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())):
        raise UserError(f"--device {name}: unknown device; choose auto, cpu, cuda, cuda:N or mps")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Apple GPU; use --device cpu")
    if kind == "mps" and launch.world > 1:
        raise UserError("--device mps: for one process; use --device cpu")
    if kind != "cuda":
        return torch.device(kind)

    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: no usable CUDA device on this machine; use --device cpu")
    if index and launch.world > 1:
        raise UserError(f"--device {name}: several processes take one GPU each; use --device cuda")
    number, count = int(index or launch.local_rank), torch.cuda.device_count()
    if max(number, launch.local_world - 1) >= count:  # every process says so, not the last one alone
        most = f"start at most {count} processes on it"
        raise UserError(f"GPU {max(number, launch.local_world - 1)} does not exist, this machine has {count}; {most}")
    return torch.device("cuda", number)


def _set_threads(launch: Launch, device: torch.device) -> None:
    """As many threads as the user's OMP_NUM_THREADS says, else as many as one process alone would have. Sharing the
    cores out would be a little faster, but the number of threads decides the last bits of every sum (measured)."""
    wish = os.environ.get("OMP_NUM_THREADS", "")
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun sets 1 when the user set nothing: ask what torchrun was given
        try:
            given = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
            wish = next((v[16:].decode() for v in given if v.startswith(b"OMP_NUM_THREADS=")), "")
        except OSError:
            wish = "" if wish == "1" else wish
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wish = wish.partition(",")[0]  # a list is for nested loops
    threads = int(wish) if wish.isdecimal() and int(wish) > 0 else cores
    torch.set_num_threads(threads)
    if device.type == "cpu" and launch.rank == 0 and threads > 1 and launch.local_world * threads > cores > 1:
        crowd = f"{launch.local_world} processes of {threads} threads share {cores} cores"
        each = max(1, cores // launch.local_world)
        print(f"{crowd}, which can be many times slower; for a new run set OMP_NUM_THREADS={each}", flush=True)


def cleanup(dist: Dist) -> None:
    """Leave the other processes, together with them, at the end of a run that went well; they take any other end of
    this process for its death. Harmless with one process."""
    if dist.world > 1 and td.is_initialized():
        barrier(dist)
        leave()
        td.destroy_process_group()
        _meeting.teams.clear()


def team_of(dist: Dist, size: int) -> Dist:
    """This process among the `size` neighbours of its team; size divides the number of processes. All must call."""
    if size == dist.world:
        return dist
    if size not in _meeting.teams:
        first = range(0, dist.world, size)
        groups = [td.new_group(list(range(rank, rank + size)), timeout=PATIENCE) for rank in first]
        _meeting.teams[size] = groups[dist.rank // size]
    return replace(dist, rank=dist.rank % size, world=size, group=_meeting.teams[size])


# ---------------------------------------------------------------------------------------
# Collectives


def barrier(dist: Dist) -> None:
    """Wait until every process is here, however long that takes."""
    if dist.world > 1:
        here = torch.zeros(1)  # on CPU, so gloo's: the GPU works on
        work, pause = td.all_reduce(here, group=dist.group, async_op=True), 1e-5
        while not work.is_completed():  # in Python, so that signals are obeyed
            time.sleep(pause)
            pause = min(1.5 * pause, 0.1)
        work.wait()  # raises when a process is gone


def broadcast_object(obj: T, dist: Dist) -> T:
    """Rank 0's object on every process; the others may pass None."""
    if dist.world == 1:
        return obj
    barrier(dist)  # a broadcast alone would let rank 0 go on before the others have come
    box = [obj]
    td.broadcast_object_list(box, group=dist.group, group_src=0)
    return box[0]


def on_rank_0(work: Callable[[], T], dist: Dist) -> T:
    """work() on rank 0 alone; its result, or its UserError, on every process. For what is listed or read once."""
    result, problem = None, None
    if dist.main:
        try:
            result = work()
        except UserError as error:
            if dist.world == 1:
                raise
            problem = str(error)
    result, problem = broadcast_object((result, problem), dist)
    if problem is not None:
        raise UserError(problem)
    return result


def all_gather_object(obj: T, dist: Dist) -> list[T]:
    """[rank 0's object, rank 1's, ...] on every process."""
    if dist.world == 1:
        return [obj]
    barrier(dist)
    boxes: list[Any] = [None] * dist.world
    td.all_gather_object(boxes, obj, group=dist.group)
    return boxes


def gather_rows(tensor: torch.Tensor, dist: Dist) -> torch.Tensor:
    """All processes' rows, rank 0's first: [n_rank, ...] -> [sum of n_rank, ...]. n_rank may differ and be 0."""
    counts = all_gather_object(len(tensor), dist) if dist.world > 1 else [len(tensor)]
    return gather_known_rows(tensor, counts, dist)


def gather_known_rows(tensor: torch.Tensor, counts: list[int], dist: Dist) -> torch.Tensor:
    """gather_rows where every process knows the numbers of rows: nothing waits for the device."""
    if dist.world == 1 or max(counts) == 0:
        return tensor
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    raw = padded.flatten().view(torch.uint8)  # as bytes: any dtype travels unchanged
    everyone = raw.new_empty(dist.world * raw.numel())
    td.all_gather_into_tensor(everyone, raw, group=dist.group)
    parts = everyone.view(tensor.dtype).view(dist.world, *padded.shape)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


def say(dist: Dist, *words: Any) -> None:
    """Print on rank 0, at once; of nothing but empty words nothing."""
    if dist.main and any(words):
        print(*words, flush=True)


# ---------------------------------------------------------------------------------------
# Who does what


def my_items(items: Sequence[T], dist: Dist) -> Sequence[T]:
    """This process's share of the work: items[rank::world]."""
    return items[dist.rank :: dist.world]


# ---------------------------------------------------------------------------------------
# Randomness


def seed_of(*parts: int | str) -> int:
    """A seed in 0 .. 2^63 - 1 from what it is for: the first 63 bits of sha256 of the parts as a JSON list.

    The same on every machine and in every version; 1 and "1" differ, and so do ("ab", "c") and ("a", "bc").
    """
    plain = [part if isinstance(part, str) else int(operator.index(part)) for part in parts]
    text = _as_list.encode(plain)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Generator seeded with seed_of(*parts). Draw on CPU and move: those of other devices differ among themselves."""
    return torch.Generator(device).manual_seed(seed_of(*parts))


def seed_global(seed: int, device: torch.device | None = None) -> None:
    """Seed the generators that library code draws from. torch.manual_seed would also queue a call, with its whole stack
    as text, for each GPU that was never used: a millisecond for every image."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)


class Order:
    """Entry at each position of an endless stream: one shuffled pass over n entries after another.

    A function of (seed parts, position). The last two passes are kept: loader workers run ahead into the next one.
    """

    def __init__(self, n: int, *seed_parts: int | str):
        self.n, self.seed_parts, self.passes = n, seed_parts, {}

    def _pass(self, number: int) -> torch.Tensor:
        if number not in self.passes:
            g = generator(*self.seed_parts, "order", number)
            self.passes[number] = torch.randperm(self.n, generator=g)
            if len(self.passes) > 2:
                del self.passes[next(iter(self.passes))]
        return self.passes[number]

    def __getitem__(self, position: int) -> int:
        return int(self._pass(position // self.n)[position % self.n])

    def rows(self, start: int, stop: int) -> list[int]:
        """Entries at positions start .. stop - 1."""
        found: list[int] = []
        while start < stop:
            number, i = divmod(start, self.n)
            taken = self._pass(number)[i : i + stop - start].tolist()
            found += taken
            start += len(taken)
        return found


# ---------------------------------------------------------------------------------------
# Progress


class _Lines(tqdm):
    """Progress for log files: whole lines instead of a bar that is drawn over."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        self.fp.write((str(self) if msg is None else msg) + "\n")
        self.fp.flush()

    def set_postfix(self, *values: Any, refresh: bool = True, **more: Any) -> None:
        super().set_postfix(*values, refresh=False, **more)

    def close(self) -> None:
        if not self.disable:
            self.disable, _ = True, self._decr_instances(self)
            self._ema_dt = lambda: None  # the last line shows the mean rate, not the latest
            self.display()


def progress(total: int, desc: str, dist: Dist, initial: int = 0, unit: str = "images", together: bool = False) -> tqdm:
    """tqdm bar with rate and time left on rank 0, nothing elsewhere; without a terminal one line every ten seconds.

    initial: what earlier attempts finished; it counts in the bar, not in the rate. together: total and bar count what
    all processes do; all must call. Use update(n), set_postfix(...), close(), or `with`.
    """
    hidden = not dist.main or launched_as().rank != 0  # a process that works for itself calls itself rank 0
    terminal = sys.stderr.isatty()
    kind = tqdm if terminal else _Lines
    pace = {} if terminal else dict(mininterval=LINE_SECONDS, maxinterval=LINE_SECONDS, delay=LINE_SECONDS, ncols=100)
    bar = kind(total=total, desc=desc, initial=initial, unit=f" {unit}", disable=hidden, smoothing=0.1, **pace)
    if together and dist.world > 1:
        _meeting.bars += 1
        own, key = bar.update, f"progress {_meeting.bars}"
        bar.update = lambda n=1: own(_meeting.store.add(key, n) - bar.n)  # a hidden bar counts nothing itself
    return bar
