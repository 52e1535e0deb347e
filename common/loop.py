"""The one training loop of all scripts: resume, progress, checkpoint, sums over processes. The script keeps the method.

    loop = Loop(run, "finetune", total, optimizer, team, micro_batch, file=checkpoint)
    for step in loop:                          # goes on where the checkpoint stands; saves by time
        for u in loop.units(len(batch)):       # slices of the batch: this process's micro-batches
            loss = ...                         # the micro-batch's share of the batch's loss
            loop.backward(loss)                # keeps the gradients of each micro-batch apart
        loss = loop.update(lr=..., clip=1.0)   # adds them up in one order over all processes, then optimizer.step()
        loop.log(loss=loss)                    # means go to metrics.jsonl; stops when one is not finite
    loop.finish()                              # when the result is written: removes the checkpoint

A batch is cut into micro-batches, units, which the processes share out among themselves; `common.sums` adds up what
they computed with the same bits for any number of processes. A unit's loss is its share of the batch's, so shares add.
"""

import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from common.distributed import Dist, Order, all_gather_object, barrier, broadcast_object, progress
from common.files import save_tensors
from common.launch import UserError
from common.sums import Adder, finish, gather_units, some_idle, sum_in_order, traffic, units_of

__all__ = ["Batches", "Loop", "gather_units", "sum_in_order", "traffic", "units_of"]


