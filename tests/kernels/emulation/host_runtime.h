// The part of CUDA's runtime that benchmarks/sweep.cu and peer_all_reduce_exports.cpp call, for the emulation. Memory is the host's. A
// graph's kernels run once, while they are captured; every replay takes a millisecond, so that what the program prints can be predicted.
#pragma once

#include <cstdlib>
#include <cstring>

#include "cuda_emulation.h"
#include "scheduler.h"

using cudaEvent_t = void*;
using cudaGraph_t = void*;
using cudaGraphExec_t = void*;
struct cudaDeviceProp {
  const char* name;
  int multiProcessorCount;
};
enum { cudaStreamCaptureModeRelaxed, cudaMemcpyHostToDevice };

inline cudaError_t emulated_status() { return emulation::error().empty() ? cudaSuccess : cudaErrorInvalidValue; }
inline const char* cudaGetErrorString(cudaError_t) { return emulation::error().c_str(); }

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"emulated", 2};
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaHostGetDevicePointer(void** mapped, void* host, unsigned) { return *mapped = host, cudaSuccess; }
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *memory ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return emulated_status(); }
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = nullptr, cudaSuccess; }
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, int) { return emulated_status(); }
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) { return *graph = nullptr, emulated_status(); }
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* replay, cudaGraph_t, int) { return *replay = nullptr, cudaSuccess; }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
inline cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = nullptr, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return *ms = 1, cudaSuccess; }
