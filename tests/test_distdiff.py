"""DistDiff: values of the authors' code, invariants of the method, the script end to end on the tiny world."""

import json
import subprocess

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import distdiff as dd
from common import distributed
from common import run as runs
from common.run import UserError


@pytest.fixture
def g(golden):
    return golden("distdiff")


def close(a, b, tol=1e-5):
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max().item() <= tol


# ---- golden: the toy networks of the vectors -----------------------------------------------------


class Toy:
    """The denoiser, decoder and guide that golden/distdiff.md defines, over our sampler: step(z, i) and feature(x0)."""

    def __init__(self, g, rows=slice(None)):
        self.g, self.rows = g, rows
        self.t, self.abar, self.abar_next = dd.ddim_schedule(50, dd.alphas_cumprod())

    def eps(self, x, t, c):
        text = (c.mean(1) @ self.g["stub.Wc"])[:, :, None, None]
        time = (t / 1000 * self.g["stub.wt"])[None, :, None, None]
        return torch.tanh(torch.einsum("oi,bihw->bohw", self.g["stub.Wx"], x) + text + time)

    def step(self, z, i):
        negative = self.eps(z, self.t[i], self.g["tg.emb_neg"].expand(len(z), -1, -1))
        positive = self.eps(z, self.t[i], self.g["tg.emb_pos"][self.rows])
        eps = dd.guided(negative, positive, self.g["tg.cfg"].item())
        return dd.ddim_step(z, eps, self.abar[i], self.abar_next[i])

    def feature(self, x0):
        image = torch.tanh(0.2 * torch.einsum("oi,bihw->bohw", self.g["stub.Wd"], x0 / 0.18215))
        image = dd.guide_view(image.repeat_interleave(4, 2).repeat_interleave(4, 3), 224)
        pooled = F.adaptive_avg_pool2d(image, 4).flatten(1)
        return F.relu(pooled @ self.g["stub.We"] + self.g["stub.be"])

    def prototypes(self):
        labels = self.g["tg.targets"][self.rows]
        return self.g["tg.class_proto"][labels], self.g["tg.group_proto"][labels]


def setting(g, case):
    m, period, rho, radius, lam_c, lam_g, use_c, use_g = g[f"tg.{case}.hp"].tolist()
    return 50 - int(m), int(period), rho, radius, lam_c * use_c, lam_g * use_g


def guide_case(g, case, rows=slice(None), rho_factor=1.0, start=None):
    """Our transform guidance in one batch -> latent, dict of energies and gradients, trace of the look-ahead."""
    i, period, rho, radius, lam_c, lam_g = setting(g, case)
    toy, (e, b) = Toy(g, rows), start or (g[f"tg.{case}.e0"][rows], g[f"tg.{case}.b0"][rows])
    p, q = toy.prototypes()
    traces = []

    def score(v, i):
        total, trace = dd.look_ahead(v, i, period, toy.step, toy.feature, p, q, lam_c, lam_g)
        traces.append(trace)
        return total

    moved, info = dd.transform_guidance(g["tg.z"][rows], e, b, i, rho * rho_factor, radius, score)
    return moved, info, traces[0]


@pytest.mark.parametrize("case", "abc")
def test_golden_prototypes(g, case):
    features, labels, k = (g[f"proto.{case}.{name}"] for name in ("features", "labels", "K"))
    ours = dd.prototypes(features, labels, int(labels.max()) + 1, int(k))
    for name in ("class_mean", "group_mean", "class_unit", "group_unit"):
        close(ours[name], g[f"proto.{case}.{name}"])
    assert torch.equal(ours["assign"], g[f"proto.{case}.assign"])


def test_golden_projection(g):
    close(dd.project(g["proj.t"], g["proj.center"], g["proj.radius"]), g["proj.out"], 1e-6)


def test_golden_ddim(g):
    t, abar, abar_next = dd.ddim_schedule(50, dd.alphas_cumprod())
    assert torch.equal(t, g["ddim.timesteps"])
    close(abar, g["ddim.alphas_cumprod_at_timesteps"], 1e-6)
    close(abar_next[-1], g["ddim.final_alpha_cumprod"], 1e-6)
    x, noise = g["ddim.x"], g["ddim.noise"]
    for i in sorted({int(k.rsplit(".", 1)[1]) for k in g.keys() if k.startswith("ddim.prev.")}):
        close(dd.add_noise(x, noise, abar[i].expand(len(x))), g[f"ddim.add_noise.{i}"])
        x0, following = dd.ddim_step(x, noise, abar[i], abar_next[i])
        close(following, g[f"ddim.prev.{i}"])
        close(x0, g[f"ddim.x0.{i}"], 1e-5 * max(1, x0.abs().max().item()))


