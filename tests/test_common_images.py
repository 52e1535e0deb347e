"""common/images.py: decoding whatever there is, checking it once, writing it whole, contact sheets."""

import errno
import io
import os
import shutil
import signal
import socket
import struct
import threading
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin
from sklearn.datasets import load_sample_image

from common import images
from common.datasets import Images
from common.images import ImageWriter, existing, image_size, of_each_class, open_rgb, samples_grid, verify
from common.launch import UserError


@pytest.fixture(autouse=True)
def no_hang():
    """What waits for ever fails after 20 s."""

    def late(*_):
        raise AssertionError("still waiting after 20 s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(mode, color, size=(4, 3)):
    return Image.new(mode, size, color)


def message(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


def pixel(content, at=(0, 0)):
    image = open_rgb(io.BytesIO(content))
    assert image.mode == "RGB"
    return image.getpixel(at)


def smooth(width, height):
    """A picture with edges, slopes and grain, as photos have them."""
    y, x = np.mgrid[:height, :width]
    bands = np.stack([x * 255 / width, 128 + 100 * np.sin(x * y / width / 9), 255 * ((x // 37 + y // 53) % 2)], -1)
    grain = np.random.RandomState(0).normal(0, 8, bands.shape)
    return Image.fromarray((bands + grain).clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------------------
# In


def test_grey_binary_palette_and_cmyk():
    assert pixel(encoded(plain("L", 77))) == (77, 77, 77)
    assert pixel(encoded(plain("1", 1))) == (255, 255, 255)
    assert pixel(encoded(plain("CMYK", (0, 255, 255, 0)), "TIFF")) == (255, 0, 0)
    palette = plain("P", 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    assert pixel(encoded(palette)) == (10, 20, 30)
    assert pixel(encoded(palette, transparency=1)) == (255, 255, 255), "the white below a transparent palette entry"


def test_transparency_is_laid_on_white():
    assert pixel(encoded(plain("RGBA", (200, 0, 0, 0)))) == (255, 255, 255)
    assert pixel(encoded(plain("RGBA", (200, 0, 0, 255)))) == (200, 0, 0)
    assert pixel(encoded(plain("RGBA", (0, 0, 0, 128)))) == (127, 127, 127)
    assert pixel(encoded(plain("LA", (0, 0)))) == (255, 255, 255) and pixel(encoded(plain("LA", (7, 255)))) == (7,) * 3
    assert pixel(encoded(plain("RGB", (1, 2, 3)), transparency=(1, 2, 3))) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    values = Image.fromarray(np.array([[0, 257 * 10, 257 * 200, 65535]], np.uint16))
    assert [pixel(encoded(values, kind), (x, 0))[0] for x in range(4)] == [0, 10, 200, 255]


@pytest.mark.parametrize(("mode", "value"), [("I", 1_000_000), ("I", -1), ("F", 0.5)])
def test_32_bit_pixels_are_refused(mode, value):
    assert "32 bits" in message(open_rgb, io.BytesIO(encoded(plain(mode, value), "TIFF")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_applied(kind, tmp_path):
    image = plain("RGB", "red", (80, 32))
    image.paste("blue", (0, 0, 40, 32))
    for orientation, size, corner in [(1, (80, 32), "b"), (3, (80, 32), "r"), (6, (32, 80), "b"), (8, (32, 80), "r")]:
        exif = Image.Exif()
        exif[0x0112] = orientation
        (tmp_path / "x").write_bytes(encoded(image, kind, exif=exif))
        for shorter in (None, 8):
            opened = open_rgb(tmp_path / "x", shorter)
            red, _, blue = opened.getpixel((2, 2))
            smaller = 2 if shorter and kind == "JPEG" else 1
            assert opened.size == tuple(n // smaller for n in size) and ("r" if red > blue else "b") == corner
        assert image_size(tmp_path / "x") == size


def test_first_frame_of_an_animation(tmp_path):
    frames = [plain("RGB", color) for color in ("red", "lime", "blue")]
    for kind in ("GIF", "MPO"):
        frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:])
        red, green, blue = open_rgb(tmp_path / "a").getpixel((0, 0))
        assert red > 250 and green < 5 and blue < 5


def distance(a, b, size):
    """Mean difference in grey levels after resizing."""
    a, b = (np.asarray(x.resize(size, Image.Resampling.BICUBIC), np.int16) for x in (a, b))
    return np.abs(a - b).mean()


def test_large_jpegs_are_reduced_when_fewer_pixels_are_needed():
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((1600, 1200), Image.Resampling.LANCZOS)
    grain = np.random.RandomState(0).normal(0, 8, (1200, 1600, 3))
    photo = Image.fromarray((np.asarray(photo) + grain).clip(0, 255).astype(np.uint8))
    content = encoded(photo, "JPEG", quality=92)
    whole = open_rgb(io.BytesIO(content))
    assert np.array_equal(whole, Image.open(io.BytesIO(content)).convert("RGB")), "exact where nothing is said"
    for shorter, scale in [(400, 1), (301, 1), (300, 2), (151, 2), (150, 4), (75, 8), (30, 8), (2000, 1)]:
        reduced = open_rgb(io.BytesIO(content), shorter)
        assert reduced.size == (1600 // scale, 1200 // scale), shorter
        far = distance(whole, reduced, (round(shorter * 4 / 3), shorter))
        assert far < 1 if scale > 1 else far == 0
    assert open_rgb(io.BytesIO(encoded(photo)), 30).size == photo.size, "other formats have no cheap reduction"

    # Sides that are no multiples: the last pixel stands for fewer, so that the picture is stretched by less than it.
    cropped = photo.crop((0, 0, 1597, 1198))
    reduced = open_rgb(io.BytesIO(encoded(cropped, "JPEG", quality=92)), 140)
    padded = Image.fromarray(np.pad(np.asarray(cropped), ((0, 2), (0, 3), (0, 0)), "edge"))
    assert reduced.size == (400, 300) and distance(padded, reduced, (200, 150)) < 1


@pytest.mark.filterwarnings("error")
def test_a_photo_of_108_megapixels(tmp_path):
    plain("L", 90, (12_000, 9_000)).save(tmp_path / "a.jpg")
    assert open_rgb(tmp_path / "a.jpg", shorter=224).size == (1500, 1125)
    assert open_rgb(tmp_path / "a.jpg", shorter=3000).size == (6000, 4500), "halved even where less would do"
    assert image_size(tmp_path / "a.jpg") == (12_000, 9_000)


def test_pictures_above_the_limit(monkeypatch):
    monkeypatch.setattr(images, "MOST_PIXELS", 1000)
    content = encoded(plain("RGB", "red", (60, 50)), "JPEG")
    assert open_rgb(io.BytesIO(content)).size == (30, 25), "a JPEG is halved"
    assert "1,000 pixels" in message(open_rgb, io.BytesIO(encoded(plain("RGB", 0, (60, 50)))))
    assert "1,000 pixels" in message(open_rgb, io.BytesIO(encoded(plain("RGB", 0, (80, 60)), "JPEG")), 1)


def header(width, height):
    """A PNG that promises more than it holds."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture
def bad_files(tmp_path):
    """Files in tmp_path that nothing should accept or wait for -> {name: words of the complaint}."""
    for kind in ("jpeg", "png", "webp"):
        content = encoded(smooth(64, 64), kind.upper())
        (tmp_path / f"cut.{kind}").write_bytes(content[: len(content) // 2])
    jpeg = bytearray(encoded(smooth(64, 64), "JPEG", progressive=True))
    at = jpeg.index(b"\xff\xc2") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65000, 65000)
    contents = {
        "empty.jpg": b"",
        "text.jpg": b"this is no picture",
        "head.jpg": encoded(smooth(64, 64), "JPEG")[:40],
        "giant.png": header(10_000, 9_000),
        "bomb.png": header(60_000, 60_000),
        "bomb.jpg": bytes(jpeg),
        "float.tif": encoded(plain("F", 0.5), "TIFF"),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "dangling.jpg").symlink_to("gone.jpg")
    latin = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.jpg")
    with open(latin, "wb") as file, socket.socket(socket.AF_UNIX) as unix:
        file.write(b"no")
        unix.bind(str(tmp_path / "socket.jpg"))
    yield {
        "cut.jpeg": "truncated",
        "cut.png": "truncated",
        "cut.webp": "",
        "empty.jpg": "an empty file",
        "text.jpg": "not an image",
        "head.jpg": "",
        "giant.png": "pixels",
        "bomb.png": "pixels",
        "bomb.jpg": "pixels",
        "float.tif": "32 bits",
        "folder.jpg": "no file",
        "fifo.jpg": "no file",
        "socket.jpg": "no file",
        "device.jpg": "no file",
        "loop.jpg": os.strerror(errno.ELOOP),
        "dangling.jpg": "a link to nothing",
        os.path.basename(latin): "not an image",
        "absent.jpg": "no such file",
    }
    os.close(os.open(tmp_path / "fifo.jpg", os.O_RDWR | os.O_NONBLOCK))  # ends whoever waits at it


@pytest.mark.filterwarnings("error")
def test_bad_files_are_named_one_by_one_and_all_together(tmp_path, bad_files):
    for name, words in bad_files.items():
        for text in (message(open_rgb, tmp_path / name), message(open_rgb, str(tmp_path / name), 8)):
            start, end = f"{tmp_path}/{images.shown(name)}: ", "; mend or remove it"
            assert text.startswith(start) and text.endswith(end) and text.isprintable() and text.encode()
            complaint = text.removeprefix(start).removesuffix(end)
            assert words in complaint and tmp_path.name not in complaint
    assert images.shown("caf\udce9\n") == "caf\\udce9\\n" and images.shown("café 手") == "café 手"
    assert "no file" in message(image_size, tmp_path / "fifo.jpg")

    for i in range(100):
        shutil.copy(__file__, tmp_path / f"text{i}.jpg") if i == 50 else plain("RGB", 0).save(tmp_path / f"{i}.jpg")
    keys = [f"{i}.jpg" for i in range(100) if i != 50]
    split = SimpleNamespace(root=tmp_path, keys=[*keys, *bad_files])
    done = []
    text = message(lambda: verify(listed(split), progress=done.append))
    assert text.startswith(f"{len(bad_files)} of {len(split.keys)} images in {tmp_path} are bad; mend or remove\n")
    for line, (name, words) in zip(text.split("\n")[1:], bad_files.items(), strict=True):
        assert line.startswith(f"  {images.shown(name)}: ") and words in line.split(": ", 1)[1]
    assert sum(done) == len(split.keys) and len(done) > 1
    verify(listed(SimpleNamespace(root=tmp_path, keys=keys)))
    verify(listed(SimpleNamespace(root=None, keys=["pixels in memory"])))


def test_error_of_a_bad_file_does_not_hide_the_cause(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no")
    with pytest.raises(UserError) as caught:
        open_rgb(tmp_path / "x.png")
    assert isinstance(caught.value.__cause__, OSError)


def listed(split):
    """What verify needs of datasets.Images."""

    class Images(SimpleNamespace):
        def __len__(self):
            return len(self.keys)

    return Images(**vars(split))


@pytest.fixture
def split(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(80):
        plain("RGB", i).save(tmp_path / "data" / f"{i}.png")
    return listed(SimpleNamespace(root=tmp_path / "data", keys=[f"{i}.png" for i in range(80)]))


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files decoded so far."""
    names, real = [], images._decoded

    def note(path, shorter):
        names.append(os.path.basename(path))
        return real(path, shorter)

    monkeypatch.setattr(images, "_decoded", note)
    return names


def test_what_was_found_good_is_not_decoded_again(tmp_path, split, decoded):
    memory = tmp_path / "new" / "verified"
    verify(split, memory)
    assert sorted(decoded) == sorted(split.keys) and memory.stat().st_size == 8 * 80
    os.utime(split.root / "3.png", ns=(1, 1))  # changed
    before = (split.root / "4.png").stat().st_mtime_ns
    (split.root / "4.png").write_bytes(encoded(plain("RGB", 4)) + b"\0")
    os.utime(split.root / "4.png", ns=(before, before))
    other = listed(SimpleNamespace(root=tmp_path, keys=["data/5.png", "data/bad.png"]))  # another split, one memory
    (split.root / "bad.png").write_bytes(b"")
    decoded.clear()
    for _ in range(2):
        verify(split, memory)
        assert "bad.png: an empty file" in message(verify, other, memory)
    assert sorted(decoded) == ["3.png", "4.png", "bad.png", "bad.png"], "5.png is known by its path; bad ones never are"

    decoded.clear()
    memory.write_bytes(memory.read_bytes()[:100])  # cut
    verify(split, memory)
    assert len(decoded) >= 80 - 12
    decoded.clear()
    verify(split, memory)
    assert not decoded
    verify(split)
    assert len(decoded) == 80, "without a memory nothing is remembered"


def test_an_interrupted_check_ends_soon_and_goes_on_later(tmp_path, split, decoded, monkeypatch):
    split.keys *= 50
    slow = images._decoded
    monkeypatch.setattr(images, "_decoded", lambda *what, **more: (time.sleep(0.002), slow(*what, **more)))

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(split, tmp_path / "verified", stop)
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join()
    assert 32 <= len(decoded) < 3000 and (tmp_path / "verified").stat().st_size > 0


# ---------------------------------------------------------------------------------------
# Out


def test_images_are_written_lossless(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 9, 7, 3), dtype=np.uint8)
    for settings in (dict(format="png"), dict(format="webp")):
        folder, suffix = tmp_path / settings["format"], images.SUFFIX[settings["format"]]
        with ImageWriter(threads=3, **settings) as writer:
            reused = np.empty((9, 7, 3), np.uint8)
            for k in range(20):
                reused[:] = pixels[k]
                writer.save(folder / f"{k}{suffix}", reused)
            for k in range(20, 39):
                writer.save(folder / f"{k}{suffix}", torch.from_numpy(pixels[k]).permute(2, 0, 1))
            writer.save(folder / f"39{suffix}", Image.fromarray(pixels[39]))
        for k in range(40):
            with Image.open(folder / f"{k}{suffix}") as image:
                assert image.format == settings["format"].upper() and image.mode == "RGB"
                assert np.array_equal(np.asarray(image), pixels[k])
        assert sorted(os.listdir(folder)) == sorted(f"{k}{suffix}" for k in range(40))


def test_formats_and_sizes(tmp_path):
    photo = smooth(128, 128)
    sizes = {}
    for name, settings in {
        "95.jpg": dict(format="jpeg"),
        "75.jpg": dict(format="jpeg", quality=75),
        "75.webp": dict(format="webp", quality=75),
        "100.webp": dict(format="webp"),
        "64.png": dict(size=64),
    }.items():
        with ImageWriter(**settings) as writer:
            writer.save(tmp_path / name, photo)
        sizes[name] = (tmp_path / name).stat().st_size
        mean = np.abs(np.asarray(open_rgb(tmp_path / name).resize((128, 128)), float) - np.asarray(photo)).mean()
        assert mean < {"95.jpg": 3, "75.jpg": 9, "75.webp": 12, "100.webp": 1e-9, "64.png": 15}[name], name
    assert sizes["75.webp"] < sizes["75.jpg"] < sizes["95.jpg"] < sizes["100.webp"]
    for name, sampling in (("95.jpg", 0), ("75.jpg", 2)):  # 4:4:4, 4:2:0
        with Image.open(tmp_path / name) as image:
            assert JpegImagePlugin.get_sampling(image) == sampling
    with Image.open(tmp_path / "64.png") as image:
        assert np.array_equal(image, photo.resize((64, 64), Image.Resampling.LANCZOS))


def test_image_writer_reports_what_went_wrong(tmp_path, monkeypatch):
    image = np.zeros((2, 2, 3), np.uint8)
    (tmp_path / "1.png").mkdir()
    with pytest.raises(UserError, match=r"1.png: cannot be written \(Is a directory\)"), ImageWriter() as writer:
        writer.save(tmp_path / "1.png", image)
    with pytest.raises(UserError, match="1.png"), ImageWriter(threads=1) as writer:
        for _ in range(1000):  # far more than the queue holds: an error must not block save()
            writer.save(tmp_path / "1.png", image)
    with pytest.raises(UserError, match="x.jpg: cannot be written"), ImageWriter() as writer:
        writer.save("/dev/null/x.jpg", image)
    with pytest.raises(RuntimeError, match="3.webp: cannot be written: .*16383"), ImageWriter(format="webp") as writer:
        writer.save(tmp_path / "3.webp", np.zeros((1, 20_000, 3), np.uint8))
    with ImageWriter() as writer, pytest.raises(AssertionError, match=r"float32 \(2, 2, 3\)"):
        writer.save(tmp_path / "2.png", np.zeros((2, 2, 3), np.float32))
    # The error of the block itself is the one that is raised; what was handed over is still written.
    with pytest.raises(KeyboardInterrupt), ImageWriter(threads=1) as writer:
        writer.save(tmp_path / "3.png", image)
        writer.save(tmp_path / "1.png", image)
        raise KeyboardInterrupt
    assert (tmp_path / "3.png").exists() and len(os.listdir(tmp_path)) == 2


def test_image_writer_on_a_full_disk(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="disk full at .*0.png"), ImageWriter() as writer:
        writer.save(tmp_path / "0.png", np.zeros((2, 2, 3), np.uint8))
    assert os.listdir(tmp_path) == []


def test_image_writer_holds_few_images(tmp_path, monkeypatch):
    saved, real = [], Image.Image.save

    def save(self, *words, **more):
        time.sleep(0.01)
        real(self, *words, **more)
        saved.append(1)

    monkeypatch.setattr(Image.Image, "save", save)
    with ImageWriter(threads=2) as writer:
        for k in range(60):
            writer.save(tmp_path / f"{k}.png", np.zeros((2, 2, 3), np.uint8))
            assert k + 1 - len(saved) <= 32 + 2 + 1  # waiting, in work, and the one being handed over
    assert len(saved) == 60


def test_existing(tmp_path):
    for k in (0, 3, 12):
        (tmp_path / f"{k}.png").touch()
    strays = ".cleansynth-tmp-1 x.png -1.png 7.jpg 4.png.part \u00b2.png 012.png 01.png 99.png 6"
    for stray in strays.split():
        (tmp_path / stray).touch()
    (tmp_path / "5.png").mkdir()
    assert existing(tmp_path, 20).nonzero()[0].tolist() == [0, 3, 12]
    assert existing(tmp_path, 12).tolist() == [k in (0, 3) for k in range(12)]
    assert existing(tmp_path, 20, ".jpg").nonzero()[0].tolist() == [7]
    assert not existing(tmp_path / "nowhere", 3).any() and not existing(tmp_path / "0.png", 3).any()


# ---------------------------------------------------------------------------------------
# Contact sheets


def sheet(path, *what, **more):
    samples_grid(path / "s.png", *what, **more)
    with Image.open(path / "s.png") as image:
        return image.convert("RGB")


def test_samples_grid(tmp_path):
    rows = [
        [plain("RGB", "red"), torch.zeros(3, 5, 9, dtype=torch.uint8)],
        [np.full((4, 4, 3), 200, np.uint8), lambda: plain("L", 7)],
        [None, lambda: None],
    ]
    image = sheet(tmp_path, rows, ["real", "x" * 500, "gap"], ["<b>", "\u044f" * 90], size=64)
    assert 2 * 64 < image.width < 2 * 64 + 260 and 3 * 64 < image.height < 300
    assert {colour for _, colour in image.getcolors(100_000)} >= {(255, 0, 0), (0, 0, 0), (200,) * 3, (7,) * 3}


def test_samples_grid_breaks_columns_and_opens_only_what_it_shows(tmp_path):
    opened = []

    def picture(k):
        opened.append(k)
        return plain("RGB", "red")

    def size(n):
        opened.clear()
        return sheet(tmp_path, [[lambda k=k: picture(k) for k in range(n)]], ["row"], list(map(str, range(n))), 16).size

    assert size(24)[0] == size(12)[0] and size(24)[1] > 1.8 * size(12)[1]
    assert size(96) == size(1000) and len(opened) == 96 and opened[0] == 0 and opened[-1] == 989


def test_a_row_of_a_sheet_has_a_picture_of_each_class():
    pixels = np.arange(6, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    pictures = Images([1, 0, 1, 0, 1, 1], map(str, range(6)), ["a", "b"], pixels=pixels)
    shown = lambda row: [picture().getpixel((0, 0))[0] for picture in row]  # noqa: E731
    assert shown(of_each_class(pictures)) == [1, 0]
    assert shown(of_each_class(pictures, 1)) == [3, 2]
    assert shown(of_each_class(pictures, [0, 3])) == [1, 5]


def test_images_that_do_not_fit_on_the_disk_are_told(tmp_path, monkeypatch, capsys):
    """JPEGs of 512 pixels take 0.2 bytes a pixel: 52 kB each."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=53e9))
    images.check_space(tmp_path, 1_000_000, 1_281_167, 512, "jpeg", "--gen-versions")
    assert capsys.readouterr().out == "1,000,000 of 1,281,167 images to draw, about 52.43 GB; 53.0 GB are free\n"
    wanted = "the images need about 401 GB, 53 GB are free; free some space, lower --gen-versions or choose another"
    with pytest.raises(UserError, match=wanted):
        images.check_space(tmp_path, 1_000_000, 1_281_167, 512, "png", "--gen-versions")
    capsys.readouterr()
    images.check_space(tmp_path, 0, 0, 512, "png", "--gen-versions")
    assert capsys.readouterr().out == ""
