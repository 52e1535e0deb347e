"""The loop: the same bits for any number of processes, after any interruption, at the traffic of an all-reduce."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import free_port
from torch import nn

from common import distributed as D
from common import loop as L
from common.launch import UserError

CPU = torch.device("cpu")
ONE = D.Dist(0, 0, 1, CPU)


class Run:
    """What a Loop wants of a run folder."""

    def __init__(self):
        self.lines, self.saved = [], False

    def log(self, step, **values):
        self.lines.append((step, values))

    def made(self):
        self.saved = True


def unit_tensors(j):
    """What unit j contributes: values of very different size, so that the order of addition shows in the bits."""
    g = D.generator("unit", j)
    scale = 10.0 ** torch.randint(-4, 5, (5, 7), generator=g)
    half = torch.randn(3, generator=g).to(torch.bfloat16)
    return [torch.randn(5, 7, generator=g) * scale, torch.randn((), generator=g), half, torch.empty(0, 2)]


def tree(n_units):
    """The documented sum: pairs, pairs of pairs, ...; what has no partner goes up alone."""
    level = [unit_tensors(j) for j in range(n_units)]
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [[sum(t[1:], t[0]) for t in zip(*pair, strict=True)] for pair in pairs]
    return level[0]


SIZES = (1, 2, 3, 5, 7, 8, 12, 16)


def check_sums(dist):
    for n_units in SIZES:
        mine = {j: unit_tensors(j) for j in L.units_of(dist.rank, n_units, dist.world)}
        for ours, expected in zip(L.sum_in_order(mine, n_units, dist), tree(n_units), strict=True):
            assert ours.dtype == expected.dtype and torch.equal(ours, expected), f"{n_units} units: other bits"


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def train(dist, file, run, total=6, stop=None, **more):
    """A small training with BatchNorm, clipping and a leaf; leaves at step `stop` as if killed after a checkpoint."""
    net = make_net()
    x, y = torch.randn(24, 4, generator=D.generator("x")), torch.arange(24) % 3
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    loop = L.Loop(run, "c", total, optimizer, dist, 4, file, buffers=list(net.buffers()), log_every=4, **more)
    order = D.Order(24, "order")
    seen = []
    for step in loop:
        if step == stop:
            return net, loop, seen
        rows = order.rows(15 * step, 15 * step + 15)
        leaf = torch.ones(3, requires_grad=True)
        for u in loop.units(len(rows)):
            loss = F.cross_entropy(net(x[rows[u]]) * leaf, y[rows[u]], reduction="sum") / len(rows)
            loop.backward(loss, leaves=[leaf])
        (grad,) = loop.sum()
        seen.append(grad)
        loss = loop.update(lr=0.1 / (step + 1), clip=0.5)
        loop.log(loss=loss)
        if stop is not None:
            loop.save()
    return net, loop, seen


def state(net):
    return torch.cat([t.detach().double().flatten() for t in net.state_dict().values()])


def in_process(rank, world, port, out):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist = D.setup_distributed("cpu")
    torch.set_num_threads(1)
    check_sums(dist)
    own = {j: torch.full((2, j + 1), float(j)) for j in L.units_of(rank, 5, world)}
    everyone = L.gather_units(own, 5, dist)
    assert all(torch.equal(t, torch.full((2, j + 1), float(j))) for j, t in enumerate(everyone))

    p = 40_000  # numbers
    for n_units in range(1, 2 * world + 1):
        before = L.traffic["bytes"]
        L.sum_in_order({j: [torch.zeros(p)] for j in L.units_of(rank, n_units, world)}, n_units, dist)
        sent, each = (L.traffic["bytes"] - before) / 4 / p, -(-n_units // world)
        assert each > 2 or sent <= 2, f"{sent} P numbers for {n_units} units"

    # Two phases of as many units: a process without units must not take the shapes of one for the other's.
    w = nn.Parameter(torch.ones(2))
    loop = L.Loop(Run(), "c", 3, torch.optim.SGD([w], 0.1), dist, 4, Path(out, "none"))
    for step in loop:
        for u in loop.units(1 if step < 2 else 9):
            loop.keep([torch.full((7,), float(u.stop)), torch.arange(3)])
        assert loop.sum()[0].tolist() == [1.0 if step < 2 else 4.0 + 8.0 + 9.0] * 7
        for _ in loop.units(1):
            loop.backward((w * w).sum())
        assert loop.update().item() > 0

    # Teams of neighbours, each at its own work: what one does is neither seen nor waited for by another.
    for size in (s for s in range(2, world) if world % s == 0):
        team = D.team_of(dist, size)
        assert (team.rank, team.world, team.main) == (rank % size, size, rank % size == 0)
        first = rank - team.rank
        assert D.all_gather_object(rank, team) == list(range(first, first + size))
        assert D.broadcast_object(rank if team.main else None, team) == first
        if first % (2 * size):
            check_sums(team)
        net, loop, seen = train(team, Path(out, f"t{first}.safetensors"), Run())
        loop.finish()
        if team.main:
            torch.save([state(net), *seen], Path(out, f"net{world}-{size}-{first}.pt"))
        D.barrier(dist)

    net, loop, seen = train(dist, Path(out, f"c{world}.safetensors"), Run())
    loop.finish()
    if rank == 0:
        torch.save([state(net), *seen], Path(out, f"net{world}.pt"))
    D.cleanup(dist)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_any_number_of_processes_gives_the_bits_of_one(world, tmp_path, forks):
    port = free_port()
    ranks = [forks.Process(target=in_process, args=(rank, world, port, str(tmp_path))) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(200)
    assert [process.exitcode for process in ranks] == [0] * world
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    net, _, seen = train(ONE, tmp_path / "one.safetensors", Run())
    torch.set_num_threads(threads)
    teams = {2: 0, 3: 0, 4: 2, 8: 4 + 2}[world]
    assert len(files := sorted(tmp_path.glob(f"net{world}*.pt"))) == 1 + teams
    for file in files:
        assert all(torch.equal(a, b) for a, b in zip(torch.load(file), [state(net), *seen], strict=True))


def test_one_process_adds_along_the_documented_tree():
    check_sums(ONE)
    first = [torch.ones(2)]
    assert L.sum_in_order({0: first, 1: [torch.ones(2)]}, 2, ONE)[0].tolist() == [2, 2]
    assert first[0].tolist() == [1, 1], "the input is not added into"
    x = torch.ones(2, requires_grad=True)
    assert not L.sum_in_order({0: [x * 2]}, 1, ONE)[0].requires_grad


def test_units_are_contiguous_and_each_has_one_owner():
    for world in (1, 2, 3, 4, 8):
        for n in SIZES:
            owned = [list(L.units_of(r, n, world)) for r in range(world)]
            assert sum(owned, []) == list(range(n)) and max(map(len, owned)) == -(-n // world)


def test_a_step_is_the_step_of_a_plain_loop():
    """Gradients of shares add up to those of the batch; clipping, rate and AdamW as in plain lines."""
    torch.manual_seed(1)
    net, plain = nn.Linear(4, 3), nn.Linear(4, 3)
    plain.load_state_dict(net.state_dict())
    x, y = torch.randn(10, 4), torch.arange(10) % 3
    ours = torch.optim.AdamW(net.parameters(), lr=1.0, weight_decay=0.1)
    theirs = torch.optim.AdamW(plain.parameters(), lr=0.02, weight_decay=0.1)
    loop = L.Loop(Run(), "c", 3, ours, ONE, 3, Path("unused.safetensors"))
    for _ in loop:
        for u in loop.units(10):
            loop.backward(5 * F.cross_entropy(net(x[u]), y[u], reduction="sum") / 10)
        loss = loop.update(lr=0.02, clip=0.3)
        expected = 5 * F.cross_entropy(plain(x), y)
        theirs.zero_grad()
        expected.backward()
        assert nn.utils.clip_grad_norm_(plain.parameters(), 0.3) > 0.3
        theirs.step()
        assert torch.allclose(loss, expected.detach(), atol=1e-6)
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_batchnorm_is_the_weighted_mean_over_micro_batches():
    """Every micro-batch starts from the step's statistics; a step counts once."""
    net = nn.BatchNorm1d(2)
    x = torch.randn(10, 2) * 3 + 1
    loop = L.Loop(Run(), "c", 1, torch.optim.SGD(net.parameters(), 0.0), ONE, 4, Path("u"), buffers=list(net.buffers()))
    for _ in loop:
        for u in loop.units(10):
            loop.backward(net(x[u]).square().sum() / 10)
        loop.update()
    means = sum((len(part) / 10) * (0.9 * torch.zeros(2) + 0.1 * part.mean(0)) for part in x.split(4))
    assert torch.allclose(net.running_mean, means, atol=1e-6) and net.num_batches_tracked == 1


