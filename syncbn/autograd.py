"""One training step as an autograd function: the ops and the exchanges between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import checkpoint, ops, recompute
from .activation import Activation, keeps_mask, keeps_residual
from .arguments import check_count
from .comm.exchange import Exchange
from .comm.signatures import NO_TICKET, Ticket
from .double_backward import differentiable_backward
from .layout import dense_like
from .moments import update_running_stats
from .options import Options


class Running(NamedTuple):
    """A layer's moving statistics; a step updates them in place. All are None if nothing is tracked."""

    mean: Tensor | None  # [C]
    var: Tensor | None  # [C]
    num_batches: Tensor | None  # [] int64


NOTHING_TRACKED = Running(None, None, None)


class SyncBatchNormFunction(torch.autograd.Function):
    """Batch normalization over the samples of R ranks.

        x, y, dy     [N, C, *]   this rank's samples, x dense; N differs by rank and may be 0
        stats        [3C + 4]    shift, sum and sum of squares of x - shift, weight, samples and tags over all ranks, float64

        forward      y  = activation(weight * xhat + bias + residual),  xhat = (x - mean) * invstd
        backward     dx = weight * invstd * (dz - sum_dy / n - xhat * sum_dy_xhat / n),  dz = dy through the activation
        local        dweight = sum_dy_xhat, dbias = sum_dy: left to DDP to average

    Every rank runs one collective each way, whatever its samples and whatever requires a gradient. A recomputation of a
    checkpoint has none in the forward direction, if it was given `checkpoint_contexts`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        anchor: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        exchange: Exchange,
        options: Options,
    ) -> Tensor:
        running = Running(running_mean, running_var, num_batches_tracked)
        stats, running, ticket = _group_stats(x, running, exchange, options)
        eps, activation, negative_slope = options.epilogue
        y, mask = ops.normalize(
            x, stats, weight, bias, residual, *running, options.momentum, eps, options.unbiased, activation, negative_slope, *ticket
        )
        if running is not NOTHING_TRACKED:
            _count_as_written(running)
        if recompute.is_active():
            ctx.recipe = recompute.remember(y, _normalization(stats, weight, bias, options), x, residual)

        ctx.has_residual = residual is not None
        kept_residual = residual if keeps_residual(activation, ctx.has_residual) else None
        kept_mask = mask if keeps_mask(activation, ctx.has_residual) else None
        ctx.save_for_backward(x, stats, weight, bias, kept_residual, kept_mask)
        ctx.exchange, ctx.options = exchange, options
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, stats, weight, bias, residual, mask = ctx.saved_tensors
        others = weight, bias, residual, mask
        options: Options = ctx.options
        exchange: Exchange = ctx.exchange
        needs_dx, needs_dresidual = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            grads = differentiable_backward(dy, x, stats, *others, exchange, *options.epilogue, options.rank_weighted)
            return _gradients(*(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)))
        dy = dense_like(dy, x)

        ticket = exchange.ticket(x, "backward", 2 * x.shape[1])
        sums, dweight, dbias = ops.backward_reduce(dy, x, stats, *others, *options.epilogue, ticket.tag)
        sums = exchange.all_reduce_(sums, "backward")
        dx: Tensor | None = None
        dz = dy if ctx.has_residual else None
        needs_dz = needs_dresidual and options.epilogue.activation != Activation.none
        if needs_dx or needs_dz:
            dx, written = ops.backward_input(dy, x, stats, sums, *others, *options.epilogue, options.rank_weighted, *ticket)
            dz = written if needs_dz else dz
        else:
            exchange.verify(sums, "backward", ticket)  # no kernel uses the sums
        return _gradients(dx if needs_dx else None, dz, None if weight is None else dweight, None if bias is None else dbias)


def _gradients(dx: Tensor | None, dz: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> tuple[Tensor | None, ...]:
    """What `backward` returns: a value for each argument of `forward`."""
    return dx, dz, dweight, dbias, None, None, None, None, None, None


def _group_stats(x: Tensor, running: Running, exchange: Exchange, options: Options) -> tuple[Tensor, Running, Ticket]:
    """The statistics of all ranks' samples, the moving statistics that `normalize` has to update by them, and what it has to verify.

    A compiled graph and an eager step differ here; elsewhere in this file only in that a graph is not differentiated twice."""
    if torch.compiler.is_compiling():
        stats, ticket = _exchanged_stats(x, exchange, options)
        check_count(options.layer, stats, x, exchange.comm)
        # Updated outside `normalize`, which the compiler may then recompute in the backward pass.
        update_running_stats(stats, *running, options.momentum, options.unbiased)
        return stats, NOTHING_TRACKED, ticket
    replayed = checkpoint.replay(options.layer, x.shape[1])
    if replayed is not None or checkpoint.is_recomputation():
        running = NOTHING_TRACKED  # already updated in the forward pass
    stats, ticket = _exchanged_stats(x, exchange, options) if replayed is None else (replayed, NO_TICKET)
    checkpoint.record(options.layer, stats)
    check_count(options.layer, stats, x, exchange.comm)
    return stats, running, ticket


def _exchanged_stats(x: Tensor, exchange: Exchange, options: Options) -> tuple[Tensor, Ticket]:
    shifted = exchange.merges(x)
    ticket = exchange.ticket(x, "forward", 2 * x.shape[1] + 2)
    return exchange.all_reduce_stats_(ops.stats(x, options.rank_weighted, shifted, ticket.tag), x.shape[1], shifted), ticket


def _count_as_written(running: Running) -> None:
    """Increments the version counters of the moving statistics, as torch's in-place operations do (the compiled ops do not). If autograd
    saved one of them for a backward pass, that pass then raises instead of using the changed values."""
    written = [t for t in running if t is not None and not t.is_inference()]
    if written:
        increment_version(written)


def _normalization(stats: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> Callable[..., Tensor]:
    """`normalize` as a function of x and the residual that leaves the running statistics unchanged."""
    weight, bias = recompute.copy_of(weight), recompute.copy_of(bias)

    def normalize(x: Tensor, residual: Tensor | None) -> Tensor:
        return ops.normalize(
            x, stats, weight, bias, residual, *NOTHING_TRACKED, None, options.epilogue.eps, options.unbiased, *options.epilogue[1:]
        )[0]

    return normalize
