"""Features of a list of images: CLIP's own numbers, parts that are not made twice, and another key for all else."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import features as module
from common import models
from common.clip import load_clip, zero_shot_weights
from common.datasets import Generated, Images
from common.distributed import Dist
from common.features import Features, Latest, last_share, list_key, tower_features
from common.launch import UserError

ONE = Dist(rank=0, world=1, local_rank=0, device=torch.device("cpu"))


def close(a, b, tol):
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max().item() <= tol


def noise(n=10):
    pixels = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    return Images([k % 2 for k in range(n)], map(str, range(n)), ["a", "b"], pixels=pixels)


def test_features_of_another_clip_are_refused_and_parts_are_not_made_twice(tmp_path, monkeypatch):
    clip, images = load_clip("tiny"), noise()
    monkeypatch.setattr(module, "PART", 4)
    W = 100 * zero_shot_weights(clip, ["zero", "one"], ["a photo of a {}"])
    more = lambda f, y: {"p": (F.normalize(f, dim=1) @ W.T).softmax(1).gather(1, y[:, None])[:, 0]}  # noqa: E731
    features = Features(tmp_path, [clip, clip], images, 3, 0)
    features.write(ONE, more)
    with torch.no_grad():
        plain = clip.model.encode_image(torch.stack([clip.preprocess(images[i]) for i in range(10)]))
    close(features.read("features"), plain, 1e-4)
    close(features.read("features", np.array([1, 5, 9])), plain[[1, 5, 9]], 1e-4)
    close(features.read("p"), (F.normalize(plain, dim=1) @ W.T).softmax(1)[range(10), images.labels], 1e-4)
    files = sorted(tmp_path.iterdir())
    before = [f.stat().st_mtime_ns for f in files]
    files[1].unlink()
    features.write(ONE, more)
    same = [f.stat().st_mtime_ns == t for f, t in zip(files, before, strict=True)]
    assert len(files) == 3 and same == [True, False, True]
    other = Features(tmp_path, [clip, clip], noise(9), 3, 0)
    monkeypatch.setattr(models, "fingerprint", lambda where: "another")
    for strange in (other, Features(tmp_path, [clip, clip], images, 3, 0)):
        with pytest.raises(UserError, match="another CLIP"):
            strange.read("features")


def test_the_last_clip_judges_and_the_first_gives_the_features(tmp_path):
    first, second, images = load_clip("tiny"), load_clip("tiny"), noise()
    with torch.no_grad():
        for p in second.model.visual.parameters():
            p.mul_(1.1)
    one, two, both = (
        Features(tmp_path / str(i), clips, images, 4, 0) for i, clips in enumerate(([first], [second], [first, second]))
    )
    for features in (one, two, both):
        features.write(ONE, lambda f, y: {"seen": f + y[:, None]})
    assert torch.equal(both.read("features"), one.read("features"))
    assert torch.equal(both.read("seen"), two.read("seen")) and not torch.equal(two.read("seen"), one.read("seen"))
    plain = Features(tmp_path / "plain", [first, second], images, 4, 0)
    plain.write(ONE)  # without a judge the second CLIP sees nothing
    assert torch.equal(plain.read("features"), one.read("features"))


def test_a_list_is_known_by_its_names_and_a_generated_one_by_its_formula(tmp_path):
    images = noise()
    assert list_key(images) == list_key(noise()) != list_key(images.subset(range(5)))
    drawn = [Generated(tmp_path / name, ["a", "b"], n) for name, n in (("le", 3), ("le", 3), ("basic", 3), ("le", 4))]
    keys = [list_key(one) for one in drawn]
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_last_share_counts_from_the_end():
    tower = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 10, bias=False))
    assert last_share(tower, 0.0) == [] and not any(p.requires_grad for p in tower.parameters())
    assert [id(p) for p in last_share(tower, 0.5)] == [id(tower[1].weight)] and not tower[0].weight.requires_grad
    assert len(last_share(tower, 1.0)) == 2


def test_rows_come_in_the_order_that_is_asked_for_into_memory_that_is_taken_once(tmp_path, monkeypatch):
    clip, images = load_clip("tiny"), noise()
    monkeypatch.setattr(module, "PART", 4)
    features = Features(tmp_path, [clip], images, 3, 0)
    features.write(ONE, lambda f, y: {"p": f[:, 0].double()})
    every = features.read("features")
    monkeypatch.setattr(torch, "cat", None)  # the parts beside their copy: twice the memory
    order = np.array([9, 1, 5, 1, 0])
    assert torch.equal(features.read("features", order), every[order])
    assert torch.equal(features.read("p", order), every[order, 0].double())
    assert features.read("features", order[:0]).shape == (0, every.shape[1])


def test_a_process_without_images_has_no_features():
    clip = load_clip("tiny")
    found = tower_features(clip, clip.model.visual, noise(), range(3, 3), 4, ONE.device, 0)
    assert found.shape == (0, clip.config["embed_dim"]) and found.argmax(1).shape == (0,)


def test_the_latest_is_let_go_before_the_next_is_made():
    class Set:
        alive = 0

        def __init__(self, key):
            self.key, Set.alive = key, Set.alive + 1
            assert Set.alive == 1, "two at a time"

        def __del__(self):
            Set.alive -= 1

    kept, made = Latest(Set), []
    for key in ("le", "le", "basic", "le"):
        made.append(id(kept(key)))  # nothing else holds it: an assert would
    assert made[0] == made[1] and Set.alive == 1
