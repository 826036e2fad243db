// row_grad: the gradient of everything row_stats gives, in one read of the logits and one write of the gradient.
//
// Precision policy: p = exp(z) / exp(lse) with both in units of 2^power and the divisor rounded once, so p is within 2
// ulp and, where it is 2^-m, m/64 more for exp's drift (of double logits: within an ulp for each e-fold of 1/p, which
// log_sum's own rounding costs); p * a + e t + f w is formed before any rounding to the storage type; for 16-bit types
// exp is to 2^-21, which their rounding hides. At the target, a p_t + c is computed in double, and where c is about -a
// as a expm1(z_t - lse) + (a + c), so that nothing cancels.
#include <cstdlib>

#include "parallel.h"
#include "rows/lane_fold.h"

namespace logitless::LL_ISA {
namespace {

enum GradFlags { kGap = 1, kConstant = 2, kTargets = 4 };  // b; f; e

inline constexpr int64_t kMaxRows = 128;           // rows whose coefficients are prepared together
inline constexpr int64_t kItemBytes = 128 * 1024;  // logits of one parallel item, at most
inline constexpr int64_t kGather = 2048;           // elements of a strided row copied at a time
inline constexpr int64_t kShortClasses = 512;      // rows of no more classes are short
inline constexpr int64_t kStreamBytes = 64 << 20;  // a larger gradient bypasses the caches,
inline constexpr int64_t kBufferBytes = 8192;  // of 16-bit types or short rows by way of a buffer of whole cache lines
inline constexpr int64_t kCacheLine = 64;
inline constexpr int64_t kBlockRows = 8;  // short rows are taken as many at a time, or a multiple

// What the gradients of up to kMaxRows consecutive rows are made of.
template <class Real> struct RowCoefficients {
  alignas(LL_BYTES) Real unit[kMaxRows];  // a exp(-(lse - base - power ln2)), or that without `a` when b is not 0
  Real power[kMaxRows], base[kMaxRows], at_target[kMaxRows];        // at_target: a p_t + c + b p_t (z_t - lse)
  Real top[kMaxRows], log_sum[kMaxRows], a[kMaxRows], b[kMaxRows];  // with kGap alone
  Real e[kMaxRows], f[kMaxRows];                                    // with kTargets, kConstant alone
  bool read[kMaxRows], plain[kMaxRows];                             // plain: base is 0, and unit a factor for RowExp
};

template <class T, int Flags> struct Job {
  using Real = Compute<T>;
  using V = Vec<Real>;
  static constexpr int L = kLanes<Real>;
  const RowGradArgs& args;
  bool streaming;

  int64_t offset(int64_t r, int64_t outer, int64_t inner) const {
    if (args.tile.inner == 1) return r * outer;  // a division costs as much as a vector of exponentials
    return r / args.tile.inner * outer + r % args.tile.inner * inner;
  }
  const T* row(int64_t r) const {
    return static_cast<const T*>(args.logits) + offset(r, args.tile.outer_stride, args.tile.inner_stride);
  }
  T* grad_row(int64_t r) const {
    return static_cast<T*>(args.grad) + offset(r, args.grad_strides.outer, args.grad_strides.inner);
  }
  const T* dense_row(int64_t r) const {
    return (Flags & kTargets) ? static_cast<const T*>(args.dense_target) +
                                    offset(r, args.dense_strides.outer, args.dense_strides.inner)
                              : nullptr;
  }
  const Real* class_weight() const { return static_cast<const Real*>(args.class_weight); }
  bool ignored(int64_t r) const { return args.target && args.target[r] == args.ignore_index; }
  bool has_target(int64_t r) const { return args.target && args.target[r] >= 0 && args.target[r] < args.tile.classes; }

  static LL_INLINE double one_or(const void* p, int64_t k) {
    return p ? static_cast<double>(static_cast<const Real*>(p)[k]) : 1.0;
  }

  // What RowGradArgs calls a and c (in double), b, e and f, of rows [first, first + count).
  void scales(int64_t first, int64_t count, double* a, double* c, RowCoefficients<Real>& rows) const {
    const auto set = [&](int64_t i) {
      const int64_t r = first + i;
      const double g = one_or(args.upstream, r * args.upstream_stride);
      const double weight = args.index_weight && has_target(r) ? one_or(args.class_weight, args.target[r]) : 1.0;
      a[i] = g * (args.a_scale * one_or(args.a, r) * weight + args.a_extra);
      c[i] = g * args.c_scale * one_or(args.c, r) * weight;
      if constexpr ((Flags & kGap) != 0) rows.b[i] = static_cast<Real>(g * args.b_scale * one_or(args.b, r));
      if constexpr ((Flags & kTargets) != 0) rows.e[i] = static_cast<Real>(g * args.e_scale * one_or(args.e, r));
      if constexpr ((Flags & kConstant) != 0) rows.f[i] = static_cast<Real>(g * args.f_scale * one_or(args.f, r));
    };
    const bool same =
        args.upstream_stride == 0 && !args.index_weight && !args.a && !args.b && !args.c && !args.e && !args.f;
    for (int64_t i = 0; i < (same ? 1 : count); ++i) set(i);
    for (int64_t i = 1; same && i < count; ++i) {
      a[i] = a[0], c[i] = c[0];
      if constexpr ((Flags & kGap) != 0) rows.b[i] = rows.b[0];
      if constexpr ((Flags & kTargets) != 0) rows.e[i] = rows.e[0];
      if constexpr ((Flags & kConstant) != 0) rows.f[i] = rows.f[0];
    }
  }

  // Rows [first, first + count), but for what depends on the logit of the target.
  struct Prepared {
    alignas(LL_BYTES) double a[kMaxRows], c[kMaxRows], max[kMaxRows], log_sum[kMaxRows];
  };
  void prepare(int64_t first, int64_t count, RowCoefficients<Real>& rows, Prepared& given) const {
    constexpr int D = kLanes<double>;
    scales(first, count, given.a, given.c, rows);
    Real tops[kMaxRows];
    memcpy(tops, static_cast<const Real*>(args.row_max) + first, static_cast<size_t>(count) * sizeof(Real));
    memcpy(given.log_sum, args.log_sum + first, static_cast<size_t>(count) * sizeof(double));
    for (int64_t i = 0; i < count; ++i) rows.read[i] = !ignored(first + i);
    for (int64_t i = 0; i < count; i += D) {
      const Vec<double> top = load_wide(tops + i), sum = load(given.log_sum + i), scale = load(given.a + i);
      store(given.max + i, top);
      const auto huge = !(magnitude<double>(top) <= kHuge);
      const Vec<double> lse = huge ? Vec<double>{} : top + sum, power = whole_power<double>(lse);
      const Vec<double> exponent =
          ((huge ? Vec<double>{} : top - power * 0x1.62e42feep-1) - power * 0x1.a39ef35793c76p-33) + sum;
      constexpr double drift = kRowDrift<Real> * kLog2e;
      const Vec<double> unit = exp<double>(drift * lse - exponent);
      if constexpr ((Flags & kGap) != 0) {
        store_narrow(rows.top + i, top);
        store_narrow(rows.log_sum + i, sum);
        store_narrow(rows.a + i, scale);
      }
      store_narrow(rows.unit + i, (Flags & kGap) ? unit : unit * scale);
      store_narrow(rows.power + i, power);
      store_narrow(rows.base + i, huge ? top : Vec<double>{});
    }
    for (int64_t i = 0; i < count; ++i) {
      const double size = __builtin_fabs(static_cast<double>(rows.unit[i]));
      rows.plain[i] = rows.base[i] == 0 && (size == 0 || (size >= 0x1p-100 && size <= 0x1p100));
    }
  }
  // What is left, of rows [from, from + count) of those.
  void aim(int64_t first, int64_t from, int64_t count, RowCoefficients<Real>& rows, const Prepared& given) const {
    constexpr int D = kLanes<double>;
    alignas(LL_BYTES) double target_logit[kMaxRows + D];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = first + from + i;
      target_logit[i] = rows.read[from + i] && has_target(r)
                            ? static_cast<double>(widen(row(r)[args.target[r] * args.tile.class_stride]))
                            : 0.0;
    }
    for (int64_t i = 0; i < count; i += D) {
      const int64_t at = from + i;
      const Vec<double> top = load(given.max + at), sum = load(given.log_sum + at), scale = load(given.a + at),
                        constant = load(given.c + at);
      const Vec<double> gap = (load(target_logit + i) - top) - sum, both = scale + constant;
      // a p + c, where c = -a must not cancel and c = 0 must not be drowned.
      Vec<double> aimed = scale * expm1(gap) + both;
      const Vec<double> half = 0.5 * magnitude<double>(scale);
      if ((Flags & kGap) || greater_bits(half, magnitude<double>(both)) != kAllBits<double>) {
        const Vec<double> p = exp<double>(gap);
        aimed = magnitude<double>(both) < half ? aimed : scale * p + constant;
        if constexpr ((Flags & kGap) != 0) {
          Vec<double> bend;
          for (int k = 0; k < D; ++k) bend[k] = static_cast<double>(rows.b[at + k]);
          aimed += gap == -__builtin_inf() ? Vec<double>{} : p * bend * gap;
        }
      }
      store_narrow(rows.at_target + at, aimed);
    }
  }
  void prepare(int64_t first, int64_t count, RowCoefficients<Real>& rows) const {
    Prepared given;
    prepare(first, count, rows, given);
    aim(first, 0, count, rows, given);
  }

