"""Images per second of Real-Fake's generation, in fixed micro-batches and as a plain diffusers img2img loop.

    python tests/benchmark_realfake.py                    # the tiny world on a CPU: about a minute
    python tests/benchmark_realfake.py --full --device cuda --images 96 --batches 8 16 32 64 --compile --peak 989
                                                          # Stable Diffusion 1.5 from its configuration, random weights

Not a test: it asserts no time. Machines are noisy, so quote the ratio, which comes from one run, before the rates.

Both ways: 22 of 30 UniPC steps with guidance 2 from the latent of a picture, which is encoded once. "img2img loop" is
what the official script does: StableDiffusionImg2ImgPipeline in half precision, batches of 24, on a GPU with
enable_model_cpu_offload, each file encoded while the model waits. The text states are given to both.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision.transforms.v2.functional import pil_to_tensor  # noqa: E402

import realfake as rf  # noqa: E402
from common.diffusion import load_pipeline  # noqa: E402
from common.files import chunks  # noqa: E402
from common.images import ImageWriter  # noqa: E402
from common.loader import Loader  # noqa: E402
from common.models import resolve  # noqa: E402
from common.report import print_table  # noqa: E402

TFLOP = 39.0  # of one image at 512 pixels, counted in tests/test_realfake.py


def full_size(device, dtype):
    """Stable Diffusion 1.5 without text encoder, random weights; the cost does not depend on them."""
    with torch.device(device):
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = diffusers.AutoencoderKL(
            sample_size=512, block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae, None, None, unet.to(dtype), scheduler, None, None, requires_safety_checker=False
    ).to(device)
    for part in (pipe.unet, pipe.vae):
        part.requires_grad_(False).eval().to(memory_format=torch.channels_last)
    return pipe


def our_way(args, pipe, unet, pictures, h, folder):
    """Stage generate: VAE, UniPC, decoding, PNGs behind the model's back"""
    batches = chunks(range(len(pictures)), args.gen_micro_batch)
    size = (args.gen_resolution, args.gen_resolution)
    stream = Loader(pictures, lambda image: pil_to_tensor(image.resize(size)), h.device, args.workers)(batches)
    with ImageWriter() as writer:
        for rows, x in zip(batches, stream, strict=True):
            posterior = rf.posterior_of(args, pipe, x)
            for i, image in zip(rows, rf.sample_versions(args, pipe, unet, posterior, h, list(rows)), strict=True):
                writer.save(folder / f"{i}.png", image)


def official_way(args, pipe, pictures, h, folder, batch):
    """A stock pipeline with UniPC, file after file"""
    stock = diffusers.StableDiffusionImg2ImgPipeline(
        pipe.vae, None, None, pipe.unet, rf.make_unipc(pipe.scheduler), None, None, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    if pipe.device.type == "cuda":
        stock.enable_model_cpu_offload()
    negative, positive = h[:1], h[-1:]
    for rows in chunks(list(range(len(pictures))), batch):
        images = stock(
            image=[pictures[i].resize((args.gen_resolution,) * 2) for i in rows],
            prompt_embeds=positive.expand(len(rows), -1, -1), negative_prompt_embeds=negative.expand(len(rows), -1, -1),
            strength=args.i2i_strength, num_inference_steps=args.gen_steps, guidance_scale=args.gen_guidance,
            generator=[torch.Generator().manual_seed(i) for i in rows],
        ).images  # fmt: skip
        for i, image in zip(rows, images, strict=True):
            image.save(folder / f"{i}.jpg")


def seconds_of(way, *what):
    """Wall-clock seconds of one call that writes into a folder of its own"""
    with tempfile.TemporaryDirectory() as folder:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        way(*what, Path(folder))
        return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="Stable Diffusion 1.5's sizes instead of the tiny world")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=200, help="images of each row")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 25, 50, 100], help="micro-batches to try")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile, after one batch of warm-up")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, for the share of it (--full)")
    asked = parser.parse_args()
    device, n = torch.device(asked.device), asked.images
    bf16 = asked.full and device.type == "cuda"
    flags = dict(precision="bf16" if bf16 else "fp32", gen_steps=30, gen_resolution=512 if asked.full else 32)
    dtype = torch.bfloat16 if bf16 else torch.float32
    pipe = full_size(device, dtype) if asked.full else load_pipeline(resolve("tiny", "generator"), device, "fp32")
    side, width = (256, 768) if asked.full else (32, pipe.text_encoder.config.hidden_size)
    noise = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    pictures = [Image.fromarray(x) for x in noise]
    tokens = 77 if asked.full else pipe.tokenizer.model_max_length

    rows, ways = [], [(False, b) for b in asked.batches] + [(True, b) for b in asked.batches if asked.compile]
    for compiled, b in ways:
        args = rf.Args(**{**rf.PRESETS["digits"], **flags, "gen_micro_batch": b})
        h = torch.randn(2 * b, tokens, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        unet = torch.compile(pipe.unet) if compiled else pipe.unet
        seconds_of(lambda f, a=args, u=unet, h=h: our_way(a, pipe, u, pictures[: a.gen_micro_batch], h, f))
        wall = seconds_of(lambda f, a=args, u=unet, h=h: our_way(a, pipe, u, pictures, h, f))
        rows.append([f"realfake.py, micro-batch {b}" + ", compiled" * compiled, n / wall])
    args = rf.Args(**{**rf.PRESETS["digits"], **flags})
    if bf16:
        pipe.vae.to(dtype)
    seconds_of(lambda f: official_way(args, pipe, pictures[:24], h, f, 24))
    loop = n / seconds_of(lambda f: official_way(args, pipe, pictures, h, f, 24))
    rows.append(["img2img loop, batches of 24", loop])
    table = [[name, f"{rate:.2f}", f"{rate / loop:.2f}"] for name, rate in rows]
    header = ["22 UniPC steps, guidance 2", "images/s", "ratio"]
    if asked.full and asked.peak:
        header.append("share of peak")
        table = [
            [*line, f"{100 * rate * TFLOP / asked.peak:.0f} %"] for line, (_, rate) in zip(table, rows, strict=True)
        ]
    print(f"{asked.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {flags['precision']}")
    print_table(header, table)


if __name__ == "__main__":
    main()
