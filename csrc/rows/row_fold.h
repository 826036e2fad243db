// Reading one row of logits into a RowState: contiguous, strided, or with logits of any size.
#pragma once

#include "parallel.h"
#include "rows/row_state.h"

namespace logitless::LL_ISA {

inline constexpr int64_t kGather = 2048;  // elements of a strided row copied at a time

// One row and what lies beside it, in elements; null: not given.
template <class T> struct RowView {
  const T* logits;
  int64_t stride;
  const Compute<T>* weight = nullptr;
  const T* dense = nullptr;
  int64_t dense_stride = 1;
  Compute<T> target_logit = kNaN<Compute<T>>;
};

// Feeds n contiguous logits; w and t may be null.
template <class T, int Flags>
LL_INLINE void feed(RowState<Compute<T>, Flags, false>& state, const T* z, const Compute<T>* w, const T* t, int64_t n,
                    int64_t first_class, bool fresh) {
  using Real = Compute<T>;
  constexpr int L = kLanes<Real>;
  constexpr bool kWeighted = (Flags & (kSmooth | kDense)) != 0, kTargets = (Flags & kDense) != 0;
  // Beyond n: a logit of -inf whose weight and target are 0.
  const auto step = [&](auto count, auto first, int64_t i, int64_t valid) __attribute__((always_inline)) {
    constexpr int K = decltype(count)::value;
    Vec<Real> zs[K], ws[K], ts[K];
    LL_UNROLL
    for (int k = 0; k < K; ++k) {
      const bool whole = K > 1 || valid == L;
      zs[k] = whole ? load(z + i + k * L) : load_partial(z + i, valid, -kInf<Real>);
      if constexpr (kWeighted) {
        if (w)
          ws[k] = whole ? load(w + i + k * L) : load_partial(w + i, valid, Real(0));
        else
          ws[k] = whole ? splat<Real>(1)
                        : (lane_index<Real>() < static_cast<IntOf<Real>>(valid) ? splat<Real>(1) : Vec<Real>{});
      }
      if constexpr (kTargets) ts[k] = whole ? load(t + i + k * L) : load_partial(t + i, valid, Real(0));
    }
    state.template step<K, decltype(first)::value>(zs, ws, ts, first_class + i);
  };
  const auto whole_or = [&](int64_t i) { return n - i < L ? n - i : L; };
  int64_t i = 0;
  if (fresh) step(Constant<1>{}, Constant<true>{}, 0, whole_or(0)), i = L;
  for (; i + 8 * L <= n; i += 8 * L) step(Constant<8>{}, Constant<false>{}, i, L);
  if (i + 4 * L <= n) step(Constant<4>{}, Constant<false>{}, i, L), i += 4 * L;
  for (; i < n; i += L) step(Constant<1>{}, Constant<false>{}, i, whole_or(i));
}

// ---- the fold of contiguous rows without weights: what cross-entropy and entropy spend their time in
// ---------------------
//
// Its terms are those of UnitExp, in a unit that is chosen from the row's first logits and so far below them that all
// logits which count as UnitExp's least are less than any float together. Huge logits and NaN are left to a RowState.

inline constexpr int64_t kMaxRows = 64;  // rows finished together, one per lane
inline constexpr int kUnitLift = 56;     // bits between exp of the largest logit known and the unit
inline constexpr int64_t kScout =
    512;  // of a long row the largest of as many logits is looked for first: few later ones exceed it
inline constexpr int kPlainVectors = 16;     // as many are summed plainly
inline constexpr int64_t kLongAhead = 2048;  // bytes of a long row that are asked for ahead
inline constexpr int kShortVectors = 64;  // rows of no more vectors are folded without a branch that depends on a logit

template <class Real> LL_INLINE Vec<Real> power_of_unit(Real max) {
  return whole_power<Real>(splat<Real>(max)) - static_cast<Real>(kUnitLift);
}
// A sum of UnitExp, without its bias and the drift of a term as large as the sum; of one smaller by 2^-m it leaves m
// times it.
template <class Real> LL_INLINE Vec<double> without_drift(Vec<double> sum, Vec<double> power) {
  const Vec<double> drift = kDrift<Real> * (power + exponent_of(sum));
  return sum * ((1 - kUnitExpBias<Real>)+drift + drift * drift * 0.5);
}
// The most that `terms` which count as UnitExp's least add up to: such a sum is 0.
template <class Real> LL_INLINE Real least_sum(int64_t terms) {
  return sizeof(Real) == 4 ? static_cast<Real>(terms) * Real(0x1p-124) : Real(0);
}
template <class Real> LL_INLINE bool is_tame(Real max) { return __builtin_fabs(static_cast<double>(max)) <= kHuge; }

template <class T> LL_INLINE Compute<T> max_of(const T* z, int64_t n) {
  using Real = Compute<T>;
  using V = Vec<Real>;
  constexpr int L = kLanes<Real>;
  V top[4] = {splat<Real>(-kInf<Real>), splat<Real>(-kInf<Real>), splat<Real>(-kInf<Real>), splat<Real>(-kInf<Real>)},
    x[4];
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    load_unordered<4>(z + i, x);
    LL_UNROLL
    for (int k = 0; k < 4; ++k) top[k] = maximum<Real>(x[k], top[k]);
  }
  for (; i < n; i += L)
    top[0] = maximum<Real>(n - i >= L ? load(z + i) : load_partial(z + i, n - i, -kInf<Real>), top[0]);
  return max_of_lanes<Real>(maximum<Real>(maximum<Real>(top[0], top[1]), maximum<Real>(top[2], top[3])));
}

