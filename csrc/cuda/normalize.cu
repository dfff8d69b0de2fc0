// normalize: y = activation(weight * xhat + bias + residual), and the moving statistics.
//
// Traffic: x, y, and if there are any the residual and the mask, once each. One thread per channel and block finalizes the statistics into
// shared memory. The walk is reversed: the last x that stats() read is still in L2.

#include "activation.cuh"
#include "finalize.cuh"
#include "mask.cuh"
#include "reduce.cuh"
#include "verify.cuh"
#include "walk.cuh"

namespace syncbn::cuda {
namespace {

// The inputs of a channel's update of the moving statistics.
struct Running {
  Bits mean, var;
  double count;
  int64_t tracked;
};

__device__ Running load_running(const NormalizeArgs& args, int64_t c) {
  return {load_bits(args.running_mean, c), load_bits(args.running_var, c), args.stats.data[3 * args.layout.C + stats_tail::samples],
          args.cumulative && args.num_batches_tracked ? *args.num_batches_tracked : 0};
}

__device__ void update_running_stats(const NormalizeArgs& args, const Moments& m, const Running& old, int64_t c) {
  const double count = old.count, factor = running_factor(args.cumulative, old.tracked, args.momentum);
  if (!(count > 0) || factor == 0) return;
  const double var = args.unbiased ? m.var * unbiased_factor(count) : m.var;
  const double old_mean = to_double(args.running_mean.dtype, old.mean), old_var = to_double(args.running_var.dtype, old.var);
  if (args.running_mean.data) write(args.running_mean, c, moved(old_mean, m.mean(), factor));
  if (args.running_var.data) write(args.running_var, c, moved(old_var, var, factor));
}

// Called by one thread of the first block of each group. With a cumulative average each of these blocks arrives here after reading
// num_batches_tracked, so the last to arrive may update it. With a momentum no block reads it.
__device__ void count_batch(const NormalizeArgs& args, const Walk& walk, const Workspace& workspace, double count) {
  const bool last = args.cumulative ? arrives_last(workspace.normalize_counter, walk.config.groups) : walk.group == 0;
  if (last && count > 0) *args.num_batches_tracked += 1;
}

template <typename scalar_t, class Walk>
__global__ void __launch_bounds__(THREADS, Walk::blocks_per_sm)
    normalize_kernel(const NormalizeArgs args, const Config config, const Workspace workspace) {
  using acc_t = acc_type<scalar_t>;
  constexpr int CHANNELS = Walk::channels;
  const auto* x = static_cast<const scalar_t*>(args.x);
  const auto* residual = static_cast<const scalar_t*>(args.residual);
  auto* y = static_cast<scalar_t*>(args.y);
  const int64_t C = args.layout.C;
  const Walk walk(args.layout, config);

  // If threads share a byte of the mask, the thread that writes it needs the parameters of the next 7 channels.
  constexpr int following = Walk::shares_bytes ? 7 : 0;
  SHARED(Affine<acc_t>, table, Walk::max_columns + following);
  const int t = threadIdx.x, columns = config.width * CHANNELS;
  const int64_t channel = walk.first_channel() + t;
  const bool owns_channel = t < columns + following && channel < C, updates = owns_channel && walk.split == 0 && t < columns;
  walk.first([&](auto step) {
    prefetch(x, step);
    if (residual) prefetch(residual, step);
  });
  const TagSums tag_sums(args.verification, walk, args.stats.data + 3 * C + stats_tail::tag);
  Moments moments{};
  Running running{};
  if (owns_channel) {
    const Channel loaded = load_channel(args, channel);
    if (updates) running = load_running(args, channel);
    moments = finalize(loaded, args.stats.eps);
    table[t] = make_affine<acc_t>(affine_parameters<acc_t>(moments, loaded, args));
  }
  __syncthreads();
  // After the barrier: the other warps already load x.
  tag_sums.verify(args.verification);
  if (updates) update_running_stats(args, moments, running, channel);
  if (updates && t == 0 && args.num_batches_tracked) count_batch(args, walk, workspace, running.count);

  Affine<acc_t> affine[CHANNELS];
#pragma unroll
  for (int j = 0; j < CHANNELS; ++j) affine[j] = table[walk.column() + j];
  const acc_t negative_slope = static_cast<acc_t>(args.negative_slope);

  walk.each([&](auto step) {
    constexpr int STEP_WIDTH = decltype(step)::vector, UNROLL = decltype(step)::unroll;
    Vec<scalar_t, STEP_WIDTH> in[UNROLL], add[UNROLL];
    load(in, x, step);
    if (residual) load(add, residual, step);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      unsigned bits = 0;
      if (u < step.count) {
        acc_t z[STEP_WIDTH];
#pragma unroll
        for (int j = 0; j < STEP_WIDTH; ++j) {
          z[j] = affine[j % CHANNELS](in[u].get(j));
          if (residual) z[j] += add[u].get(j);
        }
        if (args.mask) {
#pragma unroll
          for (int j = 0; j < STEP_WIDTH; ++j) bits |= unsigned{positive(z[j])} << j;
        }
        activate(z, args.activation, negative_slope);
        store<STEP_WIDTH>(y + step.index(u), z);
      }
      if (!args.mask) continue;
      if constexpr (!Walk::shares_bytes) {
        store_bits<STEP_WIDTH>(args.mask, step.mask_byte(u), step.index(u), bits, u < step.count);
      } else if (u < step.count) {
        // A mask byte may span several warps or even blocks, so the thread that owns its first element computes the whole byte.
        const int64_t f = step.index(u), c = f - (step.row + u * step.row_stride) * C;
        if (f % 8 != 0 && c != 0) continue;
#pragma unroll 1
        for (int j = 1; j < 8 - f % 8 && c + j < C; ++j) {
          const acc_t z = table[walk.column() + j](to_acc(x[f + j])) + to_acc(residual[f + j]);
          bits |= unsigned{positive(z)} << j;
        }
        args.mask[step.mask_byte(u)] = static_cast<uint8_t>(bits << f % 8);
      }
    }
  });
}

std::array<const void*, 3> tensors(const NormalizeArgs& args) { return {args.x, args.residual, args.y}; }

}  // namespace

cudaError_t normalize(const NormalizeArgs& args, const Target& target) {
  return launch<NormalizePlan>(args, target, tensors(args), args.mask,
                               [](auto value, auto walk) { return normalize_kernel<decltype(value), typename decltype(walk)::type>; });
}

bool uses_workspace(const NormalizeArgs& args, int) { return args.num_batches_tracked && args.cumulative; }

}  // namespace syncbn::cuda
