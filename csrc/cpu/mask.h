// The bit mask of z > 0: element f of memory, in row p, has bit f + 8 p. See syncbn/layout.py.
//
// Behind each row are 8 idle bits: so the bits of a pack that lies in one row or two, from a whole byte on, are PACK + 8 bits with those
// idle ones in between, and whoever reads the last bits of a row may read a byte more.
#pragma once

#include "traverse.h"

namespace syncbn::cpu::SYNCBN_ISA {

// Where an element lies among the rows of the mask.
struct Place {
  int64_t length;  // of a row
  int64_t row;
  int64_t left;  // of the row, from the element on

  INLINE void next_pack() {
    for (left -= PACK; left <= 0; left += length) ++row;
  }
};

// A row, for packs that lie in one.
struct Row {
  int64_t row;
};

INLINE uint32_t ones(int64_t n) { return (1u << n) - 1; }

INLINE uint32_t read_bytes(const uint8_t* p) {
  uint32_t bits = 0;
#pragma GCC unroll 4
  for (int k = 0; k <= PACK / 8; ++k) bits |= uint32_t(p[k]) << (8 * k);
  return bits;
}

// The bits of a pack that starts at element f, at any bit of a byte, all in one row.
template <typename Lanes> INLINE uint32_t read_row_bits(const uint8_t* mask, int64_t f, int64_t row, Lanes) {
  return read_bytes(mask + f / 8 + row) >> (f % 8);
}
INLINE uint32_t read_row_bits(const uint8_t* mask, int64_t f, int64_t row, Partial lanes) {
  const uint8_t* p = mask + f / 8 + row;
  uint32_t bits = p[0] | uint32_t(p[1]) << 8;  // idle bits, if not more of the row, follow
  if (f % 8 + lanes.last > 16) bits |= uint32_t(p[2]) << 16;
  return bits >> (f % 8);
}

// The bits of a pack at element f, a multiple of 8, whichever rows it is of.
RARE uint32_t read_bits(const uint8_t* mask, int64_t f, Place place, Partial lanes) {
  uint32_t bits = 0;
  for (int64_t first = 0, last; first < lanes.last; first = last, ++place.row, place.left = place.length) {
    last = min(first + place.left, lanes.last);
    bits |= (read_row_bits(mask, f + first, place.row, Partial{int(last - first)}) & ones(last - first)) << first;
  }
  return bits;
}
INLINE uint32_t read_bits(const uint8_t* mask, int64_t f, const Place& place, Whole) {
  if (place.length < PACK) return read_bits(mask, f, place, Partial{PACK});
  uint32_t bits = read_bytes(mask + f / 8 + place.row);
  int64_t here = min(place.left, PACK);
  return (bits & ones(here)) | bits >> (here + 8) << here;
}

INLINE uint32_t read_bits(const uint8_t* mask, int64_t f, const Place& place, Overlap) { return read_bits(mask, f, place, Whole{}); }
template <typename Lanes> INLINE uint32_t read_bits(const uint8_t* mask, int64_t f, Row row, Lanes lanes) {
  return read_row_bits(mask, f, row.row, lanes);
}

// Writes the bits of a pack at element f, a multiple of 8, whichever rows it is of, and the idle bits behind a row as zeros.
RARE void write_bits(uint8_t* mask, int64_t f, Place place, uint32_t bits, Partial lanes) {
  for (int64_t first = 0, last; first < lanes.last; first = last, ++place.row, place.left = place.length) {
    last = min(first + place.left, lanes.last);
    int64_t before = (f + first) % 8, length = before + last - first;
    uint8_t* p = mask + (f + first) / 8 + place.row;
    uint32_t part = (bits & ones(last)) >> first << before;
    p[0] = uint8_t(part);
    if (length > 8) p[1] = uint8_t(part >> 8);
    if (length > 16) p[2] = uint8_t(part >> 16);
    if (last - first == place.left && length % 8 == 0) p[length / 8] = 0;
  }
}
INLINE void write_bits(uint8_t* mask, int64_t f, const Place& place, uint32_t bits, Whole) {
  if (place.length < PACK) return write_bits(mask, f, place, bits, Partial{PACK});
  uint8_t* p = mask + f / 8 + place.row;
  int64_t here = min(place.left, PACK);
  bits = (bits & ones(here)) | bits >> here << (here + 8);
#pragma GCC unroll 2
  for (int k = 0; k < PACK / 8; ++k) p[k] = uint8_t(bits >> (8 * k));
  if (place.left <= PACK) p[PACK / 8] = uint8_t(bits >> PACK);  // else it is another pack's, perhaps another thread's
}

}  // namespace syncbn::cpu::SYNCBN_ISA
