// Activations and their derivatives, on a vector of z.
#pragma once

#include "vec.cuh"

namespace syncbn::cuda {

// Two approximations of 2 ulp each: a precise division would make silu in bf16 bound by instructions, not memory.
__device__ inline float sigmoid(float z) { return __fdividef(1.0f, 1.0f + expf(-z)); }
__device__ inline double sigmoid(double z) { return 1 / (1 + exp(-z)); }

// NaN is not <= 0, so it passes through relu as in torch.
template <typename acc_t>
__device__ inline bool positive(acc_t z) {
  return !(z <= 0);
}

// The switch is outside the loop: once per vector.
template <typename acc_t, int N>
__device__ inline void activate(acc_t (&z)[N], Activation activation, acc_t negative_slope) {
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

// dy becomes dz; z(j) is called only where it is needed. `bits` is the sign of z where it was kept (has_mask).
template <typename acc_t, int N, class Z>
__device__ inline void through_activation(acc_t (&dy)[N], Activation activation, acc_t negative_slope, bool has_mask,
                                          unsigned bits, Z&& z) {
  if (activation == Activation::none) return;
  if (activation == Activation::silu) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const acc_t zj = z(j), s = sigmoid(zj);
      dy[j] *= s * (1 + zj * (1 - s));
    }
    return;
  }
  if (!has_mask) {
    bits = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) bits |= unsigned{positive(z(j))} << j;
  }
  const bool leaks = activation == Activation::leaky_relu;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (!(bits >> j & 1)) dy[j] = leaks ? dy[j] * negative_slope : acc_t{0};  // not dy * 0: relu keeps an infinite dy out
  }
}

// dz of the vector u of a step; z is recomputed by the expression of the forward pass, or its sign comes from the bit mask.
template <typename scalar_t, class Args, class Step, class Affine, typename acc_t, int W, int N>
__device__ inline void gradient(acc_t (&dz)[W], const Vec<scalar_t, W>& dy, const Vec<scalar_t, W>& x, const Args& args, const Step& step,
                                int u, const Affine (&affine)[N]) {
#pragma unroll
  for (int j = 0; j < W; ++j) dz[j] = dy.get(j);
  const auto* residual = static_cast<const scalar_t*>(args.residual);
  Vec<scalar_t, W> add;
  if (residual) add = load<W>(residual + step.index(u));
  const unsigned bits = args.mask ? args.mask[step.mask_byte(u)] >> (step.index(u) & 7) : 0;
  through_activation(dz, args.activation, static_cast<acc_t>(args.negative_slope), args.mask, bits, [&](int j) {
    const acc_t z = affine[j % N](x.get(j));
    return residual ? z + add.get(j) : z;
  });
}

}  // namespace syncbn::cuda
