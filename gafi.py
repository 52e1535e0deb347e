"""GaFi, Gap Filler: training sets from GANs, post-processed (A. Lampis et al., BMVC 2023, arXiv:2305.10118).

A classifier trained on a GAN's images alone is worse than one trained on the real images. GaFi closes most of the gap
without touching the GAN: it changes how the trained generator is sampled and how the samples reach the classifier.

    [1] real --> classifier F --+
                                v
    [2] gan ---> G_150..G_500 --> [3] search -----------> [4] final ------------------> [5] evaluate
    BigGAN-deep, EMA, N seeds     checkpoint, sigma, t     filter + recycle + expansion   top-1 on the real
                                  on validation images     MultiGAN: N generators mixed   test set

    filter     keep a sample only if F predicts its class, with a probability above t
    recycle    throw the synthetic set away every P epochs and draw a new one
    expansion  latents from N(0, sigma^2), sigma > 1: more varied samples, and the filter removes the broken ones

Run:
    python gafi.py  # real digits, two small GANs, 2 CPU cores: minutes
    torchrun --standalone --nproc-per-node 3 gafi.py --preset cifar10  # one GAN per GPU, search runs spread
    python gafi.py --preset cifar10 --plan h100  # what that run will do and cost; nothing is done

Expect:
    CIFAR-10 at 16 x 16, two narrow GANs, 2 CPU cores: GAN images as they come 44.8, GaFi 53.3, MultiGAN 55.6, real 71.3
    CIFAR-10: real accuracy minus accuracy of the full method 1.78 points (paper's abstract; chosen on test images, so
    with --select-on test; all in fp32); not run by us

Differs:
    1. checkpoint, sigma, threshold and epoch are chosen on validation images; the official code chooses all of them on
       the test set (--select-on test); the epoch that is best on test is printed beside, and chooses nothing
    2. fresh latents throughout; the official GAN training replays the same latents in every epoch
    3. layers are initialised independently; officially all layers of equal shape start with the same weights
    4. no gradient through the power iteration (the difference vanishes when u has converged)
    5. filtering gives up after 50 attempts per class, with a warning; officially it may never end
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from common.cli import Fraction, Frame, Natural, Range, check, parse, start

Stage = Literal["real", "gan", "search", "final", "evaluate"]
Few, Width, Many = (Annotated[int, Range(1, most)] for most in (100, 10_000, 10**6))
Rate, Sigma = (Annotated[float, Range(0, most, "(]")] for most in (10, 100))
Row = Literal["real", "baseline", "filter", "recycle", "expansion", "single", "multi"]


@dataclass
class Args(Frame):
    dataset: str = "cifar10"
    """real data set; `folder`: your own images in data_dir"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of classifiers and sampling; bf16: mixed, trained weights and what is sensitive stay in float32"""
    stages: tuple[Stage, ...] = ("real", "gan", "search", "final", "evaluate")
    """stages to run, in order; a finished stage is never run again"""
    val_per_class: Many = 1000
    """training images of each class held out for every choice, where the data set has no validation split"""
    image_size: Annotated[int, Range(8, 1024)] = 32
    """pixels per side, a multiple of 8"""

    # ---- [1] real: the filtering classifier F, and every other classifier ---------------------------
    resnet_width: Width = 64
    """channels of the first stage of the ResNet (x2 and x4 in the others)"""
    resnet_blocks: Few = 3
    """blocks per stage; 3: ResNet-20"""
    resnet_epochs: Many = 100
    """epochs on synthetic images"""
    real_epochs: Many = 300
    """epochs on real images"""
    resnet_drops: tuple[Many, ...] = (60, 80)
    """epochs, counted from 1, at whose start the learning rate falls to a tenth; the same on real images"""
    resnet_lr: Rate = 0.1
    """learning rate of SGD with Nesterov momentum"""
    resnet_momentum: Fraction = 0.9
    """Nesterov momentum; 0: none"""
    resnet_wd: Fraction = 1e-4
    """decoupled weight decay per step, on every parameter; not multiplied by the rate"""
    resnet_batch: Many = 128
    """images per step"""
    random_flip: bool = True
    """mirror half of the training images, for the classifiers and the GAN"""
    random_crop: bool = True
    """pad by 4 pixels (of 32) of mid-grey (0) and crop at random"""
    random_erasing: bool = True
    """cutout with noise on every training image"""

    # ---- [2] gan: BigGAN-deep ------------------------------------------------------------------------
    gan_seeds: tuple[Natural, ...] = (42, 137, 238723)
    """one generator per seed, which is all that --seed does not reach; MultiGAN mixes them"""
    gan_images: Literal["train+val", "train"] = "train+val"
    """what the GAN is trained on; train: the validation images stay unseen"""
    gan_precision: Literal["fp32", "bf16"] = "fp32"
    """of the GAN's training, fp32 in every official run; bf16: mixed, as in precision"""
    gan_epochs: Many = 500
    """passes over those images"""
    gan_batch: Many = 192
    """real images per step; all discriminator updates of a step see the same"""
    gan_micro_batch: Natural = 0
    """images that share G's BatchNorm statistics; 0: the whole batch, as officially, and a GAN is one process's work.
    A part of the batch lets several processes share a GAN"""
    gan_d_steps: Few = 3
    """discriminator updates per generator update"""
    gan_width: Annotated[int, Range(2, 10_000)] = 128
    """base width; blocks have four times as many channels"""
    gan_latent: Width = 128
    """size of the latent z and of the class embedding"""
    gan_embedding: Literal["uniform", "normal"] = "uniform"
    """start of the generator's class embedding: U(-0.05, 0.05) or N(0, 1), which small GANs learn faster from"""
    gan_loss: Literal["hinge", "nonsaturating"] = "hinge"
    """loss of discriminator and generator"""
    gan_lr: Rate = 2e-4
    """Adam's learning rate for both networks"""
    gan_d_lr: Rate | None = None
    """the discriminator's own; None: gan_lr"""
    gan_betas: tuple[Fraction, Fraction] = (0.5, 0.999)
    """Adam's decay rates, for both networks"""
    gan_ema: Fraction = 0.9999
    """decay of the averaged generator, which is what is sampled"""
    gan_ema_start: Annotated[int, Range(0, 10**9)] = 1000
    """the average is a plain copy up to this step"""
    gan_monitor: Many = 10
    """epochs between measurements of the averaged generator (feature distances, acceptance)"""
    gan_inception: bool = False
    """also FID and IS on Inception features with torchmetrics, which downloads their weights (91 MB)"""

    # ---- [3] search, [4] final -----------------------------------------------------------------------
    gen_seed: Natural = 0
    """sample i of class c in set k has the latents of (gen_seed, classifier's seed, GAN's seed, n_c, k, c, i)"""
    gen_micro_batch: Annotated[int, Range(1, 10**6)] = 1024
    """images per forward pass on one process; speed and memory only"""
    class_samples: Annotated[int, Range(0, 10**6)] = 0
    """n_c, images per class of a synthetic set; 0: size of the real training split / number of classes"""
    attempts: Annotated[int, Range(-1, 10**6)] = 50
    """draws per class after which the last draw is taken unfiltered; -1: never"""
    ckpt_grid: tuple[Many, Many, Many] = (150, 500, 10)
    """checkpoints to try, in epochs: first, last, step; those after gan_epochs are left out"""
    sigma_grid: tuple[Sigma, Sigma, Sigma] = (1.0, 2.0, 0.05)
    """standard deviations of the latents to try"""
    threshold_grid: tuple[Fraction, Fraction, Fraction] = (0.0, 0.9, 0.1)
    """thresholds to try"""
    search_period: Many = 10
    """P, epochs between two synthetic sets, in the search and in the rows recycle and expansion"""
    final_period: Many = 1
    """P in the rows single and multi"""
    recycle_fraction: Annotated[float, Range(0, 1, "(]")] = 1.0
    """r, share of the set that is replaced"""
    select_on: Literal["val", "test"] = "val"
    """images that choose checkpoint, sigma, threshold and epoch; test: the official selection. F's epoch: always val"""
    rows: tuple[Row, ...] = ("real", "baseline", "filter", "recycle", "expansion", "single", "multi")
    """rows of the table; each adds one technique to the row before"""
    clf_seeds: Annotated[int, Range(1, 100)] = 3
    """classifiers per row, seeds seed, seed + 1, ..."""
    export_images: Many = 100
    """images per class of the saved classifier's first set that are written to images/ as PNG"""


