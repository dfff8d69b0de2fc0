// The emulated ops for ctypes, with the real launch configurations: each returns null or what went wrong.
#include <vector>

#include "launch.cuh"
#include "ops.h"
#include "scheduler.h"

using namespace syncbn;
using namespace syncbn::cuda;

namespace {

// Runs one op with a workspace of the documented size: counters zeroed once, partial sums and the memory after them poisoned.
template <class Args>
const char* run(cudaError_t (*op)(const Args&, const Target&), const Args& args, int sm_count, uint64_t seed) {
  constexpr size_t GUARD = 64;
  static std::string message;
  std::vector<unsigned char> workspace(workspace_bytes(sm_count) + GUARD, 0xff);
  std::fill_n(workspace.begin(), counter_bytes(sm_count), 0);
  emulation::seed(seed);
  void* const given = uses_workspace(args, sm_count) ? workspace.data() : nullptr;
  if (op(args, {sm_count, given, nullptr}) != cudaSuccess) return "the launcher refused its arguments";
  message = emulation::error();
  for (size_t i = 0; i < counter_bytes(sm_count); ++i) {
    if (workspace[i] != 0 && message.empty()) message = "a counter was not reset";
  }
  for (size_t i = 0; i < GUARD; ++i) {
    if (workspace[workspace_bytes(sm_count) + i] != 0xff && message.empty()) message = "workspace written out of bounds";
  }
  return message.empty() ? nullptr : message.c_str();
}

}  // namespace

extern "C" {

// For support/emulated.py, which mirrors the structs.
size_t emulated_sizes[] = {sizeof(StatsArgs), sizeof(NormalizeArgs), sizeof(BackwardReduceArgs), sizeof(BackwardInputArgs)};

const char* emulate_stats(const StatsArgs* args, int sm_count, uint64_t seed) { return run(stats, *args, sm_count, seed); }
const char* emulate_normalize(const NormalizeArgs* args, int sm_count, uint64_t seed) { return run(normalize, *args, sm_count, seed); }
const char* emulate_backward_reduce(const BackwardReduceArgs* args, int sm_count, uint64_t seed) {
  return run(backward_reduce, *args, sm_count, seed);
}
const char* emulate_backward_input(const BackwardInputArgs* args, int sm_count, uint64_t seed) {
  return run(backward_input, *args, sm_count, seed);
}
}
