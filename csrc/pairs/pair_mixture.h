// What two rows of logits have to do with their mixture in any proportion, one vector of classes at a time; in equal
// parts see Mixture of pair_math.h, which is cheaper.
//
// Formula, with m = w p + (1 - w) q, d = log q - log p, and of p and q `larger` and `smaller`, whose weights in m are A
// and B = 1 - A, with e = smaller / larger = exp(-|d|):
//   m / larger  = 1 + u,   u = -B (1 - e)
//   m / smaller = 1 + v,   v = A (1 - e) / e
//   larger (log(larger / m) + m / larger - 1)   = larger psi(u),    psi(x) = x - log1p(x) >= 0
// and of `smaller` the same with v. As sum (m - p) is 0,
//   KL(p || m) = sum p psi(m / p - 1)
// has only terms >= 0, which the skewed KL is; and w KL(p || m) + (1 - w) KL(q || m) is the JS divergence of weight w.
//
// Precision policy: log1p(x) = 2 atanh(s) and psi(x) = s (x - 2 s^2 T(s^2)) with s = x / (2 + x) and T(z) = (atanh(s) -
// s) / s^3, in which nothing cancels. Below 1 + u = 1/2, log(1 + u) is k ln2 + log1p(f), and beyond v = 1, log1p(v) is
// log1p(u) + |d|; no cancellation there costs more than three bits. smaller v is A (larger - smaller), which larger (1
// - e) gives without the rounding that an exponential of a large |d| magnifies.
//
// Steps for a vector of classes: 1. Which is larger. 2. e and 1 - e. 3. The larger's log1p and psi. 4. The smaller's.
#pragma once

#include "pairs/pair_math.h"

namespace logitless::LL_ISA {

// What p and q weigh in their mixture.
template <class Real> struct MixtureWeights {
  Real of_p, of_q;
  static MixtureWeights from(double of_p) { return {static_cast<Real>(of_p), static_cast<Real>(1 - of_p)}; }
};

template <class Real> struct WeightedMixture {
  using V = Vec<Real>;
  IntVec<Real> q_larger;
  V weight_larger;           // A
  V e, lost;                 // lost = 1 - e
  V ratio;                   // m / larger
  V log_larger, psi_larger;  // log(m / larger)
  V s_large, tail_large;     // s of u, and s^2 T
  IntVec<Real> apart;        // 1 + u < 1/2
  V log_smaller;             // log(m / smaller)
  V s_small, tail_small;     // s of v, and s^2 T
  IntVec<Real> far;          // v > 1

  // d is finite.
  LL_INLINE WeightedMixture(V d, const MixtureWeights<Real>& weights) : q_larger(d > 0) {
    // 1.
    const V of_p = splat<Real>(weights.of_p), of_q = splat<Real>(weights.of_q);
    const V gap = magnitude<Real>(d);
    weight_larger = q_larger ? of_q : of_p;
    const V weight_smaller = q_larger ? of_p : of_q;
    // 2. Beyond kNothing the smaller is 0 beside any weight.
    constexpr Real kNothing = sizeof(Real) == 4 ? Real(80) : Real(700);
    const V y = -minimum<Real>(gap, splat<Real>(kNothing)), n = whole_power<Real>(y);
    V r;
    if constexpr (sizeof(Real) == 4)
      r = (y - n * 0.693359375f) + n * 2.1219444e-4f;
    else
      r = (y - n * kLn2High) - n * kLn2Low;
    const V bend = r * r * phi_over_square(r) + r, scale = scale_by_power(splat<Real>(1), n);
    e = scale + scale * bend;
    lost = (1 - scale) - scale * bend;
    // 3.
    ratio = weight_larger + weight_smaller * e;
    const V u = -weight_smaller * lost;
    const Parts<Real> parts = parts_of(ratio);
    apart = ratio < Real(0.5);
    const V f = apart ? parts.mantissa - 1 : u, power = (apart ? parts.power : V{}) * static_cast<Real>(kLn2);
    s_large = f / (f + 2);
    const V z_large = s_large * s_large;
    tail_large = z_large * atanh_tail(z_large);
    log_larger = power + s_large * (2 + 2 * tail_large);
    psi_larger = s_large * (f - 2 * tail_large) + (apart ? (u - f) - power : V{});
    // 4.
    const V above = weight_larger * lost;  // v e
    far = above > e;
    s_small = above / (2 * e + above);
    const V z_small = s_small * s_small;
    tail_small = z_small * atanh_tail(z_small);
    log_smaller = far ? log_larger + gap : s_small * (2 + 2 * tail_small);
  }

  // larger psi(u) and smaller psi(v).
  LL_INLINE V larger_term(V larger) const { return larger * psi_larger; }
  LL_INLINE V smaller_term(V larger, V smaller) const {
    const V rise = weight_larger * lost * larger;  // smaller v
    return far ? rise - smaller * log_smaller : s_small * (rise - 2 * smaller * tail_small);
  }
  LL_INLINE V term_of_p(V p, V q) const {
    const V larger = q_larger ? q : p, smaller = q_larger ? p : q;
    return q_larger ? smaller_term(larger, smaller) : larger_term(larger);
  }
  LL_INLINE V term_of_q(V p, V q) const {
    const V larger = q_larger ? q : p, smaller = q_larger ? p : q;
    return q_larger ? larger_term(larger) : smaller_term(larger, smaller);
  }
  LL_INLINE V log_m_p() const { return q_larger ? log_smaller : log_larger; }
  LL_INLINE V log_m_q() const { return q_larger ? log_larger : log_smaller; }
  // 1 - p / m.
  LL_INLINE V share(const MixtureWeights<Real>& weights) const {
    const V part = weights.of_q * lost / ratio;
    return q_larger ? part : -part;
  }
  // log(m / p) - share = psi(-share), which has -s where m / p - 1 has s.
  LL_INLINE V log_less_share(V share) const {
    const V near = (q_larger ? s_small : s_large) * (share + 2 * (q_larger ? tail_small : tail_large));
    return (q_larger ? far : apart) ? log_m_p() - share : near;
  }
};

// q - p of a class, by which of the two is larger; 0 where they are equal. Small differences are right to an ulp.
template <class Real> LL_INLINE Vec<Real> difference_of(Vec<Real> p, Vec<Real> q, Vec<Real> d) {
  const Vec<Real> near = p * (KlTerms<Real>(d).phi() + d);
  return (d < Real(0.5)) & (d > Real(-0.5)) ? near : q - p;
}

}  // namespace logitless::LL_ISA
