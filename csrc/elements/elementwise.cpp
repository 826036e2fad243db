// elementwise: binary cross-entropy (of logits, of probabilities) and torch's pointwise KL divergence, with gradients.
// One read of each operand and one write, or none where only the sum is wanted.
//
// Precision policy: softplus(x) = max(x, 0) + log1p(exp(-|x|)), and both terms of a loss have one sign, so a loss of
// 1e-12 is right to a few ulp. sigmoid(x) and sigmoid(-x) are each formed from exp(-|x|) without a subtraction. Sums
// are in double over items cut by shape alone, so they do not depend on the number of threads.
#include "kernels.h"
#include "parallel.h"
#include "simd/vmath.h"

namespace logitless::LL_ISA {
namespace {

inline constexpr int64_t kItem = 32 * 1024;        // elements of one parallel item
inline constexpr int64_t kShortRow = 128;          // inner sizes below this are gathered across rows
inline constexpr int64_t kStreamBytes = 16 << 20;  // an output larger than this bypasses the caches
template <class Real> inline constexpr int64_t kChunk = 4096 / sizeof(Real);  // elements computed from and to L1

// ---- functions ----------------------------------------------------------------------------------------------------

template <class Real> LL_INLINE Vec<Real> absolute(Vec<Real> x) {
  constexpr IntOf<Real> magnitude = sizeof(Real) == 4 ? IntOf<Real>(0x7fffffff) : IntOf<Real>(0x7fffffffffffffff);
  return as_real<Real>(as_int<Real>(x) & magnitude);
}

// v * 2^power for whole-numbered `power`, rounded once where the result is below the normal range, inf above it.
LL_INLINE Vec<float> scale_gradually(Vec<float> v, Vec<float> power) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(v, power);
#else
  const IntVec<float> n = __builtin_convertvector(power, IntVec<float>), half = n >> 1;
  return v * as_real<float>((half + 127) << 23) * as_real<float>((n - half + 127) << 23);
#endif
}
LL_INLINE Vec<double> scale_gradually(Vec<double> v, Vec<double> power) {
#if defined(__AVX512F__)
  return _mm512_scalef_pd(v, power);
#else
  constexpr double magic = 0x1.8p52;
  const Vec<double> half = (power * 0.5 + magic) - magic, rest = power - half;
  const auto two_to = [](Vec<double> n) { return as_real<double>(as_int<double>(n + (magic + 1023.0)) << 52); };
  return v * two_to(half) * two_to(rest);
#endif
}

// factor * exp(x) over the whole range of exp, rounded once where the result is below the normal range.
template <class Real> LL_INLINE Vec<Real> scaled_exp(Vec<Real> x, Vec<Real> factor) {
  constexpr Real least = sizeof(Real) == 4 ? Real(-110) : Real(-760), most = sizeof(Real) == 4 ? Real(90) : Real(711);
  const Exponential<Real> e = split_exp(minimum<Real>(splat<Real>(most), maximum<Real>(splat<Real>(least), x)));
#if !defined(__AVX512F__)
  // A NaN power has no integer; the fraction carries the NaN.
  return scale_gradually(factor * e.fraction, e.power == e.power ? e.power : Vec<Real>{});
#else
  return scale_gradually(factor * e.fraction, e.power);
#endif
}
template <class Real> LL_INLINE Vec<Real> whole_exp(Vec<Real> x) { return scaled_exp<Real>(x, splat<Real>(1)); }

// log1p(u) for 0 <= u <= 1, below 2 ulp.
LL_INLINE Vec<float> log1p_unit(Vec<float> u) {
  Vec<float> p = u * 0.0020729508250951767f - 0.013631496578454971f;
  p = p * u + 0.041981395334005356f;
  p = p * u - 0.08307410776615143f;
  p = p * u + 0.12467125058174133f;
  p = p * u - 0.1612933725118637f;
  p = p * u + 0.19897931814193726f;
  p = p * u - 0.24988579750061035f;
  p = p * u + 0.33332690596580505f;
  p = p * u - 0.49999988079071045f;
  return u * u * p + u;
}
LL_INLINE Vec<double> log1p_unit(Vec<double> u) { return log1p(u); }

// log(2^k (1 + f)) for f in [sqrt(1/2) - 1, sqrt(2) - 1].
LL_INLINE Vec<float> log_of_parts(Vec<float> k, Vec<float> f) {
  const Vec<float> z = f * f;
  Vec<float> p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec<float> low = (f * z * p - k * 2.12194440e-4f) - z * 0.5f;
  return k * 0.693359375f + (f + low);
}
LL_INLINE Vec<double> log_of_parts(Vec<double> k, Vec<double> f) {
  const Vec<double> s = f / (f + 2.0), z = s * s, w = z * z, half = f * f * 0.5;
  const Vec<double> even = w * (w * (w * 0.1531383769920937332 + 0.2222219843214978396) + 0.3999999999940941908);
  const Vec<double> odd = z * (w * (w * (w * 0.1479819860511658591 + 0.1818357216161805012) + 0.2857142874366239149) +
                               0.6666666666666735130);
  return k * 6.93147180369123816490e-01 + (f - (half - (s * (half + even + odd) + k * 1.90821492927058770002e-10)));
}

template <class Real> struct Parts {
  Vec<Real> power, mantissa;
};  // x = 2^power * mantissa, mantissa in [sqrt(1/2), sqrt(2))
LL_INLINE Parts<float> parts_of(Vec<float> x) {
  const IntVec<float> shifted = as_int<float>(x) - 0x3f3504f3;
  return {__builtin_convertvector(shifted >> 23, Vec<float>), as_real<float>((shifted & 0x7fffff) + 0x3f3504f3)};
}
LL_INLINE Parts<double> parts_of(Vec<double> x) {
  const IntVec<double> shifted = as_int<double>(x) - 0x3fe6a09e667f3bcdLL;
  constexpr double magic = 0x1.8p52;  // AVX2 has no int64 -> double conversion
  return {as_real<double>((shifted >> 52) + 0x4338000000000000LL) - magic,
          as_real<double>((shifted & 0xfffffffffffffLL) + 0x3fe6a09e667f3bcdLL)};
}

// log(x) for x > 0; below -100 for 0.
template <class Real> LL_INLINE Vec<Real> log_positive(Vec<Real> x) {
  constexpr Real least = sizeof(Real) == 4 ? Real(0x1p-126) : Real(0x1p-1022),
                 up = sizeof(Real) == 4 ? Real(0x1p24) : Real(0x1p54);
  const IntVec<Real> small = x < least;
  const Parts<Real> p = parts_of(small ? x * up : x);
  return log_of_parts(small ? p.power - (sizeof(Real) == 4 ? Real(24) : Real(54)) : p.power, p.mantissa - Real(1));
}

// log(1 - p) for 0 <= p <= 1.
template <class Real> LL_INLINE Vec<Real> log_one_minus(Vec<Real> p) {
  const Parts<Real> q = parts_of(Real(1) - p);
  // 1 - p may round for p < 0.5; -p and 1 - 2p, which are mantissa - 1 there, do not lose anything.
  const Vec<Real> f = q.power == 0 ? -p : (q.power == -1 ? Real(1) - 2 * p : q.mantissa - Real(1));
  return p == 1 ? splat<Real>(-kInf<Real>) : log_of_parts(q.power, f);
}

// coefficient * value, where a zero coefficient wins over an infinite value.
template <class Real> LL_INLINE Vec<Real> times_zero_safe(Vec<Real> coefficient, Vec<Real> value) {
  return coefficient * ((coefficient == 0) & (absolute<Real>(value) == kInf<Real>) ? Vec<Real>{} : value);
}

template <class Real> LL_INLINE IntVec<Real> outside_unit(Vec<Real> x) { return ~((x >= 0) & (x <= 1)); }

template <class Real, ElementOp Op, bool kWeighted>
LL_INLINE Vec<Real> value(Vec<Real> x, Vec<Real> t, Vec<Real> w, Vec<Real> pos, Vec<Real> g) {
  using V = Vec<Real>;
  if constexpr (Op == ElementOp::kBceLogits) {
    const V rest = log1p_unit(whole_exp<Real>(-absolute<Real>(x)));
    const V loss = times_zero_safe<Real>(kWeighted ? t * pos : t, maximum<Real>(V{}, -x) + rest) +
                   times_zero_safe<Real>(Real(1) - t, maximum<Real>(V{}, x) + rest);
    return kWeighted ? times_zero_safe<Real>(w, loss) : loss;
  } else if constexpr (Op == ElementOp::kBceLogitsGrad) {
    const V u = whole_exp<Real>(-absolute<Real>(x)), large = Real(1) / (Real(1) + u), small = u * large;
    const V up = x > 0 ? large : small, down = x > 0 ? small : large;
    const V slope = (Real(1) - t) * up - (kWeighted ? t * pos : t) * down;
    return kWeighted ? g * w * slope : g * slope;
  } else if constexpr (Op == ElementOp::kBce) {
    const V least = splat<Real>(-100);
    const V loss =
        t * maximum<Real>(least, log_positive<Real>(x)) + (Real(1) - t) * maximum<Real>(least, log_one_minus<Real>(x));
    return V{} - (kWeighted ? w * loss : loss);  // not -loss: no loss is -0
  } else if constexpr (Op == ElementOp::kBceGrad) {
    const V slope = (x - t) / maximum<Real>(splat<Real>(Real(1e-12)), x * (Real(1) - x));
    return kWeighted ? g * w * slope : g * slope;
  } else if constexpr (Op == ElementOp::kKl) {
    const V log_t = t > 0 ? (t < kInf<Real> ? log_positive<Real>(t) : t) : splat<Real>(kNaN<Real>);
    return t == 0 ? V{} : t * (log_t - x);
  } else if constexpr (Op == ElementOp::kKlGrad) {
    return t == 0 ? V{} : -g * t;
  } else if constexpr (Op == ElementOp::kKlLog) {
    const V e = whole_exp<Real>(t);
    return e == 0 ? V{} : scaled_exp<Real>(t, t - x);  // where e is below the normal range it has few digits
  } else {
    const V e = whole_exp<Real>(t);
    return e == 0 ? V{} : -g * e;
  }
}

// ---- elements between storage and buffers of the compute type -----------------------------------------------------

template <class Real, class T> LL_INLINE Real to_compute(T x) {
  if constexpr (__is_class(T))
    return static_cast<Real>(widen(x));  // half precision
  else
    return static_cast<Real>(x);
}

template <class Real, class T> void read_run(const void* data, int64_t offset, int64_t stride, int64_t n, Real* out) {
  const T* p = static_cast<const T*>(data) + offset;
  if constexpr (__is_class(T) && sizeof(Real) == 4) {
    if (stride == 1) {
      int64_t i = 0;
      for (; i + kLanes<float> <= n; i += kLanes<float>) store(out + i, load(p + i));
      if (i < n) store_partial(out + i, load_partial(p + i, n - i, 0.0f), n - i);
      return;
    }
  }
  if (stride == 0) {
    const Real same = to_compute<Real>(*p);
    for (int64_t i = 0; i < n; ++i) out[i] = same;
  } else if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = to_compute<Real>(p[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = to_compute<Real>(p[i * stride]);
  }
}
template <class Real> void read(const Operand& from, int64_t offset, int64_t stride, int64_t n, Real* out) {
  switch (from.storage) {
    case Storage::kFloat32: return read_run<Real, float>(from.data, offset, stride, n, out);
    case Storage::kBFloat16: return read_run<Real, BFloat16>(from.data, offset, stride, n, out);
    case Storage::kFloat16: return read_run<Real, Float16>(from.data, offset, stride, n, out);
    case Storage::kFloat64: return read_run<Real, double>(from.data, offset, stride, n, out);
    case Storage::kInt64: return read_run<Real, int64_t>(from.data, offset, stride, n, out);
    case Storage::kInt32: return read_run<Real, int32_t>(from.data, offset, stride, n, out);
    case Storage::kInt16: return read_run<Real, int16_t>(from.data, offset, stride, n, out);
    case Storage::kInt8: return read_run<Real, int8_t>(from.data, offset, stride, n, out);
    case Storage::kUInt8: return read_run<Real, uint8_t>(from.data, offset, stride, n, out);
  }
}

template <class T, class Real>
void write_run(void* data, int64_t offset, int64_t stride, int64_t n, const Real* from, bool streaming) {
  T* p = static_cast<T*>(data) + offset;
  if constexpr (__is_same(Compute<T>, Real)) {
    if (stride == 1) {
      constexpr int64_t L = kLanes<Real>, kAlign = L * static_cast<int64_t>(sizeof(T));
      int64_t i = 0;
      if (streaming) {
        const int64_t head =
            static_cast<int64_t>((kAlign - static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)) % kAlign) % kAlign /
                                 static_cast<int64_t>(sizeof(T)));
        if (head && head <= n) store_partial(p, load_partial(from, head, Real(0)), head), i = head;
        if (reinterpret_cast<uintptr_t>(p + i) % kAlign == 0)
          for (; i + L <= n; i += L) stream(p + i, load(from + i));
      }
      for (; i + L <= n; i += L) store(p + i, load(from + i));
      if (i < n) store_partial(p + i, load_partial(from + i, n - i, Real(0)), n - i);
      return;
    }
  }
  for (int64_t i = 0; i < n; ++i) p[i * stride] = narrow<T>(static_cast<double>(from[i]));
}
template <class Real>
void write(const Operand& to, int64_t offset, int64_t stride, int64_t n, const Real* from, bool streaming) {
  switch (to.storage) {
    case Storage::kFloat32: return write_run<float>(to.data, offset, stride, n, from, streaming);
    case Storage::kBFloat16: return write_run<BFloat16>(to.data, offset, stride, n, from, streaming);
    case Storage::kFloat16: return write_run<Float16>(to.data, offset, stride, n, from, streaming);
    case Storage::kFloat64: return write_run<double>(to.data, offset, stride, n, from, streaming);
    default: return;  // the module takes floating outputs only
  }
}

