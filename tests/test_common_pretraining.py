"""The engine of pre-training: repeated augmentation, pictures, MoCo's queue and its key network."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import QUIET
from PIL import Image, ImageFilter, ImageOps
from timm.data.auto_augment import RandAugment
from timm.layers import DropPath
from torchvision.transforms import v2

from common import pretraining
from common.datasets import Images
from common.distributed import Dist, Order
from common.files import save_tensors
from common.launch import UserError
from common.loader import Loader


def close(a, b, tol):
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max().item() <= tol


def contrast(q, k, queue):
    """-log of the softmax weight of the own key"""
    return F.cross_entropy(torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1), torch.zeros(len(q)).long())


def test_repeated_augmentation_keeps_the_length_of_an_epoch():
    order = Order(10, 0, "x")
    first, second = ([order[pretraining.repeated(p, 10, 3)] for p in range(start, start + 10)] for start in (0, 10))
    for epoch in (first, second):
        assert epoch[0] == epoch[1] == epoch[2] != epoch[3] and len(set(epoch)) == 4
    assert first != second and sorted(order[pretraining.repeated(p, 10, 1)] for p in range(10, 20)) == list(range(10))


def test_deit_augmentation_is_a_function_of_the_seed_and_never_asks_pillow_for_no_bits():
    image = Image.effect_noise((16, 16), 90).convert("RGB")
    view = pretraining.augmentation("deit", 16, True)
    transform = view.__closure__[0].cell_contents
    (op,) = [o for t in transform.transforms if isinstance(t, RandAugment) for o in t.ops if "Poster" in o.name]
    assert op.aug_fn(image, 0).tobytes() == ImageOps.posterize(image, 1).tobytes()
    pixels = Images([0] * 3, ["a", "b", "c"], ["x"], pixels=np.stack([np.asarray(image)] * 3))
    load = Loader(pretraining.DecodedOnce(pixels), view, torch.device("cpu"), 0, (0, "data"))
    first = next(load([[(0, p) for p in range(20)]]))
    again = next(load([[(1, p) for p in reversed(range(20))]]))
    assert first.dtype == torch.uint8 and torch.equal(again.flip(0), first) and not torch.equal(first[0], first[1])


def test_repeated_images_are_decoded_once():
    opened = []
    images = SimpleNamespace(open=lambda row: opened.append(row) or row)
    once = pretraining.DecodedOnce(images)
    assert [once[row] for row in (3, 3, 3, 5, 5, 5, 3)] == [3, 3, 3, 5, 5, 5, 3] and opened == [3, 5]


def test_moco_queue_takes_the_newest_keys_first_and_keys_follow_the_queries():
    net = pretraining.new_backbone("test_resnet.r160_in1k", 10, 0, "cpu")
    objective = pretraining.MoCo(net, contrast, 0, torch.device("cpu"), 16, momentum=0.75)
    x = torch.randn(4, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    objective.begin(0)
    loss, k = objective.loss(x.unbind(1), torch.zeros(4), 0)
    close(k.norm(dim=1), torch.ones(4), 1e-5)
    assert not k.requires_grad and torch.isfinite(torch.autograd.grad(loss, objective.query[1][0].weight)[0]).all()
    old = objective.queue.clone()
    objective.end(k)
    assert torch.equal(objective.queue, torch.cat([k, old[:-4]]))
    assert pretraining.MoCo(net, contrast, 0, torch.device("cpu"), 16).momentum == 0.999
    q, before = objective.query[1][0].weight, objective.key[1][0].weight.clone()
    with torch.no_grad():
        q += 1
    objective.begin(1)
    close(objective.key[1][0].weight, 0.75 * before + 0.25 * q.detach(), 1e-5)
    # Keys see other company in BatchNorm than their queries: in order they would be equal at the start
    fresh = pretraining.MoCo(net, contrast, 0, torch.device("cpu"), 16)
    q = fresh.embed(fresh.query, x[:, 1])
    assert not torch.allclose(fresh.loss(x.unbind(1), torch.zeros(4), 0)[1], q, atol=1e-4)


def test_a_backbone_has_the_body_of_its_file_a_head_of_its_own_and_the_depth_it_is_told(tmp_path):
    make = lambda seed, *more: pretraining.new_backbone("test_resnet.r160_in1k", 10, seed, "cpu", *more)  # noqa: E731
    before = make(1)
    save_tensors(tmp_path / "net.safetensors", before.state_dict())
    after = make(2, tmp_path / "net.safetensors").state_dict()
    for key, value in before.state_dict().items():
        assert torch.equal(after[key], value) != key.startswith("fc."), key
    assert not torch.equal(make(2).conv1[0].weight, before.conv1[0].weight)
    depths = [[m.drop_prob for m in make(1, None, rate).modules() if isinstance(m, DropPath)] for rate in (0.0, 0.3)]
    assert depths[0] == [] and max(depths[1]) == pytest.approx(0.3)


class Noted(pretraining.Objective):
    """A linear layer over an image's mean colour; notes what the training gives it, in order"""

    def __init__(self):
        self.net, self.notes, self.state = torch.nn.Linear(3, 4), [], {"x": torch.zeros(1)}
        self.modules = [self.net]

    def begin(self, step):
        self.notes.append(("begin", step))

    def loss(self, views, y, step):
        self.notes.append(("loss", step, y.tolist(), self.net.training))
        return F.cross_entropy(self.net(views[0].mean((2, 3))), y), views[0].mean((2, 3))

    def end(self, rows):
        self.notes.append(("end", rows.detach().clone()))


