"""Three gates for each op: it equals float64 batch normalization, its schema and fake kernel hold, and it is accurate on bad data."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

import syncbn
from support.layouts import channels_last, every_layout
from support.op_cases import TAGGED
from support.op_checks import CHECKS
from support.oracle import TOLERANCE, assert_close, batch_norm_step, relative_error
from syncbn import moments, ops, reference
from syncbn.activation import NAMES, Activation, keeps_mask, keeps_residual
from syncbn.layout import is_channels_last, mask_bytes, outer_c_inner

pytestmark = pytest.mark.world_size(1)

SHAPES = [
    (4, 1),  # one channel
    (6, 5),
    (0, 3, 4),  # empty batch
    (0, 3),
    (1, 3, 5, 7),
    (3, 7, 5, 11),  # primes: nothing divides a warp
    (2, 3, 40, 60),  # more than one chunk of samples, and a rest
    (4, 16, 7, 7),
    (2, 8, 1, 1),  # both contiguous and channels-last
    (2, 3, 2, 3, 5),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_layout
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", Activation, ids=lambda a: a.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ops_together_equal_batch_norm(shape, layout, residual, activation, dtype):
    c = shape[1]
    make = lambda: layout(torch.randn(shape).to(dtype))  # noqa: E731
    x, dy, res = make(), make(), make() if residual else None
    weight, bias = torch.randn(2, c, dtype=dtype)
    running_mean, running_var, tracked = torch.zeros(c), torch.ones(c), torch.tensor(0)

    stats = ops.stats(x, False)
    y, mask = ops.normalize(x, stats, weight, bias, res, running_mean, running_var, tracked, 0.1, True, 1e-5, activation, 0.01)
    masked = keeps_mask(activation, residual)
    assert mask.numel() == (mask_bytes(x) if masked else 0)
    how = (weight, bias, res if keeps_residual(activation, residual) else None, mask if masked else None, 1e-5, activation, 0.01)
    sums, dweight, dbias = ops.backward_reduce(dy, x, stats, *how)
    dx, dz = ops.backward_input(dy, sums, x, stats, *how)
    assert dz.shape == (x.shape if residual and activation != Activation.none else (0,))

    assert stats.dtype == sums.dtype == torch.float64
    assert y.dtype == dx.dtype == dweight.dtype == dbias.dtype == dtype
    assert is_channels_last(y) == is_channels_last(x) and is_channels_last(dx) == is_channels_last(x)
    if shape[0] == 0:
        assert stats.count_nonzero() == 0 and sums.count_nonzero() == 0 and dweight.count_nonzero() == 0 and tracked == 0
        assert torch.equal(running_mean, torch.zeros(c)) and torch.equal(running_var, torch.ones(c))
        return
    want = batch_norm_step(x, dy, weight, bias, res, None if activation == Activation.none else activation.name)
    for name, got in {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}.items():
        assert_close(got, getattr(want, name), TOLERANCE[dtype], name, want.terms.get(name))
    if dz.numel():
        assert_close(dz, want.dresidual, TOLERANCE[dtype], "dz")
    assert_close(running_mean, want.running_mean, TOLERANCE[torch.float32], "running_mean", 0.1 * x.double())
    assert_close(running_var, want.running_var, TOLERANCE[torch.float32], "running_var")
    assert tracked == 1


@pytest.mark.parametrize("rank_weighted", [False, True])
def test_stats_holds_shift_sums_squares_weight_and_count(rank_weighted):
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    got = ops.stats(x, rank_weighted)
    sums, zeros = torch.cat([x.sum((0, 2)), x.square().sum((0, 2))]), torch.zeros(3)
    want = torch.cat([zeros, sums / 20, torch.tensor([1.0, 20, 0, 0])] if rank_weighted else [zeros, sums, torch.tensor([20.0, 20, 0, 0])])
    assert_close(got, want, 1e-14, "stats")  # sums of 20 values
    for shifted in (False, True):
        assert ops.stats(x[:0], rank_weighted, shifted).count_nonzero() == 0


def test_stats_about_a_shift_merge_to_those_of_all_samples():
    x = torch.randn(9, 3, 5, dtype=torch.float64) + 1e8
    whole, first, rest = (ops.stats(t, False, True) for t in (x, x[:4], x[4:]))
    assert torch.equal(whole[:3], x[0, :, 0]) and torch.equal(rest[:3], x[4, :, 0])
    for merged in (moments.merge(first, rest), moments.merge(moments.merge(torch.zeros_like(first), first), rest)):
        assert_close(merged, whole, 1e-14, "merged", torch.cat([torch.zeros(3), torch.full((10,), 45.0)]))
    about_mean = moments.rebase(whole, reference.finalize(whole, 0.0)[0])
    assert (about_mean[3:6].abs() < 1e-6).all()  # the mean is rounded at 1e8


@pytest.mark.parametrize("case", TAGGED, ids=str)
@pytest.mark.parametrize("op", ["normalize", "backward_input"])
def test_the_reference_finds_out_whether_all_ranks_have_sent_one_tag(op, case):
    CHECKS[op](reference, case)


def test_tags_are_summed_and_survive_another_shift():
    x = torch.randn(4, 3, 5)
    first, second = ops.stats(x, False, True, 3), ops.stats(x, False, True, 2**20 - 1)
    assert first[-2:].tolist() == [3, 9] and second[-2:].tolist() == [2**20 - 1, (2**20 - 1) ** 2]
    assert moments.rebase(first, torch.ones(3).double())[-2:].tolist() == [3, 9]
    assert moments.merge(first, second)[-2:].tolist() == [2**20 + 2, (2**20 - 1) ** 2 + 9]


def test_mask_has_a_bit_for_each_element_in_memory_order():
    x = torch.randn(2, 3, 5, 7)
    for t in (x, channels_last(x)):
        outer, c, inner = outer_c_inner(t)
        assert (outer, c, inner) == ((2, 3, 35) if t is x else (70, 3, 1))
        packed = reference._pack_bits(t > 0, t)
        assert torch.equal(reference._unpack_bits(packed, t), t > 0)
        row = c if inner == 1 else inner
        flat = reference._in_memory_order(t)
        for f in (0, 1, row - 1, row, t.numel() - 1):  # element f of memory, in row p, has bit f + 8 p
            bit = f + 8 * (f // row)
            assert (packed[bit // 8] >> (bit % 8)) & 1 == (flat[f] > 0)


CASES = {
    "plain": dict(activation=Activation.none),
    "relu and residual": dict(activation=Activation.relu, residual=True),
    "silu and residual": dict(activation=Activation.silu, residual=True),
    "no parameters, no buffers": dict(activation=Activation.leaky_relu, parameters=lambda: (None, None), track=False),
    "momentum None": dict(activation=Activation.none, momentum=None),
    "tag and alarm": dict(alarm=torch.zeros(1, dtype=torch.int32)),
    "one weight for all channels, a column of a matrix": dict(parameters=lambda: (torch.randn(1).expand(3), torch.randn(3, 2)[:, 1])),
}


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_schema_is_the_references_signature(name):
    """For type checkers and editors, the op is the function of the reference."""
    schema = getattr(torch.ops.syncbn, name).default._schema
    parameters = inspect.signature(getattr(reference, name)).parameters.values()
    types = {"Tensor": "Tensor", "Optional[Tensor]": "Tensor | None", "Optional[float]": "float | None"}
    declared = [(a.name, types.get(str(a.type), str(a.type)), a.default_value if a.has_default_value() else None) for a in schema.arguments]
    assert declared == [(p.name, p.annotation, None if p.default is p.empty else p.default) for p in parameters]


@pytest.mark.parametrize("name", CASES)
@every_layout
def test_opcheck_passes(name, layout):
    """Schema, aliasing, fake kernel and traceability of every op, as torch.library checks them."""
    case = {"activation": Activation.none, "residual": False, "parameters": lambda: (torch.randn(3), torch.randn(3)), "track": True}
    case |= {"momentum": 0.1, "alarm": None} | CASES[name]
    x, dy = layout(torch.randn(2, 3, 4, 5)), layout(torch.randn(2, 3, 4, 5))
    residual = layout(torch.randn(2, 3, 4, 5)) if case["residual"] else None
    weight, bias = case["parameters"]()
    buffers = (torch.zeros(3), torch.ones(3), torch.tensor(0)) if case["track"] else (None, None, None)
    activation, verification = case["activation"], () if case["alarm"] is None else (3, 1, case["alarm"])
    stats = ops.stats(x, False)
    normalize_args = (x, stats, weight, bias, residual, *buffers, case["momentum"], True, 1e-5, activation, 0.01, *verification)
    _, mask = ops.normalize(*normalize_args)
    mask = mask if mask.numel() else None
    how = (weight, bias, residual if keeps_residual(activation, True) else None, mask, 1e-5, activation, 0.01)
    sums = ops.backward_reduce(dy, x, stats, *how)[0]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")  # autograd is autograd.py's
    torch.library.opcheck(ops.stats, (x, False), test_utils=checks)
    torch.library.opcheck(ops.normalize, normalize_args, test_utils=checks)
    torch.library.opcheck(ops.backward_reduce, (dy, x, stats, *how), test_utils=checks)
    torch.library.opcheck(ops.backward_input, (dy, sums, x, stats, *how, False, *verification), test_utils=checks)
    if residual is None and not verification:
        momentum_and_epilogue = normalize_args[8:]
        torch.library.opcheck(ops.batch_norm, (x, weight, bias, *buffers, *momentum_and_epilogue), test_utils=checks)
        torch.library.opcheck(ops.batch_norm_backward, (dy, x, stats, weight, bias, 1e-5, activation, 0.01), test_utils=checks)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", [None, *NAMES])
def test_gradcheck_passes(activation, residual):
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 2, dtype=torch.float64).unbind()
    res = torch.randn_like(x) if residual else None
    f = lambda x, w, b, r: syncbn.sync_batch_norm(x, None, None, w, b, residual=r, activation=activation)  # noqa: E731
    inputs = tuple(t if t is None else t.detach().requires_grad_() for t in (x, weight, bias, res))
    assert torch.autograd.gradcheck(f, inputs)


# ---- Accuracy -------------------------------------------------------------------------------------------------------------------


def outliers(x: torch.Tensor, value: float) -> torch.Tensor:
    x = x.clone()
    x[0, :, :1] = value
    return x


NORMAL = torch.randn(2, 5, 40000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ADVERSARIAL = {  # name: (values, bound on var's relative error)
    "mean/std 1": (NORMAL + 1, 1e-7),
    "mean/std 1e2": (NORMAL + 1e2, 1e-7),
    "mean/std 1e4": (NORMAL + 1e4, 1e-6),
    "mean/std 1e5": (NORMAL + 1e5, 4e-6),  # float64 sums on the wire: (mean/std)² 2⁻⁵³ and the shift's rounding
    "std 1e-6 around 0": (NORMAL * 1e-6, 1e-7),
    "var far below eps": (NORMAL * 1e-4 + 3, 1e-6),
    "first value 0 in N(1000, 1)": (outliers(NORMAL + 1000, 0.0), 1e-6),
    "first value 1e4 in N(0, 1)": (outliers(NORMAL, 1e4), 1e-6),
    "leading zeros": (torch.cat([torch.zeros(2, 5, 300).double(), NORMAL + 1000], -1), 1e-6),
    "sparse": (NORMAL.clamp(min=2) - 2, 1e-6),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@every_layout
def test_variance_and_output_stay_accurate_in_float32(name, layout):
    values, bound = ADVERSARIAL[name]
    x = layout(values.float())
    exact = x.double()
    mean, var, _ = reference.finalize(ops.stats(x, False), 1e-5)
    want_var = exact.var((0, 2), unbiased=False)
    assert ((var - want_var).abs() / want_var).max() < bound
    assert ((mean - exact.mean((0, 2))).abs() <= 2e-7 * (exact.mean((0, 2)).abs() + want_var.sqrt())).all()
    y = syncbn.sync_batch_norm(x, None, None)
    want = F.batch_norm(exact, None, None, training=True)
    assert relative_error(y, want) < 2e-6


def test_raw_sums_would_fail_the_accuracy_tests():
    """Shows that the shift is necessary: without it the accuracy test fails by orders of magnitude."""
    x = ADVERSARIAL["mean/std 1e4"][0].float()
    n = x.numel() / x.shape[1]
    var = x.square().sum((0, 2)) / n - (x.sum((0, 2)) / n).square()
    want = x.double().var((0, 2), unbiased=False)
    assert ((var - want).abs() / want).max() > 1e-2


def test_counts_above_float32_and_int32_range_are_exact():
    """The count is a float64: exact beyond 2²⁴ and 2³¹ samples, and beyond fp16's 65504."""
    n = 2.0**31 + 3
    stats = torch.tensor([0, 2 * n, 5 * n, n, n, 0, 0], dtype=torch.float64)
    mean, var, _ = reference.finalize(stats, 0.0)
    assert mean.item() == 2 and var.item() == 1
    running_mean, running_var, tracked = torch.zeros(1).half(), torch.zeros(1).double(), torch.tensor(0)
    reference.update_running_stats(stats, running_mean, running_var, tracked, 1.0, True)
    assert running_mean.item() == 2 and running_var.item() == n / (n - 1)


