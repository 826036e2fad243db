// A tile of a product: kRows by kColumns<T> sums that stay in registers while the depth runs.
//
// Formula: c[i, j] (+)= sum over the depth of a[i, k] b[k, j], of up to kRows rows and kColumns<T> columns.
//
// Layout: a panel of a and a panel of b (pack.h), and a corner of c with consecutive columns. kColumns<T> are two
// vectors; each row has two vectors of sums, and each unit of depth is one multiplication of the row's unit, in all
// lanes, by each of the two vectors of b.
//
// Precision policy: sums are in double of doubles, else in float, in the order of the depth, whatever the factors and
// the result are. Of bfloat16 an instruction adds two products to a sum (AVX-512 BF16).
//
// Steps: 1. The sums begin at 0. 2. For each unit of depth, ask memory for a line that will be needed, and multiply. 3.
// Add c where it is accumulated, and store.
#pragma once

#include "product/pack.h"

namespace logitless::LL_ISA {
namespace {  // local to the kernel that includes this, as the kernel itself is

#if defined(__AVX512F__)
inline constexpr int kRows = 14;  // of 32 registers: 28 vectors of sums, two of b, two for a
#elif defined(__AVX2__)
inline constexpr int kRows = 6;  // of 16 registers: 12 vectors of sums
#else
inline constexpr int kRows = 4;
#endif
template <class T> inline constexpr int kColumns = 2 * kLanes<Compute<T>>;
inline constexpr int64_t kLine = 64;  // bytes of a cache line

// sum + a b, where a is one unit for all lanes. The first argument says what the units are.
template <class Real> LL_INLINE Vec<Real> multiply_add(Real, const Unit<Real>* a, Vec<Real> b, Vec<Real> sum) {
  Real value;
  memcpy(&value, a, sizeof value);
  return splat(value) * b + sum;
}
#if defined(__AVX512F__)
__attribute__((target("avx512bf16")))
LL_INLINE Vec<float> multiply_add(BFloat16, const Unit<BFloat16>* a, Vec<float> b, Vec<float> sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(*a)), (__m512bh)b);
}
#endif

// What memory is to be asked for before it is packed: a sheet of `lines` cache lines side by side in each of `rows`
// rows. A tile asks for one line of as many rows as it has depth, so that the sheet is cut into parts.
struct Sheet {
  const char* from;
  int64_t row_bytes, rows, lines;
  LL_INLINE int64_t parts(int64_t depth) const { return lines * pieces(rows, depth); }
};
// One such part: a line, and how far the next one is.
struct Ahead {
  const char* from;
  int64_t step;
};
LL_INLINE Ahead part_of(const Sheet& sheet, int64_t part, int64_t depth) {
  const char* const from = sheet.from + part % sheet.lines * kLine + part / sheet.lines * depth * sheet.row_bytes;
  return {from, sheet.row_bytes};
}

// How many columns of c there are from the tile's first on, and whether its sums are added to what c has.
struct Corner {
  int64_t columns;
  bool accumulate;
};

// 3. Up to a vector of columns of one row.
template <class Out> LL_INLINE void put(Out* c, Vec<Compute<Out>> sum, int64_t count, bool accumulate) {
  if (count <= 0) return;
  if (count >= kLanes<Compute<Out>>) {
    if (accumulate) sum += load(c);
    store(c, sum);
  } else {
    if (accumulate) sum += load_partial(c, count, Compute<Out>{});
    store_partial(c, sum, count);
  }
}

// A tile of kTall rows; `depth` in units.
template <class T, int kTall, class Out>
#if defined(__AVX512F__)
__attribute__((target("avx512bf16")))
#endif
void sums_of(int64_t depth, const Unit<T>* a, const Unit<T>* b, Out* c, int64_t c_row_stride, Corner corner,
             Ahead ahead) {
  using Sum = Vec<Compute<T>>;
  constexpr int kWide = kLanes<Compute<T>>;
  // 1.
  Sum left[kTall], right[kTall];
  LL_UNROLL
  for (int i = 0; i < kTall; ++i) left[i] = right[i] = Sum{};
  // 2. What is in no cache is asked for a line or two at a time, first the rows of c and then what is packed next: more
  // at once would keep the panels waiting.
  const char* line = reinterpret_cast<const char*>(c);
  int64_t to_next = c_row_stride * static_cast<int64_t>(sizeof(Out));
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(line);
    __builtin_prefetch(line + kColumns<T> * sizeof(Out) - 1);
    line += to_next;
    if (k == kTall - 1) {
      line = ahead.from;
      to_next = ahead.step;
    }
    Sum first, second;
    memcpy(&first, b, LL_BYTES);
    memcpy(&second, b + kWide, LL_BYTES);
    LL_UNROLL
    for (int i = 0; i < kTall; ++i) {
      left[i] = multiply_add(T{}, a + i, first, left[i]);
      right[i] = multiply_add(T{}, a + i, second, right[i]);
    }
    a += kTall;
    b += kColumns<T>;
  }
  // 3.
  LL_UNROLL
  for (int i = 0; i < kTall; ++i) {
    put(c + i * c_row_stride, left[i], corner.columns, corner.accumulate);
    put(c + i * c_row_stride + kWide, right[i], corner.columns - kWide, corner.accumulate);
  }
}

// A tile of `tall` rows, at most kRows: one function for each number, so that the rows are registers.
template <class T, class Out, int kTall = kRows>
LL_INLINE void sums_of_height(int64_t tall, int64_t depth, const Unit<T>* a, const Unit<T>* b, Out* c,
                              int64_t c_row_stride, Corner corner, Ahead ahead) {
  if (tall == kTall) return sums_of<T, kTall>(depth, a, b, c, c_row_stride, corner, ahead);
  if constexpr (kTall > 1) sums_of_height<T, Out, kTall - 1>(tall, depth, a, b, c, c_row_stride, corner, ahead);
}

}  // namespace
}  // namespace logitless::LL_ISA
