// Short rows folded together against their largest logits: as many at a time as a vector has lanes.
//
// Formula: of each row, max = max z and rest = sum over all classes but one that holds max of exp(z_j), in one unit
// 2^power.
//
// Layout: rows of a few vectors of consecutive logits each. The rows may lie anywhere; a prefetch assumes that they
// follow each other.
//
// Precision policy: as in row_state.h the largest logit never enters the sum: each logit but the largest loses exactly
// one comparison, and is added then. Up to kPlainVectors a lane's sum is a plain one, beyond that a PairSum.
//
// Steps:
//   1. Within each row, lane by lane: of every vector and the lane's largest so far, the smaller is added and the
//      larger stays. No branch depends on a logit, and no vector is reduced to one number.
//   2. Lane against lane: two rows of L lanes each become one vector of L / 2 lanes of the one and L / 2 of the other.
//      In log2(L) rounds L rows become one vector in which each lane is what is left of one row.
//   3. Which rows the common unit suited is told by their bits; the others are folded alone by somebody else.
#pragma once

#include "parallel.h"
#include "rows/row_unit.h"

namespace logitless::LL_ISA {

// In every lane, the largest logit of those that it has met, and the sum of exp of the others.
template <class Real> struct LaneFold {
  Vec<Real> top, sum;
};

// Step 1 of one row of n logits. `ahead`: what is asked of memory before it is needed, in elements.
template <class T>
LL_INLINE LaneFold<Compute<T>> fold_within_lanes(const T* z, int64_t n, int64_t ahead, const UnitExp<Compute<T>>& exp) {
  using Real = Compute<T>;
  using V = Vec<Real>;
  constexpr int L = kLanes<Real>;
  V top = splat<Real>(-kInf<Real>), even{}, odd{};
  PairSum<Real> total;
  const auto compare = [&](V x, V& sum) __attribute__((always_inline)) {
    const V smaller = minimum<Real>(top, x);
    top = maximum<Real>(x, top);
    sum = exp.add_to(sum, smaller);
  };
  const auto read_pair = [&](int64_t at, V& a, V& b) __attribute__((always_inline)) {
    __builtin_prefetch(z + ahead + at);
    if constexpr (sizeof(T) >= 4) __builtin_prefetch(z + ahead + at + L);
    load_pair(z + at, a, b);
  };
  // The first vector is the largest so far.
  int64_t i = 0;
  if (n >= 2 * L) {
    V second;
    read_pair(0, top, second);
    compare(second, odd);
    i = 2 * L;
  } else {
    top = n >= L ? load(z) : load_partial(z, n, -kInf<Real>);
    i = L;
  }
  while (i < n) {
    const int64_t end = n - i > kPlainVectors * L ? i + kPlainVectors * L : n;
    for (; i + 2 * L <= end; i += 2 * L) {
      V a, b;
      read_pair(i, a, b);
      compare(a, even);
      compare(b, odd);
    }
    if (i + L <= end) {
      compare(load(z + i), even);
      i += L;
    }
    if (i < end) {
      compare(load_partial(z + i, end - i, -kInf<Real>), odd);
      i = end;
    }
    if (n > kPlainVectors * L) {
      total.add(even + odd);
      even = odd = V{};
    }
  }
  return {top, n > kPlainVectors * L ? total.high + total.low : even + odd};
}

// One round of step 2: neighbouring lanes of `a` and of `b` are compared with each other.
template <class Real>
LL_INLINE LaneFold<Real> compare_lanes(const UnitExp<Real>& exp, const LaneFold<Real>& a, const LaneFold<Real>& b) {
  const Vec<Real> even = even_lanes<Real>(a.top, b.top), odd = odd_lanes<Real>(a.top, b.top);
  const Vec<Real> sum = even_lanes<Real>(a.sum, b.sum) + odd_lanes<Real>(a.sum, b.sum);
  return {maximum<Real>(odd, even), exp.add_to(sum, minimum<Real>(even, odd))};
}

// Of as many rows as there are lanes: the largest logit, and the sum of exp of the others in units of 2^power, which
// was chosen for `guess`.
template <class Real> struct ShortRows {
  Vec<Real> max, rest;
  Real power, guess;
  // Step 3. The lanes for which the unit did: no term overflowed, and terms that counted as UnitExp's least are less
  // than a float beside exp(max), or than 2^-30 of the sum.
  LL_INLINE uint32_t valid_bits() const {
    const Vec<Real> rise = max - guess;
    const uint32_t counts = reaching_bits(rise, splat<Real>(-kLowest)) |
                            greater_bits(rest, splat<Real>(static_cast<Real>(kLeastThatHides)));
    const uint32_t moderate = reaching_bits(splat<Real>(static_cast<Real>(kHuge)), magnitude<Real>(max));
    const uint32_t not_too_large = reaching_bits(splat<Real>(static_cast<Real>(kHeadroom)), rise);
    return moderate & not_too_large & counts & equal_bits(rest, rest);
  }
};

// L rows of n logits each, of which the first `count` are wanted.
template <class T> LL_INLINE ShortRows<Compute<T>> fold_short(const T* const* rows, int64_t count, int64_t n) {
  using Real = Compute<T>;
  constexpr int L = kLanes<Real>;
  const int64_t ahead = rows_ahead(n * static_cast<int64_t>(sizeof(T))) * n;
  const Real guess = guess_for(rows, count, n);
  const Vec<Real> power = power_of_unit(guess);
  const UnitExp<Real> exp(power);
  // 1. One loop over the rows, so that the processor sees one stream of memory.
  LaneFold<Real> folds[L];
  for (int64_t k = 0; k < L; ++k) folds[k] = k < count ? fold_within_lanes<T>(rows[k], n, ahead, exp) : folds[0];
  // 2.
  LL_UNROLL
  for (int pairs = L / 2; pairs > 0; pairs /= 2)
    for (int k = 0; k < pairs; ++k) folds[k] = compare_lanes<Real>(exp, folds[2 * k], folds[2 * k + 1]);
  const Vec<Real> sum = folds[0].sum;
  return {folds[0].top, sum <= least_sum<Real>(n + L) ? Vec<Real>{} : sum, power[0], guess};
}

}  // namespace logitless::LL_ISA
