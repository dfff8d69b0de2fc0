// Launch configurations: each function that returns a Config has the reasons for it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "ops.h"

// CUDA syntax that g++ cannot parse; tests/kernels/emulation defines its own versions.
#ifdef __CUDACC__
#define SHARED(type, name, n) __shared__ type name[n]
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#define LAUNCH(kernel, config, stream, ...) \
  kernel<<<(config).groups*(config).splits, (config).threads, (config).shared_bytes, stream>>>(__VA_ARGS__)
#define FORGET(value) asm volatile("" : "+l"(value))  // the compiler must assume that the value changes here
#define PREFETCH(address) asm volatile("prefetch.global.L2 [%0];" ::"l"(address))
// Adds 1 to a counter, or sets it to 0 if it is `last`; `old` is what it was. Acquires and releases: threads that count later see what this
// thread wrote before, and it sees what threads that counted earlier wrote before.
#define COUNT(old, counter, last) \
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(last) : "memory")
#endif

namespace syncbn::cuda {

constexpr int WARP = 32;
constexpr int THREADS = 256;
constexpr int PEER_THREADS = 64;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr size_t SHARED_BYTES = 48 * 1024;  // of a block that has not asked for more
constexpr int MAX_RESIDENT = 32;            // blocks on an SM, however small; fewer on some GPUs

// No Plan may ask for more blocks of THREADS threads on an SM: the workspace (at the end of this file) has space for that many.
#ifndef SYNCBN_MAX_BLOCKS_PER_SM
#define SYNCBN_MAX_BLOCKS_PER_SM 4
#endif
constexpr int MAX_BLOCKS_PER_SM = SYNCBN_MAX_BLOCKS_PER_SM;

struct Config {
  int groups;     // of channels: a block works on one group
  int splits;     // blocks that share a group
  int width;      // vectors of channels in a tile, one for each of `width` neighbouring threads (Columns); 1 (Planes)
  int64_t runs;   // of a group: a warp takes one at a time (Planes), or a block (Columns)
  int pieces;     // of a plane
  int piece;      // elements of one
  int lane_bits;  // 2^lane_bits lanes of a warp share one plane
  int samples;    // whose planes a run takes: more than 1 only if planes are not cut
  // A lane's vectors of one step are `samples_apart` samples apart if a run takes whole planes of several samples, with along == 0;
  // otherwise they are `along` elements apart in the same plane, and samples_apart == 0.
  int samples_apart, along;
  int64_t vector_stride, row_stride;  // in elements, and in rows of the mask
  int64_t sample_stride;              // from an element to the one of the next sample
  int threads;
  int shared_bytes;  // sum_bytes(), or 0 without sums
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Shared memory of block_sum() and, after it, of sum_partials(), which use the same bytes: 16 (two doubles) for each entry of
// [warps, vector, width + 1], whose last column is padding, or for each thread, whichever is more.
constexpr int sum_bytes(int warps, int width, int vector) { return std::max(warps * (width + 1) * vector, warps * WARP) * 16; }

// How many blocks of `warps` warps are resident at once, if an SM has the registers for `blocks_per_sm` blocks of THREADS threads.
inline int64_t resident_blocks(int sm_count, int blocks_per_sm, int warps) {
  return int64_t{sm_count} * std::min(blocks_per_sm * (THREADS / WARP) / warps, MAX_RESIDENT);
}

// One wave: as many blocks as are resident at once (rounded down, because one more block would be a second wave), but no block
// without work. More blocks would repeat the finalization and add partial sums.
inline int splits_for(int64_t resident, int64_t groups, int64_t max_splits) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(resident / groups, max_splits)));
}

// Warps in a block of Planes, if a channel has `runs` runs. Blocks shrink until every channel has a resident block: if only a few channels
// had none, most SMs would idle through a second wave. If more than a quarter of the machine would then be empty, and each warp has many
// runs, blocks are halved, so that several share a channel. Measured on an H100 (benchmarks/results/).
inline int planes_warps(int64_t channels, int64_t runs, int blocks_per_sm, bool sums, int sm_count) {
  const auto resident = [&](int warps) { return resident_blocks(sm_count, blocks_per_sm, warps); };
  int warps = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(THREADS / WARP, runs)));
  // Without sums, blocks with much work need not shrink: they wait for nothing at their end, so those of the next wave overlap them.
  while (warps > 1 && channels > resident(warps) && (sums || runs < 6 * warps)) warps /= 2;
  const int64_t filled = std::max<int64_t>(1, resident(warps) / channels) * channels;
  if (warps > 1 && filled < resident(warps) * 3 / 4 && runs * channels >= 12 * warps * filled) warps /= 2;
  return warps;
}

