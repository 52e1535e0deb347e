"""Sums over micro-batches and processes that have the same bits for any number of processes.

Float addition is not associative, so the order of the additions is part of the result. A batch is cut into units
(micro-batches) 0..U-1 and their gradients are added along one binary tree over the unit numbers, ((0+1)+(2+3))+...,
that does not depend on the number of processes. Process r computes a block of neighbours, so it can add up whole
branches of the tree by itself, and the bits are those of one process for any number of processes.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as td

from common.distributed import Dist, all_gather_object, broadcast_object, gather_known_rows

traffic = {"bytes": 0}  # sent by this process in sum_in_order so far, for the benchmark
ALIGN = 16  # numbers; CUDA's reductions add in another order when a tensor does not begin at a multiple of 16 bytes

Branch = tuple[int, int]  # (first unit, length): 2^k units of which the last may not exist


def units_of(rank: int, n_units: int, world: int) -> range:
    """The units that a process computes: blocks of ceil(n_units / world), the last ones shorter or empty."""
    block = math.ceil(n_units / world)
    return range(min(rank * block, n_units), min((rank + 1) * block, n_units))


def _branches(units: range, n_units: int) -> list[Branch]:
    """The largest branches of the tree over n_units that make up a range of units, in order."""
    found, start = [], units.start
    while start < units.stop:
        length = 1
        while start % (2 * length) == 0 and start + length < n_units and min(start + 2 * length, n_units) <= units.stop:
            length *= 2
        found.append((start, length))
        start += length
    return found


def _tree(parts: dict[Branch, list[torch.Tensor]], branch: Branch, n_units: int) -> list[torch.Tensor]:
    """Sum of a branch from the sums of smaller ones: left + right, or left where the right has no units."""
    if branch in parts:
        return parts[branch]
    start, half = branch[0], branch[1] // 2
    left = _tree(parts, (start, half), n_units)
    return torch._foreach_add(left, _tree(parts, (start + half, half), n_units)) if start + half < n_units else left


class Adder:
    """Adds units as they come, in order, holding one list of tensors per open branch: at most log2(units) of them."""

    def __init__(self) -> None:
        self.open: dict[Branch, list[torch.Tensor]] = {}

    def add(self, unit: int, tensors: Sequence[torch.Tensor]) -> None:
        branch, value = (unit, 1), [t.detach() for t in tensors]
        while branch[0] % (2 * branch[1]) and (left := (branch[0] - branch[1], branch[1])) in self.open:
            value = torch._foreach_add(self.open.pop(left), value)
            branch = left[0], 2 * left[1]
        self.open[branch] = value

    def like(self) -> list[tuple[torch.Size, torch.dtype]] | None:
        """Shapes and dtypes of a unit; None without units."""
        return [(t.shape, t.dtype) for t in next(iter(self.open.values()))] if self.open else None


def some_idle(n_units: int, world: int) -> bool:
    return not units_of(world - 1, n_units, world)


@torch.no_grad()
def sum_in_order(tensors_by_unit: dict[int, Sequence[torch.Tensor]], n_units: int, dist: Dist) -> list[torch.Tensor]:
    """Tree sum of the units of all processes, the same bits for any number of them -> list of sums, on every process.

    This process passes the units units_of(rank, n_units, world): {unit: [tensor, ...]}, each with the same shapes and
    dtypes. The P numbers of a unit are cut into `world` parts; part q of every branch goes to process q, which adds
    them along the tree, and the sums are gathered. A process sends (b + 1) P (world - 1) / world numbers if its units
    make b branches. b = 1, the traffic of an all-reduce, whenever ceil(n_units / world) is a power of two; otherwise b
    is at most 2 log2 of it: 2 for 3, 5 or 6 units each.
    """
    adder = Adder()
    for unit in sorted(tensors_by_unit):
        adder.add(unit, tensors_by_unit[unit])
    like = adder.like()
    return finish(adder, n_units, dist, broadcast_object(like, dist) if some_idle(n_units, dist.world) else like)


def finish(adder: Adder, n_units: int, dist: Dist, like: list) -> list[torch.Tensor]:
    """like: shapes and dtypes of a unit, which a process without units cannot know by itself."""
    tree = 0, 1 << (n_units - 1).bit_length()
    if dist.world == 1:
        return _tree(adder.open, tree, n_units)
    branches = [_branches(units_of(rank, n_units, dist.world), n_units) for rank in range(dist.world)]
    own = [_tree(adder.open, branch, n_units) for branch in branches[dist.rank]]
    totals: list[Any] = [None] * len(like)
    for dtype in dict.fromkeys(d for _, d in like):  # one flat buffer per dtype: normally one
        members = [i for i, (_, d) in enumerate(like) if d == dtype]
        sizes = [like[i][0].numel() for i in members]
        padded = list(itertools.chain(*((size, -size % ALIGN) for size in sizes)))
        part = math.ceil(sum(padded) / dist.world)
        padded.append(part * dist.world - sum(padded))

        def views(flat: torch.Tensor, members: list = members, padded: list = padded) -> list[torch.Tensor]:
            return [t.view(like[i][0]) for i, t in zip(members, flat.split(padded)[:-1:2], strict=True)]

        device = own[0][members[0]].device if own else dist.device
        flat = torch.zeros(len(own), dist.world * part, dtype=dtype, device=device)
        for row, tensors in zip(flat, own, strict=True):
            torch._foreach_copy_(views(row), [tensors[i] for i in members])
        # [branches, world, part] -> the part of process 0 of all branches, of process 1, ...; as bytes: any dtype
        send = flat.view(-1, dist.world, part).transpose(0, 1).reshape(-1).view(torch.uint8)
        counts = [len(b) * part * dtype.itemsize for b in branches]
        arrived = send.new_empty(sum(counts))
        td.all_to_all_single(arrived, send, counts, [counts[dist.rank]] * dist.world, group=dist.group)
        rows = arrived.view(dtype).view(-1, part)
        parts = {b: [row] for b, row in zip(itertools.chain(*branches), rows, strict=True)}
        (total,) = _tree(parts, tree, n_units)
        everyone = send.new_empty(dist.world * part * dtype.itemsize)
        td.all_gather_into_tensor(everyone, total.contiguous().view(torch.uint8), group=dist.group)
        traffic["bytes"] += (send.nbytes + everyone.nbytes) * (dist.world - 1) // dist.world  # one's own part stays
        for i, tensor in zip(members, views(everyone.view(dtype)), strict=True):
            totals[i] = tensor
    return totals


@torch.no_grad()
def gather_units(tensors: dict[int, torch.Tensor], n_units: int, dist: Dist) -> list[torch.Tensor]:
    """One tensor of each unit (this process passes those of units_of) -> those of all units in order, everywhere.

    One dtype; shapes may differ. Nothing waits for the device.
    """
    if dist.world == 1:
        return [tensors[j] for j in range(n_units)]
    mine = [tensors[j] for j in units_of(dist.rank, n_units, dist.world)]
    likes = all_gather_object([(t.shape, t.dtype) for t in mine], dist)
    flat = torch.cat([torch.empty(0, dtype=likes[0][0][1], device=dist.device), *(t.reshape(-1) for t in mine)])
    sizes = [[shape.numel() for shape, _ in like] for like in likes]
    everyone = gather_known_rows(flat, [sum(of_rank) for of_rank in sizes], dist)
    shapes = [shape for like in likes for shape, _ in like]
    return [t.view(shape) for t, shape in zip(everyone.split(sum(sizes, [])), shapes, strict=True)]
