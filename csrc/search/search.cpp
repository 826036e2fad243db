// Exact search: of each query the k rows of largest cosine, without the matrix of cosines; and the rank of one row.
//
// Formula: the k first of all rows in the order of best.h, which is larger score, then smaller number; the rank is how
// many rows are before a row, and 1.
//
// Steps:
//   1. Each thread goes through some of the rows (sweep.h; of int8 rows bytes.h, where the processor multiplies bytes),
//      in rising order, and keeps the best of each query (best.h).
//   2. For each query, the best of all threads are chosen, sorted, and merged with those of earlier rows.
#include "search/search.h"

#include "kernels.h"
#include "search/best.h"
#include "search/bytes.h"
#include "search/sweep.h"

namespace logitless::LL_ISA {
namespace {

struct Search {
  const SearchArgs& args;
  const Compared& compared = args.compared;
  const int64_t threads = compared.threads > 1 ? compared.threads : 1;
  const int64_t capacity = smaller(2 * args.k + 64, compared.rows);  // of what a thread keeps for a query
  const int64_t queries = compared.queries;

  bool may_find(int64_t query, int64_t row) const {
    if (args.allowed && !args.allowed[query * args.allowed_stride + row]) return false;
    return !args.exclude_self || args.first_id + row != args.self_id + query;
  }

  void begin(Best* best, uint64_t* keys) const {
    for (int64_t q = 0; q < queries; ++q) {
      const bool full = args.ids[(q + 1) * args.k - 1] >= 0;
      const float last = args.scores[(q + 1) * args.k - 1];
      for (int64_t t = 0; t < threads; ++t)
        best[t * queries + q].begin(keys + (t * queries + q) * capacity, full, last);
    }
  }

  void run() const {
    const Room<uint64_t> keys(threads * queries * capacity);
    const Room<Best> best(threads * queries);
    begin(best.data, keys.data);
    // 1.
    const bool per_query = args.allowed && args.allowed_stride != 0;
    const auto wanted = [&](int64_t row) { return !args.allowed || per_query || args.allowed[row]; };
    const auto add = [&](Best& own, int64_t query, float score, int64_t row) {
      if (may_find(query, row)) own.add(score, row, args.k, capacity);
    };
    const auto each = [&](int64_t thread, int64_t query, const Scores& scores, const PanelRows& rows) {
      Best& own = best.data[thread * queries + query];
      uint64_t bits = passing_bits(scores.left, own.threshold) |
                      static_cast<uint64_t>(passing_bits(scores.right, own.threshold)) << kLanes<float>;
      bits &= (uint64_t{1} << rows.count) - 1;
      if (bits == 0) return;
      float values[kAcross];
      store(values, scores.left);
      store(values + kLanes<float>, scores.right);
      for (; bits; bits &= bits - 1) {
        const int i = __builtin_ctzll(bits);
        add(own, query, values[i], rows.numbers[i]);
      }
    };
    const auto sweep = [&](auto kind) { Sweep<decltype(kind)>{compared}.run(wanted, each); };
    if (compared.dtype == kInt8Rows) {
      const auto candidate = [&](int64_t thread, int64_t query) -> Best& {
        return best.data[thread * queries + query];
      };
      if (!search_bytes(compared, wanted, candidate, add)) sweep(Int8{});
    } else if (static_cast<DType>(compared.dtype) == DType::kFloat32) {
      sweep(float{});
    } else if (static_cast<DType>(compared.dtype) == DType::kBFloat16) {
      sweep(BFloat16{});
    } else {
      sweep(Float16{});
    }
    // 2.
    const int64_t most = threads * capacity + args.k;
    const Room<uint64_t> found(threads * most);
    parallel_for(queries, compared.threads, queries * most * 8,
                 [&](int64_t q) { merge(q, best.data, found.data + omp_get_thread_num() * most); });
  }

