"""What each launcher leaves in the environment, and the process group made of it."""

from __future__ import annotations

import sys

import pytest
import torch
from processes import run, torchrun

import syncbn
from syncbn import environment
from syncbn.environment import Place, place

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "77"}


@pytest.mark.parametrize(
    ("env", "want"),
    [
        ({}, Place()),
        (TORCHRUN, Place("torchrun", 5, 8, 1, 4)),
        (OPEN_MPI, Place("Open MPI", 5, 8, 1, 4)),
        (MPICH, Place("MPICH", 5, 8, 1, 4)),
        (SRUN, Place("srun", 5, 8, 1, 4)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x1),3"}, Place("srun", 5, 8, 1, 3)),
        (SRUN | TORCHRUN, Place("torchrun", 5, 8, 1, 4)),  # torchrun started by srun on each node
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}, Place("srun", 5, 8, 1, 4)),  # srun --mpi=pmi2
        (BATCH_SCRIPT, Place()),  # the script itself, before any srun
    ],
)
def test_place(env, want):
    assert place(env) == want


@pytest.mark.parametrize("env", [TORCHRUN, OPEN_MPI, MPICH, SRUN], ids=["torchrun", "Open MPI", "MPICH", "srun"])
def test_an_incomplete_environment_is_named(env):
    name = list(env)[2]
    with pytest.raises(ValueError, match=name):
        place({key: value for key, value in env.items() if key != name})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu1", "gpu1"), ("gpu[03-07,12],cpu1", "gpu03"), ("a1,b2", "a1"), ("n[1,5]-ib", "n1-ib"), ("rack-2-node[10-11]", "rack-2-node10")],
)
def test_first_host_of_a_slurm_list(nodes, first):
    assert environment._first_host(nodes) == first


def test_export_gives_srun_tasks_one_meeting_point(monkeypatch):
    for name in (*TORCHRUN, "MASTER_ADDR", "MASTER_PORT", *OPEN_MPI, *MPICH):
        monkeypatch.delenv(name, raising=False)
    seen = set()
    for rank in ("0", "5"):
        with monkeypatch.context() as m:
            for name, value in (SRUN | {"SLURM_PROCID": rank}).items():
                m.setenv(name, value)
            for name in (*TORCHRUN, "MASTER_ADDR", "MASTER_PORT"):
                m.setenv(name, "restored afterwards")
                m.delenv(name)
            environment.export()
            assert environment.os.environ["RANK"] == rank and environment.os.environ["LOCAL_WORLD_SIZE"] == "4"
            seen.add((environment.os.environ["MASTER_ADDR"], environment.os.environ["MASTER_PORT"]))
    assert len(seen) == 1 and seen.pop()[0] == "gpu03"


JOB = """
import os, sys, torch, torch.distributed as dist, syncbn
device = syncbn.init_process_group(timeout=30)
x = torch.ones(1, device=device)
dist.all_reduce(x)
open(f"{sys.argv[1]}/{dist.get_rank()}", "w").write(f"sum {int(x)} of {dist.get_world_size()} on {device}, {os.environ.get('LOCAL_RANK')}")
"""


@pytest.mark.world_size(1)
@pytest.mark.parametrize("launcher", ["none", "torchrun", "mpirun"])
def test_init_process_group_under(launcher, tmp_path, subprocess_env):
    (tmp_path / "job.py").write_text(JOB)
    command = {
        "none": [sys.executable],
        "torchrun": torchrun(),
        "mpirun": ["mpirun", "-n", "2", sys.executable],
    }[launcher]
    done = run([*command, str(tmp_path / "job.py"), str(tmp_path)], env=subprocess_env, timeout=100)
    assert done.returncode == 0, done.stderr
    size = 1 if launcher == "none" else 2
    for rank in range(size):
        said = (tmp_path / str(rank)).read_text()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        assert said.startswith(f"sum {size} of {size} on {device}")
        assert said.endswith(f", {None if launcher == 'none' else rank}")


AGAIN = """
import gc, sys, torch, torch.distributed as dist, syncbn
from torch import nn
model = syncbn.convert_sync_batchnorm(nn.ModuleDict({"a": nn.BatchNorm1d(3), "b": nn.BatchNorm1d(3)}))
a, b = model["a"], model["b"]
whole = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
for time in range(3):
    syncbn.init_process_group("gloo", timeout=20)
    rank = dist.get_rank()
    x = whole.split([5, 2])[rank]
    for group in (None, dist.new_group(), syncbn.new_group("node")):
        a.process_group = b.process_group = group
        try:
            (a if rank == 0 else b)(x)  # both have agreed in the groups before
            sys.exit("no mismatch: what the groups before have agreed on is taken for this one's")
        except syncbn.RankMismatchError:
            pass
        for layer in (a, b):
            want = nn.BatchNorm1d(3)(whole).split([5, 2])[rank]
            torch.testing.assert_close(layer(x), want)
    a.process_group = b.process_group = group = None
    with syncbn.join(a):
        for _ in range(rank + 1):
            a(x).sum().backward()
    dist.destroy_process_group()
    gc.collect()
    torch.testing.assert_close(a(x), nn.BatchNorm1d(3)(x))  # alone
open(f"{sys.argv[1]}/{rank}", "w").close()
"""


@pytest.mark.world_size(1)
def test_a_default_group_made_anew_starts_from_nothing(tmp_path, subprocess_env):
    """Its subgroups and those of join, too."""
    (tmp_path / "job.py").write_text(AGAIN)
    command = [*torchrun(), str(tmp_path / "job.py"), str(tmp_path)]
    done = run(command, env=subprocess_env, timeout=100)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()


@pytest.mark.process_group
@pytest.mark.world_size(2, 3, 4)
def test_new_group_is_this_ranks_part(world):
    import torch.distributed as dist

    node = syncbn.new_group("node")
    assert node.size() == world.size  # the test's ranks share a host
    alone = syncbn.new_group(1)
    assert alone.size() == 1
    if world.size == 4:
        pair = syncbn.new_group(2)
        t = torch.tensor([float(world.rank)])
        dist.all_reduce(t, group=pair)
        assert t.item() == (1 if world.rank < 2 else 5)
    for bad in ("rack", 0, -1, world.size + 1, 1.5):
        with pytest.raises(ValueError, match="ranks_per_group"):
            syncbn.new_group(bad)


@pytest.mark.world_size(1)
def test_new_group_without_torch_distributed_says_what_to_call():
    if torch.distributed.is_initialized():
        pytest.skip("this run has a process group")
    with pytest.raises(ValueError, match="init_process_group"):
        syncbn.new_group(1)
