"""common/glide on narrow random networks: the authors' own output, the files, and sampling against a plain loop."""

import gzip
import json
import math
import pickle

import pytest
import tiny_glide
import torch
from conftest import GOLDEN_DIR
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_glide import make_tiny_glide

from common import glide as G
from common.glide import network, sampler
from common.launch import UserError

SIDE = 16  # of the base's images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_glide(tmp_path_factory.mktemp("glide"))


@pytest.fixture(scope="module")
def glide(folder):
    return G.load_glide(folder, "cpu", side=SIDE)


@pytest.fixture
def copy(folder, tmp_path):
    """A folder of its own to damage."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def close(a, b, tolerance):
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max().item() <= tolerance


# ---- the authors' own output ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def authors():
    """The golden file's metadata, JSON decoded: "base.settings", "base.texts", "base.seed", "base.shapes" ..."""
    with safe_open(GOLDEN_DIR / "glide.safetensors", "pt") as file:
        return {key: json.loads(text) for key, text in file.metadata().items() if "." in key}


@pytest.fixture(scope="module")
def authors_folder(authors, tmp_path_factory):
    """The golden networks as a user has them."""
    folder = tmp_path_factory.mktemp("authors")
    tiny_glide.write_gpt2(folder)
    for name in ("base", "upsample"):
        weights = tiny_glide.random_weights(dict(authors[f"{name}.shapes"]), authors[f"{name}.seed"])
        torch.save(weights, folder / f"{name}.pt")
    return folder


def load_authors(folder, authors, name):
    settings = authors[f"{name}.settings"]
    heads = dict(head=settings["num_head_channels"], text_heads=settings["text_heads"])
    return G.load_network(G.weights_file(folder, name), 6 if name == "upsample" else 3, "cpu", **heads)


