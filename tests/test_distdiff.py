"""DistDiff: values of the authors' code, invariants of the method, the script end to end on the tiny world."""

import json
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import QUIET
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import distdiff as dd
from common import distributed, models
from common.datasets import Images, load_dataset
from common.files import class_folders
from common.launch import UserError
from common.loader import normalised

CPU = torch.device("cpu")
ALONE = distributed.Dist(0, 0, 1, CPU)


@pytest.fixture
def g(golden):
    return golden("distdiff")


def close(a, b, tol=1e-5):
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max().item() <= tol


# ---- golden: the toy networks of the vectors -----------------------------------------------------


class Toy:
    """The denoiser, decoder and guide that golden/distdiff.md defines, over our sampler, as the equations take them."""

    def __init__(self, g, rows=slice(None)):
        self.g, self.rows = g, rows
        self.t, self.abar, self.abar_next = dd.ddim_schedule(50, dd.alphas_cumprod())
        labels = g["tg.targets"][rows]
        self.p, self.q = g["tg.class_proto"][labels], g["tg.group_proto"][labels]

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


def setting(g, case):
    m, period, rho, radius, lam_c, lam_g, use_c, use_g = g[f"tg.{case}.hp"].tolist()
    return 50 - int(m), int(period), rho, radius, lam_c * use_c, lam_g * use_g


def guide_case(g, case, rows=slice(None), rho_factor=1.0, start=None):
    """Our transform guidance in one batch -> latent, dict of energies and gradients, trace of the look-ahead."""
    i, period, rho, radius, lam_c, lam_g = setting(g, case)
    toy, (e, b) = Toy(g, rows), start or (g[f"tg.{case}.e0"][rows], g[f"tg.{case}.b0"][rows])
    traces = []

    def score(v, i):
        total, trace = dd.look_ahead(v, i, period, toy, lam_c, lam_g)
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
    z_next, x0, score = dd.direct_guidance(g["tg.z"], i, 10.0, toy)
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
    x, shares = dd.mixup_with(g["mixup.x"], F.one_hot(y, logits.shape[1]).float(), index, lam)
    close(x, g["mixup.mixed"])
    close(F.cross_entropy(logits, shares), g["mixup.loss_correct"])
    close(F.cross_entropy(logits, y), g["mixup.loss_released"])


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
    pipe = dd.generator_of(args, models.resolve("tiny", "generator"), CPU)
    data = load_dataset("digits")
    distributed.seed_global(0)
    prompts = dd.prompts_of_classes(args, data.class_names)
    guide = dd.Net(args.guide, prompts).requires_grad_(False).eval()
    features, labels = torch.rand(60, 96), torch.arange(60) % 10
    found = dd.prototypes(features, labels, 10, 3)
    pixels = torch.stack([v2.functional.pil_to_tensor(data.train[i]).float() / 127.5 - 1 for i in range(5)])
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
        _, info = dd.transform_guidance(z, e, b, s.guided_at, 1.0, 0.2, nets.energy)
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
            dd.check_args(dd.Args(**flags))
    dd.check_args(dd.Args())
    for preset in dd.PRESETS.values():
        dd.check_args(dd.Args(**preset))


def test_places_of_the_copies_are_unique_and_nested():
    """The map from the authors' names: <stem>_expand_<j> is number j n_c + place of the image in its class."""
    real = Images([0, 0, 1, 1, 1], list("abcde"), ["x", "y"])
    copies = dd.Copies(Path("run"), real, range(5), 5)
    assert [copies.key(i, 0) for i in range(5)] == [
        "00_x/0.png",
        "00_x/1.png",
        "01_y/0.png",
        "01_y/1.png",
        "01_y/2.png",
    ]
    assert [copies.key(i, 2) for i in (1, 3)] == ["00_x/5.png", "01_y/7.png"]
    for k in (1, 2, 5):
        names = {copies.key(i, j) for i in range(5) for j in range(k)}
        assert names == {f"00_x/{n}.png" for n in range(2 * k)} | {f"01_y/{n}.png" for n in range(3 * k)}


def test_too_little_disk_is_told_before_the_first_copy(tmp_path, monkeypatch):
    args = dd.Args(gen_copies=5, gen_resolution=512, gen_save_size=256)
    real = Images([0, 0, 1, 1, 1], list("abcde"), ["x", "y"])
    copies = {row: dd.Copies(tmp_path / row, real, range(5), 5) for row in ("sd", "distdiff")}
    need, run = 50 * 256 * 256 * 1.53, SimpleNamespace(dir=tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=need + 1))
    assert dd.missing_copies(args, run, copies) == {row: {i: [0, 1, 2, 3, 4] for i in range(5)} for row in copies}
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=need - 1))
    with pytest.raises(UserError, match="lower --gen-copies"):
        dd.missing_copies(args, run, copies)


