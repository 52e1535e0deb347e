"""Real-Fake: training data synthesis by distribution matching (J. Yuan et al., ICLR 2024, arXiv:2310.10402).

Replace a labelled set of real images by generated ones: one image per real image and version, near it but not it.

    [1] caption --> [2] embed --> [3] finetune --> [4] generate --> [5] train --> [6] attack --> [7] evaluate
    one sentence    CLIP image    LoRA with the    from the noised   a network     who was in     top-1 on the
    per image       embedding     matching term    real latent       from scratch  the data?      real test set

Run:
    python realfake.py  # 10 digits, 20 real images per class, tiny models, 2 CPU cores
    torchrun --standalone --nproc-per-node 8 realfake.py --preset imagenette --sd-batch 64

Expect:
    digits: real 95.8, synthetic 83.1 (1 version) to 95.2 (4), real + synthetic 97.4; all of it in docs/realfake.md
    ImageNet-1K, ResNet-50, synthetic only: 70.9 (1 version), 76.0 (10 versions) (paper); not run by us for want of GPUs

Differs:
    1. each image has its own seed and its own visual token; the released sampler mixes the tokens of a batch
    2. gradients are averaged over processes; the released multi-GPU tuning does not synchronise them
    3. the LoRA sees all images; the released code always drops half of them (left over from the privacy experiment)
    4. its captioning, its evaluation out of distribution and its membership inference were never released: ours
"""

from dataclasses import dataclass, replace
from typing import Literal

from common.cli import Frame, Natural, parse, start

Stage = Literal["caption", "embed", "finetune", "generate", "train", "attack", "evaluate"]
Token = Literal["image", "class_mean", "none"]
Prior = Literal["image", "noise"]
Ablation = Literal["no-lora", "no-matching", "no-token", "class-mean", "no-prior", "no-caption"]


@dataclass
class Args(Frame):
    dataset: str = "imagenette"
    """real data set; `folder`: your own images in data_dir"""
    seed: Natural = 42
    """seed of the trainings; what is drawn has gen_seed"""
    stages: tuple[Stage, ...] = ("caption", "embed", "finetune", "generate", "train", "attack", "evaluate")
    """stages to run, in order; a finished stage is never run again"""
    real_per_class: int | None = None
    """real images drawn from each class of the training split; None: all"""

    # ---- models --------------------------------------------------------------------------------
    sd_model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """generator: hub id, local folder in diffusers layout, or tiny"""
    token_clip: str = "ViT-L-14-quickgelu/openai"
    """CLIP of the visual token (its embedding is as wide as the generator's text) and of the row zero-shot"""
    captioner: str = "Salesforce/blip2-opt-2.7b"
    """image-to-text model: hub id, local folder, or tiny"""

    # ---- [1] caption, [2] embed ----------------------------------------------------------------
    captions_file: str | None = None
    """ready captions: JSON {class: {file name: caption}}, class by name or folder, a folder of <class>.json, or
    captions.json of another run; None: write them with captioner"""
    caption: bool = True
    """prompts hold the caption of the image; --no-caption: the class name alone"""
    token: Token = "image"
    """visual token in the last text slot: the image's own embedding, the mean of its class, or none"""

    # ---- [3] finetune: LoRA with distribution matching -----------------------------------------
    lora: bool = True
    """--no-lora: the stock generator"""
    dm_lambda: float = 0.003
    """lambda, weight of the squared norm of the summed residual; 0 leaves the term out"""
    dm_batch: int = 8
    """B, images whose residuals are summed: a hyper-parameter. Other values than 8 rescale lambda by 8 / B"""
    dm_gamma: float = 5.0
    """gamma of the min-SNR weights; inf: all weights 1"""
    sd_rank: int = 4
    """rank r of the LoRA; alpha = r"""
    sd_lr: float = 1e-4
    """AdamW learning rate of the LoRA"""
    sd_batch: int = 8
    """images per step, over all processes"""
    tune_epochs: int = 100
    """passes over the real images"""
    tune_max_steps: int = 160_000
    """the tuning is never longer than this; the paper's budget for ImageNet-1K is not published"""
    tune_flip: bool = True
    """mirror half of the images while tuning; not for digits and signs"""

    # ---- [4] generate --------------------------------------------------------------------------
    gen_seed: int = 0
    """version v of a real image is a function of (gen_seed, v, the image's name) and of the adapter"""
    gen_versions: int = 1
    """k, generated images for each real one"""
    gen_resolution: int = 512
    """pixels per side of a generated image"""
    gen_steps: int = 30
    """sampler steps"""
    i2i_strength: float = 0.75
    """share of the steps that are run when starting from the real image: 30 -> 22"""
    gen_guidance: float = 2.0
    """classifier-free guidance scale w"""
    gen_lora_scale: float = 0.5
    """scale of the adapter while sampling; it was tuned at 1"""
    gen_prior: Prior = "image"
    """start from the noised latent of the real image, or from noise (text-to-image, all steps)"""
    gen_negative: str = "distorted, unrealistic, blurry, out of frame, cropped, deformed"
    """negative prompt; it never gets a visual token"""
    gen_split: Literal["strided", "official"] = "strided"
    """batches of a process; official: contiguous ranges, where the last process takes the whole remainder"""
    gen_micro_batch: int = 24
    """images per forward pass on one process; speed and memory only"""
    ablations: tuple[Ablation, ...] = ()
    """further rows of the table, each the method with one part off (class-mean: the paper's token), one version"""

    # ---- [5] train: from scratch, last epoch -----------------------------------------------------
    net_model: str = "resnet50"
    """timm model, random start"""
    net_stem: Literal["imagenet", "cifar"] = "imagenet"
    """cifar: 3x3 stem of stride 1 without pooling, for a timm ResNet on small images"""
    net_versions: tuple[int, ...] = (1,)
    """the scaling curve: versions in the training set, each at most gen_versions; the last is added to real images"""
    clf_seeds: int = 3
    """classifiers per row, seeds seed, seed + 1, ..."""
    net_epochs: int = 200
    """epochs; the last one counts, nothing is selected"""
    net_equal_updates: bool = False
    """an epoch is as long as one over the real images for every row; officially k versions mean k times the updates"""
    net_milestones: tuple[int, ...] = (50, 100, 150)
    """epochs at which the rate is multiplied by net_decay (timm does it one epoch early)"""
    net_decay: float = 0.2
    """factor at each milestone"""
    net_lr: float = 0.1
    """SGD with Nesterov momentum 0.9, not scaled by the batch"""
    net_warmup: int = 5
    """epochs of warm-up, linear from 1e-5"""
    net_wd: float = 5e-4
    """weight decay of convolutions and linear layers; biases and BatchNorm have none"""
    net_smoothing: float = 0.1
    """label smoothing: the silent default of timm's script"""
    net_batch: int = 512
    """images per step, over all processes; an incomplete last batch is dropped"""
    net_micro_batch: int = 128
    """images that share BatchNorm statistics, as on each of the official four GPUs; running statistics are averaged"""
    net_size: int = 224
    """pixels per side that the network sees"""
    net_crop: float = 0.08
    """smallest area of the random resized crop"""
    net_flip: float = 0.5
    """probability of mirroring"""
    net_jitter: float = 0.4
    """strength of brightness, contrast and saturation jitter"""
    net_crop_pct: float = 0.95
    """share of the resized test image that the centre crop keeps: 224 of 235"""

    # ---- [6] attack, [7] evaluate ----------------------------------------------------------------
    mia_models: int = 0
    """shadow models of the membership inference (even, 6 or more; the official split has 10); 0: no attack"""
    mia_versions: int = 1
    """versions that each shadow model generates from its members"""
    ood: tuple[str, ...] = ()
    """further test sets NAME=DIR with folders by WordNet id or by ImageNet number (V2, Sketch, R, A)"""


# Comments: what the paper reports. Its tables for the subsets could not be read; we quote no number from memory.
PRESETS = {
    "digits": dict(  # 20 real images per class, tiny models; our measured table stands in docs/realfake.md
        dataset="digits", sd_model="tiny", token_clip="tiny", captioner="tiny", precision="fp32", workers=0, seed=0,
        real_per_class=20, tune_epochs=10, tune_flip=False, sd_lr=1e-3,
        gen_versions=4, gen_resolution=32, gen_micro_batch=50,
        ablations=("no-lora", "no-matching", "no-token", "class-mean", "no-prior", "no-caption"),
        net_model="test_resnet", net_versions=(1, 2, 4), net_epochs=16, net_milestones=(8, 12, 15), net_warmup=1,
        net_batch=32, net_micro_batch=32, net_size=32, net_crop=0.7, net_flip=0.0, net_crop_pct=1.0,
        mia_models=6,
    ),
    "imagenette": dict(dataset="imagenette", data_dir="data"),
    "imagewoof": dict(dataset="imagewoof", data_dir="data"),
    "imagenet100": dict(dataset="imagenet100", data_dir="data"),  # recipe not released: that of imagenette
    "imagenet1k": dict(  # 70.9 with 1 version, 76.0 with 10; epochs and milestones are our choice, not released
        dataset="imagenet", data_dir="data", net_epochs=300, net_milestones=(90, 180, 270), net_decay=0.1,
    ),
    "cifar10": dict(  # our extension: the paper's code has no trace of CIFAR
        dataset="cifar10", data_dir="data", net_model="resnet18", net_stem="cifar", net_size=32,
    ),
}  # fmt: skip

