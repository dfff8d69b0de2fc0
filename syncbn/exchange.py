"""A layer's communicator: every collective carries the layer's name, into checks, logs, profiles and errors.

SYNCBN_DEBUG=1 logs each collective through `logging`, at the price of waiting for it; profilers show a range for each.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from . import agreement, environment
from .comm import LOCAL, Communicator


class Agreed:
    """In which groups, and for which directions, the ranks have found that they mean the same layer."""

    def __init__(self) -> None:
        self.groups: dict[str, WeakSet] = {}

    def on(self, kind: str) -> WeakSet:
        """The groups in which the ranks have compared their exchanges of this kind."""
        return self.groups.setdefault(kind, WeakSet())


# Beside the layers, not in them: a copy has agreed to nothing, and a layer that one rank reverts and converts again, to export it, has.
_agreed: WeakKeyDictionary[torch.nn.Module, Agreed] = WeakKeyDictionary()


def agreed_by(layer: torch.nn.Module) -> Agreed:
    """The `Agreed` of this layer."""
    found = _agreed.get(layer)
    if found is None:
        found = _agreed[layer] = Agreed()
    return found


class Exchange(NamedTuple):
    """A communicator that adds tensors on behalf of one layer."""

    comm: Communicator
    layer: str
    dtype: torch.dtype  # of the layer's input; like weighting and eps the same on all ranks
    weighting: str
    eps: float
    agreed: Agreed | None  # None for a call without a layer, which has no first time
    shape: tuple[int, ...] | None = None  # of the layer's input on this rank, for messages

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
            RankMismatchError: the ranks do not mean the same exchange; on all of them.
            RuntimeError: some rank did not come within the group's timeout, or its process has ended. Names the layer.
        """
        return self._exchanged(self.comm.all_reduce_, tensor, tensor.numel(), kind)

    def merges(self, device: torch.device) -> bool:
        """`Communicator.merges`."""
        return self.comm.merges(device)

    def all_reduce_stats_(self, stats: Tensor, channels: int) -> Tensor:
        """`Communicator.all_reduce_stats_`, as the layer's forward exchange. Raises as `all_reduce_`."""
        numbers = stats.numel() - channels  # all shifts are known, or merged away
        return self._exchanged(lambda stats: self.comm.all_reduce_stats_(stats, channels), stats, numbers, "forward")

    def _exchanged(self, collective: Callable[[Tensor], Tensor], tensor: Tensor, numbers: int, kind: str) -> Tensor:
        if self.comm is LOCAL or torch.compiler.is_compiling():
            return collective(tensor)
        mode = environment.settings.check
        try:
            self._agree(tensor, numbers, kind, mode)
            with torch.profiler.record_function(f"syncbn.{kind} {self.layer}") if _is_profiling() else nullcontext():
                if _debugs():
                    return self._logged(collective, tensor, numbers, kind)
                return collective(tensor)
        except (agreement.RankMismatchError, ValueError, TypeError, MemoryError, torch.OutOfMemoryError):
            raise  # this rank's own affair
        except Exception as error:
            raise RuntimeError(
                f"{self.layer}: rank {self.rank} of {self.world_size} waited in vain for the other ranks in its {kind} exchange"
                f" of {numbers} numbers. A rank has failed, has left the loop, or has skipped the layer; SYNCBN_CHECK=always"
                f" finds where ranks part. ({error})"
            ) from error

    def _agree(self, tensor: Tensor, numbers: int, kind: str, mode: str) -> None:
        if mode == "off" or not self.comm.compares or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        if mode == "always" or (self.agreed is not None and self.group not in self.agreed.on(kind)):
            what = f"{kind} of {self.layer}, {numbers} numbers, {self.dtype}, weighting {self.weighting}, eps {self.eps}"
            agreement.compare(self.comm, what, "" if self.shape is None else f"input {list(self.shape)}", tensor.device)
            if _debugs():
                _log().info("rank %d  %s  %s  compared", self.rank, self.layer, kind)
            if self.agreed is not None:
                self.agreed.on(kind).add(self.group)

    def _logged(self, collective: Callable[[Tensor], Tensor], tensor: Tensor, numbers: int, kind: str) -> Tensor:
        start = _now(tensor)
        total = collective(tensor)
        milliseconds = (_now(tensor) - start) * 1e3
        dtype = str(tensor.dtype).removeprefix("torch.")
        _log().info("rank %d  %s  %s  %d x %s  %.3f ms", self.rank, self.layer, kind, numbers, dtype, milliseconds)
        return total


def _is_profiling() -> bool:
    return torch.autograd._profiler_enabled()  # a range costs microseconds even where nobody looks


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _debugs() -> bool:
    return environment.settings.debug


@functools.cache
def _log() -> logging.Logger:
    """Shown without any setup of logging, too."""
    log = logging.getLogger("syncbn")
    log.setLevel(logging.INFO)
    if not logging.getLogger().handlers:
        log.addHandler(logging.StreamHandler())
    return log
