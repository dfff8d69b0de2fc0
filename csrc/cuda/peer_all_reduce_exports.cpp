// The functions that Python calls through ctypes, which releases the GIL during a call. An op of torch would take
// longer to find its arguments.
#include "peer_all_reduce.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace syncbn::cuda;

EXPORT int64_t syncbn_peers_bytes() { return sizeof(Peers); }

// Replaces `missing` by the device's address of the same memory. Returns null, or what went wrong; so does syncbn_peer_all_reduce.
EXPORT const char* syncbn_peers_prepare(Peers* peers, int device) {
  void* mapped = nullptr;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaHostGetDevicePointer(&mapped, peers->missing, 0);
  if (error != cudaSuccess) return cudaGetLastError(), cudaGetErrorString(error);
  peers->missing = static_cast<uint64_t*>(mapped);
  return nullptr;
}

// `device` must be torch's current device. This library links its own CUDA runtime, whose current device must be set separately.
EXPORT const char* syncbn_peer_all_reduce(const Peers* peers, void* values, int64_t numel, unsigned exchange, int device, void* stream) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = peer_all_reduce(*peers, static_cast<double*>(values), numel, exchange, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) return cudaGetLastError(), cudaGetErrorString(error);
  return nullptr;
}
