// Measures the errors of the exponentials of exp.h, for docs/kernels.md. Not part of the package. From the repository's
// root, for the instruction set of this processor:
//
//   g++ -std=gnu++17 -O2 -march=native -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi
//       -DLL_ISA=here -Icsrc csrc/simd/exp_error.cpp -o exp_error && ./exp_error
//
// (`-march=x86-64-v3` for AVX2, `-march=x86-64` for portable.) It prints the largest error that it meets of each form,
// over millions of arguments of all sizes, and ends with 1 where one is above the bound that docs/kernels.md derives.
#include <cmath>
#include <cstdio>

#include "simd/exp.h"

namespace logitless::LL_ISA {
namespace {

bool all_good = true;

// In units in the last place of Real at the truth.
template <class Real> long double ulps(Real got, long double truth) {
  int exponent;
  std::frexp(truth, &exponent);
  constexpr int kBits = sizeof(Real) == 4 ? 24 : 53;
  return std::fabs(static_cast<long double>(got) - truth) / std::ldexp(1.0L, exponent - kBits);
}

// f: of a vector; truth: of one argument. Arguments from `least` to `most` by even steps, of which rounding makes every
// kind of last digits, and the same again ever closer to 0.
template <class Real, class F, class Truth>
void measure(const char* name, double bound, double least, double most, const F& f, const Truth& truth) {
  constexpr int64_t kArguments = 1 << 22;
  constexpr int L = kLanes<Real>;
  long double worst = 0, at = 0;
  for (double shrink = 1; shrink > 0x1p-24; shrink /= 64) {
    for (int64_t i = 0; i < kArguments; i += L) {
      Vec<Real> x;
      for (int lane = 0; lane < L; ++lane) {
        const double share = static_cast<double>(i + lane) / kArguments;
        x[lane] = static_cast<Real>((least + (most - least) * share) * shrink);
      }
      const Vec<Real> y = f(x);
      for (int lane = 0; lane < L; ++lane) {
        const long double error = ulps<Real>(y[lane], truth(static_cast<long double>(x[lane])));
        if (!(error <= worst)) {
          worst = error;
          at = static_cast<long double>(x[lane]);
        }
      }
    }
  }
  const bool good = worst <= static_cast<long double>(bound);
  all_good = all_good && good;
  std::printf("%-28s %10.3Lf ulp at %-12.6Lg bound %g%s\n", name, worst, at, bound, good ? "" : "  ABOVE IT");
}

// The truth of a form that leaves its drift in, and is too large by `bias`. The power is the one that step 1 rounds to.
long double drifting(long double x, double bias, double drift) {
  const long double steps = kSixteenthsOfPower ? 16 : 1;
  const long double n = std::nearbyint(x * 1.4426950408889634074L * steps) / steps;
  return std::exp(x - drift * n) * (1 + static_cast<long double>(bias));
}

void measure_all() {
  const auto truth = [](long double x) { return std::exp(x); };
  constexpr double kWhole = kSixteenthsOfPower ? 0.9 : LL_HAS_FMA ? 1.1 : 1.4;
  constexpr double kTerm = kSixteenthsOfPower ? 1.9 : LL_HAS_FMA ? 1 : 1.4;
  constexpr double kRough = kSixteenthsOfPower ? 9.5 : kWhole;
  measure<float>("exp, float", kWhole, -87, 88, [](Vec<float> x) { return exp<float>(x); }, truth);
  measure<double>("exp, double", 1.2, -700, 700, [](Vec<double> x) { return exp<double>(x); }, truth);

  const auto in_units = [](long double x) { return drifting(x, kUnitExpBias<float>, kDrift<float>); };
  const UnitExp<float> unit_exp(Vec<float>{});
  // A term alone: here it is rounded when it is added to 0, which in a sum is the sum's rounding.
  const auto term = [&](Vec<float> x) { return unit_exp.add_to(Vec<float>{}, x); };
  measure<float>("UnitExp, float", kTerm, -80, 80, term, in_units);
  const auto rough_term = [&](Vec<float> x) {
    Vec<float> sum[2] = {}, seen{};
    const Vec<float> one[1] = {x};
    unit_exp.template add_all<true, true>(sum, seen, one);
    return sum[0];
  };
  measure<float>("UnitExp, float, to 2^-21", kRough, -80, 80, rough_term, in_units);

  const auto in_row = [](long double x) { return drifting(x, 0, kRowDrift<float>); };
  const RowExp<float, false> row_exp(Vec<float>{}, splat<float>(1));
  measure<float>("RowExp, float", kWhole, -80, 80, [&](Vec<float> x) { return row_exp(x); }, in_row);
  const RowExp<float, true> rough_row_exp(Vec<float>{}, splat<float>(1));
  measure<float>("RowExp, float, to 2^-21", kRough, -80, 80, [&](Vec<float> x) { return rough_row_exp(x); }, in_row);
}

}  // namespace
}  // namespace logitless::LL_ISA

int main() {
  logitless::LL_ISA::measure_all();
  return logitless::LL_ISA::all_good ? 0 : 1;
}
