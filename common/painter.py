"""Text-to-image models of several families behind one function, `paint`: prompts and seeds -> pictures.

    painter = load_painter(found, "glide:DIR", device, ...)   # found: of common.models.check_models
    painter.paint(prompts, seeds, kept)                        # from noise
    painter.paint(prompts, seeds, kept, start, references)     # from start(reference, noise, abar)

Stable Diffusion 1.x and 2.x and XL work on latents, DeepFloyd IF and GLIDE on 64-pixel images. All are sampled by the
loop of common.glide.sampler over the timesteps `kept`. What a paper does with the start is in its script.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import models
from common.compiling import compiled
from common.distributed import seed_of
from common.files import read_json
from common.glide import load_glide, weights_file
from common.glide.sampler import Denoiser, as_uint8, kept_timesteps, quantised, respaced, reverse
from common.launch import UserError
from common.loader import to_unit

GLIDE = "glide:"  # --sd-model glide:DIR
Start = Callable[[Tensor, Tensor, Tensor], Tensor]
# What each family can do without; the papers' generators have neither checker nor watermark.
OPTIONAL = {
    "StableDiffusionPipeline": ("safety_checker", "requires_safety_checker"),
    "StableDiffusionXLPipeline": (),
    "IFPipeline": ("safety_checker", "requires_safety_checker", "watermarker"),
}
TEXTS = 512  # encoded prompts that stay on the device, 0.1 to 0.6 MB each: the sentences of a class come back


def repeated_to(b: int, items: Sequence) -> list:
    """The last entry repeated until there are b: networks see full micro-batches, and the bits of an image do not
    depend on its company."""
    return [*items, *[items[-1]] * (b - len(items))]


class Painter:
    """A stock pipeline of diffusers. side: pixels per side of the references that `latent` takes.

    Each image has one CPU generator; it draws the starting noise, then, if ancestral, that of each step.
    """

    def __init__(
        self, path: str, upsampler: str | None, device: torch.device, *, precision: str, size: int, guidance: float,
        micro_batch: int, ancestral: bool, compile: bool = False,
    ):  # fmt: skip
        from diffusers import DiffusionPipeline

        self.device, self.size, self.guidance, self.micro_batch = device, size, guidance, micro_batch
        self.ancestral, self.dtype = ancestral, torch.bfloat16 if precision == "bf16" else torch.float32
        self.kind = DiffusionPipeline.load_config(path)["_class_name"]
        off = dict(safety_checker=None, requires_safety_checker=False, watermarker=None)
        off = {k: v for k, v in off.items() if k in OPTIONAL[self.kind]} | models.load_kwargs(path)
        self.pipe = DiffusionPipeline.from_pretrained(path, dtype=self.dtype, use_safetensors=True, **off)
        self.pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.unet.to(memory_format=torch.channels_last)  # the layout that convolutions are fastest in
        self.pixel, config = self.kind == "IFPipeline", self.pipe.unet.config
        self.unet = compiled(self.pipe.unet, compile, "U-Net")
        if self.pixel:
            self.side, self.stage2 = config.sample_size, self.load_upsampler(upsampler)
        else:
            self.pipe.vae.to(memory_format=torch.channels_last).float()
            self.side = size
        factor = 1 if self.pixel else 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)
        self.shape = (config.in_channels, self.side // factor, self.side // factor)
        self.abar = self.pipe.scheduler.alphas_cumprod.double()
        self.predicts = self.pipe.scheduler.config.prediction_type
        self.encode = lru_cache(TEXTS)(self._encode)

    def load_upsampler(self, path: str | None) -> Any:
        if path is None:
            return None
        from diffusers import IFSuperResolutionPipeline

        # Texts come encoded from the first stage, which has the same text encoder.
        off = dict(safety_checker=None, requires_safety_checker=False, watermarker=None, text_encoder=None)
        off |= dict(tokenizer=None, use_safetensors=True) | models.load_kwargs(path)
        stage2 = IFSuperResolutionPipeline.from_pretrained(path, dtype=self.dtype, **off)
        stage2.set_progress_bar_config(disable=True)
        return stage2.to(self.device)

    @torch.no_grad()
    def _encode(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        """-> text states [L, W], pooled [P] or None; each prompt once and alone: same bits in any company"""
        more = dict(device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        out = self.pipe.encode_prompt(prompt, **more)
        pooled = out[2][0] if self.kind == "StableDiffusionXLPipeline" else None
        h = out[0][0]
        if prompt == "" and pooled is not None and self.pipe.config.force_zeros_for_empty_prompt:
            h, pooled = torch.zeros_like(h), torch.zeros_like(pooled)
        return h, pooled

    def denoiser(self, prompts: list[str]) -> Denoiser:
        """denoise(x, t) -> guided eps, v (learned variance, of the conditional half) or None, for these B prompts"""
        both = [self.encode(p) for p in [""] * len(prompts) + prompts]
        h, more = torch.stack([text for text, _ in both]), {}
        if both[0][1] is not None:
            ids = torch.tensor([[self.size, self.size, 0, 0, self.size, self.size]], device=self.device)
            pooled = torch.stack([pooled for _, pooled in both])
            more = dict(added_cond_kwargs=dict(text_embeds=pooled, time_ids=ids.to(self.dtype).repeat(len(both), 1)))

        def denoise(x: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
            x2 = torch.cat([x, x]).to(self.dtype)
            out = self.unet(x2, torch.tensor(t, device=self.device), encoder_hidden_states=h, **more).sample.float()
            out, v = out.split(x.shape[1], 1) if out.shape[1] == 2 * x.shape[1] else (out, None)
            eps_u, eps_c = out.chunk(2)
            eps = eps_u + self.guidance * (eps_c - eps_u)  # classifier-free guidance, as in common.glide
            if self.predicts == "v_prediction":
                abar = self.abar[t].float()
                eps = abar.sqrt() * eps + (1 - abar).sqrt() * x
            return eps, None if v is None else v.chunk(2)[1]

        return denoise

    @torch.no_grad()
    def latent(self, x: Tensor) -> Tensor:
        """uint8 [3, side, side] -> what the sampler starts from when it is noised"""
        x = to_unit(x.to(self.device))
        return (
            x
            if self.pixel
            else self.pipe.vae.encode(x[None]).latent_dist.mode()[0] * self.pipe.vae.config.scaling_factor
        )

    @torch.no_grad()
    def pixels(self, x: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Sampler's result [B, C, h, w] -> uint8 [B, 3, H, W] on the CPU. No reference plays a part here."""
        if not x.isfinite().all():
            raise UserError("generation: an image is not finite; try --precision fp32 or a lower guidance")
        if not self.pixel:
            x = self.pipe.vae.decode(x / self.pipe.vae.config.scaling_factor).sample.float()
        elif self.stage2 is not None:
            h, null = torch.stack([self.encode(p)[0] for p in prompts]), self.encode("")[0].expand(len(prompts), -1, -1)
            gens = [torch.Generator().manual_seed(seed_of(seed, "upsampler")) for seed in seeds]
            text = dict(prompt_embeds=h, negative_prompt_embeds=null, guidance_scale=1.0, generator=gens)
            # "pt" leaves the range as it is, [-1, 1], where the other output types map it to [0, 1].
            x = self.stage2(image=quantised(x).to(self.dtype), output_type="pt", **text).images.float()
        return as_uint8(x).cpu()

    @torch.no_grad()
    def paint(
        self, prompts: Sequence[str], seeds: Sequence[int], kept: Tensor, start: Start | None = None,
        references: Sequence[Tensor] = (),
    ) -> list[Tensor]:  # fmt: skip
        """Images of B prompts and seeds -> B uint8 [3, H, W]. kept: timesteps, ascending. start(reference, noise, abar
        of the noisiest of them) -> what the sampler starts from; None: the noise. references: B of `latent`'s."""
        n, b = len(prompts), self.micro_batch
        prompts, seeds = repeated_to(b, prompts), repeated_to(b, seeds)
        gens = [torch.Generator().manual_seed(seed) for seed in seeds]

        def draw() -> Tensor:
            return torch.stack([torch.randn(self.shape, generator=g) for g in gens]).to(self.device)

        s, x = respaced(self.abar, kept), draw()
        if start is not None:
            x = start(torch.stack(repeated_to(b, references)), x, s["abar"][-1])
        x = reverse(self.denoiser(prompts), x, s, draw if self.ancestral else None, self.pixel)
        return list(self.pixels(x, prompts, seeds)[:n])


