// How the ops walk [outer, C, inner]: by planes where inner is long, by columns where channels lie side by side.
//
// All divisions of the work depend on the shape alone, never on the number of threads: so the bits do not either.
#pragma once

#include <new>

#include "simd.h"

namespace syncbn::cpu::SYNCBN_ISA {

// Packs that are added up independently of each other: 4 registers for each sum hide the latency of an fma.
template <typename T> constexpr int CHAINS = Pack<T>::REGISTERS < 4 ? 4 / Pack<T>::REGISTERS : 1;

constexpr int64_t BLOCK = 64 * PACK * CHAINS<float>; // planes: values that are added up in acc_t at once, 64 in each lane
constexpr int64_t CHUNK = 4 * BLOCK;                 // planes: values that share a shift, of at most 64 planes
constexpr int64_t UNIT = 65536;                      // planes: values that one partial sum covers
constexpr int64_t GRAIN = 32768;                     // values below which a thread is not worth waking; torch's own number
constexpr int64_t MAX_GROUP = 128;                   // planes: channels summed together, their sums in L1
constexpr int64_t MIN_PLANE = PACK;                  // shorter planes are walked as columns
constexpr int64_t MAP_WIDTH = 128;                   // columns: rows of few channels are folded to at least this
constexpr int64_t SUM_WIDTH = 2048;                  // the same for sums: each row a stream of its own to a prefetcher
constexpr int64_t STRIP = 1024;                      // columns: accumulators of a strip stay in L1
constexpr int64_t CHUNK_ROWS = 512;                  // columns: rows that share a shift and are summed in acc_t
constexpr int64_t MIN_ROWS = 128;                    // columns: rows that one partial sum covers at least
constexpr int64_t MIN_UNITS = 16;                    // columns: parts of the work for threads to share out, where rows suffice
constexpr int64_t STREAM_BYTES = 16 << 20;           // an output larger than this is gone from the cache before it is read
constexpr int64_t MAX_BLOCKS = 64;                   // columns: partial sums per column

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t samples(Layout layout) { return layout.outer * layout.inner; }
INLINE int64_t numel(Layout layout) { return layout.outer * layout.C * layout.inner; }

// Zeros. Aligned to a cache line: a vector that crosses two is not forwarded from its store to its next load.
constexpr std::align_val_t LINE{64};
template <typename T> class Buffer {
  T* data_;

 public:
  explicit Buffer(int64_t size) : data_(new (LINE) T[size]()) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { ::operator delete[](data_, LINE); }
  operator T*() { return data_; }
  operator const T*() const { return data_; }
};

// to [n] += from [n], which do not overlap.
template <typename T> INLINE void add(int64_t n, const T* from, double* to) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) to[i] += double(from[i]);
}

template <typename F> void parallel_for(int64_t n, int64_t grain, F f) {
  cpu::parallel_for(n, max(grain, 1), [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); }, &f);
}

// f(i, lanes, k) for packs that cover [0, n), with k < TURNS taking turns. The first pack ends at `head` values where that is
// not 0; the last may overlap the one before it.
template <int TURNS = 1, typename F> INLINE void for_packs(int64_t n, int head, F f) {
  if (n < PACK) return f(0, Partial{int(n)}, 0);
  int64_t i = 0;
  if (head) {
    f(0, Overlap{0, head}, 0);
    i = head;
  }
  for (; i + TURNS * PACK <= n; i += TURNS * PACK) {
#pragma GCC unroll 8
    for (int k = 0; k < TURNS; ++k) f(i + k * PACK, Whole{}, k);
  }
  if (TURNS > 1)
    for (; i + PACK <= n; i += PACK) f(i, Whole{}, 0);
  if (i < n) f(n - PACK, Overlap{int(i + PACK - n), PACK}, TURNS - 1);
}

// ---- Planes -----------------------------------------------------------------------------------------------------------------

// Planes, or the parts of long ones. Sums take the samples of a channel as chunks of about CHUNK values; where planes are short, some
// channels together, so that memory is read in runs and not in snippets.
struct Planes {
  Layout layout;
  int64_t parts;   // of a plane
  int64_t length;  // of a part
  int64_t planes;  // in a chunk
  int64_t chunks, units;  // of a channel
  int64_t group;   // channels