// Where a chunk of elements begins, and how many rows it crosses.
struct Place {
  int64_t begin;  // in the order of the call's sizes, the innermost fastest
  int64_t count;
  int64_t at[kMaxDims];  // the coordinates of `begin`
};

// Calls run(offset, stride, first, n) for each stretch of the chunk that the operand reaches with one stride.
template <class F>
LL_INLINE void stretches(const ElementwiseArgs& a, const Operand& o, bool dense, const Place& place, const F& run) {
  if (dense) return run(place.begin, int64_t{1}, int64_t{0}, place.count);
  int64_t at[kMaxDims];
  int64_t offset = 0;
  for (int d = 0; d < a.dims; ++d) at[d] = place.at[d], offset += at[d] * o.strides[d];
  for (int64_t done = 0; done < place.count;) {
    const int64_t left = a.sizes[0] - at[0], n = left < place.count - done ? left : place.count - done;
    run(offset, o.strides[0], done, n);
    done += n;
    if (done == place.count) return;
    offset -= at[0] * o.strides[0];
    at[0] = 0;
    for (int d = 1; d < a.dims; ++d) {
      offset += o.strides[d];
      if (++at[d] < a.sizes[d]) break;
      offset -= a.sizes[d] * o.strides[d];
      at[d] = 0;
    }
  }
}

