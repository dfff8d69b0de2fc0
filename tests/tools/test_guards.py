"""What would be lost silently is an error with a remedy: activations as modules, groups in pickles, options in other converters."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import syncbn
from syncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.activation import MODULES, NAMES, module_of, parse

# ---- Activations ----------------------------------------------------------------------------------------------------------------------

NOT_NAMES = {  # value: the remedy that the error names
    **{f"module of {name}": (module_of(name, 0.01), f'write activation="{name}"') for name in NAMES},
    **{f"class of {name}": (MODULES[parse(name)], f'write activation="{name}"') for name in NAMES},
    "module with a slope": (nn.LeakyReLU(0.3), 'write activation="leaky_relu", negative_slope=0.3'),
    "function": (F.relu, 'write activation="relu"'),
    "torch's function": (torch.relu, 'write activation="relu"'),
    "activation that no kernel has": (nn.GELU(), "put it after the layer"),
}


@pytest.mark.world_size(1)
@pytest.mark.parametrize("name", NOT_NAMES)
def test_an_activation_that_is_not_a_name_is_refused_with_the_name_to_write(name):
    value, remedy = NOT_NAMES[name]
    layer = SyncBatchNorm(3)
    for give in (
        lambda: SyncBatchNorm(3, activation=value),
        lambda: syncbn.SyncBatchNorm2d(3, activation=value),
        lambda: syncbn.SyncBatchNormalization(activation=value),
        lambda: setattr(layer, "activation", value),
    ):
        with pytest.raises(ValueError, match="activation must be None or a name") as error:
            give()
        assert remedy in str(error.value)
    assert layer.activation is None and not list(layer.children())


# ---- Other converters -----------------------------------------------------------------------------------------------------------------
# Each makes a new layer of the old one's tensors and asks for the old one's children, as the converter of the project in its name does.


def torchs_converter(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def timms_converter(module):
    """timm, layers/norm_act.py convert_sync_batchnorm."""
    converted = module
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        converted = nn.SyncBatchNorm(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
        if module.affine:
            with torch.no_grad():
                converted.weight, converted.bias = module.weight, module.bias
        converted.running_mean, converted.running_var = module.running_mean, module.running_var
    for name, child in module.named_children():
        converted.add_module(name, timms_converter(child))
    return converted


class ApexLayer(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input): ...


def apexs_converter(module):
    """apex, parallel/__init__.py convert_syncbn_model: it copies the parameters and keeps the buffers."""
    converted = module
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        converted = ApexLayer(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
        converted.running_mean, converted.running_var = module.running_mean, module.running_var
        if module.affine:
            converted.weight.data, converted.bias.data = module.weight.data.clone(), module.bias.data.clone()
    for name, child in module.named_children():
        converted.add_module(name, apexs_converter(child))
    return converted


CONVERTERS = [torchs_converter, timms_converter, apexs_converter]


def fused():
    return convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), fuse_activation=True)


WITH_OPTIONS = {
    "fused": (fused, "activation='relu'"),
    "built": (lambda: nn.Sequential(SyncBatchNorm(4, activation="silu")), "activation='silu'"),
    "biased": (lambda: nn.Sequential(SyncBatchNorm(4, unbiased=False)), "unbiased=False"),
    "weighted": (lambda: nn.Sequential(SyncBatchNorm(4, weighting="ranks", affine=False)), "weighting='ranks'"),
}


@pytest.mark.world_size(1)
@pytest.mark.parametrize("converter", CONVERTERS, ids=lambda converter: converter.__name__)
@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_another_converter_cannot_lose_an_option_in_silence(name, converter):
    make, option = WITH_OPTIONS[name]
    with pytest.raises(RuntimeError, match="call syncbn.revert_sync_batchnorm") as error:
        converter(make())
    assert option in str(error.value) and ('layer "0"' in str(error.value)) == (name == "fused")


@pytest.mark.world_size(1)
@pytest.mark.parametrize("converter", CONVERTERS, ids=lambda converter: converter.__name__)
def test_after_the_remedy_another_converter_keeps_the_function(converter):
    model = fused()
    x = torch.randn(2, 4, 3, 3)
    want = model.eval()(x)
    converted = converter(revert_sync_batchnorm(model))
    assert not isinstance(converted[0], SyncBatchNorm) and torch.allclose(converted.eval()(x), want, atol=1e-6)


@pytest.mark.world_size(1)
def test_other_converters_convert_a_layer_without_such_options_and_every_layer_lists_its_children():
    for converter in CONVERTERS:
        assert not isinstance(converter(nn.Sequential(convert_sync_batchnorm(nn.BatchNorm2d(4))))[0], SyncBatchNorm)
    layer = SyncBatchNorm(4, activation="relu")
    other = nn.BatchNorm2d(4)  # a batch norm without the layer's tensors, in the function that asks for the layer's children
    assert dict(layer.named_children()) == {} and list(layer.children()) == [] and other.num_features == 4


# ---- Process groups -------------------------------------------------------------------------------------------------------------------


def group_of_rank_0(kind):
    """A group that only rank 0 is a member of, made by all ranks."""
    return dist.new_group([0]) if kind == "group" else DeviceMesh("cpu", [0])


@pytest.mark.process_group
@pytest.mark.parametrize("kind", ["group", "mesh"])
def test_a_group_without_this_rank_is_an_error_only_if_it_is_used(world, kind):
    group = group_of_rank_0(kind)
    layers = [
        SyncBatchNorm(4, process_group=group),
        convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(4)), group)[0],
        convert_sync_batchnorm(SyncBatchNorm(4), group),
    ]
    x = torch.randn(5, 4)
    for layer in layers:
        assert layer.eval()(x).isfinite().all()
        if world.rank == 0:
            assert layer.train()(x).isfinite().all()
        else:
            with pytest.raises(ValueError, match="does not contain this rank") as error:
                layer.train()(x)
            name = f'layer "{layer.layer_name}" (' if layer.layer_name else ""
            assert str(error.value).startswith(f"{name}{type(layer).__name__}(4)")


@pytest.mark.world_size(2)
def test_a_null_communicator_is_an_error_only_if_it_is_used(world):
    if world.group is None:
        pytest.skip("under torchrun there is no MPI communicator")
    from mpi4py import MPI

    layer = convert_sync_batchnorm(nn.BatchNorm1d(4), MPI.COMM_NULL)
    assert layer.eval()(torch.randn(5, 4)).isfinite().all()
    with pytest.raises(ValueError, match="does not contain this rank"):
        layer.train()(torch.randn(5, 4))


@pytest.mark.world_size(2)
def test_join_refuses_a_group_of_mpi_and_leaves_the_model_unchanged(world):
    if world.group is None:
        pytest.skip("under torchrun there is no MPI communicator")
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(4)), world.group)
    with pytest.raises(ValueError, match="belongs to torch.distributed"), syncbn.join(model):
        pass
    assert model(torch.randn(5, 4)).isfinite().all()


@pytest.mark.process_group
def test_pickling_a_layer_with_a_process_group_names_the_layer_and_the_remedy(world):
    group = dist.new_group(list(range(world.size)))
    model = convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), group)
    for save in (pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
        with pytest.raises(TypeError, match=r'layer "1" \(SyncBatchNorm1d\(4\)\) .* save model.state_dict\(\)'):
            save(model)
        with pytest.raises(TypeError, match=r'layer "1" \(SyncBatchNorm1d\(4\)\) '), syncbn.join(model):
            save(model)
    assert copy.copy(model[1]).process_group is group and copy.deepcopy(model)[1].process_group is group
    model[1].process_group = None
    assert type(pickle.loads(pickle.dumps(model))[1]) is syncbn.SyncBatchNorm1d
    model[1].process_group = group
    assert type(pickle.loads(pickle.dumps(revert_sync_batchnorm(copy.deepcopy(model))))[1]) is nn.BatchNorm1d


@pytest.mark.world_size(1)
def test_a_copy_shares_tensors_and_a_layer_may_be_built_without_a_bias():
    layer = SyncBatchNorm(4, bias=False)
    assert layer.bias is None and list(layer.state_dict()) == ["weight", "running_mean", "running_var", "num_batches_tracked"]
    assert copy.copy(layer).weight is layer.weight and layer(torch.randn(3, 4)).isfinite().all()
