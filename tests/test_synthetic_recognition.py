"""Synthetic data for recognition: values of the authors' code, invariants of the method, the script end to end."""

import contextlib
import json
import math
import shutil
import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import QUIET
from PIL import Image
from timm.layers import DropPath
from tiny_glide import make_tiny_glide

import synthetic_recognition as sr
from common import models
from common import painter as painters
from common.clip import load_clip
from common.datasets import ImageDataset, Images, few_shot, load_dataset
from common.distributed import Dist, seed_global, seed_of
from common.files import chunks, class_folders, load_tensors, save_tensors
from common.glide import sampler
from common.launch import UserError
from common.loop import Loop
from common.names import listed, spoken
from common.pretraining import IMAGENET_MEAN, IMAGENET_STD


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
    close(sr.tuning_loss(z, None, 0.9 * F.one_hot(y, 10) + 0.01, 0, 2), g["loss.label_smoothing_0.1"], 1e-5)
    close(sr.tuning_loss(z, None, z0.argmax(1), 0, 2), g["loss.hard_pseudo_label"], 1e-5)


def test_golden_learning_rate(g):
    total = g["lr.nowarm.steps"].item()
    ours = torch.tensor([sr.head_rate(s, total, 2e-3) for s in range(total)], dtype=torch.float64)
    close(ours, g["lr.nowarm.base2e-3"], 1e-12)
    total, warmup = g["lr.warm.steps_warm"].tolist()
    rising = [1e-3 * (s + 1) / warmup for s in range(warmup)]  # the official warm-up, which no command uses
    rates = rising + [sr.head_rate(s, total - warmup, 1e-3) for s in range(total - warmup)]
    ours = torch.tensor(rates, dtype=torch.float64)
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
    at_random = keep[torch.randperm(len(keep), generator=torch.Generator().manual_seed(0))[:3]]
    assert len(keep) > 3 and torch.equal(drawn, at_random.sort().values)
    assert set(drawn.tolist()) != set(sr.most_confident(confidence, 3).tolist())


def relative(a, b, tol=1e-10):
    assert a.shape == b.shape and a.dtype == torch.float64
    assert ((a - b).abs() <= tol * b.abs().clamp(min=1e-300)).all()


def base(g):
    kept = sampler.kept_timesteps()
    assert torch.equal(kept, g["sched.base.timestep_map"])
    return sampler.respaced(sampler.cosine_alphas(), kept)


def test_golden_schedules(g):
    s = base(g)
    relative(s["abar"], g["sched.base.alphas_cumprod"])
    relative(s["beta"], g["sched.base.betas"])
    relative(s["log_variance"], g["sched.base.posterior_log_variance_clipped"])
    kept = sampler.fast27()
    assert torch.equal(kept, g["sched.up.timestep_map"])
    relative(sampler.respaced(sampler.linear_alphas(), kept)["abar"], g["sched.up.alphas_cumprod"])


def plain_guidance(eps_u, eps_c, w):
    return (1 - w) * eps_u + w * eps_c


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
        return plain_guidance((0.4 * x).tanh() + shift, (0.9 * x).tanh() + shift, 3.0), 0.5 * x.tanh()

    draws = iter(noises[1:])
    x = sr.noised_reference(g["rg.ref"], noises[0], s["abar"][-1].float())
    x = sampler.reverse(denoise, x, s, lambda: next(draws), clamp=True)
    close(x, g["loop.samples"], 1e-5)
    assert len(calls) == r


def test_golden_upsampler(g):
    low = sampler.quantised(g["loop.samples"])
    close(low, g["up.low_res"], 1e-6)
    u = F.interpolate(low, size=32, mode="bilinear", align_corners=False)
    s = sampler.respaced(sampler.linear_alphas(), sampler.fast27())
    x = sampler.reverse(
        lambda x, t: ((x - 0.5 * u).tanh() + 0.05 * t / 1000, None), 0.997 * g["up.unit_noise"], s, None, True
    )
    close(x, g["up.samples"], 1e-4)
    assert (sampler.as_uint8(x).int() - g["up.uint8"].int()).abs().max() <= 1
    assert torch.equal(sampler.as_uint8(g["up.samples"]), g["up.uint8"])


class Log:
    """As much of a run as a loop needs"""

    def log(self, step, **values):
        pass

    def made(self):
        pass


ONE = Dist(rank=0, world=1, local_rank=0, device=torch.device("cpu"))


def rows_of(x, y):
    return lambda rows: (x[rows], y[rows])


def tuned_by(folder, W0, pairs, rates, real, syn, teacher, sl=0.5, T=2, wd=0.1, **more):
    """tune_head from W0 over these pairs of batches -> W, b, losses"""
    W, b = W0.clone().requires_grad_(), torch.zeros(len(W0), requires_grad=True)
    optimizer = torch.optim.AdamW([W, b], lr=rates[0], weight_decay=wd)
    loop = Loop(Log(), "train", len(pairs), optimizer, ONE, 1, file=folder / "checkpoint.safetensors")
    steps = sr.tune_head(loop, W, b, pairs.__getitem__, rates.__getitem__, real, syn, teacher, sl, T, **more)
    losses = [loss.item() for _, loss in steps]
    return W.detach(), b.detach(), losses


def test_golden_tuning_on_synthetic_images(g, tmp_path):
    W0, order = g["ct_zsl.W0"], g["ct_zsl.order"].tolist()
    pairs = [([], rows) for epoch in order for rows in chunks(epoch, 16)]
    rates = [sr.head_rate(s, len(pairs), 0.05) for s in range(len(pairs))]
    teacher = lambda rows: sr.head_logits(g["ct_zsl.X"][rows], W0, 0.0)  # noqa: E731
    W, b, losses = tuned_by(tmp_path, W0, pairs, rates, None, rows_of(g["ct_zsl.X"], g["ct_zsl.y"]), teacher)
    close(torch.tensor(losses), g["ct_zsl.losses"], 1e-4)
    close(W, g["ct_zsl.W"], 1e-4)
    close(b, g["ct_zsl.b"], 1e-4)


def test_golden_mix_training(g, tmp_path):
    W0 = g["ct_fsl.W0"]
    steps = zip(g["ct_fsl.real_idx"].tolist(), g["ct_fsl.syn_idx"].tolist(), strict=True)
    pairs = [([i for i in real if i >= 0], [i for i in syn if i >= 0]) for real, syn in steps]
    real, syn = rows_of(g["ct_fsl.Xr"], g["ct_fsl.yr"]), rows_of(g["ct_fsl.Xs"], g["ct_fsl.ys"])
    rates = [sr.head_rate(s, len(pairs), 0.02) for s in range(len(pairs))]
    teacher = lambda rows: sr.head_logits(g["ct_fsl.Xs"][rows], W0, 0.0)  # noqa: E731
    W, b, losses = tuned_by(tmp_path, W0, pairs, rates, real, syn, teacher)
    close(torch.tensor(losses), g["ct_fsl.losses"], 1e-4)
    close(W, g["ct_fsl.W"], 1e-4)
    close(b, g["ct_fsl.b"], 1e-4)
    ours = step_pairs(12, 40, 5, 16, 3, "test")  # the loader rule that the indices document: same sizes
    assert [(len(r), len(s)) for r, s in ours] == [(len(r), len(s)) for r, s in pairs]


def step_pairs(n_real, n_syn, batch_real, batch_syn, epochs, *seed):
    """(real rows, synthetic rows) of every step of all epochs, as lists"""
    phase = sr.Phase(n_real, n_syn, batch_real, batch_syn, epochs)
    found = [phase.pairs(epoch, *seed) for epoch in range(epochs)]
    assert all(len(pairs) == phase.per_epoch for pairs in found)
    return [(list(map(int, real)), list(map(int, syn))) for pairs in found for real, syn in pairs]


def test_golden_every_key_is_used(g, request):
    ours = {i.name for i in request.session.items if i.fspath == request.node.fspath and "golden" in i.name}
    if len(ours) < 16:
        pytest.skip("only when all golden tests of this file run")
    assert g.unread() == []


# ---- invariants (section 11 of the method) ------------------------------------------------------


@pytest.fixture
def problem():
    gen = torch.Generator().manual_seed(0)
    W0 = 10 * F.normalize(torch.randn(4, 16, generator=gen), dim=-1)
    x, y = torch.randn(60, 16, generator=gen), torch.randint(4, (60,), generator=gen)
    x_real, y_real = torch.randn(12, 16, generator=gen), torch.arange(12) % 4
    return W0, x, y, x_real, y_real


def tuned(folder, problem, pairs, **more):
    W0, x, y, x_real, y_real = problem
    teacher, rates = W0.clone(), [sr.head_rate(s, len(pairs), 0.05) for s in range(len(pairs))]
    soft = lambda rows: sr.head_logits(x[rows], teacher, 0.0)  # noqa: E731
    found = tuned_by(folder, W0, pairs, rates, rows_of(x_real, y_real), rows_of(x, y), soft, **more)
    assert torch.equal(teacher, problem[0])  # the teacher never changes
    return found


def test_head_has_rows_of_the_temperature_and_ignores_feature_length(problem):
    W0, x, *_ = problem
    text = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(1))
    close(sr.zero_shot_head(text, 100.0).norm(dim=1), torch.full((5,), 100.0), 1e-3)
    close(sr.head_logits(7 * x, W0, 0.0), sr.head_logits(x, W0, 0.0), 1e-5)


def test_soft_loss_is_flat_at_the_teacher_over_T(problem):
    W0, x, *_ = problem
    z0 = sr.head_logits(x, W0, 0.0)
    for T in (1.0, 2.0):
        W = (W0 / T).requires_grad_()
        gradient = torch.autograd.grad(sr.soft_loss(sr.head_logits(x, W, 0.0), z0, T), W)[0]
        assert gradient.norm() < 1e-6
    W = W0.clone().requires_grad_()
    assert torch.autograd.grad(sr.soft_loss(sr.head_logits(x, W, 0.0), z0, 2.0), W)[0].norm() > 1e-3


def test_loss_ignores_shifts_and_sl_zero_is_cross_entropy(problem):
    W0, x, y, *_ = problem
    z0, shift = sr.head_logits(x, W0, 0.0), torch.randn(60, 1, generator=torch.Generator().manual_seed(2))
    z = 1.3 * z0.flip(0)
    loss = sr.tuning_loss(z, z0, y, 0.5, 2)
    close(sr.tuning_loss(z + shift, z0 - 3 * shift, y, 0.5, 2), loss, 1e-5)
    assert torch.equal(sr.tuning_loss(z, z0, y, 0, 2), F.cross_entropy(z, y))


def test_reverse_steps_of_shot_counts_between_the_tables():
    """The paper's for the next smaller count: the fewer shots, the longer the way back from noise."""
    r = [sr.rg_steps_of(sr.Args(), m) for m in range(1, 17)]
    assert r == [50, 40, 40, 35, 35, 35, 35, 20, 20, 20, 20, 20, 20, 20, 20, 15]
    assert sr.rg_steps_of(sr.Args(rg_steps=7), 3) == 7


def test_files_of_names_and_weights_are_known_by_their_content(tmp_path):
    """A file that was edited since the run began is another label space, another start."""
    names, weights = tmp_path / "names.txt", tmp_path / "start.safetensors"
    flags = dict(label_space=str(names), real_weights=str(weights), ladder=("real-init",))
    args, found = sr.Args(**{**sr.PRESETS["digits-pretrain"], **flags}), []
    for lines, value in (("seven\nthree\n", 0.0), ("seven\nthree\n", 1.0), ("three\nzebra\n", 1.0)):
        names.write_text(lines)
        save_tensors(weights, {"fc.weight": torch.full((4, 4), value)})
        ids = sr.fingerprints(args, {}, sr.label_space(args, ["a"]))
        found.append((ids["label_space"], ids["real_weights"]))
    (a, x), (b, y), (c, z) = found
    assert a == b != c and x != y == z
    assert sr.fingerprints(sr.Args(), {}, ["a"]) == {}


def test_filter_branches():
    confidence = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert len(sr.clip_filter(confidence, 10**9, 0, None)) == 50  # threshold about 0: all stay
    two = torch.stack([confidence, 1 - confidence], 1)
    assert torch.equal(sr.clip_filter(confidence, 2, 0, None), (two.argmax(1) == 0).nonzero().flatten())
    assert len(sr.clip_filter(confidence, 2, 45, None)) == 45 and len(sr.clip_filter(confidence, 2, 99, None)) == 50
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    few = sr.clip_filter(confidence[order], 2, 45, None)
    assert set(order[few].tolist()) == set(sr.clip_filter(confidence, 2, 45, None).tolist())


def test_real_filter_drops_only_what_lies_nearer_to_another_class():
    real, y_real = torch.eye(3), torch.arange(3)
    f, y = torch.tensor([[1.0, 0.1, 0], [0.2, 1, 0], [0, 0, 1]]), torch.tensor([0, 0, 2])
    for pairs in (1, 6, 99):
        assert sr.real_filter(f, y, real, y_real, pairs).tolist() == [True, False, True]


def test_schedule_begins_at_the_base_rate_and_never_reaches_zero():
    rates = [sr.head_rate(s, 30, 2e-3) for s in range(30)]
    assert rates[0] == 2e-3 and 0 < rates[-1] < rates[-2] and len(step_pairs(0, 50, 8, 16, 3, 0)) == 3 * 4


def test_mix_training_with_one_weight_zero_is_the_other_alone(problem, tmp_path):
    pairs = step_pairs(12, 60, 5, 16, 3, 0)
    real_only = tuned(tmp_path, problem, [(r, []) for r, _ in pairs])
    mixed = tuned(tmp_path, problem, pairs, weights=(1.0, 0.0))
    for a, b in zip(real_only[:2], mixed[:2], strict=True):
        close(a, b, 1e-5)
    syn_only, mixed = (
        tuned(tmp_path, problem, [([], s) for _, s in pairs]),
        tuned(tmp_path, problem, pairs, weights=(0.0, 1.0)),
    )
    for a, b in zip(syn_only[:2], mixed[:2], strict=True):
        close(a, b, 1e-5)
    assert len(mixed[2]) == len(pairs)  # one step per pair