def test_golden_start_index(g):
    """Ours is the exact S - s S; the official one is one less where (1 - s) * 50 falls just below an integer."""
    for s, official in zip(g["ddim.strength"].tolist(), g["ddim.start_index_official"].tolist(), strict=True):
        product = (1 - s) * 50
        artefact = product < round(product) and round(product) - product < 1e-9
        assert dd.start_index(s, 50) == official + artefact


def test_golden_denoise(g):
    toy = Toy(g)
    for i in sorted({int(k.rsplit(".", 1)[1]) for k in g.keys() if k.startswith("denoise.prev.")}):
        x0, following = toy.step(g["tg.z"], i)
        close(following, g[f"denoise.prev.{i}"])
        close(x0, g[f"denoise.x0.{i}"])


@pytest.mark.parametrize("case", "ABCDE")
def test_golden_transform_guidance(g, case):
    tol = 1e-4 if setting(g, case)[3] > 1e3 else 1e-5  # nothing bounds the result
    moved, info, trace = guide_case(g, case)
    i, period, *_, lam_g = setting(g, case)
    assert torch.equal(Toy(g).t[i : i + period], g[f"tg.{case}.timesteps"])
    for r, (x0, f, j) in enumerate(trace):
        close(f, g[f"tg.{case}.feat.{r}"])
        if lam_g:
            assert torch.equal(j, g[f"tg.{case}.j.{r}"])
        if f"tg.{case}.x0.{r}" in g.keys():
            close(x0, g[f"tg.{case}.x0.{r}"])
    assert len(trace) == period
    close(info["energy"], g[f"tg.{case}.score"])
    for name, key in (("grad_e", "grad_e"), ("grad_b", "grad_b"), ("e", "e1"), ("b", "b1")):
        close(info[name], g[f"tg.{case}.{key}"], tol)
    close(moved, g[f"tg.{case}.z_out"], tol)


def test_golden_official_batch_averages_the_energy(g):
    start = g["tg.Bbatch.e0"], g["tg.Bbatch.b0"]
    ours, info, _ = guide_case(g, "B", start=start)
    mean, _, _ = guide_case(g, "B", rho_factor=1 / len(ours), start=start)
    close(mean, g["tg.Bbatch.z_out"], 1e-4)
    assert (ours - g["tg.Bbatch.z_out"]).abs().max() > 1e-2
    close(info["energy"].mean().reshape(g["tg.Bbatch.score_mean"].shape), g["tg.Bbatch.score_mean"])


def test_golden_direct_guidance(g):
    toy = Toy(g)
    i = toy.t.tolist().index(int(g["dg.t"]))
    z_next, x0, score = dd.direct_guidance(g["tg.z"], i, 10.0, toy.step, toy.feature, *toy.prototypes())
    close(score, g["dg.score"])
    close(x0, g["dg.x0"])
    close(z_next, g["dg.z_next"])


def test_golden_image_paths(g):
    out = dd.guide_view(g["resize.in"], 224)
    close(F.adaptive_avg_pool2d(out, 8), g["resize.out_pool8"])
    close(out[..., 100:116, 100:116], g["resize.out_crop"])
    close(torch.stack([out.min(), out.max()]), g["resize.out_minmax"])
    assert torch.equal(dd.to_uint8(g["resize.in"]), g["png.uint8"])


def test_golden_split_table_and_ours(g):
    """Official chunks of ceil(N / splits), which run out of range; ours take every world-th index."""
    for n, splits, split, first, end in g["split.rows"].tolist():
        chunk = -(-n // splits)
        assert (first, end) == (split * chunk, n if split == splits - 1 else (split + 1) * chunk)
        mine = [distributed.my_items(range(n), distributed.Dist(r, r, splits, "cpu")) for r in range(splits)]
        assert sorted(i for part in mine for i in part) == list(range(n))


def test_golden_learning_rates(g):
    rates = g["train.lr_per_epoch"]
    ours = [dd.epoch_lr(epoch, rates[0].item(), len(rates)) for epoch in range(len(rates))]
    close(torch.tensor(ours, dtype=torch.float64), rates, 1e-9)


def test_golden_mixup(g):
    lam, index, logits, y = g["mixup.lam"].item(), g["mixup.index"], g["mixup.logits"], g["mixup.y"]
    close(dd.mixup_pairs(g["mixup.x"], index, lam), g["mixup.mixed"])
    close(dd.mixup_loss(logits, y, index, lam), g["mixup.loss_correct"])
    close(dd.mixup_loss(logits, y, index, 1.0), g["mixup.loss_released"])


def test_golden_grid_mask(g):
    for i in sorted({int(k.split(".")[1]) for k in g.keys() if k.startswith("grid.")}):
        mask = g[f"grid.{i}.mask"]
        assert torch.equal(dd.grid_mask(len(mask), *g[f"grid.{i}.params"].tolist()), mask)


def test_golden_every_key_is_used(g):
    assert not g.unread(), f"no test reads {g.unread()}"
