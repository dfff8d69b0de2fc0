// The bit mask of z > 0: element f of memory, in row p, has bit f + 8 p. See syncbn/layout.py.
#pragma once

#include "simd.h"

namespace syncbn::cpu::SYNCBN_ISA {

// The bits of a pack that starts at element f, at any bit of a byte. The idle byte behind a row makes the last byte readable.
template <typename Lanes> INLINE uint32_t read_bits(const uint8_t* mask, int64_t f, int64_t row, Lanes) {
  const uint8_t* p = mask + f / 8 + row;
  uint32_t bits = p[0];
#pragma GCC unroll 2
  for (int k = 1; k <= PACK / 8; ++k) bits |= uint32_t(p[k]) << (8 * k);
  return bits >> (f % 8);
}

INLINE uint32_t read_bits(const uint8_t* mask, int64_t f, int64_t row, Partial lanes) {
  const uint8_t* p = mask + f / 8 + row;
  uint32_t bits = 0;
  for (int k = 0; 8 * k < int(f % 8) + lanes.last; ++k) bits |= uint32_t(p[k]) << (8 * k);
  return bits >> (f % 8);
}

// Writes the bits of lanes [first, last) of a pack at element f. They start or end at a byte unless the row does, and the last bits
// of a row are written up to its idle bits, as zeros.
template <typename Lanes> INLINE void write_bits(uint8_t* mask, int64_t f, int64_t row, uint32_t bits, Lanes lanes, bool row_end) {
  int64_t start = f + lanes.first;
  uint8_t* p = mask + start / 8 + row;
  int before = int(start % 8), length = before + lanes.last - lanes.first;
  bits = (bits & ((1u << lanes.last) - 1)) >> lanes.first << before;
  for (int k = 0; 8 * k < length; ++k) p[k] = uint8_t(bits >> (8 * k));
  if (row_end && length % 8 == 0) p[length / 8] = 0;
}
INLINE void write_bits(uint8_t* mask, int64_t f, int64_t row, uint32_t bits, Whole, bool row_end) {
  uint8_t* p = mask + f / 8 + row;
#pragma GCC unroll 2
  for (int k = 0; k < PACK / 8; ++k) p[k] = uint8_t(bits >> (8 * k));
  if (row_end) p[PACK / 8] = 0;
}

}  // namespace syncbn::cpu::SYNCBN_ISA
