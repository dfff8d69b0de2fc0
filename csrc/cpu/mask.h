// The bit mask of z > 0: element f of memory, in row p, has bit f + 8 p. See syncbn/layout.py.
#pragma once

#include "traverse.h"

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

// Where an element is among the rows of the mask.
struct Place {
  int64_t length;  // of a row
  int64_t row;
  int64_t left;  // of the row, from the element on

  INLINE Place(int64_t length, int64_t f) : length(length), row(f / length), left(length - f % length) {}
  INLINE void next_pack() {
    for (left -= PACK; left <= 0; left += length) ++row;
  }
};

// The bits of a pack at element f, a multiple of 8, whichever rows it is of.
RARE uint32_t read_bits(const uint8_t* mask, int64_t f, Place place, Partial lanes) {
  uint32_t bits = 0;
  for (int64_t first = 0, last; first < lanes.last; first = last, ++place.row, place.left = place.length) {
    last = min(first + place.left, lanes.last);
    bits |= (read_bits(mask, f + first, place.row, Partial{int(last - first)}) & ((1u << (last - first)) - 1)) << first;
  }
  return bits;
}
INLINE uint32_t read_bits(const uint8_t* mask, int64_t f, const Place& place, Whole) {
  if (place.left < PACK) return read_bits(mask, f, place, Partial{PACK});
  const uint8_t* p = mask + f / 8 + place.row;
  uint32_t bits = p[0];
#pragma GCC unroll 2
  for (int k = 1; k < PACK / 8; ++k) bits |= uint32_t(p[k]) << (8 * k);
  return bits;
}

// Writes the bits of a pack at element f, a multiple of 8, whichever rows it is of. The last bits of a row are written up to its idle
// bits, as zeros.
RARE void write_bits(uint8_t* mask, int64_t f, Place place, uint32_t bits, Partial lanes) {
  for (int64_t first = 0, last; first < lanes.last; first = last, ++place.row, place.left = place.length) {
    last = min(first + place.left, lanes.last);
    int64_t before = (f + first) % 8, length = before + last - first;
    uint8_t* p = mask + (f + first) / 8 + place.row;
    uint32_t part = (bits & ((1u << last) - 1)) >> first << before;
    for (int64_t k = 0; 8 * k < length; ++k) p[k] = uint8_t(part >> (8 * k));
    if (last - first == place.left && length % 8 == 0) p[length / 8] = 0;
  }
}
INLINE void write_bits(uint8_t* mask, int64_t f, const Place& place, uint32_t bits, Whole) {
  if (place.left <= PACK) return write_bits(mask, f, place, bits, Partial{PACK});
  uint8_t* p = mask + f / 8 + place.row;
#pragma GCC unroll 2
  for (int k = 0; k < PACK / 8; ++k) p[k] = uint8_t(bits >> (8 * k));
}

}  // namespace syncbn::cpu::SYNCBN_ISA