def test_batchnorm_never_sees_one_item_alone():
    net = nn.BatchNorm1d(2)
    loop = L.Loop(Run(), "c", 1, torch.optim.SGD(net.parameters(), 0.1), ONE, 4, Path("u"), buffers=list(net.buffers()))
    found = {n: [u.stop - u.start for u in loop.units(n)] for n in (1, 4, 5, 6, 9)}
    assert found == {1: [1], 4: [4], 5: [5], 6: [4, 2], 9: [4, 5]}
    assert [len(part) for part in loop.mine(list(range(9)))] == [4, 5]
    plain = L.Loop(Run(), "c", 1, torch.optim.SGD(net.parameters(), 0.1), ONE, 4, Path("u"))
    assert [u.stop - u.start for u in plain.units(9)] == [4, 4, 1]


def test_gradients_have_the_layout_of_their_parameters():
    """The order in which a norm is added up follows the layout, which must not depend on the number of processes."""
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    loop = L.Loop(Run(), "c", 1, torch.optim.SGD(net.parameters(), 0.1), ONE, 1, Path("unused"))
    for _ in loop:
        for _ in loop.units(2):
            loop.backward(net(torch.ones(1, 3, 5, 5)).sum() + net.bias.sum())
        loop.sum()
        assert all(p.grad.stride() == p.stride() for p in net.parameters()) and net.weight.stride() != (27, 9, 3, 1)


