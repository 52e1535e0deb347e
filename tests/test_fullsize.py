"""Rehearsals at full size: every DataDream launcher with its own preset, data layout and networks, all but the values.

Stable Diffusion 2.1-base and CLIP ViT-B/16 have random weights (tests/fullsize.py), the archives a few pictures
(tests/archives.py); 64 pixels and the fewest steps. What is seen here and nowhere else: files, names, shapes and
memory of the real thing on the way from the launcher to the table; the number of classes where it is cheap.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import archives
import fullsize
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = sorted(p.stem for p in (ROOT / "shell").glob("datadream_*.sh"))
SHORT = """--sd-resolution 64 --shots 1 --sd-epochs 1 --sd-warmup 0 --gen-images-per-class 1 --gen-sampler ddim
--gen-steps 1 --gen-micro-batch 4 --clf-epochs 1 --clf-warmup-epochs 0 --clf-evals 1 --clf-seeds 1 --clf-micro-batch 8
--precision bf16 --workers 0 --output-dir run""".split()
PICTURE = archives.encoded(size=(80, 64), color=(90, 140, 60), kind="JPEG")

# preset: (fills DATA_DIR, classes, more flags). With a hundred classes the main row is enough.
MAIN_ROW = ["--arms", "pooled"]
SETS = {
    "dtd": (lambda root: archives.dtd(root, archives.TEXTURES[:3], PICTURE), 3, []),
    "pets": (lambda root: archives.pets(root, archives.PETS[:2], PICTURE), 2, []),
    "food101": (lambda root: archives.food101(root, archives.FOODS[:2], 3, PICTURE), 2, []),
    "cars": (lambda root: archives.cars(root, PICTURE), 2, []),
    "sun397": (lambda root: archives.sun397(root, PICTURE), 4, []),
    "fgvc_aircraft": (lambda root: archives.fgvc_aircraft(root, PICTURE), 7, ["--arms", "zero-shot", "pooled"]),
    "eurosat": (lambda root: archives.eurosat(root, 4, PICTURE), 10, MAIN_ROW),
    "caltech101": (lambda root: archives.caltech101(root, 4, PICTURE), 100, MAIN_ROW),
    "flowers102": (lambda root: archives.flowers102(root, PICTURE), 102, MAIN_ROW),
    "imagenet": (
        lambda root: archives.imagenet(root / "imagenet", range(1000), per_class=2, picture=PICTURE),
        1000,
        ["--val-images", "1"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub cache with both models, 8 GB for as long as this module is tested."""
    home = tmp_path_factory.mktemp("fullsize")
    yield fullsize.write_hub(home / "all")
    shutil.rmtree(home)


def run_launcher(cwd, hub, preset, *flags, processes=1):
    """The launcher of a preset, from cwd with the archive in cwd/data; it must end well."""
    fill, _, more = SETS[preset]
    fill(cwd / "data")
    fullsize.launch(cwd, hub, f"datadream_{preset}", *SHORT, *more, *flags, processes=processes)


def rehearse(cwd, hub, preset, *flags, processes=1):
    """All stages of a preset, with all that a finished run leaves."""
    run_launcher(cwd, hub, preset, *flags, processes=processes)
    classes = SETS[preset][1]
    result = json.loads((cwd / "run" / "results.json").read_text())
    folders = [folder for folder in (cwd / "run" / "images").iterdir() if folder.is_dir()]
    assert len(folders) == classes and all(Image.open(f / "0.png").size == (64, 64) for f in folders)
    assert set(result["metrics"]) >= {"pooled", "saved_classifier"}
    assert len(result["metrics"]["saved_classifier"]["per_class"]) == classes


def test_every_launcher_is_rehearsed():
    assert LAUNCHERS == sorted(f"datadream_{preset}" for preset in SETS)


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(SETS.keys() - {"imagenet"}))
def test_launcher_at_full_size(hub, tmp_path, preset):
    rehearse(tmp_path, hub, preset)
    about = json.loads((tmp_path / "run" / "args.json").read_text())
    assert fullsize.SD in json.dumps(about) and "ViT-B-16-quickgelu/openai" in json.dumps(about)


@pytest.mark.slow
def test_imagenet_launcher_looks_through_models_and_chooses_its_shots(hub, tmp_path):
    """1,000 adapted classes would take hours here: the models, the data and the choice of the shots."""
    run_launcher(tmp_path, hub, "imagenet", "--stages", "select")
    chosen = json.loads((tmp_path / "run" / "fewshot.json").read_text())
    assert len(chosen["shots"]) == len(chosen["validation"]) == 1000


@pytest.mark.slow
def test_two_processes_at_full_size(hub, tmp_path):
    rehearse(tmp_path, hub, "pets", *MAIN_ROW, "--workers", "1", processes=2)


@pytest.mark.slow
def test_generator_of_which_the_cache_has_the_fp16_files_only(hub, tmp_path):
    rehearse(tmp_path, fullsize.write_fp16_only(hub, hub.parent / "fp16"), "cars", *MAIN_ROW)


def own_folder_commands():
    """The two commands of the README's section on own images, without their comments."""
    text = (ROOT / "README.md").read_text().split("## Your own images")[1].split("```")[1]
    lines = [line.partition("#")[0].split() for line in text.splitlines() if line.startswith("python datadream.py")]
    assert len(lines) == 2 and all("DIR" in line for line in lines)
    return lines


def own_folder(root):
    """Three classes, ten training and ten test photos each: other colours for each class, sizes that differ."""
    for split in ("train", "test"):
        for c, name in enumerate(("red car", "green car", "blue car")):
            for k in range(10):
                noise = Image.effect_noise((60 + 7 * k, 90 - 5 * k), 60 + k)
                bands = [noise.point(lambda v, on=band == c: v if on else v // 4) for band in range(3)]
                (root / split / name).mkdir(parents=True, exist_ok=True)
                Image.merge("RGB", bands).save(root / split / name / f"{k}.jpg")
    return root


def run_readme(cwd, hub, words, *flags):
    words = [sys.executable, str(ROOT / words[1]), *(str(cwd / "DIR") if w == "DIR" else w for w in words[2:]), *flags]
    settings = dict(cwd=cwd, env=fullsize.environment(cwd, hub), text=True, timeout=1800)
    done = subprocess.run(words, **settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-8000:]
    (file,) = cwd.rglob("results.json")
    return json.loads(file.read_text()), done.stdout


@pytest.mark.slow
def test_own_folder_with_thirty_test_images(tmp_path):
    """The first command as it stands: tiny models, all stages, the whole table."""
    own_folder(tmp_path / "DIR")
    result, printed = run_readme(tmp_path, tmp_path / "hub", own_folder_commands()[0])
    assert set(result["baselines"]) == {"zero-shot", "real", "unadapted"}
    assert len(result["metrics"]["pooled"]["per_seed"]) == 3 and "real + synthetic, DataDream" in printed
    for row in (result["metrics"]["pooled"], result["metrics"]["synthetic"], *result["baselines"].values()):
        hits = [score * 30 / 100 for score in row["per_seed"]]  # of thirty images
        assert hits == pytest.approx([round(h) for h in hits], abs=1e-4)


@pytest.mark.slow
def test_own_folder_at_full_size(hub, tmp_path):
    """The second command: the paper's settings and models, here with the fewest steps; one shot of the eight."""
    own_folder(tmp_path / "DIR")
    result, _ = run_readme(tmp_path, hub, own_folder_commands()[1], *SHORT, *MAIN_ROW)
    assert list(result["metrics"]["saved_classifier"]["per_class"]) == ["blue car", "green car", "red car"]
