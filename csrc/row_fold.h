// Reading one row of logits into a RowState: contiguous, strided, or with logits of any size.
#pragma once

#include "row_state.h"

namespace logitless::LL_ISA {

inline constexpr int64_t kGather = 2048;  // elements of a strided row copied at a time

// One row and what lies beside it, in elements; null: not given.
template <class T> struct RowView {
  const T* logits;
  int64_t stride;
  const Compute<T>* weight = nullptr;
  const T* dense = nullptr;
  int64_t dense_stride = 1;
  Compute<T> target_logit = kNaN<Compute<T>>;
};

// Feeds n contiguous logits; w and t may be null.
template <class T, int Flags>
LL_INLINE void feed(RowState<Compute<T>, Flags, false>& state, const T* z, const Compute<T>* w, const T* t, int64_t n, int64_t first_class, bool fresh) {
  using Real = Compute<T>;
  constexpr int L = kLanes<Real>;
  constexpr bool kWeighted = (Flags & (kSmooth | kDense)) != 0, kTargets = (Flags & kDense) != 0;
  // Beyond n: a logit of -inf whose weight and target are 0.
  const auto step = [&](auto count, auto first, int64_t i, int64_t valid) __attribute__((always_inline)) {
    constexpr int K = decltype(count)::value;
    Vec<Real> zs[K], ws[K], ts[K];
    for (int k = 0; k < K; ++k) {
      const bool whole = K > 1 || valid == L;
      zs[k] = whole ? load(z + i + k * L) : load_partial(z + i, valid, -kInf<Real>);
      if constexpr (kWeighted) {
        if (w) ws[k] = whole ? load(w + i + k * L) : load_partial(w + i, valid, Real(0));
        else ws[k] = whole ? splat<Real>(1) : (lane_index<Real>() < static_cast<IntOf<Real>>(valid) ? splat<Real>(1) : Vec<Real>{});
      }
      if constexpr (kTargets) ts[k] = whole ? load(t + i + k * L) : load_partial(t + i, valid, Real(0));
    }
    state.template step<K, decltype(first)::value>(zs, ws, ts, first_class + i);
  };
  const auto whole_or = [&](int64_t i) { return n - i < L ? n - i : L; };
  int64_t i = 0;
  if (fresh) step(Constant<1>{}, Constant<true>{}, 0, whole_or(0)), i = L;
  for (; i + 8 * L <= n; i += 8 * L) step(Constant<8>{}, Constant<false>{}, i, L);
  if (i + 4 * L <= n) step(Constant<4>{}, Constant<false>{}, i, L), i += 4 * L;
  for (; i < n; i += L) step(Constant<1>{}, Constant<false>{}, i, whole_or(i));
}

// Classes [begin, end) of a row that lies in memory one after another.
template <class T, int Flags> __attribute__((noinline)) RowSums fold_contiguous(const RowView<T>& row, int64_t begin, int64_t end) {
  using Real = Compute<T>;
  RowState<Real, Flags, false> state;
  if constexpr ((Flags & kToken) != 0) state.target_logit = splat<Real>(row.target_logit);
  const Real* w = row.weight ? row.weight + begin : nullptr;
  const T* t = (Flags & kDense) ? row.dense + begin : nullptr;
  feed<T, Flags>(state, row.logits + begin, w, t, end - begin, begin, true);
  return finish<Real, Flags>(state);
}

template <class Real, int Flags>
__attribute__((noinline)) void feed_buffer(RowState<Real, Flags, false>& state, const Real* z, const Real* w, const Real* t, int64_t n, int64_t first_class, bool fresh) {
  feed<Real, Flags>(state, z, w, t, n, first_class, fresh);
}

// Any strides, and logits of any size: a piece at a time is copied into the compute type, less `base`.
template <class T, int Flags> __attribute__((noinline)) RowSums fold_buffered(const RowView<T>& row, int64_t begin, int64_t end, Compute<T> base) {
  using Real = Compute<T>;
  alignas(LL_BYTES) Real zs[kGather], ts[(Flags & kDense) ? kGather : 1];
  RowState<Real, Flags, false> state;
  int64_t rank = 0;
  for (int64_t i = begin; i < end; i += kGather) {
    const int64_t n = end - i < kGather ? end - i : kGather;
    for (int64_t j = 0; j < n; ++j) {
      const Real x = widen(row.logits[(i + j) * row.stride]);
      rank += x > row.target_logit;  // counted here: the subtraction may make two logits equal
      zs[j] = x - base;
    }
    if constexpr ((Flags & kDense) != 0)
      for (int64_t j = 0; j < n; ++j) ts[j] = widen(row.dense[(i + j) * row.dense_stride]);
    feed_buffer<Real, Flags>(state, zs, row.weight ? row.weight + i : nullptr, ts, n, i, i == begin);
  }
  RowSums sums = finish<Real, Flags>(state);
  sums.base = base;
  sums.max += base;
  sums.rank = rank;
  return sums;
}

template <class T, int Flags> RowSums fold_part(const RowView<T>& row, int64_t begin, int64_t end) {
  const bool contiguous = row.stride == 1 && (!(Flags & kDense) || row.dense_stride == 1);
  return contiguous ? fold_contiguous<T, Flags>(row, begin, end) : fold_buffered<T, Flags>(row, begin, end, 0);
}
// A row with logits beyond kHuge: again, each less the row's maximum.
template <class T, int Flags> RowSums fold_huge(const RowView<T>& row, int64_t classes, double max) {
  return fold_buffered<T, Flags>(row, 0, classes, static_cast<Compute<T>>(max));
}

// The first class at or after `from` that is `max`; of a row with a NaN, its first NaN; 0 when all logits are -inf.
template <class T> int64_t find_argmax(const RowView<T>& row, int64_t classes, double max, bool is_nan, int64_t from) {
  using Real = Compute<T>;
  const Real wanted = static_cast<Real>(max);
  for (int64_t j = is_nan ? 0 : from; j < classes;) {
    if (row.stride == 1 && !is_nan && j + kLanes<Real> <= classes) {
      const uint32_t found = equal_bits(load(row.logits + j), splat<Real>(wanted));
      if (found) return j + __builtin_ctz(found);
      j += kLanes<Real>;
      continue;
    }
    const Real x = widen(row.logits[j * row.stride]);
    if (is_nan ? x != x : x == wanted) return j;
    ++j;
  }
  return 0;
}

}  // namespace logitless::LL_ISA