def test_epochs_cover_every_image_and_the_real_loader_starts_again():
    pairs = step_pairs(12, 60, 5, 16, 2, 3)
    for epoch in (pairs[:4], pairs[4:]):
        assert sorted(i for _, syn in epoch for i in syn) == list(range(60))
        assert sorted(i for real, _ in epoch[:3] for i in real) == list(range(12))
    assert pairs[3][0] and pairs == step_pairs(12, 60, 5, 16, 2, 3) != step_pairs(12, 60, 5, 16, 2, 4)


@pytest.mark.parametrize("steps", [100, 20])
def test_real_guidance_runs_r_steps_and_a_perfect_denoiser_returns_the_reference(steps):
    abar, ref = sampler.linear_alphas(), torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for r in (5, 15, 20, 35, 50, 100):
        s, calls = sampler.respaced(abar, sampler.kept_timesteps()[sr.run_indices(r, steps)]), []

        def denoise(x, t, calls=calls):
            calls.append(t)
            return (x - abar[t].sqrt() * ref) / (1 - abar[t]).sqrt(), None

        gen = torch.Generator().manual_seed(r)
        x = sr.noised_reference(ref, torch.randn(ref.shape, generator=gen), s["abar"][-1])
        for draw in (None, lambda gen=gen: torch.randn(ref.shape, generator=gen)):
            close(sampler.reverse(denoise, x, s, draw), ref, 1e-4)
        assert len(calls) == 2 * len(sr.run_indices(r, steps)) == 2 * -(-r * steps // 100)
        assert calls[0] == sampler.kept_timesteps()[r - 1]  # the paper's noise level for any number of steps


def test_sentences_are_different_and_hold_the_words_of_the_class_name(capsys):
    drawn = ["a red seven", " a red  seven", "a dog", "Seven birds\nfly", "seventeen", ""]
    assert sr.usable(drawn, "seven", True) == ["a red seven", "Seven birds fly"]
    assert sr.usable(drawn, "seven", False) == ["a red seven", "a dog", "Seven birds fly", "seventeen"]
    assert sr.usable(["a St Bernard, asleep"], "St. Bernard", True) and not sr.usable(
        ["a Bernard"], "St. Bernard", True
    )
    args = sr.Args(**{**sr.PRESETS["digits"], "sentences": 3})
    speak = lambda words, n: [f"{words} {torch.randint(9, ()).item()}" for _ in range(n)]  # noqa: E731
    one = sr.sentences_of(args, speak, 0, "sea-lake", None)
    assert len(set(one)) == 3 and all("sea lake" in s for s in one)
    assert one == sr.sentences_of(args, speak, 0, "sea-lake", None) != sr.sentences_of(args, speak, 1, "sea-lake", None)
    assert sr.sentences_of(args, lambda words, n: ["a dog"] * n, 0, "sea-lake", None) == []
    args.sentences, number = 50, lambda words, n: [f"{words} {i}" for i in torch.randint(10**6, (n,)).tolist()]
    one, other = (set(sr.sentences_of(args, number, c, "sea", None)) for c in (0, 1))
    assert len(one | other) == 100  # a class is sampled by a seed of its own
    args.sentences = 3
    sr.tell_short(args, {"sea lake": 0, "river": 2}, 10)
    assert "2 of 10 classes have fewer than 3 sentences (sea lake 0, river 2)" in capsys.readouterr().out


def test_every_class_has_sentences_drawn_from_more_than_are_wanted(tmp_path, monkeypatch):
    asked, made = [], []

    def writer(where, device, **sampling):
        made.append((where, sampling))
        return lambda words, n: (asked.append((words, n)), [f"{words} {len(asked) % 2}{k % 40:02}" for k in range(n)])[
            1
        ]

    monkeypatch.setattr(sr, "sentence_writer", writer)
    args, run = sr.Args(sentences=60, ladder=("le-ce",)), run_in(tmp_path)
    sr.write_sentences(args, run, ONE, ["sea-lake", "St. Bernard"], {"--sentence-model": "here"})
    # 40 different ones of 110 are too few, so each class is asked for twice; T5 gets the name and an article only.
    assert asked == [("a sea lake", 110)] * 2 + [("a St. Bernard", 110)] * 2
    assert made == [("here", dict(top_k=50, top_p=1.0, temperature=1.0, max_new_tokens=32))]
    rows = json.loads((tmp_path / "sentences.json").read_text())
    assert [(row["class_index"], row["class_name"]) for row in rows] == [(0, "sea-lake"), (1, "St. Bernard")]
    for row, said in zip(rows, ("a sea lake", "a St. Bernard"), strict=True):
        pool = sorted(f"{said} {i}{k:02}" for i in range(2) for k in range(40))
        assert len(set(row["sentences"])) == 60 and set(row["sentences"]) < set(pool)
        assert set(row["sentences"]) != set(pool[:60])  # at random, not the first by the alphabet
    unchecked = sr.sentences_of(args, lambda words, n: ["a dog", "a cat"], 0, "river", None)
    assert sorted(unchecked) == ["a cat", "a dog"]  # the paper's are not checked
    args.sentence_check = True
    assert sr.sentences_of(args, lambda words, n: ["a dog", "a river"], 0, "river", None) == ["a river"]


def test_the_writer_is_sampled_by_the_seed():
    where = models.check_models([("--sentence-model", "tiny", "seq2seq")])["--sentence-model"]
    write = sr.sentence_writer(where, torch.device("cpu"), **sr.SAMPLING)
    said = []
    for seed in (0, 0, 1):
        seed_global(seed)
        said.append(write("a seven", 5))
    assert said[0] == said[1] != said[2] and len(set(said[0])) > 1 and any("seven" in text for text in said[0])


# Preset, name as the data set has it: (name as the authors' lists have it, head, prompt of the basic strategy).
TYPE = "a photo of a {}, a type of {}."
NAMED = [
    ("cifar10", "airplane", "airplane", "a photo of a airplane.", "a photo of a airplane"),
    ("cifar100", "aquarium_fish", "aquarium fish", "a photo of a aquarium fish.", "a photo of a aquarium fish"),
    ("caltech101", "gerenuk", "gerenuk", "a photo of a gerenuk.", "a photo of a gerenuk"),
    ("caltech256", "011.billiards", "billiards", "a photo of a billiards.", "a photo of a billiards"),
    ("caltech256", "bonsai-101", "bonsai", "a photo of a bonsai.", "a photo of a bonsai"),
    ("caltech256", "eiffel-tower", "eiffel tower", "a photo of a eiffel tower.", "a photo of a eiffel tower"),
    ("sun397", "indoor cloister", "indoor cloister", "a photo of a indoor cloister.", "a photo of a indoor cloister"),
    ("sun397", "art_studio", "art studio", "a photo of a art studio.", "a photo of a art studio"),
    ("aircraft", "A330-200", "A330-200", TYPE.format("A330-200", "aircraft"), "a photo of a A330-200"),
    ("birdsnap", "Anna's_Hummingbird", "Annas Hummingbird", TYPE.format("Annas Hummingbird", "bird"),
     "a photo of a Annas Hummingbird"),
    ("birdsnap", "Black-bellied_Plover", "Black bellied Plover", TYPE.format("Black bellied Plover", "bird"),
     "a photo of a Black bellied Plover"),
    ("cars", "Acura RL Sedan 2012", "2012 Acura RL Sedan", "a photo of a 2012 Acura RL Sedan.",
     "a photo of a 2012 Acura RL Sedan"),
    ("cub", "001.Black_footed_Albatross", "Black footed Albatross", TYPE.format("Black footed Albatross", "bird"),
     "a photo of a Black footed Albatross"),
    ("flowers", "pink-yellow dahlia", "pink-yellow dahlia", TYPE.format("pink-yellow dahlia", "flower"),
     "a photo of a pink-yellow dahlia"),
    ("food", "apple_pie", "apple pie", TYPE.format("apple pie", "food"), "a photo of a apple pie"),
    ("pets", "Saint Bernard", "Saint Bernard", TYPE.format("Saint Bernard", "pet"), "a photo of a Saint Bernard"),
    ("dtd", "polka-dotted", "polka-dotted", "polka-dotted texture.", "a photo of a polka-dotted"),
    ("imagenet", "tench", "tench", "itap of a tench.", "a photo of a tench"),
    ("imagenet-sketch", "n01440764", "tench", "a photo of a tench.", "sketch of a tench"),
    ("imagenet-r", "n01443537", "goldfish", "a photo of a goldfish.", "a photo of a goldfish"),
]  # fmt: skip


def test_every_preset_says_the_names_that_the_authors_do():
    presets = {row[0] for row in NAMED}
    zero_shot = {k for k, v in sr.PRESETS.items() if v.get("setting", "zero-shot") == "zero-shot"}
    assert presets | {"digits", "eurosat"} == zero_shot
    for preset, raw, name, head, drawn in NAMED:
        flags = {k: sr.PRESETS[k] for k in sr.PRESETS if k == preset or k == f"{preset}-few-shot"}
        for key, values in flags.items():
            args = sr.Args(preset=preset if key == preset else key, **values)
            assert sr.spoken(args.dataset, [raw], args.preset) == [name], key
            templates, prefix = sr.prompts(args)
            assert templates[0].format(name) == head and f"{prefix} a {name}" == drawn, key
            assert len(templates) == (7 if args.dataset == "imagenet" else 1), key
    for key in ("eurosat", "eurosat-few-shot"):
        args = sr.Args(preset=key, **sr.PRESETS[key])
        names = sr.spoken(args.dataset, list("0123456789"), args.preset)
        assert names[0] == "Annual Crop Land" and names[3] == "Highway or Road" and names[9] == "Sea or Lake"
        assert sr.prompts(args) == (("a centered satellite photo of {}.",), "a centered satellite photo of")


def drawing(args, folder, name, names, sentences=(), picks=None):
    """The Drawing of a set in a run folder"""
    rows = [dict(sentences=list(said)) for said in sentences]
    (folder / "sentences.json").write_text(json.dumps(rows))
    run = SimpleNamespace(path=lambda *parts: folder.joinpath(*parts))
    return sr.Drawing(args, run, name, names, picks or {})


def test_given_names_are_said_as_they_stand(tmp_path):
    """classes.json has the last word; a folder's number goes, unless nothing else is there or it is part of a name."""
    human = {"a": "3.5 mm jack", "b": "T-shirt_x", "n01440764": "my tench"}
    for split in ("train", "test"):
        for folder in (*human, "001.Black_footed", "002.", "T-shirt"):
            (tmp_path / split / folder).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / folder / "0.png")
    (tmp_path / "classes.json").write_text(json.dumps(human))
    data = load_dataset("folder", tmp_path)
    said = dict(zip(data.class_names, spoken("folder", data.class_names, "caltech256"), strict=True))
    assert said == {name: name for name in human.values()} | {
        "001.Black_footed": "Black footed", "002.": "002.", "T-shirt": "T shirt"
    }  # fmt: skip
    assert all(type(name) is str for name in said.values())


def test_a_file_of_names_is_read_in_utf8(tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeffcaf\u00e9\n\ntea_room\ncaf\u00e9\n".encode())
    assert listed(file) == ["caf\u00e9", "tea room"]
    file.write_bytes(b"caf\xe9\ncat\n")
    with pytest.raises(UserError, match=r"names.txt: not UTF-8"):
        listed(file)
    with pytest.raises(UserError, match="cannot be read"):
        listed(tmp_path)


def test_names_and_sentences_reach_the_prompts_of_every_image(tmp_path):
    args = sr.Args(dataset="folder", preset="", gen_images_per_class=2, ladder=("basic-ce", "le-ce"))
    names = sr.spoken(args.dataset, ["n02124075", "002.A330-200", "sea_lake"], args.preset)
    one = drawing(args, tmp_path, "basic", names)
    wanted = ["a photo of a Egyptian Mau", "a photo of a A330-200", "a photo of a sea lake"]
    assert [one.prompt(row) for row in range(6)] == [prompt for prompt in wanted for _ in range(2)]
    one = drawing(args, tmp_path, "le", names, (["a mau", "two maus"], ["a jet"], []))
    assert [one.prompt(row) for row in (0, 1, 2, 3)] == [
        f"a photo of {s}" for s in ("a mau", "two maus", "a jet", "a jet")
    ]
    assert one.prompt(4) == "a photo of a sea lake"  # the writer had nothing to say, which was told
    own = sr.Args(template=("{} seen from above.", "a map of {}."), gen_prefix="an aerial view of")
    assert sr.prompts(own) == (own.template, "an aerial view of")


def test_every_shot_gives_as_many_images_and_only_missing_files_are_drawn(tmp_path):
    args = sr.Args(setting="few-shot", ladder=("rg",), rg_images=4, shot_counts=(2,))
    # Real Guidance draws from the class's name, though there are sentences for other rows.
    one = drawing(args, tmp_path, "rg2", ["a", "b"], (["a red a"], ["a red b"]), {2: [5, 7, 1, 3]})
    assert [one.prompt(row) for row in (0, 7)] == ["a photo of a a", "a photo of a b"]
    assert [one.shot(row) for row in range(8)] == [5, 7, 5, 7, 1, 3, 1, 3] and one.r == 40
    assert [one.images.key(row) for row in (0, 7)] == ["00_a/0.png", "01_b/3.png"]
    assert [one.seed(row) for row in (3, 4)] == [seed_of(0, "rg2", 0, 3), seed_of(0, "rg2", 1, 0)]
    for row in (1, 6):
        file = one.images.root / one.images.key(row)
        file.parent.mkdir(parents=True)
        file.touch()
    assert one.missing().tolist() == [0, 2, 3, 4, 5, 7]
    one.list([k / 8 for k in range(8)])
    about = [json.loads(line) for line in (tmp_path / "rg2" / "metadata.jsonl").read_text().splitlines()]
    assert about[6]["clip_confidence"] == 0.75 and about[6]["file_name"] == "01_b/2.png" and about[6]["shot"] == 1


def test_only_sets_that_a_row_trains_on_are_drawn():
    def sets(**flags):
        return sr.image_sets(sr.Args(**flags))

    assert sets(ladder=("zero-shot", "le-ce")) == {"le": 2000} and sets(ladder=("basic-sce",)) == {"basic": 2000}
    few = dict(setting="few-shot", shot_counts=(1, 4))
    assert sets(ladder=("real",), **few) == {} and sets(ladder=("rf", "real"), **few) == {"le": 2000}
    assert sets(ladder=("syn-real",), **few) == {"rg1": 800, "rg4": 800}
    assert sets(setting="pretrain", ladder=("scratch", "real-init")) == {}


def test_info_nce_prefers_its_own_key():
    q = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert sr.info_nce(q, q, -q) < sr.info_nce(q, -q, q)


def test_info_nce_is_moco_v2s():
    q, k = F.normalize(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)), dim=2)
    wanted = F.cross_entropy(torch.cat([(q * k).sum(1, keepdim=True), q @ k.T], 1) * 5, torch.zeros(3).long())
    close(sr.info_nce(q, k, k), wanted, 1e-5)  # temperature 0.2
    assert sr.Args().moco_queue == 65536