if __name__ == "__main__":
    ARGS = parse(Args, PRESETS, __doc__)  # before the imports that take seconds: --help and a wrong flag answer at once

import json
import math
import random
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, UniPCMultistepScheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.transforms import v2

from common import datasets, distributed, models
from common import run as runs
from common.checkpoint import load_training, save_training
from common.clip import encode_images, load_clip, zero_shot_weights
from common.loop import sum_in_order
from common.loop import units_of as micro_batches

# The replacements that the official code makes in open_clip's list of class names.
IMAGENET_NAMES = {
    421: "baluster handrail", 478: "cardboard box carton", 692: "product packet packaging",
    744: "projectile missile", 789: "shoji screen room divider", 836: "sunglass", 842: "swim trunks shorts",
}  # fmt: skip
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of every self- and cross-attention
SPEED_FLAGS = (
    "output_dir", "device", "compile", "stages", "resume", "track", "workers", "gen_micro_batch", "gen_split",
)  # fmt: skip
PART = 256  # images in one file of captions or embeddings; an interrupted stage loses at most that many


# ---------------------------------------------------------------------------------------------
# The method: the paper's equations as plain functions. Change the idea here.


def training_prompt(class_name, caption):
    """Official code: text of the LoRA tuning. A missing caption leaves the class name."""
    return f"photo of {class_name}, {caption}" if caption else f"photo of {class_name}"


def sampling_prompt(class_name, caption):
    """Official code: text of the generation, with and without a caption."""
    return f"photo of {class_name}, {caption}, best quality" if caption else f"{class_name}, photo, best quality"


def alphas_cumprod(n=1000, beta_start=0.00085, beta_end=0.012):
    """Scaled-linear schedule: abar_t = prod_{s<=t} (1 - beta_s), sqrt(beta) linear. -> [n] float32"""
    return (1 - torch.linspace(beta_start**0.5, beta_end**0.5, n) ** 2).cumprod(0)


def add_noise(z, eps, abar):
    """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps. [B, 4, h, w] twice, abar_t [B] -> [B, 4, h, w]"""
    abar = abar.view(-1, 1, 1, 1)
    return abar.sqrt() * z + (1 - abar).sqrt() * eps


def guided(eps_u, eps_c, w):
    """Classifier-free guidance: eps = eps_u + w (eps_c - eps_u). w = 1: conditional, w = 0: unconditional."""
    return eps_u + w * (eps_c - eps_u)


def snr_of(abar):
    """Signal-to-noise ratio abar / (1 - abar) of a timestep. [B] -> [B]"""
    return abar / (1 - abar)


def snr_weight(snr, gamma):
    """min-SNR weight of the noise prediction: w = min(snr, gamma) / snr, so 0 < w <= 1. [B] -> [B]"""
    return snr.clamp(max=gamma) / snr


def matching_loss(pred, target, w, lam):
    """Official code: denoising loss plus the squared first moment of the residuals, the explicit matching term.

    r_i = pred_i - target_i;  L_diff = mean_i w_i mean(r_i^2);  L_dm = mean((sum_i w_i r_i)^2);  L = L_diff + lam L_dm.
    pred, target [B, 4, h, w], w [B] -> (L, L_diff, L_dm). The paper speaks of the mean over the batch, the code sums:
    with the mean the same lambda would be B^2 = 64 times weaker. Always L_dm <= B^2 L_diff.
    """
    r = pred.float() - target.float()
    diffusion = (w * r.pow(2).mean((1, 2, 3))).mean()
    dm = (w.view(-1, 1, 1, 1) * r).sum(0).pow(2).mean()
    return diffusion + lam * dm, diffusion, dm


def matching_weight(lam, b):
    """lambda for a batch of b images: 0.003 belongs to B = 8, and the term's share of the loss grows like B."""
    return lam * 8 / b


def class_means(features, labels, n_classes):
    """Mean embedding of each class, no normalisation. [N, D], [N] -> [C, D]; NaN for a class without an image"""
    total = torch.zeros(n_classes, features.shape[1]).index_add_(0, labels, features.float())
    return total / torch.bincount(labels, minlength=n_classes)[:, None]


def visual_tokens(features, labels, rows, mode, n_classes):
    """Token g_i of each image in rows; NaN elsewhere, so that a leak from other images cannot stay unseen.

    features [N, D] raw CLIP embeddings, labels [N], rows: positions -> [N, D], or None for mode none. class_mean: the
    mean over the rows of the class. Trap: the released sampler stacks the batch's embeddings along the wrong axis and
    reads them row by row, so that every token is a mixture of the batch.
    """
    if mode == "none":
        return None
    if mode == "image" and len(rows) == len(features):
        return features  # as it lies in the file: memory-mapped, not copied
    rows, tokens = torch.as_tensor(rows), torch.full(features.shape, float("nan"))
    own = features[rows].float()
    tokens[rows] = own if mode == "image" else class_means(own, labels[rows], n_classes)[labels[rows]]
    return tokens


def with_token(h, g):
    """Text states with the visual token in the last slot, unscaled. [B, 77, W], [B, W] or None -> [B, 77, W]"""
    if g is None:
        return h
    h = h.clone()
    h[:, -1] = g.to(h)
    return h


def kept_steps(strength, steps):
    """Sampler steps that image-to-image runs: the last min(int(strength * steps), steps). 0.75, 30 -> 22"""
    return min(int(steps * strength), steps)


def make_unipc(stored):
    """UniPC (order 2, bh2) over the noise schedule of the stored scheduler.

    Trap: final_sigmas_type. Since 2024 diffusers ends at sigma 0 by default; the paper's version ended at t = 0.
    """
    return UniPCMultistepScheduler.from_config(stored.config, final_sigmas_type="sigma_min")


def class_range(n_classes, n_workers, worker):
    """Official code: worker m of M takes classes [m n, (m+1) n), n = N // M; the last one also the remainder."""
    n = n_classes // n_workers
    return range(worker * n, n_classes if worker == n_workers - 1 else (worker + 1) * n)


def multistep_lr(epoch, base, milestones, decay, warmup, start=1e-5):
    """timm's rate of an epoch: linear from start, then base * decay^{milestones <= epoch + 1}: one epoch early."""
    if epoch < warmup:
        return start + epoch * (base - start) / warmup
    return base * decay ** sum(m <= epoch + 1 for m in milestones)


def subset_labels(labels, indices):
    """Original ImageNet labels -> (positions that belong to the subset, label = place in its index list)"""
    place = {index: i for i, index in enumerate(indices)}
    kept = [i for i, label in enumerate(labels) if label in place]
    return kept, [place[labels[i]] for i in kept]


def half_split(n, n_models=10):
    """Membership of sample j in shadow model m: every sample is a member of exactly half of the models. -> bool [M, n]

    Official code. The sizes of the models' sets are only about n / 2.
    """
    return np.random.RandomState(0).uniform(0, 1, (n_models, n)).argsort(0) < n_models // 2


def membership_logit(logits, labels):
    """phi = log(p_y / (1 - p_y)) = z_y - logsumexp over the other classes, float64. [N, C], [N] -> [N]"""
    z = logits.double()
    own = z.gather(1, labels[:, None])
    return (own - z.scatter(1, labels[:, None], -math.inf).logsumexp(1, keepdim=True))[:, 0]


def balanced(keep):
    """Shadows to compare for each sample: equally many that saw it and that did not. bool [M, N] -> 2 x bool [M, N]

    Where each model in turn is the target, a member has one shadow fewer on its own side than a non-member. A mean of
    fewer shadows lies farther from the target, so that without this a network that learnt nothing would seem to
    say "not a member" (AUC below 50 %; negligible with hundreds of shadows, large with ten).
    """
    n = torch.minimum(keep.sum(0), (~keep).sum(0))
    return keep & (keep.cumsum(0) <= n), ~keep & ((~keep).cumsum(0) <= n)


def lira_score(shadow, inside, outside, target, pool=False):
    """LiRA (Carlini et al. 2022): log N(phi; shadows inside) - log N(phi; shadows outside), the constant dropped.

    shadow [M, N] phi of the shadow models, inside and outside bool [M, N]: which of them were trained with the sample
    and which without, target [N] phi of the attacked model -> [N] float64. Population deviation per sample; pool: one
    over all samples, for few shadows.
    """
    shadow, target, score = shadow.double(), target.double(), 0
    for sign, mask in ((1, inside), (-1, outside)):
        mask = mask.double()
        count = mask.sum(0)
        mean = (shadow * mask).sum(0) / count
        squares = ((shadow - mean) ** 2 * mask).sum(0)
        var = squares.sum() / count.sum() if pool else squares / count
        score = score + sign * (-(var.sqrt() + 1e-30).log() - (target - mean) ** 2 / (2 * var + 1e-30))
    return score


