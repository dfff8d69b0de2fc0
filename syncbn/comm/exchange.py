"""A layer's communicator: attaches the layer to its collectives, for verification, logs, profiles and errors.

    group        ──► the first call makes it, if it is a duplicate, and finds how the ranks exchange: sharing.py, peers.py for GPUs
    verify       ──► agreement.py compares signatures, at first exchanges or always; not in shared memory, which verifies each
    collective   ──► in memory or the communicator's, under a profiler's range, logged with SYNCBN_DEBUG=1
    count        ──► identity.py: only if all of this has completed

SYNCBN_DEBUG=1 logs each collective through `logging`, at the price of waiting for it; profilers show a range for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import environment
from .._torch_private import is_profiling
from ..moments import rebase
from . import LOCAL, Communicator, agreement, failures
from .alarms import Alarms
from .debug import log, now
from .identity import GroupState, LayerRecord, Membership, W, state_of
from .peer_memory import Missing
from .peers import PeerExchange
from .shared_memory import Mismatch
from .sharing import Sharing
from .signatures import NO_TICKET, TAGS, UNVERIFIED, Ticket, digest, signature, size, sums_of_tags, tag_of


class Exchange:
    """A communicator that adds tensors on behalf of one layer, in one call of it and in that call's backward passes.

    It looks up once where the layer and its group stand: an exchange in shared memory takes less time than the look-ups.
    """

    __slots__ = ("_state", "comm", "dtype", "eps", "layer", "membership", "peers", "record", "shape", "sharing", "weighting")

    def __init__(
        self,
        comm: Communicator,
        layer: str,  # in logs and profiles
        dtype: torch.dtype,  # of the layer's input; like weighting and eps the same on all ranks
        weighting: str,
        eps: float,
        record: LayerRecord | None,  # None for functional calls, which are never remembered
        shape: tuple[int, ...] | None = None,  # of the layer's input on this rank
    ) -> None:
        self.comm, self.layer, self.dtype, self.weighting, self.eps = comm, layer, dtype, weighting, eps
        self.record, self.shape = record, shape
        self._state: GroupState | None = None
        self.membership: Membership | None = None  # of the layer in the group; None before its first exchange there
        self.sharing: Sharing | None = None  # how the ranks exchange CPU tensors; None if only the communicator's collective does
        self.peers: PeerExchange | None = None  # the same for CUDA tensors

    @property
    def _channels(self) -> int | None:
        return None if self.shape is None else self.shape[1]

    def ticket(self, x: Tensor, kind: str, values: int) -> Ticket:
        """What the payload of an exchange of this many values on x's device has to end with. Raises as `all_reduce_`.

        It comes first, before any value is computed: if it is the group's first exchange, it makes the group."""
        if self.comm is LOCAL or torch.compiler.is_compiling():  # a graph makes no group, and holds its collective as it is
            return NO_TICKET
        try:
            self._enter(x)
        except _NO_FAILURES:
            raise
        except Exception as error:
            raise self._failure(error, values, kind) from error
        if not self.comm.compares or (self.sharing is not None and self.sharing.in_memory):
            return NO_TICKET  # in memory the ranks compare the whole digest
        if environment.settings.check == "off":
            return Ticket(tag_of(UNVERIFIED, self.comm.world_size))
        tag = tag_of(digest(*self._key(kind, values)), self.comm.world_size)
        return Ticket(tag, self.comm.world_size, self._alarm(kind, values)) if self._is_verified_later(x) else Ticket(tag)

    def sum(self, values: Tensor, kind: str) -> Tensor:
        """The sum of `values` over the ranks, for values whose tag no kernel writes or verifies. Raises as `all_reduce_`."""
        ticket = self.ticket(values, kind, values.numel())
        payload = torch.cat([values.flatten(), *(values.new_full((1,), t) for t in (ticket.tag, ticket.tag * ticket.tag))])
        total = self.all_reduce_(payload, kind)
        self.verify(total, kind, ticket)
        return total[:-TAGS].view_as(values)

    def verify(self, total: Tensor, kind: str, ticket: Ticket) -> None:
        """What the op that uses the sums does with its ticket, for sums that none uses."""
        if ticket.alarm is not None:
            self._alarms().compare(self._key(kind, total.numel() - TAGS), total[-TAGS:], sums_of_tags(ticket.ranks, ticket.tag))

    def all_reduce_(self, tensor: Tensor, kind: str) -> Tensor:
        """`Communicator.all_reduce_` of values that end with a tag and its square, those of the `ticket` for them.

        Args:
            kind: the exchange's name, such as "forward".

        Raises:
            RankMismatchError: the ranks disagree about the exchange; raised on every rank.
            RuntimeError: another rank did not arrive within the group's timeout, or its process exited; or the exchange failed on this
                rank. Names the layer.
        """
        return tensor if self.comm is LOCAL else self._exchanged(tensor, 0, kind)

    def merges(self, x: Tensor) -> bool:
        """`Communicator.merges` for x's device, or the ranks share memory, which is known once there is a ticket."""
        return self.comm.merges(x.device) or (self.sharing is not None and self.sharing.in_memory)

    def all_reduce_stats_(self, stats: Tensor, channels: int, shifted: bool) -> Tensor:
        """`Communicator.all_reduce_stats_`, as the layer's forward exchange. Raises as `all_reduce_`.

        `shifted` is what `merges` returned: if a graph breaks between the two calls, this one may be traced, and that one not."""
        if shifted and torch.compiler.is_compiling():
            stats = rebase(stats, torch.zeros_like(stats[:channels]))
        return self._exchanged(stats, channels, "forward")

    def signature(self, kind: str, values: int) -> str:
        """What this rank is about to do, equal on all ranks. `values` is the number of elements."""
        return signature(*self._key(kind, values))

    def details(self) -> str:
        """What may differ between ranks, for errors."""
        description = "" if self.record is None else self.record.description()
        shape = "" if self.shape is None else f"input {list(self.shape)}"
        return ", ".join(filter(None, (description, shape, self._position())))

    def _enter(self, tensor: Tensor) -> GroupState:
        """Looks up the group, which the first call of all makes, and how it exchanges tensors on `tensor`'s device. Collective if it is
        the group's first exchange."""
        failures.check_possible(tensor)
        if self._state is not None:
            return self._state
        group = self.comm.group
        state = state_of(group)
        self.membership = None if self.record is None else self.record.memberships.get(group)
        if self.comm.compares and self._is_verified_later(tensor):
            self.peers = self._way(PeerExchange, state, tensor.device)
        elif self.comm.compares:
            self.sharing = self._way(Sharing, state, tensor.device)
        self._state = state
        return state

    def _is_verified_later(self, tensor: Tensor) -> bool:
        """By the kernel that uses the sums, since this process would have to wait for them."""
        return not tensor.is_cpu

    def _alarm(self, kind: str, values: int) -> Tensor:
        return self._alarms().word(self._key(kind, values))

    def _alarms(self) -> Alarms:
        assert self._state is not None
        if self._state.alarms is None:
            self._state.alarms = Alarms(signature)
        return self._state.alarms

    def _way(self, kind: type[W], state: GroupState, device: torch.device) -> W:
        way = state.way(kind)
        return way if way.ready else way.set_up(self.comm, device)

    def _exchanged(self, tensor: Tensor, channels: int, kind: str) -> Tensor:
        """Of statistics, if `channels` is not 0."""
        if torch.compiler.is_compiling():
            return self._over_the_group(tensor, channels)
        values = tensor.numel() - channels - TAGS  # all shifts are known, or merged away
        try:
            state = self._state or self._enter(tensor)  # without a ticket, if that was traced
            if self.peers is not None:
                self.peers.check()  # before the alarms, which sums of values that have not arrived set as well
            if state.alarms is not None:
                state.alarms.check()
            if self.sharing is None or not self.sharing.in_memory:
                self._verify(tensor.device, values, kind)
            reduce = self._logged if environment.settings.debug else self._sum
            if is_profiling():
                with torch.profiler.record_function(f"syncbn.{kind} {self.layer}"):
                    total = reduce(tensor, channels, kind, values)
            else:
                total = reduce(tensor, channels, kind, values)
        except _NO_FAILURES:
            raise
        except Exception as error:
            if self._state is not None and self._state.alarms is not None and not isinstance(error, Missing):
                self._state.alarms.check()  # another rank has read its alarm, and not come
            raise self._failure(error, values, kind) from error
        state.exchanges += 1
        if self.membership is None and self.record is not None and self.comm.compares:
            self.membership = self.record.join(self.comm.group)
        return total

    def _sum(self, tensor: Tensor, channels: int, kind: str, values: int) -> Tensor:
        if self.peers is not None and self.peers.takes(tensor[channels:]):
            self.peers.all_reduce_(tensor[channels:], self._key(kind, values))  # shifts are 0, and stay here
            return tensor
        sharing, verifies = self.sharing, environment.settings.check != "off"
        if sharing is None or (sharing.reason and not verifies):
            return self._over_the_group(tensor, channels)
        expected = digest(*self._key(kind, values)) if verifies else UNVERIFIED
        try:
            if sharing.in_memory:
                assert sharing.memory is not None
                return sharing.memory.all_reduce_(tensor, expected, sharing.timeout, channels)
            total = sharing.all_reduce_(self.comm, tensor[channels:], expected)
            return torch.cat([tensor[:channels], total]) if channels else total
        except Mismatch:  # on every rank, so that all of them can compare signatures over the group
            agreement.verify(self.comm, self.signature(kind, values), self.details(), tensor.device)
            raise agreement.RankMismatchError(
                f"another rank adds another number of values, or compares nothing (SYNCBN_CHECK), in {self.signature(kind, values)}"
            ) from None

    def _over_the_group(self, tensor: Tensor, channels: int) -> Tensor:
        return self.comm.all_reduce_stats_(tensor, channels) if channels else self.comm.all_reduce_(tensor)

    def _verify(self, device: torch.device, values: int, kind: str) -> None:
        mode = environment.settings.check
        if mode == "off" or not self.comm.compares or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
        first = self.record is not None and (self.membership is None or kind not in self.membership.verified)
        if not (first or mode == "always"):
            return
        agreement.verify(self.comm, self.signature(kind, values), self.details(), device)
        if environment.settings.debug:
            log().info("rank %d  %s  %s  compared", self.comm.rank, self.layer, kind)
        if self.record is not None:
            self.membership = self.record.join(self.comm.group)
            self.membership.verified.add(kind)

    def _failure(self, error: Exception, values: int, kind: str) -> RuntimeError:
        description = "" if self.record is None else self.record.description()
        layer = self._identity() + (f" ({description})" if description else "")
        exchange = f"{kind} exchange of {size(values, self._channels)} ({self._position()})"
        return failures.explained(error, layer, self.comm.rank, self.comm.world_size, exchange)

    def _identity(self) -> str:
        """Of the layer in the group. The group may not have been made: to ask for it would try again."""
        if self.membership is not None:
            return self.membership.identity
        return self.layer if self.record is None else self.record.identity_in(self._state)

    def _position(self) -> str:
        exchanges = 0 if self._state is None else self._state.exchanges
        return f"the {failures.ordinal(exchanges + 1)} exchange since the group was made"

    def _key(self, kind: str, values: int) -> tuple[Any, ...]:
        return self._identity(), kind, values, self.dtype, self.weighting, self.eps, self._channels

    def _logged(self, tensor: Tensor, channels: int, kind: str, values: int) -> Tensor:
        start = now(tensor)
        total = self._sum(tensor, channels, kind, values)
        milliseconds = (now(tensor) - start) * 1e3
        dtype = str(tensor.dtype).removeprefix("torch.")
        log().info("rank %d  %s  %s  %d x %s  %.3f ms", self.comm.rank, self.layer, kind, values, dtype, milliseconds)
        return total


# The exchange of every layer in a single process. A training step recognizes it, and leaves out all that belongs to an exchange.
ALONE = Exchange(LOCAL, "", torch.float32, "samples", 0.0, None)

# Errors that need no explanation: the ranks disagree, or the fault is this rank's own.
_NO_FAILURES = agreement.RankMismatchError, ValueError, TypeError, MemoryError, torch.OutOfMemoryError
