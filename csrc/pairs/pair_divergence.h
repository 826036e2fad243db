// The sums of a pass for one divergence alone, and what they tell: the skewed KL, the weighted JS, the total variation.
//
// Formula, by pair_mixture.h, with c = 1 - w, d = log q - log p and r = 1 - p / m:
//   skewed KL    F = sum p psi(m / p - 1),  and sum p r, which its gradient needs
//   weighted JS  w KL(p || m) + c KL(q || m), each a sum of the same kind
//   variation    (sum over q > p of q - p, and over p > q of p - q) / 2, and what p and q have where the one or the
//                other is larger, or where they are equal
//
// Layout: vectors of classes, or of rows in lanes; the valid lanes alone count.
//
// Precision policy: as in pair_stats.cpp. sum (q - p) is the common error e in every d. It moves F by c^2 e^2 / 2, the
// JS by w c e^2 / 2 and a little of first order, that is e times the measure, so the pass is repeated where e^2 would
// show. It moves sum p r by e times sum c q (p / m)^2, and the variation by e times what q has above p less what it has
// below, over 2: these are taken out. For the variation the pass is repeated where e is so large that it tells wrongly
// which of the two is larger.
#pragma once

#include <math.h>

#include "kernels.h"
#include "pairs/pair_mixture.h"
#include "simd/sums.h"

