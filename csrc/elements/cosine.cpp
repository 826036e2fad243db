// cosine, cosine_grad: one read of both inputs; the gradient of either or both in one more read and one write.
//
// Formula, of a pair of vectors x1, x2 with norms n1, n2 (at least eps) and unit vectors u1, u2:
//   cos = x1 . x2 / (n1 n2)          d cos / dx1 = (u2 - cos u1) / n1, or u2 / n1 where n1 was raised to eps
//   embedding loss = 1 - cos for target 1, max(0, cos - margin) for target -1, with norms sqrt(sum x^2 + 1e-12)
//
// Layout: vectors of any strides (cosine.h). Consecutive elements are read as they lie; neighbouring vectors in lanes
// one element of all after the other; other strides through small copies.
//
// Precision policy: dot product and squared norms of float and half vectors are summed in double, where no square
// overflows or vanishes; of double vectors, in pairs of doubles. Where a pair's squares overflow or vanish all the same
// (NaN and infinity then end as NaN), both vectors are divided by powers of two near their largest elements first. The
// gradient is formed from unit vectors, so nothing in between leaves the range.
//
// Steps: 1. Fold each pair to its three sums. 2. Norms, cosine, and what the gradient will need (finish). 3. In the
// gradient, the coefficients of each pair (prepare). 4. Every element (values).
#include "elements/cosine.h"

#include "kernels.h"
#include "parallel.h"
#include "simd/sums.h"

