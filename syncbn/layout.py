"""Layouts in memory: every one is read as [outer, C, inner].

A contiguous [N, C, *] tensor is (N, C, prod(*)); a channels-last one is (N * prod(*), C, 1). The element of channel c at
(o, i) has the flat index (o * C + c) * inner + i in both, so kernels need not know the memory format, only whether inner is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

# torch has names for these two, and checks them without making a view, in a tenth of the time.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: Tensor) -> bool:
    """True if dimension 1 of x [N, C, *] varies fastest in memory and x has no gaps."""
    memory_format = _CHANNELS_LAST.get(x.dim()) if x.numel() else None  # torch's check is False without elements
    return x.movedim(1, -1).is_contiguous() if memory_format is None else x.is_contiguous(memory_format=memory_format)


def dense(x: Tensor) -> Tensor:
    """x itself if it is contiguous or channels-last, else a contiguous copy."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def dense_like(t: Tensor, x: Tensor) -> Tensor:
    """t with the strides of the dense tensor x of the same shape; a copy only if they differ."""
    if x.is_contiguous():
        return t.contiguous()
    return t if is_channels_last(t) else torch.empty_like(x, dtype=t.dtype).copy_(t)


def outer_c_inner(x: Tensor) -> tuple[int, int, int]:
    """The sizes (outer, C, inner) as which the memory of the dense tensor x [N, C, *] is read."""
    c = x.shape[1]
    inner = 1
    for size in x.shape[2:]:
        inner = inner * size
    if x.is_contiguous():
        return x.shape[0], c, inner
    return x.shape[0] * inner, c, 1


def samples_per_channel(x: Tensor) -> int:
    """The number of values that each channel of x [N, C, *] has: N times the spatial size. A host number, 0 for an empty batch."""
    count = x.shape[0]
    for size in x.shape[2:]:
        count = count * size
    return count


def mask_bytes(x: Tensor) -> int:
    """Bytes of the bit mask that `normalize` keeps for the dense tensor x.

    A row is a plane (length inner), or a pixel's channels (length C) if inner is 1. Element f of memory, in row p, has bit
    f + 8 p (bit b is bit b % 8 of byte b // 8). Because of the 8 padding bits after each row no byte has bits of two rows, so
    that rows are written independently, and element f is bit f % 8 of its byte. The padding bits mean nothing; the CPU's
    kernels and the reference write zeros.
    """
    rows, length = mask_rows(x)
    return (rows * (length + 8) + 7) // 8


def mask_rows(x: Tensor) -> tuple[int, int]:
    """(number of rows, length of a row) of the bit mask of the dense tensor x; see `mask_bytes`."""
    outer, c, inner = outer_c_inner(x)
    return (outer, c) if inner == 1 else (outer * c, inner)
