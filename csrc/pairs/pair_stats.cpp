// pair_row_stats: every divergence between two rows of logits. Memory is read once: the second pass over a row's
// classes, which needs both lse, finds them in the cache.
//
// Formula: KL, reverse KL and JS as sums of the terms of pair_math.h; with p and q, cross-entropy is -sum p log q;
// entropies and nll are those of each row alone (row_state.h). A Divergence comes alone, by pair_divergence.h.
//
// Layout: two tensors of the same classes and any strides. Rows of consecutive classes are read one after the other;
// rows in lanes class by class.
//
// Precision policy: non-negative terms, summed as (high, low) pairs. The difference of the rows' log_sum, which is
// rounded, leaves a common error e in every d. But sum p (exp(d) - 1) must be 0, and gives e itself to first order (the
// residual R). So the pass is repeated with the difference corrected where e^2 would show in the KL, and KL = sum p
// phi(d) - (R - log1p(R)) takes out the rest. Means under p or q are divided by the sum of the probabilities as
// computed, whose common error then does not count. The cross-entropy is a sum of its own, not H + KL, so that the
// identity between them can be checked.
//
// Steps of a row:
//   1. Fold each of the two rows: max, log_sum, entropy, argmax (rows/row_fold.h).
//   2. A pass over both: the sums of pair_math.h's terms.
//   3. Take the error e out of them; where it was too large, correct the difference and go to 2, at most four times.
//   4. Write what is wanted, and what the gradient needs.
#include <math.h>

#include "pairs/pair_divergence.h"
#include "pairs/pair_lanes.h"
#include "pairs/pair_math.h"
#include "rows/row_fold.h"

namespace logitless::LL_ISA {
namespace {

// What is wanted: KL; reverse KL, cross-entropy and entropies; JS. A template's Mode is a sum of them.
enum PairModes { kForward = 1, kBackward = 2, kMixture = 4 };

inline constexpr int kMostPasses = 4;

// ---- step 2: the sums of a pass
// -----------------------------------------------------------------------------------------

// Over the classes of one row, or of some of them.
struct PassSums {
  double kl;                       // sum p phi(d)
  double p_gap;                    // sum p d
  double reverse;                  // sum q phi(-d)
  double q_gap;                    // sum q d
  double p_surprise;               // sum p (max_q - z_q), the cross-entropy but for log_sum
  double mixture;                  // sum (p + q) h(d)
  double log_m_p;                  // sum p log(m / p)
  double log_q_m;                  // sum q log(q / m)
  double p_mass, q_mass, overlap;  // sum p, sum q, sum p q / (p + q)

