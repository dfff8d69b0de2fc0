"""Models that torch.fx cannot trace, and how many of their pairs may be fused or folded."""

from __future__ import annotations

import functools

from torch import nn


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
    kind: type = Calls

    def __init__(self):
        super().__init__()
        self.inner = self.kind()

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


class CallsADictionary(Nested):
    kind = Dictionary


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
