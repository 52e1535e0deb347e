"""How many generated images are near-copies of training images, by perceptual hash, and how many real ones would be."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from common.distributed import Dist, all_gather_object, gather_rows, my_items, progress
from common.files import chunks
from common.loader import Loader
from common.run import Run

NEAR = 5  # bits of 64 in which two hashes may differ
SIDE, KEPT = 32, 8  # the hash looks at 32 x 32 grey pixels and keeps their 8 x 8 lowest frequencies
MOST = 5000  # images that are looked up among the training images, evenly spread; the training images are all there
DCT = np.cos(np.pi / SIDE * np.outer(np.arange(KEPT), np.arange(SIDE) + 0.5))  # the first rows of DCT-II, unscaled


def perceptual_hash(grey: np.ndarray) -> np.ndarray:
    """[32, 32] grey values -> uint8 [8], 64 bits: which of the lowest frequencies of the DCT are above their median.

    The usual "pHash" (C. Zauner, 2010): a change of size, brightness, contrast or compression flips a few bits at most.
    """
    low = (DCT @ grey.astype(np.float64) @ DCT.T).round(6)  # what should be 0 is: rounding would make bits of noise
    return np.packbits(low > np.median(low))


def both_hashes(image: Image.Image) -> torch.Tensor:
    """PIL RGB -> uint8 [2, 8], of the image and of its mirror image; a training may have mirrored what it copies."""
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    return torch.from_numpy(np.stack([perceptual_hash(grey), perceptual_hash(grey[:, ::-1])]))


def hashes(images: Any, rows: np.ndarray, dist: Dist, workers: int, what: str) -> torch.Tensor:
    """uint8 [n, 2, 8] of this process's share of these rows"""
    read = Loader(images, both_hashes, torch.device("cpu"), workers, shorter=2 * SIDE)
    parts = [torch.empty(0, 2, 8, dtype=torch.uint8)]
    with progress(len(rows), f"near-copies: {what}", dist, together=True) as bar:
        for part in read(chunks(my_items(rows, dist).tolist(), 256)):
            parts.append(part)
            bar.update(len(part))
    return torch.cat(parts)


def as_numbers(packed: torch.Tensor) -> np.ndarray:
    """uint8 [..., 8] -> uint64 [...]"""
    return packed.numpy().view(np.uint64)[..., 0]


def count_near(some: np.ndarray, training: np.ndarray, near: int = NEAR) -> int:
    """How many of these hashes [n] differ from one of the training hashes [m] in at most `near` bits. uint64."""
    if not len(some):
        return 0
    at_once = max(1, 2**25 // len(training))
    return sum(
        int((np.bitwise_count(np.bitwise_xor.outer(part, training)).min(1) <= near).sum())
        for part in np.array_split(some, -(-len(some) // at_once))
    )


def near_copies(
    run: Run, drawn: dict[str, Any], training: Any, test: Any, workers: int, dist: Dist
) -> dict[str, dict[str, int]]:
    """Count them in each set of generated images, and say so in the report's notes. All processes of dist must call.

    drawn: {folder: data set}; nothing is read when there is none. The same count over the test images is the measure of
    chance: simple pictures (digits) are alike without being copies. -> {folder or "test": {"near", "of"}}, for
    results.json
    """
    if not drawn:
        return {}
    known = hashes(training, np.arange(len(training)), dist, workers, "training images")
    known = as_numbers(gather_rows(known, dist)).reshape(-1)
    found, said = {}, []
    for name, images in {**drawn, "test": test}.items():
        rows = np.unique(np.linspace(0, len(images) - 1, min(MOST, len(images))).astype(int))
        own = as_numbers(hashes(images, rows, dist, workers, f"{name} images"))[:, 0]
        near = sum(all_gather_object(count_near(own, known), dist))
        found[name] = {"near": near, "of": len(rows)}
        said.append(f"{name} {near} of {len(rows)} ({100 * near / len(rows):.1f} %)")
    what = f"near-copies of training images (perceptual hash, at most {NEAR} of 64 bits differ)"
    run.notes.append(f"{what}: {', '.join(said[:-1])}; for comparison the {said[-1]}")
    return found
