// Work that other Python threads need not wait for.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace logitless {

inline constexpr std::int64_t kReleaseAt = 16384;  // elements from which releasing the GIL is worth its time

template <class Work> void without_gil(std::int64_t elements, const Work& work) {
  if (elements < kReleaseAt) return work();
  const nanobind::gil_scoped_release release;
  work();
}

}  // namespace logitless