def test_real_images_lie_class_by_class_in_natural_order():
    some = Images([1, 0, 1, 0, 0], ["b/10", "a/3", "b/9", "a/20", "a/1"], ["a", "b"], root=Path("."))
    ours = dd.in_order(some)
    assert list(ours.keys) == ["a/1", "a/3", "a/20", "b/9", "b/10"] and ours.labels.tolist() == [0, 0, 0, 1, 1]


def test_copies_have_seeds_of_their_own_and_rows_share_them():
    args = dd.Args()
    real = Images([0, 0], ["a/1", "a/2"], ["a"], root=Path("."))
    pairs = [(i, j) for i in (0, 1) for j in range(3)]
    latents, labels, seeds = dd.inputs_of(args, real, torch.arange(8.0).view(2, 4), pairs)
    assert len(set(seeds)) == 6 and seeds[4] == distributed.seed_of(0, "a/2", 1)
    assert [z[0].item() for z in latents] == [0, 0, 0, 4, 4, 4] and labels == [0] * 6
    other = dd.inputs_of(dd.Args(gen_seed=1), real, torch.zeros(2, 4), pairs)[2]
    assert not set(seeds) & set(other)


@pytest.mark.parametrize("extra", ["none", "randaugment", "erasing", "gridmask"])
def test_stored_at_256_pixels_images_give_the_same_training_bits(extra):
    """The resize is the first, deterministic step of training and evaluation: it may be done before storing."""
    args = dd.Args()
    assert args.gen_save_size == args.clf_resize == 256
    drawn = torch.randint(256, (3, 512, 512), dtype=torch.uint8)
    small, large = dd.stored(drawn, args.gen_save_size), dd.stored(drawn, None)
    assert small.size == (256, 256) and large.size == (512, 512)
    seen = []
    for image in (small, large):
        distributed.seed_global(5)
        found = dd.train_view(args, extra)(image, 1.0)
        seen.append([*(found if isinstance(found, tuple) else [found]), dd.centre_view(image, 256, 224)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def photos(*sizes, labels=None):
    """Images of these sizes, each of another colour pattern, in memory one by one."""
    pictures = [Image.effect_noise(size, 80).convert("RGB") for size in sizes]
    labels = labels or list(range(len(sizes)))

    class Some(Images):
        def open(self, row, shorter=None):
            return pictures[row]

    return Some(labels, map(str, range(len(sizes))), [f"c{c}" for c in range(max(labels) + 1)], pixels=np.zeros(1))


def test_images_held_in_memory_are_those_that_are_read(monkeypatch):
    args, some = dd.Args(workers=0), photos((40, 30), (30, 40), (32, 32))
    held = dd.held(args, some, 36)
    assert held is not some and (held.labels == some.labels).all()
    for i in range(3):
        assert held.open(i).tobytes() == dd.squashed(some.open(i), 36).tobytes()
    monkeypatch.setattr(dd, "HELD_BYTES", 3 * 3 * 36**2 - 1)
    assert dd.held(args, some, 36) is some


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


def fake_run(folder):
    """A run folder as the stages use it."""
    names = dict(timed=lambda *_, **__: nullcontext(), done=lambda *_, **__: None, **QUIET)
    names |= dict(path=lambda *parts: folder.joinpath(*map(str, parts)), under=lambda *names: list(names))
    return SimpleNamespace(**names)


def jobs_of(monkeypatch, stage):
    """The Trainings that a stage hands to fit"""
    seen = []
    monkeypatch.setattr(dd, "fit", lambda args, run, team, job, *_: seen.append(job))
    monkeypatch.setattr(dd, "read_json", lambda _: dict(test=0, val=0))
    monkeypatch.setattr(dd, "save_best", lambda *_: None)
    stage()
    return seen


def test_guide_has_a_rate_of_its_own(monkeypatch, tmp_path):
    """Official: 0.1 from scratch in every preset, whatever the classifier's is."""
    digits, data = dd.PRESETS["digits"], load_dataset("digits")
    args = dd.Args(**{**digits, "sgd_lr": 0.01, "guide_lr": 0.07})
    real = data.train.subset(range(6))
    run = fake_run(tmp_path)
    guide = lambda: dd.train_guide(args, run, ALONE, real, None, data.test, [], None)  # noqa: E731
    (job,) = jobs_of(monkeypatch, guide)
    assert (job.network, job.weights, job.epochs, job.lr, job.length) == ("test_resnet", None, 100, 0.07, 6)
    assert (job.folder, job.seed, job.extra) == (tmp_path / "guide", 0, "none")


def test_rows_are_trained_on_what_they_say(monkeypatch, tmp_path):
    """The real images and the first k copies, in epochs as long as the largest k's; `real` alone has its own."""
    data, n = load_dataset("digits"), 10
    args = dd.Args(**{**dd.PRESETS["digits"], "clf_seeds": 1, "rows": ("real", "real-repeated", "cutout", "sd")})
    real = dd.in_order(data.train.subset([int(data.train.of_class(c)[0]) for c in range(n)]))
    for c, folder in enumerate(class_folders(data.class_names)):
        (tmp_path / "sd" / folder).mkdir(parents=True)
        for k in range(5):
            Image.new("RGB", (32, 32), (20 * c, 50 * k, 0)).save(tmp_path / "sd" / folder / f"{k}.png")

    def found(**more):
        args_now, run = dd.Args(**{**vars(args), **more}), fake_run(tmp_path)
        stage = lambda: dd.train(args_now, run, ALONE, real, None, data.test, data.class_names, [], None)  # noqa: E731
        return {job.folder.name.removesuffix("-seed0"): job for job in jobs_of(monkeypatch, stage)}

    jobs = found()
    assert {name: job.length for name, job in jobs.items()} == {
        "real": 10, "real-repeated": 60, "cutout": 60, "sd-k1": 60, "sd-k2": 60, "sd-k5": 60
    }  # fmt: skip
    assert [job.extra for job in jobs.values()] == ["none", "none", "cutout", "none", "none", "none"]
    sizes = {name: [len(source) for source in job.sources] for name, job in jobs.items()}
    assert sizes["real"] == sizes["cutout"] == [10] and sizes["sd-k2"] == [10, 20] and sizes["sd-k5"] == [10, 50]
    originals, copies = jobs["sd-k2"].sources
    assert (originals.labels == real.labels).all() and originals.open(3).size == (36, 36)
    assert [copies.open(i).getpixel((9, 9)) for i in (0, 1, 2, 19)] == [
        (0, 0, 0), (0, 50, 0), (20, 0, 0), (180, 50, 0)
    ]  # fmt: skip
    own = found(clf_equal_k=False, clf_transform="mixup")
    assert [own[f"sd-k{k}"].length for k in (1, 2, 5)] == [20, 30, 60] and own["real-repeated"].length == 60
    assert own["sd-k1"].extra == "mixup" and own["real"].extra == "none"


# ---- stages against an independent way to the same numbers -----------------------------------------


def test_guided_images_equal_a_plain_loop_over_stock_parts(world):
    """One image at a time with diffusers' scheduler and autograd: noise, e, b, prototypes of its class, one step."""
    from diffusers import DDIMScheduler

    # Prototypes far apart and a wide box: the class of the prototypes shows in the pixels.
    g = torch.Generator().manual_seed(0)
    world = world | dict(found=dd.prototypes(torch.randn(60, 96, generator=g), torch.arange(60) % 10, 10, 3))
    args, pipe, guide, found = (world[name] for name in ("args", "pipe", "guide", "found"))
    kinds = dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading")
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **kinds)
    scheduler.set_timesteps(10)
    times, rho, radius = scheduler.timesteps[5:], 3.0, 0.5
    ours = draw(world, "distdiff", gen_rho=rho, gen_radius=radius)
    changed = (ours.float() - draw(world, "rho0", gen_radius=radius).float()).abs().max()
    for n, (label, seed) in enumerate(zip(LABELS, SEEDS, strict=True)):
        g = torch.Generator().manual_seed(seed)
        noise, e, b = torch.randn(1, 4, 8, 8, generator=g), torch.rand(4, 1, 1, generator=g), None
        b = torch.randn(4, 1, 1, generator=g)
        texts = pipe.tokenizer(["", world["prompts"][label]], padding="max_length", return_tensors="pt").input_ids
        h = pipe.text_encoder(texts)[0]

        def step(z, t):
            both = pipe.unet(torch.cat([z, z]), t, h).sample  # noqa: B023
            eps = both[:1] + 7.5 * (both[1:] - both[:1])
            out = scheduler.step(eps, t, z, eta=0.0)
            return out.pred_original_sample, out.prev_sample

        z = scheduler.add_noise(world["latents"][n][None], noise, times[:1])
        for k, t in enumerate(times):
            if k == 1:  # 4 steps from the end of 10, of which 5 are run
                e, b = e.requires_grad_(), b.requires_grad_()
                v, total = z + e * z + b, 0
                for r in (0, 1):
                    x0, v = step(v, times[k + r])
                    image = pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample
                    image = F.interpolate(image, size=(32, 32), mode="bicubic", align_corners=False)
                    f = guide.net.forward_head(guide.net.forward_features(image), pre_logits=True)[0]
                    groups = found["group_unit"][label]
                    group = groups[F.cosine_similarity(f[None], groups).argmax()]
                    total = total + torch.dist(f, found["class_unit"][label]) + torch.dist(f, group)
                grad_e, grad_b = torch.autograd.grad(total / 2, (e, b))
                with torch.no_grad():
                    e, b = e - rho * grad_e, b - rho * grad_b
                    z = z + (e * z + b).clamp(-radius, radius)
            with torch.no_grad():
                _, z = step(z, t)
        with torch.no_grad():
            image = pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample[0]
        off = (ours[n].float() - ((image + 1) * 127.5).clamp(0, 255)).abs().max()
        assert off < 2.0 < changed / 3


def test_encode_equals_the_stock_vae(world, tmp_path):
    """Rectangular photos: shorter side to the size, one crop, one draw from the posterior, the scaling factor."""
    args = dd.Args(**{**vars(world["args"]), "gen_micro_batch": 4, "gen_resolution": 32})
    real, pipe = photos((50, 40), (32, 64), (90, 33), (32, 32), (47, 61)), world["pipe"]
    dd.encode(args, fake_run(tmp_path), ALONE, pipe, real)
    ours = dd.load_tensors(tmp_path / "latents.safetensors")["latents"]
    assert ours.shape == (5, 4, 8, 8)
    for i in range(5):
        g = distributed.generator(args.gen_seed, "encode", str(i))
        image = v2.functional.resize(real.open(i), 32, v2.InterpolationMode.BILINEAR)
        left, top = (int(torch.randint(side - 32 + 1, (), generator=g)) for side in image.size)
        x = v2.functional.pil_to_tensor(v2.functional.crop(image, top, left, 32, 32))[None] / 255 * 2 - 1
        with torch.no_grad():
            posterior = pipe.vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape[1:], generator=g)
        close(ours[i], (z * pipe.vae.config.scaling_factor)[0], 1e-4)


