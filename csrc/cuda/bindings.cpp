// The four ops for CUDA tensors. Each time: guard the device, take the current stream, launch, check the launch.
#include "../bindings.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "launch.cuh"
#include "ops.h"

namespace syncbn::cuda {
namespace {

void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("syncbn: ") + what + " failed: " + cudaGetErrorString(error));
}

struct Workspace {
  Tensor memory;
  unsigned long long capture;  // the capture it was made for; 0: none
};

// One for each device and stream, made at the first call. Kernels of a graph may be replayed on any stream, so that a capture gets
// one of its own: its memory is the graph's, and its counters are zeroed by a node of the graph, once per replay.
void* workspace_on(const Tensor& x, cudaStream_t stream, int sm_count) {
  cudaStreamCaptureStatus status;
  unsigned long long capture = 0;
  check_cuda(cudaStreamGetCaptureInfo(stream, &status, &capture), "cudaStreamGetCaptureInfo");
  if (status != cudaStreamCaptureStatusActive) capture = 0;

  static std::mutex mutex;
  // Never destroyed: at exit, CUDA may be gone before it.
  static auto& workspaces = *new std::map<std::tuple<int, cudaStream_t, bool>, Workspace>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] = workspaces.try_emplace({x.get_device_index(), stream, capture != 0});
  Workspace& workspace = found->second;
  if (is_new || workspace.capture != capture) {
    workspace = {torch::stable::new_empty(x, {static_cast<int64_t>(workspace_bytes(sm_count))}, ScalarType::Byte), capture};
    check_cuda(cudaMemsetAsync(workspace.memory.data_ptr(), 0, counter_bytes(sm_count), stream), "cudaMemsetAsync");
  }
  return workspace.memory.data_ptr();
}

class Cuda {
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
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    check_cuda(op(args, {sm_count, workspace_on(x_, cuda_stream, sm_count), cuda_stream}), kernel);
  }

 public:
  static void check(const char* name, const Tensor& t, const Tensor& x) {
    SYNCBN_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), name, " must be on a CUDA device, that of x");
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
