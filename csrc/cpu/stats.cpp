// stats: for each channel the shift, and the sum and the sum of squares about it, in float64. Memory is read once.
//
// Each chunk has its own K, the mean of values spread over the chunk: a single value could be an outlier, and the first ones padding. The
// chunk is summed about K in acc_t; then, in float64 and with k = K - shift, sum = n k + s1 and sumsq = s2 + k (2 s1 + n k). Raw squares
// would cancel if mean >> std. Chunks are accumulated about the channel's first value, and moved to a shift of 0 at the end if the caller
// wants that: about 0, each addition would lose (mean/std)² times as much.
#include "columns.h"
#include "finalize.h"
#include "planes.h"

namespace syncbn::cpu::SYNCBN_ISA {
namespace {

constexpr int K_VALUES = 128;  // K is the mean of about this many values
constexpr int K_ROWS = 16;     // columns, if inner is 1: K is the mean of at most this many rows

// Adds to sum and sumsq those of n values, moved from K to the channel's shift: s1 and s2 are the sums about K, and k is K - shift.
INLINE void add_moved(double n, double k, double s1, double s2, double& sum, double& sumsq) {
  sum += n * k + s1;
  sumsq += s2 + k * (2 * s1 + n * k);
}

// The first value of each channel; 0 if it has none.
template <typename scalar_t>
void set_origins(Layout layout, const scalar_t* x, double* origins) {
  if (!layout.outer) return fill(origins, layout.C, 0.0);
  for (int64_t c = 0; c < layout.C; ++c) origins[c] = to_double(x[c * layout.inner]);
}

// The packs of a chunk that K averages: `each` packs from every `step`th plane, at places that move from plane to plane.
struct Sample {
  int64_t step, each, spacing;

  explicit Sample(const Planes& planes) {
    constexpr int64_t WANTED = K_VALUES / PACK;
    int64_t together = planes.parts > 1 ? 1 : min(planes.planes, planes.layout.outer), n = min(planes.length, planes.layout.inner);
    int64_t taken = min(together, WANTED);
    step = ceil_div(together, taken);
    each = max(min(WANTED / taken, n / PACK), 1);
    spacing = max(n - PACK, 0) / (PLACES * each);
  }
  // The first element of pack k in the j-th plane that is sampled, of n values.
  INLINE int64_t at(int64_t j, int64_t k, int64_t n) const {
    return min(spacing * (PLACES * k + j * 5 % PLACES), n - PACK);
  }

