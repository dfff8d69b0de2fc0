// The sum of a few thousand doubles over the GPUs of a node, through each other's memory. peer_all_reduce.cuh has the protocol.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace syncbn::cuda {

constexpr int MAX_PEERS = 16;  // ranks of a group

// What a rank knows of its group. syncbn/comm/peer_memory.py mirrors it.
struct Peers {
  uint4* places[MAX_PEERS];  // in the memory of each rank, at this rank's address for it: [2, ranks, capacity], 0 at first
  unsigned* numbers;         // [capacity + 1]: how often each value was exchanged; then whether this rank has given up. 0 at first
  uint64_t* missing;         // [1] in pinned host memory: 0, or an exchange << 32 | (1 + the rank that did not send its values)
  int64_t capacity;          // values of an exchange, at most
  uint64_t patience;         // nanoseconds that a rank waits for the others
  int rank, ranks;
};

// Replaces each of numel <= capacity values with its sum over the ranks, in the order of ranks. `exchange` names the call in `missing`.
cudaError_t peer_all_reduce(const Peers& peers, double* values, int64_t numel, unsigned exchange, cudaStream_t stream);

}  // namespace syncbn::cuda
