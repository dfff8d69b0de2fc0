// The arithmetic of a channel that CPU and CUDA share: from the group's sums to the parameters of the kernels' loops, in double. In plain
// torch it is in syncbn/moments.py, and in _affine in syncbn/reference.py. Comparisons are written so that NaN stays NaN.
#pragma once

#include "args.h"

namespace syncbn {

// The mean is shift + offset; var is biased.
struct Moments {
  double shift, offset, var, invstd;

  SYNCBN_HOST_DEVICE double mean() const { return shift + offset; }
  // The part of the mean that `hi`, its rounded value, has lost: not mean - hi, which is 0 if hi is a double.
  SYNCBN_HOST_DEVICE double rest(double hi) const {
    return (shift - hi) + offset;
  }
};

// What sums are divided by: the total weight, but at least 1.
SYNCBN_HOST_DEVICE double divisor_of(double weight) {
  return weight < 1 ? 1 : weight;
}

SYNCBN_HOST_DEVICE Moments finalize(double shift, double sum, double sumsq, double divisor, double eps) {
  const double offset = sum / divisor;
  const double var = sumsq / divisor - offset * offset;
  const double clamped = var < 0 ? 0 : var;
  return {shift, offset, clamped, 1 / SYNCBN_SQRT(clamped + eps)};
}

// The n of the backward formula: the total weight over the weight of one of this rank's samples.
SYNCBN_HOST_DEVICE double effective_count(double weight, const Layout& layout, bool rank_weighted) {
  return divisor_of(rank_weighted ? weight * static_cast<double>(layout.outer * layout.inner) : weight);
}

// z = (x - hi) * scale + shift. The mean is hi + lo: hi is rounded to acc_t, so that x - hi is exact at mean >> std; lo is part of shift,
// because hi alone would waste the accuracy of the sums.
struct AffineParameters {
  double hi, lo, scale, shift;
};

template <typename acc_t>
SYNCBN_HOST_DEVICE AffineParameters affine_parameters(const Moments& m, double weight, double bias) {
  const double hi = static_cast<double>(static_cast<acc_t>(m.mean())), lo = m.rest(hi), scale = m.invstd * weight;
  return {hi, lo, scale, bias - lo * scale};
}

// How far the running statistics move towards the batch's, if `batches` were counted before.
SYNCBN_HOST_DEVICE double running_factor(bool cumulative, int64_t batches, double momentum) {
  return cumulative ? 1.0 / static_cast<double>((batches > 0 ? batches : 0) + 1) : momentum;
}

// From the biased variance of `count` samples to the unbiased one.
SYNCBN_HOST_DEVICE double unbiased_factor(double count) {
  return count / (count > 2 ? count - 1 : 1);
}

// old + factor * (next - old), computed from the nearer end: exact if the factor is 0 or 1.
SYNCBN_HOST_DEVICE double moved(double old, double next, double factor) {
  return factor < 0.5 ? old + factor * (next - old) : next - (1 - factor) * (next - old);
}

}  // namespace syncbn
