"""`fold_batchnorm`: folds a batch norm into the preceding convolution or linear layer for inference.

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
from ..activation import module_of
from ..keras import SyncBatchNormalization
from ..modules import SyncBatchNorm
from .record import groups_of
from .tails import tail_of
from .trace import is_observed, producer, record_in_fx_graph, regions, warn_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward, SyncBatchNormalization.forward)


class Foldable(NamedTuple):
    layer: Any  # nn.Linear or a convolution
    batch_norm: _BatchNorm
    dim: int | None  # number of output dimensions for which the fold is valid; None: any


class FoldedBatchNorm(nn.Module):
    """What remains of a batch norm after its scale and shift were folded into the preceding layer: y = activation(x + residual)."""

    def __init__(self, activation: nn.Module, dim: int | None) -> None:
        super().__init__()
        self.activation = activation
        self.dim = dim

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, fx.Proxy):
            return record_in_fx_graph(self, input, residual)
        if self.dim is not None and input.dim() != self.dim:  # then dimension 1 is not the preceding layer's channels
            raise ValueError(f"input must have {self.dim} dimensions for a batch norm that has been folded, got {list(input.shape)}")
        return self.activation(input if residual is None else input + residual)


def fold_batchnorm(module: nn.Module) -> nn.Module:
    """A copy of `module` for inference, in eval mode, where each convolution or linear layer has absorbed the batch norm that follows it.

    A convolution (1-D, 2-D, 3-D, transposed, grouped) or linear layer absorbs a batch norm, plain or synchronized, if `torch.fx` shows
    that nothing else uses the layer's output. The outputs are equal up to rounding; weights are computed in float64. The activation of a
    `SyncBatchNorm` stays, as a module. A batch norm is not folded if it has hooks, no running statistics, or a forward of its own that is
    not known, or if it follows anything but such a layer. If `torch.fx` cannot trace `module`, the submodules that it can trace are
    folded, with a warning that names the line.

    `module` itself is unchanged and may continue training. DistributedDataParallel is unwrapped.

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
        return module  # there is no layer to fold it into
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
    calls = [modules[str(node.target)] for node in graph.nodes if node.op == "call_module"]
    pairs = []
    for node in graph.nodes:
        source = producer(node, modules) if node.op == "call_module" else None
        if source is None:
            continue
        inputs = [*node.args, *node.kwargs.values()]
        layer, batch_norm = modules[str(source.target)], modules[str(node.target)]
        called_once = all(calls.count(m) == 1 and not is_observed(m) for m in (layer, batch_norm))
        used_once = inputs.count(node.args[0]) == 1 and not _reads_tensors_of(root, graph, layer, batch_norm)
        if called_once and used_once and _is_scale_and_shift(batch_norm, len(inputs)):
            fits, dim = _channels(layer, batch_norm)
            if fits:
                pairs.append(Foldable(layer, batch_norm, dim))
    return pairs


def _reads_tensors_of(root: nn.Module, graph: fx.Graph, *called: nn.Module) -> bool:
    """Whether the graph uses a tensor of the called modules outside the calls. A tensor may have several names."""
    tensors = {id(t) for module in called for t in (*module.parameters(), *module.buffers())}
    named = (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))
    names = {name for name, t in named if id(t) in tensors}
    return any(node.op == "get_attr" and node.target in names for node in graph.nodes)


def _is_scale_and_shift(batch_norm: nn.Module, inputs: int) -> bool:
    """Whether its eval-mode computation is one that we can fold: scale and shift by its running statistics."""
    return (
        isinstance(batch_norm, _BatchNorm)
        and (type(batch_norm).forward in _FORWARDS or tail_of(batch_norm) != ())
        and batch_norm.running_mean is not None
        and batch_norm.running_var is not None
        and (inputs == 1 or not isinstance(batch_norm, SyncBatchNormalization))  # a second input would be `training`
    )


def _channels(layer: Any, batch_norm: _BatchNorm) -> tuple[bool, int | None]:
    """(whether the batch norm's channels are the layer's output channels, `Foldable.dim`)."""
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
    """Replaces the layer's W and b by W' and b'."""
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
    """[in, out / groups, *] -> [out, in / groups, *] for a transposed convolution, and back; torch's fusion supports one group only."""
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
    """The module that applies the batch norm's activation, or the submodules of its tail."""
    if tail := tail_of(batch_norm):
        return nn.Sequential(*(getattr(batch_norm, name) for name in tail))
    if not isinstance(batch_norm, SyncBatchNorm):
        return nn.Identity()
    return module_of(batch_norm.activation, batch_norm.negative_slope)


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replaces `old` under every name, because a module can be registered more than once."""
    for name, module in list(root.named_modules(remove_duplicate=False)):
        if module is old:
            root.set_submodule(name, new)
