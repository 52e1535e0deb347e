"""Training a timm backbone from scratch: DeiT's and MoCo v2's published recipes as far as no paper here changes them.

    recipe = Recipe(optimizer, rate, augmentation("deit", 224), batch=1024, epochs=300, repeats=3)
    loop = train_network(run, team, "pretrain", file, objective, images, recipe, seed, micro_batch=32, ...)
    ...                                        # write the result
    loop.finish()

What is minimised is an `Objective` of the script. Micro-batches, BatchNorm's running statistics and MoCo's keys are put
together in one order, so any number of processes gives the same bits.
"""

import copy
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from timm.data.auto_augment import RandAugment
from torch import Tensor, nn
from torchvision.transforms import v2

from common import inputs, models
from common.diffusion import autocast
from common.distributed import Dist, Order, generator, seed_global, seed_of
from common.files import chunks, load_tensors
from common.launch import UserError
from common.loader import Loader, normalised
from common.loop import Loop, gather_units

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---------------------------------------------------------------------------------------
# Networks


def new_backbone(
    name: str, n_classes: int, seed: int, device: Any, weights: str | Path | None = None, drop_path: float = 0.0
) -> nn.Module:
    """timm model with a new head of n_classes; random numbers are a function of seed.

    weights: None, "imagenet" (timm's), or the file of a model of this architecture, whose head is left out. drop_path:
    stochastic depth. Raises UserError, which names --backbone, for an unknown name or weights of another model.
    """
    more: dict[str, Any] = dict(drop_path_rate=drop_path) if drop_path else {}
    if weights == "imagenet":  # by its file, which is in safetensors: timm itself would take a pickle too
        file = models.check_models([("--backbone", name, "timm")])["--backbone"]
        more |= dict(pretrained_cfg_overlay=dict(file=file))
    seed_global(seed_of(seed, "backbone"))
    try:
        net = timm.create_model(name, pretrained=weights == "imagenet", num_classes=n_classes, **more)
    except (RuntimeError, OSError, ValueError, TypeError) as error:  # TypeError: it knows no drop_path_rate
        raise UserError(f"--backbone {name}: {' '.join(str(error).split())[:200]}") from error
    if weights not in (None, "imagenet"):
        heads = net.default_cfg["classifier"]
        heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
        state = {k: v for k, v in load_tensors(weights).items() if not k.startswith(heads)}
        wanted = {k: v.shape for k, v in net.state_dict().items() if not k.startswith(heads)}
        if {k: v.shape for k, v in state.items()} != wanted:
            raise UserError(f"{weights}: these are no weights of --backbone {name}")
        net.load_state_dict(state, strict=False)
        # Another head than the one the body began its pre-training with: it would know that one's directions.
        seed_global(seed_of(seed, "new head"))
        net.reset_classifier(n_classes)
    return net.to(device, memory_format=torch.channels_last)


def check_network(name: str, net: nn.Module, size: int, batches: dict[str, int], contrast: bool) -> None:
    """UserError, which names the flags, unless the network can be trained so; see inputs.tried.

    size: pixels per side. batches: {flag: images of a pass}: alone, an image has no batch statistics where the network
    has shrunk it to one pixel. The network is of no use afterwards.
    """
    chosen = f"--backbone {name} --pre-size {size}"
    inputs.check_network(chosen, lambda: net, size, 2)
    for flag, n in batches.items():
        inputs.check_network(f"{chosen} {flag} {n}", lambda: net, size, min(n, 2))

    def contrasts() -> None:
        moco = MoCo(net, F.cross_entropy, 0, "meta", 2)
        moco.embed(moco.query, torch.empty(2, 3, size, size))

    if contrast:
        inputs.tried(f"{chosen} --recipe moco", contrasts)


# ---------------------------------------------------------------------------------------
# Pictures


