"""What a run needs before its first stage. The user's pictures: all can be read, none is in two splits, and a run that
is continued finds those that it began with. And flags that fit together, and the stages before those asked for."""

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import write_bytes
from common.launch import UserError

if TYPE_CHECKING:
    import torch

    from common.datasets import Images
    from common.distributed import Dist
    from common.run import Run

RECORD = "data.safetensors"  # in the run folder: names, labels and hashes of the pictures


def refuse(wrong: Any, text: str) -> None:
    """UserError when something is wrong. text: the flag and its value, then what would do; it is made in any case."""
    if wrong:
        raise UserError(text)


def each_once(flag: str, values: Sequence[Any]) -> None:
    """UserError unless the list of a flag names one thing or more, and none of them twice."""
    given = " ".join(map(str, values))
    refuse(not values or len(set(values)) < len(values), f"{flag} {given}: one or more, each once")


def check_grid(flag: str, first: float, last: float, step: float, most: int = 1000) -> None:
    """UserError unless these are a grid of `most` values or fewer, each of them a training."""
    name, wrong, many = f"{flag} {first} {last} {step}", last < first or step < 0.001, (last - first) / max(step, 0.001)
    refuse(wrong, f"{name}: first, last and step, the last not before the first, the step >= 0.001")
    refuse(many > most, f"{name}: more than {most} values, each a training")


def readable(splits: "dict[str, Images | None]", dist: "Dist") -> None:
    """Decode every file of the splits once, in threads; UserError that lists the bad ones. Call it on rank 0.

    What was good is remembered by size and time, for all runs on the same files, in $CLEANSYNTH_CACHE (default: the
    user's cache).
    """
    from common.distributed import progress
    from common.images import verify

    there = [images for images in splits.values() if images and images.root is not None]
    if not there:
        return
    with progress(sum(map(len, there)), "checking pictures", dist) as bar:
        for images in there:
            verify(images, _memory(Path(images.root)), bar.update)


def _memory(root: Path) -> Path | None:
    """Where the good pictures of a folder are remembered; None where nothing can be written."""
    name = blake2b(os.path.abspath(root).encode(errors="surrogateescape"), digest_size=8).hexdigest()
    with suppress(Exception):  # no home, no permission, a full quota: the check then takes its time again
        users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = Path(os.environ.get("CLEANSYNTH_CACHE") or users / "cleansynth")
        write_bytes(cache / ".writable", b"")
        return cache / f"pictures-{name}"
    return None


def held(folder: Path, splits: "dict[str, Images | None]", dist: "Dist") -> str:
    """Hold a run to its pictures; see datasets.unchanged. What is to be said about them, or "". Call it on rank 0."""
    from common.datasets import overlap, unchanged
    from common.distributed import progress

    names = next(images.class_names for images in splits.values() if images)
    with progress(sum(len(images or ()) for images in splits.values()), "comparing pictures", dist) as bar:
        return unchanged(folder / RECORD, list(names), splits, bar.update, lambda: overlap(splits))


def take_off(args: Any, needless: Collection[str], flag: str) -> None:
    """Take the stages that no row needs off args.stages; UserError when none is left. flag: of the rows."""
    asked, args.stages = args.stages, tuple(stage for stage in args.stages if stage not in needless)
    rows = " ".join(getattr(args, flag.removeprefix("--")))
    refuse(not args.stages, f"--stages {' '.join(asked)}: no row of {flag} {rows} needs that")


def check_network(flags: str, make: "Callable[[], torch.nn.Module]", size: int, batch: int) -> None:
    """UserError unless the network of make() can be trained on so many pictures of size x size pixels at a time; see
    tried."""
    import torch

    tried(flags, lambda: make().to("meta").train()(torch.empty(batch, 3, size, size)))


def tried(flags: str, step: Callable[[], Any]) -> None:
    """step() on the device meta, where only shapes are worked out; UserError when it fails. flags: those that chose
    network, size and batch, with their values."""
    import torch

    try:
        with torch.device("meta"):
            step()
    except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        if "more than 1 value per channel" in why:
            why = "BatchNorm needs two images or more in a pass"
        raise UserError(f"{flags}: these do not go together, a training step ends with: {why}") from error


def check_order(run: "Run", todo: list[str], needs: dict[str, str], needless: Collection[str] = ()) -> None:
    """UserError when a stage to do needs the files of one that is neither done nor to do. needs: {stage: "those before
    it"}; needless: stages that these rows do without. All ranks must call."""
    for stage in todo:
        for before in needs.get(stage, "").split():
            missing = before not in needless and before not in todo and run.todo(before)
            refuse(missing, f"--stages {stage}: {before} has not been run in {run.dir}; add it to --stages")