def roc(score, member):
    """False and true positive rates over all thresholds, equal scores together; both begin at 0. [N], bool [N]"""
    values = score.unique().flip(0)  # descending
    place = torch.searchsorted(-values, -score)
    hits = torch.zeros(2, len(values), dtype=torch.float64)
    hits[0].index_add_(0, place, (~member).double())
    hits[1].index_add_(0, place, member.double())
    rates = F.pad(hits.cumsum(1), (1, 0)) / hits.sum(1, keepdim=True)
    return rates[0], rates[1]


def attack_figures(score, member):
    """-> dict: AUC, best balanced accuracy over all thresholds, TPR at 0.1 % and 1 % FPR. [N], bool [N]"""
    fpr, tpr = roc(score, member)
    figures = dict(auc=torch.trapezoid(tpr, fpr).item(), balanced_accuracy=((tpr + 1 - fpr) / 2).max().item())
    return figures | {f"tpr_at_{at:g}": tpr[fpr <= at].max().item() for at in (0.001, 0.01)}


# ---------------------------------------------------------------------------------------------
# The data: real images in one fixed order, and the sets that are generated from them.


def in_order(images):
    """The same images class by class, in natural order of their names: seeds, splits and file numbers depend on it."""
    order = sorted(range(len(images)), key=lambda i: (images.labels[i], datasets.natural_key(images.keys[i])))
    return images.subset(order)


def choose_real(args, data):
    """The images to replace: the training split, or real_per_class of each class."""
    images, n = data.train, len(data.class_names)
    if args.real_per_class is not None:
        images = images.subset(datasets.few_shot(images, data.name, args.real_per_class, args.seed, n))
    if data.name == "folder":
        datasets.verify(images)
    return in_order(images)


def prompt_names(dataset, class_names):
    """Class names as the prompts have them: for ImageNet and its subsets open_clip's with the official replacements."""
    if dataset not in datasets.IMAGENET_SUBSETS:
        return class_names
    from open_clip import IMAGENET_CLASSNAMES

    return [IMAGENET_NAMES.get(i, IMAGENET_CLASSNAMES[i]) for i in datasets.IMAGENET_SUBSETS[dataset]]


@dataclass
class Variant:
    """One generated set: `versions` images from each real image in rows, with an adapter tuned on the same rows."""

    folder: str
    adapter: str | None  # name of the file in lora/; None: the stock generator
    rows: list[int]
    versions: int
    lam: float
    token: Token
    prior: Prior
    caption: bool


def generated_sets(args, n):
    """The method, its ablations with one part off, and the shadow models of the attack, each on half of the images."""
    flags = dict(versions=args.gen_versions, lam=args.dm_lambda, token=args.token, prior=args.gen_prior)
    full = Variant("images", "full" if args.lora else None, list(range(n)), caption=args.caption, **flags)
    off = {
        "no-lora": dict(adapter=None), "no-matching": dict(lam=0.0), "no-token": dict(token="none"),
        "class-mean": dict(token="class_mean"), "no-prior": dict(prior="noise"), "no-caption": dict(caption=False),
    }  # fmt: skip
    sets = {"images": full}
    for name in args.ablations:
        other = replace(full, folder=f"ablations/{name}", versions=1, **off[name])
        if full.adapter and other.adapter and name != "no-prior":  # the part is missing in the tuning too
            other.adapter = name
        sets[other.folder] = other
    for m, keep in enumerate(half_split(n, args.mia_models) if args.mia_models else []):
        rows = np.flatnonzero(keep).tolist()
        shadow = replace(full, folder=f"shadows/{m}/images", rows=rows, versions=args.mia_versions)
        shadow.adapter = full.adapter and f"shadow-{m}"
        sets[shadow.folder] = shadow
    return sets


def image_places(real):
    """-> place(i, copy), the number of that copy in its class folder: copy * n_c + place of image i in its class.

    A set of fewer copies is then a part of each set of more.
    """
    size, place = {}, []
    for label in real.labels:
        place.append(size.get(label, 0))
        size[label] = size.get(label, 0) + 1
    return lambda i, copy: copy * size[real.labels[i]] + place[i]


def generated_images(run, v, real, versions):
    """The first versions of a set as datasets.Images, in the order version, real image."""
    members, folders = real.subset(v.rows), runs.class_folders(real.class_names)
    place = image_places(members)
    pairs = [(i, k) for k in range(versions) for i in range(len(members))]
    keys = [f"{folders[members.labels[i]]}/{place(i, k)}.png" for i, k in pairs]
    return datasets.Images([members.labels[i] for i, _ in pairs], keys, real.class_names, run.path(v.folder))


def chunks(items, size):
    """[a, b, c, d, e], 2 -> [a, b], [c, d], [e]"""
    return [items[i : i + size] for i in range(0, len(items), size)]


def padded(tensors, b):
    """Stack of exactly b tensors: the last one is repeated. The networks then always see the same shape."""
    return torch.stack(tensors + tensors[-1:] * (b - len(tensors)))


# ---------------------------------------------------------------------------------------------
# [1] caption, [2] embed: one sentence and one CLIP vector per real image.
# Reads the real images, writes captions.json and embeddings.safetensors (in parts/ while they grow).


def caption_all(args, run, dist, real):
    with run.timed("caption"):
        if args.captions_file:
            captions = read_captions(args.captions_file, real)
        else:
            captions = in_parts(run, dist, "captions", real, captioner_of(args, dist.device))
            captions = [text for part in captions or [] for text in part]
        if dist.main:
            runs.write_json(run.path("captions.json"), dict(zip(real.keys, captions, strict=True)))
    run.done("caption", captions=len(real))


def in_parts(run, dist, name, real, work):
    """work(Images) -> something JSON-able, for each part of PART images that has no file yet. Rank 0 gets the list."""
    parts = [range(i, min(i + PART, len(real))) for i in range(0, len(real), PART)]
    files = [run.path("parts", f"{name}-{j:05d}.json") for j in range(len(parts))]
    bar = distributed.progress(len(distributed.my_items(parts, dist)), name, dist, unit="parts")
    for part, file in zip(distributed.my_items(parts, dist), distributed.my_items(files, dist), strict=True):
        if not file.exists():
            runs.write_json(file, work(real.subset(part)))
        bar.update(1)
    bar.close()
    distributed.barrier(dist)
    return [json.loads(file.read_text()) for file in files] if dist.main else None


def read_captions(file, real):
    """Captions of the images: {class: {file name: caption}}, class by its name or, as published for ImageNet, by its
    folder; the published form, a folder of <class>.json; or the captions.json of another run, {image: caption}."""
    try:
        if Path(file).is_dir():
            given = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in sorted(Path(file).glob("*.json"))}
        else:
            given = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise runs.UserError(f"--captions-file {file}: {error}") from error
    kinds = {type(entry) for entry in given.values()} if isinstance(given, dict) else set()
    if kinds not in ({dict}, {str}):
        raise runs.UserError(
            f"--captions-file {file}: wanted is {{class: {{file name: caption}}}}, or {{image: caption}}"
        )
    found = []
    for key, label in zip(real.keys, real.labels, strict=True):
        folder, _, name = key.rpartition("/")
        texts = given.get(real.class_names[label]) or given.get(folder.rpartition("/")[2]) or {}
        texts, name = (given, key) if kinds == {str} else (texts, name)
        if name not in texts:
            raise runs.UserError(f"--captions-file {file}: no caption for {name} of {real.class_names[label]!r}")
        found.append((texts[name] or "").strip())
    return found


