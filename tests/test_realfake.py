"""Real-Fake: values of the authors' code, invariants of the method, the script end to end on the tiny world."""

import json
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import realfake as rf
from common import captions, datasets, distributed, features, metrics
from common import run as runs
from common.captions import captioner
from common.diffusion import Adapter, load_pipeline, lora_config
from common.files import class_folders, class_range, load_tensors, save_tensors, write_json
from common.launch import UserError
from common.models import resolve
from common.ood import ood_images, restricted_top1, subset_labels


@pytest.fixture
def g(golden):
    return golden("realfake")


@pytest.fixture
def meta():
    from conftest import GOLDEN_DIR
    from safetensors import safe_open

    with safe_open(GOLDEN_DIR / "realfake.safetensors", "pt") as f:
        return {k: json.loads(v) for k, v in f.metadata().items()}


def close(a, b, tol):
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max().item() <= tol


def relative(a, b, tol):
    assert a.shape == b.shape
    assert ((a.double() - b.double()).abs() / b.double().abs()).max().item() <= tol


def stored_scheduler():
    from diffusers import PNDMScheduler

    schedule = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return PNDMScheduler(**schedule, steps_offset=1, set_alpha_to_one=False, skip_prk_steps=True)


# ---- golden ------------------------------------------------------------------------------------


def test_golden_snr(g):
    abar = rf.alphas_cumprod()
    relative(abar, g["snr.alphas_cumprod"], 2e-6)
    snr = rf.snr_of(g["snr.alphas_cumprod"][g["snr.timesteps"]])
    relative(snr, g["snr.snr"], 1e-5)
    close(rf.snr_weight(snr, 5.0), g["snr.weight_gamma5"], 1e-6)


@pytest.mark.parametrize("case", ["b8", "b3", "b1"])
def test_golden_loss(g, case):
    gamma, lam = g[f"loss.{case}.gamma_lambda"].tolist()
    w = rf.snr_weight(rf.snr_of(rf.alphas_cumprod()[g[f"loss.{case}.timesteps"]]), gamma)
    pred = g[f"loss.{case}.pred"].clone().requires_grad_()
    total, diffusion, dm = rf.matching_loss(pred, g[f"loss.{case}.target"], w, lam)
    for name, value in (("total", total), ("diffusion", diffusion), ("dm", dm)):
        relative(value.detach().reshape(1), g[f"loss.{case}.{name}"], 1e-5)
    close(torch.autograd.grad(total, pred)[0], g[f"loss.{case}.grad_pred"], 1e-6)


def test_golden_token(g):
    assert torch.equal(rf.with_token(g["token.hidden"], g["token.feature"]), g["token.out"])


def test_golden_sampling_tokens_are_the_intended_ones(g):
    features = g["gentoken.features"]
    n = len(features)
    ours, released = (
        rf.VisualTokens(features, torch.zeros(n, dtype=torch.long), range(n), mode, 1)[list(range(n))]
        for mode in ("image", "released")
    )
    assert torch.equal(ours[:, None], g["gentoken.intended"])
    assert torch.equal(released[:, None], g["gentoken.released"]) and not torch.equal(released, ours)


def test_golden_class_means(g):
    features, labels, means = g["classmean.features"], g["classmean.labels"], g["classmean.means"]
    close(rf.class_means(features, labels, len(means)), means, 1e-6)
    tokens = rf.VisualTokens(features, labels, range(len(labels)), "class_mean", len(means))
    close(tokens[list(range(len(labels)))], means[labels], 1e-6)


def test_golden_chunks(g):
    for n, workers, i, start, length in g["chunks.N_k_index_start_len"].tolist():
        ours = class_range(n, workers, i)
        assert (ours.start, len(ours)) == (start, length)


def test_golden_grouping_is_not_needed_for_a_class_sorted_list(g):
    """The official sampler regroups a batch by class but keeps the names in the old order. Ours never regroups."""
    classes = g["group.class"].tolist()
    grouped = sorted(range(len(classes)), key=lambda i: classes.index(classes[i]))
    assert grouped == g["group.order"].tolist()
    images = datasets.Images(classes, [f"{i}" for i in range(len(classes))], ["a"] * (max(classes) + 1))
    labels = rf.in_order(images).labels.tolist()
    assert sorted(range(len(labels)), key=lambda i: labels.index(labels[i])) == list(range(len(labels)))


def test_golden_half_split(g):
    for key in [k for k in g.keys() if k.startswith("half.N")]:
        assert np.array_equal(rf.half_split(int(key[6:])).astype(np.uint8), g[key].numpy())


def test_golden_sampler(g):
    z0, noise, abar = g["sampler.z0"], g["sampler.noise"], rf.alphas_cumprod()

    def unet(z, t, h):
        s = (1 - abar[t]).sqrt()
        u, c = z.chunk(2)
        e_u, e_c = 0.9 * torch.tanh(u) * s, torch.tanh(c) * s + 0.1 * torch.sin(3 * c)
        return type("Out", (), {"sample": torch.cat([e_u, e_c])})

    seen = []
    out = rf.denoise(unet, stored_scheduler(), 30, 0.75, 2.0, z0, noise, torch.zeros(4, 1, 1), seen.append)
    assert [int(t) for t in seen] == g["sampler.timesteps"].tolist()
    close(rf.add_noise(z0, noise, abar[int(seen[0])]), g["sampler.start"], 1e-5)
    close(out, g["sampler.final"], 1e-4)


def test_golden_strength(g):
    for percent, steps, kept in g["strength.pct_steps_kept"].tolist():
        assert rf.kept_steps(percent / 100, steps) == kept


def test_golden_learning_rate(g, meta):
    m = meta["lr"]
    schedule = (m["lr"], m["decay_milestones"], m["decay_rate"], m["warmup_epochs"], m["warmup_lr"])
    ours = [rf.multistep_lr(e, *schedule) for e in range(m["epochs"])]
    close(torch.tensor(ours, dtype=torch.float64), g["lr.per_epoch"], 1e-9)


def test_golden_label_smoothing(g):
    ours = rf.classifier_loss(g["ls.logits"], g["ls.target"], rf.Args().net_smoothing)
    close(ours.reshape(1), g["ls.loss_0.1"], 1e-5)


@pytest.mark.parametrize("kind", ["cross", "self"])
def test_golden_lora_attention(g, kind, tmp_path):
    from diffusers.models.attention_processor import Attention
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    x, ctx = g[f"lora.{kind}.x"], g["lora.cross.ctx"] if kind == "cross" else None

    def frozen():
        width = None if ctx is None else ctx.shape[-1]
        attn = Attention(x.shape[-1], cross_attention_dim=width, heads=2, dim_head=8)
        for name in ("to_q", "to_k", "to_v"):
            attn.get_submodule(name).weight.data.copy_(g[f"lora.{kind}.{name}.weight"])
        attn.to_out[0].weight.data.copy_(g[f"lora.{kind}.to_out.weight"])
        attn.to_out[0].bias.data.copy_(g[f"lora.{kind}.to_out.bias"])
        return attn.requires_grad_(False)

    tuned = nn.ModuleDict({"attn": frozen()})
    inject_adapter_in_model(lora_config(4, rf.UNET_TARGETS), tuned)
    tensors = {}
    for name, layer in tuned.named_modules():
        if isinstance(layer, LoraLayer):
            key = name.split(".")[1]
            layer.lora_A["default"].weight.data.copy_(g[f"lora.{kind}.{key}.A"])
            layer.lora_B["default"].weight.data.copy_(g[f"lora.{kind}.{key}.B"])
            tensors |= {f"unet.{name}.lora_A.weight": g[f"lora.{kind}.{key}.A"]}
            tensors |= {f"unet.{name}.lora_B.weight": g[f"lora.{kind}.{key}.B"]}
    save_tensors(tmp_path / "lora.safetensors", tensors)
    plain = nn.ModuleDict({"attn": frozen()})
    folded = Adapter(SimpleNamespace(unet=plain, text_encoder=None))
    for scale in (0.5, 1.0, 0.0):
        expected = g[f"lora.{kind}.y_scale{scale}"]
        for layer in tuned.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling["default"] = scale
        folded.use(tmp_path / "lora.safetensors", scale)  # what stage 4 uses
        for net in (tuned, plain):
            with torch.no_grad():
                close(net["attn"](x, ctx), expected, 1e-4)


def test_golden_subsets(g):
    labels = g["subset.labels"].tolist()
    for name in ("imagenette", "imagenet100"):
        kept, mapped = subset_labels(labels, datasets.IMAGENET_SUBSETS[name])
        assert kept == g[f"subset.{name}.kept"].tolist() and mapped == g[f"subset.{name}.mapped"].tolist()


def test_golden_lira(g):
    keep = g["lira.keep"].bool()
    score = rf.lira_score(g["lira.shadow_logit"], keep, ~keep, g["lira.target_logit"])
    close(score, g["lira.score"], 1e-8)
    member = g["lira.member"].bool()
    pairs = score[member][:, None] - score[~member][None]
    auc = ((pairs > 0).double() + 0.5 * (pairs == 0)).mean().item()  # the definition, counted pair by pair
    assert rf.attack_figures(score, member)["auc"] == pytest.approx(auc)


def test_attack_figures_are_counted_threshold_by_threshold():
    score, member = torch.randn(300), torch.rand(300) < 0.4
    score = score + member  # members score higher
    rates = [((score >= t)[~member].float().mean().item(), (score >= t)[member].float().mean().item()) for t in score]
    figures = rf.attack_figures(score, member)
    assert figures["balanced_accuracy"] == pytest.approx(max((hit + 1 - false) / 2 for false, hit in rates))
    assert figures["tpr_at_0.01"] == pytest.approx(max([hit for false, hit in rates if false <= 0.01], default=0))


def test_golden_prompts(meta):
    m = meta["prompts"]
    pairs = list(zip(m["class_names"], m["captions"], strict=True))
    assert [rf.sampling_prompt(*p) for p in pairs] == m["with_caption"]
    assert [rf.sampling_prompt(n, "") for n, _ in pairs] == m["without_caption"]
    assert [rf.training_prompt(*p) for p in pairs] == m["training_text"]
    assert rf.Args().gen_negative == m["negative"]


def test_golden_every_key_is_used(g, request):
    ran = {item.originalname for item in request.session.items if item.path == request.path}
    needed = {name for name in globals() if name.startswith("test_golden")}
    if needed - ran:
        pytest.skip(f"only some of the golden tests were chosen; without {sorted(needed - ran)}")
    assert not g.unread(), f"no test reads {g.unread()}"


# ---- invariants --------------------------------------------------------------------------------


def residuals(b=8):
    g = torch.Generator().manual_seed(b)
    pred, target = torch.randn(2, b, 4, 8, 8, generator=g)
    return pred, target, rf.snr_weight(rf.snr_of(rf.alphas_cumprod()[torch.arange(b) * 120]), 5.0)


def test_matching_loss_invariants():
    pred, target, w = residuals()
    total, diffusion, dm = rf.matching_loss(pred, target, w, 0.5)
    assert dm <= 64 * diffusion and torch.equal(rf.matching_loss(pred, target, w, 0.0)[0], diffusion)
    assert all(float(x) == 0 for x in rf.matching_loss(target, target, w, 0.5))
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    assert torch.allclose(rf.matching_loss(pred[order], target[order], w[order], 0.5)[0], total)
    r = pred - target
    _, diffusion, dm = rf.matching_loss(torch.cat([r, -r]), torch.zeros(16, 4, 8, 8), torch.cat([w, w]), 0.5)
    assert dm < 1e-10 and diffusion > 0.1, "opposite residuals have no first moment"
    _, d1, m1 = rf.matching_loss(pred[:1], target[:1], torch.ones(1), 0.5)
    assert torch.allclose(d1, m1)
    twice = [torch.cat([x, x]) for x in (pred, target, w)]
    (_, d1, m1), (_, d2, m2) = rf.matching_loss(pred, target, w, 0.5), rf.matching_loss(*twice, 0.5)
    assert torch.allclose(d1, d2) and torch.allclose(4 * m1, m2)


def test_weights_are_one_up_to_gamma_and_gamma_over_snr_beyond():
    snr = torch.tensor([0.01, 1.0, 5.0, 10.0, 1000.0])
    close(rf.snr_weight(snr, 5.0), torch.tensor([1, 1, 1, 0.5, 0.005]), 1e-7)
    pred, target, _ = residuals()
    plain = rf.matching_loss(pred, target, rf.snr_weight(snr.repeat(2)[:8], math.inf), 0.0)[0]
    assert torch.allclose(plain, torch.nn.functional.mse_loss(pred, target))
    assert rf.matching_weight(0.003, 8) == 0.003 and rf.matching_weight(0.003, 16) == pytest.approx(0.0015)


