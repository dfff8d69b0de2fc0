// The launch configuration of every kernel is a value from one function here, with its reason.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "ops.h"

// The three things that g++ cannot parse; tests/emulation has its own.
#ifdef __CUDACC__
#define SHARED(type, name, n) __shared__ type name[n]
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#define LAUNCH(kernel, config, stream, ...) \
  kernel<<<(config).groups * (config).splits, (config).threads, (config).shared_bytes, stream>>>(__VA_ARGS__)
#endif

namespace syncbn::cuda {

constexpr int WARP = 32;
constexpr int THREADS = 256;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr size_t SHARED_BYTES = 48 * 1024;  // of a block that has not asked for more

// The workspace has space for this many blocks on each SM that add their sums to those of others: no Plan may ask for more.
#ifndef SYNCBN_MAX_BLOCKS_PER_SM
#define SYNCBN_MAX_BLOCKS_PER_SM 4
#endif
constexpr int MAX_BLOCKS_PER_SM = SYNCBN_MAX_BLOCKS_PER_SM;

struct Config {
  int groups;        // of channels: a block works on one group
  int splits;        // blocks that share a group
  int width;         // neighbouring threads that lie on neighbouring channels
  int pieces;        // into which a plane is cut,
  int piece;         // each of so many elements
  int threads;
  int shared_bytes;  // sum_bytes()
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Shared memory of block_sum() and, after it, of sum_partials(): two doubles for each warp and column with one column of padding for
// each of a vector's elements, or two for each thread.
constexpr int sum_bytes(int warps, int width, int vector) { return std::max(warps * (width + 1) * vector, warps * WARP) * 16; }

// One wave: as many blocks as are resident at once (rounded down, for one block more would be a second wave), but no block
// without work. More blocks than that would finalize the statistics more often and leave more partial sums.
inline int splits_for(int sm_count, int blocks_per_sm, int64_t groups, int64_t max_splits) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(int64_t{sm_count} * blocks_per_sm / groups, max_splits)));
}

// inner > 1. A group is a channel. A warp takes a piece of a plane: at most what its lanes load in one step, a multiple of 8.
inline Config planes_config(const Layout& layout, int vector, int unroll, int blocks_per_sm, int sm_count) {
  const int64_t pieces = std::max<int64_t>(1, ceil_div(layout.inner, WARP * vector * unroll));
  const int piece = static_cast<int>(ceil_div(ceil_div(layout.inner, pieces), 8) * 8);
  const int64_t runs = layout.outer * pieces;
  const int warps = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(THREADS / WARP, runs)));
  const int splits = splits_for(sm_count, blocks_per_sm, layout.C, ceil_div(runs, warps));
  return {static_cast<int>(layout.C), splits, 1, static_cast<int>(pieces), piece, warps * WARP, sum_bytes(warps, 1, 1)};
}

// inner == 1. A group is a tile of channels, `width` vectors wide; the rest of a warp lies on further rows. A tile is at most a memory
// line of 128 bytes: the fewer channels it has, the fewer blocks share it, and the less one block adds up at the end.
inline Config pixels_config(const Layout& layout, int vector, int unroll, int max_width, int blocks_per_sm, int sm_count) {
  const int64_t vectors = ceil_div(layout.C, vector);
  int width = 1;
  while (width < max_width && width < vectors) width *= 2;
  const int64_t groups = ceil_div(vectors, width);
  const int64_t steps = ceil_div(layout.outer, int64_t{THREADS / width} * unroll);
  const int splits = splits_for(sm_count, blocks_per_sm, groups, steps);
  return {static_cast<int>(groups), splits, width, 1, 0, THREADS, sum_bytes(THREADS / WARP, width, vector)};
}

// The workspace holds a counter for each group whose blocks share sums, and one for num_batches_tracked; then the partial sums,
// two doubles for each block and column. splits_for() bounds both, whatever the shapes: so it is allocated once.
inline int64_t max_sharing_blocks(int sm_count) { return int64_t{sm_count} * MAX_BLOCKS_PER_SM; }
inline size_t counter_bytes(int sm_count) { return ceil_div((max_sharing_blocks(sm_count) + 1) * sizeof(unsigned), 16) * 16; }
inline size_t workspace_bytes(int sm_count) { return counter_bytes(sm_count) + max_sharing_blocks(sm_count) * THREADS * 16; }

}  // namespace syncbn::cuda
