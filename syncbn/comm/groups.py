"""Subgroups of ranks that normalize together. Exchanges inside a node are several times as fast as between nodes."""

from __future__ import annotations

import hashlib
import socket

import torch.distributed as dist

from .duplicates import all_gather, split


def new_group(ranks_per_group: int | str) -> dist.ProcessGroup:
    """This rank's subgroup, for `process_group=`. Every rank of the default group calls it.

    Args:
        ranks_per_group: "node", the ranks on this host; a number n, ranks 0..n-1, n..2n-1, and so on; or "world", all ranks, as a group
            that shares no messages with the default group. (Layers with process_group=None use such a group anyway.)

    Raises:
        ValueError: not "node", "world" or a positive number that divides the world size, or torch.distributed is not initialized.

    >>> device = syncbn.init_process_group()
    >>> layer = syncbn.SyncBatchNorm(8, process_group=new_group("node"))
    >>> torch.distributed.destroy_process_group()
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("new_group needs an initialized torch.distributed: call syncbn.init_process_group() first")
    world_size = dist.get_world_size()
    if ranks_per_group == "node":
        digest = hashlib.sha256(socket.gethostname().encode()).digest()
        colours = all_gather(int.from_bytes(digest[:8], "big", signed=True))
    elif ranks_per_group == "world":
        colours = [0] * world_size
    elif isinstance(ranks_per_group, int) and ranks_per_group > 0 and world_size % ranks_per_group == 0:
        colours = [rank // ranks_per_group for rank in range(world_size)]
    else:
        raise ValueError(
            f'ranks_per_group must be "node", "world" or a positive divisor of the world size {world_size}, got {ranks_per_group!r}'
        )
    return split(colours, dist.group.WORLD)