def test_token_changes_only_the_last_slot_of_a_copy():
    h, features = torch.randn(5, 77, 16), torch.randn(5, 16)
    before = h.clone()
    out = rf.with_token(h, features)
    assert torch.equal(h, before) and torch.equal(out[:, :-1], h[:, :-1]) and torch.equal(out[:, -1], features)
    assert rf.with_token(h, None) is h


def test_tokens_do_not_depend_on_images_outside_the_set():
    features, labels = torch.randn(12, 16), torch.arange(12) % 3
    members = [0, 1, 3, 4, 7, 8, 11]
    other = features.clone()
    other[[i for i in range(12) if i not in members]] = float("inf")  # non-members: any use of them would show
    for mode in ("image", "released", "class_mean"):
        tokens, spoilt = (rf.VisualTokens(table, labels, members, mode, 3) for table in (features, other))
        assert torch.equal(tokens[members], spoilt[members]) and tokens[members].isfinite().all()
        assert torch.equal(tokens[[7, 3]], tokens[members][[4, 2]]), "nor on its neighbours in a batch"
        with pytest.raises(KeyError):
            tokens[[2]]
    same = rf.VisualTokens(torch.ones(12, 16) * 0.3, labels, range(12), "class_mean", 3)
    assert torch.allclose(same[list(range(12))], torch.full((12, 16), 0.3))


def test_guidance_one_ignores_the_negative_prompt():
    z0, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def unet(z, t, h):
        return type("Out", (), {"sample": 0.1 * z + h.mean((1, 2)).view(-1, 1, 1, 1)})

    def run(negative, w, start=z0):
        h = torch.cat([torch.full((2, 3, 4), negative), torch.ones(2, 3, 4) * 0.1])
        return rf.denoise(unet, stored_scheduler(), 8, 0.75, w, start, noise, h)

    assert torch.allclose(run(0.0, 1.0), run(5.0, 1.0), atol=1e-5)
    assert not torch.allclose(run(0.0, 2.0), run(5.0, 2.0), atol=1e-2)
    times = []
    h = torch.zeros(4, 3, 4)
    rf.denoise(unet, stored_scheduler(), 8, 0.75, 2.0, None, noise, h, times.append)
    assert len(times) == 8, "a start from noise runs every step"
    assert rf.kept_steps(1.0, 30) == 30 and rf.kept_steps(0.75, 30) == 22
    start = rf.add_noise(torch.randn(4, 4, 64, 64) * 0.2, torch.randn(4, 4, 64, 64), rf.alphas_cumprod()[-1])
    assert abs(start.std() - 1) < 0.02


def test_too_little_disk_is_told_before_the_first_image(tmp_path, monkeypatch):
    args = rf.Args(gen_versions=3, mia_models=0, gen_format="jpeg", ablations=("no-prior",), gen_save_size=256)
    real = datasets.Images([0, 0, 1], list("abc"), ["x", "y"])
    sets, run = rf.generated_sets(args, 3), SimpleNamespace(dir=tmp_path, path=tmp_path.joinpath)
    need = 12 * 256 * 256 * 0.2
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=need + 1))
    todo = rf.missing_versions(args, run, real, sets)
    assert todo == {"images": {i: [0, 1, 2] for i in range(3)}, "ablations/no-prior": {i: [0] for i in range(3)}}
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=need - 1))
    with pytest.raises(UserError, match="lower --gen-versions"):
        rf.missing_versions(args, run, real, sets)


def test_sets_have_one_image_per_real_image_and_version():
    labels = [0, 0, 0, 1, 1, 2, 2, 2]
    real = datasets.Images(labels, [f"c{c}/{i}" for i, c in enumerate(labels)], ["a", "b", "c"])
    args = rf.Args(gen_versions=3, mia_models=4, ablations=("no-lora", "no-prior", "no-token"))
    sets = rf.generated_sets(args, len(real))
    run = type("Run", (), {"path": lambda self, *parts: Path("run", *parts)})()
    for v in sets.values():
        for k in range(1, v.versions + 1):
            versions = rf.versions_of(args, run, v, real)
            some = versions.images(k)
            keys = {some.key(j) for j in range(len(some))}
            assert len(some) == len(v.rows) * k == len(keys)
            files = {versions.key(i, j) for i in v.rows for j in range(k)}
            assert keys == files, "a set of fewer versions is a part of each set of more"
            assert all(some.labels[j] == int(some.key(j)[1]) for j in range(len(some)))
            assert {f"0{labels[i]}" for i in v.rows} == {key[:2] for key in keys}


def test_half_split_gives_every_sample_to_half_of_the_models():
    for models in (4, 10):
        keep = rf.half_split(37, models)
        assert keep.shape == (models, 37) and (keep.sum(0) == models // 2).all()
    assert len(set(rf.half_split(37).sum(1).tolist())) > 1, "the models' sets have different sizes"


def test_rates_and_decay_groups_of_the_recipe():
    args = rf.Args()
    rates = [rf.multistep_lr(e, 0.1, args.net_milestones, 0.2, 5) for e in range(200)]
    assert rates[0] == 1e-5 and rates[48] == 0.1 and rates[49] == pytest.approx(0.02) == rates[98]
    small = replace(args, net_model="test_resnet")
    optimizer = rf.make_optimizer(small, rf.make_net(small, 10, 0))
    decayed = [group for group in optimizer.param_groups if group["weight_decay"] > 0]
    assert decayed and all(p.ndim > 1 for group in decayed for p in group["params"])
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_lira_and_roc_of_no_information():
    phi = torch.randn(1, 20, dtype=torch.float64).repeat(6, 1) + torch.tensor([0.0, 1, 2, 0, 1, 2]).view(6, 1)
    keep = torch.tensor([True] * 3 + [False] * 3).view(6, 1).repeat(1, 20)
    assert rf.lira_score(phi, keep, ~keep, torch.randn(20)).abs().max() < 1e-12, "equal statistics: no evidence"
    member = torch.arange(20) < 10
    assert rf.attack_figures(torch.zeros(20), member)["auc"] == 0.5
    perfect = rf.attack_figures(member.double(), member)
    assert set(perfect) == {"auc", "balanced_accuracy", "tpr_at_0.001", "tpr_at_0.01"}
    assert set(perfect.values()) == {1.0}


@pytest.mark.parametrize("models", [6, 10])
def test_the_attack_finds_members_when_there_is_something_to_find(models):
    g = torch.Generator().manual_seed(0)
    keep = torch.from_numpy(rf.half_split(2000, models))
    phi = torch.randn(models, 2000, generator=g) + torch.randn(2000, generator=g) * 3
    leaking, _ = rf.attack_results(phi + 3.0 * keep, keep)
    silent, _ = rf.attack_results(phi, keep)
    assert leaking["lira"]["auc"] > 0.9 and abs(silent["lira"]["auc"] - 0.5) < 0.02
    assert leaking["lira"]["auc"] > leaking["threshold"]["auc"] + 0.1, "LiRA knows how hard each image is"


def test_balanced_shadows_are_equally_many_and_on_their_side():
    keep = torch.from_numpy(rf.half_split(50, 6))[1:]
    inside, outside = rf.balanced(keep)
    assert (inside.sum(0) == 2).all() and (outside.sum(0) == 2).all()
    assert (inside <= keep).all() and not (outside & keep).any()


def test_membership_logit_is_the_log_odds():
    logits, labels = torch.randn(6, 10), torch.arange(6)
    p = logits.double().softmax(1)[torch.arange(6), labels]
    close(rf.membership_logit(logits, labels), (p / (1 - p)).log(), 1e-12)


def test_out_of_distribution_folders(tmp_path):
    from timm.data import ImageNetInfo

    wnids = ImageNetInfo().label_names()
    for root, folders in (("v2", ["0", "217", "5", "10"]), ("r", [wnids[217], wnids[0], wnids[3]])):
        for folder in folders:
            (tmp_path / root / folder).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / root / folder / "a b.png")
    nette = datasets.IMAGENET_SUBSETS["imagenette"]
    for root in ("v2", "r"):
        images, known = ood_images(tmp_path / root, nette)
        assert sorted(images.labels.tolist()) == known == [0, 1] and images[0].size == (8, 8)
    every, known = ood_images(tmp_path / "v2", list(range(1000)))
    assert every.labels.tolist() == [0, 5, 10, 217] == known, "V2's folders are numbers, not words"
    logits = torch.tensor([[0.0, 1.0, 9.0], [2.0, 1.0, 9.0]])
    assert restricted_top1(logits, [1, 0], [0, 1]) == 100.0 and restricted_top1(logits, [1, 0], [0, 1, 2]) == 0.0
    with pytest.raises(UserError, match="neither"):
        (tmp_path / "v2" / "cats").mkdir()
        ood_images(tmp_path / "v2", nette)


def test_prompts_use_the_official_class_names():
    assert rf.prompt_names("imagenette", ["x"] * 10)[:3] == ["tench", "English Springer Spaniel", "cassette player"]
    names = rf.prompt_names("imagenet", ["x"] * 1000)
    assert names[836] == "sunglass" and names[744] == "projectile missile" and rf.prompt_names("digits", ["a"]) == ["a"]


def test_ready_captions(tmp_path):
    real = datasets.Images([0, 1], ["train/n01/a.JPEG", "train/n02/b c.JPEG"], ["tench", "dog"])
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"n01": {"a.JPEG": " a fish "}, "dog": {"b c.JPEG": "a dog"}}))
    assert captions.read_captions(file, real) == ["a fish", "a dog"]
    file.write_text(json.dumps(dict(zip(real.keys, ["a fish", "a dog"], strict=True))))  # what the stage writes
    assert captions.read_captions(file, real) == ["a fish", "a dog"]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as some editors save UTF-8
    assert captions.read_captions(file, real) == ["a fish", "a dog"]
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "n01.json").write_text('{"a.JPEG": "a fish"}')
    (tmp_path / "published" / "n02.json").write_text('{"b c.JPEG": null}')
    assert captions.read_captions(tmp_path / "published", real) == ["a fish", ""]


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "captions.json: .*No such file"),
        ("{", "captions.json: Expecting"),
        ('{"n01": {"a.JPEG": "a fish"}}', "no caption for b c.JPEG of 'dog'"),
        ('{"n01": {"a.JPEG": "a fish"}, "n02": {"a.JPEG": "a dog"}}', "no caption for b c.JPEG of 'dog'"),
        ('{"n01/a.JPEG": "a fish", "n02/b c.JPEG": "a dog"}', "no caption for train/n01/a.JPEG of 'tench'"),
        ('{"n01": {"a.JPEG": "a fish"}, "n02": "a dog"}', "wanted is {class: {file name: caption}}"),
        ('["a fish", "a dog"]', "wanted is {class: {file name: caption}}"),
    ],
)
def test_wrong_captions_are_told_in_one_line(tmp_path, content, words):
    real = datasets.Images([0, 1], ["train/n01/a.JPEG", "train/n02/b c.JPEG"], ["tench", "dog"])
    file = tmp_path / "captions.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        captions.read_captions(file, real)
    assert "\n" not in str(caught.value)


