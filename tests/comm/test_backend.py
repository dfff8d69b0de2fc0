"""The backend that a rank takes unless told: NCCL, if each rank has a GPU of its own."""

from __future__ import annotations

import warnings

import pytest
import torch

from syncbn import environment
from syncbn.comm import rendezvous

pytestmark = pytest.mark.world_size(1)

GPUS = {  # (GPUs that a rank sees, ranks on its host, srun's variables): has it one of its own?
    "none": ((0, 2, {}), False),
    "one for one rank": ((1, 1, {}), True),
    "two for two ranks": ((2, 2, {}), True),
    "one for two ranks": ((1, 2, {}), False),
    "two for four ranks": ((2, 4, {}), False),
    "one for each task": ((1, 4, {"SLURM_GPUS_PER_TASK": "1"}), True),
    "two for each task": ((2, 4, {"SLURM_TRES_PER_TASK": "cpu=8,gres/gpu=2"}), True),
    "cores for each task": ((1, 4, {"SLURM_TRES_PER_TASK": "cpu=8"}), False),
    "none for each task": ((0, 4, {"SLURM_GPUS_PER_TASK": "1"}), False),
}


@pytest.mark.parametrize("name", GPUS)
def test_nccl_is_the_default_if_each_rank_has_a_gpu_of_its_own(name, monkeypatch):
    (gpus, ranks, variables), own = GPUS[name]
    monkeypatch.setattr(rendezvous, "_gpus", lambda: gpus)
    for variable in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    here = environment.RankInfo("srun", 0, ranks, 0, ranks)
    assert rendezvous.has_a_gpu_of_its_own(here) is own
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert rendezvous._default_backend(here) == ("nccl" if own else "gloo")
    assert [str(warning.message).split(",")[0] for warning in caught] == ([f"{ranks} ranks share {gpus} GPUs"] if gpus and not own else [])


@pytest.mark.parametrize(("others", "common"), [("nccl", "nccl"), ("gloo", "gloo")])
def test_nccl_is_the_default_only_if_it_is_on_all_hosts(others, common, monkeypatch):
    store, (here, other) = torch.distributed.HashStore(), (environment.RankInfo("srun", rank, 2, 0, 1) for rank in range(2))
    monkeypatch.setattr(rendezvous, "_default_backend", lambda rank: "nccl" if rank is here else others)
    store.set("backend of rank 0", "nccl")
    assert rendezvous._common_backend(None, other, store) == common
    with warnings.catch_warnings(record=True) as caught:
        assert rendezvous._common_backend(None, here, store) == common
    assert len(caught) == (common == "gloo")
