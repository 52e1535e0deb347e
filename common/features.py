"""What a CLIP sees of a list of images: features, computed once, in files of PART images that any process may write.

features = Features(run.path("features", "le"), [clip], images, micro_batch, workers)
features.write(dist)                       # this process's share of the files; those that are there stay
x = features.read("features", rows)        # [N, D], after a barrier
"""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import models
from common.clip import Clip, clip_loader
from common.datasets import Generated
from common.distributed import Dist, my_items, on_rank_0, progress, seed_of
from common.files import chunks, load_tensors, save_tensors, tensors_metadata
from common.launch import UserError
from common.loader import normalised

PART = 1024  # images in one file; an interrupted run loses at most that many


@torch.no_grad()
def encoded(clip: Clip, x: Tensor, micro_batch: int, tower: torch.nn.Module | None = None) -> Tensor:
    """uint8 [B, 3, S, S] -> features [B, D] float32, always in a full micro-batch: the same bits in any company.

    tower: instead of the CLIP's own image tower.
    """
    n = len(x)
    x = torch.cat([x, x[-1:].expand(micro_batch - n, *x.shape[1:])]) if n < micro_batch else x
    return (tower or clip.model.visual)(normalised(x, clip.mean, clip.std).to(clip.dtype))[:n].float()


def tower_features(
    clip: Clip, tower: torch.nn.Module, images: Any, rows: Sequence, micro_batch: int, device: torch.device,
    workers: int,
) -> Tensor:  # fmt: skip
    """Features [N, D] of these images by this image tower, in eval mode meanwhile."""
    mode, stream = tower.training, clip_loader([clip], images, device, workers)(chunks(rows, micro_batch))
    tower.eval()
    found = [encoded(clip, x, micro_batch, tower) for x in stream]
    tower.train(mode)
    return torch.cat(found) if found else torch.zeros(0, clip.config["embed_dim"], device=device)


def list_key(images: Any) -> int:
    """The images of a list by name; of a generated one by its formula."""
    if isinstance(images, Generated):
        return seed_of(images.root.name, int(images.starts[-1]), *images.folders)
    return seed_of(*images.keys)


class Features:
    """What clips[0] sees of the images, and what else is worked out on the way; see the top of this file.

    clips: the last of them may serve `more` of `write`. dtype: in which the features are kept. Trap:
    another CLIP, its files, its transform or another list of images is another key, and what was written under another
    key is refused.
    """

    def __init__(
        self,
        folder: Path,
        clips: Sequence[Clip],
        images: Any,
        micro_batch: int,
        workers: int,
        dtype: torch.dtype = torch.float32,
    ):
        self.folder, self.clips, self.images = folder, list(clips), images
        self.micro_batch, self.workers, self.dtype = micro_batch, workers, dtype
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
        with progress(sum(map(len, left)), f"features {self.folder.name}", dist, together=True) as bar:
            for part in mine:
                found = []
                for rows in chunks(part, b):
                    found.append(next(stream))
                    bar.update(len(rows))
                features = [torch.cat(of_clip) for of_clip in zip(*found, strict=True)]
                labels = torch.from_numpy(self.images.labels[part.start : part.stop])
                tensors = {} if more is None else more(features[-1], labels)
                save_tensors(self.file(part), {"features": features[0].to(self.dtype)} | tensors, self.key)

    def _encoded(self, clips: list[Clip], batches: Iterable, device: torch.device) -> Iterator[list[Tensor]]:
        """Of each batch the features by each of these CLIPs."""
        for views in clip_loader(clips, self.images, device, self.workers)(batches):
            views = views if isinstance(views, tuple) else (views,)
            yield [encoded(clip, x, self.micro_batch).cpu() for clip, x in zip(clips, views, strict=True)]

    def read(self, name: str, rows: np.ndarray | None = None) -> Tensor:
        """Tensor `name` of these rows; None: of all. Refuses what another CLIP or list of images left.

        Only one part is held beside the result, which may be much of the memory.
        """
        rows = np.arange(len(self.images)) if rows is None else rows
        found = torch.zeros(0, self.clips[0].config["embed_dim"])
        for part in self.parts:
            here = np.flatnonzero((rows >= part.start) & (rows < part.stop))
            if len(here):
                if tensors_metadata(self.file(part)) != self.key:
                    what = "features of other images or another CLIP; use a new --output-dir"
                    raise UserError(f"{self.file(part)}: {what}")
                tensor = load_tensors(self.file(part))[name]
                if not len(found):
                    found = tensor.new_empty(len(rows), *tensor.shape[1:])
                found[here] = tensor[rows[here] - part.start]
        return found


# ---------------------------------------------------------------------------------------
# Features of a training: from the cache, or by a tower that is being tuned


class Cached:
    """How a classifier sees images: by the features that the frozen tower left."""

    params: Sequence[Tensor] = ()  # of the tower: what is trained,
    state: dict[str, Tensor] = {}  # what else training changes,
    weights: dict[str, Tensor] = {}  # and what is to be saved in the end

    def reader(self, known: tuple, images: Any, batches: Iterable) -> Callable:
        """known: (rows of the images, features, labels); batches: which of them, step by step, some may be empty. ->
        function: batch -> features, labels; to be called in the order of the batches."""
        return lambda i: (known[1][i], known[2][i])

    def again(self, features: Tensor, images: Any) -> Tensor:
        """The features [N, D] of all images as they are now."""
        return features


class Tuned(Cached):
    """By a copy of the image tower, whose last `share` is trained, and which normalises by batch statistics unless
    freeze_bn. Features come from the pixels of each step."""

    def __init__(self, clip: Clip, share: float, freeze_bn: bool, micro_batch: int, device: Any, workers: int):
        self.clip, self.micro_batch, self.device, self.workers = clip, micro_batch, device, workers
        self.tower = copy.deepcopy(clip.model.visual).train(not freeze_bn)
        last_share(self.tower, share)
        self.params = [p for p in self.tower.parameters() if p.requires_grad]
        self.state = dict(self.tower.named_buffers())
        self.weights = {f"visual.{k}": v for k, v in self.tower.state_dict().items()}

    def reader(self, known: tuple, images: Any, batches: Iterable) -> Callable:
        (rows, _, y), clip = known, self.clip
        wanted = (rows[i].tolist() for i in batches if len(i))
        stream = clip_loader([clip], images, self.device, self.workers)(wanted)
        return lambda i: (self.tower(normalised(next(stream), clip.mean, clip.std)).float(), y[i])

    def again(self, features: Tensor, images: Any) -> Tensor:
        rows = range(len(images))
        return tower_features(self.clip, self.tower, images, rows, self.micro_batch, self.device, self.workers)


def last_share(tower: torch.nn.Module, share: float) -> list[Tensor]:
    """The last parameters of the image tower, in order of definition, up to `share` of it; the rest is frozen."""
    chosen: list[Tensor] = []
    total = sum(p.numel() for p in tower.parameters())
    for p in reversed(list(tower.parameters())):
        take = share > 0 and sum(q.numel() for q in chosen) < share * total
        p.requires_grad_(take)
        chosen += [p] * take
    return chosen


class Latest:
    """The last result of make(*key), let go before the next is made: of ImageNet two would take 16 GB."""

    def __init__(self, make: Callable):
        self.make, self.key, self.value = make, None, None

    def __call__(self, *key: Any) -> Any:
        if key != self.key:
            self.key = self.value = None
            self.key, self.value = key, self.make(*key)
        return self.value
