"""Picture files in and out: whatever a camera, scanner or archive left becomes 8-bit RGB, or an error with a name."""

import math
import os
import queue
import shutil
import stat
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.files import atomic, chunks, write_bytes
from common.launch import UserError

IMAGE_SUFFIXES = set(".jpg .jpeg .jpe .jfif .png .bmp .gif .webp .tif .tiff .ppm .pgm".split())
SUFFIX = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}  # of ImageWriter's formats
PIXEL_BYTES = {"png": 1.53, "jpeg": 0.2, "webp": 1.1}  # of generated photos on the disk
PER_BAND, MOST_COLUMNS = 12, 96  # of a contact sheet
MOST_PIXELS = 89_478_485  # Pillow's own limit; ours counts what is decoded, not what stands in the header
Image.MAX_IMAGE_PIXELS = None


def open_rgb(source: Any, shorter: int | None = None) -> Image.Image:
    """Path or binary file -> PIL RGB: EXIF rotation applied, first frame, transparency on white, 16-bit grey / 257.

    shorter: pixels that the caller needs on the shorter side. A JPEG with four times as many, or more, is decoded at
    1/2, 1/4 or 1/8, the smallest that leaves twice as many. Resized to `shorter` photos then differ from a full decode
    by less than 1 grey level on average; where the sides are no multiples of the reduction they are also stretched, by
    less than a pixel of the reduced picture. Without `shorter` every pixel is decoded, but of a JPEG above MOST_PIXELS
    a quarter. UserError naming the file: missing, no file, empty, truncated, no image, too many or 32-bit pixels.
    """
    try:
        return _decoded(source, shorter)
    except Exception as error:  # the decoders of Pillow raise nearly everything
        raise _refusal(source, error) from error


