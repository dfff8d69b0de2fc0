"""`update_bn_stats` gives the statistics of all batches of all ranks, and touches nothing else."""

from __future__ import annotations

import copy
import datetime
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support.collectives import collectives
from support.models import ResNet
from support.oracle import assert_close
from syncbn import SyncBatchNorm, SyncBatchNormalization, update_bn_stats

ROWS = {  # in each batch of each rank: some batches are empty, and some ranks have fewer batches or none
    1: [(4, 0, 1, 7)],
    2: [(4, 1), (3, 0, 5)],
    3: [(2, 2), (), (5, 0, 1, 4)],
    4: [(3,), (0,), (2, 2), (1, 6)],
}
KINDS = {
    "BatchNorm": lambda group: nn.BatchNorm2d(3),
    "momentum None": lambda group: nn.BatchNorm2d(3, momentum=None, affine=False),
    "torch's SyncBatchNorm": lambda group: nn.SyncBatchNorm(3),
    "SyncBatchNorm": lambda group: SyncBatchNorm(3, process_group=group),
    "ranks, biased": lambda group: SyncBatchNorm(3, process_group=group, weighting="ranks", unbiased=False),
    "converted": lambda group: syncbn.convert_sync_batchnorm(nn.BatchNorm2d(3), group),
    "Keras": lambda group: SyncBatchNormalization(1, num_features=3, process_group=group),
}


def batches(rows, *shape):
    """(a list of batches for each rank, all batches as one). Each batch has its own distribution."""
    each = [[torch.randn(n, *shape, dtype=torch.float64) * (rank + 1) + i for i, n in enumerate(mine)] for rank, mine in enumerate(rows)]
    return each, torch.cat([batch for mine in each for batch in mine])


def alone(world):
    """A group of this rank only."""
    if world.size == 1:
        return None
    if world.group is None:
        return syncbn.new_group(1)
    from mpi4py import MPI

    return MPI.COMM_SELF


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_statistics_of_the_concatenated_data(world, kind):
    each, whole = batches(ROWS[world.size], 3, 2, 2)
    layer = KINDS[kind](world.group).double()
    update_bn_stats(layer, each[world.rank], process_group=world.group, progress=False)
    flat = whole.transpose(0, 1).flatten(1)
    assert_close(layer.running_mean, flat.mean(1), 1e-10, "running_mean")
    assert_close(layer.running_var, flat.var(1, unbiased=getattr(layer, "unbiased", True)), 1e-10, "running_var")
    for other in world.all_gather(layer.running_var):
        assert torch.equal(other, layer.running_var)


