"""What a CLIP sees of a list of images: features, computed once, in files of PART images that any process may write.

features = Features(run.path("features", "le"), [clip], images, micro_batch, workers)
features.write(dist)                       # this process's share of the files; those that are there stay
x = features.read("features", rows)        # [N, D], after a barrier
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Normalize, ToTensor, v2

from common import models
from common.clip import Clip
from common.datasets import Generated
from common.distributed import Dist, my_items, on_rank_0, progress, seed_of
from common.files import chunks, load_tensors, save_tensors, tensors_metadata
from common.launch import UserError
from common.loader import Loader, normalised

PART = 1024  # images in one file; an interrupted run loses at most that many


def clip_view(image: Image.Image, steps: Sequence[Callable]) -> Tensor:
    """PIL image -> uint8 [3, S, S] as a CLIP sees it."""
    for step in steps:
        image = step(image)
    return v2.functional.pil_to_tensor(image)


def clip_loader(clips: Sequence[Clip], images: Any, device: torch.device, workers: int) -> Loader:
    """Loader of images for these CLIPs, a view for each: what their own transforms do before they make floats."""
    steps = [[t for t in c.preprocess.transforms if not isinstance(t, (ToTensor, Normalize))] for c in clips]
    views = [partial(clip_view, steps=s) for s in steps]
    return Loader(
        images, views[0] if len(views) == 1 else lambda image: tuple(v(image) for v in views), device, workers
    )


@torch.no_grad()
def encoded(clip: Clip, x: Tensor, micro_batch: int, tower: torch.nn.Module | None = None) -> Tensor:
    """uint8 [B, 3, S, S] -> features [B, D] float32, always in a full micro-batch: the same bits in any company.

    tower: instead of the CLIP's own image tower.
    """
    n = len(x)
    x = torch.cat([x, x[-1:].expand(micro_batch - n, *x.shape[1:])]) if n < micro_batch else x
    return (tower or clip.model.visual)(normalised(x, clip.mean, clip.std))[:n].float()


def tower_features(
    clip: Clip, tower: torch.nn.Module, images: Any, rows: Sequence, micro_batch: int, device: torch.device,
    workers: int,
) -> Tensor:  # fmt: skip
    """Features [N, D] of these images by this image tower, in eval mode meanwhile."""
    mode, stream = tower.training, clip_loader([clip], images, device, workers)(chunks(rows, micro_batch))
    tower.eval()
    x = torch.cat([encoded(clip, x, micro_batch, tower) for x in stream])
    tower.train(mode)
    return x


def list_key(images: Any) -> int:
    """The images of a list by name; of a generated one by its formula."""
    if isinstance(images, Generated):
        return seed_of(images.root.name, int(images.starts[-1]), *images.folders)
    return seed_of(*images.keys)


class Features:
    """What clips[0] sees of the images, and what else is worked out on the way; see the top of this file.

    clips: the last of them may serve `more` of `write`. Trap: another CLIP, its files, its transform or another list
    of images is another key, and what was written under another key is refused.
    """

    def __init__(self, folder: Path, clips: Sequence[Clip], images: Any, micro_batch: int, workers: int):
        self.folder, self.clips, self.images = folder, list(clips), images
        self.micro_batch, self.workers = micro_batch, workers
        self.parts = [range(i, min(i + PART, len(images))) for i in range(0, len(images), PART)]
        what = [models.fingerprint(models.resolve(clip.name, "clip")) for clip in clips]
        self.key = f"{seed_of(*what, json.dumps(clips[0].preprocess_config, default=str), list_key(images)):016x}"

    def file(self, part: range) -> Path:
        return self.folder / f"{part.start}.safetensors"

    def write(self, dist: Dist, more: Callable[[Tensor, Tensor], dict[str, Tensor]] | None = None) -> None:
        """This process's share of the parts; what an earlier attempt wrote stays.

        more: (features [N, D] by the last CLIP, labels [N]) -> tensors [N, ...] to keep beside the features.
        """
        left = on_rank_0(lambda: [part for part in self.parts if not self.file(part).exists()], dist)
        mine, b = my_items(left, dist), self.micro_batch
        clips = self.clips[:1] if more is None else list({id(clip): clip for clip in self.clips}.values())
        stream = self._encoded(clips, (rows for part in mine for rows in chunks(part, b)), dist.device)
        with progress(sum(map(len, left)), f"filter {self.folder.name}", dist, together=True) as bar:
            for part in mine:
                found = []
                for rows in chunks(part, b):
                    found.append(next(stream))
                    bar.update(len(rows))
                features = [torch.cat(of_clip) for of_clip in zip(*found, strict=True)]
                labels = torch.from_numpy(self.images.labels[part.start : part.stop])
                tensors = {} if more is None else more(features[-1], labels)
                save_tensors(self.file(part), {"features": features[0]} | tensors, self.key)

    def _encoded(self, clips: list[Clip], batches: Iterable, device: torch.device) -> Iterator[list[Tensor]]:
        """Of each batch the features by each of these CLIPs."""
        for views in clip_loader(clips, self.images, device, self.workers)(batches):
            views = views if isinstance(views, tuple) else (views,)
            yield [encoded(clip, x, self.micro_batch).cpu() for clip, x in zip(clips, views, strict=True)]

    def read(self, name: str, rows: np.ndarray | None = None) -> Tensor:
        """Tensor `name` of these rows, ascending; None: of all. Refuses what another CLIP or list of images left."""
        found = []
        for part in self.parts:
            own = None if rows is None else rows[(rows >= part.start) & (rows < part.stop)] - part.start
            if own is None or len(own):
                if tensors_metadata(self.file(part)) != self.key:
                    what = "features of other images or another CLIP; use a new --output-dir"
                    raise UserError(f"{self.file(part)}: {what}")
                tensor = load_tensors(self.file(part))[name]
                found.append(tensor if own is None else tensor[own])
        return torch.cat(found) if found else torch.zeros(0, self.clips[0].config["embed_dim"])
