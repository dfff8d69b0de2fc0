// How the ops walk [outer, C, inner]: reductions add up columns, row by row, if by_columns() says so, and otherwise go plane by plane;
// elementwise ops go by runs of consecutive memory.
//
// How a sum is divided does not depend on the number of threads, so results do not either.
#pragma once

#include <new>

#include "memory.h"

namespace syncbn::cpu::SYNCBN_ISA {

// Independent accumulators: 4 registers for each sum hide the latency of an fma.
template <typename T>
constexpr int CHAINS = Pack<T>::REGISTERS < 4 ? 4 / Pack<T>::REGISTERS : 1;

// Concurrent streams in which a reduction reads a tensor: a core sustains more outstanding cache misses across pages than within one.
constexpr int STREAMS = 4;

constexpr int64_t BLOCK = 64 * PACK;       // planes: values per accumulator, 64 per lane
constexpr int64_t CHUNK = 1024 * PACK;     // planes: values of a chunk at most, which have one K (stats.cpp)
constexpr int64_t MAX_PLANES = 64;         // planes: planes of a chunk at most
constexpr int64_t UNIT = 65536 / STREAMS;  // planes: values that one partial sum covers, about
constexpr int64_t STREAM_BYTES = 2 << 20;  // elementwise: outputs at least this large use non-temporal stores; see benchmarks/NOTES.md
constexpr int64_t MAP_WIDTH = 128;         // elementwise: coefficients of few channels are repeated to at least this
constexpr int64_t WIDE_BYTES = 8192;  // elementwise: rows with this many bytes of each coefficient, or more, are mapped WIDE_ROWS at a time
constexpr int64_t WIDE_ROWS = 4;      // elementwise: rows that share one load of their coefficients
constexpr int64_t STEP = 4096;        // elementwise: smallest unit of work per thread
constexpr int64_t RUN = 64 * STEP;    // elementwise: values per forward run at most
constexpr int64_t GRAIN = 32768;      // minimum number of values per thread; torch's own choice
constexpr int64_t MAX_GROUP = 32;     // planes: channels reduced together so that reads of short planes are long; their sums fit in L1
constexpr int64_t MIN_MAP_PLANE = PACK;  // shorter planes are walked as columns, also by sums unless the mask forbids it
constexpr int64_t MIN_SUM_PLANE = 100;   // sums: shorter planes are reduced as columns if there are at least MIN_SUM_ROWS samples
constexpr int64_t MIN_SUM_ROWS = 8;      // columns: fewer samples do not pay, because a plane's columns are added up at the end
constexpr int64_t SUM_WIDTH = 512;       // columns: short samples are joined to rows of at least this, if there are enough
constexpr int64_t STRIP = 2048;  // columns: columns of a strip at most; its sums and coefficients exceed L1, but reads of a row are longer
constexpr int64_t CHUNK_ROWS = 512;  // columns: rows of a chunk at most
constexpr int64_t MIN_ROWS = 128;    // columns: rows that one partial sum covers at least, if there are as many
constexpr int64_t MIN_UNITS = 16;    // columns: work units at least, about, if there are enough rows
constexpr int64_t MAX_BLOCKS = 64;   // columns: blocks of rows at most

static_assert(STRIP / MIN_SUM_PLANE >= PACK, "a strip has a pack of channels");
static_assert(STEP % 64 == 0, "threads share neither a line of memory nor a byte of the mask");

template <int N>
struct Number {
  static constexpr int value = N;
};

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t samples(Layout layout) { return layout.outer * layout.inner; }
INLINE int64_t numel(Layout layout) { return layout.outer * layout.C * layout.inner; }

template <typename T>
INLINE void fill(T* to, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}

// Aligned to a cache line: store-to-load forwarding fails for vectors that cross a cache line.
constexpr std::align_val_t LINE{64};
constexpr int64_t SMALL_BUFFER = 8192;  // bytes on the stack: allocating so few takes as long as filling them
template <typename T>
class Buffer {
  alignas(64) T small_[SMALL_BUFFER / sizeof(T)];
  T* data_;

 public:
  explicit Buffer(int64_t size) : data_(size <= SMALL_BUFFER / int64_t(sizeof(T)) ? small_ : new (LINE) T[size]) {}
  Buffer(int64_t size, T value) : Buffer(size) { fill(data_, size, value); }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    if (data_ != small_) ::operator delete[](data_, LINE);
  }
  operator T*() { return data_; }
  operator const T*() const { return data_; }
};

// to [n] += from [n], which do not overlap.
template <typename T>
INLINE void add(int64_t n, const T* from, double* to) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) to[i] += double(from[i]);
}

template <typename F>
void parallel_for(int64_t n, int64_t grain, F f) {
  cpu::parallel_for(n, max(grain, 1), [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); }, &f);
}

// f(begin, end) for runs that cover [0, n), in parallel: a thread takes its runs from the end towards the start, and a run goes forward,
// long enough for the prefetcher. In an aligned tensor runs begin at whole lines of memory.
template <typename F>
void for_runs(int64_t n, F f) {
  parallel_for(ceil_div(n, STEP), GRAIN / STEP, [&](int64_t first, int64_t last) {
    for (int64_t end = last, begin; end > first; end = begin) {
      begin = max(end - RUN / STEP, first);
      f(begin * STEP, min(end * STEP, n));
    }
    finish_streams();
  });
}

// Whether to use non-temporal stores: large outputs then cause no read-for-ownership and do not evict inputs.
template <typename scalar_t>
INLINE bool non_temporal(const scalar_t* p, int64_t n) {
  return n * int64_t(sizeof(scalar_t)) >= STREAM_BYTES && reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

// values [C] -> [width] in place: each value repeated `inner` times, then the whole sequence repeated.
template <typename T>
void unfold(int64_t C, int64_t inner, int64_t width, T* values) {
  // From the end, so that values are read before they are overwritten. A pack that ends where a short channel ends may also cover
  // channels before it, which are written next; it is stored only if it covers no value that is yet to be read.
  for (int64_t c = C - 1; inner > 1 && c >= 0; --c) {
    const int64_t end = (c + 1) * inner;
    const T value = values[c];
    if (inner <= PACK && end - PACK >= c) store(values + end - PACK, Pack<T>(value));
    else fill(values + c * inner, inner, value);
  }
  for (int64_t i = C * inner; i < width; ++i) values[i] = values[i - C * inner];
}

// f(i, lanes, k) for packs that cover [0, n), with k cycling through [0, TURNS) while TURNS packs are left. The last pack may overlap its
// predecessor.
template <int TURNS = 1, typename F>
INLINE void for_packs(int64_t n, F f) {
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

}  // namespace syncbn::cpu::SYNCBN_ISA