  explicit Planes(Layout l) : layout(l) {
    length = (ceil_div(l.inner, ceil_div(l.inner, CHUNK)) + 63) / 64 * 64;
    parts = ceil_div(l.inner, length);
    planes = max(min(CHUNK / l.inner, 64), 1);
    chunks = parts > 1 ? l.outer * parts : ceil_div(l.outer, planes);
    units = ceil_div(samples(l), UNIT);
    group = max(min(CHUNK / 2 / l.inner, MAX_GROUP), 1);
  }

  // f(c, first element, length, plane) for a part of a plane. Parts start at multiples of 8 elements, so that no two threads write one
  // byte of the mask.
  template <typename F> INLINE void for_part(int64_t c, int64_t plane, int64_t part, F f) const {
    int64_t start = plane * layout.inner;
    int64_t begin = part ? part * length - start % 8 : 0;
    int64_t end = part + 1 < parts ? (part + 1) * length - start % 8 : layout.inner;
    f(c, start + begin, end - begin, plane);
  }

  // The same for the pieces of memory in a chunk of the channels [c0, c1).
  template <typename F> INLINE void for_pieces(int64_t c0, int64_t c1, int64_t chunk, F f) const {
    if (parts > 1) return for_part(c0, chunk / parts * layout.C + c0, chunk % parts, f);
    for (int64_t o = chunk * planes, end = min(o + planes, layout.outer); o < end; ++o)
      for (int64_t c = c0; c < c1; ++c) f(c, (o * layout.C + c) * layout.inner, layout.inner, o * layout.C + c);
  }

  // f as above for all of memory, in parallel; backwards, but by runs that a prefetcher follows.
  template <typename F> void for_memory(F f) const {
    int64_t run = parts > 1 ? 1 : ceil_div(CHUNK, layout.inner), all = layout.outer * layout.C * parts;
    parallel_for(ceil_div(all, run), GRAIN / (run * min(length, layout.inner)), [&](int64_t begin, int64_t end) {
      for (int64_t k = end - 1; k >= begin; --k) {
        int64_t plane = k * run / parts, part = k * run % parts, c = plane % layout.C;
        for (int64_t next = min(plane + run, layout.outer * layout.C); plane < next; ++plane, c = c + 1 < layout.C ? c + 1 : 0)
          for_part(c, plane, part, f);
      }
      finish_streams();
    });
  }