def captioner_of(args, device):
    """-> function: Images -> list of captions. Greedy, no prompt, at most 16 new tokens, stripped."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    where = models.resolve(args.captioner, "captioner")
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    processor = AutoProcessor.from_pretrained(where)
    model = AutoModelForImageTextToText.from_pretrained(where, dtype=dtype).to(device).eval()
    if getattr(model.config, "image_token_index", 0) is None:  # BLIP-2 as older transformers saved it
        model.config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")

    @torch.no_grad()
    def write(pictures):
        inputs = processor(images=pictures, return_tensors="pt").to(device)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        # Trap: in transformers 5 max_length=16, the sister repository's setting, counts BLIP-2's 32 image tokens too.
        ids = model.generate(**inputs, max_new_tokens=16, num_beams=1, do_sample=False)
        return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]

    return lambda images: [c for rows in chunks(range(len(images)), 16) for c in write([images[i] for i in rows])]


def embed(args, run, dist, real):
    """Projected CLIP image embeddings, not normalised, float16: what the text encoder's own width can hold."""
    clip = load_clip(args.token_clip, dist.device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    with run.timed("embed"):
        parts = [range(i, min(i + PART, len(real))) for i in range(0, len(real), PART)]
        files = [run.path("parts", f"embeddings-{j:05d}.safetensors") for j in range(len(parts))]
        for part, file in zip(distributed.my_items(parts, dist), distributed.my_items(files, dist), strict=True):
            if not file.exists():
                runs.save_tensors(file, {"embeddings": encode_images(clip, real.subset(part), 64).half()})
        distributed.barrier(dist)
        if dist.main:
            rows = torch.cat([runs.load_tensors(file)["embeddings"] for file in files])
            runs.save_tensors(run.path("embeddings.safetensors"), {"embeddings": rows})
    run.done("embed", embeddings=len(real))


# ---------------------------------------------------------------------------------------------
# The generator and what it is told about an image.


def open_generator(name, device, precision):
    """The stock pipeline, frozen, without safety checker. One load serves tuning and generation."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    path = models.resolve(name, "generator")
    off = dict(safety_checker=None, requires_safety_checker=False)
    pipe = StableDiffusionPipeline.from_pretrained(path, dtype=dtype, **off)
    if type(pipe) is not StableDiffusionPipeline:
        raise runs.UserError(f"{name}: a {type(pipe).__name__}; Real-Fake needs a Stable Diffusion 1.x or 2.x pipeline")
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False).eval().to(device)
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)  # the layout that convolutions are fastest in, on CPU and GPU
    pipe.vae.float()
    return pipe


def token_ids(pipe, prompts):
    """list of M prompts -> [M, 77], padded and truncated to the tokenizer's full length"""
    settings = dict(padding="max_length", truncation=True, max_length=pipe.tokenizer.model_max_length)
    return pipe.tokenizer(prompts, return_tensors="pt", **settings).input_ids


def vae_factor(pipe):
    """Pixels per latent along one side: 8 for Stable Diffusion"""
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def latent_shape(pipe, size):
    return pipe.unet.config.in_channels, size // vae_factor(pipe), size // vae_factor(pipe)


def lora_settings(r):
    """y = W x + b + (alpha / r) B A x with alpha = r: the file of the adapter then needs no alpha."""
    return dict(r=r, lora_alpha=r, lora_dropout=0.0)


class Condition:
    """Prompt and visual token of every real image of a set; the others have NaN tokens and no caption at all."""

    def __init__(self, args, run, pipe, v, real, names):
        self.pipe, self.names, self.labels, self.caption = pipe, names, real.labels, v.caption
        self.rows, captions = set(v.rows), {}
        if v.caption:
            written = json.loads(run.path("captions.json").read_text())
            captions = {i: written[real.keys[i]] for i in v.rows}
        self.captions, self.tokens = captions, None
        if v.token != "none":
            features = runs.load_tensors(run.path("embeddings.safetensors"))["embeddings"]
            width = pipe.text_encoder.config.hidden_size
            if features.shape[1] != width:
                what = f"--token-clip {args.token_clip}: its embedding has {features.shape[1]} numbers"
                raise runs.UserError(f"{what}, the generator's text states have {width}; choose a CLIP of that width")
            labels = torch.tensor(real.labels)
            self.tokens = visual_tokens(features, labels, v.rows, v.token, len(names))

    def prompt(self, i, make):
        """make: training_prompt or sampling_prompt"""
        assert i in self.rows, f"image {i} is not one of this set"
        return make(self.names[self.labels[i]], self.captions[i] if self.caption else "")

    @torch.no_grad()
    def states(self, rows, b, make):
        """Text states of these images with their tokens, filled up to b rows: [b, 77, W]"""
        rows = rows + rows[-1:] * (b - len(rows))
        ids = token_ids(self.pipe, [self.prompt(i, make) for i in rows])
        h = self.pipe.text_encoder(ids.to(self.pipe.text_encoder.device))[0]
        return with_token(h, None if self.tokens is None else self.tokens[rows])


# ---------------------------------------------------------------------------------------------
# [3] finetune: LoRA on every attention of the U-Net, denoising loss plus the matching term, always conditional.
# Reads the real images, captions.json, embeddings.safetensors; writes lora/pytorch_lora_weights.safetensors and, for
# ablations and shadows, lora/<name>/pytorch_lora_weights.safetensors.


def adapter_file(run, name):
    return run.path("lora", *([] if name == "full" else [name]), "pytorch_lora_weights.safetensors")


def tuning_pixels(image, size, u, v, flip):
    """PIL RGB -> [3, size, size] in [-1, 1]: shorter side to size (bilinear), crop at the shares u, v, mirrored"""
    image = v2.functional.resize(image, size, v2.InterpolationMode.BILINEAR)
    free_x, free_y = image.size[0] - size, image.size[1] - size
    image = v2.functional.crop(image, int(u * (free_y + 1)), int(v * (free_x + 1)), size, size)
    image = v2.functional.horizontal_flip(image) if flip else image
    return v2.functional.pil_to_tensor(image).float() / 127.5 - 1


def finetune(args, run, dist, pipe, real, names, sets):
    pipe.unet.add_adapter(LoraConfig(target_modules=UNET_TARGETS, **lora_settings(args.sd_rank)))
    cast_training_params(pipe.unet, torch.float32)
    jobs = list({v.adapter: v for v in reversed(list(sets.values())) if v.adapter}.values())[::-1]
    # With one matching batch per step a process tunes alone, and the processes take different adapters.
    share = args.sd_batch > args.dm_batch
    alone = distributed.Dist(rank=0, local_rank=dist.local_rank, world=1, device=dist.device)
    with run.timed("finetune", memory_flag="--dm-batch"):
        for v in jobs if share else distributed.my_items(jobs, dist):
            condition = Condition(args, run, pipe, v, real, names)
            tune_lora(args, run, dist if share else alone, pipe, v, real, condition)
    distributed.barrier(dist)
    pipe.unload_lora_weights()
    run.done("finetune", adapters=[v.adapter for v in jobs])


def tune_lora(args, run, team, pipe, v, real, condition):
    """Tune one adapter on the rows of a set and save it. team: the processes that share each step."""
    file = adapter_file(run, v.adapter)
    if file.exists():
        return
    per_epoch = len(v.rows) // args.sd_batch  # an incomplete batch would have another L_dm
    if not per_epoch:
        raise runs.UserError(
            f"--sd-batch {args.sd_batch}: {v.adapter} has only {len(v.rows)} images; choose it smaller"
        )
    total = min(args.tune_epochs * per_epoch, args.tune_max_steps)
    layers = [(n, p) for n, p in pipe.unet.named_parameters() if p.requires_grad]
    params = [p for _, p in layers]
    with torch.no_grad():
        for name, p in layers:  # A ~ N(0, 1/r^2), B = 0: the adapter starts as the stock generator
            g = distributed.generator(args.seed, "lora", name)
            p.copy_(torch.randn(p.shape, generator=g) / args.sd_rank if "lora_A" in name else torch.zeros(p.shape))
    optimizer = torch.optim.AdamW(params, lr=args.sd_lr, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    checkpoint, weights = file.with_name("checkpoint.safetensors"), {str(i): p for i, p in enumerate(params)}
    first, _, _ = load_training(checkpoint, weights, optimizer)

    abar = alphas_cumprod(**schedule_of(pipe.scheduler.config)).to(team.device)
    lam, size, b = matching_weight(v.lam, args.dm_batch), args.gen_resolution, args.dm_batch
    recent = torch.zeros(4, device=team.device)
    bar = distributed.progress(total, f"finetune {v.adapter}", team, initial=first, unit="steps")
    for step in range(first, total):
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(len(v.rows), generator=distributed.generator(args.seed, "epoch", epoch)).tolist()
        batch = [v.rows[i] for i in order[position * args.sd_batch : (position + 1) * args.sd_batch]]

        # All that is random in the step, drawn for the whole batch in this order, whoever computes which part.
        g = distributed.generator(args.seed, "step", step)
        where = torch.rand(3, len(batch), generator=g)  # crop row, crop column, mirror
        t = torch.randint(len(abar), (len(batch),), generator=g)
        noise, eps = torch.randn(2, len(batch), *latent_shape(pipe, size), generator=g)
        gradients, units = {}, [slice(k, k + b) for k in range(0, len(batch), b)]
        for j in micro_batches(team.rank, len(units), team.world):
            u = units[j]
            flips = (where[2, u] < 0.5).logical_and(torch.tensor(args.tune_flip)).tolist()
            crops = zip(batch[u], where[0, u].tolist(), where[1, u].tolist(), flips, strict=True)
            x = torch.stack([tuning_pixels(real[i], size, r, c, flip) for i, r, c, flip in crops]).to(team.device)
            abar_t, target = abar[t[u].to(team.device)], eps[u].to(team.device)
            with autocast(args, team.device):
                with torch.no_grad():
                    posterior = pipe.vae.encode(x).latent_dist
                    z0 = posterior.mean + posterior.std * noise[u].to(team.device)
                    z_t = add_noise(pipe.vae.config.scaling_factor * z0.float(), target, abar_t)
                h = condition.states(batch[u], b, training_prompt)
                prediction = pipe.unet(z_t, t[u].to(team.device), h).sample
            w = snr_weight(snr_of(abar_t), args.dm_gamma)
            loss, diffusion, dm = matching_loss(prediction, target, w, lam)
            gradients[j] = [*torch.autograd.grad(loss, params), torch.stack([loss, diffusion, dm]).detach()]

        *grads, values = sum_in_order(gradients, len(units), team)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad / len(units)  # averaged over the matching batches, which are never summed into one
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        recent += torch.cat([values / len(units), values.new_ones(1)])
        bar.update(1)
        if (step + 1) % 25 == 0 or step + 1 == total:
            loss, diffusion, dm = (recent[:3] / recent[3]).tolist()
            runs.check_finite(loss, f"finetune, {v.adapter}, step {step + 1}")
            chart = f"finetune/{v.adapter}"
            run.log(step + 1, **{f"{chart}/loss": loss, f"{chart}/diffusion": diffusion, f"{chart}/matching": lam * dm})
            bar.set_postfix(loss=f"{loss:.4f}")
            recent.zero_()
        if (step + 1) % 100 == 0 and step + 1 < total and team.main:
            save_training(checkpoint, weights, optimizer, step + 1)
    bar.close()
    if team.main:
        tensors = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
        tensors = {f"unet.{k}": t.float().cpu().contiguous() for k, t in tensors.items()}
        runs.save_tensors(file, tensors)
        checkpoint.unlink(missing_ok=True)
    distributed.barrier(team)


def schedule_of(config):
    """Arguments of alphas_cumprod from a pipeline's scheduler config."""
    if config.beta_schedule != "scaled_linear":
        raise runs.UserError(f"sd_model's noise schedule is {config.beta_schedule!r}; Real-Fake needs scaled_linear")
    return dict(n=config.num_train_timesteps, beta_start=config.beta_start, beta_end=config.beta_end)


# ---------------------------------------------------------------------------------------------
# [4] generate: versions 1..k of every real image. Reads lora/, captions, embeddings, the real images;
# writes images/, ablations/<name>/, shadows/<m>/images/, each an ImageFolder; skips files that exist.


class Folded:
    """A U-Net with an adapter folded into its weights: W = W0 + s B A. No extra products while sampling."""

    def __init__(self, unet):
        self.unet, self.stock = unet, {}

    @torch.no_grad()
    def swap(self, tensors, scale):
        """tensors: {unet.<module>.lora.down.weight: A, ...up.weight: B}; {} for the stock U-Net."""
        for weight, stock in self.stock.values():
            weight.copy_(stock)
        for key in [k for k in tensors if k.endswith("down.weight")]:
            name = key.split(".lora.")[0].removeprefix("unet.")
            weight = self.unet.get_submodule(name).weight
            a, b = (tensors[k].to(weight.device) for k in (key, key.replace("down.weight", "up.weight")))
            _, stock = self.stock.setdefault(name, (weight, weight.clone()))
            weight.copy_(stock.float() + scale * (b @ a))


def denoise(unet, stored, steps, strength, w, z0, noise, h, watch=lambda t: None):
    """UniPC with guidance: from noise if z0 is None, else from the noised latent z0, the last kept_steps of the steps.

    z0, noise [B, 4, h, w]; h [2 B, 77, W]: negative above conditional -> latents [B, 4, h, w]
    """
    scheduler, z = make_unipc(stored), noise
    scheduler.set_timesteps(steps, device=noise.device)
    first = 0 if z0 is None else steps - kept_steps(strength, steps)
    times = scheduler.timesteps[first:]
    scheduler.set_begin_index(first)
    if z0 is not None:
        z = add_noise(z0, noise, alphas_cumprod(**schedule_of(stored.config)).to(z0.device)[times[0]])
    for t in times:
        watch(t)
        eps_u, eps_c = unet(torch.cat([z, z]).to(h.dtype), t, h).sample.float().chunk(2)
        z = scheduler.step(guided(eps_u, eps_c, w), t, z).prev_sample
    return z


def version_seed(args, key, version):
    """Seed of one version of the real image with this key; all sets share it, so they differ by the method alone."""
    return distributed.seed_of(args.gen_seed, version, key)


def my_batches(args, dist, batches):
    """The batches of this process."""
    if args.gen_split == "official":
        return [batches[i] for i in class_range(len(batches), dist.world, dist.rank)]
    return distributed.my_items(batches, dist)


def generate(args, run, dist, pipe, real, names, sets):
    if dist.main:
        forecast_disk(args, run, sets)
    folded = Folded(pipe.unet)
    unet = torch.compile(pipe.unet) if args.compile else pipe.unet
    with run.timed("generate", memory_flag="--gen-micro-batch"), runs.ImageWriter() as writer:
        for v in sets.values():
            folded.swap(runs.load_tensors(adapter_file(run, v.adapter)) if v.adapter else {}, args.gen_lora_scale)
            draw_versions(args, run, dist, pipe, unet, writer, v, real, Condition(args, run, pipe, v, real, names))
    distributed.barrier(dist)
    for v in sets.values() if dist.main else []:
        list_versions(args, run, v, real, names)
    folded.swap({}, 0)
    run.done("generate", images={v.folder: len(v.rows) * v.versions for v in sets.values()})


def forecast_disk(args, run, sets):
    """Stop before the start when the images will not fit. A PNG of a photo takes about 2/3 of its pixels' bytes."""
    n = sum(len(v.rows) * v.versions for v in sets.values())
    there = sum(1 for v in sets.values() for _ in run.path(v.folder).glob("*/*.png"))
    need, free = 2 * (n - there) * args.gen_resolution**2, shutil.disk_usage(run.dir).free
    print(f"generate: {n - there:,} of {n:,} images to draw, about {need / 1e9:.2f} GB; {free / 1e9:.1f} GB are free")
    if need > free:
        raise runs.UserError(
            f"{run.dir}: the images need about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; "
            "free some space, lower --gen-versions or choose another --output-dir"
        )


def draw_versions(args, run, dist, pipe, unet, writer, v, real, condition):
    """All missing images of one set. Posterior and text of an image are computed once for all of its versions."""
    todo = {}
    if dist.main:  # rank 0 looks, so that all processes cut the same list
        for k in range(v.versions):
            files = generated_files(run, v, real, k)
            todo |= {i: [*todo.get(i, []), k] for i, file in zip(v.rows, files, strict=True) if not file.exists()}
    todo = distributed.broadcast_object(todo, dist)
    mine = my_batches(args, dist, chunks([i for i in v.rows if i in todo], args.gen_micro_batch))
    files = [dict(zip(v.rows, generated_files(run, v, real, k), strict=True)) for k in range(v.versions)]
    bar = distributed.progress(sum(len(todo[i]) for rows in mine for i in rows), f"generate {v.folder}", dist)
    for rows in mine:
        posterior = posterior_of(args, pipe, real, rows) if v.prior == "image" else None
        h = guidance_states(args, pipe, condition, rows)
        for k in sorted({k for i in rows for k in todo[i]}):
            seeds = [version_seed(args, real.keys[i], k) for i in rows]
            for i, image in zip(rows, sample_versions(args, pipe, unet, posterior, h, seeds), strict=True):
                if k in todo[i]:
                    writer.save(files[k][i], image)
                    bar.update(1)
    bar.close()


def generated_files(run, v, real, version):
    """Path of that version of each of the set's rows, in their order."""
    images = generated_images(run, v, real, version + 1)
    return [images.root / key for key in images.keys[version * len(v.rows) :]]


@torch.no_grad()
def posterior_of(args, pipe, real, rows):
    """Mean and deviation of the VAE's posterior: both sides forced to the size (bicubic). -> 2 x [b, 4, h, w]"""
    size, pixels = args.gen_resolution, []
    for i in rows:
        image = real[i].resize((size, size))  # Pillow's default is bicubic; the proportions are not kept
        pixels.append(v2.functional.pil_to_tensor(image).float() / 127.5 - 1)
    with autocast(args, pipe.vae.device):
        posterior = pipe.vae.encode(padded(pixels, args.gen_micro_batch).to(pipe.vae.device)).latent_dist
    return posterior.mean.float(), posterior.std.float()


@torch.no_grad()
def guidance_states(args, pipe, condition, rows):
    """Negative text without a token above the images' text with theirs: [2 b, 77, W]"""
    h_c = condition.states(rows, args.gen_micro_batch, sampling_prompt)
    h_u = pipe.text_encoder(token_ids(pipe, [args.gen_negative]).to(h_c.device))[0]
    return torch.cat([h_u.expand_as(h_c), h_c])


@torch.no_grad()
def sample_versions(args, pipe, unet, posterior, h, seeds):
    """posterior: of posterior_of, or None to start from noise. h [2 b, 77, W], seeds: B ints -> B uint8 [3, H, W].

    The generator of an image draws the noise of its posterior, then that of the latent. The network always sees a full
    micro-batch: a fixed shape gives bit-equal images in any slot, beside any neighbours, on any number of processes.
    """
    shape, device = latent_shape(pipe, args.gen_resolution), pipe.unet.device
    both = [torch.randn(2, *shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    xi, noise = padded(both, args.gen_micro_batch).to(device).unbind(1)
    scaling = pipe.vae.config.scaling_factor
    z0 = scaling * (posterior[0] + posterior[1] * xi) if posterior else None
    z = denoise(unet, pipe.scheduler, args.gen_steps, args.i2i_strength, args.gen_guidance, z0, noise, h)
    with autocast(args, device):
        x = pipe.vae.decode(z / scaling).sample.float()
    pixels = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return list(pixels[: len(seeds)])


def list_versions(args, run, v, real, names):
    """metadata.jsonl of a set: what each image is, from which real image, and its seed. Fails if one is missing."""
    images, rows = generated_images(run, v, real, v.versions), []
    missing = [key for key in images.keys if not (images.root / key).exists()]
    if missing:
        raise runs.UserError(f"{images.root}: {missing[:5]} are missing; run the same command again")
    captions = json.loads(run.path("captions.json").read_text()) if v.caption else {}
    for j, (file, label) in enumerate(zip(images.keys, images.labels, strict=True)):
        version, source = j // len(v.rows), real.keys[v.rows[j % len(v.rows)]]
        prompt = sampling_prompt(names[label], captions.get(source, ""))
        what = dict(prompt=prompt, seed=version_seed(args, source, version), version=version, source=source)
        rows.append(dict(file_name=file, label=label, class_name=real.class_names[label], **what))
    assert len(rows) == len(v.rows) * v.versions, "one image per real image and version"
    runs.write_metadata(images.root, rows)


# ---------------------------------------------------------------------------------------------
# [5] train: a network from scratch on synthetic, real + synthetic and real images. Reads the real images and the sets;
# writes classifier/runs/<row>-seed<s>/. The test split is not opened before stage 7.


def classifier_loss(logits, labels, smoothing):
    """Cross-entropy with label smoothing, the same as timm's. [B, C], [B] -> scalar"""
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def make_net(args, n_classes, seed):
    """timm model, random start of this seed; the last BatchNorm of each residual block starts at zero, as timm does."""
    seed_augmentation(distributed.seed_of(seed, "net"))
    try:
        net = timm.create_model(args.net_model, num_classes=n_classes)
    except RuntimeError as error:
        raise runs.UserError(f"--net-model {args.net_model}: {error}") from error
    if args.net_stem == "cifar":
        if not hasattr(net, "maxpool"):
            raise runs.UserError(f"--net-stem cifar: {args.net_model} is no ResNet of timm's; use --net-stem imagenet")
        width = net.bn1.num_features
        net.conv1, net.maxpool = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.Identity()
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net


def make_optimizer(args, net):
    """SGD with Nesterov momentum; weight decay on convolutions and linear layers only, by timm's grouping"""
    return create_optimizer_v2(net, opt="sgd", lr=args.net_lr, weight_decay=args.net_wd, momentum=0.9)


def transforms(args, training):
    """Official code: timm's defaults, which overwrite the transforms that the released data set class defines."""
    size, stats = args.net_size, dict(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    if not training:
        return timm.data.create_transform(size, interpolation="bicubic", crop_pct=args.net_crop_pct, **stats)
    crop = dict(scale=(args.net_crop, 1.0), ratio=(3 / 4, 4 / 3), interpolation="random")
    change = dict(hflip=args.net_flip, color_jitter=args.net_jitter or None, auto_augment=None, re_prob=0.0)
    return timm.data.create_transform(size, is_training=True, **crop, **change, **stats)


def seed_augmentation(seed):
    """The two generators that timm's transforms and initialisations draw from."""
    random.seed(seed)
    torch.default_generator.manual_seed(seed)


class Mixed(torch.utils.data.Dataset):
    """Lists of images one after the other, no re-weighting. Item (position, entry): augmented by (seed, position)."""

    def __init__(self, args, sources, seed):
        self.entries = [(source, i) for source in sources for i in range(len(source))]
        self.transform, self.seed, self.cache = transforms(args, training=True), seed, {}
        self.keep = len(self.entries) * 3 * args.net_size**2 < 2e8  # a small set is decoded once

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, item):
        position, entry = item
        source, i = self.entries[entry]
        image = self.cache.get(entry) or source[i]
        if self.keep:
            self.cache[entry] = image
        seed_augmentation(distributed.seed_of(self.seed, "augment", position))
        return self.transform(image), source.labels[i]


def training_rows(args):
    """{row: (folder of its generated set or None, versions, with the real images)} in the order of the table"""
    rows = {"real": (None, 0, True)}
    rows |= {f"synthetic-{k}x": ("images", k, False) for k in args.net_versions}
    rows[f"real+synthetic-{args.net_versions[-1]}x"] = ("images", args.net_versions[-1], True)
    return rows | {name: (f"ablations/{name}", 1, False) for name in args.ablations}


def train(args, run, dist, real, sets):
    jobs = [(row, args.seed + s) for row in training_rows(args) for s in range(args.clf_seeds)]
    share = args.net_micro_batch < args.net_batch
    alone = distributed.Dist(rank=0, local_rank=dist.local_rank, world=1, device=dist.device)
    with run.timed("train", memory_flag="--net-micro-batch"):
        for row, seed in jobs if share else distributed.my_items(jobs, dist):
            folder, versions, with_real = training_rows(args)[row]
            sources = [real] * with_real
            sources += [generated_images(run, sets[folder], real, versions)] if folder else []
            place = run.path("classifier", "runs", f"{row}-seed{seed}")
            train_net(args, run, dist if share else alone, place, f"{row}/seed{seed}", sources, len(real), seed)
    run.done("train", classifiers=len(jobs))


def train_net(args, run, team, folder, chart, sources, n_real, seed):
    """Train one network to the last epoch and save it in folder. team: the processes that share each step."""
    if (folder / "metrics.json").exists():
        return
    data = Mixed(args, sources, seed)
    length = min(n_real, len(data)) if args.net_equal_updates else len(data)
    size = min(args.net_batch, length)
    steps = length // size  # the incomplete last batch is dropped
    n_classes = len(sources[0].class_names)
    net = make_net(args, n_classes, seed).to(team.device, memory_format=torch.channels_last).train()
    optimizer, params = make_optimizer(args, net), [p for p in net.parameters() if p.requires_grad]
    running = [b for n, b in net.named_buffers() if n.endswith(("running_mean", "running_var"))]
    weights = {n: t for n, t in net.state_dict(keep_vars=True).items() if not n.endswith("num_batches_tracked")}
    checkpoint = folder / "checkpoint.safetensors"
    first, _, _ = load_training(checkpoint, weights, optimizer)

    def units_of(epoch):
        """Micro-batches of each step of an epoch, as lists of (position in the endless stream, entry)"""
        order = torch.randperm(len(data), generator=distributed.generator(seed, "order", epoch)).tolist()
        stream = [(epoch * len(data) + p, entry) for p, entry in enumerate(order)]
        return [chunks(stream[s * size : (s + 1) * size], args.net_micro_batch) for s in range(steps)]

    mine = (
        u
        for e in range(first, args.net_epochs)
        for units in units_of(e)
        for u in (units[j] for j in micro_batches(team.rank, len(units), team.world))
    )
    loader = iter(torch.utils.data.DataLoader(data, batch_sampler=mine, num_workers=args.workers))
    bar = distributed.progress(args.net_epochs, f"train {chart}", team, initial=first, unit="epochs")
    for epoch in range(first, args.net_epochs):
        rate = multistep_lr(epoch, args.net_lr, args.net_milestones, args.net_decay, args.net_warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = torch.zeros((), device=team.device)
        for units in units_of(epoch):
            before, gradients = [b.clone() for b in running], {}
            for j in micro_batches(team.rank, len(units), team.world):
                x, labels = (t.to(team.device, non_blocking=True) for t in next(loader))
                for b, old in zip(running, before, strict=True):
                    b.copy_(old)
                with autocast(args, team.device):
                    logits = net(x.contiguous(memory_format=torch.channels_last))
                loss = classifier_loss(logits, labels, args.net_smoothing) * len(labels) / size
                after = [b.clone() * len(labels) / size for b in running]
                gradients[j] = [*torch.autograd.grad(loss, params), loss.detach(), *after]
            total = sum_in_order(gradients, len(units), team)
            for p, grad in zip(params, total, strict=False):
                p.grad = grad
            for b, mean in zip(running, total[len(params) + 1 :], strict=True):
                b.copy_(mean)
            optimizer.step()
            losses += total[len(params)]
        value = losses.item() / steps
        runs.check_finite(value, f"train, {chart}, epoch {epoch + 1}")
        run.log(epoch + 1, **{f"train/{chart}/loss": value, f"train/{chart}/lr": rate})
        bar.update(1)
        if (epoch + 1) % 5 == 0 and epoch + 1 < args.net_epochs and team.main:
            save_training(checkpoint, weights, optimizer, epoch + 1)
    bar.close()
    if team.main:
        runs.save_tensors(folder / "weights.safetensors", weights)
        runs.write_json(folder / "metrics.json", dict(images=len(data), updates=steps * args.net_epochs, loss=value))
        checkpoint.unlink(missing_ok=True)
    distributed.barrier(team)


def trained_net(args, folder, n_classes, device):
    """The network of a finished run, in eval mode."""
    net = make_net(args, n_classes, 0)
    net.load_state_dict(runs.load_tensors(folder / "weights.safetensors"), strict=False)  # without batch counters
    return net.to(device, memory_format=torch.channels_last).eval()


@torch.no_grad()
def logits_of(args, net, images, device):
    """Logits [N, C] float32 of images under the evaluation transform"""
    view = Views(images, transforms(args, training=False))
    loader = torch.utils.data.DataLoader(view, batch_size=args.net_micro_batch, num_workers=args.workers)
    with autocast(args, device):
        return torch.cat([net(x.to(device, memory_format=torch.channels_last)).float().cpu() for x in loader])


class Views(torch.utils.data.Dataset):
    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i])


# ---------------------------------------------------------------------------------------------
# [6] attack: membership inference. For each shadow model: LoRA on its members, images from its members (stages 3, 4),
# a network on them; and the same for real members. Writes shadows/<m>/<kind>/ and attack.json, attack.png.


def attack(args, run, dist, real, sets):
    n_classes, keep = len(real.class_names), torch.from_numpy(half_split(len(real), args.mia_models))
    jobs = [(kind, m) for kind in ("synthetic", "real") for m in range(args.mia_models)]
    share = args.net_micro_batch < args.net_batch
    alone = distributed.Dist(rank=0, local_rank=dist.local_rank, world=1, device=dist.device)
    with run.timed("attack", memory_flag="--net-micro-batch"):
        for kind, m in jobs if share else distributed.my_items(jobs, dist):
            v, folder = sets[f"shadows/{m}/images"], run.path("shadows", str(m), kind)
            members = real.subset(v.rows)
            sources = [generated_images(run, v, real, v.versions) if kind == "synthetic" else members]
            train_net(
                args, run, dist if share else alone, folder, f"shadow-{kind}/{m}", sources, len(members), args.seed + m
            )
        distributed.barrier(dist)
        scores = {}
        for kind, m in distributed.my_items(jobs, dist):
            net = trained_net(args, run.path("shadows", str(m), kind), n_classes, dist.device)
            scores[kind, m] = membership_logit(logits_of(args, net, real, dist.device), torch.tensor(real.labels))
        scores = {k: v for part in distributed.all_gather_object(scores, dist) for k, v in part.items()}
        if dist.main:
            kinds = ("synthetic", "real")
            phi = {kind: torch.stack([scores[kind, m] for m in range(args.mia_models)]) for kind in kinds}
            results, curves = {}, {}
            for kind in kinds:
                results[kind], curves[kind] = attack_results(phi[kind], keep)
            runs.write_json(run.path("attack.json"), results)
            draw_roc(run.path("attack.png"), curves)
    run.done("attack", shadows=args.mia_models)


def attack_results(phi, keep):
    """Each model in turn is the target, the others the shadows. phi [M, N], keep bool [M, N] -> figures, scores

    -> {"lira": {figure: mean over targets}, "threshold": ...}, [(score, member)] of LiRA for the curve.
    """
    found, curve = {"lira": [], "threshold": []}, []
    for t in range(len(phi)):
        others = torch.arange(len(phi)) != t
        score = lira_score(phi[others], *balanced(keep[others]), phi[t], pool=len(phi) < 64)
        curve.append((score, keep[t]))
        found["lira"].append(attack_figures(score, keep[t]))
        found["threshold"].append(attack_figures(phi[t], keep[t]))  # a threshold on p_y is one on phi
    mean = {name: {k: float(np.mean([f[k] for f in rows])) for k in rows[0]} for name, rows in found.items()}
    return mean, curve


def draw_roc(path, curves):
    """ROC of LiRA on log axes, one line per target and kind. curves: {kind: [(score, member)]}"""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5))
    axes = figure.add_subplot(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(1e-3, 1))
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title="Who was a member? LiRA")
    axes.plot([1e-3, 1], [1e-3, 1], ":", color="grey")
    for kind, color in (("real", "tab:red"), ("synthetic", "tab:blue")):
        for i, (score, member) in enumerate(curves[kind]):
            axes.plot(*roc(score, member), color=color, alpha=0.7, label=None if i else f"trained on {kind} images")
    axes.legend()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    runs.write_bytes(path, data.getvalue())


