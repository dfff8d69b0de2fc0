// From the group's sums to what the element-wise kernels use; once per channel and block, in double.
#pragma once

#include "vec.cuh"

namespace syncbn::cuda {

// The mean is shift + offset.
struct Moments {
  double shift, offset, var, invstd;

  // The mean without `hi`, its rounded value: not mean - hi, which would be 0 where hi is double.
  __device__ double rest(double hi) const { return (shift - hi) + offset; }
};

// Comparisons are written so that NaN stays NaN.
__device__ inline Moments finalize(const Statistics& stats, int64_t C, int64_t c) {
  const double weights = stats.data[3 * C];
  const double weight = weights < 1 ? 1 : weights;
  const double offset = stats.data[C + c] / weight;
  const double var = stats.data[2 * C + c] / weight - offset * offset;
  const double clamped = var < 0 ? 0 : var;
  return {stats.data[c], offset, clamped, 1 / sqrt(clamped + stats.eps)};
}

// The n of the backward formula; with rank_weighted, `samples` of this rank times the number of ranks.
__device__ inline double effective_count(const Statistics& stats, const Layout& layout, bool rank_weighted) {
  const double weights = stats.data[3 * layout.C];
  const double n = rank_weighted ? weights * static_cast<double>(layout.outer * layout.inner) : weights;
  return n < 1 ? 1 : n;
}

// z = (x - mean) * scale + bias, with the mean as hi + lo and lo folded into the bias: at mean >> std the difference x - hi is
// exact, and a rounded mean would lose what the sums have gained.
template <typename acc_t>
struct Affine {
  acc_t hi, scale, shift;

  // One fma in forward and backward alike, so that the sign of z is the same bit in both.
  __device__ acc_t operator()(acc_t x) const { return fma(x - hi, scale, shift); }
};

template <typename acc_t>
__device__ inline Affine<acc_t> make_affine(const Moments& m, const ChannelVector& weight, const ChannelVector& bias, int64_t c) {
  const acc_t hi = static_cast<acc_t>(m.shift + m.offset);
  const double lo = m.rest(static_cast<double>(hi));
  const double scale = weight.data ? m.invstd * read(weight, c) : m.invstd;
  const double shift = bias.data ? read(bias, c) - lo * scale : -lo * scale;
  return {hi, static_cast<acc_t>(scale), static_cast<acc_t>(shift)};
}

}  // namespace syncbn::cuda
