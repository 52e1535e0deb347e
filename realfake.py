"""Real-Fake: training data synthesis by distribution matching (J. Yuan et al., ICLR 2024, arXiv:2310.10402).

Replace a labelled set of real images by generated ones: one image per real image and version, near it but not it.

    [1] caption --> [2] embed --> [3] finetune --> [4] generate --> [5] train --> [6] attack --> [7] evaluate
    one sentence    CLIP image    LoRA with the    from the noised   a network     who was in     top-1 on the
    per image       embedding     matching term    real latent       from scratch  the data?      real test set

Run:
    python realfake.py  # 10 digits, 12 real images per class, tiny models
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 realfake.py  # the same on two CPU cores: 4 minutes
    torchrun --standalone --nproc-per-node 8 realfake.py --preset imagenette
    python realfake.py --preset imagenette --plan h100  # what that run will do and cost; nothing is done

Expect:
    digits: real 89.8, synthetic 67.0 (1 version) to 93.1 (4), real + synthetic 96.5; all of it in docs/realfake.md
    ImageNet-1K, ResNet-50, synthetic only: 70.9 (1 version), 76.0 (10 versions) (paper); not run by us for want of GPUs

Differs:
    1. each image has its own seed and its own visual token; the released sampler mixes the tokens of a batch
       (--token released)
    2. gradients are averaged over processes; the released multi-GPU tuning does not synchronise them
    3. the LoRA sees all images; the released code always drops half of them (left over from the privacy experiment)
    4. no visual token in the negative branch of the guidance: the fork of diffusers that decided it was never released
    5. its captioning, its evaluation out of distribution and its membership inference were never released: ours
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from common.cli import Count, Fraction, Frame, Natural, NonNegative, Positive, Range, check, parse, start

Stage = Literal["caption", "embed", "finetune", "generate", "train", "attack", "evaluate"]
Token = Literal["image", "released", "class_mean", "none"]
Prior = Literal["image", "noise"]
Ablation = Literal["no-lora", "no-matching", "no-token", "class-mean", "no-prior", "no-caption"]


@dataclass
class Args(Frame):
    dataset: str = "imagenette"
    """real data set; `folder`: your own images in data_dir"""
    seed: Natural = 42
    """seed of the trainings, and of the choice of real_per_class; what is drawn has gen_seed"""
    stages: tuple[Stage, ...] = ("caption", "embed", "finetune", "generate", "train", "attack", "evaluate")
    """stages to run, in order; a finished stage is never run again"""
    real_per_class: Count | None = None
    """real images drawn from each class of the training split; None: all"""
    flip: bool = True
    """mirror half of the images in tuning and training; not for digits and signs"""

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
    """visual token in the last text slot: the image's own embedding, the mean of its class, or none; released: the
    image's own while tuning, while sampling a mixture over 24 images, as the released sampler makes it by mistake"""

    # ---- [3] finetune: LoRA with distribution matching -----------------------------------------
    lora: bool = True
    """--no-lora: the stock generator"""
    dm_lambda: NonNegative = 0.003
    """lambda, weight of the squared norm of the summed residual; 0 leaves the term out"""
    dm_batch: Count = 8
    """B, images whose residuals are summed: a hyper-parameter. Other values than 8 rescale lambda by 8 / B"""
    dm_gamma: Positive | None = 5.0
    """gamma of the min-SNR weights; None: all weights 1"""
    sd_rank: Count = 4
    """rank r of the LoRA; alpha = r"""
    sd_lr: Positive = 1e-4
    """AdamW learning rate of the LoRA"""
    sd_batch: Count = 8
    """images per step, over all processes: matching batches whose gradients are averaged. 64 with --sd-lr 2.8e-4 (rates
    of Adam grow like the root of the batch) takes an eighth of the steps; not the released recipe. A process holds the
    graphs of its share of them: 0.75 GB an image at 512 pixels in bf16, 48 GB for 64 on one GPU"""
    sd_micro_batch: Count = 1
    """images per forward pass; 1, so that eight processes share a matching batch. Bits are equal for any number of
    processes"""
    tune_epochs: Count = 100
    """passes over the real images"""
    tune_max_images: Count = 1_280_000
    """the tuning sees no more images than this: 160,000 steps of 8; the paper's budget for ImageNet is not published"""
    tune_cached_crops: Natural = 0
    """crops of an image, evenly along its longer side, whose VAE posteriors are computed once and kept where they fit
    into 8 GB of a process; saves about a third of the tuning. 0, as released: a fresh crop and VAE pass each time,
    but for square images, which have one crop only"""

    # ---- [4] generate --------------------------------------------------------------------------
    gen_seed: int = 0
    """version v of a real image is a function of (gen_seed, v, the image's name) and of the adapter"""
    gen_versions: Count = 1
    """k, generated images for each real one"""
    gen_resolution: Count = 512
    """pixels per side of a generated image"""
    gen_steps: Count = 30
    """sampler steps"""
    i2i_strength: Annotated[float, Range(0, 1, "(]")] = 0.75
    """share of the steps that are run when starting from the real image: 30 -> 22"""
    gen_guidance: float = 2.0
    """classifier-free guidance scale w"""
    gen_lora_scale: float = 0.5
    """scale of the adapter while sampling; it was tuned at 1"""
    gen_prior: Prior = "image"
    """start from the noised latent of the real image, or from noise (text-to-image, all steps)"""
    gen_negative: str = "distorted, unrealistic, blurry, out of frame, cropped, deformed"
    """negative prompt; it never gets a visual token"""
    gen_micro_batch: Count = 24
    """images per forward pass on one process; speed, memory, and rounding: some pixels by a grey level"""
    gen_format: Literal["png", "jpeg", "webp"] = "png"
    """png and webp: lossless; jpeg: of gen_quality. The released files are JPEG of quality 75, an eighth of the disk"""
    gen_quality: Annotated[int, Range(1, 95)] = 95
    """of --gen-format jpeg"""
    gen_save_size: Count | None = None
    """pixels per side of the stored images, None: as generated; half the side is a quarter of disk and decoding"""
    ablations: tuple[Ablation, ...] = ()
    """further rows of the table, each the method with one part off (class-mean: the paper's token), one version"""

    # ---- [5] train: from scratch, last epoch -----------------------------------------------------
    net_model: str = "resnet50"
    """timm model, random start"""
    net_stem: Literal["imagenet", "cifar"] = "imagenet"
    """cifar: 3x3 stem of stride 1 without pooling, for a timm ResNet on small images"""
    net_augment: Literal["imagenet", "cifar"] = "imagenet"
    """imagenet: crops of 8 % and more, colour jitter; cifar: 4 pixels of padding and a crop"""
    net_versions: tuple[Count, ...] = (1,)
    """the scaling curve: versions in the training set, each at most gen_versions; the last is added to real images"""
    clf_seeds: Count = 3
    """classifiers per row, seeds seed, seed + 1, ..."""
    net_epochs: Count = 200
    """epochs; the last one counts, nothing is selected"""
    net_equal_updates: bool = False
    """an epoch is as long as one over the real images for every row; officially k versions mean k times the updates"""
    net_milestones: tuple[Count, ...] = (50, 100, 150)
    """epochs at which the rate is multiplied by net_decay (timm does it one epoch early)"""
    net_decay: Positive = 0.2
    """factor at each milestone"""
    net_lr: Positive = 0.1
    """SGD with Nesterov momentum 0.9, not scaled by the batch"""
    net_warmup: Natural = 5
    """epochs of warm-up, linear from 1e-5"""
    net_wd: NonNegative = 5e-4
    """weight decay of convolutions and linear layers; biases and BatchNorm have none"""
    net_smoothing: Fraction = 0.1
    """label smoothing: the silent default of timm's script"""
    net_batch: Count = 512
    """images per step, over all processes; an incomplete last batch is dropped"""
    net_micro_batch: Count = 128
    """images that share BatchNorm statistics, as on each of the official four GPUs; running statistics are averaged"""
    net_size: Count = 224
    """pixels per side that the network sees"""

    # ---- [6] attack, [7] evaluate ----------------------------------------------------------------
    mia_models: Natural = 0
    """shadow models of the membership inference (even, 6 or more; the official split has 10); 0: no attack"""
    ood: tuple[str, ...] = ()
    """further test sets NAME=DIR with folders by WordNet id or by ImageNet number (V2, Sketch, R, A)"""


