// Arguments of exact search by cosines.
#pragma once

#include <cstdint>

namespace logitless {

inline constexpr int kInt8Rows = 4;  // beside the numbers of DType

// Unit vectors, and a stretch of rows that each is compared with: (queries, depth) and (rows, depth), where the
// elements of a vector are consecutive.
struct Compared {
  int dtype;  // of the rows: DType's float32, bfloat16 or float16, or kInt8Rows
  int threads;
  int64_t queries, depth, rows;
  const float* query;  // contiguous
  const void* corpus;
  int64_t row_stride;  // in elements
  bool normalized;     // scores are the products as they are: rows are unit vectors, or are to be taken for such
};

struct SearchArgs {
  Compared compared;
  int64_t k, first_id;     // first_id: of the first of these rows
  const uint8_t* allowed;  // bytes, 0 for a row that is not to be found; null: none is
  int64_t allowed_stride;  // from query to query; 0: one stretch of bytes for all
  bool exclude_self;       // query i is the row of id self_id + i, which it does not find
  int64_t self_id;
  float* scores;  // (queries, k), the best first: what earlier rows gave, and what is found with these
  int64_t* ids;   // of places that no row has taken yet, -1
};

struct RanksArgs {
  Compared compared;    // rows of floats
  int64_t first_query;  // query i is compared with row first_query + i, its own
  int64_t* ranks;       // how many rows are before its own, from 1
};

}  // namespace logitless
