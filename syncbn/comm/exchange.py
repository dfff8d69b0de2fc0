"""A layer's communicator: attaches the layer to its collectives, for verification, logs, profiles and errors.

    group        ──► the first call makes it, if it is a duplicate
    verify       ──► agreement.py: the ranks compare signatures, the first time or always
    collective   ──► the communicator's, under a profiler's range, logged with SYNCBN_DEBUG=1
    count        ──► identity.py: only if all of this has completed

SYNCBN_DEBUG=1 logs each collective through `logging`, at the price of waiting for it; profilers show a range for each.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .. import environment
from . import LOCAL, Communicator, agreement, failures
from .identity import LayerRecord, state_of


class Exchange(NamedTuple):
    """A communicator that adds tensors on behalf of one layer."""

    comm: Communicator
    layer: str  # in logs and profiles
    dtype: torch.dtype  # of the layer's input; like weighting and eps the same on all ranks
    weighting: str
    eps: float
    record: LayerRecord | None  # None for functional calls, which are never remembered
    shape: tuple[int, ...] | None = None  # of the layer's input on this rank

    @property
    def group(self) -> object:
        return self.comm.group

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def world_size(self) -> int:
        return self.comm.world_size

    def all_reduce_(self, tensor: Tensor, kind: str = "exchange") -> Tensor:
        """`Communicator.all_reduce_`. `kind` is the exchange's name, such as "forward".

        Raises:
            RankMismatchError: the ranks disagree about the exchange; raised on every rank.
            RuntimeError: another rank did not arrive within the group's timeout, or its process exited; or the exchange failed on this
                rank. Names the layer.
        """
        return self._exchanged(self.comm.all_reduce_, tensor, tensor.numel(), kind)

    def merges(self, device: torch.device) -> bool:
        """`Communicator.merges`."""
        return self.comm.merges(device)

    def all_reduce_stats_(self, stats: Tensor, channels: int) -> Tensor:
        """`Communicator.all_reduce_stats_`, as the layer's forward exchange. Raises as `all_reduce_`."""
        # All shifts are known, or merged away.
        return self._exchanged(lambda stats: self.comm.all_reduce_stats_(stats, channels), stats, stats.numel() - channels, "forward")

    def signature(self, kind: str, values: int) -> str:
        """What this rank is about to do, equal on all ranks. `values` is the number of elements."""
        return f"{kind} of {self._identity(self.group)}, {self._size(values)}, {self.dtype}, weighting {self.weighting}, eps {self.eps}"

    def details(self) -> str:
        """What may differ between ranks, for errors."""
        shape = "" if self.shape is None else f"input {list(self.shape)}"
        position = f"the {failures.ordinal(state_of(self.group).exchanges + 1)} exchange since the group was made"
        return ", ".join(filter(None, (self._description(), shape, position)))

    def _exchanged(self, collective: Callable[[Tensor], Tensor], tensor: Tensor, values: int, kind: str) -> Tensor:
        if self.comm is LOCAL or torch.compiler.is_compiling():
            return collective(tensor)
        group = None
        try:
            group = self.group
            self._verify(tensor, values, kind)
            with torch.profiler.record_function(f"syncbn.{kind} {self.layer}") if _is_profiling() else nullcontext():
                total = self._logged(collective, tensor, values, kind) if environment.settings.debug else collective(tensor)
        except (agreement.RankMismatchError, ValueError, TypeError, MemoryError, torch.OutOfMemoryError):
            raise  # local errors, not communication failures
        except Exception as error:
            raise self._failure(error, group, values, kind) from error
        state_of(group).exchanges += 1
        if self.record is not None and self.comm.compares:
            self.record.join(group)
        return total

    def _verify(self, tensor: Tensor, values: int, kind: str) -> None:
        mode = environment.settings.check
        if mode == "off" or not self.comm.compares or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        membership = None if self.record is None else self.record.memberships.get(self.group)
        first = self.record is not None and (membership is None or kind not in membership.verified)
        if not (first or mode == "always"):
            return
        agreement.verify(self.comm, self.signature(kind, values), self.details(), tensor.device)
        if environment.settings.debug:
            _log().info("rank %d  %s  %s  compared", self.rank, self.layer, kind)
        if self.record is not None:
            self.record.join(self.group).verified.add(kind)

    def _failure(self, error: Exception, group: object, values: int, kind: str) -> RuntimeError:
        """`group` is None if it could not be made: to ask for it would try again."""
        description = self._description()
        layer = self._identity(group) + (f" ({description})" if description else "")
        position = failures.ordinal(1 if group is None else state_of(group).exchanges + 1)
        exchange = f"{kind} exchange of {self._size(values)} (the {position} exchange since the group was made)"
        return failures.explained(error, layer, self.rank, self.world_size, exchange)

    def _identity(self, group: object) -> str:
        return self.layer if self.record is None else self.record.identity_in(group)

    def _description(self) -> str:
        return "" if self.record is None else self.record.description()

    def _size(self, values: int) -> str:
        return f"{values} values" if self.shape is None else f"{self.shape[1]} channels"

    def _logged(self, collective: Callable[[Tensor], Tensor], tensor: Tensor, values: int, kind: str) -> Tensor:
        start = _now(tensor)
        total = collective(tensor)
        milliseconds = (_now(tensor) - start) * 1e3
        dtype = str(tensor.dtype).removeprefix("torch.")
        _log().info("rank %d  %s  %s  %d x %s  %.3f ms", self.rank, self.layer, kind, values, dtype, milliseconds)
        return total


def _is_profiling() -> bool:
    return torch.autograd._profiler_enabled()  # an unused range still costs microseconds


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


@functools.cache
def _log() -> logging.Logger:
    """Visible even if the application has not configured logging."""
    log = logging.getLogger("syncbn")
    log.setLevel(logging.INFO)
    if not logging.getLogger().handlers:
        log.addHandler(logging.StreamHandler())
    return log
