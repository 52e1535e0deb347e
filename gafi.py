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

Expect:
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

from common.cli import Fraction, Frame, Natural, Range, parse, start

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
    """learning rate of SGD with Nesterov momentum 0.9"""
    resnet_wd: Fraction = 1e-4
    """decoupled weight decay per step, on every parameter"""
    resnet_wd_mode: Literal["per_step", "lr_scaled"] = "per_step"
    """per_step: p -= wd p whatever the rate, as officially; lr_scaled: p -= lr wd p, as in AdamW"""
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
    search_share: bool = True
    """threshold step: keep the scored samples of all sets on the device for all thresholds"""
    rows: tuple[Row, ...] = ("real", "baseline", "filter", "recycle", "expansion", "single", "multi")
    """rows of the table; each adds one technique to the row before"""
    clf_seeds: Annotated[int, Range(1, 100)] = 3
    """classifiers per row, seeds seed, seed + 1, ..."""
    clf_report_best_test_epoch: bool = True
    """also score the test set at each validation and print the best of its epochs; never used to choose"""
    export_images: Many = 100
    """images per class of the saved classifier's first set that are written to images/ as PNG"""


# Comment: gap between real accuracy and the full method in points, from the paper's abstract where it gives one.
PRESETS = {
    "digits": dict(  # the offline miniature; our measured table stands in docs/gafi.md
        dataset="digits", image_size=16, val_per_class=20, random_flip=False,
        resnet_width=8, resnet_blocks=1, resnet_epochs=10, real_epochs=15, resnet_drops=(7, 9), resnet_batch=32,
        gan_seeds=(42, 137), gan_epochs=25, gan_batch=32, gan_width=8, gan_latent=16, gan_embedding="normal",
        gan_lr=1e-3, gan_ema=0.98, gan_ema_start=50, gan_monitor=5,
        ckpt_grid=(15, 25, 5), sigma_grid=(1.0, 1.5, 0.25), threshold_grid=(0.0, 0.8, 0.4), search_period=5,
        attempts=3, gen_micro_batch=200, export_images=20,
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

import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from common import datasets, distributed
from common import run as runs
from common.checkpoint import load_training, save_training

SPEED_FLAGS = ("gen_micro_batch", "search_share")

# What no stage before this one reads; it may change while the stage has not begun.
LATER = {
    "gan": "gan_ ckpt_grid",
    "search": "resnet_epochs sigma_grid threshold_grid gen_seed class_samples attempts search_period recycle_fraction "
    "select_on",
    "final": "final_period",
    "evaluate": "export_images",
}


# ---------------------------------------------------------------------------------------------
# The method: the paper's steps as plain functions. Change the idea here.


def keep_mask(probs, label, threshold):
    """Dynamic sample filtering: argmax p = c and p[c] > t, strictly. [B, C], [B] or int -> bool [B]

    t = 0 still filters: the prediction must agree.
    """
    return confidence(probs, label) > threshold


def confidence(probs, label):
    """p[c] where F predicts the intended class c, else -1: one number per sample serves every threshold. -> [B]"""
    label = torch.as_tensor(label, device=probs.device).expand(len(probs))
    p = probs.gather(1, label[:, None])[:, 0]
    return torch.where(probs.argmax(1) == label, p, -torch.ones_like(p))


def draw_size(n, m):
    """Official code: samples in the next draw of a class of which m of n are there: n, later twice what is missing."""
    return n - m if m == 0 else 2 * (n - m)


def filtered_set(samples, classes, n, threshold, attempts):
    """Primitive `generate` (Stage 3): exactly n samples of each class that pass the filter, class by class.

    samples: a SampleStream, or an object like it. attempts: -1, or after how many draws a class takes all of its last
    draw. Official code: those come after the accepted ones of the same draw, so these occur twice; kept as it is.
    -> x [len(classes) n, ...], y, {class: draws}, {class: samples looked at}
    """
    kept, m, used, draws = ({c: start() for c in classes} for start in (list, int, int, int))
    unfinished = list(classes)
    while unfinished:
        size = {c: draw_size(n, m[c]) for c in unfinished}
        samples.extend({c: used[c] + size[c] for c in unfinished})  # one batch over all classes
        for c in unfinished:
            kept[c].append(samples.accepted(c, used[c], size[c], threshold))
            draws[c] += 1
            if 0 < attempts <= draws[c]:
                kept[c].append(samples.whole(c, used[c], size[c]))
            used[c] += size[c]
            m[c] = sum(map(len, kept[c]))
        unfinished = [c for c in unfinished if m[c] < n]
    x = torch.cat([torch.cat(kept[c])[:n] for c in classes])
    return x, torch.tensor(list(classes), device=x.device).repeat_interleave(n), draws, used


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


def grid(start, stop, step):
    """Inclusive grid, rounded to 3 decimals: (1, 2, 0.05) -> 21 values"""
    return [round(start + i * step, 3) for i in range(math.floor((stop - start) / step + 1e-6) + 1)]


def checkpoints(args):
    """The epochs of --ckpt-grid that exist; official code: a grid may go on after the last epoch, as FashionMNIST's."""
    first, last, step = args.ckpt_grid
    return list(range(first, min(last, args.gan_epochs) + 1, step))


def lr_at(epoch, base, drops):
    """Official code: rate of an epoch counted from 1; a tenth from each drop on: 0.1, 0.01 from 60, 0.001 from 80."""
    return base * 0.1 ** sum(epoch >= drop for drop in drops)


def d_loss(real, fake, kind="hinge"):
    """Discriminator: mean relu(1 - real) and mean relu(1 + fake), or softplus; to be added. Logits -> two scalars"""
    if kind == "hinge":
        return F.relu(1 - real).mean(), F.relu(1 + fake).mean()
    return F.softplus(-real).mean(), F.softplus(fake).mean()


def g_loss(fake, kind="hinge"):
    """Generator: -mean fake, or mean softplus(-fake)."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


@torch.no_grad()
def ema_update(ema, new, step, start, decay):
    """In place, step counted from 1: copy while step <= start, else ema <- decay ema + (1 - decay) new.

    ema, new: lists of tensors, all of G: parameters, BatchNorm statistics and spectral-norm vectors.
    """
    floats = [(e, n) for e, n in zip(ema, new, strict=True) if e.is_floating_point()]
    if step <= start:
        torch._foreach_copy_(list(ema), list(new))
    else:
        torch._foreach_lerp_([e for e, _ in floats], [n for _, n in floats], 1 - decay)


def keras_eps(t):
    """Adam's epsilon of 1e-6 at its step t, from 1. Keras adds it outside the bias correction, PyTorch inside."""
    return 1e-6 / math.sqrt(1 - 0.999**t)


class SGDW(torch.optim.Optimizer):
    """Official code (TensorFlow-addons): p *= 1 - wd; b = 0.9 b - lr g; p += 0.9 b - lr g.

    Trap: wd is not multiplied by the rate, so at lr 0.001 it is 100 times stronger relative to the gradient than at
    0.1. The rate stands inside the buffer, so after a drop the old velocity lives on for some twenty steps.
    """

    def __init__(self, params, lr, wd, wd_mode="per_step"):
        super().__init__(params, dict(lr=lr, wd=wd, wd_mode=wd_mode))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                self.state[p].setdefault("velocity", torch.zeros_like(p))
            velocity, grads, lr = [self.state[p]["velocity"] for p in params], [p.grad for p in params], group["lr"]
            torch._foreach_mul_(params, 1 - group["wd"] * (lr if group["wd_mode"] == "lr_scaled" else 1))
            torch._foreach_mul_(velocity, 0.9)
            torch._foreach_add_(velocity, grads, alpha=-lr)
            torch._foreach_add_(params, velocity, alpha=0.9)
            torch._foreach_add_(params, grads, alpha=-lr)


# ---- augmentation of the classifier's images, on the device, each image with its own draws ---------------------


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


def augmented(x, args, g):
    """Flip, crop, cutout, in this order. [B, C, S, S] in [-1, 1]; g: generator on the device of x."""
    b, device = len(x), x.device
    if args.random_flip:
        coin = torch.rand(b, generator=g, device=device) < 0.5
        x = torch.where(coin[:, None, None, None], x.flip(3), x)
    if args.random_crop:
        pad = args.image_size // 8  # 4 of 32
        top, left = torch.randint(2 * pad + 1, (2, b), generator=g, device=device)
        x = crop(x, top, left, pad)
    if args.random_erasing:
        noise = torch.randn(x.shape, generator=g, device=device)
        x = cutout(x, noise, *cutout_boxes(b, x.shape[-1], g))
    return x


# ---- how good a generator is, on features of F ---------------------------------------------------------------


def frechet_distance(a, b):
    """||mu_a - mu_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), unbiased covariances. [N, D], [M, D] -> float"""
    a, b = a.double().cpu(), b.double().cpu()
    s_a, s_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(s_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + s_a.trace() + s_b.trace() - 2 * cross).item()


def kernel_distance(a, b):
    """Unbiased MMD^2 with the kernel (x.y / D + 1)^3. [N, D], [M, D] -> float"""
    a, b = a.double(), b.double()
    k_aa, k_bb, k_ab = (((x @ y.T) / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (k_aa, k_bb)]
    return (within[0] + within[1] - 2 * k_ab.mean()).item()


def inception_score(probs):
    """exp(mean KL(p || mean p)), one split. [N, C] -> float"""
    p = probs.double().clamp(min=1e-30)
    return (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()


# ---------------------------------------------------------------------------------------------
# The networks (Sec. 5 of the method's description; all of them start from scratch).


def power_iteration(weight, u):
    """One iteration: v = n(W^T u), u' = n(W v), sigma = u'.(W v), W flattened to [out, rest]. -> sigma, u'

    Gradients reach sigma through W alone; u' and v count as constants.
    """
    with torch.autocast(weight.device.type, enabled=False):
        w = weight.flatten(1)
        with torch.no_grad():
            v = w.T @ u
            v = v / (v.norm() + 1e-12)
            u = w @ v
            u = u / (u.norm() + 1e-12)
        return u @ (w @ v), u


class Spectral:
    """Mix-in of a layer with `weight`: the layer uses W / sigma, with orthogonal W at the start.

    Official code: evaluation performs the iteration too, from the stored u, but does not store its result.
    """

    def start(self):
        nn.init.orthogonal_(self.weight)
        if getattr(self, "bias", None) is not None:
            nn.init.zeros_(self.bias)
        self.register_buffer("u", F.normalize(torch.rand(len(self.weight)) * 2 - 1, dim=0))
        self.baked = None

    def w_bar(self):
        if self.baked is not None:
            return self.baked
        sigma, u = power_iteration(self.weight, self.u)
        if self.training:
            self.u.copy_(u)
        return self.weight / sigma

    @torch.no_grad()
    def bake(self):
        """Fix W / sigma once: the same output as an evaluation, without the iteration. For sampling only."""
        self.baked = None
        self.baked = self.eval().w_bar()


class SNConv(Spectral, nn.Conv2d):
    def __init__(self, n_in, n_out, kernel, bias=True):
        super().__init__(n_in, n_out, kernel, padding=kernel // 2, bias=bias)
        self.start()

    def forward(self, x):
        return F.conv2d(x, self.w_bar(), self.bias, padding=self.padding)


class SNLinear(Spectral, nn.Linear):
    def __init__(self, n_in, n_out, bias=True):
        super().__init__(n_in, n_out, bias=bias)
        self.start()

    def forward(self, x):
        return F.linear(x, self.w_bar(), self.bias)


class SNEmbedding(Spectral, nn.Embedding):
    def __init__(self, n, dim):
        super().__init__(n, dim)
        self.start()

    def forward(self, y):
        return F.embedding(y, self.w_bar())


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
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            SNConv(c, h, 1),
            SNConv(h, h, 3),
            SNConv(h, h, 3),
            SNConv(h, c, 1),
        )
        self.skip = SNConv(c, c, 1)

    def upsampled(self, x):
        return F.interpolate(x, scale_factor=2) if self.up else x

    def forward(self, x, c):
        h = self.conv1(F.relu(self.cbn1(x, c)))
        h = self.conv2(self.upsampled(F.relu(self.cbn2(h, c))))
        h = self.conv3(F.relu(self.cbn3(h, c)))
        h = self.conv4(F.relu(self.cbn4(h, c)))
        return h + self.upsampled(
            self.skip(x)
        )  # a 1x1 convolution and nearest upsampling commute: a quarter of the cost


class Generator(nn.Module):
    """BigGAN-deep, StudioGAN's variant: z [B, latent], y [B] -> images [B, channels, 32, 32] in (-1, 1)

    size: 32 as in the paper, or another multiple of 8; the first feature map then has size / 8 pixels per side.
    """

    def __init__(self, n_classes, channels=3, width=128, latent=128, embedding=128, start="uniform", size=32):
        super().__init__()
        self.latent, self.channels, self.side, c = latent, 4 * width, size // 8, latent + embedding
        self.embed = nn.Embedding(n_classes, embedding)
        if start == "uniform":  # Keras' default
            nn.init.uniform_(self.embed.weight, -0.05, 0.05)
        self.first = SNLinear(c, self.channels * self.side**2)
        self.blocks = nn.ModuleDict(
            {f"b{s}{k}": GBlock(self.channels, c, up=k == 1) for s in range(3) for k in range(2)}
        )
        self.attn = Attention(self.channels)
        self.last_bn, self.last = nn.BatchNorm2d(self.channels), SNConv(self.channels, channels, 3)

    def forward(self, z, y):
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
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            SNConv(n_in, h, 1), SNConv(h, h, 3), SNConv(h, h, 3), SNConv(h, n_out, 1),
        )  # fmt: skip
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
        self.first = SNConv(channels, width, 3)
        n_in = [width, c, c, c, c, c]
        names = [f"b{s}{k}" for s in range(3) for k in range(2)]
        self.blocks = nn.ModuleDict(
            {name: DBlock(n, c, down=name in ("b00", "b10")) for name, n in zip(names, n_in, strict=True)}
        )
        self.attn = Attention(c)
        self.out, self.embed = SNLinear(c, 1), SNEmbedding(n_classes, c)

    def forward(self, x, y):
        x = self.first(x)
        for name, block in self.blocks.items():
            x = block(x)
            if name == "b01":
                x = self.attn(x)  # at 16 x 16
        h = F.relu(x).float().sum((2, 3))  # [B, C]
        with torch.autocast(x.device.type, enabled=False):
            return self.out(h)[:, 0] + (self.embed(y) * h).sum(1)


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


class BigGAN:
    """Generator, its average, discriminator and one Adam for both (a parameter without gradient is left alone)."""

    def __init__(self, args, n_classes, channels, seed, device):
        seed_global(distributed.seed_of(seed, "gan"))
        self.args = args
        place = dict(device=device, memory_format=torch.channels_last)
        self.g = make_generator(args, n_classes, channels).to(**place)
        self.d = Discriminator(n_classes, channels, args.gan_width).to(**place)
        self.ema = make_generator(args, n_classes, channels).to(**place).requires_grad_(False)
        self.ema.load_state_dict(self.g.state_dict())
        self.g_params, self.d_params = list(self.g.parameters()), list(self.d.parameters())
        fused = dict(fused=True) if device.type == "cuda" else dict(foreach=True)
        self.optimizer = torch.optim.Adam(self.d_params + self.g_params, lr=args.gan_lr, betas=(0.5, 0.999), **fused)
        self.pair = list(self.ema.state_dict().values()), list(self.g.state_dict().values())
        self.d_losses, self.g_losses = self._d_losses, self._g_losses
        if args.compile:
            self.d_losses, self.g_losses = torch.compile(self._d_losses), torch.compile(self._g_losses)

    def _d_losses(self, z, x, y):
        with mixed(self.args.gan_precision, x.device):
            with torch.no_grad():
                fake = self.g(z, y)  # the fake labels are those of the real batch
            on_fake, on_real = self.d(torch.cat([fake, x]), torch.cat([y, y])).chunk(2)  # one forward for both
        return d_loss(on_real, on_fake, self.args.gan_loss)

    def _g_losses(self, z, y):
        with mixed(self.args.gan_precision, z.device):
            return g_loss(self.d(self.g(z, y), y), self.args.gan_loss)

    def step(self, x, y, zs, number):
        """One training step: gan_d_steps updates of D on the same real batch, one of G, one of the average.

        x [B, C, 32, 32], y [B], zs: latents of each update, G's last; number: of the step, from 1. -> losses [2 S + 1]
        """
        self.g.train(), self.d.train()
        losses = []
        for i, z in enumerate(zs[:-1], 1):
            pair = self.d_losses(z, x, y)
            self.update(pair[0] + pair[1], self.d_params, (number - 1) * (len(zs) - 1) + i)
            losses += pair
        self.d.requires_grad_(False)  # its spectral-norm vectors move all the same
        losses.append(self.g_losses(zs[-1], y))
        self.update(losses[-1], self.g_params, number)
        self.d.requires_grad_(True)
        ema_update(*self.pair, number, self.args.gan_ema_start, self.args.gan_ema)
        return torch.stack([loss.detach() for loss in losses])

    def update(self, loss, params, t):
        self.optimizer.param_groups[0]["eps"] = keras_eps(t)
        for p, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = grad
        self.optimizer.step()
        for p in params:
            p.grad = None

    def state(self):
        """{name: tensor} of all three networks, live"""
        nets = dict(g=self.g, d=self.d, ema=self.ema)
        return {f"{k}.{n}": t for k, net in nets.items() for n, t in net.state_dict().items()}


def make_generator(args, n_classes, channels):
    latent, size = args.gan_latent, args.image_size
    return Generator(n_classes, channels, args.gan_width, latent, latent, args.gan_embedding, size)


def seed_global(seed, device=None):
    """Seed the generators that library code draws from. torch.manual_seed would also queue a call, with its whole stack
    as text, for each GPU that was never used: a millisecond for every image."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)


def mixed(precision, device):
    """Mixed precision for the forward passes of training and evaluation."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


# ---------------------------------------------------------------------------------------------
# Stage 0, data: every split as one uint8 tensor [N, C, 32, 32] on the device.


def prepared(image, channels, size=32, pad=False):
    """PIL image -> uint8 [channels, size, size]. pad: zeros around it (FashionMNIST, 28 -> 32), so that the border
    becomes -1; everything else is resized by Lanczos (shorter side to size) and cropped in the centre."""
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


def normalised_images(x):
    """uint8 [..., H, W] -> (x / 255 - 0.5) / 0.5, every data set and every network"""
    return (x.float() / 255 - 0.5) / 0.5


def load_data(args, dist):
    """-> ({"train", "val", "test": (uint8 [N, C, 32, 32], labels [N])}, class names), all on the device"""
    channels = 1 if args.dataset in ("digits", "fashionmnist") else 3
    if args.dataset == "dermamnist":
        splits, names = dermamnist(Path(args.data_dir or "data").expanduser(), args.image_size)
        return {k: (x.to(dist.device), y.to(dist.device)) for k, (x, y) in splits.items()}, names

    data = datasets.load_dataset("folder" if args.dataset == "cinic10" else args.dataset, args.data_dir)
    if data.note:
        distributed.say(dist, data.note)
    train, val = data.train, data.val
    if args.dataset == "cinic10" and val is not None:  # train and valid are pooled and divided anew: 170k, 10k
        train, val = train + val, None
    if val is None:
        train, val = datasets.hold_out(train, args.val_per_class, args.seed)
    splits = {}
    for name, images in (("train", train), ("val", val), ("test", data.test)):
        if args.dataset == "folder":
            datasets.verify(images)
        x = all_pixels(images, channels, args.image_size, pad=args.dataset == "fashionmnist", workers=args.workers)
        splits[name] = x.to(dist.device), torch.tensor(images.labels, device=dist.device)
    return splits, data.class_names


def all_pixels(images, channels, size, pad, workers):
    """datasets.Images -> uint8 [N, channels, size, size]"""
    if images.pixels is not None and images.pixels.shape[1:3] == (size, size):
        x = torch.from_numpy(images.pixels)
        return (x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)).contiguous()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return torch.stack(list(pool.map(lambda i: prepared(images[i], channels, size, pad), range(len(images)))))


def data_hash(data, class_names):
    """Of every pixel, label and class name in their order: a run does not go on with other data than it began with."""
    found = hashlib.sha256(json.dumps(class_names).encode())
    for split, (x, y) in data.items():
        found.update(f"{split} {tuple(x.shape)}".encode())
        found.update(np.ascontiguousarray(x.cpu().numpy())), found.update(y.cpu().numpy())
    return found.hexdigest()[:16]


DERMAMNIST = (
    "actinic keratoses", "basal cell carcinoma", "benign keratosis", "dermatofibroma", "melanoma", "melanocytic nevi",
    "vascular lesions",
)  # fmt: skip


def dermamnist(root, size):
    """dermamnist.npz of MedMNIST v2 (28 x 28), fetched by the package medmnist if it is not there. Official split."""
    file = root / "dermamnist.npz"
    if not file.exists():
        try:
            import medmnist
        except ImportError as error:
            raise runs.UserError(f"{file}: no such file; put it there, or pip install medmnist to fetch it") from error
        root.mkdir(parents=True, exist_ok=True)
        medmnist.DermaMNIST(split="train", download=True, root=str(root))
    arrays, splits = np.load(file), {}
    for split in ("train", "val", "test"):
        x = [prepared(Image.fromarray(image), 3, size) for image in arrays[f"{split}_images"]]
        splits[split] = torch.stack(x), torch.from_numpy(arrays[f"{split}_labels"].astype(np.int64).reshape(-1))
    return splits, list(DERMAMNIST)


# ---------------------------------------------------------------------------------------------
# Stage 3, samples: from a generator, scored by F, filtered, renewed.


def device_generator(device, *parts):
    """Generator on the device, seeded by what it is for: random numbers are drawn where they are used."""
    return torch.Generator(device).manual_seed(distributed.seed_of(*parts))


class ScoredGenerator:
    """The averaged generator of one checkpoint and F. sampler(z, y) -> images, F's confidence in y (-1: not y)"""

    def __init__(self, args, generator, classifier):
        self.args, self.generator, self.classifier = args, generator.eval().requires_grad_(False), classifier
        for module in self.generator.modules():
            if isinstance(module, Spectral):
                module.bake()
        self.score = torch.compile(self._score, dynamic=True) if args.compile else self._score

    def _score(self, z, y):
        with mixed(self.args.precision, z.device):
            x = self.generator(z, y)
            if self.args.precision == "bf16":
                x = x.bfloat16()  # a set of 40,000 images then takes 246 MB
            return x, confidence(self.classifier(x).softmax(1), y)

    @torch.no_grad()
    def __call__(self, z, y):
        parts = [self.score(*part) for part in zip(*(t.split(self.args.gen_micro_batch) for t in (z, y)), strict=True)]
        return torch.cat([x for x, _ in parts]), torch.cat([conf for _, conf in parts])


class SampleStream:
    """Endless row of samples of each class: sample i of class c is a function of (seeds, c, i), sigma and G.

    Samples are computed once, so that every threshold reads the same ones. Of those with a confidence up to `floor`,
    the lowest threshold that will be asked for, only the confidence is kept. Expansion trick: z = sigma z_0, with the
    same z_0 for every sigma.
    """

    def __init__(self, sampler, sigma, block, seeds, floor=-math.inf):
        self.sampler, self.sigma, self.block, self.seeds, self.floor = sampler, sigma, block, seeds, floor
        self.x, self.conf = {}, {}  # class -> its samples above the floor; the confidence of all its samples

    def latents(self, c, start, count):
        """z of the samples start .. start + count - 1 of class c, drawn in blocks. -> [count, latent]"""
        blocks = range(start // self.block, (start + count - 1) // self.block + 1)
        shape = (self.block, self.sampler.generator.latent)
        z = torch.cat([torch.randn(shape, generator=distributed.generator(*self.seeds, c, b)) for b in blocks])
        return self.sigma * z[start - blocks[0] * self.block :][:count]

    def extend(self, wanted):
        """{class: number of samples that must be there}: computes what is missing, all classes in one go."""
        missing = {c: (len(self.conf.get(c, ())), total) for c, total in wanted.items()}
        missing = {c: (have, total - have) for c, (have, total) in missing.items() if total > have}
        if not missing:
            return
        counts = [count for _, count in missing.values()]
        x, conf = self.samples({c: range(have, have + count) for c, (have, count) in missing.items()})
        for c, more_x, more_conf in zip(missing, x.split(counts), conf.split(counts), strict=True):
            more_x = more_x[more_conf > self.floor]
            self.x[c] = torch.cat([self.x[c], more_x]) if c in self.x else more_x
            self.conf[c] = torch.cat([self.conf[c], more_conf]) if c in self.conf else more_conf

    def samples(self, which):
        """{class: range of numbers} -> images, confidences"""
        device = next(self.sampler.generator.parameters()).device
        z = torch.cat([self.latents(c, part.start, len(part)) for c, part in which.items()])
        y = torch.tensor(list(which)).repeat_interleave(torch.tensor([len(part) for part in which.values()]))
        return self.sampler(z.to(device), y.to(device))

    def accepted(self, c, start, count, threshold):
        """Of the samples start .. start + count - 1 of class c those with a confidence above the threshold, >= floor"""
        kept = self.conf[c] > self.floor
        first, conf = int(kept[:start].sum()), self.conf[c][start : start + count]
        conf = conf[kept[start : start + count]]
        return self.x[c][first : first + len(conf)][conf > threshold]

    def whole(self, c, start, count):
        """All of them, rejected ones too: made again, as officially"""
        return self.samples({c: range(start, start + count)})[0]


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

    Several sources share n: each gives n // N images per class (MultiGAN). shared: a dict in which the streams of all
    sets are kept for the next object that is given it (the threshold step of the search).
    """

    def __init__(self, args, sources, n_classes, n, seed, period, shared=None):
        self.args, self.sources, self.n_classes, self.period = args, sources, n_classes, period
        self.n, self.seed, self.shared = n // len(sources), seed, shared
        self.k, self.sets = None, []  # number of the current set; (x, y) of each source
        self.stats = {}  # "set GAN" -> [samples looked at, samples accepted, classes that reached the limit]

    def draw(self, source, k):
        """Set k of one source, class by class"""
        seeds = (self.args.gen_seed, self.seed, source.seed, k)
        key, threshold = (*seeds, source.sigma), source.threshold if source.filtered else -math.inf
        floor = threshold if self.shared is None else min(grid(*self.args.threshold_grid))
        stream = (self.shared or {}).get(key) or SampleStream(source.sampler, source.sigma, self.n, seeds, floor)
        if self.shared is not None:
            self.shared[key] = stream
        x, y, draws, used = filtered_set(stream, range(self.n_classes), self.n, threshold, self.args.attempts)
        conf = torch.cat([stream.conf[c][:n] for c, n in used.items()])
        exhausted = sum(0 < self.args.attempts <= d for d in draws.values())
        self.stats[f"{k} {source.seed}"] = [len(conf), int((conf > threshold).sum()), exhausted]
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


class RealSet:
    """The real training images, the same in every epoch."""

    def __init__(self, split):
        self.x, self.y = normalised_images(split[0]), split[1]

    def at(self, epoch):
        return self.x, self.y


# ---------------------------------------------------------------------------------------------
# Stage 4, the classifier on a training set. Its score on synthetic sets is CAS, the classification accuracy score.


def make_classifier(args, n_classes, channels, seed):
    seed_global(distributed.seed_of(seed, "classifier"))
    return ResNet(n_classes, channels, args.resnet_width, args.resnet_blocks)


@torch.no_grad()
def predictions(net, x, args):
    """uint8 [N, C, 32, 32] -> predicted classes [N]"""
    net.eval()
    with mixed(args.precision, x.device):
        return torch.cat([net(normalised_images(part)).argmax(1) for part in x.split(1000)])


def accuracy(net, split, args):
    """Percent of a split (uint8 images, labels) that net gets right"""
    return 100 * (predictions(net, split[0], args) == split[1]).sum().item() / len(split[1])


def train_classifier(args, run, sets, data, n_classes, epochs, seed, folder, about, select_on):
    """Train one ResNet on sets.at(epoch), keep the weights of the epoch that select_on, "val" or "test", likes best.

    Writes <folder>/weights.safetensors and metrics.json; does nothing if that is there. about: what to record.
    """
    file, checkpoint = folder / "metrics.json", folder / "checkpoint.safetensors"
    if file.exists():
        return
    device, channels = data["train"][0].device, data["train"][0].shape[1]
    net = make_classifier(args, n_classes, channels, seed).to(device, memory_format=torch.channels_last)
    fast = torch.compile(net, dynamic=True) if args.compile else net
    optimizer = SGDW(net.parameters(), args.resnet_lr, args.resnet_wd, args.resnet_wd_mode)
    weights = net.state_dict()
    first, extra, best_weights = load_training(checkpoint, weights, optimizer)
    best, history, stats = extra or (dict(score=-1.0), [], {})
    if stats:
        sets.stats = stats
    with_test = args.clf_report_best_test_epoch or select_on == "test"

    for epoch in range(first + 1, epochs + 1):
        x, y = sets.at(epoch)
        g = device_generator(device, seed, "epoch", epoch)
        optimizer.param_groups[0]["lr"] = lr_at(epoch, args.resnet_lr, args.resnet_drops)
        loss_sum, net = torch.zeros((), device=device), net.train()
        for rows in torch.randperm(len(y), generator=g, device=device).split(args.resnet_batch):
            images = augmented(x[rows].float(), args, g)
            with mixed(args.precision, device):
                logits = fast(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach() * len(rows)

        row = dict(epoch=epoch, loss=loss_sum.item() / len(y), val=accuracy(net, data["val"], args))
        runs.check_finite(row["loss"], f"{folder.relative_to(run.dir)}, epoch {epoch}")
        if with_test:
            row["test"] = accuracy(net, data["test"], args)
        history.append(row)
        if row[select_on] > best["score"]:
            best = dict(score=row[select_on], epoch=epoch, val=row["val"])
            best_weights = {n: t.detach().cpu().clone() for n, t in weights.items()}
        if epoch % max(1, epochs // 10) == 0 and epoch < epochs:
            save_training(
                checkpoint, weights, optimizer, epoch, (best, history, getattr(sets, "stats", {})), best_weights
            )

    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(best_weights[name])
    report = about | dict(seed=seed, history=history, **best, test=accuracy(net, data["test"], args))
    if with_test:
        report["best_test_epoch"] = max(row["test"] for row in history)
    if isinstance(sets, SyntheticSets):
        drawn, kept, exhausted = map(sum, zip(*sets.stats.values(), strict=True))
        report |= dict(drawn=drawn, accepted=kept / drawn, exhausted=exhausted)
        if exhausted:
            print(f"note: {folder.relative_to(run.dir)}: {exhausted} times a class reached {args.attempts} draws")
    runs.save_tensors(folder / "weights.safetensors", best_weights)
    runs.write_json(file, report)
    checkpoint.unlink(missing_ok=True)


def read_json(path):
    return json.loads(path.read_text())


# ---------------------------------------------------------------------------------------------
# [1] real: the reference, and F, which is its first seed (Stage 1).
# Reads the real training split, writes classifier/runs/real-seed<s>/.


def train_real(args, run, dist, data, n_classes):
    sets = RealSet(data["train"])
    seeds = [args.seed + i for i in range(args.clf_seeds if "real" in args.rows else 1)]
    with run.timed("real", memory_flag="--resnet-batch"):
        for seed in distributed.my_items(seeds, dist):
            folder = run.path("classifier", "runs", f"real-seed{seed}")
            about = dict(row="real", images=len(data["train"][1]))
            # Official code: F, and with it the real reference, is chosen on validation images in every case.
            train_classifier(args, run, sets, data, n_classes, args.real_epochs, seed, folder, about, "val")
    run.done("real", classifiers=len(seeds))


def filtering_classifier(args, run, data, n_classes):
    """F: frozen, in evaluation mode; it has seen the real training split only."""
    file = run.path("classifier", "runs", f"real-seed{args.seed}", "weights.safetensors")
    if not file.exists():
        raise runs.UserError(f"{file}: F is not there yet; run the stage real first")
    net = make_classifier(args, n_classes, data["train"][0].shape[1], args.seed)
    net.load_state_dict(runs.load_tensors(file))
    return net.to(data["train"][0].device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------
# [2] gan: one BigGAN-deep per seed, each the work of one process (Stage 2).
# Reads the real images, writes gan/seed<s>/epoch<e>.safetensors, the averaged generator at each epoch of the grid.


def gan_file(run, seed, epoch):
    return run.path("gan", f"seed{seed}", f"epoch{epoch}.safetensors")


def train_gans(args, run, dist, data, n_classes, classifier, inception):
    with run.timed("gan", memory_flag="--gan-batch"):
        for seed in distributed.my_items(args.gan_seeds, dist):
            train_gan(args, run, dist, data, n_classes, classifier, seed, inception)
    run.done("gan", generators=len(args.gan_seeds))


def train_gan(args, run, dist, data, n_classes, classifier, seed, inception):
    if gan_file(run, seed, args.gan_epochs).exists():
        return
    parts = [data["train"], data["val"]] if args.gan_images == "train+val" else [data["train"]]
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    device, b = images.device, args.gan_batch
    steps = len(labels) // b  # the last incomplete batch is dropped
    gan = BigGAN(args, n_classes, images.shape[1], seed, device)
    state, checkpoint = gan.state(), run.path("gan", f"seed{seed}", "checkpoint.safetensors")
    first, _, _ = load_training(checkpoint, state, gan.optimizer)
    wanted = {*checkpoints(args), args.gan_epochs}
    bar = distributed.progress(args.gan_epochs * steps, f"gan {seed}", dist, initial=first * steps, unit="steps")

    for epoch in range(first + 1, args.gan_epochs + 1):
        g = device_generator(device, seed, "gan", epoch)
        order = torch.randperm(len(labels), generator=g, device=device)
        total = torch.zeros(2 * args.gan_d_steps + 1, device=device)  # read once per epoch: the loop never waits
        for i in range(steps):
            rows = order[i * b : (i + 1) * b]
            x, y = normalised_images(images[rows]), labels[rows]
            if args.random_flip:
                coin = torch.rand(b, generator=g, device=device) < 0.5
                x = torch.where(coin[:, None, None, None], x.flip(3), x)
            zs = torch.randn(args.gan_d_steps + 1, b, args.gan_latent, generator=g, device=device)
            total += gan.step(x, y, list(zs), (epoch - 1) * steps + i + 1)
            bar.update(1)

        *d, g_mean = (total / steps).tolist()
        runs.check_finite(sum(d) + g_mean, f"gan, seed {seed}, epoch {epoch}")
        row = dict(d_real=np.mean(d[0::2]), d_fake=np.mean(d[1::2]), g=g_mean)
        if epoch % args.gan_monitor == 0 or epoch == args.gan_epochs:
            row |= measured(args, gan.ema, classifier, data["val"], n_classes, seed, inception)
        run.log(epoch, **{f"gan/seed{seed}/{k}": v for k, v in row.items()})
        bar.set_postfix(d=f"{row['d_real'] + row['d_fake']:.2f}", g=f"{g_mean:.2f}")
        if epoch in wanted:
            tensors = {k: v for k, v in gan.ema.state_dict().items()}
            runs.save_tensors(gan_file(run, seed, epoch), tensors)
        if epoch < args.gan_epochs:
            save_training(checkpoint, state, gan.optimizer, epoch)
    bar.close()
    checkpoint.unlink(missing_ok=True)


def inception_metrics(device):
    """torchmetrics' FID and IS with their Inception network. Raises UserError when it cannot be had."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore

        fid = FrechetInceptionDistance(normalize=True, reset_real_features=False)
        return fid.to(device), InceptionScore(normalize=True).to(device)
    except ModuleNotFoundError as error:
        raise runs.UserError("--gan-inception: pip install torchmetrics torch-fidelity") from error
    except OSError as error:  # urllib's errors are
        raise runs.UserError(f"--gan-inception: the weights of Inception could not be downloaded ({error})") from error


@torch.no_grad()
def inception_figures(metrics, real, fake):
    """FID of fake to real and IS of fake. metrics: of inception_metrics; images [N, C, H, W] in [-1, 1] -> dict

    The real images go through Inception at the first call only; later ones must come with the same.
    """
    fid, score = metrics
    fid.reset(), score.reset()
    seen = int(fid.real_features_num_samples) > 0
    for images, is_real in ((fake, False),) if seen else ((real, True), (fake, False)):
        for part in images.split(100):
            part = (part.float() / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)  # grey images get three channels
            fid.update(part, real=is_real)
            if not is_real:
                score.update(part)
    return dict(fid=fid.compute().item(), inception_score=score.compute()[0].item())


@torch.no_grad()
def measured(args, generator, classifier, real, n_classes, seed, inception=None):
    """Frechet and kernel distance to the validation images and a score like IS, all on features of F; F's acceptance.

    Not comparable with FID and IS of the literature, whose features come from an ImageNet network; these come with
    inception, the metrics of inception_metrics. As many samples as validation images (10,000 at most), with the same
    latents every time. FID falls with the number of images: the literature takes 50,000.
    """
    n, device = min(len(real[1]), 10_000), real[0].device
    z = torch.randn(n, args.gan_latent, generator=distributed.generator(seed, "monitor")).to(device)
    y = torch.arange(n, device=device) % n_classes
    x = torch.cat([generator.eval()(*p) for p in zip(z.split(500), y.split(500), strict=True)])
    fake = torch.cat([classifier.features(part) for part in x.split(500)])
    true = torch.cat([classifier.features(normalised_images(part)) for part in real[0][:n].split(500)])
    probs = classifier.fc(fake).softmax(1)
    distances = dict(frechet=frechet_distance(true, fake), kernel=kernel_distance(true, fake))
    if inception:
        distances |= inception_figures(inception, normalised_images(real[0][:n]), x)
    return distances | dict(score=inception_score(probs), accepted=keep_mask(probs, y, 0).float().mean().item())


def load_sampler(args, run, seed, epoch, classifier, n_classes, channels):
    generator = make_generator(args, n_classes, channels)
    generator.load_state_dict(runs.load_tensors(gan_file(run, seed, epoch)))
    device = next(classifier.parameters()).device
    return ScoredGenerator(args, generator.to(device, memory_format=torch.channels_last), classifier)


# ---------------------------------------------------------------------------------------------
# [3] search: greedy, for each GAN: checkpoint, then sigma, then threshold (Stage 5, steps 1 to 3).
# Reads gan/, writes search/gan<s>/e<epoch>-s<sigma>-t<t>/metrics.json and search.json; candidates are shared out.


def greedy_search(grids, evaluate):
    """Stage 5 for one GAN. grids: {"epoch", "sigma", "threshold": values}; evaluate(list of configurations) -> scores.

    A configuration is (epoch, sigma, threshold); the first of equal scores wins. -> best configuration
    """
    best = [None, 1.0, 0.0]
    for i, name in enumerate(("epoch", "sigma", "threshold")):
        candidates = [tuple(value if j == i else best[j] for j in range(3)) for value in grids[name]]
        scores = evaluate(candidates)
        best = list(candidates[max(range(len(scores)), key=scores.__getitem__)])
    return tuple(best)


def n_samples(args, data, n_classes):
    """n_c: from the training split, although the GAN saw the validation images too; the set is balanced always"""
    return args.class_samples or len(data["train"][1]) // n_classes


def search(args, run, dist, data, n_classes, classifier):
    n, channels = n_samples(args, data, n_classes), data["train"][0].shape[1]
    choices = {}
    with run.timed("search", memory_flag="--gen-micro-batch"):
        for seed in args.gan_seeds:
            grids = dict(epoch=checkpoints(args), sigma=grid(*args.sigma_grid), threshold=grid(*args.threshold_grid))

            def evaluate(candidates, seed=seed):
                files = [candidate_folder(run, seed, c) for c in candidates]
                shared, samplers = {}, {}
                same = len({c[:2] for c in candidates}) == 1 and args.search_share  # the threshold step
                for (e, sigma, t), folder in distributed.my_items(list(zip(candidates, files, strict=True)), dist):
                    if (folder / "metrics.json").exists():
                        continue
                    if e not in samplers:
                        samplers = {e: load_sampler(args, run, seed, e, classifier, n_classes, channels)}
                    source = Source(seed, samplers[e], sigma, t)
                    sets = SyntheticSets(
                        args, [source], n_classes, n, args.seed, args.search_period, shared if same else None
                    )
                    about = dict(gan=seed, gan_epoch=e, sigma=sigma, threshold=t)
                    how = args.resnet_epochs, args.seed, folder, about, args.select_on
                    train_classifier(args, run, sets, data, n_classes, *how)
                distributed.barrier(dist)
                scores = [read_json(folder / "metrics.json")["score"] for folder in files]
                distributed.barrier(dist)
                for folder in files if dist.main else ():  # only the winner's weights have a use
                    if folder != files[scores.index(max(scores))]:
                        (folder / "weights.safetensors").unlink(missing_ok=True)
                distributed.say(dist, f"  GAN {seed}: " + ", ".join(map(shown, candidates, scores)))
                return scores

            e, sigma, t = greedy_search(grids, evaluate)
            choices[str(seed)] = dict(epoch=e, sigma=sigma, threshold=t)
        if dist.main:
            runs.write_json(run.path("search.json"), choices)
    run.done("search", choices=choices)


def candidate_folder(run, seed, candidate):
    """Where a configuration (epoch, sigma, threshold) of a GAN is tried."""
    return run.path("search", f"gan{seed}", "e{}-s{:g}-t{:g}".format(*candidate))


def shown(candidate, score):
    return "epoch {} sigma {:.2f} t {:.1f}: ".format(*candidate) + f"{score:.1f}"


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
        threshold = best["threshold"] if filtered else 0.0
        sources.append(Source(seed, sampler(seed, best["epoch"]), sigma, threshold, filtered))
    periods = dict(baseline=0, filter=0, single=args.final_period, multi=args.final_period)
    return sources, periods.get(row, args.search_period)


def final(args, run, dist, data, n_classes, classifier):
    n, channels, choices = (
        n_samples(args, data, n_classes),
        data["train"][0].shape[1],
        read_json(run.path("search.json")),
    )
    todo = [(row, i) for row in args.rows if row != "real" for i in range(args.clf_seeds)]
    samplers = {}

    def sampler(seed, epoch):
        if seed not in samplers:
            samplers[seed] = load_sampler(args, run, seed, epoch, classifier, n_classes, channels)
        return samplers[seed]

    with run.timed("final", memory_flag="--gen-micro-batch"):
        for row, i in distributed.my_items(todo, dist):
            sources, period = sources_of(args, row, i, choices, sampler)
            seed = args.seed + i
            sets = SyntheticSets(args, sources, n_classes, n, seed, period)
            folder = run.path("classifier", "runs", f"{row}-seed{seed}")
            about = dict(
                row=row, gans=[s.seed for s in sources], period=period, images=sets.n * len(sources) * n_classes
            )
            if row == "expansion" and i == 0:
                best = choices[str(sources[0].seed)]
                take_over(candidate_folder(run, sources[0].seed, best.values()), folder, about)
            how = args.resnet_epochs, seed, folder, about, args.select_on
            train_classifier(args, run, sets, data, n_classes, *how)
        distributed.barrier(dist)
        if dist.main:
            best = max(row_metrics(args, run, args.rows[-1]), key=lambda m: (m["score"], -m["seed"]))
            weights = runs.load_tensors(
                run.path("classifier", "runs", f"{best['row']}-seed{best['seed']}", "weights.safetensors")
            )
            runs.save_tensors(run.path("classifier", "model.safetensors"), weights)
            shape = dict(width=args.resnet_width, blocks=args.resnet_blocks, channels=channels, classes=n_classes)
            runs.write_json(run.path("classifier", "config.json"), shape | dict(row=best["row"], seed=best["seed"]))
    run.done("final", classifiers=len(todo))


def take_over(search_run, folder, about):
    """A run of the search as one of a row: what train_classifier would write, to the last figure."""
    weights = search_run / "weights.safetensors"
    if weights.exists() and not (folder / "metrics.json").exists():
        runs.save_tensors(folder / "weights.safetensors", runs.load_tensors(weights))
        runs.write_json(folder / "metrics.json", read_json(search_run / "metrics.json") | about)


def row_metrics(args, run, row):
    """metrics.json of every finished classifier of a row"""
    files = [
        run.path("classifier", "runs", f"{row}-seed{args.seed + i}", "metrics.json") for i in range(args.clf_seeds)
    ]
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


def score_and_report(args, run, dist, data, n_classes, class_names, classifier):
    file = run.path("classifier", "config.json")
    if not file.exists():
        raise runs.UserError(f"{file}: no classifier yet; run the stage final first")
    with run.timed("evaluate"):
        about = read_json(file)
        net = ResNet(about["classes"], about["channels"], about["width"], about["blocks"])
        net.load_state_dict(runs.load_tensors(run.path("classifier", "model.safetensors")))
        predicted = predictions(net.to(dist.device), data["test"][0], args).cpu()
        labels = data["test"][1].cpu()
        top1 = 100 * (predicted == labels).float().mean().item()
        recorded = read_json(run.path("classifier", "runs", f"{about['row']}-seed{about['seed']}", "metrics.json"))[
            "test"
        ]
        if abs(top1 - recorded) > 0.5:
            raise RuntimeError(f"classifier/ scores {top1:.2f} after loading, {recorded:.2f} when it was trained")
        if dist.main:
            pictures(args, run, data, n_classes, class_names, classifier)
            tables(args, run, class_names, predicted, labels, top1)
    run.done("evaluate", top1=top1)


def as_picture(x):
    """[-1, 1] [C, 32, 32] -> uint8 [3, 32, 32]"""
    return ((x.float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).expand(3, -1, -1)


def pictures(args, run, data, n_classes, class_names, classifier):
    """images/: from the first set that the saved classifier saw (a PNG is rounded to 8 bits; the training was not), the
    GANs in turn. samples.png: real images, those beside the baseline's."""
    choices, channels = read_json(run.path("search.json")), data["train"][0].shape[1]
    saved, n = read_json(run.path("classifier", "config.json")), n_samples(args, data, n_classes)

    def sampler(seed, epoch):
        return load_sampler(args, run, seed, epoch, classifier, n_classes, channels)

    folders, rows, shown_rows = runs.class_folders(class_names), [], {}
    x, y = data["train"]
    shown_rows["real"] = [as_picture(normalised_images(x[(y == c).nonzero()[0, 0]])) for c in range(n_classes)]
    for row in dict.fromkeys(["baseline", saved["row"]]):
        sources, period = sources_of(args, row, saved["seed"] - args.seed, choices, sampler)
        sets = SyntheticSets(args, sources, n_classes, n, saved["seed"], period)
        x, y = sets.at(1)
        turns = torch.arange(len(sources) * sets.n).view(len(sources), sets.n).T.flatten()
        by_class = [x[y == c][turns[: max(args.export_images, 4)]] for c in range(n_classes)]
        for k in range(min(4, len(by_class[0]))):
            name = "GAN, as it comes" if row == "baseline" else f"GaFi, {row}"
            shown_rows[f"{name} {k}"] = [as_picture(by_class[c][k]) for c in range(n_classes)]
    with runs.ImageWriter() as writer:
        for c in range(n_classes):
            for k, image in enumerate(by_class[c][: args.export_images]):
                source = sources[k % len(sources)]
                what = dict(file_name=f"{folders[c]}/{k}.png", label=c, class_name=class_names[c], row=saved["row"])
                how = dict(gan=source.seed, sigma=source.sigma, threshold=source.threshold if source.filtered else None)
                rows.append(what | how)
                writer.save(run.path("images", folders[c], f"{k}.png"), as_picture(image))
    runs.write_metadata(run.path("images"), rows)
    runs.samples_grid(run.path("samples.png"), list(shown_rows.values()), list(shown_rows), class_names, size=64)


def tables(args, run, class_names, predicted, labels, top1):
    table, metrics = [], {}
    for row in args.rows:
        found = row_metrics(args, run, row)
        if not found:
            table.append([ROW_NAMES[row], "not run", "", "", "", ""])
            continue
        scores = torch.tensor([m["test"] for m in found], dtype=torch.float64)
        spread = scores.std().item() if len(found) > 1 else 0.0
        metrics[row] = dict(mean=scores.mean().item(), std=spread, per_seed=scores.tolist(), images=found[0]["images"])
        for key in ("val", "best_test_epoch", "accepted"):
            if key in found[0]:
                metrics[row][key] = float(np.mean([m[key] for m in found]))
        gap = metrics["real"]["mean"] - metrics[row]["mean"] if "real" in metrics else None
        metrics[row]["gap"] = gap
        plus_minus = f" ± {spread:.1f}" if len(found) > 1 else ""
        cells = [f"{metrics[row][k]:.1f}" if k in metrics[row] else "" for k in ("val", "best_test_epoch")]
        accepted = f"{100 * metrics[row]['accepted']:.0f} %" if row not in ("real", "baseline") else ""
        table.append(
            [
                ROW_NAMES[row],
                f"{scores.mean():.1f}{plus_minus}",
                f"{gap:.1f}" if row != "real" and gap is not None else "",
                *cells,
                accepted,
            ]
        )
    choices = read_json(run.path("search.json"))
    per_class = [(predicted[labels == c] == c).float().mean().item() * 100 for c in range(len(class_names))]
    best = dict(top1=top1, per_class=dict(zip(class_names, per_class, strict=True)))
    run.results(
        paper="arXiv:2305.10118",
        metrics={k: v for k, v in metrics.items() if k not in ("real", "baseline")}
        | dict(saved_classifier=best, search=choices, selected_on=args.select_on),
        baselines={k: v for k, v in metrics.items() if k in ("real", "baseline")},
        images=sum(1 for _ in run.path("images").glob("*/*.png")),
    )
    confusion = torch.zeros(len(class_names), len(class_names), dtype=torch.long)
    confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
    header = [
        "training set",
        "test top-1" if args.select_on == "val" else "test top-1 (official selection: on test)",
        "below real",
        "validation",
        "its best test epoch",
        "accepted",
    ]
    found_header = ["GAN", "epoch", "sigma", "t"]
    found_rows = [[seed, c["epoch"], f"{c['sigma']:.2f}", f"{c['threshold']:.1f}"] for seed, c in choices.items()]
    shown_tables = {"Top-1 on the test split": (header, table), "What the search chose": (found_header, found_rows)}
    summary = f"{args.dataset}: {len(args.gan_seeds)} GANs of {args.gan_epochs} epochs, chosen on {args.select_on}"
    runs.report(run, f"GaFi on {args.dataset}", summary, shown_tables, None, confusion.tolist(), class_names)
    runs.print_table(found_header, found_rows)
    runs.print_table(header, table)
    print(f"pictures: {run.path('samples.png')}   report: {run.path('report.html')}", flush=True)


# ---------------------------------------------------------------------------------------------


MOST_VALUES = 1000  # of a grid: each is a training for every GAN


def check_args(args):
    """What ranges of single numbers do not tell."""
    if args.image_size % 8:
        raise runs.UserError(f"--image-size {args.image_size}: a multiple of 8 is needed")
    if args.dataset == "fashionmnist" and args.image_size < 28:
        raise runs.UserError(f"--image-size {args.image_size}: FashionMNIST is padded from 28 pixels, not shrunk")
    if args.attempts == 0:
        raise runs.UserError("--attempts is 0; it must be at least 1, or -1 for no limit")
    for name in ("ckpt_grid", "sigma_grid", "threshold_grid"):
        first, last, step = getattr(args, name)
        given = f"--{name.replace('_', '-')} {first} {last} {step}"
        if last < first or step < 0.001:
            raise runs.UserError(
                f"{given}: give first, last and step, the last not before the first, the step >= 0.001"
            )
        if (last - first) / step > MOST_VALUES:
            raise runs.UserError(
                f"{given}: {int((last - first) / step)} values, each a training; at most {MOST_VALUES}"
            )
    if not checkpoints(args):
        raise runs.UserError(
            f"--ckpt-grid begins at epoch {args.ckpt_grid[0]}, after the last, --gan-epochs {args.gan_epochs}"
        )
    if not args.rows or len(set(args.rows)) < len(args.rows):
        raise runs.UserError(f"--rows {' '.join(args.rows)}: name one or more rows, each once")
    if args.rows[-1] == "real":
        raise runs.UserError("--rows: the classifier of the last row is saved, so real cannot be the last")
    if not args.gan_seeds or len(set(args.gan_seeds)) < len(args.gan_seeds):
        raise runs.UserError(f"--gan-seeds {' '.join(map(str, args.gan_seeds))}: give one or more different seeds")


def check_data(args, data, n_classes):
    """Is there enough of it?"""
    seen = len(data["train"][1]) + (len(data["val"][1]) if args.gan_images == "train+val" else 0)
    if args.gan_batch > seen:
        raise runs.UserError(f"--gan-batch {args.gan_batch}: there are only {seen} images to train the GAN on")
    n, least = n_samples(args, data, n_classes), len(args.gan_seeds) if "multi" in args.rows else 1
    if n < least:
        raise runs.UserError(f"--class-samples: {n} images per class; at least {least} are needed, one of every GAN")


def check_order(args, run, todo):
    """A stage named by --stages needs the files of those before it."""
    order = ["real", "gan", "search", "final", "evaluate"]
    for stage in todo:
        for before in order[: order.index(stage)]:
            if before not in todo and run.todo(before):
                raise runs.UserError(
                    f"--stages {stage}: the stage {before} has not been run in {run.dir}; add it to --stages"
                )


def main(args):
    if args.plan:
        raise runs.UserError("--plan: this script has no plan yet, only datadream.py; leave the flag out")
    check_args(args)
    dist = distributed.setup_distributed(args.device)
    data, class_names = load_data(args, dist)
    n = len(class_names)
    check_data(args, data, n)

    # The device draws augmentation and GAN latents, and every kind of device has its own random numbers.
    used = dict(device=dist.device.type, data_dir=data_hash(data, class_names))
    run = runs.open_run("gafi", args, dist, SPEED_FLAGS, models=used, later=LATER)
    todo = [stage for stage in args.stages if run.todo(stage)]
    check_order(args, run, todo)
    inception = None
    if args.gan_inception and "gan" in todo:  # before the first stage, and the download once
        distributed.on_rank_0(lambda: inception_metrics(torch.device("cpu")) and None, dist)
        inception = inception_metrics(dist.device)
    if "real" in todo:
        train_real(args, run, dist, data, n)
    if set(todo) - {"real"}:
        classifier = filtering_classifier(args, run, data, n)
        if "gan" in todo:
            train_gans(args, run, dist, data, n, classifier, inception)
        if "search" in todo:
            search(args, run, dist, data, n, classifier)
        if "final" in todo:
            final(args, run, dist, data, n, classifier)
        if "evaluate" in todo:
            score_and_report(args, run, dist, data, n, class_names, classifier)
    distributed.cleanup(dist)


if __name__ == "__main__":
    start(main, ARGS)
