// What the gradient of a row is made of, prepared for many rows together before any of their logits is read.
//
// Formula (RowGradArgs):  dz_j = p_j (a + b (z_j - lse)) + c [j = target] + e t_j w_j + f w_j,  p_j = exp(z_j - lse).
// Of each row: unit and power, with p_j a = exp(z_j) unit / 2^power (where b is 0), and at_target, the whole of the
// first two terms at the target's class.
//
// Layout: one array for each coefficient, so that a vector of rows is one load.
//
// Precision policy: everything in double, rounded once to the compute type. lse = max + log_sum is split as power ln2
// plus a rest below ln2 before it is exponentiated, so that its size costs no digits. At the target a p_t + c is
// computed as a expm1(z_t - lse) + (a + c) where c is about -a, so that nothing cancels, and as a p_t + c where it is
// not.
//
// Steps: 1. The coefficients a, b, c, e, f of each row (scales). 2. unit and power (prepare). 3. at_target, which reads
// the target's logit: apart from 2, so that short rows can have that logit in the cache by then (prepare_targets).
#pragma once

#include "rows/tile_rows.h"
#include "simd/log.h"

namespace logitless::LL_ISA {
namespace {  // local to the kernel that includes this, as the kernel itself is

// Which terms there are beyond a and c: b; f; e.
enum GradFlags { kGap = 1, kConstant = 2, kTargets = 4 };

inline constexpr int64_t kMaxGradRows = 128;  // rows whose coefficients are prepared together

template <class Real> struct RowCoefficients {
  alignas(LL_BYTES) Real unit[kMaxGradRows];  // a exp(-(lse - base - power ln2)), or that without `a` where b is not 0
  Real power[kMaxGradRows];
  Real base[kMaxGradRows];       // what is taken off the logits of a row beyond kHuge: its maximum; else 0
  Real at_target[kMaxGradRows];  // a p_t + c + b p_t (z_t - lse)
  Real top[kMaxGradRows], log_sum[kMaxGradRows], a[kMaxGradRows], b[kMaxGradRows];  // with kGap alone
  Real e[kMaxGradRows], f[kMaxGradRows];                                            // with kTargets, kConstant alone
  bool read[kMaxGradRows];                                                          // not ignored
  bool plain[kMaxGradRows];  // base is 0, and unit a factor for RowExp
};

// A call of row_grad, and its rows.
template <class T, int Flags> struct GradRows {
  using Real = Compute<T>;
  const RowGradArgs& args;

  const T* row(int64_t r) const {
    return static_cast<const T*>(args.logits) +
           row_offset(args.tile, r, args.tile.outer_stride, args.tile.inner_stride);
  }
  T* grad_row(int64_t r) const {
    return static_cast<T*>(args.grad) + row_offset(args.tile, r, args.grad_strides.outer, args.grad_strides.inner);
  }
  const T* dense_row(int64_t r) const {
    if constexpr ((Flags & kTargets) == 0) return nullptr;
    return static_cast<const T*>(args.dense_target) +
           row_offset(args.tile, r, args.dense_strides.outer, args.dense_strides.inner);
  }
  const Real* class_weight() const { return static_cast<const Real*>(args.class_weight); }
  bool ignored(int64_t r) const { return args.target && args.target[r] == args.ignore_index; }
  bool has_target(int64_t r) const { return args.target && args.target[r] >= 0 && args.target[r] < args.tile.classes; }
  int64_t bytes() const { return row_count(args.tile) * args.tile.classes * static_cast<int64_t>(sizeof(T)); }

  // What step 1 knows in double and steps 2 and 3 use.
  struct Given {
    alignas(LL_BYTES) double a[kMaxGradRows], c[kMaxGradRows], max[kMaxGradRows], log_sum[kMaxGradRows];
  };

  // An element of an array that, where it is not given, is all ones.
  static LL_INLINE double one_or(const void* p, int64_t k) {
    return p ? static_cast<double>(static_cast<const Real*>(p)[k]) : 1.0;
  }

  // 1. Of rows [first, first + count).
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
      a[i] = a[0];
      c[i] = c[0];
      if constexpr ((Flags & kGap) != 0) rows.b[i] = rows.b[0];
      if constexpr ((Flags & kTargets) != 0) rows.e[i] = rows.e[0];
      if constexpr ((Flags & kConstant) != 0) rows.f[i] = rows.f[0];
    }
  }

