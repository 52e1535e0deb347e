"""Near-copies: the hash against SciPy's DCT, the count against one pair at a time, and what the user reads."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.fft
import torch
from PIL import Image, ImageEnhance, ImageOps

from common import near_copies as nc
from common.datasets import Images, load_dataset
from common.distributed import Dist
from common.run import open_run

ONE = SimpleNamespace(rank=0, world=1, device="cpu", main=True)
ALONE = Dist(0, 0, 1, torch.device("cpu"))


def pictures(n, seed=0, size=48):
    """Smooth random pictures: what photos have in common with a hash's point of view."""
    coarse = np.random.default_rng(seed).integers(256, size=(n, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC) for x in coarse]


def data_set(images):
    return Images([0] * len(images), [f"{i}.png" for i in range(len(images))], ["x"], pixels=np.stack(images))


def test_hash_is_the_signs_of_the_lowest_dct_frequencies_about_their_median():
    for image in pictures(3):
        grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS))
        low = scipy.fft.dctn(grey.astype(float))[:8, :8]
        bits = np.unpackbits(nc.perceptual_hash(grey)).reshape(8, 8)
        assert np.array_equal(bits, low > np.median(low))


def test_copies_are_found_in_any_dress_and_others_are_not():
    training = pictures(40)
    known = np.stack([nc.both_hashes(im).numpy().view(np.uint64)[:, 0] for im in training]).reshape(-1)
    noisy = np.asarray(training[4]) + np.random.default_rng(1).normal(0, 8, (48, 48, 3))
    dressed = [
        training[0],
        ImageOps.mirror(training[1]),
        ImageEnhance.Brightness(training[2]).enhance(0.8),
        training[3].resize((20, 20), Image.Resampling.BILINEAR),
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)),
    ]  # fmt: skip
    hashed = [nc.both_hashes(im).numpy().view(np.uint64)[0, 0] for im in [*dressed, *pictures(30, seed=9)]]
    assert nc.count_near(np.array(hashed[:5]), known) == 5
    assert nc.count_near(np.array(hashed[5:]), known) == 0


def test_count_is_that_of_one_pair_at_a_time():
    g = np.random.default_rng(2)
    known = g.integers(2**63, size=50, dtype=np.uint64)
    flips = np.array(
        [sum(1 << int(b) for b in g.choice(64, i % 10, replace=False)) for i in range(200)], dtype=np.uint64
    )
    some = known[g.integers(50, size=200)] ^ flips
    one_by_one = sum(min(bin(int(a) ^ int(b)).count("1") for b in known) <= nc.NEAR for a in some)
    assert nc.count_near(some, known) == one_by_one > 100
    assert nc.count_near(some, known, near=0) == sum(int(a) in set(known.tolist()) for a in some)


@pytest.mark.parametrize("most", [5000, 10])
def test_note_and_numbers(tmp_path, monkeypatch, most):
    monkeypatch.setattr(nc, "MOST", most)
    run = open_run("s", dict(output_dir=str(tmp_path / "r"), stages=["draw"]), ONE)
    training = pictures(20)
    drawn = {
        "images": data_set([*training[:4], ImageOps.mirror(training[4]), *pictures(15, seed=3)]),
        "stock": data_set(pictures(20, seed=4)),
    }
    found = nc.near_copies(run, drawn, data_set(training), data_set(pictures(40, seed=5)), 0, ALONE)
    if most == 5000:
        numbers = {"images": (5, 20), "stock": (0, 20), "test": (0, 40)}
        assert found == {name: {"near": near, "of": of} for name, (near, of) in numbers.items()}
        assert "images 5 of 20 (25.0 %), stock 0 of 20 (0.0 %); for comparison the test 0 of 40" in run.notes[0]
    else:  # evenly spread: 0, 2, 4, ... of the twenty
        assert found["images"]["of"] == found["test"]["of"] == 10 and 1 <= found["images"]["near"] <= 3


def plain_hash(image, mirrored=False):
    """The same hash by SciPy, as a Python integer"""
    grey = np.asarray((ImageOps.mirror(image) if mirrored else image).convert("L").resize((32, 32), Image.LANCZOS))
    low = scipy.fft.dctn(grey.astype(float))[:8, :8].round(5)
    return int("".join("01"[int(bit)] for bit in (low > np.median(low)).flatten()), 2)


def test_digits_as_they_are_against_training_digits_and_their_mirror_images(tmp_path):
    """Digits are alike without being copies, so that every part of the comparison changes the count."""
    digits = load_dataset("digits")
    training, test = digits.train.subset(range(100)), digits.test.subset(range(200))
    known = [plain_hash(training.open(i), mirrored) for i in range(100) for mirrored in (False, True)]
    expected = {
        mirrored: sum(
            min((plain_hash(test.open(i), mirrored) ^ k).bit_count() for k in known) <= nc.NEAR for i in range(200)
        )
        for mirrored in (False, True)
    }
    assert len(set(expected.values())) == 2, "mirroring changes which values lie above the median"
    run = open_run("s", dict(output_dir=str(tmp_path / "r"), stages=["draw"]), ONE)
    found = nc.near_copies(run, {"images": test}, training, test, 0, ALONE)
    assert found["images"] == found["test"] == {"near": expected[False], "of": 200}


def test_nothing_drawn_nothing_read_nothing_said(tmp_path):
    run = open_run("s", dict(output_dir=str(tmp_path / "r"), stages=["draw"]), ONE)
    assert nc.near_copies(run, {}, None, None, 0, ALONE) == {} and run.notes == []
