"""One training step as an autograd function: the ops and the exchanges between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import checkpoint, ops, recompute
from ._torch_private import in_backward
from .activation import Activation, keeps_mask, keeps_residual
from .arguments import check_count
from .comm.exchange import UNSYNCHRONIZED, LayerExchanges
from .comm.signatures import NO_TICKET, Ticket
from .double_backward import differentiable_backward
from .layout import dense_like
from .moments import update_running_stats
from .options import Options

# A layer's moving statistics: mean [C], var [C] and number of batches [] int64. A step updates them in place. All are None if nothing is
# tracked.
Running = tuple[Tensor | None, Tensor | None, Tensor | None]
NOTHING_TRACKED: Running = (None, None, None)

# What a step keeps for its backward pass: x, stats, weight, bias, and the residual or the mask if the activation needs it.
Saved = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class SyncBatchNormFunction(torch.autograd.Function):
    """Batch normalization over the samples of R ranks.

        x, y, dy     [N, C, *]   this rank's batch, x dense; N differs by rank and may be 0
        stats        [3C + 4]    shift, sum and sum of squares of x - shift, weight, samples and tags over all ranks, float64

        forward      y  = activation(weight * xhat + bias + residual),  xhat = (x - mean) * invstd
        backward     dx = weight * invstd * (dz - sum_dy / n - xhat * sum_dy_xhat / n),  dz = dy through the activation
        local        dweight = sum_dy_xhat and dbias = sum_dy, but summed over this rank's batch only: DDP averages them

    n is the number of values that a channel has over all ranks; `moments.effective_count` says what it is if the ranks have equal weight.
    Every rank of a group exchanges once each way, whatever its batch and whatever requires a gradient. The recomputation of a checkpoint
    that has `checkpoint_contexts` exchanges nothing.
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
        exchange: LayerExchanges,
        options: Options,
        in_one_call: bool,
    ) -> Tensor:
        running = running_mean, running_var, num_batches_tracked
        stats: Tensor | None
        compiling = torch.compiler.is_compiling()
        if compiling:
            stats, running, ticket = _traced_stats(x, running, exchange, options)
        else:
            stats, running, ticket = _group_stats(x, running, exchange, options, in_one_call)
        if x.numel() <= x.shape[1]:  # at most one value per channel on this rank: only such a rank waits for the device
            check_count(options.layer, stats, x, exchange.comm)
        momentum, epilogue, _, rank_weighted, unbiased, *_ = options
        mask: Tensor | None = None
        if stats is None:
            y, stats = ops.batch_norm(x, weight, bias, *running, momentum, unbiased, *epilogue, rank_weighted)
        else:
            y, mask = ops.normalize(x, stats, weight, bias, residual, *running, momentum, unbiased, *epilogue, *ticket)
        # What the compiled ops write does not count as changed in place, so it is marked here: a backward pass that has saved one of these
        # tensors then raises instead of using the changed values.
        if written := [t for t in running if t is not None]:
            increment_version(written)
        if not compiling:
            for log in checkpoint.logs():
                log.append(options.layer, stats)
            if recompute.is_active():
                ctx.recipe = recompute.remember(y, _normalization(stats, weight, bias, options), x, residual)

        if residual is None:
            mask = None
        else:
            activation = epilogue.activation
            mask = mask if keeps_mask(activation, True) else None
            residual = residual if keeps_residual(activation, True) else None
            ctx.contiguous = x.is_contiguous()
        ctx.save_for_backward(x, stats, weight, bias, residual, mask)
        ctx.exchange, ctx.options = exchange, options
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved: Saved = ctx.saved_tensors
        if saved[4] is not None or saved[5] is not None:  # the residual or the mask
            saved = _as_in_forward(saved, ctx.contiguous)
        x, stats, weight, bias, residual, mask = saved
        options: Options = ctx.options
        exchange: LayerExchanges = ctx.exchange
        needs_dx, needs_dresidual, *_ = ctx.needs_input_grad
        if not torch.compiler.is_compiling():
            ctx.recipe = None  # it keeps x, which torch frees after this pass although the loss may still hold the graph
            if torch.is_grad_enabled():  # create_graph=True
                grads = differentiable_backward(dy, *saved, *options.epilogue, options.rank_weighted, exchange)
                return *(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)), *_NO_GRADIENTS
        if not (dy.is_contiguous() and x.is_contiguous()):
            dy = dense_like(dy, x)

        dx: Tensor | None = None
        dz = dy if needs_dresidual else None
        if exchange is UNSYNCHRONIZED and needs_dx and residual is None and mask is None:
            dx, dweight, dbias = ops.batch_norm_backward(dy, x, stats, weight, bias, *options.epilogue, options.rank_weighted)
        else:
            ticket = NO_TICKET if exchange is UNSYNCHRONIZED else exchange.ticket(dy, "backward", 2 * x.shape[1])
            sums, dweight, dbias = ops.backward_reduce(dy, *saved, *options.epilogue, ticket.tag)
            if exchange is not UNSYNCHRONIZED:
                sums = exchange.all_reduce_(sums, "backward")
            needs_dz = needs_dresidual and options.epilogue.activation != Activation.none
            if needs_dx or needs_dz:
                dx, written = ops.backward_input(dy, sums, *saved, *options.epilogue, options.rank_weighted, *ticket)
                dx, dz = dx if needs_dx else None, written if needs_dz else dz
            else:
                exchange.verify(sums, "backward", ticket)  # as the kernel that uses the sums would
        return dx, dz, None if weight is None else dweight, None if bias is None else dbias, *_NO_GRADIENTS


