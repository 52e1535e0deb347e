"""Data sets of small pictures as tensors: whole splits at one size, bytes on the device; nothing is read twice."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.datasets import Images
from common.files import chunks
from common.loader import Loader

Split = tuple[torch.Tensor, torch.Tensor]
AT_ONCE = 500  # pictures in a batch of the loader


@dataclass
class Pixels:
    """A data set on one device: of each split the images, uint8 [N, channels, size, size], and the labels [N]."""

    train: Split
    val: Split
    test: Split
    class_names: list[str]

    @property
    def n_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.train[0].shape[1]


def prepared(image: Image.Image, channels: int, size: int, pad: bool = False) -> torch.Tensor:
    """PIL image -> uint8 [channels, size, size]. pad: zeros around it (28 -> 32 pixels, say); else resized by Lanczos,
    the shorter side to size, and cropped in the centre."""
    image = image.convert("L" if channels == 1 else "RGB")
    if pad:
        pixels = np.pad(np.asarray(image), (size - image.width) // 2)
    else:
        if image.size != (size, size):
            scale = size / min(image.size)
            w, h = (max(size, round(side * scale)) for side in image.size)
            left, top = (w - size) // 2, (h - size) // 2
            image = image.resize((w, h), Image.Resampling.LANCZOS).crop((left, top, left + size, top + size))
        pixels = np.array(image)
    return torch.from_numpy(np.ascontiguousarray(pixels)).view(size, size, channels).permute(2, 0, 1)


def load_pixels(images: Any, view: Callable, device: torch.device, workers: int) -> torch.Tensor:
    """All pictures of a small set, decoded once by the loader, as one uint8 tensor [N, ...]. view: as in Loader"""
    return torch.cat(list(Loader(images, view, device, workers)(chunks(range(len(images)), AT_ONCE))))


def load_split(images: Images, channels: int, size: int, pad: bool, device: torch.device, workers: int) -> Split:
    """All pictures of a split, each as `prepared` makes it. Raises the UserError of one that cannot be read."""
    if images.pixels is not None and images.pixels.shape[1:3] == (size, size):  # as they lie in memory
        x = torch.from_numpy(images.pixels).view(len(images), size, size, -1).permute(0, 3, 1, 2).contiguous()
        x = x.to(device)
    else:
        view = partial(prepared, channels=channels, size=size, pad=pad)
        x = load_pixels(images, view, device, workers)
    return x, torch.tensor(images.labels, device=device).long()


def as_images(x: torch.Tensor, labels: torch.Tensor, class_names: list[str]) -> Images:
    """[N, channels, H, W], uint8 or floats in [-1, 1], as a data set in memory"""
    if x.is_floating_point():
        x = ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = x.permute(0, 2, 3, 1).cpu().numpy()
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    return Images(labels.cpu(), map(str, range(len(x))), class_names, pixels=np.ascontiguousarray(pixels))


def in_unit_range(x: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1]: (x / 255 - 0.5) / 0.5"""
    return (x.float() / 255 - 0.5) / 0.5
