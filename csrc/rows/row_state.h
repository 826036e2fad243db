// The online fold over one row of logits, for everything that a caller may ask of a row.
//
// Formula, of a row z with largest logit `max`, and q = rest / exp(max):
//   rest   = sum over all classes but one that holds max of exp(z_j)    for log_sum = log1p(q)
//   spread = sum_j exp(z_j) (max - z_j)                  for H = log_sum + spread / exp(max) / (1 + q)
//   smooth = sum_j w_j (max - z_j) and sum_j w_j         for sum_j w_j (lse - z_j)
//   dense  = sum_j t_j w_j (max - z_j) and sum_j t_j w_j for sum_j t_j w_j (lse - z_j)
//   rank   = how many classes have a larger logit than the target
//
// Layout: vectors of logits in the order of the classes. They are of one row (every lane has a part of its classes) or,
// with kPerLane, of as many rows as there are lanes. Rows without weights have faster folds: see row_fold.h.
//
// Precision policy: no logit is read twice and the maximum is not known beforehand, yet exp(max) never enters `rest`.
// The largest logit of each lane is held out ("top"), and every logit enters the sum as the smaller one of a comparison
// with it. So `rest` is what all the others add up to, and log1p(rest / exp(max)) keeps its relative precision where
// one class dominates. exp(z) is summed in units of 2^power, and raising the power is exact. All terms of the gap sums
// are >= 0; when the maximum rises, what has been summed is moved by sum(e) times the rise, which is >= 0 too. Sums are
// PairSums.
//
// Steps for K vectors of logits:
//   1. Compare with the tops: the larger stay, the smaller are to be added.
//   2. Where a top exceeds the row's maximum so far, raise the maximum, and the unit if it must change.
//   3. Add exp of the smaller ones to `rest`, and with their gaps to `spread`.
//   4. Count the rank.
//   5. Add weights and targets times gaps.
// At the end (finish) the tops but one are added by step 3 as well.
#pragma once

#include "simd/log.h"
#include "simd/sums.h"