def test_label_spaces(tmp_path):
    own = tmp_path / "names.txt"
    own.write_text("sorrel\n\nrose hip \nsorrel\n")
    spaces = [
        sr.label_space(sr.Args(label_space=s), ["cat"]) for s in ("dataset", str(own), "imagenet-1k", "imagenet-2k")
    ]
    assert spaces[:2] == [["cat"], ["sorrel", "rose hip"]] and spaces[2] == spaces[3][: len(spaces[2])]
    assert len(spaces[2]) == 998 and len(spaces[3]) == 1998 == len(class_folders(spaces[3]))
    works, _ = sr.plan(sr.Args(**{**sr.PRESETS["digits-pretrain"], "label_space": str(own)}))
    assert sum(work.images for work in works if work.stage == "generate") == 2 * 60  # names, images of each
    flags = dict(setting="pretrain", ladder=("scratch",), backbone="test_resnet")
    with pytest.raises(UserError, match="no such file"):
        sr.check_args(sr.Args(**flags, label_space=str(tmp_path / "none.txt")))
    with pytest.raises(UserError, match="no names"):
        sr.check_names(sr.Args(**flags), ["cat"], [])
    with pytest.raises(UserError, match="same name"):
        sr.check_names(sr.Args(**flags), ["cat"], ["cat", "dog", "cat"])
    with pytest.raises(UserError, match="--backbone nosuch"):
        sr.check_names(sr.Args(**{**flags, "backbone": "nosuch"}), ["cat"], ["cat"])
    for empty in (dict(pre_amounts=()), dict(setting="few-shot", ladder=("rg",), shot_counts=())):
        with pytest.raises(UserError, match="--pre-amounts|--shot-counts"):
            sr.check_args(sr.Args(**{**flags, **empty}))


def test_deit_objective_mixes_labels_and_erases():
    net = torch.nn.Linear(4, 3, bias=False)
    net.forward = lambda x: x.flatten(1)[:, :4] @ net.weight.T
    objective = sr.Supervised(net, 3, 0, mix=True)
    x, y = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    first, again = (objective.loss([x.clone()], y, 5)[0] for _ in range(2))
    assert torch.equal(first, again)  # a function of seed and step
    assert not torch.equal(first, F.cross_entropy(net(x), y))
    assert len({objective.loss([x.clone()], y, step)[0].item() for step in range(5, 9)}) == 4
    mix = objective.mix
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.label_smoothing, mix.mix_prob) == (0.8, 1.0, 0.1, 1.0)
    plain = sr.Supervised(net, 3, 0)
    plain.erase = torch.zeros_like
    assert plain.loss([x], y, 0)[0].item() == pytest.approx(math.log(3))  # what the network sees is erased
    seed_global(0)
    erased = sr.Supervised(net, 3, 0, erase=True).erase(torch.zeros(200, 3, 32, 32))
    assert 20 < sum(bool(image.any()) for image in erased) < 80  # a quarter, with noise for pixels


class Pixels:
    """Labelled noise, as much of a list of images as a training needs"""

    def __init__(self, n, classes=10, size=32):
        self.pixels = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        self.labels, self.class_names = np.arange(n) % classes, list("0123456789")[:classes]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return Image.fromarray(self.pixels[row])

    open = __getitem__

    def of_class(self, c):
        return np.flatnonzero(self.labels == c)


def plain_views(args, source, kind, rows, seed, positions):
    """What Loader gives for these rows, one by one"""
    view = sr.augmentation(kind, args.pre_size, args.pre_flip)
    found = []
    for row, p in zip(rows, positions, strict=True):
        number = seed_of(seed, "data", "augment", p)
        torch.manual_seed(number)
        found.append(view(source[row]))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return torch.stack([(x / 255 - mean) / std for x in found])


def test_two_steps_of_pretraining_equal_plain_sgd_with_batchnorm(tmp_path):
    args = sr.Args(**{**sr.PRESETS["digits-pretrain"], "pre_micro_batch": 20, "recipe": "sgd", "pre_wd": 0.01})
    args.pre_epochs, args.pre_batch, source = 1, 10, Pixels(20)
    nets = [sr.new_backbone(args.backbone, 10, 3, "cpu") for _ in range(2)]
    objective, recipe = sr.pre_recipe(args, nets[0], 10, 0.05, 3)
    sr.backbone_loop(args, Log(), ONE, "t", tmp_path / "c.safetensors", objective, source, recipe, 3)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed_of(3, "order", 0))).tolist()
    plain = torch.optim.SGD(nets[1].train().parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for step in range(2):
        rows = order[10 * step : 10 * step + 10]
        x = plain_views(args, source, "plain", rows, 3, range(10 * step, 10 * step + 10))
        plain.zero_grad()
        F.cross_entropy(nets[1](x), torch.from_numpy(source.labels[rows])).backward()
        plain.step()
    for (name, a), b in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        assert (a.double() - b.double()).abs().max() < 1e-3, name


def noted_trainings(monkeypatch, at=lambda net: None):
    """Nothing is trained; what train_network is given is noted. at: called with each network"""
    seen = []

    def note(run, team, chart, file, objective, pictures, recipe, seed, **more):
        seen.append(SimpleNamespace(objective=objective, pictures=pictures, recipe=recipe, seed=seed, more=more))
        at(getattr(objective, "net", None))
        return SimpleNamespace(finish=lambda: seen.append("finished"))

    monkeypatch.setattr(sr, "train_network", note)
    monkeypatch.setattr(sr, "augmentation", lambda *kind: kind)
    return seen


def drop_paths(net):
    return [m.drop_prob for m in net.modules() if isinstance(m, DropPath)]


@pytest.mark.parametrize("recipe", ["sgd", "deit"])
def test_transfer_begins_with_a_head_of_its_own_and_follows_its_table(recipe, tmp_path, monkeypatch):
    flags = dict(recipe=recipe, transfer_epochs=10, transfer_batch=10, transfer_lr=0.5, pre_micro_batch=7)
    args = sr.Args(**{**sr.PRESETS["digits-pretrain"], **flags})
    real, test = Pixels(11), Pixels(30)
    start = sr.new_backbone(args.backbone, 7, 4, "cpu")  # another seed than the transfer's
    save_tensors(tmp_path / "start.safetensors", start.state_dict())

    def label(net):
        x = torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in test.pixels]) / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        with torch.no_grad():
            test.labels = net.eval()((x - mean) / std).argmax(1).numpy()
        test.labels[:9] = (test.labels[:9] + 1) % 10
        net.train()

    seen = noted_trainings(monkeypatch, label)
    sr.transfer(args, Log(), ONE, tmp_path, dict(row="r"), real, test, 10, tmp_path / "start.safetensors", 3)
    one, objective, deit = seen[0], seen[0].objective, recipe == "deit"
    assert seen[1:] == ["finished"] and one.pictures is real and one.more["micro_batch"] == 7
    assert (one.recipe.batch, one.recipe.epochs, one.recipe.repeats) == (10, 10, 3 if deit else 1)
    assert torch.equal(objective.net.conv1[0].weight, start.conv1[0].weight) and len(objective.net.fc.bias) == 10
    # Table 9's: DeiT's own recipe without random erasing and stochastic depth
    assert one.recipe.view == ("deit" if deit else "plain", 32, False) and bool(objective.mix) == deit
    assert torch.equal(objective.erase(torch.zeros(99, 3, 8, 8)), torch.zeros(99, 3, 8, 8))
    assert not drop_paths(objective.net)
    assert type(one.recipe.optimizer).__name__ == "SGD"
    groups = one.recipe.optimizer.param_groups
    assert all((g["momentum"], g["nesterov"], g["lr"]) == (0.9, deit, 0.5) for g in groups)
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    wd = 1e-4 if deit else 5e-4
    assert [decays[id(p)] for p in objective.net.parameters()] == [
        0.0 if deit and p.ndim == 1 else wd for p in objective.net.parameters()
    ]
    steps = [0.5, 0.5, 0.1, 0.02, 0.004]
    if deit:  # five epochs up from 1e-6, then the cosine of all ten, down to 1e-5
        steps = [1e-6 + (0.5 - 1e-6) * e / 5 for e in (0, 2.9, 3)]
        steps += [1e-5 + (0.5 - 1e-5) * (1 + math.cos(math.pi * e / 10)) / 2 for e in (6, 8)]
    assert [one.recipe.rate(e) for e in (0, 2.9, 3, 6, 8)] == pytest.approx(steps, rel=1e-9)
    about = json.loads((tmp_path / "metrics.json").read_text())
    assert about == dict(row="r", seed=3, test=pytest.approx(70), real=11)  # of the test split, in eval mode
    assert all(torch.equal(v, objective.net.state_dict()[k]) for k, v in saved(tmp_path / "weights").items())


def saved(path):
    return load_tensors(path.with_suffix(".safetensors"))


def test_pretraining_is_given_its_recipe_its_start_and_its_rate(tmp_path, monkeypatch):
    flags = dict(pre_lr=0.3, pre_lr_real=0.07, moco_queue=24, pre_micro_batch=7, pre_size=32, pre_flip=True)
    start = sr.new_backbone("test_resnet.r160_in1k", 3, 8, "cpu")
    save_tensors(tmp_path / "start.safetensors", start.state_dict())
    seen, source = noted_trainings(monkeypatch), Pixels(11)
    for recipe, weights in (("adamw", None), ("deit", None), ("moco", tmp_path / "start.safetensors")):
        args, folder = sr.Args(**{**sr.PRESETS["digits-pretrain"], **flags, "recipe": recipe}), tmp_path / recipe
        sr.pretrain(args, Log(), ONE, folder, source, 10, 3, weights)
        one, moco = seen[-2], recipe == "moco"
        net = one.objective.query[0] if moco else one.objective.net
        assert seen[-1] == "finished" and one.pictures is source and one.more["micro_batch"] == 7 and one.seed == 3
        rate, (first, *_) = 0.07 if weights else 0.3, one.recipe.optimizer.param_groups
        assert first["lr"] == rate and one.recipe.rate(4.999 if recipe == "deit" else 0) == pytest.approx(
            rate, rel=0.01
        )
        body = start if weights else sr.new_backbone(args.backbone, 10, 3, "cpu")
        assert torch.equal(net.conv1[0].weight, body.conv1[0].weight) and len(net.fc.bias) == 10
        assert drop_paths(net) == (
            pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1][-len(drop_paths(net)) :]) if recipe == "deit" else []
        )
        assert one.recipe.view == (recipe if recipe != "adamw" else "plain", 32, True)
        assert one.recipe.batch == args.pre_batch and one.recipe.epochs == args.pre_epochs
        if moco:
            assert one.objective.queue.shape == (24, 128)
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in saved(folder / "pretrained").items())
    sr.pretrain(args, Log(), ONE, folder, source, 10, 3, weights)
    assert len(seen) == 6  # what is there is not made again


def test_a_backbones_row_begins_and_goes_on_where_the_table_says(tmp_path, monkeypatch):
    made, moved, run = [], [], run_in(tmp_path)
    monkeypatch.setattr(sr, "pretrain", lambda args, run, team, *what: made.append(what))
    monkeypatch.setattr(sr, "transfer", lambda args, run, team, *what: moved.append(what))
    monkeypatch.setattr(sr, "export_backbone", lambda *what: None)
    pixels = np.zeros((14, 4, 4, 3), dtype=np.uint8)
    train = Images([k % 2 for k in range(14)], [f"{k:02}" for k in range(14)], ["a", "b"], pixels=pixels)
    data = ImageDataset("x", ["a", "b"], train, None, train.subset(range(4)))
    flags = dict(pre_amounts=(2, 3), gen_images_per_class=3, clf_seeds=2, transfer_images=2, seed=5)
    args = sr.Args(**{**sr.PRESETS["digits-pretrain"], **flags})
    sr.train_backbones(args, run, ONE, data, ["x", "y", "z"])
    chosen = few_shot(train, "x", 2, 5, 2)
    runs, starts = tmp_path / "classifier" / "runs", {}
    for seed in (5, 6):  # from the images that the transfer leaves over, with the labels of the data set
        starts[seed] = runs / f"real-weights-seed{seed}" / "pretrained.safetensors"
        folder, source, n, number, *weights = made.pop(0)
        assert folder == starts[seed].parent and n == 2 and number == seed and weights in ([], [None])
        assert source.keys.tolist() == [k for i, k in enumerate(train.keys) if i not in chosen]
    for row in ("synthetic", "real-init+synthetic"):
        for amount in (2, 3):
            for seed in (5, 6):
                folder, source, n, number, weights = made.pop(0)
                assert folder == runs / f"{row}-{amount}-seed{seed}" and n == 3 and number == seed
                assert weights == (starts[seed] if "init" in row else None)
                assert len(source) == 3 * amount and source.root == tmp_path / "images"
                assert source.class_names == ["x", "y", "z"]
    assert not made
    for row, amounts in (
        ("scratch", (0,)),
        ("synthetic", (2, 3)),
        ("real-init", (0,)),
        ("real-init+synthetic", (2, 3)),
    ):
        for amount in amounts:
            for seed in (5, 6):
                folder, about, real, test, n, weights, number = moved.pop(0)
                own = folder / "pretrained.safetensors" if amount else None
                assert folder == runs / (f"{row}-{amount}-seed{seed}" if amount else f"{row}-seed{seed}")
                assert weights == (own or (starts[seed] if row == "real-init" else None))
                assert n == 2 and number == seed and test is data.test and about["images"] == 3 * amount
                assert sorted(real.keys) == sorted(train.keys[i] for i in chosen)
                # One step in each of 30 epochs: of the real weights, the pre-training, the transfer.
                assert about["updates"] == 30 * (1 + bool(amount) + ("init" in row))
    assert not moved
    args.real_weights, args.transfer_images = "imagenet", 0
    sr.train_backbones(args, run, ONE, data, ["x", "y", "z"])
    assert [call[4] for call in made] == [None] * 4 + ["imagenet"] * 4
    assert all(call[2] is train for call in moved) and [call[5] for call in moved][6:8] == ["imagenet"] * 2


