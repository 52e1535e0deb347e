"""Class names as prompts say them: one rule for all scripts. What a prompt says around a name is the script's."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from common.launch import UserError

# CoOp's wording, with which CLIP RN50 has the published zero-shot accuracies.
EUROSAT = (
    "Annual Crop Land", "Forest", "Herbaceous Vegetation Land", "Highway or Road", "Industrial Buildings",
    "Pasture Land", "Permanent Crop Land", "Residential Buildings", "River", "Sea or Lake",
)  # fmt: skip
WORDNET_ID = r"n\d{8}"


def spoken(dataset: str, class_names: Sequence[str], folder: str = "") -> list[str]:
    """Names of common.datasets -> words: no underscores, hyphens where they belong (A330-200). Cars: the year first; of
    a folder's name a leading number ("001.") goes, and a WordNet id becomes words. folder: which set it holds; those of
    Caltech-256 have a number at the end too, those of Birdsnap hyphens and apostrophes. A Given name stays as it is."""
    names = list(EUROSAT if dataset == "eurosat" else class_names)
    if dataset == "cars":  # Acura RL Sedan 2012 -> 2012 Acura RL Sedan
        names = [" ".join(name.split()[-1:] + name.split()[:-1]) for name in names]
    if dataset == "folder":
        words = wordnet_words() if any(re.fullmatch(WORDNET_ID, name) for name in names) else {}
        names = [words.get(name, re.sub(r"^\d+\.(?=.)", "", name)) for name in names]
    if dataset == "folder" and folder == "caltech256":  # bonsai-101
        names = [re.sub(r"-\d+$", "", name) for name in names]
    if dataset == "folder" and folder in ("caltech256", "birdsnap"):
        names = [name.replace("-", " ").replace("'", "") for name in names]
    names = [" ".join(name.replace("_", " ").split()) for name in names]
    return [str(given) if isinstance(given, Given) else name for given, name in zip(class_names, names, strict=True)]


class Given(str):
    """A class name that somebody gave in classes.json: to be said as it stands."""


@cache
def wordnet_words() -> dict[str, str]:
    """{WordNet id: words}: CLIP's names of ImageNet's 1,000 classes, of all others WordNet's first word."""
    import timm
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    more, known = timm.data.ImageNetInfo("imagenet-22k"), timm.data.ImageNetInfo().label_names()
    words = {wnid: more.index_to_description(i).split(",")[0].strip() for i, wnid in enumerate(more.label_names())}
    human = list(IMAGENET_CLASSNAMES)
    human[744], human[837] = "projectile missile", "dark sunglasses"  # else their names occur twice
    return words | dict(zip(known, human, strict=True))


def imagenet_names(more: int, *seed: int | str) -> list[str]:
    """CLIP's names of ImageNet's 1,000 classes, of which two stand there twice: 998; and `more` others, drawn from the
    names of ImageNet-21K by generator(*seed)."""
    import timm
    import torch
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    from common.distributed import generator
    from common.files import slug

    found = list(dict.fromkeys(IMAGENET_CLASSNAMES))
    if more:
        info = timm.data.ImageNetInfo("imagenet-22k")
        others = [info.index_to_description(i).split(",")[0].strip() for i in range(info.num_classes())]
        others = {slug(name): name for name in sorted(others, reverse=True)}  # names of one folder are the same
        known = {slug(name) for name in found}
        others = [name for key, name in sorted(others.items()) if key not in known]
        found += [others[i] for i in torch.randperm(len(others), generator=generator(*seed))[:more].tolist()]
    return found


def listed(path: str | Path) -> list[str]:
    """The names of a text file, one a line, each once; without underscores and empty lines. UserError: no such text."""
    try:
        text = Path(path).read_text("utf-8-sig")  # a mark at its beginning is no part of the first name
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8; save it as UTF-8, a name per line") from error
    lines = [" ".join(line.replace("_", " ").split()) for line in text.splitlines()]
    return list(dict.fromkeys(filter(None, lines)))
