// Rows of a corpus, packed for a tile as product/pack.h packs a factor, with their lengths.
//
// Layout: panel[element][row], of kAcross rows: the tile's columns. Rows come by their addresses, so that those that
// are not to be found need not be read.
//
// Precision policy: elements are widened to float, which is exact. The square of a length is a sum of doubles. A row
// whose length, or the inverse of it, float products could not take is divided by its length as it is packed.
#pragma once

#include "product/tile.h"
#include "simd/sums.h"

namespace logitless::LL_ISA {
namespace {  // local to the kernel that includes this, as the kernel itself is

struct Int8 {
  int8_t value;
};

// As many bytes as there are float lanes.
typedef int8_t ByteVec __attribute__((vector_size(LL_BYTES / 4)));

inline constexpr int kAcross = kColumns<float>;

template <class S> LL_INLINE Vec<float> widened(const S* p) {
  if constexpr (__is_same(S, Int8)) {
    ByteVec bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, Vec<float>);
  } else {
    return load(p);
  }
}
template <class S> LL_INLINE float widened_one(S x) {
  if constexpr (__is_same(S, Int8))
    return x.value;
  else
    return widen(x);
}

template <class S> inline double squared_length(const S* row, int64_t depth) {
  constexpr int64_t kStep = 2 * kLanes<float>;
  DoubleSum<double> sums[4];
  int64_t i = 0;
  for (; i + kStep <= depth; i += kStep) {
    LL_UNROLL
    for (int half = 0; half < 2; ++half) {
      Vec<double> lower, upper;
      to_doubles(widened(row + i + half * kLanes<float>), lower, upper);
      sums[2 * half].add(lower * lower);
      sums[2 * half + 1].add(upper * upper);
    }
  }
  double rest = 0;
  for (; i < depth; ++i) rest += static_cast<double>(widened_one(row[i])) * widened_one(row[i]);
  return (sums[0].total() + sums[1].total()) + (sums[2].total() + sums[3].total()) + rest;
}

LL_INLINE double inverse_length(double squared) { return squared == 0 ? 0 : 1 / __builtin_sqrt(squared); }

// `count` rows, at most kAcross; lanes beyond are 0.
template <class S> inline void pack_rows(const S* const* rows, int64_t count, int64_t depth, float* panel) {
  int64_t done = 0;
#if defined(__AVX512F__)
  for (; done + 16 <= depth; done += 16) {
    for (int first = 0; first < kAcross; first += 16) {
      alignas(64) static constexpr uint32_t kNone[16] = {};
      alignas(64) float changed[16][16];
      const uint32_t* starts[16];
      LL_UNROLL
      for (int i = 0; i < 16; ++i) {
        if (first + i >= count) {
          starts[i] = kNone;
        } else if constexpr (__is_same(S, float)) {
          starts[i] = reinterpret_cast<const uint32_t*>(rows[first + i] + done);
        } else {
          store(changed[i], widened(rows[first + i] + done));
          starts[i] = reinterpret_cast<const uint32_t*>(changed[i]);
        }
      }
      __m512i out[16];
      transpose(starts, out);
      LL_UNROLL
      for (int k = 0; k < 16; ++k) _mm512_storeu_si512(panel + (done + k) * kAcross + first, out[k]);
    }
  }
#endif
  for (int i = 0; i < kAcross; ++i)
    for (int64_t k = done; k < depth; ++k) panel[k * kAcross + i] = i < count ? widened_one(rows[i][k]) : 0.0f;
}

// The same with the lengths: scores are sums of products times inverse[lane].
template <class S>
inline void pack_with_lengths(const S* const* rows, int64_t count, int64_t depth, bool normalized, float* panel,
                              float* inverse) {
  constexpr double kLeast = 1e-24, kMost = 1e24;
  pack_rows(rows, count, depth, panel);
  for (int i = 0; i < kAcross; ++i) inverse[i] = 1;
  for (int i = 0; i < count && !normalized; ++i) {
    const double squared = squared_length(rows[i], depth), by = inverse_length(squared);
    if (squared == 0 || (squared >= kLeast && squared <= kMost) || squared - squared != 0)
      inverse[i] = static_cast<float>(by);
    else
      for (int64_t k = 0; k < depth; ++k) panel[k * kAcross + i] = static_cast<float>(widened_one(rows[i][k]) * by);
  }
}

}  // namespace
}  // namespace logitless::LL_ISA
