// backward_reduce: this rank's sum_dy = sum of dz and sum_dy_xhat = sum of dz * xhat, with dweight and dbias.
//
// Traffic: dy, x, and if there are any the mask and the residual (silu), once each. Sums are of dz * (x - hi), which does not cancel; the
// rest of the mean is subtracted in double.

#include "activation.cuh"
#include "finalize.cuh"
#include "reduce.cuh"
#include "walk.cuh"

namespace syncbn::cuda {
namespace {

template <typename scalar_t, class Walk>
__global__ void __launch_bounds__(THREADS, Walk::blocks_per_sm)
    backward_reduce_kernel(const BackwardReduceArgs args, const Config config, const Workspace workspace) {
  using acc_t = acc_type<scalar_t>;
  constexpr int CHANNELS = Walk::channels, SUMS = Walk::sums;
  const auto* dy = static_cast<const scalar_t*>(args.dy);
  const auto* x = static_cast<const scalar_t*>(args.x);
  const int64_t C = args.layout.C;
  const Walk walk(args.layout, config);

  SHARED(Affine<acc_t>, table, Walk::max_columns);
  SHARED(Moments, moments, Walk::max_columns);
  static_assert(Walk::max_columns * (sizeof(Affine<acc_t>) + sizeof(Moments)) + Walk::max_sum_bytes < SHARED_BYTES,
                "the launch would fail");
  const int64_t channel = walk.first_channel() + threadIdx.x;
  const bool owns_channel = threadIdx.x < config.width * CHANNELS && channel < C;
  walk.first([&](auto step) {
    prefetch(dy, step);
    prefetch(x, step);
  });
  if (owns_channel) {
    const Channel loaded = load_channel(args, channel);
    moments[threadIdx.x] = finalize(loaded, args.stats.eps);
    table[threadIdx.x] = make_affine<acc_t>(affine_parameters<acc_t>(moments[threadIdx.x], loaded, args));
  }
  __syncthreads();
  Affine<acc_t> affine[CHANNELS];
#pragma unroll
  for (int j = 0; j < CHANNELS; ++j) affine[j] = table[walk.column() + j];

  acc_t s1[SUMS] = {}, s2[SUMS] = {};
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
#pragma unroll
      for (int j = 0; j < STEP_WIDTH; ++j) {
        s1[j % SUMS] += g[j];
        s2[j % SUMS] = fma(g[j], in_x[u].get(j) - affine[j % CHANNELS].hi, s2[j % SUMS]);
      }
    }
  });

  fold<CHANNELS>(s1);
  fold<CHANNELS>(s2);
  Pair sums[CHANNELS];
#pragma unroll
  for (int j = 0; j < CHANNELS; ++j) sums[j] = {s1[j], s2[j]};
  warp_sums(sums, config.width);
  Pair total = block_sum(sums, config.width);
  if (owns_channel) {
    const Moments& m = moments[threadIdx.x];
    const double lo = m.rest(static_cast<double>(table[threadIdx.x].hi));
    total.b = (total.b - lo * total.a) * m.invstd;
  }
  if (!grid_sum(total, walk, workspace) || !owns_channel) return;

  if (channel == 0) {
    args.sums[2 * C + sums_tail::tag] = args.tag;
    args.sums[2 * C + sums_tail::tag_squared] = args.tag * args.tag;
  }
  args.sums[channel] = total.a;
  args.sums[C + channel] = total.b;
  if (args.dbias.data) write(args.dbias, channel, total.a);
  if (args.dweight.data) write(args.dweight, channel, total.b);
}

std::array<const void*, 3> tensors(const BackwardReduceArgs& args) { return {args.dy, args.x, args.residual}; }

}  // namespace

cudaError_t backward_reduce(const BackwardReduceArgs& args, const Target& target) {
  return launch<BackwardReducePlan>(args, target, tensors(args), args.mask, [](auto value, auto walk) {
    return backward_reduce_kernel<decltype(value), typename decltype(walk)::type>;
  });
}

bool uses_workspace(const BackwardReduceArgs& args, int sm_count) {
  return shares_sums<BackwardReducePlan>(args, sm_count, tensors(args), args.mask);
}

}  // namespace syncbn::cuda
