// Sums that do not lose what they add.
//
// Precision policy: a PairSum keeps what each addition rounds off and is exact to about twice the precision of its
// type, so its error does not grow with the number of terms. A DoubleSum adds floats in double. A tree_sum adds a few
// vectors by halves, with the rounding of log2(K) additions.
#pragma once

#include "simd/exp.h"

namespace logitless::LL_ISA {

// A running sum in every lane, high + low, by Knuth's TwoSum: `back` is what of x the sum took, and low collects what
// it did not.
template <class Real> struct PairSum {
  Vec<Real> high{}, low{};
  LL_INLINE void add(Vec<Real> x) {
    const Vec<Real> sum = high + x, back = sum - high;
    low += (high - (sum - back)) + (x - back);
    high = sum;
  }
  // Into another unit: times 2^power, which is exact.
  LL_INLINE void scale(Vec<Real> power) {
    high = scale_by_power(high, power);
    low = scale_by_power(low, power);
  }
  // An infinite term makes `low` NaN; the sum is then `high` alone.
  LL_INLINE double total() const {
    const double sum = sum_of_lanes(high);
    return sum - sum == 0 ? sum + sum_of_lanes(low) : sum;
  }
  LL_INLINE double total_of_lane(int lane) const {
    const double sum = high[lane];
    return sum - sum == 0 ? sum + low[lane] : sum;
  }
};

// Lanes of either type added up in double.
template <class Real> struct DoubleSum;
template <> struct DoubleSum<double> {
  Vec<double> lanes{};
  LL_INLINE void add(Vec<double> x) { lanes += x; }
  LL_INLINE double total() const { return sum_of_lanes(lanes); }
};
template <> struct DoubleSum<float> {
  Vec<double> lower{}, upper{};
  LL_INLINE void add(Vec<float> x) {
    Vec<double> x_lower, x_upper;
    to_doubles(x, x_lower, x_upper);
    lower += x_lower;
    upper += x_upper;
  }
  LL_INLINE double total() const { return sum_of_lanes(lower) + sum_of_lanes(upper); }
};

template <int K, class V> LL_INLINE V tree_sum(const V* v) {
  if constexpr (K == 1)
    return v[0];
  else
    return tree_sum<K / 2>(v) + tree_sum<K - K / 2>(v + K / 2);
}

}  // namespace logitless::LL_ISA