namespace logitless::LL_ISA {

// What is asked of a row beyond its log-sum: entropy and rank; sum w (lse - z); sum t w (lse - z).
enum StatFlags { kToken = 1, kSmooth = 2, kDense = 4 };

inline constexpr double kHeadroom = 40.0;  // nats the maximum may rise before the sums are rescaled
// Bits between exp(max) and the sums' unit: exp(z) below the normal range becomes 0, and there it may not count.
inline constexpr int kLift = 32;
// The largest gap that counts: e is 0 long before, and 2^kLift e times this is finite.
template <class Real> inline constexpr Real kMostGap = Real(1e20);

// A sum of weights times (max - z), and the sum of the weights.
template <class Real> struct WeightedGap {
  PairSum<Real> gap, mass;
  LL_INLINE void raise_max(Vec<Real> rise) {
    gap.add(mass.high * rise);
    gap.add(mass.low * rise);
  }
};

template <class Real, int Flags, bool kPerLane> struct RowState {
  using V = Vec<Real>;
  // Nothing but the sums' unit depends on row_max here, so it follows the maximum only where the unit must change:
  // among as many rows as there are lanes some maximum rises at every other step.
  static constexpr bool kLazyMax = kPerLane && Flags == 0;
  V top = splat<Real>(-kInf<Real>);  // the largest logit of each lane
  V row_max = top;  // the row's maximum so far; the same in all lanes unless kPerLane, as power and limit are
  V power = splat<Real>(static_cast<Real>(-2 * kHuge * kLog2e));  // the sums are in units of 2^power
  V limit = top;                                                  // the maximum above which the unit must change
  PairSum<Real> rest, spread;
  WeightedGap<Real> smooth, dense;
  V target_logit = splat<Real>(kNaN<Real>);
  IntVec<Real> rank{}, arg{};
  int64_t arg_block = 0;  // the first class of the step that last raised the maximum

  // z: K vectors of logits of classes from `first_class` on; w, t: the class weights and dense targets beside them.
  // kFirst: the row's first step, which takes the logits as tops and has nothing to add.
  template <int K, bool kFirst> LL_INLINE void step(const V* z, const V* w, const V* t, int64_t first_class) {
    // 1.
    V smaller[K];
    LL_UNROLL
    for (int k = 0; k < K; ++k) {
      smaller[k] = minimum<Real>(top, z[k]);
      top = kFirst ? z[k] : maximum<Real>(z[k], top);
    }
    // 2.
    if (__builtin_expect(greater_bits(top, kLazyMax ? limit : row_max) != 0, 0)) raise_max<K>(z, first_class);
    // 3.
    if constexpr (!kFirst) add_others<K>(smaller);
    // 4. A comparison that is true is -1.
    if constexpr ((Flags & kToken) != 0) {
      LL_UNROLL
      for (int k = 0; k < K; ++k) rank -= z[k] > target_logit;
    }
    // 5.
    if constexpr ((Flags & (kSmooth | kDense)) != 0) add_weighted<K>(z, w, t);
  }

  template <int K> LL_INLINE void add_others(const V* z) {
    V e[K], e_gap[K];
    const V finite_max = maximum<Real>(splat<Real>(Real(-1e30)), row_max);  // while every logit so far is -inf
    LL_UNROLL
    for (int k = 0; k < K; ++k) {
      const Exponential<Real> x = split_exp(maximum<Real>(splat<Real>(static_cast<Real>(-2 * kHuge)), z[k]));
      e[k] = scale_by_power(x.fraction, x.power - power);
      if constexpr ((Flags & kToken) != 0)
        e_gap[k] = e[k] * minimum<Real>(splat<Real>(kMostGap<Real>), finite_max - z[k]);
    }
    rest.add(tree_sum<K>(e));
    if constexpr ((Flags & kToken) != 0) spread.add(tree_sum<K>(e_gap));
  }

  // A weight of 0 wins over an infinite gap.
  template <int K> LL_INLINE void add_weighted(const V* z, const V* w, const V* t) {
    V smooth_gap[K], dense_gap[K], weight[K];
    LL_UNROLL
    for (int k = 0; k < K; ++k) {
      const V gap = z[k] == -kInf<Real> ? splat<Real>(kInf<Real>) : row_max - z[k];
      smooth_gap[k] = w[k] == 0 ? V{} : w[k] * gap;
      if constexpr ((Flags & kDense) != 0) {
        weight[k] = w[k] * t[k];
        dense_gap[k] = weight[k] == 0 ? V{} : weight[k] * gap;
      }
    }
    if constexpr ((Flags & kSmooth) != 0) {
      smooth.gap.add(tree_sum<K>(smooth_gap));
      smooth.mass.add(tree_sum<K>(w));
    }
    if constexpr ((Flags & kDense) != 0) {
      dense.gap.add(tree_sum<K>(dense_gap));
      dense.mass.add(tree_sum<K>(weight));
    }
  }

  // A function of its own: it is rare, and what it needs would take registers from the loop.
  template <int K> __attribute__((noinline)) void raise_max(const V* z, int64_t first_class) {
    // The new maximum, and where it is.
    V best;
    if constexpr (kLazyMax) {
      best = top;
    } else if constexpr (kPerLane) {
      best = row_max;
      LL_UNROLL
      for (int k = 0; k < K; ++k) {
        arg = z[k] > best ? IntVec<Real>{} + static_cast<IntOf<Real>>(first_class + k) : arg;
        best = maximum<Real>(z[k], best);
      }
    } else {
      best = splat<Real>(max_of_lanes<Real>(top));
      arg_block = first_class;
    }
    const V rise = row_max == -kInf<Real> ? V{} : best - row_max;
    row_max = best;
    // The unit follows where the maximum has left its headroom: in that lane alone, so that no row's sums depend on the
    // rows beside it.
    if (greater_bits(best, limit)) {
      const V huge = splat<Real>(static_cast<Real>(2 * kHuge));
      const V clamped = maximum<Real>(-huge, minimum<Real>(huge, best));
      const V raised = best > limit ? whole_power<Real>(clamped) - Real(kLift) : power;
      const V drop = power - raised;
      rest.scale(drop);
      if constexpr ((Flags & kToken) != 0) spread.scale(drop);
      power = raised;
      limit = best > limit ? clamped + static_cast<Real>(kHeadroom) : limit;
    }
    // The gaps of what has been summed grow by the rise.
    if constexpr ((Flags & kToken) != 0) {
      const V step = minimum<Real>(splat<Real>(kMostGap<Real>), rise);
      spread.add(rest.high * step);
      spread.add(rest.low * step);
    }
    if constexpr ((Flags & kSmooth) != 0) smooth.raise_max(rise);
    if constexpr ((Flags & kDense) != 0) dense.raise_max(rise);
  }
};

// A finished fold, as plain numbers. rest and spread are in units of exp(base) 2^power; base is 0 unless the row's
// logits were read less their maximum (fold_huge). Gaps are from max. Where the target was held out of the sum instead
// of the largest logit (target_fold.h), max is the target's logit.
struct RowSums {
  double max, base, power, rest, spread, smooth_gap, smooth_mass, dense_gap, dense_mass;
  int64_t arg;  // a class at or before the first that holds max, from which to look for it
  int64_t rank;
};

// All lanes are one row: their tops are added but for one that is the row's maximum.
template <class Real, int Flags> LL_INLINE RowSums finish(RowState<Real, Flags, false>& s) {
  const uint32_t at_max = equal_bits(s.top, s.row_max);
  // No lane stays out where every logit is -inf, or where NaN came first: the row is NaN then.
  const Vec<Real> others = where_first(at_max, splat<Real>(-kInf<Real>), s.top);
  s.template add_others<1>(&others);
  double rest = s.rest.total();
  if (equal_bits(s.top, s.top) != kAllBits<Real>) rest = __builtin_nan("");
  RowSums sums{s.row_max[0], 0, s.power[0], rest, 0, 0, 0, 0, 0, s.arg_block, 0};
  if constexpr ((Flags & kToken) != 0) {
    sums.spread = s.spread.total();
    for (int i = 0; i < kLanes<Real>; ++i) sums.rank += s.rank[i];
  }
  if constexpr ((Flags & kSmooth) != 0) {
    sums.smooth_gap = s.smooth.gap.total();
    sums.smooth_mass = s.smooth.mass.total();
  }
  if constexpr ((Flags & kDense) != 0) {
    sums.dense_gap = s.dense.gap.total();
    sums.dense_mass = s.dense.mass.total();
  }
  return sums;
}

// Every lane is a row: its top is its maximum, and all others have been added.
template <class Real, int Flags> LL_INLINE RowSums finish_lane(const RowState<Real, Flags, true>& s, int lane) {
  const auto total = [lane](const PairSum<Real>& sum) { return sum.total_of_lane(lane); };
  const double max = (RowState<Real, Flags, true>::kLazyMax ? s.top : s.row_max)[lane];
  const double rest = s.top[lane] == s.top[lane] ? total(s.rest) : __builtin_nan("");
  return {max,
          0,
          s.power[lane],
          rest,
          total(s.spread),
          total(s.smooth.gap),
          total(s.smooth.mass),
          total(s.dense.gap),
          total(s.dense.mass),
          s.arg[lane],
          s.rank[lane]};
}

// The fold of a row from the folds of its two parts; `a` holds the lower class indices. The part of the smaller maximum
// is brought into the other's unit; its maximum, which it had held out, is added, and its gaps grow by the difference.
inline RowSums combine(const RowSums& a, const RowSums& b) {
  const bool later = b.max > a.max;
  const RowSums &high = later ? b : a, &low = later ? a : b;
  RowSums sum = high;
  sum.rank = a.rank + b.rank;
  const auto into_unit = [&](double v) {
    return v == 0 ? 0 : __builtin_ldexp(v, static_cast<int>(low.power - high.power));
  };
  const bool low_is_empty = low.max == -__builtin_inf();
  const double gap = low.max == high.max ? 0 : high.max - low.max;
  const double held_out = low_is_empty ? 0 : __builtin_exp(low.max - high.power * kLn2);
  sum.rest += into_unit(low.rest) + held_out;
  sum.spread += into_unit(low.spread) + (low_is_empty ? 0 : (into_unit(low.rest) + held_out) * gap);
  sum.smooth_mass += low.smooth_mass;
  sum.smooth_gap += low.smooth_gap + (low.smooth_mass == 0 ? 0 : low.smooth_mass * gap);
  sum.dense_mass += low.dense_mass;
  sum.dense_gap += low.dense_gap + (low.dense_mass == 0 ? 0 : low.dense_mass * gap);
  return sum;
}

}  // namespace logitless::LL_ISA
