"""GaFi: values of the authors' code, invariants of the method, the script end to end on the real digits."""

import copy
import dataclasses
import json
import math
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import QUIET
from PIL import Image
from torch import nn

import gafi as gf
from common import datasets, distances, distributed, spectral
from common.cli import Frame
from common.files import load_tensors, save_tensors, write_json
from common.launch import UserError
from common.pixels import Pixels, as_images, in_unit_range, prepared

ONE = distributed.Dist(0, 0, 1, torch.device("cpu"))


@pytest.fixture
def g(golden):
    return golden("gafi")


def close(a, b, tol):
    """max |a - b| <= tol"""
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max().item() <= tol


def rel(a, b, tol):
    """max |a - b| / max |b| <= tol"""
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max().item() <= tol * b.double().abs().max().item()


def about(n_classes, channels):
    """What the networks are made for."""
    return SimpleNamespace(n_classes=n_classes, channels=channels)


def normed(net):
    """w_bar of all its layers, as before every forward pass"""
    gf.spectral_norm(gf.spectral_groups(net))
    return net


def one(value):
    return torch.as_tensor(value).detach().reshape(1)


# ---- golden ------------------------------------------------------------------------------------------------------


def test_golden_losses(g):
    real, fake = g["hinge.real"], g["hinge.fake"]
    for name, kind in (("hinge", "hinge"), ("nonsat", "nonsaturating")):
        on_real, on_fake = gf.d_loss(real, fake, kind)
        rel(one(on_real), g[f"{name}.d_real"], 1e-6)
        rel(one(on_fake), g[f"{name}.d_fake"], 1e-6)
        rel(one(gf.g_loss(fake, kind)), g[f"{name}.g"], 1e-6)


@pytest.mark.parametrize("name", ["sn_conv", "sn_lin"])
def test_golden_spectral_norm(g, name):
    w = g[f"{name}.weight"]
    layer = gf.SNConv(w.shape[1], w.shape[0], 3) if w.ndim == 4 else gf.SNLinear(w.shape[1], w.shape[0])
    fill(layer, {"weight": w, "u": g[f"{name}.u"]}, strict=False)
    sigma, u = spectral.power_iteration(w.flatten(1)[None], layer.u[None])
    rel(sigma, g[f"{name}.sigma"].reshape(1), 1e-5)
    rel(u[0], g[f"{name}.u_new"], 1e-5)
    w_bar = normed(layer.train()).w_bar
    rel(w_bar, g[f"{name}.w_bar"], 1e-5)
    rel(layer.u, g[f"{name}.u_new"], 1e-5)
    (grad,) = torch.autograd.grad((w_bar * g[f"{name}.m"]).sum(), layer.weight)
    rel(grad, g[f"{name}.grad_detached"], 1e-5)
    # The official gradient, through the iteration, is what ours deliberately is not.
    sigma, _ = through_iteration(layer.weight.flatten(1)[None], g[f"{name}.u"][None])
    (official,) = torch.autograd.grad((layer.weight / sigma * g[f"{name}.m"]).sum(), layer.weight)
    rel(official, g[f"{name}.grad_through"], 1e-5)
    stored = layer.u.clone()
    rel(normed(layer.eval()).w_bar, g[f"{name}.w_bar_eval_next"], 1e-5)
    assert torch.equal(layer.u, stored), "an evaluation must not store u"


def test_golden_spectral_embedding(g):
    w = g["sn_emb.weight"]
    layer = gf.SNEmbedding(*w.shape)
    fill(layer, {"weight": w, "u": g["sn_emb.u"]})
    rel(normed(layer.train())(g["sn_emb.y"]), g["sn_emb.out"], 1e-5)
    rel(layer.u, g["sn_emb.u_new"], 1e-5)


def test_golden_conditional_batch_norm(g):
    layer = gf.ConditionalBN(6, 5)
    state = {f"{n}.{k}": g[f"cbn.{n}.{k}"] for n in ("beta", "gamma") for k in ("weight", "u")}
    fill(layer, state | {"bn.running_mean": g["cbn.mean"], "bn.running_var": g["cbn.var"]}, strict=False)
    x, cond = g["cbn.x"], g["cbn.cond"]
    rel(normed(layer.eval())(x, cond), g["cbn.out_eval"], 1e-5)
    rel(normed(layer.train())(x, cond), g["cbn.out_train"], 1e-5)
    rel(layer.bn.running_mean, g["cbn.mean_new"], 1e-5)
    rel(layer.bn.running_var, g["cbn.var_new"], 1e-5)
    rel(layer.gamma.u, g["cbn.gamma.u_new"], 1e-5)


def test_golden_attention(g):
    layer = gf.Attention(16)
    state = {f"{n}.{k}": g[f"attn.{n}.{k}"] for n in ("theta", "phi", "g", "out") for k in ("weight", "u")}
    fill(layer, state | {"gain": g["attn.sigma"]})
    rel(normed(layer.eval())(g["attn.x"]), g["attn.out_eval"], 1e-5)


def fill(module, state, strict=True):
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected and not (strict and missing), (missing, unexpected)


def theirs(ours):
    """Name in a network of ours -> (golden name, row of a stacked tensor or None)"""
    name = ours.replace("blocks.", "").replace("attn.gain", "attn.sigma")
    for side, row in (("beta", 0), ("gamma", 1)):
        name = name.replace(f".{side}.weight", f".w[{row}]").replace(f".{side}.u", f".u[{row}]")
    if "cbn" in name:
        name = name.replace(".bn.running_mean", ".stats[0]").replace(".bn.running_var", ".stats[1]")
    name = name.replace("running_", "")
    return (name[:-3], int(name[-2])) if name.endswith("]") else (name, None)


def golden_state(g, prefix, module):
    """Their weights under our names, every key of the prefix used."""
    state, used = {}, set()
    for ours in module.state_dict():
        if not ours.endswith("num_batches_tracked"):
            name, row = theirs(ours)
            value = g[f"{prefix}.{name}"]
            state[ours] = value if row is None else value[row]
            used.add(f"{prefix}.{name}")
    return state, used


def golden_networks(g):
    generator, discriminator = gf.Generator(3, 3, 4, 4, 3), gf.Discriminator(3, 3, 4)
    for prefix, net in (("G", generator), ("D", discriminator)):
        state, used = golden_state(g, prefix, net)
        assert used == {k for k in g.keys() if k.startswith(prefix + ".")}
        missing, unexpected = net.load_state_dict(state, strict=False)
        assert not unexpected and all(m.endswith("num_batches_tracked") for m in missing)
    return generator, discriminator


def check_state(g, prefix, net, tol=None, initial=None):
    """Compare all golden tensors of a prefix with the network; tol(name, initial value) is the largest difference."""
    ours, checked = net.state_dict(), 0
    for name, value in ours.items():
        their, row = theirs(name)
        key = f"{prefix}.{their}"
        if key in g.keys():
            expected = g[key] if row is None else g[key][row]
            close(value, expected, tol(their, initial[name], expected) if initial else 1e-4 * expected.abs().max())
            checked += 1
    assert checked >= len([k for k in g.keys() if k.startswith(prefix + ".")]) > 0


def pixels(g):
    return (g["d_in.x_uint8"].float() / 255 - 0.5) / 0.5


def test_golden_generator(g):
    net, _ = golden_networks(g)
    with torch.no_grad():
        close(net.eval()(g["g_in.z"], g["g_in.y"])[1], g["g_out.eval_img1"], 1e-3)
        close(net.train()(g["g_in.z"], g["g_in.y"])[0, 0], g["g_out.train_img0_ch0"], 1e-3)
    check_state(g, "g_after_train", net)


def test_golden_discriminator(g):
    _, net = golden_networks(g)
    close(in_unit_range(g["d_in.x_uint8"]), pixels(g), 1e-6)
    with torch.no_grad():
        rel(net.eval()(pixels(g), g["d_in.y"]), g["d_out.eval"], 1e-4)
        rel(net.train()(pixels(g), g["d_in.y"]), g["d_out.train"], 1e-4)
    check_state(g, "d_after_train", net)


def through_iteration(w, u):
    """The official spectral norm, whose gradient also goes through u' and v. [k, out, rest], [k, out]"""
    u = u.clone()[..., None]  # the buffer is written to later
    v = w.mT @ u
    v = v / (v.norm(dim=1, keepdim=True) + 1e-12)
    u = w @ v
    u = u / (u.norm(dim=1, keepdim=True) + 1e-12)
    return (u * (w @ v)).sum((1, 2)), u[..., 0].detach()


def loop_of(gan, tmp_path):
    """The loop of a GAN's training, with nothing written."""
    return gan.loop(
        SimpleNamespace(**QUIET),
        "gan",
        100,
        ONE,
        tmp_path / "none.safetensors",
        100,
    )


@pytest.mark.parametrize("kind", ["detached", "through"])
def test_golden_training_step(g, kind, tmp_path, monkeypatch):
    if kind == "through":
        monkeypatch.setattr(spectral, "power_iteration", through_iteration)
    args = gf.Args(gan_width=4, gan_latent=4, gan_lr=g["step.lr"].item(), gan_ema=0.9, gan_ema_start=0, gan_batch=99)
    monkeypatch.setattr(gf, "make_generator", lambda *_: gf.Generator(3, 3, 4, 4, 3))
    gan = gf.BigGAN(args, about(3, 3), 0, torch.device("cpu"))
    generator, discriminator = golden_networks(g)
    for net, source in ((gan.g, generator), (gan.ema, generator), (gan.d, discriminator)):
        net.load_state_dict(source.state_dict())
    losses, original = [], gf.d_loss
    monkeypatch.setattr(gf, "d_loss", lambda *a: losses.extend(pair := original(*a)) or pair)
    _, of_g = gan.step(loop_of(gan, tmp_path), 0, pixels(g), g["d_in.y"], g["step.z"])
    expected, losses = g[f"step.{kind}.losses"], torch.stack([loss.detach() for loss in (*losses, of_g)])
    assert ((losses - expected).abs() / (expected.abs() + 1)).max() < 2e-3

    def tolerance(name, before, after):
        share = 0.25 if name in ("b11.conv2.weight", "b10.conv2.weight") else 0.05
        return share * (after - before).abs().max().item()

    check_state(g, f"step.{kind}.G", gan.g, tolerance, generator.state_dict())
    check_state(g, f"step.{kind}.D", gan.d, tolerance, discriminator.state_dict())
    check_state(g, f"step.{kind}.ema", gan.ema)


