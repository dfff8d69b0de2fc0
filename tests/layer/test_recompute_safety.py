"""What `syncbn.recompute_outputs` must leave as it is: torch's errors, lifetimes, and modes without a graph."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import syncbn
from syncbn.recompute import recompute_outputs

pytestmark = pytest.mark.world_size(1)


def input_of_the_layer(w: Tensor) -> Tensor:
    x = w * 1.0
    y = syncbn.SyncBatchNorm(4)(x)
    x.mul_(2)
    return y.sum()


def output_of_another_op(w: Tensor) -> Tensor:
    y = w.exp()
    y.add_(1)
    return y.sum()


def a_parameter_between_two_passes(w: Tensor) -> Tensor:
    conv = nn.Conv2d(4, 4, 1)
    loss = conv(syncbn.SyncBatchNorm(4)(w)).square().sum()
    loss.backward(retain_graph=True)
    with torch.no_grad():
        conv.weight.add_(1)
    return loss


@pytest.mark.parametrize("case", [input_of_the_layer, output_of_another_op, a_parameter_between_two_passes])
def test_a_tensor_changed_in_place_is_torchs_error(case: Callable[[Tensor], Tensor]) -> None:
    w = torch.randn(2, 4, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        case(w).backward()
    with recompute_outputs():
        loss = case(w)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_input_changed_in_place_is_an_error() -> None:
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    with recompute_outputs():
        y = F.conv2d(syncbn.SyncBatchNorm(4, affine=False)(x), torch.randn(4, 4, 3, 3, requires_grad=True))
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_a_kept_output_does_not_keep_the_input(training: bool) -> None:
    layer = syncbn.SyncBatchNorm(4).train(training)
    x = torch.randn(2, 4, 3, 3)
    input = weakref.ref(x.untyped_storage())
    with recompute_outputs():
        y = layer(x)
    y.sum().backward()
    features = y.detach()
    del x, y
    assert input() is None
    assert features.shape == (2, 4, 3, 3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_call_without_a_graph_is_as_without_the_context(mode: Callable) -> None:
    layer, x = syncbn.SyncBatchNorm(4), torch.randn(2, 4, 3, 3)
    expected = copy.deepcopy(layer)(x)
    with recompute_outputs(), mode():
        assert torch.equal(layer(x), expected)


def test_an_inference_tensor_may_be_a_residual() -> None:
    """The recipe of the output keeps it without its version, which an inference tensor does not have."""
    with torch.inference_mode():
        residual = torch.randn(2, 4, 5, 5)
    conv, x, gradients = nn.Conv2d(4, 4, 3), torch.randn(2, 4, 5, 5, requires_grad=True), []
    for context in (recompute_outputs(), nullcontext()):
        with context:
            loss = conv(syncbn.SyncBatchNorm(4)(x, residual)).square().sum()
        gradients.append(torch.autograd.grad(loss, [x, conv.weight]))
    assert all(map(torch.equal, *gradients))
