// row_grad: the gradient of everything that row_stats gives, in one read of the logits and one write of the gradient.
//
// Formula: dz_j = p_j (a + b (z_j - lse)) + c [j = target] + e t_j w_j + f w_j (RowGradArgs, grad_coefficients.h).
//
// Layout: a Tile, and a gradient of the same shape and any strides, which may take the place of the logits. Consecutive
// classes are written as they are read; rows in lanes class by class; rows of other strides through small copies. A
// gradient larger than the caches is stored past them, in whole cache lines.
//
// Precision policy: p = exp(z) / exp(lse) with both in units of 2^power and the divisor rounded once, so p is within 2
// ulp and, where it is 2^-m, m/64 more for exp's drift (of double logits: within an ulp for each e-fold of 1/p, which
// log_sum's own rounding costs). p a + e t + f w is formed before any rounding to the storage type. For 16-bit types
// exp is to 2^-21, which their rounding hides. The target's class is computed in double (grad_coefficients.h).
//
// Steps:
//   1. Which terms there are decides the Flags of a template.
//   2. The layout decides how rows are cut into items of parallel work.
//   3. Of each block of rows the coefficients are prepared (grad_coefficients.h).
//   4. Every class of each row is computed by the formula without c.
//   5. The target's class is overwritten with its own value.
#include <cstdlib>

#include "parallel.h"
#include "rows/grad_coefficients.h"
#include "rows/lane_fold.h"

