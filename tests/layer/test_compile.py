"""The law: a compiled model computes what the eager one does. Over torch.distributed it is one graph, or under DDP one for each bucket,
with one exchange each way for each layer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from functorch.compile import min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from support.oracle import assert_close
from support.world import UNDER_MPI
from syncbn import ops
from syncbn.activation import Activation
from syncbn.moments import sums_numel

SPLITS = {1: [(6,)], 2: [(5, 1), (0, 4)]}  # uneven: torch.compile makes other graphs for 0 samples and for 1
few_ranks = pytest.mark.world_size(1, 2)  # compiling is slow, and more than two ranks would not exercise new code
# These models have torch's default group. Under MPI there is none, and each rank would repeat what a single process does.
default_group = pytest.mark.world_size(1) if UNDER_MPI else few_ranks


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class PlainThenFused(nn.Module):
    """A batch norm, and one with residual and activation fused."""

    def __init__(self, momentum: float | None = 0.1, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1, bias=False, dtype=dtype)
        self.norm = syncbn.SyncBatchNorm(4, momentum=momentum, dtype=dtype)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False, dtype=dtype)
        self.last = syncbn.SyncBatchNorm(4, momentum=momentum, dtype=dtype, activation="relu")

    def forward(self, x):
        x = self.norm(self.first(x)).sin()
        return self.last(self.second(x), x)


def step(model, x, autocast=False):
    """y, the gradients, and the buffers."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().sum().backward() if y.dtype == torch.bfloat16 else y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def check_equal(got, want, tolerance):
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert_close(one, other.detach().double(), tolerance, "compiled")


@default_group
@pytest.mark.parametrize(("autocast", "momentum"), [(False, None), (True, 0.1)], ids=["float64, cumulative average", "autocast"])
def test_compiled_model_equals_eager(world, counts, autocast, momentum):
    """fullgraph: training twice, then eval; empty batches included."""
    dtype = torch.float32 if autocast else torch.float64
    eager = PlainThenFused(momentum, dtype)
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager", fullgraph=True)
    for training in (True, True, False):
        eager.train(training), compiled.train(training)
        x = world.mine(torch.randn(sum(counts), 3, 4, 4, dtype=dtype), counts)
        # bfloat16: the two graphs may round an intermediate value differently, half a unit (4e-3) each time
        check_equal(step(compiled, x, autocast), step(eager, x, autocast), 3e-2 if autocast else 1e-10)


@default_group
def test_inductor_equals_eager(world):
    eager = PlainThenFused(None, torch.float64)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True)
    for _ in range(2):
        x = torch.randn(4, 3, 4, 4, dtype=torch.float64) + world.rank
        check_equal(step(compiled, x), step(eager, x), 1e-10)
    eager.eval(), compiled.eval()
    with torch.no_grad():
        assert_close(compiled(x), eager(x), 1e-10, "y")


@pytest.mark.world_size(1)
def test_a_model_has_one_graph_for_each_mode(world):
    """It has one for training and one for eval, however often it changes between them and however many steps it does."""
    counter = CompileCounterWithBackend("aot_eager")
    model = torch.compile(PlainThenFused(), backend=counter, fullgraph=True)
    for training in (True, False, True, True, False):
        model.train(training)
        for _ in range(2):
            step(model, torch.randn(4, 3, 4, 4))
    assert counter.frame_count == 2


class Graphs:
    """A backend that keeps the names of what the forward and the backward graph call."""

    def __init__(self) -> None:
        self.calls: dict[str, list[str]] = {}
        self.backend = aot_autograd(
            fw_compiler=self._keep("forward"), bw_compiler=self._keep("backward"), partition_fn=min_cut_rematerialization_partition
        )

    def _keep(self, name):
        def compiler(graph, _):
            self.calls[name] = [str(node.target) for node in graph.graph.nodes]
            return graph

        return compiler

    def count(self, name: str) -> list[int]:
        return [sum(name in call for call in self.calls[which]) for which in ("forward", "backward")]


@pytest.mark.world_size(2)
@pytest.mark.process_group
def test_the_graph_has_one_collective_for_each_layer_and_direction(world):
    graphs = Graphs()
    model = torch.compile(PlainThenFused(), backend=graphs.backend, fullgraph=True)
    step(model, torch.randn(4, 3, 4, 4))
    assert graphs.count("all_reduce") == [2, 2]


@few_ranks
def test_compiled_equals_eager_over_any_communicator(world):
    """Over MPI, too, where the graph breaks at the exchange."""
    eager = syncbn.convert_sync_batchnorm(nn.Sequential(nn.Conv1d(3, 4, 1, bias=False), nn.BatchNorm1d(4)), world.group).double()
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager")
    for _ in range(2):
        x = torch.randn(4, 3, 5, dtype=torch.float64) + world.rank
        check_equal(step(compiled, x), step(eager, x), 1e-10)


