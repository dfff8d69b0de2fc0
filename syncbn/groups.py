"""Subgroups of ranks to normalize in: exchanges inside a node are several times as fast as between nodes."""

from __future__ import annotations

import hashlib
import socket

import torch
import torch.distributed as dist


def new_group(ranks_per_group: int | str) -> dist.ProcessGroup:
    """This rank's subgroup, for `process_group=`. Every rank of the default group calls it.

    Args:
        ranks_per_group: "node", the ranks on this host; or a number n, ranks 0..n-1, n..2n-1, and so on.

    Raises:
        ValueError: not "node" or a positive number that divides the world size, or torch.distributed is not initialized.

    >>> device = syncbn.init_process_group()
    >>> layer = syncbn.SyncBatchNorm(8, process_group=new_group("node"))
    >>> torch.distributed.destroy_process_group()
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("new_group needs an initialized torch.distributed: call syncbn.init_process_group() first")
    world_size = dist.get_world_size()
    if ranks_per_group == "node":
        digest = hashlib.sha256(socket.gethostname().encode()).digest()
        colours = _all_gather(int.from_bytes(digest[:8], "big", signed=True))
    elif isinstance(ranks_per_group, int) and ranks_per_group > 0 and world_size % ranks_per_group == 0:
        colours = [rank // ranks_per_group for rank in range(world_size)]
    else:
        raise ValueError(f'ranks_per_group must be "node" or a positive divisor of the world size {world_size}, got {ranks_per_group!r}')
    return _split(colours)


def twin(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A second group of the same ranks, with messages of its own. Every rank of the default group calls it, with its own group."""
    return _split(_all_gather(min(dist.get_process_group_ranks(group))))


def _split(colours: list[int]) -> dist.ProcessGroup:
    """The group of the ranks that have this rank's colour."""
    mine = None
    world = dist.group.WORLD
    assert world is not None
    timeout = world._get_backend(torch.device(_device())).options._timeout  # a new group would get torch's default
    for colour in dict.fromkeys(colours):  # every rank makes every group, in the same order, as torch wants it
        group = dist.new_group([rank for rank, other in enumerate(colours) if other == colour], timeout=timeout)
        if colours[dist.get_rank()] == colour:
            mine = group
    assert mine is not None
    return mine


def _all_gather(number: int) -> list[int]:
    """Each rank's number."""
    mine = torch.tensor([number], device=_device())
    numbers = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(numbers, mine)
    return [int(other) for other in numbers]


def _device() -> str:
    """What the default group exchanges."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
