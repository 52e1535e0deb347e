"""Do the tests notice? Puts one fault at a time into a copy of the checkout and runs the fast tests of that file.

    python tests/sabotage.py                      # all faults of all files
    python tests/sabotage.py datadream -k clip    # those of one file whose name has "clip" in it
    python tests/sabotage.py --list
    python tests/sabotage.py --jobs 4             # four copies at once

For each fault: the test that turned red, or NOT NOTICED. Exit code 1 when one was not noticed, or no longer applies.
"""

import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fault:
    """Replace `old`, which stands exactly once in the file, by `new`; one of `tests` must then fail.

    tests: names of tests in the file's own test file, or other test files, with ::name or without, separated by blanks.
    "" means the whole of the file's own tests, which costs minutes where a name costs seconds.
    """

    name: str
    old: str
    new: str
    tests: str = ""


FAULTS = {
    "datadream.py": [
        # [1] select
        Fault(
            "ready-made shots left in validation",
            "train, val = (split and datasets.without(split, shots) for split in (train, val))",
            "pass",
            tests="test_ready_made_shots_are_in_neither_training_nor_validation",
        ),
        Fault(
            "drawn shots left in validation",
            "shots = train.subset(sampler(train, ",
            "shots = data.train.subset(sampler(data.train, ",
            tests="test_drawn_shots_are_not_held_out",
        ),
        Fault(
            "last of the ready-made shots",
            "rows = [found.of_class(c)[:k] for c in",
            "rows = [found.of_class(c)[-k:] for c in",
            tests="test_ready_made_shots_are_the_first_of_each_class_in_natural_order",
        ),
        # [2] finetune
        Fault(
            "next class's prompt in tuning",
            "text_row = torch.tensor([int(shots.labels[i]) for i, _ in batch])",
            "text_row = torch.tensor([(int(shots.labels[i]) + 1) % len(class_names) for i, _ in batch])",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "template fixed in tuning",
            "for i, _ in batch]) * args.n_templates + template",
            "for i, _ in batch]) * args.n_templates",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "text LoRA without gradients",
            "[0][which.to(team.device)]  # [B, 77, W], with LoRA",
            "[0][which.to(team.device)].detach()",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "no clipping",
            "loss = loop.update(lr=lr, clip=1.0)",
            "loss = loop.update(lr=lr)",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "constant rate of the LoRA",
            "lr = args.sd_lr * sd_lr_factor(step, args.sd_warmup, total)",
            "lr = args.sd_lr",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "latents x 0.1 in tuning",
            "z = pipe.vae.config.scaling_factor * (mean + std * noise)",
            "z = 0.1 * pipe.vae.config.scaling_factor * (mean + std * noise)",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "scaling factor forgotten in tuning",
            "z = pipe.vae.config.scaling_factor * (mean + std * noise)",
            "z = mean + std * noise",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "mean of the posterior, no draw",
            "pipe.vae.config.scaling_factor * (mean + std * noise)",
            "pipe.vae.config.scaling_factor * mean",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "micro-batches not weighted by their share",
            'F.mse_loss(prediction.float(), target, reduction="sum") / eps.numel()',
            "F.mse_loss(prediction.float(), target)",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "time step not given to the U-Net",
            "abar_t), t_u, h)",
            "abar_t), 0 * t_u, h)",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "no LoRA on the output projection",
            '["to_q", "to_k", "to_v", "to_out.0"]',
            '["to_q", "to_k", "to_v"]',
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "adapter tuned on another class",
            "(file, shots.of_class(c)) for c, file in",
            "(file, shots.of_class((c + 1) % len(files))) for c, file in",
            tests="test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
        Fault(
            "centre crop instead of a random one",
            "offset or [int(torch.randint(n + 1, ())) for n in free]",
            "offset or [n // 2 for n in free]",
            tests="test_crops_of_photos_that_are_not_square",
        ),
        # [3] generate
        Fault(
            "next class's prompt in drawing",
            "prompts, suffix, n = all_prompts(args, class_names), images",
            "prompts, suffix, n = all_prompts(args, [*class_names[1:], class_names[0]]), images",
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "template fixed in drawing",
            "h_c = [text[prompts[c][template_of(k, args.n_templates)]] for",
            "h_c = [text[prompts[c][0]] for",
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "guidance 1",
            "guided(eps_u, eps_c, args.gen_guidance)",
            "guided(eps_u, eps_c, 1.0)",
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "empty prompt replaced",
            'encode_prompts(pipe, [""])',
            '{"": encode_prompts(pipe, ["a photo"])["a photo"]}',
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "empty prompt of the first adapter for all",
            'loaded, text = file, encode_prompts(pipe, [""])',
            'loaded, text = file, text if loaded else encode_prompts(pipe, [""])',
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "latents x 0.1 in drawing",
            "z = z.to(h.device) * scheduler.init_noise_sigma",
            "z = 0.1 * z.to(h.device) * scheduler.init_noise_sigma",
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "adapter of another class",
            "adapter.use(file)",
            "adapter.use(file and files[-1])",
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "the baseline's images drawn with the adapter",
            'sets["unadapted"] = [None] * len(class_names)',
            'sets["unadapted"] = lora_file(args, run, class_names)',
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "classes share their noise",
            "return distributed.seed_of(args.gen_seed, c, k)",
            "return distributed.seed_of(args.gen_seed, 0, k)",
            tests="test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        # [4] train
        Fault(
            "lambda fixed at 1",
            '{"pooled": args.clf_real_weight, "real": 1.0}',
            '{"pooled": 1.0, "real": 1.0}',
            tests="test_classifier_training_equals_plain_lines",
        ),
        Fault(
            "constant rate of the classifier",
            "lr = clf_lr(step, *schedule)",
            "lr = args.clf_lr",
            tests="test_classifier_training_equals_plain_lines",
        ),
        Fault(
            "augmentation off",
            "view = train_transform(model.size, args.clf_augment)",
            "view = partial(eval_pixels, size=model.size)",
            tests="test_classifier_training_equals_plain_lines",
        ),
        Fault(
            "mixing across groups",
            "for group in (is_real, ~is_real):  # two independent draws",
            "for group in (is_real | True,):",
            tests="test_mixing_stays_in_its_group_and_happens_at_its_rate",
        ),
        Fault(
            "mixing across groups in the stage",
            "mix_groups(x, y, is_real[u], args.clf_mix_prob, g)",
            "mix_groups(x, y, is_real[u] | True, args.clf_mix_prob, g)",
            tests="test_classifier_training_equals_plain_lines",
        ),
        Fault(
            "mixing left out",
            "mix_groups(x, y, is_real[u], args.clf_mix_prob, g)",
            "x, y",
            tests="test_classifier_training_equals_plain_lines",
        ),
        Fault(
            "shots repeated once",
            'repeats = repeat_shots(g, args.shots) if arm in ("real", "pooled") else 0',
            'repeats = int(arm in ("real", "pooled"))',
            tests="test_training_list_length_and_order",
        ),
        Fault(
            "the baseline trained on DataDream's images",
            '{"real": None, "unadapted": "unadapted"}.get(',
            '{"real": None}.get(',
            tests="test_training_list_takes_each_row_from_its_folder",
        ),
        Fault(
            "rows of unequal updates",
            "if args.clf_equal_updates else len(data)",
            "if False else len(data)",
            tests="test_classifier_training_equals_plain_lines",
        ),
        Fault(
            "text tower not trained",
            "p.grad = grad",
            "p.grad = 0 * grad",
            tests="test_classifier_training_equals_plain_lines",
        ),
        Fault(
            "groups counted in each micro-batch",
            "is_real[u], lam, n_real, len(entries) - n_real)",
            "is_real[u], lam)",
            tests="test_micro_batches_and_units_of_classes_change_only_rounding",
        ),
        Fault(
            "no dropout",
            "nn.Dropout(dropout)",
            "nn.Dropout(0.0)",
            tests="test_one_dropout_mask_for_query_and_value",
        ),
        Fault(
            "a mask each for query and value",
            "a_q, a_v = F.linear(self.dropout(x), self.lora_A).chunk(2, dim=-1)",
            "a_q, a_v = (F.linear(self.dropout(x), a) for a in self.lora_A.chunk(2))",
            tests="test_one_dropout_mask_for_query_and_value",
        ),
        Fault(
            "trained in evaluation mode",
            "        model.train()\n",
            "        model.eval()\n",
            tests="test_training_has_dropout_and_evaluation_has_none",
        ),
        Fault(
            "evaluated in training mode",
            "    model.eval()\n",
            "    model.train()\n",
            tests="test_training_has_dropout_and_evaluation_has_none",
        ),
        Fault(
            "epoch chosen on test",
            'row["val"] > best["val"]:  # without validation images: the last epoch\n'
            '            extra["best"] = dict(step=step, val=row.get("val"))',
            'row["test"] > best["test"]:\n'
            '            extra["best"] = dict(step=step, val=row.get("val"), test=row["test"])',
            tests="test_the_epoch_is_chosen_on_validation_and_the_saved_weights_are_its",
        ),
        Fault(
            "validated on the test images",
            'for name, data in (("val", val), ("test", test)) if data}',
            'for name, data in (("val", test), ("test", test)) if data}',
            tests="test_validation_and_test_are_scored_on_their_own_images",
        ),
        Fault(
            "validation accuracy reported as test",
            'test_at[step] = self.score("test")',
            'test_at[step] = self.score("val")',
            tests="test_the_reported_accuracies_are_of_the_test_images",
        ),
        Fault(
            "last weights saved",
            "self.loop.tensors = {name: tensor.detach().clone() for",
            "self.loop.tensors = {name: tensor.detach() for",
            tests="test_the_epoch_is_chosen_on_validation_and_the_saved_weights_are_its",
        ),
        Fault(
            "LoRA not in the saved classifier",
            'state[f"{name}.in_proj_weight"] += module.delta_w().detach()',
            "pass",
            tests="test_the_saved_classifier_answers_like_the_trained_one",
        ),
        Fault(
            "LoRA twice in the saved classifier",
            'state[f"{name}.in_proj_weight"] += module.delta_w().detach()',
            'state[f"{name}.in_proj_weight"] += 2 * module.delta_w().detach()',
            tests="test_the_saved_classifier_answers_like_the_trained_one",
        ),
    ],
    "common/diffusion.py": [
        Fault(
            "scaling factor forgotten in decoding",
            "part / pipe.vae.config.scaling_factor",
            "part",
            tests="tests/test_datadream.py::test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "adapter left on",
            "            weight.copy_(stock)\n",
            "            pass\n",
            tests="tests/test_datadream.py::test_drawn_images_equal_those_of_a_stock_pipeline",
        ),
        Fault(
            "LoRA starts with a unit Gaussian",
            "generator=generator(*seed, name)) / r if",
            "generator=generator(*seed, name)) if",
            tests="tests/test_datadream.py::test_tuning_equals_a_plain_loop_over_stock_parts",
        ),
    ],
    "distdiff.py": [
        Fault(
            "no projection into the ball",
            "return torch.minimum(torch.maximum(v, z - radius), z + radius)",
            "return v",
            tests="test_golden_projection",
        ),
        Fault(
            "energy of squared distances",
            "return lam_class * (f - p).norm(dim=1)",
            "return lam_class * (f - p).norm(dim=1).square()",
            tests="test_golden_transform_guidance",
        ),
    ],
    "gafi.py": [
        Fault(
            "filter keeps what it should drop",
            "return confidence(probs, label) > threshold",
            "return confidence(probs, label) <= threshold",
            tests="test_golden_mask",
        ),
        Fault(
            "average that forgets at once",
            "[n for _, n in floats], 1 - decay)",
            "[n for _, n in floats], 1.0)",
            tests="test_golden_ema_and_rate",
        ),
    ],
    "realfake.py": [
        Fault(
            "min-SNR weight upside down",
            "return snr.clamp(max=gamma) / snr",
            "return snr / snr.clamp(max=gamma)",
            tests="test_golden_snr",
        ),
        Fault(
            "matching term of the mean residual",
            "r).sum(0).pow(2).mean()",
            "r).mean(0).pow(2).mean()",
            tests="test_golden_loss",
        ),
    ],
    "synthetic_recognition.py": [
        Fault(
            "student divided by T too",
            "return F.cross_entropy(z, (z0 / T).softmax(-1))",
            "return F.cross_entropy(z / T, (z0 / T).softmax(-1))",
            tests="test_golden_soft_loss",
        ),
        Fault(
            "templates averaged before they are normalised",
            "scale * F.normalize(F.normalize(text, dim=-1).mean(1), dim=-1)",
            "scale * F.normalize(text.mean(1), dim=-1)",
            tests="test_golden_zero_shot_head",
        ),
    ],
}


def sabotaged(source: str, fault: Fault) -> str:
    """The source with the fault in it. Raises ValueError when it no longer applies, SyntaxError if it is no Python."""
    if (times := source.count(fault.old)) != 1:
        raise ValueError(f"the fault no longer applies: its old text stands {times} times in the file")
    changed = source.replace(fault.old, fault.new)
    compile(changed, fault.name, "exec")
    return changed


def selection(file: str, fault: Fault) -> list[str]:
    """What pytest is given: "common/loop.py" has its tests in tests/test_common_loop.py."""
    own = f"tests/test_{file.removesuffix('.py').replace('/', '_')}.py"
    return [word if "/" in word else f"{own}::{word}" for word in fault.tests.split()] or [own]


class Copy:
    """A copy of the checkout to break, with the tests in it."""

    def __init__(self, root: Path, folder: Path):
        self.folder, self.process = folder, None
        folder.mkdir()
        # Copies, not links: the tests find the checkout from their own resolved path.
        for entry in root.iterdir():
            if entry.is_file():
                shutil.copy(entry, folder)
            elif entry.name in ("common", "docs", "shell", "tests"):
                shutil.copytree(entry, folder / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
        if sys.prefix != sys.base_prefix:
            (folder / ".venv").symlink_to(sys.prefix)

    def run(self, tests: list[str], limit: float | None) -> tuple[int | None, str]:
        """pytest, up to the first failure -> exit code (None: out of time), what it says about the failure."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE", "-m", "not slow"]
        command += ["-p", "no:cacheprovider", f"--basetemp={self.folder / 'tmp'}", *tests]
        # Trap: a .pyc is taken for fresh when size and second of change agree, which two faults can share.
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
        with open(self.folder / "output.txt", "w+", encoding="utf-8") as output:
            streams = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            self.process = subprocess.Popen(command, cwd=self.folder, env=env, start_new_session=True, **streams)
            try:
                code = self.process.wait(limit)
            except subprocess.TimeoutExpired:
                self.stop()
                return None, f"no end within {limit:g} s"
            output.seek(0)
            lines = [line.strip() for line in output if line.strip()] or ["pytest said nothing"]
        failures = [line for line in lines if line.startswith(("FAILED ", "ERROR"))]
        return code, (failures or lines)[0 if failures else -1]

    def stop(self):
        """End the tests and every process that they started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def tried(self, file: str, fault: Fault, limit: float) -> tuple[bool, str]:
        """Put the fault in, run the tests, take it out again -> was it noticed, a line that says by what."""
        path, begun = self.folder / file, time.monotonic()
        source = path.read_text(encoding="utf-8")
        try:
            changed = sabotaged(source, fault)
        except (ValueError, SyntaxError) as error:
            return False, f"DOES NOT APPLY: {error}"
        path.write_text(changed, encoding="utf-8")
        code, line = self.run(selection(file, fault), limit)
        path.write_text(source, encoding="utf-8")
        after = f"({time.monotonic() - begun:.0f} s)"
        if code == 1:  # a test failed; other codes are of runs that did not come so far
            return True, f"noticed by {line.partition(' ')[2]} {after}"
        return False, f"NOT NOTICED {after}" if code == 0 else f"NOT NOTICED, the tests did not run: {line} {after}"


def main(words: list[str] | None = None, root: Path = ROOT, faults: dict[str, list[Fault]] | None = None) -> int:
    """The command line; see the top of the file. -> exit code"""
    faults = FAULTS if faults is None else faults
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", help=f"of {', '.join(faults)}; default all")
    parser.add_argument("-k", default="", metavar="NAME", help="only faults with this in their name")
    parser.add_argument("--list", action="store_true", help="name the faults and their tests, run nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="copies at once (default 1)")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="for the tests of one fault")
    args = parser.parse_args(words)
    wanted = [name.removesuffix(".py") + ".py" for name in args.files]
    if unknown := [name for name in wanted if name not in faults]:
        parser.error(f"no faults for {', '.join(unknown)}; there are some for {', '.join(faults)}")
    chosen = [(f, x) for f in faults for x in faults[f] if f in (wanted or faults) and args.k in x.name]
    if not chosen:
        parser.error(f"no fault has {args.k!r} in its name")
    if args.list:
        for file, fault in chosen:
            print(f"{file}: {fault.name}: {' '.join(selection(file, fault))}")
        return 0

    with tempfile.TemporaryDirectory(prefix="sabotage-") as temporary, ThreadPoolExecutor(max(1, args.jobs)) as pool:
        copies = [Copy(root, Path(temporary) / f"copy{i}") for i in range(max(1, args.jobs))]
        free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for copy in copies:
            free.put(copy)

        def attempt(job):
            copy = free.get()
            try:
                return copy.tried(*job, args.limit)
            finally:
                free.put(copy)

        try:
            # Red tests notice everything: they must be green first.
            tests = list(dict.fromkeys(test for job in chosen for test in selection(*job)))
            code, line = copies[0].run(tests, None)
            if code != 0:
                print(f"error: the tests fail without any fault: {line}")
                return 1
            print(f"{len(chosen)} faults; without one, all is well: {line}", flush=True)
            missed = 0
            for (file, fault), (noticed, line) in zip(chosen, pool.map(attempt, chosen), strict=True):
                missed += not noticed
                print(f"{file}: {fault.name}: {line}", flush=True)
        except BaseException:  # Ctrl-C: the threads wait for their tests
            pool.shutdown(wait=False, cancel_futures=True)
            for copy in copies:
                copy.stop()
            raise
    print(f"{missed} of {len(chosen)} faults were not noticed" if missed else f"all {len(chosen)} faults were noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
