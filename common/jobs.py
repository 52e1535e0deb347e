"""Who does which job: adapters and classifiers, each of many steps, on several processes.

A step is cut into units (micro-batches), so a job may be one process's or a team's, which shares its units; its result
does not depend on that (`common.sums`). Jobs are dealt to single processes as far as they fill all of them, and the
rest is shared by teams: nine networks of four micro-batches keep eight processes busy 90 % of the time, where dealing
alone would leave seven of them waiting for the ninth network, 56 %.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from common.distributed import Dist, say, team_of

T = TypeVar("T")
WORTH = 0.99  # teams, and larger ones, are formed when the last process is then done in this share of the time
IDLE = 0.05  # of the processes' time; more is told


@dataclass(frozen=True)
class Deal:
    """size: processes of a team; together: numbers of the jobs of each team, done first; alone: of each process."""

    size: int
    together: list[list[int]]
    alone: list[list[int]]
    busy: float  # share of all processes' time, until the last is done, in which they work


def _longest_first(jobs: Iterable[int], seconds: Sequence[float], load: list[float]) -> list[list[int]]:
    """Each job, in this order, to the worker that is free first -> the jobs of each; adds to the load of each."""
    free, taken = [(busy, w) for w, busy in enumerate(load)], [[] for _ in load]
    heapq.heapify(free)
    for job in jobs:
        busy, w = heapq.heappop(free)
        load[w] = busy + seconds[job]
        taken[w].append(job)
        heapq.heappush(free, (load[w], w))
    return [sorted(of) for of in taken]  # neighbours in the list, which often read the same, follow one another


def dealt(lengths: Sequence[float], units: int, world: int) -> Deal:
    """Jobs of these lengths (steps) and of so many units in each step -> who does which.

    The k longest are shared by teams of `size` neighbours, the others dealt out, longest first, to the least loaded
    process: for the k and size with which the last one is done soonest. A team takes ceil(units / size) for a step.
    """
    order, best, soonest = sorted(range(len(lengths)), key=lambda j: -lengths[j]), None, math.inf
    sizes = [s for s in range(2, world + 1) if world % s == 0] if units > 1 else []
    few = [*range(1, min(len(order), world)), len(order)]
    for k, size in [(0, 1), *((k, size) for k in few for size in sizes)]:
        load = [0.0] * (world // size)
        together = _longest_first(order[:k], [n * math.ceil(units / size) for n in lengths], load)
        load = [busy for busy in load for _ in range(size)]
        alone = _longest_first(order[k:], [n * units for n in lengths], load)
        if max(load) < WORTH * soonest:
            soonest = max(load)
            best = Deal(size, together, alone, units * sum(lengths) / (world * soonest) if soonest else 1.0)
        if best.busy >= 1 - IDLE:
            break  # what teams could still gain is not worth their messages
    return best


def busy(jobs: int | Sequence[float], units: int, world: int) -> float:
    """Share of the processes' time in which they work. jobs: so many of one length, or the length of each."""
    if isinstance(jobs, int) and units == 1:  # millions of batches of images
        return jobs / (world * math.ceil(jobs / world)) if jobs else 1.0
    return dealt([1] * jobs if isinstance(jobs, int) else jobs, units, world).busy


def share_out(
    jobs: Sequence[T], batch: int, micro: int, dist: Dist, stage: str, flag: str, least: int = 1,
    lengths: Sequence[float] = (),
) -> list[tuple[Dist, T]]:  # fmt: skip
    """The jobs of this process, in turn: [(the processes that share each of its steps, job)]. All ranks must call.

    A step has a batch of items in micro-batches of `micro`, the value of `flag`. lengths: of the jobs, in steps or
    images; none: all alike. Results do not depend on who does what. When processes stand idle, it says how much of the
    time, and what would use them. least: the smallest micro-batch that can be trained, 2 with BatchNorm.
    """
    if dist.world == 1:
        return [(dist, job) for job in jobs]
    lengths = list(lengths) or [1] * len(jobs)
    deal = dealt(lengths, math.ceil(batch / micro), dist.world)
    if deal.busy < 1 - IDLE:
        what = f"note: {stage}: {dist.world} processes have work for {deal.busy:.0%} of the time"
        say(dist, what + busier(lengths, batch, micro, dist.world, flag, least))
    mine = [(dist.alone(), jobs[j]) for j in deal.alone[dist.rank]]
    if deal.size == 1:
        return mine
    team = team_of(dist, deal.size)
    return [(team, jobs[j]) for j in deal.together[dist.rank // deal.size]] + mine


def busier(jobs: int | Sequence[float], batch: int, micro: int, world: int, flag: str, least: int = 1) -> str:
    """What would use idle processes: a divisor of the micro-batch, so that it fits as well; else how few would do."""

    def at_work(m: int, n: int) -> float:
        return n * busy(jobs, math.ceil(batch / m), n)

    fits = [m for m in range(micro - 1, least - 1, -1) if micro % m == 0 and at_work(m, world) >= (1 - IDLE) * world]
    if flag and fits:
        return f"; {flag} {fits[0]} would use them all{' (and changes BatchNorm)' if least > 1 else ''}"
    enough = WORTH * at_work(micro, world)
    few = next(n for n in range(max(1, math.floor(enough)), world + 1) if at_work(micro, n) >= enough)
    return f"; {few} would take no longer" if few < world else ""
