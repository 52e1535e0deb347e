"""The prior of the tiny world: digits in 21 fonts, warped and coloured, with captions from a small grammar."""

import hashlib
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
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


def seeded(*parts):
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
    parts = [_draw(1000, seeded("glyphs", seed, start)) for start in range(0, n, 1000)]
    return torch.cat([p[0] for p in parts])[:n], torch.cat([p[1] for p in parts])[:n]


def glyphs(n, seed):
    """n captioned prior glyphs -> uint8 [n, 3, 32, 32], labels int64 [n], captions list[str]. Seeded; n >= 1."""
    images, attributes = pictures(n, seed)
    rng = random.Random(f"captions/{seed}")
    return images, attributes[:, 0].clone(), [caption(a, rng) for a in attributes.tolist()]


def real_digits():
    """The real digits, for measuring only -> (train images, labels), (test images, labels); uint8 [n, 3, 32, 32]."""
    from common.datasets import load_dataset

    data = load_dataset("digits")
    splits = [(torch.from_numpy(s.pixels), torch.as_tensor(s.labels).long()) for s in (data.train, data.test)]
    return [(x[:, None].expand(-1, 3, -1, -1).contiguous(), y) for x, y in splits]


def to_float(images):
    """uint8 [0, 255] -> float32 [-1, 1], the range of every model here."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float [-1, 1] -> uint8 [0, 255], clamped and rounded."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
