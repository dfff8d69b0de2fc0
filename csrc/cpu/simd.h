// Pack: 8 or 16 values in registers, so that its mask bits fill whole bytes; with it the loops are written once for all instruction sets.
//
// Everything is in the namespace of the instruction set that this file is compiled for, and nothing of the standard library is
// instantiated: the linker could merge a shared inline function into the version that this CPU cannot execute.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "ops.h"

#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))     // placed after a lambda's parameter list
#define NOINLINE inline __attribute__((noinline))  // keeps cold or long code out of the loops
#if defined(__AVX512F__)
#define INLINE_IF_ONE_REGISTER INLINE  // a pack of floats is one register, so inlining a long function is cheap
#else
#define INLINE_IF_ONE_REGISTER NOINLINE
#endif

namespace syncbn::cpu::SYNCBN_ISA {

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

template <typename scalar_t>
struct AccType {
  using type = float;
};
template <>
struct AccType<double> {
  using type = double;
};
template <typename scalar_t>
using acc_type = typename AccType<scalar_t>::type;

template <typename T>
struct IntOf {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};

#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
#elif defined(__AVX2__)
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;
#endif

constexpr int PACK = REGISTER_BYTES > 32 ? 16 : 8;

template <typename T>
struct Pack {
  static constexpr int LANES = REGISTER_BYTES / sizeof(T), REGISTERS = PACK / LANES;
  using Int = typename IntOf<T>::type;
  typedef T V __attribute__((vector_size(REGISTER_BYTES)));
  typedef Int I __attribute__((vector_size(REGISTER_BYTES)));
  V v[REGISTERS];

  Pack() = default;
  INLINE Pack(T value) {
    for (int r = 0; r < REGISTERS; ++r) v[r] = value - V{};  // subtracting 0 keeps the sign of a zero
  }

  template <typename F>
  static INLINE void each(F f) {
#pragma GCC unroll 8
    for (int r = 0; r < REGISTERS; ++r) f(r);
  }
  template <typename F>
  static INLINE Pack map(F f) {
    Pack result;
    each([&](int r) { result.v[r] = f(r); });
    return result;
  }
  // The index of each lane, used to build masks: 0, 1, 2, ...
  static INLINE I lane(int r) {
    I index;
    for (int k = 0; k < LANES; ++k) index[k] = r * LANES + k;
    return index;
  }
};

#define OPERATOR(op)                                                        \
  template <typename T>                                                     \
  INLINE Pack<T> operator op(Pack<T> a, Pack<T> b) {                        \
    for (int r = 0; r < Pack<T>::REGISTERS; ++r) a.v[r] = a.v[r] op b.v[r]; \
    return a;                                                               \
  }
OPERATOR(+)
OPERATOR(-)
OPERATOR(*)
OPERATOR(/)
#undef OPERATOR
template <typename T>
INLINE Pack<T>& operator+=(Pack<T>& a, Pack<T> b) {
  return a = a + b;
}

// ---- Active lanes of a pack ------------------------------------------------------------------------------------------

struct Whole {  // every lane, known at compile time
  static constexpr int first = 0, last = PACK;
};
struct Overlap {  // every lane is addressable, but lanes before `first` were handled by the previous pack
  static constexpr int last = PACK;
  int first;
};
struct Partial {  // only [0, last) is in memory
  static constexpr int first = 0;
  int last;
};

template <typename T>
INLINE Pack<T> keep(Pack<T> a, Whole) {
  return a;
}
template <typename T, typename Lanes>
INLINE Pack<T> keep(Pack<T> a, Lanes lanes) {
  using P = Pack<T>;
  using Int = typename P::Int;
  return P::map([&](int r) {
    auto inside = (P::lane(r) >= Int(lanes.first)) & (P::lane(r) < Int(lanes.last));
    return inside ? a.v[r] : typename P::V{};
  });
}

// Lanes [0, n) of a, the rest of b.
template <typename T>
INLINE Pack<T> join(int n, Pack<T> a, Pack<T> b) {
  using P = Pack<T>;
  return P::map([&](int r) { return P::lane(r) < typename P::Int(n) ? a.v[r] : b.v[r]; });
}

// ---- Bits: one for each lane ------------------------------------------------------------------------------------------------

// One bit per lane, set unless the value is <= 0. NaN therefore counts as positive, as in torch's relu.
template <typename T>
INLINE uint32_t positive_bits(Pack<T> a) {
  using P = Pack<T>;
  uint32_t bits = 0;
  P::each([&](int r) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) bits |= uint32_t(_mm512_cmp_ps_mask((__m512)a.v[r], __m512{}, _CMP_NLE_UQ));
    if constexpr (sizeof(T) == 8) bits |= uint32_t(_mm512_cmp_pd_mask((__m512d)a.v[r], __m512d{}, _CMP_NLE_UQ)) << (8 * r);
#else
    auto negative = a.v[r] <= 0;
#if defined(__AVX2__)
    uint32_t part = sizeof(T) == 4 ? _mm256_movemask_ps((__m256)negative) : _mm256_movemask_pd((__m256d)negative);
#elif defined(__x86_64__)
    uint32_t part = sizeof(T) == 4 ? _mm_movemask_ps((__m128)negative) : _mm_movemask_pd((__m128d)negative);
#else
    uint32_t part = 0;
    for (int k = 0; k < P::LANES; ++k) part |= uint32_t(negative[k] & 1) << k;
#endif
    bits |= (~part & ((1u << P::LANES) - 1)) << (r * P::LANES);
#endif
  });
  return bits;
}

// a if the lane's bit is set, else b.
template <typename T>
INLINE Pack<T> select(uint32_t bits, Pack<T> a, Pack<T> b) {
  using P = Pack<T>;
#if defined(__AVX512F__)
  return P::map([&](int r) {
    if constexpr (sizeof(T) == 4) return (typename P::V)_mm512_mask_mov_ps((__m512)b.v[r], __mmask16(bits), (__m512)a.v[r]);
    if constexpr (sizeof(T) == 8) return (typename P::V)_mm512_mask_mov_pd((__m512d)b.v[r], __mmask8(bits >> (8 * r)), (__m512d)a.v[r]);
  });
#else
  using Int = typename P::Int;
  return P::map([&](int r) {
    auto set = ((Int(bits) - typename P::I{}) & (Int(1) << P::lane(r))) != 0;
    return set ? a.v[r] : b.v[r];
  });
#endif
}

// a if z is not <= 0, else b.
template <typename T>
INLINE Pack<T> select_positive(Pack<T> z, Pack<T> a, Pack<T> b) {
  return Pack<T>::map([&](int r) { return z.v[r] <= 0 ? b.v[r] : a.v[r]; });
}

}  // namespace syncbn::cpu::SYNCBN_ISA