def test_the_ops_count_beyond_what_float32_and_int32_hold():
    """As above, with what a layer runs: the statistics of many ranks, of which this one has two samples."""
    n = 2.0**31 + 3
    stats, x = torch.tensor([0, 2 * n, 5 * n, n, n, 0, 0], dtype=torch.float64), torch.tensor([[1.0], [4.0]], dtype=torch.float64)
    running_mean, running_var, tracked = torch.zeros(1).double(), torch.zeros(1).double(), torch.tensor(0)
    y, _ = ops.normalize(x, stats, None, None, None, running_mean, running_var, tracked, 1.0, True, 0.0, Activation.none, 0.0)
    assert y.flatten().tolist() == [-1, 2]
    assert running_mean.item() == 2 and running_var.item() == n / (n - 1) != 1
    sums = torch.tensor([3 * n, n, 0, 0], dtype=torch.float64)
    dx, _ = ops.backward_input(x, sums, x, stats, None, None, None, None, 0.0, Activation.none, 0.0)
    assert dx.flatten().tolist() == [1 - 3 + 1, 4 - 3 - 2]


@pytest.mark.parametrize("dtype,n", [(torch.float16, 65504 + 33), (torch.bfloat16, 2**24 + 3), (torch.float32, 2**24 + 3)], ids=str)
def test_more_samples_than_the_dtype_can_count(dtype, n):
    x = torch.zeros(1, 1, n, dtype=dtype)
    x[..., -1] = 1
    layer = syncbn.SyncBatchNorm(1, momentum=1.0)
    y = layer(x)
    shift, *sums, weight, samples, _, _ = ops.stats(x, False).tolist()
    assert shift == 0 and weight == samples == n
    assert sums == pytest.approx([1, 1], rel=1e-7)  # the reference's K is a float32 mean: n of its roundings
    assert_close(layer.running_mean, torch.tensor([1 / n], dtype=torch.float64), TOLERANCE[torch.float32], "running_mean")
    assert_close(layer.running_var, torch.tensor([1 / n], dtype=torch.float64), TOLERANCE[torch.float32], "running_var")
    assert (y[..., :-1] == y[0, 0, 0]).all() and y[..., -1] > 100


def test_nan_passes_through_relu_as_in_torch():
    x = torch.tensor([[1.0, float("nan")], [2.0, 3.0], [4.0, -1.0]])
    y = syncbn.sync_batch_norm(x, None, None, activation="relu")
    want = F.relu(F.batch_norm(x, None, None, training=True))
    assert torch.equal(y.isnan(), want.isnan()) and y[:, 1].isnan().all()


@pytest.mark.parametrize("number", [-1, len(Activation), 1 << 32])
@pytest.mark.parametrize("implementation", [ops, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("op", ["normalize", "backward_reduce", "backward_input"])
def test_an_unknown_activation_is_an_error(op, implementation, number):
    x, stats, sums = torch.ones(2, 3, 4), torch.ones(13).double(), torch.ones(8).double()
    arguments = {
        "normalize": (x, stats, None, None, None, None, None, None, 0.1, True, 1e-5),
        "backward_reduce": (x, x, stats, None, None, None, None, 1e-5),
        "backward_input": (x, sums, x, stats, None, None, None, None, 1e-5),
    }[op]
    with pytest.raises((ValueError, RuntimeError), match=rf"activation must be one of syncbn\.activation\.Activation, got {number}"):
        getattr(implementation, op)(*arguments, number, 0.1)
