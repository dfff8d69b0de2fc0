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
from torch.utils.checkpoint import checkpoint

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


def backward_pass(model: nn.Module, x: Tensor) -> Tensor:
    loss = model(x).sum()
    loss.backward()
    return loss


def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False, context_fn=syncbn.checkpoint_contexts).sum()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss", [backward_pass, checkpointed])
def test_a_loss_does_not_keep_an_input_that_it_would_not_keep_without_the_context(
    loss: Callable[[nn.Module, Tensor], Tensor], training: bool
) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), syncbn.SyncBatchNorm(4, activation="relu"), nn.Conv2d(4, 4, 1)).train(training)
    inputs = []
    model[1].register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0].untyped_storage())))
    with recompute_outputs():
        value = loss(model, torch.randn(2, 4, 3, 3))
    assert value.grad_fn is not None
    assert [input() for input in inputs] == [None]


def mapped(model: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(model)(x[None])[0]


def in_inference_mode_with_gradients(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode(), torch.enable_grad():
        return model(x)


def traced(model: nn.Module, x: Tensor) -> Tensor:
    return torch.jit.trace(model, x)(x)


@pytest.mark.parametrize("call", [mapped, in_inference_mode_with_gradients, traced])
def test_eval_mode_accepts_the_same_calls_as_without_the_context(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, x = nn.Sequential(syncbn.SyncBatchNorm(4, activation="relu"), nn.Conv2d(4, 4, 1)).eval(), torch.randn(2, 4, 3, 3)
    expected = call(model, x)
    with recompute_outputs():
        assert torch.equal(call(model, x), expected)


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
