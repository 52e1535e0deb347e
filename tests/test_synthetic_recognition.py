"""Synthetic data for recognition: values of the authors' code, invariants of the method, the script end to end."""

import json

import pytest
import torch
import torch.nn.functional as F

import synthetic_recognition as sr


@pytest.fixture
def g(golden):
    return golden("synthetic_recognition")


def close(a, b, tol):
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max().item() <= tol


# ---- golden ------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [2, 4])
def test_golden_soft_loss(g, T):
    z, z0, y = g["loss.student_logits"].clone().requires_grad_(), g["loss.teacher_logits"], g["loss.labels"]
    close(sr.soft_loss(z, z0, T), g[f"loss.T{T}.soft"], 1e-5)
    total = sr.tuning_loss(z, z0, y, 0.5, T)
    close(total, g[f"loss.T{T}.total_sl0.5"], 1e-5)
    close(torch.autograd.grad(total, z)[0], g[f"loss.T{T}.grad_student_sl0.5"], 1e-6)


def test_golden_hard_losses(g):
    z, z0, y = g["loss.student_logits"], g["loss.teacher_logits"], g["loss.labels"]
    close(sr.tuning_loss(z, None, y, 0, 2), g["loss.hard_ce"], 1e-5)
    close(sr.tuning_loss(z, None, y, 0, 2, smoothing=0.1), g["loss.label_smoothing_0.1"], 1e-5)
    close(sr.tuning_loss(z, None, z0.argmax(1), 0, 2), g["loss.hard_pseudo_label"], 1e-5)


def test_golden_learning_rate(g):
    total = g["lr.nowarm.steps"].item()
    ours = torch.tensor([sr.head_rate(s, total, 2e-3) for s in range(total)], dtype=torch.float64)
    close(ours, g["lr.nowarm.base2e-3"], 1e-12)
    total, warmup = g["lr.warm.steps_warm"].tolist()
    ours = torch.tensor([sr.head_rate(s, total, 1e-3, warmup) for s in range(total)], dtype=torch.float64)
    close(ours, g["lr.warm.base1e-3"], 1e-12)


def test_golden_zero_shot_head(g):
    W = sr.zero_shot_head(g["zs.text_emb"], g["zs.logit_scale"].exp())
    close(W, g["zs.weight"], 1e-4)
    close(sr.head_logits(g["zs.image_features"], W, g["zs.bias"]), g["zs.logits"], 1e-4)
    assert not g["zs.bias"].any()


def test_golden_filter(g):
    f, c, scale = g["filter.image_features"], g["filter.class"].item(), g["filter.logit_scale_log"].exp()
    W = sr.zero_shot_head(g["filter.text_features"][:, None], scale)
    close(sr.head_logits(f, W, 0.0), g["filter.logits"], 1e-4)
    confidence = sr.own_confidence(f, W, c)
    close(confidence, g["filter.confidence"], 1e-5)
    keep = sr.clip_filter(confidence, len(W), 0, None)
    assert torch.equal(torch.zeros(48, dtype=torch.uint8).index_fill(0, keep, 1), g["filter.keep_mask"])
    few = g["filter.topk_when_too_few"]
    assert torch.equal(sr.most_confident(confidence, len(few)), few)
    assert torch.equal(sr.clip_filter(confidence, len(W), len(few), None), few.sort().values)
    drawn = sr.clip_filter(confidence, len(W), 3, torch.Generator().manual_seed(0))
    assert len(set(drawn.tolist())) == 3 and set(drawn.tolist()) <= set(keep.tolist())


def relative(a, b, tol=1e-10):
    assert a.shape == b.shape and a.dtype == torch.float64
    assert ((a - b).abs() <= tol * b.abs().clamp(min=1e-300)).all()


def base(g):
    kept = sr.kept_timesteps()
    assert torch.equal(kept, g["sched.base.timestep_map"])
    return sr.respaced(sr.cosine_alphas(), kept)


def test_golden_schedules(g):
    s = base(g)
    relative(s["abar"], g["sched.base.alphas_cumprod"])
    relative(s["beta"], g["sched.base.betas"])
    relative(s["log_variance"], g["sched.base.posterior_log_variance_clipped"])
    kept = torch.tensor(sr.FAST27[::-1])
    assert torch.equal(kept, g["sched.up.timestep_map"])
    relative(sr.respaced(sr.linear_alphas(), kept)["abar"], g["sched.up.alphas_cumprod"])


