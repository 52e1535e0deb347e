"""Pictures reach the device through one door: workers decode, crop and augment; bytes travel, floats are made there."""

import ctypes
import gc
import multiprocessing
import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.distributed import seed_global, seed_of
from common.launch import UserError

# The user says how many; some disks are slow enough for more workers than cores.
warnings.filterwarnings("ignore", message="This DataLoader will create")


class Loader:
    """Called with batches, an iterable of lists of rows: an iterator of uint8 tensors [B, 3, H, W] on the device.

    images: images[row] -> PIL RGB. view: PIL -> uint8 tensor [3, H, W], or a tuple of several, then batches are tuples.
    An item of a batch is a row, or (row, position, ...): torch's, numpy's and python's generators are then seeded with
    seed_of(*seed, position), and what follows the position goes to the view as further arguments. The bytes of an item
    depend on neither the workers nor its neighbours; the caller's generators are left as they are.

    workers: processes; 0: this one. batches may be a generator; two batches per worker are read ahead. cache_bytes: in
    calls without positions the first batches are kept while they fit, and cost nothing when a later call begins alike
    (so do not change them in place). shorter: pixels that the view needs on the shorter side, for images.open(row,
    shorter). Raises the UserError of a picture that cannot be read, in its turn.
    """

    def __init__(
        self,
        images: Any,
        view: Callable,
        device: torch.device,
        workers: int,
        seed: Sequence[int | str] = (),
        cache_bytes: float = 0,
        shorter: int | None = None,
    ):
        self.images, self.view, self.device, self.seed, self.shorter = images, view, device, seed, shorter
        self.workers = workers if sys.platform == "linux" else 0  # they are forked, which is not safe elsewhere
        self.room, self.kept = cache_bytes, {}  # bytes left; rows of a batch -> its views
        Image.init()  # the decoders are loaded here, once, and not by every worker

    def __call__(self, batches: Iterable[Sequence]) -> Iterator[Any]:
        batches = iter(batches)
        for batch in batches:
            if (views := self.kept.get(tuple(batch))) is None:
                break
            yield self._sent(views)
        else:
            return

        for rows, views in self._read(chain([batch], batches)):
            if isinstance(views, Exception):
                raise views
            rows, size = tuple(rows), sum(x.nbytes for x in views)
            if size <= self.room and rows not in self.kept and not isinstance(batch[0], tuple):
                # A copy: what workers send lies in pinned or shared memory, which is held in larger pieces.
                self.kept[rows], self.room = [x.clone() for x in views], self.room - size
            yield self._sent(views)

    def _sent(self, views: list[torch.Tensor]) -> Any:
        sent = tuple(x.to(self.device, non_blocking=True) for x in views)
        return sent if len(sent) > 1 else sent[0]

    def _read(self, batches: Iterator[Sequence]) -> Iterator[Any]:
        if not self.workers:
            for batch in batches:
                with _like_a_worker():
                    found = self.__getitems__(batch)
                yield found
            return

        # The generator is for torch's own seeds, which are else drawn from the caller's.
        workers = dict(num_workers=self.workers, worker_init_fn=_begin_worker, multiprocessing_context="fork")
        settings = dict(pin_memory=self.device.type == "cuda", generator=torch.Generator(), **workers)
        data = iter(torch.utils.data.DataLoader(self, batch_sampler=batches, collate_fn=lambda x: x, **settings))
        with suppress(ValueError):  # not in the main thread
            # torch's handler raises at any line of the program when a worker dies; without it the read below does.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            yield from data
        except (RuntimeError, ConnectionError, EOFError) as error:  # the latter two: it was sending when it died
            if isinstance(error, RuntimeError) and not str(error).startswith(("DataLoader worker", "Pin memory")):
                raise
            why = "a process that reads pictures was killed; memory or /dev/shm may be full, try a smaller --workers"
            raise UserError(why) from error

    def __getitems__(self, batch: Sequence) -> tuple:
        """A batch and its views, stacked, or what went wrong; raised in a worker, it would arrive as a traceback."""
        try:
            items = [self._item(*item) if isinstance(item, tuple) else self._item(item) for item in batch]
            views = zip(*items, strict=True) if isinstance(items[0], tuple) else [items]
            return batch, [torch.stack(view) for view in views]
        except UserError as error:
            return batch, error
        except Exception:
            return batch, RuntimeError(f"in a view:\n{traceback.format_exc()}")

    def _item(self, row: int, position: int | None = None, *more: Any) -> Any:
        image = self.images.open(row, self.shorter) if self.shorter else self.images[row]
        if position is not None:
            number = seed_of(*self.seed, position)
            seed_global(number)
            random.seed(number)
            np.random.seed(number % 2**32)
        return self.view(image, *more)


@contextmanager
def _like_a_worker() -> Iterator[None]:
    """One thread; the generators and the number of threads of this process are put back afterwards."""
    threads, states = torch.get_num_threads(), (torch.get_rng_state(), np.random.get_state(), random.getstate())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for put_back, state in zip((torch.set_rng_state, np.random.set_state, random.setstate), states, strict=True):
            put_back(state)


def _begin_worker(_: int) -> None:
    """DataLoader has set one thread. A signal to all (Ctrl-C, scancel) is for the main process to answer."""
    gc.freeze()  # the main process's garbage is not this one's to remove; and to look at it would copy the pages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive a killed parent
    if os.getppid() != multiprocessing.parent_process().pid:  # killed before that
        os._exit(0)


def normalised(x: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 [..., 3, H, W] -> float32, (x / 255 - mean) / std per channel."""
    mean, std = (_per_channel(tuple(values), x.device) for values in (mean, std))
    return (x.float() / 255 - mean) / std


@cache
@torch.inference_mode(False)  # what is made in that mode cannot be used in training
def _per_channel(values: tuple, device: torch.device) -> torch.Tensor:
    """Kept on the device: to copy it there for every batch would wait for the work that is queued."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def to_unit(x: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1], what a VAE encodes."""
    return x.float() / 127.5 - 1
