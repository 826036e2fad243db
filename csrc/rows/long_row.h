// The fold of one row of many classes against its largest logit, for log-sum, entropy and rank.
//
// Formula: rest, spread and rank of row_state.h, with rest and spread in units of 2^power.
//
// Layout: one row of consecutive logits, eight vectors at a time, then four, two and one.
//
// Precision policy: as in row_state.h one logit that is the largest stays out of the sum. It is kept as a number beside
// the sum, not as a top in each lane, so a logit costs one comparison less. A block's eight terms are added in two
// plain sums and these in a PairSum.
//
// Steps:
//   1. Guess the maximum from the first kScout logits, and the unit from that.
//   2. Of each block of vectors, take the largest logit of each lane. Only where a lane reaches the maximum so far is
//      the block looked at more closely, which is rare.
//   3. There, the new largest logit leaves the block, and the one that was held out so far takes its place in it: each
//      but the last held out is added once. The gaps grow by the rise, and the unit follows where it must.
//   4. Add exp of the block to `rest`, and exp times the gap to `spread`.
//   5. Reduce the lanes and take the unit's drift out.
#pragma once

#include "parallel.h"
#include "rows/row_unit.h"

namespace logitless::LL_ISA {

// K vectors from the i-th logit on; of a single vector, those beyond n are -inf.
template <int K, class T> LL_INLINE void load_block(const T* z, int64_t i, int64_t n, Vec<Compute<T>> (&x)[K]) {
  if constexpr (K > 1)
    load_unordered<K>(z + i, x);
  else
    x[0] = n - i >= kLanes<Compute<T>> ? load(z + i) : load_partial(z + i, n - i, -kInf<Compute<T>>);
}

// Flags: 0 or kToken. False where a logit is huge or NaN: no row for this fold.
template <class T, int Flags>
__attribute__((noinline)) bool fold_long(const T* z, int64_t n, Compute<T> target_logit, RowSums& sums) {
  using Real = Compute<T>;
  using V = Vec<Real>;
  constexpr int L = kLanes<Real>;
  // 1. No logit is held out yet: the guess may be any logit of the row, which will reach it again.
  Real max = max_of(z, n < kScout ? n : kScout);
  if (!is_moderate(max)) return false;
  V top = splat<Real>(max), power = power_of_unit(max);
  UnitExp<Real> exp(power);
  Real limit = max + static_cast<Real>(kHeadroom);
  bool held_out = false;  // whether one logit that equals `top` is held out of the sum
  int64_t arg = 0;
  PairSum<Real> rest, spread;
  IntVec<Real> rank{};

  // 3.
  const auto hold_out = [&](auto count, V* x, Real best, int64_t first_class) {
    const V former = held_out ? top : exp.least;
    bool placed = false;
    LL_UNROLL
    for (int k = 0; k < decltype(count)::value; ++k) {
      const uint32_t bits = placed ? 0 : equal_bits(x[k], splat<Real>(best));
      if (bits) {
        x[k] = where_first(bits, former, x[k]);
        placed = true;
      }
    }
    if constexpr ((Flags & kToken) != 0) {
      spread.add(rest.high * (best - max));
      spread.add(rest.low * (best - max));
    }
    held_out = true;
    max = best;
    top = splat<Real>(best);
    arg = first_class;
    if (best > limit) {
      const V raised = power_of_unit(best), drop = power - raised;
      rest.scale(drop);
      if constexpr ((Flags & kToken) != 0) spread.scale(drop);
      power = raised;
      exp = UnitExp<Real>(power);
      limit = best + static_cast<Real>(kHeadroom);
    }
  };

  const auto add = [&](auto count, int64_t i) __attribute__((always_inline)) {
    constexpr int K = decltype(count)::value;
    V x[K];
    if constexpr (K == 8) ask_ahead(z + i, K * L);
    load_block<K>(z, i, n, x);
    if constexpr ((Flags & kToken) != 0) {
      LL_UNROLL
      for (int k = 0; k < K; ++k) rank -= x[k] > target_logit;
    }
    // 2.
    V block_top = x[0];
    LL_UNROLL
    for (int k = 1; k < K; ++k) block_top = maximum<Real>(block_top, x[k]);
    if (__builtin_expect(reaching_bits(block_top, top) != 0, 0) && (!held_out || greater_bits(block_top, top))) {
      const Real best = max_of_lanes<Real>(block_top);
      if (!is_moderate(best)) return false;
      hold_out(count, x, best, i);
    }
    // 4. `rest` comes out the same whatever else is asked for.
    V sum[2] = {};
    LL_UNROLL
    for (int k = 0; k < K; ++k) sum[k % 2] = exp.add_to(sum[k % 2], x[k]);
    rest.add(K > 1 ? sum[0] + sum[1] : sum[0]);
    if constexpr ((Flags & kToken) != 0) {
      V e_gap[K];
      LL_UNROLL
      for (int k = 0; k < K; ++k) {
        const V counted = maximum<Real>(exp.least, x[k]);
        e_gap[k] = exp.add_to(V{}, counted) * (top - counted);
      }
      spread.add(tree_sum<K>(e_gap));
    }
    return true;
  };

  int64_t i = 0;
  for (; i + 8 * L <= n; i += 8 * L)
    if (!add(Constant<8>{}, i)) return false;
  if (i + 4 * L <= n) {
    if (!add(Constant<4>{}, i)) return false;
    i += 4 * L;
  }
  if (i + 2 * L <= n) {
    if (!add(Constant<2>{}, i)) return false;
    i += 2 * L;
  }
  for (; i < n; i += L)
    if (!add(Constant<1>{}, i)) return false;

  // 5.
  const double unit = static_cast<double>(power[0]);
  const auto total = [unit](const auto& sum) {
    return without_drift<Real>(splat<double>(sum_of_lanes(sum.high, sum.low)), splat<double>(unit))[0];
  };
  sums = {max, 0, unit, total(rest), 0, 0, 0, 0, 0, arg, 0};
  if constexpr ((Flags & kToken) != 0) {
    sums.spread = total(spread);
    for (int lane = 0; lane < L; ++lane) sums.rank += rank[lane];
  }
  if (sums.rest <= static_cast<double>(least_sum<Real>(n + L))) sums.rest = sums.spread = 0;
  return sums.rest - sums.rest == 0 && sums.spread - sums.spread == 0;
}

}  // namespace logitless::LL_ISA
