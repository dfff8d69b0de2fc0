// The four ops for CUDA tensors, over torch's stable ABI: every argument is checked here, and only here. Then, each time: guard the
// device, take the current stream, launch, check the launch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "launch.cuh"
#include "ops.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace syncbn {
namespace {

using namespace cuda;

// ---- Checks: each names the argument and shows what came ---------------------------------------------------------------------

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "syncbn: ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("syncbn: ") + what + " failed: " + cudaGetErrorString(error));
}

std::string show(torch::headeronly::IntHeaderOnlyArrayRef numbers) {
  std::ostringstream out;
  for (size_t i = 0; i < numbers.size(); ++i) out << (i ? ", " : "[") << numbers[i];
  return numbers.size() ? out.str() + "]" : "[]";
}

bool is_channels_last(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  const auto fits = [&](size_t d) {
    const bool fit = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return fit;
  };
  if (!fits(1)) return false;
  for (size_t d = sizes.size() - 1; d >= 2; --d) {
    if (!fits(d)) return false;
  }
  return fits(0);
}

DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Double: return DType::float64;
    default: check(false, name, " must be float32, float16, bfloat16 or float64, got ", torch::headeronly::toString(t.scalar_type()));
  }
  return {};
}

// x, and what the other arguments must be to match it.
struct Input {
  const Tensor& x;
  DType dtype;
  Layout layout;
  bool contiguous;

  explicit Input(const Tensor& t) : x(t), dtype(dtype_of("x", t)), contiguous(t.is_contiguous()) {
    check(t.is_cuda(), "x must be on a CUDA device");
    check(t.dim() >= 2 && t.size(1) > 0 && t.size(1) < (int64_t{1} << 31), "x must be [N, C, *] with 0 < C < 2^31, got ", show(t.sizes()));
    check(contiguous || t.numel() == 0 || is_channels_last(t), "x ", show(t.sizes()),
          " must be contiguous or channels-last, got strides ", show(t.strides()));
    int64_t inner = 1;
    for (int64_t d = 2; d < t.dim(); ++d) inner *= t.size(d);
    layout = contiguous ? Layout{t.size(0), t.size(1), inner} : Layout{t.size(0) * inner, t.size(1), 1};
  }

  int64_t mask_bytes() const {
    const bool pixels = layout.inner == 1;
    const int64_t rows = pixels ? layout.outer : layout.outer * layout.C, length = pixels ? layout.C : layout.inner;
    return (rows * (length + 8) + 7) / 8;
  }

  void on_same_device(const char* name, const Tensor& t) const {
    check(t.is_cuda() && t.get_device_index() == x.get_device_index(), name, " must be on cuda:", x.get_device_index(), ", as x");
  }

  const void* same(const char* name, const Tensor& t) const {
    on_same_device(name, t);
    check(t.scalar_type() == x.scalar_type(), name, " must be ", torch::headeronly::toString(x.scalar_type()), ", as x, got ",
          torch::headeronly::toString(t.scalar_type()));
    check(show(t.sizes()) == show(x.sizes()), name, " must be ", show(x.sizes()), ", as x, got ", show(t.sizes()));
    check(t.numel() == 0 || (contiguous ? t.is_contiguous() : is_channels_last(t)), name, " must lie in memory as x with strides ",
          show(x.strides()), ", got strides ", show(t.strides()));
    return t.const_data_ptr();
  }
  const void* same(const char* name, const OptionalTensor& t) const { return t ? same(name, *t) : nullptr; }

  ChannelVector vector(const char* name, const OptionalTensor& t) const {
    if (!t) return {};
    on_same_device(name, *t);
    check(t->dim() == 1 && t->size(0) == layout.C && t->is_contiguous(), name, " must be contiguous [", layout.C, "] to match x ",
          show(x.sizes()), ", got ", show(t->sizes()), " with strides ", show(t->strides()));
    return {t->data_ptr(), dtype_of(name, *t)};
  }

  // A flat tensor of one dtype whose number of elements is one of two.
  void* flat(const char* name, const Tensor& t, ScalarType type, int64_t numel, int64_t or_numel) const {
    on_same_device(name, t);
    check(t.scalar_type() == type && t.is_contiguous() && (t.numel() == numel || t.numel() == or_numel), name, " must be contiguous ",
          torch::headeronly::toString(type), " [", numel, "]", numel == or_numel ? "" : " or one more", ", got ",
          torch::headeronly::toString(t.scalar_type()), " ", show(t.sizes()));
    return t.data_ptr();
  }

  Statistics statistics(const Tensor& stats, double eps) const {
    const int64_t numel = 2 * layout.C + 1;
    const auto* data = static_cast<const double*>(flat("stats", stats, ScalarType::Double, numel, numel + 1));
    return {data, stats.numel() > numel, eps};
  }

  Tensor new_empty(int64_t numel, ScalarType type) const { return torch::stable::new_empty(x, {numel}, type); }
  Tensor new_like(const OptionalTensor& t) const { return t ? torch::stable::empty_like(*t) : new_empty(0, x.scalar_type()); }
};

Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "leaky_relu") return Activation::leaky_relu;
  check(name == "silu", "activation must be none, relu, leaky_relu or silu, got '", name, "'");
  return Activation::silu;
}

bool has_sign(Activation activation) { return activation == Activation::relu || activation == Activation::leaky_relu; }

// ---- Launching ---------------------------------------------------------------------------------------------------------------

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

