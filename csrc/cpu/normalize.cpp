// normalize: y = activation((x - mean) * invstd * weight + bias + residual), and the moving statistics.
//
// Backwards over memory: what stats() read last is still in the cache.
#include "activation.h"
#include "channels.h"
#include "finalize.h"
#include "mask.h"

namespace syncbn::SYNCBN_ISA {
namespace {

void update_running_stats(const Norm& norm, int64_t channels, const RunningStats& running) {
  double count = norm.stats[2 * channels], factor = running.momentum;
  if (!(count > 0)) return;
  if (running.num_batches_tracked) ++*running.num_batches_tracked;
  if (running.cumulative) factor = running.num_batches_tracked ? 1.0 / double(max(*running.num_batches_tracked, 1)) : 1;
  double unbiased = running.unbiased ? count / (count - 1 < 1 ? 1 : count - 1) : 1;
  auto update = [&](Param p, int64_t c, double value) {
    if (p.data && factor > 0) set(p, c, get(p, c) + factor * (value - get(p, c)));
  };
  for (int64_t c = 0; c < channels; ++c) {
    Moments m = finalize(norm, channels, c);
    update(running.mean, c, m.mean);
    update(running.var, c, m.var * unbiased);
  }
}

template <typename scalar_t, Activation activation, bool add>
void run(Layout layout, const scalar_t* x, const scalar_t* residual, const Norm& norm, scalar_t* y, uint8_t* mask) {
  using acc_t = acc_type<scalar_t>;
  constexpr bool masked = add && (activation == Activation::relu || activation == Activation::leaky_relu);
  Pack<acc_t> slope = acc_t(norm.negative_slope);
  auto coefficients = [&](int64_t c, double* v) {
    Affine a = affine<acc_t>(norm, layout.channels, c);
    v[HI] = a.hi, v[SCALE] = a.scale, v[SHIFT] = a.shift;
  };
  bool stream = streams(y, layout, masked);
  map_packs<acc_t, 3, masked>(layout, coefficients, [=](int64_t f, auto lanes, const auto& p, int64_t row, bool row_end) INLINED {
    Pack<acc_t> z = (load(x + f, lanes) - p.v[HI]) * p.v[SCALE] + p.v[SHIFT];
    if constexpr (add) z += load(residual + f, lanes);
    store(y + f, activate<activation>(z, slope), lanes, stream);
    if constexpr (masked) write_bits(mask, f, row, positive_bits(z), lanes, row_end);
  });
}

template <typename scalar_t, bool add> auto choose(Activation activation) {
  switch (activation) {
    case Activation::relu: return run<scalar_t, Activation::relu, add>;
    case Activation::leaky_relu: return run<scalar_t, Activation::leaky_relu, add>;
    case Activation::silu: return run<scalar_t, Activation::silu, add>;
    default: return run<scalar_t, Activation::none, add>;
  }
}

}  // namespace

void normalize(Dtype dtype, Layout layout, const void* x, const void* residual, const Norm& norm, const RunningStats& running, void* y,
               uint8_t* mask) {
  update_running_stats(norm, layout.channels, running);
  with_dtype(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    auto call = residual ? choose<scalar_t, true>(norm.activation) : choose<scalar_t, false>(norm.activation);
    call(layout, static_cast<const scalar_t*>(x), static_cast<const scalar_t*>(residual), norm, static_cast<scalar_t*>(y), mask);
  });
}

}  // namespace syncbn::SYNCBN_ISA
