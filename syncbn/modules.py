"""`SyncBatchNorm`: the module. It decides between training and eval and holds parameters and buffers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from ._torch_private import _BatchNorm, forget_compiled, tensors_of
from .autograd import NOTHING_TRACKED
from .comm import LOCAL, check_type, resolve
from .comm.identity import description_of, record_of
from .comm.recorded import RecordedCommunicator
from .functional import batch_norm_eval, batch_norm_train
from .guards import check_activation, check_group_can_be_pickled, check_no_other_converter
from .keras_weights import copy_tensors, named_tensors, to_keras
from .options import Options, options_of
from .surgery.record import Conversion, groups_of
from .surgery.trace import record_in_fx_graph

if TYPE_CHECKING:
    from typing import Self

_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class SyncBatchNorm(_BatchNorm):
    """Batch normalization over the batches of all ranks of a process group.

        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    However x is split over the ranks, outputs, moving statistics and gradients of x are those of `torch.nn.BatchNorm*d` on the
    concatenated batch, and the ranks' gradients of weight and bias add up to its gradients. In a single process, or in a group of one rank,
    this is plain batch normalization. Eval mode never communicates.

    Args:
        num_features: C, the size of dimension 1.
        eps: added to the variance.
        momentum: running += momentum * (new - running); None for the cumulative average.
        affine: learn weight and bias, both [C].
        track_running_stats: keep running_mean and running_var; else eval mode normalizes by this rank's batch.
        process_group: None (a duplicate of the default group if torch.distributed runs, else a single process), a ProcessGroup,
            a one-dimensional DeviceMesh, or an mpi4py communicator.
        device, dtype: of parameters and buffers.
        bias: learn the bias, if affine.
        activation: None, "relu", "leaky_relu" or "silu", applied to the output; in training by the layer's own kernels.
        negative_slope: of leaky_relu.
        weighting: "samples" for the statistic of the whole batch; "ranks" gives all ranks equal weight, as Horovod's TensorFlow
            layer does.
        unbiased: running_var takes var * n / (n - 1), as in torch; False takes var, as Keras and Horovod do.

    Shape:
        input, residual, output: [N, C] or [N, C, *], float32, float64, float16 or bfloat16, any memory format. N may differ by rank
        and be 0.

    Raises:
        ValueError: an unknown activation, weighting or process_group; an input that does not fit; a training step with a group that
            this rank is not a member of; a single value per channel over all ranks while training (raised on every rank).

    The state dict is that of `torch.nn.BatchNorm*d`. `SyncBatchNorm1d`, `2d` and `3d` are this layer for code that
    tests for torch's classes.

    >>> layer = SyncBatchNorm(8, activation="relu")
    >>> layer(torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """

    # The class sets these, because no __init__ runs when a module is converted.
    process_group: Any = None
    activation: str | None = None
    negative_slope: float = 0.01
    weighting: str = "samples"
    unbiased: bool = True
    layer_name: str | None = None  # the dotted name in the model, for messages
    _conversion: Conversion | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        weighting: str = "samples",
        unbiased: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.process_group = process_group
        self.activation = activation
        self.negative_slope = negative_slope
        self.weighting = weighting
        self.unbiased = unbiased
        self._options(momentum)
        check_type(process_group)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalizes by the batch of all ranks while training, by the running statistics in eval mode.

        Args:
            input: [N, C] or [N, C, *]. N may differ by rank and be 0.
            residual: a tensor of the input's shape, dtype and device, which is added before the activation; None adds nothing.

        Returns:
            a tensor of the input's shape, dtype and memory format.

        Raises:
            TypeError: the input is not float32, float64, float16 or bfloat16, or, while training, is a DTensor.
            ValueError: a tensor does not fit; while training, a single value per channel over all ranks (raised on every rank).
            NotImplementedError: while training, a transform of torch.func runs, or the input has a forward-mode tangent.
            RankMismatchError: the other ranks are about to exchange something else; raised on every rank.
            RuntimeError: another rank has not come within the group's timeout.
        """
        if type(input) is not Tensor and isinstance(input, torch.fx.Proxy):
            return record_in_fx_graph(self, input, residual)
        try:
            self._check_input_dim(input)
        except ValueError as error:  # torch's message does not name the layer
            raise ValueError(f"{description_of(self)}: {error}") from None
        return self._batch_norm(input, residual, self.training)

    def _batch_norm(self, input: Tensor, residual: Tensor | None, training: bool) -> Tensor:
        """The output for an input [N, C, *], normalized by the batch if `training` is true, else as in eval mode."""
        options = self._options(self.momentum)
        if input.dim() >= 2 and input.shape[1] != self.num_features:
            raise ValueError(
                f"{options.layer}: input must have {self.num_features} channels in dimension 1 (num_features), got {list(input.shape)}"
            )
        weight, bias, running_mean, running_var, num_batches_tracked = tensors_of(self, _TENSORS)
        if not training and running_mean is not None and running_var is not None:
            return batch_norm_eval(input, residual, weight, bias, running_mean, running_var, options)
        # Without running statistics eval mode uses this rank's batch, as torch does.
        try:
            comm = resolve(self.process_group) if training else LOCAL
        except ValueError as error:
            raise type(error)(f"{options.layer}: {error}") from None
        # A cumulative average needs the count: without it torch leaves the statistics as they are, too.
        tracked = self.track_running_stats and not (num_batches_tracked is None and options.momentum is None)
        running = (running_mean, running_var, num_batches_tracked) if tracked else NOTHING_TRACKED
        record = None if comm is LOCAL or torch.compiler.is_compiling() else record_of(self)
        return batch_norm_train(input, residual, weight, bias, running, comm, options, record)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None, *, fuse_activation: bool = False) -> nn.Module:
        """`syncbn.convert_sync_batchnorm`, where torch's users look for it."""
        from .surgery.convert import convert_sync_batchnorm

        return convert_sync_batchnorm(module, process_group, fuse_activation=fuse_activation)

    @classmethod
    def from_keras(
        cls,
        weights: Mapping[str, Any] | Sequence[Any],
        decay: float = 0.99,
        epsilon: float = 1e-3,
        *,
        center: bool = True,
        scale: bool = True,
        **options: Any,
    ) -> Self:
        """The layer that continues from a Keras batch normalization: same outputs, and same moving statistics from here on.

        Args:
            weights: gamma, beta, moving_mean, moving_variance as a dict of arrays, or the list that Keras' `layer.get_weights()` returns.
            decay: Keras' momentum: running += (1 - decay) * (new - running).
            epsilon: Keras' epsilon.
            center, scale: those of the Keras layer. If one is False, the list has no beta or no gamma. A dict shows this by its names.
            options: further ones of this class; in a `SyncBatchNorm`, `unbiased` is False unless given, as in Keras.

        Raises:
            ValueError: an array is missing or has another length than the others.

        >>> layer = SyncBatchNorm.from_keras([[1.0, 2.0], [0.0, 0.0], [5.0, 5.0], [1.0, 4.0]], decay=0.75)
        >>> layer.momentum, layer.eps, layer.running_var
        (0.25, 0.001, tensor([1., 4.]))
        """
        tensors = named_tensors(weights, center, scale)
        layer = cls._with_tensors(tensors, decay, epsilon, {"dtype": tensors["moving_mean"].dtype, **options})
        copy_tensors(layer, tensors)
        return layer

    @classmethod
    def _with_tensors(cls, tensors: Mapping[str, Tensor], decay: float, epsilon: float, options: dict[str, Any]) -> Self:
        """A layer of the size of Keras' `tensors`, whose values are yet to be copied."""
        affine = "gamma" in tensors or "beta" in tensors
        return cls(len(tensors["moving_mean"]), epsilon, 1 - decay, affine, **{"unbiased": False, **options})

    def to_keras(self) -> dict[str, Any]:
        """gamma, beta, moving_mean, moving_variance as numpy arrays, those that the layer has, in the order of Keras'
        `layer.set_weights(list(weights.values()))`. The Keras layer needs epsilon = self.eps and momentum = 1 - self.momentum; a
        `SyncBatchNormalization` has Keras' momentum itself.

        >>> [(name, array.shape) for name, array in SyncBatchNorm(3).to_keras().items()]
        [('gamma', (3,)), ('beta', (3,)), ('moving_mean', (3,)), ('moving_variance', (3,))]
        """
        return to_keras(self)

    def _options(self, momentum: float | None) -> Options:
        return options_of(
            momentum,
            self.eps,
            self.activation,
            self.negative_slope,
            self.weighting,
            self.unbiased,
            (self.layer_name, type(self).__name__, self.num_features),
        )

    def _check_input_dim(self, input: Tensor) -> None:
        """Accepts everything. `arguments.py` or the ops refuse an input of fewer than 2 dimensions."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation":
            check_activation(value)
        super().__setattr__(name, value)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        check_no_other_converter(self)
        return super().named_children()

    def extra_repr(self) -> str:
        extra = super().extra_repr()
        for name in ("activation", "negative_slope", "weighting", "unbiased"):
            if getattr(self, name) != getattr(SyncBatchNorm, name):
                extra += f", {name}={getattr(self, name)!r}"
        return extra

    def __reduce_ex__(self, protocol: Any) -> Any:
        check_group_can_be_pickled(self, groups_of(self))
        return super().__reduce_ex__(protocol)

    def __copy__(self) -> SyncBatchNorm:  # else copy.copy would ask __reduce_ex__, as pickle does
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        forget_compiled(new)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        for group in groups_of(self):  # a copy exchanges with the same ranks; groups cannot be copied
            memo[id(group)] = group.outside if isinstance(group, RecordedCommunicator) else group  # a copy is not part of syncbn.join
        for buffer in self.buffers(recurse=False):
            if isinstance(buffer, UninitializedBuffer):  # which torch cannot copy, unlike an uninitialized parameter
                factory: dict[str, Any] = {"device": buffer.device, "dtype": buffer.dtype}
                memo[id(buffer)] = UninitializedBuffer(**factory)
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        forget_compiled(new)
        return new


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d):
    """A `SyncBatchNorm` that is a `torch.nn.BatchNorm1d`, too: what a `BatchNorm1d` is converted to.

    Code that selects layers by class (weight decay, freezing, initialization) finds it. Arguments are those of `SyncBatchNorm`, input
    and output are [N, C] or [N, C, L]: a ValueError otherwise, as in torch.

    >>> isinstance(SyncBatchNorm1d(8), nn.BatchNorm1d)
    True
    """

    _check_input_dim = nn.BatchNorm1d._check_input_dim


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d):
    """A `SyncBatchNorm` that is a `torch.nn.BatchNorm2d`, too: what a `BatchNorm2d` is converted to. Takes [N, C, H, W] only.

    >>> isinstance(SyncBatchNorm2d(8), nn.BatchNorm2d)
    True
    """

    _check_input_dim = nn.BatchNorm2d._check_input_dim


class SyncBatchNorm3d(SyncBatchNorm, nn.BatchNorm3d):
    """A `SyncBatchNorm` that is a `torch.nn.BatchNorm3d`, too: what a `BatchNorm3d` is converted to. Takes [N, C, D, H, W] only.

    >>> isinstance(SyncBatchNorm3d(8), nn.BatchNorm3d)
    True
    """

    _check_input_dim = nn.BatchNorm3d._check_input_dim
