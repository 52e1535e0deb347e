"""Does the guidance help? Rows of distdiff.py on the digits, paired over draws of the real images and classifier seeds.

    python tests/study_distdiff.py                     # 3 draws x 3 seeds: about 10 minutes on 2 idle cores
    python tests/study_distdiff.py --draws 10 --out study.json

Not a test: it asserts nothing. Rows: plain img2img (SD), the random shift without its gradient (rho = 0), DistDiff, and
DistDiff with the guide's input normalised as in its training. All start from the same noise.

There is to be room for the guidance: two real images per class, 70 % of the steps. The step size rho and the radius are
chosen for each kind of input on the training images of draw 0 alone: of a grid, the setting with the largest mean fall
of the energy after the projection among those in which it falls on 90 % of the images or more. The test set is scored
once by each classifier, at its end.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from scipy.stats import t as student  # noqa: E402

import distdiff as dd  # noqa: E402
from common import datasets, distributed, models  # noqa: E402
from common.report import print_table  # noqa: E402

RHO, RADIUS = (0.02, 0.05, 0.2, 1.0, 5.0), (0.2, 0.5, 1.0)
ROOM = dict(real_per_class=2, gen_strength=0.7, clf_epochs=48, clf_evals=1)
COPIES, INPUTS = (1, 2, 5), ("pm1", "normalized")
CPU = torch.device("cpu")


def flags(draw, **more):
    return dd.Args(**{**dd.PRESETS["digits"], **ROOM, "seed": draw, "gen_seed": draw, **more})


class Draw:
    """Real images, their latents, a guide trained on them and its prototypes."""

    def __init__(self, draw, pipe, data, folder):
        self.args, self.pipe, self.data, self.draw = flags(draw), pipe, data, draw
        self.real, _ = dd.choose_images(self.args, data)
        self.run = SimpleNamespace(
            log=lambda *_, **__: None, made=lambda: None, path=lambda *parts: folder.joinpath(*parts)
        )
        self.alone = distributed.Dist(0, 0, 1, CPU)
        self.prompts = dd.prompts_of_classes(self.args, data.class_names)
        self.test = dd.held(self.args, data.test, self.args.clf_resize)
        guide = ("guide", self.args.guide, self.args.guide_epochs, self.args.guide_lr)
        self.guide_top1 = self.top1(*guide, [self.real], len(self.real), draw)
        self.guide = dd.trained(self.args.guide, self.prompts, folder / "guide", CPU)
        features = dd.guide_features(self.args, self.guide, self.real, CPU)
        labels = torch.as_tensor(self.real.labels)
        self.found = dd.prototypes(features, labels, len(data.class_names), self.args.groups)
        shape = dd.latent_shape(pipe, self.args.gen_resolution)
        views = [dd.encode_view(self.real.open(i), self.real.keys[i], self.args, shape) for i in range(len(self.real))]
        pixels, noise = (torch.stack(part) for part in zip(*views, strict=True))
        with torch.no_grad():
            mean, std = dd.moments(pipe.vae, dd.to_unit(pixels)).unbind(1)
        self.latents = pipe.vae.config.scaling_factor * (mean + std * noise)

    def top1(self, name, network, epochs, lr, sources, length, seed, best="test"):
        job = dd.Training(self.run.path(name), network, None, epochs, lr, sources, length, seed)
        dd.fit(self.args, self.run, self.alone, job, dict(test=self.test), self.prompts)
        return json.loads((job.folder / "metrics.json").read_text())[best]

    def sampler(self, **more):
        return dd.Sampler(flags(self.draw, **more), self.pipe, self.guide, self.found, self.prompts)

    def sources(self, pairs):
        return dd.inputs_of(self.args, self.real, self.latents, pairs)

    def chosen(self, kind):
        """(share of images whose projected energy falls, mean relative fall, rho, radius) of each setting, the best."""
        table = []
        for radius in RADIUS:
            for rho in RHO:
                s = self.sampler(gen_guide_input=kind, gen_rho=rho, gen_radius=radius, gen_micro_batch=20)
                found = s.probe(*self.sources([(i, 0) for i in range(len(self.real))]))
                _, _, before, after = torch.tensor(found)
                table.append(((after < before).float().mean().item(), (1 - after / before).mean().item(), rho, radius))
        return table, max(table, key=lambda row: (row[0] >= 0.9, row[1]))

    def images(self, row, **more):
        """All copies, class by class within each copy: the first k N are the set of k copies."""
        s, n, k = self.sampler(**more), len(self.real), max(COPIES)
        pairs = [(i, j) for j in range(k) for i in range(n)]
        parts = [s.draw(row, *self.sources(batch)) for batch in dd.chunks(pairs, s.args.gen_micro_batch)]
        pixels = torch.cat(parts).permute(0, 2, 3, 1).contiguous().numpy()
        labels = [self.real.labels[i] for i, _ in pairs]
        return datasets.Images(labels, map(str, range(n * k)), self.data.class_names, pixels=pixels)

    def score(self, name, images, k, seed):
        n, args = len(self.real), self.args
        sources = [self.real, images.subset(range(k * n))] if k else [self.real]
        job = (f"{name}-{k}-{seed}", args.classifier, args.clf_epochs, args.sgd_lr)
        return self.top1(*job, sources, n * (1 + max(COPIES)), seed)


def interval(per_draw):
    """Mean and half of its 95 % interval by Student's t over draws, each the mean over its seeds"""
    x = torch.tensor(per_draw, dtype=torch.float64)
    half = student.ppf(0.975, len(x) - 1) * x.std().item() / math.sqrt(len(x)) if len(x) > 1 else float("nan")
    return x.mean().item(), half


