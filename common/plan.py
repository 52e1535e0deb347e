"""--plan: what a run will do and cost. Needs no data set, weights or network, and writes nothing.

A script lists its work, one `Work` per line of the plan, with the costs of common.costs; `print_plan` prints the table,
and as the last line the summary that the launchers quote. Nothing here is measured: floating-point operations are
counted, hours follow from them by an assumed share of the accelerator's peak, memory is estimated.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import costs, datasets
from common.costs import FORWARD, FROZEN, TRAINED, Cost
from common.diffusion import DECODED_PIXELS
from common.images import IMAGE_SUFFIXES
from common.jobs import IDLE, busy
from common.launch import UserError
from common.report import print_table

# Peak of dense products in TFLOP/s, memory (the makers' figures); share of the peak that a run is assumed to reach.
ACCELERATORS = {
    "h100": (dict(bf16=989, tf32=494, fp32=67), 80e9, 0.25),
    "a100": (dict(bf16=312, tf32=156, fp32=19.5), 80e9, 0.35),
    "l4": (dict(bf16=121, tf32=60, fp32=30.3), 24e9, 0.35),
    "cpu": (dict(bf16=0.1, tf32=0.1, fp32=0.1), 16e9, 0.3),  # two cores
}
DECODE_PIXEL = {"png": 4e-8, "jpeg": 1e-8, "webp": 3e-8}  # seconds of a core (measured), see load_seconds
PROCESS_RAM, WORKER_RAM, PROCESS_GPU = 2.5e9, 0.25e9, 1.5e9  # libraries and buffers, before any model; assumed
SQUARE = {"digits", "eurosat", "cinic10", *datasets.IN_MEMORY, *datasets.MEDMNIST}  # data sets of square pictures
TEXT_TOKENS = 20  # of the longest class prompt; assumed, for the classes are not read


@dataclass
class Work:
    """A line of a plan. Amounts are those of all processes together, but for ram and gpu."""

    stage: str
    what: str
    tflop: float = 0
    passes: float = 0  # of one image, with or without backward
    images: int = 0  # that are written
    disk: float = 0  # bytes
    loads: float = 0  # pictures that the loader's workers read and augment
    load_size: int = 512  # their pixels per side
    load_format: str = "jpeg"
    augment: float = 1.7e-3  # seconds of a core for each, at 224 pixels; see load_seconds
    ram: float = 0  # bytes of a process, without the libraries
    gpu: float = 0
    precision: str = "bf16"  # or fp32; tf32: float32 in convolutions, where that is what torch computes in
    jobs: int | Sequence[float] = 1  # pieces that a process can do by itself, or the length of each, ...
    units: int = 1  # ... of so many micro-batches in a step, which several can share: common.jobs
    flag: str = ""  # a smaller value of it uses more processes and less memory

    def seconds(self, args: Any, world: int) -> tuple[float, float]:
        """Of the accelerators, and of the loader's workers beside them, until the last process is done."""
        peak, _, share = ACCELERATORS[args.plan]
        at_work, rate = world * busy(self.jobs, self.units, world), share * peak[self.precision]  # processes, mean
        loading = self.loads * load_seconds(self.load_format, self.load_size, self.augment) / max(1, args.workers)
        return self.tflop / rate / at_work, loading / at_work


def load_seconds(format: str, size: int, augment: float = 1.7e-3) -> float:
    """Of a core, to decode a picture of size x size pixels and augment it at 224 pixels or fewer (docs/performance.md).

    augment: the default lies between a crop with a mirror, 1.5e-4, and what also changes colours.
    """
    return 3e-4 + augment * min(size / 224, 1) ** 2 + DECODE_PIXEL[format] * size**2