_NO_GRADIENTS = (None,) * 7  # of the arguments of `forward` after the bias


def _group_stats(
    x: Tensor, running: Running, exchange: LayerExchanges, options: Options, in_one_call: bool
) -> tuple[Tensor | None, Running, Ticket]:
    """The statistics of all ranks' samples, the moving statistics that the next op has to update, and the ticket that it has to verify.

    The statistics are None if the next op, `batch_norm`, has to compute them, too."""
    replayed = checkpoint.replayed()
    if replayed is not None or in_backward():  # this is a recomputation: the first forward pass has updated them
        running = NOTHING_TRACKED
    if replayed is not None:
        return replayed.replay(options.layer, x.shape[1]), running, NO_TICKET
    if in_one_call:
        return None, running, NO_TICKET
    stats, ticket = _exchanged_stats(x, exchange, options)
    return stats, running, ticket


def _traced_stats(x: Tensor, running: Running, exchange: LayerExchanges, options: Options) -> tuple[Tensor, Running, Ticket]:
    """`_group_stats` in a compiled graph. Elsewhere in this file a graph differs in three ways: it is not differentiated twice,
    checkpoints do not log its statistics, and `recompute_outputs` has no effect on it."""
    stats, ticket = _exchanged_stats(x, exchange, options)
    # The graph updates them outside `normalize`, so that the partitioner may recompute `normalize` in the backward pass.
    update_running_stats(stats, *running, options.momentum, options.unbiased)
    return stats, NOTHING_TRACKED, ticket


def _exchanged_stats(x: Tensor, exchange: LayerExchanges, options: Options) -> tuple[Tensor, Ticket]:
    if exchange is UNSYNCHRONIZED:
        return ops.stats(x, options.rank_weighted, True), NO_TICKET
    ticket = exchange.ticket(x, "forward", 2 * x.shape[1] + 2)
    shifted = exchange.merges(x)
    return exchange.all_reduce_stats_(ops.stats(x, options.rank_weighted, shifted, ticket.tag), x.shape[1], shifted), ticket


def _as_in_forward(saved: Saved, contiguous: bool) -> Saved:
    """`saved` with x and residual in the memory format of the forward pass, whose order the mask's bits have. A hook may have changed it:
    `save_on_cpu(pin_memory=True)` makes every tensor contiguous."""
    x, stats, weight, bias, residual, mask = saved
    if x.is_contiguous() is not contiguous:
        x = x.contiguous() if contiguous else x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x, stats, weight, bias, None if residual is None else dense_like(residual, x), mask


def _normalization(stats: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> Callable[..., Tensor]:
    """`normalize` without the update of the running statistics, as a function of x and the residual."""
    weight, bias = recompute.copy_of(weight), recompute.copy_of(bias)

    def normalize(x: Tensor, residual: Tensor | None) -> Tensor:
        return ops.normalize(x, stats, weight, bias, residual, *NOTHING_TRACKED, None, options.unbiased, *options.epilogue)[0]

    return normalize
