// Elementwise and reduction loops with per-channel parameters.
#pragma once

#include "columns.h"
#include "mask.h"
#include "planes.h"

namespace syncbn::cpu::SYNCBN_ISA {

template <typename acc_t, int K>
struct Packs {
  Pack<acc_t> v[K];
};

// The first n lanes of a, the rest of b.
template <typename acc_t, int K>
INLINE Packs<acc_t, K> join(int n, Packs<acc_t, K> a, const Packs<acc_t, K>& b) {
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) a.v[k] = join(n, a.v[k], b.v[k]);
  return a;
}

// A non-owning view of K parameters per channel.
template <typename acc_t, int K>
struct Coefficients {
  const acc_t* values;
  int64_t width;

  INLINE Packs<acc_t, K> splat(int64_t j) const {
    Packs<acc_t, K> p;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) p.v[k] = Pack<acc_t>(values[k * width + j]);
    return p;
  }
  template <typename Lanes>
  INLINE Packs<acc_t, K> at(int64_t j, Lanes lanes) const {
    Packs<acc_t, K> p;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) p.v[k] = load(values + k * width + j, lanes);
    return p;
  }
};

// Owns the parameters: each channel's are repeated `inner` times, and the whole is repeated up to `width`.
template <typename acc_t, int K>
class PerChannel {
  int64_t width_;
  Buffer<acc_t> values_;

