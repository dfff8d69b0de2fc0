// Loops over whole tensors whose arithmetic has a few numbers for each channel.
#pragma once

#include "mask.h"
#include "traverse.h"

namespace syncbn::cpu::SYNCBN_ISA {

template <typename acc_t, int K> struct Packs { Pack<acc_t> v[K]; };

// The first n lanes of a, the rest of b.
template <typename acc_t, int K> INLINE Packs<acc_t, K> join(int n, Packs<acc_t, K> a, const Packs<acc_t, K>& b) {
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) a.v[k] = join(n, a.v[k], b.v[k]);
  return a;
}

// K numbers of acc_t for each channel, where somebody else keeps them.
template <typename acc_t, int K> struct Coefficients {
  const acc_t* values;
  int64_t width;

  INLINE Packs<acc_t, K> splat(int64_t j) const {
    Packs<acc_t, K> p;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) p.v[k] = Pack<acc_t>(values[k * width + j]);
    return p;
  }
  template <typename Lanes> INLINE Packs<acc_t, K> at(int64_t j, Lanes lanes) const {
    Packs<acc_t, K> p;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) p.v[k] = load(values + k * width + j, lanes);
    return p;
  }
};

// The same, repeated over `inner` columns and then over the channels again up to `width`.
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
    for (int k = 0; k < K; ++k) unfold(C, inner, width, values + k * width);
  }
  operator Coefficients<acc_t, K>() const { return {values_, width_}; }
};

// Where packs that follow each other are written.
template <typename scalar_t> class Output {
  scalar_t* to_;
  bool stream_;

 public:
  Output(void* to, Layout layout) : to_(static_cast<scalar_t*>(to)), stream_(streams(to_, numel(layout))) {}
  template <typename Lanes> INLINE void operator()(int64_t e, Pack<acc_type<scalar_t>> a, Lanes lanes) const {
    store(to_ + e, a, lanes, stream_);
  }
};

// f(element, lanes, coefficients, place) on packs that cover everything, in parallel and backwards. The place in the mask is kept up to
// date where there is one.
//
// Packs follow each other wherever planes and rows end, so that an aligned output has aligned stores, and lines past the cache are whole.
template <typename acc_t, int K, bool masked, typename Set, typename F> void map_packs(Layout layout, Set coefficients, F f) {
  int64_t C = layout.C, inner = layout.inner, all = numel(layout), row = inner > 1 ? inner : C;
  auto put = [f](int64_t e, auto lanes, const auto& p, Place& place) INLINED {
    f(e, lanes, p, place);
    if constexpr (masked) place.next_pack();
  };
  // What the loops use are copies that no store can change.
  if (inner < MIN_PLANE) {
    int64_t width = C * inner * ceil_div(MAP_WIDTH, C * inner);
    PerChannel<acc_t, K> table(C, inner, width + PACK, coefficients);
    for_runs(all, [&](int64_t e, int64_t end) {
      auto write = put;
      Coefficients<acc_t, K> values = table;
      Place place(row, e);
      for (int64_t j = e % width, stop = width; e < end; j -= stop) {
        for (; j < stop && e + PACK <= end; j += PACK, e += PACK) write(e, Whole{}, values.at(j, Whole{}), place);
        if (j < stop && e < end) return write(e, Partial{int(end - e)}, values.at(j, Whole{}), place);
      }
    });
  } else {
    PerChannel<acc_t, K> table(C, 1, C, coefficients);
    for_runs(all, [&](int64_t e, int64_t end) {
      auto write = put;
      Coefficients<acc_t, K> values = table;
      Place place(row, e);
      int64_t plane = e / inner, next = (plane + 1) * inner;
      for (int64_t c = plane % C; e < end; next += inner) {
        auto p = values.splat(c);
        for (int64_t stop = min(next, end); e + PACK <= stop; e += PACK) write(e, Whole{}, p, place);
        c = c + 1 < C ? c + 1 : 0;
        if (e >= min(next, end)) continue;
        if (e + PACK > end) return write(e, Partial{int(end - e)}, p, place);
        write(e, Whole{}, join(int(next - e), p, values.splat(c)), place);
        e += PACK;
      }
    });
  }
}

// Two sums for each channel, float64: f(first element, lanes, coefficients, row of the mask, s1, s2) adds a pack to s1 and s2.
template <typename acc_t, int K, bool masked, typename Set, typename F>
void sum_packs(Layout layout, double* sums, Set coefficients, F f) {
  using P = Pack<acc_t>;
  if (by_columns(layout, masked)) {
    Columns columns(layout, masked);
    PerChannel<acc_t, K> table(layout.C, layout.inner, columns.width, coefficients);
    columns.for_sums(sums, [&](int64_t row, int64_t rows, int64_t j, int64_t n, double* out) {
      auto add_pack = f;
      Coefficients<acc_t, K> values = table;
      int64_t width = columns.width, first = row * width + j;
      for (int64_t end = row + rows; row < end; row += CHUNK_ROWS, first += CHUNK_ROWS * width) {
        alignas(64) acc_t s1[STRIP] = {}, s2[STRIP] = {};
        add_rows<CHAINS<acc_t>>(first, width, row, min(CHUNK_ROWS, end - row), n, s1, s2,
                                [=](int64_t i, auto lanes) INLINED { return values.at(j + i, lanes); },
                                [=](int64_t e, int64_t r, auto lanes, const auto& p, P& a1, P& a2) INLINED {
                                  add_pack(e, lanes, p, r, a1, a2);
                                });
        add(n, s1, out);
        add(n, s2, out + columns.width);
      }
    });
  } else {
    Planes planes(layout);
    PerChannel<acc_t, K> table(layout.C, 1, layout.C, coefficients);
    planes.for_sums(sums, [&](int64_t c0, int64_t c1, int64_t chunk, auto add) {
      auto add_pack = f;
      Coefficients<acc_t, K> values = table;
      P s1[MAX_GROUP], s2[MAX_GROUP];
      for (int64_t c = c0; c < c1; ++c) s1[c - c0] = s2[c - c0] = P(0);
      planes.for_pieces(c0, c1, chunk, [&](int64_t c, int64_t first, int64_t n, int64_t row) INLINED {
        add_run(n, s1[c - c0], s2[c - c0], [=, p = values.splat(c)](int64_t i, auto lanes, P& a1, P& a2) INLINED {
          add_pack(first + i, lanes, p, row, a1, a2);
        });
      });
      for (int64_t c = c0; c < c1; ++c) add(c, sum(s1[c - c0]), sum(s2[c - c0]));
    });
  }
}

}  // namespace syncbn::cpu::SYNCBN_ISA
