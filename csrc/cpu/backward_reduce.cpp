// backward_reduce: sum_dy = Σ dz and sum_dy_xhat = Σ dz xhat of each channel.
//
// Σ dz (x - hi) is added up in acc_t within a chunk, and in float64 over chunks; then lo Σ dz is subtracted for the rest of the mean.
#include "activation.h"
#include "channels.h"
#include "finalize.h"
#include "mask.h"

namespace syncbn::cpu::SYNCBN_ISA {
namespace {

template <typename scalar_t, class ActivationGradient>
void run(const BackwardReduceArgs& args, const ActivationGradient& gradient) {
  using acc_t = acc_type<scalar_t>;
  using P = Pack<acc_t>;
  auto x = static_cast<const scalar_t*>(args.x);
  Affines<acc_t> affine(args);
  auto coefficients = [&](int64_t c, double* v) INLINED {
    Affine a = affine(c);
    v[HI] = a.hi, v[SCALE] = a.scale, v[SHIFT] = a.shift;
  };
  auto add_pack = [=](int64_t e, auto lanes, const auto& p, auto position, P& s1, P& s2) INLINED {
    P xmu = load(x + e, lanes) - p.v[HI];
    auto bits = [&](const uint8_t* mask) INLINED { return read_bits(mask, e, position, lanes); };
    P dz = keep(gradient(e, lanes, xmu, p.v[SCALE], p.v[SHIFT], bits), lanes);
    s1 += dz;
    s2 += dz * keep(xmu, lanes);
  };
  sum_packs<acc_t, 3, ActivationGradient::masked>(args.layout, args.sums, coefficients, add_pack);
  double *sum_dy = args.sums, *sum_dy_xhat = args.sums + args.layout.C;
#pragma GCC ivdep
  for (int64_t c = 0; c < args.layout.C; ++c) {
    Affine a = affine(c);
    sum_dy_xhat[c] = (sum_dy_xhat[c] - a.lo * sum_dy[c]) * a.invstd;
  }
}

}  // namespace

void backward_reduce(const BackwardReduceArgs& args) {
  with_dtype(args.dtype,
             [&](auto type) { with_gradient<decltype(type)>(args, [&](const auto& gradient) { run<decltype(type)>(args, gradient); }); });
  args.sums[2 * args.layout.C + sums_tail::tag] = args.tag;
  args.sums[2 * args.layout.C + sums_tail::tag_squared] = args.tag * args.tag;
  const double *sum_dy = args.sums, *sum_dy_xhat = args.sums + args.layout.C;
  update(args.dbias, args.layout.C, [=](int64_t c, double) INLINED { return sum_dy[c]; });
  update(args.dweight, args.layout.C, [=](int64_t c, double) INLINED { return sum_dy_xhat[c]; });
}

}  // namespace syncbn::cpu::SYNCBN_ISA
