"""The four ops: their schemas on one screen, and their fake kernels.

Every device runs `reference.py` unless `native.py` has loaded a compiled kernel for it. Names and arguments are the same in the
schema, the reference and the kernel. Tensors are dense (`layout.dense`); checks on what a caller passes are made
in `arguments.py`, before any collective.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native, reference
from .activation import keeps_mask, writes_dz
from .layout import mask_bytes
from .moments import stats_numel, sums_numel

SCHEMAS = {
    "stats": "(Tensor x, bool rank_weighted, bool shifted=False, int tag=0) -> Tensor",
    "normalize": (
        "(Tensor x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual,"
        " Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked,"
        " float? momentum, float eps, bool unbiased, int activation, float negative_slope,"
        " int tag=0, int ranks=0, Tensor(d!)? alarm=None) -> (Tensor y, Tensor mask)"
    ),
    "backward_reduce": (
        "(Tensor dy, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask,"
        " float eps, int activation, float negative_slope, int tag=0) -> (Tensor sums, Tensor dweight, Tensor dbias)"
    ),
    "backward_input": (
        "(Tensor dy, Tensor x, Tensor stats, Tensor sums, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask,"
        " float eps, int activation, float negative_slope, bool rank_weighted=False,"
        " int tag=0, int ranks=0, Tensor(a!)? alarm=None) -> (Tensor dx, Tensor dz)"
    ),
}

_library = torch.library.Library("syncbn", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")

native.load(SCHEMAS)  # after the definitions, which the compiled kernels fill in

stats = torch.ops.syncbn.stats.default
normalize = torch.ops.syncbn.normalize.default
backward_reduce = torch.ops.syncbn.backward_reduce.default
backward_input = torch.ops.syncbn.backward_input.default


def _on_one_device(*tensors: Tensor | None) -> None:
    """A tensor on "meta" among others would bring them here: what is then returned was never computed."""
    devices = {str(t.device) for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"syncbn: all tensors must be on one device, got {', '.join(sorted(devices))}")


@torch.library.register_fake("syncbn::stats", lib=_library)
def _(x, rank_weighted, shifted=False, tag=0):
    return x.new_empty(stats_numel(x.shape[1]), dtype=torch.float64)


@torch.library.register_fake("syncbn::normalize", lib=_library)
def _(
    x, stats, weight, bias, residual, running_mean, running_var, num_batches_tracked, momentum, eps, unbiased, activation, negative_slope,
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
def _(dy, x, stats, sums, weight, bias, residual, mask, eps, activation, negative_slope, rank_weighted=False, tag=0, ranks=0, alarm=None):
    _on_one_device(dy, x, stats, sums, weight, bias, residual, mask)
    return torch.empty_like(x), torch.empty_like(x) if writes_dz(activation, residual, mask) else x.new_empty(0)