def test_prototypes_equal_scikit_learn_on_features_of_a_stock_network(tmp_path):
    """Files of the stage against plain lines: squashed, normalised images, timm's pooled features, clusters, means."""
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.preprocessing import normalize

    args = dd.Args(guide="test_resnet", clf_size=32, workers=0, sgd_batch=4)
    real = photos(*[(20 + 3 * i, 50 - i) for i in range(14)], labels=[0] * 6 + [1] * 8)
    distributed.seed_global(1)
    net = timm.create_model("test_resnet", num_classes=2)
    dd.save_tensors(tmp_path / "guide" / "weights.safetensors", {f"net.{k}": v for k, v in net.state_dict().items()})
    dd.make_prototypes(args, fake_run(tmp_path), ALONE, real, real.class_names, ["a", "b"])
    ours = dd.load_tensors(tmp_path / "prototypes.safetensors")
    to_float = [v2.Resize((32, 32)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    view = v2.Compose([*to_float, v2.Normalize(dd.IMAGENET_MEAN, dd.IMAGENET_STD)])
    net.reset_classifier(0)
    with torch.no_grad():
        u = normalize(net.eval()(torch.stack([view(real.open(i)) for i in range(14)])).numpy())
    for c, rows in enumerate((range(6), range(6, 14))):
        mine = u[list(rows)]
        close(ours["class_unit"][c], torch.tensor(normalize(mine.mean(0, keepdims=True))[0]), 1e-4)
        cluster = AgglomerativeClustering(3, linkage="average").fit_predict(mine)
        means = normalize(np.stack([mine[cluster == k].mean(0) for k in range(3)]))
        close(ours["group_unit"][c], torch.tensor(means), 1e-4)
    about = json.loads((tmp_path / "prototypes.json").read_text())
    assert [sum(sizes) for sizes in about["cluster_sizes"].values()] == [6, 8]
    assert Image.open(tmp_path / "prototypes.png").size[0] > 100


TINY = dict(clf_resize=36, clf_size=32, clf_flip=True, workers=0, sgd_batch=3, clf_evals=2, precision="fp32")


@pytest.mark.parametrize("extra", ["none", "erasing", "mixup", "cutmix"])
def test_training_equals_a_plain_loop_of_sgd(extra, tmp_path):
    """Two epochs of two steps: order, views, rate, momentum, Nesterov and decay written out, without an optimizer."""
    args, real = dd.Args(**TINY, sgd_wd=0.2), photos(*[(36, 36)] * 5, labels=[0, 1, 2, 0, 1])
    job = dd.Training(tmp_path / "one", "test_resnet", None, 2, 0.01, [real], 6, 7, extra)
    scored = dict(test=real)
    dd.fit(args, fake_run(tmp_path), ALONE, job, scored, ["a", "b", "c"])
    ours = dd.load_tensors(tmp_path / "one" / "weights.safetensors")

    distributed.seed_global(distributed.seed_of(7, "weights"))
    net = timm.create_model("test_resnet", num_classes=3).to(memory_format=torch.channels_last).train()
    passes = [torch.randperm(5, generator=distributed.generator(7, "order", k)).tolist() for k in range(3)]
    stream, speed = passes[0] + passes[1] + passes[2], [torch.zeros_like(p) for p in net.parameters()]
    for step in range(4):
        x, y = [], torch.tensor([real.labels[i] for i in stream[3 * step : 3 * step + 3]])
        for position in range(3 * step, 3 * step + 3):
            distributed.seed_global(distributed.seed_of(7, "augment", position))
            turned = v2.RandomCrop(32)(v2.RandomRotation(15)(real.open(stream[position])))
            pixels = v2.functional.pil_to_tensor(v2.RandomHorizontalFlip(0.5)(turned))
            # As the script rounds it: three images share BatchNorm here, which makes any other rounding large.
            pixels = normalised(pixels[None], dd.IMAGENET_MEAN, dd.IMAGENET_STD)[0]
            x.append(v2.RandomErasing(0.5)(pixels) if extra == "erasing" else pixels)
        x, y = torch.stack(x), F.one_hot(y, 3).float()
        if extra == "mixup":
            g = distributed.generator(7, "mix", step)
            lam, other = torch.rand((), generator=g), torch.randperm(3, generator=g)
            x, y = lam * x + (1 - lam) * x[other], lam * y + (1 - lam) * y[other]
        if extra == "cutmix":
            distributed.seed_global(distributed.seed_of(7, "mix", step))
            x, y = v2.CutMix(num_classes=3)(x, y.argmax(1))
        x = x.contiguous(memory_format=torch.channels_last)
        loss = -(y * net(x).log_softmax(1)).sum(1).mean()
        rate = 0.01 if step < 2 else 0.005  # half a cosine over two epochs
        for p, v, grad in zip(net.parameters(), speed, torch.autograd.grad(loss, list(net.parameters())), strict=True):
            with torch.no_grad():
                grad = grad + 0.2 * p
                v.mul_(0.9).add_(grad)
                p -= rate * (grad + 0.9 * v)
    for name, tensor in net.state_dict().items():
        close(ours[f"net.{name}"].float(), tensor.float(), 1e-3)
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert (metrics["updates"], metrics["images"], metrics["best_step"], metrics["val"]) == (4, 5, 4, None)
    assert [row["step"] for row in metrics["history"]] == [2, 4] and not (
        tmp_path / "one/checkpoint.safetensors"
    ).exists()


@pytest.mark.parametrize("with_val", [True, False])
def test_the_epoch_is_chosen_on_validation_images_else_the_last(with_val, tmp_path, monkeypatch):
    args, real = dd.Args(**{**TINY, "clf_evals": 3}), photos((36, 36), (36, 36), labels=[0, 1])
    splits = dict(test=real, **(dict(val=photos((36, 36), labels=[0])) if with_val else {}))
    scripted = dict(test=iter([90.0, 10.0, 20.0]), val=iter([30.0, 40.0, 35.0]))
    seen, names = [], {id(part): name for name, part in splits.items()}

    def predict(args, net, some, device):
        if names[id(some)] == "test":
            seen.append(
                net.net.state_dict()["conv1.weight"].clone()
                if "conv1.weight" in net.net.state_dict()
                else next(iter(net.state_dict().values())).clone()
            )
        return names[id(some)]

    monkeypatch.setattr(dd, "predict", predict)
    monkeypatch.setattr(dd, "top1", lambda name, _: next(scripted[name]))
    job = dd.Training(tmp_path / "one", "test_resnet", None, 3, 0.05, [real], 2, 7)
    dd.fit(args, fake_run(tmp_path), ALONE, job, splits, ["a", "b"])
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    chosen = 2 if with_val else 3
    assert metrics["best_step"] == chosen and metrics["test"] == (10.0 if with_val else 20.0)
    assert (metrics["test_selected"], metrics["last_epoch_test"]) == (90.0, 20.0)
    first = next(iter(dd.load_tensors(tmp_path / "one" / "weights.safetensors")))
    assert metrics["val"] == (40.0 if with_val else None) and first


def test_presets_are_the_method_pages():
    """Every value that a preset of the paper ends up with, written out; ours where the paper is silent are marked."""
    paper = dict(
        sd_model="CompVis/stable-diffusion-v1-4", gen_resolution=512, gen_steps=50, gen_strength=0.5, gen_guidance=7.5,
        gen_step_from_end=20, gen_period=2, gen_rho=10.0, gen_radius=0.2, gen_class_weight=1.0, gen_group_weight=1.0,
        gen_normalize=False, gen_guide_input="pm1", gen_copies=5, gen_prompt=None, gen_save_size=256, groups=3,
        guide="resnet50", guide_pretrained=False, guide_epochs=100, guide_lr=0.1, classifier="resnet50",
        classifier_pretrained=False, clf_epochs=100, clf_seeds=3, clf_copies=(5,), clf_resize=256, clf_size=224,
        clf_flip=True, clf_transform="none", sgd_lr=0.1, sgd_wd=1e-4, sgd_batch=64, real_per_class=None,
        merge_val=False, val_fraction=0.0, data_dir="data", precision="bf16", seed=0, gen_seed=0,
        zeroshot_clip="ViT-B-32/laion2b_s34b_b79k", rows=("real", "real-repeated", "sd", "rho0", "distdiff"),
        clf_equal_k=True, clf_evals=20, energy_probe=64, gen_micro_batch=16, grad_checkpoint=True,
    )  # fmt: skip
    tuned = dict(classifier_pretrained=True, sgd_lr=0.01)  # the rate: ours
    differs = dict(
        caltech101={}, cifar100=dict(real_per_class=100, val_fraction=0.1), cars=tuned, imagenette=tuned,
        dtd=dict(merge_val=True), pets={}, flowers102={}, fgvc_aircraft={}, stl10={},
        pathmnist=dict(
            real_per_class=100, gen_strength=0.2, gen_step_from_end=10, sgd_lr=1e-3,  # the rate: ours
            classifier="clip:ViT-B-32/laion2b_s34b_b79k",
        ),
    )  # fmt: skip
    assert {"digits", *differs} == set(dd.PRESETS)
    for name, more in differs.items():
        values = vars(dd.Args(**dd.PRESETS[name]))
        expected = paper | more
        assert values["dataset"] == name and {key: values[key] for key in expected} == expected


def test_clip_sees_the_normalisation_of_the_authors(tmp_path):
    net = dd.Net("clip:tiny", ["a", "b"])
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
        dd.check_args(dd.Args(**flags))


def test_models_of_a_run_are_looked_through_before_the_first_stage(tmp_path):
    """Guide, classifier and CLIP that are not there, or not what they should be; generators that are no epsilon-SD."""
    import shutil

    from common.models import TINY_WEIGHTS

    digits = dd.PRESETS["digits"]
    assert set(dd.planned_models(dd.Args(**digits))) == {"--sd-model", "--guide", "--classifier", "--zeroshot-clip"}
    shutil.copytree(TINY_WEIGHTS / "clip", tmp_path / "clip")
    (weights,) = (tmp_path / "clip").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])  # cut by a full disk
    for field, value, more in (
        ("guide", "clip:/nowhere", {}), ("guide", f"clip:{tmp_path / 'clip'}", {}),
        ("guide", f"clip:{TINY_WEIGHTS / 'sd'}", {}), ("guide", "clip:ViT-B-32/laion2b_s34b_b79k", {}),
        ("classifier", "resnet5o", {}), ("classifier", "resnet50", dict(classifier_pretrained=True)),
        ("guide", "resnet50", dict(guide_pretrained=True)),
        ("zeroshot_clip", "/nowhere", {}),
    ):  # fmt: skip
        with pytest.raises(UserError, match="^--" + field.replace("_", "-")):
            dd.planned_models(dd.Args(**{**digits, **more, field: value}))
    for file, key, value in (
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
        ("scheduler/scheduler_config.json", "prediction_type", "sample"),
        ("scheduler/scheduler_config.json", "beta_schedule", "linear"),
        ("model_index.json", "_class_name", "StableDiffusionXLPipeline"),
        ("model_index.json", "_class_name", "FluxPipeline"),
        ("model_index.json", "_class_name", "StableDiffusionInpaintPipeline"),
    ):
        shutil.rmtree(tmp_path / "sd", ignore_errors=True)
        shutil.copytree(TINY_WEIGHTS / "sd", tmp_path / "sd")
        config = json.loads((tmp_path / "sd" / file).read_text())
        (tmp_path / "sd" / file).write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match="^--sd-model.*" + value):
            dd.planned_models(dd.Args(**{**digits, "sd_model": str(tmp_path / "sd")}))


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(classifier="vit_tiny_patch16_224"), "--classifier vit_tiny.* --clf-size 32 .*: these .*Input height"),
        (
            dict(guide="test_resnet", sgd_batch=1),
            "--guide test_resnet .*--sgd-batch 1: these .*BatchNorm needs two images",
        ),
        (dict(classifier="clip:tiny", clf_size=64, clf_resize=64), "--classifier clip:tiny --clf-size 64 .*: these"),
        (dict(guide="vit_tiny_patch16_224", stages=("train",)), None),
        (dict(classifier="clip:tiny"), None),
    ],
)
def test_networks_that_cannot_be_trained_are_told_at_the_start(flags, words):
    args = dd.Args(**{**dd.PRESETS["digits"], **flags})
    with pytest.raises(UserError, match=words) if words else nullcontext():
        dd.planned_models(args)


