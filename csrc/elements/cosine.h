// Arguments of `cosine` and `cosine_grad`: the similarity of pairs of vectors, and the embedding loss made of it.
#pragma once

#include "elements/elementwise.h"

namespace logitless {

// Vectors of `length` elements, one a row. Rows have `dims` sizes, the innermost first; a row's number counts them in
// that order, and every per-row array is dense in it.
struct Rows {
  int dims;
  int64_t sizes[kMaxDims];
  int64_t length;
};
struct Vectors {
  void* data;  // null: a gradient that is not wanted
  int64_t strides[kMaxDims];
  int64_t step;  // from one element of a vector to the next
};

struct CosineArgs {
  Storage storage;  // of both inputs and the gradients: one of the first four
  int threads;
  Rows rows;
  Vectors x1, x2;
  bool embedding;  // the loss, norms sqrt(sum x^2 + 1e-12); otherwise the similarity, norms at least eps
  double eps, margin;
  const double* target;  // embedding: 1, -1, anything else costs nothing; one a row
  void* out;             // Real, one a row; not read by cosine_grad
  // For the gradient: the cosine before it is cut to [-1, 1], 1 / norm1 and 1 / norm2, `rows` of each in turn. A norm
  // raised to eps is negative: its gradient does not pull the vector's length.
  double* saved;
};

struct CosineGradArgs {
  CosineArgs forward;
  const void* upstream;     // Real
  int64_t upstream_stride;  // 0: one number for all rows
  double upstream_scale;
  Vectors grad1, grad2;
};

}  // namespace logitless
