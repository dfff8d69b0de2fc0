// Types: scalar_t, in which x is stored; acc_t, in which the kernels compute; and Vec, elements of x that
// one instruction moves: 16 bytes or a single element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ops.h"

namespace syncbn::cuda {

__device__ inline float to_acc(float v) { return v; }
__device__ inline double to_acc(double v) { return v; }
__device__ inline float to_acc(__half v) { return __half2float(v); }
__device__ inline float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename scalar_t>
using acc_type = decltype(to_acc(scalar_t()));

template <typename scalar_t>
__device__ inline scalar_t from_acc(acc_type<scalar_t> v) {
  return v;
}
template <>
__device__ inline __half from_acc<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_acc<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// WIDTH neighbours in memory, moved by one instruction.
template <typename scalar_t, int WIDTH>
struct alignas(sizeof(scalar_t) * WIDTH) Vec {
  scalar_t at[WIDTH];

  __device__ acc_type<scalar_t> get(int j) const { return to_acc(at[j]); }
};

// A bfloat16 is the upper half of a float: kept as pairs, 8 of them take 4 registers, not 8.
template <int WIDTH>
struct alignas(2 * WIDTH) BfloatPairs {
  unsigned at[WIDTH / 2];

  __device__ float get(int j) const { return __uint_as_float(j % 2 ? at[j / 2] & 0xffff0000u : at[j / 2] << 16); }
};
template <>
struct Vec<__nv_bfloat16, 8> : BfloatPairs<8> {};

template <int WIDTH, typename scalar_t>
__device__ inline Vec<scalar_t, WIDTH> load(const scalar_t* p) {
  return *reinterpret_cast<const Vec<scalar_t, WIDTH>*>(p);
}

template <int WIDTH, typename scalar_t>
__device__ inline void store(scalar_t* p, const acc_type<scalar_t> (&values)[WIDTH]) {
  if constexpr (WIDTH == 1) {
    *p = from_acc<scalar_t>(values[0]);
  } else {
    scalar_t out[WIDTH];
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) out[j] = from_acc<scalar_t>(values[j]);
    uint4 bits;
    static_assert(sizeof(out) == sizeof(bits));
    memcpy(&bits, out, sizeof(bits));
    __stcg(reinterpret_cast<uint4*>(p), bits);  // guarantees one 16-byte store; the data is not reread, so cache it in L2 only
  }
}

template <typename scalar_t>
constexpr int VECTOR = 16 / sizeof(scalar_t);

// Runs f with a value of the type that `dtype` names: the one switch over the types of x.
template <typename F>
cudaError_t with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(float());
    case DType::float16: return f(__half());
    case DType::bfloat16: return f(__nv_bfloat16());
    case DType::float64: return f(double());
  }
  return cudaErrorInvalidValue;
}

// A channel's value as its bits in memory. A kernel loads all that it needs of a channel before it converts the first: if it
// converted each when it loads it, each load would wait for the one before.
struct Bits {
  uint64_t word;
};

// Per-channel vectors are read and written once per channel and block: so their dtype is resolved at run time. An absent one reads as 0.
__device__ inline Bits load_bits(const ChannelVector& v, int64_t c) {
  if (!v.data) return {0};
  c *= v.stride;
  switch (v.dtype) {
    case DType::float32: return {static_cast<const uint32_t*>(v.data)[c]};
    case DType::float16:
    case DType::bfloat16: return {static_cast<const uint16_t*>(v.data)[c]};
    case DType::float64: return {static_cast<const uint64_t*>(v.data)[c]};
  }
  return {0};
}

template <typename T>
__device__ inline T as(Bits bits) {
  T value;
  memcpy(&value, &bits.word, sizeof(T));
  return value;
}

__device__ inline double to_double(DType dtype, Bits bits) {
  switch (dtype) {
    case DType::float32: return as<float>(bits);
    case DType::float16: return __half2float(as<__half>(bits));
    case DType::bfloat16: return __bfloat162float(as<__nv_bfloat16>(bits));
    case DType::float64: return as<double>(bits);
  }
  return 0;
}

__device__ inline void write(const ChannelVector& v, int64_t c, double value) {
  c *= v.stride;
  switch (v.dtype) {
    case DType::float32: static_cast<float*>(v.data)[c] = static_cast<float>(value); break;
    case DType::float16: static_cast<__half*>(v.data)[c] = __float2half_rn(static_cast<float>(value)); break;
    case DType::bfloat16: static_cast<__nv_bfloat16*>(v.data)[c] = __float2bfloat16_rn(static_cast<float>(value)); break;
    case DType::float64: static_cast<double*>(v.data)[c] = value; break;
  }
}

}  // namespace syncbn::cuda
