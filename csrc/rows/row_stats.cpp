// row_stats: everything the losses and measures need of each row, in one read of the logits.
//
// Precision policy: that of row_state.h and row_fold.h.
#include "parallel.h"
#include "rows/lane_fold.h"
#include "rows/row_fold.h"

namespace logitless::LL_ISA {
namespace {

inline constexpr int64_t kItemBytes = 256 * 1024;  // logits of one parallel item, at most
inline constexpr int64_t kSplitClasses = 32768;    // a long row is cut here when rows are few

enum class Fate : uint8_t { kRead, kIgnored, kBad };

template <class T> struct Job {
  using Real = Compute<T>;
  const RowStatsArgs& args;
  const T* logits() const { return static_cast<const T*>(args.logits); }
  const T* dense() const { return static_cast<const T*>(args.dense_target); }
  const Real* class_weight() const { return static_cast<const Real*>(args.class_weight); }
  int64_t rows() const { return args.tile.outer * args.tile.inner; }
  int64_t offset(int64_t r, int64_t outer_stride, int64_t inner_stride) const {
    if (args.tile.inner == 1) return r * outer_stride;  // a division costs as much as a vector of exponentials
    return r / args.tile.inner * outer_stride + r % args.tile.inner * inner_stride;
  }
  const T* row(int64_t r) const { return logits() + offset(r, args.tile.outer_stride, args.tile.inner_stride); }
  const T* dense_row(int64_t r) const {
    return dense() + offset(r, args.dense_strides.outer, args.dense_strides.inner);
  }
  Fate fate(int64_t r) const {
    if (!args.target) return Fate::kRead;
    const int64_t t = args.target[r];
    if (t == args.ignore_index) return Fate::kIgnored;
    return t < 0 || t >= args.tile.classes ? Fate::kBad : Fate::kRead;
  }
  Real target_logit(int64_t r) const {
    return args.target ? widen(row(r)[args.target[r] * args.tile.class_stride]) : kNaN<Real>;
  }
  template <int Flags> LL_INLINE RowView<T> view(int64_t r) const {
    return {row(r),
            args.tile.class_stride,
            class_weight(),
            (Flags & kDense) ? dense_row(r) : nullptr,
            args.dense_strides.classes,
            (Flags & kToken) ? target_logit(r) : kNaN<Real>};
  }
};

// 2^power over exp(top): turns sums in that unit into the unit exp(top). From an exponent reduced below ln2, so that
// its rounding does not count.
LL_INLINE Vec<double> over_exp(Vec<double> top, Vec<double> power) {
  const Vec<double> n = whole_power<double>(top);
  return scale_by_power(exp_of_remainder(-remainder(top, n)), power - n);
}

inline constexpr RowSums kUnread{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};

// ---- finished rows to outputs ------------------------------------------------------------------------------------

// Consecutive rows whose logits are folded, finished a vector of rows at a time.
template <class T> struct Batch {
  using Real = Compute<T>;
  const Job<T>& job;
  int64_t first_row = 0, count = 0;
  bool all_read = true;
  int64_t arg[kMaxRows], rank[kMaxRows];
  Fate fate[kMaxRows];
  alignas(LL_BYTES) double max[kMaxRows], above[kMaxRows], base[kMaxRows], power[kMaxRows], rest[kMaxRows],
      spread[kMaxRows];
  alignas(LL_BYTES) double smooth_gap[kMaxRows], smooth_mass[kMaxRows], dense_gap[kMaxRows], dense_mass[kMaxRows];

  explicit Batch(const Job<T>& j) : job(j) {}

  template <int Flags> LL_INLINE void push(int64_t r, Fate f, const RowSums& sums) {
    const int64_t i = count++;
    if (i == 0) first_row = r;
    place<Flags>(i, f, sums);
    if (count == kMaxRows) flush();
  }
  template <int Flags> LL_INLINE void place(int64_t i, Fate f, const RowSums& sums) {
    const int64_t r = first_row + i;
    fate[i] = f;
    all_read = all_read && f == Fate::kRead;
    above[i] = f == Fate::kRead ? sums.max - static_cast<double>(job.target_logit(r)) : 0;
    if (f == Fate::kRead && !(__builtin_fabs(sums.max) <= kHuge)) {
      const bool finite = __builtin_fabs(sums.max) < __builtin_inf();
      set<Flags>(i, finite ? fold_huge<T, Flags>(job.template view<Flags>(r), job.args.tile.classes, sums.max) : sums);
      if (!finite) rest[i] = __builtin_nan("");
    } else {
      set<Flags>(i, sums);
    }
  }
  // Rows [first, first + n) of few contiguous classes, at most as many as there are lanes.
  void push_short(int64_t first, int64_t n) {
    constexpr int L = kLanes<Real>;
    const int64_t classes = job.args.tile.classes, at = count;
    if (at == 0) first_row = first;
    count += n;
    const T* logits[L] = {};
    const T* any = nullptr;
    alignas(LL_BYTES) Real targets[L] = {}, tops[L], sums[L];
    for (int64_t i = 0; i < n; ++i) {
      const Fate f = fate[at + i] = job.fate(first + i);
      if (f == Fate::kRead) any = logits[i] = job.row(first + i);
      all_read = all_read && f == Fate::kRead;
    }
    if (any) {
      for (const T*& row : logits) row = row ? row : any;
      const ShortRows<Real> rows = fold_short<T>(logits, n, classes);
      store(tops, rows.max), store(sums, rows.rest);
      if (job.args.target)
        for (int64_t i = 0; i < n; ++i)
          targets[i] = fate[at + i] == Fate::kRead ? widen(logits[i][job.args.target[first + i]]) : Real(0);
      const Vec<double> unit = splat<double>(static_cast<double>(rows.power));
      for (int64_t i = 0; i < L; i += kLanes<double>) {
        const Vec<double> top = load_wide(tops + i);
        store(max + at + i, top), store(above + at + i, top - load_wide(targets + i)),
            store(base + at + i, Vec<double>{});
        store(power + at + i, unit), store(rest + at + i, without_drift<Real>(load_wide(sums + i), unit));
      }
      memset(arg + at, 0, sizeof *arg * L);
      if (const uint32_t valid = rows.valid_bits(); __builtin_expect(valid != kAllBits<Real>, 0))
        for (int64_t i = 0; i < n; ++i)
          if (!(valid >> i & 1) && fate[at + i] == Fate::kRead)
            place<0>(at + i, Fate::kRead, fold_contiguous<T, 0>(job.template view<0>(first + i), 0, classes));
    }
    if (count > kMaxRows - L) flush();
  }
  template <int Flags> LL_INLINE void set(int64_t i, const RowSums& sums) {
    arg[i] = sums.arg, max[i] = sums.max, base[i] = sums.base, power[i] = sums.power, rest[i] = sums.rest;
    if constexpr ((Flags & kToken) != 0) rank[i] = sums.rank, spread[i] = sums.spread;
    if constexpr ((Flags & kSmooth) != 0) smooth_gap[i] = sums.smooth_gap, smooth_mass[i] = sums.smooth_mass;
    if constexpr ((Flags & kDense) != 0) dense_gap[i] = sums.dense_gap, dense_mass[i] = sums.dense_mass;
  }

  // One output of every row: values(i) of a vector of rows where they were read; 0 where ignored, NaN where the target
  // is out of range.
  template <class Out, class F> LL_INLINE void write(void* out, const F& values) const {
    constexpr int L = kLanes<double>;
    if (!out) return;
    Out* const to = static_cast<Out*>(out) + first_row;
    int64_t i = 0;
    for (; i + L <= count; i += L) store_narrow(to + i, values(i));
    if (i < count) {
      alignas(LL_BYTES) Out last[L];
      store_narrow(last, values(i));
      memcpy(to + i, last, static_cast<size_t>(count - i) * sizeof(Out));
    }
    if (all_read) return;
    for (i = 0; i < count; ++i)
      if (fate[i] != Fate::kRead) to[i] = fate[i] == Fate::kIgnored ? Out(0) : kNaN<Out>;
  }
  template <class F> LL_INLINE void write_class(int64_t* out, const F& value) const {
    if (!out) return;
    for (int64_t i = 0; i < count; ++i) out[first_row + i] = fate[i] == Fate::kRead ? value(i) : -1;
  }

  void flush() {
    const RowStatsArgs& a = job.args;
    constexpr int L = kLanes<double>;
    alignas(LL_BYTES) double log_sum[kMaxRows], entropy[kMaxRows];
    for (int64_t i = 0; i < count; i += L) {
      const Vec<double> unit = over_exp(load(max + i) - load(base + i), load(power + i)), q = load(rest + i) * unit;
      const Vec<double> log_q = log1p(q);
      store(log_sum + i, log_q);
      if (a.entropy) store(entropy + i, load(spread + i) * unit / (q + 1.0) + log_q);
    }
    const auto log_of = [&](int64_t i) { return load(log_sum + i); };
    write<Real>(a.nll, [&](int64_t i) { return load(above + i) + log_of(i); });
    write<Real>(a.lse, [&](int64_t i) { return load(max + i) + log_of(i); });
    write<Real>(a.pivot, [&](int64_t i) { return load(max + i); });
    write<Real>(a.row_max, [&](int64_t i) { return load(max + i); });
    write<double>(a.log_sum, log_of);
    write<Real>(a.entropy, [&](int64_t i) { return load(entropy + i); });
    write<Real>(a.smooth_sum, [&](int64_t i) { return load(smooth_gap + i) + load(smooth_mass + i) * log_of(i); });
    write<Real>(a.dense_sum, [&](int64_t i) {
      const Vec<double> mass = load(dense_mass + i);
      return load(dense_gap + i) + (mass == 0 ? Vec<double>{} : mass * log_of(i));
    });
    write<Real>(a.dense_mass, [&](int64_t i) { return load(dense_mass + i); });
    write_class(a.argmax, [&](int64_t i) { return argmax(i); });
    write_class(a.rank, [&](int64_t i) { return rank[i]; });
    count = 0;
    all_read = true;
  }

  int64_t argmax(int64_t i) const {
    const bool is_nan = rest[i] != rest[i] && __builtin_fabs(max[i]) != __builtin_inf();
    return find_argmax<T>(job.template view<0>(first_row + i), job.args.tile.classes, max[i], is_nan, arg[i]);
  }
};

// The losses of rows [first, first + n) of few contiguous classes, at most kMaxRows, with what their gradients need.
// False, and nothing is written: not all of them are rows for fold_others.
template <class T>
__attribute__((noinline)) bool short_losses(const Job<T>& job, int64_t first, int64_t n, bool& clamps) {
  using Real = Compute<T>;
  constexpr int D = kLanes<double>;
  const RowStatsArgs& a = job.args;
  const T* logits[kMaxRows];  // of the rows that are read
  int64_t targets[kMaxRows], count = 0;
  uint8_t place[kMaxRows];
  for (int64_t i = 0; i < n; ++i)
    if (job.fate(first + i) == Fate::kRead)
      logits[count] = job.row(first + i), targets[count] = a.target[first + i],
      place[count++] = static_cast<uint8_t>(i);
  alignas(LL_BYTES) Real pivot[kMaxRows], rest[kMaxRows], nll[kMaxRows];
  alignas(LL_BYTES) double log_sum[kMaxRows];
  if (count > 0) {
    const Vec<double> power = splat<double>(
        static_cast<double>(fold_short_others<T>(logits, targets, count, a.tile.classes, pivot, rest, clamps)));
    if (power[0] != power[0]) return false;
    for (int64_t i = 0; i < count; i += D) {
      const Vec<double> log_q =
          short_log1p(without_drift<Real>(load_wide(rest + i), power) * over_exp(load_wide(pivot + i), power));
      store(log_sum + i, log_q), store_narrow(nll + i, log_q);
    }
  }
  if (count < n) {
    for (int64_t i = n; i-- > 0;) {
      if (count > 0 && place[count - 1] == i) {
        pivot[i] = pivot[--count], log_sum[i] = log_sum[count], nll[i] = nll[count];
      } else {
        pivot[i] = 0, log_sum[i] = job.fate(first + i) == Fate::kIgnored ? 0 : kNaN<double>,
        nll[i] = static_cast<Real>(log_sum[i]);
      }
    }
  }
  const auto write = [&](void* out, const auto* from) {
    if (out)
      memcpy(static_cast<char*>(out) + static_cast<size_t>(first) * sizeof *from, from,
             static_cast<size_t>(n) * sizeof *from);
  };
  write(a.nll, nll), write(a.pivot, pivot), write(a.log_sum, log_sum);
  return true;
}

// The same of rows [first, end), and of any kind. A row's loss does not tell its neighbours: where they do not go
// together, each is tried in a unit of its own.
template <class T> void all_short_losses(const Job<T>& job, int64_t first, int64_t end, bool& clamps) {
  for (; first < end; first += kMaxRows) {
    const int64_t n = end - first < kMaxRows ? end - first : kMaxRows;
    if (short_losses(job, first, n, clamps)) continue;
    for (int64_t r = first; r < first + n; ++r) {
      if (short_losses(job, r, 1, clamps)) continue;
      Batch<T> alone(job);
      alone.template push<0>(r, Fate::kRead, fold_part<T, 0>(job.template view<0>(r), 0, job.args.tile.classes));
      alone.flush();
    }
  }
}

template <class T, int Flags> void by_rows(const Job<T>& job) {
  const RowStatsArgs& a = job.args;
  const int64_t rows = job.rows(), row_bytes = a.tile.classes * static_cast<int64_t>(sizeof(T));
  int64_t per_item = item_bytes(rows * row_bytes, kItemBytes) / (row_bytes ? row_bytes : 1);
  per_item = per_item < 1 ? 1 : per_item > 16 * kMaxRows ? 16 * kMaxRows : per_item;
  constexpr int64_t L = kLanes<Compute<T>>;
  const bool is_short =
      Flags == 0 && a.tile.class_stride == 1 && a.tile.classes > 0 && a.tile.classes <= kShortVectors * L;
  // Not of double logits: beside a pivot far below the largest, log_sum's own rounding would show in their gradients.
  constexpr bool kMayHoldTarget = Flags == 0 && sizeof(Compute<T>) == 4;
  const bool for_losses = kMayHoldTarget && a.target && a.tile.class_stride == 1 && !a.row_max && !a.lse && !a.argmax;
  if (is_short) per_item = (per_item + L - 1) / L * L;
  const int64_t items = (rows + per_item - 1) / per_item;
  [[maybe_unused]] bool clamps = false;  // whether logits were met that ask for it
  parallel_for(items, a.threads, rows * row_bytes, [&](int64_t item) {
    const int64_t end = (item + 1) * per_item < rows ? (item + 1) * per_item : rows;
    if constexpr (kMayHoldTarget)
      if (is_short && for_losses) return all_short_losses(job, item * per_item, end, clamps);
    Batch<T> batch(job);
    if (is_short) {
      for (int64_t r = item * per_item; r < end; r += L) batch.push_short(r, end - r < L ? end - r : L);
      batch.flush();
      return;
    }
    for (int64_t r = item * per_item; r < end; ++r) {
      const Fate fate = job.fate(r);
      RowSums sums = kUnread;
      bool folded = fate != Fate::kRead;
      if constexpr (kMayHoldTarget)
        folded = folded || (for_losses && fold_long_others(job.row(r), a.tile.classes, a.target[r], clamps, sums));
      if (!folded) sums = fold_part<T, Flags>(job.template view<Flags>(r), 0, a.tile.classes);
      batch.template push<Flags>(r, fate, sums);
    }
    batch.flush();
  });
}

// Few long rows: parts of a row are items, combined in the order of the classes.
template <class T, int Flags> void by_parts(const Job<T>& job) {
  const RowStatsArgs& a = job.args;
  const int64_t rows = job.rows(), parts = (a.tile.classes + kSplitClasses - 1) / kSplitClasses;
  RowSums* sums = static_cast<RowSums*>(__builtin_malloc(static_cast<size_t>(rows * parts) * sizeof(RowSums)));
  if (!sums) return by_rows<T, Flags>(job);
  parallel_for(rows * parts, a.threads, rows * a.tile.classes * static_cast<int64_t>(sizeof(T)), [&](int64_t item) {
    const int64_t r = item / parts, begin = item % parts * kSplitClasses;
    const int64_t end = begin + kSplitClasses < a.tile.classes ? begin + kSplitClasses : a.tile.classes;
    sums[item] = job.fate(r) == Fate::kRead ? fold_part<T, Flags>(job.template view<Flags>(r), begin, end) : kUnread;
  });
  Batch<T> batch(job);
  for (int64_t r = 0; r < rows; ++r) {
    const Fate fate = job.fate(r);
    RowSums total = sums[r * parts];
    if (fate == Fate::kRead)
      for (int64_t p = 1; p < parts; ++p) total = combine(total, sums[r * parts + p]);
    batch.template push<Flags>(r, fate, total);
  }
  batch.flush();
  __builtin_free(sums);
}

// Rows in lanes: classes [begin, end) of the `width` rows from `first_row` on.
template <class T, int Flags, int kTileVectors, class Done>
LL_INLINE void fold_tile(const Job<T>& job, int64_t first_row, int64_t width, int64_t begin, int64_t end,
                         const Done& done) {
  const LaneView<T> rows{job.row(first_row), job.args.tile.class_stride, job.class_weight(),
                         (Flags & kDense) ? job.dense_row(first_row) : nullptr, job.args.dense_strides.classes};
  const auto target_logit = [&](int64_t i) {
    return job.fate(first_row + i) == Fate::kRead ? job.target_logit(first_row + i) : kNaN<Compute<T>>;
  };
  fold_lanes<T, Flags, kTileVectors>(rows, width, begin, end, target_logit, done);
}

template <class T, int Flags> void by_lanes(const Job<T>& job) {
  constexpr int kTileVectors = 8;
  constexpr int64_t kWidth = kTileVectors * kLanes<Compute<T>>;
  const RowStatsArgs& a = job.args;
  const int64_t tiles = (a.tile.inner + kWidth - 1) / kWidth;
  parallel_for(a.tile.outer * tiles, a.threads, job.rows() * a.tile.classes * static_cast<int64_t>(sizeof(T)),
               [&](int64_t item) {
                 const int64_t inner = item % tiles * kWidth, first_row = item / tiles * a.tile.inner + inner;
                 const int64_t width = a.tile.inner - inner < kWidth ? a.tile.inner - inner : kWidth;
                 Batch<T> batch(job);
                 fold_tile<T, Flags, kTileVectors>(job, first_row, width, 0, a.tile.classes,
                                                   [&](int64_t i, const RowSums& sums) __attribute__((always_inline)) {
                                                     batch.template push<Flags>(first_row + i, job.fate(first_row + i),
                                                                                sums);
                                                   });
                 batch.flush();
               });
}

// Few rows of many classes in lanes, as a tile of a linear head's logits is: parts of the classes are items, each read
// as one stretch of memory, combined in the order of the classes.
template <class T, int Flags> void by_lane_parts(const Job<T>& job) {
  constexpr int kTileVectors = 32;
  constexpr int64_t kWidth = kTileVectors * kLanes<Compute<T>>;
  const RowStatsArgs& a = job.args;
  const int64_t rows = job.rows(), parts = (a.tile.classes + kLaneClasses - 1) / kLaneClasses;
  const int64_t tiles = (a.tile.inner + kWidth - 1) / kWidth,
                bytes = rows * a.tile.classes * static_cast<int64_t>(sizeof(T));
  RowSums* sums = static_cast<RowSums*>(__builtin_malloc(static_cast<size_t>(rows * parts) * sizeof(RowSums)));
  if (!sums) return by_lanes<T, Flags>(job);
  parallel_for(a.tile.outer * tiles * parts, a.threads, bytes, [&](int64_t item) {
    const int64_t part = item % parts, tile = item / parts, inner = tile % tiles * kWidth;
    const int64_t first_row = tile / tiles * a.tile.inner + inner, begin = part * kLaneClasses;
    const int64_t width = a.tile.inner - inner < kWidth ? a.tile.inner - inner : kWidth;
    const int64_t end = begin + kLaneClasses < a.tile.classes ? begin + kLaneClasses : a.tile.classes;
    fold_tile<T, Flags, kTileVectors>(job, first_row, width, begin, end,
                                      [&](int64_t i, const RowSums& s)
                                          __attribute__((always_inline)) { sums[(first_row + i) * parts + part] = s; });
  });
  parallel_for((rows + kMaxRows - 1) / kMaxRows, a.threads, bytes, [&](int64_t item) {
    Batch<T> batch(job);
    for (int64_t r = item * kMaxRows; r < rows && r < (item + 1) * kMaxRows; ++r) {
      RowSums total = sums[r * parts];
      for (int64_t p = 1; p < parts; ++p) total = combine(total, sums[r * parts + p]);
      batch.template push<Flags>(r, job.fate(r), total);
    }
    batch.flush();
  });
  __builtin_free(sums);
}

template <class T, int Flags> void run(const RowStatsArgs& a) {
  const Job<T> job{a};
  const bool lanes = a.tile.class_stride != 1 && a.tile.inner_stride == 1 && a.tile.inner >= kLanes<Compute<T>> / 2 &&
                     (!(Flags & kDense) || a.dense_strides.inner == 1);
  if (lanes && a.tile.classes > kLaneClasses && job.rows() <= kLanePartRows) return by_lane_parts<T, Flags>(job);
  if (lanes) return by_lanes<T, Flags>(job);
  if (job.rows() < 16 && a.tile.classes >= 2 * kSplitClasses) return by_parts<T, Flags>(job);
  by_rows<T, Flags>(job);
}

template <class T> void pick(const RowStatsArgs& a) {
  const int flags =
      (a.entropy || a.rank ? kToken : 0) | (a.smooth_sum ? kSmooth : 0) | (a.dense_sum || a.dense_mass ? kDense : 0);
  switch (flags) {
    case 0: return run<T, 0>(a);
    case kToken: return run<T, kToken>(a);
    case kSmooth: return run<T, kSmooth>(a);
    case kDense: return run<T, kDense>(a);
    case kSmooth | kDense: return run<T, kSmooth | kDense>(a);
    default:
      return run<T, kToken | kSmooth | kDense>(a);  // needs a dense target: module.cpp refuses the call without one
  }
}

}  // namespace

void row_stats(const RowStatsArgs& a) {
  if (a.bad_row) {
    *a.bad_row = -1;
    const int64_t rows = a.target ? a.tile.outer * a.tile.inner : 0;
    constexpr int64_t L = kLanes<double>;
    const auto load_targets = [&](int64_t r) {
      IntVec<double> t;
      memcpy(&t, a.target + r, LL_BYTES);
      return t;
    };
    IntVec<double> bad{};
    int64_t r = 0;
    for (; r + L <= rows; r += L) {
      const IntVec<double> t = load_targets(r);
      bad |= (t != a.ignore_index) & ((t < 0) | (t >= a.tile.classes));
    }
    int64_t any = 0;
    for (int64_t i = 0; i < L; ++i) any |= bad[i];
    for (r = any ? 0 : r; r < rows; ++r)
      if (a.target[r] != a.ignore_index && (a.target[r] < 0 || a.target[r] >= a.tile.classes)) {
        *a.bad_row = r;
        break;
      }
  }
  switch (a.dtype) {
    case DType::kFloat32: return pick<float>(a);
    case DType::kBFloat16: return pick<BFloat16>(a);
    case DType::kFloat16: return pick<Float16>(a);
    case DType::kFloat64: return pick<double>(a);
  }
}

}  // namespace logitless::LL_ISA
