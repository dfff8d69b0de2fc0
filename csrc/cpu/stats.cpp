// stats: sum and sum of squares of each channel, float64, one read of x.
//
// Each chunk is shifted by K, the mean of its first values (a single value could be an outlier), and summed in acc_t; then, in
// float64, sum = n K + s1 and sumsq = s2 + K (2 s1 + n K). Raw squares would cancel where mean >> std. Chunks are added up about an
// origin near the channel's mean, which is left at the end: about 0, each addition would round (mean/std)² as much away.
#include "traverse.h"

namespace syncbn::SYNCBN_ISA {
namespace {

constexpr int SHIFT_PACKS = 128 / PACK;  // planes: packs behind a shift
constexpr int SHIFT_ROWS = 16;           // columns: rows behind a shift
constexpr int64_t ORIGIN_VALUES = 16;

// Adds what s1 = Σ(x - shift) and s2 = Σ(x - shift)² of n values say about the sums of x.
INLINE void unshift(int64_t n, double shift, double s1, double s2, double& sum_x, double& sumsq_x) {
  sum_x += double(n) * shift + s1;
  sumsq_x += s2 + shift * (2 * s1 + double(n) * shift);
}

// The mean of the first values of channel c.
double origin(Layout layout, Param x, int64_t c) {
  int64_t n = min(ORIGIN_VALUES, layout.samples());
  double total = 0;
  for (int64_t k = 0; k < n; ++k) total += get(x, (k / layout.inner * layout.channels + c) * layout.inner + k % layout.inner);
  return total / double(max(n, 1));
}

template <typename scalar_t> void sum_planes(Layout layout, const scalar_t* x, const double* origins, double* total) {
  using acc_t = acc_type<scalar_t>;
  using P = Pack<acc_t>;
  Planes planes(layout);
  planes.for_sums(total, [&](int64_t c0, int64_t c1, int64_t chunk, auto add) {
    P shift[MAX_GROUP], s1[MAX_GROUP], s2[MAX_GROUP];
    int64_t packs[MAX_GROUP] = {}, count[MAX_GROUP] = {};
    for (int64_t c = c0; c < c1; ++c) shift[c - c0] = s1[c - c0] = s2[c - c0] = P(0);
    planes.for_pieces(c0, c1, chunk, [&](int64_t c, int64_t f, int64_t n, int64_t) {
      count[c - c0] += n;
      for (int64_t i = 0; i + PACK <= n && packs[c - c0] < SHIFT_PACKS; i += PACK, ++packs[c - c0]) shift[c - c0] += load(x + f + i);
    });
    for (int64_t c = c0; c < c1; ++c) shift[c - c0] = P(acc_t(sum(shift[c - c0]) / (max(packs[c - c0], 1) * PACK)));
    planes.for_pieces(c0, c1, chunk, [&](int64_t c, int64_t f, int64_t n, int64_t) {
      for (int64_t b = 0; b < n; b += BLOCK) {
        ChainSums<acc_t> t1, t2;
        for_packs<CHAINS<acc_t>>(min(BLOCK, n - b), 0, [&, from = x + f + b, k = shift[c - c0]](int64_t i, auto lanes, int chain) INLINED {
          P d = keep(load(from + i, lanes) - k, lanes);
          t1.s[chain] += d;
          t2.s[chain] += d * d;
        });
        s1[c - c0] += t1.total();
        s2[c - c0] += t2.total();
      }
    });
    for (int64_t c = c0; c < c1; ++c) {
      double sum_x = 0, sumsq_x = 0;
      unshift(count[c - c0], double(shift[c - c0].v[0][0]) - origins[c], sum(s1[c - c0]), sum(s2[c - c0]), sum_x, sumsq_x);
      add(c, sum_x, sumsq_x);
    }
  });
}

template <typename scalar_t> void sum_columns(Layout layout, const scalar_t* x, const double* origins, double* total) {
  using acc_t = acc_type<scalar_t>;
  using P = Pack<acc_t>;
  constexpr int SHARED = 2 * CHAINS<acc_t>;
  Columns columns(layout, false, SUM_WIDTH);
  Buffer<double> origin(columns.width);
  for (int64_t i = 0; i < columns.width; ++i) origin[i] = origins[i / layout.inner % layout.channels];
  columns.for_sums(total, [&](int64_t row, int64_t rows, int64_t j, int64_t n, double* out) {
    auto at = [&](int64_t r, int64_t i, auto lanes) INLINED { return load(x + r * columns.width + j + i, lanes); };
    for (int64_t end = row + rows; row < end; row += CHUNK_ROWS) {
      int64_t length = min(CHUNK_ROWS, end - row), head = min(SHIFT_ROWS, length);
      alignas(64) acc_t shift[STRIP] = {}, s1[STRIP] = {}, s2[STRIP] = {};
      add_rows<SHARED>(row, head, n, shift, s2, [](int64_t, auto) INLINED { return 0; },
               [&](int64_t r, int64_t i, auto lanes, int, P& a, P&) INLINED { a += keep(at(r, i, lanes), lanes); });
      for (int64_t i = 0; i < n; ++i) shift[i] /= acc_t(head);
      add_rows<SHARED>(row, length, n, s1, s2, [&](int64_t i, auto lanes) INLINED { return load(shift + i, lanes); },
               [&](int64_t r, int64_t i, auto lanes, P k, P& a1, P& a2) INLINED {
                 P d = keep(at(r, i, lanes) - k, lanes);
                 a1 += d;
                 a2 += d * d;
               });
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) unshift(length, shift[i] - origin[j + i], s1[i], s2[i], out[i], out[columns.width + i]);
    }
  });
}

}  // namespace

void stats(Dtype dtype, Layout layout, const void* x, bool rank_weighted, double* stats) {
  int64_t channels = layout.channels, count = layout.samples();
  Buffer<double> origins(channels);
  for (int64_t c = 0; c < channels; ++c) origins[c] = origin(layout, {const_cast<void*>(x), dtype}, c);
  with_dtype(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    auto data = static_cast<const scalar_t*>(x);
    by_columns(layout, false) ? sum_columns(layout, data, origins, stats) : sum_planes(layout, data, origins, stats);
  });
  for (int64_t c = 0; c < channels; ++c) {
    double s1 = stats[c], s2 = stats[channels + c];
    stats[c] = stats[channels + c] = 0;
    unshift(count, origins[c], s1, s2, stats[c], stats[channels + c]);
  }
  stats[2 * channels] = double(count);
  if (!rank_weighted) return;
  for (int64_t c = 0; c < 2 * channels; ++c) stats[c] /= double(max(count, 1));
  stats[2 * channels + 1] = double(min(count, 1));
}

}  // namespace syncbn::SYNCBN_ISA
