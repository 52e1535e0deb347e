"""The model card: the text of common/tiny_weights/README.md and its contact sheet."""

import torch
import torch.nn.functional as F

from common.tiny.training import corpus_size


def save_grid(images, labels, path):
    """JPEG contact sheet, one row per class, twelve columns; small, since the folder has a limit of 12 MB."""
    from PIL import Image

    rows = torch.stack([images[labels == k][:12] for k in range(10)])  # [10, 12, 3, 32, 32]
    sheet = F.pad(rows, (1, 1, 1, 1), value=255).permute(0, 3, 1, 4, 2).reshape(10 * 34, 12 * 34, 3)
    Image.fromarray(sheet.numpy()).save(path, format="JPEG", quality=85)


CARD = """---
license: mit
library_name: diffusers
---
# The tiny world

Small models in the file formats of Stable Diffusion, CLIP, T5 and GIT, really trained, so that every script of
CleanSynth runs anywhere without network. `python -m common.tiny` wrote them (seed {seed}, budget scale {budget_scale}),
this card too.

![samples of "a photo of a {{class}}", one row per class](samples.jpg)

## Quality
Measured on the fp16 files of this folder. "prior": glyphs that training never saw. "real": the 797 test digits of
scikit-learn's `load_digits`; the real digits were never used to build, tune or choose anything here.

| figure | reached | wanted | met |
|---|---|---|---|
{rows}
{missed}
Zero-shot and samples use the one prompt "a photo of a {{class}}"; samples: DPM-Solver++, 15 steps,
guidance 2, 100 per class.
The classifiers and the judge are small convolutional networks; the judge itself scores {judge_prior:.1%} on prior
glyphs and {judge_real:.1%} on real digits. Samples in which it sees the prompted class, zero to nine:
{by_class}. Single seeds throughout.

## Contents
| folder | what | how it loads |
|---|---|---|
| `sd/` | AutoencoderKL to 8x8x4, UNet2DConditionModel (64, 96), CLIPTextModel, DDIM | `StableDiffusionPipeline` |
| `clip/` | ViT patch 8, width 96, 4 layers; text width 64, 2 layers; embedding 64 | `open_clip`, `local-dir:` |
| `clip_hf/` | the same weights | `CLIPModel.from_pretrained` |
| `k2t/` | T5, keywords to a caption | `AutoModelForSeq2SeqLM` |
| `captioner/` | GIT on CLIP's image tower | `AutoProcessor`, `AutoModelForImageTextToText` |

The pipeline's text encoder is CLIP's text tower. Trap: `open_clip.get_tokenizer("local-dir:...")` returns the stock
tokenizer; use `open_clip.tokenizer.SimpleTokenizer(bpe_path=".../clip/bpe.txt.gz", context_length=24)`.

## How it was made
{corpus} pictures of digits, 32x32, drawn with 21 fonts: affine and elastic warps, stroke widths, blur, light, colours
mostly near grey; captions from a small grammar. fp32, AdamW, cosine decay, averaged weights:

| stage | steps | last loss | seconds |
|---|---|---|---|
{stages}

Seconds are wall clock on the machine that built it, whatever else ran there.

## Use, limits, licence
For tests, teaching and method development at toy scale. It knows ten digits and the words of its captions, nothing
else; numbers obtained with it say nothing about full-size models. Other prompts give some digit or a smear.
The fonts are DejaVu (Bitstream Vera licence), STIX (SIL Open Font License) and Computer Modern (BaKoMa), as matplotlib
ships them; no font file is contained here. The weights carry the licence of this project, MIT.
"""


def model_card(quality):
    """The text of README.md from the dict that quality.json holds."""
    figures = quality["figures"]

    def shown(name, value):
        return f"{value:.1f} dB" if "psnr" in name else f"{value:.1%}"

    rows = []
    for k, target in quality["targets"].items():
        verdict = "yes" if figures[k] >= target else "**no**"
        rows.append(f"| {LABELS[k]} | {shown(k, figures[k])} | {shown(k, target)} | {verdict} |")
    rows.append(f"| {LABELS['captioner_digit_real']} | {figures['captioner_digit_real']:.1%} | - | - |")
    missed = [k for k, target in quality["targets"].items() if figures[k] < target]
    undertrained = bool(missed) and all(k.startswith("sd_") for k in missed)
    build = quality["build"].items()
    stages = [f"| {k} | {v.get('steps', '-')} | {v.get('loss', '-')} | {v['seconds']:.0f} |" for k, v in build]
    return CARD.format(
        seed=quality["seed"],
        budget_scale=quality["budget_scale"],
        rows="\n".join(rows),
        missed="\nThe figures that are not met all come from the U-Net; more steps were still helping.\n"
        * undertrained,
        stages="\n".join(stages),
        judge_prior=figures["judge_on_prior"],
        judge_real=figures["judge_on_real"],
        by_class=", ".join(f"{v:.0%}" for v in figures["sd_obedience_by_class"]),
        corpus=f"{corpus_size(quality['budget_scale']):,}",
    )


LABELS = {
    "vae_psnr_prior": "autoencoder, prior",
    "vae_psnr_real": "autoencoder, real",
    "clip_zero_shot_prior": "CLIP zero-shot, prior",
    "clip_zero_shot_real": "CLIP zero-shot, real",
    "k2t_keyword_kept": "T5 sentences that hold the keyword",
    "captioner_digit_prior": "captions that name the right digit and no other, prior",
    "captioner_digit_real": "captions that name the right digit and no other, real",
    "sd_obedience": "samples in which a judge trained on glyphs sees the prompted class",
    "sd_classifier_prior": "classifier trained on 1,000 samples, prior",
    "sd_classifier_real": "classifier trained on 1,000 samples, real",
}
