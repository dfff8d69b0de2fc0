// The four ops for CUDA tensors. Each time: guard the device, take the current stream, launch, check the launch.
#include "../bindings.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "launch.cuh"
#include "ops.h"

namespace syncbn::cuda {
namespace {

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets it, or the next launch would report it again
  throw std::runtime_error(std::string("syncbn: ") + what + " failed: " + cudaGetErrorString(error));
}

struct Memory {
  static constexpr const char* out_of_memory = "CUDA out of memory.";
  // A device that an earlier kernel has broken gives no memory either.
  static void check_usable() {
    const cudaError_t error = cudaFree(nullptr);
    if (error == cudaErrorStreamCaptureUnsupported) cudaGetLastError();
    else check_cuda(error, "an earlier CUDA call");
  }
};

// While it lives, this thread may allocate though another thread captures a graph, and does not invalidate that capture.
class RelaxedCapture {
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;

 public:
  RelaxedCapture() { exchange(); }
  ~RelaxedCapture() { exchange(); }

 private:
  void exchange() { cudaThreadExchangeStreamCaptureMode(&mode_); }
};

// Memory for one launch on `stream`: counters that are 0, and space for partial sums.
class Workspace {
  void* memory_;
  std::optional<Tensor> owner_;

 public:
  Workspace(const Tensor& x, cudaStream_t stream, int sm_count) {
    cudaStreamCaptureStatus status;
    check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    // A graph may be replayed on any stream, beside other work: each of its launches has memory from the graph's own pool, which takes
    // it back as soon as the launch is captured, and a node that zeroes the counters. And these two handles name no stream of their own:
    // the one is another stream in each thread, the other another in each context.
    if (status == cudaStreamCaptureStatusActive || stream == cudaStreamPerThread || stream == cudaStreamLegacy) {
      borrow(x, stream, sm_count);
      return;
    }
    // Otherwise one for each device and stream, for ever: each launch leaves its counters at 0 for the next. Not torch's memory: that
    // of a pool must not be kept.
    static std::mutex mutex;
    static auto& kept = *new std::map<std::pair<int, cudaStream_t>, void*>;  // never destroyed: at exit, CUDA may be gone before it
    const std::lock_guard<std::mutex> lock(mutex);
    const std::pair<int, cudaStream_t> key{x.get_device_index(), stream};
    if (const auto found = kept.find(key); found != kept.end()) {
      memory_ = found->second;
      return;
    }
    const RelaxedCapture relaxed;
    const cudaError_t error = cudaMalloc(&memory_, workspace_bytes(sm_count));
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // forgets it
      borrow(x, stream, sm_count);  // torch may hold what is free, and gives it back where it must
      return;
    }
    check_cuda(error, "cudaMalloc");
    zero_counters(stream, sm_count);
    kept[key] = memory_;
  }

  void* get() const { return memory_; }

 private:
  // Torch's memory, for this launch alone.
  void borrow(const Tensor& x, cudaStream_t stream, int sm_count) {
    owner_ = empty<Memory>(x, static_cast<int64_t>(workspace_bytes(sm_count)), aoti_torch_dtype_uint8());
    memory_ = owner_->data_ptr();
    zero_counters(stream, sm_count);
  }
  void zero_counters(cudaStream_t stream, int sm_count) {
    check_cuda(cudaMemsetAsync(memory_, 0, counter_bytes(sm_count), stream), "cudaMemsetAsync");
  }
};

class Cuda : public Memory {
  const Tensor& x_;
  const torch::stable::accelerator::DeviceGuard guard_;

  template <class Args>
  void launch(const char* kernel, cudaError_t (*op)(const Args&, const Target&), const Args& args) {
    const int device = x_.get_device_index();
    int sm_count = 0;
    void* stream = nullptr;
    // This library has a CUDA runtime of its own: it is told, too.
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
    check_cuda(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    std::optional<Workspace> workspace;  // in a graph it is a node of its own, so only a launch that needs it has one
    if (uses_workspace(args, sm_count)) workspace.emplace(x_, cuda_stream, sm_count);
    check_cuda(op(args, {sm_count, workspace ? workspace->get() : nullptr, cuda_stream}), kernel);
  }

 public:
  static void check(const char* name, const Tensor& t, const Tensor& x) {
    SYNCBN_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), name, " must be on a CUDA device, that of x");
  }

  static int32_t* writable_alarm(int32_t* alarm) {
    void* mapped = nullptr;
    if (cudaHostGetDevicePointer(&mapped, alarm, 0) != cudaSuccess) {
      cudaGetLastError();  // forgets it
      refuse("alarm must be in pinned memory: kernels write to it");
    }
    return static_cast<int32_t*>(mapped);
  }

  explicit Cuda(const Tensor& x) : x_(x), guard_(x.get_device_index()) {}
  void stats(const StatsArgs& args) { launch("stats_kernel", cuda::stats, args); }
  void normalize(const NormalizeArgs& args) { launch("normalize_kernel", cuda::normalize, args); }
  void backward_reduce(const BackwardReduceArgs& args) { launch("backward_reduce_kernel", cuda::backward_reduce, args); }
  void backward_input(const BackwardInputArgs& args) { launch("backward_input_kernel", cuda::backward_input, args); }
};

}  // namespace
}  // namespace syncbn::cuda

SYNCBN_IMPLEMENT(CUDA, syncbn::cuda::Cuda)