inline bool is_dense(const ElementwiseArgs& a, const Operand& o) {
  int64_t expected = 1;
  for (int d = 0; d < a.dims; ++d) {
    if (o.strides[d] != expected) return false;
    expected *= a.sizes[d];
  }
  return true;
}

// An operand's elements of the current chunk, in place where they lie there in the compute type, or in a buffer.
template <class Real> struct Source {
  const Operand* operand;
  bool dense, same, in_place;
  Real scale;  // still to be applied to what fetch() gives
  alignas(LL_BYTES) Real buffer[kChunk<Real>];

  // `absent` is the value of an operand that is not given.
  void begin(const ElementwiseArgs& a, const Operand& o, Real absent, double factor = 1.0) {
    operand = &o;
    scale = static_cast<Real>(factor);
    same = true;
    for (int d = 0; d < a.dims && o.data; ++d) same = same && o.strides[d] == 0;
    dense = !same && is_dense(a, o);
    in_place = o.storage == (sizeof(Real) == 4 ? Storage::kFloat32 : Storage::kFloat64);
    if (!same) return;
    Real all = absent;
    if (o.data) read<Real>(o, 0, 0, 1, &all);
    all = static_cast<Real>(all * factor);
    scale = Real(1);
    for (int64_t i = 0; i < kChunk<Real>; ++i) buffer[i] = all;
  }
  const Real* fetch(const ElementwiseArgs& a, const Place& place) {
    if (same) return buffer;
    if (in_place && (dense || (operand->strides[0] == 1 && place.at[0] + place.count <= a.sizes[0]))) {
      int64_t offset = place.begin;
      if (!dense) {
        offset = 0;
        for (int d = 0; d < a.dims; ++d) offset += place.at[d] * operand->strides[d];
      }
      return static_cast<const Real*>(operand->data) + offset;
    }
    stretches(a, *operand, dense, place, [&](int64_t offset, int64_t stride, int64_t first, int64_t n) {
      read<Real>(*operand, offset, stride, n, buffer + first);
    });
    return buffer;
  }
};

