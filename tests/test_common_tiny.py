"""The tiny world: quality of the shipped files, agreement of their formats, and the builder itself."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from common.tiny import WEIGHTS, measure
from common.tiny.build import STAGES, build
from common.tiny.card import model_card
from common.tiny.glyphs import NAMES, glyphs, to_float
from common.tiny.tokenizer import CONTEXT, learn_merges, load_tokenizer
from common.tiny.training import Job, fit

os.environ["HF_HUB_OFFLINE"] = "1"
PROMPTS = ["a photo of a seven", "photo of two, a red bold two on a white background, best quality", "", "xyz, Ünk! 42"]
PROMPTS += ["blurry, distorted", " ".join(["a photo of a very long prompt"] * 9)]


# ---- the prior ----


def test_glyphs_are_seeded_and_a_longer_run_begins_the_same():
    x, y, captions = glyphs(30, 5)
    again, labels, texts = glyphs(1200, 5)
    assert x.shape == (30, 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
    assert torch.equal(x, again[:30]) and torch.equal(y, labels[:30]) and captions == texts[:30]
    assert not torch.equal(x, glyphs(30, 6)[0])
    assert torch.bincount(labels, minlength=10).min() > 90  # classes are balanced


def test_glyphs_are_those_of_the_shipped_models():
    """Models and glyphs belong together: these values are of the build that made common/tiny_weights."""
    x, y, captions = glyphs(6, 5)
    assert y.tolist() == [8, 3, 3, 5, 2, 9]
    assert captions[:3] == [
        "a photo of the number eight",
        "a photo of a black number three on a orange background",
        "a photo of a white bold italic number three, best quality",
    ]
    brightness = torch.tensor([50.36, 129.44, 83.89, 33.41, 100.77, 115.47])  # other releases of a font differ little
    assert torch.allclose(x.float().mean((1, 2, 3)), brightness, atol=1)


def test_the_folder_of_the_weights_is_known_without_torch():
    code = "import sys, common.tiny; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=WEIGHTS.parents[1], check=True)


def test_captions_name_their_digit():
    _, y, captions = glyphs(500, 1)
    named = [NAMES[k] in text.replace(",", "").split() for k, text in zip(y.tolist(), captions, strict=True)]
    assert sum(named) / len(named) > 0.97  # a few describe only the bad quality: "blurry, distorted"


def test_glyphs_refuses_nothing():
    with pytest.raises(ValueError, match="at least one"):
        glyphs(0, 0)


# ---- formats ----


def test_size_and_no_pickle():
    files = [f for f in WEIGHTS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 12e6
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".gz", ".md", ".jpg"}
    for folder in ("sd/vae", "sd/unet", "sd/text_encoder", "clip", "clip_hf", "k2t", "captioner"):
        assert list((WEIGHTS / folder).glob("*.safetensors")), folder


@pytest.fixture(scope="module")
def clip():
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{WEIGHTS / 'clip'}")
    tokenizer = open_clip.tokenizer.SimpleTokenizer(
        bpe_path=str(WEIGHTS / "clip" / "bpe.txt.gz"), context_length=CONTEXT
    )
    return model.eval(), tokenizer, preprocess


def test_both_tokenizers_give_the_same_ids(clip):
    _, captions = glyphs(300, 2)[1:]
    texts = PROMPTS + captions
    ours, theirs = load_tokenizer(WEIGHTS)(texts), clip[1](texts)
    end = int(theirs.max())
    # transformers pads with the end token, open_clip with 0: equal up to and including the first end token.
    inside = (theirs == end).cumsum(1) - (theirs == end).long() == 0
    assert torch.equal(ours[inside], theirs[inside])
    assert (ours[~inside] == end).all() and (ours[:, 0] == end - 1).all()


def test_text_encoder_is_the_text_tower_of_clip(clip):
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(WEIGHTS / "sd" / "text_encoder", dtype=torch.float32).eval()
    with torch.no_grad():
        pooled = encoder(load_tokenizer(WEIGHTS)(PROMPTS)).pooler_output @ clip[0].text_projection
        assert torch.allclose(pooled, clip[0].encode_text(clip[1](PROMPTS)), atol=1e-4)


def test_clip_hf_is_clip(clip):
    from PIL import Image
    from transformers import AutoImageProcessor, CLIPModel

    model = CLIPModel.from_pretrained(WEIGHTS / "clip_hf", dtype=torch.float32).eval()
    picture = Image.fromarray(glyphs(1, 3)[0][0].permute(1, 2, 0).numpy())
    processor = AutoImageProcessor.from_pretrained(WEIGHTS / "clip_hf")
    pixels = processor(picture, return_tensors="pt").pixel_values
    assert torch.allclose(pixels[0], clip[2](picture), atol=1e-5)
    with torch.no_grad():
        ids = load_tokenizer(WEIGHTS)(PROMPTS)
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
        text = clip[0].encode_text(clip[1](PROMPTS), normalize=True)
        image = clip[0].encode_image(pixels, normalize=True)
    assert torch.allclose(out.text_embeds, text, atol=1e-4) and torch.allclose(out.image_embeds, image, atol=1e-4)
    assert torch.allclose(out.logits_per_image, clip[0].logit_scale.exp() * image @ text.T, atol=1e-2)


def test_plain_from_pretrained_computes_in_float32():
    from transformers import AutoModelForSeq2SeqLM

    assert AutoModelForSeq2SeqLM.from_pretrained(WEIGHTS / "k2t").dtype == torch.float32


def test_latents_have_unit_variance_at_the_stock_factor():
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(WEIGHTS / "sd" / "vae")
    assert vae.config.scaling_factor == pytest.approx(0.18215)
    with torch.no_grad():
        z = vae.encode(to_float(measure.held_out(400)[0])).latent_dist.mean * vae.config.scaling_factor
    assert z.mean((0, 2, 3)).abs().max() < 0.15 and (z.std((0, 2, 3)) - 1).abs().max() < 0.15


# ---- quality, measured on the shipped files ----


def reaches(figures, *names):
    for name in names:
        assert figures[name] >= measure.TARGETS[name], f"{name} is {figures[name]:.4g}, wanted {measure.TARGETS[name]}"


def test_vae_quality():
    reaches(measure.measure_vae(WEIGHTS, n=300), "vae_psnr_prior", "vae_psnr_real")


def test_clip_quality():
    reaches(measure.measure_clip(WEIGHTS), "clip_zero_shot_prior", "clip_zero_shot_real")


def test_k2t_keeps_the_keyword_and_varies():
    figures = measure.measure_k2t(WEIGHTS)
    reaches(figures, "k2t_keyword_kept")
    assert figures["k2t_distinct"] > 0.5


def test_captioner_names_the_digit():
    reaches(measure.measure_captioner(WEIGHTS, n=400), "captioner_digit_prior")


def test_clip_sees_the_prompted_digit_in_the_samples(clip):
    """A quick look at 200 samples; CLIP itself is right on 97 % of the glyphs that it was trained for."""
    x, y = measure.draw_samples(WEIGHTS, 20)
    with torch.no_grad():
        text = clip[0].encode_text(clip[1]([f"a photo of a {name}" for name in NAMES]), normalize=True)
        image = clip[0].encode_image(to_float(x), normalize=True)
    assert ((image @ text.T).argmax(1) == y).float().mean() >= 0.9


@pytest.mark.slow
def test_samples_are_as_good_as_the_card_says():
    stated = json.loads((WEIGHTS / "quality.json").read_text())["figures"]
    sampled = measure.measure_sd(WEIGHTS)[0]
    for name in ("sd_obedience", "sd_classifier_prior", "sd_classifier_real"):
        assert sampled[name] >= stated[name] - 0.03, name  # another processor rounds otherwise


def test_the_card_reaches_every_target():
    reaches(json.loads((WEIGHTS / "quality.json").read_text())["figures"], *measure.TARGETS)


def test_the_card_states_the_measured_figures():
    quality = json.loads((WEIGHTS / "quality.json").read_text())
    assert quality["budget_scale"] == 1 and set(quality["targets"]) <= set(quality["figures"])
    assert (WEIGHTS / "README.md").read_text() == model_card(quality)


# ---- the builder ----


def test_merges_are_plain_byte_pair_encoding():
    from collections import Counter

    merges = learn_merges(Counter({"aab": 3, "ab": 2}), 3)
    assert merges == [("a", "b</w>"), ("a", "ab</w>")]


def test_fit_continues_bit_for_bit(tmp_path):
    def run(folder, stop_at=None):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)

        def loss_at(step, g):
            if step == stop_at:
                raise KeyboardInterrupt
            return net(torch.randn(8, 3, generator=g)).square().mean()

        fit(Job(folder, folder, scale=0.02), "k2t", net, loss_at, lr=1e-2, every=0.0)
        return net.weight

    straight = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop_at=13)
    assert torch.equal(run(tmp_path / "b"), straight)


def test_a_work_folder_of_another_recipe_is_refused(tmp_path):
    build(Job(tmp_path, tmp_path, scale=0.01), stages=[])
    with pytest.raises(SystemExit, match="another recipe"):
        build(Job(tmp_path, tmp_path, scale=0.02), stages=[])


def test_a_stage_without_its_inputs_says_which_to_run(tmp_path):
    with pytest.raises(SystemExit, match="--stages tokenizer"):
        build(Job(tmp_path, tmp_path, scale=0.01), stages=["unet"])


@pytest.mark.slow
def test_short_build_survives_kills_and_is_on_its_way(tmp_path):
    """A build with 2 % of the steps, killed at random moments, ends with falling losses and loadable files."""
    command = [sys.executable, "-m", "common.tiny", "--budget-scale", "0.02"]
    command += ["--out", str(tmp_path / "out"), "--work-dir", str(tmp_path / "work")]
    root, rng = WEIGHTS.parents[1], random.Random(0)
    for reached in ("corpus.safetensors", "stages/vae.json", "stages/clip.json", "stages/unet.json"):
        process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / "work" / reached).exists():
            time.sleep(0.2)
        time.sleep(rng.uniform(0, 10))
        assert process.poll() is None, f"the build ended with {process.returncode} before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, cwd=root, check=True)
    for name in ("vae", "clip", "unet", "k2t", "captioner"):
        curve = json.loads((tmp_path / "work" / "stages" / f"{name}.json").read_text())["curve"]
        assert curve[-1][1] < 0.9 * curve[0][1], f"{name}: loss {curve[0][1]} -> {curve[-1][1]}"
    assert json.loads((tmp_path / "out" / "quality.json").read_text())["figures"]["vae_psnr_prior"] > 10
    again = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    assert again.count("done, skipped") == len(STAGES)
