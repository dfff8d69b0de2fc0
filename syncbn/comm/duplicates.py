"""Duplicates of process groups: the same ranks, whose messages cannot be confused with those of the group itself.

DistributedDataParallel sums its buckets in the default group, each once its gradients are ready. Two ranks that skip different branches of
a model reach a bucket and a layer's exchange in different orders; in one group, the bucket of one rank would be added to the sums of
another rank's layer. So layers with process_group=None exchange in a duplicate of the default group.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from .._torch_private import timeout_of_backend
from .failures import Incomplete

_duplicates: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()
_lock = threading.Lock()  # two threads of a rank may reach the first exchange together


def duplicate_of_default(default: dist.ProcessGroup) -> dist.ProcessGroup:
    """The duplicate of the default group. The first call makes it, on every rank together. It is destroyed with the default group."""
    duplicate = _duplicates.get(default)
    if duplicate is None:
        with _lock:
            duplicate = _duplicates.get(default)
            if duplicate is None:
                try:
                    duplicate = _duplicates[default] = dist.new_group(timeout=timeout_of(default))
                except Exception as error:  # from the store, or from a backend that connects at once
                    raise Incomplete(f"the layers' duplicate of the default group could not be made: {error}") from error
    return duplicate


def duplicate_of(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A duplicate of this rank's group, made once. Every rank of the default group calls this, with its own group."""
    duplicate = _duplicates.get(group)
    if duplicate is None:
        duplicate = _duplicates[group] = split(all_gather(min(dist.get_process_group_ranks(group))), group)
        destroy_with(group, duplicate)
    return duplicate


def destroy_with(group: dist.ProcessGroup, other: dist.ProcessGroup) -> None:
    """Destroys `other` when `group` is destroyed: else torch would keep it, with its connections and threads."""
    weakref.finalize(group, _destroy, other).atexit = False


def _destroy(group: dist.ProcessGroup) -> None:
    with suppress(ValueError, AssertionError):  # if it has already been destroyed with the default group
        dist.destroy_process_group(group)


def split(colours: list[int], like: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group of the ranks that have this rank's colour, with backend and timeout of the group `like`. Every rank of the default group
    calls it, with the colours of all."""
    groups = {}
    for colour in dict.fromkeys(colours):  # torch requires every rank to make every group in the same order
        ranks = [rank for rank, other in enumerate(colours) if other == colour]
        groups[colour] = dist.new_group(ranks, timeout_of(like), dist.get_backend(like))
    return groups[colours[dist.get_rank()]]


def all_gather(number: int) -> list[int]:
    """Each rank's number, over the default group."""
    local = torch.tensor([number], device=_device())
    numbers = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(numbers, local)
    return [int(other) for other in numbers]


def timeout_of(group: dist.ProcessGroup | None) -> timedelta | None:
    """The group's timeout, for a new group, which would otherwise get torch's default. None for a backend that has none."""
    assert group is not None
    return timeout_of_backend(group, torch.device("cpu")) or timeout_of_backend(group, torch.device("cuda"))  # NCCL's is for CUDA only


def _device() -> str:
    """The device type whose tensors the default group exchanges."""
    return "cpu" if "cpu:" in dist.get_backend_config() else "cuda"  # such as cpu:gloo,cuda:nccl