def test_prompts_of_the_data_sets():
    cases = {
        ("caltech101", "wild_cat"): "a photo of a wild cat.",
        ("cars", "AM General Hummer SUV 2000"): "a photo of a 2000 AM General Hummer SUV.",
        ("dtd", "polka-dotted"): "polka-dotted texture.",
        ("pets", "Abyssinian"): "A photo of a pet Abyssinian.",
    }
    for (name, label), prompt in cases.items():
        assert dd.prompts_of_classes(dd.Args(dataset=name), [label]) == [prompt]
    assert dd.prompts_of_classes(dd.Args(dataset="pathmnist"), ["smooth muscle"]) == [
        "a colon pathological image of smooth muscle."
    ]
    assert len(dd.prompts_of_classes(dd.Args(dataset="imagenette"), ["x"] * 10)) == 10
    assert dd.prompts_of_classes(dd.Args(dataset="cars", gen_prompt="a photo of a {} car."), ["B C 2000"]) == [
        "a photo of a 2000 B C car."
    ]


@pytest.mark.parametrize("extra", ["none", *dd.TRANSFORMS])
def test_transforms_change_what_they_should(extra):
    args = dd.Args(clf_resize=36, clf_size=32, clf_flip=False)
    pictures = [Image.effect_noise((36, 36), 80).convert("RGB") for _ in range(20)]

    def seen(name):
        out, view = [], dd.train_view(args, name)
        for i, image in enumerate(pictures):
            distributed.seed_global(i)
            found = view(image, 1.0)
            out.append(found[0] * found[1] if isinstance(found, tuple) else found)
        return torch.stack(out)

    plain, ours = seen("none"), seen(extra)
    assert ours.shape == (20, 3, 32, 32) and ours.dtype == torch.uint8
    changed = (ours != plain).flatten(1).any(1).float().mean().item()
    expected = {"none": 0, "mixup": 0, "cutmix": 0, "cutout": 1, "erasing": 0.5, "gridmask": 0.8}
    if extra in expected:  # mixup and cutmix are done to the batch
        assert abs(changed - expected[extra]) < 0.35 * (expected[extra] not in (0, 1)) + 1e-9
    else:
        assert changed > 0.5
    if extra == "cutout":  # a quarter, less where the rotation left black corners
        hidden = [(dd.train_view(args, extra)(image, 1.0)[1] == 0).float().mean().item() for image in pictures]
        assert max(abs(share - 0.25) for share in hidden) < 0.03


