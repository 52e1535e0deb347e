"""DistDiff: distribution-aware data expansion with diffusion models (H. Zhu et al., NeurIPS 2024, arXiv:2403.06741).

Multiply a small labelled set k times with img2img samples of an unchanged Stable Diffusion. In the middle of each
sampling one gradient step moves the latent towards prototypes of the real data, as a guide classifier sees them.

    [1] select --> [2] guide --> [3] prototypes --> [4] encode --> [5] expand --> [6] train --> [7] evaluate
    N real images  classifier    class means,       VAE latents    k images       classifiers   top-1 on the
                   of the real   K group means      of the real    for each real  from scratch  real test set

Run:
    python distdiff.py  # 10 digits, 4 real images each, tiny models, 2 CPU cores: a table in minutes
    torchrun --standalone --nproc-per-node 8 distdiff.py --preset caltech101
    python distdiff.py --preset caltech101 --plan h100  # what that run will do and cost; nothing is done

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
from pathlib import Path
from typing import Literal, get_args

from common.cli import Count, Fraction, Frame, Natural, NonNegative, Positive, Share, check, parse, start

Stage = Literal["select", "guide", "prototypes", "encode", "expand", "train", "evaluate"]
Row = Literal[
    "zero-shot", "real", "real-repeated", "autoaugment", "randaugment", "erasing", "cutout", "gridmask", "mixup",
    "cutmix", "sd", "rho0", "direct", "distdiff",
]  # fmt: skip
Transform = Literal["none", "autoaugment", "randaugment", "erasing", "cutout", "gridmask", "mixup", "cutmix"]


@dataclass
class Args(Frame):
    dataset: str = "caltech101"
    """real data set; `folder`: your own images in data_dir"""
    stages: tuple[Stage, ...] = ("select", "guide", "prototypes", "encode", "expand", "train", "evaluate")
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
    gen_save_size: Count | None = 256
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
    """images per forward pass on one process; speed, memory, and rounding: some pixels by a grey level"""
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


# Comments: the paper's top-1, real / SD / DistDiff at k = 5. Learning rates of fine-tuning are ours: not published.
FINE_TUNED = dict(classifier_pretrained=True, sgd_lr=0.01)
PRESETS = {
    "digits": dict(  # 4 real images per class, tiny models; see docs/distdiff.md
        dataset="digits", sd_model="tiny", zeroshot_clip="tiny", precision="fp32", workers=0,
        real_per_class=4, val_fraction=0.2, guide="test_resnet", guide_epochs=100, classifier="test_resnet",
        gen_resolution=32, gen_save_size=None, gen_steps=20, gen_step_from_end=8, gen_micro_batch=32, energy_probe=40,
        rows=("zero-shot", "real", "real-repeated", "randaugment", "gridmask", "mixup", "cutmix", "sd", "rho0",
              "distdiff"),
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

import math
from copy import deepcopy
from functools import cache, lru_cache, partial

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from sklearn.cluster import AgglomerativeClustering
from torch import nn
from torchvision.transforms import v2

from common import datasets, diffusion, distributed, images, models, openclip
from common import run as runs
from common.clip import encode_images, encode_texts, load_clip, save_clip
from common.compiling import compiled
from common.copies import Copies
from common.datasets import in_order
from common.diffusion import DECODED_PIXELS, autocast, encode_prompts, latent_shape, noise_schedule
from common.files import chunks, load_tensors, read_json, save_tensors, write_json
from common.inputs import check_network, check_order, refuse, take_off
from common.jobs import share_out
from common.launch import UserError
from common.loader import Loader, normalised, to_unit
from common.loop import Batches, Loop
from common.names import spoken
from common.near_copies import near_copies
from common.plan import print_plan
from common.plans import distdiff as planned
from common.report import compare_saved, conclude, means, over_seeds, per_class, spread
from common.selection import Best

# Official code. The paper's appendix has "a photo of a {} car." for Cars: --gen-prompt. No period for the tiny world.
PROMPTS = {
    "digits": "a photo of a {}", "dtd": "{} texture.", "pathmnist": "a colon pathological image of {}.",
    "breastmnist": "a photo of {} ultrasound image.", "bloodmnist": "a photo of {}, a type of cell.",
    "pets": "A photo of a pet {}.", "flowers102": "A photo of a {}, a type of flower.",
    "fgvc_aircraft": "A photo of a {}, a type of aircraft",
}  # fmt: skip
IMAGENETTE = "tench,English springer,cassette player,chain saw,church,French horn,garbage truck,gas pump,golf ball,"
IMAGENETTE += "parachute"  # its folders are WordNet ids
TRANSFORMS = get_args(Transform)[1:]  # the rows of real images with one of these
GENERATED = {"distdiff": "images", "sd": "sd", "rho0": "rho0", "direct": "direct"}  # row -> folder of its images
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HELD_BYTES = 256e6  # of a list of images that a process keeps in memory as pixels


# ---------------------------------------------------------------------------------------------
# [1] select: the real images that are multiplied, the validation and the test images. Writes real.json.
# The paper's subsets (Caltech-101, CIFAR-100, PathMNIST) were drawn at random and never published; these draws are
# ours, so compare differences between rows, not absolute figures. In shapes: N real images, C classes, K groups and k
# copies; B images of a batch; pixels [3, H, W] (S x S for a network), latents [4, h, w] with h = H / 8, text states
# [77, W]; D is the width of the guide's features.


def load_real(args):
    """The data set, in the paper's splits where common/datasets.py has others."""
    data = datasets.load_dataset(args.dataset, args.data_dir)
    if args.dataset == "caltech101":  # the paper's draw is not published, this one is ours; the rest is the test set
        everything = data.train + data.val + data.test  # without Faces_easy: 100 classes
        chosen = datasets.few_shot(everything, "caltech101", 30, 0, len(data.class_names))  # 3,000 rows
        rest = sorted(set(range(len(everything))) - set(chosen))  # the published 6,085 fit no set of 100 classes
        train, test = everything.subset(chosen), everything.subset(rest)
        return datasets.ImageDataset("caltech101", data.class_names, train, None, test, "30 images per class, our draw")
    return data


def choose_images(args, data):
    """-> (real images, validation images or None); a function of the flags and the data set alone"""
    train, val, n, held = data.train, data.val, len(data.class_names), None
    if args.merge_val and val is not None:  # DTD: the paper trains on both
        train, val = train + val, None
    if val is None and args.val_fraction:
        train, val = datasets.hold_out(train, args.val_fraction, args.seed)
        held = val
    if args.real_per_class:
        k = args.real_per_class
        train = train.subset(datasets.few_shot(train, data.name, k, args.seed, n, held, "--val-fraction"))
    return in_order(train), val


def select(run, dist, real, val):
    """Write down what was chosen; refuse to go on with other images than the run began with."""
    chosen = {"real": list(real.keys), "validation": [] if val is None else list(val.keys)}  # names of files
    if run.todo("select"):
        if dist.main:
            write_json(run.path("real.json"), chosen)
        run.done("select", run.under("real.json"), real=len(real), validation=len(chosen["validation"]))
    elif distributed.on_rank_0(lambda: read_json(run.path("real.json")), dist) != chosen:
        raise UserError(f"{run.path('real.json')}: the images have changed since the run began; use a new --output-dir")


def prompts_of_classes(args, class_names):
    """One prompt per class, its name in words; Cars have the year in front. List of C strings"""
    names = IMAGENETTE.split(",") if args.dataset == "imagenette" else spoken(args.dataset, class_names)
    template = PROMPTS.get(args.dataset, "a photo of a {}.") if args.gen_prompt is None else args.gen_prompt
    return [template.replace("{}", name) for name in names]


