// The four CUDA ops as plain functions: each launches one kernel on `target.stream` and returns the launch's error.
#pragma once

#include <cuda_runtime_api.h>

#include "../args.h"

namespace syncbn::cuda {

// Where to launch. The workspace (launch.cuh) belongs to one stream, and to one kernel of it at a time: a launch that starts before the
// one before it has ended (programmatic dependent launch) would need a second workspace. The counters in it are 0 before the first
// launch and after each.
struct Target {
  int sm_count;
  void* workspace;
  cudaStream_t stream;
};

// Whether an op's blocks share sums or counters in the workspace; if not, target.workspace may be null.
bool uses_workspace(const StatsArgs& args, int sm_count);
bool uses_workspace(const NormalizeArgs& args, int sm_count);
bool uses_workspace(const BackwardReduceArgs& args, int sm_count);
inline bool uses_workspace(const BackwardInputArgs&, int) { return false; }

cudaError_t stats(const StatsArgs& args, const Target& target);
cudaError_t normalize(const NormalizeArgs& args, const Target& target);
cudaError_t backward_reduce(const BackwardReduceArgs& args, const Target& target);
cudaError_t backward_input(const BackwardInputArgs& args, const Target& target);

}  // namespace syncbn::cuda