def test_golden_resnet(g):
    net = gf.ResNet(5, 3, 2, 1)
    state = {}
    for name in net.state_dict():
        if not name.endswith("num_batches_tracked"):
            state[name] = g["resnet." + name.replace("running_", "")]
    fill(net, state, strict=False)
    with torch.no_grad():
        logits = net.eval()(pixels(g))
    rel(logits, g["resnet.logits"], 1e-5)
    rel(logits.softmax(1), g["resnet.probs"], 1e-5)
    assert {k for k in g.keys() if k.startswith("resnet.")} <= g.read


def test_golden_optimisers(g):
    p = nn.Parameter(g["sgdw.p0"].clone())
    optimizer = gf.SGDW([p], 0.1, g["sgdw.wd"].item())
    for grad, lr, expected in zip(g["sgdw.grads"], g["sgdw.lr"].tolist(), g["sgdw.p"], strict=True):
        p.grad, optimizer.param_groups[0]["lr"] = grad.clone(), lr
        optimizer.step()
        close(p.detach(), expected, 1e-6)
    p = nn.Parameter(g["adam.p0"].clone())
    optimizer = torch.optim.Adam([p], lr=gf.Args().gan_lr, betas=(0.5, 0.999))
    for t, (grad, expected) in enumerate(zip(g["adam.grads"], g["adam.p"], strict=True), 1):
        p.grad, optimizer.param_groups[0]["eps"] = grad.clone(), gf.keras_eps(t)
        optimizer.step()
        close(p.detach(), expected, 1e-5)


def test_golden_ema_and_rate(g):
    start, decay = int(g["ema.start"].item()), g["ema.decay"].item()
    ema = torch.zeros(3)
    for t, (w, expected) in enumerate(zip(g["ema.weights"], g["ema.trace"], strict=True), 1):
        gf.ema_update([ema], [w], t, start, decay)
        close(ema, expected, 1e-6)
    args = gf.Args()
    ours = [gf.lr_at(e, args.resnet_lr, args.resnet_drops) for e in range(1, 101)]
    rel(torch.tensor(ours), g["lr.per_epoch"], 1e-5)


class GoldenSamples:
    """The stub networks of the golden file behind `draw`; latents come in the file's order."""

    def __init__(self, g, z):
        self.g, self.z, self.first, self.sizes = g, z, 0, []

    def draw(self, wanted):
        drawn = {}
        for c, q in wanted.items():
            self.sizes.append(q)
            z = self.z[self.first : self.first + q]
            self.first += q
            x = torch.tanh((z + self.g["filter.emb"][c]) @ self.g["filter.w_img"])
            drawn[c] = x, gf.confidence((x @ self.g["filter.w_cls"]).softmax(1), c)
        return drawn


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_golden_filter(g, case):
    threshold, sigma, attempts, n = g[f"filter.{case}.cfg"].tolist()
    stream = GoldenSamples(g, g[f"filter.{case}.z"])
    parts = [gf.filtered_set(stream.draw, [c], int(n), threshold, int(attempts)) for c in range(3)]  # one by one
    assert stream.sizes == g[f"filter.{case}.draws"].tolist() and stream.first == len(stream.z)
    close(torch.cat([part[0] for part in parts]), g[f"filter.{case}.x"], 1e-5)
    assert torch.equal(torch.cat([part[1] for part in parts]), g[f"filter.{case}.y"])
    assert stream.z.std() == pytest.approx(sigma, rel=0.35), "sigma is in the latents already"


def test_golden_mask(g):
    ours = [gf.confidence(g["mask.probs"], g["mask.class"]) > t for t in g["mask.thresholds"]]
    assert torch.equal(torch.stack(ours).to(torch.uint8), g["mask.keep"])


def test_golden_augmentation(g):
    box = (g[f"cutout.{k}"] for k in ("cx", "cy", "h", "w"))
    close(gf.cutout(g["cutout.x"], g["cutout.noise"], *box), g["cutout.out"], 1e-6)
    assert torch.equal(gf.crop(g["crop.x"], g["crop.top"], g["crop.left"]), g["crop.out"])


def test_golden_distances(g):
    real, fake = g["fid.real"], g["fid.fake"]
    close(one(distances.frechet_distance(real, fake)), g["fid.value"].double(), 1e-4)
    close(one(distances.kernel_distance(real, fake)), g["kid.value"].double(), 1e-4)
    rel(one(distances.inception_score(g["is.probs"])), g["is.value"], 1e-5)


def test_golden_grids(g):
    args, derma = gf.Args(), gf.Args(**gf.PRESETS["dermamnist"])
    close(torch.tensor(gf.grid(*args.ckpt_grid)), g["grid.ckpt"].double(), 1e-6)
    close(torch.tensor(gf.grid(*args.sigma_grid)), g["grid.std"].double(), 1e-6)
    close(torch.tensor(gf.grid(*args.threshold_grid)), g["grid.thr"].double(), 1e-6)
    close(torch.tensor(gf.grid(*derma.threshold_grid)), g["grid.thr_derma"].double(), 1e-6)


def test_golden_preparation(g):
    gray = prepared(Image.fromarray(g["prep.gray28"][0].numpy()), 1, 32, pad=True)
    close(in_unit_range(gray[None]), g["prep.gray32"], 1e-6)
    rgb = prepared(Image.fromarray(g["prep.rgb28"].numpy()), 3, 32)
    assert torch.equal(rgb.permute(1, 2, 0), g["prep.rgb32"])


def test_golden_every_key_is_read(g):
    """Runs last of the golden tests: a key that none of them read is a failure."""
    if len(g.read) < 50:
        pytest.skip("the other golden tests were not run")
    assert not g.unread()


# ---- invariants --------------------------------------------------------------------------------------------------


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    "n_classes, channels, g_count, d_count, r_count",
    [
        (10, 3, 9_338_884, 3_177_730, 4_286_026),  # CIFAR-10, CINIC-10
        (100, 3, 9_350_404, 3_223_810, 4_309_156),  # CIFAR-100
        (10, 1, 9_329_666, 3_175_426, 4_284_874),  # FashionMNIST
        (7, 3, 9_338_500, 3_176_194, 4_285_255),  # DermaMNIST
    ],
)
def test_parameter_counts_are_those_of_the_method(n_classes, channels, g_count, d_count, r_count):
    args = gf.Args()
    with torch.device("meta"):
        nets = (
            gf.make_generator(args, about(n_classes, channels)),
            gf.Discriminator(n_classes, channels, args.gan_width),
        )
        nets += (gf.ResNet(n_classes, channels, args.resnet_width, args.resnet_blocks),)
    assert [count(net) for net in nets] == [g_count, d_count, r_count]


def buffers(net):
    return sum(b.numel() for n, b in net.named_buffers() if not n.endswith("num_batches_tracked"))


def test_shapes_buffers_and_classic_resnet():
    generator, discriminator = gf.Generator(10), gf.Discriminator(10)
    assert buffers(generator) == 40_067 and buffers(discriminator) == 7_435
    assert count(gf.ResNet(10, 3, 16)) == 269_722
    with torch.no_grad():
        x = generator(torch.randn(2, 128), torch.tensor([3, 4]))
        assert x.shape == (2, 3, 32, 32) and x.abs().max() < 1 and discriminator(x, torch.tensor([3, 4])).shape == (2,)
    block = generator.blocks["b00"]
    assert count(block) == 1_148_288 and count(block.cbn1) == 262_144 and count(generator.attn) == 327_681
    shapes = [count(block) for block in discriminator.blocks.values()]
    assert shapes == [443_776, 426_880, 689_536, 426_880, 426_880, 426_880]


def small_gan(tmp_path, **changes):
    """-> flags, GAN of 3 classes, one step of it: step(number from 0, x, y, z)"""
    args = gf.Args(**{**gf.PRESETS["digits"], "gan_width": 4, "gan_latent": 6, "image_size": 32, **changes})
    gan = gf.BigGAN(args, about(3, 1), 0, torch.device("cpu"))
    loop = loop_of(gan, tmp_path)

    def step(number, x, y, z):
        loop.step, loop._phases = number, 0
        return gan.step(loop, number, x, y, z)

    return args, gan, step


