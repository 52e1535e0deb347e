"""The launchers, with stand-ins for torchrun, nvidia-smi, srun and scontrol that write down how they were called."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = sorted(p.name for p in (ROOT / "shell").glob("[!_]*_*.sh"))
SCRIPTS = ("datadream.py", "distdiff.py", "gafi.py", "realfake.py", "synthetic_recognition.py")
NOTE = '#!/bin/bash\nprintf "%s\\0" "$0" "$@" >"$CALLED"; printf "%s" "$PWD" >"$CALLED.cwd"; exit "${CODE:-0}"\n'


def executable(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


class Machine:
    """A checkout whose path has spaces, with .venv, on a machine with eight GPUs; user works in another folder."""

    def __init__(self, folder: Path):
        self.checkout, self.bin, self.cwd = folder / "a check out", folder / "bin", folder / "elsewhere"
        shutil.copytree(ROOT / "shell", self.checkout / "shell")
        for name in (*SCRIPTS, "requirements.txt"):
            (self.checkout / name).touch()
        self.cwd.mkdir()
        self.torchrun = self.checkout / ".venv" / "bin" / "torchrun"
        executable(self.torchrun, NOTE)
        self.gpus(8)
        self.called = folder / "called"

    def gpus(self, n: int):
        lines = "".join(f"echo 'GPU {i}: Some Card (UUID: GPU-{i})'\n" for i in range(n))
        executable(self.bin / "nvidia-smi", f"#!/bin/bash\n{lines}echo '  MIG 1g.10gb Device 0: (UUID: MIG-0)'\n")

    def env(self, **extra):
        return {"PATH": f"{self.bin}:/usr/bin:/bin", "CALLED": str(self.called), **extra}

    def run(self, *command, cwd=None, **env):
        words = ["bash", *map(str, command)]
        at = cwd or self.cwd
        return subprocess.run(words, cwd=at, env=self.env(**env), capture_output=True, text=True, timeout=60)

    def launch(self, name, *flags, **env) -> list[str]:
        """Run a launcher that must end well -> the words of the call of torchrun."""
        done = self.run(self.checkout / "shell" / name, *flags, **env)
        assert done.returncode == 0, done.stderr
        return self.called.read_text().split("\0")[:-1]

    def processes(self, name="datadream_pets.sh", **env) -> int:
        return next(int(w.partition("=")[2]) for w in self.launch(name, **env) if w.startswith("--nproc-per-node="))


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_bash_can_read_every_file():
    for file in (ROOT / "shell").iterdir():
        subprocess.run(["bash", "-n", file], check=True)


def test_every_launcher_starts_its_script_from_anywhere(machine):
    for name in LAUNCHERS:
        called = machine.launch(name, "--gen-seed", "7", "two words", "")
        script = next(s for s in SCRIPTS if name.startswith(s.removesuffix(".py") + "_"))
        last = (machine.checkout / "shell" / name).read_text().splitlines()[-1]
        n = int(last[8]) if last.startswith("at_most=") else 8
        start = [str(machine.torchrun), "--standalone", f"--nproc-per-node={n}", str(machine.checkout / script)]
        assert called[:4] == start, name
        preset = name.removeprefix(script.removesuffix(".py") + "_").removesuffix(".sh")
        assert called[4:6] == ["--preset", preset] and called[-4:] == ["--gen-seed", "7", "two words", ""], name
    assert machine.called.with_suffix(".cwd").read_text() == str(machine.cwd)  # results go where the user is


def test_processes_are_the_gpus_of_the_machine_or_what_the_user_says(machine):
    assert machine.processes() == 8
    assert machine.processes(CUDA_VISIBLE_DEVICES="2,3") == 2
    assert machine.processes(CUDA_VISIBLE_DEVICES="") == machine.processes(CUDA_VISIBLE_DEVICES="-1") == 1
    assert machine.processes(NPROC="5", CUDA_VISIBLE_DEVICES="0") == 5
    assert machine.processes("gafi_cifar10.sh") == 3 and machine.processes("gafi_cifar10.sh", NPROC="4") == 4
    machine.gpus(2)
    assert machine.processes() == machine.processes("gafi_cifar10.sh") == 2
    machine.gpus(0)
    assert machine.processes() == 1
    (machine.bin / "nvidia-smi").unlink()
    assert machine.processes() == 1


@pytest.mark.parametrize("value", ["0", "many", "-1", "2.5", "8 8"])
def test_an_impossible_number_of_processes_is_refused(machine, value):
    done = machine.run(machine.checkout / "shell" / "datadream_pets.sh", NPROC=value)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: NPROC={value}: ")
    assert not machine.called.exists()


def test_without_venv_the_path_is_asked_then_the_user_is_told(machine):
    shutil.rmtree(machine.checkout / ".venv")
    executable(machine.bin / "torchrun", NOTE)
    assert machine.launch("datadream_pets.sh")[0] == str(machine.bin / "torchrun")
    (machine.bin / "torchrun").unlink()
    done = machine.run(machine.checkout / "shell" / "datadream_pets.sh")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: no .venv in ") and "shell/quickstart.sh" in done.stderr


def test_the_users_threads_and_the_scripts_exit_code_pass_through(machine):
    executable(machine.torchrun, '#!/bin/bash\necho "threads=${OMP_NUM_THREADS-unset}"; exit 7\n')
    launcher = machine.checkout / "shell" / "datadream_pets.sh"
    assert "threads=3" in machine.run(launcher, OMP_NUM_THREADS="3").stdout
    done = machine.run(launcher)
    assert "threads=unset" in done.stdout and done.returncode == 7


# ---- slurm.sbatch ----

# Runs the command once per node, at the same time, and passes SIGTERM on, as srun does.
SRUN = """#!/bin/bash
printf '%s\\0' "$@" >"$CALLED.srun"
while [[ $1 == -* ]]; do shift; done
trap 'kill -TERM $(jobs -p)' TERM
for node in $NODES; do (export SLURMD_NODENAME=$node CALLED=$CALLED.$node; exec "$@") & done
until wait; do :; done  # a signal ends the wait, not the jobs
"""


@pytest.fixture
def cluster(machine):
    """The same machine with srun and scontrol; `batch` is the environment of a job on two nodes."""
    executable(machine.bin / "srun", SRUN)
    executable(machine.bin / "scontrol", '#!/bin/bash\n[ "$*" = "show hostnames $LIST" ] && printf "%s\\n" $NODES\n')
    machine.batch = dict(SLURM_JOB_ID="41234567", SLURM_NNODES="2", SLURM_CPUS_PER_TASK="64", NODES="n07 n11")
    machine.batch |= dict(SLURM_JOB_NODELIST="n[07,11]", LIST="n[07,11]")
    return machine


def sbatch(machine) -> Path:
    """SLURM runs a copy of the file, from a folder of its own."""
    return Path(shutil.copy(machine.checkout / "shell" / "slurm.sbatch", machine.bin / "slurm_script"))


def test_slurm_starts_one_torchrun_on_each_node(cluster):
    flags = ["--preset", "pets", "--prompt", "two words"]
    done = cluster.run(sbatch(cluster), "datadream.py", *flags, cwd=cluster.checkout, **cluster.batch)
    assert done.returncode == 0, done.stderr
    asked = Path(f"{cluster.called}.srun").read_text().split("\0")
    assert asked[:3] == ["--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    meeting = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=n07:34567", "--rdzv-id=41234567"]
    for node in ("n07", "n11"):
        called = Path(f"{cluster.called}.{node}").read_text().split("\0")[:-1]
        script = str(cluster.checkout / "datadream.py")
        assert called == [str(cluster.torchrun), *meeting, "--nproc-per-node=8", script, *flags]


def test_slurm_works_from_elsewhere_with_the_path_of_the_script_and_says_so_otherwise(cluster):
    cluster.run(sbatch(cluster), cluster.checkout / "gafi.py", **cluster.batch, NPROC="3")
    called = Path(f"{cluster.called}.n07").read_text()
    assert f"--nproc-per-node=3\0{cluster.checkout}/gafi.py" in called
    done = cluster.run(sbatch(cluster), "gafi.py", **cluster.batch)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "submit from the checkout" in done.stderr


SCRIPT = """
import os, pathlib, signal, sys, time