def test_the_training_gives_an_objective_what_plain_sgd_would(tmp_path):
    """Two epochs of 12 images in batches of 5, 5, 2 and micro-batches of 2, each image three times in a row"""
    colours = np.random.default_rng(0).integers(0, 256, (12, 3), dtype=np.uint8)
    pixels = np.broadcast_to(colours[:, None, None], (12, 4, 4, 3)).copy()
    images = Images([k % 4 for k in range(12)], map(str, range(12)), list("abcd"), pixels=pixels)
    torch.manual_seed(0)
    objective, asked = Noted(), []
    plain = torch.nn.Linear(3, 4)
    plain.load_state_dict(objective.net.state_dict())
    objective.net.eval()
    rate = lambda e: (asked.append(e), 0.5 / (1 + e))[1]  # noqa: E731
    optimizer = torch.optim.SGD(objective.net.parameters(), lr=9.0)
    recipe = pretraining.Recipe(optimizer, rate, v2.PILToTensor(), 5, 2, repeats=3)
    run, one = SimpleNamespace(**QUIET), Dist(0, 0, 1, torch.device("cpu"))
    how = dict(micro_batch=2, precision="fp32", workers=0)
    pretraining.train_network(run, one, "t", tmp_path / "c.safetensors", objective, images, recipe, 7, **how)
    order, steps, notes = Order(12, 7), [(0, 5), (5, 10), (10, 12)], iter(objective.notes)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's
    for step in range(6):
        epoch, (begin, end) = step // 3, steps[step % 3]
        rows = [order[12 * epoch + p // 3] for p in range(begin, end)]
        x, y = (torch.from_numpy(colours[rows]) / 255 - mean) / std, torch.tensor(rows) % 4
        plain.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        with torch.no_grad():
            for p in plain.parameters():
                p -= 0.5 / (1 + step / 3) * p.grad
        assert next(notes) == ("begin", step)
        for i in range(0, len(rows), 2):
            assert next(notes) == ("loss", step, y[i : i + 2].tolist(), True)
        said, seen = next(notes)
        assert said == "end"
        close(seen, x, 1e-5)
    assert asked == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])
    for a, b in zip(objective.net.parameters(), plain.parameters(), strict=True):
        close(a, b, 1e-5)


def test_mocos_head_has_two_layers_and_its_keys_are_of_the_other_view():
    net = pretraining.new_backbone("test_resnet.r160_in1k", 10, 0, "cpu")
    objective = pretraining.MoCo(net, contrast, 0, torch.device("cpu"), 16)
    layers = [type(layer).__name__ for layer in objective.query[1]]
    assert layers == ["Linear", "ReLU", "Linear"] and objective.query[1][2].out_features == 128
    x = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for m in objective.modules:
        m.eval()  # BatchNorm in no company
    _, k = objective.loss(list(x), torch.zeros(4), 0)
    body = net.forward_head(net.forward_features(x[1]), pre_logits=True)
    close(k, F.normalize(objective.query[1](body), dim=1), 1e-4)  # in the order of the images


