"""Bad input: one line that says what, where and what to do; exit code 2; no traceback; nothing written, nothing lost.

Most cases call main() and look at the UserError, which common.run.cli prints as `error: ...` with exit code 2; a few
go through the command line to see that.
"""

import dataclasses
import json
import typing
from pathlib import Path

import pytest
import torch
from PIL import Image

import datadream as dd
from common import cli
from common.launch import UserError

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


def test_unknown_data_set(refused):
    message = refused("digitz", dataset="digitz")
    assert "digits" in message and "\n" not in message


def test_folder_without_data_dir_or_missing(refused, tmp_path):
    refused("needs a data folder", dataset="folder", data_dir=None)
    refused("nowhere", dataset="folder", data_dir=str(tmp_path / "nowhere"))


def test_missing_test_split_is_never_made_up(refused, tmp_path):
    root = photos(tmp_path / "d", splits=("train",))
    refused("test", dataset="folder", data_dir=str(root))


def test_class_without_images(refused, tmp_path):
    root = photos(tmp_path / "d")
    (root / "train" / "empty").mkdir()
    refused("empty", dataset="folder", data_dir=str(root))


def test_two_classes_that_would_share_a_folder(refused, tmp_path):
    root = photos(tmp_path / "d")
    names = {"cat": "a/b", "dog": "a/b"}
    (root / "classes.json").write_text(json.dumps(names))
    refused("a/b", dataset="folder", data_dir=str(root))


@pytest.mark.parametrize("damage", ["truncated", "no image", "empty"])
def test_broken_images_are_named(refused, tmp_path, damage):
    root = photos(tmp_path / "d")
    files = [root / "train" / "cat" / "0.jpg", root / "test" / "dog" / "1.jpg"]
    content = {"truncated": files[0].read_bytes()[:300], "no image": b"hello", "empty": b""}[damage]
    for file in files[:1]:
        file.write_bytes(content)
    message = refused("cat/0.jpg", dataset="folder", data_dir=str(root), shots=2)
    assert "dog" not in message


def test_giant_image(refused, tmp_path, monkeypatch):
    root = photos(tmp_path / "d")
    Image.new("RGB", (400, 400)).save(root / "train" / "cat" / "0.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    refused("cat/0.jpg", dataset="folder", data_dir=str(root), shots=2)


def test_fewer_images_than_shots(refused, tmp_path):
    root = photos(tmp_path / "d", per_class=2)
    refused("cat", dataset="folder", data_dir=str(root), shots=3, gen_images_per_class=3)
    refused("2000", shots=2000, gen_images_per_class=2000)


def test_unknown_model_and_model_of_the_wrong_kind(refused, tmp_path):
    refused("nobody/nothing", sd_model="nobody/nothing")
    from common.tiny import WEIGHTS

    refused("clip", sd_model=str(WEIGHTS / "clip"))
    refused("not-there", sd_model=str(tmp_path / "not-there"))


def test_ranges(refused):
    refused("--shots", shots=0)
    refused("--clf-mix-prob", clf_mix_prob=1.5)
    refused("--clf-warmup-epochs", clf_epochs=2, clf_warmup_epochs=2)
    refused("no real image", shots=4, gen_images_per_class=2)
    refused("--n-templates", n_templates=99)


def numeric_fields():
    """All flags of datadream.py that take a number, or None."""
    hints = typing.get_type_hints(dd.Args)
    return [name for name, hint in hints.items() if {int, float} & {hint, *typing.get_args(hint)}]


def refusal(field, value):
    """What checking the flags says about this value of one field of the default run, None if it is taken."""
    try:
        dd.check_args(dataclasses.replace(dd.Args(**dd.PRESETS["digits"]), **{field: value}))
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 2**63, -1, 0, 10**12])
def test_strange_numbers_are_taken_or_refused_by_the_name_of_their_flag(value):
    """Of every numeric flag; any other exception than UserError fails."""
    fields = numeric_fields()
    said = {field: refusal(field, value) for field in fields}
    assert len(fields) > 30 and {"shots", "gen_guidance", "gen_seed", "val_images", "gen_save_size"} <= set(fields)
    for field, text in said.items():
        assert text is None or cli.flag(field) in text and "\n" not in text, f"{field}: {text}"
    refused = {field for field, text in said.items() if text}
    if not abs(value) < 2**63:
        assert refused == set(fields)
    elif value == -1:
        assert refused == set(fields) - {"gen_seed", "gen_guidance"}
    elif value == 0:
        assert {"shots", "sd_lr", "clf_lr", "sd_batch", "gen_steps", "sd_rank", "clf_epochs", "clf_evals"} <= refused
        assert not refused & {"seed", "workers", "sd_warmup", "clf_wd", "clf_mix_prob", "val_images", "gen_guidance"}
    else:
        assert {"clf_mix_prob", "clf_real_weight", "clf_dropout", "n_templates"} <= refused


def test_a_word_for_a_number_is_refused_by_the_name_of_its_flag():
    for field in numeric_fields():
        with pytest.raises(UserError, match=cli.flag(field)):
            cli._parse(dd.Args, dd.PRESETS, "", [cli.flag(field), "nan"])


def test_missing_shots_folder(refused, tmp_path):
    refused("no images of class 'zero'", fewshot_dir=str(tmp_path))


def test_stage_without_the_one_before(tmp_path):
    with pytest.raises(UserError, match="finetune"):
        dd.main(dd.Args(**{**TINY, "output_dir": str(tmp_path / "run"), "stages": ("generate",)}))


def test_folder_that_is_not_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="run"):
        dd.main(dd.Args(**{**TINY, "output_dir": str(tmp_path / "run")}))
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_non_finite_loss_stops_and_keeps_the_checkpoint(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match="finite|nan"):
        dd.main(dd.Args(**{**TINY, "output_dir": str(out), "sd_lr": 1e30, "sd_epochs": 40}))
    assert not list(out.rglob("pytorch_lora_weights.safetensors"))


def test_checkpoint_of_another_model_is_refused(tmp_path):
    from common.checkpoint import load_training, save_training

    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(3, 3)
    save_training(tmp_path / "c.safetensors", dict(small.named_parameters()), torch.optim.AdamW(small.parameters()), 1)
    with pytest.raises(UserError, match="does not fit"):
        optimizer = torch.optim.AdamW(large.parameters())
        load_training(tmp_path / "c.safetensors", dict(large.named_parameters()), optimizer)


@pytest.mark.parametrize(
    "flags, word",
    [(["--preset", "nonsense"], "nonsense"), (["--no-such-flag", "1"], "no-such-flag"), (["--shots", "many"], "shots")],
)
def test_command_line_errors_are_one_line_and_exit_2(launch, tmp_path, flags, word):
    done = launch("datadream.py", *flags, check=False)
    assert done.returncode == 2 and word in done.stderr + done.stdout and "Traceback" not in done.stderr
    assert not list(Path(launch.cwd).iterdir())


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
