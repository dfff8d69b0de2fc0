"""The law: the type that autocast, a wrapper or a cast gives a layer comes out of it again; inside, the statistics are float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import syncbn
from support.models import two_norms
from support.oracle import TOLERANCE, assert_close, batch_norm_step

HALVES = [torch.float16, torch.bfloat16]


def net() -> nn.Sequential:
    return two_norms(1, (3, 8, 4))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_keeps_types_and_accuracy(world, dtype, device):
    """16-bit activations come out as they went in, float32 parameters get float32 gradients, and the statistics are accurate."""
    model = syncbn.convert_sync_batchnorm(net(), world.group).to(device)
    seen = []
    model[1].register_forward_hook(lambda module, inputs, y: seen.append((inputs[0].detach(), y)))
    x = (torch.randn(5, 3, 7) + world.rank).to(device).requires_grad_()
    with torch.autocast(device, dtype):
        y = model(x)
    y.float().square().sum().backward()
    inside, outside = seen[0]
    assert y.dtype == inside.dtype == outside.dtype == dtype
    assert x.grad.dtype == model[1].weight.grad.dtype == model[1].running_var.dtype == torch.float32
    whole = torch.cat(world.all_gather(inside.cpu()))
    want = batch_norm_step(whole, whole)
    assert_close(outside.cpu(), want.y.split(5)[world.rank], TOLERANCE[dtype], "y", want.y)
    assert_close(model[1].running_var.cpu(), want.running_var, TOLERANCE[torch.float32], "running_var")


@pytest.mark.parametrize("buffers", ["16-bit buffers", "float32 buffers"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_modules_keep_types_and_accuracy(world, dtype, buffers):
    """`model.half()` casts parameters and buffers. DeepSpeed casts parameters and keeps buffers."""
    model = syncbn.convert_sync_batchnorm(net(), world.group).to(dtype)
    if buffers.startswith("float32"):
        for module in (model[1], model[4]):
            for name in ("running_mean", "running_var"):
                setattr(module, name, getattr(module, name).float())
    seen = []
    model[1].register_forward_hook(lambda module, inputs, y: seen.append((inputs[0].detach(), y.detach())))
    for training in (True, False):
        x = (torch.randn(5, 3, 7) + world.rank).to(dtype).requires_grad_()
        y = model.train(training)(x)
        y.float().square().sum().backward()
        assert y.dtype == x.grad.dtype == model[1].weight.grad.dtype == dtype
        assert y.isfinite().all() and x.grad.isfinite().all()
    inside, outside = seen[0]
    whole = torch.cat(world.all_gather(inside))
    want = batch_norm_step(whole, whole)
    assert_close(outside, want.y.split(5)[world.rank], TOLERANCE[dtype], "y", want.y)
    stored = torch.float32 if buffers.startswith("float32") else dtype
    assert model[1].running_mean.dtype == model[1].running_var.dtype == stored
    assert_close(model[1].running_mean, want.running_mean, TOLERANCE[stored], "running_mean", 0.1 * whole.double())
    assert_close(model[1].running_var, want.running_var, TOLERANCE[stored], "running_var")


def test_buffers_may_have_another_type_than_parameters(world):
    """A wrapper that casts only the buffers leaves float32 parameters and bfloat16 buffers."""
    layer = syncbn.SyncBatchNorm(3, process_group=world.group)
    for name in ("running_mean", "running_var"):
        setattr(layer, name, getattr(layer, name).bfloat16())
    x = torch.randn(6, 3, 4)
    assert layer(x).dtype == torch.float32
    assert layer.eval()(x).dtype == torch.float32
    assert layer.running_var.dtype == torch.bfloat16 and not torch.equal(layer.running_var, torch.ones(3).bfloat16())


# ---- FSDP -----------------------------------------------------------------------------------------------------------------------


def train(model, batches, scale=1.0):
    """One step of SGD on each batch, for a sum of squares. Returns the outputs."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ys = []
    for x in batches:
        y = model(x)
        (y.square().sum() * scale).backward()
        optimizer.step()
        optimizer.zero_grad()
        ys.append(y.detach())
    return ys


@pytest.mark.process_group
@pytest.mark.parametrize("whole_model", [True, False], ids=["one unit", "a unit for each layer"])
def test_fsdp2_equals_the_whole_batch(world, whole_model):
    """fully_shard: sharded parameters, gradients averaged over the ranks."""
    plain, model = net().double(), syncbn.convert_sync_batchnorm(net().double())
    mesh = init_device_mesh("cpu", (world.size,))
    if not whole_model:
        for layer in model:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    counts = (3,) * (world.size - 1) + (5,)
    batches = torch.randn(3, sum(counts), 3, 7, dtype=torch.float64)
    want = train(plain, batches)
    got = train(model, [world.mine(x, counts) for x in batches], scale=world.size)
    for one, other in zip(got, want, strict=True):
        assert_close(one, world.mine(other, counts), 1e-9, "y", other)
    for name, buffer in plain.named_buffers():
        assert_close(model.get_buffer(name), buffer, 1e-9, name)


@pytest.mark.process_group
@pytest.mark.parametrize("output_dtype", [None, torch.float32], ids=str)
def test_fsdp2_mixed_precision_keeps_types(world, output_dtype):
    """Parameters and activations are bfloat16, gradients and buffers float32. Lightning's issue 18802 and PyTorch's 96203 ask for it."""
    model = syncbn.convert_sync_batchnorm(net())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=output_dtype)
    fully_shard(model, mesh=init_device_mesh("cpu", (world.size,)), mp_policy=policy)
    seen = []
    model[1].register_forward_hook(lambda module, inputs, y: seen.append((inputs[0].dtype, module.weight.dtype, y.dtype)))
    ys = train(model, torch.randn(2, 4, 3, 7))
    assert seen == [(torch.bfloat16,) * 3] * 2
    assert ys[0].dtype == (output_dtype or torch.bfloat16)
    assert all(y.isfinite().all() for y in ys)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model[1].running_var.dtype == torch.float32


@pytest.mark.process_group
@pytest.mark.parametrize("wrapped", [True, False], ids=["auto-wrapped", "one unit"])
def test_fsdp1_recognizes_the_layer_as_a_batch_norm(world, wrapped):
    """If FSDP wraps units by a policy, it keeps batch norms out of mixed precision, and recognizes this layer by its base
    class. In one unit the layer has 16-bit parameters as the rest does; both train."""
    model = FullyShardedDataParallel(
        syncbn.convert_sync_batchnorm(net()),
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, buffer_dtype=torch.bfloat16),
        auto_wrap_policy=ModuleWrapPolicy({nn.Conv1d}) if wrapped else None,
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    seen = []
    for module in model.modules():
        if isinstance(module, syncbn.SyncBatchNorm):
            module.register_forward_hook(lambda m, inputs, y: seen.append((m.weight.dtype, m.running_var.dtype, y.dtype)))
    ys = train(model, torch.randn(2, 4, 3, 7))
    inside = torch.float32 if wrapped else torch.bfloat16
    assert seen == [(inside, inside, torch.bfloat16)] * 4  # FSDP casts the output back for the next layer
    assert all(y.isfinite().all() for y in ys)