  // 1 and 2, of rows [first, first + count).
  void prepare(int64_t first, int64_t count, RowCoefficients<Real>& rows, Given& given) const {
    constexpr int D = kLanes<double>;
    scales(first, count, given.a, given.c, rows);
    Real tops[kMaxGradRows];
    memcpy(tops, static_cast<const Real*>(args.row_max) + first, static_cast<size_t>(count) * sizeof(Real));
    memcpy(given.log_sum, args.log_sum + first, static_cast<size_t>(count) * sizeof(double));
    for (int64_t i = 0; i < count; ++i) rows.read[i] = !ignored(first + i);
    for (int64_t i = 0; i < count; i += D) {
      const Vec<double> top = load_wide(tops + i), sum = load(given.log_sum + i), scale = load(given.a + i);
      store(given.max + i, top);
      // lse = power ln2 + exponent.
      const auto huge = !(magnitude<double>(top) <= kHuge);
      const Vec<double> lse = huge ? Vec<double>{} : top + sum, power = whole_power<double>(lse);
      const Vec<double> exponent = ((huge ? Vec<double>{} : top - power * kLn2High) - power * kLn2Low) + sum;
      // exp of the logits will have the drift of their power; that of a class of probability 1 is taken out here.
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

  // 3, of rows [from, from + count) of those that prepare() had, the first of which is row `first`.
  void prepare_targets(int64_t first, int64_t from, int64_t count, RowCoefficients<Real>& rows,
                       const Given& given) const {
    constexpr int D = kLanes<double>;
    alignas(LL_BYTES) double target_logit[kMaxGradRows + D];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = first + from + i;
      const bool wanted = rows.read[from + i] && has_target(r);
      target_logit[i] = wanted ? static_cast<double>(widen(row(r)[args.target[r] * args.tile.class_stride])) : 0.0;
    }
    for (int64_t i = 0; i < count; i += D) {
      const int64_t at = from + i;
      const Vec<double> top = load(given.max + at), sum = load(given.log_sum + at);
      const Vec<double> a = load(given.a + at), c = load(given.c + at);
      const Vec<double> log_p = (load(target_logit + i) - top) - sum, a_and_c = a + c;
      // Where c is about -a, as in cross-entropy, this loses nothing; elsewhere it would drown c.
      Vec<double> value = a * expm1(log_p) + a_and_c;
      const Vec<double> half = 0.5 * magnitude<double>(a);
      if ((Flags & kGap) || greater_bits(half, magnitude<double>(a_and_c)) != kAllBits<double>) {
        const Vec<double> p = exp<double>(log_p);
        value = magnitude<double>(a_and_c) < half ? value : a * p + c;
        if constexpr ((Flags & kGap) != 0) {
          Vec<double> b;
          for (int k = 0; k < D; ++k) b[k] = static_cast<double>(rows.b[at + k]);
          value += log_p == -__builtin_inf() ? Vec<double>{} : p * b * log_p;
        }
      }
      store_narrow(rows.at_target + at, value);
    }
  }

  // All steps.
  void prepare(int64_t first, int64_t count, RowCoefficients<Real>& rows) const {
    Given given;
    prepare(first, count, rows, given);
    prepare_targets(first, 0, count, rows, given);
  }

  // The gradient at the target's class of row r, the i-th of `rows`.
  T target_value(int64_t r, const RowCoefficients<Real>& rows, int64_t i) const {
    double v = rows.at_target[i];
    const int64_t j = args.target[r];
    const double w = class_weight() ? static_cast<double>(class_weight()[j]) : 1.0;
    if constexpr ((Flags & kTargets) != 0) {
      const double t = static_cast<double>(widen(dense_row(r)[j * args.dense_strides.classes]));
      v += static_cast<double>(rows.e[i]) * t * w;
    }
    if constexpr ((Flags & kConstant) != 0) v += static_cast<double>(rows.f[i]) * w;
    return narrow<T>(v);
  }
};

}  // namespace
}  // namespace logitless::LL_ISA
