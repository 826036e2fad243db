// Packing: a factor of a product, copied into panels of the order in which the tiles read it.
//
// Layout: a factor is a matrix of "lanes" by depth, where the lanes are the rows of a or the columns of b. A panel has
// a few neighbouring lanes (`width` of them) over a stretch of depth, as panel[unit][lane]: first the first unit of
// every lane, then the second of every lane, and so on. A unit is one double, one float, or two bfloat16 of consecutive
// depth, which is what one multiplication takes. So a tile reads its panels from the beginning to the end, each cache
// line once.
//
// Precision policy: doubles and floats are copied. Float16 is widened to float as it is packed. A float factor beside a
// bfloat16 one is rounded as it is packed, to the nearest even.
//
// Steps of pack: where the depth lies consecutively in memory, sixteen lanes of sixteen units each are read and
// transposed in registers; where the lanes do, sixteen lanes are read at a time. Of doubles eight lanes are read at a
// time, wherever they lie. What that leaves, and all of it on other instruction sets, goes one by one.
#pragma once

#include "parallel.h"
#include "simd/load_store.h"

namespace logitless::LL_ISA {
namespace {  // local to the kernel that includes this, as the kernel itself is

template <class T> struct UnitType {
  using type = uint32_t;
};
template <> struct UnitType<double> {
  using type = uint64_t;
};
template <class T> using Unit = typename UnitType<T>::type;

template <class T> inline constexpr int64_t kPerUnit = sizeof(Unit<T>) / sizeof(T);  // elements in a unit

// Units of depth that are read at a time where lanes lie consecutively.
inline constexpr int64_t kReadUnits = 8;

// A factor, or a part of one.
template <class T> struct Factor {
  const T* data;
  int64_t lane_stride, depth_stride;
  LL_INLINE Factor at(int64_t lane, int64_t depth) const {
    return {data + lane * lane_stride + depth * depth_stride, lane_stride, depth_stride};
  }
};

// T: the type that is multiplied; S: the one that is stored.
template <class T, class S> LL_INLINE T element(S value) {
  if constexpr (__is_same(T, S))
    return value;
  else if constexpr (__is_same(S, Float16))
    return load_partial(&value, 1, 0.0f)[0];
  else
    return narrow<T>(static_cast<double>(value));
}
// One unit; of its elements those beyond `left` are 0.
template <class T, class S> LL_INLINE Unit<T> unit_at(const S* p, int64_t depth_stride, int64_t left) {
  T values[kPerUnit<T>] = {};
  for (int64_t i = 0; i < kPerUnit<T> && i < left; ++i) values[i] = element<T>(p[i * depth_stride]);
  Unit<T> unit;
  memcpy(&unit, values, sizeof unit);
  return unit;
}

#if defined(__AVX512F__)

// Sixteen lanes of sixteen consecutive units each, to sixteen units of sixteen lanes each.
LL_INLINE void transpose(const uint32_t* (&lanes)[16], __m512i (&out)[16]) {
  // Vector i of group g gets four units each of lanes i, i + 4, i + 8 and i + 12: loads do a part of the work of
  // shuffles.
  __m512i quads[16];
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
  // Within each 128 bits, a transposition of four by four.
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

LL_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0);
}

// Of sixteen consecutive lanes those in `mask`, as 16 bits each in the lower half of 32.
template <class T, class S> LL_INLINE __m512i read_lanes(const S* p, __mmask16 mask) {
  if constexpr (__is_same(T, S))
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
  else
    return reinterpret_cast<__m512i>(rounded_to_bfloat16(_mm512_maskz_loadu_ps(mask, p)) >> 16) &
           _mm512_set1_epi32(0xffff);
}

// The depth lies consecutively: units in blocks of sixteen, as long as whole blocks are left. Gives how many units are
// done.
template <class T, class S>
LL_INLINE int64_t pack_along_depth(Factor<S> from, int64_t lanes, int64_t whole, int width, Unit<T>* panel) {
  int64_t done = 0;
  for (; done + 16 <= whole; done += 16) {
    for (int first = 0; first < width; first += 16) {
      alignas(64) static constexpr uint32_t kNone[16] = {};
      alignas(64) uint32_t changed[16][16];
      const uint32_t* starts[16];
      LL_UNROLL
      for (int i = 0; i < 16; ++i) {
        const S* const start = from.data + (first + i) * from.lane_stride + done * kPerUnit<T>;
        if (first + i >= lanes) {
          starts[i] = kNone;
        } else if constexpr (__is_same(T, S)) {
          starts[i] = reinterpret_cast<const uint32_t*>(start);
        } else {
          store(reinterpret_cast<T*>(changed[i]), load(start));
          if constexpr (kPerUnit<T> == 2)
            store(reinterpret_cast<T*>(changed[i]) + kLanes<float>, load(start + kLanes<float>));
          starts[i] = changed[i];
        }
      }
      __m512i out[16];
      transpose(starts, out);
      LL_UNROLL
      for (int k = 0; k < 16; ++k)
        _mm512_mask_storeu_epi32(panel + (done + k) * width + first, first_lanes(width - first), out[k]);
    }
  }
  return done;
}

// The lanes lie consecutively: one unit of sixteen lanes at a time, of whole units. Of bfloat16, whose unit is of two
// depths, two reads are joined.
template <class T, class S>
LL_INLINE int64_t pack_along_lanes(Factor<S> from, int64_t lanes, int64_t whole, int width, Unit<T>* panel) {
  int64_t done = 0;
  for (; done < whole; ++done) {
    for (int first = 0; first < width; first += 16) {
      const __mmask16 there = first_lanes(lanes - first);
      const S* p = from.data + done * kPerUnit<T> * from.depth_stride + first;
      __m512i v;
      if constexpr (__is_same(S, Float16)) {
        v = _mm512_castps_si512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, p)));
      } else if constexpr (kPerUnit<T> == 1) {
        v = _mm512_maskz_loadu_epi32(there, p);
      } else {
        const __m512i second = _mm512_slli_epi32(read_lanes<T>(p + from.depth_stride, there), 16);
        v = _mm512_or_si512(read_lanes<T>(p, there), second);
      }
      _mm512_mask_storeu_epi32(panel + done * width + first, first_lanes(width - first), v);
    }
  }
  return done;
}

