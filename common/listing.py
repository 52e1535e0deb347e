"""What a finished stage wrote: a list of its files with sizes and quick hashes, by which a later start finds damage.

A line is "<size> <hash> <name>". Sizes are compared at every start; a hash only where the file is younger than the
list, so that a start looks at a million files and reads none. The hash is of the size and the first and last 4 KiB, of
a small file of all: an edit in the middle of a large file that keeps its size is not found.
"""

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

from common.files import TEMPORARY, atomic, chunks

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
    names = [os.path.relpath(path, root) if os.path.isabs(path) else os.fspath(path) for path in names]

    def lines(some: list[str]) -> bytes:
        said = (f"{os.stat(p := f'{root}/{name}').st_size} {quick_hash(p)} {name}\0" for name in some)
        return "".join(said).encode(errors="surrogateescape")

    with atomic(file) as temporary, open(temporary, "wb") as out, ThreadPoolExecutor() as pool:
        out.writelines(pool.map(lines, chunks(names, 256)))
    return len(names)


def damaged(file: Path, root: Path, expected: int) -> list[str]:
    """Listed files that are missing, cut, or edited since; the list itself when it is not whole."""
    try:
        raw, written = file.read_bytes(), os.stat(file).st_mtime_ns
    except OSError:
        return [os.path.relpath(file, root)]
    matches = [LINE.fullmatch(line) for line in raw.decode(errors="surrogateescape").split("\0")[:-1]]
    if len(matches) != expected or None in matches:
        return [os.path.relpath(file, root)]
    rows = [match.groups() for match in matches if match]

    def bad(some: list[tuple[str, ...]]) -> list[str]:
        return [name for size, known, name in some if not _good(f"{root}/{name}", int(size), known, written)]

    with ThreadPoolExecutor() as pool:
        return sum(pool.map(bad, chunks(rows, 256)), [])


def _good(path: str, size: int, known: str, written: int) -> bool:
    try:
        about = os.stat(path)
        return about.st_size == size and (about.st_mtime_ns <= written or quick_hash(path) == known)
    except OSError:
        return False


def under(root: Path, names: Iterable[str]) -> list[str]:
    """All files in these folders of root (or these files), as names below it, in order; no hidden and unfinished ones.
    Names that are not there are left out."""
    found: list[str] = []
    for name in names:
        if os.path.isfile(root / name):
            found.append(name)
        for at, folders, files in os.walk(root / name):
            folders[:] = sorted(folder for folder in folders if folder[0] != ".")
            at = os.path.relpath(at, root)
            found += [f"{at}/{file}" for file in sorted(files) if file[0] != "." and not file.startswith(TEMPORARY)]
    return found