# Comment: gap between real accuracy and the full method in points, from the paper's abstract where it gives one.
PRESETS = {
    "digits": dict(  # the offline miniature; our measured table stands in docs/gafi.md
        dataset="digits", workers=0, image_size=16, val_per_class=20, random_flip=False,
        resnet_width=8, resnet_blocks=1, resnet_epochs=10, real_epochs=15, resnet_drops=(7, 9), resnet_batch=32,
        gan_seeds=(42, 137), gan_epochs=25, gan_batch=32, gan_width=8, gan_latent=16, gan_embedding="normal",
        gan_lr=1e-3, gan_ema=0.98, gan_ema_start=50, gan_monitor=5,
        ckpt_grid=(15, 25, 5), sigma_grid=(1.0, 1.5, 0.25), threshold_grid=(0.0, 0.8, 0.4), search_period=5,
        attempts=3, gen_micro_batch=200, export_images=20,
    ),
    "cifar10-16px": dict(  # ours: photos on two CPU cores in hours, --data-dir DIR: 44.8 to 55.6, real 71.3
        dataset="folder", image_size=16, val_per_class=200,
        resnet_width=16, resnet_blocks=1, resnet_epochs=15, real_epochs=15, resnet_drops=(10, 13),
        gan_seeds=(42, 137), gan_epochs=8, gan_batch=64, gan_width=16, gan_latent=32, gan_embedding="normal",
        gan_lr=5e-4, gan_ema=0.999, gan_ema_start=500, gan_monitor=2,
        ckpt_grid=(6, 8, 2), sigma_grid=(1.0, 1.5, 0.25), threshold_grid=(0.0, 0.8, 0.4), search_period=5,
        class_samples=2000, attempts=5,
    ),
    "cifar10": dict(data_dir="data"),  # 1.78
    "cifar100": dict(dataset="cifar100", data_dir="data", val_per_class=100, attempts=10),  # 3.99
    "cinic10": dict(  # not given
        dataset="cinic10", data_dir="data/CINIC-10", gan_seeds=(42, 4623, 13132), precision="bf16",
    ),
    "fashionmnist": dict(  # 2.03
        dataset="fashionmnist", data_dir="data", gan_epochs=300, ckpt_grid=(50, 500, 10),
        gan_seeds=(18291829, 237137, 42, 1284182, 623237, 48746),
    ),
    "dermamnist": dict(  # not given. Trap: with 6,150 steps an EMA of 0.9999 would be mostly the weights of step 1000
        dataset="dermamnist", data_dir="data", gan_epochs=150, gan_ema=0.999, ckpt_grid=(10, 150, 10),
        threshold_grid=(0.0, 0.5, 0.1), gan_seeds=(42, 1412, 19281),
    ),
}  # fmt: skip

if __name__ == "__main__":
    ARGS = parse(Args, PRESETS, __doc__)  # before the imports that take seconds: --help and a wrong flag answer at once

import itertools
import math
from contextlib import nullcontext
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import nn

from common import datasets, distributed, images, inputs
from common import run as runs
from common.compiling import compiled
from common.diffusion import autocast
from common.distances import (
    frechet_distance,
    inception_figures,
    inception_metrics,
    inception_score,
    kernel_distance,
)  # fmt: skip
from common.files import class_folders, load_tensors, read_json, save_tensors, write_json
from common.inputs import check_order, each_once, refuse
from common.launch import UserError
from common.loop import Loop
from common.near_copies import near_copies
from common.pixels import Pixels, as_images, in_unit_range, load_split
from common.plan import print_plan
from common.plans import gafi as planned
from common.report import compare_saved, conclude, means, over_seeds, per_class, spread

# ---------------------------------------------------------------------------------------------
# The data: every split as one tensor of bytes on the device.


def load_splits(args, dist):
    """{split: its images}, all of which can be read."""
    data = datasets.load_dataset(args.dataset, args.data_dir)
    if data.note:
        distributed.say(dist, data.note)
    train, val = data.train, data.val
    if args.dataset == "cinic10":  # train and valid are pooled and divided anew: 170k, 10k
        train, val = train + val, None
    if val is None:
        train, val = datasets.hold_out(train, args.val_per_class, args.seed)
    splits = dict(train=train, val=val, test=data.test)
    distributed.on_rank_0(partial(inputs.readable, splits, dist), dist)
    return splits


def load_data(args, dist, splits=None):
    """The splits as pixels. FashionMNIST is padded from 28 to 32 pixels, so that its border becomes -1."""
    splits = splits or load_splits(args, dist)
    channels = 1 if args.dataset in ("digits", "fashionmnist") else 3
    how = channels, args.image_size, args.dataset == "fashionmnist", dist.device, args.workers
    names = splits["train"].class_names
    return Pixels(**{name: load_split(split, *how) for name, split in splits.items()}, class_names=names)


def device_generator(device, *parts):
    """Generator on the device, seeded by what it is for: random numbers are drawn where they are used."""
    return torch.Generator(device).manual_seed(distributed.seed_of(*parts))


def unmixed(device):
    """float32 inside of it (--plan counts on the device meta, which knows no mixed precision)"""
    return torch.autocast(device.type, enabled=False) if device.type != "meta" else nullcontext()