def test_the_log_holds_means_of_numbers_and_tensors():
    run = Run()
    loop = L.Loop(run, "c", 3, torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1), ONE, 1, Path("unused"), log_every=2)
    for step in loop:
        loop.log(a=step, b=torch.tensor(2.0 * step))
    assert run.lines == [(2, {"c/a": 0.5, "c/b": 1.0}), (3, {"c/a": 2.0, "c/b": 4.0})]


def test_what_is_kept_is_added_and_a_second_phase_follows():
    p = nn.Parameter(torch.ones(2))
    loop = L.Loop(Run(), "c", 1, torch.optim.SGD([p], 1.0), ONE, 4, Path("unused"), params=[])
    for _ in loop:
        for u in loop.units(10, size=3):
            loop.keep([torch.tensor([float(u.stop - u.start), float(loop.unit)])])
        (total,) = loop.sum()
        assert total.tolist() == [10.0, 6.0]
        p.grad = total
        loop.update()
    assert p.tolist() == [-9.0, -5.0]


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resumed_training_has_the_bits_and_the_log_of_an_undisturbed_one(tmp_path, stop):
    whole = Run()
    net, loop, _ = train(ONE, tmp_path / "whole.safetensors", whole)
    first, second = Run(), Run()
    _, killed, _ = train(ONE, tmp_path / "c.safetensors", first, stop=stop)
    resumed, again, _ = train(ONE, tmp_path / "c.safetensors", second)
    assert list(again.steps) == [] and torch.equal(state(net), state(resumed))
    assert first.lines + second.lines == whole.lines and [step for step, _ in whole.lines] == [4, 6]
    again.finish()
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize("stop", [None, 2])
def test_optimizers_take_turns_as_in_a_plain_loop(tmp_path, stop):
    """As in a GAN: two steps of one network, clipped, then one of the other through it; before and after a stop."""
    nets, plain = ([nn.Linear(4, 4), nn.Linear(4, 1)] for _ in range(2))
    x = torch.randn(4, 6, 4, generator=D.generator("x"))
    for a, b in zip(nets, plain, strict=True):
        b.load_state_dict(a.state_dict())

    def adams(pair):
        return [torch.optim.Adam(net.parameters(), lr) for net, lr in zip(pair, (0.1, 0.02), strict=True)]

    def train(until):
        one, other = adams(nets)
        loop = L.Loop(Run(), "c", 4, other, ONE, 4, tmp_path / "c.safetensors", others=[one])
        for step in loop:
            if step == until:
                return
            for _ in range(2):
                for u in loop.units(6):
                    loop.backward(nets[1](nets[0](x[step, u])).square().sum() / 6)
                loop.update(clip=0.5)
            for u in loop.units(6, of=one):
                loop.backward(-nets[1](nets[0](x[step, u])).sum() / 6)
            loop.update(lr=0.1 / (step + 1))
            loop.save()

    if stop is not None:
        train(stop)
    train(None)
    one, other = adams(plain)
    for step in range(4):
        for _ in range(2):
            other.zero_grad()
            plain[1](plain[0](x[step])).square().mean().backward()
            nn.utils.clip_grad_norm_(plain[1].parameters(), 0.5)
            other.step()
        one.zero_grad()
        (-plain[1](plain[0](x[step])).mean()).backward()
        one.param_groups[0]["lr"] = 0.1 / (step + 1)
        one.step()
    for a, b in zip(nets, plain, strict=True):
        assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_selection_is_remembered(tmp_path):
    net = make_net()
    make = lambda: L.Loop(Run(), "c", 9, torch.optim.AdamW(net.parameters()), ONE, 5, tmp_path / "c.safetensors")  # noqa: E731
    loop = make()
    assert loop.extra is None and loop.tensors == {} and list(loop.steps) == list(range(9))
    loop.extra, loop.tensors, loop.done = {"best": [3, 0.5]}, {"w": torch.arange(3.0)}, 4
    loop.save()
    again = make()
    assert again.extra == {"best": [3, 0.5]} and again.tensors["w"].tolist() == [0, 1, 2] and again.steps == range(4, 9)


