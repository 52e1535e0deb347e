"""DistDiff: distribution-aware data expansion with diffusion models (H. Zhu et al., NeurIPS 2024, arXiv:2403.06741).

Multiply a small labelled set k times with img2img samples of an unchanged Stable Diffusion. In the middle of each
sampling one gradient step moves the latent towards prototypes of the real data, as a guide classifier sees them.

    [1] select --> [2] guide --> [3] prototypes --> [4] encode --> [5] expand --> [6] train --> [7] evaluate
    N real images  classifier    class means,       VAE latents    k images       classifiers   top-1 on the
                   of the real   K group means      of the real    for each real  from scratch  real test set

Run:
    python distdiff.py  # 10 digits, 4 real images each, tiny models, 2 CPU cores: a table in minutes
    torchrun --standalone --nproc-per-node 8 distdiff.py --preset caltech101

Expect:
    digits: see docs/distdiff.md, which also says what does not show
    Caltech-101, k = 5, ResNet-50 from scratch: real 66.7, SD 76.6, DistDiff 83.1 (paper); not run by us

Differs:
    1. images are drawn in batches; the official loop is bound to one image at a time, because it averages the energy
    2. every image has its own seed; officially each process draws from one stream that starts at 42
    3. the epoch is chosen on validation images or is the last; officially the best test epoch (printed beside)
    4. two controls that the paper has not: real images with as many updates, and the random shift without its gradient
"""

from dataclasses import dataclass
from typing import Literal, get_args

from common.cli import Count, Fraction, Frame, Natural, NonNegative, Positive, Share, check, parse, start

Row = Literal[
    "zero-shot", "real", "real-repeated", "autoaugment", "randaugment", "erasing", "cutout", "gridmask", "mixup",
    "cutmix", "sd", "rho0", "direct", "distdiff",
]  # fmt: skip
Transform = Literal["none", "autoaugment", "randaugment", "erasing", "cutout", "gridmask", "mixup", "cutmix"]


@dataclass
class Args(Frame):
    dataset: str = "caltech101"
    """real data set; `folder`: your own images in data_dir"""
    stages: tuple[Literal["select", "guide", "prototypes", "encode", "expand", "train", "evaluate"], ...] = (
        "select",
        "guide",
        "prototypes",
        "encode",
        "expand",
        "train",
        "evaluate",
    )
    """stages to run, in order; a finished stage is never run again"""

    # ---- models (Sec. 4.1) ---------------------------------------------------------------------
    sd_model: str = "CompVis/stable-diffusion-v1-4"
    """generator: hub id, local folder in diffusers layout, or tiny"""
    guide: str = "resnet50"
    """guide network theta: a timm name, or clip:NAME with NAME as open_clip writes it (Table 10)"""
    guide_pretrained: bool = False
    """start the guide from timm's pretrained weights"""
    classifier: str = "resnet50"
    """network of the table: any timm name (Table 3), or clip:NAME (Table 2)"""
    classifier_pretrained: bool = False
    """start the classifiers from timm's pretrained weights (Table 2)"""
    zeroshot_clip: str = "ViT-B-32/laion2b_s34b_b79k"
    """CLIP of the row zero-shot: open_clip ARCH/PRETRAINED, hf-hub:ID, local folder, or tiny"""

    # ---- [1] select: the real images -----------------------------------------------------------
    real_per_class: Count | None = None
    """real images drawn from each class of the training split; None: all"""
    merge_val: bool = False
    """add the data set's own validation split to the training images, as the paper does for DTD"""
    val_fraction: Fraction = 0.0
    """share of training images that choose the epoch if there is no validation split; 0: keep the last epoch"""

    # ---- [2] guide, [3] prototypes (Sec. 3.2) --------------------------------------------------
    guide_epochs: Count = 100
    """epochs of the guide, on the real images alone; the rest as in stage 6"""
    guide_lr: Positive = 0.1
    """learning rate of the guide, officially 0.1 from scratch; a pretrained or CLIP guide needs less, 1e-2 or 1e-3"""
    groups: Count = 3
    """K, group prototypes of each class (Table 6)"""

    # ---- [4] encode, [5] expand (Sec. 3.3) -----------------------------------------------------
    gen_seed: int = 0
    """the k-th copy of a real image is a function of (gen_seed, that image, k), of generator and guide"""
    gen_copies: Count = 5
    """k, generated images for each real one"""
    gen_resolution: Count = 512
    """pixels per side of a generated image"""
    gen_save_size: Count | None = None
    """pixels per side of the stored images, None: as generated; half the side is a quarter of disk and decoding"""
    gen_prompt: str | None = None
    """prompt with {} for the class name; None: the official code's for this data set"""
    gen_steps: Count = 50
    """sampler steps"""
    gen_strength: Share = 0.5
    """s, share of the steps that are run; the others' noise is never added (0.2 for PathMNIST)"""
    gen_guidance: float = 7.5
    """classifier-free guidance scale w"""
    gen_step_from_end: Count = 20
    """M, the latent is moved M steps before the last (Table 5); at most gen_strength x gen_steps"""
    gen_period: Count = 2
    """P, denoising steps of the look-ahead whose energies are averaged (Table 7)"""
    gen_rho: NonNegative = 10.0
    """rho, size of the one gradient step on e and b (Table 11); depends on the scale of the guide's features"""
    gen_radius: NonNegative = 0.2
    """epsilon, the latent stays within this distance of where it was, in every element"""
    gen_class_weight: NonNegative = 1.0
    """lambda_c, weight of the distance to the class prototype; 0 leaves it out"""
    gen_group_weight: NonNegative = 1.0
    """lambda_g, weight of the distance to the nearest group prototype (Table 12); 0 leaves it out"""
    gen_normalize: bool = False
    """L2-normalise the guide's feature in the energy, as the prototypes are (officially not); needs its own rho"""
    gen_guide_input: Literal["pm1", "normalized"] = "pm1"
    """pm1: the guide sees the decoder's [-1, 1], as officially; normalized: what it was trained on"""
    gen_micro_batch: Count = 16
    """images per forward pass on one process; speed and memory only"""
    grad_checkpoint: bool = True
    """recompute activations of U-Net and decoder in the gradient step: 2.5 instead of 8.5 GiB per image, same bits"""
    energy_probe: Natural = 64
    """copies whose energy is measured again after the gradient step, for the report; 0: none"""

    # ---- [6] train the classifiers (Sec. 4.1) --------------------------------------------------
    rows: tuple[Row, ...] = ("real", "real-repeated", "sd", "rho0", "distdiff")
    """rows of the table; rho0: random shift without gradient; direct: Sec. 4.4; a transform's name: real images only"""
    clf_copies: tuple[Count, ...] = (5,)
    """k of the generated rows, each at most gen_copies; the sets are nested"""
    clf_seeds: Count = 3
    """classifiers per row, seeds seed, seed + 1, ..."""
    clf_epochs: Count = 100
    """epochs"""
    clf_equal_k: bool = True
    """epochs of all rows but `real` are as long as the largest k's; --no-clf-equal-k: those of each generated list"""
    clf_transform: Transform = "none"
    """transformation added to the generated rows (Table 1, second line)"""
    sgd_lr: Positive = 0.1
    """learning rate of the classifiers, cosine to 0 over the epochs; Nesterov momentum 0.9"""
    sgd_wd: NonNegative = 1e-4
    """weight decay, on all weights"""
    sgd_batch: Count = 64
    """images per step"""
    clf_resize: Count = 256
    """images are first resized to this square, proportions not kept"""
    clf_size: Count = 224
    """crop that the networks see"""
    clf_flip: bool = True
    """mirror half of the images; not for digits and signs"""
    clf_evals: Count = 20
    """validations during the training, evenly spread, the last at its end"""
    clf_report_test_selected: bool = True
    """also score the test set at each validation and print its best; never used to choose"""


# Comments: the paper's top-1, real / SD / DistDiff at k = 5. Learning rates of fine-tuning are ours: not published.
FINE_TUNED = dict(classifier_pretrained=True, sgd_lr=0.01)
PRESETS = {
    "digits": dict(  # 4 real images per class, tiny models; see docs/distdiff.md
        dataset="digits", sd_model="tiny", zeroshot_clip="tiny", precision="fp32", workers=0,
        real_per_class=4, val_fraction=0.2, guide="test_resnet", guide_epochs=100, classifier="test_resnet",
        gen_resolution=32, gen_steps=20, gen_step_from_end=8, gen_micro_batch=32, energy_probe=40,
        rows=(
            "zero-shot", "real", "real-repeated", "randaugment", "gridmask", "mixup", "cutmix", "sd", "rho0",
            "distdiff",
        ),
        clf_copies=(1, 2, 5), clf_epochs=24, clf_resize=36, clf_size=32, clf_flip=False, clf_evals=3,
    ),
    "caltech101": dict(dataset="caltech101", data_dir="data"),  # 66.71 / 76.57 / 83.09
    "cifar100": dict(dataset="cifar100", data_dir="data", real_per_class=100, val_fraction=0.1),  # figure only
    "cars": dict(dataset="cars", data_dir="data", **FINE_TUNED),  # 87.61 / 90.19 / 91.17
    "imagenette": dict(dataset="imagenette", data_dir="data", **FINE_TUNED),  # 99.40 / 98.51 / 99.30
    "dtd": dict(dataset="dtd", data_dir="data", merge_val=True),  # figure only
    "pathmnist": dict(  # 84.29 / 86.81 / 89.47, with CLIP ViT-B/32
        dataset="pathmnist", data_dir="data", real_per_class=100, gen_strength=0.2, gen_step_from_end=10,
        classifier="clip:ViT-B-32/laion2b_s34b_b79k", sgd_lr=1e-3,
    ),
    "pets": dict(dataset="pets", data_dir="data"),  # no figure in the paper, nor for the three below
    "flowers102": dict(dataset="flowers102", data_dir="data"),
    "fgvc_aircraft": dict(dataset="fgvc_aircraft", data_dir="data"),
    "stl10": dict(dataset="stl10", data_dir="data"),
}  # fmt: skip