def show(scores, settings):
    rows = list(dict.fromkeys(name for name, *_ in scores))
    draws = sorted({draw for *_, draw, _ in scores})

    def per_draw(name, k):
        values = {d: [v for (n, kk, dr, _), v in scores.items() if (n, kk, dr) == (name, k, d)] for d in draws}
        return [sum(v) / len(v) for v in values.values() if v]

    table = []
    for name in rows:
        line = [name]
        for k in COPIES if name != "real" else (0,):
            accuracy = per_draw(name, k)
            cells = [f"{sum(accuracy) / len(accuracy):.1f}"]
            for other in ("sd", "rho0") if name.startswith("distdiff") else ("sd",) if name == "rho0" else ():
                mean, half = interval([a - b for a, b in zip(accuracy, per_draw(other, k), strict=True)])
                cells.append(f"{mean:+.1f} ± {half:.1f} to {other}")
            line.append(", ".join(cells))
        table.append(line + [""] * (1 + len(COPIES) - len(line)))
    print_table(["training set", *(f"k = {k}" for k in COPIES)], table)
    print(f"{len(draws)} draws; ±: 95 % interval of the paired difference over draws; settings {settings}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3, help="of the real images")
    parser.add_argument("--seeds", type=int, default=3, help="classifiers for each row, k and draw")
    parser.add_argument("--out", help="JSON of all scores, written after each draw")
    asked = parser.parse_args()
    pipe = dd.generator_of(flags(0), models.resolve("tiny", "generator"), CPU)
    data, scores, settings, grids = datasets.load_dataset("digits"), {}, {}, {}
    for draw in range(asked.draws):
        with tempfile.TemporaryDirectory() as folder:
            d = Draw(draw, pipe, data, Path(folder))
            if not draw:
                for kind in INPUTS:
                    grids[kind], (share, fall, rho, radius) = d.chosen(kind)
                    settings[kind] = dict(gen_rho=rho, gen_radius=radius)
                    print(
                        f"{kind}: energy falls on {share:.0%}, by {fall:.1%}, at rho {rho}, radius {radius}", flush=True
                    )
                    print_table(["fell", "by", "rho", "radius"], [[f"{x:.3f}" for x in row] for row in grids[kind]])
            rows = {"sd": ("sd", {}), "rho0": ("rho0", settings["pm1"])}
            rows["distdiff"] = ("distdiff", settings["pm1"])
            rows["distdiff, normalized"] = ("distdiff", dict(gen_guide_input="normalized", **settings["normalized"]))
            for seed in range(asked.seeds):
                scores["real", 0, draw, seed] = d.score("real", None, 0, seed)
            for name, (row, more) in rows.items():
                drawn = d.images(row, **more)
                for k in COPIES:
                    for seed in range(asked.seeds):
                        scores[name, k, draw, seed] = d.score(name, drawn, k, seed)
            print(f"draw {draw}: guide {d.guide_top1:.1f} on the test split")
        show(scores, settings)
        if asked.out:
            lines = [[*key, value] for key, value in scores.items()]
            Path(asked.out).write_text(json.dumps(dict(settings=settings, grids=grids, scores=lines)))


if __name__ == "__main__":
    main()
