"""Finds batch norms that are directly followed by an activation, and fuses the two.

Only a trace can show that nothing else uses the intermediate value: no residual connection, no feature tap, and no second call of a
shared activation. Modules with hooks, or with a forward of the instance's own, are not fused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx, nn

from .._torch_private import _BatchNorm
from ..activation import NAME_OF_MODULE
from ..keras import SyncBatchNormalization
from ..modules import SyncBatchNorm
from .record import Conversion
from .trace import Region, is_observed, producer, record_in_fx_graph, regions, warn_of

_FORWARDS = (SyncBatchNorm.forward, SyncBatchNormalization.forward)  # any other may compute more after the normalization


class Fusible(NamedTuple):
    batch_norm: _BatchNorm
    activation: nn.Module


class FusedActivation(nn.Identity):
    """An activation that the preceding batch norm now applies. torch.fx graphs still contain it as a node, under its name."""

    original_class: type[nn.Module]

    def forward(self, input: Any) -> Any:
        return record_in_fx_graph(self, input) if isinstance(input, fx.Proxy) else input

    def extra_repr(self) -> str:
        return self.original_class.__name__


def find_fusible(module: nn.Module) -> list[Fusible]:
    """The pairs of batch norm and activation that one layer can replace, in training and in eval mode. Warns if torch.fx cannot trace all
    of `module`."""
    traced, failures = regions(module, modes=(True, False))
    warn_of(failures, "fuse_activation", "fused", stacklevel=4)
    return [pair for region in traced for pair in _in_every_graph(region)]


def _in_every_graph(region: Region) -> list[Fusible]:
    first, *others = [_adjacent(region.module, graph) for graph in region.graphs]
    return [pair for pair in first if all(pair in pairs for pairs in others) and region.exclusive.issuperset(pair)]


def fuse(pair: Fusible) -> None:
    """Moves the activation into the batch norm, if that is a `SyncBatchNorm` that ends with neither an activation nor code of its own. The
    activation module becomes an identity."""
    batch_norm, activation = pair
    if not isinstance(batch_norm, SyncBatchNorm) or type(batch_norm).forward not in _FORWARDS:
        return
    if batch_norm.activation is not None:
        return
    bases = type(batch_norm).__mro__
    if nn.SyncBatchNorm in bases[: bases.index(SyncBatchNorm)]:  # only while torch's class is replaced: later nothing would activate
        return
    batch_norm.activation = NAME_OF_MODULE[type(activation)]
    batch_norm.negative_slope = getattr(activation, "negative_slope", SyncBatchNorm.negative_slope)
    conversion = batch_norm._conversion or Conversion(None, {})
    conversion.fused_activation = activation
    vars(batch_norm)["_conversion"] = conversion
    vars(activation)["original_class"] = type(activation)
    activation.__class__ = FusedActivation


def unfuse(batch_norm: SyncBatchNorm) -> None:
    """Undoes `fuse`."""
    conversion = batch_norm._conversion
    if conversion is not None and isinstance(conversion.fused_activation, FusedActivation):
        conversion.fused_activation.__class__ = vars(conversion.fused_activation).pop("original_class")
        conversion.fused_activation = None
        batch_norm.activation = None
        batch_norm.negative_slope = SyncBatchNorm.negative_slope


def _adjacent(module: nn.Module, graph: fx.Graph) -> list[Fusible]:
    modules = dict(module.named_modules())
    calls = [modules[node.target] for node in graph.nodes if node.op == "call_module"]
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or type(modules[node.target]) not in NAME_OF_MODULE or len(node.args) != 1 or node.kwargs:
            continue
        source = producer(node, modules)
        if source is None:
            continue
        pair = Fusible(modules[source.target], modules[node.target])
        if isinstance(pair.batch_norm, _BatchNorm) and all(calls.count(m) == 1 and not is_observed(m) for m in pair):
            pairs.append(pair)
    return pairs
