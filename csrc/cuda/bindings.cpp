// The ops for CUDA tensors. Each kernel is launched on the current stream of x's device, and the launch is checked.
#include "../bindings/ops.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "ops.h"
#include "workspace.h"

namespace syncbn::cuda {
namespace {

class Cuda : public DeviceErrors {
  const Tensor& x_;
  const torch::stable::accelerator::DeviceGuard guard_;

  template <class Args>
  void launch(const char* kernel, cudaError_t (*op)(const Args&, const Target&), const Args& args) {
    const int device = x_.get_device_index();
    int sm_count = 0;
    void* stream = nullptr;
    // This library links its own CUDA runtime, whose current device must be set separately.
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
    check_cuda(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    std::optional<HeldWorkspace> workspace;  // in a graph it adds a node, so only a launch that needs it has one
    if (uses_workspace(args, sm_count)) workspace.emplace(x_, cuda_stream, sm_count);
    check_cuda(op(args, {sm_count, workspace ? workspace->get() : nullptr, cuda_stream}), kernel);
  }

 public:
  static void check(const char* name, const Tensor& t, const Tensor& x) {
    SYNCBN_REQUIRE(t.is_cuda() && t.get_device_index() == x.get_device_index(), name, " must be on a CUDA device, that of x");
  }

  static int32_t* writable_alarm(int32_t* alarm) {
    void* mapped = nullptr;
    if (cudaHostGetDevicePointer(&mapped, alarm, 0) != cudaSuccess) {
      cudaGetLastError();  // clears the error
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
