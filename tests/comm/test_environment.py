"""The environment variables that are read: their values, a process's rank, and the documented tables."""

from __future__ import annotations

import re

import pytest
import torch

import syncbn
from support import ROOT
from support.processes import without_launcher
from support.srun import SRUN
from syncbn import environment
from syncbn.environment import RankInfo, rank_info

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
FLUX = {"FLUX_TASK_RANK": "5", "FLUX_JOB_SIZE": "8", "FLUX_TASK_LOCAL_ID": "1", "PMI_RANK": "5", "PMI_SIZE": "8"}
PALS = {"PALS_APID": "7f2c", "PALS_RANKID": "5", "PALS_NODEID": "1", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "4"}
PMI = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4"}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "77"}

RANKS = {
    "single process": ({}, RankInfo()),
    "torchrun": (TORCHRUN, RankInfo("torchrun", 5, 8, 1, 4)),
    "Open MPI": (OPEN_MPI, RankInfo("Open MPI", 5, 8, 1, 4)),
    "MPICH": (MPICH, RankInfo("MPICH", 5, 8, 1, 4)),
    "srun": (SRUN, RankInfo("srun", 5, 8, 1, 4)),
    "srun, unequal nodes": (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x1),3"}, RankInfo("srun", 5, 8, 1, 3)),
    "torchrun started by srun on each node": (SRUN | TORCHRUN, RankInfo("torchrun", 5, 8, 1, 4)),
    "srun --mpi=pmi2": (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}, RankInfo("srun", 5, 8, 1, 4)),
    "srun --mpi=cray_shasta": (SRUN | {"PALS_RANKID": "5", "PALS_NODEID": "1"}, RankInfo("srun", 5, 8, 1, 4)),
    "srun --mpi=pmix": (SRUN | {"PMIX_RANK": "5"}, RankInfo("srun", 5, 8, 1, 4)),
    "a batch script before srun": (BATCH_SCRIPT, RankInfo()),
    "PyTorchJob": ({"RANK": "1", "WORLD_SIZE": "2"}, RankInfo("torchrun", 1, 2, None, None)),
    "DeepSpeed": ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, RankInfo("torchrun", 1, 2, 1, None)),
    "mp.spawn in a task of srun": (SRUN | {"RANK": "3", "WORLD_SIZE": "4"}, RankInfo("torchrun", 3, 4, None, None)),
    "MVAPICH2": (
        {"MV2_COMM_WORLD_RANK": "5", "MV2_COMM_WORLD_SIZE": "8", "MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "4"},
        RankInfo("MVAPICH2", 5, 8, 1, 4),
    ),
    "jsrun": (
        {"JSM_NAMESPACE_RANK": "5", "JSM_NAMESPACE_SIZE": "8", "JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_LOCAL_SIZE": "4"},
        RankInfo("jsrun", 5, 8, 1, 4),
    ),
    "PALS": (PALS | PMI, RankInfo("PALS", 5, 8, 1, 4)),
    "PALS with PMIx and a world size": (PALS | {"PMIX_RANK": "5", "WORLD_SIZE": "8"}, RankInfo("PALS", 5, 8, 1, 4)),
    "PMI of a Cray": (PMI, RankInfo("MPICH", 5, 8, 1, 4)),
    "Flux": (FLUX, RankInfo("Flux", 5, 8, 1, None)),
    "Flux without PMI": ({name: value for name, value in FLUX.items() if "PMI" not in name}, RankInfo("Flux", 5, 8, 1, None)),
    "mpirun in a task of Flux": (FLUX | MPICH | {"PMI_RANK": "1", "PMI_SIZE": "2"}, RankInfo("MPICH", 1, 2, 1, 4)),
    "PMIx with a world size": ({"PMIX_RANK": "5", "WORLD_SIZE": "8"}, RankInfo("PMIx", 5, 8, None, None)),
    "a world size that the user has exported": (OPEN_MPI | {"WORLD_SIZE": "8"}, RankInfo("Open MPI", 5, 8, 1, 4)),
    "an empty text is not set": (OPEN_MPI | {"RANK": "", "WORLD_SIZE": ""}, RankInfo("Open MPI", 5, 8, 1, 4)),
}


@pytest.mark.parametrize("launcher", RANKS)
def test_the_rank_is_read_under_every_launcher(launcher):
    env, want = RANKS[launcher]
    assert rank_info(env) == want
    assert rank_info(without_launcher(env)) == RankInfo()  # so under every launcher, a test can start a job of its own


def test_every_launcher_is_in_the_table_of_ranks():
    assert {row.name for row in environment.LAUNCHERS} == {want.launcher for _, want in RANKS.values()} - {None}


