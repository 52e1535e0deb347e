"""The command line and the end of a process: flags, ranges, launchers, signals, one-line errors, in real processes."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from common import cli, launch
from common.cli import Count, Fraction, Frame, Natural, NonNegative, Positive, Range, Share
from common.launch import Launch, UserError, command_line, launched_as

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = (
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT GROUP_WORLD_SIZE GROUP_RANK ENVIRONMENT"
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """`environment(RANK=1)` sets variables of a launcher; all others of them are gone."""
    for name in os.environ:
        if name in [*VARIABLES, "ENVIRONMENT"] or name.startswith("SLURM_"):
            monkeypatch.delenv(name)

    def put(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return put


# ---- how the process was started -----------------------------------------------------------

FOUR = dict(RANK=3, LOCAL_RANK=1, WORLD_SIZE=4, LOCAL_WORLD_SIZE=2, MASTER_ADDR="n1", MASTER_PORT=29500)


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, Launch()),
        (FOUR, Launch(3, 1, 4, 2)),
        (dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1), Launch()),
        (dict(WORLD_SIZE=1), Launch()),
        (dict(SLURM_PROCID=0, SLURM_NTASKS=8, SLURM_JOB_ID=7), Launch()),  # python in a batch script, no srun
        (FOUR | dict(SLURM_PROCID=0, SLURM_STEP_NUM_TASKS=2), Launch(3, 1, 4, 2)),  # srun torchrun
    ],
)
def test_launchers_are_recognised(environment, variables, expected):
    environment(**variables)
    assert launched_as() == expected


@pytest.mark.parametrize(
    "variables, named",
    [
        (dict(RANK=0), "WORLD_SIZE is not"),
        (dict(WORLD_SIZE=4), "RANK"),
        (dict(WORLD_SIZE="four"), "WORLD_SIZE"),
        (dict(RANK=0, WORLD_SIZE=1), "LOCAL_RANK is not"),
        (FOUR | dict(RANK="x"), "RANK"),
        (FOUR | dict(RANK=4), "RANK=4 does not fit WORLD_SIZE=4"),
        (FOUR | dict(RANK=-1), "RANK"),
        (FOUR | dict(WORLD_SIZE=0), "WORLD_SIZE"),
        (FOUR | dict(LOCAL_RANK=2), "LOCAL_RANK=2 does not fit LOCAL_WORLD_SIZE=2"),
        (FOUR | dict(LOCAL_WORLD_SIZE=5), "LOCAL_WORLD_SIZE"),
        (FOUR | dict(MASTER_ADDR=""), "MASTER_ADDR"),
        (FOUR | dict(MASTER_PORT="ssh"), "MASTER_PORT"),
        (FOUR | dict(MASTER_PORT=70000), "MASTER_PORT"),
        (dict(SLURM_PROCID=0, SLURM_STEP_NUM_TASKS=2), "srun torchrun"),
    ],
)
def test_half_set_or_impossible_variables_are_named(environment, variables, named):
    environment(**variables)
    with pytest.raises(UserError, match=named) as error:
        launched_as()
    assert "\n" not in str(error.value)


def test_the_command_names_the_launcher_and_continues(environment, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--note", "a b", "--no-resume"])
    monkeypatch.setattr(sys, "orig_argv", ["python", *sys.argv])
    assert command_line() == "python x.py --note 'a b'"
    environment(**FOUR | dict(WORLD_SIZE=2, RANK=0, GROUP_WORLD_SIZE=1))
    torchrun = f"{sys.executable} -m torch.distributed.run --nproc-per-node=2"
    assert command_line() == f"{torchrun} --standalone x.py --note 'a b'"
    environment(WORLD_SIZE=4, GROUP_WORLD_SIZE=2, GROUP_RANK=1)
    many = "--nnodes=2 --node-rank=1 --master-addr=n1 --master-port=29500"
    assert command_line() == f"{torchrun} {many} x.py --note 'a b'"


def test_git_commit_is_that_of_this_checkout_only(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    monkeypatch.setattr(launch, "ROOT", tmp_path.resolve())
    assert launch.git_commit() == {"git_commit": None, "git_dirty": None}  # no commit yet
    (tmp_path / "f").write_text("1")
    subprocess.run([*git, "add", "f"], check=True)
    subprocess.run([*git, "commit", "-qm", "m"], check=True)
    found = launch.git_commit()
    assert re.fullmatch("[0-9a-f]{40}", found["git_commit"]) and found["git_dirty"] is False
    (tmp_path / "f").write_text("2")
    assert launch.git_commit()["git_dirty"] is True
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(launch, "ROOT", tmp_path.resolve() / "inside")
    assert launch.git_commit()["git_commit"] is None


# ---- flags and their ranges ----------------------------------------------------------------


@dataclass
class Args(Frame):
    stages: tuple[Literal["draw", "learn"], ...] = ("draw", "learn")
    """stages to run"""
    shots: Count = 16
    """k"""
    crops: Natural = 0
    """crops"""
    seeds: tuple[Count, ...] = (1, 2)
    """seeds"""
    keep: Share = 0.5
    """share kept"""
    val: Fraction = 0.2
    """share for validation"""
    lr: Positive = 0.1
    """learning rate"""
    decay: NonNegative = 0.0
    """decay"""
    guidance: Annotated[float, Range(-100, 100)] = 2.0
    """w"""
    betas: tuple[Share, Share] = (0.9, 1.0)
    """two shares"""
    limit: Count | None = None
    """at most so many"""
    plain: float = 0.0
    """any finite number"""
    gen_micro_batch: Count = 8
    """images per forward pass"""


PRESETS = {"digits": dict(lr=0.5), "paper": dict(lr=0.25, gen_micro_batch=64)}


@pytest.fixture
def command(monkeypatch):
    """`command(main, "--lr", "3")` runs parse and start in this process -> exit code; handlers are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = dict(vars(cli._state))

    def call(main, *words, presets=PRESETS):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        try:
            cli.start(main, cli.parse(Args, presets, "A script.\n\nRun:\n    python script.py\n"))
        except SystemExit as end:
            return end.code
        return 0

    yield call
    vars(cli._state).update(before)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def raising(error):
    def main(args):
        raise error

    return main


