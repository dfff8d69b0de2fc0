"""launch/slurm.sbatch and srun on a SLURM of two nodes, both of them this host. Its daemons are Debian's packages (slurmctld, slurmd,
slurm-client, munge), with a configuration, ports and a folder of their own; any user may run them."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from support import ROOT
from support.processes import job, left_behind, run

pytestmark = pytest.mark.world_size(1)
LIMIT = 60  # seconds, of a job
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=1
# A job's port is derived from its number, and several of these clusters run at once.
FirstJobId={first_job}
# The first has the name of this host, where rank 0 listens.
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName={host}-b NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=all Nodes=ALL Default=YES
"""


@pytest.fixture(scope="module")
def slurm():
    """The variables that make sbatch and srun use the cluster."""
    missing = [name for name in DAEMONS if not shutil.which(name, path=PATH)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: apt-get install slurmctld slurmd slurm-client munge")
    host = socket.gethostname().split(".")[0]
    try:
        socket.gethostbyname(host)
    except OSError:
        pytest.skip(f"this host's name, {host}, has no address, and SLURM's tasks meet at it")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: a socket's path has at most 108 letters
    try:
        with job({"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}) as env:
            configure(folder, host)
            start(["munged", "--foreground", "--force", *munge_files(folder)], env, folder)
            wait_for(folder, "munged makes no socket", lambda: (folder / "munge").exists())
            for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", host], ["slurmd", "-D", "-N", f"{host}-b"]):
                start(command, env, folder)
            states = ["sinfo", "--noheader", "--Node", "--format=%T"]
            wait_for(folder, "the nodes do not become idle", lambda: ask(states, os.environ | env).stdout.split() == ["idle", "idle"])
            yield env
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def configure(folder: Path, host: str) -> None:
    folder.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    text = CONFIGURATION.format(folder=folder, host=host, user=getpass.getuser(), ports=ports, first_job=1 + os.getpid())
    (folder / "slurm.conf").write_text(text)
    version = subprocess.run(["slurmd", "-V"], env={"PATH": PATH}, capture_output=True, text=True, timeout=LIMIT, check=True).stdout
    year, month = map(int, re.search(r"(\d+)\.(\d+)", version).groups())
    # Older versions cannot do without a plugin, but it is never asked for anything.
    (folder / "cgroup.conf").write_text(f"CgroupPlugin={'disabled' if (year, month) >= (24, 5) else 'cgroup/v1'}\n")


def munge_files(folder: Path) -> list[str]:
    files = {"key-file": "key", "socket": "munge", "pid-file": "munged.pid", "seed-file": "seed", "log-file": "munged.log"}
    return [f"--{option}={folder / name}" for option, name in files.items()]


def start(command: list[str], env: dict[str, str], folder: Path) -> None:
    with (folder / f"{command[0]}.out").open("a") as log:
        subprocess.Popen(command, env=os.environ | env, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def wait_for(folder: Path, what: str, ready, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            logs = "".join(log.read_text()[-1000:] for log in folder.glob("*.out"))
            pytest.skip(f"SLURM does not run here, {what}:\n{logs}")
        time.sleep(0.1)


def ask(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A command of SLURM's that leaves the work to the daemons."""
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)


def sbatch(slurm, subprocess_env, folder: Path, script: str) -> tuple[int, str]:
    """(exit status, output) of launch/slurm.sbatch on a script, two tasks on each of its two nodes."""
    (folder / "job.py").write_text(script)
    less = ["--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={folder}/job.out"]
    env = subprocess_env | slurm | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    with job(env) as env:
        submitted = ask(["sbatch", "--parsable", *less, "launch/slurm.sbatch", str(folder / "job.py"), str(folder)], env)
        assert submitted.returncode == 0, submitted.stderr
        status = wait_for_job(submitted.stdout.strip(), env)
        assert not left_behind(env)
    out = folder / "job.out"
    return status, out.read_text() if out.exists() else ""


def wait_for_job(number: str, env: dict[str, str]) -> int:
    """Its exit status, or the number of the signal that has ended it. `sbatch --wait` looks at ever longer intervals."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        shown = ask(["scontrol", "show", "job", number], env).stdout
        if re.search(r"JobState=(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)", shown):
            return max(map(int, re.search(r"ExitCode=(\d+):(\d+)", shown).groups()))
        time.sleep(0.2)
    raise TimeoutError(f"job {number} runs longer than {LIMIT} s")


STEP = """
import os, sys, torch, torch.distributed as dist, syncbn
syncbn.init_process_group(timeout=30)
rank, size = dist.get_rank(), dist.get_world_size()
whole = torch.randn(2 * size, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
y = syncbn.SyncBatchNorm(3, dtype=torch.float64)(whole.chunk(size)[rank])
want = torch.nn.functional.batch_norm(whole, None, None, training=True).chunk(size)[rank]
assert (y - want).abs().max() < 1e-12
with open(f"{sys.argv[1]}/{rank}", "w") as f:
    f.write(f"{size} {os.environ['LOCAL_RANK']} {os.environ['LOCAL_WORLD_SIZE']} {os.environ['SLURMD_NODENAME']}")
dist.destroy_process_group()
"""


def test_a_layer_in_a_batch_job_equals_batch_norm_of_the_whole_batch(slurm, subprocess_env, tmp_path):
    status, out = sbatch(slurm, subprocess_env, tmp_path, STEP)
    assert status == 0, out
    host = socket.gethostname().split(".")[0]
    places = [(tmp_path / str(rank)).read_text() for rank in range(4)]
    assert places == [f"4 {local} 2 {node}" for node in (host, f"{host}-b") for local in (0, 1)]


def test_a_rank_that_fails_ends_the_job(slurm, subprocess_env, tmp_path):
    fails = "import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)"
    began = time.monotonic()
    status, out = sbatch(slurm, subprocess_env, tmp_path, fails)
    assert status != 0 and "task 1: Exited with exit code 3" in out, out
    assert time.monotonic() - began < LIMIT / 2


def test_the_self_check_runs_under_srun(slurm, subprocess_env):
    env = subprocess_env | slurm | {"PYTHONPATH": str(ROOT)}
    command = ["srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit", sys.executable, "-m", "syncbn.check"]
    done = run(command, env=env, timeout=LIMIT, cwd=ROOT)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "2, launcher srun, over gloo" in done.stdout