namespace logitless::LL_ISA {
namespace {

inline constexpr int64_t kBatch = 64;              // rows finished together
inline constexpr int64_t kItemBytes = 128 * 1024;  // elements of x1 in one parallel item
inline constexpr int64_t kGather = 1024;           // elements of a strided row copied at a time
inline constexpr int64_t kStage = 8 * 1024;        // bytes of gradient collected before they are streamed out
inline constexpr int64_t kStreamBytes = 16 << 20;  // a gradient larger than this bypasses the caches
inline constexpr int kTileVectors = 4;             // neighbouring rows in lanes: vectors of them at a time

struct Sums {
  double dot, square1, square2;
};

// The three sums in lanes.
template <class Real> struct Accumulator;
template <> struct Accumulator<float> {
  // Each of the lower and the upper half of the lanes.
  Vec<double> dot[2] = {}, square1[2] = {}, square2[2] = {};
  LL_INLINE void add(Vec<float> x1, Vec<float> x2) {
    Vec<double> a[2], b[2];
    to_doubles(x1, a[0], a[1]);
    to_doubles(x2, b[0], b[1]);
    for (int half = 0; half < 2; ++half) {
      dot[half] += a[half] * b[half];
      square1[half] += a[half] * a[half];
      square2[half] += b[half] * b[half];
    }
  }
  LL_INLINE Sums total() const {
    return {sum_of_lanes(dot[0] + dot[1]), sum_of_lanes(square1[0] + square1[1]),
            sum_of_lanes(square2[0] + square2[1])};
  }
  LL_INLINE Sums lane(int i) const {
    constexpr int D = kLanes<double>;
    return {dot[i / D][i % D], square1[i / D][i % D], square2[i / D][i % D]};
  }
};

template <> struct Accumulator<double> {
  PairSum<double> dot, square1, square2;
  LL_INLINE void add(Vec<double> x1, Vec<double> x2) {
    dot.add(x1 * x2);
    square1.add(x1 * x1);
    square2.add(x2 * x2);
  }
  LL_INLINE Sums total() const { return {dot.total(), square1.total(), square2.total()}; }
  LL_INLINE Sums lane(int i) const {
    return {dot.high[i] + dot.low[i], square1.high[i] + square1.low[i], square2.high[i] + square2.low[i]};
  }
};

// Where row r of the vectors begins.
inline int64_t row_offset(const Rows& rows, const Vectors& v, int64_t r) {
  if (rows.dims == 1) return r * v.strides[0];
  int64_t offset = 0;
  for (int d = 0; d + 1 < rows.dims; ++d) {
    offset += r % rows.sizes[d] * v.strides[d];
    r /= rows.sizes[d];
  }
  return offset + r * v.strides[rows.dims - 1];
}
inline int64_t row_count(const Rows& rows) {
  int64_t n = 1;
  for (int d = 0; d < rows.dims; ++d) n *= rows.sizes[d];
  return n;
}

// 2^power near the largest |x|, or 1 where there is none.
template <class T> double scale_of(const T* x, int64_t step, int64_t n, double at_least) {
  double largest = at_least;
  for (int64_t i = 0; i < n; ++i) {
    const double a = __builtin_fabs(static_cast<double>(widen(x[i * step])));
    if (a > largest) largest = a;
  }
  if (!(largest > 0 && largest < __builtin_inf())) return 1.0;
  int power;
  __builtin_frexp(largest, &power);
  return __builtin_ldexp(1.0, power - 1);
}

template <class T> struct Job {
  using Real = Compute<T>;
  using V = Vec<Real>;
  static constexpr int L = kLanes<Real>;
  const CosineArgs& args;
  int64_t rows;

  explicit Job(const CosineArgs& a) : args(a), rows(row_count(a.rows)) {}
  const T* row1(int64_t r) const { return static_cast<const T*>(args.x1.data) + row_offset(args.rows, args.x1, r); }
  const T* row2(int64_t r) const { return static_cast<const T*>(args.x2.data) + row_offset(args.rows, args.x2, r); }

  static LL_INLINE void add_run(Accumulator<Real>& sums, const T* x1, const T* x2, int64_t n) {
    int64_t i = 0;
    for (; i + L <= n; i += L) sums.add(load(x1 + i), load(x2 + i));
    if (i < n) sums.add(load_partial(x1 + i, n - i, Real(0)), load_partial(x2 + i, n - i, Real(0)));
  }
  // 1. Of one pair.
  Sums fold(int64_t r) const {
    Accumulator<Real> sums;
    const T *x1 = row1(r), *x2 = row2(r);
    const int64_t step1 = args.x1.step, step2 = args.x2.step, length = args.rows.length;
    if (step1 == 1 && step2 == 1) {
      add_run(sums, x1, x2, length);
      return sums.total();
    }
    alignas(LL_BYTES) T copy1[kGather], copy2[kGather];
    for (int64_t i = 0; i < length; i += kGather) {
      const int64_t n = smaller(length - i, kGather);
      for (int64_t j = 0; j < n; ++j) copy1[j] = x1[(i + j) * step1];
      for (int64_t j = 0; j < n; ++j) copy2[j] = x2[(i + j) * step2];
      add_run(sums, copy1, copy2, n);
    }
    return sums.total();
  }

  // 2. Of rows [first, first + count), whose sums are given.
  void finish(int64_t first, int64_t count, const Sums* sums) const {
    double cosine[kBatch], inverse1[kBatch], inverse2[kBatch];
    const double added = args.embedding ? 1e-12 : 0.0, least = args.embedding ? 0.0 : args.eps;
    for (int64_t i = 0; i < count; ++i) {
      const double length1 = __builtin_sqrt(sums[i].square1 + added), length2 = __builtin_sqrt(sums[i].square2 + added);
      const double norm1 = length1 < least ? least : length1, norm2 = length2 < least ? least : length2;
      cosine[i] = sums[i].dot / (norm1 * norm2);
      inverse1[i] = (length1 < least ? -1.0 : 1.0) / norm1;
      inverse2[i] = (length2 < least ? -1.0 : 1.0) / norm2;
    }
    if constexpr (sizeof(Real) == 8) {
      const auto safe = [](double square) { return square > 1e-280 && square < 1e280; };
      for (int64_t i = 0; i < count; ++i)
        if (!safe(sums[i].square1) || !safe(sums[i].square2))
          scaled_row(first + i, cosine + i, inverse1 + i, inverse2 + i);
    }
    Real* out = static_cast<Real*>(args.out);
    for (int64_t i = 0; i < count && out; ++i) {
      const double c = cosine[i];
      double v = c > 1.0 ? 1.0 : c < -1.0 ? -1.0 : c;
      if (args.embedding) {
        const double t = args.target[first + i], over = c - args.margin;
        v = t == 1.0 ? 1.0 - c : t == -1.0 ? (over < 0.0 ? 0.0 : over) : 0.0;
      }
      out[first + i] = static_cast<Real>(v);
    }
    if (!args.saved) return;
    for (int64_t i = 0; i < count; ++i) {
      args.saved[first + i] = cosine[i];
      args.saved[rows + first + i] = inverse1[i];
      args.saved[2 * rows + first + i] = inverse2[i];
    }
  }

  // 1 and 2 of one row whose squares overflow or vanish.
  __attribute__((noinline)) void scaled_row(int64_t r, double* cosine, double* inverse1, double* inverse2) const {
    const T *x1 = row1(r), *x2 = row2(r);
    const int64_t n = args.rows.length, step1 = args.x1.step, step2 = args.x2.step;
    const double at_least = args.embedding ? 1.0 : 0.0, least = args.embedding ? 0.0 : args.eps;
    const double scale1 = scale_of(x1, step1, n, at_least), scale2 = scale_of(x2, step2, n, at_least);
    double dot = 0, square1 = args.embedding ? 1e-12 / scale1 / scale1 : 0.0,
           square2 = args.embedding ? 1e-12 / scale2 / scale2 : 0.0;
    for (int64_t i = 0; i < n; ++i) {
      const double a = static_cast<double>(widen(x1[i * step1])) / scale1,
                   b = static_cast<double>(widen(x2[i * step2])) / scale2;
      dot += a * b;
      square1 += a * a;
      square2 += b * b;
    }
    const double length1 = __builtin_sqrt(square1), length2 = __builtin_sqrt(square2);
    const double least1 = least / scale1, least2 = least / scale2;
    const double norm1 = length1 < least1 ? least1 : length1, norm2 = length2 < least2 ? least2 : length2;
    *cosine = dot / norm1 / norm2;
    *inverse1 = (length1 < least1 ? -1.0 : 1.0) / norm1 / scale1;
    *inverse2 = (length2 < least2 ? -1.0 : 1.0) / norm2 / scale2;
  }

  int64_t rows_per_item() const {
    const int64_t row_bytes = args.rows.length * static_cast<int64_t>(sizeof(T));
    const int64_t n = kItemBytes / (row_bytes ? row_bytes : 1);
    return bounded(n, 1, 64 * kBatch);
  }
  int64_t bytes() const { return rows * args.rows.length * static_cast<int64_t>(sizeof(T)); }

  void by_rows() const {
    parallel_stretches(rows, rows_per_item(), args.threads, 2 * bytes(), [&](int64_t begin, int64_t end) {
      Sums sums[kBatch];
      for (int64_t first = begin; first < end; first += kBatch) {
        const int64_t count = smaller(end - first, kBatch);
        for (int64_t i = 0; i < count; ++i) sums[i] = fold(first + i);
        finish(first, count, sums);
      }
    });
  }

  // Neighbouring rows in neighbouring lanes: (N, C, d1, ...) over dim 1 needs no permuted copy.
  bool lanes_fit() const {
    return args.x1.step != 1 && args.x2.step != 1 && args.x1.strides[0] == 1 && args.x2.strides[0] == 1 &&
           args.rows.sizes[0] >= L / 2;
  }
  // `width` neighbouring rows from `first` on: a parallel item.
  struct Strip {
    int64_t first, width;
  };
  static constexpr int64_t kStripWidth = kTileVectors * L;
  int64_t strips() const { return pieces(args.rows.sizes[0], kStripWidth); }
  Strip strip(int64_t item) const {
    const int64_t inner = args.rows.sizes[0], begin = item % strips() * kStripWidth;
    return {item / strips() * inner + begin, smaller(inner - begin, kStripWidth)};
  }
  void by_lanes() const {
    parallel_for(rows / args.rows.sizes[0] * strips(), args.threads, 2 * bytes(), [&](int64_t item) {
      const Strip s = strip(item);
      const T *x1 = row1(s.first), *x2 = row2(s.first);
      Accumulator<Real> sums[kTileVectors];
      for (int64_t j = 0; j < args.rows.length; ++j) {
        const T *p1 = x1 + j * args.x1.step, *p2 = x2 + j * args.x2.step;
        for (int64_t i = 0; i < s.width; i += L) {
          if (s.width - i >= L)
            sums[i / L].add(load(p1 + i), load(p2 + i));
          else
            sums[i / L].add(load_partial(p1 + i, s.width - i, Real(0)), load_partial(p2 + i, s.width - i, Real(0)));
        }
      }
      Sums done[kStripWidth];
      for (int64_t i = 0; i < s.width; ++i) done[i] = sums[i / L].lane(static_cast<int>(i % L));
      for (int64_t i = 0; i < s.width; i += kBatch) finish(s.first + i, smaller(s.width - i, kBatch), done + i);
    });
  }

  void run() const {
    if (lanes_fit())
      by_lanes();
    else
      by_rows();
  }
};

// ---- the gradient -------------------------------------------------------------------------------------------------

// grad1 = factor1 (inverse2 x2 - pull1 inverse1 x1), and the same with 1 and 2 exchanged.
template <class Real> struct Coefficients {
  Real inverse1, inverse2, factor1, factor2, pull1, pull2;
};

template <class T> struct GradJob {
  using Real = Compute<T>;
  using V = Vec<Real>;
  static constexpr int L = kLanes<Real>;
  const CosineGradArgs& args;
  const Job<T> inputs;
  bool streaming;

  explicit GradJob(const CosineGradArgs& a) : args(a), inputs(a.forward), streaming(inputs.bytes() >= kStreamBytes) {}

  // Where row r of a gradient begins; null where it is not wanted.
  T* grad_row(const Vectors& grad, int64_t r) const {
    return grad.data ? static_cast<T*>(grad.data) + row_offset(args.forward.rows, grad, r) : nullptr;
  }

  // ---- step 3
  // -----------------------------------------------------------------------------------------------------------

  // What the unit vector is multiplied by: the cosine, or 0 where the norm was raised to eps and does not follow the
  // vector.
  double pull(double cosine, double inverse) const {
    const CosineArgs& f = args.forward;
    if (f.embedding) return cosine;
    if (inverse < 0) return 0.0;
    return inverse == 1.0 / f.eps ? cosine / 2 : cosine;  // at the floor itself: halfway, as torch.maximum
  }
  // What the loss of a row is multiplied by to give the gradient of its cosine.
  double slope(int64_t r, double cosine) const {
    const CosineArgs& f = args.forward;
    if (!f.embedding) return 1.0;
    return f.target[r] == 1.0 ? -1.0 : f.target[r] == -1.0 && !(cosine - f.margin < 0.0) ? 1.0 : 0.0;
  }

  // False where the row's gradient is 0 whatever the vectors hold.
  bool prepare(int64_t r, Coefficients<double>* c) const {
    const double* saved = args.forward.saved;
    const double cosine = saved[r], inverse1 = saved[inputs.rows + r], inverse2 = saved[2 * inputs.rows + r];
    const double s = slope(r, cosine);
    if (s == 0.0) return false;
    const double up =
        args.upstream ? static_cast<double>(static_cast<const Real*>(args.upstream)[r * args.upstream_stride]) : 1.0;
    const double g = s * up * args.upstream_scale;
    const double positive1 = __builtin_fabs(inverse1), positive2 = __builtin_fabs(inverse2);
    *c = {positive1, positive2, g * positive1, g * positive2, pull(cosine, inverse1), pull(cosine, inverse2)};
    return true;
  }
  // Whether every coefficient can be rounded to Real without leaving its range.
  static bool fits(const Coefficients<double>& c) {
    if constexpr (sizeof(Real) == 8) return true;
    const auto fine = [](double x) { return x == 0.0 || (__builtin_fabs(x) > 1e-36 && __builtin_fabs(x) < 1e36); };
    return fine(c.inverse1) && fine(c.inverse2) && fine(c.factor1) && fine(c.factor2);
  }
  static Coefficients<Real> rounded(const Coefficients<double>& c) {
    return {static_cast<Real>(c.inverse1), static_cast<Real>(c.inverse2), static_cast<Real>(c.factor1),
            static_cast<Real>(c.factor2),  static_cast<Real>(c.pull1),    static_cast<Real>(c.pull2)};
  }

  // ---- step 4
  // -----------------------------------------------------------------------------------------------------------

  // n elements of one row, both inputs contiguous.
  static LL_INLINE void values(const Coefficients<Real>& c, const T* x1, const T* x2, T* out1, T* out2, int64_t n) {
    const V i1 = splat<Real>(c.inverse1), i2 = splat<Real>(c.inverse2);
    const V f1 = splat<Real>(c.factor1), f2 = splat<Real>(c.factor2);
    const V p1 = splat<Real>(c.pull1), p2 = splat<Real>(c.pull2);
    int64_t i = 0;
    for (; i + L <= n; i += L) {
      const V u1 = load(x1 + i) * i1, u2 = load(x2 + i) * i2;
      if (out1) store(out1 + i, f1 * (u2 - p1 * u1));
      if (out2) store(out2 + i, f2 * (u1 - p2 * u2));
    }
    if (i == n) return;
    const V u1 = load_partial(x1 + i, n - i, Real(0)) * i1, u2 = load_partial(x2 + i, n - i, Real(0)) * i2;
    if (out1) store_partial(out1 + i, f1 * (u2 - p1 * u1), n - i);
    if (out2) store_partial(out2 + i, f2 * (u1 - p2 * u2), n - i);
  }
  // The same in double, for coefficients that leave the range of Real.
  static __attribute__((noinline)) void wide_values(const Coefficients<double>& c, const T* x1, const T* x2, T* out1,
                                                    T* out2, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const double u1 = static_cast<double>(widen(x1[i])) * c.inverse1;
      const double u2 = static_cast<double>(widen(x2[i])) * c.inverse2;
      if (out1) out1[i] = narrow<T>(c.factor1 * (u2 - c.pull1 * u1));
      if (out2) out2[i] = narrow<T>(c.factor2 * (u1 - c.pull2 * u2));
    }
  }
  // n elements of row r.
  void row(int64_t r, const T* x1, const T* x2, T* out1, T* out2, int64_t n) const {
    Coefficients<double> c;
    if (!prepare(r, &c)) {
      if (out1) memset(out1, 0, static_cast<size_t>(n) * sizeof(T));
      if (out2) memset(out2, 0, static_cast<size_t>(n) * sizeof(T));
    } else if (fits(c)) {
      values(rounded(c), x1, x2, out1, out2, n);
    } else {
      wide_values(c, x1, x2, out1, out2, n);
    }
  }

