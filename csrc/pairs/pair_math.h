// What two rows of logits have to do with each other, one vector of classes at a time.
//
// Precision policy: with d = log q - log p, every divergence is a sum of terms that are >= 0 by themselves:
//   KL(p||q) = sum p phi(d), phi(d) = exp(d) - 1 - d         KL(q||p) = sum q phi(-d)
//   JS       = sum m h(d),   h(d) = d/2 tanh(d/2) - log cosh(d/2), m = (p + q) / 2
// phi, h and log cosh are evaluated without cancellation, near 0 by polynomials fitted to their relative error. The
// difference of two logits is exact (TwoSum), so d is right to an ulp even where the rows differ by 1e-7.
#pragma once

#include "simd/vmath.h"

namespace logitless::LL_ISA {

template <class Real, int N>
LL_INLINE Vec<Real> polynomial(Vec<Real> x, const double (&coefficients)[N]) {  // the highest power first
  Vec<Real> y = splat<Real>(static_cast<Real>(coefficients[0]));
  for (int i = 1; i < N; ++i) y = y * x + static_cast<Real>(coefficients[i]);
  return y;
}

// (exp(r) - 1 - r) / r^2 for |r| <= log(2) / 2
inline constexpr double kPhiFloat[] = {0.00019891080463998842, 0.0013933730715792083, 0.0083333108446478626,
                                       0.041666464197405692,   0.16666666681704215,   0.50000000135387299};
inline constexpr double kPhiDouble[] = {2.0914755325893202e-9,
                                        2.5105312729622102e-8,
                                        2.755727347871858e-7,
                                        2.7557255170000887e-6,
                                        2.4801587325677462e-5,
                                        0.00019841269875002279,
                                        0.0013888888888883711,
                                        0.0083333333333260831,
                                        0.04166666666666667,
                                        0.16666666666666671,
                                        0.5};
// log cosh(y / 2) / y^2 and h(y) / y^2 in y^2, for 0 <= y <= 2
inline constexpr double kLogCoshFloat[] = {-3.9088902432728651e-10, 1.075431071276603e-8,   -1.6587156059653133e-7,
                                           2.1106366192135477e-6,   -2.6327341725485239e-5, 0.00034721038264620425,
                                           -0.005208331110057504,   0.1249999999307175};
inline constexpr double kLogCoshDouble[] = {
    -5.3002028918657345e-19, 2.2601384080667406e-17, -4.8682679703216868e-16, 7.3381362595312032e-15,
    -9.1086913423989146e-14, 1.0326868446646286e-12, -1.1366546271822767e-11, 1.2498817221274014e-10,
    -1.3883302254568008e-9,  1.5660385693938572e-8,  -1.8032296059747428e-7,  2.1356922295492721e-6,
    -2.6351686505622917e-5,  0.00034722222222194867, -0.0052083333333333205,  0.125};
inline constexpr double kShannonFloat[] = {4.2665246851919255e-10, -1.1848101519174494e-8, 1.7320858618974504e-7,
                                           -1.9189134693003518e-6, 1.91371876979503e-5,    -0.00018439898502643904,
                                           0.0017360872237066175,  -0.015624996462109131,  0.12499999991286402};
inline constexpr double kShannonDouble[] = {-1.0065934062002927e-19, 4.6148860532202393e-18,  -1.0522905355626571e-16,
                                            1.6350717695769903e-15,  -2.0166028034583562e-14, 2.1829865731075107e-13,
                                            -2.2189312799952352e-12, 2.2007965003634843e-11,  -2.165765143807731e-10,
                                            2.1256506816060727e-9,   -2.082580795837076e-8,   2.0358561718709269e-7,
                                            -1.9835528544563122e-6,  1.9221230153285099e-5,   -0.00018446180555459578,
                                            0.0017361111111110216,   -0.015624999999999997,   0.125};
// log1p(e) / e for 0 <= e <= exp(-2)
inline constexpr double kLog1pFloat[] = {-0.11953338093275451, 0.19331548391827263,  -0.24954633205963873,
                                         0.33331919221178049,  -0.49999983733719392, 0.99999999969474911};
inline constexpr double kLog1pDouble[] = {0.035290837453442913,
                                          -0.069455344302514646,
                                          0.088000709253687237,
                                          -0.099594114403372197,
                                          0.11107225775121592,
                                          -0.12499742369309387,
                                          0.14285702528386903,
                                          -0.16666666305801139,
                                          0.19999999992871822,
                                          -0.24999999999916035,
                                          0.33333333333332819,
                                          -0.49999999999999999,
                                          1.0};

#define LL_POLYNOMIAL(name, table)                                                       \
  LL_INLINE Vec<float> name(Vec<float> x) { return polynomial<float>(x, table##Float); } \
  LL_INLINE Vec<double> name(Vec<double> x) { return polynomial<double>(x, table##Double); }
LL_POLYNOMIAL(phi_over_square, kPhi)
LL_POLYNOMIAL(log_cosh_over_square, kLogCosh)
LL_POLYNOMIAL(shannon_over_square, kShannon)
LL_POLYNOMIAL(log1p_over_x, kLog1p)
#undef LL_POLYNOMIAL

// The numbers of rows below are of one row (S is Real) or of a row a lane (S is a vector).

// How to read one of the two rows: p = exp(z - base) * (unit + unit_low) * 2^-power = exp(z - lse). The rounding of
// `unit` alone would be an error that all terms share.
template <class Real, class S = Real> struct RowScale {
  S unit, unit_low, power, base, top;

  static RowScale from(double max, double log_sum) {
    const bool huge = !(__builtin_fabs(max) <= kHuge);
    const double power = huge ? 0.0 : __builtin_rint(max * 1.4426950408889634);
    const double rest = huge ? 0.0 : (max - power * 0x1.62e42feep-1) - power * 0x1.a39ef35793c76p-33;
    const double unit = exp<double>(splat<double>(-(rest + log_sum)))[0];
    const Real rounded = static_cast<Real>(unit);
    return {rounded, static_cast<Real>(unit - static_cast<double>(rounded)), static_cast<Real>(power),
            static_cast<Real>(huge ? max : 0.0), static_cast<Real>(max)};
  }
  LL_INLINE Vec<Real> probability(Vec<Real> z) const {
    const Exponential<Real> e = split_exp(maximum<Real>(splat<Real>(static_cast<Real>(-2 * kHuge)), z - base));
    return scale_by_power(e.fraction * unit + e.fraction * unit_low, e.power - power);
  }
};

template <class Real>
inline constexpr Real kFar = sizeof(Real) == 4 ? Real(20) : Real(45);  // beyond it exp(-d) does not count
template <class Real>
inline constexpr Real kApart = Real(3);  // beyond it p exp(d) is better had as q: exp magnifies the rounding of d
template <class Real> inline constexpr Real kBig = Real(1e30);

template <class Real> LL_INLINE Vec<Real> clamp(Vec<Real> x, Real most) {
  return maximum<Real>(splat<Real>(-most), minimum<Real>(splat<Real>(most), x));
}

// log q - log p = ((zq - zp) - (max_q - max_p)) - (log_sum_q - log_sum_p), each difference kept as high + low: where
// one class dominates both rows, the first is 0 and the ratio is the second, however small.
template <class Real, class S = Real> struct LogRatio {
  using V = Vec<Real>;
  S top_high, top_low, sum_high, sum_low;

  LogRatio() = default;
  LogRatio(double max_p, double max_q, double log_sum_gap) {
    const double top = max_q - max_p, back = top - max_q, lost = (max_q - (top - back)) + (-max_p - back);
    top_high = static_cast<Real>(top);
    top_low = static_cast<Real>((top - static_cast<double>(top_high)) + lost);
    sum_high = static_cast<Real>(log_sum_gap);
    sum_low = static_cast<Real>(log_sum_gap - static_cast<double>(sum_high));
  }
  // +-inf where one logit is -inf; 0 where both are, or where a row is NaN, which its probabilities carry.
  LL_INLINE V operator()(V zp, V zq) const {
    const V u = zq - zp, back = u - zq, lost = (zq - (u - back)) + (-zp - back);
    const V d = ((u - top_high) + ((lost == lost ? lost : V{}) - top_low) - sum_high) - sum_low;
    return d == d ? d : V{};
  }
};

// p phi(d) and q phi(-d).
template <class Real> struct KlTerms {
  using V = Vec<Real>;
  V near, n, r, square;
  LL_INLINE explicit KlTerms(V d) : near(clamp<Real>(d, kFar<Real>)) {
    n = whole_power<Real>(near);
    if constexpr (sizeof(Real) == 4)
      r = (near - n * 0.693359375f) + n * 2.1219444e-4f;
    else
      r = (near - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    square = r * r;
  }
  LL_INLINE V phi() const {
    const V scale = scale_by_power(splat<Real>(1), n);
    return square * phi_over_square(r) * scale + (scale * r + ((scale - 1) - near));
  }
  LL_INLINE V phi_of_minus() const {
    const V scale = scale_by_power(splat<Real>(1), -n);
    return square * phi_over_square(-r) * scale + ((near + (scale - 1)) - scale * r);
  }
  LL_INLINE V forward(V p, V q, V d) const {
    V term = d < -kFar<Real> ? -1 - d : phi();
    term = d > kApart<Real> ? q - p * (1 + minimum<Real>(splat<Real>(kBig<Real>), d)) : p * term;
    return d == -kInf<Real> ? splat<Real>(kInf<Real>) : term;
  }
  LL_INLINE V reverse(V p, V q, V d) const {
    V term = d > kFar<Real> ? d - 1 : phi_of_minus();
    term = d < -kApart<Real> ? p - q * (1 - maximum<Real>(splat<Real>(-kBig<Real>), d)) : q * term;
    return d == kInf<Real> ? splat<Real>(kInf<Real>) : term;
  }
};

// Against the mixture m = (p + q) / 2: h, log(m / p) and log(q / m), and the smaller of p / (p + q) and q / (p + q),
// which is how log(m / p) and log(q / m) change with d.
template <class Real> struct Mixture {
  using V = Vec<Real>;
  V h, log_m_p, log_q_m, smaller_share;
  LL_INLINE explicit Mixture(V d) {
    constexpr Real ln2 = static_cast<Real>(0.6931471805599453);
    const V y = d < 0 ? -d : d, y2 = y * y;
    const V far = minimum<Real>(splat<Real>(Real(700)), y), e = exp<Real>(-far), log1p_e = e * log1p_over_x(e);
    const V even = y2 * log_cosh_over_square(y2);
    smaller_share = e / (1 + e);
    const auto is_near = y <= 2;
    h = is_near ? y2 * shannon_over_square(y2) : (ln2 - log1p_e) - far * smaller_share;
    log_m_p = is_near ? d * Real(0.5) + even : (d > 0 ? d : V{}) - (ln2 - log1p_e);
    log_q_m = is_near ? d * Real(0.5) - even : (d < 0 ? d : V{}) + (ln2 - log1p_e);
  }
};

}  // namespace logitless::LL_ISA
