// Which thread works on which elements of [outer, C, inner]. The two classes, with their launch configurations (launch.cuh), are all that
// differs between the layouts.
//
//   Planes, inner > 1: memory is a row of planes                   Columns, inner == 1: memory is rows of channels
//
//     sample 0      sample 1      sample 2                                      channels ->
//     |ch 0|ch 1|.. |ch 0|ch 1|.. |ch 0|ch 1|..                        row 0  |ccccWWWWcccc
//      ^^^^          ^^^^          ^^^^                                row 1  |ccccWWWWcccc     WWWW: a tile of `width` vectors, the
//      the planes of one channel: one group of blocks                  row 2  |ccccWWWWcccc     channels of one group of blocks
//                                                                        ...
//     a plane:  eeVVVVVVVVVVVVVVVVVVVVeee                              a lane stays on its vector of channels and takes every
//     a warp's run: vectors VVV, from a multiple of 8 elements         `rows`-th row, so it has a sum for each element of the vector
//     on, then the edges ee, element by element
//
//   group   the channels that a block works on         run    what a warp (Planes) or a block (Columns) takes at a time
//   split   a block's number among those of its group  step   the loads of a run that a thread issues before it uses the first
//
// each() calls its body with one Step after another; first() only with those of the first run. A Step has up to `unroll` vectors of
// `vector` adjacent elements, whose loads are independent. All lanes of a warp execute the same steps, so the body may use warp
// primitives. The elements of a vector either all belong to one channel (channels == 1, Planes), or each to its own
// (channels == vector, Columns).
//
// A reversed walk starts where a forward one ended, so that its first reads hit the elements that the previous kernel left in L2.
#pragma once

#include <array>

#include "launch.cuh"
#include "plans.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace syncbn::cuda {

template <int VECTOR_WIDTH, int UNROLL>
struct Step {
  static constexpr int vector = VECTOR_WIDTH, unroll = UNROLL;
  int64_t first, stride;    // index of the first vector; from one to the next
  int64_t row, row_stride;  // row of the bit mask; from one vector to the next
  int count;                // how many of the `unroll` vectors there are: the first ones

  __device__ int64_t index(int u) const { return first + u * stride; }
  __device__ int64_t mask_byte(int u) const { return (index(u) >> 3) + row + u * row_stride; }
};

// Loads the vectors of a step, all independent of each other.
template <typename scalar_t, int STEP_WIDTH, int UNROLL>
__device__ inline void load(Vec<scalar_t, STEP_WIDTH> (&to)[UNROLL], const scalar_t* from, const Step<STEP_WIDTH, UNROLL>& step) {
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    if (u < step.count) to[u] = load<STEP_WIDTH>(from + step.index(u));
  }
}

// Prefetches the vectors of a step, so that they are on their way to L2 while a block reads its channels' parameters. Nothing is
// prefetched element by element: most edges of planes lie in memory lines that the vectors bring.
template <typename scalar_t, int STEP_WIDTH, int UNROLL>
__device__ inline void prefetch(const scalar_t* from, const Step<STEP_WIDTH, UNROLL>& step) {
  if (STEP_WIDTH == 1) return;
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    if (u < step.count) PREFETCH(from + step.index(u));
  }
}

__device__ inline int clamped(int64_t n, int most) { return static_cast<int>(n < 0 ? 0 : n < most ? n : most); }

struct Walk {
  Layout layout;
  Config config;
  int group, split;

  __device__ Walk(const Layout& layout, const Config& config, bool reversed) : layout(layout), config(config) {
    const int block = reversed ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    group = block % config.groups;
    split = block / config.groups;
  }
};

// inner > 1: a block has one channel. A warp takes a piece of a plane in one step or, if a plane has at most one vector for each lane and
// C * inner is a multiple of 8, the planes of several samples, whose edges then share steps. Pieces begin and end at multiples of 8
// elements, where vectors are aligned and a byte of the mask begins; the edges of a plane are its elements before its first such multiple
// and after its last.
template <int VECTOR_WIDTH, int UNROLL, int BLOCKS, bool reversed>
struct Planes : Walk {
  static constexpr int vector = VECTOR_WIDTH, channels = 1, max_columns = 1, unroll = UNROLL, blocks_per_sm = BLOCKS;
  static constexpr int max_sum_bytes = sum_bytes(THREADS / WARP, 1, 1);
  static constexpr bool shares_bytes = false;  // whether a byte of the mask may have bits of several warps or blocks
  // Independent sums of a thread, which hide the latency of an addition; fewer if vectors take more registers.
  static constexpr int sums = VECTOR_WIDTH == 8 ? 2 : VECTOR_WIDTH < 4 ? VECTOR_WIDTH : 4;
  static constexpr int partials = 2;  // that a thread loads at once in sum_partials(): a channel has few

  static Config make_config(const Layout& layout, bool sums, int sm_count) {
    return planes_config(layout, VECTOR_WIDTH, UNROLL, BLOCKS, sums, sm_count);
  }

