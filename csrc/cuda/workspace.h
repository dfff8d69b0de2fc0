// The host's side of the memory that a launch's blocks share, whose layout is in launch.cuh.
#pragma once

#include "../bindings/tensors.h"

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "launch.cuh"

namespace syncbn::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, or the check of the next launch would report it again
  throw std::runtime_error(std::string("syncbn: ") + what + " failed: " + cudaGetErrorString(error));
}

struct DeviceErrors {
  static constexpr const char* out_of_memory = "CUDA out of memory.";
  // After a fatal error of a kernel, allocations fail as well: throws the original error.
  static void check_usable() {
    const cudaError_t error = cudaFree(nullptr);
    if (error == cudaErrorStreamCaptureUnsupported) cudaGetLastError();
    else check_cuda(error, "an earlier CUDA call");
  }
};

// While it lives, this thread can allocate while another thread captures a graph, without invalidating that capture.
class RelaxedCapture {
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;

 public:
  RelaxedCapture() { exchange(); }
  ~RelaxedCapture() { exchange(); }

 private:
  void exchange() { cudaThreadExchangeStreamCaptureMode(&mode_); }
};

// Memory for one launch on `stream`: counters that are 0, and space for partial sums.
class HeldWorkspace {
  void* memory_;
  std::optional<Tensor> owner_;

 public:
  HeldWorkspace(const Tensor& x, cudaStream_t stream, int sm_count) {
    cudaStreamCaptureStatus status;
    check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    // A graph may be replayed on any stream, concurrently with other work: so each captured launch borrows memory from the graph's pool
    // and has a memset node for its counters. cudaStreamPerThread is a different stream in each thread, and cudaStreamLegacy in each
    // context: so a launch on one of them borrows memory, too.
    if (status == cudaStreamCaptureStatusActive || stream == cudaStreamPerThread || stream == cudaStreamLegacy) {
      borrow(x, stream, sm_count);
      return;
    }
    // Otherwise there is one workspace for each device and stream, forever: each launch leaves its counters at 0 for the next. It is not
    // allocated through torch, whose pools must get their memory back.
    static std::mutex mutex;
    static auto& kept = *new std::map<std::pair<int, cudaStream_t>, void*>;  // never destroyed: at exit, CUDA may be unloaded first
    const std::lock_guard<std::mutex> lock(mutex);
    const std::pair<int, cudaStream_t> key{x.get_device_index(), stream};
    if (const auto found = kept.find(key); found != kept.end()) {
      memory_ = found->second;
      return;
    }
    const RelaxedCapture relaxed;
    const cudaError_t error = cudaMalloc(&memory_, workspace_bytes(sm_count));
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();           // clears the error
      borrow(x, stream, sm_count);  // torch may cache the free memory, and releases it under pressure
      return;
    }
    check_cuda(error, "cudaMalloc");
    zero_counters(stream, sm_count);
    kept[key] = memory_;
  }

  void* get() const { return memory_; }

 private:
  // Uses torch's memory, for this launch only.
  void borrow(const Tensor& x, cudaStream_t stream, int sm_count) {
    owner_ = empty<DeviceErrors>(x, static_cast<int64_t>(workspace_bytes(sm_count)), aoti_torch_dtype_uint8());
    memory_ = owner_->data_ptr();
    zero_counters(stream, sm_count);
  }
  void zero_counters(cudaStream_t stream, int sm_count) {
    check_cuda(cudaMemsetAsync(memory_, 0, counter_bytes(sm_count), stream), "cudaMemsetAsync");
  }
};

}  // namespace syncbn::cuda
