// The fold over one row of logits: what row_stats keeps while it reads each logit once.
//
// Precision policy: the largest logit of each lane is held out of the sums ("top"); every element enters `rest` as the
// loser of its comparison with the top. So at the end rest = sum over all but one maximal entry, and
// log_sum = log1p(rest / exp(max)) keeps its relative precision when one class dominates. exp(z) is accumulated in
// units of 2^power, and raising the power is exact. Entropy and smoothing sum e * (max so far - z), terms that are
// never negative; when the maximum rises, what is already summed is moved by sum(e) * rise, never negative either.
#pragma once

#include "simd/vmath.h"

namespace logitless::LL_ISA {

enum StatFlags { kToken = 1, kSmooth = 2, kDense = 4 };  // entropy and rank; sum w (lse - z); sum t w (lse - z)

inline constexpr double kHeadroom = 40.0;  // nats the maximum may rise before the sums are rescaled
inline constexpr int kLift =
    32;  // bits between exp(max) and the sums' unit: exp(z) below the normal range is 0, and may not count
template <class Real>
inline constexpr Real kMostGap = Real(1e20);  // e is 0 long before, and 2^kLift e times this is finite
inline constexpr double kLog2e = 1.4426950408889634;

// A sum of weights * (max - z), and the sum of the weights.
template <class Real> struct WeightedGap {
  PairSum<Real> gap, mass;
  LL_INLINE void raise(Vec<Real> rise) {
    gap.add(mass.high * rise);
    gap.add(mass.low * rise);
  }
};

// kPerLane: every lane is a row of its own. Otherwise all lanes belong to one row and ref, power, limit are uniform.
template <class Real, int Flags, bool kPerLane> struct RowState {
  using V = Vec<Real>;
  // Nothing but the sums' unit depends on ref: it follows the maximum only where the unit must change. Among as many
  // rows as there are lanes some maximum rises at every other step.
  static constexpr bool kLazyRef = kPerLane && Flags == 0;
  V top = splat<Real>(-kInf<Real>);
  V ref = top;  // the row's maximum so far
  V power = splat<Real>(static_cast<Real>(-2 * kHuge * kLog2e)), limit = top;
  PairSum<Real> rest, spread;  // sum of e, sum of e * (ref - z)
  WeightedGap<Real> smooth, dense;
  V target_logit = splat<Real>(kNaN<Real>);
  IntVec<Real> rank{}, arg{};
  int64_t arg_block = 0;  // first class of the step that last raised ref

  // z: K vectors of logits of classes from `first_class` on; w, t: the class weights and dense targets beside them.
  template <int K, bool kFirst> LL_INLINE void step(const V* z, const V* w, const V* t, int64_t first_class) {
    V loser[K];
    LL_UNROLL
    for (int k = 0; k < K; ++k) {
      loser[k] = minimum<Real>(top, z[k]);
      top = kFirst ? z[k] : maximum<Real>(z[k], top);
    }
    if (__builtin_expect(greater_bits(top, kLazyRef ? limit : ref) != 0, 0)) raise<K>(z, first_class);
    if constexpr (!kFirst) lose<K>(loser);
    if constexpr ((Flags & kToken) != 0) LL_UNROLL
    for (int k = 0; k < K; ++k) rank -= z[k] > target_logit;
    if constexpr ((Flags & (kSmooth | kDense)) != 0) {
      V smooth_gap[K], dense_gap[K], weight[K];
      LL_UNROLL
      for (int k = 0; k < K; ++k) {
        const V gap = z[k] == -kInf<Real> ? splat<Real>(kInf<Real>) : ref - z[k];
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
  }

  // Adds entries that are not the maximum.
  template <int K> LL_INLINE void lose(const V* loser) {
    V e[K], gap[K];
    const V above = maximum<Real>(splat<Real>(Real(-1e30)), ref);  // finite while every logit so far is -inf
    LL_UNROLL
    for (int k = 0; k < K; ++k) {
      const Exponential<Real> x = split_exp(maximum<Real>(splat<Real>(static_cast<Real>(-2 * kHuge)), loser[k]));
      e[k] = scale_by_power(x.fraction, x.power - power);
      if constexpr ((Flags & kToken) != 0) gap[k] = e[k] * minimum<Real>(splat<Real>(kMostGap<Real>), above - loser[k]);
    }
    rest.add(tree_sum<K>(e));
    if constexpr ((Flags & kToken) != 0) spread.add(tree_sum<K>(gap));
  }

  template <int K> __attribute__((noinline)) void raise(const V* z, int64_t first_class) {
    V best;
    if constexpr (kLazyRef) {
      best = top;
    } else if constexpr (kPerLane) {
      best = ref;
      LL_UNROLL
      for (int k = 0; k < K; ++k) {
        arg = z[k] > best ? IntVec<Real>{} + static_cast<IntOf<Real>>(first_class + k) : arg;
        best = maximum<Real>(z[k], best);
      }
    } else {
      best = splat<Real>(max_of_lanes<Real>(top));
      arg_block = first_class;
    }
    const V rise = ref == -kInf<Real> ? V{} : best - ref;
    ref = best;
    if (greater_bits(best, limit)) {
      const V huge = splat<Real>(static_cast<Real>(2 * kHuge));
      const V clamped = maximum<Real>(-huge, minimum<Real>(huge, best));
      const V raised = whole_power<Real>(clamped) - Real(kLift);
      const V drop = power - raised;
      rest.scale(drop);
      if constexpr ((Flags & kToken) != 0) spread.scale(drop);
      power = raised;
      limit = clamped + static_cast<Real>(kHeadroom);
    }
    if constexpr ((Flags & kToken) != 0) {
      const V step = minimum<Real>(splat<Real>(kMostGap<Real>), rise);
      spread.add(rest.high * step);
      spread.add(rest.low * step);
    }
    if constexpr ((Flags & kSmooth) != 0) smooth.raise(rise);
    if constexpr ((Flags & kDense) != 0) dense.raise(rise);
  }
};

// A finished fold, as plain numbers: sums are in units of exp(base) * 2^power, gaps are relative to max.
struct RowSums {
  double max, base, power, rest, spread, smooth_gap, smooth_mass, dense_gap, dense_mass;
  int64_t arg, rank;
};

template <class Real, int Flags> LL_INLINE RowSums finish(RowState<Real, Flags, false>& s) {
  const uint32_t at_max = equal_bits(s.top, s.ref);
  // One lane that holds the maximum stays out. None does when every logit is -inf or NaN came first: the row is NaN.
  const Vec<Real> others = where_first(at_max, splat<Real>(-kInf<Real>), s.top);
  s.template lose<1>(&others);
  double rest = s.rest.total();
  if (equal_bits(s.top, s.top) != kAllBits<Real>) rest = __builtin_nan("");
  RowSums sums{s.ref[0], 0, s.power[0], rest, 0, 0, 0, 0, 0, s.arg_block, 0};
  if constexpr ((Flags & kToken) != 0) {
    sums.spread = s.spread.total();
    for (int i = 0; i < kLanes<Real>; ++i) sums.rank += s.rank[i];
  }
  if constexpr ((Flags & kSmooth) != 0)
    sums.smooth_gap = s.smooth.gap.total(), sums.smooth_mass = s.smooth.mass.total();
  if constexpr ((Flags & kDense) != 0) sums.dense_gap = s.dense.gap.total(), sums.dense_mass = s.dense.mass.total();
  return sums;
}

template <class Real, int Flags> LL_INLINE RowSums finish_lane(const RowState<Real, Flags, true>& s, int lane) {
  const auto sum = [lane](const PairSum<Real>& p) { return p.total_of_lane(lane); };
  const double rest = s.top[lane] == s.top[lane] ? sum(s.rest) : __builtin_nan("");
  return {(RowState<Real, Flags, true>::kLazyRef ? s.top : s.ref)[lane],
          0,
          s.power[lane],
          rest,
          sum(s.spread),
          sum(s.smooth.gap),
          sum(s.smooth.mass),
          sum(s.dense.gap),
          sum(s.dense.mass),
          s.arg[lane],
          s.rank[lane]};
}

// The fold of a row from the folds of its two parts; `a` holds the lower class indices.
inline RowSums combine(const RowSums& a, const RowSums& b) {
  const bool later = b.max > a.max;
  const RowSums &high = later ? b : a, &low = later ? a : b;
  RowSums sum = high;
  sum.rank = a.rank + b.rank;
  const auto scale = [&](double v) {
    return v == 0 ? 0 : __builtin_ldexp(v, static_cast<int>(low.power - high.power));
  };
  const double gap = low.max == high.max ? 0 : high.max - low.max;
  const double e = low.max == -__builtin_inf() ? 0 : __builtin_exp(low.max - high.power * 0.6931471805599453);
  sum.rest += scale(low.rest) + e;
  sum.spread += scale(low.spread) + (low.max == -__builtin_inf() ? 0 : (scale(low.rest) + e) * gap);
  sum.smooth_mass += low.smooth_mass;
  sum.smooth_gap += low.smooth_gap + (low.smooth_mass == 0 ? 0 : low.smooth_mass * gap);
  sum.dense_mass += low.dense_mass;
  sum.dense_gap += low.dense_gap + (low.dense_mass == 0 ? 0 : low.dense_mass * gap);
  return sum;
}

}  // namespace logitless::LL_ISA
