"""`sync_batch_norm` and its autograd function: the one place where ops and communicator meet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.overrides import handle_torch_function, has_torch_function

from . import checkpoint, ops, recompute
from .activation import Activation, activate, keeps_mask, keeps_residual, parse
from .arguments import check, check_count, check_memory, check_transforms, plain
from .comm import Communicator, resolve
from .comm.exchange import NO_TICKET, Exchange
from .comm.identity import LayerRecord
from .double_backward import differentiable_backward
from .layout import dense, dense_like
from .moments import acc_type, update_running_stats

WEIGHTINGS = ("samples", "ranks")


class Options(NamedTuple):
    """What a layer is told apart from its tensors."""

    momentum: float | None = 0.1
    eps: float = 1e-5
    activation: str | None = None
    negative_slope: float = 0.01
    weighting: str = "samples"
    unbiased: bool = True
    name: str = "sync_batch_norm"  # in logs and profiles
    layer: str = "sync_batch_norm"  # in messages: `comm.identity.description_of`

    @property
    def fused(self) -> Activation:
        """The activation by its number in the ops."""
        return parse(self.activation)

    @property
    def rank_weighted(self) -> bool:
        return self.weighting == "ranks"

    def checked(self) -> Options:
        """self, or ValueError."""
        try:
            parse(self.activation)
        except ValueError as error:
            raise ValueError(f"{self.layer}: {error}") from None
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"{self.layer}: weighting must be one of {WEIGHTINGS}, got {self.weighting!r}")
        if not self.eps >= 0:  # nor NaN
            raise ValueError(f"{self.layer}: eps must not be negative, got {self.eps}")
        return self


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
        activation = options.fused
        ticket = NO_TICKET
        stats = checkpoint.replay(options.layer, x.shape[1])
        if stats is not None or checkpoint.is_recomputation():
            running_mean = running_var = num_batches_tracked = None  # the forward pass has updated them
        if stats is None:
            shifted = exchange.merges(x)
            ticket = exchange.ticket(x, "forward", 2 * x.shape[1] + 2)
            stats = exchange.all_reduce_stats_(ops.stats(x, options.rank_weighted, shifted, ticket.tag), x.shape[1], shifted)
        checkpoint.record(options.layer, stats)
        check_count(options.layer, stats, x, exchange.comm)
        if torch.compiler.is_compiling():
            # As an op of its own: normalize can then be computed again in the backward pass, as checkpoints do.
            update_running_stats(stats, running_mean, running_var, num_batches_tracked, options.momentum, options.unbiased)
            running_mean = running_var = num_batches_tracked = None
        y, mask = ops.normalize(
            x, stats, weight, bias, residual,
            running_mean, running_var, num_batches_tracked, options.momentum,
            options.eps, options.unbiased, activation, options.negative_slope, *ticket,
        )  # fmt: skip
        _changed(running_mean, running_var, num_batches_tracked)
        if recompute.is_active():
            recompute.remember(y, _normalization(stats, weight, bias, options), x, residual)

        ctx.has_residual = residual is not None
        kept_residual = residual if keeps_residual(activation, ctx.has_residual) else None
        kept_mask = mask if keeps_mask(activation, ctx.has_residual) else None
        ctx.save_for_backward(x, stats, weight, bias, kept_residual, kept_mask)
        ctx.exchange, ctx.options = exchange, options
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, stats, weight, bias, residual, mask = ctx.saved_tensors
        options: Options = ctx.options
        activation = options.fused
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            grads = differentiable_backward(
                dy, x, stats, weight, bias, residual, mask,
                ctx.exchange, options.eps, activation, options.negative_slope, options.rank_weighted,
            )  # fmt: skip
            return *(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)), *[None] * 6
        dy = dense_like(dy, x)

        how = (weight, bias, residual, mask, options.eps, activation, options.negative_slope)
        ticket = ctx.exchange.ticket(x, "backward", 2 * x.shape[1])
        sums, dweight, dbias = ops.backward_reduce(dy, x, stats, *how, ticket.tag)
        sums = ctx.exchange.all_reduce_(sums, "backward")
        dx: Tensor | None = None
        dz = dy if ctx.has_residual else None
        needs_dz = ctx.needs_input_grad[1] and activation != Activation.none
        if ctx.needs_input_grad[0] or needs_dz:
            dx, written = ops.backward_input(dy, x, stats, sums, *how, options.rank_weighted, *ticket)
            dz = written if needs_dz else dz
        return (
            dx if ctx.needs_input_grad[0] else None,
            dz,
            None if weight is None else dweight,
            None if bias is None else dbias,
            *[None] * 6,
        )


def _normalization(stats: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> Callable[..., Tensor]:
    """normalize, as a function of x and the residual, that moves no running statistics."""
    weight, bias = _copy(weight), _copy(bias)

    def normalize(x: Tensor, residual: Tensor | None) -> Tensor:
        return ops.normalize(
            x, stats, weight, bias, residual, None, None, None, None,
            options.eps, options.unbiased, options.fused, options.negative_slope,
        )[0]  # fmt: skip

    return normalize


def _copy(parameter: Tensor | None) -> Tensor | None:
    """An optimizer, or FSDP, may change the parameter before an output is computed again."""
    return None if parameter is None else parameter.detach().clone()


def _changed(*buffers: Tensor | None) -> None:
    """Tells autograd that these were written, as torch's own in-place operations do: who has saved one for a backward pass gets an
    error there, not a gradient by other values. The compiled ops do not."""
    counting = [t for t in buffers if t is not None and not t.is_inference()]
    if counting:
        increment_version(counting)


# A leaf that requires a gradient, so that a layer without parameters, or with frozen ones, enters its backward collective on a rank
# whose input needs no gradient, too.
_ANCHOR = torch.empty(0, requires_grad=True)


def train_batch_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    comm: Communicator,
    options: Options,
    record: LayerRecord | None = None,
) -> Tensor:
    """Normalizes by the statistics of the batch of all ranks in `comm`, and updates the running statistics in place.

    `record` is the layer's, if there is one."""
    tensors = (input, residual, weight, bias, running_mean, running_var, num_batches_tracked)
    if not torch.compiler.is_compiling() and has_torch_function(tensors):
        # As every function of torch's: the tensors' classes run it on plain ones, and make what it returns theirs.
        return handle_torch_function(_on_plain_tensors, tensors, tensors, comm, options, record)
    check(options.layer, *tensors)
    check_transforms(options.layer, input)
    if not options.eps > 0:
        raise ValueError(f"{options.layer}: eps must be positive in training, got {options.eps}")
    check_memory(options.layer, *tensors)
    # Here, where autograd sees it: what the function saves must be its own inputs to have a second derivative.
    input = dense(input)
    residual = None if residual is None else dense_like(residual, input)
    learns = (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    anchor = _ANCHOR if comm.world_size > 1 and not learns else None
    shape = None if torch.compiler.is_compiling() else input.shape
    exchange = Exchange(comm, options.name, input.dtype, options.weighting, options.eps, record, shape)
    return SyncBatchNormFunction.apply(
        input, residual, weight, bias, anchor, running_mean, running_var, num_batches_tracked, exchange, options
    )


def _on_plain_tensors(tensors: tuple[Tensor | None, ...], comm: Communicator, options: Options, record: LayerRecord | None) -> Tensor:
    input, residual, weight, bias, running_mean, running_var, num_batches_tracked = map(plain, tensors)
    assert input is not None
    return train_batch_norm(input, residual, weight, bias, running_mean, running_var, num_batches_tracked, comm, options, record)


def eval_batch_norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    options: Options,
) -> Tensor:
    """Normalizes by the running statistics. Never communicates; plain torch, so that it exports."""
    check(options.layer, input, residual, weight, bias, running_mean, running_var, None)
    saves = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias))
    if saves and not torch.compiler.is_exporting():
        # What autograd saves must stay: a training step may come before the backward pass.
        running_mean, running_var = running_mean.clone(), running_var.clone()
    if any(t is not None and t.dtype != input.dtype for t in (running_mean, running_var, weight, bias)):
        # torch wants the four of one type: the input's, or float32 for 16 bits.
        dtype = acc_type(input.dtype)
        running_mean, running_var = running_mean.to(dtype), running_var.to(dtype)
        weight, bias = None if weight is None else weight.to(dtype), None if bias is None else bias.to(dtype)
    y = _evaluated(running_mean, running_var, weight, bias, options, input, residual)
    if saves and recompute.is_active():
        parameters = _copy(weight), _copy(bias)
        recompute.remember(y, partial(_evaluated, running_mean, running_var, *parameters, options), input, residual)
    return y


