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
        colours = _hosts()
    elif isinstance(ranks_per_group, int) and ranks_per_group > 0 and world_size % ranks_per_group == 0:
        colours = [rank // ranks_per_group for rank in range(world_size)]
    else:
        raise ValueError(f'ranks_per_group must be "node" or a positive divisor of the world size {world_size}, got {ranks_per_group!r}')
    mine = None
    for colour in dict.fromkeys(colours):  # every rank makes every group, in the same order, as torch wants it
        group = dist.new_group([rank for rank, other in enumerate(colours) if other == colour])
        if colours[dist.get_rank()] == colour:
            mine = group
    assert mine is not None
    return mine


def _hosts() -> list[int]:
    """For each rank a number that stands for its host."""
    digest = hashlib.sha256(socket.gethostname().encode()).digest()
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = torch.tensor([int.from_bytes(digest[:8], "big", signed=True)], device=device)
    hosts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(hosts, mine)
    return [int(host) for host in hosts]
