"""Datasets: a name -> class names in label order, and RGB images that are opened when they are asked for.

    data = load_dataset("pets", "data", split_file="split_zhou_OxfordPets.json")
    shots = data.train.subset(few_shot(data.train, data.name, shots=16, seed=0, class_count=37))
    shots[0], data.class_names[shots.labels[0]]  # a PIL image, "Abyssinian"

`digits` is built in; `folder` is anyone's own DIR/train/<class>/* and DIR/test/<class>/*; the others are read below
`data_dir` (default: data) and downloaded there if their address is still alive. Class names are spelt as in DataDream's
lists; prompts and other spellings belong to the scripts. Every random choice is a function of its seed, the same on
every machine. A list of a million images is a few arrays, so it is made and sent to other processes in seconds.
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
import stat
import unicodedata
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.files import chunks, class_folders, load_tensors, read_json, save_tensors, tensors_metadata
from common.images import IMAGE_SUFFIXES, image_size, open_rgb, shown, verify  # noqa: F401
from common.launch import UserError
from common.names import Given

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
    "imagewoof": [193, 182, 258, 162, 155, 167, 159, 273, 207, 229],  # as in the released code of Real-Fake
}
MEDMNIST = {  # of 28 x 28 pixels: MD5 of <name>.npz, classes in label order
    "pathmnist": "a8b06965200029087d5bd730944a56c1 adipose, background, debris, lymphocytes, mucus, smooth muscle, "
    "normal colon mucosa, cancer-associated stroma, colorectal adenocarcinoma epithelium",
    "bloodmnist": "7053d0359d879ad8a5505303e11de1dc basophil, eosinophil, erythroblast, immature granulocyte, "
    "lymphocyte, monocyte, neutrophil, platelet",
    "breastmnist": "750601b1f35ba3300ea97c75c52ff8f6 malignant, normal or benign",
    "dermamnist": "0744692d530f8e62ec473284d019b0c7 actinic keratoses, basal cell carcinoma, benign keratosis, "
    "dermatofibroma, melanoma, melanocytic nevi, vascular lesions",
}
MEDMNIST_URL = "https://zenodo.org/records/10519652/files"
DATASETS = ("digits", "folder", "cinic10", *IN_MEMORY, *MEDMNIST, *ON_DISK, *IMAGENET_SUBSETS)
DIGITS = "zero one two three four five six seven eight nine".split()
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
EUROSAT = "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"

# Classes, training, validation and test images, for a plan without the files. The sets that CoOp divided are counted as
# in its split files; ImageNet-100 is a round number.
SIZES = {
    "digits": (10, 1_000, 0, 797), "cifar10": (10, 50_000, 0, 10_000), "cifar100": (100, 50_000, 0, 10_000),
    "cinic10": (10, 90_000, 90_000, 90_000), "stl10": (10, 5_000, 0, 8_000), "fashionmnist": (10, 60_000, 0, 10_000),
    "pathmnist": (9, 89_996, 10_004, 7_180), "bloodmnist": (8, 11_959, 1_712, 3_421),
    "breastmnist": (2, 546, 78, 156), "dermamnist": (7, 7_007, 1_003, 2_005),
    "caltech101": (100, 4_128, 1_649, 2_465), "dtd": (47, 2_820, 1_128, 1_692), "eurosat": (10, 13_500, 5_400, 8_100),
    "fgvc_aircraft": (100, 3_334, 3_333, 3_333), "flowers102": (102, 4_093, 1_633, 2_463),
    "food101": (101, 50_500, 20_200, 30_300), "pets": (37, 2_944, 736, 3_669), "cars": (196, 6_509, 1_635, 8_041),
    "sun397": (397, 15_880, 3_970, 19_850),
    "imagenet": (1000, 1_281_167, 0, 50_000), "imagenet100": (100, 127_000, 0, 5_000),
    "imagenette": (10, 12_894, 0, 500), "imagewoof": (10, 12_454, 0, 500),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Lists of images.


class Keys(Sequence):
    """The names of N images as one run of bytes and N + 1 offsets: keys[i] -> str. Other bytes than UTF-8 survive."""

    def __init__(self, names: Iterable[str] = ()):
        names = list(names)
        self.blob = "".join(names).encode(errors="surrogateescape")
        sizes = names if self.blob.isascii() else [name.encode(errors="surrogateescape") for name in names]
        self.ends = np.zeros(len(names) + 1, dtype=np.int64)  # name i is blob[ends[i] : ends[i + 1]]
        np.cumsum([len(name) for name in sizes], out=self.ends[1:])

    @classmethod
    def _of(cls, parts: Iterable[bytes], sizes: np.ndarray) -> "Keys":
        keys = cls()
        keys.blob, keys.ends = b"".join(parts), np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        return keys

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __iter__(self) -> Iterator[str]:
        ends = self.ends.tolist()
        return (self.blob[a:b].decode(errors="surrogateescape") for a, b in zip(ends, ends[1:], strict=False))

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]
        return self.blob[self.ends[i] : self.ends[i + 1]].decode(errors="surrogateescape")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Keys):
            return self.blob == other.blob and np.array_equal(self.ends, other.ends)
        return self.tolist() == list(other) if isinstance(other, Sequence) else NotImplemented

    def __repr__(self) -> str:
        return f"<Keys: {len(self)} names>"

    def __add__(self, other: "Keys") -> "Keys":
        return Keys.joined([self, other])

    @classmethod
    def joined(cls, parts: "Sequence[Keys]") -> "Keys":
        """One after the other."""
        return cls._of([keys.blob for keys in parts], np.concatenate([np.diff(keys.ends) for keys in parts]))

    def tolist(self) -> list[str]:
        """The names as strings, as JSON takes them."""
        return list(self)

    def take(self, rows: np.ndarray) -> "Keys":
        """The names at these positions."""
        starts, stops = self.ends[rows], self.ends[rows + 1]
        parts = (self.blob[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True))
        return Keys._of(parts, stops - starts)


class _Labelled:
    """What all lists of labelled images have: labels, int64 [N] in 0..C-1, and [row] -> PIL RGB, decoded then."""

    labels: np.ndarray
    class_names: list[str]
    _rows: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> Image.Image:
        return self.open(row)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_rows": None}  # other processes can group the rows themselves

    def of_class(self, c: int) -> np.ndarray:
        """Rows of one class, ascending."""
        if self._rows is None:
            counts = np.bincount(self.labels, minlength=len(self.class_names))
            self._rows = np.split(np.argsort(self.labels, kind="stable"), np.cumsum(counts)[:-1])
        return self._rows[c]


class Images(_Labelled):
    """Labelled images; len(images); subset; train + val.

    keys[i]: a name that is the same on every machine. Either `root` is set and root / keys[i] is the file, or `pixels`
    holds all images as uint8 [N, H, W] or [N, H, W, 3].
    """

    def __init__(
        self,
        labels: Any,
        keys: Keys | Iterable[str],
        class_names: list[str],
        root: Path | None = None,
        pixels: np.ndarray | None = None,
    ):
        self.labels = np.asarray(labels, dtype=np.int64)
        self.keys = keys if isinstance(keys, Keys) else Keys(keys)
        self.class_names, self.root, self.pixels = class_names, root, pixels

    def path(self, row: int) -> str:
        """The file of an image."""
        return os.path.join(self.root, self.keys[row])

    def open(self, row: int, shorter: int | None = None) -> Image.Image:
        """shorter: pixels needed on the shorter side; see common.images.open_rgb."""
        if self.pixels is None:
            return open_rgb(self.path(row), shorter)
        return Image.fromarray(self.pixels[row]).convert("RGB")

    def size(self, row: int) -> tuple[int, int]:
        """Width and height; reads a file's header only."""
        return image_size(self.path(row)) if self.pixels is None else self.pixels.shape[2:0:-1]

    def subset(self, rows: Iterable[int]) -> "Images":
        """The images at these positions, in this order."""
        rows = rows if isinstance(rows, np.ndarray) else np.array(list(rows), dtype=np.int64)
        rows = np.arange(len(self))[rows]  # checks the range; from here on nothing counts from the end
        pixels = None if self.pixels is None else self.pixels[rows]
        return Images(self.labels[rows], self.keys.take(rows), self.class_names, self.root, pixels)

    def __add__(self, other: "Images") -> "Images":
        """One after the other; ValueError if they are not splits of one dataset."""
        if self.root != other.root or self.class_names != other.class_names:
            raise ValueError("only splits of one dataset can be added")
        pixels = None if self.pixels is None else np.concatenate([self.pixels, other.pixels])
        labels = np.concatenate([self.labels, other.labels])
        return Images(labels, self.keys + other.keys, self.class_names, self.root, pixels)