def end(*_):
    pathlib.Path(f"ended{os.environ['RANK']}").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, end)
pathlib.Path(f"rank{os.environ['RANK']}of{os.environ['WORLD_SIZE']}").touch()
while "--wait" in sys.argv:
    time.sleep(0.05)
"""


def test_slurm_with_the_real_torchrun_counts_ranks_over_nodes_and_signals_reach_the_script(cluster):
    """Two "nodes" of one process each on this machine; SIGTERM to the job, then the same job again, as a requeue."""
    (cluster.checkout / "datadream.py").write_text(SCRIPT)
    cluster.torchrun.unlink()
    cluster.torchrun.symlink_to(Path(sys.executable).parent / "torchrun")
    job = str(41_000_000 + os.getpid() % 20_000)
    env = cluster.env(**cluster.batch | dict(NODES="localhost localhost", SLURM_JOB_ID=job, NPROC="1"))
    command = ["bash", sbatch(cluster), "datadream.py"]
    options = dict(cwd=cluster.checkout, env=env, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([*command, "--wait"], **options)
    ranks = [cluster.checkout / f"rank{i}of2" for i in range(2)]
    deadline = time.monotonic() + 60
    while not all(p.exists() for p in ranks) and time.monotonic() < deadline:
        assert process.poll() is None, "the job ended before its scripts began"
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert all((cluster.checkout / f"ended{i}").exists() for i in range(2))
    for path in ranks:
        path.unlink()
    subprocess.run(command, **options, timeout=60, check=True)
    assert all(path.exists() for path in ranks)


# ---- quickstart.sh ----


@pytest.fixture
def installed(machine):
    """.venv as the set-up leaves it; its python writes down the call."""
    executable(machine.torchrun.with_name("python"), NOTE)
    (machine.checkout / ".venv" / "cleansynth-requirements.txt").write_text("# torch from: the same index\n")
    return machine


def test_quickstart_runs_the_script_in_the_checkout(installed):
    shell = installed.checkout / "shell" / "quickstart.sh"
    for words, script in (([], "datadream.py"), (["gafi"], "gafi.py"), (["shell/../realfake.py"], "realfake.py")):
        done = installed.run(shell, *words, "--seed", "two words")
        assert done.returncode == 0, done.stderr
        assert installed.called.read_text().split("\0")[1:-1] == [script, "--seed", "two words"]
        assert installed.called.with_suffix(".cwd").read_text() == str(installed.checkout)
    assert installed.run(shell, CODE="2").returncode == 2


def test_quickstart_names_the_scripts_there_are(installed):
    done = installed.run(installed.checkout / "shell" / "quickstart.sh", "nothing.py")
    assert done.returncode == 2 and "error: no script nothing.py here" in done.stderr and "gafi.py" in done.stderr
