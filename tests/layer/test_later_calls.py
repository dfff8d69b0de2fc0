"""What is wrong with an argument is an error at a layer's first call, and at a later one if it has become wrong since."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn import ops

pytestmark = pytest.mark.world_size(1)


class Call:
    """A layer, and what it is called with."""

    def __init__(self) -> None:
        self.layer: Any = syncbn.SyncBatchNorm(6)
        self.input: Tensor = torch.randn(4, 6, 3, 3)
        self.residual: Tensor | None = None

    def __call__(self) -> Tensor:
        return self.layer(self.input, self.residual)

    def set(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def data(self, name: str, value: Tensor) -> None:
        """As `layer.half()` and FSDP do: the same tensor has other memory."""
        getattr(self.layer, name).data = value

    def buffer(self, name: str, value: Any) -> None:
        setattr(self.layer, name, value)

    def attribute(self, name: str, value: Any) -> None:
        vars(self.layer)[name] = value

    def free(self, name: str) -> None:
        getattr(self.layer, name).untyped_storage().resize_(0)

    def free_with_others(self, name: str) -> None:
        """As FSDP1 keeps parameters: the tensor is a part of a larger storage, which is freed."""
        storage = torch.ones(100)
        getattr(self.layer, name).data = storage[10:16]
        storage.untyped_storage().resize_(0)

    def free_input(self, whole: Tensor) -> None:
        self.input = whole.clone().transpose(2, 3)
        self.input.untyped_storage().resize_(0)


class Case(NamedTuple):
    change: tuple[Any, ...]  # method of Call, arguments
    error: type[Exception]
    message: str


CASES = {
    "channels": Case(("set", "input", torch.randn(4, 5, 3, 3)), ValueError, "must have 6 channels"),
    "one dimension": Case(("set", "input", torch.randn(6)), ValueError, "at least 2 dimensions"),
    "one dimension with gaps": Case(("set", "input", torch.randn(12)[::2]), ValueError, "at least 2 dimensions"),
    "integer input": Case(("set", "input", torch.ones(4, 6, dtype=torch.int64)), TypeError, "must be float32"),
    "another device": Case(("set", "input", torch.randn(4, 6, device="meta")), ValueError, "weight must be on meta"),
    "one value per channel": Case(("set", "input", torch.randn(1, 6)), ValueError, "more than 1 value per channel"),
    "residual of another shape": Case(("set", "residual", torch.randn(4, 6, 3, 2)), ValueError, "residual must be"),
    "residual of another dtype": Case(("set", "residual", torch.randn(4, 6, 3, 3).double()), ValueError, "residual must be"),
    "parameter of another length": Case(("data", "weight", torch.ones(5)), ValueError, r"weight must be \[6\]"),
    "parameter of more dimensions": Case(("data", "bias", torch.ones(6, 1)), ValueError, r"bias must be \[6\]"),
    "parameter of another dtype": Case(("data", "weight", torch.ones(6).half()), ValueError, "weight must be float32, float64 or"),
    "statistic of integers": Case(("buffer", "running_mean", torch.ones(6, dtype=torch.int32)), ValueError, "must be floating point"),
    "parameter replaced": Case(("buffer", "weight", nn.Parameter(torch.ones(7))), ValueError, r"weight must be \[6\]"),
    "parameter elsewhere": Case(("buffer", "bias", nn.Parameter(torch.ones(6, device="meta"))), ValueError, "bias must be on cpu"),
    "expanded statistic": Case(("buffer", "running_var", torch.ones(1).expand(6)), ValueError, "memory of its own"),
    "one statistic": Case(("buffer", "running_var", None), ValueError, "both or neither"),
    "count of another dtype": Case(("buffer", "num_batches_tracked", torch.tensor(0.0)), ValueError, "must be one int64"),
    "count of several numbers": Case(("buffer", "num_batches_tracked", torch.zeros(2).long()), ValueError, "must be one int64"),
    "count elsewhere": Case(("buffer", "num_batches_tracked", torch.zeros((), device="meta").long()), ValueError, "int64 on cpu"),
    "freed count": Case(("free", "num_batches_tracked"), ValueError, "num_batches_tracked .* has no memory"),
    "freed parameter": Case(("free", "weight"), ValueError, "weight .* has no memory"),
    "freed statistic": Case(("free", "running_mean"), ValueError, "running_mean .* has no memory"),
    "parameter in freed storage": Case(("free_with_others", "weight"), ValueError, "weight .* has no memory"),
    "statistic in freed storage": Case(("free_with_others", "running_var"), ValueError, "running_var .* has no memory"),
    "freed input that is not contiguous": Case(("free_input", torch.randn(4, 6, 3, 5)), ValueError, "input .* has no memory"),
    "sparse parameter": Case(("buffer", "weight", nn.Parameter(torch.ones(6).to_sparse())), NotImplementedError, "SparseCPU"),
    "eps": Case(("attribute", "eps", 0.0), ValueError, "eps must be positive"),
    "negative eps": Case(("attribute", "eps", -1.0), ValueError, "eps must not be negative"),
    "eps that is no number": Case(("attribute", "eps", float("nan")), ValueError, "eps must not be negative"),
    "activation": Case(("attribute", "activation", "gelu"), ValueError, "activation must be"),
    "activation in a list": Case(("attribute", "activation", ["relu"]), ValueError, "activation must be"),
    "weighting": Case(("attribute", "weighting", "images"), ValueError, "weighting must be"),
    "weighting in a list": Case(("attribute", "weighting", ["ranks"]), ValueError, "weighting must be"),
    "process group": Case(("attribute", "process_group", "world"), ValueError, "process_group must be"),
}


def state(layer: nn.Module) -> dict[str, list]:
    """The values of the buffers that have memory."""
    return {name: t.tolist() for name, t in layer.named_buffers() if t.untyped_storage().nbytes() and not t.is_meta}


@pytest.mark.parametrize("calls_before", [0, 1, 3])
@pytest.mark.parametrize("name", CASES)
def test_what_has_become_wrong_is_an_error(name, calls_before):
    case, call = CASES[name], Call()
    for _ in range(calls_before):
        call().sum().backward()
    method, *arguments = case.change
    getattr(call, method)(*arguments)
    before = state(call.layer)
    for _ in range(2):  # the error must not be one of the first call only
        with pytest.raises(case.error, match=case.message):
            call()
    assert state(call.layer) == before


def test_messages_call_the_layer_by_its_present_name():
    call = Call()
    call()
    for name in ("encoder.bn1", "decoder.bn1"):
        call.layer.layer_name = name
        call()
        with pytest.raises(ValueError, match=rf'^layer "{name}" \(SyncBatchNorm\(6\)\): input must have'):
            call.layer(torch.randn(4, 5))


def test_ops_are_given_plain_numbers(monkeypatch):
    """torch converts the members of an enumeration by a slow path, which takes longer than the kernel of a small layer."""
    given: list[Any] = []
    for name in ops.SCHEMAS:
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, op=op: given.extend(args) or op(*args))
    syncbn.SyncBatchNorm(6, activation="relu")(torch.randn(4, 6, 3, 3, requires_grad=True)).sum().backward()
    assert {type(t) for t in given if not isinstance(t, Tensor)} <= {int, float, bool, type(None)}
    assert int in map(type, given)


@pytest.mark.parametrize(
    "change",
    [
        ("set", "input", torch.randn(2, 6, 5)),
        ("set", "input", torch.randn(2, 6).bfloat16()),
        ("set", "input", torch.randn(2, 6).double()),
        ("set", "residual", torch.randn(4, 6, 3, 3)),
        ("data", "weight", torch.ones(12)[::2]),
        ("data", "bias", torch.zeros(6, dtype=torch.float64)),
        ("buffer", "running_mean", torch.zeros(6, dtype=torch.float64)),
        ("buffer", "weight", None),
        ("attribute", "eps", 1),
        ("attribute", "momentum", None),
        ("attribute", "activation", "silu"),
    ],
    ids=lambda change: f"{change[1]} {getattr(change[2], 'dtype', change[2])}",
)
def test_what_has_changed_and_is_right_is_used(change):
    changed, built = Call(), Call()
    changed.layer.load_state_dict(built.layer.state_dict())
    built.input = changed.input
    changed().sum().backward()
    for call in (changed, built):
        call.layer.reset_running_stats()
        method, *arguments = copy.deepcopy(change)  # the two must not share a buffer
        getattr(call, method)(*arguments)
    assert torch.equal(changed(), built())
    for name, buffer in changed.layer.named_buffers():
        assert torch.equal(buffer, built.layer.get_buffer(name)), name
