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
    """images per forward pass on one process; speed, memory, and rounding: some pixels by a grey level"""
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
        gan_seeds=(42, 137), gan_epochs=23, gan_batch=32, gan_width=8, gan_latent=16, gan_embedding="normal",
        gan_lr=1e-3, gan_ema=0.98, gan_ema_start=50, gan_monitor=5,
        ckpt_grid=(17, 23, 6), sigma_grid=(1.0, 1.5, 0.25), threshold_grid=(0.0, 0.8, 0.4), search_period=5,
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
from collections import Counter
from functools import cache, lru_cache, partial

import torch
import torch.nn.functional as F
from torch import nn

from common import datasets, distances, distributed, images, inputs
from common import run as runs
from common.augment import crop, cutout, cutout_boxes, mirrored
from common.compiling import compiled
from common.diffusion import autocast, unmixed
from common.files import class_folders, load_tensors, loaded, read_json, save_tensors, write_json
from common.inputs import check_grid, check_order, each_once, refuse
from common.jobs import share_out
from common.launch import UserError
from common.loop import Loop
from common.near_copies import near_copies
from common.pixels import Pixels, as_images, in_unit_range, load_split
from common.plan import print_plan
from common.plans import gafi as planned
from common.report import compare_saved, conclude, means, over_seeds, per_class, spread
from common.resnet import ResNet
from common.sgdw import SGDW
from common.spectral import SNConv, SNEmbedding, SNLinear, spectral_groups, spectral_norm

AT_ONCE = 16  # batches that are augmented together
DRAWN_STEPS = 50  # of a GAN, whose latents are drawn together; both: the GPU then waits less for the host

# ---------------------------------------------------------------------------------------------
# The data: every split as one tensor of bytes on the device; of CIFAR-10 40,000 images for training, 10,000 for
# validation, 10,000 for the test. Classifiers learn from the first, GANs from the first two, choices are made on the
# second. Networks see (byte / 255 - 0.5) / 0.5 of every data set: numbers in [-1, 1], the range of G's tanh.
# In shapes: N images of a set, B of a batch, C classes. An image is [3, S, S] with S = 32, of grey data [1, S, S]; a
# feature map has D channels, a latent z has L numbers. Of MultiGAN N is the number of generators. In comments F is the
# classifier that filters; in code F.relu and the like are torch.nn.functional's.


def load_data(args, dist):
    """All splits. CINIC-10's train and valid are pooled and divided anew: 170k, 10k. FashionMNIST is padded from 28 to
    32 pixels, so that its border becomes -1."""
    data = datasets.load_dataset(args.dataset, args.data_dir)
    distributed.say(dist, data.note)
    train, val, pooled = data.train, data.val, args.dataset == "cinic10"
    if pooled or val is None:
        train, val = datasets.hold_out(train + val if pooled else train, args.val_per_class, args.seed)
    files = dict(train=train, val=val, test=data.test)
    distributed.on_rank_0(partial(inputs.readable, files, dist), dist)
    channels, padded = 1 if args.dataset in ("digits", "fashionmnist") else 3, args.dataset == "fashionmnist"
    how = channels, args.image_size, padded, dist.device, args.workers
    splits = {name: load_split(split, *how) for name, split in files.items()}
    return Pixels(**splits, class_names=train.class_names, files=files)


# ---------------------------------------------------------------------------------------------
# The classifier: a ResNet-20, four times as wide as usual. train_classifier makes F and every classifier of the search
# and of the table. It minimises cross-entropy; w are the parameters, g their gradient, v their velocity:
#     w <- (1 - 1e-4) w;   v <- 0.9 v - lr g;   w <- w + 0.9 v - lr g
# The decay is not multiplied by lr: beside the gradient it is weak at first and strong after the drops, and keeping the
# best epoch protects from that. A generator is judged by the CAS, the classification accuracy score: the accuracy on
# real images of a classifier that saw synthetic ones only.


def make_classifier(args, data, seed):
    distributed.seed_global(distributed.seed_of(seed, "classifier"))
    return ResNet(data.n_classes, data.channels, args.resnet_width, args.resnet_blocks)


def lr_at(epoch, base, drops):
    """Official code: rate of an epoch counted from 1; a tenth from each drop on: 0.1, 0.01 from 60, 0.001 from 80."""
    return base * 0.1 ** sum(epoch >= drop for drop in drops)


def augmented(x, args, g):
    """Flip, crop, cutout, in this order. x [B, 3, S, S] in [-1, 1] -> the same; g: on x's device.

    Official code: crops are padded with 0, which is mid-grey, and cutout changes every image: its noise fills a box of
    a tenth of the area on average, and is rescaled to the image's own range.
    """
    b, device = len(x), x.device
    if args.random_flip:
        x = mirrored(x, torch.rand(b, generator=g, device=device) < 0.5)
    if args.random_crop:
        pad = args.image_size // 8  # 4 of 32
        top, left = torch.randint(2 * pad + 1, (2, b), generator=g, device=device)
        x = crop(x, top, left, pad)  # the same size, moved by up to 4 pixels
    if args.random_erasing:
        noise = torch.randn(x.shape, generator=g, device=device)
        x = cutout(x, noise, *cutout_boxes(b, x.shape[-1], 0.2, 0.5, g))  # sides of 7 to 16 of 32 pixels
    return x