def augmentation(kind: str, size: int, flip: bool) -> Callable[[Image.Image], Any]:
    """PIL RGB -> uint8 [3, size, size]. kind: plain (crop, mirror), deit (timm's), moco (v2, aug+; a pair of views)."""
    smallest = 0.08 if flip else 0.7  # digits and signs change when mirrored or cut to a corner
    if kind == "deit":
        transform = timm.data.create_transform(
            size, is_training=True, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic",
            re_prob=0.0, hflip=0.5 * flip, scale=(smallest, 1.0), use_prefetcher=True,
        )  # fmt: skip
        for op in next(t for t in transform.transforms if isinstance(t, RandAugment)).ops:
            if op.name == "PosterizeIncreasing":  # asks for 0 bits, black, once in a while; Pillow 13 refuses
                op.aug_fn = lambda image, bits, **_: ImageOps.posterize(image, max(1, bits))
        return lambda image: torch.as_tensor(transform(image))
    steps: list[Callable] = [v2.RandomResizedCrop(size, scale=(0.2 if kind == "moco" and flip else smallest, 1.0))]
    steps += [v2.RandomHorizontalFlip()] if flip else []
    if kind == "moco":
        sigma = lambda: float(torch.empty(()).uniform_(0.1, 2.0))  # noqa: E731
        # Pillow's blur, as in the official code: a seventh of the time of torchvision's.
        blur = v2.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(sigma())))
        steps += [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)]
        steps += [v2.RandomApply([blur], 0.5)]
    one = v2.Compose([*steps, v2.PILToTensor()])
    return (lambda image: (one(image), one(image))) if kind == "moco" else one


def repeated(position: int, n: int, repeats: int) -> int:
    """DeiT's repeated augmentation: where position looks in the stream of shuffles of n entries. An epoch visits the
    first n / repeats of its shuffle, each `repeats` times in a row; it stays n long."""
    epoch, i = divmod(position, n)
    return epoch * n + i // repeats


class DecodedOnce:
    """Images of which the last two opened are kept: repeated augmentation asks for one several times in a row."""

    def __init__(self, source: Any):
        self.open = lru_cache(2)(source.open)

    def __getitem__(self, row: int) -> Image.Image:
        return self.open(row)


# ---------------------------------------------------------------------------------------
# What is minimised


