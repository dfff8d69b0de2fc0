// How the ops walk [outer, C, inner]: sums by planes where inner is long, by columns where channels lie side by side; maps as memory
// lies.
//
// All divisions of a sum depend on the shape alone, never on the number of threads: so the bits do not either.
#pragma once

#include <new>

#include "simd.h"

namespace syncbn::cpu::SYNCBN_ISA {

// Packs that are added up independently of each other: 4 registers for each sum hide the latency of an fma.
template <typename T> constexpr int CHAINS = Pack<T>::REGISTERS < 4 ? 4 / Pack<T>::REGISTERS : 1;

// Places of memory that a sum reads abreast: a core keeps more lines under way from several pages than from one.
constexpr int ABREAST = 4;

constexpr int64_t BLOCK = 64 * PACK;                 // planes: values that one chain adds up in acc_t, 64 in each lane
constexpr int64_t CHUNK = 1024 * PACK;               // planes: values that share a shift, of at most ...
constexpr int64_t MAX_PLANES = 64;                   // ... so many planes
constexpr int64_t UNIT = 65536 / ABREAST;            // planes: values that one partial sum covers
constexpr int64_t STREAM_BYTES = 2 << 20;            // maps: outputs from this size on go past the cache; see benchmarks/NOTES.md
constexpr int64_t MAP_WIDTH = 128;                   // maps: coefficients of few channels are repeated to at least this
constexpr int64_t WIDE_BYTES = 8192;                 // maps: a coefficient of a row of this size is loaded for ...
constexpr int64_t WIDE_ROWS = 4;                     // ... so many rows at a time
constexpr int64_t STEP = 4096;                       // maps: values that threads share out
constexpr int64_t RUN = 64 * STEP;                   // maps: values that are taken forwards
constexpr int64_t GRAIN = 32768;                     // values below which a thread is not worth waking; torch's own number
constexpr int64_t MAX_GROUP = 32;                    // planes: channels summed together, that runs of short planes be long; their sums stay in L1
constexpr int64_t MIN_MAP_PLANE = PACK;              // maps: shorter planes are walked as columns
constexpr int64_t MIN_SUM_PLANE = 100;               // sums: shorter planes are walked as columns, if there are ...
constexpr int64_t MIN_SUM_ROWS = 8;                  // ... so many: the columns of a plane are added up in the end
constexpr int64_t SUM_WIDTH = 512;                   // columns: rows of few channels are folded to at least this
constexpr int64_t STRIP = 2048;                      // columns: of a strip; more than L1 holds beside the coefficients, but rows are read in longer runs
constexpr int64_t CHUNK_ROWS = 512;                  // columns: rows that share a shift and are summed in acc_t
constexpr int64_t MIN_ROWS = 128;                    // columns: rows that one partial sum covers at least
constexpr int64_t MIN_UNITS = 16;                    // columns: parts of the work for threads to share out, where rows suffice
constexpr int64_t MAX_BLOCKS = 64;                   // columns: partial sums per column

static_assert(STRIP / MIN_SUM_PLANE >= PACK, "a strip has a pack of channels");
static_assert(STEP % 64 == 0, "threads share neither a line of memory nor a byte of the mask");

template <int N> struct Number {
  static constexpr int value = N;
};

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t samples(Layout layout) { return layout.outer * layout.inner; }
INLINE int64_t numel(Layout layout) { return layout.outer * layout.C * layout.inner; }

template <typename T> INLINE void fill(T* to, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}

// Aligned to a cache line: a vector that crosses two is not forwarded from its store to its next load.
constexpr std::align_val_t LINE{64};
template <typename T> class Buffer {
  T* data_;

 public:
  explicit Buffer(int64_t size) : data_(new (LINE) T[size]) {}
  Buffer(int64_t size, T value) : Buffer(size) { fill(data_, size, value); }
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

// f(begin, end) for runs that cover [0, n), in parallel; backwards, but by runs that are long enough for a prefetcher to follow. Runs
// begin at whole lines of memory.
template <typename F> void for_runs(int64_t n, F f) {
  parallel_for(ceil_div(n, STEP), GRAIN / STEP, [&](int64_t first, int64_t last) {
    for (int64_t end = last, begin; end > first; end = begin) {
      begin = max(end - RUN / STEP, first);
      f(begin * STEP, min(end * STEP, n));
    }
    finish_streams();
  });
}

// Whether to store past the cache: a line of a large output is then not fetched first, and does not push out what will be read.
template <typename scalar_t> INLINE bool streams(const scalar_t* p, int64_t n) {
  return n * int64_t(sizeof(scalar_t)) >= STREAM_BYTES && reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

// values [C] -> [width] in place: each of them `inner` times, and all of that again and again.
template <typename T> void unfold(int64_t C, int64_t inner, int64_t width, T* values) {
  if (inner > 1)
    for (int64_t c = C - 1; c >= 0; --c) fill(values + c * inner, inner, T(values[c]));  // backwards: what is overwritten has been read
  for (int64_t i = C * inner; i < width; ++i) values[i] = values[i - C * inner];
}

// f(i, lanes, k) for packs that cover [0, n), with k < TURNS taking turns. The last may overlap the one before it.
template <int TURNS = 1, typename F> INLINE void for_packs(int64_t n, F f) {
  if (n < PACK) return f(0, Partial{int(n)}, 0);
  int64_t i = 0;
  for (; i + TURNS * PACK <= n; i += TURNS * PACK) {
#pragma GCC unroll 8
    for (int k = 0; k < TURNS; ++k) f(i + k * PACK, Whole{}, k);
  }
  if (TURNS > 1)
    for (; i + PACK <= n; i += PACK) f(i, Whole{}, 0);
  if (i < n) f(n - PACK, Overlap{int(i + PACK - n)}, TURNS - 1);
}

// ---- Planes -----------------------------------------------------------------------------------------------------------------

// Planes, or the parts of long ones. Sums take the samples of a channel as chunks of about CHUNK values; where planes are short, some
// channels together, so that memory is read in runs and not in snippets. ABREAST channels go abreast, a quarter of all from each other;
// those that are left over, one by one.
struct Planes {
  Layout layout;
  int64_t parts;   // of a plane
  int64_t length;  // of a part
  int64_t planes;  // in a chunk
  int64_t chunks, units;  // of a channel
  int64_t apart;   // channels from one of those abreast to the next

  explicit Planes(Layout l) : layout(l) {
    length = (ceil_div(l.inner, ceil_div(l.inner, CHUNK)) + 63) / 64 * 64;
    parts = ceil_div(l.inner, length);
    planes = max(min(CHUNK / l.inner, MAX_PLANES), 1);
    chunks = parts > 1 ? l.outer * parts : ceil_div(l.outer, planes);
    units = ceil_div(samples(l), UNIT);
    apart = l.C / ABREAST;
  }

  // f(c, first element, length, plane) for the pieces of memory in a chunk of the channels [c0, c1), or in each `step`th of its planes.
  template <typename F> INLINE void for_pieces(int64_t c0, int64_t c1, int64_t chunk, F f, int64_t step = 1) const {
    int64_t o = chunk * planes, end = min(o + planes, layout.outer), begin = 0, n = layout.inner;
    if (parts > 1) o = chunk / parts, end = o + 1, begin = chunk % parts * length, n = min(length, n - begin);
    for (; o < end; o += step)
      for (int64_t c = c0; c < c1; ++c) f(c, (o * layout.C + c) * layout.inner + begin, n, o * layout.C + c);
  }

  // Adds up two sums per channel, float64: reduce(abreast, c0, c1, chunk, add) calls add(c, s1, s2) for each channel of [c0, c1), at
  // most MAX_GROUP, and for those that are k * apart from it, k < abreast.
  template <typename F> void for_sums(double* total, F reduce) const {
    int64_t channels = layout.C, turns = apart + channels % ABREAST;  // ABREAST channels each, then one each
    Buffer<double> sums(channels * units * 2, 0);
    parallel_for(units * turns, GRAIN * units * turns / max(numel(layout), 1), [&](int64_t begin, int64_t end) {
      for (int64_t next; begin < end; begin = next) {
        int64_t unit = begin / turns, first = begin % turns, last = min(first + end - begin, turns);
        next = begin + last - first;
        auto add = [&](int64_t c, double s1, double s2) {
          sums[(c * units + unit) * 2] += s1;
          sums[(c * units + unit) * 2 + 1] += s2;
        };
        auto reduce_groups = [&](auto abreast, int64_t c0, int64_t c1, int64_t chunk) {
          for (; c0 < c1; c0 += MAX_GROUP) reduce(abreast, c0, min(c0 + MAX_GROUP, c1), chunk, add);
        };
        // All channels of a chunk before the next chunk: whole planes, as memory lies.
        for (int64_t chunk = unit * chunks / units; chunk < (unit + 1) * chunks / units; ++chunk) {
          reduce_groups(Number<ABREAST>{}, first, min(last, apart), chunk);
          int64_t before = (ABREAST - 1) * apart;  // turn k, of one channel, has channel before + k
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

// ---- Columns ----------------------------------------------------------------------------------------------------------------

// Bits of a mask are read from a whole byte on, where packs lie in two of its rows: each sample must begin with one.
INLINE bool whole_bytes(Layout layout) { return layout.C * layout.inner % 8 == 0; }

INLINE bool by_columns(Layout layout, bool masked) {
  if (layout.inner == 1) return true;
  bool pays = layout.inner < MIN_MAP_PLANE || (layout.inner < MIN_SUM_PLANE && layout.outer >= MIN_SUM_ROWS);
  bool narrow = layout.C * layout.inner < int64_t{1} << 32;  // for places in the mask in 32 bits
  return pays && (!masked || (whole_bytes(layout) && narrow));
}

// f(k, the sum of s1, the sum of s2 over the `inner` columns of slot k) for the slots [0, n), float64.
template <typename T, typename F> INLINE void for_slots(int64_t n, int64_t inner, const T* s1, const T* s2, F f) {
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

// Memory as rows of columns: each row is a sample, or a few where a sample is short. A slot of a row is one channel of one sample,
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

  // Adds up two sums per channel. reduce(row, rows, slot, n, sums) adds those of the slots [slot, slot + n), at most STRIP columns, to
  // sums[0 .. n) and sums[slots .. slots + n), float64.
  template <typename F> void for_sums(double* total, F reduce) const {
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

template <int N, typename T> INLINE Pack<T> sum_of(const Pack<T>* chains) {
  Pack<T> total = chains[0];
#pragma GCC unroll 4
  for (int k = 1; k < N; ++k) total += chains[k];
  return total;
}

// Adds S runs of n values to s1 and s2 [S]: add(i, lanes, run, a1, a2) on packs. One run alone is added in several chains where it is
// long, which hide the latency of an addition; else the next channel's additions do. A long run is added up as a tree, for accuracy:
// 64 packs, four of those, and all of these.
template <int S, typename acc_t, typename Add> INLINE void add_runs(int64_t n, Pack<acc_t>* s1, Pack<acc_t>* s2, Add add) {
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

// Adds rows of n columns into s1, s2 [n]: add(element, row, lanes, params(i, lanes), a1, a2) on packs, where `width` elements lie between
// rows. S parts of the rows go abreast, and share the loads of sums and params.
template <int S, typename acc_t, typename Params, typename Add>
INLINE void add_rows(int64_t first, int64_t width, int64_t row, int64_t rows, int64_t n, acc_t* s1, acc_t* s2, Params params, Add add) {
  auto add_abreast = [=](auto abreast, int64_t first, int64_t row, int64_t apart) INLINED {
    for_packs(n, [=](int64_t i, auto lanes, int) INLINED {
      Pack<acc_t> a1(0), a2(0);
      auto p = params(i, lanes);
#pragma GCC unroll 8
      for (int64_t k = 0; k < abreast.value; ++k) add(first + k * apart * width + i, row + k * apart, lanes, p, a1, a2);
      store(s1 + i, load(s1 + i, lanes) + a1, lanes);
      store(s2 + i, load(s2 + i, lanes) + a2, lanes);
    });
  };
  int64_t part = rows / S, r = 0;
  for (; r < part; ++r) add_abreast(Number<S>{}, first + r * width, row + r, part);
  for (r *= S; r < rows; ++r) add_abreast(Number<1>{}, first + r * width, row + r, 0);
}

}  // namespace syncbn::cpu::SYNCBN_ISA