// K vectors from the i-th logit on; of one vector, those beyond n are -inf.
template <int K, class T> LL_INLINE void load_block(const T* z, int64_t i, int64_t n, Vec<Compute<T>> (&x)[K]) {
  if constexpr (K > 1)
    load_unordered<K>(z + i, x);
  else
    x[0] = n - i >= kLanes<Compute<T>> ? load(z + i) : load_partial(z + i, n - i, -kInf<Compute<T>>);
}

// As many rows of few classes as there are lanes are folded together, in one unit, without a branch that depends on a
// logit and without reducing a vector to one number. Each logit but the largest of a row loses one comparison, and
// enters the sum then: first within its lane, then lane against lane until a lane is what is left of a row.
template <class Real> struct Contest {
  Vec<Real> top, sum;  // the largest logits so far, and the sums of exp of the others, in the unit
};
// The lanes of two, of half as many each, compared in twos.
template <class Real>
LL_INLINE Contest<Real> meet_lanes(const UnitExp<Real>& exp, const Contest<Real>& a, const Contest<Real>& b) {
  const Vec<Real> even = even_lanes<Real>(a.top, b.top), odd = odd_lanes<Real>(a.top, b.top);
  const Vec<Real> sum = even_lanes<Real>(a.sum, b.sum) + odd_lanes<Real>(a.sum, b.sum);
  return {maximum<Real>(odd, even), exp.add_to(sum, minimum<Real>(even, odd))};
}
template <class T>
LL_INLINE Contest<Compute<T>> fold_within_lanes(const T* z, int64_t n, int64_t ahead, const UnitExp<Compute<T>>& exp) {
  using Real = Compute<T>;
  using V = Vec<Real>;
  constexpr int L = kLanes<Real>;
  V top = splat<Real>(-kInf<Real>), even{}, odd{};
  PairSum<Real> total;
  const auto lose = [&](V x, V& sum) __attribute__((always_inline)) {
    const V loser = minimum<Real>(top, x);
    top = maximum<Real>(x, top);
    sum = exp.add_to(sum, loser);
  };
  const auto read_pair = [&](int64_t at, V& a, V& b) __attribute__((always_inline)) {
    __builtin_prefetch(z + ahead + at);
    if constexpr (sizeof(T) >= 4) __builtin_prefetch(z + ahead + at + L);
    load_pair(z + at, a, b);
  };
  int64_t i = 0;
  if (n >= 2 * L) {
    V second;
    read_pair(0, top, second);
    lose(second, odd);
    i = 2 * L;
  } else {
    top = n >= L ? load(z) : load_partial(z, n, -kInf<Real>);
    i = L;
  }
  while (i < n) {
    const int64_t end = n - i > kPlainVectors * L ? i + kPlainVectors * L : n;
    for (; i + 2 * L <= end; i += 2 * L) {
      V a, b;
      read_pair(i, a, b);
      lose(a, even);
      lose(b, odd);
    }
    if (i + L <= end) lose(load(z + i), even), i += L;
    if (i < end) lose(load_partial(z + i, end - i, -kInf<Real>), odd), i = end;
    if (n > kPlainVectors * L) total.add(even + odd), even = odd = V{};
  }
  return {top, n > kPlainVectors * L ? total.high + total.low : even + odd};
}

