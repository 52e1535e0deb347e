"""common/loader.py: the same bytes from any number of workers, errors and ends that reach the right place."""

import gc
import multiprocessing
import os
import random
import signal
import time
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from common.distributed import seed_of
from common.launch import UserError
from common.loader import Loader, _begin_worker, normalised, to_unit
from common.pixels import load_pixels

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Pictures:
    """Row i: noise of its own. Remembers what was opened in this process."""

    def __init__(self, bad=()):
        self.bad, self.opened = bad, []

    def __getitem__(self, row):
        if row in self.bad:
            raise UserError(f"{row}.jpg: truncated; mend or remove it")
        self.opened.append(row)
        return Image.fromarray(np.random.RandomState(row).randint(0, 256, (12, 16, 3), dtype=np.uint8))

    def open(self, row, shorter):
        return self[row].resize((shorter, shorter))


def as_tensor(image):
    return v2.functional.pil_to_tensor(image)


def number(image):
    """The row, found by its first pixel."""
    return torch.tensor(image.getpixel((0, 0)), dtype=torch.uint8).view(3, 1, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_small_set_is_decoded_as_a_whole(workers, monkeypatch):
    monkeypatch.setattr("common.pixels.AT_ONCE", 4)

    class Ten(Pictures):
        def __len__(self):
            return 10

    x = load_pixels(Ten(), as_tensor, CPU, workers)
    assert x.dtype == torch.uint8 and x.shape == (10, 3, 12, 16)
    assert torch.equal(x, torch.stack([as_tensor(Ten()[row]) for row in range(10)]))


def rows_of(x, n=60):
    first = {tuple(Pictures()[row].getpixel((0, 0))): row for row in range(n)}
    return [first[tuple(item.flatten().tolist())] for item in x]


def batches_of(n, size=4):
    return [list(range(i, min(i + size, n))) for i in range(0, n, size)]


def forever():
    for i in count():
        yield [i % 50, (i + 1) % 50]


def workers_alive():
    return multiprocessing.active_children()


# ---------------------------------------------------------------------------------------
# The same bytes


augment = v2.Compose([v2.RandomResizedCrop(8, antialias=True), v2.ColorJitter(0.4, 0.4, 0.4), v2.PILToTensor()])


def random_view(image):
    """Draws from all three generators, and tells the threads."""
    draws = torch.tensor([np.random.randint(256), random.randrange(256), torch.get_num_threads()], dtype=torch.uint8)
    return augment(image), draws.view(3, 1, 1)


def test_bytes_depend_on_seed_and_position_alone(monkeypatch):
    torch.set_num_threads(2)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    batches = [[(row, 100 + row) for row in batch] for batch in batches_of(22)]
    found = {w: list(Loader(Pictures(), random_view, CPU, w, ("s", 1))(batches)) for w in (0, 1, 3)}
    for w in (1, 3):
        assert len(found[w]) == 6
        for here, there in zip(found[0], found[w], strict=True):
            for a, b in zip(here, there, strict=True):
                assert a.dtype == torch.uint8 and a.stride() == b.stride() and torch.equal(a, b)
    x, draws = map(torch.cat, zip(*found[0], strict=True))
    assert x.shape == (22, 3, 8, 8) and (draws[:, 2] == 1).all() and torch.get_num_threads() == 2
    assert len(draws[:, :2].unique(dim=0)) > 15
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(state[0], after[0]) and state[1:] == after[1:], "the caller's generators stay as they are"

    # What an item is depends neither on the batch nor on the row's neighbours; seed and position are what it is for.
    alone = next(Loader(Pictures(), random_view, CPU, 0, ("s", 1))([[(7, 107)]]))
    assert torch.equal(alone[0][0], x[7]) and torch.equal(alone[1][0], draws[7])
    for seed, position in ((("s", 2), 107), (("s", 1), 108)):
        assert not torch.equal(next(Loader(Pictures(), random_view, CPU, 0, seed)([[(7, position)]]))[1][0], draws[7])
    torch.default_generator.manual_seed(seed_of("s", 1, 107))
    random.seed(seed_of("s", 1, 107))
    np.random.seed(seed_of("s", 1, 107) % 2**32)
    expected = random_view(Pictures()[7])
    assert torch.equal(expected[0], x[7]) and torch.equal(expected[1][:2], draws[7, :2])


@pytest.mark.parametrize("workers", [0, 3])
def test_order_is_kept_and_one_view_comes_as_a_tensor(workers):
    def slow(image):
        time.sleep(0.03 * (image.getpixel((0, 0))[0] % 3 == 0))
        return number(image)

    found = list(Loader(Pictures(), slow, CPU, workers)(batches_of(30)))
    assert [rows_of(x) for x in found] == batches_of(30)
    assert list(Loader(Pictures(), slow, CPU, workers)([])) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_arguments_of_the_view_and_reduced_decoding(workers):
    def faded(image, share, plus=0):
        return (as_tensor(image) * share).to(torch.uint8) + plus

    loader = Loader(Pictures(), faded, CPU, workers, shorter=5)
    x = next(loader([[(3, 0, 0.5), (4, 1, 1.0, 2)]]))
    a, b = (as_tensor(Pictures().open(row, 5)) for row in (3, 4))
    assert torch.equal(x, torch.stack([(a * 0.5).to(torch.uint8), b + 2]))


# ---------------------------------------------------------------------------------------
# Reading ahead, errors, ends


@pytest.mark.parametrize("workers", [0, 2])
def test_an_endless_generator_is_read_a_few_batches_ahead(workers):
    drawn = []

    def endless():
        for batch in forever():
            drawn.append(batch)
            yield batch

    stream = Loader(Pictures(), number, CPU, workers)(endless())
    for i in range(20):
        assert rows_of(next(stream)) == [i, i + 1]
        assert len(drawn) <= i + 1 + 2 * workers
    assert not workers or len(drawn) == 20 + 2 * workers, "workers should have work while the caller computes"
    assert len(workers_alive()) == workers
    stream.close()
    assert not workers_alive()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_picture_is_the_same_line_in_its_turn(workers):
    loader = Loader(Pictures(bad={9}), number, CPU, workers)
    found = []
    with pytest.raises(UserError) as caught:
        for x in loader(batches_of(30)):
            found += rows_of(x)
    assert str(caught.value) == "9.jpg: truncated; mend or remove it" and found == list(range(8))
    assert not workers_alive()


@pytest.mark.parametrize("workers", [0, 2])
def test_other_errors_say_where_they_were(workers):
    def view(image):
        raise EOFError("a fault of the view")

    with pytest.raises(RuntimeError, match=r"(?s)in a view:\n.*raise EOFError.*EOFError: a fault of the view"):
        list(Loader(Pictures(), view, CPU, workers)(batches_of(8)))
    assert not workers_alive()

    def broken():
        yield from batches_of(40)
        raise RuntimeError("a fault of the batches")

    with pytest.raises(RuntimeError, match="^a fault of the batches"):
        list(Loader(Pictures(), number, CPU, workers)(broken()))


def test_two_calls_may_run_at_once():
    loader = Loader(Pictures(), number, CPU, 1)
    for a, b in zip(loader(batches_of(20)), loader(batches_of(20)[::-1]), strict=True):
        assert rows_of(a)[0] + rows_of(b)[0] == 16


def test_a_killed_worker_is_told_in_one_line(monkeypatch):
    stream = Loader(Pictures(), number, CPU, 2)(forever())
    next(stream)
    os.kill(workers_alive()[0].pid, signal.SIGKILL)
    time.sleep(0.1)  # nothing is raised here, in the middle of the caller's work
    with pytest.raises(UserError, match="was killed; .*smaller --workers"):
        while True:
            next(stream)
    assert not workers_alive()

    def died(*_, **settings):  # in the middle of a message
        yield from ()
        raise ConnectionResetError

    monkeypatch.setattr(torch.utils.data, "DataLoader", died)
    with pytest.raises(UserError, match="was killed"):
        next(Loader(Pictures(), number, CPU, 2)(forever()))


def test_signals_to_the_group_are_the_main_process_own_business():
    stream = Loader(Pictures(), number, CPU, 2)(forever())
    next(stream), next(stream)  # one from each worker: both have begun
    for worker in workers_alive():
        os.kill(worker.pid, signal.SIGINT)
    for i in range(2, 20):
        assert rows_of(next(stream)) == [i, i + 1]
    workers = workers_alive()
    for worker in workers:
        os.system(f"kill -TERM {worker.pid}")  # not by its parent
        worker.join(5)
    time.sleep(0.1)
    assert [worker.exitcode for worker in workers] == [0, 0], "it would else be reported as a crash"
    stream.close()


def test_a_killed_process_leaves_no_workers():
    read, write = os.pipe()
    parent = os.fork()
    if not parent:
        try:
            stream = Loader(Pictures(), number, CPU, 2)(forever())
            next(stream)
            os.write(write, " ".join(str(worker.pid) for worker in workers_alive()).encode())
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    pids = os.read(read, 100).split()
    os.close(read), os.close(write)
    assert len(pids) == 2

    def state(pid):
        try:
            return open(f"/proc/{int(pid)}/stat").read().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return "gone"

    end = time.monotonic() + 3  # torch's own watch looks every 5 s
    while not {state(pid) for pid in pids} <= {"gone", "Z", "X"}:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_worker_that_starts_after_its_parent_was_killed_ends():
    pid = os.fork()
    if not pid:
        multiprocessing.parent_process = lambda: SimpleNamespace(pid=os.getppid() + 1)
        try:
            _begin_worker(0)
        finally:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_workers_leave_the_garbage_of_the_main_process_alone():
    removed = torch.zeros(1).share_memory_()

    class Cycle:
        def __init__(self):
            self.me = self

        def __del__(self):
            removed[0] += 1

    def view(image):
        gc.collect()
        return number(image)

    gc.collect()
    gc.disable()
    try:
        Cycle()
        list(Loader(Pictures(), view, CPU, 2)(batches_of(8)))
        assert removed[0] == 0
    finally:
        gc.enable()
    gc.collect()
    assert removed[0] == 1


# ---------------------------------------------------------------------------------------
# What is kept


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_call_costs_no_decoding(workers):
    seen = torch.zeros(60, dtype=torch.int64).share_memory_()

    class Counted(Pictures):
        def __getitem__(self, row):
            seen[row] += 1
            return super().__getitem__(row)

    loader = Loader(Counted(), as_tensor, CPU, workers, cache_bytes=1e6)
    first = list(loader(batches_of(30)))
    assert seen.sum() == 30
    for batches in (batches_of(30), iter(batches_of(30)), map(np.array, batches_of(30))):
        again = list(loader(batches))
        assert seen.sum() == 30 and not workers_alive()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    room = loader.room
    longer = list(loader([*batches_of(30)[:3], [40, 3], *batches_of(30)[3:]]))
    assert torch.equal(longer[3][1], first[0][3])
    assert seen.sum() == 30 + 2 + 18, "what follows the first new batch is read"
    assert loader.room == room - 2 * 3 * 12 * 16, "but not kept twice"
    assert all(not x.is_shared() for views in loader.kept.values() for x in views), "shared memory is small"


def test_no_more_is_kept_than_fits_and_nothing_that_is_drawn():
    of_batch = 4 * 3 * 12 * 16
    pictures = Pictures()
    loader = Loader(pictures, lambda image: (as_tensor(image), as_tensor(image)), CPU, 0, cache_bytes=5 * of_batch)
    for _ in range(3):
        found = list(loader(batches_of(16)))
        assert torch.equal(found[3][1][0], as_tensor(Pictures()[12])) and len(found) == 4
    held = sum(x.untyped_storage().nbytes() for views in loader.kept.values() for x in views)
    assert held == 4 * of_batch and len(pictures.opened) == 3 * 16 - 2 * 8

    pictures = Pictures()
    loader = Loader(pictures, as_tensor, CPU, 0, cache_bytes=1e9)
    batches = [[(row, row) for row in batch] for batch in batches_of(8)]
    assert len(list(loader(batches)) + list(loader(batches))) == 4 and len(pictures.opened) == 16


# ---------------------------------------------------------------------------------------
# On the device


def test_numbers():
    with torch.inference_mode():  # an evaluation first, then something that needs gradients
        normalised(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    drawn = torch.zeros(3, 2, 2, requires_grad=True)
    normalised(drawn, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)).sum().backward()

    x = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    for _ in range(2):
        found = normalised(x, mean, std)
        expected = (x.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert torch.equal(normalised(x[0], list(mean), list(std)), expected[0])
    assert torch.equal(to_unit(x), x.float() / 127.5 - 1) and to_unit(x).min() == -1 and to_unit(x).max() == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_arrive_on_the_gpu():
    cuda = torch.device("cuda", 0)
    for workers in (0, 2):
        loader = Loader(Pictures(), as_tensor, cuda, workers, cache_bytes=1e6)
        for _ in range(2):
            found = torch.cat(list(loader(batches_of(20))))
            assert found.is_cuda and torch.equal(
                found.cpu(), torch.stack([as_tensor(Pictures()[i]) for i in range(20)])
            )
        assert all(not x.is_pinned() for views in loader.kept.values() for x in views)
