"""Files and the run folder. Locks and kills are tried on real processes without torch."""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common import cli, files, metrics
from common import run as runs
from common.files import chunks, class_folders, class_range, load_tensors, read_json, save_tensors, slug, write_json
from common.launch import UserError
from common.run import Run, open_run

ROOT = Path(__file__).resolve().parents[1]
ONE = SimpleNamespace(rank=0, world=1, device="cpu", main=True, threads=2)  # stands for Dist, without torch


def dist(**changes):
    return SimpleNamespace(**{**vars(ONE), **changes})


@dataclass
class Args:
    preset: str = "small"
    output_dir: str | None = None
    seed: int = 0
    stages: tuple[str, ...] = ("draw", "learn")
    resume: bool = True
    track: str = "none"
    lr: float = 0.1
    gen_micro_batch: int = 8
    clf_model: str = "a"
    clf_lr: float = 1.0


def open_at(folder, where=ONE, models=None, later=None, pictures=None, **flags):
    args = Args(output_dir=str(folder), **flags)
    return open_run("script", args, where, ["gen_micro_batch"], models, later, pictures)


def contents(folder):
    found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest()) for path in found}


def in_a_process(code, cwd):
    """Start Python on the code -> Popen; it can import common."""
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", code], cwd=cwd, stdout=subprocess.PIPE, text=True)


# ---- files ---------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    def fsync(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


def test_json_holds_plain_values(tmp_path):
    obj = {"a": Path("x/y"), "n": [float("nan"), float("inf"), 1.5], "t": torch.tensor([1, 2]), "s": np.float32(0.5)}
    write_json(tmp_path / "new" / "f.json", {**obj, "args": Args(), "é": True, "zero": torch.tensor(3)})
    text = (tmp_path / "new" / "f.json").read_text()
    assert "é" in text and text.endswith("}\n")
    back = read_json(tmp_path / "new" / "f.json")
    assert back["a"] == "x/y" and back["n"] == [None, None, 1.5] and back["t"] == [1, 2] and back["s"] == 0.5
    assert back["args"]["stages"] == ["draw", "learn"] and back["zero"] == 3 and back["é"] is True


def test_json_keeps_names_that_are_no_unicode(tmp_path):
    write_json(tmp_path / "f.json", ["caf\udce9", "é"])
    assert read_json(tmp_path / "f.json") == ["caf\udce9", "é"]