def test_cutmix_labels_follow_the_area():
    x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16).clone()
    boxes = []
    for seed in range(6):
        pixels, shares = dd.mix_batch(x, torch.arange(8), "cutmix", 8, seed)
        assert torch.allclose(shares.sum(1), torch.ones(8))
        for i in range(8):
            own = (pixels[i, 0] == i).float().mean().item()
            assert shares[i, i].item() == pytest.approx(own, abs=1e-5)
        boxes.append(shares[0, 0].item())
    assert len(set(boxes)) > 3 and torch.equal(dd.mix_batch(x, torch.arange(8), "none", 8, 0)[0], x)


def test_networks_and_their_features():
    net = dd.Net("test_resnet", ["a"] * 4).eval()
    x = torch.randn(2, 3, 32, 32)
    f = net.features(x)
    assert torch.equal(net.net.get_classifier()(f), net(x)) and (f >= 0).all()
    clip = dd.Net("clip:tiny", ["a photo of a seven", "a photo of a one"]).eval()
    assert clip(x).shape == (2, 2) and clip.features(x).shape[0] == 2
    assert torch.allclose(clip.head.weight.norm(dim=1), torch.ones(2), atol=1e-5) and not clip.head.bias.any()


@pytest.mark.parametrize("name", ["test_resnet", "clip:tiny"])
def test_a_saved_classifier_answers_as_before(name, tmp_path):
    prompts = ["a photo of a seven", "a photo of a one"]
    net = dd.Net(name, prompts).eval()
    if net.clip:
        nn.init.normal_(net.head.bias)
    net.save(tmp_path, dict(prompts=prompts))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(dd.Net.load(tmp_path).eval()(x), net(x))


