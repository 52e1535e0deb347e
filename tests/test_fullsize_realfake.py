"""Rehearsals at full size of the Real-Fake launchers: SD 1.5, CLIP ViT-L/14 and BLIP-2 of random weights.

As tests/test_fullsize.py: the presets through their launchers, on a few pictures in the true layouts, 64 pixels and the
fewest steps.
"""

import json
import shutil

import archives
import fullsize
import pytest
from PIL import Image

from common.datasets import IMAGENET_SUBSETS

SHORT = """--gen-resolution 64 --gen-steps 2 --gen-micro-batch 8 --tune-max-images 8 --real-per-class 1 --net-epochs 1
--net-milestones 1 --net-warmup 0 --net-batch 8 --net-micro-batch 8 --clf-seeds 1 --precision bf16 --workers 0
--output-dir run""".split()
PICTURE = archives.encoded(size=(80, 64), color=(90, 140, 60), kind="JPEG")


def imagenette(root):
    archives.imagenet(root / "imagenette2-320", IMAGENET_SUBSETS["imagenette"], per_class=2, picture=PICTURE)


def imagenet(name):
    return lambda root: archives.imagenet(root, IMAGENET_SUBSETS[name], per_class=2, picture=PICTURE)


# preset: (fills data/, classes, more flags). All stages of the ten classes with BLIP-2 and the visual token once.
PLAIN = "--no-caption --token none".split()
SETS = {
    "imagenette": (imagenette, 10, []),
    "imagewoof": (imagenet("imagewoof"), 10, PLAIN),
    "imagenet100": (imagenet("imagenet100"), 100, [*PLAIN, "--gen-steps", "1", "--i2i-strength", "1"]),
    "cifar10": (lambda root: archives.cifar10(root, per_class=4), 10, PLAIN),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub cache with all three models, 15 GB for as long as this module is tested."""
    home = tmp_path_factory.mktemp("fullsize")
    yield fullsize.write_hub(home, fullsize.SD15, fullsize.CLIP_L, fullsize.BLIP2)
    shutil.rmtree(home)


def rehearse(cwd, hub, preset, *flags, processes=1):
    fill, classes, more = SETS[preset]
    fill(cwd / "data")
    fullsize.launch(cwd, hub, f"realfake_{preset}", *SHORT, *more, *flags, processes=processes)
    result = json.loads((cwd / "run" / "results.json").read_text())
    folders = [folder for folder in (cwd / "run" / "images").iterdir() if folder.is_dir()]
    size = 32 if preset == "cifar10" else 64
    suffix = "png" if preset == "cifar10" else "jpg"
    assert len(folders) == classes and all(Image.open(f / f"0.{suffix}").size == (size, size) for f in folders)
    return result


def test_every_launcher_is_rehearsed():
    launchers = {p.stem for p in (fullsize.ROOT / "shell").glob("realfake_*.sh")}
    assert launchers == {f"realfake_{preset}" for preset in (*SETS, "imagenet1k")}


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(SETS))
def test_launcher_at_full_size(hub, tmp_path, preset):
    result = rehearse(tmp_path, hub, preset)
    assert {"synthetic-1x", "real+synthetic-1x"} <= set(result["metrics"])
    if preset == "imagenette":
        captions = json.loads((tmp_path / "run" / "captions.json").read_text())
        assert len(captions) == 10 and all(isinstance(text, str) for text in captions.values())


@pytest.mark.slow
def test_two_processes_at_full_size(hub, tmp_path):
    rehearse(tmp_path, hub, "imagewoof", "--workers", "1", processes=2)


@pytest.mark.slow
def test_imagenet_launcher_tunes_on_a_thousand_classes(hub, tmp_path):
    """A thousand images of its generator would take hours here: models, data, one step of the tuning."""
    imagenet("imagenet")(tmp_path / "data")
    fullsize.launch(tmp_path, hub, "realfake_imagenet1k", *SHORT, *PLAIN, *"--stages caption embed finetune".split())
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()
