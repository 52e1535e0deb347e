"""Seconds per stage and images per second of the miniature, and what the batched generator gains over the official way.

    python tests/benchmark.py              # 10 to 15 minutes on 2 cores
    python tests/benchmark.py --short      # few steps, for a look at the ratios

Not a test: it asserts no time. Machines are noisy, so quote the ratios, which come from one run, before the seconds.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import datadream as dd  # noqa: E402
from common import distributed, images, models  # noqa: E402
from common.diffusion import Adapter, encode_prompts, load_pipeline  # noqa: E402
from common.files import chunks  # noqa: E402
from common.report import print_table  # noqa: E402


def stages(folder, flags):
    """Run the script as a user does and read the seconds that it recorded itself."""
    command = [sys.executable, str(ROOT / "datadream.py"), "--output-dir", str(folder), *flags]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    result = json.loads((folder / "results.json").read_text())
    seconds = result["seconds"]
    steps = sum(1 for _ in (folder / "metrics.jsonl").open())
    rows = [[f"stage {name}", f"{value:.1f} s"] for name, value in seconds.items()]
    rows.append(["whole command, start-up included", f"{wall:.1f} s"])
    n_images = sum(result["images"].values())
    rows.append(["generation, end to end", f"{n_images / seconds['generate']:.1f} images/s"])
    trained = [m for m in (*result["metrics"].values(), *result["baselines"].values()) if m.get("updates")]
    updates = sum(m["updates"] * len(m["per_seed"]) for m in trained)
    args = json.loads((folder / "args.json").read_text())["args"]
    rate = updates * args["clf_batch"] / seconds["train"]
    rows.append(["classifier training, evaluation included", f"{rate:.0f} images/s"])
    assert steps
    return rows


def official_way(adapters, class_names, per_class, out, steps):
    """As the official script: a new pipeline for every class, batches of 10, one PNG after another."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    for file, name in zip(adapters, class_names, strict=True):
        pipe = StableDiffusionPipeline.from_pretrained(models.resolve("tiny", "generator"), safety_checker=None)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        pipe.set_progress_bar_config(disable=True)
        (out / name).mkdir(parents=True)
        for start in range(0, per_class, 10):
            n = min(10, per_class - start)
            images = pipe(
                [f"a photo of a {name}"] * n, num_inference_steps=steps, guidance_scale=2.0, height=32, width=32
            )
            for k, image in enumerate(images.images, start):
                image.save(out / name / f"{k}.png")


def our_way(adapters, class_names, per_class, out, steps):
    """As datadream.py: one pipeline, adapters folded in, full micro-batches, PNGs written behind the model's back."""
    flags = {**dd.PRESETS["digits"], "mode": "cls", "gen_steps": steps, "gen_images_per_class": per_class}
    args, dist = dd.Args(**flags), distributed.Dist(0, 0, 1, torch.device("cpu"))
    pipe = load_pipeline(models.resolve("tiny", "generator"), dist.device, "fp32")
    adapter = Adapter(pipe)
    for c, (file, name) in enumerate(zip(adapters, class_names, strict=True)):
        adapter.use(file)
        text = encode_prompts(pipe, ["", f"a photo of a {name}"])
        with images.ImageWriter() as writer:
            for batch in chunks(list(range(per_class)), args.gen_micro_batch):
                prompts = [text[f"a photo of a {name}"]] * len(batch)
                seeds = [dd.image_seed(args, c, k) for k in batch]
                for k, image in zip(batch, dd.sample(args, pipe, pipe.unet, prompts, text[""], seeds), strict=True):
                    writer.save(out / name / f"{k}.png", image)


def compare(folder, per_class, steps):
    """Both ways in turn, twice, over the ten adapters of a class-wise run; ratio of the better times."""
    flags = ["--mode", "cls", "--sd-epochs", "2", "--sd-warmup", "1", "--stages", "select", "finetune"]
    command = [sys.executable, str(ROOT / "datadream.py"), "--output-dir", str(folder / "cls"), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    adapters = sorted((folder / "cls" / "lora").glob("*/*.safetensors"))
    names = [a.parent.name.split("_", 1)[1] for a in adapters]
    times = {official_way: [], our_way: []}
    for turn in range(2):
        for way in times:
            start = time.perf_counter()
            way(adapters, names, per_class, folder / f"{way.__name__}{turn}", steps)
            times[way].append(time.perf_counter() - start)
    n = per_class * len(names)
    slow, fast = min(times[official_way]), min(times[our_way])
    return [
        [f"{len(names)} adapters, {per_class} images each, official way", f"{n / slow:.1f} images/s"],
        ["the same, datadream.py", f"{n / fast:.1f} images/s"],
        ["ratio", f"{slow / fast:.2f}"],
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few images and steps")
    short = parser.parse_args().short
    flags = "--gen-images-per-class 20 --clf-epochs 2 --clf-seeds 1 --sd-epochs 20".split() if short else []
    with tempfile.TemporaryDirectory() as folder:
        rows = stages(Path(folder) / "run", flags)
        rows += compare(Path(folder), 50, 5 if short else 15)  # 50: a full micro-batch, nothing is padded
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print_table(["figure", "value"], rows)


if __name__ == "__main__":
    main()