def test_presets_and_flags(command):
    seen = []
    for words in ([], ["--preset", "paper"], ["--preset=paper", "--lr", "3"], ["--seed", "7", "--no-resume"]):
        assert command(seen.append, *words) == 0
    assert [(a.preset, a.lr, a.gen_micro_batch, a.seed, a.resume) for a in seen] == [
        ("digits", 0.5, 8, 0, True),
        ("paper", 0.25, 64, 0, True),
        ("paper", 3.0, 64, 0, True),
        ("digits", 0.5, 8, 7, False),
    ]


def test_plan_alone_means_an_h100(command, environment):
    seen = []
    for words in ([], ["--plan"], ["--plan", "--seed", "1"], ["--plan", "cpu"], ["--plan=l4"]):
        assert command(seen.append, *words) == 0
    assert [a.plan for a in seen] == [None, "h100", "h100", "cpu", "l4"]
    environment(WORLD_SIZE=8)  # what to plan for, not who we are
    assert command(seen.append, "--plan") == 0
    assert command(seen.append) == 2


def test_every_accelerator_of_the_plan_can_be_asked_for():
    from common.plan import ACCELERATORS

    assert {*typing.get_args(typing.get_args(Frame.__annotations__["plan"])[0])} == {*ACCELERATORS}


def test_only_rank_0_prints_the_help(command, environment, capsys):
    environment(**FOUR)
    assert command(raising(AssertionError), "--help") == 0 and capsys.readouterr().out == ""


def test_help_shows_the_values_of_the_preset_and_the_ranges(command, capsys):
    assert command(raising(AssertionError), "--preset", "paper", "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "default: 0.25; above 0)" in text and "(default: 64; at least 1)" in text
    for field, limits in {
        "--keep FLOAT": "0.5; at least 0 and at most 1",
        "--val FLOAT": "0.2; at least 0 and below 1",
        "--limit {None}|INT": "None; at least 1",
        "--seeds [INT [INT ...]]": "1 2; at least 1",
        "--workers INT": "8; at least 0",
    }.items():
        assert re.search(re.escape(field) + r"[^(]*\(default: " + re.escape(limits) + r"\)", text), field
    assert command(raising(AssertionError), "--help") == 0
    text = capsys.readouterr().out
    assert "0.5; above 0" in text and "Run:\n    python script.py" in text  # the docstring keeps its lines


