"""The law: ranks with different numbers of batches train like one process whose batches shrink as ranks finish."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support.collectives import collectives
from support.models import two_norms
from support.oracle import assert_close
from support.world import HERE

pytestmark = pytest.mark.process_group
several = pytest.mark.world_size(2, 3)
NUMBERS = {1: [(3,)], 2: [(4, 1), (2, 5)], 3: [(2, 4, 1)], 4: [(1, 2, 3, 1)]}  # batches of each rank
ROWS = 3
LR = 0.01  # so low that no parameter comes so near to 0 that only rounding is left of it
each_split = pytest.mark.parametrize("numbers", NUMBERS.get(HERE.world_size, []), ids=str)


def net() -> nn.Sequential:
    return two_norms(1, (2, 4, 3), nn.Tanh()).double()


def batches(numbers: tuple[int, ...]) -> list[list[torch.Tensor]]:
    """The batches of each rank."""
    torch.manual_seed(1)
    return [[torch.randn(ROWS, 2, 5, dtype=torch.float64) + rank for _ in range(n)] for rank, n in enumerate(numbers)]


def train_together(numbers: tuple[int, ...], world_size: int, epochs: int, model: nn.Module | None = None) -> nn.Module:
    """The oracle: one process, each step on the batches of the ranks that still have some; gradients averaged over all ranks."""
    model, data = model or net(), batches(numbers)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in [*range(max(numbers))] * epochs:
        optimizer.zero_grad()
        (model(torch.cat([mine[step] for mine in data if step < len(mine)])).square().sum() / world_size).backward()
        optimizer.step()
    return model


def normalized_together(numbers: tuple[int, ...], rank: int, step: int, group: Iterable[int]) -> torch.Tensor:
    """`net()`'s output, in one process, for a rank's batch, normalized with those that ranks of `group` still have in this step."""
    active = [other for other in group if step < numbers[other]]
    y = net()(torch.cat([batches(numbers)[other][step] for other in active]))
    return y.split(ROWS)[active.index(rank)].detach()


def check_same(got: nn.Module, want: nn.Module, names: str = "") -> None:
    for (name, other), one in zip(want.state_dict().items(), got.state_dict().values(), strict=True):
        if names in name:
            assert_close(one, other, 1e-9, name)


@pytest.mark.parametrize("options", [{}, {"broadcast_buffers": False}, {"find_unused_parameters": True}, {"bucket_cap_mb": 1e-4}], ids=str)
@each_split
def test_ddp_with_uneven_numbers_of_batches_trains_like_one_process(world, numbers, options):
    """After each of two epochs, every rank has the parameters and moving statistics of the oracle, also one that finished first."""
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(net()), **options)
    groups = [model.module[1].process_group, model.module[4].process_group]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for epochs in (1, 2):
        with syncbn.join(model):
            for x in batches(numbers)[world.rank]:
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
        check_same(model.module, train_together(numbers, world.size, epochs))
        assert [model.module[1].process_group, model.module[4].process_group] == groups


@each_split
def test_two_ddp_models_that_each_step_calls_in_turn_both_train_like_one_process(world, numbers):
    models = [DistributedDataParallel(syncbn.convert_sync_batchnorm(net())) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=LR) for model in models]
    with syncbn.join(*models):
        for x in batches(numbers)[world.rank]:
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
    for model in models:
        check_same(model.module, train_together(numbers, world.size, 1))


@each_split
def test_if_every_layer_is_frozen_ddp_still_trains_like_one_process(world, numbers):
    """The layers exchange nothing, but DDP's collectives need the finished ranks."""
    model = DistributedDataParallel(syncbn.freeze_bn(syncbn.convert_sync_batchnorm(net())))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with syncbn.join(model):
        for x in batches(numbers)[world.rank]:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    check_same(model.module, train_together(numbers, world.size, 1, syncbn.freeze_bn(net())))


@each_split
def test_without_ddp_active_ranks_share_statistics(world, numbers):
    """Only the statistics are shared. Each rank that is still active sees those of the active ones."""
    model = syncbn.convert_sync_batchnorm(net())
    with syncbn.join(model):
        for step, x in enumerate(batches(numbers)[world.rank]):
            y = model(x)
            y.square().sum().backward()
            assert_close(y, normalized_together(numbers, world.rank, step, range(world.size)), 1e-10, "y")
    for buffer in model.buffers():
        assert all(torch.equal(buffer, other) for other in world.all_gather(buffer))
    assert model[1].num_batches_tracked == max(numbers)


