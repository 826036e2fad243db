// Matrix products of a head, in the shapes in which a head has them: one side of tens of thousands, two of hundreds.
//
// As in Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008): both factors are packed into
// panels of the order in which they are read, and a tile of the result stays in registers while the depth runs. A panel
// element is 32 bits: a float, or two bfloat16 of consecutive depth.
//
// Precision policy: factors are float32, or bfloat16; a float32 a beside a bfloat16 b is rounded as it is packed, to
// the nearest even. Sums are in float32, in the order of the depth, cut every kDepth elements where the result is
// float32. A sum does not depend on the number of threads nor on where tiles begin.
#include "product/product.h"

#include <omp.h>

#include <new>

#include "kernels.h"
#include "memory/pool.h"
#include "parallel.h"
#include "simd/vec.h"

namespace logitless::LL_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 14;  // 28 vectors of sums, two of b, two for a
#elif defined(__AVX2__)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;
#endif
constexpr int kColumns = 2 * kLanes<float>;
constexpr int64_t kDepth = 576;  // units; a panel of b and kTilesAnItem of a then stay in the second cache
constexpr int64_t kPackedWhole =
    1 << 21;  // units of b, 8 MB: packed for all threads if that is all of it, else by each
constexpr int64_t kReadUnits = 8, kItemUnits = 32;  // of depth: read at a time, and packed by a thread
constexpr int64_t kLine = 64;                       // bytes of a cache line
constexpr int64_t kTilesAnItem = 24;                // panels of a that are packed together

using Unit = uint32_t;

template <class T> inline constexpr int64_t kPerUnit = sizeof(Unit) / sizeof(T);

LL_INLINE int64_t units(int64_t elements, int64_t each) { return (elements + each - 1) / each; }
LL_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

LL_INLINE Vec<float> multiply_add(float, const Unit* a, Vec<float> b, Vec<float> sum) {
  float value;
  memcpy(&value, a, sizeof value);
  return (value - Vec<float>{}) * b + sum;
}
#if defined(__AVX512F__)
__attribute__((target("avx512bf16")))
LL_INLINE Vec<float> multiply_add(BFloat16, const Unit* a, Vec<float> b, Vec<float> sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(*a)), (__m512bh)b);
}
#endif

template <class T> struct Factor {  // as rows of a panel ("lanes") by depth
  const T* data;
  int64_t lane_stride, depth_stride;
};

template <class T, class S> LL_INLINE T element(S value) {
  if constexpr (__is_same(T, S))
    return value;
  else
    return narrow<T>(static_cast<double>(value));
}
template <class T, class S> LL_INLINE Unit unit_at(const S* p, int64_t depth_stride, int64_t left) {
  T values[kPerUnit<T>] = {};
  for (int64_t i = 0; i < kPerUnit<T> && i < left; ++i) values[i] = element<T>(p[i * depth_stride]);
  Unit unit;
  memcpy(&unit, values, sizeof unit);
  return unit;
}

#if defined(__AVX512F__)
// Sixteen lanes of sixteen consecutive units each, to sixteen units of sixteen lanes each.
LL_INLINE void transpose(const Unit* (&lanes)[16], __m512i (&out)[16]) {
  __m512i quads[16];
  // Row i of group g holds four units of lanes g, g + 4, g + 8, g + 12: loads do a part of the work of shuffles.
  LL_UNROLL
  for (int g = 0; g < 4; ++g) {
    LL_UNROLL
    for (int i = 0; i < 4; ++i) {
      const auto four = [&](int lane) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(lanes[lane] + 4 * g));
      };
      __m512i v = _mm512_castsi128_si512(four(i));
      v = _mm512_inserti32x4(v, four(4 + i), 1);
      v = _mm512_inserti32x4(v, four(8 + i), 2);
      quads[4 * g + i] = _mm512_inserti32x4(v, four(12 + i), 3);
    }
  }
  LL_UNROLL
  for (int g = 0; g < 4; ++g) {
    const __m512i* q = quads + 4 * g;
    const __m512i low01 = _mm512_unpacklo_epi32(q[0], q[1]), high01 = _mm512_unpackhi_epi32(q[0], q[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(q[2], q[3]), high23 = _mm512_unpackhi_epi32(q[2], q[3]);
    out[4 * g] = _mm512_unpacklo_epi64(low01, low23);
    out[4 * g + 1] = _mm512_unpackhi_epi64(low01, low23);
    out[4 * g + 2] = _mm512_unpacklo_epi64(high01, high23);
    out[4 * g + 3] = _mm512_unpackhi_epi64(high01, high23);
  }
}

// Of sixteen consecutive lanes those in `mask`, as 16 bits each.
template <class T, class S> LL_INLINE __m512i read_lanes(const S* p, __mmask16 mask) {
  if constexpr (__is_same(T, S))
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
  else
    return reinterpret_cast<__m512i>(rounded_to_bfloat16(_mm512_maskz_loadu_ps(mask, p)) >> 16) &
           _mm512_set1_epi32(0xffff);
}
LL_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0);
}
#endif

