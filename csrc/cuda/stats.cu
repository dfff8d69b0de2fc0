// stats: this rank's shift(C), sum(C) and sumsq(C) of x - shift, weight and samples, in double.
//
// Sums of squares in float cancel where mean >> std, and Welford's method divides at every element. So each warp subtracts K, a mean
// of values from all over its elements, sums d = x - K and d * d in acc_t, and brings them in double to the channel's shift, which all blocks share: with k = K - shift, sum = n k + s1 and
// sumsq = s2 + k (2 s1 + n k). Traffic: x once.

#include "reduce.cuh"
#include "vec.cuh"
#include "walk.cuh"

namespace syncbn::cuda {
namespace {

// What is subtracted from the values of channel c: its first value, or 0. Read before it is needed, as every block of the channel does.
template <typename scalar_t>
__device__ scalar_t shift_of(const StatsArgs& args, int64_t c) {
  const bool has_value = args.shifted && args.layout.outer * args.layout.inner > 0 && c < args.layout.C;
  return has_value ? static_cast<const scalar_t*>(args.x)[c * args.layout.inner] : scalar_t{};
}

// K of a lane's channels. Its loads are under way together with those of the first step. Each lane has the mean of one vector, from all
// over what the warp will read, so that elements that begin with zeros do not decide; of three lanes and more the lowest and the
// highest mean are left out, so that an outlier does not either. Where there is no such vector, the step's first one serves.
template <typename acc_t, int N, typename scalar_t, class Walk, int W, class Step>
__device__ void estimate_mean(acc_t (&mean)[N], const scalar_t* x, const Walk& walk, const Vec<scalar_t, W>& first, const Step& step) {
  constexpr int V = Walk::vector;
  const int width = walk.config.width;
  const auto spread = walk.spread();
  Vec<scalar_t, V> in[1];
  load(in, x, spread);
  const bool has_value = spread.count > 0 || step.count > 0;
  acc_t lowest[N], highest[N];
#pragma unroll
  for (int j = 0; j < N; ++j) mean[j] = 0;
#pragma unroll
  for (int j = 0; j < V; ++j) mean[j % N] += spread.count > 0 ? in[0].get(j) * (acc_t{N} / V) : acc_t{0};
#pragma unroll
  for (int j = 0; j < W; ++j) mean[j % N] += spread.count == 0 && step.count > 0 ? first.get(j) * (acc_t{N} / W) : acc_t{0};
#pragma unroll
  for (int j = 0; j < N; ++j) {
    lowest[j] = has_value ? mean[j] : static_cast<acc_t>(INFINITY);
    highest[j] = has_value ? mean[j] : -static_cast<acc_t>(INFINITY);
  }
  warp_sums<N>(mean, width);
  warp_join<N>(lowest, width, [](acc_t a, acc_t b) { return a < b ? a : b; });
  warp_join<N>(highest, width, [](acc_t a, acc_t b) { return a > b ? a : b; });
  const int lanes = warp_sum(int{has_value}, width);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    mean[j] = lanes > 2 ? (mean[j] - lowest[j] - highest[j]) / static_cast<acc_t>(lanes - 2) : mean[j] / static_cast<acc_t>(max(lanes, 1));
  }
}

template <typename scalar_t, class Walk>
__global__ void __launch_bounds__(THREADS, Walk::blocks_per_sm)
    stats_kernel(const StatsArgs args, const Config config, const Workspace workspace) {
  using acc_t = acc_type<scalar_t>;
  constexpr int N = Walk::channels, S = Walk::sums;
  const auto* x = static_cast<const scalar_t*>(args.x);
  const Walk walk(args.layout, config);
  static_assert(Walk::max_sum_bytes < SHARED_BYTES, "the launch would fail");

  scalar_t channel_shift[N];
#pragma unroll
  for (int j = 0; j < N; ++j) channel_shift[j] = shift_of<scalar_t>(args, walk.first_channel() + walk.column() + j);
  acc_t shift[N] = {}, s1[S] = {}, s2[S] = {};
  int n = 0;
  bool shifted = false;
  walk.each([&](auto step) {
    constexpr int W = decltype(step)::vector, U = decltype(step)::unroll;
    Vec<scalar_t, W> in[U];
    load(in, x, step);
    if (!shifted) {
      estimate_mean(shift, x, walk, in[0], step);
      shifted = __any_sync(ALL_LANES, step.count > 0);
    }
    n += step.count * W / N;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (u >= step.count) continue;
#pragma unroll
      for (int j = 0; j < W; ++j) {
        const acc_t d = in[u].get(j) - shift[j % N];
        s1[j % S] += d;
        s2[j % S] = fma(d, d, s2[j % S]);
      }
    }
  });

  fold<N>(s1);
  fold<N>(s2);
  warp_sums<N>(s1, config.width);
  warp_sums<N>(s2, config.width);
  const double all = warp_sum(static_cast<double>(n), config.width);
  Pair sums[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const double k = static_cast<double>(shift[j]) - to_acc(channel_shift[j]), sum = s1[j], sumsq = s2[j];
    sums[j] = {all * k + sum, sumsq + k * (2 * sum + all * k)};
  }
  const int64_t C = args.layout.C, channel = walk.first_channel() + threadIdx.x;
  const scalar_t own_shift = shift_of<scalar_t>(args, channel);
  Pair total = block_sum(sums, config.width);
  if (!grid_sum(total, walk, workspace)) return;

  const double count = static_cast<double>(args.layout.outer * args.layout.inner);
  const double samples = args.rank_weighted && count > 0 ? count : 1;
  if (threadIdx.x < config.width * N && channel < C) {
    args.stats[channel] = to_acc(own_shift);
    args.stats[C + channel] = total.a / samples;
    args.stats[2 * C + channel] = total.b / samples;
  }
  if (walk.group == 0 && threadIdx.x == 0) {
    double* tail = args.stats + 3 * C;
    tail[stats_tail::weight] = args.rank_weighted ? count > 0 : count;
    tail[stats_tail::samples] = count;
    tail[stats_tail::tag] = args.tag;
    tail[stats_tail::tag_squared] = args.tag * args.tag;
  }
}

std::array<const void*, 1> tensors(const StatsArgs& args) { return {args.x}; }

}  // namespace

cudaError_t stats(const StatsArgs& args, const Target& target) {
  return launch<StatsPlan>(args, target, tensors(args), nullptr, [](auto value, auto walk) {
    return stats_kernel<decltype(value), typename decltype(walk)::type>;
  });
}

bool uses_workspace(const StatsArgs& args, int sm_count) { return shares_sums<StatsPlan>(args, sm_count, tensors(args), nullptr); }

}  // namespace syncbn::cuda
