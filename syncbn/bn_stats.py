"""`update_bn_stats`: exact statistics for inference, to replace the moving averages left by training."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from . import ops
from ._torch_private import _BatchNorm, is_compiler_loaded
from .comm import Communicator, resolve
from .comm.agreement import RankMismatchError
from .comm.exchange import LayerExchanges
from .comm.identity import LayerRecord
from .keras import SyncBatchNormalization
from .layout import dense, samples_per_channel
from .moments import channels_of, finalize, merge, parts, rebase, stats_numel
from .surgery.freeze import Frozen


def update_bn_stats(
    model: nn.Module,
    data_loader: Iterable[Any],
    num_iters: int | None = None,
    *,
    process_group: Any = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = True,
) -> None:
    """Sets every batch norm's running statistics to the mean and variance of its input over all given batches of all ranks.

    The result equals one training step on the concatenated inputs with momentum 1: every value counts once, in float64, whatever its
    batch and its rank. The variance is biased if the layer's is. All ranks get bitwise identical statistics.

    Args:
        model: every batch norm in it that has running statistics is updated, plain or synchronized, unless `freeze_bn` has frozen it
            or its `trainable` is False. DistributedDataParallel is unwrapped.
        data_loader: this rank's batches. Their number may differ by rank, and be 0; a batch may be empty.
        num_iters: the maximum number of batches per rank; None for all.
        process_group: the ranks, as in `SyncBatchNorm`. Each of them has to call this function.
        forward: (model, batch) -> anything, which runs the model. None calls the model with the batch, or with the first element of a
            tuple or list, moved to the model's device.
        progress: show a bar on rank 0, if tqdm is installed and stderr is a terminal.

    Raises:
        ValueError: a lazy batch norm has not been built.
        TypeError: a batch is neither a tensor nor a tuple or list that begins with one, and there is no `forward`.
        RankMismatchError: the other ranks are about to exchange something else; raised on every rank.
        RuntimeError: another rank has not called this within the group's timeout.

    Warns if the model has no running statistics to update, or if no rank has a batch; then nothing changes.

    During this pass each batch norm to be updated normalizes by this rank's current batch, and the rest of the model is in eval
    mode (no dropout). Two other ways are worse. If a layer normalized by the statistics of the group, the ranks would have to step through
    their batches together, and a rank with fewer batches would keep the others waiting. If it normalized by the moving statistics,
    which are about to be replaced, every deeper layer would inherit their error. As it is, the result depends only on the set of batches,
    not on how they are divided among the ranks, and the only exchanges are two sums at the end. Use batches at least as large as those of
    all ranks together in training: without gradients they fit in memory. A batch with a single value per channel has no variance and is
    normalized by the moving statistics.

    Nothing else changes: training flags, momentum, num_batches_tracked, hooks, and layers that no batch reached stay as they are. After
    an error or Ctrl-C either all layers have new statistics or none has.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    >>> batches = torch.randn(10, 32, 4)
    >>> update_bn_stats(model, batches, progress=False)
    >>> torch.allclose(model[1].running_mean, model[0](batches).mean((0, 1)), atol=1e-6)
    True
    """
    comm = resolve(process_group)
    if isinstance(model, DistributedDataParallel):
        model = model.module  # the wrapper would broadcast the buffers at every batch
    batch_norms = _with_running_stats(model)
    if not batch_norms:
        warnings.warn(
            f"update_bn_stats: {type(model).__name__} has no batch norm with running statistics, or all are frozen: nothing to do",
            stacklevel=2,
        )
        return
    totals = [_empty_stats(module) for module in batch_norms]
    run = _call if forward is None else forward
    batches = _with_progress(itertools.islice(data_loader, num_iters), data_loader, num_iters, progress and comm.rank == 0)
    observation = _Observation(model, batch_norms, totals)
    try:
        try:
            observation.begin()
            for batch in batches:
                run(model, batch)
        finally:
            observation.end()
    finally:
        observation.end()  # again, because Ctrl-C may have interrupted the first call
    pairs = [pair for module, stats in zip(batch_norms, _over_ranks(totals, comm), strict=True) for pair in _new_statistics(module, stats)]
    if not pairs:
        warnings.warn("update_bn_stats: no rank had a batch that reached a batch norm: no statistics have changed", stacklevel=2)
    try:
        _copy(pairs)
    except BaseException:
        _copy(pairs)  # Ctrl-C may have interrupted the loop between two layers
        raise


def _with_running_stats(model: nn.Module) -> list[_BatchNorm]:
    batch_norms = []
    for name, module in model.named_modules():
        is_frozen = isinstance(module, Frozen) or (isinstance(module, SyncBatchNormalization) and not module.trainable)
        if isinstance(module, _BatchNorm) and module.running_mean is not None and not is_frozen:
            if is_lazy(module.running_mean):
                raise ValueError(f"{name or type(module).__name__} has not been built: run the model on one batch first")
            batch_norms.append(module)
    return batch_norms


def _empty_stats(module: _BatchNorm) -> Tensor:
    assert module.running_mean is not None
    return torch.zeros(stats_numel(len(module.running_mean)), dtype=torch.float64, device=module.running_mean.device)


class _Observation:
    """From `begin` to `end` each batch norm normalizes by this rank's batch and adds the sums of its input to its total.

    In eval mode, torch's and this package's layers normalize by the batch while they have no running statistics, so this class takes
    the running statistics away during each call. Gradients and compilation are off. `end` may be called again.
    """

    def __init__(self, model: nn.Module, batch_norms: list[_BatchNorm], totals: list[Tensor]) -> None:
        self.model = model
        self.totals = totals
        self.flags = {module: module.training for module in model.modules()}
        self.buffers = {module: {name: getattr(module, name) for name in _buffer_names(module)} for module in batch_norms}
        self.handles: list[Any] = []
        self.grad = torch.is_grad_enabled()
        self.stance: Any = None
        self.active = False

    def begin(self) -> None:
        self.active = True
        for module, total in zip(self.buffers, self.totals, strict=True):
            self._observe(module, total)
        # Compiled layers run eagerly here: with these hooks they would be recompiled. If Dynamo was never imported, no layer is compiled.
        if is_compiler_loaded():
            self.stance = torch.compiler.set_stance("force_eager")
        torch.set_grad_enabled(False)
        self.model.eval()

    def end(self) -> None:
        self.active = False
        for module in self.buffers:
            self._restore_buffers(module)
        for each, training in self.flags.items():
            each.training = training
        torch.set_grad_enabled(self.grad)
        if self.stance is not None:
            self.stance.__exit__(None, None, None)
        for handle in self.handles:
            handle.remove()

    def _restore_buffers(self, module: _BatchNorm) -> None:
        for name, buffer in self.buffers[module].items():
            setattr(module, name, buffer)

    def _observe(self, module: _BatchNorm, total: Tensor) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x: Any = args[0] if args else kwargs.get("input", kwargs.get("inputs"))
            if isinstance(module, SyncBatchNormalization):
                args, kwargs = (x,), {}  # drop training=True, which the model may pass
                x = module.channels_second(x)
            if self.active:  # False if Ctrl-C arrived before this hook's handle was in the list
                total.copy_(merge(total, ops.stats(dense(x), False, True)))
                if samples_per_channel(x) != 1:
                    for name in self.buffers[module]:
                        setattr(module, name, None)
            return args, kwargs

        # The restoring hook comes first, because Ctrl-C between the two lines must not leave only the other one.
        self.handles.append(module.register_forward_hook(lambda *_: self._restore_buffers(module), always_call=True))
        self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))


def _buffer_names(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, SyncBatchNormalization):
        return "moving_mean", "moving_variance"
    return "running_mean", "running_var", "num_batches_tracked"


def _over_ranks(totals: list[Tensor], comm: Communicator) -> list[Tensor]:
    """Each layer's statistics over the batches of all ranks, by two exchanges. The first gives the means, which become every rank's
    shift, so that no digits cancel; the second sums about them."""
    exchange = LayerExchanges(comm, "update_bn_stats", torch.float64, "samples", 0.0, LayerRecord(name="update_bn_stats"))
    totals = [total.to(totals[0].device) for total in totals]
    about_zero = _summed(totals, [total.new_zeros(channels_of(total)) for total in totals], exchange)
    return _summed(totals, [finalize(total, 0.0)[0] for total in about_zero], exchange)


def _summed(totals: list[Tensor], shifts: list[Tensor], exchange: LayerExchanges) -> list[Tensor]:
    """The totals of all ranks about these shifts, in one exchange."""
    sums = [rebase(total, shift)[len(shift) :] for total, shift in zip(totals, shifts, strict=True)]
    try:
        summed = exchange.sum(torch.cat(sums), "statistics")
    except RankMismatchError:
        raise
    except RuntimeError as error:
        raise RuntimeError(f"update_bn_stats: every rank of the group has to call it, even one without batches ({error})") from error
    return [torch.cat(pair) for pair in zip(shifts, summed.split([len(part) for part in sums]), strict=True)]


def _new_statistics(module: _BatchNorm, stats: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(running statistic, its new value) for the mean and the variance; empty if no batch has reached the layer."""
    count = parts(stats).samples.item()
    if count == 0:
        return []
    mean, var, _ = finalize(stats, 0.0)
    if getattr(module, "unbiased", True):
        var = var * count / max(count - 1, 1)
    assert module.running_mean is not None and module.running_var is not None
    return [(module.running_mean, mean), (module.running_var, var)]


@torch.no_grad()
def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for running, value in pairs:
        running.copy_(value)


def _call(model: nn.Module, batch: Any) -> None:
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not hasattr(x, "to"):
        kind = type(x).__name__ if x is batch else f"{type(batch).__name__} that begins with a {type(x).__name__}"
        use = f"model(batch[{next(iter(batch))!r}])" if isinstance(batch, Mapping) and batch else "..."
        raise TypeError(f"update_bn_stats: a batch is a {kind}, not a tensor: pass forward=lambda model, batch: {use}")
    tensor = next(itertools.chain(model.parameters(), model.buffers()), x)
    model(x.to(tensor.device))


def _with_progress(batches: Iterable[Any], data_loader: Any, num_iters: int | None, show: bool) -> Iterable[Any]:
    if not show:
        return batches
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return batches
    total = operator.length_hint(data_loader) or None
    if num_iters is not None:
        total = num_iters if total is None else min(num_iters, total)
    # disable=None shows the bar only if stderr is a terminal.
    return tqdm(batches, desc="batch norm statistics", total=total, unit="batch", disable=None)