  __device__ Planes(const Layout& layout, const Config& config) : Walk(layout, config, reversed) {}

  __device__ int64_t first_channel() const { return group; }
  __device__ int column() const { return 0; }

  __device__ int64_t first_run() const { return int64_t{split} * (blockDim.x / WARP) + threadIdx.x / WARP; }
  __device__ int64_t run_stride() const { return int64_t{config.splits} * (blockDim.x / WARP); }

  template <class Body>
  __device__ void each(Body&& body) const {
    for (int64_t i = first_run(); i < config.runs; i += run_stride()) run(i, body);
  }

  template <class Body>
  __device__ void first(Body&& body) const {
    if (first_run() < config.runs) run(first_run(), body);
  }

 private:
  static constexpr int EDGE_UNROLL = UNROLL < 2 ? UNROLL : 2;  // vectors of one element in a step of edges

  // A run: a piece of a plane, or the planes of several samples, config.sample_stride elements apart.
  struct Run {
    int64_t first, row;  // element where the vectors begin, in the first sample; and its row of the mask
    int head, length;    // elements of the run before `first` and from it on, in each sample
    int samples;

    __device__ int body_length() const { return length / 8 * 8; }
    __device__ bool has_edges() const { return head > 0 || length % 8 > 0; }
  };

  __device__ Run run_at(int64_t i) const {
    const int64_t index = reversed ? config.runs - 1 - i : i;
    // 32 bits suffice: pieces of planes that are cut have 32 elements or more on average, so 2^32 runs would be 2^37 elements.
    const int64_t o = config.pieces == 1 ? index * config.samples : static_cast<uint32_t>(index) / static_cast<uint32_t>(config.pieces);
    const int piece = config.pieces == 1 ? 0 : static_cast<int>(index - o * config.pieces);
    const int64_t row = o * layout.C + group, plane = row * layout.inner;
    const int64_t first = (plane + 7) / 8 * 8 + int64_t{piece} * config.piece;
    return {first, row, piece == 0 ? static_cast<int>(first - plane) : 0, clamped(plane + layout.inner - first, config.piece),
            clamped(layout.outer - o, config.samples)};
  }

  template <class Body>
  __device__ void run(int64_t i, Body&& body) const {
    const Run run = run_at(i);
    const bool has_edges = run.has_edges();
    body(vectors_of(run));
    if (!has_edges) return;
    FORGET(i);  // makes the compiler compute the run again, which then takes no registers while the body works on vectors
    edges(run_at(i), body);
  }

  __device__ Step<VECTOR_WIDTH, UNROLL> vectors_of(const Run& run) const {
    const int lane = threadIdx.x % WARP, sample = lane >> config.lane_bits, at = (lane & ((1 << config.lane_bits) - 1)) * VECTOR_WIDTH;
    int count = 0;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) count += sample + u * config.samples_apart < run.samples && at + u * config.along < run.body_length();
    return {run.first + sample * config.sample_stride + at, config.vector_stride, run.row + sample * layout.C, config.row_stride, count};
  }

  // Lanes 0 to 7 take the 8 elements before the vectors, and lanes 8 to 15 the 8 elements after them: eight lanes share one mask byte.
  // Lanes 16 to 31 do the same for the next sample.
  template <class Body>
  __device__ void edges(const Run& run, Body&& body) const {
    const int lane = threadIdx.x % WARP, at = lane % 16, edge = at < 8 ? at - 8 : run.body_length() + at - 8;
    // A plane shorter than 8 may lie wholly within one byte.
    const int before_end = layout.inner < 8 ? static_cast<int>(layout.inner) - run.head : 1;
    const bool on_edge = at < 8 ? edge >= -run.head && edge < before_end : edge < run.length;
    for (int begin = 0; begin < run.samples; begin += 2 * EDGE_UNROLL) {
      const int sample = begin + lane / 16;
      int count = 0;
#pragma unroll
      for (int u = 0; u < EDGE_UNROLL; ++u) count += on_edge && sample + 2 * u < run.samples;
      const int64_t first = run.first + sample * config.sample_stride + edge, row = run.row + sample * layout.C;
      body(Step<1, EDGE_UNROLL>{first, 2 * config.sample_stride, row, 2 * layout.C, count});
    }
  }
};

// inner == 1: a thread owns neighbouring channels and walks from row to row.
template <int VECTOR_WIDTH, int UNROLL, int BLOCKS, int max_width, bool reversed>
struct Columns : Walk {
  static constexpr int vector = VECTOR_WIDTH, channels = VECTOR_WIDTH, max_columns = max_width * VECTOR_WIDTH, unroll = UNROLL,
                       blocks_per_sm = BLOCKS;
  static constexpr int max_sum_bytes = sum_bytes(THREADS / WARP, max_width, VECTOR_WIDTH);
  static_assert(max_width <= 8 && (max_width & (max_width - 1)) == 0, "a tile is at most a memory line, and divides a warp");
  static constexpr bool shares_bytes = VECTOR_WIDTH == 1;
  static constexpr int sums = VECTOR_WIDTH;
  static constexpr int partials = 16;  // on an H100, in 16 bits, 264 blocks may share a tile: a thread adds up to 66 of their sums

