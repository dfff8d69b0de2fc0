// backward_input: dx = weight * invstd * (dz - sum_dy / n - xhat * sum_dy_xhat / n).
//
// As dz SCALE - (x - HI) SLOPE + OFFSET, three numbers that are computed once for each channel, in float64. Backwards over memory:
// what backward_reduce() read last is still in the cache.
#include "activation.h"
#include "channels.h"
#include "finalize.h"

namespace syncbn::cpu::SYNCBN_ISA {
namespace {

enum { SLOPE = SHIFT + 1, OFFSET };

// The n of the formula: the sum of the weights over the weight of one of this rank's samples.
double effective_count(const BackwardInputArgs& args) {
  double weight = args.stats.data[2 * args.layout.C + args.stats.rank_weighted];
  double n = args.stats.rank_weighted ? weight * double(samples(args.layout)) : weight;
  return n < 1 ? 1 : n;
}

template <typename scalar_t, Backward backward> void run(const BackwardInputArgs& args) {
  using acc_t = acc_type<scalar_t>;
  auto dy = static_cast<const scalar_t*>(args.dy), x = static_cast<const scalar_t*>(args.x);
  auto dx = static_cast<scalar_t*>(args.dx);
  Slope<acc_t> slope(args.activation, args.negative_slope);
  Affines<acc_t> affine(args);
  double n = effective_count(args);
  const double *sum_dy = args.sums, *sum_dy_xhat = args.sums + args.layout.C;
  auto coefficients = [&](int64_t c, double* v) INLINED {
    Affine a = affine(c);
    double of_x = a.scale * a.invstd * sum_dy_xhat[c] / n;
    v[HI] = a.hi, v[SCALE] = a.scale, v[SHIFT] = a.shift, v[SLOPE] = of_x, v[OFFSET] = a.lo * of_x - a.scale * sum_dy[c] / n;
  };
  map_packs<scalar_t, 5, false>(args.layout, dx, coefficients, [=](int64_t f, auto lanes, const auto& p, const Place&) INLINED {
    Pack<acc_t> xmu = load(x + f, lanes) - p.v[HI];
    Pack<acc_t> dz = through<backward>(load(dy + f, lanes), xmu * p.v[SCALE] + p.v[SHIFT], 0, slope);
    return dz * p.v[SCALE] - xmu * p.v[SLOPE] + p.v[OFFSET];
  });
}

template <typename scalar_t> auto choose(Activation activation) {
  switch (activation) {
    case Activation::none: return run<scalar_t, Backward::identity>;
    case Activation::silu: return run<scalar_t, Backward::silu>;
    default: return run<scalar_t, Backward::sloped>;
  }
}

}  // namespace

void backward_input(const BackwardInputArgs& args) {
  with_dtype(args.dtype, [&](auto type) { choose<decltype(type)>(args.activation)(args); });
}

}  // namespace syncbn::cpu::SYNCBN_ISA
