"""What the ranks call a layer in an exchange: its dotted name, or its number among the unnamed layers of the group.

Numbers follow the order of first exchanges in the group, not of construction, since one rank may rightly build more layers than another:
a teacher, a copy for evaluation. The first exchange of a layer in a group fixes what it is called there, so a rank may convert or revert
its model later.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from .way import MemoryOrGroup

W = TypeVar("W", bound="MemoryOrGroup")


class GroupState:
    """What this rank has done in a group. Only what the backend has completed is counted."""

    def __init__(self) -> None:
        self.exchanges = 0
        self.verifications = 0  # a rank that has missed one has another count
        self.unnamed_layers = 0
        self._ways: dict[type[MemoryOrGroup], Any] = {}  # one instance of each class

    def way(self, kind: type[W]) -> W:
        """How the ranks exchange tensors: `Sharing` for those on the CPU, `PeerExchange` for those on GPUs."""
        way: W | None = self._ways.get(kind)
        return self._ways.setdefault(kind, kind()) if way is None else way  # the same one, if two threads ask at once


_states: WeakKeyDictionary[Any, GroupState] = WeakKeyDictionary()


def state_of(group: Any) -> GroupState:
    """The state of a group, or of an MPI duplicate. It ends with the group."""
    state = _states.get(group)
    return _states.setdefault(group, GroupState()) if state is None else state  # the same one, if two threads ask at once


class Membership:
    """A layer in a group."""

    def __init__(self, identity: str, state: GroupState) -> None:
        self.identity, self.state = identity, state
        self.verified: set[str] = set()  # kinds of exchange that the ranks have compared


class LayerRecord:
    """What this rank remembers of a layer's exchanges: its membership of each group."""

    def __init__(self, layer: torch.nn.Module | None = None, name: str | None = None) -> None:
        self.layer = (lambda: None) if layer is None else weakref.ref(layer)
        self.name = name
        self.memberships: WeakKeyDictionary[Any, Membership] = WeakKeyDictionary()

    def identity_in(self, state: GroupState | None) -> str:
        """What the layer would be called in a group that it has not joined: equal on all ranks, different for different layers of a
        model. `state` is None if the group has not been made yet."""
        if self.name is not None:
            return self.name
        name = self._layer_name()
        number = 1 if state is None else state.unnamed_layers + 1
        return f'layer "{name}"' if name else f"unnamed layer {number}"

    def join(self, group: Any) -> Membership:
        """The layer's membership of this group. The first call follows an exchange or a verification that all ranks have completed, and
        takes a number if the layer has no name."""
        membership = self.memberships.get(group)
        if membership is None:
            state = state_of(group)
            membership = self.memberships[group] = Membership(self.identity_in(state), state)
            if self.name is None and not self._layer_name():
                state.unnamed_layers += 1
        return membership

    def _layer_name(self) -> str | None:
        return getattr(self.layer(), "layer_name", None)

    def description(self) -> str:
        """The layer's class, which may differ by rank, for messages; empty if there is no layer."""
        layer = self.layer()
        return "" if layer is None else class_and_channels(layer)


def class_and_channels(layer: torch.nn.Module) -> str:
    """`SyncBatchNorm2d(8)`, or `SyncBatchNorm2d()` if its channels are not known yet."""
    return described(None, type(layer).__name__, getattr(layer, "num_features", 0))


def description_of(layer: torch.nn.Module) -> str:
    """`layer "encoder.bn1" (SyncBatchNorm2d(8))`, or `SyncBatchNorm2d(8)` if it has no name. A message about a layer
    begins with this, unless it is about an exchange, where an unnamed layer has a number."""
    return described(getattr(layer, "layer_name", None), type(layer).__name__, getattr(layer, "num_features", 0))


def described(name: str | None, class_name: str, channels: int) -> str:
    """`description_of` a layer that has these."""
    layer = f"{class_name}({channels or ''})"
    return f'layer "{name}" ({layer})' if name else layer


# Next to the layers, not in them: a copy is another layer, and a layer that one rank reverts and converts again remains the same one.
_records: WeakKeyDictionary[torch.nn.Module, LayerRecord] = WeakKeyDictionary()


def record_of(layer: torch.nn.Module) -> LayerRecord:
    """The record of this layer."""
    record = _records.get(layer)
    if record is None:
        record = _records[layer] = LayerRecord(layer)
    return record
