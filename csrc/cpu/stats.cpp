// stats: sum and sum of squares of each channel, float64, one read of x.
//
// Each chunk is shifted by K, the mean of its first values (a single value could be an outlier), and summed in acc_t; then, in
// float64, sum = n K + s1 and sumsq = s2 + K (2 s1 + n K). Raw squares would cancel where mean >> std.
#include "traverse.h"

namespace syncbn::SYNCBN_ISA {
namespace {

constexpr int SHIFT_PACKS = 8;   // planes: packs behind a shift
constexpr int SHIFT_ROWS = 32;   // columns: rows behind a shift

// Adds what s1 = Σ(x - shift) and s2 = Σ(x - shift)² of n values say about the sums of x.
INLINE void unshift(int64_t n, double shift, double s1, double s2, double& sum_x, double& sumsq_x) {
  sum_x += double(n) * shift + s1;
  sumsq_x += s2 + shift * (2 * s1 + double(n) * shift);
}

template <typename scalar_t> void sum_planes(Layout layout, const scalar_t* x, double* total) {
  using acc_t = acc_type<scalar_t>;
  using P = Pack<acc_t>;
  Planes planes(layout);
  planes.for_sums(total, [&](int64_t c, int64_t chunk, double& sum_x, double& sumsq_x) {
    P first(acc_t(0)), s1[ACCUMULATORS], s2[ACCUMULATORS];
    for (int k = 0; k < ACCUMULATORS; ++k) s1[k] = s2[k] = first;
    int packs = 0;
    int64_t n = 0;
    planes.for_pieces(c, chunk, [&](int64_t f, int64_t length, int64_t) {
      n += length;
      for (int64_t i = 0; i + PACK <= length && packs < SHIFT_PACKS; i += PACK, ++packs) first += load(x + f + i);
    });
    acc_t shift = acc_t(packs ? sum(first) / (packs * PACK) : 0);
    planes.for_pieces(c, chunk, [&](int64_t f, int64_t length, int64_t) {
      for_packs<ACCUMULATORS>(length, 0, [&](int64_t i, auto lanes, int k) {
        P d = keep(load(x + f + i, lanes) - P(shift), lanes);
        s1[k] += d;
        s2[k] += d * d;
      });
    });
    unshift(n, shift, sum((s1[0] + s1[1]) + (s1[2] + s1[3])), sum((s2[0] + s2[1]) + (s2[2] + s2[3])), sum_x, sumsq_x);
  });
}

template <typename scalar_t> void sum_columns(Layout layout, const scalar_t* x, double* total) {
  using acc_t = acc_type<scalar_t>;
  using P = Pack<acc_t>;
  Columns columns(layout, false);
  columns.for_sums(total, [&](int64_t row, int64_t rows, int64_t j, int64_t n, double* out) {
    auto at = [&](int64_t r, int64_t i, auto lanes) { return load(x + r * columns.width + j + i, lanes); };
    for (int64_t end = row + rows; row < end; row += CHUNK_ROWS) {
      int64_t length = min(CHUNK_ROWS, end - row), head = min(SHIFT_ROWS, length);
      acc_t shift[STRIP] = {}, s1[STRIP] = {}, s2[STRIP] = {};
      add_rows(row, head, n, shift, s2, [](int64_t, auto) { return 0; },
               [&](int64_t r, int64_t i, auto lanes, int, P& a, P&) { a += keep(at(r, i, lanes), lanes); });
      for (int64_t i = 0; i < n; ++i) shift[i] /= acc_t(head);
      add_rows(row, length, n, s1, s2, [&](int64_t i, auto lanes) { return load(shift + i, lanes); },
               [&](int64_t r, int64_t i, auto lanes, P k, P& a1, P& a2) {
                 P d = keep(at(r, i, lanes) - k, lanes);
                 a1 += d;
                 a2 += d * d;
               });
      for (int64_t i = 0; i < n; ++i) unshift(length, shift[i], s1[i], s2[i], out[i], out[columns.width + i]);
    }
  });
}

}  // namespace

void stats(Dtype dtype, Layout layout, const void* x, bool rank_weighted, double* stats) {
  with_dtype(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    auto data = static_cast<const scalar_t*>(x);
    by_columns(layout, false) ? sum_columns(layout, data, stats) : sum_planes(layout, data, stats);
  });
  int64_t channels = layout.channels, count = layout.samples();
  stats[2 * channels] = double(count);
  if (!rank_weighted) return;
  for (int64_t c = 0; c < 2 * channels; ++c) stats[c] /= double(max(count, 1));
  stats[2 * channels + 1] = double(min(count, 1));
}

}  // namespace syncbn::SYNCBN_ISA