@pytest.mark.parametrize("damage", [b"", b'{"a": 1', b"\xff\xfe", b"[" * 100_000])
def test_damaged_json_is_named(tmp_path, damage):
    (tmp_path / "f.json").write_bytes(damage)
    with pytest.raises(
        UserError, match=r"f\.json: damaged, not JSON .*; remove it and run the same command again"
    ) as e:
        read_json(tmp_path / "f.json")
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="gone.json: no such file"):
        read_json(tmp_path / "gone.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, full_disk):
    (tmp_path / "f").write_text("old")
    with pytest.raises(UserError, match=f"disk full at {tmp_path}/f"):
        files.write_bytes(tmp_path / "f", b"new")
    with pytest.raises(ZeroDivisionError), files.atomic(tmp_path / "g") as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_text() == "old"


@pytest.mark.parametrize("write", [files.write_bytes, lambda path, data: save_tensors(path, {"a": torch.zeros(9000)})])
def test_a_full_disk_is_one_line_whoever_writes(tmp_path, write):
    """Stood in for by a limit on the size of files; safetensors has errors of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(UserError, match=f"disk full at {tmp_path}/f; free some space"):
            write(tmp_path / "f", bytes(30_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not os.listdir(tmp_path)


def test_kill_9_during_writes_leaves_whole_files(tmp_path):
    code = """
        from common.files import write_bytes
        print("ready", flush=True)
        while True:
            for letter in (b"a", b"b"):
                write_bytes("r/file", letter * 3_000_000)
    """
    for attempt in range(6):
        process = in_a_process(code, tmp_path)
        process.stdout.readline()
        time.sleep(0.03 + 0.017 * attempt)
        process.kill()
        process.wait()
        if (tmp_path / "r/file").exists():
            data = (tmp_path / "r/file").read_bytes()
            assert len(data) == 3_000_000 and len(set(data)) == 1
    assert (tmp_path / "r/file").exists()
    files.remove_unfinished(tmp_path)
    assert os.listdir(tmp_path / "r") == ["file"]


def test_tensors_round_trip_with_equal_bytes(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "view": base[:, 1::2],
        "same": base[:, 1::2],
        "row": base[1],
        "tied": base,
        "tied too": base,
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "bf": torch.randn(3, dtype=torch.bfloat16),
        "flag": torch.tensor([True, False, True]),
        "step": torch.tensor(7),
        "none": torch.empty(0, 3),
        "empty": torch.empty(2, 0),
        "grad": torch.nn.Parameter(torch.ones(2)),
        "it's \u00e9": torch.zeros(1, dtype=torch.int32),
    }
    old = os.umask(0o027)
    save_tensors(tmp_path / "a.safetensors", tensors, '{"step": 3}')
    os.umask(old)
    save_tensors(tmp_path / "b.safetensors", dict(reversed(tensors.items())), '{"step": 3}')
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
    for back in (load_tensors(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")):
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor.detach()), name
    assert files.tensors_metadata(tmp_path / "a.safetensors") == '{"step": 3}'
    save_tensors(tmp_path / "c.safetensors", {"x": base})
    assert files.tensors_metadata(tmp_path / "c.safetensors") == ""
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors", "c.safetensors"]


def test_a_saved_network_is_loaded_to_be_used(tmp_path):
    saved, other = (torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)) for _ in range(2))
    save_tensors(tmp_path / "net.safetensors", saved.state_dict())
    net = files.loaded(other, tmp_path / "net.safetensors", torch.device("cpu"))
    assert all(torch.equal(x, saved.state_dict()[name]) for name, x in net.state_dict().items())
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("read", [load_tensors, files.tensors_metadata])
def test_damaged_tensors_are_named(tmp_path, read):
    save_tensors(tmp_path / "x", {"a": torch.zeros(100)})
    for keep in (0, 4, 60, 200):
        (tmp_path / "y").write_bytes((tmp_path / "x").read_bytes()[:keep])
        with pytest.raises(UserError, match="y: not a readable safetensors file"):
            read(tmp_path / "y")
    with pytest.raises(UserError, match="gone: no such file"):
        read(tmp_path / "gone")


def test_one_process_holds_a_lock(tmp_path, capsys, monkeypatch):
    release = files.lock(tmp_path / "l")
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
        files.lock(tmp_path / "l")
    release()
    release()
    assert not (tmp_path / "l").exists()
    files.lock(tmp_path / "l")()

    import fcntl

    def no_locks(fd, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    files.lock(tmp_path / "l")()
    assert "cannot be locked (No locks available); start only one run in it" in capsys.readouterr().out


# ---- names and lists -----------------------------------------------------------------------


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
        ("caf\udce9", "caf"),
    ],
)
def test_slug(name, expected):
    assert slug(name) == expected
    assert len(slug(name).encode()) <= 80


def test_class_folders_sort_in_label_order():
    assert class_folders(["zero", "one"]) == ["00_zero", "01_one"]
    names = class_folders([f"class {i}" for i in range(1000)])
    assert names == sorted(names) and names[7] == "007_class_7"
    assert class_folders([str(i) for i in range(100)])[5] == "05_5"
    assert class_folders(["C#", "C++", "Cat", "cat", "red/fox", "red fox"])[1::2] == ["01_c", "03_cat", "05_red_fox"]


def test_two_classes_of_one_name_are_refused():
    with pytest.raises(UserError, match="classes 0 and 2 have the same name 'cat'; rename one"):
        class_folders(["cat", "dog", "cat"])


def test_chunks_and_class_ranges():
    assert chunks(list("abcde"), 2) == [["a", "b"], ["c", "d"], ["e"]] and chunks([], 2) == []
    assert [list(class_range(7, 3, w)) for w in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]


def test_metadata_lines_are_written_as_they_come(tmp_path):
    def rows():
        yield dict(file_name="00_a/0.png", label=0, prompt="an \u00e9\nx", score=torch.tensor(0.5))
        assert os.listdir(tmp_path / "images") != ["metadata.jsonl"]
        yield dict(file_name="b\udce9")

    runs.write_metadata(tmp_path / "images", rows())
    lines = (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["file_name"] for line in lines] == ["00_a/0.png", "b\udce9"]
    assert json.loads(lines[0])["score"] == 0.5 and "\u00e9" in lines[0]


# ---- opening a run folder ------------------------------------------------------------------


def test_importing_run_needs_no_torch():
    code = "import sys, common.run; assert not {'torch', 'tyro', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_args_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = open_run("script", Args(seed=3), ONE, models={"clf_model": "tiny@abc"})
    assert run.dir == Path("runs/script/small-seed3")
    info = json.loads(run.path("args.json").read_text())
    assert info == run.info == json.loads(run.path(".args.json").read_text())
    assert info["args"]["seed"] == 3 and info["args"]["stages"] == ["draw", "learn"] and info["world"] == 1
    assert info["models"] == {"clf_model": "tiny@abc"} and info["script"] == "script" and info["command"]
    assert info["threads"] == 2 and re.fullmatch("[0-9a-f]{12}", info["id"])
    assert {"python", "torch", "diffusers", "transformers", "open_clip_torch", "pillow"} <= set(info["versions"])
    assert "git_commit" in info and "git_dirty" in info


def begun(folder, stage="draw", **more):
    """A run folder in which a stage is finished."""
    run = open_at(folder, **more)
    run.done(stage)
    run.close()


def test_other_method_flags_are_refused_flag_by_flag(tmp_path):
    begun(tmp_path / "r", models={"clf_model": "a"})
    before = contents(tmp_path)
    with pytest.raises(UserError) as error:
        open_at(tmp_path / "r", models={"clf_model": "b"}, lr=0.3, gen_micro_batch=4, stages=("draw",))
    text = str(error.value)
    assert 'r: made with --lr 0.1, now 0.3; what --clf-model names "a", now "b"; use' in text and "\n" not in text
    assert "micro" not in text and "stages" not in text and text.endswith("choose a new --output-dir")
    with pytest.raises(UserError, match="made by script, not by other"):
        open_run("other", Args(output_dir=str(tmp_path / "r")), ONE)
    with pytest.raises(UserError, match="holds a run already.*--no-resume"):
        open_at(tmp_path / "r", models={"clf_model": "a"}, resume=False)
    open_at(tmp_path / "r", models={"clf_model": "a"}, gen_micro_batch=4).close()  # speed flags may differ
    assert contents(tmp_path) == before


def test_flags_of_stages_to_come_may_change(tmp_path):
    later = {"learn": "clf_ lr", "report": "seed"}
    begun(tmp_path / "r", models={"clf_model": "a"}, later=later)
    changed = dict(clf_model="b", clf_lr=2.0, lr=0.3, models={"clf_model": "b"})
    run = open_at(tmp_path / "r", later=later, **changed)
    info = json.loads(run.path("args.json").read_text())
    assert info["args"]["clf_model"] == "b" and info["args"]["lr"] == 0.3 and info["models"] == {"clf_model": "b"}
    assert info == run.info == json.loads(run.path(".args.json").read_text())
    with pytest.raises(ZeroDivisionError), run.timed("learn"):
        1 / 0  # noqa: B018
    run.close()
    with pytest.raises(UserError, match='made with --lr 0.3, now 0.1; --clf-model "b", now "a"'):
        open_at(tmp_path / "r", later=later, **{**changed, "lr": 0.1, "clf_model": "a"})
    open_at(tmp_path / "r", later=later, seed=7, **changed)


def test_a_stage_that_ran_out_of_memory_before_it_made_anything_takes_a_smaller_batch(tmp_path):
    later = {"draw": "gen_", "learn": "clf_ lr"}
    begun(tmp_path / "r", later=later)
    for lr in (0.2, 0.05):  # both attempts die in the first step, so each may change the flag
        run = open_at(tmp_path / "r", later=later, lr=lr)
        with pytest.raises(MemoryError), run.timed("learn", "--lr", trains=True):
            raise MemoryError
        run.close()
    run = open_at(tmp_path / "r", later=later, lr=0.01)
    with pytest.raises(MemoryError), run.timed("learn", "--lr", trains=True):
        run.log(1, **{"learn/loss": 1.0})
        raise MemoryError
    run.close()
    with pytest.raises(UserError, match="made with --lr 0.01, now 0.1"):
        open_at(tmp_path / "r", later=later, lr=0.1)
    run = open_at(tmp_path / "r", later=later, lr=0.01)
    with run.timed("learn", "--lr", trains=True):
        run.log(1, **{"learn/loss": 1.0})
    run.done("learn")
    assert sorted(file.name for file in run.path("stages").iterdir()) == ["draw.json", "learn.json"]
    run.close()
    with pytest.raises(UserError, match="made with --lr 0.01, now 0.1"):
        open_at(tmp_path / "r", later=later, lr=0.1)


def test_a_flag_of_a_skipped_stage_cannot_change_after_a_later_stage(tmp_path):
    later = {"tune": "clf_lr", "learn": "lr"}
    begun(tmp_path / "r", stage="learn", later=later)
    with pytest.raises(UserError, match="--clf-lr"):
        open_at(tmp_path / "r", later=later, clf_lr=5.0)


def test_models_that_one_of_two_starts_does_not_read_are_no_difference(tmp_path):
    """Stage by stage: the captioner is looked at by the start that writes captions, the classifier by a later one."""
    begun(tmp_path / "r", models={"sd_model": "a", "captioner": "b"})
    run = open_at(tmp_path / "r", models={"sd_model": "a", "clf_model": "c"})
    known = {"sd_model": "a", "captioner": "b", "clf_model": "c"}
    assert run.info["models"] == json.loads(run.path("args.json").read_text())["models"] == known
    run.close()
    for other in ({"captioner": "x"}, {"clf_model": "x"}):  # what was read once is held to
        with pytest.raises(UserError, match="what --[a-z-]+ names"):
            open_at(tmp_path / "r", models={"sd_model": "a"} | other)


@pytest.mark.parametrize("now, allowed", [(2, True), (3, False)])
def test_the_number_of_threads_is_part_of_a_run_on_a_cpu(tmp_path, now, allowed):
    begun(tmp_path / "r")
    if allowed:
        return open_at(tmp_path / "r", dist(threads=now)).close()
    with pytest.raises(UserError, match="made with OMP_NUM_THREADS=2, now 3; use the same again"):
        open_at(tmp_path / "r", dist(threads=now))
    open_at(tmp_path / "r", dist(threads=now, device="cuda:0")).close()
    open_at(tmp_path / "r", dist(threads=now), stages=("draw",)).close()  # nothing is left to compute


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
    for text in ('{"lr": 1}', "[]", '{"script": "s", "args": 1, "models": {}}'):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "args.json").write_text(text)
        with pytest.raises(UserError, match="not empty and not a run folder"):
            open_at(tmp_path / "other")
        assert (tmp_path / "other" / "args.json").read_text() == text


@pytest.mark.parametrize("folder", ["letter.txt", "letter.txt/run", "x" * 300, "a\0b"])
def test_an_impossible_folder_is_one_line(tmp_path, folder):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="choose another --output-dir") as error:
        open_at(tmp_path / folder)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["letter.txt"]


@pytest.mark.parametrize("damage", ["", '{"script": "scr', None])
def test_damaged_flags_are_restored_from_their_copy(tmp_path, capsys, damage):
    begun(tmp_path / "r")
    good = (tmp_path / "r/args.json").read_bytes()

    def spoil(name):
        (tmp_path / "r" / name).unlink() if damage is None else (tmp_path / "r" / name).write_text(damage)

    spoil("args.json")
    with pytest.raises(UserError, match="made with --lr 0.1, now 0.9"):
        open_at(tmp_path / "r", lr=0.9)
    open_at(tmp_path / "r").close()
    assert "args.json was damaged; restored from .args.json" in capsys.readouterr().out
    assert (tmp_path / "r/args.json").read_bytes() == good
    spoil("args.json")
    spoil(".args.json")
    with pytest.raises(UserError, match="not a run folder" if damage is None else "damaged, and no copy"):
        open_at(tmp_path / "r")


def test_unknown_speed_flags_are_a_bug_of_the_script(tmp_path):
    with pytest.raises(AssertionError, match="typo"):
        open_run("s", dict(output_dir=str(tmp_path)), ONE, ("typo",))


# ---- one run in a folder -------------------------------------------------------------------

HOLD = """
    import os, time
    from types import SimpleNamespace
    from common import run as runs
    runs.SECONDS_BETWEEN_SAVES = 0.1
    dist = SimpleNamespace(rank=0, world=1, device="cpu", main=True, threads=2)
    run = runs.open_run("script", dict(output_dir="r", stages=["draw"]), dist)
    with run.timed("draw"):
        child = os.fork() if {fork} else 0
        if child or not {fork}:
            print("ready", child, flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("fork", [False, True])
def test_one_run_per_folder_and_kill_9_leaves_it_free(tmp_path, fork):
    """A loader process that was forked and outlives the run does not hold the folder."""
    first = in_a_process(HOLD.format(fork=fork), tmp_path)
    assert "draw" in first.stdout.readline()
    child = int(first.stdout.readline().split()[1])
    flags = dict(output_dir=str(tmp_path / "r"), stages=["draw"])
    with pytest.raises(UserError, match=rf"r: in use by process {first.pid} on .*; wait for it"):
        open_run("script", flags, ONE)
    time.sleep(0.5)  # the running stage notes its seconds
    leftover = tmp_path / "r" / "images" / (files.TEMPORARY + "abc")
    leftover.parent.mkdir()
    leftover.write_text("half")
    first.kill()
    first.wait()
    try:
        run = open_run("script", flags, ONE)
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
    assert run.seconds()["draw"] > 0.2 and not leftover.exists()
    with run.timed("draw"):
        pass
    run.done("draw")
    run.close()
    assert run.manifest("draw")["seconds"] > 0.2
    assert sorted(os.listdir(tmp_path / "r")) == [".args.json", "args.json", "images", "stages"]
    assert os.listdir(tmp_path / "r/stages") == ["draw.json"]


def test_a_folder_removed_under_a_run_ends_it_in_one_line(tmp_path, monkeypatch):
    run = open_at(tmp_path / "r")
    with pytest.raises(UserError, match=r"r: removed while the run was at work"), run.timed("draw"):
        shutil.rmtree(tmp_path / "r")
        run.log(1, **{"a/loss": 1.0})  # FileNotFoundError
    assert not (tmp_path / "r").exists()

    # A stage that touches nothing for hours hears of it too.
    said = []
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_SAVES", 0.05)
    monkeypatch.setattr(runs, "end_with", said.append)
    run = open_at(tmp_path / "r")
    with pytest.raises(UserError, match="removed"), run.timed("draw"):
        shutil.rmtree(tmp_path / "r")
        time.sleep(0.3)
    assert len(said) == 1 and "removed while the run was at work" in said[0] and not (tmp_path / "r").exists()


# ---- stages --------------------------------------------------------------------------------


def test_stages(tmp_path, capsys):
    run = open_at(tmp_path / "r")
    assert run.todo("draw") and run.manifest("draw") == {} and run.seconds() == {}
    with run.timed("draw", "--gen-micro-batch"):
        assert run.path("stages", "draw.partial.json").exists()  # begun from here on, even if killed now
        assert (cli._state.stage, cli._state.memory_flag) == ("draw", "--gen-micro-batch")
        time.sleep(0.05)
        assert run.seconds()["draw"] >= 0.05
    assert cli._state.stage == ""
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


def finished_with_files(folder):
    run = open_at(folder)
    for name in ("images/a.png", "images/b c.png", "w.bin"):
        files.write_bytes(run.path(name), name.encode() * 10)
    with run.timed("draw"):
        time.sleep(0.05)
    run.done("draw", files=[run.path("images/a.png"), "images/b c.png", Path("w.bin")], images=2)
    return run


@pytest.mark.parametrize("name", ["images/a.png", "images/b c.png", "w.bin"])
@pytest.mark.parametrize("damage", ["remove", "empty", "cut", "grow", "edit"])
def test_damaged_files_of_a_finished_stage_are_made_again(tmp_path, capsys, name, damage):
    run = finished_with_files(tmp_path / "r")
    assert run.check("draw") == [] and run.check("learn") == []
    seconds, file = run.manifest("draw")["seconds"], run.path(name)
    content = file.read_bytes()
    file.unlink()
    if damage != "remove":
        file.write_bytes({"empty": b"", "cut": content[:-1], "grow": content + b"x", "edit": content[::-1]}[damage])
    assert run.check("draw") == [name]
    assert run.todo("draw") and f"draw: {name} missing or damaged, made again" in capsys.readouterr().out
    assert not file.exists() and run.manifest("draw") == {} and run.seconds()["draw"] == seconds
    assert sum(path.is_file() for path in run.dir.rglob("*")) == 2 + 2 + 3  # the other two stay


def test_a_training_whose_weights_are_damaged_is_opened_again(tmp_path):
    """Its metrics.json, by which a script knows that it is finished, goes with them; those of others stay."""
    run = open_at(tmp_path / "r")
    for name in ("runs/a/weights.bin", "runs/a/metrics.json", "runs/b/weights.bin", "runs/b/metrics.json"):
        files.write_bytes(run.path(name), b"x")
    run.done("draw", files=run.under("runs"))
    run.path("runs/a/weights.bin").unlink()
    assert run.todo("draw") and sorted(run.under("runs")) == ["runs/b/metrics.json", "runs/b/weights.bin"]


@pytest.mark.parametrize("damage", ["manifest", "list cut", "list removed", "list of foreign names", "no dict"])
def test_a_damaged_manifest_opens_its_stage_again(tmp_path, damage):
    run = finished_with_files(tmp_path / "r")
    (tmp_path / "precious").write_text("years of work")
    manifest, listed = run.path("stages/draw.json"), run.path("stages/draw.files")
    if damage == "manifest":
        manifest.write_text('{"stage": "dr')
    elif damage == "no dict":
        manifest.write_text("null")
    elif damage == "list removed":
        listed.unlink()
    else:
        line = f"2 {'0' * 16} ../precious\0"
        listed.write_text(3 * line if "foreign" in damage else listed.read_text().split("\0")[0])
    assert run.todo("draw") and run.manifest("draw") == {}
    assert (tmp_path / "precious").read_text() == "years of work"
    run.done("draw", files=["w.bin"])
    assert not run.todo("draw") and run.check("draw") == []


def test_names_and_sizes_of_all_kinds_are_listed(tmp_path):
    """Large files by both ends; touched files are read again and found good; hidden ones are left out."""
    run = open_at(tmp_path / "r")
    names = ["a/new\nline.bin", "a/\udcff.bin", "a/b/large.bin", "one.bin"]
    for name in [*names, "a/.hidden", "a/.git/x"]:
        files.write_bytes(run.path(name), os.urandom(300_000 if "large" in name else 10))
    assert sorted(run.under("a", "one.bin", "nowhere")) == sorted(names)
    run.done("draw", files=run.under("a", "one.bin"))
    os.utime(run.path("a/b/large.bin"))
    assert run.check("draw") == []
    content = run.path("a/b/large.bin").read_bytes()
    for changed in (b"?" + content[1:], content[:-1] + b"?"):
        run.path("a/b/large.bin").write_bytes(changed)
        assert run.check("draw") == ["a/b/large.bin"]


def test_paths_in_a_folder_named_from_here_are_listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = open_at("r")
    files.write_bytes(run.path("a", "x"), b"x")
    assert list(run.under(run.path("a"), "a/x")) == ["a/x", "a/x"]
    run.done("draw", files=[run.path("a", "x")])
    assert run.manifest("draw")["n_files"] == 1 and run.check("draw") == []


def pictures(root, grey=(1, 2, 3)):
    """Two splits of small pictures: {"train": the first ones, "test": the last}"""
    from common.datasets import Images

    root.mkdir(exist_ok=True)
    for i, value in enumerate(grey):
        if value is not None:
            Image.new("L", (8, 8), value).save(root / f"{i}.png")
    n = len(grey) - 1
    train, test = ([f"{i}.png" for i in rows] for rows in (range(n), range(n, n + 1)))
    return dict(train=Images([0] * n, train, ["a"], root), val=None, test=Images([0], test, ["a"], root))


def test_a_run_begins_with_pictures_that_can_be_read_and_goes_on_with_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CLEANSYNTH_CACHE", str(tmp_path / "cache"))
    found = pictures(tmp_path / "d")
    (tmp_path / "d" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 2 images in .* are bad.*\n  1.png: an empty file"):
        open_at(tmp_path / "r", pictures=found)
    assert not (tmp_path / "r").exists()
    run = open_at(tmp_path / "r", pictures=pictures(tmp_path / "d"))
    assert run.notes == [] and run.path("data.safetensors").exists() and len(list((tmp_path / "cache").rglob("pic*")))
    run.close()

    open_at(tmp_path / "r", pictures=pictures(tmp_path / "d", (7, 2, 3))).close()  # nothing was done with the others
    run = open_at(tmp_path / "r", pictures=pictures(tmp_path / "d", (7, 2, 3)))
    run.done("draw")
    run.close()
    with pytest.raises(UserError, match=r"data set has changed since this run began: train: 1 .*'1.png'.*--output-dir"):
        open_at(tmp_path / "r", pictures=pictures(tmp_path / "d", (7, 9, 3)))
    open_at(tmp_path / "r", pictures=pictures(tmp_path / "d", (7, 2, 3))).close()


def test_pictures_in_two_splits_are_told_at_every_start_and_stand_in_the_report(tmp_path, capsys):
    for _ in range(2):
        run = open_at(tmp_path / "r", pictures=pictures(tmp_path / "d", (1, 2, 1)))
        line = "the same pictures in two splits: 1 of test are in train too ('2.png')"
        assert f"warning: {line}\n" in capsys.readouterr().out and run.notes == [line]
        run.done("draw")
        run.close()
    run.results(metrics={})
    assert json.loads(run.path("results.json").read_text())["notes"] == [line]


def test_a_damaged_record_of_the_pictures_is_made_again(tmp_path, capsys):
    for content in (None, b"", b"x" * 100):
        run = open_at(tmp_path / "r", pictures=pictures(tmp_path / "d"))
        run.done("draw")
        run.close()
        if content is not None:
            run.path("data.safetensors").write_bytes(content)
    open_at(tmp_path / "r", pictures=pictures(tmp_path / "d"))
    assert "data.safetensors: damaged, made again" in capsys.readouterr().out


def test_results(tmp_path):
    run = open_at(tmp_path / "r", seed=5)
    with run.timed("draw"):
        pass
    run.done("draw")
    run.results(paper="arXiv:0", metrics={"top1": 90.0}, baselines={}, images=10, dataset="digits")
    found = json.loads(run.path("results.json").read_text())
    assert set(found) == set("script paper dataset preset seed metrics baselines seconds images".split())
    assert found["seed"] == 5 and found["preset"] == "small" and list(found["seconds"]) == ["draw"]


# ---- metrics and dashboards ----------------------------------------------------------------


def test_metrics(tmp_path):
    run = open_at(tmp_path / "r")
    helper = Run(run.dir, dist(rank=1, main=False), "script", {})
    for step in (1, 2, 3):
        run.log(step, **{"train/loss": 1 / step, "train/lr": 0.1})
        helper.log(step, **{"train/loss": 1 / step, "train/other/loss": torch.tensor(2.0)})
    assert run.path("metrics.rank1.jsonl").exists()  # two processes never write into one file
    run.log(3, **{"train/loss": float("nan"), "test/top1": 50})
    with open(run.path("metrics.jsonl"), "ab") as f:
        f.write(b'hello\n[1]\n{"no": 1}\n{"step": "x", "a": 1}\n{"step": 1, "a": "b"}\n\xff\n\n7\n')
        f.write(b'{"step": 4, "train/lo')  # killed while writing
    run.close()

    run = open_at(tmp_path / "r")
    run.log(3, **{"train/loss": 9.0})
    run.log(4, **{"train/loss": 8.0})
    found = metrics.read(run.dir)
    assert found == {
        "train/loss": {1: 1.0, 2: 0.5, 3: 9.0, 4: 8.0},
        "train/lr": {1: 0.1, 2: 0.1, 3: 0.1},
        "test/top1": {3: 50.0},
        "train/other/loss": {1: 2.0, 2: 2.0, 3: 2.0},
    }
    run.done("draw")
    assert metrics.read(run.dir) == found
    assert [path.name for path in run.dir.glob("metrics*")] == ["metrics.jsonl"]
    lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    pairs = [(key, line["step"]) for line in lines for key in line if key != "step"]
    assert len(pairs) == len(set(pairs))
    run.close()
    before = contents(run.dir)
    open_at(tmp_path / "r").close()
    assert contents(run.dir) == before


@pytest.mark.parametrize("kind", ["wandb", "trackio", "tensorboard"])
def test_a_missing_dashboard_says_what_to_install(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if kind == "tensorboard" else kind, None)
    with pytest.raises(UserError, match=f"--track {kind}: .* pip install {kind}$"):
        open_at(tmp_path / "r", track=kind)


def test_tensorboard_events(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = open_at(tmp_path / "r", track="tensorboard")
    run.log(3, **{"train/loss": 0.25})
    found = events.EventAccumulator(str(run.path("tensorboard"))).Reload()
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(3, 0.25)]
