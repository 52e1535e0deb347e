"""The files of a model: which ones loading it reads, and whether they fit together, found out without loading weights.

Networks are built on the device `meta`, where tensors have shapes and no values, and the stock loaders then compare
them with the names and shapes in the safetensors files, old names and shared weights included.
"""

import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import read_json
from common.launch import UserError

if TYPE_CHECKING:
    import torch

# The class of each part of the pipelines that a kind allows. "Scheduler" and "Tokenizer" stand for all of that name.
SD = dict(unet="UNet2DConditionModel", vae="AutoencoderKL", text_encoder="CLIPTextModel", tokenizer="Tokenizer")
SD |= dict(scheduler="Scheduler")
XL = SD | dict(text_encoder_2="CLIPTextModelWithProjection", tokenizer_2="Tokenizer")
IF = dict(unet="UNet2DConditionModel", text_encoder="T5EncoderModel", tokenizer="Tokenizer", scheduler="Scheduler")
IF_2 = dict(unet="UNet2DConditionModel", scheduler="Scheduler", image_noising_scheduler="Scheduler")
PIPELINES = {
    "generator": {"StableDiffusionPipeline": SD},
    "painter": {"StableDiffusionPipeline": SD, "StableDiffusionXLPipeline": XL, "IFPipeline": IF},
    "upsampler": {"IFSuperResolutionPipeline": IF_2},
}
# Parts that no script loads, unless the table above asks for them; those with code of their own are among them.
IGNORED = ("safety_checker", "watermarker", "image_encoder", "feature_extractor", "text_encoder", "tokenizer")
KEY_FILE = dict.fromkeys(PIPELINES, "model_index.json") | {"clip": "open_clip_config.json"}
KEY_FILE |= dict.fromkeys(("captioner", "seq2seq", "chat", "timm"), "config.json")
# model_type in config.json -> what the stock classes load as this kind
MODEL_TYPES = {
    "captioner": ("blip", "blip-2", "git", "vision-encoder-decoder"),  # they speak without a prompt
    "seq2seq": ("t5", "mt5", "umt5", "longt5", "bart", "mbart", "pegasus", "encoder-decoder", "t5gemma"),
}
STEMS = {  # names of weights without .safetensors, where it is not "model"
    "clip": ("open_clip_model", "open_clip_pytorch_model", "model"),
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
MEND = "fetch the model again"


def read_object(path: str | Path) -> dict[str, Any]:
    """A JSON file of a model. UserError when it is missing or damaged."""
    if isinstance(found := read_json(path, MEND), dict):
        return found
    raise UserError(f"{path}: damaged, holds no JSON object; {MEND}")


# ---------------------------------------------------------------------------------------
# Which files: from names alone, so that it serves folders, the cache and the hub


def names_in(folder: Path) -> set[str]:
    """Names of the files in a folder and its folders."""
    return {f.relative_to(folder).as_posix() for depth in ("*", "*/*") for f in folder.glob(depth) if f.is_file()}


def inside(names: Collection[str], part: str) -> set[str]:
    """Those directly in the folder of a part, without it."""
    start = f"{part}/" if part else ""
    return {name[len(start) :] for name in names if name.startswith(start) and "/" not in name[len(start) :]}


def weights(names: Collection[str], what: str, where: object) -> tuple[list[str], str | None]:
    """Safetensors files among the names in one folder, with their index, and their variant, None or "fp16".

    what: a part of a pipeline or a kind. UserError naming `where` if there are none, or not all.
    """
    for variant in (None, "fp16"):
        dot = f".{variant}" if variant else ""
        for stem in STEMS.get(what, ("model",)):
            if f"{stem}{dot}.safetensors" in names:
                return [f"{stem}{dot}.safetensors"], variant
            index = f"{stem}.safetensors.index{dot}.json"
            shards = sorted(name for name in names if re.fullmatch(rf"{stem}{dot}-\d+-of-\d+\.safetensors", name))
            if index in names or shards:
                if index in names and shards and len(shards) == int(shards[0][-17:-12]):
                    return [index, *shards], variant
                raise UserError(f"{where} is incomplete: not all files of its weights are there ({stem}{dot}-...)")
    if pickles := sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))):
        convert = "convert them once to safetensors (save_pretrained of the loaded model writes them)"
        raise UserError(f"{where} has only pickled weights ({pickles[0]}), which are never read here; {convert}")
    raise UserError(f"{where} is incomplete: no .safetensors file; fetch or build it again")


