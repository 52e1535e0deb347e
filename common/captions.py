"""Captions of real images, ready ones from files or written by an image-to-text model; and sentences around a word."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from common.files import chunks
from common.launch import UserError


def read_captions(file: str | Path, real: Any) -> list[str]:
    """Captions of the images of a datasets.Images, in their order, stripped; "" where the file says null.

    file: JSON {class: {file name: caption}}, class by its name or its folder; a folder of <class>.json; or
    {image: caption} as a run writes it. UserError for any other form, or an image without an entry.
    """
    wanted = "wanted is {class: {file name: caption}}, or {image: caption}"
    try:
        if Path(file).is_dir():
            given = {f.stem: _object(f) for f in sorted(Path(file).glob("*.json"))}
        else:
            given = _object(Path(file))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--captions-file {file}: {' '.join(str(error).split()) or type(error).__name__}") from error
    kinds = {type(entry) for entry in given.values()} if isinstance(given, dict) else set()
    if kinds not in ({dict}, {str}):
        raise UserError(f"--captions-file {file}: {wanted}")
    found = []
    for key, label in zip(real.keys, real.labels, strict=True):
        folder, _, name = key.rpartition("/")
        texts = given.get(real.class_names[label]) or given.get(folder.rpartition("/")[2]) or {}
        texts, name = (given, key) if kinds == {str} else (texts, name)
        if name not in texts:
            raise UserError(f"--captions-file {file}: no caption for {name} of {real.class_names[label]!r}")
        caption = texts[name]
        if not isinstance(caption, str | None) or any("\ud800" <= c <= "\udfff" for c in caption or ""):
            raise UserError(f"--captions-file {file}: the caption of {name} is {caption!r}, which is no text")
        found.append((caption or "").strip())
    return found


def _object(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def captioner(where: str, device: torch.device, precision: str, batch: int = 16) -> Callable[[Any], list[str]]:
    """-> function: sequence of PIL images -> captions, greedy, no prompt, at most 16 new tokens, stripped.

    where: a folder of models.check_models of kind "captioner". bf16: the whole model is bfloat16.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    processor = AutoProcessor.from_pretrained(where)
    model = AutoModelForImageTextToText.from_pretrained(where, dtype=dtype, use_safetensors=True).to(device).eval()
    if getattr(model.config, "image_token_index", 0) is None:  # BLIP-2 as older transformers saved it
        model.config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")

    @torch.no_grad()
    def write(pictures: Sequence) -> list[str]:
        inputs = processor(images=pictures, return_tensors="pt").to(device)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        # Trap: in transformers 5 max_length=16, the sister repository's setting, counts BLIP-2's 32 image tokens too.
        ids = model.generate(**inputs, max_new_tokens=16, num_beams=1, do_sample=False)
        return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]

    return lambda images: [c for rows in chunks(range(len(images)), batch) for c in write([images[i] for i in rows])]


def sentence_writer(where: str, device: torch.device, **sampling: Any) -> Callable[[str, int], list[str]]:
    """-> function: words, n -> n texts of a seq2seq model, sampled with torch's generators. Float32.

    where: a folder of models.check_models of kind "seq2seq". sampling: as transformers' generate takes it.
    """
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(where)
    model = AutoModelForSeq2SeqLM.from_pretrained(where, dtype=torch.float32, use_safetensors=True).eval().to(device)

    @torch.no_grad()
    def write(words: str, n: int) -> list[str]:
        tokens = tokenizer([words], return_tensors="pt").to(device)
        ids = model.generate(**tokens, num_return_sequences=n, do_sample=True, **sampling)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    return write