# ---------------------------------------------------------------------------------------------
# [7] evaluate: every saved network on the real test split and further test sets. Writes results.json, samples.png,
# report.html and classifier/, a timm folder of the first seed of the largest synthetic row.


def ood_images(root, indices):
    """Test set with folders by WordNet id (Sketch, R, A) or ImageNet number (V2) -> Images, labels that occur

    indices: ImageNet numbers of the classes the network knows, in label order. Images of other classes are dropped,
    labels are places in that list. Trap: V2's folders sort as 0, 1, 10, 100 when taken for words.
    """
    from timm.data import ImageNetInfo

    root = Path(root)
    if not root.is_dir():
        raise runs.UserError(f"--ood {root}: no such folder")
    number = {wnid: i for i, wnid in enumerate(ImageNetInfo().label_names())}
    labels, keys = [], []
    for folder in sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: datasets.natural_key(p.name)):
        label = int(folder.name) if folder.name.isdecimal() else number.get(folder.name)
        if label is None or label >= 1000:
            raise runs.UserError(f"{folder}: neither a WordNet id of ImageNet nor a number below 1000")
        files = sorted(
            (f for f in folder.iterdir() if f.suffix.lower() in datasets.IMAGE_SUFFIXES), key=lambda f: f.name
        )
        labels += [label] * len(files)
        keys += [f"{folder.name}/{file.name}" for file in files]
    kept, mapped = subset_labels(labels, indices)
    if not kept:
        raise runs.UserError(f"{root}: no images of the classes of this network")
    names = [str(i) for i in indices]
    return datasets.Images(mapped, [keys[i] for i in kept], names, root), sorted(set(mapped))


