"""What a finished stage wrote: a list of its files with sizes and quick hashes, by which a later start finds damage.

A line is "<size> <hash> <name>". Sizes are compared at every start; a hash only where the file is younger than the
list, so that a start looks at a million files and reads none. The hash is of the size and the first and last 4 KiB, of
a small file of all: an edit in the middle of a large file that keeps its size is not found.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

from common.files import atomic

T = TypeVar("T")
SMALL, END = 1 << 16, 1 << 12  # bytes: files hashed as a whole; what is hashed at both ends of others
LINE = re.compile(r"([0-9]+) ([0-9a-f]{16}) (.+)", re.DOTALL)


def quick_hash(path: str | Path) -> str:
    """Of size and ends of a file; of all of a small one."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(SMALL if size <= SMALL else END)
        if size > SMALL:
            file.seek(-END, os.SEEK_END)
            data += file.read(END)
    return blake2b(data, digest_size=8, key=str(size).encode()).hexdigest()


def write(file: Path, root: Path, names: Iterable[str | Path]) -> int:
    """List these files, paths or names below root, in `file`; how many they are."""

    def lines(some: tuple[str | Path, ...]) -> tuple[int, bytes]:
        paths = (os.path.relpath(name, root) if os.path.isabs(name) else os.fspath(name) for name in some)
        said = (f"{os.stat(p := f'{root}/{name}').st_size} {quick_hash(p)} {name}\0" for name in paths)
        return len(some), "".join(said).encode(errors="surrogateescape")

    count = 0
    with atomic(file) as temporary, open(temporary, "wb") as out:
        for n, data in _in_threads(lines, names):
            count += n
            out.write(data)
    return count


def damaged(file: Path, root: Path, expected: int) -> list[str]:
    """Listed files that are missing, cut, or edited since; the list itself when it is not whole."""
    itself = [os.path.relpath(file, root)]
    try:
        written = os.stat(file).st_mtime_ns

        def bad(some: tuple[str, ...]) -> tuple[int, list[str | None]]:
            found = [row and row.groups() for row in map(LINE.fullmatch, some)]
            return len(some), [
                row and row[2] for row in found if not (row and _good(f"{root}/{row[2]}", int(row[0]), row[1], written))
            ]

        count, names = 0, []
        for n, some in _in_threads(bad, _lines(file)):
            count += n
            names += some
    except OSError:
        return itself
    return itself if count != expected or None in names else names


def _lines(file: Path) -> Iterator[str]:
    """The lines of a list, which end with a zero byte, read block by block; "" for a last one without its end."""
    rest = b""
    with open(file, "rb") as source:
        while block := source.read(1 << 20):
            *whole, rest = (rest + block).split(b"\0")
            yield from (line.decode(errors="surrogateescape") for line in whole)
    if rest:
        yield ""


def _in_threads(work: Callable[[tuple], T], items: Iterable) -> Iterator[T]:
    """work of 256 items at a time, in order; a million items are never there at once."""
    rest = iter(items)
    batches = iter(lambda: tuple(itertools.islice(rest, 256)), ())
    with ThreadPoolExecutor() as pool:
        while several := list(itertools.islice(batches, 64)):
            yield from pool.map(work, several)


def _good(path: str, size: int, known: str, written: int) -> bool:
    try:
        about = os.stat(path)
        return about.st_size == size and (about.st_mtime_ns <= written or quick_hash(path) == known)
    except OSError:
        return False


def under(root: Path, names: Iterable[str]) -> Iterator[str]:
    """All files in these folders of root (or these files), as names below it; no hidden and unfinished ones. Names that
    are not there are left out."""
    for name in names:
        if os.path.isfile(root / name):
            yield name
        for at, folders, files in os.walk(root / name):
            folders[:] = sorted(folder for folder in folders if folder[0] != ".")
            at = os.path.relpath(at, root)
            yield from (f"{at}/{file}" for file in sorted(files) if file[0] != ".")
