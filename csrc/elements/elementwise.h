// Arguments of `elementwise`: the losses of one element and its target, and their gradients.
#pragma once

#include <cstdint>

namespace logitless {

inline constexpr int kMaxDims = 64;  // as many as a torch tensor may have

// The first four are DType's values, in its order.
enum class Storage : int {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kFloat64 = 3,
  kInt64 = 4,
  kInt32 = 5,
  kInt16 = 6,
  kInt8 = 7,
  kUInt8 = 8
};

// A tensor over the sizes of the call: strides in elements, the innermost dimension first, 0 where it is broadcast.
struct Operand {
  void* data;  // null: not given
  Storage storage;
  int64_t strides[kMaxDims];
};

enum class ElementOp : int {
  kBceLogits = 0,  // weight (pos_weight t softplus(-x) + (1 - t) softplus(x))
  kBceLogitsGrad,  // g weight ((1 - t) sigmoid(x) - pos_weight t sigmoid(-x))
  kBce,            // -weight (t max(log x, -100) + (1 - t) max(log(1 - x), -100))
  kBceGrad,        // g weight (x - t) / max(x (1 - x), 1e-12)
  kKl,             // t (log t - x), 0 where t = 0
  kKlGrad,         // -g t
  kKlLog,          // exp(t) (t - x), 0 where exp(t) = 0
  kKlLogGrad,      // -g exp(t)
};

struct ElementwiseArgs {
  ElementOp op;
  bool wide;  // computed in double; otherwise in float
  int threads, dims;
  int64_t sizes[kMaxDims];  // the innermost first
  Operand input, target, weight, pos_weight, upstream;
  double scale;  // multiplies upstream, which is 1 where it is not given
  Operand out;   // the elements; not given: only their sum is wanted
  double* sum;
  int* outside;  // kBce: bit 0 where an input, bit 1 where a target is outside [0, 1] or NaN
};

}  // namespace logitless
