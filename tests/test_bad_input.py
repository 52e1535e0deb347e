"""Bad input: one line that says what, where and what to do; exit code 2; no traceback; nothing written, nothing lost.

The tables run commands of all five scripts in processes forked from a warm one (tests/warm.py) and look at what a user
would see. A case that is refused may not have begun a stage, nor left a run folder.
"""

import dataclasses
import importlib
import json
import os
import random
import re
import shutil
import struct
import time
import typing
import zlib
from pathlib import Path

import numpy as np
import pytest
import soak
import test_datadream
import torch
from PIL import Image
from warm import SCRIPTS, Warm

import datadream as dd
from common import cli
from common.launch import UserError
from common.tiny import WEIGHTS

TINY = {**dd.PRESETS["digits"], "shots": 1, "sd_epochs": 1, "sd_warmup": 1, "gen_images_per_class": 2, "gen_steps": 2}
TINY |= {"clf_epochs": 2, "clf_seeds": 1, "clf_evals": 1, "gen_micro_batch": 4, "val_images": 0}


def photos(root, classes=("cat", "dog"), per_class=2, splits=("train", "test")):
    """A small image folder of noise pictures, RGB JPEG."""
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for k in range(per_class):
                Image.effect_noise((40, 30), 80).convert("RGB").save(root / split / name / f"{k}.jpg")
    return root


# ---------------------------------------------------------------------------------------
# The tables

# What makes two classes of eight small pictures enough for each script.
SMALL = {
    "datadream": "--shots 2 --gen-images-per-class 2",
    "realfake": "--real-per-class 4 --mia-models 0",
    "gafi": "--val-per-class 2 --gan-batch 4",
    "synthetic_recognition": "--preset digits-few-shot --shot-counts 2",
    "distdiff": "",
}
GENERATORS = {script: "--sd-model" for script in SCRIPTS if script != "gafi"}


