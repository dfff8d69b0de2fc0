"""A converted layer keeps its class as a base, but for torch's SyncBatchNorm: isinstance finds it, and that class checks the input's
dimensions."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

import syncbn
from syncbn import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d, convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.surgery import record

pytestmark = pytest.mark.world_size(1)


class Described(nn.BatchNorm2d):
    """A user's subclass without a forward and without a check of its own."""

    def describe(self):
        return "described"


class OnlySquares(nn.BatchNorm2d):
    """A user's subclass that checks more than torch does."""

    def _check_input_dim(self, input):
        super()._check_input_dim(input)
        if input.shape[2] != input.shape[3]:
            raise ValueError(f"expected a square image (got {list(input.shape)})")


class LazySquares(nn.LazyBatchNorm2d):
    """A user's lazy class, which becomes another class of the user's."""

    cls_to_become = OnlySquares


class Synchronized(nn.SyncBatchNorm):
    """A user's subclass of torch's synchronized layer."""


CLASSES = {  # plain class: class after conversion, None if conversion makes one
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    Described: None,
    OnlySquares: None,
    Synchronized: None,
}
SHAPES = {nn.BatchNorm1d: (3, 4, 5), nn.BatchNorm2d: (3, 4, 5, 5), nn.BatchNorm3d: (3, 4, 2, 3, 2), nn.SyncBatchNorm: (3, 4, 5)}
BUILT = {SyncBatchNorm1d: nn.BatchNorm1d, SyncBatchNorm2d: nn.BatchNorm2d, SyncBatchNorm3d: nn.BatchNorm3d}
LAZY = {
    nn.LazyBatchNorm1d: nn.BatchNorm1d,
    nn.LazyBatchNorm2d: nn.BatchNorm2d,
    nn.LazyBatchNorm3d: nn.BatchNorm3d,
    LazySquares: OnlySquares,
}


def shape_for(cls):
    return next(shape for base, shape in SHAPES.items() if issubclass(cls, base))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_converted_layer_is_an_instance_of_its_class_and_reverts_to_exactly_it(cls):
    layer = convert_sync_batchnorm(cls(4))
    assert isinstance(layer, SyncBatchNorm) and isinstance(layer, cls)
    assert CLASSES[cls] in (type(layer), None)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer):
        assert type(copied) is type(layer) and copied(torch.randn(shape_for(cls))).isfinite().all()
        assert type(revert_sync_batchnorm(copied)) is cls


@pytest.mark.parametrize("cls", BUILT, ids=lambda cls: cls.__name__)
def test_built_layer_of_a_dimension_reverts_to_torchs_class(cls):
    layer = cls(4, activation="relu")
    assert isinstance(layer, BUILT[cls]) and (layer(torch.randn(shape_for(cls))) >= 0).all()
    layer.activation = None
    assert type(revert_sync_batchnorm(layer)) is BUILT[cls]


@pytest.mark.parametrize("cls", LAZY, ids=lambda cls: cls.__name__)
def test_lazy_layer_becomes_a_synchronized_layer_of_its_class(cls):
    layer = convert_sync_batchnorm(cls())
    assert isinstance(layer, SyncBatchNorm) and isinstance(layer, cls) and isinstance(layer, LazyModuleMixin)
    for copied in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        copied(torch.randn(shape_for(LAZY[cls])))
        assert isinstance(copied, SyncBatchNorm) and isinstance(copied, LAZY[cls]) and not isinstance(copied, LazyModuleMixin)
        assert copied.num_features == 4 and type(revert_sync_batchnorm(copied)) is LAZY[cls]


# ---- The class's own check of dimensions ----------------------------------------------------------------------------------------------

