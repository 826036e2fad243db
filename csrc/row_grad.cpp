// row_grad: the gradient of everything row_stats gives, in one read of the logits and one write of the gradient.
//
// Precision policy: p = exp(z) / exp(lse) with both in units of 2^power and the divisor rounded once, so p is within 2
// ulp (of double logits: within an ulp for each e-fold of 1/p, which log_sum's own rounding costs); p * a + e t + f w is
// formed before any rounding to the storage type. At the target, a p_t + c is computed in double, and where c is about
// -a as a expm1(z_t - lse) + (a + c), so that nothing cancels.
#include "parallel.h"
#include "vmath.h"

namespace logitless::LL_ISA {
namespace {

enum GradFlags { kGap = 1, kConstant = 2, kTargets = 4 };  // b; f; e

inline constexpr int64_t kMaxRows = 128;             // rows whose coefficients are prepared together
inline constexpr int64_t kItemBytes = 128 * 1024;    // logits of one parallel item
inline constexpr int64_t kGather = 2048;             // elements of a strided row copied at a time
inline constexpr int64_t kLaneClasses = 8192;        // rows in lanes of more classes are cut ...
inline constexpr int64_t kLanePartRows = 4096;       // ... when they are no more than this
inline constexpr int64_t kStreamBytes = 64 << 20;    // a larger float32 or float64 gradient bypasses the caches ...
inline constexpr int64_t kStreamRow = 4096;          // ... where its rows have this many bytes; for 16-bit types it is slower, measured

template <class Real> struct RowCoefficients {
  double a, c, max, log_sum;
  Real unit;   // a exp(-(lse - base - power ln2)), or that without `a` when b is not 0
  Real power, base, top, log_sum_real, plain_a, b, e, f;
  Real at_target;  // a p_t + c + b p_t (z_t - lse)
  bool read;
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
  const T* row(int64_t r) const { return static_cast<const T*>(args.logits) + offset(r, args.tile.outer_stride, args.tile.inner_stride); }
  T* grad_row(int64_t r) const { return static_cast<T*>(args.grad) + offset(r, args.grad_strides.outer, args.grad_strides.inner); }
  const T* dense_row(int64_t r) const {
    return (Flags & kTargets) ? static_cast<const T*>(args.dense_target) + offset(r, args.dense_strides.outer, args.dense_strides.inner) : nullptr;
  }
  const Real* class_weight() const { return static_cast<const Real*>(args.class_weight); }
  bool ignored(int64_t r) const { return args.target && args.target[r] == args.ignore_index; }
  bool has_target(int64_t r) const { return args.target && args.target[r] >= 0 && args.target[r] < args.tile.classes; }

  // Rows [first, first + count).
  void prepare(int64_t first, int64_t count, RowCoefficients<Real>* rows) const {
    constexpr int D = kLanes<double>;
    alignas(LL_BYTES) double exponent[kMaxRows], gap[kMaxRows], unit[kMaxRows], shrink[kMaxRows], at_target[kMaxRows];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = first + i;
      RowCoefficients<Real>& row_i = rows[i];
      row_i.read = !ignored(r);
      if (!row_i.read) { exponent[i] = gap[i] = 0; continue; }
      const auto real = [](const void* p, int64_t k) { return p ? static_cast<double>(static_cast<const Real*>(p)[k]) : 1.0; };
      const bool aimed = has_target(r);
      const double g = real(args.upstream, r * args.upstream_stride);
      const double weight = args.index_weight && aimed ? real(args.class_weight, args.target[r]) : 1.0;
      row_i.a = g * (args.a_scale * real(args.a, r) * weight + args.a_extra);
      row_i.c = g * args.c_scale * real(args.c, r) * weight;
      row_i.b = static_cast<Real>(g * args.b_scale * real(args.b, r));
      row_i.e = static_cast<Real>(g * args.e_scale * real(args.e, r));
      row_i.f = static_cast<Real>(g * args.f_scale * real(args.f, r));
      row_i.max = static_cast<const Real*>(args.row_max)[r];
      row_i.log_sum = args.log_sum[r];
      const bool huge = !(__builtin_fabs(row_i.max) <= kHuge);
      row_i.base = static_cast<Real>(huge ? row_i.max : 0.0);
      const double power = huge ? 0.0 : __builtin_rint(row_i.max * 1.4426950408889634);
      row_i.power = static_cast<Real>(power);
      row_i.top = static_cast<Real>(row_i.max);
      row_i.log_sum_real = static_cast<Real>(row_i.log_sum);
      row_i.plain_a = static_cast<Real>(row_i.a);
      exponent[i] = ((huge ? 0.0 : row_i.max - power * 0x1.62e42feep-1) - power * 0x1.a39ef35793c76p-33) + row_i.log_sum;
      gap[i] = aimed ? (static_cast<double>(widen(row(r)[args.target[r] * args.tile.class_stride])) - row_i.max) - row_i.log_sum : 0.0;
    }
    for (int64_t i = 0; i < count; i += D) {
      store(unit + i, exp<double>(-load(exponent + i)));
      store(shrink + i, expm1(load(gap + i)));
      store(at_target + i, exp<double>(load(gap + i)));
    }
    for (int64_t i = 0; i < count; ++i) {
      if (!rows[i].read) continue;
      rows[i].unit = static_cast<Real>((Flags & kGap) ? unit[i] : unit[i] * rows[i].a);
      const double a = rows[i].a, c = rows[i].c, sum = a + c, p = at_target[i];
      // a p + c, where c = -a must not cancel and c = 0 must not be drowned.
      const double aimed = __builtin_fabs(sum) < 0.5 * __builtin_fabs(a) ? a * shrink[i] + sum : a * p + c;
      const double bent = gap[i] == -__builtin_inf() ? 0.0 : p * static_cast<double>(rows[i].b) * gap[i];
      rows[i].at_target = static_cast<Real>(aimed + ((Flags & kGap) ? bent : 0.0));
    }
  }

