"""The VAE's posteriors of pictures: each computed when a step asks for it, or all of them once and kept."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from common.diffusion import autocast
from common.distributed import Dist, gather_known_rows
from common.files import chunks
from common.loader import Loader, to_unit

KEPT_AT_ONCE = 8  # pictures of a pass


class Posteriors:
    """Called with batches of the loader's items: their posteriors, mean and std of [B, 4, h, w], float32.

    A frozen VAE gives a picture the same posterior whenever it comes; what differs from step to step is the draw from
    it, which is the caller's. pictures: gives uint8 [B, 3, H, W]. b: pictures of a pass, but for those that are kept.
    The VAE always sees so many, and the bits do not depend on a picture's neighbours.
    """

    def __init__(self, vae: Any, pictures: Loader, b: int, precision: str):
        self.vae, self.pictures, self.b, self.precision = vae, pictures, b, precision
        self.table, self.place = None, {}  # moments of the kept items; item -> its row

    def keep(self, items: Sequence[tuple], dist: Dist) -> None:
        """Compute these once, the processes together, and hold them in memory. All must call, with the same items."""
        b, rows = KEPT_AT_ONCE, KEPT_AT_ONCE * dist.world  # rows: of a round, a batch of each process
        wanted = chunks([*items, *items[-1:] * (-len(items) % rows)], b)
        for k, mine in enumerate(self._moments(wanted[dist.rank :: dist.world], b)):
            everyone = gather_known_rows(mine.cpu(), [b] * dist.world, dist)
            if self.table is None:  # once: a list of parts would take the memory twice
                self.table = everyone.new_empty(len(wanted) * b, *everyone.shape[1:])
            self.table[k * rows : (k + 1) * rows] = everyone
        self.place = {item: row for row, item in enumerate(items)}

    def __call__(self, batches: Iterable[Sequence[tuple]]) -> Iterator[DiagonalGaussianDistribution]:
        if self.table is None:
            found = self._moments(batches, self.b)
        else:
            found = (self.table[[self.place[item] for item in batch]] for batch in batches)
        for moments in found:
            yield DiagonalGaussianDistribution(moments.to(self.pictures.device, non_blocking=True).float())

    def _moments(self, batches: Iterable[Sequence[tuple]], b: int) -> Iterator[torch.Tensor]:
        """-> mean above log variance, [B, 8, h, w] each, in the precision in which the VAE computes; B <= b pictures"""
        sizes = deque()  # the loader reads ahead

        def full() -> Iterator[list]:
            for batch in batches:
                sizes.append(len(batch))
                yield [*batch, *batch[-1:] * (b - len(batch))]

        for x in self.pictures(full()):
            with torch.no_grad(), autocast(self.precision, self.pictures.device):
                moments = self.vae.encode(to_unit(x)).latent_dist.parameters
            yield moments[: sizes.popleft()]