# ---------------------------------------------------------------------------------------------
# What a network sees. Table 1's transformations are library calls, but for GridMask and the mixing of MixUp.
# Every view first squashes the image to a square, so the stored square of a generated image trains as that image itself
# would. Views are uint8; they are normalised on the device.


def squashed(image, side):
    """PIL -> PIL of side x side pixels, bilinear, proportions not kept: the first step of every view of an image."""
    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BILINEAR)


def centre_view(image, resize, size):
    """Evaluation: PIL -> uint8 [3, size, size]. Prototypes: resize = size, so that nothing is cropped (Sec. 3.2)."""
    return v2.functional.pil_to_tensor(v2.functional.center_crop(squashed(image, resize), size))


def train_view(args, extra):
    """Official code: rotate, crop, mirror, then at most one of Table 1's transformations.

    -> view(PIL, share of the training that is over): uint8 [3, S, S], and for the transformations that hide a part of
    the image also what stays, uint8 [1, S, S].
    """
    policies = {"autoaugment": v2.AutoAugment, "randaugment": v2.RandAugment}
    steps = [v2.RandomRotation(15), v2.RandomCrop(args.clf_size), v2.RandomHorizontalFlip(0.5)]
    # AutoAugment and RandAugment come after the mirror, on pixels 0..255.
    steps = steps[: 3 if args.clf_flip else 2] + [policies[extra]() for _ in range(extra in policies)]
    change = v2.Compose([*steps, v2.PILToTensor()])
    hide = {
        # The official code calls this one cutout; Cutout itself is one square of a quarter of the area, always.
        "erasing": v2.RandomErasing(0.5, scale=(0.02, 0.33), ratio=(0.3, 3.3)),
        "cutout": v2.RandomErasing(1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0)),
    }.get(extra)

    def view(image, share):
        pixels = change(squashed(image, args.clf_resize))  # uint8 [3, S, S]
        if extra == "gridmask":
            return pixels, random_grid_mask(args.clf_size, share)[None]
        return (pixels, hide(torch.ones_like(pixels[:1]))) if hide else pixels

    return view


