// Sums of two quantities per channel: over a warp, a block and the blocks that share channels; always in the same order.
#pragma once

#include "launch.cuh"

namespace syncbn::cuda {

struct alignas(16) Pair {
  double a, b;

  __device__ void add(const Pair& other) {
    a += other.a;
    b += other.b;
  }
};

// Counters come first in the workspace: one for each group that is shared, and one for the blocks of normalize.
struct Workspace {
  unsigned* counters;
  unsigned* normalize_counter;
  Pair* partials;
};

inline Workspace workspace(const Target& target) {
  if (!target.workspace) return {};
  auto* counters = static_cast<unsigned*>(target.workspace);
  return {counters, counters + max_shared_groups(target.sm_count),
          reinterpret_cast<Pair*>(static_cast<char*>(target.workspace) + counter_bytes(target.sm_count))};
}

// Reduces a thread's SUMS sums to one for each of its channels.
template <int CHANNELS, int SUMS, typename T>
__device__ void fold(T (&sums)[SUMS]) {
#pragma unroll
  for (int j = CHANNELS; j < SUMS; ++j) sums[j % CHANNELS] += sums[j];
}

// Each pair becomes its sum over the lanes of a warp that share columns: lanes that differ by a multiple of `width`. The shuffles of one
// offset are independent of each other, so they share one latency.
template <int CHANNELS>
__device__ void warp_sums(Pair (&sums)[CHANNELS], int width) {
  for (int offset = width; offset < WARP; offset *= 2) {
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j) {
      sums[j].add({__shfl_xor_sync(ALL_LANES, sums[j].a, offset), __shfl_xor_sync(ALL_LANES, sums[j].b, offset)});
    }
  }
}

// Thread t gets the sum of column t over the warps of the block; a lane has its warp's sums of CHANNELS columns in `lane_sums`.
template <int CHANNELS>
__device__ Pair block_sum(const Pair (&lane_sums)[CHANNELS], int width) {
  DYNAMIC_SHARED(Pair, sums);  // [warps, CHANNELS, width + 1]: the padding spreads what neighbouring threads read over the banks
  const int stride = width + 1, t = threadIdx.x, lane = t % WARP;
  if (lane < width) {
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j) sums[(t / WARP * CHANNELS + j) * stride + lane] = lane_sums[j];
  }
  __syncthreads();
  Pair total{0, 0};
  if (t < width * CHANNELS) {
    for (int w = 0; w < blockDim.x / WARP; ++w) total.add(sums[(w * CHANNELS + t % CHANNELS) * stride + t / CHANNELS]);
  }
  return total;
}

// Thread t gets the sum of column t over the partial sums [splits, C] of the blocks that share the columns from `first` on.
// Neighbouring threads read neighbouring columns, of a wide tile whole memory lines; then thread t adds up the sums of its column. BATCH
// loads are issued together, and share one latency: the compiler would not move an __ldcg() up across other statements.
template <int BATCH>
__device__ Pair sum_partials(const Pair* partials, int splits, int64_t C, int64_t first, int columns) {
  const int column = threadIdx.x % columns, row = threadIdx.x / columns, rows = blockDim.x / columns;
  Pair row_sum{0, 0};
  for (int k = row; k < splits; k += BATCH * rows) {
    double2 loaded[BATCH];
#pragma unroll
    for (int u = 0; u < BATCH; ++u) {
      const int split = k + u * rows;
      loaded[u] = {0, 0};
      if (split < splits && first + column < C) {
        loaded[u] = __ldcg(reinterpret_cast<const double2*>(&partials[split * C + first + column]));
      }
    }
#pragma unroll
    for (int u = 0; u < BATCH; ++u) row_sum.add({loaded[u].x, loaded[u].y});
  }
  DYNAMIC_SHARED(Pair, sums);  // [rows, columns]
  sums[threadIdx.x] = row_sum;
  __syncthreads();
  Pair total{0, 0};
  if (threadIdx.x < columns) {
    for (int r = 0; r < rows && r < splits; ++r) total.add(sums[r * columns + threadIdx.x]);
  }
  return total;
}

// Whether this is the last of `blocks` blocks to arrive at a counter. The last one leaves the counter at 0 for the next launch.
__device__ inline bool arrives_last(unsigned* counter, unsigned blocks) {
  unsigned arrived;
  COUNT(arrived, counter, blocks - 1);
  return arrived == blocks - 1;
}

// True in the block that arrives last; there thread t has in `total` the sum of column t over all blocks of the group. Which block is last
// varies, but partial sums are always added in the same order.
template <class Walk>
__device__ bool grid_sum(Pair& total, const Walk& walk, const Workspace& workspace) {
  const int splits = walk.config.splits, columns = walk.config.width * Walk::channels;
  if (splits == 1) return true;

  const int64_t C = walk.layout.C, first = walk.first_channel();
  if (threadIdx.x < columns && first + threadIdx.x < C) workspace.partials[walk.split * C + first + threadIdx.x] = total;
  __syncthreads();
  SHARED(bool, last, 1);
  if (threadIdx.x == 0) {
    // One thread orders the whole block's writes and reads, with the barriers around it: memory ordering is cumulative.
    last[0] = arrives_last(&workspace.counters[walk.group], splits);
  }
  __syncthreads();
  if (!last[0]) return false;
  total = sum_partials<Walk::partials>(workspace.partials, splits, C, first, columns);
  return true;
}

}  // namespace syncbn::cuda
