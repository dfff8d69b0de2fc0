"""A model that torch.fx cannot trace is fused and folded submodule by submodule, unless code outside a submodule sees its layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from support.oracle import assert_close
from support.untraceable import MODELS, Untraceable
from syncbn import SyncBatchNorm, convert_sync_batchnorm, fold_batchnorm, revert_sync_batchnorm
from syncbn.surgery.fold import FoldedBatchNorm

pytestmark = pytest.mark.world_size(1)


REASON = r"(untraceable.py:\d+ |but this instance replaces it)"


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
