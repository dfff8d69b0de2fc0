// Which thread works on which elements of [outer, C, inner]. The two classes are all that differs between the layouts.
//
// A walk hands its body one Step after the other: up to `unroll` vectors of `vector` neighbours in memory, whose loads are
// independent. All threads of a warp take the same steps, so a body may use warp primitives. Of a vector's elements, all belong
// to one channel (channels == 1, Planes), or each to its own (channels == vector, Pixels).
//
// A reversed walk starts where a forward one ended, so that its first reads hit what the previous kernel left in L2.
#pragma once

#include <initializer_list>

#include "launch.cuh"
#include "plans.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace syncbn::cuda {

template <int V, int U>
struct Step {
  static constexpr int vector = V, unroll = U;
  int64_t first, stride;    // index of the first vector; from one to the next
  int64_t row, row_stride;  // row of the bit mask; from one vector to the next
  int count;                // how many of the `unroll` vectors there are: the first ones

  __device__ int64_t index(int u) const { return first + u * stride; }
  __device__ int64_t mask_byte(int u) const { return (index(u) >> 3) + row + u * row_stride; }
};

// Loads the vectors of a step, all independent of each other.
template <typename scalar_t, int W, int U>
__device__ inline void load(Vec<scalar_t, W> (&to)[U], const scalar_t* from, const Step<W, U>& step) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (u < step.count) to[u] = load<W>(from + step.index(u));
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

// inner > 1: a block has one channel, a warp takes a piece of a plane in one step. Pieces begin and end at multiples of 8
// elements, which is the alignment of every vector and a byte of the mask; what a plane has before and behind is its edge.
template <int V, int U, int B, bool reversed>
struct Planes : Walk {
  static constexpr int vector = V, channels = 1, max_columns = 1, unroll = U, blocks_per_sm = B;
  static constexpr int max_sum_bytes = sum_bytes(THREADS / WARP, 1, 1);
  static constexpr bool shares_bytes = false;  // of the mask, with threads that are not its neighbours
  static constexpr int sums = V < 4 ? V : 4;  // that a thread keeps: independent ones, for the latency of an addition
  static constexpr int shift_vectors = 1;  // behind a shift of stats: 512 bytes of the channel

  static Config make_config(const Layout& layout, int sm_count) { return planes_config(layout, V, U, B, sm_count); }

  __device__ Planes(const Layout& layout, const Config& config) : Walk(layout, config, reversed) {}

  __device__ int64_t first_channel() const { return group; }
  __device__ int column() const { return 0; }

  template <class Body>
  __device__ void each(Body&& body) const {
    const int warps = blockDim.x / WARP, lane = threadIdx.x % WARP;
    const int64_t runs = layout.outer * config.pieces;
    for (int64_t i = int64_t{split} * warps + threadIdx.x / WARP; i < runs; i += int64_t{config.splits} * warps) {
      const int64_t run = reversed ? runs - 1 - i : i;
      // Where planes are cut at all, 2^32 runs would be more than 2^38 elements.
      const int64_t o = config.pieces == 1 ? run : static_cast<uint32_t>(run) / static_cast<uint32_t>(config.pieces);
      const int piece = static_cast<int>(run - o * config.pieces);

      const int64_t row = o * layout.C + group;
      const int64_t plane = row * layout.inner, plane_end = plane + layout.inner;
      const int64_t first = (plane + 7) / 8 * 8 + int64_t{piece} * config.piece;
      const int length = clamped(plane_end - first, config.piece);
      const int body_length = length / 8 * 8;
      // Lanes 0 to 7 lie on the byte of the mask before the body, 8 to 15 on the one behind it.
      const int head = piece == 0 ? static_cast<int>(first - plane) : 0;
      const int edge = lane < 8 ? lane - 8 : body_length + lane - 8;
      const bool on_edge = lane < 8 ? lane >= 8 - head && edge < plane_end - first : lane < 16 && edge < length;

      const int mine = lane * V;
      body(Step<V, unroll>{first + mine, WARP * V, row, 0, clamped((body_length - mine + WARP * V - 1) / (WARP * V), unroll)});
      if (head > 0 || body_length < length) body(Step<1, 1>{first + edge, 0, row, 0, on_edge});
    }
  }
};

