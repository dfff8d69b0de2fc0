#include "shared_memory.h"

#if defined(SYNCBN_HAS_SHARED_MEMORY)

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstring>

namespace syncbn::shared_memory {
namespace {

constexpr int64_t kSlice = 50'000'000;  // ns, after which a call returns to Python: for Ctrl-C, the timeout, and a look at the others
constexpr int64_t kSpin = 50'000;       // ns: two context switches cost a tenth of it, so little is lost if the wait turns out long
constexpr int kStatsTail = 2;           // weight and samples

enum Stage : uint32_t { idle = 0, published, summed };

struct alignas(64) Control {
  // Written by its rank, read by all.
  std::atomic<uint64_t> epoch;
  std::atomic<uint32_t> abandoned;
  std::atomic<uint32_t> sleepers;  // ranks that sleep until the epoch changes
  // Of its rank alone: where it is in the exchange. On a line of its own, for the others read the first one all the time.
  alignas(64) uint64_t exchanges;
  int64_t first;  // of the values in the piece
  Stage stage;
  int32_t pid;
  int64_t spin;
  // Written when it joins.
  uint64_t random;
  cpu_set_t cores;
};

struct alignas(64) Slot {
  // One line, which every rank reads before it adds anything.
  uint64_t count;
  uint64_t channels;
  uint64_t exchange;
  uint64_t digest;
  char words[kSignatureBytes];
  alignas(64) double values[kSlotNumbers];
};

struct alignas(64) Header {
  int32_t ranks;
  int32_t by_segments;
};

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

// The parts of the memory: header, a control block for each rank, two slots for each rank, the result area.
struct Memory {
  char* base;