def test_views_are_cut_mirrored_and_changed_as_published(monkeypatch):
    crops, mirrors, deit = [], [], []
    crop, mirror, create = v2.RandomResizedCrop, v2.RandomHorizontalFlip, timm.data.create_transform
    monkeypatch.setattr(
        v2, "RandomResizedCrop", lambda size, scale: (crops.append((size, scale)), crop(size, scale))[1]
    )
    monkeypatch.setattr(v2, "RandomHorizontalFlip", lambda: (mirrors.append(1), mirror())[1])
    monkeypatch.setattr(timm.data, "create_transform", lambda *what, **how: (deit.append(how), create(*what, **how))[1])
    for kind in ("plain", "moco", "deit"):
        for flip in (True, False):
            pretraining.augmentation(kind, 24, flip)
    assert crops == [(24, (0.08, 1.0)), (24, (0.7, 1.0)), (24, (0.2, 1.0)), (24, (0.7, 1.0))] and len(mirrors) == 2
    common = dict(color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", re_prob=0.0)
    for how, hflip, least in zip(deit, (0.5, 0.0), (0.08, 0.7), strict=True):
        assert {k: how[k] for k in common} == common and (how["hflip"], how["scale"]) == (hflip, (least, 1.0))


def test_half_of_mocos_views_are_blurred_as_officially(monkeypatch):
    """By Pillow, with a radius from U(0.1, 2): officially too."""
    radii, blur = [], ImageFilter.GaussianBlur
    monkeypatch.setattr(ImageFilter, "GaussianBlur", lambda radius: radii.append(radius) or blur(radius))
    view, picture = pretraining.augmentation("moco", 32, True), Image.new("RGB", (32, 32), (90, 140, 60))
    torch.manual_seed(0)
    pairs = [view(picture) for _ in range(200)]
    assert all(x.shape == (3, 32, 32) and x.dtype == torch.uint8 for pair in pairs for x in pair)
    assert 160 < len(radii) < 240 and 0.1 <= min(radii) < 0.2 and 1.9 < max(radii) <= 2 and 0.95 < np.mean(radii) < 1.15
    # A fifth is grey; of the others a fifth has its colours as they were. The two views are drawn apart.
    colours = [tuple(x[:, 5, 5].tolist()) for pair in pairs for x in pair]
    grey = sum(len(set(c)) == 1 for c in colours)
    assert 55 < grey < 105 and 42 < colours.count((90, 140, 60)) < 88
    assert sum(torch.equal(*pair) for pair in pairs) < 40


def test_half_a_cosine_ends_at_its_floor():
    assert [pretraining.cosine(share, 3.0, 1.0) for share in (0, 0.5, 1)] == [3.0, 2.0, 1.0]


@pytest.mark.parametrize(
    "name, size, batch, moco, match",
    [
        ("test_resnet.r160_in1k", 32, 2, True, None),
        ("test_resnet.r160_in1k", 224, 1, False, None),  # 7 x 7 pixels are left for the statistics
        (
            "test_resnet.r160_in1k",
            32,
            1,
            False,
            "test_resnet.* --pre-size 32 --pre-micro-batch 1: these",
        ),
        ("deit_small_patch16_224", 224, 1, True, None),
        (
            "deit_small_patch16_224",
            32,
            2,
            False,
            "--backbone deit_small.* --pre-size 32: these .*: Input height",
        ),
        ("deit_small_distilled_patch16_224", 224, 2, True, "--pre-size 224 --recipe moco: these"),
    ],
)
def test_networks_that_cannot_be_trained_are_refused(name, size, batch, moco, match):
    net = timm.create_model(name, num_classes=3)
    check = partial(pretraining.check_network, name, net, size, {"--pre-micro-batch": batch, "--pre-batch": 8}, moco)
    if match is None:
        return check()
    with pytest.raises(UserError, match=match):
        check()


def test_a_network_without_stochastic_depth_is_refused():
    with pytest.raises(UserError, match="--backbone vgg11: .*drop_path_rate"):
        pretraining.new_backbone("vgg11", 3, 0, "cpu", drop_path=0.1)


def test_moco_takes_networks_whose_last_layer_is_wider_than_their_features():
    with torch.device("meta"):
        net = timm.create_model("mobilenetv3_small_100", num_classes=3)  # 576 channels, 1,024 before its classifier
    pretraining.check_network("mobilenetv3_small_100", net, 64, {}, True)
    small = pretraining.new_backbone("test_resnet.r160_in1k", 3, 0, "cpu")
    objective = pretraining.MoCo(small, contrast, 0, torch.device("cpu"), 4)
    assert objective.embed(objective.query, torch.zeros(3, 3, 32, 32)).shape == (3, 128)


def test_a_process_without_images_has_no_logits():
    net = pretraining.new_backbone("test_resnet.r160_in1k", 3, 0, "cpu")
    none = pretraining.logits_of(net, Images([], [], ["a"], pixels=np.zeros((0, 8, 8, 3))), [], None, 4, "cpu", 0)
    assert none.shape == (0, 3) and none.argmax(1).shape == (0,)