class Objective(ABC):
    """modules: trained, or with BatchNorm that counts; state: what else training changes, {name: tensor}."""

    modules: Sequence[nn.Module] = ()
    state: dict[str, Tensor] = {}

    def begin(self, step: int) -> None:  # noqa: B027 - may be left out
        """Called before a step."""

    @abstractmethod
    def loss(self, views: list[Tensor], y: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Views of normalised pixels [B, 3, S, S], labels [B] -> mean loss, rows [B, D] for `end` or None."""

    def end(self, rows: Tensor | None) -> None:  # noqa: B027 - may be left out
        """Called after a step. rows: those of the whole step, of all processes."""


class MoCo(Objective):
    """MoCo v2: two views of an image agree, those of the queue do not. The key network follows with momentum 0.999.

    loss: (q [B, dim], k [B, dim], queue [K, dim]), unit rows, -> scalar. The queue moves once per step, by the keys of
    the whole step in one order, so it does not depend on the number of processes. Shuffled BatchNorm: keys are
    normalised in other company than their queries, or the statistics of a shared group would tell them apart.
    """

    def __init__(
        self, net: nn.Module, loss: Callable, seed: int, device: Any, size: int, dim: int = 128, momentum: float = 0.999
    ):
        seed_global(seed_of(seed, "moco"))
        width, self.contrast, self.seed, self.momentum = net.head_hidden_size, loss, seed, momentum
        head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim)).to(device)
        self.query, self.key = (net, head), [copy.deepcopy(m).requires_grad_(False) for m in (net, head)]
        net.get_classifier().requires_grad_(False)
        self.modules = [*self.query, *self.key]
        queue = torch.randn(size, dim, generator=generator(seed, "queue"))
        self.queue = F.normalize(queue, dim=1).to(device)
        follow = {f"{i}.{k}": p for i, m in enumerate(self.key) for k, p in m.named_parameters()}
        self.state = {"queue": self.queue} | follow

    @torch.no_grad()
    def begin(self, step: int) -> None:
        for old, new in zip(self.key, self.query, strict=True):
            for p, q in zip(old.parameters(), new.parameters(), strict=True):
                p.mul_(self.momentum).add_(q, alpha=1 - self.momentum)

    def embed(self, towers: Sequence[nn.Module], x: Tensor) -> Tensor:
        """Unit rows [B, dim]; BatchNorm sees the halves one by one, of three images or fewer all."""
        net, head = towers
        parts = x.chunk(2 if len(x) > 3 else 1)
        f = [net.forward_head(net.forward_features(part), pre_logits=True) for part in parts]
        return F.normalize(head(torch.cat(f)).float(), dim=1)

    def loss(self, views: list[Tensor], y: Tensor, step: int) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(y), generator=generator(self.seed, "shuffle", step)).to(y.device)
        with torch.no_grad():
            k = self.embed(self.key, views[1][order])[order.argsort()]
        return self.contrast(self.embed(self.query, views[0]), k, self.queue), k

    def end(self, rows: Tensor) -> None:
        self.queue.copy_(torch.cat([rows, self.queue])[: len(self.queue)])


# ---------------------------------------------------------------------------------------
# The training


@dataclass
class Recipe:
    """optimizer; rate: learning rate at an epoch, a float; view: PIL -> uint8, see `augmentation`; batch: images of a
    step, over all processes; repeats: see `repeated`."""

    optimizer: torch.optim.Optimizer
    rate: Callable[[float], float]
    view: Callable[[Image.Image], Any]
    batch: int
    epochs: int
    repeats: int = 1


def cosine(share: float, high: float, low: float = 0.0) -> float:
    """Half a cosine from high at share 0 to low at share 1."""
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * share))


def steps_per_epoch(n: int, batch: int) -> int:
    return max(1, math.ceil((n - 1) / batch))  # a last batch of one image is left out: BatchNorm


def train_network(
    run: Any, team: Dist, chart: str, file: Path, objective: Objective, images: Any, recipe: Recipe, seed: int,
    micro_batch: int, precision: str, workers: int,
) -> Loop:  # fmt: skip
    """Train the objective on these images, from the checkpoint `file` on if it is there. -> the loop, to be finished.

    team: the processes that share each step. micro_batch: images of a forward pass, which BatchNorm sees.
    """
    n, per_epoch = len(images), steps_per_epoch(len(images), recipe.batch)
    order, labels = Order(n, seed), torch.from_numpy(images.labels)
    buffers = [b for m in objective.modules for b in m.buffers()]
    params = [p for p in (p for g in recipe.optimizer.param_groups for p in g["params"]) if p.requires_grad]
    settings = dict(file=file, params=params, buffers=buffers, state=objective.state)
    loop = Loop(run, chart, recipe.epochs * per_epoch, recipe.optimizer, team, micro_batch, **settings)

    @lru_cache(16)
    def batch_at(step: int) -> list[tuple[int, int]]:
        """[(image, position in the endless stream)]; an epoch's last batch may be short"""
        epoch, i = divmod(step, per_epoch)
        begin, end = epoch * n + i * recipe.batch, (epoch + 1) * n
        return [(order[repeated(p, n, recipe.repeats)], p) for p in range(begin, min(begin + recipe.batch, end))]

    stream = Loader(DecodedOnce(images), recipe.view, team.device, workers, (seed, "data", "augment"))(
        part for step in loop.steps for part in loop.mine(batch_at(step))
    )
    for step in loop:
        for m in objective.modules:
            m.train()
        objective.begin(step)
        y, rows = labels[[row for row, _ in batch_at(step)]].to(team.device), {}
        for u in loop.units(len(y)):
            seed_global(seed_of(seed, "unit", step, loop.unit), team.device)  # for stochastic depth and erasing
            random.seed(seed_of(seed, "unit", step, loop.unit))
            views = next(stream)
            views = [
                normalised(x, IMAGENET_MEAN, IMAGENET_STD).contiguous(memory_format=torch.channels_last)
                for x in (views if isinstance(views, tuple) else (views,))
            ]
            with autocast(precision, team.device):
                loss, rows[loop.unit] = objective.loss(views, y[u], step)
            loop.backward(loss * len(y[u]) / len(y))
        everyone = torch.cat(gather_units(rows, loop.n_units, team)) if objective.state else None
        loop.log(loss=loop.update(lr=recipe.rate(step / per_epoch)))
        objective.end(everyone)
    return loop


@torch.no_grad()
def logits_of(
    net: nn.Module, images: Any, rows: Sequence, view: Callable, micro_batch: int, device: Any, workers: int
) -> Tensor:
    """[N, C] on the CPU, for these rows of the images. view: as in Loader."""
    net.eval()
    batches = Loader(images, view, device, workers)(chunks(rows, micro_batch))
    logits = (net(normalised(x, IMAGENET_MEAN, IMAGENET_STD)).float().cpu() for x in batches)
    return torch.cat([torch.zeros(0, net.num_classes), *logits])  # a process may have no rows