 public:
  // coefficients(c, v) sets v[0 .. K), float64.
  template <typename F>
  PerChannel(int64_t C, int64_t inner, int64_t width, F coefficients) : width_(width), values_(K * width) {
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

// The outputs: a call stores one pack, or the packs of a memory line, in each of them.
template <typename scalar_t, int OUTPUTS>
class Output {
  scalar_t* to_[OUTPUTS];
  bool stream_ = true;

 public:
  Output(scalar_t* const (&to)[OUTPUTS], int64_t n) {
    for (int k = 0; k < OUTPUTS; ++k) {
      to_[k] = to[k];
      stream_ = stream_ && non_temporal(to[k], n);
    }
  }
  template <int N>
  INLINE void write(int64_t e, const Packs<acc_type<scalar_t>, OUTPUTS> (&packs)[N]) const {
#pragma GCC unroll 2
    for (int k = 0; k < OUTPUTS; ++k)
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) store_or_stream(to_[k] + e + i * PACK, packs[i].v[k], stream_);
  }
  INLINE void write(int64_t e, const Packs<acc_type<scalar_t>, OUTPUTS>& packs, Partial lanes) const {
    for (int k = 0; k < OUTPUTS; ++k) store(to_[k] + e, packs.v[k], lanes);
  }
};

// outputs[k] = f(element, lanes, coefficients, position in the mask).v[k] for all packs, in forward runs, a thread's last run first.
//
// Packs cross plane and row boundaries, so stores to an aligned output stay aligned and non-temporal stores fill whole lines.
// If a line is several packs, they are written consecutively, unless a plane ends in it: alternating between two outputs would flush
// half-filled lines.
template <typename scalar_t, int K, int OUTPUTS, typename Set, typename F>
void map_packs(Layout layout, scalar_t* const (&outputs)[OUTPUTS], Set coefficients, F f) {
  using acc_t = acc_type<scalar_t>;
  using Out = Packs<acc_t, OUTPUTS>;
  constexpr int PACKS = PACK * sizeof(scalar_t) < 64 ? 64 / (PACK * sizeof(scalar_t)) : 1, LONGEST = PACKS * PACK;
  int64_t C = layout.C, inner = layout.inner, all = numel(layout);
  bool columns = inner < MIN_MAP_PLANE;
  int64_t width = columns ? C * inner * ceil_div(MAP_WIDTH, C * inner) : C, row = inner > 1 ? inner : C;
  bool wide = inner == 1 && C % LONGEST == 0 && C * int64_t(sizeof(acc_t)) >= WIDE_BYTES;
  PerChannel<acc_t, K> table(C, columns ? inner : 1, columns ? width + LONGEST : C, coefficients);
  Output<scalar_t, OUTPUTS> output(outputs, all);

  for_runs(all, [&](int64_t e, int64_t end) {
    // Local copies, so that the compiler knows no store can alias them.
    auto map = f;
    auto to = output;
    Coefficients<acc_t, K> values = table;
    auto map_line = [=](int64_t e, auto values_at, auto position_at) INLINED {
      Out packs[PACKS];
#pragma GCC unroll 4
      for (int k = 0; k < PACKS; ++k) packs[k] = map(e + k * PACK, Whole{}, values_at(e + k * PACK), position_at(e + k * PACK));
      to.write(e, packs);
    };
    // Maps lines and packs from e on, as long as one begins before `until` and ends by `stop`; returns where the next one begins.
    auto map_until = [=](int64_t e, int64_t until, int64_t stop, auto values_at, auto position_at) INLINED {
      auto one = [=](int64_t e) INLINED {
        Out packs[] = {map(e, Whole{}, values_at(e), position_at(e))};
        to.write(e, packs);
      };
      int64_t last = min(until - 1, stop - PACK), last_line = min(until - 1, stop - LONGEST);
      for (; e % LONGEST != 0 && e <= last; e += PACK) one(e);
      for (; e <= last_line; e += LONGEST) map_line(e, values_at, position_at);
      for (; e <= last; e += PACK) one(e);
      return e;
    };
    if (columns) {
      MaskPosition position{row, e / row, row - e % row};
      auto next_position = [&](int64_t) INLINED {
        MaskPosition here = position;
        position.next_pack();
        return here;
      };
      for (int64_t start = e - e % width; e < end; start += width) {
        // If a row's coefficients fill most of L1, several rows share each load of coefficients.
        for (; wide && e == start && end - e >= WIDE_ROWS * C; e = start += WIDE_ROWS * C, position.row += WIDE_ROWS)
          for (int64_t c = 0; c < C; c += LONGEST)
            for (int64_t r = 0; r < WIDE_ROWS; ++r) {
              auto values_at = [=](int64_t i) INLINED { return values.at(i - start - r * C, Whole{}); };
              map_line(start + r * C + c, values_at,
                       [=](int64_t i) INLINED { return MaskPosition{C, position.row + r, C - (i - start - r * C)}; });
            }
        auto values_at = [=](int64_t i) INLINED { return values.at(i - start, Whole{}); };  // the table is padded beyond its width
        e = map_until(e, start + width, end, values_at, next_position);
        Partial rest{int(end - e)};
        if (e < min(start + width, end)) return to.write(e, map(e, rest, values_at(e), position), rest);
      }
    } else {
      int64_t plane = e / inner, next = (plane + 1) * inner;
      for (int64_t c = plane % C; e < end; ++plane, next += inner) {
        auto p = values.splat(c);
        auto position_at = [=](int64_t i) INLINED { return MaskPosition{inner, plane, next - i}; };
        e = map_until(e, next, min(next, end), [=](int64_t) INLINED { return p; }, position_at);
        c = c + 1 < C ? c + 1 : 0;
        if (e >= min(next, end)) continue;
        Partial rest{int(end - e)};  // shorter than a pack only at the very end, in the last plane
        if (rest.last < PACK) return to.write(e, map(e, rest, p, position_at(e)), rest);
        Out packs[] = {map(e, Whole{}, join(int(next - e), p, values.splat(c)), position_at(e))};
        to.write(e, packs);
        e += PACK;
      }
    }
  });
}

// The inputs of a pack of columns: the parameters of its channels, and its position in the mask, a MaskPosition or a Row.
template <typename acc_t, int K, typename Where>
struct Column {
  Packs<acc_t, K> p;
  Where position;
};

// Two sums for each channel, float64: f(first element, lanes, coefficients, position in the mask, s1, s2) adds a pack to s1 and s2.
template <typename acc_t, int K, bool masked, typename Set, typename F>
void sum_packs(Layout layout, double* sums, Set coefficients, F f) {
  using P = Pack<acc_t>;
  if (by_columns(layout, masked)) {
    Columns columns(layout, masked);
    PerChannel<acc_t, K> table(layout.C, 1, columns.slots, coefficients);
    uint32_t length = uint32_t(layout.inner > 1 ? layout.inner : layout.C);  // of the mask's rows
    auto sum_with = [&](auto position_at) {
      columns.for_sums(sums, [&](int64_t row, int64_t rows, int64_t slot, int64_t n, double* out) {
        auto add_pack = f;
        int64_t inner = layout.inner, width = columns.width, j = slot * inner, first = row * width + j, mask_rows = width / length;
        alignas(64) acc_t values[K][STRIP];
        for (int k = 0; k < K; ++k) {
          memcpy(values[k], Coefficients<acc_t, K>(table).values + k * columns.slots + slot, n * sizeof(acc_t));
          unfold(n, inner, n * inner, values[k]);
        }
        Coefficients<acc_t, K> near{values[0], STRIP};
        auto column = [=](int64_t i, auto lanes)
                          INLINED { return Column<acc_t, K, decltype(position_at(0))>{near.at(i, lanes), position_at(uint32_t(j + i))}; };
        auto add_at = [=](int64_t e, int64_t r, auto lanes, auto at, P& a1, P& a2) INLINED {
          at.position.row += r * mask_rows;
          add_pack(e, lanes, at.p, at.position, a1, a2);
        };
        for (int64_t end = row + rows; row < end; row += CHUNK_ROWS, first += CHUNK_ROWS * width) {
          alignas(64) acc_t s1[STRIP], s2[STRIP];
          fill(s1, n * inner, acc_t(0));
          fill(s2, n * inner, acc_t(0));
          auto add = [&](auto streams) {
            add_rows<streams.value>(first, width, row, min(CHUNK_ROWS, end - row), n * inner, s1, s2, column, add_at);
          };
          // Each stream also reads the mask, so there are half as many, unless rows are wide: sharing sums among streams then pays more.
          masked&& width < STRIP ? add(Number<STREAMS / 2>{}) : add(Number<STREAMS>{});
          for_slots(n, inner, s1, s2, [=](int64_t k, double v1, double v2) INLINED { out[k] += v1, out[columns.slots + k] += v2; });
        }
      });
    };
    if constexpr (masked) {
      if (length % PACK != 0 && whole_bytes(layout))
        return sum_with([=](uint32_t j) INLINED { return MaskPosition{length, j / length, length - j % length}; });
    }
    sum_with([=](uint32_t j) INLINED { return Row{masked ? j / length : 0}; });
  } else {
    Planes planes(layout);
    PerChannel<acc_t, K> table(layout.C, 1, layout.C, coefficients);
    planes.for_sums(sums, [&](auto streams, int64_t c0, int64_t c1, int64_t chunk, auto add) {
      constexpr int S = streams.value;
      auto add_pack = f;
      Coefficients<acc_t, K> values = table;
      int64_t apart = planes.apart, inner = layout.inner;
      P s1[MAX_GROUP][S], s2[MAX_GROUP][S];
      for (int64_t c = 0; c < c1 - c0; ++c) fill(s1[c], S, P(0)), fill(s2[c], S, P(0));
      planes.for_pieces(c0, c1, chunk, [&](int64_t c, int64_t first, int64_t n, int64_t row) INLINED {
        add_runs<S>(n, s1[c - c0], s2[c - c0], [=](int64_t i, auto lanes, int k, P& a1, P& a2) INLINED {
          add_pack(first + k * apart * inner + i, lanes, values.splat(c + k * apart), Row{row + k * apart}, a1, a2);
        });
      });
      for (int64_t c = c0; c < c1; ++c)
        for (int k = 0; k < S; ++k) add(c + k * apart, sum(s1[c - c0][k]), sum(s2[c - c0][k]));
    });
  }
}

}  // namespace syncbn::cpu::SYNCBN_ISA