  static Config make_config(const Layout& layout, bool sums, int sm_count) {
    return columns_config(layout, VECTOR_WIDTH, UNROLL, max_width, BLOCKS, sums, sm_count);
  }

  __device__ Columns(const Layout& layout, const Config& config) : Walk(layout, config, reversed) {}

  __device__ int64_t first_channel() const { return int64_t{group} * config.width * VECTOR_WIDTH; }
  __device__ int column() const { return threadIdx.x % config.width * VECTOR_WIDTH; }

  template <class Body>
  __device__ void each(Body&& body) const {
    for (int64_t i = split; i < config.runs; i += config.splits) run(i, body);
  }

  template <class Body>
  __device__ void first(Body&& body) const {
    if (split < config.runs) run(split, body);
  }

 private:
  template <class Body>
  __device__ void run(int64_t i, Body&& body) const {
    const int rows = blockDim.x / config.width;
    const int64_t channel = first_channel() + column();
    const int64_t row = (reversed ? config.runs - 1 - i : i) * rows * UNROLL + threadIdx.x / config.width;
    int count = 0;  // counted by comparisons, because the loads would wait for a division of 64 bits
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) count += channel < layout.C && row + u * rows < layout.outer;
    body(Step<VECTOR_WIDTH, UNROLL>{row * layout.C + channel, rows * layout.C, row, rows, count});
  }
};

template <class T>
struct Type {
  using type = T;
};

template <int VECTOR_WIDTH, class Plan>
using PlanesOf = Planes<VECTOR_WIDTH, Plan::planes_unroll, Plan::planes_blocks, Plan::reversed>;
template <int VECTOR_WIDTH, class Plan>
using ColumnsOf = Columns<VECTOR_WIDTH, Plan::columns_unroll, Plan::columns_blocks, Plan::columns_width, Plan::reversed>;

// Runs f with the Type of the walk that fits. Vectors need every tensor aligned to 16 bytes. If inner is 1, they also need C to be a
// multiple of the vector or, with a mask, of 8. Everything else (a view with an offset, 3 channels) is processed one element at a time.
template <int VECTOR_WIDTH, class Plan, size_t n, class F>
cudaError_t with_walk(const Layout& layout, const std::array<const void*, n>& tensors, const void* mask, F&& f) {
  bool aligned = true;
  for (const void* p : tensors) aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  if (layout.inner != 1) return aligned ? f(Type<PlanesOf<VECTOR_WIDTH, Plan>>()) : f(Type<PlanesOf<1, Plan>>());
  return aligned && layout.C % (mask ? 8 : VECTOR_WIDTH) == 0 ? f(Type<ColumnsOf<VECTOR_WIDTH, Plan>>()) : f(Type<ColumnsOf<1, Plan>>());
}

// Runs f(a value of the type of x, the Type of the walk, the launch configuration) for an op's arguments.
template <template <int> class PlanFor, class Args, size_t n, class F>
cudaError_t with_config(const Args& args, int sm_count, const std::array<const void*, n>& tensors, const void* mask, F&& f) {
  return with_dtype(args.dtype, [&](auto value) {
    using Plan = PlanFor<sizeof(value)>;
    return with_walk<VECTOR<decltype(value)>, Plan>(args.layout, tensors, mask, [&](auto type) {
      using Walk = typename decltype(type)::type;
      static_assert(Walk::blocks_per_sm <= MAX_BLOCKS_PER_SM, "the workspace has no space for this many partial sums");
      return f(value, type, Walk::make_config(args.layout, Plan::sums, sm_count));
    });
  });
}

// Launches an op's kernel: kernel_of(a value of the type of x, the Type of the walk).
template <template <int> class PlanFor, class Args, size_t n, class KernelOf>
cudaError_t launch(const Args& args, const Target& target, const std::array<const void*, n>& tensors, const void* mask,
                   KernelOf&& kernel_of) {
  return with_config<PlanFor>(args, target.sm_count, tensors, mask, [&](auto value, auto type, const Config& config) {
    const auto kernel = kernel_of(value, type);
    LAUNCH(kernel, config, target.stream, args, config, workspace(target));
    return cudaGetLastError();
  });
}

// Whether several blocks add to one sum in the launch of these arguments.
template <template <int> class PlanFor, class Args, size_t n>
bool shares_sums(const Args& args, int sm_count, const std::array<const void*, n>& tensors, const void* mask) {
  bool shares = false;
  with_config<PlanFor>(args, sm_count, tensors, mask, [&](auto, auto, const Config& config) {
    shares = config.splits > 1;
    return cudaSuccess;
  });
  return shares;
}

}  // namespace syncbn::cuda
