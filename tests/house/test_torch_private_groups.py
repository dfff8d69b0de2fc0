"""What `syncbn._torch_private` takes from torch.distributed, and `version_of`, do what their docstrings say."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from syncbn import _torch_private as private

pytestmark = pytest.mark.world_size(1)


def test_the_version_counts_changes_in_place():
    t = torch.ones(3)
    before = private.version_of(t)
    t[1:].add_(1)
    assert private.version_of(t) == private.version_of(t.detach()) == before + 1


@pytest.fixture
def group():
    """The default group, of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=77))
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_the_timeout_of_a_backend_is_found(group):
    assert private.timeout_of_backend(group, torch.device("cpu")).total_seconds() == 77
    assert private.timeout_of_backend(group, torch.device("meta")) is None  # there is no backend for it
    assert private.timeout_of_backend(object(), torch.device("cpu")) is None


def test_the_store_of_the_default_group_is_found(group):
    private.default_store().set("syncbn/test", "value")
    assert dist.PrefixStore("syncbn", private.default_store()).get("test") == b"value"


@pytest.mark.parametrize("by_name", [False, True])
def test_an_all_reduce_in_a_graph_is_a_collective(group, by_name):
    from torch.fx.experimental.proxy_tensor import make_fx

    named = group.group_name if by_name else group
    x = torch.ones(3)
    compiled = torch.compile(lambda t: private.all_reduce_in_graph(t, named) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), 2 * x)
    graph = make_fx(lambda t: private.all_reduce_in_graph(t, named) * 2)(x).graph
    ops = [node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    collectives = [op.name() for op in ops if private.is_collective_in_graph(op)]
    assert "_c10d_functional::all_reduce" in collectives and "aten::mul.Tensor" not in collectives


def test_symmetric_memory_is_zero_and_has_the_addresses_of_the_tensors(monkeypatch):
    """With a stand-in for torch's module, which needs GPUs."""
    done = []

    def empty(size, dtype, device):
        return torch.full((size,), 7, dtype=dtype, device=device)

    def rendezvous(own, group):
        assert done == ["waited"] and not own.any()
        return SimpleNamespace(buffer_ptrs=[1000, 2000], **({"offset": 64} if group == "newer" else {}))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("waited"))
    monkeypatch.setattr(private.importlib, "import_module", lambda name: SimpleNamespace(empty=empty, rendezvous=rendezvous))
    for group, addresses in (("older", [1000, 2000]), ("newer", [1064, 2064])):
        done.clear()
        memory = private.symmetric_memory(48, group, torch.device("cpu"))
        assert memory.own.numel() == 48 and memory.addresses == addresses and memory.handle.buffer_ptrs == [1000, 2000]


def test_torch_has_what_symmetric_memory_uses():
    module = private.importlib.import_module("torch.distributed._symmetric_memory")
    assert callable(module.empty) and callable(module.rendezvous)
    assert {"buffer_ptrs", "rendezvous"} <= set(dir(torch._C._distributed_c10d._SymmetricMemory))
