"""Seconds and memory of the lists at the size of ImageNet, and what a training step costs the host and the network.

    python tests/benchmark_scale.py          # four minutes on 2 cores, 2 GB of memory, 200 MB of disk for a while
    python tests/benchmark_scale.py --quick  # small sizes, to see that it runs

Not a test: it asserts no time. A data set of N images and a generated set of 10 N are made in memory, without files;
reading folders is measured on a tree of empty files and multiplied. Each line is a process of its own, so that its
peak of memory (Python and torch included) is its own. Seconds are those of the CPU, which neighbours on a busy machine
change little; folders have elapsed ones too. The aim: a start within 30 s and 2 GB at 1.28 million images.
"""

import argparse
import json
import os
import pickle
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from benchmark_loader import loader_rates  # noqa: E402

from common.datasets import (  # noqa: E402
    Generated,
    ImageDataset,
    Images,
    Keys,
    _read_tree,
    few_shot,
    hold_out,
    unchanged,
)
from common.distributed import Dist, Order, cleanup  # noqa: E402
from common.files import class_folders  # noqa: E402
from common.images import existing  # noqa: E402
from common.loop import Loop, sum_in_order, traffic, units_of  # noqa: E402
from common.run import Run, write_metadata  # noqa: E402

CLASSES = [f"class {c}" for c in range(1000)]
IMAGENET, BATCH = 1_281_000, 256
ALONE = Dist(0, 0, 1, torch.device("cpu"))


