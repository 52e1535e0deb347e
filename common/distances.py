"""How far generated images are from real ones: distances between features, and scores of predicted classes."""

from typing import Any

import torch

from common.distributed import Dist, on_rank_0
from common.launch import UserError


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """||mu_a - mu_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), unbiased covariances. [N, D], [M, D]"""
    a, b = a.double().cpu(), b.double().cpu()
    s_a, s_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(s_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + s_a.trace() + s_b.trace() - 2 * cross).item()


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Unbiased MMD^2 with the kernel (x.y / D + 1)^3. [N, D], [M, D]"""
    a, b = a.double(), b.double()
    k_aa, k_bb, k_ab = (((x @ y.T) / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (k_aa, k_bb)]
    return (within[0] + within[1] - 2 * k_ab.mean()).item()


def inception_score(probs: torch.Tensor) -> float:
    """exp(mean KL(p || mean p)), one split. [N, C]"""
    p = probs.double().clamp(min=1e-30)
    return (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()


def inception_metrics(device: torch.device, flag: str) -> tuple[Any, Any]:
    """torchmetrics' FID and IS with their Inception network. UserError, naming the flag, when it cannot be had."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore

        fid = FrechetInceptionDistance(normalize=True, reset_real_features=False)
        return fid.to(device), InceptionScore(normalize=True).to(device)
    except ModuleNotFoundError as error:
        raise UserError(f"{flag}: pip install torchmetrics torch-fidelity") from error
    except OSError as error:  # urllib's errors are
        raise UserError(f"{flag}: the weights of Inception could not be downloaded ({error})") from error


def downloaded_inception(dist: Dist, flag: str) -> tuple[Any, Any]:
    """inception_metrics on the device of each process; the first downloads the weights, the others then have them."""
    on_rank_0(lambda: inception_metrics(torch.device("cpu"), flag) and None, dist)
    return inception_metrics(dist.device, flag)


@torch.no_grad()
def inception_figures(metrics: tuple[Any, Any], real: torch.Tensor, fake: torch.Tensor) -> dict[str, float]:
    """FID of fake to real and IS of fake. metrics: of inception_metrics; images [N, C, H, W] in [-1, 1].

    The real images go through Inception at the first call only; later ones must come with the same.
    """
    fid, score = metrics
    fid.reset(), score.reset()
    seen = int(fid.real_features_num_samples) > 0
    for images, is_real in ((fake, False),) if seen else ((real, True), (fake, False)):
        for part in images.split(100):
            part = (part.float() / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)  # grey images get three channels
            fid.update(part, real=is_real)
            if not is_real:
                score.update(part)
    return dict(fid=fid.compute().item(), inception_score=score.compute()[0].item())