def tiny_blip2(folder):
    """BLIP-2 with random weights, in the files of Salesforce/blip2-opt-2.7b: OPT, 4 queries, 8 x 8 pixels -> words"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        BlipImageProcessor,
        OPTConfig,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<s>", "</s>", "<unk>", *"a the digit photo of red white bold one two seven nine on".split()]
    words += [f"word{i}" for i in range(32 - len(words))]  # a vocabulary that is not taken for a broken one
    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    width = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    text = OPTConfig(
        vocab_size=len(words) + 1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
        word_embed_proj_dim=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=dict(image_size=8, patch_size=4, **width), text_config=text.to_dict(), num_query_tokens=4,
        qformer_config=dict(encoder_hidden_size=16, cross_attention_frequency=1, vocab_size=len(words), **width),
        image_token_index=len(words),
    )  # fmt: skip
    torch.manual_seed(1)
    model = Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(30 if p.ndim > 1 else 1)  # the usual small weights would say the same about every image
    model.save_pretrained(folder)
    BlipImageProcessor(size=dict(height=8, width=8)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=bare, **special).save_pretrained(folder)
    about = dict(num_query_tokens=4, processor_class="Blip2Processor")
    (folder / "processor_config.json").write_text(json.dumps(about))
    return words


def greedy_caption(folder, image):
    """The definition: image, <s>, no prompt, then the likeliest token up to </s> or 16 -> caption, number of tokens"""
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

    processor = Blip2Processor.from_pretrained(folder)
    model = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    ids = [1]
    with torch.no_grad():
        said = model.get_image_features(processor(images=image, return_tensors="pt").pixel_values).pooler_output
        while len(ids) <= 16 and ids[-1] != 2:
            h = torch.cat([said, model.get_input_embeddings()(torch.tensor([ids]))], 1)
            ids.append(model.language_model(inputs_embeds=h).logits[0, -1].argmax().item())
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids) - 1


def captions_by(folder, images, precision="fp32", workers=0):
    """In batches of 16"""
    batches = [range(i, min(i + 16, len(images))) for i in range(0, len(images), 16)]
    written = captioner(str(folder), torch.device("cpu"), precision, workers)(images, batches)
    return [text for texts in written for text in texts]


def test_blip2_folder_writes_captions(tmp_path):
    folder = tmp_path / "blip2"
    words = tiny_blip2(folder)
    rng = torch.Generator().manual_seed(0)
    pixels = (torch.rand(40, 12, 9, 3, generator=rng) * 255).byte().numpy()
    real = datasets.Images([0] * 40, [f"{i}.png" for i in range(40)], ["x"], pixels=pixels)
    captions = captions_by(folder, real)
    expected, lengths = zip(*[greedy_caption(folder, real[i]) for i in range(40)], strict=True)
    assert captions == list(expected) and len(set(captions)) > 20
    assert max(lengths) == 16 > min(lengths), "some captions end by themselves, others at 16 tokens"
    assert {word for c in captions for word in c.split()} <= set(words[4:]), "no image, end or padding tokens"
    assert captions_by(folder, real.subset([39, 3, 20]), workers=1) == [captions[i] for i in (39, 3, 20)]

    halved = captions_by(folder, real, "bf16")
    assert len(halved) == 40 and len(set(halved)) > 20

    config = json.loads((folder / "config.json").read_text())
    del config["image_token_index"]  # a checkpoint that transformers wrote before it had image tokens for BLIP-2
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").unlink()
    about = json.loads((folder / "preprocessor_config.json").read_text()) | {"processor_class": "Blip2Processor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    assert captions_by(folder, real) == captions


# ---- the tiny generator ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(resolve("tiny", "generator"), torch.device("cpu"), "fp32")


def test_fresh_adapter_leaves_the_generator_as_it_was(pipe):
    unet = pipe.unet
    z, h, t = torch.randn(2, 4, 4, 4), torch.randn(2, 24, 64), torch.tensor(500)
    with torch.no_grad():
        stock = unet(z, t, h).sample
    unet.add_adapter(lora_config(4, rf.UNET_TARGETS))
    trained = [n for n, p in unet.named_parameters() if p.requires_grad]
    assert trained and all("lora" in n for n in trained)
    with torch.no_grad():
        assert torch.equal(unet(z, t, h).sample, stock), "peft starts B at zero"
    pipe.unload_lora_weights()


def test_an_image_does_not_depend_on_its_neighbours(pipe):
    args = rf.Args(**{**rf.PRESETS["digits"], "gen_steps": 4, "gen_micro_batch": 3})
    real = rf.in_order(datasets.load_dataset("digits").train)

    def draw(rows):
        x = torch.stack([torch.from_numpy(np.asarray(real[i])).permute(2, 0, 1) for i in rows])
        posterior = rf.posterior_of(args, pipe, x)
        h = torch.linspace(-1, 1, 24 * 64).view(1, 24, 64).expand(6, -1, -1)
        return rf.sample_versions(args, pipe, pipe.unet, posterior, h, [100 + i for i in rows])

    together = dict(zip([5, 6, 7], draw([5, 6, 7]), strict=True))
    assert torch.equal(draw([7])[0], together[7]) and torch.equal(draw([9, 5])[1], together[5])
    assert not torch.equal(together[5], together[6])


class Guarded:
    """Real images of which only the members may be opened."""

    def __init__(self, images, members):
        self.images, self.members = images, set(members)
        self.labels, self.keys, self.class_names = images.labels, images.keys, images.class_names

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        assert i in self.members, f"non-member {i} was opened"
        return self.images[i]

    def open(self, i, shorter=None):
        return self[i]

    def size(self, i):
        return self[i].size

    def subset(self, rows):
        assert set(rows) <= self.members
        return self.images.subset(rows)


def test_no_non_member_reaches_a_shadow_model(pipe, tmp_path):
    """LoRA and images of a shadow model, with the non-members' captions and embeddings spoilt, are the same bytes."""
    flags = dict(real_per_class=3, tune_epochs=1, gen_steps=4, gen_micro_batch=10, mia_models=4, token="class_mean")
    args = rf.Args(**{**rf.PRESETS["digits"], **flags})
    data, dist = datasets.load_dataset("digits"), distributed.Dist(0, 0, 1, torch.device("cpu"))
    real = rf.choose_real(args, data)
    v = rf.generated_sets(args, len(real))["shadows/0/images"]
    outside = [i for i in range(len(real)) if i not in v.rows]
    assert outside and v.rows
    hashes = []
    for spoilt in (False, True):
        run = runs.open_run("realfake", replace(args, output_dir=str(tmp_path / str(spoilt))), dist)
        captions = {key: f"a white {real.class_names[c]}" for key, c in zip(real.keys, real.labels, strict=True)}
        features = torch.randn(len(real), 64, generator=torch.Generator().manual_seed(0)).half()
        if spoilt:
            captions |= {real.keys[i]: "a red zero" for i in outside}
            features[outside] = float("inf")
        write_json(run.path("captions.json"), captions)
        save_tensors(run.path("embeddings.safetensors"), {"embeddings": features})
        guarded = Guarded(real, v.rows)
        rf.finetune(args, run, dist, pipe, guarded, data.class_names, {v.folder: v})
        rf.generate(args, run, dist, pipe, guarded, data.class_names, {v.folder: v})
        files = [run.path("lora", "shadow-0", "pytorch_lora_weights.safetensors"), *run.path(v.folder).glob("*/*")]
        assert len(files) == 1 + len(v.rows)
        hashes.append([f.read_bytes() for f in sorted(files)])
        run.close()
    assert hashes[0] == hashes[1]


# ---- the stages against plain lines over stock parts ------------------------------------------------------


@pytest.fixture
def stage(tmp_path):
    """stage(**flags) -> args, run, dist, real, class names: a run folder of the digits with captions and embeddings."""

    def make(**flags):
        args = rf.Args(**{**rf.PRESETS["digits"], "real_per_class": 2, "mia_models": 0, "ablations": (), **flags})
        args.output_dir = str(tmp_path / "run")
        data, dist = datasets.load_dataset(args.dataset, args.data_dir), distributed.Dist(0, 0, 1, torch.device("cpu"))
        real = rf.choose_real(args, data)
        run = runs.open_run("realfake", args, dist, ["gen_micro_batch"], later=rf.LATER)
        texts = {key: f"caption {i} of a digit" for i, key in enumerate(real.keys)}
        write_json(run.path("captions.json"), texts)
        features = torch.randn(len(real), 64, generator=torch.Generator().manual_seed(5)).half()
        save_tensors(run.path("embeddings.safetensors"), {"embeddings": features})
        return SimpleNamespace(
            args=args, run=run, dist=dist, real=real, names=data.class_names, features=features, data=data,
            texts=list(texts.values()), sets=rf.generated_sets(args, len(real)),
        )  # fmt: skip

    return make