// `lanes` lanes (the rest of `width` are 0) by depth, to panel[unit][width].
template <class T, class S> LL_INLINE void pack(Factor<S> from, int64_t lanes, int64_t depth, int width, Unit* panel) {
  const int64_t whole = depth / kPerUnit<T>, all = units(depth, kPerUnit<T>);
  int64_t done = 0;  // units
#if defined(__AVX512F__)
  if (from.depth_stride == 1) {
    for (; done + 16 <= whole; done += 16) {
      for (int first = 0; first < width; first += 16) {
        alignas(64) static constexpr Unit kNone[16] = {};
        alignas(64) Unit rounded[16][16];
        const Unit* starts[16];
        LL_UNROLL
        for (int i = 0; i < 16; ++i) {
          const S* const start = from.data + (first + i) * from.lane_stride + done * kPerUnit<T>;
          if (first + i >= lanes) {
            starts[i] = kNone;
          } else if constexpr (__is_same(T, S)) {
            starts[i] = reinterpret_cast<const Unit*>(start);
          } else {
            store(reinterpret_cast<T*>(rounded[i]), load(start));
            store(reinterpret_cast<T*>(rounded[i]) + kLanes<float>, load(start + kLanes<float>));
            starts[i] = rounded[i];
          }
        }
        __m512i out[16];
        transpose(starts, out);
        LL_UNROLL
        for (int k = 0; k < 16; ++k)
          _mm512_mask_storeu_epi32(panel + (done + k) * width + first, first_lanes(width - first), out[k]);
      }
    }
  } else {
    for (; done < whole; ++done) {
      for (int first = 0; first < width; first += 16) {
        const __mmask16 there = first_lanes(lanes - first);
        const S* p = from.data + done * kPerUnit<T> * from.depth_stride + first;
        __m512i v;
        if constexpr (kPerUnit<T> == 1)
          v = _mm512_maskz_loadu_epi32(there, p);
        else
          v = _mm512_or_si512(read_lanes<T>(p, there),
                              _mm512_slli_epi32(read_lanes<T>(p + from.depth_stride, there), 16));
        _mm512_mask_storeu_epi32(panel + done * width + first, first_lanes(width - first), v);
      }
    }
  }
#endif
  for (; done < all; ++done) {
    const int64_t at = done * kPerUnit<T>;
    for (int i = 0; i < width; ++i)
      panel[done * width + i] = i < lanes ? unit_at<T>(from.data + at * from.depth_stride + i * from.lane_stride,
                                                       from.depth_stride, depth - at)
                                          : 0;
  }
}

// Panels of consecutive lanes. Where lanes are consecutive in memory a few units of every panel are read at a time: a
// panel alone would ask for a line here and there, each of them late.
template <class T, class S, class Lanes>
LL_INLINE void pack_panels(Factor<S> from, int64_t panels, const Lanes& first_lane, int64_t depth, int width, Unit* to,
                           int64_t apart) {
  const int64_t at_once = from.depth_stride == 1 ? depth : kReadUnits * kPerUnit<T>;
  for (int64_t k = 0; k < depth; k += at_once) {
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t lane = first_lane(p), lanes = first_lane(p + 1) - lane;
      const int tall = width ? width : static_cast<int>(lanes);
      pack<T>(
          Factor<S>{from.data + lane * from.lane_stride + k * from.depth_stride, from.lane_stride, from.depth_stride},
          lanes, lesser(at_once, depth - k), tall, to + p * apart + k / kPerUnit<T> * tall);
    }
  }
}

