"""The tiny world: small but really trained Stable Diffusion, CLIP, T5 and captioner, so that scripts run anywhere.

All models learn from one procedural "web" of digit pictures with captions, drawn from the fonts that matplotlib ships.
The real digits of scikit-learn, which the scripts adapt to, are never used here except to measure at the end.

    fonts --> [1] tokenizer --> [2] vae  --> [4] unet --> sd/            text-to-image, StableDiffusionPipeline layout
                                [3] clip ----^            clip/ clip_hf/ image and text towers, two file formats
                                [5] k2t                   k2t/           T5, keywords to captions
                                [6] captioner             captioner/     GIT on CLIP's image tower
                                [7] measure               README.md      quality figures, measured on the files written

Run:
    python -m common.tiny                        # writes common/tiny_weights; the same command continues after a kill
    python -m common.tiny --device cuda
    python -m common.tiny --budget-scale 0.02 --out /tmp/world --work-dir /tmp/world-work    # a short rehearsal

Expect:
    the stages of the shipped build took 79 minutes with other programs on the same 2 cores; its time on an idle
    machine was not measured. Figures reached and missed: common/tiny_weights/README.md
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

WEIGHTS = Path(__file__).resolve().parent / "tiny_weights"
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CONTEXT = 24  # tokens in a prompt; the longest caption of the grammar below has 21
WIDTH = 64  # text width = CLIP embedding width: Real-Fake writes an image embedding into a text slot
SCALING = 0.18215  # Stable Diffusion's latent factor; the VAE is rescaled to make it right
CORPUS = 60_000

# ---------------------------------------------------------------------------------------
# The prior: digits in 21 fonts, warped and coloured, with captions.

FONTS = """
DejaVuSans: plain, DejaVuSans-Bold: bold, DejaVuSans-BoldOblique: bold italic, DejaVuSans-Oblique: italic,
DejaVuSansMono: mono, DejaVuSansMono-Bold: bold mono, DejaVuSansMono-BoldOblique: bold italic,
DejaVuSansMono-Oblique: italic, DejaVuSerif: serif, DejaVuSerif-Bold: bold serif,
DejaVuSerif-BoldItalic: bold italic, DejaVuSerif-Italic: italic, STIXGeneral: serif,
STIXGeneralBol: bold serif, STIXGeneralBolIta: bold italic, STIXGeneralItalic: italic, cmb10: bold serif,
cmr10: serif, cmss10: plain, cmti10: italic, cmtt10: mono
"""
# file -> style words of the captions
FONTS = dict(pair.strip().split(": ") for pair in FONTS.split(","))
STYLES = ["plain", "bold", "italic", "bold italic", "mono", "bold mono", "serif", "bold serif", "handwritten"]
HANDWRITTEN = STYLES.index("handwritten")
COLOURS = {
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "white": (245, 245, 245),
    "red": (215, 45, 45),
    "green": (45, 165, 65),
    "blue": (55, 80, 215),
    "yellow": (235, 215, 60),
    "orange": (240, 140, 40),
    "purple": (140, 55, 170),
    "pink": (245, 135, 180),
}
COLOUR_NAMES = list(COLOURS)
SIZES = ["", "small", "large"]
QUALITIES = ["", "blurry", "distorted"]
CANVAS = 64  # glyph masks are drawn at twice the picture's size

_masks = None


def _rng(*parts):
    """CPU generator whose seed depends on every part (ints and strings), the same on each machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _glyph_masks():
    """-> masks float [fonts, 10, CANVAS, CANVAS] in [0, 1] and the style index of each font. Digits 46 pixels high."""
    global _masks
    if _masks is None:
        import matplotlib
        import numpy as np
        from PIL import Image, ImageDraw, ImageFont

        folder, rows = Path(matplotlib.get_data_path()) / "fonts" / "ttf", []
        for file in FONTS:
            for digit in "0123456789":
                image = Image.new("L", (CANVAS, CANVAS), 0)
                draw = ImageDraw.Draw(image)
                _, top, _, bottom = draw.textbbox((0, 0), digit, font=ImageFont.truetype(folder / f"{file}.ttf", 56))
                font = ImageFont.truetype(folder / f"{file}.ttf", int(56 * 46 / max(bottom - top, 1)))
                x0, y0, x1, y1 = draw.textbbox((0, 0), digit, font=font)
                draw.text(((CANVAS - x0 - x1) / 2, (CANVAS - y0 - y1) / 2), digit, fill=255, font=font)
                rows.append(np.array(image))
        stack = torch.from_numpy(np.stack(rows)).float().view(len(FONTS), 10, CANVAS, CANVAS) / 255
        _masks = stack, torch.tensor([STYLES.index(s) for s in FONTS.values()])
    return _masks