if __name__ == "__main__":
    ARGS = parse(Args, PRESETS, __doc__)  # before the imports that take seconds: --help and a wrong flag answer at once

import importlib
import json
import math
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from common import datasets, diffusion, distributed, models
from common import run as runs
from common.checkpoint import load_training, save_training
from common.clip import encode_images, encode_texts, load_clip, save_clip
from common.diffusion import DECODED_PIXELS

# Official code. The paper's appendix has "a photo of a {} car." for Cars: --gen-prompt. No period for the tiny world.
PROMPTS = {
    "digits": "a photo of a {}", "dtd": "{} texture.", "pathmnist": "a colon pathological image of {}.",
    "breastmnist": "a photo of {} ultrasound image.", "bloodmnist": "a photo of {}, a type of cell.",
    "pets": "A photo of a pet {}.", "flowers102": "A photo of a {}, a type of flower.",
    "fgvc_aircraft": "A photo of a {}, a type of aircraft",
}  # fmt: skip
NAMES = {
    "imagenette": "tench,English springer,cassette player,chain saw,church,French horn,garbage truck,gas pump,"
    "golf ball,parachute",
    "pathmnist": "adipose,background,debris,lymphocytes,mucus,smooth muscle,normal colon mucosa,"
    "cancer-associated stroma,colorectal adenocarcinoma epithelium",
}
MEDMNIST = {"pathmnist": "PathMNIST", "breastmnist": "BreastMNIST", "bloodmnist": "BloodMNIST"}
TRANSFORMS = get_args(Transform)[1:]  # the rows of real images with one of these
GENERATED = {"distdiff": "images", "sd": "sd", "rho0": "rho0", "direct": "direct"}  # row -> folder of its images
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPEED_FLAGS = (
    "output_dir", "device", "compile", "stages", "resume", "track", "workers", "gen_micro_batch", "grad_checkpoint",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The method: the paper's equations as plain functions. Change the idea here.


def prototypes(features, labels, n_classes, k):
    """Sec. 3.2: means of the L2-normalised features, of each class and of each of its clusters. [N, D], [N]

    -> dict: class_mean [C, D], group_mean [C, K, D], both again with unit length as class_unit and group_unit, and
    assign [N], the cluster of each image. Clusters: average linkage, Euclidean. A class with fewer than K images has as
    many clusters; its last prototype is repeated, which never changes the nearest one.
    """
    from sklearn.cluster import AgglomerativeClustering

    u = F.normalize(features.float(), dim=1)
    class_mean, group_mean = u.new_zeros(n_classes, u.shape[1]), u.new_zeros(n_classes, k, u.shape[1])
    assign = torch.zeros(len(u), dtype=torch.long)
    for c in range(n_classes):
        rows = (labels == c).nonzero().flatten()
        class_mean[c] = u[rows].mean(0)
        found = min(k, len(rows))
        if found > 1:
            clusters = AgglomerativeClustering(n_clusters=found, linkage="average").fit_predict(u[rows].cpu().numpy())
            assign[rows.cpu()] = torch.from_numpy(clusters).long()
        for j in range(k):
            group_mean[c, j] = u[rows[assign[rows.cpu()] == min(j, found - 1)]].mean(0)
    units = dict(class_unit=F.normalize(class_mean, dim=-1), group_unit=F.normalize(group_mean, dim=-1))
    return dict(class_mean=class_mean, group_mean=group_mean, assign=assign, **units)


def alphas_cumprod(n=1000, beta_start=0.00085, beta_end=0.012):
    """Scaled-linear schedule: abar_t = prod_{s<=t} (1 - beta_s), sqrt(beta) linear. -> [n] float32"""
    return (1 - torch.linspace(beta_start**0.5, beta_end**0.5, n) ** 2).cumprod(0)


def ddim_schedule(steps, abar):
    """DDIM, leading spacing, offset 1: timesteps [S], 981 ... 1 for 50 steps; abar there [S] and one step on [S]."""
    t = torch.arange(steps - 1, -1, -1) * (len(abar) // steps) + 1
    return t, abar[t], torch.cat([abar[t[1:]], abar[:1]])


def start_index(strength, steps):
    """First step of img2img: S - s S. Official code: int((1 - s) S), which floats make one too small at s = 0.8."""
    return steps - min(int(round(strength * steps, 6)), steps)


def add_noise(z, eps, abar):
    """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps. [B, 4, h, w] twice, abar_t [B] -> [B, 4, h, w]"""
    abar = abar.view(-1, 1, 1, 1)
    return abar.sqrt() * z + (1 - abar).sqrt() * eps


def guided(eps_u, eps_c, w):
    """Classifier-free guidance: eps = eps_u + w (eps_c - eps_u). w = 1: conditional, w = 0: unconditional."""
    return eps_u + w * (eps_c - eps_u)


def ddim_step(z, eps, abar, abar_next):
    """One DDIM step, eta = 0: the predicted clean latent x0 and the latent of the next step. Shapes of z."""
    x0 = (z - (1 - abar) ** 0.5 * eps) / abar**0.5
    return x0, abar_next**0.5 * x0 + (1 - abar_next) ** 0.5 * eps


def affine(z, e, b):
    """Eq. 5: v = (1 + e) z + b, one pair (e, b) for each image and channel. [B, 4, h, w], [B, 4, 1, 1] twice"""
    return (1 + e) * z + b


def project(v, z, radius):
    """The point next to v within the radius of z in every element (L-infinity ball). Shapes of z."""
    return torch.minimum(torch.maximum(v, z - radius), z + radius)


def energy(f, p, q, lam_class, lam_group):
    """Eq. 6 to 8: lam_c |f - p| + lam_g |f - q_j|, j = argmax f . q. Lengths, not their squares.

    Features [B, D], class prototypes [B, D], group prototypes [B, K, D] -> energy [B], chosen group [B]
    """
    f = f.float()
    j = torch.einsum("bd,bkd->bk", f.detach(), q).argmax(1)
    nearest = q[torch.arange(len(q), device=q.device), j]
    return lam_class * (f - p).norm(dim=1) + lam_group * (f - nearest).norm(dim=1), j


def look_ahead(v, i, period, step, feature, p, q, lam_class, lam_group):
    """Mean energy of the clean images that P denoising steps from latent v predict; v itself is not projected.

    step(z, i) -> (x0, next z) and feature(x0) -> [B, D] are the networks. -> energy [B], [(x0, feature, group), ...]
    """
    total, trace = 0.0, []
    for r in range(period):
        x0, v = step(v, i + r)
        f = feature(x0)
        e, j = energy(f, p, q, lam_class, lam_group)
        total = total + e
        trace.append((x0, f, j))
    return total / period, trace


def transform_guidance(z, e, b, i, rho, radius, score):
    """Sec. 3.3: one plain gradient step on e and b, then projection. score(v, i) -> energy [B] of latent v.

    -> latent [B, 4, h, w] and a dict of the energy before the step, its gradients, and the new e and b.
    Trap: officially the energies are averaged over the batch, so the step shrinks with it. The sum keeps each image
    independent of its neighbours.
    """
    e, b = (x.detach().requires_grad_() for x in (e, b))
    with torch.enable_grad():
        before = score(affine(z, e, b), i)
        grad_e, grad_b = torch.autograd.grad(before.sum(), (e, b))
    with torch.no_grad():
        e, b = e - rho * grad_e, b - rho * grad_b
        moved = project(affine(z, e, b), z, radius)
    return moved, dict(energy=before.detach(), grad_e=grad_e, grad_b=grad_b, e=e, b=b)


def direct_guidance(z, i, rho, step, feature, p, q, lam_class=1.0, lam_group=1.0):
    """Sec. 4.4, the ablation: z_next = DDIM step - rho dE/dz, no affine map, no projection, features normalised.

    -> z_next [B, 4, h, w], x0 of the same shape, energy [B]
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        x0, z_next = step(z, i)
        e, _ = energy(F.normalize(feature(x0).float(), dim=1), p, q, lam_class, lam_group)
        grad = torch.autograd.grad(e.sum(), z)[0]
    return (z_next - rho * grad).detach(), x0.detach(), e.detach()


def guide_view(image, size, mean=None, std=None):
    """Decoder output [B, 3, H, W] in about [-1, 1] -> what the guide sees [B, 3, size, size], bicubic, not clamped.

    Official code: the range stays [-1, 1] although the guide was trained on normalised images; mean and std mend that.
    """
    image = F.interpolate(image, (size, size), mode="bicubic", antialias=False, align_corners=False)
    if mean is not None:
        mean, std = (torch.tensor(m, device=image.device).view(3, 1, 1) for m in (mean, std))
        image = (image / 2 + 0.5 - mean) / std
    return image


def to_uint8(image):
    """Decoder output in about [-1, 1] -> uint8 of the same shape: clamped to [0, 1], times 255, rounded."""
    return ((image / 2 + 0.5).clamp(0, 1) * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def epoch_lr(epoch, base, epochs):
    """Learning rate of an epoch: half a cosine from base, stepped once per epoch."""
    return 0.5 * base * (1 + math.cos(math.pi * epoch / epochs))


def mixup_pairs(x, index, lam):
    """MixUp: lam x + (1 - lam) x[index]. [B, 3, H, W], [B] -> [B, 3, H, W]"""
    return lam * x + (1 - lam) * x[index]


def mixup_loss(logits, y, index, lam):
    """lam CE(logits, y) + (1 - lam) CE(logits, y[index]). Trap: officially lam = 1, the labels stay unmixed."""
    return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[index])


def grid_mask(size, d, hidden, row, col, angle):
    """GridMask, mode 1: bands of `hidden` pixels in a grid of pitch d are what stays. -> uint8 [size, size]

    Two families of bands are cut into a square that is large enough to be rotated; the centre is cut out, inverted.
    """
    side = math.ceil(math.sqrt(2 * size * size))
    mask = np.ones((side, side), np.uint8)
    for i in range(-1, side // d + 1):
        mask[max(0, d * i + row) : max(0, min(d * i + row + hidden, side)), :] = 0
        mask[:, max(0, d * i + col) : max(0, min(d * i + col + hidden, side))] = 0
    mask = np.array(Image.fromarray(mask).rotate(angle))
    start = (side - size) // 2
    return torch.from_numpy(1 - mask[start : start + size, start : start + size])


# ---------------------------------------------------------------------------------------------
# Images in: the transforms of training and evaluation, and the networks that see them.


def grid_mask_now(size, share, g):
    """A random GridMask [size, size], or all ones; its probability rises to 0.8 over the first 80 % of the training."""
    if torch.rand((), generator=g) >= 0.8 * min(1.0, share / 0.8):
        return torch.ones(size, size, dtype=torch.uint8)
    d = int(torch.randint(max(2, size * 96 // 224), size, (), generator=g))  # d in [96, 224) at 224 pixels
    hidden = math.ceil(0.6 * d)
    row, col = torch.randint(d, (2,), generator=g).tolist()
    return grid_mask(size, d, hidden, row, col, int(torch.randint(360, (), generator=g)))


class TrainTransform:
    """Official code: rotate, crop, mirror, normalise, with at most one of Table 1's transformations in its place.

    Called with a PIL image of clf_resize pixels and the share of the training that is over -> float [3, S, S].
    """

    def __init__(self, args, extra, mean, std):
        policies = {"autoaugment": v2.AutoAugment, "randaugment": v2.RandAugment}
        before = [v2.RandomRotation(15), v2.RandomCrop(args.clf_size)]
        before += [v2.RandomHorizontalFlip(0.5)] if args.clf_flip else []
        before += [policies[extra]()] if extra in policies else []
        after = []
        if extra == "erasing":  # the official code calls it cutout
            after = [v2.RandomErasing(0.5, scale=(0.02, 0.33), ratio=(0.3, 3.3))]
        if extra == "cutout":  # DeVries & Taylor: one square of a quarter of the area, always
            after = [v2.RandomErasing(1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0))]
        to_float = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        self.steps, self.grid = v2.Compose([*before, *to_float, *after]), extra == "gridmask"

    def __call__(self, image, share):
        x = self.steps(image)
        return x * grid_mask_now(x.shape[-1], share, torch.default_generator) if self.grid else x


def cutmix_rounds(x, y, g, prob=0.5, rounds=2):
    """CutMix as the official baseline: each image, twice, with probability 1/2, gets a box of another of the batch.

    [B, 3, H, W], one-hot [B, C] -> the same shapes; labels follow the area. Box area about 1 - lam, lam ~ U(0, 1).
    """
    x0, y0, (h, w) = x, y, x.shape[-2:]
    x, y = x.clone(), y.clone()
    for _ in range(rounds):
        use = torch.rand(len(x), generator=g) < prob
        other = torch.randperm(len(x), generator=g)
        half = 0.5 * (1 - torch.rand(len(x), generator=g)).sqrt()
        centre = torch.rand(len(x), 2, generator=g)
        for i in use.nonzero().flatten().tolist():
            (cy, cx), s = centre[i].tolist(), half[i].item()
            top, bottom = int(max(cy - s, 0) * h), int(min(cy + s, 1) * h)
            left, right = int(max(cx - s, 0) * w), int(min(cx + s, 1) * w)
            x[i, :, top:bottom, left:right] = x0[other[i], :, top:bottom, left:right]
            lam = 1 - (bottom - top) * (right - left) / (h * w)
            y[i] = lam * y[i] + (1 - lam) * y0[other[i]]
    return x, y


class Resized:
    """Images as clf_resize squares (bilinear, proportions not kept), which is the first step of every transform.

    [i] -> PIL RGB. Decoded once into memory if they fit in 2 GB, else at each access.
    """

    def __init__(self, images, side):
        self.images, self.side, self.labels, self.memory = images, side, images.labels, None
        if len(images) * 3 * side * side < 2e9:
            self.memory = np.stack([np.asarray(self.open(i)) for i in range(len(images))])

    def __len__(self):
        return len(self.labels)

    def open(self, i):
        return self.images[i].resize((self.side, self.side), Image.Resampling.BILINEAR)

    def __getitem__(self, i):
        return self.open(i) if self.memory is None else Image.fromarray(self.memory[i])


class Centre(torch.utils.data.Dataset):
    """Resized images as evaluation sees them: [i] -> uint8 [3, S, S], centre crop."""

    def __init__(self, resized, size):
        self.resized, self.size = resized, size

    def __len__(self):
        return len(self.resized)

    def __getitem__(self, i):
        return v2.functional.pil_to_tensor(v2.functional.center_crop(self.resized[i], self.size))


class Squashed(Centre):
    """Real images for the prototypes: resized to the network's size itself, no crop (Sec. 3.2)."""

    def __getitem__(self, i):
        return v2.functional.pil_to_tensor(self.resized[i])


def normalised(pixels, mean, std):
    """uint8 [..., 3, H, W] -> float32, (x / 255 - mean) / std per channel"""
    mean, std = (torch.tensor(m, device=pixels.device).view(3, 1, 1) for m in (mean, std))
    return (pixels.float() / 255 - mean) / std


class Net(nn.Module):
    """A timm network, or clip:NAME: an open_clip image tower under a linear layer that starts as the class prompts.

    Normalised images [B, 3, S, S] -> features [B, D] before the last layer, or logits [B, C].
    """

    def __init__(self, name, pretrained, prompts):
        super().__init__()
        self.mean, self.std, self.clip = IMAGENET_MEAN, IMAGENET_STD, None
        if name.startswith("clip:"):
            clip = load_clip(name.removeprefix("clip:"))
            self.net = clip.model.visual  # Trap: officially fed with ImageNet's mean and deviation, not CLIP's own
            weights = F.normalize(encode_texts(clip, prompts), dim=-1)
            self.head = nn.Linear(weights.shape[1], len(prompts))
            with torch.no_grad():
                self.head.weight.copy_(weights), self.head.bias.zero_()
            self.clip = clip
        else:
            self.net = make_timm(name, pretrained, len(prompts))

    def features(self, x):
        if self.clip:
            return self.net(x)  # not normalised, as officially
        return self.net.forward_head(self.net.forward_features(x), pre_logits=True)

    def forward(self, x):
        return self.head(self.net(x)) if self.clip else self.net(x)

    def save(self, folder, about):
        """classifier/: a timm folder, or an open_clip folder and head.safetensors; classes.json last."""
        if self.clip:
            clip, seen = self.clip, dict(mean=list(self.mean), std=list(self.std))
            save_clip(folder, clip.model.state_dict(), clip.config, clip.tokenizer_files, clip.preprocess_config | seen)
            runs.save_tensors(folder / "head.safetensors", dict(self.head.state_dict()))
        else:
            timm.models.save_for_hf(self.net, folder, safe_serialization=True)
        runs.write_json(folder / "classes.json", about)

    @staticmethod
    def load(folder):
        about = json.loads((folder / "classes.json").read_text())
        prompts = about["prompts"]
        if (folder / "head.safetensors").exists():
            net = Net(f"clip:{folder}", False, prompts)
            net.head.load_state_dict(runs.load_tensors(folder / "head.safetensors"))
            return net
        return Net(f"local-dir:{folder}", True, prompts)


def make_timm(name, pretrained, n_classes):
    """A timm network with n_classes outputs; UserError for a name that timm has not or weights that cannot be had."""
    if not name.startswith("local-dir:") and not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name[:6]}*")[:4]) or "resnet50"
        raise runs.UserError(f"{name!r} is no network of timm; did you mean one of: {near}; or clip:NAME")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=n_classes)
    except Exception as error:  # the hub's errors have no common class
        if not pretrained:
            raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise runs.UserError(f"pretrained weights of {name} cannot be loaded ({why}); leave the flag out") from error


