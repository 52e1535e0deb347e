"""Rehearsals at full size of synthetic_recognition.py's launchers: SD 1.5, CLIP RN50, T5-base, ResNet-50 and DeiT-S of
random weights, and, where a data set has many classes, narrow networks in their place.

As tests/test_fullsize.py: every preset through its launcher, on a few pictures in the true layouts, 64 pixels and the
fewest steps. The digits are no such preset: tests/test_synthetic_recognition.py runs them as they are.
"""

import json
import re
import shutil

import archives
import fullsize
import pytest
from PIL import Image
from tiny_glide import make_tiny_glide

SHORT = """--gen-resolution 64 --gen-steps 1 --gen-micro-batch 4 --sentences 1 --clf-seeds 1 --precision bf16
--workers 0 --output-dir run""".split()
HEADS = "--gen-images-per-class 1 --head-epochs 1".split()
SHOTS = [*HEADS, *"--rg-images 1 --shot-counts 1".split()]
BACKBONES = """--pre-epochs 1 --pre-batch 8 --pre-micro-batch 4 --transfer-epochs 1 --transfer-batch 8
--gen-save-size 32""".split()
SMALL = "--pre-size 64".split()  # not for DeiT, whose number of patches is fixed
COLUMNS = "--gen-images-per-class 2 --pre-amounts 1 2".split()
ONE = "--gen-images-per-class 1 --pre-amounts 1".split()

# Other models than the presets', in place of SD 1.5 or T5-base; HUB: the folder of the fixture.
GLIDE = "--sd-model glide:HUB/glide --gen-resolution 128".split()  # its enlargement to 128 pixels is the smallest
XL = ["--sd-model", fullsize.XL]
WRITER = "--sentence-model HUB/writer".split()  # T5-base needs seconds a class for its 51 sentences
VIT = ["--head-clip", f"{fullsize.CLIP}/openai"]  # the filter's remains RN50: two CLIPs
# A thousand classes: the text tower of RN50 alone would take half an hour for ImageNet's seven prompts.
THOUSAND = [*XL, *WRITER, *"--head-clip tiny --filter-clip tiny".split()]
LE_ONLY = "--ladder zero-shot le+cf-sce".split()

PICTURE = archives.encoded(size=(80, 64), color=(90, 140, 60), kind="JPEG")
NAMES = "tench, goldfish, great white shark, house finch, water ouzel, maillot, mobile home, crane (bird)".split(", ")


def set_of(layout, *arguments):
    """-> fills data/ with a layout of tests/archives.py"""
    return lambda root: getattr(archives, layout)(root, *arguments, picture=PICTURE)


def imagenet(root):
    archives.imagenet(root / "imagenet", range(1000), picture=PICTURE)


def own(preset, names, splits=("train", "test")):
    return lambda root: archives.own(root / preset, names, splits, picture=PICTURE)