// ---- the fold of all logits but the target's: what cross-entropy asks for
// ---------------------------------------------------
//
// With the target's logit held out instead of the largest, nll = log1p(rest / exp(z_t)) keeps its relative precision as
// well, and no logit is compared with another. Exp is that of UnitExp; for logits of 16 bits, whose loss will be
// rounded to them, to 2^-21. Rows that do not suit (logits not finite or huge, a target beyond the range of the others)
// are left to the folds that hold out the largest.

template <class T>
inline constexpr int kPlainOthers = sizeof(T) == 2 ? 64 : kPlainVectors;  // where 2^-21 is exact enough

// To the minimum with which one logit is held out of vectors: -inf at its place, from 0 to 2 lanes, in two of them.
template <class Real> struct HoldOut {
  static constexpr int L = kLanes<Real>;
  Real limits[4 * L + 1];
  constexpr HoldOut() : limits{} {
    for (int i = 0; i <= 4 * L; ++i) limits[i] = i == 2 * L ? -kInf<Real> : kInf<Real>;
  }
  LL_INLINE Vec<Real> at(int64_t place) const { return load(limits + (2 * L - place)); }
};
template <class Real> alignas(LL_BYTES) inline constexpr HoldOut<Real> kHoldOut;

template <class T> LL_INLINE void hold_out_of_pair(int64_t place, Vec<Compute<T>>& a, Vec<Compute<T>>& b) {
  using Real = Compute<T>;
  constexpr int L = kLanes<Real>;
  const HoldOut<Real>& out = kHoldOut<Real>;
  const int64_t of_a = !__is_same(T, BFloat16) ? place : place & 1 ? L : place / 2;
  const int64_t of_b = !__is_same(T, BFloat16) ? place - L : place & 1 ? place / 2 : L;
  a = minimum<Real>(out.at(of_a), a), b = minimum<Real>(out.at(of_b), b);
}

// Exp of every logit but `target` summed in units of exp's, lane by lane. kMany: of more than kPlainOthers vectors.
// `ahead`: what is asked for before it is read, in elements.
template <class T, bool kMany, bool kClamps>
LL_INLINE Vec<Compute<T>> fold_others(const T* z, int64_t n, int64_t target, int64_t ahead,
                                      const UnitExp<Compute<T>>& exp, typename UnitExp<Compute<T>>::Seen& seen) {
  using Real = Compute<T>;
  using V = Vec<Real>;
  constexpr int L = kLanes<Real>;
  constexpr int64_t kPair = 2 * L;
  V sum[2] = {};
  const int64_t left = n % kPair;
  const T* const tail = z + (n - left);
  const int64_t place = target % kPair, in_tail = target - (n - left);
  // In the order of memory. Of rows so short that the time between two prefetches varies, to the second cache before.
  const auto prefetch_pair = [&](const T* p) __attribute__((always_inline)) {
    for (int64_t at = 0; at < kPair; at += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(p + ahead + at);
      if constexpr (sizeof(T) >= 4 && !kMany) __builtin_prefetch(p + 2 * ahead + at, 0, 2);
    }
  };
  // First what is less than a pair, and the pair of the target: no branch depends on where that is.
  if (left > 0) {
    V one[1] = {left >= L ? load(tail) : load_partial(tail, left, -kInf<Real>)};
    one[0] = minimum<Real>(kHoldOut<Real>.at(in_tail >= 0 && in_tail < L ? in_tail : L), one[0]);
    exp.template add_all<sizeof(T) == 2, true>(sum, seen, one);
    if (left > L) {
      one[0] = minimum<Real>(kHoldOut<Real>.at(in_tail >= L ? in_tail - L : L),
                             load_partial(tail + L, left - L, -kInf<Real>));
      exp.template add_all<sizeof(T) == 2, true>(sum, seen, one);
    }
  }
  if (tail == z) {
    prefetch_pair(z);
    return sum[0];
  }
  const T* const end = tail - kPair;
  const T* const held = in_tail >= 0 ? end : z + (target - place);
  // The pair after it from there on.
  const auto read_pair = [&](const T* p, V& a, V& b) __attribute__((always_inline)) {
    prefetch_pair(p);
    load_pair(p + (-static_cast<int64_t>(p >= held) & kPair), a, b);
  };
  V x[2];
  load_pair(held, x[0], x[1]);
  hold_out_of_pair<T>(in_tail >= 0 ? kPair : place, x[0], x[1]);
  exp.template add_all<sizeof(T) == 2, true>(sum, seen, x);
  PairSum<Real> total;
  for (const T* p = z; p != end;) {
    const T* const stop = kMany && end - p > kPlainOthers<T> * L ? p + kPlainOthers<T> * L : end;
    if constexpr (!kMany || sizeof(T) == 2) {  // of more logits in float32 there are not registers enough
      for (; stop - p >= 2 * kPair; p += 2 * kPair) {
        V four[4];
        read_pair(p, four[0], four[1]), read_pair(p + kPair, four[2], four[3]);
        exp.template add_all<sizeof(T) == 2, kClamps>(sum, seen, four);
      }
    }
    for (; p != stop; p += kPair) {
      read_pair(p, x[0], x[1]);
      exp.template add_all<sizeof(T) == 2, kClamps>(sum, seen, x);
    }
    if constexpr (kMany) total.add(sum[0] + sum[1]), sum[0] = sum[1] = V{};
  }
  prefetch_pair(end);
  if (left > 0) prefetch_pair(tail);
  if constexpr (kMany)
    return total.high + total.low;
  else
    return sum[0] + sum[1];
}