@pytest.fixture(scope="module")
def warm():
    with Warm() as started:
        yield started


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Two classes of eight pictures in train/ and test/."""
    return photos(tmp_path_factory.mktemp("data") / "d", per_class=8)


@pytest.fixture
def told(warm, tmp_path):
    """told(script, words, match, **environment): the command must end in one line that matches."""

    def check(script, words, match, **env):
        (tmp_path / "cwd").mkdir(exist_ok=True)
        done = warm(script, words, tmp_path / "cwd", **env)
        said = f"exit {done.code} after {done.seconds:.0f} s\n{done.out}\n{done.err}"
        assert done.code == 2 and "Traceback" not in done.err and done.seconds < 45, said
        line = done.err[done.err.rindex("error: ") :] if "error: " in done.err else ""
        assert re.search(match, line) and "[1/" not in done.out, said
        assert not list((tmp_path / "cwd").iterdir()), "a run folder was left"
        return line

    return check


def put(file, content=b""):
    """Replace a file, whatever it was."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def png(width, height):
    """The header of a PNG that claims to be so large."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def link(file, target):
    file.unlink() if file.is_symlink() or file.is_file() else shutil.rmtree(file) if file.exists() else None
    file.symlink_to(target)


def only_heic(root):
    for file in (root / "train/cat").iterdir():
        file.rename(file.with_suffix(".heic"))


def float_tiff(root):
    Image.fromarray(np.random.rand(20, 20).astype(np.float32)).save(root / "test/dog/x.tif")


# name -> (what is done to a good folder, what the line says)
DATA = {
    "truncated": (lambda r: put(r / "test/dog/3.jpg", (r / "test/dog/3.jpg").read_bytes()[:200]), r"test/dog/3\.jpg"),
    "empty": (lambda r: put(r / "test/cat/1.jpg"), r"test/cat/1\.jpg: an empty file"),
    "text": (lambda r: put(r / "test/dog/3.jpg", b"hello"), r"3\.jpg: not an image"),
    "two bad files": (lambda r: [put(r / f"test/dog/{k}.jpg") for k in (2, 5)], r"2 of 16 (.|\n)*2\.jpg(.|\n)*5\.jpg"),
    "float tiff": (float_tiff, r"x\.tif: pixels of 32 bits"),
    "huge header": (lambda r: put(r / "test/dog/x.png", png(60_000, 60_000)), r"x\.png: more than .* pixels"),
    "fifo": (lambda r: os.mkfifo(r / "test/dog/x.jpg"), r"x\.jpg.*: no regular file"),
    "dangling link": (lambda r: link(r / "test/dog/x.jpg", "nowhere"), r"x\.jpg.*: a link to nothing"),
    "looping link": (lambda r: link(r / "test/dog/x.jpg", "x.jpg"), r"x\.jpg.*: a link that leads in a circle"),
    "looping class": (lambda r: link(r / "train/cat", "cat"), r"train/cat: a link that leads in a circle"),
    "looping split": (lambda r: link(r / "test", "test"), r"test.*(no such folder|circle|Too many levels)"),
    "no test split": (lambda r: shutil.rmtree(r / "test"), r"test: no such folder"),
    "class of train only": (lambda r: (r / "train/bird").mkdir(), r"bird"),
    "class without pictures": (lambda r: [p.unlink() for p in (r / "test/cat").iterdir()], r"test/cat: no images"),
    "kinds that cannot be read": (only_heic, r"kinds that cannot be read \(8 \.heic\)"),
    "dots as a class": (lambda r: (r / "train/...").mkdir(), r"dots alone are no name"),
    "latin-1 class": (lambda r: os.mkdir(os.fsencode(r / "train") + b"/caf\xe9"), r"not named in UTF-8"),
    "class names in a folder": (lambda r: (r / "classes.json").mkdir(), r"classes\.json: not a file"),
    "class names cut": (lambda r: put(r / "classes.json", b'{"cat": "a'), r"classes\.json: damaged"),
    "class names binary": (lambda r: put(r / "classes.json", os.urandom(99)), r"classes\.json: damaged"),
    "class names nested": (lambda r: put(r / "classes.json", b"[" * 99_999), r"classes\.json: damaged"),
    "class names no text": (lambda r: put(r / "classes.json", b'{"cat": 3}'), r"classes\.json: should be"),
    "class names twice": (lambda r: put(r / "classes.json", b'{"cat": "dog"}'), r"two classes are called 'dog'"),
    "class name no unicode": (lambda r: put(r / "classes.json", b'{"cat": "\\ud800"}'), r"no Unicode"),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", DATA)
def test_files_of_the_data_set(told, template, tmp_path, script, kind):
    damage, match = DATA[kind]
    root = shutil.copytree(template, tmp_path / "d")
    damage(root)
    told(script, [*SMALL[script].split(), "--dataset", "folder", "--data-dir", root, "--output-dir", "r"], match)


def other_class(root):
    index = json.loads((root / "model_index.json").read_text())
    put(root / "model_index.json", json.dumps(index | {"_class_name": "FluxPipeline"}).encode())


def foreign_code(root):
    index = json.loads((root / "model_index.json").read_text())
    put(root / "model_index.json", json.dumps(index | {"unet": ["os", "system"]}).encode())


def not_finite(root):
    from safetensors.torch import load_file, save_file

    file = root / "unet/diffusion_pytorch_model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    next(iter(tensors.values())).fill_(float("nan"))
    file.unlink()
    save_file(tensors, file)


def pickle_only(root):
    file = root / "unet/diffusion_pytorch_model.safetensors"
    file.unlink()
    torch.save({}, file.with_suffix(".bin"))


def cut(file, share=0.5):
    content = file.read_bytes()
    put(file, content[: int(share * len(content))])


MODEL = {
    "cut weights": (lambda r: cut(r / "vae/diffusion_pytorch_model.safetensors"), r"vae.*damaged or cut"),
    "empty weights": (lambda r: put(r / "text_encoder/model.safetensors"), r"text_encoder.*damaged or cut"),
    "only a pickle": (pickle_only, r"only pickled weights"),
    "not finite": (not_finite, r"unet.*not finite"),
    "no tokenizer": (lambda r: shutil.rmtree(r / "tokenizer"), r"no folder tokenizer"),
    "config not JSON": (lambda r: put(r / "unet/config.json", b"{"), r"unet/config\.json: damaged"),
    "no scheduler file": (lambda r: [p.unlink() for p in (r / "scheduler").iterdir()], r"scheduler"),
    "another pipeline": (other_class, r"FluxPipeline"),
    "code of others": (foreign_code, r"names os\.system as unet"),
}


@pytest.mark.parametrize("script", GENERATORS)
@pytest.mark.parametrize("kind", MODEL)
def test_files_of_the_generator(told, tmp_path, script, kind):
    damage, match = MODEL[kind]
    root = shutil.copytree(WEIGHTS / "sd", tmp_path / "sd")
    damage(root)
    line = told(script, [GENERATORS[script], root, "--output-dir", "r"], match)
    assert GENERATORS[script] in line and line.count("\n") == 1


OUT = {
    "a file": (lambda r: put(r / "x"), "x", r"x"),
    "below a file": (lambda r: put(r / "x"), "x/y", r"x"),
    "a name that is too long": (lambda r: None, "x" * 300, r"File name too long"),
    "no run folder": (lambda r: ((r / "x").mkdir(), put(r / "x/thesis.txt")), "x", r"not empty and not a run folder"),
    "of the system": (lambda r: None, "/proc/x", r"/proc/x"),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", OUT)
def test_output_folders(told, template, tmp_path, script, kind):
    prepare, name, match = OUT[kind]
    prepare(tmp_path)
    where = name if name[0] == "/" else tmp_path / name
    words = [*SMALL[script].split(), "--dataset", "folder", "--data-dir", template, "--output-dir", where]
    told(script, words, match)


LAUNCH = {
    "half set": (dict(RANK="0"), r"RANK=0 is set but WORLD_SIZE is not"),
    "a word": (dict(RANK="zero", LOCAL_RANK="0", WORLD_SIZE="1"), r"RANK='zero'"),
    "outside": (dict(RANK="3", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="h", MASTER_PORT="1"), r"RANK=3"),
    "left over": (dict(WORLD_SIZE="4"), r"WORLD_SIZE=4 is set but RANK is not"),
    "no address": (dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2"), r"MASTER_ADDR"),
    "no port": (dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="h", MASTER_PORT="no"), r"MASTER_PORT"),
    "srun alone": (dict(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="8"), r"one of 8 tasks"),
}


@pytest.mark.parametrize("kind", LAUNCH)
def test_variables_of_launchers(told, kind):
    env, match = LAUNCH[kind]
    for script in SCRIPTS:
        told(script, [], match, **env)


# script, flags, what the line says: numbers that do not go together, names, files beside the pictures.
OTHERS = [
    ("datadream", "--dataset digitz", r"did you mean 'digits'"),
    ("datadream", "--dataset folder", r"needs a data folder"),
    ("datadream", "--dataset folder --data-dir {text}", r"not a folder"),
    ("datadream", "--split-file {text} --dataset dtd --data-dir {root}", r"dtd"),
    ("datadream", "--split-file {text}", r"split file has no meaning"),
    ("datadream", "--mode zeroshot --arms unadapted", r"--mode zeroshot"),
    ("datadream", "--arms zero-shot", r"--arms"),
    ("datadream", "--sd-resolution 33", r"--sd-resolution 33"),
    ("datadream", "--gen-guidance nan", r"--gen-guidance nan"),
    ("datadream", "--fewshot-dir {root}", r"no images of class 'zero'"),
    ("datadream", "--sd-model nobody/nothing", r"nobody/nothing"),
    ("datadream", "--sd-model {clip}", r"--sd-model"),
    ("datadream", "--clip-model {text}", r"--clip-model"),
    ("datadream", "--device cuda:7", r"--device cuda:7"),
    ("datadream", "--preset nonsense", r"--preset nonsense"),
    ("datadream", "--shots many", r"shots"),
    ("datadream", "--no-such-flag 1", r"no-such-flag"),
    ("realfake", "--gen-resolution 33", r"--gen-resolution 33"),
    ("realfake", "--net-versions 0", r"--net-versions"),
    ("realfake", "--net-model resnet5000", r"resnet5000"),
    ("realfake", "--net-decay nan", r"--net-decay"),
    ("realfake", "--i2i-strength 0", r"--i2i-strength"),
    ("synthetic_recognition", "--upsampler tiny", r"unknown upsampler 'tiny': .* try a local folder$"),
    ("realfake", "--mia-models 3", r"--mia-models 3"),
    ("realfake", "--i2i-strength 0.001", r"--i2i-strength"),
    ("realfake", "--captioner {clip}", r"--captioner"),
    ("realfake", "--captions-file {text}", r"text"),
    ("realfake", "--captions-file {nowhere}", r"nowhere"),
    ("gafi", "--gan-batch 100000", r"--gan-batch 100000"),
    ("gafi", "--ckpt-grid 100 200 5", r"--ckpt-grid"),
    ("gafi", "--sigma-grid 0 1e12 1", r"--sigma-grid"),
    ("gafi", "--sigma-grid 0 1 1e-9", r"--sigma-grid"),
    ("gafi", "--threshold-grid 0 inf 1", r"--threshold-grid"),
    ("gafi", "--image-size 33", r"--image-size 33"),
    ("gafi", "--gan-ema nan", r"--gan-ema"),
    ("gafi", "--gan-seeds 1 1", r"--gan-seeds"),
    ("gafi", "--attempts 0", r"--attempts"),
    ("synthetic_recognition", "--gen-steps 3", r"--gen-steps"),
    ("synthetic_recognition", "--head-lr inf", r"--head-lr"),
    ("synthetic_recognition", "--ladder zero-shot", r"--ladder"),
    ("synthetic_recognition", "--label-space {text}", r"--label-space"),
    ("synthetic_recognition", "--preset digits-pretrain --label-space {nowhere}", r"nowhere"),
    ("synthetic_recognition", "--preset digits-pretrain --label-space {one}", r"one"),
    ("synthetic_recognition", "--preset digits-pretrain --backbone resnet5000", r"resnet5000"),
    ("synthetic_recognition", "--preset digits-few-shot --shot-counts 17", r"--shot-counts"),
    ("synthetic_recognition", "--gen-resolution 33", r"--gen-resolution 33: the VAE"),
    (
        "synthetic_recognition",
        "--preset digits-pretrain --backbone deit_small_patch16_224",
        r"--pre-size 32: these",
    ),
    ("synthetic_recognition", "--preset digits-pretrain --backbone vgg11 --recipe deit", r"--backbone vgg11: "),
    (
        "synthetic_recognition",
        "--preset digits-pretrain --pre-micro-batch 1",
        r"-micro-batch 1: these",
    ),
    ("synthetic_recognition", "--preset digits-pretrain --pre-micro-batch 1 --recipe moco", r"-batch 1: --recipe moco"),
    ("distdiff", "--rows zero-shot", r"--rows"),
    ("distdiff", "--val-fraction 1", r"--val-fraction"),
    ("distdiff", "--gen-resolution 33", r"--gen-resolution 33"),
    ("distdiff", "--gen-step-from-end 500", r"--gen-step-from-end"),
    ("distdiff", "--clf-copies 1 100", r"--clf-copies"),
    ("distdiff", "--guide resnet5000", r"resnet5000"),
    ("distdiff", "--classifier clip:nobody/nothing", r"nobody"),
    ("distdiff", "--gen-prompt photo", r"--gen-prompt"),
]


@pytest.mark.parametrize("script, words, match", OTHERS, ids=lambda x: x if isinstance(x, str) else None)
def test_flags_and_side_files(told, template, tmp_path, script, words, match):
    put(tmp_path / "text", b"hello\x00\xff\n")
    put(tmp_path / "one", b"a single name\n")
    places = dict(text=tmp_path / "text", one=tmp_path / "one", root=template, nowhere=tmp_path / "nowhere")
    told(script, words.format(clip=WEIGHTS / "clip", **places).split(), match)


# Files of captions that are none.
CAPTIONS = {
    "a number": b'{"x": 3}',
    "a list": b"[1, 2]",
    "nested": b"[" * 99_999,
    "cut": b'{"x": "',
    "half a pair": b'{"x": "\\ud800"}',
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_files_of_captions(told, tmp_path, kind):
    put(tmp_path / "c.json", CAPTIONS[kind])
    told("realfake", ["--captions-file", tmp_path / "c.json"], r"c\.json")


# ---------------------------------------------------------------------------------------
# Numbers


def checked(script):
    """The function of a script that checks its flags."""
    return getattr(script, "check_args", None) or script.check_ranges


def numeric_fields(Args):
    """All flags of a script that take a number, or None."""
    hints = typing.get_type_hints(Args)
    return [name for name, hint in hints.items() if {int, float} & {hint, *typing.get_args(hint)}]


def refusal(script, field, value):
    """What checking the flags says about this value of one field of the default run, None if it is taken."""
    args = script.Args(**script.PRESETS[next(iter(script.PRESETS))])
    if isinstance(now := getattr(args, field), tuple):
        value = (*now[:-1], value)
    try:
        checked(script)(dataclasses.replace(args, **{field: value}))
    except UserError as error:
        return str(error)


STRANGE = [float("nan"), float("inf"), float("-inf"), 2**63, -1, 0, 10**12]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("value", STRANGE)
def test_strange_numbers_are_taken_or_refused_by_the_name_of_their_flag(script, value):
    """Of every numeric flag; any other exception than UserError fails, and so does a second of thought."""
    script = importlib.import_module(script)
    fields, start = numeric_fields(script.Args), time.monotonic()
    said = {field: refusal(script, field, value) for field in fields}
    assert len(fields) > 20 and {"seed", "gen_seed"} & set(fields) and time.monotonic() - start < 20
    for field, text in said.items():
        assert text is None or cli.flag(field) in text and "\n" not in text, f"{field}: {text}"
    refused = {field for field, text in said.items() if text}
    if not abs(value) < 2**63:
        assert refused == set(fields)
    elif value < 0:  # seeds of torch may be negative, guidance may turn away, -1 attempts are without limit
        assert set(fields) - refused <= {"gen_seed", "gen_guidance", "gen_lora_scale", "attempts"}
    elif value == 0:
        counts = {f for f in fields if f.endswith(("_epochs", "_steps", "_lr", "_batch", "_rank", "_seeds"))}
        free = {f for f in counts if "warmup" in f or "min_lr" in f or f.endswith("micro_batch")}
        assert counts - refused - free <= {"rg_steps", "gan_seeds"}, counts - refused
        assert not refused & {"seed", "workers"}
    else:
        assert refused, "shares and such have an upper end"


def test_a_word_for_a_number_is_refused_by_the_name_of_its_flag():
    for field in numeric_fields(dd.Args):
        with pytest.raises(UserError, match=cli.flag(field)):
            cli._parse(dd.Args, dd.PRESETS, "", [cli.flag(field), "nan"])


# ---------------------------------------------------------------------------------------
# Of datadream.py alone


@pytest.fixture
def refused(tmp_path):
    """refused(match, **flags): main() must raise a UserError that matches, in one line, and leave no run folder."""

    def check(match, **flags):
        out = tmp_path / "run"
        with pytest.raises(UserError, match=match) as caught:
            dd.main(dd.Args(**{**TINY, "output_dir": str(out), **flags}))
        assert not out.exists()
        return str(caught.value)

    return check


def test_giant_image(refused, tmp_path, monkeypatch):
    root = photos(tmp_path / "d")
    Image.new("RGB", (400, 400)).save(root / "train" / "cat" / "0.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    refused("cat/0.jpg", dataset="folder", data_dir=str(root), shots=2)


def test_fewer_images_than_shots(refused, tmp_path):
    root = photos(tmp_path / "d", per_class=2)
    refused("cat", dataset="folder", data_dir=str(root), shots=3, gen_images_per_class=3)
    refused("2000", shots=2000, gen_images_per_class=2000)


def test_ranges(refused):
    refused("--shots", shots=0)
    refused("--clf-mix-prob", clf_mix_prob=1.5)
    refused("--clf-warmup-epochs", clf_epochs=2, clf_warmup_epochs=2)
    refused("no real image", shots=4, gen_images_per_class=2)
    refused("--n-templates", n_templates=99)


def test_a_damaged_run_is_made_whole_by_the_same_command(warm, tmp_path):
    """A file of every stage is removed, emptied, cut or edited. tests/soak.py does the same to all scripts."""
    words = [*test_datadream.SMALL, *soak.SMALLER["datadream"].split(), "--output-dir", "run"]
    assert warm("datadream", words, tmp_path, timeout=300).code == 0
    whole = soak.final(tmp_path / "run")
    (tmp_path / "run/images/00_zero/0 (copy).png").write_bytes(b"")  # nobody looks at it
    names = soak.damage(tmp_path / "run", random.Random(0))
    assert len(names) == 5 and soak.differences(whole, soak.final(tmp_path / "run"))
    done = warm("datadream", words, tmp_path, timeout=300)
    assert done.code == 0 and all(f"{name} missing or damaged, made again" in done.out for name in names), done.err
    found = {line.partition(":")[0] for line in soak.differences(whole, soak.final(tmp_path / "run"))}
    assert found == {"images/00_zero/0 (copy).png", "stages/generate.files", "stages/generate.json"}  # listed with it
    assert warm("datadream", words, tmp_path, timeout=300).out.count("done, skipped") == 5


def test_non_finite_loss_stops_and_keeps_the_checkpoint(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match="finite|nan"):
        dd.main(dd.Args(**{**TINY, "output_dir": str(out), "sd_lr": 1e30, "sd_epochs": 40}))
    assert not list(out.rglob("pytorch_lora_weights.safetensors"))


def test_user_error_through_the_command_line(launch, tmp_path):
    done = launch("datadream.py", "--dataset", "digitz", check=False)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error:")
    assert "Traceback" not in done.stderr and not list(Path(launch.cwd).iterdir())


def test_more_processes_than_images(launch, tmp_path):
    """Three processes, two classes of two images: the ones without work wait, and the result is whole."""
    root = photos(tmp_path / "d")
    flags = "--shots 1 --val-images 0 --sd-epochs 1 --sd-warmup 1 --gen-images-per-class 1 --gen-steps 2 --clf-epochs 2"
    flags += (
        f" --clf-seeds 1 --clf-evals 1 --mode cls --dataset folder --data-dir {root} --output-dir {tmp_path / 'run'}"
    )
    launch("datadream.py", *flags.split(), processes=3)
    assert len(list((tmp_path / "run" / "images").glob("*/*.png"))) == 2
    assert json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["pooled"]["updates"] == 2


def test_users_own_photos_of_mixed_sizes_and_modes(launch, tmp_path):
    """Three classes, every kind of file that people have; names with spaces; no file edited."""
    root = photos(tmp_path / "d", classes=("red car", "blue_car", "Émile's bike"), per_class=3)
    folder = root / "train" / "red car"
    noise = Image.effect_noise((90, 50), 90)
    noise.save(folder / "0.png")  # grey
    noise.convert("RGB").convert("P").save(folder / "1.png")
    noise.convert("CMYK").save(folder / "2.jpg")
    folder = root / "train" / "blue_car"
    Image.fromarray(torch.randint(65535, (60, 20)).to(torch.int32).numpy().astype("uint16")).save(folder / "0.png")
    noise.convert("RGBA").save(folder / "1.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    noise.convert("RGB").save(folder / "2.jpg", exif=exif)
    (root / "train" / "red car" / ".DS_Store").write_bytes(b"x")
    flags = "--shots 2 --sd-epochs 2 --sd-warmup 1 --gen-images-per-class 3 --gen-steps 2 --clf-epochs 2 --clf-seeds 1"
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    args = [*flags.split(), "--clf-evals", 1, "--dataset", "folder", "--data-dir", root, "--output-dir", tmp_path / "r"]
    launch("datadream.py", *args)
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
    result = json.loads((tmp_path / "r" / "results.json").read_text())
    assert result["metrics"]["pooled"]["mean"] >= 0 and result["images"]["images"] == 9
    assert len(list((tmp_path / "r" / "images").iterdir())) == 4  # three classes and metadata.jsonl


# Files of sentences that are none, and what is said of them.
SENTENCES = {
    "no file": (None, "No such file"),
    "cut": (b'{"zero": ["a', "Unterminated"),
    "nested": (b"[" * 99_999, "recursion"),
    "a number": (b"3", "wanted is"),
    "rows of something else": (b'[{"name": "zero"}]', "wanted is"),
    "a class is missing": (b'{"zero": ["a zero"]}', "no sentence for 'one'"),
    "an empty list": (b'{"zero": []}', "no sentence for 'zero'"),
    "blanks": (b'{"zero": ["", " "]}', "no sentence for 'zero'"),
    "a text, no list": (b'{"zero": "a zero"}', "no list of texts"),
    "numbers": (b'{"zero": ["a zero", 3]}', "no list of texts"),
    "half a pair": (b'{"zero": ["\\ud800"]}', "no list of texts"),
}


@pytest.mark.parametrize("kind", SENTENCES)
def test_files_of_sentences(told, tmp_path, kind):
    content, match = SENTENCES[kind]
    if content is not None:
        put(tmp_path / "s.json", content)
    told("synthetic_recognition", ["--sentence-model", tmp_path / "s.json"], rf"--sentence-model .*s\.json: .*{match}")