DTD, PETS, FOOD = archives.TEXTURES[:3], archives.PETS[:2], archives.FOODS[:2]
# preset: (fills data/, classes that are drawn, more flags)
ZERO_SHOT = {
    "cifar10": (archives.cifar10, 10, []),
    "cifar100": (archives.cifar100, 4, GLIDE),
    "caltech101": (set_of("caltech101", 4), 100, [*XL, *WRITER]),
    "caltech256": (own("caltech256", archives.OBJECTS), 4, GLIDE),
    "imagenet": (imagenet, 1000, [*THOUSAND, *LE_ONLY]),
    "sun397": (set_of("sun397"), 4, []),
    "aircraft": (set_of("fgvc_aircraft"), 7, XL),
    "birdsnap": (own("birdsnap", archives.BIRDSNAP), 3, GLIDE),
    "cars": (set_of("cars"), 2, []),
    "cub": (own("cub", archives.CUB), 3, XL),
    "flowers": (set_of("flowers102"), 102, [*XL, *WRITER, *LE_ONLY]),
    "food": (set_of("food101", FOOD), 2, []),
    "pets": (set_of("pets", PETS), 2, VIT),
    "dtd": (set_of("dtd", DTD), 3, []),
    "eurosat": (set_of("eurosat", 4), 10, [*GLIDE, *VIT]),
    "imagenet-sketch": (own("imagenet-sketch", archives.WNIDS, ["test"]), 3, XL),  # there is no training split
    "imagenet-r": (own("imagenet-r", archives.WNIDS, ["test"]), 3, GLIDE),
}
FEW_SHOT = {
    "imagenet-few-shot": (imagenet, 1000, THOUSAND),
    "caltech101-few-shot": (set_of("caltech101", 4), 100, [*XL, *WRITER]),
    "pets-few-shot": (set_of("pets", PETS), 2, ["--shot-counts", "1", "2"]),
    "cars-few-shot": (set_of("cars"), 2, GLIDE),
    "aircraft-few-shot": (set_of("fgvc_aircraft"), 7, XL),
    "sun397-few-shot": (set_of("sun397"), 4, VIT),
    "dtd-few-shot": (set_of("dtd", DTD), 3, []),
    "eurosat-few-shot": (set_of("eurosat", 4), 10, GLIDE),
}
OWN_NAMES = "--label-space names.txt".split()
PRETRAIN = {
    "cifar100-pretrain": (archives.cifar100, 4, [*SMALL, *COLUMNS]),
    # ImageNet's names, as the preset says
    "cifar100-agnostic": (archives.cifar100, 998, [*SMALL, *ONE, *XL, *WRITER, "--pre-batch", "64"]),
    "cifar100-moco": (archives.cifar100, len(NAMES), [*SMALL, *COLUMNS, *XL, *OWN_NAMES]),
    "cifar100-deit": (archives.cifar100, len(NAMES), [*COLUMNS, *OWN_NAMES]),
    # DeiT-S sees 224 pixels: two thousand images would take it an hour, so all but the training.
    "cifar100-deit-2k": (archives.cifar100, 1998, [*ONE, *XL, *WRITER, "--stages", "select", "sentences", "generate"]),
}
SETS = ZERO_SHOT | FEW_SHOT | PRETRAIN
FOLDERS = {"caltech256", "birdsnap", "cub", "imagenet-sketch", "imagenet-r"}  # launchers that ask for --data-dir


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub cache with all models and the narrow ones beside it, 10 GB for as long as this module is tested."""
    home = tmp_path_factory.mktemp("fullsize")
    fullsize.write_hub(home, fullsize.SD15, fullsize.XL, fullsize.CLIP_R, fullsize.CLIP, fullsize.COMMON_GEN)
    fullsize.write_hub(home, *fullsize.TIMM)
    fullsize.write_writer(home / "writer", fullsize.NARROW_T5)
    make_tiny_glide(home / "glide")
    yield home
    shutil.rmtree(home)


def flags_of(hub, preset):
    """All that makes a rehearsal of a preset short, and finds its images"""
    of_setting = HEADS if preset in ZERO_SHOT else SHOTS if preset in FEW_SHOT else BACKBONES
    place = ["--data-dir", f"data/{preset}"] if preset in FOLDERS else []
    return [word.replace("HUB", str(hub)) for word in (*SHORT, *of_setting, *place, *SETS[preset][2])]


def rehearse(cwd, hub, preset, *more, processes=1):
    """The launcher, and the images that it draws -> run folder"""
    fill, classes, _ = SETS[preset]
    fill(cwd / "data")
    (cwd / "names.txt").write_text("\n".join(NAMES))
    flags = [*flags_of(hub, preset), *more]
    fullsize.launch(cwd, hub, f"synthetic_recognition_{preset}", *flags, processes=processes)
    run, size = cwd / "run", 32 if preset in PRETRAIN else 128 if "128" in flags else 64
    first = "0.jpg" if preset in PRETRAIN else "0.png"
    drawn = json.loads((run / "stages" / "generate.json").read_text())["images"]
    for name, count in drawn.items():
        folders = [folder for folder in (run / ("images" if name == "le" else name)).iterdir() if folder.is_dir()]
        assert len(folders) == classes and count % classes == 0
        assert all(Image.open(folder / first).size == (size, size) for folder in folders)
    assert (fullsize.SD15 in (run / "args.json").read_text()) == ("--sd-model" not in flags)
    wanted = {"le"} | ({"rg1"} if preset in FEW_SHOT else set())
    assert wanted <= drawn.keys() and ("basic" in drawn) == (preset in ZERO_SHOT and "--ladder" not in flags)
    return run


def test_every_launcher_is_rehearsed():
    launchers = {p.stem for p in (fullsize.ROOT / "shell").glob("synthetic_recognition_*.sh")}
    digits = {f"synthetic_recognition_digits{setting}" for setting in ("", "-few-shot", "-pretrain")}
    assert launchers - digits == {f"synthetic_recognition_{preset}" for preset in SETS}


def test_docs_quote_the_costs_of_every_launcher():
    rows = (fullsize.ROOT / "docs" / "synthetic_recognition.md").read_text().split("\n## Cost\n")[1].splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if row.startswith("|")]
    quoted = {preset: tuple(cost[:3]) for launchers, *cost in cells for preset in launchers.split(", ")}
    said = {}
    for preset in SETS:
        text = (fullsize.ROOT / "shell" / f"synthetic_recognition_{preset}.sh").read_text()
        plan = re.search(r"(\S+) GPU-hours on .* (\S+) images, \S+ PFLOP, (\S+) GB of images", text)
        said[preset] = (plan[2], plan[3], plan[1])
    assert said == {preset: quoted[preset] for preset in SETS}


@pytest.mark.slow
@pytest.mark.parametrize("preset", SETS)
def test_launcher_at_full_size(hub, tmp_path, preset):
    run = rehearse(tmp_path, hub, preset)
    if "--stages" in SETS[preset][2]:
        return
    result = json.loads((run / "results.json").read_text())
    row = "le+cf-sce" if preset in ZERO_SHOT else "rg-1" if preset in FEW_SHOT else "synthetic-1"
    assert 0 <= result["metrics"][row]["mean"] <= 100
    classes = len(archives.CIFAR) if preset in PRETRAIN else SETS[preset][1]
    assert len(result["metrics"]["saved_classifier"]["per_class"]) == classes


@pytest.mark.slow
def test_two_processes_at_full_size(hub, tmp_path):
    """With workers that read the images of each, as the launchers have it"""
    rehearse(tmp_path, hub, "dtd-few-shot", "--workers", "2", processes=2)
