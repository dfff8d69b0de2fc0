"""Checks of what a caller gives the functions, all but `check_count` before any exchange: if every rank refuses its arguments, none waits.

Messages begin with `layer`: `layer "encoder.bn1" (SyncBatchNorm2d(8))`, without a name `SyncBatchNorm2d(8)`, or `sync_batch_norm`.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ._torch_private import has_tangent, is_transformed
from .comm import LOCAL, Communicator
from .layout import samples_per_channel
from .moments import parts

TENSORS = ("input", "residual", "weight", "bias", "running_mean", "running_var", "num_batches_tracked")
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


Tensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # those of TENSORS


def check(layer: str, tensors: Tensors) -> None:
    """Raises unless the tensors fit each other: input and residual [N, C, *], num_batches_tracked one int64, the others [C].

    Raises:
        TypeError: the input's dtype is not one of FLOATING.
        ValueError: a tensor has the wrong shape, dtype or device.
    """
    if not _are_usual(tensors):
        _refuse(layer, *tensors)


def check_eager(layer: str, tensors: Tensors) -> None:
    """`check` and `check_memory`, for code that is not compiled.

    Nothing is remembered from call to call, since the same tensor object may get another dtype, device or memory (`layer.half()`, FSDP).
    Instead a few cheap tests recognize the usual case, in which everything fits. Only if they do not, `_refuse` looks for the error.
    """
    if not _are_usual(tensors):
        _refuse(layer, *tensors)
    for t in tensors:
        if t is not None and not t.untyped_storage().nbytes():
            check_memory(layer, *tensors)


def _are_usual(tensors: Tensors) -> bool:
    """Whether a few cheap tests show that the tensors fit. If they do not show it, the tensors may still fit."""
    input, residual, weight, bias, running_mean, running_var, num_batches_tracked = tensors
    shape, dtype, device = input.shape, input.dtype, input.device
    vector = shape[1:2]
    if not vector or not vector[0] or dtype not in FLOATING:
        return False
    for t in (weight, bias, running_mean, running_var):
        if t is not None and not (
            t.shape == vector and (t.dtype is dtype or t.dtype is torch.float32) and t.device == device and t.is_contiguous()
        ):
            return False
    return (
        (running_mean is None) is (running_var is None)
        and (num_batches_tracked is None or _is_count(num_batches_tracked, device))
        and (residual is None or (residual.dtype is dtype and residual.shape == shape and residual.device == device))
    )


def _is_count(t: Tensor, device: torch.device) -> bool:
    return t.dtype is torch.int64 and t.device == device and t.numel() == 1


def _refuse(
    layer: str,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> None:
    """Raises the error that `check` describes; returns if there is none."""
    shape, dtype, device = input.shape, input.dtype, input.device
    vector = shape[1:2]
    if len(shape) < 2 or shape[1] == 0:
        raise ValueError(f"{layer}: input must have at least 2 dimensions [N, C, *] and C > 0, got {list(shape)}")
    if dtype not in FLOATING:
        raise TypeError(f"{layer}: input must be float32, float16, bfloat16 or float64, got {dtype}")
    for what, t in (("weight", weight), ("bias", bias), ("running_mean", running_mean), ("running_var", running_var)):
        if t is None:
            continue
        if t.shape != vector:
            raise ValueError(f"{layer}: {what} must be [{shape[1]}] to match input {list(shape)}, got {list(t.shape)}")
        if t.device != device:
            raise ValueError(f"{layer}: {what} must be on {device} as the input is, got {t.device}")
        if t.dtype not in FLOATING:
            raise ValueError(f"{layer}: {what} must be floating point, got {t.dtype}")
        if t.dtype not in (dtype, torch.float32, torch.float64) and what in ("weight", "bias"):
            raise ValueError(f"{layer}: {what} must be float32, float64 or of the input's type, {dtype}, got {t.dtype}")
        if what.startswith("running") and shape[1] > 1 and t.stride(0) == 0:
            raise ValueError(f"{layer}: {what} must have memory of its own for each channel, got an expanded tensor")
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{layer}: running_mean and running_var must be given both or neither")
    if (t := num_batches_tracked) is not None and not _is_count(t, device):
        got = f"{t.dtype} {list(t.shape)} on {t.device}"
        raise ValueError(f"{layer}: num_batches_tracked must be one int64 on {device} as the input is, got {got}")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (shape, dtype, device):
        raise ValueError(
            f"{layer}: residual must be {list(shape)} {dtype} on {device} as the input is,"
            f" got {list(residual.shape)} {residual.dtype} on {residual.device}"
        )


def check_transforms(layer: str, input: Tensor) -> None:
    """For code that is not compiled. Raises an error with a remedy where torch's own would mention only an internal function.

    Raises:
        TypeError: the input is a DTensor.
        NotImplementedError: a transform of torch.func runs, or the input has a tangent of forward-mode differentiation.
    """
    distributed = None if type(input) is Tensor else sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(input, distributed.DTensor):
        raise TypeError(
            f"{layer}: a DTensor cannot be normalized in training mode. Give the layer this rank's samples, sharded along dimension 0:"
            " y = DTensor.from_local(layer(x.to_local()), x.device_mesh, x.placements), and leave it out of distribute_module"
        )
    if is_transformed() or has_tangent(input):
        raise NotImplementedError(
            f"{layer}: synchronized batch norm in training mode has no forward-mode derivative and no torch.func transform (jvp, grad,"
            " vmap): use torch.autograd.grad, with create_graph=True for higher derivatives, or the layer in eval mode"
        )


def check_memory(layer: str, *tensors: Tensor | None) -> None:
    """Raises ValueError for a tensor whose storage has been freed, as FSDP frees parameters: torch's own functions may crash.

    `tensors` are in the order of TENSORS, whose last ones may be missing."""
    for t in tensors:
        if t is not None and t.untyped_storage().nbytes() == 0 and t.numel() > 0:
            what = TENSORS[next(i for i, other in enumerate(tensors) if other is t)]
            raise ValueError(f"{layer}: {what} {list(t.shape)} has no memory: its storage has been freed")


def explain(layer: str, tensors: Tensors) -> None:
    """Raises the error of `check_eager`, which names the layer, if that is why an op has failed; otherwise returns."""
    try:
        check_eager(layer, tensors)
    except (TypeError, ValueError) as refused:
        raise refused from None
    except Exception:
        pass  # what cannot even be checked, such as a sparse tensor: the op's own error says more


def plain(t: Tensor | None) -> Tensor | None:
    """t as a tensor of torch's own class, if its class takes part in torch's functions by `__torch_function__`."""
    if t is None or type(t) is Tensor or type(t).__torch_function__ is torch.nn.Parameter.__torch_function__:  # which is disabled
        return t
    return t.as_subclass(Tensor)


def check_count(layer: str, stats: Tensor | None, x: Tensor, comm: Communicator) -> None:
    """Raises ValueError, on every rank, if each channel has one value over all ranks: its variance is undefined.

    Only ranks on which a channel has at most one value call this, since it waits for the device. If one value is all there is, every rank
    is such a rank.
    """
    if (comm is not LOCAL and torch.compiler.is_compiling()) or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return  # a graph cannot read the number of samples
    total = samples_per_channel(x) if comm is LOCAL or stats is None else parts(stats).samples.item()
    if total == 1:
        raise ValueError(
            f"{layer}: expected more than 1 value per channel over all ranks when training, got input {list(x.shape)} on this rank"
        )