class GlidePainter:
    """GLIDE behind the functions that stages call; its sampler is always ancestral."""

    def __init__(
        self, folder: str, device: torch.device, *, precision: str, size: int, guidance: float, micro_batch: int,
        compile: bool = False,
    ):  # fmt: skip
        self.glide = load_glide(folder, device, precision, side=size // 4)
        self.side, self.guidance, self.micro_batch = self.glide.side, guidance, micro_batch
        for name, net in (("base", self.glide.base), ("upsampler", self.glide.upsampler)) if compile else ():
            net.unet.forward = compiled(net.unet.forward, True, f"{name} U-Net")

    def latent(self, x: Tensor) -> Tensor:
        """uint8 [3, side, side] -> float [3, side, side] in [-1, 1]"""
        return to_unit(x.to(self.glide.device))

    def paint(
        self, prompts: Sequence[str], seeds: Sequence[int], kept: Tensor, start: Start | None = None,
        references: Sequence[Tensor] = (),
    ) -> list[Tensor]:  # fmt: skip
        """As Painter.paint. The upsampler sees the base's image and the text, no reference."""
        n, b, begin = len(prompts), self.micro_batch, None
        if start is not None:
            ref = torch.stack(repeated_to(b, references))
            begin = lambda noise, abar: start(ref, noise, abar)  # noqa: E731
        words, numbers = repeated_to(b, prompts), repeated_to(b, seeds)
        return list(self.glide.sample(words, numbers, self.guidance, kept, begin)[:n])


# ---------------------------------------------------------------------------------------
# By name


def is_glide(name: str) -> bool:
    return name.startswith(GLIDE)


def timesteps(painter: Painter | GlidePainter, indices: list[int]) -> Tensor:
    """Those of the 100 respaced timesteps of the painter's process."""
    total = len(painter.abar) if isinstance(painter, Painter) else 1000
    return kept_timesteps(total)[indices]


def load_painter(
    name: str, found: dict[str, str], device: torch.device, ancestral: bool, **settings: Any
) -> Painter | GlidePainter:
    """name: --sd-model; found: of look_into; settings: precision, size, guidance, micro_batch, compile."""
    if is_glide(name):
        return GlidePainter(found["--sd-model"], device, **settings)
    return Painter(found["--sd-model"], found.get("--upsampler"), device, ancestral=ancestral, **settings)


def look_into(name: str, upsampler: str | None) -> dict[str, str]:
    """Every file of a generator, before the first stage -> {flag: what to load}. Raises UserError."""
    if is_glide(name):
        folder = name.removeprefix(GLIDE)
        try:
            load_glide(folder, "meta")
        except UserError as error:
            raise UserError(f"--sd-model: {error}") from error
        return {"--sd-model": folder}
    wanted = [("--sd-model", name, "painter")] + ([("--upsampler", upsampler, "upsampler")] if upsampler else [])
    found = models.check_models(wanted)
    check_sampler(name, found["--sd-model"])
    if upsampler and "vae" in read_json(Path(found["--sd-model"]) / "model_index.json"):
        raise UserError(f"--upsampler {upsampler}: only DeepFloyd IF has a second stage; leave it out")
    return found


def drawn_size(name: str, found: dict[str, str], size: int) -> tuple[int, str]:
    """--gen-resolution as the generator draws it, and what is to be said about that, or "". found: of look_into.

    UserError for a number that the VAE cannot make. DeepFloyd IF has a number of its own.
    """
    if is_glide(name) or "--sd-model" not in found:
        return size, ""
    folder = Path(found["--sd-model"])
    if "vae" in read_json(folder / "model_index.json"):
        factor = 2 ** (len(read_json(folder / "vae" / "config.json")["block_out_channels"]) - 1)
        if size % factor:
            raise UserError(f"--gen-resolution {size}: the VAE of this generator needs a multiple of {factor}")
        return size, ""
    last = Path(found.get("--upsampler", folder))
    drawn = read_json(last / "unet" / "config.json")["sample_size"]
    note = f"note: DeepFloyd IF draws {drawn} pixels per side, whatever --gen-resolution says ({size})"
    return drawn, note if drawn != size else ""


def check_sampler(name: str, folder: str) -> None:
    """The sampler needs eps or v at a known share of noise, and a little of the image left at the last timestep."""
    import diffusers

    config = models.scheduler_config(folder)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    kind, abar = scheduler.config.get("prediction_type"), getattr(scheduler, "alphas_cumprod", None)
    what = f"--sd-model {name}: its scheduler"
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"{what} predicts {kind!r}; this sampler takes epsilon and v_prediction")
    if abar is None or scheduler.config.get("rescale_betas_zero_snr") or not 0 < abar[-1] < abar[0] < 1:
        kind = config["_class_name"]
        raise UserError(f"{what}, a {kind}, has no schedule of shares of noise that ends above zero signal")


def fingerprint(name: str, where: str) -> str:
    """Hash of what look_into found for --sd-model or --upsampler."""
    if not is_glide(name):
        return models.fingerprint(where)
    folder = Path(where).expanduser()
    files = [weights_file(folder, "base").name, weights_file(folder, "upsample").name, "vocab.json", "merges.txt"]
    return models.fingerprint(str(folder), files)
