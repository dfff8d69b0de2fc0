// The ops for any device: each checks its arguments, allocates its outputs and calls the kernel with plain data. A Device is a class like
// this, which states how devices differ:
//
//   struct Device {
//     static constexpr const char* out_of_memory;                              // torch's words, which batch-size finders know
//     static void check_usable();                                              // throws if the device has failed for good
//     static void check(const char* name, const Tensor& t, const Tensor& x);   // throws unless t is on the device of x
//     static int32_t* writable_alarm(int32_t* alarm);                          // the address by which kernels write to it
//     explicit Device(const Tensor& x);                                        // makes x's device current while it lives
//     void stats(const StatsArgs&);                                            // and a method for each of the three other kernels
//   };
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tensors.h"

namespace syncbn {

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
                                     std::optional<double> momentum, bool unbiased, double eps, int64_t activation, double negative_slope,
                                     int64_t tag, int64_t ranks, OptionalTensor alarm) {
  const Input<Device> in(x);
  NormalizeArgs args{};
  args.dtype = in.dtype;
  args.layout = in.layout;
  args.x = in.data;
  args.stats = in.statistics(stats, eps);
  args.weight = in.parameter("weight", weight);
  args.bias = in.parameter("bias", bias);
  args.residual = in.same("residual", residual);
  SYNCBN_REQUIRE(running_mean.has_value() == running_var.has_value(), "running_mean and running_var must be given both or neither");
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

  Device device(x);
  args.verification = in.verification(tag, ranks, alarm);  // after `device`: the address of pinned memory is the current GPU's
  const bool keep_mask = residual && needs_only_sign(args.activation);
  Tensor y = in.new_like(x), mask = in.new_empty(keep_mask ? in.mask_numel : 0, aoti_torch_dtype_uint8());
  if (x.numel() == 0) torch::stable::zero_(mask);  // no kernel writes it
  args.y = y.data_ptr();
  args.mask = keep_mask ? static_cast<uint8_t*>(mask.data_ptr()) : nullptr;
  device.normalize(args);
  return {y, mask};
}

// The arguments that both backward ops share.
template <class Device, class Args>
Args backward_args(const Input<Device>& in, const Tensor& dy, const Tensor& stats, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& residual, const OptionalTensor& mask, double eps, int64_t activation, double negative_slope) {
  Args args{};
  args.dtype = in.dtype;
  args.layout = in.layout;
  args.dy = in.same("dy", dy);
  args.x = in.data;
  args.stats = in.statistics(stats, eps);
  args.weight = in.parameter("weight", weight);
  args.bias = in.parameter("bias", bias);
  args.residual = in.same("residual", residual);
  args.activation = activation_of(activation);
  args.negative_slope = negative_slope;
  if (needs_only_sign(args.activation)) {
    SYNCBN_REQUIRE(mask || !residual, "mask must be given with a residual and this activation, as normalize returned it");
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
  Tensor sums = in.new_empty(sums_numel(in.layout.C), aoti_torch_dtype_float64()), dweight = in.new_vector(weight),
         dbias = in.new_vector(bias);
  args.sums = static_cast<double*>(sums.data_ptr());
  if (weight) args.dweight = {dweight.data_ptr(), args.weight.dtype};
  if (bias) args.dbias = {dbias.data_ptr(), args.bias.dtype};
  device.backward_reduce(args);
  return {sums, dweight, dbias};
}

template <class Device>
std::tuple<Tensor, Tensor> backward_input(Tensor dy, Tensor sums, Tensor x, Tensor stats, OptionalTensor weight, OptionalTensor bias,
                                          OptionalTensor residual, OptionalTensor mask, double eps, int64_t activation,
                                          double negative_slope, bool rank_weighted, int64_t tag, int64_t ranks, OptionalTensor alarm) {
  const Input<Device> in(x);
  auto args = backward_args<Device, BackwardInputArgs>(in, dy, stats, weight, bias, residual, mask, eps, activation, negative_slope);
  args.rank_weighted = rank_weighted;
  args.sums = static_cast<const double*>(in.flat("sums", sums, ScalarType::Double, sums_numel(in.layout.C)));

  Device device(x);
  args.verification = in.verification(tag, ranks, alarm);  // after `device`: the address of pinned memory is the current GPU's
  const bool writes_dz = args.activation != Activation::none && (needs_only_sign(args.activation) ? mask : residual).has_value();
  Tensor dx = in.new_like(x), dz = writes_dz ? in.new_like(x) : in.nothing();
  args.dx = dx.data_ptr();
  args.dz = writes_dz ? dz.data_ptr() : nullptr;
  device.backward_input(args);
  return {dx, dz};
}

// stats and normalize of a single process, which has no exchange between them: one call costs the host less than two.
template <class Device>
std::tuple<Tensor, Tensor> batch_norm(Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor running_mean,
                                      OptionalTensor running_var, OptionalTensor num_batches_tracked, std::optional<double> momentum,
                                      bool unbiased, double eps, int64_t activation, double negative_slope, bool rank_weighted) {
  Tensor stats = syncbn::stats<Device>(x, rank_weighted, true, 0);
  Tensor y = std::get<0>(normalize<Device>(x, stats, weight, bias, {}, running_mean, running_var, num_batches_tracked, momentum, unbiased,
                                           eps, activation, negative_slope, 0, 0, {}));
  return {y, stats};
}

// backward_reduce and backward_input of a single process.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(Tensor dy, Tensor x, Tensor stats, OptionalTensor weight, OptionalTensor bias,
                                                       double eps, int64_t activation, double negative_slope, bool rank_weighted) {
  auto [sums, dweight, dbias] = backward_reduce<Device>(dy, x, stats, weight, bias, {}, {}, eps, activation, negative_slope, 0);
  Tensor dx = std::get<0>(
      backward_input<Device>(dy, sums, x, stats, weight, bias, {}, {}, eps, activation, negative_slope, rank_weighted, 0, 0, {}));
  return {dx, dweight, dbias};
}

}  // namespace syncbn

#define SYNCBN_IMPLEMENT(dispatch_key, Device)                                      \
  STABLE_TORCH_LIBRARY_IMPL(syncbn, dispatch_key, m) {                              \
    m.impl("stats", TORCH_BOX(&syncbn::stats<Device>));                             \
    m.impl("normalize", TORCH_BOX(&syncbn::normalize<Device>));                     \
    m.impl("backward_reduce", TORCH_BOX(&syncbn::backward_reduce<Device>));         \
    m.impl("backward_input", TORCH_BOX(&syncbn::backward_input<Device>));           \
    m.impl("batch_norm", TORCH_BOX(&syncbn::batch_norm<Device>));                   \
    m.impl("batch_norm_backward", TORCH_BOX(&syncbn::batch_norm_backward<Device>)); \
  }