def token_states(pipe, prompts, tokens):
    """Last hidden states of the text encoder with the tokens, if any, in the last slot."""
    ids = pipe.tokenizer(
        prompts, padding="max_length", truncation=True, max_length=pipe.tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    h = pipe.text_encoder(ids).last_hidden_state.clone()
    if tokens is not None:
        h[:, -1, :] = tokens.float()
    return h


def photos(tmp_path):
    """Photos that are no squares: a crop that is not where it should be shows."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for c, name in enumerate(("seven", "two")):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(4):
                noise = rng.normal(128, 90, (48 + 8 * i, 70 + 20 * c)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noise).save(tmp_path / "photos" / split / name / f"{i}.png")
    return dict(dataset="folder", data_dir=str(tmp_path / "photos"))


def plain_tuning(stock, s, rows, prompts, tokens, lam):
    """All steps, each of two matching batches of two, over all A and B of the stock pipeline's U-Net.

    rows: the real images, prompts and tokens (or None): of every real image. -> losses and matching terms, as logged
    """
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr
    from torchvision.transforms.v2 import functional as tv

    scheduler = DDPMScheduler.from_config(stock.scheduler.config)
    layers = {name: p for name, p in stock.unet.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in layers.items():
            start = torch.randn(p.shape, generator=distributed.generator(s.args.seed, "lora", name)) / 4
            p.copy_(start if "lora_A" in name else torch.zeros(p.shape))
    optimizer = torch.optim.AdamW(layers.values(), lr=3e-3, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    per_epoch, losses, matching = len(rows) // 4, [], []
    for step in range(min(s.args.tune_max_images // 4, 2 * per_epoch)):
        order = torch.randperm(len(rows), generator=distributed.generator(s.args.seed, "epoch", step // per_epoch))
        batch = [rows[j] for j in order[step % per_epoch * 4 :][:4]]
        g = distributed.generator(s.args.seed, "step", step)
        where, t = torch.rand(3, 4, generator=g), torch.randint(1000, (4,), generator=g)
        xi, eps = torch.randn(2, 4, 4, 8, 8, generator=g)
        x = []
        for i, (u, v, mirror) in zip(batch, where.T.tolist(), strict=True):
            if crops := s.args.tune_cached_crops:  # the middles of so many equal parts of the free pixels
                u = v = (math.floor(u * crops) + 0.5) / crops
            image = tv.resize(s.real[i], 32, tv.InterpolationMode.BILINEAR)
            image = tv.crop(image, int(u * (image.height - 31)), int(v * (image.width - 31)), 32, 32)
            x.append(tv.pil_to_tensor(tv.hflip(image) if s.args.flip and mirror < 0.5 else image) / 127.5 - 1)
        with torch.no_grad():
            posterior = stock.vae.encode(torch.stack(x)).latent_dist
            z = stock.vae.config.scaling_factor * (posterior.mean + posterior.std * xi)
            h = token_states(stock, [prompts[i] for i in batch], None if tokens is None else tokens[batch])
        r = stock.unet(scheduler.add_noise(z, eps, t), t, h).sample - eps
        snr = compute_snr(scheduler, t)
        w = torch.minimum(snr, torch.full_like(snr, 5.0)) / snr if s.args.dm_gamma else torch.ones(4)
        parts = [rf.matching_loss(r[k : k + 2], torch.zeros(2, 4, 8, 8), w[k : k + 2], lam * 8 / 2) for k in (0, 2)]
        loss = sum(total for total, _, _ in parts) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layers.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        matching.append(sum(lam * 8 / 2 * dm.item() for _, _, dm in parts) / 2)
    return losses, matching


def test_posteriors_are_kept_where_they_fit():
    """All views of square images, of others so many crops as asked for; in bytes: mean and log variance of a latent."""
    shape, args, seen = (4, 64, 64), rf.Args(**rf.PRESETS["cifar10"]), 1_280_000
    assert rf.kept_crops(args, 50_000, seen, shape, square=True) == 1  # 2 views x 2 x 16,384 numbers x 2 bytes: 6.6 GB
    assert rf.kept_crops(args, 62_000, seen, shape, square=True) == 0  # 8.1 GB
    assert rf.kept_crops(args, 50_000, 100_000, shape, square=True) == 1
    assert rf.kept_crops(args, 50_000, 99_999, shape, square=True) == 0, "more views than the tuning sees"
    args.flip = False
    assert rf.kept_crops(args, 122_000, seen, shape, square=True) == 1
    args.precision = "fp32"
    assert rf.kept_crops(args, 62_000, seen, shape, square=True) == 0
    args = rf.Args(**rf.PRESETS["imagenette"])
    assert rf.kept_crops(args, 12_894, seen, shape, square=False) == 0
    args.tune_cached_crops = 4
    assert rf.kept_crops(args, 12_894, seen, shape, square=False) == 4  # 6.8 GB
    args.tune_cached_crops = 5
    assert rf.kept_crops(args, 12_894, seen, shape, square=False) == 0


def test_one_square_photo_makes_no_square_folder(stage, tmp_path):
    where = photos(tmp_path)
    Image.effect_noise((60, 60), 90).save(tmp_path / "photos" / "train" / "seven" / "0.png")
    s = stage(**where, real_per_class=4, gen_resolution=32, tune_max_images=400, tune_epochs=99)
    pipe, jobs = load_pipeline(resolve("tiny", "generator"), s.dist.device, "fp32"), [s.sets["images"]]
    assert s.real.size(0)[0] == s.real.size(0)[1] and s.real.size(1)[0] != s.real.size(1)[1]
    _, crops = rf.tuning_posteriors(s.args, s.dist, pipe, s.real, jobs, jobs)
    assert crops == 0


def test_what_is_kept_does_not_hang_on_what_is_left(monkeypatch, stage, tmp_path):
    """A resume after the first adapter: what is left would fit, all that the run tunes does not."""
    flags = dict(tune_cached_crops=2, mia_models=2, gen_resolution=32, real_per_class=4, sd_batch=4, dm_batch=2)
    s = stage(**photos(tmp_path), **flags, tune_max_images=400, tune_epochs=99)
    pipe, (full, *shadows) = load_pipeline(resolve("tiny", "generator"), s.dist.device, "fp32"), s.sets.values()
    views = 2 * len(shadows[0].rows) * 2 * 4 * 8 * 8 * 4  # bytes of a shadow's
    for room, kept in ((views, 0), (10 * views, 2)):
        monkeypatch.setattr(rf, "POSTERIOR_BYTES", room)
        for left in ([full, *shadows], shadows, shadows[1:]):
            posteriors, crops = rf.tuning_posteriors(s.args, s.dist, pipe, s.real, [full, *shadows], left)
            rows = set().union(*(v.rows for v in left))
            assert crops == kept and len(posteriors.place) == kept * len(rows)
    _, crops = rf.tuning_posteriors(s.args, s.dist, pipe, s.real, [full, *shadows], [])
    assert crops == 2


@pytest.mark.parametrize(
    ("square", "crops", "passes"),
    [(True, 0, 5), (False, 2, 4), (False, 0, 40)],
    ids=["40 squares, no mirror", "8 photos x 2 crops x 2", "fresh"],
)
def test_the_vae_rests_once_posteriors_are_kept(monkeypatch, stage, tmp_path, square, crops, passes):
    """Eight views in a pass; without a cache one pass for each of 10 x 4 images that the tuning sees."""
    small = dict(real_per_class=4, sd_batch=4, dm_batch=2, sd_micro_batch=1, tune_max_images=40, gen_resolution=32)
    of = {} if square else photos(tmp_path) | dict(flip=True, tune_cached_crops=crops)
    s = stage(**small | of)
    pipe = load_pipeline(resolve("tiny", "generator"), s.dist.device, "fp32")
    seen, encode = [], pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: seen.append(len(x)) or encode(x))
    rf.finetune(s.args, s.run, s.dist, pipe, s.real, s.names, s.sets)
    assert seen == [1 if passes == 40 else 8] * passes


def test_posteriors_that_do_not_fit_are_told(monkeypatch, stage, tmp_path, capsys):
    monkeypatch.setattr(rf, "POSTERIOR_BYTES", 1000)
    s = stage(**photos(tmp_path), real_per_class=4, tune_cached_crops=2, gen_resolution=32)
    pipe, jobs = load_pipeline(resolve("tiny", "generator"), s.dist.device, "fp32"), [s.sets["images"]]
    _, crops = rf.tuning_posteriors(s.args, s.dist, pipe, s.real, jobs, jobs)
    assert crops == 0
    assert "--tune-cached-crops 2: posteriors of 8 images take more than 1e-06 GB" in capsys.readouterr().out


def halves(n, models):
    """Official code of the privacy split -> the members of each model"""
    np.random.seed(0)
    keep = np.random.uniform(0, 1, (models, n)).argsort(0) < models / 2
    return [[i for i in range(n) if keep[m, i]] for m in range(models)]


ABLATIONS = ("no-lora", "no-matching", "no-token", "class-mean", "no-prior", "no-caption")


@pytest.mark.parametrize(
    "flags",
    [
        dict(tune_max_images=12, seed=5),  # three steps, the last of which begins a new pass
        dict(ablations=ABLATIONS),
        dict(token="class_mean", mia_models=2, flip=False),
        dict(
            token="released", caption=False, dm_gamma=None
        ),  # the released code mixes tokens in its sampler, not in its tuning
        dict(lora=False, ablations=ABLATIONS, mia_models=2),
        dict(tune_cached_crops=3, ablations=ABLATIONS, tune_max_images=12),
    ],
    ids=["method", "ablations", "class-means-of-members", "released", "no-lora", "kept-crops"],
)
def test_tuning_equals_a_plain_loop_over_stock_parts(stage, tmp_path, flags):
    """Every adapter that a run makes: losses as logged, A and B after the updates."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig

    small = dict(real_per_class=4, sd_batch=4, dm_batch=2, sd_micro_batch=1, tune_max_images=4, gen_resolution=32)
    small |= dict(dm_lambda=0.5, sd_lr=3e-3, tune_epochs=2, flip=True)
    s = stage(**photos(tmp_path), **small | flags)
    pipe = load_pipeline(resolve("tiny", "generator"), s.dist.device, "fp32")
    rf.finetune(s.args, s.run, s.dist, pipe, s.real, s.names, s.sets)
    logged = metrics.read(s.run.dir)

    named = [f"photo of {s.names[c]}" for c in s.real.labels]
    told = [f"{name}, {text}" if s.args.caption else name for name, text in zip(named, s.texts, strict=True)]
    every, own = list(range(8)), s.features.float()
    meant = torch.stack([own[s.real.labels == c].mean(0) for c in s.real.labels])
    wanted = {"full": (every, told, meant if s.args.token == "class_mean" else own, 0.5)}
    if "ablations" in flags:
        wanted |= {"no-matching": (every, told, own, 0.0), "no-token": (every, told, None, 0.5)}
        wanted |= {"class-mean": (every, told, meant, 0.5), "no-caption": (every, named, own, 0.5)}
    for m, rows in enumerate(halves(8, 2) if s.args.mia_models else []):
        of_members = [own[[j for j in rows if s.real.labels[j] == c]].mean(0) for c in s.real.labels]
        wanted[f"shadow-{m}"] = rows, told, torch.stack(of_members), 0.5
    wanted = wanted if s.args.lora else {}
    files = {
        "full" if file.parent.name == "lora" else file.parent.name: file for file in s.run.path("lora").rglob("*.s*")
    }
    assert set(files) == set(wanted), "an ablation of the sampling alone shares the method's adapter"

    stock = StableDiffusionPipeline.from_pretrained(resolve("tiny", "generator"), safety_checker=None)
    for part in (stock.unet, stock.vae, stock.text_encoder):
        part.requires_grad_(False).eval()
    stock.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    layers = {name: p for name, p in stock.unet.named_parameters() if p.requires_grad}
    for adapter, (rows, prompts, tokens, lam) in wanted.items():
        losses, matching = plain_tuning(stock, s, rows, prompts, tokens, lam)
        ours = load_tensors(files[adapter])
        assert set(ours) == {f"unet.{name.replace('.default', '')}" for name in layers}
        for name, p in layers.items():
            # On average: Adam moves a number without a gradient by what rounding says.
            assert (ours[f"unet.{name.replace('.default', '')}"] - p.detach()).abs().mean() < 5e-6, (adapter, name)
        assert logged[f"finetune/{adapter}/loss"][len(losses)] == pytest.approx(np.mean(losses), rel=1e-4), adapter
        assert logged[f"finetune/{adapter}/matching"][len(losses)] == pytest.approx(np.mean(matching), rel=1e-4)


def test_sharing_a_matching_batch_changes_no_gradient():
    """The loss of a batch from shares of its images, each of which knows the others only by the sum."""
    pred, target, w = residuals()
    pred.requires_grad_()
    total, _, dm = rf.matching_loss(pred, target, w, 0.7)
    expected = torch.autograd.grad(total, pred)[0]
    r = pred - target
    summed = (w.view(-1, 1, 1, 1) * r).sum(0).detach()
    shares = [rf.matching_shares(r[u], w[u], summed, 8) for u in (slice(0, 3), slice(3, 4), slice(4, 8))]
    loss = sum(diffusion + 0.7 * moment for diffusion, moment in shares)
    close(torch.autograd.grad(loss, pred)[0], expected, 1e-6)
    assert loss.item() - 0.7 * dm.item() == pytest.approx(total.item(), rel=1e-5)


def random_adapter(pipe, name):
    """{key: tensor} of a LoRA of rank 4, another one for each name."""
    tensors = {}
    for layer_name, layer in pipe.unet.named_modules():
        if layer_name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            g = distributed.generator("adapter", name, layer_name)
            tensors[f"unet.{layer_name}.lora_A.weight"] = torch.randn(4, layer.in_features, generator=g) / 4
            tensors[f"unet.{layer_name}.lora_B.weight"] = torch.randn(layer.out_features, 4, generator=g) / 20
    return tensors


def plain_version(stock, s, i, version, prompt, token, prior):
    """One version of real image i by diffusers' own pipelines -> pixels"""
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

    negative = "distorted, unrealistic, blurry, out of frame, cropped, deformed"
    ids = stock.tokenizer([negative], padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        hidden = dict(prompt_embeds=token_states(stock, [prompt], None if token is None else token[None]))
        hidden["negative_prompt_embeds"] = stock.text_encoder(ids.input_ids).last_hidden_state
    g = torch.Generator().manual_seed(distributed.seed_of(s.args.gen_seed, version, s.real.keys[i]))
    if prior == "image":
        x = torch.from_numpy(np.asarray(s.real[i].resize((32, 32), Image.Resampling.BICUBIC)))
        hidden |= dict(image=x.permute(2, 0, 1)[None] / 127.5 - 1, strength=0.75)
    else:
        hidden |= dict(latents=torch.randn(2, 4, 8, 8, generator=g)[1:], height=32, width=32)
    kind = StableDiffusionImg2ImgPipeline if prior == "image" else StableDiffusionPipeline
    pipe = kind(**stock.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(**hidden, num_inference_steps=6, guidance_scale=2.0, generator=g, output_type="np").images[0]
    return (255 * drawn).round()


@pytest.mark.parametrize(
    "flags",
    [
        dict(ablations=ABLATIONS),
        dict(gen_prior="noise", caption=False, gen_seed=7),
        dict(token="class_mean", mia_models=2, gen_versions=1, real_per_class=3),
        dict(token="released", mia_models=2, real_per_class=3),
        dict(lora=False, ablations=("no-lora", "no-matching", "no-prior", "class-mean"), token="none"),
    ],
    ids=["ablations", "noise", "class-means-of-members", "released", "no-lora"],
)
def test_versions_equal_those_of_a_stock_pipeline(stage, tmp_path, flags):
    """Every set of a run, drawn by the stage from photos; then by diffusers with UniPC, adapter at 0.5, the token."""
    from diffusers import StableDiffusionPipeline, UniPCMultistepScheduler

    small = dict(gen_versions=2, gen_steps=6, gen_micro_batch=3, net_versions=(1,))
    s = stage(**photos(tmp_path), **small | flags)
    real, own, every = s.real, s.features.float(), list(range(len(s.real)))
    pipe = load_pipeline(resolve("tiny", "generator"), s.dist.device, "fp32")
    adapters = ["full", *(f for f in flags.get("ablations", ()) if f not in ("no-lora", "no-prior"))]
    adapters += [f"shadow-{m}" for m in range(s.args.mia_models)]
    for name in adapters if s.args.lora else ():
        place = ("lora", *([] if name == "full" else [name]), "pytorch_lora_weights.safetensors")
        save_tensors(s.run.path(*place), random_adapter(pipe, name))
    rf.generate(s.args, s.run, s.dist, pipe, real, s.names, s.sets)

    def token_of(mode, i, rows):
        if mode == "class_mean":
            return own[[j for j in rows if real.labels[j] == real.labels[i]]].mean(0)
        mixture = torch.stack([own[j] for j in rows], 1).view(len(rows), -1)  # official code, of a batch of all rows
        return {"image": own[i], "none": None, "released": mixture[rows.index(i)]}[mode]

    # {folder: (real images, versions, adapter, token, prior, with caption)}
    token, prior, told = s.args.token, s.args.gen_prior, s.args.caption
    wanted = {"images": (every, s.args.gen_versions, "full", token, prior, told)}
    for name in flags.get("ablations", ()):
        adapter = {"no-lora": None, "no-prior": "full"}.get(name, name)
        mode = {"no-token": "none", "class-mean": "class_mean"}.get(name, token)
        start = "noise" if name == "no-prior" else prior
        wanted[f"ablations/{name}"] = (every, 1, adapter, mode, start, told and name != "no-caption")
    for m, rows in enumerate(halves(len(real), 2) if s.args.mia_models else []):
        wanted[f"shadows/{m}/images"] = (rows, 1, f"shadow-{m}", token, prior, told)

    stock = StableDiffusionPipeline.from_pretrained(resolve("tiny", "generator"), safety_checker=None)
    stock.scheduler = UniPCMultistepScheduler.from_config(stock.scheduler.config, final_sigmas_type="sigma_min")
    for folder, (rows, versions, adapter, mode, start, caption) in wanted.items():
        if adapter and s.args.lora:
            stock.load_lora_weights(random_adapter(pipe, adapter), adapter_name=adapter)
            stock.unet.set_adapters([adapter], [0.5])
        expected, looked_at = [], rows[1::2] if folder == "images" else rows[1:2]
        for version in range(versions):
            for i in rows:
                c = int(real.labels[i])
                same = [j for j in rows if real.labels[j] == c]
                file = f"0{c}_{s.names[c]}/{version * len(same) + same.index(i)}.png"
                plain = f"{s.names[c]}, photo, best quality"
                prompt = f"photo of {s.names[c]}, {s.texts[i]}, best quality" if caption else plain
                seed = distributed.seed_of(s.args.gen_seed, version, real.keys[i])
                about = dict(label=c, class_name=s.names[c], version=version, source=real.keys[i])
                expected.append(dict(file_name=file, **about, prompt=prompt, seed=seed))
                if version == versions - 1 and i in looked_at:
                    drawn = plain_version(stock, s, i, version, prompt, token_of(mode, i, rows), start)
                    ours = np.asarray(Image.open(s.run.path(folder, file))).astype(int)
                    assert np.abs(ours - drawn).max() <= 1, (folder, file)
        written = [json.loads(line) for line in s.run.path(folder, "metadata.jsonl").read_text().splitlines()]
        assert written == expected
        assert {p.relative_to(s.run.path(folder)).as_posix() for p in s.run.path(folder).rglob("*.png")} == {
            row["file_name"] for row in expected
        }
        stock.unload_lora_weights()


def test_released_tokens_are_mixed_over_the_official_batches_of_the_set():
    """The official sampler's batches are 24 images of its list, one after the other."""
    features, rows = torch.randn(70, 16), list(range(5, 65))
    tokens = rf.VisualTokens(features, torch.zeros(70, dtype=torch.long), rows, "released", 1)
    batches = [rows[:24], rows[24:48], rows[48:]]
    mixed = torch.cat([torch.stack([features[i] for i in batch], 1).view(-1, 16) for batch in batches])
    assert torch.equal(tokens[rows], mixed) and torch.equal(tokens[[40, 6]], mixed[[35, 1]])


def test_images_are_stored_in_the_format_and_size_of_the_flags(stage, tmp_path):
    flags = dict(gen_versions=1, net_versions=(1,), gen_steps=2, gen_format="jpeg", gen_quality=75, gen_save_size=16)
    s = stage(**photos(tmp_path), **flags, lora=False)
    pipe = load_pipeline(resolve("tiny", "generator"), s.dist.device, "fp32")
    rf.generate(s.args, s.run, s.dist, pipe, s.real, s.names, s.sets)
    files = sorted(s.run.path("images").glob("*/*"))
    assert [f.name for f in files] == ["0.jpg", "1.jpg"] * 2
    Image.new("RGB", (16, 16)).save(tmp_path / "75.jpg", quality=75)
    for file in files:
        image = Image.open(file)
        assert image.size == (16, 16) and image.quantization == Image.open(tmp_path / "75.jpg").quantization


def test_captions_and_embeddings_stand_by_their_images_whatever_the_parts(stage, monkeypatch):
    from common.clip import load_clip

    s = stage()
    monkeypatch.setattr(captions, "PART", 7)
    monkeypatch.setattr(features, "PART", 7)  # the last of three parts is short
    rf.caption(s.args, s.run, s.dist, s.real)
    rf.embed(s.args, s.run, s.dist, s.real)
    written = json.loads(s.run.path("captions.json").read_text())
    alone = (captions_by(resolve("tiny", "captioner"), s.real.subset([i])) for i in range(20))
    assert list(written.items()) == list(zip(s.real.keys, sum(alone, []), strict=True))
    assert len(set(written.values())) > 10
    clip, ours = load_clip("tiny"), load_tensors(s.run.path("embeddings.safetensors"))["embeddings"]
    with torch.no_grad():
        expected = torch.cat([clip.model.encode_image(clip.preprocess(s.real[i])[None]) for i in range(20)])
    close(ours.float(), expected, 2e-3 * expected.abs().max().item())


def test_embeddings_are_those_of_open_clip_not_normalised(stage):
    from common.clip import load_clip

    s = stage()
    rf.embed(s.args, s.run, s.dist, s.real)
    clip = load_clip("tiny")
    with torch.no_grad():
        x = torch.stack([clip.preprocess(s.real[i]) for i in range(len(s.real))])
        expected = clip.model.encode_image(x)
    ours = load_tensors(s.run.path("embeddings.safetensors"))["embeddings"]
    assert ours.dtype == torch.float16 and (expected.norm(dim=1) - 1).abs().min() > 0.01
    assert ((ours.float() - expected).norm(dim=1) / expected.norm(dim=1)).max() < 2e-3


def plain_training(args, images, labels, n_classes, seed, per_epoch=None):
    """timm's transforms, loss, optimizer and scheduler over steps of two micro-batches of four -> state dict

    per_epoch: steps, default all whole batches; fewer are for a single epoch
    """
    import random

    import timm
    from timm.data import create_transform
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    random.seed(distributed.seed_of(seed, "net"))
    torch.manual_seed(distributed.seed_of(seed, "net"))
    net = timm.create_model("test_resnet", num_classes=n_classes).to(memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(net, opt="sgd", lr=0.02, weight_decay=0.05, momentum=0.9)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="multistep",
        num_epochs=args.net_epochs,
        decay_milestones=[4, 5],
        decay_rate=0.2,
        warmup_epochs=args.net_warmup,
        warmup_lr=1e-5,
    )
    stats = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    transform = create_transform(
        64, is_training=True, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), hflip=0.5 * args.flip, color_jitter=0.4,
        auto_augment=None, interpolation="random", re_prob=0.0, **stats,
    )  # fmt: skip
    running, n = [b for name, b in net.named_buffers() if "running" in name], len(images)
    for epoch in range(args.net_epochs):
        order = torch.randperm(n, generator=distributed.generator(seed, "order", epoch)).tolist()
        for step in range(per_epoch or n // 8):
            optimizer.zero_grad()
            before, after = [b.clone() for b in running], [torch.zeros_like(b) for b in running]
            for part in (0, 4):
                x, y = [], []
                for position in range(step * 8 + part, step * 8 + part + 4):
                    number = distributed.seed_of(seed, "augment", epoch * n + position)
                    random.seed(number), torch.manual_seed(number)
                    x.append(transform(images[order[position]])), y.append(int(labels[order[position]]))
                for b, old in zip(running, before, strict=True):
                    b.copy_(old)
                x = torch.stack(x).contiguous(memory_format=torch.channels_last)
                (LabelSmoothingCrossEntropy(0.1)(net(x), torch.tensor(y)) / 2).backward()
                after = [a + b / 2 for a, b in zip(after, running, strict=True)]
            for b, mean in zip(running, after, strict=True):
                b.copy_(mean)
            optimizer.step()
        scheduler.step(epoch + 1)
    return {name: t for name, t in net.state_dict().items() if not name.endswith("num_batches_tracked")}


RECIPE = dict(
    net_milestones=(4, 5), net_batch=8, net_micro_batch=4, net_size=64, net_augment="imagenet", flip=True,
    net_lr=0.02, net_wd=0.05,
)  # fmt: skip


def same_weights(file, expected):
    found = load_tensors(file)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-5), (file, name)


@pytest.mark.parametrize("flip", [True, False])
def test_training_equals_a_plain_loop_over_timm(stage, flip):
    """Six epochs of two steps, over warm-up and both milestones."""
    s = stage(**RECIPE | dict(flip=flip), net_epochs=6, net_warmup=1)
    folder, images = s.run.path("classifier", "runs", "x"), [s.real[i] for i in range(20)]
    rf.train_net(s.args, s.run, s.dist, folder, "train/x", [s.real], len(s.real), 3)
    same_weights(folder / "weights.safetensors", plain_training(s.args, images, s.real.labels, 10, 3))


def paint_sets(s):
    """Noise for the images of every set: files as stage 4 names them, no two of them alike."""
    rng = np.random.default_rng(0)
    for v in s.sets.values():
        for c, name in enumerate(class_folders(s.names)):
            folder = s.run.path(v.folder, name)
            folder.mkdir(parents=True)
            for j in range(v.versions * int((s.real.labels[v.rows] == c).sum())):
                noise = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
                Image.fromarray(noise).resize((32, 32)).save(folder / f"{j}.png")


def painted(s, folder, each):
    """The first so many images of each class -> images, labels, class by class"""
    images, labels = [], []
    for c, name in enumerate(class_folders(s.names)):
        for j in range(each[c]):
            images.append(Image.open(s.run.path(folder, name, f"{j}.png")).convert("RGB"))
            labels.append(c)
    return images, labels


@pytest.mark.parametrize("equal", [False, True])
def test_every_row_trains_on_the_images_that_its_name_says(stage, equal):
    """One epoch for each row and seed; then the plain loop over pictures that are opened one by one.

    equal: as many steps as for the real images, through a random part of the others.
    """
    seeds = (0,) if equal else (0, 1)
    flags = dict(gen_versions=3, net_versions=(1, 2), ablations=("no-prior", "no-lora"), clf_seeds=len(seeds))
    s = stage(**RECIPE, **flags, real_per_class=1, net_epochs=1, net_warmup=0, net_equal_updates=equal)
    paint_sets(s)
    rf.train(s.args, s.run, s.dist, s.real, s.sets)
    real = [s.real[i] for i in range(10)], list(s.real.labels)
    once, twice = painted(s, "images", [1] * 10), painted(s, "images", [2] * 10)
    wanted = {"real": real, "synthetic-1x": once, "synthetic-2x": twice}
    wanted["real+synthetic-2x"] = real[0] + twice[0], real[1] + twice[1]
    wanted |= {name: painted(s, f"ablations/{name}", [1] * 10) for name in ("no-prior", "no-lora")}
    folders = {p.name for p in s.run.path("classifier", "runs").iterdir()}
    assert folders == {f"{row}-seed{seed}" for row in wanted for seed in seeds}
    for row, (images, labels) in wanted.items():
        steps = 10 // 8 if equal else len(images) // 8
        for seed in seeds:
            folder = s.run.path("classifier", "runs", f"{row}-seed{seed}")
            same_weights(folder / "weights.safetensors", plain_training(s.args, images, labels, 10, seed, steps))
            about = json.loads((folder / "metrics.json").read_text())
            assert about == dict(images=len(images), updates=steps), row


@torch.no_grad()
def plain_logits(folder, images, n_classes):
    """Logits of a saved test_resnet under the evaluation view of torchvision's classes: 67 pixels, 64 in the centre"""
    import timm
    from torchvision import transforms as T

    bicubic = T.Resize(67, T.InterpolationMode.BICUBIC)
    stats = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    view = T.Compose([bicubic, T.CenterCrop(64), T.ToTensor(), stats])
    net = timm.create_model("test_resnet", num_classes=n_classes).eval()
    net.load_state_dict(load_tensors(folder / "weights.safetensors"), strict=False)
    return net(torch.stack([view(image) for image in images])).double()


def plain_lira(phi, keep):
    """phi, keep [M][N] -> LiRA's scores [M, N]: each model attacked with the others, equally many on each side, one
    deviation over all images for each side; sample by sample."""
    scores = np.zeros_like(phi)
    for target in range(len(phi)):
        sides = []
        for inside in (True, False):
            chosen = []
            for i in range(phi.shape[1]):
                shadows = [m for m in range(len(phi)) if m != target]
                n = min(sum(keep[m][i] for m in shadows), sum(not keep[m][i] for m in shadows))
                chosen.append(np.array([phi[m, i] for m in shadows if keep[m][i] == inside][:n]))
            means = np.array([values.mean() for values in chosen])
            pooled = np.concatenate([values - values.mean() for values in chosen]).std()
            sides.append(-np.log(pooled) - (phi[target] - means) ** 2 / (2 * pooled**2))
        scores[target] = sides[0] - sides[1]
    return scores


def plain_figures(score, member):
    """Pair by pair and threshold by threshold"""
    pairs = score[member][:, None] - score[~member][None]
    rates = [(0.0, 0.0)] + [((score >= t)[~member].mean(), (score >= t)[member].mean()) for t in score]
    figures = dict(auc=((pairs > 0) + 0.5 * (pairs == 0)).mean())
    figures["balanced_accuracy"] = max((hit + 1 - false) / 2 for false, hit in rates)
    return figures | {f"tpr_at_{at}": max(hit for false, hit in rates if false <= at) for at in (0.001, 0.01)}


def test_attack_equals_plain_lines_on_networks_of_the_members(stage):
    """Shadow networks by the plain loop, from their members and no others; then LiRA in numpy, number by number."""
    s = stage(**RECIPE, real_per_class=3, mia_models=6, net_epochs=1, net_warmup=0)
    paint_sets(s)
    rf.attack(s.args, s.run, s.dist, s.real, s.sets)
    images, labels, members = [s.real[i] for i in range(30)], s.real.labels, halves(30, 6)
    phi = {"synthetic": np.zeros((6, 30)), "real": np.zeros((6, 30))}
    for m, rows in enumerate(members):
        counts = np.bincount(labels[rows], minlength=10)
        sources = {"synthetic": painted(s, f"shadows/{m}/images", counts)}
        sources["real"] = [images[i] for i in rows], labels[rows]
        for kind, source in sources.items():
            folder = s.run.path("shadows", str(m), kind)
            same_weights(folder / "weights.safetensors", plain_training(s.args, *source, 10, m))
            p = plain_logits(folder, images, 10).softmax(1)[range(30), labels].numpy()
            phi[kind][m] = np.log(p / (1 - p))
    keep = np.array([[i in rows for i in range(30)] for rows in members])
    found = json.loads(s.run.path("attack.json").read_text())
    for kind, values in phi.items():
        for name, scores in (("lira", plain_lira(values, keep)), ("threshold", values)):
            figures = [plain_figures(scores[m], keep[m]) for m in range(6)]
            wanted = {key: np.mean([f[key] for f in figures]) for key in figures[0]}
            # Two images of nearly the same score may change places: 1 of 10 members of one of 6 targets.
            assert found[kind][name] == pytest.approx(wanted, abs=0.017), (kind, name)


def write_net(folder, images, seed):
    """A random network whose answers differ from image to image, as stage 5 saves it."""
    import timm

    torch.manual_seed(seed)
    net = timm.create_model("test_resnet", num_classes=10).eval()
    x = torch.stack([torch.from_numpy(np.array(image.resize((64, 64)))).permute(2, 0, 1) / 64 - 2 for image in images])
    with torch.no_grad():
        features = net.forward_head(net.forward_features(x), pre_logits=True)
        net.get_classifier().weight.copy_(torch.randn(10, features.shape[1]))
        net.get_classifier().bias.copy_(-net.get_classifier().weight @ features.mean(0))
    save_tensors(folder / "weights.safetensors", net.state_dict())
    write_json(folder / "metrics.json", dict(images=seed, updates=2 * seed))


def nette(tmp_path):
    """ImageNette's layout and two further test sets, one of them of three classes and a foreign one -> flags"""
    from timm.data import ImageNetInfo

    numbers, rng = datasets.IMAGENET_SUBSETS["imagenette"], np.random.default_rng(1)
    wnids = ImageNetInfo().label_names()
    roots = {f"photos/{split}": [wnids[i] for i in numbers] for split in ("train", "val")}
    roots |= {"v2": [str(i) for i in numbers], "r": [wnids[i] for i in (*numbers[2:5], 1)]}
    for root, folders in roots.items():
        for folder in folders:
            (tmp_path / root / folder).mkdir(parents=True)
            for i in range(4):
                noise = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((70, 90))
                noise.save(tmp_path / root / folder / f"{folder}_{i}.png")
    ood = tuple(f"{name}={tmp_path / name}" for name in ("v2", "r"))
    return dict(dataset="imagenette", data_dir=str(tmp_path / "photos"), ood=ood)


def test_evaluation_equals_plain_lines_for_every_row(stage, tmp_path):
    """Networks written by hand, no two alike; then their answers, class by class, and those of CLIP."""
    import timm
    from open_clip import IMAGENET_CLASSNAMES

    from common.clip import load_clip

    flags = dict(gen_versions=2, net_versions=(1, 2), ablations=("no-token",), clf_seeds=2, seed=5)
    s = stage(**RECIPE, **flags, **nette(tmp_path), net_epochs=1)
    paint_sets(s)
    s.real[0].save(s.run.path("images", class_folders(s.names)[0], "0.png"))  # the one near-copy among them
    test, known = s.data.test, {"test": list(range(10)), "v2": list(range(10)), "r": [2, 3, 4]}
    sets = {"test": test} | {
        name: ood_images(tmp_path / name, datasets.IMAGENET_SUBSETS["imagenette"])[0] for name in ("v2", "r")
    }
    pictures = {name: [images[i] for i in range(len(images))] for name, images in sets.items()}
    rows = ["real", "synthetic-1x", "synthetic-2x", "real+synthetic-2x", "no-token"]
    for n, row in enumerate(rows):
        for seed in (5, 6):
            write_net(s.run.path("classifier", "runs", f"{row}-seed{seed}"), pictures["test"], 10 * n + seed)
    rf.evaluate(s.args, s.run, s.dist, s.data, s.real, s.sets)

    result = json.loads(s.run.path("results.json").read_text())
    found, seen = result["metrics"] | result["baselines"], set()
    for n, row in enumerate(rows):
        for name, images in sets.items():
            per_seed = []
            for seed in (5, 6):
                logits = plain_logits(s.run.path("classifier", "runs", f"{row}-seed{seed}"), pictures[name], 10)
                answers = [max(known[name], key=lambda c: line[c]) for line in logits.tolist()]
                right = np.array(answers) == images.labels
                per_seed.append(100 * right.mean())
                if (row, name, seed) == ("synthetic-2x", "test", 5):
                    saved = dict(zip(s.names, (100 * right[test.labels == c].mean() for c in range(10)), strict=True))
            ours = found[row] if name == "test" else found[row][f"ood/{name}"]
            assert ours["per_seed"] == pytest.approx(per_seed), (row, name)
            assert ours["mean"] == pytest.approx(np.mean(per_seed))
            assert ours["std"] == pytest.approx(np.std(per_seed, ddof=1))
            seen.add(tuple(per_seed))
        assert found[row]["updates"] == 2 * (10 * n + 5)
    assert len(seen) > 10, "networks that answer alike would hide that one stands for another"
    assert found["saved_classifier"]["per_class"] == pytest.approx(saved)
    assert found["saved_classifier"]["top1"] == found["synthetic-2x"]["per_seed"][0]
    assert result["near_copies"] == {"images": dict(near=1, of=40), "test": dict(near=0, of=40)}

    net = timm.create_model(f"local-dir:{s.run.path('classifier')}", pretrained=True)
    weights = load_tensors(s.run.path("classifier", "runs", "synthetic-2x-seed5", "weights.safetensors"))
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in weights.items())

    clip = load_clip("tiny")
    names = [IMAGENET_CLASSNAMES[i] for i in datasets.IMAGENET_SUBSETS["imagenette"]]
    with torch.no_grad():
        texts = clip.model.encode_text(clip.tokenize([f"a photo of a {name}" for name in names]))
        views = clip.model.encode_image(torch.stack([clip.preprocess(image) for image in pictures["test"]]))
    alike = torch.nn.functional.cosine_similarity(views[:, None], texts[None], dim=-1)
    assert found["zero-shot"]["mean"] == pytest.approx(100 * (alike.argmax(1).numpy() == test.labels).mean())


def test_an_ablation_of_what_is_off_is_left_out():
    for name, flags in {
        "no-lora": dict(lora=False), "no-matching": dict(dm_lambda=0.0), "no-token": dict(token="none"),
        "class-mean": dict(token="class_mean"), "no-prior": dict(gen_prior="noise"), "no-caption": dict(caption=False),
    }.items():  # fmt: skip
        args = rf.Args(ablations=ABLATIONS, **flags)
        assert f"--ablations {name}" in rf.spare_ablations(args)
        assert {name} <= set(ABLATIONS) - set(args.ablations) <= {name, "no-matching"}
    args = rf.Args(ablations=ABLATIONS)
    assert rf.spare_ablations(args) == "" and args.ablations == ABLATIONS
    with pytest.raises(UserError, match="--ablations no-lora no-lora: each once"):
        rf.check_args(rf.Args(ablations=("no-lora", "no-lora")))
    rf.check_args(rf.Args(gen_prior="noise", i2i_strength=0.001))  # nothing reads the strength


def test_claims_are_judged_by_twice_the_standard_error():
    """Each claim alone: its better row 4 points above its worse one, with a standard error of 1, 2.1 and none."""
    better = {
        "latent prior beats a start from noise": "no-prior", "LoRA beats the stock generator": "no-lora",
        "caption and class beat the class alone": "no-caption", "visual token beats none": "no-token",
        "the matching term helps": "no-matching", "more versions are better": "synthetic-1x",
        "real + synthetic beats real": "real",
    }  # fmt: skip
    over = {"synthetic-1x": "synthetic-4x", "real": "real+synthetic-4x"}
    assert list(rf.ORDERINGS) == list(better)
    for claim, worse in better.items():
        row = over.get(worse, "synthetic-1x")
        for mean, std, said in (
            (54, 1.22, ("+4.0 ± 1.0", "shows")),
            (46, 1.22, ("-4.0 ± 1.0", "the reverse")),
            (54, 2.57, ("+4.0 ± 2.1", "within noise")),
        ):
            three = dict(std=std, per_seed=[0] * 3)
            table = rf.claimed({row: dict(mean=mean, **three), worse: dict(mean=50, **three)}, 4)
            assert [line for line in table if line[0] == claim] == [[claim, *said]]
            assert all(line[2] == "not run" for line in table if line[0] != claim)
        once = dict(std=0.0, per_seed=[0])
        table = rf.claimed({row: dict(mean=54, **once), worse: dict(mean=50, **once)}, 4)
        assert [claim, "+4.0", "within noise"] in table, "one seed shows nothing"
    equal = dict(std=0.0, per_seed=[50] * 3)  # seeds that coincide: a difference of one test image is none
    table = rf.claimed({"synthetic-1x": dict(mean=50.01, **equal), "no-lora": dict(mean=50.0, **equal)}, 4)
    assert ["LoRA beats the stock generator", "+0.0 ± 0.0", "within noise"] in table
    few = {
        "synthetic-1x": dict(mean=54, std=2.0, per_seed=[0] * 4),
        "no-lora": dict(mean=50, std=2.0, per_seed=[0] * 2),
    }
    assert ["LoRA beats the stock generator", "+4.0 ± 1.7", "shows"] in rf.claimed(few, 4), "each row's own seeds"
    same = {"synthetic-1x": dict(mean=54, std=0.0, per_seed=[54] * 3)}
    assert ["more versions are better", "", "not run"] in rf.claimed(same, 1)


def test_samples_show_the_first_image_of_each_class_and_what_was_made_of_it(stage, monkeypatch):
    s = stage(real_per_class=3, gen_versions=2, net_versions=(1,), ablations=("no-token",), mia_models=6)
    paint_sets(s)
    shown = {}
    keep = lambda file, cells, rows, names, size: shown.update(zip(rows, cells, strict=True))  # noqa: E731
    monkeypatch.setattr(rf.images, "samples_grid", keep)
    rf.samples(s.args, s.run, s.real, s.sets)
    first = [s.real.labels.tolist().index(c) for c in range(10)]
    wanted = {"real": [s.real[i] for i in first]}
    for row, folder, j in (
        ("images 0", "images", 0),
        ("images 1", "images", 3),
        ("no-token 0", "ablations/no-token", 0),
    ):
        files = [s.run.path(folder, name, f"{j}.png") for name in class_folders(s.names)]
        wanted[row] = [Image.open(file).convert("RGB") for file in files]
    assert {row: [cell().tobytes() for cell in cells] for row, cells in shown.items()} == {
        row: [image.tobytes() for image in images] for row, images in wanted.items()
    }


def test_what_is_replaced_are_training_images(stage):
    s = stage()
    assert set(s.real.keys) <= set(s.data.train.keys) and not set(s.real.keys) & set(s.data.test.keys)
    assert np.bincount(s.real.labels).tolist() == [2] * 10
    other = rf.choose_real(replace(s.args, seed=5), s.data)
    rows = datasets.few_shot(s.data.train, "digits", 2, 5, 10)
    assert set(other.keys) == {s.data.train.keys[i] for i in rows} != set(s.real.keys)


def test_stages_that_nobody_reads_are_not_run(launch, tmp_path):
    """Without captions and tokens neither captioner nor CLIP says a word: here the captioner does not even exist."""
    flags = ["--no-caption", "--token", "none", "--mia-models", 0, "--ablations", "no-lora"]
    flags = [*(f for f in SMALL if f not in ("--ablations", "no-token", "--mia-models", "6")), *flags]
    out = tmp_path / "run"
    launch("realfake.py", "--output-dir", out, *flags, "--stages", "caption", "embed", "--captioner", tmp_path / "none")
    assert not (out / "parts").exists() and not (out / "embeddings.safetensors").exists()


def test_flags_of_the_networks_may_not_change_once_the_attack_has_trained_some():
    order = list(rf.LATER)
    assert order.index("train") < order.index("attack") and "net_" in rf.LATER["train"].split()


def test_a_run_stage_by_stage(launch, tmp_path):
    """Each start looks at the models of its own stages only: the captioner is not one of the tuning."""
    flags = [*SMALL, "--output-dir", tmp_path / "run", "--tune-max-images", 8, "--mia-models", 0, "--ablations"]
    launch("realfake.py", *flags, "--stages", "caption", "embed")
    launch("realfake.py", *flags, "--stages", "finetune")
    assert (tmp_path / "run/lora/pytorch_lora_weights.safetensors").is_file()


def test_velocity_models_are_refused(tmp_path):
    import shutil

    shutil.copytree(resolve("tiny", "generator"), tmp_path / "v")
    file = tmp_path / "v/scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    args = rf.Args(**{**rf.PRESETS["digits"], "sd_model": str(tmp_path / "v")})
    with pytest.raises(UserError, match="--sd-model .*'v_prediction'.*epsilon"):
        rf.planned_models(args, rf.generated_sets(args, 20))


def test_a_larger_batch_does_not_multiply_the_work():
    args = rf.Args()
    assert rf.tuning_steps(args, 12_894) == (160_000, 1611)
    assert rf.tuning_steps(replace(args, sd_batch=64), 12_894) == (20_000, 201)
    assert rf.tuning_steps(replace(args, sd_batch=64), 1_281_167)[0] * 64 == 1_280_000
    assert rf.tuning_steps(replace(args, tune_epochs=2), 80) == (20, 10)


COMMON = dict(
    sd_rank=4, sd_lr=1e-4, sd_batch=8, dm_batch=8, dm_lambda=0.003, dm_gamma=5.0, tune_epochs=100, flip=True,
    gen_resolution=512, gen_steps=30, i2i_strength=0.75, gen_guidance=2.0, gen_lora_scale=0.5, gen_prior="image",
    gen_micro_batch=24, token="image", caption=True, lora=True, seed=42, precision="bf16", gen_versions=1,
    sd_model="stable-diffusion-v1-5/stable-diffusion-v1-5", token_clip="ViT-L-14-quickgelu/openai",
    captioner="Salesforce/blip2-opt-2.7b", net_lr=0.1, net_warmup=5, net_wd=5e-4, net_smoothing=0.1, net_batch=512,
    net_micro_batch=128, clf_seeds=3,
)  # fmt: skip
PHOTOS = dict(
    net_model="resnet50", net_stem="imagenet", net_augment="imagenet", net_size=224,
    gen_format="jpeg", gen_quality=75, gen_save_size=None,
)  # fmt: skip
NETTE = dict(net_epochs=200, net_milestones=(50, 100, 150), net_decay=0.2)
PRESETS = {
    "imagenette": dict(dataset="imagenette", **PHOTOS, **NETTE),
    "imagewoof": dict(dataset="imagewoof", **PHOTOS, **NETTE),
    "imagenet100": dict(dataset="imagenet100", **PHOTOS, **NETTE),
    "imagenet1k": dict(dataset="imagenet", **PHOTOS, net_epochs=300, net_milestones=(90, 180, 270), net_decay=0.1),
    "cifar10": dict(
        dataset="cifar10", **NETTE, net_model="resnet18", net_stem="cifar", net_augment="cifar", net_size=32,
        gen_save_size=32, gen_format="png",
    ),
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_method_pages(preset):
    args = rf.Args(**rf.PRESETS[preset])
    wanted = COMMON | PRESETS[preset]
    assert {name: getattr(args, name) for name in wanted} == wanted
    rf.check_args(args)


@pytest.mark.parametrize("flip", [True, False])
def test_cifar_augmentation_is_padding_and_a_mirror(flip):
    args = rf.Args(**rf.PRESETS["cifar10"] | dict(flip=flip))
    image = Image.effect_noise((32, 32), 90).convert("RGB")
    seen = {hash(rf.transforms(args, True)(image).numpy().tobytes()) for _ in range(300)}
    x = np.pad(np.asarray(image).transpose(2, 0, 1), ((0, 0), (4, 4), (4, 4)))
    crops = [x[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    allowed = {hash(np.ascontiguousarray(c).tobytes()) for crop in crops for c in (crop, crop[:, :, ::-1])}
    straight = {hash(np.ascontiguousarray(crop).tobytes()) for crop in crops}
    assert len(seen) > 60 and seen <= (allowed if flip else straight) and (seen <= straight) == (not flip)
    assert torch.equal(rf.transforms(args, False)(image), torch.from_numpy(np.asarray(image)).permute(2, 0, 1))


def test_cifar_stem_keeps_every_pixel():
    net = rf.make_net(rf.Args(**rf.PRESETS["cifar10"]), 10, 0)
    with torch.no_grad():
        assert net.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4), "strides of three stages alone"
    assert net.conv1.weight.shape == (64, 3, 3, 3) and net.conv1.bias is None
    assert net.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.1)
    assert all(block.bn2.weight.abs().max() == 0 for stage in (net.layer1, net.layer4) for block in stage)


# ---- the script, end to end on the tiny world ------------------------------------------------------------

SMALL = """--real-per-class 3 --tune-max-images 8 --gen-versions 2 --gen-steps 3 --gen-micro-batch 30
--ablations no-token
--net-versions 1 2 --clf-seeds 1 --net-epochs 2 --net-milestones 2 --net-size 32 --mia-models 6""".split()
RESULT_FILES = ("images/**/*.png", "ablations/**/*.png", "shadows/**/*.*", "lora/**/*.safetensors", "captions.json")
RESULT_FILES += ("embeddings.safetensors", "classifier/**/*.safetensors", "attack.json")


def run_small(launch, out, *flags, **kw):
    return launch("realfake.py", "--output-dir", out, *SMALL, *flags, **kw)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One finished small run, shared by the tests that only look at it."""
    from conftest import Launch

    out = tmp_path_factory.mktemp("small") / "run"
    done = run_small(Launch(out.parent, out.parent / "hub"), out)
    return out, done


def test_run_leaves_every_file_with_its_content(small):
    out, done = small
    for folder, count in (("images", 60), ("ablations/no-token", 30)):
        rows = [json.loads(line) for line in (out / folder / "metadata.jsonl").read_text().splitlines()]
        assert len(rows) == count == len(list((out / folder).glob("*/*.png")))
        assert len({(r["source"], r["version"]) for r in rows}) == len({r["seed"] for r in rows}) == count
        assert all(r["class_name"] in r["prompt"] and (out / folder / r["file_name"]).exists() for r in rows)
        assert all(int(r["file_name"][:2]) == r["label"] for r in rows)
    captions = json.loads((out / "captions.json").read_text())
    assert len(captions) == 30 and all(captions.values())
    shadows = [len(list((out / f"shadows/{m}/images").glob("*/*.png"))) for m in range(6)]
    assert sum(shadows) == 90, "each of the 30 real images is a member of three of six models"
    result = json.loads((out / "results.json").read_text())
    assert result["script"] == "realfake" and set(result["baselines"]) == {"zero-shot", "real"}
    rows = {"synthetic-1x", "synthetic-2x", "real+synthetic-2x", "no-token"}
    assert rows <= set(result["metrics"]) and result["images"]["images"] == 60
    assert set(result["metrics"]["membership"]) == {"synthetic", "real"}
    verdicts = {claim: verdict for claim, _, verdict in result["orderings"]}
    assert verdicts["LoRA beats the stock generator"] == "not run", "a row that was not asked for is not invented"
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") >= 2 and 'src="http' not in html
    assert "synthetic-2x" in done.stdout and Image.open(out / "attack.png").size[0] > 300
    assert not [p for pattern in ("*.pt", "*.pkl", "*.bin") for p in out.rglob(pattern)]


def test_adapter_loads_in_a_stock_pipeline(small):
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(resolve("tiny", "generator"), safety_checker=None)
    stock.load_lora_weights(small[0] / "lora", weight_name="pytorch_lora_weights.safetensors")
    loaded = [p for n, p in stock.unet.named_parameters() if "lora_B" in n]
    assert loaded and any(p.abs().max() > 0 for p in loaded)


def test_saved_classifier_loads_in_timm(small):
    import timm

    about = json.loads((small[0] / "classifier" / "classes.json").read_text())
    net = timm.create_model(f"local-dir:{small[0] / 'classifier'}", pretrained=True)
    weights = load_tensors(small[0] / "classifier/runs" / f"{about['row']}-seed{about['seed']}/weights.safetensors")
    state = net.state_dict()
    assert weights and all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def test_second_call_does_no_work(small, launch):
    out, _ = small
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".png", ".safetensors", ".json")}
    run_small(launch, out)
    assert not [p.name for p in before if p.stat().st_mtime_ns != before[p] and p.name != "args.json"]


def test_killed_run_resumes_to_the_same_bytes(small, launch, tmp_path, tree_hash):
    """Killed (-9) as soon as each of these files appears: in the middle of tuning, drawing and training."""
    import time

    out, killed = tmp_path / "killed", 0
    for sign in ("lora/**/*.safetensors", "ablations/**/*.png", "classifier/runs/**/weights.safetensors"):
        process = subprocess.Popen(
            launch.command("realfake.py", "--output-dir", out, *SMALL),
            env=launch.env(),
            cwd=launch.cwd,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not list(out.glob(sign)):
            time.sleep(0.05)
        killed += process.poll() is None
        process.kill()
        process.wait()
    assert killed == 3
    run_small(launch, out)
    for pattern in RESULT_FILES:
        assert tree_hash(out, pattern) == tree_hash(small[0], pattern), pattern


def test_two_processes_leave_the_same_bytes_as_one(small, launch, tmp_path, tree_hash):
    run_small(launch, tmp_path / "two", processes=2)
    for pattern in RESULT_FILES:
        assert tree_hash(tmp_path / "two", pattern) == tree_hash(small[0], pattern), pattern


@pytest.mark.slow
def test_two_processes_share_a_step_and_leave_the_same_bytes(launch, tmp_path, tree_hash):
    flags = ["--sd-batch", 16, "--net-micro-batch", 16, "--mia-models", 0]
    for processes in (1, 2):
        run_small(launch, tmp_path / str(processes), *flags, processes=processes)
    for pattern in ("images/**/*.png", "lora/**/*.safetensors", "classifier/**/*.safetensors"):
        assert tree_hash(tmp_path / "1", pattern) == tree_hash(tmp_path / "2", pattern), pattern


def test_ready_captions_other_test_sets_and_equal_updates_end_to_end(launch, tmp_path):
    """ImageNette's layout with noise for photos: what runs is the captions file, --ood and --net-equal-updates."""
    from timm.data import ImageNetInfo

    wnids = [ImageNetInfo().label_names()[i] for i in datasets.IMAGENET_SUBSETS["imagenette"]]
    captions = {}
    for c, wnid in enumerate(wnids):
        for split, count in (("train", 3), ("val", 1)):
            (tmp_path / "photos" / split / wnid).mkdir(parents=True)
            for i in range(count):
                noise = Image.effect_noise((40 + c, 36), 60)
                noise.save(tmp_path / "photos" / split / wnid / f"{wnid}_{i}.JPEG")
        captions[wnid] = {f"{wnid}_{i}.JPEG": f"caption {c} {i}" for i in range(3)}
    numbers = [str(i) for i in datasets.IMAGENET_SUBSETS["imagenette"]]
    foreign, picture = ImageNetInfo().label_names()[1], Image.effect_noise((36, 36), 60)
    for root, folders in (("v2", numbers), ("r", [wnids[0], foreign]), ("a", [wnids[9]])):
        for folder in folders:
            (tmp_path / root / folder).mkdir(parents=True)
            picture.save(tmp_path / root / folder / "a b.png")
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    flags = ["--dataset", "imagenette", "--data-dir", tmp_path / "photos", "--mia-models", 0, "--net-equal-updates"]
    flags += ["--captions-file", tmp_path / "captions.json"]
    flags += ["--ood", *(f"{name}={tmp_path / name}" for name in ("v2", "r", "a"))]
    done = run_small(launch, tmp_path / "run", *flags)
    rows = [json.loads(line) for line in (tmp_path / "run/images/metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 60 and "caption 3 2" in "".join(r["prompt"] for r in rows if r["label"] == 3)
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    trained = {k: v for k, v in {**result["metrics"], **result["baselines"]}.items() if "per_seed" in v}
    assert set(trained) == {"real", "synthetic-1x", "synthetic-2x", "real+synthetic-2x", "no-token"}
    assert {v["updates"] for v in trained.values()} == {2}, "one update in each of two epochs, with 30 images or 90"
    header = next(line for line in done.stdout.splitlines() if "training set" in line)
    assert re.split(r"\s{2,}", header.strip()) == ["training set", "test top-1", "v2", "r", "a", "images", "updates"]

    for v in trained.values():  # one picture everywhere: right once among ten, always where no other class is there
        assert [v[f"ood/{name}"]["mean"] for name in ("v2", "r", "a")] == pytest.approx([10, 100, 100])

    captions[wnids[2]].pop(f"{wnids[2]}_1.JPEG")
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    done = run_small(launch, tmp_path / "wrong", *flags, check=False)
    assert done.returncode == 2 and f"no caption for {wnids[2]}_1.JPEG" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_ood_folders_are_told_before_anything_runs(tmp_path):
    (tmp_path / "r" / "cats").mkdir(parents=True)
    for ood, words in (
        (f"r={tmp_path / 'r'}", "neither a WordNet id"),
        (f"r={tmp_path / 'nowhere'}", "no such folder"),
        ("nowhere", "NAME=DIR"),
        (f"test={tmp_path / 'r'}", "none of them test"),
    ):
        with pytest.raises(UserError, match=words):
            rf.check_args(rf.Args(dataset="imagenette", ood=(ood,)))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_caption_stage_with_a_blip2_folder_goes_on_after_a_kill(launch, tmp_path, processes):
    """Killed (-9) after its first part of 256 images: in the end the captions that are written without a break."""
    import time

    tiny_blip2(tmp_path / "blip2")
    out, flags = tmp_path / "run", ["--captioner", tmp_path / "blip2", "--real-per-class", 60, "--stages", "caption"]
    command = launch.command("realfake.py", "--output-dir", out, *flags)
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, env=launch.env(), cwd=launch.cwd, **silent)
    first = out / "parts" / "captions-00000.json"
    while process.poll() is None and not first.exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert first.exists() and not (out / "captions.json").exists(), "killed between two parts"
    written = first.stat().st_mtime_ns
    launch("realfake.py", "--output-dir", out, *flags, processes=processes)
    assert first.stat().st_mtime_ns == written, "a part that exists is not written again"

    args = rf.Args(**{**rf.PRESETS["digits"], "captioner": str(tmp_path / "blip2"), "real_per_class": 60})
    real = rf.choose_real(args, datasets.load_dataset("digits"))
    captions = captions_by(args.captioner, real)
    assert json.loads((out / "captions.json").read_text()) == dict(zip(real.keys, captions, strict=True))
    assert len(captions) == 600 and len(set(captions)) > 20


def test_broken_test_images_are_told_before_the_first_stage(launch, tmp_path):
    photos = tmp_path / "photos"
    for split in ("train", "test"):
        for c, name in enumerate(("seven", "two")):
            (photos / split / name).mkdir(parents=True)
            for i in range(4):
                file = photos / split / name / f"{i}.png"
                Image.effect_noise((40 + 9 * c, 36), 60).save(file) if split == "train" else file.write_bytes(b"no")
    flags = ["--dataset", "folder", "--data-dir", photos]
    flags += ["--real-per-class", 4, "--ablations", "no-lora", "--mia-models", 0, "--gen-versions", 1]
    flags += ["--net-versions", 1]
    done = run_small(launch, tmp_path / "run", *flags, check=False)
    assert done.returncode == 2 and "8 of 8 images" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("run/images")) and not list(tmp_path.glob("run/captions.json"))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--sd-batch", 12], "multiple of --dm-batch"),
        (["--net-versions", 9], "at most --gen-versions"),
        (["--mia-models", 3], "even number"),
        (["--ood", "r=/nowhere"], "needs ImageNet"),
        (["--stages", "train"], "has not been run"),
    ],
)
def test_wrong_flags_end_with_one_line(launch, tmp_path, flags, words):
    done = launch("realfake.py", "--output-dir", tmp_path / "run", *flags, check=False)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


