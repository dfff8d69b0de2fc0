// The four ops over torch's stable ABI, for any device: every argument is checked here, and only here. Outputs are allocated, and the
// kernels get plain data (args.h). A Device says what differs:
//
//   struct Device {
//     static constexpr const char* out_of_memory;                              // torch's words, which batch size finders look for
//     static void check_usable();                                              // throws where the device has failed for good
//     static void check(const char* name, const Tensor& t, const Tensor& x);   // t is on this device, as x
//     static int32_t* writable_alarm(int32_t* alarm);                          // the address by which kernels write to it
//     explicit Device(const Tensor& x);                                        // current as long as it lives
//     void stats(const StatsArgs&);  and the three others
//   };
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "args.h"

namespace syncbn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- Checks: each names the argument and shows what came ---------------------------------------------------------------------

template <class Error, typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  fail<std::invalid_argument>("syncbn: ", parts...);
}

// A macro, for the words of a message cost more than a small layer and are wanted only where the check fails.
#define SYNCBN_CHECK(condition, ...)       \
  do {                                     \
    if (!(condition)) refuse(__VA_ARGS__); \
  } while (false)

inline std::string show(torch::headeronly::IntHeaderOnlyArrayRef numbers) {
  std::ostringstream out;
  for (size_t i = 0; i < numbers.size(); ++i) out << (i ? ", " : "[") << numbers[i];
  return numbers.size() ? out.str() + "]" : "[]";
}

inline const char* show(ScalarType type) { return torch::headeronly::toString(type); }

inline bool is_channels_last(const Tensor& t) {
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

inline DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Double: return DType::float64;
    default: refuse(name, " must be float32, float16, bfloat16 or float64, got ", show(t.scalar_type()));
  }
}

inline Activation activation_of(int64_t number) {
  SYNCBN_CHECK(0 <= number && number < ACTIVATIONS, "activation must be one of syncbn.activation.Activation, got ", number);
  return static_cast<Activation>(number);
}

inline double tag_of(int64_t tag) {
  SYNCBN_CHECK(0 <= tag && tag < int64_t{1} << 20, "tag must be in [0, 2^20), got ", tag);
  return static_cast<double>(tag);
}

// torch::stable::new_empty and empty_like would look for an operator of that name at each call, a third of a small op's time.
template <class Device>
Tensor empty(const Tensor& x, int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  int32_t device_type, device_index;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_index));
  // The text of torch's own error does not get through.
  if (aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &made) != AOTI_TORCH_SUCCESS) {
    Device::check_usable();
    fail<std::runtime_error>(Device::out_of_memory, " syncbn could not allocate a tensor ", show({sizes, static_cast<size_t>(dim)}));
  }
  return Tensor(made);
}
template <class Device>
Tensor empty(const Tensor& x, int64_t numel, int32_t dtype) {
  const int64_t stride = 1;
  return empty<Device>(x, 1, &numel, &stride, dtype);
}

// A tensor whose memory was freed, as FSDP frees parameters, has a null pointer: kernels would take an optional one for absent.
inline const void* readable(const char* name, const Tensor& t) {
  const void* data = t.const_data_ptr();
  SYNCBN_CHECK(data || t.numel() == 0, name, " ", show(t.sizes()), " has no memory: its storage has been freed");
  return data;
}

// x, and what the other arguments must be to match it.
template <class Device>
struct Input {
  const Tensor& x;
  DType dtype;
  bool contiguous;
  Layout layout;
  int64_t mask_numel;
  const void* data;

  explicit Input(const Tensor& t) : x(t), dtype(dtype_of("x", t)), contiguous(t.is_contiguous()) {
    Device::check("x", x, x);
    const auto sizes = x.sizes();
    SYNCBN_CHECK(sizes.size() >= 2 && sizes[1] > 0 && sizes[1] < (int64_t{1} << 31), "x must be [N, C, *] with 0 < C < 2^31, got ",
                 show(sizes));
    SYNCBN_CHECK(contiguous || x.numel() == 0 || is_channels_last(x), "x ", show(sizes),
                 " must be contiguous or channels-last, got strides ", show(x.strides()));
    int64_t inner = 1;
    for (size_t d = 2; d < sizes.size(); ++d) inner *= sizes[d];
    layout = contiguous ? Layout{sizes[0], sizes[1], inner} : Layout{sizes[0] * inner, sizes[1], 1};
    mask_numel = mask_bytes(layout);
    if (x.numel() == 0) layout = {0, sizes[1], 1};
    data = readable("x", x);
  }

