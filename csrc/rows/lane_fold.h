// The fold of rows that lie in lanes: (N, C, d1, ...) needs no permuted copy.
//
// Formula and precision policy: those of row_state.h, one row a lane.
//
// Layout: neighbouring rows lie next to each other in memory, and their next classes a stride further. A vector has one
// class of L rows; several vectors of rows are taken together, so that a class is read as one stretch.
//
// Steps: 1. The first class of all rows becomes their tops. 2. Eight classes of a vector of rows after the other, whose
// state is loaded once for them. 3. Each lane is finished as a row.
#pragma once

#include "rows/row_state.h"

namespace logitless::LL_ISA {

// Rows in lanes of more classes are cut into parts of as many classes, where they are no more than kLanePartRows.
inline constexpr int64_t kLaneClasses = 8192;
inline constexpr int64_t kLanePartRows = 4096;

// As many classes ahead are asked for: the next classes of the same rows are far apart in memory, and the processor
// does not foresee them.
inline constexpr int64_t kLaneAhead = 8;

// Rows next to each other in memory, with what lies beside them.
template <class T> struct LaneView {
  const T* logits;
  int64_t class_stride;
  const Compute<T>* weight = nullptr;
  const T* dense = nullptr;
  int64_t dense_stride = 1;
};

// Whether rows of these strides are taken in lanes: where a class has room for enough of them. How many there are is
// not asked, so that a row's sums do not depend on it.
template <class T> LL_INLINE bool lie_in_lanes(int64_t class_stride, int64_t inner_stride) {
  return inner_stride == 1 && class_stride >= kLanes<Compute<T>> / 2;
}

// Folds classes [begin, end) of `width` rows, at most kTileVectors vectors of them, and gives each row's sums to
// `done`.
template <class T, int Flags, int kTileVectors, class TargetLogit, class Done>
LL_INLINE void fold_lanes(const LaneView<T>& rows, int64_t width, int64_t begin, int64_t end,
                          const TargetLogit& target_logit, const Done& done) {
  using Real = Compute<T>;
  constexpr int L = kLanes<Real>;
  const int vectors = static_cast<int>((width + L - 1) / L);
  RowState<Real, Flags, true> states[kTileVectors];
  if constexpr ((Flags & kToken) != 0)
    for (int64_t i = 0; i < width; ++i) states[i / L].target_logit[i % L] = target_logit(i);
  // K classes from c on, of every vector of rows.
  const auto step = [&](auto count, auto first, int64_t c) {
    constexpr int K = decltype(count)::value;
    for (int v = 0; v < vectors; ++v) {
      const int64_t valid = width - v * L;
      const auto get = [&](const T* p) { return valid >= L ? load(p) : load_partial(p, valid, Real(0)); };
      Vec<Real> zs[K], ws[K], ts[K];
      LL_UNROLL
      for (int k = 0; k < K; ++k) {
        __builtin_prefetch(rows.logits + (c + k + kLaneAhead) * rows.class_stride + v * L);
        zs[k] = get(rows.logits + (c + k) * rows.class_stride + v * L);
        if constexpr ((Flags & (kSmooth | kDense)) != 0)
          ws[k] = splat<Real>(rows.weight ? rows.weight[c + k] : Real(1));
        if constexpr ((Flags & kDense) != 0) ts[k] = get(rows.dense + (c + k) * rows.dense_stride + v * L);
      }
      states[v].template step<K, decltype(first)::value>(zs, ws, ts, c);
    }
  };
  // 1.
  step(Constant<1>{}, Constant<true>{}, begin);
  // 2.
  int64_t c = begin + 1;
  for (; c + 8 <= end; c += 8) step(Constant<8>{}, Constant<false>{}, c);
  for (; c < end; ++c) step(Constant<1>{}, Constant<false>{}, c);
  // 3.
  for (int64_t i = 0; i < width; ++i) done(i, finish_lane<Real, Flags>(states[i / L], static_cast<int>(i % L)));
}

// The numbers that belong to one row, `Numbers<Real, Real>`, into one lane of those of several, `Numbers<Real,
// Vec<Real>>`.
template <template <class, class> class Numbers, class Real>
LL_INLINE void put_lane(Numbers<Real, Vec<Real>>& lanes, int64_t lane, const Numbers<Real, Real>& row) {
  constexpr size_t kCount = sizeof row / sizeof(Real);
  static_assert(sizeof lanes == kCount * LL_BYTES);
  char* const to = reinterpret_cast<char*>(&lanes) + static_cast<size_t>(lane) * sizeof(Real);
  const char* const from = reinterpret_cast<const char*>(&row);
  for (size_t k = 0; k < kCount; ++k) memcpy(to + k * LL_BYTES, from + k * sizeof(Real), sizeof(Real));
}

}  // namespace logitless::LL_ISA