@pytest.mark.parametrize(
    "words, line",
    [
        ("--shots 0", "--shots 0: must be at least 1"),
        ("--shots 1e12", "Error parsing --shots: invalid literal for int() with base 10: '1e12'; see --help"),
        ("--crops -1", "--crops -1: must be at least 0"),
        ("--seeds 3 0", "--seeds 0: must be at least 1"),
        ("--keep 1.01", "--keep 1.01: must be at least 0 and at most 1"),
        ("--val 1", "--val 1.0: must be at least 0 and below 1"),
        ("--lr 0", "--lr 0.0: must be above 0"),
        ("--lr inf", "--lr inf: must be a finite number, below 2^63"),
        ("--decay nan", "--decay nan: must be at least 0"),
        ("--decay -1e-9", "--decay -1e-09: must be at least 0"),
        ("--guidance 100.5", "--guidance 100.5: must be at least -100 and at most 100"),
        ("--betas 0.5 2", "--betas 2.0: must be at least 0 and at most 1"),
        ("--limit 0", "--limit 0: must be at least 1"),
        ("--plain nan", "--plain nan: must be a finite number, below 2^63"),
        ("--plain -inf", "--plain -inf: must be a finite number, below 2^63"),
        ("--plain 1e30", "--plain 1e+30: must be a finite number, below 2^63"),
        ("--seed 99999999999999999999", "--seed 99999999999999999999: must be a finite number, below 2^63"),
        ("--preset nope", "--preset nope: unknown preset; choose one of: digits, paper"),
        ("--preset", "Missing value for argument '--preset'. Expected 1 values; see --help"),
        ("--shot 3", "Unrecognized options: --shot, 3 (perhaps --shots); see --help"),
        ("--lr fast", "Error parsing --lr: could not convert string to float: 'fast'; see --help"),
        ("stray", "Unrecognized options: stray; see --help"),
        (
            "--stages paint",
            "invalid choice 'paint' for argument '--stages'. Expected one of ('draw', 'learn'); see --help",
        ),
    ],
)
def test_wrong_flags_end_with_one_line_and_2(command, capsys, words, line):
    assert command(raising(AssertionError), *words.split()) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {line}") and said.err.count("\n") == 1 and said.out == ""


def test_limits_include_what_they_say():
    cli.check(Args(shots=1, keep=1.0, val=0.0, lr=1e-9, guidance=-100.0, betas=(0.0, 1.0), limit=None, plain=-1e18))
    for name, value in dict(shots=0, keep=-0.1, val=1.0, lr=0.0, guidance=-101.0, betas=(1.1, 1.0), limit=0).items():
        with pytest.raises(UserError, match=cli.flag(name)):
            cli.check(Args(**{name: value}))


def test_a_preset_with_an_unknown_field_is_a_bug_of_the_script(command):
    with pytest.raises(AssertionError, match="'lrr'"):
        command(print, presets={"digits": dict(lrr=3)})


# ---- how a run ends ------------------------------------------------------------------------

IN_A_LOADER = """Caught UserError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "x.py", line 1, in f
common.launch.UserError: a.jpg: bad"""


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("folder x: empty; fill it"), "error: folder x: empty; fill it\n"),
        (OSError(errno.ENOSPC, "No space left", "/data/a.png"), "error: disk full at /data/a.png; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/a.png"), "error: /data/a.png: Permission denied; "),
        (RuntimeError("CUDA out of memory. Tried"), "error: out of memory; halve --gen-micro-batch (now 8)"),
        (MemoryError(), "error: out of memory; halve --gen-micro-batch (now 8)"),
        (UserError(IN_A_LOADER), "error: a.jpg: bad\n"),
    ],
)
def test_errors_that_need_no_traceback(command, capsys, monkeypatch, error, line):
    cli.set_stage("a stage that a run before this one in the same process died in", "--of-another-script")
    assert command(raising(error)) == 2
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1


def test_out_of_memory_in_a_stage_that_has_made_something(command, capsys):
    def main(args):
        cli.set_stage("draw", "--gen-micro-batch", begun=True)
        raise MemoryError

    assert command(main) == 2
    said = capsys.readouterr().err
    assert "free some of it" in said and "halve --gen-micro-batch (now 8) in a new --output-dir" in said


def test_out_of_memory_with_nothing_left_to_halve(command, capsys, monkeypatch):
    monkeypatch.setattr(cli._state, "batches", {})

    def main(args):
        cli._state.batches = {"--gen-micro-batch": 1, "--net-batch": 8}
        cli.set_stage("draw", "--gen-micro-batch")
        raise MemoryError

    assert command(main) == 2
    said = capsys.readouterr().err
    assert "in stage draw; start more processes" in said and "halve" not in said and "(now 1)" not in said


def test_out_of_memory_names_the_stage_and_its_flag(command, capsys):
    def main(args):
        cli.set_stage("draw", "--gen-micro-batch")
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to")

    assert command(main, "--no-resume") == 2
    said = capsys.readouterr().err
    assert "out of memory in stage draw; halve --gen-micro-batch (now 8) and run" in said
    assert said.endswith("run the same command again, without --no-resume\n")  # which would refuse the folder


@pytest.mark.parametrize("error", [ZeroDivisionError(), FileNotFoundError(errno.ENOENT, "?", "x"), BrokenPipeError()])
def test_other_errors_keep_their_traceback(command, error):
    with pytest.raises(type(error)):
        command(raising(error))


def test_another_thread_can_end_the_run(command, capsys):
    def main(args):
        cli.end_with("the disk is gone")
        time.sleep(10)

    assert command(main) == 2 and capsys.readouterr().err == "error: the disk is gone\n"