  explicit Memory(const void* memory) : base(static_cast<char*>(const_cast<void*>(memory))) {}
  Header& header() const { return *reinterpret_cast<Header*>(base); }
  int ranks() const { return header().ranks; }
  Control& control(int rank) const { return reinterpret_cast<Control*>(base + sizeof(Header))[rank]; }
  Slot* slots() const { return reinterpret_cast<Slot*>(base + slots_offset(ranks())); }
  Slot& slot(int rank, uint64_t epoch) const { return slots()[2 * rank + epoch % 2]; }
  double* result() const { return reinterpret_cast<double*>(slots() + 2 * ranks()); }
};

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t{1'000'000'000} + t.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The low half of the epoch is what the kernel compares.
uint32_t* futex_word(std::atomic<uint64_t>& epoch) { return reinterpret_cast<uint32_t*>(&epoch); }

void wake(Control& control) {
  if (control.sleepers.load(std::memory_order_seq_cst)) {
    syscall(SYS_futex, futex_word(control.epoch), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

// Sequentially consistent, as is the sleeper's increment: either the sleeper sees the new epoch, or this rank sees the sleeper.
void publish(Control& control) {
  control.epoch.store(control.epoch.load(std::memory_order_relaxed) + 1, std::memory_order_seq_cst);
  wake(control);
}

bool has_published(const Control& control, uint64_t epoch) { return control.epoch.load(std::memory_order_acquire) >= epoch; }

// Returns true after the epoch has changed or may have changed, false if the slice is over or a signal has come.
bool sleep_until_published(Control& other, uint64_t epoch, int64_t deadline) {
  const int64_t left = deadline - now();
  if (left <= 0) return false;
  const timespec timeout{left / 1'000'000'000, left % 1'000'000'000};
  other.sleepers.fetch_add(1, std::memory_order_seq_cst);
  const uint64_t seen = other.epoch.load(std::memory_order_seq_cst);
  int error = 0;
  if (seen < epoch && !other.abandoned.load(std::memory_order_seq_cst) &&
      syscall(SYS_futex, futex_word(other.epoch), FUTEX_WAIT, static_cast<uint32_t>(seen), &timeout, nullptr, 0)) {
    error = errno;
  }
  other.sleepers.fetch_sub(1, std::memory_order_relaxed);
  return error != EINTR && error != ETIMEDOUT;
}

// `done` once every rank has published what this one has.
Status wait(const Memory& memory, int rank) {
  Control& self = memory.control(rank);
  const uint64_t epoch = self.epoch.load(std::memory_order_relaxed);
  int64_t began = 0;
  for (int other = 0; other < memory.ranks(); ++other) {
    Control& control = memory.control(other);
    while (!has_published(control, epoch)) {
      if (control.abandoned.load(std::memory_order_acquire)) return abandoned;
      if (!began) began = now();
      if (now() - began < self.spin) {
        for (int i = 0; i < 32 && !has_published(control, epoch); ++i) relax();
      } else if (!sleep_until_published(control, epoch, began + kSlice)) {
        return waiting;
      }
    }
  }
  for (int other = 0; other < memory.ranks(); ++other) {
    if (memory.control(other).abandoned.load(std::memory_order_relaxed)) return abandoned;
  }
  return done;
}

bool all_agree(const Memory& memory, int rank, uint64_t epoch) {
  const Slot& self = memory.slot(rank, epoch);
  for (int other = 0; other < memory.ranks(); ++other) {
    const Slot& slot = memory.slot(other, epoch);
    if (slot.count != self.count || slot.channels != self.channels) return false;
    if (slot.exchange != self.exchange || slot.digest != self.digest) return false;
  }
  return true;
}

// A piece of an exchange: `size` values, or the channels [first, first + size) of statistics. Those lie in a slot as
// [weight, samples, shift(size), sum(size), sumsq(size)].
struct Piece {
  int64_t channels, total, first, size;

  Piece(int64_t count, int64_t channels, int64_t first)
      : channels(channels),
        total(channels ? channels : count),
        first(first),
        size(std::min<int64_t>(total - first, channels ? (kSlotNumbers - kStatsTail) / 3 : kSlotNumbers)) {}

  bool is_last() const { return first + size == total; }
  int64_t numbers() const { return channels ? 3 * size + kStatsTail : size; }

  void write(const double* values, double* slot) const {
    if (!channels) {
      memcpy(slot, values + first, size * sizeof(double));
      return;
    }
    memcpy(slot, values + 3 * channels, kStatsTail * sizeof(double));
    for (int part = 0; part < 3; ++part) {
      memcpy(slot + kStatsTail + part * size, values + part * channels + first, size * sizeof(double));
    }
  }
  void read(const double* slot, double* values) const {
    if (!channels) {
      memcpy(values + first, slot, size * sizeof(double));
      return;
    }
    if (is_last()) memcpy(values + 3 * channels, slot, kStatsTail * sizeof(double));  // before, every piece sends this rank's
    for (int part = 0; part < 3; ++part) {
      memcpy(values + part * channels + first, slot + kStatsTail + part * size, size * sizeof(double));
    }
  }
};

// Adds [begin, end) of what all ranks have published, in rank order, into `out`, which is laid out as a slot.
void add(const Memory& memory, uint64_t epoch, int64_t begin, int64_t end, double* __restrict out) {
  memcpy(out + begin, memory.slot(0, epoch).values + begin, (end - begin) * sizeof(double));
  for (int rank = 1; rank < memory.ranks(); ++rank) {
    const double* __restrict in = memory.slot(rank, epoch).values;
    for (int64_t i = begin; i < end; ++i) out[i] += in[i];
  }
}

// The same for statistics: the sums of each rank are moved from its shift to that of the first rank with samples.
void merge(const Memory& memory, uint64_t epoch, int64_t size, int64_t begin, int64_t end, double* __restrict out) {
  int first = 0;
  while (first + 1 < memory.ranks() && !(memory.slot(first, epoch).values[1] > 0)) ++first;
  if (!(memory.slot(first, epoch).values[1] > 0)) first = 0;  // no rank has samples
  double* __restrict shift = out + kStatsTail;
  double* __restrict sum = shift + size;
  double* __restrict sumsq = sum + size;
  memcpy(shift + begin, memory.slot(first, epoch).values + kStatsTail + begin, (end - begin) * sizeof(double));
  std::fill(sum + begin, sum + end, 0.0);
  std::fill(sumsq + begin, sumsq + end, 0.0);
  for (int rank = 0; rank < memory.ranks(); ++rank) {
    const double* __restrict in = memory.slot(rank, epoch).values;
    const double weight = in[0];
    const double *in_shift = in + kStatsTail, *in_sum = in_shift + size, *in_sumsq = in_sum + size;
    for (int64_t c = begin; c < end; ++c) {
      const double d = in_shift[c] - shift[c];
      sum[c] += in_sum[c] + weight * d;
      sumsq[c] += in_sumsq[c] + d * (2 * in_sum[c] + weight * d);
    }
  }
}

// Segment `part` of `parts`, of which each is written by one rank.
void combine(const Memory& memory, uint64_t epoch, const Piece& piece, int part, int parts, double* out) {
  const int64_t begin = piece.size * part / parts, end = piece.size * (part + 1) / parts;
  if (!piece.channels) return add(memory, epoch, begin, end, out);
  if (part == 0) add(memory, epoch, 0, kStatsTail, out);
  merge(memory, epoch, piece.size, begin, end, out);
}

}  // namespace

size_t slots_offset(int ranks) { return sizeof(Header) + ranks * sizeof(Control); }

size_t bytes(int ranks) { return slots_offset(ranks) + 2 * ranks * sizeof(Slot) + kSlotNumbers * sizeof(double); }

void create(void* memory, int ranks, bool by_segments) {
  Memory m(memory);
  m.header().ranks = ranks;
  m.header().by_segments = by_segments;
}

void join(void* memory, int rank, uint64_t random) {
  Control& self = Memory(memory).control(rank);
  self.pid = getpid();
  self.random = random;
  CPU_ZERO(&self.cores);
  sched_getaffinity(0, sizeof(self.cores), &self.cores);
}

uint64_t random_of(const void* memory, int rank) { return Memory(memory).control(rank).random; }

// Spins only if every rank can have a core: else a spinning rank keeps the core from the rank that it waits for.
void start(void* memory, int rank) {
  Memory m(memory);
  cpu_set_t cores;
  CPU_ZERO(&cores);
  for (int other = 0; other < m.ranks(); ++other) CPU_OR(&cores, &cores, &m.control(other).cores);
  m.control(rank).spin = CPU_COUNT(&cores) >= m.ranks() ? kSpin : 0;
}

Status all_reduce(void* memory, int rank, double* values, int64_t count, int64_t channels, const Signature& signature) {
  const Memory m(memory);
  Control& self = m.control(rank);
  if (self.pid != getpid()) return forked;
  if (self.abandoned.load(std::memory_order_relaxed)) return abandoned;
  const auto finish = [&](Status status) {
    self.stage = idle;
    self.first = 0;
    ++self.exchanges;
    return status;
  };
  for (;;) {
    const Piece piece(count, channels, self.first);
    const uint64_t epoch = self.epoch.load(std::memory_order_relaxed);
    if (self.stage == idle) {
      Slot& slot = m.slot(rank, epoch + 1);
      slot.count = count;
      slot.channels = channels;
      slot.exchange = self.exchanges + 1;
      slot.digest = signature.digest;
      memcpy(slot.words, signature.words, kSignatureBytes);
      piece.write(values, slot.values);
      self.stage = published;
      publish(self);
      continue;
    }
    const Status status = wait(m, rank);
    if (status != done) return status;
    if (self.stage == summed) {
      piece.read(m.result(), values);
    } else if (!all_agree(m, rank, epoch)) {
      return finish(mismatch);
    } else if (m.header().by_segments) {
      combine(m, epoch, piece, rank, m.ranks(), m.result());
      self.stage = summed;
      publish(self);
      continue;
    } else {
      double out[kSlotNumbers];
      combine(m, epoch, piece, 0, 1, out);
      piece.read(out, values);
    }
    if (piece.is_last()) return finish(done);
    self.first += piece.size;
    self.stage = idle;
  }
}

void abandon(void* memory, int rank) {
  Control& self = Memory(memory).control(rank);
  if (self.pid != getpid()) return;
  self.abandoned.store(1, std::memory_order_seq_cst);
  wake(self);
}

Presence presence(const void* memory, int rank, int other, int fd) {
  const Memory m(memory);
  const Control& control = m.control(other);
  if (control.abandoned.load(std::memory_order_acquire)) return gave_up;
  if (has_published(control, m.control(rank).epoch.load(std::memory_order_relaxed))) return arrived;
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = other;
  lock.l_len = 1;
  if (fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK) {
    // It may have published, then ended, since the look at its epoch.
    return has_published(control, m.control(rank).epoch.load(std::memory_order_relaxed)) ? arrived : ended;
  }
  return late;
}

const char* words(const void* memory, int rank, int other) {
  const Memory m(memory);
  return m.slot(other, m.control(rank).epoch.load(std::memory_order_relaxed)).words;
}

uint64_t exchange_number(const void* memory, int rank) { return Memory(memory).control(rank).exchanges; }

}  // namespace syncbn::shared_memory

#endif  // SYNCBN_HAS_SHARED_MEMORY
