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
    Caltech-101, k = 5, ResNet-50 from scratch: real 66.7, SD 76.6, DistDiff 83.1 (paper); not run by us for want of GPUs

Differs:
    1. images are drawn in batches; the official loop is bound to one image at a time, because it averages the energy
    2. every image has its own seed; officially each process draws from one stream that starts at 42
    3. the epoch is chosen on validation images or is the last; officially the best on the test set (printed beside ours)
    4. two controls that the paper has not: real images with as many updates, and the random shift without its gradient
"""

import hashlib
import importlib
import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import timm
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from common import datasets, distributed, models
from common import run as runs
from common.checkpoint import load_training, save_training
from common.clip import encode_texts, load_clip, save_clip, zero_shot_weights

Row = Literal[
    "zero-shot", "real", "real-repeated", "autoaugment", "randaugment", "erasing", "cutout", "gridmask", "mixup",
    "cutmix", "sd", "rho0", "direct", "distdiff",
]  # fmt: skip
Transform = Literal["none", "autoaugment", "randaugment", "erasing", "cutout", "gridmask", "mixup", "cutmix"]


@dataclass
class Args:
    preset: str = "digits"
    """configuration to start from; every other flag overrides it"""
    dataset: str = "caltech101"
    """real data set: class names, training, validation and test images; also pathmnist, bloodmnist, breastmnist"""
    data_dir: str | None = None
    """where the data set lies or is downloaded to; for `folder`: DIR/train/<class>/, DIR/test/<class>/"""
    output_dir: str | None = None
    """run folder; None: runs/distdiff/<preset>-seed<seed>"""
    seed: int = 0
    """seed of the choice of real images, of the guide and of the first classifier"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: frozen weights and activations in bfloat16, trained weights in float32"""
    compile: bool = False
    """torch.compile the U-Net for generation: minutes of start-up, then faster on a GPU"""
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
    resume: bool = True
    """continue in the run folder; --no-resume: refuse a folder that is not empty"""
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """where scalars go besides metrics.jsonl"""
    workers: int = 8
    """loader processes per rank; 0: load in the training process"""

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
    real_per_class: int | None = None
    """real images drawn from each class of the training split; None: all"""
    merge_val: bool = False
    """add the data set's own validation split to the training images, as the paper does for DTD"""
    val_fraction: float = 0.0
    """share of training images that choose the epoch if there is no validation split; 0: keep the last epoch"""

    # ---- [2] guide, [3] prototypes (Sec. 3.2) --------------------------------------------------
    guide_epochs: int = 100
    """epochs of the guide, on the real images alone; the rest as in stage 6"""
    groups: int = 3
    """K, group prototypes of each class (Table 6)"""

    # ---- [4] encode, [5] expand (Sec. 3.3) -----------------------------------------------------
    gen_seed: int = 0
    """the k-th copy of a real image is a function of (gen_seed, that image, k), of generator and guide"""
    gen_copies: int = 5
    """k, generated images for each real one"""
    gen_resolution: int = 512
    """pixels per side of a generated image"""
    gen_save_size: int | None = None
    """pixels per side of the stored images, None: as generated; at clf_resize the training sees the same bits"""
    gen_prompt: str | None = None
    """prompt with {} for the class name; None: the official code's for this data set"""
    gen_steps: int = 50
    """sampler steps"""
    gen_strength: float = 0.5
    """s, share of the steps that are run; the others' noise is never added (0.2 for PathMNIST)"""
    gen_guidance: float = 7.5
    """classifier-free guidance scale w"""
    gen_step_from_end: int = 20
    """M, the latent is moved M steps before the last (Table 5); at most gen_strength x gen_steps"""
    gen_period: int = 2
    """P, denoising steps of the look-ahead whose energies are averaged (Table 7)"""
    gen_rho: float = 10.0
    """rho, size of the one gradient step on e and b (Table 11); depends on the scale of the guide's features"""
    gen_radius: float = 0.2
    """epsilon, the latent stays within this distance of where it was, in every element"""
    gen_class_weight: float = 1.0
    """lambda_c, weight of the distance to the class prototype; 0 leaves it out"""
    gen_group_weight: float = 1.0
    """lambda_g, weight of the distance to the nearest group prototype (Table 12); 0 leaves it out"""
    gen_normalize: bool = False
    """L2-normalise the guide's feature in the energy, as the prototypes are; the official code does not; needs its rho"""
    gen_guide_input: Literal["pm1", "normalized"] = "pm1"
    """pm1: the guide sees the decoder's [-1, 1], as officially; normalized: what it was trained on"""
    gen_micro_batch: int = 16
    """images per forward pass on one process; speed and memory only"""
    grad_checkpoint: bool = False
    """recompute activations of U-Net and decoder in the gradient step: 1.4 instead of 8.1 GiB per image, same bits"""
    energy_probe: int = 64
    """copies whose energy is measured again after the gradient step, for the report; 0: none"""

    # ---- [6] train the classifiers (Sec. 4.1) --------------------------------------------------
    rows: tuple[Row, ...] = ("real", "real-repeated", "sd", "rho0", "distdiff")
    """rows of the table; rho0: random shift without gradient; direct: Sec. 4.4; a transform's name: real images with it"""
    clf_copies: tuple[int, ...] = (5,)
    """k of the generated rows, each at most gen_copies; the sets are nested"""
    clf_seeds: int = 3
    """classifiers per row, seeds seed, seed + 1, ..."""
    clf_epochs: int = 100
    """epochs"""
    clf_equal_k: bool = True
    """epochs of all rows but `real` are as long as the largest k's; --no-clf-equal-k: those of each generated list"""
    clf_transform: Transform = "none"
    """transformation added to the generated rows (Table 1, second line)"""
    sgd_lr: float = 0.1
    """learning rate, cosine to 0 over the epochs; Nesterov momentum 0.9"""
    sgd_wd: float = 1e-4
    """weight decay, on all weights"""
    sgd_batch: int = 64
    """images per step"""
    clf_resize: int = 256
    """images are first resized to this square, proportions not kept"""
    clf_size: int = 224
    """crop that the networks see"""
    clf_flip: bool = True
    """mirror half of the images; not for digits and signs"""
    clf_evals: int = 20
    """validations during the training, evenly spread, the last at its end"""
    clf_report_test_selected: bool = True
    """also score the test set at each validation and print its best, as the official code; never used to choose"""


