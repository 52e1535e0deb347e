"""The run folder and the frame around a script. Signals, locks and kills are tried on real processes without torch."""

import dataclasses
import errno
import hashlib
import html.parser
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common import report as drawing
from common import run as runs
from common.run import UserError

ROOT = Path(__file__).resolve().parents[1]
ONE = SimpleNamespace(rank=0, local_rank=0, world=1, device="cpu", main=True)  # stands for Dist, without torch


def other_rank(rank):
    return SimpleNamespace(rank=rank, local_rank=rank, world=1, device="cpu", main=False)


@dataclasses.dataclass
class Args:
    preset: str = "small"
    """configuration to start from"""
    output_dir: str | None = None
    """run folder"""
    seed: int = 0
    """seed"""
    stages: tuple[str, ...] = ("draw", "learn")
    """stages to run"""
    resume: bool = True
    """continue"""
    lr: float = 0.1
    """learning rate"""
    gen_micro_batch: int = 8
    """images per forward pass"""


PRESETS = {"small": dict(lr=0.5), "paper": dict(lr=0.25, gen_micro_batch=64)}
SPEED = ("output_dir", "resume", "stages", "gen_micro_batch")


@pytest.fixture
def command(monkeypatch):
    """`command(main, "--lr", "3")` runs cli in this process -> exit code; signal handlers are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = dict(vars(runs._state))

    def call(main, *words, presets=PRESETS):
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        try:
            runs.cli(main, Args, presets, "A script.\n\nRun:\n    python script.py\n")
        except SystemExit as end:
            return end.code
        return 0

    yield call
    vars(runs._state).update(before)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def raising(error):
    def main(args):
        raise error

    return main


# ---- command line --------------------------------------------------------------------------


def test_presets_and_flags(command):
    seen = []
    for words in ([], ["--preset", "paper"], ["--preset=paper", "--lr", "3"], ["--seed", "7", "--no-resume"]):
        assert command(seen.append, *words) == 0
    assert [(a.preset, a.lr, a.gen_micro_batch, a.seed, a.resume) for a in seen] == [
        ("small", 0.5, 8, 0, True),
        ("paper", 0.25, 64, 0, True),
        ("paper", 3.0, 64, 0, True),
        ("small", 0.5, 8, 7, False),
    ]


def test_help_shows_the_values_of_the_chosen_preset(command, capsys):
    assert command(raising(AssertionError), "--preset", "paper", "--help") == 0
    text = capsys.readouterr().out
    assert re.search(r"--lr.*0\.25", text) and re.search(r"--gen-micro-batch.*\n?.*64", text)
    assert "Run:\n    python script.py" in text  # the docstring keeps its lines
    assert command(raising(AssertionError), "--help") == 0
    assert re.search(r"--lr.*0\.5", capsys.readouterr().out)


@pytest.mark.parametrize("words", [["--preset", "nope"], ["--preset"], ["--lrr", "3"], ["--lr", "fast"], ["stray"]])
def test_bad_command_lines_end_with_2(command, capsys, words):
    assert command(raising(AssertionError), *words) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out and (said.err + said.out).strip()
    if words == ["--preset", "nope"]:
        assert said.err == "error: --preset nope: unknown preset; choose one of: small, paper\n"


def test_a_preset_with_an_unknown_field_is_a_bug_of_the_script(command):
    with pytest.raises(AssertionError, match="'lrr'"):
        command(print, presets={"small": dict(lrr=3)})


IN_A_LOADER = """Caught UserError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "x.py", line 1, in f
common.run.UserError: a.jpg: bad"""


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("folder x: empty; fill it"), "error: folder x: empty; fill it\n"),
        (OSError(errno.ENOSPC, "No space left", "/data/a.png"), "error: disk full at /data/a.png; free some space"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "error: out of memory; halve --gen-micro-batch (now 8)"),
        (MemoryError(), "error: out of memory; halve --gen-micro-batch (now 8)"),
        (UserError(IN_A_LOADER), "error: a.jpg: bad\n"),
    ],
)
def test_errors_that_need_no_traceback(command, capsys, monkeypatch, error, line):
    monkeypatch.setattr(runs._state, "stage", "a stage that a run before this one in the same process died in")
    monkeypatch.setattr(runs._state, "memory_flag", "--of-another-script")
    assert command(raising(error)) == 2
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1


def test_out_of_memory_names_the_stage_and_its_flag(command, capsys, tmp_path):
    def main(args):
        run = runs.open_run("script", args, ONE, SPEED)
        with run.timed("draw", memory_flag="--gen-micro-batch"):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to")

    assert command(main, "--output-dir", str(tmp_path / "r")) == 2
    assert "out of memory in stage draw; halve --gen-micro-batch (now 8) and run" in capsys.readouterr().err


def test_other_errors_keep_their_traceback(command):
    with pytest.raises(ZeroDivisionError):
        command(lambda args: 1 / 0)


def test_importing_run_needs_no_torch():
    code = "import sys, common.run; assert 'torch' not in sys.modules and 'tyro' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- processes: signals, lock, kill --------------------------------------------------------

SCRIPT = """
'''A script with two stages.'''
import dataclasses, os, sys, time
sys.path.insert(0, {root!r})
from types import SimpleNamespace
from common import run as runs

