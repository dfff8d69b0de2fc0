"""The ops: their schemas on one screen, and their fake kernels.

Every device runs `reference.py` unless `native.py` has loaded a compiled kernel for it. Names and arguments are the same in the schema,
the reference and the kernel; the reference says what they mean. Tensors are dense (`layout.dense`). Compiled ops refuse wrong tensors;
before an exchange, `arguments.py` does so for every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor

from . import native, reference
from ._torch_private import is_dispatched
from .activation import keeps_mask, writes_dz
from .layout import mask_bytes
from .moments import stats_numel, sums_numel

SCHEMAS = {
    "stats": "(Tensor x, bool rank_weighted, bool shifted=False, int tag=0) -> Tensor",
    "normalize": (
        "(Tensor x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual,"
        " Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked,"
        " float? momentum, bool unbiased, float eps, int activation, float negative_slope,"
        " int tag=0, int ranks=0, Tensor(d!)? alarm=None) -> (Tensor y, Tensor mask)"
    ),
    "backward_reduce": (
        "(Tensor dy, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask,"
        " float eps, int activation, float negative_slope, int tag=0) -> (Tensor sums, Tensor dweight, Tensor dbias)"
    ),
    "backward_input": (
        "(Tensor dy, Tensor sums, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask,"
        " float eps, int activation, float negative_slope, bool rank_weighted=False,"
        " int tag=0, int ranks=0, Tensor(a!)? alarm=None) -> (Tensor dx, Tensor dz)"
    ),
    # Both ops of a direction in one call, for a single process without a residual: one call costs the host less than two.
    "batch_norm": (
        "(Tensor x, Tensor? weight, Tensor? bias,"
        " Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked,"
        " float? momentum, bool unbiased, float eps, int activation, float negative_slope, bool rank_weighted=False)"
        " -> (Tensor y, Tensor stats)"
    ),
    "batch_norm_backward": (
        "(Tensor dy, Tensor x, Tensor stats, Tensor? weight, Tensor? bias,"
        " float eps, int activation, float negative_slope, bool rank_weighted=False) -> (Tensor dx, Tensor dweight, Tensor dbias)"
    ),
}

_library = torch.library.Library("syncbn", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")

# The libraries are loaded after the definitions, for which they bring kernels.
_compiled_for_cpu, _compiled_for_cuda = (library.loaded for library in native.load(SCHEMAS))


def refuse_wrong_tensors(x: Tensor) -> bool:
    """Whether the ops refuse wrong tensors that come with this x. Compiled ops do. The reference and the fake kernels check less, and under
    a dispatch mode any code may run in place of the ops."""
    return type(x) is Tensor and (_compiled_for_cpu if x.is_cpu else x.is_cuda and _compiled_for_cuda) and not is_dispatched()


F = TypeVar("F", bound=Callable[..., object])


def _op(function: F) -> F:
    """The op that this function of the reference specifies: for type checkers it is that function. At run time it is torch's own callable,
    since a function around it would cost a small layer as much time as a kernel."""
    return cast(F, getattr(torch.ops.syncbn, function.__name__).default)


stats = _op(reference.stats)
normalize = _op(reference.normalize)
backward_reduce = _op(reference.backward_reduce)
backward_input = _op(reference.backward_input)
batch_norm = _op(reference.batch_norm)
batch_norm_backward = _op(reference.batch_norm_backward)


def _on_one_device(*tensors: Tensor | None) -> None:
    """Raises ValueError unless all are on one device: with one of them on "meta", the op would return what was never computed."""
    devices = {str(t.device) for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"syncbn: all tensors must be on one device, got {', '.join(sorted(devices))}")


@torch.library.register_fake("syncbn::stats", lib=_library)
def _(x, rank_weighted, shifted=False, tag=0):
    return x.new_empty(stats_numel(x.shape[1]), dtype=torch.float64)


@torch.library.register_fake("syncbn::normalize", lib=_library)
def _(
    x, stats, weight, bias, residual, running_mean, running_var, num_batches_tracked, momentum, unbiased, eps, activation, negative_slope,
    tag=0, ranks=0, alarm=None,
):  # fmt: skip
    _on_one_device(x, stats, weight, bias, residual, running_mean, running_var, num_batches_tracked)
    mask_numel = mask_bytes(x) if keeps_mask(activation, residual is not None) else 0
    return torch.empty_like(x), x.new_empty(mask_numel, dtype=torch.uint8)


@torch.library.register_fake("syncbn::backward_reduce", lib=_library)
def _(dy, x, stats, weight, bias, residual, mask, eps, activation, negative_slope, tag=0):
    _on_one_device(dy, x, stats, weight, bias, residual, mask)
    return (
        x.new_empty(sums_numel(x.shape[1]), dtype=torch.float64),
        x.new_empty(0) if weight is None else x.new_empty(x.shape[1], dtype=weight.dtype),
        x.new_empty(0) if bias is None else x.new_empty(x.shape[1], dtype=bias.dtype),
    )


@torch.library.register_fake("syncbn::backward_input", lib=_library)
def _(dy, sums, x, stats, weight, bias, residual, mask, eps, activation, negative_slope, rank_weighted=False, tag=0, ranks=0, alarm=None):
    _on_one_device(dy, sums, x, stats, weight, bias, residual, mask)
    return torch.empty_like(x), torch.empty_like(x) if writes_dz(activation, residual, mask) else x.new_empty(0)


@torch.library.register_fake("syncbn::batch_norm", lib=_library)
def _(
    x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, unbiased, eps, activation, negative_slope,
    rank_weighted=False,
):  # fmt: skip
    own, running = stats(x, rank_weighted), (running_mean, running_var, num_batches_tracked)
    return normalize(x, own, weight, bias, None, *running, momentum, unbiased, eps, activation, negative_slope)[0], own


@torch.library.register_fake("syncbn::batch_norm_backward", lib=_library)
def _(dy, x, stats, weight, bias, eps, activation, negative_slope, rank_weighted=False):
    kept = x, stats, weight, bias, None, None, eps, activation, negative_slope
    sums, dweight, dbias = backward_reduce(dy, *kept)
    return backward_input(dy, sums, *kept)[0], dweight, dbias
