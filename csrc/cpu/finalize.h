// From the summed statistics to what the loops need: a few numbers of acc_t for each channel.
#pragma once

#include "traverse.h"

namespace syncbn::SYNCBN_ISA {

struct Moments {
  double mean, var, invstd;  // var is biased
};

INLINE Moments finalize(const Norm& norm, int64_t channels, int64_t c) {
  double weight = norm.stats[2 * channels + norm.rank_weighted], mean = 0, var = 0;
  weight = weight < 1 ? 1 : weight;
  mean = norm.stats[c] / weight;
  var = norm.stats[channels + c] / weight - mean * mean;
  var = var < 0 ? 0 : var;  // NaN stays
  return {mean, var, 1 / __builtin_sqrt(var + norm.eps)};
}

// What z = (x - HI) * SCALE + SHIFT takes. The mean is HI plus a rest that SHIFT takes up: x - HI comes before any product.
enum { HI, SCALE, SHIFT };

struct Affine {
  double mean, invstd, hi, lo, scale, shift;
};

template <typename acc_t> INLINE Affine affine(const Norm& norm, int64_t channels, int64_t c) {
  Moments m = finalize(norm, channels, c);
  double hi = double(acc_t(m.mean)), lo = m.mean - hi;
  double scale = norm.weight.data ? m.invstd * get(norm.weight, c) : m.invstd;
  return {m.mean, m.invstd, hi, lo, scale, (norm.bias.data ? get(norm.bias, c) : 0.0) - lo * scale};
}

}  // namespace syncbn::SYNCBN_ISA
