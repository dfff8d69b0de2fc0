// The four CUDA ops as plain functions: raw pointers, no torch header, no kernel syntax.
// Each launches one kernel on `target.stream` and returns the launch's error. What they compute: syncbn/reference.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace syncbn::cuda {

enum class DType : int { float32, float16, bfloat16, float64 };
enum class Activation : int { none, relu, leaky_relu, silu };

// Memory read as [outer, C, inner]: contiguous is (N, C, spatial), channels-last is (N * spatial, C, 1).
struct Layout {
  int64_t outer, C, inner;
};

// [C] of any floating type, or absent (data is null).
struct ChannelVector {
  void* data;
  DType dtype;
};

// The group's summed `stats`: sum(C), sumsq(C), count, and with rank_weighted the sum of the ranks' weights.
struct Statistics {
  const double* data;
  bool rank_weighted;
  double eps;
};

// Where to launch. The workspace (launch.cuh) belongs to one stream; its counters are 0 before the first launch and after each.
struct Target {
  int sm_count;
  void* workspace;
  cudaStream_t stream;
};

struct StatsArgs {
  DType dtype;
  Layout layout;
  const void* x;
  bool rank_weighted;
  double* stats;
};
cudaError_t stats(const StatsArgs& args, const Target& target);

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
cudaError_t normalize(const NormalizeArgs& args, const Target& target);

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
  void* dz;  // null unless a residual was added before the activation
  ChannelVector dweight, dbias;
};
cudaError_t backward_reduce(const BackwardReduceArgs& args, const Target& target);

struct BackwardInputArgs {
  DType dtype;
  Layout layout;
  const void *dy, *x;
  Statistics stats;
  const double* sums;
  ChannelVector weight, bias;
  Activation activation;
  double negative_slope;
  void* dx;
};
cudaError_t backward_input(const BackwardInputArgs& args, const Target& target);

}  // namespace syncbn::cuda