  // Coefficients in lanes: all of one row, or one row a lane.
  struct Lanes { V unit, power, base, top, log_sum, a, b, e, f; };
  static LL_INLINE Lanes same(const RowCoefficients<Real>& r) {
    return {splat<Real>(r.unit), splat<Real>(r.power), splat<Real>(r.base), splat<Real>(r.top), splat<Real>(r.log_sum_real),
            splat<Real>(r.plain_a), splat<Real>(r.b), splat<Real>(r.e), splat<Real>(r.f)};
  }
  template <bool kHugeRow> static LL_INLINE V value(const Lanes& c, V z, V w, V t) {
    const V lowest = splat<Real>(static_cast<Real>(-2 * kHuge));
    const Exponential<Real> x = split_exp(maximum<Real>(lowest, kHugeRow ? z - c.base : z));
    V out = scale_by_power(x.fraction * c.unit, x.power - c.power);
    if constexpr ((Flags & kGap) != 0) out = out * (c.a + c.b * maximum<Real>(splat<Real>(Real(-1e30)), (z - c.top) - c.log_sum));
    if constexpr ((Flags & kTargets) != 0) out = out + c.e * (t * w);
    if constexpr ((Flags & kConstant) != 0) out = out + c.f * w;
    return out;
  }

  // n contiguous elements of one row. `streamed` output is aligned from `head` elements on.
  template <bool kHugeRow> void row_values(const RowCoefficients<Real>& row_c, const T* z, const Real* w, const T* t, T* out, int64_t n, bool streamed) const {
    const Lanes c = same(row_c);
    const auto at = [&](int64_t i, int64_t valid) __attribute__((always_inline)) {
      const bool whole = valid >= L;
      const V zs = whole ? load(z + i) : load_partial(z + i, valid, Real(0));
      V ws = splat<Real>(1), ts{};
      if constexpr ((Flags & (kConstant | kTargets)) != 0)
        if (w) ws = whole ? load(w + i) : load_partial(w + i, valid, Real(0));
      if constexpr ((Flags & kTargets) != 0) ts = whole ? load(t + i) : load_partial(t + i, valid, Real(0));
      return value<kHugeRow>(c, zs, ws, ts);
    };
    int64_t i = 0;
    if (sizeof(T) >= 4 && streamed) {
      constexpr int64_t kAlign = LL_BYTES;
      int64_t head = static_cast<int64_t>((kAlign - reinterpret_cast<uintptr_t>(out) % kAlign) % kAlign / sizeof(T));
      if (head > n) head = n;
      if (i < head) store_partial(out + i, at(i, head - i), head - i), i = head;
      for (; i + L <= n; i += L) stream(out + i, at(i, L));
    } else {
      for (; i + L <= n; i += L) store(out + i, at(i, L));
    }
    if (i < n) store_partial(out + i, at(i, n - i), n - i);
  }

  // Classes [begin, end) of row r into `out`, which stands for class `begin`.
  void contiguous(int64_t r, const RowCoefficients<Real>& c, int64_t begin, int64_t end, T* out, bool streamed) const {
    const int64_t n = end - begin;
    if (!c.read) { memset(out, 0, static_cast<size_t>(n) * sizeof(T)); return; }
    const Real* w = class_weight() ? class_weight() + begin : nullptr;
    const T* t = (Flags & kTargets) ? dense_row(r) + begin : nullptr;
    if (c.base == 0) row_values<false>(c, row(r) + begin, w, t, out, n, streamed);
    else row_values<true>(c, row(r) + begin, w, t, out, n, streamed);
    if (has_target(r) && args.target[r] >= begin && args.target[r] < end) out[args.target[r] - begin] = target_value(r, c);
  }

