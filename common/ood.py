"""Further test sets for networks trained on ImageNet or a subset of it: V2, Sketch, R, A."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from common.datasets import IMAGENET_SUBSETS, Images, natural_key
from common.images import IMAGE_SUFFIXES
from common.launch import UserError


def subset_labels(labels: Sequence[int], indices: Sequence[int]) -> tuple[list[int], list[int]]:
    """Original ImageNet labels -> (positions that belong to the subset, label = place in its index list)."""
    place = {index: i for i, index in enumerate(indices)}
    kept = [i for i, label in enumerate(labels) if label in place]
    return kept, [place[labels[i]] for i in kept]


def ood_images(root: str | Path, indices: Sequence[int]) -> tuple[Images, list[int]]:
    """Test set with folders by WordNet id (Sketch, R, A) or ImageNet number (V2) -> Images, labels that occur.

    indices: ImageNet numbers of the classes the network knows, in label order. Images of other classes are dropped,
    labels are places in that list. Trap: V2's folders sort as 0, 1, 10, 100 when taken for words.
    """
    from timm.data import ImageNetInfo

    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--ood {root}: no such folder")
    number = {wnid: i for i, wnid in enumerate(ImageNetInfo().label_names())}
    labels, keys = [], []
    for folder in sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: natural_key(p.name)):
        label = int(folder.name) if folder.name.isdecimal() else number.get(folder.name)
        if label is None or label >= 1000:
            raise UserError(f"{folder}: neither a WordNet id of ImageNet nor a number below 1000")
        files = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
        labels += [label] * len(files)
        keys += [f"{folder.name}/{name}" for name in files]
    kept, mapped = subset_labels(labels, indices)
    if not kept:
        raise UserError(f"{root}: no images of the classes of this network")
    names = [str(i) for i in indices]
    return Images(mapped, [keys[i] for i in kept], names, root), sorted(set(mapped))


def ood_sets(entries: Sequence[str], dataset: str) -> dict[str, tuple[Images, list[int]]]:
    """--ood NAME=DIR ... -> {name: (Images, labels that occur)}"""
    if entries and dataset not in IMAGENET_SUBSETS:
        raise UserError(f"--ood: needs ImageNet or a subset of it, not {dataset}")
    found = {}
    for entry in entries:
        name, _, folder = entry.partition("=")
        if not folder or name in ("", "test", *found):
            raise UserError(f"--ood {entry}: wanted is NAME=DIR, each NAME once and none of them test")
        found[name] = ood_images(folder, IMAGENET_SUBSETS[dataset])
    return found


def restricted_top1(logits: torch.Tensor, labels: Sequence[int], known: Sequence[int]) -> float:
    """Percent right when only the classes in `known` may be answered: the protocol of ImageNet-A and -R."""
    allowed = torch.full((logits.shape[1],), -math.inf)
    allowed[known] = 0.0
    return 100 * ((logits + allowed).argmax(1) == torch.as_tensor(labels)).float().mean().item()
