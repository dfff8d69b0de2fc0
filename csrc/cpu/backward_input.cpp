// backward_input: dx = weight * invstd * (dz - sum_dy / n - xhat * sum_dy_xhat / n), and dz if a residual
// was added before an activation.
//
// dx is dz * SCALE - (x - HI) * OF_X + OFFSET, with parameters that are computed once for each channel, in float64. The op runs from the
// end of memory, because backward_reduce() left that part in cache.
#include "activation.h"
#include "channels.h"
#include "finalize.h"
#include "mask.h"

namespace syncbn::cpu::SYNCBN_ISA {
namespace {

enum { OF_X = SHIFT + 1, OFFSET };

template <typename scalar_t, class ActivationGradient>
void run(const BackwardInputArgs& args, const ActivationGradient& gradient) {
  using acc_t = acc_type<scalar_t>;
  auto x = static_cast<const scalar_t*>(args.x);
  constexpr int OUTPUTS = ActivationGradient::adds ? 2 : 1;
  scalar_t* outputs[OUTPUTS];
  outputs[0] = static_cast<scalar_t*>(args.dx);
  if constexpr (OUTPUTS > 1) outputs[1] = static_cast<scalar_t*>(args.dz);
  Affines<acc_t> affine(args);
  double n = effective_count(args.stats.data[3 * args.layout.C + stats_tail::weight], args.layout, args.rank_weighted);
  const double *sum_dy = args.sums, *sum_dy_xhat = args.sums + args.layout.C;
  auto coefficients = [&](int64_t c, double* v) INLINED {
    Affine a = affine(c);
    double of_x = a.scale * a.invstd * sum_dy_xhat[c] / n;
    v[HI] = a.hi, v[SCALE] = a.scale, v[SHIFT] = a.shift, v[OF_X] = of_x, v[OFFSET] = a.lo * of_x - a.scale * sum_dy[c] / n;
  };
  map_packs<scalar_t, 5>(args.layout, outputs, coefficients,
                         [=](int64_t e, auto lanes, const auto& p, const MaskPosition& position) INLINED {
                           Pack<acc_t> xmu = load(x + e, lanes) - p.v[HI];
                           auto bits = [&](const uint8_t* mask) INLINED { return read_bits(mask, e, position, lanes); };
                           Pack<acc_t> dz = gradient(e, lanes, xmu, p.v[SCALE], p.v[SHIFT], bits);
                           Packs<acc_t, OUTPUTS> out;
                           out.v[0] = dz * p.v[SCALE] - xmu * p.v[OF_X] + p.v[OFFSET];
                           if constexpr (OUTPUTS > 1) out.v[1] = dz;
                           return out;
                         });
}

}  // namespace

void backward_input(const BackwardInputArgs& args) {
  verify(args.verification, args.sums + 2 * args.layout.C + sums_tail::tag);
  with_dtype(args.dtype,
             [&](auto type) { with_gradient<decltype(type)>(args, [&](const auto& gradient) { run<decltype(type)>(args, gradient); }); });
}

}  // namespace syncbn::cpu::SYNCBN_ISA
