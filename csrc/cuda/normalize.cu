// normalize: y = activation(weight * xhat + bias + residual), and the moving statistics.
//
// Memory-bound: x (and residual) once, y once, one bit per element where backward needs the sign of z. The statistics are
// finalized by one thread per channel and block into shared memory. Reverse order: the last x that stats() read is still in L2.

#include "activation.cuh"
#include "finalize.cuh"
#include "mask.cuh"
#include "reduce.cuh"
#include "walk.cuh"

namespace syncbn::cuda {
namespace {

// old + factor * (next - old) from the nearer end: exact where the factor is 0 or 1.
__device__ inline double moved(double old, double next, double factor) {
  return factor < 0.5 ? old + factor * (next - old) : next - (1 - factor) * (next - old);
}

__device__ void update_running_stats(const NormalizeArgs& args, const Moments& m, int64_t c) {
  const double count = args.stats.data[3 * args.layout.C + 1];
  const int64_t tracked = args.num_batches_tracked && *args.num_batches_tracked > 0 ? *args.num_batches_tracked : 0;
  const double factor = args.cumulative ? 1.0 / static_cast<double>(tracked + 1) : args.momentum;
  if (!(count > 0) || factor == 0) return;
  const double var = args.unbiased ? m.var * count / (count > 2 ? count - 1 : 1) : m.var;
  const ChannelVector &mean = args.running_mean, &variance = args.running_var;
  if (mean.data) write(mean, c, moved(read(mean, c), m.shift + m.offset, factor));
  if (variance.data) write(variance, c, moved(read(variance, c), var, factor));
}

template <typename scalar_t, class Walk>
__global__ void __launch_bounds__(THREADS, Walk::blocks_per_sm)
    normalize_kernel(const NormalizeArgs args, const Config config, const Workspace workspace) {
  using acc_t = acc_type<scalar_t>;
  constexpr int N = Walk::channels;
  const auto* x = static_cast<const scalar_t*>(args.x);
  const auto* residual = static_cast<const scalar_t*>(args.residual);
  auto* y = static_cast<scalar_t*>(args.y);
  const int64_t C = args.layout.C;
  const Walk walk(args.layout, config);

  // Where threads share a byte of the mask, one of them needs the parameters of the 7 channels behind its own.
  constexpr int behind = Walk::shares_bytes ? 7 : 0;
  SHARED(Affine<acc_t>, table, Walk::max_columns + behind);
  const int t = threadIdx.x, columns = config.width * N;
  const int64_t channel = walk.first_channel() + t;
  if (t < columns + behind && channel < C) {
    const Moments m = finalize(args.stats, C, channel);
    table[t] = make_affine<acc_t>(m, args.weight, args.bias, channel);
    if (walk.split == 0 && t < columns) update_running_stats(args, m, channel);
  }
  __syncthreads();
  // Every group's first block has read num_batches_tracked before it is counted here; the last one counted may change it.
  if (args.num_batches_tracked && walk.split == 0 && t == 0) {
    __threadfence();
    const bool last = atomicInc(workspace.normalize_counter, config.groups - 1) == config.groups - 1;
    if (last && args.stats.data[3 * C + 1] > 0) *args.num_batches_tracked += 1;
  }

  Affine<acc_t> affine[N];
#pragma unroll
  for (int j = 0; j < N; ++j) affine[j] = table[walk.column() + j];
  const acc_t negative_slope = static_cast<acc_t>(args.negative_slope);

  walk.each([&](auto step) {
    constexpr int W = decltype(step)::vector, U = decltype(step)::unroll;
    Vec<scalar_t, W> in[U], add[U];
    load(in, x, step);
    if (residual) load(add, residual, step);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      unsigned bits = 0;
      if (u < step.count) {
        acc_t z[W];
#pragma unroll
        for (int j = 0; j < W; ++j) {
          z[j] = affine[j % N](in[u].get(j));
          if (residual) z[j] += add[u].get(j);
        }
        if (args.mask) {
#pragma unroll
          for (int j = 0; j < W; ++j) bits |= unsigned{positive(z[j])} << j;
        }
        activate(z, args.activation, negative_slope);
        store<W>(y + step.index(u), z);
      }
      if (!args.mask) continue;
      if constexpr (!Walk::shares_bytes) {
        store_bits<W>(args.mask, step.mask_byte(u), step.index(u), bits, u < step.count);
      } else if (u < step.count) {
        // A byte's elements lie in other warps, even in other blocks: its first thread computes them all.
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

}  // namespace

cudaError_t normalize(const NormalizeArgs& args, const Target& target) {
  return launch<NormalizePlan>(args, target, {args.x, args.residual, args.y}, [](auto value, auto walk) {
    return normalize_kernel<decltype(value), typename decltype(walk)::type>;
  });
}

}  // namespace syncbn::cuda