struct Corner {
  int64_t columns;
  bool accumulate;
};

// What is to be asked for before it is packed, `lines` cache lines side by side in each of `rows` rows: a tile asks for
// one line of as many rows as it has depth.
struct Sheet {
  const char* from;
  int64_t row_bytes, rows, lines;
  LL_INLINE int64_t parts(int64_t depth) const { return lines * units(rows, depth); }
};
struct Ahead {
  const char* from;
  int64_t step;
};
LL_INLINE Ahead part_of(const Sheet& sheet, int64_t part, int64_t depth) {
  return {sheet.from + part % sheet.lines * kLine + part / sheet.lines * depth * sheet.row_bytes, sheet.row_bytes};
}

template <class Out> LL_INLINE void put(Out* c, Vec<float> sum, int64_t count, bool accumulate) {
  if (count <= 0) return;
  if (count >= kLanes<float>) {
    if (accumulate) sum += load(c);
    store(c, sum);
  } else {
    if (accumulate) sum += load_partial(c, count, 0.0f);
    store_partial(c, sum, count);
  }
}

// kTall rows of kColumns columns.
template <class T, int kTall, class Out>
#if defined(__AVX512F__)
__attribute__((target("avx512bf16")))
#endif
void sums_of(int64_t depth, const Unit* a, const Unit* b, Out* c, int64_t c_row_stride, Corner corner, Ahead ahead) {
  Vec<float> left[kTall], right[kTall];
  LL_UNROLL
  for (int i = 0; i < kTall; ++i) left[i] = right[i] = Vec<float>{};
  // What is in no cache is asked for a line or two at a time: more at once would keep the panels waiting.
  const char* line = reinterpret_cast<const char*>(c);
  int64_t to_next = c_row_stride * static_cast<int64_t>(sizeof(Out));
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(line);
    __builtin_prefetch(line + kColumns * sizeof(Out) - 1);
    line += to_next;
    if (k == kTall - 1) line = ahead.from, to_next = ahead.step;
    Vec<float> first, second;
    memcpy(&first, b, LL_BYTES);
    memcpy(&second, b + kLanes<float>, LL_BYTES);
    LL_UNROLL
    for (int i = 0; i < kTall; ++i) {
      left[i] = multiply_add(T{}, a + i, first, left[i]);
      right[i] = multiply_add(T{}, a + i, second, right[i]);
    }
    a += kTall;
    b += kColumns;
  }
  LL_UNROLL
  for (int i = 0; i < kTall; ++i) {
    put(c + i * c_row_stride, left[i], corner.columns, corner.accumulate);
    put(c + i * c_row_stride + kLanes<float>, right[i], corner.columns - kLanes<float>, corner.accumulate);
  }
}

template <class T, class Out, int kTall = kRows>
LL_INLINE void sums_of_height(int64_t tall, int64_t depth, const Unit* a, const Unit* b, Out* c, int64_t c_row_stride,
                              Corner corner, Ahead ahead) {
  if (tall == kTall) return sums_of<T, kTall>(depth, a, b, c, c_row_stride, corner, ahead);
  if constexpr (kTall > 1) sums_of_height<T, Out, kTall - 1>(tall, depth, a, b, c, c_row_stride, corner, ahead);
}

// A range of tiles of the result, down and across.
struct Range {
  int64_t top, bottom, left, right;
};

