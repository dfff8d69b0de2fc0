// The functions that Python calls through ctypes, which releases the GIL during a call. An op of torch would cost more than the exchange.
#include "shared_memory.h"

#if defined(SYNCBN_HAS_SHARED_MEMORY)

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace shared = syncbn::shared_memory;

EXPORT int64_t syncbn_shared_all_reduce(void* memory, int rank, void* values, int64_t count, int64_t channels, uint64_t digest) {
  return shared::all_reduce(memory, rank, static_cast<double*>(values), count, channels, digest);
}
EXPORT int64_t syncbn_shared_bytes(int ranks) { return static_cast<int64_t>(shared::bytes(ranks)); }
EXPORT int64_t syncbn_shared_slots_offset(int ranks) { return static_cast<int64_t>(shared::slots_offset(ranks)); }
EXPORT void syncbn_shared_create(void* memory, int ranks, int by_segments) { shared::create(memory, ranks, by_segments); }
EXPORT void syncbn_shared_join(void* memory, int rank, uint64_t random) { shared::join(memory, rank, random); }
EXPORT uint64_t syncbn_shared_random_of(void* memory, int rank) { return shared::random_of(memory, rank); }
EXPORT void syncbn_shared_start(void* memory, int rank) { shared::start(memory, rank); }
EXPORT void syncbn_shared_abandon(void* memory, int rank) { shared::abandon(memory, rank); }
EXPORT int64_t syncbn_shared_presence(void* memory, int rank, int other, int fd) { return shared::presence(memory, rank, other, fd); }

#endif  // SYNCBN_HAS_SHARED_MEMORY
