"""The work of datadream.py, stage by stage. Reads no data set and no weights."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from common.images import PIXEL_BYTES
from common.plan import SQUARE, Classifier, Generator, Work, dataset_needs, sizes
from common.posteriors import KEPT_AT_ONCE


def plan(
    args: Any, runs: Sequence[tuple[str, int]], folders: Sequence[str], epoch_entries: Callable, cache_bytes: float
) -> tuple[list[Work], list[str]]:
    """-> the work of the planned stages, what must be there. runs: (row, seed) of each classifier, folders: of the
    images to draw, cache_bytes: the script's bound for a process."""
    g, (n, n_train, n_val, n_test) = args.gen_images_per_class, sizes(args.dataset, args.data_dir)
    n_val = n_val or int(args.val_images * (n_train if args.val_images < 1 else n))
    sd, shots, works = Generator(args.sd_model, args.sd_resolution, args.precision), n * args.shots, []

    if "finetune" in args.stages:
        jobs, rows = (1, shots) if args.mode == "dset" else (n, args.shots)
        tuned, units = args.sd_epochs * shots, math.ceil(min(args.sd_batch, rows) / args.sd_micro_batch)
        crops = 1 if args.dataset in SQUARE else args.sd_cached_crops
        cached = 0 < 8 * math.prod(sd.latent()) * rows * crops <= cache_bytes
        b = KEPT_AT_ONCE if cached else args.sd_micro_batch
        encoded, parts = (shots * crops, max(jobs, shots * crops // b)) if cached else (tuned, units)
        more = dict(jobs=jobs, flag="--sd-micro-batch", ram=cache_bytes * cached)
        works.append(
            sd.work("finetune", "VAE", b, encoded=encoded, loads=encoded, load_size=sd.size, units=parts, **more)
        )
        disk = jobs * args.sd_rank * 4 * 395_904  # numbers of a LoRA of rank 1 on SD 2.1-base
        works.append(
            sd.work("finetune", f"{jobs} x LoRA", args.sd_micro_batch, tuned=tuned, disk=disk, units=units, **more)
        )

    if "generate" in args.stages:
        micro, side = args.gen_micro_batch, args.gen_save_size or args.sd_resolution
        for folder in folders:
            # The last micro-batch costs as much as a full one.
            jobs = n * math.ceil(g / micro) if (args.mode, folder) == ("cls", "images") else math.ceil(n * g / micro)
            works.append(sd.work(
                "generate", f"{folder}/", micro, jobs=jobs, flag="--gen-micro-batch", images=n * g,
                evaluated=2 * jobs * micro * sd.evaluations(args.gen_sampler, args.gen_steps), decoded=jobs * micro,
                prompts=n * args.n_templates, disk=n * g * PIXEL_BYTES[args.gen_format] * side**2,
            ))  # fmt: skip

    clip, tests, seeds = args.clf_model == "clip", args.clf_report_test_selected, args.clf_seeds
    name = dict(name=args.clip_model) if clip else dict(name="resnet50", size=224, classes=n)
    clf, todo = Classifier(precision=args.precision, **name), runs
    more = dict(batch=args.clf_micro_batch, load_size=args.gen_save_size or args.sd_resolution)
    more["load_format"] = args.gen_format
    more |= dict(ram=min(2 * cache_bytes, 3 * clf.pixels() ** 2 * (n_val + n_test)))
    lengths = [epoch_entries(args, arm, n) for arm, _ in todo]
    for arm in dict.fromkeys(arm for arm, _ in todo) if "train" in args.stages else ():
        length = epoch_entries(args, arm, n)
        epochs, looks = seeds * args.clf_epochs, seeds * args.clf_evals
        works.append(clf.work(
            "train", f"{arm}, {seeds} x {args.clf_epochs} epochs", trained=epochs * length,
            scored=looks * n_val + (looks if tests else 2 * seeds) * n_test,  # test: at the best step and at the last
            texts_trained=epochs * math.ceil(length / args.clf_batch) * n * args.n_templates,
            texts=(2 * looks if tests else looks + 2 * seeds) * n * args.n_templates,
            loads=epochs * length + seeds * (n_val + n_test), flag="--clf-micro-batch",
            jobs=lengths, units=math.ceil(args.clf_batch / args.clf_micro_batch), **more,
        ))  # fmt: skip
    scored = (n_val + n_test) * (clip and "zero-shot" in args.arms and "train" in args.stages)
    scored += n_test * ("evaluate" in args.stages)
    if scored:
        works.append(clf.work("evaluate", "zero-shot, classifier/", scored=scored, loads=scored, jobs=n_test, **more))
    drawn = {"finetune", "generate"} & set(args.stages)
    return works, [*[sd.needs()] * bool(drawn), clf.needs(), dataset_needs(args)]
