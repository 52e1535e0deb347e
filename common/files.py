"""Files that are whole or absent, and names that are safe.

Nothing half-written ever has a final name: everything is written under a temporary name in the same folder, flushed to
disk and renamed.
"""

import dataclasses
import errno
import json
import math
import os
import re
import secrets
import socket
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.launch import UserError

if TYPE_CHECKING:
    import torch

TEMPORARY = ".cleansynth-tmp-"  # start of the name of every unfinished file


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """`with atomic(path) as temporary:` write to `temporary`; a block that ends well gives it its name.

    Makes the folder. Raises UserError when the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(TEMPORARY + secrets.token_hex(8))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if disk_full(error):
            raise UserError(f"disk full at {path}; free some space and run the same command again") from error
        raise


def remove_unfinished(folder: str | Path) -> None:
    """Remove what killed processes left under temporary names, in all folders below."""
    for at, _, names in os.walk(folder):
        for name in names:
            if name.startswith(TEMPORARY):
                os.unlink(os.path.join(at, name))


def disk_full(error: BaseException) -> bool:
    """Is this error a full disk, a spent quota, or a limit on the size of files? safetensors tells in words only."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return isinstance(error, OSError) and error.errno in full or bool(words and int(words[1]) in full)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, obj: Any) -> None:
    """Write JSON atomically. Dataclasses, paths, tensors and arrays become plain values, nan and inf become null."""
    write_bytes(path, json_bytes(obj, indent=2))


def json_bytes(obj: Any, indent: int | None = None) -> bytes:
    """What write_json writes, or one line of a .jsonl. Names that are no Unicode (Latin-1 disks) survive, escaped."""
    simple = plain(obj)
    try:
        return (_encoder(indent, False).encode(simple) + "\n").encode()
    except UnicodeEncodeError:
        return (_encoder(indent, True).encode(simple) + "\n").encode()


@cache
def _encoder(indent: int | None, ascii_only: bool) -> json.JSONEncoder:
    return json.JSONEncoder(indent=indent, ensure_ascii=ascii_only)  # json.dumps would build one per row


def write_metadata(folder: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """<folder>/metadata.jsonl, the hub's imagefolder convention, written as rows come; file_name is relative to it."""
    with atomic(Path(folder) / "metadata.jsonl") as temporary, open(temporary, "wb") as f:
        f.writelines(map(json_bytes, rows))


def plain(obj: Any) -> Any:
    """obj as JSON knows it: see write_json."""
    if type(obj) in (str, int, bool):
        return obj
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        obj = {field.name: getattr(obj, field.name) for field in dataclasses.fields(obj)}
    if hasattr(obj, "tolist"):  # numpy and torch, scalars included
        obj = obj.tolist()
    if isinstance(obj, dict):
        return {str(key): plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(value) for value in obj]
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return str(obj) if isinstance(obj, Path) else obj


def read_json(path: str | Path, advice: str = "remove it and run the same command again") -> Any:
    """The content of a JSON file. Raises UserError, which ends in `advice`, when it is missing, cut or not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
        raise UserError(f"{path}: damaged, not JSON ({str(error)[:80]}); {advice}") from error


def save_tensors(path: str | Path, tensors: "dict[str, torch.Tensor]", metadata: str | None = None) -> None:
    """Write a safetensors file atomically; tensors may lie on any device, be views, or share memory.

    metadata: text for tensors_metadata. One key only: the library writes several in random order, and equal tensors
    shall give equal bytes.
    """
    from safetensors.torch import save_file

    separate: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if (memory := tensor.untyped_storage().data_ptr()) in seen:  # the library refuses shared memory
            tensor = tensor.clone()
        seen.add(memory)
        separate[name] = tensor
    with atomic(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(separate, temporary, {"format": "pt"} if metadata is None else {"cleansynth": metadata})
        temporary.chmod(mode)  # the library's own is for the owner only, whatever the umask


def load_tensors(path: str | Path) -> "dict[str, torch.Tensor]":
    """Read a safetensors file to the CPU. Raises UserError when it is missing or damaged."""
    from safetensors.torch import load_file

    with _explained(path):
        return load_file(path)


def loaded(net: "torch.nn.Module", path: str | Path, device: "torch.device") -> "torch.nn.Module":
    """net with the weights of a safetensors file, on the device as channels_last, frozen and in evaluation mode."""
    import torch

    net.load_state_dict(load_tensors(path))
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def tensors_metadata(path: str | Path) -> str:
    """The text given to save_tensors, "" for none; reads the header only. Raises UserError like load_tensors."""
    from safetensors import safe_open

    with _explained(path), safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("cleansynth", "")


@contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); delete it and run again") from error


def lock(path: Path) -> Callable[[], None]:
    """Take a lock file for this process, until it calls the returned function or ends, however it ends.

    UserError naming the process that has it. Loader processes do not inherit it.
    """
    import filelock

    held, owner = filelock.FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False), os.getpid()
    try:
        held.acquire()
    except filelock.Timeout as error:
        with suppress(OSError):
            raise UserError(f"in use by {path.read_text(errors='replace') or 'another process'}") from error
        raise UserError("in use by another process") from error
    except OSError as error:  # some network file systems have no locks
        print(f"note: {path.parent} cannot be locked ({error.strerror}); start only one run in it")
        return lambda: None
    path.write_text(f"process {owner} on {socket.gethostname()}")

    def release() -> None:
        if os.getpid() == owner and held.is_locked:
            path.unlink(missing_ok=True)
            held.release()

    return release


# ---------------------------------------------------------------------------------------
# Names and lists


def slug(name: str, maxlen: int = 80) -> str:
    """A class name as part of a file name: letters and digits of any script, other runs become "_".

    Never empty, at most `maxlen` bytes, lower case, no separators, dots or control characters.
    """
    text = unicodedata.normalize("NFKD", name)
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = re.sub(r"[\W_]+", "_", unicodedata.normalize("NFC", text).lower())
    return text.encode()[:maxlen].decode(errors="ignore").strip("_") or "class"


def class_folders(class_names: Sequence[str]) -> list[str]:
    """["sea lake", "forest"] -> ["00_sea_lake", "01_forest"]; sorted order is label order.

    Names with one slug ("C#", "C++") differ by their number. Raises UserError when two classes have the same name.
    """
    first: dict[str, int] = {}
    for i, name in enumerate(class_names):
        if (j := first.setdefault(name, i)) < i:
            raise UserError(f"classes {j} and {i} have the same name {name!r}; rename one")
    width = max(2, len(str(len(class_names) - 1)))
    return [f"{i:0{width}d}_{slug(name)}" for i, name in enumerate(class_names)]


def chunks(items: Sequence, size: int) -> list:
    """[a, b, c, d, e], 2 -> [a, b], [c, d], [e]"""
    return [items[i : i + size] for i in range(0, len(items), size)]


def class_range(n_classes: int, n_workers: int, worker: int) -> range:
    """Official code: worker m of M takes classes [m n, (m+1) n), n = N // M; the last one also the remainder."""
    n = n_classes // n_workers
    return range(worker * n, n_classes if worker == n_workers - 1 else (worker + 1) * n)