def test_checkpoints_come_by_time(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(L.time, "monotonic", lambda: clock.now)
    net = nn.Linear(1, 1)
    file = tmp_path / "c.safetensors"
    run = Run()
    loop = L.Loop(run, "c", 10, torch.optim.SGD(net.parameters(), 0.1), ONE, 1, file, save_seconds=60)
    saved = []
    for _ in loop:
        assert run.saved == file.exists()  # a stage that has a checkpoint has begun, whatever was logged
        saved.append(file.exists() and json.loads(L.safe_open(file, "pt").metadata()["cleansynth"])["step"])
        for _ in loop.units(1):
            loop.backward(net(torch.ones(1)).sum())
        loop.update()
        clock.now += 25
    assert saved == [False, False, False, 3, 3, 3, 6, 6, 6, 9]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    net = nn.Linear(1, 1)
    loop = L.Loop(
        Run(), "chart", 8, torch.optim.SGD(net.parameters(), 0.1), ONE, 1, tmp_path / "c.safetensors", log_every=2
    )
    with pytest.raises(UserError, match="chart, step 4: the loss is nan"):
        for step in loop:
            loop.log(loss=float("nan") if step == 3 else 1.0)
            loop.save()
    assert json.loads(L.safe_open(tmp_path / "c.safetensors", "pt").metadata()["cleansynth"])["step"] == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other model"])
def test_damaged_checkpoints_are_told(tmp_path, damage):
    file = tmp_path / "c.safetensors"
    net = nn.Linear(2, 2)
    loop = L.Loop(Run(), "c", 3, torch.optim.SGD(net.parameters(), 0.1), ONE, 1, file)
    loop.save()
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-5], "empty": b"", "text": b"hello" * 9}.get(damage, content))
    other = nn.Linear(3, 2) if damage == "other model" else net
    with pytest.raises(UserError, match="c.safetensors: damaged, or of another model; delete it"):
        L.Loop(Run(), "c", 3, torch.optim.SGD(other.parameters(), 0.1), ONE, 1, file)


def test_batches_go_through_an_endless_stream():
    """Every item once a pass, positions never twice, epochs of another length than the list go on where they ended."""
    for n, batch, length, drop_last in (
        (10, 4, None, False),
        (10, 4, None, True),
        (10, 4, 7, False),
        (10, 64, 25, True),
    ):
        batches = L.Batches(n, batch, 3, "x", length=length, drop_last=drop_last)
        epoch = length or n
        sizes = [min(batch, epoch)] * (epoch // min(batch, epoch)) + [epoch % min(batch, epoch)] * (not drop_last)
        sizes = [size for size in sizes if size]
        assert batches.per_epoch == len(sizes)
        seen = [pair for step in range(4 * len(sizes)) for pair in batches[step]]
        assert [len(batches[step]) for step in range(len(sizes))] == sizes
        positions = [place for _, place in seen]
        assert len(set(positions)) == len(positions) and positions == sorted(positions)
        passes = [
            torch.randperm(n, generator=D.generator(3, "x", "order", k)).tolist() for k in range(1 + positions[-1] // n)
        ]
        assert [item for item, _ in seen] == [passes[place // n][place % n] for place in positions]
        if not drop_last:
            assert positions == list(range(len(positions)))
    assert L.Batches(10, 4, 3)[1] == L.Batches(10, 4, 3)[1] != L.Batches(10, 4, 4)[1]