  // Adds up two sums per channel, float64: reduce(c0, c1, chunk, add) calls add(c, s1, s2) for each of the channels.
  template <typename F> void for_sums(double* total, F reduce) const {
    int64_t channels = layout.C;
    Buffer<double> sums(channels * units * 2);
    parallel_for(ceil_div(channels, group) * units, GRAIN * units / max(samples(layout) * group, 1), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        int64_t c0 = k / units * group, c1 = min(c0 + group, channels), unit = k % units;
        for (int64_t chunk = unit * chunks / units; chunk < (unit + 1) * chunks / units; ++chunk)
          reduce(c0, c1, chunk, [&](int64_t c, double s1, double s2) {
            sums[(c * units + unit) * 2] += s1;
            sums[(c * units + unit) * 2 + 1] += s2;
          });
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

// Where a mask is read or written its rows must be walked as they lie: planes, or pixels.
INLINE bool by_columns(Layout layout, bool masked) { return masked ? layout.inner == 1 : layout.inner < MIN_PLANE; }

// Whether to store past the cache: a line of a large output is then not fetched first, and does not push out what will be read.
// Rows of whole lines only: a line that is written in two ways costs far more than is gained.
template <typename scalar_t> INLINE bool streams(const scalar_t* p, Layout layout, bool masked) {
  int64_t size = sizeof(scalar_t), row = by_columns(layout, masked) ? layout.C * layout.inner : layout.inner;
  return numel(layout) * size >= STREAM_BYTES && row * size % 64 == 0 && reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

// ---- Columns ----------------------------------------------------------------------------------------------------------------

// Memory as rows of `width` columns that hold every channel `inner` times: each row is a sample, or a few where a sample is short.
struct Columns {
  Layout layout;
  int64_t width, rows;
  int64_t rest;      // columns of a last, shorter row
  int64_t together;  // rows whose coefficients are worth loading once: where they fill L1, and all rows begin at a pack

  // A mask has its rows one by one, so these are not folded.
  Columns(Layout l, bool masked, int64_t min_width) : layout(l) {
    int64_t sample = l.C * l.inner;
    int64_t fold = masked ? 1 : max(min(ceil_div(min_width, sample), l.outer), 1);
    width = fold * sample;
    rows = l.outer / fold;
    rest = l.outer % fold * sample;
    together = width >= 1024 && width % PACK == 0 ? 4 : 1;
  }

  // Adds up two sums per channel. reduce(row, rows, j, n, sums) writes those of columns [j, j + n), n <= STRIP, float64:
  // sums[0 .. n) and sums[width .. width + n).
  template <typename F> void for_sums(double* total, F reduce) const {
    int64_t strip = (ceil_div(width, ceil_div(width, STRIP)) + PACK - 1) / PACK * PACK, strips = ceil_div(width, strip);
    int64_t blocks = max(min(max(rows / CHUNK_ROWS, MIN_UNITS / strips), min(rows / MIN_ROWS, MAX_BLOCKS)), 1);
    Buffer<double> sums((blocks + 1) * 2 * width);
    parallel_for(blocks * strips, GRAIN * blocks * strips / max(rows * width, 1), [&](int64_t begin, int64_t end) {
      for (int64_t id = begin; id < end; ++id) {
        int64_t block = id / strips, j = id % strips * strip, row = block * rows / blocks, next = (block + 1) * rows / blocks;
        reduce(row, next - row, j, min(strip, width - j), sums + block * 2 * width + j);
      }
    });
    for (int64_t j = 0; j < rest; j += strip) reduce(rows, 1, j, min(strip, rest - j), sums + blocks * 2 * width + j);
    int64_t channels = layout.C;
    for (int64_t c = 0; c < 2 * channels; ++c) total[c] = 0;
    int64_t period = channels * layout.inner;
    for (int64_t row = 0; row < 2 * (blocks + 1); ++row)
      for (int64_t j = 0; j < width; j += period) fold(sums + row * width + j, total + row % 2 * channels);
  }

  // total [C] += sums [C * inner]
  INLINE void fold(const double* sums, double* total) const {
    if (layout.inner == 1) return add(layout.C, sums, total);
    for (int64_t c = 0; c < layout.C; ++c)
      for (int64_t i = 0; i < layout.inner; ++i) total[c] += sums[c * layout.inner + i];
  }

  // body(first element, length, row, count) for `count` rows at a time, in parallel; backwards, but by runs that a prefetcher follows.
  template <typename F> void for_rows(F body) const {
    int64_t run = ceil_div(CHUNK, width);
    parallel_for(ceil_div(rows, run), GRAIN / (run * width), [&](int64_t begin, int64_t end) {
      for (int64_t k = end - 1; k >= begin; --k)
        for (int64_t row = k * run, next = min(row + run, rows); row < next; row += together)
          body(row * width, width, row, min(together, next - row));
      finish_streams();
    });
    if (rest) body(rows * width, rest, rows, 1);
    finish_streams();
  }
};

// Sums in several chains, which hide the latency of an addition.
template <typename T> struct ChainSums {
  Pack<T> s[CHAINS<T>];
  INLINE ChainSums() {
    for (int k = 0; k < CHAINS<T>; ++k) s[k] = Pack<T>(0);
  }
  INLINE Pack<T> total() const {
    Pack<T> sum = s[0];
    for (int k = 1; k < CHAINS<T>; ++k) sum += s[k];
    return sum;
  }
};

// Adds rows of n columns into s1, s2 [n]: add(row, i, lanes, params(i, lanes), s1, s2) on packs. SHARED rows at a time share the
// loads of sums and params, and are as many streams of memory.
template <int SHARED, typename acc_t, typename Params, typename Add>
INLINE void add_rows(int64_t row, int64_t rows, int64_t n, acc_t* s1, acc_t* s2, Params params, Add add) {
  for (int64_t end = row + rows; row < end; row += SHARED)
    for_packs(n, 0, [&](int64_t i, auto lanes, int) INLINED {
      Pack<acc_t> a1(0), a2(0);
      auto p = params(i, lanes);
      if (row + SHARED <= end) {
#pragma GCC unroll 8
        for (int k = 0; k < SHARED; ++k) add(row + k, i, lanes, p, a1, a2);
      } else {
#pragma GCC unroll 1
        for (int64_t r = row; r < end; ++r) add(r, i, lanes, p, a1, a2);
      }
      store(s1 + i, load(s1 + i, lanes) + a1, lanes);
      store(s2 + i, load(s2 + i, lanes) + a2, lanes);
    });
}

}  // namespace syncbn::cpu::SYNCBN_ISA
