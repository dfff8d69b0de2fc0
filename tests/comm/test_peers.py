"""The ranks of a node exchange CUDA tensors in each other's memory. Without a GPU: CPU tensors, by the emulated kernel, in memory that the
ranks' processes share. On a GPU, which the ranks may share, with torch's symmetric memory."""

from __future__ import annotations

import dataclasses
import random
import time

import pytest
import torch
import torch.distributed as dist

from support.collectives import collectives
from support.divergence import DIVERGENCES, another_group, batch, named
from support.peers import CAPACITY_OF_PROCESSES, stand_in
from syncbn import RankMismatchError, SyncBatchNorm, environment
from syncbn.comm import peers, resolve
from syncbn.comm.exchange import LayerExchanges
from syncbn.comm.identity import state_of

ON_GPU = "in each other's GPU memory"


def several(test):
    return pytest.mark.process_group(pytest.mark.world_size(2, 3, 4)(test))


@pytest.fixture
def peer_device(request, monkeypatch, world, device):
    """The device of a test's tensors, which are exchanged in peer memory."""
    if device == "cuda":
        monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        monkeypatch.setattr(environment, "settings", environment.settings._replace(peer=True))
    else:
        stand_in(monkeypatch, request.getfixturevalue("peer_library"), world.rank)
    torch.set_default_device(device)
    return device


@pytest.fixture(autouse=True)
def default_device(torchs_settings):
    """Resets the default device, which a test may set."""
    yield
    torch.set_default_device(None)


@pytest.fixture
def fresh(peer_device, world):
    """A world whose group has exchanged nothing."""
    return dataclasses.replace(world, group=another_group(world))


def state(group):
    return state_of(resolve(group).group)


def finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def exchange_of(group, layer="layer") -> LayerExchanges:
    return LayerExchanges(resolve(group), layer, torch.float32, "samples", 0.0, None)


@several
def test_results_equal_those_over_the_group(fresh, counts):
    whole = torch.randn(sum(counts), 3, 4, dtype=torch.float64) * 3 + 10
    dy = torch.randn(whole.shape, dtype=torch.float64)
    results = []
    for peer in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(environment, "settings", environment.settings._replace(peer=peer))
            group = dist.new_group()
            layer = SyncBatchNorm(3, process_group=group, dtype=torch.float64)
            x = fresh.mine(whole, counts).requires_grad_()
            for _ in range(2):
                y = layer(x)
            y.backward(fresh.mine(dy, counts))
            results.append((y, x.grad, layer.weight.grad, layer.running_mean, layer.running_var))
            assert (state(group).way(peers.PeerExchange).path == ON_GPU) is peer
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)  # the same sums in another order


@several
def test_sums_are_bitwise_those_in_the_order_of_ranks(fresh, world, peer_device):
    """The lengths of the exchanges change, and the ranks come to them at random times."""
    delays, exchange = random.Random(world.rank), exchange_of(fresh.group)
    for number in range(60):
        generator = torch.Generator().manual_seed(number)
        length = int(torch.randint(1, CAPACITY_OF_PROCESSES - 1, (1,), generator=generator, device="cpu"))
        sent = torch.randn(world.size, length, generator=generator, dtype=torch.float64, device="cpu") * 10.0 ** (number % 9)
        if delays.random() < 0.1:
            time.sleep(delays.random() / 50)
        total = exchange.sum(sent[world.rank].to(peer_device), "forward").cpu()
        want = torch.zeros(length, dtype=torch.float64, device="cpu")
        for row in sent:
            want = want + row
        assert torch.equal(total, want), number


@several
def test_there_is_no_collective_after_the_first_exchange(fresh):
    layer = SyncBatchNorm(3, process_group=fresh.group)
    layer(batch()).sum().backward()
    with collectives() as seen:
        for _ in range(2):
            layer(batch()).sum().backward()
    assert seen == []


@several
def test_more_values_than_the_memory_holds_go_over_the_group(fresh, world, peer_device, monkeypatch):
    monkeypatch.setattr(peers, "CAPACITY", 32)
    exchange = exchange_of(fresh.group)
    for length in (30, 31, 200, 30):
        values = torch.full((length,), float(world.rank), dtype=torch.float64)
        assert (exchange.sum(values, "forward") == sum(range(world.size))).all()
    assert state(fresh.group).way(peers.PeerExchange).path == ON_GPU


@several
@pytest.mark.parametrize("name", ["layers of equal C in another order", "another eps"])
def test_a_divergence_is_an_error_of_the_next_exchange_on_every_rank(fresh, world, peer_device, name):
    """The tags, which are added like any value, show it."""
    a, b = named("a", fresh), named("b", fresh)
    for layer in (a, b):
        for _ in range(2):
            layer.input = batch()
            layer.kept = layer(layer.input)
            layer.kept.sum().backward(retain_graph=True)

    def diverge() -> None:
        DIVERGENCES[name](world.rank == world.size - 1, a, b)
        finish(peer_device)
        a(batch())

    with pytest.raises(RankMismatchError, match='added something else to\n  forward of layer "[ab]"'):
        diverge()
    a.eps = 1e-5
    assert torch.isfinite(a(batch())).all()  # the ranks go on together


@several
def test_a_rank_that_does_not_come_is_named_with_the_exchange_that_it_missed(fresh, world, peer_device):
    encoder, decoder = named("encoder.bn", fresh), named("decoder.bn", fresh)
    encoder(batch()).sum().backward()  # the first exchanges are verified over the group
    x = batch()
    y = encoder(x)
    with state(fresh.group).way(peers.PeerExchange).memory.waiting(0.4):
        if world.rank > 0:
            y.sum().backward()
            finish(peer_device)
            assert x.grad.isnan().all()
            for layer in (decoder, encoder):
                with pytest.raises(RuntimeError) as error:
                    layer(batch())
                text = str(error.value)
                assert text.startswith(f'layer "{layer.layer_name}"') and "could not complete its forward exchange" in text
                assert 'rank 0 sent nothing for 0.4 s to the backward of layer "encoder.bn", 3 channels' in text
    world.all_gather(torch.zeros(1))


@several
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_captured_exchange_is_the_exchange_at_every_replay(fresh, world, peer_device):
    exchange, values = exchange_of(fresh.group), torch.zeros(300, dtype=torch.float64)
    exchange.sum(values, "forward")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = exchange.sum(values, "forward")
    for number in range(5):
        values.fill_(world.rank + number)
        graph.replay()
        assert (exchange.sum(values, "forward") == total).all()
        assert (total == sum(rank + number for rank in range(world.size))).all()
