"""Processes: the same sums, seeds and shares of work for any number of them, started in every way there is."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import free_port

from common import distributed as D
from common import meeting
from common.cli import command_line
from common.launch import Launch, UserError, launched_as

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
ONE = D.Dist(0, 0, 1, CPU)
LIMIT = 300  # seconds for processes that take ten on a free machine
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """`environment(RANK=1, ...)`: these variables of a launcher and no others."""
    for name in [name for name in os.environ if name in LAUNCHER or name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def put(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return put


# ---- seeds and shares ----------------------------------------------------------------------


def test_seeds_are_the_same_everywhere():
    # The first 8 bytes of what sha256sum prints for [0,3,17], ["crop","a/\\u00e9.jpg"] and [], shifted right by one.
    assert D.seed_of(0, 3, 17) == 0xC46D5AC3F07F5DAA >> 1
    assert D.seed_of("crop", "a/\u00e9.jpg") == 0xE82B9D25763D14CC >> 1
    assert D.seed_of() == 0x4F53CDA18C2BAA0C >> 1


def test_seeds_tell_their_parts_apart():
    parts = [(1, 2), (2, 1), ("1", 2), (12,), ("1,2",), ("ab", "c"), ("a", "bc"), ("abc",), (-1,), (1, 2, 0), ()]
    seeds = {D.seed_of(*p) for p in parts} | {D.seed_of(0, c, k) for c in range(100) for k in range(100)}
    assert len(seeds) == len(parts) + 10_000 and all(0 <= seed < 2**63 for seed in seeds)
    assert D.seed_of(torch.tensor(3), True) == D.seed_of(3, 1)
    with pytest.raises(TypeError):
        D.seed_of(0.5)


def test_generators_draw_the_same_numbers_again():
    a, b, c = (torch.randn(5, generator=D.generator(*p)) for p in [(0, "x"), (0, "x"), (0, "y")])
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert D.generator(0).device == CPU


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_item_has_one_owner(world):
    items = list(range(7))
    shares = [D.my_items(items, D.Dist(rank, 0, world, CPU)) for rank in range(world)]
    assert sorted(sum(shares, [])) == items and max(map(len, shares)) - min(map(len, shares)) <= 1


# ---- launchers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, Launch()),
        (
            dict(RANK=3, LOCAL_RANK=1, WORLD_SIZE=4, LOCAL_WORLD_SIZE=2, MASTER_ADDR="n", MASTER_PORT=1),
            Launch(3, 1, 4, 2),
        ),
        (
            dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1, SLURM_PROCID=5, SLURM_STEP_NUM_TASKS=8),
            Launch(),
        ),
        (dict(SLURM_PROCID=0, SLURM_NTASKS=8, SLURM_STEP_NUM_TASKS=1), Launch()),  # a shell of an interactive job
        (dict(WORLD_SIZE=1), Launch()),
    ],
)
def test_launchers_are_recognised(environment, variables, expected):
    environment(**variables)
    assert launched_as() == expected


@pytest.mark.parametrize(
    "variables, word",
    [
        (dict(WORLD_SIZE=8), "RANK is not"),
        (dict(RANK=0), "WORLD_SIZE is not"),
        (dict(RANK=0, WORLD_SIZE=2), "LOCAL_RANK is not"),
        (dict(RANK="x", WORLD_SIZE=2, LOCAL_RANK=0), "RANK='x'"),
        (dict(RANK=0, WORLD_SIZE=0, LOCAL_RANK=0), "WORLD_SIZE='0'"),
        (dict(RANK=2, WORLD_SIZE=2, LOCAL_RANK=0), "RANK=2 does not fit WORLD_SIZE=2"),
        (dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0), "MASTER_ADDR is not"),
        (dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="n", MASTER_PORT=99999), "MASTER_PORT=99999"),
        (dict(SLURM_PROCID=3, SLURM_STEP_NUM_TASKS=8), "srun torchrun"),
    ],
)
def test_impossible_launches_are_told(environment, variables, word):
    environment(**variables)
    with pytest.raises(UserError, match=word):
        launched_as()


def test_the_resume_command_names_the_launcher(environment, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--note", "a b", "--no-resume"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "x.py", "--note", "a b", "--no-resume"])
    assert command_line() == "python x.py --note 'a b'"
    environment(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, GROUP_WORLD_SIZE=1)
    environment(MASTER_ADDR="n1", MASTER_PORT=29500)
    torchrun = f"{sys.executable} -m torch.distributed.run --nproc-per-node=2"
    assert command_line() == f"{torchrun} --standalone x.py --note 'a b'"
    environment(WORLD_SIZE=4, GROUP_WORLD_SIZE=2, GROUP_RANK=1)
    many = f"{torchrun} --nnodes=2 --node-rank=1 --master-addr=n1 --master-port=29500 x.py --note 'a b'"
    assert command_line() == many


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cpu:1", "", "cuda:99"])
def test_bad_devices(environment, name):
    with pytest.raises(UserError, match="--device|GPU 99 does not exist"):
        D.setup_distributed(name)


def test_devices(environment, monkeypatch):
    assert D.setup_distributed("cpu") == ONE and ONE.main and not D.Dist(1, 1, 2, CPU).main
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    pick = D._pick_device
    assert pick("cuda:2", Launch()) == torch.device("cuda:2") and pick("auto", Launch()) == torch.device("cuda:0")
    assert pick("cuda", Launch(5, 1, 8, 4)) == torch.device("cuda:1")
    with pytest.raises(UserError, match="GPU 7 does not exist, this machine has 4; start at most 4"):
        pick("cuda", Launch(4, 4, 8, 8))
    with pytest.raises(UserError, match="take one GPU each"):
        pick("cuda:1", Launch(1, 1, 2, 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick("auto", Launch()) == CPU
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"--device {name}: .* use --device cpu"):
            pick(name, Launch())


def test_kernels_of_cudnn_are_deterministic_unless_told_otherwise(environment, monkeypatch):
    environment()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    cudnn = torch.backends.cudnn
    for name in ("benchmark", "deterministic"):
        monkeypatch.setattr(cudnn, name, False)  # put back at the end
    D.setup_distributed("cuda")
    assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
    D.setup_distributed("cuda", deterministic=False)
    assert (cudnn.benchmark, cudnn.deterministic) == (True, False)


# ---- collectives ---------------------------------------------------------------------------


def fail():
    raise UserError("no such folder")


def collectives(rank, world, port, out):
    """Runs in each process of test_collectives; says what went wrong through the exit code and `out`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist = D.setup_distributed("cpu")
    assert dist == D.Dist(rank, rank, world, CPU)

    assert D.on_rank_0(lambda: rank, dist) == 0
    for _ in range(2):  # the error of rank 0 is everybody's, and the processes can go on
        with pytest.raises(UserError, match="no such folder"):
            D.on_rank_0(fail, dist)
    rows = torch.arange(rank * rank * 2).reshape(rank * rank, 2) + 100 * rank  # 0, 1, 4 rows
    gathered = D.gather_rows(rows, dist)
    expected = [torch.arange(r * r * 2).reshape(r * r, 2) + 100 * r for r in range(world)]
    assert torch.equal(gathered, torch.cat(expected))
    assert D.gather_rows(torch.empty(0, 3), dist).shape == (0, 3)
    flags = D.gather_rows(torch.tensor([rank == 0] * (1 + rank)), dist)
    assert flags.dtype == torch.bool and flags.tolist() == [True] + [False] * (len(flags) - 1)
    assert D.broadcast_object({"from": rank} if dist.main else None, dist) == {"from": 0}
    assert D.all_gather_object((rank, "x"), dist) == [(r, "x") for r in range(world)]
    if dist.main:
        time.sleep(0.2)
        Path(out, "written").write_text("")
    D.barrier(dist)
    assert Path(out, "written").exists()

    for size in (10, 7):  # a bar that all fill together, and the next one
        bar = D.progress(size * world, "together", dist, together=True)
        for _ in range(size):
            bar.update(1)
        D.barrier(dist)
        bar.update(0)
        assert bar.n == (size * world if dist.main else 0)
        bar.close()

    # A rank that works for itself calls itself rank 0; it still shows no bar.
    alone = D.Dist(0, rank, 1, CPU)
    assert D.progress(10, "x", alone).disable == (rank != 0)
    Path(out, f"ok{rank}").write_text("")
    D.cleanup(dist)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_collectives(world, tmp_path, forks):
    port = free_port()
    ranks = [forks.Process(target=collectives, args=(rank, world, port, str(tmp_path))) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * world
    assert sorted(path.name for path in tmp_path.glob("ok*")) == [f"ok{rank}" for rank in range(world)]


def waiting(rank, world, port, do, pipe):
    """One process waits in a barrier or works alone, while another is late, leaves in order or dies without a word."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(pipe.fileno(), 2)
    meeting.LOST_SECONDS = 0.5
    dist = D.setup_distributed("cpu")
    timeout = torch.distributed.distributed_c10d._get_default_group()._get_backend(CPU).options._timeout
    assert timeout.days >= 1, "a process may work for hours while the others wait"
    D.barrier(dist)  # all have come: a death during the greeting is another matter
    if do == "late":
        if rank == 1:
            time.sleep(1.5)
        D.barrier(dist)
        D.cleanup(dist)
        time.sleep(0 if rank else 1.5)  # rank 0 outlives the others, which took their leave
    elif rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    elif do == "alone":
        time.sleep(60)


@pytest.mark.parametrize("do, codes", [("late", [0, 0, 0]), ("alone", [2, -9, 2])])
def test_death_is_told_apart_from_silence(forks, do, codes):
    port, (read, write) = free_port(), multiprocessing.Pipe(duplex=False)
    ranks = [forks.Process(target=waiting, args=(rank, 3, port, do, write)) for rank in range(3)]
    for process in ranks:
        process.start()
    write.close()
    for process in ranks:
        process.join(50)
    assert [process.exitcode for process in ranks] == codes
    said = os.read(read.fileno(), 10_000).decode() if do == "alone" else ""
    assert ("error: lost contact with rank 1" in said) == (do == "alone")


def test_a_wait_in_a_barrier_obeys_signals(start):
    process = start("--do", "late")
    assert any("ready" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    assert "stopped; continue with" in process.communicate(timeout=25)[1]


def test_order_is_a_function_of_position_and_keeps_two_passes():
    order = D.Order(7, 3, "x")
    stream = [order[p] for p in range(28)]
    assert all(sorted(stream[i : i + 7]) == list(range(7)) for i in (0, 7, 14, 21)) and stream[:7] != stream[7:14]
    assert D.Order(7, 3, "x").rows(5, 16) == stream[5:16] and order[0] == stream[0] and len(order.passes) <= 2
    expected = torch.randperm(7, generator=D.generator(3, "x", "order", 2)).tolist()
    assert stream[14:21] == expected and D.Order(7, 4, "x").rows(0, 7) != stream[:7]


@pytest.mark.parametrize("wish", ["", "3"])
def test_the_users_number_of_threads_is_respected(environment, monkeypatch, wish):
    environment(**(dict(OMP_NUM_THREADS=wish) if wish else {}))
    if not wish:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    D._set_threads(Launch(), CPU)
    found = torch.get_num_threads()
    torch.set_num_threads(before)
    assert found == (int(wish) if wish else cores())


# ---- progress ------------------------------------------------------------------------------


def test_progress_without_a_terminal_is_lines(capsys, monkeypatch, environment):
    monkeypatch.setattr(D, "LINE_SECONDS", 0.05)
    bar = D.progress(100, "draw", ONE, initial=40)
    for k in range(6):
        time.sleep(0.02)
        bar.update(10)
        bar.set_postfix(loss=f"{k}")
    bar.close()
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5 and all(line.startswith("draw: ") for line in lines)
    assert "100/100" in lines[-1] and "images/s" in lines[-1] and "loss=5" in lines[-1]
    assert not any("\r" in line for line in lines)


def test_progress_of_a_short_stage_is_one_line_and_of_others_none(capsys, environment):
    with D.progress(3, "draw", ONE, unit="steps") as bar:
        bar.update(3)
    assert capsys.readouterr().err.count("\n") == 1
    with D.progress(3, "draw", D.Dist(1, 1, 2, CPU)) as bar:
        bar.update(3)
        bar.set_postfix(loss=1)
    D.say(D.Dist(1, 1, 2, CPU), "quiet")
    D.say(ONE, "")  # a data set without a note
    D.say(ONE, "loud", 1)
    said = capsys.readouterr()
    assert said.err == "" and said.out == "loud 1\n"


# ---- whole runs ----------------------------------------------------------------------------

SCRIPT = '''
"""A script for the launchers."""
import dataclasses, os, sys, time
sys.path.insert(0, {root!r})
from common import cli
from common import run as runs
from common.launch import UserError

@dataclasses.dataclass
class Args:
    preset: str = "p"
    """name"""
    output_dir: str = "r"
    """folder"""
    do: str = "ok"
    """what to do"""

def main(args):
    if args.do == "early":
        time.sleep(12 * (os.environ["RANK"] == "0"))  # as on a busy machine
        raise UserError("no such folder")
    from common import distributed as D
    import torch
    dist = D.setup_distributed("cpu")
    run = runs.open_run("s", args, dist, ("do",))
    if args.do == "one":
        if dist.rank == 1:
            raise UserError("a.jpg: cannot be read")
        D.barrier(dist)
    if args.do == "crash" and dist.rank == 1:
        raise ZeroDivisionError("bug")
    if args.do == "die":
        if dist.rank == 1:
            os.kill(os.getpid(), 9)
        D.barrier(dist)
    if args.do == "late":
        D.say(dist, "ready")
        if dist.rank == 1:
            while True:
                try:
                    time.sleep(600)
                except KeyboardInterrupt:
                    pass
        D.barrier(dist)
    if args.do in ("wait", "crash"):
        D.say(dist, "ready")
        time.sleep(600)
    if run.todo("work"):
        with run.timed("work"):
            run.log(1, **{{f"work/rank{{dist.rank}}/x": dist.rank}})
        run.done("work", ranks=D.all_gather_object(dist.rank, dist))
    D.say(dist, "end", run.manifest("work")["ranks"], "threads", D.all_gather_object(torch.get_num_threads(), dist))
    D.cleanup(dist)

if __name__ == "__main__":
    cli.start(main, cli.parse(Args, {{"p": {{}}}}, __doc__))
'''


@pytest.fixture
def start(tmp_path):
    """`start("--do", "wait", launcher=[...], NAME=value)` -> Popen; by default torchrun with 2 processes."""
    (tmp_path / "s.py").write_text(SCRIPT.format(root=str(ROOT)))
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith(("SLURM_", "OMP_NUM"))}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    started = []

    def launch(*words, launcher=torchrun, **env):
        env = clean | {key: str(value) for key, value in env.items()}
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(subprocess.Popen([*launcher, str(tmp_path / "s.py"), *words], cwd=tmp_path, env=env, **streams))
        return started[-1]

    yield launch
    for process in started:
        if process.poll() is None:
            process.terminate()  # not kill: torchrun would leave its processes behind
            process.wait(60)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.parametrize("threads", [None, 1])
def test_torchrun_and_the_threads_of_its_processes(start, tmp_path, threads):
    """torchrun sets OMP_NUM_THREADS=1 by itself, which is not the user's wish; a 1 that the user exported is."""
    first = start(**({} if threads is None else dict(OMP_NUM_THREADS=threads)))
    out, said = first.communicate(timeout=LIMIT)
    assert first.returncode == 0, said
    share = threads or cores()
    assert out.endswith(f"end {[0, 1]} threads {[share, share]}\n") and out.count("end") == 1
    crowded = f"2 processes of {share} threads share {cores()} cores"
    assert (crowded in out) == (1 < cores() < 2 * share and share > 1), out
    assert json.loads((tmp_path / "r/stages/work.json").read_text())["ranks"] == [0, 1]
    assert (tmp_path / "r/metrics.jsonl").read_text().count("work/rank") == 2


def test_waiting_for_processes_that_never_come_is_said_and_obeys_signals(start):
    process = start(
        launcher=[sys.executable], RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()
    )
    line = process.stderr.readline()
    assert "waiting for 1 of 2 processes (WORLD_SIZE=2" in line, line
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143


def test_torchrun_errors_are_told_once(start, tmp_path):
    """Before there is a process group, and although rank 0 is the last to get there."""
    early, flag = start("--do", "early"), start("--nope", "1")
    for process, line in [
        (early, "error: no such folder\n"),
        (flag, "error: Unrecognized options: --nope, 1"),
    ]:
        out, said = process.communicate(timeout=LIMIT)
        text = out + said
        assert process.returncode != 0 and text.count(line) == 1 and "exitcode  : 2" in text, text
        assert "error on rank" not in text and 's.py", line' not in text


def test_a_dead_process_is_noticed(start):
    """Killed, without a word: the other ends within a minute instead of waiting for ever."""
    process = start("--do", "die")
    begin = time.monotonic()
    process.communicate(timeout=LIMIT)
    assert process.returncode != 0 and time.monotonic() - begin < 60


def test_torchrun_crash_of_one_rank_ends_the_other(start):
    process = start("--do", "crash")
    out, said = process.communicate(timeout=LIMIT)  # rank 0 would have slept for ten minutes
    assert process.returncode != 0 and "rank 1: Traceback" in said and "ZeroDivisionError: bug" in said


def test_torchrun_stopped(start, tmp_path):
    process = start("--do", "wait")
    assert any("ready" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=LIMIT)
    command = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2"
    command += f" {tmp_path}/s.py --do wait"
    line = f"stopped; continue with: {command}\n"
    assert process.returncode != 0 and said.count(line) == 1, said
    assert not (tmp_path / "r/.lock").exists() or (tmp_path / "r/.lock").read_text().startswith("process")
