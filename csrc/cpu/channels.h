// Loops over whole tensors whose arithmetic has a few numbers for each channel.
#pragma once

#include "traverse.h"

namespace syncbn::cpu::SYNCBN_ISA {

template <typename acc_t, int K> struct Packs { Pack<acc_t> v[K]; };

// K numbers of acc_t for each channel, repeated over `inner` columns and then over the channels again up to `width`.
template <typename acc_t, int K> class PerChannel {
  int64_t width_;
  Buffer<acc_t> values_;

 public:
  // coefficients(c, v) sets v[0 .. K), float64.
  template <typename F> PerChannel(int64_t C, int64_t inner, int64_t width, F coefficients) : width_(width), values_(K * width) {
    acc_t* values = values_;
#pragma GCC ivdep
    for (int64_t c = 0; c < C; ++c) {
      double v[K];
      coefficients(c, v);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) values[k * width + c] = acc_t(v[k]);
    }
    if (width == C) return;
    for (int k = 0; k < K; ++k, values += width) {
      for (int64_t c = C - 1; c >= 0; --c)  // backwards: what is overwritten has been read
        for (int64_t i = inner - 1; i >= 0; --i) values[c * inner + i] = values[c];
      for (int64_t i = C * inner; i < width; ++i) values[i] = values[i - C * inner];
    }
  }
  INLINE Packs<acc_t, K> splat(int64_t j) const {
    Packs<acc_t, K> p;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) p.v[k] = Pack<acc_t>(values_[k * width_ + j]);
    return p;
  }
  template <typename Lanes> INLINE Packs<acc_t, K> at(int64_t j, Lanes lanes) const {
    Packs<acc_t, K> p;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) p.v[k] = load(values_ + k * width_ + j, lanes);
    return p;
  }
};

// f(first element, lanes, coefficients, row of the mask, whether the row ends here) for packs that cover everything, in parallel
// and backwards.
template <typename acc_t, int K, bool masked, typename C, typename F> void map_packs(Layout layout, C coefficients, F f) {
  // Heads end at a multiple of a pack: stores are aligned, and each pack has whole bytes of the mask.
  auto head = [](int64_t first) { return int(-first & (PACK - 1)); };
  if (by_columns(layout, masked)) {
    Columns columns(layout, masked, MAP_WIDTH);
    PerChannel<acc_t, K> all(layout.C, layout.inner, columns.width, coefficients);
    columns.for_rows([&](int64_t first, int64_t n, int64_t row, int64_t count) {
      for_packs(n, head(first), [=, &all](int64_t i, auto lanes, int) INLINED {
        auto p = all.at(i, lanes);
#pragma GCC unroll 1
        for (int64_t k = 0; k < count; ++k) f(first + k * n + i, lanes, p, row + k, i + lanes.last == n);
      });
    });
  } else {
    Planes planes(layout);
    PerChannel<acc_t, K> all(layout.C, 1, layout.C, coefficients);
    planes.for_memory([&](int64_t c, int64_t first, int64_t n, int64_t row) INLINED {
      bool row_end = first + n == (row + 1) * layout.inner;
      for_packs(n, head(first), [=, p = all.splat(c)](int64_t i, auto lanes, int) INLINED {
        f(first + i, lanes, p, row, row_end && i + lanes.last == n);
      });
    });
  }
}

// Two sums for each channel, float64: f(first element, lanes, coefficients, row of the mask, s1, s2) adds a pack to s1 and s2.
template <typename acc_t, int K, bool masked, typename C, typename F>
void sum_packs(Layout layout, double* sums, C coefficients, F f) {
  using P = Pack<acc_t>;
  if (by_columns(layout, masked)) {
    Columns columns(layout, masked, SUM_WIDTH);
    PerChannel<acc_t, K> all(layout.C, layout.inner, columns.width, coefficients);
    columns.for_sums(sums, [&](int64_t row, int64_t rows, int64_t j, int64_t n, double* out) {
      for (int64_t end = row + rows; row < end; row += CHUNK_ROWS) {
        alignas(64) acc_t s1[STRIP] = {}, s2[STRIP] = {};
        add_rows<CHAINS<acc_t>>(row, min(CHUNK_ROWS, end - row), n, s1, s2, [&](int64_t i, auto lanes) INLINED { return all.at(j + i, lanes); },
                 [&](int64_t r, int64_t i, auto lanes, const auto& p, P& a1, P& a2) INLINED {
                   f(r * columns.width + j + i, lanes, p, r, a1, a2);
                 });
        add(n, s1, out);
        add(n, s2, out + columns.width);
      }
    });
  } else {
    Planes planes(layout);
    PerChannel<acc_t, K> all(layout.C, 1, layout.C, coefficients);
    planes.for_sums(sums, [&](int64_t c0, int64_t c1, int64_t chunk, auto add) {
      P s1[MAX_GROUP], s2[MAX_GROUP];
      for (int64_t c = c0; c < c1; ++c) s1[c - c0] = s2[c - c0] = P(0);
      planes.for_pieces(c0, c1, chunk, [&](int64_t c, int64_t first, int64_t n, int64_t row) {
        for (int64_t b = 0; b < n; b += BLOCK) {
          ChainSums<acc_t> t1, t2;
          for_packs<CHAINS<acc_t>>(min(BLOCK, n - b), 0, [=, &t1, &t2, p = all.splat(c)](int64_t i, auto lanes, int k) INLINED {
            f(first + b + i, lanes, p, row, t1.s[k], t2.s[k]);
          });
          s1[c - c0] += t1.total();
          s2[c - c0] += t2.total();
        }
      });
      for (int64_t c = c0; c < c1; ++c) add(c, sum(s1[c - c0]), sum(s2[c - c0]));
    });
  }
}

}  // namespace syncbn::cpu::SYNCBN_ISA
