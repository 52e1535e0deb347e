"""What a run folder holds when it is opened again: is it ours, what has begun, and do the flags agree?"""

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import inputs
from common.cli import flag
from common.files import TEMPORARY, read_json
from common.launch import UserError

if TYPE_CHECKING:
    from common.run import Run

FLAGS, COPY = "args.json", ".args.json"  # the copy serves when the other one is damaged


def some(names: Sequence[str], between: str = ", ") -> str:
    return between.join([*names[:6], *([f"and {len(names) - 6} more"] if len(names) > 6 else [])])


def begun(run: "Run") -> set[str]:
    """Stages that are finished or have made something."""
    names = {file.name for file in run.path("stages").glob("*")}
    waiting = {name for name in names if name.endswith(".partial.json")}
    found = {name.split(".")[0] for name in names - waiting if name.endswith((".json", ".begun"))}
    return found | {name.split(".")[0] for name in waiting if not _trains(run.path("stages", name))}


def unread(run: "Run", later: dict[str, str]) -> list[str]:
    """Flags that no stage has read yet. later: as of open_run; with a stage those before it have begun too"""
    there = begun(run)
    last = max((i for i, stage in enumerate(later) if stage in there), default=-1)
    return " ".join(list(later.values())[last + 1 :]).split()


def _trains(file: Path) -> bool:
    """Is it the note of a stage whose results come from loops that log? Not when it is damaged."""
    with suppress(UserError, TypeError, ValueError):
        return bool(read_json(file).get("trains"))
    return False


def flags_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The content of args.json, or of its copy when that is damaged, and which."""
    damaged = False
    for name in (FLAGS, COPY):
        try:
            info = json.loads((folder / name).read_bytes())
            if all(isinstance(info[key], kind) for key, kind in (("script", str), ("args", dict), ("models", dict))):
                return info, name
        except (FileNotFoundError, NotADirectoryError, KeyError, TypeError):  # not ours
            pass
        except (ValueError, RecursionError):
            damaged = True
    if damaged:
        raise UserError(f"{folder / FLAGS}: damaged, and no copy {COPY} beside it; choose a new --output-dir")
    raise UserError(f"{folder}: not empty and not a run folder; choose a new --output-dir")


def has_work(folder: Path) -> bool:
    """Is there anything in the folder but flags, a lock, dashboards and what a killed process left?"""
    empty = re.compile(rf"\.?args\.json|\.lock|{re.escape(inputs.RECORD)}|.*\.partial\.json|{re.escape(TEMPORARY)}.*")
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("tensorboard", "wandb")]
        if any(not empty.fullmatch(name) for name in names):
            return True
    return False


def compare(run: "Run", old: dict[str, Any], new: dict[str, Any], free: set[str], changeable: list[str]) -> bool:
    """UserError for flags that differ. Those that only stages to come read (names, or prefixes that end in "_") are
    brought up to date in `old`: True if there was one."""
    if old["script"] != new["script"]:
        raise UserError(f"{run.dir}: made by {old['script']}, not by {new['script']}; choose a new --output-dir")
    changed, refused = False, []
    for kind, named in (("args", "{}"), ("models", "what {} names")):
        for key in dict.fromkeys([*new[kind], *old[kind]]):
            if old[kind].get(key) == new[kind].get(key) or (kind == "args" and key in free):  # 10 is 10.0
                continue
            if kind == "models" and (key not in old[kind] or key not in new[kind]):  # no stage of one side reads it
                changed |= key in new[kind]
                old[kind].setdefault(key, new[kind].get(key))
                continue
            before, now = (json.dumps(side[kind].get(key), ensure_ascii=False) for side in (old, new))
            if any(key == word or (word.endswith("_") and key.startswith(word)) for word in changeable):
                old[kind][key], changed = new[kind].get(key), True
            else:
                refused.append(f"{named.format(flag(key))} {before}, now {now}")
    threads = old.get("threads"), new["threads"]  # on a CPU they decide the last bits of every sum
    finished = all(run._stage_file(stage).exists() for stage in run.stages)
    if all(threads) and threads[0] != threads[1] and old.get("device") == new["device"] == "cpu" and not finished:
        refused.append(f"OMP_NUM_THREADS={threads[0]}, now {threads[1]}")
    if refused:
        raise UserError(f"{run.dir}: made with {some(refused, '; ')}; use the same again or choose a new --output-dir")
    return changed