RELEASED = dict(gen_format="jpeg", gen_quality=75)  # the files of the released generator: Pillow's default
# Comments: what the paper reports. Its tables for the subsets could not be read; we quote no number from memory.
PRESETS = {
    "digits": dict(  # 12 real images per class, tiny models; our measured table stands in docs/realfake.md
        dataset="digits", sd_model="tiny", token_clip="tiny", captioner="tiny", precision="fp32", workers=0, seed=0,
        real_per_class=12, tune_epochs=10, flip=False, sd_lr=1e-3, sd_micro_batch=8,
        gen_versions=4, gen_resolution=32, gen_micro_batch=30,
        ablations=("no-lora", "no-matching", "no-token", "no-prior", "no-caption"),
        net_model="test_resnet", net_versions=(1, 2, 4), net_epochs=16, net_milestones=(8, 12, 15), net_warmup=1,
        net_batch=32, net_micro_batch=32, net_size=32, net_augment="cifar",
        mia_models=6,
    ),
    "imagenette": dict(data_dir="data", **RELEASED),
    "imagewoof": dict(dataset="imagewoof", data_dir="data", **RELEASED),
    "imagenet100": dict(dataset="imagenet100", data_dir="data", **RELEASED),  # recipe not released: imagenette's
    "imagenet1k": dict(  # 70.9 with 1 version, 76.0 with 10; epochs and milestones are our choice, not released
        dataset="imagenet", data_dir="data", net_epochs=300, net_milestones=(90, 180, 270), net_decay=0.1, **RELEASED,
    ),
    "cifar10": dict(  # our extension: the paper's code has no trace of CIFAR. 32 -> 512 -> 32 pixels
        dataset="cifar10", data_dir="data", gen_save_size=32,
        net_model="resnet18", net_stem="cifar", net_augment="cifar", net_size=32,
    ),
}  # fmt: skip

if __name__ == "__main__":
    ARGS = parse(Args, PRESETS, __doc__)  # before the imports that take seconds: --help and a wrong flag answer at once

import math
import random
from functools import cache, lru_cache, partial

import numpy as np
import timm
import torch
import torch.nn.functional as F
from diffusers import UniPCMultistepScheduler
from sklearn.metrics import roc_auc_score, roc_curve
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.transforms import v2

from common import captions, datasets, diffusion, distributed, images, models
from common import run as runs
from common.clip import encode_images, load_clip, zero_shot_weights
from common.compiling import compiled
from common.copies import Copies
from common.datasets import in_order
from common.diffusion import Adapter, autocast, decode, latent_shape, noise_schedule, sent, token_ids
from common.features import Features
from common.files import chunks, load_tensors, read_json, save_tensors, write_json
from common.inputs import check_network, check_order, refuse
from common.jobs import share_out
from common.launch import UserError
from common.loader import Loader, normalised, to_unit
from common.loop import Batches, Loop
from common.names import spoken
from common.near_copies import near_copies
from common.ood import ood_sets, restricted_top1
from common.plan import print_plan
from common.plans import realfake as planned
from common.posteriors import Posteriors
from common.report import compared, conclude, over_seeds, per_class, roc_chart, spread

# In shapes: N real images, C classes, k versions, M shadow models; B images of a batch, b of a micro-batch; pixels
# [3, H, W], latents [4, h, w] with h = H / 8, text states [77, W]; D is the width of CLIP's embedding, here equal to W.

# The replacements that the official code makes in open_clip's list of class names.
IMAGENET_NAMES = {
    421: "baluster handrail", 478: "cardboard box carton", 692: "product packet packaging",
    744: "projectile missile", 789: "shoji screen room divider", 836: "sunglass", 842: "swim trunks shorts",
}  # fmt: skip
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of every self- and cross-attention
POSTERIOR_BYTES = 8e9  # of a process, in the tuning: CIFAR-10, mirrored too, takes 6.6 in bf16
MIXED = 24  # images whose tokens the released sampler mixes: its batch


# ---------------------------------------------------------------------------------------------
# The data: real images in one fixed order, and the sets that are generated from them.
# A generated set has exactly one image for each real image and version. The method is one such set; an ablation is
# another with one part off, a shadow model of the attack one from half of the real images. All of them share captions,
# embeddings and seeds, so two sets differ by the part in question and by nothing else.


def choose_real(args, data):
    """The images to replace: the training split, or real_per_class of each class."""
    real, n = data.train, len(data.class_names)
    if args.real_per_class is not None:
        real = real.subset(datasets.few_shot(real, data.name, args.real_per_class, args.seed, n))
    return in_order(real)  # of the names: the rows below, and the split of the attack, hang on it


def prompt_names(dataset, class_names):
    """Class names in words: for ImageNet and its subsets open_clip's with the official replacements."""
    if dataset not in datasets.IMAGENET_SUBSETS:
        return spoken(dataset, class_names)
    from open_clip import IMAGENET_CLASSNAMES

    return [IMAGENET_NAMES.get(i, IMAGENET_CLASSNAMES[i]) for i in datasets.IMAGENET_SUBSETS[dataset]]


@dataclass
class Variant:
    """One generated set: `versions` images from each real image in rows, with an adapter tuned on the same rows."""

    folder: str  # in the run folder
    adapter: str | None  # name of the file in lora/; None: the stock generator
    rows: list[int]  # of the real images
    versions: int  # k
    lam: float  # lambda of the matching term; 0 without it
    token: Token  # what the last text slot holds
    prior: Prior  # where sampling starts: a real image's latent, or noise
    caption: bool  # is it in the prompt?


def generated_sets(args, n):
    """The method, its ablations with one part off, and the shadow models of the attack, each on half of the images."""
    flags = dict(versions=args.gen_versions, lam=args.dm_lambda, token=args.token, prior=args.gen_prior)
    # The method: everything on, all N real images.
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
        rows = np.flatnonzero(keep).tolist()  # its members; adapter, images and network see no others
        shadow = replace(full, folder=f"shadows/{m}/images", rows=rows, versions=1)
        shadow.adapter = full.adapter and f"shadow-{m}"
        sets[shadow.folder] = shadow
    return sets


def versions_of(args, run, v, real):
    """The files of a set: `versions` copies of each of its real images."""
    return Copies(run.path(v.folder), real, v.rows, v.versions, images.SUFFIX[args.gen_format])


# ---------------------------------------------------------------------------------------------
# [1] caption, [2] embed: one sentence and one CLIP vector per real image, where a set of the run asks for them.
# Both say what is in one image: the caption in words (BLIP-2, greedy, at most 16 new tokens), the embedding [768] as
# the image tower of that CLIP sees it whose text tower the generator has.
# Reads the real images, writes captions.json and embeddings.safetensors (in parts/ while they grow).


def caption(args, run, dist, real, ready=None):
    """{image: caption}: those of a file, which ready() returns on rank 0, or written by the image-to-text model."""
    with run.timed("caption"):
        if ready:
            written = ready() if dist.main else []
        else:
            model = models.resolve(args.captioner, "captioner")
            written = captions.write_captions(run.path("parts"), model, real, dist, args.precision, args.workers)
        if dist.main:
            write_json(run.path("captions.json"), dict(zip(real.keys, written, strict=True)))
    run.done("caption", run.under("captions.json"), captions=len(real))


def embed(args, run, dist, real):
    """Projected CLIP image embeddings, not normalised, float16: what the text encoder's own width can hold."""
    clip = load_clip(args.token_clip, dist.device, torch.bfloat16 if args.precision == "bf16" else torch.float32)

    with run.timed("embed"):
        features = Features(run.path("parts", "embeddings"), [clip], real, 64, args.workers, torch.float16)
        features.write(dist)
        distributed.barrier(dist)
        if dist.main:
            rows = features.read("features")  # [N, D], in the order of the images
            save_tensors(run.path("embeddings.safetensors"), {"embeddings": rows})
    run.done("embed", run.under("embeddings.safetensors"), embeddings=len(real))


# ---------------------------------------------------------------------------------------------
# What the generator is told about an image.
# The text states h = text encoder(prompt), [77, 768], condition the U-Net. The prompt names the class and holds the
# caption; the last of the 77 states, which is padding unless the prompt is that long, is overwritten with the image's
# CLIP embedding g, the visual token. CLIP ViT-L/14 is as wide as these states, so nothing is projected or trained. The
# paper describes the mean over the class (token="class_mean"), the released code takes the image's own.


def training_prompt(class_name, caption):
    """Official code: text of the LoRA tuning. A missing caption leaves the class name."""
    return f"photo of {class_name}, {caption}" if caption else f"photo of {class_name}"


def sampling_prompt(class_name, caption):
    """Official code: text of the generation, with and without a caption."""
    return f"photo of {class_name}, {caption}, best quality" if caption else f"{class_name}, photo, best quality"


def class_means(features, labels, n_classes, rows=None):
    """Mean embedding of each class over these rows (all), no normalisation. [N, D], [N] -> [C, D]; NaN for no image"""
    rows, total = range(len(labels)) if rows is None else rows, torch.zeros(n_classes, features.shape[1])
    for part in chunks(rows, 4096):  # in slices: a float32 copy of ImageNet's embeddings takes 4 GB
        total.index_add_(0, labels[part], features[part].float())
    return total / torch.bincount(labels[rows], minlength=n_classes)[:, None]


