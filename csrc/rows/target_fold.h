// The fold of all logits but the target's: what cross-entropy alone asks for.
//
// Formula: with rest = sum over j != target of exp(z_j), nll = lse - z_t = log1p(rest / exp(z_t)).
//
// Layout: rows of consecutive logits. They are read in pairs of vectors. The last, incomplete pair and the pair that
// has the target come first, by themselves; then all the others in the order of memory.
//
// Precision policy: holding out the target instead of the largest logit keeps the relative precision of nll as well.
// Where the target dominates, rest / exp(z_t) is small, and log1p of it is as exact as it is; where the target does
// not, nll is above ln 2, and an ulp of it is no less than an ulp of the logarithm. And no logit need be compared with
// another. Terms are those of UnitExp; for logits of 16 bits, whose loss will be rounded to them, to 2^-21. Rows that
// do not suit (logits that are not finite or huge, a target far below the others) are left to the folds that hold out
// the largest.
//
// Steps:
//   1. Guess the unit from the row's first logits.
//   2. Add exp of every logit but the target, whose place is made -inf by a minimum with a vector loaded for that
//      place: no branch depends on where the target is. Note the largest magnitude of all logits.
//   3. That tells whether every term was in range. If not, add them again with those below the range cut to its end:
//      masks of -inf are common, and the hint `clamps` spares later rows the first try.
//   4. Reduce lanes to rows, take the unit's drift out, and check that what was cut cannot show.
#pragma once

#include "parallel.h"
#include "rows/row_unit.h"

