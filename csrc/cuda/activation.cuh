// Activations and their derivatives, on a vector of z.
#pragma once

#include "vec.cuh"

namespace syncbn::cuda {

// expf and __fdividef are each off by up to 2 ulp, and a quotient by more than 2^126 becomes 0. A precise division would make silu in bf16
// bound by instructions, not memory.
__device__ inline float sigmoid(float z) { return __fdividef(1.0f, 1.0f + expf(-z)); }
__device__ inline double sigmoid(double z) { return 1 / (1 + exp(-z)); }

// NaN is not <= 0, so it passes through relu as in torch.
template <typename acc_t>
__device__ inline bool positive(acc_t z) {
  return !(z <= 0);
}

// The switch is outside the loop: once per vector.
template <typename acc_t, int WIDTH>
__device__ inline void activate(acc_t (&z)[WIDTH], Activation activation, acc_t negative_slope) {
  SYNCBN_HAS_CODE_FOR(4);
  switch (activation) {
    case Activation::none: break;
    case Activation::relu:
#pragma unroll
      for (acc_t& v : z) v = positive(v) ? v : acc_t{0};
      break;
    case Activation::leaky_relu:
#pragma unroll
      for (acc_t& v : z) v = positive(v) ? v : v * negative_slope;
      break;
    case Activation::silu:
#pragma unroll
      for (acc_t& v : z) v *= sigmoid(v);
      break;
  }
}

// The mask's bytes of a step's vectors, 0 without a mask. They are loaded together, before any store that they could alias. Only
// gradient() shifts them: the compiler puts a shift right after its load, so here all later loads would wait for it.
template <int UNROLL, class Step>
__device__ inline void load_bytes(unsigned (&bytes)[UNROLL], const uint8_t* mask, const Step& step) {
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) bytes[u] = mask && u < step.count ? mask[step.mask_byte(u)] : 0;
}

// dz of the vector u of a step. z is recomputed by the expression of the forward pass, or its sign comes from the mask's byte;
// args.residual is read for silu only.
template <typename scalar_t, class Args, class Step, class Affines, typename acc_t, int STEP_WIDTH, int CHANNELS>
__device__ inline void gradient(acc_t (&dz)[STEP_WIDTH], const Vec<scalar_t, STEP_WIDTH>& dy, const Vec<scalar_t, STEP_WIDTH>& x,
                                unsigned byte, const Args& args, const Step& step, int u, const Affines (&affine)[CHANNELS]) {
  SYNCBN_HAS_CODE_FOR(4);
#pragma unroll
  for (int j = 0; j < STEP_WIDTH; ++j) dz[j] = dy.get(j);
  if (args.activation == Activation::none) return;
  if (args.activation == Activation::silu) {
    const auto* residual = static_cast<const scalar_t*>(args.residual);
    Vec<scalar_t, STEP_WIDTH> add;
    if (residual) add = load<STEP_WIDTH>(residual + step.index(u));
#pragma unroll
    for (int j = 0; j < STEP_WIDTH; ++j) {
      acc_t z = affine[j % CHANNELS](x.get(j));
      if (residual) z += add.get(j);
      const acc_t s = sigmoid(z);
      dz[j] *= s * (1 + z * (1 - s));
    }
    return;
  }
  unsigned bits = byte >> (step.index(u) & 7);
  if (!args.mask) {
#pragma unroll
    for (int j = 0; j < STEP_WIDTH; ++j) bits |= unsigned{positive(affine[j % CHANNELS](x.get(j)))} << j;
  }
  const bool leaks = args.activation == Activation::leaky_relu;
  const acc_t negative_slope = static_cast<acc_t>(args.negative_slope);
#pragma unroll
  for (int j = 0; j < STEP_WIDTH; ++j) {
    if (!(bits >> j & 1)) dz[j] = leaks ? dz[j] * negative_slope : acc_t{0};  // not dy * 0: relu keeps an infinite dy out
  }
}

}  // namespace syncbn::cuda
