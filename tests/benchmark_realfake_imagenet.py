"""Real-Fake on a data set as large as ImageNet-1K: seconds and memory of the start, of each stage's first step, of a
resume.

    python tests/benchmark_realfake_imagenet.py              # 1,281,000 images, 20 minutes on 2 cores
    python tests/benchmark_realfake_imagenet.py --images 20000

Not a test: it asserts no time. The images are hard links to a thousand small JPEGs, in ImageNet's layout; the models
are the tiny ones, so that all that is measured is what grows with the number of images. Each line is a process of its
own, with its own peak of memory (Python and torch, about 600 MB, included).
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import archives  # noqa: E402
import torch  # noqa: E402
from benchmark_scale import ALONE, in_own_process  # noqa: E402

import realfake as rf  # noqa: E402
from common import captions, datasets, images, models  # noqa: E402
from common import run as runs  # noqa: E402
from common.clip import load_clip  # noqa: E402
from common.diffusion import load_pipeline  # noqa: E402
from common.features import Features  # noqa: E402
from common.files import class_folders, save_tensors, write_json  # noqa: E402
from common.near_copies import near_copies  # noqa: E402

WIDTH = 64  # of the tiny CLIP's embeddings
# An epoch of one step: the lists stay whole, the order is drawn over all of them.
SMALL_NET = dict(
    net_model="test_resnet", net_size=32, net_micro_batch=64, net_epochs=1, net_milestones=(1,), net_equal_updates=True
)
TINY = dict(sd_model="tiny", token_clip="tiny", captioner="tiny", precision="fp32", workers=0, gen_resolution=32)


def make_tree(root, n, classes=1000):
    """root/data with n training and 50 validation files a class; root/captions.json; the captions' words vary."""
    picture = archives.encoded(mode="RGB", size=(80, 64), color=(90, 140, 60), kind="JPEG")
    wnids = archives.imagenet(root / "data", range(classes), picture=picture)
    for wnid in wnids[:classes]:
        for split, more in (("train", n // classes), ("val", 50)):
            folder = root / "data" / split / wnid
            first = folder / f"{wnid}_{split}.JPEG"
            for i in range(1, more):
                os.link(first, folder / f"{wnid}_{split}_{i}.JPEG")
    sentence = "a {} on a wooden table beside a window in the afternoon light number {}"
    captions = {
        wnid: {file.name: sentence.format(wnid, i) for i, file in enumerate(os.scandir(root / "data" / "train" / wnid))}
        for wnid in wnids[:classes]
    }
    write_json(root / "captions.json", captions)


def link_generated(args, run, real, folder):
    """A finished generated set: every file a link to the same image of its class."""
    drawn = rf.versions_of(args, run, rf.generated_sets(args, len(real))["images"], real).images()
    for row in range(len(drawn)):
        c = int(drawn.labels[row])
        first = folder / f"{c}.jpg"
        if not first.exists():
            images.to_pil(torch.full((3, 32, 32), c % 256, dtype=torch.uint8)).save(first)
            run.path("images", class_folders(real.class_names)[c]).mkdir(parents=True)
        os.link(first, run.path("images", *drawn.key(row).split("/")[-2:]))


def begin(root, folder="run", **more):
    """What `main` does before the first stage."""
    args = rf.Args(**{**rf.PRESETS["imagenet1k"], **TINY, **more, "data_dir": str(root / "data")})
    args.output_dir, args.captions_file = str(root / folder), str(root / "captions.json")
    args.tune_max_images, args.net_batch, args.gen_micro_batch, args.device = 8, 64, 8, "cpu"
    rf.check_args(args)
    data = datasets.load_dataset(args.dataset, args.data_dir)
    real = rf.choose_real(args, data)
    sets = rf.generated_sets(args, len(real))
    rf.check_sets(args, rf.planned_models(args, sets), real, sets)
    run = runs.open_run("realfake", args, ALONE, models={"real": rf.keys_hash(real)}, later=rf.LATER)
    return args, run, data, real, rf.prompt_names(args.dataset, data.class_names), sets


def generator():
    return load_pipeline(models.resolve("tiny", "generator"), ALONE.device, "fp32")


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def start(root):
    return timed(lambda: begin(root))


def plan(root):
    args, *_ = begin(root)
    args.plan = "h100"
    return timed(lambda: rf.plan(args))


def caption(root):
    args, run, _, real, *_ = begin(root)
    ready = partial(captions.read_captions, args.captions_file, real)
    return timed(lambda: rf.caption(args, run, ALONE, real, ready))


def embed(root):
    """One part of 1,024 images, then all parts joined: the others are there, links to one."""
    args, run, _, real, *_ = begin(root)
    features = Features(run.path("parts", "embeddings"), [load_clip("tiny")], real, 64, 0)
    features.folder.mkdir(parents=True)
    for n in {len(part) for part in features.parts}:
        save_tensors(root / f"{n}.safetensors", {"features": torch.randn(n, WIDTH).half()}, features.key)
    for part in features.parts[1:]:
        os.link(root / f"{len(part)}.safetensors", features.file(part))
    return timed(lambda: rf.embed(args, run, ALONE, real))


def tune(root):
    args, run, _, real, names, sets = begin(root)
    pipe = generator()
    return timed(lambda: rf.finetune(args, run, ALONE, pipe, real, names, sets))


def draw(root):
    """The first micro-batch: what is missing, prompts and tokens, eight images."""
    args, run, _, real, names, sets = begin(root)
    pipe, v = generator(), sets["images"]

    def work():
        todo = rf.missing_versions(args, run, real, sets)["images"]
        first = dict(list(todo.items())[: args.gen_micro_batch])
        condition = rf.Condition(args, run, pipe, v, real, names, rf.sampling_prompt)
        with images.ImageWriter("jpeg", 75) as writer:
            rf.draw_versions(args, run, ALONE, pipe, pipe.unet, writer, v, real, condition, first)

    seconds = timed(work)
    shutil.rmtree(run.path("images"))
    return seconds


def resume(root):
    """Nothing is missing any more: one listing."""
    args, run, _, real, _, sets = begin(root)
    missing = {}
    seconds = timed(lambda: missing.update(rf.missing_versions(args, run, real, sets)))
    assert missing == {"images": {}}
    return seconds


def metadata(root):
    args, run, _, real, names, sets = begin(root)
    return timed(lambda: rf.list_versions(args, run, sets["images"], real, names))


def train(root):
    """Real and generated images together, up to the first step of the network."""
    args, run, _, real, _, sets = begin(root, **SMALL_NET)
    sources = [real, rf.versions_of(args, run, sets["images"], real).images(1)]
    return timed(lambda: rf.train_net(args, run, ALONE, run.path("x"), "train/x", sources, 64, 0))


def attack(root):
    """Ten shadow sets, a step of a shadow network, phi of one batch; the figures of ten models over all images."""
    args, run, _, real, _, sets = begin(root, "attacked", mia_models=10, **SMALL_NET)
    v = sets["shadows/0/images"]

    def work():
        part = real.subset(v.rows)
        rf.train_net(args, run, ALONE, run.path("shadow"), "shadow/0", [part], 64, 0)
        net = rf.trained_net(args, run.path("shadow"), 1000, ALONE.device)
        rf.logits_of(args, net, real.subset(range(64)), ALONE.device, rf.membership_logit)
        keep = torch.from_numpy(rf.half_split(len(real), args.mia_models))
        rf.attack_results(torch.randn(args.mia_models, len(real), dtype=torch.float64), keep)

    return timed(work)


def few(real):
    return real.subset(range(0, len(real), max(1, len(real) // 5000)))


def evaluate(root):
    """Three networks and CLIP on a test image of each class, contact sheet and report of the whole run; near-copies of
    5,000 real images only: to hash all takes 1.5 ms of a core each, on all processes."""
    args, run, data, real, _, sets = begin(root, clf_seeds=1, **SMALL_NET)
    rf.near_copies = lambda run, drawn, real, *rest: near_copies(run, drawn, few(real), *rest)
    data.test = data.test.subset(range(0, len(data.test), 50))
    for row, seed in rf.training_jobs(args):
        folder = run.path("classifier", "runs", f"{row}-seed{seed}")
        save_tensors(folder / "weights.safetensors", rf.make_net(args, 1000, seed).state_dict())
        write_json(folder / "metrics.json", dict(images=len(real), updates=1))
    return timed(lambda: rf.evaluate(args, run, ALONE, data, real, sets))


def link(root):
    args, run, _, real, *_ = begin(root)
    link_generated(args, run, real, root)
    return 0.0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_000, help="training images, a multiple of 1,000")
    n = parser.parse_args().images
    models.resolve("tiny", "generator")  # built and trained now, once
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        print(f"making {n:,} files", flush=True)
        in_own_process(make_tree, root, n)
        (root / "run").mkdir()
        print(f"{'':48}   elapsed       CPU   peak of memory")
        for what, work in (
            ("start, up to the first stage", start),
            ("--plan", plan),
            ("[1] captions from a file", caption),
            ("[2] embeddings: one part, all joined", embed),
            ("[3] tuning: lists, prompts, tokens, one step", tune),
            ("[4] generation: the same, 8 images", draw),
            (None, link),
            ("[4] resume: what is missing", resume),
            ("[4] end: metadata.jsonl", metadata),
            ("[5] training on real + generated: one step", train),
            ("[6] attack: ten shadow sets, one step, figures", attack),
            ("[7] evaluation: 1,000 test images, the report", evaluate),
        ):
            elapsed, cpu, peak = in_own_process(work, root)
            if what:
                print(f"{what:48}{elapsed:>8.1f} s{cpu:>8.1f} s{peak:>12.0f} MB", flush=True)


if __name__ == "__main__":
    main()
