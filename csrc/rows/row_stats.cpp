// row_stats: everything that the losses and measures need of each row, in one read of the logits.
//
// Formula: nll, lse, H and the weighted sums of row_batch.h, from the sums of row_state.h.
//
// Layout: a Tile, logits of shape (outer, classes, inner) of any strides. Rows of consecutive logits are read one after
// the other; rows that lie in lanes (inner stride 1) class by class, without a copy.
//
// Precision policy: that of row_state.h and row_fold.h; finished in double (row_batch.h).
//
// Steps:
//   1. Report the first row whose target is no class.
//   2. What is wanted decides which sums are folded: the Flags of a template, so that a loss alone pays for nothing
//      else.
//   3. The layout decides how rows are cut into items of parallel work: by_rows, by_parts of long rows, by_lanes, or
//      by_lane_parts. The order in which a row is added up depends on its strides and on the number of its classes
//      alone, never on how many rows lie beside it: rows of many classes are always folded in parts.
//   4. Each item folds its rows, and hands their sums to a RowBatch, which writes the outputs.
#include "parallel.h"
#include "rows/lane_fold.h"
#include "rows/row_batch.h"

namespace logitless::LL_ISA {
namespace {

inline constexpr int64_t kItemBytes = 256 * 1024;        // logits of one parallel item, at most
inline constexpr int64_t kLargeItemBytes = 1024 * 1024;  // where there are many: each begins with lines in no cache
inline constexpr int64_t kManyItems = 64;
inline constexpr int64_t kSplitClasses = 32768;  // classes of one part of a long row
inline constexpr int64_t kLongRow = 2 * kSplitClasses;
inline constexpr int64_t kFewRows = 16;  // of so few long rows the parts are items

// ---- cross-entropy of short rows
// ----------------------------------------------------------------------------------------

// The losses of rows [first, first + n) of few consecutive classes, at most kMaxRows, with what their gradients need,
// by target_fold.h. False, and nothing is written, where not all of them are rows for that fold.
template <class T>
__attribute__((noinline)) bool short_losses(const StatsJob<T>& job, int64_t first, int64_t n, bool& clamps) {
  using Real = Compute<T>;
  constexpr int D = kLanes<double>;
  const RowStatsArgs& a = job.args;
  // The rows that are read, close together.
  const T* logits[kMaxRows];
  int64_t targets[kMaxRows], count = 0;
  uint8_t place[kMaxRows];
  for (int64_t i = 0; i < n; ++i) {
    if (job.status(first + i) != RowStatus::kRead) continue;
    logits[count] = job.row(first + i);
    targets[count] = a.target[first + i];
    place[count++] = static_cast<uint8_t>(i);
  }
  alignas(LL_BYTES) Real pivot[kMaxRows], rest[kMaxRows], nll[kMaxRows];
  alignas(LL_BYTES) double log_sum[kMaxRows];
  if (count > 0) {
    const Real unit = fold_short_others<T>(logits, targets, count, a.tile.classes, pivot, rest, clamps);
    const Vec<double> power = splat<double>(static_cast<double>(unit));
    if (power[0] != power[0]) return false;
    for (int64_t i = 0; i < count; i += D) {
      const Vec<double> sum = without_drift<Real>(load_wide(rest + i), power);
      const Vec<double> log_q = short_log1p(sum * over_exp(load_wide(pivot + i), power));
      store(log_sum + i, log_q);
      store_narrow(nll + i, log_q);
    }
  }
  // To their places, from the last on, with what a row that was not read has.
  if (count < n) {
    for (int64_t i = n; i-- > 0;) {
      if (count > 0 && place[count - 1] == i) {
        --count;
        pivot[i] = pivot[count];
        log_sum[i] = log_sum[count];
        nll[i] = nll[count];
      } else {
        pivot[i] = 0;
        log_sum[i] = job.status(first + i) == RowStatus::kIgnored ? 0 : kNaN<double>;
        nll[i] = static_cast<Real>(log_sum[i]);
      }
    }
  }
  const auto write = [&](void* out, const auto* from) {
    if (!out) return;
    char* const to = static_cast<char*>(out) + static_cast<size_t>(first) * sizeof *from;
    memcpy(to, from, static_cast<size_t>(n) * sizeof *from);
  };
  write(a.nll, nll);
  write(a.pivot, pivot);
  write(a.log_sum, log_sum);
  return true;
}

// The same of rows [first, end) of any kind. A row's loss does not depend on its neighbours: where they do not go
// together, each is tried in a unit of its own, and else folded against its largest logit.
template <class T> void all_short_losses(const StatsJob<T>& job, int64_t first, int64_t end, bool& clamps) {
  for (; first < end; first += kMaxRows) {
    const int64_t n = smaller(end - first, kMaxRows);
    if (short_losses(job, first, n, clamps)) continue;
    for (int64_t r = first; r < first + n; ++r) {
      if (short_losses(job, r, 1, clamps)) continue;
      RowBatch<T> alone(job);
      alone.template push<0>(r, RowStatus::kRead, fold_part<T, 0>(job.template view<0>(r), 0, job.args.tile.classes));
      alone.flush();
    }
  }
}

// ---- step 3: how rows are cut
// -------------------------------------------------------------------------------------------

// The sums of a row from those of its parts, in the order of the classes: fold(begin, end) gives those of one part.
template <class Fold> LL_INLINE RowSums fold_parts(int64_t classes, int64_t part_classes, const Fold& fold) {
  RowSums total = fold(0, smaller(part_classes, classes));
  for (int64_t begin = part_classes; begin < classes; begin += part_classes)
    total = combine(total, fold(begin, smaller(begin + part_classes, classes)));
  return total;
}

template <class T, int Flags> void by_rows(const StatsJob<T>& job) {
  const RowStatsArgs& a = job.args;
  const int64_t rows = job.rows(), row_bytes = a.tile.classes * static_cast<int64_t>(sizeof(T));
  constexpr int64_t L = kLanes<Compute<T>>;
  const bool is_short =
      Flags == 0 && a.tile.class_stride == 1 && a.tile.classes > 0 && a.tile.classes <= kShortVectors * L;
  // Not of double logits: beside a pivot far below the largest, log_sum's own rounding would show in their gradients.
  constexpr bool kMayHoldTarget = Flags == 0 && sizeof(Compute<T>) == 4;
  const bool is_loss = kMayHoldTarget && a.target && a.tile.class_stride == 1 && !a.row_max && !a.lse && !a.argmax;
  const int64_t part = a.tile.classes >= kLongRow ? kSplitClasses : a.tile.classes;
  const int64_t most_bytes = bounded(rows * row_bytes / kManyItems, kItemBytes, kLargeItemBytes);
  int64_t per_item = item_bytes(rows * row_bytes, most_bytes) / (row_bytes ? row_bytes : 1);
  per_item = bounded(per_item, 1, 16 * kMaxRows);
  if (is_short) per_item = pieces(per_item, L) * L;
  [[maybe_unused]] bool clamps = false;  // whether logits were met that ask for it: a hint that items share
  parallel_stretches(rows, per_item, a.threads, rows * row_bytes, [&](int64_t begin, int64_t end) {
    if constexpr (kMayHoldTarget)
      if (is_short && is_loss) return all_short_losses(job, begin, end, clamps);
    RowBatch<T> batch(job);
    // The target's logit lies where no other read of its row has been, so it is asked for a row ahead.
    const auto ask_for_target = [&](int64_t r) {
      if (is_loss && r < end && job.status(r) == RowStatus::kRead) __builtin_prefetch(job.row(r) + a.target[r]);
    };
    if (is_short) {
      for (int64_t r = begin; r < end; r += L) batch.push_short(r, smaller(end - r, L));
      batch.flush();
      return;
    }
    ask_for_target(begin);
    for (int64_t r = begin; r < end; ++r) {
      ask_for_target(r + 1);
      const RowStatus status = job.status(r);
      RowSums sums = kUnread;
      bool folded = status != RowStatus::kRead;
      if constexpr (kMayHoldTarget) {
        folded = folded || (is_loss && part == a.tile.classes &&
                            fold_long_others(job.row(r), a.tile.classes, a.target[r], clamps, sums));
      }
      if (!folded) {
        const auto view = job.template view<Flags>(r);
        sums = fold_parts(a.tile.classes, part,
                          [&](int64_t from, int64_t to) { return fold_part<T, Flags>(view, from, to); });
      }
      batch.template push<Flags>(r, status, sums);
    }
    batch.flush();
  });
}

LL_INLINE RowSums combine_parts(const RowSums* sums, int64_t r, int64_t parts) {
  return fold_parts(parts, 1, [&](int64_t part, int64_t) { return sums[r * parts + part]; });
}

LL_INLINE RowSums* sums_of_parts(int64_t rows, int64_t parts) {
  return static_cast<RowSums*>(__builtin_malloc(static_cast<size_t>(rows * parts) * sizeof(RowSums)));
}

// Few long rows: parts of a row are items.
template <class T, int Flags> void by_parts(const StatsJob<T>& job) {
  const RowStatsArgs& a = job.args;
  const int64_t rows = job.rows(), parts = pieces(a.tile.classes, kSplitClasses);
  RowSums* const sums = sums_of_parts(rows, parts);
  if (!sums) return by_rows<T, Flags>(job);
  parallel_for(rows * parts, a.threads, job.bytes(), [&](int64_t item) {
    const int64_t r = item / parts, begin = item % parts * kSplitClasses;
    const int64_t end = smaller(begin + kSplitClasses, a.tile.classes);
    const bool read = job.status(r) == RowStatus::kRead;
    sums[item] = read ? fold_part<T, Flags>(job.template view<Flags>(r), begin, end) : kUnread;
  });
  RowBatch<T> batch(job);
  for (int64_t r = 0; r < rows; ++r) {
    const RowStatus status = job.status(r);
    const RowSums total = status == RowStatus::kRead ? combine_parts(sums, r, parts) : sums[r * parts];
    batch.template push<Flags>(r, status, total);
  }
  batch.flush();
  __builtin_free(sums);
}

// Hands the sums of all rows, each in `parts` parts, to their outputs.
template <class T, int Flags> void push_parts(const StatsJob<T>& job, const RowSums* sums, int64_t parts) {
  parallel_stretches(job.rows(), kMaxRows, job.args.threads, job.bytes(), [&](int64_t begin, int64_t end) {
    RowBatch<T> batch(job);
    for (int64_t r = begin; r < end; ++r) batch.template push<Flags>(r, job.status(r), combine_parts(sums, r, parts));
    batch.flush();
  });
}

// What gives the target logit of the i-th row from `first_row` on; NaN of a row that is not read.
template <class T> LL_INLINE auto target_logits(const StatsJob<T>& job, int64_t first_row) {
  return [&job, first_row](int64_t i) {
    return job.status(first_row + i) == RowStatus::kRead ? job.target_logit(first_row + i) : kNaN<Compute<T>>;
  };
}

// Classes [begin, end) of the `width` rows in lanes from `first_row` on.
template <class T, int Flags, int kTileVectors, class Done>
LL_INLINE void fold_tile(const StatsJob<T>& job, int64_t first_row, int64_t width, int64_t begin, int64_t end,
                         const Done& done) {
  const LaneView<T> rows{job.row(first_row), job.args.tile.class_stride, job.class_weight(),
                         (Flags & kDense) ? job.dense_row(first_row) : nullptr, job.args.dense_strides.classes};
  fold_lanes<T, Flags, kTileVectors>(rows, width, begin, end, target_logits(job, first_row), done);
}

template <class T, int Flags> void by_lanes(const StatsJob<T>& job) {
  constexpr int kTileVectors = 8;
  constexpr int64_t kWidth = kTileVectors * kLanes<Compute<T>>;
  const RowStatsArgs& a = job.args;
  const int64_t tiles = pieces(a.tile.inner, kWidth);
  parallel_for(a.tile.outer * tiles, a.threads, job.bytes(), [&](int64_t item) {
    const int64_t inner = item % tiles * kWidth, first_row = item / tiles * a.tile.inner + inner;
    const int64_t width = smaller(a.tile.inner - inner, kWidth);
    RowBatch<T> batch(job);
    const auto push = [&](int64_t i, const RowSums& sums) __attribute__((always_inline)) {
      batch.template push<Flags>(first_row + i, job.status(first_row + i), sums);
    };
    if (a.tile.classes <= kLaneClasses) {
      fold_tile<T, Flags, kTileVectors>(job, first_row, width, 0, a.tile.classes, push);
    } else {
      RowSums totals[kWidth];
      for (int64_t begin = 0; begin < a.tile.classes; begin += kLaneClasses) {
        const int64_t end = smaller(begin + kLaneClasses, a.tile.classes);
        fold_tile<T, Flags, kTileVectors>(job, first_row, width, begin, end, [&](int64_t i, const RowSums& sums) {
          totals[i] = begin == 0 ? sums : combine(totals[i], sums);
        });
      }
      for (int64_t i = 0; i < width; ++i) push(i, totals[i]);
    }
    batch.flush();
  });
}

// Few rows of many classes in lanes, as a tile of a linear head's logits is: parts of the classes are items, each read
// as one stretch of memory.
template <class T, int Flags> void by_lane_parts(const StatsJob<T>& job) {
  constexpr int kTileVectors = 32;
  constexpr int64_t kWidth = kTileVectors * kLanes<Compute<T>>;
  const RowStatsArgs& a = job.args;
  const int64_t rows = job.rows(), parts = pieces(a.tile.classes, kLaneClasses);
  const int64_t tiles = pieces(a.tile.inner, kWidth);
  RowSums* const sums = sums_of_parts(rows, parts);
  if (!sums) return by_lanes<T, Flags>(job);
  parallel_for(a.tile.outer * tiles * parts, a.threads, job.bytes(), [&](int64_t item) {
    const int64_t part = item % parts, tile = item / parts, inner = tile % tiles * kWidth;
    const int64_t first_row = tile / tiles * a.tile.inner + inner, begin = part * kLaneClasses;
    const int64_t width = smaller(a.tile.inner - inner, kWidth), end = smaller(begin + kLaneClasses, a.tile.classes);
    const auto done = [&](int64_t i, const RowSums& s)
                          __attribute__((always_inline)) { sums[(first_row + i) * parts + part] = s; };
    fold_tile<T, Flags, kTileVectors>(job, first_row, width, begin, end, done);
  });
  push_parts<T, Flags>(job, sums, parts);
  __builtin_free(sums);
}

template <class T, int Flags> void run(const RowStatsArgs& a) {
  const StatsJob<T> job{a};
  const bool lanes =
      lie_in_lanes<T>(a.tile.class_stride, a.tile.inner_stride) && (!(Flags & kDense) || a.dense_strides.inner == 1);
  if (lanes && a.tile.classes > kLaneClasses && job.rows() <= kLanePartRows) return by_lane_parts<T, Flags>(job);
  if (lanes) return by_lanes<T, Flags>(job);
  if (job.rows() < kFewRows && a.tile.classes >= kLongRow) return by_parts<T, Flags>(job);
  by_rows<T, Flags>(job);
}

// Step 2.
template <class T> void pick(const RowStatsArgs& a) {
  const int token = a.entropy || a.rank ? kToken : 0;
  const int smooth = a.smooth_sum ? kSmooth : 0;
  const int dense = a.dense_sum || a.dense_mass ? kDense : 0;
  switch (token | smooth | dense) {
    case 0: return run<T, 0>(a);
    case kToken: return run<T, kToken>(a);
    case kSmooth: return run<T, kSmooth>(a);
    case kDense: return run<T, kDense>(a);
    case kSmooth | kDense: return run<T, kSmooth | kDense>(a);
    default:
      return run<T, kToken | kSmooth | kDense>(a);  // has a dense target: binding/module.cpp refuses it otherwise
  }
}

}  // namespace

void row_stats(const RowStatsArgs& a) {
  // 1.
  if (a.bad_row) *a.bad_row = first_bad_row(a.tile, a.target, a.ignore_index);
  switch (a.dtype) {
    case DType::kFloat32: return pick<float>(a);
    case DType::kBFloat16: return pick<BFloat16>(a);
    case DType::kFloat16: return pick<Float16>(a);
    case DType::kFloat64: return pick<double>(a);
  }
}

}  // namespace logitless::LL_ISA
