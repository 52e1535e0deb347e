"""The work of realfake.py, stage by stage. Reads no data set and no weights."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from common import captions, costs, features
from common.images import PIXEL_BYTES
from common.jobs import dealt
from common.plan import SQUARE, Classifier, Generator, Work, dataset_needs, processes, sizes
from common.posteriors import KEPT_AT_ONCE

# BLIP-2 OPT-2.7B, an image and 16 tokens: ViT-g 0.52 (224 pixels, 257 tokens, 1.0 G numbers), Q-Former 0.01, OPT
# 2 x 2.65 G numbers x (32 + 16 tokens) = 0.25. Counted from its config, not on meta tensors.
CAPTION_TFLOP, CAPTIONER_NUMBERS = 0.78, 3.74e9


def images_of(args: Any) -> int:
    """Real images that are replaced."""
    classes, train, _, _ = sizes(args.dataset, args.data_dir)
    return train if args.real_per_class is None else min(train, classes * args.real_per_class)


def drawing(args: Any, sd: Generator, name: str, some: Sequence[Any], kept_steps: Callable) -> Work:
    """The work of drawing these sets; micro-batches that are not full cost as much as full ones."""
    side, micro = args.gen_save_size or args.gen_resolution, args.gen_micro_batch
    passes, decoded, encoded = 0, 0, 0
    for v in some:
        m = math.ceil(len(v.rows) / micro) * micro
        steps = args.gen_steps if v.prior == "noise" else kept_steps(args.i2i_strength, args.gen_steps)
        passes, decoded = passes + 2 * steps * m * v.versions, decoded + m * v.versions
        encoded += m * (v.prior == "image")
    n_images = sum(len(v.rows) * v.versions for v in some)
    return sd.work(
        "generate", name, micro, encoded=encoded, evaluated=passes, decoded=decoded, loads=encoded, load_size=sd.size,
        prompts=encoded, images=n_images, flag="--gen-micro-batch",
        jobs=sum(math.ceil(len(v.rows) / micro) for v in some), disk=n_images * PIXEL_BYTES[args.gen_format] * side**2,
    )  # fmt: skip


def networks(
    args: Any, n: int, rows: dict[str, tuple], row_length: Callable, classes: int, n_test: int, clip: Classifier
) -> list[Work]:
    """Of the table's rows, of the attack, and what is scored. clip: of the row without training."""
    works = []
    net = Classifier(args.net_model, args.precision, classes, args.net_size)
    units, stored = math.ceil(args.net_batch / args.net_micro_batch), args.gen_save_size or args.gen_resolution
    more = dict(batch=args.net_micro_batch, load_size=stored, flag="--net-micro-batch", units=units)
    more["load_format"] = args.gen_format
    if "train" in args.stages:
        lengths = {row: row_length(args, *of[1:]) for row, of in rows.items()}
        each = [length for length in lengths.values() for _ in range(args.clf_seeds)]
        for row, length in lengths.items():
            seen = args.clf_seeds * args.net_epochs * n * length
            work = net.work(
                "train", f"{row}, {args.clf_seeds} x {args.net_epochs} epochs", trained=seen, loads=seen,
                jobs=each, **more,
            )  # fmt: skip
            works.append(work)
    if "attack" in args.stages and args.mia_models:
        seen = args.mia_models * args.net_epochs * (n // 2) * 2
        scored = 2 * args.mia_models * n
        jobs = 2 * args.mia_models
        what = f"{jobs} networks"
        works.append(net.work("attack", what, trained=seen, scored=scored, loads=seen, jobs=jobs, **more))
    if "evaluate" in args.stages:
        jobs = len(rows) * args.clf_seeds
        more |= dict(units=1, flag="")
        works.append(net.work("evaluate", "test split", scored=n_test * jobs, loads=n_test * jobs, jobs=jobs, **more))
        works.append(clip.work("evaluate", "zero-shot", 256, scored=n_test, loads=n_test, jobs=n_test))
    return works


def plan(
    args: Any, n: int, sets: dict[str, Any], rows: dict[str, tuple], kept_steps: Callable, tuning_steps: Callable,
    kept_crops: Callable, row_length: Callable,
) -> tuple[list[Work], list[str]]:  # fmt: skip
    """-> the work of the planned stages, what must be there. n: real images; sets, rows: of the script."""
    classes, _, _, n_test = sizes(args.dataset, args.data_dir)
    sd, works = Generator(args.sd_model, args.gen_resolution, args.precision), []
    tokens, drawn = any(v.token != "none" for v in sets.values()), sum(len(v.rows) * v.versions for v in sets.values())
    written = any(v.caption for v in sets.values()) and args.captions_file is None
    clip = Classifier(args.token_clip, args.precision)

    if "caption" in args.stages and written and args.captioner != "tiny":
        works.append(Work(
            "caption", "BLIP-2", n * CAPTION_TFLOP, n, loads=n, gpu=2 * CAPTIONER_NUMBERS, precision=args.precision,
            jobs=math.ceil(n / captions.PART),
        ))  # fmt: skip
    if "embed" in args.stages and tokens:
        works.append(clip.work("embed", "CLIP", 64, scored=n, loads=n, jobs=math.ceil(n / features.PART)))
    if "finetune" in args.stages:
        adapters = {v.adapter: len(v.rows) for v in reversed(list(sets.values())) if v.adapter}
        steps = [tuning_steps(args, m)[0] for m in adapters.values()]
        seen = sum(steps) * args.sd_batch
        units = args.sd_batch // args.sd_micro_batch
        deal = dealt(steps, units, processes(args))
        # The graphs of all its micro-batches of a step stay until the sum of the residuals is known.
        held = args.sd_batch if any(deal.alone) else math.ceil(units / deal.size) * args.sd_micro_batch
        tuned = len(set().union(*(v.rows for v in sets.values() if v.adapter)))
        views = tuned * kept_crops(args, tuned, seen, sd.latent(), args.dataset in SQUARE) * (1 + args.flip)
        ram = views * math.prod(sd.latent()) * (4 if args.precision == "bf16" else 8)  # mean and log variance
        pictures = dict(encoded=views or seen, loads=views or seen, load_size=sd.size)
        if views:
            jobs, pictures = math.ceil(views / KEPT_AT_ONCE), {}
            more = dict(encoded=views, loads=views, load_size=sd.size, jobs=jobs, ram=ram)
            works.append(sd.work("finetune", "VAE posteriors", KEPT_AT_ONCE, precision=args.precision, **more))
        works.append(sd.work(
            "finetune", f"{len(adapters)} x LoRA", held, tuned=seen, jobs=steps, units=units, flag="--sd-micro-batch",
            text_tuned=False, ram=ram, **pictures,
        ))  # fmt: skip
    if "generate" in args.stages:
        others = [v for v in sets.values() if v.folder != "images"]
        works.append(drawing(args, sd, "images/", [sets["images"]], kept_steps))
        works += [drawing(args, sd, "others", others, kept_steps)] if others else []
    works += networks(args, n, rows, row_length, classes, n_test, clip)
    needs = [sd.needs(), clip.needs(), dataset_needs(args)]
    if written and not costs.local(args.captioner):
        needs.append(f"{args.captioner}, about 15 GB, downloaded unless it is in the cache")
    assert drawn == sum(w.images for w in works) or "generate" not in args.stages
    return works, needs
