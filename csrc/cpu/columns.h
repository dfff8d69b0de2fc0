// Sums over columns, if channels are next to each other or planes are short: rows of columns, strips of them, and how rows are added up.
#pragma once

#include "traverse.h"

namespace syncbn::cpu::SYNCBN_ISA {

// A pack that spans two rows of the mask reads its bits from a byte boundary, so each sample must begin at one.
INLINE bool whole_bytes(Layout layout) {
  return layout.C * layout.inner % 8 == 0;
}

INLINE bool by_columns(Layout layout, bool masked) {
  if (layout.inner == 1) return true;
  bool pays = layout.inner < MIN_MAP_PLANE || (layout.inner < MIN_SUM_PLANE && layout.outer >= MIN_SUM_ROWS);
  bool narrow = layout.C * layout.inner < int64_t{1} << 32;  // positions in the mask then fit 32 bits
  return pays && (!masked || (whole_bytes(layout) && narrow));
}

// f(k, the sum of s1, the sum of s2 over the `inner` columns of slot k) for the slots [0, n), float64.
template <typename T, typename F>
INLINE void for_slots(int64_t n, int64_t inner, const T* s1, const T* s2, F f) {
  if (inner == 1) {
#pragma GCC ivdep
    for (int64_t k = 0; k < n; ++k) f(k, double(s1[k]), double(s2[k]));
    return;
  }
  for (int64_t k = 0; k < n; ++k, s1 += inner, s2 += inner) {
    double v1 = 0, v2 = 0;
    if (inner < PACK) {
      for (int64_t i = 0; i < inner; ++i) v1 += double(s1[i]), v2 += double(s2[i]);
    } else {
      Pack<T> a1(0), a2(0);
      for_packs(inner, [&](int64_t i, auto lanes, int) INLINED {
        a1 += keep(load(s1 + i, lanes), lanes);
        a2 += keep(load(s2 + i, lanes), lanes);
      });
      v1 = sum(a1), v2 = sum(a2);
    }
    f(k, v1, v2);
  }
}

// Memory as rows of columns: each row is one sample, or several if samples are short. A slot of a row is one channel of one sample,
// `inner` columns.
struct Columns {
  Layout layout;
  int64_t slots;  // of a row
  int64_t width, rows;
  int64_t rest;  // slots of a last, shorter row

  Columns(Layout l, bool masked) : layout(l) {
    int64_t together = masked && !whole_bytes(l) ? 1 : max(min(ceil_div(SUM_WIDTH, l.C * l.inner), l.outer), 1);
    slots = together * l.C;
    width = slots * l.inner;
    rows = l.outer / together;
    rest = l.outer % together * l.C;
  }

  // Adds up two sums per channel. reduce(row, rows, slot, n, sums) adds those of the slots [slot, slot + n), at most STRIP columns, in the
  // rows [row, row + rows) to sums[0 .. n) and sums[slots .. slots + n), float64.
  template <typename F>
  void for_sums(double* total, F reduce) const {
    int64_t longest = STRIP / layout.inner / PACK * PACK;  // strips of whole packs, for aligned sums
    int64_t strip = ceil_div(ceil_div(slots, ceil_div(slots, longest)), PACK) * PACK, strips = ceil_div(slots, strip);
    int64_t blocks = max(min(max(rows / CHUNK_ROWS, MIN_UNITS / strips), min(rows / MIN_ROWS, MAX_BLOCKS)), 1);
    Buffer<double> sums((blocks + 1) * 2 * slots, 0);
    parallel_for(blocks * strips, GRAIN * blocks * strips / max(rows * width, 1), [&](int64_t begin, int64_t end) {
      for (int64_t id = begin; id < end; ++id) {
        int64_t block = id / strips, slot = id % strips * strip, row = block * rows / blocks, next = (block + 1) * rows / blocks;
        reduce(row, next - row, slot, min(strip, slots - slot), sums + block * 2 * slots + slot);
      }
    });
    for (int64_t slot = 0; slot < rest; slot += strip) reduce(rows, 1, slot, min(strip, rest - slot), sums + blocks * 2 * slots + slot);
    int64_t channels = layout.C;
    for (int64_t c = 0; c < 2 * channels; ++c) total[c] = 0;
    for (int64_t k = 0; k < 2 * (blocks + 1) * slots; k += channels) add(channels, sums + k, total + k / slots % 2 * channels);
  }
};

// Adds rows of n columns into s1, s2 [n]: add(element, row, lanes, params(i, lanes), a1, a2) on packs. A row begins `width` elements
// after the one before it. S blocks of rows are read concurrently and share the loads of sums and parameters.
template <int S, typename acc_t, typename Params, typename Add>
INLINE void add_rows(int64_t first, int64_t width, int64_t row, int64_t rows, int64_t n, acc_t* s1, acc_t* s2, Params params, Add add) {
  auto add_streams = [=](auto streams, int64_t first, int64_t row, int64_t apart) INLINED {
    for_packs(n, [=](int64_t i, auto lanes, int) INLINED {
      Pack<acc_t> a1(0), a2(0);
      auto p = params(i, lanes);
#pragma GCC unroll 8
      for (int64_t k = 0; k < streams.value; ++k) add(first + k * apart * width + i, row + k * apart, lanes, p, a1, a2);
      store(s1 + i, load(s1 + i, lanes) + a1, lanes);
      store(s2 + i, load(s2 + i, lanes) + a2, lanes);
    });
  };
  int64_t part = rows / S, r = 0;
  for (; r < part; ++r) add_streams(Number<S>{}, first + r * width, row + r, part);
  for (r *= S; r < rows; ++r) add_streams(Number<1>{}, first + r * width, row + r, 0);
}

}  // namespace syncbn::cpu::SYNCBN_ISA
