"""Copies of real images: names against a count by hand, what is missing, the list of them."""

import json

import pytest
from PIL import Image

from common.copies import Copies
from common.datasets import Images
from common.launch import UserError

LABELS = [0, 0, 0, 2, 2]  # class b has no image
ROWS = [0, 2, 3, 4]  # of the real images; two of class a, two of c


@pytest.fixture
def copies(tmp_path):
    real = Images(LABELS, [f"{'abc'[c]}/{i}" for i, c in enumerate(LABELS)], ["a", "b", "c"])
    return Copies(tmp_path / "images", real, ROWS, 3, ".jpg")


def names_by_hand():
    """Copy after copy of all images of a class, counted through."""
    found = {}
    for c, members in ((0, [0, 2]), (2, [3, 4])):
        pairs = [(i, copy) for copy in range(3) for i in members]
        found |= {pair: f"0{c}_{'abc'[c]}/{j}.jpg" for j, pair in enumerate(pairs)}
    return found


def draw(copies, pairs):
    for i, copy in pairs:
        copies.file(i, copy).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (40 * i, 80 * copy, 0)).save(copies.file(i, copy), quality=95)


def test_names_are_counted_through_class_by_class(copies):
    assert {pair: copies.key(*pair) for pair in names_by_hand()} == names_by_hand()
    with pytest.raises(KeyError):
        copies.key(1, 0)  # a real image, but none of the set's


def test_images_are_the_files(copies):
    draw(copies, names_by_hand())
    for k in (1, 2, None):
        some = copies.images(k)
        assert len(some) == 4 * (k or 3) and some.labels.tolist() == [0] * 2 * (k or 3) + [2] * 2 * (k or 3)
        assert {some.key(j) for j in range(len(some))} == {
            name for (_, copy), name in names_by_hand().items() if copy < (k or 3)
        }
    red, green, _ = copies.images().open(3).getpixel((1, 1))  # class a: 0, 2, then both again: copy 1 of image 2
    assert abs(red - 80) < 6 and abs(green - 80) < 6


def test_what_is_missing_is_missing(copies):
    every = {0: [0, 1, 2], 2: [0, 1, 2], 3: [0, 1, 2], 4: [0, 1, 2]}
    assert copies.missing() == every
    draw(copies, [(0, 0), (0, 1), (0, 2), (2, 1), (3, 0), (4, 2)])
    assert copies.missing() == {2: [0, 2], 3: [1, 2], 4: [0, 1]}
    draw(copies, names_by_hand())
    assert copies.missing() == {}


def test_the_list_says_what_each_file_is(copies):
    draw(copies, names_by_hand())
    copies.write_list(lambda i, copy: dict(source=i, version=copy))
    rows = [json.loads(line) for line in (copies.root / "metadata.jsonl").read_text().splitlines()]
    assert {(row["source"], row["version"]): row["file_name"] for row in rows} == names_by_hand()
    assert all(row["label"] == LABELS[row["source"]] and row["class_name"] == "abc"[row["label"]] for row in rows)
    copies.file(4, 2).unlink()
    with pytest.raises(UserError, match="02_c: images are missing; run the same command again"):
        copies.write_list(lambda i, copy: {})
