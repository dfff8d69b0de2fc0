// The arguments of the four ops as plain data: what the bindings have checked, and what the kernels of every device read. No torch
// header. What the ops compute: syncbn/reference.py.
#pragma once

#include <cstdint>

namespace syncbn {

enum class DType : int { float32, float16, bfloat16, float64 };
enum class Activation : int { none, relu, leaky_relu, silu };

// Memory read as [outer, C, inner]: contiguous is (N, C, spatial), channels-last is (N * spatial, C, 1). Element i of channel c of
// sample o has index (o * C + c) * inner + i. Without elements it is (0, C, 1), whatever the shape.
struct Layout {
  int64_t outer, C, inner;
};

// [C] of any floating type, or absent (data is null). The stride is in elements.
struct ChannelVector {
  void* data;
  DType dtype;
  int64_t stride = 1;
};

// The group's summed `stats`, [3C + 2]: shift(C), then sum(C) and sumsq(C) of x - shift, weight, samples.
struct Statistics {
  const double* data;
  double eps;
};

struct StatsArgs {
  DType dtype;  // of x, as in all of them
  Layout layout;
  const void* x;
  bool rank_weighted;  // sums over this rank's samples per channel, weight 1
  bool shifted;        // the shift of a channel is its first value in x, else 0
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
};

// Numbers in `stats`.
static inline int64_t stats_numel(const Layout& layout) { return 3 * layout.C + 2; }

// Bytes of the bit mask: see syncbn/layout.py.
static inline int64_t mask_bytes(const Layout& layout) {
  const bool pixels = layout.inner == 1;
  const int64_t rows = pixels ? layout.outer : layout.outer * layout.C, length = pixels ? layout.C : layout.inner;
  return (rows * (length + 8) + 7) / 8;
}

}  // namespace syncbn
