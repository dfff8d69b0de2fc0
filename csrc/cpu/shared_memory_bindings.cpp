// The sums in shared memory as an op, whose callers give up the GIL, and what the set-up calls through ctypes.
#include "shared_memory.h"

#if defined(SYNCBN_HAS_SHARED_MEMORY)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace shared = syncbn::shared_memory;

void check(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

int64_t all_reduce_shared(Tensor memory, Tensor values, Tensor signature, int64_t rank, int64_t channels) {
  check(memory.is_cpu() && memory.scalar_type() == ScalarType::Byte, "syncbn: memory must be uint8 on the CPU");
  check(values.is_cpu() && values.scalar_type() == ScalarType::Double && values.is_contiguous(),
        "syncbn: values must be contiguous float64 on the CPU");
  check(signature.scalar_type() == ScalarType::Byte && signature.numel() == sizeof(shared::Signature) && signature.is_contiguous(),
        "syncbn: signature must be contiguous uint8 [264]");
  check(channels == 0 || values.numel() == 3 * channels + 2, "syncbn: statistics must be [3 * channels + 2]");
  auto& words = *static_cast<const shared::Signature*>(signature.const_data_ptr());
  return shared::all_reduce(memory.data_ptr(), static_cast<int>(rank), static_cast<double*>(values.data_ptr()), values.numel(), channels,
                            words);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncbn, CPU, m) { m.impl("all_reduce_shared", TORCH_BOX(&all_reduce_shared)); }

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t syncbn_shared_bytes(int ranks) { return static_cast<int64_t>(shared::bytes(ranks)); }
EXPORT int64_t syncbn_shared_slots_offset(int ranks) { return static_cast<int64_t>(shared::slots_offset(ranks)); }
EXPORT void syncbn_shared_create(void* memory, int ranks, int by_segments) { shared::create(memory, ranks, by_segments); }
EXPORT void syncbn_shared_join(void* memory, int rank, uint64_t random) { shared::join(memory, rank, random); }
EXPORT uint64_t syncbn_shared_random_of(void* memory, int rank) { return shared::random_of(memory, rank); }
EXPORT void syncbn_shared_start(void* memory, int rank) { shared::start(memory, rank); }
EXPORT void syncbn_shared_abandon(void* memory, int rank) { shared::abandon(memory, rank); }
EXPORT int64_t syncbn_shared_presence(void* memory, int rank, int other, int fd) { return shared::presence(memory, rank, other, fd); }
EXPORT const char* syncbn_shared_words(void* memory, int rank, int other) { return shared::words(memory, rank, other); }
EXPORT uint64_t syncbn_shared_exchange_number(void* memory, int rank) { return shared::exchange_number(memory, rank); }

#endif  // SYNCBN_HAS_SHARED_MEMORY