namespace logitless::LL_ISA {
namespace {

inline constexpr int64_t kItemBytes = 128 * 1024;  // logits of one parallel item, at most
inline constexpr int64_t kGather = 2048;           // elements of a strided row that are copied at a time
inline constexpr int64_t kShortClasses = 512;      // rows of no more classes are short
// A larger gradient bypasses the caches, of 16-bit types and of short rows by way of a buffer of whole cache lines.
inline constexpr int64_t kStreamBytes = 64 << 20;
inline constexpr int64_t kBufferBytes = 8192;
inline constexpr int64_t kCacheLine = 64;
inline constexpr int64_t kBlockRows = 8;  // short rows are taken as many at a time, or a multiple

template <class T, int Flags> struct Job : GradRows<T, Flags> {
  using Base = GradRows<T, Flags>;
  using Real = Compute<T>;
  using V = Vec<Real>;
  using Given = typename Base::Given;
  using Base::args, Base::bytes, Base::class_weight, Base::dense_row, Base::grad_row, Base::has_target, Base::prepare,
      Base::prepare_targets, Base::row, Base::target_value;
  static constexpr int L = kLanes<Real>;
  bool streaming;

  explicit Job(const RowGradArgs& a) : Base{a}, streaming(bytes() >= kStreamBytes && a.grad != a.logits) {}

  // ---- step 4: one vector of classes
  // ------------------------------------------------------------------------------------

  // The coefficients in lanes: all lanes of one row, or one row a lane. get(array) gives a vector of an array of them.
  struct Lanes {
    V unit, power, base, top, log_sum, a, b, e, f;
  };
  template <class Get> static LL_INLINE Lanes lanes_of(const RowCoefficients<Real>& rows, const Get& get) {
    Lanes c;
    c.unit = get(rows.unit);
    c.power = get(rows.power);
    c.base = get(rows.base);
    if constexpr ((Flags & kGap) != 0) {
      c.top = get(rows.top);
      c.log_sum = get(rows.log_sum);
      c.a = get(rows.a);
      c.b = get(rows.b);
    }
    if constexpr ((Flags & kTargets) != 0) c.e = get(rows.e);
    if constexpr ((Flags & kConstant) != 0) c.f = get(rows.f);
    return c;
  }

  // From exp(z) in the row's unit.
  static LL_INLINE V value_of(const Lanes& c, V out, V z, V w, V t) {
    if constexpr ((Flags & kGap) != 0) {
      const V log_p = maximum<Real>(splat<Real>(Real(-1e30)), (z - c.top) - c.log_sum);
      out = out * (c.a + c.b * log_p);
    }
    if constexpr ((Flags & kTargets) != 0) out = out + c.e * (t * w);
    if constexpr ((Flags & kConstant) != 0) out = out + c.f * w;
    return out;
  }
  template <bool kHugeRow> static LL_INLINE V value(const Lanes& c, V z, V w, V t) {
    const V cut = maximum<Real>(splat<Real>(static_cast<Real>(-2 * kHuge)), kHugeRow ? z - c.base : z);
    const Exponential<Real> x = split_row_exp<Real>(cut);
    return value_of(c, scale_by_power(x.fraction * c.unit, x.power - c.power), z, w, t);
  }

  // ---- step 4: consecutive classes of one row
  // ---------------------------------------------------------------------------

  // n of them. `streamed` output, not of 16-bit types, bypasses the caches.
  template <bool kPlainRow>
  LL_INLINE void row_values(const RowCoefficients<Real>& rows, int64_t of, const T* z, const Real* w, const T* t,
                            T* out, int64_t n, bool streamed) const {
    const Lanes c = lanes_of(rows, [of](const Real* array) { return splat<Real>(array[of]); });
    const RowExp<Real, sizeof(T) == 2> exp(c.power, c.unit);
    const auto at = [&](int64_t i, int64_t valid) __attribute__((always_inline)) {
      const bool whole = valid >= L;
      const V zs = whole ? load(z + i) : load_partial(z + i, valid, Real(0));
      V ws = splat<Real>(1), ts{};
      if constexpr ((Flags & (kConstant | kTargets)) != 0)
        if (w) ws = whole ? load(w + i) : load_partial(w + i, valid, Real(0));
      if constexpr ((Flags & kTargets) != 0) ts = whole ? load(t + i) : load_partial(t + i, valid, Real(0));
      if constexpr (kPlainRow)
        return value_of(c, exp(zs), zs, ws, ts);
      else
        return value<true>(c, zs, ws, ts);
    };
    int64_t i = 0;
    if (sizeof(T) >= 4 && streamed) {
      // Up to the first aligned vector, then whole vectors past the caches.
      constexpr int64_t kAlign = LL_BYTES;
      const uintptr_t beyond = reinterpret_cast<uintptr_t>(out) % kAlign;
      const int64_t head = smaller(static_cast<int64_t>((kAlign - beyond) % kAlign / sizeof(T)), n);
      if (i < head) {
        store_partial(out + i, at(i, head - i), head - i);
        i = head;
      }
      for (; i + L <= n; i += L) {
        ask_ahead(z + i, L);
        if constexpr ((Flags & kTargets) != 0) ask_ahead(t + i, L);
        stream(out + i, at(i, L));
      }
    } else {
      if constexpr (kPlainRow && (Flags & (kConstant | kTargets)) == 0) {
        for (; i + 2 * L <= n; i += 2 * L) {
          V a, b;
          ask_ahead(z + i, 2 * L);
          load_pair(z + i, a, b);
          store_pair(out + i, value_of(c, exp(a), a, V{}, V{}), value_of(c, exp(b), b, V{}, V{}));
        }
      }
      for (; i + L <= n; i += L) store(out + i, at(i, L));
    }
    if (i < n) store_partial(out + i, at(i, n - i), n - i);
  }
  LL_INLINE void values(const RowCoefficients<Real>& rows, int64_t of, const T* z, const Real* w, const T* t, T* out,
                        int64_t n, bool streamed) const {
    if (rows.plain[of])
      row_values<true>(rows, of, z, w, t, out, n, streamed);
    else
      row_values<false>(rows, of, z, w, t, out, n, streamed);
  }

  // Step 5, where `out` stands for class `begin` of the n classes from there on.
  LL_INLINE void put_target(int64_t r, const RowCoefficients<Real>& rows, int64_t i, int64_t begin, int64_t n,
                            T* out) const {
    if (has_target(r) && args.target[r] >= begin && args.target[r] < begin + n)
      out[args.target[r] - begin] = target_value(r, rows, i);
  }

  // Classes [begin, end) of row r, the i-th of `rows`, into `out`, which stands for class `begin`. Step 5 is somebody
  // else's unless `with_target`.
  LL_INLINE void contiguous(int64_t r, const RowCoefficients<Real>& rows, int64_t i, int64_t begin, int64_t end, T* out,
                            bool streamed, bool with_target) const {
    const int64_t n = end - begin;
    if (!rows.read[i]) {
      memset(out, 0, static_cast<size_t>(n) * sizeof(T));
      return;
    }
    const Real* w = class_weight() ? class_weight() + begin : nullptr;
    const T* t = (Flags & kTargets) ? dense_row(r) + begin : nullptr;
    values(rows, i, row(r) + begin, w, t, out, n, streamed);
    if (with_target) put_target(r, rows, i, begin, n, out);
  }

  // The same of many classes; `streamed`: past the caches, of 16-bit types through a buffer.
  __attribute__((noinline)) void long_part(int64_t r, const RowCoefficients<Real>& rows, int64_t i, int64_t begin,
                                           int64_t end, T* out, bool streamed) const {
    alignas(LL_BYTES) T buffer[kBufferBytes / sizeof(T)];
    const bool buffered = streamed && sizeof(T) == 2;
    const int64_t part = buffered ? kBufferBytes / static_cast<int64_t>(sizeof(T)) : end - begin;
    for (int64_t first = begin; first < end; first += part) {
      const int64_t last = smaller(first + part, end);
      T* const to = out + (first - begin);
      contiguous(r, rows, i, first, last, buffered ? buffer : to, streamed && !buffered, true);
      if (buffered) stream_copy(to, buffer, last - first);
    }
  }

  // Classes [begin, end) of a row of any strides, through small copies.
  __attribute__((noinline)) void gathered(int64_t r, const RowCoefficients<Real>& rows, int64_t of, int64_t begin,
                                          int64_t end) const {
    alignas(LL_BYTES) T zs[kGather], out[kGather], ts[(Flags & kTargets) ? kGather : 1];
    T* grad = grad_row(r);
    for (int64_t i = begin; i < end; i += kGather) {
      const int64_t n = smaller(end - i, kGather);
      if (rows.read[of]) {
        for (int64_t j = 0; j < n; ++j) zs[j] = row(r)[(i + j) * args.tile.class_stride];
        if constexpr ((Flags & kTargets) != 0)
          for (int64_t j = 0; j < n; ++j) ts[j] = dense_row(r)[(i + j) * args.dense_strides.classes];
        const Real* w = class_weight() ? class_weight() + i : nullptr;
        values(rows, of, zs, w, ts, out, n, false);
        put_target(r, rows, of, i, n, out);
      } else {
        memset(out, 0, sizeof out);
      }
      for (int64_t j = 0; j < n; ++j) grad[(i + j) * args.grad_strides.classes] = out[j];
    }
  }

  bool is_contiguous() const {
    return args.tile.class_stride == 1 && args.grad_strides.classes == 1 &&
           (!(Flags & kTargets) || args.dense_strides.classes == 1);
  }

  // ---- step 2: rows one after the other
  // ---------------------------------------------------------------------------------

  void long_rows() const {
    const int64_t part = kItemBytes / sizeof(T), parts = pieces(args.tile.classes, part);
    parallel_for(row_count(args.tile) * parts, args.threads, bytes(), [&](int64_t item) {
      const int64_t r = item / parts, begin = item % parts * part, end = smaller(begin + part, args.tile.classes);
      RowCoefficients<Real> rows;
      prepare(r, 1, rows);
      if (is_contiguous())
        long_part(r, rows, 0, begin, end, grad_row(r) + begin, streaming);
      else
        gathered(r, rows, 0, begin, end);
      if (streaming) fence();
    });
  }

  void short_rows() const {
    const int64_t classes = args.tile.classes, row_bytes = classes * static_cast<int64_t>(sizeof(T));
    const int64_t per_item = bounded(item_bytes(bytes(), kItemBytes) / row_bytes, 1, 8 * kMaxGradRows);
    const int64_t block = bounded(kBufferBytes / row_bytes / kBlockRows * kBlockRows, kBlockRows, kMaxGradRows);
    parallel_stretches(row_count(args.tile), per_item, args.threads, bytes(), [&](int64_t begin, int64_t end) {
      RowCoefficients<Real> rows;
      Given given;
      for (int64_t first = begin; first < end; first += kMaxGradRows) {
        const int64_t count = smaller(end - first, kMaxGradRows);
        prepare(first, count, rows, given);
        if (is_contiguous() && classes <= kShortClasses) {
          for (int64_t i = 0; i < count; i += block) block_of_rows(first, i, smaller(count - i, block), rows, given);
          continue;
        }
        prepare_targets(first, 0, count, rows, given);
        for (int64_t i = 0; i < count; ++i) {
          if (is_contiguous())
            long_part(first + i, rows, i, 0, classes, grad_row(first + i), streaming);
          else
            gathered(first + i, rows, i, 0, classes);
        }
      }
      if (streaming) fence();
    });
  }

  // Short rows first + [from, from + count). Their targets' logits are read while the rows are in the cache, unless the
  // gradient has taken their place by then.
  LL_INLINE void block_of_rows(int64_t first, int64_t from, int64_t count, RowCoefficients<Real>& rows,
                               const Given& given) const {
    const int64_t classes = args.tile.classes;
    const int64_t ahead = rows_ahead(classes * static_cast<int64_t>(sizeof(T))) * classes;
    alignas(LL_BYTES) T buffer[kBlockRows * kShortClasses];
    T* const grad = grad_row(first + from);
    const bool buffered = streaming && args.tile.inner == 1 && args.grad_strides.outer == classes;
    const bool in_place = args.grad == args.logits;
    const auto out = [&](int64_t i) { return buffered ? buffer + i * classes : grad_row(first + from + i); };
    if (in_place) prepare_targets(first, from, count, rows, given);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = first + from + i;
      for (int64_t j = 0; j < classes; j += kCacheLine / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(row(r) + ahead + j);
      contiguous(r, rows, from + i, 0, classes, out(i), false, false);
    }
    if (!in_place) prepare_targets(first, from, count, rows, given);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = first + from + i;
      if (rows.read[from + i] && has_target(r)) out(i)[args.target[r]] = target_value(r, rows, from + i);
    }
    if (buffered) stream_copy(grad, buffer, count * classes);
  }

