"""`syncbn.recompute_outputs` with FSDP, which frees parameters between a unit's passes, gives the same gradients and keeps no outputs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import syncbn
from support.step import SPLITS
from support.world import World
from syncbn.recompute import recompute_outputs

pytestmark = [pytest.mark.process_group, pytest.mark.world_size(2, 3)]


class Block(nn.Module):
    """Two fused layers, the second of which adds a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.layers = nn.ModuleList(syncbn.SyncBatchNorm(4, activation=activation) for activation in ("relu", "silu"))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.convs[1](self.layers[0](self.convs[0](x))), x)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.last = nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def fsdp2(model: Network, units: str, reshard: bool = True, dtype: torch.dtype | None = None) -> nn.Module:
    """`reshard`: a unit's parameters are freed after its forward pass, and gathered again for its backward pass."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layers = [layer for block in model.blocks for layer in (*block.convs, *block.layers)]
    for unit in {"one unit": [], "blocks": model.blocks, "layers": layers}[units]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)


def fsdp1(model: Network) -> nn.Module:
    options: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": True}
    for i, block in enumerate(model.blocks):
        model.blocks[i] = FullyShardedDataParallel(block, **options)
    return FullyShardedDataParallel(model, **options)


WRAPPERS: dict[str, Callable[[Network], nn.Module]] = {
    "FSDP2, one unit": lambda model: fsdp2(model, "one unit"),
    "FSDP2, blocks": lambda model: fsdp2(model, "blocks"),
    "FSDP2, layers": lambda model: fsdp2(model, "layers"),
    "FSDP2, layers, parameters stay": lambda model: fsdp2(model, "layers", reshard=False),
    "FSDP2, blocks, bfloat16": lambda model: fsdp2(model, "blocks", dtype=torch.bfloat16),
    "FSDP, blocks": fsdp1,
}


def steps(wrapper: str, world: World, recompute: bool) -> tuple[list[Tensor], list[bool]]:
    """Losses, gradients and buffers of this rank in two steps; and which of the layers' outputs outlived the forward pass."""
    torch.manual_seed(0)
    network = Network()
    outputs: list[weakref.ref[torch.UntypedStorage]] = []
    for block in network.blocks:
        for layer in block.layers:
            layer.register_forward_hook(lambda module, args, y: outputs.append(weakref.ref(y.untyped_storage())))
    model = WRAPPERS[wrapper](network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counts = SPLITS[world.size][-1]
    results: list[Tensor] = []
    for _ in range(2):
        outputs.clear()
        x = world.mine(torch.randn(sum(counts), 4, 8, 8), counts).requires_grad_()
        with recompute_outputs() if recompute else nullcontext():
            loss = model(x).float().square().sum()
        kept = [output() is not None for output in outputs]
        loss.backward()
        gradients = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters() if p.grad is not None]
        results += [loss.detach(), x.grad, *(t.clone() for t in (*gradients, *model.buffers()))]
        optimizer.step()
        optimizer.zero_grad()
    return results, kept


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_are_bitwise_those_without_and_no_output_is_kept(wrapper: str, world: World) -> None:
    """One of the ranks has an empty batch."""
    actual, kept = steps(wrapper, world, True)
    expected, kept_without = steps(wrapper, world, False)
    assert len(actual) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert kept == [False] * 4
    assert kept_without == [True] * 4
