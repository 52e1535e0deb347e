"""One program on one process or many: set-up, small collectives, seeds, progress bars.

`python X.py`, `torchrun --nproc-per-node N X.py` and `srun python X.py` give the same result. Three habits make it so:
everything random comes from a generator seeded with what it is for (`generator(seed, "crop", key)`), work is split by
`items[rank::world]`, and what is added up over processes is added in one fixed order (`sum_in_order`).
"""

import hashlib
import json
import math
import operator
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as td
from tqdm import tqdm

from common.run import Launch, UserError, launched_as

T = TypeVar("T")
LINE_SECONDS = 10.0  # progress without a terminal: one line per so many seconds


@dataclass(frozen=True)
class Dist:
    """This process among the others. Work that each process does for itself gets Dist(0, local_rank, 1, device)."""

    rank: int
    local_rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """True on rank 0, which writes and prints."""
        return self.rank == 0


def setup_distributed(device: str = "auto", timeout_minutes: float = 240) -> Dist:
    """Join the other processes (torchrun's or SLURM's, if any) and choose the device.

    device: auto (cuda, else mps, else cpu), cpu, cuda, cuda:N (one process only) or mps. timeout_minutes: how long a
    process waits for the slowest one; a process that died is noticed at once. Raises UserError for a device that this
    machine does not have.
    """
    launch = launched_as()
    chosen = _pick_device(device, launch)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = False  # the fastest kernel of the moment may round differently
        torch.backends.cudnn.deterministic = True
    _use_all_cores()
    if launch.world > 1:
        if launch.slurm:
            os.environ.setdefault("MASTER_ADDR", slurm_master(os.environ))
            os.environ.setdefault("MASTER_PORT", str(slurm_port(os.environ)))
        if not td.is_initialized():
            td.init_process_group(
                # gloo beside nccl: objects and barriers then never touch the GPU
                "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
                rank=launch.rank,
                world_size=launch.world,
                timeout=timedelta(minutes=timeout_minutes),
            )
    return Dist(launch.rank, launch.local_rank, launch.world, chosen)


def _pick_device(name: str, launch: Launch) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())):
        raise UserError(f"--device {name}: unknown device; choose auto, cpu, cuda, cuda:N or mps")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Apple GPU; use --device cpu")
    if kind != "cuda":
        return torch.device(kind)

    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: no usable CUDA device on this machine; use --device cpu")
    if index and launch.world > 1:
        raise UserError(f"--device {name}: several processes take one GPU each; use --device cuda")
    number, count = int(index or launch.local_rank), torch.cuda.device_count()
    if number < count:
        return torch.device("cuda", number)
    if count == 1 and launch.slurm:  # srun --gpus-per-task=1: each process sees its own GPU only, as number 0
        return torch.device("cuda", 0)
    raise UserError(f"GPU {number} does not exist, this machine has {count}; start at most {count} processes on it")


def _use_all_cores() -> None:
    """As many threads as one process alone would have. Sharing the cores out would be a little faster, but the number
    of threads decides the order in which the CPU kernels add, and with it the last bits of every sum (measured)."""
    # torchrun sets OMP_NUM_THREADS=1 when the user set nothing; any other value is the user's wish and stays.
    forced = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if os.environ.get("OMP_NUM_THREADS") and not forced:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(int(os.environ.get("SLURM_CPUS_PER_TASK") or cores))


def expand_nodelist(text: str) -> list[str]:
    """SLURM's host list written out: "node[03-05,7],gpu1" -> node03, node04, node05, node7, gpu1."""
    hosts = []
    for word in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        expanded = [""]
        for plain, group in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", word):
            choices = [plain] if plain else []
            for part in group.split(",") if group else []:
                low, _, high = part.partition("-")
                choices += [f"{i:0{len(low)}d}" for i in range(int(low), int(high or low) + 1)]
            expanded = [head + choice for head in expanded for choice in choices]
        hosts += expanded
    return hosts


def slurm_master(env: dict[str, str]) -> str:
    """Host of rank 0: the first of the node list; the loopback address when all processes share one host."""
    hosts = expand_nodelist(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or "")
    return hosts[0] if len(hosts) > 1 else "127.0.0.1"


