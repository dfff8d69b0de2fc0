"""`SyncBatchNormalization`: the layer with the names, defaults and conventions of Keras and Horovod."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from ._torch_private import remove_lazy_hooks
from .comm.identity import description_of
from .keras_weights import TORCH_NAMES
from .modules import SyncBatchNorm
from .options import Options
from .surgery.trace import record_in_fx_graph

if TYPE_CHECKING:
    from typing import Self

Initializer = Callable[..., Any]  # (shape, dtype=...) -> values, as Keras calls its initializers

_INITIALIZERS: dict[str, Initializer] = {"zeros": torch.zeros, "ones": torch.ones}


class SyncBatchNormalization(LazyModuleMixin, SyncBatchNorm):  # type: ignore[misc]
    """Batch normalization over the batches of all ranks, with the conventions of Keras and Horovod's `SyncBatchNormalization`.

        outputs          = gamma * (inputs - mean) / sqrt(variance + epsilon) + beta
        moving_mean      = momentum * moving_mean + (1 - momentum) * mean
        moving_variance  = momentum * moving_variance + (1 - momentum) * variance          biased

    `mean` [C] is the average of the ranks' means, and `variance` [C] the average of their mean squares, less the square of `mean`. So every
    rank has equal weight, however large its batch, as in Horovod. The formulas are those of `keras.layers.BatchNormalization`.

    Args:
        axis: the dimension of the features; a negative one counts from the end.
        momentum: the decay of the moving values. torch's momentum is 1 minus this one.
        epsilon: added to the variance.
        center, scale: whether the layer has a beta, and a gamma.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer: "zeros", "ones", or a callable
            (shape, dtype=...) -> values, such as `torch.rand`.
        fused: accepted as False only, as in Horovod.
        name: the layer's name, for messages.
        trainable: False freezes the layer, as in Keras: it runs in inference mode even if `training` is True, without an exchange, and
            beta and gamma require no gradient. It may be set later, too. Set it on every rank.
        num_features: C, which builds the layer at once. Without it the first call does, from its input.
        weighting: "ranks", or "samples" for the statistics of the whole batch. If all batches are of equal size, both give the same.
        process_group, activation, negative_slope, device, dtype: as in `SyncBatchNorm`.

    Shape:
        inputs, outputs: 2 or more dimensions, with the C features on `axis`.
        gamma, beta, moving_mean, moving_variance: [C].

    Raises:
        TypeError: `axis` is not an integer.
        ValueError: `fused` is not False, or an initializer is unknown; and as `SyncBatchNorm`.

    DistributedDataParallel accepts the layer only after it has been built: give `num_features`, load a state dict, or call the layer once.

    >>> layer = SyncBatchNormalization(momentum=0.5)
    >>> layer(torch.randn(2, 4, 4, 8), training=True).shape
    torch.Size([2, 4, 4, 8])
    >>> [name for name, _ in layer.named_parameters()], [name for name, _ in layer.named_buffers()]
    (['gamma', 'beta'], ['moving_mean', 'moving_variance'])
    >>> SyncBatchNormalization.from_keras([[1.0, 2.0], [0.0, 0.0], [5.0, 5.0], [1.0, 4.0]], axis=1).moving_variance
    tensor([1., 4.])
    """

    gamma: Tensor | None
    beta: Tensor | None
    moving_mean: Tensor
    moving_variance: Tensor
    cls_to_become = None  # a layer that has been built stays in this class
    _trainable = True
    _frozen = False  # True in the class that freeze_bn gives the layer

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: str | Initializer = "zeros",
        gamma_initializer: str | Initializer = "ones",
        moving_mean_initializer: str | Initializer = "zeros",
        moving_variance_initializer: str | Initializer = "ones",
        fused: bool | None = False,
        name: str | None = None,
        *,
        trainable: bool = True,
        num_features: int | None = None,
        process_group: Any = None,
        weighting: str = "ranks",
        activation: str | None = None,
        negative_slope: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if fused in (True, None):
            raise ValueError("SyncBatchNormalization does not support fused=True.")
        if not isinstance(axis, int):
            raise TypeError(f"axis must be one dimension, an integer, got {axis!r}")
        super().__init__(  # without tensors, which have other names here
            0, epsilon, momentum, False, False, process_group,
            activation=activation, negative_slope=negative_slope, weighting=weighting, unbiased=False,
        )  # fmt: skip
        self.axis = axis
        self.center = center
        self.scale = scale
        self.name = self.layer_name = name
        self.affine = center or scale
        self.track_running_stats = True
        self._initializers = {
            "gamma": _initializer("gamma_initializer", gamma_initializer),
            "beta": _initializer("beta_initializer", beta_initializer),
            "moving_mean": _initializer("moving_mean_initializer", moving_mean_initializer),
            "moving_variance": _initializer("moving_variance_initializer", moving_variance_initializer),
        }
        for torch_name in TORCH_NAMES.values():
            delattr(self, torch_name)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        for parameter, wanted in (("gamma", scale), ("beta", center)):
            self.register_parameter(parameter, UninitializedParameter(**factory) if wanted else None)  # type: ignore[arg-type]
        for buffer in ("moving_mean", "moving_variance"):
            self.register_buffer(buffer, UninitializedBuffer(**factory))
        self.trainable = trainable
        if num_features is not None:
            self._build(num_features)

    # torch's names, where torch's tools and the parent class look for them
    weight = property(lambda self: self.gamma)  # type: ignore[assignment]
    bias = property(lambda self: self.beta)  # type: ignore[assignment]
    running_mean = property(lambda self: self.moving_mean)  # type: ignore[assignment]
    running_var = property(lambda self: self.moving_variance)  # type: ignore[assignment]
    epsilon = property(lambda self: self.eps)

    @property
    def trainable(self) -> bool:
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = bool(value)
        for parameter in self.parameters(recurse=False):
            if not is_lazy(parameter):  # of lazy parameters `_build` sets it
                parameter.requires_grad_(self._trainable)

    def forward(self, inputs: Tensor, training: bool | None = None) -> Tensor:  # type: ignore[override]
        """Normalizes by the batch of all ranks while training, by the moving values otherwise.

        Args:
            inputs: 2 or more dimensions, with C features on `axis`. The other sizes may differ by rank, and be 0.
            training: overrides `train()` and `eval()`, unless the layer is frozen.

        Returns:
            a tensor of the inputs' shape and dtype.

        Raises:
            ValueError: `axis` is no dimension of the inputs, or does not have C features; and as `SyncBatchNorm`.
            RankMismatchError, RuntimeError: as `SyncBatchNorm`.
        """
        if isinstance(inputs, torch.fx.Proxy):
            return record_in_fx_graph(self, inputs, training)
        x = self.channels_second(inputs)
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"{description_of(self)}: inputs must have {self.num_features} features on axis {self.axis}, got {list(inputs.shape)}"
            )
        learns = self.trainable and not self._frozen
        y = self._batch_norm(x, None, learns and (self.training if training is None else bool(training)))
        return y.movedim(1, self.axis)

    def channels_second(self, inputs: Tensor) -> Tensor:
        """The inputs as [N, C, *], a view in which dimension 1 is the inputs' `axis`. Raises ValueError if there is no such dimension."""
        if inputs.dim() < 2 or not -inputs.dim() <= self.axis < inputs.dim():
            raise ValueError(
                f"{description_of(self)}: inputs must have 2 or more dimensions, axis {self.axis} among them, got {list(inputs.shape)}"
            )
        return inputs.movedim(self.axis, 1)

    # ---- Building: torch's mechanism for lazy modules ---------------------------------------------------------------------------

    def initialize_parameters(self, inputs: Tensor, training: bool | None = None) -> None:
        """Builds the layer for these inputs. torch calls this before the first `forward`."""
        self._build(self.channels_second(inputs).shape[1])

    def reset_parameters(self) -> None:
        self._reset("gamma", "beta", "moving_mean", "moving_variance")

    def reset_running_stats(self) -> None:
        self._reset("moving_mean", "moving_variance")

    def _build(self, num_features: int) -> None:
        self.num_features = num_features
        for name in self._initializers:
            tensor: Any = getattr(self, name)
            if is_lazy(tensor):  # otherwise a state dict has filled it
                tensor.materialize((num_features,))
                self._reset(name)
        if not self.trainable:
            self.trainable = False  # whose setter freezes the new parameters
        remove_lazy_hooks(self)

    @torch.no_grad()
    def _reset(self, *names: str) -> None:
        if self.num_features == 0:  # not built yet
            return
        for name in names:
            tensor: Any = getattr(self, name)
            if tensor is not None:
                tensor.copy_(torch.as_tensor(self._initializers[name](tuple(tensor.shape), dtype=tensor.dtype)))

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)  # that of torch's batch norm would demand num_batches_tracked
        if not is_lazy(self.moving_mean):
            self._build(len(self.moving_mean))

    def _options(self, momentum: float | None) -> Options:
        if momentum is None:  # some of torch's utilities set momentum to None
            raise ValueError(
                f"{description_of(self)}: momentum must be a number, the decay of the moving values, got None; see syncbn.update_bn_stats"
            )
        return super()._options(1 - momentum)

    def extra_repr(self) -> str:
        names = ["axis", "momentum", "epsilon", "center", "scale", "weighting", "num_features"]
        names += [name for name in ("name", "activation", "negative_slope") if getattr(self, name) != getattr(SyncBatchNorm, name, None)]
        names += [] if self.trainable else ["trainable"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    @classmethod
    def _with_tensors(cls, tensors: Mapping[str, Tensor], decay: float, epsilon: float, options: dict[str, Any]) -> Self:
        num_features = len(tensors["moving_mean"])
        return cls(
            momentum=decay, epsilon=epsilon, center="beta" in tensors, scale="gamma" in tensors, num_features=num_features, **options
        )


def _initializer(argument: str, value: str | Initializer) -> Initializer:
    if callable(value):
        return value
    if value not in _INITIALIZERS:
        raise ValueError(f"{argument} must be one of {tuple(_INITIALIZERS)} or a callable (shape, dtype=...) -> values, got {value!r}")
    return _INITIALIZERS[value]