def _draw(n, g):
    """n pictures from generator g -> uint8 [n, 3, 32, 32] and attributes int64 [n, 6].

    Attributes are digit, style, ink colour, ground colour, size, quality: indices into NAMES, STYLES, COLOUR_NAMES,
    SIZES, QUALITIES.
    """

    def uniform(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(*shape, generator=g)

    def pick(n_choices):
        return torch.randint(0, n_choices, (n,), generator=g)

    masks, font_style = _glyph_masks()
    digit, font = torch.arange(n)[torch.randperm(n, generator=g)] % 10, pick(len(masks))
    hand = uniform(n) < 0.35  # hand-drawn look: elastic warp and another stroke width
    quality = torch.where(uniform(n) < 0.05, 1 + pick(2), 0)

    shape = masks[font, digit][:, None]  # [n, 1, CANVAS, CANVAS]
    stroke = torch.where(hand, pick(3), (uniform(n) < 0.2).long())
    for level, kernel in ((1, 3), (2, 5)):
        thick = F.max_pool2d(shape, kernel, 1, kernel // 2)
        shape = torch.where((stroke == level)[:, None, None, None], thick, shape)

    angle = uniform(n, low=-1, high=1) * math.radians(18)
    scale = uniform(n, low=0.72, high=1.5)  # larger means a smaller glyph: it scales the sampling grid
    aspect = torch.exp(uniform(n, low=-0.2, high=0.2))
    shear, dx, dy = (uniform(n, low=-0.15, high=0.15), uniform(n, low=-0.2, high=0.2), uniform(n, low=-0.2, high=0.2))
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack(
        [cos * scale * aspect, shear - sin * scale, dx, sin * scale, cos * scale / aspect, dy], 1
    ).view(n, 2, 3)
    grid = F.affine_grid(affine, (n, 1, CANVAS, CANVAS), align_corners=False)
    strength = 0.07 * hand + 0.10 * (quality == 2)
    warp = torch.randn(n, 2, 5, 5, generator=g) * strength[:, None, None, None]
    grid = grid + F.interpolate(warp, (CANVAS, CANVAS), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    shape = F.avg_pool2d(F.grid_sample(shape, grid, align_corners=False), 2)  # [n, 1, 32, 32]

    # Colours are mostly greys; a pair too close in luminance gets a black or white ground instead.
    palette = torch.tensor(list(COLOURS.values())) / 255
    grey = uniform(n) < 0.6
    ink, ground = torch.where(grey, pick(3), pick(10)), torch.where(grey, pick(3), pick(10))
    luma = palette @ torch.tensor([0.3, 0.59, 0.11])
    close = (luma[ink] - luma[ground]).abs() < 0.33
    ground = torch.where(close, torch.where(luma[ink] > 0.45, 0, 2), ground)
    jitter = lambda colour: (palette[colour] + uniform(n, 3, low=-0.08, high=0.08))[..., None, None]  # noqa: E731
    ramp = torch.linspace(-1, 1, 32)
    light = uniform(n, 1, 1, 1, low=-0.1, high=0.1) * ramp[:, None] + uniform(n, 1, 1, 1, low=-0.1, high=0.1) * ramp
    x = (jitter(ground) + light).clamp(0, 1) * (1 - shape) + jitter(ink).clamp(0, 1) * shape

    # Focus: a third are softened, a fifth are enlarged from a low resolution as small pictures on the web often are.
    focus = uniform(n)
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    soft = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)

    def enlarged(size):
        low = F.interpolate(x, (size, size), mode="area")
        return F.interpolate(low, (32, 32), mode="bicubic", align_corners=False)

    x_soft, x_low, x_blurry = soft, enlarged(16), enlarged(10)
    x = torch.where((focus < 0.35)[:, None, None, None], x_soft, x)
    x = torch.where((focus > 0.8)[:, None, None, None], x_low, x)
    x = torch.where((quality == 1)[:, None, None, None], x_blurry, x)
    noise = 0.012 * (uniform(n) < 0.3) + 0.05 * (quality == 2)
    x = x + torch.randn(n, 3, 32, 32, generator=g) * noise[:, None, None, None]

    style = torch.where(hand, HANDWRITTEN, font_style[font])
    size = (scale > 1.28).long() + 2 * (scale < 0.88).long()
    attributes = torch.stack([digit, style, ink, ground, size, quality], 1)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8), attributes


def phrase(attributes, rng):
    """A noun phrase such as "a red bold seven on a white background": the part of a caption that says what is seen.

    attributes: six ints as from _draw; rng: random.Random. Always "a", never "an", as the scripts' templates do.
    """
    digit, style, ink, ground, size, quality = attributes
    details = [SIZES[size] * (rng.random() < 0.3), COLOUR_NAMES[ink] * (rng.random() < 0.6)]
    details.append(STYLES[style] * (style > 0) * (rng.random() < 0.65))
    if quality:
        details.insert(0, QUALITIES[quality])
    kind = rng.choice(["", "", "", "", "", "digit", "number"])
    start = "the" if kind and not any(details) else "a"
    words = " ".join(w for w in [start, *details, kind, NAMES[digit]] if w)
    place = rng.random()
    return words + (f" on a {COLOUR_NAMES[ground]} background" if place < 0.45 else "")


def plain_caption(attributes, rng):
    """A caption that names the digit and nothing else, in the wordings of the scripts' prompts."""
    wordings = [
        "a photo of the digit {}",
        "photo of {}",
        "a picture of the number {}",
        "an image of a {}",
        "the digit {}",
    ]
    wordings += [
        "a {}",
        "{}",
        "{}, photo",
        "a picture of a {}",
        "a photo of the number {}",
        "a photo of {}",
        "a drawing of a {}",
    ]
    text = "a photo of a {}" if rng.random() < 0.4 else rng.choice(wordings)
    return text.format(NAMES[attributes[0]])


def caption(attributes, rng):
    """One caption in the "web" style: plain, detailed, or both, sometimes with quality words. -> str"""
    kind, quality = rng.random(), attributes[5]
    if quality and kind < 0.5:
        bad = rng.choice([QUALITIES[quality], "low quality", "bad quality", "blurry, distorted", "worst quality"])
        return rng.choice([bad, f"a {bad} photo of a {NAMES[attributes[0]]}", f"{NAMES[attributes[0]]}, {bad}"])
    if kind < 0.4:
        text = plain_caption(attributes, rng)
    elif kind < 0.65:
        text = phrase(attributes, rng)
    elif kind < 0.85:
        text = "a photo of " + phrase(attributes, rng)
    else:
        text = f"photo of {NAMES[attributes[0]]}, {phrase(attributes, rng)}"
    return text + (", best quality" if not quality and rng.random() < 0.12 else "")


def full_caption(attributes):
    """The one caption the captioner learns, e.g. "a white bold seven on a black background"; no choice, all facts."""
    digit, style, ink, ground, _, quality = attributes
    words = [QUALITIES[quality], COLOUR_NAMES[ink], STYLES[style] if style else "", NAMES[digit]]
    return " ".join(["a", *(w for w in words if w), "on a", COLOUR_NAMES[ground], "background"])


def pictures(n, seed):
    """n prior glyphs -> uint8 [n, 3, 32, 32], attributes int64 [n, 6] (see _draw); a longer run begins the same way."""
    if n < 1:
        raise ValueError(f"pictures: n is {n}; ask for at least one")
    parts = [_draw(1000, _rng("glyphs", seed, start)) for start in range(0, n, 1000)]
    return torch.cat([p[0] for p in parts])[:n], torch.cat([p[1] for p in parts])[:n]


def glyphs(n, seed):
    """n captioned prior glyphs -> uint8 [n, 3, 32, 32], labels int64 [n], captions list[str]. Seeded; n >= 1."""
    images, attributes = pictures(n, seed)
    rng = random.Random(f"captions/{seed}")
    return images, attributes[:, 0].clone(), [caption(a, rng) for a in attributes.tolist()]


def real_digits():
    """The real digits, for measuring only -> (train images, labels), (test images, labels); uint8 [n, 3, 32, 32]."""
    from .datasets import load_dataset

    data = load_dataset("digits")
    splits = [(torch.from_numpy(s.pixels), torch.tensor(s.labels)) for s in (data.train, data.test)]
    return [(x[:, None].expand(-1, 3, -1, -1).contiguous(), y) for x, y in splits]


def to_float(images):
    """uint8 [0, 255] -> float32 [-1, 1], the range of every model here."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float [-1, 1] -> uint8 [0, 255], clamped and rounded."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ---------------------------------------------------------------------------------------
# Training: one loop for all models. A step's randomness comes from (seed, name, step), so a killed run continues
# with exactly the batches it would have seen.

STEPS = {"vae": 2200, "clip": 3600, "unet": 2400, "polish": 1000, "refine": 2400, "k2t": 4000, "captioner": 2000}
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of one weight


@dataclass(frozen=True)
class Job:
    """What a stage needs to know: where files go, the device, the seed and the share of the full budget."""

    out: Path
    work: Path
    device: str = "cpu"
    seed: int = 0
    scale: float = 1.0

    def steps(self, name):
        return max(20, round(STEPS[name] * self.scale))


def write_atomic(path, write):
    """Call write(temporary path), flush to disk, rename to path: a kill leaves the old file or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    temporary.chmod(0o644)  # safetensors creates files that only their owner can read
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path, data):
    """data as indented JSON, written atomically."""
    write_atomic(path, lambda p: p.write_text(json.dumps(data, indent=1) + "\n"))


