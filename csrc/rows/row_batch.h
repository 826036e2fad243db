// From folded rows to what row_stats gives: a batch of rows is finished together, a vector of rows at a time.
//
// Formula, with q = rest / exp(max), which is the sum over the other classes in units of the largest (RowSums):
//   log_sum = log1p(q)         lse = max + log_sum         nll = (max - z_target) + log_sum
//   H(p)    = spread / exp(max) / (1 + q) + log_sum
//   sum_j w_j (lse - z_j) = smooth_gap + smooth_mass log_sum, and likewise with t_j w_j
//
// Layout: one array of doubles for each number, so that a vector of rows is one load.
//
// Precision policy: all in double. max and log_sum are added last, and are given apart as well.
//
// Steps: 1. push puts a row's numbers into the arrays; rows whose maximum is beyond kHuge are folded again, less their
// maximum. 2. flush computes log_sum of all rows. 3. Each output that is wanted is written, one after the other; where
// a row was not read it is 0 (ignored), NaN (its target is no class) or, for classes, -1.
#pragma once

#include "rows/row_fold.h"
#include "rows/short_rows.h"
#include "rows/target_fold.h"
#include "rows/tile_rows.h"

namespace logitless::LL_ISA {
namespace {  // local to the kernel that includes this, as the kernel itself is

enum class RowStatus : uint8_t { kRead, kIgnored, kBadTarget };

// A call of row_stats, and its rows.
template <class T> struct StatsJob {
  using Real = Compute<T>;
  const RowStatsArgs& args;
  const Real* class_weight() const { return static_cast<const Real*>(args.class_weight); }
  int64_t rows() const { return row_count(args.tile); }
  int64_t bytes() const { return rows() * args.tile.classes * static_cast<int64_t>(sizeof(T)); }
  const T* row(int64_t r) const {
    return static_cast<const T*>(args.logits) +
           row_offset(args.tile, r, args.tile.outer_stride, args.tile.inner_stride);
  }
  const T* dense_row(int64_t r) const {
    return static_cast<const T*>(args.dense_target) +
           row_offset(args.tile, r, args.dense_strides.outer, args.dense_strides.inner);
  }
  RowStatus status(int64_t r) const {
    if (!args.target) return RowStatus::kRead;
    const int64_t t = args.target[r];
    if (t == args.ignore_index) return RowStatus::kIgnored;
    return t < 0 || t >= args.tile.classes ? RowStatus::kBadTarget : RowStatus::kRead;
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

inline constexpr RowSums kUnread{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};

// 2^power / exp(top): what turns sums in the one unit into the other. From an exponent that is reduced below ln2, so
// that its rounding does not count.
LL_INLINE Vec<double> over_exp(Vec<double> top, Vec<double> power) {
  const Vec<double> n = whole_power<double>(top);
  return scale_by_power(exp_of_remainder(-remainder(top, n)), power - n);
}

// Up to kMaxRows consecutive rows.
template <class T> struct RowBatch {
  using Real = Compute<T>;
  const StatsJob<T>& job;
  int64_t first_row = 0, count = 0;
  bool all_read = true;
  int64_t arg[kMaxRows], rank[kMaxRows];
  RowStatus status[kMaxRows];
  // above_target: max - z_target. The others are RowSums'.
  alignas(LL_BYTES) double max[kMaxRows], above_target[kMaxRows], base[kMaxRows], power[kMaxRows], rest[kMaxRows];
  alignas(LL_BYTES) double spread[kMaxRows], smooth_gap[kMaxRows], smooth_mass[kMaxRows];
  alignas(LL_BYTES) double dense_gap[kMaxRows], dense_mass[kMaxRows];

  explicit RowBatch(const StatsJob<T>& j) : job(j) {}

  // 1. Row r, the next one.
  template <int Flags> LL_INLINE void push(int64_t r, RowStatus row_status, const RowSums& sums) {
    const int64_t i = count++;
    if (i == 0) first_row = r;
    place<Flags>(i, row_status, sums);
    if (count == kMaxRows) flush();
  }

  template <int Flags> LL_INLINE void place(int64_t i, RowStatus row_status, const RowSums& sums) {
    const int64_t r = first_row + i;
    const bool read = row_status == RowStatus::kRead;
    status[i] = row_status;
    all_read = all_read && read;
    above_target[i] = read ? sums.max - static_cast<double>(job.target_logit(r)) : 0;
    if (read && !(__builtin_fabs(sums.max) <= kHuge)) {
      const bool finite = __builtin_fabs(sums.max) < __builtin_inf();
      set<Flags>(i, finite ? fold_huge<T, Flags>(job.template view<Flags>(r), job.args.tile.classes, sums.max) : sums);
      if (!finite) {
        // Beside -inf alone a NaN is no largest logit: it must not look like a row that has none above -inf.
        if (sums.max == -__builtin_inf() && sums.rest != sums.rest) max[i] = __builtin_nan("");
        rest[i] = __builtin_nan("");
      }
    } else {
      set<Flags>(i, sums);
    }
  }

  template <int Flags> LL_INLINE void set(int64_t i, const RowSums& sums) {
    arg[i] = sums.arg;
    max[i] = sums.max;
    base[i] = sums.base;
    power[i] = sums.power;
    rest[i] = sums.rest;
    if constexpr ((Flags & kToken) != 0) {
      rank[i] = sums.rank;
      spread[i] = sums.spread;
    }
    if constexpr ((Flags & kSmooth) != 0) {
      smooth_gap[i] = sums.smooth_gap;
      smooth_mass[i] = sums.smooth_mass;
    }
    if constexpr ((Flags & kDense) != 0) {
      dense_gap[i] = sums.dense_gap;
      dense_mass[i] = sums.dense_mass;
    }
  }

  // 1. Rows [first, first + n) of few consecutive classes, at most as many as there are lanes, folded together.
  LL_INLINE void push_short(int64_t first, int64_t n) {
    constexpr int L = kLanes<Real>;
    const int64_t classes = job.args.tile.classes, at = count;
    if (at == 0) first_row = first;
    count += n;
    const T* logits[L] = {};
    const T* any = nullptr;
    alignas(LL_BYTES) Real targets[L] = {}, tops[L], sums[L];
    for (int64_t i = 0; i < n; ++i) {
      const RowStatus row_status = status[at + i] = job.status(first + i);
      if (row_status == RowStatus::kRead) any = logits[i] = job.row(first + i);
      all_read = all_read && row_status == RowStatus::kRead;
    }
    if (any) {
      for (const T*& row : logits) row = row ? row : any;  // a row that is not read has one that is in its lane
      const ShortRows<Real> rows = fold_short<T>(logits, n, classes);
      store(tops, rows.max);
      store(sums, rows.rest);
      if (job.args.target) {
        for (int64_t i = 0; i < n; ++i)
          targets[i] = status[at + i] == RowStatus::kRead ? widen(logits[i][job.args.target[first + i]]) : Real(0);
      }
      const Vec<double> unit = splat<double>(static_cast<double>(rows.power));
      for (int64_t i = 0; i < L; i += kLanes<double>) {
        const Vec<double> top = load_wide(tops + i);
        store(max + at + i, top);
        store(above_target + at + i, top - load_wide(targets + i));
        store(base + at + i, Vec<double>{});
        store(power + at + i, unit);
        store(rest + at + i, without_drift<Real>(load_wide(sums + i), unit));
      }
      memset(arg + at, 0, sizeof *arg * L);
      // A row that the common unit did not suit is folded alone.
      if (const uint32_t valid = rows.valid_bits(); __builtin_expect(valid != kAllBits<Real>, 0)) {
        for (int64_t i = 0; i < n; ++i) {
          if ((valid >> i & 1) || status[at + i] != RowStatus::kRead) continue;
          place<0>(at + i, RowStatus::kRead, fold_contiguous<T, 0>(job.template view<0>(first + i), 0, classes));
        }
      }
    }
    if (count > kMaxRows - L) flush();
  }

  // 3. One output of every row: values(i) of a vector of rows where they were read.
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
      if (status[i] != RowStatus::kRead) to[i] = status[i] == RowStatus::kIgnored ? Out(0) : kNaN<Out>;
  }
  template <class F> LL_INLINE void write_class(int64_t* out, const F& value) const {
    if (!out) return;
    for (int64_t i = 0; i < count; ++i) out[first_row + i] = status[i] == RowStatus::kRead ? value(i) : -1;
  }

  void flush() {
    const RowStatsArgs& a = job.args;
    constexpr int L = kLanes<double>;
    // 2.
    alignas(LL_BYTES) double log_sum[kMaxRows], entropy[kMaxRows];
    for (int64_t i = 0; i < count; i += L) {
      const Vec<double> unit = over_exp(load(max + i) - load(base + i), load(power + i)), q = load(rest + i) * unit;
      const Vec<double> log_q = log1p(q);
      store(log_sum + i, log_q);
      if (a.entropy) store(entropy + i, load(spread + i) * unit / (q + 1.0) + log_q);
    }
    // 3.
    const auto log_of = [&](int64_t i) { return load(log_sum + i); };
    write<Real>(a.nll, [&](int64_t i) { return load(above_target + i) + log_of(i); });
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

}  // namespace
}  // namespace logitless::LL_ISA
