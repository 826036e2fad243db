// pair_row_stats: every divergence between two rows of logits. Memory is read once: the second pass over a row's
// classes, which needs both lse, finds them in the cache.
//
// Precision policy: pair_math.h's non-negative terms, summed as (high, low) pairs. The float lse difference leaves a
// common error e in every d; sum p (exp(d) - 1) must be 0 and gives e itself to first order, so the pass is repeated
// with the difference corrected where e^2 would show in the KL, and KL = sum p phi(d) - (R - log1p(R)) takes out the
// rest. Means under p or q are divided by the sum of the probabilities as computed, whose common error then does not
// count. The cross-entropy is a sum of its own, not H + KL, so that the identity between them can be checked.
#include <math.h>

#include "pairs/pair_math.h"
#include "parallel.h"
#include "rows/lane_fold.h"
#include "rows/row_fold.h"

namespace logitless::LL_ISA {
namespace {

enum PairModes { kForward = 1, kBackward = 2, kMixture = 4 };

inline constexpr int64_t kItemBytes = 128 * 1024;

// The sums of one pass over the classes of one row, or of some of them.
struct PassSums {
  double forward, p_gap, backward, q_gap, p_surprise, mixture, log_m_p, log_q_m, p_mass, q_mass, overlap;

  void add(const PassSums& o) {
    forward += o.forward, p_gap += o.p_gap, backward += o.backward, q_gap += o.q_gap, p_surprise += o.p_surprise,
        mixture += o.mixture;
    log_m_p += o.log_m_p, log_q_m += o.log_q_m, p_mass += o.p_mass, q_mass += o.q_mass, overlap += o.overlap;
  }
};

// Which lanes are a row: all of them, or one.
template <class Real> struct AllLanes {
  double operator()(const PairSum<Real>& sum) const { return sum.total(); }
  double operator()(const Vec<Real>& sum) const { return sum_of_lanes(sum); }
};
template <class Real> struct OneLane {
  int lane;
  double operator()(const PairSum<Real>& sum) const { return sum.total_of_lane(lane); }
  double operator()(const Vec<Real>& sum) const { return static_cast<double>(sum[lane]); }
};

// No more than a mode needs: rows in lanes load and store them.
template <class Real, bool kWanted> struct BackwardSums {};
template <class Real> struct BackwardSums<Real, true> {
  PairSum<Real> backward, q_gap, p_surprise;
};
template <class Real, bool kWanted> struct MixtureSums {};
template <class Real> struct MixtureSums<Real, true> {
  PairSum<Real> mixture, log_m_p, log_q_m, p_mass, q_mass;
  Vec<Real> overlap{};  // sum of p q / (p + q)
};

template <class Real, int Mode>
struct PairSums : BackwardSums<Real, (Mode & kBackward) != 0>, MixtureSums<Real, (Mode & kMixture) != 0> {
  PairSum<Real> forward, p_gap;

  template <class S>
  LL_INLINE void add(const RowScale<Real, S>& ps, const RowScale<Real, S>& qs, const LogRatio<Real, S>& log_ratio,
                     Vec<Real> zp, Vec<Real> zq, IntVec<Real> valid) {
    using V = Vec<Real>;
    const V p = valid ? ps.probability(zp) : V{}, q = valid ? qs.probability(zq) : V{};
    V d = log_ratio(zp, zq);
    d = valid ? d : V{};
    const V bounded = clamp<Real>(d, kBig<Real>);
    const KlTerms<Real> kl(d);
    forward.add(kl.forward(p, q, d));
    p_gap.add(p * bounded);
    if constexpr ((Mode & kBackward) != 0) {
      this->backward.add(kl.reverse(p, q, d));
      this->q_gap.add(q * bounded);
      this->p_surprise.add(p == 0 ? V{} : p * (qs.top - zq));
    }
    if constexpr ((Mode & kMixture) != 0) {
      const Mixture<Real> m(bounded);
      this->mixture.add((p + q) * m.h);
      this->log_m_p.add(p * m.log_m_p);
      this->log_q_m.add(q * m.log_q_m);
      this->p_mass.add(p);
      this->q_mass.add(q);
      this->overlap += (d < 0 ? p : q) * m.smaller_share;
    }
  }

