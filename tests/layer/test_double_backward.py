"""The law: derivatives of gradients, too, are those of batch normalization of the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad, gradgradcheck

import syncbn
from support.collectives import collectives
from support.oracle import activate, assert_close
from syncbn.activation import NAMES

TOLERANCE = 1e-9  # float64: two backward passes over sums of some hundred values
SPLITS = {1: [(5,)], 2: [(3, 3), (4, 1), (0, 5)], 3: [(3, 1, 2), (0, 4, 1)], 4: [(2, 0, 1, 2)]}


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def penalty(y: torch.Tensor, coefficients: torch.Tensor, inputs: list[torch.Tensor]) -> torch.Tensor:
    """A loss plus squares of its gradients: its own gradient contains every second derivative. If each input has
    a row per sample, the ranks' penalties add up to that of the whole batch."""
    loss = (coefficients * y * y).sum()
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    return loss + sum(g.square().sum() for g in gradients)


@pytest.mark.world_size(1)
@pytest.mark.parametrize("weighting", ["samples", "ranks"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", [None, *NAMES])
def test_gradgradcheck(activation, residual, weighting):
    def layer(x, weight, bias, residual=None):
        return syncbn.sync_batch_norm(x, None, None, weight, bias, residual=residual, activation=activation, weighting=weighting)

    assert gradgradcheck(layer, (leaf(4, 2, 3), leaf(2), leaf(2), *([leaf(4, 2, 3)] if residual else [])))


@pytest.mark.world_size(1)
@pytest.mark.parametrize(
    "view",
    [lambda x: x[..., ::2], lambda x: x.transpose(0, 2), lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1)],
    ids=["gaps", "transposed", "channels-last"],
)
def test_gradgradcheck_in_any_memory_format(view):
    """What the layer copies to make it dense still has a derivative."""
    assert gradgradcheck(lambda x: syncbn.sync_batch_norm(view(x), None, None, residual=view(x), activation="silu"), (leaf(3, 2, 4),))


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", [None, *NAMES])
def test_second_derivative_is_that_of_the_whole_batch(world, counts, activation, residual):
    """The loss is a penalty on the gradients of x and residual. Its gradients by x, residual and parameters are those of plain torch."""
    whole, whole_residual, coefficients = leaf(sum(counts), 3, 4), leaf(sum(counts), 3, 4), torch.randn(sum(counts), 3, 4).double()
    layer = syncbn.SyncBatchNorm(3, process_group=world.group, dtype=torch.float64, activation=activation)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3))
        layer.bias.copy_(torch.randn(3))
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))

    x = world.mine(whole.detach(), counts).requires_grad_()
    my_residual = world.mine(whole_residual.detach(), counts).requires_grad_()
    inputs = [x, my_residual] if residual else [x]
    penalty(layer(*inputs), world.mine(coefficients, counts), inputs).backward()

    z = F.batch_norm(whole, None, None, weight, bias, training=True)
    whole_inputs = [whole, whole_residual] if residual else [whole]
    penalty(activate(z + whole_residual if residual else z, activation), coefficients, whole_inputs).backward()

    for mine, everyones in zip(inputs, whole_inputs, strict=True):
        assert_close(mine.grad, world.mine(everyones.grad, counts), TOLERANCE, "d2x", everyones.grad)
    for got, want in ((layer.weight, weight), (layer.bias, bias)):
        parts = torch.stack(world.all_gather(got.grad))
        assert_close(parts.sum(0), want.grad, TOLERANCE, "d2 of a parameter", parts.abs().sum(0))