def in_own_process(work, *args):
    """work(*args) in a forked process -> (what it returned, CPU seconds, peak of its memory in MB)"""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        code = 1
        try:
            torch.set_num_threads(1)
            start = time.process_time()
            result = work(*args)
            seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            os.write(write, json.dumps([result, seconds, peak]).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{work.__name__} failed")
    return json.loads(answer)


def fake_images(n, split="train"):
    """n images with ImageNet's names, in 1,000 classes."""
    per_class = n // len(CLASSES)
    folders = [f"n{c:08d}" for c in range(len(CLASSES))]
    keys = [Keys([f"{split}/{f}/{f}_{i}.JPEG" for i in range(per_class)]) for f in folders]
    labels = np.repeat(np.arange(len(CLASSES)), per_class)
    return Images(labels, Keys.joined(keys), CLASSES, Path("/data/imagenet"))


# ---------------------------------------------------------------------------------------------
# What grows with the number of images. Each function makes what it needs and returns nothing.


def make(n):
    ImageDataset("imagenet", CLASSES, fake_images(n), None, fake_images(50_000, "val"))


def make_and_send(n):
    pickle.loads(pickle.dumps(ImageDataset("imagenet", CLASSES, fake_images(n), None, fake_images(50_000, "val"))))


def choose(n):
    images = fake_images(n)
    few_shot(images, "imagenet", 16, 0, len(CLASSES))
    hold_out(images, 0.2, 0)


def epoch(n):
    order = Order(n, 0, "clf")
    for start in range(0, n, BATCH):
        order.rows(start, start + BATCH)


def generated(n):
    images = Generated(Path("/run/images"), CLASSES, 10 * n // len(CLASSES))
    for row in range(0, len(images), len(images) // 1000):
        images.key(row)
    pickle.loads(pickle.dumps(images))


def metadata(n):
    folders = class_folders(CLASSES)
    rows = (
        dict(file_name=f"{folder}/{k}.png", label=c, class_name=CLASSES[c], prompt="a photo of a class", seed=c + k)
        for c, folder in enumerate(folders)
        for k in range(n // len(CLASSES))
    )
    with tempfile.TemporaryDirectory() as folder:
        write_metadata(folder, rows)


def training_steps(n, steps=200):
    """-> host milliseconds of a step: rows and labels of a batch, micro-batches, one optimizer step of a tiny net"""
    images, net = fake_images(n), torch.nn.Linear(8, 8)
    run = SimpleNamespace(log=lambda *args, **kwargs: None, made=lambda: None, path=lambda *parts: Path(*parts))
    with tempfile.TemporaryDirectory() as folder:
        optimizer = torch.optim.AdamW(net.parameters())
        loop = Loop(run, "clf", steps, optimizer, ALONE, BATCH // 4, file=Path(folder) / "checkpoint.safetensors")
        order, took = Order(n, 0, "clf"), []
        sys.stderr = open(os.devnull, "w")  # no progress bar
        for step in loop:
            start = time.perf_counter()
            rows = order.rows(step * BATCH, (step + 1) * BATCH)
            labels = torch.as_tensor(images.labels[rows])
            for u in loop.units(len(rows)):
                loop.backward(net(torch.ones(len(labels[u]), 8)).sum() / len(rows))
            loop.update(lr=1e-3)
            loop.log(loss=loop.loss)
            took.append(time.perf_counter() - start)
    return 1000 * float(np.median(took))


# ---------------------------------------------------------------------------------------------
# What reads folders: measured on empty files.


def on_disk(count):
    """-> {what: microseconds per file, of the CPU and elapsed} of a tree of empty files, which is removed again"""
    per_class, folders = count // 100, [f"n{c:08d}" for c in range(100)]
    rates = {}
    with tempfile.TemporaryDirectory() as root:
        for folder in folders:
            os.makedirs(f"{root}/train/{folder}")
            os.makedirs(f"{root}/images/{folder}")
            for i in range(per_class):
                open(f"{root}/train/{folder}/{folder}_{i}.JPEG", "wb").close()
                os.link(f"{root}/train/{folder}/{folder}_{i}.JPEG", f"{root}/images/{folder}/{i}.png")

        def timed(what, work):
            start = time.process_time(), time.perf_counter()
            result = work()
            stop = time.process_time(), time.perf_counter()
            rates[what] = [1e6 * (b - a) / (per_class * 100) for a, b in zip(start, stop, strict=True)]
            return result

        images, _ = timed("list", lambda: _read_tree(Path(root), "train", folders, folders))
        assert len(images) == 100 * per_class
        timed("resume", lambda: [existing(f"{root}/images/{folder}", per_class) for folder in folders])
        record = Path(root) / "data.safetensors"
        unchanged(record, folders, {"train": images})
        timed("unchanged", lambda: unchanged(record, folders, {"train": images}))
        for name in folders:  # as large as a JPEG of 224 pixels
            for i in range(per_class):
                os.truncate(f"{root}/images/{name}/{i}.png", 30_000)
        run = Run(Path(root), ALONE, "scale", {})
        timed("done", lambda: run.done("generate", run.under("images")))
        assert not timed("todo", lambda: run.todo("generate"))
    return rates


# ---------------------------------------------------------------------------------------------
# What travels.


def sums(rank, world, numbers, place):
    """-> bytes that this process sends in one step whose gradients are `numbers` floats, one unit per process"""
    dist = Dist(rank, rank, world, torch.device("cpu"))
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=world)
    sum_in_order({unit: [torch.ones(numbers)] for unit in units_of(rank, world, world)}, world, dist)
    sent = traffic["bytes"]
    cleanup(dist)
    return sent


def bytes_per_step(world, numbers):
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(1, world):
            if (child := os.fork()) == 0:
                torch.set_num_threads(1)
                sums(rank, world, numbers, f"{folder}/meet")
                os._exit(0)
            children.append(child)
        sent = sums(0, world, numbers, f"{folder}/meet")
        for child in children:
            os.waitpid(child, 0)
    return sent


LISTS = {
    "data set made in memory": make,
    "data set made, sent to another process and unpacked": make_and_send,
    "16 shots and 20 % of validation chosen": choose,
    "order of an epoch, in batches of 256": epoch,
    "generated set of 10 N made, 1,000 names": generated,
    "metadata.jsonl of N rows": metadata,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    quick = parser.parse_args().quick
    sizes = (20_000, 60_000) if quick else (160_000, 640_000, IMAGENET)
    print(f"{'':54}" + "".join(f"{n:>13,}" for n in sizes) + "   per image   peak memory")
    for name, work in LISTS.items():
        found = [in_own_process(work, n) for n in sizes]
        slope = 1e6 * (found[-1][1] - found[0][1]) / (sizes[-1] - sizes[0])
        times = "".join(f"{seconds:>11.2f} s" for _, seconds, _ in found)
        print(f"{name:54}{times}{slope:>9.2f} us{found[-1][2]:>10.0f} MB", flush=True)

    count = 2_000 if quick else 100_000
    rates, _, peak = in_own_process(on_disk, count)
    print(f"\nFolders, measured on {count:,} files of a local disk ({peak:.0f} MB)")
    for what, key, n in (
        ("listing", "list", IMAGENET),
        ("are they still the same (size and time of each)", "unchanged", IMAGENET),
        ("resume: which of 10 N generated images are there", "resume", 10 * IMAGENET),
        ("end of a stage: size and quick hash of 10 N images", "done", 10 * IMAGENET),
        ("a later start: are they still as they were", "todo", 10 * IMAGENET),
    ):
        cpu, elapsed = rates[key]
        print(f"{what:54}{cpu:>7.2f} us per file ({elapsed:.2f} elapsed), {cpu * n / 1e6:>5.1f} s for {n:,}")

    print("\nHost time of a training step, a net of 72 numbers, 4 micro-batches of 64")
    for n in sizes:
        print(f"N = {n:>9,}: {in_own_process(training_steps, n)[0]:.2f} ms", flush=True)

    numbers = 100_000 if quick else 4_000_000
    print(f"\nBytes that a process sends in a step, for {numbers:,} gradients in fp32, one unit per process")
    for world in (1, 2) if quick else range(1, 9):
        sent = in_own_process(bytes_per_step, world, numbers)[0]
        print(f"{world} processes: {sent / 2**20:>7.1f} MiB, {sent / 4 / numbers:.2f} numbers per gradient", flush=True)

    print("\nThe loader (tests/benchmark_loader.py): images per second of one core's time, kB of a file")
    torch.set_num_threads(1)
    for what, speed, size in loader_rates(0.2 if quick else 2.0):
        print(f"{what:54}{speed:>11.0f}{size:>11.0f}", flush=True)


if __name__ == "__main__":
    main()
