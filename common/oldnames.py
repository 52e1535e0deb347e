"""Names that `common.run` once had, for scripts that have not moved. This file goes when the last one has."""

import math
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.cli import flag, parse, start  # noqa: F401
from common.files import class_folders, load_tensors, save_tensors, slug, write_bytes  # noqa: F401
from common.images import ImageWriter, samples_grid, to_pil  # noqa: F401
from common.launch import Launch, Stopped, UserError, launched_as  # noqa: F401
from common.metrics import read as read_metrics  # noqa: F401
from common.report import print_table, report  # noqa: F401


def cli(main: Callable[[Any], None], Args: type, presets: dict[str, dict[str, Any]], doc: str) -> None:
    """parse, then start."""
    start(main, parse(Args, presets, doc))


def check_finite(value: float, where: str) -> None:
    """Stop the run when a loss is nan or infinite. where: stage and step, for the message."""
    if not math.isfinite(float(value)):
        raise UserError(
            f"{where}: the loss is {float(value)}; stopped, the last checkpoint is kept. "
            "Try a lower learning rate or --precision fp32 in a new --output-dir"
        )


def existing_images(folder: str | Path) -> set[int]:
    """Numbers k for which <folder>/<k>.png exists."""
    with suppress(FileNotFoundError):
        names = (name.removesuffix(".png") for name in os.listdir(folder) if name.endswith(".png"))
        return {int(name) for name in names if re.fullmatch(r"[0-9]+", name)}
    return set()
