"""Datasets: a name -> class names in label order, and RGB images that are opened when they are asked for.

    data = load_dataset("pets", "data", split_file="split_zhou_OxfordPets.json")
    shots = data.train.subset(few_shot(data.train, data.name, shots=16, seed=0, class_count=37))
    shots[0], data.class_names[shots.labels[0]]  # a PIL image, "Abyssinian"

`digits` is built in; `folder` is anyone's own DIR/train/<class>/* and DIR/test/<class>/*; torchvision reads the
others below `data_dir` (default: data) and downloads them there if their address is still alive. Class names are
spelt as in DataDream's lists; prompts and other spellings belong to the scripts. Every random choice is a function
of its seed, the same on every machine.
"""

import contextlib
import csv
import difflib
import fcntl
import functools
import json
import os
import random
import re
import socket
import urllib.error
import urllib.request
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.run import UserError, class_folders

IMAGE_SUFFIXES = set(".jpg .jpeg .jpe .jfif .png .bmp .gif .webp .tif .tiff .ppm .pgm".split())
PROBE_SECONDS = 8  # to reach a server before a download
STALL_SECONDS = 60  # without a byte during a download

# ---------------------------------------------------------------------------------------------
# What there is: class of torchvision.datasets, folder below data_dir, address, {our split: its arguments}.


@dataclass(frozen=True)
class Source:
    loader: str
    folder: str
    url: str  # "" where it is dead
    splits: dict  # {"all": {}} where there is no official split


def _by_split(**names):
    return {ours: {"split": theirs} for ours, theirs in names.items()}


_BINARY = {"train": {"train": True}, "test": {"train": False}}
_TWO, _PETS = _by_split(train="train", test="test"), _by_split(train="trainval", test="test")
_THREE = _by_split(train="train", val="val", test="test")
_KRIZ, _VGG = "https://www.cs.toronto.edu/~kriz", "https://www.robots.ox.ac.uk/~vgg/data"
_STL = "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/train-images-idx3-ubyte.gz"
_CALTECH = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"
_EUROSAT = "https://huggingface.co/datasets/torchgeo/eurosat/resolve/main/EuroSAT.zip"
_AIRCRAFT = f"{_VGG}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"
_FOOD = "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"
_NETTE = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"
IN_MEMORY = {
    "cifar10": Source("CIFAR10", "cifar-10-batches-py", f"{_KRIZ}/cifar-10-python.tar.gz", _BINARY),
    "cifar100": Source("CIFAR100", "cifar-100-python", f"{_KRIZ}/cifar-100-python.tar.gz", _BINARY),
    "stl10": Source("STL10", "stl10_binary", _STL, _TWO),
    "fashionmnist": Source("FashionMNIST", "FashionMNIST/raw", _FASHION, _BINARY),
}
ON_DISK = {
    "caltech101": Source("Caltech101", "caltech101/101_ObjectCategories", _CALTECH, {"all": {}}),
    "dtd": Source("DTD", "dtd/dtd/images", f"{_VGG}/dtd/download/dtd-r1.0.1.tar.gz", _THREE),
    "eurosat": Source("EuroSAT", "eurosat/2750", _EUROSAT, {"all": {}}),
    "fgvc_aircraft": Source("FGVCAircraft", "fgvc-aircraft-2013b/data/images", _AIRCRAFT, _THREE),
    "flowers102": Source("Flowers102", "flowers-102/jpg", f"{_VGG}/flowers/102/102flowers.tgz", _THREE),
    "food101": Source("Food101", "food-101/images", _FOOD, _TWO),
    "pets": Source("OxfordIIITPet", "oxford-iiit-pet/images", f"{_VGG}/pets/data/images.tar.gz", _PETS),
    "cars": Source("StanfordCars", "stanford_cars", "", _TWO),
    "sun397": Source("SUN397", "SUN397", "", {"all": {}}),
}
IMAGENETTE = Source("Imagenette", "imagenette2-320", _NETTE, {})  # of fast.ai, where ImageNet itself is not there
BY_HAND = {
    "imagenette": "unpack {url} so that {folder} exists, or give the folder of ILSVRC2012 (train/<wnid>/, val/<wnid>/)",
    "fashionmnist": "put that file and the three beside it, unpacked, into {folder} ({url})",
    "flowers102": "unpack {url} so that {folder} exists, and put imagelabels.mat and setid.mat beside jpg",
    "pets": "unpack {url} and annotations.tar.gz of that page so that {folder} and ../annotations exist",
    "cars": "its address is dead: put cars_train/, cars_test/, devkit/ (cars_meta.mat, cars_train_annos.mat) and "
    "cars_test_annos_withlabels.mat of a copy (the hub and Kaggle have some) into {folder}",
    "sun397": "its address is dead: put the unpacked SUN397.tar.gz of a copy (ClassName.txt and the folders a to z) "
    "into {folder}, with Training_01.txt and Testing_01.txt of its Partitions.zip if you have them",
}