# ---- full size: the real architectures with random weights ------------------------------------------------


def test_full_size_parameters_and_flops_are_those_of_the_method_page():
    """Stable Diffusion 1.5 and CLIP ViT-L/14 on `meta` tensors: nothing is computed, every shape is real."""
    import open_clip
    import timm
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    def tflop(function):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops() / 1e12

    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            sample_size=512,
            block_out_channels=[128, 256, 512, 512],
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
            latent_channels=4,
        )
        net = timm.create_model("resnet50")
    assert [round(count(m) / 1e6, 1) for m in (unet, vae)] == [859.5, 83.7]
    z, h, x = (torch.empty(s, device="meta") for s in ((1, 4, 64, 64), (1, 77, 768), (1, 3, 512, 512)))
    forward = tflop(lambda: unet(z, torch.empty(1, device="meta"), h))
    encode, decode = tflop(lambda: vae.encode(x)), tflop(lambda: vae.decode(z))
    assert forward == pytest.approx(0.803, rel=0.01)
    assert encode == pytest.approx(1.12, rel=0.01) and decode == pytest.approx(2.51, rel=0.01)
    steps = rf.kept_steps(rf.Args().i2i_strength, rf.Args().gen_steps)
    assert steps * 2 * forward + encode + decode == pytest.approx(39, rel=0.01), "TFLOP per generated image"
    assert tflop(lambda: net(torch.empty(1, 3, 224, 224, device="meta"))) == pytest.approx(0.0082, rel=0.01)

    unet.requires_grad_(False).add_adapter(lora_config(4, rf.UNET_TARGETS))
    lora = [p for p in unet.parameters() if p.requires_grad]
    assert sum(p.numel() for p in lora) == 797_184 and len(lora) == 256
    batch = [t.expand(8, *t.shape[1:]) for t in (z, h)]
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(unet(batch[0], torch.empty(8, device="meta"), batch[1]).sample.sum(), lora)
    step = counter.get_total_flops() / 1e12 + 8 * encode
    assert step == pytest.approx(22, rel=0.05), "TFLOP per tuning step of 8 images"

    model = open_clip.create_model("ViT-L-14-quickgelu", pretrained=None, device="meta")
    assert model.visual.output_dim == 768 == h.shape[-1], "the visual token fits into a text slot as it is"


