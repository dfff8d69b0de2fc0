"""Errors of an exchange that is impossible or has failed: whose failure it is, and what the message says."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch_private import is_batched, is_fake


class Incomplete(RuntimeError):
    """A collective, or the making of a group, did not complete: another rank is missing, or a connection is lost."""


CAUSES = (
    "Another rank has failed, has finished early (syncbn.join(model), not model.join(), lets ranks have different numbers of batches),"
    " has skipped this layer, or runs it in eval mode; SYNCBN_CHECK=always finds where the ranks diverge"
)


def explained(error: Exception, layer: str, rank: int, world_size: int, exchange: str) -> RuntimeError:
    """The error to raise in place of `error`: the layer, the backend's words, and what this rank was doing.

    Args:
        exchange: such as "forward exchange of 64 channels (the 11th exchange since the group was made)".
    """
    words = str(error).rstrip(". \n") or type(error).__name__
    if isinstance(error, (Incomplete, dist.DistError)):
        return RuntimeError(
            f"{layer}: {words}\nrank {rank} of {world_size} could not complete its {exchange} with the other ranks. {CAUSES}"
        )
    return RuntimeError(f"{layer}: {words}\nrank {rank} of {world_size} could not start its {exchange}. The other ranks are not the cause")


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st"""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number % 100 not in (11, 12, 13) else "th"
    return f"{number}{ending}"


def check_possible(tensor: Tensor) -> None:
    """Raises RuntimeError if this tensor cannot be exchanged. Call it before the group is made, because the other ranks help to make it."""
    if torch.jit.is_tracing():
        raise RuntimeError("an exchange with other ranks cannot be traced by torch.jit: trace the model in eval mode")
    if tensor.is_meta or (type(tensor) is not Tensor and is_fake(tensor)):
        raise RuntimeError(f"a {'meta' if tensor.is_meta else 'fake'} tensor has no values that the ranks could exchange")
    if is_batched(tensor):
        raise RuntimeError(
            "several gradients in one call (is_grads_batched=True, jacobian(vectorize=True)) cannot be exchanged with other ranks:"
            " compute one after the other"
        )