@pytest.mark.parametrize("weighting", ["samples", "ranks"])
@pytest.mark.parametrize("activation", [None, *NAMES])
def test_second_derivative_is_that_of_finite_differences_across_ranks(world, counts, activation, weighting):
    """If x, the residual and the parameters move on all ranks, the sum of the ranks' penalties changes as their gradients say."""
    whole, direction = torch.randn(2, sum(counts), 2, 3, dtype=torch.float64)
    parameters, coefficients = torch.randn(2, 2, dtype=torch.float64), torch.randn(sum(counts), 2, 3, dtype=torch.float64)
    parameter_direction = torch.randn(2, 2, dtype=torch.float64)

    def run(step: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the ranks' penalties after this step along the directions, and its derivative along them."""
        x = world.mine(whole + step * direction, counts).requires_grad_()
        p = (parameters + step * parameter_direction).requires_grad_()
        y = syncbn.sync_batch_norm(
            x, None, None, p[0], p[1], process_group=world.group, residual=x.sin(), activation=activation, weighting=weighting
        )
        value = penalty(y, world.mine(coefficients, counts), [x, p])
        gx, gp = torch.autograd.grad(value, [x, p])
        slope = (gx * world.mine(direction, counts)).sum() + (gp * parameter_direction).sum()
        both = torch.stack(world.all_gather(torch.stack([value.detach(), slope]))).sum(0)
        return both[0], both[1]

    step = 1e-5  # the error of a central difference: step² times the third derivative, and 1e-16 / step
    difference = (run(step)[0] - run(-step)[0]) / (2 * step)
    assert_close(run(0.0)[1], difference, 1e-6, "directional derivative")


def discriminator(norm) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), norm(4), nn.SiLU(), nn.Conv1d(4, 3, 3), norm(3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 1)
    ).double()