# ---------------------------------------------------------------------------------------------
# The classifier: a CIFAR ResNet, its optimiser and its augmentation (Stages 1 and 4). F and every classifier of the
# search and of the table are trained by train_classifier; the accuracy of one that saw synthetic sets is the CAS.


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; shortcut option A: every second pixel, new channels are zero, half on either side."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.stride, self.extra = (2 if n_in != n_out else 1), (n_out - n_in) // 2
        self.conv1 = nn.Conv2d(n_in, n_out, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(n_out), nn.BatchNorm2d(n_out)

    def forward(self, x):
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride == 2:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(h + x)


class ResNet(nn.Module):
    """CIFAR ResNet-20 with four times the classic width: [B, channels, 32, 32] -> logits [B, C]"""

    def __init__(self, n_classes, channels=3, width=64, blocks=3):
        super().__init__()
        self.conv0, self.bn0 = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        sizes = [width, width, 2 * width, 4 * width]
        for s in (1, 2, 3):
            stage = [BasicBlock(sizes[s - 1] if i == 0 else sizes[s], sizes[s]) for i in range(blocks)]
            setattr(self, f"layer{s}", nn.Sequential(*stage))
        self.fc = nn.Linear(sizes[3], n_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.fc.bias)

    def features(self, x):
        x = F.relu(self.bn0(self.conv0(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))

    def forward(self, x):
        return self.fc(self.features(x)).float()


def make_classifier(args, data, seed):
    distributed.seed_global(distributed.seed_of(seed, "classifier"))
    return ResNet(data.n_classes, data.channels, args.resnet_width, args.resnet_blocks)


def lr_at(epoch, base, drops):
    """Official code: rate of an epoch counted from 1; a tenth from each drop on: 0.1, 0.01 from 60, 0.001 from 80."""
    return base * 0.1 ** sum(epoch >= drop for drop in drops)


class SGDW(torch.optim.Optimizer):
    """Official code (TensorFlow-addons): p *= 1 - wd; b = mu b - lr g; p += mu b - lr g.

    Trap: wd is not multiplied by the rate, so at lr 0.001 it is 100 times stronger relative to the gradient than at
    0.1. The rate stands inside the buffer, so after a drop the old velocity lives on for some twenty steps.
    """

    def __init__(self, params, lr, wd, momentum=0.9):
        super().__init__(params, dict(lr=lr, wd=wd, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            for p in params:
                self.state[p].setdefault("velocity", torch.zeros_like(p))
            velocity, grads = [self.state[p]["velocity"] for p in params], [p.grad for p in params]
            torch._foreach_mul_(params, 1 - group["wd"])
            torch._foreach_mul_(velocity, momentum)
            torch._foreach_add_(velocity, grads, alpha=-lr)
            torch._foreach_add_(params, velocity, alpha=momentum)
            torch._foreach_add_(params, grads, alpha=-lr)


def crop(x, top, left, pad=4):
    """Pad with 0 (mid-grey: the data lie in [-1, 1]; official code) and cut at (top, left). [B, C, H, W], [B], [B]"""
    b, _, h, w = x.shape
    x = F.pad(x, (pad,) * 4)
    rows = top[:, None] + torch.arange(h, device=x.device)  # [B, H]
    columns = left[:, None] + torch.arange(w, device=x.device)  # [B, W]
    image = torch.arange(b, device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def cutout(x, noise, cx, cy, h, w):
    """A box of h x w around (cx, cy), clipped by the image, is replaced by noise. [B, C, H, W] twice, [B] four times.

    Official code (keras-cv): the noise is rescaled from its own range to the image's, both taken over whole images.
    """
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    noise_low, noise_high = noise.amin((1, 2, 3), keepdim=True), noise.amax((1, 2, 3), keepdim=True)
    noise = (noise - noise_low) / (noise_high - noise_low) * (high - low) + low
    i, j = (torch.arange(s, device=x.device)[None] for s in x.shape[2:])
    rows = (i >= (cy - h / 2)[:, None]) & (i < (cy + h / 2)[:, None])  # [B, H]
    columns = (j >= (cx - w / 2)[:, None]) & (j < (cx + w / 2)[:, None])  # [B, W]
    return torch.where((rows[:, :, None] & columns[:, None])[:, None], noise, x)


def cutout_boxes(b, size, g):
    """Centres uniform over all pixels, sides ceil(32 U(0.2, 0.5)), independently: 7..16 pixels. -> four [B]"""
    u = torch.rand(4, b, generator=g, device=g.device)
    cx, cy = (u[:2] * size).floor()
    h, w = (size * (0.2 + 0.3 * u[2:])).ceil()
    return cx, cy, h, w


def mirrored(x, coin):
    """[B, C, H, W], bool [B]"""
    return torch.where(coin[:, None, None, None], x.flip(3), x)


def augmented(x, args, g):
    """Flip, crop, cutout, in this order, each image with its own draws. [B, C, S, S] in [-1, 1]; g: on x's device."""
    b, device = len(x), x.device
    if args.random_flip:
        x = mirrored(x, torch.rand(b, generator=g, device=device) < 0.5)
    if args.random_crop:
        pad = args.image_size // 8  # 4 of 32
        top, left = torch.randint(2 * pad + 1, (2, b), generator=g, device=device)
        x = crop(x, top, left, pad)
    if args.random_erasing:
        noise = torch.randn(x.shape, generator=g, device=device)
        x = cutout(x, noise, *cutout_boxes(b, x.shape[-1], g))
    return x


AT_ONCE = 16  # batches that are augmented together, for which the GPU waits less on the host


def training_batches(args, x, y, seed, epoch):
    """The shuffled, augmented batches of an epoch: a function of (seed, epoch)."""
    g = device_generator(y.device, seed, "epoch", epoch)
    order = torch.randperm(len(y), generator=g, device=y.device)
    for rows in order.split(AT_ONCE * args.resnet_batch):
        parts = augmented(x[rows].float(), args, g).contiguous(memory_format=torch.channels_last), y[rows]
        yield from zip(*(part.split(args.resnet_batch) for part in parts), strict=True)


class RealSet:
    """The real training images, the same in every epoch."""

    def __init__(self, split):
        self.x, self.y = in_unit_range(split[0]), split[1]
        self.size, self.stats = len(self.y), {}

    def at(self, epoch):
        return self.x, self.y


def train_classifier(args, run, dist, data, sets, epochs, seed, folder, about, select_on):
    """Train a ResNet on sets.at(epoch), by this process alone; keep the epoch that select_on, val or test, likes best.

    Writes <folder>/weights.safetensors and metrics.json; does nothing if that is there. about: what to record. The test
    split is looked at in rows of the table only, or if it selects.
    """
    if (folder / "metrics.json").exists():
        return
    splits = dict(val=data.val) | (dict(test=data.test) if "row" in about or select_on == "test" else {})
    net = make_classifier(args, data, seed).to(dist.device, memory_format=torch.channels_last)
    fast = compiled(net, args.compile, "ResNet", dynamic=True)
    optimizer = SGDW(net.parameters(), args.resnet_lr, args.resnet_wd, args.resnet_momentum)
    weights, per_epoch = net.state_dict(), math.ceil(sets.size / args.resnet_batch)
    chart = str(folder.relative_to(run.dir))
    file, total, team = folder / "checkpoint.safetensors", epochs * per_epoch, dist.alone()
    loop = Loop(run, chart, total, optimizer, team, args.resnet_batch, file, state=weights, save_seconds=math.inf)
    history, best, stats = loop.extra or ([], dict(score=-1.0), {})
    sets.stats |= stats

    for step in loop:
        epoch, i = step // per_epoch + 1, step % per_epoch
        if i == 0:
            batches, lost = training_batches(args, *sets.at(epoch), seed, epoch), 0
            net.train()
        batch, labels = next(batches)
        for _ in loop.units(len(labels)):  # one unit: the whole batch
            with autocast(args.precision, dist.device):
                logits = fast(batch)
            loop.backward(F.cross_entropy(logits.float(), labels))
        lost += loop.update(lr=lr_at(epoch, args.resnet_lr, args.resnet_drops)) * len(labels)
        if i < per_epoch - 1:
            continue
        row = dict(epoch=epoch, loss=float(lost) / sets.size) | {k: accuracy(net, s, args) for k, s in splits.items()}
        if not math.isfinite(row["loss"]):
            raise UserError(f"{chart}, epoch {epoch}: the loss is {row['loss']}; stopped. Try a lower --resnet-lr")
        history.append(row)
        if row[select_on] > best["score"]:
            best = dict(score=row[select_on], epoch=epoch, val=row["val"])
            loop.tensors = {n: t.detach().cpu().clone() for n, t in weights.items()}
        if epoch % max(1, epochs // 10) == 0 and epoch < epochs:
            loop.extra = history, best, sets.stats
            loop.save()

    report = about | dict(seed=seed, history=history) | best
    if "test" in splits:
        net.load_state_dict(loop.tensors)
        report |= dict(test=accuracy(net, data.test, args), best_test_epoch=max(row["test"] for row in history))
    if sets.stats:
        drawn, accepted, exhausted = map(sum, zip(*sets.stats.values(), strict=True))
        report |= dict(drawn=drawn, accepted=accepted / drawn, exhausted=exhausted)
        if exhausted:
            print(f"note: {chart}: {exhausted} times a class reached {args.attempts} draws")
    save_tensors(folder / "weights.safetensors", loop.tensors)
    write_json(folder / "metrics.json", report)
    loop.finish()


@torch.no_grad()
def predictions(net, x, args):
    """uint8 [N, C, 32, 32] -> predicted classes [N]"""
    net.eval()
    with autocast(args.precision, x.device):
        return torch.cat([net(in_unit_range(part)).argmax(1) for part in x.split(1000)])


def accuracy(net, split, args):
    """Percent of a split (uint8 images, labels) that net gets right"""
    return 100 * (predictions(net, split[0], args) == split[1]).sum().item() / len(split[1])


# ---------------------------------------------------------------------------------------------
# [1] real: the reference, and F, which is its first seed (Stage 1).
# Reads the real training split, writes classifier/runs/real-seed<s>/.


def row_folder(run, row, seed):
    return run.path("classifier", "runs", f"{row}-seed{seed}")


def train_real(args, run, dist, data):
    seeds = [args.seed + i for i in range(args.clf_seeds if "real" in args.rows else 1)]
    with run.timed("real", "--resnet-batch"):
        for seed in distributed.my_items(seeds, dist):
            # Official code: F, and with it the real reference, is chosen on validation images in every case.
            how = args.real_epochs, seed, row_folder(run, "real", seed), dict(row="real", images=len(data.train[1]))
            train_classifier(args, run, dist, data, RealSet(data.train), *how, "val")
    run.done("real", run.under(*(row_folder(run, "real", seed) for seed in seeds)), classifiers=len(seeds))


def filtering_classifier(args, run, data):
    """F: frozen, in evaluation mode; it has seen the real training split only."""
    net = make_classifier(args, data, args.seed)
    net.load_state_dict(load_tensors(row_folder(run, "real", args.seed) / "weights.safetensors"))
    net = net.to(data.train[0].device, memory_format=torch.channels_last)
    return net.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------
# [2] gan: one BigGAN-deep per seed (Stage 2), StudioGAN's variant: spectral norm everywhere, BatchNorm conditioned on
# [z, e_y], a projection discriminator, three updates of D for one of G, and an average of G, which is what is sampled.
# Reads the real images, writes gan/seed<s>/epoch<e>.safetensors, the averaged generator at each epoch of the grid.


def unit(x):
    return x / (x.norm(dim=-1, keepdim=True) + 1e-12)


def power_iteration(w, u):
    """One iteration: v = n(W^T u), u' = n(W v), sigma = u'.(W v). W [k, out, rest], u [k, out] -> sigma [k], u'

    Gradients reach sigma through W alone; u' and v count as constants.
    """
    v = unit(torch.einsum("koi,ko->ki", w.detach(), u))
    wv = torch.einsum("koi,ki->ko", w, v)
    u = unit(wv.detach())
    return (u * wv).sum(1), u


class Spectral:
    """Mix-in of a layer with `weight`: it uses w_bar = W / sigma, which spectral_norm sets, with orthogonal W at the
    start."""

    def start(self):
        nn.init.orthogonal_(self.weight)
        if getattr(self, "bias", None) is not None:
            nn.init.zeros_(self.bias)
        self.register_buffer("u", F.normalize(torch.rand(len(self.weight)) * 2 - 1, dim=0))


def spectral_groups(net):
    """The layers of net with spectral norm, those of one shape together."""
    groups = {}
    for layer in net.modules():
        if isinstance(layer, Spectral):
            groups.setdefault(layer.weight.shape, []).append(layer)
    return list(groups.values())


def spectral_norm(groups):
    """w_bar = W / sigma of every layer for the next forward pass; layers of one shape in one batched product, or the
    power iterations would be most of a step's kernels.

    Official code: evaluation performs the iteration too, from the stored u, but does not store its result.
    """
    for layers in groups:
        # Columns in the order of channels_last, in which the weights lie on the device; sigma does not depend on it.
        conv = layers[0].weight.ndim == 4
        weights = [layer.weight.permute(0, 2, 3, 1) if conv else layer.weight for layer in layers]
        with unmixed(weights[0].device):
            w = torch.stack([weight.flatten(1) for weight in weights])
            sigma, u = power_iteration(w, torch.stack([layer.u for layer in layers]))
            w_bar = (w / sigma[:, None, None]).view(-1, *weights[0].shape)
        if layers[0].training:
            with torch.no_grad():
                torch._foreach_copy_([layer.u for layer in layers], list(u))
        for layer, own in zip(layers, w_bar.permute(0, 1, 4, 2, 3) if conv else w_bar, strict=True):
            layer.w_bar = own


@torch.no_grad()
def bake(net):
    """Fix W / sigma once: the same output as an evaluation, without the iteration. For sampling only."""
    spectral_norm(net.eval().requires_grad_(False).norms)
    net.baked = True
    return net


class SNConv(Spectral, nn.Conv2d):
    def __init__(self, n_in, n_out, kernel, bias=True):
        super().__init__(n_in, n_out, kernel, padding=kernel // 2, bias=bias)
        self.start()

    def forward(self, x):
        return F.conv2d(x, self.w_bar, self.bias, padding=self.padding)


class SNLinear(Spectral, nn.Linear):
    def __init__(self, n_in, n_out, bias=True):
        super().__init__(n_in, n_out, bias=bias)
        self.start()

    def forward(self, x):
        return F.linear(x, self.w_bar, self.bias)


class SNEmbedding(Spectral, nn.Embedding):
    def __init__(self, n, dim):
        super().__init__(n, dim)
        self.start()

    def forward(self, y):
        return F.embedding(y, self.w_bar)


class ConditionalBN(nn.Module):
    """BN(x) * (1 + W_g c) + W_b c. Trap: BigGAN-deep does not train without the 1. x [B, C, H, W], c [B, K]"""

    def __init__(self, channels, cond):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1, affine=False)
        self.gamma, self.beta = SNLinear(cond, channels, bias=False), SNLinear(cond, channels, bias=False)

    def forward(self, x, c):
        gain, shift = 1 + self.gamma(c), self.beta(c)
        return self.bn(x) * gain[:, :, None, None] + shift[:, :, None, None]


class Attention(nn.Module):
    """x + gain out(softmax(theta^T phi) g): phi and g max-pooled 2 x 2, no 1/sqrt(d), no biases. [B, C, H, W]"""

    def __init__(self, c):
        super().__init__()
        self.theta, self.phi = SNConv(c, c // 8, 1, bias=False), SNConv(c, c // 8, 1, bias=False)
        self.g, self.out = SNConv(c, c // 2, 1, bias=False), SNConv(c // 2, c, 1, bias=False)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        q, k, v = self.theta(x), F.max_pool2d(self.phi(x), 2), F.max_pool2d(self.g(x), 2)
        q, k, v = (t.flatten(2).transpose(1, 2)[:, None] for t in (q, k, v))  # [B, 1, positions, channels]
        o = F.scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0]
        return x + self.gain * self.out(o.transpose(1, 2).unflatten(2, x.shape[2:]))


class GBlock(nn.Module):
    """cBN-ReLU-1x1, cBN-ReLU-[up]-3x3, cBN-ReLU-3x3, cBN-ReLU-1x1; plus a 1x1 skip, which is always there."""

    def __init__(self, c, cond, up):
        super().__init__()
        h, self.up = c // 4, up
        self.cbn1, self.cbn2, self.cbn3, self.cbn4 = (ConditionalBN(n, cond) for n in (c, h, h, h))
        self.conv1, self.conv2, self.conv3 = SNConv(c, h, 1), SNConv(h, h, 3), SNConv(h, h, 3)
        self.conv4, self.skip = SNConv(h, c, 1), SNConv(c, c, 1)

    def upsampled(self, x):
        return F.interpolate(x, scale_factor=2) if self.up else x

    def forward(self, x, c):
        h = self.conv1(F.relu(self.cbn1(x, c)))
        h = self.conv2(self.upsampled(F.relu(self.cbn2(h, c))))
        h = self.conv3(F.relu(self.cbn3(h, c)))
        h = self.conv4(F.relu(self.cbn4(h, c)))
        return h + self.upsampled(self.skip(x))  # 1x1 and nearest upsampling commute: a quarter of the cost


class Generator(nn.Module):
    """z [B, latent], y [B] -> images [B, channels, 32, 32] in (-1, 1)

    size: 32 as in the paper, or another multiple of 8; the first feature map then has size / 8 pixels per side.
    """

    baked = False

    def __init__(self, n_classes, channels=3, width=128, latent=128, embedding=128, start="uniform", size=32):
        super().__init__()
        self.latent, self.channels, self.side, c = latent, 4 * width, size // 8, latent + embedding
        self.embed = nn.Embedding(n_classes, embedding)
        if start == "uniform":  # Keras' default
            nn.init.uniform_(self.embed.weight, -0.05, 0.05)
        self.first = SNLinear(c, self.channels * self.side**2)
        blocks = {f"b{s}{k}": GBlock(self.channels, c, up=k == 1) for s in range(3) for k in range(2)}
        self.blocks, self.attn = nn.ModuleDict(blocks), Attention(self.channels)
        self.last_bn, self.last = nn.BatchNorm2d(self.channels), SNConv(self.channels, channels, 3)
        self.norms = spectral_groups(self)

    def forward(self, z, y):
        if not self.baked:
            spectral_norm(self.norms)
        c = torch.cat([z, self.embed(y)], 1)  # the same condition for every layer; z is not split
        x = self.first(c).view(-1, self.channels, self.side, self.side)
        for name, block in self.blocks.items():
            x = block(x, c)
            if name == "b11":
                x = self.attn(x)  # at 16 x 16
        return torch.tanh(self.last(F.relu(self.last_bn(x))).float())


class DBlock(nn.Module):
    """ReLU-1x1, ReLU-3x3, ReLU-3x3, [average pool], ReLU-1x1; skip: identity, or 1x1 and pool when downsampling."""

    def __init__(self, n_in, n_out, down):
        super().__init__()
        h, self.down = n_out // 4, down
        self.conv1, self.conv2, self.conv3 = SNConv(n_in, h, 1), SNConv(h, h, 3), SNConv(h, h, 3)
        self.conv4 = SNConv(h, n_out, 1)
        self.skip = SNConv(n_in, n_out, 1) if down or n_in != n_out else None

    def forward(self, x):
        h = self.conv3(F.relu(self.conv2(F.relu(self.conv1(F.relu(x))))))  # the first ReLU is not in place: skip sees x
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)  # pooling and a 1x1 convolution commute
        return self.conv4(F.relu(h)) + (x if self.skip is None else self.skip(x))


class Discriminator(nn.Module):
    """Projection discriminator: D(x, y) = w.h(x) + b + <e_y, h(x)>, h summed over 8 x 8. -> logits [B]"""

    def __init__(self, n_classes, channels=3, width=128):
        super().__init__()
        c = 4 * width
        self.first, names = SNConv(channels, width, 3), [f"b{s}{k}" for s in range(3) for k in range(2)]
        blocks = {name: DBlock(c if i else width, c, down=i in (0, 2)) for i, name in enumerate(names)}
        self.blocks, self.attn = nn.ModuleDict(blocks), Attention(c)
        self.out, self.embed = SNLinear(c, 1), SNEmbedding(n_classes, c)
        self.norms = spectral_groups(self)

    def forward(self, x, y):
        spectral_norm(self.norms)
        x = self.first(x)
        for name, block in self.blocks.items():
            x = block(x)
            if name == "b01":
                x = self.attn(x)  # at 16 x 16
        h = F.relu(x).float().sum((2, 3))  # [B, C]
        with unmixed(x.device):
            return self.out(h)[:, 0] + (self.embed(y) * h).sum(1)


def make_generator(args, data):
    latent, size = args.gan_latent, args.image_size
    return Generator(data.n_classes, data.channels, args.gan_width, latent, latent, args.gan_embedding, size)


def d_loss(real, fake, kind="hinge"):
    """Discriminator: mean relu(1 - real) and mean relu(1 + fake), or softplus; to be added. Logits -> two scalars"""
    if kind == "hinge":
        return F.relu(1 - real).mean(), F.relu(1 + fake).mean()
    return F.softplus(-real).mean(), F.softplus(fake).mean()


def g_loss(fake, kind="hinge"):
    """Generator: -mean fake, or mean softplus(-fake)."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def keras_eps(t, beta2=0.999):
    """Adam's epsilon of 1e-6 at its step t, from 1. Keras adds it outside the bias correction, PyTorch inside."""
    return 1e-6 / math.sqrt(1 - beta2**t)


@torch.no_grad()
def ema_update(ema, new, step, start, decay):
    """In place, step counted from 1: copy while step <= start, else ema <- decay ema + (1 - decay) new.

    ema, new: lists of tensors, all of G: parameters, BatchNorm statistics and spectral-norm vectors.
    """
    if step <= start:
        torch._foreach_copy_(ema, new)
    else:
        floats = [(e, n) for e, n in zip(ema, new, strict=True) if e.is_floating_point()]
        torch._foreach_lerp_([e for e, _ in floats], [n for _, n in floats], 1 - decay)


class BigGAN:
    """Generator, its average, discriminator, and an Adam for each of the two that are trained."""

    def __init__(self, args, data, seed, device):
        distributed.seed_global(distributed.seed_of(seed, "gan"))
        self.args = args
        place = dict(device=device, memory_format=torch.channels_last)
        self.g = make_generator(args, data).to(**place)
        self.d = Discriminator(data.n_classes, data.channels, args.gan_width).to(**place)
        self.ema = make_generator(args, data).to(**place).requires_grad_(False)
        self.ema.load_state_dict(self.g.state_dict())
        how = dict(betas=args.gan_betas) | (dict(fused=True) if device.type == "cuda" else dict(foreach=True))
        self.d_adam = torch.optim.Adam(self.d.parameters(), lr=args.gan_d_lr or args.gan_lr, **how)
        self.g_adam = torch.optim.Adam(self.g.parameters(), lr=args.gan_lr, **how)
        self.averaged = list(self.ema.state_dict().values()), list(self.g.state_dict().values())
        self.loss_of_d = compiled(self.loss_of_d, args.compile, "loss of D")
        self.loss_of_g = compiled(self.loss_of_g, args.compile, "loss of G")

    def loss_of_d(self, z, x, y):
        with autocast(self.args.gan_precision, x.device):
            with torch.no_grad():
                fake = self.g(z, y)  # the fake labels are those of the real batch
            on_fake, on_real = self.d(torch.cat([fake, x]), torch.cat([y, y])).chunk(2)  # one forward for both
        return sum(d_loss(on_real, on_fake, self.args.gan_loss))

    def loss_of_g(self, z, y):
        with autocast(self.args.gan_precision, z.device):
            return g_loss(self.d(self.g(z, y), y), self.args.gan_loss)

    def loop(self, run, chart, total, team, file, log_every):
        """A micro-batch starts from the step's BatchNorm statistics, which are averaged; u is the same in each."""
        args, buffers = self.args, [*self.d.buffers(), *self.g.buffers()]
        how = dict(state=self.ema.state_dict(), buffers=buffers, others=[self.g_adam], log_every=log_every)
        micro = args.gan_micro_batch or args.gan_batch
        return Loop(run, chart, total, self.d_adam, team, micro, file, save_seconds=600, **how)

    def step(self, loop, step, x, y, z):
        """gan_d_steps updates of D on the same real batch, one of G, one of the average. -> loss of the last D, of G

        x [B, C, 32, 32], y [B], z [gan_d_steps + 1, B, latent]: G's latents are the last; step: from 0.
        """
        args, (*z_of_d, z_of_g), b = self.args, z, len(y)
        self.g.train(), self.d.train()
        for i, z_d in enumerate(z_of_d, 1):
            for u in loop.units(b, of=self.d_adam):
                loop.backward(self.loss_of_d(z_d[u], x[u], y[u]) * (len(y[u]) / b))
            self.d_adam.param_groups[0]["eps"] = keras_eps(args.gan_d_steps * step + i, args.gan_betas[1])
            of_d = loop.update()
        self.d.requires_grad_(False)  # its spectral-norm vectors move all the same
        for u in loop.units(b, of=self.g_adam):
            loop.backward(self.loss_of_g(z_of_g[u], y[u]) * (len(y[u]) / b))
        self.d.requires_grad_(True)
        self.g_adam.param_groups[0]["eps"] = keras_eps(step + 1, args.gan_betas[1])
        of_g = loop.update()
        ema_update(*self.averaged, step + 1, args.gan_ema_start, args.gan_ema)
        return of_d, of_g


DRAWN_STEPS = 50  # whose latents are drawn at once


def gan_batches(args, images, labels, seed, steps):
    """x, y, z of each of these steps, a function of (seed, step): z are the latents of all updates of the step."""
    device, b = labels.device, args.gan_batch
    per_epoch, fresh = len(labels) // b, True  # the last incomplete batch is dropped
    for step in steps:
        epoch, i = divmod(step, per_epoch)
        if fresh or i == 0:
            g = device_generator(device, seed, "gan", epoch)
            order = torch.randperm(len(labels), generator=g, device=device)
            coins = torch.rand(len(labels), generator=g, device=device) < 0.5
        if fresh or i % DRAWN_STEPS == 0:
            shape = DRAWN_STEPS, args.gan_d_steps + 1, b, args.gan_latent
            g = device_generator(device, seed, "latents", epoch, i // DRAWN_STEPS)
            z = torch.randn(shape, generator=g, device=device)
        fresh, rows = False, order[i * b : (i + 1) * b]
        x = in_unit_range(images[rows])
        x = mirrored(x, coins[rows]) if args.random_flip else x
        yield x.contiguous(memory_format=torch.channels_last), labels[rows], z[i % DRAWN_STEPS]


def train_gans(args, run, dist, data, classifier, inception):
    units = math.ceil(args.gan_batch / (args.gan_micro_batch or args.gan_batch))
    smaller = f"--gan-micro-batch {max(2, args.gan_batch // dist.world)}"
    team, seeds = distributed.deal(args.gan_seeds, units, dist, "gan", smaller)
    with run.timed("gan", "--gan-batch"):
        for seed in seeds:
            train_gan(args, run, team, data, classifier, seed, inception)
    run.done("gan", run.under("gan"), generators=len(args.gan_seeds))


def seen_by_gans(args, data):
    """Images and labels of the GANs' training"""
    splits = [data.train, data.val] if args.gan_images == "train+val" else [data.train]
    return tuple(torch.cat(part) for part in zip(*splits, strict=True))


def train_gan(args, run, team, data, classifier, seed, inception):
    """team: the processes that share each step; each draws all batches, and takes its micro-batches of them."""
    if gan_file(run, seed, args.gan_epochs).exists():
        return
    pixels, labels = seen_by_gans(args, data)
    gan, per_epoch = BigGAN(args, data, seed, team.device), len(labels) // args.gan_batch
    file, wanted = run.path("gan", f"seed{seed}", "checkpoint.safetensors"), {*checkpoints(args), args.gan_epochs}
    loop = gan.loop(run, f"gan/seed{seed}", args.gan_epochs * per_epoch, team, file, per_epoch)
    batches = gan_batches(args, pixels, labels, seed, loop.steps)
    for step in loop:
        of_d, of_g = gan.step(loop, step, *next(batches))
        loop.log(d=of_d, g=of_g)
        epoch, rest = divmod(step + 1, per_epoch)
        if rest == 0 and team.main:
            if epoch in wanted:
                save_tensors(gan_file(run, seed, epoch), dict(gan.ema.state_dict()))
            if epoch % args.gan_monitor == 0 or epoch == args.gan_epochs:
                found = measured(args, gan.ema, classifier, data.val, seed, inception)
                run.log(step + 1, **{f"{loop.chart}/{k}": v for k, v in found.items()})
                loop.save()  # last: what an attempt that goes on from here will not make again is written
    loop.finish()


def gan_file(run, seed, epoch):
    return run.path("gan", f"seed{seed}", f"epoch{epoch}.safetensors")


def grid(start, stop, step):
    """Inclusive grid, rounded to 3 decimals: (1, 2, 0.05) -> 21 values"""
    return [round(start + i * step, 3) for i in range(math.floor((stop - start) / step + 1e-6) + 1)]


def checkpoints(args):
    """The epochs of --ckpt-grid that exist; official code: a grid may go on after the last epoch, as FashionMNIST's."""
    first, last, step = args.ckpt_grid
    return list(range(first, min(last, args.gan_epochs) + 1, step))


@torch.no_grad()
def measured(args, generator, classifier, real, seed, inception=None):
    """Frechet and kernel distance to the validation images and a score like IS, all on features of F; F's acceptance.

    Not comparable with FID and IS of the literature, whose features come from an ImageNet network; these come with
    inception, the metrics of inception_metrics. As many samples as validation images (10,000 at most), with the same
    latents every time. FID falls with the number of images: the literature takes 50,000.
    """
    n, device = min(len(real[1]), 10_000), real[0].device
    z = torch.randn(n, args.gan_latent, generator=distributed.generator(seed, "monitor")).to(device)
    y = torch.arange(n, device=device) % classifier.fc.out_features
    x = torch.cat([generator.eval()(*p) for p in zip(z.split(500), y.split(500), strict=True)])
    fake = torch.cat([classifier.features(part) for part in x.split(500)])
    true = torch.cat([classifier.features(in_unit_range(part)) for part in real[0][:n].split(500)])
    probs = classifier.fc(fake).softmax(1)
    found = dict(frechet=frechet_distance(true, fake), kernel=kernel_distance(true, fake))
    found |= dict(score=inception_score(probs), accepted=keep_mask(probs, y, 0).float().mean().item())
    return found | (inception_figures(inception, in_unit_range(real[0][:n]), x) if inception else {})


# ---------------------------------------------------------------------------------------------
# Samples (Stage 3): from a generator, scored by F, filtered, and renewed every P epochs.


def confidence(probs, label):
    """p[c] where F predicts the intended class c, else -1: what the filter compares. [B, C], [B] or int -> [B]"""
    label = torch.as_tensor(label, device=probs.device).expand(len(probs))
    p = probs.gather(1, label[:, None])[:, 0]
    return torch.where(probs.argmax(1) == label, p, -torch.ones_like(p))


def keep_mask(probs, label, threshold):
    """Dynamic sample filtering: argmax p = c and p[c] > t, strictly. [B, C], [B] or int -> bool [B]

    t = 0 still filters: the prediction must agree.
    """
    return confidence(probs, label) > threshold


def draw_size(n, m):
    """Official code: samples in the next draw of a class of which m of n are there: n, later twice what is missing."""
    return n - m if m == 0 else 2 * (n - m)


def filtered_set(draw, classes, n, threshold, attempts):
    """Primitive `generate`: exactly n samples of each class that pass the filter, class by class.

    draw({c: q}) -> {c: (x, confidence) of the next q samples of class c}. attempts: -1, or after how many draws a class
    takes all of its last draw. Official code: those come after the accepted ones of the same draw, so these occur
    twice; kept as it is. -> x [len(classes) n, ...], y, [samples looked at, accepted, classes that reached the limit]
    """
    kept, m, draws, looked_at, accepted = {c: [] for c in classes}, dict.fromkeys(classes, 0), dict(), 0, 0
    while unfinished := [c for c in classes if m[c] < n]:
        for c, (x, conf) in draw({c: draw_size(n, m[c]) for c in unfinished}).items():
            passed = x[conf > threshold]
            draws[c] = draws.get(c, 0) + 1
            kept[c] += [passed, x] if draws[c] == attempts else [passed]
            m[c], looked_at, accepted = sum(map(len, kept[c])), looked_at + len(x), accepted + len(passed)
    x = torch.cat([torch.cat(kept[c])[:n] for c in classes])
    y = torch.tensor(list(classes), device=x.device).repeat_interleave(n)
    return x, y, [looked_at, accepted, sum(d == attempts for d in draws.values())]


class ScoredGenerator:
    """The averaged generator of one checkpoint, and F. sampler(z, y) -> images, F's confidence in y (-1: not y)"""

    def __init__(self, args, generator, classifier):
        self.args, self.generator, self.classifier = args, bake(generator), classifier
        self.latent, self.device = generator.latent, next(generator.parameters()).device
        self.score = compiled(self._score, args.compile, "generator with its filter", dynamic=True)

    def _score(self, z, y):
        with autocast(self.args.precision, z.device):
            x = self.generator(z, y)
            if self.args.precision == "bf16":
                x = x.bfloat16()  # a set of 40,000 images then takes 246 MB
            return x, confidence(self.classifier(x).softmax(1), y)

    @torch.no_grad()
    def __call__(self, z, y):
        z, y = z.to(self.device), y.to(self.device)
        parts = [self.score(*part) for part in zip(*(t.split(self.args.gen_micro_batch) for t in (z, y)), strict=True)]
        return torch.cat([x for x, _ in parts]), torch.cat([conf for _, conf in parts])


class Samples:
    """Endless row of samples of each class, of which draw takes the next; sample i of class c is a function of (seeds,
    c, i), sigma and the generator.

    Expansion trick: z = sigma z_0, with the same z_0 for every sigma. block: how many latents one seed makes.
    """

    def __init__(self, sampler, sigma, block, seeds):
        self.sampler, self.sigma, self.block, self.seeds = sampler, sigma, block, seeds
        self.used = {}  # class -> samples so far

    def latents(self, c, start, count):
        """z of the samples start .. start + count - 1 of class c. -> [count, latent]"""
        blocks = range(start // self.block, (start + count - 1) // self.block + 1)
        shape = self.block, self.sampler.latent
        z = torch.cat([torch.randn(shape, generator=distributed.generator(*self.seeds, c, b)) for b in blocks])
        return self.sigma * z[start - blocks[0] * self.block :][:count]

    def draw(self, sizes):
        """{class: q} -> {class: (x [q, ...], confidence [q])}, all classes in one go"""
        z = torch.cat([self.latents(c, self.used.get(c, 0), q) for c, q in sizes.items()])
        counts = list(sizes.values())
        drawn = self.sampler(z, torch.tensor(list(sizes)).repeat_interleave(torch.tensor(counts)))
        self.used |= {c: self.used.get(c, 0) + q for c, q in sizes.items()}
        return dict(zip(sizes, zip(*(part.split(counts) for part in drawn), strict=True), strict=True))


def refreshed(old, new, n_classes, fraction, g):
    """Dynamic dataset recycle: keep a random (1 - r) n per class of the old set, take the first r n of the new one.

    old, new: (x, y), class by class with n each. Trap: int((1-r) n) + int(r n) can miss n by one; here it cannot.
    """
    n = len(old[1]) // n_classes
    fresh = round(fraction * n)
    rows = torch.stack([torch.randperm(n, generator=g)[: n - fresh] for _ in range(n_classes)])  # [C, n - fresh]
    parts = []
    for c in range(n_classes):
        kept = (c * n + rows[c]).to(old[1].device)
        parts.append([torch.cat([o[kept], s[c * n : c * n + fresh]]) for o, s in zip(old, new, strict=True)])
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


@dataclass
class Source:
    """One generator and how it is sampled: its seed, sampler, sigma, t; filtered False takes every sample."""

    seed: int
    sampler: ScoredGenerator
    sigma: float = 1.0
    threshold: float = 0.0
    filtered: bool = True


class SyntheticSets:
    """The training set of each epoch: renewed every `period` epochs (0: never) to the share recycle_fraction.

    Several sources share n: each gives n // N images per class (MultiGAN).
    """

    def __init__(self, args, sources, n_classes, n, seed, period):
        self.args, self.sources, self.n_classes, self.period = args, sources, n_classes, period
        self.n, self.seed = n // len(sources), seed
        self.size = self.n * len(sources) * n_classes
        self.k, self.sets = None, []  # number of the current set; (x, y) of each source
        self.stats = {}  # "set GAN" -> what filtered_set tells of it

    def draw(self, source, k):
        """Set k of one source, class by class"""
        samples = Samples(source.sampler, source.sigma, self.n, (self.args.gen_seed, self.seed, source.seed, k))
        threshold = source.threshold if source.filtered else -math.inf
        x, y, told = filtered_set(samples.draw, range(self.n_classes), self.n, threshold, self.args.attempts)
        self.stats[f"{k} {source.seed}"] = told
        return x, y

    def at(self, epoch):
        """The images of an epoch, counted from 1: [N, C, 32, 32] in [-1, 1] and labels [N]"""
        k = (epoch - 1) // self.period if self.period else 0
        fraction = self.args.recycle_fraction
        if self.k != k:
            unbuilt = range(0 if self.k is None else self.k + 1, k + 1)  # with r < 1 a set consists of those before it
            for j in unbuilt if fraction < 1 else [k]:
                new = [self.draw(source, j) for source in self.sources]
                if fraction < 1 and self.sets:
                    g = distributed.generator(self.args.gen_seed, self.seed, "recycle", j)
                    pairs = zip(self.sets, new, strict=True)
                    new = [refreshed(old, now, self.n_classes, fraction, g) for old, now in pairs]
                self.sets = new
            self.k = k
        return tuple(torch.cat(part) for part in zip(*self.sets, strict=True))


def n_samples(args, data):
    """n_c: from the training split, although the GAN saw the validation images too; the set is balanced always"""
    return args.class_samples or len(data.train[1]) // data.n_classes


def load_sampler(args, run, data, classifier, seed, epoch):
    generator = make_generator(args, data)
    generator.load_state_dict(load_tensors(gan_file(run, seed, epoch)))
    device = data.train[0].device
    return ScoredGenerator(args, generator.to(device, memory_format=torch.channels_last), classifier)


# ---------------------------------------------------------------------------------------------
# [3] search: greedy, for each GAN: checkpoint, then sigma, then threshold (Stage 5, steps 1 to 3). Reads gan/, writes
# search/gan<s>/e<epoch>-s<sigma>-t<t>/metrics.json and search.json; the candidates of all GANs are dealt out together.


def greedy_search(seeds, grids, evaluate):
    """grids: values of (epoch, sigma, threshold); evaluate([(seed, epoch, sigma, threshold)]) -> scores, of all GANs at
    once. The first of equal scores wins. -> {seed: (epoch, sigma, threshold)}"""
    best = {seed: (None, 1.0, 0.0) for seed in seeds}
    for i, values in enumerate(grids):
        tried = [(seed, *b[:i], value, *b[i + 1 :]) for seed, b in best.items() for value in values]
        scores = dict(zip(tried, evaluate(tried), strict=True))
        best = {seed: max((c for c in tried if c[0] == seed), key=scores.__getitem__)[1:] for seed in seeds}
    return best


def grids_of(args):
    return checkpoints(args), grid(*args.sigma_grid), grid(*args.threshold_grid)


def search(args, run, dist, data, classifier):
    def scores_of(candidates):
        missing = [c for c in candidates if not (candidate_folder(run, *c) / "metrics.json").exists()]
        distributed.barrier(dist)  # before one of these is written
        for (seed, epoch), group in itertools.groupby(distributed.my_items(missing, dist), key=lambda c: c[:2]):
            sampler = load_sampler(args, run, data, classifier, seed, epoch)
            for candidate in group:
                try_candidate(args, run, dist, data, sampler, *candidate)
        distributed.barrier(dist)
        scores = [read_json(candidate_folder(run, *c) / "metrics.json")["score"] for c in candidates]
        for (seed, e, s, t), score in zip(candidates, scores, strict=True):
            distributed.say(dist, f"  GAN {seed}: epoch {e} sigma {s:.2f} t {t:.1f}: {score:.1f}")
        return scores

    with run.timed("search", "--gen-micro-batch"):
        best = greedy_search(args.gan_seeds, grids_of(args), scores_of)
        choices = {str(seed): dict(zip(("epoch", "sigma", "threshold"), b, strict=True)) for seed, b in best.items()}
        if dist.main:
            write_json(run.path("search.json"), choices)
            winners = [candidate_folder(run, seed, *b) for seed, b in best.items()]
            for file in run.path("search").glob("*/*/weights.safetensors"):
                if file.parent not in winners:  # those of the others have no use
                    file.unlink()
    run.done("search", run.under("search.json", "search"), choices=choices)


def try_candidate(args, run, dist, data, sampler, seed, epoch, sigma, threshold):
    source = Source(seed, sampler, sigma, threshold)
    sets = SyntheticSets(args, [source], data.n_classes, n_samples(args, data), args.seed, args.search_period)
    about = dict(gan=seed, gan_epoch=epoch, sigma=sigma, threshold=threshold)
    how = args.resnet_epochs, args.seed, candidate_folder(run, seed, epoch, sigma, threshold), about, args.select_on
    train_classifier(args, run, dist, data, sets, *how)


def candidate_folder(run, seed, epoch, sigma, threshold):
    return run.path("search", f"gan{seed}", f"e{epoch}-s{sigma:g}-t{threshold:g}")


# ---------------------------------------------------------------------------------------------
# [4] final: the rows of the table, each with clf_seeds classifiers (Stage 5, step 4, and Stage 6).
# Reads search.json, gan/, and of search/ the winner's run, which is the first of row expansion; writes
# classifier/runs/<row>-seed<s>/ and the best of the last row as classifier/.


def sources_of(args, row, i, choices, sampler):
    """Generators of run i of a row, and its period. Single rows take GAN i mod N. sampler(seed, epoch) draws."""
    seeds = args.gan_seeds if row == "multi" else [args.gan_seeds[i % len(args.gan_seeds)]]
    sources = []
    for seed in seeds:
        best = choices[str(seed)]
        sigma = best["sigma"] if row in ("expansion", "single", "multi") else 1.0
        filtered = row != "baseline"
        sources.append(Source(seed, sampler(seed, best["epoch"]), sigma, best["threshold"] * filtered, filtered))
    periods = dict(baseline=0, filter=0, single=args.final_period, multi=args.final_period)
    return sources, periods.get(row, args.search_period)


def sets_of(args, data, row, i, choices, sampler):
    sources, period = sources_of(args, row, i, choices, sampler)
    return SyntheticSets(args, sources, data.n_classes, n_samples(args, data), args.seed + i, period)


def final(args, run, dist, data, classifier):
    choices = read_json(run.path("search.json"))
    sampler = cache(partial(load_sampler, args, run, data, classifier))
    todo = [(row, i) for row in args.rows if row != "real" for i in range(args.clf_seeds)]
    with run.timed("final", "--gen-micro-batch"):
        for row, i in distributed.my_items(todo, dist):
            sets, folder = sets_of(args, data, row, i, choices, sampler), row_folder(run, row, args.seed + i)
            about = dict(row=row, gans=[s.seed for s in sets.sources], period=sets.period, images=sets.size)
            if row == "expansion" and i == 0:
                gan = sets.sources[0].seed
                take_over(args, data, candidate_folder(run, gan, *choices[str(gan)].values()), folder, about)
            how = args.resnet_epochs, args.seed + i, folder, about, args.select_on
            train_classifier(args, run, dist, data, sets, *how)
        distributed.barrier(dist)
        if dist.main:
            best = max(row_metrics(args, run, args.rows[-1]), key=lambda m: (m["score"], -m["seed"]))
            weights = load_tensors(row_folder(run, best["row"], best["seed"]) / "weights.safetensors")
            save_tensors(run.path("classifier", "model.safetensors"), weights)
            shape = dict(width=args.resnet_width, blocks=args.resnet_blocks, channels=data.channels)
            shape |= dict(classes=data.n_classes, row=best["row"], seed=best["seed"])
            write_json(run.path("classifier", "config.json"), shape)
    run.done("final", run.under("classifier"), classifiers=len(todo))


def take_over(args, data, search_run, folder, about):
    """A run of the search as one of a row: what train_classifier would write, but for the test scores of its epochs."""
    weights = search_run / "weights.safetensors"
    if weights.exists() and not (folder / "metrics.json").exists():
        net = make_classifier(args, data, 0)
        net.load_state_dict(load_tensors(weights))
        test = accuracy(net.to(data.test[0].device, memory_format=torch.channels_last), data.test, args)
        save_tensors(folder / "weights.safetensors", load_tensors(weights))
        write_json(folder / "metrics.json", read_json(search_run / "metrics.json") | about | dict(test=test))


def row_metrics(args, run, row):
    """metrics.json of every finished classifier of a row"""
    files = [row_folder(run, row, args.seed + i) / "metrics.json" for i in range(args.clf_seeds)]
    return [read_json(file) for file in files if file.exists()]


# ---------------------------------------------------------------------------------------------
# [5] evaluate: load the saved classifier from its folder, score it, write pictures, table and report.
# Reads classifier/, gan/, search.json; writes images/, results.json, samples.png, report.html.

ROW_NAMES = {
    "real": "real images",
    "baseline": "GAN images as they come, one fixed set",
    "filter": "+ filter",
    "recycle": "+ recycle",
    "expansion": "+ expansion",
    "single": "+ new set in every epoch: GaFi, one GAN",
    "multi": "GaFi, MultiGAN",
}
BASELINES = "real", "baseline"


def evaluate(args, run, dist, data, classifier):
    with run.timed("evaluate"):
        saved = read_json(run.path("classifier", "config.json"))
        net = ResNet(saved["classes"], saved["channels"], saved["width"], saved["blocks"])
        net.load_state_dict(load_tensors(run.path("classifier", "model.safetensors")))
        net = net.to(dist.device, memory_format=torch.channels_last)
        predicted, labels = predictions(net, data.test[0], args).cpu(), data.test[1].cpu()
        top1 = 100 * (predicted == labels).float().mean().item()
        recorded = read_json(row_folder(run, saved["row"], saved["seed"]) / "metrics.json")["test"]
        compare_saved(run, top1, recorded, len(labels))
        if dist.main:
            n_images, near = show_samples(args, run, data, classifier, saved)
            tables(args, run, data, predicted, labels, top1, dict(images=n_images, near_copies=near))
    run.done("evaluate", run.under("images", *runs.RESULTS), top1=top1)


def show_samples(args, run, data, classifier, saved):
    """images/: from the first set that the saved classifier saw (a PNG is rounded to 8 bits; the training was not), the
    GANs in turn. samples.png: real images, those beside the baseline's. -> number of images, near-copies in that set"""
    names, choices = data.class_names, read_json(run.path("search.json"))
    sampler = partial(load_sampler, args, run, data, classifier)
    known, test = as_images(*seen_by_gans(args, data), names), as_images(*data.test, names)
    shown, rows = {"real": images.of_each_class(known)}, []
    for row in dict.fromkeys(["baseline", saved["row"]]):
        sets = sets_of(args, data, row, saved["seed"] - args.seed, choices, sampler)
        drawn, sources, size = as_images(*sets.at(1), names), sets.sources, sets.size // len(names)
        turns = torch.arange(size).view(len(sources), sets.n).T.flatten().tolist()  # a class has GAN after GAN
        name = "GAN, as it comes" if row == "baseline" else f"GaFi, {row}"
        shown |= {f"{name} {k}": images.of_each_class(drawn, turns[k]) for k in range(min(4, size))}
    with images.ImageWriter() as writer:
        for c, folder in enumerate(class_folders(names)):
            for k, turn in enumerate(turns[: args.export_images]):
                file, source = f"{folder}/{k}.png", sources[k % len(sources)]
                what = dict(file_name=file, label=c, class_name=names[c], row=saved["row"], gan=source.seed)
                threshold = source.threshold if source.filtered else None
                rows.append(what | dict(sigma=source.sigma, threshold=threshold))
                writer.save(run.path("images", file), drawn.open(drawn.of_class(c)[turn]))
    runs.write_metadata(run.path("images"), rows)
    images.samples_grid(run.path("samples.png"), list(shown.values()), list(shown), names, size=64)
    return len(rows), near_copies(run, {saved["row"]: drawn}, known, test, args.workers, run.dist.alone())


def tables(args, run, data, predicted, labels, top1, about):
    """results.json and report.html"""
    metrics, rows = {}, []
    for row in args.rows:
        found = row_metrics(args, run, row)
        if not found:
            rows.append([ROW_NAMES[row], "not run", "", "", "", ""])
            continue
        metrics[row] = line = over_seeds([m["test"] for m in found]) | dict(images=found[0]["images"])
        line |= means(found, "val", "best_test_epoch", "accepted")  # a run of the search has no test epochs
        gap = line["gap"] = metrics["real"]["mean"] - line["mean"] if "real" in metrics else None
        below = "" if gap is None or row == "real" else f"{gap:.1f}"
        cells = [f"{line[key]:.1f}" if key in line else "" for key in ("val", "best_test_epoch")]
        accepted = "" if row in ("real", "baseline") else f"{100 * line['accepted']:.0f} %"
        rows.append([ROW_NAMES[row], spread(line["per_seed"]), below, *cells, accepted])

    choices, baselines = read_json(run.path("search.json")), {k: metrics.pop(k) for k in BASELINES if k in metrics}
    saved = dict(top1=top1, per_class=per_class(predicted, labels, data.class_names))
    metrics |= dict(saved_classifier=saved, search=choices, selected_on=args.select_on)
    run.results(paper="arXiv:2305.10118", metrics=metrics, baselines=baselines, **about)
    top = "test top-1" if args.select_on == "val" else "test top-1 (official selection: on test)"
    header = ["training set", top, "below real", "validation", "its best test epoch", "accepted"]
    chosen = [[seed, c["epoch"], f"{c['sigma']:.2f}", f"{c['threshold']:.1f}"] for seed, c in choices.items()]
    shown = {"Top-1 on the test split": (header, rows)}
    shown["What the search chose"] = ["GAN", "epoch", "sigma", "t"], chosen
    summary = f"{args.dataset}: {len(args.gan_seeds)} GANs of {args.gan_epochs} epochs, chosen on {args.select_on}"
    conclude(run, f"GaFi on {args.dataset}", summary, shown, labels, predicted, data.class_names)


# ---------------------------------------------------------------------------------------------

SPEED_FLAGS = ["gen_micro_batch"]
MOST_VALUES = 1000  # of a grid: each is a training for every GAN

NEEDS = dict(gan="real", search="gan", final="search", evaluate="final")
# What no stage before this one reads; it may change while the stage has not begun.
LATER = {
    "gan": "gan_ ckpt_grid",
    "search": "resnet_epochs sigma_grid threshold_grid gen_seed class_samples attempts search_period recycle_fraction "
    "select_on",
    "final": "final_period",
    "evaluate": "export_images",
}


def check_args(args):
    """What ranges of single numbers do not tell."""
    check(args)
    size, padded = f"--image-size {args.image_size}", args.dataset == "fashionmnist"
    refuse(args.image_size % 8, f"{size}: a multiple of 8 is needed")
    refuse(padded and args.image_size < 28, f"{size}: FashionMNIST is padded from 28 pixels, not shrunk")
    refuse(args.attempts == 0, "--attempts is 0; it must be at least 1, or -1 for no limit")
    refuse(args.gan_micro_batch == 1, "--gan-micro-batch 1: BatchNorm needs two images or more; 0 is the whole batch")
    check_grid("--ckpt-grid", *args.ckpt_grid)
    check_grid("--sigma-grid", *args.sigma_grid)
    check_grid("--threshold-grid", *args.threshold_grid)
    each_once("--rows", args.rows)
    each_once("--gan-seeds", args.gan_seeds)
    late = f"--ckpt-grid: begins at epoch {args.ckpt_grid[0]}, after the last of {args.gan_epochs}"
    refuse(not checkpoints(args), late)
    refuse(args.rows[-1] == "real", "--rows: the classifier of the last row is saved, so real cannot be the last")


def check_grid(flag, first, last, step):
    name, many = f"{flag} {first} {last} {step}", (last - first) / max(step, 0.001) > MOST_VALUES
    wrong = last < first or step < 0.001
    refuse(wrong, f"{name}: first, last and step, the last not before the first, the step >= 0.001")
    refuse(many, f"{name}: more than {MOST_VALUES} values, each a training")


def check_data(args, data):
    """Is there enough of it?"""
    seen = len(data.train[1]) + len(data.val[1]) * (args.gan_images == "train+val")
    n, least = n_samples(args, data), len(args.gan_seeds) if "multi" in args.rows else 1
    refuse(args.gan_batch > seen, f"--gan-batch {args.gan_batch}: there are only {seen} images to train the GAN on")
    refuse(n < least, f"--class-samples: {n} images per class; at least {least} are needed, one of every GAN")


def networks(args, data):
    """Of which --plan counts the cost."""
    discriminator = Discriminator(data.n_classes, data.channels, args.gan_width)
    return make_generator(args, data), discriminator, make_classifier(args, data, 0)


def plan(args):
    return planned.plan(args, networks, [len(values) for values in grids_of(args)])


def main(args):
    check_args(args)
    if args.plan:
        return print_plan(*plan(args), args)
    dist = distributed.setup_distributed(args.device)
    splits = load_splits(args, dist)
    data = load_data(args, dist, splits)
    check_data(args, data)

    # The device draws augmentation and GAN latents, and every kind of device has its own random numbers.
    used = dict(device=dist.device.type)
    run = runs.open_run("gafi", args, dist, SPEED_FLAGS, models=used, later=LATER, pictures=splits)
    todo = [stage for stage in args.stages if run.todo(stage)]
    check_order(run, todo, NEEDS)
    inception = None
    if args.gan_inception and "gan" in todo:  # before the first stage, and the download once
        load = partial(inception_metrics, flag="--gan-inception")
        distributed.on_rank_0(lambda: load(torch.device("cpu")) and None, dist)
        inception = load(dist.device)
    if "real" in todo:
        train_real(args, run, dist, data)
    if set(todo) - {"real"}:
        classifier = filtering_classifier(args, run, data)
        if "gan" in todo:
            train_gans(args, run, dist, data, classifier, inception)
        if "search" in todo:
            search(args, run, dist, data, classifier)
        if "final" in todo:
            final(args, run, dist, data, classifier)
        if "evaluate" in todo:
            evaluate(args, run, dist, data, classifier)
    distributed.cleanup(dist)


if __name__ == "__main__":
    start(main, ARGS)
