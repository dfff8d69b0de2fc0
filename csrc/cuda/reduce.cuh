// Sums of two quantities per channel: over a warp, a block and the blocks that share a group; always in the same order.
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

// Counters come first in the workspace: one for each group that is shared, and one for num_batches_tracked.
struct Workspace {
  unsigned* counters;
  unsigned* normalize_counter;
  Pair* partials;
};

inline Workspace workspace(const Target& target) {
  auto* counters = static_cast<unsigned*>(target.workspace);
  return {counters, counters + max_sharing_blocks(target.sm_count),
          reinterpret_cast<Pair*>(static_cast<char*>(target.workspace) + counter_bytes(target.sm_count))};
}

// S sums of a thread become its N: where all are of one channel, one.
template <int N, int S, typename T>
__device__ void fold(T (&sums)[S]) {
#pragma unroll
  for (int j = N; j < S; ++j) sums[j % N] += sums[j];
}

// The sum over the lanes of a warp that lie on the same columns: lanes that differ by a multiple of `width`.
template <typename T>
__device__ T warp_sum(T value, int width) {
  for (int offset = width; offset < WARP; offset *= 2) value += __shfl_xor_sync(ALL_LANES, value, offset);
  return value;
}

// Thread t gets the sum of column t over the warps of the block, `mine` being a warp's sums of the columns that a lane lies on.
template <int N>
__device__ Pair block_sum(const Pair (&mine)[N], int width) {
  DYNAMIC_SHARED(Pair, sums);  // [warps, columns]
  const int columns = width * N, lane = threadIdx.x % WARP;
  if (lane < width) {
    for (int j = 0; j < N; ++j) sums[threadIdx.x / WARP * columns + lane * N + j] = mine[j];
  }
  __syncthreads();
  Pair total{0, 0};
  if (threadIdx.x < columns) {
    for (int w = 0; w < blockDim.x / WARP; ++w) total.add(sums[w * columns + threadIdx.x]);
  }
  return total;
}

// True in the block that arrives last; there thread t has in `total` the sum of column t over all blocks of the group. Who is
// last varies, the order of the additions does not: partial sums are added by index.
template <class Walk>
__device__ bool grid_sum(Pair& total, const Walk& walk, const Workspace& workspace) {
  constexpr int N = Walk::channels;
  const int splits = walk.config.splits, width = walk.config.width;
  if (splits == 1) return true;

  const int64_t C = walk.layout.C, first = walk.first_channel();
  if (threadIdx.x < width * N && first + threadIdx.x < C) workspace.partials[walk.split * C + first + threadIdx.x] = total;
  __threadfence();
  __syncthreads();
  SHARED(bool, last, 1);
  // atomicInc wraps to 0 after the last block: ready for the next launch.
  if (threadIdx.x == 0) last[0] = atomicInc(&workspace.counters[walk.group], splits - 1) == splits - 1;
  __syncthreads();
  if (!last[0]) return false;
  __threadfence();

  Pair mine[N] = {};
  const int64_t channel = first + walk.column();
  for (int k = threadIdx.x / width; k < splits; k += blockDim.x / width) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (channel + j >= C) continue;
      const Pair* partial = &workspace.partials[k * C + channel + j];
      mine[j].add({__ldcg(&partial->a), __ldcg(&partial->b)});
    }
  }
  for (Pair& p : mine) p = {warp_sum(p.a, width), warp_sum(p.b, width)};
  total = block_sum(mine, width);
  return true;
}

}  // namespace syncbn::cuda
