"""Rehearsals at full size of the DistDiff launchers: SD 1.4, timm's ResNet-50 and CLIP ViT-B/32 of random weights.

As tests/test_fullsize.py: every preset through its launcher, on a few pictures in the true layouts, 64 pixels and the
fewest steps. The sets of a hundred classes take one step and one look-ahead, the rows "real" and "distdiff".
"""

import json
import shlex
import shutil

import archives
import fullsize
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from common.datasets import IMAGENET_SUBSETS

SHORT = """--gen-resolution 64 --energy-probe 2 --guide-epochs 1 --clf-epochs 1 --clf-evals 1
--clf-seeds 1 --sgd-batch 8 --precision bf16 --workers 0 --output-dir run""".split()
RESNET = "--clf-resize 72 --clf-size 64".split()  # a CLIP sees 224 pixels or nothing
TWO_STEPS = "--gen-micro-batch 8 --gen-steps 4 --gen-step-from-end 2 --gen-copies 2 --clf-copies 1 2".split()
ONE_STEP = """--gen-steps 2 --gen-step-from-end 1 --gen-period 1 --gen-copies 1 --clf-copies 1 --real-per-class 1
--rows real distdiff""".split()
ALL_ROWS = "--rows zero-shot real real-repeated gridmask mixup sd rho0 direct distdiff".split()
PICTURE = archives.encoded(size=(80, 64), color=(90, 140, 60), kind="JPEG")


def imagenette(root):
    archives.imagenet(root / "imagenette2-320", IMAGENET_SUBSETS["imagenette"], per_class=1, picture=PICTURE)


def hundred(root):
    archives.cifar100(root, [f"small_thing_{c}" for c in range(100)], per_class=1)


# preset: (fills data/, classes, real images that are multiplied, a prompt, more flags)
SETS = {
    "caltech101": (
        lambda root: archives.caltech101(root, 31, PICTURE), 100, 100, "a photo of a crocodile head.",
        [*RESNET, *ONE_STEP],
    ),
    "cifar100": (hundred, 100, 100, "a photo of a small thing 7.", [*RESNET, *ONE_STEP]),
    "flowers102": (
        lambda root: archives.flowers102(root, PICTURE), 102, 102, "A photo of a tiger lily, a type of flower.",
        [*RESNET, *ONE_STEP],
    ),
    "cars": (
        lambda root: archives.cars(root, PICTURE), 2, 4, "a photo of a 2012 Ram C/V Cargo Van Minivan.",
        [*RESNET, *TWO_STEPS, *ALL_ROWS],
    ),
    "imagenette": (imagenette, 10, 10, "a photo of a cassette player.", [*RESNET, *TWO_STEPS]),
    "dtd": (
        lambda root: archives.dtd(root, archives.TEXTURES[:3], PICTURE), 3, 6, "blotchy texture.",
        [*RESNET, *TWO_STEPS],
    ),
    "pets": (
        lambda root: archives.pets(root, archives.PETS[:2], PICTURE), 2, 4, "A photo of a pet Abyssinian.",
        [*RESNET, *TWO_STEPS],
    ),
    "fgvc_aircraft": (
        lambda root: archives.fgvc_aircraft(root, PICTURE), 7, 7, "A photo of a F-16A/B, a type of aircraft",
        [*RESNET, *TWO_STEPS],
    ),
    "stl10": (archives.stl10, 10, 10, "a photo of a monkey.", [*RESNET, *TWO_STEPS]),
    "pathmnist": (  # strength 0.2: two of ten steps are run
        lambda root: archives.medmnist(root, "pathmnist", 9), 9, 9, "a colon pathological image of smooth muscle.",
        [*TWO_STEPS, "--gen-steps", "10", "--real-per-class", "1"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub cache with all three models, 7 GB for as long as this module is tested."""
    home = tmp_path_factory.mktemp("fullsize")
    yield fullsize.write_hub(home, fullsize.SD14, fullsize.CLIP_B32, fullsize.RESNET50)
    shutil.rmtree(home)


def rehearse(cwd, hub, preset, *flags, processes=1):
    """All stages of a preset; what a finished run leaves, checked -> its results.json"""
    fill, classes, real, prompt, more = SETS[preset]
    fill(cwd / "data")
    fullsize.launch(cwd, hub, f"distdiff_{preset}", *SHORT, *more, *flags, processes=processes)
    run, copies = cwd / "run", int(more[more.index("--gen-copies") + 1])
    result = json.loads((run / "results.json").read_text())
    listed = [json.loads(line) for line in (run / "images" / "metadata.jsonl").read_text().splitlines()]
    different = {key: len({about[key] for about in listed}) for key in ("file_name", "seed", "source")}
    assert len(listed) == copies * real and different == dict(file_name=len(listed), seed=len(listed), source=real)
    assert prompt in {about["prompt"] for about in listed}
    assert len(json.loads((run / "classifier" / "classes.json").read_text())["class_names"]) == classes
    pixels = [np.asarray(Image.open(run / "images" / about["file_name"])) for about in listed[:2]]
    assert all(picture.shape == (256, 256, 3) and picture.std() > 1 for picture in pixels)
    assert {f"distdiff@{copies}", "saved_classifier", "guide"} <= set(result["metrics"])
    energies = json.loads((run / "energy.json").read_text())
    assert all(np.isfinite(energies[name]).all() and len(energies[name]) == 2 for name in ("before", "after_projected"))
    if (run / "sd").is_dir():
        others = [np.asarray(Image.open(run / "sd" / about["file_name"])) for about in listed[:2]]
        assert all((one != other).any() for one, other in zip(pixels, others, strict=True))
    return result


def documented(words):
    """The flags of a command in docs/distdiff.md, by its comment."""
    text = (fullsize.ROOT / "docs" / "distdiff.md").read_text()
    (line,) = [x for x in text.splitlines() if x.startswith("bash shell/distdiff_") and words in x]
    _, launcher, *flags = shlex.split(line, comments=True)
    return launcher.removeprefix("shell/distdiff_").removesuffix(".sh"), flags


def test_every_launcher_is_rehearsed():
    launchers = {p.stem for p in (fullsize.ROOT / "shell").glob("distdiff_*.sh")}
    assert launchers == {f"distdiff_{preset}" for preset in SETS}


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(SETS))
def test_launcher_at_full_size(hub, tmp_path, preset):
    result = rehearse(tmp_path, hub, preset)
    assert fullsize.SD14 in (tmp_path / "run" / "args.json").read_text()
    if preset == "cars":
        assert set(result["baselines"]) >= {"zero-shot", "real", "real-repeated", "gridmask", "mixup", "sd@2", "rho0@2"}
        assert {"direct@1", "direct@2"} <= set(result["metrics"])
    if preset == "pathmnist":  # the fine-tuned image tower, its tokenizer's files and the linear head
        assert (tmp_path / "run" / "classifier" / "head.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_at_full_size(hub, tmp_path):
    rehearse(tmp_path, hub, "pets", "--workers", "1", processes=2)


@pytest.mark.slow
def test_documented_command_with_a_clip_guide(hub, tmp_path):
    """Table 10: the guide is the fine-tuned image tower, the classifier ResNet-50 from scratch."""
    preset, flags = documented("# Table 10")
    result = rehearse(tmp_path, hub, preset, *flags, "--clf-resize", "256", "--clf-size", "224")
    assert set(result["baselines"]) == {"real"}
    assert load_file(tmp_path / "run" / "prototypes.safetensors")["class_unit"].shape == (100, 512)
