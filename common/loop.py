"""The one training loop of all scripts: resume, progress, checkpoint, sums over processes. The script keeps the method.

    loop = Loop(run, "finetune", total, optimizer, team, micro_batch, file=checkpoint)
    for step in loop:                          # goes on where the checkpoint stands; saves by time
        for u in loop.units(len(batch)):       # slices of the batch: this process's micro-batches
            loss = ...                         # the micro-batch's share of the batch's loss
            loop.backward(loss)                # keeps the gradients of each micro-batch apart
        loss = loop.update(lr=..., clip=1.0)   # adds them up in one order over all processes, then optimizer.step()
        loop.log(loss=loss)                    # means go to metrics.jsonl; stops when one is not finite
    loop.finish()                              # when the result is written: removes the checkpoint

Float addition is not associative, so the order of the additions is part of the result. A batch is cut into units
(micro-batches) 0..U-1 and their gradients are added along one binary tree over the unit numbers, ((0+1)+(2+3))+...,
that does not depend on the number of processes. Process r computes a contiguous range of units, so it can add up whole
branches of the tree by itself, and the bits are those of one process for any number of processes.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from safetensors import SafetensorError, safe_open

from common.distributed import Dist, progress
from common.files import save_tensors
from common.launch import UserError

traffic = {"bytes": 0}  # sent by this process in sum_in_order so far, for the benchmark


def units_of(rank: int, n_units: int, world: int) -> range:
    """The units that a process computes: contiguous ranges, as equal as can be."""
    return range(n_units * rank // world, n_units * (rank + 1) // world)


def _branches(units: range) -> list[tuple[int, int]]:
    """The largest whole branches (first unit, length 2^k, aligned) that make up a range of units, in order."""
    found, start = [], units.start
    while start < units.stop:
        length = 1
        while start % (2 * length) == 0 and start + 2 * length <= units.stop:
            length *= 2
        found.append((start, length))
        start += length
    return found


def _tree_sum(parts: dict[tuple[int, int], Any], start: int, length: int, n_units: int) -> Any:
    """Value of a branch from the branches in parts: left + right; None beyond the last unit."""
    if start >= n_units:
        return None
    if (start, length) in parts:
        return parts[start, length]
    left = _tree_sum(parts, start, length // 2, n_units)
    right = _tree_sum(parts, start + length // 2, length // 2, n_units)
    return left if right is None else left + right


class _Adder:
    """Adds units as they come, in order, holding one buffer per open branch of the tree: log2(units) of them."""

    def __init__(self) -> None:
        self.open: dict[tuple[int, int], list[torch.Tensor]] = {}

    def add(self, unit: int, tensors: Sequence[torch.Tensor]) -> None:
        branch, value = (unit, 1), [t.detach() for t in tensors]
        while branch[0] % (2 * branch[1]) and (left := (branch[0] - branch[1], branch[1])) in self.open:
            value = torch._foreach_add(self.open.pop(left), value)
            branch = left[0], 2 * left[1]
        self.open[branch] = value


@torch.no_grad()
def sum_in_order(tensors_by_unit: dict[int, Sequence[torch.Tensor]], n_units: int, dist: Dist) -> list[torch.Tensor]:
    """Tree sum of the units of all processes, the same bits for any number of them -> list of sums, on every process.

    This process passes the units units_of(rank, n_units, world): {unit: [tensor, ...]}, each with the same shapes and
    dtypes. The P numbers of a unit are cut into `world` parts; part q of every branch goes to process q, which adds
    them along the tree, and the sums are gathered: 2 P numbers sent by each process, as in an all-reduce, whenever its
    units are one branch of the tree (n_units <= world, or a power of two times it), and P more for each further branch.
    """
    adder = _Adder()
    for unit in sorted(tensors_by_unit):
        adder.add(unit, tensors_by_unit[unit])
    return _finish(adder, n_units, dist, None)


def _finish(adder: _Adder, n_units: int, dist: Dist, like: list | None) -> list[torch.Tensor]:
    """like: [(shape, dtype)] of a unit, needed on a process that has none; None: rank 0's is asked for then."""
    width = 1 << max(0, n_units - 1).bit_length()
    if dist.world == 1:
        names = range(len(next(iter(adder.open.values()))))
        return [_tree_sum({k: v[i] for k, v in adder.open.items()}, 0, width, n_units) for i in names]
    mine = next(iter(adder.open.values()), None)
    if like is None:
        like = [(t.shape, t.dtype) for t in mine] if mine else None
        if n_units < dist.world:
            owner = next(r for r in range(dist.world) if units_of(r, n_units, dist.world))
            box = [like]
            td.broadcast_object_list(box, src=owner)
            like = box[0]
    device = mine[0].device if mine else dist.device
    branches = [_branches(units_of(r, n_units, dist.world)) for r in range(dist.world)]
    totals: list[Any] = [None] * len(like)
    for dtype in dict.fromkeys(d for _, d in like):  # one flat buffer per dtype: normally one
        members = [i for i, (_, d) in enumerate(like) if d == dtype]
        sizes = [like[i][0].numel() for i in members]
        part = -(-sum(sizes) // dist.world)
        own = torch.zeros(len(branches[dist.rank]), part * dist.world, dtype=dtype, device=device)
        for row, branch in zip(own, branches[dist.rank], strict=True):
            torch.cat([adder.open[branch][i].reshape(-1) for i in members], out=row[: sum(sizes)])
        # [branches, world, part] -> the part of process 0 of all branches, of process 1, ...
        send = own.view(-1, dist.world, part).transpose(0, 1).contiguous().flatten()
        counts = [len(b) * part for b in branches]
        arrived = send.new_empty(sum(counts))
        td.all_to_all_single(arrived, send, counts, [counts[dist.rank]] * dist.world)
        rows = iter(arrived.view(-1, part))
        parts = {branch: next(rows) for of_rank in branches for branch in of_rank}
        total = _tree_sum(parts, 0, width, n_units).contiguous()
        everyone = total.new_empty(dist.world * part)
        td.all_gather_into_tensor(everyone, total)
        others = (dist.world - 1) / dist.world  # what a process keeps does not travel
        traffic["bytes"] += int(others * (send.nbytes + everyone.nbytes))
        for i, flat in zip(members, everyone[: sum(sizes)].split(sizes), strict=True):
            totals[i] = flat.view(like[i][0])
    return totals


@torch.no_grad()
def gather_units(tensors: dict[int, torch.Tensor], n_units: int, dist: Dist) -> list[torch.Tensor]:
    """One tensor of each unit, units_of this process passed -> those of all units in order, on every process."""
    if dist.world == 1:
        return [tensors[j] for j in range(n_units)]
    from common.distributed import all_gather_object

    found: dict[int, torch.Tensor] = {}
    for part in all_gather_object({j: t.detach().cpu() for j, t in tensors.items()}, dist):
        found |= part
    return [found[j].to(dist.device) for j in range(n_units)]


class Loop:
    """See the top of this file.

    run, chart: where values are logged, as <chart>/<name>. total: steps. optimizer: all its parameters are trained.
    team: the processes that share each step. micro_batch: items of a unit. file: the checkpoint. params: whose
    gradients `backward` takes (default: all of the optimizer's). buffers: BatchNorm's statistics and the like: floats
    start each micro-batch from their values at the step's start and become the mean over micro-batches, weighted by
    size; integers count one per step. state: {name: tensor} of what else training changes. Raises UserError for a
    checkpoint that is damaged or another model's.
    """

    def __init__(
        self,
        run: Any,
        chart: str,
        total: int,
        optimizer: torch.optim.Optimizer,
        team: Dist,
        micro_batch: int,
        file: Path,
        params: Sequence[torch.Tensor] | None = None,
        buffers: Sequence[torch.Tensor] = (),
        state: dict[str, torch.Tensor] | None = None,
        log_every: int = 25,
        save_seconds: float = 60,
    ):
        self.run, self.chart, self.total, self.optimizer, self.team = run, chart, total, optimizer, team
        self.micro_batch, self.file, self.log_every, self.save_seconds = (
            micro_batch,
            Path(file),
            log_every,
            save_seconds,
        )
        self.all_params = [p for group in optimizer.param_groups for p in group["params"]]
        self.params = list(self.all_params if params is None else params)
        self.floats = [b for b in buffers if b.is_floating_point()]
        self.counters = [b for b in buffers if not b.is_floating_point()]
        self.state = {f"param.{i}": p for i, p in enumerate(self.all_params)}
        self.state |= {f"buffer.{i}": b for i, b in enumerate([*self.floats, *self.counters])}
        self.state |= {f"state.{name}": tensor for name, tensor in (state or {}).items()}
        self.extra: Any = None  # what selection remembers, JSON-able; saved and restored
        self.tensors: dict[str, torch.Tensor] = {}  # further tensors to remember, such as the best weights
        self.step = self.unit = 0
        self.loss, self.bar = torch.zeros((), device=team.device), None
        self.recent: dict[str, torch.Tensor] = {}  # sums since the last line of the log
        self._phase: dict[str, Any] | None = None
        self._likes: dict[Any, list] = {}
        self._saved_at = time.monotonic()
        self.done = self._load()

    # -- which steps, which micro-batches

    @property
    def steps(self) -> range:
        """What is still to be done."""
        return range(self.done, self.total)

    def __iter__(self) -> Iterator[int]:
        self.bar = bar = progress(self.total, self.chart, self.team, initial=self.done, unit="steps")
        self._saved_at = time.monotonic()
        for step in self.steps:
            self.step = step
            yield step
            self.done = step + 1
            self._write_log()
            bar.update(1)
            if time.monotonic() - self._saved_at > self.save_seconds and self.done < self.total:
                self.save()
        bar.close()

    def mine(self, batch: Sequence) -> list[Sequence]:
        """This process's micro-batches of a batch: what `units` will go through, for a loader that runs ahead."""
        return [batch[s] for s in self._slices(len(batch), self.micro_batch).values()]

    def _slices(self, n: int, size: int) -> dict[int, slice]:
        mine = units_of(self.team.rank, math.ceil(n / size), self.team.world)
        return {j: slice(j * size, min((j + 1) * size, n)) for j in mine}

    def units(self, n: int, size: int | None = None) -> Iterator[slice]:
        """Slices of this process's micro-batches of n items; self.unit is the number of the current one.

        size: items of a unit, default micro_batch. Ends in `sum` (or `update`), unless nothing is kept.
        """
        size = size or self.micro_batch
        start = torch._foreach_mul(self.floats, 1.0) if self.floats else []
        counted = [b.clone() for b in self.counters]
        self._phase = dict(adder=_Adder(), n_units=math.ceil(n / size), leaves=None, kept=False)
        for unit, u in self._slices(n, size).items():
            self.unit = unit
            if start:
                torch._foreach_copy_(self.floats, start)
            self._share = (u.stop - u.start) / n
            yield u
        self._phase["counted"] = counted

    # -- gradients

    def backward(self, loss: torch.Tensor, leaves: Sequence[torch.Tensor] = ()) -> None:
        """Gradients of this micro-batch with respect to params and leaves, kept apart from the others'.

        loss: this micro-batch's share of the batch's loss, for shares are added, not averaged.
        """
        gradients = torch.autograd.grad(loss, [*self.params, *leaves])
        moved = torch._foreach_mul(self.floats, self._share) if self.floats else []
        self._phase["leaves"] = len(leaves)
        self.keep([*gradients, loss.detach(), *moved])

    def keep(self, tensors: Sequence[torch.Tensor]) -> None:
        """Any tensors of this unit, to be added up by `sum`."""
        self._phase["kept"] = True
        self._phase["adder"].add(self.unit, tensors)

    def sum(self) -> list[torch.Tensor]:
        """Add up what the units of all processes kept. After `backward`: sets .grad of params, self.loss and the
        buffers, and returns the gradients of the leaves; after `keep`: returns the sums."""
        phase, self._phase = self._phase, None
        n_units, adder = phase["n_units"], phase["adder"]
        kind = phase["n_units"], phase["leaves"]
        if self.team.world > 1 and n_units < self.team.world:
            if kind not in self._likes:
                owner = next(iter(adder.open.values()), None)
                like = ([(t.shape, t.dtype) for t in owner], phase["leaves"]) if owner else None
                box = [like]
                source = next(r for r in range(self.team.world) if units_of(r, n_units, self.team.world))
                td.broadcast_object_list(box, src=source)
                self._likes[kind] = box[0]
            like, phase["leaves"] = self._likes[kind]
        else:
            like = None
        with torch.no_grad():
            sums = _finish(adder, n_units, self.team, like)
            if phase["leaves"] is None:
                return sums
            n = len(self.params)
            for p, grad in zip(self.params, sums, strict=False):
                p.grad = grad
            self.loss = sums[n + phase["leaves"]]
            if self.floats:
                torch._foreach_copy_(self.floats, sums[n + phase["leaves"] + 1 :])
            for b, before in zip(self.counters, phase["counted"], strict=True):
                b.copy_(before + 1)
        return sums[n : n + phase["leaves"]]

    def update(self, lr: float | None = None, clip: float | None = None) -> torch.Tensor:
        """One optimizer step. lr: for all parameter groups. clip: largest norm of all gradients. -> the loss"""
        if self._phase is not None and (self._phase["kept"] or self._phase["n_units"]):
            self.sum()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self.all_params, clip)
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        self.optimizer.step()
        self.done = self.step + 1  # a checkpoint in the rest of the step's lines counts it
        return self.loss

    # -- numbers

    def log(self, **values: torch.Tensor | float) -> None:
        """Count values of this step into the means that are written every log_every steps and at the end."""
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float64 if self.team.device.type != "mps" else torch.float32)
            pair = torch.stack([value.detach().to(self.team.device), torch.ones_like(value, device=self.team.device)])
            self.recent[name] = self.recent[name] + pair if name in self.recent else pair

    def _write_log(self) -> None:
        if not self.recent or (self.done % self.log_every and self.done < self.total):
            return
        pairs = torch.stack(list(self.recent.values())).tolist()  # the one wait for the device
        means = {name: total / count for name, (total, count) in zip(self.recent, pairs, strict=True)}
        self.recent = {}
        for name, value in means.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{self.chart}, step {self.done}: the {name} is {value}; stopped, the last checkpoint is kept. "
                    "Try a lower learning rate or --precision fp32 in a new --output-dir"
                )
        self.run.log(self.done, **{f"{self.chart}/{name}": value for name, value in means.items()})
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})

    # -- checkpoints

    def save(self) -> None:
        """Write a checkpoint of what is done. Random numbers need no place in it: they come from (seed, step)."""
        self._saved_at = time.monotonic()
        self._write_log()
        if not self.team.main:
            return
        state = self.optimizer.state_dict()["state"]
        flat = {f"optimizer.{i}.{k}": v for i, entry in state.items() for k, v in entry.items() if torch.is_tensor(v)}
        flat |= self.state | {f"recent.{k}": v for k, v in self.recent.items()}
        flat |= {f"tensors.{k}": v for k, v in self.tensors.items()}
        save_tensors(self.file, flat, json.dumps({"step": self.done, "extra": self.extra}))

    def _load(self) -> int:
        if not self.file.exists():
            return 0
        advice = f"{self.file}: damaged, or of another model; delete it and run the same command again"
        try:
            with safe_open(self.file, "pt") as f:
                about, flat = json.loads(f.metadata()["cleansynth"]), {k: f.get_tensor(k) for k in f.keys()}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(advice) from error
        if any(k not in flat or flat[k].shape != v.shape for k, v in self.state.items()):
            raise UserError(advice)
        with torch.no_grad():
            for name, tensor in self.state.items():
                tensor.copy_(flat[name])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in flat.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                i, name = rest.split(".", 1)
                state.setdefault(int(i), {})[name] = value
            elif kind == "recent":
                self.recent[rest] = value.to(self.team.device)
            elif kind == "tensors":
                self.tensors[rest] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.extra = about["extra"]
        return about["step"]

    def finish(self) -> None:
        """Remove the checkpoint, once the result is written. Waits for the team."""
        from common.distributed import barrier

        if self.team.main:
            self.file.unlink(missing_ok=True)
        barrier(self.team)
