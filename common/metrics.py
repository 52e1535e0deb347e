"""metrics.jsonl: every logged scalar, one line for a step; and the dashboards that may show it live."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.files import json_bytes, write_bytes

Scalars = dict[str, float]


def append(folder: Path, rank: int, step: int, scalars: Scalars) -> None:
    """One line more. Ranks write files of their own, which `tidy` puts together."""
    with open(folder / (f"metrics.rank{rank}.jsonl" if rank else "metrics.jsonl"), "ab") as f:
        f.write(json_bytes({"step": step, **scalars}))


def read(folder: Path) -> dict[str, dict[int, float | None]]:
    """{name: {step: value}}, steps ascending; None stands for a value that was not finite."""
    found: dict[str, dict[int, float | None]] = {}
    for step, scalars in _rows(folder):
        for name, value in scalars.items():
            found.setdefault(name, {})[step] = value
    return {name: dict(sorted(values.items())) for name, values in found.items()}


def tidy(folder: Path) -> None:
    """Put what the ranks logged into metrics.jsonl, each (name, step) once: the last value."""
    seen, kept = set(), []
    for step, scalars in reversed(_rows(folder)):
        fresh = {name: value for name, value in scalars.items() if (name, step) not in seen}
        seen |= {(name, step) for name in fresh}
        if fresh:
            kept.append(json_bytes({"step": step, **fresh}))
    file, content = folder / "metrics.jsonl", b"".join(reversed(kept))
    if kept and not (file.exists() and file.read_bytes() == content):  # a finished run is left untouched
        write_bytes(file, content)
    for file in folder.glob("metrics.rank*.jsonl"):
        file.unlink()


def _rows(folder: Path) -> list[tuple[int, dict[str, float | None]]]:
    """Without stray lines and the one that a killed process was writing."""
    rows = []
    for file in sorted(folder.glob("metrics*.jsonl")):
        for line in file.read_bytes().splitlines():
            with suppress(ValueError, RecursionError, TypeError, AttributeError, KeyError):
                row = json.loads(line)
                step = int(row.pop("step"))
                rows.append((step, {name: value if value is None else float(value) for name, value in row.items()}))
    return rows


def tracker(
    kind: str, script: str, folder: Path, args: dict[str, Any], run_id: str
) -> Callable[[int, Scalars], None] | None:
    """A function that passes (step, scalars) on to tensorboard, wandb or trackio; ImportError if it is missing.

    run_id: drawn when the folder was made, so that a continued run goes on in the same curves.
    """
    name = f"{script}-{folder.name}-{run_id[:4]}"
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        events = SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(step: int, scalars: Scalars) -> None:
            for key, value in scalars.items():
                events.add_scalar(key, value, step)
            events.flush()  # a killed process would lose what it had buffered

        return to_tensorboard
    if kind == "wandb":
        import wandb

        there = wandb.init(project="cleansynth", name=name, id=run_id, resume="allow", config=args, dir=str(folder))
        there.define_metric("*", step_metric="step")  # wandb's own step may never fall, but each stage begins at 1
        return lambda step, scalars: there.log({"step": step, **scalars})
    if kind == "trackio":
        import trackio

        board = trackio.init(project="cleansynth", name=name, resume="allow", config=args)
        return lambda step, scalars: board.log(scalars, step=step)
    assert kind == "none", f"unknown tracker {kind}"
    return None
