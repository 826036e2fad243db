// int8 rows where the processor multiplies bytes: most rows are passed over by sums of integers, with nothing lost.
//
// Formula: query = s b + rest, with b the nearest bytes and s the largest element over 127. For a row c of length |c|
//
//   query . c / |c| = s (b . c) / |c| + rest . c / |c|        and |rest . c / |c|| <= |rest|   (Cauchy, Schwarz)
//
// so a row whose s (b . c) / |c| is below a query's threshold by more than |rest| is none of its best. The score of any
// other row is summed in double from the query as it is: results are those of the query's own floats.
//
// Layout: as in sweep.h; a unit of depth is four bytes, which one instruction (VPDPBUSD, AVX-512 VNNI) multiplies and
// adds to a sum of 32 bits. It takes unsigned bytes on one side: b + 128, and the sums begin at -128 sum c.
//
// Precision policy: integer sums are exact, for a depth of at most kMostDepth. Rounding in the comparison is allowed
// for by kSlack.
//
// Steps: as in sweep.h, with the comparison in place of the scores, and the scores of what it lets pass.
#pragma once

#include "search/best.h"
#include "search/sweep.h"

namespace logitless::LL_ISA {
namespace {  // local to the kernel that includes this, as the kernel itself is

#if defined(__AVX512F__)

inline constexpr int64_t kMostDepth = 65536;  // 255 * 128 * depth < 2^31
inline constexpr double kSlack = 1e-6;

LL_INLINE bool multiplies_bytes() {
  static const bool has = __builtin_cpu_supports("avx512vnni");
  return has;
}

// A query as bytes, and by how much its score may exceed what they say, in units of s.
struct ByteQuery {
  float inverse_scale, slack;
};

template <int kTall>
__attribute__((target("avx512vnni"))) void byte_sums(int64_t units, const uint32_t* queries, const uint32_t* rows,
                                                     const int32_t* start, int32_t* sums, Ahead ahead) {
  __m512i left[kTall], right[kTall];
  LL_UNROLL
  for (int i = 0; i < kTall; ++i) {
    left[i] = _mm512_loadu_si512(start);
    right[i] = _mm512_loadu_si512(start + 16);
  }
  for (int64_t k = 0; k < units; ++k) {
    __builtin_prefetch(ahead.from);
    __builtin_prefetch(ahead.from + kLine);
    ahead.from += ahead.step;
    const __m512i first = _mm512_loadu_si512(rows), second = _mm512_loadu_si512(rows + 16);
    LL_UNROLL
    for (int i = 0; i < kTall; ++i) {
      const __m512i query = _mm512_set1_epi32(static_cast<int>(queries[i]));
      left[i] = _mm512_dpbusd_epi32(left[i], query, first);
      right[i] = _mm512_dpbusd_epi32(right[i], query, second);
    }
    queries += kTall;
    rows += kAcross;
  }
  LL_UNROLL
  for (int i = 0; i < kTall; ++i) {
    _mm512_storeu_si512(sums + i * kAcross, left[i]);
    _mm512_storeu_si512(sums + i * kAcross + 16, right[i]);
  }
}
template <int kTall = kRows>
LL_INLINE void byte_sums_of_height(int64_t tall, int64_t units, const uint32_t* queries, const uint32_t* rows,
                                   const int32_t* start, int32_t* sums, Ahead ahead) {
  if (tall == kTall) return byte_sums<kTall>(units, queries, rows, start, sums, ahead);
  if constexpr (kTall > 1) byte_sums_of_height<kTall - 1>(tall, units, queries, rows, start, sums, ahead);
}

// The sum of the elements, and of their squares.
LL_INLINE void byte_moments(const int8_t* row, int64_t depth, int64_t& sum, int64_t& squares) {
  __m512i sums = _mm512_setzero_si512(), squared = sums;
  const __m512i ones = _mm512_set1_epi16(1);
  sum = squares = 0;
  for (int64_t i = 0; i < depth; i += 32) {
    const auto there = static_cast<__mmask32>(depth - i >= 32 ? ~0u : (1u << (depth - i)) - 1);
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(there, row + i));
    sums = _mm512_add_epi32(sums, _mm512_madd_epi16(wide, ones));
    squared = _mm512_add_epi32(squared, _mm512_madd_epi16(wide, wide));
  }
  alignas(64) int32_t each[16];
  _mm512_store_si512(each, sums);
  for (int i = 0; i < 16; ++i) sum += each[i];
  _mm512_store_si512(each, squared);
  for (int i = 0; i < 16; ++i) squares += each[i];
}

// The score of one row, from the query's floats.
LL_INLINE float byte_score(const float* query, const int8_t* row, int64_t depth, double inverse) {
  Vec<double> sums[4] = {};
  int64_t i = 0;
  for (; i + 32 <= depth; i += 32) {
    LL_UNROLL
    for (int part = 0; part < 4; ++part) {
      const int64_t at = i + part * 8;
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + at));
      const __m512d values = _mm512_cvtepi32_pd(_mm256_cvtepi8_epi32(bytes));
      sums[part] += Vec<double>(_mm512_cvtps_pd(_mm256_loadu_ps(query + at))) * Vec<double>(values);
    }
  }
  double sum = sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < depth; ++i) sum += static_cast<double>(query[i]) * row[i];
  const float score = static_cast<float>(sum * inverse);
  return score > 1 ? 1.0f : score < -1 ? -1.0f : score;
}

