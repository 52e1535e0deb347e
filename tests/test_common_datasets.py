"""common/datasets.py: class lists, splits, few-shot selection, decoding, and a clear error for everything bad.

No network and no real archive: each set is written to a temporary folder in the layout that it has on disk, with
pictures of a few pixels.
"""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.error
from pathlib import Path

import archives
import numpy as np
import pytest
import torchvision.datasets
from archives import JPEG, encoded, fill_tree, write
from PIL import Image

from common import datasets, files
from common.datasets import Images, few_shot, few_shot_disef, hold_out, load_dataset, natural_key, open_rgb, verify
from common.files import class_folders
from common.launch import UserError


def name_hash(names):
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def message(call, *args, **kwargs):
    """The text of the UserError that the call must raise: one line unless it lists files."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def check_splits(data):
    """What holds for every dataset -> the sizes of train, val, test."""
    splits = [s for s in (data.train, data.val, data.test) if s is not None]
    keys = [key for split in splits for key in split.keys]
    assert len(keys) == len(set(keys)), "an image is in two splits"
    for split in splits:
        assert split.class_names == data.class_names and len(split) == len(split.keys)
        assert split.labels.dtype == np.int64 and set(split.labels.tolist()) <= set(range(len(data.class_names)))
        assert split[0].mode == "RGB" and split[len(split) - 1].size == split[-1].size
    return len(data.train), None if data.val is None else len(data.val), len(data.test)


# ---------------------------------------------------------------------------------------------
# Names


def test_unknown_dataset_is_named_with_a_suggestion():
    text = message(load_dataset, "cifar")
    assert "unknown dataset 'cifar'" in text and "did you mean 'cifar10'" in text
    assert all(name in text for name in datasets.DATASETS) and "\n" not in text


def test_every_dataset_of_the_list_fails_clearly_where_there_is_nothing(tmp_path):
    for name in datasets.DATASETS:
        if name != "digits":
            text = message(load_dataset, name, tmp_path / "nowhere", download=False)
            assert str(tmp_path) in text and "\n" not in text, name
    assert not (tmp_path / "nowhere").exists(), "a failed call leaves nothing behind"


@pytest.mark.parametrize("name", ["cars", "sun397"])
def test_dead_addresses_say_where_the_files_go(tmp_path, name):
    text = message(load_dataset, name, tmp_path)
    assert "dead" in text and str(tmp_path / datasets.ON_DISK[name].folder) in text


def test_imagenet_subsets_are_positions_in_label_order():
    for name, count in {"imagenet": 1000, "imagenet100": 100, "imagenette": 10, "imagewoof": 10}.items():
        positions = datasets.IMAGENET_SUBSETS[name]
        ordered = positions == sorted(positions)
        assert len(positions) == count == len({*positions} & {*range(1000)}) and ordered == (name != "imagewoof")
    assert datasets.IMAGENET_SUBSETS["imagewoof"][:3] == [193, 182, 258]  # the released code's order


# ---------------------------------------------------------------------------------------------
# Digits


def test_digits_are_fixed_to_the_byte():
    data = load_dataset("digits")
    assert check_splits(data) == (1000, None, 797)
    assert data.class_names == datasets.DIGITS
    assert data.train.pixels.shape == (1000, 32, 32) and data.train.pixels.dtype == np.uint8
    assert set(data.train.keys) | set(data.test.keys) == {f"digits/{i:04d}" for i in range(1797)}
    assert data.train.pixels[:, :, :2].mean() < 8 < 60 < data.train.pixels[:, 12:20, 12:20].mean(), "white on black"
    counts = np.bincount(data.train.labels)
    assert counts.min() >= 80 and data.train[0].size == (32, 32)
    content = (
        data.train.pixels.tobytes()
        + data.test.pixels.tobytes()
        + bytes([*data.train.labels.tolist(), *data.test.labels.tolist()])
    )
    assert hashlib.sha256(content).hexdigest()[:16] == "2f968618ea3d0209"


# ---------------------------------------------------------------------------------------------
# Choosing images


def test_natural_key():
    names = ["a10", "a2", "b1", "a2b10", "a2b9", "10", "9", "a", "a02", "", "a1.5", "ä3", "a٣"]
    ordered = sorted(names, key=natural_key)
    assert ordered.index("a2") < ordered.index("a10") and ordered.index("9") < ordered.index("10")
    assert ordered.index("a2b9") < ordered.index("a2b10") and ordered[0] == ""
    for _ in range(5):  # a total order: any start gives the same result, also for equal numbers (a2, a02)
        random.shuffle(names)
        assert sorted(names, key=natural_key) == ordered


def images_of(counts, name="img"):
    """Images in memory, counts[c] of class c, keys shuffled."""
    items = [(c, f"{name}{c}_{i}.png") for c, count in enumerate(counts) for i in range(count)]
    random.Random(7).shuffle(items)
    labels, keys = [c for c, _ in items], [key for _, key in items]
    pixels = np.zeros((len(items), 2, 2), np.uint8)
    return Images(labels, keys, [f"class {c}" for c in range(len(counts))], pixels=pixels)


def test_few_shot_is_nested_balanced_and_independent_of_the_order():
    images = images_of([40, 25, 16, 33])
    chosen = {}
    for shots in (1, 2, 4, 8, 16):
        picked = images.subset(few_shot(images, "pets", shots, 3, 4))
        assert picked.labels.tolist() == [c for c in range(4) for _ in range(shots)]
        for c in range(4):
            of_class = picked.keys[c * shots : (c + 1) * shots]
            assert of_class == sorted(of_class, key=natural_key)
        chosen[shots] = picked.keys
    for few, many in [(1, 2), (2, 4), (4, 8), (8, 16)]:
        assert set(chosen[few]) < set(chosen[many])
        assert all(chosen[many][c * many : c * many + few] == chosen[few][c * few : (c + 1) * few] for c in range(4))

    shuffled = images.subset(random.Random(1).sample(range(len(images)), len(images)))
    assert shuffled.subset(few_shot(shuffled, "pets", 8, 3, 4)).keys == chosen[8]
    assert images.subset(few_shot(images, "pets", 16, 4, 4)).keys != chosen[16], "the seed counts"
    assert images.subset(few_shot(images, "cars", 16, 3, 4)).keys != chosen[16], "the dataset counts"


def test_few_shot_is_the_documented_draw():
    images = images_of([30, 50])
    for shots in (5, 20):
        expected = []
        for label in range(2):
            keys = sorted((k for k, c in zip(images.keys, images.labels, strict=True) if c == label), key=natural_key)
            drawn = random.Random(f"dtd-11-{label}").sample(keys, max(16, shots))
            expected += sorted(drawn, key=natural_key)[:shots]
        assert images.subset(few_shot(images, "dtd", shots, 11, 2)).keys == expected


def test_few_shot_of_small_classes():
    images = images_of([5, 30])
    assert images.subset(few_shot(images, "x", 5, 0, 2)).labels.tolist() == [0] * 5 + [1] * 5
    text = message(few_shot, images, "x", 6, 0, 2)
    assert "'class 0' has 5" in text and "6" in text
    assert "'class 0'" in message(few_shot_disef, images, "x", 6, 0, 2)
    assert "one or more" in message(few_shot, images, "x", 0, 0, 2)


def test_few_shot_disef_draws_from_one_generator_in_order_of_appearance():
    images = images_of([20, 20, 20])
    rng, expected, seen = random.Random(5), [], []
    for label in images.labels:
        if label not in seen:
            seen.append(label)
            expected += rng.sample([i for i, c in enumerate(images.labels) if c == label], 16)
    assert few_shot_disef(images, "any", 16, 5, 3) == expected


@pytest.mark.parametrize(("amount", "counts"), [(0.2, [8, 4, 1]), (3, [3, 3, 3]), (0.01, [1, 1, 1])])
def test_hold_out_divides_every_class(amount, counts):
    images = images_of([40, 20, 5])
    rest, held = hold_out(images, amount, 0)
    assert np.bincount(held.labels).tolist() == counts
    assert sorted(rest.keys + held.keys) == sorted(images.keys) and not set(rest.keys) & set(held.keys)
    assert [k for k in images.keys if k in set(held.keys)] == held.keys, "the order stays"
    assert hold_out(images, amount, 0)[1].keys == held.keys != hold_out(images, amount, 1)[1].keys
    assert sorted((rest + held).keys) == sorted(images.keys)


def test_hold_out_refuses_to_empty_a_class():
    images = images_of([40, 20, 5])
    for amount in (5, 0, -1, 0.99):
        assert "class" in message(hold_out, images, amount, 0)


def test_images_of_two_datasets_cannot_be_added():
    with pytest.raises(ValueError, match="one dataset"):
        images_of([2, 2]) + images_of([2, 2, 2])


# ---------------------------------------------------------------------------------------------
# Decoding


def pixel(content, at=(0, 0)):
    image = open_rgb(io.BytesIO(content))
    assert image.mode == "RGB"
    return image.getpixel(at)


def test_grey_binary_palette_and_cmyk():
    assert pixel(encoded("L", color=77)) == (77, 77, 77)
    assert pixel(encoded("1", color=1)) == (255, 255, 255)
    assert pixel(encoded("CMYK", color=(0, 255, 255, 0), kind="TIFF")) == (255, 0, 0)
    palette = Image.new("P", (4, 3), 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    assert pixel(buffer.getvalue()) == (10, 20, 30)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=1)
    assert pixel(buffer.getvalue()) == (255, 255, 255), "a transparent palette entry shows the white below"


def test_transparency_is_laid_on_white():
    assert pixel(encoded("RGBA", color=(200, 0, 0, 0))) == (255, 255, 255)
    assert pixel(encoded("RGBA", color=(200, 0, 0, 255))) == (200, 0, 0)
    half = pixel(encoded("RGBA", color=(0, 0, 0, 128)))
    assert half == (127, 127, 127)
    assert pixel(encoded("LA", color=(0, 0))) == (255, 255, 255) and pixel(encoded("LA", color=(7, 255))) == (7, 7, 7)
    assert pixel(encoded("RGB", color=(1, 2, 3), transparency=(1, 2, 3))) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    values = np.array([[0, 257 * 10, 257 * 200, 65535]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    assert [pixel(buffer.getvalue(), (x, 0))[0] for x in range(4)] == [0, 10, 200, 255]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_are_refused(mode):
    assert "32 bits" in message(open_rgb, io.BytesIO(encoded(mode, color=1_000_000, kind="TIFF")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_applied(kind):
    image = Image.new("RGB", (40, 16), "red")
    image.paste("blue", (0, 0, 20, 16))
    for orientation, size, corner in [(1, (40, 16), "b"), (3, (40, 16), "r"), (6, (16, 40), "b"), (8, (16, 40), "r")]:
        exif = Image.Exif()
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        image.save(buffer, kind, exif=exif)
        opened = open_rgb(buffer)
        red, _, blue = opened.getpixel((2, 2))
        assert opened.size == size and ("r" if red > blue else "b") == corner, orientation


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_rgb(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def bad_files(folder):
    """Files that no decoder should accept -> {name: words of the complaint}."""
    noise = np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8)
    for kind in ("JPEG", "PNG"):
        Image.fromarray(noise).save(folder / "whole", kind)
        content = (folder / "whole").read_bytes()
        write(folder / f"cut.{kind.lower()}", content[: len(content) // 2])
    (folder / "whole").unlink()
    write(folder / "empty.jpg", b"")
    write(folder / "text.jpg", b"this is no picture")
    write(folder / "head.jpg", JPEG[:40])
    Image.new("1", (10_000, 9_000)).save(folder / "giant.png")  # 90 million pixels in 11 kB
    Image.new("1", (20_000, 10_000)).save(folder / "bomb.png")
    return {
        "cut.jpeg": "truncated",
        "cut.png": "truncated",
        "empty.jpg": "empty",
        "text.jpg": "not an image",
        "head.jpg": "",
        "giant.png": "pixels",
        "bomb.png": "pixels",
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_named_one_by_one_and_all_together(tmp_path):
    bad = bad_files(tmp_path)
    for name, words in bad.items():
        text = message(open_rgb, tmp_path / name)
        assert str(tmp_path / name) in text and words in text and "\n" not in text
    assert "no such file" in message(open_rgb, tmp_path / "absent.png")

    good = [write(tmp_path / f"good{i}.jpg").name for i in range(3)]
    keys = [*good, *bad]
    images = Images([0] * len(keys), keys, ["a"], tmp_path)
    text = message(verify, images)
    assert text.startswith(f"{len(bad)} of {len(keys)} images in {tmp_path}")
    for line, name in zip(text.split("\n")[1:], bad, strict=True):
        assert line.strip().startswith(f"{name}: ")
    verify(images.subset(range(3)))
    verify(images_of([2, 2]))


def test_error_of_a_bad_file_does_not_hide_the_cause(tmp_path):
    with pytest.raises(UserError) as caught:
        open_rgb(write(tmp_path / "x.png", b"no"))
    assert isinstance(caught.value.__cause__, OSError)


# ---------------------------------------------------------------------------------------------
# Folder


@pytest.fixture
def photos(tmp_path):
    for split, count in {"train": 12, "test": 3}.items():
        for name in ("cat", "big_dog", "c10", "c9"):
            for i in range(count):
                write(tmp_path / split / name / f"{i}.{'JPG' if i % 2 else 'png'}", JPEG if i % 2 else encoded())
    return tmp_path


def test_folder_reads_splits_in_natural_order(photos):
    data = load_dataset("folder", photos)
    assert check_splits(data) == (48, None, 12)
    assert data.class_names == ["big_dog", "c9", "c10", "cat"] and data.note == ""
    assert data.train.keys[:3] == ["train/big_dog/0.png", "train/big_dog/1.JPG", "train/big_dog/2.png"]
    assert data.train.keys[11] == "train/big_dog/11.JPG" and data.train.labels.tolist() == [
        c for c in range(4) for _ in range(12)
    ]
    for name in data.class_names:
        write(photos / "valid" / name / "v.webp", encoded(kind="WEBP"))
    assert check_splits(load_dataset("folder", str(photos))) == (48, 4, 12)


def test_folder_counts_what_it_skips(photos):
    write(photos / "train" / "cat" / ".DS_Store", b"x")
    write(photos / "train" / "cat" / "notes.txt", "x")
    write(photos / "test" / "c9" / "movie.MP4", b"x")
    write(photos / "test" / "Thumbs.db", b"x")
    write(photos / "train" / ".ipynb_checkpoints" / "a.png", b"x")
    data = load_dataset("folder", photos)
    assert len(data.train) == 48 and len(data.test) == 12
    assert data.note == "5 files are no images and were skipped (1 .db, 1 .mp4, 1 .txt, 2 hidden)"


def test_folder_takes_human_names(photos):
    write(photos / "classes.json", json.dumps({"big_dog": "Great Dane", "c9": "F-16A/B"}))
    assert load_dataset("folder", photos).class_names == ["Great Dane", "F-16A/B", "c10", "cat"]
    for content, words in {
        '{"bird": "sparrow"}': "'bird' is no class folder",
        '{"cat": "tiger", "c9": "tiger"}': "two classes are called 'tiger'",
        '["cat"]': "should be",
        '{"cat": 3}': "should be",
        "{": "not JSON",
    }.items():
        write(photos / "classes.json", content)
        text = message(load_dataset, "folder", photos)
        assert words in text and "classes.json" in text


def test_folder_never_takes_the_test_split_from_train(photos):
    (photos / "test").rename(photos / "tests")
    text = message(load_dataset, "folder", photos)
    assert str(photos / "test") in text and "never" in text
    assert "needs a data folder" in message(load_dataset, "folder")
    assert "no such folder" in message(load_dataset, "folder", photos / "nowhere")


def test_folder_classes_must_agree_and_have_images(photos):
    write(photos / "test" / "bird" / "1.png")
    assert "train and test differ in the class folders 'bird'" in message(load_dataset, "folder", photos)
    write(photos / "train" / "bird" / "readme.md", "x")
    text = message(load_dataset, "folder", photos)
    assert str(photos / "train" / "bird") in text and "no images of class 'bird'" in text
    write(photos / "train" / "bird" / "1.png")
    write(photos / "train" / "bird" / "young" / "1.png")
    assert "holds folders" in message(load_dataset, "folder", photos)


def test_folder_with_one_class_is_refused(tmp_path):
    write(tmp_path / "train" / "a" / "1.jpg")
    write(tmp_path / "test" / "a" / "1.jpg")
    assert "at least two" in message(load_dataset, "folder", tmp_path)


def test_fewshot_folder_in_both_layouts(tmp_path):
    names = ["F-16A/B", "F-16A", "baluster / handrail", "Tu-154"]
    for name in names:
        for i in (10, 9, 1):
            write(tmp_path / "official" / name / f"image_{i}.jpg")
    for folder in class_folders(names):
        for i in (10, 9, 1):
            write(tmp_path / "ours" / folder / f"image_{i}.jpg")
    for layout in ("official", "ours"):
        images = datasets.read_fewshot_folder(tmp_path / layout, names)
        assert images.labels.tolist() == [c for c in range(4) for _ in range(3)]
        assert [key.rsplit("_", 1)[1] for key in images.keys[:3]] == ["1.jpg", "9.jpg", "10.jpg"]
        assert images[0].mode == "RGB" and len(set(images.keys)) == 12
    assert images.keys[0].split("/")[0] == class_folders(names)[0]


def test_fewshot_folder_errors(tmp_path):
    write(tmp_path / "cat" / "1.jpg")
    assert "no images of class 'dog'" in message(datasets.read_fewshot_folder, tmp_path, ["cat", "dog"])
    write(tmp_path / "dog" / "1.jpg")
    write(tmp_path / "bird" / "1.jpg")
    assert "'bird' is the folder of no class" in message(datasets.read_fewshot_folder, tmp_path, ["cat", "dog"])
    assert "no such folder" in message(datasets.read_fewshot_folder, tmp_path / "seed1", ["cat", "dog"])
    write(tmp_path.parent / "outside" / "1.jpg")
    for name in ("../outside", "/etc", "cat/../../outside", "x" * 300, "a\0b"):
        assert "no images of class" in message(datasets.read_fewshot_folder, tmp_path, ["cat", "dog", name])


# ---------------------------------------------------------------------------------------------
# Sets on disk, each in its own layout


def check_division(data, per_class):
    """The 50/20/30 division: stratified, and the same again."""
    for split, count in zip((data.train, data.val, data.test), per_class, strict=True):
        assert np.bincount(split.labels).tolist() == [count] * len(data.class_names)
        assert list(split.keys) == sorted(
            split.keys, key=lambda key: (split.labels[list(split.keys).index(key)], natural_key(key))
        )
    assert "50/20/30" in data.note


def test_caltech101(tmp_path):
    folder = archives.caltech101(tmp_path)
    data = load_dataset("caltech101", tmp_path)
    assert check_splits(data) == (500, 200, 300)
    assert name_hash(data.class_names) == "84f9ff49dce58ae6"
    check_division(data, (5, 2, 3))
    again = load_dataset("caltech101", tmp_path)
    assert again.train.keys == data.train.keys and again.test.keys == data.test.keys
    accordion = {k for split in (data.train, data.val, data.test) for k in split.keys if k.startswith("accordion/")}
    assert accordion == {f"accordion/image_{i:04d}.jpg" for i in range(1, 11)}

    (folder / "ant").rename(folder / ".ant")
    assert "99 categories" in message(load_dataset, "caltech101", tmp_path)


@pytest.fixture
def eurosat(tmp_path):
    archives.eurosat(tmp_path)
    return tmp_path


def test_eurosat(eurosat):
    data = load_dataset("eurosat", eurosat)
    assert check_splits(data) == (100, 40, 60)
    assert name_hash(data.class_names) == "5398b285617b672d"
    check_division(data, (10, 4, 6))


def test_dtd(tmp_path):
    folder = archives.dtd(tmp_path)
    data = load_dataset("dtd", tmp_path)
    assert check_splits(data) == (47, 47, 47) and "official" in data.note
    assert name_hash(data.class_names) == "681d23b9cd3c2ede"
    assert data.train.keys[0] == "banded/banded_0001.jpg"

    (folder / "images" / "woven" / "woven_0002.jpg").unlink()
    text = message(load_dataset, "dtd", tmp_path)
    assert "1 images are missing" in text and "woven_0002.jpg" in text


def test_pets(tmp_path):
    archives.pets(tmp_path)
    data = load_dataset("pets", tmp_path)
    assert check_splits(data) == (74, None, 74)
    assert name_hash(data.class_names) == "50be1443390f8a02"
    at = data.test.keys.index("yorkshire_terrier_12.jpg")
    assert data.class_names[data.test.labels[at]] == "Yorkshire Terrier"


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    archives.flowers102(tmp_path)
    monkeypatch.setattr(torchvision.datasets.flowers102, "check_integrity", lambda path, md5=None: True)
    return tmp_path


def test_flowers102(flowers):
    data = load_dataset("flowers102", flowers)
    assert check_splits(data) == (102, 102, 102)
    assert name_hash(data.class_names) == "f7af32ec6960f4b5"
    assert data.train.keys[0] == "image_00003.jpg" and data.train.labels.tolist() == list(range(102))


def test_food101(tmp_path):
    archives.food101(tmp_path)
    data = load_dataset("food101", tmp_path)
    assert check_splits(data) == (101, None, 101)
    assert name_hash(data.class_names) == "efe7060c0e6aa88c"
    assert data.test.keys[0] == "apple_pie/1002.jpg" and data.test.labels[0] == 0


def test_fgvc_aircraft(tmp_path):
    archives.fgvc_aircraft(tmp_path)
    data = load_dataset("fgvc_aircraft", tmp_path)
    assert check_splits(data) == (7, 7, 7)
    assert data.class_names == archives.VARIANTS, "the order of the file, slashes and spaces kept"


def test_cars_put_there_by_hand(tmp_path):
    base = archives.cars(tmp_path)
    data = load_dataset("cars", tmp_path)
    assert check_splits(data) == (4, None, 4)
    assert data.class_names == archives.CARS and data.train.keys[0] == "cars_train/00001.jpg"
    assert data.test.labels.tolist() == [0, 1, 0, 1]

    (base / "devkit" / "cars_meta.mat").unlink()
    text = message(load_dataset, "cars", tmp_path)
    assert "incomplete" in text and "cars_meta.mat" in text


def test_sun397_with_and_without_its_partition(tmp_path):
    base = archives.sun397(tmp_path)
    data = load_dataset("sun397", tmp_path)
    assert check_splits(data) == (20, 8, 12)
    assert data.class_names == ["abbey", "outdoor apartment_building", "indoor_seats theater", "youth_hostel"]
    check_division(data, (5, 2, 3))
    for half, name in enumerate(("Training_01.txt", "Testing_01.txt")):
        lines = [f"{p}/sun_{p[-1]}{i}.jpg\n" for p in archives.PLACES for i in range(half * 5, half * 5 + 5)]
        write(base / name, "".join(lines))
    data = load_dataset("sun397", tmp_path)
    assert check_splits(data) == (20, None, 20) and "official" in data.note
    assert data.train.keys[0] == "a/abbey/sun_y0.jpg"


# ---------------------------------------------------------------------------------------------
# ImageNet


def test_imagenet_and_its_subset_in_the_layout_of_coop(tmp_path):
    wnids = archives.imagenet(tmp_path / "imagenet" / "images", range(1000))
    data = load_dataset("imagenet", tmp_path)
    assert check_splits(data) == (1000, None, 1000)
    assert name_hash(data.class_names) == "9ca08297d28c6afd" and len(set(data.class_names)) == 1000
    assert (
        data.train.labels.tolist() == list(range(1000)) and data.test.keys[7] == f"val/{wnids[7]}/{wnids[7]}_val.JPEG"
    )
    subset = load_dataset("imagenet100", tmp_path)
    positions = datasets.IMAGENET_SUBSETS["imagenet100"]
    assert subset.class_names == [data.class_names[i] for i in positions]
    assert subset.train.keys == [data.train.keys[i] for i in positions] and subset.train.labels.tolist() == list(
        range(100)
    )


def test_imagewoof_and_imagenette_of_fast_ai(tmp_path):
    archives.imagenet(tmp_path / "imagewoof2-160", datasets.IMAGENET_SUBSETS["imagewoof"])
    data = load_dataset("imagewoof", tmp_path)
    assert check_splits(data) == (10, None, 10) and "fast.ai" in data.note
    assert data.class_names[0] == "Australian Terrier" and data.class_names[-1] == "Old English Sheepdog"  # 193, 229
    archives.imagenet(tmp_path / "imagenette2-320", datasets.IMAGENET_SUBSETS["imagenette"])
    data = load_dataset("imagenette", tmp_path)
    assert data.class_names == [
        *["tench", "English Springer Spaniel", "cassette player", "chainsaw", "church"],
        *["French horn", "garbage truck", "gas pump", "golf ball", "parachute"],
    ]


def test_imagenet_errors(tmp_path):
    positions = datasets.IMAGENET_SUBSETS["imagenette"]
    text = message(load_dataset, "imagenet", tmp_path)
    assert "train/n01440764" in text and "val/<wnid>/" in text
    wnids = archives.imagenet(tmp_path, positions, ["train"])
    write(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    assert "sort the validation images" in message(load_dataset, "imagenette", tmp_path)
    archives.imagenet(tmp_path, positions, ["val"])
    (tmp_path / "train" / wnids[701] / f"{wnids[701]}_train.JPEG").unlink()
    assert "no images of class 'parachute'" in message(load_dataset, "imagenette", tmp_path)


# ---------------------------------------------------------------------------------------------
# Split files


def coop_json(folder, rows):
    return write(folder / "split_zhou_EuroSAT.json", json.dumps(rows))


def coop_rows(images_per_split=((1, 2, 3), (4,), (5, 6))):
    rows = {}
    for split, numbers in zip(("train", "val", "test"), images_per_split, strict=True):
        classes = list(enumerate(datasets.EUROSAT.split()))[:: -1 if split == "train" else 1]
        rows[split] = [[f"{name}/{name}_{i}.jpg", label, f"{name} Land"] for label, name in classes for i in numbers]
    return rows


def test_split_file_of_coop(eurosat):
    file = coop_json(eurosat, coop_rows())
    data = load_dataset("eurosat", eurosat, split_file=file)
    assert check_splits(data) == (30, 10, 20) and "split_zhou_EuroSAT.json" in data.note
    assert data.train.keys[:2] == ["SeaLake/SeaLake_1.jpg", "SeaLake/SeaLake_2.jpg"], "the order of the file stays"
    assert data.train.labels[0] == 9 and data.class_names[9] == "SeaLake"

    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert check_splits(load_dataset("eurosat", eurosat, split_file=file)) == (30, 10, 20)
    rows = coop_rows()
    del rows["val"]
    assert load_dataset("eurosat", eurosat, split_file=coop_json(eurosat, rows)).val is None


def test_split_file_of_disef(flowers):
    lines = ["split,filename,class"]
    for split, rest in (("train", 0), ("val", 1), ("test", 2)):
        lines += [f"{split},jpg/image_{i:05d}.jpg,some flower" for i in range(306, 0, -1) if i % 3 == rest]
    data = load_dataset("flowers102", flowers, split_file=write(flowers / "split_coop.csv", "\n".join(lines) + "\n"))
    assert check_splits(data) == (102, 102, 102)
    marked = write(flowers / "marked.csv", "\ufeff" + "\n".join(lines) + "\n")  # as spreadsheets save UTF-8
    assert load_dataset("flowers102", flowers, split_file=marked).train.keys.tolist() == data.train.keys.tolist()
    assert data.train.keys[0] == "image_00306.jpg" and data.train.labels[0] == 101
    chosen = data.train.subset(few_shot_disef(data.train, "flowers102", 1, 1, 102))
    assert chosen.labels.tolist() == list(range(101, -1, -1)), "DISEF's order is that of the file"


def test_split_files_that_do_not_fit(eurosat):
    def error(rows, name="eurosat"):
        return message(load_dataset, name, eurosat, split_file=coop_json(eurosat, rows))

    rows = coop_rows()
    for i in range(5):
        rows["train"].append([f"Forest/lost_{i}.jpg", 1, "Forest"])
    text = error(rows)
    assert "5 of 65 paths" in text and "'Forest/lost_0.jpg'" in text and "and 2 more" in text and "lost_4" not in text

    rows = coop_rows()
    rows["val"][3][1] = 7
    assert "1 of 60 labels" in error(rows) and "7, not 3" in error(rows)
    rows = coop_rows(((1, 2), (3,), (2, 4)))
    assert "10 of 50 images occur twice" in error(rows)
    assert "no training images or no test" in error({**coop_rows(), "test": []})
    rows = coop_rows()
    rows["train"] = [row for row in rows["train"] if row[1] != 4]
    assert "no training images of 1 classes ('Industrial')" in error(rows)
    for nonsense in ({"train": [["only a path"]]}, {"training": [["a", 1, "b"]]}, [1, 2], {"train": {"a": 1}}):
        assert "neither a split_zhou" in error(nonsense)

    for name, content in {
        "bad.json": "{",
        "bad.csv": "a,b\n1,2\n",
        "rows.csv": "split,filename\nvalidation,x.jpg\n",
    }.items():
        assert "neither" in message(load_dataset, "eurosat", eurosat, split_file=write(eurosat / name, content))
    assert "No such file" in message(load_dataset, "eurosat", eurosat, split_file=eurosat / "none.json")
    for name in ("digits", "cifar10", "imagenet", "folder"):
        assert "no meaning" in message(load_dataset, name, eurosat, split_file="x.json")


def test_split_file_of_many_paths_takes_no_time(tmp_path):
    names = datasets.EUROSAT.split()
    labels = {f"{name}/{name}_{i}.jpg": label for label, name in enumerate(names) for i in range(10_000)}
    rows = [[key, label, "x"] for key, label in labels.items()]
    file = coop_json(tmp_path, {"train": rows[::2], "test": rows[1::2]})
    start = time.process_time()
    keys = datasets._read_split_file(file, labels, "eurosat")
    assert len(keys["train"]) == len(keys["test"]) == 50_000
    assert time.process_time() - start < 10, "100,000 look-ups: quadratic would be minutes"


# ---------------------------------------------------------------------------------------------
# Sets in memory


def test_cifar_from_its_pickled_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    rng, base = np.random.RandomState(0), tmp_path / "cifar-10-batches-py"
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {"data": rng.randint(0, 255, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        write(base / name, pickle.dumps(batch))
    write(base / "batches.meta", pickle.dumps({"label_names": datasets.CIFAR10}))
    data = load_dataset("cifar10", tmp_path)
    assert check_splits(data) == (100, None, 20)
    assert data.class_names == datasets.CIFAR10 and data.train.pixels.shape == (100, 32, 32, 3)
    assert data.train.keys[7] == "train/00007" and data.train[7].getpixel((1, 0)) == tuple(data.train.pixels[7, 0, 1])

    base, fine = tmp_path / "cifar-100-python", [f"c{i:02d}" for i in range(100)]
    for name in ("train", "test"):
        batch = {"data": rng.randint(0, 255, (100, 3072), dtype=np.uint8), "fine_labels": list(range(100))}
        write(base / name, pickle.dumps(batch))
    write(base / "meta", pickle.dumps({"fine_label_names": fine}))
    data = load_dataset("cifar100", tmp_path)
    assert check_splits(data) == (100, None, 100) and data.class_names == fine


def test_cifar10_from_folders_of_files(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        fill_tree(tmp_path / split, datasets.CIFAR10, count)
    data = load_dataset("cifar10", tmp_path)
    assert check_splits(data) == (30, None, 20) and "not the original" in data.note
    assert data.name == "cifar10" and data.class_names == datasets.CIFAR10


def test_stl10(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.stl10, "check_integrity", lambda path, md5=None: True)
    base, names = tmp_path / "stl10_binary", "airplane bird car cat deer dog horse monkey ship truck".split()
    pictures = np.random.RandomState(0).randint(0, 255, (10, 3, 96, 96), dtype=np.uint8)  # stored column by column
    for split in ("train", "test"):
        write(base / f"{split}_X.bin", pictures.tobytes())
        write(base / f"{split}_y.bin", bytes(range(1, 11)))
    write(base / "class_names.txt", "\n".join(names))
    data = load_dataset("stl10", tmp_path)
    assert check_splits(data) == (10, None, 10) and data.class_names == names
    assert data.test[4].size == (96, 96) and data.test[4].getpixel((5, 9)) == tuple(pictures[4, :, 5, 9])


def test_fashionmnist(tmp_path):
    base = tmp_path / "FashionMNIST" / "raw"
    for name, count in (("train", 30), ("t10k", 10)):
        head = b"\x00\x00\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        write(base / f"{name}-images-idx3-ubyte", head + bytes([9]) * (count * 784))
        labels = b"\x00\x00\x08\x01" + count.to_bytes(4, "big") + bytes(i % 10 for i in range(count))
        write(base / f"{name}-labels-idx1-ubyte", labels)
    data = load_dataset("fashionmnist", tmp_path)
    assert check_splits(data) == (30, None, 10) and data.class_names[0] == "T-shirt/top"
    assert data.train[0].getpixel((3, 3)) == (9, 9, 9)


# ---------------------------------------------------------------------------------------------
# Downloads: never over a real network


def test_no_network_is_one_line_that_says_what_to_do(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(datasets.urllib.request, "urlopen", unreachable)
    for name in [*datasets.IN_MEMORY, *(n for n, source in datasets.ON_DISK.items() if source.url), "imagenette"]:
        text = message(load_dataset, name, tmp_path / "data")
        assert "out of reach (Name or service not known)" in text and "\n" not in text, name
        assert "http" in text and str(tmp_path / "data") in text
    assert not (tmp_path / "data").exists(), "nothing is written"


def test_a_server_that_does_not_answer_is_given_up_in_seconds(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, then is silent
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.tar.gz"
        monkeypatch.setitem(datasets.ON_DISK, "dtd", datasets.Source("DTD", "dtd/dtd/images", url, {"train": {}}))
        monkeypatch.setattr(datasets, "PROBE_SECONDS", 0.3)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        start = time.perf_counter()
        assert "out of reach (timed out)" in message(load_dataset, "dtd", tmp_path)
        assert time.perf_counter() - start < 30


class FakeCifar:
    """Stands in for torchvision's class: a download that takes a moment and counts itself. As with the real ones, a
    folder that is still being filled passes for complete."""

    downloads = 0
    classes = datasets.CIFAR10

    def __init__(self, root, train, download):
        folder = root / "cifar-10-batches-py"
        if not folder.exists() and not download:
            raise RuntimeError("Dataset not found or corrupted.")
        if not (folder / "done").exists() and download:
            FakeCifar.downloads += 1
            folder.mkdir()
            time.sleep(0.5)
            (folder / "done").touch()
        count = 10 if (folder / "done").exists() else 3
        self.data, self.targets = np.zeros((count, 32, 32, 3), np.uint8), list(range(count))


def test_processes_that_start_together_download_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar)
    monkeypatch.setattr(datasets.urllib.request, "urlopen", lambda *args, **kwargs: io.BytesIO())
    FakeCifar.downloads, sizes = 0, []
    threads = [
        threading.Thread(target=lambda: sizes.append(len(load_dataset("cifar10", tmp_path).train))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.05)  # the later ones find a half-finished folder
    for thread in threads:
        thread.join()
    assert sizes == [10, 10, 10] and FakeCifar.downloads == 1


def test_a_download_that_breaks_off_is_reported(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, root, train, download):
            raise RuntimeError("File not found or\ncorrupted.")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Broken)
    monkeypatch.setattr(datasets.urllib.request, "urlopen", lambda *args, **kwargs: io.BytesIO())
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(77)
    text = message(load_dataset, "cifar10", tmp_path)
    assert "download failed (File not found or corrupted.)" in text and "cifar-10-python.tar.gz" in text
    assert socket.getdefaulttimeout() == 77, "the time-out of the process is as it was"
    socket.setdefaulttimeout(before)


# ---------------------------------------------------------------------------------------------
# Lists: a million images are a few arrays


def test_keys_are_strings_in_two_arrays(tmp_path):
    names = ["train/cat/1.jpg", "ä/é.png", "", os.fsdecode(b"latin-\xe9.jpg"), "日本.webp"]
    keys = datasets.Keys(names)
    assert keys == names and list(keys) == names and keys != names[::-1] and len(keys) == 5
    assert keys[3] == names[3] and keys[-1] == names[-1] and keys[1:3] == names[1:3]
    assert keys.take(np.array([4, 4, 0])) == ["日本.webp", "日本.webp", "train/cat/1.jpg"]
    assert keys + datasets.Keys(["x"]) == [*names, "x"] and "日本.webp" in keys and keys.index("") == 2
    with pytest.raises(IndexError):
        keys[5]
    files.write_json(tmp_path / "keys.json", {"chosen": keys})
    assert json.loads((tmp_path / "keys.json").read_text()) == {"chosen": names}


def test_images_travel_as_a_few_arrays():
    images = images_of([300, 200, 500])
    rows = images.of_class(1)
    assert rows.tolist() == [i for i, label in enumerate(images.labels) if label == 1] and rows is images.of_class(1)
    there = pickle.loads(pickle.dumps(images))
    assert there.keys == images.keys and there[999].size == (2, 2) and there._rows is None
    nameless = Images(images.labels, images.keys, images.class_names, Path("/x"))
    assert len(pickle.dumps(nameless)) < len(images) * (8 + 8 + 12) + 2000
    assert images.subset([-1, 0]).keys == [images.keys[999], images.keys[0]]
    assert images.subset(images.labels == 1).labels.tolist() == [1] * 200 and len(images.subset([])) == 0
    with pytest.raises(IndexError):
        images.subset([1000])


def test_generated_images_are_a_formula(tmp_path):
    names = ["sea lake", "C#", "C++"]
    some = datasets.Generated(tmp_path / "images", names, 2, ".jpg")
    assert some.labels.tolist() == [0, 0, 1, 1, 2, 2] and some.of_class(1).tolist() == [2, 3]
    assert [some.key(i) for i in range(6)] == [f"{f}/{k}.jpg" for f in class_folders(names) for k in range(2)]
    write(tmp_path / "images" / class_folders(names)[1] / "1.jpg", encoded(color=(9, 200, 9), kind="JPEG"))
    assert some[3].getpixel((0, 0))[1] > 150 and "no such file" in message(some.open, 2)
    uneven = datasets.Generated(tmp_path, names, [1, 0, 3])
    assert [uneven.key(i).split("/")[1] for i in range(4)] == ["0.png", "0.png", "1.png", "2.png"]
    assert uneven.labels.tolist() == [0, 2, 2, 2] and len(uneven.of_class(1)) == 0
    assert len(pickle.loads(pickle.dumps(uneven))) == 4


def test_concat_is_one_list_of_several():
    a, b = (Images(labels, ["x"] * len(labels), ["a", "b"], None, np.full((len(labels), 2, 2), value, np.uint8))
            for labels, value in (([0, 1], 10), ([1], 20)))  # fmt: skip
    several = datasets.Concat([a, b, b.subset([]), b])
    assert several.labels.tolist() == [0, 1, 1, 1] and several.of_class(1).tolist() == [1, 2, 3]
    assert [several[i].getpixel((0, 0))[0] for i in range(4)] == [10, 10, 20, 20]
    assert [several.source_of(i) for i in range(4)] == [0, 0, 1, 3]


def test_natural_order_has_a_fast_way_with_the_same_result():
    rng = random.Random(0)
    makers = [
        lambda: f"n01440764_{rng.randrange(3000)}.JPEG",
        lambda: f"{rng.randrange(30):0{rng.randrange(1, 4)}d}.jpg",
        lambda: f"a{rng.randrange(20)}" + rng.choice([".jpg", ".jpg", ".png", "b.jpg"]),
        lambda: rng.choice(["a", "a1", "a01", "a٣1", "a1٣", "٣1.jpg", "c10", "c20", "1", "10", ""]),
        lambda: f"img_{rng.randrange(5)}_{rng.randrange(20)}.jp2",
    ]
    for trial in range(400):
        names = [makers[trial % 5]() for _ in range(rng.randrange(1, 12))]
        expected = sorted(range(len(names)), key=lambda i: natural_key(names[i]))
        assert datasets.natural_order(names) == expected, names
    assert datasets.natural_order(["100.jpg", "12.jpg", "107.jpg"]) == [1, 0, 2], "a common 1 is part of the number"


def test_sizes_of_every_dataset_are_known():
    assert set(datasets.SIZES) == set(datasets.DATASETS) - {"folder"}
    data = load_dataset("digits")
    assert datasets.SIZES["digits"] == (len(data.class_names), len(data.train), 0, len(data.test))
    for name, positions in datasets.IMAGENET_SUBSETS.items():
        assert datasets.SIZES[name][0] == len(positions) and datasets.SIZES[name][3] == 50 * len(positions)
    for name, about in datasets.MEDMNIST.items():
        assert datasets.SIZES[name][0] == len(about.split(", "))


def test_many_files_are_listed_and_chosen_in_seconds(tmp_path):
    for c in range(2):
        (tmp_path / "train" / f"n0{c}").mkdir(parents=True)
        for i in range(5_000):
            (tmp_path / "train" / f"n0{c}" / f"n0{c}_{i}.JPEG").touch()
    start = time.process_time()
    images, _ = datasets._read_tree(tmp_path, "train", ["n00", "n01"], ["a", "b"])
    assert time.process_time() - start < 1 and images.keys[9_999] == "train/n01/n01_4999.JPEG"
    images = Images(np.arange(300_000) % 1000, (f"{i % 1000}/{i}.JPEG" for i in range(300_000)), list("a" * 1000), "x")
    start = time.process_time()
    rest, held = hold_out(images, 0.2, 0)
    assert len(few_shot(images, "imagenet", 16, 0, 1000)) == 16_000 and len(held) == 60_000
    assert time.process_time() - start < 15, "quadratic would be minutes"


# ---------------------------------------------------------------------------------------------
# The same picture twice, and another picture than before


def noise(seed, kind="JPEG"):
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def tree(root, pictures):
    """Images of a folder; pictures: {key: seed of the noise in it}."""
    for key, seed in pictures.items():
        write(root / key, noise(seed))
    return Images([0] * len(pictures), list(pictures), ["a"], root)


def test_copies_are_found_under_any_name(tmp_path, monkeypatch):
    train = tree(tmp_path / "t", {f"{i}.jpg": i for i in range(8)})
    shots = tree(tmp_path / "s", {"x.jpg": 5, "y/z.jpg": 2, "new.jpg": 99})
    read, whole = [], datasets._content
    monkeypatch.setattr(datasets, "_content", lambda images, row: read.append(images.keys[row]) or whole(images, row))
    assert datasets.duplicates(shots, train).tolist() == [2, 5] and datasets.duplicates(train, shots).tolist() == [0, 1]
    assert len(read) == 8, "only what has the size and the end of another file is read to its end"
    assert datasets.without(train, shots).keys == [f"{i}.jpg" for i in (0, 1, 3, 4, 6, 7)]
    assert datasets.without(train, train.subset([])).keys == train.keys
    note = datasets.overlap({"shots": shots, "validation": None, "test": train})
    assert note == "the same pictures in two splits: 2 of test are in shots too ('2.jpg', '5.jpg')"
    assert datasets.overlap({"shots": shots, "test": train.subset([0])}) == ""
    (tmp_path / "t" / "3.jpg").unlink()
    assert "3.jpg" in message(datasets.without, train, shots)


def test_files_of_one_size_and_end_are_not_taken_for_copies(tmp_path):
    for name, grey in (("a.ppm", 1), ("b.ppm", 2)):
        image = Image.new("RGB", (64, 64), "white")
        image.putpixel((0, 0), (grey, grey, grey))
        image.save(tmp_path / name)
    a, b = (Images([0], [name], ["x"], tmp_path) for name in ("a.ppm", "b.ppm"))
    assert len(datasets.duplicates(a, b)) == 0 and len(datasets.duplicates(a, a)) == 1


def test_saved_shots_are_taken_out_of_a_set_in_memory(tmp_path):
    data = load_dataset("digits")
    for i in (3, 500):
        (tmp_path / "0").mkdir(exist_ok=True)
        data.train[i].save(tmp_path / "0" / f"{i}.png")
    shots = Images([0, 0], ["0/3.png", "0/500.png"], ["zero"], tmp_path)
    assert (
        datasets.duplicates(shots, data.train).tolist() == [3, 500] and len(datasets.duplicates(shots, data.test)) == 0
    )
    assert len(datasets.without(data.train, shots)) == 998


def test_a_run_is_held_to_its_images(tmp_path, monkeypatch):
    train = tree(tmp_path / "d", {f"{i}.jpg": i for i in range(5)})
    digits, file, counted = load_dataset("digits").test, tmp_path / "run" / "data.safetensors", []

    def check(classes=("a", "b"), train=train, test=digits):
        datasets.unchanged(file, list(classes), {"train": train, "val": None, "test": test}, counted.append)

    check()
    assert sum(counted) == 5 + 797
    content = file.read_bytes()
    read, whole = [], datasets._content
    monkeypatch.setattr(datasets, "_content", lambda images, row: read.append(row) or whole(images, row))
    check()
    assert len(read) == 797 and file.read_bytes() == content, "files with the size and time of before are not read"
    os.utime(tmp_path / "d" / "1.jpg", (1, 1))
    check()
    assert len(read) == 2 * 797 + 1
    check()
    assert len(read) == 3 * 797 + 1

    write(tmp_path / "d" / "3.jpg", noise(77))
    assert "train: 1 with another content ('3.jpg')" in message(check) and str(file) in message(check)
    write(tmp_path / "d" / "3.jpg", noise(3))
    check()
    a, b = noise(0), noise(1)
    write(tmp_path / "d" / "0.jpg", b), write(tmp_path / "d" / "1.jpg", a)
    assert "train: 2 with another content" in message(check)
    write(tmp_path / "d" / "0.jpg", a), write(tmp_path / "d" / "1.jpg", b)
    assert "train: 1 removed ('1.jpg')" in message(check, train=train.subset([0, 2, 3, 4]))
    assert "train: 1 added ('9.jpg')" in message(
        check, train=tree(tmp_path / "d", {f"{i}.jpg": i for i in [*range(5), 9]})
    )
    assert "train: another order" in message(check, train=train.subset([4, 3, 2, 1, 0]))
    other = Images([0, 0, 1, 0, 0], train.keys, ["a"], train.root)
    assert "train: 1 with another label ('2.jpg')" in message(check, train=other)
    assert "classes ('b', 'c')" in message(check, classes=("a", "c"))
    brighter = Images(digits.labels, digits.keys, digits.class_names, pixels=digits.pixels // 2)
    assert "test: 797 with another content" in message(check, test=brighter)
    assert "test: 797 removed" in message(check, test=None)
    check()
    os.mkfifo(tmp_path / "d" / "f.jpg")
    assert "no regular file" in message(
        datasets.unchanged, tmp_path / "x", ["a"], {"train": Images([0], ["f.jpg"], ["a"], tmp_path / "d")}
    )


# ---------------------------------------------------------------------------------------------
# Ready-made shots


def test_ready_made_shots_are_found_in_the_layout_of_the_authors(tmp_path):
    find = datasets.find_fewshot
    shots = tmp_path / "real_train_fewshot" / "seed1"
    write(shots / "cat" / "1.jpg")
    assert find(None, None, 1) is None and find(None, str(tmp_path / "no"), 1) is None
    assert find(None, str(tmp_path), 1) == shots, "from --data-dir alone"
    assert find(None, str(tmp_path.parent), 1, tmp_path.name) == shots, "data/<dataset>/real_train_fewshot"
    for given in (tmp_path, shots.parent, shots):
        assert find(str(given), None, 1) == shots
    for given, data_dir in ((tmp_path, None), (shots.parent, None), (None, tmp_path)):
        text = message(find, given and str(given), data_dir and str(data_dir), 0)
        assert "no shots of seed0, only 'seed1'" in text and "--fewshot-seed" in text
    assert "--fewshot-seed 1" in message(find, str(shots), None, 0)
    assert find(str(shots / "cat"), None, 0) == shots / "cat", "any other folder is taken at its word"
    write(tmp_path / "seed0" / "cat" / "1.jpg")
    assert find(None, str(tmp_path), 1) == shots and find(str(tmp_path), None, 1) == shots


def test_fewshot_folders_in_both_spellings_of_unicode(tmp_path):
    names = ["café", "crème/brûlée", "tea"]
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        for name in names:
            write(tmp_path / form / unicodedata.normalize(form, name) / "1.jpg")
        images = datasets.read_fewshot_folder(tmp_path / form, [unicodedata.normalize(other, name) for name in names])
        assert images.labels.tolist() == [0, 1, 2] and images[1].mode == "RGB"


def test_test_images_suffice_where_the_shots_come_from_elsewhere(tmp_path):
    fill_tree(tmp_path / "test", ["cat", "dog"], 2)
    assert "train" in message(load_dataset, "folder", tmp_path)
    data = load_dataset("folder", tmp_path, train_needed=False)
    assert data.train is None and data.val is None and data.class_names == ["cat", "dog"] and len(data.test) == 4
    fill_tree(tmp_path / "train", ["cat"], 2)
    data = load_dataset("folder", tmp_path, train_needed=False)
    assert data.train is None and "train is not used" in data.note and "'dog'" in data.note
    fill_tree(tmp_path / "train", ["dog"], 2)
    assert len(load_dataset("folder", tmp_path, train_needed=False).train) == 4
    shutil.rmtree(tmp_path / "test" / "dog")
    write(tmp_path / "test" / "cow" / "1.jpg")
    assert load_dataset("folder", tmp_path, train_needed=False).train is None

    archives.imagenet(tmp_path / "imagenet", datasets.IMAGENET_SUBSETS["imagenette"], ["val"])
    assert "train/n01440764" in message(load_dataset, "imagewoof", tmp_path).replace("n02096294", "n01440764")
    data = load_dataset("imagenette", tmp_path, download=False, train_needed=False)
    assert data.train is None and len(data.test) == 10 == len(data.class_names)


def test_test_images_suffice_for_sets_on_disk(tmp_path):
    base = tmp_path / "dtd" / "dtd"
    for i, split in enumerate(("train", "val", "test"), 1):
        write(base / "labels" / f"{split}1.txt", "".join(f"{name}/{name}_{i:04d}.jpg\n" for name in archives.TEXTURES))
    for name in archives.TEXTURES:
        write(base / "images" / name / f"{name}_0003.jpg")
    assert "94 images are missing" in message(load_dataset, "dtd", tmp_path, download=False)
    data = load_dataset("dtd", tmp_path, download=False, train_needed=False)
    assert data.train is None and data.val is None and len(data.test) == 47
    (base / "images" / "banded" / "banded_0003.jpg").unlink()
    assert "1 images are missing" in message(load_dataset, "dtd", tmp_path, download=False, train_needed=False)

    fill_tree(tmp_path / "eurosat" / "2750", datasets.EUROSAT.split(), 6)
    for name in datasets.EUROSAT.split():
        (tmp_path / "eurosat" / "2750" / name / f"{name}_1.jpg").unlink()
    file = coop_json(tmp_path, coop_rows())
    assert "10 of 60 paths" in message(load_dataset, "eurosat", tmp_path, file)
    data = load_dataset("eurosat", tmp_path, file, train_needed=False)
    assert data.train is None and len(data.val) == 10 and len(data.test) == 20


# ---------------------------------------------------------------------------------------------
# Folders as they are found on disks


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def fifo(path, _=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


LATIN = os.fsdecode(b"caf\xe9")
BAD_FOLDERS = {
    "class folder is a dangling link": (link, "train/cow", "nowhere", "train/cow: a link to nothing"),
    "class folder is a loop": (link, "train/cow", "cow", "train/cow: a link that leads in a circle"),
    "class folder is a FIFO": (fifo, "train/cow", None, "train/cow: no regular file"),
    "class of dots": (write, "train/.../1.jpg", JPEG, "train/...: dots alone"),
    "class folder in Latin-1": (write, f"train/{LATIN}/1.jpg", JPEG, "is not named in UTF-8"),
    "picture is a dangling link": (link, "train/cat/l.jpg", "nowhere", "train/cat: 'l.jpg: a link to nothing'"),
    "picture is a loop": (link, "test/dog/l.jpg", "l.jpg", "test/dog: 'l.jpg: a link that leads in a circle'"),
    "picture is a FIFO": (fifo, "test/dog/l.jpg", None, "test/dog: 'l.jpg: no regular file'"),
    "class folder leads back": (link, "train/cat/up", "..", "train/cat holds folders"),
    "two spellings": (write, "train/cafe\u0301/1.jpg", JPEG, "two folders are called"),
    "classes.json is a folder": (write, "classes.json/1.jpg", JPEG, "classes.json: not a file"),
    "classes.json is a FIFO": (fifo, "classes.json", None, "classes.json: not a file"),
    "classes.json in Latin-1": (write, "classes.json", b'{"cat": "caf\xe9"}', "classes.json: damaged, not JSON"),
    "classes.json is nested": (write, "classes.json", "[" * 100_000, "classes.json: damaged, not JSON"),
    "classes.json without a name": (write, "classes.json", '{"cat": "..."}', "classes.json: should be"),
    "classes.json with half a character": (write, "classes.json", '{"cat": "\\ud800"}', "is no Unicode text"),
    "pictures of other kinds": (write, "train/cow/1.HEIC", b"x", "kinds that cannot be read (1 .heic)"),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_bad_folders_are_told_in_one_line(tmp_path, kind):
    make, path, content, words = BAD_FOLDERS[kind]
    for split in ("train", "test"):
        fill_tree(tmp_path / split, ["cat", "dog", "café"], 2)
    make(tmp_path / path, content)
    if kind == "pictures of other kinds":
        write(tmp_path / "test" / "cow" / "1.jpg")
    text = message(load_dataset, "folder", tmp_path)
    assert words in text and "\n" not in text and text.encode()


def test_data_dir_must_be_a_folder(tmp_path):
    write(tmp_path / "file.txt", "x")
    link(tmp_path / "link", "nowhere")
    for name in set(datasets.DATASETS) - {"digits"}:
        for place in ("file.txt", "link"):
            assert "not a folder" in message(load_dataset, name, tmp_path / place)
    for name in ("folder", "cifar10", "dtd", "imagenet"):
        for place in ("x" * 300, "a\0b", LATIN, "~nobody-of-this-name/x"):
            text = message(load_dataset, name, place, download=False)
            assert "\n" not in text and text.encode()


def test_names_of_other_disks_are_read(tmp_path):
    for form, split in (("NFC", "train"), ("NFD", "test")):  # macOS, and everything else
        for name in ("café", "tea"):
            write(tmp_path / split / unicodedata.normalize(form, name) / f"{LATIN}.jpg")
            write(tmp_path / split / unicodedata.normalize(form, name) / "1.jpg")
    write(tmp_path / "classes.json", json.dumps({unicodedata.normalize("NFD", "café"): "coffee house"}))
    link(tmp_path / "train" / "tea" / "l.jpg", tmp_path / "test" / "tea" / "1.jpg")
    data = load_dataset("folder", tmp_path)
    assert check_splits(data) == (5, None, 4) and data.class_names == ["coffee house", "tea"]
    assert data.train.keys[1] == f"train/café/{LATIN}.jpg" and data.train[1].mode == "RGB"


def test_split_files_that_are_none(eurosat):
    (eurosat / "folder.json").mkdir()
    fifo(eurosat / "pipe.csv")
    deep = '{"train": ' + "[" * 100_000
    rows = {"test": [["Forest/Forest_1.jpg", 1e999, "x"]], "train": []}
    half = {"test": [["\ud800.jpg", 1, "x"]], "train": [["Forest/Forest_1.jpg", 1, "x"]]}
    for name, content, words in (
        ("folder.json", None, "not a file"),
        ("pipe.csv", None, "not a file"),
        ("deep.json", deep, "neither"),
        ("inf.json", json.dumps(rows), "neither"),
        ("half.json", json.dumps(half), "1 of 2 paths"),
        ("huge.csv", "split,filename\ntrain," + "x" * 200_000, "neither"),
        ("nul.csv", b"split,filename\ntrain,\0\n", "1 of 1 paths"),
        ("latin.csv", b"split,filename\ntrain,\xe9\n", "neither"),
    ):
        file = eurosat / name if content is None else write(eurosat / name, content)
        text = message(load_dataset, "eurosat", eurosat, split_file=file)
        assert words in text and "\n" not in text and text.encode(), name


# ---------------------------------------------------------------------------------------------
# MedMNIST and CINIC-10


def test_medmnist(tmp_path, monkeypatch):
    arrays = {}
    for split, n in (("train", 9), ("val", 4), ("test", 5)):
        labels = np.arange(n)[:, None] % 2
        pixels = np.random.RandomState(n).randint(0, 255, (n, 28, 28), dtype=np.uint8)
        arrays |= {f"{split}_images": pixels, f"{split}_labels": labels.astype(np.uint8)}
    np.savez(tmp_path / "breastmnist.npz", **arrays)
    data = load_dataset("breastmnist", tmp_path)
    assert check_splits(data) == (9, 4, 5) and data.class_names == ["malignant", "normal or benign"]
    assert data.test.keys[3] == "test/000003" and data.test.labels.tolist() == [0, 1, 0, 1, 0]

    np.savez(tmp_path / "breastmnist.npz", **{**arrays, "val_labels": arrays["val_labels"] + 2})
    assert "its val images or labels are others" in message(load_dataset, "breastmnist", tmp_path, download=False)
    write(tmp_path / "pathmnist.npz", pickle.dumps([1]))
    for name in ("pathmnist", "dermamnist"):
        text = message(load_dataset, name, tmp_path, download=False)
        assert str(tmp_path / f"{name}.npz") in text and "zenodo.org" in text and "\n" not in text
    monkeypatch.setattr(datasets.urllib.request, "urlopen", lambda *args, **kwargs: io.BytesIO())
    urls = []

    def download_url(url, root, filename, md5):
        urls.append((url, md5))
        np.savez(root / filename, **{key: array.repeat(2, axis=0) for key, array in arrays.items()})

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download_url)
    assert "no training images of 6 classes" in message(load_dataset, "bloodmnist", tmp_path / "new")
    assert urls[0][0].endswith("bloodmnist.npz?download=1") and len(urls[0][1]) == 32


def test_cinic10(tmp_path):
    assert "unpack CINIC-10.tar.gz" in message(load_dataset, "cinic10", tmp_path)
    for split in ("train", "valid", "test"):
        fill_tree(tmp_path / "CINIC-10" / split, datasets.CIFAR10, 2)
    for place in (tmp_path, tmp_path / "CINIC-10"):
        data = load_dataset("cinic10", place)
        assert check_splits(data) == (20, 20, 20) and data.name == "cinic10" and data.class_names == datasets.CIFAR10
    for split in ("train", "valid", "test"):
        (tmp_path / "CINIC-10" / split / "cat").rename(tmp_path / "CINIC-10" / split / "zebra")
    assert "are not airplane" in message(load_dataset, "cinic10", tmp_path)


def test_the_benchmark_of_the_lists_runs():
    command = [sys.executable, str(Path(__file__).with_name("benchmark_scale.py")), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in ("data set made in memory", "metadata.jsonl", "listing", "resume", "ms", "2 processes"):
        assert line in done.stdout