// Of as many rows as there are lanes: the largest logit, and the sum of exp over the others in units of 2^power, which
// was chosen for `guess`.
template <class Real> struct ShortRows {
  Vec<Real> max, rest;
  Real power, guess;
  // The lanes for which that unit does: no term overflows, and those that count as UnitExp's least, each of 2^-124 at
  // most, are together less than a float next to exp(max), or than 2^-30 of the sum.
  LL_INLINE uint32_t valid_bits() const {
    const Vec<Real> rise = max - guess;
    const uint32_t counts =
        reaching_bits(rise, splat<Real>(-15)) | greater_bits(rest, splat<Real>(static_cast<Real>(0x1p-85)));
    const uint32_t tame = reaching_bits(splat<Real>(static_cast<Real>(kHuge)), magnitude<Real>(max));
    return tame & reaching_bits(splat<Real>(static_cast<Real>(kHeadroom)), rise) & counts & equal_bits(rest, rest);
  }
};
// The first `count` rows are wanted.
template <class T> LL_INLINE ShortRows<Compute<T>> fold_short(const T* const* rows, int64_t count, int64_t n) {
  using Real = Compute<T>;
  constexpr int L = kLanes<Real>;
  const int64_t ahead = rows_ahead(n * static_cast<int64_t>(sizeof(T))) * n;
  Real guess = max_of(rows[0], n);
  for (int64_t k = 1; k < count && !is_tame(guess); ++k) guess = max_of(rows[k], n);
  const Vec<Real> power = power_of_unit(guess);
  const UnitExp<Real> exp(power);
  // One loop over the rows, so that the processor sees one stream of memory.
  Contest<Real> left[L];
  for (int64_t k = 0; k < L; ++k) left[k] = k < count ? fold_within_lanes<T>(rows[k], n, ahead, exp) : left[0];
  LL_UNROLL
  for (int meetings = L / 2; meetings > 0; meetings /= 2)
    for (int k = 0; k < meetings; ++k) left[k] = meet_lanes<Real>(exp, left[2 * k], left[2 * k + 1]);
  const Vec<Real> sum = left[0].sum;
  return {left[0].top, sum <= least_sum<Real>(n + L) ? Vec<Real>{} : sum, power[0], guess};
}

