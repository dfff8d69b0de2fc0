// normalize: y = activation((x - mean) * invstd * weight + bias + residual), and the moving statistics.
//
// The op runs from the end of memory, because stats() left that part in cache.
#include "activation.h"
#include "channels.h"
#include "finalize.h"
#include "mask.h"

namespace syncbn::cpu::SYNCBN_ISA {
namespace {

void update_running_stats(const NormalizeArgs& args) {
  double count = args.stats.data[3 * args.layout.C + stats_tail::samples];
  if (!(count > 0)) return;
  double factor = running_factor(args.cumulative, args.num_batches_tracked ? *args.num_batches_tracked : 0, args.momentum);
  if (args.num_batches_tracked) ++*args.num_batches_tracked;
  if (factor == 0) return;
  double unbiased = args.unbiased ? unbiased_factor(count) : 1;
  Finalize finalize(args.stats, args.layout.C);
  update(args.running_mean, args.layout.C, [=](int64_t c, double old) INLINED { return moved(old, finalize(c).mean(), factor); });
  update(args.running_var, args.layout.C, [=](int64_t c, double old) INLINED { return moved(old, finalize(c).var * unbiased, factor); });
}

template <typename scalar_t, Activation activation, bool has_residual>
void run(const NormalizeArgs& args) {
  using acc_t = acc_type<scalar_t>;
  constexpr bool masked = has_residual && needs_only_sign(activation);
  auto x = static_cast<const scalar_t*>(args.x), residual = static_cast<const scalar_t*>(args.residual);
  scalar_t* outputs[] = {static_cast<scalar_t*>(args.y)};
  uint8_t* mask = args.mask;
  Pack<acc_t> slope = acc_t(args.negative_slope);
  Affines<acc_t> affine(args);
  auto coefficients = [&](int64_t c, double* v) INLINED {
    Affine a = affine(c);
    v[HI] = a.hi, v[SCALE] = a.scale, v[SHIFT] = a.shift;
  };
  map_packs<scalar_t, 3>(args.layout, outputs, coefficients,
                         [=](int64_t f, auto lanes, const auto& p, const MaskPosition& position) INLINED {
                           Pack<acc_t> z = (load(x + f, lanes) - p.v[HI]) * p.v[SCALE] + p.v[SHIFT];
                           if constexpr (has_residual) z += load(residual + f, lanes);
                           if constexpr (masked) store_bits(mask, f, position, positive_bits(z), lanes);
                           return Packs<acc_t, 1>{activate<activation>(z, slope)};
                         });
}

template <typename scalar_t, bool has_residual>
auto choose(Activation activation) {
  SYNCBN_HAS_CODE_FOR(4);
  switch (activation) {
    case Activation::relu: return run<scalar_t, Activation::relu, has_residual>;
    case Activation::leaky_relu: return run<scalar_t, Activation::leaky_relu, has_residual>;
    case Activation::silu: return run<scalar_t, Activation::silu, has_residual>;
    default: return run<scalar_t, Activation::none, has_residual>;
  }
}

}  // namespace

void normalize(const NormalizeArgs& args) {
  verify(args.verification, args.stats.data + 3 * args.layout.C + stats_tail::tag);
  update_running_stats(args);
  // The padding of a row may end in a byte that the next row writes; that of the last row is written here.
  if (args.mask && numel(args.layout)) args.mask[mask_bytes(args.layout) - 1] = 0;
  with_dtype(args.dtype, [&](auto type) {
    using scalar_t = decltype(type);
    (args.residual ? choose<scalar_t, true>(args.activation) : choose<scalar_t, false>(args.activation))(args);
  });
}

}  // namespace syncbn::cpu::SYNCBN_ISA
