// The exchange of one value, by one thread on every rank: no thread waits for another one of its own grid.
//
//   number    how often this value has been exchanged, kept in device memory, so that a captured graph can be replayed
//   send      to every other rank: 16 bytes, {low half, number, high half, number}, into this rank's place in that rank's memory
//   receive   from each other rank's place in this rank's memory, until both of its numbers are the wanted one
//   add       in the order of ranks: the same additions, hence bitwise identical sums, on every rank
//
// No fence, no barrier, no reset: 8 bytes are written and read at once, so each half arrives together with its number (as in NCCL's LL
// protocol); the 16 bytes may arrive in two parts. A place exists twice, for even and for odd numbers: a rank that sends number n + 2 has
// received n + 1 from every rank, and each rank sends n + 1 in a launch after the one in which it has received n. So no place is
// overwritten before it has been read. Launches of one rank must therefore follow each other, on whatever streams.
//
// A rank that waits too long writes into `missing` whom it waited for, and in later launches sends and receives nothing: the others
// miss it in turn, and launches that the host has already issued end at once. Sums of values that have not arrived are NaN. Ranks that add
// different things are not noticed here: the values end with a tag, which the kernel that uses the sums compares (verify.cuh).
#pragma once

#include "launch.cuh"
#include "peer_all_reduce.h"

namespace syncbn::cuda {

#ifdef __CUDACC__
// Volatile accesses reach the memory that another GPU reads or writes; both are single instructions of 16 bytes.
__device__ inline void send(uint4* to, uint4 words) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}
__device__ inline uint4 receive(const uint4* from) {
  uint4 words;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from)
               : "memory");
  return words;
}
__device__ inline uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}
__device__ inline void pause() {}
#endif

__device__ inline uint4 packed(double value, unsigned number) {
  uint64_t bits;
  memcpy(&bits, &value, 8);
  uint4 words;
  words.x = static_cast<unsigned>(bits), words.y = number;
  words.z = static_cast<unsigned>(bits >> 32), words.w = number;
  return words;
}

__device__ inline double unpacked(uint4 words) {
  const uint64_t bits = uint64_t{words.z} << 32 | words.x;
  double value;
  memcpy(&value, &bits, 8);
  return value;
}

__device__ inline bool arrived(uint4 words, unsigned number) { return words.y == number && words.w == number; }

// Receives until the words have arrived; false if the time `until` passes first. `until` is 0 before the first look at the clock, which is
// slow: an exchange in which no rank is late does not look.
__device__ inline bool arrive(uint4& words, const uint4* place, unsigned number, uint64_t patience, uint64_t& until) {
  for (unsigned polls = 1; !arrived(words, number); ++polls) {
    if (polls % 64 == 0) {
      const uint64_t now = nanoseconds();
      if (until == 0) until = now + patience;
      if (now > until) return false;
    }
    pause();
    words = receive(place);
  }
  return true;
}

__device__ inline void give_up(const Peers& peers, int rank, unsigned exchange) {
  peers.numbers[peers.capacity] = 1;
  *static_cast<volatile uint64_t*>(peers.missing) = uint64_t{exchange} << 32 | static_cast<unsigned>(rank + 1);
}

// Value i of this rank.
__device__ inline void exchange_value(double* values, int64_t i, const Peers& peers, unsigned exchange) {
  const double own = values[i];
  const unsigned number = peers.numbers[i] + 1;
  const bool gave_up = peers.numbers[peers.capacity] != 0;
  values[i] = __uint_as_float(0x7fc00000u);  // NaN
  if (gave_up) return;
  peers.numbers[i] = number;

  const int64_t turn = int64_t{number & 1} * peers.ranks;
  for (int r = 1; r < peers.ranks; ++r) {  // the next rank first, so that not all ranks write to one at once
    const int to = peers.rank + r < peers.ranks ? peers.rank + r : peers.rank + r - peers.ranks;
    send(peers.places[to] + (turn + peers.rank) * peers.capacity + i, packed(own, number));
  }

  const uint4* const places = peers.places[peers.rank] + turn * peers.capacity + i;
  constexpr int BATCH = 8;  // loads that share one latency
  uint64_t until = 0;
  double sum = 0;
  for (int first = 0; first < peers.ranks; first += BATCH) {
    uint4 words[BATCH];
#pragma unroll
    for (int u = 0; u < BATCH; ++u) {
      const int r = first + u;
      words[u] = r < peers.ranks && r != peers.rank ? receive(places + r * peers.capacity) : packed(own, number);
    }
#pragma unroll
    for (int u = 0; u < BATCH; ++u) {
      const int r = first + u;
      if (r >= peers.ranks) continue;
      if (!arrive(words[u], places + r * peers.capacity, number, peers.patience, until)) return give_up(peers, r, exchange);
      sum += unpacked(words[u]);
    }
  }
  values[i] = sum;
}

}  // namespace syncbn::cuda