// Of `count` rows; whether all logits were in range. A function of its own, so that what it needs stays in registers.
template <class T, bool kMany, bool kClamps>
__attribute__((noinline)) bool fold_others_of(const T* const* rows, const int64_t* targets, int64_t count, int64_t n,
                                              int64_t ahead, const UnitExp<Compute<T>>& unit, Vec<Compute<T>>* sums) {
  const UnitExp<Compute<T>> exp = unit;
  typename UnitExp<Compute<T>>::Seen seen = exp.template none_seen<kClamps>();
  for (int64_t k = 0; k < count; ++k)
    sums[k] = fold_others<T, kMany, kClamps>(rows[k], n, targets[k], ahead, exp, seen);
  return exp.template fit<kClamps>(seen);
}
// Tried without clamping first, unless `clamps`, which is set where that did not do: a hint for later rows, of any
// thread, that no result depends on.
template <class T>
LL_INLINE bool fold_others_of(const T* const* rows, const int64_t* targets, int64_t count, int64_t n, int64_t ahead,
                              const UnitExp<Compute<T>>& exp, Vec<Compute<T>>* sums, bool& clamps) {
  const bool many = n > kPlainOthers<T> * kLanes<Compute<T>>;
  if (!__atomic_load_n(&clamps, __ATOMIC_RELAXED)) {
    if ((many ? fold_others_of<T, true, false> : fold_others_of<T, false, false>)(rows, targets, count, n, ahead, exp,
                                                                                  sums))
      return true;
    __atomic_store_n(&clamps, true, __ATOMIC_RELAXED);
  }
  return (many ? fold_others_of<T, true, true> : fold_others_of<T, false, true>)(rows, targets, count, n, ahead, exp,
                                                                                 sums);
}

// The sums over all logits but the targets', which go to `held`, of `count` rows, at most kMaxRows, in units of
// 2^power. Gives the power; NaN: the rows' sums are not all good in one unit.
template <class T>
LL_INLINE Compute<T> fold_short_others(const T* const* rows, const int64_t* targets, int64_t count, int64_t n,
                                       Compute<T>* held, Compute<T>* rest, bool& clamps) {
  using Real = Compute<T>;
  constexpr int L = kLanes<Real>;
  Real guess = max_of(rows[0], n);
  for (int64_t k = 1; k < count && !is_tame(guess); ++k) guess = max_of(rows[k], n);
  const Vec<Real> power = power_of_unit(guess);
  const UnitExp<Real> exp(power);
  Vec<Real> sums[kMaxRows];
  bool fit =
      is_tame(guess) && fold_others_of<T>(rows, targets, count, n, rows_ahead(n * static_cast<int64_t>(sizeof(T))) * n,
                                          exp, sums, clamps);
  for (int64_t k = 0; k < count; ++k) held[k] = widen(rows[k][targets[k]]);
  for (int64_t k = count; k % L != 0; ++k) sums[k] = sums[0], held[k] = held[0];
  for (int64_t first = 0; first < count; first += L) {
    Vec<Real>* const of = sums + first;
    LL_UNROLL
    for (int meetings = L / 2; meetings > 0; meetings /= 2) LL_UNROLL
    for (int k = 0; k < meetings; ++k)
      of[k] = even_lanes<Real>(of[2 * k], of[2 * k + 1]) + odd_lanes<Real>(of[2 * k], of[2 * k + 1]);
    const Vec<Real> sum = of[0] <= least_sum<Real>(n + L) ? Vec<Real>{} : of[0], at = load(held + first);
    store(rest + first, sum);
    // As in ShortRows, terms that count as UnitExp's least are less than any float next to exp(held), or 2^-30 of the
    // sum.
    const uint32_t counts =
        reaching_bits(at, splat<Real>(guess - 15)) |
        (greater_bits(sum, splat<Real>(static_cast<Real>(0x1p-85))) & reaching_bits(at, splat<Real>(guess - 500)));
    const uint32_t finite = greater_bits(splat<Real>(kInf<Real>), sum) &
                            reaching_bits(splat<Real>(static_cast<Real>(kHuge)), magnitude<Real>(at));
    fit = fit && (counts & finite) == kAllBits<Real>;
  }
  return fit ? power[0] : kNaN<Real>;
}

// Of one row of many classes. False: not such a row.
template <class T> bool fold_long_others(const T* z, int64_t n, int64_t target, bool& clamps, RowSums& sums) {
  using Real = Compute<T>;
  const Real guess = max_of(z, n < kScout ? n : kScout), held = widen(z[target]);
  if (!is_tame(guess) || !is_tame(held) || !(held >= guess - 500)) return false;
  const Vec<Real> power = power_of_unit(guess);
  Vec<Real> others;
  if (!fold_others_of<T>(&z, &target, 1, n, kLongAhead / static_cast<int64_t>(sizeof(T)), UnitExp<Real>(power), &others,
                         clamps))
    return false;
  double rest = sum_of_lanes(others);
  if (rest <= static_cast<double>(least_sum<Real>(n + kLanes<Real>))) rest = 0;
  sums = {held, 0, power[0], without_drift<Real>(splat<double>(rest), splat<double>(power[0]))[0], 0, 0, 0, 0, 0, 0, 0};
  return rest - rest == 0 && (held >= guess - 15 || rest > 0x1p-85);
}

