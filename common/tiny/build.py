"""The build: stages in order, each closed by a marker in the work folder; then the figures and the model card."""

import argparse
import json
import os
import time
from pathlib import Path

import torch

from common import tiny
from common.tiny.captioner import train_captioner
from common.tiny.card import model_card, save_grid
from common.tiny.clip import train_clip
from common.tiny.k2t import train_k2t
from common.tiny.measure import TARGETS, measure_captioner, measure_clip, measure_k2t, measure_sd, measure_vae
from common.tiny.tokenizer import make_tokenizer
from common.tiny.training import STEPS, Job, corpus_size, write_atomic, write_json
from common.tiny.unet import train_unet
from common.tiny.vae import train_vae


def measure(job):
    """Write quality.json, samples.jpg and the model card README.md beside the weights. -> dict of the figures"""
    figures = {}
    for part in (measure_vae, measure_clip, measure_k2t, measure_captioner):
        figures |= part(job.out)
        print(f"{part.__name__}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)
    result, samples = measure_sd(job.out, job.device)
    figures |= result
    write_atomic(job.out / "samples.jpg", lambda path: save_grid(samples, torch.arange(len(samples)) % 10, path))
    markers = {name: job.work / "stages" / f"{name}.json" for name in STAGES if name != "measure"}
    notes = {name: json.loads(file.read_text()) for name, file in markers.items() if file.exists()}
    build = {name: {k: v for k, v in note.items() if k != "curve"} for name, note in notes.items()}
    quality = {"figures": figures, "seed": job.seed, "budget_scale": job.scale, "build": build, "targets": TARGETS}
    write_json(job.out / "quality.json", quality)
    write_atomic(job.out / "README.md", lambda path: path.write_text(model_card(quality)))
    missed = [k for k, target in TARGETS.items() if figures[k] < target]
    print(json.dumps(figures, indent=1), f"below target: {missed or 'none'}", sep="\n", flush=True)
    return figures


STAGES = {  # name -> function, file in the output folder that must exist for the stage to count as done
    "tokenizer": (make_tokenizer, "clip/bpe.txt.gz"),
    "vae": (train_vae, "sd/vae/diffusion_pytorch_model.safetensors"),
    "clip": (train_clip, "clip_hf/model.safetensors"),
    "unet": (train_unet, "sd/model_index.json"),
    "k2t": (train_k2t, "k2t/tokenizer.json"),
    "captioner": (train_captioner, "captioner/processor_config.json"),
    "measure": (measure, "README.md"),
}


def build(job, stages):
    """Run the stages that are not done yet, in order. Raises SystemExit when the work folder holds another recipe."""
    recipe = {"seed": job.seed, "scale": job.scale, "steps": STEPS, "corpus": corpus_size(job.scale)}
    file = job.work / "recipe.json"
    if file.exists() and json.loads(file.read_text()) != recipe:
        raise SystemExit(f"error: {job.work} holds another recipe ({file.read_text()}); choose another --work-dir")
    write_json(file, recipe)
    for i, (name, (stage, product)) in enumerate(STAGES.items(), 1):
        marker = job.work / "stages" / f"{name}.json"
        if name not in stages or (marker.exists() and (job.out / product).exists()):
            print(f"[{i}/{len(STAGES)}] {name}: {'done, skipped' if name in stages else 'not asked for'}", flush=True)
            continue
        for earlier, (_, needed) in list(STAGES.items())[: i - 1]:
            if not (job.out / needed).exists() and (name == "measure" or earlier in NEEDS.get(name, ())):
                raise SystemExit(f"error: stage {name} needs {job.out / needed}; run --stages {earlier} first")
        print(f"[{i}/{len(STAGES)}] {name}", flush=True)
        begun = time.monotonic()
        notes = stage(job) or {}
        write_json(marker, {"seconds": round(time.monotonic() - begun), **notes})


NEEDS = {"clip": ["tokenizer"], "unet": ["tokenizer", "vae", "clip"], "captioner": ["tokenizer", "clip"]}


def main():
    """Command line of the builder; see --help."""
    parser = argparse.ArgumentParser("python -m common.tiny", description=tiny.__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=tiny.WEIGHTS, help="folder of the finished models")
    parser.add_argument("--work-dir", type=Path, help="checkpoints; default ~/.cache/cleansynth/tiny/<seed>-<scale>")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="the shipped weights have seed 0")
    parser.add_argument("--budget-scale", type=float, default=1.0, help="share of the training steps, for rehearsals")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="run only these")
    args = parser.parse_args()
    if not args.budget_scale > 0:
        parser.error(f"--budget-scale is {args.budget_scale}; give a number above 0, 1 is the full build")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here; use --device cpu")
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; a lookup would only wait for a time-out
    work = args.work_dir or Path.home() / ".cache" / "cleansynth" / "tiny" / f"{args.seed}-{args.budget_scale:g}"
    job = Job(args.out.resolve(), work.resolve(), args.device, args.seed, args.budget_scale)
    print(f"tiny world -> {job.out}; checkpoints in {job.work}; stop and repeat the command at any time", flush=True)
    try:
        build(job, args.stages)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command continues") from None
