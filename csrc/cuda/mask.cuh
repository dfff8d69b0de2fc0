// The bit mask of syncbn/layout.py: element f of memory, in row p, has bit f + 8 p. Rows share no byte.
#pragma once

#include "launch.cuh"

namespace syncbn::cuda {

// Each valid lane contributes VECTOR_WIDTH bits of mask[byte], from bit f % 8 on. 8 / VECTOR_WIDTH neighbouring lanes share a byte. All
// lanes of the warp must call this.
template <int VECTOR_WIDTH>
__device__ inline void store_bits(uint8_t* mask, int64_t byte, int64_t f, unsigned bits, bool valid) {
  constexpr unsigned present = 0x100;  // set if any lane is valid
  unsigned word = valid ? bits << (f & 7) | present : 0;
#pragma unroll
  for (int offset = 1; offset < 8 / VECTOR_WIDTH; offset *= 2) word |= __shfl_xor_sync(ALL_LANES, word, offset);
  if (word & present && threadIdx.x % (8 / VECTOR_WIDTH) == 0) mask[byte] = static_cast<uint8_t>(word);
}

}  // namespace syncbn::cuda