def test_an_unknown_data_set_is_told():
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


def test_rows_of_real_images_draw_nothing(launch, tmp_path):
    flags = ["--output-dir", tmp_path / "run", *SMALL, "--rows", "zero-shot", "real", "mixup", "--clf-epochs", 1]
    launch("distdiff.py", *flags, "--sd-model", tmp_path / "none")
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(result["seconds"]) - {"select"} == {"train", "evaluate"}
    assert {"zero-shot", "real"} <= set(result["baselines"]) and not (tmp_path / "run" / "guide").exists()
    with pytest.raises(UserError, match="--stages guide: no row of --rows real needs that"):
        dd.check_args(dd.Args(rows=("real",), stages=("guide",)))


def test_second_call_does_no_work_and_other_flags_are_refused(small, launch):
    out, _ = small
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".png", ".safetensors", ".json")}
    run_small(launch, out)
    assert not [p.name for p in before if before[p] != p.stat().st_mtime_ns and p.name != "args.json"]
    done = run_small(launch, out, "--gen-rho", "3", check=False)
    assert done.returncode == 2 and "--gen-rho" in done.stderr and "Traceback" not in done.stderr
    assert not [p.name for p in before if before[p] != p.stat().st_mtime_ns and p.name != "args.json"]


def test_saved_classifier_loads_in_stock_timm(small):
    out, _ = small
    about = json.loads((out / "classifier" / "classes.json").read_text())
    assert (about["row"], about["copies"]) == ("distdiff", 2)
    recorded = json.loads((out / "classifier/runs/distdiff-k2-seed0/metrics.json").read_text())["test"]
    net = timm.create_model(f"local-dir:{out / 'classifier'}", pretrained=True).eval()
    test = load_dataset("digits").test
    views = [dd.centre_view(test.open(i), 36, 32) for i in range(len(test))]
    x = dd.normalised(torch.stack(views), dd.IMAGENET_MEAN, dd.IMAGENET_STD)
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
    score = dd.Networks(s, torch.zeros(1, dtype=torch.long)).energy
    counted = saved_bytes(lambda: dd.transform_guidance(z, one, one, 30, args.gen_rho, args.gen_radius, score))
    assert counted.peak / 2**30 == pytest.approx(gib, rel=0.03)


def test_folders_of_ones_own_have_the_names_of_the_other_scripts():
    args = dd.Args(dataset="folder")
    assert dd.prompts_of_classes(args, ["001.sea_lake", "n02124075", "A330-200"]) == [
        "a photo of a sea lake.", "a photo of a Egyptian Mau.", "a photo of a A330-200.",
    ]  # fmt: skip
    assert dd.prompts_of_classes(dd.Args(dataset="eurosat"), list("0123456789"))[3] == "a photo of a Highway or Road."
    assert dd.prompts_of_classes(dd.Args(dataset="imagenette"), ["x"] * 10)[3] == "a photo of a chain saw."
