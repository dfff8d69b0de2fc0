"""Real processes that fail: the others end within the timeout, with an error that names the layer, the launcher ends non-zero, and
no process is left."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.forks import ForkServer
from support.processes import job, left_behind, outputs, two_ranks

pytestmark = pytest.mark.world_size(1)
TIMEOUT = 6  # seconds, of the group
LIMIT = 90  # of the whole job: torchrun waits 30 s before it kills a stopped rank

JOB = """
import os, signal, socket, sys, time, torch, syncbn
from torch import nn
{start}
a, b = syncbn.SyncBatchNorm(3, process_group=group), syncbn.SyncBatchNorm(3, process_group=group)
a.layer_name, b.layer_name = "encoder.a", "encoder.b"
def step(*layers):
    x = torch.randn(4, 3, 5, requires_grad=True)
    y = x
    for layer in layers:
        y = layer(y)
    y.sum().backward()
step(a, b)
open(f"{{sys.argv[1]}}/{{rank}}", "w").close()
began = time.time()
try:
{fault}
except BaseException as error:
    said = f"{{type(error).__name__}} after {{time.time() - began:.1f}} s: {{error}}"
    open(f"{{sys.argv[1]}}/{{rank}}.error", "w").write(said)
    time.sleep(rank * {linger})
    raise
"""
TORCH = f"""
import torch.distributed as dist
syncbn.init_process_group("gloo", timeout={TIMEOUT})
rank, group = dist.get_rank(), None
def cut_connections():
    for fd in os.listdir("/proc/self/fd"):
        try:
            connection = socket.socket(fileno=os.dup(int(fd)))
            connection.getpeername()  # an error if it only listens
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
"""
MPI = """
from mpi4py import MPI
group = MPI.COMM_WORLD
rank = group.rank
"""

LAUNCHERS = ("torchrun", "mpirun")
ALONE = ("none",)  # two processes with torchrun's variables: when rank 1 ends, nothing ends rank 0 before its error


@dataclass(frozen=True)
class Fault:
    """Rank 1's fault while rank 0 runs another step, and rank 0's expected error and timing: see docs/faults.md."""

    code: str
    words: tuple[str, ...]
    at_once: bool  # else after the timeout
    launchers: tuple[str, ...] = LAUNCHERS


def names(layer: str, direction: str, rank: int = 0) -> tuple[str, ...]:
    return "RuntimeError", f'layer "{layer}" (SyncBatchNorm(3)): ', f"rank {rank} of 2 could not", f"{direction} exchange of 3 channels"


def mismatch(code: str, *words: str, launchers: tuple[str, ...] = ALONE) -> Fault:
    """Each rank raises, and what a launcher makes of that does not depend on what differs. comm/test_agreement.py has each of these under
    mpirun, too."""
    return Fault(code, ("RankMismatchError", *words), True, launchers)


NO_MORE = "raise ValueError('no more')"
FAULTS = {
    "raises before its collective": Fault(NO_MORE, names("encoder.a", "forward"), True, ALONE + LAUNCHERS),
    "raises between forward and backward": Fault(f"b(a(torch.randn(4, 3, 5))); {NO_MORE}", names("encoder.b", "backward"), True, ALONE),
    "is killed": Fault("os.kill(os.getpid(), signal.SIGKILL)", names("encoder.a", "forward"), True, ALONE + LAUNCHERS),
    "is stopped": Fault("os.kill(os.getpid(), signal.SIGSTOP)", names("encoder.a", "forward"), False),
    "is in eval mode": Fault(
        f"a.eval(); b.eval(); step(a, b); time.sleep({4 * TIMEOUT})", names("encoder.a", "forward"), False, ("torchrun",)
    ),
    "leaves the loop early": Fault(f"time.sleep({4 * TIMEOUT})", names("encoder.a", "forward"), False),
    "skips a layer": mismatch("step(b)", 'forward of layer "encoder.a"', 'forward of layer "encoder.b"', launchers=ALONE + LAUNCHERS),
    "calls layers in another order": mismatch("step(b, a)", 'forward of layer "encoder.a"', 'forward of layer "encoder.b"'),
    "has another C": mismatch(  # and sums of another length
        "a = syncbn.SyncBatchNorm(5, process_group=group); a.layer_name = 'encoder.a'; a(torch.randn(4, 5, 5))",
        "3 channels",
        "5 channels",
        launchers=(*ALONE, "mpirun"),
    ),
    "has another dtype": mismatch("a(torch.randn(4, 3, 5).double())", "torch.float32", "torch.float64"),
}
# A collective of rank 1 that fails by itself: (launchers, code, whether rank 0's error comes at once).
FAILURES = {
    "raises": (("none", "mpirun"), "type(syncbn.comm.resolve(group)).all_reduce_ = lambda *_: 1 / 0", False),
    "has lost its connections": (ALONE, "cut_connections()", True),
    "has lost its communicator": (["mpirun"], "syncbn.comm.resolve(group).group.comm.Free()", False),
}


ROWS = [(name, launcher, "1") for name, fault in FAULTS.items() for launcher in fault.launchers]
# Over the group: SYNCBN_SHARED_MEMORY is 0.
ROWS += [(name, "none", "0") for name in ("is killed", "skips a layer", "calls layers in another order")]
ROWS += [("is stopped", "torchrun", "0")]


def launch(
    launcher: str, fault: str, folder: Path, forks: ForkServer, env: dict[str, str], shared: str, linger: int = 0
) -> tuple[int, list[int]]:
    """(exit status, processes left behind) of a job of two ranks: the launcher's status, or rank 0's where there is none. The job ends by
    itself, or is killed after LIMIT."""
    body = f"if rank == 1:\n    {fault}\nstep(a, b)"
    start = MPI if launcher == "mpirun" else TORCH
    (folder / "job.py").write_text(JOB.format(start=start, fault=textwrap.indent(body, "    "), linger=linger))
    deadline = time.monotonic() + LIMIT
    with job(env | {"SYNCBN_SHARED_MEMORY": shared, "SYNCBN_MPI_TIMEOUT": str(TIMEOUT)}) as env, open(os.devnull, "w") as null:
        script = folder / "job.py"
        if launcher == "none":
            started = [forks.start(script, str(folder), env=env | variables, stdout=null, stderr=null) for variables in two_ranks()]
        elif launcher == "torchrun":
            (folder / "agent.py").write_text("from torch.distributed.run import main\nmain()")
            arguments = "--standalone", "--nproc-per-node=2", str(script), str(folder)
            started = [forks.start(folder / "agent.py", *arguments, env=env, stdout=null, stderr=null)]
        else:
            command = ["mpirun", "-n", "2", sys.executable, "-m", "mpi4py", str(script), str(folder)]
            started = [subprocess.Popen(command, env=env, stdout=null, stderr=null)]
        statuses = [process.wait(deadline - time.monotonic()) for process in started]
        return statuses[0], left_behind(env)


def assert_says(error: Path, words: Sequence[str], at_once: bool) -> None:
    said = error.read_text()
    for word in words:
        assert word in said, said
    waited = float(re.search(r"after ([\d.]+) s", said).group(1))
    at_least, less_than = (0, TIMEOUT - 2) if at_once else (TIMEOUT - 1, TIMEOUT + 4)
    assert at_least <= waited < less_than, said


@pytest.mark.parametrize("name, launcher, shared", ROWS)
def test_a_fault_of_rank_1_ends_rank_0_with_an_error(name, launcher, shared, tmp_path, forks, subprocess_env):
    fault = FAULTS[name]
    status, left = launch(launcher, fault.code, tmp_path, forks, subprocess_env, shared)
    assert status != 0
    assert {path.name for path in tmp_path.glob("[01]")} == {"0", "1"}, "a rank has not made its first step"
    assert not left
    both = "RankMismatchError" in fault.words
    if launcher != "none" and "none" in fault.launchers and not both:
        return  # the launcher may have ended rank 0 before its error
    assert_says(tmp_path / "0.error", fault.words, fault.at_once)
    if both:
        assert_says(tmp_path / "1.error", fault.words, fault.at_once)


@pytest.mark.parametrize("name, launcher", [(name, launcher) for name, row in FAILURES.items() for launcher in row[0]])
def test_a_collective_that_fails_on_rank_1_ends_both_ranks_with_an_error(name, launcher, tmp_path, forks, subprocess_env):
    _, code, rank_0_at_once = FAILURES[name]
    # Rank 1 lingers: if it ended, rank 0 would notice at once, and a launcher would end rank 0 before its error.
    status, left = launch(launcher, f"{code}; step(a, b)", tmp_path, forks, subprocess_env, "0", linger=2 * TIMEOUT)
    assert status != 0
    assert not left
    assert_says(tmp_path / "0.error", names("encoder.a", "forward", rank=0), rank_0_at_once)
    assert_says(tmp_path / "1.error", names("encoder.a", "forward", rank=1), at_once=True)


JOINED = f"""
import sys, time, torch, torch.distributed as dist, syncbn
from torch import nn
syncbn.init_process_group("gloo", timeout={TIMEOUT})
model, rank = nn.Sequential(nn.Linear(4, 3), syncbn.SyncBatchNorm(3)), dist.get_rank()
syncbn.convert_sync_batchnorm(model)  # names the layer
try:
    with {{joined}}:
        for step in range(4):
            began = time.time()
            if rank == 1 and step == 2:
                {{fault}}
            model(torch.randn(5, 4)).sum().backward()