// Of a row of many classes, a logit is compared with the largest of the row, and eight vectors at a time: only a block
// that reaches it is looked at more closely. Flags: 0 or kToken. False: not such a row.
template <class T, int Flags>
__attribute__((noinline)) bool fold_long(const T* z, int64_t n, Compute<T> target_logit, RowSums& sums) {
  using Real = Compute<T>;
  using V = Vec<Real>;
  constexpr int L = kLanes<Real>;
  Real max = max_of(z, n < kScout ? n : kScout);
  if (!is_tame(max)) return false;
  V top = splat<Real>(max), power = power_of_unit(max);
  UnitExp<Real> exp(power);
  Real limit = max + static_cast<Real>(kHeadroom);
  bool met = false;  // whether one logit that equals `top` is held out of the sum
  int64_t arg = 0;
  PairSum<Real> rest, spread;  // of e; of e * (top - z)
  IntVec<Real> rank{};
  // One logit of x is the largest so far: it gives its place to the one that was.
  const auto meet = [&](auto count, V* x, Real best, int64_t first_class) {
    const V old = met ? top : exp.least;
    bool placed = false;
    LL_UNROLL
    for (int k = 0; k < decltype(count)::value; ++k) {
      const uint32_t bits = placed ? 0 : equal_bits(x[k], splat<Real>(best));
      if (bits) x[k] = where_first(bits, old, x[k]), placed = true;
    }
    if constexpr ((Flags & kToken) != 0) {
      spread.add(rest.high * (best - max));
      spread.add(rest.low * (best - max));
    }
    met = true, max = best, top = splat<Real>(best), arg = first_class;
    if (best > limit) {
      const V raised = power_of_unit(best), drop = power - raised;
      rest.scale(drop);
      if constexpr ((Flags & kToken) != 0) spread.scale(drop);
      power = raised, exp = UnitExp<Real>(power), limit = best + static_cast<Real>(kHeadroom);
    }
  };
  const auto add = [&](auto count, int64_t i) __attribute__((always_inline)) {
    constexpr int K = decltype(count)::value;
    V x[K];
    load_block<K>(z, i, n, x);
    if constexpr ((Flags & kToken) != 0) LL_UNROLL
    for (int k = 0; k < K; ++k) rank -= x[k] > target_logit;
    V block_top = x[0];
    LL_UNROLL
    for (int k = 1; k < K; ++k) block_top = maximum<Real>(block_top, x[k]);
    if (__builtin_expect(reaching_bits(block_top, top) != 0, 0) && (!met || greater_bits(block_top, top))) {
      const Real best = max_of_lanes<Real>(block_top);
      if (!is_tame(best)) return false;
      meet(count, x, best, i);
    }
    // `rest` comes out the same whatever else is asked for.
    V sum[2] = {};
    LL_UNROLL
    for (int k = 0; k < K; ++k) sum[k % 2] = exp.add_to(sum[k % 2], x[k]);
    rest.add(K > 1 ? sum[0] + sum[1] : sum[0]);
    if constexpr ((Flags & kToken) != 0) {
      V e[K];
      LL_UNROLL
      for (int k = 0; k < K; ++k) {
        const V counted = maximum<Real>(exp.least, x[k]);
        e[k] = exp.add_to(V{}, counted) * (top - counted);
      }
      spread.add(tree_sum<K>(e));
    }
    return true;
  };
  int64_t i = 0;
  for (; i + 8 * L <= n; i += 8 * L)
    if (!add(Constant<8>{}, i)) return false;
  if (i + 4 * L <= n) {
    if (!add(Constant<4>{}, i)) return false;
    i += 4 * L;
  }
  if (i + 2 * L <= n) {
    if (!add(Constant<2>{}, i)) return false;
    i += 2 * L;
  }
  for (; i < n; i += L)
    if (!add(Constant<1>{}, i)) return false;
  const double unit = static_cast<double>(power[0]);
  const auto total = [unit](const auto& sum) {
    return without_drift<Real>(splat<double>(sum_of_lanes(sum.high, sum.low)), splat<double>(unit))[0];
  };
  sums = {max, 0, unit, total(rest), 0, 0, 0, 0, 0, arg, 0};
  if constexpr ((Flags & kToken) != 0) {
    sums.spread = total(spread);
    for (int lane = 0; lane < L; ++lane) sums.rank += rank[lane];
  }
  if (sums.rest <= static_cast<double>(least_sum<Real>(n + L))) sums.rest = sums.spread = 0;
  return sums.rest - sums.rest == 0 && sums.spread - sums.spread == 0;
}