def _decoded(source: Any, shorter: int | None) -> Image.Image:
    with _opened(source) as image:
        whole = image.width * image.height
        needed = 2 * shorter if shorter else min(image.size)
        if whole > MOST_PIXELS:
            needed = min(needed, min(image.size) // 2)
        if needed < min(image.size):
            image.draft(None, (needed, needed))  # does nothing to other formats
        # A progressive JPEG is held as a whole, whatever the reduction, so its header has a limit too.
        if image.width * image.height > MOST_PIXELS or whole > 4 * MOST_PIXELS:
            raise ValueError(f"more than {MOST_PIXELS:,} pixels, too large to open")

        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image).astype(np.float64)
            if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                raise ValueError("pixels of 32 bits have no known range, save it with 8 or 16")
            image = Image.fromarray((values / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _opened(source: Any) -> Image.Image:
    """Image.open, but never of a FIFO or device: that would wait, or read, for ever."""
    if isinstance(source, str | os.PathLike) and not stat.S_ISREG(os.stat(source).st_mode):
        raise ValueError("a folder, pipe or device, no file")
    return Image.open(source)


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture, turned as open_rgb turns it; reads the header only. UserError as open_rgb."""
    try:
        with _opened(path) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except Exception as error:
        raise _refusal(path, error) from error


def shown(name: Any) -> str:
    """A path or name as text that fits on a line of any terminal; bytes that are no UTF-8 become \\udc.."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(name))


def _refusal(source: Any, error: Exception) -> UserError:
    name = source if isinstance(source, str | os.PathLike) else getattr(source, "name", "image")
    return UserError(f"{shown(name)}: {_complaint(source, error)}; mend or remove it")


def _complaint(source: Any, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "a link to nothing" if os.path.islink(source) else "no such file"
    if isinstance(error, UnidentifiedImageError):
        empty = isinstance(source, str | os.PathLike) and os.path.getsize(source) == 0
        return "an empty file" if empty else "not an image that Pillow can read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return shown(" ".join(str(error).split())) or type(error).__name__


def verify(images: Any, memory: Path | None = None, progress: Callable[[int], Any] = lambda n: None) -> None:
    """Decode every file of datasets.Images once, in threads and JPEGs at 1/8, before work begins.

    memory: a file of 8 bytes per image that remembers path, size and time of the good ones, so that a second start
    decodes only what has changed; splits may share it. progress: called with numbers of files done, as tqdm's update.
    One UserError names all bad files, one per line.
    """
    if images.root is None:  # pixels in memory
        return
    before = memory.read_bytes() if memory and memory.is_file() else b""
    known = {before[i : i + 8] for i in range(0, len(before) - 7, 8)}
    good, bad, root = set(known), [], os.path.abspath(images.root)

    def check(rows: range) -> list[str]:
        complaints = []
        for key in map(images.keys.__getitem__, rows):
            path = os.path.join(root, key)
            try:
                about = os.stat(path)
                mark = f"{path}\0{about.st_size}\0{about.st_mtime_ns}".encode(errors="surrogateescape")
                if (mark := blake2b(mark, digest_size=8).digest()) not in known:
                    _decoded(path, shorter=8)
                    good.add(mark)
            except Exception as error:
                complaints.append(f"\n  {shown(key)}: {_complaint(path, error)}")
        return complaints

    pool = ThreadPoolExecutor()
    try:
        parts = chunks(range(len(images)), 32)
        for rows, complaints in zip(parts, pool.map(check, parts), strict=True):
            bad += complaints
            progress(len(rows))
    finally:  # an interrupt neither waits for the rest nor forgets what was done
        pool.shutdown(wait=False, cancel_futures=True)
        if memory and len(good) > len(known):
            with suppress(OSError, UserError):  # a full quota costs the memory, not the run
                write_bytes(memory, b"".join(sorted(good.copy())))
    if bad:
        raise UserError(f"{len(bad)} of {len(images)} images in {shown(root)} are bad; mend or remove{''.join(bad)}")


# ---------------------------------------------------------------------------------------
# Out


class ImageWriter:
    """`with ImageWriter() as writer: writer.save(path, image)`: threads encode and write atomically.

    format: png (lossless), jpeg (4:4:4 from quality 90 on) or webp. quality: None is 95 for jpeg, lossless for webp.
    size: pixels per side to save at, None: as drawn. At most 16 images wait for each thread: save() blocks when the
    disk is the slower side. The first error is raised by the next save() or at the end of the block, which waits for
    every image; a UserError where the disk is full or the file cannot be written.
    """

    def __init__(self, format: str = "png", quality: int | None = None, size: int | None = None, threads: int = 4):
        self.format, self.size = format, size
        jpeg = dict(quality=quality or 95, subsampling=0 if (quality or 95) >= 90 else 2)
        # Lossless by WebP's fastest method is still smaller than PNG, and written and read in less time.
        webp = dict(quality=quality) if quality else dict(lossless=True, quality=0, method=0)
        self.options = {"png": dict(compress_level=1), "jpeg": jpeg, "webp": webp}[format]
        self.queue: queue.Queue = queue.Queue(16 * threads)
        self.error: Exception | None = None
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def save(self, path: str | Path, image: Any) -> None:
        """image: uint8 array [H, W, 3], uint8 tensor [3, H, W] or PIL image; copied, so the caller may reuse it."""
        if self.error:
            raise self.error
        self.queue.put((Path(path), to_pil(image)))

    def _work(self) -> None:
        while (item := self.queue.get()) is not None:
            if self.error:
                continue  # keep emptying the queue, or save() would block for ever
            path, image = item
            try:
                if self.size:
                    image = image.resize((self.size, self.size), Image.Resampling.LANCZOS)
                with atomic(path) as temporary:
                    image.save(temporary, format=self.format.upper(), **self.options)
            except UserError as error:
                self.error = error
            except OSError as error:
                self.error = UserError(f"{path}: cannot be written ({error.strerror or error})")
            except Exception as error:
                self.error = RuntimeError(f"{path}: cannot be written: {error!r}")

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for _ in self.threads:
            self.queue.put(None)
        for thread in self.threads:
            thread.join()
        if self.error and error is None:
            raise self.error


def to_pil(image: Any) -> Image.Image:
    """uint8 array [H, W, 3], uint8 tensor [3, H, W] or PIL image -> a PIL image with its own memory."""
    if isinstance(image, Image.Image):
        return image.copy()
    array = image.permute(1, 2, 0).cpu().numpy() if hasattr(image, "permute") else np.asarray(image)
    assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3, (
        f"uint8 array [H, W, 3] or tensor [3, H, W] expected; as [H, W, C] it is {array.dtype} {array.shape}"
    )
    return Image.fromarray(np.array(array))


def existing(folder: str | Path, n: int, suffix: str = ".png") -> np.ndarray:
    """bool [n]: for which k < n is <folder>/<k><suffix> a file? One listing; no file is opened or measured."""
    found = np.zeros(n, dtype=bool)
    for entry in os.scandir(folder) if os.path.isdir(folder) else ():
        stem = entry.name.removesuffix(suffix)
        if stem != entry.name and stem.isascii() and stem.isdecimal() and stem == str(k := int(stem)) and k < n:
            found[k] = entry.is_file()
    return found


def missing(folder: str | Path, n: int, suffix: str = ".png") -> list[int]:
    """The k < n for which <folder>/<k><suffix> is not there, ascending."""
    return np.flatnonzero(~existing(folder, n, suffix)).tolist()


def check_all_there(root: Path, folders: Sequence[str], counts: Sequence[int], suffix: str = ".png") -> None:
    """UserError unless each class folder below root holds its images 0 .. count - 1."""
    for folder, n in zip(folders, counts, strict=True):
        if not existing(root / folder, n, suffix).all():
            raise UserError(f"{root / folder}: images are missing; run the same command again")


def check_space(folder: Path, left: int, n: int, side: int, format: str, flag: str) -> None:
    """Print how many of n images of side x side pixels are left to draw and what they take. UserError: more than is
    free; lowering flag would help. Of no images nothing is said."""
    if not n:
        return
    need, free = left * PIXEL_BYTES[format] * side**2, shutil.disk_usage(folder).free
    print(f"{left:,} of {n:,} images to draw, about {need / 1e9:.2f} GB; {free / 1e9:.1f} GB are free", flush=True)
    if need > free:
        what = f"the images need about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        raise UserError(f"{folder}: {what}; free some space, lower {flag} or choose another --output-dir")


# ---------------------------------------------------------------------------------------
# Contact sheets


def of_each_class(pictures: Any, k: int | Sequence[int] = 0) -> list[Callable]:
    """A row of a contact sheet: of each class the function that opens its picture k. k: for all classes, or for each"""
    which = [k] * len(pictures.class_names) if isinstance(k, int) else k
    return [partial(pictures.open, int(pictures.of_class(c)[i])) for c, i in enumerate(which)]


def samples_grid(
    path: str | Path, rows: Sequence, row_names: Sequence[str], col_names: Sequence[str] | None = None, size: int = 96
) -> None:
    """Contact sheet as PNG: bands of 12 columns, of more than 96 columns 96 evenly chosen ones.

    rows: lists of images as to_pil takes them, or of functions that return one; only those that are shown are called.
    None leaves a gap. size: pixels of a cell.
    """
    import matplotlib
    from PIL import ImageDraw, ImageFont

    # DejaVu, because Pillow's own font knows Latin letters only.
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 12)
    n = max(map(len, rows), default=0)
    bands = chunks([i * n // min(n, MOST_COLUMNS) for i in range(min(n, MOST_COLUMNS))], PER_BAND)
    gap, line, y = 4, 16, 4

    def fit(text: str, width: float) -> str:
        text = " ".join(str(text).split())
        if font.getlength(text) <= width:
            return text
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        return text.rstrip() + "…"

    left = 2 * gap + math.ceil(max((font.getlength(fit(name, 220)) for name in row_names), default=0))
    top = gap + (line if col_names else 0)
    width = left + (size + gap) * min(n, PER_BAND) + gap
    height = (top + (size + gap) * len(rows) + gap) * len(bands) + gap
    sheet = Image.new("RGB", (max(1, width), max(1, height)), "white")
    draw = ImageDraw.Draw(sheet)
    for band in bands:
        for k, column in enumerate(band if col_names else []):
            text = fit(col_names[column], size)
            x = left + k * (size + gap) + (size - font.getlength(text)) / 2
            draw.text((x, y), text, fill="#333333", font=font)
        y += top
        for row, name in zip(rows, row_names, strict=True):
            draw.text((gap, y + size / 2), fit(name, 220), fill="#333333", font=font, anchor="lm")
            for k, column in enumerate(band):
                picture = row[column] if column < len(row) else None
                picture = picture() if callable(picture) else picture
                if picture is not None:
                    cell = _into_square(picture, size)
                    at = ((size - cell.width) // 2, (size - cell.height) // 2)
                    sheet.paste(cell, (left + k * (size + gap) + at[0], y + at[1]))
            y += size + gap
        y += gap
    with atomic(path) as temporary:
        sheet.save(temporary, format="PNG")


def _into_square(image: Any, size: int) -> Image.Image:
    """Scale to fit size x size, keeping the shape; small images keep their pixels visible."""
    image = to_pil(image).convert("RGB")
    scale = size / max(image.size)
    target = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(target, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)
