// pair_row_stats: every divergence between two rows of logits. Memory is read once: the second pass over a row's
// classes, which needs both lse, finds them in the cache.
//
// Precision policy: pair_math.h's non-negative terms, summed as (high, low) pairs. The float lse difference leaves a
// common error e in every d; sum p (exp(d) - 1) must be 0 and gives e itself to first order, so the pass is repeated
// with the difference corrected where e^2 would show in the KL, and KL = sum p phi(d) - (R - log1p(R)) takes out the rest.
// Means under p or q are divided by the sum of the probabilities as computed, whose common error then does not count. The
// cross-entropy is a sum of its own, not H + KL, so that the identity between them can be checked.
#include <math.h>

#include "pair_math.h"
#include "parallel.h"
#include "row_fold.h"

namespace logitless::LL_ISA {
namespace {

enum PairModes { kForward = 1, kBackward = 2, kMixture = 4 };

inline constexpr int64_t kItemBytes = 128 * 1024;

template <class Real, int Mode> struct PairSums {
  PairSum<Real> forward, backward, p_gap, q_gap, p_surprise, mixture, log_m_p, log_q_m, p_mass, q_mass;
  Vec<Real> overlap{};  // sum of p q / (p + q)

  LL_INLINE void add(const RowScale<Real>& ps, const RowScale<Real>& qs, const LogRatio<Real>& log_ratio, Vec<Real> zp, Vec<Real> zq, IntVec<Real> valid) {
    using V = Vec<Real>;
    const V p = valid ? ps.probability(zp) : V{}, q = valid ? qs.probability(zq) : V{};
    V d = log_ratio(zp, zq);
    d = valid ? d : V{};
    const V bounded = clamp<Real>(d, kBig<Real>);
    const KlTerms<Real> kl(d);
    forward.add(kl.forward(p, q, d));
    p_gap.add(p * bounded);
    if constexpr ((Mode & kBackward) != 0) {
      backward.add(kl.reverse(p, q, d));
      q_gap.add(q * bounded);
      p_surprise.add(p == 0 ? V{} : p * (qs.top - zq));
    }
    if constexpr ((Mode & kMixture) != 0) {
      const Mixture<Real> m(bounded);
      mixture.add((p + q) * m.h);
      log_m_p.add(p * m.log_m_p);
      log_q_m.add(q * m.log_q_m);
      p_mass.add(p);
      q_mass.add(q);
      overlap += (d < 0 ? p : q) * m.smaller_share;
    }
  }
};

// n contiguous classes of both rows.
template <class T, int Mode>
__attribute__((noinline)) void add_classes(PairSums<Compute<T>, Mode>& sums, const RowScale<Compute<T>>& ps, const RowScale<Compute<T>>& qs, const LogRatio<Compute<T>>& log_ratio, const T* zp, const T* zq, int64_t n) {
  using Real = Compute<T>;
  constexpr int L = kLanes<Real>;
  PairSums<Real, Mode> local = sums;
  int64_t i = 0;
  for (; i + L <= n; i += L) local.add(ps, qs, log_ratio, load(zp + i), load(zq + i), ~IntVec<Real>{});
  if (i < n) {
    const IntVec<Real> valid = lane_index<Real>() < static_cast<IntOf<Real>>(n - i);
    local.add(ps, qs, log_ratio, load_partial(zp + i, n - i, Real(0)), load_partial(zq + i, n - i, Real(0)), valid);
  }
  sums = local;
}

template <class T> struct Row {
  const T* z;
  int64_t stride, classes;
  double max, log_sum, entropy;
  int64_t argmax;

  template <int Flags> void fold() {
    const RowView<T> view{z, stride};
    RowSums sums = fold_part<T, Flags>(view, 0, classes);
    const bool finite = __builtin_fabs(sums.max) < __builtin_inf();
    if (finite && __builtin_fabs(sums.max) > kHuge) sums = fold_huge<T, Flags>(view, classes, sums.max);
    const double top = finite ? sums.max - sums.base : 0.0, n = __builtin_rint(top * 1.4426950408889634);
    const double exponent = (top - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    const double unit = __builtin_ldexp(::exp(-exponent), static_cast<int>(sums.power - n)), rest = finite ? sums.rest * unit : __builtin_nan("");
    max = sums.max;
    log_sum = ::log1p(rest);
    entropy = sums.spread * unit / (rest + 1.0) + log_sum;
    argmax = find_argmax<T>(view, classes, max, sums.rest != sums.rest && __builtin_fabs(max) != __builtin_inf(), sums.arg);
  }
  double nll(int64_t target) const { return (max - static_cast<double>(widen(z[target * stride]))) + log_sum; }
};

template <class T, int Mode> struct Job {
  using Real = Compute<T>;
  const PairRowStatsArgs& args;

  void second_pass(PairSums<Real, Mode>& sums, const Row<T>& p, const Row<T>& q, double log_sum_gap) const {
    const auto ps = RowScale<Real>::from(p.max, p.log_sum), qs = RowScale<Real>::from(q.max, q.log_sum);
    const LogRatio<Real> log_ratio(p.max, q.max, log_sum_gap);
    if (p.stride == 1 && q.stride == 1) return add_classes<T, Mode>(sums, ps, qs, log_ratio, p.z, q.z, p.classes);
    alignas(LL_BYTES) Real zp[kGather], zq[kGather];
    for (int64_t i = 0; i < p.classes; i += kGather) {
      const int64_t n = p.classes - i < kGather ? p.classes - i : kGather;
      for (int64_t j = 0; j < n; ++j) zp[j] = widen(p.z[(i + j) * p.stride]), zq[j] = widen(q.z[(i + j) * q.stride]);
      add_classes<Real, Mode>(sums, ps, qs, log_ratio, zp, zq, n);
    }
  }

  // sum w phi without what a common error in d left there: residual = sum w (exp(d) - 1).
  static double corrected(double sum, double residual) {
    if (!(sum < __builtin_inf())) return sum;
    const double value = sum - (residual - ::log1p(residual));
    return value < 0 ? 0 : value;
  }

  static void put(void* out, int64_t r, double value) {
    if (out) static_cast<Real*>(out)[r] = static_cast<Real>(value);
  }

  void row(int64_t r) const {
    const Tile& t = args.tile;
    const int64_t outer = r / t.inner, inner = r % t.inner;
    Row<T> p{static_cast<const T*>(args.logits) + outer * t.outer_stride + inner * t.inner_stride, t.class_stride, t.classes, 0, 0, 0, 0};
    Row<T> q{static_cast<const T*>(args.other) + outer * args.other_strides.outer + inner * args.other_strides.inner, args.other_strides.classes, t.classes, 0, 0, 0, 0};
    constexpr int kFold = Mode == (kForward | kBackward | kMixture) ? kToken : 0;
    p.template fold<kFold>();
    q.template fold<kFold>();

    double gap = q.log_sum - p.log_sum, kl = 0, reverse = 0, cross = 0, js = 0, kl_p_m = 0, kl_q_m = 0, overlap = 0;
    constexpr double kTolerance = sizeof(Real) == 4 ? 0x1p-28 : 0x1p-58;
    for (int attempt = 0; attempt < 4; ++attempt) {
      PairSums<Real, Mode> sums;
      second_pass(sums, p, q, gap);
      const double forward = sums.forward.total(), residual = forward + sums.p_gap.total(), error = ::log1p(residual);
      kl = corrected(forward, residual);
      if constexpr ((Mode & kBackward) != 0) {
        const double backward = sums.backward.total();
        reverse = corrected(backward, backward - sums.q_gap.total());
        cross = sums.p_surprise.total() / sums.p_mass.total() + q.log_sum;
      }
      if constexpr ((Mode & kMixture) != 0) {
        js = 0.5 * sums.mixture.total();
        kl_p_m = -sums.log_m_p.total() / sums.p_mass.total();
        kl_q_m = sums.log_q_m.total() / sums.q_mass.total();
        overlap = sum_of_lanes(sums.overlap);
      }
      if (!(forward < __builtin_inf())) break;
      gap += error;
      kl_p_m += overlap * error, kl_q_m -= overlap * error;  // to first order; of the rest only the second order is left
      if (!(error * error > kTolerance * kl)) break;
    }
    const double nan_or_0 = (p.log_sum - p.log_sum) + (q.log_sum - q.log_sum);
    kl += nan_or_0, reverse += nan_or_0, cross += nan_or_0, js += nan_or_0;
    put(args.kl, r, kl);
    put(args.reverse_kl, r, reverse);
    put(args.js, r, js);
    put(args.cross_entropy, r, cross);
    put(args.entropy_p, r, p.entropy);
    put(args.entropy_q, r, q.entropy);
    if (args.same_top) args.same_top[r] = p.argmax == q.argmax;
    if (args.target) {
      const int64_t target = args.target[r];
      const bool ignored = target == args.ignore_index, bad = !ignored && (target < 0 || target >= t.classes);
      const double none = bad ? __builtin_nan("") : 0.0;
      put(args.nll_p, r, ignored || bad ? none : p.nll(target));
      put(args.nll_q, r, ignored || bad ? none : q.nll(target));
    }
    if (args.saved) {
      const double values[kPairSaved] = {p.max, p.log_sum, q.max, q.log_sum, gap, kl, reverse, kl_p_m, kl_q_m, cross, p.entropy, q.entropy};
      memcpy(args.saved + r * kPairSaved, values, sizeof values);
    }
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

template <class T> void pick(const PairRowStatsArgs& a) {
  if (a.reverse_kl || a.cross_entropy || a.entropy_p || a.entropy_q) return Job<T, kForward | kBackward | kMixture>{a}.run();
  if (a.js) return Job<T, kForward | kMixture>{a}.run();
  Job<T, kForward>{a}.run();
}

}  // namespace

void pair_row_stats(const PairRowStatsArgs& a) {
  if (a.bad_row) {
    *a.bad_row = -1;
    const int64_t rows = a.target ? a.tile.outer * a.tile.inner : 0;
    for (int64_t r = 0; r < rows && *a.bad_row < 0; ++r)
      if (a.target[r] != a.ignore_index && (a.target[r] < 0 || a.target[r] >= a.tile.classes)) *a.bad_row = r;
  }
  switch (a.dtype) {
    case DType::kFloat32: return pick<float>(a);
    case DType::kBFloat16: return pick<BFloat16>(a);
    case DType::kFloat16: return pick<Float16>(a);
    case DType::kFloat64: return pick<double>(a);
  }
}

}  // namespace logitless::LL_ISA
