"""`recompute_outputs`: the layers after a synchronized layer keep how its output is computed, not the output.

A layer keeps its input x for its own backward pass. A convolution after it keeps the output y as well, which is as large. But one
`normalize` of x, with the statistics that the layer keeps as well, gives y again: bitwise identical, whatever the activation, and without
an exchange.

    forward    pack      a tensor that is, or views, the unchanged output of a layer ──► its recipe; any other stays as it is
               remember  replaces an output by its recipe, if an operator saved it while the layer computed it: relu saves what it returns
    backward   unpack    recipe ──► the output, computed again unless something still holds the last result
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ._torch_private import packs, version_of

_active: ContextVar[bool] = ContextVar("syncbn.recompute_outputs", default=False)
_saved: ContextVar[list[_Kept] | None] = ContextVar("syncbn.recompute_outputs.saved", default=None)

# A recipe may need an output that has a recipe. Along the residual connections of a network each would need the one before. So no chain of
# recipes is longer than this; the next output is kept.
_LONGEST_CHAIN = 2


@contextmanager
def recompute_outputs() -> Iterator[None]:
    """A forward pass in this context keeps less memory: outputs of synchronized layers are computed again in the backward pass.

    Where other layers would keep a synchronized layer's output for their backward passes, they keep how to compute it: from the layer's
    input and statistics, which the layer keeps anyway, and its residual. Gradients are bitwise identical to those without the context.
    The recomputation exchanges nothing, and leaves the running statistics as they are. To compute an output again costs one elementwise
    kernel in training mode, in eval mode a few.

    A separate activation after the layer keeps its own output, so fuse the two first: `convert_sync_batchnorm(model,
    fuse_activation=True)`. Fused layers take part, and so do layers with a residual, layers in eval mode, frozen layers and the Keras
    layer; torch's own layers do not, until they are converted. If an output is changed in place before another layer keeps it, that
    layer keeps the output as usual.

    DistributedDataParallel, FSDP, autocast, `retain_graph` and double backward work in the context as they do without it. torch applies
    only the innermost of nested saved-tensor hooks: a `torch.utils.checkpoint` in the context works as usual, and what layers keep
    inside a `save_on_cpu` in the context goes to the CPU. Compiled models ignore the context: torch's partitioner decides by itself what to
    recompute.

    Raises, in the backward pass:
        RuntimeError: a layer's input or residual was changed in place after the forward pass. torch raises the same for what a layer keeps.

    >>> model = nn.Sequential(syncbn.SyncBatchNorm(4, activation="relu"), nn.Conv2d(4, 8, 3))
    >>> with recompute_outputs():
    ...     loss = model(torch.randn(2, 4, 8, 8)).square().mean()
    >>> loss.backward()
    """
    token = _active.set(True)
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _active.reset(token)


is_active = _active.get  # whether `remember` is of use here. Only for eager code: compiled code cannot read a context variable


def remember(output: Tensor, compute: Callable[..., Tensor], *inputs: Tensor | None, saved: Iterable[_Kept] = ()) -> object:
    """Notes, in the context, that `output` is `compute(*inputs)`, bitwise, as long as no input is changed in place.

    What else `compute` holds must be small and must not change. Tensors in `saved` that are the output, or views of it, are freed. The
    caller keeps the returned recipe until the layer's backward pass. If none is returned, nothing is noted or freed."""
    if output.is_inference() or not packs(_pack):  # inside a checkpoint a recipe would keep the input, which the checkpoint frees
        return None
    kept = tuple(None if t is None else _pack(t.detach()) for t in inputs)
    chain = 1 + max((t.recipe.chain for t in kept if isinstance(t, _View)), default=0)
    if chain <= _LONGEST_CHAIN:
        recipe = _Recipe(compute, kept, output, chain)
        memory = output.untyped_storage()
        for tensor in saved:
            tensor.replace_by(recipe, memory)
        _recipes[memory] = weakref.ref(recipe)
        return recipe
    return None


