"""`syncbn.recompute_outputs` where a layer normalizes by its running statistics: in eval mode, and frozen.

The layer then runs torch's operators, each of which saves what its own backward pass needs. In the context they keep nothing as large as
the output but the input."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import syncbn
from syncbn.activation import NAMES
from syncbn.recompute import recompute_outputs

pytestmark = pytest.mark.world_size(1)

SHAPE = (2, 4, 8, 8)


class Made(TorchDispatchMode):
    """Notes the memory of each tensor of the input's shape that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t.untyped_storage() for t in tree_leaves(args) if isinstance(t, Tensor)]
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.shape == SHAPE and t.untyped_storage() not in given:
                self.memory.add(t.untyped_storage())
        return result


def evaluated(activation: str | None, frozen: bool) -> nn.Module:
    layer = syncbn.SyncBatchNorm(4, activation=activation)
    return syncbn.freeze_bn(layer, parameters=True) if frozen else layer.eval()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, *NAMES])
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_of_the_outputs_size_is_kept(frozen: bool, activation: str | None, residual: bool) -> None:
    x, z = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE) if residual else None
    layer, conv = evaluated(activation, frozen), nn.Conv2d(4, 4, 3)
    kept = []
    for recompute in (True, False):
        with Made() as made, recompute_outputs() if recompute else nullcontext():
            loss = conv(layer(x, z)).sum()
        kept.append(len(made.memory))
        loss.backward()
    assert kept == [0, 1 if activation in (None, "relu") else 2]  # leaky_relu and silu also keep the value before the activation


@pytest.mark.parametrize(("activation", "tensors"), [(None, 1), ("relu", 2)])
def test_each_tensor_that_an_operator_may_save_has_one_recipe(activation: str | None, tensors: int) -> None:
    with recompute_outputs():
        y = evaluated(activation, frozen=False)(torch.randn(SHAPE, requires_grad=True))
    assert y.grad_fn is not None
    assert len(y.grad_fn.metadata["syncbn"]) == tensors  # y, and with an activation the value before it


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_an_input_that_needs_no_gradient_is_not_kept_for_a_residual_that_does(activation: str) -> None:
    layer, conv = evaluated(activation, frozen=True), nn.Conv2d(4, 4, 3)
    x, residual = torch.randn(SHAPE), torch.randn(SHAPE, requires_grad=True)
    (expected,) = torch.autograd.grad(conv(layer(x, residual)).square().sum(), residual)
    memory = weakref.ref(x.untyped_storage())
    with recompute_outputs():
        loss = conv(layer(x, residual)).square().sum()
    del x
    assert memory() is None
    (actual,) = torch.autograd.grad(loss, residual)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_outputs_are_recomputed_with_the_statistics_of_the_forward_pass(activation: str) -> None:
    """A training step between the two passes may change them."""
    layer, conv, x = evaluated(activation, frozen=False), nn.Conv2d(4, 4, 3), torch.randn(SHAPE, requires_grad=True)
    results = []
    for recompute in (True, False):
        with recompute_outputs() if recompute else nullcontext():
            loss = conv(layer(x)).square().sum()
        mean = layer.running_mean.clone()
        layer.running_mean.add_(1)
        results.append(torch.autograd.grad(loss, [x, conv.weight]))
        layer.running_mean.copy_(mean)
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_an_output_changed_in_place_does_not_change_what_its_activation_has_saved() -> None:
    """torch's relu saves its output, so it would raise an error. In training mode the layer saves no output."""
    layer, conv, x = evaluated("relu", frozen=False), nn.Conv2d(4, 4, 3), torch.randn(SHAPE, requires_grad=True)
    with recompute_outputs():
        y = layer(x)
        loss = conv(y.mul_(2)).square().sum()
    (actual,) = torch.autograd.grad(loss, x)
    (expected,) = torch.autograd.grad(conv(layer(x) * 2).square().sum(), x)
    assert torch.equal(actual, expected)


def test_a_tensor_that_another_op_keeps_first_stays_an_error_if_it_is_changed() -> None:
    """What is known of a kept tensor is replaced only by the recipe of an output in the same memory."""
    w = torch.randn(SHAPE, requires_grad=True)
    with recompute_outputs():
        x = w.exp()  # keeps x
        y = evaluated("relu", frozen=False)(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
