"""One training loop for all models of the tiny world, the pictures it reads, and how models are written.

A step's randomness comes from (seed, name, step), so a killed run continues with exactly the batches it would have
seen.
"""

import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from common.tiny.glyphs import pictures, seeded

CORPUS = 60_000
STEPS = {"vae": 2200, "clip": 3600, "unet": 2400, "polish": 1000, "refine": 2400, "k2t": 4000, "captioner": 2000}
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of one weight


@dataclass(frozen=True)
class Job:
    """What a stage needs to know: where files go, the device, the seed and the share of the full budget."""

    out: Path
    work: Path
    device: str = "cpu"
    seed: int = 0
    scale: float = 1.0

    def steps(self, name):
        return max(20, round(STEPS[name] * self.scale))


def write_atomic(path, write):
    """Call write(temporary path), flush to disk, rename to path: a kill leaves the old file or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    temporary.chmod(0o644)  # safetensors creates files that only their owner can read
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path, data):
    """data as indented JSON, written atomically."""
    write_atomic(path, lambda p: p.write_text(json.dumps(data, indent=1) + "\n"))


def fit(job, name, module, loss_at, lr, weight_decay=0.01, ema=0.998, every=60.0):
    """Train module for job.steps(name) steps, leave the averaged weights in it, in eval mode -> dict of notes.

    loss_at(step, g) -> scalar loss; g is a CPU generator of that step alone. AdamW, linear warm-up, cosine decay to
    zero, gradient norm clipped to 1, exponential moving average of the weights. Every `every` seconds the weights,
    averages and moments go to work/<name>.safetensors, from which the same call continues bit for bit.
    Raises FloatingPointError when the loss is no longer finite.
    """
    steps, file = job.steps(name), job.work / f"{name}.safetensors"
    module.to(job.device).train()
    weights = {k: p for k, p in module.named_parameters() if p.requires_grad}
    average = {k: p.detach().clone() for k, p in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)

    start, seconds, log, begun = 0, 0.0, [], time.monotonic()
    if file.exists():
        with safe_open(file, "pt", device=job.device) as saved:
            start, seconds, log = (json.loads(saved.metadata()[k]) for k in ("step", "seconds", "log"))
            with torch.no_grad():
                for k, p in weights.items():
                    p.copy_(saved.get_tensor(f"weight/{k}"))
                    average[k].copy_(saved.get_tensor(f"average/{k}"))
                    if f"step/{k}" in saved.keys():  # absent for weights that have had no gradient yet
                        state = {m: saved.get_tensor(f"{m}/{k}") for m in MOMENTS}
                        # Trap: the fused kernel reads weight and moments in memory order; both must be laid out alike.
                        like = torch.zeros_like(p)
                        optimizer.state[p] = {m: like.clone().copy_(t) if t.ndim else t for m, t in state.items()}

    def save(step):
        tensors = {}
        for k, p in weights.items():
            tensors |= {f"weight/{k}": p.detach(), f"average/{k}": average[k]}
            tensors |= {f"{m}/{k}": optimizer.state[p][m] for m in MOMENTS if p in optimizer.state}
        tensors = {k: t.contiguous().cpu() for k, t in tensors.items()}
        notes = {"step": step, "seconds": seconds + time.monotonic() - begun, "log": log}
        notes = {k: json.dumps(v) for k, v in notes.items()}
        write_atomic(file, lambda path: save_file(tensors, path, notes))

    running, last_saved = None, time.monotonic()
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, unit="step", mininterval=2)
    for step in bar:
        rate = min(1, (step + 1) / min(200, steps / 5)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * rate
        loss = loss_at(step, seeded(job.seed, name, step))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{name}: the loss is {loss.item()} at step {step}; delete {file}, lower the lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        # The average forgets faster at the start, or it would carry the random weights for long.
        keep = min(ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in weights.values()], 1 - keep)

        running = loss.item() if running is None else 0.97 * running + 0.03 * loss.item()
        if (step + 1) % max(1, steps // 50) == 0:
            log.append([step + 1, round(running, 5)])
            bar.set_postfix(loss=f"{running:.4f}")
        if time.monotonic() - last_saved > every or step + 1 == steps:
            save(step + 1)
            last_saved = time.monotonic()

    with torch.no_grad():
        for k, p in weights.items():
            p.copy_(average[k])
    module.eval().requires_grad_(False)
    with safe_open(file, "pt") as saved:
        seconds = json.loads(saved.metadata()["seconds"])
    return {"steps": steps, "seconds": round(seconds), "loss": log[-1][1], "curve": log}


def corpus_size(scale):
    """Pictures to train on: a rehearsal draws fewer."""
    return max(2000, round(CORPUS * min(1, scale * 2)))


def corpus(job):
    """The training pictures and attributes on the device; drawn once, then read from work/corpus.safetensors."""
    file, n = job.work / "corpus.safetensors", corpus_size(job.scale)
    if not file.exists():
        parts, starts = [], range(0, n, 2000)
        for start in tqdm(starts, desc="corpus", unit="2000 pictures"):
            parts.append(pictures(min(2000, n - start), f"{job.seed}/{start}"))
        data = {"images": torch.cat([p[0] for p in parts]), "attributes": torch.cat([p[1] for p in parts])}
        write_atomic(file, lambda path: save_file(data, path))
    with safe_open(file, "pt", device=job.device) as saved:
        return saved.get_tensor("images"), saved.get_tensor("attributes")


def batch(n, size, g, device):
    """size random indices below n, from the CPU generator g, on the device."""
    return torch.randint(0, n, (size,), generator=g).to(device)


def half_folder(model, folder):
    """save_pretrained in fp16, with a config that says float32 so that a plain from_pretrained computes in float32."""
    with tempfile.TemporaryDirectory() as temporary:
        model.half().save_pretrained(temporary)
        model.float()
        for file in Path(temporary).iterdir():
            data = file.read_bytes()
            if file.name == "config.json" and "dtype" in (config := json.loads(data)):
                data = (json.dumps(config | {"dtype": "float32"}, indent=2) + "\n").encode()
            write_atomic(Path(folder) / file.name, lambda path, data=data: path.write_bytes(data))
