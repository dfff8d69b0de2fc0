#include "shared_memory.h"

#if defined(SYNCBN_HAS_SHARED_MEMORY)

#include "shared_memory_sums.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstring>
#include <mutex>

namespace syncbn::shared_memory {
namespace {

constexpr int64_t kSlice = 50'000'000;  // ns, after which a call returns to Python: for Ctrl-C, the timeout, and a look at the others
constexpr int64_t kAwake = 50'000;      // ns that a rank spins before it sleeps; to sleep and wake up costs a tenth of that
constexpr int64_t kSettle = 1'000'000;  // ns, at least, between two moves to another core, which take tens of microseconds

// How many forks are between the process that first joined and this one. A process id would cost a system call at every exchange.
int32_t forks = 0;

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

// The operating system's futex call compares the low half of the epoch (little-endian).
uint32_t* futex_word(std::atomic<uint64_t>& epoch) { return reinterpret_cast<uint32_t*>(&epoch); }

void wake(Control& control) {
  if (control.sleepers.load(std::memory_order_seq_cst)) {
    syscall(SYS_futex, futex_word(control.epoch), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

// Sequentially consistent, as is the sleeper's increment: either the sleeper sees the new epoch, or this rank sees the sleeper.
void publish(Control& control) {
  control.core.store(sched_getcpu(), std::memory_order_relaxed);
  control.epoch.store(control.epoch.load(std::memory_order_relaxed) + 1, std::memory_order_seq_cst);
  wake(control);
}

bool has_published(const Control& control, uint64_t epoch) { return control.epoch.load(std::memory_order_acquire) >= epoch; }

// Moves this thread to a core on which no rank was last seen. The set of cores that it may use stays as it is.
void leave_core(const Memory& memory) {
  cpu_set_t all;
  if (sched_getaffinity(0, sizeof(all), &all)) return;
  cpu_set_t free = all;
  CPU_CLR(sched_getcpu(), &free);
  for (int rank = 0; rank < memory.ranks(); ++rank) CPU_CLR(memory.control(rank).core.load(std::memory_order_relaxed), &free);
  if (!CPU_COUNT(&free) || sched_setaffinity(0, sizeof(free), &free)) return;
  // A thread whose mask has every bit set gets the cores that its cpuset gains later; one whose mask lists cores does not. So this one sets
  // every bit. If that gives it more cores than before, someone has pinned it, and it gets its old mask back.
  cpu_set_t every, given;
  std::memset(&every, 0xff, sizeof(every));
  sched_setaffinity(0, sizeof(every), &every);
  if (sched_getaffinity(0, sizeof(given), &given) || !CPU_EQUAL(&given, &all)) sched_setaffinity(0, sizeof(all), &all);
}

// Another rank on this core cannot run while this rank spins, and the scheduler may leave both here for seconds while a core is idle. So
// this rank moves if it is the higher of the two and has not just moved; otherwise it yields.
void stay_awake(const Memory& memory, int rank, int other, uint64_t epoch) {
  const Control& control = memory.control(other);
  if (control.core.load(std::memory_order_relaxed) != sched_getcpu()) {
    for (int i = 0; i < 32 && !has_published(control, epoch); ++i) relax();
    return;
  }
  Control& self = memory.control(rank);
  if (const int64_t time = now(); other < rank && time - self.moved > kSettle) {
    self.moved = time;
    leave_core(memory);
  } else {
    sched_yield();
  }
}

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

// Returns `done` once every rank has published this rank's epoch.
Status wait(const Memory& memory, int rank) {
  Control& self = memory.control(rank);
  const uint64_t epoch = self.epoch.load(std::memory_order_relaxed);
  int64_t began = 0;
  for (int other = 0; other < memory.ranks(); ++other) {
    Control& control = memory.control(other);
    if (has_published(control, epoch)) continue;
    while (!has_published(control, epoch)) {
      if (control.abandoned.load(std::memory_order_acquire)) return abandoned;
      if (!began) began = now();
      if (now() - began < self.awake) {
        stay_awake(memory, rank, other, epoch);
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

}  // namespace

size_t slots_offset(int ranks) { return sizeof(Header) + ranks * sizeof(Control); }

size_t bytes(int ranks) { return slots_offset(ranks) + 2 * ranks * sizeof(Slot) + kSlotValues * sizeof(double); }

void create(void* memory, int ranks, bool by_segments) {
  Memory m(memory);
  m.header().ranks = ranks;
  m.header().by_segments = by_segments;
}

void join(void* memory, int rank, uint64_t random) {
  Control& self = Memory(memory).control(rank);
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { ++forks; }); });
  self.forks = forks;
  self.random = random;
  CPU_ZERO(&self.cores);
  sched_getaffinity(0, sizeof(self.cores), &self.cores);
}

uint64_t random_of(const void* memory, int rank) { return Memory(memory).control(rank).random; }

// With more ranks than cores, a rank that stays awake keeps a core from the one that it waits for.
void start(void* memory, int rank) {
  Memory m(memory);
  cpu_set_t cores;
  CPU_ZERO(&cores);
  for (int other = 0; other < m.ranks(); ++other) CPU_OR(&cores, &cores, &m.control(other).cores);
  m.control(rank).awake = CPU_COUNT(&cores) >= m.ranks() ? kAwake : 0;
}

Status all_reduce(void* memory, int rank, double* values, int64_t count, int64_t channels, uint64_t digest) {
  const Memory m(memory);
  Control& self = m.control(rank);
  if (self.forks != forks) return forked;
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
      slot.digest = digest;
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
      double out[kSlotValues];
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
  if (self.forks != forks) return;
  self.abandoned.store(1, std::memory_order_seq_cst);
  wake(self);
}

Presence presence(const void* memory, int rank, int other, int fd) {
  const Memory m(memory);
  const Control& control = m.control(other);
  if (control.abandoned.load(std::memory_order_acquire)) return gave_up;
  if (has_published(control, m.control(rank).epoch.load(std::memory_order_relaxed))) return arrived;
  struct flock lock{};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = other;
  lock.l_len = 1;
  if (fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK) {
    // It may have published and then ended since we read its epoch above.
    return has_published(control, m.control(rank).epoch.load(std::memory_order_relaxed)) ? arrived : ended;
  }
  return late;
}

}  // namespace syncbn::shared_memory

#endif  // SYNCBN_HAS_SHARED_MEMORY