# ---------------------------------------------------------------------------------------------
# [1] select: the real images that are multiplied, the validation and the test images.
# Reads the data set, writes real.json.


def load_real(args):
    """The data set, in the paper's splits where common/datasets.py has others."""
    if args.dataset in MEDMNIST:
        return load_medmnist(args)
    data = datasets.load_dataset(args.dataset, args.data_dir)
    if args.dataset == "caltech101":  # the paper's draw is not published, this one is ours; the rest is the test set
        everything = data.train + data.val + data.test
        chosen = datasets.few_shot(everything, "caltech101", 30, 0, len(data.class_names))
        rest = sorted(set(range(len(everything))) - set(chosen))
        train, test = everything.subset(chosen), everything.subset(rest)
        return datasets.ImageDataset("caltech101", data.class_names, train, None, test, "30 images per class, our draw")
    return data


def load_medmnist(args):
    """PathMNIST and its like through the package medmnist, 28 x 28 pixels as in the version that the paper cites."""
    try:
        module = importlib.import_module("medmnist")
    except ImportError as error:
        raise runs.UserError(f"--dataset {args.dataset} needs the package medmnist: pip install medmnist") from error
    folder = args.data_dir or "data"
    Path(folder).mkdir(parents=True, exist_ok=True)
    theirs = list(module.INFO[args.dataset]["label"].values())
    names = NAMES[args.dataset].split(",") if args.dataset in NAMES else theirs
    split = {}
    for name in ("train", "val", "test"):
        part = getattr(module, MEDMNIST[args.dataset])(split=name, root=folder, download=True)
        keys = [f"{name}/{i:06d}" for i in range(len(part.labels))]
        split[name] = datasets.Images(part.labels.ravel().tolist(), keys, names, pixels=part.imgs)
    note = "official split of medmnist 28 x 28"
    return datasets.ImageDataset(args.dataset, names, split["train"], split["val"], split["test"], note)


