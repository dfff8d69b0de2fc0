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

// A channel's statistics and parameters as they lie in memory, for finalize() and make_affine().
struct Channel {
  double shift, sum, sumsq, weight_sum;
  Bits weight, bias;
};

template <class Args>
__device__ inline Channel load_channel(const Args& args, int64_t c) {
  const int64_t C = args.layout.C;
  const double* stats = args.stats.data;
  return {stats[c], stats[C + c], stats[2 * C + c], stats[3 * C + stats_tail::weight], load_bits(args.weight, c), load_bits(args.bias, c)};
}

// Comparisons are written so that NaN stays NaN.
__device__ inline Moments finalize(const Channel& channel, double eps) {
  const double weight = channel.weight_sum < 1 ? 1 : channel.weight_sum;
  const double offset = channel.sum / weight;
  const double var = channel.sumsq / weight - offset * offset;
  const double clamped = var < 0 ? 0 : var;
  return {channel.shift, offset, clamped, 1 / sqrt(clamped + eps)};
}

// The n of the backward formula; with rank_weighted, `samples` of this rank times the number of ranks.
__device__ inline double effective_count(const Channel& channel, const Layout& layout, bool rank_weighted) {
  const double n = rank_weighted ? channel.weight_sum * static_cast<double>(layout.outer * layout.inner) : channel.weight_sum;
  return n < 1 ? 1 : n;
}

template <class Args>
__device__ inline double scale_of(const Moments& m, const Channel& channel, const Args& args) {
  return args.weight.data ? m.invstd * to_double(args.weight.dtype, channel.weight) : m.invstd;
}

// z = (x - mean) * scale + bias, with the mean as hi + lo and lo folded into the bias: at mean >> std the difference x - hi is
// exact, and a rounded mean would lose what the sums have gained.
template <typename acc_t>
struct Affine {
  acc_t hi, scale, shift;

  // One fma in forward and backward alike, so that the sign of z is the same bit in both.
  __device__ acc_t operator()(acc_t x) const { return fma(x - hi, scale, shift); }
};

template <typename acc_t, class Args>
__device__ inline Affine<acc_t> make_affine(const Moments& m, const Channel& channel, const Args& args) {
  const acc_t hi = static_cast<acc_t>(m.shift + m.offset);
  const double lo = m.rest(static_cast<double>(hi));
  const double scale = scale_of(m, channel, args);
  const double shift = args.bias.data ? to_double(args.bias.dtype, channel.bias) - lo * scale : -lo * scale;
  return {hi, static_cast<acc_t>(scale), static_cast<acc_t>(shift)};
}

}  // namespace syncbn::cuda
