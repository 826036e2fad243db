// How the rows of two tensors of logits are cut into items of parallel work: the same for the measures of two rows and
// for their gradients.
//
// Layout: rows in lanes (inner stride 1) are taken in tiles of neighbouring rows. Few rows of many classes, as tiles of
// two linear heads' logits are, are taken together, and their classes cut into parts, each one stretch of memory.
#pragma once

#include "parallel.h"
#include "rows/lane_fold.h"
#include "rows/tile_rows.h"

namespace logitless::LL_ISA {
namespace {  // local to the kernel that includes this, as the kernel itself is

// `width` neighbouring rows, cut into tiles of at most `tile_width` rows and `parts` parts of the classes.
struct LaneTiles {
  int64_t classes, width, tile_width, parts;
  // Calls run(first_row, rows, part, begin_class, end_class) for each part of each tile; each(n, f) calls f(0) to f(n -
  // 1).
  template <class Each, class Run> LL_INLINE void for_each(const Each& each, const Run& run) const {
    const int64_t part_classes = parts == 1 ? classes : kLaneClasses;
    each(pieces(width, tile_width) * parts, [&](int64_t item) {
      const int64_t first = item / parts * tile_width, part = item % parts, begin = part * part_classes;
      run(first, smaller(width - first, tile_width), part, begin, smaller(begin + part_classes, classes));
    });
  }
};

// row(r) for `count` rows from `first` on, several in an item where they are short.
template <class Row> void for_rows(int64_t first, int64_t count, int64_t row_bytes, int threads, const Row& row) {
  constexpr int64_t kItemBytes = 128 * 1024;
  const int64_t per_item = bounded(kItemBytes / (row_bytes ? row_bytes : 1), 1, 64);
  parallel_stretches(count, per_item, threads, count * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row(first + r);
  });
}

// Calls in_lanes(outer, inner, width, parts, each) for all rows of a tile, where it takes the `width` rows from `inner`
// on of one outer index. It gives false where it has no memory for them, and has done nothing then: row(r) does them
// one by one. (A gradient may have taken the place of its logits, so nothing may be done twice.)
template <class InLanes, class Row>
void for_rows_in_lanes(const Tile& tile, int64_t tile_width, int64_t row_bytes, int threads, const InLanes& in_lanes,
                       const Row& row) {
  const int64_t bytes = row_count(tile) * row_bytes;
  // However many rows there are, a row of many classes is added up in parts: its sums do not depend on its neighbours.
  const int64_t parts = tile.classes > kLaneClasses ? pieces(tile.classes, kLaneClasses) : 1;
  if (parts > 1 && row_count(tile) <= kLanePartRows) {
    const auto each = [&](int64_t n, const auto& run) { parallel_for(n, threads, bytes, run); };
    for (int64_t outer = 0; outer < tile.outer; ++outer)
      if (!in_lanes(outer, 0, tile.inner, parts, each))
        for_rows(outer * tile.inner, tile.inner, row_bytes, threads, row);
    return;
  }
  const int64_t tiles = pieces(tile.inner, tile_width);
  const auto each = [](int64_t n, const auto& run) {
    for (int64_t i = 0; i < n; ++i) run(i);
  };
  parallel_for(tile.outer * tiles, threads, bytes, [&](int64_t item) {
    const int64_t outer = item / tiles, inner = item % tiles * tile_width;
    const int64_t width = smaller(tile.inner - inner, tile_width);
    if (in_lanes(outer, inner, width, parts, each)) return;
    for (int64_t i = 0; i < width; ++i) row(outer * tile.inner + inner + i);
  });
}

}  // namespace
}  // namespace logitless::LL_ISA