// Classes [begin, end) of a row that lies in memory one after another.
template <class T, int Flags>
__attribute__((noinline)) RowSums fold_contiguous(const RowView<T>& row, int64_t begin, int64_t end) {
  using Real = Compute<T>;
  if constexpr (Flags == 0 || Flags == kToken) {
    RowSums sums;
    if (fold_long<T, Flags>(row.logits + begin, end - begin, row.target_logit, sums)) {
      sums.arg += begin;
      return sums;
    }
  }
  RowState<Real, Flags, false> state;
  if constexpr ((Flags & kToken) != 0) state.target_logit = splat<Real>(row.target_logit);
  const Real* w = row.weight ? row.weight + begin : nullptr;
  const T* t = (Flags & kDense) ? row.dense + begin : nullptr;
  feed<T, Flags>(state, row.logits + begin, w, t, end - begin, begin, true);
  return finish<Real, Flags>(state);
}

template <class Real, int Flags>
__attribute__((noinline)) void feed_buffer(RowState<Real, Flags, false>& state, const Real* z, const Real* w,
                                           const Real* t, int64_t n, int64_t first_class, bool fresh) {
  feed<Real, Flags>(state, z, w, t, n, first_class, fresh);
}

// Any strides, and logits of any size: a piece at a time is copied into the compute type, less `base`.
template <class T, int Flags>
__attribute__((noinline)) RowSums fold_buffered(const RowView<T>& row, int64_t begin, int64_t end, Compute<T> base) {
  using Real = Compute<T>;
  alignas(LL_BYTES) Real zs[kGather], ts[(Flags & kDense) ? kGather : 1];
  RowState<Real, Flags, false> state;
  int64_t rank = 0;
  for (int64_t i = begin; i < end; i += kGather) {
    const int64_t n = end - i < kGather ? end - i : kGather;
    for (int64_t j = 0; j < n; ++j) {
      const Real x = widen(row.logits[(i + j) * row.stride]);
      rank += x > row.target_logit;  // counted here: the subtraction may make two logits equal
      zs[j] = x - base;
    }
    if constexpr ((Flags & kDense) != 0)
      for (int64_t j = 0; j < n; ++j) ts[j] = widen(row.dense[(i + j) * row.dense_stride]);
    feed_buffer<Real, Flags>(state, zs, row.weight ? row.weight + i : nullptr, ts, n, i, i == begin);
  }
  RowSums sums = finish<Real, Flags>(state);
  sums.base = base;
  sums.max += base;
  sums.rank = rank;
  return sums;
}

template <class T, int Flags> RowSums fold_part(const RowView<T>& row, int64_t begin, int64_t end) {
  const bool contiguous = row.stride == 1 && (!(Flags & kDense) || row.dense_stride == 1);
  return contiguous ? fold_contiguous<T, Flags>(row, begin, end) : fold_buffered<T, Flags>(row, begin, end, 0);
}
// A row with logits beyond kHuge: again, each less the row's maximum.
template <class T, int Flags> RowSums fold_huge(const RowView<T>& row, int64_t classes, double max) {
  return fold_buffered<T, Flags>(row, 0, classes, static_cast<Compute<T>>(max));
}

// The first class at or after `from` that is `max`; of a row with a NaN, its first NaN; 0 when all logits are -inf.
template <class T> int64_t find_argmax(const RowView<T>& row, int64_t classes, double max, bool is_nan, int64_t from) {
  using Real = Compute<T>;
  const Real wanted = static_cast<Real>(max);
  for (int64_t j = is_nan ? 0 : from; j < classes;) {
    if (row.stride == 1 && !is_nan && j + kLanes<Real> <= classes) {
      const uint32_t found = equal_bits(load(row.logits + j), splat<Real>(wanted));
      if (found) return j + __builtin_ctz(found);
      j += kLanes<Real>;
      continue;
    }
    const Real x = widen(row.logits[j * row.stride]);
    if (is_nan ? x != x : x == wanted) return j;
    ++j;
  }
  return 0;
}

}  // namespace logitless::LL_ISA
