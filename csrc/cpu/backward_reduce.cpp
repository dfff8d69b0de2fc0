// backward_reduce: sum_dy = Σ dz and sum_dy_xhat = Σ dz xhat of each channel, and dz where a residual needs it.
//
// In acc_t within a chunk, in float64 across: Σ dz (x - hi), then the rest of the mean is taken off as lo Σ dz.
#include "activation.h"
#include "channels.h"
#include "finalize.h"
#include "mask.h"

namespace syncbn::SYNCBN_ISA {
namespace {

struct Tensors {
  const void *dy, *x, *residual;
  const uint8_t* mask;
  void* dz;
};

template <typename scalar_t, Backward backward, bool add>
void run(Layout layout, const Tensors& t, const Norm& norm, double* sums) {
  using acc_t = acc_type<scalar_t>;
  using P = Pack<acc_t>;
  constexpr bool masked = backward == Backward::sloped_by_mask;
  constexpr bool recompute = backward == Backward::sloped || backward == Backward::silu;
  auto dy = static_cast<const scalar_t*>(t.dy), x = static_cast<const scalar_t*>(t.x), residual = static_cast<const scalar_t*>(t.residual);
  auto dz = static_cast<scalar_t*>(t.dz);
  const uint8_t* mask = t.mask;
  P slope = acc_t(norm.activation == Activation::leaky_relu ? norm.negative_slope : 0);
  auto coefficients = [&](int64_t c, double* v) {
    Affine a = affine<acc_t>(norm, layout.channels, c);
    v[HI] = a.hi, v[SCALE] = a.scale, v[SHIFT] = a.shift;
  };
  sum_packs<acc_t, 3, masked>(layout, sums, coefficients, [=](int64_t f, auto lanes, const auto& p, int64_t row, P& s1, P& s2) INLINED {
    P d = load(dy + f, lanes), xmu = load(x + f, lanes) - p.v[HI], z(acc_t(0));
    if constexpr (recompute) z = xmu * p.v[SCALE] + p.v[SHIFT];
    if constexpr (add) z += load(residual + f, lanes);
    uint32_t bits = 0;
    if constexpr (masked) bits = read_bits(mask, f, row, lanes);
    d = through<backward>(d, z, bits, slope);
    if (dz) store(dz + f, d, lanes);
    d = keep(d, lanes);
    s1 += d;
    s2 += d * keep(xmu, lanes);
  });
  for (int64_t c = 0; c < layout.channels; ++c) {
    Affine a = affine<acc_t>(norm, layout.channels, c);
    sums[layout.channels + c] = (sums[layout.channels + c] - a.lo * sums[c]) * a.invstd;
  }
}

template <typename scalar_t> auto choose(const Norm& norm, const Tensors& t) {
  switch (norm.activation) {
    case Activation::none: return run<scalar_t, Backward::identity, false>;
    case Activation::silu: return t.residual ? run<scalar_t, Backward::silu, true> : run<scalar_t, Backward::silu, false>;
    default: return t.mask ? run<scalar_t, Backward::sloped_by_mask, false> : run<scalar_t, Backward::sloped, false>;
  }
}

}  // namespace

void backward_reduce(Dtype dtype, Layout layout, const void* dy, const void* x, const void* residual, const uint8_t* mask,
                     const Norm& norm, double* sums, void* dz, Param dweight, Param dbias) {
  Tensors tensors{dy, x, residual, mask, dz};
  with_dtype(dtype, [&](auto type) { choose<decltype(type)>(norm, tensors)(layout, tensors, norm, sums); });
  for (int64_t c = 0; c < layout.channels; ++c) {
    if (dbias.data) set(dbias, c, sums[c]);
    if (dweight.data) set(dweight, c, sums[layout.channels + c]);
  }
}

}  // namespace syncbn::SYNCBN_ISA