// Doubles: one unit of eight lanes at a time, gathered where the lanes do not lie consecutively.
LL_INLINE int64_t pack_doubles(Factor<double> from, int64_t lanes, int64_t whole, int width, uint64_t* panel) {
  const __m512i numbers = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i places = _mm512_mullo_epi64(numbers, _mm512_set1_epi64(from.lane_stride));
  int64_t done = 0;
  for (; done < whole; ++done) {
    for (int first = 0; first < width; first += 8) {
      const auto there = static_cast<__mmask8>(first_lanes(lanes - first));
      const auto all = static_cast<__mmask8>(first_lanes(width - first));
      const double* const p = from.at(first, done).data;
      const __m512i v = from.lane_stride == 1
                            ? _mm512_maskz_loadu_epi64(there, p)
                            : _mm512_mask_i64gather_epi64(_mm512_setzero_si512(), there, places, p, sizeof(double));
      _mm512_mask_storeu_epi64(panel + done * width + first, all, v);
    }
  }
  return done;
}

#endif

// `lanes` lanes by `depth` elements to panel[unit][width]; the rest of `width` is 0.
template <class T, class S>
LL_INLINE void pack(Factor<S> from, int64_t lanes, int64_t depth, int width, Unit<T>* panel) {
  int64_t done = 0;  // units
#if defined(__AVX512F__)
  const int64_t whole = depth / kPerUnit<T>;
  if constexpr (__is_same(T, double))
    done = pack_doubles(from, lanes, whole, width, panel);
  else
    done = from.depth_stride == 1 ? pack_along_depth<T>(from, lanes, whole, width, panel)
                                  : pack_along_lanes<T>(from, lanes, whole, width, panel);
#endif
  for (; done < pieces(depth, kPerUnit<T>); ++done) {
    const int64_t at = done * kPerUnit<T>;
    for (int i = 0; i < width; ++i) {
      const S* const p = from.data + at * from.depth_stride + i * from.lane_stride;
      panel[done * width + i] = i < lanes ? unit_at<T>(p, from.depth_stride, depth - at) : 0;
    }
  }
}

// Panels of neighbouring lanes, `apart` units from each other; panel p has the lanes from first_lane(p) to first_lane(p
// + 1), and `width` is theirs unless it is given. Where lanes lie consecutively a few units of every panel are read at
// a time: one panel after the other would ask for a line here and there, each of them late.
template <class T, class S, class Lanes>
LL_INLINE void pack_panels(Factor<S> from, int64_t panels, const Lanes& first_lane, int64_t depth, int width,
                           Unit<T>* to, int64_t apart) {
  const int64_t at_once = from.depth_stride == 1 ? depth : kReadUnits * kPerUnit<T>;
  for (int64_t k = 0; k < depth; k += at_once) {
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t lane = first_lane(p), lanes = first_lane(p + 1) - lane;
      const int panel_width = width ? width : static_cast<int>(lanes);
      pack<T>(from.at(lane, k), lanes, smaller(at_once, depth - k), panel_width,
              to + p * apart + k / kPerUnit<T> * panel_width);
    }
  }
}

}  // namespace
}  // namespace logitless::LL_ISA