  // ---- step 2: rows in lanes
  // --------------------------------------------------------------------------------------------

  static constexpr int kTileVectors = static_cast<int>(smaller(kMaxGradRows / L, 8));
  static constexpr int64_t kWidth = kTileVectors * L;

  void by_lanes() const {
    const int64_t tiles = pieces(args.tile.inner, kWidth);
    parallel_for(args.tile.outer * tiles, args.threads, bytes(), [&](int64_t item) {
      const int64_t inner = item % tiles * kWidth, first = item / tiles * args.tile.inner + inner;
      const int64_t width = smaller(args.tile.inner - inner, kWidth);
      RowCoefficients<Real> rows;
      prepare(first, width, rows);
      lane_tile(first, width, rows, 0, 0, args.tile.classes);
    });
  }

  // Few rows of many classes in lanes, as a tile of a linear head's logits is: an item is a stretch of classes that
  // fits a core's cache with all its rows.
  void by_lane_parts() const {
    const int64_t row_bytes = args.tile.inner * static_cast<int64_t>(sizeof(T));
    const int64_t per_item = kItemBytes * 2 / row_bytes + 1, parts = pieces(args.tile.classes, per_item);
    // Blocks of kMaxGradRows rows of one outer index each.
    const int64_t blocks = pieces(args.tile.inner, kMaxGradRows);
    const size_t size = static_cast<size_t>(args.tile.outer * blocks) * sizeof(RowCoefficients<Real>);
    auto* const all = static_cast<RowCoefficients<Real>*>(aligned_alloc(LL_BYTES, size));
    if (!all) return by_lanes();
    for (int64_t block = 0; block < args.tile.outer * blocks; ++block) {
      const int64_t inner = block % blocks * kMaxGradRows;
      const int64_t count = smaller(args.tile.inner - inner, kMaxGradRows);
      prepare(block / blocks * args.tile.inner + inner, count, all[block]);
    }
    parallel_for(args.tile.outer * parts, args.threads, bytes(), [&](int64_t item) {
      const int64_t outer = item / parts, begin = item % parts * per_item;
      const int64_t end = smaller(begin + per_item, args.tile.classes);
      for (int64_t inner = 0; inner < args.tile.inner; inner += kWidth) {
        const RowCoefficients<Real>& rows = all[outer * blocks + inner / kMaxGradRows];
        const int64_t width = smaller(args.tile.inner - inner, kWidth);
        lane_tile(outer * args.tile.inner + inner, width, rows, inner % kMaxGradRows, begin, end);
      }
    });
    __builtin_free(all);
  }