namespace logitless::LL_ISA {

inline constexpr int64_t kMaxRows = 64;  // rows that are finished together
// Nats that the target may lie below the guess while exp of it can be formed at all.
inline constexpr int kLowestTarget = 500;
// As many vectors are summed plainly. Terms of 16-bit logits are exact to 2^-21, and so may their sum be.
template <class T> inline constexpr int kPlainOthers = sizeof(T) == 2 ? 64 : kPlainVectors;

// ---- step 2: one row
// ----------------------------------------------------------------------------------------------------

// Vectors that hold out one logit by a minimum: inf everywhere but at its place, where they are -inf. Read from a table
// of 4 L + 1 numbers with -inf in the middle, for a place from 0 to 2 L; from L on no lane is held out.
template <class Real> struct HoldOut {
  static constexpr int L = kLanes<Real>;
  Real limits[4 * L + 1];
  constexpr HoldOut() : limits{} {
    for (int i = 0; i <= 4 * L; ++i) limits[i] = i == 2 * L ? -kInf<Real> : kInf<Real>;
  }
  LL_INLINE Vec<Real> at(int64_t place) const { return load(limits + (2 * L - place)); }
};
template <class Real> alignas(LL_BYTES) inline constexpr HoldOut<Real> kHoldOut;

// Holds out one element of two vectors that load_pair read, which takes bfloat16 apart into elements of even and odd
// number. A place of 2 L holds out none.
template <class T> LL_INLINE void hold_out_of_pair(int64_t place, Vec<Compute<T>>& a, Vec<Compute<T>>& b) {
  using Real = Compute<T>;
  constexpr int L = kLanes<Real>;
  const HoldOut<Real>& out = kHoldOut<Real>;
  const int64_t of_a = !__is_same(T, BFloat16) ? place : place & 1 ? L : place / 2;
  const int64_t of_b = !__is_same(T, BFloat16) ? place - L : place & 1 ? place / 2 : L;
  a = minimum<Real>(out.at(of_a), a);
  b = minimum<Real>(out.at(of_b), b);
}

// exp of every logit but the target's, summed lane by lane in units of exp's. kMany: of more than kPlainOthers vectors.
// `ahead`: what is asked of memory before it is read, in elements.
template <class T, bool kMany, bool kClamps>
LL_INLINE Vec<Compute<T>> fold_others(const T* z, int64_t n, int64_t target, int64_t ahead,
                                      const UnitExp<Compute<T>>& exp, typename UnitExp<Compute<T>>::Seen& seen) {
  using Real = Compute<T>;
  using V = Vec<Real>;
  constexpr int L = kLanes<Real>;
  constexpr int64_t kPair = 2 * L;
  constexpr bool kRough = sizeof(T) == 2;
  V sum[2] = {};
  const int64_t left = n % kPair;
  const T* const tail = z + (n - left);
  const int64_t place = target % kPair, in_tail = target - (n - left);
  // In the order of memory. Rows so short that the time between two prefetches varies are asked of the second cache
  // before.
  const auto prefetch_pair = [&](const T* p) __attribute__((always_inline)) {
    for (int64_t at = 0; at < kPair; at += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(p + ahead + at);
      if constexpr (sizeof(T) >= 4 && !kMany) __builtin_prefetch(p + 2 * ahead + at, 0, 2);
    }
  };

  // The tail: what is less than a pair.
  if (left > 0) {
    V one[1] = {left >= L ? load(tail) : load_partial(tail, left, -kInf<Real>)};
    one[0] = minimum<Real>(kHoldOut<Real>.at(in_tail >= 0 && in_tail < L ? in_tail : L), one[0]);
    exp.template add_all<kRough, true>(sum, seen, one);
    if (left > L) {
      one[0] = minimum<Real>(kHoldOut<Real>.at(in_tail >= L ? in_tail - L : L),
                             load_partial(tail + L, left - L, -kInf<Real>));
      exp.template add_all<kRough, true>(sum, seen, one);
    }
  }
  if (tail == z) {
    prefetch_pair(z);
    return sum[0];
  }

  // The pair that has the target; the last pair, and nothing held out, where the tail has it.
  const T* const end = tail - kPair;
  const T* const held = in_tail >= 0 ? end : z + (target - place);
  V x[2];
  load_pair(held, x[0], x[1]);
  hold_out_of_pair<T>(in_tail >= 0 ? kPair : place, x[0], x[1]);
  exp.template add_all<kRough, true>(sum, seen, x);

  // All other pairs: p counts them, and from `held` on each stands for the pair after it.
  const auto read_pair = [&](const T* p, V& a, V& b) __attribute__((always_inline)) {
    prefetch_pair(p);
    load_pair(p + (-static_cast<int64_t>(p >= held) & kPair), a, b);
  };
  PairSum<Real> total;
  for (const T* p = z; p != end;) {
    const T* const stop = kMany && end - p > kPlainOthers<T> * L ? p + kPlainOthers<T> * L : end;
    // Two pairs at once, but where there are not registers enough: of many logits in float.
    if constexpr (!kMany || sizeof(T) == 2) {
      for (; stop - p >= 2 * kPair; p += 2 * kPair) {
        V four[4];
        read_pair(p, four[0], four[1]);
        read_pair(p + kPair, four[2], four[3]);
        exp.template add_all<kRough, kClamps>(sum, seen, four);
      }
    }
    for (; p != stop; p += kPair) {
      read_pair(p, x[0], x[1]);
      exp.template add_all<kRough, kClamps>(sum, seen, x);
    }
    if constexpr (kMany) {
      total.add(sum[0] + sum[1]);
      sum[0] = sum[1] = V{};
    }
  }
  prefetch_pair(end);
  if (left > 0) prefetch_pair(tail);
  if constexpr (kMany)
    return total.high + total.low;
  else
    return sum[0] + sum[1];
}

// ---- steps 2 and 3: several rows in one unit
// ----------------------------------------------------------------------------

// Into sums[k] the lanes of row k; whether all logits were in range. A function of its own, so that what the loop needs
// stays in registers.
template <class T, bool kMany, bool kClamps>
__attribute__((noinline)) bool fold_others_of_rows(const T* const* rows, const int64_t* targets, int64_t count,
                                                   int64_t n, int64_t ahead, const UnitExp<Compute<T>>& unit,
                                                   Vec<Compute<T>>* sums) {
  const UnitExp<Compute<T>> exp = unit;
  typename UnitExp<Compute<T>>::Seen seen = exp.template none_seen<kClamps>();
  for (int64_t k = 0; k < count; ++k)
    sums[k] = fold_others<T, kMany, kClamps>(rows[k], n, targets[k], ahead, exp, seen);
  return exp.template in_range<kClamps>(seen);
}

// The same, first without cutting. `clamps` is set where that did not do: a hint to later rows, of any thread, that no
// result depends on.
template <class T>
LL_INLINE bool try_others_of_rows(const T* const* rows, const int64_t* targets, int64_t count, int64_t n, int64_t ahead,
                                  const UnitExp<Compute<T>>& exp, Vec<Compute<T>>* sums, bool& clamps) {
  const bool many = n > kPlainOthers<T> * kLanes<Compute<T>>;
  if (!__atomic_load_n(&clamps, __ATOMIC_RELAXED)) {
    const auto fold = many ? fold_others_of_rows<T, true, false> : fold_others_of_rows<T, false, false>;
    if (fold(rows, targets, count, n, ahead, exp, sums)) return true;
    __atomic_store_n(&clamps, true, __ATOMIC_RELAXED);
  }
  const auto fold = many ? fold_others_of_rows<T, true, true> : fold_others_of_rows<T, false, true>;
  return fold(rows, targets, count, n, ahead, exp, sums);
}

// ---- all steps
// ----------------------------------------------------------------------------------------------------------

// Of `count` rows, at most kMaxRows: the targets' logits into `held`, the sums over all others into `rest`, in units of
// 2^power. Gives the power; NaN where the rows' sums are not all good in one unit.
template <class T>
LL_INLINE Compute<T> fold_short_others(const T* const* rows, const int64_t* targets, int64_t count, int64_t n,
                                       Compute<T>* held, Compute<T>* rest, bool& clamps) {
  using Real = Compute<T>;
  constexpr int L = kLanes<Real>;
  // 1.
  const Real guess = guess_for(rows, count, n);
  const Vec<Real> power = power_of_unit(guess);
  const UnitExp<Real> exp(power);
  // 2 and 3.
  Vec<Real> sums[kMaxRows];
  const int64_t ahead = rows_ahead(n * static_cast<int64_t>(sizeof(T))) * n;
  bool good = is_moderate(guess) && try_others_of_rows<T>(rows, targets, count, n, ahead, exp, sums, clamps);
  for (int64_t k = 0; k < count; ++k) held[k] = widen(rows[k][targets[k]]);
  // The last vector of rows is filled up with the first row.
  for (int64_t k = count; k % L != 0; ++k) {
    sums[k] = sums[0];
    held[k] = held[0];
  }
  // 4. L rows of L lanes become one vector of L rows: neighbouring lanes are added in log2(L) rounds.
  for (int64_t first = 0; first < count; first += L) {
    Vec<Real>* const of = sums + first;
    LL_UNROLL
    for (int pairs = L / 2; pairs > 0; pairs /= 2) {
      LL_UNROLL
      for (int k = 0; k < pairs; ++k)
        of[k] = even_lanes<Real>(of[2 * k], of[2 * k + 1]) + odd_lanes<Real>(of[2 * k], of[2 * k + 1]);
    }
    const Vec<Real> sum = of[0] <= least_sum<Real>(n + L) ? Vec<Real>{} : of[0], at = load(held + first);
    store(rest + first, sum);
    // Terms that were cut are less than any float beside exp(held), or than 2^-30 of the sum.
    const uint32_t hidden = greater_bits(sum, splat<Real>(static_cast<Real>(kLeastThatHides))) &
                            reaching_bits(at, splat<Real>(guess - kLowestTarget));
    const uint32_t counts = reaching_bits(at, splat<Real>(guess - kLowest)) | hidden;
    const uint32_t finite = greater_bits(splat<Real>(kInf<Real>), sum) &
                            reaching_bits(splat<Real>(static_cast<Real>(kHuge)), magnitude<Real>(at));
    good = good && (counts & finite) == kAllBits<Real>;
  }
  return good ? power[0] : kNaN<Real>;
}

// Of one row of many classes. False where it is no row for this fold.
template <class T> bool fold_long_others(const T* z, int64_t n, int64_t target, bool& clamps, RowSums& sums) {
  using Real = Compute<T>;
  // 1.
  const Real guess = max_of(z, n < kScout ? n : kScout), held = widen(z[target]);
  if (!is_moderate(guess) || !is_moderate(held) || !(held >= guess - kLowestTarget)) return false;
  const Vec<Real> power = power_of_unit(guess);
  // 2 and 3.
  Vec<Real> others;
  constexpr int64_t kAhead = kLongAhead / static_cast<int64_t>(sizeof(T));
  if (!try_others_of_rows<T>(&z, &target, 1, n, kAhead, UnitExp<Real>(power), &others, clamps)) return false;
  // 4.
  double rest = sum_of_lanes(others);
  if (rest <= static_cast<double>(least_sum<Real>(n + kLanes<Real>))) rest = 0;
  const double unit = static_cast<double>(power[0]);
  sums = {held, 0, unit, without_drift<Real>(splat<double>(rest), splat<double>(unit))[0], 0, 0, 0, 0, 0, 0, 0};
  return rest - rest == 0 && (held >= guess - kLowest || rest > kLeastThatHides);
}

}  // namespace logitless::LL_ISA