def test_folders_of_ones_own_have_the_names_of_the_other_scripts():
    assert rf.prompt_names("folder", ["001.sea_lake", "n02124075", "cat"]) == ["sea lake", "Egyptian Mau", "cat"]
    assert rf.prompt_names("cars", ["Acura RL Sedan 2012"]) == ["2012 Acura RL Sedan"]


# ---- told at the start, held in memory ---------------------------------------------------------------------


def start_of(tmp_path, **flags):
    """What main has before it opens the run folder: flags, models, real images, sets."""
    args = rf.Args(**{**rf.PRESETS["digits"], "output_dir": str(tmp_path / "run"), **flags})
    rf.check_args(args)
    real = rf.choose_real(args, datasets.load_dataset(args.dataset, args.data_dir))
    sets = rf.generated_sets(args, len(real))
    return args, rf.planned_models(args, sets), real, sets


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(real_per_class=1), "--sd-batch 8: shadows/. has [0-7] of the 10 real images; choose it smaller"),
        (dict(real_per_class=1, lora=False, mia_models=10), None),
        (dict(net_model="vit_tiny_patch16_224"), "--net-model vit_tiny.* --net-size 32 .*height .32. doesn't match"),
        (dict(net_model="vgg11", net_size=16), "--net-model vgg11 --net-size 16"),
        (dict(net_micro_batch=1), "--net-micro-batch 1: .*BatchNorm needs two images or more in a pass"),
        (dict(net_micro_batch=1, net_size=64), None),
        (dict(net_model="vgg11", net_size=16, stages=("caption", "embed")), None),
    ],
)
def test_what_would_end_a_late_stage_is_told_at_the_start(tmp_path, flags, words):
    planned = start_of(tmp_path, **flags)
    if words is None:
        return rf.check_sets(*planned)
    with pytest.raises(UserError, match=words):
        rf.check_sets(*planned)


