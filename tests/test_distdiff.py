"""DistDiff: values of the authors' code, invariants of the method, the script end to end on the tiny world."""

import json
import subprocess

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import distdiff as dd
from common import distributed
from common.datasets import load_dataset
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
    moved, info, trace = guide_case(g, case)
    i, period, rho, _, _, lam_g = setting(g, case)
    assert torch.equal(Toy(g).t[i : i + period], g[f"tg.{case}.timesteps"])
    for r, (x0, f, j) in enumerate(trace):
        close(f, g[f"tg.{case}.feat.{r}"])
        if lam_g:
            assert torch.equal(j, g[f"tg.{case}.j.{r}"])
        if f"tg.{case}.x0.{r}" in g.keys():
            close(x0, g[f"tg.{case}.x0.{r}"])
    assert len(trace) == period
    close(info["energy"], g[f"tg.{case}.score"])
    close(info["grad_e"], g[f"tg.{case}.grad_e"])
    close(info["grad_b"], g[f"tg.{case}.grad_b"])
    tol = 1e-5 * max(1, rho)  # the step rho * grad magnifies what processors differ by in the gradient
    close(info["e"], g[f"tg.{case}.e1"], tol)
    close(info["b"], g[f"tg.{case}.b1"], tol)
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


# ---- invariants ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    """The tiny generator, a guide with random weights, prototypes of random features, five latents of real digits."""
    flags = dict(gen_micro_batch=8, gen_steps=10, gen_step_from_end=4, real_per_class=1)
    args = dd.Args(**{**dd.PRESETS["digits"], **flags})
    pipe = dd.load_pipeline(args, torch.device("cpu"))
    data = load_dataset("digits")
    dd.seed_global(0)
    prompts = dd.prompts_of_classes(args, data.class_names)
    guide = dd.Net(args.guide, False, prompts).requires_grad_(False).eval()
    features, labels = torch.rand(60, 96), torch.arange(60) % 10
    found = dd.prototypes(features, labels, 10, 3)
    pixels = torch.stack([dd.v2.functional.pil_to_tensor(data.train[i]).float() / 127.5 - 1 for i in range(5)])
    with torch.no_grad():
        latents = list(pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor)
    return dict(args=args, pipe=pipe, guide=guide, found=found, prompts=prompts, latents=latents)


LABELS, SEEDS = [3, 1, 4, 1, 5], [11, 12, 13, 14, 15]


def sampler(world, **flags):
    args = dd.Args(**{**vars(world["args"]), **flags})
    return dd.Sampler(args, world["pipe"], world["guide"], world["found"], world["prompts"])


def draw(world, row, rows=slice(None), **flags):
    return sampler(world, **flags).draw(row, world["latents"][rows], LABELS[rows], SEEDS[rows])


