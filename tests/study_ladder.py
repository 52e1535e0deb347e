"""Does the zero-shot ladder show? B, LE, LE + CF, each with CE and SCE, over draws of sentences and images.

    python tests/study_ladder.py DIR                      # 5 draws
    python tests/study_ladder.py DIR --draws 10 --weak 0.2

Not a test: it asserts nothing. A draw is a seed of the generator; a difference between two rows is taken within each
draw, and its interval is Student's t over draws, for the seeds of a head change little.

Settings are chosen on the 1,000 training digits, which then stand in the place of the test split: the head's rate and
the words before what is drawn, from a grid, as the mean over all rows of draw 0. The test digits are scored with that
setting alone. Targets: the tiny CLIP, and a weak one trained for --weak of its steps, which knows the drawn images less
well. DIR keeps all runs; the same command goes on.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

from scipy.stats import t as student

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import datasets  # noqa: E402
from common.report import print_table  # noqa: E402

PREFIXES = ("a photo of", "white on a black background, a photo of")
RATES = (0.002, 0.01, 0.03)
ROWS = ("zero-shot", "basic-ce", "basic-sce", "le-ce", "le-sce", "le+cf-ce", "le+cf-sce")
PAIRS = (  # the paper's orderings in Table 2: better, worse
    ("le-ce", "basic-ce"), ("le-sce", "basic-sce"), ("le+cf-ce", "le-ce"), ("le+cf-sce", "le-sce"),
    ("basic-sce", "basic-ce"), ("le-sce", "le-ce"), ("le+cf-sce", "le+cf-ce"), ("le+cf-sce", "zero-shot"),
)  # fmt: skip
DRAW, FILTER, TRAIN = ("select", "sentences", "generate"), ("filter",), ("train", "evaluate")


def command(*words):
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def weak_clip(folder, share):
    """A CLIP of the tiny world trained for a share of its steps, on as large a share of its pictures -> its folder"""
    if not (folder / "clip" / "open_clip_config.json").exists():
        where = ["--out", folder, "--work-dir", folder / "work"]
        command("-m", "common.tiny", *where, "--budget-scale", share, "--stages", "tokenizer", "clip")
    return folder / "clip"


def training_digits(folder):
    """The training digits as the test split of a folder data set -> flags"""
    train = datasets.load_dataset("digits").train
    for row, label in enumerate(train.labels):
        for split in ("train", "test"):
            place = folder / split / train.class_names[label]
            place.mkdir(parents=True, exist_ok=True)
            train.open(row).save(place / f"{row}.png")
    return ["--dataset", "folder", "--data-dir", folder, "--template", "a photo of a {}"]


def step(before, folder, *words):
    """The command in a copy of a folder that an earlier command left, unless it is done -> the folder"""
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if before is not None:
            shutil.copytree(before, folder)
        command("synthetic_recognition.py", "--output-dir", folder, *words)
        (folder / "done").touch()
    return folder


def scores(base, target, draw, clip, prefix, rate, data):
    """{row: test accuracy, mean over the seeds of the head}. Targets share the images of a draw, rates its features."""
    base = base / ("training" if data else "test") / f"prefix-{PREFIXES.index(prefix)}-draw-{draw}"
    flags = ["--gen-seed", draw, "--seed", draw, "--gen-prefix", prefix, "--ladder", *ROWS, *data]
    drawn = step(None, base / "drawn", *flags, "--stages", *DRAW)
    flags += ["--head-clip", clip, "--filter-clip", clip]
    seen = step(drawn, base / target, *flags, "--stages", *FILTER)
    trained = step(seen, base / f"{target}-rate-{rate}", *flags, "--head-lr", rate, "--stages", *TRAIN)
    found = json.loads((trained / "results.json").read_text())
    return {row: (found["metrics"] | found["baselines"])[row]["mean"] for row in ROWS}


def interval(x):
    """Mean and half of its 95 % interval by Student's t"""
    mean, n = sum(x) / len(x), len(x)
    if n < 2:
        return f"{mean:+.1f}"
    error = math.sqrt(sum((v - mean) ** 2 for v in x) / (n - 1) / n)
    return f"{mean:+.1f} ± {student.ppf(0.975, n - 1) * error:.1f}"


def study(base, name, clip, draws, training):
    """One target: its setting from the training digits, then its ladder on the test digits."""
    tried = {}
    for prefix in PREFIXES:
        for rate in RATES:
            found = scores(base, name, 0, clip, prefix, rate, training)
            tried[prefix, rate] = sum(v for row, v in found.items() if row != "zero-shot") / (len(ROWS) - 1)
            print(
                f"{name}, {prefix!r}, rate {rate}, training digits:",
                {k: round(v, 1) for k, v in found.items()},
                flush=True,
            )
    prefix, rate = max(tried, key=tried.get)
    found = [scores(base, name, draw, clip, prefix, rate, ()) for draw in range(draws)]
    print(f"\n{name}: {prefix!r}, rate {rate}, {draws} draws, test digits")
    print_table(["row", "mean"], [[row, f"{sum(f[row] for f in found) / draws:.1f}"] for row in ROWS])
    header = ["ordering of the paper", "difference within a draw, 95 % interval"]
    print_table(header, [[f"{a} above {b}", interval([f[a] - f[b] for f in found])] for a, b in PAIRS])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs lie")
    parser.add_argument("--draws", type=int, default=5, help="seeds of the generator")
    parser.add_argument("--weak", type=float, default=0.12, help="share of the steps of the weak CLIP's training")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    training = training_digits(folder / "digits")
    study(folder, "tiny", "tiny", asked.draws, training)
    weak = f"weak-{asked.weak:g}"
    study(folder, weak, weak_clip(folder / weak, asked.weak), asked.draws, training)


if __name__ == "__main__":
    main()
