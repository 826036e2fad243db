// The unit in which the folds of rows without weights sum exp(z), and what takes a finished sum out of it.
//
// Formula: the terms are those of UnitExp (simd/exp.h), exp(z) / 2^power, with power = max / ln2 rounded - kUnitLift.
// `max` is the largest of the row's first logits (the guess), not of all of them: a row is read once.
//
// Precision policy: the unit lies so far below the guess that all logits which count as UnitExp's least, each 2^-124 at
// most, are together less than any float beside exp(max). Logits that are huge or NaN are left to RowState.
#pragma once

#include "rows/row_state.h"

namespace logitless::LL_ISA {

inline constexpr int kUnitLift = 56;  // bits between exp of the guess and the unit
// Of a long row the guess is the largest of as many first logits: few later ones exceed it.
inline constexpr int64_t kScout = 512;
// As many vectors are summed plainly; then their sum goes into a PairSum.
inline constexpr int kPlainVectors = 16;

template <class Real> LL_INLINE Vec<Real> power_of_unit(Real max) {
  return whole_power<Real>(splat<Real>(max)) - static_cast<Real>(kUnitLift);
}

// A sum of UnitExp's terms without its bias, and without the drift that a term as large as the sum has. The drift of
// the term 2^m smaller than the sum was another one: it leaves m kDrift of that term.
template <class Real> LL_INLINE Vec<double> without_drift(Vec<double> sum, Vec<double> power) {
  constexpr double kWithoutBias = 1 - kUnitExpBias<Real>;
  const Vec<double> drift = kDrift<Real> * (power + exponent_of(sum));
  return sum * (kWithoutBias + drift + drift * drift * 0.5);
}

// The most that `terms` logits which count as UnitExp's least add up to. A sum that is no more stands for 0: all of
// them were -inf, or as good as that.
template <class Real> LL_INLINE Real least_sum(int64_t terms) {
  return sizeof(Real) == 4 ? static_cast<Real>(terms) * Real(0x1p-124) : Real(0);
}

// Whether a largest logit lets exp(z) be split straight from z; false of NaN.
template <class Real> LL_INLINE bool is_moderate(Real max) { return __builtin_fabs(static_cast<double>(max)) <= kHuge; }

// How far below the guess a row's largest logit may lie, in nats, while terms that count as UnitExp's least cannot show
// beside it; and the sum beside which they cannot show either, each being 2^-124 at most.
inline constexpr int kLowest = 15;
inline constexpr double kLeastThatHides = 0x1p-85;

template <class T> LL_INLINE Compute<T> max_of(const T* z, int64_t n) {
  using Real = Compute<T>;
  using V = Vec<Real>;
  constexpr int L = kLanes<Real>;
  const V none = splat<Real>(-kInf<Real>);
  V top[4] = {none, none, none, none}, x[4];
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    load_unordered<4>(z + i, x);
    LL_UNROLL
    for (int k = 0; k < 4; ++k) top[k] = maximum<Real>(x[k], top[k]);
  }
  for (; i < n; i += L)
    top[0] = maximum<Real>(n - i >= L ? load(z + i) : load_partial(z + i, n - i, -kInf<Real>), top[0]);
  return max_of_lanes<Real>(maximum<Real>(maximum<Real>(top[0], top[1]), maximum<Real>(top[2], top[3])));
}

// The guess for several short rows that share a unit: the largest logit of the first row that has a moderate one.
template <class T> LL_INLINE Compute<T> guess_for(const T* const* rows, int64_t count, int64_t n) {
  Compute<T> guess = max_of(rows[0], n);
  for (int64_t k = 1; k < count && !is_moderate(guess); ++k) guess = max_of(rows[k], n);
  return guess;
}

}  // namespace logitless::LL_ISA
