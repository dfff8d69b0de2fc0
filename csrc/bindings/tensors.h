// Tensors by torch's stable ABI: turns the arguments of an op into plain data (args.h), and allocates its outputs.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"

namespace syncbn {

using OptionalTensor = std::optional<Tensor>;

// torch::stable::new_empty and empty_like look up an operator by its name at each call, which is a third of a small op's time.
template <class Device>
Tensor empty(const Tensor& x, int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  int32_t device_type, device_index;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_index));
  // The text of torch's own error does not cross the stable ABI.
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

// A tensor whose memory was freed, as FSDP frees parameters, has an empty storage. Its pointer need not be null: a view's
// offset is added to it.
inline const void* readable(const char* name, const Tensor& t) {
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  SYNCBN_REQUIRE(bytes || t.numel() == 0, name, " ", show(t.sizes()), " has no memory: its storage has been freed");
  return t.const_data_ptr();
}

// x, and methods that check the other arguments against it.
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
    SYNCBN_REQUIRE(sizes.size() >= 2 && sizes[1] > 0 && sizes[1] < (int64_t{1} << 31), "x must be [N, C, *] with 0 < C < 2^31, got ",
                   show(sizes));
    SYNCBN_REQUIRE(contiguous || x.numel() == 0 || is_channels_last(x), "x ", show(sizes),
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
    SYNCBN_REQUIRE(t.scalar_type() == x.scalar_type(), name, " must be ", show(x.scalar_type()), ", as x, got ", show(t.scalar_type()));
    SYNCBN_REQUIRE(t.sizes().equals(x.sizes()), name, " must be ", show(x.sizes()), ", as x, got ", show(t.sizes()));
    SYNCBN_REQUIRE(t.numel() == 0 || (contiguous ? t.is_contiguous() : is_channels_last(t)), name, " must lie in memory as x with strides ",
                   show(x.strides()), ", got strides ", show(t.strides()));
    return readable(name, t);
  }
  const void* same(const char* name, const OptionalTensor& t) const { return t ? same(name, *t) : nullptr; }

  ChannelVector vector(const char* name, const OptionalTensor& t) const {
    if (!t) return {};
    Device::check(name, *t, x);
    SYNCBN_REQUIRE(t->dim() == 1 && t->size(0) == layout.C, name, " must be [", layout.C, "] to match x ", show(x.sizes()), ", got ",
                   show(t->sizes()));
    return {const_cast<void*>(readable(name, *t)), dtype_of(name, *t), t->stride(0)};
  }
  // weight or bias.
  ChannelVector parameter(const char* name, const OptionalTensor& t) const {
    const ChannelVector found = vector(name, t);
    SYNCBN_REQUIRE(!t || found.dtype == dtype || found.dtype == DType::float32 || found.dtype == DType::float64, name,
                   " must be float32, float64 or ", show(x.scalar_type()), ", as x, got ", show(t->scalar_type()));
    return found;
  }
  // A vector that the op writes.
  ChannelVector updated(const char* name, const OptionalTensor& t) const {
    ChannelVector found = vector(name, t);
    if (!t) return found;
    SYNCBN_REQUIRE(found.stride != 0 || layout.C == 1, name, " must have memory of its own for each channel, got an expanded tensor");
    found.data = t->data_ptr();
    return found;
  }

  // A flat tensor of one dtype and length.
  const void* flat(const char* name, const Tensor& t, ScalarType type, int64_t numel) const {
    Device::check(name, t, x);
    SYNCBN_REQUIRE(t.scalar_type() == type && t.is_contiguous() && t.numel() == numel, name, " must be contiguous ", show(type), " [",
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
      SYNCBN_REQUIRE(alarm->is_cpu() && alarm->scalar_type() == ScalarType::Int && alarm->numel() == 1,
                     "alarm must be Int [1] on the CPU, got ", show(alarm->scalar_type()), " ", show(alarm->sizes()));
      expected.alarm = Device::writable_alarm(static_cast<int32_t*>(alarm->data_ptr()));
    }
    return expected;
  }

  Tensor new_empty(int64_t numel, int32_t dtype) const { return empty<Device>(x, numel, dtype); }
  Tensor new_like(const Tensor& t) const { return empty<Device>(x, t.dim(), t.sizes().data(), t.strides().data(), dtype_code(t)); }
  // Contiguous, because t may be a view whose elements share memory.
  Tensor new_vector(const OptionalTensor& t) const { return t ? new_empty(layout.C, dtype_code(*t)) : nothing(); }
  Tensor nothing() const { return new_empty(0, dtype_code(x)); }

 private:
  static int32_t dtype_code(const Tensor& t) {
    int32_t code;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
    return code;
  }
};

}  // namespace syncbn