def choose(args, data):
    """-> (real images, validation images or None); a function of the flags and the data set alone"""
    train, val, n = data.train, data.val, len(data.class_names)
    if args.merge_val and val is not None:
        train, val = train + val, None
    if val is None and args.val_fraction:
        train, val = datasets.hold_out(train, args.val_fraction, args.seed)
    if args.real_per_class:
        train = train.subset(datasets.few_shot(train, data.name, args.real_per_class, args.seed, n))
    if data.name == "folder":
        for images in (train, val, data.test):
            if images is not None:
                datasets.verify(images)
    return train, val


def select(run, real, val):
    """Write down what was chosen; refuse to go on with other images than the run began with."""
    chosen = {"real": real.keys, "validation": [] if val is None else val.keys}
    if run.todo("select"):
        runs.write_json(run.path("real.json"), chosen)
        run.done("select", real=len(real), validation=len(chosen["validation"]))
    elif json.loads(run.path("real.json").read_text()) != chosen:
        raise runs.UserError(
            f"{run.path('real.json')}: the data set has changed since this run began; use a new --output-dir"
        )


def prompts_of_classes(args, class_names):
    """One prompt per class: underscores become spaces; Cars have the year in front; list of C strings."""
    names = NAMES[args.dataset].split(",") if args.dataset in NAMES else [n.replace("_", " ") for n in class_names]
    if args.dataset == "cars":  # AM General Hummer SUV 2000 -> 2000 AM General Hummer SUV
        names = [" ".join(name.split()[-1:] + name.split()[:-1]) for name in names]
    template = PROMPTS.get(args.dataset, "a photo of a {}.") if args.gen_prompt is None else args.gen_prompt
    return [template.replace("{}", name) for name in names]


# ---------------------------------------------------------------------------------------------
# [2] guide: a classifier of the real images; [3] prototypes: what it thinks the classes look like.
# Write guide/weights.safetensors, prototypes.safetensors, prototypes.json, prototypes.png.


def train_guide(args, run, dist, real, val, test, prompts):
    with run.timed("guide", memory_flag="--sgd-batch"):
        if dist.main:  # one network: the other processes wait
            scored = scored_splits(args, val, test)
            parts, transform = [Resized(real, args.clf_resize)], "none"
            spec = (args.guide, args.guide_pretrained, args.guide_epochs, args.guide_lr)
            fit(args, run, dist, run.path("guide"), spec, parts, transform, args.seed, len(real), scored, prompts)
        distributed.barrier(dist)
    run.done("guide", **{k: json.loads(run.path("guide", "metrics.json").read_text())[k] for k in ("test", "val")})


def load_guide(args, run, prompts, device):
    """The trained guide, frozen, in eval mode: BatchNorm uses its running statistics."""
    file = run.path("guide", "weights.safetensors")
    guide = Net(args.guide, False, prompts)
    guide.load_state_dict(runs.load_tensors(file))
    return guide.requires_grad_(False).eval().to(device)


@torch.no_grad()
def make_prototypes(args, run, dist, real, class_names, prompts):
    with run.timed("prototypes"):
        guide = load_guide(args, run, prompts, dist.device)
        view, b = Squashed(Resized(real, args.clf_size), args.clf_size), args.sgd_batch
        parts = []
        if dist.main:
            for x in torch.utils.data.DataLoader(view, batch_size=b, num_workers=args.workers):
                parts.append(guide.features(normalised(x.to(dist.device), guide.mean, guide.std)).float().cpu())
            features, labels = torch.cat(parts), torch.tensor(real.labels)
            found = prototypes(features, labels, len(class_names), args.groups)
            runs.save_tensors(run.path("prototypes.safetensors"), {k: found[k] for k in ("class_unit", "group_unit")})
            about = prototype_report(args, run, real, features, labels, found, class_names)
            runs.write_json(run.path("prototypes.json"), about)
        distributed.barrier(dist)
    run.done("prototypes", groups=args.groups)


def prototype_report(args, run, real, features, labels, found, class_names):
    """prototypes.png, the real image nearest to each prototype; sizes of the clusters, length of the features.

    Trap: average linkage likes one large cluster and outliers; the sizes show it.
    """
    u = F.normalize(features, dim=1)
    vectors = torch.cat([found["class_unit"][:, None], found["group_unit"]], 1)  # [C, 1 + K, D]
    rows = [[] for _ in range(1 + args.groups)]
    for c in range(len(class_names)):
        members = (labels == c).nonzero().flatten()
        for row, i in zip(rows, (vectors[c] @ u[members].T).argmax(1).tolist(), strict=True):
            row.append(real[int(members[i])])
    names = ["class", *(f"group {k + 1}" for k in range(args.groups))]
    runs.samples_grid(run.path("prototypes.png"), rows, names, class_names, size=64)
    sizes = {
        name: torch.bincount(found["assign"][labels == c], minlength=args.groups).tolist()
        for c, name in enumerate(class_names)
    }
    return dict(cluster_sizes=sizes, mean_feature_length=features.norm(dim=1).mean().item())


# ---------------------------------------------------------------------------------------------
# [4] encode: one VAE latent for each real image, shared by its copies. Writes latents.safetensors.


def load_pipeline(args, device):
    """The stock pipeline, frozen, without safety checker; the VAE's weights are read in full precision."""
    path = models.check_models([("--sd-model", args.sd_model, "generator")])["--sd-model"]
    pipe = diffusion.load_pipeline(path, device, args.precision, **models.load_kwargs(path))
    if args.grad_checkpoint:
        for part in (pipe.unet, pipe.vae):
            part.enable_gradient_checkpointing()
    return pipe


def crop_offset(width, height, size, g):
    """Size after the shorter side became `size`, and a uniform top left corner. -> (w, h), (x, y)"""
    w, h = (int(size * side / min(width, height)) for side in (width, height))  # as torchvision's Resize rounds
    x, y = (int(torch.randint(free + 1, (), generator=g)) for free in (w - size, h - size))
    return (w, h), (x, y)


