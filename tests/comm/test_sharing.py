"""Layers whose ranks share memory, compared with layers that exchange over their group: the same results, verified at every step."""

from __future__ import annotations

import dataclasses
import gc
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from support.collectives import collectives
from support.divergence import DIVERGENCES, another_group, batch, named
from support.paths import over_the_group
from syncbn import RankMismatchError, SyncBatchNorm, environment
from syncbn.comm import agreement, debug, exchange, resolve, shared_memory, signatures
from syncbn.comm.identity import state_of
from syncbn.comm.peers import PeerExchange
from syncbn.comm.sharing import Sharing

several = pytest.mark.world_size(2, 3, 4)
pytestmark = [several, pytest.mark.skipif(shared_memory.library() is None, reason="no compiled library with shared memory")]


def test_the_ranks_of_a_host_share_memory(world):
    named("a", world)(batch())
    assert state_of(resolve(world.group).group).way(Sharing).path == "in shared memory"


@pytest.mark.process_group
def test_there_is_no_collective_after_the_first_exchange(world):
    default = exchange.way_of
    layer = SyncBatchNorm(3)
    layer(batch()).sum().backward()
    with collectives() as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "way_of", default)  # `collectives` turns shared memory off; here it is on
        for _ in range(2):
            layer(batch()).sum().backward()
    assert seen == []


@pytest.mark.process_group
def test_a_barrier_and_an_all_gather_would_be_seen(world):
    with collectives() as seen:
        dist.barrier()
        dist.all_gather([torch.zeros(3) for _ in range(world.size)], torch.ones(3))
    assert seen == [("barrier", 0, None), ("allgather", 3 * world.size, torch.float32)]


@pytest.mark.parametrize("weighting", ["samples", "ranks"])
def test_results_equal_those_over_the_group(world, counts, weighting):
    whole = torch.randn(sum(counts), 3, 4, dtype=torch.float64) * 3 + 10
    dy = torch.randn(whole.shape, dtype=torch.float64)
    results = []
    for group_only in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if group_only:
                over_the_group(patch)
            layer = SyncBatchNorm(3, process_group=world.group, weighting=weighting, dtype=torch.float64)
            x = world.mine(whole, counts).requires_grad_()
            y = layer(x)
            y.backward(world.mine(dy, counts))
            results.append((y, x.grad, layer.weight.grad, layer.running_mean, layer.running_var))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)  # sums about 0 and about a value of the batch


def test_float64_far_from_zero_is_as_good_as_torch(world):
    """Within 10 times torch's error, up to mean/std 1e8: the ranks merge sums about their own shifts."""
    counts = tuple(range(3, 3 + world.size))
    for mean in (1e4, 1e6, 1e8):
        whole = torch.randn(sum(counts), 3, 64, dtype=torch.float64) + mean
        exact = whole - mean  # exact: the same batch about 0
        want = F.batch_norm(exact, None, None, training=True)
        torchs = (F.batch_norm(whole, None, None, training=True) - want).abs().max()
        y = SyncBatchNorm(3, process_group=world.group, dtype=torch.float64)(world.mine(whole, counts))
        assert (y - world.mine(want, counts)).abs().max() <= 10 * torchs + 1e-14


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_late_in_a_run_is_an_error_on_every_rank(world, path, name):
    """Default settings find it, in shared memory and over the group."""
    # All ranks have exchanged equally often in a new group, so an error has one line for all that agree.
    fresh = dataclasses.replace(world, group=another_group(world))
    a, b = named("a", fresh), named("b", fresh)
    for _ in range(3):
        b(a(batch())).sum().backward()
    for layer in (a, b):
        layer.input = batch()
        layer.kept = layer(layer.input)
    with pytest.raises(RankMismatchError) as error:
        DIVERGENCES[name](world.rank == world.size - 1, a, b)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 2 and lines[1].startswith(f"  rank {world.size - 1}: "), error.value
    a.eps = 1e-5
    assert torch.isfinite(a(batch())).all()  # the ranks continue together


def test_a_divergence_whose_comparison_fails_names_the_layer(world, path, monkeypatch):
    a, b = named("a", world), named("b", world)
    for layer in (a, b):
        layer(batch())

    def fail(*arguments):
        raise RuntimeError("connection closed")

    monkeypatch.setattr(agreement, "verify", fail)
    with pytest.raises(RuntimeError, match=r'layer "[ab]" .*: connection closed\nrank \d of \d .* forward exchange of 3 channels'):
        (a if world.rank == 0 else b)(batch())


def test_a_divergence_is_not_noticed_if_the_user_says_so(world, path, monkeypatch):
    monkeypatch.setattr(environment, "settings", environment.settings._replace(check="off"))
    a, b = named("a", world), named("b", world)
    if world.rank == 0:
        a(b(batch()))
    else:
        b(a(batch()))


def test_a_late_rank_is_named_with_layer_and_direction(world, monkeypatch):
    layer = named("encoder.bn", world)
    layer.process_group = another_group(world)
    y = layer(batch())
    monkeypatch.setattr(state_of(resolve(layer.process_group).group).way(Sharing), "timeout", 0.4)
    if world.rank == 0:
        with pytest.raises(RuntimeError, match=r'layer "encoder.bn"[\s\S]*rank 1\b.*: not there yet, but alive[\s\S]*backward exchange'):
            y.sum().backward()
    world.all_gather(torch.zeros(1))
    with pytest.raises(RuntimeError, match="rank 0.* gave up an exchange" if world.rank else "this rank gave up|gave up an exchange"):
        y.sum().backward()


