"""What a forward pass of a network costs, counted on the real architecture with tensors that have shapes and no values.

Needs no weights and no network: the configs of Stable Diffusion 1.x, 2.x and XL stand here, those of CLIP in open_clip,
those of all else in its folder or in the local cache.
"""

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from common import models
from common.files import read_json
from common.launch import UserError

# A pass in forward passes. Backward costs two through weights and activations, and one through activations alone
# (frozen weights under LoRA, whose own small matrices are left out).
FORWARD, FROZEN, TRAINED = 1, 2, 3


@dataclass(frozen=True)
class Cost:
    """A pass for one image (or text). tflop: forward and, if train is not FORWARD, backward. held: bytes of activations
    at the peak of the forward pass, in float32. numbers: parameters of the whole network."""

    tflop: float
    held: float
    numbers: int


class _Held(TorchDispatchMode):
    """The most bytes that were alive at once among the tensors made inside, those of the network left out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        own = [*network.parameters(), *network.buffers()]
        self.alive, self.now, self.peak = {x.untyped_storage()._cdata: None for x in own}, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            # Attention matrices [.., heads, L, L]: without a device nothing fused runs, on one they are never held.
            if not isinstance(x, torch.Tensor) or x.ndim > 2 and 64 <= x.shape[-1] == x.shape[-2] and x.shape[-3] <= 32:
                continue
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.alive:
                self.now += size
                self.alive[key] = weakref.ref(storage, lambda _, key=key, size=size: self._gone(key, size))
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        self.alive.pop(key, None)


def count(network: nn.Module, forward: Callable[[], Any], train: int = FORWARD) -> Cost:
    """forward() of a network on the device meta. train: FORWARD, FROZEN (its inputs have gradients) or TRAINED."""
    network.requires_grad_(train == TRAINED).eval()
    with torch.set_grad_enabled(train != FORWARD), _Held(network) as held, FlopCounterMode(display=False) as flop:
        kept = forward()  # noqa: F841  # its graph holds what the backward pass needs
    return Cost(train * flop.get_total_flops() / 1e12, held.peak, sum(p.numel() for p in network.parameters()))


def _empty(*shape: int, train: int = FORWARD) -> torch.Tensor:
    return torch.empty(*shape, device="meta", requires_grad=train != FORWARD)


def _ids(n: int) -> torch.Tensor:
    return torch.zeros(1, n, dtype=torch.long, device="meta")


def local(name: str) -> bool:
    """Is it `tiny` or a folder?"""
    return name == "tiny" or Path(name).expanduser().is_dir()


def _folder(name: str, kind: str) -> Path:
    """The folder of `tiny`, of a local model, or of a hub id in the cache; else UserError."""
    if local(name):
        return Path(models.resolve(name, kind))
    from huggingface_hub import try_to_load_from_cache

    repo = name.removeprefix("hf-hub:")
    found = try_to_load_from_cache(repo, models.KEY_FILE[kind]) if repo.count("/") == 1 else None
    if not isinstance(found, str):
        raise UserError(f"--plan: {name}: its networks are neither known here nor in the cache; name a local folder")
    return Path(found).parent


# ---------------------------------------------------------------------------------------
# Stable Diffusion

_VAE = dict(
    block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4, layers_per_block=2,
    up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4,
)  # fmt: skip
_TEXT1 = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
_TEXT2 = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
_UNET2 = dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
_UNET_XL = dict(
    block_out_channels=[320, 640, 1280], down_block_types=["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    up_block_types=[*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"], attention_head_dim=[5, 10, 20],
    transformer_layers_per_block=[1, 2, 10], cross_attention_dim=2048, use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
_TEXT_XL = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
_STORED = dict(_class_name="PNDMScheduler")
KNOWN = {  # part of a hub id: its configs
    r"stable-diffusion-2": dict(unet=_UNET2, vae=_VAE, text_encoder=_TEXT2, scheduler=_STORED),
    r"stable-diffusion-v?1|Realistic_Vision": dict(
        unet=dict(cross_attention_dim=768), vae=_VAE, text_encoder=_TEXT1, scheduler=_STORED
    ),
    r"stable-diffusion-xl": dict(
        unet=_UNET_XL, vae=_VAE, text_encoder=_TEXT1, text_encoder_2=_TEXT_XL | dict(projection_dim=1280),
        scheduler=dict(_class_name="EulerDiscreteScheduler"),
    ),
}  # fmt: skip


@cache
def sd_config(name: str) -> dict[str, dict[str, Any]]:
    """Configs of unet, vae, text_encoder (XL: text_encoder_2 too) and scheduler."""
    for pattern, configs in KNOWN.items():
        if re.search(pattern, name) and not local(name):
            return configs
    folder = _folder(name, "painter")
    if not (folder / "vae").is_dir():
        raise UserError(f"--plan: {name} works on pixels; only Stable Diffusion's costs and GLIDE's are counted")
    parts = ["unet", "vae", "text_encoder", *["text_encoder_2"] * (folder / "text_encoder_2").is_dir()]
    configs = {part: read_json(folder / part / "config.json") for part in parts}
    return configs | {"scheduler": read_json(folder / "scheduler" / "scheduler_config.json")}


@cache
def _sd_part(name: str, part: str) -> nn.Module:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = {k: v for k, v in sd_config(name)[part].items() if not k.startswith("_")}
    with torch.device("meta"):
        if part.startswith("text_encoder"):
            return (CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection)(CLIPTextConfig(**config))
        return (UNet2DConditionModel if part == "unet" else AutoencoderKL)(**config)


def latent_shape(name: str, size: int) -> tuple[int, int, int]:
    """Channels, rows and columns of the latent of an image of size x size pixels."""
    config = _sd_part(name, "vae").config
    side = size // 2 ** (len(config.block_out_channels) - 1)
    return config.latent_channels, side, side


@cache
def sd_cost(name: str, part: str, size: int, train: int = FORWARD) -> Cost:
    """Of the unet, encode, decode or text_encoder (one prompt) of a generator, for images of size x size pixels.

    name: `tiny`, a folder, a hub id of the 1.x, 2.x or XL family, or one in the cache.
    """
    shape = latent_shape(name, size)
    if part in ("encode", "decode"):
        vae = _sd_part(name, "vae")
        return count(
            vae, lambda: vae.encode(_empty(1, 3, size, size)) if part == "encode" else vae.decode(_empty(1, *shape))
        )
    tokens = _sd_part(name, "text_encoder").config.max_position_embeddings
    if part == "text_encoder":
        texts = [_sd_part(name, part) for part in sd_config(name) if part.startswith("text_encoder")]
        each = [count(net, lambda net=net: net(_ids(tokens)), train) for net in texts]
        return Cost(sum(c.tflop for c in each), max(c.held for c in each), sum(c.numbers for c in each))
    net = _sd_part(name, part)
    z, h = _empty(1, *shape, train=train), _empty(1, tokens, net.config.cross_attention_dim)
    more = {}
    if net.config.addition_embed_type == "text_time":  # XL: a pooled text, and six sizes
        pooled = net.config.projection_class_embeddings_input_dim - 6 * net.config.addition_time_embed_dim
        more = dict(added_cond_kwargs=dict(text_embeds=_empty(1, pooled), time_ids=_empty(1, 6)))
    return count(net, lambda: net(z, _empty(1), h, **more), train)


# ---------------------------------------------------------------------------------------
# Classifiers


@cache
def _clip_config(name: str) -> dict[str, Any]:
    import open_clip

    arch = name.rpartition("/")[0] or name
    known = None if local(name) or name.startswith("hf-hub:") else open_clip.get_model_config(arch)
    return known or read_json(_folder(name, "clip") / models.KEY_FILE["clip"])["model_cfg"]


def _clip(name: str, tokens: int | None = None) -> nn.Module:
    import open_clip

    config = _clip_config(name)
    text = config["text_cfg"] | ({"context_length": tokens} if tokens else {})
    kind = open_clip.CustomTextCLIP if config.get("custom_text") or "hf_model_name" in text else open_clip.CLIP
    more = {k: v for k, v in config.items() if k in ("embed_dim", "vision_cfg", "quick_gelu")}
    with torch.device("meta"):
        return kind(**more, text_cfg=text)


def clip_size(name: str) -> int:
    """Pixels per side that the image tower sees."""
    size = _clip_config(name)["vision_cfg"].get("image_size", 224)
    return size[0] if isinstance(size, (tuple, list)) else size


def clip_is_resnet(name: str) -> bool:
    return isinstance(_clip_config(name)["vision_cfg"].get("layers"), (tuple, list))


@cache
def clip_cost(name: str, part: str, tokens: int = 77, train: int = FORWARD) -> Cost:
    """Of the image or text tower of a CLIP by its name for common.clip.load_clip. tokens: length of the text."""
    if part == "text":
        net = _clip(name, tokens)
        return count(net, lambda: net.encode_text(_ids(tokens)), train)
    net, size = _clip(name), clip_size(name)
    return count(net, lambda: net.encode_image(_empty(1, 3, size, size, train=train)), train)


@cache
def timm_cost(name: str, size: int, classes: int, train: int = FORWARD) -> Cost:
    import timm

    with torch.device("meta"):
        net = timm.create_model(name, num_classes=classes)
    return count(net, lambda: net(_empty(1, 3, size, size)), train)