  T target_value(int64_t r, const RowCoefficients<Real>& c) const {
    double v = c.at_target;
    const int64_t j = args.target[r];
    const double w = class_weight() ? static_cast<double>(class_weight()[j]) : 1.0;
    if constexpr ((Flags & kTargets) != 0) v += static_cast<double>(c.e) * static_cast<double>(widen(dense_row(r)[j * args.dense_strides.classes])) * w;
    if constexpr ((Flags & kConstant) != 0) v += static_cast<double>(c.f) * w;
    return narrow<T>(v);
  }

  void gathered(int64_t r, const RowCoefficients<Real>& c, int64_t begin, int64_t end) const {
    alignas(LL_BYTES) T zs[kGather], out[kGather], ts[(Flags & kTargets) ? kGather : 1];
    T* grad = grad_row(r);
    for (int64_t i = begin; i < end; i += kGather) {
      const int64_t n = end - i < kGather ? end - i : kGather;
      if (c.read) {
        for (int64_t j = 0; j < n; ++j) zs[j] = row(r)[(i + j) * args.tile.class_stride];
        if constexpr ((Flags & kTargets) != 0)
          for (int64_t j = 0; j < n; ++j) ts[j] = dense_row(r)[(i + j) * args.dense_strides.classes];
        const Real* w = class_weight() ? class_weight() + i : nullptr;
        if (c.base == 0) row_values<false>(c, zs, w, ts, out, n, false);
        else row_values<true>(c, zs, w, ts, out, n, false);
        if (has_target(r) && args.target[r] >= i && args.target[r] < i + n) out[args.target[r] - i] = target_value(r, c);
      } else {
        memset(out, 0, sizeof out);
      }
      for (int64_t j = 0; j < n; ++j) grad[(i + j) * args.grad_strides.classes] = out[j];
    }
  }

  bool is_contiguous() const {
    return args.tile.class_stride == 1 && args.grad_strides.classes == 1 && (!(Flags & kTargets) || args.dense_strides.classes == 1);
  }

  void long_rows() const {
    const int64_t part = kItemBytes / sizeof(T), parts = (args.tile.classes + part - 1) / part, rows = args.tile.outer * args.tile.inner;
    parallel_for(rows * parts, args.threads, bytes(), [&](int64_t item) {
      const int64_t r = item / parts, begin = item % parts * part, end = begin + part < args.tile.classes ? begin + part : args.tile.classes;
      RowCoefficients<Real> c;
      prepare(r, 1, &c);
      if (is_contiguous()) contiguous(r, c, begin, end, grad_row(r) + begin, streaming);
      else gathered(r, c, begin, end);
      if (streaming) fence();
    });
  }

  void short_rows() const {
    const int64_t rows = args.tile.outer * args.tile.inner, row_bytes = args.tile.classes * static_cast<int64_t>(sizeof(T));
    int64_t per_item = kItemBytes / (row_bytes ? row_bytes : 1);
    per_item = per_item < 1 ? 1 : per_item > 8 * kMaxRows ? 8 * kMaxRows : per_item;
    parallel_for((rows + per_item - 1) / per_item, args.threads, bytes(), [&](int64_t item) {
      const int64_t end = (item + 1) * per_item < rows ? (item + 1) * per_item : rows;
      RowCoefficients<Real> c[kMaxRows];
      for (int64_t first = item * per_item; first < end; first += kMaxRows) {
        const int64_t count = end - first < kMaxRows ? end - first : kMaxRows;
        prepare(first, count, c);
        for (int64_t i = 0; i < count; ++i) {
          if (is_contiguous()) contiguous(first + i, c[i], 0, args.tile.classes, grad_row(first + i), streaming);
          else gathered(first + i, c[i], 0, args.tile.classes);
        }
      }
      if (streaming) fence();
    });
  }

  static constexpr int kTileVectors = static_cast<int>(kMaxRows) / L < 8 ? static_cast<int>(kMaxRows) / L : 8;
  static constexpr int64_t kWidth = kTileVectors * L;

  // Inner stride 1: one row a lane.
  void by_lanes() const {
    const int64_t tiles = (args.tile.inner + kWidth - 1) / kWidth;
    parallel_for(args.tile.outer * tiles, args.threads, bytes(), [&](int64_t item) {
      const int64_t inner = item % tiles * kWidth, first = item / tiles * args.tile.inner + inner;
      const int64_t width = args.tile.inner - inner < kWidth ? args.tile.inner - inner : kWidth;
      RowCoefficients<Real> rows[kMaxRows];
      prepare(first, width, rows);
      lane_tile(first, width, rows, 0, args.tile.classes);
    });
  }