  // Steps 4 and 5 of classes [begin, end) of the `width` rows from `first` on, which `rows` has from `at` on.
  void lane_tile(int64_t first, int64_t width, const RowCoefficients<Real>& rows, int64_t at, int64_t begin,
                 int64_t end) const {
    Lanes lanes[kTileVectors];
    IntVec<Real> keep[kTileVectors] = {};  // the lanes of rows that are not ignored
    bool huge = false;
    for (int64_t i = 0; i < width; i += L)
      lanes[i / L] = lanes_of(rows, [&](const Real* array) { return load(array + at + i); });
    for (int64_t i = 0; i < width; ++i) {
      if (!rows.read[at + i]) continue;
      keep[i / L][i % L] = -1;
      huge = huge || rows.base[at + i] != 0;
    }
    const T* z = row(first);
    const T* t = dense_row(first);
    T* out = grad_row(first);
    const Real* w = class_weight();
    // K classes of one vector of rows after the other, whose coefficients stay in registers.
    const auto classes = [&](auto is_huge, auto count, int64_t j) __attribute__((always_inline)) {
      constexpr int K = decltype(count)::value;
      for (int64_t i = 0; i < width; i += L) {
        const int64_t valid = width - i;
        const auto get = [&](const T* p) __attribute__((always_inline)) {
          return valid >= L ? load(p) : load_partial(p, valid, Real(0));
        };
        const Lanes c = lanes[i / L];
        const IntVec<Real> kept = keep[i / L];
        V v[K];
        LL_UNROLL
        for (int k = 0; k < K; ++k) {
          __builtin_prefetch(z + (j + k + kLaneAhead) * args.tile.class_stride + i);
          const V ws = splat<Real>(w ? w[j + k] : Real(1));
          V ts{};
          if constexpr ((Flags & kTargets) != 0) ts = get(t + (j + k) * args.dense_strides.classes + i);
          const V zs = get(z + (j + k) * args.tile.class_stride + i);
          v[k] = kept ? value<decltype(is_huge)::value>(c, zs, ws, ts) : V{};
        }
        LL_UNROLL
        for (int k = 0; k < K; ++k) {
          T* p = out + (j + k) * args.grad_strides.classes + i;
          if (valid >= L)
            store(p, v[k]);
          else
            store_partial(p, v[k], valid);
        }
      }
    };
    const auto all = [&](auto is_huge) __attribute__((always_inline)) {
      int64_t j = begin;
      for (; j + 4 <= end; j += 4) classes(is_huge, Constant<4>{}, j);
      for (; j < end; ++j) classes(is_huge, Constant<1>{}, j);
    };
    if (huge)
      all(Constant<true>{});
    else
      all(Constant<false>{});
    // 5.
    for (int64_t i = 0; i < width; ++i) {
      const int64_t r = first + i;
      if (rows.read[at + i] && has_target(r) && args.target[r] >= begin && args.target[r] < end)
        out[args.target[r] * args.grad_strides.classes + i] = target_value(r, rows, at + i);
    }
  }

