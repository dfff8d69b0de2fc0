// The sums over the slots of all ranks, in rank order.
#pragma once

#include <algorithm>
#include <cstring>

#include "../args.h"
#include "shared_memory_layout.h"

namespace syncbn::shared_memory {

constexpr int kStatsTail = stats_tail::numel;

// A piece of an exchange: `size` values, or the channels [first, first + size) of statistics. Those lie in a slot as
// [the tail of `stats`, shift(size), sum(size), sumsq(size)].
struct Piece {
  int64_t channels, total, first, size;

  Piece(int64_t count, int64_t channels, int64_t first)
      : channels(channels),
        total(channels ? channels : count),
        first(first),
        size(std::min<int64_t>(total - first, channels ? (kSlotValues - kStatsTail) / 3 : kSlotValues)) {}

  bool is_last() const { return first + size == total; }

  void write(const double* values, double* slot) const {
    if (!channels) {
      memcpy(slot, values + first, size * sizeof(double));
      return;
    }
    memcpy(slot, values + 3 * channels, kStatsTail * sizeof(double));
    for (int part = 0; part < 3; ++part) {
      memcpy(slot + kStatsTail + part * size, values + part * channels + first, size * sizeof(double));
    }
  }
  void read(const double* slot, double* values) const {
    if (!channels) {
      memcpy(values + first, slot, size * sizeof(double));
      return;
    }
    // The tail is read with the last piece, because `write` sends this rank's own with each.
    if (is_last()) memcpy(values + 3 * channels, slot, kStatsTail * sizeof(double));
    for (int part = 0; part < 3; ++part) {
      memcpy(values + part * channels + first, slot + kStatsTail + part * size, size * sizeof(double));
    }
  }
};

// Adds [begin, end) of what all ranks have published, in rank order, into `out`, which is laid out as a slot.
inline void add(const Memory& memory, uint64_t epoch, int64_t begin, int64_t end, double* __restrict out) {
  memcpy(out + begin, memory.slot(0, epoch).values + begin, (end - begin) * sizeof(double));
  for (int rank = 1; rank < memory.ranks(); ++rank) {
    const double* __restrict in = memory.slot(rank, epoch).values;
    for (int64_t i = begin; i < end; ++i) out[i] += in[i];
  }
}

// The same for statistics: the sums of each rank are moved from its shift to that of the first rank with samples.
inline void merge(const Memory& memory, uint64_t epoch, int64_t size, int64_t begin, int64_t end, double* __restrict out) {
  int first = 0;
  while (first + 1 < memory.ranks() && !(memory.slot(first, epoch).values[stats_tail::samples] > 0)) ++first;
  if (!(memory.slot(first, epoch).values[stats_tail::samples] > 0)) first = 0;  // no rank has samples
  double* __restrict shift = out + kStatsTail;
  double* __restrict sum = shift + size;
  double* __restrict sumsq = sum + size;
  memcpy(shift + begin, memory.slot(first, epoch).values + kStatsTail + begin, (end - begin) * sizeof(double));
  std::fill(sum + begin, sum + end, 0.0);
  std::fill(sumsq + begin, sumsq + end, 0.0);
  for (int rank = 0; rank < memory.ranks(); ++rank) {
    const double* __restrict in = memory.slot(rank, epoch).values;
    const double weight = in[stats_tail::weight];
    const double *in_shift = in + kStatsTail, *in_sum = in_shift + size, *in_sumsq = in_sum + size;
    for (int64_t c = begin; c < end; ++c) {
      const double d = in_shift[c] - shift[c];
      sum[c] += in_sum[c] + weight * d;
      sumsq[c] += in_sumsq[c] + d * (2 * in_sum[c] + weight * d);
    }
  }
}

// Writes segment `part` of the `parts` of a piece to `out`, which is laid out as a slot.
inline void combine(const Memory& memory, uint64_t epoch, const Piece& piece, int part, int parts, double* out) {
  const int64_t begin = piece.size * part / parts, end = piece.size * (part + 1) / parts;
  if (!piece.channels) return add(memory, epoch, begin, end, out);
  if (part == 0) add(memory, epoch, 0, kStatsTail, out);
  merge(memory, epoch, piece.size, begin, end, out);
}

}  // namespace syncbn::shared_memory
