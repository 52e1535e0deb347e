"""A list that takes long to make, shared out among the processes, each entry safe as soon as it is made."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.distributed import Dist, barrier, my_items, on_rank_0, progress
from common.files import read_json, write_json


def in_parts(target: Path, n: int, make: Callable[[int], Any], dist: Dist, unit: str) -> list[Any]:
    """target: a JSON file with make(0) ... make(n - 1). -> what is in it, on rank 0; elsewhere [].

    While it grows, each entry is a file parts/<target>-<i>.json beside it, so that a killed run makes the missing ones
    only. A target that is there already, whoever wrote it, stays as it is. unit: of the progress bar. All must call.
    """
    parts = [target.parent / "parts" / f"{target.stem}-{i}.json" for i in range(n)]
    whole = on_rank_0(target.exists, dist)
    todo = [] if whole else on_rank_0(lambda: [i for i, part in enumerate(parts) if not part.exists()], dist)
    with progress(len(todo), target.stem, dist, unit=unit, together=True) as bar:
        for i in my_items(todo, dist):
            write_json(parts[i], make(i))
            bar.update(1)
    barrier(dist)
    if not dist.main:
        return []
    rows = read_json(target) if whole else [read_json(part) for part in parts]
    write_json(target, rows)
    for part in parts:  # of a run that was killed just here too
        part.unlink(missing_ok=True)
    with suppress(OSError):  # another list's parts are there, or nothing
        parts[0].parent.rmdir()
    return rows