def _evaluated(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
    input: Tensor,
    residual: Tensor | None,
) -> Tensor:
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training=False, eps=options.eps)
    if residual is not None:
        y = y + residual
    return activate(y, options.fused, options.negative_slope)


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    process_group: Any = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    weighting: str = "samples",
    unbiased: bool = True,
) -> Tensor:
    """`torch.nn.functional.batch_norm` over the batch of all ranks, with residual and activation fused.

        y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)

    Args:
        input: this rank's x [N, C, *], 2 to 5 or more dimensions, floating point; N may differ by rank and be 0.
        running_mean, running_var: [C], updated in place while training: running += momentum * (new - running). Both None or both given.
        weight, bias: [C], of the input's type, float32 or float64; None for 1 and 0.
        training: normalize by the batch and update the running statistics; else by the running statistics, without communication.
        momentum: a number; the cumulative average, None, needs a layer, which counts its batches.
        process_group: None (the default group if there is one, else this process alone), a ProcessGroup, a one-dimensional
            DeviceMesh, or an mpi4py communicator.
        residual: [N, C, *] of the input's shape and type, added before the activation.
        activation: None, "relu", "leaky_relu" (with `negative_slope`) or "silu".
        weighting: "samples", the statistic of the whole batch; or "ranks", where each rank weighs the same whatever its batch, as in
            Horovod's TensorFlow layer.
        unbiased: the running variance is var * n / (n - 1), as in torch; False keeps the biased one, as Keras and Horovod do.

    Returns:
        y [N, C, *] of the input's type and memory format.

    The ranks compare what they exchange only with SYNCBN_CHECK=always: a function has no first time, as a layer has.

    Raises:
        ValueError: an argument has the wrong shape, type or device, or eps is not positive (before any collective); or each channel has
            a single value over all ranks while training (on every rank).

    >>> running_mean, running_var = torch.zeros(4), torch.ones(4)
    >>> y = sync_batch_norm(torch.randn(8, 4, 2, 2) + 5, running_mean, running_var, activation="relu")
    >>> y.shape, bool((y >= 0).all()), bool((running_mean > 0.3).all())
    (torch.Size([8, 4, 2, 2]), True, True)
    """
    options = Options(momentum, eps, activation, negative_slope, weighting, unbiased).checked()
    if momentum is None:
        raise ValueError(
            "sync_batch_norm: momentum must be a number: for the cumulative average use SyncBatchNorm, which counts its batches"
        )
    if training:
        comm = resolve(process_group)
        return train_batch_norm(input, residual, weight, bias, running_mean, running_var, None, comm, options)
    if running_mean is None or running_var is None:
        raise ValueError("sync_batch_norm: running_mean and running_var must be given when training is False")
    return eval_batch_norm(input, residual, weight, bias, running_mean, running_var, options)
