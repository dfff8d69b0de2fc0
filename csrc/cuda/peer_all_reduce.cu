// peer_all_reduce: one launch that adds values over the GPUs of a node. Its time is latency: that of a store to another GPU's memory, and
// of loads from this GPU's own until the value has arrived.

#include "peer_all_reduce.cuh"

namespace syncbn::cuda {
namespace {

__global__ void __launch_bounds__(PEER_THREADS)
    peer_all_reduce_kernel(double* values, int64_t numel, const Peers peers, unsigned exchange) {
  const int64_t i = int64_t{blockIdx.x} * PEER_THREADS + threadIdx.x;
  if (i < numel) exchange_value(values, i, peers, exchange);
}

}  // namespace

cudaError_t peer_all_reduce(const Peers& peers, double* values, int64_t numel, unsigned exchange, cudaStream_t stream) {
  if (numel < 1 || numel > peers.capacity || peers.ranks < 1 || peers.ranks > MAX_PEERS) return cudaErrorInvalidValue;
  const Config config = peers_config(numel);
  LAUNCH(peer_all_reduce_kernel, config, stream, values, numel, peers, exchange);
  return cudaGetLastError();
}

}  // namespace syncbn::cuda