# Positions among the 1000 ImageNet classes in the order of their WordNet ids; their order is the label order.
IMAGENET_SUBSETS = {
    "imagenet": list(range(1000)),
    "imagenet100": [
        int(i)
        for i in "15 45 54 57 64 74 90 99 119 120 122 131 137 151 155 157 158 166 167 169 176 180 209 211 222 228 "
        "234 236 242 246 267 268 272 275 277 281 299 305 313 317 331 342 368 374 407 421 431 449 452 455 479 494 "
        "498 503 508 544 560 570 592 593 599 606 608 619 620 653 659 662 665 667 674 682 703 708 717 724 748 758 "
        "765 766 772 775 796 798 830 854 857 858 872 876 882 904 908 936 938 953 959 960 993 994".split()
    ],
    "imagenette": [0, 217, 482, 491, 497, 566, 569, 571, 574, 701],
    "imagewoof": [155, 159, 162, 167, 182, 193, 207, 229, 258, 273],
}
DATASETS = ("digits", "folder", *IN_MEMORY, *ON_DISK, *IMAGENET_SUBSETS)
DIGITS = "zero one two three four five six seven eight nine".split()
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
EUROSAT = "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"


@dataclass
class Images:
    """Labelled images: images[i] -> PIL RGB, decoded at each access; len(images); subset; train + val.

    labels[i] in 0..C-1; keys[i] a name that is the same on every machine. Either `root` is set and root / keys[i]
    is the file, or `pixels` holds all images as uint8 [N, H, W] or [N, H, W, 3].
    """

    labels: list[int]
    keys: list[str]
    class_names: list[str]
    root: Path | None = None
    pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Image.Image:
        if self.pixels is None:
            return open_rgb(self.root / self.keys[index])
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def subset(self, indices) -> "Images":
        """The images at these positions, in this order."""
        indices = [int(i) for i in indices]
        labels, keys = [self.labels[i] for i in indices], [self.keys[i] for i in indices]
        pixels = None if self.pixels is None else self.pixels[indices]
        return Images(labels, keys, self.class_names, self.root, pixels)

    def __add__(self, other: "Images") -> "Images":
        """One after the other; ValueError if they are not splits of one dataset."""
        if self.root != other.root or self.class_names != other.class_names:
            raise ValueError("only splits of one dataset can be added")
        pixels = None if self.pixels is None else np.concatenate([self.pixels, other.pixels])
        labels, keys = self.labels + other.labels, self.keys + other.keys
        return Images(labels, keys, self.class_names, self.root, pixels)


@dataclass
class ImageDataset:
    """A dataset. val is None where it has no validation images (hold some out of train).

    note: one line for the user about the split and about files that were skipped, or "".
    """

    name: str
    class_names: list[str]
    train: Images
    val: Images | None
    test: Images
    note: str = ""


