"""CLIP through open_clip: load by name or folder, encode images and texts in batches, zero-shot weights."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import Normalize, ToTensor, v2

from common import models, openclip
from common.files import chunks, save_tensors, write_bytes, write_json
from common.loader import Loader, normalised

WEIGHTS_FILE = "open_clip_model.safetensors"


@dataclass
class Clip:
    """A loaded CLIP in eval mode and what belongs to it.

    `preprocess` is the evaluation transform: PIL image of any size -> float tensor [3, S, S], shorter side resized to
    S (bicubic, antialiased), centre crop, normalised by `mean` and `std`. `tokenize` maps a list of N texts to a
    LongTensor [N, context]; longer texts are cut. `config` is open_clip's model_cfg, what save_clip writes again.
    """

    model: torch.nn.Module
    preprocess: Callable[..., Tensor]
    tokenize: Callable[[list[str]], Tensor]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    name: str
    config: dict
    preprocess_config: dict = field(default_factory=dict)
    tokenizer_files: tuple[Path, ...] = ()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which images are given to the model."""
        return next(self.model.visual.parameters()).dtype


def load_clip(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Clip:
    """Load a CLIP: `tiny`, `arch/tag` (ViT-B-16-quickgelu/openai), `hf-hub:org/name`, or a local folder.

    A local folder holds open_clip_config.json, safetensors weights and, if its vocabulary is its own, a gzipped BPE
    file. Weights are read in float32 and then cast; `logit_scale` stays float32. Raises UserError for a name that
    common.models.resolve refuses, and for weights or a tokenizer that do not fit the configuration.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    arch, config, preprocess, file = openclip.files(models.resolve(name, "clip"))
    model = openclip.build(arch, preprocess, file)
    logit_scale = model.logit_scale.data.clone()
    model = model.to(device=device, dtype=dtype).eval()
    model.logit_scale.data = logit_scale.to(device)

    chosen = open_clip.get_model_preprocess_cfg(model)
    size = model.visual.image_size
    return Clip(
        model=model,
        preprocess=image_transform_v2(PreprocessCfg(**chosen), is_train=False),
        tokenize=openclip.tokenizer(arch, config),
        image_size=size[0] if isinstance(size, (tuple, list)) else size,
        mean=tuple(chosen["mean"]),
        std=tuple(chosen["std"]),
        name=name,
        config=config,
        preprocess_config={k: chosen[k] for k in ("mean", "std", "interpolation", "resize_mode")},
        tokenizer_files=openclip.bpe_files(Path(arch.removeprefix("local-dir:"))),
    )


def save_clip(
    folder: str | Path,
    state_dict: dict[str, Tensor],
    config: dict,
    tokenizer_files: Sequence[str | Path] = (),
    preprocess: dict | None = None,
) -> None:
    """Write a folder that load_clip and open_clip's `local-dir:` read again, with the same bits.

    `state_dict` is that of the open_clip model, stored in its own dtypes; `config` the model_cfg; `tokenizer_files` the
    gzipped BPE file of a model with its own vocabulary (copied); `preprocess` may give mean, std, interpolation and
    resize_mode (default: OpenAI's). The configuration comes last: a folder that has one is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in map(Path, tokenizer_files):
        if file.resolve() != (folder / file.name).resolve():
            write_bytes(folder / file.name, file.read_bytes())
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    save_tensors(folder / WEIGHTS_FILE, tensors)
    write_json(folder / openclip.CONFIG_FILE, {"model_cfg": config, "preprocess_cfg": preprocess or {}})


def encode_texts(clip: Clip, texts: Sequence[str], batch: int = 256) -> Tensor:
    """Text features [N, D] float32 on the model's device, not normalised, in the order given.

    Each distinct text is encoded once, whatever the number of its copies.
    """
    distinct = list(dict.fromkeys(texts))
    position = {text: i for i, text in enumerate(distinct)}
    features = []
    with _encoding(clip):
        for start in range(0, len(distinct), batch):
            tokens = clip.tokenize(distinct[start : start + batch]).to(clip.device)
            features.append(clip.model.encode_text(tokens).float())
    if not features:
        return torch.zeros(0, clip.config["embed_dim"], device=clip.device)
    return torch.cat(features)[[position[text] for text in texts]]


def encode_images(clip: Clip, images: Sequence | Tensor, batch: int = 256, workers: int = 0) -> Tensor:
    """Image features [N, D] float32 on the model's device, not normalised, in the order given.

    `images` is a uint8 tensor [N, 3, H, W], or anything with len() whose [i] is a PIL image: `workers` processes read
    them and do what clip.preprocess does before it makes floats. Raises the UserError of a file that cannot be read.
    """
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected uint8 images [N, 3, H, W], got {images.dtype} {list(images.shape)}")
    if isinstance(images, Tensor) and tuple(images.shape[2:]) == (clip.image_size, clip.image_size):
        stream = (x.to(clip.device) for x in images.split(batch))  # nothing to resize or crop
    else:
        seen = _PilView(images) if isinstance(images, Tensor) else images
        stream = clip_loader([clip], seen, clip.device, workers)(chunks(range(len(images)), batch))
    features = [torch.zeros(0, clip.config["embed_dim"], device=clip.device)]
    with _encoding(clip):
        for x in stream:
            x = normalised(x, clip.mean, clip.std).to(clip.dtype)
            features.append(clip.model.encode_image(x).float())
    return torch.cat(features)


def clip_loader(clips: Sequence[Clip], images: Any, device: torch.device, workers: int) -> Loader:
    """Loader of images for these CLIPs, a view for each: what their own transforms do before they make floats."""
    steps = [[t for t in c.preprocess.transforms if not isinstance(t, (ToTensor, Normalize))] for c in clips]
    views = [partial(clip_view, steps=s) for s in steps]
    return Loader(
        images, views[0] if len(views) == 1 else lambda image: tuple(v(image) for v in views), device, workers
    )


def clip_view(image: Image.Image, steps: Sequence[Callable]) -> Tensor:
    """PIL image -> uint8 [3, S, S] as a CLIP sees it."""
    for step in steps:
        image = step(image)
    return v2.functional.pil_to_tensor(image)


def zero_shot_weights(clip: Clip, class_names: Sequence[str], templates: Sequence[str], batch: int = 256) -> Tensor:
    """Zero-shot classifier [C, D] float32, rows of length 1: logits are normalised image features @ weights.T.

    Each template has one `{}` for the class name. A class is the mean over the templates of its normalised text
    features, normalised again.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"a template needs one {{}} for the class name: {template!r}")
    if not class_names or not templates:
        raise ValueError("zero-shot weights need at least one class and one template")
    texts = [template.replace("{}", name) for name in class_names for template in templates]
    features = F.normalize(encode_texts(clip, texts, batch), dim=-1)  # [C * T, D]
    return F.normalize(features.view(len(class_names), len(templates), -1).mean(1), dim=-1)


# ---------------------------------------------------------------------------------------
# encoding


@contextmanager
def _encoding(clip: Clip):
    """No gradients and eval mode (a caller may be training the model with dropout), then the mode as it was."""
    training = clip.model.training
    clip.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        clip.model.train(training)


class _PilView:
    """A uint8 tensor [N, 3, H, W] seen as a sequence of PIL images, so that both are resized by the same code."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return Image.fromarray(self.images[i].permute(1, 2, 0).cpu().numpy())
