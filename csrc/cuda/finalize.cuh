// Converts the group's sums to the parameters of the kernels' loops: once per channel and block, in double (../formulas.h).
#pragma once

#include "../formulas.h"
#include "vec.cuh"

namespace syncbn::cuda {

// A channel's statistics and parameters as loaded, for finalize() and affine_parameters().
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

__device__ inline Moments finalize(const Channel& channel, double eps) {
  return syncbn::finalize(channel.shift, channel.sum, channel.sumsq, divisor_of(channel.weight_sum), eps);
}

template <typename acc_t, class Args>
__device__ inline AffineParameters affine_parameters(const Moments& m, const Channel& channel, const Args& args) {
  const double weight = args.weight.data ? to_double(args.weight.dtype, channel.weight) : 1;
  const double bias = args.bias.data ? to_double(args.bias.dtype, channel.bias) : 0;
  return syncbn::affine_parameters<acc_t>(m, weight, bias);
}

// AffineParameters as the loops use them.
template <typename acc_t>
struct Affine {
  acc_t hi, scale, shift;

  // One fma in forward and backward alike, so that both find the same sign of z.
  __device__ acc_t operator()(acc_t x) const { return fma(x - hi, scale, shift); }
};

template <typename acc_t>
__device__ inline Affine<acc_t> make_affine(const AffineParameters& p) {
  return {static_cast<acc_t>(p.hi), static_cast<acc_t>(p.scale), static_cast<acc_t>(p.shift)};
}

}  // namespace syncbn::cuda