class Generated(_Labelled):
    """Images that a run draws: root / <class folder> / <k><suffix>, class by class. By formula, nothing is listed.

    per_class: images of every class, or C numbers. It may be smaller than what was drawn: the first images count.
    """

    def __init__(self, root: Path, class_names: list[str], per_class: int | Sequence[int], suffix: str = ".png"):
        self.root, self.class_names, self.suffix = root, class_names, suffix
        self.folders = class_folders(class_names)
        counts = np.broadcast_to(per_class, len(class_names))
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.labels = np.repeat(np.arange(len(class_names), dtype=np.int64), counts)

    def key(self, row: int) -> str:
        """The name of an image below root."""
        c = self.labels[row]
        return f"{self.folders[c]}/{row - self.starts[c]}{self.suffix}"

    def open(self, row: int, shorter: int | None = None) -> Image.Image:
        """As Images.open."""
        return open_rgb(os.path.join(self.root, self.key(row)), shorter)

    def of_class(self, c: int) -> np.ndarray:
        """Rows of one class, ascending."""
        return np.arange(self.starts[c], self.starts[c + 1])


class Concat(_Labelled):
    """Several lists one after the other; the same list may stand there more than once."""

    def __init__(self, sources: Sequence[_Labelled]):
        self.sources, self.class_names = list(sources), sources[0].class_names
        self.labels = np.concatenate([source.labels for source in sources])
        self.starts = np.cumsum([0, *(len(source) for source in sources)])

    def source_of(self, row: int) -> int:
        """Which of the sources a row belongs to."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def open(self, row: int, shorter: int | None = None) -> Image.Image:
        """As Images.open."""
        source = self.source_of(row)
        return self.sources[source].open(row - int(self.starts[source]), shorter)


@dataclass
class ImageDataset:
    """A dataset. val is None where it has no validation images (hold some out of train).

    train is None only if load_dataset was told that it is not needed. note: one line for the user about the split and
    about files that were skipped, or "".
    """

    name: str
    class_names: list[str]
    train: Images | None
    val: Images | None
    test: Images
    note: str = ""


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    split_file: str | Path | None = None,
    download: bool = True,
    train_needed: bool = True,
) -> ImageDataset:
    """One of DATASETS -> its class names and splits. With several processes: distributed.on_rank_0 lists once.

    split_file: CoOp's split_zhou_<Name>.json or DISEF's CSV with the columns split and filename, for the sets in
    ON_DISK; the order of the file is kept. Without it: the official split, in natural order of the paths;
    caltech101, eurosat (and sun397 without its partition files) have none, so each class is divided 50/20/30 as CoOp
    does, by a fixed draw of our own. ImageNet and its subsets are tested on the official validation images.
    train_needed=False: the shots come from elsewhere; train and val are None where their files are not all there.
    UserError: unknown name; files missing and not to be had; a class without images; a split file that does not fit.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(str(name), DATASETS, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"unknown dataset '{shown(name)}'; choose one of {', '.join(DATASETS)}{hint}")
    if split_file and name not in ON_DISK:
        raise UserError(f"a split file has no meaning for '{name}', only for {', '.join(ON_DISK)}")
    if name == "folder" and not data_dir:
        raise UserError("dataset 'folder' needs a data folder DIR with DIR/train/<class>/* and DIR/test/<class>/*")
    root = Path(os.path.expanduser(data_dir or "data"))
    if os.path.lexists(root) and not os.path.isdir(root):
        raise UserError(f"{shown(root)}: not a folder; data are looked for in a folder")
    if name == "digits":
        data = _digits()
    elif name == "folder":
        data = _folder(root, train_needed)
    elif name == "cinic10":
        data = _cinic10(root, train_needed)
    elif name in IMAGENET_SUBSETS:
        data = _imagenet(name, root, download, train_needed)
    elif name in IN_MEMORY:
        data = _in_memory(name, root, download)
    elif name in MEDMNIST:
        data = _medmnist(name, root, download)
    else:
        data = _on_disk(name, root, split_file, download, train_needed)
    for split, images in (("training", data.train), ("test", data.test)):
        empty = set(range(len(data.class_names))) - set(images.labels.tolist()) if images else ()
        if empty:
            names = _few([data.class_names[c] for c in sorted(empty)])
            raise UserError(f"{name} in {shown(root)}: no {split} images of {len(empty)} classes ({names})")
    return data