def test_ranks_with_different_settings_all_use_the_group(world, monkeypatch):
    group = another_group(world)
    if world.rank == world.size - 1:
        monkeypatch.setattr(environment, "settings", environment.settings._replace(shared_memory=False))
    layer = SyncBatchNorm(3, process_group=group)
    layer(batch()).sum().backward()
    path = state_of(resolve(group).group).way(Sharing).path
    assert path == f"over the group: rank {world.size - 1}: turned off by SYNCBN_SHARED_MEMORY=0"


@pytest.mark.parametrize("odd", ["off", "always"])
def test_ranks_that_differ_in_when_they_compare_are_told_at_once(world, odd, monkeypatch):
    layer = SyncBatchNorm(3, process_group=another_group(world))
    if world.rank == world.size - 1:
        monkeypatch.setattr(environment, "settings", environment.settings._replace(check=odd))
    for _ in range(2):
        with pytest.raises(RankMismatchError, match=rf"rank {world.size - 1}: first exchange of the group, SYNCBN_CHECK={odd}"):
            layer(batch())


@pytest.mark.process_group
def test_first_ranks_have_a_group_whatever_other_groups_there_are(world):
    """The first ranks of several hosts exchange in such a group. Rank 0 is in one group more than the others, and groups are made again
    after they were destroyed."""
    one_more = torch.distributed.new_group([0])
    for _ in range(3):
        group = torch.distributed.new_group()
        first_ranks = resolve(group).among([0, world.size - 1])
        assert (first_ranks is not None) == (world.rank in (0, world.size - 1))
        if first_ranks is not None:
            assert first_ranks.all_reduce_(torch.ones(3)).tolist() == [2, 2, 2]
        torch.distributed.destroy_process_group(group)
    torch.distributed.destroy_process_group(one_more)


@pytest.mark.process_group
def test_first_ranks_have_a_group_whatever_the_default_device_is(world):
    group = torch.distributed.new_group()
    with torch.device("meta"):
        first_ranks = resolve(group).among([0])
    assert (first_ranks is not None) == (world.rank == 0)
    torch.distributed.destroy_process_group(group)


@pytest.mark.process_group  # MPI forbids forks
def test_workers_of_a_data_loader_come_and_go(world):
    layer = named("a", world)
    layer(batch())
    data = TensorDataset(torch.randn(4, 3, 5))
    for _ in range(2):
        for (x,) in DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context="fork"):
            layer(x)
    if world.rank == 0:
        time.sleep(0.3)  # the others check whether its process has ended: it has not, only its workers
    assert torch.isfinite(layer(batch())).all()


@pytest.mark.parametrize("ranks", [2, 8192, 8193, 1 << 16])
def test_sums_of_tags_are_exact_for_any_number_of_ranks(ranks):
    for digest in (1, 2, -1 & ((1 << 64) - 1)):
        t = signatures.tag_of(digest, ranks)
        tags = torch.full((ranks,), float(t)).double()
        assert (tags.sum().item(), tags.square().sum().item()) == signatures.sums_of_tags(ranks, t)
        assert float(ranks * t * t + 1) != float(ranks * t * t)
        tags[1] -= 1
        assert (tags.sum().item(), tags.square().sum().item()) != signatures.sums_of_tags(ranks, t)


def test_the_path_is_logged(world, monkeypatch, caplog):
    layer = SyncBatchNorm(3, process_group=another_group(world))
    debug.log.cache_clear()
    monkeypatch.setattr(environment, "settings", environment.settings._replace(debug=True))
    layer(batch())
    path, forward = caplog.messages
    assert path == f"rank {world.rank} exchanges in shared memory"
    assert "forward  8 x float64" in forward


def test_exchanges_in_two_groups_may_alternate(world):
    layers = [SyncBatchNorm(3, process_group=another_group(world)) for _ in range(2)]
    plain = nn.BatchNorm1d(3)
    for _ in range(5):
        for layer in layers:
            x = torch.randn(4 * world.size, 3, 5)
            torch.testing.assert_close(layer(world.mine(x, (4,) * world.size)), world.mine(plain(x), (4,) * world.size))


def test_a_group_that_is_destroyed_takes_its_memory_with_it(world):
    def mappings() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count("syncbn-")

    before = mappings()
    for _ in range(3):
        group = another_group(world)
        SyncBatchNorm(3, process_group=group)(batch())
        assert mappings() == before + 1
        torch.distributed.destroy_process_group(group) if world.group is None else group.Free()
        del group
        assert mappings() == before


def test_a_wait_ends_as_soon_as_the_other_rank_comes(world):
    """By the clock that all processes of the host share. The best of ten times counts, since the machine may be busy."""
    layer = named("a", world)
    layer(batch())
    late = []
    for _ in range(10):
        if world.rank == 0:
            time.sleep(0.13)  # a wait returns to Python after each 50 ms, and must not sleep there
        began = time.monotonic()
        layer(batch())
        times = torch.stack(world.all_gather(torch.tensor([began, time.monotonic()], dtype=torch.float64)))
        late.append(float(times[1:, 1].max() - times[0, 0]))
    assert min(late) < 0.02


def test_a_failed_set_up_names_the_exchange_and_layer(world, monkeypatch):
    """The group has exchanged tensors of another device before."""
    layer, second = (SyncBatchNorm(3, process_group=group) for group in [another_group(world)] * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "way_of", lambda state, tensor: state.way(PeerExchange))
        layer(batch()).sum().backward()

    def fail(self, comm, device):
        raise RuntimeError("no memory")

    monkeypatch.setattr(Sharing, "_meet", fail)
    with pytest.raises(RuntimeError, match=r"(?s)unnamed layer 2.*: no memory\n.*\(the 3rd exchange since the group was made\)"):
        second(batch())
