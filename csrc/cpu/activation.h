// Activations and their derivatives on packs.
#pragma once

#include "simd.h"

namespace syncbn::cpu::SYNCBN_ISA {

// e^x to 1 ulp or 2: x = n ln2 + r with |r| <= ln2 / 2, a polynomial for e^r, and n added to the exponent.
LONG Pack<float> exp(Pack<float> x) {
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
RARE Pack<double> exp(Pack<double> x) {
  for (int r = 0; r < Pack<double>::REGISTERS; ++r)
    for (int k = 0; k < Pack<double>::LANES; ++k) x.v[r][k] = __builtin_exp(x.v[r][k]);
  return x;
}

// 0 where exp(-z) would overflow: times a huge z, the least number would not be small.
template <typename T> INLINE Pack<T> sigmoid(Pack<T> z) {
  Pack<T> s = Pack<T>(1) / (Pack<T>(1) + exp(Pack<T>(0) - z));
  return Pack<T>::map([&](int r) { return z.v[r] < T(-87) ? typename Pack<T>::V{} : s.v[r]; });
}

template <Activation activation, typename T> INLINE Pack<T> activate(Pack<T> z, Pack<T> negative_slope) {
  if constexpr (activation == Activation::relu) return select_positive(z, z, Pack<T>(0));
  if constexpr (activation == Activation::leaky_relu) return select_positive(z, z, z * negative_slope);
  if constexpr (activation == Activation::silu) return z * sigmoid(z);
  return z;
}

// How dz follows from dy. Relu is a leaky relu of slope 0, but it takes an infinite dy to 0 as well.
enum class Backward { identity, sloped, sloped_by_mask, silu };

template <typename T> class Slope {
  Pack<T> factor_;
  typename Pack<T>::Int bits_;  // of the product that stay: all, or none

 public:
  Slope(Activation activation, double negative_slope)
      : factor_(T(negative_slope)), bits_(activation == Activation::leaky_relu ? -1 : 0) {}
  INLINE Pack<T> operator()(Pack<T> dy) const {
    return Pack<T>::map([&](int r) { return (typename Pack<T>::V)((typename Pack<T>::I)(dy.v[r] * factor_.v[r]) & bits_); });
  }
};

// z is unused by sloped_by_mask, bits by the others.
template <Backward backward, typename T> INLINE Pack<T> through(Pack<T> dy, Pack<T> z, uint32_t bits, const Slope<T>& slope) {
  if constexpr (backward == Backward::sloped) return select_positive(z, dy, slope(dy));
  if constexpr (backward == Backward::sloped_by_mask) return select(bits, dy, slope(dy));
  if constexpr (backward == Backward::silu) {
    Pack<T> s = sigmoid(z);
    return dy * (s * (Pack<T>(1) + z * (Pack<T>(1) - s)));
  }
  return dy;
}

}  // namespace syncbn::cpu::SYNCBN_ISA