  // Few rows of many classes in lanes, as a tile of a linear head's logits is: an item is a stretch of classes that fits
  // a core's cache with all its rows.
  void by_lane_parts() const {
    const int64_t rows = args.tile.outer * args.tile.inner, row_bytes = args.tile.inner * static_cast<int64_t>(sizeof(T));
    const int64_t per_item = kItemBytes * 2 / row_bytes + 1, parts = (args.tile.classes + per_item - 1) / per_item;
    auto* const all = static_cast<RowCoefficients<Real>*>(__builtin_malloc(static_cast<size_t>(rows) * sizeof(RowCoefficients<Real>)));
    if (!all) return by_lanes();
    for (int64_t first = 0; first < rows; first += kMaxRows) prepare(first, rows - first < kMaxRows ? rows - first : kMaxRows, all + first);
    parallel_for(args.tile.outer * parts, args.threads, bytes(), [&](int64_t item) {
      const int64_t outer = item / parts, begin = item % parts * per_item;
      const int64_t end = begin + per_item < args.tile.classes ? begin + per_item : args.tile.classes;
      for (int64_t inner = 0; inner < args.tile.inner; inner += kWidth) {
        const int64_t first = outer * args.tile.inner + inner;
        lane_tile(first, args.tile.inner - inner < kWidth ? args.tile.inner - inner : kWidth, all + first, begin, end);
      }
    });
    __builtin_free(all);
  }

  // Classes [begin, end) of the `width` rows from `first` on.
  void lane_tile(int64_t first, int64_t width, const RowCoefficients<Real>* rows, int64_t begin, int64_t end) const {
    Lanes lanes[kTileVectors] = {};
    IntVec<Real> keep[kTileVectors] = {};
    bool huge = false;
    for (int64_t i = 0; i < width; ++i) {
      const RowCoefficients<Real>& c = rows[i];
      if (!c.read) continue;
      Lanes& to = lanes[i / L];
      const int64_t k = i % L;
      to.unit[k] = c.unit, to.power[k] = c.power, to.base[k] = c.base, to.top[k] = c.top, to.log_sum[k] = c.log_sum_real;
      to.a[k] = c.plain_a, to.b[k] = c.b, to.e[k] = c.e, to.f[k] = c.f, keep[i / L][k] = -1;
      huge = huge || c.base != 0;
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
        const auto get = [&](const T* p) __attribute__((always_inline)) { return valid >= L ? load(p) : load_partial(p, valid, Real(0)); };
        const Lanes c = lanes[i / L];
        const IntVec<Real> kept = keep[i / L];
        V v[K];
        for (int k = 0; k < K; ++k) {
          const V ws = splat<Real>(w ? w[j + k] : Real(1));
          V ts{};
          if constexpr ((Flags & kTargets) != 0) ts = get(t + (j + k) * args.dense_strides.classes + i);
          v[k] = kept ? value<decltype(is_huge)::value>(c, get(z + (j + k) * args.tile.class_stride + i), ws, ts) : V{};
        }
        for (int k = 0; k < K; ++k) {
          T* p = out + (j + k) * args.grad_strides.classes + i;
          if (valid >= L) store(p, v[k]); else store_partial(p, v[k], valid);
        }
      }
    };
    const auto all = [&](auto is_huge) __attribute__((always_inline)) {
      int64_t j = begin;
      for (; j + 4 <= end; j += 4) classes(is_huge, Constant<4>{}, j);
      for (; j < end; ++j) classes(is_huge, Constant<1>{}, j);
    };
    if (huge) all(Constant<true>{}); else all(Constant<false>{});
    for (int64_t i = 0; i < width; ++i) {
      const int64_t r = first + i;
      if (rows[i].read && has_target(r) && args.target[r] >= begin && args.target[r] < end)
        out[args.target[r] * args.grad_strides.classes + i] = target_value(r, rows[i]);
    }
  }

  int64_t bytes() const { return args.tile.outer * args.tile.inner * args.tile.classes * static_cast<int64_t>(sizeof(T)); }

  void run() const {
    const bool lanes = args.tile.class_stride != 1 && args.tile.inner_stride == 1 && args.grad_strides.inner == 1 && args.tile.inner >= L / 2 &&
                       (!(Flags & kTargets) || args.dense_strides.inner == 1);
    const bool few_rows = args.tile.outer * args.tile.inner <= kLanePartRows && args.tile.classes > kLaneClasses;
    if (lanes && few_rows) by_lane_parts();
    else if (lanes) by_lanes();
    else if (args.tile.classes * static_cast<int64_t>(sizeof(T)) >= kItemBytes) long_rows();
    else short_rows();
  }
};

template <class T, int Flags> void run(const RowGradArgs& a) {
  Job<T, Flags> job{a, false};
  const bool large = job.bytes() >= kStreamBytes && a.tile.classes * static_cast<int64_t>(sizeof(T)) >= kStreamRow;
  job.streaming = large && sizeof(T) >= 4 && a.grad != a.logits;
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