# Comments: the paper's top-1, real / SD / DistDiff at k = 5. Learning rates of fine-tuning are ours: not published.
FINE_TUNED = dict(classifier_pretrained=True, sgd_lr=0.01)
PRESETS = {
    "digits": dict(  # 4 real images per class, tiny models; our measured table stands in docs/distdiff.md
        dataset="digits", sd_model="tiny", zeroshot_clip="tiny", precision="fp32", workers=0,
        real_per_class=4, val_fraction=0.2, guide="test_resnet", guide_epochs=100, classifier="test_resnet",
        gen_resolution=32, gen_steps=20, gen_step_from_end=8, gen_micro_batch=50, energy_probe=50,
        rows=(
            "zero-shot", "real", "real-repeated", "autoaugment", "randaugment", "erasing", "cutout", "gridmask",
            "mixup", "cutmix", "sd", "rho0", "distdiff",
        ),
        clf_copies=(1, 2, 5), clf_epochs=30, clf_resize=36, clf_size=32, clf_flip=False, clf_evals=3,
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

# Official code. The paper's appendix has "a photo of a {} car." for Cars: --gen-prompt. No period for the tiny world.
PROMPTS = {
    "digits": "a photo of a {}", "dtd": "{} texture.", "pathmnist": "a colon pathological image of {}.",
    "breastmnist": "a photo of {} ultrasound image.", "bloodmnist": "a photo of {}, a type of cell.",
    "pets": "A photo of a pet {}.", "flowers102": "A photo of a {}, a type of flower.",
    "fgvc_aircraft": "A photo of a {}, a type of aircraft",
}  # fmt: skip
NAMES = {
    "imagenette": "tench,English springer,cassette player,chain saw,church,French horn,garbage truck,gas pump,golf ball,"
    "parachute",
    "pathmnist": "adipose,background,debris,lymphocytes,mucus,smooth muscle,normal colon mucosa,"
    "cancer-associated stroma,colorectal adenocarcinoma epithelium",
}
MEDMNIST = {"pathmnist": "PathMNIST", "breastmnist": "BreastMNIST", "bloodmnist": "BloodMNIST"}
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
    """lam CE(logits, y) + (1 - lam) CE(logits, y[index]). Trap: the official code passes lam = 1, labels stay unmixed."""
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
