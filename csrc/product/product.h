// Arguments of the matrix product.
#pragma once

#include <cstdint>

namespace logitless {

// c[i, j] (+)= sum_k a[i, k] b[k, j]. Strides are in elements; of each of a's and b's two, one is 1. The columns of c
// are consecutive.
struct ProductArgs {
  int a_dtype, b_dtype;  // DType: float32 or bfloat16. A float32 a is rounded where b is bfloat16
  int c_dtype;           // that of b, or float32
  int threads;
  int64_t rows, depth, columns;
  const void* a;
  int64_t a_row_stride, a_depth_stride;
  const void* b;
  int64_t b_depth_stride, b_column_stride;
  void* c;
  int64_t c_row_stride;
  bool accumulate;  // needs c in float32
};

// Whether the instruction set in use has a product of this dtype that is faster than torch's own.
bool product_supported(int dtype);

}  // namespace logitless
