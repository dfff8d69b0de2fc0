// The ops for CPU tensors, on torch's own threads.
#include "../bindings/ops.h"
#include "ops.h"

namespace syncbn::cpu {

void parallel_for(int64_t n, int64_t grain, RangeFunction f, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, f, context));
}

namespace {

struct Cpu {
  static constexpr const char* out_of_memory = "DefaultCPUAllocator: can't allocate memory.";
  static void check_usable() {}
  static void check(const char* name, const Tensor& t, const Tensor&) { SYNCBN_REQUIRE(t.is_cpu(), name, " must be on the CPU, as x"); }

  static int32_t* writable_alarm(int32_t* alarm) { return alarm; }

  explicit Cpu(const Tensor&) {}
  void stats(const StatsArgs& args) { kernels().stats(args); }
  void normalize(const NormalizeArgs& args) { kernels().normalize(args); }
  void backward_reduce(const BackwardReduceArgs& args) { kernels().backward_reduce(args); }
  void backward_input(const BackwardInputArgs& args) { kernels().backward_input(args); }
};

}  // namespace
}  // namespace syncbn::cpu

SYNCBN_IMPLEMENT(CPU, syncbn::cpu::Cpu)
