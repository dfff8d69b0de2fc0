// backward_input: dx = weight * invstd * (dz - sum_dy / n - xhat * sum_dy_xhat / n); and dz, the gradient of the residual, if there was one
// before the activation.
//
// Traffic: dy, x, dx, and if there are any the mask, the residual (silu) and dz, once each. Per channel dx is
// dz * scale + (x - hi) * of_x + shift, so that one thread per channel and block does its divisions, in double. The walk is reversed: the
// last dy and x that backward_reduce() read are still in L2.

#include "activation.cuh"
#include "finalize.cuh"
#include "reduce.cuh"
#include "verify.cuh"
#include "walk.cuh"

namespace syncbn::cuda {
namespace {

// The terms that are added to dz * scale: (x - hi) * of_x + shift.
template <typename acc_t>
struct Linear {
  acc_t of_x, shift;
};

template <typename scalar_t, class Walk>
__global__ void __launch_bounds__(THREADS, Walk::blocks_per_sm)
    backward_input_kernel(const BackwardInputArgs args, const Config config, const Workspace) {
  using acc_t = acc_type<scalar_t>;
  constexpr int CHANNELS = Walk::channels;
  const auto* dy = static_cast<const scalar_t*>(args.dy);
  const auto* x = static_cast<const scalar_t*>(args.x);
  auto* dx = static_cast<scalar_t*>(args.dx);
  auto* dz = static_cast<scalar_t*>(args.dz);
  const int64_t C = args.layout.C;
  const Walk walk(args.layout, config);

  SHARED(Affine<acc_t>, affines, Walk::max_columns);
  SHARED(Linear<acc_t>, rests, Walk::max_columns);
  walk.first([&](auto step) {
    prefetch(dy, step);
    prefetch(x, step);
  });
  const TagSums tag_sums(args.verification, walk, args.sums + 2 * C + sums_tail::tag);
  const int64_t channel = walk.first_channel() + threadIdx.x;
  if (threadIdx.x < config.width * CHANNELS && channel < C) {
    const Channel loaded = load_channel(args, channel);
    const double sum_dy = args.sums[channel], sum_dy_xhat = args.sums[C + channel];
    const Moments m = finalize(loaded, args.stats.eps);
    const AffineParameters p = affine_parameters<acc_t>(m, loaded, args);
    const double n = effective_count(loaded.weight_sum, args.layout, args.rank_weighted);
    const double slope = p.scale * m.invstd * sum_dy_xhat / n;
    affines[threadIdx.x] = make_affine<acc_t>(p);
    rests[threadIdx.x] = {static_cast<acc_t>(-slope), static_cast<acc_t>(p.lo * slope - p.scale * sum_dy / n)};
  }
  __syncthreads();
  tag_sums.verify(args.verification);  // after the barrier: the other warps already load dy and x
  Affine<acc_t> affine[CHANNELS];
  Linear<acc_t> rest_of[CHANNELS];
#pragma unroll
  for (int j = 0; j < CHANNELS; ++j) {
    affine[j] = affines[walk.column() + j];
    rest_of[j] = rests[walk.column() + j];
  }

  walk.each([&](auto step) {
    constexpr int STEP_WIDTH = decltype(step)::vector, UNROLL = decltype(step)::unroll;
    Vec<scalar_t, STEP_WIDTH> in_dy[UNROLL], in_x[UNROLL];
    load(in_dy, dy, step);
    load(in_x, x, step);
    unsigned bytes[UNROLL];
    load_bytes(bytes, args.mask, step);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (u >= step.count) continue;
      acc_t g[STEP_WIDTH];
      gradient(g, in_dy[u], in_x[u], bytes[u], args, step, u, affine);
      if (dz) store<STEP_WIDTH>(dz + step.index(u), g);
#pragma unroll
      for (int j = 0; j < STEP_WIDTH; ++j) {
        const acc_t rest = fma(in_x[u].get(j) - affine[j % CHANNELS].hi, rest_of[j % CHANNELS].of_x, rest_of[j % CHANNELS].shift);
        g[j] = fma(g[j], affine[j % CHANNELS].scale, rest);
      }
      store<STEP_WIDTH>(dx + step.index(u), g);
    }
  });
}

std::array<const void*, 5> tensors(const BackwardInputArgs& args) { return {args.dy, args.x, args.residual, args.dx, args.dz}; }

}  // namespace

cudaError_t backward_input(const BackwardInputArgs& args, const Target& target) {
  return launch<BackwardInputPlan>(args, target, tensors(args), args.mask, [](auto value, auto walk) {
    return backward_input_kernel<decltype(value), typename decltype(walk)::type>;
  });
}

}  // namespace syncbn::cuda
