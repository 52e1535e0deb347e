"""CLIP through open_clip: load by name or folder, encode images and texts in batches, zero-shot weights."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common import models, openclip
from common.files import save_tensors, write_bytes, write_json

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


def encode_images(clip: Clip, images: Sequence | Tensor, batch: int = 256, workers: int = 4) -> Tensor:
    """Image features [N, D] float32 on the model's device, not normalised, in the order given.

    `images` is a uint8 tensor [N, 3, H, W], or anything with len() whose [i] is a PIL image; each goes through
    clip.preprocess in a pool of `workers` threads that stays one batch ahead of the model. An error of `images[i]`
    (an unreadable file) is raised here unchanged.
    """
    if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3):
        raise ValueError(f"expected uint8 images [N, 3, H, W], got {images.dtype} {list(images.shape)}")
    features = []
    with _encoding(clip):
        for pixels in _preprocessed(clip, images, batch, workers):
            features.append(clip.model.encode_image(pixels.to(clip.device, clip.dtype)).float())
    if not features:
        return torch.zeros(0, clip.config["embed_dim"], device=clip.device)
    return torch.cat(features)


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


def _preprocessed(clip: Clip, images: Sequence | Tensor, batch: int, workers: int) -> Iterator[Tensor]:
    """Batches [B, 3, S, S] float32 of preprocessed images, in order."""
    if isinstance(images, Tensor):
        if tuple(images.shape[2:]) == (clip.image_size, clip.image_size):
            # Nothing to resize or crop: the arithmetic of ToTensor and Normalize, on the device, from a byte per value.
            mean, std = (torch.tensor(v, device=clip.device).view(1, 3, 1, 1) for v in (clip.mean, clip.std))
            for start in range(0, len(images), batch):
                yield images[start : start + batch].to(clip.device).float().div(255).sub_(mean).div_(std)
            return
        images = _PilView(images)

    def load(i: int) -> Tensor:
        return clip.preprocess(images[i])

    pool = ThreadPoolExecutor(max_workers=workers)
    try:
        indices = iter(range(len(images)))
        waiting = deque(pool.submit(load, i) for i in islice(indices, 2 * batch))
        while waiting:
            pixels = torch.stack([waiting.popleft().result() for _ in range(min(batch, len(waiting)))])
            waiting.extend(pool.submit(load, i) for i in islice(indices, batch))
            yield pixels
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _PilView:
    """A uint8 tensor [N, 3, H, W] seen as a sequence of PIL images, so that both are resized by the same code."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        from PIL import Image

        return Image.fromarray(self.images[i].permute(1, 2, 0).cpu().numpy())