// c (+)= a b, T the factors' type as multiplied, A as a is stored. Where all of b may be packed at once it is, for all
// threads, and they take rows by turns; else each has its own part of the result, and packs what that needs.
template <class T, class A, class Out> struct Product {
  const ProductArgs& args;
  const Factor<A> a{static_cast<const A*>(args.a), args.a_row_stride, args.a_depth_stride};
  const Factor<T> b{static_cast<const T*>(args.b), args.b_column_stride, args.b_depth_stride};
  const int64_t threads = args.threads > 1 ? args.threads : 1;
  const int64_t tiles_down = units(args.rows, kRows), tiles_across = units(args.columns, kColumns);
  // The depth is cut into even steps of whole units, one where sums in less than float32 could not go on from step to
  // step.
  const int64_t deep = units(args.depth, kPerUnit<T>);
  const int64_t steps = sizeof(Out) < sizeof(float) ? 1 : units(deep, kDepth);
  const int64_t step_units = units(deep, steps), step = step_units * kPerUnit<T>;
  const int64_t bytes = args.rows * args.columns * static_cast<int64_t>(sizeof(Out)) +
                        args.depth * (args.rows + args.columns) * static_cast<int64_t>(sizeof(T));

  void run() const {
    const int64_t panel_units = kColumns * step_units, a_units = lesser(kTilesAnItem, tiles_down) * kRows * step_units;
    const bool whole =
        steps * tiles_across * panel_units <= kPackedWhole && (steps == 1 || tiles_down >= kTilesAnItem * threads);
    int64_t down = threads, across = 1;  // of the grid of the threads' parts
    if (!whole) grid(down, across);
    const int64_t shared_units = whole ? steps * tiles_across * panel_units : 0;
    const int64_t own_units = a_units + (whole ? 0 : units(tiles_across, across) * panel_units);
    Unit* const packed =
        static_cast<Unit*>(pool_acquire(static_cast<size_t>(shared_units + threads * own_units) * sizeof(Unit)));
    if (!packed) throw std::bad_alloc();
    const auto own = [&] { return packed + shared_units + omp_get_thread_num() * own_units; };
    if (whole) {
      const int64_t parts = units(step_units, kItemUnits);
      parallel_for(parts * steps, args.threads, bytes, [&](int64_t i) {
        const int64_t s = i / parts;
        pack_columns(s, i % parts * kItemUnits, kItemUnits, 0, tiles_across, packed + s * tiles_across * panel_units);
      });
      const int64_t items =
          tiles_down < threads * kTilesAnItem ? lesser(threads, tiles_down) : units(tiles_down, kTilesAnItem);
      parallel_for(items, args.threads, bytes, [&](int64_t i) {
        const auto rows_of = [&](int64_t item) { return tiles_down * lesser(item, items) / items; };
        const Sheet next = sheet_of(a, row_of(rows_of(i + threads)), row_of(rows_of(i + threads + 1)), 0, args.depth);
        multiply({rows_of(i), rows_of(i + 1), 0, tiles_across}, 0, steps, packed, own(), next, Sheet{});
      });
    } else {
      parallel_for(down * across, args.threads, bytes, [&](int64_t i) {
        const int64_t y = i / across, x = i % across;
        const Range range{tiles_down * y / down, tiles_down * (y + 1) / down, tiles_across * x / across,
                          tiles_across * (x + 1) / across};
        Unit* const columns = own() + a_units;
        for (int64_t s = 0; s < steps; ++s) {
          pack_columns(s, 0, step_units, range.left, range.right, columns);
          const int64_t begin = lesser((s + 1) * step, args.depth), end = lesser((s + 2) * step, args.depth);
          multiply(range, s, 1, columns, own(), sheet_of(a, row_of(range.top), row_of(range.bottom), begin, end),
                   sheet_of(b, range.left * kColumns, lesser(range.right * kColumns, args.columns), begin, end));
        }
      });
    }
    pool_release(packed);
  }

  // Of the ways to lay as many parts as there are threads the one whose largest part is least; of those the widest.
  void grid(int64_t& down, int64_t& across) const {
    int64_t least = units(tiles_down, threads) * tiles_across;
    for (int64_t x = 1; x <= lesser(threads, tiles_across); ++x) {
      if (threads % x) continue;
      const int64_t most = units(tiles_down, threads / x) * units(tiles_across, x);
      if (most <= least) least = most, across = x, down = threads / x;
    }
  }

  int64_t row_of(int64_t tile) const { return args.rows * tile / tiles_down; }
  int64_t depth_of(int64_t s) const { return lesser(step, args.depth - s * step); }

  // `count` units from `skip` on of step s, of the columns of tiles [left, right).
  void pack_columns(int64_t s, int64_t skip, int64_t count, int64_t left, int64_t right, Unit* to) const {
    const int64_t begin = skip * kPerUnit<T>, depth = depth_of(s) - begin;
    if (depth <= 0) return;
    const Factor<T> part{b.data + (s * step + begin) * b.depth_stride, b.lane_stride, b.depth_stride};
    const auto column_of = [&](int64_t across) { return lesser((left + across) * kColumns, args.columns); };
    pack_panels<T>(part, right - left, column_of, lesser(count * kPerUnit<T>, depth), kColumns, to + skip * kColumns,
                   kColumns * step_units);
  }

  // Steps [first, first + count) of a range, whose columns are packed.
  void multiply(const Range& range, int64_t first, int64_t count, const Unit* columns, Unit* rows, const Sheet& next_a,
                const Sheet& next_b) const {
    const int64_t wide = range.right - range.left, turns = (range.bottom - range.top) * wide * count;
    const int64_t parts_a = next_a.parts(step_units), parts = parts_a + next_b.parts(step_units);
    int64_t turn = 0;
    for (int64_t tile = range.top; tile < range.bottom; tile += kTilesAnItem) {
      const int64_t last = lesser(range.bottom, tile + kTilesAnItem);
      for (int64_t s = 0; s < count; ++s) {
        const int64_t depth = depth_of(first + s);
        const Factor<A> part{a.data + (first + s) * step * a.depth_stride, a.lane_stride, a.depth_stride};
        pack_panels<T>(
            part, last - tile, [&](int64_t i) { return row_of(tile + i); }, depth, 0, rows, kRows * step_units);
        for (int64_t across = 0; across < wide; ++across) {
          const int64_t column = (range.left + across) * kColumns;
          const Corner corner{args.columns - column, args.accumulate || first + s > 0};
          const Unit* const panel = columns + (s * wide + across) * kColumns * step_units;
          for (int64_t i = tile; i < last; ++i, ++turn) {
            const int64_t part_now = turn * parts / turns;
            const Ahead ahead = parts == 0           ? Ahead{reinterpret_cast<const char*>(panel), 0}
                                : part_now < parts_a ? part_of(next_a, part_now, step_units)
                                                     : part_of(next_b, part_now - parts_a, step_units);
            sums_of_height<T>(
                row_of(i + 1) - row_of(i), units(depth, kPerUnit<T>), rows + (i - tile) * kRows * step_units, panel,
                static_cast<Out*>(args.c) + row_of(i) * args.c_row_stride + column, args.c_row_stride, corner, ahead);
          }
        }
      }
    }
  }

  // Lanes and depth of a factor as they lie in memory.
  template <class S>
  static Sheet sheet_of(const Factor<S>& factor, int64_t first_lane, int64_t last_lane, int64_t begin, int64_t end) {
    const int64_t lanes = last_lane - first_lane, depth = end - begin, each = static_cast<int64_t>(sizeof(S));
    if (lanes <= 0 || depth <= 0) return {};
    const char* const from =
        reinterpret_cast<const char*>(factor.data + first_lane * factor.lane_stride + begin * factor.depth_stride);
    if (factor.depth_stride == 1) return {from, factor.lane_stride * each, lanes, units(depth * each, kLine)};
    return {from, factor.depth_stride * each, depth, units(lanes * each, kLine)};
  }
};

}  // namespace

void product(const ProductArgs& args) {
  if (args.rows == 0 || args.columns == 0) return;
#if defined(__AVX512F__)
  if (static_cast<DType>(args.b_dtype) == DType::kBFloat16) {
    const bool narrow = static_cast<DType>(args.c_dtype) == DType::kBFloat16;
    if (static_cast<DType>(args.a_dtype) == DType::kBFloat16) {
      if (narrow) return Product<BFloat16, BFloat16, BFloat16>{args}.run();
      return Product<BFloat16, BFloat16, float>{args}.run();
    }
    if (narrow) return Product<BFloat16, float, BFloat16>{args}.run();
    return Product<BFloat16, float, float>{args}.run();
  }
#endif
  Product<float, float, float>{args}.run();
}

}  // namespace logitless::LL_ISA