namespace logitless::LL_ISA {
namespace {

// The sums of one divergence, lane by lane. Each has add(), and totals() with what says which lanes are a row.
template <class Real, Divergence D> struct DivergenceSums;
// Over the classes of one row, or of some of them.
template <Divergence D> struct DivergenceTotals;
// What they tell: take() says whether another pass is wanted, with log_sum_gap corrected; value() is the measure, and
// save() writes what the gradient needs beside the first five numbers.
template <class Real, Divergence D> struct DivergenceFound;

// ---- the skewed KL
// -------------------------------------------------------------------------------------------------------

template <> struct DivergenceTotals<Divergence::kSkewedKl> {
  double kl, share, difference;
  double change;  // of share with d
  void add(const DivergenceTotals& o) {
    kl += o.kl;
    share += o.share;
    difference += o.difference;
    change += o.change;
  }
};
template <class Real> struct DivergenceSums<Real, Divergence::kSkewedKl> {
  static constexpr bool kOfOneDivergence = true;
  PairSum<Real> kl, share, difference;
  Vec<Real> change{};
  LL_INLINE void add_class(Vec<Real> p, Vec<Real> q, Vec<Real> d, const MixtureWeights<Real>& weights) {
    const WeightedMixture<Real> m(d, weights);
    kl.add(m.term_of_p(p, q));
    const Vec<Real> r = m.share(weights), rest = 1 - r;
    share.add(p * r);
    difference.add(m.q_larger ? q * m.lost : -(p * m.lost));
    change += weights.of_q * q * (rest * rest);
  }
  template <class Lanes> DivergenceTotals<Divergence::kSkewedKl> totals(const Lanes& of) const {
    return {of(kl), of(share), of(difference), of(change)};
  }
};
template <class Real> struct DivergenceFound<Real, Divergence::kSkewedKl> {
  double log_sum_gap, kl, share;
  bool take(const DivergenceTotals<Divergence::kSkewedKl>& sums, double weight, double tolerance) {
    const double error = ::log1p(sums.difference), of_q = 1 - weight;
    kl = sums.kl;
    share = sums.share - error * sums.change;
    log_sum_gap += error;
    return error * error * of_q * of_q > tolerance * kl;
  }
  double value(double) const { return kl; }
  void save(double* to) const {
    to[kSkewedKlValue] = kl;
    to[kSkewedKlShare] = share;
  }
};

// ---- the weighted JS
// -----------------------------------------------------------------------------------------------------

template <> struct DivergenceTotals<Divergence::kWeightedJs> {
  double kl_p_m, kl_q_m, difference;
  void add(const DivergenceTotals& o) {
    kl_p_m += o.kl_p_m;
    kl_q_m += o.kl_q_m;
    difference += o.difference;
  }
};
template <class Real> struct DivergenceSums<Real, Divergence::kWeightedJs> {
  static constexpr bool kOfOneDivergence = true;
  PairSum<Real> kl_p_m, kl_q_m, difference;
  LL_INLINE void add_class(Vec<Real> p, Vec<Real> q, Vec<Real> d, const MixtureWeights<Real>& weights) {
    const WeightedMixture<Real> m(d, weights);
    kl_p_m.add(m.term_of_p(p, q));
    kl_q_m.add(m.term_of_q(p, q));
    difference.add(m.q_larger ? q * m.lost : -(p * m.lost));
  }
  template <class Lanes> DivergenceTotals<Divergence::kWeightedJs> totals(const Lanes& of) const {
    return {of(kl_p_m), of(kl_q_m), of(difference)};
  }
};
template <class Real> struct DivergenceFound<Real, Divergence::kWeightedJs> {
  double log_sum_gap, kl_p_m, kl_q_m;
  bool take(const DivergenceTotals<Divergence::kWeightedJs>& sums, double weight, double tolerance) {
    const double error = ::log1p(sums.difference);
    kl_p_m = sums.kl_p_m;
    kl_q_m = sums.kl_q_m;
    log_sum_gap += error;
    return error * error * weight * (1 - weight) > tolerance * value(weight);
  }
  double value(double weight) const { return weight * kl_p_m + (1 - weight) * kl_q_m; }
  void save(double* to) const {
    to[kWeightedKlPM] = kl_p_m;
    to[kWeightedKlQM] = kl_q_m;
  }
};

// ---- the total variation
// -------------------------------------------------------------------------------------------------

// A sum of eight terms after the other, and these in pairs: seven roundings, of which the many blocks of a long row
// have their own.
template <class Real> struct BlockSum {
  PairSum<Real> blocks;
  Vec<Real> block{};
  LL_INLINE void add(Vec<Real> x) { block += x; }
  LL_INLINE void close() {
    blocks.add(block);
    block = Vec<Real>{};
  }
  template <class Lanes> double total(const Lanes& of) const { return of(blocks) + of(block); }
};

template <> struct DivergenceTotals<Divergence::kTotalVariation> {
  double rise, fall;                          // sum of q - p where q is larger, of p - q where p is
  double p_above, p_below, q_above, q_below;  // what each has where p is larger, and where q is
  double tie;                                 // what either has where they are equal
  void add(const DivergenceTotals& o) {
    rise += o.rise;
    fall += o.fall;
    p_above += o.p_above;
    p_below += o.p_below;
    q_above += o.q_above;
    q_below += o.q_below;
    tie += o.tie;
  }
};
template <class Real> struct DivergenceSums<Real, Divergence::kTotalVariation> {
  static constexpr bool kOfOneDivergence = true;
  BlockSum<Real> rise, fall, p_below, q_above, tie;
  int in_block = 0;
  LL_INLINE void add_class(Vec<Real> p, Vec<Real> q, Vec<Real> d, const MixtureWeights<Real>&) {
    using V = Vec<Real>;
    const V difference = difference_of<Real>(p, q, d), zero{};
    const auto up = d > 0, down = d < 0;
    rise.add(up ? difference : zero);
    fall.add(down ? -difference : zero);
    p_below.add(up ? p : zero);
    q_above.add(down ? q : zero);
    tie.add(d == 0 ? p : zero);
    if (++in_block < 8) return;
    in_block = 0;
    rise.close();
    fall.close();
    p_below.close();
    q_above.close();
    tie.close();
  }
  // What p has above, and q below, is a sum of two that are known: nothing cancels.
  template <class Lanes> DivergenceTotals<Divergence::kTotalVariation> totals(const Lanes& of) const {
    const double up = rise.total(of), down = fall.total(of), below = p_below.total(of), above = q_above.total(of);
    return {up, down, above + down, below, above, below + up, tie.total(of)};
  }
};
template <class Real> struct DivergenceFound<Real, Divergence::kTotalVariation> {
  double log_sum_gap, variation;
  DivergenceTotals<Divergence::kTotalVariation> sums;
  bool take(const DivergenceTotals<Divergence::kTotalVariation>& found, double, double tolerance) {
    sums = found;
    const double error = ::log1p(sums.rise - sums.fall);
    const double corrected = (sums.rise + sums.fall - error * (sums.q_below - sums.q_above)) / 2;
    variation = corrected < 0 ? 0 : corrected;
    // Where the pass stands, its own difference of the log_sum tells the gradient which of p and q is larger.
    const bool again = error * error > tolerance * variation * variation;
    if (again) log_sum_gap += error;
    return again;
  }
  double value(double) const { return variation; }
  void save(double* to) const {
    const double of_p[3] = {2 * sums.p_below + sums.tie, -2 * sums.p_above - sums.tie, sums.p_below - sums.p_above};
    const double of_q[3] = {2 * sums.q_below + sums.tie, -2 * sums.q_above - sums.tie, sums.q_below - sums.q_above};
    memcpy(to + kVariationP, of_p, sizeof of_p);
    memcpy(to + kVariationQ, of_q, sizeof of_q);
  }
};

}  // namespace
}  // namespace logitless::LL_ISA
