// pair_row_grad: the gradient of every pair_row_stats measure with respect to both rows, in one read of the logits.
//
//   d/dzp_j = p_j (kl (-d - KL) + js/2 (log(p/m) - KL(p||m)) + ce (-log q - CE) + hp (-log p - Hp) + nll_p) + reverse
//   (p - q) d/dzq_j = q_j (reverse (d - RKL) + js/2 (log(q/m) - KL(q||m)) + hq (-log q - Hq) + nll_q) + (kl + ce) (q -
//   p) and -nll at the target, where the names stand for upstream gradients.
//
// Precision policy: d as in pair_math.h, q - p = p (exp(d) - 1) where the two are close, everything formed before the
// one rounding to the storage type. The target's entry is computed in double.
#include <math.h>

#include <cstdlib>

#include "pairs/pair_math.h"
#include "parallel.h"
#include "rows/lane_fold.h"

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

template <class T> struct Job {
  using Real = Compute<T>;
  using V = Vec<Real>;
  static constexpr int L = kLanes<Real>;
  const PairRowGradArgs& args;

  static double upstream(const void* p, int64_t r) {
    return p ? static_cast<double>(static_cast<const Real*>(p)[r]) : 0.0;
  }
  static double product(double g, double x) { return g == 0 ? 0 : g * x; }  // an infinite measure that nothing asks for

  // Without the target's part, which would round a small measure away.
  Coefficients coefficients(int64_t r) const {
    const double* s = args.saved + r * kPairSaved;
    const double kl = upstream(args.kl, r), reverse = upstream(args.reverse_kl, r), js = 0.5 * upstream(args.js, r),
                 cross = upstream(args.cross_entropy, r);
    const double hp = upstream(args.entropy_p, r), hq = upstream(args.entropy_q, r);
    return {-product(kl, s[kKl]) - product(js, s[kKlPM]) - product(cross, s[kCrossEntropy]) - product(hp, s[kEntropyP]),
            -kl,
            -cross,
            -hp,
            -js,
            reverse,
            -product(reverse, s[kReverseKl]) - product(js, s[kKlQM]) - product(hq, s[kEntropyQ]),
            reverse,
            -hq,
            js,
            kl + cross};
  }

  // What a vector of classes needs: of one row (S is Real), or of a row a lane.
  template <class S> struct Numbers {
    LoopCoefficients<Real, S> c;
    RowScale<Real, S> ps, qs;
    LogRatio<Real, S> log_ratio;
  };

  template <bool kMixed, class S> static LL_INLINE void values(const Numbers<S>& n, V a, V b, V& out_p, V& out_q) {
    const LoopCoefficients<Real, S>& c = n.c;
    const V p = n.ps.probability(a), q = n.qs.probability(b);
    const V d = clamp<Real>(n.log_ratio(a, b), kBig<Real>);
    const V gap_p = maximum<Real>(splat<Real>(-kBig<Real>), a - n.ps.top),
            gap_q = maximum<Real>(splat<Real>(-kBig<Real>), b - n.qs.top);
    const V near = p * (KlTerms<Real>(d).phi() + d), difference = (d < Real(0.5)) & (d > Real(-0.5)) ? near : q - p;
    out_p = c.p_high + c.p_d * d + c.p_gap_q * gap_q + c.p_gap_p * gap_p;
    out_q = c.q_high + c.q_d * d + c.q_gap_q * gap_q;
    if constexpr (kMixed) {
      const Mixture<Real> m(d);
      out_p += c.p_mixture * m.log_m_p;
      out_q += c.q_mixture * m.log_q_m;
    }
    out_p = p * (out_p + c.p_low) - c.p_difference * difference;
    out_q = q * (out_q + c.q_low) + c.q_difference * difference;
  }

  // n contiguous classes; either output may be null.
  template <class From, bool kMixed>
  static __attribute__((noinline)) void classes(const Numbers<Real>& numbers, const From* zp, const From* zq, T* gp,
                                                T* gq, int64_t n) {
    for (int64_t i = 0; i < n; i += L) {
      const int64_t valid = n - i;
      const bool whole = valid >= L;
      const V a = whole ? load(zp + i) : load_partial(zp + i, valid, Real(0)),
              b = whole ? load(zq + i) : load_partial(zq + i, valid, Real(0));
      V out_p, out_q;
      values<kMixed>(numbers, a, b, out_p, out_q);
      if (gp) whole ? store(gp + i, out_p) : store_partial(gp + i, out_p, valid);
      if (gq) whole ? store(gq + i, out_q) : store_partial(gq + i, out_q, valid);
    }
  }

  // The target's two entries, in double: p - 1 must not cancel.
  void at_target(const Coefficients& c, const double* s, double a, double b, double nll_p, double nll_q,
                 double* out) const {
    const auto bounded = [](double x) { return x < -1e30 ? -1e30 : x > 1e30 ? 1e30 : x; };
    const double log_p = bounded((a - s[kMaxP]) - s[kLogSumP]), log_q = bounded((b - s[kMaxQ]) - s[kLogSumQ]);
    const double ratio = ((b - s[kMaxQ]) - (a - s[kMaxP])) - s[kLogSumGap], d = ratio == ratio ? bounded(ratio) : 0.0,
                 p = ::exp(log_p), q = ::exp(log_q);
    const double difference = __builtin_fabs(d) < 0.5 ? p * ::expm1(d) : q - p;
    const double log_m_p = d > 0 ? d + ::log1p(::expm1(-d) / 2) : ::log1p(::expm1(d) / 2),
                 log_q_m = d > 0 ? -::log1p(::expm1(-d) / 2) : d - ::log1p(::expm1(d) / 2);
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
    double fixed[2];
  };

  RowGrad prepare(int64_t outer, int64_t inner) const {
    const Tile& t = args.tile;
    const int64_t r = outer * t.inner + inner;
    const double* s = args.saved + r * kPairSaved;
    RowGrad row;
    row.zp = static_cast<const T*>(args.logits) + outer * t.outer_stride + inner * t.inner_stride;
    row.zq = static_cast<const T*>(args.other) + outer * args.other_strides.outer + inner * args.other_strides.inner;
    row.gp = args.grad ? static_cast<T*>(args.grad) + outer * args.grad_strides.outer + inner * args.grad_strides.inner
                       : nullptr;
    row.gq = args.other_grad ? static_cast<T*>(args.other_grad) + outer * args.other_grad_strides.outer +
                                   inner * args.other_grad_strides.inner
                             : nullptr;
    const int64_t target = args.target && (args.nll_p || args.nll_q) ? args.target[r] : -1;
    row.target = target != args.ignore_index && target >= 0 && target < t.classes ? target : -1;
    Coefficients c = coefficients(r);
    if (row.target >= 0) {
      at_target(c, s, static_cast<double>(widen(row.zp[target * t.class_stride])),
                static_cast<double>(widen(row.zq[target * args.other_strides.classes])), upstream(args.nll_p, r),
                upstream(args.nll_q, r), row.fixed);
      c.p_one += upstream(args.nll_p, r), c.q_one += upstream(args.nll_q, r);
    }
    row.numbers = {LoopCoefficients<Real>(c, s[kLogSumP], s[kLogSumQ]), RowScale<Real>::from(s[kMaxP], s[kLogSumP]),
                   RowScale<Real>::from(s[kMaxQ], s[kLogSumQ]), LogRatio<Real>(s[kMaxP], s[kMaxQ], s[kLogSumGap])};
    return row;
  }

  void put_target(const RowGrad& row) const {
    if (row.target < 0) return;
    if (row.gp) row.gp[row.target * args.grad_strides.classes] = narrow<T>(row.fixed[0]);
    if (row.gq) row.gq[row.target * args.other_grad_strides.classes] = narrow<T>(row.fixed[1]);
  }

  void row(int64_t r) const {
    const Tile& t = args.tile;
    const RowGrad row = prepare(r / t.inner, r % t.inner);
    const bool contiguous = t.class_stride == 1 && args.other_strides.classes == 1 &&
                            (!row.gp || args.grad_strides.classes == 1) &&
                            (!row.gq || args.other_grad_strides.classes == 1);
    if (contiguous) {
      if (args.js)
        classes<T, true>(row.numbers, row.zp, row.zq, row.gp, row.gq, t.classes);
      else
        classes<T, false>(row.numbers, row.zp, row.zq, row.gp, row.gq, t.classes);
    } else {
      alignas(LL_BYTES) Real a[kGather], b[kGather];
      alignas(LL_BYTES) T out_p[kGather], out_q[kGather];
      for (int64_t i = 0; i < t.classes; i += kGather) {
        const int64_t n = t.classes - i < kGather ? t.classes - i : kGather;
        for (int64_t j = 0; j < n; ++j)
          a[j] = widen(row.zp[(i + j) * t.class_stride]), b[j] = widen(row.zq[(i + j) * args.other_strides.classes]);
        classes<Real, true>(row.numbers, a, b, out_p, out_q, n);
        for (int64_t j = 0; row.gp && j < n; ++j) row.gp[(i + j) * args.grad_strides.classes] = out_p[j];
        for (int64_t j = 0; row.gq && j < n; ++j) row.gq[(i + j) * args.other_grad_strides.classes] = out_q[j];
      }
    }
    put_target(row);
  }

  static constexpr int64_t kWidth = 16 * L;  // rows in lanes that are taken together

  // Classes [begin, end) of the `width` rows from `rows` on, whose numbers `numbers` has in lanes.
  template <bool kMixed>
  __attribute__((noinline)) void lane_classes(const RowGrad& row, const Numbers<V>* numbers, int64_t width,
                                              int64_t begin, int64_t end) const {
    constexpr int64_t kStep = 4;  // classes of one vector of rows, whose numbers stay in registers
    for (int64_t c = begin; c < end; c += kStep) {
      const int64_t stop = c + kStep < end ? c + kStep : end;
      for (int64_t i = 0; i < width; i += L) {
        const int64_t valid = width - i;
        const bool whole = valid >= L;
        const Numbers<V> n = numbers[i / L];
        for (int64_t j = c; j < stop; ++j) {
          const T *zp = row.zp + j * args.tile.class_stride + i, *zq = row.zq + j * args.other_strides.classes + i;
          __builtin_prefetch(zp + kLaneAhead * args.tile.class_stride);
          __builtin_prefetch(zq + kLaneAhead * args.other_strides.classes);
          const V a = whole ? load(zp) : load_partial(zp, valid, Real(0)),
                  b = whole ? load(zq) : load_partial(zq, valid, Real(0));
          V out_p, out_q;
          values<kMixed>(n, a, b, out_p, out_q);
          if (row.gp) {
            T* to = row.gp + j * args.grad_strides.classes + i;
            whole ? store(to, out_p) : store_partial(to, out_p, valid);
          }
          if (row.gq) {
            T* to = row.gq + j * args.other_grad_strides.classes + i;
            whole ? store(to, out_q) : store_partial(to, out_q, valid);
          }
        }
      }
    }
  }

  // The `width` rows from `inner` on of one outer index, their classes in `parts` parts; each(n, f) calls f(0) to f(n -
  // 1). False where there is no memory for it.
  template <class Each>
  bool in_lanes(int64_t outer, int64_t inner, int64_t width, int64_t parts, const Each& each) const {
    const int64_t tiles = (width + kWidth - 1) / kWidth, part_classes = parts == 1 ? args.tile.classes : kLaneClasses;
    const size_t vectors = static_cast<size_t>((width + L - 1) / L);
    auto* const rows = static_cast<RowGrad*>(__builtin_malloc(static_cast<size_t>(width) * sizeof(RowGrad)));
    auto* const numbers = static_cast<Numbers<V>*>(aligned_alloc(LL_BYTES, vectors * sizeof(Numbers<V>)));
    if (rows && numbers) {
      memset(static_cast<void*>(numbers), 0, vectors * sizeof(Numbers<V>));
      for (int64_t i = 0; i < width; ++i) {
        rows[i] = prepare(outer, inner + i);
        Numbers<V>& lanes = numbers[i / L];
        put_lane(lanes.c, i % L, rows[i].numbers.c);
        put_lane(lanes.ps, i % L, rows[i].numbers.ps);
        put_lane(lanes.qs, i % L, rows[i].numbers.qs);
        put_lane(lanes.log_ratio, i % L, rows[i].numbers.log_ratio);
      }
      each(tiles * parts, [&](int64_t item) {
        const int64_t at = item / parts * kWidth, begin = item % parts * part_classes;
        const int64_t count = width - at < kWidth ? width - at : kWidth,
                      end = begin + part_classes < args.tile.classes ? begin + part_classes : args.tile.classes;
        if (args.js)
          lane_classes<true>(rows[at], numbers + at / L, count, begin, end);
        else
          lane_classes<false>(rows[at], numbers + at / L, count, begin, end);
      });
      for (int64_t i = 0; i < width; ++i) put_target(rows[i]);
    }
    __builtin_free(rows);
    __builtin_free(numbers);
    return rows && numbers;
  }

  int64_t bytes() const {
    return 2 * args.tile.outer * args.tile.inner * args.tile.classes * static_cast<int64_t>(sizeof(T));
  }

  void by_rows(int64_t first, int64_t rows) const {
    const int64_t row_bytes = 2 * args.tile.classes * static_cast<int64_t>(sizeof(T));
    int64_t per_item = kItemBytes / (row_bytes ? row_bytes : 1);
    per_item = per_item < 1 ? 1 : per_item > 64 ? 64 : per_item;
    parallel_for((rows + per_item - 1) / per_item, args.threads, rows * row_bytes, [&](int64_t item) {
      const int64_t end = (item + 1) * per_item < rows ? (item + 1) * per_item : rows;
      for (int64_t r = item * per_item; r < end; ++r) row(first + r);
    });
  }

  void run() const {
    const Tile& t = args.tile;
    const auto in_rows = [](const Strides& s) { return s.classes != 1 && s.inner == 1; };
    const bool lanes = in_rows({0, t.class_stride, t.inner_stride}) && in_rows(args.other_strides) &&
                       (!args.grad || in_rows(args.grad_strides)) &&
                       (!args.other_grad || in_rows(args.other_grad_strides)) && t.inner >= L / 2;
    if (!lanes) return by_rows(0, t.outer * t.inner);
    // A gradient may take the place of the logits: what could not be done in lanes is done by itself, never twice.
    if (t.classes > kLaneClasses && t.outer * t.inner <= kLanePartRows) {
      const auto each = [&](int64_t n, const auto& run) { parallel_for(n, args.threads, bytes(), run); };
      for (int64_t outer = 0; outer < t.outer; ++outer)
        if (!in_lanes(outer, 0, t.inner, (t.classes + kLaneClasses - 1) / kLaneClasses, each))
          by_rows(outer * t.inner, t.inner);
      return;
    }
    const int64_t tiles = (t.inner + kWidth - 1) / kWidth;
    const auto each = [](int64_t n, const auto& run) {
      for (int64_t i = 0; i < n; ++i) run(i);
    };
    parallel_for(t.outer * tiles, args.threads, bytes(), [&](int64_t item) {
      const int64_t outer = item / tiles, inner = item % tiles * kWidth,
                    width = t.inner - inner < kWidth ? t.inner - inner : kWidth;
      if (in_lanes(outer, inner, width, 1, each)) return;
      for (int64_t i = 0; i < width; ++i) row(outer * t.inner + inner + i);
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
