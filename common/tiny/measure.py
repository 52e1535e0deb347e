"""[7] measure: every figure of the model card, from the files written, on held-out glyphs and real test digits."""

import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common.tiny.glyphs import NAMES, glyphs, real_digits, seeded, to_float, to_uint8
from common.tiny.tokenizer import load_tokenizer

TARGETS = {
    "vae_psnr_prior": 25.0,
    "vae_psnr_real": 25.0,
    "clip_zero_shot_prior": 0.97,
    "clip_zero_shot_real": 0.65,
    "k2t_keyword_kept": 0.99,
    "captioner_digit_prior": 0.95,
    "sd_obedience": 0.95,
    "sd_classifier_prior": 0.90,
    "sd_classifier_real": 0.62,
}


def held_out(n):
    """Prior glyphs that no training stage has seen, whatever its seed."""
    return glyphs(n, "held-out")


def train_classifier(x, y, steps, seed=0):
    """A small convolutional network on uint8 [n, 3, 32, 32] and labels -> function uint8 images -> predicted labels."""
    rng = torch.random.get_rng_state()
    torch.manual_seed(seed)

    def block(i, o, stride):
        return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

    body = [block(3, 32, 2), block(32, 64, 2), block(64, 64, 1), block(64, 128, 2), block(128, 128, 1)]
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        i = torch.randint(0, len(x), (64,))
        affine = torch.eye(2, 3) + torch.cat([torch.randn(64, 2, 2) * 0.08, torch.randn(64, 2, 1) * 0.06], 2)
        grid = F.affine_grid(affine, (64, 3, 32, 32), align_corners=False)
        batch_x = F.grid_sample(to_float(x[i]), grid, padding_mode="border", align_corners=False)
        loss = F.cross_entropy(net(batch_x), y[i], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    torch.random.set_rng_state(rng)

    @torch.no_grad()
    def predict(images):
        return torch.cat([net(to_float(part)).argmax(1) for part in images.split(500)])

    return predict


def measure_vae(out, n=500):
    """Mean-latent reconstruction, dB of the mean squared error over all pictures -> dict."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(Path(out) / "sd" / "vae", dtype=torch.float32).eval()
    result = {}
    for name, x in (("prior", held_out(n)[0]), ("real", real_digits()[1][0][:n])):
        with torch.no_grad():
            y = torch.cat([vae.decode(vae.encode(to_float(p)).latent_dist.mean).sample for p in x.split(100)])
        mse = F.mse_loss(to_uint8(y).float() / 255, x.float() / 255).item()
        result[f"vae_psnr_{name}"] = -10 * math.log10(mse)
    return result


def measure_clip(out, n=2000):
    """Zero-shot accuracy of clip/ with the one template "a photo of a {}" -> dict."""
    import open_clip

    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{Path(out).resolve() / 'clip'}")
    ids = load_tokenizer(Path(out))([f"a photo of a {name}" for name in NAMES])
    result = {}
    with torch.no_grad():
        text = clip.eval().encode_text(ids, normalize=True)
        for name, (x, y) in (("prior", held_out(n)[:2]), ("real", real_digits()[1])):
            image = torch.cat([clip.encode_image(to_float(p), normalize=True) for p in x.split(250)])
            result[f"clip_zero_shot_{name}"] = ((image @ text.T).argmax(1) == y).float().mean().item()
    return result


def measure_k2t(out, per_class=50):
    """Share of sampled sentences (temperature 1, top-k 50) that hold the keyword, and how many differ -> dict."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    folder = Path(out) / "k2t"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = [f"a {name}" if i % 2 else name for i in range(per_class) for name in NAMES]
    rng = torch.random.get_rng_state()
    torch.manual_seed(0)
    inputs = tokenizer(words, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=True, top_k=50, max_new_tokens=24)
    torch.random.set_rng_state(rng)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    kept = [w.split()[-1] in t.split() for w, t in zip(words, texts, strict=True)]
    return {"k2t_keyword_kept": sum(kept) / len(kept), "k2t_distinct": len(set(texts)) / len(texts)}


def caption_images(out, images):
    """Greedy captions of uint8 images [n, 3, 32, 32] by captioner/, through transformers' Auto classes -> list[str]."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = Path(out) / "captioner"
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    texts = []
    for part in images.split(100):
        pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in part]
        ids = model.generate(**processor(images=pictures, return_tensors="pt"), max_new_tokens=16, do_sample=False)
        texts += [t.strip() for t in processor.batch_decode(ids, skip_special_tokens=True)]
    return texts


def measure_captioner(out, n=500):
    """Share of captions that name the right digit and no other -> dict."""
    result = {}
    for name, (x, y) in (("prior", held_out(n)[:2]), ("real", real_digits()[1])):
        texts = caption_images(out, x[:n])
        named = [[w for w in t.split() if w in NAMES] == [NAMES[k]] for t, k in zip(texts, y.tolist(), strict=False)]
        result[f"captioner_digit_{name}"] = sum(named) / len(named)
    return result


def draw_samples(out, per_class, device="cpu", steps=15, guidance=2.0):
    """Prompt "a photo of a {class}", one seed each -> uint8 [10 * per_class, 3, 32, 32], labels.

    The stock pipeline with DPM-Solver++, which needs the fewest steps and is what the scripts' miniature uses.
    """
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(Path(out) / "sd", dtype=torch.float32).to(device)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    labels, images = torch.arange(10 * per_class) % 10, []
    for part in tqdm(labels.split(100), desc="samples", unit="100 pictures"):
        prompts = [f"a photo of a {NAMES[k]}" for k in part]
        generators = [seeded("samples", len(images), i) for i in range(len(part))]
        settings = dict(num_inference_steps=steps, guidance_scale=guidance, height=32, width=32, output_type="pt")
        result = pipe(prompts, generator=generators, **settings)
        images.append((result.images * 255).round().to(torch.uint8).cpu())
    return torch.cat(images), labels


def measure_sd(out, device="cpu", per_class=100):
    """Obedience seen by a judge trained on glyphs, and a classifier trained on the samples alone -> dict, samples."""
    x, y = draw_samples(out, per_class, device)
    judge_x, judge_y, _ = glyphs(8000, "judge")
    judge = train_classifier(judge_x, judge_y, 800)
    prior_x, prior_y, _ = held_out(2000)
    real_x, real_y = real_digits()[1]
    student = train_classifier(x, y, 800)  # 400 steps leave it short of what the pictures allow
    seen = judge(x) == y
    result = {
        "judge_on_prior": (judge(prior_x) == prior_y).float().mean().item(),
        "judge_on_real": (judge(real_x) == real_y).float().mean().item(),
        "sd_obedience": seen.float().mean().item(),
        "sd_obedience_by_class": [round(seen[y == k].float().mean().item(), 3) for k in range(10)],
        "sd_classifier_prior": (student(prior_x) == prior_y).float().mean().item(),
        "sd_classifier_real": (student(real_x) == real_y).float().mean().item(),
    }
    return result, x