def test_no_guidance_is_the_stock_img2img_pipeline(world):
    from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

    pipe, args = world["pipe"], world["args"]
    kinds = dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **kinds)
    stock = StableDiffusionImg2ImgPipeline(**{**pipe.components, "scheduler": scheduler}, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    text = dd.encode_prompts(pipe, {"", *world["prompts"]})
    out = stock(
        image=torch.stack(world["latents"]),
        prompt_embeds=torch.stack([text[world["prompts"][c]] for c in LABELS]),
        negative_prompt_embeds=torch.stack([text[""]] * 5),
        generator=[torch.Generator().manual_seed(s) for s in SEEDS],
        strength=args.gen_strength,
        num_inference_steps=args.gen_steps,
        guidance_scale=args.gen_guidance,
        output_type="pt",
    ).images
    ours = draw(world, "sd")
    assert (ours.float() - out * 255).abs().max() <= 1.0  # one of us rounds, and sums in another order


def test_radius_zero_is_the_plain_sampler_bit_for_bit(world):
    plain = draw(world, "sd")
    assert torch.equal(draw(world, "distdiff", gen_radius=0.0), plain)
    assert not torch.equal(draw(world, "distdiff"), plain), "guidance must matter, or the comparison shows nothing"


def test_rho_zero_needs_neither_guide_nor_prototypes(world):
    assert torch.equal(draw(world, "distdiff", gen_rho=0.0), draw(world, "rho0"))
    other = {**world, "found": dd.prototypes(torch.rand(60, 96), torch.arange(60) % 10, 10, 3)}
    assert torch.equal(draw(other, "rho0"), draw(world, "rho0"))
    assert not torch.equal(draw(other, "distdiff"), draw(world, "distdiff"))


def test_an_image_does_not_depend_on_its_neighbours(world):
    """Full micro-batch, a single image padded to it, another order: the same bits. (One by one: float noise.)"""
    for row in ("distdiff", "direct"):
        together = draw(world, row)
        assert torch.equal(draw(world, row, slice(2, 3))[0], together[2])
        assert torch.equal(draw(world, row, slice(None, None, -1)).flip(0), together)
    alone = draw(world, "distdiff", slice(2, 3), gen_micro_batch=1)[0]
    assert (alone.int() - draw(world, "distdiff")[2].int()).abs().max() <= 2


def test_checkpointing_gives_the_same_bits(world):
    parts = (world["pipe"].unet, world["pipe"].vae)
    assert all(part.is_gradient_checkpointing for part in parts), "it is on by default"
    again = draw(world, "distdiff")
    for part in parts:
        part.disable_gradient_checkpointing()
    plain = draw(world, "distdiff")
    for part in parts:
        part.enable_gradient_checkpointing()
    assert torch.equal(plain, again)


def test_energy_in_bf16_keeps_the_direction_of_the_gradient(world):
    """The gradient step's VAE in bfloat16, all else in float32; the pipeline's VAE stays float32."""
    found = {}
    for precision in ("fp32", "bf16"):
        s = sampler(world, precision=precision)
        z, e, b, nets = s.begin(world["latents"], LABELS, SEEDS)
        _, info = dd.transform_guidance(z, e, b, s.guided_at, 1.0, 0.2, s.score_with(nets))
        found[precision] = torch.cat([info["grad_e"], info["grad_b"]], 1).flatten(1)
        assert s.energy_vae.dtype == dict(fp32=torch.float32, bf16=torch.bfloat16)[precision]
    assert world["pipe"].vae.dtype == torch.float32
    cosine = F.cosine_similarity(found["fp32"], found["bf16"])
    assert cosine.min() > 0.99 and not torch.equal(found["fp32"], found["bf16"])


def test_slices_are_equal_and_never_too_large():
    seen = []

    def network(x):
        seen.append(len(x))
        return 2 * x

    x = torch.arange(32.0).view(32, 1)
    assert torch.equal(dd.in_slices(network, x, 512), 2 * x) and seen == [8] * 4
    assert 256 * 512**2 * max(seen) < 2**31
    seen.clear()
    dd.in_slices(network, x[:12], 512), dd.in_slices(network, x[:5], 4096)
    assert seen == [6, 6] + [1] * 5


def test_nothing_frozen_is_touched(world):
    parts = [world["pipe"].unet, world["pipe"].vae, world["pipe"].text_encoder, world["guide"]]
    before = [t.clone() for part in parts for t in part.state_dict().values()]
    draw(world, "distdiff")
    after = [t for part in parts for t in part.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None and not p.requires_grad for part in parts for p in part.parameters())


def test_checkerboard_of_guidance_flags_changes_the_image(world):
    """Each switch of the energy does something: none of them is read and forgotten."""
    plain = draw(world, "distdiff")
    for flag in ("gen_group_weight", "gen_class_weight"):
        assert not torch.equal(draw(world, "distdiff", **{flag: 0.0}), plain), flag
    changes = dict(
        gen_normalize=True, gen_guide_input="normalized", gen_period=1, gen_step_from_end=5, gen_guidance=2.0
    )
    for flag, value in changes.items():
        assert not torch.equal(draw(world, "distdiff", **{flag: value}), plain), flag


def test_energy_falls_along_a_small_gradient_step(world):
    s = sampler(world, gen_rho=1e-2, gen_radius=1e6)
    before, after, _, projected = torch.tensor(s.probe(world["latents"], LABELS, SEEDS))
    assert (after < before).all() and torch.allclose(after, projected)


def test_projection_bounds_the_step_and_is_idempotent():
    z, v = torch.randn(2, 2, 4, 8, 8).unbind(0)
    out = dd.project(v, z, 0.2)
    assert ((out - z).abs() <= 0.2 + 1e-6).all() and torch.equal(dd.project(out, z, 0.2), out)
    inside = z + 0.1 * torch.rand_like(z)
    assert torch.equal(dd.project(inside, z, 0.2), inside)


def test_prototype_invariants():
    features, labels = torch.rand(40, 8), torch.arange(40) % 4
    found = dd.prototypes(features, labels, 4, 3)
    for name in ("class_unit", "group_unit"):
        assert torch.allclose(found[name].norm(dim=-1), torch.ones(()))
    for c in range(4):
        sizes = torch.bincount(found["assign"][labels == c], minlength=3).float()
        close((sizes[:, None] * found["group_mean"][c]).sum(0) / sizes.sum(), found["class_mean"][c], 1e-6)
    scaled = dd.prototypes(features * (0.1 + torch.rand(40, 1)), labels, 4, 3)
    close(scaled["class_mean"], found["class_mean"], 1e-6)
    order = torch.randperm(40)
    shuffled = dd.prototypes(features[order], labels[order], 4, 3)
    for c in range(4):  # groups may change their numbers
        distance = torch.cdist(shuffled["group_unit"][c], found["group_unit"][c])
        assert distance.min(0).values.max() < 1e-5


def test_class_with_fewer_images_than_groups_repeats_its_last():
    found = dd.prototypes(torch.rand(3, 8), torch.tensor([0, 0, 1]), 2, 4)
    assert torch.equal(found["group_unit"][1], found["class_unit"][1].expand(4, -1))
    assert found["group_unit"].isfinite().all()


def test_one_group_doubles_the_class_energy():
    f, p = torch.rand(5, 8), F.normalize(torch.rand(5, 8), dim=1)
    close(dd.energy(f, p, p[:, None], 1, 1)[0], 2 * dd.energy(f, p, p[:, None], 1, 0)[0])
    q = F.normalize(torch.rand(5, 3, 8), dim=2)
    by_cosine = F.cosine_similarity(f[:, None], q, dim=2).argmax(1)
    assert torch.equal(dd.energy(f, p, q, 1, 1)[1], by_cosine)


def test_time_steps_of_the_paper():
    t = dd.ddim_schedule(50, dd.alphas_cumprod())[0].tolist()
    assert t == list(range(981, 0, -20))
    assert t[dd.start_index(0.5, 50)] == 481 and t[50 - 20 : 50 - 20 + 2] == [381, 361]
    assert t[dd.start_index(0.2, 50)] == t[50 - 10] == 181  # PathMNIST: the first step is the guided one


def test_guidance_that_would_never_happen_is_refused():
    for flags in (dict(gen_step_from_end=26), dict(gen_step_from_end=1, gen_period=2), dict(gen_strength=0.2)):
        with pytest.raises(UserError, match="gen-step-from-end"):
            dd.check_ranges(dd.Args(**flags))
    dd.check_ranges(dd.Args())
    for preset in dd.PRESETS.values():
        dd.check_ranges(dd.Args(**preset))


def test_places_of_the_copies_are_unique_and_nested():
    real = FakeImages([0, 1, 1, 0, 1], list("abcde"))
    place = dd.image_places(real)
    for k in (1, 2, 5):
        names = {(real.labels[i], place(i, j)) for i in range(5) for j in range(k)}
        assert names == {(0, n) for n in range(2 * k)} | {(1, n) for n in range(3 * k)}


class FakeImages:
    def __init__(self, labels, keys):
        self.labels, self.keys = labels, keys


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (640, 480), (32, 32)])
def test_storing_small_images_leaves_the_training_bits(size):
    """Resize is the first, deterministic step of the training transform: doing it before storing changes nothing."""
    image = Image.effect_noise(size, 80).convert("RGB")
    pixels = dd.v2.functional.pil_to_tensor(image)
    small, large = dd.stored(pixels, 36), dd.stored(pixels, None)

    class One(FakeImages):
        def __getitem__(self, i):
            return self.keys[i]

        def __len__(self):
            return len(self.keys)

    a, b = (dd.Resized(One([0], [picture]), 36)[0] for picture in (small, large))
    assert a.tobytes() == b.tobytes()


