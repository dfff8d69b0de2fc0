"""The layers' own group: with process_group=None they exchange in a duplicate of the default group, which they share with no other user."""

from __future__ import annotations

import ast
import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support.oracle import assert_close
from support.processes import outputs, two_ranks
from syncbn.comm import duplicates, resolve
from syncbn.comm.duplicates import duplicate_of

several = pytest.mark.world_size(2, 3, 4)
with_groups = pytest.mark.process_group


class Net(nn.Module):
    """A branch that a rank may skip. With one channel and no bias, two weights have 4 values each, as many as a backward exchange."""

    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(4, channels, bias), nn.BatchNorm1d(channels)
        self.second, self.last = nn.Linear(channels, channels, bias), nn.BatchNorm1d(channels)
        self.head, self.branch = nn.Linear(channels, 4, bias), nn.Linear(channels, channels, bias)
        self.double()

    def stages(self, use_branch: bool):
        """The parts around the batch norms, where the ranks' batches meet. In one process the first two run on each rank's rows."""
        yield self.first
        yield lambda x: x + self.branch(x) if use_branch else self.second(x)
        yield self.head


def train_in_one_process(model: Net, parts: list[torch.Tensor], uses: list[bool]) -> None:
    stages = [list(model.stages(use)) for use in uses]
    h = torch.cat([stage[0](x) for stage, x in zip(stages, parts, strict=True)])
    h = model.norm(h).split([len(x) for x in parts])
    h = torch.cat([stage[1](x) for stage, x in zip(stages, h, strict=True)])
    model.head(model.last(h)).square().sum().backward()


class OnOneRank(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, use_branch: bool) -> torch.Tensor:
        first, middle, head = self.net.stages(use_branch)
        return head(self.net.last(middle(self.net.norm(first(x)))))


@with_groups
@several
@pytest.mark.parametrize("bucket_cap_mb", [1e-5, 25], ids=["a bucket for each parameter", "default buckets"])
@pytest.mark.parametrize(("channels", "bias"), [(8, True), (1, False)])
def test_ranks_that_skip_branches_in_turns_have_the_gradients_of_one_process(world, channels, bias, bucket_cap_mb):
    """DDP's buckets are ready in another order on each rank."""
    plain = Net(channels, bias)
    layers = OnOneRank(syncbn.convert_sync_batchnorm(copy.deepcopy(plain)))
    model = DistributedDataParallel(layers, find_unused_parameters=True, bucket_cap_mb=bucket_cap_mb)
    for step in range(2 * world.size):
        uses = [(step + rank) % world.size != 0 for rank in range(world.size)]
        parts = list(torch.randn(world.size, 3, 4, dtype=torch.float64))
        plain.zero_grad()
        model.zero_grad()
        train_in_one_process(plain, parts, uses)
        (model(parts[world.rank], uses[world.rank]).square().sum() * world.size).backward()
        greatest = torch.cat([p.grad.flatten() for p in plain.parameters()])  # the gradient of a bias before a norm is 0
        for p, q in zip(plain.parameters(), layers.net.parameters(), strict=True):
            assert_close(q.grad, p.grad, 1e-9, f"gradient in step {step}", greatest)


@with_groups
@several
def test_no_exchange_of_a_layer_is_in_the_default_group(world, monkeypatch, group_only):
    groups = groups_of_all_reduces(monkeypatch)
    layer = syncbn.SyncBatchNorm(3)
    layer(torch.randn(4, 3).requires_grad_()).sum().backward()
    assert groups and not any(group is dist.group.WORLD for group in groups)
    assert len({id(group) for group in groups}) == 1, "one duplicate serves all exchanges"
    assert resolve().group is groups[0] and groups[0].size() == world.size


def groups_of_all_reduces(monkeypatch) -> list[dist.ProcessGroup]:
    """The list to which every all-reduce appends its group."""
    groups, original = [], dist.ProcessGroup.allreduce
    monkeypatch.setattr(dist.ProcessGroup, "allreduce", lambda group, *args: groups.append(group) or original(group, *args))
    return groups


@with_groups
@several
@pytest.mark.parametrize("explicit", ["default", "world", "node"])
def test_an_explicit_group_is_used_as_given(world, explicit, monkeypatch, group_only):
    group = dist.group.WORLD if explicit == "default" else syncbn.new_group(explicit)
    groups = groups_of_all_reduces(monkeypatch)
    syncbn.SyncBatchNorm(3, process_group=group)(torch.randn(4, 3))
    assert groups and all(used is group for used in groups)
    assert (group is dist.group.WORLD) == (explicit == "default")
    if explicit != "default":
        dist.destroy_process_group(group)


