"""Posteriors of pictures against the VAE of a stock pipeline."""

import pytest
import torch
from diffusers import AutoencoderKL

from common.distributed import Dist
from common.loader import Loader
from common.models import resolve
from common.posteriors import Posteriors

ALONE = Dist(0, 0, 1, torch.device("cpu"))
ITEMS = [(i, 100 * i + k) for i in range(5) for k in range(2)]  # two views of each of five pictures


class Pictures:
    """Number i, brighter with i; a view adds to it what its generator says."""

    def __init__(self):
        self.read = []

    def __getitem__(self, i):
        self.read.append(i)
        return i


def view(i):
    noise = torch.rand(3, 32, 32)
    return (20.0 * i + 100 * noise).to(torch.uint8)


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(f"{resolve('tiny', 'generator')}/vae").requires_grad_(False)


def stock(vae, items, seed_of):
    """Mean and deviation, one picture at a time."""
    found = []
    for i, position in items:
        torch.manual_seed(seed_of("a", position))
        posterior = vae.encode(view(i)[None].float() / 127.5 - 1).latent_dist
        found.append((posterior.mean, posterior.std))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_posteriors_are_those_of_the_vae(vae, kept, workers):
    """In batches of any length, for any order, twice too."""
    from common.distributed import seed_of

    pictures = Pictures()
    posteriors = Posteriors(vae, Loader(pictures, view, ALONE.device, workers, ("a",)), 4, "fp32")
    if kept:
        posteriors.keep(ITEMS, ALONE)
        assert workers or pictures.read == [i for i, _ in [*ITEMS, *ITEMS[-1:] * 6]]
        pictures.read = None  # whoever reads on ends in an error
    batches = [ITEMS[6:9], ITEMS[:1], [ITEMS[4], ITEMS[4], ITEMS[9], ITEMS[1]]]
    found = list(posteriors(iter(batches)))
    for batch, posterior in zip(batches, found, strict=True):
        mean, std = stock(vae, batch, seed_of)
        assert posterior.mean.dtype == posterior.std.dtype == torch.float32
        torch.testing.assert_close(posterior.mean, mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(posterior.std, std, atol=1e-5, rtol=1e-5)


def test_bits_do_not_depend_on_the_neighbours(vae):
    posteriors = Posteriors(vae, Loader(Pictures(), view, ALONE.device, 0, ("a",)), 4, "fp32")
    alone, among = posteriors(iter([[ITEMS[3]], [*ITEMS[:3], ITEMS[3]]]))
    assert torch.equal(alone.mean[0], among.mean[3]) and torch.equal(alone.std[0], among.std[3])


def test_mixed_precision_is_kept_in_two_bytes(vae):
    posteriors = Posteriors(vae, Loader(Pictures(), view, ALONE.device, 0, ("a",)), 4, "bf16")
    (fresh,) = posteriors(iter([ITEMS[:4]]))
    posteriors.keep(ITEMS, ALONE)
    assert posteriors.table.dtype == torch.bfloat16 and len(posteriors.table) == 16
    (kept,) = posteriors(iter([ITEMS[:4]]))
    torch.testing.assert_close(kept.mean, fresh.mean, atol=0.02, rtol=0.02)
    exact = Posteriors(vae, Loader(Pictures(), view, ALONE.device, 0, ("a",)), 4, "fp32")
    (exact,) = exact(iter([ITEMS[:4]]))
    assert 0 < (exact.mean - kept.mean).abs().max() < 0.05 * exact.mean.abs().max()


def test_nothing_to_keep_keeps_nothing(vae):
    posteriors = Posteriors(vae, Loader(Pictures(), view, ALONE.device, 0, ("a",)), 4, "fp32")
    posteriors.keep([], ALONE)
    assert posteriors.table is None and len(list(posteriors(iter([ITEMS[:2]])))) == 1