// Lanes added up in double.
template <class Real> struct DoubleSum;
template <> struct DoubleSum<double> {
  Vec<double> lanes{};
  LL_INLINE void add(Vec<double> x) { lanes += x; }
  LL_INLINE double total() const { return sum_of_lanes(lanes); }
};
template <> struct DoubleSum<float> {
  Vec<double> low{}, high{};
  LL_INLINE void add(Vec<float> x) {
#if defined(__AVX512F__)
    low += Vec<double>(_mm512_cvtps_pd(_mm512_castps512_ps256(x)));
    high += Vec<double>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
#elif defined(__AVX2__)
    low += Vec<double>(_mm256_cvtps_pd(_mm256_castps256_ps128(x)));
    high += Vec<double>(_mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
#else
    for (int i = 0; i < kLanes<double>; ++i) low[i] += x[i], high[i] += x[i + kLanes<double>];
#endif
  }
  LL_INLINE double total() const { return sum_of_lanes(low) + sum_of_lanes(high); }
};

// ---- the loop -----------------------------------------------------------------------------------------------------

constexpr bool is_gradient(ElementOp op) {
  return op == ElementOp::kBceLogitsGrad || op == ElementOp::kBceGrad || op == ElementOp::kKlGrad ||
         op == ElementOp::kKlLogGrad;
}
constexpr bool reads_input(ElementOp op) { return op != ElementOp::kKlGrad && op != ElementOp::kKlLogGrad; }

template <class Real, ElementOp Op, bool kWeighted> struct Loop {
  using V = Vec<Real>;
  static constexpr int L = kLanes<Real>;
  const ElementwiseArgs& args;
  bool streaming, out_dense;

  struct Tally {
    DoubleSum<Real> sum;
    IntVec<Real> outside_input{}, outside_target{};
  };

  template <bool kSum>
  static void compute(const Real* x, const Real* t, const Real* w, const Real* pos, const Real* g, Real g_scale,
                      Real* out, int64_t n, Tally& tally) {
    const auto step = [&](int64_t i, int64_t valid) __attribute__((always_inline)) {
      const auto get = [&](const Real* p, Real fill) __attribute__((always_inline)) {
        return valid >= L ? load(p + i) : load_partial(p + i, valid, fill);
      };
      V xs{}, ws{}, ps{}, gs{};
      if constexpr (reads_input(Op)) xs = get(x, Real(0));
      const V ts = get(t, Real(0));
      if constexpr (kWeighted) ws = get(w, Real(0)), ps = get(pos, Real(0));
      if constexpr (is_gradient(Op)) gs = get(g, Real(0)) * g_scale;
      if constexpr (Op == ElementOp::kBce) {
        tally.outside_input |= outside_unit<Real>(xs);
        tally.outside_target |= outside_unit<Real>(ts);
      }
      const V v = value<Real, Op, kWeighted>(xs, ts, ws, ps, gs);
      if constexpr (kSum)
        tally.sum.add(valid >= L ? v : (lane_index<Real>() < static_cast<IntOf<Real>>(valid) ? v : V{}));
      else if (valid >= L)
        store(out + i, v);
      else
        store_partial(out + i, v, valid);
    };
    int64_t i = 0;
    for (; i + L <= n; i += L) step(i, L);
    if (i < n) step(i, n - i);
  }

  void item(int64_t begin, int64_t end, double* sum, int* outside) const {
    Source<Real> x, t, w, pos, g;
    if constexpr (reads_input(Op)) x.begin(args, args.input, Real(0));
    t.begin(args, args.target, Real(0));
    if constexpr (kWeighted) w.begin(args, args.weight, Real(1)), pos.begin(args, args.pos_weight, Real(1));
    if constexpr (is_gradient(Op)) g.begin(args, args.upstream, Real(1), args.scale);
    alignas(LL_BYTES) Real staged[kChunk<Real>];
    const Real g_scale = is_gradient(Op) ? g.scale : Real(1);
    Tally tally{};
    const bool out_in_place =
        args.out.data && !streaming && args.out.storage == (sizeof(Real) == 4 ? Storage::kFloat32 : Storage::kFloat64);
    const bool by_row = args.dims > 1 && args.sizes[0] >= kShortRow;
    Place place;
    for (place.begin = begin; place.begin < end; place.begin += place.count) {
      int64_t left = place.begin;
      for (int d = 0; d + 1 < args.dims; ++d) place.at[d] = left % args.sizes[d], left /= args.sizes[d];
      place.at[args.dims - 1] = left;
      place.count = end - place.begin < kChunk<Real> ? end - place.begin : kChunk<Real>;
      if (by_row && args.sizes[0] - place.at[0] < place.count) place.count = args.sizes[0] - place.at[0];
      const Real* xs = nullptr;
      const Real *ws = nullptr, *ps = nullptr, *gs = nullptr;
      if constexpr (reads_input(Op)) xs = x.fetch(args, place);
      const Real* ts = t.fetch(args, place);
      if constexpr (kWeighted) ws = w.fetch(args, place), ps = pos.fetch(args, place);
      if constexpr (is_gradient(Op)) gs = g.fetch(args, place);
      if (!args.out.data) {
        compute<true>(xs, ts, ws, ps, gs, g_scale, nullptr, place.count, tally);
      } else if (out_in_place && out_dense) {
        compute<false>(xs, ts, ws, ps, gs, g_scale, static_cast<Real*>(args.out.data) + place.begin, place.count,
                       tally);
      } else {
        compute<false>(xs, ts, ws, ps, gs, g_scale, staged, place.count, tally);
        stretches(args, args.out, out_dense, place, [&](int64_t offset, int64_t stride, int64_t first, int64_t n) {
          write<Real>(args.out, offset, stride, n, staged + first, streaming);
        });
      }
    }
    if (streaming) fence();
    *sum = tally.sum.total();
    *outside = (bits_of<Real>(tally.outside_input) ? 1 : 0) | (bits_of<Real>(tally.outside_target) ? 2 : 0);
  }

  void run() {
    int64_t elements = 1;
    for (int d = 0; d < args.dims; ++d) elements *= args.sizes[d];
    const int64_t bytes = elements * static_cast<int64_t>(sizeof(Real)), items = (elements + kItem - 1) / kItem;
    out_dense = args.out.data && is_dense(args, args.out);
    streaming = args.out.data && bytes >= kStreamBytes;
    *args.sum = 0;
    *args.outside = 0;
    if (!items) return;
    if (items == 1) return item(0, elements, args.sum, args.outside);
    struct Partial {
      double sum;
      int outside;
    };
    Partial* partial = static_cast<Partial*>(__builtin_malloc(static_cast<size_t>(items) * sizeof(Partial)));
    const auto run_item = [&](int64_t i, Partial* p) {
      item(i * kItem, (i + 1) * kItem < elements ? (i + 1) * kItem : elements, &p->sum, &p->outside);
    };
    if (partial) parallel_for(items, args.threads, 4 * bytes, [&](int64_t i) { run_item(i, partial + i); });
    for (int64_t i = 0; i < items; ++i) {
      Partial alone;
      if (!partial) run_item(i, &alone);  // no memory even for these: the same sum, serially
      const Partial& p = partial ? partial[i] : alone;
      *args.sum += p.sum, *args.outside |= p.outside;
    }
    __builtin_free(partial);
  }
};

template <class Real, ElementOp Op> void pick_weighted(const ElementwiseArgs& a) {
  constexpr bool may_weigh = Op == ElementOp::kBceLogits || Op == ElementOp::kBceLogitsGrad || Op == ElementOp::kBce ||
                             Op == ElementOp::kBceGrad;
  if constexpr (may_weigh) {
    if (a.weight.data || a.pos_weight.data) return Loop<Real, Op, true>{a, false, false}.run();
  }
  Loop<Real, Op, false>{a, false, false}.run();
}

template <class Real> void pick(const ElementwiseArgs& a) {
  switch (a.op) {
    case ElementOp::kBceLogits: return pick_weighted<Real, ElementOp::kBceLogits>(a);
    case ElementOp::kBceLogitsGrad: return pick_weighted<Real, ElementOp::kBceLogitsGrad>(a);
    case ElementOp::kBce: return pick_weighted<Real, ElementOp::kBce>(a);
    case ElementOp::kBceGrad: return pick_weighted<Real, ElementOp::kBceGrad>(a);
    case ElementOp::kKl: return pick_weighted<Real, ElementOp::kKl>(a);
    case ElementOp::kKlGrad: return pick_weighted<Real, ElementOp::kKlGrad>(a);
    case ElementOp::kKlLog: return pick_weighted<Real, ElementOp::kKlLog>(a);
    case ElementOp::kKlLogGrad: return pick_weighted<Real, ElementOp::kKlLogGrad>(a);
  }
}

}  // namespace

void elementwise(const ElementwiseArgs& a) {
  if (a.wide)
    pick<double>(a);
  else
    pick<float>(a);
}

}  // namespace logitless::LL_ISA