  void run() const {
    if (bytes() == 0) return;
    const bool lanes = args.tile.class_stride != 1 && args.tile.inner_stride == 1 && args.grad_strides.inner == 1 &&
                       args.tile.inner >= L / 2 && (!(Flags & kTargets) || args.dense_strides.inner == 1);
    const bool few_rows = row_count(args.tile) <= kLanePartRows && args.tile.classes > kLaneClasses;
    if (lanes && few_rows)
      by_lane_parts();
    else if (lanes)
      by_lanes();
    else if (args.tile.classes * static_cast<int64_t>(sizeof(T)) >= kItemBytes)
      long_rows();
    else
      short_rows();
  }
};

template <class T, int Flags> void run(const RowGradArgs& a) { Job<T, Flags>(a).run(); }

// Step 1.
template <class T> void pick(const RowGradArgs& a) {
  const int flags = (a.b_scale != 0 ? kGap : 0) | (a.f_scale != 0 ? kConstant : 0) | (a.e_scale != 0 ? kTargets : 0);
  switch (flags) {
    case 0: return run<T, 0>(a);
    case kGap: return run<T, kGap>(a);
    case kConstant: return run<T, kConstant>(a);
    case kTargets: return run<T, kTargets>(a);
    case kTargets | kConstant: return run<T, kTargets | kConstant>(a);
    // binding/module.cpp refuses b or e without what they need.
    default: return run<T, kGap | kConstant | kTargets>(a);
  }
}

}  // namespace

void row_grad(const RowGradArgs& a) {
  switch (a.dtype) {
    case DType::kFloat32: return pick<float>(a);
    case DType::kBFloat16: return pick<BFloat16>(a);
    case DType::kFloat16: return pick<Float16>(a);
    case DType::kFloat64: return pick<double>(a);
  }
}

}  // namespace logitless::LL_ISA
