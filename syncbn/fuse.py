"""Which batch norms and activations of a model are neighbours in its data flow, and making one layer of the two.

Nothing but a trace can show that no one else sees the value in between: not a residual connection, not a feature tap, not a
hook, not a second call of a shared activation.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .modules import Conversion, SyncBatchNorm, call_of

_ACTIVATIONS = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.SiLU: "silu"}


class Fusible(NamedTuple):
    batch_norm: _BatchNorm
    activation: nn.Module


class FusedActivation(nn.Identity):
    """An activation that the batch norm before it now applies. A torch.fx graph still has it as a node, under its name."""

    original_class: type[nn.Module]

    def forward(self, input: Any) -> Any:
        return call_of(self, input) if isinstance(input, fx.Proxy) else input

    def extra_repr(self) -> str:
        return self.original_class.__name__


def find_fusible(module: nn.Module) -> list[Fusible]:
    """The pairs of batch norm and activation that are the same as one layer, in training and in eval; none, with a warning, where
    `module` cannot be traced."""
    flags = {m: m.training for m in module.modules()}
    try:
        pairs = [_adjacent(module, graph) for mode in (True, False) for graph in traces(module.train(mode))]
    except Exception as error:  # whatever the model's own code raises at a traced value
        warnings.warn(f"fuse_activation: torch.fx cannot trace this model, so nothing is fused ({error})", stacklevel=3)
        return []
    finally:
        for m, training in flags.items():
            m.training = training
    return [pair for pair in pairs[0] if all(pair in others for others in pairs)]


def fuse(pair: Fusible) -> None:
    """Moves the activation into the batch norm, if that was converted. The activation module stays where it is and does nothing."""
    batch_norm, activation = pair
    if not isinstance(batch_norm, SyncBatchNorm) or batch_norm.activation is not None or not batch_norm.fusible:
        return
    batch_norm.activation = _ACTIVATIONS[type(activation)]
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


def traces(module: nn.Module) -> list[fx.Graph]:
    """The data flow of `module` where all arguments are given, and where the optional ones are not: code may ask `if y is None`."""
    parameters = inspect.signature(module.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return [Tracer().trace(module), *([Tracer().trace(module, concrete_args=defaults)] if defaults else [])]


def _adjacent(module: nn.Module, graph: fx.Graph) -> list[Fusible]:
    modules = dict(module.named_modules())
    calls = [modules[node.target] for node in graph.nodes if node.op == "call_module"]
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or type(modules[node.target]) not in _ACTIVATIONS:
            continue
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not (isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1):
            continue
        pair = Fusible(modules[source.target], modules[node.target])
        if isinstance(pair.batch_norm, _BatchNorm) and all(calls.count(m) == 1 and not has_hooks(m) for m in pair):
            pairs.append(pair)
    return pairs


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def has_hooks(module: nn.Module) -> bool:
    """Hooks see a module's input and output, which fusing would change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks) or isinstance(module, torch.jit.ScriptModule)
