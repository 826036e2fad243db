// Parallel loops over torch's own OpenMP pool.
//
// Results never depend on the number of threads: work is cut into items by shape alone, and items share nothing.
#pragma once

#include "kernels.h"
#include "simd/vec.h"

namespace logitless::LL_ISA {

// Below this many bytes of traffic a parallel region costs more than it gains.
inline constexpr int64_t kSerialBytes = 64 * 1024;

// Of `total` bytes, those of one item: `most` where there are many, else less, so that several threads have some.
LL_INLINE int64_t item_bytes(int64_t total, int64_t most) {
  constexpr int64_t kLeast = 16 * 1024, kItems = 16;
  const int64_t share = total / kItems;
  return share < kLeast ? kLeast : share > most ? most : share;
}

// Short rows are asked for as many ahead, so that memory is waited for while the ones at hand are computed.
LL_INLINE int64_t rows_ahead(int64_t row_bytes) { return 1 + 4096 / row_bytes; }

template <class F> LL_INLINE void parallel_for(int64_t items, int threads, int64_t bytes, const F& run) {
  if (threads <= 1 || items <= 1 || bytes < kSerialBytes || must_be_serial()) {
    for (int64_t i = 0; i < items; ++i) run(i);
    return;
  }
  note_parallel_region();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < items; ++i) run(i);
}

}  // namespace logitless::LL_ISA
