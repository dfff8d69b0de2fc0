// The arguments of the four ops as plain data: the bindings check them, the kernels of every device read them. This file includes no
// torch header. syncbn/reference.py says what the ops compute.
#pragma once

#include <cstdint>

namespace syncbn {

// Marks functions for both devices. On the CPU they are always inlined: each instruction set compiles them under the same name, and the
// linker could keep a version that this CPU cannot run.
#ifdef __CUDACC__
#define SYNCBN_HOST_DEVICE __host__ __device__ inline
#define SYNCBN_SQRT(value) sqrt(value)
#else
#define SYNCBN_HOST_DEVICE inline __attribute__((always_inline))
#define SYNCBN_SQRT(value) __builtin_sqrt(value)
#endif

enum class DType : int { float32, float16, bfloat16, float64 };
enum class Activation : int { none, relu, leaky_relu, silu };  // as in syncbn/activation.py
constexpr int ACTIVATIONS = 4;                                 // the bindings refuse numbers from this on

// Functions with code for every activation assert this: if ACTIVATIONS grows, they fail to compile until someone has looked at each.
#define SYNCBN_HAS_CODE_FOR(number) static_assert(ACTIVATIONS == number, "write the new activation here, then raise the number")

// Whether the derivative depends on z, and only by its sign: with a residual, backward then needs one bit for each element, the mask.
SYNCBN_HOST_DEVICE constexpr bool needs_only_sign(Activation activation) {
  return activation == Activation::relu || activation == Activation::leaky_relu;
}

// Memory read as [outer, C, inner]: contiguous is (N, C, spatial), channels-last is (N * spatial, C, 1). Element i of channel c of
// sample o has index (o * C + c) * inner + i. Empty tensors are always (0, C, 1).
struct Layout {
  int64_t outer, C, inner;
};

// [C] of any floating type, or absent (data is null). The stride is in elements.
struct ChannelVector {
  void* data;
  DType dtype;
  int64_t stride = 1;
};

// `stats` is [3C + 4]: shift(C), then sum(C) and sumsq(C) of x - shift, then these at 3C.
namespace stats_tail {
enum : int { weight, samples, tag, tag_squared, numel };
}
// `sums` of the backward pass is [2C + 2]: sum_dy(C), sum_dy_xhat(C), then these at 2C.
namespace sums_tail {
enum : int { tag, tag_squared, numel };
}

// The group's summed `stats`.
struct Statistics {
  const double* data;
  double eps;
};

// What the sums of the tags of all R ranks, and of their squares, must be: R * tag and R * tag^2. If they are, the sum of
// (tag of a rank - tag)^2 is 0, so every rank has sent this tag. If two ranks' tags differ, the check fails on every rank. Doubles hold
// these sums exactly up to 8,192 ranks, because a tag is below 2^20.
struct Verification {
  double tag, tag_squared;
  int32_t* alarm;  // set to 1 if the sums differ; null if there is nothing to verify

  SYNCBN_HOST_DEVICE bool holds(double tag_sum, double tag_squared_sum) const { return tag_sum == tag && tag_squared_sum == tag_squared; }
};

struct StatsArgs {
  DType dtype;  // dtype of x; the same field in every struct
  Layout layout;
  const void* x;
  bool rank_weighted;  // the sums are divided by this rank's samples, and its weight is 1, or 0 without samples
  bool shifted;        // the shift of a channel is its first value in x; otherwise 0
  double tag;
  double* stats;
};

struct NormalizeArgs {
  DType dtype;
  Layout layout;
  const void* x;
  Statistics stats;
  ChannelVector weight, bias;
  const void* residual;
  ChannelVector running_mean, running_var;
  int64_t* num_batches_tracked;
  bool cumulative;  // momentum None: 1 / num_batches_tracked
  double momentum;
  bool unbiased;
  Activation activation;
  double negative_slope;
  void* y;
  uint8_t* mask;  // null unless backward needs it
  Verification verification;
};

struct BackwardReduceArgs {
  DType dtype;
  Layout layout;
  const void *dy, *x;
  Statistics stats;
  ChannelVector weight, bias;
  const void* residual;
  const uint8_t* mask;
  Activation activation;
  double negative_slope;
  double tag;
  double* sums;
  ChannelVector dweight, dbias;
};

struct BackwardInputArgs {
  DType dtype;
  Layout layout;
  const void *dy, *x;
  Statistics stats;
  const double* sums;
  ChannelVector weight, bias;
  const void* residual;
  const uint8_t* mask;
  Activation activation;
  double negative_slope;
  bool rank_weighted;
  void *dx, *dz;  // dz is null unless a residual was added before the activation
  Verification verification;
};

// How many values `stats` and `sums` have.
static inline int64_t stats_numel(int64_t channels) { return 3 * channels + stats_tail::numel; }
static inline int64_t sums_numel(int64_t channels) { return 2 * channels + sums_tail::numel; }

// Bytes of the bit mask: see syncbn/layout.py.
static inline int64_t mask_bytes(const Layout& layout) {
  const bool by_rows = layout.inner == 1;
  const int64_t rows = by_rows ? layout.outer : layout.outer * layout.C, length = by_rows ? layout.C : layout.inner;
  return (rows * (length + 8) + 7) / 8;
}

}  // namespace syncbn
