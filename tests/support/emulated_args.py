"""The structs of csrc/args.h for ctypes. `Emulated.load` compares their sizes with those of the library."""

from __future__ import annotations

import ctypes

c_dtype = c_activation = ctypes.c_int
c_bool, c_double, c_pointer, c_int64 = ctypes.c_bool, ctypes.c_double, ctypes.c_void_p, ctypes.c_int64


def _struct(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


Layout = _struct("Layout", outer=c_int64, C=c_int64, inner=c_int64)
Vector = _struct("Vector", data=c_pointer, dtype=c_dtype, stride=c_int64)
Stats = _struct("Stats", data=c_pointer, eps=c_double)
Activated = dict(activation=c_activation, negative_slope=c_double)
Verification = _struct("Verification", tag=c_double, tag_squared=c_double, alarm=c_pointer)
Affine = dict(stats=Stats, weight=Vector, bias=Vector)

ARGS = {
    "stats": _struct("StatsArgs", dtype=c_dtype, layout=Layout, x=c_pointer, rank_weighted=c_bool, shifted=c_bool, tag=c_double,
                     stats=c_pointer),
    "normalize": _struct(
        "NormalizeArgs", dtype=c_dtype, layout=Layout, x=c_pointer, **Affine, residual=c_pointer,
        running_mean=Vector, running_var=Vector, num_batches_tracked=c_pointer,
        cumulative=c_bool, momentum=c_double, unbiased=c_bool, **Activated, y=c_pointer, mask=c_pointer,
        verification=Verification,
    ),
    "backward_reduce": _struct(
        "BackwardReduceArgs", dtype=c_dtype, layout=Layout, dy=c_pointer, x=c_pointer, **Affine, residual=c_pointer, mask=c_pointer,
        **Activated, tag=c_double, sums=c_pointer, dweight=Vector, dbias=Vector,
    ),
    "backward_input": _struct(
        "BackwardInputArgs", dtype=c_dtype, layout=Layout, dy=c_pointer, x=c_pointer, stats=Stats, sums=c_pointer,
        weight=Vector, bias=Vector, residual=c_pointer, mask=c_pointer, **Activated, rank_weighted=c_bool,
        dx=c_pointer, dz=c_pointer, verification=Verification,
    ),
}  # fmt: skip
