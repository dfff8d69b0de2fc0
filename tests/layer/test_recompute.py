"""`syncbn.recompute_outputs`: the gradients are the same, and few of the layers' outputs are kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from support.collectives import collectives
from support.step import SPLITS
from support.world import World
from syncbn import ops
from syncbn.activation import NAMES
from syncbn.recompute import is_active, recompute_outputs

single = pytest.mark.world_size(1)


class Residual(nn.Module):
    """Blocks with a residual connection through the layer, as in a ResNet."""

    def __init__(self, activation: str | None, blocks: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(syncbn.SyncBatchNorm(4, activation=activation) for _ in range(blocks))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for conv, layer in zip(self.convs, self.layers, strict=True):
            x = layer(conv(x), x)
        return x.square()


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    """Convolutions before, between and after the layers."""
    return lambda: nn.Sequential(*(m for layer in layers for m in (nn.Conv2d(4, 4, 3), layer)), nn.Conv2d(4, 2, 3))


def keras() -> nn.Module:
    layer = syncbn.SyncBatchNormalization()
    return nn.Sequential(nn.Conv2d(4, 4, 3), layer, nn.Conv2d(4, 2, 3, padding=1))


MODELS = {
    "no activation": chain(syncbn.SyncBatchNorm(4), syncbn.SyncBatchNorm(4)),
    **{name: chain(syncbn.SyncBatchNorm(4, activation=name)) for name in NAMES},
    "not affine": chain(syncbn.SyncBatchNorm(4, affine=False)),
    "no running statistics": chain(syncbn.SyncBatchNorm(4, track_running_stats=False)),
    "eval mode": chain(syncbn.SyncBatchNorm(4).eval()),
    **{f"eval mode, {name}": chain(syncbn.SyncBatchNorm(4, activation=name).eval()) for name in NAMES},
    "frozen, relu": chain(syncbn.freeze_bn(syncbn.SyncBatchNorm(4, activation="relu"), parameters=True)),
    "one layer after the other": lambda: nn.Sequential(*(syncbn.SyncBatchNorm(4) for _ in range(5)), nn.Conv2d(4, 4, 3)),
    "residual": lambda: Residual(None),
    **{f"residual, {name}": partial(Residual, name) for name in NAMES},
    **{f"residual, eval mode, {name}": lambda name=name: Residual(name).eval() for name in NAMES},
    "Keras": keras,
    "a separate activation": chain(nn.Sequential(syncbn.SyncBatchNorm(4), nn.ReLU())),
    "an activation in place": chain(nn.Sequential(syncbn.SyncBatchNorm(4), nn.ReLU(inplace=True))),
    "plain": chain(nn.BatchNorm2d(4)),
}


def step(model: nn.Module, x: Tensor, recompute: bool, loss: Callable[[nn.Module, Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Gradients and buffers after one step."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    with recompute_outputs() if recompute else nullcontext():
        value = model(x).float().square().mean() if loss is None else loss(model, x)
    value.backward()
    assert x.grad is not None
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"x": x.grad, "loss": value.detach(), **grads, **{name: b.clone() for name, b in model.named_buffers()}}


def twice(build: Callable[[], nn.Module], x: Tensor, **kwargs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A step with and one without the context."""
    results = []
    for recompute in (True, False):
        torch.manual_seed(0)
        results.append(step(build().to(x.dtype), x, recompute, **kwargs))
    return results[0], results[1]


def assert_bitwise(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@single
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_and_buffers_are_bitwise_those_without(model: str, channels_last: bool, dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 12, 12).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    assert_bitwise(*twice(lambda: _again(MODELS[model]), x))


def _again(build: Callable[[], nn.Module]) -> nn.Module:
    """A model with new parameters; the layers of the table are made once."""
    model = build()
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def is_kept(layer: nn.Module, after: nn.Module, recompute: bool, between: Callable[[Tensor], Tensor] = lambda y: y) -> bool:
    """Whether the layer's output outlives the forward pass."""
    outputs = []
    layer.register_forward_hook(lambda module, args, y: outputs.append(weakref.ref(y.untyped_storage())))
    with recompute_outputs() if recompute else nullcontext():
        y = after(between(layer(torch.randn(2, 4, 8, 8, requires_grad=True))))
    gc.collect()
    assert y.grad_fn is not None
    return outputs[0]() is not None


@single
@pytest.mark.parametrize(
    ("between", "kept"),
    [(lambda y: y, False), (lambda y: y[:, :, 1:], False), (lambda y: y.transpose(2, 3), False), (lambda y: y.mul_(2), True)],
    ids=["as it is", "a slice", "transposed", "changed in place"],
)
@pytest.mark.parametrize("activation", [None, *NAMES])
@pytest.mark.parametrize("training", [True, False])
def test_only_an_output_that_is_changed_in_place_is_kept(
    training: bool, activation: str | None, between: Callable[[Tensor], Tensor], kept: bool
) -> None:
    conv = nn.Conv2d(4, 4, 3)
    assert is_kept(syncbn.SyncBatchNorm(4, activation=activation).train(training), conv, True, between) is kept
    assert is_kept(syncbn.SyncBatchNorm(4, activation=activation).train(training), conv, False, between)


@single
def test_every_third_output_along_residual_connections_is_kept() -> None:
    model, outputs = Residual("relu", 6), []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, y: outputs.append(weakref.ref(y.untyped_storage())))
    with recompute_outputs():
        loss = model(torch.randn(2, 4, 8, 8)).sum()
    assert [output() is not None for output in outputs] == [False, False, True] * 2
    loss.backward()


