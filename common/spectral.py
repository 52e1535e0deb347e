"""Spectral norm (Miyato et al., 2018) of a whole network at once: a layer computes with w_bar = W / sigma, where sigma,
the largest singular value of W, follows from one power iteration before each forward pass.

Layers of one shape share batched products, or the power iterations would be most of a step's kernels. A network calls
spectral_norm(groups) first thing in its forward pass; groups = spectral_groups(network), made once.
"""

import torch
import torch.nn.functional as F
from torch import nn

from common.diffusion import unmixed


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.norm(dim=-1, keepdim=True) + 1e-12)


def power_iteration(w: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One iteration: v = n(W^T u), u' = n(W v), sigma = u'.(W v). W [k, out, rest], u [k, out] -> sigma [k], u'

    Gradients reach sigma through W alone; u' and v count as constants.
    """
    v = unit(torch.einsum("koi,ko->ki", w.detach(), u))
    wv = torch.einsum("koi,ki->ko", w, v)
    u = unit(wv.detach())
    return (u * wv).sum(1), u


class Spectral:
    """Mix-in of a layer with `weight`: it uses w_bar, which spectral_norm sets, with orthogonal W at the start."""

    def start(self) -> None:
        nn.init.orthogonal_(self.weight)
        if getattr(self, "bias", None) is not None:
            nn.init.zeros_(self.bias)
        self.register_buffer("u", F.normalize(torch.rand(len(self.weight)) * 2 - 1, dim=0))


class SNConv(Spectral, nn.Conv2d):
    def __init__(self, n_in: int, n_out: int, kernel: int, bias: bool = True):
        super().__init__(n_in, n_out, kernel, padding=kernel // 2, bias=bias)
        self.start()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.w_bar, self.bias, padding=self.padding)


class SNLinear(Spectral, nn.Linear):
    def __init__(self, n_in: int, n_out: int, bias: bool = True):
        super().__init__(n_in, n_out, bias=bias)
        self.start()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w_bar, self.bias)


class SNEmbedding(Spectral, nn.Embedding):
    def __init__(self, n: int, dim: int):
        super().__init__(n, dim)
        self.start()

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return F.embedding(y, self.w_bar)


def spectral_groups(net: nn.Module) -> list[list[nn.Module]]:
    """The layers of net with spectral norm, those of one shape together."""
    groups: dict[torch.Size, list[nn.Module]] = {}
    for layer in net.modules():
        if isinstance(layer, Spectral):
            groups.setdefault(layer.weight.shape, []).append(layer)
    return list(groups.values())


def spectral_norm(groups: list[list[nn.Module]]) -> None:
    """w_bar = W / sigma of every layer for the next forward pass. Evaluation performs the iteration too, from the
    stored u, but does not store its result."""
    for layers in groups:
        # Columns in the order of channels_last, in which the weights lie on the device; sigma does not depend on it.
        conv = layers[0].weight.ndim == 4
        weights = [layer.weight.permute(0, 2, 3, 1) if conv else layer.weight for layer in layers]
        with unmixed(weights[0].device):
            w = torch.stack([weight.flatten(1) for weight in weights])
            sigma, u = power_iteration(w, torch.stack([layer.u for layer in layers]))
            w_bar = (w / sigma[:, None, None]).view(-1, *weights[0].shape)
        if layers[0].training:
            with torch.no_grad():
                torch._foreach_copy_([layer.u for layer in layers], list(u))
        for layer, own in zip(layers, w_bar.permute(0, 1, 4, 2, 3) if conv else w_bar, strict=True):
            layer.w_bar = own