  // Coefficients in lanes: all of one row, or one row a lane.
  struct Lanes {
    V unit, power, base, top, log_sum, a, b, e, f;
  };
  // get(array) gives a vector of an array of the coefficients.
  template <class Get> static LL_INLINE Lanes lanes_of(const RowCoefficients<Real>& rows, const Get& get) {
    Lanes c;
    c.unit = get(rows.unit), c.power = get(rows.power), c.base = get(rows.base);
    if constexpr ((Flags & kGap) != 0)
      c.top = get(rows.top), c.log_sum = get(rows.log_sum), c.a = get(rows.a), c.b = get(rows.b);
    if constexpr ((Flags & kTargets) != 0) c.e = get(rows.e);
    if constexpr ((Flags & kConstant) != 0) c.f = get(rows.f);
    return c;
  }
  template <bool kHugeRow> static LL_INLINE V value(const Lanes& c, V z, V w, V t) {
    const V least = maximum<Real>(splat<Real>(static_cast<Real>(-2 * kHuge)), kHugeRow ? z - c.base : z);
    const Exponential<Real> x = split_row_exp<Real>(least);
    return value_of(c, scale_by_power(x.fraction * c.unit, x.power - c.power), z, w, t);
  }
  // From exp(z) in the row's unit.
  static LL_INLINE V value_of(const Lanes& c, V out, V z, V w, V t) {
    if constexpr ((Flags & kGap) != 0)
      out = out * (c.a + c.b * maximum<Real>(splat<Real>(Real(-1e30)), (z - c.top) - c.log_sum));
    if constexpr ((Flags & kTargets) != 0) out = out + c.e * (t * w);
    if constexpr ((Flags & kConstant) != 0) out = out + c.f * w;
    return out;
  }

