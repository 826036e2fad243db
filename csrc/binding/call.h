// How Python calls a kernel: tensors arrive as addresses, and work that is long enough lets other Python threads run.
#pragma once

#include <cstdint>

#include "binding/python.h"
#include "kernels.h"

namespace logitless {

// A tensor's data; 0: not given.
using Address = std::uintptr_t;

template <class T> T* at(Address address) { return reinterpret_cast<T*>(address); }

inline constexpr std::int64_t kReleaseAt = 16384;  // elements from which releasing the GIL is worth its time

template <class Work> void without_gil(std::int64_t elements, const Work& work) {
  if (elements < kReleaseAt) return work();
  const GilReleased released;
  work();
}

inline std::int64_t elements_of(const Tile& tile) { return tile.outer * tile.inner * tile.classes; }

}  // namespace logitless
