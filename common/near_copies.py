"""How many generated images are near-copies of training images, by perceptual hash, and how many real ones would be."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from common.distributed import Dist, progress
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
    low = DCT @ grey.astype(np.float64) @ DCT.T
    return np.packbits(low > np.median(low))


def both_hashes(image: Image.Image) -> torch.Tensor:
    """PIL RGB -> uint8 [2, 8], of the image and of its mirror image; a training may have mirrored what it copies."""
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    return torch.from_numpy(np.stack([perceptual_hash(grey), perceptual_hash(grey[:, ::-1])]))


def hashes(images: Any, rows: np.ndarray, dist: Dist, workers: int, what: str) -> np.ndarray:
    """uint64 [n, 2] of these rows"""
    read = Loader(images, both_hashes, torch.device("cpu"), workers, shorter=2 * SIDE)
    with progress(len(rows), f"near-copies: {what}", dist) as bar:
        parts = []
        for part in read(chunks(rows.tolist(), 256)):
            parts.append(part.numpy().view(np.uint64)[..., 0])
            bar.update(len(part))
    return np.concatenate(parts)


def count_near(some: np.ndarray, training: np.ndarray, near: int = NEAR) -> int:
    """How many of these hashes [n] differ from one of the training hashes [m] in at most `near` bits. uint64."""
    at_once = max(1, 2**25 // len(training))
    return sum(
        int((np.bitwise_count(np.bitwise_xor.outer(part, training)).min(1) <= near).sum())
        for part in np.array_split(some, -(-len(some) // at_once))
    )


def near_copies(run: Run, drawn: dict[str, Any], training: Any, test: Any, workers: int) -> dict[str, dict[str, int]]:
    """Count them in each set of generated images, and say so in the report's notes. Call it on rank 0.

    drawn: {folder: data set}. The same count over the test images is the measure of chance: simple pictures (digits)
    are alike without being copies. -> {folder or "test": {"near", "of"}}, for results.json
    """
    known = hashes(training, np.arange(len(training)), run.dist, workers, "training images").reshape(-1)
    found, said = {}, []
    for name, images in {**drawn, "test": test}.items():
        rows = np.unique(np.linspace(0, len(images) - 1, min(MOST, len(images))).astype(int))
        near = count_near(hashes(images, rows, run.dist, workers, f"{name} images")[:, 0], known)
        found[name] = {"near": near, "of": len(rows)}
        said.append(f"{name} {near} of {len(rows)} ({100 * near / len(rows):.1f} %)")
    what = f"near-copies of training images (perceptual hash, at most {NEAR} of 64 bits differ)"
    run.notes.append(f"{what}: {', '.join(said[:-1])}; for comparison the {said[-1]}")
    return found