  // n contiguous elements of one row. `streamed` output, not of 16-bit types, bypasses the caches.
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
      constexpr int64_t kAlign = LL_BYTES;
      int64_t head = static_cast<int64_t>((kAlign - reinterpret_cast<uintptr_t>(out) % kAlign) % kAlign / sizeof(T));
      if (head > n) head = n;
      if (i < head) store_partial(out + i, at(i, head - i), head - i), i = head;
      for (; i + L <= n; i += L) stream(out + i, at(i, L));
    } else {
      if constexpr (kPlainRow && (Flags & (kConstant | kTargets)) == 0) {
        for (; i + 2 * L <= n; i += 2 * L) {
          V a, b;
          load_pair(z + i, a, b);
          store_pair(out + i, value_of(c, exp(a), a, V{}, V{}), value_of(c, exp(b), b, V{}, V{}));
        }
      }
      for (; i + L <= n; i += L) store(out + i, at(i, L));
    }
    if (i < n) store_partial(out + i, at(i, n - i), n - i);
  }

  // Classes [begin, end) of row r, the i-th of `rows`, into `out`, which stands for class `begin`; not `aimed`: but for
  // that of the target.
  LL_INLINE void contiguous(int64_t r, const RowCoefficients<Real>& rows, int64_t i, int64_t begin, int64_t end, T* out,
                            bool streamed, bool aimed) const {
    const int64_t n = end - begin;
    if (!rows.read[i]) {
      memset(out, 0, static_cast<size_t>(n) * sizeof(T));
      return;
    }
    const Real* w = class_weight() ? class_weight() + begin : nullptr;
    const T* t = (Flags & kTargets) ? dense_row(r) + begin : nullptr;
    if (rows.plain[i])
      row_values<true>(rows, i, row(r) + begin, w, t, out, n, streamed);
    else
      row_values<false>(rows, i, row(r) + begin, w, t, out, n, streamed);
    if (aimed && has_target(r) && args.target[r] >= begin && args.target[r] < end)
      out[args.target[r] - begin] = target_value(r, rows, i);
  }
  // The same of many classes; `streamed`: past the caches.
  __attribute__((noinline)) void long_part(int64_t r, const RowCoefficients<Real>& rows, int64_t i, int64_t begin,
                                           int64_t end, T* out, bool streamed) const {
    alignas(LL_BYTES) T buffer[kBufferBytes / sizeof(T)];
    const bool buffered = streamed && sizeof(T) == 2;
    const int64_t part = buffered ? kBufferBytes / static_cast<int64_t>(sizeof(T)) : end - begin;
    for (int64_t first = begin; first < end; first += part) {
      const int64_t last = first + part < end ? first + part : end;
      T* const to = out + (first - begin);
      contiguous(r, rows, i, first, last, buffered ? buffer : to, streamed && !buffered, true);
      if (buffered) stream_copy(to, buffer, last - first);
    }
  }

  T target_value(int64_t r, const RowCoefficients<Real>& rows, int64_t i) const {
    double v = rows.at_target[i];
    const int64_t j = args.target[r];
    const double w = class_weight() ? static_cast<double>(class_weight()[j]) : 1.0;
    if constexpr ((Flags & kTargets) != 0)
      v +=
          static_cast<double>(rows.e[i]) * static_cast<double>(widen(dense_row(r)[j * args.dense_strides.classes])) * w;
    if constexpr ((Flags & kConstant) != 0) v += static_cast<double>(rows.f[i]) * w;
    return narrow<T>(v);
  }

  __attribute__((noinline)) void gathered(int64_t r, const RowCoefficients<Real>& rows, int64_t of, int64_t begin,
                                          int64_t end) const {
    alignas(LL_BYTES) T zs[kGather], out[kGather], ts[(Flags & kTargets) ? kGather : 1];
    T* grad = grad_row(r);
    for (int64_t i = begin; i < end; i += kGather) {
      const int64_t n = end - i < kGather ? end - i : kGather;
      if (rows.read[of]) {
        for (int64_t j = 0; j < n; ++j) zs[j] = row(r)[(i + j) * args.tile.class_stride];
        if constexpr ((Flags & kTargets) != 0)
          for (int64_t j = 0; j < n; ++j) ts[j] = dense_row(r)[(i + j) * args.dense_strides.classes];
        const Real* w = class_weight() ? class_weight() + i : nullptr;
        if (rows.plain[of])
          row_values<true>(rows, of, zs, w, ts, out, n, false);
        else
          row_values<false>(rows, of, zs, w, ts, out, n, false);
        if (has_target(r) && args.target[r] >= i && args.target[r] < i + n)
          out[args.target[r] - i] = target_value(r, rows, of);
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

  void long_rows() const {
    const int64_t part = kItemBytes / sizeof(T), parts = (args.tile.classes + part - 1) / part,
                  rows = args.tile.outer * args.tile.inner;
    parallel_for(rows * parts, args.threads, bytes(), [&](int64_t item) {
      const int64_t r = item / parts, begin = item % parts * part,
                    end = begin + part < args.tile.classes ? begin + part : args.tile.classes;
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
    const int64_t rows = args.tile.outer * args.tile.inner,
                  row_bytes = args.tile.classes * static_cast<int64_t>(sizeof(T));
    int64_t per_item = item_bytes(bytes(), kItemBytes) / row_bytes;
    per_item = per_item < 1 ? 1 : per_item > 8 * kMaxRows ? 8 * kMaxRows : per_item;
    const int64_t classes = args.tile.classes, fitting = kBufferBytes / row_bytes / kBlockRows * kBlockRows;
    const int64_t block = fitting < kBlockRows ? kBlockRows : fitting > kMaxRows ? kMaxRows : fitting;
    parallel_for((rows + per_item - 1) / per_item, args.threads, bytes(), [&](int64_t item) {
      const int64_t end = (item + 1) * per_item < rows ? (item + 1) * per_item : rows;
      RowCoefficients<Real> c;
      Prepared given;
      for (int64_t first = item * per_item; first < end; first += kMaxRows) {
        const int64_t count = end - first < kMaxRows ? end - first : kMaxRows;
        prepare(first, count, c, given);
        if (is_contiguous() && classes <= kShortClasses) {
          for (int64_t i = 0; i < count; i += block)
            block_of_rows(first, i, count - i < block ? count - i : block, c, given);
          continue;
        }
        aim(first, 0, count, c, given);
        for (int64_t i = 0; i < count; ++i) {
          if (is_contiguous())
            long_part(first + i, c, i, 0, classes, grad_row(first + i), streaming);
          else
            gathered(first + i, c, i, 0, classes);
        }
      }
      if (streaming) fence();
    });
  }

  // Short rows first + [from, from + count). Their target's logits are read when the rows are in the cache.
  LL_INLINE void block_of_rows(int64_t first, int64_t from, int64_t count, RowCoefficients<Real>& rows,
                               const Prepared& given) const {
    const int64_t classes = args.tile.classes, ahead = rows_ahead(classes * static_cast<int64_t>(sizeof(T))) * classes;
    alignas(LL_BYTES) T buffer[kBlockRows * kShortClasses];
    T* const grad = grad_row(first + from);
    const bool buffered = streaming && args.tile.inner == 1 && args.grad_strides.outer == classes;
    const bool in_place = args.grad == args.logits;
    const auto out = [&](int64_t i) { return buffered ? buffer + i * classes : grad_row(first + from + i); };
    if (in_place) aim(first, from, count, rows, given);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = first + from + i;
      for (int64_t j = 0; j < classes; j += kCacheLine / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(row(r) + ahead + j);
      contiguous(r, rows, from + i, 0, classes, out(i), false, false);
    }
    if (!in_place) aim(first, from, count, rows, given);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = first + from + i;
      if (rows.read[from + i] && has_target(r)) out(i)[args.target[r]] = target_value(r, rows, from + i);
    }
    if (buffered) stream_copy(grad, buffer, count * classes);
  }

  static constexpr int kTileVectors = static_cast<int>(kMaxRows) / L < 8 ? static_cast<int>(kMaxRows) / L : 8;
  static constexpr int64_t kWidth = kTileVectors * L;

  // Inner stride 1: one row a lane.
  void by_lanes() const {
    const int64_t tiles = (args.tile.inner + kWidth - 1) / kWidth;
    parallel_for(args.tile.outer * tiles, args.threads, bytes(), [&](int64_t item) {
      const int64_t inner = item % tiles * kWidth, first = item / tiles * args.tile.inner + inner;
      const int64_t width = args.tile.inner - inner < kWidth ? args.tile.inner - inner : kWidth;
      RowCoefficients<Real> rows;
      prepare(first, width, rows);
      lane_tile(first, width, rows, 0, 0, args.tile.classes);
    });
  }

  // Few rows of many classes in lanes, as a tile of a linear head's logits is: an item is a stretch of classes that
  // fits a core's cache with all its rows.
  void by_lane_parts() const {
    const int64_t row_bytes = args.tile.inner * static_cast<int64_t>(sizeof(T));
    const int64_t per_item = kItemBytes * 2 / row_bytes + 1, parts = (args.tile.classes + per_item - 1) / per_item;
    // Blocks of kMaxRows rows of one outer index each.
    const int64_t blocks = (args.tile.inner + kMaxRows - 1) / kMaxRows,
                  size = args.tile.outer * blocks * static_cast<int64_t>(sizeof(RowCoefficients<Real>));
    auto* const all = static_cast<RowCoefficients<Real>*>(aligned_alloc(LL_BYTES, static_cast<size_t>(size)));
    if (!all) return by_lanes();
    for (int64_t block = 0; block < args.tile.outer * blocks; ++block) {
      const int64_t inner = block % blocks * kMaxRows, left = args.tile.inner - inner;
      prepare(block / blocks * args.tile.inner + inner, left < kMaxRows ? left : kMaxRows, all[block]);
    }
    parallel_for(args.tile.outer * parts, args.threads, bytes(), [&](int64_t item) {
      const int64_t outer = item / parts, begin = item % parts * per_item;
      const int64_t end = begin + per_item < args.tile.classes ? begin + per_item : args.tile.classes;
      for (int64_t inner = 0; inner < args.tile.inner; inner += kWidth) {
        const int64_t first = outer * args.tile.inner + inner;
        lane_tile(first, args.tile.inner - inner < kWidth ? args.tile.inner - inner : kWidth,
                  all[outer * blocks + inner / kMaxRows], inner % kMaxRows, begin, end);
      }
    });
    __builtin_free(all);
  }

  // Classes [begin, end) of the `width` rows from `first` on, which `rows` has from `at` on.
  void lane_tile(int64_t first, int64_t width, const RowCoefficients<Real>& rows, int64_t at, int64_t begin,
                 int64_t end) const {
    Lanes lanes[kTileVectors];
    IntVec<Real> keep[kTileVectors] = {};
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
    // K classes of one vector of rows, whose coefficients stay in registers.
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
          v[k] = kept ? value<decltype(is_huge)::value>(c, get(z + (j + k) * args.tile.class_stride + i), ws, ts) : V{};
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
    for (int64_t i = 0; i < width; ++i) {
      const int64_t r = first + i;
      if (rows.read[at + i] && has_target(r) && args.target[r] >= begin && args.target[r] < end)
        out[args.target[r] * args.grad_strides.classes + i] = target_value(r, rows, at + i);
    }
  }

  int64_t bytes() const {
    return args.tile.outer * args.tile.inner * args.tile.classes * static_cast<int64_t>(sizeof(T));
  }

  void run() const {
    if (bytes() == 0) return;
    const bool lanes = args.tile.class_stride != 1 && args.tile.inner_stride == 1 && args.grad_strides.inner == 1 &&
                       args.tile.inner >= L / 2 && (!(Flags & kTargets) || args.dense_strides.inner == 1);
    const bool few_rows = args.tile.outer * args.tile.inner <= kLanePartRows && args.tile.classes > kLaneClasses;
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

template <class T, int Flags> void run(const RowGradArgs& a) {
  Job<T, Flags> job{a, false};
  job.streaming = job.bytes() >= kStreamBytes && a.grad != a.logits;
  job.run();
}

template <class T> void pick(const RowGradArgs& a) {
  const int flags = (a.b_scale != 0 ? kGap : 0) | (a.f_scale != 0 ? kConstant : 0) | (a.e_scale != 0 ? kTargets : 0);
  switch (flags) {
    case 0: return run<T, 0>(a);
    case kGap: return run<T, kGap>(a);
    case kConstant: return run<T, kConstant>(a);
    case kTargets: return run<T, kTargets>(a);
    case kTargets | kConstant: return run<T, kTargets | kConstant>(a);
    default: return run<T, kGap | kConstant | kTargets>(a);  // module.cpp refuses b or e without what they need
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