def ood_sets(args):
    """--ood NAME=DIR ... -> {name: (Images, labels that occur)}"""
    found = {}
    for entry in args.ood:
        name, _, folder = entry.partition("=")
        if not folder or name in ("", "test", *found):
            raise runs.UserError(f"--ood {entry}: wanted is NAME=DIR, each NAME once and none of them test")
        found[name] = ood_images(folder, datasets.IMAGENET_SUBSETS[args.dataset])
    return found


def restricted_top1(logits, labels, known):
    """Percent right when only the classes in `known` may be answered: the protocol of ImageNet-A and -R."""
    allowed = torch.full((logits.shape[1],), -math.inf)
    allowed[known] = 0.0
    return 100 * ((logits + allowed).argmax(1) == torch.tensor(labels)).float().mean().item()


def evaluate(args, run, dist, data, real, sets):
    with run.timed("evaluate"):
        n, test = len(data.class_names), data.test
        every = list(range(n))
        scored = {"test": (test, every)} | ood_sets(args)
        jobs = [(row, args.seed + s) for row in training_rows(args) for s in range(args.clf_seeds)]
        mine = {}
        for row, seed in distributed.my_items(jobs, dist):
            net = trained_net(args, run.path("classifier", "runs", f"{row}-seed{seed}"), n, dist.device)
            logits = {name: logits_of(args, net, images, dist.device) for name, (images, _) in scored.items()}
            top1 = {name: restricted_top1(logits[name], images.labels, k) for name, (images, k) in scored.items()}
            mine[row, seed] = (top1, logits["test"].argmax(1))
        found = {k: v for part in distributed.all_gather_object(mine, dist) for k, v in part.items()}
        if dist.main:
            write_report(args, run, data, real, sets, found, list(scored), zero_shot_top1(args, test, dist.device))
    run.done("evaluate", classifiers=len(jobs))


