"""What a caller may give the functions: checked once, before any collective, so that what is refused is refused by no rank alone.

`layer` is how an error begins: `layer "encoder.bn1" (SyncBatchNorm2d(8))`, or `sync_batch_norm`."""

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


def check(
    layer: str,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> None:
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
    if (t := num_batches_tracked) is not None and (t.dtype, t.device) != (torch.int64, device):
        raise ValueError(f"{layer}: num_batches_tracked must be int64 on {device} as the input is, got {t.dtype} on {t.device}")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (shape, dtype, device):
        raise ValueError(
            f"{layer}: residual must be {list(shape)} {dtype} on {device} as the input is,"
            f" got {list(residual.shape)} {residual.dtype} on {residual.device}"
        )


def check_transforms(layer: str, input: Tensor) -> None:
    """Raises where torch could only say that an internal function lacks a method."""
    if torch.compiler.is_compiling():
        return
    distributed = sys.modules.get("torch.distributed.tensor")
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
    """Raises for a tensor whose storage has been freed, as FSDP frees parameters: torch's own functions may crash."""
    if torch.compiler.is_compiling():
        return
    for what, t in zip(TENSORS, tensors, strict=True):
        if t is not None and t.untyped_storage().nbytes() == 0 and t.numel() > 0:
            raise ValueError(f"{layer}: {what} {list(t.shape)} has no memory: its storage has been freed")


def plain(t: Tensor | None) -> Tensor | None:
    """t as a tensor of torch's own class, if its class takes part in torch's functions by `__torch_function__`."""
    if t is None or type(t) is Tensor or type(t).__torch_function__ is torch.nn.Parameter.__torch_function__:  # which is disabled
        return t
    return t.as_subclass(Tensor)


def check_count(layer: str, stats: Tensor, x: Tensor, comm: Communicator) -> None:
    """Raises where each channel has one value over all ranks: its variance is undefined.

    Reads the device only where this rank has at most one value, so that no training step of real size waits for the device.
    All ranks that could raise do read it, and agree.
    """
    local = samples_per_channel(x)
    if local > 1 or (comm is not LOCAL and torch.compiler.is_compiling()) or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if (local if comm is LOCAL else parts(stats).samples.item()) == 1:
        raise ValueError(
            f"{layer}: expected more than 1 value per channel over all ranks when training, got input {list(x.shape)} on this rank"
        )
