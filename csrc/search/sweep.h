// The way through all scores of some queries and rows, a tile at a time; whoever sees a tile decides what is kept.
//
// Formula: score[q, r] = clamp(inverse[r] sum_k query[q, k] row[r, k], -1, 1); without the clamp where rows are taken
// as they are.
//
// Layout: the queries are packed once, for all threads, in panels of kRows. Rows are taken by turns, a stretch of
// kPackedBytes at a time, which stays in a thread's second cache while the panels of queries pass by.
//
// Precision policy: as product/tile.h has it: a sum is in float, in the order of the depth, whatever the tile. So a
// score does not depend on the number of queries, rows or threads, nor on where a stretch begins, and equal rows have
// equal scores.
//
// Steps: 1. Pack the queries. 2. For each stretch, pack the rows that `wanted` lets pass. 3. For each panel of queries
// and each panel of rows, compute the tile, and let `each` see the scores of one query at a time, two vectors of them;
// the first of them asks memory for rows that come next.
#pragma once

#include <omp.h>

#include <new>

#include "memory/pool.h"
#include "parallel.h"
#include "search/panels.h"
#include "search/search.h"

namespace logitless::LL_ISA {
namespace {  // local to the kernel that includes this, as the kernel itself is

// Memory from the pool for as long as the block lasts.
template <class T> struct Room {
  T* data;
  explicit Room(int64_t count) : data(static_cast<T*>(pool_acquire(static_cast<size_t>(count + 1) * sizeof(T)))) {
    if (!data) throw std::bad_alloc();
  }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  ~Room() { pool_release(data); }
};

// Two vectors of scores of one query with neighbouring rows of a panel.
struct Scores {
  Vec<float> left, right;
};

// The rows of a panel: their numbers in rising order.
struct PanelRows {
  int64_t numbers[kAcross];
  int64_t count;
};

inline constexpr int64_t kPackedBytes = 384 * 1024;

// The rows that a thread probably takes next. Memory is asked for them while the first panel of queries passes by: with
// few queries it would otherwise be waited for.
struct NextRows {
  const char* from;
  int64_t panel_bytes;
  // Those of panel p, in as many parts as a tile asks for.
  LL_INLINE Ahead of_panel(int64_t p, int64_t units) const { return {from + p * panel_bytes, panel_bytes / units}; }
};
LL_INLINE NextRows next_rows(const Compared& args, int64_t end, int64_t threads, int64_t panels, int64_t size) {
  const int64_t first = smaller(end + (threads - 1) * panels * kAcross, args.rows);
  const int64_t row_bytes = args.row_stride * size;
  return {static_cast<const char*>(args.corpus) + first * row_bytes, kAcross * row_bytes};
}

template <class S> struct Sweep {
  const Compared& args;
  const S* const corpus = static_cast<const S*>(args.corpus);
  const int64_t threads = args.threads > 1 ? args.threads : 1;
  const int64_t tiles_down = pieces(args.queries, kRows);
  const int64_t panel_floats = kAcross * args.depth;
  const int64_t panels = bounded(kPackedBytes / (panel_floats * 4), 1, 16);  // of a stretch
  const int64_t bytes = args.rows * args.depth * (args.queries + 1);

  int64_t query_of(int64_t tile) const { return args.queries * tile / tiles_down; }
  const S* row(int64_t number) const { return corpus + number * args.row_stride; }

  LL_INLINE Scores finished(const float* sums, const float* inverse) const {
    Scores scores{load(sums) * load(inverse), load(sums + kLanes<float>) * load(inverse + kLanes<float>)};
    if (args.normalized) return scores;
    // A NaN is the second argument, and stays.
    const Vec<float> one = splat(1.0f);
    scores.left = maximum<float>(-one, minimum<float>(one, scores.left));
    scores.right = maximum<float>(-one, minimum<float>(one, scores.right));
    return scores;
  }

  void pack_queries(float* packed) const {
    const Factor<float> factor{args.query, args.depth, 1};
    parallel_for(tiles_down, args.threads, args.queries * args.depth * 4, [&](int64_t tile) {
      const int64_t first = query_of(tile), tall = query_of(tile + 1) - first;
      pack<float>(factor.at(first, 0), tall, args.depth, static_cast<int>(tall),
                  reinterpret_cast<Unit<float>*>(packed + tile * kRows * args.depth));
    });
  }

  // The sums of a panel of queries with a panel of rows: sums[query][kAcross].
  LL_INLINE void tile(int64_t tall, const float* queries, const float* rows, float* sums, Ahead ahead) const {
    sums_of_height<float>(tall, args.depth, reinterpret_cast<const Unit<float>*>(queries),
                          reinterpret_cast<const Unit<float>*>(rows), sums, static_cast<int64_t>(kAcross),
                          Corner{kAcross, false}, ahead);
  }

  // wanted(number): whether a row may be found; each(thread, query, scores, rows).
  template <class Wanted, class Each> void run(const Wanted& wanted, const Each& each) const {
    // 1.
    const Room<float> queries(tiles_down * kRows * args.depth);
    pack_queries(queries.data);
    const Room<float> packed(threads * panels * panel_floats);
    parallel_stretches(args.rows, panels * kAcross, args.threads, bytes, [&](int64_t begin, int64_t end) {
      const int64_t thread = omp_get_thread_num();
      float* const own = packed.data + thread * panels * panel_floats;
      PanelRows rows[16];
      alignas(64) float inverse[16][kAcross], sums[kRows * kAcross];
      // 2.
      int64_t filled = 0;
      while (begin < end) {
        PanelRows& panel = rows[filled];
        const S* places[kAcross];
        for (panel.count = 0; begin < end && panel.count < kAcross; ++begin) {
          if (!wanted(begin)) continue;
          places[panel.count] = row(begin);
          panel.numbers[panel.count++] = begin;
        }
        if (panel.count == 0) break;
        pack_with_lengths(places, panel.count, args.depth, args.normalized, own + filled * panel_floats,
                          inverse[filled]);
        ++filled;
      }
      // 3.
      const NextRows next = next_rows(args, end, threads, panels, sizeof(S));
      for (int64_t down = 0; down < tiles_down; ++down) {
        const int64_t first = query_of(down), tall = query_of(down + 1) - first;
        for (int64_t p = 0; p < filled; ++p) {
          float* const panel = own + p * panel_floats;
          const Ahead ahead = down == 0 ? next.of_panel(p, args.depth) : Ahead{reinterpret_cast<char*>(panel), 0};
          tile(tall, queries.data + down * kRows * args.depth, panel, sums, ahead);
          for (int64_t i = 0; i < tall; ++i) each(thread, first + i, finished(sums + i * kAcross, inverse[p]), rows[p]);
        }
      }
    });
  }
};

}  // namespace
}  // namespace logitless::LL_ISA
