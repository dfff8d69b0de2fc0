// The four ops for CPU tensors, over torch's stable ABI: every argument is checked here, and only here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "ops.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace syncbn {

void parallel_for(int64_t n, int64_t grain, RangeFunction f, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, f, context));
}

namespace {

// ---- Checks: each names the argument and shows what came ---------------------------------------------------------------------

template <typename... Parts> void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "syncbn: ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

std::string show(torch::headeronly::IntHeaderOnlyArrayRef numbers) {
  std::ostringstream out;
  for (size_t i = 0; i < numbers.size(); ++i) out << (i ? ", " : "[") << numbers[i];
  return numbers.size() ? out.str() + "]" : "[]";
}

bool channels_last(const Tensor& t) {
  auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  auto fits = [&](size_t d) {
    bool fit = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return fit;
  };
  if (!fits(1)) return false;
  for (size_t d = sizes.size() - 1; d >= 2; --d)
    if (!fits(d)) return false;
  return fits(0);
}

Dtype dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: check(false, name, " must be float32, float64, float16 or bfloat16, got ", torch::headeronly::toString(t.scalar_type()));
  }
  return {};
}

struct Input {
  const Tensor& x;
  Dtype dtype;
  Layout layout;
  bool contiguous;

  explicit Input(const Tensor& t) : x(t), dtype(dtype_of("x", t)), contiguous(t.is_contiguous()) {
    check(t.dim() >= 2 && t.size(1) > 0, "x must be [N, C, *] with C > 0, got ", show(t.sizes()));
    check(contiguous || t.numel() == 0 || channels_last(t), "x ", show(t.sizes()),
          " must be contiguous or channels-last, got strides ", show(t.strides()));
    int64_t inner = 1;
    for (int64_t d = 2; d < t.dim(); ++d) inner *= t.size(d);
    layout = contiguous ? Layout{t.size(0), t.size(1), inner} : Layout{t.size(0) * inner, t.size(1), 1};
  }
  // What the kernels see: without samples all shapes are one.
  Layout walked() const { return layout.numel() ? layout : Layout{0, layout.channels, 1}; }
  int64_t mask_bytes() const {
    int64_t rows = layout.inner == 1 ? layout.outer : layout.outer * layout.channels;
    int64_t length = layout.inner == 1 ? layout.channels : layout.inner;
    return (rows * (length + 8) + 7) / 8;
  }

  const void* same(const char* name, const Tensor& t) const {
    check(t.is_cpu(), name, " must be on the CPU, as x");
    check(dtype_of(name, t) == dtype, name, " must be ", torch::headeronly::toString(x.scalar_type()), ", as x, got ",
          torch::headeronly::toString(t.scalar_type()));
    check(show(t.sizes()) == show(x.sizes()), name, " must be ", show(x.sizes()), ", as x, got ", show(t.sizes()));
    check(t.numel() == 0 || (contiguous ? t.is_contiguous() : channels_last(t)), name, " must lie in memory as x with strides ",
          show(x.strides()), ", got strides ", show(t.strides()));
    return t.const_data_ptr();
  }
  const void* same(const char* name, const OptionalTensor& t) const { return t ? same(name, *t) : nullptr; }

  Param param(const char* name, const OptionalTensor& t) const {
    if (!t) return {};
    check(t->is_cpu(), name, " must be on the CPU, as x");
    check(t->dim() == 1 && t->size(0) == layout.channels && t->is_contiguous(), name, " must be contiguous [", layout.channels,
          "] to match x ", show(x.sizes()), ", got ", show(t->sizes()), " with strides ", show(t->strides()));
    return {t->data_ptr(), dtype_of(name, *t)};
  }
};

// A dense tensor of one dtype whose number of elements is one of two.
void* flat(const char* name, const Tensor& t, ScalarType type, int64_t numel, int64_t or_numel) {
  check(t.is_cpu(), name, " must be on the CPU, as x");
  check(t.scalar_type() == type && t.is_contiguous() && (t.numel() == numel || t.numel() == or_numel), name, " must be contiguous ",
        torch::headeronly::toString(type), " [", numel, "]", numel == or_numel ? "" : " or one more", ", got ",
        torch::headeronly::toString(t.scalar_type()), " ", show(t.sizes()));
  return t.data_ptr();
}

Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "leaky_relu") return Activation::leaky_relu;
  check(name == "silu", "activation must be none, relu, leaky_relu or silu, got '", name, "'");
  return Activation::silu;
}

Norm norm_of(const Input& in, const Tensor& stats, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
             const std::string& activation, double negative_slope) {
  int64_t numel = 2 * in.layout.channels + 1;
  auto data = static_cast<const double*>(flat("stats", stats, ScalarType::Double, numel, numel + 1));
  return {data, stats.numel() > numel, in.param("weight", weight), in.param("bias", bias), eps, activation_of(activation),
          negative_slope};
}

Tensor new_empty(const Tensor& x, int64_t numel, ScalarType type) { return torch::stable::new_empty(x, {numel}, type); }

