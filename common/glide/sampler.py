"""The sampler of GLIDE: schedules, one step, and the loop over steps. It serves any network that predicts noise.

Schedules are float64: 1 - abar of the cleanest step has few digits left in float32.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Schedule = dict[str, Tensor]
Denoiser = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]  # noisy images, timestep -> eps, v


def cosine_alphas(n: int = 1000) -> Tensor:
    """GLIDE's base schedule: abar(t) = cos^2((t + 0.008) / 1.008 * pi / 2), betas capped at 0.999. -> [n] float64"""
    f = torch.cos((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - (1 - f[1:] / f[:-1]).clamp(max=0.999)).cumprod(0)


def linear_alphas(n: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """GLIDE's upsampler schedule: betas linear from first to last. -> abar [n] float64"""
    return (1 - torch.linspace(first, last, n, dtype=torch.float64)).cumprod(0)


def kept_timesteps(total: int = 1000, n: int = 100) -> Tensor:
    """The n timesteps of the respaced process: round(k (total - 1) / (n - 1)), ascending. -> int64 [n]"""
    return torch.tensor([round(k * (total - 1) / (n - 1)) for k in range(n)])


def fast27() -> Tensor:
    """The upsampler's timesteps, most of them where the image is nearly clean; 997: less noise than 999. -> [27]"""
    fifths = [200 * k + round(i * 199 / (n - 1)) for k, n in enumerate((10, 10, 3, 2, 2)) for i in range(n)]
    return torch.tensor([*fifths[:-1], 997])


def respaced(abar: Tensor, kept: Tensor) -> Schedule:
    """Schedule of the process that visits only `kept` timesteps. abar [T], kept [n] -> dict of [n] tensors:
    t, abar, prev (abar of the next cleaner step, 1 at the end), beta, log_variance (posterior, clipped)."""
    abar = abar[kept]
    prev = torch.cat([abar.new_ones(1), abar[:-1]])
    beta = 1 - abar / prev
    variance = beta * (1 - prev) / (1 - abar)
    variance[:1] = variance[1:2] if len(variance) > 1 else beta  # element 0 would be log 0; its noise is never added
    return dict(t=kept, abar=abar, prev=prev, beta=beta, log_variance=variance.log())


def clean_estimate(x: Tensor, eps: Tensor, abar: Tensor, clamp: bool) -> Tensor:
    """x0 from x and its noise, clamped to [-1, 1] in pixel space. [B, C, H, W] -> the same"""
    x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
    return x0.clamp(-1, 1) if clamp else x0


def ancestral_step(x: Tensor, eps: Tensor, v: Tensor | None, s: Schedule, i: int, noise: Tensor, clamp: bool) -> Tensor:
    """One DDPM step of the respaced schedule s from index i. v in [-1, 1]: learned variance, None: the posterior's."""
    abar, prev, beta = s["abar"][i], s["prev"][i], s["beta"][i]
    x0 = clean_estimate(x, eps, abar, clamp)
    mean = beta * prev.sqrt() / (1 - abar) * x0 + (1 - prev) * (1 - beta).sqrt() / (1 - abar) * x
    log_variance = s["log_variance"][i]
    if v is not None:
        f = (v + 1) / 2
        log_variance = f * beta.log() + (1 - f) * log_variance
    return mean + (log_variance / 2).exp() * noise if i > 0 else mean


def deterministic_step(x: Tensor, eps: Tensor, s: Schedule, i: int, clamp: bool) -> Tensor:
    """One DDIM step, eta 0. With clamp, eps is derived again from the clamped x0, as in GLIDE's upsampler."""
    x0 = clean_estimate(x, eps, s["abar"][i], clamp)
    eps = (x - s["abar"][i].sqrt() * x0) / (1 - s["abar"][i]).sqrt()
    return s["prev"][i].sqrt() * x0 + (1 - s["prev"][i]).sqrt() * eps


def reverse(
    denoise: Denoiser, x: Tensor, s: Schedule, draw: Callable[[], Tensor] | None = None, clamp: bool = False
) -> Tensor:
    """Run the schedule s from its noisiest step to the end. denoise(x, t) -> eps, v or None; draw() -> noise like x,
    None: DDIM. The number of steps is len(s["t"]): for Real Guidance s holds the r cleanest ones."""
    for i in reversed(range(len(s["t"]))):
        eps, v = denoise(x, int(s["t"][i]))
        x = deterministic_step(x, eps, s, i, clamp) if draw is None else ancestral_step(x, eps, v, s, i, draw(), clamp)
    return x


def quantised(x: Tensor) -> Tensor:
    """[-1, 1] rounded to 8 bits, still in [-1, 1]: what the upsampler is conditioned on."""
    return ((x + 1) * 127.5).round() / 127.5 - 1


def as_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8"""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
