// Whether all ranks have taken part in the same exchange: one thread of the launch compares the sums of the ranks' tags.
#pragma once

#include "walk.cuh"

namespace syncbn::cuda {

// The sums of the ranks' tags and of their squares. One thread loads them together with the first channel's statistics, whose latency hides
// theirs, and compares them after the block's barrier.
class TagSums {
  bool verifies_;
  double tag_ = 0, tag_squared_ = 0;

 public:
  __device__ TagSums(const Verification& verification, const Walk& walk, const double* sums)
      : verifies_(verification.alarm && walk.group == 0 && walk.split == 0 && threadIdx.x == 0) {
    if (!verifies_) return;
    tag_ = sums[0];
    tag_squared_ = sums[1];
  }

  // The alarm is in the host's memory, and the host reads it without waiting for the kernel: it may see the store late, but no half of it.
  __device__ void verify(const Verification& verification) const {
    if (verifies_ && !verification.holds(tag_, tag_squared_)) *static_cast<volatile int32_t*>(verification.alarm) = 1;
  }
};

}  // namespace syncbn::cuda
