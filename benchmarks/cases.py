"""The calls to time for one input, by name. `torch` is always the plain, unsynchronized layer unless the name says more."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNormFunction

import syncbn
from syncbn import ops
from syncbn.activation import Activation
from syncbn.comm import ProcessGroupCommunicator

from .timing import Calls

SHAPES = [(8, 64, 112, 112), (2, 256, 56, 56), (8, 512, 14, 14), (16, 2048, 7, 7)]
LARGE = [(32, 64, 112, 112), (32, 256, 56, 56)]  # for a GPU: x and y together do not fit in an H100's cache
TINY = (2, 64, 2, 2)  # its time is that of the host
KINDS = ["contiguous float32", "channels-last float32", "contiguous bfloat16", "channels-last bfloat16"]
EPS = 1e-5


@dataclass
class Inputs:
    """Tensors of one shape, layout and dtype."""

    shape: tuple[int, ...]
    kind: str
    device: str

    def __post_init__(self) -> None:
        layout, dtype = self.kind.split()
        channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(self.shape), torch.contiguous_format)
        memory_format = channels_last if layout == "channels-last" else torch.contiguous_format

        def random() -> Tensor:
            return torch.randn(self.shape, device=self.device).to(getattr(torch, dtype), memory_format=memory_format)

        self.x, self.dy, self.residual = random().requires_grad_(), random(), random().requires_grad_()

    @property
    def megabytes(self) -> float:
        return self.x.numel() * self.x.element_size() / 1e6


class TorchExchanging(nn.SyncBatchNorm):
    """Torch's layer with the collectives of a larger group; in a group of one rank it would be plain batch norm."""

    def forward(self, input: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        running, settings = (self.running_mean, self.running_var), (self.eps, self.momentum, dist.group.WORLD, 1)
        return TorchSyncBatchNormFunction.apply(input, self.weight, self.bias, *running, *settings)


def layers(inputs: Inputs, after: str, compiled: bool = False) -> dict[str, nn.Module]:
    """The layers to compare, by name. A layer exchanges nothing, unless its name says so."""
    channels, device, options = inputs.shape[1], inputs.device, {"activation": "relu" if "relu" in after else None}
    plain = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(inputs.shape)](channels).to(device)
    made = {"syncbn": syncbn.SyncBatchNorm(channels, **options).to(device), "torch": plain}
    if device == "cuda":
        # A layer that is given a communicator exchanges even in a group of one rank: it pays for all but NCCL's kernel.
        exchanging = ProcessGroupCommunicator(dist.group.WORLD)
        made["syncbn, exchanging"] = syncbn.SyncBatchNorm(channels, process_group=exchanging, **options).to(device)
        made["torch SyncBatchNorm, exchanging"] = TorchExchanging(channels).to(device)
    if compiled:
        made["torch.compile"] = torch.compile(copy.deepcopy(plain))
    return made


def forward(name: str, layer: nn.Module, inputs: Inputs, after: str) -> Tensor:
    """BN, BN + ReLU or BN + add + ReLU: ours in one layer, torch's as a network writes it, in place where that is allowed."""
    if name.startswith("syncbn"):
        return layer(inputs.x, inputs.residual if "add" in after else None)
    y = layer(inputs.x)
    if "add" in after:
        y += inputs.residual
    return F.relu(y, inplace=True) if "relu" in after else y


def layer_calls(inputs: Inputs, after: str = "", compiled: bool = False) -> dict[str, Calls]:
    """{"forward": ..., "backward": ..., "both": ...}; each of the three has a call for each layer."""
    calls: dict[str, Calls] = {"forward": {}, "backward": {}, "both": {}}
    for name, layer in layers(inputs, after, compiled).items():
        wanted = [inputs.x, *layer.parameters(), *([inputs.residual] if "add" in after else [])]
        run = lambda name=name, layer=layer: forward(name, layer, inputs, after)  # noqa: E731
        y = run()

        def backward(y=y, wanted=wanted):
            return torch.autograd.grad(y, wanted, inputs.dy, retain_graph=True)

        calls["forward"][name] = run
        calls["backward"][name] = backward
        calls["both"][name] = lambda run=run, wanted=wanted: torch.autograd.grad(run(), wanted, inputs.dy)
    return calls