// `units` of a query to to[unit * apart].
inline ByteQuery pack_byte_query(const float* query, int64_t depth, int64_t units, int64_t apart, uint32_t* to) {
  float largest = 0;
  bool finite = true;
  for (int64_t k = 0; k < depth; ++k) {
    const float size = __builtin_fabsf(query[k]);
    finite = finite && size - size == 0;
    largest = size > largest ? size : largest;
  }
  const double scale = finite && largest > 0 ? static_cast<double>(largest) / 127 : 1;
  double rest = 0;
  for (int64_t unit = 0; unit < units; ++unit) {
    uint32_t bytes = 0;
    for (int64_t k = 4 * unit; k < 4 * unit + 4; ++k) {
      const double value = k < depth && finite ? static_cast<double>(query[k]) : 0;
      const int64_t nearest = bounded(static_cast<int64_t>(__builtin_floor(value / scale + 0.5)), -127, 127);
      rest += (value - scale * static_cast<double>(nearest)) * (value - scale * static_cast<double>(nearest));
      bytes |= static_cast<uint32_t>(nearest + 128) << (8 * (k % 4));
    }
    to[unit * apart] = bytes;
  }
  const double slack = finite ? __builtin_sqrt(rest) * 1.0001 + kSlack : static_cast<double>(kInf<float>);
  return {static_cast<float>(1 / scale), static_cast<float>(slack)};
}

// Up to kAcross rows as panel[unit][row].
inline void pack_byte_rows(const int8_t* const* rows, int64_t count, int64_t depth, int64_t units, uint32_t* panel) {
  for (int64_t done = 0; done < units; done += 16) {
    for (int first = 0; first < kAcross; first += 16) {
      alignas(64) uint32_t ends[16][16];
      const uint32_t* starts[16];
      LL_UNROLL
      for (int i = 0; i < 16; ++i) {
        const int64_t left = first + i < count ? smaller(64, depth - 4 * done) : 0;
        if (left == 64) {
          starts[i] = reinterpret_cast<const uint32_t*>(rows[first + i] + 4 * done);
        } else {
          memset(ends[i], 0, sizeof ends[i]);
          if (left > 0) memcpy(ends[i], rows[first + i] + 4 * done, static_cast<size_t>(left));
          starts[i] = ends[i];
        }
      }
      __m512i out[16];
      transpose(starts, out);
      for (int k = 0; k < 16 && done + k < units; ++k)
        _mm512_storeu_si512(panel + (done + k) * kAcross + first, out[k]);
    }
  }
}

