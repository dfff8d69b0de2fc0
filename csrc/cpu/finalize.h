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
    if (vector.stride != 1) {
      for (int64_t c = 0; c < C; ++c) assign(data[c * vector.stride], f(c, to_double(data[c * vector.stride])));
      return;
    }
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
        if (vector.stride != 1) {
          for (int64_t c = 0; c < C; ++c) to[c] = to_double(data[c * vector.stride]);
          return;
        }
#pragma GCC ivdep
        for (int64_t c = 0; c < C; ++c) to[c] = to_double(data[c]);
      });
  }
};

// `tag_sums` are the sums over the ranks of the tags and of their squares.
inline void verify(const Verification& verification, const double* tag_sums) {
  if (verification.alarm && !verification.holds(tag_sums[0], tag_sums[1])) *verification.alarm = 1;
}

struct Moments {
  double shift, offset, var, invstd;  // var is biased

  INLINE double mean() const { return shift + offset; }
};

class Finalize {
  const double *shift_, *sum_, *sumsq_;
  double weight_, eps_;

 public:
  Finalize(const Statistics& stats, int64_t C)
      : shift_(stats.data), sum_(stats.data + C), sumsq_(stats.data + 2 * C), weight_(stats.data[3 * C + stats_tail::weight]), eps_(stats.eps) {
    weight_ = weight_ < 1 ? 1 : weight_;
  }
  INLINE Moments operator()(int64_t c) const {
    double offset = sum_[c] / weight_, var = sumsq_[c] / weight_ - offset * offset;
    var = var < 0 ? 0 : var;  // NaN stays
    return {shift_[c], offset, var, 1 / __builtin_sqrt(var + eps_)};
  }
};

// What z = (x - HI) * SCALE + SHIFT takes. The mean is HI plus a rest that SHIFT takes up: x - HI comes before any product.
enum { HI, SCALE, SHIFT };

struct Affine {
  double invstd, hi, lo, scale, shift;
};

template <typename acc_t> class Affines {
  Finalize finalize_;
  Doubles weight_, bias_;

 public:
  template <class Args> explicit Affines(const Args& args)
      : finalize_(args.stats, args.layout.C), weight_(args.weight, args.layout.C, 1), bias_(args.bias, args.layout.C, 0) {}
  INLINE Affine operator()(int64_t c) const {
    Moments m = finalize_(c);
    double hi = double(acc_t(m.mean())), lo = (m.shift - hi) + m.offset;  // not mean - hi, which is 0 where acc_t is double
    double scale = m.invstd * weight_[c];
    return {m.invstd, hi, lo, scale, bias_[c] - lo * scale};
  }
};

}  // namespace syncbn::cpu::SYNCBN_ISA