# ---------------------------------------------------------------------------------------------
# Choosing images.


def natural_key(path: Any) -> tuple:
    """Sort key under which a2 comes before a10: digit runs compare as integers, the rest as strings."""
    parts = re.split(r"(\d+)", str(path))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)


def natural_order(names: Sequence[str]) -> list[int]:
    """Positions of the names in the order of natural_key."""
    if not names:
        return []
    head = os.path.commonprefix([min(names), max(names)]).rstrip("0123456789")
    tail = names[0][names[0].rfind(".") :]
    middle = [name[len(head) : -len(tail)] for name in names if name.endswith(tail)]
    if head.isascii() and len(middle) == len(names) and all(part.isascii() and part.isdecimal() for part in middle):
        # The usual case, <word><number>.jpg, ten times as fast: 1.3 million names take a second.
        return sorted(range(len(names)), key=lambda i: (int(middle[i]), names[i]))
    return sorted(range(len(names)), key=lambda i: natural_key(names[i]))


def in_order(images: Images) -> Images:
    """The same images class by class, in natural order of their names: seeds, splits and file numbers depend on it."""
    rows = np.argsort(images.labels, kind="stable").tolist()
    ends = np.cumsum(np.bincount(images.labels, minlength=len(images.class_names))).tolist()
    of_class = [rows[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    names = ([images.keys[i] for i in some] for some in of_class)
    return images.subset([
        some[j] for some, keys in zip(of_class, names, strict=True) for j in natural_order(keys)
    ])  # fmt: skip


def few_shot(
    images: Images, dataset_name: str, shots: int, seed: int, class_count: int, held: Images | None = None,
    flag: str = "",
) -> list[int]:  # fmt: skip
    """Positions of `shots` images of each class, class by class, in natural order of their keys.

    random.Random(f"{dataset_name}-{seed}-{label}").sample draws max(16, shots) images (all, if the class has fewer)
    from the naturally sorted keys; the first `shots` of those in natural order are taken, so that 1 shot is part of
    2, of 4, of 8, of 16. held, flag: what was held out before and the flag that said how much, for the message.
    UserError: a class has too few images.
    """
    chosen = []
    for label, members in enumerate(_by_class(images, class_count, shots, held, flag)):
        rng = random.Random(f"{dataset_name}-{seed}-{label}")
        drawn = rng.sample(range(len(members)), min(max(16, shots), len(members)))
        chosen += [members[i] for i in sorted(drawn)[:shots]]
    return chosen


def few_shot_disef(
    images: Images, dataset_name: str, shots: int, seed: int, class_count: int, held: Images | None = None,
    flag: str = "",
) -> list[int]:  # fmt: skip
    """Positions of `shots` images of each class as DISEF draws them (with seeds 1, 5 and 10); not nested.

    One random.Random(seed) serves all classes, in order of first appearance in `images`: the order of a split file
    counts, dataset_name does not. held, flag, UserError: as few_shot.
    """
    _by_class(images, class_count, shots, held, flag)
    rng = random.Random(seed)
    appearing = images.labels[np.sort(np.unique(images.labels, return_index=True)[1])]
    return [row for label in appearing for row in rng.sample(images.of_class(label).tolist(), shots)]


def hold_out(images: Images, amount: float, seed: int) -> tuple[Images, Images]:
    """Training images -> (rest, held), a validation split with the same share or number of each class.

    amount: below 1 the share of each class (rounded, at least one image), from 1 on the images per class. Drawn by
    random.Random(f"hold-out-{seed}-{label}").sample from the naturally sorted keys; both parts keep their order.
    UserError: a class would be left empty.
    """
    held = np.zeros(len(images), dtype=bool)
    for label, members in enumerate(_by_class(images, len(images.class_names), 1)):
        count = max(1, round(amount * len(members))) if amount < 1 else int(amount)
        if amount <= 0 or count >= len(members):
            name, have = images.class_names[label], len(members)
            raise UserError(f"cannot hold out {amount:g} of the {have} training images of class '{shown(name)}'")
        held[random.Random(f"hold-out-{seed}-{label}").sample(members, count)] = True
    return images.subset(np.flatnonzero(~held)), images.subset(np.flatnonzero(held))


def _by_class(
    images: Images, class_count: int, needed: int, held: Images | None = None, flag: str = ""
) -> Iterator[list[int]]:
    """Positions of each class, >= needed of them, in natural order of their keys, class by class."""
    if needed < 1:
        raise UserError(f"cannot choose {needed} images per class; ask for one or more")
    members = [images.of_class(label) for label in range(class_count)]
    for label, of_class in enumerate(members):
        if len(of_class) < needed:
            kept = len(held.of_class(label)) if held else 0
            had = f"{kept + len(of_class)} training images" + f", of which {kept} are held out ({flag})" * bool(kept)
            raise UserError(f"class '{shown(images.class_names[label])}' has {had}, fewer than the {needed} asked for")
    return (rows[natural_order(images.keys.take(rows).tolist())].tolist() for rows in members)


# ---------------------------------------------------------------------------------------------
# The same picture twice, and another picture than before.


def duplicates(a: Images, b: Images) -> np.ndarray:
    """Rows of b, ascending, whose picture is in a too, whatever its name: files of equal bytes, or, where one of the
    two is in memory, equal RGB pixels. Of most files only size and last bytes are looked at."""
    rows_a, rows_b = np.arange(len(a)), np.arange(len(b))
    for look in (_size, _tail, _content) if a.pixels is None and b.pixels is None else (_pixels,):
        of_a, of_b = (_each(look, images, rows) for images, rows in ((a, rows_a), (b, rows_b)))
        rows_a, rows_b = rows_a[np.isin(of_a, of_b)], rows_b[np.isin(of_b, of_a)]
    return rows_b


def without(images: Images, other: Images) -> Images:
    """The images whose picture is not in the other list: ready-made shots shall not be in the validation split too."""
    return images.subset(np.delete(np.arange(len(images)), duplicates(other, images)))


def overlap(splits: dict[str, Images | None]) -> str:
    """One line for the user about pictures that are in two of these splits, or ""."""
    found, there = [], {name: images for name, images in splits.items() if images}
    for i, (name, images) in enumerate(there.items()):
        for earlier in list(there)[:i]:
            if len(rows := duplicates(there[earlier], images)):
                found.append(f"{len(rows)} of {name} are in {earlier} too ({_few(images.keys.take(rows))})")
    return f"the same pictures in two splits: {'; '.join(found)}" if found else ""


def unchanged(
    file: Path,
    class_names: list[str],
    splits: dict[str, Images | None],
    progress: Callable[[int], Any] | None = None,
    note: Callable[[], str] = str,
) -> str:
    """Hold a run to the images it began with: the first call writes their names, labels and hashes to file.

    Later calls hash again what has another size or time. progress: called with numbers of images done. note: what is
    to be said about the images, asked for in the first call; the result of every call. UserError: one line that says
    what has changed.
    """
    old = _record(file)
    before, said = json.loads(old.pop("about")) if old else (class_names, None)
    new, faults = {**old}, []
    if before != class_names:
        faults = [f"classes ({_few(sorted(set(before) ^ set(class_names)) or ['another order'])})"]
    for name, images in splits.items() if not faults else ():
        keys, rows = images.keys if images else Keys(), np.arange(len(images or ()))
        about = np.zeros((len(keys), 3), dtype=np.uint64)  # label, stamp, content
        begun = f"{name}.keys" in old  # a stage to come may read a split that none read before
        if begun:
            then = Keys._of([old[f"{name}.keys"].numpy().tobytes()], np.diff(old[f"{name}.ends"].numpy()))
            if then != keys:
                parts = {"removed": set(then) - set(keys), "added": set(keys) - set(then)}
                several = [f"{len(x)} {what} ({_few(sorted(x))})" for what, x in parts.items() if x]
                faults.append(f"{name}: {', '.join(several) or 'another order'}")
                continue
        if images:
            about[:, 0], about[:, 1] = images.labels, _each(_stamp, images, rows)
        if begun:
            known = old[f"{name}.about"].numpy().view(np.uint64)
            rows, about[:, 2] = np.flatnonzero((about[:, 1] != known[:, 1]) | (known[:, 1] == 0)), known[:, 2]
        about[rows, 2] = _each(_content, images, rows, progress)
        for column, what in ((0, "another label"), (2, "another content")) if begun else ():
            if len(other := np.flatnonzero(about[:, column] != known[:, column])):
                faults.append(f"{name}: {len(other)} with {what} ({_few(keys.take(other))})")
        new |= {f"{name}.keys": np.frombuffer(keys.blob, dtype=np.uint8), f"{name}.ends": keys.ends}
        new[f"{name}.about"] = about.view(np.int64)
    if faults:
        what = f"the data set has changed since this run began: {'; '.join(faults)}"
        raise UserError(f"{shown(file)}: {what}; restore it, or use a new --output-dir")
    if new.keys() != old.keys() or any(not np.array_equal(old[name], array) for name, array in new.items()):
        import torch

        said = note() if said is None else said
        about = json.dumps([class_names, said])
        save_tensors(file, {name: torch.tensor(np.asarray(array)) for name, array in new.items()}, about)
    return said


def _record(file: Path) -> dict[str, Any]:
    """What `unchanged` wrote; {} where it is not there or damaged: it is then made again, of the data of today."""
    try:
        return {**load_tensors(file), "about": tensors_metadata(file)} if file.is_file() else {}
    except UserError:
        print(f"note: {shown(file)}: damaged, made again; whether the data have changed is not known", flush=True)
        return {}


def _each(look: Callable, images: Images, rows: np.ndarray, progress: Callable | None = None) -> np.ndarray:
    """look(images, row) of many rows, in threads -> uint64 [rows]. UserError: a file that cannot be read."""

    def part(some: list[int]) -> list[int]:
        try:
            return [look(images, row) for row in some]
        except OSError as error:
            raise UserError(f"{shown(error.filename or images.root)}: {error.strerror or error}") from error

    found = np.zeros(len(rows), dtype=np.uint64)
    with ThreadPoolExecutor() as pool:
        for i, values in enumerate(pool.map(part, chunks(rows.tolist(), 64))):
            found[64 * i : 64 * i + len(values)] = values
            if progress:
                progress(len(values))
    return found


def _about(images: Images, row: int) -> os.stat_result:
    about = os.stat(path := images.path(row))
    if not stat.S_ISREG(about.st_mode):  # reading a FIFO would never end
        raise UserError(f"{shown(path)}: no regular file; remove it")
    return about


def _size(images: Images, row: int) -> int:
    return _about(images, row).st_size


def _stamp(images: Images, row: int) -> int:
    """Of size and time; 0 for pixels in memory, which have none."""
    if images.pixels is not None:
        return 0
    about = _about(images, row)
    return (about.st_mtime_ns * 1_000_003 + about.st_size) % 2**64


def _tail(images: Images, row: int) -> int:
    with open(images.path(row), "rb", buffering=0) as file:
        file.seek(-min(4096, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return _hash(file.read())


def _content(images: Images, row: int) -> int:
    return _hash(Path(images.path(row)).read_bytes() if images.pixels is None else images.pixels[row].tobytes())


def _pixels(images: Images, row: int) -> int:
    image = images[row]
    return _hash(repr(image.size).encode() + image.tobytes())


def _hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


# ---------------------------------------------------------------------------------------------
# Ready-made shots.


def find_fewshot(given: str | None, data_dir: str | None, seed: int, name: str = "") -> Path | None:
    """The folder of ready-made shots of a seed, in the authors' layout, or None.

    given: DIR, DIR/real_train_fewshot or DIR/real_train_fewshot/seed<S>, or any folder with one folder per class.
    Without it data_dir/real_train_fewshot/seed<S>, or data_dir/<name>/real_train_fewshot/seed<S>, name being the
    dataset's. UserError: there are shots, but not of this seed.
    """
    if not (given or data_dir):
        return None
    place, layout = Path(os.path.expanduser(given or data_dir)), "real_train_fewshot"
    for shots in filter(os.path.isdir, (place / layout, place / name / layout, *([place] if given else []))):
        seeds = [folder for folder in _folders(shots) if re.fullmatch(r"seed\d+", folder)]
        if f"seed{seed}" in seeds:
            return shots / f"seed{seed}"
        if seeds:
            raise UserError(f"{shown(shots)}: no shots of seed{seed}, only {_few(seeds)}; pass --fewshot-seed")
    if given and re.fullmatch(r"seed\d+", place.name) and place.name != f"seed{seed}":
        raise UserError(f"{shown(place)}: not the shots of seed {seed}; pass --fewshot-seed {place.name[4:]}")
    return place if given else None


def seed_in_name(given: str | None) -> int:
    """S of a folder seed<S>; 0 for any other."""
    found = re.fullmatch(r"seed(\d+)", Path(given or "").name)
    return int(found[1]) if found else 0


def read_fewshot_folder(root: str | Path, class_names: list[str]) -> Images:
    """ROOT/<class>/* (DataDream's real_train_fewshot/seed0) -> all images, class by class in natural order.

    A class folder has the class name verbatim ("F-16A/B" is B in F-16A) or as common.files.class_folders writes it.
    UserError: a class without folder or image; a folder that is no class.
    """
    root = Path(root)
    if not os.path.isdir(root):
        raise UserError(f"{shown(root)}: no such folder; it should hold one folder per class, like '{class_names[0]}'")
    listed: dict[str, dict[str, str]] = {}

    def place_of(name: str) -> str | None:
        """The folder below root that is called so, in any Unicode spelling; None: there is none."""
        place = ""
        for part in name.split("/"):
            if place not in listed:
                listed[place] = {_nfc(folder): folder for folder in _folders(root / place)}
            if (found := listed[place].get(_nfc(part))) is None:
                return None
            place = f"{place}/{found}" if place else found
        return place

    labels, parts, used = [], [], set()
    for label, (name, slug) in enumerate(zip(class_names, class_folders(class_names), strict=True)):
        place = place_of(name) or place_of(slug)
        files, others = _image_files(root / place) if place else ([], Counter())
        if not files:
            why = f"neither in a folder of that name nor in {slug}{_unreadable(others)}"
            raise UserError(f"{shown(root)}: no images of class '{shown(name)}', {why}")
        labels += [label] * len(files)
        parts.append(Keys(f"{place}/{file}" for file in files))
        used.add(place.split("/")[0])
    strangers = sorted(set(_folders(root)) - used)
    if strangers:
        raise UserError(f"{shown(root)}: {_few(strangers)} is the folder of no class; rename or remove it")
    return Images(labels, Keys.joined(parts), list(class_names), root)


# ---------------------------------------------------------------------------------------------
# Folders of images.


def _nfc(name: str) -> str:
    """One spelling of é: macOS writes it as two characters."""
    return unicodedata.normalize("NFC", name)


@contextlib.contextmanager
def _entries(path: Path) -> Iterator[Iterable[os.DirEntry]]:
    try:
        with os.scandir(path) as entries:
            yield entries
    except OSError as error:
        raise UserError(f"{shown(error.filename or path)}: {error.strerror or error}") from error


def _kind(entry: os.DirEntry) -> str:
    """file, folder, or what is wrong; the listing itself tells, only links cost a look at the disk."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
    except OSError:
        return "a link that leads in a circle"
    return "a link to nothing" if entry.is_symlink() else "no regular file"


def _folders(path: Path) -> list[str]:
    """Names of the visible folders in a folder, in natural order."""
    names = []
    with _entries(path) as entries:
        for entry in entries:
            kind = _kind(entry)
            if not entry.name.strip("."):
                raise UserError(f"{shown(entry.path)}: dots alone are no name of a class; rename or remove it")
            if entry.name[0] == ".":
                continue
            if kind == "folder":
                names.append(entry.name)
            elif kind != "file":
                raise UserError(f"{shown(entry.path)}: {kind}; mend or remove it")
    return [names[i] for i in natural_order(names)]


def _image_files(path: Path) -> tuple[list[str], Counter]:
    """Names of the images in one folder, in natural order, and how much else lies there, by kind."""
    names, others, bad = [], Counter(), []
    with _entries(path) as entries:
        for entry in entries:
            name = entry.name
            suffix = name[name.rfind(".") :].lower() if "." in name else ""
            if name[0] == ".":
                others["hidden"] += 1
            elif (kind := _kind(entry)) == "folder" or suffix not in IMAGE_SUFFIXES:
                others["folder" if kind == "folder" else suffix or "no suffix"] += 1
            elif kind == "file":
                names.append(name)
            else:
                bad.append(f"{name}: {kind}")
    if bad:
        raise UserError(f"{shown(path)}: {_few(sorted(bad))}; mend or remove")
    return [names[i] for i in natural_order(names)], others


def _read_tree(root: Path, split: str, folders: list[str], class_names: list[str]) -> tuple[Images, Counter]:
    """ROOT/SPLIT/<folders[label]>/* -> Images with keys below ROOT, and what was skipped, by kind."""
    counts, parts, skipped = [], [], Counter()
    for label, folder in enumerate(folders):
        place = root / split / folder
        files, others = _image_files(place) if os.path.isdir(place) else ([], Counter())
        if "folder" in others:
            raise UserError(f"{shown(place)} holds folders; put the images themselves into it")
        if not files:
            raise UserError(f"{shown(place)}: no images of class '{shown(class_names[label])}'{_unreadable(others)}")
        counts.append(len(files))
        parts.append(Keys([f"{split}/{folder}/{file}" for file in files]))
        skipped += others
    labels = np.repeat(np.arange(len(folders), dtype=np.int64), counts)
    return Images(labels, Keys.joined(parts), class_names, root), skipped


def _skipped(kinds: Counter) -> str:
    several = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"{sum(kinds.values())} files are no images and were skipped ({several})" if several else ""


def _unreadable(kinds: Counter) -> str:
    """Why a folder with files holds no images."""
    several = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"; its files are of kinds that cannot be read ({several}), save them as JPEG or PNG" if several else ""


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{shown(name)}'" for name in names[:3]) + more


def _folder(root: Path, train_needed: bool = True) -> ImageDataset:
    """DIR/train/<class>/*, DIR/test/<class>/*, perhaps DIR/val (or valid), perhaps DIR/classes.json."""
    first = "train" if train_needed else "test"  # names the classes
    for split in (first, "test"):
        if not os.path.isdir(root / split):
            raise UserError(
                f"{shown(root / split)}: no such folder; put training images into {shown(root)}/train/<class>/ and "
                f"other images into {shown(root)}/test/<class>/ (training images are never taken for testing)"
            )
    there = {s: _folders(root / s) for s in ("train", "val", "valid", "test") if os.path.isdir(root / s)}
    if len(there[first]) < 2:
        raise UserError(f"{shown(root / first)}: {len(there[first])} class folders; a classifier needs at least two")
    for split, names in there.items():
        if twice := [name for name, count in Counter(map(_nfc, names)).items() if count > 1]:
            raise UserError(f"{shown(root / split)}: two folders are called {_few(twice)}; rename or remove one")
    folders = [_nfc(folder) for folder in there[first]]
    latin = [folder for folder in folders if shown(folder) != folder]
    if latin:
        raise UserError(f"{shown(root / first)}: the class folder {_few(latin)} is not named in UTF-8; rename it")
    class_names = _human_names(root / "classes.json", folders)

    splits, skipped, notes = {}, Counter(), []
    for split, names in there.items():
        spelt = {_nfc(name): name for name in names}  # the same class may be written in two ways
        try:
            if different := sorted(set(spelt) ^ set(folders)):
                raise UserError(f"{shown(root)}: {first} and {split} differ in the class folders {_few(different)}")
            splits[split], others = _read_tree(root, split, [spelt[folder] for folder in folders], class_names)
        except UserError as error:
            if train_needed or split == "test":
                raise
            notes.append(f"{split} is not used: {error}")
            continue
        skipped += others + _image_files(root / split)[1]
    del skipped["folder"]  # the class folders themselves
    val = splits.get("val") or splits.get("valid")
    note = "; ".join(filter(None, [*notes, _skipped(skipped)]))
    return ImageDataset("folder", class_names, splits.get("train"), val, splits["test"], note)


def _cinic10(root: Path, train_needed: bool) -> ImageDataset:
    """The unpacked archive: train, valid and test of 90,000 images, the classes of CIFAR-10."""
    inside = [place for place in (root, root / "CINIC-10") if os.path.isdir(place / "test")]
    if not inside:
        where = f"{shown(root)}; unpack CINIC-10.tar.gz there, so that train/, valid/ and test/ exist"
        raise UserError(f"cinic10: no test/ in {where} (datashare.ed.ac.uk/handle/10283/3192)")
    data = _folder(inside[0], train_needed)
    if data.class_names != CIFAR10:
        raise UserError(f"cinic10: the class folders in {shown(inside[0])} are not {', '.join(CIFAR10)}")
    data.name = "cinic10"
    return data


def _human_names(file: Path, folders: list[str]) -> list[str]:
    """classes.json, {folder: human name} -> a name for each folder, its own where the file has none."""
    if os.path.lexists(file) and not os.path.isfile(file):
        raise UserError(f"{shown(file)}: not a file; remove it")
    names = read_json(file, "mend or remove it") if os.path.isfile(file) else {}
    if not isinstance(names, dict) or not all(isinstance(n, str) and n.strip(" .") for n in names.values()):
        raise UserError(f'{shown(file)}: should be {{"folder": "human name", ...}}')
    names = {_nfc(folder): Given(name) for folder, name in names.items()}
    unknown = sorted(set(names) - set(folders))
    if unknown:
        raise UserError(f"{shown(file)}: {_few(unknown)} is no class folder")
    human = [names.get(folder, folder) for folder in folders]
    twice = [name for name, count in Counter(human).items() if count > 1]
    if twice:
        raise UserError(f"{shown(file)}: two classes are called {_few(twice)}")
    if broken := [name for name in human if shown(name) != name]:
        raise UserError(f"{shown(file)}: {_few(broken)} is no Unicode text")
    return human


def _imagenet(name: str, root: Path, download: bool, train_needed: bool) -> ImageDataset:
    """The ILSVRC2012 images in train/<wnid>/ and val/<wnid>/: all classes or those of a subset."""
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    human, wnids = list(IMAGENET_CLASSNAMES), ImageNetInfo().label_names()
    human[744], human[837] = "projectile missile", "dark sunglasses"  # else their names occur twice
    folders, class_names = ([names[i] for i in IMAGENET_SUBSETS[name]] for names in (wnids, human))

    # Data of CoOp lies in imagenet/images, the challenge's in ILSVRC/Data/CLS-LOC, fast.ai's in imagenette2-320.
    places = ["", "imagenet", "images", "imagenet/images", "ILSVRC2012", "ILSVRC/Data/CLS-LOC"]
    places += [f"{name}2{size}" for size in ("", "-320", "-160")]
    first = "train" if train_needed else "val"
    base = next((root / place for place in places if os.path.isdir(root / place / first / folders[0])), None)
    if base is None and name == "imagenette":
        _torchvision(name, IMAGENETTE, root, download, size="320px")
        base = root / IMAGENETTE.folder
    if base is None:
        raise UserError(
            f"{name}: no {first}/{folders[0]} in {shown(root)}; put the images of ILSVRC2012 there as "
            "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG (torchvision.datasets.ImageNet(DIR, 'train') and 'val' unpack "
            "the tar files so)"
        )
    flat = [folder for folder in folders if not os.path.isdir(base / "val" / folder)]
    if flat:
        raise UserError(f"{shown(base / 'val')}: no folders {_few(flat)}; sort the validation images into val/<wnid>/")
    test, others = _read_tree(base, "val", folders, class_names)
    try:
        train, more = _read_tree(base, "train", folders, class_names)
    except UserError:
        if train_needed:
            raise
        train, more = None, Counter()
    note = f"tested on {shown(base / 'val')}" + (", the split of fast.ai" if base.name.startswith(f"{name}2") else "")
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
    images = Images(raw.target, keys, list(DIGITS), pixels=pixels)
    train, test = images.subset(sorted(order[:1000])), images.subset(sorted(order[1000:]))
    return ImageDataset("digits", list(DIGITS), train, None, test, "fixed split of our own")


def _in_memory(name: str, root: Path, download: bool) -> ImageDataset:
    if name == "cifar10" and os.path.isdir(root / "train") and os.path.isdir(root / "test"):
        train, test = (_read_tree(root, split, CIFAR10, CIFAR10)[0] for split in ("train", "test"))
        note = f"image files in {shown(root)}, not the original arrays"
        return ImageDataset(name, list(CIFAR10), train, None, test, note)
    splits = {}
    for split, arguments in IN_MEMORY[name].splits.items():
        data = _torchvision(name, IN_MEMORY[name], root, download, **arguments)
        pixels = np.asarray(data.data)
        if name == "stl10":
            pixels = pixels.transpose(0, 2, 3, 1)  # [N, 3, 96, 96] -> [N, 96, 96, 3]
        labels = np.asarray(data.labels if name == "stl10" else data.targets)
        keys = [f"{split}/{i:05d}" for i in range(len(labels))]
        splits[split] = Images(labels, keys, list(data.classes), pixels=pixels)
    return ImageDataset(name, list(data.classes), splits["train"], None, splits["test"], "official split")


def _medmnist(name: str, root: Path, download: bool) -> ImageDataset:
    """<name>.npz with {train, val, test}_{images, labels}; the official split."""
    file, url = root / f"{name}.npz", f"{MEDMNIST_URL}/{name}.npz?download=1"
    md5, _, names = MEDMNIST[name].partition(" ")
    class_names = names.split(", ")

    def make(download: bool) -> dict[str, Images]:
        if download:
            import torchvision

            torchvision.datasets.utils.download_url(url, root, file.name, md5)
        splits = {}
        with np.load(file) as arrays:  # never reads pickled objects
            for split in ("train", "val", "test"):
                pixels, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"].reshape(-1)
                fits = pixels.dtype == np.uint8 and len(pixels) == len(labels) and labels.max() < len(class_names)
                assert fits, f"its {split} images or labels are others"
                keys = [f"{split}/{i:06d}" for i in range(len(labels))]
                splits[split] = Images(labels, keys, class_names, pixels=pixels)
        return splits

    splits = _fetched(name, root, file, url, download, make, "put {url} there")
    note = "official split of MedMNIST, 28 x 28"
    return ImageDataset(name, class_names, splits["train"], splits["val"], splits["test"], note)


# ---------------------------------------------------------------------------------------------
# Sets of files, listed by torchvision.


def _on_disk(name: str, root: Path, split_file: str | Path | None, download: bool, train_needed: bool) -> ImageDataset:
    folder = root / ON_DISK[name].folder
    class_names, listed = _listing(name, root, download, train_needed)
    labels = {key: label for pairs in listed.values() for key, label in pairs}  # key: path below the image folder
    keys = {split: sorted((key for key, _ in pairs), key=natural_key) for split, pairs in listed.items()}
    partition = {"train": folder / "Training_01.txt", "test": folder / "Testing_01.txt"}  # only SUN397 has such
    note = "official split"
    if split_file:
        keys = _read_split_file(Path(split_file), labels, name, train_needed)
        note = f"split of {shown(split_file)}"
    elif "all" in keys and all(map(os.path.isfile, partition.values())):
        keys = {split: [f.lstrip("/") for f in file.read_text().split()] for split, file in partition.items()}
    elif "all" in keys:
        keys, note = _divide(name, labels), "our own 50/20/30 division of each class"
    if not split_file and name != "fgvc_aircraft":
        note += ", not CoOp's, which needs its split file"

    there = set()
    for base, _, files in os.walk(folder):
        below = os.path.relpath(base, folder).replace(os.sep, "/")
        there.update(files if below == "." else (f"{below}/{file}" for file in files))
    lost = {split: [key for key in of if key not in there or key not in labels] for split, of in keys.items()}
    if not train_needed:
        keys = {split: of for split, of in keys.items() if split == "test" or not lost[split]}
    if missing := [key for split in keys for key in lost[split]]:
        raise UserError(
            f"{name}: {len(missing)} images are missing in {shown(folder)} ({_few(missing)}); if a download was "
            "interrupted, delete what it left and run again"
        )
    splits = {s: Images([labels[key] for key in of], of, class_names, folder) for s, of in keys.items() if of}
    return ImageDataset(name, class_names, splits.get("train"), splits.get("val"), splits["test"], note)


def _listing(name: str, root: Path, download: bool, train_needed: bool) -> tuple[list[str], dict]:
    """Class names and {split: [(path below the image folder, label)]}; the split "all" if none is official."""
    source, folder = ON_DISK[name], root / ON_DISK[name].folder
    if name in ("caltech101", "eurosat"):
        if not os.path.isdir(folder):
            _torchvision(name, source, root, download)
        folders = EUROSAT.split()
        if name == "caltech101":
            folders = sorted(set(_folders(folder)) - {"BACKGROUND_Google", "Faces_easy"})
            if len(folders) != 100:
                raise UserError(f"{shown(folder)}: {len(folders)} categories, not 100; delete it and run again")
        human = {"Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike", "airplanes": "airplane"}
        class_names = [human.get(category, category) for category in folders]
        images, _ = _read_tree(folder.parent, folder.name, folders, class_names)
        keys = (key.split("/", 1)[1] for key in images.keys)
        return class_names, {"all": list(zip(keys, images.labels.tolist(), strict=True))}

    listed = {}
    for split, arguments in source.splits.items():
        try:
            data = _torchvision(name, source, root, download and (train_needed or split == "test"), **arguments)
        except UserError:
            if train_needed or split == "test":
                raise
            continue
        files = data._images if name == "pets" else [] if name == "cars" else data._image_files
        samples = data._samples if name == "cars" else zip(files, data._labels, strict=True)
        listed[split] = [(os.path.relpath(path, folder).replace(os.sep, "/"), int(c)) for path, c in samples]
    class_names = list(data.classes)
    if name == "flowers102":
        class_names[59], class_names[77] = "pink-yellow dahlia", "lotus lotus"
    if name == "sun397":  # apartment_building/outdoor -> outdoor apartment_building
        class_names = [" ".join(reversed(path.split("/"))) for path in class_names]
    return class_names, listed


def _divide(name: str, labels: dict[str, int]) -> dict[str, list[str]]:
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


def _read_split_file(file: Path, labels: dict[str, int], name: str, train_needed: bool = True) -> dict[str, list[str]]:
    """CoOp's JSON {split: [[path, label, class name], ...]} or DISEF's CSV split,filename -> keys in file order.

    A path may begin with folders that the keys do not have ("jpg/image_1.jpg" for "image_1.jpg").
    """
    keys, lost, wrong = {"train": [], "val": [], "test": []}, [], []
    if os.path.lexists(file) and not os.path.isfile(file):
        raise UserError(f"split file {shown(file)}: not a file")
    try:
        if file.suffix.lower() == ".csv":
            with open(file, newline="", encoding="utf-8-sig") as lines:
                rows = [(row["split"], row["filename"], None) for row in csv.DictReader(lines)]
        else:
            content = json.loads(file.read_bytes())
            rows = [(split, row[0], int(row[1])) for split in content for row in content[split]]
        for split, path, label in rows:
            parts = path.split("/")
            key = next((k for i in range(len(parts)) if (k := "/".join(parts[i:])) in labels), None)
            keys[split].append(path if key is None else key)
            if key is None and (train_needed or split == "test"):
                lost.append(path)
            elif key is not None and label not in (None, labels[key]):
                wrong.append(f"{path}: {label}, not {labels[key]}")
    except OSError as error:
        raise UserError(f"split file {shown(file)}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, csv.Error) as error:
        what = "neither a split_zhou_*.json nor a CSV with split,filename"
        raise UserError(f"split file {shown(file)}: {what}") from error
    twice = [key for key, count in Counter(k for of in keys.values() for k in of).items() if count > 1]
    faults = {
        f"paths are no image of {name}": lost,
        f"labels are not those of {name}": wrong,
        "images occur twice": twice,
    }
    for fault, names in faults.items():
        if names:
            raise UserError(f"split file {shown(file)}: {len(names)} of {len(rows)} {fault} ({_few(names)})")
    if not keys["train"] or not keys["test"]:
        raise UserError(f"split file {shown(file)}: no training images or no test images")
    return keys


# ---------------------------------------------------------------------------------------------
# Downloads.


def _torchvision(name: str, source: Source, root: Path, download: bool, **arguments: Any) -> Any:
    """The dataset as torchvision reads it."""
    import torchvision.datasets

    make = functools.partial(getattr(torchvision.datasets, source.loader), root, **arguments)
    advice = BY_HAND.get(name, "unpack {url} so that {folder} exists")
    return _fetched(name, root, root / source.folder, source.url, download, make, advice)


def _fetched(name: str, root: Path, folder: Path, url: str, download: bool, make: Callable, by_hand: str) -> Any:
    """make(download=...) of what lies in folder below root, downloaded first if it is not there; UserError with what to
    do if that fails."""
    lock, state, where = root / ".download.lock", "not found", shown(folder)
    by_hand = by_hand.format(url=url, folder=where)
    if os.path.exists(folder):
        with _locked(lock) if os.path.exists(lock) else contextlib.nullcontext():  # another process may be unpacking
            try:
                return make(download=False)
            except Exception as error:
                state = f"incomplete ({shown(' '.join(str(error).split()))})"
    if not url or not download:
        raise UserError(f"{name}: {where} {state}; {by_hand}")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "cleansynth"})
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # the server is there; torchvision will find whether the file is
    except Exception as error:
        why = getattr(error, "reason", error)
        raise UserError(f"{name}: {where} {state} and its server out of reach ({why}); {by_hand}") from error

    before = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(lock):  # one process downloads; the others wait, and find it done
            socket.setdefaulttimeout(STALL_SECONDS)
            return make(download=True)
    except Exception as error:
        why = shown(" ".join(str(error).split()))
        left = f"delete what it left in {shown(root)}"
        raise UserError(f"{name}: download failed ({why}); {left}, or {by_hand}") from error
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    handle = os.open(file, os.O_RDONLY | os.O_CREAT, 0o644)  # read-only: a shared data folder may be so
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
