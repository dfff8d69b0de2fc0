"""The activations: for each its number in the ops, its public name, its module, its value and its derivative.

To add one: docs/architecture.md.
"""

from __future__ import annotations

from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(IntEnum):
    """Numbered as `enum class Activation` in csrc/args.h."""

    none = 0
    relu = 1
    leaky_relu = 2
    silu = 3


MODULES: dict[Activation, type[nn.Module]] = {
    Activation.none: nn.Identity,
    Activation.relu: nn.ReLU,
    Activation.leaky_relu: nn.LeakyReLU,
    Activation.silu: nn.SiLU,
}
NAMES = tuple(activation.name for activation in Activation if activation is not Activation.none)  # in the public interface
NAME_OF_MODULE: dict[type, str] = {MODULES[activation]: activation.name for activation in Activation if activation.name in NAMES}
_NUMBERS: dict[str | None, Activation] = {None: Activation.none, **{name: Activation[name] for name in NAMES}}


def parse(name: str | None) -> Activation:
    """The activation of this public name; None is `Activation.none`.

    Raises:
        ValueError: there is no such activation.
    """
    try:
        return _NUMBERS[name]
    except (KeyError, TypeError):
        raise ValueError(f"activation must be None or one of {NAMES}, got {name!r}") from None


def needs_only_sign(activation: int) -> bool:
    """Whether the derivative depends on the sign of z and on nothing else."""
    return activation in (Activation.relu, Activation.leaky_relu)


def keeps_mask(activation: int, has_residual: bool) -> bool:
    """Whether `normalize` returns the signs of z for the backward pass. Without a residual they follow from x."""
    return has_residual and needs_only_sign(activation)


def keeps_residual(activation: int, has_residual: bool) -> bool:
    """Whether the backward pass computes z again from x and the residual."""
    return has_residual and activation != Activation.none and not needs_only_sign(activation)


def writes_dz(activation: int, residual: Tensor | None, mask: Tensor | None) -> bool:
    """Whether a residual was added before an activation, so that the residual's gradient differs from dy. The backward pass then has
    either the mask or the residual, as `keeps_mask` and `keeps_residual` say."""
    return activation != Activation.none and (mask if needs_only_sign(activation) else residual) is not None


def module_of(name: str | None, negative_slope: float) -> nn.Module:
    """The module that applies the activation of this public name."""
    activation = parse(name)
    return MODULES[activation](*[negative_slope] * (activation == Activation.leaky_relu))


def activate(z: Tensor, activation: int, negative_slope: float) -> Tensor:
    """activation(z), elementwise. Raises ValueError if no activation has this number."""
    if activation == Activation.none:
        return z
    if activation == Activation.relu:
        return F.relu(z)
    if activation == Activation.leaky_relu:
        return F.leaky_relu(z, negative_slope)
    if activation == Activation.silu:
        return F.silu(z)
    raise _unknown(activation)


def scaled_by_sign(dy: Tensor, positive: Tensor, activation: int, negative_slope: float) -> Tensor:
    """dz = dy * activation'(z) for an activation that needs only the sign of z; `positive` [like dy] holds where z is above 0, or NaN."""
    # Not dy * 0 for relu: an infinite dy stays out, as in torch.
    return torch.where(positive, dy, dy * negative_slope if activation == Activation.leaky_relu else dy.new_zeros(()))


def derivative(z: Tensor, activation: int) -> Tensor:
    """activation'(z), elementwise, for an activation that needs more than the sign of z. Raises ValueError for any other number."""
    if activation != Activation.silu:
        raise _unknown(activation)
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _unknown(activation: int) -> ValueError:
    """The bindings raise the same."""
    return ValueError(f"syncbn: activation must be one of syncbn.activation.Activation, got {activation}")