def test_the_saved_backbone_is_the_main_rows(tmp_path):
    args = sr.Args(**{**sr.PRESETS["digits-pretrain"], "pre_amounts": (2, 3), "clf_seeds": 1})
    for i, folder in enumerate(("scratch-seed0", "synthetic-2-seed0", "synthetic-3-seed0", "real-init-seed0")):
        net = sr.new_backbone(args.backbone, 10, i, "cpu")
        save_tensors(tmp_path / "classifier" / "runs" / folder / "weights.safetensors", net.state_dict())
    sr.export_backbone(args, run_in(tmp_path), list("0123456789"))
    stock = timm.create_model(f"local-dir:{tmp_path / 'classifier'}", pretrained=True)
    assert torch.equal(stock.fc.weight, sr.new_backbone(args.backbone, 10, 2, "cpu").fc.weight)
    about = json.loads((tmp_path / "classifier" / "classes.json").read_text())
    assert (about["row"], about["n"], about["seed"]) == ("synthetic", 3, 0)


def test_recipes_are_those_of_the_paper(monkeypatch):
    def made(name, **flags):
        args = sr.Args(**{**sr.PRESETS["digits-pretrain"], "recipe": name, "pre_wd": 0.3, "pre_epochs": 90, **flags})
        net = sr.new_backbone(args.backbone, 10, 0, "cpu")
        return sr.pre_recipe(args, net, 10, 0.1, 0)

    monkeypatch.setattr(sr, "augmentation", lambda kind, size, flip: kind)
    objective, recipe = made("adamw")
    assert type(recipe.optimizer).__name__ == "AdamW" and recipe.view == "plain" and objective.mix is None
    half = [0.05 * (1 + math.cos(math.pi * e / 90)) for e in (0, 20, 45, 80, 90)]
    assert [recipe.rate(e) for e in (0, 20, 45, 80, 90)] == pytest.approx(half, rel=1e-9)
    assert (recipe.batch, recipe.epochs, recipe.repeats) == (50, 90, 1)
    assert {group["weight_decay"] for group in recipe.optimizer.param_groups} == {0.3}  # biases too
    objective, recipe = made("sgd")
    assert [recipe.rate(e) for e in (0, 29.9, 30, 60)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    group = recipe.optimizer.param_groups[0]
    assert group["momentum"] == 0.9 and group["weight_decay"] == 0.3 and recipe.view == "plain"
    assert len(group["params"]) == len(list(objective.net.parameters()))
    objective, recipe = made("moco")
    assert type(objective).__name__ == "MoCo" and recipe.view == "moco"
    assert [recipe.rate(e) for e in (0, 20, 45, 80, 90)] == pytest.approx(half, rel=1e-9)
    queries = [p for m in objective.query for p in m.parameters()]
    trained = {id(p) for p in recipe.optimizer.param_groups[0]["params"]}
    assert trained < {id(p) for p in queries} and len(trained) == len(queries) - 2  # not the classifier
    objective, recipe = made("deit")
    assert recipe.view == "deit" and objective.mix and not isinstance(objective.erase, type(lambda: 0))
    low = [1e-5 + (0.1 - 1e-5) * (1 + math.cos(math.pi * e / 90)) / 2 for e in (5, 20, 90)]
    assert [recipe.rate(e) for e in (0, 2, 5, 20, 90)] == pytest.approx([1e-6, 1e-6 + 0.4 * 0.099999, *low], rel=1e-9)
    decays = sorted(group["weight_decay"] for group in recipe.optimizer.param_groups)
    assert decays == [0.0, 0.3] and recipe.repeats == 3  # matrices only


def test_weights_of_another_backbone_are_refused(tmp_path):
    args = sr.Args(**sr.PRESETS["digits-pretrain"])
    net = sr.new_backbone(args.backbone, 7, 0, "cpu")
    save_tensors(tmp_path / "net.safetensors", net.state_dict())
    other = sr.new_backbone(
        args.backbone, 7, 0, "cpu", tmp_path / "net.safetensors"
    )  # the file's body, a head of its own
    assert torch.equal(other.conv1[0].weight, net.conv1[0].weight) and not torch.equal(other.fc.weight, net.fc.weight)
    assert len(sr.new_backbone(args.backbone, 10, 0, "cpu", tmp_path / "net.safetensors").fc.bias) == 10
    (tmp_path / "text").write_text("no weights at all")
    flags = {**sr.PRESETS["digits-pretrain"], "real_weights": str(tmp_path / "text")}
    with pytest.raises(UserError, match="no safetensors file"):
        sr.check_args(sr.Args(**flags))
    save_tensors(tmp_path / "wrong.safetensors", {"conv1.weight": torch.zeros(3)})
    with pytest.raises(UserError, match="no weights of --backbone"):
        sr.new_backbone(args.backbone, 10, 0, "cpu", tmp_path / "wrong.safetensors")


class WithBatchNorm(torch.nn.Module):
    """An image tower like RN50's in that it has BatchNorm, and the CLIP around it"""

    def __init__(self):
        super().__init__()
        self.visual = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(3 * 16, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 8)
        )

    def encode_image(self, x):
        return self.visual(x)

    @staticmethod
    def preprocess(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def head_data(W0, features, labels, source):
    """A HeadData of one set, which is the test split too"""
    rows = np.arange(len(labels))
    known = dict(W0=W0, test=features, y_test=labels, n_classes=len(W0), images=lambda name: source)
    return SimpleNamespace(**known, synthetic=lambda row, m: (rows, features, labels))


def tune_on_pixels(tmp_path, monkeypatch, **flags):
    """train_head of le-sce on 30 images, in whole batches -> start, weights afterwards, teacher's logits, features"""
    torch.manual_seed(0)
    model, source = WithBatchNorm(), Pixels(30, 3, 4)
    sees = dict(preprocess=SimpleNamespace(transforms=[]), mean=(0, 0, 0), std=(1, 1, 1), dtype=torch.float32)
    clip = SimpleNamespace(model=model, **sees)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        features = model.eval().visual(torch.stack([model.preprocess(source[i]) for i in range(30)]))
    labels, seen, soft = torch.from_numpy(source.labels), [], sr.soft_loss
    monkeypatch.setattr(sr, "soft_loss", lambda z, z0, T: (seen.append(z0), soft(z, z0, T))[1])
    run = SimpleNamespace(path=lambda *parts: tmp_path.joinpath(*parts), **QUIET)
    more = dict(head_epochs=3, head_batch=10, head_lr=0.1)
    args = sr.Args(**{**sr.PRESETS["digits"], **more, **flags})
    W0 = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    sr.train_head(args, run, ONE, clip, "le-sce", 0, 0, head_data(W0, features, labels, source))
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())  # the one CLIP of the run
    ours = load_tensors(tmp_path / "classifier" / "runs" / "le-sce-seed0" / "weights.safetensors")
    wanted = [sr.head_logits(features[rows], W0, 0.0) for _, rows in step_pairs(0, 30, 16, 10, 3, 0)]
    return start, {k.removeprefix("visual."): v for k, v in ours.items() if k.startswith("visual.")}, seen, wanted


@pytest.mark.parametrize("flags", [dict(tune_share=1.0), dict(freeze_bn=False), dict(tune_share=0.5, freeze_bn=False)])
def test_teacher_is_the_untouched_clip_and_only_what_is_asked_for_moves(flags, tmp_path, monkeypatch):
    start, after, seen, wanted = tune_on_pixels(tmp_path, monkeypatch, **flags)
    assert len(seen) == len(wanted) == 9
    for z0, expected in zip(seen, wanted, strict=True):
        close(z0, expected, 1e-5)
    moved = {key for key, value in after.items() if not torch.equal(value, start[f"visual.{key}"])}
    statistics = {"2.running_mean", "2.running_var", "2.num_batches_tracked"}
    assert moved & statistics == (set() if flags.get("freeze_bn", True) else statistics)
    assert bool(moved - statistics) == ("tune_share" in flags)


def trained_alone(folder, row, m, seed, data, **flags):
    args = sr.Args(**{**sr.PRESETS["digits-few-shot"], **flags})
    run = SimpleNamespace(path=lambda *parts: folder.joinpath(*parts), **QUIET)
    sr.train_head(args, run, ONE, None, row, m, seed, data)
    place = sr.classifier_folder(run, row, m, seed)
    return load_tensors(place / "weights.safetensors"), json.loads((place / "metrics.json").read_text())


def plain_tuning(W0, parts, lr, wd=0.1, sl=0.5, T=2.0, weights=(1.0, 1.0)):
    """AdamW over [(real batch or None, synthetic batch or None, rate)], with nothing of the script"""
    W, b = W0.clone().requires_grad_(), torch.zeros(len(W0), requires_grad=True)
    optimizer = torch.optim.AdamW([W, b], lr=lr, weight_decay=wd)
    unit = lambda f: f / f.norm(dim=1, keepdim=True)  # noqa: E731
    for real, syn, rate in parts:
        loss = torch.zeros(())
        if real is not None:
            loss = loss + weights[0] * F.cross_entropy(unit(real[0]) @ W.T + b, real[1])
        if syn is not None:
            z, soft = unit(syn[0]) @ W.T + b, (unit(syn[0]) @ W0.T / T).softmax(1)
            sce = sl * -(soft * z.log_softmax(1)).sum(1).mean() + (1 - sl) * F.cross_entropy(z, syn[1])
            loss = loss + weights[1] * sce
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([W, b], 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return W.detach(), b.detach()


@pytest.mark.parametrize("row", ["rg", "real", "syn-real", "real-syn", "le-ce"])
def test_a_row_is_trained_as_plain_lines_say(row, problem, tmp_path):
    W0, x, y, x_real, y_real = problem
    data = head_data(W0, x, y, None)
    data.real = lambda m: {3: (np.arange(12), x_real, y_real)}[m]
    flags = dict(head_epochs=2, head_batch=16, head_batch_real=5, head_lr=0.05, phase_lr=0.08, rg_images=15)
    if row == "rg":  # flags that are not the published ones
        flags |= dict(head_wd=0.3, sl=0.3, sl_temperature=3.0, real_weight=0.7, syn_weight=1.3)
    ours, about = trained_alone(tmp_path, row, 3, 7, data, **flags)
    cosine = lambda s, n, lr: lr * (1 + math.cos(math.pi * s / n)) / 2  # noqa: E731
    mixed = step_pairs(12, 60, 5, 16, 2, 7)
    real, syn = (lambda r: (x_real[r], y_real[r])), (lambda r: (x[r], y[r]))
    if row in ("rg", "real"):
        parts = [(real(r), syn(s) if row == "rg" else None, cosine(i, 8, 0.05)) for i, (r, s) in enumerate(mixed)]
    elif row == "le-ce":
        parts = [(None, syn(s), cosine(i, 8, 0.05)) for i, (_, s) in enumerate(step_pairs(0, 60, 5, 16, 2, 7))]
    if row in ("syn-real", "real-syn"):  # AdamW begins anew in each phase
        alone = step_pairs(0, 60, 5, 16, 2, 7), step_pairs(12, 0, 5, 16, 2, 7)
        phases = [
            [(None, syn(s), cosine(i, 8, 0.08)) for i, (_, s) in enumerate(alone[0])],
            [(real(r), None, cosine(i, 6, 0.08)) for i, (r, _) in enumerate(alone[1])],
        ]
        W, b = W0, torch.zeros(4)
        for phase in phases if row == "syn-real" else phases[::-1]:
            W, b = continued(W, b, W0, phase)
        parts = sum(phases, [])
    else:
        own = dict(rg=dict(wd=0.3, sl=0.3, T=3.0, weights=(0.7, 1.3)), real={})
        W, b = plain_tuning(W0, parts, 0.05, **own.get(row, dict(sl=0.0)))
    close(ours["weight"], W, 1e-4)
    close(ours["bias"], b, 1e-4)
    assert about["updates"] == len(parts) and about["images"] == (0 if row == "real" else 60)
    assert about["test_selected"] >= about["test"]


def continued(W, b, W0, phase):
    """plain_tuning from another start than its teacher"""
    W, b = W.clone().requires_grad_(), b.clone().requires_grad_()
    optimizer = torch.optim.AdamW([W, b], lr=0.08, weight_decay=0.1)
    for real, syn, rate in phase:
        f, y = syn or real
        z = F.normalize(f, dim=1) @ W.T + b
        loss = F.cross_entropy(z, y)
        if syn:
            loss = (loss + F.cross_entropy(z, (F.normalize(f, dim=1) @ W0.T / 2).softmax(1))) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([W, b], 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return W.detach(), b.detach()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("row", ["rg", "syn-real"])
def test_an_interrupted_head_goes_on_to_the_same_bits(row, problem, tmp_path, monkeypatch):
    W0, x, y, x_real, y_real = problem
    data = head_data(W0, x, y, None)
    data.real = lambda m: (np.arange(12), x_real, y_real)
    flags = dict(head_epochs=3, head_batch=16, head_batch_real=5)
    whole, about = trained_alone(tmp_path / "whole", row, 3, 0, data, **flags)
    update, calls = Loop.update, []

    def stopped(self, **more):
        calls.append(update(self, **more))
        if len(calls) == 16:  # syn-real: in the second phase
            self.save()
            raise Interrupted
        return calls[-1]

    monkeypatch.setattr(Loop, "update", stopped)
    if row == "rg":
        calls += [None] * 9
    with pytest.raises(Interrupted):
        trained_alone(tmp_path / "cut", row, 3, 0, data, **flags)
    monkeypatch.setattr(Loop, "update", update)
    again, others = trained_alone(tmp_path / "cut", row, 3, 0, data, **flags)
    assert all(torch.equal(again[k], whole[k]) for k in whole) and others == about


def test_filter_set_keeps_rows_of_every_class_and_counts_the_readmitted():
    confidence = torch.tensor([0.9, 0.1, 0.8, 0.7, 0.2, 0.3, 0.6, 0.1])
    kept, about = sr.filter_set(sr.Args(filter_keep=2), "le", confidence, 2)
    assert len(kept) == 4 and set(kept[:2]) <= {0, 2, 3} and kept[2:] == [5, 6]
    assert [row["readmitted"] for row in about] == [0, 1] and [row["above"] for row in about] == [3, 1]


# ---- the stages use what the tests above look at -------------------------------------------------


def run_in(folder):
    """As much of a run as a stage needs"""
    still = dict(
        timed=lambda *_, **__: contextlib.nullcontext(), done=lambda *_, **__: None, under=lambda *names: names
    )
    return SimpleNamespace(dir=folder, path=lambda *parts: folder.joinpath(*map(str, parts)), **still, **QUIET)


def test_too_little_disk_is_told_before_the_first_image(tmp_path, monkeypatch):
    flags = dict(ladder=("basic-ce", "le-ce"), gen_images_per_class=1000, gen_resolution=512, gen_save_size=256)
    args = sr.Args(**{**sr.PRESETS["digits"], **flags})
    (tmp_path / "sentences.json").write_text("[]")
    sets = {name: sr.Drawing(args, run_in(tmp_path), name, ["a", "b"], {}) for name in sr.image_sets(args)}
    need = 4000 * 256 * 256 * 1.53  # two sets, two classes
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=need + 1))
    found = sr.missing_rows(args, run_in(tmp_path), sets)
    assert {name: rows.tolist() for name, rows in found.items()} == {name: list(range(2000)) for name in sets}
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=need - 1))
    with pytest.raises(UserError, match="lower --gen-images-per-class"):
        sr.missing_rows(args, run_in(tmp_path), sets)


