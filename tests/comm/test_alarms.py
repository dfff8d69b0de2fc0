"""Exchanges that kernels verify, as on a GPU: ranks that have mixed them get an error at their next exchange, and wait for nothing."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch

from support.divergence import DIVERGENCES, another_group, batch, named
from support.world import World
from syncbn import RankMismatchError, environment, replace_torch, restore_torch
from syncbn.comm import agreement, exchange, resolve
from syncbn.comm.alarms import CAPACITY, Alarms
from syncbn.comm.identity import state_of
from syncbn.comm.peer_memory import Missing
from syncbn.comm.peers import PeerExchange

several = pytest.mark.world_size(2, 3)


@pytest.fixture(autouse=True)
def verified_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are verified as those on a GPU, whatever the device: the kernels write alarms, and this process never looks at the sums."""
    monkeypatch.setattr(exchange, "way_of", lambda state, tensor: state.way(PeerExchange))


@pytest.fixture(autouse=True)
def default_device(torchs_settings: None) -> Iterator[None]:
    """Resets the default device, which a test may set."""
    yield
    torch.set_default_device(None)


def wait(device: str) -> None:
    """Returns when the kernels have compared the tags."""
    if device == "cuda":
        torch.cuda.synchronize()


def differentiate_twice(x: torch.Tensor, y: torch.Tensor) -> None:
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    gradient.square().sum().backward()


CASES = {
    **DIVERGENCES,
    "second derivatives of another": lambda odd, a, b: differentiate_twice((b if odd else a).input, (b if odd else a).kept),
}


@several
@pytest.mark.parametrize("name", CASES)
def test_a_divergence_is_an_error_of_the_next_exchange_on_every_rank(world: World, name: str, device: str) -> None:
    fresh = dataclasses.replace(world, group=another_group(world))
    torch.set_default_device(device)
    a, b = named("a", fresh), named("b", fresh)
    for layer in (a, b):  # a GPU that has not compared yet would let its rank make one exchange more than the others
        layer.register_forward_hook(lambda *_: wait(device))
    for layer in (a, b, a, b):
        layer.input = batch()
        layer.kept = layer(layer.input)
        differentiate_twice(layer.input, layer(layer.input))
    odd = world.rank == world.size - 1

    def diverge() -> None:
        CASES[name](odd, a, b)
        wait(device)
        a(batch())

    with pytest.raises(RankMismatchError, match='added something else to\n  (forward|backward|double backward) of layer "[ab]"'):
        diverge()
    a.eps = 1e-5
    assert torch.isfinite(a(batch())).all()  # the ranks continue together


@several
@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "right"])
def test_a_divergence_in_the_last_exchange_is_a_warning_when_the_group_ends(world: World, mixed: bool, recwarn) -> None:
    group = another_group(world)
    a, b = (named(name, dataclasses.replace(world, group=group)) for name in "ab")
    for layer in (a, b):
        layer(batch())
    (b if mixed and world.rank == world.size - 1 else a)(batch())
    assert not recwarn.list
    torch.distributed.destroy_process_group(group) if world.group is None else group.Free()
    del a, b, layer, group
    gc.collect()
    said = [str(warning.message) for warning in recwarn if warning.category is RuntimeWarning]
    assert len(said) == mixed
    assert all("added something else to\n  forward of layer " in text for text in said)


@several
def test_ranks_that_agree_get_no_error(world: World, device: str) -> None:
    fresh = dataclasses.replace(world, group=another_group(world))
    torch.set_default_device(device)
    layer = named("a", fresh)
    for _ in range(3):
        x = batch()
        layer(x).sum().backward()
        differentiate_twice(x, layer(x))
    alarms = state_of(resolve(layer.process_group).group).way(PeerExchange).alarms
    wait(device)
    alarms.check()
    assert {kind for _, (_, kind, *_) in alarms._words} == {"forward", "backward", "double backward"}


