// peer_all_reduce.cuh in the emulation: the ranks of a node as blocks of one grid, or as processes that share memory.
//
// Between blocks, the two words that carry a value travel apart: each arrives at some later moment, before or after those of other
// values. Processes exchange through memory that they have mapped, at the processor's own pace.
#include <sched.h>

#include <chrono>

#include "peer_all_reduce.cuh"
#include "scheduler.h"

namespace {

struct Word {
  uint64_t* to;
  uint64_t value;
};

std::vector<Word> on_the_way;
bool between_processes = false;

// Some word, but the earliest of those to the same address.
void deliver() {
  if (on_the_way.empty()) return;
  const uint64_t* const to = on_the_way[emulation::random_number() % on_the_way.size()].to;
  const auto first = std::find_if(on_the_way.begin(), on_the_way.end(), [&](const Word& word) { return word.to == to; });
  *first->to = first->value;
  on_the_way.erase(first);
}

}  // namespace

namespace syncbn::cuda {

void send(uint4* to, uint4 words) {
  const uint64_t values[2] = {uint64_t{words.y} << 32 | words.x, uint64_t{words.w} << 32 | words.z};
  auto* const address = reinterpret_cast<uint64_t*>(to);
  for (int half = 0; half < 2; ++half) {
    if (between_processes) __atomic_store_n(address + half, values[half], __ATOMIC_RELAXED);
    else on_the_way.push_back({address + half, values[half]});
  }
  emulation::yield();
}

uint4 receive(const uint4* from) {
  const auto* const address = reinterpret_cast<const uint64_t*>(from);
  uint64_t values[2];
  for (int half = 0; half < 2; ++half) {
    if (emulation::random_number() % 2) deliver();
    values[half] = __atomic_load_n(address + half, __ATOMIC_RELAXED);
    if (!between_processes) emulation::yield();
  }
  return {unsigned(values[0]), unsigned(values[0] >> 32), unsigned(values[1]), unsigned(values[1] >> 32)};
}

// Between blocks, a nanosecond is a round in which every thread polls.
uint64_t nanoseconds() { return between_processes ? std::chrono::steady_clock::now().time_since_epoch().count() : emulation::rounds(); }

void pause() {
  if (between_processes) sched_yield();
  emulation::pause();
}

}  // namespace syncbn::cuda

using syncbn::cuda::Peers;

// A number of exchanges, one after the other. All arrays have a row for each rank.
struct Exchanges {
  const Peers* peers;
  double* values;                         // [ranks, exchanges, capacity]
  const int64_t* lengths;                 // [ranks, exchanges]; 0 if a rank leaves one out
  int ranks, exchanges, blocks, threads;  // blocks of each rank, threads of each block
};

namespace {

void kernel(const Exchanges& all) {
  const int rank = blockIdx.x / all.blocks, i = blockIdx.x % all.blocks * blockDim.x + threadIdx.x;
  const Peers& peers = all.peers[rank];
  for (int e = 0; e < all.exchanges; ++e) {
    for (int delay = emulation::random_number() % 4; delay > 0; --delay) emulation::yield();
    for (int late = emulation::random_number() % 256 == 0 ? 200 : 0; late > 0; --late) emulation::pause();  // the others look at the clock
    const int64_t row = rank * all.exchanges + e;
    if (i < all.lengths[row]) syncbn::cuda::exchange_value(all.values + row * peers.capacity, i, peers, e);
  }
}

}  // namespace

extern "C" {

// Null, or what went wrong.
const char* emulate_ranks(const Exchanges* all, uint64_t seed) {
  emulation::seed(seed);
  emulation::keep_resident(all->ranks * all->blocks);
  on_the_way.clear();
  emulation::launch(all->ranks * all->blocks, all->threads, 0, [&] { kernel(*all); });
  return emulation::error().empty() ? nullptr : emulation::error().c_str();
}

// From now on this process is one rank, all of whose blocks are resident.
void emulate_process(uint64_t seed) {
  emulation::seed(seed);
  emulation::keep_resident(1 << 20);
  between_processes = true;
}
}
