"""Bad input, on any number of ranks: an error that leaves no rank out of step, or the right result. Other failures: docs/faults.md.

After most errors the ranks exchange once more, to show that none of them is out of step.
"""

from __future__ import annotations

import re
import textwrap

import pytest
import torch
from torch import nn

import syncbn
from support.oracle import TOLERANCE, assert_close, batch_norm_step, relative_error
from support.processes import two_ranks
from syncbn.activation import NAMES


def assert_ranks_in_step(world):
    """A layer still works on all ranks."""
    x = torch.randn(2, 3, 4) + world.rank
    y = syncbn.SyncBatchNorm(3, process_group=world.group)(x)
    mean = torch.stack(world.all_gather(y.detach())).mean((0, 1, 3))
    assert mean.abs().max() < 1e-5  # of values of size 1, in float32


X = torch.zeros(2, 3, 4)
CALLS = {  # what is wrong: (arguments of sync_batch_norm, exception, words that the message must have)
    "1-D input": (dict(input=torch.zeros(3)), ValueError, ["input", "2 dimensions", "[3]"]),
    "integer input": (dict(input=X.long()), TypeError, ["input", "float32", "int64"]),
    "complex input": (dict(input=X.to(torch.complex64)), TypeError, ["input", "complex64"]),
    "weight too long": (dict(weight=torch.ones(4)), ValueError, ["weight", "[3]", "[2, 3, 4]", "[4]"]),
    "weight of two dimensions": (dict(weight=torch.ones(3, 1)), ValueError, ["weight", "[3]", "[3, 1]"]),
    "bias too short": (dict(bias=torch.ones(2)), ValueError, ["bias", "[3]", "[2]"]),
    "weight in a dtype of its own": (dict(weight=torch.ones(3).half()), ValueError, ["weight", "float32", "float16"]),
    "integer running_mean": (
        dict(running_mean=torch.zeros(3).long(), running_var=torch.ones(3)),
        ValueError,
        ["running_mean", "floating point", "int64"],
    ),
    "running_mean alone": (dict(running_mean=torch.zeros(3)), ValueError, ["running_var", "both or neither"]),
    "running_var too long": (
        dict(running_mean=torch.zeros(3), running_var=torch.ones(5)),
        ValueError,
        ["running_var", "[3]", "[5]"],
    ),
    "weight on another device": (dict(weight=torch.ones(3, device="meta")), ValueError, ["weight", "cpu", "meta"]),
    "residual of another shape": (dict(residual=X[:1]), ValueError, ["residual", "[2, 3, 4]", "[1, 3, 4]"]),
    "residual that fits a channels-last input only if it is broadcast": (
        dict(input=torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last), residual=torch.ones(1, 3, 4, 4)),
        ValueError,
        ["residual", "[2, 3, 4, 4]", "[1, 3, 4, 4]"],
    ),
    "residual of another dtype": (dict(residual=X.double()), ValueError, ["residual", "float32", "float64"]),
    "unknown activation": (dict(activation="gelu"), ValueError, ["activation", *map(repr, NAMES), "'gelu'"]),
    "unknown weighting": (dict(weighting="equal"), ValueError, ["weighting", "'samples'", "'ranks'", "'equal'"]),
    "unknown process_group": (dict(process_group="world"), ValueError, ["process_group", "DeviceMesh", "mpi4py", "str"]),
    "momentum of a cumulative average": (dict(momentum=None), ValueError, ["momentum", "SyncBatchNorm"]),
    "eval without statistics": (dict(training=False), ValueError, ["running_mean", "running_var"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_bad_argument_is_named_before_any_exchange(world, name):
    changes, exception, words = CALLS[name]
    arguments = {"input": X, "running_mean": None, "running_var": None, "process_group": world.group} | changes
    with pytest.raises(exception) as error:
        syncbn.sync_batch_norm(**arguments)
    for word in words:
        assert word in str(error.value), f"{word!r} is missing in {error.value}"
    assert_ranks_in_step(world)


def test_a_wrong_number_of_channels_or_dimensions_is_named_before_any_exchange(world):
    layer = syncbn.SyncBatchNorm(4, process_group=world.group)
    with pytest.raises(ValueError, match=r"4 channels.*num_features.*\[2, 3, 4\]"):
        layer(X)
    with pytest.raises(ValueError, match="2 dimensions"):
        layer(torch.zeros(4))
    assert_ranks_in_step(world)


def without_memory():
    x = X.clone()
    x.untyped_storage().resize_(0)
    return x


SPOILT = {  # what is wrong with a BatchNorm1d(3) or its input: (attributes that are set, the input)
    "channels": ({}, lambda: torch.zeros(2, 5, 4)),
    "dimensions": ({}, lambda: X[0, 0]),
    "dimensions, which torch checks": ({}, lambda: X[..., None]),
    "dtype": ({}, X.long),
    "device": ({}, lambda: X.to("meta")),
    "freed memory": ({}, without_memory),
    "a parameter": ({"weight": nn.Parameter(torch.ones(3).half())}, lambda: X),
    "the count of batches": ({"num_batches_tracked": torch.tensor(0.0)}, lambda: X),
    "eps": ({"eps": 0.0}, lambda: X),
    "an option": ({"weighting": "equal"}, lambda: X),
    "the process group": ({"process_group": 3}, lambda: X),
    "a dual number": ({}, lambda: torch.autograd.forward_ad.make_dual(X, X)),
}


@pytest.mark.parametrize("name", SPOILT)
def test_an_error_before_an_exchange_begins_with_the_layer(world, name):
    attributes, make = SPOILT[name]
    model = syncbn.convert_sync_batchnorm(nn.ModuleDict({"stem": nn.Sequential(nn.BatchNorm1d(3))}), world.group)
    layer = model["stem"][0]
    for attribute, value in attributes.items():
        setattr(layer, attribute, value)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(Exception, match=r'^layer "stem\.0" \(SyncBatchNorm1d\(3\)\): '):
        layer(make())
    assert_ranks_in_step(world)


@pytest.mark.parametrize(
    "changed", [torch.tensor(0, dtype=torch.int32), torch.tensor(0, device="meta"), torch.tensor([0, 0])], ids=["int32", "meta", "two"]
)
def test_a_bad_count_of_batches_is_named_before_any_exchange(world, changed):
    layer = syncbn.SyncBatchNorm(3, process_group=world.group)
    layer.num_batches_tracked = changed
    with pytest.raises(ValueError, match="num_batches_tracked must be one int64 on cpu"):
        layer(X)
    assert_ranks_in_step(world)


@pytest.mark.parametrize("option", [{"activation": "gelu"}, {"weighting": "equal"}], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_bad_option_of_a_converted_layer_is_an_error_before_any_exchange(world, option, training):
    layer = syncbn.convert_sync_batchnorm(nn.BatchNorm1d(3), world.group).train(training)
    for name, value in option.items():
        setattr(layer, name, value)
    with pytest.raises(ValueError, match=f"{name} must be .*one of .* got '{value}'"):
        layer(X)
    assert_ranks_in_step(world)


@pytest.mark.parametrize("option", [{"activation": "gelu"}, {"weighting": "equal"}, {"process_group": 3}], ids=str)
def test_a_bad_option_is_an_error_when_the_layer_is_built(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        syncbn.SyncBatchNorm(4, **option)


@pytest.mark.process_group
@pytest.mark.world_size(2, 3, 4)
def test_a_group_without_this_rank_is_refused(world):
    import torch.distributed as dist

    group = dist.new_group([0])
    if world.rank > 0:
        with pytest.raises(ValueError, match="does not contain this rank"):
            syncbn.SyncBatchNorm(3, process_group=group)(torch.randn(4, 3))
    assert_ranks_in_step(world)


@pytest.mark.process_group
@pytest.mark.world_size(2, 4)
def test_a_device_mesh_of_two_dimensions_is_refused(world):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("a", "b"))
    with pytest.raises(ValueError, match="one-dimensional DeviceMesh, got 2"):
        syncbn.SyncBatchNorm(3, process_group=mesh)
    assert_ranks_in_step(world)


@pytest.mark.parametrize("rank_with_the_value", [0, -1])
@pytest.mark.parametrize("weighting", ["samples", "ranks"])
def test_one_value_per_channel_over_all_ranks_raises_on_every_rank(world, rank_with_the_value, weighting):
    holder = rank_with_the_value % world.size
    layer = syncbn.SyncBatchNorm(3, process_group=world.group, weighting=weighting)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1 if world.rank == holder else 0, 3))
    assert_ranks_in_step(world)


@pytest.mark.world_size(2, 3, 4)
def test_one_value_on_each_rank_is_enough(world):
    """Together they form a valid batch."""
    layer = syncbn.SyncBatchNorm(3, process_group=world.group)
    whole = torch.randn(world.size, 3)
    y = layer(whole[world.rank : world.rank + 1])
    assert relative_error(y, batch_norm_step(whole, whole).y[world.rank : world.rank + 1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_no_samples_anywhere_changes_nothing(world, dtype):
    layer = syncbn.SyncBatchNorm(3, process_group=world.group, dtype=dtype, activation="relu")
    x = torch.empty(0, 3, 4, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape and x.grad.shape == x.shape
    assert torch.equal(layer.running_mean, torch.zeros(3, dtype=dtype)) and torch.equal(layer.running_var, torch.ones(3, dtype=dtype))
    assert layer.num_batches_tracked == 0
    for grad in (layer.weight.grad, layer.bias.grad):
        assert torch.equal(grad, torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_on_one_rank_propagate_as_in_batch_norm(world, value, dtype):
    """The channel of such a value is lost on every rank; the other channels are as if there were none."""
    counts = (2,) * world.size
    whole, dy = torch.randn(2, sum(counts), 3, 5).to(dtype)
    whole[-1, 1, 2] = value
    layer = syncbn.SyncBatchNorm(3, process_group=world.group, dtype=dtype)
    x = world.mine(whole, counts).requires_grad_()
    y = layer(x)
    y.backward(world.mine(dy, counts))
    want = batch_norm_step(whole, dy)
    results = {"y": (y, world.mine(want.y, counts)), "dx": (x.grad, world.mine(want.dx, counts))}
    buffers = {
        "running_mean": (layer.running_mean[None], want.running_mean[None]),
        "running_var": (layer.running_var[None], want.running_var[None]),
    }
    for name, (got, wanted) in (results | buffers).items():
        assert not wanted[:, 1].isfinite().any()
        assert not got[:, 1].isfinite().any(), name
        assert name in buffers or torch.equal(got.isnan(), wanted.isnan()), name  # a mean may be NaN where the wanted one is inf
        assert_close(got[:, [0, 2]], wanted[:, [0, 2]], TOLERANCE[dtype], name, want.y[:, [0, 2]])
    assert layer.weight.grad.isfinite().tolist() == [True, False, True] and layer.bias.grad.isfinite().all()


@pytest.mark.world_size(1)
@pytest.mark.parametrize("failing", [0, 1], ids=["rank 0 fails", "rank 1 fails"])
def test_an_error_on_one_rank_fails_the_others_by_the_timeout(tmp_path, forks, subprocess_env, failing):
    """The rank that fails does not exchange. The one that waits for it gets an error after the group's timeout."""
    timeout = 5
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(f"""
        import torch, torch.distributed as dist, syncbn, sys, time
        syncbn.init_process_group("gloo", timeout={timeout})
        layer = syncbn.SyncBatchNorm(3)
        layer.layer_name = "encoder.bn"
        x = torch.randn(2, 4 if dist.get_rank() == {failing} else 3, 5)
        start = time.time()
        try:
            layer(x)
        except ValueError as error:
            print("named:", error, flush=True)
            time.sleep({2 * timeout})  # its process must not end, which would end the wait before the timeout
        except RuntimeError as error:
            print(f"after {{time.time() - start:.1f}} s: {{error}}", flush=True)
            raise
        """)
    )
    ended = forks.run(script, env=subprocess_env, timeout=60, ranks=two_ranks())
    failed, other = ended[failing], ended[1 - failing]
    assert 'named: layer "encoder.bn" (SyncBatchNorm(3)): input must have 3 channels' in failed.stdout
    assert other.returncode != 0
    waited = re.search(rf'after ([\d.]+) s: layer "encoder\.bn" .*\nrank {1 - failing} of 2 could not complete its forward', other.stdout)
    assert waited, other.stdout
    assert timeout - 1.5 < float(waited.group(1)) < timeout + 4, other.stdout


@pytest.mark.world_size(1)
def test_the_cause_of_an_error_in_a_step_is_kept():
    """Here a hook fails when the layer saves a tensor. The layer's tensors are not at fault, so the message must not blame them."""
    cause = OSError("no space left")

    def fails(t):
        raise RuntimeError("cannot offload") from cause

    with torch.autograd.graph.saved_tensors_hooks(fails, lambda t: t), pytest.raises(RuntimeError, match="cannot offload") as error:
        syncbn.SyncBatchNorm(3)(X.clone().requires_grad_())
    assert error.value.__cause__ is cause
