"""`update_bn_stats`: exact statistics for inference, in place of the moving averages that training leaves."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from . import ops
from .comm import resolve
from .exchange import Agreed, Exchange
from .keras import SyncBatchNormalization
from .layout import dense, samples_per_channel
from .reference import finalize


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

    They are those of one training step on the concatenation of all inputs, with momentum 1: each value counts once, in float64,
    whatever batch and rank it came in. The variance is biased where the layer's is. Equal bits on every rank.

    Args:
        model: its batch norms, plain or synchronized, that have running statistics. DistributedDataParallel is looked through.
        data_loader: this rank's batches. Their number may differ by rank; a rank, and a batch, may have nothing.
        num_iters: at most so many batches of each rank; None for all.
        process_group: the ranks, as in `SyncBatchNorm`. All of them call this.
        forward: (model, batch) -> anything, which runs the model. None calls it with the batch, or the first of a tuple or list, moved
            to the model's device.
        progress: a bar on rank 0, where tqdm is installed.

    Raises:
        ValueError: a lazy batch norm has not been built.

    How a batch norm normalizes meanwhile decides what those behind it see. Here each uses the statistics of the batch at hand on this
    rank alone, with the rest of the model in eval mode (no dropout). The statistics of the group would need the ranks to walk through
    their batches together, and one with fewer would leave the others waiting for ever; the moving statistics are what is to be
    replaced, and every deeper layer would inherit their error. So the result depends on the set of batches only, not on which rank has
    which, and the only exchange is one sum at the end. Take batches of at least the size that a group trains with: without gradients
    they fit. A batch with a single value per channel has no variance, and is normalized by the moving statistics.

    Everything else is left as found: training flags, momentum, num_batches_tracked, hooks; layers that no batch reached.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    >>> batches = torch.randn(10, 32, 4)
    >>> update_bn_stats(model, batches, progress=False)
    >>> torch.allclose(model[1].running_mean, model[0](batches).mean((0, 1)), atol=1e-6)
    True
    """
    comm = resolve(process_group)
    if isinstance(model, DistributedDataParallel):
        model = model.module  # the wrapper would broadcast buffers at each batch
    batch_norms = _with_running_stats(model)
    totals = [_empty_stats(module) for module in batch_norms]
    run = _call if forward is None else forward
    batches = _with_progress(itertools.islice(data_loader, num_iters), data_loader, num_iters, progress and comm.rank == 0)
    # Not compiled anew for this pass and its hooks; where nothing is compiled, asking for eager would load the compiler.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with torch.no_grad(), _observed(model, batch_norms, totals), eager:
        for batch in batches:
            run(model, batch)
    if totals:
        device = totals[0].device
        exchange = Exchange(comm, "update_bn_stats", torch.float64, "samples", 0.0, Agreed())
        summed = exchange.all_reduce_(torch.cat([total.to(device) for total in totals]), "statistics")
        for module, stats in zip(batch_norms, summed.split([len(total) for total in totals]), strict=True):
            _write(module, stats)


def _with_running_stats(model: nn.Module) -> list[_BatchNorm]:
    found = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            if is_lazy(module.running_mean):
                raise ValueError(f"{name or type(module).__name__} has not been built: run the model on one batch first")
            found.append(module)
    return found


def _empty_stats(module: _BatchNorm) -> Tensor:
    assert module.running_mean is not None
    return torch.zeros(2 * len(module.running_mean) + 1, dtype=torch.float64, device=module.running_mean.device)


@contextmanager
def _observed(model: nn.Module, batch_norms: list[_BatchNorm], totals: list[Tensor]) -> Iterator[None]:
    """Inside, each batch norm normalizes by its batch, without the other ranks, and adds its input's sums to its total.

    This is what torch's and this package's layers do in eval mode while they have no running statistics.
    """
    flags = {module: module.training for module in model.modules()}
    handles = [_observe(module, total) for module, total in zip(batch_norms, totals, strict=True)]
    try:
        model.eval()
        yield
    finally:
        for handle in itertools.chain.from_iterable(handles):
            handle.remove()
        for module, training in flags.items():
            module.training = training


def _observe(module: _BatchNorm, total: Tensor) -> list[Any]:
    keras = isinstance(module, SyncBatchNormalization)
    names = ("moving_mean", "moving_variance") if keras else ("running_mean", "running_var", "num_batches_tracked")
    buffers = {name: getattr(module, name) for name in names}

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x: Any = args[0] if args else kwargs.get("input", kwargs.get("inputs"))
        if isinstance(module, SyncBatchNormalization):
            args, kwargs = (x,), {}  # without training=True, which a model may pass
            x = module.channels_second(x)
        total.add_(ops.stats(dense(x), False))
        if samples_per_channel(x) != 1:
            for name in buffers:
                setattr(module, name, None)
        return args, kwargs

    def after(*_: Any) -> None:
        for name, buffer in buffers.items():
            setattr(module, name, buffer)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]


def _write(module: _BatchNorm, stats: Tensor) -> None:
    count = stats[-1].item()
    if count == 0:
        return
    mean, var, _ = finalize(stats, 0.0)
    if getattr(module, "unbiased", True):
        var = var * count / max(count - 1, 1)
    assert module.running_mean is not None and module.running_var is not None
    module.running_mean.copy_(mean)
    module.running_var.copy_(var)


def _call(model: nn.Module, batch: Any) -> None:
    x = batch[0] if isinstance(batch, (tuple, list)) else batch
    tensor = next(itertools.chain(model.parameters(), model.buffers()), x)
    model(x.to(tensor.device))


def _with_progress(batches: Iterable[Any], data_loader: Any, num_iters: int | None, show: bool) -> Iterable[Any]:
    if not show:
        return batches
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return batches
    sizes = [size for size in (num_iters, operator.length_hint(data_loader) or None) if size is not None]
    return tqdm(batches, desc="batch norm statistics", total=min(sizes, default=None), unit="batch")
