// The bit mask of positive z (see positive_bits): element f of memory, in row p, has bit f + 8 p. See syncbn/layout.py.
//
// Each row ends with 8 padding bits. So a pack that starts on a byte boundary and spans at most two rows covers at most PACK + 8 bits,
// padding included, and reading one byte past a row's last bit is always safe.
#pragma once

#include "traverse.h"

namespace syncbn::cpu::SYNCBN_ISA {

// An element's position within the mask rows.
struct MaskPosition {
  int64_t length;  // of a row
  int64_t row;
  int64_t left;  // of the row, from the element on

  INLINE void next_pack() {
    for (left -= PACK; left <= 0; left += length) ++row;
  }
};

// The row of a pack that lies within one row.
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
template <typename Lanes>
INLINE uint32_t read_row_bits(const uint8_t* mask, int64_t f, int64_t row, Lanes) {
  return read_bytes(mask + f / 8 + row) >> (f % 8);
}
INLINE uint32_t read_row_bits(const uint8_t* mask, int64_t f, int64_t row, Partial lanes) {
  const uint8_t* p = mask + f / 8 + row;
  uint32_t bits = p[0] | uint32_t(p[1]) << 8;  // more of the row follows, or its padding
  if (f % 8 + lanes.last > 16) bits |= uint32_t(p[2]) << 16;
  return bits >> (f % 8);
}

// The bits of a pack at element f, a multiple of 8; the pack may span several rows.
NOINLINE uint32_t read_bits(const uint8_t* mask, int64_t f, MaskPosition position, Partial lanes) {
  uint32_t bits = 0;
  for (int64_t first = 0, last; first < lanes.last; first = last, ++position.row, position.left = position.length) {
    last = min(first + position.left, lanes.last);
    bits |= (read_row_bits(mask, f + first, position.row, Partial{int(last - first)}) & ones(last - first)) << first;
  }
  return bits;
}
INLINE uint32_t read_bits(const uint8_t* mask, int64_t f, const MaskPosition& position, Whole) {
  if (position.length < PACK) return read_bits(mask, f, position, Partial{PACK});
  uint32_t bits = read_bytes(mask + f / 8 + position.row);
  int64_t here = min(position.left, PACK);
  return (bits & ones(here)) | bits >> (here + 8) << here;
}

INLINE uint32_t read_bits(const uint8_t* mask, int64_t f, const MaskPosition& position, Overlap) {
  return read_bits(mask, f, position, Whole{});
}
template <typename Lanes>
INLINE uint32_t read_bits(const uint8_t* mask, int64_t f, Row row, Lanes lanes) {
  return read_row_bits(mask, f, row.row, lanes);
}

// Writes the bits of a pack at element f, a multiple of 8. The pack may span several rows, whose padding bits become zeros.
NOINLINE void store_bits(uint8_t* mask, int64_t f, MaskPosition position, uint32_t bits, Partial lanes) {
  for (int64_t first = 0, last; first < lanes.last; first = last, ++position.row, position.left = position.length) {
    last = min(first + position.left, lanes.last);
    int64_t before = (f + first) % 8, length = before + last - first;
    uint8_t* p = mask + (f + first) / 8 + position.row;
    uint32_t part = (bits & ones(last)) >> first << before;
    p[0] = uint8_t(part);
    if (length > 8) p[1] = uint8_t(part >> 8);
    if (length > 16) p[2] = uint8_t(part >> 16);
    if (last - first == position.left && length % 8 == 0) p[length / 8] = 0;
  }
}
INLINE void store_bits(uint8_t* mask, int64_t f, const MaskPosition& position, uint32_t bits, Whole) {
  if (position.length < PACK) return store_bits(mask, f, position, bits, Partial{PACK});
  uint8_t* p = mask + f / 8 + position.row;
  int64_t here = min(position.left, PACK);
  bits = (bits & ones(here)) | bits >> here << (here + 8);
#pragma GCC unroll 2
  for (int k = 0; k < PACK / 8; ++k) p[k] = uint8_t(bits >> (8 * k));
  if (position.left <= PACK)
    p[PACK / 8] = uint8_t(bits >> PACK);  // otherwise that byte belongs to another pack, possibly on another thread
}

}  // namespace syncbn::cpu::SYNCBN_ISA
