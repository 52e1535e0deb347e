"""The work of synthetic_recognition.py, stage by stage. Reads no data set and no weights."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import costs
from common.images import PIXEL_BYTES
from common.plan import Classifier, Generator, Work, dataset_needs, sizes

# GLIDE, counted on its networks: a pass of the base without guidance, and the upsampler's 27; numbers of both.
GLIDE_BASE, GLIDE_UPSAMPLER, GLIDE_NUMBERS = 0.238, 27 * 1.281, 783e6
# T5-base: 110 M numbers in the decoder, about 20 tokens a sentence.
SENTENCE_TFLOP, WRITER_NUMBERS = 2 * 110e6 * 20 / 1e12, 223e6
# Seconds of a core, measured, for all views at 224 pixels of a picture that is decoded once: three with RandAugment,
# two with other colours and blur; the other recipes crop and mirror.
AUGMENT = {"deit": 6e-3, "moco": 6.3e-3}
GLIDE_HELD = 0.1e9  # bytes of activations for an image of the upsampler in float32; assumed
# Classes, training, validation and test images of the sets that are given as folders, by preset, until they are there.
FOLDERS = {
    "caltech256": (257, 15_420, 0, 15_187), "birdsnap": (500, 47_386, 0, 2_443), "cub": (200, 5_994, 0, 5_794),
    "imagenet-sketch": (1000, 0, 0, 50_889), "imagenet-r": (200, 0, 0, 30_000),
}  # fmt: skip


def plan(
    args: Any, lines: Sequence[tuple[Any, str, int]], sets: dict[str, int], rg_steps: Callable, run_indices: Callable,
    templates: Sequence[str], names: int | None = None, pairs: int = 0,
) -> tuple[list[Work], list[str]]:  # fmt: skip
    """-> the work of the planned stages, what must be there. lines: (Line, row, shots or images) to train; sets: images
    of each class; names: how many are drawn, None: the data set's; pairs: of images that are
    compared at once for Real Filtering; the rest is the script's."""
    there = args.dataset != "folder" or Path(args.data_dir or "", "test").is_dir()
    known = None if there else FOLDERS.get(args.preset)
    classes, n_train, _, n_test = known or sizes(args.dataset, args.data_dir)
    names, works, needs = names or classes, [], [dataset_needs(args)]
    if "le" in sets and "sentences" in args.stages and not args.sentence_model.endswith(".json"):
        tflop = SENTENCE_TFLOP * names * (args.sentences + 50)
        works.append(Work("sentences", "T5", tflop, names, jobs=names, gpu=4 * WRITER_NUMBERS, precision="fp32"))
        known = costs.local(args.sentence_model)
        needs.append("" if known else f"{args.sentence_model}, about 0.9 GB, downloaded unless it is in the cache")
    if "generate" in args.stages:
        for name, n in sets.items():
            r = rg_steps(int(name[2:])) if name.startswith("rg") else 100
            works.append(drawing(args, name, names * n, len(run_indices(r, args.gen_steps)), r < 100))
    needs.append("" if args.sd_model.startswith("glide:") else Generator(args.sd_model, 64, "bf16").needs())
    stored = args.gen_save_size or args.gen_resolution
    if args.setting == "pretrain":
        return works + backbones(args, lines, names, classes, n_train, n_test, stored), needs

    clip, texts = Classifier(args.head_clip, "fp32"), classes * len(templates)
    both = 1 + (args.filter_clip != args.head_clip)
    real = max(args.shot_counts) * classes if args.setting == "few-shot" else 0
    drawn, batch = classes * sum(sets.values()), args.gen_micro_batch
    if "filter" in args.stages:
        seen = drawn + n_test + real
        works.append(clip.work(
            "filter", "CLIP, all sets, test split", batch, scored=both * drawn + n_test + real, texts=both * texts,
            loads=seen, load_size=stored, load_format=args.gen_format, jobs=math.ceil(seen / 1024), disk=0,
        ))  # fmt: skip
    if "train" in args.stages:
        width, jobs = 1024, len(lines) * args.clf_seeds
        kept = {name: classes * (min(n, args.filter_keep or n) if name == "le" else n) for name, n in sets.items()}
        most = classes * max((*sets.values(), args.rg_images * (args.setting == "few-shot")))
        tflop = jobs * args.head_epochs * 6 * width * classes * (max(kept.values(), default=most) + n_test / 3) / 1e12
        held = 4 * width * (most + n_test + real)
        if any(row == "rf" for _, row, _ in lines):  # normalised features, similarities and what masks them
            held += 4 * width * kept["le"] + 10 * min(pairs, kept["le"] * real)
        seen = jobs * args.head_epochs * (most + n_test)
        if args.tune_share or not args.freeze_bn:  # the tower in every step, on pixels
            works.append(clip.work(
                "train", f"{len(lines)} rows on pixels", args.head_batch, trained=seen, loads=seen, load_size=stored,
                load_format=args.gen_format, jobs=jobs,
            ))  # fmt: skip
        else:
            works.append(Work("train", f"{jobs} heads", tflop, jobs=jobs, gpu=held, ram=held, precision="fp32"))
    if "evaluate" in args.stages:
        works.append(clip.work("evaluate", "classifier/", batch, scored=n_test, loads=n_test, jobs=n_test))
    return works, [*needs, clip.needs(), Classifier(args.filter_clip, "fp32").needs() if both > 1 else ""]