// inner > 1. A group is a channel. A warp takes a piece of a plane: a multiple of 8 elements, at most what its lanes load in one step. If a
// plane has at most one vector for each lane, and a channel's planes begin equally far from a multiple of 8, the warp takes several
// planes. Each gets at least 8 lanes, because the edges of more planes would need more steps.
inline Config planes_config(const Layout& layout, int vector, int unroll, int blocks_per_sm, bool sums, int sm_count) {
  const int64_t pieces = std::max<int64_t>(1, ceil_div(layout.inner, WARP * vector * unroll));
  const int piece = static_cast<int>(ceil_div(ceil_div(layout.inner, pieces), 8) * 8);
  const int64_t vectors = ceil_div(layout.inner, vector);
  const int64_t sample_stride = layout.C * layout.inner;
  const bool small = vectors <= WARP && sample_stride % 8 == 0;
  int lane_bits = small ? 3 : 5;
  while (small && 1 << lane_bits < vectors) ++lane_bits;
  const int apart = small ? WARP >> lane_bits : 0, along = small ? 0 : WARP * vector, samples = small ? apart * unroll : 1;
  const int64_t runs = ceil_div(layout.outer, samples) * pieces;
  const int warps = planes_warps(layout.C, runs, blocks_per_sm, sums, sm_count);
  const int splits = splits_for(resident_blocks(sm_count, blocks_per_sm, warps), layout.C, ceil_div(runs, warps));
  Config config{};
  config.groups = static_cast<int>(layout.C), config.splits = splits, config.width = 1, config.runs = runs;
  config.pieces = static_cast<int>(pieces), config.piece = piece;
  config.lane_bits = lane_bits, config.samples = samples, config.samples_apart = apart, config.along = along;
  config.vector_stride = apart * sample_stride + along, config.row_stride = apart * layout.C, config.sample_stride = sample_stride;
  config.threads = warps * WARP, config.shared_bytes = sums ? sum_bytes(warps, 1, 1) : 0;
  return config;
}

// inner == 1. A group is a tile of channels, `width` vectors wide; the remaining lanes of a warp take further rows. A tile is at most a
// memory line of 128 bytes: the fewer channels it has, the fewer blocks share it, and the less one block adds up at the end. In a
// reduction two tiles of half a line take the place of a single tile, which all blocks would share, unless a block's walk is so long that
// whole lines gain more.
inline Config columns_config(const Layout& layout, int vector, int unroll, int max_width, int blocks_per_sm, bool sums, int sm_count) {
  const int64_t vectors = ceil_div(layout.C, vector);
  int width = 1;
  while (width < max_width && width < vectors) width *= 2;
  const int64_t resident = resident_blocks(sm_count, blocks_per_sm, THREADS / WARP);
  const auto runs_of = [&](int width) { return ceil_div(layout.outer, int64_t{THREADS / width} * unroll); };
  if (sums && width == 8 && vectors <= width && runs_of(width) < 32 * resident) width = 4;
  const int64_t groups = ceil_div(vectors, width), runs = runs_of(width);
  const int splits = splits_for(resident, groups, runs);
  Config config{};
  config.groups = static_cast<int>(groups), config.splits = splits, config.width = width, config.runs = runs;
  config.threads = THREADS, config.shared_bytes = sums ? sum_bytes(THREADS / WARP, width, vector) : 0;
  return config;
}

// One thread for each value, in small blocks: they spread over many SMs, of which each sends a few values to all other ranks.
inline Config peers_config(int64_t numel) {
  Config config{};
  config.groups = static_cast<int>(ceil_div(numel, PEER_THREADS)), config.splits = 1, config.threads = PEER_THREADS;
  return config;
}

// The workspace holds a counter for each group whose blocks share sums, and one for num_batches_tracked; then the partial sums,
// two doubles for each block and column. splits_for() bounds both, whatever the shapes: so one size serves every launch on a device. A
// shared group has two resident blocks or more. A block of Columns has at most 64 columns, and there is space for THREADS; a block of
// Planes has one column, and an SM may have MAX_RESIDENT such blocks.
inline int64_t max_shared_groups(int sm_count) { return int64_t{sm_count} * MAX_RESIDENT / 2; }
inline size_t counter_bytes(int sm_count) { return ceil_div((max_shared_groups(sm_count) + 1) * sizeof(unsigned), 16) * 16; }
inline size_t workspace_bytes(int sm_count) {
  return counter_bytes(sm_count) + int64_t{sm_count} * std::max(MAX_BLOCKS_PER_SM * THREADS, MAX_RESIDENT) * 16;
}

}  // namespace syncbn::cuda