def parts_of(index: dict[str, Any], kind: str, where: object) -> dict[str, str]:
    """model_index.json -> {part: class}. UserError unless each is one that this kind has; nothing is imported here."""
    name, allowed = index.get("_class_name"), PIPELINES[kind]
    if not isinstance(name, str) or name not in allowed:
        raise UserError(f"{where} is a {name}; the script takes {' or '.join(allowed)}")
    found: dict[str, str] = {}
    for part, value in index.items():
        wanted = allowed[name].get(part)
        if not isinstance(value, list) or not any(value) or (part in IGNORED and not wanted):
            continue
        library, cls = value if len(value) == 2 else (None, None)
        fits = str(cls).removesuffix("Fast").endswith(wanted) if wanted in ("Tokenizer", "Scheduler") else cls == wanted
        if library not in ("diffusers", "transformers") or not fits:
            raise UserError(f"{where}: model_index.json names {library}.{cls} as {part}; wanted: {wanted or 'nothing'}")
        found[part] = cls
    if absent := sorted(allowed[name].keys() - found):
        raise UserError(f"{where} is a {name} without {', '.join(absent)}; {MEND}")
    return found


def is_network(cls: str) -> bool:
    return not cls.removesuffix("Fast").endswith(("Tokenizer", "Scheduler"))


def needed(names: Collection[str], kind: str, where: object, read: Callable[[str], str | Path]) -> list[str]:
    """All files that loading reads, from the names in a folder or repository. read(name): the path of one.

    Raises UserError for what is missing.
    """
    if kind not in PIPELINES:
        parts = {"": kind}
    else:
        parts = parts_of(read_object(read(KEY_FILE[kind])), kind, where)
    found = [KEY_FILE[kind]]
    for part, cls in parts.items():
        own, place = inside(names, part), f"{where}/{part}" if part else where
        if not own:
            raise UserError(f"{where} is incomplete: no folder {part}; {MEND}")
        wanted = {n for n in own if n.endswith((".json", ".txt", ".model", ".txt.gz")) and ".index." not in n}
        wanted |= set(weights(own, part or kind, place)[0]) if is_network(cls) else set()
        found += [f"{part}/{name}" if part else name for name in sorted(wanted - {KEY_FILE[kind]})]
    return found


# ---------------------------------------------------------------------------------------
# What is in them


def tensors_in(folder: Path, files: Collection[str]) -> "dict[str, torch.Tensor]":
    """Names and shapes in safetensors files, as tensors without values. The first row of each must be finite.

    Raises UserError for a damaged file, nan, and shards that are not those of their index.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    found: dict[str, torch.Tensor] = {}
    for file in [name for name in files if name.endswith(".safetensors")]:
        try:
            with safe_open(folder / file, "pt") as opened:  # checks the header, and the size of the file against it
                for name in opened.keys():
                    rows = opened.get_slice(name)
                    shape = rows.get_shape()
                    sample = rows[:1] if shape else opened.get_tensor(name)
                    if not sample.float().isfinite().all():
                        raise UserError(f"{folder / file}: {name} is not finite; {MEND}")
                    found[name] = torch.empty(shape, dtype=sample.dtype, device="meta")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / file}: damaged or cut ({' '.join(str(error).split())}); {MEND}") from error
    for file in [name for name in files if name.endswith(".json")]:
        if set(read_object(folder / file).get("weight_map", ())) != set(found):
            raise UserError(f"{folder / file}: does not list the tensors that the files beside it hold; {MEND}")
    return found


@contextmanager
def explained(place: Path, what: str = "cannot be loaded") -> Iterator[None]:
    """Whatever stock code says about files that it cannot use, in one line; its warnings are not shown."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:240]
        raise UserError(f"{place}: {what} ({type(error).__name__}: {said}); {MEND}") from error
    finally:
        logging.disable(logging.NOTSET)