@pytest.mark.parametrize(
    ("groups", "numbers"),
    [
        pytest.param(((0,), (1,)), (3, 1), marks=pytest.mark.world_size(2)),
        pytest.param(((0, 1), (2,)), (2, 3, 1), marks=pytest.mark.world_size(3)),
        pytest.param(((0, 1), (2,)), (2, 3, 4), marks=pytest.mark.world_size(3)),
        pytest.param(((0, 1), (2, 3)), (3, 1, 1, 2), marks=pytest.mark.world_size(4)),
    ],
)
def test_a_group_whose_other_ranks_have_left_continues(world, groups, numbers):
    """Each group normalizes with the ranks that it still has, also after all ranks of another group have left."""
    made = {group: dist.new_group(list(group)) for group in groups}
    group = next(group for group in groups if world.rank in group)
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(net(), made[group]))
    with syncbn.join(model):
        for step, x in enumerate(batches(numbers)[world.rank]):
            y = model(x)
            y.square().sum().backward()
            assert_close(y, normalized_together(numbers, world.rank, step, group), 1e-10, "y")


@each_split
def test_eval_passes_inside_join_exchange_nothing(world, numbers):
    """Any rank may call the module inside DDP in eval mode, at any time."""
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(net()))
    with syncbn.join(model):
        for x in batches(numbers)[world.rank]:
            model(x).square().sum().backward()
            model.module.eval()
            with collectives() as seen:
                model.module(x)
            assert seen == []
            model.module.train()


@pytest.mark.parametrize("frozen", [False, True])
@each_split
def test_after_join_ddp_in_eval_mode_exchanges_nothing(world, numbers, frozen):
    """Any rank may call it alone, as before join; without its broadcast of buffers."""
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(net()), broadcast_buffers=False)
    if frozen:
        syncbn.freeze_bn(model)
    with syncbn.join(model):
        for x in batches(numbers)[world.rank]:
            model(x).square().sum().backward()
    model.eval()
    with collectives() as seen:
        model(x)
    assert seen == []


@several
@pytest.mark.parametrize("with_ddp", [True, False], ids=["DDP", "plain"])
def test_a_rank_without_any_batch_is_an_error_on_every_rank(world, with_ddp):
    model = syncbn.convert_sync_batchnorm(net())
    model = DistributedDataParallel(model) if with_ddp else model
    numbers = (0,) + (2,) * (world.size - 1)
    with (
        pytest.raises(RuntimeError, match="rank 0 has no batch at all.*at least one batch, which may be empty"),
        syncbn.join(model),
    ):
        for x in batches(numbers)[world.rank]:
            model(x).square().sum().backward()


@several
def test_early_termination_ends_every_rank(world):
    """By an option of torch's Join, all ranks stop when the first has no batch left."""
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(net()))
    numbers = tuple(2 + rank for rank in range(world.size))
    with pytest.raises(RuntimeError, match="exhausted"), syncbn.join(model, throw_on_early_termination=True):
        for x in batches(numbers)[world.rank]:
            model(x).square().sum().backward()


def test_a_disabled_join_changes_nothing(world):
    model = syncbn.convert_sync_batchnorm(net())
    with syncbn.join(model, enable=False):
        model(torch.randn(2, 2, 5, dtype=torch.float64))
        assert model[1].process_group is None


@several
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_made_inside_is_not_part_of_join(world, duplicate):
    """A copy has the groups of a copy made outside. Rank 0 calls it by itself: this notifies no other rank."""
    model = syncbn.convert_sync_batchnorm(net())
    with syncbn.join(model):
        for step in range(2 + world.rank):
            if step == 0:
                inside = duplicate(model)
                assert [m.process_group for m in inside.modules() if isinstance(m, syncbn.SyncBatchNorm)] == [None, None]
                if world.rank == 0:
                    inside.eval()(torch.randn(2, 2, 5, dtype=torch.float64))
            model(torch.randn(2, 2, 5, dtype=torch.float64)).square().sum().backward()
    inside.train()(torch.randn(2, 2, 5, dtype=torch.float64)).square().sum().backward()
    assert inside[1].num_batches_tracked == 1


@several
def test_a_second_join_of_the_same_model_is_an_error_on_every_rank(world):
    model = syncbn.convert_sync_batchnorm(net())
    with syncbn.join(model):
        with pytest.raises(RuntimeError, match="join is active for this model"), syncbn.join(model):
            pass
        for _ in range(1 + world.rank):
            model(torch.randn(2, 2, 5, dtype=torch.float64)).square().sum().backward()
