"""Where the host spends its time in a layer that exchanges, measured in place, in the layer's own calls."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist

import syncbn
from syncbn import ops
from syncbn.comm import ProcessGroupCommunicator
from syncbn.comm.exchange import LayerExchanges

from . import timing
from .cases import Inputs
from .report import Row

OPS = ("stats", "normalize", "backward_reduce", "backward_input")


class Clock:
    """Seconds and numbers of calls, by name. Of nested calls with one name, only the outermost counts."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.running: set[str] = set()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            if name in self.running:
                return function(*args, **keywords)
            self.running.add(name)
            begin = timing.now()
            try:
                return function(*args, **keywords)
            finally:
                self.seconds[name] += timing.now() - begin
                self.calls[name] += 1
                self.running.remove(name)

        return call

    @contextmanager
    def on(self, owner: Any, attributes: Iterable[str], name: str) -> Iterator[None]:
        """Times, under one name, all calls of these functions of a module or methods of a class."""
        replaced = {attribute: vars(owner).get(attribute) for attribute in attributes}
        for attribute in replaced:
            setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))
        try:
            yield
        finally:
            for attribute, original in replaced.items():
                if original is None:  # a base class has it
                    delattr(owner, attribute)
                else:
                    setattr(owner, attribute, original)


def reductions(owner: type) -> list[str]:
    return [name for name in dir(owner) if name.startswith("all_reduce")]


@contextmanager
def split(clock: Clock) -> Iterator[None]:
    """Within this context the ops, the calls of `ticket`, the exchanges, and the collectives inside the exchanges are timed."""
    with ExitStack() as timed:
        timed.enter_context(clock.on(LayerExchanges, ["ticket"], "ticket"))
        timed.enter_context(clock.on(LayerExchanges, reductions(LayerExchanges), "exchange"))
        timed.enter_context(clock.on(ProcessGroupCommunicator, reductions(ProcessGroupCommunicator), "collective"))
        for op in OPS:
            timed.enter_context(clock.on(ops, [op], op))
        yield


def host_split(inputs: Inputs, repeats: int, calls: int = 50) -> list[Row]:
    """µs until a layer's forward and backward pass return: medians of `repeats` samples of `calls` calls.

    For a layer that exchanges: the whole, each op, the tickets and the collectives of the two exchanges, the rest of the exchanges, and
    the rest of the pass. For a layer in a single process, and for torch's plain layer: the whole."""
    channels, device = inputs.shape[1], inputs.device
    comm = ProcessGroupCommunicator(dist.group.WORLD)
    layer = syncbn.SyncBatchNorm(channels, process_group=comm).to(device)
    alone, plain = syncbn.SyncBatchNorm(channels).to(device), torch.nn.BatchNorm2d(channels).to(device)

    def step(module: torch.nn.Module) -> None:
        torch.autograd.grad(module(inputs.x), [inputs.x, *module.parameters()], inputs.dy)

    samples: list[Row] = []
    for module in (layer, alone, plain):  # a layer's first step also verifies its signatures
        for _ in range(3):
            step(module)
    for _ in range(repeats):
        modules = {"exchanging": layer, "alone": alone, "BatchNorm2d": plain}
        row: Row = {name: sample(step, module, calls, device) for name, module in modules.items()}
        clock = Clock()
        with split(clock):
            whole = sample(step, layer, calls, device)
        microseconds = {name: seconds / calls * 1e6 for name, seconds in clock.seconds.items()}
        expected = dict.fromkeys(OPS, calls) | dict.fromkeys(("ticket", "exchange", "collective"), 2 * calls)
        assert clock.calls == expected, clock.calls
        row |= {name: microseconds[name] for name in OPS} | {"tickets": microseconds["ticket"], "collectives": microseconds["collective"]}
        row["around the collectives"] = microseconds["exchange"] - microseconds["collective"]
        row["rest"] = whole - sum(microseconds[name] for name in (*OPS, "ticket", "exchange"))
        samples.append(row)
    return [{"shape": str(inputs.shape), **{name: statistics.median(row[name] for row in samples) for name in samples[0]}}]


def sample(step: Callable[[torch.nn.Module], None], module: torch.nn.Module, calls: int, device: str) -> float:
    """µs of one of `calls` steps, on the host."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = timing.now()
    for _ in range(calls):
        step(module)
    return (timing.now() - begin) / calls * 1e6
