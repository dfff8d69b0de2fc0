"""What the compiled ops refuse, and what the errors say."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from syncbn import native, ops
from syncbn.activation import Activation

CPU = native.status()[0]
pytestmark = [pytest.mark.world_size(1), pytest.mark.skipif(not CPU.loaded, reason=CPU.reason)]

X, STATS, W, EPS = torch.ones(2, 3, 4), torch.ones(13).double(), torch.ones(3), 1e-5
CHANNELS_LAST = X.movedim(1, -1).contiguous().movedim(-1, 1)


def normalize(x=X, stats=STATS, weight=W, bias=W, residual=None, mean=None, var=None, tracked=None, activation=Activation.none, alarm=None):
    return ops.normalize(x, stats, weight, bias, residual, mean, var, tracked, 0.1, True, EPS, activation, 0.0, 3, 1, alarm)


def reduce(dy=X, x=X, weight=W, residual=None, mask=None, activation=Activation.relu, tag=0):
    return ops.backward_reduce(dy, x, STATS, weight, W, residual, mask, EPS, activation, 0.0, tag)


REFUSED = [
    (lambda: ops.stats(torch.ones(3), False), r"x must be \[N, C, \*\] with 0 < C < 2\^31, got \[3\]"),
    (lambda: ops.stats(torch.ones(3, 0), False), r"x must be .* got \[3, 0\]"),
    (lambda: ops.stats(torch.ones(2, 3).long(), False), "x must be float32, .* got Long"),
    (lambda: ops.stats(torch.ones(2, 4, 6)[:, :, ::2], False), r"x \[2, 4, 3\] must be contiguous or .* strides \[24, 6, 2\]"),
    (lambda: ops.stats(torch.ones(2, 3, 4, 5).permute(0, 1, 3, 2), False), "x .* must be contiguous or channels-last"),
    (lambda: normalize(stats=STATS.float()), r"stats must be contiguous Double \[13\], got Float"),
    (lambda: normalize(stats=STATS[:7]), r"stats must .* got Double \[7\]"),
    (lambda: normalize(weight=torch.ones(4)), r"weight must be \[3\] to match x \[2, 3, 4\], got \[4\]"),
    (lambda: normalize(bias=torch.ones(3).int()), "bias must be float32, .* got Int"),
    (lambda: normalize(weight=W.half()), "weight must be float32, float64 or Float, as x, got Half"),
    (lambda: reduce(weight=W.bfloat16()), "weight must be float32, float64 or Float, as x, got BFloat16"),
    (lambda: normalize(mean=torch.ones(2), var=W), r"running_mean must be .* got \[2\]"),
    (lambda: normalize(mean=W, var=torch.ones(1, 3)), r"running_var must be .* got \[1, 3\]"),
    (lambda: normalize(mean=W), "running_mean and running_var must be given both or neither"),
    (lambda: normalize(mean=W, var=torch.ones(1).expand(3)), "running_var must have memory of its own for each channel"),
    (lambda: normalize(tracked=torch.tensor(0.0)), "num_batches_tracked must be contiguous Long"),
    (lambda: normalize(residual=torch.ones(2, 3, 5)), r"residual must be \[2, 3, 4\], as x, got \[2, 3, 5\]"),
    (lambda: normalize(residual=X.half()), "residual must be Float, as x, got Half"),
    (
        lambda: normalize(residual=CHANNELS_LAST),
        r"residual must lie in memory as x with strides \[12, 4, 1\], got strides",
    ),
    *(
        (lambda name=name, t=t: normalize(**{name: t.to("meta")}), "all tensors must be on one device, got cpu, meta")
        for name, t in {"stats": STATS, "weight": W, "bias": W, "residual": X, "mean": W, "var": W, "tracked": torch.tensor(0)}.items()
    ),
    (lambda: reduce(dy=X.to("meta")), "all tensors must be on one device, got cpu, meta"),
    (
        lambda: ops.backward_input(X, STATS[:8].to("meta"), X, STATS, W, W, None, None, EPS, Activation.none, 0.0),
        "all tensors must be on one device, got cpu, meta",
    ),
    (lambda: normalize(activation=len(Activation)), rf"activation must be one of syncbn\.activation\.Activation, got {len(Activation)}"),
    (lambda: normalize(activation=-1), "activation must .* got -1"),
    (lambda: reduce(dy=torch.ones(2, 3)), r"dy must be \[2, 3, 4\], as x, got \[2, 3\]"),
    (lambda: reduce(residual=X), "mask must be given with a residual and this activation"),
    (lambda: reduce(residual=X, mask=torch.zeros(3, dtype=torch.uint8)), r"mask must be contiguous Byte \[9\], got Byte \[3\]"),
    (
        lambda: ops.backward_input(X, STATS[:8], X, STATS, W, W, X, None, EPS, Activation.relu, 0.0),
        "mask must be given with a residual and this activation",
    ),
    (
        lambda: ops.backward_input(X, STATS[:7], X, STATS, W, W, None, None, EPS, Activation.none, 0.0),
        r"sums must be contiguous Double \[8\], got Double \[7\]",
    ),
    (lambda: ops.stats(X, False, False, -1), r"tag must be in \[0, 2\^20\), got -1"),
    (lambda: reduce(tag=1 << 20), r"tag must be in \[0, 2\^20\), got 1048576"),
    (lambda: normalize(alarm=torch.zeros(1)), r"alarm must be Int \[1\] on the CPU, got Float \[1\]"),
    (lambda: normalize(alarm=torch.zeros(2, dtype=torch.int32)), r"alarm must be Int \[1\] on the CPU, got Int \[2\]"),
]


@pytest.mark.parametrize("call,message", REFUSED, ids=[message for _, message in REFUSED])
def test_the_binding_refuses(call, message):
    with pytest.raises((ValueError, NotImplementedError, RuntimeError), match=message):
        call()


def test_failed_allocation_is_reported():
    code = """
import resource, torch
from syncbn import ops
from syncbn.activation import Activation
x, stats = torch.zeros(8, 64, 256, 256), torch.ones(196).double()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20),) * 2)
ops.normalize(x, stats, None, None, None, None, None, None, 0.1, True, 1e-5, Activation.none, 0.0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    error = "RuntimeError: DefaultCPUAllocator: can't allocate memory. syncbn could not allocate a tensor [8, 64, 256, 256]"
    assert error in done.stderr, done.stderr