  template <class Lanes> PassSums totals(const Lanes& of) const {
    PassSums s{};
    s.forward = of(forward), s.p_gap = of(p_gap);
    if constexpr ((Mode & kBackward) != 0)
      s.backward = of(this->backward), s.q_gap = of(this->q_gap), s.p_surprise = of(this->p_surprise);
    if constexpr ((Mode & kMixture) != 0) {
      s.mixture = of(this->mixture), s.log_m_p = of(this->log_m_p), s.log_q_m = of(this->log_q_m);
      s.p_mass = of(this->p_mass), s.q_mass = of(this->q_mass), s.overlap = of(this->overlap);
    }
    return s;
  }
};

// n contiguous classes of both rows.
template <class T, int Mode>
__attribute__((noinline)) void add_classes(PairSums<Compute<T>, Mode>& sums, const RowScale<Compute<T>>& ps,
                                           const RowScale<Compute<T>>& qs, const LogRatio<Compute<T>>& log_ratio,
                                           const T* zp, const T* zq, int64_t n) {
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

  // `wants_argmax`: find it, which `sums` alone may not know.
  template <int Flags> void take(RowSums sums, bool wants_argmax) {
    const RowView<T> view{z, stride};
    const bool finite = __builtin_fabs(sums.max) < __builtin_inf();
    if (finite && __builtin_fabs(sums.max) > kHuge) sums = fold_huge<T, Flags>(view, classes, sums.max);
    const double top = finite ? sums.max - sums.base : 0.0, n = __builtin_rint(top * 1.4426950408889634);
    const double exponent = (top - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    const double unit = __builtin_ldexp(::exp(-exponent), static_cast<int>(sums.power - n)),
                 rest = finite ? sums.rest * unit : __builtin_nan("");
    max = sums.max;
    log_sum = ::log1p(rest);
    entropy = sums.spread * unit / (rest + 1.0) + log_sum;
    argmax = wants_argmax ? find_argmax<T>(view, classes, max,
                                           sums.rest != sums.rest && __builtin_fabs(max) != __builtin_inf(), sums.arg)
                          : 0;
  }
  double nll(int64_t target) const { return (max - static_cast<double>(widen(z[target * stride]))) + log_sum; }
};

// What passes over two rows tell of them.
template <class Real, int Mode> struct Measures {
  double gap, kl, reverse, cross, js, kl_p_m, kl_q_m;  // gap: the difference of the rows' log_sum

  // sum w phi without what a common error in d left there: residual = sum w (exp(d) - 1).
  static double corrected(double sum, double residual) {
    if (!(sum < __builtin_inf())) return sum;
    const double value = sum - (residual - ::log1p(residual));
    return value < 0 ? 0 : value;
  }

  // Takes a pass made with `gap`; true where that was off by so much that another pass is wanted.
  bool take(const PassSums& sums, double q_log_sum) {
    constexpr double kTolerance = sizeof(Real) == 4 ? 0x1p-28 : 0x1p-58;
    const double residual = sums.forward + sums.p_gap, error = ::log1p(residual);
    kl = corrected(sums.forward, residual);
    if constexpr ((Mode & kBackward) != 0) {
      reverse = corrected(sums.backward, sums.backward - sums.q_gap);
      cross = sums.p_surprise / sums.p_mass + q_log_sum;
    }
    if constexpr ((Mode & kMixture) != 0) {
      js = 0.5 * sums.mixture;
      kl_p_m = -sums.log_m_p / sums.p_mass;
      kl_q_m = sums.log_q_m / sums.q_mass;
    }
    if (!(sums.forward < __builtin_inf())) return false;
    gap += error;
    kl_p_m += sums.overlap * error,
        kl_q_m -= sums.overlap * error;  // to first order; of the rest only the second order is left
    return error * error > kTolerance * kl;
  }
};

inline constexpr int kMostPasses = 4;

template <class T, int Mode> struct Job {
  using Real = Compute<T>;
  using V = Vec<Real>;
  using Pair = Measures<Real, Mode>;
  static constexpr int L = kLanes<Real>;
  static constexpr int kFold = Mode == (kForward | kBackward | kMixture) ? kToken : 0;
  const PairRowStatsArgs& args;

  Row<T> first_row(int64_t outer, int64_t inner) const {
    const Tile& t = args.tile;
    return {static_cast<const T*>(args.logits) + outer * t.outer_stride + inner * t.inner_stride,
            t.class_stride,
            t.classes,
            0,
            0,
            0,
            0};
  }
  Row<T> second_row(int64_t outer, int64_t inner) const {
    const Strides& s = args.other_strides;
    return {static_cast<const T*>(args.other) + outer * s.outer + inner * s.inner,
            s.classes,
            args.tile.classes,
            0,
            0,
            0,
            0};
  }

  void pass(PairSums<Real, Mode>& sums, const Row<T>& p, const Row<T>& q, double log_sum_gap) const {
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

  static void put(void* out, int64_t r, double value) {
    if (out) static_cast<Real*>(out)[r] = static_cast<Real>(value);
  }

  void finish(int64_t r, const Row<T>& p, const Row<T>& q, const Pair& m) const {
    const double nan_or_0 = (p.log_sum - p.log_sum) + (q.log_sum - q.log_sum);
    const double kl = m.kl + nan_or_0, reverse = m.reverse + nan_or_0, cross = m.cross + nan_or_0, js = m.js + nan_or_0;
    put(args.kl, r, kl);
    put(args.reverse_kl, r, reverse);
    put(args.js, r, js);
    put(args.cross_entropy, r, cross);
    put(args.entropy_p, r, p.entropy);
    put(args.entropy_q, r, q.entropy);
    if (args.same_top) args.same_top[r] = p.argmax == q.argmax;
    if (args.target) {
      const int64_t target = args.target[r];
      const bool ignored = target == args.ignore_index, bad = !ignored && (target < 0 || target >= args.tile.classes);
      const double none = bad ? __builtin_nan("") : 0.0;
      put(args.nll_p, r, ignored || bad ? none : p.nll(target));
      put(args.nll_q, r, ignored || bad ? none : q.nll(target));
    }
    if (args.saved) {
      const double values[kPairSaved] = {p.max,   p.log_sum, q.max,    q.log_sum, m.gap,     kl,
                                         reverse, m.kl_p_m,  m.kl_q_m, cross,     p.entropy, q.entropy};
      memcpy(args.saved + r * kPairSaved, values, sizeof values);
    }
  }

  void row(int64_t r) const {
    Row<T> p = first_row(r / args.tile.inner, r % args.tile.inner),
           q = second_row(r / args.tile.inner, r % args.tile.inner);
    p.template take<kFold>(fold_part<T, kFold>(RowView<T>{p.z, p.stride}, 0, p.classes), args.same_top);
    q.template take<kFold>(fold_part<T, kFold>(RowView<T>{q.z, q.stride}, 0, q.classes), args.same_top);
    Pair m{q.log_sum - p.log_sum, 0, 0, 0, 0, 0, 0};
    for (int i = 0; i < kMostPasses; ++i) {
      PairSums<Real, Mode> sums;
      pass(sums, p, q, m.gap);
      if (!m.take(sums.totals(AllLanes<Real>{}), q.log_sum)) break;
    }
    finish(r, p, q, m);
  }

  static constexpr int kTileVectors = 16;
  static constexpr int64_t kWidth = kTileVectors * L;

  // What a vector of rows in lanes needs for a pass over their classes.
  struct LaneNumbers {
    RowScale<Real, V> ps, qs;
    LogRatio<Real, V> log_ratio;
  };
  struct LanePair {
    Row<T> p, q;
    Pair measures;
    bool again;  // whether another pass is wanted
  };
  struct LanePart {
    RowSums p, q;
    PassSums sums;
  };

  // Classes [begin, end) of `width` rows.
  __attribute__((noinline)) void add_lanes(PairSums<Real, Mode>* sums, const LaneNumbers* numbers, const Row<T>& p,
                                           const Row<T>& q, int64_t width, int64_t begin, int64_t end) const {
    constexpr int64_t kStep = 4;  // classes of one vector of rows, whose numbers and sums stay in registers
    for (int64_t c = begin; c < end; c += kStep) {
      const int64_t stop = c + kStep < end ? c + kStep : end;
      for (int64_t i = 0; i < width; i += L) {
        const int64_t valid = width - i;
        const auto get = [&](const T* from) __attribute__((always_inline)) {
          return valid >= L ? load(from) : load_partial(from, valid, Real(0));
        };
        const LaneNumbers n = numbers[i / L];
        PairSums<Real, Mode> local = sums[i / L];
        for (int64_t j = c; j < stop; ++j) {
          __builtin_prefetch(p.z + (j + kLaneAhead) * p.stride + i);
          __builtin_prefetch(q.z + (j + kLaneAhead) * q.stride + i);
          local.add(n.ps, n.qs, n.log_ratio, get(p.z + j * p.stride + i), get(q.z + j * q.stride + i), ~IntVec<Real>{});
        }
        sums[i / L] = local;
      }
    }
  }

  // The `width` rows from `inner` on of one outer index, their classes in `parts` parts; each(n, f) calls f(0) to f(n -
  // 1). False where there is no memory for it.
  template <int Fold, class Each>
  bool in_lanes(int64_t outer, int64_t inner, int64_t width, int64_t parts, const Each& each) const {
    const int64_t tiles = (width + kWidth - 1) / kWidth, part_classes = parts == 1 ? args.tile.classes : kLaneClasses;
    auto* const rows = static_cast<LanePair*>(__builtin_malloc(static_cast<size_t>(width) * sizeof(LanePair)));
    auto* const part_of =
        static_cast<LanePart*>(__builtin_malloc(static_cast<size_t>(width * parts) * sizeof(LanePart)));
    const auto in_parts = [&](const auto& run) {
      each(tiles * parts, [&](int64_t item) {
        const int64_t at = item / parts * kWidth, part = item % parts, begin = part * part_classes;
        run(at, width - at < kWidth ? width - at : kWidth, part, begin,
            begin + part_classes < args.tile.classes ? begin + part_classes : args.tile.classes);
      });
    };
    if (rows && part_of) {
      in_parts([&](int64_t at, int64_t count, int64_t part, int64_t begin, int64_t end) {
        const auto none = [](int64_t) { return kNaN<Real>; };
        const Row<T> p = first_row(outer, inner + at), q = second_row(outer, inner + at);
        fold_lanes<T, Fold, kTileVectors>(LaneView<T>{p.z, p.stride}, count, begin, end, none,
                                          [&](int64_t i, const RowSums& s) { part_of[(at + i) * parts + part].p = s; });
        fold_lanes<T, Fold, kTileVectors>(LaneView<T>{q.z, q.stride}, count, begin, end, none,
                                          [&](int64_t i, const RowSums& s) { part_of[(at + i) * parts + part].q = s; });
      });
      for (int64_t i = 0; i < width; ++i) {
        LanePart total = part_of[i * parts];
        for (int64_t k = 1; k < parts; ++k)
          total.p = combine(total.p, part_of[i * parts + k].p), total.q = combine(total.q, part_of[i * parts + k].q);
        LanePair pair{first_row(outer, inner + i), second_row(outer, inner + i), {}, true};
        pair.p.template take<Fold>(total.p, args.same_top);
        pair.q.template take<Fold>(total.q, args.same_top);
        pair.measures.gap = pair.q.log_sum - pair.p.log_sum;
        rows[i] = pair;
      }
      bool again = true;
      for (int turn = 0; again && turn < kMostPasses; ++turn) {
        in_parts([&](int64_t at, int64_t count, int64_t part, int64_t begin, int64_t end) {
          lane_pass(rows + at, part_of + at * parts + part, parts, count, begin, end);
        });
        again = false;
        for (int64_t i = 0; i < width; ++i) {
          if (!rows[i].again) continue;
          PassSums total = part_of[i * parts].sums;
          for (int64_t k = 1; k < parts; ++k) total.add(part_of[i * parts + k].sums);
          rows[i].again = rows[i].measures.take(total, rows[i].q.log_sum);
          again = again || rows[i].again;
        }
      }
      for (int64_t i = 0; i < width; ++i)
        finish(outer * args.tile.inner + inner + i, rows[i].p, rows[i].q, rows[i].measures);
    }
    __builtin_free(rows);
    __builtin_free(part_of);
    return rows && part_of;
  }

  // The sums of classes [begin, end) of those rows that want a pass.
  void lane_pass(const LanePair* rows, LanePart* sums_of, int64_t stride, int64_t count, int64_t begin,
                 int64_t end) const {
    LaneNumbers numbers[kTileVectors] = {};
    bool any = false;
    for (int64_t i = 0; i < count; ++i) {
      const LanePair& row = rows[i];
      if (!row.again) continue;
      any = true;
      LaneNumbers& lanes = numbers[i / L];
      put_lane(lanes.ps, i % L, RowScale<Real>::from(row.p.max, row.p.log_sum));
      put_lane(lanes.qs, i % L, RowScale<Real>::from(row.q.max, row.q.log_sum));
      put_lane(lanes.log_ratio, i % L, LogRatio<Real>(row.p.max, row.q.max, row.measures.gap));
    }
    if (!any) return;
    PairSums<Real, Mode> sums[kTileVectors];
    add_lanes(sums, numbers, rows[0].p, rows[0].q, count, begin, end);
    for (int64_t i = 0; i < count; ++i)
      if (rows[i].again) sums_of[i * stride].sums = sums[i / L].totals(OneLane<Real>{static_cast<int>(i % L)});
  }

  template <int Fold> bool by_lanes() const {
    const Tile& t = args.tile;
    const int64_t rows = t.outer * t.inner, bytes = 2 * rows * t.classes * static_cast<int64_t>(sizeof(T));
    bool done = true;
    if (t.classes > kLaneClasses && rows <= kLanePartRows) {
      const auto each = [&](int64_t n, const auto& run) { parallel_for(n, args.threads, bytes, run); };
      for (int64_t outer = 0; outer < t.outer; ++outer)
        done = in_lanes<Fold>(outer, 0, t.inner, (t.classes + kLaneClasses - 1) / kLaneClasses, each) && done;
      return done;
    }
    const int64_t tiles = (t.inner + kWidth - 1) / kWidth;
    const auto each = [](int64_t n, const auto& run) {
      for (int64_t i = 0; i < n; ++i) run(i);
    };
    parallel_for(t.outer * tiles, args.threads, bytes, [&](int64_t item) {
      const int64_t inner = item % tiles * kWidth, width = t.inner - inner < kWidth ? t.inner - inner : kWidth;
      if (!in_lanes<Fold>(item / tiles, inner, width, 1, each)) __atomic_store_n(&done, false, __ATOMIC_RELAXED);
    });
    return done;
  }

  void run() const {
    const Tile& t = args.tile;
    const bool lanes = t.class_stride != 1 && args.other_strides.classes != 1 && t.inner_stride == 1 &&
                       args.other_strides.inner == 1 && t.inner >= L / 2;
    // The largest class of rows in lanes is known of the larger fold alone: to look for it would be a pass of its own.
    if (lanes && (args.same_top ? by_lanes<kToken>() : by_lanes<kFold>())) return;
    const int64_t rows = t.outer * t.inner, row_bytes = 2 * t.classes * static_cast<int64_t>(sizeof(T));
    int64_t per_item = kItemBytes / (row_bytes ? row_bytes : 1);
    per_item = per_item < 1 ? 1 : per_item > 64 ? 64 : per_item;
    parallel_for((rows + per_item - 1) / per_item, args.threads, rows * row_bytes, [&](int64_t item) {
      const int64_t end = (item + 1) * per_item < rows ? (item + 1) * per_item : rows;
      for (int64_t r = item * per_item; r < end; ++r) row(r);
    });
  }
};

template <class T> void pick(const PairRowStatsArgs& a) {
  if (a.reverse_kl || a.cross_entropy || a.entropy_p || a.entropy_q)
    return Job<T, kForward | kBackward | kMixture>{a}.run();
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
