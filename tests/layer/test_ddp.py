"""The law: under DistributedDataParallel, training is that of the plain model on the whole batch.

The cases are those of PyTorch's own tests of SyncBatchNorm under DDP, on the CPU, and what its users have asked for.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support.collectives import collectives
from support.oracle import assert_close

pytestmark = pytest.mark.process_group
several = pytest.mark.world_size(2, 3)
TOLERANCE = 1e-9  # float64: three steps of training


class Net(nn.Module):
    """Two batch norms, each between a matrix product or a convolution and an activation."""

    def __init__(self, affine: bool = True, shape: tuple[int, ...] = ()):
        super().__init__()
        torch.manual_seed(0)
        layer, norm = {0: (nn.Linear, nn.BatchNorm1d), 1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d)}[len(shape)]
        kernel = (3,) if shape else ()
        padding = {"padding": 1} if shape else {}
        self.first = layer(2, 10, *kernel, bias=False, **padding)
        self.norm = norm(10, affine=affine)
        self.second = layer(10, 6, *kernel, bias=False, **padding)
        self.last = norm(6, affine=affine)
        self.out = layer(6, 4, *kernel, bias=False, **padding)
        self.double()

    def forward(self, x):
        return self.out(self.last(self.second(self.norm(self.first(x)).relu())).sigmoid())


def check_training(world, counts, *, shape=(), affine=True, steps=3, layout=torch.contiguous_format, **options):
    """DDP with synchronized layers on each rank's rows, against the plain model on all of them: y, gradients and state.

    The loss is a sum over samples. DDP averages gradients over the ranks, so each rank's loss is multiplied by their number.
    """
    plain = Net(affine, shape)
    if layout != torch.contiguous_format:
        plain = plain.to(memory_format=layout)
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(copy.deepcopy(plain)), **options)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.5) for m in (plain, model)]
    for _ in range(steps):
        whole = torch.randn(sum(counts), 2, *shape, dtype=torch.float64)
        x = world.mine(whole, counts).contiguous(memory_format=layout)
        want, got = plain(whole), model(x)
        assert_close(got, world.mine(want.detach(), counts), TOLERANCE, "y", want.detach())
        want.square().sum().backward()
        (got.square().sum() * world.size).backward()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert_close(q.grad, p.grad, TOLERANCE, "gradient")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, want), got in zip(plain.state_dict().items(), model.module.state_dict().values(), strict=True):
        assert_close(got, want, TOLERANCE, name)


# ---- What PyTorch tests of its own layer ----------------------------------------------------------------------------------------


def test_equal_batches_train_like_one_process(world):
    check_training(world, (4,) * world.size, shape=(6, 6))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
def test_any_memory_format_trains_like_one_process(world, layout):
    check_training(world, (3,) * world.size, shape=(4, 4), layout=layout)


def test_layers_without_parameters_train_like_one_process(world):
    check_training(world, (4,) * world.size, affine=False)


def test_two_dimensional_input_trains_like_one_process(world):
    check_training(world, (4,) * world.size)


@several
def test_one_sample_on_each_rank_trains_like_one_process(world):
    check_training(world, (1,) * world.size)


@several
@pytest.mark.parametrize("small", [0, 1, 5], ids="smallest batch {}".format)
def test_batches_of_different_sizes_train_like_one_process(world, small):
    """Rank 0 has by far the fewest samples, or none."""
    check_training(world, tuple(small + 20 * rank for rank in range(world.size)), shape=(3,))


@several
def test_moving_statistics_are_those_of_all_samples_however_uneven_the_batches(world):
    """The ranks have batches of 20, 200 and 2000, each with a mean of its own."""
    counts = tuple(20 * 10**rank for rank in range(world.size))
    whole = torch.cat([torch.full((n, 1), float(rank)) for rank, n in enumerate(counts)]).double() + torch.randn(sum(counts), 1).double()
    model = DistributedDataParallel(syncbn.SyncBatchNorm(1, momentum=0.99, dtype=torch.float64))
    plain = nn.BatchNorm1d(1, momentum=0.99, dtype=torch.float64)
    x, all_of_it = world.mine(whole, counts).requires_grad_(), whole.clone().requires_grad_()
    model(x).square().sigmoid().sum().backward()
    plain(all_of_it).square().sigmoid().sum().backward()
    assert_close(model.module.running_mean, plain.running_mean, 1e-12, "running_mean")
    assert_close(model.module.running_var, plain.running_var, 1e-12, "running_var")
    assert_close(x.grad, world.mine(all_of_it.grad, counts), 1e-10, "dx", all_of_it.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_precision_model_counts_and_sums_in_float64(world, dtype):
    """Parameters, buffers and input in 16 bits; count and statistics are not: 70,000 samples do not fit float16."""
    model = DistributedDataParallel(syncbn.SyncBatchNorm(2).to(dtype))
    x = torch.randn(70_000, 2).to(dtype).requires_grad_()
    y = model(x)
    y.float().square().mean().backward()
    assert y.dtype == x.grad.dtype == model.module.running_var.dtype == dtype
    assert all(t.isfinite().all() for t in (y, x.grad, model.module.weight.grad, model.module.running_var))
    assert abs(y.float().var() - 1) < 0.02  # of 70,000 samples, and 16 bits


@several
def test_layers_normalize_within_their_own_group(world):
    """DDP still averages gradients over all ranks."""
    group = syncbn.new_group(1)
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(Net(), group))
    assert model.module.norm.process_group is group
    x = torch.randn(5, 2, dtype=torch.float64) + world.rank
    with collectives() as seen:
        y = model.module(x)
    assert seen == []
    plain = Net()
    want = plain(x)
    assert_close(y, want.detach(), TOLERANCE, "y")
    want.square().sum().backward()
    model(x).square().sum().backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert_close(q.grad, torch.stack(world.all_gather(p.grad)).mean(0), TOLERANCE, "gradient")


@several
def test_a_whole_ddp_model_saved_and_loaded_trains_on(world):
    """As PyTorch's own tests do it; the loaded layers synchronize again."""
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(Net()))
    x = torch.randn(4, 2, dtype=torch.float64) + world.rank
    model(x).sum().backward()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded.module.norm) is syncbn.SyncBatchNorm1d and loaded.module.norm.layer_name == "norm"
    model.zero_grad()
    outputs = loaded(x), model(x)
    assert torch.equal(*outputs)
    for y in outputs:
        y.square().sum().backward()
    for p, q in zip(loaded.parameters(), model.parameters(), strict=True):
        assert_close(p.grad, q.grad, TOLERANCE, "gradient")
    for part in world.all_gather(loaded.module.norm.running_mean):
        assert torch.equal(part, loaded.module.norm.running_mean)


