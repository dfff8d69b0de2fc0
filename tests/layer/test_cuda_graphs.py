"""The law: a training step that is captured in a CUDA graph does at each replay what the eager step does."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

import syncbn
from support import ROOT
from support.models import two_norms
from support.oracle import assert_close
from support.processes import run

pytestmark = [pytest.mark.gpu, pytest.mark.world_size(1)]


def net(group: object = None) -> nn.Sequential:
    model = two_norms(2, (3, 8, 4), kernel=3)
    model[1].momentum = None
    return syncbn.convert_sync_batchnorm(model, group, fuse_activation=True).cuda()


def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for p in model.parameters():
        p.grad = None
    y = model(x)
    y.square().sum().backward()
    return y


@pytest.mark.parametrize("rows", [4, 0], ids="batch of {}".format)
def test_captured_step_equals_the_eager_one(rows, group_of_one):
    """Forward, backward and moving statistics, an empty batch included, and the collectives: nothing reads the device."""
    model = net(group_of_one)
    static = torch.zeros(rows, 3, 8, 8, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, static.normal_())
    torch.cuda.current_stream().wait_stream(side)
    eager = copy.deepcopy(model)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(model, static)
    for _ in range(3):
        x = torch.randn_like(static)
        static.copy_(x)
        graph.replay()
        want = step(eager, x)
        assert_close(y, want.detach().double(), 1e-5, "y")  # float32; convolutions may take another algorithm
        for p, q in zip(model.parameters(), eager.parameters(), strict=True):
            scale = torch.stack([p.grad.abs().max() for p in eager.parameters()]).max()  # a bias before a norm has gradient 0
            assert_close(p.grad, q.grad.double(), 1e-4, "gradient", scale)
        for got, other in zip(model.buffers(), eager.buffers(), strict=True):
            assert_close(got, other.double(), 1e-5, "buffer")


# Nothing of this library has run in the process, and float16 has 4 kernels of its own: the runtime loads each at its first launch.
FIRST_LAUNCH = """
import torch
import syncbn

layer = syncbn.SyncBatchNorm(16, activation="relu").cuda().half()
x, residual, dy = torch.randn(3, 8, 16, 12, 12, device="cuda").half().unbind()
wanted = [x.requires_grad_(), residual.requires_grad_(), *layer.parameters()]
torch.cuda.synchronize()

def step():
    y = layer(x, residual)
    return y.detach(), *torch.autograd.grad(y, wanted, dy)

graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = step()
for t in captured:
    t.fill_(-1)
graph.replay()
torch.cuda.synchronize()
assert all(map(torch.equal, captured, step()))
print("equal")
"""


def test_the_first_launch_of_a_kernel_may_be_captured(subprocess_env):
    done = run([sys.executable, "-c", FIRST_LAUNCH], env=subprocess_env, cwd=ROOT, timeout=100)
    assert done.returncode == 0 and done.stdout == "equal\n", done.stdout + done.stderr


def test_a_graphed_callable_computes_what_the_model_does():
    model, plain = net(), net()
    graphed = torch.cuda.make_graphed_callables(model, (torch.randn(4, 3, 8, 8, device="cuda", requires_grad=True),))
    model.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 8, 8, device="cuda")
    assert_close(graphed(x.clone().requires_grad_()), plain(x).detach().double(), 1e-5, "y")


def test_compiled_with_cuda_graphs_trains_as_eager():
    """torch.compile's graphs keep a pool of memory, of which nothing may be left in use but their outputs."""
    model, plain = net(), net()
    compiled = torch.compile(model, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(4, 3, 8, 8, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        y, want = step(compiled, x), step(plain, x)
        assert_close(y, want.detach().double(), 1e-5, "y")
    for got, other in zip(model.buffers(), plain.buffers(), strict=True):
        assert_close(got, other.double(), 1e-5, "buffer")
