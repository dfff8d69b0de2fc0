"""Who normalizes together, and how their sums are added: the layers never ask which backend they have.

comm = resolve(process_group)      # None, a ProcessGroup, a one-dimensional DeviceMesh, or an mpi4py communicator
total = comm.all_reduce_(tensor)   # sum over the ranks; every rank calls it, with the same length and dtype
"""

from __future__ import annotations

import functools
import sys
import warnings
from contextlib import suppress
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .. import environment
from .process_group import DefaultGroupCommunicator, NotAMember, ProcessGroupCommunicator


class Communicator(Protocol):
    """A group of ranks that can add tensors."""

    compares: bool  # whether its ranks compare what they are about to exchange; see agreement.py

    @property
    def group(self) -> Any:
        """The communicator's state lives as long as this group, which must be hashable and weakly referenceable. The first access may be
        collective, because it makes the group."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def timeout(self) -> float:
        """Seconds that a rank waits for the others."""

    def among(self, ranks: list[int]) -> Communicator | None:
        """A communicator of `ranks`, some of this one's, which lives as long as this one. Every rank calls it; the others get None."""

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """The elementwise sum of `tensor` over the ranks, bitwise identical on all of them. Overwrites `tensor` and returns it; in a
        compiled graph it may return another tensor."""

    def merges(self, device: torch.device) -> bool:
        """Whether `all_reduce_stats_` takes statistics about any shifts, if x is on this device. If not, all shifts must be 0."""

    def all_reduce_stats_(self, stats: Tensor, channels: int) -> Tensor:
        """The statistics of all ranks' samples, computed from the `stats` of each rank (`reference.stats` [3 * channels + 4]) by one
        collective, bitwise identical on all ranks. It may overwrite and return `stats`."""


class LocalCommunicator:
    """A single process, which has nothing to add."""

    compares = False
    group = None
    rank = 0
    world_size = 1
    timeout = 0.0

    def among(self, ranks: list[int]) -> LocalCommunicator:
        return self

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        return tensor

    def merges(self, device: torch.device) -> bool:
        return True

    def all_reduce_stats_(self, stats: Tensor, channels: int) -> Tensor:
        return stats


LOCAL = LocalCommunicator()


_HAS_DISTRIBUTED = dist.is_available()


def resolve(process_group: Any = None) -> Communicator:
    """The communicator of what a user passes as `process_group`.

    None means a duplicate of the default group if torch.distributed is initialized, else this single process. A group of one rank is a
    single process, too. Raises ValueError for anything that is not a `ProcessGroup`, a one-dimensional `DeviceMesh` or an mpi4py
    communicator, and for a group that this rank is not a member of.
    """
    if process_group is None:
        default = dist.group.WORLD if _HAS_DISTRIBUTED else None
        # While torch 2.11 traces, WORLD is never None.
        if default is None or (torch.compiler.is_dynamo_compiling() and not dist.is_initialized()):
            if not torch.compiler.is_compiling():
                _warn_if_started_with_others()
            return LOCAL
        return DefaultGroupCommunicator(default) if default.size() > 1 else LOCAL
    if isinstance(process_group, ProcessGroupCommunicator):  # syncbn.join gives its layers one
        return process_group
    if _is_mpi(process_group):
        from .mpi import MPICommunicator  # only here, because that file imports mpi4py, which is optional and starts MPI

        mpi = MPICommunicator(process_group)
        return mpi if mpi.world_size > 1 else LOCAL
    if _is_device_mesh(process_group):
        if process_group.ndim != 1:
            raise ValueError(f"process_group must be a one-dimensional DeviceMesh, got {process_group.ndim} dimensions: slice it first")
        if process_group.get_coordinate() is None:
            raise NotAMember("process_group is a DeviceMesh that does not contain this rank")
        process_group = process_group.get_group()
    if dist.is_available() and isinstance(process_group, dist.ProcessGroup):
        return ProcessGroupCommunicator(process_group) if process_group.size() > 1 else LOCAL
    if dist.is_available() and process_group is dist.GroupMember.NON_GROUP_MEMBER:  # what torch's new_group gives the others
        raise NotAMember("process_group does not contain this rank: build the layer with the group that this rank belongs to")
    raise ValueError(
        "process_group must be None, a torch.distributed ProcessGroup, a one-dimensional DeviceMesh or an mpi4py communicator,"
        f" got {type(process_group).__name__}"
    )


@functools.cache  # one warning per process
def _warn_if_started_with_others() -> None:
    here = environment.rank_info()
    if here.world_size > 1:
        warnings.warn(
            f"{here.launcher} started {here.world_size} ranks, but torch.distributed is not initialized: the layers are unsynchronized."
            " Call syncbn.init_process_group() first, or give the layers a process_group",
            stacklevel=2,
        )


def check_type(process_group: Any) -> None:
    """Raises ValueError for what `resolve` would refuse on every rank. A group that this rank is not a member of passes: a layer
    with that group may be built, and is an error only if it is used."""
    if process_group is None:
        return
    with suppress(NotAMember):
        resolve(process_group)


def _is_mpi(group: Any) -> bool:
    mpi = sys.modules.get("mpi4py.MPI")  # whoever holds a communicator has imported it
    return mpi is not None and isinstance(group, mpi.Comm)


def _is_device_mesh(group: Any) -> bool:
    device_mesh = sys.modules.get("torch.distributed.device_mesh")
    return device_mesh is not None and isinstance(group, device_mesh.DeviceMesh)