@pytest.fixture
def normalized(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one with each output that is computed."""
    calls: list[Any] = []

    def counted(op: Any) -> Any:
        return lambda *args: calls.append(args[0].shape) or op(*args)

    for op in ("normalize", "batch_norm"):
        monkeypatch.setattr(ops, op, counted(getattr(ops, op)))
    return calls


@single
def test_layers_that_hold_an_output_at_the_same_time_share_it(normalized: list[Any]) -> None:
    with recompute_outputs():
        y = syncbn.SyncBatchNorm(4)(torch.randn(2, 4, 3, 3, requires_grad=True))
        last = ((y.exp() * y) * y).grad_fn
    del y
    first = last.next_functions[0][0]
    saved = last._saved_other, first._saved_other
    assert len(normalized) == 2
    assert torch.equal(*saved)
    del saved
    assert last._saved_other.shape == first._saved_other.shape
    assert len(normalized) == 3  # an output that is held no more is computed again


@single
def test_an_output_that_nothing_keeps_is_not_computed_again(normalized: list[Any]) -> None:
    with recompute_outputs():
        loss = syncbn.SyncBatchNorm(4)(torch.randn(2, 4, 3, 3, requires_grad=True)).sum()
    loss.backward()
    assert len(normalized) == 1


@single
def test_outputs_are_recomputed_with_the_parameters_of_the_forward_pass() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        value = F.conv2d(model[0](x).detach(), model[1].weight).square().sum()
        with torch.no_grad():
            model[0].weight.mul_(3)
        return value + 0 * x.sum()

    assert_bitwise(*twice(lambda: nn.Sequential(syncbn.SyncBatchNorm(4), nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 5, 5), loss=loss))


def with_gradient_penalty(model: nn.Module, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return gradient.square().sum()


def retaining(model: nn.Module, x: Tensor) -> Tensor:
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    return loss


def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    half = len(model) // 2
    y = checkpoint(model[:half], x, use_reentrant=False, context_fn=syncbn.checkpoint_contexts)
    return model[half:](y).square().sum()


def inner_context() -> Callable:
    return recompute_outputs if is_active() else nullcontext  # a step without the context has no inner one either


def inside_a_checkpoint(model: nn.Module, x: Tensor) -> Tensor:
    context = inner_context()

    def run(x: Tensor) -> Tensor:
        with context():
            return model(x)

    return checkpoint(run, x, use_reentrant=False, context_fn=syncbn.checkpoint_contexts).square().sum()


def on_cpu(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return model(x).square().sum()


def autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x).float().square().sum()


def nested(model: nn.Module, x: Tensor) -> Tensor:
    with inner_context()():
        return model(x).square().sum()


@single
@pytest.mark.parametrize(("training", "activation"), [(True, "silu"), (False, "relu"), (False, "silu")])
@pytest.mark.parametrize("loss", [with_gradient_penalty, retaining, checkpointed, inside_a_checkpoint, on_cpu, autocast, nested])
def test_with_other_tools_gradients_are_bitwise_those_without(
    loss: Callable[[nn.Module, Tensor], Tensor], training: bool, activation: str
) -> None:
    def build() -> nn.Module:
        layers = [nn.Conv2d(4, 4, 3), syncbn.SyncBatchNorm(4, activation=activation)]
        return nn.Sequential(*layers, nn.Conv2d(4, 4, 3), syncbn.SyncBatchNorm(4), nn.Conv2d(4, 4, 3)).train(training)

    assert_bitwise(*twice(build, torch.randn(2, 4, 12, 12), loss=loss))


@single
def test_addresses_that_are_used_again_are_told_apart() -> None:
    """The memory of a freed output soon holds something else, at the same version."""
    layer, conv = syncbn.SyncBatchNorm(4), nn.Conv2d(4, 4, 3, bias=False)
    for _ in range(50):
        with recompute_outputs():
            layer(torch.randn(2, 4, 6, 6))
            other = torch.randn(2, 4, 6, 6)
            y = conv(other)
        (gradient,) = torch.autograd.grad(y.sum(), conv.weight)
        expected = torch.autograd.grad(conv(other).sum(), conv.weight)[0]
        assert torch.equal(gradient, expected)


@pytest.mark.process_group
@pytest.mark.world_size(2, 3)
def test_ranks_exchange_no_more_than_without(world: World) -> None:
    """One of the ranks has an empty batch."""
    counts = SPLITS[world.size][-1]
    x = torch.randn(sum(counts), 4, 12, 12)
    results, exchanged = [], []
    for recompute in (True, False):
        torch.manual_seed(0)
        model = chain(syncbn.SyncBatchNorm(4, activation="relu"))()
        with collectives() as seen:
            results.append(step(model, world.mine(x, counts), recompute, loss=lambda model, x: model(x).square().sum()))
        exchanged.append(list(seen))
    assert_bitwise(*results)
    assert exchanged[0] == exchanged[1]
    assert len(exchanged[0]) == 2


@single
def test_the_context_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), recompute_outputs():
        assert is_active()
        raise ZeroDivisionError
    assert not is_active()
