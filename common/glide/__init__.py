"""GLIDE (A. Nichol et al., arXiv:2112.10741): OpenAI's released, filtered models, read from their files and sampled.

    prompts --> tokens --> text tower of each network --> states [128, W] and a vector
    noise, or a noised image --> [base] 64 x 64, ancestral, guided --> 8 bits --> [upsampler] 256 x 256, DDIM

A folder holds the two networks and the tokenizer:
    base.pt, upsample.pt      https://openaipublic.blob.core.windows.net/diffusion/dec-2021/, or see `convert`
    vocab.json, merges.txt    GPT-2's, of the hub's openai-community/gpt2

network.py: the networks, and their weights' names; sampler.py: schedules and steps.
"""

import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import load_tensors, save_tensors
from common.glide.network import BASE, UPSAMPLER, GlideNet, read_settings, renamed
from common.glide.sampler import (
    Denoiser,
    as_uint8,
    cosine_alphas,
    fast27,
    kept_timesteps,
    linear_alphas,
    quantised,
    respaced,
    reverse,
)
from common.launch import UserError

URL = "https://openaipublic.blob.core.windows.net/diffusion/dec-2021/"
TEMPERATURE = 0.997  # of the noise that the upsampler starts from; with 1 images are sharper and at times grainy


class Glide:
    """Prompts and seeds -> images. side: of the base's images; the upsampler's are four times as large."""

    def __init__(self, base: GlideNet, upsampler: GlideNet, tokenizer: Any, device: torch.device, side: int):
        self.base, self.upsampler, self.tokenizer, self.device, self.side = base, upsampler, tokenizer, device, side

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B prompts -> ids [B, 128] int64, mask [B, 128] bool, True where a token stands.

        Lower case, cut after 128 tokens, padded with the vocabulary's last id (50256); "" is nothing but padding.
        """
        length, last = self.base.settings.context, self.base.settings.vocabulary - 1
        rows = [self.tokenizer.encode(prompt.lower()).ids[:length] for prompt in prompts]
        ids = torch.tensor([row + [last] * (length - len(row)) for row in rows])
        mask = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
        return ids.to(self.device), mask.to(self.device)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        guidance: float = 3.0,
        kept: Tensor | None = None,
        start: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """B prompts and seeds -> uint8 [B, 3, 4 side, 4 side] on the CPU.

        kept: the base's timesteps, ascending; None: 100 of the 1000. start(noise [B, 3, side, side], abar of the
        noisiest of them) -> what the base starts from; None: the noise. Each image has one CPU generator. It draws the
        starting noise, a noise for every step of the base (the last one has no use), then the upsampler's.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def draw(side: int = self.side) -> Tensor:
            return torch.stack([torch.randn(3, side, side, generator=g) for g in generators]).to(self.device)

        s = respaced(cosine_alphas(), kept_timesteps() if kept is None else kept)
        x = draw()
        if start is not None:
            x = start(x, s["abar"][-1])
        x = reverse(self.guided_base(prompts, guidance), x, s, draw, clamp=True)
        return self.enlarged(x, prompts, draw(4 * self.side))

    def guided_base(self, prompts: Sequence[str], w: float) -> Denoiser:
        """denoise(x, t) for B prompts: eps = eps_u + w (eps_c - eps_u), u: of the empty prompt, and v of the prompt."""
        text = self.base.encode(*self.tokens([*[""] * len(prompts), *prompts]))

        def denoise(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
            eps, v = self.base(torch.cat([x, x]), t, text)
            eps_u, eps_c = eps.chunk(2)
            return eps_u + w * (eps_c - eps_u), v.chunk(2)[1]

        return denoise

    @torch.no_grad()
    def enlarged(self, x: Tensor, prompts: Sequence[str], noise: Tensor) -> Tensor:
        """The base's images [B, 3, s, s], noise [B, 3, 4 s, 4 s] -> uint8 [B, 3, 4 s, 4 s] on the CPU; no guidance.

        UserError when x is not finite: it would be saved as a black picture.
        """
        if not x.isfinite().all():
            raise UserError("generation: an image is not finite; try --precision fp32 or a lower guidance")
        text, low, s = self.upsampler.encode(*self.tokens(prompts)), quantised(x), respaced(linear_alphas(), fast27())
        return as_uint8(reverse(lambda x, t: self.upsampler(x, t, text, low), TEMPERATURE * noise, s, clamp=True)).cpu()


# ---------------------------------------------------------------------------------------
# Files


def load_glide(folder: str | Path, device: torch.device | str, precision: str = "fp32", side: int = 64) -> Glide:
    """The GLIDE in folder, frozen. precision: fp32 or bf16. side: 64, or less with small networks for rehearsals.

    On the device "meta" every file, name and shape is checked and no weights are read. Raises UserError.
    """
    folder = Path(os.path.expanduser(folder))  # Path's own fails for an unknown user
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it should hold base.pt, upsample.pt, vocab.json and merges.txt")
    files = [weights_file(folder, name) for name in ("base", "upsample")]
    tokenizer = load_tokenizer(folder)
    base, upsampler = (
        load_network(f, s.inputs, device, precision) for f, s in zip(files, (BASE, UPSAMPLER), strict=True)
    )
    known = min(base.settings.vocabulary, upsampler.settings.vocabulary)
    if tokenizer.get_vocab_size() > known:
        raise UserError(f"{folder / 'vocab.json'}: {tokenizer.get_vocab_size()} tokens; the networks know {known}")
    return Glide(base, upsampler, tokenizer, torch.device(device), side)


def weights_file(folder: Path, name: str) -> Path:
    """<name>.safetensors, else <name>.pt. Raises UserError when neither is there."""
    for path in (folder / f"{name}.safetensors", folder / f"{name}.pt"):
        if path.is_file():
            return path
    raise UserError(f"{path}: no such file; GLIDE's is at {URL}{name}.pt")


def load_network(
    path: Path, inputs: int, device: torch.device | str, precision: str = "fp32", **heads: int
) -> GlideNet:
    """The network in path, which takes so many channels. bf16: see GlideNet.lower; the text tower stays float32.

    heads: head= and text_heads= where read_settings guesses wrong. Raises UserError for weights of anything else.
    """
    state = {key: tensor.to(device, torch.float32) for key, tensor in read_weights(path).items()}
    try:
        settings = replace(read_settings(state), **heads)
        if settings.inputs != inputs:
            raise ValueError(f"{settings.inputs} input channels in place of {inputs}")
        with torch.device("meta"):  # shapes only: there is nothing to initialise
            net = GlideNet(settings)
        weights, wanted = renamed(state, settings), net.state_dict()
        for key in sorted(weights.keys() | wanted.keys()):
            found, ours = (tuple(d[key].shape) if key in d else "missing" for d in (weights, wanted))
            if found != ours:
                raise ValueError(f"{key} {found} in place of {ours}")
    except (KeyError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not the weights of this network of GLIDE ({brief(error)}); see {URL}") from error
    net.load_state_dict(weights, assign=True)
    net.requires_grad_(False).eval()
    if precision == "bf16":
        net.lower(torch.bfloat16)
    return net


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights under their official names, on the CPU. Raises UserError for a damaged file.

    The one place in this program that reads a pickle: OpenAI publishes no other form. With weights_only it can build
    nothing but tensors and plain values.
    """
    if path.suffix == ".safetensors":
        return load_tensors(path)
    source = f"{URL}{path.name}"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a cut or foreign file makes of the unpickler
        raise UserError(f"{path}: no readable weights ({brief(error)}); download it again from {source}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path}: not a list of weights; GLIDE's is at {source}")
    return state


def convert(folder: str | Path) -> None:
    """Write base.safetensors and upsample.safetensors beside the .pt files: load_glide prefers them."""
    for name in ("base", "upsample"):
        save_tensors(Path(folder) / f"{name}.safetensors", read_weights(Path(folder) / f"{name}.pt"))


def load_tokenizer(folder: Path) -> Any:
    """Byte-level BPE from vocab.json and merges.txt, in which no text is special. Raises UserError."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    files = folder / "vocab.json", folder / "merges.txt"
    for path in files:
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; copy vocab.json and merges.txt of openai-community/gpt2 to {folder}"
            )
    try:
        tokenizer = Tokenizer(models.BPE.from_file(*map(str, files)))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{folder}: vocab.json and merges.txt are not a BPE vocabulary ({brief(error)})") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def brief(error: Exception) -> str:
    """The start of an error's first line."""
    return str(error).partition("\n")[0][:100]
