// The instructions of PTX that nvcc uses for csrc/cuda, each as a function of its name; tests/support/ptx.py writes the calls.
//
// A register holds bits, and an instruction says what they mean: add.f32 is add_<f32>. An instruction that is missing here does not
// compile. PTX ISA 9.0: https://docs.nvidia.com/cuda/parallel-thread-execution
#pragma once

#include "operands.h"
#include "values.h"

namespace ptx {

// ---- Threads ---------------------------------------------------------------------------------------------------------------

inline u32 tid_x() { return threadIdx.x; }
inline u32 ntid_x() { return blockDim.x; }
inline u32 ctaid_x() { return blockIdx.x; }
inline u32 nctaid_x() { return gridDim.x; }

inline void bar_sync_(const char* site, int number) {
  if (number != 0) emulation::fail(std::string("only barrier 0 is emulated: ") + site);
  emulation::barrier(site);
}

template <class T, class D, class A, class B, class C, class M>
void shfl_sync_bfly_(const char* site, D& d, bool& valid, A a, B offset, C clamp, M mask) {
  if (get<u32>(clamp) != 31 || get<u32>(offset) > 31) emulation::fail(std::string("only whole warps are emulated: ") + site);
  set<T>(d, emulation::exchange(site, get<u32>(mask), get<T>(a))[(threadIdx.x % 32) ^ get<u32>(offset)]);
  valid = true;
}

// ---- Kernels ---------------------------------------------------------------------------------------------------------------

using Kernel = void (*)(const u64* param);  // addresses of the parameters
void define(const char* name, Kernel kernel, int max_threads);
struct Defined {
  Defined(const char* name, Kernel kernel, int max_threads) { define(name, kernel, max_threads); }
};

}  // namespace ptx
