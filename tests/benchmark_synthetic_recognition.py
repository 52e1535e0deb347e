"""Images per second of the CLIP filter, against a loop that encodes all class texts again for each image at batch 1.

    python tests/benchmark_synthetic_recognition.py
    python tests/benchmark_synthetic_recognition.py --full --device cuda --images 20000 --peak 989

Not a test: it asserts no time. Both are measured in one run on the tiny CLIP with 100 classes; quote the ratio.
--full: the filter alone, CLIP ViT-B/16 with random weights in bfloat16, images of 224 pixels from memory.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import synthetic_recognition as sr  # noqa: E402
from common.clip import encode_images, encode_texts, load_clip, save_clip, zero_shot_weights  # noqa: E402
from common.report import print_table  # noqa: E402

WORDS = "zero one two three four five six seven eight nine".split()
NAMES = [f"{a} {b}" for a in WORDS for b in WORDS]


def official_way(clip, images):
    """As the official script: one image at a time, every class text encoded for each."""
    found = []
    for image in images:
        text = encode_texts(clip, [f"a photo of a {name}" for name in NAMES], batch=1)
        W = sr.zero_shot_head(text[:, None], clip.model.logit_scale.exp())
        found.append(sr.own_confidence(encode_images(clip, image[None], batch=1), W, 3))
    return torch.cat(found)


def our_way(clip, images):
    """As the stage filter on images in memory: texts once, full batches."""
    W = zero_shot_weights(clip, NAMES, ["a photo of a {}"]) * clip.model.logit_scale.exp()
    return sr.own_confidence(encode_images(clip, images, batch=256), W, 3)


def full_size(device, n, peak):
    """Images per second of ViT-B/16 and its share of the device's peak, TFLOP/s"""
    import open_clip
    from torch.utils.flop_counter import FlopCounterMode

    arch = "ViT-B-16-quickgelu"
    with tempfile.TemporaryDirectory() as folder:
        save_clip(folder, open_clip.create_model(arch).state_dict(), open_clip.get_model_config(arch))
        clip = load_clip(folder, device, torch.bfloat16)
    images = torch.randint(256, (n, 3, 224, 224), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        encode_images(clip, images[:1])
    tflop, rows = counter.get_total_flops() / 1e12, []
    W = zero_shot_weights(clip, NAMES, ["a photo of a {}"]) * clip.model.logit_scale.exp()
    for batch in (64, 256, 1024):
        sr.own_confidence(encode_images(clip, images[:batch], batch=batch), W, 3).cpu()
        start = time.perf_counter()
        sr.own_confidence(encode_images(clip, images, batch=batch), W, 3).cpu()
        rate = n / (time.perf_counter() - start)
        rows.append([f"batch {batch}", f"{rate:.1f}", f"{100 * rate * tflop / peak:.0f} %" if peak else ""])
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {1e3 * tflop:.1f} GFLOP an image")
    print_table(["ViT-B/16, bfloat16", "images/s", "share of peak"], rows)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="CLIP ViT-B/16 instead of the tiny one")
    parser.add_argument("--device", default="cpu", help="of --full")
    parser.add_argument("--images", type=int, default=64, help="of --full")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, for the share of it")
    asked = parser.parse_args()
    if asked.full:
        return full_size(asked.device, asked.images, asked.peak)
    clip = load_clip("tiny")
    images = torch.randint(256, (2048, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    n, rates = 8, {}
    assert (official_way(clip, images[:2]) - our_way(clip, images[:2])).abs().max() < 1e-4
    for name, way, some in (("official way", official_way, images[:n]), ("filter", our_way, images)):
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
