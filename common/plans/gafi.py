"""The work of gafi.py, stage by stage. Reads no data set and no weights."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from common import costs
from common.costs import FORWARD, FROZEN, TRAINED, Cost
from common.plan import SQUARE, Work, dataset_needs, sizes

KEPT = 0.5  # of the samples that F is shown; assumed, it depends on the GAN, on sigma and on t
COUNTED = 16  # images of a counted pass, over which the work on the weights themselves (spectral norm) is shared out


def cost(net: torch.nn.Module, size: int, train: int) -> Cost:
    """Of an image through a generator, discriminator or classifier on the device meta."""
    x = torch.empty(COUNTED, net.in_channels, size, size, device="meta", requires_grad=train != FORWARD)
    y, z = torch.zeros(COUNTED, dtype=torch.long, device="meta"), torch.empty(COUNTED, net.latent, device="meta")
    inputs = dict(g=(z, y), d=(x, y), f=(x,))[net.kind]
    found = costs.count(net, lambda: net(*inputs), train)
    return Cost(found.tflop / COUNTED, found.held / COUNTED, found.numbers)


def gan_work(args: Any, nets: tuple[Cost, ...], seen: int, checkpoints: int, precision: str) -> Work:
    """nets: generator, its forward pass alone, discriminator; seen: images in an epoch; checkpoints: number kept"""
    (g, g_alone, d), many = nets, len(args.gan_seeds)
    steps, micro = args.gan_epochs * (seen // args.gan_batch), args.gan_micro_batch or args.gan_batch
    # An update of D: a fake image without gradients, D on it and on a real one; of G: through a D that stays.
    one = args.gan_d_steps * (g_alone.tflop + 2 * d.tflop) + g.tflop + d.tflop * FROZEN / TRAINED
    images, pixels = many * steps * args.gan_batch, channels_of(args) * args.image_size**2
    return Work(
        "gan", f"{many} x {steps:,} steps", images * one, images * (3 * args.gan_d_steps + 2), jobs=many,
        disk=4 * many * checkpoints * g.numbers, units=math.ceil(args.gan_batch / micro),
        gpu=20 * (g.numbers + d.numbers) + micro * (g.held + 2 * d.held) + seen * pixels,
        precision=precision, flag="--gan-micro-batch",
    )  # fmt: skip


def channels_of(args: Any) -> int:
    return 1 if args.dataset in ("digits", "fashionmnist") else 3


def drawn_sets(args: Any, row: str) -> int:
    """How many synthetic sets one classifier of a row is trained on."""
    never = args.resnet_epochs
    period = dict(baseline=never, filter=never, single=args.final_period, multi=args.final_period)
    return math.ceil(args.resnet_epochs / period.get(row, args.search_period))


def plan(args: Any, networks: Any, grids: Sequence[int]) -> tuple[list[Work], list[str]]:
    """-> the work of the planned stages, what must be there. networks: makes generator, discriminator and classifier
    for a number of classes and of channels; grids: how many checkpoints, sigmas and thresholds are tried."""
    n_classes, n_train, n_val, n_test = sizes(args.dataset, args.data_dir)
    both = n_train + n_val
    if args.dataset == "cinic10" or not n_val:
        n_val = args.val_per_class * n_classes
    n_train, channels = both - n_val, channels_of(args)
    with torch.device("meta"):
        nets = networks(args, SimpleNamespace(n_classes=n_classes, channels=channels))
    for kind, net in zip("gdf", nets, strict=True):
        net.kind, net.in_channels, net.latent = kind, channels, args.gan_latent
    g, d, f = (cost(net, args.image_size, TRAINED) for net in nets)
    g_alone, f_alone = (cost(net, args.image_size, FORWARD) for net in (nets[0], nets[2]))

    fp32 = "fp32" if args.plan == "cpu" else "tf32"  # what PyTorch's convolutions compute in on these GPUs
    precision, half = (fp32, 1.0) if args.precision == "fp32" else ("bf16", 0.5)
    pixels, epochs = channels * args.image_size**2, args.resnet_epochs
    weights = 12 * f.numbers + half * args.resnet_batch * f.held
    sampling = half * args.gen_micro_batch * (g_alone.held + f_alone.held)
    n_set = n_classes * (args.class_samples or n_train // n_classes)
    works = []

    def classifiers(stage: str, runs: int, sets: float, n: int, epochs: int, tests: bool, what: str = "") -> None:
        """So many runs of so many epochs on n images, of which `sets` sets are drawn in each run."""
        drawn, scored = runs * sets * n / KEPT, runs * epochs * (n_val + n_test * tests)
        tflop = runs * epochs * n * f.tflop + scored * f_alone.tflop
        tflop += drawn * (g_alone.tflop + f_alone.tflop)
        gpu = weights + sampling * (sets > 0) + 12 * n * pixels  # a set, mirrored and cut in blocks
        name, passes = f"{what}{runs} classifiers", runs * epochs * n + scored + drawn
        works.append(Work(stage, name, tflop, passes, gpu=gpu, precision=precision, jobs=runs))

    if "real" in args.stages:
        classifiers("real", args.clf_seeds if "real" in args.rows else 1, 0, n_train, args.real_epochs, True)
        if args.dataset not in SQUARE or args.dataset == "cinic10":  # the others are read as one file
            works[-1].loads, works[-1].load_size = both + n_test, 2 * args.image_size
    if "gan" in args.stages:
        seen = both if args.gan_images == "train+val" else n_train
        works.append(gan_work(args, (g, g_alone, d), seen, grids[0], fp32 if args.gan_precision == "fp32" else "bf16"))
    if "search" in args.stages:
        # What a later step tries again is not trained again.
        for name, values in dict(checkpoint=grids[0], sigma=grids[1] - 1, threshold=grids[2] - 1).items():
            runs, sets = values * len(args.gan_seeds), drawn_sets(args, "recycle")
            classifiers("search", runs, sets, n_set, epochs, args.select_on == "test", f"{name}: ")
    if "final" in args.stages:
        rows = [row for row in args.rows if row != "real"]
        runs = len(rows) * args.clf_seeds - ("expansion" in rows)  # the winner of the search is its first
        sets = sum(drawn_sets(args, row) for row in rows) / len(rows)
        classifiers("final", runs, sets, n_set, epochs, True)
    if "evaluate" in args.stages:
        drawn, images = 2 * n_set / KEPT, n_classes * args.export_images
        tflop = n_test * f_alone.tflop + drawn * (g_alone.tflop + f_alone.tflop)
        more = dict(images=images, disk=2 * images * pixels, gpu=weights + sampling, precision=precision, jobs=n_test)
        works.append(Work("evaluate", "test split, images/", tflop, n_test + drawn, **more))
    return [work for work in works if work.jobs], [dataset_needs(args)]