WRONG_RANKS = {
    "WORLD_SIZE is set, but RANK is not": {"WORLD_SIZE": "2"},
    "RANK is set, but WORLD_SIZE is not": {"RANK": "0"},
    "PMI_RANK is set, but PMI_SIZE is not": {"PMI_RANK": "0"},
    "PMIX_RANK is set, but WORLD_SIZE is not": {"PMIX_RANK": "0"},
    "WORLD_SIZE is 'two': it must be a whole number": {"RANK": "0", "WORLD_SIZE": "two"},
    "RANK is '-1': it must be a whole number": {"RANK": "-1", "WORLD_SIZE": "2"},
    "RANK is 2: it must be less than WORLD_SIZE, which is 2": {"RANK": "2", "WORLD_SIZE": "2"},
    "LOCAL_RANK is 'a'": TORCHRUN | {"LOCAL_RANK": "a"},
    "SLURM_STEP_TASKS_PER_NODE is '4(y2)': it must be a list": SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(y2)"},
    "SLURM_NODEID is 7": SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4,4", "SLURM_NODEID": "7"},
}


@pytest.mark.parametrize("words", WRONG_RANKS)
def test_a_missing_or_wrong_rank_is_an_error_that_names_the_variable(words):
    with pytest.raises(ValueError, match=f"environment variable {re.escape(words)}"):
        rank_info(WRONG_RANKS[words])


WRONG_SETTINGS = {
    "SYNCBN_NATIVE": ("off", "0 or 1"),
    "SYNCBN_CPU_ISA": ("sse", "avx512, avx2 or baseline"),
    "SYNCBN_CHECK": ("sometimes", "first, always or off"),
    "SYNCBN_DEBUG": ("yes", "0 or 1"),
    "SYNCBN_MPI_TIMEOUT": ("nan", "a positive number of seconds"),
    "SYNCBN_MPI_CUDA_AWARE": ("true", "0 or 1"),
    "SYNCBN_SHARED_MEMORY": ("off", "0 or 1"),
    "SYNCBN_PEER": ("yes", "0 or 1"),
    "SYNCBN_REPLACE_TORCH": ("yes", "0 or 1"),
}


def test_every_setting_is_in_the_table_of_wrong_ones():
    assert set(WRONG_SETTINGS) == {variable.name for variable in environment.VARIABLES}


@pytest.mark.parametrize(("name", "value"), [(name, row[0]) for name, row in WRONG_SETTINGS.items()] + [("SYNCBN_MPI_TIMEOUT", "abc")])
def test_a_wrong_setting_is_an_error_that_names_it_its_value_and_what_is_allowed(name, value):
    before = environment.settings
    with pytest.raises(ValueError, match=rf"environment variable {name} is '{value}': it must be {WRONG_SETTINGS[name][1]}$"):
        environment.reload({name: value})
    assert environment.settings is before


@pytest.mark.world_size(1)
def test_a_wrong_setting_fails_at_import_and_again_until_it_is_right(tmp_path, forks, subprocess_env):
    script = tmp_path / "job.py"
    script.write_text("""
import os
for value in ("sometimes", "sometimes", "always"):
    os.environ["SYNCBN_CHECK"] = value
    try:
        import syncbn
        print(syncbn.environment.settings.check)
    except ValueError as error:
        print(error)
""")
    (done,) = forks.run(script, env=subprocess_env, timeout=100)
    assert done.returncode == 0, done.stderr
    wrong = "environment variable SYNCBN_CHECK is 'sometimes': it must be first, always or off"
    assert done.stdout.splitlines() == [wrong, wrong, "always"]


@pytest.mark.world_size(1)
def test_init_process_group_reads_the_settings_again(monkeypatch):
    monkeypatch.setattr(environment, "settings", environment.settings)  # restored afterwards
    monkeypatch.setenv("SYNCBN_MPI_TIMEOUT", "abc")
    with pytest.raises(ValueError, match="SYNCBN_MPI_TIMEOUT is 'abc'"):
        syncbn.init_process_group()
    assert not torch.distributed.is_initialized()


@pytest.mark.world_size(1)
def test_the_documented_variables_are_those_that_are_read():
    assert environment.markdown() in (ROOT / "docs/environment.md").read_text(), "see environment.markdown for how to write the tables"
    build = set(re.findall(r'"([A-Z_]*[A-Z])"', (ROOT / "setup.py").read_text()))
    assert set(environment.BUILD) <= build
    assert {name for name in build if name.startswith("SYNCBN_")} <= set(environment.BUILD)
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    assert set(re.findall(r"SYNCBN_(?:TEST_[A-Z]+|FUZZ)\b", tests)) == set(environment.TESTS)
