// elementwise: binary cross-entropy (of logits, of probabilities) and torch's pointwise KL divergence, with gradients.
// One read of each operand and one write, or none where only the sum is wanted.
//
// Formula: those of ElementOp (elementwise.h), with softplus(x) = max(x, 0) + log1p(exp(-|x|)).
//
// Layout: operands of any storage type and strides, broadcast (operands.h). Work is cut into items of kItem elements in
// the order of the output's memory.
//
// Precision policy: both terms of a loss have one sign, so a loss of 1e-12 is right to a few ulp. sigmoid(x) and
// sigmoid(-x) are each formed from exp(-|x|) without a subtraction. Sums are in double over items that are cut by shape
// alone, so they do not depend on the number of threads.
//
// Steps of an item: 1. Fetch a chunk of each operand. 2. Compute it, a vector at a time; add the elements up, or put
// them into the output or a buffer. 3. Write the buffer where the output has its elements. At the end, the items' sums
// are added in order.
#include "elements/elementwise.h"

#include "elements/element_math.h"
#include "elements/operands.h"
#include "kernels.h"
#include "parallel.h"
#include "simd/sums.h"

namespace logitless::LL_ISA {
namespace {

inline constexpr int64_t kItem = 32 * 1024;        // elements of one parallel item
inline constexpr int64_t kShortRow = 128;          // innermost sizes below this are gathered across rows
inline constexpr int64_t kStreamBytes = 16 << 20;  // an output larger than this bypasses the caches

// A vector of elements: x the input, t the target, w the weight, pos the positive weight, g the upstream gradient.
template <class Real, ElementOp Op, bool kWeighted>
LL_INLINE Vec<Real> value(Vec<Real> x, Vec<Real> t, Vec<Real> w, Vec<Real> pos, Vec<Real> g) {
  using V = Vec<Real>;
  if constexpr (Op == ElementOp::kBceLogits) {
    // softplus(-x) and softplus(x) have log1p(exp(-|x|)) in common.
    const V rest = log1p_unit(whole_exp<Real>(-magnitude<Real>(x)));
    const V loss = times_zero_safe<Real>(kWeighted ? t * pos : t, maximum<Real>(V{}, -x) + rest) +
                   times_zero_safe<Real>(Real(1) - t, maximum<Real>(V{}, x) + rest);
    return kWeighted ? times_zero_safe<Real>(w, loss) : loss;
  } else if constexpr (Op == ElementOp::kBceLogitsGrad) {
    const V u = whole_exp<Real>(-magnitude<Real>(x)), large = Real(1) / (Real(1) + u), small = u * large;
    const V sigmoid = x > 0 ? large : small, sigmoid_of_minus = x > 0 ? small : large;
    const V slope = (Real(1) - t) * sigmoid - (kWeighted ? t * pos : t) * sigmoid_of_minus;
    return kWeighted ? g * w * slope : g * slope;
  } else if constexpr (Op == ElementOp::kBce) {
    const V least = splat<Real>(-100);
    const V loss =
        t * maximum<Real>(least, log_positive<Real>(x)) + (Real(1) - t) * maximum<Real>(least, log_one_minus<Real>(x));
    return V{} - (kWeighted ? w * loss : loss);  // not -loss, which would make -0 of 0
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
    // Not e (t - x): where e is below the normal range it has few digits.
    return e == 0 ? V{} : scaled_exp<Real>(t, t - x);
  } else {
    const V e = whole_exp<Real>(t);
    return e == 0 ? V{} : -g * e;
  }
}

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

  // What is collected of all elements: their sum, and whether any was out of range.
  struct Tally {
    DoubleSum<Real> sum;
    IntVec<Real> outside_input{}, outside_target{};
  };

  // 2. n elements; kSum: only their sum is wanted.
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
      if constexpr (kWeighted) {
        ws = get(w, Real(0));
        ps = get(pos, Real(0));
      }
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

  // Where chunk `place` ends, and its coordinates. Rows long enough are not crossed, so that each is read in place.
  LL_INLINE void locate(Place& place, int64_t end, bool by_row) const {
    int64_t left = place.begin;
    for (int d = 0; d + 1 < args.dims; ++d) {
      place.at[d] = left % args.sizes[d];
      left /= args.sizes[d];
    }
    place.at[args.dims - 1] = left;
    place.count = smaller(end - place.begin, kChunk<Real>);
    if (by_row) place.count = smaller(args.sizes[0] - place.at[0], place.count);
  }

  // Elements [begin, end), a chunk at a time.
  void item(int64_t begin, int64_t end, double* sum, int* outside) const {
    Source<Real> x, t, w, pos, g;
    if constexpr (reads_input(Op)) x.begin(args, args.input, Real(0));
    t.begin(args, args.target, Real(0));
    if constexpr (kWeighted) {
      w.begin(args, args.weight, Real(1));
      pos.begin(args, args.pos_weight, Real(1));
    }
    if constexpr (is_gradient(Op)) g.begin(args, args.upstream, Real(1), args.scale);
    alignas(LL_BYTES) Real staged[kChunk<Real>];
    const Real g_scale = is_gradient(Op) ? g.scale : Real(1);
    Tally tally{};
    const bool out_in_place =
        args.out.data && !streaming && args.out.storage == (sizeof(Real) == 4 ? Storage::kFloat32 : Storage::kFloat64);
    const bool by_row = args.dims > 1 && args.sizes[0] >= kShortRow;
    Place place;
    for (place.begin = begin; place.begin < end; place.begin += place.count) {
      locate(place, end, by_row);
      // 1.
      const Real *xs = nullptr, *ws = nullptr, *ps = nullptr, *gs = nullptr;
      if constexpr (reads_input(Op)) xs = x.fetch(args, place);
      const Real* ts = t.fetch(args, place);
      if constexpr (kWeighted) {
        ws = w.fetch(args, place);
        ps = pos.fetch(args, place);
      }
      if constexpr (is_gradient(Op)) gs = g.fetch(args, place);
      // 2 and 3.
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
    const int64_t bytes = elements * static_cast<int64_t>(sizeof(Real)), items = pieces(elements, kItem);
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
      item(i * kItem, smaller((i + 1) * kItem, elements), &p->sum, &p->outside);
    };
    if (partial) parallel_for(items, args.threads, 4 * bytes, [&](int64_t i) { run_item(i, partial + i); });
    for (int64_t i = 0; i < items; ++i) {
      Partial alone;
      if (!partial) run_item(i, &alone);  // no memory even for these: the same sum, serially
      const Partial& p = partial ? partial[i] : alone;
      *args.sum += p.sum;
      *args.outside |= p.outside;
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
