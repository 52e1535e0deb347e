"""How this process was started, and the two ways in which a run ends early. Nothing here imports anything heavy."""

import importlib.metadata
import os
import platform
import select
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = "torch torchvision diffusers transformers peft open_clip_torch timm numpy pillow safetensors tyro".split()


class UserError(Exception):
    """Something the user can put right. The message is one line: what, where, what to do. Exit code 2, no traceback."""


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by the first SIGINT or SIGTERM. Not an Exception, so no library swallows it."""


@dataclass(frozen=True)
class Launch:
    """This process among the others: rank, number on this host, processes in all, processes on this host."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1


def launched_as() -> Launch:
    """Read torchrun's variables; without them this is the only process. Raises UserError for values that cannot be.

    Left-over or half-set variables would otherwise make a process wait for others that never come.
    """
    env = os.environ
    if "RANK" not in env:
        if "WORLD_SIZE" in env and _number("WORLD_SIZE", 1) > 1:
            raise UserError(f"WORLD_SIZE={env['WORLD_SIZE']} is set but RANK is not; use torchrun, or unset WORLD_SIZE")
        tasks = env.get("SLURM_STEP_NUM_TASKS", "")
        if "SLURM_PROCID" in env and tasks.isdecimal() and int(tasks) > 1:
            raise UserError(
                f"srun started this as one of {tasks} tasks (SLURM_STEP_NUM_TASKS); use srun torchrun, see "
                "shell/slurm.sbatch, or unset SLURM_PROCID if it is left over from an interactive job"
            )
        return Launch()

    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        if name not in env:
            raise UserError(f"RANK={env['RANK']} is set but {name} is not; use torchrun, or unset RANK")
    world, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    local_world = _number("LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in env else world
    local_rank = _number("LOCAL_RANK", 0)
    for name, number, of, count in (
        ("RANK", rank, "WORLD_SIZE", world),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world),
        ("LOCAL_WORLD_SIZE", local_world - 1, "WORLD_SIZE", world),
    ):
        if number >= count:
            raise UserError(f"{name}={env[name]} does not fit {of}={count}; start the script with torchrun")
    if world > 1:
        if not env.get("MASTER_ADDR"):
            raise UserError(f"WORLD_SIZE={world} is set but MASTER_ADDR is not; start the script with torchrun")
        if not 0 < _number("MASTER_PORT", 0) < 65536:
            raise UserError(f"MASTER_PORT={env['MASTER_PORT']}: a port is a number from 1 to 65535")
    return Launch(rank, local_rank, world, local_world)


def _number(name: str, least: int) -> int:
    text = os.environ.get(name, "")
    if not (text.isascii() and text.isdecimal() and least <= int(text) < 1_000_000):
        raise UserError(f"{name}={text!r}: a whole number from {least} up is needed; use torchrun")
    return int(text)


def command_line() -> str:
    """The command that starts, or continues, this run; ready to paste into a shell."""
    words, launch = sys.orig_argv, launched_as()
    if launch.world > 1:
        words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={launch.local_world}"]
        if (nodes := os.environ.get("GROUP_WORLD_SIZE", "1")) == "1":
            words.append("--standalone")
        else:
            words += [f"--nnodes={nodes}", f"--node-rank={os.environ.get('GROUP_RANK', 0)}"]
            words += [f"--master-addr={os.environ['MASTER_ADDR']}", f"--master-port={os.environ['MASTER_PORT']}"]
        words += sys.argv
        with suppress(OSError):  # better, the line that started torchrun
            parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="surrogateescape").split("\0")
            words = parent[:-1] if sys.argv[0] in parent else words
    return shlex.join(word for word in words if word not in ("--no-resume", "--no_resume"))


def versions() -> dict[str, str]:
    """Of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_commit() -> dict[str, Any]:
    """{"git_commit": hash or None outside a git checkout, "git_dirty": were tracked files changed}."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    with suppress(OSError, ValueError, subprocess.SubprocessError):
        top, commit = git("rev-parse", "--show-toplevel", "HEAD").split("\n")
        if Path(top) == ROOT:  # not when the files merely lie inside someone else's repository
            return {"git_commit": commit, "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    return {"git_commit": None, "git_dirty": None}


def nobody_reads() -> bool:
    """Has the reader of our output gone, as in `| head -1`?"""
    (poll := select.poll()).register(1, 0)
    return bool(poll.poll(0))


def flush() -> None:
    """Both outputs, also when nobody reads them any more."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # what is left goes nowhere, or Python complains about it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with suppress(OSError):
        sys.stderr.flush()