def test_rows_are_those_of_the_tables():
    # Set, filtered by CLIP, how real shots take part, with the soft term, begins with real weights
    tables = {
        "zero-shot": ("", False, "", True, False),
        "basic-ce": ("basic", False, "", False, False), "basic-sce": ("basic", False, "", True, False),
        "le-ce": ("le", False, "", False, False), "le-sce": ("le", False, "", True, False),
        "le+cf-ce": ("le", True, "", False, False), "le+cf-sce": ("le", True, "", True, False),
        "real": ("", False, "alone", True, False), "basic": ("le", True, "mix", True, False),
        "rf": ("le", True, "mix", True, False), "rg": ("rg", False, "mix", True, False),
        "syn-real": ("rg", False, "after", True, False), "real-syn": ("rg", False, "before", True, False),
        "scratch": ("", False, "", True, False), "synthetic": ("le", False, "", True, False),
        "real-init": ("", False, "", True, True), "real-init+synthetic": ("le", False, "", True, True),
    }  # fmt: skip
    assert {row: (x.data, x.cf, x.real, x.sce, x.init) for row, x in sr.ROWS.items()} == tables


def test_shots_are_nested_and_of_the_training_split():
    data, args = load_dataset("digits"), sr.Args(dataset="digits", setting="few-shot", shot_counts=(4, 1), seed=5)
    shots, picks = sr.choose_shots(args, data)
    for m in (1, 4):
        assert [shots.keys[i] for i in picks[m]] == [
            data.train.keys[i] for i in few_shot(data.train, "digits", m, 5, 10)
        ]
        assert shots.labels[picks[m]].tolist() == [c for c in range(10) for _ in range(m)]
    assert set(picks[1]) < set(picks[4]) and len(shots) == 40
    first = data.train.keys.tolist().index(shots.keys[0])
    assert np.array_equal(np.array(shots[0]), np.array(data.train[first]))
    assert sr.choose_shots(sr.Args(dataset="digits"), data) == (None, {})


class Easel:
    """A generator that notes what it is to paint, and paints the seed"""

    side = 16

    def __init__(self):
        self.calls = []

    def latent(self, x):
        return x

    def paint(self, texts, seeds, kept, start, begin):
        self.calls.append((texts, seeds, kept.tolist(), start, list(begin)))
        return [torch.full((3, 16, 16), seed % 256, dtype=torch.uint8) for seed in seeds]