def training_batches(args, x, y, seed, epoch):
    """The shuffled, augmented batches of an epoch, a function of (seed, epoch). -> [B, 3, S, S], [B]"""
    g = distributed.generator(seed, "epoch", epoch, device=y.device)
    order = torch.randperm(len(y), generator=g, device=y.device)
    for rows in order.split(AT_ONCE * args.resnet_batch):  # rows of x and y, of 16 batches
        parts = augmented(x[rows].float(), args, g).contiguous(memory_format=torch.channels_last), y[rows]
        yield from zip(*(part.split(args.resnet_batch) for part in parts), strict=True)


class RealSet:
    """The real training images, the same in every epoch. SyntheticSets has the same attributes.

    Official code: F, and with it the real reference, is chosen on validation images in every case.
    """

    def __init__(self, args, split, seed):
        self.seed, self.epochs, self.select_on = seed, args.real_epochs, "val"
        self.x, self.y = in_unit_range(split[0]), split[1]  # [N, 3, S, S] in [-1, 1], [N]
        self.size, self.stats = len(self.y), {}

    def at(self, epoch):
        return self.x, self.y


def train_classifier(args, run, dist, data, sets, folder, about):
    """Train a ResNet on sets.at(epoch), by this process alone; keep the epoch that the split sets.select_on likes best.

    Writes <folder>/weights.safetensors and metrics.json; does nothing if that is there. about: what to record. The test
    split is looked at in rows of the table only, or if it selects.
    """
    if (folder / "metrics.json").exists():
        return
    splits = dict(val=data.val) | (dict(test=data.test) if "row" in about or sets.select_on == "test" else {})
    net = make_classifier(args, data, sets.seed).to(dist.device, memory_format=torch.channels_last)
    fast = compiled(net, args.compile, "ResNet", dynamic=True)
    optimizer = SGDW(net.parameters(), args.resnet_lr, args.resnet_wd, args.resnet_momentum)
    weights, per_epoch = net.state_dict(), math.ceil(sets.size / args.resnet_batch)  # weights: those being trained
    chart, file = str(folder.relative_to(run.dir)), folder / "checkpoint.safetensors"
    whole = dist.alone(), args.resnet_batch  # the batch is one unit
    loop = Loop(run, chart, sets.epochs * per_epoch, optimizer, *whole, file, state=weights, save_seconds=math.inf)
    history, best, stats = loop.extra or ([], dict(score=-1.0), {})
    sets.stats |= stats

    for step in loop:
        epoch, i = step // per_epoch + 1, step % per_epoch
        if i == 0:
            batches, lost = training_batches(args, *sets.at(epoch), sets.seed, epoch), 0  # may draw a new set
            net.train()
        batch, labels = next(batches)  # [B, 3, S, S] in [-1, 1], [B]
        for _ in loop.units(len(labels)):
            with autocast(args.precision, dist.device):
                logits = fast(batch)  # [B, C]
            loop.backward(F.cross_entropy(logits.float(), labels))
        lost += loop.update(lr=lr_at(epoch, args.resnet_lr, args.resnet_drops)) * len(labels)
        if i < per_epoch - 1:
            continue
        # The end of an epoch: it is scored, and the weights of the best one are kept beside those that go on.
        row = dict(epoch=epoch, loss=float(lost) / sets.size) | {k: accuracy(net, s, args) for k, s in splits.items()}
        if not math.isfinite(row["loss"]):
            raise UserError(f"{chart}, epoch {epoch}: the loss is {row['loss']}; stopped. Try a lower --resnet-lr")
        history.append(row)
        if row[sets.select_on] > best["score"]:
            best = dict(score=row[sets.select_on], epoch=epoch, val=row["val"])  # of equal epochs the first
            loop.tensors = {n: t.detach().cpu().clone() for n, t in weights.items()}
        if epoch % max(1, sets.epochs // 10) == 0 and epoch < sets.epochs:
            loop.extra = history, best, sets.stats
            loop.save()

    report = about | dict(seed=sets.seed, history=history) | best
    if "test" in splits:
        net.load_state_dict(loop.tensors)
        report |= dict(test=accuracy(net, data.test, args), best_test_epoch=max(row["test"] for row in history))
    if sets.stats:  # what the filter did in each synthetic set
        drawn, accepted, exhausted = map(sum, zip(*sets.stats.values(), strict=True))
        report |= dict(drawn=drawn, accepted=accepted / drawn, exhausted=exhausted)
        if exhausted:
            print(f"note: {chart}: {exhausted} times a class reached {args.attempts} draws")
    save_tensors(folder / "weights.safetensors", loop.tensors)
    write_json(folder / "metrics.json", report)
    loop.finish()


@torch.no_grad()
def predictions(net, x, args):
    """uint8 [N, 3, S, S] -> predicted classes [N]"""
    net.eval()
    with autocast(args.precision, x.device):
        return torch.cat([net(in_unit_range(part)).argmax(1) for part in x.split(1000)])


def accuracy(net, split, args):
    """Percent of a split (uint8 images, labels) that net gets right"""
    return 100 * (predictions(net, split[0], args) == split[1]).sum().item() / len(split[1])


# ---------------------------------------------------------------------------------------------
# [1] real: classifiers of the real images. Their accuracy is what synthetic sets are to come close to. The first of
# them is also F, the judge of samples: from here on frozen, in evaluation mode, without augmentation.
# Reads the real training split, writes classifier/runs/real-seed<s>/.


def row_folder(run, row, seed):
    return run.path("classifier", "runs", f"{row}-seed{seed}")


def train_real(args, run, dist, data):
    seeds = [args.seed + i for i in range(args.clf_seeds if "real" in args.rows else 1)]
    with run.timed("real", "--resnet-batch", trains=True):
        for seed in distributed.my_items(seeds, dist):
            sets, folder = RealSet(args, data.train, seed), row_folder(run, "real", seed)
            train_classifier(args, run, dist, data, sets, folder, dict(row="real", images=sets.size))
    run.done("real", run.under(*(row_folder(run, "real", seed) for seed in seeds)), classifiers=len(seeds))


def filtering_classifier(args, run, data):
    """F: it has seen the real training split only; its epoch was chosen on validation images."""
    file = row_folder(run, "real", args.seed) / "weights.safetensors"
    return loaded(make_classifier(args, data, args.seed), file, data.train[0].device)


# ---------------------------------------------------------------------------------------------
# [2] gan: one BigGAN-deep per seed, StudioGAN's variant: spectral norm everywhere, BatchNorm conditioned on
# [z, e_y], a projection discriminator, three updates of D for one of G, and an average of G, which is what is sampled.
# A step has B = 192 real images x of classes y; samples G(z, y) have the same classes, and new z ~ N(0, I) each time:
#     three times, x stays:  L_D = mean relu(1 - D(x, y)) + mean relu(1 + D(G(z, y), y));  Adam moves D
#     once:                  L_G = -mean D(G(z, y), y);                                    Adam moves G
#     then:                  G_ema <- 0.9999 G_ema + 0.0001 G, a plain copy up to step 1000
# D is to say 1 or more of real and -1 or less of generated images; one of which it does so already has no part in its
# gradient. No gradient penalty, no augmentation but the mirror, one rate to the end. Nothing here is GaFi's own.
# Spectral norm (common/spectral.py): a layer computes with W / sigma, its weights over their largest singular value;
# one power iteration before each forward pass improves sigma, from a vector u that the layer keeps.
# Reads the real images, writes gan/seed<s>/epoch<e>.safetensors, the averaged generator at each epoch of the grid.


class ConditionalBN(nn.Module):
    """BN(x) * (1 + W_g c) + W_b c, with c = [z, e_y]: how latent and class reach each layer. x [B, D, H, W], c [B, 2 L]

    Trap: BigGAN-deep does not train without the 1.
    """

    def __init__(self, channels, cond):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1, affine=False)
        self.gamma, self.beta = SNLinear(cond, channels, bias=False), SNLinear(cond, channels, bias=False)

    def forward(self, x, c):
        gain, shift = 1 + self.gamma(c), self.beta(c)  # [B, D] each
        return self.bn(x) * gain[:, :, None, None] + shift[:, :, None, None]


