"""Who does which job: every one is done once, nobody waits who need not, the time told is the time taken."""

import itertools
import math
import re

import pytest
import torch

from common import jobs as J
from common.distributed import Dist

CPU = torch.device("cpu")
CASES = [([1] * n, units) for n in (1, 2, 5, 9, 12, 18, 20) for units in (1, 2, 4, 8, 9)]
CASES += [([1, 1, 1, 2, 2, 2, 1, 1, 1], 4), ([7, 1, 1], 8), ([3, 2, 1] * 3, 2)]


def played(deal, lengths, units, world):
    """Seconds until each process is done, if a unit takes one second: teams first, each process then by itself."""
    team = [sum(lengths[j] for j in jobs) * math.ceil(units / deal.size) for jobs in deal.together]
    return [team[r // deal.size] + units * sum(lengths[j] for j in deal.alone[r]) for r in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 6, 8])
def test_every_job_is_done_once_and_as_busy_as_is_told(world):
    for lengths, units in CASES:
        deal = J.dealt(lengths, units, world)
        assert sorted(itertools.chain(*deal.together, *deal.alone)) == list(range(len(lengths)))
        assert world % deal.size == 0 and len(deal.together) == world // deal.size and len(deal.alone) == world
        end = max(played(deal, lengths, units, world))
        assert deal.busy == pytest.approx(sum(lengths) * units / world / end)
        # Never slower than either of the plain ways: all jobs shared by all, or each process its own, in turn.
        shared = sum(lengths) * math.ceil(units / world)
        turns = max(units * sum(lengths[r::world]) for r in range(world))
        assert end <= min(shared, turns) / J.WORTH or deal.busy >= 1 - J.IDLE
        assert units > 1 or end <= turns


def test_the_remainder_is_shared():
    assert J.busy(9, 4, 8) == pytest.approx(0.9) and J.busy(9, 1, 8) == pytest.approx(9 / 16)
    nine = J.dealt([1] * 9, 4, 8)
    assert nine.size == 4 and sum(map(len, nine.together)) == 1 and [len(jobs) for jobs in nine.alone] == [1] * 8
    assert J.busy(18, 4, 8) == 1 and J.busy(12, 4, 8) == 1, "two teams of four, four teams of two"
    assert J.busy([1, 1, 1, 1, 1, 1, 2, 2, 2], 4, 8) == 1, "three networks twice as long"
    assert J.busy(1, 9, 8) == 9 / 16, "nine micro-batches keep five processes busy, or eight half"
    assert J.busy(5_000_000, 1, 8) == 1 and J.busy(0, 1, 8) == 1 and J.busy([], 4, 8) == 1


def test_a_process_gets_its_jobs_with_its_team(monkeypatch):
    monkeypatch.setattr(
        J, "team_of", lambda dist, size: Dist(dist.rank % size, 0, size, CPU, f"team {dist.rank // size}")
    )
    names = [f"job {j}" for j in range(9)]
    mine = [J.share_out(names, 512, 128, Dist(r, r, 8, CPU), "train", "--m", 2) for r in range(8)]
    assert all((team.world, team.group) == (4, "team 0") and job == "job 0" for (team, job), _ in mine[:4])
    assert [len(of) for of in mine] == [2] * 4 + [1] * 4
    alone = [of[-1] for of in mine]
    assert sorted(job for _, job in alone) == names[1:] and all(team.world == 1 and team.main for team, _ in alone)
    one = Dist(0, 0, 1, CPU)
    assert J.share_out(names, 512, 128, one, "train", "--m", lengths=range(9)) == [(one, job) for job in names]


def test_idle_time_is_told_with_what_would_use_it(capsys):
    def said(jobs, batch, micro, rank=0, least=1):
        J.share_out(range(jobs), batch, micro, Dist(rank, rank, 8, CPU), "finetune", "--m", least)
        return capsys.readouterr().out

    text = "note: finetune: 8 processes have work for 12% of the time; --m 1 would use them all\n"
    assert said(1, 8, 8) == text and said(1, 8, 8, rank=1) == ""
    assert said(5, 1, 1) == "note: finetune: 8 processes have work for 62% of the time; 5 would take no longer\n"
    assert "--m 2 would use them all (and changes BatchNorm)" in said(2, 8, 8, least=2)
    assert said(1, 8, 1) == said(16, 8, 8) == ""


@pytest.mark.parametrize("jobs, batch, micro", [(1, 8, 8), (1, 8, 1), (12, 256, 64), (10, 8, 8), (1, 24, 8), (9, 4, 1)])
@pytest.mark.parametrize("least", [1, 2])
def test_advice_to_idle_processes_does_what_it_says(monkeypatch, jobs, batch, micro, least):
    monkeypatch.setattr(J, "team_of", lambda dist, size: dist)

    def seconds(m, world):  # of a training, in items
        deal = J.dealt([1] * jobs, math.ceil(batch / m), world)
        return m * max(played(deal, [1] * jobs, math.ceil(batch / m), world))

    for world in range(2, 25):
        said = J.busier(jobs, batch, micro, world, "--micro", least)
        word = int(re.search(r"\d+", said)[0]) if said else None
        if said.startswith("; --micro"):
            assert micro % word == 0 and least <= word < micro
            assert J.busy(jobs, batch // word, world) >= 1 - J.IDLE
        elif said:
            assert word < world and seconds(micro, word) <= 1.02 * seconds(micro, world)
