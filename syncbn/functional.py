"""Batch normalization as functions of tensors: `sync_batch_norm`, and the two that layers call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import ops, recompute, reference
from ._torch_private import eager_apply
from .activation import Activation, activate
from .arguments import Tensors, check, check_count, check_eager, check_memory, check_transforms, explain, plain
from .autograd import NOTHING_TRACKED, Running, SyncBatchNormFunction
from .comm import LOCAL, Communicator, resolve
from .comm.exchange import UNSYNCHRONIZED, LayerExchanges
from .comm.identity import LayerRecord
from .layout import dense, dense_like
from .moments import acc_type
from .options import Epilogue, Options, options_of

# A leaf that requires a gradient. With it, a layer that has no trainable parameters still joins the backward exchange, even on a rank
# whose input requires none.
_ANCHOR = torch.empty(0, requires_grad=True)

_eager_apply = eager_apply(SyncBatchNormFunction)


def batch_norm_train(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running,
    comm: Communicator,
    options: Options,
    record: LayerRecord | None = None,
) -> Tensor:
    """Normalizes by the statistics of the batch of all ranks in `comm`, and updates the running statistics in place.

    Before an exchange all tensors are checked here. `record` is what this rank remembers of the layer's earlier exchanges; it is None for
    a function call, for a single process and in a compiled graph.

    Raises:
        TypeError, ValueError, NotImplementedError: see arguments.py; or eps is not positive. Raised before any exchange.
        ValueError: each channel has a single value over all ranks. Raised on every rank.
    """
    tensors = (input, residual, weight, bias, *running)
    if torch.compiler.is_compiling():
        check(options.layer, tensors)
        return _step(SyncBatchNormFunction.apply, tensors, comm, options, record, False)
    if has_torch_function(tensors):
        # As torch's own functions do: unwrap the subclass, run on plain tensors, wrap the result.
        return handle_torch_function(_with_torch_function, tensors, tensors, comm, options, record)
    check_transforms(options.layer, input)
    # A single process keeps no other rank waiting, so it leaves the checks to the ops: here they cost the host as much as an op. It checks
    # everything if no op would refuse wrong tensors, or if there is a residual, because `dense_like` would broadcast one of a wrong shape;
    # else only the memory of an input that `_step` copies before any op.
    if comm is not LOCAL or residual is not None or not ops.refuse_wrong_tensors(input):
        check_eager(options.layer, tensors)
        return _step(_eager_apply, tensors, comm, options, record, False)
    if not input.is_contiguous():
        check_memory(options.layer, input)
    try:
        return _step(_eager_apply, tensors, comm, options, record, True)
    except Exception:
        explain(options.layer, tensors)
        raise


def _step(
    apply: Callable[..., Tensor], tensors: Tensors, comm: Communicator, options: Options, record: LayerRecord | None, in_one_call: bool
) -> Tensor:
    """One training step. `apply` calls the autograd function. `in_one_call` says that the forward pass is one op."""
    input, residual, weight, bias, *running = tensors
    eps = options.epilogue.eps
    if not eps > 0:
        raise ValueError(f"{options.layer}: eps must be positive in training, got {eps}")
    # The copy is made here, where autograd records it: only inputs of the autograd function can be differentiated a second time.
    if not input.is_contiguous():
        input = dense(input)
    if residual is not None:
        residual = dense_like(residual, input)
    if comm is LOCAL and torch.jit.is_tracing():
        return _traced(input, residual, weight, bias, (running[0], running[1], running[2]), options)
    if comm is LOCAL:
        exchange, anchor = UNSYNCHRONIZED, None
    else:
        shape = None if torch.compiler.is_compiling() else input.shape
        exchange = LayerExchanges(comm, options.name, input.dtype, options.weighting, eps, record, shape)
        has_trainable = (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
        anchor = None if has_trainable else _ANCHOR
    return apply(input, residual, weight, bias, anchor, *running, exchange, options, in_one_call)


def _traced(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, running: Running, options: Options
) -> Tensor:
    """A step of a single process for torch.jit: by the reference, which autograd differentiates. A graph of the autograd function would
    contain the op inside it as well, and each would move the statistics."""
    stats = reference.stats(input, options.rank_weighted, True)
    if input.numel() <= input.shape[1]:
        check_count(options.layer, stats, input, LOCAL)
    reference.update_running_stats(stats.detach(), *running, options.momentum, options.unbiased)
    return reference.normalize(input, stats, weight, bias, residual, *NOTHING_TRACKED, None, options.unbiased, *options.epilogue)[0]


def _with_torch_function(tensors: Tensors, comm: Communicator, options: Options, record: LayerRecord | None) -> Tensor:
    """What torch calls for an active mode, such as the default device's, and then for the tensors' class. Only the second call unwraps the
    tensors."""
    input, residual, weight, bias, mean, var, num_batches = tensors if has_torch_function(tensors) else map(plain, tensors)
    assert input is not None
    return batch_norm_train(input, residual, weight, bias, (mean, var, num_batches), comm, options, record)


def batch_norm_eval(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    options: Options,
) -> Tensor:
    """Normalizes by the running statistics, without an exchange. Plain torch, so that it exports. Raises the errors of `check`."""
    check(options.layer, (input, residual, weight, bias, running_mean, running_var, None))
    saves = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias))
    if saves := saves and not (torch.compiler.is_exporting() or torch.jit.is_tracing()):  # whose graphs need no copies
        # Copies, because a training step may update the statistics before the backward pass.
        running_mean, running_var = running_mean.clone(), running_var.clone()
    if any(t is not None and t.dtype != input.dtype for t in (running_mean, running_var, weight, bias)):
        # torch requires all four to have the same dtype: the input's, or float32 for a 16-bit input.
        dtype = acc_type(input.dtype)
        running_mean, running_var = running_mean.to(dtype), running_var.to(dtype)
        weight, bias = None if weight is None else weight.to(dtype), None if bias is None else bias.to(dtype)
    epilogue = options.epilogue
    linear = Epilogue(epilogue.eps, Activation.none, epilogue.negative_slope)
    remembers = saves and not torch.compiler.is_compiling() and recompute.is_active()
    with recompute.saving() if remembers else nullcontext(()) as saved:
        z = _evaluated(running_mean, running_var, weight, bias, linear, input, residual)
        y = activate(z, epilogue.activation, epilogue.negative_slope)
    node: Any = y.grad_fn if remembers else None
    if node is not None:  # there is none in torch.vmap, nor in inference mode
        parameters = running_mean, running_var, recompute.copy_of(weight), recompute.copy_of(bias)
        outputs = [(z, linear)] if y is z else [(z, linear), (y, epilogue)]  # both, since some activations save z, others y
        node.metadata["syncbn"] = recipes = [
            recompute.remember(output, partial(_evaluated, *parameters, applied), input, residual, saved=saved)
            for output, applied in outputs
        ]
        node.register_prehook(lambda _: recipes.clear())  # they keep the input, which torch frees after the backward pass
    return y


def _evaluated(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epilogue: Epilogue,
    input: Tensor,
    residual: Tensor | None,
) -> Tensor:
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training=False, eps=epilogue.eps)
    if residual is not None:
        y = y + residual
    return activate(y, epilogue.activation, epilogue.negative_slope)


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
        input: this rank's x [N, C, *], at least 2 dimensions, floating point; N may differ by rank and be 0.
        running_mean, running_var: [C], updated in place while training: running += momentum * (new - running). Both None or both given.
        weight, bias: [C], float32, float64 or of the input's type; None means 1 and 0.
        training: normalize by the batch and update the running statistics; else by the running statistics, without communication.
        momentum: a number; the cumulative average, None, needs a layer, which counts its batches.
        process_group: None (a duplicate of the default group if there is one, else a single process), a ProcessGroup, a
            one-dimensional DeviceMesh, or an mpi4py communicator.
        residual: [N, C, *] of the input's shape and type, added before the activation.
        activation: None, "relu", "leaky_relu" (with `negative_slope`) or "silu".
        weighting: "samples", the statistic of the whole batch; or "ranks", in which the ranks have equal weight regardless of batch
            size, as in Horovod's TensorFlow layer.
        unbiased: the running variance is var * n / (n - 1), as in torch; False keeps the biased one, as Keras and Horovod do.

    Returns:
        y [N, C, *] of the input's type and memory format.

    The ranks verify every eager exchange of a function call. Over a group they compare whole signatures only with SYNCBN_CHECK=always:
    unlike a layer, a function call has no identity whose first exchange could be remembered.

    Raises:
        TypeError: the input is not float32, float64, float16 or bfloat16, or, while training, is a DTensor.
        NotImplementedError: while training, a transform of torch.func runs, or the input has a forward-mode tangent.
        ValueError: a tensor has the wrong shape, dtype or device, or another argument a value that is not allowed.
            This error and the two above are raised before any exchange.
        ValueError: while training, each channel has a single value over all ranks. Raised on every rank.
        RankMismatchError: the other ranks are about to exchange something else. Raised on every rank.
        RuntimeError: another rank has not come within the group's timeout.

    >>> running_mean, running_var = torch.zeros(4), torch.ones(4)
    >>> y = sync_batch_norm(torch.randn(8, 4, 2, 2) + 5, running_mean, running_var, activation="relu")
    >>> y.shape, bool((y >= 0).all()), bool((running_mean > 0.3).all())
    (torch.Size([8, 4, 2, 2]), True, True)
    """
    options = options_of(momentum, eps, activation, negative_slope, weighting, unbiased)
    if momentum is None:
        raise ValueError(
            "sync_batch_norm: momentum must be a number: for the cumulative average use SyncBatchNorm, which counts its batches"
        )
    if training:
        comm = resolve(process_group)
        return batch_norm_train(input, residual, weight, bias, (running_mean, running_var, None), comm, options)
    if running_mean is None or running_var is None:
        raise ValueError("sync_batch_norm: running_mean and running_var must be given when training is False")
    return batch_norm_eval(input, residual, weight, bias, running_mean, running_var, options)
