// pair_row_grad: the gradient of every pair_row_stats measure with respect to both rows, in one read of the logits.
//
//   d/dzp_j = p_j (kl (-d - KL) + js/2 (log(p/m) - KL(p||m)) + ce (-log q - CE) + hp (-log p - Hp) + nll_p) + reverse (p - q)
//   d/dzq_j = q_j (reverse (d - RKL) + js/2 (log(q/m) - KL(q||m)) + hq (-log q - Hq) + nll_q) + (kl + ce) (q - p)
//   and -nll at the target, where the names stand for upstream gradients.
//
// Precision policy: d as in pair_math.h, q - p = p (exp(d) - 1) where the two are close, everything formed before the
// one rounding to the storage type. The target's entry is computed in double.
#include <math.h>

#include "pair_math.h"
#include "parallel.h"

namespace logitless::LL_ISA {
namespace {

inline constexpr int64_t kItemBytes = 128 * 1024;
inline constexpr int64_t kGather = 2048;

// The coefficients of one row: what a class's p (or q) is multiplied by is their sum over the log-probabilities, d, ...
struct Coefficients {
  double p_one, p_d, p_log_q, p_log_p, p_mixture, p_difference;
  double q_one, q_d, q_log_q, q_mixture, q_difference;
};

// The same for the loop, where log p is z - max: log_sum is part of the constants. These cancel against the rest at a
// class that dominates, so they are kept as high + low.
template <class Real> struct LoopCoefficients {
  Real p_high, p_low, p_d, p_gap_q, p_gap_p, p_mixture, p_difference;
  Real q_high, q_low, q_d, q_gap_q, q_mixture, q_difference;

  LoopCoefficients(const Coefficients& c, double log_sum_p, double log_sum_q)
      : p_d(static_cast<Real>(c.p_d)), p_gap_q(static_cast<Real>(c.p_log_q)), p_gap_p(static_cast<Real>(c.p_log_p)), p_mixture(static_cast<Real>(c.p_mixture)),
        p_difference(static_cast<Real>(c.p_difference)), q_d(static_cast<Real>(c.q_d)), q_gap_q(static_cast<Real>(c.q_log_q)), q_mixture(static_cast<Real>(c.q_mixture)),
        q_difference(static_cast<Real>(c.q_difference)) {
    split(c.p_one - c.p_log_q * log_sum_q - c.p_log_p * log_sum_p, p_high, p_low);
    split(c.q_one - c.q_log_q * log_sum_q, q_high, q_low);
  }
  static void split(double x, Real& high, Real& low) {
    high = static_cast<Real>(x);
    low = static_cast<Real>(x - static_cast<double>(high));
  }
};

template <class T> struct Job {
  using Real = Compute<T>;
  using V = Vec<Real>;
  static constexpr int L = kLanes<Real>;
  const PairRowGradArgs& args;

  static double upstream(const void* p, int64_t r) { return p ? static_cast<double>(static_cast<const Real*>(p)[r]) : 0.0; }
  static double product(double g, double x) { return g == 0 ? 0 : g * x; }  // an infinite measure that nothing asks for

  // Without the target's part, which would round a small measure away.
  Coefficients coefficients(int64_t r) const {
    const double* s = args.saved + r * kPairSaved;
    const double kl = upstream(args.kl, r), reverse = upstream(args.reverse_kl, r), js = 0.5 * upstream(args.js, r), cross = upstream(args.cross_entropy, r);
    const double hp = upstream(args.entropy_p, r), hq = upstream(args.entropy_q, r);
    return {-product(kl, s[kKl]) - product(js, s[kKlPM]) - product(cross, s[kCrossEntropy]) - product(hp, s[kEntropyP]),
            -kl, -cross, -hp, -js, reverse,
            -product(reverse, s[kReverseKl]) - product(js, s[kKlQM]) - product(hq, s[kEntropyQ]),
            reverse, -hq, js, kl + cross};
  }

  // n contiguous classes; either output may be null.
  template <class S, bool kMixed>
  static __attribute__((noinline)) void classes(const LoopCoefficients<Real>& c, const RowScale<Real>& ps, const RowScale<Real>& qs, const LogRatio<Real>& log_ratio, const S* zp, const S* zq, T* gp, T* gq, int64_t n) {
    for (int64_t i = 0; i < n; i += L) {
      const int64_t valid = n - i;
      const bool whole = valid >= L;
      const V a = whole ? load(zp + i) : load_partial(zp + i, valid, Real(0)), b = whole ? load(zq + i) : load_partial(zq + i, valid, Real(0));
      const V p = ps.probability(a), q = qs.probability(b);
      const V d = clamp<Real>(log_ratio(a, b), kBig<Real>);
      const V gap_p = maximum<Real>(splat<Real>(-kBig<Real>), a - ps.top), gap_q = maximum<Real>(splat<Real>(-kBig<Real>), b - qs.top);
      const V near = p * (KlTerms<Real>(d).phi() + d), difference = (d < Real(0.5)) & (d > Real(-0.5)) ? near : q - p;
      V out_p = c.p_high + c.p_d * d + c.p_gap_q * gap_q + c.p_gap_p * gap_p;
      V out_q = c.q_high + c.q_d * d + c.q_gap_q * gap_q;
      if constexpr (kMixed) {
        const Mixture<Real> m(d);
        out_p += c.p_mixture * m.log_m_p;
        out_q += c.q_mixture * m.log_q_m;
      }
      out_p = p * (out_p + c.p_low) - c.p_difference * difference;
      out_q = q * (out_q + c.q_low) + c.q_difference * difference;
      if (gp) whole ? store(gp + i, out_p) : store_partial(gp + i, out_p, valid);
      if (gq) whole ? store(gq + i, out_q) : store_partial(gq + i, out_q, valid);
    }
  }

  // The target's two entries, in double: p - 1 must not cancel.
  void at_target(const Coefficients& c, const double* s, double a, double b, double nll_p, double nll_q, double* out) const {
    const auto bounded = [](double x) { return x < -1e30 ? -1e30 : x > 1e30 ? 1e30 : x; };
    const double log_p = bounded((a - s[kMaxP]) - s[kLogSumP]), log_q = bounded((b - s[kMaxQ]) - s[kLogSumQ]);
    const double ratio = ((b - s[kMaxQ]) - (a - s[kMaxP])) - s[kLogSumGap], d = ratio == ratio ? bounded(ratio) : 0.0, p = ::exp(log_p), q = ::exp(log_q);
    const double difference = __builtin_fabs(d) < 0.5 ? p * ::expm1(d) : q - p;
    const double log_m_p = d > 0 ? d + ::log1p(::expm1(-d) / 2) : ::log1p(::expm1(d) / 2), log_q_m = d > 0 ? -::log1p(::expm1(-d) / 2) : d - ::log1p(::expm1(d) / 2);
    out[0] = p * (c.p_one + c.p_d * d + c.p_log_q * log_q + c.p_log_p * log_p + c.p_mixture * log_m_p) - c.p_difference * difference + nll_p * ::expm1(log_p);
    out[1] = q * (c.q_one + c.q_d * d + c.q_log_q * log_q + c.q_mixture * log_q_m) + c.q_difference * difference + nll_q * ::expm1(log_q);
  }

  void row(int64_t r) const {
    const Tile& t = args.tile;
    const int64_t outer = r / t.inner, inner = r % t.inner;
    const T* zp = static_cast<const T*>(args.logits) + outer * t.outer_stride + inner * t.inner_stride;
    const T* zq = static_cast<const T*>(args.other) + outer * args.other_strides.outer + inner * args.other_strides.inner;
    T* gp = args.grad ? static_cast<T*>(args.grad) + outer * args.grad_strides.outer + inner * args.grad_strides.inner : nullptr;
    T* gq = args.other_grad ? static_cast<T*>(args.other_grad) + outer * args.other_grad_strides.outer + inner * args.other_grad_strides.inner : nullptr;
    const int64_t target = args.target ? args.target[r] : -1;
    const bool aimed = args.target && target != args.ignore_index && target >= 0 && target < t.classes && (args.nll_p || args.nll_q);
    const double* s = args.saved + r * kPairSaved;
    const Coefficients exact = coefficients(r);
    double fixed[2];
    if (aimed)
      at_target(exact, s, static_cast<double>(widen(zp[target * t.class_stride])), static_cast<double>(widen(zq[target * args.other_strides.classes])),
                upstream(args.nll_p, r), upstream(args.nll_q, r), fixed);

    Coefficients whole = exact;
    if (aimed) whole.p_one += upstream(args.nll_p, r), whole.q_one += upstream(args.nll_q, r);
    const LoopCoefficients<Real> c(whole, s[kLogSumP], s[kLogSumQ]);
    const auto ps = RowScale<Real>::from(s[kMaxP], s[kLogSumP]), qs = RowScale<Real>::from(s[kMaxQ], s[kLogSumQ]);
    const LogRatio<Real> log_ratio(s[kMaxP], s[kMaxQ], s[kLogSumGap]);
    const bool contiguous = t.class_stride == 1 && args.other_strides.classes == 1 && (!gp || args.grad_strides.classes == 1) && (!gq || args.other_grad_strides.classes == 1);
    if (contiguous) {
      if (args.js) classes<T, true>(c, ps, qs, log_ratio, zp, zq, gp, gq, t.classes);
      else classes<T, false>(c, ps, qs, log_ratio, zp, zq, gp, gq, t.classes);
    } else {
      alignas(LL_BYTES) Real a[kGather], b[kGather];
      alignas(LL_BYTES) T out_p[kGather], out_q[kGather];
      for (int64_t i = 0; i < t.classes; i += kGather) {
        const int64_t n = t.classes - i < kGather ? t.classes - i : kGather;
        for (int64_t j = 0; j < n; ++j) a[j] = widen(zp[(i + j) * t.class_stride]), b[j] = widen(zq[(i + j) * args.other_strides.classes]);
        classes<Real, true>(c, ps, qs, log_ratio, a, b, out_p, out_q, n);
        for (int64_t j = 0; gp && j < n; ++j) gp[(i + j) * args.grad_strides.classes] = out_p[j];
        for (int64_t j = 0; gq && j < n; ++j) gq[(i + j) * args.other_grad_strides.classes] = out_q[j];
      }
    }
    if (aimed && gp) gp[target * args.grad_strides.classes] = narrow<T>(fixed[0]);
    if (aimed && gq) gq[target * args.other_grad_strides.classes] = narrow<T>(fixed[1]);
  }

  void run() const {
    const int64_t rows = args.tile.outer * args.tile.inner, row_bytes = 2 * args.tile.classes * static_cast<int64_t>(sizeof(T));
    int64_t per_item = kItemBytes / (row_bytes ? row_bytes : 1);
    per_item = per_item < 1 ? 1 : per_item > 64 ? 64 : per_item;
    parallel_for((rows + per_item - 1) / per_item, args.threads, rows * row_bytes, [&](int64_t item) {
      const int64_t end = (item + 1) * per_item < rows ? (item + 1) * per_item : rows;
      for (int64_t r = item * per_item; r < end; ++r) row(r);
    });
  }
};

}  // namespace

void pair_row_grad(const PairRowGradArgs& a) {
  switch (a.dtype) {
    case DType::kFloat32: return Job<float>{a}.run();
    case DType::kBFloat16: return Job<BFloat16>{a}.run();
    case DType::kFloat16: return Job<Float16>{a}.run();
    case DType::kFloat64: return Job<double>{a}.run();
  }
}

}  // namespace logitless::LL_ISA