def grid_mask(size, d, hidden, row, col, angle):
    """GridMask, mode 1: bands of `hidden` pixels in a grid of pitch d are what stays. -> uint8 [size, size]

    Two families of bands are cut into a square that is large enough to be rotated; the centre is cut out, inverted.
    """
    side = math.ceil(math.sqrt(2 * size * size))  # the diagonal: no corner is empty after the rotation
    mask = np.ones((side, side), np.uint8)  # the bands become 0; the inversion below makes them what stays
    for i in range(-1, side // d + 1):
        mask[max(0, d * i + row) : max(0, min(d * i + row + hidden, side)), :] = 0
        mask[:, max(0, d * i + col) : max(0, min(d * i + col + hidden, side))] = 0
    mask = np.array(Image.fromarray(mask).rotate(angle))
    start = (side - size) // 2
    return torch.from_numpy(1 - mask[start : start + size, start : start + size])


def random_grid_mask(size, share):
    """A random GridMask, or all ones; its probability rises to 0.8 over the first 80 % of the training."""
    if torch.rand(()) >= 0.8 * min(1.0, share / 0.8):
        return torch.ones(size, size, dtype=torch.uint8)
    d = int(torch.randint(max(2, size * 96 // 224), size, ()))  # d in [96, 224) at 224 pixels
    row, col = torch.randint(d, (2,)).tolist()  # where the grid begins
    return grid_mask(size, d, math.ceil(0.6 * d), row, col, int(torch.randint(360, ())))


def mixup_with(x, y, index, lam):
    """MixUp: lam x + (1 - lam) x[index], and the same of the one-hot labels. [B, 3, H, W], [B, C], [B] -> both

    Trap: the official loss takes lam = 1, so that its images are mixed and its labels are not.
    """
    return lam * x + (1 - lam) * x[index], lam * y + (1 - lam) * y[index]


def mix_batch(x, labels, extra, n_classes, *seed):
    """A batch under MixUp or CutMix, lam ~ U(0, 1) = Beta(1, 1), else as it is. -> x, labels [B] or shares [B, C]"""
    if extra == "mixup":
        g = distributed.generator(*seed)
        lam, index = float(torch.rand((), generator=g)), torch.randperm(len(x), generator=g).to(x.device)
        return mixup_with(x, F.one_hot(labels, n_classes).float(), index, lam)
    if extra == "cutmix":  # one box for the whole batch; officially up to two for each image, from the whole set
        distributed.seed_global(distributed.seed_of(*seed))
        return v2.CutMix(num_classes=n_classes)(x, labels)
    return x, labels


def held(args, some, side):
    """Images as squares in memory where that is small; else as they are, and the loader's workers read the files, from
    the disk cache that all processes of a host share. The bits are the same."""
    if len(some) * 3 * side**2 > HELD_BYTES:
        return some
    view = lambda image: v2.functional.pil_to_tensor(squashed(image, side))  # noqa: E731
    batches = Loader(some, view, torch.device("cpu"), args.workers)(chunks(range(len(some)), 64))
    pixels = torch.cat(list(batches)).permute(0, 2, 3, 1).contiguous().numpy()  # [N, side, side, 3]
    return datasets.Images(some.labels, map(str, range(len(some))), some.class_names, pixels=pixels)


# ---------------------------------------------------------------------------------------------
# A network and its training, for stages 2 and 6 (Sec. 4.1). Writes weights.safetensors and metrics.json in its folder.
# Guide and classifiers have one recipe: cross-entropy, SGD from rate 0.1 along a cosine, batches of 64, 100 epochs. On
# few images the number of updates decides much, so an epoch's length is a choice of its own (Training.length).


class Net(nn.Module):
    """A timm network, or clip:NAME: an open_clip image tower under a linear layer that starts as the class prompts.

    Normalised images [B, 3, S, S] -> features [B, D] before the last layer, or logits [B, C]. weights: None for a
    random start, timm's file, or True for those of a folder local-dir:DIR.
    """

    def __init__(self, name, prompts, weights=None):
        super().__init__()
        self.mean, self.std, self.clip = IMAGENET_MEAN, IMAGENET_STD, None
        if name.startswith("clip:"):
            self.clip = load_clip(name.removeprefix("clip:"))
            self.net = self.clip.model.visual  # Trap: officially fed with ImageNet's mean and deviation, not CLIP's own
            texts = F.normalize(encode_texts(self.clip, prompts), dim=-1)
            self.head = nn.Linear(texts.shape[1], len(prompts))  # on the feature as it comes, not normalised
            with torch.no_grad():
                self.head.weight.copy_(texts), self.head.bias.zero_()
        else:
            where = dict(pretrained_cfg_overlay=dict(file=weights)) if isinstance(weights, str) else {}
            self.net = timm.create_model(name, pretrained=bool(weights), num_classes=len(prompts), **where)

    def features(self, x):
        """theta(x): of a ResNet the pooled map after its last ReLU, no number below 0; [B, 2048] for ResNet-50"""
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
            save_tensors(folder / "head.safetensors", dict(self.head.state_dict()))
        else:
            timm.models.save_for_hf(self.net, folder, safe_serialization=True)
        write_json(folder / "classes.json", about)

    @staticmethod
    def load(folder):
        """A network from what save wrote"""
        prompts = read_json(folder / "classes.json")["prompts"]
        if not (folder / "head.safetensors").exists():
            return Net(f"local-dir:{folder}", prompts, weights=True)
        net = Net(f"clip:{folder}", prompts)
        net.head.load_state_dict(load_tensors(folder / "head.safetensors"))
        return net


def seen_by(net, x):
    """uint8 batch -> what the network takes: normalised, in the layout that convolutions are fastest in"""
    return normalised(x, net.mean, net.std).contiguous(memory_format=torch.channels_last)


def epoch_lr(epoch, base, epochs):
    """Learning rate of an epoch: half a cosine from base, stepped once per epoch."""
    return 0.5 * base * (1 + math.cos(math.pi * epoch / epochs))


def top1(logits, labels):
    """Percent of rows whose largest logit is the label's. [N, C], [N]"""
    return 100 * (logits.argmax(1) == torch.as_tensor(labels)).float().mean().item()


@dataclass
class Training:
    """A network to train on lists of images, one after the other; length: images per epoch, however many there are."""

    folder: Path
    network: str
    weights: str | None
    epochs: int
    lr: float
    sources: list
    length: int
    seed: int
    extra: Transform = "none"


def fit(args, run, team, job, scored, prompts):
    """Train a network and save the weights of its chosen epoch: the best on scored["val"], else the last.

    Official recipe: SGD with Nesterov momentum, weight decay on everything, cosine by epoch, no warm-up. An epoch's
    last batch may be short.
    """
    if (job.folder / "metrics.json").exists():
        return
    distributed.seed_global(distributed.seed_of(job.seed, "weights"), team.device)
    net = Net(job.network, prompts, job.weights).to(team.device, memory_format=torch.channels_last)
    data, b = datasets.Concat(job.sources), args.sgd_batch
    batches, labels = Batches(len(data), b, job.seed, length=job.length), torch.as_tensor(data.labels)
    total = job.epochs * batches.per_epoch  # updates
    optimizer = torch.optim.SGD(net.parameters(), job.lr, momentum=0.9, nesterov=True, weight_decay=args.sgd_wd)
    running = [t for name, t in net.named_buffers() if "running_" in name or "num_batches" in name]  # of BatchNorm
    chart, file = f"train/{job.folder.name}", job.folder / "checkpoint.safetensors"
    loop = Loop(run, chart, total, optimizer, team, b, file, buffers=running)  # one micro-batch a step
    # The test score is for the column "best of the test scores", never for the choice.
    score = lambda split: top1(predict(args, net, scored[split], team.device), scored[split].labels)  # noqa: E731
    best = Best(loop, net.state_dict(), args.clf_evals, score, list(scored))
    pictures = Loader(data, train_view(args, job.extra), team.device, args.workers, (job.seed, "augment"))
    # The view also gets the share of the training that is over.
    asked = ([(entry, place, step / total) for entry, place in batches[step]] for step in loop.steps)
    stream = pictures(part for batch in asked for part in loop.mine(batch))
    for step in loop:
        net.train()
        batch = batches[step]
        target = labels[[entry for entry, _ in batch]]  # [B]
        for u in loop.units(len(batch)):  # one: BatchNorm sees the whole batch
            x, keep = found if isinstance(found := next(stream), tuple) else (found, 1)  # [B, 3, S, S], [B, 1, S, S]
            x, y = seen_by(net, x) * keep, target[u].to(team.device, non_blocking=True)
            x, y = mix_batch(x, y, job.extra, len(prompts), job.seed, "mix", step)
            with autocast(args.precision, team.device):
                logits = net(x)  # [B, C]
            loop.backward(F.cross_entropy(logits.float(), y) * len(y) / len(batch))
        loop.log(loss=loop.update(lr=epoch_lr(step // batches.per_epoch, job.lr, job.epochs)))
        best.look(step + 1)
    metrics = dict(seed=job.seed, images=len(data), updates=total) | best.report()
    save_tensors(job.folder / "weights.safetensors", loop.tensors)
    write_json(job.folder / "metrics.json", metrics)
    loop.finish()


@torch.no_grad()
def predict(args, net, some, device):
    """Logits [N, C] of images under the evaluation transform"""
    net.eval()
    view = partial(centre_view, resize=args.clf_resize, size=args.clf_size)
    pictures = Loader(some, view, device, args.workers, shorter=args.clf_resize)
    with autocast(args.precision, device):
        batches = pictures(chunks(range(len(some)), 4 * args.sgd_batch))
        return torch.cat([net(seen_by(net, x)).float().cpu() for x in batches])


def trained(name, prompts, folder, device):
    """The network that fit saved, frozen, in eval mode: BatchNorm uses its running statistics."""
    net = Net(name, prompts)
    net.load_state_dict(load_tensors(folder / "weights.safetensors"))
    return net.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)


def scored_splits(args, val, test):
    """What a training is scored on: val chooses its epoch, test is reported"""
    return {name: held(args, some, args.clf_resize) for name, some in (("test", test), ("val", val)) if some}


# ---------------------------------------------------------------------------------------------
# [2] guide: a classifier of the real images alone; its features say where the data are. Only these features, theta(x)
# before the last layer, are used from here on; the guide is frozen and in eval mode. It may be weak: 66.7 % on
# Caltech-101 in the paper, and a CLIP of 92.2 % in its place adds a quarter of a point (Table 10).
# Reads the real images, writes guide/weights.safetensors, guide/metrics.json.


def train_guide(args, run, dist, real, val, test, prompts, weights):
    """Stage 6's training with a rate and a length of its own, of one network on one process."""
    idle = "note: guide: one network, BatchNorm over whole batches: one process trains, others wait"
    distributed.say(dist, idle if dist.world > 1 else "")
    with run.timed("guide", "--sgd-batch", trains=True):
        if dist.main:
            job = Training(
                run.path("guide"), args.guide, weights, args.guide_epochs, args.guide_lr,
                [held(args, real, args.clf_resize)], len(real), args.seed,
            )  # fmt: skip
            fit(args, run, dist.alone(), job, scored_splits(args, val, test), prompts)
        distributed.barrier(dist)
    found = read_json(run.path("guide", "metrics.json"))
    run.done("guide", run.under("guide"), test=found["test"], val=found["val"])


# ---------------------------------------------------------------------------------------------
# [3] prototypes (Sec. 3.2): what the guide thinks the classes look like, a mean of features for each class and K for
# its clusters.
#     u_i = theta(x_i) / |theta(x_i)|,  p_c = mean of u_i over class c,  q_ck = mean of u_i over cluster k of class c
# and both are brought back to unit length. p says what all images of a class have in common, the K q what the kinds of
# images within it have. Table 4: no guidance 76.6, p alone 82.7, q alone 82.8, both 83.1; half a point is noise.
# Reads the real images, on one process; writes prototypes.safetensors, prototypes.json, prototypes.png.


def prototypes(features, labels, n_classes, k):
    """Sec. 3.2: means of the L2-normalised features, of each class and of each of its clusters. [N, D], [N]

    -> dict: class_mean [C, D], group_mean [C, K, D], both again with unit length as class_unit and group_unit, and
    assign [N], the cluster of each image. Clusters: average linkage, Euclidean. A class with fewer than K images has as
    many clusters; its last prototype is repeated, which never changes the nearest one.
    """
    u = F.normalize(features.float(), dim=1)
    class_mean, group_mean = u.new_zeros(n_classes, u.shape[1]), u.new_zeros(n_classes, k, u.shape[1])
    assign = torch.zeros(len(u), dtype=torch.long)
    for c in range(n_classes):
        rows = (labels == c).nonzero().flatten()  # [n_c]
        class_mean[c] = u[rows].mean(0)
        found = min(k, len(rows))  # groups that the class has
        if found > 1:
            clusters = AgglomerativeClustering(n_clusters=found, linkage="average").fit_predict(u[rows].numpy())
            assign[rows] = torch.from_numpy(clusters).long()  # 0 .. found - 1
        for j in range(k):  # of fewer clusters the last one again
            group_mean[c, j] = u[rows[assign[rows] == min(j, found - 1)]].mean(0)
    units = dict(class_unit=F.normalize(class_mean, dim=-1), group_unit=F.normalize(group_mean, dim=-1))
    return dict(class_mean=class_mean, group_mean=group_mean, assign=assign, **units)


@torch.no_grad()
def guide_features(args, guide, real, device):
    """Features [N, D] of the real images, squashed to the size that the guide sees, without a crop"""
    view = partial(centre_view, resize=args.clf_size, size=args.clf_size)
    batches = Loader(real, view, device, args.workers)(chunks(range(len(real)), args.sgd_batch))
    return torch.cat([guide.features(seen_by(guide, x)).float().cpu() for x in batches])


def make_prototypes(args, run, dist, real, class_names, prompts):
    """Once, in float32: N images through the guide, a clustering for each class."""
    with run.timed("prototypes"):
        if dist.main:
            guide = trained(args.guide, prompts, run.path("guide"), dist.device)
            features, labels = guide_features(args, guide, real, dist.device), torch.as_tensor(real.labels)
            found = prototypes(features, labels, len(class_names), args.groups)
            save_tensors(run.path("prototypes.safetensors"), {k: found[k] for k in ("class_unit", "group_unit")})
            show_prototypes(args, run, real, features, labels, found, class_names)
        distributed.barrier(dist)
    run.done("prototypes", run.under("prototypes.safetensors", "prototypes.png", "prototypes.json"), groups=args.groups)


def show_prototypes(args, run, real, features, labels, found, class_names):
    """prototypes.png, the real image nearest to each prototype; prototypes.json, sizes of clusters, length of features.

    Trap: average linkage likes one large cluster and outliers; the sizes show it.
    """
    vectors, u = torch.cat([found["class_unit"][:, None], found["group_unit"]], 1), F.normalize(features, dim=1)
    rows, sizes = [[] for _ in range(1 + args.groups)], {}
    for c, name in enumerate(class_names):
        members = (labels == c).nonzero().flatten()
        sizes[name] = torch.bincount(found["assign"][members], minlength=args.groups).tolist()
        for row, i in zip(rows, (vectors[c] @ u[members].T).argmax(1).tolist(), strict=True):
            row.append(partial(real.open, int(members[i])))
    names = ["class", *(f"group {k + 1}" for k in range(args.groups))]
    images.samples_grid(run.path("prototypes.png"), rows, names, class_names, size=64)
    about = dict(cluster_sizes=sizes, mean_feature_length=features.norm(dim=1).mean().item())
    write_json(run.path("prototypes.json"), about)


# ---------------------------------------------------------------------------------------------
# [4] encode: one VAE latent for each real image, shared by its copies: z_0 = 0.18215 x a draw of VAE(x), [4, 64, 64] at
# 512 pixels. Crop and draw are made once, so the k copies of an image differ by what stage 5 does alone.
# Reads the real images, writes latents.safetensors.


def generator_of(args, path, device):
    """The stock pipeline, frozen, without safety checker; the VAE's weights are read in full precision."""
    pipe = diffusion.load_pipeline(path, device, args.precision, **models.load_kwargs(path))
    for part in (pipe.unet, pipe.vae) if args.grad_checkpoint else ():
        part.enable_gradient_checkpointing()
    return pipe


def crop_offset(width, height, size, g):
    """Size after the shorter side became `size`, and a uniform top left corner. -> (w, h), (x, y)"""
    w, h = (int(size * side / min(width, height)) for side in (width, height))  # as torchvision's Resize rounds
    x, y = (int(torch.randint(free + 1, (), generator=g)) for free in (w - size, h - size))
    return (w, h), (x, y)


def encode_view(image, key, args, shape):
    """Shorter side to gen_resolution, one random crop -> uint8 [3, H, W], and the noise of its posterior [4, h, w]"""
    g, size = distributed.generator(args.gen_seed, "encode", key), args.gen_resolution
    scaled, (x, y) = crop_offset(*image.size, size, g)
    image = image.resize(scaled, Image.Resampling.BILINEAR).crop((x, y, x + size, y + size))
    return v2.functional.pil_to_tensor(image), torch.randn(shape, generator=g)


@torch.no_grad()
def encode(args, run, dist, pipe, real):
    """One draw from the VAE's posterior, times its scaling factor; in float32, whatever the precision."""
    size, b, parts = args.gen_resolution, args.gen_micro_batch, []
    shape, batches = latent_shape(pipe, size), chunks(range(len(real)), b)  # (4, 64, 64) at 512
    with run.timed("encode", "--gen-micro-batch"):
        mine = distributed.my_items(batches, dist)
        pictures = Loader(real, partial(encode_view, args=args, shape=shape), dist.device, args.workers)
        bar = distributed.progress(len(real), "encode", dist, together=True)
        for x, noise in pictures([(i, i, real.keys[i]) for i in batch] for batch in mine):
            mean, std = in_slices(lambda x: moments(pipe.vae, x), padded(list(to_unit(x)), b), size).unbind(1)
            parts.append(pipe.vae.config.scaling_factor * (mean + std * padded(list(noise), b))[: len(x)].cpu())
            bar.update(len(x))
        bar.close()
        gathered = distributed.gather_rows(torch.cat([torch.zeros(0, *shape), *parts]), dist)
        if dist.main:
            latents = torch.empty_like(gathered)  # [N, 4, h, w]; rank r had batches r, r + world, ...
            latents[[i for r in range(dist.world) for batch in batches[r :: dist.world] for i in batch]] = gathered
            save_tensors(run.path("latents.safetensors"), {"latents": latents})
    run.done("encode", run.under("latents.safetensors"), latents=len(real))


def moments(vae, x):
    """Mean and standard deviation of the posterior: [B, 2, 4, h, w]"""
    posterior = vae.encode(x).latent_dist
    return torch.stack([posterior.mean, posterior.std], 1)


def padded(tensors, b):
    """Stack of exactly b tensors: the last one is repeated. The networks then always see the same shape."""
    return torch.stack(tensors + tensors[-1:] * (b - len(tensors)))


def in_slices(network, x, size):
    """network(x) of a batch of images of size x size pixels in equal parts, so that no tensor has 2^31 elements.

    The VAE's widest tensor holds 256 numbers per pixel: 2^31 is a batch of 32 at 512 pixels.
    """
    most = max(1, DECODED_PIXELS // size**2)
    part = next(n for n in range(min(most, len(x)), 0, -1) if len(x) % n == 0)  # the largest divisor of B that fits
    return torch.cat([network(y) for y in x.split(part)])


# ---------------------------------------------------------------------------------------------
# [5] expand (Sec. 3.3): k copies of each real image, by img2img with a detour in the middle.
#     z = noised z_0 at step 25 of 50 (t = 481);  DDIM steps to step 30 (t = 381);  there, once:
#     v = (1 + e) z + b   a random scale and shift of each channel, e ~ U(0, 1), b ~ N(0, 1)
#     E = mean over P steps of  lam_c |theta(x0) - p| + lam_g |theta(x0) - nearest q|,  x0: clean, as seen from v
#     e, b <- e, b - rho dE/d(e, b);  z <- (1 + e) z + b, clipped to z +- 0.2;  DDIM steps to the end, decode
# The shift changes what is drawn, the gradient turns it towards the data, the clip keeps z near where it was. Nothing
# of the generator is trained; the gradient goes through it, P times U-Net, decoder and guide, which is the cost. The
# rows sd, rho0 and direct leave parts out: no detour, no gradient, no shift. All start from the same noise.
# Reads latents.safetensors, prototypes.safetensors, guide/; writes images/ (DistDiff), sd/, rho0/, direct/,
# energy.json. First the sampler, DDIM ...


def alphas_cumprod(n=1000, beta_start=0.00085, beta_end=0.012):
    """Scaled-linear schedule: abar_t = prod_{s<=t} (1 - beta_s), sqrt(beta) linear. -> [n] float32"""
    return (1 - torch.linspace(beta_start**0.5, beta_end**0.5, n) ** 2).cumprod(0)


def ddim_schedule(steps, abar):
    """DDIM, leading spacing, offset 1: timesteps [S], 981 ... 1 for 50 steps; abar there [S] and one step on [S]."""
    t = torch.arange(steps - 1, -1, -1) * (len(abar) // steps) + 1  # leading spacing: 1 000 / S apart
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
    x0 = (z - (1 - abar) ** 0.5 * eps) / abar**0.5  # add_noise, solved for z_0
    return x0, abar_next**0.5 * x0 + (1 - abar_next) ** 0.5 * eps


# ... then the guidance. `nets` is what the equations ask of the networks: step(z, i) -> (x0, next z), feature(x0) ->
# [B, D], and the prototypes of the images' classes, p [B, D] and q [B, K, D]; class Networks below.


def affine(z, e, b):
    """Eq. 5: v = (1 + e) z + b, one pair (e, b) for each image and channel. [B, 4, h, w], [B, 4, 1, 1] twice"""
    return (1 + e) * z + b


def project(v, z, radius):
    """The point next to v within the radius of z in every element (L-infinity ball). Shapes of z."""
    return torch.minimum(torch.maximum(v, z - radius), z + radius)


def energy(f, p, q, lam_class, lam_group):
    """Eq. 6 to 8: lam_c |f - p| + lam_g |f - q_j|, j = argmax f . q. Lengths, not their squares.

    Features [B, D], class prototypes [B, D], group prototypes [B, K, D] -> energy [B], chosen group [B]
    Trap: officially f has its own length and p, q have length 1, so that the gradient mostly shortens f
    (--gen-normalize mends that).
    """
    f = f.float()
    j = torch.einsum("bd,bkd->bk", f.detach(), q).argmax(1)  # [B]; the choice has no gradient
    nearest = q[torch.arange(len(q), device=q.device), j]  # [B, D]
    return lam_class * (f - p).norm(dim=1) + lam_group * (f - nearest).norm(dim=1), j


def look_ahead(v, i, period, nets, lam_class, lam_group):
    """Mean energy of the clean images that P denoising steps from latent v predict; v itself is not projected.

    -> energy [B], [(x0, feature, group), ...]
    """
    total, trace = 0.0, []
    for r in range(period):
        x0, v = nets.step(v, i + r)  # a real DDIM step with guidance w; its graph is kept
        f = nets.feature(x0)
        e, j = energy(f, nets.p, nets.q, lam_class, lam_group)
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
        # Before the clip: inside the graph it would take away most of the gradient.
        before = score(affine(z, e, b), i)
        grad_e, grad_b = torch.autograd.grad(before.sum(), (e, b))  # [B, 4, 1, 1] each
    with torch.no_grad():
        e, b = e - rho * grad_e, b - rho * grad_b  # one step, no momentum, no sign
        moved = project(affine(z, e, b), z, radius)
    return moved, dict(energy=before.detach(), grad_e=grad_e, grad_b=grad_b, e=e, b=b)


def direct_guidance(z, i, rho, nets, lam_class=1.0, lam_group=1.0):
    """Sec. 4.4, the ablation: z_next = DDIM step - rho dE/dz, no affine map, no projection, features normalised.

    -> z_next [B, 4, h, w], x0 of the same shape, energy [B]
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        x0, z_next = nets.step(z, i)
        e, _ = energy(F.normalize(nets.feature(x0).float(), dim=1), nets.p, nets.q, lam_class, lam_group)
        grad = torch.autograd.grad(e.sum(), z)[0]  # [B, 4, h, w], a direction for each number of z
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


def vae_of_the_energy(args, pipe):
    """The VAE that the gradient step decodes with: a copy in bfloat16 with --precision bf16, else the pipeline's own.

    Trap: under autocast a VAE in float32 keeps each normalisation's input in both types, 4.8 instead of 2.8 GiB a
    decoding. The image itself is decoded with the pipeline's VAE.
    """
    if args.precision == "fp32":
        return pipe.vae
    return deepcopy(pipe.vae).to(torch.bfloat16, memory_format=torch.channels_last)


class Networks:
    """Generator, guide and prototypes as the equations see them, for images of these labels [B]."""

    def __init__(self, sampler, labels):
        self.s, labels = sampler, labels.to(sampler.device)
        h_c = sampler.text[labels]  # [B, 77, W]
        self.h = torch.cat([sampler.null.expand_as(h_c), h_c])  # [2 B, 77, W]
        self.p, self.q = sampler.class_unit[labels], sampler.group_unit[labels]  # [B, D], [B, K, D]

    def step(self, z, i):
        """DDIM step i with classifier-free guidance. [B, 4, h, w] -> x0, next z, float32"""
        s = self.s
        unet = s.pipe.unet if torch.is_grad_enabled() else s.unet  # compiled only where no gradient is asked
        eps_u, eps_c = unet(torch.cat([z, z]).to(s.pipe.unet.dtype), s.t[i], self.h).sample.float().chunk(2)
        return ddim_step(z, guided(eps_u, eps_c, s.args.gen_guidance), s.abar[i], s.abar_next[i])

    def feature(self, x0):
        """theta of the decoded latent. [B, 4, h, w] -> [B, D], with gradients to x0"""
        args, guide = self.s.args, self.s.guide
        image = self.s.decode(x0, self.s.energy_vae).float()  # [B, 3, H, W]
        whole = (guide.mean, guide.std) if args.gen_guide_input == "normalized" else ()
        with autocast(args.precision, self.s.device):
            f = guide.features(guide_view(image, args.clf_size, *whole)).float()
        return F.normalize(f, dim=1) if args.gen_normalize else f

    def energy(self, v, i):
        """The energy [B] of latent v at step i, as transform_guidance takes it"""
        args = self.s.args
        return look_ahead(v, i, args.gen_period, self, args.gen_class_weight, args.gen_group_weight)[0]


class Sampler:
    """Everything that turns latents of real images into new images, a full micro-batch at a time."""

    def __init__(self, args, pipe, guide, found, prompts):
        self.args, self.pipe, self.guide, self.device = args, pipe, guide, pipe.unet.device
        self.unet = compiled(pipe.unet, args.compile, "U-Net")
        self.energy_vae = vae_of_the_energy(args, pipe)
        text = encode_prompts(pipe, {"", *prompts})
        self.text, self.null = torch.stack([text[p] for p in prompts]), text[""]  # [C, 77, W], [77, W]
        self.class_unit, self.group_unit = (found[k].to(self.device) for k in ("class_unit", "group_unit"))
        abar = alphas_cumprod(**noise_schedule(pipe.scheduler.config))
        self.t, self.abar, self.abar_next = (x.to(self.device) for x in ddim_schedule(args.gen_steps, abar))  # [S]
        self.first = start_index(args.gen_strength, args.gen_steps)  # 25 of 50
        self.guided_at = args.gen_steps - args.gen_step_from_end  # 30 of 50

    def decode(self, z, vae):
        """[B, 4, h, w] -> [B, 3, H, W] in about [-1, 1]"""
        z = (z / vae.config.scaling_factor).to(vae.dtype)
        return in_slices(lambda part: vae.decode(part).sample, z, self.args.gen_resolution)

    def begin(self, latents, labels, seeds):
        """A padded micro-batch: noised latents z at the first step, e ~ U(0, 1), b ~ N(0, 1), and its networks.

        One generator per image draws noise, e and b, in this order, so an image does not depend on its neighbours.
        """
        pad, draws = self.args.gen_micro_batch - len(seeds), []  # the last image again, up to a full micro-batch
        for seed, z in zip(seeds + seeds[-1:] * pad, latents + latents[-1:] * pad, strict=True):
            g = torch.Generator().manual_seed(seed)
            noise = torch.randn(z.shape, generator=g)
            e = torch.rand(len(z), 1, 1, generator=g)  # [4, 1, 1], as b on the next line
            draws.append((noise, e, torch.randn(len(z), 1, 1, generator=g)))
        noise, e, b = (torch.stack(x).to(self.device) for x in zip(*draws, strict=True))
        z0 = padded(latents, self.args.gen_micro_batch).to(self.device)
        z = add_noise(z0, noise, self.abar[self.first].expand(len(z0)))  # t = 481 with the paper's numbers
        return z, e, b, Networks(self, torch.tensor(labels + labels[-1:] * pad))

    @torch.no_grad()
    def draw(self, row, latents, labels, seeds):
        """B latents [4, h, w], labels and seeds -> uint8 [B, 3, H, W]. row: distdiff, sd, rho0 or direct."""
        args, at = self.args, self.guided_at
        z, e, b, nets = self.begin(latents, labels, seeds)
        for i in range(self.first, args.gen_steps):  # 25 .. 49
            if i == at and row == "distdiff":
                z, _ = transform_guidance(z, e, b, i, args.gen_rho, args.gen_radius, nets.energy)
            elif i == at and row == "rho0":  # what is left without the gradient: no network is asked
                z = project(affine(z, e, b), z, args.gen_radius)
            if row == "direct" and at <= i < at + args.gen_period:
                z, _, _ = direct_guidance(z, i, args.gen_rho, nets, args.gen_class_weight, args.gen_group_weight)
            else:
                _, z = nets.step(z, i)
        if not z.isfinite().all():
            raise UserError(f"expand {row}: a latent is not finite; try --precision fp32 or a smaller --gen-rho")
        with autocast(args.precision, self.device):
            image = self.decode(z, self.pipe.vae).float()
        return to_uint8(image).cpu()[: len(seeds)]

    @torch.no_grad()
    def probe(self, latents, labels, seeds):
        """Energies [4][B] at the guided step: before and after the gradient step, and both projected to the ball."""
        args, i = self.args, self.guided_at
        z, e, b, nets = self.begin(latents, labels, seeds)
        for k in range(self.first, i):
            _, z = nets.step(z, k)
        moved, info = transform_guidance(z, e, b, i, args.gen_rho, args.gen_radius, nets.energy)
        after, shifted = affine(z, info["e"], info["b"]), project(affine(z, e, b), z, args.gen_radius)
        found = [info["energy"], *(nets.energy(v, i) for v in (after, shifted, moved))]
        return [x[: len(seeds)].tolist() for x in found]


def copy_seed(args, key, copy):
    """Seed of one copy of the real image with this key; all rows share it, so they differ by the guidance alone."""
    return distributed.seed_of(args.gen_seed, key, copy)


def stored(image, side):
    """uint8 [3, H, W] -> PIL, at most resized as the training would resize it anyway: its bits stay the same."""
    return squashed(images.to_pil(image), side) if side else images.to_pil(image)


def expand(args, run, dist, pipe, real, prompts):
    """Every copy that is not there yet, for each generated row; then the list of what each file is."""
    copies = {row: copies_of(args, run, folder, real) for row, folder in GENERATED.items() if row in args.rows}
    todo = distributed.on_rank_0(partial(missing_copies, args, run, copies), dist)
    with run.timed("expand", "--gen-micro-batch"), images.ImageWriter() as writer:
        guide = trained(args.guide, prompts, run.path("guide"), dist.device)
        sampler = Sampler(args, pipe, guide, load_tensors(run.path("prototypes.safetensors")), prompts)
        file = safe_open(run.path("latents.safetensors"), "pt")  # mapped: the processes of a host share its pages
        latents = file.get_slice("latents")
        for row, files in copies.items():
            left = [(i, j) for j in range(args.gen_copies) for i in todo[row] if j in todo[row][i]]
            bar = distributed.progress(len(left), f"expand {row}", dist, together=True)
            for batch in distributed.my_items(chunks(left, args.gen_micro_batch), dist):
                drawn = sampler.draw(row, *inputs_of(args, real, latents, batch))  # uint8 [B, 3, H, W]
                for (i, j), image in zip(batch, drawn, strict=True):
                    writer.save(files.file(i, j), stored(image, args.gen_save_size))
                bar.update(len(batch))
            bar.close()
        if args.energy_probe and "distdiff" in copies:
            probe_energy(args, run, dist, sampler, real, latents)
    distributed.barrier(dist)
    for files in copies.values() if dist.main else []:
        list_copies(args, files, prompts)
    drawn = run.under("energy.json", *(GENERATED[row] for row in copies))
    run.done("expand", drawn, images={GENERATED[row]: args.gen_copies * len(real) for row in copies})


def missing_copies(args, run, copies):
    """{row: {real image: its copies that are not there}}. Stops when they will not fit on the disk."""
    todo = {row: files.missing() for row, files in copies.items()}
    left, n = sum(len(js) for of in todo.values() for js in of.values()), sum(map(len, copies.values()))
    images.check_space(run.dir, left, n, args.gen_save_size or args.gen_resolution, "png", "--gen-copies")
    return todo


def inputs_of(args, real, latents, batch):
    """[(real image, copy)] -> latents, labels and seeds, as Sampler takes them"""
    seeds = [copy_seed(args, real.keys[i], j) for i, j in batch]
    return [latents[i : i + 1][0] for i, _ in batch], [int(real.labels[i]) for i, _ in batch], seeds


def probe_energy(args, run, dist, sampler, real, latents):
    """energy.json: does the gradient step lower the energy? Measured on the first copy of evenly spread images."""
    n = min(args.energy_probe, len(real))
    chosen, found = [(i * len(real) // n, 0) for i in range(n)], []
    for batch in distributed.my_items(chunks(chosen, args.gen_micro_batch), dist):
        values = sampler.probe(*inputs_of(args, real, latents, batch))
        found += list(zip([i for i, _ in batch], *values, strict=True))
    table = sorted(row for part in distributed.all_gather_object(found, dist) for row in part)  # by image
    names = ("before", "after", "before_projected", "after_projected")
    columns = dict(zip(names, zip(*[row[1:] for row in table], strict=True), strict=True))
    fell = {
        name: 100 * float(np.mean(np.less(columns[after], columns[before])))
        for name, before, after in (("free", *names[:2]), ("projected", *names[2:]))
    }
    if dist.main:
        write_json(run.path("energy.json"), dict(percent_fell=fell, **columns))
        for step, k in enumerate(np.argsort(columns["before"]).tolist()):
            run.log(step, **{f"energy/{name}/energy": columns[name][k] for name in names})
    distributed.say(dist, f"energy fell on {fell['free']:.0f} % of {n} images, projected on {fell['projected']:.0f} %")


def list_copies(args, copies, prompts):
    """metadata.jsonl: from which real image a file is, which copy of it, and the seed that draws it again."""

    def about(i, j):
        source = copies.real.keys[i]
        what = dict(prompt=prompts[copies.real.labels[i]], source=source)
        return what | dict(copy=j, seed=copy_seed(args, source, j))

    copies.write_list(about)


# ---------------------------------------------------------------------------------------------
# [6] train: a classifier for each row, number of copies and seed (Sec. 4.1).
# A generated row trains on the N real images and k N copies, as one list. The paper gives it k + 1 times the updates of
# the real images alone; real-repeated gives these as many, so that what the copies add can be told from what more
# training adds. rho0 tells the shift from its gradient. Rows of fewer copies take the first k of each image.
# Reads the real images and the generated folders; writes classifier/runs/<row>[-k<k>]-seed<s>/ and classifier/.


def classifiers_to_train(args):
    """(row, k, seed) of every classifier to train; k = 0: real images only"""
    seeds = [args.seed + s for s in range(args.clf_seeds)]
    copies = {row: args.clf_copies if row in GENERATED else (0,) for row in args.rows if row != "zero-shot"}
    return [(row, k, seed) for row, ks in copies.items() for k in ks for seed in seeds]


def sets_in_epoch(args, row, k):
    """Times the real images that an epoch sees"""
    return 1 if row == "real" else 1 + (k if k and not args.clf_equal_k else max(args.clf_copies))


def copies_of(args, run, folder, real):
    return Copies(run.path(folder), real, range(len(real)), args.gen_copies)


def run_folder(run, row, k, seed):
    return run.path("classifier", "runs", f"{row}-k{k}-seed{seed}" if k else f"{row}-seed{seed}")


def train(args, run, dist, real, val, test, class_names, prompts, weights):
    """Each classifier is one process's work, for BatchNorm sees whole batches."""
    jobs = classifiers_to_train(args)
    lengths = [sets_in_epoch(args, row, k) for row, k, _ in jobs]
    mine = share_out(jobs, 1, 1, dist, "train", "", lengths=lengths)

    @lru_cache(1)  # the seeds of a row follow each other
    def copies(row, k):
        return held(args, copies_of(args, run, GENERATED[row], real).images(k), args.clf_resize)

    with run.timed("train", "--sgd-batch", trains=True):
        scored, originals = scored_splits(args, val, test), held(args, real, args.clf_resize)
        for team, (row, k, seed) in mine:
            # A transformation of Table 1 belongs to the row that is named after it, or to all generated rows.
            extra = args.clf_transform if k else row if row in TRANSFORMS else "none"
            length = len(real) * sets_in_epoch(args, row, k)  # images of an epoch, repeated or not
            sources, folder = [originals, *([copies(row, k)] if k else [])], run_folder(run, row, k, seed)
            recipe = (args.classifier, weights, args.clf_epochs, args.sgd_lr)
            fit(args, run, team, Training(folder, *recipe, sources, length, seed, extra), scored, prompts)
        if "zero-shot" in args.rows and dist.main:
            score_zero_shot(args, run, dist, test, prompts)
        distributed.barrier(dist)
        if dist.main:
            save_best(args, run, class_names, prompts)
    run.done("train", run.under("classifier"), classifiers=len(jobs))


def score_zero_shot(args, run, dist, test, prompts):
    """CLIP with the class prompts, no training: what the test split is worth without any of this."""
    clip = load_clip(args.zeroshot_clip, device=dist.device)
    weights = F.normalize(encode_texts(clip, prompts), dim=-1)  # [C, D]
    logits = F.normalize(encode_images(clip, test, workers=args.workers), dim=-1) @ weights.T
    file = run.path("classifier", "runs", "zero-shot", "metrics.json")
    write_json(file, dict(seed=args.seed, updates=0, images=0, test=top1(logits.cpu(), test.labels)))


def finished(args, run, row, k=0):
    """metrics.json of the seeds of one line of the table that are there"""
    folders = [run_folder(run, row, k, args.seed + s) for s in range(args.clf_seeds)]
    folders = [run.path("classifier", "runs", "zero-shot")] if row == "zero-shot" else folders
    return [read_json(f / "metrics.json") for f in folders if (f / "metrics.json").exists()]


def best_classifier(args, run):
    """(row, k, metrics) of the classifier that goes into classifier/: of the main row, the best on validation."""
    row, k, _ = max(classifiers_to_train(args), key=lambda r: (r[0] == "distdiff", r[0] in GENERATED, r[1]))
    return row, k, max(finished(args, run, row, k), key=lambda m: (m["val"] or 0, -m["seed"]))


def save_best(args, run, class_names, prompts):
    """classifier/: the chosen network in its library's own format"""
    row, k, chosen = best_classifier(args, run)
    net = Net(args.classifier, prompts)
    net.load_state_dict(load_tensors(run_folder(run, row, k, chosen["seed"]) / "weights.safetensors"))
    about = dict(class_names=class_names, prompts=prompts, row=row, copies=k, seed=chosen["seed"])
    net.save(run.path("classifier"), about)


# ---------------------------------------------------------------------------------------------
# [7] evaluate: load the saved classifier from its folder, score it, write the table and the report. A row's figure is
# the test score at the epoch that validation chose (else the last), mean and deviation over seeds; officially it is the
# best of all test scores, which stands beside it. Near-copies: copies with nearly the perceptual hash of a real image.
# Reads classifier/, images/; writes results.json, samples.png, report.html.

ROW_NAMES = {
    "zero-shot": "CLIP zero-shot, no training", "real": "real only", "real-repeated": "real only, as many updates",
    "sd": "real + plain img2img (SD)", "rho0": "real + random shift, no gradient (rho = 0)",
    "direct": "real + direct guidance", "distdiff": "real + DistDiff",
}  # fmt: skip


def evaluate_saved(args, run, dist, real, test):
    """Top-1 of classifier/ on the test split, as a user would load it, and of all rows."""
    with run.timed("evaluate"):
        drawn = {
            folder: copies_of(args, run, folder, real).images() for folder in run.manifest("expand").get("images", {})
        }
        near = near_copies(run, drawn, real, test, args.workers, dist)
        if dist.main:
            net = Net.load(run.path("classifier")).to(dist.device, memory_format=torch.channels_last)
            logits = predict(args, net, test, dist.device)
            accuracy, (row, k, chosen) = top1(logits, test.labels), best_classifier(args, run)
            compare_saved(run, accuracy, chosen["test"], len(test))
            write_table(args, run, real, test, logits.argmax(1), dict(row=row, copies=k, top1=accuracy), near)
        distributed.barrier(dist)
    run.done("evaluate", run.under(*runs.RESULTS))


def write_table(args, run, real, test, predicted, saved, near):
    """results.json, the table, the contact sheet and the report. saved: row, copies and top-1 of classifier/"""
    table, metrics, class_names = [], {}, real.class_names
    for row, k in [(r, k) for r in args.rows for k in (args.clf_copies if r in GENERATED else (0,))]:
        found = finished(args, run, row, k)
        line = [ROW_NAMES.get(row, f"real only, as many updates, {row}"), k or "", spread([m["test"] for m in found])]
        mean = means(found, "last_epoch_test", "test_selected", "images", "updates")
        for key in ("last_epoch_test", "test_selected", "images", "updates"):
            line.append("" if key not in mean else f"{mean[key]:.1f}" if "test" in key else int(mean[key]))
        table.append(line)
        if found:
            metrics[f"{row}@{k}" if k else row] = over_seeds([m["test"] for m in found])
            metrics[f"{row}@{k}" if k else row] |= {key: found[0][key] for key in ("images", "updates")}
    saved["per_class"] = per_class(predicted, torch.as_tensor(test.labels), class_names)
    guide = {} if "guide" in needless(args) else read_json(run.path("guide", "metrics.json"))
    probed = run.path("energy.json").exists()
    fell = read_json(run.path("energy.json"))["percent_fell"] if probed and "distdiff" in args.rows else None
    ours = {name: line for name, line in metrics.items() if name.split("@")[0] in ("distdiff", "direct")}
    about_guide = {key: guide[key] for key in ("test", "val", "last_epoch_test", "test_selected") if guide}
    run.results(
        paper="arXiv:2403.06741",
        metrics=ours | {"saved_classifier": saved, "guide": about_guide, "energy_fell_percent": fell},
        baselines={name: line for name, line in metrics.items() if name not in ours},
        images=run.manifest("expand").get("images", {}),
        near_copies=near,
    )

    contact_sheet(args, run, real, class_names)
    selected = f"best of {args.clf_evals} test scores (officially of every epoch's)"
    header = ("training set", "k", "test top-1", "last epoch", selected, "images", "updates")
    summary, pictures = f"{args.dataset}, {len(real)} real images", {"A real image of each class": "samples.png"}
    if guide:
        summary += f", {args.gen_copies} generated for each, guide {args.guide} ({guide['test']:.1f} on the test split)"
        pictures = {"A real image of each class and copies of it": "samples.png"}
        pictures["The real image nearest to each prototype"] = "prototypes.png"
    summary += f"; the gradient step lowered the energy of {fell['free']:.0f} % of the probed images" if fell else ""
    tables = {"Top-1 on the test split": (header, table)}
    conclude(run, f"DistDiff on {args.dataset}", summary, tables, test.labels, predicted, class_names, pictures)


def contact_sheet(args, run, real, class_names):
    """samples.png: a real image of each class and three copies of it in each row, with the same noise in all rows"""
    first = [int(real.of_class(c)[0]) for c in range(len(class_names))]
    rows = {"real": [partial(real.open, i) for i in first]}
    for row in (row for row in ("sd", "rho0", "direct", "distdiff") if row in args.rows):
        copies = copies_of(args, run, GENERATED[row], real)
        for j in range(min(3, args.gen_copies)):
            rows[f"{row} {j}"] = [partial(images.open_rgb, copies.file(i, j)) for i in first]
    size = min(max(args.gen_resolution, 64), 128)
    images.samples_grid(run.path("samples.png"), list(rows.values()), list(rows), class_names, size=size)


# ---------------------------------------------------------------------------------------------


def check_args(args):
    """What would otherwise fail, or silently do nothing, in the middle of a run, and no single flag's range can say."""
    check(args)
    steps = args.gen_steps - start_index(args.gen_strength, args.gen_steps)
    m, p, k, size, resize = args.gen_step_from_end, args.gen_period, args.gen_copies, args.clf_size, args.clf_resize
    late = f"--gen-step-from-end {m} must lie between --gen-period {p}"
    too_many = max(args.clf_copies, default=k + 1) > k
    no_place = args.gen_prompt is not None and args.gen_prompt.count("{}") != 1
    # Trap: the official code then draws plain img2img samples without a word.
    refuse(not p <= m <= steps, f"{late} and the {steps} steps that --gen-strength {args.gen_strength} leaves")
    refuse(too_many, f"--clf-copies {args.clf_copies}: each must lie in 1..{k} (--gen-copies)")
    refuse(size > resize, f"--clf-size {size} is larger than --clf-resize {resize}")
    refuse(not set(args.rows) - {"zero-shot"}, "--rows: name at least one row that is trained")
    refuse(no_place, f"--gen-prompt {args.gen_prompt!r} needs one {{}} for the class name")
    take_off(args, needless(args), "--rows")


def needless(args):
    """Stages that no row needs: where every row is of real images nothing is drawn, and nothing guides it."""
    return () if set(GENERATED) & set(args.rows) else ("guide", "prototypes", "encode", "expand")


def planned_models(args):
    """Every model that a stage will load, looked through before the first one -> {flag: what to load}"""
    stages = set(args.stages)
    wanted = [("--sd-model", args.sd_model, "generator")] * bool({"encode", "expand"} & stages)
    for flag, name, pretrained, readers in (
        ("--guide", args.guide, args.guide_pretrained, {"guide", "prototypes", "expand"}),
        ("--classifier", args.classifier, args.classifier_pretrained, {"train"}),
    ):
        kind = "clip" if name.startswith("clip:") else "timm" if pretrained else "network"
        wanted += [(flag, name.removeprefix("clip:"), kind)] * bool(readers & stages)
    wanted += [("--zeroshot-clip", args.zeroshot_clip, "clip")] * ("zero-shot" in args.rows and "train" in stages)
    found = models.check_models(wanted)
    if "--sd-model" in found:
        models.check_generator(args.sd_model, found["--sd-model"], ("--gen-resolution", args.gen_resolution))
    check_networks(args, found)
    return found


def check_networks(args, found):
    """A network that cannot be trained at this size would end a run after its guide, or after days of drawing."""
    size, batch = args.clf_size, min(2, args.sgd_batch)
    for flag, name in ((f, n) for f, n in (("--guide", args.guide), ("--classifier", args.classifier)) if f in found):
        tower = openclip.image_tower(found[flag]) if name.startswith("clip:") else None
        make = partial(timm.create_model, name, num_classes=2) if tower is None else tower.train
        check_network(f"{flag} {name} --clf-size {size} --sgd-batch {args.sgd_batch}", make, size, batch)


NEEDS = dict(prototypes="guide", encode="select", expand="prototypes encode", train="expand", evaluate="train")
# Flags that no stage before this one reads: they may change while it has not begun.
LATER = {
    "guide": "guide guide_ sgd_",
    "train": "clf_copies clf_seeds clf_epochs clf_equal_k clf_transform sgd_lr classifier classifier_pretrained "
    "zeroshot_clip",
}


def plan(args):
    rows = [row for row in GENERATED if row in args.rows]
    return planned.plan(args, rows, classifiers_to_train(args), start_index, sets_in_epoch)


def main(args):
    check_args(args)
    if args.plan:
        return print_plan(*plan(args), args)
    dist = distributed.setup_distributed(args.device, args.deterministic)
    found = planned_models(args)  # before the data: a wrong name is told before anything large is fetched
    data = distributed.on_rank_0(partial(load_real, args), dist)
    names, test = data.class_names, data.test
    distributed.say(dist, data.note)
    real, val = distributed.on_rank_0(partial(choose_images, args, data), dist)
    prompts = prompts_of_classes(args, names)
    guide_weights = found.get("--guide") if args.guide_pretrained else None
    weights = found.get("--classifier") if args.classifier_pretrained else None
    ids = models.fingerprints(found)

    free, read = ["gen_micro_batch", "grad_checkpoint"], dict(real=real, validation=val, test=test)
    run = runs.open_run("distdiff", args, dist, free, models=ids, later=LATER, pictures=read)
    todo = [stage for stage in args.stages if run.todo(stage)]
    select(run, dist, real, val)
    check_order(run, todo, NEEDS, needless(args))
    if "guide" in todo:
        train_guide(args, run, dist, real, val, test, prompts, guide_weights)
    if "prototypes" in todo:
        make_prototypes(args, run, dist, real, names, prompts)
    pipe = cache(partial(generator_of, args, found.get("--sd-model"), dist.device))  # loaded by the first that asks
    if "encode" in todo:
        encode(args, run, dist, pipe(), real)
    if "expand" in todo:
        expand(args, run, dist, pipe(), real, prompts)
    pipe.cache_clear()  # the classifiers get its memory
    if "train" in todo:
        train(args, run, dist, real, val, test, names, prompts, weights)
    if "evaluate" in todo:
        evaluate_saved(args, run, dist, real, test)
    distributed.cleanup(dist)


if __name__ == "__main__":
    start(main, ARGS)
