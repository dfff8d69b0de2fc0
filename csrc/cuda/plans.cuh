// A Plan: how an op fills the machine. Chosen at build time, by the bytes of an element of x.
//
//   planes_blocks, columns_blocks   blocks that are resident on an SM: their number bounds a thread's registers, and must not make it
//                                   spill. 4 blocks leave 64 registers, 3 leave 80, 2 leave 128; sums in double need more.
//   planes_unroll, columns_unroll   vectors of each tensor that a thread loads in one step, before it uses the first
//                                   (but for the residual in the backward ops)
//   columns_width                   vectors of 16 bytes in a tile of channels, at most: a power of 2 up to 8, a memory line
//   reversed                        the blocks walk from the last element to the first
//   sums                            the op adds up: its blocks have shared memory for that
//
// Little's law asks for 18 KB (H100) to 25 KB (H200) in flight per SM. An SM can have blocks x 256 threads x unroll x 16 B in flight for
// each tensor that an op reads. In Columns a thread keeps the parameters of up to 8 channels in registers, so fewer blocks fit.
// normalize and backward_input run in reverse: the elements that the reduction before them read last are still in L2.
//
// A build can take other Plans from a header that defines SYNCBN_PLANS and the four templates below, and SYNCBN_MAX_BLOCKS_PER_SM
// (launch.cuh) if one of them asks for more than 4 blocks. The environment variable SYNCBN_PLANS names that header to setup.py and to the
// tests of the kernels; a compiler that is called by hand takes it with -include.
#pragma once

#ifndef SYNCBN_PLANS

namespace syncbn::cuda {

template <int bytes>
struct StatsPlan {
  static constexpr int planes_blocks = bytes < 8 ? 3 : 2, planes_unroll = 4;
  static constexpr int columns_blocks = bytes == 4 ? 3 : 2, columns_unroll = 4, columns_width = 8;
  static constexpr bool reversed = false, sums = true;
};

template <int bytes>
struct NormalizePlan {
  static constexpr int planes_blocks = bytes < 8 ? 4 : 3, planes_unroll = 2;
  static constexpr int columns_blocks = bytes == 4 ? 3 : 2, columns_unroll = bytes == 4 ? 2 : 4, columns_width = 8;
  static constexpr bool reversed = true, sums = false;
};

template <int bytes>
struct BackwardReducePlan {
  static constexpr int planes_blocks = bytes < 8 ? 3 : 2, planes_unroll = 2;
  static constexpr int columns_blocks = bytes == 4 ? 3 : 2, columns_unroll = 2, columns_width = 8;
  static constexpr bool reversed = false, sums = true;
};

template <int bytes>
struct BackwardInputPlan {
  static constexpr int planes_blocks = bytes < 8 ? 4 : 3, planes_unroll = 2;
  static constexpr int columns_blocks = 2, columns_unroll = 2, columns_width = 8;
  static constexpr bool reversed = true, sums = false;
};

}  // namespace syncbn::cuda

#endif