def drawing(args: Any, name: str, n: int, steps: int, from_image: bool) -> Work:
    """n images of one set, in full micro-batches, `steps` steps of the sampler each"""
    micro, side = args.gen_micro_batch, args.gen_save_size or args.gen_resolution
    jobs = math.ceil(n / micro)
    more = dict(jobs=jobs, images=n, disk=n * PIXEL_BYTES[args.gen_format] * side**2, flag="--gen-micro-batch")
    if args.sd_model.startswith("glide:"):
        tflop = jobs * micro * (2 * steps * GLIDE_BASE + GLIDE_UPSAMPLER)
        half = 0.5 if args.precision == "bf16" else 1
        gpu = half * (4 * GLIDE_NUMBERS + GLIDE_HELD * micro)
        return Work("generate", f"{name}/", tflop, jobs * micro, precision=args.precision, gpu=gpu, **more)
    sd = Generator(args.sd_model, args.gen_resolution, args.precision)
    encoded = n if from_image else 0
    return sd.work(
        "generate", f"{name}/", micro, evaluated=2 * steps * jobs * micro, decoded=jobs * micro, encoded=encoded,
        loads=encoded, load_size=sd.size, prompts=n // micro, **more,
    )  # fmt: skip


def backbones(
    args: Any, lines: Sequence[tuple[Any, str, int]], names: int, classes: int, n_train: int, n_test: int, stored: int
) -> list[Work]:
    """Pre-training and transfer of every row; MoCo looks at each image twice, with the key network at a third more."""
    works, micro, deit, moco = [], args.pre_micro_batch, args.recipe == "deit", args.recipe == "moco"
    drawn = [(row, n) for line, row, n in lines if line.data]
    net = Classifier(args.backbone, args.precision, names, args.pre_size)
    if "train" in args.stages:
        jobs = [n for _, n in drawn for _ in range(args.clf_seeds)]
        for row, n in drawn:
            seen = args.clf_seeds * args.pre_epochs * n * names
            what = f"{row}, {n * names:,} images, {args.clf_seeds} x {args.pre_epochs} epochs"
            works.append(net.work(
                "train", what, micro, trained=seen, scored=seen if moco else 0, loads=seen // (3 if deit else 1),
                load_size=stored, load_format=args.gen_format, augment=AUGMENT.get(args.recipe, 1.5e-4), jobs=jobs,
                units=math.ceil(args.pre_batch / micro), flag="--pre-micro-batch",
            ))  # fmt: skip
        real = min(n_train, args.transfer_images * classes or n_train)
        if args.real_weights == "train" and any(line.init for line, *_ in lines):  # of what the transfer leaves over
            seen, what = args.clf_seeds * args.pre_epochs * (n_train - real), f"{n_train - real:,} real images"
            works.append(Classifier(args.backbone, args.precision, classes, args.pre_size).work(
                "train", f"{what}, {args.clf_seeds} x {args.pre_epochs} epochs", micro, trained=seen,
                scored=seen if moco else 0, loads=seen // (3 if deit else 1), load_size=args.pre_size,
                augment=AUGMENT.get(args.recipe, 1.5e-4), jobs=args.clf_seeds,
                units=math.ceil(args.pre_batch / micro), flag="--pre-micro-batch",
            ))  # fmt: skip
        seen, jobs = len(lines) * args.clf_seeds * args.transfer_epochs * real, len(lines) * args.clf_seeds
        small = Classifier(args.backbone, args.precision, classes, args.pre_size)
        works.append(small.work(
            "train", f"transfer, {jobs} x {args.transfer_epochs} epochs", micro, trained=seen, scored=jobs * n_test,
            loads=(seen // 3 if deit else seen) + jobs * n_test, load_size=args.pre_size, jobs=jobs,
            augment=AUGMENT["deit"] if deit else 1.7e-3, units=math.ceil(args.transfer_batch / micro),
        ))  # fmt: skip
    if "evaluate" in args.stages:
        works.append(net.work("evaluate", "classifier/", micro, scored=n_test, loads=n_test, jobs=n_test))
    return works
