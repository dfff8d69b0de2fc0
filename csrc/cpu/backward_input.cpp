// backward_input: dx = weight * invstd * (dz - sum_dy / n - xhat * sum_dy_xhat / n), and dz where a residual needs it.
//
// dx is dz SCALE - (x - HI) SLOPE + OFFSET, three numbers that are computed once for each channel, in float64. Backwards over memory:
// what backward_reduce() read last is still in the cache.
#include "activation.h"
#include "channels.h"
#include "finalize.h"
#include "mask.h"

namespace syncbn::cpu::SYNCBN_ISA {
namespace {

enum { SLOPE = SHIFT + 1, OFFSET };

// The n of the formula: the sum of the weights over the weight of one of this rank's samples.
double effective_count(const BackwardInputArgs& args) {
  double weight = args.stats.data[2 * args.layout.C + args.stats.rank_weighted];
  double n = args.stats.rank_weighted ? weight * double(samples(args.layout)) : weight;
  return n < 1 ? 1 : n;
}

template <typename scalar_t, Backward backward, bool add> void run(const BackwardInputArgs& args) {
  using acc_t = acc_type<scalar_t>;
  constexpr bool masked = backward == Backward::sloped_by_mask;
  constexpr bool recompute = backward == Backward::sloped || backward == Backward::silu;
  auto dy = static_cast<const scalar_t*>(args.dy), x = static_cast<const scalar_t*>(args.x);
  auto residual = static_cast<const scalar_t*>(args.residual);
  const uint8_t* mask = args.mask;
  constexpr int OUTPUTS = masked || add ? 2 : 1;
  Slope<acc_t> slope(args.activation, args.negative_slope);
  Affines<acc_t> affine(args);
  double n = effective_count(args);
  const double *sum_dy = args.sums, *sum_dy_xhat = args.sums + args.layout.C;
  auto coefficients = [&](int64_t c, double* v) INLINED {
    Affine a = affine(c);
    double of_x = a.scale * a.invstd * sum_dy_xhat[c] / n;
    v[HI] = a.hi, v[SCALE] = a.scale, v[SHIFT] = a.shift, v[SLOPE] = of_x, v[OFFSET] = a.lo * of_x - a.scale * sum_dy[c] / n;
  };
  auto dx = static_cast<scalar_t*>(args.dx), dz = static_cast<scalar_t*>(args.dz);
  scalar_t* outputs[OUTPUTS];
  outputs[0] = dx;
  if constexpr (OUTPUTS > 1) outputs[1] = dz;
  map_packs<scalar_t, 5>(args.layout, outputs, coefficients, [=](int64_t f, auto lanes, const auto& p, const Place& place) INLINED {
    Pack<acc_t> d = load(dy + f, lanes), xmu = load(x + f, lanes) - p.v[HI], z(acc_t(0));
    if constexpr (recompute) z = xmu * p.v[SCALE] + p.v[SHIFT];
    if constexpr (add) z += load(residual + f, lanes);
    uint32_t bits = 0;
    if constexpr (masked) bits = read_bits(mask, f, place, lanes);
    d = through<backward>(d, z, bits, slope);
    Packs<acc_t, OUTPUTS> out;
    out.v[0] = d * p.v[SCALE] - xmu * p.v[SLOPE] + p.v[OFFSET];
    if constexpr (OUTPUTS > 1) out.v[1] = d;
    return out;
  });
}

template <typename scalar_t> auto choose(const BackwardInputArgs& args) {
  switch (args.activation) {
    case Activation::none: return run<scalar_t, Backward::identity, false>;
    case Activation::silu: return args.residual ? run<scalar_t, Backward::silu, true> : run<scalar_t, Backward::silu, false>;
    default: return args.mask ? run<scalar_t, Backward::sloped_by_mask, false> : run<scalar_t, Backward::sloped, false>;
  }
}

}  // namespace

void backward_input(const BackwardInputArgs& args) {
  with_dtype(args.dtype, [&](auto type) { choose<decltype(type)>(args)(args); });
}

}  // namespace syncbn::cpu::SYNCBN_ISA
