// The polynomials that pair_math.h takes near 0, where a plain formula would cancel.
//
// Precision policy: each is fitted to the relative error of its function over the named range, once to what a float
// shows and once to what a double does.
#pragma once

#include "simd/vec.h"

namespace logitless::LL_ISA {

// By Horner's scheme, the highest power first.
template <class Real, int N> LL_INLINE Vec<Real> polynomial(Vec<Real> x, const double (&coefficients)[N]) {
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

// (atanh(s) - s) / s^3 in z = s^2, for 0 <= z <= 1/9
inline constexpr double kAtanhTailFloat[] = {0.11643587574026832, 0.10847037721675736, 0.14296561575914343,
                                             0.19999845822733533, 0.33333333681668178};
inline constexpr double kAtanhTailDouble[] = {0.076660895620601046, 0.031373996789600398, 0.049785238987022358,
                                              0.052391268261056549, 0.058840937899642677, 0.066665830956758896,
                                              0.076923103220898014, 0.090909090386021696, 0.11111111111723652,
                                              0.14285714285710586,  0.20000000000000009,  0.33333333333333333};

#define LL_POLYNOMIAL(name, table)                                                       \
  LL_INLINE Vec<float> name(Vec<float> x) { return polynomial<float>(x, table##Float); } \
  LL_INLINE Vec<double> name(Vec<double> x) { return polynomial<double>(x, table##Double); }
LL_POLYNOMIAL(phi_over_square, kPhi)
LL_POLYNOMIAL(log_cosh_over_square, kLogCosh)
LL_POLYNOMIAL(shannon_over_square, kShannon)
LL_POLYNOMIAL(log1p_over_x, kLog1p)
LL_POLYNOMIAL(atanh_tail, kAtanhTail)
#undef LL_POLYNOMIAL

}  // namespace logitless::LL_ISA
