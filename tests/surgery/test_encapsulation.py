"""A model that torch.fx cannot trace is fused and folded submodule by submodule, unless code outside a submodule sees its layers."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from support.oracle import assert_close
from syncbn import SyncBatchNorm, convert_sync_batchnorm, fold_batchnorm, revert_sync_batchnorm
from syncbn.surgery.fold import FoldedBatchNorm

pytestmark = pytest.mark.world_size(1)


def block():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def run(module, x):
    return module(x)


class Untraceable(nn.Module):
    """Two blocks by name, two in a list, and a branch that depends on values."""

    def __init__(self):
        super().__init__()
        self.a, self.b = block(), block()
        self.blocks = nn.ModuleList([block(), block()])
        self.absent = None

    def branch(self, x):
        return x if x.sum() > 0 else -x


# ---- The code only calls its submodules -----------------------------------------------------------------------------------------------


class Calls(Untraceable):
    def forward(self, x):
        return self.b(self.branch(self.a(x)))


class CallsTwice(Untraceable):
    def forward(self, x):
        return self.a(self.branch(self.a(x))) + self.b(x)


class ComparesWithNone(Untraceable):
    def forward(self, x):
        if self.absent is not None and isinstance(self, nn.Module):
            x = self.absent(x)
        x = self.b(x) if self.a else x
        return self.branch(self.a(x) if hasattr(self, "a") else x)


class Loops(Untraceable):
    def forward(self, x):
        for layer in self.blocks:
            x = layer(x)
        return self.branch(x)


class Enumerates(Untraceable):
    def forward(self, x):
        return self.branch(sum(layer(x) * i for i, layer in enumerate(self.blocks)))


class Indexes(Untraceable):
    def forward(self, x):
        return self.branch(self.blocks[0](x) + self.blocks[1](x))


class CallsByName(Untraceable):
    def forward(self, x):
        return getattr(self, "b")(self.branch(getattr(self, "a")(x))) * getattr(self, "scale", 1)  # noqa: B009


class Nested(Untraceable):
    def __init__(self):
        super().__init__()
        self.inner = Calls()

    def forward(self, x):
        return self.branch(self.inner(x))


class Chain(nn.Sequential):
    """A subclass of a container, whose children torch's forward calls."""

    def __init__(self):
        super().__init__(block(), block())

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Dictionary(nn.ModuleDict):
    def __init__(self):
        super().__init__({"a": block(), "b": block()})

    def forward(self, x):
        return self["b"](self["a"](x))


class CallsADictionary(Untraceable):
    def __init__(self):
        super().__init__()
        self.inner = Dictionary()

    def forward(self, x):
        return self.branch(self.inner(x))


# ---- The code looks inside ------------------------------------------------------------------------------------------------------------


class ReachesByIndex(Untraceable):
    def forward(self, x):
        return self.branch(self.a(x) + self.a[0](x))


class ReachesByName(Untraceable):
    def forward(self, x):
        return self.branch(self.a(x) + self.a.get_submodule("0")(x))


class ReachesAWeight(Untraceable):
    def forward(self, x):
        return self.branch(self.a(x) * self.a[0].weight.mean())


class Aliases(Untraceable):
    def forward(self, x):
        a = self.a
        return self.branch(a(x) + a[0](x))


class PassesOn(Untraceable):
    def forward(self, x):
        return self.branch(run(self.a, x) + run(self.a[:2], x))


class Lists(Untraceable):
    def forward(self, x):
        convolutions = [m for m in self.modules() if isinstance(m, nn.Conv2d)]
        return self.branch(self.a(x) + convolutions[0](x))


class ListsItself(Chain):
    def forward(self, x):
        first = next(iter(self))
        return super().forward(x if x.sum() > 0 else -x) + first[0](x)


class AppliesToAll(Untraceable):
    def forward(self, x):
        layers = []
        self.apply(layers.append)
        return self.branch(self.a(x) + next(m for m in layers if isinstance(m, nn.Conv2d))(x))


class GetsByName(Untraceable):
    def forward(self, x):
        return self.branch(self.a(x) + getattr(self, "a")[0](x))  # noqa: B009


class GetsByAnotherName(Untraceable):
    def forward(self, x):
        name = "a"
        return self.branch(self.a(x) + getattr(self, name)[0](x))


class LoopReachesInside(Untraceable):
    def forward(self, x):
        for layer in self.blocks:
            x = layer(x) + layer[0](x)
        return self.branch(x)


class SlicesAList(Untraceable):
    def forward(self, x):
        for layer in self.blocks[:1]:
            x = layer(x) + layer[0](x)
        return self.branch(x)


class Helper(Untraceable):
    def helper(this, x):
        return this.a[0](x)


class HelperReachesInside(Helper):
    def forward(self, x):
        return self.branch(self.a(x) + self.helper(x))


class BaseReachesInside(ReachesByIndex):
    def forward(self, x):
        return super().forward(x)


class PropertyReachesInside(Untraceable):
    @property
    def first(self):
        return self.a[0]

    def forward(self, x):
        return self.branch(self.a(x) + self.first(x))