def released_mixture(features):
    """Official code, by mistake: the embeddings of a batch are stacked along the wrong axis and read row by row, so
    that every token is a mixture of the batch. [B, D] -> [B, D]"""
    return features.T.reshape(features.shape)  # no transpose back: row i holds numbers of all images


class VisualTokens:
    """Token g_i of each image of a set; a function of the set's rows alone, and of no other image.

    features [N, D] raw CLIP embeddings, labels [N], rows: the set's. image: the image's own embedding; class_mean: the
    mean over the set's rows of the class; released: the mixture of the set's next MIXED rows that it stands among.
    """

    def __init__(self, features, labels, rows, mode, n_classes):
        self.features, self.labels, self.rows, self.mode = features, torch.as_tensor(labels), list(rows), mode
        self.place = {row: n for n, row in enumerate(self.rows)}  # of each image in its set
        if mode == "class_mean":
            self.means = class_means(features, self.labels, n_classes, self.rows)

    def __getitem__(self, rows):
        """rows: B of the set -> [B, D]"""
        places = [self.place[row] for row in rows]  # a KeyError for an image of another set
        if self.mode == "class_mean":
            return self.means[self.labels[rows]]
        if self.mode == "image":
            return self.features[rows]
        starts = [place - place % MIXED for place in places]  # of the official batch that each one stood in
        mixed = {start: released_mixture(self.features[self.rows[start : start + MIXED]]) for start in set(starts)}
        return torch.stack([mixed[start][place - start] for start, place in zip(starts, places, strict=True)])


def with_token(h, g):
    """Text states with the visual token in the last slot, unscaled. [B, 77, W], [B, W] or None -> [B, 77, W]"""
    if g is None:
        return h
    h = h.clone()
    h[:, -1] = g.to(h)
    return h


class Condition:
    """Prompt and visual token of every real image of a set; asked about another image, it fails.

    make: training_prompt or sampling_prompt
    """

    def __init__(self, args, run, pipe, v, real, names, make):
        self.pipe, self.names, self.labels, self.make = pipe, names, real.labels, make
        written = read_json(run.path("captions.json")) if v.caption else {}
        # Members only: an adapter of half of the images must not hear of the others.
        self.texts = {i: make(names[real.labels[i]], written[real.keys[i]] if v.caption else "") for i in v.rows}
        self.tokens = None
        if v.token != "none":
            features = load_tensors(run.path("embeddings.safetensors"))["embeddings"]
            # The released code mixes the tokens when it samples, not when it tunes.
            mode = "image" if v.token == "released" and make is training_prompt else v.token
            self.tokens = VisualTokens(features, real.labels, v.rows, mode, len(names))

    @torch.no_grad()
    def states(self, rows, b):
        """Text states of these images with their tokens, filled up to b rows: [b, 77, W]"""
        rows = rows + rows[-1:] * (b - len(rows))
        ids = token_ids(self.pipe, [self.texts[i] for i in rows])  # [b, 77]
        g = ids if self.tokens is None else self.tokens[rows]
        ids, g = sent(self.pipe.text_encoder.device, ids, g)
        h = self.pipe.text_encoder(ids)[0]  # [b, 77, W]; frozen
        return with_token(h, None if self.tokens is None else g)


def padded(tensors, b):
    """Stack of exactly b tensors: the last one is repeated. The networks then always see the same shape."""
    return torch.stack(tensors + tensors[-1:] * (b - len(tensors)))


# ---------------------------------------------------------------------------------------------
# [3] finetune: LoRA on every attention of the U-Net, denoising loss plus the matching term, always conditional.
#     r_i = U-Net(z_t, t, h) - eps,  L = mean_i w_i mean(r_i^2) + lambda mean((sum_i w_i r_i)^2),  w = min(snr, 5) / snr
# Why the second term: with a linear kernel the squared MMD between true and predicted noise is the squared length of
# the mean residual, |E r|^2; by Jensen's inequality E |r|^2, the denoising loss, is only a bound of it. The term asks
# for the thing itself, estimated on a batch: errors of single images may cancel, an error that all share may not.
# It makes the batch of 8 part of the method. Residuals that have nothing in common add some 2 % to the loss (lambda B);
# a bias shared by all of a batch adds at most lambda B^2 = 19 %. Pixels in [-1, 1], latents [4, 64, 64] at 512 pixels.
# Reads the real images, captions.json, embeddings.safetensors; writes lora/pytorch_lora_weights.safetensors and, for
# ablations and shadows, lora/<name>/pytorch_lora_weights.safetensors.


def alphas_cumprod(n=1000, beta_start=0.00085, beta_end=0.012):
    """Scaled-linear schedule: abar_t = prod_{s<=t} (1 - beta_s), sqrt(beta) linear. -> [n] float32"""
    return (1 - torch.linspace(beta_start**0.5, beta_end**0.5, n) ** 2).cumprod(0)


def add_noise(z, eps, abar):
    """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps. [B, 4, h, w] twice, abar_t [B] -> [B, 4, h, w]"""
    abar = abar.view(-1, 1, 1, 1)
    return abar.sqrt() * z + (1 - abar).sqrt() * eps


def snr_of(abar):
    """Signal-to-noise ratio abar / (1 - abar) of a timestep. [B] -> [B]"""
    return abar / (1 - abar)


def snr_weight(snr, gamma):
    """min-SNR weight of the noise prediction: w = min(snr, gamma) / snr, so 0 < w <= 1; gamma None: 1. [B] -> [B]"""
    return snr.clamp(max=gamma) / snr


def matching_loss(pred, target, w, lam):
    """Official code: denoising loss plus the squared first moment of the residuals, the explicit matching term.

    r_i = pred_i - target_i;  L_diff = mean_i w_i mean(r_i^2);  L_dm = mean((sum_i w_i r_i)^2);  L = L_diff + lam L_dm.
    pred, target [B, 4, h, w], w [B] -> (L, L_diff, L_dm). The paper speaks of the mean over the batch, the code sums:
    with the mean the same lambda would be B^2 = 64 times weaker. Always L_dm <= B^2 L_diff.
    """
    r = pred.float() - target.float()  # [B, 4, h, w]
    diffusion = (w * r.pow(2).mean((1, 2, 3))).mean()  # L_diff: mean over the batch
    dm = (w.view(-1, 1, 1, 1) * r).sum(0).pow(2).mean()  # L_dm: sum over the batch, then mean over [4, h, w]
    return diffusion + lam * dm, diffusion, dm


def matching_shares(r, w, total, b):
    """What some images of a matching batch of b contribute to its loss, for images that are not all on one process.

    r [n, 4, h, w] their residuals, w [n], total = sum_i w_i r_i over the whole batch, a constant. -> shares of L_diff
    and of L_dm: mean(2 w_i r_i total), summed over images, has the gradient of mean(total^2), and twice its value.
    """
    diffusion = (w * r.pow(2).mean((1, 2, 3))).sum() / b
    return diffusion, 2 * (w.view(-1, 1, 1, 1) * r * total).sum(0).mean()


def matching_weight(lam, b):
    """lambda for a batch of b images: 0.003 belongs to B = 8, and the term's share of the loss grows like B."""
    return lam * 8 / b


def adapter_file(run, name):
    """name: "full", or that of an ablation or shadow"""
    return run.path("lora", *([] if name == "full" else [name]), "pytorch_lora_weights.safetensors")


def tuning_pixels(image, u, v, flip, size):
    """PIL RGB -> uint8 [3, size, size]: shorter side to size (bilinear), crop at the shares u, v, mirrored"""
    image = v2.functional.resize(image, size, v2.InterpolationMode.BILINEAR)
    free_x, free_y = image.size[0] - size, image.size[1] - size  # one of them is 0
    image = v2.functional.crop(image, int(u * (free_y + 1)), int(v * (free_x + 1)), size, size)
    return v2.functional.pil_to_tensor(v2.functional.horizontal_flip(image) if flip else image)


def finetune(args, run, dist, pipe, real, names, sets):
    """One adapter for the method, and one for each ablation and shadow whose tuning differs from it."""
    pipe.unet.add_adapter(diffusion.lora_config(args.sd_rank, UNET_TARGETS))
    # Sets may share an adapter; it is tuned as the first of them says.
    jobs = list({v.adapter: v for v in reversed(list(sets.values())) if v.adapter}.values())[::-1]
    lengths = [tuning_steps(args, len(v.rows))[0] for v in jobs]
    sizes = args.sd_batch, args.sd_micro_batch
    mine = share_out(jobs, *sizes, dist, "finetune", "--sd-micro-batch", lengths=lengths)
    with run.timed("finetune", "--sd-micro-batch", trains=True):
        missing = [not adapter_file(run, v.adapter).exists() for v in jobs]
        left = [v for v, gone in zip(jobs, distributed.on_rank_0(lambda: missing, dist), strict=True) if gone]
        posteriors, crops = tuning_posteriors(args, dist, pipe, real, jobs, left)
        for team, v in mine:
            tune_lora(args, run, team, pipe, v, real, names, posteriors, crops)
    distributed.barrier(dist)
    pipe.unload_lora_weights()
    run.done("finetune", run.under("lora"), adapters=[v.adapter for v in jobs])


