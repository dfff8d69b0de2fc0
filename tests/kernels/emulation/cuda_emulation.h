// Just enough CUDA for g++ to compile and run csrc/cuda/*.cu: a thread of a block is a fiber. Test-only; see tests/README.md.
//
// Fibers of a few resident blocks run one at a time in a seeded random order, each until it waits, so that a missing barrier
// lets one thread read what another has not yet written. Shared memory starts as NaN (all bits 1), for every block again.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

// ---- The language ----------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

#define SHARED(type, name, n) type* const name = static_cast<type*>(emulation::shared(EMULATION_SITE, sizeof(type) * (n)))
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(emulation::dynamic_shared())
#define LAUNCH(kernel, config, stream, ...) \
  emulation::launch((config).groups*(config).splits, (config).threads, (config).shared_bytes, [&] { kernel(__VA_ARGS__); })
#define FORGET(value) (void)(value)
#define PREFETCH(address) (void)(address)
#define COUNT(old, counter, last) (old) = emulation::count(counter, last)

#define EMULATION_STRING_(x) #x
#define EMULATION_STRING(x) EMULATION_STRING_(x)
#define EMULATION_SITE (__FILE__ ":" EMULATION_STRING(__LINE__))  // threads that meet must be at the same one

namespace emulation {

struct Index {
  unsigned x;
};
extern Index thread_index, block_index, block_dim, grid_dim;  // of the running fiber

void launch(int blocks, int threads, int shared_bytes, const std::function<void()>& kernel);
void* shared(const char* site, size_t bytes);
void* dynamic_shared();
size_t dynamic_shared_bytes();
void barrier(const char* site);
const uint64_t* exchange(const char* site, unsigned mask, uint64_t word);  // -> the words of the warp's 32 lanes
void yield();
void pause();                                        // of a thread that polls: it goes on when no other thread can
[[noreturn]] void fail(const std::string& message);  // ends the grid

template <typename T>
T shuffle_xor(const char* site, unsigned mask, T value, int offset) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  std::memcpy(&value, &exchange(site, mask, word)[(thread_index.x % 32) ^ offset], sizeof(T));
  return value;
}

inline unsigned ballot(const char* site, unsigned mask, bool predicate) {
  const uint64_t* words = exchange(site, mask, predicate);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(words[lane]) << lane;
  return bits;
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_dim
#define gridDim emulation::grid_dim

#define __syncthreads() emulation::barrier(EMULATION_SITE)
#define __shfl_xor_sync(mask, value, offset) emulation::shuffle_xor(EMULATION_SITE, mask, value, offset)
#define __ballot_sync(mask, predicate) emulation::ballot(EMULATION_SITE, mask, predicate)
#define __any_sync(mask, predicate) (emulation::ballot(EMULATION_SITE, mask, predicate) != 0)

// ---- The library -----------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

using std::exp;
using std::fma;
using std::max;
using std::memcpy;
using std::min;
using std::sqrt;

namespace emulation {
// Lets other fibers run between the preceding writes and the following reads.
inline unsigned count(unsigned* counter, unsigned last) {
  yield();
  const unsigned old = *counter;
  *counter = old >= last ? 0 : old + 1;
  yield();
  return old;
}
}  // namespace emulation

struct alignas(16) double2 {
  double x, y;
};
inline double2 __ldcg(const double2* p) { return *p; }
// 0 for a finite divisor over 2^126 (NaN if a is infinite), as on a GPU.
inline float __fdividef(float a, float b) { return std::isfinite(b) && std::fabs(b) > 0x1p126f ? a * 0.0f : a / b; }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Memory of other GPUs, for peer_all_reduce.cuh: see peers.cu.
namespace syncbn::cuda {
void send(uint4* to, uint4 words);
uint4 receive(const uint4* from);
uint64_t nanoseconds();
void pause();
}  // namespace syncbn::cuda

inline void __stcg(uint4* p, uint4 value) { *p = value; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(unsigned{v.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const unsigned bits = __float_as_uint(v);
  if (v != v) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct __half {
  uint16_t bits;
};
inline float __half2float(__half v) {
  const unsigned sign = (v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  return std::copysign(__uint_as_float(rest << 13) * 0x1p112f, __uint_as_float(sign));  // scaling brings subnormals along
}
inline __half __float2half_rn(float v) {
  const uint16_t sign = uint16_t(__float_as_uint(v) >> 16 & 0x8000u);
  const float a = std::fabs(v);
  if (v != v) return {0x7fff};
  if (a >= 65520.0f) return {uint16_t(sign | 0x7c00u)};
  if (a < 0x1p-14f) return {uint16_t(sign | unsigned(std::nearbyint(a * 0x1p24f)))};
  const unsigned bits = __float_as_uint(a);
  return {uint16_t(sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112u << 10)))};
}
