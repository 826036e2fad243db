// The rows of a Tile: where they lie, and which of their targets are classes.
#pragma once

#include "kernels.h"
#include "simd/vec.h"

namespace logitless::LL_ISA {

// Where row r begins in a tensor of these strides, in elements.
LL_INLINE int64_t row_offset(const Tile& tile, int64_t r, int64_t outer_stride, int64_t inner_stride) {
  if (tile.inner == 1) return r * outer_stride;  // a division costs as much as a vector of exponentials
  return r / tile.inner * outer_stride + r % tile.inner * inner_stride;
}

LL_INLINE int64_t row_count(const Tile& tile) { return tile.outer * tile.inner; }

// The first row whose target is neither a class nor to be ignored; -1 where there is none, or no target.
inline int64_t first_bad_row(const Tile& tile, const int64_t* target, int64_t ignore_index) {
  const int64_t rows = target ? row_count(tile) : 0;
  constexpr int64_t L = kLanes<double>;
  // A vector at a time, whether there is any.
  IntVec<double> bad{};
  int64_t r = 0;
  for (; r + L <= rows; r += L) {
    IntVec<double> t;
    memcpy(&t, target + r, LL_BYTES);
    bad |= (t != ignore_index) & ((t < 0) | (t >= tile.classes));
  }
  int64_t any = 0;
  for (int64_t i = 0; i < L; ++i) any |= bad[i];
  for (r = any ? 0 : r; r < rows; ++r)
    if (target[r] != ignore_index && (target[r] < 0 || target[r] >= tile.classes)) return r;
  return -1;
}

}  // namespace logitless::LL_ISA
