// A kernel with the fault of the given number, which the emulation must find. Two blocks of 64 threads, each with
// 64 bytes of static and 64 of dynamic shared memory.
#include "cuda_emulation.h"

#include "scheduler.h"

namespace {

struct Config {
  int groups = 2, splits = 1, threads = 64, shared_bytes = 64;
};

void kernel(int fault, float* out) {
  const unsigned t = threadIdx.x;
  SHARED(float, values, 16);
  DYNAMIC_SHARED(float, more);
  switch (fault) {
    case 0: break;  // none
    case 1:
      if (t >= 40) return;
      break;
    case 2:
      if (t % 2) return __syncthreads();
      break;
    case 3:
      if (t < 40) __any_sync(0xffffffffu, true);
      break;
    case 4: __any_sync(0xffffu, true); break;
    case 5: values[16] = 1; break;
    case 6: more[-1] = 1; break;
    case 7: __stcg(reinterpret_cast<uint4*>(out + 1), {}); break;
    case 8: out[4] = 1; break;
    case 9: out[-1] = 1; break;
  }
  __syncthreads();
}

}  // namespace

// `out` has 4 floats.
extern "C" const char* emulate_fault(int fault, float* out) {
  emulation::seed(0);
  LAUNCH(kernel, Config(), nullptr, fault, out);
  return emulation::error().empty() ? nullptr : emulation::error().c_str();
}