def fit(job, name, module, loss_at, lr, weight_decay=0.01, ema=0.998, every=60.0):
    """Train module for job.steps(name) steps, leave the averaged weights in it, in eval mode -> dict of notes.

    loss_at(step, g) -> scalar loss; g is a CPU generator of that step alone. AdamW, linear warm-up, cosine decay to
    zero, gradient norm clipped to 1, exponential moving average of the weights. Every `every` seconds the weights,
    averages and moments go to work/<name>.safetensors, from which the same call continues bit for bit.
    Raises FloatingPointError when the loss is no longer finite.
    """
    steps, file = job.steps(name), job.work / f"{name}.safetensors"
    module.to(job.device).train()
    weights = {k: p for k, p in module.named_parameters() if p.requires_grad}
    average = {k: p.detach().clone() for k, p in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)

    start, seconds, log, begun = 0, 0.0, [], time.monotonic()
    if file.exists():
        with safe_open(file, "pt", device=job.device) as saved:
            start, seconds, log = (json.loads(saved.metadata()[k]) for k in ("step", "seconds", "log"))
            with torch.no_grad():
                for k, p in weights.items():
                    p.copy_(saved.get_tensor(f"weight/{k}"))
                    average[k].copy_(saved.get_tensor(f"average/{k}"))
                    if f"step/{k}" in saved.keys():  # absent for weights that have had no gradient yet
                        state = {m: saved.get_tensor(f"{m}/{k}") for m in MOMENTS}
                        # Trap: the fused kernel reads weight and moments in memory order; both must be laid out alike.
                        like = torch.zeros_like(p)
                        optimizer.state[p] = {m: like.clone().copy_(t) if t.ndim else t for m, t in state.items()}

    def save(step):
        tensors = {}
        for k, p in weights.items():
            tensors |= {f"weight/{k}": p.detach(), f"average/{k}": average[k]}
            tensors |= {f"{m}/{k}": optimizer.state[p][m] for m in MOMENTS if p in optimizer.state}
        tensors = {k: t.contiguous().cpu() for k, t in tensors.items()}
        notes = {"step": step, "seconds": seconds + time.monotonic() - begun, "log": log}
        notes = {k: json.dumps(v) for k, v in notes.items()}
        write_atomic(file, lambda path: save_file(tensors, path, notes))

    running, last_saved = None, time.monotonic()
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, unit="step", mininterval=2)
    for step in bar:
        rate = min(1, (step + 1) / min(200, steps / 5)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * rate
        loss = loss_at(step, _rng(job.seed, name, step))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{name}: the loss is {loss.item()} at step {step}; delete {file}, lower the lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        # The average forgets faster at the start, or it would carry the random weights for long.
        keep = min(ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in weights.values()], 1 - keep)

        running = loss.item() if running is None else 0.97 * running + 0.03 * loss.item()
        if (step + 1) % max(1, steps // 50) == 0:
            log.append([step + 1, round(running, 5)])
            bar.set_postfix(loss=f"{running:.4f}")
        if time.monotonic() - last_saved > every or step + 1 == steps:
            save(step + 1)
            last_saved = time.monotonic()

    with torch.no_grad():
        for k, p in weights.items():
            p.copy_(average[k])
    module.eval().requires_grad_(False)
    with safe_open(file, "pt") as saved:
        seconds = json.loads(saved.metadata()["seconds"])
    return {"steps": steps, "seconds": round(seconds), "loss": log[-1][1], "curve": log}


def corpus_size(scale):
    """Pictures to train on: a rehearsal draws fewer."""
    return max(2000, round(CORPUS * min(1, scale * 2)))


def corpus(job):
    """The training pictures and attributes on the device; drawn once, then read from work/corpus.safetensors."""
    file, n = job.work / "corpus.safetensors", corpus_size(job.scale)
    if not file.exists():
        parts, starts = [], range(0, n, 2000)
        for start in tqdm(starts, desc="corpus", unit="2000 pictures"):
            parts.append(pictures(min(2000, n - start), f"{job.seed}/{start}"))
        data = {"images": torch.cat([p[0] for p in parts]), "attributes": torch.cat([p[1] for p in parts])}
        write_atomic(file, lambda path: save_file(data, path))
    with safe_open(file, "pt", device=job.device) as saved:
        return saved.get_tensor("images"), saved.get_tensor("attributes")


def batch(n, size, g, device):
    """size random indices below n, from the CPU generator g, on the device."""
    return torch.randint(0, n, (size,), generator=g).to(device)


def half_folder(model, folder):
    """save_pretrained in fp16, with a config that says float32 so that a plain from_pretrained computes in float32."""
    with tempfile.TemporaryDirectory() as temporary:
        model.half().save_pretrained(temporary)
        model.float()
        for file in Path(temporary).iterdir():
            data = file.read_bytes()
            if file.name == "config.json" and "dtype" in (config := json.loads(data)):
                data = (json.dumps(config | {"dtype": "float32"}, indent=2) + "\n").encode()
            write_atomic(Path(folder) / file.name, lambda path, data=data: path.write_bytes(data))


# ---------------------------------------------------------------------------------------
# [1] tokenizer: one byte-pair vocabulary, written in the forms of transformers and of open_clip.


def learn_merges(words, limit):
    """Byte-pair encoding in CLIP's alphabet. words: Counter of words -> at most `limit` pairs, most frequent first."""
    from open_clip.tokenizer import bytes_to_unicode

    alphabet = bytes_to_unicode()
    spelled = Counter()
    for word, count in words.items():
        letters = [alphabet[b] for b in word.encode()]
        spelled[(*letters[:-1], letters[-1] + "</w>")] += count
    merges, known = [], set()
    while len(merges) < limit:
        pairs = Counter()
        for letters, count in spelled.items():
            for pair in zip(letters, letters[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            break
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        # Trap: two pairs can spell the same token; the vocabulary must hold it once or the ids of the two forms part.
        if left + right not in known:
            merges.append((left, right))
            known.add(left + right)
        merged = Counter()
        for letters, count in spelled.items():
            out, i = [], 0
            while i < len(letters):
                step = 2 if letters[i : i + 2] == (left, right) else 1
                out.append("".join(letters[i : i + step]))
                i += step
            merged[tuple(out)] += count
        spelled = merged
    return merges


def make_tokenizer(job):
    """Learn the merges from captions; write sd/tokenizer (CLIPTokenizer) and clip/bpe.txt.gz (SimpleTokenizer)."""
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPTokenizer

    _, attributes = pictures(8000, f"{job.seed}/tokenizer")
    rng = random.Random(job.seed)
    words = Counter(w for a in attributes.tolist() for w in caption(a, rng).replace(",", " ,").split())
    for word in EXTRA_WORDS.split():
        words[word] += 30
    merges = learn_merges(words, 500)

    # Trap: open_clip reads one merge more when the file ends with a newline. mtime=0: the same bytes each time.
    text = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges)
    write_atomic(job.out / "clip" / "bpe.txt.gz", lambda path: path.write_bytes(gzip.compress(text.encode(), mtime=0)))
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(x + "</w>" for x in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)
    tokenizer.save_pretrained(job.out / "sd" / "tokenizer")
    tokenizer.save_pretrained(job.out / "clip_hf")


# Words of the scripts' prompts that the captions lack: whole tokens, so that any prompt fits into the context.
EXTRA_WORDS = """rendering cropped clean dirty dark my cool close up bright jpeg corrupted good one large nice weird
handwritten hand drawn written digit digits number image class centered type of the in and with realistic drawing style
low resolution pixelated sketch art painting texture satellite"""


def load_tokenizer(out):
    """The CLIPTokenizer of sd/ -> function list[str] -> int64 ids [n, CONTEXT], padded with the end token."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(out / "sd" / "tokenizer")
    pad = dict(padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
    return lambda texts: tokenizer(list(texts), **pad).input_ids


def caption_table(job, attributes, write, copies):
    """Token ids of `copies` captions per picture -> (unique ids [u, CONTEXT], index [n, copies] into them)."""
    rng, index, rows = random.Random(f"{job.seed}/{write.__name__}"), {}, []
    for a in attributes.tolist():
        rows.append([index.setdefault(write(a, rng), len(index)) for _ in range(copies)])
    return load_tokenizer(job.out)(index).to(job.device), torch.tensor(rows, device=job.device)


# ---------------------------------------------------------------------------------------
# [2] vae: 32x32x3 to 8x8x4.


def train_vae(job):
    """AutoencoderKL, squared error plus a light KL term; latents then scaled to unit variance at factor 0.18215."""
    from diffusers import AutoencoderKL

    images, _ = corpus(job)
    torch.manual_seed(job.seed)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        scaling_factor=SCALING,
    )

    def loss_at(step, g):
        x = to_float(images[batch(len(images), 32, g, job.device)])
        latents = vae.encode(x).latent_dist
        noise = torch.randn(latents.mean.shape, generator=g).to(job.device)
        output = vae.decode(latents.mean + latents.std * noise).sample
        return F.mse_loss(output, x) + 0.1 * F.l1_loss(output, x) + 2e-4 * latents.kl().mean() / latents.mean[0].numel()

    notes = fit(job, "vae", vae, loss_at, lr=2e-3, weight_decay=0.0, ema=0.995)
    with torch.no_grad():
        z = torch.cat([vae.encode(to_float(images[i : i + 200])).latent_dist.mean for i in range(0, 2000, 200)])
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
        # Whitening folded into the two 1x1 convolutions: with SD's factor the latents have mean 0 and variance 1.
        gain = 1 / (std * SCALING)
        quant, post = vae.quant_conv, vae.post_quant_conv
        quant.weight[:4] *= gain[:, None, None, None]
        quant.bias[:4] = (quant.bias[:4] - mean) * gain
        quant.bias[4:] += 2 * gain.log()
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight /= gain[:, None, None, None].transpose(0, 1)
    half_folder(vae, job.out / "sd" / "vae")
    return notes


# ---------------------------------------------------------------------------------------
# [3] clip: a patch-8 ViT and a 2-layer text transformer.


def clip_config(vocabulary):
    """open_clip's model configuration. A ViT, because DataDream puts LoRA on the attention of both towers."""
    vision = {"image_size": 32, "patch_size": 8, "width": 96, "layers": 4, "head_width": 32}
    text = {"context_length": CONTEXT, "vocab_size": vocabulary, "width": WIDTH, "heads": 2, "layers": 2}
    return {"embed_dim": WIDTH, "quick_gelu": False, "vision_cfg": vision, "text_cfg": text}


class ClipWithHeads(nn.Module):
    """open_clip's CLIP and the linear heads of the supervised start, one per attribute of a picture."""

    def __init__(self, config):
        super().__init__()
        import open_clip

        self.clip = open_clip.CLIP(**config)
        sizes = [len(v) for v in (NAMES, STYLES, COLOUR_NAMES, COLOUR_NAMES, SIZES, QUALITIES)]
        self.heads = nn.ModuleList(nn.Linear(config["embed_dim"], n) for n in sizes)


def train_clip(job):
    """Contrastive training after a supervised start; writes clip/, clip_hf/ and the pipeline's text encoder.

    A ViT trained from scratch stays at chance for hundreds of contrastive steps. Heads that read the picture's
    attributes from its embedding get it going; their weight falls to a tenth when the captions come in.
    """
    images, attributes = corpus(job)
    ids, rows = caption_table(job, attributes, caption, copies=3)
    short_ids = torch.stack([load_tokenizer(job.out)([t.format(n) for n in NAMES]) for t in SHORT_TEMPLATES])
    short_ids = short_ids.to(job.device)  # [templates, 10, CONTEXT]
    config = clip_config(len(json.loads((job.out / "clip_hf" / "tokenizer.json").read_text())["model"]["vocab"]))
    torch.manual_seed(job.seed)
    model = ClipWithHeads(config)
    clip, start = model.clip, job.steps("clip") // 4

    def loss_at(step, g):
        i = batch(len(images), 128, g, job.device)
        shift = torch.randint(-2, 3, (2,), generator=g).tolist()
        x = torch.roll(to_float(images[i]), shift, (2, 3))
        embedding = clip.encode_image(x)
        heads = [F.cross_entropy(head(embedding), attributes[i, k]) for k, head in enumerate(model.heads)]
        supervised = heads[0] + 0.3 * sum(heads[1:])
        if step < start:
            return supervised
        f = F.normalize(embedding, dim=-1)
        scale = clip.logit_scale.exp().clamp(max=50)
        if step % 2:  # captions with the digit alone: every picture against the ten classes
            t = clip.encode_text(short_ids[step // 2 % len(short_ids)], normalize=True)
            return F.cross_entropy(scale * f @ t.T, attributes[i, 0]) + 0.1 * supervised
        column = torch.randint(0, rows.shape[1], (1,), generator=g).item()
        unique, target = rows[i, column].unique(return_inverse=True)  # several pictures may share one caption
        logits = scale * f @ clip.encode_text(ids[unique], normalize=True).T  # [B, u]
        owners = F.one_hot(target, len(unique)).float().T
        text_loss = -(owners / owners.sum(1, keepdim=True) * logits.T.log_softmax(1)).sum(1).mean()
        return 0.5 * (F.cross_entropy(logits, target) + text_loss) + 0.1 * supervised

    notes = fit(job, "clip", model, loss_at, lr=1e-3, weight_decay=0.05)
    write_clip(job.out, clip.float().cpu(), config)
    return notes


SHORT_TEMPLATES = ["a photo of a {}", "a photo of the digit {}", "photo of {}", "the digit {}"]
SHORT_TEMPLATES += ["a picture of the number {}", "an image of a {}", "{}", "a {}"]
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


def write_clip(out, clip, config):
    """One set of weights in three forms: open_clip folder, CLIPModel folder, the pipeline's text encoder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig

    half = {k: v.half().contiguous() for k, v in clip.state_dict().items()}
    write_atomic(out / "clip" / "open_clip_model.safetensors", lambda path: save_file(half, path))
    write_json(out / "clip" / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": PREPROCESS})

    # hidden_act gelu is open_clip's quick_gelu false; the end token is the last of the vocabulary.
    see, read, end = config["vision_cfg"], config["text_cfg"], config["text_cfg"]["vocab_size"] - 1
    text = CLIPTextConfig(
        vocab_size=end + 1,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=read["layers"],
        num_attention_heads=read["heads"],
        max_position_embeddings=CONTEXT,
        hidden_act="gelu",
        projection_dim=WIDTH,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    vision = CLIPVisionConfig(**vision_arguments(see))
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))
    state = {
        "logit_scale": clip.logit_scale,
        "text_projection.weight": clip.text_projection.T,
        "visual_projection.weight": clip.visual.proj.T,
        **text_state(clip, "text_model."),
        **vision_state(clip.visual, "vision_model."),
    }
    _load_all(model, state)
    half_folder(model, out / "clip_hf")
    size = {"height": see["image_size"], "width": see["image_size"]}
    mean, std = PREPROCESS["mean"], PREPROCESS["std"]
    processor = CLIPImageProcessor(do_center_crop=False, size=size, image_mean=mean, image_std=std)
    processor.save_pretrained(out / "clip_hf")

    encoder = CLIPTextModel(text)
    _load_all(encoder, text_state(clip, "text_model." if hasattr(encoder, "text_model") else ""))
    half_folder(encoder, out / "sd" / "text_encoder")


def vision_arguments(see):
    """open_clip's vision_cfg in the words of transformers' CLIPVisionConfig and GitVisionConfig."""
    return dict(
        hidden_size=see["width"],
        intermediate_size=4 * see["width"],
        num_hidden_layers=see["layers"],
        num_attention_heads=see["width"] // see["head_width"],
        image_size=see["image_size"],
        patch_size=see["patch_size"],
        hidden_act="gelu",
        projection_dim=WIDTH,
    )


def _load_all(model, state):
    """load_state_dict that accepts nothing but position buffers to be missing."""
    state = {k: v.detach().clone() for k, v in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.endswith("position_ids")]
    if missing or unexpected:
        raise RuntimeError(f"{type(model).__name__}: missing {missing}, unexpected {unexpected}; another version?")


def _block_state(blocks, prefix):
    """Transformer blocks of open_clip -> keys of transformers' CLIP; in_proj is split into q, k and v."""
    state = {}
    for i, block in enumerate(blocks):
        at = f"{prefix}encoder.layers.{i}."
        projections = zip("qkv", block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True)
        for letter, weight, bias in projections:
            state |= {f"{at}self_attn.{letter}_proj.weight": weight, f"{at}self_attn.{letter}_proj.bias": bias}
        parts = {"self_attn.out_proj": block.attn.out_proj, "layer_norm1": block.ln_1, "layer_norm2": block.ln_2}
        parts |= {"mlp.fc1": block.mlp.c_fc, "mlp.fc2": block.mlp.c_proj}
        for name, part in parts.items():
            state |= {f"{at}{name}.weight": part.weight, f"{at}{name}.bias": part.bias}
    return state


def text_state(clip, prefix):
    """open_clip's text tower as the state of transformers' text model."""
    return {
        f"{prefix}embeddings.token_embedding.weight": clip.token_embedding.weight,
        f"{prefix}embeddings.position_embedding.weight": clip.positional_embedding,
        f"{prefix}final_layer_norm.weight": clip.ln_final.weight,
        f"{prefix}final_layer_norm.bias": clip.ln_final.bias,
        **_block_state(clip.transformer.resblocks, prefix),
    }


def vision_state(visual, prefix):
    """open_clip's ViT as the state of transformers' CLIP or GIT vision model (the misspelt key is theirs)."""
    return {
        f"{prefix}embeddings.class_embedding": visual.class_embedding,
        f"{prefix}embeddings.patch_embedding.weight": visual.conv1.weight,
        f"{prefix}embeddings.position_embedding.weight": visual.positional_embedding,
        f"{prefix}pre_layrnorm.weight": visual.ln_pre.weight,
        f"{prefix}pre_layrnorm.bias": visual.ln_pre.bias,
        f"{prefix}post_layernorm.weight": visual.ln_post.weight,
        f"{prefix}post_layernorm.bias": visual.ln_post.bias,
        **_block_state(visual.transformer.resblocks, prefix),
    }


# ---------------------------------------------------------------------------------------
# [4] unet: text-conditional noise prediction on latents.

# Stable Diffusion's noise schedule, shared by training and the shipped DDIM sampler.
BETAS = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def latents(job, images):
    """Mean and standard deviation of every picture's scaled latent -> float [n, 8, 8, 8]; cached in the work folder."""
    from diffusers import AutoencoderKL

    file = job.work / "latents.safetensors"
    if not file.exists():
        vae = AutoencoderKL.from_pretrained(job.out / "sd" / "vae", dtype=torch.float32).to(job.device).eval()
        parts = []
        with torch.no_grad():
            for i in tqdm(range(0, len(images), 200), desc="latents", unit="200 pictures"):
                posterior = vae.encode(to_float(images[i : i + 200])).latent_dist
                parts.append(torch.cat([posterior.mean, posterior.std], 1).cpu() * SCALING)
        write_atomic(file, lambda path: save_file({"latents": torch.cat(parts)}, path))
    with safe_open(file, "pt", device=job.device) as saved:
        return saved.get_tensor("latents")


def train_unet(job):
    """UNet2DConditionModel with cross-attention at both resolutions, so that prompts bind; writes the sd/ pipeline."""
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    sd = job.out / "sd"
    images, attributes = corpus(job)
    z = latents(job, images)
    encoder = CLIPTextModel.from_pretrained(sd / "text_encoder", dtype=torch.float32).to(job.device).eval()

    @torch.no_grad()
    def states(ids):
        return torch.cat([encoder(part).last_hidden_state for part in ids.split(500)])

    tables = []  # (states of the distinct captions [u, CONTEXT, WIDTH], rows of each picture [n, 3]): encoded once
    for write in (plain_caption, caption):
        ids, rows = caption_table(job, attributes, write, copies=3)
        tables.append((states(ids), rows))
    empty = states(load_tokenizer(job.out)([""]).to(job.device))
    torch.manual_seed(job.seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,  # Trap: diffusers reads this as the number of heads
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
    )
    unet.to(memory_format=torch.channels_last)  # a third faster on the CPU
    alphas = DDPMScheduler(**BETAS).alphas_cumprod.to(job.device)
    # Min-SNR-5: with plain noise loss most of the gradient goes to steps where the digit is long decided.
    snr = alphas / (1 - alphas)
    weight = snr.clamp(max=5) / snr

    def cycle(name, lr, ema, detailed, power):
        """One run of `fit`. detailed: share of captions that name more than the digit; t = 1000 u^power, u uniform."""

        def loss_at(step, g):
            i = batch(len(z), 64, g, job.device)
            draw = torch.randn(2, 64, 4, 8, 8, generator=g).to(job.device)
            x, noise = z[i, :4] + z[i, 4:] * draw[0], draw[1]  # the posterior is drawn afresh at each step
            t = (1000 * torch.rand(64, generator=g) ** power).long().to(job.device)
            captions, rows = tables[int(torch.rand(1, generator=g) < detailed)]
            h = captions[rows[i, torch.randint(0, rows.shape[1], (1,), generator=g).item()]]
            drop = torch.rand(64, 1, 1, generator=g) < 0.1  # classifier-free guidance needs the empty prompt
            a = alphas[t][:, None, None, None]
            h = torch.where(drop.to(job.device), empty, h)
            predicted = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, h).sample
            return (weight[t] * (predicted - noise).square().mean((1, 2, 3))).mean()

        return fit(job, name, unet.requires_grad_(True), loss_at, lr=lr, ema=ema)

    # Each cycle starts from the averaged weights of the one before. Samples that show the prompted class: 92.5 % after
    # the first, 94.2 % after the second, 97.1 % after the third, which has more noise (where the digit is decided) and
    # more captions of the digit alone. (In the shipped weights it started from the half-precision files of the second.)
    parts = [
        cycle("unet", lr=1e-3, ema=0.999, detailed=0.6, power=1.0),
        cycle("polish", lr=5e-4, ema=0.998, detailed=0.6, power=1.0),
        cycle("refine", lr=7e-4, ema=0.998, detailed=0.5, power=0.7),
    ]
    notes = {k: sum(part[k] for part in parts) for k in ("steps", "seconds")}
    notes |= {"loss": parts[-1]["loss"], "curve": parts[0]["curve"]}
    half_folder(unet.cpu(), sd / "unet")
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(sd / "vae"),
        text_encoder=encoder,
        tokenizer=CLIPTokenizer.from_pretrained(sd / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.scheduler.save_pretrained(sd / "scheduler")
    pipe.save_config(sd)  # model_index.json; the parts are written already
    return notes


# ---------------------------------------------------------------------------------------
# [5] k2t: keywords to a caption, as CommonGen T5 does for real class names.


def keywords(attributes, text, rng):
    """Input for one target text: the digit's name, sometimes with "a", sometimes with other words of the text."""
    name = NAMES[attributes[0]]
    others = [w for w in text.split() if w in COLOURS or w in STYLES or w in SIZES]
    words = [name] + rng.sample(others, rng.randint(0, len(others))) * (rng.random() < 0.3)
    rng.shuffle(words)
    return ("a " if rng.random() < 0.3 else "") + " ".join(words)


def train_k2t(job):
    """T5 from a small config; its own byte-level tokenizer; writes k2t/."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    _, attributes = corpus(job)
    rng = random.Random(f"{job.seed}/k2t")
    targets = [phrase(a, rng) for a in attributes[:30000].tolist()]
    sources = [keywords(a, t, rng) for a, t in zip(attributes.tolist(), targets, strict=False)]

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    letters, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator(targets + EXTRA_WORDS.split() * 30, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
        model_input_names=["input_ids", "attention_mask"],  # or generate() is handed token_type_ids
    )
    source = tokenizer(sources, padding=True, return_tensors="pt").to(job.device)
    labels = tokenizer(targets, padding=True, return_tensors="pt").input_ids.to(job.device)
    labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
    torch.manual_seed(job.seed)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5ForConditionalGeneration(config)

    def loss_at(step, g):
        i = batch(len(labels), 64, g, job.device)
        return model(input_ids=source.input_ids[i], attention_mask=source.attention_mask[i], labels=labels[i]).loss

    notes = fit(job, "k2t", model, loss_at, lr=3e-3, weight_decay=0.0)
    half_folder(model.cpu(), job.out / "k2t")
    tokenizer.save_pretrained(job.out / "k2t")
    return notes


# ---------------------------------------------------------------------------------------
# [6] captioner: GIT, a text decoder that reads the patches of CLIP's image tower.


def train_captioner(job):
    """GitForCausalLM; the vision tower is CLIP's and stays as it is, only the decoder learns. Writes captioner/.

    A captioner trained from scratch learns the sentence and not the digit; CLIP's patches already hold the answer.
    """
    from transformers import CLIPImageProcessor, CLIPTokenizer, GitConfig, GitForCausalLM, GitProcessor

    images, attributes = corpus(job)
    settings = json.loads((job.out / "clip" / "open_clip_config.json").read_text())["model_cfg"]
    end = settings["text_cfg"]["vocab_size"] - 1
    config = GitConfig(
        vision_config=vision_arguments(settings["vision_cfg"]),
        vocab_size=end + 1,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=CONTEXT,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
        tie_word_embeddings=False,
    )
    torch.manual_seed(job.seed)
    model = GitForCausalLM(config)
    with safe_open(job.out / "clip" / "open_clip_model.safetensors", "pt") as saved:
        clip = {k: saved.get_tensor(k).float() for k in saved.keys()}
    tower = ClipWithHeads(settings).clip
    tower.load_state_dict(clip)
    vision = model.git.image_encoder
    _load_all(vision, vision_state(tower.visual, "vision_model." if hasattr(vision, "vision_model") else ""))
    vision.requires_grad_(False)

    tokens = load_tokenizer(job.out)
    texts = [full_caption(a) for a in attributes.tolist()]
    ids = tokens(texts).to(job.device)
    keep = (ids != end).sum(1).max() + 1  # longest caption and its end token
    ids = ids[:, :keep]
    mask = F.pad(ids != end, (1, 0), value=True)[:, :-1]  # keeps the end token that closes a caption, not the padding
    labels = ids.masked_fill(~mask, -100)

    def loss_at(step, g):
        i = batch(len(images), 64, g, job.device)
        x = to_float(images[i])
        return model(input_ids=ids[i], attention_mask=mask[i].long(), pixel_values=x, labels=labels[i]).loss

    notes = fit(job, "captioner", model, loss_at, lr=2e-3)
    half_folder(model.cpu(), job.out / "captioner")
    processor = GitProcessor(
        CLIPImageProcessor.from_pretrained(job.out / "clip_hf"),
        CLIPTokenizer.from_pretrained(job.out / "sd" / "tokenizer"),
    )
    processor.save_pretrained(job.out / "captioner")
    return notes


# ---------------------------------------------------------------------------------------
# [7] measure: every figure of the model card, from the files written, on held-out glyphs and on the real test digits.

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
        generators = [_rng("samples", len(images), i) for i in range(len(part))]
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


def save_grid(images, labels, path):
    """JPEG contact sheet, one row per class, twelve columns; small, since the folder has a limit of 12 MB."""
    from PIL import Image

    rows = torch.stack([images[labels == k][:12] for k in range(10)])  # [10, 12, 3, 32, 32]
    sheet = F.pad(rows, (1, 1, 1, 1), value=255).permute(0, 3, 1, 4, 2).reshape(10 * 34, 12 * 34, 3)
    Image.fromarray(sheet.numpy()).save(path, format="JPEG", quality=85)


def measure(job):
    """Write quality.json, samples.jpg and the model card README.md beside the weights. -> dict of the figures"""
    figures = {}
    for part in (measure_vae, measure_clip, measure_k2t, measure_captioner):
        figures |= part(job.out)
        print(f"{part.__name__}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)
    result, samples = measure_sd(job.out, job.device)
    figures |= result
    write_atomic(job.out / "samples.jpg", lambda path: save_grid(samples, torch.arange(len(samples)) % 10, path))
    markers = {name: job.work / "stages" / f"{name}.json" for name in STAGES if name != "measure"}
    notes = {name: json.loads(file.read_text()) for name, file in markers.items() if file.exists()}
    build = {name: {k: v for k, v in note.items() if k != "curve"} for name, note in notes.items()}
    quality = {"figures": figures, "seed": job.seed, "budget_scale": job.scale, "build": build, "targets": TARGETS}
    write_json(job.out / "quality.json", quality)
    write_atomic(job.out / "README.md", lambda path: path.write_text(model_card(quality)))
    missed = [k for k, target in TARGETS.items() if figures[k] < target]
    print(json.dumps(figures, indent=1), f"below target: {missed or 'none'}", sep="\n", flush=True)
    return figures


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


# ---------------------------------------------------------------------------------------
# The build: stages in order, each closed by a marker in the work folder.

STAGES = {  # name -> function, file in the output folder that must exist for the stage to count as done
    "tokenizer": (make_tokenizer, "clip/bpe.txt.gz"),
    "vae": (train_vae, "sd/vae/diffusion_pytorch_model.safetensors"),
    "clip": (train_clip, "clip_hf/model.safetensors"),
    "unet": (train_unet, "sd/model_index.json"),
    "k2t": (train_k2t, "k2t/tokenizer.json"),
    "captioner": (train_captioner, "captioner/processor_config.json"),
    "measure": (measure, "README.md"),
}


def build(job, stages):
    """Run the stages that are not done yet, in order. Raises SystemExit when the work folder holds another recipe."""
    recipe = {"seed": job.seed, "scale": job.scale, "steps": STEPS, "corpus": corpus_size(job.scale)}
    file = job.work / "recipe.json"
    if file.exists() and json.loads(file.read_text()) != recipe:
        raise SystemExit(f"error: {job.work} holds another recipe ({file.read_text()}); choose another --work-dir")
    write_json(file, recipe)
    for i, (name, (stage, product)) in enumerate(STAGES.items(), 1):
        marker = job.work / "stages" / f"{name}.json"
        if name not in stages or (marker.exists() and (job.out / product).exists()):
            print(f"[{i}/{len(STAGES)}] {name}: {'done, skipped' if name in stages else 'not asked for'}", flush=True)
            continue
        for earlier, (_, needed) in list(STAGES.items())[: i - 1]:
            if not (job.out / needed).exists() and (name == "measure" or earlier in NEEDS.get(name, ())):
                raise SystemExit(f"error: stage {name} needs {job.out / needed}; run --stages {earlier} first")
        print(f"[{i}/{len(STAGES)}] {name}", flush=True)
        begun = time.monotonic()
        notes = stage(job) or {}
        write_json(marker, {"seconds": round(time.monotonic() - begun), **notes})


NEEDS = {"clip": ["tokenizer"], "unet": ["tokenizer", "vae", "clip"], "captioner": ["tokenizer", "clip"]}


def main():
    """Command line of the builder; see --help."""
    parser = argparse.ArgumentParser("python -m common.tiny", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the finished models")
    parser.add_argument("--work-dir", type=Path, help="checkpoints; default ~/.cache/cleansynth/tiny/<seed>-<scale>")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="the shipped weights have seed 0")
    parser.add_argument("--budget-scale", type=float, default=1.0, help="share of the training steps, for rehearsals")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="run only these")
    args = parser.parse_args()
    if not args.budget_scale > 0:
        parser.error(f"--budget-scale is {args.budget_scale}; give a number above 0, 1 is the full build")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here; use --device cpu")
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; a lookup would only wait for a time-out
    work = args.work_dir or Path.home() / ".cache" / "cleansynth" / "tiny" / f"{args.seed}-{args.budget_scale:g}"
    job = Job(args.out.resolve(), work.resolve(), args.device, args.seed, args.budget_scale)
    print(f"tiny world -> {job.out}; checkpoints in {job.work}; stop and repeat the command at any time", flush=True)
    try:
        build(job, args.stages)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command continues") from None


if __name__ == "__main__":
    main()
