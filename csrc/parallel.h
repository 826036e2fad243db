// Parallel loops over torch's own OpenMP pool, and how work is cut for them.
//
// Results never depend on the number of threads: work is cut into items by shape alone, and items share nothing.
#pragma once

#include "kernels.h"
#include "simd/vec.h"

namespace logitless::LL_ISA {

LL_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LL_INLINE int64_t bounded(int64_t x, int64_t least, int64_t most) { return x < least ? least : x > most ? most : x; }
// How many pieces of `each` it takes to cover `count`.
LL_INLINE int64_t pieces(int64_t count, int64_t each) { return (count + each - 1) / each; }

// Below this many bytes of traffic a parallel region costs more than it gains.
inline constexpr int64_t kSerialBytes = 64 * 1024;

// Of `total` bytes, those of one item: `most` where there are many, else less, so that several threads have some.
LL_INLINE int64_t item_bytes(int64_t total, int64_t most) {
  constexpr int64_t kLeast = 16 * 1024, kItems = 16;
  const int64_t share = total / kItems;
  return share < kLeast ? kLeast : share > most ? most : share;
}

// How many rows ahead of the one at hand memory is asked for: about 4 KB, so that it arrives while those between are
// computed.
LL_INLINE int64_t rows_ahead(int64_t row_bytes) { return 1 + 4096 / row_bytes; }

// How far ahead of the logit at hand memory is asked for in long rows, in bytes: more than a core reads while one line
// arrives, and a part of the first cache. Half of it leaves a core waiting, twice as much gains nothing.
inline constexpr int64_t kLongAhead = 8192;

// Asks for what lies kLongAhead after `count` elements, which may be beyond the end of all of them.
template <class T> LL_INLINE void ask_ahead(const T* p, int64_t count) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(reinterpret_cast<const char*>(p + i) + kLongAhead);
}

// run(i) for i from 0 to items - 1; `bytes`: the traffic of all of them.
template <class F> LL_INLINE void parallel_for(int64_t items, int threads, int64_t bytes, const F& run) {
  if (threads <= 1 || items <= 1 || bytes < kSerialBytes || must_be_serial()) {
    for (int64_t i = 0; i < items; ++i) run(i);
    return;
  }
  note_parallel_region();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < items; ++i) run(i);
}

// run(begin, end) for stretches of at most `per_item` of `count` rows.
template <class F>
LL_INLINE void parallel_stretches(int64_t count, int64_t per_item, int threads, int64_t bytes, const F& run) {
  parallel_for(pieces(count, per_item), threads, bytes,
               [&](int64_t item) { run(item * per_item, smaller((item + 1) * per_item, count)); });
}

}  // namespace logitless::LL_ISA