  void add(const PassSums& o) {
    kl += o.kl;
    p_gap += o.p_gap;
    reverse += o.reverse;
    q_gap += o.q_gap;
    p_surprise += o.p_surprise;
    mixture += o.mixture;
    log_m_p += o.log_m_p;
    log_q_m += o.log_q_m;
    p_mass += o.p_mass;
    q_mass += o.q_mass;
    overlap += o.overlap;
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

// No more sums than a mode needs: rows in lanes load and store them.
template <class Real, bool kWanted> struct BackwardSums {};
template <class Real> struct BackwardSums<Real, true> {
  PairSum<Real> reverse, q_gap, p_surprise;
};
template <class Real, bool kWanted> struct MixtureSums {};
template <class Real> struct MixtureSums<Real, true> {
  PairSum<Real> mixture, log_m_p, log_q_m, p_mass, q_mass;
  Vec<Real> overlap{};
};

// PassSums lane by lane.
template <class Real, int Mode>
struct PairSums : BackwardSums<Real, (Mode & kBackward) != 0>, MixtureSums<Real, (Mode & kMixture) != 0> {
  static constexpr bool kOfOneDivergence = false;
  PairSum<Real> kl, p_gap;

  // A vector of classes; where p and q are 0 nothing is added. surprise_q is max_q - z_q.
  LL_INLINE void add_class(Vec<Real> p, Vec<Real> q, Vec<Real> d, Vec<Real> surprise_q) {
    using V = Vec<Real>;
    const V finite_d = clamp<Real>(d, kBig<Real>);
    const KlTerms<Real> terms(d);
    kl.add(terms.forward(p, q, d));
    p_gap.add(p * finite_d);
    if constexpr ((Mode & kBackward) != 0) {
      this->reverse.add(terms.reverse(p, q, d));
      this->q_gap.add(q * finite_d);
      this->p_surprise.add(p == 0 ? V{} : p * surprise_q);
    }
    if constexpr ((Mode & kMixture) != 0) {
      const Mixture<Real> m(finite_d);
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
    s.kl = of(kl);
    s.p_gap = of(p_gap);
    if constexpr ((Mode & kBackward) != 0) {
      s.reverse = of(this->reverse);
      s.q_gap = of(this->q_gap);
      s.p_surprise = of(this->p_surprise);
    }
    if constexpr ((Mode & kMixture) != 0) {
      s.mixture = of(this->mixture);
      s.log_m_p = of(this->log_m_p);
      s.log_q_m = of(this->log_q_m);
      s.p_mass = of(this->p_mass);
      s.q_mass = of(this->q_mass);
      s.overlap = of(this->overlap);
    }
    return s;
  }
};

// What a pass needs of the two rows (S is Real), or of two rows a lane, and of the mixture that is asked for.
template <class Real, class S = Real> struct PassNumbers {
  RowScale<Real, S> scale_p, scale_q;
  LogRatio<Real, S> log_ratio;
};

// A vector of classes to the sums of a pass, of which only the `valid` lanes count.
template <class Sums, class Real, class S>
LL_INLINE void add_to(Sums& sums, const PassNumbers<Real, S>& n, const MixtureWeights<Real>& weights, Vec<Real> zp,
                      Vec<Real> zq, IntVec<Real> valid) {
  using V = Vec<Real>;
  const V p = valid ? n.scale_p.probability(zp) : V{}, q = valid ? n.scale_q.probability(zq) : V{};
  V d = n.log_ratio(zp, zq);
  d = valid ? d : V{};
  if constexpr (Sums::kOfOneDivergence)
    sums.add_class(p, q, clamp<Real>(d, kBig<Real>), weights);
  else
    sums.add_class(p, q, d, n.scale_q.top - zq);
}

// n consecutive classes of both rows. A function of its own, so that the loop's sums stay in registers.
template <class T, class Sums>
__attribute__((noinline)) void add_classes(Sums& sums, const PassNumbers<Compute<T>>& numbers,
                                           const MixtureWeights<Compute<T>>& weights, const T* zp, const T* zq,
                                           int64_t n) {
  using Real = Compute<T>;
  constexpr int L = kLanes<Real>;
  Sums local = sums;
  int64_t i = 0;
  for (; i + L <= n; i += L) add_to(local, numbers, weights, load(zp + i), load(zq + i), ~IntVec<Real>{});
  if (i < n) {
    const IntVec<Real> valid = lane_index<Real>() < static_cast<IntOf<Real>>(n - i);
    add_to(local, numbers, weights, load_partial(zp + i, n - i, Real(0)), load_partial(zq + i, n - i, Real(0)), valid);
  }
  sums = local;
}

// ---- steps 1 and 3: what is known of a row, and of two
// ------------------------------------------------------------------

template <class T> struct Row {
  const T* z;
  int64_t stride, classes;
  double max, log_sum, entropy;
  int64_t argmax;

  // 1, from the fold of the row. `wants_argmax`: find it, which `sums` alone may not know.
  template <int Flags> void take(RowSums sums, bool wants_argmax) {
    const RowView<T> view{z, stride};
    const bool finite = __builtin_fabs(sums.max) < __builtin_inf();
    if (finite && __builtin_fabs(sums.max) > kHuge) sums = fold_huge<T, Flags>(view, classes, sums.max);
    // 2^power / exp(max), from an exponent below ln2.
    const ReducedExponent top(finite ? sums.max - sums.base : 0.0);
    const double unit = __builtin_ldexp(::exp(-top.rest), static_cast<int>(sums.power - top.power));
    const double rest = finite ? sums.rest * unit : __builtin_nan("");
    max = sums.max;
    log_sum = ::log1p(rest);
    entropy = sums.spread * unit / (rest + 1.0) + log_sum;
    const bool is_nan = sums.rest != sums.rest && __builtin_fabs(max) != __builtin_inf();
    argmax = wants_argmax ? find_argmax<T>(view, classes, max, is_nan, sums.arg) : 0;
  }
  double nll(int64_t target) const { return (max - static_cast<double>(widen(z[target * stride]))) + log_sum; }
};

// Of the square of the common error in d, beside the measure: above it another pass is wanted.
template <class Real> inline constexpr double kTolerance = sizeof(Real) == 4 ? 0x1p-28 : 0x1p-58;

// What passes over two rows tell of them. log_sum_gap: the difference of the rows' log_sum, as corrected so far.
template <class Real, int Mode> struct Measures {
  double log_sum_gap, kl, reverse, cross, js, kl_p_m, kl_q_m;

  // sum w phi without what a common error in d left there: residual = sum w (exp(d) - 1).
  static double corrected(double sum, double residual) {
    if (!(sum < __builtin_inf())) return sum;
    const double value = sum - (residual - ::log1p(residual));
    return value < 0 ? 0 : value;
  }

  // 3, of a pass made with `log_sum_gap`; true where that was off by so much that another pass is wanted.
  bool take(const PassSums& sums, double q_log_sum) {
    const double residual = sums.kl + sums.p_gap, error = ::log1p(residual);
    kl = corrected(sums.kl, residual);
    if constexpr ((Mode & kBackward) != 0) {
      reverse = corrected(sums.reverse, sums.reverse - sums.q_gap);
      cross = sums.p_surprise / sums.p_mass + q_log_sum;
    }
    if constexpr ((Mode & kMixture) != 0) {
      js = 0.5 * sums.mixture;
      kl_p_m = -sums.log_m_p / sums.p_mass;
      kl_q_m = sums.log_q_m / sums.q_mass;
    }
    if (!(sums.kl < __builtin_inf())) return false;
    log_sum_gap += error;
    // To first order; of the other measures only the second order is left.
    kl_p_m += sums.overlap * error;
    kl_q_m -= sums.overlap * error;
    return error * error > kTolerance<Real> * kl;
  }
};

// What is asked for of a pass: its sums, and what they tell. Several measures of a Mode, or one Divergence.
template <int M> struct Several {
  static constexpr int kMode = M;
  template <class Real> using Sums = PairSums<Real, M>;
  using Totals = PassSums;
  template <class Real> using Found = Measures<Real, M>;
};
template <Divergence D> struct One {
  static constexpr int kMode = 0;
  template <class Real> using Sums = DivergenceSums<Real, D>;
  using Totals = DivergenceTotals<D>;
  template <class Real> using Found = DivergenceFound<Real, D>;
};

// ---- all steps
// ----------------------------------------------------------------------------------------------------------

template <class T, class Asked> struct Job {
  using Real = Compute<T>;
  using V = Vec<Real>;
  using Sums = typename Asked::template Sums<Real>;
  using Totals = typename Asked::Totals;
  using Pair = typename Asked::template Found<Real>;
  static constexpr int L = kLanes<Real>;
  static constexpr bool kOfOneDivergence = Sums::kOfOneDivergence;
  static constexpr int kFold = Asked::kMode == (kForward | kBackward | kMixture) ? kToken : 0;  // the Flags of step 1
  const PairRowStatsArgs& args;
  const MixtureWeights<Real> weights = MixtureWeights<Real>::from(args.weight);

  Row<T> first_row(int64_t outer, int64_t inner) const {
    const Tile& t = args.tile;
    const T* const z = static_cast<const T*>(args.logits) + outer * t.outer_stride + inner * t.inner_stride;
    return {z, t.class_stride, t.classes, 0, 0, 0, 0};
  }
  Row<T> second_row(int64_t outer, int64_t inner) const {
    const Strides& s = args.other_strides;
    const T* const z = static_cast<const T*>(args.other) + outer * s.outer + inner * s.inner;
    return {z, s.classes, args.tile.classes, 0, 0, 0, 0};
  }

  static PassNumbers<Real> numbers_of(const Row<T>& p, const Row<T>& q, double log_sum_gap) {
    return {RowScale<Real>::from(p.max, p.log_sum), RowScale<Real>::from(q.max, q.log_sum),
            LogRatio<Real>(p.max, q.max, log_sum_gap)};
  }
  // 3.
  bool take(Pair& pair, const Totals& sums, const Row<T>& q) const {
    if constexpr (kOfOneDivergence)
      return pair.take(sums, args.weight, kTolerance<Real>);
    else
      return pair.take(sums, q.log_sum);
  }

  // 2.
  void pass(Sums& sums, const Row<T>& p, const Row<T>& q, double log_sum_gap) const {
    const PassNumbers<Real> numbers = numbers_of(p, q, log_sum_gap);
    if (p.stride == 1 && q.stride == 1) return add_classes<T>(sums, numbers, weights, p.z, q.z, p.classes);
    alignas(LL_BYTES) Real zp[kGather], zq[kGather];
    for (int64_t i = 0; i < p.classes; i += kGather) {
      const int64_t n = smaller(p.classes - i, kGather);
      for (int64_t j = 0; j < n; ++j) {
        zp[j] = widen(p.z[(i + j) * p.stride]);
        zq[j] = widen(q.z[(i + j) * q.stride]);
      }
      add_classes<Real>(sums, numbers, weights, zp, zq, n);
    }
  }

  // 4.
  static void put(void* out, int64_t r, double value) {
    if (out) static_cast<Real*>(out)[r] = static_cast<Real>(value);
  }
  void finish(int64_t r, const Row<T>& p, const Row<T>& q, const Pair& m) const {
    const double nan_or_0 = (p.log_sum - p.log_sum) + (q.log_sum - q.log_sum);
    double saved[kPairSaved] = {p.max, p.log_sum, q.max, q.log_sum, m.log_sum_gap};
    if constexpr (kOfOneDivergence) {
      put(args.divergence_out, r, m.value(args.weight) + nan_or_0);
      m.save(saved);
    } else {
      const double kl = m.kl + nan_or_0, reverse = m.reverse + nan_or_0, cross = m.cross + nan_or_0;
      put(args.kl, r, kl);
      put(args.reverse_kl, r, reverse);
      put(args.js, r, m.js + nan_or_0);
      put(args.cross_entropy, r, cross);
      put(args.entropy_p, r, p.entropy);
      put(args.entropy_q, r, q.entropy);
      const double values[] = {kl, reverse, m.kl_p_m, m.kl_q_m, cross, p.entropy, q.entropy};
      memcpy(saved + kKl, values, sizeof values);
    }
    if (args.same_top) args.same_top[r] = p.argmax == q.argmax;
    if (args.target) {
      const int64_t target = args.target[r];
      const bool ignored = target == args.ignore_index;
      const bool bad = !ignored && (target < 0 || target >= args.tile.classes);
      const double none = bad ? __builtin_nan("") : 0.0;
      put(args.nll_p, r, ignored || bad ? none : p.nll(target));
      put(args.nll_q, r, ignored || bad ? none : q.nll(target));
    }
    if (args.saved) memcpy(args.saved + r * kPairSaved, saved, sizeof saved);
  }

  void row(int64_t r) const {
    const int64_t outer = r / args.tile.inner, inner = r % args.tile.inner;
    Row<T> p = first_row(outer, inner), q = second_row(outer, inner);
    // 1.
    p.template take<kFold>(fold_part<T, kFold>(RowView<T>{p.z, p.stride}, 0, p.classes), args.same_top);
    q.template take<kFold>(fold_part<T, kFold>(RowView<T>{q.z, q.stride}, 0, q.classes), args.same_top);
    // 2 and 3.
    Pair m{};
    m.log_sum_gap = q.log_sum - p.log_sum;
    for (int i = 0; i < kMostPasses; ++i) {
      Sums sums;
      pass(sums, p, q, m.log_sum_gap);
      if (!take(m, sums.totals(AllLanes<Real>{}), q)) break;
    }
    // 4.
    finish(r, p, q, m);
  }

  // ---- rows in lanes
  // ----------------------------------------------------------------------------------------------------

  static constexpr int kTileVectors = 16;
  static constexpr int64_t kWidth = kTileVectors * L;

  struct LanePair {
    Row<T> p, q;
    Pair measures;
    bool again;  // whether another pass is wanted
  };
  // The sums of one part of the classes of a row.
  struct LanePart {
    RowSums p, q;
    Totals sums;
  };

  // 2, of classes [begin, end) of `width` rows.
  __attribute__((noinline)) void add_lanes(Sums* sums, const PassNumbers<Real, V>* numbers, const Row<T>& p,
                                           const Row<T>& q, int64_t width, int64_t begin, int64_t end) const {
    constexpr int64_t kStep = 4;  // classes of one vector of rows, whose numbers and sums stay in registers
    for (int64_t c = begin; c < end; c += kStep) {
      const int64_t stop = smaller(c + kStep, end);
      for (int64_t i = 0; i < width; i += L) {
        const int64_t valid = width - i;
        const auto get = [&](const T* from) __attribute__((always_inline)) {
          return valid >= L ? load(from) : load_partial(from, valid, Real(0));
        };
        const PassNumbers<Real, V> n = numbers[i / L];
        Sums local = sums[i / L];
        for (int64_t j = c; j < stop; ++j) {
          __builtin_prefetch(p.z + (j + kLaneAhead) * p.stride + i);
          __builtin_prefetch(q.z + (j + kLaneAhead) * q.stride + i);
          const V zp = get(p.z + j * p.stride + i), zq = get(q.z + j * q.stride + i);
          add_to(local, n, weights, zp, zq, ~IntVec<Real>{});
        }
        sums[i / L] = local;
      }
    }
  }

  // 2, of classes [begin, end) of those of `count` rows that want a pass.
  void lane_pass(const LanePair* rows, LanePart* sums_of, int64_t stride, int64_t count, int64_t begin,
                 int64_t end) const {
    PassNumbers<Real, V> numbers[kTileVectors] = {};
    bool any = false;
    for (int64_t i = 0; i < count; ++i) {
      const LanePair& row = rows[i];
      if (!row.again) continue;
      any = true;
      put_lane(numbers[i / L], i % L, numbers_of(row.p, row.q, row.measures.log_sum_gap));
    }
    if (!any) return;
    Sums sums[kTileVectors];
    add_lanes(sums, numbers, rows[0].p, rows[0].q, count, begin, end);
    for (int64_t i = 0; i < count; ++i)
      if (rows[i].again) sums_of[i * stride].sums = sums[i / L].totals(OneLane<Real>{static_cast<int>(i % L)});
  }

  // 1: `part_of` gets the folds of every part of every row, `rows` what they tell of a row.
  template <int Fold, class Each>
  void fold_in_lanes(int64_t outer, int64_t inner, const LaneTiles& tiles, const Each& each, LanePair* rows,
                     LanePart* part_of) const {
    const int64_t parts = tiles.parts;
    tiles.for_each(each, [&](int64_t first, int64_t count, int64_t part, int64_t begin, int64_t end) {
      const auto no_target = [](int64_t) { return kNaN<Real>; };
      const Row<T> p = first_row(outer, inner + first), q = second_row(outer, inner + first);
      const auto part_of_row = [&](int64_t i) -> LanePart& { return part_of[(first + i) * parts + part]; };
      fold_lanes<T, Fold, kTileVectors>(LaneView<T>{p.z, p.stride}, count, begin, end, no_target,
                                        [&](int64_t i, const RowSums& s) { part_of_row(i).p = s; });
      fold_lanes<T, Fold, kTileVectors>(LaneView<T>{q.z, q.stride}, count, begin, end, no_target,
                                        [&](int64_t i, const RowSums& s) { part_of_row(i).q = s; });
    });
    for (int64_t i = 0; i < tiles.width; ++i) {
      LanePart total = part_of[i * parts];
      for (int64_t k = 1; k < parts; ++k) {
        total.p = combine(total.p, part_of[i * parts + k].p);
        total.q = combine(total.q, part_of[i * parts + k].q);
      }
      LanePair pair{first_row(outer, inner + i), second_row(outer, inner + i), {}, true};
      pair.p.template take<Fold>(total.p, args.same_top);
      pair.q.template take<Fold>(total.q, args.same_top);
      pair.measures.log_sum_gap = pair.q.log_sum - pair.p.log_sum;
      rows[i] = pair;
    }
  }

  // 2 and 3.
  template <class Each>
  void measure_in_lanes(const LaneTiles& tiles, const Each& each, LanePair* rows, LanePart* part_of) const {
    const int64_t parts = tiles.parts;
    bool again = true;
    for (int turn = 0; again && turn < kMostPasses; ++turn) {
      tiles.for_each(each, [&](int64_t first, int64_t count, int64_t part, int64_t begin, int64_t end) {
        lane_pass(rows + first, part_of + first * parts + part, parts, count, begin, end);
      });
      again = false;
      for (int64_t i = 0; i < tiles.width; ++i) {
        if (!rows[i].again) continue;
        Totals total = part_of[i * parts].sums;
        for (int64_t k = 1; k < parts; ++k) total.add(part_of[i * parts + k].sums);
        rows[i].again = take(rows[i].measures, total, rows[i].q);
        again = again || rows[i].again;
      }
    }
  }

  // All steps of the `width` rows from `inner` on of one outer index, their classes in `parts` parts. False where there
  // is no memory for it.
  template <int Fold, class Each>
  bool in_lanes(int64_t outer, int64_t inner, int64_t width, int64_t parts, const Each& each) const {
    const LaneTiles tiles{args.tile.classes, width, kWidth, parts};
    auto* const rows = static_cast<LanePair*>(__builtin_malloc(static_cast<size_t>(width) * sizeof(LanePair)));
    auto* const part_of =
        static_cast<LanePart*>(__builtin_malloc(static_cast<size_t>(width * parts) * sizeof(LanePart)));
    if (rows && part_of) {
      fold_in_lanes<Fold>(outer, inner, tiles, each, rows, part_of);
      measure_in_lanes(tiles, each, rows, part_of);
      for (int64_t i = 0; i < width; ++i)
        finish(outer * args.tile.inner + inner + i, rows[i].p, rows[i].q, rows[i].measures);
    }
    __builtin_free(rows);
    __builtin_free(part_of);
    return rows && part_of;
  }

  template <int Fold> void by_lanes() const {
    const auto tile = [&](int64_t outer, int64_t inner, int64_t width, int64_t parts, const auto& each) {
      return in_lanes<Fold>(outer, inner, width, parts, each);
    };
    for_rows_in_lanes(args.tile, kWidth, row_bytes(), args.threads, tile, [&](int64_t r) { row(r); });
  }

  int64_t row_bytes() const { return 2 * args.tile.classes * static_cast<int64_t>(sizeof(T)); }

  void run() const {
    const Tile& t = args.tile;
    const bool lanes = lie_in_lanes<T>(t.class_stride, t.inner_stride) &&
                       lie_in_lanes<T>(args.other_strides.classes, args.other_strides.inner);
    // The largest class of rows in lanes is known of the larger fold alone: to look for it would be a pass of its own.
    if (lanes && args.same_top)
      by_lanes<kToken>();
    else if (lanes)
      by_lanes<kFold>();
    else
      for_rows(0, row_count(t), row_bytes(), args.threads, [&](int64_t r) { row(r); });
  }
};

template <class T> void pick(const PairRowStatsArgs& a) {
  switch (a.divergence) {
    case Divergence::kSkewedKl: return Job<T, One<Divergence::kSkewedKl>>{a}.run();
    case Divergence::kWeightedJs: return Job<T, One<Divergence::kWeightedJs>>{a}.run();
    case Divergence::kTotalVariation: return Job<T, One<Divergence::kTotalVariation>>{a}.run();
    case Divergence::kNone: break;
  }
  if (a.reverse_kl || a.cross_entropy || a.entropy_p || a.entropy_q)
    return Job<T, Several<kForward | kBackward | kMixture>>{a}.run();
  if (a.js) return Job<T, Several<kForward | kMixture>>{a}.run();
  Job<T, Several<kForward>>{a}.run();
}

}  // namespace

void pair_row_stats(const PairRowStatsArgs& a) {
  if (a.bad_row) *a.bad_row = first_bad_row(a.tile, a.target, a.ignore_index);
  switch (a.dtype) {
    case DType::kFloat32: return pick<float>(a);
    case DType::kBFloat16: return pick<BFloat16>(a);
    case DType::kFloat16: return pick<Float16>(a);
    case DType::kFloat64: return pick<double>(a);
  }
}

}  // namespace logitless::LL_ISA