@dataclass
class Generator:
    """A Stable Diffusion of this name for images of size x size pixels, its weights as load_pipeline loads them."""

    name: str
    size: int
    precision: str

    def work(
        self, stage: str, what: str, batch: int, *, encoded: float = 0, tuned: float = 0, evaluated: float = 0,
        decoded: float = 0, prompts: float = 0, train: int = FROZEN, text_tuned: bool = True, **more: Any,
    ) -> Work:  # fmt: skip
        """So many images through the VAE's encoder; U-Net in training (FROZEN: of a LoRA), and text encoder for each,
        in training too if text_tuned; U-Net without gradients; VAE's decoder; so many prompts. batch: images in a pass,
        with guidance two passes."""
        cost = partial(costs.sd_cost, self.name, size=self.size)
        unet, text, vae = cost("unet"), cost("text_encoder"), cost("decode")
        some = max(1, min(batch, DECODED_PIXELS // self.size**2))
        text_train = train if text_tuned else FORWARD
        parts = [
            (encoded, cost("encode"), batch), (evaluated, unet, 2 * batch), (decoded, vae, some), (prompts, text, 1),
            (tuned, cost("unet", train=train), batch), (tuned, cost("text_encoder", train=text_train), batch),
        ]  # fmt: skip
        weights = (2 if self.precision == "bf16" else 4) * (unet.numbers + text.numbers) + 4 * vae.numbers
        tf32 = encoded and not tuned + evaluated
        about = dict(stage=stage, what=what, precision="tf32" if tf32 else self.precision)
        return _work(weights, parts, passes=encoded + tuned + evaluated + decoded, **about | more)

    def evaluations(self, sampler: str, steps: int) -> int:
        """Of the U-Net for an image, without guidance. stored: the scheduler in its folder; PNDM needs one more."""
        pndm = sampler == "stored" and costs.sd_config(self.name)["scheduler"]["_class_name"].startswith("PNDM")
        return steps + (pndm or sampler == "pndm")

    def latent(self) -> tuple[int, int, int]:
        return costs.latent_shape(self.name, self.size)

    def needs(self) -> str:
        numbers = sum(costs.sd_cost(self.name, part, self.size).numbers for part in ("unet", "text_encoder", "decode"))
        return _needs(self.name, numbers)


@dataclass
class Classifier:
    """A CLIP (its name for load_clip), tuned by LoRA, or in full if its image tower is a ResNet; or a timm network,
    trained in full. size: pixels per side, None: what the CLIP sees."""

    name: str
    precision: str
    classes: int = 0
    size: int | None = None
    tokens: int = TEXT_TOKENS

    def work(
        self, stage: str, what: str, batch: int, *, trained: float = 0, scored: float = 0, texts_trained: float = 0,
        texts: float = 0, train: int | None = None, **more: Any,
    ) -> Work:  # fmt: skip
        """So many images, and texts, in training and without gradients. train: FROZEN or TRAINED, None: as above."""
        full = bool(self.size) or costs.clip_is_resnet(self.name)
        image = partial(costs.clip_cost, self.name, "image")
        if self.size:
            image = partial(costs.timm_cost, self.name, self.size, self.classes)
        text = partial(costs.clip_cost, self.name, "text", self.tokens)
        parts = [(trained, image(train=train or (TRAINED if full else FROZEN)), batch), (scored, image(), batch)]
        parts += [(texts_trained, text(train=FROZEN), 1), (texts, text(), 1)] if not self.size else []
        weights = (16 if full else 4) * image().numbers  # in full: with gradients and AdamW's two moments
        more |= dict(stage=stage, what=what, precision=self.precision, passes=trained + scored)
        return _work(weights, parts, **more)

    def pixels(self) -> int:
        return self.size or costs.clip_size(self.name)

    def needs(self) -> str:
        return "" if self.size else _needs(self.name, costs.clip_cost(self.name, "image").numbers)


def _work(weights: float, parts: Sequence[tuple[float, Cost, int]], ram: float = 0, **more: Any) -> Work:
    """parts: (how many, cost of one, how many at a time). Activations are those of the hungriest, halved by bf16."""
    parts = [part for part in parts if part[0]]
    held = max((batch * cost.held for _, cost, batch in parts), default=0) * (0.5 if more["precision"] == "bf16" else 1)
    tflop = sum(n * cost.tflop for n, cost, _ in parts)
    return Work(tflop=tflop, gpu=weights + held, ram=weights + ram, **more)


# ---------------------------------------------------------------------------------------
# What must be there


def _needs(name: str, numbers: int) -> str:
    return (
        ""
        if costs.local(name)
        else f"{name}, about {_short(4 * numbers / 1e9)} GB, downloaded unless it is in the cache"
    )


def dataset_needs(args: Any) -> str:
    if args.dataset in ("digits", "folder"):
        return ""
    imagenet = args.dataset in datasets.IMAGENET_SUBSETS and args.dataset != "imagenette"  # fast.ai has that one
    dead = "address is dead" in datasets.BY_HAND.get(args.dataset, "") or imagenet
    how = "put there by hand" if dead else "downloaded unless it is there"
    if args.dataset == "imagenette":
        how = "cut from ImageNet if that is there, else fast.ai's, 9,469 images, downloaded"
    return f"{args.dataset} in {args.data_dir or 'data'}, {how}"


def sizes(dataset: str, data_dir: str | None) -> tuple[int, int, int, int]:
    """Classes, training, validation and test images: from a table, or of `folder` by counting the files."""
    if dataset in datasets.SIZES:
        return datasets.SIZES[dataset]
    if dataset != "folder":
        raise UserError(f"--dataset {dataset}: unknown; choose one of: {', '.join(datasets.DATASETS)}")
    root = Path(data_dir or "").expanduser()
    if not data_dir or not (root / "test").is_dir():
        raise UserError(f"--data-dir {data_dir}: give DIR with DIR/train/<class>/ and DIR/test/<class>/")
    per_split = [_files(root / split) for split in ("train", "val", "valid", "test")]
    train, val, valid, test = map(sum, per_split)
    return max(map(len, per_split)), train, val + valid, test


def _files(folder: Path) -> list[int]:
    """Images of each class in DIR/<class>/"""
    classes = [d for d in os.scandir(folder) if d.is_dir() and d.name[0] != "."] if folder.is_dir() else []
    return [sum(os.path.splitext(f.name)[1].lower() in IMAGE_SUFFIXES for f in os.scandir(d)) for d in classes]


# ---------------------------------------------------------------------------------------
# The table


def processes(args: Any) -> int:
    """That a plan counts with: --plan-processes, else WORLD_SIZE, else NPROC, else 1."""
    said = args.plan_processes or os.environ.get("WORLD_SIZE") or os.environ.get("NPROC") or "1"
    if not (str(said).isdecimal() and int(said) > 0):
        raise UserError(f"--plan: WORLD_SIZE or NPROC is {said}, which is no number of processes")
    return int(said)


def summary(works: Sequence[Work], args: Any, world: int) -> str:
    """The plan in one line, the same on every machine."""
    seconds = [w.seconds(args, world) for w in works]
    hours, loading = sum(map(max, seconds)) / 3600, sum(load for chip, load in seconds if load > chip) / 3600
    waits = f", loading {_short(loading)} h" if loading > hours / 20 else ""
    disk, gpu = sum(w.disk for w in works if w.images), max((w.gpu for w in works), default=0) + PROCESS_GPU
    unit, where = ("hours", "of RAM per process") if args.plan == "cpu" else ("GPU-hours", "per GPU")
    gpu = max((w.ram + w.gpu for w in works), default=0) + PROCESS_RAM if args.plan == "cpu" else gpu
    return (
        f"plan: {_short(hours * world)} {unit} on {world} x {args.plan} ({_short(hours)} h{waits}), "
        f"{sum(w.images for w in works):,} images, {_short(sum(w.tflop for w in works) / 1000)} PFLOP, "
        f"{_short(disk / 1e9)} GB of images, {_short(gpu / 1e9)} GB {where}"
    )


def _short(x: float) -> str:
    """Three digits at most; an estimate knows no more."""
    x = float(f"{x:.3g}" if x >= 9.995 else f"{x:.2g}")
    return f"{x:,.0f}" if x >= 100 else f"{x:g}"


def print_plan(works: Sequence[Work], needs: Sequence[str], args: Any, world: int = 0) -> None:
    """The plan on standard output, of rank 0. needs: what must be there or is downloaded. world: 0: as processes()"""
    if os.environ.get("RANK", "0") != "0":
        return
    world = world or processes(args)
    peak, memory, share = ACCELERATORS[args.plan]
    rows, notes, seconds = [], [], [w.seconds(args, world) for w in works]
    for w, each in zip(works, seconds, strict=True):
        chip, load = (s / 3600 for s in each)
        ram = PROCESS_RAM + w.ram + WORKER_RAM * args.workers * (w.loads > 0)
        small = (w.disk / 1e9, (w.gpu + PROCESS_GPU) / 1e9, ram / 1e9, max(chip, load))
        counted = (f"{x:,.0f}" for x in (w.images, w.passes, w.tflop))
        rows.append([w.stage, w.what, *counted, *map(_short, small), "loading" if load > chip else ""])
        fewer = f"a smaller {w.flag} would" if w.flag else ""
        long = max(each) >= sum(map(max, seconds)) / 100
        if (at_work := busy(w.jobs, w.units, world)) < 1 - IDLE and long:
            use = f"; {fewer} use them all" if fewer else ""
            notes.append(f"note: {w.stage}: {world} processes have work for {at_work:.0%} of the time{use}")
        if w.gpu + PROCESS_GPU > memory:
            use = f"; {fewer} need less" if fewer else ""
            notes.append(f"note: {w.stage} needs more than the {memory / 1e9:.0f} GB of {args.plan}{use}")
    header = "stage,work,images,passes,TFLOP,disk GB,GPU GB,RAM GB,hours,bound by"
    print_table(header.split(","), rows)
    print("Counted on the real networks: passes of an image, TFLOP (backward twice forward; once over frozen weights).")
    peaks = ", ".join(f"{rate:g} {kind}" for kind, rate in peak.items())
    jpeg, png = (1000 * load_seconds(format, 512) for format in ("jpeg", "png"))
    print(f"Assumed: {share:.0%} of {peaks} TFLOP/s; for loading {max(1, args.workers)} cores a process and")
    print(f"{jpeg:.1f} ms for a JPEG of 512 pixels, {png:.0f} for a PNG. GB of GPU and RAM: of a process, estimated.")
    for line in [f"needs: {need}" for need in needs if need] + list(dict.fromkeys(notes)):
        print(line)
    print(summary(works, args, world), flush=True)