def wgan_gp(net: nn.Module, real: torch.Tensor, fake: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(net(between).sum(), between, create_graph=True)
    return (net(fake) - net(real)).sum() + 10 * (gradient.flatten(1).norm(dim=1) - 1).square().sum()


def r1(net: nn.Module, real: torch.Tensor, fake: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    real = real.clone().requires_grad_()
    score = net(real)
    (gradient,) = torch.autograd.grad(score.sum(), real, create_graph=True)
    return F.softplus(-score).sum() + F.softplus(net(fake)).sum() + 5 * gradient.square().sum()


@pytest.mark.parametrize("loss", [wgan_gp, r1])
def test_gradient_penalty_trains_as_on_the_whole_batch(world, counts, loss):
    """Three steps of SGD, whose losses are sums over samples: the sum of the ranks' gradients is the whole batch's."""
    synchronized = syncbn.convert_sync_batchnorm(discriminator(nn.BatchNorm1d), world.group)
    plain = discriminator(nn.BatchNorm1d)
    total = sum(counts)
    for _ in range(3):
        batch = [torch.randn(total, 2, 4).double(), torch.randn(total, 2, 4).double(), torch.rand(total, 1, 1).double()]
        for net, part in ((plain, batch), (synchronized, [world.mine(t, counts) for t in batch])):
            net.zero_grad()
            loss(net, *part).backward()
            for p in net.parameters():
                grad = p.grad if net is plain else torch.stack(world.all_gather(p.grad)).sum(0)
                p.data -= 1e-3 * grad
    for (name, got), want in zip(synchronized.state_dict().items(), plain.state_dict().values(), strict=True):
        assert_close(got, want, TOLERANCE, name)


@pytest.mark.world_size(1)
def test_third_derivative_is_right(world):
    def gradient(x):
        y = syncbn.sync_batch_norm(x, None, None, activation="silu")
        return torch.autograd.grad((y * torch.arange(6.0)[:, None]).sum(), x, create_graph=True)[0]

    assert gradgradcheck(gradient, (leaf(6, 2),))


@pytest.mark.world_size(1)
def test_a_hessian_may_be_computed_by_rows_together():
    def loss(x):
        return syncbn.sync_batch_norm(x, None, None, activation="silu").sin().sum()

    x = leaf(4, 2, 3)
    by_row, together = (torch.autograd.functional.hessian(loss, x, vectorize=vectorize) for vectorize in (False, True))
    assert torch.allclose(by_row, together, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_gradients_keep_their_types(world, dtype):
    x = torch.randn(4, 3, 5).to(dtype).requires_grad_()
    layer = syncbn.SyncBatchNorm(3, process_group=world.group, activation="relu")
    (dx,) = torch.autograd.grad(layer(x).float().square().sum(), x, create_graph=True)
    assert dx.dtype == dtype
    dx.float().square().sum().backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_differentiable_backward_gives_the_same_gradients(world, counts, dtype):
    """create_graph changes neither the value of a gradient nor its accuracy, even if the mean is far from 0."""
    whole = torch.randn(sum(counts), 3, 4, dtype=dtype) + 1000
    dy = torch.randn_like(whole)
    results = []
    for create_graph in (False, True):
        layer = syncbn.SyncBatchNorm(3, process_group=world.group, dtype=dtype, activation="relu")
        x = world.mine(whole, counts).requires_grad_()
        inputs = [x, layer.weight, layer.bias]
        results.append(torch.autograd.grad(layer(x), inputs, world.mine(dy, counts), create_graph=create_graph))
    for usual, differentiable in zip(*results, strict=True):
        scale = torch.stack(world.all_gather(F.pad(usual.abs().flatten(), (0, 1)).max().view(1))).max()
        # float64: over a group the sums are about 0, which costs (mean/std)² 2⁻⁵³ = 1e-10.
        assert_close(differentiable, usual.double(), 1e-9 if dtype == torch.float64 else 1e-5, "gradient", scale)


@pytest.mark.process_group
@pytest.mark.world_size(2, 3)
def test_a_double_backward_has_the_same_collectives_on_every_rank(world):
    """It has one in the differentiable backward pass, and three in the second backward pass."""
    layer = syncbn.SyncBatchNorm(3)
    x = torch.randn(2 * world.rank, 3, 4, requires_grad=True)
    with collectives() as seen:
        y = layer(x)  # in this context, because the backward exchange of y goes where the forward one went
        seen.clear()
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        assert len(seen) == 1
        seen.clear()
        dx.square().sum().backward()
    assert len(seen) == 3  # two for the derivative of the first backward pass, and one for y itself, through which dy depends on x


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("some", ["no", "one", "every"])
def test_a_derivative_does_not_depend_on_which_ranks_inputs_need_a_gradient(world, some):
    """Every rank joins its exchanges, as those of a first backward pass."""
    layer = syncbn.SyncBatchNorm(3, process_group=world.group, dtype=torch.float64)
    plain = nn.BatchNorm1d(3, dtype=torch.float64)
    whole = torch.randn(2 * world.size, 3, 4, dtype=torch.float64)
    x = world.mine(whole, (2,) * world.size).requires_grad_(some == "every" or (some == "one" and world.rank == 0))
    for model, batch in ((layer, x), (plain, whole)):
        (dweight,) = torch.autograd.grad(model(batch).pow(3).sum(), model.weight, create_graph=True)
        (dweight * torch.tensor([1.0, -2.0, 3.0])).sum().backward()  # linear, so that the ranks' gradients add up
    assert_close(torch.stack(world.all_gather(layer.bias.grad)).sum(0), plain.bias.grad, TOLERANCE, "d2 of the bias")


def test_the_error_of_forward_mode_suggests_an_alternative(world):
    x = torch.randn(4, 3, 5)
    layer = syncbn.SyncBatchNorm(3, process_group=world.group)
    with pytest.raises(NotImplementedError, match="torch.autograd.grad"):
        torch.func.jvp(layer, (x,), (x,))
    with pytest.raises(NotImplementedError, match="eval mode"), forward_ad.dual_level():
        layer(forward_ad.make_dual(x, x))
    layer.eval()
    plain = nn.BatchNorm1d(3).eval()
    got, want = (torch.func.jvp(module, (x,), (x,))[1] for module in (layer, plain))
    assert torch.equal(got, want)