def test_crop_of_a_rectangle_stays_inside():
    for w, h in ((100, 70), (70, 100), (64, 64)):
        (sw, sh), (x, y) = dd.crop_offset(w, h, 64, torch.Generator().manual_seed(0))
        assert min(sw, sh) == 64 and 0 <= x <= sw - 64 and 0 <= y <= sh - 64


def test_resized_sides_are_those_of_torchvision():
    from torchvision.transforms.functional import _compute_resized_output_size

    g = torch.Generator().manual_seed(0)
    for w in range(1, 130):
        for h in range(1, 130):
            (sw, sh), _ = dd.crop_offset(w, h, 512, g)
            assert [sh, sw] == _compute_resized_output_size((h, w), [512])


def test_guide_has_a_rate_of_its_own(monkeypatch):
    """Official: 0.1 from scratch in every preset, whatever the classifier's is."""
    for name, preset in dd.PRESETS.items():
        assert dd.Args(**preset).guide_lr == 0.1, name
    assert dd.Args(**dd.PRESETS["cars"]).sgd_lr == 0.01 and dd.Args(**dd.PRESETS["pathmnist"]).sgd_lr == 1e-3
    from contextlib import nullcontext
    from types import SimpleNamespace as Some

    seen = []
    monkeypatch.setattr(dd, "fit", lambda args, run, dist, folder, spec, *_: seen.append(spec))
    monkeypatch.setattr(dd, "scored_splits", lambda *_: {})
    monkeypatch.setattr(dd, "Resized", lambda *_: None)
    monkeypatch.setattr(dd.json, "loads", lambda _: dict(test=0, val=0))
    file = Some(read_text=lambda: "")
    run = Some(timed=lambda *_, **__: nullcontext(), path=lambda *_: file, done=lambda *_, **__: None)
    dist = distributed.Dist(0, 0, 1, "cpu")
    dd.train_guide(dd.Args(**dd.PRESETS["cars"], guide_lr=0.07), run, dist, [], None, None, [])
    assert seen == [("resnet50", False, 100, 0.07)]