  // A row of any strides, through small copies.
  void gathered(int64_t r) const {
    const Vectors &v1 = args.forward.x1, &v2 = args.forward.x2;
    alignas(LL_BYTES) T copy1[kGather], copy2[kGather], out1[kGather], out2[kGather];
    const T *x1 = inputs.row1(r), *x2 = inputs.row2(r);
    T* g1 = grad_row(args.grad1, r);
    T* g2 = grad_row(args.grad2, r);
    for (int64_t i = 0; i < args.forward.rows.length; i += kGather) {
      const int64_t n = smaller(args.forward.rows.length - i, kGather);
      for (int64_t j = 0; j < n; ++j) {
        copy1[j] = x1[(i + j) * v1.step];
        copy2[j] = x2[(i + j) * v2.step];
      }
      row(r, copy1, copy2, g1 ? out1 : nullptr, g2 ? out2 : nullptr, n);
      for (int64_t j = 0; j < n && g1; ++j) g1[(i + j) * args.grad1.step] = out1[j];
      for (int64_t j = 0; j < n && g2; ++j) g2[(i + j) * args.grad2.step] = out2[j];
    }
  }

  // Past the caches; both pointers have the same offset within a cache line.
  static void stream_bytes(char* to, const char* from, int64_t n) {
    const int64_t head = static_cast<int64_t>((64 - reinterpret_cast<uintptr_t>(to) % 64) % 64);
    if (head >= n) {
      memcpy(to, from, static_cast<size_t>(n));
      return;
    }
    memcpy(to, from, static_cast<size_t>(head));
    int64_t i = head;
    for (; i + LL_BYTES <= n; i += LL_BYTES)
      stream(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
    memcpy(to + i, from + i, static_cast<size_t>(n - i));
  }
  // Rows of dense gradients are collected in L1 and streamed out whole, so no line is read before it is written.
  void staged(int64_t first, int64_t count) const {
    alignas(64) char buffer1[kStage + 64], buffer2[kStage + 64];
    const int64_t length = args.forward.rows.length, fit = kStage / (length * static_cast<int64_t>(sizeof(T)));
    const auto beside = [](char* buffer, const T* out) {
      return reinterpret_cast<T*>(buffer + reinterpret_cast<uintptr_t>(out) % 64);
    };
    for (int64_t i = first; i < first + count; i += fit) {
      const int64_t n = smaller(first + count - i, fit), bytes = n * length * static_cast<int64_t>(sizeof(T));
      T* g1 = grad_row(args.grad1, i);
      T* g2 = grad_row(args.grad2, i);
      T *copy1 = g1 ? beside(buffer1, g1) : nullptr, *copy2 = g2 ? beside(buffer2, g2) : nullptr;
      for (int64_t k = 0; k < n; ++k)
        row(i + k, inputs.row1(i + k), inputs.row2(i + k), copy1 ? copy1 + k * length : nullptr,
            copy2 ? copy2 + k * length : nullptr, length);
      if (g1) stream_bytes(reinterpret_cast<char*>(g1), reinterpret_cast<const char*>(copy1), bytes);
      if (g2) stream_bytes(reinterpret_cast<char*>(g2), reinterpret_cast<const char*>(copy2), bytes);
    }
  }

  bool contiguous() const {
    const auto fine = [](const Vectors& v) { return !v.data || v.step == 1; };
    return fine(args.forward.x1) && fine(args.forward.x2) && fine(args.grad1) && fine(args.grad2);
  }
  bool dense() const {
    const auto fine = [&](const Vectors& v) {
      return !v.data || (args.forward.rows.dims == 1 && v.strides[0] == args.forward.rows.length);
    };
    return fine(args.grad1) && fine(args.grad2);
  }

  void by_rows() const {
    const int64_t length = args.forward.rows.length;
    const bool stage = streaming && contiguous() && dense() && length * static_cast<int64_t>(sizeof(T)) <= kStage;
    const auto stretch = [&](int64_t first, int64_t end) {
      if (stage) {
        staged(first, end - first);
        fence();
        return;
      }
      for (int64_t r = first; r < end; ++r) {
        if (contiguous())
          row(r, inputs.row1(r), inputs.row2(r), grad_row(args.grad1, r), grad_row(args.grad2, r), length);
        else
          gathered(r);
      }
    };
    parallel_stretches(inputs.rows, inputs.rows_per_item(), args.forward.threads, 4 * inputs.bytes(), stretch);
  }

  bool lanes_fit() const {
    const auto fine = [](const Vectors& v) { return !v.data || (v.step != 1 && v.strides[0] == 1); };
    return inputs.lanes_fit() && fine(args.grad1) && fine(args.grad2);
  }
  // The coefficients of neighbouring rows, one row a lane; `keep` has the lanes whose gradient is not 0.
  struct LaneCoefficients {
    V inverse1[kTileVectors] = {}, inverse2[kTileVectors] = {}, factor1[kTileVectors] = {}, factor2[kTileVectors] = {};
    V pull1[kTileVectors] = {}, pull2[kTileVectors] = {};
    IntVec<Real> keep[kTileVectors] = {};
    void put(int64_t i, const Coefficients<Real>& c) {
      const int64_t v = i / L, lane = i % L;
      inverse1[v][lane] = c.inverse1;
      inverse2[v][lane] = c.inverse2;
      factor1[v][lane] = c.factor1;
      factor2[v][lane] = c.factor2;
      pull1[v][lane] = c.pull1;
      pull2[v][lane] = c.pull2;
      keep[v][lane] = -1;
    }
  };

  void lane_strip(int64_t first, int64_t width) const {
    LaneCoefficients lanes;
    for (int64_t i = 0; i < width; ++i) {
      Coefficients<double> c;
      if (!prepare(first + i, &c)) continue;
      if (!fits(c)) {
        for (int64_t k = 0; k < width; ++k) gathered(first + k);
        return;
      }
      lanes.put(i, rounded(c));
    }
    const T *x1 = inputs.row1(first), *x2 = inputs.row2(first);
    T* const g1 = grad_row(args.grad1, first);
    T* const g2 = grad_row(args.grad2, first);
    for (int64_t j = 0; j < args.forward.rows.length; ++j) {
      for (int64_t i = 0; i < width; i += L) {
        const int64_t v = i / L, valid = width - i;
        const auto get = [&](const T* p) { return valid >= L ? load(p) : load_partial(p, valid, Real(0)); };
        const auto put = [&](T* p, V x) {
          if (valid >= L)
            store(p, lanes.keep[v] ? x : V{});
          else
            store_partial(p, lanes.keep[v] ? x : V{}, valid);
        };
        const V u1 = get(x1 + j * args.forward.x1.step + i) * lanes.inverse1[v];
        const V u2 = get(x2 + j * args.forward.x2.step + i) * lanes.inverse2[v];
        if (g1) put(g1 + j * args.grad1.step + i, lanes.factor1[v] * (u2 - lanes.pull1[v] * u1));
        if (g2) put(g2 + j * args.grad2.step + i, lanes.factor2[v] * (u1 - lanes.pull2[v] * u2));
      }
    }
  }
  void by_lanes() const {
    const int64_t items = inputs.rows / args.forward.rows.sizes[0] * inputs.strips();
    parallel_for(items, args.forward.threads, 4 * inputs.bytes(), [&](int64_t item) {
      const auto strip = inputs.strip(item);
      lane_strip(strip.first, strip.width);
    });
  }

  void run() const {
    if (!inputs.rows || !args.forward.rows.length) return;
    if (lanes_fit())
      by_lanes();
    else
      by_rows();
  }
};

}  // namespace

void cosine(const CosineArgs& a) {
  switch (a.storage) {
    case Storage::kFloat32: return Job<float>(a).run();
    case Storage::kBFloat16: return Job<BFloat16>(a).run();
    case Storage::kFloat16: return Job<Float16>(a).run();
    case Storage::kFloat64: return Job<double>(a).run();
    default: return;  // the module takes floating inputs only
  }
}

void cosine_grad(const CosineGradArgs& a) {
  switch (a.forward.storage) {
    case Storage::kFloat32: return GradJob<float>(a).run();
    case Storage::kBFloat16: return GradJob<BFloat16>(a).run();
    case Storage::kFloat16: return GradJob<Float16>(a).run();
    case Storage::kFloat64: return GradJob<double>(a).run();
    default: return;
  }
}

}  // namespace logitless::LL_ISA
