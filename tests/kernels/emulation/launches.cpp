// Prints the launch of an op on SM_COUNT multiprocessors (the argument) for each line of its input: OP BYTES OUTER CHANNELS INNER ->
// threads of a block, blocks of a group, width of a tile, groups.
#include "walk.cuh"

#include <cstdio>
#include <cstring>

using namespace syncbn;
using namespace syncbn::cuda;

template <template <int> class PlanFor, int bytes>
Config config_of(const Layout& layout, int sm_count) {
  using Plan = PlanFor<bytes>;
  if (layout.inner == 1) return ColumnsOf<16 / bytes, Plan>::make_config(layout, Plan::sums, sm_count);
  return PlanesOf<16 / bytes, Plan>::make_config(layout, Plan::sums, sm_count);
}

template <template <int> class PlanFor>
Config config_of(int bytes, const Layout& layout, int sm_count) {
  return bytes == 2 ? config_of<PlanFor, 2>(layout, sm_count) : config_of<PlanFor, 4>(layout, sm_count);
}

int main(int, char** values) {
  const int sm_count = atoi(values[1]);
  char op[32];
  int bytes;
  long long outer, channels, inner;
  while (std::scanf("%31s %d %lld %lld %lld", op, &bytes, &outer, &channels, &inner) == 5) {
    const Layout layout{outer, channels, inner};
    const Config config = !std::strcmp(op, "stats")             ? config_of<StatsPlan>(bytes, layout, sm_count)
                          : !std::strcmp(op, "normalize")       ? config_of<NormalizePlan>(bytes, layout, sm_count)
                          : !std::strcmp(op, "backward_reduce") ? config_of<BackwardReducePlan>(bytes, layout, sm_count)
                                                                : config_of<BackwardInputPlan>(bytes, layout, sm_count);
    std::printf("%d %d %d %d\n", config.threads, config.splits, config.width, config.groups);
  }
}