@pytest.mark.parametrize("steps", [20, 100])
def test_the_generator_is_given_what_each_set_asks_for(steps, tmp_path, monkeypatch):
    easel, made = Easel(), []
    monkeypatch.setattr(painters, "load_painter", lambda *what, **how: (made.append((what[0], how)), easel)[1])
    flags = dict(dataset="eurosat", ladder=("rf", "rg"), shot_counts=(2,), gen_images_per_class=3, rg_images=4)
    flags |= dict(gen_micro_batch=3, gen_steps=steps, gen_guidance=2.5, gen_seed=9, gen_save_size=8, gen_format="webp")
    flags |= dict(gen_resolution=16, precision="bf16", rg_steps=10 if steps == 100 else 0)
    args = sr.Args(**{**sr.PRESETS["digits-few-shot"], **flags})
    pixels = np.random.default_rng(0).integers(0, 256, (6, 30, 20, 3), dtype=np.uint8)
    shots = Images([0, 1, 0, 1, 1, 0], map(str, range(6)), ["a", "b"], pixels=pixels)
    said = [["a red a", "one a"], ["a b"]]
    (tmp_path / "sentences.json").write_text(json.dumps([dict(sentences=lines) for lines in said]))
    sr.generate(args, run_in(tmp_path), ONE, ["a", "b"], shots, {2: [5, 0, 3, 4]}, {})
    how = dict(precision="bf16", size=16, guidance=2.5, micro_batch=3, compile=False, ancestral=steps == 100)
    assert made == [("tiny", how)]

    place = "a centered satellite photo of"
    wanted = [(f"{place} {said[c][k % len(said[c])]}", seed_of(9, "le", c, k), None) for c in (0, 1) for k in range(3)]
    wanted += [
        (f"{place} a {'ab'[c]}", seed_of(9, "rg2", c, k), [5, 0, 3, 4][2 * c + k % 2]) for c in (0, 1) for k in range(4)
    ]
    for i, (texts, seeds, kept, start, begin) in enumerate(easel.calls):
        guided = i >= 2
        r = (10 if steps == 100 else 40) if guided else 100
        assert kept == sorted(round(999 * k / 99) for k in range(r - 1, -1, -(100 // steps)))
        assert len(begin) == (len(texts) if guided else 0) and (start is not None) == guided
        for text, seed, x in zip(texts, seeds, begin or [None] * len(texts), strict=True):
            expected = wanted.pop(0)
            assert (text, seed) == expected[:2]
            if guided:  # 20 x 30 pixels: 16 x 24, of which the middle
                image = shots[expected[2]].resize((16, 24), Image.Resampling.BICUBIC).crop((0, 4, 16, 20))
                assert torch.equal(x, torch.from_numpy(np.array(image)).permute(2, 0, 1))
                ref, noise = torch.tensor(2.0), torch.tensor(5.0)
                assert start(ref, noise, torch.tensor(0.36)).item() == pytest.approx(0.6 * 2 + 0.8 * 5)
    assert not wanted
    for name, folder, n in (("le", "images", 3), ("rg2", "rg2", 4)):
        for c in range(2):
            for k in range(n):
                picture = Image.open(tmp_path / folder / f"{c:02}_{'ab'[c]}" / f"{k}.webp")
                assert picture.format == "WEBP" and picture.size == (8, 8)
                assert picture.getpixel((3, 3))[0] == seed_of(9, name, c, k) % 256
        assert len((tmp_path / folder / "metadata.jsonl").read_text().splitlines()) == 2 * n


NAMES = ["zero", "one", "seven"]
SEVEN = [  # ImageNet's: whoever takes another data set's prompt is found out
    "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.",
    "art of the {}.", "a photo of the small {}.",
]  # fmt: skip


def seen_by(clip, pictures):
    """Features [N, D] by open_clip's own transform and tower"""
    with torch.no_grad():
        return clip.model.encode_image(torch.stack([clip.preprocess(picture) for picture in pictures]))


def stock_head(clip):
    """open_clip's own zero-shot classifier, with the temperature in it. [C, D]"""
    W = open_clip.build_zero_shot_classifier(clip.model, clip.tokenize, NAMES, SEVEN)
    return clip.model.logit_scale.exp().item() * W.T


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    """A run folder after stage 4, with another CLIP for the filter than for the head"""
    folder, digits = tmp_path_factory.mktemp("filtered"), load_dataset("digits").train
    flags = dict(dataset="imagenet", ladder=("zero-shot", "real", "basic", "rf", "rg"), shot_counts=(1, 2))
    flags |= dict(
        filter_keep=3, gen_images_per_class=6, rg_images=4, gen_micro_batch=5, head_epochs=2, head_batch=7, clf_seeds=2
    )
    args = sr.Args(**{**sr.PRESETS["digits-few-shot"], **flags, "head_batch_real": 4, "seed": 3, "head_wd": 0.2})
    head, judge = load_clip("tiny"), load_clip("tiny")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in judge.model.parameters():
            p += 0.1 * p.std(correction=0) * torch.randn(p.shape, generator=g)
        judge.model.logit_scale += 0.3
    picture = lambda c, k: digits[int(digits.of_class((0, 1, 7)[c])[k])]  # noqa: E731
    # The last images of a class show another one, and so may its second shot: for the filters.
    sets, sizes = {}, (("le", 6, 0), ("rg1", 4, 10), ("rg2", 4, 20), ("shots", 2, 30), ("test", 9, 40))
    for name, n, at in sizes:
        right = dict(shots=1, test=7).get(name, 3)
        shown = [(c if k < right + c % 2 else (c + 1) % 3, at + k, c) for c in range(3) for k in range(n)]
        sets[name] = [(picture(what, k), c) for what, k, c in shown]
    for name, pictures in sets.items():
        for i, (image, c) in enumerate(pictures if name not in ("shots", "test") else ()):
            k = i % (len(pictures) // 3)
            file = folder / ("images" if name == "le" else name) / class_folders(NAMES)[c] / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    lists = {}
    for name in ("shots", "test"):
        pixels = np.stack([np.array(image) for image, _ in sets[name]])
        lists[name] = Images(
            [c for _, c in sets[name]], [f"{name}{i}" for i in range(len(pixels))], NAMES, pixels=pixels
        )
    (folder / "sentences.json").write_text(json.dumps([dict(sentences=[])] * 3))
    picks, run = {1: [0, 2, 4], 2: list(range(6))}, run_in(folder)
    stage = (args, run, ONE, [head, judge], NAMES, lists["shots"], picks, lists["test"])
    sr.filter_images(*stage)
    y = {name: torch.tensor([c for _, c in pictures]) for name, pictures in sets.items()}
    f = {name: seen_by(head, [image for image, _ in pictures]) for name, pictures in sets.items()}
    return SimpleNamespace(folder=folder, stage=stage, sets=sets, head=head, judge=judge, f=f, y=y)


def test_the_filters_clip_judges_by_the_data_sets_prompts_and_the_heads_gives_features(filtered):
    W, found = stock_head(filtered.judge), json.loads((filtered.folder / "keep.json").read_text())
    close(saved(filtered.folder / "features" / "head")["weight"], stock_head(filtered.head), 1e-3)
    readmitted = []
    for name, pictures in filtered.sets.items():
        ours, y = saved(filtered.folder / "features" / name / "0"), filtered.y[name]
        close(ours["features"], filtered.f[name], 1e-4)
        if name in ("shots", "test"):
            assert "confidence" not in ours and name not in found["keep"]
            continue
        logits = F.normalize(seen_by(filtered.judge, [image for image, _ in pictures]), dim=1) @ W.T
        p = logits.softmax(1)[range(len(y)), y]
        close(ours["confidence"], p, 1e-4)
        folder, kept = filtered.folder / ("images" if name == "le" else name), found["keep"][name]
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        assert [row["clip_confidence"] for row in rows] == pytest.approx(p.tolist(), abs=1e-4)
        for c in range(3):
            own = [i for i in range(len(y)) if y[i] == c]
            above, chosen = {i for i in own if p[i] > 1 / 3}, {i for i in kept if y[i] == c}
            best = set(sorted(own, key=lambda i: -p[i])[:3])
            assert len(chosen) == 3 and (chosen <= above if len(above) >= 3 else chosen == best)
            readmitted.append(len(above) < 3)
        assert kept == sorted(kept)
    assert True in readmitted and False in readmitted  # both branches were looked at


def nearer_to_its_own(f, y, real, y_real):
    """Rows that Real Filtering keeps, one comparison after the other"""
    cos = lambda a, b: float(a @ b / a.norm() / b.norm())  # noqa: E731
    best = lambda i, own: max(cos(f[i], r) for r, c in zip(real, y_real, strict=True) if (c == y[i]) == own)  # noqa: E731
    return [i for i in range(len(y)) if best(i, True) >= best(i, False)]


@pytest.fixture(scope="module")
def tuned_heads(filtered):
    sr.train_heads(*filtered.stage)
    return filtered


def test_every_row_is_tuned_on_what_its_name_says(tuned_heads):
    args, _, _, _, _, _, picks, _ = tuned_heads.stage
    f, y, keep = tuned_heads.f, tuned_heads.y, json.loads((tuned_heads.folder / "keep.json").read_text())["keep"]
    W0, unit = stock_head(tuned_heads.head), lambda x: F.normalize(x, dim=1)
    at = lambda name, rows: (f[name][rows], y[name][rows])  # noqa: E731
    le, passed = at("le", keep["le"]), {}
    for row in ("real", "basic", "rf", "rg"):
        for m in (1, 2):
            real, good = at("shots", picks[m]), range(9)
            if row == "rf":
                good = passed[m] = nearer_to_its_own(*le, *real)
            syn = at(f"rg{m}", slice(None)) if row == "rg" else (le[0][list(good)], le[1][list(good)])
            for seed in (3, 4):
                n_syn = 12 if row == "real" else len(syn[1])
                pairs = step_pairs(3 * m, n_syn, 4, 7, 2, seed)
                rates = [args.head_lr * (1 + math.cos(math.pi * s / len(pairs))) / 2 for s in range(len(pairs))]
                parts = [((real[0][r], real[1][r]), None if row == "real" else (syn[0][s], syn[1][s]), rate)
                         for (r, s), rate in zip(pairs, rates, strict=True)]  # fmt: skip
                W, b = plain_tuning(W0, parts, args.head_lr, wd=0.2)
                folder = tuned_heads.folder / "classifier" / "runs" / f"{row}-{m}-seed{seed}"
                ours, about = saved(folder / "weights"), json.loads((folder / "metrics.json").read_text())
                close(ours["weight"], W, 2e-3)
                close(ours["bias"], b, 2e-3)
                right = (unit(f["test"]) @ W.T + b).argmax(1) == y["test"]
                assert about["test"] == pytest.approx(100 * right.float().mean().item())
                assert (about["real"], about["images"]) == (3 * m, 0 if row == "real" else n_syn)
    assert 0 < len(passed[1]) < 9 and passed[1] != passed[2], "Real Filtering drops some, by the shots of its row"
    about = json.loads((tuned_heads.folder / "classifier" / "runs" / "zero-shot-seed3" / "metrics.json").read_text())
    right = (unit(f["test"]) @ W0.T).argmax(1) == y["test"]
    assert about["test"] == pytest.approx(100 * right.float().mean().item())


def test_a_set_is_filtered_where_its_row_says(tuned_heads):
    data = sr.HeadData(*tuned_heads.stage[:2], ONE.device, *tuned_heads.stage[3:])
    keep = json.loads((tuned_heads.folder / "keep.json").read_text())["keep"]["le"]
    for row, rows in (("le+cf-sce", keep), ("le-sce", list(range(18))), ("le-ce", list(range(18)))):
        found = data.synthetic(row, 0)
        assert found[0].tolist() == rows and torch.equal(found[2], tuned_heads.y["le"][rows])
        close(found[1], tuned_heads.f["le"][rows], 1e-4)
    assert data.images("rg2").root == tuned_heads.folder / "rg2" and len(data.images("shots")) == 6


@pytest.mark.parametrize("row", ["rf", "rg"])
def test_a_head_tuned_on_pixels_sees_the_pictures_that_its_features_are_of(row, tuned_heads, tmp_path):
    args, _, _, clips, *_ = tuned_heads.stage  # this CLIP has no BatchNorm: the same result in another way
    data = sr.HeadData(args, tuned_heads.stage[1], ONE.device, *tuned_heads.stage[3:])
    sr.train_head(replace(args, freeze_bn=False), run_in(tmp_path), ONE, clips[0], row, 2, 3, data)
    folder = f"classifier/runs/{row}-2-seed3/weights"
    ours, cached = saved(tmp_path / folder), saved(tuned_heads.folder / folder)
    for key in ("weight", "bias"):
        close(ours[key], cached[key], 2e-3)


def test_a_tuned_tower_is_scored_and_saved_with_its_head(tuned_heads, tmp_path):
    args, run = replace(tuned_heads.stage[0], tune_share=0.5), run_in(tmp_path)
    data = sr.HeadData(args, tuned_heads.stage[1], ONE.device, *tuned_heads.stage[3:])
    sr.train_head(args, run, ONE, tuned_heads.head, "rg", 2, 3, data)
    sr.export_head(args, run, tuned_heads.head, NAMES)
    whole, head = load_clip(str(tmp_path / "classifier")), saved(tmp_path / "classifier" / "head")
    about = json.loads((tmp_path / "classifier" / "runs" / "rg-2-seed3" / "metrics.json").read_text())
    found = [seen_by(clip, [image for image, _ in tuned_heads.sets["test"]]) for clip in (whole, tuned_heads.head)]
    logits = [F.normalize(f, dim=1) @ head["weight"].T + head["bias"] for f in found]
    scores = [100 * (z.argmax(1) == tuned_heads.y["test"]).float().mean().item() for z in logits]
    assert about["test"] == pytest.approx(scores[0]) and scores[0] != scores[1]


def test_the_saved_head_is_the_main_rows_with_its_bias(tuned_heads, tmp_path):
    run, test = run_in(tmp_path), tuned_heads.stage[-1]
    shutil.copytree(tuned_heads.folder / "classifier", tmp_path / "classifier")
    head, of_row = (saved(tmp_path / "classifier" / name) for name in ("head", "runs/rg-2-seed3/weights"))
    assert all(torch.equal(v, of_row[k]) for k, v in head.items()) and set(head) == {"weight", "bias"}
    about = json.loads((tmp_path / "classifier" / "classes.json").read_text())
    assert about == dict(kind="clip-head", class_names=NAMES, row="rg", n=2, seed=3)
    logits = F.normalize(tuned_heads.f["test"], dim=1) @ head["weight"].T + head["bias"]
    assert torch.equal(sr.saved_predictions(tuned_heads.stage[0], run, ONE, test), logits.argmax(1))
    head["bias"][1] += 1e4
    save_tensors(tmp_path / "classifier" / "head.safetensors", head)
    assert set(sr.saved_predictions(tuned_heads.stage[0], run, ONE, test).tolist()) == {1}


def test_results_are_of_the_last_epoch_of_every_seed(tmp_path, monkeypatch):
    args, run, told, shown = sr.Args(ladder=("zero-shot", "le-ce"), clf_seeds=2, seed=4), run_in(tmp_path), {}, []
    run.results, run.manifest = lambda **what: told.update(what), lambda stage: {}
    monkeypatch.setattr(sr, "conclude", lambda *what: shown.append(what))
    rows = (("zero-shot-seed4", dict(test=30.0)), ("le-ce-seed4", dict(test=50.0, test_selected=80.0)),
            ("le-ce-seed5", dict(test=60.0, test_selected=90.0)))  # fmt: skip
    for folder, about in rows:
        (place := tmp_path / "classifier" / "runs" / folder).mkdir(parents=True)
        (place / "metrics.json").write_text(json.dumps(about | dict(updates=7, images=11)))
    labels = torch.tensor([0, 1, 1])
    sr.report_results(args, run, ["a", "b"], {}, labels, torch.tensor([0, 1, 0]), 66.0)
    assert told["metrics"]["le-ce"]["per_seed"] == [50.0, 60.0] and told["baselines"]["zero-shot"]["per_seed"] == [30.0]
    assert told["metrics"]["saved_classifier"]["top1"] == 66.0
    ((_, table),) = shown[0][3].values()
    assert table[1][1].startswith("55.0") and table[1][2].startswith("85.0") and table[1][3:] == [11, 7]


def stages_of_main(tmp_path, monkeypatch, **flags):
    """What main hands to each stage, for a folder of two of Caltech-256's classes; nothing is made"""
    calls = {}
    for split in ("train", "test"):
        for name in ("011.billiards", "eiffel-tower-102"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / split / name / "0.png")
    for stage in ("write_sentences", "generate", "filter_images", "train_heads", "train_backbones", "evaluate"):
        monkeypatch.setattr(sr, stage, lambda *what, stage=stage: calls.update({stage: what}))
    monkeypatch.setattr(sr, "load_clip", lambda name, device: f"loaded {name}")
    where = dict(data_dir=str(tmp_path / "data"), output_dir=str(tmp_path / "run"), device="cpu", workers=0)
    tiny = dict(sd_model="tiny", sentence_model="tiny", head_clip="tiny", filter_clip="tiny")
    sr.main(sr.Args(**dict(preset="caltech256", dataset="folder") | where | tiny | flags))
    return calls


def test_stages_get_names_as_they_are_said_and_each_clip_in_its_place(tmp_path, monkeypatch):
    other = str(shutil.copytree(models.TINY_WEIGHTS / "clip", tmp_path / "clip"))
    calls = stages_of_main(tmp_path, monkeypatch, filter_clip=other)
    names, clips = ["billiards", "eiffel tower"], ["loaded tiny", f"loaded {other}"]
    assert [calls[s][3] for s in ("write_sentences", "generate")] == [names] * 2
    assert [calls[s][3:5] for s in ("filter_images", "train_heads")] == [(clips, names)] * 2
    assert calls["evaluate"][3] == names and "train_backbones" not in calls


def test_a_label_space_is_written_about_drawn_and_learned(tmp_path, monkeypatch):
    (tmp_path / "names.txt").write_text("a_bird\ncat\nfish\n")
    flags = dict(setting="pretrain", ladder=("synthetic",), backbone="test_resnet", pre_amounts=(5,))
    calls = stages_of_main(tmp_path, monkeypatch, label_space=str(tmp_path / "names.txt"), **flags)
    drawn = ["a bird", "cat", "fish"]
    assert [calls[s][3] for s in ("write_sentences", "generate")] == [drawn] * 2
    assert calls["train_backbones"][4] == drawn and len(calls["train_backbones"][3].train) == 2
    assert calls["evaluate"][3:5] == (["billiards", "eiffel tower"], drawn) and "train_heads" not in calls


def test_nothing_is_filtered_for_pretraining(tmp_path):
    sr.filter_images(sr.Args(setting="pretrain"), run_in(tmp_path), ONE, None, NAMES, None, {}, None)
    assert not list(tmp_path.iterdir())


# The method page, sections 2 and 3, by hand: every setting of the paper.
ALL = dict(gen_images_per_class=2000, sentences=200, gen_guidance=3.0, gen_steps=100, sentence_check=False)
HEAD = dict(head_epochs=30, head_batch=512, head_wd=0.1, sl=0.5, sl_temperature=2.0)
HEAD |= dict(head_clip="RN50-quickgelu/openai", filter_clip="RN50-quickgelu/openai", filter_keep=800, tune_share=0.0)
HEAD |= dict(freeze_bn=True, real_weight=1.0, syn_weight=1.0, head_batch_real=32, phase_lr=2e-3)
RN50 = dict(backbone="resnet50.tv_in1k", pre_epochs=90, pre_batch=512, pre_size=224, transfer_lr=0.003, pre_flip=True)
RN50 |= dict(transfer_batch=128, transfer_epochs=200, transfer_images=0, real_weights="imagenet", moco_queue=65536)
CIFAR = dict(dataset="cifar100", setting="pretrain")
FOUR = dict(ladder=("scratch", "synthetic", "real-init", "real-init+synthetic"))
SMALL_VIT = dict(
    ladder=("scratch", "synthetic", "real-init"),
    backbone="deit_small_patch16_224",
    recipe="deit",
    pre_epochs=300,
    pre_batch=1024,
    pre_lr=1e-3,
)
SMALL_VIT |= dict(transfer_lr=0.01, transfer_batch=768, transfer_epochs=1000, pre_size=224, pre_wd=0.05)
ONE_K = dict(label_space="imagenet-1k", gen_images_per_class=2400, pre_amounts=(1200, 2400))
PAGE = {
    "zero-shot": ALL | HEAD | dict(head_lr=2e-3, setting="zero-shot"),
    "few-shot": ALL | HEAD | dict(
        head_lr=1e-3, setting="few-shot", rg_images=800, shot_counts=(1, 2, 4, 8, 16), rg_steps=0),
    "cifar100-pretrain": ALL | CIFAR | FOUR | RN50 | dict(
        recipe="adamw", pre_wd=0.9, pre_lr=1e-4, pre_lr_real=1e-5, label_space="dataset", gen_images_per_class=36000,
        pre_amounts=(12000, 24000, 36000)),
    "cifar100-deit": ALL | CIFAR | SMALL_VIT | ONE_K,
    "cifar100-deit-2k": ALL | CIFAR | SMALL_VIT | dict(label_space="imagenet-2k", pre_amounts=(1200, 2000)),
    "cifar100-agnostic": ALL | CIFAR | FOUR | RN50 | ONE_K | dict(
        recipe="sgd", pre_wd=1e-4, pre_lr=0.2, pre_lr_real=1e-3),
    "cifar100-moco": ALL | CIFAR | FOUR | RN50 | ONE_K | dict(
        recipe="moco", pre_wd=1e-4, pre_lr=0.03, pre_lr_real=0.003, pre_epochs=200, pre_batch=256,
        pre_micro_batch=64),  # of whose halves, 32 as on each of MoCo's GPUs, BatchNorm sees one at a time
}  # fmt: skip


# Where the data of a preset come from; torchvision has no Caltech-256 splits, CUB, Birdsnap and ImageNet's relatives
ON = {name: name for name in "cifar10 cifar100 caltech101 imagenet sun397 cars pets dtd eurosat".split()}
ON |= dict(aircraft="fgvc_aircraft", flowers="flowers102", food="food101")
ON |= dict.fromkeys("caltech256 birdsnap cub imagenet-sketch imagenet-r".split(), "folder")


def test_every_preset_has_the_values_of_the_paper():
    assert sr.RG_STEPS == {16: 15, 8: 20, 4: 35, 2: 40, 1: 50}
    for name, flags in sr.PRESETS.items():
        sr.check_args(args := sr.Args(preset=name, **flags))
        if args.dataset == "digits":
            continue
        for field, value in PAGE[name if name in PAGE else args.setting].items():
            assert getattr(args, field) == value, (name, field)
        assert args.dataset == ON.get(name.removesuffix("-few-shot"), "cifar100" if name in PAGE else None), name


def test_flags_that_do_not_go_together_are_refused():
    with pytest.raises(UserError, match="no row of"):
        sr.check_args(sr.Args(ladder=("rg",)))
    with pytest.raises(UserError, match="divide 100"):
        sr.check_args(sr.Args(gen_steps=30))
    with pytest.raises(UserError, match="--template 'a photo'"):
        sr.check_args(sr.Args(template=("a photo",)))


# ---- other generators through the same flag ------------------------------------------------------


def tiny_sdxl(folder):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    blocks = dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=4)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **blocks,
        layers_per_block=1, cross_attention_dim=32, attention_head_dim=4, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8,
    )  # fmt: skip
    two = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, **two)
    tokenizer = AutoTokenizer.from_pretrained(models.TINY_WEIGHTS / "sd" / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, max_position_embeddings=tokenizer.model_max_length, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae, unet=unet, text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=DDIMScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip


def tiny_t5_tokenizer():
    """Pieces of one letter"""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789.,"]
    return T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def tiny_if(folder):
    from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
    from transformers import T5Config, T5EncoderModel

    tokenizer = tiny_t5_tokenizer()
    text = T5Config(vocab_size=len(tokenizer), d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=6, block_out_channels=(8, 16), norm_num_groups=4,
        layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    IFPipeline(
        tokenizer=tokenizer, text_encoder=T5EncoderModel(text), unet=unet, safety_checker=None, feature_extractor=None,
        scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range"), watermarker=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def painter_of(**flags):
    args = sr.Args(**{**sr.PRESETS["digits"], **flags})
    found = sr.planned_models(args)
    settings = dict(precision="fp32", size=args.gen_resolution, guidance=args.gen_guidance, compile=False)
    settings |= dict(micro_batch=args.gen_micro_batch, ancestral=args.gen_steps == 100)
    return painters.load_painter(args.sd_model, found, torch.device("cpu"), **settings)


def kept(painter, r=100, steps=100):
    return painters.timesteps(painter, sr.run_indices(r, steps))


def tiny_if_2(folder):
    """DeepFloyd IF's second stage, 16 -> 32 pixels, with a text encoder of its own: the stock pipeline takes prompts"""
    from diffusers import DDPMScheduler, IFSuperResolutionPipeline, UNet2DConditionModel
    from transformers import T5Config, T5EncoderModel

    tokenizer = tiny_t5_tokenizer()
    text = T5Config(vocab_size=len(tokenizer), d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    unet = UNet2DConditionModel(
        sample_size=32, in_channels=6, out_channels=6, block_out_channels=(8, 16), norm_num_groups=4,
        layers_per_block=1, cross_attention_dim=16, attention_head_dim=4, class_embed_type="timestep",
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    IFSuperResolutionPipeline(
        tokenizer=tokenizer, text_encoder=T5EncoderModel(text), unet=unet, safety_checker=None, feature_extractor=None,
        scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range"),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"), watermarker=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def test_upsampler_equals_the_stock_pipeline(tmp_path):
    from diffusers import IFSuperResolutionPipeline

    for seed, (make, name) in enumerate(((tiny_if, "one"), (tiny_if_2, "two"))):
        torch.manual_seed(seed)
        make(tmp_path / name)
    flags = dict(sd_model=str(tmp_path / "one"), upsampler=str(tmp_path / "two"))
    painter = painter_of(**flags)
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    stock = IFSuperResolutionPipeline.from_pretrained(tmp_path / "two", use_safetensors=True)
    text = painter.pipe.text_encoder  # the second stage has none of its own in the script: the first one's is shared
    stock.text_encoder.load_state_dict(text.state_dict())
    g = torch.Generator().manual_seed(seed_of(7, "upsampler"))
    (drawn,) = stock("a seven", image=picture, guidance_scale=1.0, generator=[g], output_type="pil").images
    (ours,) = painter.pixels(x, ["a seven"], [7])
    assert ours.shape == (3, 32, 32)
    assert (ours.permute(1, 2, 0).int() - torch.from_numpy(np.array(drawn)).int()).abs().max() <= 1  # rounding


@pytest.mark.parametrize("family", [tiny_sdxl, tiny_if])
@pytest.mark.parametrize("ancestral", [True, False])
def test_other_families_paint_through_the_same_flag(family, ancestral, tmp_path):
    torch.manual_seed(0)
    family(tmp_path)
    painter = painter_of(sd_model=str(tmp_path), gen_resolution=16, gen_micro_batch=3)
    painter.ancestral, steps = ancestral, kept(painter, steps=4)
    pictures = painter.paint(["a seven", "a two"], [1, 2], steps)
    assert [p.shape for p in pictures] == [(3, 16, 16)] * 2 and pictures[0].dtype == torch.uint8
    again = painter.paint(["an eight", "a two", "a one"], [5, 2, 9], steps)  # another slot, other neighbours
    assert torch.equal(again[1], pictures[1]) and not torch.equal(again[0], pictures[0])
    reference = painter.latent(sr.square(Image.new("RGB", (20, 30), (200, 30, 90)), painter.side))
    guided = painter.paint(["a seven"], [1], kept(painter, 25, 4), sr.noised_reference, [reference])
    assert guided[0].shape == (3, 16, 16) and not torch.equal(guided[0], pictures[0])


def test_real_guidance_of_stable_diffusion_is_the_stock_image_to_image_pipeline(tmp_path):
    """A DDIM run from the noised latent: the same picture as StableDiffusionImg2ImgPipeline's arithmetic by hand"""
    from diffusers import DDIMScheduler

    painter = painter_of(gen_micro_batch=1, gen_guidance=2.0)
    painter.ancestral = False
    x = sr.square(Image.effect_noise((40, 32), 90).convert("RGB"), painter.side)
    latent, steps = painter.latent(x), kept(painter, 35, 20)
    (ours,) = painter.paint(["a seven"], [3], steps, sr.noised_reference, [latent])
    stock = DDIMScheduler.from_config(painter.pipe.scheduler.config, clip_sample=False, set_alpha_to_one=True)
    noise = torch.randn(1, *painter.shape, generator=torch.Generator().manual_seed(3))
    times = steps.flip(0)
    z = stock.add_noise(latent[None], noise, times[:1])
    text = torch.stack([painter.encode(p)[0] for p in ("", "a seven")])
    ends = [*stock.alphas_cumprod[times[1:]], torch.tensor(1.0)]
    with torch.no_grad():
        for t, after in zip(times, ends, strict=True):
            u, c = painter.unet(torch.cat([z, z]), t, encoder_hidden_states=text).sample.chunk(2)
            eps, now = plain_guidance(u, c, 2.0), stock.alphas_cumprod[t]
            z = after.sqrt() * (z - (1 - now).sqrt() * eps) / now.sqrt() + (1 - after).sqrt() * eps
        drawn = painter.pipe.vae.decode(z / painter.pipe.vae.config.scaling_factor).sample[0]
    assert (ours.float() - ((drawn.clamp(-1, 1) + 1) * 127.5)).abs().mean() < 1
    plain = [
        painter.paint(["a seven"], [3], kept(painter, r, 20), sr.noised_reference, [latent])[0] for r in (15, 50, 90)
    ]
    far = [(p.float() - painter.pixels(latent[None], ["a seven"], [3])[0].float()).abs().mean() for p in plain]
    assert far[0] < far[1] < far[2]  # r: the more steps, the further from the real image


def tiny_sd(folder, **scheduler):
    """The tiny generator with other entries in its scheduler's config"""
    shutil.copytree(models.TINY_WEIGHTS / "sd", folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | scheduler))
    return str(folder)


def test_v_prediction_gives_the_clean_image_of_the_stock_scheduler(tmp_path):
    from diffusers import DDIMScheduler

    painter = painter_of(sd_model=tiny_sd(tmp_path / "v", prediction_type="v_prediction"), gen_guidance=1.0)
    x = torch.randn(1, *painter.shape, generator=torch.Generator().manual_seed(0))
    text, stock = painter.encode("a seven")[0][None], DDIMScheduler.from_pretrained(tmp_path / "v" / "scheduler")
    stock.register_to_config(clip_sample=False)
    stock.set_timesteps(10)
    for t in (801, 401):
        with torch.no_grad():
            eps, _ = painter.denoiser(["a seven"])(x, t)
            v = painter.unet(x, t, encoder_hidden_states=text).sample
        wanted = stock.step(v, t, x).pred_original_sample
        close(sampler.clean_estimate(x, eps, painter.abar[t].float(), False), wanted, 1e-4)


def test_models_that_the_sampler_cannot_use_are_refused_before_the_first_stage(tmp_path):
    for i, (scheduler, said) in enumerate((
        (dict(prediction_type="sample"), "predicts 'sample'"),
        (dict(_class_name="FlowMatchEulerDiscreteScheduler"), "its scheduler"),
        (dict(_class_name="EulerDiscreteScheduler", rescale_betas_zero_snr=True), "above zero signal"),
    )):  # fmt: skip
        with pytest.raises(UserError, match=f"^--sd-model .*{said}"):
            painter_of(sd_model=tiny_sd(tmp_path / str(i), **scheduler))
    (tmp_path / "model_index.json").write_text('{"_class_name": "IFImg2ImgPipeline"}')
    with pytest.raises(UserError, match="^--sd-model: .*IFImg2ImgPipeline"):
        painter_of(sd_model=str(tmp_path))
    torch.manual_seed(0)
    tiny_if_2(tmp_path / "two")
    with pytest.raises(UserError, match="^--upsampler .*only DeepFloyd IF"):
        painter_of(upsampler=str(tmp_path / "two"))
    for flag in ("upsampler", "sentence_model", "head_clip", "filter_clip"):
        with pytest.raises(UserError, match=f"^--{flag.replace('_', '-')}: "):
            painter_of(**{flag: str(tmp_path / "nowhere")})
    for flags in (dict(backbone="nosuch"), dict(backbone="test_resnet.no_such_tag", real_weights="imagenet")):
        with pytest.raises(UserError, match="^--backbone: "):
            sr.planned_models(sr.Args(**{**sr.PRESETS["digits-pretrain"], **flags}))


def test_no_pickle_is_read(tmp_path):
    """Weights that are there only as pickles end the run with one line, whichever part has them."""
    torch.manual_seed(0)
    tiny_if(tmp_path / "one")
    tiny_if_2(tmp_path / "two")
    two = dict(sd_model=str(tmp_path / "one"), upsampler=str(tmp_path / "two"))
    painter_of(**two)
    for part in ("one/unet", "one/text_encoder", "two/unet"):
        (file,) = (tmp_path / part).glob("*.safetensors")
        torch.save(load_tensors(file), file.with_suffix(".bin"))
        file.rename(away := tmp_path / "away")
        with pytest.raises(UserError, match="only pickled weights"):
            painter_of(**two)
        away.rename(file)


def test_flags_of_later_stages_name_fields_and_none_that_an_earlier_stage_reads():
    fields, words = set(sr.Args.__dataclass_fields__), " ".join(sr.LATER.values()).split()
    assert all(word in fields or (word[-1] == "_" and any(f.startswith(word) for f in fields)) for word in words)
    assert len(words) == len(set(words))
    found = {"--sd-model": str(models.TINY_WEIGHTS / "sd"), "--backbone": "resnet50"}
    assert set(sr.fingerprints(sr.Args(), found)) == {"sd_model"}


# ---- GLIDE --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def glide_folder(tmp_path_factory):
    return make_tiny_glide(tmp_path_factory.mktemp("glide"))


def plain_glide(glide, prompt, seed, w, kept, reference=None):
    """GLIDE's base as a loop over diffusers' own scheduler, then the upsampler of common/glide, for one image"""
    from diffusers import DDPMScheduler

    stock = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=True)
    stock.set_timesteps(timesteps=sorted(kept, reverse=True))
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 3, glide.side, glide.side, generator=g)
    if reference is not None:
        x = stock.add_noise(reference[None], x, stock.timesteps[:1])
    text = glide.base.encode(*glide.tokens(["", prompt]))
    for t in stock.timesteps:
        with torch.no_grad():
            eps, v = glide.base(torch.cat([x, x]), int(t), text)
        eps = eps[:1] + w * (eps[1:] - eps[:1])
        x = stock.step(torch.cat([eps, v[1:]], 1), t, x, generator=g).prev_sample
    torch.randn(x.shape, generator=g)  # drawn for the last step too, and of no use there
    return glide.enlarged(x, [prompt], torch.randn(1, 3, 4 * glide.side, 4 * glide.side, generator=g))[0]


def test_glide_paints_what_a_plain_loop_over_the_stock_scheduler_does(glide_folder):
    flags = dict(sd_model=f"glide:{glide_folder}", gen_resolution=64, gen_micro_batch=2)
    painter = painter_of(**flags, gen_steps=100, gen_guidance=3.0)
    # The 16 shots' r = 15: 15 of round(999 k / 99), the noisiest at 141
    steps = [round(999 * k / 99) for k in range(15)]
    assert steps[-1] == 141
    picture = Image.effect_noise((24, 16), 90).convert("RGB")
    reference = painter.latent(sr.square(picture, painter.side))
    cut = torch.from_numpy(np.array(picture.crop((4, 0, 20, 16)))).permute(2, 0, 1)
    close(reference, cut / 127.5 - 1, 1e-6)  # centre crop of an image that needs no resize
    (ours,) = painter.paint(["a seven"], [3], kept(painter, 15), sr.noised_reference, [reference])
    wanted = plain_glide(painter.glide, "a seven", 3, 3.0, steps, reference)
    assert ours.shape == (3, 64, 64) and (ours.int() - wanted.int()).abs().float().mean() < 0.5
    other = painter.latent(sr.square(Image.effect_noise((16, 16), 90).convert("RGB"), 16))
    with_other = painter.paint(
        ["a two", "a seven"], [5, 3], kept(painter, 15), sr.noised_reference, [other, other]
    )  # another slot, another company
    assert (with_other[1].int() - ours.int()).abs().float().mean() > 2  # the real image matters


def test_glide_is_refused_with_what_it_has_not(glide_folder, tmp_path):
    glide = dict(sd_model=f"glide:{glide_folder}")
    args = sr.Args(**glide)
    sr.check_args(args)
    assert args.gen_resolution == 256
    sr.check_args(args := sr.Args())
    assert args.gen_resolution == 512
    for flags, said in (
        (dict(gen_resolution=192), "--gen-resolution 192"),
        (dict(upsampler="x"), "--upsampler"),
    ):
        with pytest.raises(UserError, match=said):
            sr.check_args(sr.Args(**glide, **flags))
    with pytest.raises(UserError, match="^--sd-model: .*no such folder"):
        painter_of(sd_model=f"glide:{tmp_path / 'nowhere'}")
    for name in ("base.pt", "vocab.json"):
        copy = shutil.copytree(glide_folder, tmp_path / name)
        (copy / name).unlink()
        with pytest.raises(UserError, match=f"^--sd-model: .*{name}"):
            painter_of(sd_model=f"glide:{copy}")
    found = {"--sd-model": str(glide_folder)}
    before = sr.fingerprints(args := sr.Args(**glide), found)
    (copy := shutil.copytree(glide_folder, tmp_path / "copy")).joinpath("notes.txt").write_text("not one of the four")
    assert before == sr.fingerprints(args, {"--sd-model": str(copy)})
    (copy / "merges.txt").write_text("#version: 0.3\n")
    assert before != sr.fingerprints(args, {"--sd-model": str(copy)})


# ---- the script end to end on the tiny world -----------------------------------------------------

SMALL = (
    "--sentences 4 --gen-images-per-class 5 --gen-steps 4 --gen-micro-batch 25 --filter-keep 3 --clf-seeds 1 "
    "--head-epochs 2 --ladder zero-shot basic-ce le+cf-sce"
).split()
FEW = "--preset digits-few-shot --gen-steps 20 --rg-images 4 --shot-counts 2 4 --ladder zero-shot real rf rg syn-real"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    from conftest import Launch

    folder = tmp_path_factory.mktemp("small")
    done = Launch(folder, folder / "hub")("synthetic_recognition.py", *SMALL, "--output-dir", folder / "run")
    return folder / "run", done.stdout


def test_run_leaves_every_file_with_its_content(small):
    out, stdout = small
    result = json.loads((out / "results.json").read_text())
    assert result["images"] == {"basic": 50, "le": 50}
    assert set(result["metrics"]) == {"basic-ce", "le+cf-sce", "saved_classifier"}
    assert result["metrics"]["saved_classifier"]["top1"] == pytest.approx(
        result["metrics"]["le+cf-sce"]["mean"], abs=0.5
    )
    assert result["baselines"]["zero-shot"]["mean"] > 65  # the tiny CLIP on real digits; its model card says 70.4
    assert result["metrics"]["le+cf-sce"]["mean"] > 50
    for folder in ("images", "basic"):
        assert len(list((out / folder).glob("*/*.png"))) == 50
        rows = [json.loads(line) for line in (out / folder / "metadata.jsonl").read_text().splitlines()]
        assert len(rows) == 50 and all(0 <= row["clip_confidence"] <= 1 for row in rows)
    sentences = json.loads((out / "sentences.json").read_text())
    assert all(row["class_name"] in s for row in sentences for s in row["sentences"])
    assert all(len(set(row["sentences"])) == 4 for row in sentences)
    keep = json.loads((out / "keep.json").read_text())
    assert len(keep["keep"]["le"]) == 30 and all(row["kept"] == 3 for row in keep["report"]["le"])
    for name in (
        "samples.png",
        "filtered.png",
        "report.html",
        "classifier/head.safetensors",
        "classifier/classes.json",
    ):
        assert (out / name).stat().st_size > 100
    assert "LE + CF, SCE" in stdout


def test_second_call_does_no_work(small, launch, tree_hash):
    before = tree_hash(small[0])
    launch("synthetic_recognition.py", *SMALL, "--output-dir", small[0])
    assert tree_hash(small[0]) == before


def same_result(a, b, tree_hash):
    for pattern in ("**/*.png", "**/*.safetensors", "keep.json", "sentences.json", "**/metadata.jsonl"):
        assert tree_hash(a, pattern) == tree_hash(b, pattern), pattern


def test_two_processes_leave_the_same_bytes_as_one(small, launch, tmp_path, tree_hash):
    launch("synthetic_recognition.py", *SMALL, "--output-dir", tmp_path / "two", processes=2)
    same_result(tmp_path / "two", small[0], tree_hash)


def test_killed_run_resumes_to_the_same_bytes(small, launch, tmp_path, tree_hash):
    out = tmp_path / "killed"
    flags = [*SMALL, "--output-dir", out]
    process = subprocess.Popen(
        launch.command("synthetic_recognition.py", *flags), env=launch.env(), cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 500
    while len(list(out.glob("basic/*/*.png"))) < 25 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()  # no time for an orderly end
    process.wait()
    assert not (out / "stages" / "filter.json").exists()
    launch("synthetic_recognition.py", *flags)
    same_result(out, small[0], tree_hash)


def test_few_shot_end_to_end_with_two_processes(launch, tmp_path, tree_hash):
    out, flags = tmp_path / "one", [*FEW.split(), *SMALL[:4], *SMALL[6:-4]]
    launch("synthetic_recognition.py", *flags, "--output-dir", out)
    launch("synthetic_recognition.py", *flags, "--output-dir", tmp_path / "two", processes=2)
    same_result(tmp_path / "two", out, tree_hash)
    result = json.loads((out / "results.json").read_text())
    assert result["images"] == {"le": 50, "rg2": 40, "rg4": 40}
    assert {"rf-2", "rg-4", "syn-real-2"} <= set(result["metrics"]) and {"real-2", "zero-shot"} <= set(
        result["baselines"]
    )


def test_training_on_pixels_equals_training_on_cached_features_and_can_tune_the_tower(launch, tmp_path):
    flags = "--preset digits-few-shot --gen-steps 4 --rg-images 4 --shot-counts 2 --ladder rg --clf-seeds 1 "
    flags = [*flags.split(), "--head-epochs", "2", "--gen-micro-batch", "40"]
    found = {}
    for name, more in (("cached", []), ("pixels", ["--no-freeze-bn"]), ("tower", ["--tune-share", "0.2"])):
        out = tmp_path / name
        launch("synthetic_recognition.py", *flags, *more, "--output-dir", out)
        found[name] = load_tensors(out / "classifier" / "runs" / "rg-2-seed0" / "weights.safetensors")
    assert (found["cached"]["weight"] - load_tensors(out / "features" / "head.safetensors")["weight"]).abs().max() > 0.1
    for key in ("weight", "bias"):
        close(found["pixels"][key], found["cached"][key], 1e-3)
    moved = {k for k, v in found["tower"].items() if k.startswith("visual.") and not torch.equal(v, found["pixels"][k])}
    total = sum(v.numel() for k, v in found["pixels"].items() if k.startswith("visual."))
    assert 0.2 < sum(found["tower"][k].numel() for k in moved) / total < 0.5, "the last fifth, and what completes it"


def test_pretrain_end_to_end_with_two_processes(launch, tmp_path, tree_hash):
    flags = "--preset digits-pretrain --pre-amounts 5 --pre-epochs 1 --transfer-epochs 1 --pre-micro-batch 25".split()
    flags += SMALL[:8] + "--clf-seeds 1 --ladder scratch synthetic real-init+synthetic --recipe moco".split()
    flags += "--transfer-images 90 --gen-format jpeg".split()
    # There is nothing to filter: the stage may be left out.
    unfiltered = "--stages select sentences generate train evaluate".split()
    launch("synthetic_recognition.py", *flags, *unfiltered, "--output-dir", tmp_path / "one")
    launch("synthetic_recognition.py", *flags, "--output-dir", tmp_path / "two", processes=2)
    result = json.loads((tmp_path / "one" / "results.json").read_text())
    assert {"synthetic-5", "real-init+synthetic-5"} <= set(result["metrics"]) and "scratch" in result["baselines"]
    drawn = {p.name for p in (tmp_path / "one" / "images").rglob("*.*")}
    assert "0.jpg" in drawn and not any(name.endswith(".png") for name in drawn)
    pattern = "classifier/runs/**/*.safetensors"
    assert tree_hash(tmp_path / "one", pattern) == tree_hash(tmp_path / "two", pattern)


@pytest.mark.parametrize("recipe", ["deit", "moco"])
def test_interrupted_pretraining_goes_on_to_the_same_bits(recipe, tmp_path, monkeypatch):
    flags = dict(recipe=recipe, pre_batch=8, pre_micro_batch=4, pre_epochs=2, moco_queue=20)
    args, source, update = sr.Args(**{**sr.PRESETS["digits-pretrain"], **flags}), Pixels(21), Loop.update
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    sr.pretrain(args, Log(), ONE, whole, source, 10, 0)

    def stopped(self, **more):
        if self.step == 4:
            raise Interrupted
        return update(self, **more)

    original = Loop.__iter__

    def saving(self):
        for step in original(self):
            yield step
            if step == 3 and not self.file.exists():
                self.step, self.done = 3, 4
                self.save()

    monkeypatch.setattr(Loop, "update", stopped)
    monkeypatch.setattr(Loop, "__iter__", saving)
    with pytest.raises(Interrupted):
        sr.pretrain(args, Log(), ONE, cut, source, 10, 0)
    monkeypatch.undo()
    assert (cut / "checkpoint.safetensors").exists()
    sr.pretrain(args, Log(), ONE, cut, source, 10, 0)
    a, b = (load_tensors(folder / "pretrained.safetensors") for folder in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a) and not (cut / "checkpoint.safetensors").exists()


def test_own_sentences_are_taken_as_they_are_and_kept(launch, tmp_path):
    """No model for sentences is needed; a run's own file serves another run; other sentences are another run."""
    said = {name: [f"a {name}  on paper", f"a {name} on paper", f"the {name}"] for name in sr.datasets.DIGITS}
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(said | {"ten": []}))
    flags = [*SMALL, "--stages", "select", "sentences", "--output-dir"]
    done = launch("synthetic_recognition.py", *flags, tmp_path / "a", "--sentence-model", mine)
    rows = json.loads((tmp_path / "a" / "sentences.json").read_text())
    wanted = [[f"a {name} on paper", f"the {name}"] for name in sr.datasets.DIGITS]
    assert [row["class_name"] for row in rows] == list(sr.datasets.DIGITS)
    assert [row["sentences"] for row in rows] == wanted and "fewer than" not in done.stdout
    launch("synthetic_recognition.py", *flags, tmp_path / "b", "--sentence-model", tmp_path / "a" / "sentences.json")
    assert json.loads((tmp_path / "b" / "sentences.json").read_text()) == rows
    launch("synthetic_recognition.py", *flags, tmp_path / "a", "--sentence-model", mine)  # the same again: no work
    mine.write_text(json.dumps(said | {"zero": ["a round zero"]}))
    done = launch("synthetic_recognition.py", *flags, tmp_path / "a", "--sentence-model", mine, check=False)
    assert done.returncode == 2 and "what --sentence-model names" in done.stderr and mine.exists()


def test_a_row_whose_filter_left_nothing_is_named(tmp_path):
    """--filter-keep 0 may keep nothing; a row of the table then has nothing to be trained on."""
    clips, images = [sr.load_clip("tiny")] * 2, Pixels(4, 3, 4)
    images.keys = list("abcd")
    (tmp_path / "keep.json").write_text('{"keep": {"le": []}}')
    save_tensors(tmp_path / "features" / "head.safetensors", {"weight": torch.zeros(3, 96)})
    run = SimpleNamespace(path=lambda *parts: tmp_path.joinpath(*parts))
    sr.Features(tmp_path / "features" / "test", clips, images, 4, 0).write(ONE)
    data = sr.HeadData(sr.Args(**sr.PRESETS["digits"]), run, ONE.device, clips, ["a", "b", "c"], None, {}, images)
    with pytest.raises(UserError, match="row le.cf-sce: no image passed its filter"):
        data.synthetic("le+cf-sce", 0)


def test_resolutions_that_a_generator_cannot_draw(tmp_path):
    tiny, two = {"--sd-model": str(models.TINY_WEIGHTS / "sd")}, {}
    assert painters.drawn_size("tiny", tiny, 32) == (32, "") and painters.drawn_size("x", {}, 33) == (33, "")
    with pytest.raises(UserError, match="^--gen-resolution 33: .* a multiple of "):
        painters.drawn_size("tiny", tiny, 33)
    torch.manual_seed(0)
    tiny_if(tmp_path / "one")
    tiny_if_2(tmp_path / "two")
    one, two = ({"--sd-model": str(tmp_path / "one")} | more for more in ({}, {"--upsampler": str(tmp_path / "two")}))
    for found, side in ((one, 16), (two, 32)):
        painter = painter_of(**{flag[2:].replace("-", "_"): where for flag, where in found.items()}, gen_micro_batch=1)
        assert painter.paint(["a cat"], [0], kept(painter)[:1])[0].shape == (3, side, side)
        size, note = painters.drawn_size("x", found, 512)
        assert size == side and f"draws {side} pixels" in note and painters.drawn_size("x", found, side) == (side, "")


def test_the_plan_counts_weights_from_real_images_and_the_filter_by_them():
    flags = {**sr.PRESETS["digits-pretrain"], "clf_seeds": 2}
    of = lambda **more: sr.plan(sr.Args(**{**flags, **more}))[0]  # noqa: E731
    here, elsewhere = of(), of(real_weights="imagenet")
    (work,) = [w for w in here if w.what not in {w.what for w in elsewhere}]
    assert work.passes == 2 * 30 * (1_000 - 8 * 10) and work.jobs == 2 and len(here) == len(elsewhere) + 1
    assert work.tflop / work.passes == pytest.approx(next(w.tflop / w.passes for w in here if "synthetic" in w.what))
    assert len(of(ladder=("scratch", "synthetic"))) == len(of(ladder=("scratch", "synthetic"), real_weights="imagenet"))
    few = {**sr.PRESETS["digits-few-shot"], "shot_counts": (16,)}
    heads = lambda *rows: next(w for w in sr.plan(sr.Args(**{**few, "ladder": rows}))[0] if w.stage == "train")  # noqa: E731
    # 40 images of a class stay, and are compared with 16 real ones each of ten classes
    assert heads("rf").gpu - heads("basic").gpu == 4 * 1024 * 400 + 10 * 400 * 160


def test_a_micro_batch_of_one_image_is_not_mixed():
    """timm mixes an even number; of one image nothing would be left, and its loss is no number."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 3))
    x, y, objective = torch.rand(1, 3, 4, 4), torch.tensor([1]), sr.Supervised(net, 3, 0, mix=True)
    close(objective.loss([x], y, 0)[0], F.cross_entropy(net(x), y), 1e-6)
    two, labels = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    assert not torch.isclose(objective.loss([two], labels, 0)[0], F.cross_entropy(net(two), labels))
