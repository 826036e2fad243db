// pair_row_grad: the gradient of every pair_row_stats measure with respect to both rows, in one read of the logits.
//
// Formula, where the names kl, js, ce, reverse, hp, hq, nll_p, nll_q stand for upstream gradients and KL, RKL, CE,
// H(p), H(q) for the measures:
//   d/dz_p = p (kl (-d - KL) + js/2 (log(p/m) - KL(p||m)) + ce (-log q - CE) + hp (-log p - H(p)) + nll_p)
//            + reverse (p - q)
//   d/dz_q = q (reverse (d - RKL) + js/2 (log(q/m) - KL(q||m)) + hq (-log q - H(q)) + nll_q)
//            + (kl + ce) (q - p)
//   and -nll_p, -nll_q at the target.
// Of a Divergence alone, with its upstream gradient g, m = w p + (1 - w) q and r = 1 - p / m:
//   skewed KL F    d/dz_p = g p (log(p/m) - F + w (r - R)),  d/dz_q = g q ((1 - w) r + w R),  R = sum p r
//   weighted JS    d/dz_p = g w p (log(p/m) - KL(p||m)),  d/dz_q = g (1 - w) q (log(q/m) - KL(q||m))
//   variation      d/dz_p = g/2 p (s - sum p s),  d/dz_q = -g/2 q (s - sum q s),  s the sign of p - q, 0 of equal ones
//
// Layout: as in pair_stats.cpp, with two gradients of any strides, either of which may be absent or take the place of
// its logits.
//
// Precision policy: d as in pair_math.h, q - p = p (exp(d) - 1) where the two are close, everything formed before the
// one rounding to the storage type. The target's entries are computed in double. Of the variation, s - sum p s is one
// of three numbers a row, each a sum of what has another sign, in which nothing cancels.
//
// Steps: 1. The coefficients of each row, in double (coefficients), and as the loop wants them (LoopCoefficients). 2.
// Every class of both rows (values). 3. The target's two entries are overwritten (put_target).
#include <math.h>

#include <cstdlib>

#include "pairs/pair_lanes.h"
#include "pairs/pair_mixture.h"