def _params(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class Batches:
    """batches[step]: which items a step sees, [(item, position)], batch after batch of an endless stream of shuffles.

    n: items. length: positions of an epoch, default n; the stream goes on where the epoch before ended, so of a longer
    list every item has its turn. An epoch's last batch may be short, or is left out (drop_last). A function of (seed
    parts, step); a position is never used twice, so that it can seed what is random about a picture.
    """

    def __init__(self, n: int, batch: int, *seed: int | str, length: int | None = None, drop_last: bool = False):
        self.length = length or n
        self.batch = min(batch, self.length)
        self.per_epoch = self.length // self.batch if drop_last else -(-self.length // self.batch)
        self.order = Order(n, *seed)

    def __getitem__(self, step: int) -> list[tuple[int, int]]:
        epoch, i = divmod(step, self.per_epoch)
        start = epoch * self.length + i * self.batch
        stop = min(start + self.batch, (epoch + 1) * self.length)
        return list(zip(self.order.rows(start, stop), range(start, stop), strict=True))


class Loop:
    """See the top of this file.

    run, chart: where values are logged, as <chart>/<name>. total: steps. optimizer: all its parameters are trained.
    others: further optimizers, of networks that are trained in turn; `units(of=...)` says whose turn it is.
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
        others: Sequence[torch.optim.Optimizer] = (),
    ):
        self.run, self.chart, self.total, self.optimizer, self.team = run, chart, total, optimizer, team
        self.optimizers = [optimizer, *others]
        self.micro_batch, self.file = micro_batch, Path(file)
        self.log_every, self.save_seconds = log_every, save_seconds
        self.all_params = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        self.params = _params(optimizer) if params is None else list(params)
        self.floats = [b for b in buffers if b.is_floating_point()]
        self.counters = [b for b in buffers if not b.is_floating_point()]
        self.state = {f"param.{i}": p for i, p in enumerate(self.all_params)}
        self.state |= {f"buffer.{i}": b for i, b in enumerate([*self.floats, *self.counters])}
        self.state |= {f"state.{name}": tensor for name, tensor in (state or {}).items()}
        self.extra: Any = None  # what selection remembers, JSON-able; saved and restored
        self.tensors: dict[str, torch.Tensor] = {}  # further tensors to remember, such as the best weights
        self.step, self.unit, self.n_units = -1, 0, 0
        self.loss, self.bar = torch.zeros((), device=team.device), None
        self.recent: dict[str, tuple[Any, int]] = {}  # sum and count since the last line of the log
        self._phase: dict[str, Any] | None = None
        self._phases = 0  # in this step so far
        self._turn = optimizer  # whose parameters the last phase was for
        self._likes: dict[Any, Any] = {}
        self._saved_at = time.monotonic()
        self.done = self._load()
        if len(set(all_gather_object(self.done, team))) > 1:
            raise UserError(f"{self.file}: the processes see different checkpoints; use a folder that all hosts share")

    # -- which steps, which micro-batches

    @property
    def steps(self) -> range:
        """What is still to be done."""
        return range(self.done, self.total)

    def __iter__(self) -> Iterator[int]:
        self.bar = bar = progress(self.total, self.chart, self.team, initial=self.done, unit="steps")
        self._saved_at = time.monotonic()
        for step in self.steps:
            self.step, self._phases = step, 0
            yield step
            self.done = step + 1
            self._write_log()
            bar.update(1)
            if time.monotonic() - self._saved_at > self.save_seconds and self.done < self.total:
                self.save()
        bar.close()

    def mine(self, batch: Sequence) -> list[Sequence]:
        """This process's micro-batches of a batch: what `units` will go through, for a loader that runs ahead."""
        slices = self._slices(len(batch), None)
        return [batch[slices[j]] for j in units_of(self.team.rank, len(slices), self.team.world)]

    def _slices(self, n: int, size: int | None) -> list[slice]:
        starts = list(range(0, n, size or self.micro_batch))
        if self.floats and size is None and len(starts) > 1 and starts[-1] == n - 1 != starts[-2] + 1:
            starts.pop()  # BatchNorm cannot normalise one item: it joins the micro-batch before
        return [slice(a, b) for a, b in itertools.pairwise([*starts, n])]

    def units(self, n: int, size: int | None = None, of: torch.optim.Optimizer | None = None) -> Iterator[slice]:
        """Slices of this process's micro-batches of n items; self.unit is the number of the current one, of n_units.

        size: items of a unit, default micro_batch. What a unit keeps must have shapes that follow from n and size.
        of: the optimizer whose parameters `backward` and `update` are for, default the first.
        """
        slices = self._slices(n, size)
        before = torch._foreach_mul(self.floats, 1.0) if self.floats else []
        counted = torch._foreach_add(self.counters, 1) if self.counters else []  # one step, however many units
        self._phases += 1
        self.n_units = len(slices)
        self._phase = dict(
            key=(self._phases, n, size), n_units=len(slices), counted=counted, adder=Adder(), leaves=None,
            of=of or self.optimizer, params=_params(of) if of else self.params,
        )  # fmt: skip
        for j in units_of(self.team.rank, len(slices), self.team.world):
            if self.floats:
                torch._foreach_copy_(self.floats, before)
            self.unit, self._share = j, (slices[j].stop - slices[j].start) / n
            yield slices[j]

    # -- gradients

    def backward(self, loss: torch.Tensor, leaves: Sequence[torch.Tensor] = ()) -> None:
        """Gradients of this micro-batch with respect to params and leaves, kept apart from the others'.

        loss: this micro-batch's share of the batch's loss, for shares are added, not averaged.
        """
        gradients = torch.autograd.grad(loss, [*self._phase["params"], *leaves])
        moved = torch._foreach_mul(self.floats, self._share) if self.floats else []
        self._phase["leaves"] = len(leaves)
        self.keep([*gradients, loss.detach(), *moved])

    def keep(self, tensors: Sequence[torch.Tensor]) -> None:
        """Any tensors of this unit, to be added up by `sum`."""
        self._phase["adder"].add(self.unit, tensors)

    @torch.no_grad()
    def sum(self) -> list[torch.Tensor]:
        """Add up what the units of all processes kept. After `backward`: sets .grad of params, self.loss and the
        buffers, and returns the gradients of the leaves; after `keep`: returns the sums."""
        phase, self._phase = self._phase, None
        adder, n_units = phase["adder"], phase["n_units"]
        about = adder.like(), phase["leaves"]
        if some_idle(n_units, self.team.world):  # which cannot know; told once, as the same phase comes in every step
            if phase["key"] not in self._likes:
                self._likes[phase["key"]] = broadcast_object(about, self.team)
            known = self._likes[phase["key"]]
            assert not adder.open or about == known, "the shapes of a unit changed from one step to another"
            about = known
        like, leaves = about
        sums = finish(adder, n_units, self.team, like)
        if leaves is None:
            return sums
        self._turn, n = phase["of"], len(phase["params"])
        for p, grad in zip(
            phase["params"], sums, strict=False
        ):  # in the layout of p, on which the order of a norm depends
            p.grad = grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)
        self.loss = sums[n + leaves]
        if self.floats:
            torch._foreach_copy_(self.floats, sums[n + leaves + 1 :])
        if self.counters:
            torch._foreach_copy_(self.counters, phase["counted"])
        return [grad.contiguous() for grad in sums[n : n + leaves]]

    def update(self, lr: float | None = None, clip: float | None = None) -> torch.Tensor:
        """One step of the optimizer whose turn it is. lr: for all its parameter groups. clip: largest norm of all its
        gradients. -> the loss"""
        if self._phase is not None:
            self.sum()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(_params(self._turn), clip)
        if lr is not None:
            for group in self._turn.param_groups:
                group["lr"] = lr
        self._turn.step()
        return self.loss

    # -- numbers

    def log(self, **values: torch.Tensor | float) -> None:
        """Count values of this step into the means that are written every log_every steps and at the end."""
        for name, value in values.items():
            total, count = self.recent.get(name, (0.0, 0))
            if isinstance(value, torch.Tensor):  # stays on the device: nothing waits for it
                value = value.item() if value.device.type == "cpu" else value.detach()
                value = value.double() if isinstance(value, torch.Tensor) and value.device.type != "mps" else value
            self.recent[name] = total + value, count + 1

    def _read_recent(self) -> dict[str, tuple[float, int]]:
        """self.recent as numbers, in one wait for the device. Raises UserError when one is not finite."""
        waiting = {name: total for name, (total, _) in self.recent.items() if isinstance(total, torch.Tensor)}
        known = dict(zip(waiting, torch.stack(list(waiting.values())).tolist(), strict=True)) if waiting else {}
        self.recent = {name: (known.get(name, total), count) for name, (total, count) in self.recent.items()}
        for name, (total, _) in self.recent.items():
            if not math.isfinite(total):
                raise UserError(
                    f"{self.chart}, step {self.done}: the {name} is {total}; stopped, the last checkpoint is kept. "
                    "Try a lower learning rate or --precision fp32 in a new --output-dir"
                )
        return self.recent

    def _write_log(self) -> None:
        if not self.recent or (self.done % self.log_every and self.done < self.total):
            return
        means = {name: total / count for name, (total, count) in self._read_recent().items()}
        self.recent = {}
        self.run.log(self.done, **{f"{self.chart}/{name}": value for name, value in means.items()})
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})

    # -- checkpoints

    def save(self) -> None:
        """Write a checkpoint now: called inside the loop, when the work of the step is done. Not if a value is not
        finite. Random numbers need no place in it: they come from (seed, step)."""
        self.done = max(self.done, self.step + 1)
        self._write_log()
        self.run.made()
        if self.team.main:
            flat = {}
            for number, optimizer in enumerate(self.optimizers):
                state = optimizer.state_dict()["state"]
                name = f"optimizer{number or ''}"
                flat |= {f"{name}.{i}.{k}": v for i, entry in state.items() for k, v in entry.items() if v is not None}
            flat |= self.state | {f"tensors.{k}": v for k, v in self.tensors.items()}
            about = {"step": self.done, "recent": self._read_recent(), "extra": self.extra}
            save_tensors(self.file, flat, json.dumps(about))
        self._saved_at = time.monotonic()

    def _load(self) -> int:
        if not self.file.exists():
            return 0
        advice = f"{self.file}: damaged, or of another model; delete it and run the same command again"
        try:
            with safe_open(self.file, "pt") as f:
                about, flat = json.loads(f.metadata()["cleansynth"]), {k: f.get_tensor(k) for k in f.keys()}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(advice) from error
        if any(k not in flat or (flat[k].shape, flat[k].dtype) != (v.shape, v.dtype) for k, v in self.state.items()):
            raise UserError(advice)
        with torch.no_grad():
            for name, tensor in self.state.items():
                tensor.copy_(flat[name])
        states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in self.optimizers]
        for key, value in flat.items():
            kind, _, rest = key.partition(".")
            if kind.startswith("optimizer"):
                i, name = rest.split(".", 1)
                states[int(kind.removeprefix("optimizer") or 0)].setdefault(int(i), {})[name] = value
            elif kind == "tensors":
                self.tensors[rest] = value
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.extra, self.recent = about["extra"], {name: tuple(pair) for name, pair in about["recent"].items()}
        return about["step"]

    def finish(self) -> None:
        """Remove the checkpoint, once the result is written. Waits for the team."""
        if self.team.main:
            self.file.unlink(missing_ok=True)
        barrier(self.team)
