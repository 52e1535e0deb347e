"""A narrow GLIDE of random weights in the files of the real one, and GPT-2's tokenizer, for tests and rehearsals.

gpt2_merges.txt.gz: the merges of GPT-2's tokenizer (OpenAI, MIT licence); its vocabulary follows from them.
"""

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from open_clip.tokenizer import bytes_to_unicode

from common.glide.network import ATTENTION, BASE, UPSAMPLER, GlideNet, Settings, unet_blocks

MERGES = Path(__file__).with_name("gpt2_merges.txt.gz")
NARROW = dict(widths=(32, 64), attention=(False, True), layers=1, head=32, text_width=32, text_layers=1, text_heads=4)


def official_shapes(s: Settings) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every weight of a network, in no special order."""
    with torch.device("meta"):
        ours = {key: tuple(tensor.shape) for key, tensor in GlideNet(s).state_dict().items()}
    found = {key.removeprefix("text."): shape for key, shape in ours.items() if key.startswith("text.")}
    for old, new, parts in unet_blocks(s):
        for part, names in parts.items():
            for leaf in ("weight", "bias"):
                if shape := ours.get(f"unet.{new}{names[0]}.{leaf}"):
                    convolution = (1,) if parts is ATTENTION and len(shape) == 2 else ()
                    found[f"{old}{part}.{leaf}"] = (shape[0] * len(names), *shape[1:], *convolution)
    return found


def random_weights(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, torch.Tensor]:
    """0.05 N(0, 1), one weight after the other, plus 1 for the gains of normalisations."""
    g = torch.Generator().manual_seed(seed)
    gains = {key for key, shape in shapes.items() if len(shape) == 1 and key.endswith("weight")}
    return {key: 0.05 * torch.randn(*shape, generator=g) + (key in gains) for key, shape in shapes.items()}


def write_tokenizer(folder: Path, merges: str) -> int:
    """vocab.json and merges.txt as GPT-2 has them: bytes, merges, the end of text. -> size of the vocabulary"""
    pairs = merges.split("\n")[1:]
    words = [*bytes_to_unicode().values(), *(pair.replace(" ", "") for pair in pairs if pair), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    return len(words)


def write_gpt2(folder: Path) -> None:
    """GPT-2's own tokenizer."""
    write_tokenizer(folder, gzip.decompress(MERGES.read_bytes()).decode())


def make_tiny_glide(folder: str | Path, seed: int = 0) -> Path:
    """base.pt and upsample.pt of two levels, and a tokenizer that knows bytes only. Meant for images of 16 and 64."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder, "#version: 0.2\n")
    for i, (name, full) in enumerate((("base", BASE), ("upsample", UPSAMPLER))):
        shapes = official_shapes(replace(full, **NARROW, vocabulary=vocabulary))
        torch.save(random_weights(shapes, 2 * seed + i), folder / f"{name}.pt")
    return folder
