"""The layer on a GPU: what it launches, that it never waits, and several ranks on one GPU."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

import syncbn
from support import ROOT
from support.processes import run, torchrun
from support.step import check

pytestmark = [pytest.mark.gpu, pytest.mark.world_size(1)]


def test_a_step_launches_two_kernels_each_way_and_does_not_wait(group_of_one):
    """The kernels also compute the moving statistics, their count, and the gradients of weight, bias and residual."""
    layer = syncbn.SyncBatchNorm(8, activation="relu", process_group=group_of_one).cuda()
    x, residual, dy = torch.randn(3, 4, 8, 16, 16, device="cuda").unbind()
    wanted = [x.requires_grad_(), residual.requires_grad_(), *layer.parameters()]
    torch.autograd.grad(layer(x, residual), wanted, dy)  # the first step makes a workspace, and verifies what the ranks exchange
    torch.cuda.synchronize()
    with torch.profiler.profile() as profile:
        torch.autograd.grad(layer(x, residual), wanted, dy)
        torch.cuda.synchronize()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    on_gpu = [event.name for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    ours = [re.search(r"(\w+)_kernel", name)[1] for name in on_gpu if "syncbn" in name]
    others = [name for name in on_gpu if "syncbn" not in name and not (group_of_one and re.search("nccl|Memcpy DtoD", name))]
    assert ours == ["stats", "normalize", "backward_reduce", "backward_input"] and others == []
    calls = {event.name for event in events if event.device_type == DeviceType.CPU}
    assert "cudaLaunchKernel" in " ".join(calls)  # else the profile shows no calls of CUDA's, and the next line nothing
    assert not [name for name in calls if re.search("(Stream|Event)Synchronize|cudaMalloc|cudaFree", name)]


def test_a_training_step_does_not_wait_for_the_device(group_of_one):
    """torch's own guard watches, which also sees what torch does for the layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4, momentum=None))
    model = syncbn.convert_sync_batchnorm(model, group_of_one, fuse_activation=True).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(4, 3, 8, 8, device="cuda")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        return loss

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
        with pytest.raises(RuntimeError, match="synchroniz"):
            loss.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_group_of_one_is_plain_batch_norm(world, group_of_one, dtype):
    check(dataclasses.replace(world, group=group_of_one), (6,), "cuda", (5, 9, 9), dtype, residual=True, activation="relu")


# The variables of each way, as bash sets them. NCCL refuses two ranks on one GPU, unless it takes them for ranks on different hosts, or is
# new enough to have a setting that allows it.
WAYS = {
    "gloo": "SYNCBN_TEST_BACKEND=gloo",
    "peer memory": "SYNCBN_TEST_BACKEND=gloo SYNCBN_PEER=1 TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1",
    "NCCL over sockets": "SYNCBN_TEST_BACKEND=cpu:gloo,cuda:nccl NCCL_HOSTID=$RANK NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1",
    "NCCL on a shared GPU": "SYNCBN_TEST_BACKEND=cpu:gloo,cuda:nccl NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 NCCL_MAX_CTAS=2",
}


LAYER = ["tests/layer/test_layer.py", "tests/layer/test_precision.py", "-m", "gpu"]
# The tests in these files name no device, so they can run on the GPU. Those that compare with layers of torch that may use TF32 are in
# float64.
ALONE = [
    "tests/layer/test_double_backward.py",
    "tests/layer/test_checkpoint.py",
    "tests/tools/test_statistics.py",
    "tests/tools/test_statistics_state.py",
    "tests/tools/test_keras_example.py",
    "tests/tools/test_keras_layer.py",
    "tests/tools/test_keras_weights.py",
]
DDP = ["tests/layer/test_ddp.py", "tests/layer/test_join.py"]
ON_GPU = "SYNCBN_TEST_DEVICE=cuda"


def run_tests(launcher: list[str], variables: str, arguments: list[str], env: dict[str, str]) -> None:
    tests = ["bash", "-c", f'export {variables}; exec "$0" -m pytest "$@"', sys.executable, *arguments, "-q", "-p", "no:cacheprovider"]
    done = run([*launcher, *tests], env=env | {"CUDA_VISIBLE_DEVICES": "0"}, cwd=ROOT, timeout=590)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_single_rank_suites_pass_on_a_gpu(subprocess_env):
    run_tests([], ON_GPU, ALONE, subprocess_env)


@pytest.mark.parametrize(
    ("tests", "ranks", "where"), [(LAYER, 2, ""), (LAYER, 4, ""), (DDP, 2, ON_GPU)], ids=["layer-2", "layer-4", "DDP-2"]
)
@pytest.mark.parametrize("way", WAYS)
def test_ranks_sharing_a_gpu_equal_the_whole_batch(way, tests, ranks, where, subprocess_env):
    """The table of test_layer.py, and autocast; DistributedDataParallel, also with batches that run out."""
    if way == "NCCL on a shared GPU" and (torch.cuda.nccl.version() < (2, 30) or ranks > 2):
        pytest.skip(f"NCCL {torch.cuda.nccl.version()} with {ranks} ranks: needs 2.30, which takes 2 on a GPU")
    run_tests([*torchrun(ranks), "--no-python"], f"{WAYS[way]} {where}", tests, subprocess_env)