def test_a_clip_of_another_width_is_told_at_the_start(tmp_path):
    import shutil

    from transformers import CLIPTextConfig

    folder = tmp_path / "sd"
    shutil.copytree(resolve("tiny", "generator"), folder)
    args, found, real, sets = start_of(tmp_path)
    rf.check_sets(args, found, real, sets)
    file = folder / "text_encoder/config.json"
    config = json.loads(file.read_text())
    for width in (80, CLIPTextConfig().hidden_size):
        stored = (
            config | {"hidden_size": width} if width == 80 else {k: v for k, v in config.items() if "_size" not in k}
        )
        file.write_text(json.dumps(stored))
        words = f"--token-clip tiny: its embedding has 64 numbers, the generator's text states have {width}; choose"
        with pytest.raises(UserError, match=words):
            rf.check_sets(args, found | {"--sd-model": str(folder)}, real, sets)
    none = {name: replace(v, token="none") for name, v in sets.items()}
    rf.check_sets(args, found | {"--sd-model": str(folder)}, real, none)


def test_ready_captions_are_read_once_and_not_when_they_are_there(tmp_path, monkeypatch):
    flags = dict(real_per_class=2, mia_models=0, ablations=(), stages=("caption",), output_dir=str(tmp_path / "run"))
    args, _, real, _ = start_of(tmp_path, **flags)
    write_json(tmp_path / "ready.json", {key: f"number {i}" for i, key in enumerate(real.keys)})
    args.captions_file, read, stock = str(tmp_path / "ready.json"), [], captions.read_captions
    monkeypatch.setattr(captions, "read_captions", lambda *given: read.append(given) or stock(*given))
    rf.main(args)
    assert len(read) == 1
    written = json.loads((tmp_path / "run/captions.json").read_text())
    assert written == {key: f"number {i}" for i, key in enumerate(real.keys)}
    rf.main(args)
    rf.main(replace(args, output_dir=str(tmp_path / "other"), caption=False))
    assert len(read) == 1
    (tmp_path / "ready.json").write_text("[]")
    with pytest.raises(UserError, match="--captions-file"):
        rf.main(replace(args, output_dir=str(tmp_path / "third")))
    assert not (tmp_path / "third").exists(), "nothing is written by a command that cannot succeed"


