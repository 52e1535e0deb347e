"""The work of distdiff.py, stage by stage. Reads no data set and no weights."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from common import costs
from common.costs import FROZEN, TRAINED
from common.images import PIXEL_BYTES
from common.plan import Classifier, Generator, Work, dataset_needs, sizes

# Classes, training, validation and test images where the script takes another split than common.datasets.SIZES counts.
OFFICIAL = {
    "caltech101": (100, 3_000, 0, 5_242), "cars": (196, 8_144, 0, 8_041), "dtd": (47, 1_880, 1_880, 1_880),
    "flowers102": (102, 1_020, 1_020, 6_149), "pets": (37, 3_680, 0, 3_669),
    "imagenette": (10, 9_469, 0, 3_925),  # fast.ai's split, which the paper used
}  # fmt: skip
# GiB of the gradient step on Stable Diffusion 1.x for an image of 512 pixels and P = 2, bf16: of U-Net and guide, and
# of the decoder, which takes no more than 8 images at a time. Without checkpointing all of it is kept.
CHECKPOINTED, DECODER, KEPT = 1.41, 1.13, 8.55


def splits_of(args: Any) -> tuple[int, int, int, int]:
    """Classes, real images that are multiplied, validation and test images."""
    n, train, val, test = OFFICIAL.get(args.dataset) or sizes(args.dataset, args.data_dir)
    if args.merge_val:
        train, val = train + val, 0
    if not val and args.val_fraction:
        val = round(args.val_fraction * train)
        train -= val
    return n, train if args.real_per_class is None else min(train, n * args.real_per_class), val, test


def guidance_gib(args: Any) -> float:
    """Peak of the gradient step of a micro-batch, without weights; counted by tests/test_distdiff.py."""
    b, share = args.gen_micro_batch, args.gen_period / 2 * (args.gen_resolution / 512) ** 2
    held = CHECKPOINTED * b + DECODER * min(b, 8) if args.grad_checkpoint else KEPT * b
    return held * share * (1 if args.precision == "bf16" else 2)


def guidance_tflop(args: Any) -> float:
    """Of one gradient step on one image: P times a U-Net pair and a decoding, forward and backward."""
    passes = FROZEN + args.grad_checkpoint  # checkpointing runs the forward pass once more
    unet, decode = (costs.sd_cost(args.sd_model, part, args.gen_resolution).tflop for part in ("unet", "decode"))
    return args.gen_period * passes * (2 * unet + decode)


def plan(
    args: Any, rows: Sequence[str], runs: Sequence[tuple[str, int, int]], start_index: Callable, sets_in_epoch: Callable
) -> tuple[list[Work], list[str]]:
    """-> the work of the planned stages, what must be there. rows: generated ones; runs: (row, k, seed) to train."""
    classes, n, n_val, n_test = splits_of(args)
    sd, works = Generator(args.sd_model, args.gen_resolution, args.precision), []
    guide, clf = (_network(name, args, classes) for name in (args.guide, args.classifier))
    looked = args.clf_evals * (n_val + n_test)

    if "guide" in args.stages:
        seen = args.guide_epochs * n
        works.append(_trained(guide, args, "guide", f"{args.guide_epochs} epochs", seen, looked, load_size=512))
    if "prototypes" in args.stages:
        works.append(guide.work("prototypes", "guide", args.sgd_batch, scored=n, loads=n))
    micro, batches = args.gen_micro_batch, math.ceil(n / args.gen_micro_batch)
    if "encode" in args.stages:
        b, flag = batches * micro, "--gen-micro-batch"
        works.append(sd.work("encode", "VAE", micro, encoded=b, loads=n, load_size=sd.size, jobs=batches, flag=flag))
    if "expand" in args.stages:
        jobs, drawn = math.ceil(n * args.gen_copies / micro), n * args.gen_copies
        passes, steps = jobs * micro, args.gen_steps - start_index(args.gen_strength, args.gen_steps)
        side = args.gen_save_size or args.gen_resolution
        for row in rows:
            work = sd.work(
                "expand", f"{row}", micro, evaluated=2 * steps * passes, decoded=passes, prompts=classes, images=drawn,
                disk=drawn * PIXEL_BYTES["png"] * side**2, jobs=jobs, flag="--gen-micro-batch",
            )  # fmt: skip
            if row in ("distdiff", "direct"):
                tflop, gpu = guidance_tflop(args), guidance_gib(args) * 2**30 + work.gpu
                work.tflop, work.gpu = work.tflop + tflop * passes, gpu
            works.append(work)
    if "train" in args.stages:
        lengths = [sets_in_epoch(args, row, k) for row, k, _ in runs]
        for row, k in dict.fromkeys((row, k) for row, k, _ in runs):
            seen = args.clf_seeds * args.clf_epochs * n * sets_in_epoch(args, row, k)
            name, side = f"{row}, k = {k}" if k else row, args.gen_save_size or args.gen_resolution
            what = f"{name}, {args.clf_seeds} x {args.clf_epochs} epochs"
            works.append(
                _trained(clf, args, "train", what, seen, args.clf_seeds * looked, load_size=side, jobs=lengths)
            )
    drawn = {"encode", "expand"} & set(args.stages)
    needs = [*[sd.needs()] * bool(drawn), *(net.needs() for net in (guide, clf)), dataset_needs(args)]
    if "zero-shot" in args.rows and "train" in args.stages:
        clip = Classifier(args.zeroshot_clip, args.precision)
        works.append(clip.work("train", "zero-shot", 256, scored=n_test, texts=classes, loads=n_test))
        needs.append(clip.needs())
    if "evaluate" in args.stages:
        works.append(clf.work("evaluate", "classifier/", 4 * args.sgd_batch, scored=n_test, loads=n_test))
    return works, list(dict.fromkeys(needs))


def _network(name: str, args: Any, classes: int) -> Classifier:
    """A timm network, or clip:NAME."""
    size = None if name.startswith("clip:") else args.clf_size
    return Classifier(name.removeprefix("clip:"), args.precision, classes, size)


def _trained(net: Classifier, args: Any, stage: str, what: str, seen: int, looked: int, **more: Any) -> Work:
    more |= dict(trained=seen, scored=looked, train=TRAINED, loads=seen + looked)
    return net.work(stage, what, args.sgd_batch, **more)
