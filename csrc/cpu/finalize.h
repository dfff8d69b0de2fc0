// From the group's sums to the parameters of the loops for each channel, in float64 (../formulas.h). With few samples per channel this
// dominates an op's time, so the per-channel loops are written to vectorize.
#pragma once

#include "../formulas.h"
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

// vector[c] = f(c, vector[c]) in float64; does nothing if the vector is absent.
template <typename F>
INLINE void update(ChannelVector vector, int64_t C, F f) {
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

// A vector [C] in float64; filled with `absent` if it is absent.
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

// Sets the alarm unless all ranks have sent this tag. `tag_sums` are the sums of the ranks' tags and of their squares.
inline void verify(const Verification& verification, const double* tag_sums) {
  if (verification.alarm && !verification.holds(tag_sums[0], tag_sums[1])) *verification.alarm = 1;
}

// The moments of each channel.
class Finalize {
  const double *shift_, *sum_, *sumsq_;
  double divisor_, eps_;

 public:
  Finalize(const Statistics& stats, int64_t C)
      : shift_(stats.data),
        sum_(stats.data + C),
        sumsq_(stats.data + 2 * C),
        divisor_(divisor_of(stats.data[3 * C + stats_tail::weight])),
        eps_(stats.eps) {}
  INLINE Moments operator()(int64_t c) const { return finalize(shift_[c], sum_[c], sumsq_[c], divisor_, eps_); }
};

// The parameters of z = (x - HI) * SCALE + SHIFT, in the order of the tables: see AffineParameters.
enum { HI, SCALE, SHIFT };

struct Affine : AffineParameters {
  double invstd;
};

template <typename acc_t>
class Affines {
  Finalize finalize_;
  Doubles weight_, bias_;

 public:
  template <class Args>
  explicit Affines(const Args& args)
      : finalize_(args.stats, args.layout.C), weight_(args.weight, args.layout.C, 1), bias_(args.bias, args.layout.C, 0) {}
  INLINE Affine operator()(int64_t c) const {
    Moments m = finalize_(c);
    return {affine_parameters<acc_t>(m, weight_[c], bias_[c]), m.invstd};
  }
};

}  // namespace syncbn::cpu::SYNCBN_ISA