@torch.no_grad()
def encode(args, run, dist, pipe, real):
    """3a: shorter side to 512, one random crop, one draw from the VAE's posterior, times its scaling factor."""
    size, b, parts = args.gen_resolution, args.gen_micro_batch, []
    with run.timed("encode", memory_flag="--gen-micro-batch"):
        mine = list(distributed.my_items(chunks(range(len(real)), b), dist))
        bar = distributed.progress(sum(map(len, mine)), "encode", dist)
        for batch in mine:
            pixels, noise = [], []
            for i in batch:
                g, image = distributed.generator(args.gen_seed, "encode", real.keys[i]), real[i]
                scaled, (x, y) = crop_offset(*image.size, size, g)
                image = image.resize(scaled, Image.Resampling.BILINEAR).crop((x, y, x + size, y + size))
                pixels.append(v2.functional.pil_to_tensor(image).float() / 127.5 - 1)
                noise.append(torch.randn(latent_shape(pipe, size), generator=g))
            x = padded(pixels, b).to(dist.device)
            mean, std = in_slices(lambda y: moments(pipe.vae.encode(y).latent_dist), x, size).unbind(1)
            z = mean + std * padded(noise, b).to(dist.device)
            parts.append((pipe.vae.config.scaling_factor * z)[: len(batch)].cpu())
            bar.update(len(batch))
        bar.close()
        empty = torch.zeros(0, *latent_shape(pipe, size))
        gathered = distributed.gather_rows(torch.cat(parts) if parts else empty, dist)
        order = [i for r in range(dist.world) for c in chunks(range(len(real)), b)[r :: dist.world] for i in c]
        latents = torch.empty_like(gathered)
        latents[order] = gathered
        if dist.main:
            runs.save_tensors(run.path("latents.safetensors"), {"latents": latents})
    run.done("encode", latents=len(real))


def moments(posterior):
    """Mean and standard deviation: [B, 2, 4, h, w]"""
    return torch.stack([posterior.mean, posterior.std], 1)


def latent_shape(pipe, size):
    return pipe.unet.config.in_channels, size // vae_factor(pipe), size // vae_factor(pipe)


def padded(tensors, b):
    """Stack of exactly b tensors: the last one is repeated. The networks then always see the same shape."""
    return torch.stack(tensors + tensors[-1:] * (b - len(tensors)))


def chunks(items, size):
    """[a, b, c, d, e], 2 -> [a, b], [c, d], [e]"""
    return [items[i : i + size] for i in range(0, len(items), size)]


def vae_factor(pipe):
    """Pixels per latent along one side: 8 for Stable Diffusion"""
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def beta_schedule(config):
    """Arguments of alphas_cumprod from a pipeline's scheduler config."""
    if config.beta_schedule != "scaled_linear":
        raise runs.UserError(f"noise schedule {config.beta_schedule!r} of sd_model: scaled_linear is needed")
    return dict(n=config.num_train_timesteps, beta_start=config.beta_start, beta_end=config.beta_end)


def token_ids(pipe, prompts):
    """list of M prompts -> [M, 77], padded and truncated to the tokenizer's full length"""
    settings = dict(padding="max_length", truncation=True, max_length=pipe.tokenizer.model_max_length)
    return pipe.tokenizer(prompts, return_tensors="pt", **settings).input_ids


@torch.no_grad()
def encode_prompts(pipe, prompts):
    """distinct prompts -> {prompt: last hidden state [77, W]}, one at a time: the same bits in any company"""
    device = pipe.text_encoder.device
    return {p: pipe.text_encoder(token_ids(pipe, [p]).to(device))[0][0] for p in prompts}


# ---------------------------------------------------------------------------------------------
# [5] expand: k copies of each real image. Reads latents.safetensors, prototypes.safetensors, guide/;
# writes images/ (DistDiff) and the folders of the ablations in the table: sd/, rho0/, direct/.


def vae_of_the_energy(args, pipe):
    """The VAE that the gradient step decodes with: a copy in bfloat16 with --precision bf16, else the pipeline's own.

    Trap: under autocast a VAE in float32 keeps each normalisation's input in both types, 4.8 instead of 2.8 GiB a
    decoding. The image itself is decoded with the pipeline's VAE.
    """
    if args.precision == "fp32":
        return pipe.vae
    return deepcopy(pipe.vae).to(torch.bfloat16, memory_format=torch.channels_last)


