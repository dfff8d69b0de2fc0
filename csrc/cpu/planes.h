// Sums over planes, unless by_columns() says otherwise: how a channel is divided into units and chunks, and how a run is added up.
#pragma once

#include "traverse.h"

namespace syncbn::cpu::SYNCBN_ISA {

// Planes, or the parts of long ones. A channel is reduced in chunks of at most CHUNK values. Up to MAX_GROUP neighbouring channels are
// reduced together, so that reads of short planes are long. STREAMS channels, C / STREAMS apart, are read concurrently; channels that are
// left over are read one at a time.
struct Planes {
  Layout layout;
  int64_t parts;          // of a plane
  int64_t length;         // of a part
  int64_t planes;         // in a chunk
  int64_t chunks, units;  // of a channel
  int64_t apart;          // channels from one stream to the next

  explicit Planes(Layout l) : layout(l) {
    length = (ceil_div(l.inner, ceil_div(l.inner, CHUNK)) + 63) / 64 * 64;
    parts = ceil_div(l.inner, length);
    planes = max(min(CHUNK / l.inner, MAX_PLANES), 1);
    chunks = parts > 1 ? l.outer * parts : ceil_div(l.outer, planes);
    units = ceil_div(samples(l), UNIT);
    apart = l.C / STREAMS;
  }

  // f(c, first element, length, plane) for the pieces of memory that a chunk has of the channels [c0, c1). With `step`, only every
  // `step`th plane of the chunk is visited.
  template <typename F>
  INLINE void for_pieces(int64_t c0, int64_t c1, int64_t chunk, F f, int64_t step = 1) const {
    int64_t o = chunk * planes, end = min(o + planes, layout.outer), begin = 0, n = layout.inner;
    if (parts > 1) o = chunk / parts, end = o + 1, begin = chunk % parts * length, n = min(length, n - begin);
    for (; o < end; o += step)
      for (int64_t c = c0; c < c1; ++c) f(c, (o * layout.C + c) * layout.inner + begin, n, o * layout.C + c);
  }

  // Adds up two sums per channel, float64. reduce(streams, c0, c1, chunk, add) gets at most MAX_GROUP channels [c0, c1); for each c of
  // them, and each k < streams, it calls add(c + k * apart, s1, s2).
  template <typename F>
  void for_sums(double* total, F reduce) const {
    int64_t channels = layout.C, turns = apart + channels % STREAMS;  // with STREAMS channels each, then with one each
    Buffer<double> sums(channels * units * 2, 0);
    parallel_for(units * turns, GRAIN * units * turns / max(numel(layout), 1), [&](int64_t begin, int64_t end) {
      for (int64_t next; begin < end; begin = next) {
        int64_t unit = begin / turns, first = begin % turns, last = min(first + end - begin, turns);
        next = begin + last - first;
        auto add = [&](int64_t c, double s1, double s2) {
          sums[(c * units + unit) * 2] += s1;
          sums[(c * units + unit) * 2 + 1] += s2;
        };
        auto reduce_groups = [&](auto streams, int64_t c0, int64_t c1, int64_t chunk) {
          for (; c0 < c1; c0 += MAX_GROUP) reduce(streams, c0, min(c0 + MAX_GROUP, c1), chunk, add);
        };
        // All channels of a chunk come before the next chunk, because that is the order of memory.
        for (int64_t chunk = unit * chunks / units; chunk < (unit + 1) * chunks / units; ++chunk) {
          reduce_groups(Number<STREAMS>{}, first, min(last, apart), chunk);
          int64_t before = (STREAMS - 1) * apart;  // a turn k >= apart has one channel, number before + k
          reduce_groups(Number<1>{}, before + max(first, apart), before + last, chunk);
        }
      }
    });
    for (int64_t c = 0; c < channels; ++c) {
      total[c] = total[channels + c] = 0;
      for (int64_t k = c * units; k < (c + 1) * units; ++k) {
        total[c] += sums[2 * k];
        total[channels + c] += sums[2 * k + 1];
      }
    }
  }
};

template <int N, typename T>
INLINE Pack<T> sum_of(const Pack<T>* chains) {
  Pack<T> total = chains[0];
#pragma GCC unroll 4
  for (int k = 1; k < N; ++k) total += chains[k];
  return total;
}

// Adds S runs of n values to s1 and s2 [S]: add(i, lanes, run, a1, a2) on packs. A single long run uses several accumulators to hide add
// latency; with several runs the other runs hide it. A long run is added up as a tree, for accuracy: an accumulator adds 64 packs of a
// block, then the sums of four blocks are added up, then those of all such fours.
template <int S, typename acc_t, typename Add>
INLINE void add_runs(int64_t n, Pack<acc_t>* s1, Pack<acc_t>* s2, Add add) {
  using P = Pack<acc_t>;
  constexpr int EACH = S > 1 ? 1 : CHAINS<acc_t>;
  auto add_block = [=](auto chains, int64_t first, int64_t n, P* s1, P* s2) INLINED {
    constexpr int N = chains.value;
    P a1[S * N], a2[S * N];
    fill(a1, S * N, P(0)), fill(a2, S * N, P(0));
    for_packs<N>(n, [&](int64_t i, auto lanes, int chain) INLINED {
#pragma GCC unroll 8
      for (int k = 0; k < S; ++k) add(first + i, lanes, k, a1[k * N + chain], a2[k * N + chain]);
    });
#pragma GCC unroll 8
    for (int k = 0; k < S; ++k) s1[k] += sum_of<N>(a1 + k * N), s2[k] += sum_of<N>(a2 + k * N);
  };
  if (n < 2 * EACH * PACK) return add_block(Number<1>{}, 0, n, s1, s2);
  for (int64_t first = 0, last; first < n; first = last) {
    last = min(first + 4 * EACH * BLOCK, n);
    P t1[S], t2[S];
    fill(t1, S, P(0)), fill(t2, S, P(0));
    for (int64_t b = first; b < last; b += EACH * BLOCK) add_block(Number<EACH>{}, b, min(EACH * BLOCK, last - b), t1, t2);
#pragma GCC unroll 8
    for (int k = 0; k < S; ++k) s1[k] += t1[k], s2[k] += t2[k];
  }
}

}  // namespace syncbn::cpu::SYNCBN_ISA
