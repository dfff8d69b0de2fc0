// backward_input: dx = weight * invstd * (dz - sum_dy / n - xhat * sum_dy_xhat / n).
//
// As dz SCALE - (x - HI) SLOPE + OFFSET, three numbers that are computed once for each channel, in float64. Backwards over memory:
// what backward_reduce() read last is still in the cache.
#include "activation.h"
#include "channels.h"
#include "finalize.h"

namespace syncbn::SYNCBN_ISA {
namespace {

enum { SLOPE = SHIFT + 1, OFFSET };

// The n of the formula: the sum of the weights over the weight of one of this rank's samples.
double effective_count(const Norm& norm, Layout layout) {
  double weight = norm.stats[2 * layout.channels + norm.rank_weighted];
  double n = norm.rank_weighted ? weight * double(layout.samples()) : weight;
  return n < 1 ? 1 : n;
}

template <typename scalar_t, Backward backward>
void run(Layout layout, const void* dy_data, const void* x_data, const Norm& norm, const double* sums, void* dx_data) {
  using acc_t = acc_type<scalar_t>;
  auto dy = static_cast<const scalar_t*>(dy_data), x = static_cast<const scalar_t*>(x_data);
  auto dx = static_cast<scalar_t*>(dx_data);
  Pack<acc_t> slope = acc_t(norm.activation == Activation::leaky_relu ? norm.negative_slope : 0);
  double n = effective_count(norm, layout);
  auto coefficients = [&](int64_t c, double* v) {
    Affine a = affine<acc_t>(norm, layout.channels, c);
    double of_x = a.scale * a.invstd * sums[layout.channels + c] / n;
    v[HI] = a.hi, v[SCALE] = a.scale, v[SHIFT] = a.shift, v[SLOPE] = of_x, v[OFFSET] = a.lo * of_x - a.scale * sums[c] / n;
  };
  bool stream = streams(dx, layout, false);
  map_packs<acc_t, 5, false>(layout, coefficients, [=](int64_t f, auto lanes, const auto& p, int64_t, bool) INLINED {
    Pack<acc_t> xmu = load(x + f, lanes) - p.v[HI];
    Pack<acc_t> dz = through<backward>(load(dy + f, lanes), xmu * p.v[SCALE] + p.v[SHIFT], 0, slope);
    store(dx + f, dz * p.v[SCALE] - xmu * p.v[SLOPE] + p.v[OFFSET], lanes, stream);
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

void backward_input(Dtype dtype, Layout layout, const void* dy, const void* x, const Norm& norm, const double* sums, void* dx) {
  with_dtype(dtype, [&](auto type) { choose<decltype(type)>(norm.activation)(layout, dy, x, norm, sums, dx); });
}

}  // namespace syncbn::SYNCBN_ISA