@pytest.mark.parametrize("shots", [16, 8, 4, 2, 1])
def test_golden_real_guidance_start(g, shots):
    r = sr.RG_STEPS[shots]
    x = sr.noised_reference(g["rg.ref"], g[f"rg.noise_r{r}"], base(g)["abar"][r - 1].float())
    close(x, g[f"rg.xt_r{r}"], 1e-5)


def test_golden_guided_ancestral_loop(g):
    r, noises = g["loop.r"].item(), g["loop.noises"][:, :2]
    s = {k: v[:r] for k, v in base(g).items()}
    calls = []

    def denoise(x, t):
        calls.append(t)
        shift = 0.1 * torch.sin(torch.tensor(2 * torch.pi * t / 1000))
        return sr.guided((0.4 * x).tanh() + shift, (0.9 * x).tanh() + shift, 3.0), 0.5 * x.tanh()

    draws = iter(noises[1:])
    x = sr.noised_reference(g["rg.ref"], noises[0], s["abar"][-1].float())
    x = sr.reverse(denoise, x, s, lambda: next(draws), clamp=True)
    close(x, g["loop.samples"], 1e-5)
    assert len(calls) == r


def test_golden_upsampler(g):
    low = sr.quantised(g["loop.samples"])
    close(low, g["up.low_res"], 1e-6)
    u = F.interpolate(low, size=32, mode="bilinear", align_corners=False)
    s = sr.respaced(sr.linear_alphas(), torch.tensor(sr.FAST27[::-1]))
    x = sr.reverse(
        lambda x, t: ((x - 0.5 * u).tanh() + 0.05 * t / 1000, None), 0.997 * g["up.unit_noise"], s, None, True
    )
    close(x, g["up.samples"], 1e-4)
    assert (sr.as_uint8(x).int() - g["up.uint8"].int()).abs().max() <= 1
    assert torch.equal(sr.as_uint8(g["up.samples"]), g["up.uint8"])


def rows_of(x, y):
    return lambda rows: (x[rows], y[rows])


def test_golden_tuning_on_synthetic_images(g):
    W0, order = g["ct_zsl.W0"], g["ct_zsl.order"].tolist()
    W, b = W0.clone().requires_grad_(), torch.zeros(len(W0), requires_grad=True)
    pairs = [([], rows) for epoch in order for rows in sr.chunks(epoch, 16)]
    data = rows_of(g["ct_zsl.X"], g["ct_zsl.y"])
    losses = list(sr.tune_head(W, b, pairs, None, data, lambda f: sr.head_logits(f, W0, 0.0), 0.05, 0.1, 0.5, 2))
    close(torch.tensor(losses), g["ct_zsl.losses"], 1e-4)
    close(W, g["ct_zsl.W"], 1e-4)
    close(b, g["ct_zsl.b"], 1e-4)


def test_golden_mix_training(g):
    W0 = g["ct_fsl.W0"]
    W, b = W0.clone().requires_grad_(), torch.zeros(len(W0), requires_grad=True)
    steps = zip(g["ct_fsl.real_idx"].tolist(), g["ct_fsl.syn_idx"].tolist(), strict=True)
    pairs = [([i for i in real if i >= 0], [i for i in syn if i >= 0]) for real, syn in steps]
    real, syn = rows_of(g["ct_fsl.Xr"], g["ct_fsl.yr"]), rows_of(g["ct_fsl.Xs"], g["ct_fsl.ys"])
    losses = list(sr.tune_head(W, b, pairs, real, syn, lambda f: sr.head_logits(f, W0, 0.0), 0.02, 0.1, 0.5, 2))
    close(torch.tensor(losses), g["ct_fsl.losses"], 1e-4)
    close(W, g["ct_fsl.W"], 1e-4)
    close(b, g["ct_fsl.b"], 1e-4)
    ours = sr.step_pairs(12, 40, 5, 16, 3, "test")  # the loader rule that the indices document: same sizes
    assert [(len(r), len(s)) for r, s in ours] == [(len(r), len(s)) for r, s in pairs]


def test_golden_every_key_is_used(g, request):
    ours = {i.name for i in request.session.items if i.fspath == request.node.fspath and "golden" in i.name}
    if len(ours) < 16:
        pytest.skip("only when all golden tests of this file run")
    assert g.unread() == []