namespace logitless::LL_ISA {
namespace {

inline constexpr int64_t kGather = 2048;  // elements of a strided row that are copied at a time

// What p (or q) of a class is multiplied by, as a sum of these times 1, d, log q, log p and log(m/p) (log(q/m)); and
// what q - p is multiplied by.
struct Coefficients {
  double p_one, p_d, p_log_q, p_log_p, p_mixture, p_difference;
  double q_one, q_d, q_log_q, q_mixture, q_difference;
};

// The same for the loop, where log p is z - max: log_sum is part of the constants. These cancel against the rest at a
// class that dominates, so they are kept as high + low. Of one row (S is Real) or of a row a lane.
template <class Real, class S = Real> struct LoopCoefficients {
  S p_high, p_low, p_d, p_gap_q, p_gap_p, p_mixture, p_difference;
  S q_high, q_low, q_d, q_gap_q, q_mixture, q_difference;

  LoopCoefficients() = default;

  LoopCoefficients(const Coefficients& c, double log_sum_p, double log_sum_q)
      : p_d(static_cast<Real>(c.p_d)),
        p_gap_q(static_cast<Real>(c.p_log_q)),
        p_gap_p(static_cast<Real>(c.p_log_p)),
        p_mixture(static_cast<Real>(c.p_mixture)),
        p_difference(static_cast<Real>(c.p_difference)),
        q_d(static_cast<Real>(c.q_d)),
        q_gap_q(static_cast<Real>(c.q_log_q)),
        q_mixture(static_cast<Real>(c.q_mixture)),
        q_difference(static_cast<Real>(c.q_difference)) {
    split(c.p_one - c.p_log_q * log_sum_q - c.p_log_p * log_sum_p, p_high, p_low);
    split(c.q_one - c.q_log_q * log_sum_q, q_high, q_low);
  }
  static void split(double x, Real& high, Real& low) {
    high = static_cast<Real>(x);
    low = static_cast<Real>(x - static_cast<double>(high));
  }
};

// What p (or q) of a class is multiplied by for a divergence against a mixture: high + low, and these times log(m/p)
// (log(m/q); of the skewed KL log(m/p) - r) and r.
template <class Real, class S = Real> struct MixtureCoefficients {
  S p_high, p_low, p_log, p_share;
  S q_high, q_low, q_log, q_share;

  MixtureCoefficients() = default;

  // s: the saved numbers of the row.
  static MixtureCoefficients of_skewed_kl(double g, double weight, const double* s) {
    const double of_share = g * weight * s[kSkewedKlShare];
    return {-g * s[kSkewedKlValue] - of_share, -g, -g * (1 - weight), of_share, 0, g * (1 - weight)};
  }
  static MixtureCoefficients of_weighted_js(double g, double weight, const double* s) {
    const double of_p = g * weight, of_q = g * (1 - weight);
    return {-of_p * s[kWeightedKlPM], -of_p, 0, -of_q * s[kWeightedKlQM], -of_q, 0};
  }

 private:
  MixtureCoefficients(double p_one, double p_log, double p_share, double q_one, double q_log, double q_share)
      : p_log(static_cast<Real>(p_log)),
        p_share(static_cast<Real>(p_share)),
        q_log(static_cast<Real>(q_log)),
        q_share(static_cast<Real>(q_share)) {
    LoopCoefficients<Real>::split(p_one, p_high, p_low);
    LoopCoefficients<Real>::split(q_one, q_high, q_low);
  }
};

// The same for the variation: one number where p is larger, where q is, and where they are equal.
template <class Real, class S = Real> struct VariationCoefficients {
  S p_above, p_below, p_tie;
  S q_above, q_below, q_tie;

  VariationCoefficients() = default;

  VariationCoefficients(double g, const double* s)
      : p_above(static_cast<Real>(g / 2 * s[kVariationP])),
        p_below(static_cast<Real>(g / 2 * s[kVariationP + 1])),
        p_tie(static_cast<Real>(g / 2 * s[kVariationP + 2])),
        q_above(static_cast<Real>(-g / 2 * s[kVariationQ])),
        q_below(static_cast<Real>(-g / 2 * s[kVariationQ + 1])),
        q_tie(static_cast<Real>(-g / 2 * s[kVariationQ + 2])) {}
};

// What has an upstream gradient: measures without the JS divergence or with it, or one Divergence.
enum class Upstream { kPlain, kMixed, kSkewedKl, kWeightedJs, kTotalVariation };

template <Upstream U> struct CoefficientsOf {
  template <class Real, class S> using Type = MixtureCoefficients<Real, S>;
};
template <> struct CoefficientsOf<Upstream::kPlain> {
  template <class Real, class S> using Type = LoopCoefficients<Real, S>;
};
template <> struct CoefficientsOf<Upstream::kMixed> {
  template <class Real, class S> using Type = LoopCoefficients<Real, S>;
};
template <> struct CoefficientsOf<Upstream::kTotalVariation> {
  template <class Real, class S> using Type = VariationCoefficients<Real, S>;
};

template <class T, Upstream U> struct Job {
  using Real = Compute<T>;
  using V = Vec<Real>;
  static constexpr int L = kLanes<Real>;
  const PairRowGradArgs& args;
  const MixtureWeights<Real> weights = MixtureWeights<Real>::from(args.weight);

  // ---- step 1
  // -----------------------------------------------------------------------------------------------------------

  static double upstream(const void* p, int64_t r) {
    return p ? static_cast<double>(static_cast<const Real*>(p)[r]) : 0.0;
  }
  // Of an upstream gradient and a measure, which may be infinite where nothing asks for it.
  static double product(double g, double x) { return g == 0 ? 0 : g * x; }

  // Without the target's part, which would round a small measure away.
  Coefficients coefficients(int64_t r) const {
    const double* s = args.saved + r * kPairSaved;
    const double kl = upstream(args.kl, r), reverse = upstream(args.reverse_kl, r);
    const double js = 0.5 * upstream(args.js, r), cross = upstream(args.cross_entropy, r);
    const double hp = upstream(args.entropy_p, r), hq = upstream(args.entropy_q, r);
    Coefficients c;
    c.p_one =
        -product(kl, s[kKl]) - product(js, s[kKlPM]) - product(cross, s[kCrossEntropy]) - product(hp, s[kEntropyP]);
    c.p_d = -kl;
    c.p_log_q = -cross;
    c.p_log_p = -hp;
    c.p_mixture = -js;
    c.p_difference = reverse;
    c.q_one = -product(reverse, s[kReverseKl]) - product(js, s[kKlQM]) - product(hq, s[kEntropyQ]);
    c.q_d = reverse;
    c.q_log_q = -hq;
    c.q_mixture = js;
    c.q_difference = kl + cross;
    return c;
  }

  // What a vector of classes needs: of one row (S is Real), or of a row a lane.
  template <class S> struct Numbers {
    typename CoefficientsOf<U>::template Type<Real, S> c;
    RowScale<Real, S> scale_p, scale_q;
    LogRatio<Real, S> log_ratio;
  };

  // The target's two entries, in double: p - 1 must not cancel. zp, zq: its logits.
  void at_target(const Coefficients& c, const double* s, double zp, double zq, double nll_p, double nll_q,
                 double* out) const {
    const auto finite = [](double x) { return x < -1e30 ? -1e30 : x > 1e30 ? 1e30 : x; };
    const double log_p = finite((zp - s[kMaxP]) - s[kLogSumP]), log_q = finite((zq - s[kMaxQ]) - s[kLogSumQ]);
    const double ratio = ((zq - s[kMaxQ]) - (zp - s[kMaxP])) - s[kLogSumGap], d = ratio == ratio ? finite(ratio) : 0.0;
    const double p = ::exp(log_p), q = ::exp(log_q);
    const double difference = __builtin_fabs(d) < 0.5 ? p * ::expm1(d) : q - p;
    const double log_m_p = d > 0 ? d + ::log1p(::expm1(-d) / 2) : ::log1p(::expm1(d) / 2);
    const double log_q_m = d > 0 ? -::log1p(::expm1(-d) / 2) : d - ::log1p(::expm1(d) / 2);
    out[0] = p * (c.p_one + c.p_d * d + c.p_log_q * log_q + c.p_log_p * log_p + c.p_mixture * log_m_p) -
             c.p_difference * difference + nll_p * ::expm1(log_p);
    out[1] = q * (c.q_one + c.q_d * d + c.q_log_q * log_q + c.q_mixture * log_q_m) + c.q_difference * difference +
             nll_q * ::expm1(log_q);
  }

  // One row: its numbers for the loop, and where it has a target with a gradient, the two entries there.
  struct RowGrad {
    const T *zp, *zq;
    T *gp, *gq;
    int64_t target;  // -1: none
    Numbers<Real> numbers;
    double at_target[2];
  };

  RowGrad prepare(int64_t outer, int64_t inner) const {
    const Tile& t = args.tile;
    const Strides &sq = args.other_strides, &sgp = args.grad_strides, &sgq = args.other_grad_strides;
    const int64_t r = outer * t.inner + inner;
    const double* s = args.saved + r * kPairSaved;
    RowGrad row;
    row.zp = static_cast<const T*>(args.logits) + outer * t.outer_stride + inner * t.inner_stride;
    row.zq = static_cast<const T*>(args.other) + outer * sq.outer + inner * sq.inner;
    row.gp = args.grad ? static_cast<T*>(args.grad) + outer * sgp.outer + inner * sgp.inner : nullptr;
    row.gq = args.other_grad ? static_cast<T*>(args.other_grad) + outer * sgq.outer + inner * sgq.inner : nullptr;
    row.target = -1;
    row.numbers.scale_p = RowScale<Real>::from(s[kMaxP], s[kLogSumP]);
    row.numbers.scale_q = RowScale<Real>::from(s[kMaxQ], s[kLogSumQ]);
    row.numbers.log_ratio = LogRatio<Real>(s[kMaxP], s[kMaxQ], s[kLogSumGap]);
    const double g = upstream(args.divergence_grad, r);
    if constexpr (U == Upstream::kSkewedKl)
      row.numbers.c = MixtureCoefficients<Real>::of_skewed_kl(g, args.weight, s);
    else if constexpr (U == Upstream::kWeightedJs)
      row.numbers.c = MixtureCoefficients<Real>::of_weighted_js(g, args.weight, s);
    else if constexpr (U == Upstream::kTotalVariation)
      row.numbers.c = VariationCoefficients<Real>(g, s);
    else
      row.numbers.c = with_target(row, r, s);
    return row;
  }

  // The coefficients of a row of several measures, and what the target's two entries are.
  LoopCoefficients<Real> with_target(RowGrad& row, int64_t r, const double* s) const {
    const Tile& t = args.tile;
    const int64_t target = args.target && (args.nll_p || args.nll_q) ? args.target[r] : -1;
    row.target = target != args.ignore_index && target >= 0 && target < t.classes ? target : -1;
    Coefficients c = coefficients(r);
    if (row.target >= 0) {
      const double zp = static_cast<double>(widen(row.zp[target * t.class_stride]));
      const double zq = static_cast<double>(widen(row.zq[target * args.other_strides.classes]));
      at_target(c, s, zp, zq, upstream(args.nll_p, r), upstream(args.nll_q, r), row.at_target);
      c.p_one += upstream(args.nll_p, r);
      c.q_one += upstream(args.nll_q, r);
    }
    return LoopCoefficients<Real>(c, s[kLogSumP], s[kLogSumQ]);
  }

  // ---- step 2
  // -----------------------------------------------------------------------------------------------------------

  // Of a vector of classes.
  template <class S> LL_INLINE void values(const Numbers<S>& n, V zp, V zq, V& out_p, V& out_q) const {
    const V p = n.scale_p.probability(zp), q = n.scale_q.probability(zq);
    const V d = clamp<Real>(n.log_ratio(zp, zq), kBig<Real>);
    if constexpr (U == Upstream::kPlain || U == Upstream::kMixed)
      return several(n, p, q, d, zp, zq, out_p, out_q);
    else
      return divergence(n.c, p, q, d, out_p, out_q);
  }

  template <class C> LL_INLINE void divergence(const C& c, V p, V q, V d, V& out_p, V& out_q) const {
    if constexpr (U == Upstream::kTotalVariation) {
      out_p = p * (d < 0 ? V{} + c.p_above : (d > 0 ? V{} + c.p_below : V{} + c.p_tie));
      out_q = q * (d < 0 ? V{} + c.q_above : (d > 0 ? V{} + c.q_below : V{} + c.q_tie));
    } else {
      const WeightedMixture<Real> m(d, weights);
      if constexpr (U == Upstream::kSkewedKl) {
        // -log(m/p) + w r would cancel where w is near 1.
        const V share = m.share(weights);
        out_p = c.p_high + c.p_log * m.log_less_share(share) + c.p_share * share;
        out_q = c.q_high + c.q_share * share;
      } else {
        out_p = c.p_high + c.p_log * m.log_m_p();
        out_q = c.q_high + c.q_log * m.log_m_q();
      }
      out_p = p * (out_p + c.p_low);
      out_q = q * (out_q + c.q_low);
    }
  }

  template <class S> static LL_INLINE void several(const Numbers<S>& n, V p, V q, V d, V zp, V zq, V& out_p, V& out_q) {
    const LoopCoefficients<Real, S>& c = n.c;
    const V gap_p = maximum<Real>(splat<Real>(-kBig<Real>), zp - n.scale_p.top);
    const V gap_q = maximum<Real>(splat<Real>(-kBig<Real>), zq - n.scale_q.top);
    const V difference = difference_of<Real>(p, q, d);
    out_p = c.p_high + c.p_d * d + c.p_gap_q * gap_q + c.p_gap_p * gap_p;
    out_q = c.q_high + c.q_d * d + c.q_gap_q * gap_q;
    if constexpr (U == Upstream::kMixed) {
      const Mixture<Real> m(d);
      out_p += c.p_mixture * m.log_m_p;
      out_q += c.q_mixture * m.log_q_m;
    }
    out_p = p * (out_p + c.p_low) - c.p_difference * difference;
    out_q = q * (out_q + c.q_low) + c.q_difference * difference;
  }

  // The same of `valid` classes (or rows) from the pointers on; either output may be null.
  template <class From, class S>
  LL_INLINE void values_at(const Numbers<S>& numbers, const From* zp, const From* zq, T* gp, T* gq,
                           int64_t valid) const {
    const bool whole = valid >= L;
    const V a = whole ? load(zp) : load_partial(zp, valid, Real(0));
    const V b = whole ? load(zq) : load_partial(zq, valid, Real(0));
    V out_p, out_q;
    values(numbers, a, b, out_p, out_q);
    if (gp) whole ? store(gp, out_p) : store_partial(gp, out_p, valid);
    if (gq) whole ? store(gq, out_q) : store_partial(gq, out_q, valid);
  }

  // n consecutive classes.
  template <class From>
  __attribute__((noinline)) void classes(const Numbers<Real>& numbers, const From* zp, const From* zq, T* gp, T* gq,
                                         int64_t n) const {
    for (int64_t i = 0; i < n; i += L)
      values_at(numbers, zp + i, zq + i, gp ? gp + i : nullptr, gq ? gq + i : nullptr, n - i);
  }

  // ---- step 3
  // -----------------------------------------------------------------------------------------------------------

  void put_target(const RowGrad& row) const {
    if (row.target < 0) return;
    if (row.gp) row.gp[row.target * args.grad_strides.classes] = narrow<T>(row.at_target[0]);
    if (row.gq) row.gq[row.target * args.other_grad_strides.classes] = narrow<T>(row.at_target[1]);
  }

  // ---- rows one after the other
  // -----------------------------------------------------------------------------------------

  void row(int64_t r) const {
    const Tile& t = args.tile;
    const RowGrad row = prepare(r / t.inner, r % t.inner);
    const bool contiguous = t.class_stride == 1 && args.other_strides.classes == 1 &&
                            (!row.gp || args.grad_strides.classes == 1) &&
                            (!row.gq || args.other_grad_strides.classes == 1);
    if (contiguous)
      classes<T>(row.numbers, row.zp, row.zq, row.gp, row.gq, t.classes);
    else
      gathered(row);
    put_target(row);
  }

  // A row of any strides, through small copies.
  void gathered(const RowGrad& row) const {
    const Tile& t = args.tile;
    alignas(LL_BYTES) Real zp[kGather], zq[kGather];
    alignas(LL_BYTES) T out_p[kGather], out_q[kGather];
    for (int64_t i = 0; i < t.classes; i += kGather) {
      const int64_t n = smaller(t.classes - i, kGather);
      for (int64_t j = 0; j < n; ++j) {
        zp[j] = widen(row.zp[(i + j) * t.class_stride]);
        zq[j] = widen(row.zq[(i + j) * args.other_strides.classes]);
      }
      classes<Real>(row.numbers, zp, zq, out_p, out_q, n);
      for (int64_t j = 0; row.gp && j < n; ++j) row.gp[(i + j) * args.grad_strides.classes] = out_p[j];
      for (int64_t j = 0; row.gq && j < n; ++j) row.gq[(i + j) * args.other_grad_strides.classes] = out_q[j];
    }
  }

  // ---- rows in lanes
  // ----------------------------------------------------------------------------------------------------

  static constexpr int64_t kWidth = 16 * L;  // rows in lanes that are taken together

  // Classes [begin, end) of the `width` rows from `row` on, whose numbers `numbers` has in lanes.
  __attribute__((noinline)) void lane_classes(const RowGrad& row, const Numbers<V>* numbers, int64_t width,
                                              int64_t begin, int64_t end) const {
    constexpr int64_t kStep = 4;  // classes of one vector of rows, whose numbers stay in registers
    for (int64_t c = begin; c < end; c += kStep) {
      const int64_t stop = smaller(c + kStep, end);
      for (int64_t i = 0; i < width; i += L) {
        const Numbers<V> n = numbers[i / L];
        for (int64_t j = c; j < stop; ++j) {
          const T* zp = row.zp + j * args.tile.class_stride + i;
          const T* zq = row.zq + j * args.other_strides.classes + i;
          __builtin_prefetch(zp + kLaneAhead * args.tile.class_stride);
          __builtin_prefetch(zq + kLaneAhead * args.other_strides.classes);
          T* const gp = row.gp ? row.gp + j * args.grad_strides.classes + i : nullptr;
          T* const gq = row.gq ? row.gq + j * args.other_grad_strides.classes + i : nullptr;
          values_at(n, zp, zq, gp, gq, width - i);
        }
      }
    }
  }

  // All steps of the `width` rows from `inner` on of one outer index, their classes in `parts` parts. False where there
  // is no memory for it.
  template <class Each>
  bool in_lanes(int64_t outer, int64_t inner, int64_t width, int64_t parts, const Each& each) const {
    const size_t vectors = static_cast<size_t>(pieces(width, L));
    auto* const rows = static_cast<RowGrad*>(__builtin_malloc(static_cast<size_t>(width) * sizeof(RowGrad)));
    auto* const numbers = static_cast<Numbers<V>*>(aligned_alloc(LL_BYTES, vectors * sizeof(Numbers<V>)));
    if (rows && numbers) {
      memset(static_cast<void*>(numbers), 0, vectors * sizeof(Numbers<V>));
      for (int64_t i = 0; i < width; ++i) {
        rows[i] = prepare(outer, inner + i);
        Numbers<V>& lanes = numbers[i / L];
        put_lane(lanes.c, i % L, rows[i].numbers.c);
        put_lane(lanes.scale_p, i % L, rows[i].numbers.scale_p);
        put_lane(lanes.scale_q, i % L, rows[i].numbers.scale_q);
        put_lane(lanes.log_ratio, i % L, rows[i].numbers.log_ratio);
      }
      const LaneTiles tiles{args.tile.classes, width, kWidth, parts};
      tiles.for_each(each, [&](int64_t first, int64_t count, int64_t, int64_t begin, int64_t end) {
        lane_classes(rows[first], numbers + first / L, count, begin, end);
      });
      for (int64_t i = 0; i < width; ++i) put_target(rows[i]);
    }
    __builtin_free(rows);
    __builtin_free(numbers);
    return rows && numbers;
  }

  void run() const {
    const Tile& t = args.tile;
    const int64_t row_bytes = 2 * t.classes * static_cast<int64_t>(sizeof(T));
    const auto one_row = [&](int64_t r) { row(r); };
    const auto in_rows = [](const Strides& s) { return s.classes != 1 && s.inner == 1; };
    const bool lanes = in_rows({0, t.class_stride, t.inner_stride}) && in_rows(args.other_strides) &&
                       (!args.grad || in_rows(args.grad_strides)) &&
                       (!args.other_grad || in_rows(args.other_grad_strides)) && t.inner >= L / 2;
    if (!lanes) return for_rows(0, row_count(t), row_bytes, args.threads, one_row);
    const auto tile = [&](int64_t outer, int64_t inner, int64_t width, int64_t parts, const auto& each) {
      return in_lanes(outer, inner, width, parts, each);
    };
    for_rows_in_lanes(t, kWidth, row_bytes, args.threads, tile, one_row);
  }
};

template <class T> void pick(const PairRowGradArgs& a) {
  switch (a.divergence) {
    case Divergence::kSkewedKl: return Job<T, Upstream::kSkewedKl>{a}.run();
    case Divergence::kWeightedJs: return Job<T, Upstream::kWeightedJs>{a}.run();
    case Divergence::kTotalVariation: return Job<T, Upstream::kTotalVariation>{a}.run();
    case Divergence::kNone: break;
  }
  if (a.js) return Job<T, Upstream::kMixed>{a}.run();
  Job<T, Upstream::kPlain>{a}.run();
}

}  // namespace

void pair_row_grad(const PairRowGradArgs& a) {
  switch (a.dtype) {
    case DType::kFloat32: return pick<float>(a);
    case DType::kBFloat16: return pick<BFloat16>(a);
    case DType::kFloat16: return pick<Float16>(a);
    case DType::kFloat64: return pick<double>(a);
  }
}

}  // namespace logitless::LL_ISA
