// stats: this rank's shift(C), sum(C) and sumsq(C) of x - shift, weight and samples, in double.
//
// Sums of squares in float cancel if mean >> std, and Welford's method divides at every element. So each thread subtracts K, a trimmed
// mean of the first few of the next n values that it reads, sums d = x - K and d * d in acc_t, and brings them in double to the channel's
// shift, which all blocks share: with k = K - shift, sum = n k + s1 and sumsq = s2 + k (2 s1 + n k). Then it takes another K.
//
// The position of zeros or outliers does not matter. Say that a thread reads w values for K, more than 2, and that K is D away from the
// channel's mean. Then these w values alone add (w - 1) D^2 or more to the sum of squares about that mean: the w - 2 whose mean is K add
// D^2 or more on average, and the greatest adds as much if K is above the channel's mean, or the least if K is below it. The n values about
// this K lose at most a rounding of D^2 each. So the result loses at most n / (w - 1) roundings: 21 if n is 64 and w is 4. If w is 1 or 2,
// as at the edges of planes or in float64, K is the plain mean, and the result loses at most n / w.
//
// Traffic: x once.

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

// Computes for each channel the mean of a few values; of three or more, without the least and the greatest, either of which may be an
// outlier. The values are the elements of the first vector, if it has several of a channel; otherwise they are one element from each of
// `count` vectors.
template <typename acc_t, int CHANNELS, typename scalar_t, int STEP_WIDTH, int UNROLL>
__device__ void trimmed_mean(acc_t (&mean)[CHANNELS], const Vec<scalar_t, STEP_WIDTH> (&in)[UNROLL], int count) {
  constexpr bool within = STEP_WIDTH > CHANNELS;
  const int n = within ? STEP_WIDTH : count;
  const acc_t part = acc_t{1} / static_cast<acc_t>(n > 2 ? n - 2 : n);
#pragma unroll
  for (int j = 0; j < CHANNELS; ++j) {
    acc_t sum = in[0].get(j), least = sum, greatest = sum;
#pragma unroll
    for (int i = 1; i < (within ? STEP_WIDTH : UNROLL); ++i) {
      if (i >= n) break;
      const acc_t value = within ? in[0].get(i) : in[i].get(j);
      sum += value;
      least = value < least ? value : least;
      greatest = value > greatest ? value : greatest;
    }
    mean[j] = (n > 2 ? sum - least - greatest : sum) * part;
  }
}

constexpr int HELD = 64;  // a thread takes a new K after the step that reaches this many values of a channel

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
  acc_t K[CHANNELS] = {}, s1[SUMS] = {}, s2[SUMS] = {};
  int n = 0;
  Pair sums[CHANNELS] = {};
  const auto bring = [&] {
    if (n == 0) return;
    fold<CHANNELS>(s1);
    fold<CHANNELS>(s2);
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j) {
      const double k = static_cast<double>(K[j]) - to_acc(channel_shift[j]), nk = n * k, sum = s1[j];
      sums[j].add({nk + sum, s2[j] + k * (2 * sum + nk)});
    }
#pragma unroll
    for (int j = 0; j < SUMS; ++j) s1[j] = s2[j] = 0;
    n = 0;
  };
  walk.each([&](auto step) {
    constexpr int STEP_WIDTH = decltype(step)::vector, UNROLL = decltype(step)::unroll;
    Vec<scalar_t, STEP_WIDTH> in[UNROLL];
    load(in, x, step);
    if (n == 0 && step.count > 0) trimmed_mean(K, in, step.count);
    n += step.count * STEP_WIDTH / CHANNELS;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (u >= step.count) continue;
#pragma unroll
      for (int j = 0; j < STEP_WIDTH; ++j) {
        const acc_t d = in[u].get(j) - K[j % CHANNELS];
        s1[j % SUMS] += d;
        s2[j % SUMS] = fma(d, d, s2[j % SUMS]);
      }
    }
    if (n >= HELD) bring();
  });
  bring();
  warp_sums(sums, config.width);

  const int64_t C = args.layout.C, channel = walk.first_channel() + threadIdx.x;
  const scalar_t own_shift = shift_of<scalar_t>(args, channel);
  Pair total = block_sum(sums, config.width);
  if (!grid_sum(total, walk, workspace)) return;

  const double count = static_cast<double>(args.layout.outer * args.layout.inner);
  const double divisor = args.rank_weighted && count > 0 ? count : 1;
  if (threadIdx.x < config.width * CHANNELS && channel < C) {
    args.stats[channel] = to_acc(own_shift);
    args.stats[C + channel] = total.a / divisor;
    args.stats[2 * C + channel] = total.b / divisor;
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