@with_groups
@several
def test_the_duplicate_has_the_timeout_of_the_default_group():
    cpu = torch.device("cpu")
    timeouts = [group._get_backend(cpu).options._timeout for group in (dist.group.WORLD, resolve().group)]
    assert timeouts[0] == timeouts[1] != dist.default_pg_timeout


@with_groups
@several
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_group_has_its_own_timeout_and_backend_as_has_its_duplicate(device):
    """Whichever device it serves; `syncbn.join` uses the duplicate."""
    group = dist.new_group(timeout=timedelta(seconds=77), backend=f"{device}:gloo")
    for g in (group, duplicate_of(group)):
        assert resolve(g).timeout == 77
        assert dist.get_backend(g) == f"{device}:gloo"
    dist.barrier()  # or a rank might leave while the other still connects to it
    dist.destroy_process_group(group)


LEFT_BEHIND = """
import gc, os, sys, time, torch, torch.distributed as dist, syncbn
from torch import nn
counts = []
def descriptors_and_threads():
    gc.collect()
    return tuple(len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
def count():
    time.sleep(0.5)  # the kernel lists a thread for a moment after it has been joined, longer if the machine is busy
    for _ in range(1000):
        if not counts or descriptors_and_threads() == counts[0]:
            break
        time.sleep(0.01)
    counts.append(descriptors_and_threads())
for _ in range(4):
    syncbn.init_process_group("gloo", timeout=60)
    rank = dist.get_rank()
    for group in (None, dist.new_group()):
        model = nn.Sequential(nn.Linear(4, 3), syncbn.SyncBatchNorm(3, process_group=group))
        model(torch.randn(5, 4)).sum().backward()
        with syncbn.join(model):
            for _ in range(rank + 1):
                model(torch.randn(5, 4)).sum().backward()
        if group is not None and sys.argv[2] == "subgroup":
            for _ in range(3):
                dist.destroy_process_group(group)
                model[1].process_group = group = None
                count()
                model[1].process_group = group = dist.new_group()
                with syncbn.join(model):
                    model(torch.randn(5, 4)).sum().backward()
        del model, group
    dist.destroy_process_group()
    if sys.argv[2] == "default group":
        count()
    elif counts:
        break
open(f"{sys.argv[1]}/{rank}", "w").write(repr(counts))
"""


@pytest.mark.world_size(1)
@pytest.mark.parametrize("destroyed", ["default group", "subgroup"])
def test_duplicates_are_destroyed_with_their_groups(destroyed, tmp_path, forks, subprocess_env):
    """No descriptor and no thread is left, whether layers or syncbn.join made the duplicate."""
    script = tmp_path / "job.py"
    script.write_text(LEFT_BEHIND)
    ended = forks.run(script, str(tmp_path), destroyed, env=subprocess_env, timeout=200, ranks=two_ranks())
    assert all(rank.returncode == 0 for rank in ended), outputs(ended)
    for rank in "01":
        counts = ast.literal_eval((tmp_path / rank).read_text())
        assert len(counts) >= 3 and counts[-1] == counts[0], counts


ALONE = """
import warnings, torch, syncbn
layer = syncbn.SyncBatchNorm(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    syncbn.convert_sync_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    layer.eval()(torch.randn(4, 3))
    assert not caught  # a model may be built, and used in eval mode, before the process group is made
    for _ in range(2):
        layer.train()(torch.randn(4, 3))
print([str(warning.message) for warning in caught])
"""


@pytest.mark.world_size(1)
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_without_a_process_group_are_told_once_that_their_layers_are_unsynchronized(ranks, tmp_path, forks, subprocess_env):
    script = tmp_path / "job.py"
    script.write_text(ALONE)
    env = subprocess_env | {"RANK": "0", "WORLD_SIZE": str(ranks), "SYNCBN_NATIVE": "0"}
    (done,) = forks.run(script, env=env, timeout=100)
    assert done.returncode == 0, done.stderr
    warned = ast.literal_eval(done.stdout)
    assert len(warned) == (ranks > 1)
    assert all(
        "torchrun started 2 ranks, but torch.distributed is not initialized: the layers are unsynchronized" in text for text in warned
    )


@pytest.mark.world_size(1)
@pytest.mark.parametrize(("backend", "device"), [("gloo", "cpu"), ("nccl", "cuda"), ("cuda:nccl", "cuda"), ("cpu:gloo,cuda:nccl", "cpu")])
def test_ranks_gather_numbers_on_a_device_that_the_default_group_has(backend, device, monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "get_backend_config", lambda: str(dist.BackendConfig(dist.Backend(backend))))
    assert duplicates._device() == device