@default_group
@pytest.mark.parametrize("contexts", [True, False], ids=["contexts", "plain"])
def test_a_checkpoint_inside_a_compiled_model_updates_the_statistics_once(world, counts, contexts):
    """With the contexts no exchange is repeated. Without them, torch 2.12 and newer repeats each forward exchange."""
    torch.manual_seed(0)
    eager = PlainThenFused(dtype=torch.float64)
    checkpointed = copy.deepcopy(eager)
    kwargs = {"context_fn": syncbn.checkpoint_contexts} if contexts else {}
    graphs = Graphs()

    @torch.compile(backend=graphs.backend, fullgraph=True)
    def run(x):
        return checkpoint(checkpointed, x, use_reentrant=False, **kwargs)

    x = world.mine(torch.randn(sum(counts), 3, 4, 4, dtype=torch.float64), counts).requires_grad_()
    y = run(x)
    y.square().sum().backward()
    got = [y, x.grad, *(p.grad for p in checkpointed.parameters()), *checkpointed.buffers()]
    check_equal(got, step(eager, x.detach()), 1e-10)
    if dist.is_initialized() and world.size > 1:
        assert graphs.count("all_reduce") in ([[2, 2]] if contexts else [[2, 4], [2, 2]])


@pytest.mark.world_size(2)
@pytest.mark.process_group
@pytest.mark.parametrize("bucket_cap_mb", [25, 1e-4], ids=["two buckets", "three buckets"])
def test_compiled_ddp_trains_like_eager_ddp(world, bucket_cap_mb, monkeypatch):
    """Under DDP the graph is split where buckets of gradients end; the results are the eager DDP model's."""
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    eager = DistributedDataParallel(PlainThenFused(dtype=torch.float64), bucket_cap_mb=bucket_cap_mb)
    compiled = DistributedDataParallel(copy.deepcopy(eager.module), bucket_cap_mb=bucket_cap_mb)
    graphs = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, backend=graphs)
    compiled_graphs = []
    for _ in range(2):
        x = torch.randn(4, 3, 4, 4, dtype=torch.float64) + world.rank
        eager.zero_grad(), compiled.zero_grad()
        ys = [model(x) for model in (eager, run)]
        for y in ys:
            y.square().sum().backward()
        got, want = ([y, *(p.grad for p in m.parameters()), *m.buffers()] for y, m in zip(ys, (eager, compiled), strict=True))
        check_equal(got, want, 1e-10)
        compiled_graphs.append(graphs.frame_count)
    assert compiled_graphs[1] == compiled_graphs[0] == (2 if bucket_cap_mb == 25 else 3), compiled_graphs  # one for each bucket


X = (4, 3, 5)


def op_arguments():
    x, dy, residual = torch.randn(3, *X)
    stats = ops.stats(x, False)
    weight, bias = torch.randn(2, 3)
    running = (torch.zeros(3), torch.ones(3), torch.tensor(0))
    _, mask = ops.normalize(x, stats, weight, bias, residual, None, None, None, 0.1, True, 1e-5, Activation.relu, 0.0)
    sums = torch.randn(sums_numel(3), dtype=torch.float64)
    return [
        (ops.stats, (x, False)),
        (ops.stats, (x.to(torch.bfloat16), True)),
        (ops.normalize, (x, stats, weight, bias, None, *running, 0.1, True, 1e-5, Activation.none, 0.0)),
        (ops.normalize, (x, stats, None, None, residual, None, None, None, None, False, 1e-5, Activation.leaky_relu, 0.01)),
        (ops.backward_reduce, (dy, x, stats, weight, bias, None, None, 1e-5, Activation.silu, 0.0)),
        (ops.backward_reduce, (dy, x, stats, weight, bias, None, mask, 1e-5, Activation.relu, 0.0)),
        (ops.backward_input, (dy, sums, x, stats, weight, None, None, None, 1e-5, Activation.none, 0.0)),
        (ops.backward_input, (dy, sums, x, stats, weight, bias, residual, None, 1e-5, Activation.silu, 0.0)),
        (ops.batch_norm, (x, weight, None, *running, None, True, 1e-5, Activation.leaky_relu, 0.01)),
        (ops.batch_norm_backward, (dy, x, stats, weight, None, 1e-5, Activation.leaky_relu, 0.01)),
    ]


@pytest.mark.world_size(1)
@pytest.mark.parametrize("case", range(10))
def test_opcheck_passes(case):
    """Schema, fake kernel and traceability of every op, as torch.library.opcheck sees them."""
    op, arguments = op_arguments()[case]
    torch.library.opcheck(op, arguments)