runs.SECONDS_BETWEEN_SAVES = 0.1

@dataclasses.dataclass
class Args:
    preset: str = "p"
    '''name'''
    output_dir: str = "r"
    '''folder'''
    stages: tuple[str, ...] = ("draw", "learn")
    '''stages'''
    seconds: float = 0.0
    '''sleep in draw'''
    note: str = ""
    '''any text'''

def main(args):
    run = runs.open_run("s", args, SimpleNamespace(rank=0, world=1, main=True, device="cpu"), ("seconds",))
    if run.todo("draw"):
        with run.timed("draw"):
            first = not run.path("begun").exists()
            run.path("begun").write_text("")
            print("ready", flush=True)
            time.sleep(args.seconds if first else 0)
        run.done("draw", images=1)
    print("end", flush=True)

if __name__ == "__main__":
    runs.cli(main, Args, {{"p": {{}}}}, __doc__)
"""


@pytest.fixture
def script(tmp_path):
    """`script("--seconds", "60")` starts the script above and waits until it is at work -> Popen."""
    file = tmp_path / "a script.py"
    file.write_text(SCRIPT.format(root=str(ROOT)))
    started = []

    def start(*words, wait=True):
        process = subprocess.Popen(
            [sys.executable, str(file), *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        if wait:
            assert any("ready" in line for line in process.stdout), process.stderr.read()
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_prints_the_command_that_continues_it(script, tmp_path, number, code):
    process = script("--seconds", "60", "--note", "it's $HOME")
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in said
    line = re.search(r"stopped; continue with: (.*)\n", said).group(1)
    assert shlex.split(line)[1:] == [str(tmp_path / "a script.py"), "--seconds", "60", "--note", "it's $HOME"]
    assert not (tmp_path / "r" / ".lock").exists()

    again = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and again.stdout.endswith("end\n"), again.stderr
    third = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert third.stdout == "[1/2] draw: done, skipped\nend\n"


def test_a_second_signal_ends_at_once(tmp_path):
    code = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from common import run as runs
        runs._listen_to_signals(runs.launched_as())
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            print("cleaning", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for word in ("ready\n", "cleaning\n"):
        assert process.stdout.readline() == word
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and said.count("stopped; continue with:") == 1


def test_one_run_per_folder_and_kill_9_leaves_it_free(script, tmp_path):
    first = script("--seconds", "60")
    second = script("--seconds", "60", wait=False)
    out, said = second.communicate(timeout=30)
    assert second.returncode == 2 and out == ""
    assert re.fullmatch(rf"error: r: in use by process {first.pid} on .*; wait for it, .*\n", said)

    time.sleep(0.5)  # the running stage notes its seconds
    leftover = tmp_path / "r" / "images" / (runs.TEMPORARY + "abc")
    leftover.parent.mkdir()
    leftover.write_text("half")
    first.kill()
    first.wait()
    before = json.loads((tmp_path / "r/stages/draw.partial.json").read_text())["seconds"]
    assert before > 0.2

    third = script(wait=False)
    out, said = third.communicate(timeout=30)
    assert third.returncode == 0 and out.endswith("end\n"), said
    assert not leftover.exists()
    manifest = json.loads((tmp_path / "r/stages/draw.json").read_text())
    assert manifest["images"] == 1 and manifest["seconds"] >= before
    assert not (tmp_path / "r/stages/draw.partial.json").exists()


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_run(tmp_path):
    code = f"""
        import os, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from types import SimpleNamespace
        from common import run as runs
        run = runs.open_run("s", dict(output_dir="r"), SimpleNamespace(rank=0, world=1, main=True, device="cpu"))
        child = os.fork()
        if child:
            print(child, flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    with pytest.raises(UserError, match=f"process {process.pid} on "):
        runs.open_run("s", dict(output_dir=str(tmp_path / "r")), ONE, ("output_dir",))
    time.sleep(0.2)  # the child closes its copy just after the fork
    process.kill()
    process.wait()
    try:
        runs.open_run("s", dict(output_dir=str(tmp_path / "r")), ONE, ("output_dir",)).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_kill_9_during_writes_leaves_whole_files(tmp_path):
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from common import run as runs
        print("ready", flush=True)
        while True:
            for letter in (b"a", b"b"):
                runs.write_bytes("r/file", letter * 3_000_000)
    """
    for attempt in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        time.sleep(0.03 + 0.017 * attempt)
        process.kill()
        process.wait()
        if (tmp_path / "r/file").exists():
            data = (tmp_path / "r/file").read_bytes()
            assert len(data) == 3_000_000 and len(set(data)) == 1
    assert (tmp_path / "r/file").exists()


# ---- files ---------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    def fsync(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


def test_json_holds_plain_values(tmp_path):
    obj = {"a": Path("x/y"), "n": [float("nan"), float("inf"), 1.5], "t": torch.tensor([1, 2]), "s": np.float32(0.5)}
    runs.write_json(tmp_path / "new" / "f.json", {**obj, "args": Args(), "é": True, "zero": torch.tensor(3)})
    text = (tmp_path / "new" / "f.json").read_text()
    assert "é" in text and text.endswith("}\n")
    back = json.loads(text)
    assert back["a"] == "x/y" and back["n"] == [None, None, 1.5] and back["t"] == [1, 2] and back["s"] == 0.5
    assert back["args"]["stages"] == ["draw", "learn"] and back["zero"] == 3 and back["é"] is True


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, full_disk):
    (tmp_path / "f").write_text("old")
    with pytest.raises(UserError, match=f"disk full at {tmp_path}/f"):
        runs.write_bytes(tmp_path / "f", b"new")
    with pytest.raises(ZeroDivisionError), runs.atomic(tmp_path / "g") as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_a_real_full_device_is_explained(command, capsys):
    def main(args):
        with open("/dev/full", "w") as f:
            f.write("x")

    assert command(main) == 2
    assert capsys.readouterr().err.startswith("error: disk full")


def test_tensors_round_trip_with_equal_bytes(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "view": base[:, 1::2],
        "same": base[:, 1::2],
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "bf": torch.randn(3, dtype=torch.bfloat16),
        "half": torch.randn(2, 2).half(),
        "flag": torch.tensor([True, False, True]),
        "step": torch.tensor(7),
        "double": torch.randn(1, dtype=torch.float64),
        "none": torch.empty(0, 3),
        "grad": torch.nn.Parameter(torch.ones(2)),
        "it's \u00e9": torch.zeros(1, dtype=torch.int32),
    }
    meta = {str(i): f"\u00fc{i}" for i in range(8)}
    runs.save_tensors(tmp_path / "a.safetensors", tensors, meta)
    runs.save_tensors(tmp_path / "b.safetensors", dict(reversed(tensors.items())), dict(reversed(meta.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    for back in (runs.load_tensors(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")):
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    from safetensors import safe_open

    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        assert f.metadata() == meta
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_damaged_tensor_files_are_named(tmp_path):
    (tmp_path / "x").write_bytes(b"not a tensor file")
    with pytest.raises(UserError, match="x: not a readable"):
        runs.load_tensors(tmp_path / "x")
    with pytest.raises(UserError, match="gone: no such file"):
        runs.load_tensors(tmp_path / "gone")


def test_images_are_written_lossless(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 9, 7, 3), dtype=np.uint8)
    with runs.ImageWriter(threads=3, waiting=2) as writer:
        reused = np.empty((9, 7, 3), np.uint8)
        for k in range(20):
            reused[:] = pixels[k]
            writer.save(tmp_path / "c" / f"{k}.png", reused)
        for k in range(20, 39):
            writer.save(tmp_path / "c" / f"{k}.png", torch.from_numpy(pixels[k]).permute(2, 0, 1))
        writer.save(tmp_path / "c" / "39.png", Image.fromarray(pixels[39]))
    for k in range(40):
        with Image.open(tmp_path / "c" / f"{k}.png") as image:
            assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels[k])
    assert sorted(os.listdir(tmp_path / "c")) == sorted(f"{k}.png" for k in range(40))

    for stray in (runs.TEMPORARY + "1", "x.png", "-1.png", "7.jpg", "41.png.part", "\u00b2.png"):
        (tmp_path / "c" / stray).write_text("")
    assert runs.existing_images(tmp_path / "c") == set(range(40))
    assert runs.existing_images(tmp_path / "nowhere") == set()


def test_image_writer_reports_what_went_wrong(tmp_path, monkeypatch):
    image = np.zeros((2, 2, 3), np.uint8)
    (tmp_path / "1.png").mkdir()
    with pytest.raises(RuntimeError, match="1.png: cannot be written"), runs.ImageWriter() as writer:
        writer.save(tmp_path / "1.png", image)
    with pytest.raises(RuntimeError, match="1.png"), runs.ImageWriter(waiting=1) as writer:
        for _ in range(1000):  # far more than the queue holds: an error must not block save()
            writer.save(tmp_path / "1.png", image)
    with runs.ImageWriter() as writer, pytest.raises(AssertionError, match=r"float32 \(2, 2, 3\)"):
        writer.save(tmp_path / "2.png", np.zeros((2, 2, 3), np.float32))
    # The error of the block itself is the one that is raised; what was handed over is still written.
    with pytest.raises(KeyboardInterrupt), runs.ImageWriter() as writer:
        writer.save(tmp_path / "3.png", image)
        raise KeyboardInterrupt
    assert (tmp_path / "3.png").exists()


def test_image_writer_on_a_full_disk(tmp_path, full_disk):
    with pytest.raises(UserError, match="disk full at .*0.png"), runs.ImageWriter() as writer:
        writer.save(tmp_path / "0.png", np.zeros((2, 2, 3), np.uint8))
    assert os.listdir(tmp_path) == []


def test_image_writer_holds_few_images(tmp_path, monkeypatch):
    saved, real = [], Image.Image.save

    def save(self, *words, **more):
        time.sleep(0.01)
        real(self, *words, **more)
        saved.append(1)

    monkeypatch.setattr(Image.Image, "save", save)
    with runs.ImageWriter(threads=2, waiting=4) as writer:
        for k in range(40):
            writer.save(tmp_path / f"{k}.png", np.zeros((2, 2, 3), np.uint8))
            assert k + 1 - len(saved) <= 4 + 2 + 1  # waiting, in work, and the one being handed over
    assert len(saved) == 40


# ---- names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, expected",
    [
        ("sea lake", "sea_lake"),
        ("../../etc/passwd", "etc_passwd"),
        ("..", "class"),
        ("", "class"),
        ("a\x00b\nc\x1b[0m", "a_b_c_0m"),
        ("F-16A/B", "f_16a_b"),
        ("Caf\u00e9 cr\u00e8me", "cafe_creme"),
        ("\u624b\u6a5f", "\u624b\u6a5f"),
        ("<b>", "b"),
        ("x" * 300, "x" * 80),
        ("\u624b" * 300, "\u624b" * 26),
        ("a\u202eb", "a_b"),
    ],
)
def test_slug(name, expected):
    assert runs.slug(name) == expected
    assert len(runs.slug(name).encode()) <= 80


def test_class_folders_sort_in_label_order():
    assert runs.class_folders(["zero", "one"]) == ["00_zero", "01_one"]
    names = runs.class_folders([f"class {i}" for i in range(1000)])
    assert names == sorted(names) and names[7] == "007_class_7"
    assert runs.class_folders([str(i) for i in range(100)])[5] == "05_5"


@pytest.mark.parametrize("names", [["cat", "dog", "cat"], ["red/fox", "red fox"], ["Cat", "cat"]])
def test_two_classes_that_look_alike_are_refused(names):
    with pytest.raises(UserError, match="have the same name .*rename one"):
        runs.class_folders(names)


def test_metadata_lines(tmp_path):
    rows = [dict(file_name="00_a/0.png", label=0, prompt="an \u00e9\nx", score=torch.tensor(0.5)), dict(file_name="b")]
    runs.write_metadata(tmp_path / "images", rows)
    lines = (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["file_name"] for line in lines] == ["00_a/0.png", "b"]
    assert json.loads(lines[0])["score"] == 0.5 and "\u00e9" in lines[0]


# ---- the run folder ------------------------------------------------------------------------


def open_at(folder, dist=ONE, models=None, **flags):
    return runs.open_run("script", Args(output_dir=str(folder), **flags), dist, SPEED, models)


def contents(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest()) for path in files}


def test_args_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = runs.open_run("script", Args(seed=3), ONE, SPEED, models={"clip": "tiny@abc"})
    assert run.dir == Path("runs/script/small-seed3")
    info = json.loads(run.path("args.json").read_text())
    assert info == run.info
    assert info["args"]["seed"] == 3 and info["args"]["stages"] == ["draw", "learn"] and info["world"] == 1
    assert info["models"] == {"clip": "tiny@abc"} and info["script"] == "script" and info["command"]
    assert info["speed_flags"] == sorted(SPEED)
    assert {"python", "torch", "diffusers", "transformers", "open_clip_torch", "pillow"} <= set(info["versions"])
    assert "git_commit" in info and "git_dirty" in info


def test_git_commit_is_that_of_this_checkout_only(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    monkeypatch.setattr(runs, "ROOT", tmp_path.resolve())
    assert runs.git_commit() == {"git_commit": None, "git_dirty": None}  # no commit yet
    (tmp_path / "f").write_text("1")
    subprocess.run([*git, "add", "f"], check=True)
    subprocess.run([*git, "commit", "-qm", "m"], check=True)
    found = runs.git_commit()
    assert re.fullmatch("[0-9a-f]{40}", found["git_commit"]) and found["git_dirty"] is False
    (tmp_path / "f").write_text("2")
    assert runs.git_commit()["git_dirty"] is True
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(runs, "ROOT", tmp_path.resolve() / "inside")
    assert runs.git_commit()["git_commit"] is None


def test_other_method_flags_are_refused_flag_by_flag(tmp_path):
    run = open_at(tmp_path / "r", models={"clip": "a"})
    run.done("draw")
    run.close()
    before = contents(tmp_path)
    with pytest.raises(UserError) as error:
        open_at(tmp_path / "r", models={"clip": "b"}, lr=0.3, gen_micro_batch=4, stages=("draw",))
    text = str(error.value)
    assert re.search(r"--lr +0\.1 +0\.3", text) and re.search(r'model clip +"a" +"b"', text)
    assert "micro" not in text and "stages" not in text and "--output-dir" in text
    with pytest.raises(UserError, match="made by script, not by other"):
        runs.open_run("other", Args(output_dir=str(tmp_path / "r")), ONE, SPEED)
    with pytest.raises(UserError, match="holds a run already.*--no-resume"):
        open_at(tmp_path / "r", models={"clip": "a"}, resume=False)
    open_at(tmp_path / "r", models={"clip": "a"}, gen_micro_batch=4).close()  # speed flags may differ
    assert contents(tmp_path) == before


def test_a_run_that_did_nothing_does_not_occupy_its_folder(tmp_path):
    run = open_at(tmp_path / "r")
    with pytest.raises(UserError), run.timed("draw"):
        raise UserError("wrong --dataset")
    run.close()
    again = open_at(tmp_path / "r", lr=0.7, resume=False)
    assert json.loads(again.path("args.json").read_text())["args"]["lr"] == 0.7


def test_a_folder_that_is_no_run_folder_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="not empty and not a run folder"):
        open_at(tmp_path)
    assert contents(tmp_path) == before and os.listdir(tmp_path) == ["letter.txt"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "args.json").write_text('{"lr": 1}')
    with pytest.raises(UserError, match="not empty and not a run folder"):
        open_at(other)
    assert (other / "args.json").read_text() == '{"lr": 1}' and os.listdir(other) == ["args.json"]
    with pytest.raises(UserError, match="letter.txt: .*choose another --output-dir"):
        open_at(tmp_path / "letter.txt")


def test_unknown_speed_flags_are_a_bug_of_the_script(tmp_path):
    with pytest.raises(AssertionError, match="typo"):
        runs.open_run("s", dict(output_dir=str(tmp_path)), ONE, ("typo",))


def test_stages(tmp_path, capsys):
    run = open_at(tmp_path / "r")
    assert run.todo("draw") and run.manifest("draw") == {} and run.seconds() == {}
    with run.timed("draw"):
        time.sleep(0.05)
        assert run.seconds()["draw"] >= 0.05
    run.done("draw", images=3)
    assert not run.todo("draw") and run.manifest("draw")["images"] == 3
    with pytest.raises(KeyboardInterrupt), run.timed("learn"):
        time.sleep(0.1)
        raise KeyboardInterrupt
    run.close()

    capsys.readouterr()
    run = open_at(tmp_path / "r")
    assert not run.todo("draw") and not run.todo("draw") and run.todo("learn")
    with run.timed("learn"):
        time.sleep(0.1)
    run.done("learn")
    assert capsys.readouterr().out.startswith("[1/2] draw: done, skipped\n[2/2] learn\n[2/2] learn: 0.")
    assert list(run.seconds()) == ["draw", "learn"] and run.seconds()["learn"] >= 0.2
    assert sorted(os.listdir(run.path("stages"))) == ["draw.json", "learn.json"]


def test_metrics(tmp_path):
    run = open_at(tmp_path / "r")
    helper = runs.Run(run.dir, other_rank(1), "script", {})
    for step in (1, 2, 3):
        run.log(step, **{"train/loss": 1 / step, "train/lr": 0.1})
        helper.log(step, **{"train/loss": 1 / step, "train/other/loss": torch.tensor(2.0)})
    run.log(3, **{"train/loss": float("nan"), "test/top1": 50})
    with open(run.path("metrics.jsonl"), "a") as f:
        f.write('{"step": 4, "train/lo')  # killed while writing
    run.close()

    run = open_at(tmp_path / "r")
    run.log(3, **{"train/loss": 9.0})
    run.log(4, **{"train/loss": 8.0})
    found = runs.read_metrics(run.dir)
    assert found == {
        "train/loss": {1: 1.0, 2: 0.5, 3: 9.0, 4: 8.0},
        "train/lr": {1: 0.1, 2: 0.1, 3: 0.1},
        "test/top1": {3: 50.0},
        "train/other/loss": {1: 2.0, 2: 2.0, 3: 2.0},
    }
    run.done("draw")
    assert runs.read_metrics(run.dir) == found
    assert [path.name for path in run.dir.glob("metrics*")] == ["metrics.jsonl"]
    lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    pairs = [(key, line["step"]) for line in lines for key in line if key != "step"]
    assert len(pairs) == len(set(pairs))


def test_results(tmp_path):
    run = open_at(tmp_path / "r", seed=5)
    with run.timed("draw"):
        pass
    run.done("draw")
    run.results(paper="arXiv:0", metrics={"top1": 90.0}, baselines={}, images=10, dataset="digits")
    found = json.loads(run.path("results.json").read_text())
    assert set(found) == set("script paper dataset preset seed metrics baselines seconds images".split())
    assert found["seed"] == 5 and found["preset"] == "small" and list(found["seconds"]) == ["draw"]


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), torch.tensor(float("inf"))])
def test_a_loss_that_is_not_finite_stops_the_run(value):
    runs.check_finite(1e30, "here")
    with pytest.raises(UserError, match="learn, step 7: the loss is .*checkpoint is kept"):
        runs.check_finite(value, "learn, step 7")


# ---- dashboards ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wandb", "trackio", "tensorboard"])
def test_a_missing_dashboard_says_what_to_install(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if kind == "tensorboard" else kind, None)
    with pytest.raises(UserError, match=f"--track {kind}: .* pip install {kind}$"):
        runs.open_run("s", dict(output_dir=str(tmp_path / "r"), track=kind), ONE, ("output_dir", "track"))


def test_tensorboard_events(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = runs.open_run("s", dict(output_dir=str(tmp_path / "r"), track="tensorboard"), ONE, ("track",))
    run.log(3, **{"train/loss": 0.25})
    found = events.EventAccumulator(str(run.path("tensorboard"))).Reload()
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(3, 0.25)]


# ---- pictures ------------------------------------------------------------------------------


def picture(colour, size=(8, 8)):
    return Image.new("RGB", size, colour)


def test_samples_grid(tmp_path):
    rows = [[picture("red"), torch.zeros(3, 5, 9, dtype=torch.uint8)], [np.full((4, 4, 3), 255, np.uint8), None]]
    runs.samples_grid(tmp_path / "s.png", rows, ["real", "x" * 500], ["<b>", "\u044f" * 90], size=64)
    with Image.open(tmp_path / "s.png") as sheet:
        assert 2 * 64 < sheet.width < 2 * 64 + 260 and 2 * 64 < sheet.height < 220
        assert {colour for _, colour in sheet.getcolors(100_000)} >= {(255, 0, 0), (0, 0, 0), (255, 255, 255)}


def test_samples_grid_breaks_and_thins_out_many_columns(tmp_path):
    def sheet(n):
        runs.samples_grid(tmp_path / "s.png", [[picture("red")] * n], ["row"], [str(i) for i in range(n)], size=16)
        with Image.open(tmp_path / "s.png") as image:
            return image.size

    assert sheet(24)[0] == sheet(12)[0] and sheet(24)[1] > 1.8 * sheet(12)[1]
    assert sheet(1000) == sheet(96)


class Page(html.parser.HTMLParser):
    """Checks that tags close in order; collects text and what is loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.sources, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href", "action", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("n", [3, 30])
def test_report_is_one_safe_page(tmp_path, n):
    evil = '<b>&"</b><script>alert(1)</script>'
    names = [evil, *(f"class {i}" for i in range(1, n))]
    run = open_at(tmp_path / "r", models={"clip": evil})
    run.args["note"] = evil
    for step in range(1, 30):
        run.log(step, **{"learn/loss": 1 / step, f"learn/{evil}/top1": float(step), "learn/b/top1": 3.0})
    run.log(1, **{"test/top1": float("nan")})
    with run.timed("draw"):
        pass
    run.done("draw")
    runs.samples_grid(run.path("samples.png"), [[picture("red")] * n], ["real"], names)
    table = {evil: ([evil, "top-1"], [[evil, "93.1 \u00b1 0.4"], ["zero-shot", 50]])}
    counts = torch.eye(n, dtype=torch.long) * 7
    counts[0, 1] = 5
    runs.report(run, evil, evil, table, None, counts, names)

    text = run.path("report.html").read_text()
    found = Page(text)
    assert "script" not in found.tags and "b" in found.tags  # <b> is ours, in the time bars
    assert all(source.startswith("data:image/png;base64,") for source in found.sources) and found.sources
    assert "http" not in text.replace("http-equiv", "") and "url(" not in text
    words = "".join(found.text)
    assert evil in words and "93.1 \u00b1 0.4" in words and "prefers-color-scheme: dark" in text
    assert words.index("93.1") < words.index("learn: loss")  # the result comes first
    assert found.tags.count("svg") == 3 and "learn: top1" in words
    assert words.count("taken for") == (n > 20)


def test_axis_ticks_are_round_and_cover_the_values():
    for low, high in [(0, 1), (0.013, 0.0131), (-3, 5), (5, 5), (0, 0), (1e-6, 2e-3), (10, 12345)]:
        ticks = drawing._ticks(low, high)
        assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - abs(high) * 1e-9 and 1 <= len(ticks) <= 8


def test_print_table(capsys):
    runs.print_table(["set", "top-1"], [["real only", "93.1 \u00b1 0.4"], ["x", 5]])
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.index(word) for line, word in zip(lines, ["top-1", "-----", "93.1", "5"], strict=True)][0] == 11
    assert lines[3] == "x          5"
