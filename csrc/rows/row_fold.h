// Which fold reads a row, and the ones for any row. Start here to learn how a row of logits is folded.
//
// Formula: with the largest logit held out, max = max z and rest = sum over the other classes of exp(z_j), so that
//   log_sum = log1p(rest / exp(max))     lse = max + log_sum     nll = (max - z_target) + log_sum
// (row_state.h has the formulas of entropy and of weighted sums.) A fold gives RowSums: max, and rest in units of
// 2^power, never exp(max) or rest themselves, which may be beyond the range of a number.
//
// Layout: kinds of rows, each with the file of its fold. A fold that does not serve every row says so, and the next one
// in this list is taken.
//   target_fold.h    consecutive logits, cross-entropy alone, float and 16 bits: the target is held out
//   short_rows.h     consecutive logits, at most kShortVectors vectors, log-sum alone: as many rows at a time as lanes
//   long_row.h       consecutive logits without weights: eight vectors at a time
//   fold_contiguous  (below) consecutive logits with weights or probability targets, or with NaN: by row_state.h
//   fold_buffered    (below) any strides: copied a piece at a time
//   fold_huge        (below) a largest logit beyond kHuge: again, each logit less the largest
//   lane_fold.h      neighbouring rows in neighbouring lanes: no copy, one row a lane
//
// Precision policy: that of row_state.h: the term that may be much larger than all others together is held out, exp is
// within about 1 ulp, and sums of many vectors are PairSums. docs/kernels.md derives what follows for nll.
//
// Steps of a row, in all folds:
//   1. Choose a unit 2^power from the largest logit known.
//   2. Read a few vectors; the largest logit stays out, exp of the others is added in that unit.
//   3. Where a larger logit comes, it takes the place of the one held out, and the unit follows if it must.
//   4. Reduce the lanes; the result is in double from here on.
#pragma once

#include "parallel.h"
#include "rows/long_row.h"
#include "rows/row_state.h"

namespace logitless::LL_ISA {

inline constexpr int kShortVectors = 64;  // rows of no more vectors are short
inline constexpr int64_t kGather = 2048;  // elements of a strided row that are copied at a time

// One row and what lies beside it; strides in elements, null where it is not given.
template <class T> struct RowView {
  const T* logits;
  int64_t stride;
  const Compute<T>* weight = nullptr;
  const T* dense = nullptr;
  int64_t dense_stride = 1;
  Compute<T> target_logit = kNaN<Compute<T>>;
};

// Feeds n consecutive logits of classes from `first_class` on to a RowState; w and t may be null. `fresh`: they are the
// row's first. Beyond n a logit is -inf, and its weight and target are 0.
template <class T, int Flags>
LL_INLINE void feed(RowState<Compute<T>, Flags, false>& state, const T* z, const Compute<T>* w, const T* t, int64_t n,
                    int64_t first_class, bool fresh) {
  using Real = Compute<T>;
  constexpr int L = kLanes<Real>;
  constexpr bool kWeighted = (Flags & (kSmooth | kDense)) != 0, kTargets = (Flags & kDense) != 0;
  const auto step = [&](auto count, auto first, int64_t i, int64_t valid) __attribute__((always_inline)) {
    constexpr int K = decltype(count)::value;
    Vec<Real> zs[K], ws[K], ts[K];
    if constexpr (K == 8) {
      ask_ahead(z + i, K * L);
      if constexpr (kTargets) ask_ahead(t + i, K * L);
    }
    LL_UNROLL
    for (int k = 0; k < K; ++k) {
      const bool whole = K > 1 || valid == L;
      zs[k] = whole ? load(z + i + k * L) : load_partial(z + i, valid, -kInf<Real>);
      if constexpr (kWeighted) {
        const Vec<Real> one = splat<Real>(1);
        if (w)
          ws[k] = whole ? load(w + i + k * L) : load_partial(w + i, valid, Real(0));
        else
          ws[k] = whole ? one : (lane_index<Real>() < static_cast<IntOf<Real>>(valid) ? one : Vec<Real>{});
      }
      if constexpr (kTargets) ts[k] = whole ? load(t + i + k * L) : load_partial(t + i, valid, Real(0));
    }
    state.template step<K, decltype(first)::value>(zs, ws, ts, first_class + i);
  };
  const auto whole_or_rest = [&](int64_t i) { return n - i < L ? n - i : L; };
  int64_t i = 0;
  if (fresh) {
    step(Constant<1>{}, Constant<true>{}, 0, whole_or_rest(0));
    i = L;
  }
  for (; i + 8 * L <= n; i += 8 * L) step(Constant<8>{}, Constant<false>{}, i, L);
  if (i + 4 * L <= n) {
    step(Constant<4>{}, Constant<false>{}, i, L);
    i += 4 * L;
  }
  for (; i < n; i += L) step(Constant<1>{}, Constant<false>{}, i, whole_or_rest(i));
}

// Classes [begin, end) of a row of consecutive logits.
template <class T, int Flags>
__attribute__((noinline)) RowSums fold_contiguous(const RowView<T>& row, int64_t begin, int64_t end) {
  using Real = Compute<T>;
  if constexpr (Flags == 0 || Flags == kToken) {
    RowSums sums;
    if (fold_long<T, Flags>(row.logits + begin, end - begin, row.target_logit, sums)) {
      sums.arg += begin;
      return sums;
    }
  }
  RowState<Real, Flags, false> state;
  if constexpr ((Flags & kToken) != 0) state.target_logit = splat<Real>(row.target_logit);
  const Real* w = row.weight ? row.weight + begin : nullptr;
  const T* t = (Flags & kDense) ? row.dense + begin : nullptr;
  feed<T, Flags>(state, row.logits + begin, w, t, end - begin, begin, true);
  return finish<Real, Flags>(state);
}

template <class Real, int Flags>
__attribute__((noinline)) void feed_buffer(RowState<Real, Flags, false>& state, const Real* z, const Real* w,
                                           const Real* t, int64_t n, int64_t first_class, bool fresh) {
  feed<Real, Flags>(state, z, w, t, n, first_class, fresh);
}

// Classes [begin, end) of a row of any strides: a piece at a time is copied into the compute type, less `base`.
template <class T, int Flags>
__attribute__((noinline)) RowSums fold_buffered(const RowView<T>& row, int64_t begin, int64_t end, Compute<T> base) {
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

// Classes [begin, end) of a row, however it lies.
template <class T, int Flags> RowSums fold_part(const RowView<T>& row, int64_t begin, int64_t end) {
  const bool contiguous = row.stride == 1 && (!(Flags & kDense) || row.dense_stride == 1);
  return contiguous ? fold_contiguous<T, Flags>(row, begin, end) : fold_buffered<T, Flags>(row, begin, end, 0);
}

// A row whose maximum a first fold found beyond kHuge: again, each logit less the maximum.
template <class T, int Flags> RowSums fold_huge(const RowView<T>& row, int64_t classes, double max) {
  return fold_buffered<T, Flags>(row, 0, classes, static_cast<Compute<T>>(max));
}

// The first class at or after `from` that is `max`; of a row with a NaN, its first NaN; 0 where all logits are -inf.
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
