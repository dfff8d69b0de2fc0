// The exchange in shared memory with threads as ranks, for sanitizers: random lengths, sums and statistics, mismatches, and random
// delays. The slots are NaN at first, so that nothing is read before it was written. The ranks meet on cores of a machine that has 16, as
// Linux would tell; every second rank is pinned to eight of them.
//
//   shared_memory_threads RANKS BY_SEGMENTS EXCHANGES
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/args.h"
#include "../../csrc/cpu/shared_memory.h"

namespace shared = syncbn::shared_memory;

namespace {

int ranks, by_segments, exchanges;
void* memory;

thread_local uint64_t asked = ~uint64_t{0};  // the cores that this thread has asked for; it gets those in the cpuset
constexpr uint64_t cpuset = 0xffff;
thread_local int core = 0;
std::atomic<int> moves{0};

uint64_t& bits(cpu_set_t& set) { return reinterpret_cast<uint64_t&>(set); }

double value(int rank, int exchange, int64_t i) { return rank + 1 + 0.25 * exchange + static_cast<double>(i % 97); }

void fail(const char* what, int rank, int exchange) {
  fprintf(stderr, "rank %d, exchange %d: %s\n", rank, exchange, what);
  exit(1);
}

void run(int rank) {
  const uint64_t pinned = rank % 2 ? 0xff : asked;
  asked = pinned;
  std::mt19937 same(7), own(rank);  // the first gives the same on every rank
  for (int exchange = 0; exchange < exchanges; ++exchange) {
    const int64_t lengths[] = {1, 5, 129, 8192, 8193, 20000};
    core = exchange % 2 ? rank : 0;
    const bool statistics = same() % 2;
    const int64_t n = lengths[same() % 6], channels = statistics ? n : 0, count = statistics ? syncbn::stats_numel(n) : n;
    const bool differs = same() % 16 == 0;
    const uint64_t digest = exchange + (differs && rank == ranks - 1);
    std::vector<double> values(count);
    for (int64_t i = 0; i < count; ++i) values[i] = value(rank, exchange, i);
    const int64_t weight = 3 * n;
    if (statistics) values[weight] = values[weight + 1] = rank;  // rank 0 has no samples
    if (own() % 4 == 0) usleep(own() % 50);
    shared::Status status;
    while ((status = shared::all_reduce(memory, rank, values.data(), count, channels, digest)) == shared::waiting) {
    }
    if (differs) {
      if (status != shared::mismatch) fail("a mismatch was not seen", rank, exchange);
      continue;
    }
    if (status != shared::done) fail("not done", rank, exchange);
    for (int64_t i = 0; i < (statistics ? n : count); ++i) {
      double sum = 0, shift = value(1, exchange, i);
      for (int r = 0; r < ranks; ++r) {
        sum += statistics ? value(r, exchange, n + i) + r * (value(r, exchange, i) - shift) : value(r, exchange, i);
      }
      if (values[statistics ? n + i : i] != sum) fail("a wrong sum", rank, exchange);
      if (statistics && values[i] != shift) fail("a wrong shift", rank, exchange);
    }
    if (statistics && values[weight] != ranks * (ranks - 1) / 2) fail("a wrong weight", rank, exchange);
  }
  if (asked != pinned) fail("its cores are not those of before, or will not be once its cpuset grows", rank, exchanges);
}

}  // namespace

// In place of the C library's.
extern "C" int sched_getcpu() noexcept { return core; }

extern "C" int sched_getaffinity(pid_t, size_t, cpu_set_t* set) noexcept {
  CPU_ZERO(set);
  bits(*set) = asked & cpuset;
  return 0;
}

extern "C" int sched_setaffinity(pid_t, size_t, const cpu_set_t* set) noexcept {
  const uint64_t wanted = bits(const_cast<cpu_set_t&>(*set));
  if (!(wanted & cpuset)) return errno = EINVAL, -1;
  asked = wanted;
  if (!(asked >> core & 1)) core = __builtin_ctzll(asked & cpuset), ++moves;
  return 0;
}

int main(int, char** arguments) {
  ranks = atoi(arguments[1]), by_segments = atoi(arguments[2]), exchanges = atoi(arguments[3]);
  const size_t size = (shared::bytes(ranks) + 63) / 64 * 64;
  memory = std::aligned_alloc(64, size);
  memset(memory, 0, size);
  memset(static_cast<char*>(memory) + shared::slots_offset(ranks), 0xff, shared::bytes(ranks) - shared::slots_offset(ranks));  // NaN
  shared::create(memory, ranks, by_segments);
  for (int rank = 0; rank < ranks; ++rank) shared::join(memory, rank, rank);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) shared::start(memory, rank);
  for (int rank = 0; rank < ranks; ++rank) threads.emplace_back(run, rank);
  for (std::thread& thread : threads) thread.join();
  if (!moves) fail("no rank has ever left a core", 0, exchanges);
  puts("ok");
}