@contextmanager
def saving() -> Iterator[list[_Kept]]:
    """Gives the list of what operators save in this context for their backward passes, for `remember`."""
    saved: list[_Kept] = []
    token = _saved.set(saved)
    try:
        yield saved
    finally:
        _saved.reset(token)


def copy_of(parameter: Tensor | None) -> Tensor | None:
    """A copy of a parameter for `compute`, because an optimizer or FSDP may change the parameter before the output is computed again."""
    return None if parameter is None else parameter.detach().clone()


class _Recipe:
    """How to compute an output. Holds neither the output nor its memory."""

    def __init__(self, compute: Callable[..., Tensor], inputs: tuple[Any, ...], output: Tensor, chain: int) -> None:
        self.compute, self.inputs, self.chain = compute, inputs, chain
        self.version, self.dtype, self.device = version_of(output), output.dtype, output.device
        self.lock = threading.Lock()  # the backward passes of several devices run in threads
        self.last: dict[int, weakref.ref[torch.UntypedStorage]] = {}  # by stream, none of which waits for what another one computes

    def is_for(self, tensor: Tensor) -> bool:
        """Whether a tensor in the output's memory is unchanged and of the output's dtype."""
        return version_of(tensor) == self.version and tensor.dtype is self.dtype

    def memory(self) -> torch.UntypedStorage:
        """The memory of the output, which is computed if nothing on this stream holds it."""
        with self.lock:
            stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
            last = self.last.get(stream)
            memory = None if last is None else last()
            if memory is None:
                memory = self._compute().untyped_storage()
                self.last[stream] = weakref.ref(memory)
            return memory

    def _compute(self) -> Tensor:
        with torch.no_grad():
            return self.compute(*map(_unpack, self.inputs))


class _View(NamedTuple):
    """A tensor that views an output."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Kept:
    """A tensor as it is, until `remember` finds how to compute it. torch does not check the version of what hooks keep, so `_unpack`
    does."""

    __slots__ = "now", "version"

    def __init__(self, tensor: Tensor) -> None:
        self.now: Tensor | _View = tensor
        self.version = version_of(tensor)

    def replace_by(self, recipe: _Recipe, memory: torch.UntypedStorage) -> None:
        """Frees the tensor if it is this recipe's unchanged output, or a view of it. `memory` is the output's storage."""
        if isinstance(self.now, Tensor) and self.now.untyped_storage() is memory and recipe.is_for(self.now):
            self.now = _view(self.now, recipe)


# The recipe of the output in each storage. The key is the storage itself, since its address may be used again after its end. The layer's
# autograd node keeps the recipe: an output that is kept without its graph must not keep the layer's input.
_recipes: WeakKeyDictionary[torch.UntypedStorage, weakref.ref[_Recipe]] = WeakKeyDictionary()


def _pack(tensor: Tensor) -> Tensor | _Kept | _View:
    if tensor.is_inference():
        return tensor
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_meta:  # a parameter is no output
        return _Kept(tensor)
    found = _recipes.get(tensor.untyped_storage())
    recipe = None if found is None else found()
    if recipe is not None and recipe.is_for(tensor):
        return _view(tensor, recipe)
    kept = _Kept(tensor)
    if (saved := _saved.get()) is not None:
        saved.append(kept)
    return kept


def _view(tensor: Tensor, recipe: _Recipe) -> _View:
    return _View(recipe, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _unpack(packed: Any) -> Any:
    if isinstance(packed, _Kept):
        packed, version = packed.now, packed.version
        if isinstance(packed, Tensor) and version_of(packed) != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor"
                f" {list(packed.shape)} is at version {version_of(packed)}; expected version {version} instead"
            )
    if not isinstance(packed, _View):
        return packed
    recipe = packed.recipe
    with torch.no_grad():
        return torch.empty(0, dtype=recipe.dtype, device=recipe.device).set_(recipe.memory(), packed.offset, packed.size, packed.stride)