// Goes through all rows; best(thread, query) has the threshold, and add(best, query, score, row) takes a row. False:
// the processor does not multiply bytes, or the vectors are too long.
template <class Wanted, class Find, class Add>
bool search_bytes(const Compared& args, const Wanted& wanted, const Find& best, const Add& add) {
  if (!multiplies_bytes() || args.depth > kMostDepth) return false;
  const int8_t* const corpus = static_cast<const int8_t*>(args.corpus);
  const int64_t threads = args.threads > 1 ? args.threads : 1, units = pieces(args.depth, 4);
  const int64_t tiles_down = pieces(args.queries, kRows), panel_units = kAcross * units;
  constexpr int64_t kPanels = 16;
  const int64_t panels = bounded(kPackedBytes / (panel_units * 4), 1, kPanels);
  const auto query_of = [&](int64_t tile) { return args.queries * tile / tiles_down; };
  const Room<uint32_t> queries(tiles_down * kRows * units), packed(threads * panels * panel_units);
  const Room<ByteQuery> slacks(args.queries);
  parallel_for(tiles_down, args.threads, args.queries * args.depth * 4, [&](int64_t down) {
    const int64_t first = query_of(down), tall = query_of(down + 1) - first;
    for (int64_t i = 0; i < tall; ++i)
      slacks.data[first + i] = pack_byte_query(args.query + (first + i) * args.depth, args.depth, units, tall,
                                               queries.data + down * kRows * units + i);
  });
  const int64_t bytes = args.rows * args.depth * (args.queries + 1);
  parallel_stretches(args.rows, panels * kAcross, args.threads, bytes, [&](int64_t begin, int64_t end) {
    const int64_t thread = omp_get_thread_num();
    uint32_t* const own = packed.data + thread * panels * panel_units;
    PanelRows rows[kPanels];
    alignas(64) int32_t starts[kPanels][kAcross], sums[kRows * kAcross];
    alignas(64) float inverse[kPanels][kAcross];
    double exact[kPanels][kAcross];
    int64_t filled = 0;
    while (begin < end) {
      PanelRows& panel = rows[filled];
      const int8_t* places[kAcross];
      for (panel.count = 0; begin < end && panel.count < kAcross; ++begin) {
        if (!wanted(begin)) continue;
        places[panel.count] = corpus + begin * args.row_stride;
        panel.numbers[panel.count++] = begin;
      }
      if (panel.count == 0) break;
      pack_byte_rows(places, panel.count, args.depth, units, own + filled * panel_units);
      for (int64_t i = 0; i < kAcross; ++i) {
        int64_t sum = 0, squares = 0;
        if (i < panel.count) byte_moments(places[i], args.depth, sum, squares);
        starts[filled][i] = static_cast<int32_t>(-128 * sum);
        exact[filled][i] = inverse_length(static_cast<double>(squares));
        inverse[filled][i] = static_cast<float>(exact[filled][i]);
      }
      ++filled;
    }
    const NextRows next = next_rows(args, end, threads, panels, sizeof(int8_t));
    for (int64_t down = 0; down < tiles_down; ++down) {
      const int64_t first = query_of(down), tall = query_of(down + 1) - first;
      for (int64_t p = 0; p < filled; ++p) {
        const uint32_t* const panel = own + p * panel_units;
        const Ahead ahead = down == 0 ? next.of_panel(p, units) : Ahead{reinterpret_cast<const char*>(panel), 0};
        byte_sums_of_height(tall, units, queries.data + down * kRows * units, panel, starts[p], sums, ahead);
        const uint64_t there = (uint64_t{1} << rows[p].count) - 1;
        for (int64_t i = 0; i < tall; ++i) {
          auto& found = best(thread, first + i);
          const ByteQuery& slack = slacks.data[first + i];
          const float limit = (found.threshold - slack.slack) * slack.inverse_scale;
          const auto passing = [&](int half) {
            const __m512 whole = _mm512_cvtepi32_ps(_mm512_load_si512(sums + i * kAcross + half * 16));
            return passing_bits(Vec<float>(whole) * load(inverse[p] + half * 16), limit);
          };
          uint64_t bits = (passing(0) | static_cast<uint64_t>(passing(1)) << 16) & there;
          for (; bits; bits &= bits - 1) {
            const int64_t lane = __builtin_ctzll(bits), number = rows[p].numbers[lane];
            add(found, first + i,
                byte_score(args.query + (first + i) * args.depth, corpus + number * args.row_stride, args.depth,
                           exact[p][lane]),
                number);
          }
        }
      }
    }
  });
  return true;
}

#else

template <class Wanted, class Find, class Add>
bool search_bytes(const Compared&, const Wanted&, const Find&, const Add&) {
  return false;
}

#endif

}  // namespace
}  // namespace logitless::LL_ISA
