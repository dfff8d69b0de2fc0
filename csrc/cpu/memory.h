// Packs in memory: conversions from and to 16 bits, loads and stores of whole and partial packs, non-temporal stores; and the dtype switch.
#pragma once

#include "simd.h"

namespace syncbn::cpu::SYNCBN_ISA {

// ---- Conversions ------------------------------------------------------------------------------------------------------------

template <typename To, typename From>
INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

INLINE float to_float(bfloat16 b) { return bit_cast<float>(uint32_t(b.bits) << 16); }
INLINE float to_float(float16 h) {
  uint32_t magnitude = h.bits & 0x7fffu;
  float f = bit_cast<float>(magnitude << 13) * 0x1p112f;  // rebiases the exponent, subnormals included
  uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(f) | special | uint32_t(h.bits & 0x8000u) << 16);
}

INLINE bfloat16 to_bfloat16(float f) {
  uint32_t u = bit_cast<uint32_t>(f);
  return {f != f ? uint16_t(0x7fc0) : uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16)};  // to nearest even
}
INLINE float16 to_float16(float f) {
  uint32_t u = bit_cast<uint32_t>(f), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;        // to nearest even
  uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds
  uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {uint16_t(sign | (magnitude >= 0x477ff000u ? large : finite))};
}

// ---- Loads and stores -------------------------------------------------------------------------------------------------------

template <typename T>
INLINE Pack<T> load(const T* p) {
  Pack<T> a;
  memcpy(&a, p, sizeof(a));
  return a;
}
template <typename T>
INLINE void store(T* p, Pack<T> a) {
  memcpy(p, &a, sizeof(a));
}

typedef uint16_t Half16 __attribute__((vector_size(Pack<float>::LANES * 2)));
typedef uint32_t Word16 __attribute__((vector_size(REGISTER_BYTES)));

INLINE Word16 widen(Half16 half) {
#if defined(__AVX512F__)
  return (Word16)_mm512_cvtepu16_epi32((__m256i)half);  // gcc would widen the halves and join them
#else
  return __builtin_convertvector(half, Word16);
#endif
}

INLINE Pack<float> load(const bfloat16* p) {
  using P = Pack<float>;
  return P::map([&](int r) {
    Half16 half;
    memcpy(&half, p + r * P::LANES, sizeof(half));
    return (P::V)(widen(half) << 16);
  });
}
#if defined(__AVX512BF16__)
// Flushes subnormals to zero, unlike the code below; values near 1e-38 do not matter here.
INLINE void store(bfloat16* p, Pack<float> a) {
  __m256bh half = _mm512_cvtneps_pbh((__m512)a.v[0]);
  memcpy(p, &half, sizeof(half));
}
#else
INLINE void store(bfloat16* p, Pack<float> a) {
  using P = Pack<float>;
  P::each([&](int r) {
    Word16 u = (Word16)a.v[r];
    u = a.v[r] != a.v[r] ? Word16{} + 0x7fc0u : (u + 0x7fffu + (u >> 16 & 1)) >> 16;
    Half16 half = __builtin_convertvector(u, Half16);
    memcpy(p + r * P::LANES, &half, sizeof(half));
  });
}
#endif

#if defined(__F16C__)
#if defined(__AVX512F__)
INLINE Pack<float>::V load_register(const float16* p) {
  return (Pack<float>::V)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
}
INLINE void store_register(float16* p, Pack<float>::V v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
INLINE Pack<float>::V load_register(const float16* p) { return (Pack<float>::V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store_register(float16* p, Pack<float>::V v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif
#else
NOINLINE Pack<float>::V load_register(const float16* p) {
  Pack<float>::V v;
  for (int k = 0; k < Pack<float>::LANES; ++k) v[k] = to_float(p[k]);
  return v;
}
NOINLINE void store_register(float16* p, Pack<float>::V v) {
  for (int k = 0; k < Pack<float>::LANES; ++k) p[k] = to_float16(v[k]);
}
#endif
INLINE Pack<float> load(const float16* p) {
  return Pack<float>::map([&](int r) { return load_register(p + r * Pack<float>::LANES); });
}
INLINE void store(float16* p, Pack<float> a) {
  Pack<float>::each([&](int r) { store_register(p + r * Pack<float>::LANES, a.v[r]); });
}

template <typename scalar_t, typename Lanes>
INLINE Pack<acc_type<scalar_t>> load(const scalar_t* p, Lanes) {
  return load(p);
}
template <typename scalar_t>
NOINLINE Pack<acc_type<scalar_t>> load(const scalar_t* p, Partial lanes) {
  scalar_t buffer[PACK] = {};
  for (int k = 0; k < lanes.last; ++k) buffer[k] = p[k];
  return load(buffer);
}

template <typename scalar_t, typename Lanes>
INLINE void store(scalar_t* p, Pack<acc_type<scalar_t>> a, Lanes) {
  store(p, a);
}
template <typename scalar_t>
NOINLINE void store(scalar_t* p, Pack<acc_type<scalar_t>> a, Partial lanes) {
  scalar_t buffer[PACK];
  store(buffer, a);
  for (int k = 0; k < lanes.last; ++k) p[k] = buffer[k];
}

template <int BYTES>
INLINE void stream_register(void* to, const void* from) {
#if defined(__AVX512F__)
  if constexpr (BYTES == 64) return _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
#endif
#if defined(__AVX2__)
  if constexpr (BYTES == 32) return _mm256_stream_si256((__m256i*)to, _mm256_loadu_si256((const __m256i*)from));
#endif
#if defined(__x86_64__)
  if constexpr (BYTES == 16) return _mm_stream_si128((__m128i*)to, _mm_loadu_si128((const __m128i*)from));
#endif
  memcpy(to, from, BYTES);
}
INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Non-temporal if `stream` is set, in which case p is aligned.
template <typename scalar_t>
INLINE void store_or_stream(scalar_t* p, Pack<acc_type<scalar_t>> a, bool stream) {
  constexpr int TOTAL = PACK * sizeof(scalar_t), BYTES = TOTAL < REGISTER_BYTES ? TOTAL : REGISTER_BYTES;
  if (!stream) return store(p, a);
  alignas(64) char buffer[TOTAL];
  store(reinterpret_cast<scalar_t*>(buffer), a);
#pragma GCC unroll 8
  for (int k = 0; k < TOTAL; k += BYTES) stream_register<BYTES>(reinterpret_cast<char*>(p) + k, buffer + k);
}

// The sum of all lanes in float64, as a tree.
template <typename T>
INLINE double sum(Pack<T> a) {
  T lanes[PACK];
  store(lanes, a);
  double total[PACK];
  for (int k = 0; k < PACK; ++k) total[k] = double(lanes[k]);
#pragma GCC unroll 4
  for (int half = PACK / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) total[k] += total[k + half];
  return total[0];
}

// ---- The dtype switch, outside of all loops -------------------------------------------------------------------------------------

template <typename F>
void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::float32: return f(float{});
    case DType::float64: return f(double{});
    case DType::float16: return f(float16{});
    case DType::bfloat16: return f(bfloat16{});
  }
}

}  // namespace syncbn::cpu::SYNCBN_ISA
