// The four ops on plain pointers: what bindings.cpp calls and the kernel files define, once per instruction set.
#pragma once

#include <cstdint>

namespace syncbn {

enum class Dtype { float32, float64, float16, bfloat16 };
enum class Activation { none, relu, leaky_relu, silu };

// Memory read as [outer, channels, inner]: channel c at (o, i) is element (o * channels + c) * inner + i.
struct Layout {
  int64_t outer, channels, inner;
  int64_t samples() const { return outer * inner; }
  int64_t numel() const { return outer * channels * inner; }
};

// A [C] tensor whose floating type is known at run time only; absent where data is null.
struct Param {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
};

struct RunningStats {
  Param mean, var;
  int64_t* num_batches_tracked;
  double momentum;  // unused where cumulative
  bool cumulative, unbiased;
};

struct Norm {
  const double* stats;  // sums and counts over the ranks
  bool rank_weighted;   // 2C + 2 numbers instead of 2C + 1
  Param weight, bias;
  double eps;
  Activation activation;
  double negative_slope;
};

// Implemented by the binding on torch's own threads: f(begin, end, context) over parts of [0, n).
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
void parallel_for(int64_t n, int64_t grain, RangeFunction f, void* context);

// One declaration for each instruction set that the files are compiled for.
struct Kernels {
  const char* name;
  void (*stats)(Dtype, Layout, const void* x, bool rank_weighted, double* stats);
  // residual and mask may be null
  void (*normalize)(Dtype, Layout, const void* x, const void* residual, const Norm&, const RunningStats&, void* y, uint8_t* mask);
  // residual, mask, dz, dweight and dbias may be null
  void (*backward_reduce)(Dtype, Layout, const void* dy, const void* x, const void* residual, const uint8_t* mask, const Norm&,
                          double* sums, void* dz, Param dweight, Param dbias);
  void (*backward_input)(Dtype, Layout, const void* dy, const void* x, const Norm&, const double* sums, void* dx);
};

// The kernels in use: those of the widest instruction set that this CPU has.
const Kernels& kernels();

}  // namespace syncbn