except RuntimeError as error:
    open(f"{{{{sys.argv[1]}}}}/{{{{rank}}}}.error", "w").write(f"after {{{{time.time() - began:.1f}}}} s: {{{{error}}}}")
    raise
"""
DDP = "nn.parallel.DistributedDataParallel(model)"
LOST = ["after", "s: syncbn.join: ", "\nrank 0 of 2 could not reach the other ranks before call 3"]
MISSING = {  # how the ranks join, what rank 1 does after two batches, the words of rank 0's error, whether it comes at once
    "raises inside syncbn.join": ("syncbn.join(model)", "raise KeyError", LOST, True),
    "is late inside syncbn.join": ("syncbn.join(model)", f"time.sleep({2 * TIMEOUT}); raise KeyError", LOST, False),
    "has no batch left inside DDP's join": (
        f"(model := {DDP}).join()",
        "break",
        [*names("1", "forward")[1:], "(syncbn.join(model), not model.join(), lets ranks have different numbers of batches)"],
        False,
    ),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_rank_that_is_missing_from_a_join_ends_the_other_with_an_error_that_names_join(name, tmp_path, forks, subprocess_env):
    joined, fault, words, at_once = MISSING[name]
    script = tmp_path / "job.py"
    script.write_text(JOINED.format(joined=joined, fault=fault))
    ended = forks.run(script, str(tmp_path), env=subprocess_env, timeout=LIMIT, ranks=two_ranks())
    assert all(rank.returncode != 0 for rank in ended), outputs(ended)
    assert_says(tmp_path / "0.error", words, at_once)
