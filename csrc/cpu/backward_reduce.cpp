// backward_reduce: sum_dy = Σ dz and sum_dy_xhat = Σ dz xhat of each channel.
//
// In acc_t within a chunk, in float64 across: Σ dz (x - hi), then the rest of the mean is taken off as lo Σ dz.
#include "activation.h"
#include "channels.h"
#include "finalize.h"
#include "mask.h"

namespace syncbn::cpu::SYNCBN_ISA {
namespace {

template <typename scalar_t, Backward backward, bool add> void run(const BackwardReduceArgs& args) {
  using acc_t = acc_type<scalar_t>;
  using P = Pack<acc_t>;
  constexpr bool masked = backward == Backward::sloped_by_mask;
  constexpr bool recompute = backward == Backward::sloped || backward == Backward::silu;
  auto dy = static_cast<const scalar_t*>(args.dy), x = static_cast<const scalar_t*>(args.x);
  auto residual = static_cast<const scalar_t*>(args.residual);
  const uint8_t* mask = args.mask;
  Slope<acc_t> slope(args.activation, args.negative_slope);
  Affines<acc_t> affine(args);
  auto coefficients = [&](int64_t c, double* v) INLINED {
    Affine a = affine(c);
    v[HI] = a.hi, v[SCALE] = a.scale, v[SHIFT] = a.shift;
  };
  auto add_pack = [=](int64_t f, auto lanes, const auto& p, int64_t row, P& s1, P& s2) INLINED {
    P d = load(dy + f, lanes), xmu = load(x + f, lanes) - p.v[HI], z(acc_t(0));
    if constexpr (recompute) z = xmu * p.v[SCALE] + p.v[SHIFT];
    if constexpr (add) z += load(residual + f, lanes);
    uint32_t bits = 0;
    if constexpr (masked) bits = read_bits(mask, f, row, lanes);
    d = through<backward>(d, z, bits, slope);
    d = keep(d, lanes);
    s1 += d;
    s2 += d * keep(xmu, lanes);
  };
  sum_packs<acc_t, 3, masked>(args.layout, args.sums, coefficients, add_pack);
  double *sum_dy = args.sums, *sum_dy_xhat = args.sums + args.layout.C;
#pragma GCC ivdep
  for (int64_t c = 0; c < args.layout.C; ++c) {
    Affine a = affine(c);
    sum_dy_xhat[c] = (sum_dy_xhat[c] - a.lo * sum_dy[c]) * a.invstd;
  }
}

template <typename scalar_t> auto choose(const BackwardReduceArgs& args) {
  switch (args.activation) {
    case Activation::none: return run<scalar_t, Backward::identity, false>;
    case Activation::silu: return args.residual ? run<scalar_t, Backward::silu, true> : run<scalar_t, Backward::silu, false>;
    default: return args.mask ? run<scalar_t, Backward::sloped_by_mask, false> : run<scalar_t, Backward::sloped, false>;
  }
}

}  // namespace

void backward_reduce(const BackwardReduceArgs& args) {
  with_dtype(args.dtype, [&](auto type) { choose<decltype(type)>(args)(args); });
  const double *sum_dy = args.sums, *sum_dy_xhat = args.sums + args.layout.C;
  update(args.dbias, args.layout.C, [=](int64_t c, double) INLINED { return sum_dy[c]; });
  update(args.dweight, args.layout.C, [=](int64_t c, double) INLINED { return sum_dy_xhat[c]; });
}

}  // namespace syncbn::cpu::SYNCBN_ISA