// ---- The ops -----------------------------------------------------------------------------------------------------------------

Tensor stats(Tensor x, bool rank_weighted) {
  Input in(x);
  Tensor out = new_empty(x, 2 * in.layout.channels + 1 + rank_weighted, ScalarType::Double);
  kernels().stats(in.dtype, in.walked(), x.const_data_ptr(), rank_weighted, static_cast<double*>(out.data_ptr()));
  return out;
}

std::tuple<Tensor, Tensor> normalize(Tensor x, Tensor stats, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
                                     OptionalTensor running_mean, OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                     std::optional<double> momentum, double eps, bool unbiased, std::string activation,
                                     double negative_slope) {
  Input in(x);
  Norm norm = norm_of(in, stats, weight, bias, eps, activation, negative_slope);
  RunningStats running{in.param("running_mean", running_mean), in.param("running_var", running_var), nullptr,
                       momentum.value_or(0), !momentum, unbiased};
  if (num_batches_tracked)
    running.num_batches_tracked = static_cast<int64_t*>(flat("num_batches_tracked", *num_batches_tracked, ScalarType::Long, 1, 1));
  const void* add = in.same("residual", residual);
  bool keep_mask = residual && (norm.activation == Activation::relu || norm.activation == Activation::leaky_relu);

  Tensor y = torch::stable::empty_like(x);
  int64_t bytes = keep_mask ? in.mask_bytes() : 0;
  Tensor mask = new_empty(x, bytes, ScalarType::Byte);
  auto bits = static_cast<uint8_t*>(mask.data_ptr());
  // The kernel writes rows up to their idle bits; the byte behind the last row is nobody's.
  if (bytes) memset(in.layout.numel() ? bits + bytes - 1 : bits, 0, in.layout.numel() ? 1 : bytes);
  kernels().normalize(in.dtype, in.walked(), x.const_data_ptr(), add, norm, running, y.data_ptr(), bits);
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_reduce(Tensor dy, Tensor x, Tensor stats, OptionalTensor weight,
                                                           OptionalTensor bias, OptionalTensor residual, OptionalTensor mask,
                                                           double eps, std::string activation, double negative_slope) {
  Input in(x);
  Norm norm = norm_of(in, stats, weight, bias, eps, activation, negative_slope);
  bool by_sign = norm.activation == Activation::relu || norm.activation == Activation::leaky_relu;
  check(!(by_sign && residual && !mask) || x.numel() == 0, "mask must be given with a residual and ", activation, ", as normalize returned it");
  const void *dy_data = in.same("dy", dy), *add = in.same("residual", residual);
  const uint8_t* bits = nullptr;
  if (mask && by_sign) bits = static_cast<uint8_t*>(flat("mask", *mask, ScalarType::Byte, in.mask_bytes(), in.mask_bytes()));

  bool writes_dz = norm.activation != Activation::none && (residual || mask);
  auto like = [&](const OptionalTensor& t) { return t ? torch::stable::empty_like(*t) : new_empty(x, 0, x.scalar_type()); };
  Tensor sums = new_empty(x, 2 * in.layout.channels, ScalarType::Double), dweight = like(weight), dbias = like(bias);
  Tensor dz = writes_dz ? torch::stable::empty_like(x) : new_empty(x, 0, x.scalar_type());
  kernels().backward_reduce(in.dtype, in.walked(), dy_data, x.const_data_ptr(), add, bits, norm, static_cast<double*>(sums.data_ptr()),
                            writes_dz ? dz.data_ptr() : nullptr, {weight ? dweight.data_ptr() : nullptr, norm.weight.dtype},
                            {bias ? dbias.data_ptr() : nullptr, norm.bias.dtype});
  return {sums, dz, dweight, dbias};
}

Tensor backward_input(Tensor dy, Tensor x, Tensor stats, Tensor sums, OptionalTensor weight, OptionalTensor bias, double eps,
                      std::string activation, double negative_slope) {
  Input in(x);
  Norm norm = norm_of(in, stats, weight, bias, eps, activation, negative_slope);
  auto sums_data = static_cast<const double*>(flat("sums", sums, ScalarType::Double, 2 * in.layout.channels, 2 * in.layout.channels));
  const void* dy_data = in.same("dy", dy);
  Tensor dx = torch::stable::empty_like(x);
  kernels().backward_input(in.dtype, in.walked(), dy_data, x.const_data_ptr(), norm, sums_data, dx.data_ptr());
  return dx;
}

}  // namespace
}  // namespace syncbn

STABLE_TORCH_LIBRARY_IMPL(syncbn, CPU, m) {
  m.impl("stats", TORCH_BOX(&syncbn::stats));
  m.impl("normalize", TORCH_BOX(&syncbn::normalize));
  m.impl("backward_reduce", TORCH_BOX(&syncbn::backward_reduce));
  m.impl("backward_input", TORCH_BOX(&syncbn::backward_input));
}