  const void* same(const char* name, const Tensor& t) const {
    Device::check(name, t, x);
    SYNCBN_CHECK(t.scalar_type() == x.scalar_type(), name, " must be ", show(x.scalar_type()), ", as x, got ", show(t.scalar_type()));
    SYNCBN_CHECK(t.sizes().equals(x.sizes()), name, " must be ", show(x.sizes()), ", as x, got ", show(t.sizes()));
    SYNCBN_CHECK(t.numel() == 0 || (contiguous ? t.is_contiguous() : is_channels_last(t)), name,
                 " must lie in memory as x with strides ", show(x.strides()), ", got strides ", show(t.strides()));
    return readable(name, t);
  }
  const void* same(const char* name, const OptionalTensor& t) const { return t ? same(name, *t) : nullptr; }

  ChannelVector vector(const char* name, const OptionalTensor& t) const {
    if (!t) return {};
    Device::check(name, *t, x);
    SYNCBN_CHECK(t->dim() == 1 && t->size(0) == layout.C, name, " must be [", layout.C, "] to match x ", show(x.sizes()), ", got ",
                 show(t->sizes()));
    return {const_cast<void*>(readable(name, *t)), dtype_of(name, *t), t->stride(0)};
  }
  // The same for what is written.
  ChannelVector updated(const char* name, const OptionalTensor& t) const {
    ChannelVector found = vector(name, t);
    if (t) found.data = t->data_ptr();
    return found;
  }

  // A flat tensor of one dtype and length.
  const void* flat(const char* name, const Tensor& t, ScalarType type, int64_t numel) const {
    Device::check(name, t, x);
    SYNCBN_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == numel, name, " must be contiguous ", show(type), " [",
                 numel, "], got ", show(t.scalar_type()), " ", show(t.sizes()));
    return readable(name, t);
  }

  Statistics statistics(const Tensor& stats, double eps) const {
    return {static_cast<const double*>(flat("stats", stats, ScalarType::Double, stats_numel(layout.C))), eps};
  }

  Verification verification(int64_t tag, int64_t ranks, const OptionalTensor& alarm) const {
    const double value = tag_of(tag), count = static_cast<double>(ranks);
    Verification expected{count * value, count * value * value, nullptr};
    if (alarm) {
      SYNCBN_CHECK(alarm->is_cpu() && alarm->scalar_type() == ScalarType::Int && alarm->numel() == 1, "alarm must be Int [1] on the CPU, got ",
                   show(alarm->scalar_type()), " ", show(alarm->sizes()));
      expected.alarm = Device::writable_alarm(static_cast<int32_t*>(alarm->data_ptr()));
    }
    return expected;
  }

  Tensor new_empty(int64_t numel, int32_t dtype) const { return empty<Device>(x, numel, dtype); }
  Tensor new_like(const Tensor& t) const { return empty<Device>(x, t.dim(), t.sizes().data(), t.strides().data(), dtype_code(t)); }
  // Contiguous, for t may be a view whose elements share memory.
  Tensor new_vector(const OptionalTensor& t) const { return t ? new_empty(layout.C, dtype_code(*t)) : nothing(); }
  Tensor nothing() const { return new_empty(0, dtype_code(x)); }

 private:
  static int32_t dtype_code(const Tensor& t) {
    int32_t code;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
    return code;
  }
};

// ---- The ops -----------------------------------------------------------------------------------------------------------------

template <class Device>
Tensor stats(Tensor x, bool rank_weighted, bool shifted, int64_t tag) {
  const Input<Device> in(x);
  Device device(x);
  Tensor out = in.new_empty(stats_numel(in.layout.C), aoti_torch_dtype_float64());
  device.stats({in.dtype, in.layout, in.data, rank_weighted, shifted, tag_of(tag), static_cast<double*>(out.data_ptr())});
  return out;
}

template <class Device>
std::tuple<Tensor, Tensor> normalize(Tensor x, Tensor stats, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
                                     OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                     std::optional<double> momentum, double eps, bool unbiased, int64_t activation,
                                     double negative_slope, int64_t tag, int64_t ranks, OptionalTensor alarm) {
  const Input<Device> in(x);
  NormalizeArgs args{};
  args.dtype = in.dtype;
  args.layout = in.layout;
  args.x = in.data;
  args.stats = in.statistics(stats, eps);
  args.weight = in.vector("weight", weight);
  args.bias = in.vector("bias", bias);
  args.residual = in.same("residual", residual);
  args.running_mean = in.updated("running_mean", running_mean);
  args.running_var = in.updated("running_var", running_var);
  if (num_batches_tracked) {
    in.flat("num_batches_tracked", *num_batches_tracked, ScalarType::Long, 1);
    args.num_batches_tracked = static_cast<int64_t*>(num_batches_tracked->data_ptr());
  }
  args.cumulative = !momentum;
  args.momentum = momentum.value_or(0);
  args.unbiased = unbiased;
  args.activation = activation_of(activation);
  args.negative_slope = negative_slope;
  args.verification = in.verification(tag, ranks, alarm);

  Device device(x);
  const bool keep_mask = residual && needs_only_sign(args.activation);
  Tensor y = in.new_like(x), mask = in.new_empty(keep_mask ? in.mask_numel : 0, aoti_torch_dtype_uint8());
  if (x.numel() == 0) torch::stable::zero_(mask);  // no kernel writes it then
  args.y = y.data_ptr();
  args.mask = keep_mask ? static_cast<uint8_t*>(mask.data_ptr()) : nullptr;
  device.normalize(args);
  return {y, mask};
}

