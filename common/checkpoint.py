"""Training state in one safetensors file, so that a killed training goes on with the same bits.

Random numbers need no place in it: every script draws them from generators seeded by (seed, step).
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from common.files import save_tensors
from common.launch import UserError


def save_training(
    path: Path,
    weights: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    extra: Any = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write weights, optimizer state, the number of finished steps, JSON-able `extra` and further tensors, atomically.

    weights: {name: tensor}, all that the training changes (parameters, and buffers such as BatchNorm's).
    """
    state = optimizer.state_dict()["state"]
    flat = {f"optimizer.{i}.{k}": v for i, entry in state.items() for k, v in entry.items()}
    flat |= {f"weights.{k}": v for k, v in weights.items()} | {f"tensors.{k}": v for k, v in (tensors or {}).items()}
    flat = {k: v.detach().cpu().contiguous() for k, v in flat.items()}
    save_tensors(path, flat, json.dumps({"step": step, "extra": extra}))


def load_training(
    path: Path, weights: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, Any, dict[str, torch.Tensor]]:
    """Copy a saved state into `weights` (in place) and `optimizer`. -> (finished steps, extra, further tensors)

    (0, None, {}) when there is no file. Raises UserError when the file belongs to another model.
    """
    path = Path(path)
    if not path.exists():
        return 0, None, {}
    with safe_open(path, "pt") as f:
        meta, flat = json.loads(f.metadata()["cleansynth"]), {k: f.get_tensor(k) for k in f.keys()}
    saved = {k.removeprefix("weights."): v for k, v in flat.items() if k.startswith("weights.")}
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in weights.items()}:
        raise UserError(f"{path}: this checkpoint does not fit the model; delete it or use a new --output-dir")
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(saved[name])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in flat.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".", 2)
            state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    tensors = {k.removeprefix("tensors."): v for k, v in flat.items() if k.startswith("tensors.")}
    return meta["step"], meta["extra"], tensors