def in_slices(network, x, size):
    """network(x) of a batch of images of size x size pixels in equal parts, so that no tensor has 2^31 elements.

    The VAE's widest tensor holds 256 numbers per pixel: 2^31 is a batch of 32 at 512 pixels.
    """
    most = max(1, DECODED_PIXELS // size**2)
    part = next(n for n in range(min(most, len(x)), 0, -1) if len(x) % n == 0)
    return torch.cat([network(y) for y in x.split(part)])


class Sampler:
    """Everything that turns latents of real images into new images, a full micro-batch at a time."""

    def __init__(self, args, pipe, guide, found, prompts):
        self.args, self.pipe, self.guide, self.device = args, pipe, guide, pipe.unet.device
        self.unet = torch.compile(pipe.unet) if args.compile else pipe.unet
        self.energy_vae = vae_of_the_energy(args, pipe)
        text = encode_prompts(pipe, {"", *prompts})
        self.text, self.null = torch.stack([text[p] for p in prompts]), text[""]  # [C, 77, W], [77, W]
        self.class_unit, self.group_unit = (found[k].to(self.device) for k in ("class_unit", "group_unit"))
        abar = alphas_cumprod(**beta_schedule(pipe.scheduler.config))
        self.t, self.abar, self.abar_next = (x.to(self.device) for x in ddim_schedule(args.gen_steps, abar))
        self.first = start_index(args.gen_strength, args.gen_steps)
        self.guided_at = args.gen_steps - args.gen_step_from_end

    def networks(self, labels):
        """step(z, i), feature(x0) and the prototypes of these labels [B], as the functions of the method take them."""
        args, pipe = self.args, self.pipe
        h_c = self.text[labels]
        h = torch.cat([self.null.expand_as(h_c), h_c])  # [2 B, 77, W]
        whole = (self.guide.mean, self.guide.std) if args.gen_guide_input == "normalized" else ()

        def step(z, i):
            unet = pipe.unet if torch.is_grad_enabled() else self.unet
            eps_u, eps_c = unet(torch.cat([z, z]).to(pipe.unet.dtype), self.t[i], h).sample.float().chunk(2)
            return ddim_step(z, guided(eps_u, eps_c, args.gen_guidance), self.abar[i], self.abar_next[i])

        def feature(x0):
            image = self.decode(x0, self.energy_vae).float()
            with autocast(args, self.device):
                f = self.guide.features(guide_view(image, args.clf_size, *whole)).float()
            return F.normalize(f, dim=1) if args.gen_normalize else f

        labels = labels.to(self.device)
        return step, feature, self.class_unit[labels], self.group_unit[labels]

    def decode(self, z, vae):
        z = (z / vae.config.scaling_factor).to(vae.dtype)
        return in_slices(lambda part: vae.decode(part).sample, z, self.args.gen_resolution)

    def begin(self, latents, labels, seeds):
        """A padded micro-batch: noised latents z at the first step, e ~ U(0, 1), b ~ N(0, 1), and its networks.

        One generator per image draws noise, e and b, in this order, so an image does not depend on its neighbours.
        """
        pad, draws = self.args.gen_micro_batch - len(seeds), []
        for seed, z in zip(seeds + seeds[-1:] * pad, latents + latents[-1:] * pad, strict=True):
            g = torch.Generator().manual_seed(seed)
            noise = torch.randn(z.shape, generator=g)
            e = torch.rand(len(z), 1, 1, generator=g)
            draws.append((noise, e, torch.randn(len(z), 1, 1, generator=g)))
        noise, e, b = (torch.stack(x).to(self.device) for x in zip(*draws, strict=True))
        z0 = padded(latents, self.args.gen_micro_batch).to(self.device)
        z = add_noise(z0, noise, self.abar[self.first].expand(len(z0)))
        return z, e, b, self.networks(torch.tensor(labels + labels[-1:] * pad))

    def score_with(self, nets):
        """-> score(v, i), the energy of each image as transform_guidance takes it"""
        args, (step, feature, p, q) = self.args, nets
        lam = args.gen_class_weight, args.gen_group_weight
        return lambda v, i: look_ahead(v, i, args.gen_period, step, feature, p, q, *lam)[0]

    @torch.no_grad()
    def draw(self, row, latents, labels, seeds):
        """B latents [4, h, w], labels and seeds -> uint8 [B, 3, H, W]. row: distdiff, sd, rho0 or direct."""
        args = self.args
        z, e, b, nets = self.begin(latents, labels, seeds)
        step, feature, p, q = nets
        window = range(self.guided_at, self.guided_at + args.gen_period)
        for i in range(self.first, args.gen_steps):
            if i == self.guided_at and row == "distdiff":
                z, info = transform_guidance(z, e, b, i, args.gen_rho, args.gen_radius, self.score_with(nets))
                runs.check_finite(info["energy"].sum().item() + z.sum().item(), "expand, gradient step")
            elif i == self.guided_at and row == "rho0":  # what is left without the gradient: no network is asked
                z = project(affine(z, e, b), z, args.gen_radius)
            if row == "direct" and i in window:
                z, _, _ = direct_guidance(z, i, args.gen_rho, *nets, args.gen_class_weight, args.gen_group_weight)
            else:
                _, z = step(z, i)
        with autocast(args, self.device):
            image = self.decode(z, self.pipe.vae).float()
        return to_uint8(image).cpu()[: len(seeds)]

    @torch.no_grad()
    def probe(self, latents, labels, seeds):
        """Energies [4][B] at the guided step: before and after the gradient step, and both projected to the ball."""
        args, i = self.args, self.guided_at
        z, e, b, nets = self.begin(latents, labels, seeds)
        for k in range(self.first, i):
            _, z = nets[0](z, k)
        score = self.score_with(nets)
        moved, info = transform_guidance(z, e, b, i, args.gen_rho, args.gen_radius, score)
        after, shifted = affine(z, info["e"], info["b"]), project(affine(z, e, b), z, args.gen_radius)
        found = [info["energy"], score(after, i), score(shifted, i), score(moved, i)]
        return [x[: len(seeds)].tolist() for x in found]


def copy_seed(args, key, copy):
    """Seed of one copy of the real image with this key; all rows share it, so they differ by the guidance alone."""
    return distributed.seed_of(args.gen_seed, key, copy)


def expand(args, run, dist, pipe, real, class_names, prompts):
    rows = [row for row in GENERATED if row in args.rows]
    with run.timed("expand", memory_flag="--gen-micro-batch"), runs.ImageWriter() as writer:
        guide = load_guide(args, run, prompts, dist.device)
        found = runs.load_tensors(run.path("prototypes.safetensors"))
        sampler = Sampler(args, pipe, guide, found, prompts)
        latents = list(runs.load_tensors(run.path("latents.safetensors"))["latents"])
        folders, place = runs.class_folders(class_names), image_places(real)
        for row in rows:
            todo = []
            if dist.main:  # rank 0 looks, so that all processes cut the same list
                there = [runs.existing_images(run.path(GENERATED[row], f)) for f in folders]
                pairs = [(i, j) for j in range(args.gen_copies) for i in range(len(real))]
                todo = [(i, j) for i, j in pairs if place(i, j) not in there[real.labels[i]]]
            todo = distributed.broadcast_object(todo, dist)
            mine = distributed.my_items(chunks(todo, args.gen_micro_batch), dist)
            bar = distributed.progress(sum(map(len, mine)), f"expand {row}", dist)
            for batch in mine:
                z, labels = [latents[i] for i, _ in batch], [real.labels[i] for i, _ in batch]
                images = sampler.draw(row, z, labels, [copy_seed(args, real.keys[i], j) for i, j in batch])
                for (i, j), image in zip(batch, images, strict=True):
                    file = run.path(GENERATED[row], folders[real.labels[i]], f"{place(i, j)}.png")
                    writer.save(file, stored(image, args.gen_save_size))
                bar.update(len(batch))
            bar.close()
        if args.energy_probe and "distdiff" in rows:
            probe_energy(args, run, dist, sampler, real, latents)
    for row in rows:
        list_images(args, run, dist, GENERATED[row], real, class_names, prompts)
    run.done("expand", images={GENERATED[row]: args.gen_copies * len(real) for row in rows})


def image_places(real):
    """-> place(i, copy), the number of that copy in its class folder: copy * n_c + place of image i in its class.

    A set of fewer copies is then a part of each set of more.
    """
    size, place = {}, []
    for label in real.labels:
        place.append(size.get(label, 0))
        size[label] = size.get(label, 0) + 1
    return lambda i, copy: copy * size[real.labels[i]] + place[i]


def stored(image, side):
    """uint8 [3, H, W] -> PIL, at most resized as the training would resize it anyway."""
    image = runs.to_pil(image)
    return image.resize((side, side), Image.Resampling.BILINEAR) if side else image


def probe_energy(args, run, dist, sampler, real, latents):
    """energy.json: does the gradient step lower the energy? Measured on the first copy of evenly spread images."""
    n = min(args.energy_probe, len(real))
    chosen = [i * len(real) // n for i in range(n)]
    found = []
    for batch in distributed.my_items(chunks(chosen, args.gen_micro_batch), dist):
        seeds = [copy_seed(args, real.keys[i], 0) for i in batch]
        values = sampler.probe([latents[i] for i in batch], [real.labels[i] for i in batch], seeds)
        found += list(zip(batch, *values, strict=True))
    table = sorted(row for part in distributed.all_gather_object(found, dist) for row in part)
    names = ("before", "after", "before_projected", "after_projected")
    columns = dict(zip(names, zip(*[row[1:] for row in table], strict=True), strict=True))
    fell = {
        name: 100 * float(np.mean(np.less(columns[after], columns[before])))
        for name, before, after in (("free", *names[:2]), ("projected", *names[2:]))
    }
    if dist.main:
        order = np.argsort(columns["before"])
        runs.write_json(run.path("energy.json"), dict(percent_fell=fell, **columns))
        for step, k in enumerate(order.tolist()):
            run.log(step, **{f"energy/{name}/energy": columns[name][k] for name in names})
    distributed.say(dist, f"energy fell on {fell['free']:.0f} % of {n} images, projected on {fell['projected']:.0f} %")


def list_images(args, run, dist, folder, real, class_names, prompts):
    """images/metadata.jsonl: what each image is and the seed that draws it again. Fails if an image is missing."""
    distributed.barrier(dist)
    if not dist.main:
        return
    folders, place, rows = runs.class_folders(class_names), image_places(real), []
    there = [runs.existing_images(run.path(folder, name)) for name in folders]
    for i in range(len(real)):
        c = real.labels[i]
        for copy in range(args.gen_copies):
            number = place(i, copy)
            if number not in there[c]:
                raise runs.UserError(f"{run.path(folder, folders[c])}: {number}.png is missing; run the command again")
            what = dict(file_name=f"{folders[c]}/{number}.png", label=c, class_name=class_names[c], prompt=prompts[c])
            rows.append(what | dict(source=real.keys[i], copy=copy, seed=copy_seed(args, real.keys[i], copy)))
    runs.write_metadata(run.path(folder), sorted(rows, key=lambda r: datasets.natural_key(r["file_name"])))


# ---------------------------------------------------------------------------------------------
# [6] train: a classifier for each row, number of copies and seed (Sec. 4.1).
# Reads the real images and the generated folders; writes classifier/runs/<row>[-k<k>]-seed<s>/ and classifier/.


class Order:
    """Entry at each position of an endless stream: one shuffled pass over the list after another."""

    def __init__(self, n, seed_parts):
        self.n, self.seed_parts, self.epoch = n, seed_parts, None

    def __getitem__(self, position):
        epoch, i = divmod(position, self.n)
        if epoch != self.epoch:
            g = distributed.generator(*self.seed_parts, "order", epoch)
            self.epoch, self.order = epoch, torch.randperm(self.n, generator=g).tolist()
        return self.order[i]


def seed_global(seed, device=None):
    """Seed the generators that library code draws from. torch.manual_seed would also queue a call, with its whole stack
    as text, for each GPU that was never used: a millisecond for every image."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)


class Mixture(torch.utils.data.Dataset):
    """Real and generated images in one list. Item (position, entry, share of the training that is over)."""

    def __init__(self, parts, transform, seed):
        self.entries = [(part, i) for part in parts for i in range(len(part))]
        self.transform, self.seed = transform, seed

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, item):
        position, entry, share = item
        part, i = self.entries[entry]
        seed_global(distributed.seed_of(self.seed, "augment", position))  # torchvision draws from it
        return self.transform(part[i], share), part.labels[i]


def scored_splits(args, val, test):
    """{"test": ..., "val": ... if there is one} as evaluation sees them"""
    splits = {"test": test} | ({} if val is None else {"val": val})
    return {name: Centre(Resized(images, args.clf_resize), args.clf_size) for name, images in splits.items()}


def fit(args, run, dist, folder, spec, parts, extra, seed, length, scored, prompts):
    """Train one network on one process and save the weights of its chosen epoch and metrics.json.

    spec: (network, pretrained, epochs, learning rate). parts: Resized sets, one list. extra: a Transform. length:
    images per epoch, whatever the length of the list. Official recipe: SGD with Nesterov momentum, cosine by epoch, no
    warm-up.
    """
    if (folder / "metrics.json").exists():
        return
    name, pretrained, epochs, lr = spec
    seed_global(distributed.seed_of(seed, "weights"), dist.device)
    net = Net(name, pretrained, prompts).to(dist.device)
    data = Mixture(parts, TrainTransform(args, extra, net.mean, net.std), seed)
    per_epoch = math.ceil(length / args.sgd_batch)
    total = epochs * per_epoch
    eval_steps = {math.ceil(total * (i + 1) / args.clf_evals) for i in range(args.clf_evals)}
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=args.sgd_wd)
    weights, checkpoint = net.state_dict(keep_vars=True), folder / "checkpoint.safetensors"
    first, saved, best_weights = load_training(checkpoint, weights, optimizer)
    best, history = saved or (dict(val=-1.0), [])
    order, recent = Order(len(data), (seed,)), torch.zeros(2, device=dist.device)

    def batch_at(step):
        """An epoch's last batch may be short."""
        epoch, i = divmod(step, per_epoch)
        start = epoch * length + i * args.sgd_batch
        stop = min(start + args.sgd_batch, (epoch + 1) * length)
        return [(p, order[p], step / total) for p in range(start, stop)]

    batches = (batch_at(step) for step in range(first, total))
    loader = iter(torch.utils.data.DataLoader(data, batch_sampler=batches, num_workers=args.workers))
    bar = distributed.progress(total, f"train {folder.name}", dist, initial=first, unit="steps")
    for step in range(first, total):
        net.train()
        x, y = next(loader)
        g, n = distributed.generator(seed, "mix", step), len(y)
        mixing = extra == "mixup"
        lam, index = (float(torch.rand((), generator=g)), torch.randperm(n, generator=g)) if mixing else (1.0, None)
        if mixing:  # Beta(1, 1) is uniform
            x = mixup_pairs(x, index, lam)
        if extra == "cutmix":
            x, y = cutmix_rounds(x, F.one_hot(y, len(prompts)).float(), g)
        x, y = x.to(dist.device, non_blocking=True), y.to(dist.device, non_blocking=True)
        with autocast(args, dist.device):
            logits = net(x).float()
        loss = mixup_loss(logits, y, index.to(dist.device), lam) if mixing else F.cross_entropy(logits, y)
        optimizer.param_groups[0]["lr"] = epoch_lr(step // per_epoch, lr, epochs)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        recent += torch.stack([loss.detach(), torch.ones_like(loss)])
        bar.update(1)

        if step + 1 in eval_steps:
            row = dict(step=step + 1, loss=(recent[0] / recent[1]).item())
            runs.check_finite(row["loss"], f"train {folder.name}, step {step + 1}")
            recent.zero_()
            for split in ("val", *["test"] * args.clf_report_test_selected):
                if split in scored:
                    row[split] = top1(*predict(args, net, scored[split], dist.device))
            history.append(row)
            run.log(**{k if k == "step" else f"train/{folder.name}/{k}": v for k, v in row.items()})
            if row.get("val", step) > best["val"]:  # without validation images: the last epoch
                best = dict(step=step + 1, val=row.get("val", step))
                best_weights = {k: t.detach().cpu().clone() for k, t in weights.items()}
            save_training(checkpoint, weights, optimizer, step + 1, (best, history), best_weights)
    bar.close()

    test_at = {row["step"]: row["test"] for row in history if "test" in row}
    for step in (total, best["step"]):  # the weights are still those of the last step at first
        if step != total:
            net.load_state_dict(best_weights)
        if step not in test_at:
            test_at[step] = top1(*predict(args, net, scored["test"], dist.device))
    report = dict(seed=seed, images=len(data), updates=total, best_step=best["step"], test=test_at[best["step"]])
    report |= dict(last_epoch_test=test_at[total], val=best["val"] if "val" in scored else None, history=history)
    if args.clf_report_test_selected:
        report["test_selected"] = max(test_at.values())
    runs.save_tensors(folder / "weights.safetensors", best_weights)
    runs.write_json(folder / "metrics.json", report)
    checkpoint.unlink(missing_ok=True)


@torch.no_grad()
def predict(args, net, split, device):
    """Logits [N, C] and labels [N] of a Centre split."""
    net.eval()
    loader = torch.utils.data.DataLoader(split, batch_size=4 * args.sgd_batch, num_workers=args.workers)
    with autocast(args, device):
        parts = [net(normalised(x.to(device), net.mean, net.std)).float().cpu() for x in loader]
    return torch.cat(parts), torch.tensor(split.resized.labels)


def top1(logits, labels):
    """Percent of rows whose largest logit is the label's. [N, C], [N]"""
    return 100 * (logits.argmax(1) == labels).float().mean().item()


def classifiers_to_train(args):
    """(row, k, seed) of every classifier to train; k = 0: real images only"""
    seeds = [args.seed + s for s in range(args.clf_seeds)]
    copies = {row: args.clf_copies if row in GENERATED else (0,) for row in args.rows if row != "zero-shot"}
    return [(row, k, seed) for row, ks in copies.items() for k in ks for seed in seeds]


def run_name(row, k, seed):
    return f"{row}-k{k}-seed{seed}" if k else f"{row}-seed{seed}"


def first_copies(images, real, k):
    """The generated images of the first k copies, from the folder's file names."""
    size = [len(real.of_class(c)) for c in range(len(images.class_names))]
    rows = range(len(images))
    return images.subset([i for i in rows if int(Path(images.keys[i]).stem) < k * size[images.labels[i]]])


def train(args, run, dist, real, val, test, class_names, prompts):
    alone = distributed.Dist(rank=0, local_rank=dist.local_rank, world=1, device=dist.device)
    with run.timed("train", memory_flag="--sgd-batch"):
        scored, originals, cache = scored_splits(args, val, test), Resized(real, args.clf_resize), {}
        for row, k, seed in distributed.my_items(
            classifiers_to_train(args), dist
        ):  # a classifier is one process's work
            parts, extra = [originals], row if row in TRANSFORMS else "none"
            if row in GENERATED:
                if (row, k) not in cache:
                    images = datasets.read_fewshot_folder(run.path(GENERATED[row]), class_names)
                    cache = {(row, k): Resized(first_copies(images, real, k), args.clf_resize)}
                parts, extra = [originals, cache[row, k]], args.clf_transform
            most = max(args.clf_copies) if args.clf_equal_k or row not in GENERATED else k
            length = len(real) * (1 if row == "real" else 1 + most)
            folder = run.path("classifier", "runs", run_name(row, k, seed))
            spec = (args.classifier, args.classifier_pretrained, args.clf_epochs, args.sgd_lr)
            fit(args, run, alone, folder, spec, parts, extra, seed, length, scored, prompts)
        if "zero-shot" in args.rows and dist.main:
            score_zero_shot(args, run, dist, test, prompts)
        distributed.barrier(dist)
        if dist.main:
            save_best(args, run, class_names, prompts)
    run.done("train", classifiers=len(classifiers_to_train(args)))


def score_zero_shot(args, run, dist, test, prompts):
    """CLIP with the class prompts, no training: what the test split is worth without any of this."""
    clip = load_clip(args.zeroshot_clip, device=dist.device)
    weights = F.normalize(encode_texts(clip, prompts), dim=-1)
    logits = F.normalize(encode_images(clip, test), dim=-1) @ weights.T
    accuracy = top1(logits.cpu(), torch.tensor(test.labels))
    file = run.path("classifier", "runs", "zero-shot", "metrics.json")
    runs.write_json(file, dict(seed=args.seed, updates=0, images=0, test=accuracy))


def finished(args, run, row, k=0):
    """metrics.json of the seeds of one line of the table that are there"""
    seeds = range(args.seed, args.seed + args.clf_seeds)
    names = ["zero-shot"] if row == "zero-shot" else [run_name(row, k, seed) for seed in seeds]
    files = [run.path("classifier", "runs", name, "metrics.json") for name in names]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def best_classifier(args, run):
    """(row, k, metrics) of the classifier that goes into classifier/: of the main row, the best on validation."""
    row, k, _ = max(classifiers_to_train(args), key=lambda r: (r[0] == "distdiff", r[0] in GENERATED, r[1]))
    return row, k, max(finished(args, run, row, k), key=lambda m: (m["val"] or 0, -m["seed"]))


def save_best(args, run, class_names, prompts):
    row, k, chosen = best_classifier(args, run)
    net = Net(args.classifier, False, prompts)
    net.load_state_dict(
        runs.load_tensors(run.path("classifier", "runs", run_name(row, k, chosen["seed"]), "weights.safetensors"))
    )
    about = dict(class_names=class_names, prompts=prompts, row=row, copies=k, seed=chosen["seed"])
    net.save(run.path("classifier"), about)


# ---------------------------------------------------------------------------------------------
# [7] evaluate: load the saved classifier from its folder, score it, write the table and the report.
# Reads classifier/, images/; writes results.json, samples.png, report.html.

ROW_NAMES = {
    "zero-shot": "CLIP zero-shot, no training",
    "real": "real only",
    "real-repeated": "real only, as many updates",
    "sd": "real + plain img2img (SD)",
    "rho0": "real + random shift, no gradient (rho = 0)",
    "direct": "real + direct guidance",
    "distdiff": "real + DistDiff",
}


def evaluate_saved(args, run, dist, real, test, class_names):
    if not run.path("classifier", "classes.json").exists():
        raise runs.UserError(f"{run.path('classifier')}: no classifier yet; run the stage train first")
    with run.timed("evaluate"):
        if dist.main:
            net = Net.load(run.path("classifier")).to(dist.device)
            logits, labels = predict(args, net, scored_splits(args, None, test)["test"], dist.device)
            accuracy, (row, k, chosen) = top1(logits, labels), best_classifier(args, run)
            if abs(accuracy - chosen["test"]) > 0.5:  # what is on disk must score what the trained network scored
                raise RuntimeError(f"classifier/ scores {accuracy:.2f} after loading, {chosen['test']:.2f} in training")
            saved = dict(row=row, copies=k, top1=accuracy)
            write_table(args, run, real, class_names, logits.argmax(1), labels, saved)
        distributed.barrier(dist)
    run.done("evaluate")


def write_table(args, run, real, class_names, predicted, labels, saved):
    table, metrics = [], {}
    for row in args.rows:
        for k in args.clf_copies if row in GENERATED else (0,):
            found = finished(args, run, row, k)
            name = ROW_NAMES.get(row, f"real only, as many updates, {row}")
            if not found:
                table.append([name, f"{k or ''}", "not run", "", "", "", ""])
                continue
            scores = torch.tensor([m["test"] for m in found], dtype=torch.float64)
            line = dict(mean=scores.mean().item(), std=scores.std().item() if len(found) > 1 else 0.0)
            line |= dict(per_seed=scores.tolist(), updates=found[0]["updates"], images=found[0]["images"])
            for key in ("last_epoch_test", "test_selected", "val"):
                if found[0].get(key) is not None:
                    line[key] = float(np.mean([m[key] for m in found]))
            metrics[f"{row}@{k}" if k else row] = line
            spread = f" ± {line['std']:.1f}" if len(found) > 1 else ""
            extra = [f"{line[key]:.1f}" if key in line else "" for key in ("last_epoch_test", "test_selected")]
            table.append([name, f"{k or ''}", f"{line['mean']:.1f}{spread}", *extra, line["images"], line["updates"]])

    guide = json.loads(run.path("guide", "metrics.json").read_text())
    guide = {key: guide.get(key) for key in ("test", "val", "last_epoch_test", "test_selected")}
    ours = {name: line for name, line in metrics.items() if name.split("@")[0] in ("distdiff", "direct")}
    n_images = run.manifest("expand").get("images", {})
    energy_file = run.path("energy.json")
    fell = json.loads(energy_file.read_text())["percent_fell"] if energy_file.exists() else None
    run.results(
        paper="arXiv:2403.06741",
        metrics=ours | {"saved_classifier": saved, "guide": guide, "energy_fell_percent": fell},
        baselines={name: line for name, line in metrics.items() if name not in ours},
        images=n_images,
    )

    folders, n = runs.class_folders(class_names), len(class_names)
    source = [int(real.of_class(c)[0]) for c in range(n)]
    rows, place = {"real": [real[i] for i in source]}, image_places(real)
    for row in (row for row in ("sd", "rho0", "direct", "distdiff") if run.path(GENERATED[row]).exists()):
        for copy in range(min(3, args.gen_copies)):  # the same noise in every row
            files = [run.path(GENERATED[row], folders[c], f"{place(source[c], copy)}.png") for c in range(n)]
            rows[f"{row} {copy}"] = [datasets.open_rgb(file) if file.exists() else None for file in files]
    size = min(max(args.gen_resolution, 64), 128)
    runs.samples_grid(run.path("samples.png"), list(rows.values()), list(rows), class_names, size=size)

    selected = f"best of {args.clf_evals} test scores (officially of every epoch's)"
    columns = ("training set", "k", "test top-1", "last epoch", selected, "images")
    header = [*columns, "updates"]
    confusion = torch.zeros(n, n, dtype=torch.long)
    confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
    summary = f"{args.dataset}, {len(real)} real images, {args.gen_copies} generated for each, guide {args.guide}"
    summary += f" ({guide['test']:.1f} on the test split)"
    if fell:
        summary += f"; the gradient step lowered the energy of {fell['free']:.0f} % of the probed images"
    pictures = {"A real image of each class and copies of it": "samples.png"}
    pictures["The real image nearest to each prototype"] = "prototypes.png"
    tables = {"Top-1 on the test split": (header, table)}
    runs.report(run, f"DistDiff on {args.dataset}", summary, tables, pictures, confusion.tolist(), class_names)
    runs.print_table(header, table)
    print(f"pictures: {run.path('samples.png')}   report: {run.path('report.html')}", flush=True)


# ---------------------------------------------------------------------------------------------


def autocast(args, device):
    """Mixed precision for the forward passes of training and evaluation."""
    return torch.autocast(device.type, torch.bfloat16) if args.precision == "bf16" else nullcontext()


def check_ranges(args):
    """What would otherwise fail, or silently do nothing, in the middle of a run."""
    check(args)
    steps = args.gen_steps - start_index(args.gen_strength, args.gen_steps)
    # Trap: the official code then draws plain img2img samples without a word.
    if not args.gen_period <= args.gen_step_from_end <= steps:
        raise runs.UserError(
            f"--gen-step-from-end {args.gen_step_from_end} must lie between --gen-period {args.gen_period} and the "
            f"{steps} steps that --gen-strength {args.gen_strength} leaves"
        )
    if not args.clf_copies or not 1 <= min(args.clf_copies) <= max(args.clf_copies) <= args.gen_copies:
        raise runs.UserError(f"--clf-copies {args.clf_copies}: each must lie in 1..{args.gen_copies} (--gen-copies)")
    if args.clf_size > args.clf_resize:
        raise runs.UserError(f"--clf-size {args.clf_size} is larger than --clf-resize {args.clf_resize}")
    if not set(args.rows) - {"zero-shot"}:
        raise runs.UserError("--rows: name at least one row that is trained")
    if args.gen_prompt is not None and args.gen_prompt.count("{}") != 1:
        raise runs.UserError(f"--gen-prompt {args.gen_prompt!r} needs one {{}} for the class name")


def planned_models(args):
    """Every model that a stage will load, looked through before the first one -> {flag: what to load}"""
    wanted = [("--sd-model", args.sd_model, "generator")]
    for flag, name, pretrained in (
        ("--guide", args.guide, args.guide_pretrained),
        ("--classifier", args.classifier, args.classifier_pretrained),
    ):
        kind = "clip" if name.startswith("clip:") else "timm" if pretrained else "network"
        wanted.append((flag, name.removeprefix("clip:"), kind))
    if "zero-shot" in args.rows:
        wanted.append(("--zeroshot-clip", args.zeroshot_clip, "clip"))
    found = models.check_models(wanted)
    config = models.scheduler_config(found["--sd-model"])
    if (kind := config["prediction_type"]) != "epsilon":
        raise runs.UserError(f"--sd-model {args.sd_model}: predicts {kind!r}; DistDiff needs epsilon")
    if (schedule := config["beta_schedule"]) != "scaled_linear":
        raise runs.UserError(f"--sd-model {args.sd_model}: its noise schedule is {schedule!r}, not scaled_linear")
    return found


# Flags that no stage before this one reads: they may change while it has not begun.
LATER = {
    "train": "clf_copies clf_seeds clf_epochs clf_equal_k clf_transform sgd_lr classifier classifier_pretrained "
    "zeroshot_clip"
}


def check_order(args, run, todo):
    """A stage named by --stages needs the files of the ones before it."""
    needs = dict(prototypes="guide", encode="select", expand="prototypes encode", train="expand", evaluate="train")
    for stage in todo:
        for before in needs.get(stage, "").split():
            if before not in todo and run.todo(before):
                raise runs.UserError(f"--stages {stage}: the stage {before} has not been run in {run.dir}; add it")


def main(args):
    if args.plan:
        raise runs.UserError("--plan: this script has no plan yet, only datadream.py; leave the flag out")
    check_ranges(args)
    dist = distributed.setup_distributed(args.device)
    data = load_real(args)
    names = data.class_names
    if data.note:
        distributed.say(dist, data.note)
    real, val = choose(args, data)
    prompts = prompts_of_classes(args, names)
    found = planned_models(args)
    ids = dict(generator=models.fingerprint(found["--sd-model"]), guide=args.guide)

    run = runs.open_run("distdiff", args, dist, SPEED_FLAGS, models=ids, later=LATER)
    todo = [stage for stage in args.stages if run.todo(stage)]
    select(run, real, val)
    check_order(args, run, [stage for stage in todo if stage != "select"])
    if "guide" in todo:
        train_guide(args, run, dist, real, val, data.test, prompts)
    if "prototypes" in todo:
        make_prototypes(args, run, dist, real, names, prompts)
    if "encode" in todo or "expand" in todo:
        pipe = load_pipeline(args, dist.device)
        if "encode" in todo:
            encode(args, run, dist, pipe, real)
        if "expand" in todo:
            expand(args, run, dist, pipe, real, names, prompts)
        del pipe
    if "train" in todo:
        train(args, run, dist, real, val, data.test, names, prompts)
    if "evaluate" in todo:
        evaluate_saved(args, run, dist, real, data.test, names)
    distributed.cleanup(dist)


if __name__ == "__main__":
    start(main, ARGS)