@several
def test_a_rank_that_compares_nothing_is_told_from_those_that_do(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = dataclasses.replace(world, group=another_group(world))
    layer = named("a", fresh)
    layer(batch())
    if world.rank == 0:
        monkeypatch.setattr(environment, "settings", environment.settings._replace(check="off"))
    layer(batch())
    if world.rank > 0:  # rank 0 would wait for the others, which raise before they exchange
        with pytest.raises(RankMismatchError, match="added something else"):
            layer(batch())


@several
def test_ranks_that_differ_in_replace_torch_are_told_apart_at_the_first_exchange(
    world: World, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verification that a first exchange makes anyway tells them apart."""
    fresh = dataclasses.replace(world, group=another_group(world))
    torch.set_default_device(device)
    a, b = named("a", fresh), named("b", fresh)
    if world.rank == 0:
        replace_torch()
    try:
        with pytest.raises(RankMismatchError, match=r"ranks? 0: forward of layer .a.*torch.nn.SyncBatchNorm is replaced"):
            a(batch())
    finally:
        restore_torch()
    rows: list[bytes] = []
    gather = agreement.gather
    monkeypatch.setattr(agreement, "gather", lambda comm, row, device: rows.append(row) or gather(comm, row, device))
    b(batch())
    assert len(rows) == 1


@several
@pytest.mark.parametrize("needs", [(False, True), (True, False), (False, False)], ids=str)
def test_a_backward_exchange_whose_sums_no_kernel_uses_is_verified(world: World, needs: tuple[bool, bool]) -> None:
    """A layer at the front of a model, or after frozen layers, needs no gradient of its input."""
    fresh = dataclasses.replace(world, group=another_group(world))
    a, b = named("a", fresh), named("b", fresh)
    for layer, needed in zip((a, b), needs, strict=True):
        for _ in range(2):
            layer.kept = layer(batch().detach().requires_grad_(needed))
            layer.kept.sum().backward(retain_graph=True)
    layer = b if world.rank == world.size - 1 else a
    layer.kept.sum().backward()
    with pytest.raises(RankMismatchError, match="backward of layer"):
        a(batch())


@pytest.mark.process_group
@pytest.mark.world_size(2)
def test_a_rank_that_reads_its_alarm_late_gets_the_same_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the error after the timeout, because the other rank has raised its own and exchanges no more."""
    group = torch.distributed.new_group(timeout=timedelta(seconds=3))
    a, b = (named(name, dataclasses.replace(world, group=group)) for name in "ab")
    for layer in (a, b):
        layer(batch())
    check, unread = Alarms.check, [world.rank]

    def late(alarms: Alarms) -> None:
        return None if unread and unread.pop() == 1 else check(alarms)

    DIVERGENCES["another eps"](world.rank == 1, a, b)
    monkeypatch.setattr(Alarms, "check", late)
    with pytest.raises(RankMismatchError, match="added something else"):
        b(batch())


@several
def test_a_rank_that_is_found_missing_during_another_failure_is_told_with_the_layer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of an earlier exchange notices the missing rank while this exchange fails."""
    layer = named("a", dataclasses.replace(world, group=another_group(world)))
    layer(batch())
    found: list[Exception] = []

    def check(self: PeerExchange) -> None:
        if found:
            raise found[0]

    def fail(*arguments: object) -> torch.Tensor:
        found.append(Missing("rank 1 sent nothing"))
        raise RuntimeError("connection closed")

    monkeypatch.setattr(PeerExchange, "check", check)
    monkeypatch.setattr(PeerExchange, "all_reduce_", fail)
    with pytest.raises(RuntimeError, match=r'layer "a" .*: rank 1 sent nothing\nrank \d of \d could not complete its forward exchange'):
        layer(batch())


@pytest.mark.world_size(1)
@pytest.mark.parametrize("surroundings", [lambda: torch.device("meta"), torch.inference_mode], ids=["default device", "inference mode"])
def test_words_do_not_depend_on_where_the_first_exchange_is(surroundings: Callable) -> None:
    alarms = Alarms(lambda name: f"exchange {name}")
    with surroundings():
        word = alarms.word(("a",))
    assert word.device.type == "cpu"
    alarms.compare(("a",), torch.tensor([1.0, 1.0]), (2.0, 2.0))
    with pytest.raises(RankMismatchError, match="exchange a"):
        alarms.check()
    alarms.check()


@pytest.mark.world_size(1)
def test_every_mixed_exchange_is_named_once() -> None:
    alarms = Alarms(lambda name: f"exchange {name}")
    words = {name: alarms.word((name,)) for name in range(CAPACITY + 2)}
    alarms.check()
    assert alarms.word((3,)).data_ptr() == words[3].data_ptr()
    words[3][0] = words[CAPACITY + 1][0] = 1
    with pytest.raises(RankMismatchError, match=f"to\n  exchange 3\n  exchange {CAPACITY + 1}\n"):
        alarms.check()
    alarms.check()


@pytest.mark.world_size(1)
def test_a_comparison_of_other_sums_is_not_undone_by_a_later_one() -> None:
    alarms = Alarms(str)
    right = torch.tensor([2.0, 4.0]).double()
    alarms.compare(("a",), right, (2.0, 4.0))
    alarms.check()

    def by_a_kernel() -> None:
        alarms.word(("a",))[0] = 1

    for mix in (lambda: alarms.compare(("a",), right + 1, (2.0, 4.0)), by_a_kernel):
        mix()
        alarms.compare(("a",), right, (2.0, 4.0))
        with pytest.raises(RankMismatchError):
            alarms.check()
    alarms.check()