def zero_shot_top1(args, test, device):
    """Top-1 of the CLIP that gave the tokens: what a foundation model knows without any of this."""
    clip = load_clip(args.token_clip, device)
    weights = zero_shot_weights(clip, prompt_names(args.dataset, test.class_names), ["a photo of a {}"])
    predicted = (F.normalize(encode_images(clip, test), dim=-1) @ weights.T).argmax(1).cpu()
    return 100 * (predicted == torch.tensor(test.labels)).float().mean().item()


ORDERINGS = {  # the paper's claims, each as (better row, worse row); k: the largest number of versions
    "latent prior beats a start from noise": ("synthetic-1x", "no-prior"),
    "LoRA beats the stock generator": ("synthetic-1x", "no-lora"),
    "caption and class beat the class alone": ("synthetic-1x", "no-caption"),
    "visual token beats none": ("synthetic-1x", "no-token"),
    "the matching term helps": ("synthetic-1x", "no-matching"),
    "more versions are better": ("synthetic-{k}x", "synthetic-1x"),
    "real + synthetic beats real": ("real+synthetic-{k}x", "real"),
}


def compared(metrics, k):
    """Rows [claim, difference, verdict]. shows: the difference exceeds twice its standard error; not: the reverse."""
    table = []
    for claim, pair in ORDERINGS.items():
        a, b = (metrics.get(name.format(k=k)) for name in pair)
        if not a or not b or a is b:
            table.append([claim, "", "not run"])
            continue
        n, gap = len(a["per_seed"]), a["mean"] - b["mean"]
        error = math.sqrt((a["std"] ** 2 + b["std"] ** 2) / n)
        verdict = "within noise" if n < 2 or abs(gap) <= 2 * error else "shows" if gap > 0 else "the reverse"
        table.append([claim, f"{gap:+.1f}" + (f" ± {error:.1f}" if n > 1 else ""), verdict])
    return table


