"""Images per second of DistDiff's guided sampler, in batches and as the official loop works.

    python tests/benchmark_distdiff.py             # the tiny world: some minutes on 2 cores
    python tests/benchmark_distdiff.py --images 20 # for a look at the ratio

Not a test: it asserts no time. Machines are noisy, so quote the ratio, which comes from one run, before the rates.
CPU seconds stand beside the wall clock: on a machine that others use too they are the steadier measure.

"Official loop": one image at a time, the copies of a source one after another, each PNG encoded with Pillow's default
compression while the model waits. The arithmetic is distdiff.py's own in both. Guided images are drawn with and without
activation checkpointing, both ways alike: it is asked for officially, and acted in no diffusers of that time.
"""

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import distdiff as dd  # noqa: E402
from common import datasets, distributed, images, models  # noqa: E402
from common.diffusion import latent_shape  # noqa: E402
from common.files import chunks  # noqa: E402
from common.report import print_table  # noqa: E402


def world(**flags):
    """Sampler, latents, labels of the first real digits; a guide with random weights costs what a trained one does."""
    args = dd.Args(**{**dd.PRESETS["digits"], "gen_steps": 50, "gen_step_from_end": 20, **flags})
    pipe = dd.generator_of(args, models.resolve("tiny", "generator"), torch.device("cpu"))
    data = datasets.load_dataset("digits")
    prompts = dd.prompts_of_classes(args, data.class_names)
    distributed.seed_global(0)
    guide = dd.Net(args.guide, prompts).requires_grad_(False).eval()
    labels = torch.arange(60) % 10
    found = dd.prototypes(torch.rand(60, guide.net.num_features), labels, 10, args.groups)
    latents = list(torch.randn(60, *latent_shape(pipe, args.gen_resolution)))
    return dd.Sampler(args, pipe, guide, found, prompts), latents, data.train.labels


def official_way(folder, sources, copies, row, checkpoint):
    """One image at a time, saved before the next one begins."""
    sampler, latents, labels = world(gen_micro_batch=1, grad_checkpoint=checkpoint)
    start = clock()
    for i in range(sources):
        for j in range(copies):
            (image,) = sampler.draw(row, [latents[i]], [labels[i]], [1000 * i + j])
            images.to_pil(image).save(folder / f"{i}_expand_{j}.png")
    return since(start)


def our_way(folder, sources, copies, row, checkpoint, batch):
    """Full micro-batches over sources and copies; PNGs are written behind the model's back."""
    sampler, latents, labels = world(gen_micro_batch=batch, grad_checkpoint=checkpoint)
    start = clock()
    items = [(i, j) for j in range(copies) for i in range(sources)]
    with images.ImageWriter() as writer:
        for part in chunks(items, batch):
            seeds = [1000 * i + j for i, j in part]
            drawn = sampler.draw(row, [latents[i] for i, _ in part], [labels[i] for i, _ in part], seeds)
            for (i, j), image in zip(part, drawn, strict=True):
                writer.save(folder / f"{i}-{j}.png", image)
    return since(start)


def clock():
    return time.perf_counter(), time.process_time()


def since(start):
    return tuple(now - then for now, then in zip(clock(), start, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100, help="images of each way, a multiple of 5")
    parser.add_argument("--batch", type=int, default=50, help="images per forward pass of our way")
    asked = parser.parse_args()
    sources, n = asked.images // 5, asked.images // 5 * 5
    rows, batch = [], min(asked.batch, n)
    for name, row, checkpoint in (
        ("distdiff, checkpointing", "distdiff", True), ("distdiff, without", "distdiff", False), ("sd", "sd", False),
    ):  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            slow = official_way(Path(folder), sources, 5, row, checkpoint)
            fast = our_way(Path(folder), sources, 5, row, checkpoint, batch)
        for way, (wall, cpu) in (("official loop", slow), (f"batches of {batch}", fast)):
            rows.append([f"{name}: {way}", f"{n / wall:.2f}", f"{1000 * cpu / n:.0f} ms"])
        rows.append([f"{name}: ratio", f"{slow[0] / fast[0]:.2f}", f"{slow[1] / fast[1]:.2f}"])
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print_table(["50 DDIM steps, strength 0.5, P = 2", "images/s", "CPU time per image"], rows)


if __name__ == "__main__":
    main()