def tuning_steps(args, n):
    """Steps of the tuning on n images, and those of one pass; counted in images, whatever the batch."""
    per_epoch = n // args.sd_batch  # an incomplete batch would have another L_dm
    return min(args.tune_epochs * per_epoch, max(1, args.tune_max_images // args.sd_batch)), per_epoch


def kept_crops(args, n, seen, shape, square):
    """Crops of each of n images that are kept as posteriors: 1 of square ones, which have no other; 0: none, as they do
    not fit into memory, or are more views than the tuning of all adapters sees"""
    crops = 1 if square else args.tune_cached_crops
    views, size = n * crops * (1 + args.flip), 2 * math.prod(shape) * (2 if args.precision == "bf16" else 4)
    return crops if views * size <= POSTERIOR_BYTES and views <= seen else 0


def crop_places(crops):
    """So many crops along the longer side, evenly: [1 / (2 crops), 3 / (2 crops), ...] of the free pixels"""
    return [(k + 0.5) / crops for k in range(crops)]


def tuning_posteriors(args, dist, pipe, real, jobs, left):
    """Posteriors for the adapters that are left, and how many crops of each image are kept; 0: a step encodes its own.

    The VAE is frozen: what it says of a view it says each time. Of square images nothing changes by asking once. What
    is kept is decided for all adapters of the run, so that a resume goes on in the same way.
    """
    view, shape = partial(tuning_pixels, size=args.gen_resolution), latent_shape(pipe, args.gen_resolution)
    pictures = Loader(real, view, dist.device, args.workers, ("tune",))
    posteriors = Posteriors(pipe.vae, pictures, args.sd_micro_batch, args.precision)
    rows_of = lambda some: sorted(set().union(*(v.rows for v in some)))  # noqa: E731
    every = rows_of(jobs)
    seen = sum(tuning_steps(args, len(v.rows))[0] for v in jobs) * args.sd_batch
    fits = partial(kept_crops, args, len(every), seen, shape)
    crops = fits(bool(fits(True)) and all(w == h for w, h in map(real.size, every)))
    if args.tune_cached_crops and left and not crops:
        what = f"note: --tune-cached-crops {args.tune_cached_crops}: posteriors of {len(every):,} images"
        distributed.say(dist, f"{what} take more than {POSTERIOR_BYTES / 1e9:g} GB or are too many; none are kept")
    flips = (False, True) if args.flip else (False,)
    rows = rows_of(left) if crops else []
    posteriors.keep([(i, 0, u, u, flip) for i in rows for u in crop_places(crops) for flip in flips], dist)
    return posteriors, crops


class TuningBatches:
    """All that is random in a step of the tuning, for the whole batch, whoever computes which part of it."""

    def __init__(self, args, rows, per_epoch, n_times, shape, crops):
        self.args, self.rows, self.per_epoch, self.n_times, self.shape = args, rows, per_epoch, n_times, shape
        self.places = crop_places(crops)
        self.order = lru_cache(2)(self._order)  # the loader runs ahead: into the next pass, and by some steps
        self.draw = lru_cache(64)(self._draw)

    def _order(self, epoch):
        return torch.randperm(len(self.rows), generator=distributed.generator(self.args.seed, "epoch", epoch)).tolist()

    def _draw(self, step):
        """-> images, [crop row, crop column, mirror] as shares, timesteps, noise of the posterior, noise eps"""
        (epoch, i), b = divmod(step, self.per_epoch), self.args.sd_batch
        batch = [self.rows[j] for j in self.order(epoch)[i * b : (i + 1) * b]]
        g = distributed.generator(self.args.seed, "step", step)
        where, t = torch.rand(3, b, generator=g), torch.randint(self.n_times, (b,), generator=g)  # t: 0..999
        return batch, where, t, *torch.randn(2, b, *self.shape, generator=g)

    def views(self, step):
        """[(image, seed of the view, which draws nothing itself, crop row, crop column, mirrored)]"""
        batch, where, *_ = self.draw(step)
        rows, columns, mirror = where.tolist()
        if self.places:  # the kept crops; only one of row and column is free
            rows = columns = [self.places[int(u * len(self.places))] for u in rows]
        flips = [self.args.flip and m < 0.5 for m in mirror]
        return [(i, 0, *view) for i, *view in zip(batch, rows, columns, flips, strict=True)]


def tune_lora(args, run, team, pipe, v, real, names, posteriors, crops):
    """Tune one adapter on the rows of a set and save it. team: the processes that share each step."""
    file = adapter_file(run, v.adapter)
    if file.exists():
        return
    total, per_epoch = tuning_steps(args, len(v.rows))  # steps
    layers = diffusion.lora_parameters([pipe.unet])  # 797,184 numbers at rank 4
    diffusion.reset_lora(layers, args.sd_rank, args.seed, "lora")  # A ~ N(0, 1/r^2), B = 0: the stock generator
    params = [p for _, p in layers]
    optimizer = torch.optim.AdamW(params, lr=args.sd_lr, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8, fused=True)
    condition = Condition(args, run, pipe, v, real, names, training_prompt)
    abar = alphas_cumprod(**noise_schedule(pipe.scheduler.config))  # [1000]
    lam, shape = matching_weight(v.lam, args.dm_batch), latent_shape(pipe, args.gen_resolution)
    groups = args.sd_batch // args.dm_batch  # matching batches in a step; 1 as released

    batches = TuningBatches(args, v.rows, per_epoch, len(abar), shape, crops)
    checkpoint = file.with_name("checkpoint.safetensors")
    loop = Loop(run, f"finetune/{v.adapter}", total, optimizer, team, args.sd_micro_batch, file=checkpoint)
    stream = posteriors(part for step in loop.steps for part in loop.mine(batches.views(step)))
    for step in loop:
        batch, _, t, xi, eps = batches.draw(step)
        t, abar_of, xi, eps = sent(team.device, t, abar[t], xi, eps)
        # The gradient of L at the prediction of image i is 2 / (4 h w) (w_i r_i / B + lambda w_i sum_j w_j r_j): of
        # the other images it needs only their sum. So first the forward passes, and that sum over all processes ...
        own = {}  # micro-batch -> its residuals, with their graph, and its weights
        for u in loop.units(len(batch)):
            noise, target, abar_t, posterior = xi[u], eps[u], abar_of[u], next(stream)
            z0 = pipe.vae.config.scaling_factor * (posterior.mean + posterior.std * noise)
            with autocast(args.precision, team.device):
                h = condition.states(batch[u], len(batch[u]))
                prediction = pipe.unet(add_noise(z0, target, abar_t), t[u], h).sample  # [b, 4, h, w]
            w = snr_weight(snr_of(abar_t), args.dm_gamma) if args.dm_gamma else torch.ones_like(abar_t)
            own[loop.unit] = prediction.float() - target, w
            group = u.start // args.dm_batch  # the matching batch that this micro-batch is part of
            sums = torch.zeros(groups, *shape, device=team.device)
            sums[group] = (w.view(-1, 1, 1, 1) * own[loop.unit][0].detach()).sum(0)
            loop.keep([sums])
        (residual_sums,) = loop.sum()  # [groups, 4, h, w], the same on every process
        # ... then the backward passes: each image's share of the loss, whose gradient needs only that sum.
        for u in loop.units(len(batch)):
            r, w = own.pop(loop.unit)
            l_diff, l_dm = matching_shares(r, w, residual_sums[u.start // args.dm_batch], args.dm_batch)
            loop.backward((l_diff + lam * l_dm) / groups)
        loss = loop.update(clip=1.0)
        moments = residual_sums.pow(2).mean()  # L_dm; the shares' values add up to twice that, as their gradients do
        loop.log(loss=loss - lam * moments, matching=lam * moments)

    if team.main:
        diffusion.save_lora(file, unet=pipe.unet)
    loop.finish()


# ---------------------------------------------------------------------------------------------
# [4] generate: versions 1..k of every real image.
#     z0 = 0.18215 x a draw of VAE(real image),  z_733 = sqrt(abar) z0 + sqrt(1 - abar) eps, then UniPC down to t = 0
# The latent prior: sampling starts from the real image under the noise of t = 733, not from nothing: layout and large
# shapes stay, the rest is drawn anew, as prompt and token say. Of 30 steps the last 22 are run (strength 0.75). The
# adapter counts half (scale 0.5). Versions differ by their noise alone. Every image is kept, with its source's label.
# Reads lora/, captions, embeddings, the real images; writes images/, ablations/<name>/, shadows/<m>/images/, each an
# ImageFolder; skips files that exist.


def guided(eps_u, eps_c, w):
    """Classifier-free guidance: eps = eps_u + w (eps_c - eps_u). w = 1: conditional, w = 0: unconditional."""
    return eps_u + w * (eps_c - eps_u)


def kept_steps(strength, steps):
    """Sampler steps that image-to-image runs: the last min(int(strength * steps), steps). 0.75, 30 -> 22"""
    return min(int(steps * strength), steps)


def make_unipc(stored):
    """UniPC (order 2, bh2) over the noise schedule of the stored scheduler.

    Trap: final_sigmas_type. Since 2024 diffusers ends at sigma 0 by default; the paper's version ended at t = 0.
    """
    return UniPCMultistepScheduler.from_config(stored.config, final_sigmas_type="sigma_min")


def denoise(unet, stored, steps, strength, w, z0, noise, h, watch=lambda t: None):
    """UniPC with guidance: from noise if z0 is None, else from the noised latent z0, the last kept_steps of the steps.

    z0, noise [B, 4, h, w]; h [2 B, 77, W]: negative above conditional -> latents [B, 4, h, w]
    """
    scheduler, z = make_unipc(stored), noise
    scheduler.set_timesteps(steps, device=noise.device)
    first = 0 if z0 is None else steps - kept_steps(strength, steps)  # 8 of 30 are left out
    times = scheduler.timesteps[first:]  # 733, 699, ..., 67, 33
    scheduler.set_begin_index(first)
    if z0 is not None:
        z = add_noise(z0, noise, alphas_cumprod(**noise_schedule(stored.config)).to(z0.device)[times[0]])
    for t in times:
        watch(t)
        eps_u, eps_c = unet(torch.cat([z, z]).to(h.dtype), t, h).sample.float().chunk(2)
        z = scheduler.step(guided(eps_u, eps_c, w), t, z).prev_sample  # float32 [B, 4, h, w]
    return z


def version_seed(args, key, version):
    """Seed of one version of the real image with this key; all sets share it, so they differ by the method alone."""
    return distributed.seed_of(args.gen_seed, version, key)


def generate(args, run, dist, pipe, real, names, sets):
    """Every image of every set that is not there yet; then the list of what each one is."""
    todo = distributed.on_rank_0(partial(missing_versions, args, run, real, sets), dist)
    adapter = Adapter(pipe)
    unet = compiled(pipe.unet, args.compile, "U-Net")
    quality = args.gen_quality if args.gen_format == "jpeg" else None
    with run.timed("generate", "--gen-micro-batch"), images.ImageWriter(
        args.gen_format, quality, args.gen_save_size
    ) as writer:  # fmt: skip
        for v in sets.values():
            adapter.use(adapter_file(run, v.adapter) if v.adapter else None, args.gen_lora_scale)
            condition = Condition(args, run, pipe, v, real, names, sampling_prompt)
            draw_versions(args, run, dist, pipe, unet, writer, v, real, condition, todo[v.folder])
    distributed.barrier(dist)
    for v in sets.values() if dist.main else []:
        list_versions(args, run, v, real, names)
    adapter.use(None)
    drawn = run.under(*(v.folder for v in sets.values()))
    run.done("generate", drawn, images={v.folder: len(v.rows) * v.versions for v in sets.values()})


def missing_versions(args, run, real, sets):
    """{folder of a set: {image: versions that are not there yet}}. Stops when the images will not fit on the disk."""
    todo = {v.folder: versions_of(args, run, v, real).missing() for v in sets.values()}
    left = sum(len(ks) for of in todo.values() for ks in of.values())
    n, side = sum(len(v.rows) * v.versions for v in sets.values()), args.gen_save_size or args.gen_resolution
    images.check_space(run.dir, left, n, side, args.gen_format, "--gen-versions")
    return todo


def draw_versions(args, run, dist, pipe, unet, writer, v, real, condition, todo):
    """All missing images of one set. Posterior and text of an image are computed once for all of its versions."""
    mine = distributed.my_items(chunks(list(todo), args.gen_micro_batch), dist)
    versions = versions_of(args, run, v, real)
    # Both sides forced to the size; Pillow's default is bicubic. The proportions are not kept.
    view = lambda image: v2.functional.pil_to_tensor(image.resize((args.gen_resolution,) * 2))  # noqa: E731
    stream = Loader(real, view, dist.device, args.workers)(mine if v.prior == "image" else [])
    bar = distributed.progress(sum(map(len, todo.values())), f"generate {v.folder}", dist, together=True)
    for rows in mine:
        posterior = posterior_of(args, pipe, next(stream)) if v.prior == "image" else None
        h = guidance_states(args, pipe, condition, rows)  # [2 b, 77, W]
        for k in sorted({k for i in rows for k in todo[i]}):
            seeds = [version_seed(args, real.keys[i], k) for i in rows]
            for i, image in zip(rows, sample_versions(args, pipe, unet, posterior, h, seeds), strict=True):
                if k in todo[i]:
                    writer.save(versions.file(i, k), image)
                    bar.update(1)
    bar.close()


@torch.no_grad()
def posterior_of(args, pipe, x):
    """uint8 [B, 3, H, W] -> mean and deviation of the VAE's posterior, filled up: 2 x [b, 4, h, w]"""
    with autocast(args.precision, x.device):
        posterior = pipe.vae.encode(to_unit(padded(list(x), args.gen_micro_batch))).latent_dist
    return posterior.mean.float(), posterior.std.float()


@torch.no_grad()
def guidance_states(args, pipe, condition, rows):
    """Negative text without a token above the images' text with theirs: [2 b, 77, W]"""
    h_c = condition.states(rows, args.gen_micro_batch)
    h_u = pipe.text_encoder(token_ids(pipe, [args.gen_negative]).to(h_c.device))[0]
    return torch.cat([h_u.expand_as(h_c), h_c])


@torch.no_grad()
def sample_versions(args, pipe, unet, posterior, h, seeds):
    """posterior: of posterior_of, or None to start from noise. h [2 b, 77, W], seeds: B ints -> uint8 [B, 3, H, W].

    The generator of an image draws the noise of its posterior, then that of the latent. The network always sees a full
    micro-batch: a fixed shape gives bit-equal images in any slot, beside any neighbours, on any number of processes.
    """
    shape = latent_shape(pipe, args.gen_resolution)
    both = [torch.randn(2, *shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    xi, noise = padded(both, args.gen_micro_batch).to(h.device).unbind(1)  # [b, 4, h, w] each
    z0 = pipe.vae.config.scaling_factor * (posterior[0] + posterior[1] * xi) if posterior else None
    z = denoise(unet, pipe.scheduler, args.gen_steps, args.i2i_strength, args.gen_guidance, z0, noise, h)
    return decode(pipe, z, args.precision)[: len(seeds)]


def list_versions(args, run, v, real, names):
    """metadata.jsonl of a set: what each image is, from which real image, and its seed. Fails if one is missing."""
    written = read_json(run.path("captions.json")) if v.caption else {}

    def about(i, k):
        key = real.keys[i]
        prompt = sampling_prompt(names[real.labels[i]], written.get(key, ""))
        return dict(prompt=prompt, seed=version_seed(args, key, k), version=k, source=key)

    versions_of(args, run, v, real).write_list(about)


# ---------------------------------------------------------------------------------------------
# [5] train: a network from scratch on synthetic, real + synthetic and real images.
# The paper's question: how accurate is a network on generated images in place of the real ones (synthetic-kx), and how
# much do they add to them? Cross-entropy with label smoothing, SGD, the recipe that the released script gets from
# timm's defaults. Sets are joined and shuffled: k versions are k times the images and, as officially, k times the
# updates. Nothing is selected: the last epoch counts, and no validation images are needed.
# Reads the real images and the sets; writes classifier/runs/<row>-seed<s>/. Test images are opened in stage 7 only.


def multistep_lr(epoch, base, milestones, decay, warmup, start=1e-5):
    """timm's rate of an epoch: linear from start, then base * decay^{milestones <= epoch + 1}: one epoch early."""
    if epoch < warmup:
        return start + epoch * (base - start) / warmup
    return base * decay ** sum(m <= epoch + 1 for m in milestones)


def classifier_loss(logits, labels, smoothing):
    """Cross-entropy with label smoothing, the same as timm's. [B, C], [B] -> scalar"""
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def make_net(args, n_classes, seed):
    """timm model, random start of this seed; the last BatchNorm of each residual block starts at zero, as timm does."""
    seed_timm(distributed.seed_of(seed, "net"))
    net = timm.create_model(args.net_model, num_classes=n_classes)
    if args.net_stem == "cifar":
        if not hasattr(net, "maxpool"):
            raise UserError(f"--net-stem cifar: {args.net_model} is no ResNet of timm's; use --net-stem imagenet")
        width = net.bn1.num_features  # channels of the stem
        net.conv1, net.maxpool = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.Identity()
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net


def seed_timm(seed):
    """The two generators that timm's transforms and initialisations draw from."""
    random.seed(seed)
    distributed.seed_global(seed)


def make_optimizer(args, net):
    """SGD with Nesterov momentum; weight decay on convolutions and linear layers only, by timm's grouping"""
    return create_optimizer_v2(net, opt="sgd", lr=args.net_lr, weight_decay=args.net_wd, momentum=0.9)


def transforms(args, training):
    """PIL RGB -> uint8 [3, net_size, net_size]. Official code: timm's defaults, which overwrite the transforms that the
    released data set class defines."""
    size, stats = args.net_size, dict(mean=IMAGENET_MEAN, std=IMAGENET_STD)  # the training loop normalises
    if training and args.net_augment == "cifar":
        steps = [v2.Resize((size, size)), v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip(0.5 * args.flip)]
        return v2.Compose([*steps, v2.PILToTensor()])
    whole = dict(use_prefetcher=True, **stats)  # timm then leaves the numbers as bytes
    if not training:
        whole |= dict(crop_pct=0.95 if args.net_augment == "imagenet" else 1.0)  # 224 of 235 pixels
        view = timm.data.create_transform(size, interpolation="bicubic", **whole)
    else:
        crop = dict(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation="random")
        change = dict(hflip=0.5 * args.flip, color_jitter=0.4, auto_augment=None, re_prob=0.0)
        view = timm.data.create_transform(size, is_training=True, **crop, **change, **whole)
    return lambda image: torch.as_tensor(view(image))


def training_rows(args):
    """{row: (folder of its generated set or None, versions, with the real images)} in the order of the table"""
    rows = {"real": (None, 0, True)}
    rows |= {f"synthetic-{k}x": ("images", k, False) for k in args.net_versions}
    rows[f"real+synthetic-{args.net_versions[-1]}x"] = ("images", args.net_versions[-1], True)
    return rows | {name: (f"ablations/{name}", 1, False) for name in args.ablations}


def row_length(args, versions, with_real):
    """Times the real images that an epoch of a row sees"""
    return 1 if args.net_equal_updates else versions + with_real


def training_jobs(args):
    """(row, seed) of every network to train"""
    return [(row, args.seed + s) for row in training_rows(args) for s in range(args.clf_seeds)]


def train(args, run, dist, real, sets):
    """A network for each row of the table and each seed."""
    jobs, rows, sizes = training_jobs(args), training_rows(args), (args.net_batch, args.net_micro_batch)
    lengths = [row_length(args, *rows[row][1:]) for row, _ in jobs]
    mine = share_out(jobs, *sizes, dist, "train", "--net-micro-batch", least=2, lengths=lengths)
    with run.timed("train", "--net-micro-batch", trains=True):
        for team, (row, seed) in mine:
            folder, versions, with_real = rows[row]
            sources = [real] * with_real
            sources += [versions_of(args, run, sets[folder], real).images(versions)] if folder else []
            place = run.path("classifier", "runs", f"{row}-seed{seed}")
            train_net(args, run, team, place, f"train/{row}-seed{seed}", sources, len(real), seed)
    run.done("train", run.under("classifier/runs"), classifiers=len(jobs))


def train_net(args, run, team, folder, chart, sources, n_real, seed):
    """Train one network to the last epoch and save it in folder. team: the processes that share each step."""
    if (folder / "metrics.json").exists():
        return
    data = datasets.Concat(sources)  # one list after the other, no re-weighting
    length = min(n_real, len(data)) if args.net_equal_updates else len(data)
    batches = Batches(len(data), args.net_batch, seed, length=length, drop_last=True)
    total = args.net_epochs * batches.per_epoch  # updates
    net = make_net(args, len(data.class_names), seed).to(team.device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(args, net)
    running = [b for n, b in net.named_buffers() if n.endswith(("running_mean", "running_var"))]  # of BatchNorm
    params = [p for p in net.parameters() if p.requires_grad]
    checkpoint, micro = folder / "checkpoint.safetensors", args.net_micro_batch
    loop = Loop(run, chart, total, optimizer, team, micro, file=checkpoint, params=params, buffers=running)
    labels = torch.as_tensor(data.labels)
    pictures = Loader(data, transforms(args, training=True), team.device, args.workers, (seed, "augment"))
    stream = pictures(part for step in loop.steps for part in loop.mine(batches[step]))
    for step in loop:
        target = labels[[entry for entry, _ in batches[step]]]  # [B]
        for u in loop.units(len(target)):
            x = normalised(next(stream), IMAGENET_MEAN, IMAGENET_STD).contiguous(memory_format=torch.channels_last)
            with autocast(args.precision, team.device):
                logits = net(x)  # [b, C]
            y = target[u].to(team.device, non_blocking=True)
            loop.backward(classifier_loss(logits, y, args.net_smoothing) * len(y) / len(target))  # share of the mean
        lr = multistep_lr(step // batches.per_epoch, args.net_lr, args.net_milestones, args.net_decay, args.net_warmup)
        loss = loop.update(lr=lr)
        loop.log(loss=loss, lr=lr)
    if team.main:
        weights = {n: t for n, t in net.state_dict().items() if not n.endswith("num_batches_tracked")}
        save_tensors(folder / "weights.safetensors", weights)
        write_json(folder / "metrics.json", dict(images=len(data), updates=total))
    loop.finish()


def trained_net(args, folder, n_classes, device):
    """The network of a finished run, in eval mode."""
    net = make_net(args, n_classes, 0)
    net.load_state_dict(load_tensors(folder / "weights.safetensors"), strict=False)  # without batch counters
    return net.to(device, memory_format=torch.channels_last).eval()


@torch.no_grad()
def logits_of(args, net, data, device, of=lambda z, labels: z):
    """Of images under the evaluation transform: logits [N, C] float32, or what `of` makes of those of a batch, [b, C],
    and its labels, [b]: of a million images nobody can hold the logits of every network."""
    pictures = Loader(data, transforms(args, training=False), device, args.workers)
    batches, labels, kept = chunks(range(len(data)), args.net_micro_batch), torch.as_tensor(data.labels), []
    for rows, x in zip(batches, pictures(batches), strict=True):
        with autocast(args.precision, device):
            z = net(normalised(x, IMAGENET_MEAN, IMAGENET_STD).contiguous(memory_format=torch.channels_last))
        kept.append(of(z.float().cpu(), labels[rows]))
    return torch.cat(kept)


# ---------------------------------------------------------------------------------------------
# [6] attack: membership inference. For each shadow model: LoRA on its members, images from its members (stages 3, 4),
# a network on them; and the same for real members. Does a network that saw generated images only betray which real
# images they were made from? phi is high where a network is sure of the right class; LiRA asks whether the phi of the
# attacked network looks more like those of networks that had the image or of those that had not. By chance the AUC is
# 50 %, the true positives at 1 % false ones are 1 %.
# Writes shadows/<m>/<kind>/ and attack.json, attack.png.


def half_split(n, n_models=10):
    """Membership of sample j in shadow model m: every sample is a member of exactly half of the models. -> bool [M, n]

    Official code. The sizes of the models' sets are only about n / 2.
    """
    return np.random.RandomState(0).uniform(0, 1, (n_models, n)).argsort(0) < n_models // 2  # ranks in a column


def membership_logit(logits, labels):
    """phi = log(p_y / (1 - p_y)) = z_y - logsumexp over the other classes, float64. [N, C], [N] -> [N]"""
    z = logits.double()
    own = z.gather(1, labels[:, None])  # z_y, [N, 1]
    return (own - z.scatter(1, labels[:, None], -math.inf).logsumexp(1, keepdim=True))[:, 0]


def balanced(keep):
    """Shadows to compare for each sample: equally many that saw it and that did not. bool [M, N] -> 2 x bool [M, N]

    Where each model in turn is the target, a member has one shadow fewer on its own side than a non-member. A mean of
    fewer shadows lies farther from the target, so that without this a network that learnt nothing would seem to
    say "not a member" (AUC below 50 %; negligible with hundreds of shadows, large with ten).
    """
    n = torch.minimum(keep.sum(0), (~keep).sum(0))  # [N], shadows on the smaller side
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
        count = mask.sum(0)  # [N]
        mean = (shadow * mask).sum(0) / count  # [N], of phi over the shadows of this side
        squares = ((shadow - mean) ** 2 * mask).sum(0)
        var = squares.sum() / count.sum() if pool else squares / count
        score = score + sign * (-(var.sqrt() + 1e-30).log() - (target - mean) ** 2 / (2 * var + 1e-30))
    return score


def attack_figures(score, member):
    """-> dict: AUC, best balanced accuracy over all thresholds, TPR at 0.1 % and 1 % FPR. [N], bool [N]"""
    fpr, tpr, _ = roc_curve(member, score, drop_intermediate=False)
    figures = dict(auc=float(roc_auc_score(member, score)), balanced_accuracy=float(((tpr + 1 - fpr) / 2).max()))
    return figures | {f"tpr_at_{at:g}": float(tpr[fpr <= at].max()) for at in (0.001, 0.01)}


def attack(args, run, dist, real, sets):
    """Train the shadow networks, ask each about every real image, and let each in turn be the attacked one."""
    n_classes, keep = len(real.class_names), torch.from_numpy(half_split(len(real), args.mia_models))
    kinds = ("synthetic", "real")  # what the networks are trained on
    jobs = [(kind, m) for kind in kinds for m in range(args.mia_models)]
    mine = share_out(jobs, args.net_batch, args.net_micro_batch, dist, "attack", "--net-micro-batch", least=2)
    with run.timed("attack", "--net-micro-batch", trains=True):
        for team, (kind, m) in mine:
            v, folder = sets[f"shadows/{m}/images"], run.path("shadows", str(m), kind)
            members = real.subset(v.rows)
            sources = [versions_of(args, run, v, real).images() if kind == "synthetic" else members]
            train_net(args, run, team, folder, f"shadow-{kind}/{m}", sources, len(members), args.seed + m)
        distributed.barrier(dist)
        scores = {}
        for kind, m in distributed.my_items(jobs, dist):
            net = trained_net(args, run.path("shadows", str(m), kind), n_classes, dist.device)
            scores[kind, m] = logits_of(args, net, real, dist.device, membership_logit)  # [N]
        scores = {k: v for part in distributed.all_gather_object(scores, dist) for k, v in part.items()}
        if dist.main:
            # [M, N]: phi of each real image under each shadow network
            phi = {kind: torch.stack([scores[kind, m] for m in range(args.mia_models)]) for kind in kinds}
            results = {kind: attack_results(phi[kind], keep) for kind in kinds}
            write_json(run.path("attack.json"), {kind: figures for kind, (figures, _) in results.items()})
            curves = {kind: curve for kind, (_, curve) in results.items()}
            roc_chart(run.path("attack.png"), "Who was a member? LiRA", curves)
    run.done("attack", run.under("attack.json", "attack.png"), shadows=args.mia_models)


def attack_results(phi, keep):
    """Each model in turn is the target, the others the shadows. phi [M, N], keep bool [M, N] -> figures, scores

    -> {"lira": {figure: mean over targets}, "threshold": ...}, [(score, member)] of LiRA for the curve.
    """
    found, curve = {"lira": [], "threshold": []}, []
    for t in range(len(phi)):
        others = torch.arange(len(phi)) != t  # [M], all models but the target
        score = lira_score(phi[others], *balanced(keep[others]), phi[t], pool=len(phi) < 64)
        curve.append((score, keep[t]))
        found["lira"].append(attack_figures(score, keep[t]))
        found["threshold"].append(attack_figures(phi[t], keep[t]))  # a threshold on p_y is one on phi
    mean = {name: {k: float(np.mean([f[k] for f in rows])) for k in rows[0]} for name, rows in found.items()}
    return mean, curve


# ---------------------------------------------------------------------------------------------
# [7] evaluate: every saved network on the real test split and further test sets (--ood), top-1 in percent, mean and
# deviation over seeds. A further set may show only some of the classes: only these may then be answered. The table of
# claims says for each of the paper's orderings whether it shows here, given the spread over seeds.
# Writes results.json, samples.png, report.html and classifier/, a timm folder of the first seed of the largest
# synthetic row.


def evaluate(args, run, dist, data, real, sets):
    """Score the networks, one process each, CLIP as it comes, and count near-copies of real images."""
    with run.timed("evaluate"):
        n, test = len(data.class_names), data.test
        # {name: (images, classes that may be answered)}
        scored = {"test": (test, list(range(n)))} | ood_sets(args.ood, args.dataset)
        jobs, mine = training_jobs(args), {}
        for row, seed in distributed.my_items(jobs, dist):
            net = trained_net(args, run.path("classifier", "runs", f"{row}-seed{seed}"), n, dist.device)
            top1 = {}
            for name, (shown, known) in scored.items():
                logits = logits_of(args, net, shown, dist.device)
                top1[name] = restricted_top1(logits, shown.labels, known)
                if name == "test":
                    mine[row, seed] = top1, logits.argmax(1)
        found = {k: v for part in distributed.all_gather_object(mine, dist) for k, v in part.items()}
        clip_top1 = zero_shot_top1(args, test, dist)
        drawn = {"images": versions_of(args, run, sets["images"], real).images()}
        near = near_copies(run, drawn, real, test, args.workers, dist)
        if dist.main:
            write_report(args, run, data, real, sets, found, list(scored), clip_top1, near)
    run.done("evaluate", run.under("classifier", *runs.RESULTS), classifiers=len(jobs))


def zero_shot_top1(args, test, dist):
    """Top-1 of the CLIP that gave the tokens: what a foundation model knows without any of this."""
    clip = load_clip(args.token_clip, dist.device)
    weights = zero_shot_weights(clip, prompt_names(args.dataset, test.class_names), ["a photo of a {}"])
    rows = list(range(dist.rank, len(test), dist.world))
    features = encode_images(clip, test.subset(rows), workers=args.workers)
    right = (F.normalize(features, dim=-1) @ weights.T).argmax(1).cpu() == torch.as_tensor(test.labels[rows])
    return 100 * distributed.gather_rows(right, dist).float().mean().item()


ORDERINGS = {  # the paper's claims, each as (better row, worse row); k: the largest number of versions
    "latent prior beats a start from noise": ("synthetic-1x", "no-prior"),
    "LoRA beats the stock generator": ("synthetic-1x", "no-lora"),
    "caption and class beat the class alone": ("synthetic-1x", "no-caption"),
    "visual token beats none": ("synthetic-1x", "no-token"),
    "the matching term helps": ("synthetic-1x", "no-matching"),
    "more versions are better": ("synthetic-{k}x", "synthetic-1x"),
    "real + synthetic beats real": ("real+synthetic-{k}x", "real"),
}


def claimed(metrics, k):
    """Rows [claim, difference, verdict] for these rows of the table and this largest number of versions"""
    return compared(metrics, {claim: [row.format(k=k) for row in rows] for claim, rows in ORDERINGS.items()})


def write_report(args, run, data, real, sets, found, splits, clip_top1, near):
    """results.json, tables, contact sheet, classifier/, report. found: {(row, seed): ({split: top-1}, answers [N])}"""
    metrics = {"zero-shot": dict(mean=clip_top1)}
    table = [["CLIP zero-shot, no training", f"{clip_top1:.1f}", *[""] * (len(splits) + 1)]]  # on the test split alone
    for row in training_rows(args):
        per_seed = {s: [found[row, args.seed + i][0][s] for i in range(args.clf_seeds)] for s in splits}
        about = read_json(run.path("classifier", "runs", f"{row}-seed{args.seed}", "metrics.json"))
        metrics[row] = over_seeds(per_seed["test"]) | dict(updates=about["updates"])
        metrics[row] |= {f"ood/{s}": over_seeds(per_seed[s]) for s in splits[1:]}
        table.append([row, *(spread(per_seed[s]) for s in splits), about["images"], about["updates"]])
    header = ["training set", *("test top-1" if s == "test" else s for s in splits), "images", "updates"]
    claims = claimed(metrics, args.net_versions[-1])
    tables = {"Top-1, last epoch": (header, table)}
    tables["Which of the paper's orderings show here"] = (["claim", "difference", "verdict"], claims)
    pictures = {"Real and generated samples": "samples.png"}
    if run.path("attack.json").exists():
        attacks = read_json(run.path("attack.json"))
        metrics["membership"] = attacks
        rows = [[k, a, *(f"{100 * x:.1f}" for x in f.values())] for k, by in attacks.items() for a, f in by.items()]
        head = ["trained on", "attack", "AUC", "balanced accuracy", "TPR at 0.1 % FPR", "TPR at 1 % FPR"]
        tables["Membership inference, percent (chance: 50, 50, 0.1, 1)"] = (head, rows)
        pictures["Membership inference"] = "attack.png"

    best, names = f"synthetic-{args.net_versions[-1]}x", data.class_names
    baselines = {k: metrics.pop(k) for k in ("zero-shot", "real")}
    (top1, predicted), labels = found[best, args.seed], torch.as_tensor(data.test.labels)
    metrics["saved_classifier"] = dict(top1=top1["test"], per_class=per_class(predicted, labels, names))
    n_images = run.manifest("generate").get("images", {})
    found_here = dict(metrics=metrics, baselines=baselines, orderings=claims, images=n_images, near_copies=near)
    run.results(paper="arXiv:2310.10402", **found_here)
    samples(args, run, real, sets)
    save_classifier(args, run, best, names)
    summary = f"{len(real)} real images, {args.gen_versions} generated for each; every network from scratch"
    conclude(run, f"Real-Fake on {args.dataset}", summary, tables, data.test.labels, predicted, names, pictures)


def samples(args, run, real, sets):
    """samples.png: the first image of each class, its versions, and what each ablation makes of it"""
    first = [int(real.of_class(c)[0]) for c in range(len(real.class_names))]
    rows = {"real": [partial(real.open, i) for i in first]}
    for v in (v for v in sets.values() if not v.folder.startswith("shadows")):
        versions = versions_of(args, run, v, real)
        for k in range(min(v.versions, 4)):
            name = f"{v.folder.rpartition('/')[2]} {k}"
            rows[name] = [partial(images.open_rgb, versions.file(i, k)) for i in first]
    size = min(max(args.gen_resolution, 64), 128)
    images.samples_grid(run.path("samples.png"), list(rows.values()), list(rows), real.class_names, size=size)


def save_classifier(args, run, row, class_names):
    """classifier/: loads with timm.create_model("local-dir:...", pretrained=True); the cifar stem needs ours first"""
    net = trained_net(args, run.path("classifier", "runs", f"{row}-seed{args.seed}"), len(class_names), "cpu")
    net = net.to(memory_format=torch.contiguous_format)  # the file format knows no other layout
    timm.models.save_for_hf(net, run.path("classifier"), safe_serialization=True)
    write_json(run.path("classifier", "classes.json"), dict(class_names=class_names, row=row, seed=args.seed))


# ---------------------------------------------------------------------------------------------


def spare_ablations(args):
    """Take off the ablations of what is off already: they would be the method once more. -> a note, or "" """
    there = {
        "no-lora": args.lora, "no-matching": args.lora and args.dm_lambda, "no-token": args.token != "none",
        "class-mean": args.token != "class_mean", "no-prior": args.gen_prior == "image", "no-caption": args.caption,
    }  # fmt: skip
    spare = [name for name in args.ablations if not there[name]]
    args.ablations = tuple(name for name in args.ablations if there[name])
    return f"note: --ablations {' '.join(spare)}: off in the method itself, left out" if spare else ""


def check_args(args):
    """What a single flag's range cannot say."""
    check(args)
    batch, group, part, m = args.sd_batch, args.dm_batch, args.sd_micro_batch, args.mia_models
    strength, steps, versions = args.i2i_strength, args.gen_steps, args.net_versions
    fine = versions and max(versions) <= args.gen_versions and list(versions) == sorted(set(versions))
    refuse(batch % group, f"--sd-batch {batch}: it must be a multiple of --dm-batch {group}")
    refuse(group % part, f"--dm-batch {group}: it must be a multiple of --sd-micro-batch {part}")
    none = args.gen_prior == "image" and not kept_steps(strength, steps)
    refuse(none, f"--i2i-strength {strength}: it keeps none of --gen-steps {steps}")
    refuse(not fine, f"--net-versions {versions}: ascending numbers, at most --gen-versions")
    # From 6 on every target has two shadows on each side.
    refuse(m % 2 or 0 < m < 6, f"--mia-models {m}: an even number from 6 on, or 0 for no attack")
    refuse(len(set(args.ablations)) < len(args.ablations), f"--ablations {' '.join(args.ablations)}: each once")
    ood_sets(args.ood, args.dataset)  # a wrong folder is told now, not after days


def planned_models(args, sets):
    """Every model that a stage will load, looked through before the first one -> {flag: what to load}"""
    writes = "caption" in args.stages and needs_captions(sets) and args.captions_file is None
    wanted = [("--sd-model", args.sd_model, "generator"), ("--token-clip", args.token_clip, "clip")]
    wanted += [("--captioner", args.captioner, "captioner")] if writes else []
    found = models.check_models([*wanted, ("--net-model", args.net_model, "network")])
    # epsilon only: residuals of v are no residuals of the noise, and another min-SNR weight belongs to them
    models.check_generator(args.sd_model, found["--sd-model"], ("--gen-resolution", args.gen_resolution))
    return found


def needs_captions(sets):
    return any(v.caption for v in sets.values())


def check_sets(args, found, real, sets):
    """What would end a stage after hours: too few images for a step, a network or a CLIP of another size."""
    few = min(sets.values(), key=lambda v: len(v.rows))  # a shadow's, where there are some
    what = f"{few.folder.removesuffix('/images')} has {len(few.rows)} of the {len(real)} real images"
    tunes, trains = args.lora and "finetune" in args.stages, {"train", "attack", "evaluate"} & set(args.stages)
    refuse(tunes and len(few.rows) < args.sd_batch, f"--sd-batch {args.sd_batch}: {what}; choose it smaller")
    refuse(len(few.rows) < 2, f"--real-per-class {args.real_per_class}: {what}; give more, or --mia-models 0")
    if any(v.token != "none" for v in sets.values()) and {"embed", "finetune", "generate"} & set(args.stages):
        d, w = models.token_widths(found["--token-clip"], found["--sd-model"])
        what = f"--token-clip {args.token_clip}: its embedding has {d} numbers, the generator's text states have {w}"
        refuse(d != w, f"{what}; choose a CLIP of that width")
    if trains:
        flags = f"--net-model {args.net_model} --net-size {args.net_size} --net-micro-batch {args.net_micro_batch}"
        make = partial(make_net, args, len(real.class_names), 0)
        check_network(flags, make, args.net_size, min(2, args.net_micro_batch, args.net_batch))


NEEDS = dict(
    embed="caption", finetune="embed", generate="finetune", train="generate", attack="generate", evaluate="train"
)
# Flags that no stage before this one reads: they may change while it has not begun.
LATER = {
    "finetune": "sd_ dm_ tune_ flip",
    "generate": "gen_steps gen_guidance gen_lora_scale gen_negative gen_format gen_quality gen_save_size gen_seed i2i_",
    "train": "net_ clf_", "attack": "", "evaluate": "ood",
}  # fmt: skip


def plan(args):
    n = planned.images_of(args)
    how = kept_steps, tuning_steps, kept_crops, row_length
    return planned.plan(args, n, generated_sets(args, n), training_rows(args), *how)


def main(args):
    check_args(args)
    note = spare_ablations(args)
    if args.plan:
        return print_plan(*plan(args), args)
    dist = distributed.setup_distributed(args.device, args.deterministic)
    data = distributed.on_rank_0(partial(datasets.load_dataset, args.dataset, args.data_dir), dist)
    distributed.say(dist, data.note)
    distributed.say(dist, note)
    if args.dm_batch != 8 and args.lora:
        lam = matching_weight(args.dm_lambda, args.dm_batch)
        distributed.say(dist, f"note: --dm-batch {args.dm_batch}: lambda becomes {lam:g}, {args.dm_lambda:g} at 8")
    real = distributed.on_rank_0(partial(choose_real, args, data), dist)
    names, sets = prompt_names(args.dataset, data.class_names), generated_sets(args, len(real))
    ready = None
    if args.captions_file and needs_captions(sets):  # read once, on rank 0, and not when that stage is finished
        ready = cache(partial(captions.read_captions, args.captions_file, real))
        finished = runs.stage_finished("realfake", args, "caption") or "caption" not in args.stages
        distributed.on_rank_0(lambda: None if finished else ready() and None, dist)
    found = planned_models(args, sets)
    check_sets(args, found, real, sets)
    ids = models.fingerprints(found) | {"real": keys_hash(real)}

    free, read = ["gen_micro_batch"], dict(real=real, test=data.test)
    run = runs.open_run("realfake", args, dist, free, models=ids, later=LATER, pictures=read)
    todo = [stage for stage in args.stages if run.todo(stage)]
    check_order(run, todo, NEEDS)
    if "caption" in todo:
        caption(args, run, dist, real, ready) if needs_captions(sets) else run.done("caption", captions=0)
    ready = None  # a million sentences
    if "embed" in todo:
        tokens = any(v.token != "none" for v in sets.values())
        embed(args, run, dist, real) if tokens else run.done("embed", embeddings=0)
    path = found["--sd-model"]
    # Called by the first stage that needs the generator, loaded once.
    pipe = cache(partial(diffusion.load_pipeline, path, dist.device, args.precision, **models.load_kwargs(path)))
    if "finetune" in todo:
        finetune(args, run, dist, pipe(), real, names, sets)
    if "generate" in todo:
        generate(args, run, dist, pipe(), real, names, sets)
    pipe.cache_clear()  # the classifiers get its memory
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