def write_report(args, run, data, real, sets, found, splits, clip_top1):
    metrics, table = {"zero-shot": dict(mean=clip_top1)}, [["CLIP zero-shot, no training", f"{clip_top1:.1f}", "", ""]]
    table[0] += [""] * (len(splits) - 1)
    for row in training_rows(args):
        per_seed = {s: [found[row, args.seed + i][0][s] for i in range(args.clf_seeds)] for s in splits}
        about = json.loads(run.path("classifier", "runs", f"{row}-seed{args.seed}", "metrics.json").read_text())
        mean, std = ({s: float(f(v)) for s, v in per_seed.items()} for f in (np.mean, spread))
        metrics[row] = dict(mean=mean["test"], std=std["test"], per_seed=per_seed["test"], updates=about["updates"])
        metrics[row] |= {f"ood/{s}": dict(mean=mean[s], std=std[s]) for s in splits[1:]}
        cells = [f"{mean[s]:.1f}" + (f" ± {std[s]:.1f}" if args.clf_seeds > 1 else "") for s in splits]
        table.append([row, *cells, about["images"], about["updates"]])
    header = ["training set", *("test top-1" if s == "test" else s for s in splits), "images", "updates"]
    claims = compared(metrics, args.net_versions[-1])
    tables = {"Top-1, last epoch": (header, table)}
    tables["Which of the paper's orderings show here"] = (["claim", "difference", "verdict"], claims)
    pictures = {"Real and generated samples": "samples.png"}
    if run.path("attack.json").exists():
        attacks = json.loads(run.path("attack.json").read_text())
        metrics["membership"] = attacks
        rows = [[k, a, *(f"{100 * x:.1f}" for x in f.values())] for k, by in attacks.items() for a, f in by.items()]
        head = ["trained on", "attack", "AUC", "balanced accuracy", "TPR at 0.1 % FPR", "TPR at 1 % FPR"]
        tables["Membership inference, percent (chance: 50, 50, 0.1, 1)"] = (head, rows)
        pictures["Membership inference"] = "attack.png"

    best, names = f"synthetic-{args.net_versions[-1]}x", data.class_names
    confusion = torch.zeros(len(names), len(names), dtype=torch.long)
    predicted, labels = found[best, args.seed][1], torch.tensor(data.test.labels)
    confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
    baselines = {k: metrics.pop(k) for k in ("zero-shot", "real")}
    n_images = run.manifest("generate").get("images", {})
    run.results(paper="arXiv:2310.10402", metrics=metrics, baselines=baselines, orderings=claims, images=n_images)
    samples(args, run, real, sets)
    runs.report(
        run, f"Real-Fake on {args.dataset}", summary_of(args, real), tables, pictures, confusion.tolist(), names
    )
    save_classifier(args, run, best, names)
    for head, rows in tables.values():
        runs.print_table(head, rows)
    print(f"pictures: {run.path('samples.png')}   report: {run.path('report.html')}", flush=True)


def spread(values):
    """Standard deviation over the seeds, 0 for a single one"""
    return np.std(values, ddof=1) if len(values) > 1 else 0.0


def summary_of(args, real):
    return (
        f"{args.dataset}, {len(real)} real images, {args.gen_versions} generated for each; every network from scratch"
    )


def samples(args, run, real, sets):
    """samples.png: the first image of each class, its versions, and what each ablation makes of it"""
    first = [int(real.of_class(c)[0]) for c in range(len(real.class_names))]
    rows = {"real": [real[i] for i in first]}
    for v in (v for v in sets.values() if not v.folder.startswith("shadows")):
        for k in range(min(v.versions, 4)):
            files = generated_files(run, v, real, k)
            rows[f"{Path(v.folder).name} {k}"] = [datasets.open_rgb(files[v.rows.index(i)]) for i in first]
    size = min(max(args.gen_resolution, 64), 128)
    runs.samples_grid(run.path("samples.png"), list(rows.values()), list(rows), real.class_names, size=size)


def save_classifier(args, run, row, class_names):
    """classifier/: loads with timm.create_model("local-dir:...", pretrained=True); the cifar stem needs ours first"""
    net = trained_net(args, run.path("classifier", "runs", f"{row}-seed{args.seed}"), len(class_names), "cpu")
    net = net.to(memory_format=torch.contiguous_format)  # the file format knows no other layout
    timm.models.save_for_hf(net, run.path("classifier"), safe_serialization=True)
    runs.write_json(run.path("classifier", "classes.json"), dict(class_names=class_names, row=row, seed=args.seed))


# ---------------------------------------------------------------------------------------------


def autocast(args, device):
    """Mixed precision for the forward passes of training and evaluation."""
    return torch.autocast(device.type, torch.bfloat16) if args.precision == "bf16" else nullcontext()


def check_args(args):
    """Ranges that would otherwise fail in the middle of a run, and the one warning about B."""
    positive = "dm_batch sd_rank sd_batch tune_epochs tune_max_steps gen_versions gen_resolution gen_steps "
    positive += "gen_micro_batch clf_seeds net_epochs net_batch net_micro_batch net_size mia_versions"
    for name in positive.split():
        if getattr(args, name) < 1:
            raise runs.UserError(f"{runs.flag(name)} is {getattr(args, name)}; it must be at least 1")
    if args.sd_batch % args.dm_batch:
        raise runs.UserError(f"--sd-batch {args.sd_batch}: it must be a multiple of --dm-batch {args.dm_batch}")
    if not 0 < args.i2i_strength <= 1 or not kept_steps(args.i2i_strength, args.gen_steps):
        raise runs.UserError(f"--i2i-strength {args.i2i_strength}: it must lie in 0..1 and keep at least one step")
    if (
        not args.net_versions
        or max(args.net_versions) > args.gen_versions
        or list(args.net_versions) != sorted(set(args.net_versions))
    ):
        raise runs.UserError(f"--net-versions {args.net_versions}: ascending numbers, at most --gen-versions")
    if args.ood and args.dataset not in datasets.IMAGENET_SUBSETS:
        raise runs.UserError(f"--ood: needs ImageNet or a subset of it, not {args.dataset}")
    ood_sets(args)  # a wrong folder is told now, not after days
    if args.mia_models % 2 or 0 < args.mia_models < 6:  # 6: every target then has two shadows on each side
        raise runs.UserError(f"--mia-models {args.mia_models}: an even number from 6 on, or 0 for no attack")


def check_order(args, run, todo):
    """A stage named by --stages needs the files of those before it."""
    stages = [s for s in Args.stages if s != "attack" or args.mia_models]
    for stage in todo:
        for before in [s for s in stages[: stages.index(stage)] if s != "attack"] if stage in stages else []:
            if before not in todo and run.todo(before):
                raise runs.UserError(f"--stages {stage}: {before} has not been run in {run.dir}; add it to --stages")


def main(args):
    if args.plan:
        raise runs.UserError("--plan: this script has no plan yet, only datadream.py; leave the flag out")
    check_args(args)
    dist = distributed.setup_distributed(args.device)
    data = datasets.load_dataset(args.dataset, args.data_dir)
    if data.note:
        distributed.say(dist, data.note)
    if args.dm_batch != 8:
        lam = matching_weight(args.dm_lambda, args.dm_batch)
        distributed.say(dist, f"note: --dm-batch {args.dm_batch}: lambda becomes {lam:g}, which is 0.003 at 8")
    real, names = choose_real(args, data), prompt_names(args.dataset, data.class_names)
    sets = generated_sets(args, len(real))
    ids = {"generator": (args.sd_model, "generator"), "clip": (args.token_clip, "clip")}
    if args.captions_file is None:
        ids["captioner"] = (args.captioner, "captioner")
    ids = {name: models.fingerprint(models.resolve(*what)) for name, what in ids.items()}

    run = runs.open_run("realfake", args, dist, SPEED_FLAGS, models=ids | {"real": keys_hash(real)})
    todo = [stage for stage in args.stages if run.todo(stage)]
    check_order(args, run, todo)
    if "caption" in todo:
        caption_all(args, run, dist, real)
    if "embed" in todo:
        embed(args, run, dist, real)
    if "finetune" in todo or "generate" in todo:
        pipe = open_generator(args.sd_model, dist.device, args.precision)
        if "finetune" in todo:
            finetune(args, run, dist, pipe, real, names, sets)
        if "generate" in todo:
            generate(args, run, dist, pipe, real, names, sets)
        del pipe
    if "train" in todo:
        train(args, run, dist, real, sets)
    if "attack" in todo and args.mia_models:
        attack(args, run, dist, real, sets)
    if "evaluate" in todo:
        evaluate(args, run, dist, data, real, sets)
    distributed.cleanup(dist)


def keys_hash(real):
    """The chosen images by name: a run does not go on with other images than it began with."""
    return f"{distributed.seed_of(*real.keys):016x}"


if __name__ == "__main__":
    start(main, ARGS)
