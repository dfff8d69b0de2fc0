"""A layer's name is its path in the largest model that was converted, unless the user has named it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import syncbn
from syncbn import SyncBatchNorm, convert_sync_batchnorm

pytestmark = pytest.mark.world_size(1)
BUILT = {  # layers that have no name until a model with them is converted
    "SyncBatchNorm": lambda: SyncBatchNorm(4),
    "SyncBatchNorm2d": lambda: syncbn.SyncBatchNorm2d(4),
    "Keras": lambda: syncbn.SyncBatchNormalization(num_features=4),
    "converted outside a model": lambda: convert_sync_batchnorm(nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("convert", [convert_sync_batchnorm, SyncBatchNorm.convert_sync_batchnorm], ids=["function", "classmethod"])
@pytest.mark.parametrize("name", BUILT)
def test_existing_layers_get_names(name, convert):
    assert convert(nn.ModuleDict({"stem": BUILT[name]()}))["stem"].layer_name == "stem"


def test_names_survive_copies_pickles_and_lazy_building():
    model = convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm2d(), SyncBatchNorm(4)))
    model(torch.randn(2, 4, 3, 3))
    for copied in (model, copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert [m.layer_name for m in copied] == ["0", "1"]


def test_the_whole_model_renames_what_a_part_has_named_and_not_what_the_user_has():
    """Two parts that are converted one by one both have a layer "0", and ranks must not mistake one for the other."""
    parts = nn.ModuleDict({"left": nn.Sequential(nn.BatchNorm1d(4)), "right": nn.Sequential(nn.BatchNorm1d(4), SyncBatchNorm(4))})
    for part in parts.values():
        convert_sync_batchnorm(part)
    parts["right"][1].layer_name = "by hand"
    convert_sync_batchnorm(parts)
    names = [m.layer_name for m in parts.modules() if isinstance(m, SyncBatchNorm)]
    assert names == ["left.0", "right.0", "by hand"]
    convert_sync_batchnorm(parts["left"])
    assert parts["left"][0].layer_name == "left.0"


def test_layer_names_are_dotted_paths():
    model = syncbn.convert_sync_batchnorm(nn.ModuleDict({"stem": nn.Sequential(nn.BatchNorm2d(4))}))
    assert model["stem"][0].layer_name == "stem.0"