def test_clip_sees_the_normalisation_of_the_authors(tmp_path):
    net = dd.Net("clip:tiny", False, ["a", "b"])
    assert (net.mean, net.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    net.save(tmp_path, dict(prompts=["a", "b"]))
    stored = json.loads((tmp_path / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert stored["mean"] == list(net.mean) and stored["std"] == list(net.std)


@pytest.mark.parametrize(
    "flags",
    [dict(gen_radius=-0.1), dict(gen_rho=float("nan")), dict(gen_rho=float("inf")), dict(sgd_lr=0.0), dict(groups=0)]
    + [dict(energy_probe=-1), dict(real_per_class=0), dict(gen_strength=1.5), dict(guide_lr=-1.0)],
    ids=str,
)
def test_numbers_outside_their_range_are_refused(flags):
    with pytest.raises(UserError, match="must be"):
        dd.check_ranges(dd.Args(**flags))


def test_models_of_a_run_are_looked_through_before_the_first_stage(tmp_path):
    import shutil

    from common.models import TINY_WEIGHTS

    digits = dd.PRESETS["digits"]
    assert set(dd.planned_models(dd.Args(**digits))) == {"--sd-model", "--guide", "--classifier", "--zeroshot-clip"}
    for field, value in (("guide", "clip:/nowhere"), ("classifier", "resnet5o"), ("zeroshot_clip", "/nowhere")):
        with pytest.raises(UserError, match="^--" + field.replace("_", "-")):
            dd.planned_models(dd.Args(**{**digits, field: value}))
    shutil.copytree(TINY_WEIGHTS / "sd", tmp_path / "sd")
    for file, key, value in (
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
        ("model_index.json", "_class_name", "StableDiffusionXLPipeline"),
    ):
        config = json.loads((tmp_path / "sd" / file).read_text())
        (tmp_path / "sd" / file).write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match="^--sd-model.*" + value):
            dd.planned_models(dd.Args(**{**digits, "sd_model": str(tmp_path / "sd")}))


def test_prompts_of_the_data_sets():
    cases = {
        ("caltech101", "wild_cat"): "a photo of a wild cat.",
        ("cars", "AM General Hummer SUV 2000"): "a photo of a 2000 AM General Hummer SUV.",
        ("dtd", "polka-dotted"): "polka-dotted texture.",
        ("pets", "Abyssinian"): "A photo of a pet Abyssinian.",
    }
    for (name, label), prompt in cases.items():
        assert dd.prompts_of_classes(dd.Args(dataset=name), [label]) == [prompt]
    assert dd.prompts_of_classes(dd.Args(dataset="pathmnist"), ["x"] * 9)[5] == (
        "a colon pathological image of smooth muscle."
    )
    assert len(dd.prompts_of_classes(dd.Args(dataset="imagenette"), ["x"] * 10)) == 10
    assert dd.prompts_of_classes(dd.Args(dataset="cars", gen_prompt="a photo of a {} car."), ["B C 2000"]) == [
        "a photo of a 2000 B C car."
    ]


@pytest.mark.parametrize("extra", dd.get_args(dd.Transform))
def test_transforms_change_what_they_should(extra):
    args = dd.Args(clf_resize=36, clf_size=32, clf_flip=False)
    images = [Image.effect_noise((36, 36), 80).convert("RGB") for _ in range(20)]

    def seen(name):
        transform, out = dd.TrainTransform(args, name, dd.IMAGENET_MEAN, dd.IMAGENET_STD), []
        for i, image in enumerate(images):
            dd.seed_global(i)
            out.append(transform(image, 1.0))
        return torch.stack(out)

    plain, ours = seen("none"), seen(extra)
    assert ours.shape == (20, 3, 32, 32)
    changed = (ours != plain).flatten(1).any(1).float().mean().item()
    expected = {"none": 0, "mixup": 0, "cutmix": 0, "cutout": 1, "erasing": 0.5, "gridmask": 0.8}
    if extra in expected:  # the last two of the batch, mixed later
        assert abs(changed - expected[extra]) < 0.35 * (expected[extra] not in (0, 1)) + 1e-9
    else:
        assert changed > 0.5
    if extra == "cutout":
        assert ((ours == 0).all(1).float().mean((1, 2)) - 0.25).abs().max() < 0.03


def test_cutmix_labels_follow_the_area():
    x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16)
    y = torch.eye(8)
    mixed_x, mixed_y = dd.cutmix_rounds(x, y, torch.Generator().manual_seed(1))
    assert torch.allclose(mixed_y.sum(1), torch.ones(8)) and not torch.equal(mixed_y, y)
    untouched = (mixed_x == x).flatten(1).all(1)
    assert torch.equal(mixed_y[untouched], y[untouched]) and 0 < untouched.sum() < 8
    once = torch.tensor([len(row.unique()) for row in mixed_x]) <= 2
    for i in once.nonzero().flatten().tolist():  # one box: the share of a label is the share of its pixels
        for c in range(8):
            pixels = (mixed_x[i, 0] == c).float().mean()
            assert mixed_y[i, c] == pytest.approx(pixels.item(), abs=0.13)


def test_order_of_the_training_list_visits_every_entry_once_per_pass():
    order = dd.Order(7, (3,))
    first = [order[p] for p in range(21)]
    assert all(sorted(first[i : i + 7]) == list(range(7)) for i in (0, 7, 14)) and first[:7] != first[7:14]


def test_networks_and_their_features():
    net = dd.Net("test_resnet", False, ["a"] * 4).eval()
    x = torch.randn(2, 3, 32, 32)
    f = net.features(x)
    assert torch.equal(net.net.get_classifier()(f), net(x)) and (f >= 0).all()
    clip = dd.Net("clip:tiny", False, ["a photo of a seven", "a photo of a one"]).eval()
    assert clip(x).shape == (2, 2) and clip.features(x).shape[0] == 2
    assert torch.allclose(clip.head.weight.norm(dim=1), torch.ones(2), atol=1e-5) and not clip.head.bias.any()
    with pytest.raises(UserError, match="did you mean"):
        dd.Net("resnet5o", False, ["a"])


@pytest.mark.parametrize("name", ["test_resnet", "clip:tiny"])
def test_a_saved_classifier_answers_as_before(name, tmp_path):
    prompts = ["a photo of a seven", "a photo of a one"]
    net = dd.Net(name, False, prompts).eval()
    if net.clip:
        nn.init.normal_(net.head.bias)
    net.save(tmp_path, dict(prompts=prompts))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(dd.Net.load(tmp_path).eval()(x), net(x))


def test_data_sets_that_need_more_say_so(tmp_path):
    try:
        import medmnist  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install medmnist"):
            dd.load_real(dd.Args(dataset="pathmnist", data_dir=str(tmp_path)))
    with pytest.raises(UserError, match="digitz"):
        dd.load_real(dd.Args(dataset="digitz"))


# ---- the script, end to end on the tiny world ------------------------------------------------------------

SMALL = """--real-per-class 1 --gen-copies 2 --clf-copies 1 2 --gen-steps 6 --gen-step-from-end 3 --gen-micro-batch 8
--guide-epochs 2 --clf-epochs 2 --clf-evals 1 --clf-seeds 1 --energy-probe 8
--rows zero-shot real real-repeated mixup cutmix sd rho0 direct distdiff""".split()
FILES = ("images/**/*.png", "sd/**/*.png", "rho0/**/*.png", "direct/**/*.png", "*.safetensors", "guide/*.safetensors")
FILES += ("classifier/**/*.safetensors",)


def run_small(launch, out, *flags, **kw):
    return launch("distdiff.py", "--output-dir", out, *SMALL, *flags, **kw)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One finished small run, shared by the tests that only look at it."""
    from conftest import Launch

    out = tmp_path_factory.mktemp("small") / "run"
    done = run_small(Launch(out.parent, out.parent / "hub"), out)
    return out, done


def test_run_leaves_every_file_with_its_content(small):
    out, done = small
    names = sorted(p.name for p in (out / "images").iterdir() if p.is_dir())
    assert names == [f"{i:02d}_{n}" for i, n in enumerate("zero one two three four five six seven eight nine".split())]
    for folder in dd.GENERATED.values():
        assert len(list((out / folder).glob("*/*.png"))) == 20
        rows = [json.loads(line) for line in (out / folder / "metadata.jsonl").read_text().splitlines()]
        assert len(rows) == len({r["seed"] for r in rows}) == len({r["file_name"] for r in rows}) == 20
        assert all((out / folder / r["file_name"]).exists() and r["class_name"] in r["prompt"] for r in rows)
    real = json.loads((out / "real.json").read_text())
    assert len(real["real"]) == 10 and len(real["validation"]) == 200
    result = json.loads((out / "results.json").read_text())
    assert result["script"] == "distdiff" and result["preset"] == "digits" and result["seed"] == 0
    assert {"distdiff@1", "distdiff@2", "direct@2", "saved_classifier", "guide"} <= set(result["metrics"])
    assert {"zero-shot", "real", "real-repeated", "mixup", "cutmix", "sd@1", "rho0@2"} <= set(result["baselines"])
    rows = {**result["metrics"], **result["baselines"]}
    updates = {name: rows[name]["updates"] for name in ("real-repeated", "sd@1", "sd@2", "distdiff@1", "distdiff@2")}
    assert len(set(updates.values())) == 1, "every row but `real` gets the same number of updates"
    assert [rows[f"sd@{k}"]["images"] for k in (1, 2)] == [20, 30]
    assert result["metrics"]["energy_fell_percent"].keys() == {"free", "projected"}
    assert set(result["seconds"]) >= {"guide", "prototypes", "encode", "expand", "train", "evaluate"}
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 2 and 'src="http' not in html and 'href="http' not in html
    assert Image.open(out / "samples.png").size[0] > 300 and "real + DistDiff" in done.stdout
    assert not list(out.rglob("*.pt")) and not list(out.rglob("*.pkl")) and not list(out.rglob("*.bin"))


def test_second_call_does_no_work_and_other_flags_are_refused(small, launch):
    out, _ = small
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".png", ".safetensors", ".json")}
    run_small(launch, out)
    assert not [p.name for p in before if before[p] != p.stat().st_mtime_ns and p.name != "args.json"]
    done = run_small(launch, out, "--gen-rho", "3", check=False)
    assert done.returncode == 2 and "--gen-rho" in done.stderr and "Traceback" not in done.stderr
    assert not [p.name for p in before if before[p] != p.stat().st_mtime_ns and p.name != "args.json"]


def test_saved_classifier_loads_in_stock_timm(small):
    import timm

    out, _ = small
    about = json.loads((out / "classifier" / "classes.json").read_text())
    assert (about["row"], about["copies"]) == ("distdiff", 2)
    recorded = json.loads((out / "classifier/runs/distdiff-k2-seed0/metrics.json").read_text())["test"]
    net = timm.create_model(f"local-dir:{out / 'classifier'}", pretrained=True).eval()
    test = load_dataset("digits").test
    split = dd.Centre(dd.Resized(test, 36), 32)
    x = dd.normalised(torch.stack([split[i] for i in range(len(split))]), dd.IMAGENET_MEAN, dd.IMAGENET_STD)
    with torch.no_grad():
        accuracy = dd.top1(net(x), torch.tensor(test.labels))
    assert accuracy == pytest.approx(recorded, abs=0.13)  # one image of 797


def test_two_processes_leave_the_same_bytes_as_one(small, launch, tmp_path, tree_hash):
    out, _ = small
    run_small(launch, tmp_path / "two", processes=2)
    for pattern in FILES:
        assert tree_hash(tmp_path / "two", pattern) == tree_hash(out, pattern), pattern


def test_killed_run_resumes_to_the_same_bytes(small, launch, tmp_path, tree_hash):
    """Killed (-9) when the first images are there, and again when the first classifier is: then finished."""
    out, _ = small
    folder = tmp_path / "killed"
    for sign in ("images/*/*.png", "classifier/runs/*/weights.safetensors"):
        command = launch.command("distdiff.py", "--output-dir", folder, *SMALL)
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen(command, env=launch.env(), cwd=launch.cwd, **quiet)
        while process.poll() is None and not list(folder.glob(sign)):
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                pass
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.wait()
        assert not (folder / "results.json").exists()
    run_small(launch, folder)
    for pattern in FILES:
        assert tree_hash(folder, pattern) == tree_hash(out, pattern), pattern


def test_own_photos_and_more_processes_than_images(launch, tmp_path):
    """Rectangular photos of two classes, one image each, --gen-save-size: the folder data set goes all the way."""
    for split in ("train", "test"):
        for name in ("cat", "big_dog"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            Image.effect_noise((60, 40), 80).convert("RGB").save(tmp_path / "photos" / split / name / "1.jpg")
    flags = ["--dataset", "folder", "--data-dir", tmp_path / "photos", "--val-fraction", 0, "--gen-save-size", 36]
    flags += ["--rows", "real", "distdiff", "--gen-copies", 1, "--clf-copies", 1]
    run_small(launch, tmp_path / "run", *flags, processes=3)
    files = sorted((tmp_path / "run" / "images").glob("*/*.png"))
    assert [f.parent.name for f in files] == ["00_big_dog", "01_cat"] and Image.open(files[0]).size == (36, 36)
    rows = (tmp_path / "run" / "images" / "metadata.jsonl").read_text()
    assert "a photo of a big dog." in rows


# ---- full size: the real architecture, nothing computed -----------------------------------------------------


def tflop_on_meta(function):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e12


def test_full_size_flops_are_those_of_the_documentation():
    """Stable Diffusion 1.4 at 512 pixels on `meta` tensors: what a plain and a guided image cost."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    sides = ([128, 256, 512, 512], ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4)
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        kinds = dict(zip(("block_out_channels", "down_block_types", "up_block_types"), sides, strict=True))
        vae = AutoencoderKL(sample_size=512, layers_per_block=2, latent_channels=4, **kinds)
        z, h = torch.empty(1, 4, 64, 64), torch.empty(1, 77, 768)
    for part in (unet, vae):
        part.requires_grad_(False).eval()
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(859.5e6, rel=1e-3)

    def denoise(z):
        return unet(z, torch.ones(1, device="meta"), h).sample

    def decode(z):
        return vae.decode(z).sample

    plain, both = {}, {}
    for name, network in (("unet", denoise), ("vae", decode)):
        with torch.no_grad():
            plain[name] = tflop_on_meta(lambda: network(z))  # noqa: B023
        leaf = z.detach().requires_grad_()
        both[name] = tflop_on_meta(lambda: network(leaf).sum().backward())  # noqa: B023
    assert [plain["unet"], both["unet"]] == pytest.approx([0.803, 1.73], rel=0.02)
    assert [plain["vae"], both["vae"]] == pytest.approx([2.51, 5.06], rel=0.02)
    image = 25 * 2 * plain["unet"] + plain["vae"]
    guidance = 2 * (2 * both["unet"] + both["vae"])
    assert [image, guidance] == pytest.approx([42.7, 17.1], rel=0.02)


@pytest.mark.parametrize(("checkpointing", "gib"), [(True, 2.54), pytest.param(False, 8.55, marks=pytest.mark.slow)])
def test_gradient_step_at_full_size_stores_what_the_documentation_says(monkeypatch, checkpointing, gib):
    """The script's own energy on Stable Diffusion 1.4, 512 pixels, P = 2, ResNet-50, on `meta` tensors."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    import timm
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from common.memory import saved_bytes

    args = dd.Args(gen_micro_batch=1, grad_checkpoint=checkpointing)
    sides = dict(block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4)
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).bfloat16()
        vae = AutoencoderKL(sample_size=512, layers_per_block=2, up_block_types=["UpDecoderBlock2D"] * 4, **sides)
        net = timm.create_model("resnet50", num_classes=100).bfloat16().requires_grad_(False).eval()
        text, one = torch.empty(100, 77, 768, dtype=torch.bfloat16), torch.empty(1, 4, 1, 1)
        z, steps, p, q = torch.empty(1, 4, 64, 64), torch.empty(50), torch.empty(100, 2048), torch.empty(100, 3, 2048)
    for part in (unet, vae):
        part.requires_grad_(False).eval()
        if args.grad_checkpoint:
            part.enable_gradient_checkpointing()
    monkeypatch.setattr(dd, "autocast", lambda *_: nullcontext())  # there is none on meta: the guide is cast instead
    s = dd.Sampler.__new__(dd.Sampler)
    s.args, s.device, s.pipe, s.unet = args, z.device, SimpleNamespace(unet=unet, vae=vae), unet
    s.energy_vae = dd.vae_of_the_energy(args, s.pipe)
    s.guide = SimpleNamespace(features=lambda x: net.forward_head(net.forward_features(x.bfloat16()), pre_logits=True))
    s.text, s.null, s.class_unit, s.group_unit, s.t, s.abar, s.abar_next = text, text[0], p, q, steps, steps, steps
    score = s.score_with(s.networks(torch.zeros(1, dtype=torch.long)))
    counted = saved_bytes(lambda: dd.transform_guidance(z, one, one, 30, args.gen_rho, args.gen_radius, score))
    assert counted.peak / 2**30 == pytest.approx(gib, rel=0.03)