@pytest.mark.parametrize("name", ["base", "upsample"])
def test_network_matches_the_authors(name, golden, authors, authors_folder):
    g, settings = golden("glide"), authors[f"{name}.settings"]
    net = load_authors(authors_folder, authors, name)
    found = net.settings
    assert found.widths == tuple(settings["num_channels"] * m for m in settings["channel_mult"])
    assert (found.layers, found.text_width, found.text_layers) == (
        settings["res_blocks"], settings["text_width"], settings["text_layers"],
    )  # fmt: skip
    at = {settings["image_size"] // int(side) for side in settings["attention_at"].split(",")}
    assert found.attention == tuple(2**level in at for level in range(len(found.widths)))
    assert tiny_glide.official_shapes(found) == {key: tuple(shape) for key, shape in authors[f"{name}.shapes"]}

    low = g["upsample.low_res"] if name == "upsample" else None
    with torch.no_grad():
        text = net.encode(g[f"{name}.tokens"], g[f"{name}.mask"])
        eps, v = net(g[f"{name}.x"], g[f"{name}.t"], text, low)
        close(torch.cat([eps, v], 1), g[f"{name}.out"], 2e-5)

        t = g[f"{name}.t"][0].item()  # one number for the whole batch, as the sampler gives it
        row = [part[:1] for part in text]
        one, _ = net(g[f"{name}.x"][:1], t, row, None if low is None else low[:1])
        close(one, g[f"{name}.out"][:1, :3], 2e-5)


@pytest.mark.parametrize("name", ["base", "upsample"])
def test_tokens_match_the_authors(name, golden, authors, authors_folder):
    g = golden("glide")
    nets = [load_authors(authors_folder, authors, n) for n in ("base", "upsample")]
    glide = G.Glide(*nets, G.load_tokenizer(authors_folder), torch.device("cpu"), SIDE)
    ids, mask = glide.tokens(authors[f"{name}.texts"])
    assert torch.equal(ids, g[f"{name}.tokens"].long()) and torch.equal(mask, g[f"{name}.mask"])


def test_every_golden_key_is_read(golden, request):
    names = {item.name.partition("[")[0] for item in request.session.items}
    if {"test_network_matches_the_authors", "test_tokens_match_the_authors"} <= names:
        assert not golden("glide").unread()


def test_settings_of_the_released_networks_are_read_from_their_shapes():
    for full in (network.BASE, network.UPSAMPLER):
        with torch.device("meta"):
            state = {key: torch.empty(shape) for key, shape in tiny_glide.official_shapes(full).items()}
        assert network.read_settings(state) == full
    assert (full.head, full.text_heads, full.text_layers, full.vocabulary) == (64, 8, 16, 50257)


@pytest.mark.parametrize(
    ("settings", "side", "millions", "gflop"), [(network.BASE, 64, 385.0, 238), (network.UPSAMPLER, 256, 398.4, 1281)]
)
def test_size_and_cost_of_the_released_networks(settings, side, millions, gflop):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net = network.GlideNet(settings)
        x, low = torch.empty(1, 3, side, side), torch.empty(1, 3, side // 4, side // 4)
        ids, mask = torch.zeros(1, 128, dtype=torch.long), torch.ones(1, 128, dtype=torch.bool)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        net(x, 0, net.encode(ids, mask), low if settings.inputs == 6 else None)
    assert round(counted.get_total_flops() / 1e9) == gflop


# ---- text ----------------------------------------------------------------------------------------


def test_tokens_of_gpt2(authors_folder, authors):
    """Ids from GPT-2's vocabulary, looked up one by one; what official code does to text, case by case."""
    vocabulary = json.loads((authors_folder / "vocab.json").read_text())
    net = load_authors(authors_folder, authors, "base")
    glide = G.Glide(net, net, G.load_tokenizer(authors_folder), torch.device("cpu"), SIDE)
    pad = len(vocabulary) - 1
    assert pad == vocabulary["<|endoftext|>"] == 50256

    def ids(prompt):
        (row,), (mask,) = glide.tokens([prompt])
        assert row.shape == mask.shape == (128,) and row.dtype == torch.long and mask.dtype == torch.bool
        assert (row[~mask] == pad).all() and mask.sum() == mask.long().argmin() or mask.all()
        return row[mask].tolist()

    assert ids("") == []
    assert ids("A Photo of a CAT") == ids("a photo of a cat") == [vocabulary[w] for w in "a Ġphoto Ġof Ġa Ġcat".split()]
    assert ids("it's 42!") == [vocabulary[w] for w in "it 's Ġ42 !".split()]
    assert ids("a  cat") == [vocabulary[w] for w in "a Ġ Ġcat".split()]
    assert ids("É") == [vocabulary["Ã©"]]
    assert ids("<|EndOfText|>") == [vocabulary[w] for w in "< | end of text | >".split()]  # no special meaning
    assert ids("a" + " cat" * 126) == [vocabulary["a"]] + [vocabulary["Ġcat"]] * 126
    assert ids("a" + " cat" * 200) == [vocabulary["a"]] + [vocabulary["Ġcat"]] * 127  # cut, not refused


def test_padding_is_replaced_and_is_seen(glide):
    """What stands under the padding has no effect; that there is padding has."""
    net, (ids, mask) = glide.base, glide.tokens(["a cat"])
    with torch.no_grad():
        states, vector = net.encode(ids, mask)
        other, other_vector = net.encode(torch.where(mask, ids, 3), mask)
        longer, longer_vector = net.encode(*glide.tokens(["a cat "]))
    assert torch.equal(states, other) and torch.equal(vector, other_vector)
    assert not torch.allclose(vector, longer_vector, atol=1e-5)
    assert not torch.allclose(states[:, 0], longer[:, 0], atol=1e-6)  # no mask: the first place sees all others


# ---- precision -----------------------------------------------------------------------------------


def test_bf16_keeps_norms_and_output_in_float32(folder, glide):
    low = G.load_glide(folder, "cpu", "bf16", SIDE)
    for net, exact in ((low.base, glide.base), (low.upsampler, glide.upsampler)):
        kinds = {name: p.dtype for name, p in net.named_parameters()}
        full = {name for name, kind in kinds.items() if kind == torch.float32}
        unet = {name for name in full if name.startswith("unet.")}
        assert {name.split(".")[-2] for name in unet} == {"norm1", "norm2", "group_norm", "conv_norm_out", "conv_out"}
        assert {name for name in kinds if name.startswith("text.")} == full - unet
        assert set(kinds.values()) == {torch.float32, torch.bfloat16}

        g = torch.Generator().manual_seed(0)
        x, small = torch.randn(2, 3, 32, 32, generator=g), torch.rand(2, 3, 8, 8, generator=g)
        small = small if net.settings.inputs == 6 else None
        outputs, normalised = [], set()
        for module in net.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.register_forward_hook(lambda _, args, out, seen=normalised: seen.add(args[0].dtype))
        for n in (net, exact):
            with torch.no_grad():
                outputs.append(n(x, 300, n.encode(*glide.tokens(["a cat", ""])), small))
        (eps, v), (eps_exact, v_exact) = outputs
        assert eps.dtype == v.dtype == torch.float32 and normalised == {torch.float32}
        assert not torch.equal(eps, eps.bfloat16().float())  # the last layer's digits are not cut
        assert (eps - eps_exact).pow(2).mean().sqrt() < 0.05 * eps_exact.std()
        assert (v - v_exact).pow(2).mean().sqrt() < 0.05 * v_exact.std()
    assert low.sample(["a cat"], [1], kept=torch.tensor([10, 500])).shape == (1, 3, 64, 64)


# ---- files ---------------------------------------------------------------------------------------


def refused(folder, *words, device="meta"):
    with pytest.raises(UserError) as caught:
        G.load_glide(folder, device, side=SIDE)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400 and all(word in text for word in words), text


@pytest.mark.parametrize("file", ["base.pt", "upsample.pt", "vocab.json", "merges.txt"])
def test_missing_files_are_named(copy, file):
    (copy / file).unlink()
    refused(copy, str(copy / file), "gpt2" if "." in file and file[0] in "vm" else "openaipublic")
    (copy / file).mkdir()
    refused(copy, str(copy / file))


def test_missing_folder_is_named(tmp_path):
    refused(tmp_path / "none", f"{tmp_path / 'none'}: no such folder", "base.pt")
    refused("~nobody-here/glide", "nobody-here", "no such folder")


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("name", ["base", "upsample"])
def test_cut_and_foreign_weights_are_refused(copy, name, device):
    file = copy / f"{name}.pt"
    whole, state = file.read_bytes(), torch.load(file, weights_only=True)
    for damaged in (whole[: len(whole) // 2], whole[:-30], b"", b"<html>404</html>"):
        file.write_bytes(damaged)
        refused(copy, file.name, "openaipublic", device=device)

    def without(part):
        return {key: tensor for key, tensor in state.items() if part not in key}

    for other in (
        {"weight": torch.zeros(3)},
        {**state, "stranger.weight": torch.zeros(3)},
        {**state, "final_ln.bias": torch.zeros(3)},
        {**state, "positional_embedding": torch.zeros(3)},
        without("output_blocks"),
        without("output_blocks.1."),
        without("middle_block.1.qkv.bias"),
        [torch.zeros(3)],
        {"state_dict": state},
        torch.zeros(3),
    ):
        torch.save(other, file)
        refused(copy, file.name, "openaipublic", device=device)


def test_networks_in_each_others_place_are_refused(copy):
    (copy / "base.pt").rename(copy / "other.pt")
    (copy / "upsample.pt").rename(copy / "base.pt")
    (copy / "other.pt").rename(copy / "upsample.pt")
    refused(copy, "base.pt", "6 input channels in place of 3")


class Harm:
    """A pickle that would run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_that_run_code_are_refused(copy):
    torch.save({"a": Harm(copy / "harm")}, copy / "base.pt")
    refused(copy, "base.pt")
    (copy / "base.pt").write_bytes(pickle.dumps(Harm(copy / "harm"), protocol=2))
    refused(copy, "base.pt")
    assert not (copy / "harm").exists()


def test_old_and_half_precision_files_are_read(copy, glide):
    state = torch.load(copy / "base.pt", weights_only=True)
    torch.save(state, copy / "base.pt", _use_new_zipfile_serialization=False)
    old = G.load_glide(copy, "cpu").base.state_dict()
    assert all(torch.equal(tensor, old[key]) for key, tensor in glide.base.state_dict().items())
    torch.save({key: tensor.half() for key, tensor in state.items()}, copy / "base.pt")
    assert {p.dtype for p in G.load_glide(copy, "cpu").base.parameters()} == {torch.float32}


def test_converted_files_hold_the_same_and_come_first(copy, glide):
    G.convert(copy)
    for name in ("base", "upsample"):
        (copy / f"{name}.pt").write_bytes(b"no longer needed")
    again = G.load_glide(copy, "cpu", side=SIDE)
    for ours, theirs in ((again.base, glide.base), (again.upsampler, glide.upsampler)):
        assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in theirs.state_dict().items())
    whole = (copy / "base.safetensors").read_bytes()
    (copy / "base.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(copy, "base.safetensors")


@pytest.mark.parametrize(("file", "text"), [("vocab.json", "{"), ("vocab.json", "[]"), ("merges.txt", "one\ntwo\n")])
def test_a_damaged_vocabulary_is_refused(copy, file, text):
    (copy / file).write_text(text)
    refused(copy, str(copy), "vocab.json")


def test_a_vocabulary_that_is_too_large_is_refused(copy):
    tiny_glide.write_gpt2(copy)
    refused(copy, "vocab.json", "50257", "257")


def test_checking_reads_no_weights(folder):
    glide = G.load_glide(folder, "meta")
    assert {p.device.type for net in (glide.base, glide.upsampler) for p in net.parameters()} == {"meta"}


# ---- sampling ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def equations():
    return load_file(GOLDEN_DIR / "synthetic_recognition.safetensors")


def relative(a, b):
    assert a.dtype == b.dtype == torch.float64
    assert ((a - b) / b).abs().max() <= 1e-10


def test_schedules_match_golden(equations):
    kept = sampler.kept_timesteps()
    assert torch.equal(kept, equations["sched.base.timestep_map"])
    s = sampler.respaced(sampler.cosine_alphas(), kept)
    relative(s["abar"], equations["sched.base.alphas_cumprod"])
    relative(s["beta"], equations["sched.base.betas"])
    relative(s["log_variance"], equations["sched.base.posterior_log_variance_clipped"])
    assert torch.equal(sampler.fast27(), equations["sched.up.timestep_map"])
    up = sampler.respaced(sampler.linear_alphas(), sampler.fast27())
    relative(up["abar"], equations["sched.up.alphas_cumprod"])


def test_ancestral_loop_matches_golden(equations):
    g, r = equations, equations["loop.r"].item()
    s = sampler.respaced(sampler.cosine_alphas(), sampler.kept_timesteps()[:r])
    noises = iter(g["loop.noises"][:, : len(g["loop.samples"])])
    abar = s["abar"][-1]
    x = abar.sqrt() * g["rg.ref"] + (1 - abar).sqrt() * next(noises)

    def denoise(x, t):
        wave = 0.1 * math.sin(2 * math.pi * t / 1000)
        eps_c, eps_u = (0.9 * x).tanh() + wave, (0.4 * x).tanh() + wave
        return eps_u + 3 * (eps_c - eps_u), 0.5 * x.tanh()

    close(sampler.reverse(denoise, x, s, lambda: next(noises), clamp=True), g["loop.samples"], 1e-5)


def test_upsampler_loop_matches_golden(equations):
    g = equations
    low = sampler.quantised(g["loop.samples"])
    close(low, g["up.low_res"], 1e-6)
    noise = g["up.unit_noise"]
    u = torch.nn.functional.interpolate(low, noise.shape[-2:], mode="bilinear", align_corners=False)
    s = sampler.respaced(sampler.linear_alphas(), sampler.fast27())

    def denoise(x, t):
        return (x - 0.5 * u).tanh() + 0.05 * t / 1000, None

    close(sampler.reverse(denoise, G.TEMPERATURE * noise, s, clamp=True), g["up.samples"], 1e-4)
    assert torch.equal(sampler.as_uint8(g["up.samples"]), g["up.uint8"])
    assert sampler.as_uint8(torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5])).tolist() == [0, 0, 128, 255, 255]


def plain_sample(glide, prompt, seed, w, kept, reference=None):
    """One image by a loop written out from the paper's description, in float64 but for the networks.

    -> the base's image and the upsampler's [3, ...], both in [-1, 1]
    """
    g = torch.Generator().manual_seed(seed)

    def abar_of_base(t):
        def f(u):
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        product = 1.0
        for k in range(t + 1):
            product *= 1 - min(0.999, 1 - f((k + 1) / 1000) / f(k / 1000))
        return product

    def output(net, x, t, prompt, low=None):
        with torch.no_grad():
            eps, v = net(x.float(), t, net.encode(*glide.tokens([prompt])), low)
        return eps.double(), v.double()

    x = torch.randn(3, SIDE, SIDE, generator=g)[None].double()
    abars = [1.0, *(abar_of_base(t) for t in kept)]
    if reference is not None:
        x = math.sqrt(abars[-1]) * reference + math.sqrt(1 - abars[-1]) * x
    for i in range(len(kept), 0, -1):
        (eps_c, v), (eps_u, _) = output(glide.base, x, kept[i - 1], prompt), output(glide.base, x, kept[i - 1], "")
        eps = (1 - w) * eps_u + w * eps_c
        abar, prev = abars[i], abars[i - 1]
        alpha = abar / prev
        x0 = ((x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)).clamp(-1, 1)
        noise = torch.randn(3, SIDE, SIDE, generator=g)
        mean = math.sqrt(prev) * (1 - alpha) / (1 - abar) * x0 + math.sqrt(alpha) * (1 - prev) / (1 - abar) * x
        if i == 1:
            x = mean
            break
        least = (1 - alpha) * (1 - prev) / (1 - abar)
        log_variance = (v + 1) / 2 * math.log(1 - alpha) + (1 - v) / 2 * math.log(least)
        x = mean + (log_variance / 2).exp() * noise
    small = x

    low = (((small + 1) * 127.5).round() / 127.5 - 1).float()
    x = 0.997 * torch.randn(3, 4 * SIDE, 4 * SIDE, generator=g)[None].double()
    steps = [0, 22, 44, 66, 88, 111, 133, 155, 177, 199, 200, 222, 244, 266, 288, 311, 333, 355, 377, 399, 400, 500]
    steps += [599, 600, 799, 800, 997]
    abars = [1.0]
    for t in steps:
        abars.append(math.prod(1 - (1e-4 + k / 999 * (0.02 - 1e-4)) for k in range(t + 1)))
    for i in range(len(steps), 0, -1):
        eps, _ = output(glide.upsampler, x, steps[i - 1], prompt, low)
        x0 = ((x - math.sqrt(1 - abars[i]) * eps) / math.sqrt(abars[i])).clamp(-1, 1)
        eps = (x - math.sqrt(abars[i]) * x0) / math.sqrt(1 - abars[i])
        x = math.sqrt(abars[i - 1]) * x0 + math.sqrt(1 - abars[i - 1]) * eps
    return small[0], x[0]


def same_picture(picture, exact):
    """uint8 against [-1, 1]: off by one level at most, and in few places."""
    difference = (picture.int() - ((exact + 1) * 127.5).round().clamp(0, 255).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01


PROMPTS, SEEDS = ["a photo of a highway", "a lake"], [11, 12]
R15 = [round(k * 999 / 99) for k in range(15)]


def references():
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5)) * 2 - 1


def noised(noise, abar):
    """Real Guidance's start for `references`."""
    return abar.sqrt() * references() + (1 - abar).sqrt() * noise


def test_real_guidance_with_r_15_matches_a_plain_loop(glide, monkeypatch):
    small = []
    whole = glide.enlarged
    monkeypatch.setattr(glide, "enlarged", lambda x, *rest: (small.append(x), whole(x, *rest))[1])
    pictures = glide.sample(PROMPTS, SEEDS, 3.0, torch.tensor(R15), noised)
    assert pictures.shape == (2, 3, 4 * SIDE, 4 * SIDE) and pictures.dtype == torch.uint8
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        exact_small, exact = plain_sample(glide, prompt, seed, 3.0, R15, references()[i])
        close(small[0][i], exact_small, 1e-4)
        same_picture(pictures[i], exact)


def test_text_to_image_matches_a_plain_loop(glide):
    kept = [0, 30, 343, 800, 999]
    (picture,) = glide.sample(PROMPTS[:1], SEEDS[:1], 1.5, torch.tensor(kept))
    same_picture(picture, plain_sample(glide, PROMPTS[0], SEEDS[0], 1.5, kept)[1])


def test_the_paper_settings_are_the_defaults(glide, monkeypatch):
    seen = {"base": [], "upsampler": []}

    def recorder(name):
        def forward(x, t, text, low=None):
            seen[name].append((t, len(x), low is not None))
            return torch.zeros_like(x), torch.zeros_like(x)

        return forward

    for name in seen:
        monkeypatch.setattr(getattr(glide, name), "forward", recorder(name))
    guidance = []
    guided = glide.guided_base
    monkeypatch.setattr(glide, "guided_base", lambda prompts, w: (guidance.append(w), guided(prompts, w))[1])
    glide.sample(PROMPTS, SEEDS)
    assert seen["base"] == [(round(k * 999 / 99), 4, False) for k in reversed(range(100))]
    assert [t for t, *_ in seen["upsampler"]] == sampler.fast27().tolist()[::-1]
    assert all(n == 2 and low for _, n, low in seen["upsampler"]) and guidance == [3.0]


def test_an_image_is_a_function_of_its_prompt_and_seed(glide):
    """... and, in the last bits, of its place among those that are drawn at a time."""
    kept = torch.tensor([5, 300, 990])
    one = glide.sample(["a cat", "a dog"], [1, 1], kept=kept).int()
    two = glide.sample(["a cat", "a cat"], [7, 1], kept=kept).int()
    assert (one[0] - two[1]).abs().max() <= 1
    assert (one[0] - one[1]).abs().max() > 10 and (two[0] - two[1]).abs().max() > 10


def test_guidance_1_is_the_prompt_alone(glide):
    """w = 1: the empty prompt has no part; w = 0: the prompt has none but in v."""
    x = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = {prompt: glide.base(x, 500, glide.base.encode(*glide.tokens([prompt]))) for prompt in ("a cat", "")}
        for w, prompt in ((1.0, "a cat"), (0.0, "")):
            eps, v = glide.guided_base(["a cat"], w)(x, 500)
            close(eps, plain[prompt][0], 1e-5)
            close(v, plain["a cat"][1], 1e-5)
    assert not torch.allclose(plain["a cat"][0], plain[""][0], atol=1e-4)
    assert not torch.allclose(plain["a cat"][1], plain[""][1], atol=1e-4)


def test_more_steps_leave_the_reference_further_behind(glide, monkeypatch):
    monkeypatch.setattr(glide, "enlarged", lambda small, *rest: small)
    distances = []
    for r in (5, 20, 50):
        small = glide.sample(PROMPTS, SEEDS, kept=sampler.kept_timesteps()[:r], start=noised)
        distances.append((small - references()).pow(2).mean().item())
    assert distances == sorted(distances) and distances[0] < 0.5 * distances[2]


def test_images_that_are_not_finite_are_refused(glide):
    x = torch.zeros(1, 3, SIDE, SIDE)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        glide.enlarged(x, ["a cat"], torch.zeros(1, 3, 4 * SIDE, 4 * SIDE))


def test_the_tiny_glide_is_deterministic(folder, tmp_path):
    again = make_tiny_glide(tmp_path)
    for name in ("base", "upsample"):
        one, two = (torch.load(f / f"{name}.pt", weights_only=True) for f in (folder, again))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_the_merges_are_gpt2s():
    lines = gzip.decompress(tiny_glide.MERGES.read_bytes()).decode().splitlines()
    assert lines[0].startswith("#version") and lines[1] == "Ġ t" and len(lines) == 50001
