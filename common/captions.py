"""Captions of real images, sentences about classes: ready ones from files, or written by a model."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.distributed import Dist, barrier, my_items, on_rank_0, progress
from common.files import chunks, read_json, write_json
from common.launch import UserError
from common.loader import Loader

PART = 256  # images in one file of captions; an interrupted run loses at most that many
BATCH = 16


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
        if caption is not None and not _is_text(caption):
            raise UserError(f"--captions-file {file}: the caption of {name} is {caption!r}, which is no text")
        found.append((caption or "").strip())
    return found


def _object(file: Path) -> Any:
    return json.loads(file.read_bytes())  # with a byte order mark too


def _is_text(said: Any) -> bool:
    return isinstance(said, str) and not any("\ud800" <= c <= "\udfff" for c in said)  # half a character


def write_captions(folder: Path, where: str, images: Any, dist: Dist, precision: str, workers: int) -> list[str]:
    """Captions of all images by captioner(where, ...), in their order, on rank 0; elsewhere []. All must call.

    Each process writes its share of the files <folder>/captions-<i>.json of PART images; those that are there stay.
    """
    parts = [range(i, min(i + PART, len(images))) for i in range(0, len(images), PART)]
    files = [folder / f"captions-{i:05d}.json" for i in range(len(parts))]
    left = on_rank_0(lambda: [i for i, file in enumerate(files) if not file.exists()], dist)
    mine = my_items(left, dist)
    batches = (rows for i in mine for rows in chunks(parts[i], BATCH))
    stream = captioner(where, dist.device, precision, workers)(images, batches)
    with progress(sum(len(parts[i]) for i in left), "captions", dist, together=True) as bar:
        for i in mine:
            texts = []
            for rows in chunks(parts[i], BATCH):
                texts += next(stream)
                bar.update(len(rows))
            write_json(files[i], texts)
    barrier(dist)
    return [text for file in files for text in read_json(file)] if dist.main else []


def captioner(where: str, device: torch.device, precision: str, workers: int = 0) -> Callable[..., Iterator[list[str]]]:
    """-> function: images, batches of rows -> their captions, batch by batch: greedy, no prompt, at most 16 new tokens,
    stripped. The model is loaded when the first of them is asked for.

    where: a folder of models.check_models of kind "captioner". bf16: the whole model is bfloat16. workers: processes
    that read the pictures and make of them what the processor makes.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    processor = AutoProcessor.from_pretrained(where)

    def view(image: Any) -> Tensor:
        """float32 [3, S, S]: no bytes, for how they become floats is the processor's secret."""
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def write(images: Sequence, batches: Iterable[Sequence[int]]) -> Iterator[list[str]]:
        model = AutoModelForImageTextToText.from_pretrained(where, dtype=dtype, use_safetensors=True).to(device).eval()
        if getattr(model.config, "image_token_index", 0) is None:  # BLIP-2 as older transformers saved it
            model.config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
        for x in Loader(images, view, device, workers)(batches):
            # Trap: in transformers 5 the sister repository's max_length=16 counts BLIP-2's 32 image tokens too.
            ids = model.generate(pixel_values=x.to(dtype), max_new_tokens=16, num_beams=1, do_sample=False)
            yield [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]

    return write


def read_sentences(flag: str, file: str | Path, names: Sequence[str]) -> list[list[str]]:
    """What a file of your own says about each of these classes, each text once.

    file: JSON {class name: [sentence, ...]}, or sentences.json as a run writes it; other classes may stand there too.
    UserError, which begins with the flag, for any other form, or a class without a sentence.
    """
    form = "wanted is {class name: [sentence, ...]}, or a run's sentences.json"
    try:
        given = _object(Path(file).expanduser())
        pairs = given.items() if isinstance(given, dict) else [(row["class_name"], row["sentences"]) for row in given]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{flag} {file}: {' '.join(str(error).split()) or type(error).__name__}") from error
    except (KeyError, TypeError) as error:  # a list of something else, or no list
        raise UserError(f"{flag} {file}: {form}") from error
    texts = {name: said for name, said in pairs if isinstance(name, str)}
    for name in names:
        said = texts.get(name, ())
        if not isinstance(said, list | tuple) or not all(_is_text(sentence) for sentence in said):
            raise UserError(f"{flag} {file}: the sentences of {name!r} are no list of texts; {form}")
        texts[name] = list(dict.fromkeys(filter(None, (" ".join(s.split()) for s in said))))
        if not texts[name]:
            raise UserError(f"{flag} {file}: no sentence for {name!r}; each class needs one or more")
    return [texts[name] for name in names]


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
