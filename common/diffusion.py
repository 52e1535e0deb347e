"""What the scripts do alike with a Stable Diffusion pipeline: load it frozen, read its noise schedule, encode prompts,
decode latents, and put a LoRA adapter on it. What a paper tunes (losses, guidance, sampling loops) is in its script.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from common.files import load_tensors, save_tensors
from common.launch import UserError

DECODED_PIXELS = 8 * 512 * 512  # decoded at a time: the VAE's last layers hold 1 GB per 512 x 512 image in float32


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """bf16: mixed precision for the forward passes of training and evaluation; fp32: nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def unmixed(device: torch.device) -> AbstractContextManager:
    """float32 inside of an autocast. On the device meta, where --plan counts, there is none to be left."""
    return torch.autocast(device.type, enabled=False) if device.type != "meta" else nullcontext()


def sent(device: torch.device, *tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    """These tensors of the CPU on the device; to a GPU from pinned memory, so that nothing waits for what is queued."""
    return (x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device) for x in tensors)


def load_pipeline(path: str, device: torch.device, precision: str, **more: Any) -> Any:
    """The stock StableDiffusionPipeline in path (of models.check_models), frozen, on the device, no safety checker.

    bf16: U-Net and text encoder are bfloat16; the VAE is read in float32 whatever the precision. more: load_kwargs of
    common.models, such as variant="fp16".
    """
    import diffusers.utils.logging
    import transformers.utils.logging
    from diffusers import StableDiffusionPipeline

    diffusers.utils.logging.disable_progress_bar()  # in a log file each would be hundreds of lines
    transformers.utils.logging.disable_progress_bar()
    dtype = {"default": torch.bfloat16 if precision == "bf16" else torch.float32, "vae": torch.float32}
    off = dict(safety_checker=None, requires_safety_checker=False, use_safetensors=True)
    pipe = StableDiffusionPipeline.from_pretrained(path, dtype=dtype, **off, **more)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False).eval().to(device)
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)  # the layout that convolutions are fastest in, on CPU and GPU
    return pipe


def noise_schedule(config: Any) -> dict[str, Any]:
    """n, beta_start and beta_end of a scheduler's config. UserError unless the schedule is Stable Diffusion's."""
    if config.beta_schedule != "scaled_linear":
        raise UserError(f"--sd-model: its noise schedule is {config.beta_schedule!r}; scaled_linear is needed")
    return dict(n=config.num_train_timesteps, beta_start=config.beta_start, beta_end=config.beta_end)


def latent_shape(pipe: Any, size: int) -> tuple[int, int, int]:
    """Channels, rows and columns of the latent of an image of size x size pixels: 4, size / 8, size / 8."""
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    return pipe.unet.config.in_channels, size // factor, size // factor


def token_ids(pipe: Any, prompts: Sequence[str]) -> torch.Tensor:
    """M prompts -> [M, 77], padded and truncated to the tokenizer's full length."""
    settings = dict(padding="max_length", truncation=True, max_length=pipe.tokenizer.model_max_length)
    return pipe.tokenizer(list(prompts), return_tensors="pt", **settings).input_ids


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: Iterable[str]) -> dict[str, torch.Tensor]:
    """Distinct prompts -> {prompt: last hidden state [77, W]}, one at a time: the same bits in any company."""
    device = pipe.text_encoder.device
    return {p: pipe.text_encoder(token_ids(pipe, [p]).to(device))[0][0] for p in prompts}


