"""Checks for calls that would silently lose something of a layer: an option, an activation, a group. Each error names the remedy."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from ._torch_private import _BatchNorm
from .activation import NAME_OF_MODULE, NAMES
from .comm.identity import description_of

# Options that torch's layers do not have, with the value that makes a layer the same as torch's.
OPTIONS_OF_OURS = {"activation": None, "weighting": "samples", "unbiased": True}


def options_of_ours(layer: nn.Module) -> str:
    """The options by which `layer` differs from torch's layers, such as `activation='relu', unbiased=False`; empty if there are none."""
    values = {name: getattr(layer, name) for name in OPTIONS_OF_OURS}
    return ", ".join(f"{name}={value!r}" for name, value in values.items() if value != OPTIONS_OF_OURS[name])


def check_activation(value: Any) -> None:
    """Refuses a module, a class or a function where the name of an activation is expected.

    Raises:
        ValueError: `value` is neither None nor a string. torch.nn.Module would keep a module as a child that no forward pass calls.
    """
    if value is None or isinstance(value, str):
        return
    cls = value if isinstance(value, type) else type(value)
    name = NAME_OF_MODULE.get(cls, getattr(value, "__name__", None))
    if name not in NAMES:
        remedy = f"put it after the layer, or write one of {NAMES}"
    elif hasattr(value, "negative_slope"):
        remedy = f'write activation="{name}", negative_slope={value.negative_slope}'
    else:
        remedy = f'write activation="{name}"'
    raise ValueError(f"activation must be None or a name, got {value!r}: {remedy}")


def check_group_can_be_pickled(layer: nn.Module, groups: list[Any]) -> None:
    """Refuses to pickle a layer whose process group cannot be pickled.

    Raises:
        TypeError: as pickle raises, but with the layer and the remedy.
    """
    for group in groups:
        try:
            group.__reduce_ex__(4)
        except Exception as error:
            raise TypeError(
                f"{description_of(layer)} cannot be pickled, because it has a process group ({error}): save model.state_dict(), or a whole"
                " model after setting layer.process_group = None, or syncbn.revert_sync_batchnorm(copy.deepcopy(model)) if it was converted"
                " and had no group before"
            ) from error


def check_no_other_converter(layer: nn.Module) -> None:
    """Refuses a conversion to another class of batch norm, which would lose options that only our class has.

    The converters of torch, timm, apex and Lightning make the new layer, with this layer's tensors, and then ask for this layer's
    children. So the caller's caller, if it is such a converter, has a variable with the new layer.

    Raises:
        RuntimeError: the caller's caller has a variable with such a layer.
    """
    if torch.compiler.is_compiling() or not (lost := options_of_ours(layer)):
        return
    tensors = [t for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var) if t is not None]
    for value in sys._getframe(2).f_locals.values():
        if not isinstance(value, _BatchNorm) or (hasattr(value, "weighting") and options_of_ours(value) == lost):
            continue
        if any(t is other for t in tensors for other in (value.weight, value.bias, value.running_mean, value.running_var)):
            raise RuntimeError(
                f"{description_of(layer)} cannot become a {type(value).__name__}, which has no {lost}: to convert the model to another"
                " kind of batch norm, call syncbn.revert_sync_batchnorm(model) first, which brings fused activations back, and build layers"
                " without such options"
            )
