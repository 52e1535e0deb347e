"""Names and files of open_clip: where the weights of a name lie; networks and tokenizers from the files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import hub
from common.launch import UserError
from common.modelfiles import KEY_FILE, explained, inside, names_in, read_object, tensors_in, weights

CONFIG_FILE = KEY_FILE["clip"]
BPE_PATTERN = "*bpe*.txt.gz"  # the merges of a folder's own tokenizer
ADVICE = (
    "CLIP is loaded by open_clip: give a folder with open_clip_config.json and open_clip_model.safetensors, "
    "an `arch/tag` such as ViT-B-16-quickgelu/openai (the same network as openai/clip-vit-base-patch16), "
    "`hf-hub:org/name`, or `tiny`"
)


def is_name(name: str) -> bool:
    import open_clip

    return name.rpartition("/")[0] in open_clip.list_models()


def repository(name: str) -> tuple[str, str]:
    """open_clip's `arch/tag` -> its hub repository and the name of its safetensors file. UserError for unknown ones."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    arch, _, tag = name.rpartition("/")
    if not arch and tag in open_clip.list_models():
        tags = ", ".join(list_pretrained_tags_by_model(tag)) or "none"
        raise UserError(f"clip: {name} names no weights: give {name}/TAG (tags: {tags})")
    if not is_name(name):
        raise UserError(f"unknown clip {name!r}: no such folder and no open_clip architecture; {ADVICE}")
    weights = get_pretrained_cfg(arch, tag)
    if not weights:
        tags = ", ".join(list_pretrained_tags_by_model(arch)) or "none; open_clip has no weights for it"
        raise UserError(f"clip: no weights {tag!r} for {arch}; tags: {tags}")
    # Trap: open_clip only warns when the activation that the weights were trained with is not the model's. The
    # features are then wrong in every layer and zero-shot accuracy drops by several points.
    wants, has = weights.get("quick_gelu", False), open_clip.get_model_config(arch).get("quick_gelu", False)
    if wants != has:
        right = f"{arch}-quickgelu" if wants else arch.removesuffix("-quickgelu")
        kind = "QuickGELU" if wants else "GELU"
        raise UserError(f"clip: the weights {tag!r} were trained with {kind}: use {right}/{tag}")
    repo, _, file = weights.get("hf_hub", "").rpartition("/")
    if not repo:
        raise UserError(f"clip: the weights {tag!r} of {arch} are pickled, which is never read here; take another tag")
    return repo, f"{file.rpartition('.')[0]}.safetensors" if file else "open_clip_model.safetensors"


def files(where: str) -> tuple[str, dict[str, Any], dict[str, Any], Path]:
    """A resolved CLIP -> open_clip's name for it, model_cfg, preprocess_cfg, the file of its weights, here now.

    The name is `local-dir:FOLDER` for folders and for repositories in open_clip's layout.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    folder = Path(where)
    if where.startswith("hf-hub:"):
        folder = hub.fetch(where.removeprefix("hf-hub:"), "clip")
    elif not folder.is_dir():
        arch, tag = where.rsplit("/", 1)
        repo, file = repository(where)
        about = get_pretrained_cfg(arch, tag)
        preprocess = {k: about[k] for k in ("mean", "std", "interpolation", "resize_mode") if about.get(k)}
        return arch, open_clip.get_model_config(arch), preprocess, hub.fetch(repo, "clip", file) / file
    about = read_object(folder / CONFIG_FILE)
    file = weights(inside(names_in(folder), ""), "clip", folder)[0][0]
    return f"local-dir:{folder}", about["model_cfg"], about.get("preprocess_cfg") or {}, folder / file


def build(arch: str, preprocess: dict[str, Any], file: Path, device: str = "cpu") -> Any:
    """open_clip's model with the weights of a safetensors file; on the device meta without values.

    arch: open_clip's name, or local-dir:FOLDER. Raises UserError when weights and configuration do not fit.
    """
    import open_clip
    import torch

    tensors_in(file.parent, [file.name])
    with explained(file.parent, "its weights and configuration do not fit"), torch.device(device):
        mine = dict(load_weights=False, pretrained_text=False, device=device, force_preprocess_cfg=preprocess)
        model = open_clip.create_model(arch, precision="fp32", **mine)
        open_clip.load_checkpoint(model, str(file))
    return model


def image_tower(where: str) -> Any:
    """The image tower of a resolved CLIP, on the device meta."""
    arch, _, preprocess, file = files(where)
    return build(arch, preprocess, file, "meta").visual


def tokenizer(arch: str, config: dict[str, Any]) -> Callable[[list[str]], Any]:
    """list of N texts -> LongTensor [N, context]: open_clip's tokenizer for a model, with its folder's own BPE file.

    Raises UserError for a broken or second BPE file, and for more tokens than the text tower has rows.
    """
    import open_clip

    text, folder = config["text_cfg"], Path(arch.removeprefix("local-dir:"))
    own = bpe_files(folder)
    with explained(folder):
        # Trap: get_tokenizer("local-dir:...") gives the stock tokenizer of 49,408 tokens whatever the folder holds.
        if own:
            options = dict(context_length=text.get("context_length", 77), **text.get("tokenizer_kwargs", {}))
            made = open_clip.SimpleTokenizer(bpe_path=str(own[0]), **options)
        else:
            made = open_clip.get_tokenizer(arch)
    if (size := getattr(made, "vocab_size", 0)) > text.get("vocab_size", 49408):
        raise UserError(
            f"clip: the tokenizer of {arch} has {size} tokens, its text tower {text['vocab_size']}: "
            f"put the model's own BPE file ({BPE_PATTERN}) beside {CONFIG_FILE}"
        )
    return made


def bpe_files(folder: Path) -> tuple[Path, ...]:
    """The gzipped merges of a CLIP folder's own tokenizer: none or one."""
    files = tuple(sorted(folder.glob(BPE_PATTERN))) if folder.is_dir() else ()
    if len(files) > 1:
        raise UserError(f"clip: {folder} has {len(files)} BPE files ({', '.join(f.name for f in files)}): keep one")
    return files