def rotations(inputs: Inputs) -> int:
    """How many inputs the ops alternate between: enough that no GPU's cache holds them. On the CPU the cache is part of the measurement."""
    return 1 if inputs.device == "cpu" else int(256 // inputs.megabytes) + 1


def op_calls(inputs: Inputs) -> tuple[Calls, dict[str, float]]:
    """(calls of our ops and of torch's, how many tensors of x's size each reads or writes if no cache keeps one)."""
    x, dy, c = inputs.x.detach(), inputs.dy, inputs.shape[1]
    weight, bias, mean, var = (torch.ones(c, device=x.device) for _ in range(4))
    tracked = torch.zeros((), dtype=torch.long, device=x.device)
    stats = ops.stats(x, False)
    sums = ops.backward_reduce(dy, x, stats, weight, bias, None, None, EPS, Activation.none, 0.0)[0]
    residual = inputs.residual.detach()
    running = (mean, var, tracked)
    mask = ops.normalize(x, stats, weight, bias, residual, *running, 0.1, True, EPS, Activation.relu, 0.0)[1]
    fused = (weight, bias, None, mask, EPS, Activation.relu, 0.0)
    calls: Calls = {
        "stats": lambda: ops.stats(x, False),
        "normalize": lambda: ops.normalize(x, stats, weight, bias, None, *running, 0.1, True, EPS, Activation.none, 0.0),
        "backward_reduce": lambda: ops.backward_reduce(dy, x, stats, weight, bias, None, None, EPS, Activation.none, 0.0),
        "backward_input": lambda: ops.backward_input(dy, sums, x, stats, weight, bias, None, None, EPS, Activation.none, 0.0),
        "normalize + add + relu": lambda: ops.normalize(x, stats, weight, bias, residual, *running, 0.1, True, EPS, Activation.relu, 0.0),
        "backward_reduce + add + relu": lambda: ops.backward_reduce(dy, x, stats, *fused),
        "backward_input + add + relu": lambda: ops.backward_input(dy, sums, x, stats, *fused),
    }
    moved = {"stats": 1.0, "normalize": 2.0, "backward_reduce": 2.0, "backward_input": 3.0}
    bits = 1 / (8 * x.element_size())
    moved |= {"normalize + add + relu": 3.0 + bits, "backward_reduce + add + relu": 2.0 + bits, "backward_input + add + relu": 4.0 + bits}
    if not x.is_cuda:
        _, m, invstd = torch.native_batch_norm(x, weight, bias, mean, var, True, 0.1, EPS)
        backward = torch.ops.aten.native_batch_norm_backward
        calls |= {
            "torch forward": lambda: torch.native_batch_norm(x, weight, bias, mean, var, True, 0.1, EPS),
            "torch backward": lambda: backward(dy, x, weight, mean, var, m, invstd, True, EPS, [True] * 3),
        }
        moved |= {"torch forward": 3.0, "torch backward": 5.0}
    else:
        m, invstd = torch.batch_norm_stats(x, EPS)
        count = torch.tensor([x.numel() // c], device=x.device)
        gathered, counts = (m[None], invstd[None], mean, var, 0.1, EPS, count.to(mean.dtype)), count.int()
        sum_dy, sum_dy_xmu, *_ = torch.batch_norm_backward_reduce(dy, x, m, invstd, weight, True, True, True)
        calls |= {
            "torch batch_norm_stats": lambda: torch.batch_norm_stats(x, EPS),
            "torch gather_stats_with_counts": lambda: torch.batch_norm_gather_stats_with_counts(x, *gathered),
            "torch batch_norm_elemt": lambda: torch.batch_norm_elemt(x, weight, bias, m, invstd, EPS),
            "torch backward_reduce": lambda: torch.batch_norm_backward_reduce(dy, x, m, invstd, weight, True, True, True),
            "torch backward_elemt": lambda: torch.batch_norm_backward_elemt(dy, x, m, invstd, weight, sum_dy, sum_dy_xmu, counts),
        }
        moved |= {"torch batch_norm_stats": 1.0, "torch gather_stats_with_counts": 0.0, "torch batch_norm_elemt": 2.0}
        moved |= {"torch backward_reduce": 2.0, "torch backward_elemt": 3.0}
        calls |= cudnn_calls(x, dy, weight, mean, var)
        moved |= {"torch cuDNN forward": 3.0, "torch cuDNN backward": 5.0}
    return calls, moved


def cudnn_calls(x: Tensor, dy: Tensor, weight: Tensor, mean: Tensor, var: Tensor) -> Calls:
    """cuDNN's kernels, which do not synchronize. Empty if cuDNN refuses this input."""
    forward = lambda: torch.ops.aten.cudnn_batch_norm(x, weight, weight, mean, var, True, 0.1, EPS)  # noqa: E731
    try:
        _, m, invstd, reserve = forward()
    except RuntimeError:
        return {}
    backward = torch.ops.aten.cudnn_batch_norm_backward
    return {
        "torch cuDNN forward": forward,
        "torch cuDNN backward": lambda: backward(x, dy, weight, mean, var, m, invstd, EPS, reserve),
    }


def peak_megabytes(inputs: Inputs, after: str) -> dict[str, float]:
    """Peak memory of a step of each layer on a GPU, in MB, not counting its inputs."""
    peak = {}
    for name, layer in layers(inputs, after).items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward(name, layer, inputs, after).backward(inputs.dy)
        peak[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
        inputs.x.grad = inputs.residual.grad = None
    return peak


def kept_megabytes(inputs: Inputs, after: str) -> dict[str, float]:
    """Memory that each layer keeps for its backward pass, in MB; the layer's own input counts as well."""
    kept = {}
    for name, layer in layers(inputs, after).items():
        storages: dict[int, int] = {}

        def pack(t: Tensor, storages=storages) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            forward(name, layer, inputs, after)
        kept[name] = sum(storages.values()) / 1e6
    return kept
