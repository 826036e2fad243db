// Arguments of the matrix product.
#pragma once

#include <cstdint>

namespace logitless {

// Which tiles multiply bfloat16 (product/processor_tiles.h): none, so that vectors do, the processor's, or emulated
// ones.
enum class Tiles : int { kNone = 0, kProcessor = 1, kEmulated = 2 };

// c[i, j] (+)= sum_k a[i, k] b[k, j]. Strides are in elements; of each of a's and b's two, one is 1. The columns of c
// are consecutive.
struct ProductArgs {
  int a_dtype,
      b_dtype;  // DType: one for both, or a float32 a beside a half-precision b. It is rounded where b is bfloat16
  int c_dtype;  // that of b, or of a half-precision b float32
  int threads;
  int64_t rows, depth, columns;
  const void* a;
  int64_t a_row_stride, a_depth_stride;
  const void* b;
  int64_t b_depth_stride, b_column_stride;
  void* c;
  int64_t c_row_stride;
  bool accumulate;  // needs c in float32 or float64
  Tiles tiles;      // of bfloat16
};

// The tiles in use: the processor's where it has them, the system lets them be used, and they were seen to multiply as
// they should; LOGITLESS_AMX=0 leaves them alone. Tests select others.
Tiles tiles_in_use();
const char* tiles_name();
void select_tiles(const char* name);

// Whether the instruction set in use has a product of this dtype.
bool product_serves(int dtype);
// Whether that is faster than torch's own, or its sums do not depend on the shape of the call where torch's do.
bool product_is_faster(int dtype);

}  // namespace logitless
