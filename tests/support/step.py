"""One training step of a layer against the oracle."""

from __future__ import annotations

import torch

import syncbn
from support.oracle import TOLERANCE, assert_close, batch_norm_step
from syncbn.layout import is_channels_last

SPLITS = {  # rows per rank
    1: [(6,)],
    2: [(3, 3), (5, 1), (0, 4)],
    3: [(2, 2, 2), (5, 1, 0)],  # uneven, with an empty batch
    4: [(2, 2, 2, 2), (0, 5, 1, 2)],
}


def check(world, counts, device, shape, dtype, *, parameter_dtype=None, layout=None, residual=False, **options):
    """One training step on this rank's rows against the oracle on the whole batch."""
    c = shape[0]
    whole = (torch.randn(sum(counts), *shape, dtype=torch.float64) * 3 + 2).to(dtype)
    dy = torch.randn_like(whole)
    res = torch.randn_like(whole) if residual else None
    layer = syncbn.SyncBatchNorm(c, process_group=world.group, dtype=parameter_dtype or dtype, **options).to(device)
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.randn(c))
            layer.bias.copy_(torch.randn(c))
    x = world.mine(whole, counts).to(device)
    x = (layout(x) if layout else x).requires_grad_()
    my_res = world.mine(res, counts).to(device).requires_grad_() if residual else None
    y = layer(x, my_res)
    y.backward(world.mine(dy, counts).to(device))
    # Before the first comparison: a rank that finds an error leaves no other waiting.
    gradients = [world.all_gather(parameter.grad) for parameter in layer.parameters()]
    running_vars = world.all_gather(layer.running_var) if layer.track_running_stats else []

    momentum = 1.0 if layer.momentum is None else layer.momentum  # the cumulative average of one batch is that batch
    want = batch_norm_step(
        whole,
        dy,
        layer.weight,
        layer.bias,
        res,
        options.get("activation"),
        momentum,
        eps=layer.eps,
        unbiased=layer.unbiased,
    )
    tolerance = TOLERANCE[dtype]
    assert y.dtype == dtype and x.grad.dtype == dtype
    if layout is not None:
        assert is_channels_last(y) and is_channels_last(x.grad)
    assert_close(y, world.mine(want.y, counts), tolerance, "y", want.y)
    assert_close(x.grad, world.mine(want.dx, counts), tolerance, "dx", want.terms["dx"])
    if residual:
        assert_close(my_res.grad, world.mine(want.dresidual, counts), tolerance, "dresidual", want.dresidual)
    if layer.affine:  # local gradients: their sum over the ranks is the whole batch's
        for name, parameter, wanted, parts in zip(
            ("dweight", "dbias"), (layer.weight, layer.bias), (want.dweight, want.dbias), gradients, strict=True
        ):
            assert parameter.grad.dtype == parameter.dtype
            total = torch.stack(parts).double().sum(0)
            assert_close(total, wanted, max(tolerance, TOLERANCE[parameter.dtype]), name, want.terms[name])
    if layer.track_running_stats:
        stats_tolerance = TOLERANCE[layer.running_mean.dtype]
        assert_close(layer.running_mean, want.running_mean, stats_tolerance, "running_mean", momentum * whole.double())
        assert_close(layer.running_var, want.running_var, stats_tolerance, "running_var")
        assert layer.num_batches_tracked == 1
        for other in running_vars:
            assert torch.equal(other, layer.running_var), "running_var differs between ranks"
