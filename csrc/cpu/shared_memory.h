// Sums over the ranks of one host in memory that all of them have mapped. Plain C++, without torch and without Python.
//
//   publish   write values, lengths, number of the exchange and digest into slot[epoch % 2]; store the epoch (release); wake the ranks
//             that sleep on it
//   wait      for each rank, until it has published this epoch (acquire)
//   verify    lengths, number and digest of every rank, before any value is added
//   combine   add the slots in rank order: the same additions, hence bitwise identical sums, on every rank
//
// Two slots are enough: a rank that publishes epoch e + 2 has seen every rank publish e + 1, and each of them published e + 1 only
// after it had read all slots of e. Values longer than a slot go in pieces, each in epochs of its own. If there are many ranks, reading
// every slot on each of them would be quadratic. So with `by_segments` rank r adds segment r of all slots into a result area and publishes
// a second epoch, and then all ranks copy the result.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define SYNCBN_HAS_SHARED_MEMORY 1
#endif

namespace syncbn::shared_memory {

constexpr int kSlotValues = 8192;  // 64 KB

// The result of one call of all_reduce.
enum Status : int64_t {
  done = 0,
  waiting = 1,    // a slice of time is over, or a signal has come: call again with the same arguments
  mismatch = 2,   // the ranks do not exchange the same: every rank gets this, and the next exchange may follow
  abandoned = 3,  // some rank, perhaps this one, has given up an exchange: nothing can follow
  forked = 4,     // this process is a fork of the one that joined
};

// The state of a rank, as another one sees it.
enum Presence : int64_t { arrived = 0, late = 1, ended = 2, gave_up = 3 };

// How many bytes `ranks` ranks need. They must be zero at first.
size_t bytes(int ranks);
// Where the slots begin, for tests that poison them.
size_t slots_offset(int ranks);

// Called by one rank, before the others join. `by_segments`: see above.
void create(void* memory, int ranks, bool by_segments);
// Each rank calls it. `random`: a value that the other ranks must find in this rank's block, as proof that they mapped the same file.
void join(void* memory, int rank, uint64_t random);
uint64_t random_of(const void* memory, int rank);
// Called by each rank after all have joined.
void start(void* memory, int rank);

// Adds `values` of all ranks, in place. Returns when the sums are there, or after a wait of 50 ms: the memory keeps the progress.
//
//   channels = 0   plain sums
//   channels = C   values are [shift(C), sum(C), sumsq(C), weight, samples, tag, tag²], the sums about this rank's shift; the result is
//                  about the shift of the first rank that has samples
//
// `digest` is of what this rank is about to exchange.
Status all_reduce(void* memory, int rank, double* values, int64_t count, int64_t channels, uint64_t digest);

// Ends all exchanges: the other ranks get `abandoned`.
void abandon(void* memory, int rank);

// `fd` is the file of the memory: each rank has a record lock on its byte, which Linux releases when the process ends.
Presence presence(const void* memory, int rank, int other, int fd);

}  // namespace syncbn::shared_memory