class Attention(nn.Module):
    """x + gain out(softmax(theta^T phi) g): phi and g max-pooled 2 x 2, no 1/sqrt(d), no biases. [B, D, H, W]

    Each of H W positions looks at H W / 4 pooled ones.
    """

    def __init__(self, c):
        super().__init__()
        self.theta, self.phi = SNConv(c, c // 8, 1, bias=False), SNConv(c, c // 8, 1, bias=False)
        self.g, self.out = SNConv(c, c // 2, 1, bias=False), SNConv(c // 2, c, 1, bias=False)
        self.gain = nn.Parameter(torch.zeros(1))  # the layer begins as the identity

    def forward(self, x):
        q, k, v = self.theta(x), F.max_pool2d(self.phi(x), 2), F.max_pool2d(self.g(x), 2)
        q, k, v = (t.flatten(2).transpose(1, 2)[:, None] for t in (q, k, v))  # [B, 1, positions, channels]
        o = F.scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0]  # [B, H W, D / 2]
        return x + self.gain * self.out(o.transpose(1, 2).unflatten(2, x.shape[2:]))


class GBlock(nn.Module):
    """cBN-ReLU-1x1, cBN-ReLU-[up]-3x3, cBN-ReLU-3x3, cBN-ReLU-1x1; plus a 1x1 skip, which is always there.

    x [B, D, H, W] -> the same, or with up [B, D, 2 H, 2 W]; D / 4 channels between the 1x1 convolutions.
    """

    def __init__(self, c, cond, up):
        super().__init__()
        h, self.up = c // 4, up
        self.cbn1, self.cbn2, self.cbn3, self.cbn4 = (ConditionalBN(n, cond) for n in (c, h, h, h))
        self.conv1, self.conv2, self.conv3 = SNConv(c, h, 1), SNConv(h, h, 3), SNConv(h, h, 3)
        self.conv4, self.skip = SNConv(h, c, 1), SNConv(c, c, 1)

    def upsampled(self, x):
        return F.interpolate(x, scale_factor=2) if self.up else x

    def forward(self, x, c):
        h = self.conv1(F.relu(self.cbn1(x, c)))  # [B, D / 4, H, W]
        h = self.conv2(self.upsampled(F.relu(self.cbn2(h, c))))  # here the side doubles
        h = self.conv3(F.relu(self.cbn3(h, c)))
        h = self.conv4(F.relu(self.cbn4(h, c)))  # D channels again
        return h + self.upsampled(self.skip(x))  # 1x1 and nearest upsampling commute: a quarter of the cost


class Generator(nn.Module):
    """z [B, L], y [B] -> images [B, 3, 32, 32] in (-1, 1)

    size: 32 as in the paper, or another multiple of 8; the first feature map then has size / 8 pixels per side.
    """

    def __init__(self, n_classes, channels=3, width=128, latent=128, embedding=128, start="uniform", size=32):
        super().__init__()
        self.latent, self.channels, self.side, c = latent, 4 * width, size // 8, latent + embedding
        self.embed = nn.Embedding(n_classes, embedding)  # e_y; as officially without spectral norm
        if start == "uniform":  # Keras' default
            nn.init.uniform_(self.embed.weight, -0.05, 0.05)
        self.first = SNLinear(c, self.channels * self.side**2)
        blocks = {f"b{s}{k}": GBlock(self.channels, c, up=k == 1) for s in range(3) for k in range(2)}
        self.blocks, self.attn = nn.ModuleDict(blocks), Attention(self.channels)
        self.last_bn, self.last = nn.BatchNorm2d(self.channels), SNConv(self.channels, channels, 3)
        self.norms = spectral_groups(self)

    def forward(self, z, y):
        spectral_norm(self.norms)
        c = torch.cat([z, self.embed(y)], 1)  # [B, 2 L], the same condition for every layer; z is not split
        x = self.first(c).view(-1, self.channels, self.side, self.side)  # [B, D, 4, 4], D = 4 width = 512
        for name, block in self.blocks.items():  # three pairs; the second of each doubles the side: 8, 16, 32
            x = block(x, c)
            if name == "b11":
                x = self.attn(x)  # at 16 x 16
        return torch.tanh(self.last(F.relu(self.last_bn(x))).float())


class DBlock(nn.Module):
    """ReLU-1x1, ReLU-3x3, ReLU-3x3, [average pool], ReLU-1x1; skip: identity, or 1x1 and pool when downsampling.

    x [B, D, H, W] -> the same, or with down [B, D', H / 2, W / 2]
    """

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
    """Projection discriminator: D(x, y) = w.h(x) + b + <e_y, h(x)>, h summed over 8 x 8. -> logits [B]

    w.h + b judges the image whatever its class, <e_y, h> how well it fits class y.
    """

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
        x = self.first(x)  # [B, width, 32, 32]
        for name, block in self.blocks.items():  # the first of the first two pairs halves the side: 16, 8
            x = block(x)
            if name == "b01":
                x = self.attn(x)  # at 16 x 16
        h = F.relu(x).float().sum((2, 3))  # [B, D]
        with unmixed(x.device):
            return self.out(h)[:, 0] + (self.embed(y) * h).sum(1)  # [B]


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
    """Adam's epsilon of 1e-6 at its step t, from 1. Keras adds it outside the bias correction, PyTorch inside: with
    s = sqrt(1 - beta2^t), s m / (sqrt(v) + 1e-6) = m / (sqrt(v) / s + 1e-6 / s). It shows where gradients are tiny."""
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
        self.ema = make_generator(args, data).to(**place).requires_grad_(False)  # G_ema, which begins as G
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
            on_fake, on_real = self.d(torch.cat([fake, x]), torch.cat([y, y])).chunk(2)  # [B] each; one forward
        return sum(d_loss(on_real, on_fake, self.args.gan_loss))

    def loss_of_g(self, z, y):
        with autocast(self.args.gan_precision, z.device):
            return g_loss(self.d(self.g(z, y), y), self.args.gan_loss)

    def loop(self, run, chart, total, team, file, log_every):
        """Counts the steps, adds up the micro-batches of all processes that share a GAN, saves and resumes.

        A micro-batch starts from the step's BatchNorm statistics, which are averaged; u is the same in each.
        """
        args, buffers = self.args, [*self.d.buffers(), *self.g.buffers()]
        how = dict(state=self.ema.state_dict(), buffers=buffers, others=[self.g_adam], log_every=log_every)
        micro = args.gan_micro_batch or args.gan_batch
        return Loop(run, chart, total, self.d_adam, team, micro, file, save_seconds=600, **how)

    def step(self, loop, step, x, y, z):
        """gan_d_steps updates of D on the same real batch, one of G, one of the average. -> loss of the last D, of G

        x [B, 3, S, S], y [B], z [gan_d_steps + 1, B, L]: G's latents are the last; step: from 0. Both networks are in
        training mode: G normalises by the batch, and its BatchNorm statistics and all u move in each of the updates.
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


def gan_batches(args, images, labels, seed, steps):
    """x, y, z of each of these steps, in the shapes of BigGAN.step, a function of (seed, step). Official code: the same
    latents come back in every epoch; ours are always new."""
    device, b = labels.device, args.gan_batch
    per_epoch = len(labels) // b  # the last incomplete batch is dropped

    @lru_cache(1)
    def order_of(epoch):
        g = distributed.generator(seed, "gan", epoch, device=device)
        order = torch.randperm(len(labels), generator=g, device=device)
        return order, torch.rand(len(labels), generator=g, device=device) < 0.5  # [N] each; coins for the mirror

    @lru_cache(1)
    def latents(epoch, part):
        g = distributed.generator(seed, "latents", epoch, part, device=device)
        return torch.randn(DRAWN_STEPS, args.gan_d_steps + 1, b, args.gan_latent, generator=g, device=device)

    for step in steps:
        epoch, i = divmod(step, per_epoch)
        order, coins = order_of(epoch)
        rows = order[i * b : (i + 1) * b]
        x = in_unit_range(images[rows])
        x = mirrored(x, coins[rows]) if args.random_flip else x
        z = latents(epoch, i // DRAWN_STEPS)[i % DRAWN_STEPS]  # [gan_d_steps + 1, B, L]
        yield x.contiguous(memory_format=torch.channels_last), labels[rows], z


def train_gans(args, run, dist, data, classifier, inception):
    micro = args.gan_micro_batch or args.gan_batch
    mine = share_out(args.gan_seeds, args.gan_batch, micro, dist, "gan", "--gan-micro-batch", least=2)
    with run.timed("gan", "--gan-batch", trains=True):
        for team, seed in mine:
            train_gan(args, run, team, data, classifier, seed, inception)
    run.done("gan", run.under("gan"), generators=len(args.gan_seeds))


def seen_by_gans(args, data):
    """Images and labels of the GANs' training"""
    splits = [data.train, data.val] if args.gan_images == "train+val" else [data.train]
    return tuple(torch.cat(part) for part in zip(*splits, strict=True))


def train_gan(args, run, team, data, classifier, seed, inception):
    """team: the processes that share each step; each draws all batches, and takes its micro-batches of them."""
    wanted = {*checkpoints(args), args.gan_epochs}
    if all(gan_file(run, seed, epoch).exists() for epoch in wanted):
        return
    pixels, labels = seen_by_gans(args, data)
    gan, per_epoch = BigGAN(args, data, seed, team.device), len(labels) // args.gan_batch
    file = run.path("gan", f"seed{seed}", "checkpoint.safetensors")
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
    y = torch.arange(n, device=device) % classifier.fc.out_features  # the classes in turn
    x = torch.cat([generator.eval()(*p) for p in zip(z.split(500), y.split(500), strict=True)])  # [n, 3, S, S]
    fake = torch.cat([classifier.features(part) for part in x.split(500)])  # [n, D]
    true = torch.cat([classifier.features(in_unit_range(part)) for part in real[0][:n].split(500)])
    probs = classifier.fc(fake).softmax(1)  # [n, C]
    found = dict(frechet=distances.frechet_distance(true, fake), kernel=distances.kernel_distance(true, fake))
    found |= dict(score=distances.inception_score(probs), accepted=(confidence(probs, y) > 0).float().mean().item())
    return found | (distances.inception_figures(inception, in_unit_range(real[0][:n]), x) if inception else {})


# ---------------------------------------------------------------------------------------------
# Samples, from the inside out: GaFi's three techniques, for one class c.
#     z = sigma z_0,  z_0 ~ N(0, I);    x = G_ema(z, c);    p = softmax F(x);    keep x if argmax p = c and p[c] > t
# sigma > 1 is the opposite of truncation: samples vary more, and more of them are broken; the filter takes those out.
# A set has n_c kept samples of each class, as tanh leaves them, not rounded to bytes. Epoch e of a classifier, from 1,
# sees set floor((e - 1) / P): ten sets in 100 epochs for P = 10, a hundred for P = 1, and then no image is seen twice.
# An idea of your own goes into filtered_set, if it is about which samples to keep, or into SyntheticSets.at, if it is
# about when to draw new ones.
#
#     confidence       what F thinks of a sample
#     filtered_set     filter: of each class n samples that F accepts
#     ScoredGenerator  (z, c) -> an image and F's confidence in c
#     Samples          a class's samples one after the other; expansion: z ~ N(0, sigma^2)
#     SyntheticSets    recycle: the training set of each epoch; with several sources MultiGAN


def confidence(probs, label):
    """What the filter compares: p[c] where F predicts the intended class c, else -1. [B, C], [B] or int -> [B]

    Dynamic sample filtering keeps argmax p = c and p[c] > t, strictly: confidence > t. t = 0 still filters, since the
    prediction must agree.
    """
    label = torch.as_tensor(label, device=probs.device).expand(len(probs))
    p = probs.gather(1, label[:, None])[:, 0]  # [B], p[c]
    return torch.where(probs.argmax(1) == label, p, -torch.ones_like(p))


def filtered_set(draw, classes, n, threshold, attempts):
    """Exactly n samples of each class that pass the filter, class by class.

    draw({c: q}) -> {c: (x, confidence) of the next q samples of class c}, the paper's draw(c, q) for all classes at
    once, which keeps a GPU busy. attempts: -1, or after how many draws a class takes all of its last draw. Official
    code: those come after the accepted ones of the same draw, so these occur twice; kept as it is. -> x
    [len(classes) n, ...], y, [samples looked at, accepted, classes that reached the limit]
    """
    kept, m, draws = {c: [] for c in classes}, Counter(), Counter()  # of each class: samples, their number, draws
    looked_at = accepted = 0
    while unfinished := [c for c in classes if m[c] < n]:
        # Official code: n samples, later twice what is missing, since some will be refused again.
        q = {c: n if m[c] == 0 else 2 * (n - m[c]) for c in unfinished}
        for c, (x, conf) in draw(q).items():
            passed = x[conf > threshold]  # [accepted of q, 3, S, S]; a threshold of -inf takes all
            draws[c] += 1
            kept[c] += [passed, x] if draws[c] == attempts else [passed]
            m[c] = sum(map(len, kept[c]))
            looked_at, accepted = looked_at + len(x), accepted + len(passed)
    x = torch.cat([torch.cat(kept[c])[:n] for c in classes])  # [C n, 3, S, S]; what is too many is dropped
    y = torch.tensor(list(classes), device=x.device).repeat_interleave(n)
    return x, y, [looked_at, accepted, sum(d == attempts for d in draws.values())]


@torch.no_grad()
def bake(net):
    """Fix W / sigma once: the same output as an evaluation, without the iteration. For sampling only."""
    spectral_norm(net.eval().requires_grad_(False).norms)
    net.norms = []
    return net


class ScoredGenerator:
    """The averaged generator of one checkpoint, and F. sampler(z, y) -> images, F's confidence in y (-1: not y)"""

    def __init__(self, args, generator, classifier):
        self.args, self.generator, self.classifier = args, bake(generator), classifier
        self.latent, self.device = generator.latent, next(generator.parameters()).device
        self.score = compiled(self._score, args.compile, "generator with its filter", dynamic=True)

    def _score(self, z, y):
        with autocast(self.args.precision, z.device):
            x = self.generator(z, y)  # [B, 3, S, S] in (-1, 1)
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
        self.used = Counter()  # class -> samples so far

    def latents(self, c, start, count):
        """z of the samples start .. start + count - 1 of class c. -> [count, latent]"""
        blocks = range(start // self.block, (start + count - 1) // self.block + 1)
        shape = self.block, self.sampler.latent
        z = torch.cat([torch.randn(shape, generator=distributed.generator(*self.seeds, c, b)) for b in blocks])
        return self.sigma * z[start - blocks[0] * self.block :][:count]  # the expansion trick is this product alone

    def draw(self, sizes):
        """{class: q} -> {class: (x [q, ...], confidence [q])}, all classes in one go"""
        z = torch.cat([self.latents(c, self.used[c], q) for c, q in sizes.items()])
        counts = list(sizes.values())
        drawn = self.sampler(z, torch.tensor(list(sizes)).repeat_interleave(torch.tensor(counts)))
        self.used.update(sizes)
        return dict(zip(sizes, zip(*(part.split(counts) for part in drawn), strict=True), strict=True))


def refreshed(old, new, n_classes, fraction, g):
    """Dynamic dataset recycle: keep a random (1 - r) n per class of the old set, take the first r n of the new one.

    old, new: (x, y), class by class with n each. Trap: int((1-r) n) + int(r n) can miss n by one; here it cannot.
    """
    n = len(old[1]) // n_classes
    fresh = round(fraction * n)  # r n of each class
    draws = [torch.randperm(n, generator=g)[: n - fresh] for _ in range(n_classes)]
    kept = torch.stack([c * n + rows for c, rows in enumerate(draws)])  # [C, n - fresh]
    taken = torch.arange(n_classes * n).view(n_classes, n)[:, :fresh]  # [C, fresh]
    pairs = zip(old, new, strict=True)
    return tuple(torch.cat([o[kept.to(o.device)], s[taken.to(o.device)]], 1).flatten(0, 1) for o, s in pairs)


@dataclass
class Source:
    """One generator and how it is sampled. threshold: t, or None to take every sample"""

    seed: int
    sampler: ScoredGenerator
    sigma: float = 1.0
    threshold: float | None = 0.0


class SyntheticSets:
    """The training set of each epoch: renewed every `period` epochs (0: never) to the share recycle_fraction.

    Several sources share n: each gives n // N images per class (MultiGAN), 3 x 1,333 of 4,000. seed: the classifier's.
    """

    def __init__(self, args, sources, n_classes, n, seed, period):
        self.args, self.sources, self.n_classes, self.period = args, sources, n_classes, period
        self.n, self.seed = n // len(sources), seed
        self.size = self.n * len(sources) * n_classes
        self.epochs, self.select_on = args.resnet_epochs, args.select_on
        self.k, self.sets = -1, []  # number of the current set; (x, y) of each source
        self.stats = {}  # "set GAN" -> what filtered_set tells of it

    def draw(self, source, k):
        """Set k of one source, class by class"""
        samples = Samples(source.sampler, source.sigma, self.n, (self.args.gen_seed, self.seed, source.seed, k))
        threshold = -math.inf if source.threshold is None else source.threshold
        x, y, told = filtered_set(samples.draw, range(self.n_classes), self.n, threshold, self.args.attempts)
        self.stats[f"{k} {source.seed}"] = told  # a resumed training keeps those of the sets before
        return x, y

    def at(self, epoch):
        """The images of an epoch, counted from 1 and never falling: [N, 3, S, S] in [-1, 1] and labels [N]"""
        k, r = (epoch - 1) // self.period if self.period else 0, self.args.recycle_fraction
        for j in range(max(self.k + 1, k if r == 1 else 0), k + 1):  # with r < 1 a set consists of those before it
            old, new = self.sets if r < 1 else [], [self.draw(source, j) for source in self.sources]
            g = distributed.generator(self.args.gen_seed, self.seed, "recycle", j)
            pairs = zip(old or new, new, strict=True)
            self.k, self.sets = j, [refreshed(o, s, self.n_classes, r, g) if old else s for o, s in pairs]
        return tuple(torch.cat(part) for part in zip(*self.sets, strict=True))


def n_samples(args, data):
    """n_c: from the training split, although the GAN saw the validation images too: 4,000 of CIFAR-10, not 5,000. The
    set is balanced, whatever the real one is."""
    return args.class_samples or len(data.train[1]) // data.n_classes


def load_sampler(args, run, data, classifier, seed, epoch):
    generator = loaded(make_generator(args, data), gan_file(run, seed, epoch), data.train[0].device)
    return ScoredGenerator(args, generator, classifier)


# ---------------------------------------------------------------------------------------------
# [3] search: for each GAN the checkpoint, then sigma, then the threshold; score: accuracy on validation images of a
# classifier of filtered sets that change every P = 10 epochs.
#     e* = argmax_e score(e, 1, 0);   sigma* = argmax_sigma score(e*, sigma, 0);   t* = argmax_t score(e*, sigma*, t)
# A candidate costs the training of a classifier: 36 + 21 + 10 of them one grid after the other, where all combinations
# would be 7,560. They share the classifier's seed and z_0, and differ by what is tried alone. sigma 1 and t 0 repeat
# the winner before them and are not trained again. Those of all GANs are dealt out to the processes together.
# Reads gan/, writes search/gan<s>/e<epoch>-s<sigma>-t<t>/metrics.json and search.json.


def greedy_search(seeds, grids, evaluate):
    """grids: values of (epoch, sigma, threshold); evaluate([(seed, epoch, sigma, threshold)]) -> scores, of all GANs at
    once. The first of equal scores wins. -> {seed: (epoch, sigma, threshold)}"""
    best = {seed: (None, 1.0, 0.0) for seed in seeds}
    for i, values in enumerate(grids):
        # The winner so far with each value of this grid in its place i: 0 checkpoint, 1 sigma, 2 threshold.
        tried = [(seed, *b[:i], value, *b[i + 1 :]) for seed, b in best.items() for value in values]
        scores = dict(zip(tried, evaluate(tried), strict=True))
        best = {seed: max((c for c in tried if c[0] == seed), key=scores.__getitem__)[1:] for seed in seeds}
    return best


def grids_of(args):
    return checkpoints(args), grid(*args.sigma_grid), grid(*args.threshold_grid)


def search(args, run, dist, data, classifier):
    n = n_samples(args, data)

    def scores_of(candidates):
        """Train what has not been trained, each candidate on one process; what it scored on the split that chooses"""
        missing = [c for c in candidates if not (candidate_folder(run, *c) / "metrics.json").exists()]
        distributed.barrier(dist)  # before one of these is written
        for (seed, epoch), group in itertools.groupby(distributed.my_items(missing, dist), key=lambda c: c[:2]):
            sampler = load_sampler(args, run, data, classifier, seed, epoch)
            for candidate in group:
                *_, sigma, threshold = candidate
                source, folder = Source(seed, sampler, sigma, threshold), candidate_folder(run, *candidate)
                sets = SyntheticSets(args, [source], data.n_classes, n, args.seed, args.search_period)
                about = dict(gan=seed, gan_epoch=epoch, sigma=sigma, threshold=threshold)
                train_classifier(args, run, dist, data, sets, folder, about)
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


def candidate_folder(run, seed, epoch, sigma, threshold):
    return run.path("search", f"gan{seed}", f"e{epoch}-s{sigma:g}-t{threshold:g}")


# ---------------------------------------------------------------------------------------------
# [4] final: the rows of the table, each with clf_seeds classifiers. A row adds one technique to the row before; all use
# what the search has chosen for their GAN. Apart from real, rows differ in their sets alone: run i of each has the seed
# seed + i, the same network and recipe, and n_c images per class, which MultiGAN divides among its N generators, each
# with its own e*, sigma* and t*. For a row of your own: a line in ROWS, its name in Row, and what is new in sets_of.
# Reads search.json, gan/, and of search/ the winner's run, which is the first of row expansion; writes
# classifier/runs/<row>-seed<s>/ and the best of the last row as classifier/.


@dataclass(frozen=True)
class Recipe:
    """What a row trains on. period: the flag that says after how many epochs a new set is drawn; "": never"""

    title: str
    filtered: bool = True
    period: str = ""
    expanded: bool = False
    every_gan: bool = False


ROWS = {
    "real": Recipe("real images", filtered=False),
    "baseline": Recipe("GAN images as they come, one fixed set", filtered=False),
    "filter": Recipe("+ filter"),
    "recycle": Recipe("+ recycle", period="search_period"),
    "expansion": Recipe("+ expansion", period="search_period", expanded=True),
    "single": Recipe("+ new set in every epoch: GaFi, one GAN", period="final_period", expanded=True),
    "multi": Recipe("GaFi, MultiGAN", period="final_period", expanded=True, every_gan=True),
}


def sets_of(args, data, row, i, choices, sampler):
    """The sets of run i of a row. Rows of one GAN take GAN i mod N. sampler(seed, epoch) draws."""
    recipe, sources = ROWS[row], []
    for seed in args.gan_seeds if recipe.every_gan else [args.gan_seeds[i % len(args.gan_seeds)]]:
        best = choices[str(seed)]
        sigma, t = best["sigma"] if recipe.expanded else 1.0, best["threshold"] if recipe.filtered else None
        sources.append(Source(seed, sampler(seed, best["epoch"]), sigma, t))
    period = getattr(args, recipe.period) if recipe.period else 0
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
            train_classifier(args, run, dist, data, sets, folder, about)
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
        test = accuracy(loaded(make_classifier(args, data, 0), weights, data.test[0].device), data.test, args)
        save_tensors(folder / "weights.safetensors", load_tensors(weights))
        write_json(folder / "metrics.json", read_json(search_run / "metrics.json") | about | dict(test=test))


def row_metrics(args, run, row):
    """metrics.json of every finished classifier of a row"""
    files = [row_folder(run, row, args.seed + i) / "metrics.json" for i in range(args.clf_seeds)]
    return [read_json(file) for file in files if file.exists()]


# ---------------------------------------------------------------------------------------------
# [5] evaluate: load the saved classifier, the best of the last row on the split that chooses, from its folder, score it
# on the test images (report.html says so if its training had noted another score), write pictures and tables.
# Reads classifier/, gan/, search.json; writes images/, results.json, samples.png, report.html.


def evaluate(args, run, dist, data, classifier):
    with run.timed("evaluate"):
        saved = read_json(run.path("classifier", "config.json"))
        net = ResNet(saved["classes"], saved["channels"], saved["width"], saved["blocks"])
        net = loaded(net, run.path("classifier", "model.safetensors"), dist.device)
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
                rows.append(what | dict(sigma=source.sigma, threshold=source.threshold))
                writer.save(run.path("images", file), drawn.open(drawn.of_class(c)[turn]))
    runs.write_metadata(run.path("images"), rows)
    images.samples_grid(run.path("samples.png"), list(shown.values()), list(shown), names, size=64)
    return len(rows), near_copies(run, {saved["row"]: drawn}, known, test, args.workers, run.dist.alone())


def tables(args, run, data, predicted, labels, top1, about):
    """results.json and report.html"""
    metrics, rows = {}, []
    for row in args.rows:
        found, title = row_metrics(args, run, row), ROWS[row].title
        if not found:
            rows.append([title, "not run", "", "", "", ""])
            continue
        metrics[row] = line = over_seeds([m["test"] for m in found]) | dict(images=found[0]["images"])
        line |= means(found, "val", "best_test_epoch", "accepted")  # a run of the search has no test epochs
        gap = line["gap"] = metrics["real"]["mean"] - line["mean"] if "real" in metrics else None
        below = "" if gap is None or row == "real" else f"{gap:.1f}"
        cells = [f"{line[key]:.1f}" if key in line else "" for key in ("val", "best_test_epoch")]
        accepted = "" if row in ("real", "baseline") else f"{100 * line['accepted']:.0f} %"
        rows.append([title, spread(line["per_seed"]), below, *cells, accepted])

    choices = read_json(run.path("search.json"))
    baselines = {row: metrics.pop(row) for row in ("real", "baseline") if row in metrics}
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
    dist = distributed.setup_distributed(args.device, args.deterministic)
    data = load_data(args, dist)
    check_data(args, data)

    # The device draws augmentation and GAN latents, and every kind of device has its own random numbers.
    used = dict(device=dist.device.type)
    run = runs.open_run("gafi", args, dist, SPEED_FLAGS, models=used, later=LATER, pictures=data.files)
    todo = [stage for stage in args.stages if run.todo(stage)]
    check_order(run, todo, NEEDS)
    wanted = args.gan_inception and "gan" in todo
    inception = distances.downloaded_inception(dist, "--gan-inception") if wanted else None
    if "real" in todo:
        train_real(args, run, dist, data)
    classifier = filtering_classifier(args, run, data) if set(todo) - {"real"} else None
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
