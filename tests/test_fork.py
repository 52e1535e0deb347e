"""The worked example of docs/fork.md: its diff fits datadream.py, and the fork computes the loss it promises."""

import importlib.util
import re

import pytest
import torch
from conftest import ROOT

import datadream as dd
from common import distributed
from common.datasets import load_dataset

ALONE = distributed.Dist(0, 0, 1, torch.device("cpu"))


def page_diff():
    page = (ROOT / "docs" / "fork.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", page, re.M | re.S)
    return diff


def applied(diff, source):
    """What `patch` does: each hunk's old lines, which stand in the file once, become its new lines."""
    for hunk in re.split(r"^@@ .* @@.*\n", diff, flags=re.M)[1:]:
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert source.count(old) == 1, f"docs/fork.md: not once in datadream.py any more:\n{old}"
        source = source.replace(old, new)
    return source


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """The fork, imported from a file of its own."""
    path = tmp_path_factory.mktemp("fork") / "datadream_minsnr.py"
    path.write_text(applied(page_diff(), (ROOT / "datadream.py").read_text(encoding="utf-8")), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("datadream_minsnr", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "datadream_minsnr", module)  # dataclass looks itself up
        spec.loader.exec_module(module)
        yield module


def tuned(script, out, shots, pipe, **flags):
    """Stage 2 with these flags -> (loss of each step, the text of the adapter file)"""
    base = dict(shots=1, sd_warmup=3, sd_micro_batch=2, output_dir=str(out))
    args = script.Args(**script.PRESETS["digits"] | base | flags)
    run = script.runs.open_run("datadream", args, ALONE)
    script.finetune(args, run, ALONE, pipe, shots, shots.class_names)
    losses = script.runs.metrics.read(run.dir)["finetune/loss"]
    return list(losses.values()), (out / "lora" / "pytorch_lora_weights.safetensors").read_bytes()


def test_the_diff_is_short_and_patch_can_read_it(tmp_path):
    diff = page_diff()
    assert len(diff.splitlines()) < 60
    header = r"^@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@\n((?:[ +-].*\n)*)"
    hunks = re.findall(header, diff, re.M)
    assert len(hunks) == diff.count("@@ -")
    for before, after, body in hunks:
        lines = body.splitlines()
        assert int(before or 1) == sum(line[0] in " -" for line in lines), body
        assert int(after or 1) == sum(line[0] in " +" for line in lines), body


def test_the_weight_is_min_snr(fork):
    abar = dd.alphas_cumprod()
    snr = abar / (1 - abar)
    weight = fork.min_snr_weight(abar, 5.0, "epsilon")
    assert torch.equal(weight[snr <= 5], torch.ones(int((snr <= 5).sum()))) and (snr > 5).any()
    assert torch.allclose(weight[snr > 5], 5 / snr[snr > 5])
    # epsilon and v are two readings of one prediction: err_v = (snr + 1) / snr err_eps, so the losses are the same
    assert torch.allclose(weight * snr / (snr + 1), fork.min_snr_weight(abar, 5.0, "v_prediction"))


def test_the_fork_differs_by_the_weight_and_by_nothing_else(fork, tmp_path):
    train = load_dataset("digits").train
    shots = train.subset([int(train.of_class(c)[0]) for c in range(10)])
    pipe = dd.diffusion.load_pipeline(dd.models.resolve("tiny", "generator"), ALONE.device, "fp32")

    # One image, one step, whose rate is 0: the loss of the stock generator times the weight of its time step.
    one, ratios = shots.subset([3]), {}
    for seed in range(4):
        flags = dict(seed=seed, sd_epochs=1, sd_batch=1, sd_micro_batch=1)
        (plain,), _ = tuned(dd, tmp_path / f"plain{seed}", one, pipe, **flags)
        (weighted,), _ = tuned(fork, tmp_path / f"fork{seed}", one, pipe, **flags, sd_snr_gamma=1.0)
        g = distributed.generator(seed, "lora", "step", 0)
        torch.randint(2**31, (1,), generator=g), torch.randint(1, (1,), generator=g)
        snr = (a := dd.alphas_cumprod()[torch.randint(1000, (1,), generator=g)]) / (1 - a)
        ratios[seed] = weighted / plain
        assert ratios[seed] == pytest.approx(min(1.0, 1 / snr.item()), rel=1e-4)
    assert min(ratios.values()) < 0.5 and max(ratios.values()) == pytest.approx(1)

    # With a gamma that no step exceeds it is DataDream, also when micro-batches are added up; with the default not.
    flags = dict(sd_epochs=3, sd_batch=4)
    plain, adapter = tuned(dd, tmp_path / "plain", shots, pipe, **flags)
    same, _ = tuned(fork, tmp_path / "same", shots, pipe, **flags, sd_snr_gamma=1e9)
    weighted, other = tuned(fork, tmp_path / "weighted", shots, pipe, **flags)
    assert same == pytest.approx(plain, rel=1e-4)
    assert all(w <= p for w, p in zip(weighted, plain, strict=True)) and weighted != plain and other != adapter


def test_the_fork_has_its_flag_and_its_own_runs(fork, tmp_path):
    from common.cli import check
    from common.launch import UserError

    assert fork.Args().sd_snr_gamma == 5.0 and not hasattr(dd.Args(), "sd_snr_gamma")
    with pytest.raises(UserError, match="--sd-snr-gamma 0"):
        check(fork.Args(sd_snr_gamma=0.0))
    run = fork.runs.open_run("datadream_minsnr", fork.Args(output_dir=str(tmp_path / "run")), ALONE)
    del run
