// Which of the compiled instruction sets runs: the widest that this CPU has, or at most the one that was asked for.
#include <cstring>

#include "ops.h"

#define DECLARE(isa)                                                                \
  namespace isa {                                                                   \
  void stats(const StatsArgs&);                                                     \
  void normalize(const NormalizeArgs&);                                             \
  void backward_reduce(const BackwardReduceArgs&);                                  \
  void backward_input(const BackwardInputArgs&);                                    \
  constexpr Kernels table{#isa, stats, normalize, backward_reduce, backward_input}; \
  }

namespace syncbn::cpu {

DECLARE(baseline)
#if defined(SYNCBN_X86)
DECLARE(avx2)
DECLARE(avx512)
#endif

namespace {

// Widest first.
const Kernels* const tables[] = {
#if defined(SYNCBN_X86)
    &avx512::table, &avx2::table,
#endif
    &baseline::table};

// avx512 is for CPUs that convert to bfloat16 in one instruction: AVX-512 does not slow the clock of Zen 4, Sapphire Rapids and later
// ones. Cooper Lake is the only other one.
bool runs_here([[maybe_unused]] const Kernels& table) {
#if defined(SYNCBN_X86)
  bool v3 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512bf16");
  if (&table == &avx512::table) return v4;
  if (&table == &avx2::table) return v3;
#endif
  return true;
}

const Kernels* widest(const char* at_most) {
  bool allowed = at_most == nullptr;
  for (const Kernels* table : tables) {
    allowed = allowed || strcmp(table->name, at_most) == 0;
    if (allowed && runs_here(*table)) return table;
  }
  return nullptr;
}

const Kernels* current = widest(nullptr);

}  // namespace

const Kernels& kernels() { return *current; }

}  // namespace syncbn::cpu

// Limits the instruction set to `at_most`, unless that is null, and returns the name of the one in use; null if none has that name.
extern "C" __attribute__((visibility("default"))) const char* syncbn_cpu_isa(const char* at_most) {
  using namespace syncbn::cpu;
  const Kernels* table = at_most ? widest(at_most) : current;
  if (!table) return nullptr;
  current = table;
  return table->name;
}
