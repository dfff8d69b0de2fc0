// stats: sum and sum of squares of each channel, float64, one read of x.
//
// Each chunk is shifted by K, the mean of its first values (a single value could be an outlier), and summed in acc_t; then, in
// float64, sum = n K + s1 and sumsq = s2 + K (2 s1 + n K). Raw squares would cancel where mean >> std. Chunks are added up about an
// origin near the channel's mean, which is left at the end: about 0, each addition would round (mean/std)² as much away.
#include "finalize.h"

namespace syncbn::cpu::SYNCBN_ISA {
namespace {

constexpr int SHIFT_VALUES = 128;  // behind a shift, about
constexpr int SHIFT_ROWS = 16;     // columns: of them, at most

// Adds what s1 = Σ(x - shift) and s2 = Σ(x - shift)² of n values say about the sums of x.
INLINE void unshift(double n, double shift, double s1, double s2, double& sum_x, double& sumsq_x) {
  sum_x += n * shift + s1;
  sumsq_x += s2 + shift * (2 * s1 + n * shift);
}

// The mean of the first values of each channel.
template <typename scalar_t> void set_origins(Layout layout, const scalar_t* x, double* origins) {
  using P = Pack<acc_type<scalar_t>>;
  int64_t C = layout.C, inner = min(layout.inner, PACK), outer = min(layout.outer, ceil_div(PACK, max(inner, 1)));
  double n = double(max(outer * inner, 1));
  if (layout.inner == 1) {
    for_packs(C, [&](int64_t c, auto lanes, int) INLINED {
      P total(0);
      for (int64_t o = 0; o < outer; ++o) total += load(x + o * C + c, lanes);
      for (int k = 0; k < lanes.last; ++k) origins[c + k] = total.v[k / P::LANES][k % P::LANES] / n;
    });
    return;
  }
  for (int64_t c = 0; c < C; ++c) {
    double total = 0;
    for (int64_t o = 0; o < outer; ++o) {
      const scalar_t* from = x + (o * C + c) * layout.inner;
      if (inner == PACK) total += sum(load(from));
      else
        for (int64_t i = 0; i < inner; ++i) total += to_double(from[i]);
    }
    origins[c] = total / n;
  }
}

template <typename scalar_t> void sum_planes(Layout layout, const scalar_t* x, const double* origins, double* total) {
  using acc_t = acc_type<scalar_t>;
  using P = Pack<acc_t>;
  Planes planes(layout);
  planes.for_sums(total, [&](auto abreast, int64_t c0, int64_t c1, int64_t chunk, auto add) {
    constexpr int S = abreast.value;
    P shift[MAX_GROUP][S], s1[MAX_GROUP][S], s2[MAX_GROUP][S];
    int64_t apart = planes.apart, stride = apart * layout.inner, packs = 0, count = 0;
    for (int64_t c = 0; c < c1 - c0; ++c) fill(shift[c], S, P(0)), fill(s1[c], S, P(0)), fill(s2[c], S, P(0));
    auto add_head = [&](int64_t c, int64_t f, int64_t n, int64_t) INLINED {
      int64_t whole = min(n / PACK, SHIFT_VALUES / PACK);
      for (int64_t i = 0; i < whole; ++i)
        for (int k = 0; k < S; ++k) shift[c - c0][k] += load(x + f + k * stride + i * PACK);
      if (c == c0) packs += whole;
    };
    planes.for_pieces(c0, c1, chunk, add_head, ceil_div(SHIFT_VALUES, layout.inner));
    for (int64_t c = c0; c < c1; ++c)
      for (int k = 0; k < S; ++k) {
        P& to = shift[c - c0][k];
        // A chunk shorter than a pack, the end of a long plane, has the channel's.
        to = P(acc_t(packs ? sum(to) / (packs * PACK) : origins[c + k * apart]));
      }
    planes.for_pieces(c0, c1, chunk, [&](int64_t c, int64_t f, int64_t n, int64_t) INLINED {
      if (c == c0) count += n;
      P near[S];
      for (int k = 0; k < S; ++k) near[k] = shift[c - c0][k];
      add_runs<S>(n, s1[c - c0], s2[c - c0], [=](int64_t i, auto lanes, int k, P& a1, P& a2) INLINED {
        P d = keep(load(x + f + k * stride + i, lanes) - near[k], lanes);
        a1 += d;
        a2 += d * d;
      });
    });
    for (int64_t c = c0; c < c1; ++c)
      for (int k = 0; k < S; ++k) {
        double origin = origins[c + k * apart], sum_x = 0, sumsq_x = 0;
        unshift(double(count), double(shift[c - c0][k].v[0][0]) - origin, sum(s1[c - c0][k]), sum(s2[c - c0][k]), sum_x, sumsq_x);
        add(c + k * apart, sum_x, sumsq_x);
      }
  });
}

template <typename scalar_t> void sum_columns(Layout layout, const scalar_t* x, const double* origins, double* total) {
  using acc_t = acc_type<scalar_t>;
  using P = Pack<acc_t>;
  constexpr int PLACES = 2 * ABREAST;  // of one tensor; other sums read two
  Columns columns(layout, false);
  Buffer<double> origin(columns.slots);
  memcpy(origin, origins, layout.C * sizeof(double));
  unfold<double>(layout.C, 1, columns.slots, origin);
  columns.for_sums(total, [&](int64_t row, int64_t rows, int64_t slot, int64_t n, double* out) {
    int64_t inner = layout.inner, width = columns.width, wide = n * inner, first = row * width + slot * inner;
    for (int64_t end = row + rows; row < end; row += CHUNK_ROWS, first += CHUNK_ROWS * width) {
      int64_t length = min(CHUNK_ROWS, end - row), head = min(min(SHIFT_ROWS, ceil_div(SHIFT_VALUES, inner)), length);
      alignas(64) acc_t shift[STRIP], s1[STRIP], s2[STRIP];
      fill(shift, wide, acc_t(0));
      fill(s1, wide, acc_t(0));
      fill(s2, wide, acc_t(0));
      double shifts[STRIP];
      add_rows<PLACES>(first, width, row, head, wide, shift, s2, [](int64_t, auto) INLINED { return 0; },
                       [x](int64_t e, int64_t, auto lanes, int, P& a, P&) INLINED { a += keep(load(x + e, lanes), lanes); });
      double values = double(head * inner), count = double(length * inner);
      for_slots(n, inner, shift, shift, [&](int64_t k, double total, double) INLINED { shifts[k] = double(acc_t(total / values)); });
      for (int64_t k = 0; k < n; ++k) shift[k] = acc_t(shifts[k]);
      unfold(n, inner, wide, shift);
      add_rows<PLACES>(first, width, row, length, wide, s1, s2, [&](int64_t i, auto lanes) INLINED { return load(shift + i, lanes); },
                       [x](int64_t e, int64_t, auto lanes, P k, P& a1, P& a2) INLINED {
                         P d = keep(load(x + e, lanes) - k, lanes);
                         a1 += d;
                         a2 += d * d;
                       });
      for_slots(n, inner, s1, s2, [&](int64_t k, double v1, double v2) INLINED {
        unshift(count, shifts[k] - origin[slot + k], v1, v2, out[k], out[columns.slots + k]);
      });
    }
  });
}

}  // namespace

void stats(const StatsArgs& args) {
  const Layout& layout = args.layout;
  double *sum_x = args.stats, *sumsq_x = args.stats + layout.C, n = double(samples(layout));
  Buffer<double> origins(layout.C);
  with_dtype(args.dtype, [&](auto type) {
    using scalar_t = decltype(type);
    auto x = static_cast<const scalar_t*>(args.x);
    set_origins<scalar_t>(layout, x, origins);
    by_columns(layout, false) ? sum_columns(layout, x, origins, args.stats) : sum_planes(layout, x, origins, args.stats);
  });
  const double* shift = origins;
  // With ranks that weigh the same, these are means.
  double weight = args.rank_weighted && n > 1 ? n : 1;
#pragma GCC ivdep
  for (int64_t c = 0; c < layout.C; ++c) {
    double s1 = sum_x[c], s2 = sumsq_x[c], sum = 0, sumsq = 0;
    unshift(n, shift[c], s1, s2, sum, sumsq);
    sum_x[c] = sum / weight;
    sumsq_x[c] = sumsq / weight;
  }
  args.stats[2 * layout.C] = n;
  if (args.rank_weighted) args.stats[2 * layout.C + 1] = n > 0;
}

}  // namespace syncbn::cpu::SYNCBN_ISA