def slurm_port(env: dict[str, str]) -> int:
    """A port below the ephemeral range, the same for all processes of a job step, another for other steps."""
    digits = [re.sub(r"\D", "", env.get(name, "")) or "0" for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    return 15000 + (int(digits[0]) * 31 + int(digits[1])) % 15000


def cleanup(dist: Dist) -> None:
    """Leave the process group. Call it at the end of a run that went well; harmless with one process."""
    if dist.world > 1 and td.is_initialized():
        td.destroy_process_group()


def barrier(dist: Dist) -> None:
    """Wait until every process is here; raises when one does not come within setup_distributed's time-out."""
    if dist.world > 1:
        td.all_reduce(torch.zeros(1))  # on CPU, so through gloo: queues nothing on the GPU


def broadcast_object(obj: T, dist: Dist) -> T:
    """Rank 0's object on every process; the others may pass None."""
    if dist.world == 1:
        return obj
    box = [obj]
    td.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_object(obj: T, dist: Dist) -> list[T]:
    """[rank 0's object, rank 1's, ...] on every process."""
    if dist.world == 1:
        return [obj]
    boxes: list[Any] = [None] * dist.world
    td.all_gather_object(boxes, obj)
    return boxes


def gather_rows(tensor: torch.Tensor, dist: Dist) -> torch.Tensor:
    """All processes' rows, rank 0's first: [n_rank, ...] -> [sum of n_rank, ...]. n_rank may differ and be 0."""
    if dist.world == 1:
        return tensor
    counts = all_gather_object(len(tensor), dist)
    if max(counts) == 0:
        return tensor
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = _all_gather(padded.flatten(), dist)
    return torch.cat([part.view(padded.shape)[:n] for part, n in zip(parts, counts, strict=True)])


def _all_gather(flat: torch.Tensor, dist: Dist) -> list[torch.Tensor]:
    """Equal-sized 1-d tensors of all processes, as bytes, so that any dtype travels unchanged. No differentiation."""
    raw = flat.detach().contiguous().view(torch.uint8)
    if raw.device.type not in ("cpu", "cuda"):
        raw = raw.cpu()
    parts = list(raw.new_empty(dist.world, raw.numel()).unbind(0))
    td.all_gather(parts, raw)
    return [part.to(flat.device).view(flat.dtype) for part in parts]


@torch.no_grad()
def sum_in_order(tensors_by_unit: dict[int, list[torch.Tensor]], n_units: int, dist: Dist) -> list[torch.Tensor]:
    """((unit 0 + unit 1) + unit 2) + ...: a sum over processes that has the same bits for any number of them.

    A global batch is cut into `n_units` fixed units (micro-batches); rank r computes units r, r + world, ... and passes
    {unit: [tensor, ...]}. Every unit has the same shapes and dtypes in the same order (gradients, then the loss, say).
    -> the list of sums, on every process. An all-reduce would add in an order that depends on the number of processes,
    and float addition is not associative. Holds world units at a time; with one process nothing is sent.
    """
    mine = range(dist.rank, n_units, dist.world)
    assert n_units > 0 and sorted(tensors_by_unit) == list(mine), f"rank {dist.rank} must pass the units {list(mine)}"
    units = [[t.detach() for t in tensors_by_unit[j]] for j in mine]
    if dist.world == 1:
        return [_add_up([unit[i] for unit in units]) for i in range(len(units[0]))]

    like = [(t.shape, t.dtype) for t in units[0]] if units else None
    if n_units < dist.world:  # only then a rank is without a unit and cannot know the shapes
        like = broadcast_object(like, dist)
    device = units[0][0].device if units else dist.device
    totals: list[Any] = [None] * len(like)
    for dtype in dict.fromkeys(d for _, d in like):  # one flat buffer per dtype: normally one
        members = [i for i, (_, d) in enumerate(like) if d == dtype]
        sizes = [like[i][0].numel() for i in members]
        total = None
        for k in range(math.ceil(n_units / dist.world)):
            if k < len(units):
                flat = torch.cat([units[k][i].reshape(-1) for i in members])
            else:
                flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
            arrived = _all_gather(flat, dist)[: n_units - k * dist.world]
            total = _add_up(arrived if total is None else [total, *arrived])
        for i, part in zip(members, total.split(sizes), strict=True):
            totals[i] = part.view(like[i][0])
    return totals


def _add_up(parts: list[torch.Tensor]) -> torch.Tensor:
    """Left to right; no input is changed."""
    if len(parts) == 1:
        return parts[0].clone()
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total


def say(dist: Dist, *words: Any) -> None:
    """Print on rank 0, at once."""
    if dist.main:
        print(*words, flush=True)


def my_items(items: Sequence[T], dist: Dist) -> Sequence[T]:
    """This process's share of the work: items[rank::world]."""
    return items[dist.rank :: dist.world]


def seed_of(*parts: int | str) -> int:
    """A seed in 0 .. 2^63 - 1 from what it is for: the first 63 bits of sha256 of the parts as a JSON list.

    The same on every machine and in every version; 1 and "1" differ, and so do ("ab", "c") and ("a", "bc").
    """
    plain = [part if isinstance(part, str) else int(operator.index(part)) for part in parts]
    text = json.dumps(plain, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """CPU generator seeded with seed_of(*parts). Draw on CPU and move: GPU generators differ between devices."""
    return torch.Generator().manual_seed(seed_of(*parts))


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


def progress(total: int, desc: str, dist: Dist, initial: int = 0, unit: str = "images") -> tqdm:
    """tqdm bar with rate and time left on rank 0, nothing elsewhere; without a terminal one line every ten seconds.

    initial: what earlier attempts finished; it counts in the bar, not in the rate. Use update(n), set_postfix(...),
    close(), or `with`.
    """
    hidden = not dist.main or launched_as().rank != 0  # a process that works for itself calls itself rank 0
    terminal = sys.stderr.isatty()
    kind = tqdm if terminal else _Lines
    pace = {} if terminal else dict(mininterval=LINE_SECONDS, maxinterval=LINE_SECONDS, delay=LINE_SECONDS, ncols=100)
    return kind(total=total, desc=desc, initial=initial, unit=f" {unit}", disable=hidden, smoothing=0.1, **pace)