REFUSED = {  # class: shapes of 4 channels that it refuses
    nn.BatchNorm1d: [(4,), (2, 4, 3, 3)],
    nn.BatchNorm2d: [(4, 4, 4), (4, 4), (2, 4, 3, 3, 3)],  # (4, 4, 4): an image without its batch dimension, [C, H, W]
    nn.BatchNorm3d: [(4, 4, 4, 4), (2, 4, 3)],
    OnlySquares: [(4, 4, 4), (2, 4, 3, 5)],
    nn.LazyBatchNorm2d: [(4, 4, 4)],
    LazySquares: [(2, 4, 3, 5)],
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_converted_layer_refuses_the_shapes_that_its_class_refuses(cls, training):
    arguments = () if issubclass(cls, LazyModuleMixin) else (4,)
    for shape in REFUSED[cls]:
        x = torch.randn(shape)
        with pytest.raises(ValueError) as plain:
            cls(*arguments).train(training)(x)
        with pytest.raises(ValueError) as converted:
            convert_sync_batchnorm(cls(*arguments)).train(training)(x)
        assert str(converted.value).endswith(f": {plain.value}")  # after the layer's name


@pytest.mark.parametrize("make", [lambda: SyncBatchNorm(4), lambda: convert_sync_batchnorm(nn.SyncBatchNorm(4))], ids=["built", "torch's"])
def test_layer_without_a_dimension_takes_any_number_from_two_on(make):
    for shape in ((3, 4), (3, 4, 5), (3, 4, 2, 2), (3, 4, 2, 2, 2), (3, 4, 2, 1, 2, 2)):
        assert make()(torch.randn(shape)).shape == shape


# ---- Lists of classes in public code --------------------------------------------------------------------------------------------------
# Each function selects layers as the project named in its docstring does.

BN_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def weights_without_decay(model):
    """ultralytics, engine/trainer.py build_optimizer: every class of torch.nn with "Norm" in its name."""
    norms = tuple(cls for name, cls in vars(nn).items() if "Norm" in name)
    return [m.weight for m in model.modules() if isinstance(m, norms)]


def weight_decay_norm(model):
    """detectron2, solver/build.py get_default_optimizer_params: the parameters that WEIGHT_DECAY_NORM is for."""
    norms = (*BN_TYPES, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.LocalResponseNorm)
    return [p for m in model.modules() for p in m.parameters(recurse=False) if isinstance(m, norms)]


def frozen(model):
    """timm, utils/model.py freeze_batch_norm_2d: the layers that it replaces."""
    return [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]


def precise_bn(model):
    """fvcore, nn/precise_bn.py get_bn_modules."""
    return [m for m in model.modules() if m.training and isinstance(m, BN_TYPES)]


def has_batchnorms(model):
    """DINO, utils.py has_batchnorms."""
    return any(isinstance(m, BN_TYPES) for _, m in model.named_modules())


def split_bn_bias(model):
    """OpenPCDet, tools/train_utils/optimization/fastai_optim.py split_bn_bias: the group of batch norms."""
    return [m for m in model.children() if isinstance(m, BN_TYPES)]


def fsdp_exemption(model):
    """torch, distributed/fsdp: batch norms are kept in float32 under mixed precision."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


LISTS = [weights_without_decay, weight_decay_norm, frozen, precise_bn, has_batchnorms, split_bn_bias, fsdp_exemption]


def count(answer):
    return answer if isinstance(answer, bool) else len(answer)


@pytest.mark.parametrize("ask", LISTS, ids=lambda ask: ask.__name__)
def test_lists_of_classes_find_as_many_layers_as_before_conversion(ask):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), Described(4))
    before = count(ask(model))
    assert before and count(ask(convert_sync_batchnorm(model))) == before
    built = nn.Sequential(nn.Conv2d(3, 4, 1), SyncBatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), SyncBatchNorm2d(4))
    assert count(ask(built)) == before


def by_exact_class(model):
    """thop, profile.py (its count of operations), and Opacus, validators/module_validator.py: tables whose keys are exact classes."""
    return [type(m) for m in model.modules() if type(m) in BN_TYPES]


def test_tables_of_exact_classes_find_a_reverted_copy():
    """No subclass is in such a table. docs/sharp_bits.md names the remedy: give the tool a reverted copy."""
    model = convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    assert by_exact_class(model) == []
    assert by_exact_class(revert_sync_batchnorm(copy.deepcopy(model))) == [nn.BatchNorm2d]
    assert isinstance(model[1], syncbn.SyncBatchNorm2d)


def test_a_parametrized_module_changes_its_class_below_the_parametrization():
    layer = nn.BatchNorm2d(3)
    assert record.class_below_parametrization(layer) is nn.BatchNorm2d
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    assert record.class_below_parametrization(layer) is nn.BatchNorm2d
    weight = layer.weight
    record.change_class(layer, nn.BatchNorm3d)
    assert record.class_below_parametrization(layer) is nn.BatchNorm3d and isinstance(layer, nn.BatchNorm3d)
    assert torch.equal(layer.weight, weight) and parametrize.is_parametrized(layer, "weight")
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.BatchNorm3d
