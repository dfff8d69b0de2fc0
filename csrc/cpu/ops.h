// The four CPU ops as plain functions, and the one torch service that they use.
#pragma once

#include "../args.h"

namespace syncbn::cpu {

// Implemented by the binding on torch's own threads: f(begin, end, context) over parts of [0, n).
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
void parallel_for(int64_t n, int64_t grain, RangeFunction f, void* context);

// One table per instruction set; each kernel file is compiled once for each.
struct Kernels {
  const char* name;
  void (*stats)(const StatsArgs&);
  void (*normalize)(const NormalizeArgs&);
  void (*backward_reduce)(const BackwardReduceArgs&);
  void (*backward_input)(const BackwardInputArgs&);
};

// The kernels in use: those of the widest instruction set that this CPU has, unless syncbn_cpu_isa() has limited it.
const Kernels& kernels();

}  // namespace syncbn::cpu
