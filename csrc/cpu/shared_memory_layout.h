// The shared memory: a header, a control block for each rank, two slots for each rank, the result area.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

#include "shared_memory.h"

namespace syncbn::shared_memory {

enum Stage : uint32_t { idle = 0, published, summed };

struct alignas(64) Control {
  // All ranks read these, and the block's own rank writes them; but ranks that wait for it count themselves in `sleepers`.
  std::atomic<uint64_t> epoch;
  std::atomic<uint32_t> abandoned;
  std::atomic<uint32_t> sleepers;  // ranks that sleep until the epoch changes
  std::atomic<int32_t> core;       // on which its rank published last
  // Its rank alone uses these: where it is in the exchange. They have cache lines of their own, because other ranks read the first line
  // all the time.
  alignas(64) uint64_t exchanges;
  int64_t first;  // of the values in the piece
  Stage stage;
  int32_t forks;  // when it joined
  int64_t awake;  // how long it spins before it sleeps, ns
  int64_t moved;  // when it last left a core, ns
  // Its rank writes these when it joins.
  uint64_t random;
  cpu_set_t cores;
};

struct alignas(64) Slot {
  // Every rank reads this line before it adds anything.
  uint64_t count;
  uint64_t channels;
  uint64_t exchange;
  uint64_t digest;
  alignas(64) double values[kSlotValues];
};

struct alignas(64) Header {
  int32_t ranks;
  int32_t by_segments;
};

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

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

}  // namespace syncbn::shared_memory
