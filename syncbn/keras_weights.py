"""The weights of a Keras batch normalization: to tensors and back, for `from_keras` and `to_keras` of both layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ._torch_private import _BatchNorm

TORCH_NAMES = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def named_tensors(weights: Mapping[str, Any] | Sequence[Any], center: bool, scale: bool) -> dict[str, Tensor]:
    """The weights that a Keras layer exports, by name, each a floating-point tensor [C].

    Args:
        weights: a dict of arrays, whose names may have a prefix and a number, as in "bn/gamma:0"; or the list of Keras' `get_weights()`.
        center, scale: whether a list contains beta, and gamma.

    Returns:
        moving_mean, moving_variance, and gamma and beta if the weights have them. Integers become torch's default dtype.

    Raises:
        ValueError: the names or the number of arrays are wrong, or an array is not [C].
    """
    present = {"gamma": scale, "beta": center, "moving_mean": True, "moving_variance": True}
    names = [name for name, is_present in present.items() if is_present]
    if isinstance(weights, Mapping):
        named = {key.split("/")[-1].split(":")[0]: value for key, value in weights.items()}  # "bn/gamma:0" -> "gamma"
        if len(named) < len(weights) or not {"moving_mean", "moving_variance"} <= set(named) <= set(TORCH_NAMES):
            raise ValueError(
                f"weights must have moving_mean and moving_variance, and may have gamma and beta, each once, got {list(weights)}"
            )
    elif len(weights) == len(names):
        named = dict(zip(names, weights, strict=True))
    else:
        raise ValueError(f"weights must be {names}, for center={center} and scale={scale}, got {len(weights)} arrays")
    tensors = {name: torch.as_tensor(value) for name, value in named.items()}
    tensors = {name: t if t.is_floating_point() else t.to(torch.get_default_dtype()) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dim() != 1 or tensor.shape != tensors["moving_mean"].shape:
            wanted = list(tensors["moving_mean"].shape)
            raise ValueError(f"{name} must be [C] like moving_mean {wanted}, got {list(tensor.shape)}")
    return tensors


@torch.no_grad()
def copy_tensors(layer: _BatchNorm, tensors: Mapping[str, Tensor]) -> None:
    """Copies gamma, beta, moving_mean and moving_variance into `layer`'s weight, bias, running_mean and running_var, and sets to None
    those that `tensors` does not have."""
    for name, torch_name in TORCH_NAMES.items():
        if name in tensors:
            getattr(layer, torch_name).copy_(tensors[name])
        elif getattr(layer, torch_name) is not None:
            setattr(layer, torch_name, None)


def to_keras(layer: _BatchNorm) -> dict[str, Any]:
    """gamma, beta, moving_mean and moving_variance as numpy arrays [C], those that the layer has; bfloat16 becomes float32.

    Raises:
        ValueError: the layer has no running statistics, or has not been built.
    """
    if layer.running_mean is None or is_lazy(layer.running_mean):
        raise ValueError("Keras weights need running statistics: track_running_stats=True, and a layer that has been built")
    tensors = {name: getattr(layer, torch_name) for name, torch_name in TORCH_NAMES.items()}
    return {
        name: (t.float() if t.dtype == torch.bfloat16 else t).detach().cpu().numpy().copy()  # numpy has no bfloat16
        for name, t in tensors.items()
        if t is not None
    }