class CachedPropertyReachesInside(Untraceable):
    @functools.cached_property
    def first(self):
        return self.a[0]

    def forward(self, x):
        return self.branch(self.a(x) + self.first(x))


class HelperByNameReachesInside(Helper):
    def forward(self, x):
        return self.branch(self.a(x) + getattr(self, "helper")(x))  # noqa: B009


class KeepsAList(Untraceable):
    """The list of stages is no submodule."""

    def __init__(self):
        super().__init__()
        self.stages = [(self.a, self.b)]

    def forward(self, x):
        return self.branch(self.a(x) + self.stages[0][0][0](x))


class KeepsAMethod(Helper):
    def __init__(self):
        super().__init__()
        self.chosen = self.helper

    def forward(self, x):
        return self.branch(self.a(x) + self.chosen(x))


class ListsValues(Dictionary):
    def forward(self, x):
        for layer in self.values():
            x = layer(x) + layer[0](x)
        return x if x.sum() > 0 else -x


class ReachesByDunder(Untraceable):
    def forward(self, x):
        return self.branch(self.a(x) + self.__getattr__("a")[0](x))


class Shares(Untraceable):
    """A layer that two submodules hold."""

    def __init__(self):
        super().__init__()
        self.b = nn.Sequential(self.a[1], nn.Tanh())

    def forward(self, x):
        return self.branch(self.a(x) + self.b(x))


class SharesABlock(Untraceable):
    """Two submodules, neither of which can be traced, hold the same block, and one more each."""

    def __init__(self):
        super().__init__()
        self.left, self.right = Calls(), Calls()
        self.right.a = self.left.a

    def forward(self, x):
        return self.branch(self.left(x) + self.right(x))


class PatchedForward(Untraceable):
    """torch.fx can trace the forward of its class, which is never called."""

    def __init__(self):
        super().__init__()
        self.forward = self.reach  # a bound method, which a deep copy binds to the copy

    def forward(self, x):
        return self.a(x) + self.b(x)

    def reach(self, x):
        return self.branch(self.a(x) + self.a[0](x))


MODELS = {  # model: how many activations are fused, and batch norms folded
    Calls: 2, CallsTwice: 2, ComparesWithNone: 2, Loops: 2, Enumerates: 2, Indexes: 2, CallsByName: 2, Nested: 2, Chain: 2,
    SharesABlock: 2, CallsADictionary: 2,
    **dict.fromkeys((ReachesByIndex, ReachesByName, ReachesAWeight, Aliases, PassesOn, Lists, ListsItself, AppliesToAll), 0),
    **dict.fromkeys((GetsByAnotherName, LoopReachesInside, SlicesAList, HelperReachesInside, BaseReachesInside, PropertyReachesInside), 0),
    **dict.fromkeys((GetsByName, CachedPropertyReachesInside, Shares, PatchedForward, HelperByNameReachesInside, KeepsAList), 0),
    **dict.fromkeys((KeepsAMethod, ListsValues, ReachesByDunder), 0),
}  # fmt: skip


REASON = r"(test_encapsulation.py:\d+ |but this instance replaces it)"


def used(model):
    """The modules that the model's forward calls: whether layers in others are fused or folded does not matter."""
    called = set()
    handles = [m.register_forward_hook(lambda m, *_: called.add(m)) for m in model.modules()]
    model(torch.randn(2, 4, 6, 6))
    for handle in handles:
        handle.remove()
    return called


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_submodules_are_fused_and_folded_unless_code_outside_sees_their_layers(cls):
    plain = cls()
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean), nn.init.uniform_(m.weight), nn.init.normal_(m.bias)
    plain.eval()
    classes = [type(m) for m in plain.modules()]
    with pytest.warns(UserWarning, match=rf"fuse_activation: .*{REASON}"):
        fused = convert_sync_batchnorm(copy.deepcopy(plain), fuse_activation=True)
    with pytest.warns(UserWarning, match=rf"fold_batchnorm: .*{REASON}") as caught:
        folded = fold_batchnorm(plain)
    assert caught[0].filename == __file__
    assert sum(isinstance(m, SyncBatchNorm) and m.activation == "relu" for m in used(fused)) == MODELS[cls]
    assert sum(isinstance(m, FoldedBatchNorm) for m in used(folded)) == MODELS[cls]
    for _ in range(3):  # the branch depends on values
        x = torch.randn(2, 4, 6, 6)
        want = plain(x)
        for model in (fused, folded):
            assert_close(model(x), want.double().detach(), 2e-5, "y")
    assert [type(m) for m in revert_sync_batchnorm(fused).modules()] == classes


def test_a_class_without_source_is_left_alone():
    code = "class Typed(Base):\n    def forward(self, x):\n        return self.branch(self.a(x))\n"
    names = {"Base": Untraceable}
    exec(code, names)
    with pytest.warns(UserWarning, match="cannot trace the whole model"):
        model = convert_sync_batchnorm(names["Typed"](), fuse_activation=True)
    assert model.a[1].activation is None and isinstance(model.a[1], SyncBatchNorm)
