// Python binding of exact search; addresses, shapes and strides as in binding/module.cpp.
#include "binding/module_search.h"

#include "binding/call.h"
#include "kernels.h"

using namespace logitless;

namespace {

constexpr std::int64_t kMostRows = std::int64_t{1} << 31;  // a row's number in a key has 32 bits

Compared compared(int dtype, int threads, std::int64_t queries, std::int64_t depth, std::int64_t rows, Address query,
                  Address corpus, std::int64_t row_stride, bool normalized) {
  const bool known = dtype == kInt8Rows || (dtype >= 0 && dtype < static_cast<int>(DType::kFloat64));
  if (!known) throw std::invalid_argument("search: rows are float32, bfloat16, float16 or int8");
  if (depth < 1) throw std::invalid_argument("search: vectors have no elements");
  if (rows >= kMostRows) throw std::invalid_argument("search: more rows than one call takes; pass them by parts");
  return {dtype, threads, queries, depth, rows, at<float>(query), at<void>(corpus), row_stride, normalized};
}

LL_PYTHON(void, search, int dtype, int threads, std::int64_t queries, std::int64_t depth, std::int64_t rows,
          Address query, Address corpus, std::int64_t row_stride, bool normalized, std::int64_t k,
          std::int64_t first_id, Address allowed, std::int64_t allowed_stride, bool exclude_self, std::int64_t self_id,
          Address scores, Address ids) {
  SearchArgs args{};
  args.compared = compared(dtype, threads, queries, depth, rows, query, corpus, row_stride, normalized);
  args.k = k;
  args.first_id = first_id;
  args.allowed = at<std::uint8_t>(allowed);
  args.allowed_stride = allowed_stride;
  args.exclude_self = exclude_self;
  args.self_id = self_id;
  args.scores = at<float>(scores);
  args.ids = at<std::int64_t>(ids);
  without_gil(queries * rows * depth, [&] { kernels().search(args); });
}

LL_PYTHON(void, search_ranks, int dtype, int threads, std::int64_t queries, std::int64_t depth, std::int64_t rows,
          Address query, Address corpus, std::int64_t row_stride, bool normalized, std::int64_t first_query,
          Address ranks) {
  RanksArgs args{};
  args.compared = compared(dtype, threads, queries, depth, rows, query, corpus, row_stride, normalized);
  args.first_query = first_query;
  args.ranks = at<std::int64_t>(ranks);
  if (dtype == kInt8Rows) throw std::invalid_argument("search_ranks: rows are float32, bfloat16 or float16");
  if (first_query < 0 || first_query + queries > rows)
    throw std::invalid_argument("search_ranks: every query needs its own row");
  without_gil(queries * rows * depth, [&] { kernels().search_ranks(args); });
}

}  // namespace

void bind_search(PyObject* module) {
  LL_DEFINE(module, search);
  LL_DEFINE(module, search_ranks);
}
