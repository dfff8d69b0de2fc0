"""Why the ranks of a node do not exchange in each other's GPU memory: one reason on all of them. Most tests need one rank, none a GPU."""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from support.divergence import another_group, batch
from support.peers import SharedFiles, Stream, stand_in
from syncbn import SyncBatchNorm, environment
from syncbn.comm import peer_memory, peers, resolve, signatures
from syncbn.comm.identity import state_of

alone = pytest.mark.world_size(1)


def raising(error: Exception, then=lambda *arguments: None):
    def call(*arguments):
        then(*arguments)
        raise error

    return call


OFF = environment.settings._replace(peer=False)
NO_LAUNCH = RuntimeError("peer_all_reduce could not be launched: no kernel image")
# name -> the reason for which all ranks stay with the group, and what is wrong on the last rank.
FALLBACKS = {
    "another setting": ("not turned on by SYNCBN_PEER=1", environment, "settings", OFF),
    "no library": ("the compiled library is", peer_memory, "library", lambda: None),
    "no identity": ("GPU cannot be told from others: no uuid", peers, "gpu_digest", raising(AttributeError("no uuid"))),
    "another node": ("the ranks are on several nodes", peers, "host_identity", lambda: bytes(32)),
    "no access": ("its GPU cannot access", peers, "why_no_access", lambda device, gpus: "its GPU cannot access the memory of rank 0's"),
    "no memory": ("symmetric memory: CUDA driver error", peer_memory, "symmetric_memory",
                  raising(RuntimeError("CUDA driver error\nin line 1"), SharedFiles.map)),
    "no sum": ("has given a wrong sum", peer_memory.PeerMemory, "all_reduce_", lambda self, values, key: values),
    "no launch": (f"has failed: {NO_LAUNCH}", peer_memory.PeerMemory, "all_reduce_", raising(NO_LAUNCH)),
}  # fmt: skip


@pytest.mark.process_group
@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("name", FALLBACKS)
def test_what_one_rank_lacks_keeps_all_ranks_with_the_group(world, peer_library, monkeypatch, name):
    stand_in(monkeypatch, peer_library, world.rank)
    monkeypatch.setattr(peers, "FIRST_TIMEOUT", 0.3)
    reason, *what = FALLBACKS[name]
    if world.rank == world.size - 1:
        monkeypatch.setattr(*what)
    layer = SyncBatchNorm(3, process_group=another_group(world))
    for _ in range(2):
        layer(batch()).sum().backward()
    path = state_of(resolve(layer.process_group).group).way(peers.PeerExchange).path
    assert path.startswith("over the group: ") and reason in path, path
    assert len({int(t) for t in world.all_gather(torch.tensor([zlib.crc32(path.encode())]))}) == 1


@alone
@pytest.mark.parametrize(
    ("group", "ranks", "reason"),
    [
        (object(), 2, "only the ranks of a torch.distributed process group can map each other's memory"),
        (dist.ProcessGroup(0, 17), 17, "17 ranks are more than 16"),
        (dist.ProcessGroup(0, 16), 16, "the compiled library is "),
    ],
)
def test_what_all_ranks_lack_is_the_reason(monkeypatch, group, ranks, reason):
    monkeypatch.setattr(environment, "settings", environment.settings._replace(peer=True))
    monkeypatch.setattr(peer_memory, "library", lambda: None)
    assert peers._why_not(SimpleNamespace(group=group, world_size=ranks)).startswith(reason)


@alone
def test_a_captured_exchange_sets_nothing_up(monkeypatch):
    """A graph could not wait for the other ranks."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    exchange = peers.PeerExchange()
    exchange.set_up(SimpleNamespace(), torch.device("cuda"))
    assert not exchange.ready and exchange.memory is None


# ---- A group of one rank ------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(peer_library, monkeypatch):
    """The memory of a group of one rank."""
    stand_in(monkeypatch, peer_library)
    own = torch.zeros(2 * 8 * 16, dtype=torch.uint8)
    monkeypatch.setattr(peer_memory, "symmetric_memory", lambda *arguments: SharedFiles(own, [own.data_ptr()], None))
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    return peer_memory.PeerMemory(group, torch.device("cpu"), 1.0, signatures.signature, 8)


@alone
def test_another_stream_waits_for_the_one_before_it(memory, monkeypatch):
    """But a captured stream and one that is not do not wait for each other: a graph has no edge to anything outside of it."""
    a, b, captured, forked = Stream("a"), Stream("b"), Stream("captured", True), Stream("forked", True)
    for stream in (a, a, b, b, a, captured, forked, captured, b):
        monkeypatch.setattr(peer_memory, "current_stream", lambda device, stream=stream: stream)
        assert memory.all_reduce_(torch.full((3,), 2.0, dtype=torch.float64), ("key",)).tolist() == [2, 2, 2]
    assert (a.waits, b.waits, captured.waits, forked.waits) == (["b"], ["a"], ["forked"], ["captured"])


@alone
def test_values_elsewhere_are_an_error_before_anything_is_launched(memory):
    with pytest.raises(ValueError, match="in the memory of one GPU of each rank: here cpu, got values on meta"):
        memory.all_reduce_(torch.zeros(3, dtype=torch.float64, device="meta"), ("key",))


@alone
@pytest.mark.parametrize(
    ("values", "takes"),
    [
        (torch.zeros(8, dtype=torch.float64), True),
        (torch.zeros(9, dtype=torch.float64), False),
        (torch.zeros(0, dtype=torch.float64), False),
        (torch.zeros(8), False),
        (torch.zeros(8, dtype=torch.float64)[::2], False),
    ],
)
def test_the_kernel_gets_what_it_can_add(memory, values, takes):
    assert memory.takes(values) is takes


@alone
def test_a_library_with_another_struct_is_not_used():
    assert peer_memory.declared(SimpleNamespace()) is None
    assert peer_memory.declared(SimpleNamespace(syncbn_peer_all_reduce=None, syncbn_peers_bytes=lambda: 8)) is None


@alone
def test_memory_that_torch_places_elsewhere_is_refused(memory, monkeypatch):
    own = torch.zeros(2 * 8 * 16, dtype=torch.uint8)
    monkeypatch.setattr(peer_memory, "symmetric_memory", lambda *arguments: SharedFiles(own, [own.data_ptr() + 16], None))
    with pytest.raises(RuntimeError, match="another address than its tensor"):
        peer_memory.PeerMemory(SimpleNamespace(rank=lambda: 0, size=lambda: 1), torch.device("cpu"), 1.0, signatures.signature, 8)