def test_does_not_depend_on_which_rank_has_which_batch(world):
    """A residual network: the ranks together find what one process finds with all batches."""
    each, _ = batches(ROWS[world.size], 3, 8, 8)
    model = ResNet(nn.BatchNorm2d, lambda c: SyncBatchNorm(c, process_group=world.group)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    one = copy.deepcopy(model)
    update_bn_stats(model, each[world.rank], process_group=world.group, progress=False)
    update_bn_stats(one, [batch for mine in each for batch in mine], process_group=alone(world), progress=False)
    for (key, got), want in zip(model.state_dict().items(), one.state_dict().values(), strict=True):
        assert_close(got.double(), want.double(), 1e-10, key)


@pytest.mark.world_size(1)
def test_each_batch_norm_normalizes_by_its_batch():
    """The second layer shows how the first one normalized. A batch with one value per channel has no variance: the moving statistics
    normalize it."""
    first, second = nn.BatchNorm1d(3), SyncBatchNorm(2)
    model = nn.Sequential(first, nn.Dropout(), nn.Linear(3, 2), second).double()
    first(torch.randn(8, 3, dtype=torch.float64) + 3)
    data = [torch.randn(n, 3, dtype=torch.float64) + n for n in (5, 1, 2)]
    seen = []
    for x in data:
        statistics = (first.running_mean, first.running_var) if len(x) == 1 else (x.mean(0), x.var(0, unbiased=False))
        y = F.batch_norm(x, *statistics, first.weight, first.bias, eps=first.eps)
        seen.append(model[2](y).detach())
    update_bn_stats(model, data, progress=False)
    assert_close(second.running_mean, torch.cat(seen).mean(0), 1e-10, "running_mean")
    assert_close(second.running_var, torch.cat(seen).var(0), 1e-10, "running_var")


@pytest.mark.process_group
@pytest.mark.world_size(2, 3, 4)
def test_two_collectives_suffice_for_a_model(world):
    """DistributedDataParallel's broadcasts and the layers' exchanges would hang: the ranks have different numbers of batches."""
    model = ResNet(SyncBatchNorm)
    ddp = DistributedDataParallel(model)
    each, _ = batches(ROWS[world.size], 3, 8, 8)
    tagged = 2  # the exchange adds its tag and the square of it
    values = tagged + sum(2 * m.num_features + 4 for m in model.modules() if isinstance(m, _BatchNorm))
    with collectives() as seen:
        update_bn_stats(ddp, [batch.float() for batch in each[world.rank]], progress=False)
    assert seen == [("allreduce", values, torch.float64)] * 2  # the means, then the sums about them


@pytest.mark.world_size(1)
def test_keras_layer_called_with_training():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = SyncBatchNormalization(num_features=3)

        def forward(self, inputs):
            return self.bn(inputs=inputs, training=True)

    model, x = Model(), torch.randn(6, 2, 3)
    model.bn.register_forward_hook(lambda module, args, kwargs, y: trained.append(kwargs.get("training")), with_kwargs=True)
    trained: list[bool] = []
    update_bn_stats(model, [x[:4], x[4:]], progress=False)
    assert not any(trained)  # a layer that trains would wait for the other ranks
    assert_close(model.bn.moving_variance, x.double().flatten(0, 1).var(0, unbiased=False), 2e-6, "moving_variance")


@pytest.mark.world_size(1)
def test_each_argument_does_what_it_says():
    """num_iters, forward, batches with labels, layers without statistics, layers that no batch reached."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    model[0].unused = nn.BatchNorm1d(2)
    x = torch.randn(3, 4, 2)
    loader = iter([(batch, "labels") for batch in x])
    update_bn_stats(model, loader, 2, progress=False)
    assert_close(model[0].running_mean, x[:2].double().mean((0, 1)), 2e-6, "running_mean")
    assert len(list(loader)) == 1  # no batch more than asked for is taken
    assert torch.equal(model[0].unused.running_mean, torch.zeros(2)) and torch.equal(model[0].unused.running_var, torch.ones(2))
    update_bn_stats(model, [{"image": x[2]}], forward=lambda m, batch: m(batch["image"]), progress=False)
    assert_close(model[0].running_mean, x[2].double().mean(0), 2e-6, "running_mean")
    with pytest.raises(ValueError, match="1 has not been built: run the model on one batch first"):
        update_bn_stats(nn.Sequential(nn.ReLU(), SyncBatchNormalization()), x)


@pytest.mark.world_size(1)
@pytest.mark.parametrize(
    "batch,message",
    [
        ({"image": torch.ones(2, 3)}, r"a batch is a dict, not a tensor: pass forward=lambda model, batch: model\(batch\['image'\]\)"),
        ([{"image": 1}], r"a batch is a list that begins with a dict, not a tensor: pass forward=lambda model, batch: \.\.\."),
        ((), "a batch is a tuple, not a tensor"),
        ({}, "a batch is a dict, not a tensor"),
        ("image.png", "a batch is a str, not a tensor"),
        (None, "a batch is a NoneType, not a tensor"),
    ],
    ids=lambda value: "" if isinstance(value, str) else repr(value)[:12],
)
def test_a_batch_that_is_no_tensor_is_named(batch, message):
    with pytest.raises(TypeError, match=message):
        update_bn_stats(nn.BatchNorm1d(3), [batch], progress=False)


def test_no_batch_on_any_rank_is_a_warning(world):
    layer = SyncBatchNorm(2, process_group=world.group)
    before = copy.deepcopy(layer.state_dict())
    for data, limit in (([], None), (torch.randn(3, 4, 2), 0), ([torch.randn(0, 2)], None)):
        with pytest.warns(UserWarning, match="no rank had a batch that reached a batch norm: no statistics have changed"):
            update_bn_stats(layer, data, limit, process_group=world.group, progress=False)
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one rank with a batch is enough
        update_bn_stats(layer, [torch.randn(3, 2)] if world.rank == 0 else [], process_group=world.group, progress=False)


@pytest.mark.world_size(1)
def test_a_model_without_running_statistics_is_a_warning():
    with pytest.warns(UserWarning, match="Linear has no batch norm with running statistics, or all are frozen: nothing to do"):
        update_bn_stats(nn.Linear(2, 2), [torch.randn(3, 2)], progress=False)


@pytest.mark.process_group
@pytest.mark.world_size(2)
def test_one_rank_alone_learns_that_every_rank_has_to_call_it(world):
    group = torch.distributed.new_group(timeout=datetime.timedelta(seconds=2))
    if world.rank == 0:
        with pytest.raises(RuntimeError, match="update_bn_stats: every rank of the group has to call it, even one without batches"):
            update_bn_stats(SyncBatchNorm(2), [torch.randn(3, 2)], process_group=group, progress=False)
    torch.distributed.barrier()


@pytest.mark.world_size(1)
def test_statistics_that_training_has_ruined():
    layer = nn.BatchNorm1d(2)
    layer.running_mean.fill_(float("nan"))
    layer.running_var.fill_(float("inf"))
    x = torch.randn(6, 2)
    update_bn_stats(layer, [x], progress=False)
    assert_close(layer.running_var, x.double().var(0), 2e-6, "running_var")


@pytest.mark.world_size(1)
def test_mean_far_above_the_deviation():
    """float32 input at mean / std = 1e4, where sums of squares in float32 are garbage."""
    x = torch.randn(4, 500, 3) + 1e4
    layer = SyncBatchNorm(3)
    update_bn_stats(layer, x, progress=False)
    assert_close(layer.running_var, x.double().flatten(0, 1).var(0), 2e-6, "running_var")


@pytest.mark.world_size(1)
@pytest.mark.parametrize("compile", [torch.compile, lambda m, backend: m.compile(backend=backend) or m], ids=["compiled", "in place"])
def test_a_compiled_model_gets_its_statistics(compile):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    compiled = compile(model, backend="eager")
    x = torch.randn(8, 3)
    for mode in (True, False):  # so that each mode has a compiled graph without hooks
        compiled.train(mode)(x)
    update_bn_stats(compiled, [x], progress=False)
    assert_close(model[1].running_mean, model[0](x).double().mean(0).detach(), 2e-6, "running_mean")


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "log"])
def test_progress_bar_on_rank_0_if_tqdm_is_installed_and_stderr_is_a_terminal(world, capsys, monkeypatch, terminal):
    layer, data = SyncBatchNorm(2), [torch.randn(3, 2)] * 4
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    update_bn_stats(layer, data, 3, process_group=world.group)
    assert ("3/3" in capsys.readouterr().err) == (world.rank == 0 and terminal)
    update_bn_stats(layer, data, process_group=world.group, progress=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)  # not installed
    update_bn_stats(layer, data, process_group=world.group)
    assert capsys.readouterr().err == ""
