"""Images per second of the stage filter, against a loop that encodes all class texts again for each image at batch 1.

    python tests/benchmark_synthetic_recognition.py
    python tests/benchmark_synthetic_recognition.py --full --device cuda --images 20000 --workers 8 --peak 67

Not a test: it asserts no time. Both ways are measured in one run on the tiny CLIP with 100 classes; quote the ratio.
Ours is what the stage calls: `text_weights`, `Features.write` with the judge, files and all, `Features.read`. --full:
the same for CLIP ViT-B/16 with random weights in float32, images of 224 pixels from memory.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import synthetic_recognition as sr  # noqa: E402
from common.clip import encode_texts, load_clip, save_clip  # noqa: E402
from common.datasets import Images  # noqa: E402
from common.distributed import Dist  # noqa: E402
from common.features import encoded  # noqa: E402
from common.report import print_table  # noqa: E402

WORDS = "zero one two three four five six seven eight nine".split()
NAMES = [f"{a} {b}" for a in WORDS for b in WORDS]
PROMPTS = ["a photo of a {}"]


def noise(n, size):
    """n images of random pixels, dealt to the classes"""
    pixels = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return Images(np.arange(n) * len(NAMES) // n, map(str, range(n)), NAMES, pixels=pixels)


def official_way(clip, images):
    """As the official script: one image at a time, every class text encoded for each."""
    found = []
    for row in range(len(images)):
        text = encode_texts(clip, [PROMPTS[0].format(name) for name in NAMES], batch=1)
        W = sr.zero_shot_head(text[:, None], clip.model.logit_scale.exp())
        f = clip.model.encode_image(clip.preprocess(images[row])[None])
        found.append(sr.own_confidence(f, W, int(images.labels[row])))
    return torch.cat(found)


def our_way(clip, images, batch=256, device="cpu", workers=0):
    """As the stage: class texts once, features and confidences into files."""
    W, one = sr.text_weights(clip, NAMES, PROMPTS), Dist(rank=0, world=1, local_rank=0, device=torch.device(device))
    with tempfile.TemporaryDirectory() as folder:
        features = sr.Features(Path(folder), [clip, clip], images, batch, workers)
        features.write(one, lambda f, c: {"confidence": sr.own_confidence(f, W, c)})
        return features.read("confidence")


def full_size(device, n, workers, peak):
    """Images per second of ViT-B/16 and its share of the device's peak, TFLOP/s"""
    import open_clip
    from torch.utils.flop_counter import FlopCounterMode

    arch = "ViT-B-16-quickgelu"
    with tempfile.TemporaryDirectory() as folder:
        save_clip(folder, open_clip.create_model(arch).state_dict(), open_clip.get_model_config(arch))
        clip = load_clip(folder, device)
        with FlopCounterMode(display=False) as counter:
            encoded(clip, torch.zeros(1, 3, 224, 224, dtype=torch.uint8, device=device), 1)
        tflop, rows, images = counter.get_total_flops() / 1e12, [], noise(n, 224)
        for batch in (min(n, 32), min(n, 256)):  # the stage's --gen-micro-batch, and a larger one
            our_way(clip, images.subset(range(batch)), batch, device, workers)
            start = time.perf_counter()
            our_way(clip, images, batch, device, workers)
            rate = n / (time.perf_counter() - start)
            rows.append([f"batch {batch}", f"{rate:.1f}", f"{100 * rate * tflop / peak:.0f} %" if peak else ""])
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {1e3 * tflop:.1f} GFLOP an image")
    print_table(["ViT-B/16, float32", "images/s", "share of peak"], rows)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="CLIP ViT-B/16 instead of the tiny one")
    parser.add_argument("--device", default="cpu", help="of --full")
    parser.add_argument("--images", type=int, default=64, help="of --full")
    parser.add_argument("--workers", type=int, default=0, help="of --full, processes that read images")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, for the share of it")
    asked = parser.parse_args()
    if asked.full:
        return full_size(asked.device, asked.images, asked.workers, asked.peak)
    clip = load_clip("tiny")
    images, rates = noise(2048, 32), {}
    few = images.subset(range(0, 2048, 256))
    assert (official_way(clip, few) - our_way(clip, few)).abs().max() < 1e-4
    for name, way, some in (("official way", official_way, few), ("filter", our_way, images)):
        seconds = []
        for _ in range(3):
            start = time.process_time()
            way(clip, some)
            seconds.append(time.process_time() - start)
        rates[name] = len(some) / min(seconds)
    rows = [[name, f"{rate:.1f} images per CPU second"] for name, rate in rates.items()]
    print_table(["figure", "value"], [*rows, ["ratio", f"{rates['filter'] / rates['official way']:.0f}"]])


if __name__ == "__main__":
    main()