@several
def test_early_termination_by_ddps_join_raises_on_every_rank(world):
    """DDP's own way to stop all ranks as soon as one has no batch left needs no answer from its layers."""
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(Net()))
    x = torch.randn(4, 2, dtype=torch.float64)
    steps = 0
    with pytest.raises(RuntimeError, match="exhausted"), model.join(throw_on_early_termination=True):
        for _ in range(6 if world.rank == 0 else 3):
            model(x).sum().backward()
            steps += 1
    assert steps == 3


@several
def test_one_rank_alone_evaluates(world):
    """Eval mode on rank 0 only, between training steps, through DDP's module: no rank waits."""
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(Net()))
    x = torch.randn(4, 2, dtype=torch.float64)
    for _ in range(2):
        model(x).sum().backward()
        if world.rank == 0:
            model.eval()
            with collectives() as seen, torch.no_grad():
                model.module(x)
            assert seen == []
            model.train()
        dist.barrier()


def test_passes_in_eval_mode_do_not_change_training(world):
    results = []
    for evaluate in (False, True):
        model = DistributedDataParallel(syncbn.convert_sync_batchnorm(Net()))
        torch.manual_seed(1 + world.rank)
        for _ in range(2):
            x = torch.randn(4, 2, dtype=torch.float64)
            if evaluate:
                model.eval()
                model(x)
                model.train()
            model(x).sum().backward()
        results.append([*model.buffers(), *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# ---- DDP's options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"broadcast_buffers": False},
        {"find_unused_parameters": True},
        {"bucket_cap_mb": 1e-4},
    ],
    ids=lambda options: next(iter(options)),
)
def test_any_option_of_ddp_trains_like_one_process(world, options):
    counts = (3,) * (world.size - 1) + (5,)
    check_training(world, counts, shape=(4,), **options)


@several
def test_buffers_stay_equal_without_broadcasts(world):
    """Every rank computes the same moving statistics, to the bit: DDP's broadcast of buffers is not needed."""
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(Net()), broadcast_buffers=False)
    for _ in range(3):
        model(torch.randn(2 + world.rank, 2, dtype=torch.float64) + world.rank)
    for buffer in model.buffers():
        assert all(torch.equal(buffer, other) for other in world.all_gather(buffer))


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_two_forward_passes_before_a_backward_pass_train_like_one_process(world, broadcast_buffers):
    """As in contrastive losses: the buffers that the second pass changes are not what the first one's backward pass needs."""
    plain = Net()
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(copy.deepcopy(plain)), broadcast_buffers=broadcast_buffers)
    counts = (2,) * (world.size - 1) + (4,)
    batches = torch.randn(2, sum(counts), 2, dtype=torch.float64)
    (plain(batches[0]) * plain(batches[1])).sum().backward()
    mine = [world.mine(batch, counts) for batch in batches]
    ((model(mine[0]) * model(mine[1])).sum() * world.size).backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert_close(q.grad, p.grad, TOLERANCE, "gradient")
    for want, got in zip(plain.buffers(), model.buffers(), strict=True):
        assert_close(got, want, TOLERANCE, "buffer")


def test_gradient_accumulation_under_no_sync_trains_like_one_process(world):
    """Three micro-batches, the first two without DDP's exchange: the layers still synchronize each of them."""
    plain = Net()
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(copy.deepcopy(plain)))
    counts = (2,) * (world.size - 1) + (4,)
    for i in range(3):
        whole = torch.randn(sum(counts), 2, dtype=torch.float64)
        plain(whole).square().sum().backward()
        x = world.mine(whole, counts)
        if i < 2:
            with model.no_sync():
                (model(x).square().sum() * world.size).backward()
        else:
            (model(x).square().sum() * world.size).backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert_close(q.grad, p.grad, TOLERANCE, "gradient")


@several
def test_heads_that_some_ranks_do_not_use_train_like_one_process(world):
    """find_unused_parameters: rank 0 uses the first head, the others use the second. The layers before them exchange as ever."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.heads = Net(), nn.ModuleList(nn.Linear(4, 1, dtype=torch.float64) for _ in range(2))

        def forward(self, x, head):
            return self.heads[head](self.body(x))

    plain, counts = Heads(), (3,) * world.size
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(copy.deepcopy(plain)), find_unused_parameters=True)
    whole = torch.randn(sum(counts), 2, dtype=torch.float64)
    features = plain.body(whole)
    (plain.heads[0](features[:3]).square().sum() + plain.heads[1](features[3:]).square().sum()).backward()
    (model(world.mine(whole, counts), int(world.rank > 0)).square().sum() * world.size).backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert_close(q.grad, p.grad, TOLERANCE, "gradient")