 private:
  static constexpr int64_t PLACES = 8;
};

template <typename scalar_t>
void sum_planes(Layout layout, const scalar_t* x, const double* origins, double* total) {
  using acc_t = acc_type<scalar_t>;
  using P = Pack<acc_t>;
  Planes planes(layout);
  Sample sample(planes);
  planes.for_sums(total, [&](auto streams, int64_t c0, int64_t c1, int64_t chunk, auto add) {
    constexpr int S = streams.value;
    P K[MAX_GROUP][S], s1[MAX_GROUP][S], s2[MAX_GROUP][S];
    int64_t apart = planes.apart, stride = apart * layout.inner, taken = 0, count = 0;
    for (int64_t c = 0; c < c1 - c0; ++c) fill(K[c], S, P(0)), fill(s1[c], S, P(0)), fill(s2[c], S, P(0));
    auto add_sample = [&](int64_t c, int64_t first, int64_t n, int64_t) INLINED {
      if (c == c0) ++taken;
      for (int64_t i = 0; i < sample.each; ++i)
        for (int k = 0; k < S; ++k) K[c - c0][k] += load(x + first + k * stride + sample.at(taken - 1, i, n));
    };
    planes.for_pieces(c0, c1, chunk, add_sample, sample.step);
    for (int64_t c = c0; c < c1; ++c)
      for (int k = 0; k < S; ++k) K[c - c0][k] = P(acc_t(sum(K[c - c0][k]) / (taken * sample.each * PACK)));
    planes.for_pieces(c0, c1, chunk, [&](int64_t c, int64_t first, int64_t n, int64_t) INLINED {
      if (c == c0) count += n;
      P near[S];
      for (int k = 0; k < S; ++k) near[k] = K[c - c0][k];
      add_runs<S>(n, s1[c - c0], s2[c - c0], [=](int64_t i, auto lanes, int k, P& a1, P& a2) INLINED {
        P d = keep(load(x + first + k * stride + i, lanes) - near[k], lanes);
        a1 += d;
        a2 += d * d;
      });
    });
    for (int64_t c = c0; c < c1; ++c)
      for (int k = 0; k < S; ++k) {
        double origin = origins[c + k * apart], moved = 0, moved_sq = 0;
        add_moved(double(count), double(K[c - c0][k].v[0][0]) - origin, sum(s1[c - c0][k]), sum(s2[c - c0][k]), moved, moved_sq);
        add(c + k * apart, moved, moved_sq);
      }
  });
}

template <typename scalar_t>
void sum_columns(Layout layout, const scalar_t* x, const double* origins, double* total) {
  using acc_t = acc_type<scalar_t>;
  using P = Pack<acc_t>;
  constexpr int ROW_STREAMS = 2 * STREAMS;  // twice as many, because stats reads one tensor, backward_reduce two or more
  Columns columns(layout, false);
  Buffer<double> origin(columns.slots);
  memcpy(origin, origins, layout.C * sizeof(double));
  unfold<double>(layout.C, 1, columns.slots, origin);
  columns.for_sums(total, [&](int64_t row, int64_t rows, int64_t slot, int64_t n, double* out) {
    int64_t inner = layout.inner, width = columns.width, wide = n * inner, first = row * width + slot * inner;
    for (int64_t end = row + rows; row < end; row += CHUNK_ROWS, first += CHUNK_ROWS * width) {
      int64_t length = min(CHUNK_ROWS, end - row);
      // K's rows, `step` apart; if inner is 1, those that begin a stream, and are still in cache when the stream is summed.
      int64_t sampled = min(inner == 1 ? ROW_STREAMS : ceil_div(K_VALUES, inner), length), step = length / sampled;
      int64_t turns = inner == 1 ? min(K_ROWS / ROW_STREAMS, step) : 1;
      alignas(64) acc_t K[STRIP], s1[STRIP], s2[STRIP];
      fill(K, wide, acc_t(0));
      fill(s1, wide, acc_t(0));
      fill(s2, wide, acc_t(0));
      double of_slot[STRIP];  // K of each slot
      for (int64_t turn = 0; turn < turns; ++turn)
        add_rows<ROW_STREAMS>(
            first + turn * width, step * width, row, sampled, wide, K, s2, [](int64_t, auto) INLINED { return 0; },
            [x](int64_t e, int64_t, auto lanes, int, P& a, P&) INLINED { a += keep(load(x + e, lanes), lanes); });
      double values = double(sampled * turns * inner), count = double(length * inner);
      for_slots(n, inner, K, K, [&](int64_t k, double total, double) INLINED { of_slot[k] = double(acc_t(total / values)); });
      for (int64_t k = 0; k < n; ++k) K[k] = acc_t(of_slot[k]);
      unfold(n, inner, wide, K);
      add_rows<ROW_STREAMS>(
          first, width, row, length, wide, s1, s2, [&](int64_t i, auto lanes) INLINED { return load(K + i, lanes); },
          [x](int64_t e, int64_t, auto lanes, P k, P& a1, P& a2) INLINED {
            P d = keep(load(x + e, lanes) - k, lanes);
            a1 += d;
            a2 += d * d;
          });
      for_slots(n, inner, s1, s2, [&](int64_t k, double v1, double v2) INLINED {
        add_moved(count, of_slot[k] - origin[slot + k], v1, v2, out[k], out[columns.slots + k]);
      });
    }
  });
}

}  // namespace

void stats(const StatsArgs& args) {
  const Layout& layout = args.layout;
  double *shift = args.stats, *sums = shift + layout.C, *sumsqs = sums + layout.C, n = double(samples(layout));
  with_dtype(args.dtype, [&](auto type) {
    using scalar_t = decltype(type);
    auto x = static_cast<const scalar_t*>(args.x);
    set_origins<scalar_t>(layout, x, shift);
    by_columns(layout, false) ? sum_columns(layout, x, shift, sums) : sum_planes(layout, x, shift, sums);
  });
  if (!args.shifted) {
#pragma GCC ivdep
    for (int64_t c = 0; c < layout.C; ++c) {
      double s1 = sums[c], s2 = sumsqs[c], sum = 0, sumsq = 0;
      add_moved(n, shift[c], s1, s2, sum, sumsq);  // from the shift to 0
      shift[c] = 0, sums[c] = sum, sumsqs[c] = sumsq;
    }
  }
  if (args.rank_weighted && n > 1)
    for (int64_t c = 0; c < 2 * layout.C; ++c) sums[c] /= n;
  double* tail = args.stats + 3 * layout.C;
  tail[stats_tail::weight] = args.rank_weighted ? n > 0 : n;
  tail[stats_tail::samples] = n;
  tail[stats_tail::tag] = args.tag;
  tail[stats_tail::tag_squared] = args.tag * args.tag;
}

}  // namespace syncbn::cpu::SYNCBN_ISA
