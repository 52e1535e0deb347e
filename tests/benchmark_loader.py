"""How many pictures one core decodes and crops in a second, and what files and decoding cost.

    python tests/benchmark_loader.py            # half a minute

Not a test: it asserts no time. Quote the ratios, which come from one run, before the rates.
"""

import io
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.datasets import load_sample_images  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from common.images import open_rgb  # noqa: E402
from common.loader import Loader  # noqa: E402


class Memory:
    """Encoded files in memory, so that no disk is measured; [row] and open(row, shorter) as in datasets.Images."""

    def __init__(self, pictures: list[Image.Image], format: str, **options: object):
        buffers = [io.BytesIO() for _ in pictures]
        for picture, buffer in zip(pictures, buffers, strict=True):
            picture.save(buffer, format, **options)
        self.files = [buffer.getvalue() for buffer in buffers]

    def open(self, row: int, shorter: int | None = None) -> Image.Image:
        return open_rgb(io.BytesIO(self.files[row % len(self.files)]), shorter)

    __getitem__ = open


def photos(size: int) -> list[Image.Image]:
    """Two photos and their mirror images, square crops at this size, with the grain that enlarging takes away."""
    grain = np.random.RandomState(0).normal(0, 3, (size, size, 3))
    found = []
    for array in load_sample_images().images:
        picture = Image.fromarray(array).crop((100, 0, 527, 427)).resize((size, size), Image.Resampling.LANCZOS)
        picture = Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8))
        found += [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    return found


training_view = v2.Compose([v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()])
evaluation_view = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224), v2.PILToTensor()])


def rate(batch_sizes: Iterator[int], seconds: float, clock: Callable[[], float]) -> float:
    """Items a second of the clock. The first batch is not counted."""
    next(batch_sizes)
    start, done = clock(), 0
    while clock() - start < seconds:
        done += next(batch_sizes)
    return done / (clock() - start)


def loader_rates(seconds: float = 2.0, workers: int = 0) -> list[tuple[str, float, float]]:
    """Rows (what, images per second, kB per file). workers 0: per second of one core's time, whatever else runs on the
    machine; else of so many processes, by the clock on the wall."""
    clock = time.perf_counter if workers else time.process_time
    png, webp = dict(compress_level=1), dict(lossless=True, quality=0, method=0)
    jpeg = dict(quality=95, subsampling=0)
    cases = [
        ("PNG 512, training view", Memory(photos(512), "PNG", **png), training_view, None),
        ("WebP 512 lossless, training view", Memory(photos(512), "WEBP", **webp), training_view, None),
        ("JPEG 512 q95, training view", Memory(photos(512), "JPEG", **jpeg), training_view, None),
        ("PNG 256, training view", Memory(photos(256), "PNG", **png), training_view, None),
        ("WebP 256 lossless, training view", Memory(photos(256), "WEBP", **webp), training_view, None),
        ("JPEG 256 q95, training view", Memory(photos(256), "JPEG", **jpeg), training_view, None),
        ("JPEG 2000 q90, evaluation view", Memory(photos(2000), "JPEG", quality=90), evaluation_view, None),
        ("the same, reduced decoding", Memory(photos(2000), "JPEG", quality=90), evaluation_view, 256),
    ]
    rows = []
    for name, files, view, shorter in cases:
        loader = Loader(files, view, torch.device("cpu"), workers, ("benchmark",), shorter=shorter)
        endless = ([(row, row + 16 * k) for row in range(16)] for k in count())
        speed = rate(map(len, loader(endless)), seconds, clock)
        rows.append((name, speed, sum(map(len, files.files)) / len(files.files) / 1000))
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{'':36}{'images/s and core':>18}{'kB':>8}")
    for name, speed, size in loader_rates():
        print(f"{name:36}{speed:18.0f}{size:8.0f}")
    for name, speed, _ in loader_rates(workers=2)[:1]:
        print(f"{name + ', 2 workers':36}{speed:18.0f}")