def test_of_a_shadow_network_one_number_per_image_is_kept(stage):
    """phi of every image from its logits, of which no more than a micro-batch is held at a time."""
    s = stage(net_micro_batch=8)
    net, seen = rf.make_net(s.args, 10, 0).eval(), []

    def phi(z, labels):
        seen.append(len(z))
        return rf.membership_logit(z, labels)

    kept = rf.logits_of(s.args, net, s.real, s.dist.device, phi)
    assert seen == [8, 8, 4] and kept.shape == (20,) and kept.dtype == torch.float64
    p = rf.logits_of(s.args, net, s.real, s.dist.device).double().softmax(1)[torch.arange(20), s.real.labels]
    close(kept, (p / (1 - p)).log(), 1e-9)


def test_class_means_of_some_rows_are_plain_means():
    g = torch.Generator().manual_seed(1)
    features, labels = torch.randn(10_000, 6, generator=g).half(), torch.randint(3, (10_000,), generator=g)
    rows = torch.randperm(10_000, generator=g)[:9000].tolist()
    expected = [features[[i for i in rows if labels[i] == c]].double().mean(0) for c in range(3)]
    close(rf.class_means(features, labels, 4, rows)[:3], torch.stack(expected), 1e-5)
    assert rf.class_means(features, labels, 4, rows)[3].isnan().all()


# ---- bfloat16, the precision of every preset but the miniature's ----------------------------------------------


def test_a_bf16_run_from_end_to_end_is_near_float32(tmp_path):
    """All stages in mixed precision: rows, finite figures, pictures; the loss of the tuning is float32's to 2 %."""
    small = dict(
        **photos(tmp_path), real_per_class=None, gen_versions=1, net_versions=(1,), ablations=(), mia_models=0,
        clf_seeds=1, tune_epochs=3, gen_steps=4, gen_micro_batch=8, net_epochs=1, net_milestones=(1,), net_batch=8,
        net_micro_batch=8,
    )  # fmt: skip
    losses = {}
    for precision in ("fp32", "bf16"):
        args = rf.Args(**{**rf.PRESETS["digits"], **small, "precision": precision})
        args.output_dir, args.device = str(tmp_path / precision), "cpu"
        if precision == "fp32":
            args.stages = ("caption", "embed", "finetune")
        rf.main(args)
        losses[precision] = metrics.read(tmp_path / precision)["finetune/full/loss"]
    out = tmp_path / "bf16"
    assert losses["bf16"].keys() == losses["fp32"].keys() and losses["bf16"]
    for step, loss in losses["bf16"].items():
        assert loss == pytest.approx(losses["fp32"][step], rel=0.02) and loss != losses["fp32"][step]
    lora = load_tensors(out / "lora/pytorch_lora_weights.safetensors")
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in lora.values())
    assert any(t.abs().max() > 0 for name, t in lora.items() if "lora_B" in name)
    drawn = [np.asarray(Image.open(file)) for file in sorted((out / "images").glob("*/*.png"))]
    assert len(drawn) == 8 and all(x.shape == (32, 32, 3) and x.std() > 5 for x in drawn)
    rows = json.loads((out / "results.json").read_text())
    found = rows["metrics"] | rows["baselines"]
    assert set(found) >= {"real", "synthetic-1x", "real+synthetic-1x", "zero-shot"}
    assert all(0 <= row["mean"] <= 100 for name, row in found.items() if name != "saved_classifier")