// inner == 1: a thread owns neighbouring channels and walks along the rows.
template <int V, int U, int B, int max_width, bool reversed>
struct Pixels : Walk {
  static constexpr int vector = V, channels = V, max_columns = max_width * V, unroll = U, blocks_per_sm = B;
  static constexpr int max_sum_bytes = sum_bytes(THREADS / WARP, max_width, V);
  static_assert(max_width <= 8 && (max_width & (max_width - 1)) == 0, "a tile is at most a memory line, and divides a warp");
  static constexpr bool shares_bytes = V == 1;
  static constexpr int sums = V;
  static constexpr int shift_vectors = unroll;  // one could be a single value of the channel

  static Config make_config(const Layout& layout, int sm_count) { return pixels_config(layout, V, U, max_width, B, sm_count); }

  __device__ Pixels(const Layout& layout, const Config& config) : Walk(layout, config, reversed) {}

  __device__ int64_t first_channel() const { return int64_t{group} * config.width * V; }
  __device__ int column() const { return threadIdx.x % config.width * V; }

  template <class Body>
  __device__ void each(Body&& body) const {
    const int rows = blockDim.x / config.width;
    const int64_t channel = first_channel() + column();
    const int64_t steps = (layout.outer + rows * unroll - 1) / (rows * unroll);
    for (int64_t i = split; i < steps; i += config.splits) {
      const int64_t row = (reversed ? steps - 1 - i : i) * rows * unroll + threadIdx.x / config.width;
      int count = 0;  // by comparisons: the loads would wait for a division of 64 bits
#pragma unroll
      for (int u = 0; u < unroll; ++u) count += channel < layout.C && row + u * rows < layout.outer;
      body(Step<V, unroll>{row * layout.C + channel, rows * layout.C, row, rows, count});
    }
  }
};

template <class T>
struct Type {
  using type = T;
};

template <int V, class Plan>
using PlanesOf = Planes<V, Plan::planes_unroll, Plan::planes_blocks, Plan::reversed>;
template <int V, class Plan>
using PixelsOf = Pixels<V, Plan::pixels_unroll, Plan::pixels_blocks, Plan::pixels_width, Plan::reversed>;

// Runs f with the Type of the walk that fits. Vectors need every tensor aligned to 16 bytes; and if inner is 1, rows of whole
// bytes of the mask. Everything else (a view with an offset, 3 channels) is walked element by element.
template <int V, class Plan, class F>
cudaError_t with_walk(const Layout& layout, std::initializer_list<const void*> tensors, F&& f) {
  bool aligned = true;
  for (const void* p : tensors) aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  if (layout.inner != 1) return aligned ? f(Type<PlanesOf<V, Plan>>()) : f(Type<PlanesOf<1, Plan>>());
  return aligned && layout.C % 8 == 0 ? f(Type<PixelsOf<V, Plan>>()) : f(Type<PixelsOf<1, Plan>>());
}

// Launches an op's kernel for the type of x and the walk that fits: kernel_of(a value of the one, the Type of the other).
template <template <int> class PlanFor, class Args, class KernelOf>
cudaError_t launch(const Args& args, const Target& target, std::initializer_list<const void*> tensors, KernelOf&& kernel_of) {
  return dispatch(args.dtype, [&](auto value) {
    using Plan = PlanFor<sizeof(value)>;
    return with_walk<VECTOR<decltype(value)>, Plan>(args.layout, tensors, [&](auto type) {
      using Walk = typename decltype(type)::type;
      static_assert(Walk::blocks_per_sm <= MAX_BLOCKS_PER_SM, "the workspace has no space for this many partial sums");
      Config config = Walk::make_config(args.layout, target.sm_count);
      if (!Plan::sums) config.shared_bytes = 0;
      const auto kernel = kernel_of(value, type);
      LAUNCH(kernel, config, target.stream, args, config, workspace(target));
      return cudaGetLastError();
    });
  });
}

}  // namespace syncbn::cuda