  // 2. Of what threads found for a query and what earlier rows gave, whose keys `own` has room for.
  void merge(int64_t query, const Best* best, uint64_t* own) const {
    int64_t count = 0;
    for (int64_t t = 0; t < threads; ++t) {
      const Best& part = best[t * queries + query];
      memcpy(own + count, part.keys, static_cast<size_t>(part.count) * sizeof(uint64_t));
      count += part.count;
    }
    if (count == 0) return;
    choose_largest(own, count, args.k);
    count = smaller(count, args.k);
    sort_descending(own, count);
    float* const scores = args.scores + query * args.k;
    int64_t* const ids = args.ids + query * args.k;
    int64_t before = 0;
    while (before < args.k && ids[before] >= 0) ++before;
    // From the last place on, so that what is there already is moved before it is overwritten: first those that are
    // left out are counted off both ends.
    int64_t earlier = 0, later = 0;
    while (earlier + later < smaller(args.k, before + count)) {
      const bool take = later == count || (earlier < before && order_of(scores[earlier]) >= order_of_key(own[later]));
      ++(take ? earlier : later);
    }
    for (int64_t place = earlier + later - 1; place >= 0; --place) {
      const bool take = later == 0 || (earlier > 0 && order_of(scores[earlier - 1]) < order_of_key(own[later - 1]));
      if (take) {
        --earlier;
        scores[place] = scores[earlier];
        ids[place] = ids[earlier];
      } else {
        --later;
        scores[place] = score_of(own[later]);
        ids[place] = args.first_id + row_of_key(own[later]);
      }
    }
  }
  static uint32_t order_of_key(uint64_t key) { return static_cast<uint32_t>(key >> 32); }
};

template <class S> struct Ranks {
  const RanksArgs& args;
  const Sweep<S> sweep{args.compared};

  // Scores of the queries with their own rows, from the same tile as all others are.
  void own_scores(float* own) const {
    const Compared& compared = args.compared;
    const Room<float> queries(sweep.tiles_down * kRows * compared.depth), rows(sweep.threads * sweep.panel_floats);
    sweep.pack_queries(queries.data);
    parallel_for(sweep.tiles_down, compared.threads, sweep.bytes, [&](int64_t down) {
      const int64_t first = sweep.query_of(down), tall = sweep.query_of(down + 1) - first;
      float* const panel = rows.data + omp_get_thread_num() * sweep.panel_floats;
      alignas(64) float inverse[kAcross], sums[kRows * kAcross], values[kAcross];
      const S* places[kAcross];
      for (int64_t i = 0; i < tall; ++i) places[i] = sweep.row(args.first_query + first + i);
      pack_with_lengths(places, tall, compared.depth, compared.normalized, panel, inverse);
      sweep.tile(tall, queries.data + down * kRows * compared.depth, panel, sums,
                 Ahead{reinterpret_cast<const char*>(panel), 0});
      for (int64_t i = 0; i < tall; ++i) {
        const Scores scores = sweep.finished(sums + i * kAcross, inverse);
        store(values, scores.left);
        store(values + kLanes<float>, scores.right);
        own[first + i] = values[i];
      }
    });
  }

  void run() const {
    const int64_t queries = args.compared.queries;
    const Room<float> own(queries);
    own_scores(own.data);
    const Room<int64_t> counts(sweep.threads * queries);
    for (int64_t i = 0; i < sweep.threads * queries; ++i) counts.data[i] = 0;
    const auto wanted = [](int64_t) { return true; };
    sweep.run(wanted, [&](int64_t thread, int64_t query, const Scores& scores, const PanelRows& rows) {
      const float score = own.data[query];
      const auto joined = [](uint32_t left, uint32_t right) {
        return left | static_cast<uint64_t>(right) << kLanes<float>;
      };
      const uint64_t there = (uint64_t{1} << rows.count) - 1;
      const Vec<float> all = splat(score);
      uint64_t above, equal;
      if (score == score) {
        above = joined(greater_bits(scores.left, all), greater_bits(scores.right, all)) & there;
        equal = joined(equal_bits(scores.left, all), equal_bits(scores.right, all)) & there;
      } else {
        above = joined(equal_bits(scores.left, scores.left), equal_bits(scores.right, scores.right)) & there;
        equal = there & ~above;
      }
      const int64_t before = bounded(args.first_query + query - rows.numbers[0], 0, rows.count);
      equal &= (uint64_t{1} << before) - 1;
      counts.data[thread * queries + query] += __builtin_popcountll(above) + __builtin_popcountll(equal);
    });
    for (int64_t q = 0; q < queries; ++q) {
      args.ranks[q] = 1;
      for (int64_t t = 0; t < sweep.threads; ++t) args.ranks[q] += counts.data[t * queries + q];
    }
  }
};

}  // namespace

void search(const SearchArgs& args) {
  if (args.compared.queries == 0 || args.compared.rows == 0 || args.k == 0) return;
  Search{args}.run();
}

void search_ranks(const RanksArgs& args) {
  if (args.compared.queries == 0) return;
  const auto run = [&](auto kind) { Ranks<decltype(kind)>{args}.run(); };
  if (static_cast<DType>(args.compared.dtype) == DType::kFloat32)
    run(float{});
  else if (static_cast<DType>(args.compared.dtype) == DType::kBFloat16)
    run(BFloat16{});
  else
    run(Float16{});
}

}  // namespace logitless::LL_ISA
