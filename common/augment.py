"""Augmentation of whole batches on the device, each picture with draws of its own. Which, how strong and in what order
is said in the scripts."""

import torch
import torch.nn.functional as F


def mirrored(x: torch.Tensor, coin: torch.Tensor) -> torch.Tensor:
    """x [B, C, H, W], coin: bool [B]"""
    return torch.where(coin[:, None, None, None], x.flip(3), x)


def crop(x: torch.Tensor, top: torch.Tensor, left: torch.Tensor, pad: int = 4) -> torch.Tensor:
    """Pad all sides with 0 (of data in [-1, 1] mid-grey) and cut at (top, left). [B, C, H, W], [B], [B]"""
    b, _, h, w = x.shape
    x = F.pad(x, (pad,) * 4)
    rows = top[:, None] + torch.arange(h, device=x.device)  # [B, H]
    columns = left[:, None] + torch.arange(w, device=x.device)  # [B, W]
    image = torch.arange(b, device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def cutout(
    x: torch.Tensor, noise: torch.Tensor, cx: torch.Tensor, cy: torch.Tensor, h: torch.Tensor, w: torch.Tensor
) -> torch.Tensor:
    """A box of h x w around (cx, cy), clipped by the image, is replaced by noise. [B, C, H, W] twice, [B] four times.

    As in keras-cv the noise is rescaled from its own range to the image's, both taken over whole images.
    """
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    noise_low, noise_high = noise.amin((1, 2, 3), keepdim=True), noise.amax((1, 2, 3), keepdim=True)
    noise = (noise - noise_low) / (noise_high - noise_low) * (high - low) + low
    i, j = (torch.arange(s, device=x.device)[None] for s in x.shape[2:])
    rows = (i >= (cy - h / 2)[:, None]) & (i < (cy + h / 2)[:, None])  # [B, H]
    columns = (j >= (cx - w / 2)[:, None]) & (j < (cx + w / 2)[:, None])  # [B, W]
    return torch.where((rows[:, :, None] & columns[:, None])[:, None], noise, x)


def cutout_boxes(b: int, size: int, least: float, most: float, g: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Centres uniform over all pixels, sides ceil(size U(least, most)), all independently. -> cx, cy, h, w, each [b]"""
    u = torch.rand(4, b, generator=g, device=g.device)
    cx, cy = (u[:2] * size).floor()
    h, w = (size * (least + (most - least) * u[2:])).ceil()
    return cx, cy, h, w
