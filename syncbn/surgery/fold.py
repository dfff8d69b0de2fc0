"""`fold_batchnorm`: for inference, a batch norm becomes part of the convolution or linear layer before it.

activation(gamma * (W x + b - mean) / sqrt(var + eps) + beta)
    = activation(W' x + b')        W' = W * gamma / sqrt(var + eps),  b' = (b - mean) * gamma / sqrt(var + eps) + beta
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .._torch_private import _BatchNorm
from ..keras import SyncBatchNormalization
from ..modules import SyncBatchNorm
from .record import groups_of
from .tails import tail_of
from .trace import is_observed, producer, record_in_fx_graph, regions, warn_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward, SyncBatchNormalization.forward)
_ACTIVATIONS: dict[str | None, Any] = {None: nn.Identity, "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU}


class Foldable(NamedTuple):
    layer: Any  # nn.Linear or a convolution
    batch_norm: _BatchNorm
    dim: int | None  # of the layer's output, where the two are the same as one layer; None for any


class FoldedBatchNorm(nn.Module):
    """What is left of a batch norm whose scale and shift the layer before it has taken: y = activation(x + residual)."""

    def __init__(self, activation: nn.Module, dim: int | None) -> None:
        super().__init__()
        self.activation = activation
        self.dim = dim

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, fx.Proxy):
            return record_in_fx_graph(self, input, residual)
        if self.dim is not None and input.dim() != self.dim:  # dimension 1 is not what the layer before has as its channels
            raise ValueError(f"input must have {self.dim} dimensions for a batch norm that has been folded, got {list(input.shape)}")
        return self.activation(input if residual is None else input + residual)


def fold_batchnorm(module: nn.Module) -> nn.Module:
    """A copy of `module` for inference, in eval mode, where each convolution or linear layer has taken over the batch norm behind it.

    Joined are convolutions (1-D, 2-D, 3-D, transposed, grouped) and linear layers with a batch norm, plain or synchronized, that
    `torch.fx` shows to be the only one to use their output. The outputs are the same up to rounding; weights are computed in float64.
    The activation of a `SyncBatchNorm` stays, as a module. A batch norm stays as it is where it has no running statistics, hooks, a
    forward of its own, or anything but such a layer before it. If `torch.fx` cannot trace `module`, the submodules that it can trace
    are folded, with a warning that names the line.

    `module` itself is left as found: it may go on training. DistributedDataParallel is looked through.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), SyncBatchNorm(8, activation="relu"))
    >>> folded = fold_batchnorm(model)
    >>> sum(isinstance(m, SyncBatchNorm) for m in folded.modules()), sum(p.numel() for p in folded.parameters())
    (0, 224)
    >>> x = torch.randn(2, 3, 8, 8)
    >>> torch.allclose(folded(x), model.eval()(x), atol=1e-5)
    True
    """
    if isinstance(module, DistributedDataParallel):
        module = module.module
    groups = [group for m in module.modules() for group in groups_of(m)]
    module = copy.deepcopy(module, {id(group): group for group in groups}).eval()  # groups cannot be copied
    if isinstance(module, _BatchNorm):
        return module  # alone
    traced, failures = regions(module, modes=(False,))
    warn_of(failures, "fold_batchnorm", "folded", stacklevel=3)
    for region in traced:
        first, *others = [_find_foldable(region.module, graph) for graph in region.graphs]
        for pair in first:
            if all(pair in pairs for pairs in others) and region.exclusive.issuperset((pair.layer, pair.batch_norm)):
                _fold(pair)
                _replace(module, pair.batch_norm, FoldedBatchNorm(_activation(pair.batch_norm), pair.dim).eval())
    return module


def _find_foldable(root: nn.Module, graph: fx.Graph) -> list[Foldable]:
    modules = dict(root.named_modules())
    read = [node.target for node in graph.nodes if node.op == "get_attr"]  # weights that are used outside their layer, too
    calls = [modules[node.target] for node in graph.nodes if node.op == "call_module"]
    pairs = []
    for node in graph.nodes:
        source = producer(node, modules) if node.op == "call_module" else None
        if source is None:
            continue
        inputs = [*node.args, *node.kwargs.values()]
        layer, batch_norm = modules[str(source.target)], modules[str(node.target)]
        shared = any(str(target).startswith((f"{source.target}.", f"{node.target}.")) for target in read)
        alone = inputs.count(node.args[0]) == 1 and not shared
        if alone and all(calls.count(m) == 1 and not is_observed(m) for m in (layer, batch_norm)) and _known(batch_norm, len(inputs)):
            fits, dim = _channels(layer, batch_norm)
            if fits:
                pairs.append(Foldable(layer, batch_norm, dim))
    return pairs


def _known(batch_norm: nn.Module, inputs: int) -> bool:
    """Whether what it computes in eval mode is known here: scale and shift by its running statistics."""
    return (
        isinstance(batch_norm, _BatchNorm)
        and (type(batch_norm).forward in _FORWARDS or tail_of(batch_norm) != ())
        and "forward" not in vars(batch_norm)
        and batch_norm.running_mean is not None
        and batch_norm.running_var is not None
        and (inputs == 1 or not isinstance(batch_norm, SyncBatchNormalization))  # the second would be `training`
    )


def _channels(layer: Any, batch_norm: _BatchNorm) -> tuple[bool, int | None]:
    """(whether the batch norm's channels are the layer's, number of dimensions for which they are or None for any)."""
    axis = getattr(batch_norm, "axis", 1)
    if type(layer) is nn.Linear:
        out, dim = layer.out_features, 2
        if axis == -1:
            return out == batch_norm.num_features, None
    elif type(layer) in _CONVOLUTIONS + _TRANSPOSED:
        out, dim = layer.out_channels, len(layer.kernel_size) + 2
    else:
        return False, None
    return out == batch_norm.num_features and axis % dim == 1, dim


@torch.no_grad()
def _fold(pair: Foldable) -> None:
    """W, b of the layer become W', b'."""
    layer, bn, _ = pair
    old: Tensor = layer.weight
    weight: Tensor
    weight, bias = fuse_conv_bn_weights(
        _outputs_first(old.double(), layer),
        _double(layer.bias),
        _double(bn.running_mean),  # type: ignore[arg-type]
        _double(bn.running_var),  # type: ignore[arg-type]
        bn.eps,
        _double(bn.weight),
        _double(bn.bias),
    )
    weight = _outputs_first(weight, layer).to(old.dtype)
    layer.weight = nn.Parameter(weight.contiguous(memory_format=_memory_format(old)), old.requires_grad)
    layer.bias = nn.Parameter(bias.to(old.dtype), old.requires_grad)


def _outputs_first(weight: Tensor, layer: Any) -> Tensor:
    """[in, out / groups, *] -> [out, in / groups, *] of a transposed convolution, and back; torch's fusion knows one group only."""
    if type(layer) not in _TRANSPOSED:
        return weight
    return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)


def _double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def _memory_format(weight: Tensor) -> torch.memory_format:
    for dim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if weight.dim() == dim and weight.is_contiguous(memory_format=memory_format) and not weight.is_contiguous():
            return memory_format
    return torch.contiguous_format


def _activation(batch_norm: _BatchNorm) -> nn.Module:
    """What the batch norm applies after its shift."""
    if tail := tail_of(batch_norm):
        return nn.Sequential(*(getattr(batch_norm, name) for name in tail))
    if not isinstance(batch_norm, SyncBatchNorm):
        return nn.Identity()
    slope = [batch_norm.negative_slope] * (batch_norm.activation == "leaky_relu")
    return _ACTIVATIONS[batch_norm.activation](*slope)


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Under every name: the model may call a module by another one than the trace does."""
    for name, module in list(root.named_modules(remove_duplicate=False)):
        if module is old:
            root.set_submodule(name, new)