def a_batch(args, b=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.rand(b, 1, 32, 32, generator=g) * 2 - 1, torch.randint(3, (b,), generator=g)
    return x, y, torch.randn(args.gan_d_steps + 1, b, args.gan_latent, generator=g)


def test_spectral_norm_converges_to_one_and_evaluation_leaves_u_alone():
    torch.manual_seed(0)
    layer = gf.SNConv(5, 7, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
        for _ in range(200):
            normed(layer.train())
        u = layer.u.clone()
        w = normed(layer.eval()).w_bar
        assert torch.linalg.svdvals(w.flatten(1))[0] == pytest.approx(1, abs=1e-4)
        assert torch.equal(layer.u, u)


def test_layers_of_one_shape_are_normed_as_each_alone():
    torch.manual_seed(0)
    several = nn.ModuleList([gf.SNConv(5, 7, 3), gf.SNLinear(4, 6), gf.SNConv(5, 7, 3), gf.SNConv(7, 5, 1)])
    several = several.to(memory_format=torch.channels_last)
    for layer in several:
        nn.init.normal_(layer.weight)  # at their start all are orthogonal and have the norm 1
    before = [(layer.weight.detach().clone(), layer.u.clone()) for layer in several]
    assert [len(group) for group in gf.spectral_groups(several)] == [2, 1, 1]
    normed(several.train())
    for layer, (w, u) in zip(several, before, strict=True):
        sigma, u = through_iteration(w.flatten(1)[None], u[None])
        close(layer.w_bar.detach(), w / sigma, 1e-6)
        close(layer.u, u[0], 1e-6)
        assert layer.w_bar.ndim == 2 or layer.w_bar.is_contiguous(memory_format=torch.channels_last)


def test_baked_weights_give_the_same_images(tmp_path):
    args, gan, _ = small_gan(tmp_path)
    z, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        before = gan.ema.eval()(z, y)
        gf.ScoredGenerator(args, gan.ema, None)
        assert gan.g.norms and not gan.ema.norms
        gan.ema.first.u.zero_()  # it is not looked at again
        assert torch.equal(gan.ema(z, y), before)


def test_gates_that_start_closed():
    torch.manual_seed(0)
    x, c = torch.randn(4, 16, 8, 8), torch.randn(4, 5)
    assert torch.equal(normed(gf.Attention(16))(x), x)
    layer = gf.ConditionalBN(16, 5).eval()
    layer.gamma.w_bar = layer.beta.w_bar = torch.zeros(16, 5)
    assert torch.equal(layer(x, c), layer.bn(x))


def test_projection_difference_between_classes():
    torch.manual_seed(0)
    net = gf.Discriminator(3, 1, 4).eval()
    hidden = {}
    net.out.register_forward_hook(lambda module, inputs, output: hidden.update(h=inputs[0]))
    x = torch.randn(5, 1, 32, 32)
    with torch.no_grad():
        one_class, other = net(x, torch.zeros(5, dtype=torch.long)), net(x, torch.full((5,), 2))
        e = net.embed.w_bar
        assert torch.allclose(one_class - other, hidden["h"] @ (e[0] - e[2]), atol=1e-4)


def test_generator_sees_its_batch_only_in_training(tmp_path):
    args, gan, _ = small_gan(tmp_path)
    z, y = torch.randn(6, 6), torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.no_grad():
        alone, together = gan.g.eval()(z[:2], y[:2]), gan.g(z, y)[:2]
        assert (alone - together).abs().max() < 1e-5
        assert (gan.g.train()(z[:2], y[:2]) - gan.g(z, y)[:2]).abs().max() > 1e-3
        flat = gan.g.eval()(torch.zeros(6, 6), y)
        assert torch.allclose(flat[0], flat[3], atol=1e-6) and not torch.allclose(flat[0], flat[1], atol=1e-3)


def test_one_step_updates_what_it_should(tmp_path):
    args, gan, step = small_gan(tmp_path)
    seen, original = [], gan.loss_of_d
    d, g = list(gan.d.parameters()), list(gan.g.parameters())
    changes, weights = [], [p.detach().clone() for p in d]

    def watched(z, x, y):
        changes.append(any(not torch.equal(a, b) for a, b in zip(weights, d, strict=True)))
        weights[:] = [p.detach().clone() for p in d]
        seen.append((x.clone(), y.clone()))
        return original(z, x, y)

    gan.loss_of_d = watched
    x, y, z = a_batch(args)
    g_before = [p.detach().clone() for p in g]
    losses = step(0, x, y, z)
    assert all(torch.isfinite(loss) for loss in losses)
    assert changes == [False, True, True] and len(seen) == 3
    assert all(torch.equal(s[0], x) and torch.equal(s[1], y) for s in seen)
    counters = [b for n, b in gan.g.named_buffers() if n.endswith("num_batches_tracked")]
    assert counters and all(int(c) == 4 for c in counters)
    assert [int(adam.state[p[0]]["step"]) for adam, p in ((gan.d_adam, d), (gan.g_adam, g))] == [3, 1]
    assert any(not torch.equal(a, b) for a, b in zip(g_before, g, strict=True))
    assert all(p.requires_grad for p in d + g)


def test_a_batch_in_parts_is_the_mean_of_its_parts(tmp_path):
    """Each with BatchNorm statistics of its own, from the same start; u moves once, however many parts."""
    args, gan, step = small_gan(tmp_path, gan_batch=8, gan_micro_batch=4, gan_d_steps=1)
    x, y, z = a_batch(args)
    alone = [copy.deepcopy(gan) for _ in range(2)]
    losses = [a.loss_of_d(z[0][u], x[u], y[u]) for a, u in zip(alone, (slice(4), slice(4, 8)), strict=True)]
    after, original = {}, gan.loss_of_g

    def before_g(*a):
        after.update(after or {k: v.clone() for k, v in gan.g.state_dict().items()})
        return original(*a)

    gan.loss_of_g = before_g
    of_d, _ = step(0, x, y, z)
    assert of_d.item() == pytest.approx(sum(losses).item() / 2, rel=1e-5) and losses[0] != losses[1]
    one, other = (a.g.state_dict() for a in alone)
    for name in after:
        if name.endswith("tracked"):
            assert after[name] == 1
        elif "running" in name:
            close(after[name], (one[name] + other[name]) / 2, 1e-5)
        else:
            close(after[name], one[name], 1e-6)


def test_precision_of_the_gan_is_its_own_and_fp32_as_in_the_paper(tmp_path, monkeypatch):
    asked, original = [], gf.autocast
    monkeypatch.setattr(
        gf, "autocast", lambda precision, device: asked.append(precision) or original(precision, device)
    )
    for name in gf.PRESETS:
        made = gf.Args(**gf.PRESETS[name])
        assert (made.gan_precision, made.precision) == ("fp32", "bf16" if name == "cinic10" else "fp32")
    args, gan, step = small_gan(tmp_path, gan_precision="fp32", precision="bf16")
    step(0, *a_batch(args))
    assert set(asked) == {"fp32"}
    asked.clear()
    net = gf.ResNet(3, 1, 4, 1)
    gf.predictions(net, torch.zeros(2, 1, 32, 32, dtype=torch.uint8), args)
    gf.ScoredGenerator(args, gan.ema, net)(torch.zeros(2, 6), torch.zeros(2, dtype=torch.long))
    assert asked == ["bf16", "bf16"]


def test_launchers_leave_the_precision_to_the_preset():
    launchers = sorted((Path(gf.__file__).parent / "shell").glob("gafi_*.sh"))
    assert len(launchers) == len(gf.PRESETS) - 2  # none for the two on a CPU
    assert not [file.name for file in launchers if "precision" in file.read_text()]


def test_average_is_a_copy_until_it_starts(tmp_path):
    args, gan, step = small_gan(tmp_path, gan_ema_start=2, gan_ema=0.9)
    for number in (0, 1, 2):
        step(number, *a_batch(args, seed=number))
        same = [torch.equal(a, b) for a, b in zip(*gan.averaged, strict=True)]
        assert all(same) if number < 2 else not all(same)
    ema, new = torch.ones(3), torch.arange(3.0)
    gf.ema_update([ema], [new], 5, 0, 0.0)
    assert torch.equal(ema, new)


class Fake:
    """ScoredGenerator of two-number samples: the first is the class that F sees, the second its probability."""

    def __init__(self, right=1.0, latent=2):
        self.latent, self.right, self.sizes = latent, right, []

    def __call__(self, z, y):
        self.sizes.append(len(z))
        u = torch.special.ndtr(z)
        conf = torch.where(u[:, 0] < self.right, u[:, 1], -torch.ones(len(z)))
        return torch.stack([z[:, 0], conf], 1), conf


def filtered(sampler, classes, n, threshold, attempts):
    return gf.filtered_set(gf.Samples(sampler, 1.0, n, (0,)).draw, range(classes), n, threshold, attempts)


@pytest.mark.parametrize("threshold, attempts", [(0.0, -1), (0.5, -1), (0.9, -1), (0.9, 3)])
def test_filter_keeps_n_per_class_and_only_what_passes(threshold, attempts):
    sampler = Fake(0.8)
    x, y, (looked_at, accepted, exhausted) = filtered(sampler, 3, 40, threshold, attempts)
    assert torch.equal(y, torch.arange(3).repeat_interleave(40)) and len(x) == 120
    assert looked_at == sum(sampler.sizes) > 120
    if attempts == -1:
        assert (x[:, 1] > threshold).all() and accepted >= 120 and exhausted == 0
    else:
        assert exhausted == len(sampler.sizes) == 3 and (x[:, 1] <= threshold).any() and accepted < 120


def test_filter_with_a_perfect_classifier_draws_once():
    sampler = Fake(1.0)
    assert filtered(sampler, 3, 40, 0.0, -1)[2] == [120, 120, 0] and sampler.sizes == [120]


def test_filter_that_accepts_nothing_ends_through_the_limit():
    sampler = Fake(0.0)
    x, _, told = filtered(sampler, 2, 10, 0.0, 4)
    assert told == [80, 0, 2] and sampler.sizes == 4 * [20] and len(x) == 20 and (x[:, 1] == -1).all()


def test_accepted_samples_become_fewer_with_the_threshold():
    shares = []
    for t in (0.0, 0.3, 0.6, 0.9):
        _, _, (looked_at, accepted, _) = filtered(Fake(0.7), 2, 50, t, -1)
        shares.append(accepted / looked_at)
    assert shares == pytest.approx([0.7, 0.49, 0.28, 0.07], abs=0.08)


def test_stream_is_a_function_of_class_and_index_and_expansion_scales_it():
    a, b = gf.Samples(Fake(), 1.0, 7, (1,)), gf.Samples(Fake(), 1.5, 7, (1,))
    whole = a.latents(2, 0, 21)
    assert torch.equal(torch.cat([a.latents(2, 0, 3), a.latents(2, 3, 11), a.latents(2, 14, 7)]), whole)
    assert torch.equal(b.latents(2, 0, 21), 1.5 * whole) and not torch.equal(a.latents(1, 0, 21), whole)
    drawn = [a.draw({1: 2, 2: q})[2][0][:, 0] for q in (3, 11, 7)]
    assert torch.equal(torch.cat(drawn), whole[:, 0]), "a draw goes on where the last one ended"


def sets(period, r=1.0, n=10, sources=1, seed=0):
    args = gf.Args(recycle_fraction=r)
    return gf.SyntheticSets(args, [gf.Source(i, Fake(0.8)) for i in range(sources)], 3, n, seed, period)


def rows_of(x):
    return {tuple(row) for row in x.tolist()}


def test_recycling():
    every = sets(1)
    epochs = [every.at(e) for e in range(1, 6)]
    assert all(torch.equal(y, torch.arange(3).repeat_interleave(10)) for _, y in epochs)
    assert len(set.union(*(rows_of(x) for x, _ in epochs))) == 5 * 30, "P = 1 shows no image twice"
    fixed = sets(0)
    assert all(torch.equal(fixed.at(1)[0], fixed.at(e)[0]) for e in (2, 50))
    half = sets(1, r=0.5)
    first, second = half.at(1)[0], half.at(2)[0]
    for c in range(3):
        assert len(rows_of(first[10 * c : 10 * c + 10]) & rows_of(second[10 * c : 10 * c + 10])) == 5
    assert torch.equal(sets(1, r=0.5).at(5)[0], [half.at(e) for e in (3, 4, 5)][-1][0]), "resumed in the middle"
    assert torch.equal(sets(1).at(5)[0], epochs[4][0])


@pytest.mark.parametrize("period, calls", [(10, 10), (1, 100), (0, 1)])
def test_number_of_sets(period, calls, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        gf.SyntheticSets, "draw", lambda self, source, k: drawn.append(k) or (torch.zeros(3, 2), torch.arange(3))
    )
    training = sets(period, n=1)
    for epoch in range(1, 101):
        training.at(epoch)
    assert drawn == list(range(calls))


def test_rounding_of_a_partial_recycle_never_loses_an_image():
    for r in (0.1, 0.3, 0.9):
        pair = (torch.arange(30), torch.arange(3).repeat_interleave(10))
        x, y = gf.refreshed(pair, (pair[0] + 100, pair[1]), 3, r, torch.Generator().manual_seed(0))
        assert len(x) == 30 and torch.equal(y, pair[1]) and (x >= 100).sum() == 3 * round(10 * r)


def test_rates_and_decay():
    args = gf.Args()
    rates = [gf.lr_at(e, args.resnet_lr, args.resnet_drops) for e in (1, 59, 60, 79, 80, 100)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    for lr in (0.1, 0.001):
        p = nn.Parameter(torch.ones(3))
        optimizer = gf.SGDW([p], lr, 1e-4)
        for _ in range(100):
            p.grad = torch.zeros(3)
            optimizer.step()
        assert torch.allclose(p.detach(), torch.full((3,), (1 - 1e-4) ** 100), atol=1e-6)


def test_augmentation():
    x = torch.rand(400, 3, 32, 32) * 2 - 1
    g = torch.Generator().manual_seed(0)
    _, _, h, w = gf.cutout_boxes(20_000, 32, 0.2, 0.5, g)
    for side in (h, w):
        assert side.min() == 7 and side.max() == 16
    cut = gf.augmented(x, gf.Args(random_flip=False, random_crop=False), g)
    changed = (cut != x).any(1)
    assert changed.flatten(1).any(1).all(), "cutout changes every image"
    assert changed.float().mean().item() == pytest.approx(0.107, abs=0.01), "mean area of the method's description"
    assert (cut.amax((1, 2, 3)) <= x.amax((1, 2, 3)) + 1e-6).all()
    moved = gf.augmented(x + 5, gf.Args(random_flip=False, random_erasing=False), g)
    assert set(moved[moved < 2].tolist()) == {0.0}, "what the crop uncovers is exactly 0"
    off = gf.Args(random_flip=False, random_crop=False, random_erasing=False)
    assert torch.equal(gf.augmented(x, off, g), x)
    flipped = gf.augmented(x, gf.Args(random_crop=False, random_erasing=False), g)
    mirrored = (flipped == x.flip(3)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], x[~mirrored]) and 0.4 < mirrored.float().mean() < 0.6


class Replay(nn.Module):
    """A classifier whose prediction of every image is 0, to be put in the place of the ResNet"""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return torch.stack([1 + 0 * x.mean((1, 2, 3)) + self.w[0], 0 * x.mean((1, 2, 3)) + self.w[1]], 1)


@pytest.mark.parametrize("select_on", ["val", "test"])
def test_epoch_is_chosen_on_the_split_that_is_named(select_on, tmp_path, monkeypatch):
    """Three epochs; validation likes the second best, test the third."""
    figures = dict(val=[50.0, 70.0, 60.0], test=[10.0, 20.0, 40.0])
    x, y = torch.zeros(4, 1, 32, 32, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    data = Pixels((x, y), (x + 1, y), (x + 2, y), ["a", "b"])  # told apart by their pixels
    weights, played = [], dict(val=0, test=0)

    def accuracy(net, split, args):
        name = ["train", "val", "test"][int(split[0].max())]
        if played[name] == 3:  # after the last epoch: the figure of the weights that were kept
            kept = next(i for i, w in enumerate(weights) if torch.equal(w, net.w))
            return figures[name][kept]
        if name == "val":
            weights.append(net.w.detach().clone())
        played[name] += 1
        return figures[name][played[name] - 1]

    monkeypatch.setattr(gf, "accuracy", accuracy)
    monkeypatch.setattr(gf, "make_classifier", lambda *_: Replay())
    run = SimpleNamespace(dir=tmp_path, made=lambda: None)
    args = gf.Args(real_epochs=3)
    sets = gf.RealSet(args, data.train, 0)
    sets.select_on = select_on
    gf.train_classifier(args, run, ONE, data, sets, tmp_path, dict(row="real"))
    found = json.loads((tmp_path / "metrics.json").read_text())
    best = dict(val=1, test=2)[select_on]
    assert (found["epoch"], found["score"]) == (best + 1, figures[select_on][best])
    assert (found["val"], found["test"], found["best_test_epoch"]) == (figures["val"][best], figures["test"][best], 40)
    assert torch.equal(load_tensors(tmp_path / "weights.safetensors")["w"], weights[best])


@pytest.mark.parametrize("select_on", ["val", "test"])
def test_search_and_rows_train_on_what_they_record(select_on, monkeypatch, tmp_path):
    """And choose on --select-on, but for the filtering classifier."""
    asked, chosen_on = {}, select_on

    def train(args, run, dist, data, sets, folder, about):
        asked.setdefault(about.get("row", "search"), set()).add(sets.select_on)
        if "gan_epoch" in about:
            (source,) = sets.sources
            tried = (source.seed, source.sigma, source.threshold, sets.period, sets.n)
            assert tried == (5, about["sigma"], about["threshold"], 10, 2) and sets.epochs == 100
        write_json(folder / "metrics.json", about | dict(score=1.0, seed=sets.seed))
        save_tensors(folder / "weights.safetensors", dict(w=torch.zeros(1)))

    class Run:
        dir, path, done = tmp_path, staticmethod(lambda *parts: tmp_path.joinpath(*parts)), lambda *_, **__: None
        under = staticmethod(lambda *_, **__: [])
        timed = staticmethod(lambda *_, **__: nullcontext())

    monkeypatch.setattr(gf, "train_classifier", train)
    monkeypatch.setattr(gf, "load_sampler", lambda *_: Fake())
    monkeypatch.setattr(gf, "take_over", lambda *_: None)
    args = gf.Args(select_on=chosen_on, gan_seeds=(5,), ckpt_grid=(1, 1, 1), clf_seeds=1)
    split = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    data = Pixels(split, split, split, ["a", "b"])
    gf.train_real(args, Run(), ONE, data)
    gf.search(args, Run(), ONE, data, None)
    gf.final(args, Run(), ONE, data, None)
    assert asked.pop("real") == {"val"} and set(asked) == {"search", *args.rows[1:]}
    assert set.union(*asked.values()) == {chosen_on}


def test_search_visits_the_grids_in_order_and_ties_go_to_the_first():
    """The candidates of all GANs come together; each GAN goes on from its own best."""
    asked = []

    def evaluate(candidates):
        asked.append(candidates)
        likes = {5: (20, 1.5, 0.4), 6: (10, 1.0, 0.0)}
        return [sum(a == b for a, b in zip(c, likes[seed], strict=True)) + (c[0] == 30) for seed, *c in candidates]

    best = gf.greedy_search((5, 6), ([10, 20, 30], [1.0, 1.5, 2.0], [0.0, 0.4]), evaluate)
    assert best == {5: (20, 1.5, 0.4), 6: (10, 1.0, 0.0)}
    assert asked[0] == [(seed, e, 1.0, 0.0) for seed in (5, 6) for e in (10, 20, 30)]
    assert asked[1] == [(seed, e, s, 0.0) for seed, e in ((5, 20), (6, 10)) for s in (1.0, 1.5, 2.0)]
    assert asked[2] == [(5, 20, 1.5, 0.0), (5, 20, 1.5, 0.4), (6, 10, 1.0, 0.0), (6, 10, 1.0, 0.4)] and len(asked) == 3


def test_rows_of_the_table():
    args = gf.Args(gan_seeds=(5, 6, 7), class_samples=9)
    choices = {str(s): dict(epoch=10 * s, sigma=1 + s / 10, threshold=s / 10) for s in args.gan_seeds}
    made = {}
    for row in args.rows[1:]:
        made_of = gf.sets_of(args, about(3, 1), row, 1, choices, lambda seed, epoch: (seed, epoch))
        made[row] = [(s.seed, s.sigma, s.threshold) for s in made_of.sources], made_of.period
        assert all(s.sampler == (s.seed, 10 * s.seed) for s in made_of.sources)
        assert made_of.n == (3 if row == "multi" else 9) and made_of.seed == args.seed + 1
    assert made["baseline"] == ([(6, 1.0, None)], 0)
    assert made["filter"] == ([(6, 1.0, 0.6)], 0)
    assert made["recycle"] == ([(6, 1.0, 0.6)], 10)
    assert made["expansion"] == ([(6, 1.6, 0.6)], 10)
    assert made["single"] == ([(6, 1.6, 0.6)], 1)
    assert made["multi"] == ([(5, 1.5, 0.5), (6, 1.6, 0.6), (7, 1.7, 0.7)], 1)


def test_multigan_shares_the_images_and_with_one_gan_is_that_gan():
    three = sets(1, n=10, sources=3)
    x, y = three.at(1)
    assert len(x) == 3 * 3 * 3 and torch.bincount(y).tolist() == [9, 9, 9]
    assert [len(part[0]) for part in three.sets] == [9, 9, 9]
    assert torch.equal(sets(1, sources=1).at(4)[0], sets(1).at(4)[0])
    args = gf.Args(gan_seeds=(5,), class_samples=9)
    choices = {"5": dict(epoch=1, sigma=1.2, threshold=0.1)}
    both = [gf.sets_of(args, about(3, 1), row, 2, choices, lambda *_: None) for row in ("single", "multi")]
    single, multi = ((made.sources, made.period, made.n) for made in both)
    assert single == multi


# What the method's description says of CIFAR-10, field by field, and where the others and the miniature differ.
CIFAR10 = dict(
    dataset="cifar10", seed=0, precision="fp32", val_per_class=1000, image_size=32, resnet_width=64, resnet_blocks=3,
    resnet_epochs=100, real_epochs=300, resnet_drops=(60, 80), resnet_lr=0.1, resnet_momentum=0.9, resnet_wd=1e-4,
    resnet_batch=128, random_flip=True, random_crop=True, random_erasing=True, gan_seeds=(42, 137, 238723),
    gan_images="train+val", gan_precision="fp32", gan_epochs=500, gan_batch=192, gan_micro_batch=0, gan_d_steps=3,
    gan_width=128,
    gan_latent=128, gan_embedding="uniform", gan_loss="hinge", gan_lr=2e-4, gan_d_lr=None,
    gan_betas=(0.5, 0.999), gan_ema=0.9999, gan_ema_start=1000,
    gen_seed=0, class_samples=0, attempts=50, ckpt_grid=(150, 500, 10), sigma_grid=(1.0, 2.0, 0.05),
    threshold_grid=(0.0, 0.9, 0.1), search_period=10, final_period=1, recycle_fraction=1.0, select_on="val",
    rows=("real", "baseline", "filter", "recycle", "expansion", "single", "multi"), clf_seeds=3,
)  # fmt: skip
OTHERS = {
    "cifar10": {},
    "cifar100": dict(dataset="cifar100", val_per_class=100, attempts=10),
    "cinic10": dict(dataset="cinic10", precision="bf16", gan_seeds=(42, 4623, 13132)),
    "fashionmnist": dict(
        dataset="fashionmnist", gan_epochs=300, ckpt_grid=(50, 500, 10),
        gan_seeds=(18291829, 237137, 42, 1284182, 623237, 48746),
    ),
    "dermamnist": dict(
        dataset="dermamnist", gan_epochs=150, gan_ema=0.999, ckpt_grid=(10, 150, 10), threshold_grid=(0.0, 0.5, 0.1),
        gan_seeds=(42, 1412, 19281),
    ),
    "cifar10-16px": dict(
        dataset="folder", image_size=16, val_per_class=200, resnet_width=16, resnet_blocks=1, resnet_epochs=15,
        real_epochs=15, resnet_drops=(10, 13), gan_seeds=(42, 137), gan_epochs=8, gan_batch=64, gan_width=16,
        gan_latent=32, gan_embedding="normal", gan_lr=5e-4, gan_ema=0.999, gan_ema_start=500, ckpt_grid=(6, 8, 2),
        sigma_grid=(1.0, 1.5, 0.25), threshold_grid=(0.0, 0.8, 0.4), search_period=5, class_samples=2000, attempts=5,
    ),
    "digits": dict(
        dataset="digits", image_size=16, val_per_class=20, random_flip=False, resnet_width=8, resnet_blocks=1,
        resnet_epochs=10, real_epochs=15, resnet_drops=(7, 9), resnet_batch=32, gan_seeds=(42, 137), gan_epochs=23,
        gan_batch=32, gan_width=8, gan_latent=16, gan_embedding="normal", gan_lr=1e-3, gan_ema=0.98, gan_ema_start=50,
        ckpt_grid=(17, 23, 6), sigma_grid=(1.0, 1.5, 0.25), threshold_grid=(0.0, 0.8, 0.4), search_period=5, attempts=3,
    ),
}  # fmt: skip
NO_METHOD = """preset data_dir output_dir device compile deterministic stages resume track workers plan plan_processes
gan_monitor gan_inception gen_micro_batch export_images""".split()


@pytest.mark.parametrize("name", gf.PRESETS)
def test_presets_are_the_methods_table(name):
    args = gf.Args(**gf.PRESETS[name])
    found = {field: value for field, value in vars(args).items() if field not in NO_METHOD}
    assert found == CIFAR10 | OTHERS[name]
    gf.check_args(args)
    if name == "fashionmnist":
        assert gf.checkpoints(args) == list(range(50, 301, 10)), "those after the last epoch do not exist"
    elif args.image_size == 32:
        assert len(gf.checkpoints(args)) == {"dermamnist": 15}.get(name, 36)


def tiny_data(n_train=14, n_val=6, size=8):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (n_train + n_val, 1, size, size), generator=g, dtype=torch.uint8)
    y = torch.arange(n_train + n_val) % 3
    return Pixels((x[:n_train], y[:n_train]), (x[n_train:], y[n_train:]), (x[:3], y[:3]), ["a", "b", "c"])


@pytest.mark.parametrize("flip, images", [(True, "train+val"), (False, "train+val"), (False, "train")])
def test_gan_training_equals_a_plain_loop_over_stock_parts(flip, images, tmp_path, monkeypatch):
    """Two Adams, timm's average, the hinge loss written out; the networks have golden tests of their own."""
    from timm.utils import ModelEmaV3

    args = gf.Args(gan_width=2, gan_latent=4, image_size=8, gan_batch=6, gan_epochs=2, ckpt_grid=(1, 2, 1), gan_lr=2e-3)
    args = dataclasses.replace(args, gan_d_lr=3e-3, gan_ema=0.8, gan_ema_start=2, random_flip=flip, gan_images=images)
    data, run = (
        tiny_data(),
        SimpleNamespace(path=lambda *parts: tmp_path.joinpath(*parts), **QUIET),
    )
    monkeypatch.setattr(gf, "measured", lambda *_: {})
    monkeypatch.setattr(gf, "DRAWN_STEPS", 2)
    gf.train_gan(args, run, ONE, data, None, 7, None)
    first = gf.gan_file(run, 7, 1)
    content = first.read_bytes()
    first.unlink()  # an earlier epoch of a finished GAN is lost: the same training makes it again
    gf.train_gan(args, run, ONE, data, None, 7, None)
    assert first.read_bytes() == content

    torch.manual_seed(distributed.seed_of(7, "gan"))
    g, d = gf.Generator(3, 1, 2, 4, 4, "uniform", 8).train(), gf.Discriminator(3, 1, 2).train()
    average = ModelEmaV3(g, decay=0.8, update_after_step=2 - 1)
    rates = {g: 2e-3, d: 3e-3}
    optimizers = {net: torch.optim.Adam(net.parameters(), lr=lr, betas=(0.5, 0.999)) for net, lr in rates.items()}

    def update(net, loss):
        optimizer = optimizers[net]
        t = 1 + int(optimizer.state[next(net.parameters())].get("step", 0))
        optimizer.param_groups[0]["eps"] = 1e-6 / math.sqrt(1 - 0.999**t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    splits = ("train", "val") if images == "train+val" else ("train",)
    x, y = (torch.cat([getattr(data, split)[part] for split in splits]) for part in (0, 1))
    step = 0
    for epoch in (0, 1):
        random = torch.Generator().manual_seed(distributed.seed_of(7, "gan", epoch))
        rows, coins = torch.randperm(len(y), generator=random), torch.rand(len(y), generator=random) < 0.5
        for i, part in enumerate(rows[: len(y) // 6 * 6].split(6)):
            real, label, step = x[part] / 127.5 - 1, y[part], step + 1
            if flip:
                real = torch.stack([r.flip(-1) if coins[row] else r for r, row in zip(real, part, strict=True)])
            if i % 2 == 0:
                latents = torch.Generator().manual_seed(distributed.seed_of(7, "latents", epoch, i // 2))
                of_two_steps = torch.randn(2, 4, 6, 4, generator=latents)
            *z_d, z_g = of_two_steps[i % 2]
            for z in z_d:
                logits = d(torch.cat([g(z, label).detach(), real]), torch.cat([label, label]))
                update(d, torch.relu(1 + logits[:6]).mean() + torch.relu(1 - logits[6:]).mean())
            update(g, -d(g(z_g, label), label).mean())
            average.update(g, step=step)
        found = load_tensors(gf.gan_file(run, 7, epoch + 1))
        expected = average.module.state_dict()
        assert set(found) == set(expected)
        for name in found:
            if not name.endswith("num_batches_tracked"):  # a count that nothing reads
                close(found[name], expected[name], 2e-4)
    raw = g.state_dict()
    assert max((raw[name] - found[name]).abs().max() for name in found if name.endswith("weight")) > 1e-3, "not raw"


@pytest.mark.parametrize("at", ["save_tensors", "measured"])
def test_stopped_gan_goes_on_with_the_same_bits(at, tmp_path, monkeypatch):
    """Stopped in the second epoch, before its generator is written or after, with the checkpoint of the first."""
    args = gf.Args(gan_width=2, gan_latent=4, image_size=8, gan_batch=10, gan_epochs=3, ckpt_grid=(1, 3, 1))
    args = dataclasses.replace(args, gan_ema=0.8, gan_ema_start=1, gan_monitor=1, gan_d_steps=1)
    monkeypatch.setattr(gf, "measured", lambda *_: {})

    def train(name):
        run = SimpleNamespace(path=lambda *parts: tmp_path.joinpath(name, *parts), **QUIET)
        gf.train_gan(args, run, ONE, tiny_data(), None, 7, None)
        return [load_tensors(gf.gan_file(run, 7, epoch)) for epoch in (1, 2, 3)]

    whole, original, calls = train("whole"), getattr(gf, at), []

    def stop(*a):
        calls.append(1)
        if len(calls) == 2:
            raise InterruptedError
        return original(*a)

    monkeypatch.setattr(gf, at, stop)
    with pytest.raises(InterruptedError):
        train("stopped")
    assert (tmp_path / "stopped" / "gan" / "seed7" / "checkpoint.safetensors").exists()
    for a, b in zip(whole, train("stopped"), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert [p.name for p in (tmp_path / "stopped" / "gan" / "seed7").glob("check*")] == []


def plain_augmentation(image, flip, top, left, noise, box, pad):
    """One image [1, S, S]: flip, crop after padding with 0, a box of rescaled noise"""
    size = image.shape[-1]
    image = image.flip(-1) if flip else image
    image = nn.functional.pad(image, (pad,) * 4)[:, top : top + size, left : left + size].clone()
    noise = (noise - noise.min()) / (noise.max() - noise.min()) * (image.max() - image.min()) + image.min()
    cx, cy, h, w = box
    for i in range(size):
        for j in range(size):
            if cy - h / 2 <= i < cy + h / 2 and cx - w / 2 <= j < cx + w / 2:
                image[:, i, j] = noise[:, i, j]
    return image


@pytest.mark.parametrize("flip", [True, False])
def test_classifier_training_equals_a_plain_loop_over_stock_parts(flip, tmp_path, monkeypatch):
    """torch's SGD with Nesterov momentum, decay by hand; after a drop of the rate the velocity lives on."""
    args = gf.Args(image_size=8, resnet_width=4, resnet_blocks=1, resnet_batch=5, resnet_lr=0.05, resnet_wd=0.01)
    args = dataclasses.replace(args, resnet_momentum=0.8, resnet_drops=(2, 4), random_flip=flip, real_epochs=4)
    data, figures = tiny_data(), iter(range(100))
    monkeypatch.setattr(gf, "accuracy", lambda *_: float(next(figures)))  # the last epoch is the best
    monkeypatch.setattr(gf, "AT_ONCE", 2)
    run, sets = SimpleNamespace(dir=tmp_path, made=lambda: None), gf.RealSet(args, data.train, 9)
    gf.train_classifier(args, run, ONE, data, sets, tmp_path, {})
    assert next(figures) == 4, "the validation images after every epoch, and no others"

    torch.manual_seed(distributed.seed_of(9, "classifier"))
    net = gf.ResNet(3, 1, 4, 1).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.8, nesterov=True)
    x, y = data.train[0] / 127.5 - 1, data.train[1]
    for epoch, rate in enumerate((0.05, 0.005, 0.005, 0.0005), 1):
        before, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], rate
        for state in optimizer.state.values():
            state["momentum_buffer"] *= before / rate
        random = torch.Generator().manual_seed(distributed.seed_of(9, "epoch", epoch))
        batches = []
        for rows in torch.randperm(14, generator=random).split(10):  # two batches are augmented at once
            b = len(rows)
            coin = torch.rand(b, generator=random) < 0.5 if flip else torch.zeros(b)
            top, left = torch.randint(3, (2, b), generator=random)
            noise, u = torch.randn(b, 1, 8, 8, generator=random), torch.rand(4, b, generator=random)
            boxes = torch.stack([(8 * u[0]).floor(), (8 * u[1]).floor(), *(8 * (0.2 + 0.3 * u[2:])).ceil()], 1)
            each = zip(x[rows], coin, top, left, noise, boxes, strict=True)
            images = torch.stack([plain_augmentation(*one_image, pad=1) for one_image in each])
            batches += zip(images.split(5), y[rows].split(5), strict=True)
        for images, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            with torch.no_grad():
                for p in net.parameters():
                    p *= 1 - 0.01
            optimizer.step()
    found = load_tensors(tmp_path / "weights.safetensors")
    for name, expected in net.state_dict().items():
        close(found[name], expected, 5e-5)


@pytest.mark.parametrize("filtered", [True, False])
def test_sets_equal_a_plain_filter_loop(filtered):
    """Two generators, each with its own sigma and threshold, and a new set every two epochs."""
    args, seed, n = gf.Args(gen_seed=4), 3, 8
    about = {5: (1.5, 0.3), 6: (0.7, 0.6)}  # GAN -> sigma, threshold
    sources = [gf.Source(gan, Fake(0.8), sigma, t if filtered else None) for gan, (sigma, t) in about.items()]
    made = gf.SyntheticSets(args, sources, 3, 2 * n, seed, 2)
    for epoch in (1, 2, 3, 5):
        images, labels = [], []
        for gan, (sigma, threshold) in about.items():
            for c in range(3):
                block, pool, kept, asked = 0, torch.zeros(0, 2), torch.zeros(0, 2), 0
                while len(kept) < n:
                    size = n if len(kept) == 0 else 2 * (n - len(kept))
                    while len(pool) < asked + size:
                        g = torch.Generator().manual_seed(distributed.seed_of(4, seed, gan, (epoch - 1) // 2, c, block))
                        pool, block = torch.cat([pool, torch.randn(n, 2, generator=g)]), block + 1
                    z = sigma * pool[asked : asked + size]
                    u = torch.special.ndtr(z)
                    right, p = u[:, 0] < 0.8, u[:, 1]
                    shown = torch.stack([z[:, 0], torch.where(right, p, -1.0)], 1)
                    kept, asked = torch.cat([kept, shown[right & (p > threshold)] if filtered else shown]), asked + size
                images.append(kept[:n])
                labels += n * [c]
        x, y = made.at(epoch)
        close(x, torch.cat(images), 1e-6)
        assert y.tolist() == labels


class ToyInception(nn.Module):
    """Stands for Inception: fixed features of a picture"""

    num_features = 12

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)


def test_inception_figures_are_the_distances_on_those_features():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore

    toy = ToyInception()
    shape = dict(feature=toy, normalize=True)
    fid = FrechetInceptionDistance(input_img_size=(3, 16, 16), reset_real_features=False, **shape)
    metrics = [fid, InceptionScore(splits=1, **shape)]
    g = torch.Generator().manual_seed(0)
    real, fake = (torch.rand(250, 1, 16, 16, generator=g) * 2 - 1 for _ in range(2))
    fake = fake * 0.5 + 0.3
    shown = [(x / 2 + 0.5).expand(-1, 3, -1, -1) for x in (real, fake)]
    features, of_bytes = [toy(x) for x in shown], toy((shown[1] * 255).byte())  # torchmetrics' IS shows it bytes
    for _ in range(2):  # the second time nothing is left of the first but the real images
        found = distances.inception_figures(metrics, real, fake)
        assert found["fid"] == pytest.approx(distances.frechet_distance(*features), abs=1e-4)
        assert found["inception_score"] == pytest.approx(distances.inception_score(of_bytes.softmax(1)), abs=1e-3)
        assert fid.real_features_num_samples == 250, "real images are looked at once"


def test_inception_that_cannot_be_had_is_told(monkeypatch):
    import torchmetrics.image.fid as fid

    def offline(**_):
        raise OSError("no route to host")

    monkeypatch.setattr(fid, "FrechetInceptionDistance", offline)
    with pytest.raises(UserError, match="could not be downloaded"):
        distances.inception_metrics(torch.device("cpu"), "--gan-inception")


# ---- data and bad input ------------------------------------------------------------------------------------------


def test_dermamnist_has_its_own_splits(tmp_path):
    sizes, rng = dict(train=21, val=14, test=7), np.random.default_rng(0)
    arrays = {f"{k}_images": rng.integers(0, 256, (n, 28, 28, 3), dtype=np.uint8) for k, n in sizes.items()}
    arrays |= {f"{k}_labels": rng.permutation(n)[:, None].astype(np.uint8) % 7 for k, n in sizes.items()}
    np.savez(tmp_path / "dermamnist.npz", **arrays)
    data = gf.load_data(gf.Args(dataset="dermamnist", data_dir=str(tmp_path), workers=0), ONE)
    assert data.n_classes == 7 and [len(s[1]) for s in (data.train, data.val, data.test)] == [21, 14, 7]
    assert data.train[0].shape == (21, 3, 32, 32) and data.train[0].dtype == torch.uint8
    assert data.test[1].tolist() == arrays["test_labels"][:, 0].tolist()
    assert torch.equal(data.val[0][2], prepared(Image.fromarray(arrays["val_images"][2]), 3, 32))


def write_folder(root, splits, classes=("cat", "dog"), n=6):
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
                image.save(root / split / name / f"{i}.png")


def test_cinic10_pools_train_and_valid(tmp_path):
    write_folder(tmp_path, ("train", "valid", "test"), datasets.CIFAR10, n=3)
    data = gf.load_data(gf.Args(dataset="cinic10", data_dir=str(tmp_path), val_per_class=2, workers=0), ONE)
    assert [len(s[1]) for s in (data.train, data.val, data.test)] == [40, 20, 30]
    assert torch.bincount(data.val[1]).tolist() == 10 * [2] and data.train[0].shape == (40, 3, 32, 32)


def test_run_does_not_go_on_with_other_data(tmp_path):
    """Other pixels under the same name are noticed at the start, by main."""
    write_folder(tmp_path, ("train", "test"), n=4)
    args = gf.Args(dataset="folder", data_dir=str(tmp_path), output_dir=str(tmp_path / "run"), val_per_class=1)
    args = dataclasses.replace(args, gan_batch=4, class_samples=3, stages=(), device="cpu", workers=0)
    gf.main(args)  # no stages: opens the folder, and that is all
    (tmp_path / "run" / "stages").mkdir()
    (tmp_path / "run" / "stages" / "real.json").write_text("{}")  # work
    gf.main(args)
    image = tmp_path / "train" / "cat" / "0.png"
    Image.fromarray(255 - np.asarray(Image.open(image))).save(image)
    with pytest.raises(UserError, match="data set has changed"):
        gf.main(args)


@pytest.mark.parametrize(
    "flags, word",
    [
        (dict(sigma_grid=(2.0, 1.0, 0.1)), "--sigma-grid"),
        (dict(threshold_grid=(0.0, 1.0, 0.1)), "--threshold-grid"),
        (dict(sigma_grid=(1.0, 2.0, 1e-9)), "--sigma-grid"),
        (dict(threshold_grid=(0.0, 0.9, 0.0)), "--threshold-grid"),
        (dict(sigma_grid=(1.0, 50.0, 0.001)), "--sigma-grid"),
        (dict(ckpt_grid=(1, 2000, 1), gan_epochs=2000), "--ckpt-grid"),
        (dict(ckpt_grid=(501, 600, 1)), "--ckpt-grid"),
        (dict(attempts=0), "--attempts"),
        (dict(gan_seeds=(1, 1)), "--gan-seeds"),
        (dict(rows=("baseline", "baseline")), "--rows"),
        (dict(rows=("baseline", "real")), "--rows"),
        (dict(image_size=30), "--image-size"),
        (dict(gan_micro_batch=1), "--gan-micro-batch"),
    ],
)
def test_bad_flags_are_refused_by_name(flags, word):
    with pytest.raises(UserError, match=word):
        gf.check_args(gf.Args(**flags))


def numbers_of_args():
    """(field, value with one number replaced by each of the bad ones) for all numeric fields of the script"""
    harmless = {  # 0 has a meaning, or is a number as any other
        0: {
            "class_samples",
            "gan_ema_start",
            "resnet_wd",
            "resnet_momentum",
            "gan_ema",
            "gan_betas",
            "gen_seed",
            "gan_seeds",
            "threshold_grid",
            "gan_micro_batch",
        },  # fmt: skip
        10**12: {"gen_seed", "gan_seeds", "gan_micro_batch"},
        -1: {"attempts"},
    }
    for field in dataclasses.fields(gf.Args):
        value = getattr(gf.Args(), field.name)
        several = value if isinstance(value, tuple) else (value,)
        if (
            field.name in {f.name for f in dataclasses.fields(Frame)}
            or not several
            or isinstance(several[0], (str, bool, type(None)))
        ):
            continue
        for bad in (math.nan, math.inf, -math.inf, -1, 0, 10**12):
            for i in range(len(several)) if field.name not in harmless.get(bad, ()) else ():
                changed = (*several[:i], bad, *several[i + 1 :])
                yield field.name, changed if isinstance(value, tuple) else bad


def test_every_number_out_of_its_range_is_refused_at_the_start():
    cases = list(numbers_of_args())
    assert len({name for name, _ in cases}) > 30
    for name, value in cases:
        args = dataclasses.replace(gf.Args(), **{name: value})
        with pytest.raises(UserError, match="--" + name.replace("_", "-")):
            gf.check_args(args)
            pytest.fail(f"{name} {value} was taken")


def test_too_little_data_is_told(tmp_path):
    x, y = torch.zeros(40, 1, 8, 8, dtype=torch.uint8), torch.arange(40) % 2
    data = Pixels((x, y), (x[:10], y[:10]), (x, y), ["a", "b"])
    gf.check_data(gf.Args(gan_batch=50), data)
    for flags, word in (
        (dict(gan_batch=51), "--gan-batch"),
        (dict(gan_batch=41, gan_images="train"), "--gan-batch"),
        (dict(gan_batch=8, class_samples=2), "--class-samples"),
    ):
        with pytest.raises(UserError, match=word):
            gf.check_data(gf.Args(**flags), data)
    gf.check_data(gf.Args(gan_batch=8, class_samples=2, rows=("single",)), data)


@pytest.mark.parametrize("what", ["batch", "inception"])
def test_what_cannot_work_is_told_before_the_first_stage(what, tmp_path, monkeypatch):
    def offline(device, flag):
        raise UserError(f"{flag}: offline")

    monkeypatch.setattr(distances, "inception_metrics", offline)
    monkeypatch.setattr(gf, "train_real", lambda *_: pytest.fail("the first stage was begun"))
    flags = dict(batch=dict(gan_batch=1001), inception=dict(gan_inception=True))[what]
    args = gf.Args(**gf.PRESETS["digits"] | flags, output_dir=str(tmp_path / "run"), device="cpu")
    with pytest.raises(UserError, match=dict(batch="--gan-batch 1001", inception="offline")[what]):
        gf.main(args)


def test_flags_of_later_stages_may_change_until_those_begin(tmp_path):
    dist = distributed.Dist(0, 0, 1, torch.device("cpu"))

    def opened(**flags):
        args = gf.Args(**gf.PRESETS["digits"] | flags, output_dir=str(tmp_path / "run"))
        gf.runs.open_run("gafi", args, dist, gf.SPEED_FLAGS, later=gf.LATER).close()

    fields = {field.name for field in dataclasses.fields(gf.Args)}
    for word in " ".join(gf.LATER.values()).split():
        assert word in fields or (word.endswith("_") and any(name.startswith(word) for name in fields))
    opened()
    (tmp_path / "run" / "stages").mkdir()
    (tmp_path / "run" / "stages" / "real.json").write_text("{}")
    opened(gan_lr=0.5, sigma_grid=(1.0, 1.0, 0.5))
    (tmp_path / "run" / "stages" / "gan.json").write_text("{}")
    opened(gan_lr=0.5, sigma_grid=(1.0, 1.5, 0.5))
    for flags in (dict(gan_lr=0.4), dict(gan_lr=0.5, resnet_lr=0.2), dict(gan_lr=0.5, random_flip=True)):
        with pytest.raises(UserError, match="made with"):
            opened(**{"sigma_grid": (1.0, 1.5, 0.5), **flags})


# ---- the script, end to end on the real digits -------------------------------------------------------------------

SMALL = """--gan-width 2 --gan-latent 8 --gan-epochs 2 --gan-batch 250 --ckpt-grid 1 3 1 --gan-monitor 1 --real-epochs 3
--resnet-width 4 --resnet-epochs 3 --resnet-drops 2 3 --resnet-batch 64 --search-period 2 --sigma-grid 1 1.5 0.5
--threshold-grid 0 0.5 0.5 --clf-seeds 2 --class-samples 20 --attempts 3 --export-images 4""".split()


def run_small(launch, out, *flags, **kw):
    return launch("gafi.py", "--output-dir", out, *SMALL, *flags, **kw)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One finished small run, shared by the tests that only look at it."""
    from conftest import Launch

    out = tmp_path_factory.mktemp("small") / "run"
    done = run_small(Launch(out.parent, out.parent / "hub"), out)
    return out, done


def test_run_leaves_every_file_with_its_content(small):
    out, done = small
    for seed in (42, 137):
        assert sorted(p.name for p in (out / "gan" / f"seed{seed}").iterdir()) == [
            f"epoch{e}.safetensors" for e in (1, 2)
        ], "epoch 3 of the grid does not exist and is skipped"
        names = [p.name for p in (out / "search" / f"gan{seed}").iterdir()]
        assert len(names) == 2 + 1 + 1, "repeated configurations are not run again"
        best = json.loads((out / "search.json").read_text())[str(seed)]
        winner = "e{epoch}-s{sigma:g}-t{threshold:g}".format(**best)
        with_weights = {p.parent.name for p in (out / "search" / f"gan{seed}").glob("*/weights.safetensors")}
        assert with_weights == {winner}, "weights of the winner only"
    choices = json.loads((out / "search.json").read_text())
    assert set(choices) == {"42", "137"} and all(c["epoch"] in (1, 2) for c in choices.values())
    rows = [json.loads(line) for line in (out / "images" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and all((out / "images" / r["file_name"]).exists() for r in rows)
    assert {r["gan"] for r in rows} == {42, 137} and {r["row"] for r in rows} == {"multi"}
    result = json.loads((out / "results.json").read_text())
    assert result["script"] == "gafi" and result["images"] == 40
    assert set(result["baselines"]) == {"real", "baseline"}
    assert {"filter", "recycle", "expansion", "single", "multi"} <= set(result["metrics"])
    assert all(len(m["per_seed"]) == 2 for m in result["baselines"].values())
    assert {"real", "gan", "search", "final", "evaluate"} <= set(result["seconds"])
    for line in (out / "metrics.jsonl").read_text().splitlines():
        assert all(math.isfinite(v) for v in json.loads(line).values())
    logged = (out / "metrics.jsonl").read_text()
    assert "gan/seed42/frechet" in logged and "gan/seed137/accepted" in logged
    html = (out / "report.html").read_text()
    assert "data:image/png;base64," in html and 'src="http' not in html
    assert Image.open(out / "samples.png").size[0] > 300 and "GaFi, MultiGAN" in done.stdout
    assert not list(out.rglob("checkpoint.safetensors")) and not list(out.rglob("*.pt"))


def test_pictures_are_those_that_the_saved_classifier_saw(small):
    out, _ = small
    args = gf.Args(**{**gf.PRESETS["digits"], "resnet_width": 4, "gan_width": 2, "gan_latent": 8, "attempts": 3})
    run = SimpleNamespace(path=lambda *parts: out.joinpath(*map(str, parts)))
    data, choices = gf.load_data(args, ONE), json.loads((out / "search.json").read_text())
    f = gf.filtering_classifier(args, run, data)
    seed = json.loads((out / "classifier" / "config.json").read_text())["seed"]
    by_gan = {}
    for gan, best in choices.items():
        sampler = gf.load_sampler(args, run, data, f, int(gan), best["epoch"])
        samples = gf.Samples(sampler, best["sigma"], 10, (args.gen_seed, seed, int(gan), 0))
        found = gf.filtered_set(samples.draw, range(10), 10, best["threshold"], 3)[0]
        by_gan[int(gan)] = found.view(10, 10, 1, 16, 16)
    for line in (out / "images" / "metadata.jsonl").read_text().splitlines():
        row, k = json.loads(line), int(Path(json.loads(line)["file_name"]).stem)
        shown = torch.from_numpy(np.asarray(Image.open(out / "images" / row["file_name"]).convert("L")).copy())
        assert (row["gan"], row["sigma"]) == ([42, 137][k % 2], choices[str(row["gan"])]["sigma"])
        seen = as_images(by_gan[row["gan"]][row["label"]], torch.zeros(10), ["one"])
        assert (shown.int() - torch.from_numpy(seen.pixels[k // 2]).int()).abs().max() <= 1


def test_expansion_begins_with_the_winner_of_the_search(small):
    out, done = small
    best = json.loads((out / "search.json").read_text())["42"]
    winner = out / "search" / "gan42" / "e{epoch}-s{sigma:g}-t{threshold:g}".format(**best)
    first, second = (out / "classifier" / "runs" / f"expansion-seed{s}" for s in (0, 1))
    found, of_search = (json.loads((f / "metrics.json").read_text()) for f in (first, winner))
    assert found == of_search | dict(row="expansion", gans=[42], period=2, images=200, test=found["test"])
    assert not any("test" in row for row in of_search["history"]), "the search does not look at the test split"
    weights, theirs = (load_tensors(f / "weights.safetensors") for f in (first, winner))
    assert all(torch.equal(weights[k], theirs[k]) for k in weights)
    assert json.loads((second / "metrics.json").read_text())["gans"] == [137], "not the search's seed: trained anew"


def test_expansion_is_not_trained_twice(tmp_path):
    args, data = gf.Args(resnet_width=2, resnet_blocks=1), tiny_data()
    net = gf.make_classifier(args, data, 3)
    save_tensors(tmp_path / "a" / "weights.safetensors", net.state_dict())
    write_json(tmp_path / "a" / "metrics.json", dict(seed=0, score=5.0))
    gf.take_over(args, data, tmp_path / "a", tmp_path / "b", dict(row="expansion"))
    expected = dict(seed=0, score=5.0, row="expansion", test=gf.accuracy(net, data.test, args))
    assert json.loads((tmp_path / "b" / "metrics.json").read_text()) == expected
    gf.take_over(args, data, tmp_path / "none", tmp_path / "c", {})
    assert not (tmp_path / "c").exists(), "no weights: trained as any other"


def test_run_is_not_continued_on_another_kind_of_device(small):
    out, _ = small
    args = gf.Args(
        output_dir=str(out),
        **{k: v for k, v in json.loads((out / "args.json").read_text())["args"].items() if k != "output_dir"},
    )
    dist = distributed.Dist(0, 0, 1, torch.device("cuda"))
    with pytest.raises(UserError, match='--device names "cpu", now "cuda"'):
        gf.runs.open_run("gafi", args, dist, gf.SPEED_FLAGS, models=dict(device=dist.device.type))


def test_recorded_figures_agree_with_the_saved_classifier(small):
    out, _ = small
    about = json.loads((out / "classifier" / "config.json").read_text())
    net = gf.ResNet(about["classes"], about["channels"], about["width"], about["blocks"])
    net.load_state_dict(load_tensors(out / "classifier" / "model.safetensors"))
    args = gf.Args(**gf.PRESETS["digits"])
    data = gf.load_data(args, ONE)
    recorded = json.loads((out / "results.json").read_text())["metrics"]["multi"]["per_seed"]
    assert gf.accuracy(net, data.test, args) == pytest.approx(recorded[about["seed"]], abs=0.13)
    for file in (out / "classifier" / "runs").glob("*/metrics.json"):
        m = json.loads(file.read_text())
        best = max(m["history"], key=lambda row: row["val"])
        assert m["score"] == m["val"] == best["val"] and m["epoch"] == best["epoch"]
        if not file.parent.name.startswith("expansion-seed0"):  # of the search
            assert m["test"] == pytest.approx(best["test"], abs=0.13)
            assert m["best_test_epoch"] == max(row["test"] for row in m["history"]) >= m["test"] - 0.13


def test_filtering_classifier_is_frozen(small):
    out, _ = small
    args = gf.Args(**{**gf.PRESETS["digits"], "resnet_width": 4, "gan_width": 2, "gan_latent": 8})
    run = SimpleNamespace(path=lambda *parts: out.joinpath(*map(str, parts)))
    data = gf.load_data(args, ONE)
    f = gf.filtering_classifier(args, run, data)
    before = {name: tensor.clone() for name, tensor in f.state_dict().items()}
    samples = gf.Samples(gf.load_sampler(args, run, data, f, 42, 1), 1.5, 8, (0,))
    gf.filtered_set(samples.draw, range(10), 8, 0.0, 2)
    assert not any(module.training for module in f.modules())
    assert not any(p.requires_grad for p in f.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in f.state_dict().items())


def test_second_call_does_no_work(small, launch):
    out, _ = small
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".png", ".safetensors", ".json")}
    run_small(launch, out)
    assert not [p.name for p, t in before.items() if p.stat().st_mtime_ns != t and p.name != "args.json"]


def test_other_method_flags_are_refused_with_the_difference(small, launch, tree_hash):
    out, _ = small
    before = tree_hash(out, "**/*.safetensors")
    done = run_small(launch, out, "--gan-lr", "0.5", check=False)
    assert done.returncode == 2 and "gan-lr" in done.stderr and "Traceback" not in done.stderr
    assert tree_hash(out, "**/*.safetensors") == before


RESULT_FILES = ("gan/**/*.safetensors", "search/**/*.json", "classifier/**/*.safetensors", "images/**/*.png")


def test_two_processes_leave_the_same_bytes_as_one(small, launch, tmp_path, tree_hash):
    out, _ = small
    run_small(launch, tmp_path / "two", processes=2)
    for pattern in RESULT_FILES:
        assert tree_hash(tmp_path / "two", pattern) == tree_hash(out, pattern), pattern


def kill_when(launch, out, patterns):
    """Start the run and kill it (-9) as soon as a file matches the first pattern, again for the next; then finish."""
    killed = 0
    for pattern in patterns:
        process = subprocess.Popen(
            launch.command("gafi.py", "--output-dir", out, *SMALL),
            env=launch.env(),
            cwd=launch.cwd,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not list(out.glob(pattern)):
            time.sleep(0.02)
        killed += process.poll() is None
        process.kill()
        process.wait()
    run_small(launch, out)
    return killed


def test_killed_run_resumes_to_the_same_bytes(small, launch, tmp_path, tree_hash):
    out, _ = small
    patterns = (
        "gan/seed42/checkpoint.safetensors",
        "search/gan137/*/checkpoint.safetensors",
        "classifier/runs/filter-seed1/checkpoint.safetensors",
    )
    assert kill_when(launch, tmp_path / "killed", patterns) == 3
    for pattern in RESULT_FILES:
        assert tree_hash(tmp_path / "killed", pattern) == tree_hash(out, pattern), pattern


@pytest.mark.slow
def test_compiled_step_and_sampling_equal_the_plain_ones(tmp_path):
    losses, images = [], []
    for compiled in (False, True):
        args, gan, step = small_gan(tmp_path, compile=compiled, image_size=16)
        x, y, z = a_batch(args)
        x = x[:, :, ::2, ::2].contiguous()
        losses.append(torch.stack([torch.stack(step(i, x, y, z)) for i in (0, 1)]))
        f = gf.ResNet(3, 1, 4, 1).eval()
        distributed.seed_global(0)
        for p in f.parameters():
            nn.init.normal_(p, std=0.1)
        sampler = gf.ScoredGenerator(args, gan.ema, f)
        images.append([sampler(torch.ones(n, 6), torch.zeros(n, dtype=torch.long))[0] for n in (3, 5)])
    assert torch.allclose(losses[0], losses[1], atol=2e-3)
    assert all(torch.allclose(a, b, atol=5e-3) for a, b in zip(*images, strict=True))


@pytest.mark.slow
def test_digits_run_to_the_end_above_a_floor(launch, tmp_path):
    launch("gafi.py", "--output-dir", tmp_path / "run", timeout=3600)
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["baselines"]["real"]["mean"] > 94
    means = {row: found["mean"] for row, found in (result["baselines"] | result["metrics"]).items() if "mean" in found}
    assert means["multi"] > 75 and means["expansion"] > means["baseline"], means  # as docs/gafi.md reports


# ---- the paper's presets at full size, on a few random pictures --------------------------------------------------

# preset: classes, sides and channels of its pictures, has it a validation split
FULL_SIZE = {
    "cifar10": (10, 32, 3, False),
    "cifar100": (100, 32, 3, False),
    "cinic10": (10, 32, 3, True),
    "fashionmnist": (10, 28, 1, False),
    "dermamnist": (7, 28, 3, True),
}
FEW = dict(
    real_epochs=1, resnet_epochs=2, resnet_batch=64, gan_epochs=1, gan_monitor=1, ckpt_grid=(1, 1, 1), clf_seeds=1,
    sigma_grid=(1.0, 1.5, 0.5), threshold_grid=(0.0, 0.5, 0.5), attempts=2, search_period=1, rows=("real", "multi"),
    export_images=1, gen_micro_batch=16, device="cpu", workers=0,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("preset", FULL_SIZE)
def test_preset_at_full_size(preset, tmp_path, monkeypatch):
    """Networks, shapes, splits and stages of the paper's runs, two pictures of each class and one step of each GAN."""
    classes, side, channels, has_val = FULL_SIZE[preset]
    names, rng = [f"class {c}" for c in range(classes)], np.random.default_rng(0)

    def split(name, per_class):
        labels = np.arange(per_class * classes) % classes
        shape = (len(labels), side, side) + (3,) * (channels == 3)
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        return datasets.Images(labels, [f"{name}/{i}" for i in range(len(labels))], names, pixels=pixels)

    made = datasets.ImageDataset(
        preset, names, split("train", 3), split("val", 1) if has_val else None, split("test", 1)
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: made)
    values = gf.PRESETS[preset]
    seeds = values.get("gan_seeds", gf.Args().gan_seeds)[: 1 if classes == 100 else 2]
    flags = dict(val_per_class=1, gan_seeds=seeds, gan_batch=2 * classes, class_samples=len(seeds))
    gf.main(gf.Args(preset=preset, **values | FEW | flags, output_dir=str(tmp_path / "run")))
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["images"] == classes and {"multi", "search"} <= set(result["metrics"])
    for seed in seeds:
        generator = load_tensors(tmp_path / "run" / "gan" / f"seed{seed}" / "epoch1.safetensors")
        assert generator["last.weight"].shape == (channels, 512, 3, 3)
        assert generator["embed.weight"].shape == (classes, 128)
    figures = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(v) for row in figures for v in row.values())