def _network(folder: Path, what: str, cls: Any) -> Any:
    """The network in a folder, on the device meta. what: its part or kind; cls: of diffusers, of transformers, Auto...

    Raises UserError unless its weights have the names and shapes that config.json leads to.
    """
    import torch

    config = read_object(folder / "config.json")
    files, variant = weights(names_in(folder), what, folder)
    found = tensors_in(folder, files)
    how: dict[str, Any] = dict(output_loading_info=True, ignore_mismatched_sizes=True)
    with explained(folder):
        if cls.__module__.startswith("diffusers"):
            if config.get("_class_name", cls.__name__) != cls.__name__:
                raise UserError(f"{folder}: config.json is of a {config['_class_name']}, not a {cls.__name__}; {MEND}")
            how |= dict(device_map={"": "meta"}, variant=variant, use_safetensors=True, local_files_only=True)
            network, info = cls.from_pretrained(folder, **how)
        else:
            wanted = getattr(cls, "config_class", None) or _auto("Config")
            if (kind := config.get("model_type")) != getattr(wanted, "model_type", kind):
                raise UserError(f"{folder}: config.json is of a {kind}, not a {wanted.model_type}; {MEND}")
            built = wanted.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if hasattr(cls, "from_config"):
                with torch.device("meta"):
                    cls = type(cls.from_config(built))
            network, info = cls.from_pretrained(None, config=built, state_dict=found, device_map="meta", **how)
    misfit = f"{folder}: its weights do not fit its config.json"
    for name, has, wants in sorted(info["mismatched_keys"]):
        raise UserError(f"{misfit}: {name} is {[*has]}, not {[*wants]}; {MEND}")
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{misfit}: no {missing[0]}; {MEND}")
    # A few names that nobody asks for are usual (position ids, copies of shared weights), a layer of them is not.
    if len(spare := sorted(info["unexpected_keys"])) > max(2, len(found) // 50):
        raise UserError(f"{misfit}, which leaves out {spare[0]}, ...; {MEND}")
    return network


def _auto(name: str) -> Any:
    import transformers

    return getattr(transformers, f"Auto{name}")


def _tokenizer(folder: Path, cls: Any, vocabulary: int) -> Any:
    """Loaded, since a broken one is found in no other way. vocabulary: rows of the embedding that its ids index."""
    from transformers.utils import is_sentencepiece_available

    names = inside(names_in(folder), "")
    if not names & set(TOKENIZER_FILES) or ("vocab.json" in names and not names & {"merges.txt", "tokenizer.json"}):
        raise UserError(f"{folder} is incomplete: no tokenizer files ({', '.join(TOKENIZER_FILES)}); {MEND}")
    if "spiece.model" in names and "tokenizer.json" not in names and not is_sentencepiece_available():
        # transformers would go on with another format, and name that one's package.
        raise UserError(f"{folder}: spiece.model is read with a package that is not here: pip install sentencepiece")
    with explained(folder):
        loaded = cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    tokenizer = getattr(loaded, "tokenizer", loaded)
    if not 32 <= len(tokenizer) <= vocabulary:
        raise UserError(f"{folder}: its tokenizer has {len(tokenizer)} tokens, the network {vocabulary}; {MEND}")
    return loaded


def check_pipeline(folder: Path, kind: str) -> None:
    """Raise UserError unless every part of a diffusers pipeline can be loaded and fits the others."""
    import diffusers
    import transformers

    parts, built = parts_of(read_object(folder / KEY_FILE[kind]), kind, folder), {}
    for part, cls in parts.items():
        if is_network(cls):
            library = diffusers if hasattr(diffusers, cls) else transformers
            built[part] = _network(folder / part, part, getattr(library, cls))
    for part, cls in parts.items():
        if "tokenizer" in part:
            text = built[part.replace("tokenizer", "text_encoder")].config
            tokenizer = _tokenizer(folder / part, getattr(transformers, cls, None), text.vocab_size)
            most = getattr(text, "max_position_embeddings", None)
            if most and tokenizer.model_max_length > most:
                raise UserError(
                    f"{folder / part}: model_max_length is {tokenizer.model_max_length}, above {most}; {MEND}"
                )
        elif "scheduler" in part:
            config = read_object(folder / part / "scheduler_config.json")
            with explained(folder / part):
                getattr(diffusers, cls).from_config(config)
    unet = built["unet"].config
    if "vae" in built:
        width = sum(built[part].config.hidden_size for part in built if part.startswith("text_encoder"))
        for what, wants in dict(in_channels=built["vae"].config.latent_channels, cross_attention_dim=width).items():
            if unet[what] != wants:
                raise UserError(f"{folder}: the parts do not fit: {what} of unet is {unet[what]}, not {wants}; {MEND}")


def check_language(folder: Path, kind: str) -> None:
    """Raise UserError unless a captioner, sequence-to-sequence or chat model of transformers can be loaded."""
    config = read_object(folder / "config.json")
    model_type, types = config.get("model_type"), MODEL_TYPES.get(kind)
    if types and model_type not in types:
        raise UserError(f"{kind}: {folder} holds a {model_type or 'model'}; wanted is one of {', '.join(types)}")
    names = dict(captioner="ModelForImageTextToText", seq2seq="ModelForSeq2SeqLM", chat="ModelForCausalLM")
    network = _network(folder, kind, _auto(names[kind]))
    rows = network.get_input_embeddings().weight.shape[0]
    loaded = _tokenizer(folder, _auto("Processor" if kind == "captioner" else "Tokenizer"), rows)
    if kind == "captioner" and not hasattr(loaded, "image_processor"):
        raise UserError(f"{kind}: {folder} is incomplete: no preprocessor_config.json; {MEND}")
    if kind == "chat" and not loaded.chat_template:
        raise UserError(f"{kind}: {folder}: its tokenizer has no chat template; give a model made for chats")