// The arguments that both backward ops share.
template <class Device, class Args>
Args backward_args(const Input<Device>& in, const Tensor& dy, const Tensor& stats, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& residual, const OptionalTensor& mask, double eps, int64_t activation,
                   double negative_slope) {
  Args args{};
  args.dtype = in.dtype;
  args.layout = in.layout;
  args.dy = in.same("dy", dy);
  args.x = in.data;
  args.stats = in.statistics(stats, eps);
  args.weight = in.vector("weight", weight);
  args.bias = in.vector("bias", bias);
  args.residual = in.same("residual", residual);
  args.activation = activation_of(activation);
  args.negative_slope = negative_slope;
  if (needs_only_sign(args.activation)) {
    SYNCBN_CHECK(mask || !residual, "mask must be given with a residual and this activation, as normalize returned it");
    if (mask) args.mask = static_cast<const uint8_t*>(in.flat("mask", *mask, ScalarType::Byte, in.mask_numel));
  }
  return args;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> backward_reduce(Tensor dy, Tensor x, Tensor stats, OptionalTensor weight, OptionalTensor bias,
                                                   OptionalTensor residual, OptionalTensor mask, double eps, int64_t activation,
                                                   double negative_slope, int64_t tag) {
  const Input<Device> in(x);
  auto args = backward_args<Device, BackwardReduceArgs>(in, dy, stats, weight, bias, residual, mask, eps, activation, negative_slope);

  Device device(x);
  args.tag = tag_of(tag);
  Tensor sums = in.new_empty(sums_numel(in.layout.C), aoti_torch_dtype_float64()), dweight = in.new_vector(weight), dbias = in.new_vector(bias);
  args.sums = static_cast<double*>(sums.data_ptr());
  if (weight) args.dweight = {dweight.data_ptr(), args.weight.dtype};
  if (bias) args.dbias = {dbias.data_ptr(), args.bias.dtype};
  device.backward_reduce(args);
  return {sums, dweight, dbias};
}

template <class Device>
std::tuple<Tensor, Tensor> backward_input(Tensor dy, Tensor x, Tensor stats, Tensor sums, OptionalTensor weight, OptionalTensor bias,
                                          OptionalTensor residual, OptionalTensor mask, double eps, int64_t activation,
                                          double negative_slope, bool rank_weighted, int64_t tag, int64_t ranks, OptionalTensor alarm) {
  const Input<Device> in(x);
  auto args = backward_args<Device, BackwardInputArgs>(in, dy, stats, weight, bias, residual, mask, eps, activation, negative_slope);
  args.rank_weighted = rank_weighted;
  args.sums = static_cast<const double*>(in.flat("sums", sums, ScalarType::Double, sums_numel(in.layout.C)));
  args.verification = in.verification(tag, ranks, alarm);

  Device device(x);
  const bool writes_dz = args.activation != Activation::none && (needs_only_sign(args.activation) ? mask : residual).has_value();
  Tensor dx = in.new_like(x), dz = writes_dz ? in.new_like(x) : in.nothing();
  args.dx = dx.data_ptr();
  args.dz = writes_dz ? dz.data_ptr() : nullptr;
  device.backward_input(args);
  return {dx, dz};
}

}  // namespace syncbn

#define SYNCBN_IMPLEMENT(dispatch_key, Device)                                    \
  STABLE_TORCH_LIBRARY_IMPL(syncbn, dispatch_key, m) {                            \
    m.impl("stats", TORCH_BOX(&syncbn::stats<Device>));                           \
    m.impl("normalize", TORCH_BOX(&syncbn::normalize<Device>));                   \
    m.impl("backward_reduce", TORCH_BOX(&syncbn::backward_reduce<Device>));       \
    m.impl("backward_input", TORCH_BOX(&syncbn::backward_input<Device>));         \
  }