@torch.no_grad()
def decode(pipe: Any, z: torch.Tensor, precision: str) -> torch.Tensor:
    """Latents [B, 4, h, w] at the U-Net's scale -> uint8 [B, 3, H, W] on the CPU.

    In equal slices, so that memory stays flat and an image does not depend on its place in the batch. UserError when
    a latent is not finite: it would be saved as a black picture.
    """
    if not z.isfinite().all():
        raise UserError("generation: a latent is not finite; try --precision fp32 or a lower guidance")
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    most = max(1, DECODED_PIXELS // (z.shape[-1] * z.shape[-2] * factor**2))
    size = next(s for s in range(min(most, len(z)), 0, -1) if len(z) % s == 0)
    pixels = []
    for part in z.float().split(size):
        with autocast(precision, z.device):
            x = pipe.vae.decode(part / pipe.vae.config.scaling_factor).sample.float()
        pixels.append(((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu())
    return torch.cat(pixels)


# ---------------------------------------------------------------------------------------
# LoRA: y = W x + b + (alpha / r) B A x. The files hold alpha = r, so that no alpha need be stored.


def lora_config(r: int, targets: Sequence[str]) -> Any:
    """peft's settings for rank r, alpha = r, no dropout, on the linear layers whose names end in one of targets."""
    from peft import LoraConfig

    return LoraConfig(r=r, lora_alpha=r, lora_dropout=0.0, target_modules=list(targets))


def lora_parameters(parts: Sequence[torch.nn.Module]) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of the adapters that add_adapter put into these networks, float32 whatever the network is."""
    from diffusers.training_utils import cast_training_params

    cast_training_params(list(parts), torch.float32)
    return [(name, p) for part in parts for name, p in part.named_parameters() if p.requires_grad]


@torch.no_grad()
def reset_lora(layers: Sequence[tuple[str, torch.nn.Parameter]], r: int, *seed: int | str) -> None:
    """A ~ N(0, 1 / r^2) from generators seeded by (*seed, name), B = 0: the adapter starts as the stock network."""
    from common.distributed import generator

    for name, p in layers:
        noise = torch.randn(p.shape, generator=generator(*seed, name)) / r if "lora_A" in name else torch.zeros(p.shape)
        p.copy_(noise)


def save_lora(path: str | Path, **parts: torch.nn.Module) -> None:
    """Adapters of unet=... (and text_encoder=...) in the file that load_lora_weights of diffusers reads.

    Keys are peft's, <part>.<module>.lora_A.weight, which diffusers' converter to kohya's format takes as they are. Text
    keys keep the level `text_model`, which the newest transformers dropped from its modules: diffusers from 0.30 on and
    kohya's tools ask for it, and the newest diffusers take it away themselves.
    """
    from peft.utils import get_peft_model_state_dict

    tensors = {}
    for part, module in parts.items():
        for key, tensor in get_peft_model_state_dict(module).items():
            level = "text_model." if part == "text_encoder" and not key.startswith("text_model.") else ""
            tensors[f"{part}.{level}{key}"] = tensor.float().cpu().contiguous()
    save_tensors(path, tensors)


def read_lora(path: str | Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A file of save_lora -> {"unet.<module>" or "text_encoder.<module>": (A [r, in], B [out, r])}, alpha = r."""
    tensors, found = load_tensors(path), {}
    for key in [k for k in tensors if k.endswith(".lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight").replace("text_encoder.text_model.", "text_encoder.")
        found[name] = tensors[key], tensors[key.replace("lora_A", "lora_B")]
    return found


class Adapter:
    """The networks of a pipeline with one LoRA file on them at a time; no pipeline is rebuilt for a change.

    float32: folded into the weights, W = W0 + s B A, always from a copy of W0, so nothing adds up over changes.
    bfloat16: kept apart, y = W x + s B (A x). A bfloat16 weight of 0.02 is known to 1e-4, and a tuned adapter changes
    it by less: folding loses 3 % of it at an rms of B of 5e-3, 13 % at 1e-3, half of it at 2e-4.
    """

    def __init__(self, pipe: Any):
        text = pipe.text_encoder
        self.parts = {"unet": pipe.unet, "text_encoder": getattr(text, "text_model", text)}
        self.stock: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.apart: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        # Now, and not with the first file: a compiled network does not see hooks that come after its first call.
        for part, network in self.parts.items():
            for name, layer in network.named_modules() if network is not None else ():
                if isinstance(layer, torch.nn.Linear) and layer.weight.dtype != torch.float32:
                    layer.register_forward_hook(lambda _, x, y, name=f"{part}.{name}": self._added(name, x[0], y))

    @torch.no_grad()
    def use(self, file: str | Path | None, scale: float = 1.0) -> None:
        """file: of save_lora, or None for the stock networks."""
        for weight, stock in self.stock.values():
            weight.copy_(stock)
        self.apart.clear()
        for name, (a, b) in (read_lora(file) if file else {}).items():
            part, module = name.split(".", 1)
            layer = self.parts[part].get_submodule(module)
            a, b = a.to(layer.weight.device), b.to(layer.weight.device)
            if layer.weight.dtype == torch.float32:
                _, stock = self.stock.setdefault(name, (layer.weight, layer.weight.clone()))
                layer.weight.copy_(stock + scale * (b @ a))
                continue
            self.apart[name] = a.to(layer.weight.dtype), (scale * b).to(layer.weight.dtype)

    def _added(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if name not in self.apart:
            return y
        a, b = self.apart[name]
        return y + F.linear(F.linear(x, a), b)
