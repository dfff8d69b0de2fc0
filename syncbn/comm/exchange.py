"""Runs a layer's exchanges over a communicator: verifies them, and names the layer in logs, profiles and errors.

    group        ──► the first exchange makes it, if it is a duplicate, and finds how the ranks exchange: way.py
    compare      ──► agreement.py compares signatures, at first exchanges or always; not in one host's memory, which verifies each exchange
    exchange     ──► in the ranks' memory or over the group
    count        ──► identity.py: an exchange once it has completed, a layer's number already after its first comparison

SYNCBN_DEBUG=1 logs each eager exchange through `logging`, at the price of waiting for it; profilers show a range for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import environment
from .._torch_private import is_batched, is_profiling
from ..moments import rebase
from . import LOCAL, Communicator, agreement, failures
from .debug import log, now
from .identity import GroupState, LayerRecord, Membership, state_of
from .peer_memory import Missing
from .peers import PeerExchange
from .shared_memory import Mismatch
from .sharing import Sharing
from .signatures import NO_TICKET, TAGS, Ticket, signature, size
from .way import OVER_THE_GROUP, Key, MemoryOrGroup


class LayerExchanges:
    """Runs a layer's exchanges over a communicator, in one call of the layer and in that call's backward passes.

    It looks up the state of the layer and of its group only once, because the look-ups take half as long as an exchange in shared memory.
    """

    __slots__ = ("_state", "channels", "comm", "dtype", "eps", "layer", "membership", "record", "shape", "way", "weighting")

    def __init__(
        self,
        comm: Communicator,
        layer: str,  # its name in logs and profiles, and without a record also in signatures
        dtype: torch.dtype,  # of the layer's input; like weighting and eps the same on all ranks
        weighting: str,
        eps: float,
        record: LayerRecord | None,  # None for functional calls, which are never remembered
        shape: tuple[int, ...] | None = None,  # of the layer's input on this rank
    ) -> None:
        self.comm, self.layer, self.dtype, self.weighting, self.eps = comm, layer, dtype, weighting, eps
        self.record, self.shape = record, shape
        self.channels = None if shape is None else shape[1]
        self._state: GroupState | None = None
        self.membership: Membership | None = None  # of the layer in the group; None before its first exchange there
        self.way = OVER_THE_GROUP  # how the ranks exchange, once `_enter` has found out

    def ticket(self, x: Tensor, kind: str, values: int) -> Ticket:
        """How an exchange of this many values on x's device is verified. Raises the errors of `all_reduce_`.

        Call it before any value is computed: the tag and `merges` depend on it. The first call makes a group that is a duplicate."""
        if self.comm is LOCAL or torch.compiler.is_compiling():  # a graph verifies nothing
            return NO_TICKET
        try:
            self._enter(x)
        except _RAISED_AS_IS:
            raise
        except Exception as error:
            raise self._failure(error, values, kind) from error
        return NO_TICKET if self.way.in_one_memory else self.way.ticket(self.comm, self._key(kind, values))

    def sum(self, values: Tensor, kind: str) -> Tensor:
        """The sum of `values` over the ranks, for values whose tag no kernel writes or verifies. Raises the errors of `all_reduce_`."""
        ticket = self.ticket(values, kind, values.numel())
        payload = torch.cat([values.flatten(), *(values.new_full((1,), t) for t in (ticket.tag, ticket.tag * ticket.tag))])
        total = self.all_reduce_(payload, kind)
        self.verify(total, kind, ticket)
        return total[:-TAGS].view_as(values)

    def verify(self, total: Tensor, kind: str, ticket: Ticket) -> None:
        """Verifies the tags of sums that no op will use. An op that uses sums gets their ticket, and verifies them itself."""
        self.way.verify(self._key(kind, total.numel() - TAGS), total[-TAGS:], ticket)

    def all_reduce_(self, tensor: Tensor, kind: str) -> Tensor:
        """`Communicator.all_reduce_` of values that end with the tag of their `ticket` and its square.

        Args:
            kind: the exchange's name, such as "forward".

        Raises:
            RankMismatchError: the ranks disagree about the exchange; raised on every rank.
            RuntimeError: another rank did not arrive within the group's timeout, or its process exited; or the exchange failed on this
                rank. The message names the layer.
            ValueError, TypeError, MemoryError, torch.OutOfMemoryError: this rank's own errors, unchanged.
        """
        if self.comm is LOCAL:
            return tensor
        return self.comm.all_reduce_(tensor) if torch.compiler.is_compiling() else self._exchanged(tensor, 0, kind)

    def merges(self, x: Tensor) -> bool:
        """Whether `all_reduce_stats_` merges statistics about different shifts. Call `ticket` first."""
        return self.way.in_one_memory or self.comm.merges(x.device)

    def all_reduce_stats_(self, stats: Tensor, channels: int, shifted: bool) -> Tensor:
        """`Communicator.all_reduce_stats_`, as the layer's forward exchange. Raises the errors of `all_reduce_`.

        `shifted` is what `merges` returned. If a graph begins between it and this call, `merges` may have returned True, although the
        graph's exchange only adds: then the statistics are first brought to shifts of 0."""
        if torch.compiler.is_compiling():
            return self.comm.all_reduce_stats_(rebase(stats, torch.zeros_like(stats[:channels])) if shifted else stats, channels)
        return self._exchanged(stats, channels, "forward")

    def details(self) -> str:
        """What may differ between ranks, for errors."""
        description = "" if self.record is None else self.record.description()
        shape = "" if self.shape is None else f"input {list(self.shape)}"
        return ", ".join(filter(None, (description, shape, self._position())))

    def _enter(self, tensor: Tensor) -> GroupState:
        """Looks up the group (its first exchange makes it) and how its ranks exchange tensors on `tensor`'s device. Collective if the
        group has not exchanged tensors on that kind of device yet."""
        if self._state is None:
            failures.check_possible(tensor)
            group = self.comm.group
            self.membership = None if self.record is None else self.record.memberships.get(group)
            self._state = state_of(group) if self.membership is None else self.membership.state
            if self.comm.compares:
                self.way = way_of(self._state, tensor)
        elif is_batched(tensor):  # as only gradients can be
            failures.check_possible(tensor)
        if not self.way.ready:
            self.way.set_up(self.comm, tensor.device)
        return self._state

    def _exchanged(self, tensor: Tensor, channels: int, kind: str) -> Tensor:
        """The sum of `tensor`, which holds statistics if `channels` is not 0."""
        values = tensor.numel() - channels - TAGS  # the shifts are not counted
        try:
            state = self._state or self._enter(tensor)  # while a graph is traced, `ticket` does not enter
            key = self._key(kind, values)
            if not self.way.in_one_memory:
                self.way.check()
                self._compare_signatures(tensor.device, key)
            reduce = self._logged if environment.settings.debug else self.way.all_reduce_
            try:
                if is_profiling():
                    with torch.profiler.record_function(f"syncbn.{kind} {self.layer}"):
                        total = reduce(self.comm, tensor, channels, key)
                else:
                    total = reduce(self.comm, tensor, channels, key)
            except Mismatch:  # every rank gets it, so all of them can compare signatures over the group
                agreement.verify(self.comm, signature(*key), self.details(), tensor.device)
                raise agreement.RankMismatchError(
                    f"the ranks differ in the number of values or in SYNCBN_CHECK (set it on every rank), in {signature(*key)}"
                ) from None
        except _RAISED_AS_IS:
            raise
        except Exception as error:
            raise self._failure(self._cause(error), values, kind) from error
        state.exchanges += 1
        if self.membership is None and self.record is not None and self.comm.compares:
            self.membership = self.record.join(self.comm.group)
        return total

    def _compare_signatures(self, device: torch.device, key: Key) -> None:
        mode, kind = environment.settings.check, key[1]
        first = self.record is not None and (self.membership is None or kind not in self.membership.verified)
        if mode == "off" or not (first or mode == "always") or not self.comm.compares:
            return
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        agreement.verify(self.comm, signature(*key), self.details(), device)
        if environment.settings.debug:
            log().info("rank %d  %s  %s  compared", self.comm.rank, self.layer, kind)
        if self.record is not None:
            self.membership = self.record.join(self.comm.group)
            self.membership.verified.add(kind)

    def _cause(self, error: Exception) -> Exception:
        """`error`, or the failure of an earlier exchange if a device has noticed one meanwhile. Raises RankMismatchError if a device has
        found a mismatch: another rank may have raised it already, and so be missing here."""
        if not isinstance(error, Missing):
            try:
                self.way.check()
            except Missing as missing:
                return missing
        return error

    def _failure(self, error: Exception, values: int, kind: str) -> RuntimeError:
        description = "" if self.record is None else self.record.description()
        layer = self._key(kind, values)[0] + (f" ({description})" if description else "")
        exchange = f"{kind} exchange of {size(values, self.channels)} ({self._position()})"
        return failures.explained(error, layer, self.comm.rank, self.comm.world_size, exchange)

    def _position(self) -> str:
        exchanges = 0 if self._state is None else self._state.exchanges
        return f"the {failures.ordinal(exchanges + 1)} exchange since the group was made"

    def _key(self, kind: str, values: int) -> Key:
        if self.membership is not None:
            identity = self.membership.identity
        else:  # the group may not have been made, and `comm.group` would try again to make it
            identity = self.layer if self.record is None else self.record.identity_in(self._state)
        return identity, kind, values, self.dtype, self.weighting, self.eps, self.channels

    def _logged(self, comm: Communicator, tensor: Tensor, channels: int, key: Key) -> Tensor:
        start = now(tensor)
        total = self.way.all_reduce_(comm, tensor, channels, key)
        milliseconds = (now(tensor) - start) * 1e3
        dtype = str(tensor.dtype).removeprefix("torch.")
        log().info("rank %d  %s  %s  %d x %s  %.3f ms", comm.rank, self.layer, key[1], key[2], dtype, milliseconds)
        return total


def way_of(state: GroupState, tensor: Tensor) -> MemoryOrGroup:
    """How a group's ranks exchange tensors on this kind of device."""
    return state.way(Sharing if tensor.is_cpu else PeerExchange)


# The exchange of every layer in a single process. A training step recognizes it, and leaves out all that belongs to an exchange.
UNSYNCHRONIZED = LayerExchanges(LOCAL, "", torch.float32, "samples", 0.0, None)

# Errors that are raised unchanged: the ranks disagree, or this rank itself is at fault.
_RAISED_AS_IS = agreement.RankMismatchError, ValueError, TypeError, MemoryError, torch.OutOfMemoryError