template <class Args>
void launch(const char* name, cudaError_t (*op)(const Args&, const Target&), const Args& args, const Tensor& x) {
  const int device = x.get_device_index();
  int sm_count = 0;
  void* stream = nullptr;
  // This library has a CUDA runtime of its own: it is told, too.
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
  check_cuda(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  check_cuda(op(args, {sm_count, workspace_on(x, cuda_stream, sm_count), cuda_stream}), name);
}

torch::stable::accelerator::DeviceGuard guard(const Tensor& x) { return torch::stable::accelerator::DeviceGuard(x.get_device_index()); }

// ---- The ops -----------------------------------------------------------------------------------------------------------------

Tensor stats(Tensor x, bool rank_weighted) {
  const Input in(x);
  const auto on_device = guard(x);
  Tensor out = in.new_empty(2 * in.layout.C + 1 + rank_weighted, ScalarType::Double);
  launch<StatsArgs>("stats_kernel", cuda::stats,
                    {in.dtype, in.layout, x.const_data_ptr(), rank_weighted, static_cast<double*>(out.data_ptr())}, x);
  return out;
}

std::tuple<Tensor, Tensor> normalize(Tensor x, Tensor stats, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
                                     OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                     std::optional<double> momentum, double eps, bool unbiased, std::string activation,
                                     double negative_slope) {
  const Input in(x);
  NormalizeArgs args{};
  args.dtype = in.dtype;
  args.layout = in.layout;
  args.x = x.const_data_ptr();
  args.stats = in.statistics(stats, eps);
  args.weight = in.vector("weight", weight);
  args.bias = in.vector("bias", bias);
  args.residual = in.same("residual", residual);
  args.running_mean = in.vector("running_mean", running_mean);
  args.running_var = in.vector("running_var", running_var);
  if (num_batches_tracked) {
    args.num_batches_tracked = static_cast<int64_t*>(in.flat("num_batches_tracked", *num_batches_tracked, ScalarType::Long, 1, 1));
  }
  args.cumulative = !momentum;
  args.momentum = momentum.value_or(0);
  args.unbiased = unbiased;
  args.activation = activation_of(activation);
  args.negative_slope = negative_slope;

  const auto on_device = guard(x);
  Tensor y = torch::stable::empty_like(x);
  const bool keep_mask = residual && has_sign(args.activation);
  Tensor mask = in.new_empty(keep_mask ? in.mask_bytes() : 0, ScalarType::Byte);
  args.y = y.data_ptr();
  args.mask = keep_mask ? static_cast<uint8_t*>(mask.data_ptr()) : nullptr;
  launch("normalize_kernel", cuda::normalize, args, x);
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_reduce(Tensor dy, Tensor x, Tensor stats, OptionalTensor weight,
                                                           OptionalTensor bias, OptionalTensor residual, OptionalTensor mask,
                                                           double eps, std::string activation, double negative_slope) {
  const Input in(x);
  BackwardReduceArgs args{};
  args.dtype = in.dtype;
  args.layout = in.layout;
  args.dy = in.same("dy", dy);
  args.x = x.const_data_ptr();
  args.stats = in.statistics(stats, eps);
  args.weight = in.vector("weight", weight);
  args.bias = in.vector("bias", bias);
  args.residual = in.same("residual", residual);
  args.activation = activation_of(activation);
  args.negative_slope = negative_slope;
  if (has_sign(args.activation)) {
    check(mask || !residual, "mask must be given with a residual and ", activation, ", as normalize returned it");
    if (mask) args.mask = static_cast<uint8_t*>(in.flat("mask", *mask, ScalarType::Byte, in.mask_bytes(), in.mask_bytes()));
  }

  const auto on_device = guard(x);
  const bool writes_dz = args.activation != Activation::none && (residual || mask);
  Tensor sums = in.new_empty(2 * in.layout.C, ScalarType::Double);
  Tensor dz = writes_dz ? torch::stable::empty_like(x) : in.new_empty(0, x.scalar_type());
  Tensor dweight = in.new_like(weight), dbias = in.new_like(bias);
  args.sums = static_cast<double*>(sums.data_ptr());
  args.dz = writes_dz ? dz.data_ptr() : nullptr;
  if (weight) args.dweight = {dweight.data_ptr(), args.weight.dtype};
  if (bias) args.dbias = {dbias.data_ptr(), args.bias.dtype};
  launch("backward_reduce_kernel", cuda::backward_reduce, args, x);
  return {sums, dz, dweight, dbias};
}

Tensor backward_input(Tensor dy, Tensor x, Tensor stats, Tensor sums, OptionalTensor weight, OptionalTensor bias, double eps,
                      std::string activation, double negative_slope) {
  const Input in(x);
  BackwardInputArgs args{};
  args.dtype = in.dtype;
  args.layout = in.layout;
  args.dy = in.same("dy", dy);
  args.x = x.const_data_ptr();
  args.stats = in.statistics(stats, eps);
  args.sums = static_cast<const double*>(in.flat("sums", sums, ScalarType::Double, 2 * in.layout.C, 2 * in.layout.C));
  args.weight = in.vector("weight", weight);
  args.bias = in.vector("bias", bias);
  args.activation = activation_of(activation);
  args.negative_slope = negative_slope;

  const auto on_device = guard(x);
  Tensor dx = torch::stable::empty_like(x);
  args.dx = dx.data_ptr();
  launch("backward_input_kernel", cuda::backward_input, args, x);
  return dx;
}

}  // namespace
}  // namespace syncbn

STABLE_TORCH_LIBRARY_IMPL(syncbn, CUDA, m) {
  m.impl("stats", TORCH_BOX(&syncbn::stats));
  m.impl("normalize", TORCH_BOX(&syncbn::normalize));
  m.impl("backward_reduce", TORCH_BOX(&syncbn::backward_reduce));
  m.impl("backward_input", TORCH_BOX(&syncbn::backward_input));
}
