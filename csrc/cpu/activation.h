// Activations and their derivatives on packs.
#pragma once

#include "memory.h"

namespace syncbn::cpu::SYNCBN_ISA {

// e^x to 1 or 2 ulp, for x in [-87, 88]: x = n ln2 + f with |f| <= ln2 / 2, a polynomial for e^f, and n added to the exponent. Beyond,
// the result is that at the nearer end.
INLINE_IF_ONE_REGISTER Pack<float> exp(Pack<float> x) {
  using P = Pack<float>;
  return P::map([&](int r) {
    auto v = x.v[r] > 88.0f ? 88.0f - P::V{} : x.v[r];
    v = v < -87.0f ? -87.0f - P::V{} : v;
    auto biased = v * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the addition rounds to an integer in the low bits
    auto n = biased - 12582912.0f;
    auto f = (v - n * 0.693359375f) + n * 2.12194440e-4f;
    auto p = 1.0f / 5040 + P::V{};
    p = p * f + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    return (P::V)((P::I)p + ((P::I)biased << 23));
  });
}
NOINLINE Pack<double> exp(Pack<double> x) {
  for (int r = 0; r < Pack<double>::REGISTERS; ++r)
    for (int k = 0; k < Pack<double>::LANES; ++k) x.v[r][k] = __builtin_exp(x.v[r][k]);
  return x;
}

// 0 for z < -87: exp(-z) of floats stops growing at e^88, and that tiny nonzero sigmoid times a huge z would not be negligible.
template <typename T>
INLINE Pack<T> sigmoid(Pack<T> z) {
  Pack<T> s = Pack<T>(1) / (Pack<T>(1) + exp(Pack<T>(0) - z));
  return Pack<T>::map([&](int r) { return z.v[r] < T(-87) ? typename Pack<T>::V{} : s.v[r]; });
}

template <Activation activation, typename T>
INLINE Pack<T> activate(Pack<T> z, Pack<T> negative_slope) {
  SYNCBN_HAS_CODE_FOR(4);
  if constexpr (activation == Activation::relu) return select_positive(z, z, Pack<T>(0));
  if constexpr (activation == Activation::leaky_relu) return select_positive(z, z, z * negative_slope);
  if constexpr (activation == Activation::silu) return z * sigmoid(z);
  return z;
}

// How dz follows from dy. relu is leaky_relu with slope 0, except that an infinite dy and NaN also become 0.
enum class Backward { identity, sloped, sloped_by_mask, silu };

template <typename T>
class Slope {
  Pack<T> factor_;
  typename Pack<T>::Int bits_;  // mask for the product: all ones, or zero for relu

 public:
  Slope(Activation activation, double negative_slope) : factor_(T(negative_slope)), bits_(activation == Activation::leaky_relu ? -1 : 0) {}
  INLINE Pack<T> operator()(Pack<T> dy) const {
    return Pack<T>::map([&](int r) { return (typename Pack<T>::V)((typename Pack<T>::I)(dy.v[r] * factor_.v[r]) & bits_); });
  }
};

// sloped_by_mask does not use z; the others do not use bits.
template <Backward backward, typename T>
INLINE Pack<T> gradient(Pack<T> dy, Pack<T> z, uint32_t bits, const Slope<T>& slope) {
  if constexpr (backward == Backward::sloped) return select_positive(z, dy, slope(dy));
  if constexpr (backward == Backward::sloped_by_mask) return select(bits, dy, slope(dy));
  if constexpr (backward == Backward::silu) {
    Pack<T> s = sigmoid(z);
    return dy * (s * (Pack<T>(1) + z * (Pack<T>(1) - s)));
  }
  return dy;
}

// Computes dz for one pack. If that needs z, it is recomputed by the expression of the forward pass, or its sign comes from the mask.
template <typename scalar_t, Backward way, bool has_residual>
class ActivationGradient {
  using acc_t = acc_type<scalar_t>;
  const scalar_t *dy_, *residual_;
  const uint8_t* mask_;
  Slope<acc_t> slope_;

 public:
  static constexpr bool masked = way == Backward::sloped_by_mask, adds = masked || has_residual;

  template <class Args>
  explicit ActivationGradient(const Args& args)
      : dy_(static_cast<const scalar_t*>(args.dy)),
        residual_(static_cast<const scalar_t*>(args.residual)),
        mask_(args.mask),
        slope_(args.activation, args.negative_slope) {}
  // bits(mask) reads those of the pack; z is scale * xmu + shift before a residual is added.
  template <typename Lanes, typename Bits>
  INLINE Pack<acc_t> operator()(int64_t e, Lanes lanes, Pack<acc_t> xmu, Pack<acc_t> scale, Pack<acc_t> shift, Bits bits) const {
    Pack<acc_t> dy = load(dy_ + e, lanes), z(acc_t(0));
    if constexpr (way == Backward::sloped || way == Backward::silu) z = xmu * scale + shift;
    if constexpr (has_residual) z += load(residual_ + e, lanes);
    return gradient<way>(dy, z, masked ? bits(mask_) : 0, slope_);
  }
};

// Calls f with the ActivationGradient specialized for the activation, residual and mask.
template <typename scalar_t, class Args, typename F>
void with_gradient(const Args& args, F f) {
  SYNCBN_HAS_CODE_FOR(4);
  switch (args.activation) {
    case Activation::none: return f(ActivationGradient<scalar_t, Backward::identity, false>(args));
    case Activation::silu:
      if (args.residual) return f(ActivationGradient<scalar_t, Backward::silu, true>(args));
      return f(ActivationGradient<scalar_t, Backward::silu, false>(args));
    default:
      if (args.mask) return f(ActivationGradient<scalar_t, Backward::sloped_by_mask, false>(args));
      return f(ActivationGradient<scalar_t, Backward::sloped, false>(args));
  }
}

}  // namespace syncbn::cpu::SYNCBN_ISA