def load_dataset(name: str, data_dir=None, split_file=None, download: bool = True) -> ImageDataset:
    """One of DATASETS -> its class names and splits.

    split_file: CoOp's split_zhou_<Name>.json or DISEF's CSV with the columns split and filename, for the sets in
    ON_DISK; the order of the file is kept. Without it: the official split, in natural order of the paths;
    caltech101, eurosat (and sun397 without its partition files) have none, so each class is divided 50/20/30 as CoOp
    does, by a fixed draw of our own. ImageNet and its subsets are tested on the official validation images.
    UserError: unknown name; files missing and not to be had; a class without images; a split file that does not fit.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(str(name), DATASETS, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"unknown dataset '{name}'; choose one of {', '.join(DATASETS)}{hint}")
    if split_file and name not in ON_DISK:
        raise UserError(f"a split file has no meaning for '{name}', only for {', '.join(ON_DISK)}")
    if name == "folder" and not data_dir:
        raise UserError("dataset 'folder' needs a data folder DIR with DIR/train/<class>/* and DIR/test/<class>/*")
    root = Path(data_dir or "data").expanduser()
    if name == "digits":
        data = _digits()
    elif name == "folder":
        data = _folder(root)
    elif name in IMAGENET_SUBSETS:
        data = _imagenet(name, root, download)
    elif name in IN_MEMORY:
        data = _in_memory(name, root, download)
    else:
        data = _on_disk(name, root, split_file, download)
    for split, images in (("training", data.train), ("test", data.test)):
        empty = sorted(set(range(len(data.class_names))) - set(images.labels))
        if empty:
            names = _few([data.class_names[c] for c in empty])
            raise UserError(f"{name} in {root}: no {split} images of {len(empty)} classes ({names})")
    return data


# ---------------------------------------------------------------------------------------------
# Choosing images.


def natural_key(path) -> tuple:
    """Sort key under which a2 comes before a10: digit runs compare as integers, the rest as strings."""
    parts = re.split(r"(\d+)", str(path))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)


def few_shot(images: Images, dataset_name: str, shots: int, seed: int, class_count: int) -> list[int]:
    """Positions of `shots` images of each class, class by class, in natural order of their keys.

    random.Random(f"{dataset_name}-{seed}-{label}").sample draws max(16, shots) images (all, if the class has fewer)
    from the naturally sorted keys; the first `shots` of those in natural order are taken, so that 1 shot is part of
    2, of 4, of 8, of 16. UserError: a class has too few images.
    """
    chosen = []
    for label, members in enumerate(_by_class(images, class_count, shots)):
        rng = random.Random(f"{dataset_name}-{seed}-{label}")
        drawn = rng.sample(range(len(members)), min(max(16, shots), len(members)))
        chosen += [members[i] for i in sorted(drawn)[:shots]]
    return chosen


def few_shot_disef(images: Images, dataset_name: str, shots: int, seed: int, class_count: int) -> list[int]:
    """Positions of `shots` images of each class as DISEF draws them (with seeds 1, 5 and 10); not nested.

    One random.Random(seed) serves all classes, in order of first appearance in `images`: the order of a split file
    counts, dataset_name does not. UserError: a class has too few images.
    """
    _by_class(images, class_count, shots)
    members = {}
    for i, label in enumerate(images.labels):
        members.setdefault(label, []).append(i)
    rng = random.Random(seed)
    return [i for of_class in members.values() for i in rng.sample(of_class, shots)]


def hold_out(images: Images, amount: float, seed: int) -> tuple[Images, Images]:
    """Training images -> (rest, held), a validation split with the same share or number of each class.

    amount: below 1 the share of each class (rounded, at least one image), from 1 on the images per class. Drawn by
    random.Random(f"hold-out-{seed}-{label}").sample from the naturally sorted keys; both parts keep their order.
    UserError: a class would be left empty.
    """
    held = set()
    for label, members in enumerate(_by_class(images, len(images.class_names), 1)):
        count = max(1, round(amount * len(members))) if amount < 1 else int(amount)
        if amount <= 0 or count >= len(members):
            name, have = images.class_names[label], len(members)
            raise UserError(f"cannot hold out {amount:g} of the {have} training images of class '{name}'")
        held.update(random.Random(f"hold-out-{seed}-{label}").sample(members, count))
    return images.subset(i for i in range(len(images)) if i not in held), images.subset(sorted(held))


def _by_class(images, class_count, needed):
    """Positions of each class, >= needed of them, in natural order of their keys -> class_count lists."""
    if needed < 1:
        raise UserError(f"cannot choose {needed} images per class; ask for one or more")
    members = [[] for _ in range(class_count)]
    for i, label in enumerate(images.labels):
        members[label].append(i)
    for label, of_class in enumerate(members):
        of_class.sort(key=lambda i: natural_key(images.keys[i]))
        if len(of_class) < needed:
            name = images.class_names[label]
            raise UserError(f"class '{name}' has {len(of_class)} training images, fewer than the {needed} asked for")
    return members


# ---------------------------------------------------------------------------------------------
# Opening files: whatever a camera, a scanner or an archive left becomes 8-bit RGB, or an error with a name.

# A picture above Pillow's limit is refused in _check_size; as an error the warning does not print a line of its own.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def open_rgb(source) -> Image.Image:
    """Path or binary file -> PIL RGB: EXIF rotation applied, first frame, transparency on white, 16-bit grey / 257.

    UserError naming the file: missing, empty, truncated, no image, above Image.MAX_IMAGE_PIXELS, 32-bit pixels.
    """
    try:
        with Image.open(source) as image:
            _check_size(image)
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith(("I", "F")):
                values = np.asarray(image).astype(np.float64)
                if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                    raise ValueError("pixels of 32 bits have no known range, save it with 8 or 16")
                image = Image.fromarray((values / 257).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # the decoders of Pillow raise nearly everything
        name = source if isinstance(source, str | os.PathLike) else getattr(source, "name", "image")
        raise UserError(f"{name}: {_complaint(source, error)}; mend or remove it") from error


def verify(images: Images, limit: int | None = None) -> None:
    """Read every file once, in threads and at low resolution (at most `limit` of them, evenly spread), before work.

    One UserError names all bad files, one per line.
    """
    count = len(images) if limit is None else min(limit, len(images))
    keys = [images.keys[i * len(images) // count] for i in range(count)] if images.pixels is None else []

    def check(key):
        path = images.root / key
        try:
            with Image.open(path) as image:
                _check_size(image)
                image.draft("RGB", (1, 1))  # a JPEG is then read to its end but only an eighth of it computed
                image.load()
        except Exception as error:
            return f"\n  {key}: {_complaint(path, error)}"

    with ThreadPoolExecutor(8) as pool:
        bad = [line for line in pool.map(check, keys) if line]
    if bad:
        raise UserError(f"{len(bad)} of {count} images in {images.root} are bad; mend or remove{''.join(bad)}")


def _check_size(image):
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError


def _complaint(source, error) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels, too large to open"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        empty = isinstance(source, str | os.PathLike) and os.path.getsize(source) == 0
        return "an empty file" if empty else "not an image that Pillow can read"
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------------------------------------
# Folders of images.


def read_fewshot_folder(root, class_names: list[str]) -> Images:
    """ROOT/<class>/* (DataDream's real_train_fewshot/seed0) -> all images, class by class in natural order.

    A class folder has the class name verbatim ("F-16A/B" is B in F-16A) or as common.run.class_folders writes it.
    UserError: a class without folder or image; a folder that is no class.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; it should hold one folder per class, like '{class_names[0]}'")
    labels, keys = [], []
    for label, (name, slug) in enumerate(zip(class_names, class_folders(class_names), strict=True)):
        inside = all(part.strip() not in ("", ".", "..") for part in name.split("/"))
        folder = name if inside and os.path.isdir(root / name) else slug
        files = _image_files(root / folder)[0] if os.path.isdir(root / folder) else []
        if not files:
            raise UserError(f"{root}: no images of class '{name}', neither in a folder of that name nor in {slug}")
        labels += [label] * len(files)
        keys += [f"{folder}/{file}" for file in files]
    strangers = sorted(set(_folders(root)) - {key.split("/")[0] for key in keys})
    if strangers:
        raise UserError(f"{root}: {_few(strangers)} is the folder of no class; rename or remove it")
    return Images(labels, keys, list(class_names), root)


def _folders(path) -> list[str]:
    """Names of the visible folders in a folder, in natural order."""
    with os.scandir(path) as entries:
        return sorted((e.name for e in entries if e.is_dir() and e.name[0] != "."), key=natural_key)


def _image_files(path) -> tuple[list[str], Counter]:
    """Names of the images in one folder, in natural order, and how much else lies there, by kind."""
    names, others = [], Counter()
    with os.scandir(path) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in IMAGE_SUFFIXES and entry.name[0] != "." and not entry.is_dir():
                names.append(entry.name)
            else:
                kind = "hidden" if entry.name[0] == "." else "folder" if entry.is_dir() else suffix or "no suffix"
                others[kind] += 1
    return sorted(names, key=natural_key), others


def _read_tree(root, split, folders, class_names) -> tuple[Images, Counter]:
    """ROOT/SPLIT/<folders[label]>/* -> Images with keys below ROOT, and what was skipped, by kind."""
    labels, keys, skipped = [], [], Counter()
    for label, folder in enumerate(folders):
        place = root / split / folder
        files, others = _image_files(place) if place.is_dir() else ([], Counter())
        if "folder" in others:
            raise UserError(f"{place} holds folders; put the images themselves into it")
        if not files:
            raise UserError(f"{place}: no images of class '{class_names[label]}'")
        labels += [label] * len(files)
        keys += [f"{split}/{folder}/{file}" for file in files]
        skipped += others
    return Images(labels, keys, class_names, root), skipped


def _skipped(kinds) -> str:
    several = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"{sum(kinds.values())} files are no images and were skipped ({several})" if several else ""


def _few(names) -> str:
    return ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _folder(root) -> ImageDataset:
    """DIR/train/<class>/*, DIR/test/<class>/*, perhaps DIR/val (or valid), perhaps DIR/classes.json."""
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise UserError(
                f"{root / split}: no such folder; put training images into {root}/train/<class>/ and other images "
                f"into {root}/test/<class>/ (training images are never taken for testing)"
            )
    folders = _folders(root / "train")
    if len(folders) < 2:
        raise UserError(f"{root / 'train'}: {len(folders)} class folders; a classifier needs at least two")
    class_names = _human_names(root / "classes.json", folders)
    splits, skipped = {}, Counter()
    for split in (s for s in ("train", "val", "valid", "test") if (root / s).is_dir()):
        different = sorted(set(_folders(root / split)) ^ set(folders))
        if different:
            raise UserError(f"{root}: train and {split} differ in the class folders {_few(different)}")
        splits[split], others = _read_tree(root, split, folders, class_names)
        skipped += others + _image_files(root / split)[1]
    del skipped["folder"]  # the class folders themselves
    val = splits.get("val") or splits.get("valid")
    return ImageDataset("folder", class_names, splits["train"], val, splits["test"], _skipped(skipped))


def _human_names(file, folders) -> list[str]:
    """classes.json, {folder: human name} -> a name for each folder, its own where the file has none."""
    try:
        names = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(names, dict) or not all(isinstance(n, str) and n.strip() for n in names.values()):
        raise UserError(f'{file}: should be {{"folder": "human name", ...}}')
    unknown = sorted(set(names) - set(folders))
    if unknown:
        raise UserError(f"{file}: {_few(unknown)} is no class folder")
    human = [names.get(folder, folder) for folder in folders]
    twice = [name for name, count in Counter(human).items() if count > 1]
    if twice:
        raise UserError(f"{file}: two classes are called {_few(twice)}")
    return human


def _imagenet(name, root, download) -> ImageDataset:
    """The ILSVRC2012 images in train/<wnid>/ and val/<wnid>/: all classes or those of a subset."""
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    human, wnids = list(IMAGENET_CLASSNAMES), ImageNetInfo().label_names()
    human[744], human[837] = "projectile missile", "dark sunglasses"  # else their names occur twice
    folders, class_names = ([names[i] for i in IMAGENET_SUBSETS[name]] for names in (wnids, human))

    # Data of CoOp lies in imagenet/images, the challenge's in ILSVRC/Data/CLS-LOC, fast.ai's in imagenette2-320.
    places = ["", "imagenet", "images", "imagenet/images", "ILSVRC2012", "ILSVRC/Data/CLS-LOC"]
    places += [f"{name}2{size}" for size in ("", "-320", "-160")]
    base = next((root / place for place in places if (root / place / "train" / folders[0]).is_dir()), None)
    if base is None and name == "imagenette":
        _torchvision(name, IMAGENETTE, root, download, size="320px")
        base = root / IMAGENETTE.folder
    if base is None:
        raise UserError(
            f"{name}: no train/{folders[0]} in {root}; put the images of ILSVRC2012 there as train/<wnid>/*.JPEG "
            "and val/<wnid>/*.JPEG (torchvision.datasets.ImageNet(DIR, 'train') and 'val' unpack the tar files so)"
        )
    flat = [folder for folder in folders if not (base / "val" / folder).is_dir()]
    if flat:
        raise UserError(f"{base / 'val'}: no folders {_few(flat)}; sort the validation images into val/<wnid>/")
    (train, more), (test, others) = (_read_tree(base, split, folders, class_names) for split in ("train", "val"))
    note = f"tested on {base / 'val'}" + (", the split of fast.ai" if base.name.startswith(f"{name}2") else "")
    note = "; ".join(filter(None, [note, _skipped(more + others)]))
    return ImageDataset(name, class_names, train, None, test, note)


# ---------------------------------------------------------------------------------------------
# Sets held in memory as uint8.


def _digits() -> ImageDataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 enlarged to 32x32, white on black; train 1000, test 797."""
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits

    raw = load_digits()
    # In float64 the products of 16 grey levels and two bicubic weights (multiples of 1/2048) are exact, so these
    # bytes are the same on every machine.
    x = F.pad(torch.from_numpy(raw.images).double()[:, None] / 16, (1, 1, 1, 1))  # [1797, 1, 10, 10]
    x = F.interpolate(x, (40, 40), mode="bicubic", align_corners=False)[:, 0, 4:-4, 4:-4]  # [1797, 32, 32]
    pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8).numpy()

    # Fisher-Yates with the raw 32-bit numbers of a Mersenne Twister seeded with 0, a stream that numpy has frozen
    # (torch.randperm(1797) makes the same permutation of it, but does not promise to).
    order = list(range(len(pixels)))
    draws = np.random.RandomState(0).randint(0, 2**32, size=len(order) - 1, dtype=np.uint32)
    for i, draw in enumerate(draws.tolist()):
        j = i + draw % (len(order) - i)
        order[i], order[j] = order[j], order[i]
    keys = [f"digits/{i:04d}" for i in range(len(order))]
    images = Images(raw.target.tolist(), keys, list(DIGITS), pixels=pixels)
    train, test = images.subset(sorted(order[:1000])), images.subset(sorted(order[1000:]))
    return ImageDataset("digits", list(DIGITS), train, None, test, "fixed split of our own")


def _in_memory(name, root, download) -> ImageDataset:
    if name == "cifar10" and (root / "train").is_dir() and (root / "test").is_dir():
        train, test = (_read_tree(root, split, CIFAR10, CIFAR10)[0] for split in ("train", "test"))
        return ImageDataset(name, list(CIFAR10), train, None, test, f"image files in {root}, not the original arrays")
    splits = {}
    for split, arguments in IN_MEMORY[name].splits.items():
        data = _torchvision(name, IN_MEMORY[name], root, download, **arguments)
        pixels = np.asarray(data.data)
        if name == "stl10":
            pixels = pixels.transpose(0, 2, 3, 1)  # [N, 3, 96, 96] -> [N, 96, 96, 3]
        labels = np.asarray(data.labels if name == "stl10" else data.targets).tolist()
        keys = [f"{split}/{i:05d}" for i in range(len(labels))]
        splits[split] = Images(labels, keys, list(data.classes), pixels=pixels)
    return ImageDataset(name, list(data.classes), splits["train"], None, splits["test"], "official split")


# ---------------------------------------------------------------------------------------------
# Sets of files, listed by torchvision.


def _on_disk(name, root, split_file, download) -> ImageDataset:
    folder = root / ON_DISK[name].folder
    class_names, listed = _listing(name, root, download)
    labels = {key: label for pairs in listed.values() for key, label in pairs}  # key: path below the image folder
    keys = {split: sorted((key for key, _ in pairs), key=natural_key) for split, pairs in listed.items()}
    partition = {"train": folder / "Training_01.txt", "test": folder / "Testing_01.txt"}  # only SUN397 has such
    note = "official split"
    if split_file:
        keys, note = _read_split_file(Path(split_file), labels, name), f"split of {split_file}"
    elif "all" in keys and all(file.is_file() for file in partition.values()):
        keys = {split: [f.lstrip("/") for f in file.read_text().split()] for split, file in partition.items()}
    elif "all" in keys:
        keys, note = _divide(name, labels), "our own 50/20/30 division of each class"
    if not split_file and name != "fgvc_aircraft":
        note += ", not CoOp's, which needs its split file"

    there = set()
    for base, _, files in os.walk(folder):
        below = os.path.relpath(base, folder).replace(os.sep, "/")
        there.update(files if below == "." else (f"{below}/{file}" for file in files))
    lost = [key for of_split in keys.values() for key in of_split if key not in there or key not in labels]
    if lost:
        raise UserError(
            f"{name}: {len(lost)} images are missing in {folder} ({_few(lost)}); if a download was interrupted, "
            "delete what it left and run again"
        )
    splits = {s: Images([labels[key] for key in of], of, class_names, folder) for s, of in keys.items() if of}
    return ImageDataset(name, class_names, splits["train"], splits.get("val"), splits["test"], note)


def _listing(name, root, download) -> tuple[list[str], dict]:
    """Class names and {split: [(path below the image folder, label)]}; the split "all" if none is official."""
    source, folder = ON_DISK[name], root / ON_DISK[name].folder
    if name in ("caltech101", "eurosat"):
        if not folder.is_dir():
            _torchvision(name, source, root, download)
        folders = EUROSAT.split()
        if name == "caltech101":
            folders = sorted(set(_folders(folder)) - {"BACKGROUND_Google", "Faces_easy"})
            if len(folders) != 100:
                raise UserError(f"{folder}: {len(folders)} categories, not 100; delete what is there and run again")
        human = {"Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike", "airplanes": "airplane"}
        class_names = [human.get(category, category) for category in folders]
        images, _ = _read_tree(folder.parent, folder.name, folders, class_names)
        return class_names, {"all": [(k.split("/", 1)[1], c) for k, c in zip(images.keys, images.labels, strict=True)]}

    listed = {}
    for split, arguments in source.splits.items():
        data = _torchvision(name, source, root, download, **arguments)
        files = data._images if name == "pets" else [] if name == "cars" else data._image_files
        samples = data._samples if name == "cars" else zip(files, data._labels, strict=True)
        listed[split] = [(Path(path).relative_to(folder).as_posix(), int(label)) for path, label in samples]
    class_names = list(data.classes)
    if name == "flowers102":
        class_names[59], class_names[77] = "pink-yellow dahlia", "lotus lotus"
    if name == "sun397":  # apartment_building/outdoor -> outdoor apartment_building
        class_names = [" ".join(reversed(path.split("/"))) for path in class_names]
    return class_names, listed


def _divide(name, labels) -> dict[str, list[str]]:
    """{key: label} -> keys of train (50 %), val (20 %) and test (30 %), class by class: a function of name only."""
    members, splits = {}, {"train": [], "val": [], "test": []}
    for key in sorted(labels, key=natural_key):
        members.setdefault(labels[key], []).append(key)
    for label, keys in sorted(members.items()):
        keys = random.Random(f"{name}-split-{label}").sample(keys, len(keys))
        train, val = round(0.5 * len(keys)), round(0.7 * len(keys))
        for split, part in zip(splits, (keys[:train], keys[train:val], keys[val:]), strict=True):
            splits[split] += sorted(part, key=natural_key)
    return splits


def _read_split_file(file, labels, name) -> dict[str, list[str]]:
    """CoOp's JSON {split: [[path, label, class name], ...]} or DISEF's CSV split,filename -> keys in file order.

    A path may begin with folders that the keys do not have ("jpg/image_1.jpg" for "image_1.jpg").
    """
    keys, lost, wrong = {"train": [], "val": [], "test": []}, [], []
    try:
        if file.suffix.lower() == ".csv":
            with open(file, newline="", encoding="utf-8") as lines:
                rows = [(row["split"], row["filename"], None) for row in csv.DictReader(lines)]
        else:
            content = json.loads(file.read_text(encoding="utf-8"))
            rows = [(split, row[0], int(row[1])) for split in content for row in content[split]]
        for split, path, label in rows:
            parts = path.split("/")
            key = next((k for i in range(len(parts)) if (k := "/".join(parts[i:])) in labels), None)
            keys[split].append(key)
            if key is None:
                lost.append(path)
            elif label not in (None, labels[key]):
                wrong.append(f"{path}: {label}, not {labels[key]}")
    except OSError as error:
        raise UserError(f"split file {file}: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"split file {file}: neither a split_zhou_*.json nor a CSV with split,filename") from error
    twice = [key for key, count in Counter(k for of in keys.values() for k in of).items() if count > 1]
    faults = {
        f"paths are no image of {name}": lost,
        f"labels are not those of {name}": wrong,
        "images occur twice": twice,
    }
    for fault, names in faults.items():
        if names:
            raise UserError(f"split file {file}: {len(names)} of {len(rows)} {fault} ({_few(names)})")
    if not keys["train"] or not keys["test"]:
        raise UserError(f"split file {file}: no training images or no test images")
    return keys


# ---------------------------------------------------------------------------------------------
# Downloads.


def _torchvision(name, source, root, download, **arguments):
    """The torchvision dataset, downloaded if it is not there; UserError with what to do if that fails."""
    import torchvision.datasets

    make = functools.partial(getattr(torchvision.datasets, source.loader), root, **arguments)
    folder, lock, state = root / source.folder, root / ".download.lock", "not found"
    by_hand = BY_HAND.get(name, "unpack {url} so that {folder} exists").format(url=source.url, folder=folder)
    if folder.exists():
        with _locked(lock) if lock.exists() else contextlib.nullcontext():  # another process may be unpacking
            try:
                return make(download=False)
            except Exception as error:
                state = f"incomplete ({' '.join(str(error).split())})"
    if not source.url or not download:
        raise UserError(f"{name}: {folder} {state}; {by_hand}")
    try:
        request = urllib.request.Request(source.url, headers={"User-Agent": "cleansynth"})
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # the server is there; torchvision will find whether the file is
    except Exception as error:
        why = getattr(error, "reason", error)
        raise UserError(f"{name}: {folder} {state} and its server out of reach ({why}); {by_hand}") from error

    before = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(lock):  # one process downloads; the others wait, and find it done
            socket.setdefaulttimeout(STALL_SECONDS)
            return make(download=True)
    except Exception as error:
        why = " ".join(str(error).split())
        raise UserError(f"{name}: download failed ({why}); delete what it left in {root}, or {by_hand}") from error
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _locked(file):
    handle = os.open(file, os.O_RDONLY | os.O_CREAT, 0o644)  # read-only: a shared data folder may be so
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