SCRIPT = """
'''A script with 70 flags.'''
import sys
sys.path.insert(0, {root!r})
from dataclasses import dataclass
from typing import Annotated
from common.cli import Count, Frame, Range, parse, start

@dataclass
class Args(Frame):
{fields}
    note: str = ""
    '''what main does'''

if __name__ == "__main__":
    ARGS = parse(Args, {{"digits": {{}}}}, __doc__)
    assert not {{"torch", "numpy", "PIL"}} & set(sys.modules)

import time
from common.launch import UserError

if __name__ == "__main__" and ARGS.note == "import":
    print("ready", flush=True)
    time.sleep(60)

def main(args):
    print("ready", flush=True)
    if args.note == "sleep":
        time.sleep(60)
    elif args.note == "clean":
        try:
            print("at work", flush=True)
            time.sleep(60)
        finally:
            print("cleaning", flush=True)
            try:
                time.sleep(60)
            except BaseException:  # as some libraries do
                time.sleep(60)
    elif args.note == "del":
        class Library:
            def __del__(self):
                print("at work", flush=True)
                time.sleep(60)  # what is raised here Python drops
        Library()
        print("not stopped", flush=True)
    elif args.note == "write":
        for k in range(100000):
            print("line", k, flush=True)
    elif args.note == "accent":
        print("93.1 \\u00b1 0.4 \\udce9", flush=True)
        raise UserError("caf\\u00e9 \\udce9")

if __name__ == "__main__":
    start(main, ARGS)
"""
FIELDS = "\n".join(
    f"    x{i}: Count = {i + 1}\n    '''number {i} of many, with a help text of some length'''" for i in range(60)
)


@pytest.fixture
def script(tmp_path):
    """`script("--note", "sleep")` starts the script above and waits until it says ready -> Popen."""
    file = tmp_path / "a script.py"
    file.write_text(SCRIPT.format(root=str(ROOT), fields=FIELDS))
    started = []

    def start(*words, wait=True, before=(sys.executable,), **env):
        process = subprocess.Popen(
            [*before, str(file), *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONUNBUFFERED": "", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
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


def test_help_answers_at_once(script):
    """Under 2 s on one core, without torch; what costs time is tyro and the interpreter's start."""
    begin = time.process_time(), os.times()
    process = script("--help", wait=False)
    out, said = process.communicate(timeout=60)
    spent = os.times().children_user + os.times().children_system - begin[1].children_user - begin[1].children_system
    assert process.returncode == 0 and said == "" and "--x59" in out and "--plan" in out
    assert spent < 2


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("when", ["import", "sleep"])
def test_a_stopped_run_prints_the_command_that_continues_it(script, tmp_path, number, code, when):
    process = script("--note", when, "--output-dir", "it's $HOME", "--no-resume")
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code and said.count("\n") == 2
    line = re.search(r"stopped; continue with: (.*)\n", said).group(1)
    assert shlex.split(line)[1:] == [str(tmp_path / "a script.py"), "--note", when, "--output-dir", "it's $HOME"]
    again = subprocess.run(line.replace(when, "end"), shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout == "ready\n"


def test_a_second_signal_ends_at_once(script):
    process = script("--note", "clean", ENVIRONMENT="BATCH")
    for word in ("at work\n", "cleaning\n"):
        assert process.stdout.readline() == word
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and said.count("stopped; submit the job again, or continue with:") == 1


def test_a_signal_inside_a_destructor_is_not_lost(script):
    process = script("--note", "del")
    assert process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=20)
    assert process.returncode == 130 and out == "" and "Traceback" not in said and said.count("continue with:") == 1


@pytest.mark.parametrize("words", [["--note", "write"], ["--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_gets_no_traceback(script, words, unbuffered):
    process = script(*words, wait=False, PYTHONUNBUFFERED=unbuffered)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=30) in (0, 141)


def test_a_terminal_that_knows_ascii_only(script):
    process = script("--note", "accent", wait=False, PYTHONIOENCODING="ascii")
    out, said = process.communicate(timeout=30)
    assert process.returncode == 2 and out == "ready\n93.1 ? 0.4 ?\n" and said == "error: caf? ?\n"


def test_many_processes_say_one_thing(script):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = script("--x3", "0", wait=False, before=torchrun)
    out, said = process.communicate(timeout=100)
    # torchrun turns any failure into 1 and adds its own report; our processes say one line.
    ours = said.split("torch/distributed")[0]
    assert process.returncode == 1 and out == "" and said.count("error: --x3 0: must be at least 1\n") == 1, said
    assert "rank 1:" not in ours and "Traceback" not in ours


def test_torchrun_can_be_continued(script, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = script("--note", "sleep", "--no-resume", before=torchrun)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=100)
    line = re.search(r"stopped; continue with: (.*)\n", said).group(1)
    assert said.count("stopped;") == 1 and "no-resume" not in line
    assert shlex.split(line) == [*torchrun, str(tmp_path / "a script.py"), "--note", "sleep"]
