// stats: this rank's shift(C), sum(C) and sumsq(C) of x - shift, weight and samples, in double.
//
// Sums of squares in float cancel where mean >> std, and Welford's method divides at every element. So each warp subtracts K, a mean
// of values from all over its elements, sums d = x - K and d * d in acc_t, and brings them in double to the channel's shift, which all
// blocks share: with k = K - shift, sum = n k + s1 and sumsq = s2 + k (2 s1 + n k). Traffic: x once.

#include "reduce.cuh"
#include "vec.cuh"
#include "walk.cuh"

namespace syncbn::cuda {
namespace {

// The shift of channel c: its first value, or 0. Every block of the channel reads it early, so that its latency is hidden.
template <typename scalar_t>
__device__ scalar_t shift_of(const StatsArgs& args, int64_t c) {
  const bool has_value = args.shifted && args.layout.outer * args.layout.inner > 0 && c < args.layout.C;
  return has_value ? static_cast<const scalar_t*>(args.x)[c * args.layout.inner] : scalar_t{};
}

// K of a lane's channels. Its loads overlap those of the first step. Each lane takes the mean of one vector; together the vectors are
// spread over all that the warp will read, so that leading zeros do not decide. Of three or more lanes the lowest and the highest mean are
// left out, so that an outlier does not decide either. A lane without such a vector takes the step's first one.
template <typename acc_t, int CHANNELS, typename scalar_t, class Walk, int STEP_WIDTH, class Step>
__device__ void estimate_mean(acc_t (&mean)[CHANNELS], const scalar_t* x, const Walk& walk, const Vec<scalar_t, STEP_WIDTH>& first,
                              const Step& step) {
  constexpr int VECTOR_WIDTH = Walk::vector;
  const int width = walk.config.width;
  const auto spread = walk.spread();
  Vec<scalar_t, VECTOR_WIDTH> in[1];
  load(in, x, spread);
  const bool has_value = spread.count > 0 || step.count > 0;
  acc_t lowest[CHANNELS], highest[CHANNELS];
#pragma unroll
  for (int j = 0; j < CHANNELS; ++j) mean[j] = 0;
#pragma unroll
  for (int j = 0; j < VECTOR_WIDTH; ++j)
    mean[j % CHANNELS] += spread.count > 0 ? in[0].get(j) * (acc_t{CHANNELS} / VECTOR_WIDTH) : acc_t{0};
#pragma unroll
  for (int j = 0; j < STEP_WIDTH; ++j)
    mean[j % CHANNELS] += spread.count == 0 && step.count > 0 ? first.get(j) * (acc_t{CHANNELS} / STEP_WIDTH) : acc_t{0};
#pragma unroll
  for (int j = 0; j < CHANNELS; ++j) {
    lowest[j] = has_value ? mean[j] : static_cast<acc_t>(INFINITY);
    highest[j] = has_value ? mean[j] : -static_cast<acc_t>(INFINITY);
  }
  warp_sums<CHANNELS>(mean, width);
  warp_join<CHANNELS>(lowest, width, [](acc_t a, acc_t b) { return a < b ? a : b; });
  warp_join<CHANNELS>(highest, width, [](acc_t a, acc_t b) { return a > b ? a : b; });
  const int lanes = warp_sum(int{has_value}, width);
#pragma unroll
  for (int j = 0; j < CHANNELS; ++j) {
    mean[j] = lanes > 2 ? (mean[j] - lowest[j] - highest[j]) / static_cast<acc_t>(lanes - 2) : mean[j] / static_cast<acc_t>(max(lanes, 1));
  }
}

template <typename scalar_t, class Walk>
__global__ void __launch_bounds__(THREADS, Walk::blocks_per_sm)
    stats_kernel(const StatsArgs args, const Config config, const Workspace workspace) {
  using acc_t = acc_type<scalar_t>;
  constexpr int CHANNELS = Walk::channels, SUMS = Walk::sums;
  const auto* x = static_cast<const scalar_t*>(args.x);
  const Walk walk(args.layout, config);
  static_assert(Walk::max_sum_bytes < SHARED_BYTES, "the launch would fail");

  scalar_t channel_shift[CHANNELS];
#pragma unroll
  for (int j = 0; j < CHANNELS; ++j) channel_shift[j] = shift_of<scalar_t>(args, walk.first_channel() + walk.column() + j);
  acc_t shift[CHANNELS] = {}, s1[SUMS] = {}, s2[SUMS] = {};
  int n = 0;
  bool shifted = false;
  walk.each([&](auto step) {
    constexpr int STEP_WIDTH = decltype(step)::vector, UNROLL = decltype(step)::unroll;
    Vec<scalar_t, STEP_WIDTH> in[UNROLL];
    load(in, x, step);
    if (!shifted) {
      estimate_mean(shift, x, walk, in[0], step);
      shifted = __any_sync(ALL_LANES, step.count > 0);
    }
    n += step.count * STEP_WIDTH / CHANNELS;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (u >= step.count) continue;
#pragma unroll
      for (int j = 0; j < STEP_WIDTH; ++j) {
        const acc_t d = in[u].get(j) - shift[j % CHANNELS];
        s1[j % SUMS] += d;
        s2[j % SUMS] = fma(d, d, s2[j % SUMS]);
      }
    }
  });

  fold<CHANNELS>(s1);
  fold<CHANNELS>(s2);
  warp_sums<CHANNELS>(s1, config.width);
  warp_sums<CHANNELS>(s2, config.width);
  const double all = warp_sum(static_cast<double>(n), config.width);
  Pair sums[CHANNELS];
#pragma unroll
  for (int j = 0; j < CHANNELS; ++j) {
    const double k = static_cast<double>(shift[j]) - to_acc(channel_shift[j]), sum = s1[j], sumsq = s2[j];
    sums[j] = {all * k + sum, sumsq + k * (2 * sum + all * k)};
  }
  const int64_t C = args.layout.C, channel = walk.first_channel() + threadIdx.x;
  const scalar_t own_shift = shift_of<scalar_t>(args, channel);
  Pair total = block_sum(sums, config.width);
  if (!grid_sum(total, walk, workspace)) return;

  const double count = static_cast<double>(args.layout.outer * args.layout.inner);
  const double samples = args.rank_weighted && count > 0 ? count : 1;
  if (threadIdx.x < config.width * CHANNELS && channel < C) {
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
  return launch<StatsPlan>(args, target, tensors(args), nullptr,
                           [](auto value, auto walk) { return stats_kernel<decltype(value), typename decltype(walk)::type>; });
}

bool uses_workspace(const StatsArgs& args, int sm_count) { return shares_sums<StatsPlan>(args, sm_count, tensors(args), nullptr); }

}  // namespace syncbn::cuda
