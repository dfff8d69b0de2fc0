// From the summed statistics to what the loops need: a few numbers of acc_t for each channel. Where a channel has few samples, this
// is a good part of an op's time: so the loops over channels are such that they can be vectorized.
#pragma once

#include "traverse.h"

namespace syncbn::cpu::SYNCBN_ISA {

INLINE double to_double(float v) { return v; }
INLINE double to_double(double v) { return v; }
INLINE double to_double(float16 v) { return to_float(v); }
INLINE double to_double(bfloat16 v) { return to_float(v); }
INLINE void assign(float& to, double v) { to = float(v); }
INLINE void assign(double& to, double v) { to = v; }
INLINE void assign(float16& to, double v) { to = to_float16(float(v)); }
INLINE void assign(bfloat16& to, double v) { to = to_bfloat16(float(v)); }

// vector[c] = f(c, vector[c]) in float64; nothing where the vector is absent.
template <typename F> INLINE void update(ChannelVector vector, int64_t C, F f) {
  if (!vector.data) return;
  with_dtype(vector.dtype, [&](auto type) {
    auto data = static_cast<decltype(type)*>(vector.data);
#pragma GCC ivdep
    for (int64_t c = 0; c < C; ++c) assign(data[c], f(c, to_double(data[c])));
  });
}

// [C] in float64; `absent` where the vector is absent.
struct Doubles : Buffer<double> {
  Doubles(ChannelVector vector, int64_t C, double absent) : Buffer(C) {
    double* to = *this;
    if (!vector.data)
      for (int64_t c = 0; c < C; ++c) to[c] = absent;
    else
      with_dtype(vector.dtype, [&](auto type) {
        auto data = static_cast<const decltype(type)*>(vector.data);
#pragma GCC ivdep
        for (int64_t c = 0; c < C; ++c) to[c] = to_double(data[c]);
      });
  }
};

struct Moments {
  double mean, var, invstd;  // var is biased
};

class Finalize {
  const double *sum_, *sumsq_;
  double weight_, eps_;

 public:
  Finalize(const Statistics& stats, int64_t C) : sum_(stats.data), sumsq_(stats.data + C), eps_(stats.eps) {
    double weight = stats.data[2 * C + stats.rank_weighted];
    weight_ = weight < 1 ? 1 : weight;
  }
  INLINE Moments operator()(int64_t c) const {
    double mean = sum_[c] / weight_, var = sumsq_[c] / weight_ - mean * mean;
    var = var < 0 ? 0 : var;  // NaN stays
    return {mean, var, 1 / __builtin_sqrt(var + eps_)};
  }
};

// What z = (x - HI) * SCALE + SHIFT takes. The mean is HI plus a rest that SHIFT takes up: x - HI comes before any product.
enum { HI, SCALE, SHIFT };

struct Affine {
  double mean, invstd, hi, lo, scale, shift;
};

template <typename acc_t> class Affines {
  Finalize finalize_;
  Doubles weight_, bias_;

 public:
  template <class Args> explicit Affines(const Args& args)
      : finalize_(args.stats, args.layout.C), weight_(args.weight, args.layout.C, 1), bias_(args.bias, args.layout.C, 0) {}
  INLINE Affine operator()(int64_t c) const {
    Moments m = finalize_(c);
    double hi = double(acc_t(m.mean)), lo = m.mean - hi, scale = m.invstd * weight_[c];
    return {m.mean, m.invstd, hi, lo, scale, bias_[c] - lo * scale};
  }
};

}  // namespace syncbn::cpu::SYNCBN_ISA
