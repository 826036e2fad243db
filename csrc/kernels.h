// Every kernel's arguments, and the table of kernels of one instruction set. Start here: docs/kernels.md says how a row
// is folded, and the rooms are simd/ (vectors and their functions), rows/ (one row of logits), pairs/ (two), elements/
// (losses of single elements, cosines), product/ (a matrix product), search/ (the best rows of a corpus), memory/ (the
// pool) and binding/ (what Python sees).
//
// To add a kernel: give its arguments a struct here, add it to LL_KERNELS, define `void name(const NameArgs&)` inside
// `namespace logitless::LL_ISA` in a file listed in CMakeLists.txt, and bind it in binding/module.cpp.
#pragma once

#include <cstdint>

#include "elements/cosine.h"
#include "elements/elementwise.h"
#include "product/product.h"
#include "search/search.h"

namespace logitless {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Logits of shape (outer, classes, inner), strides in elements. A row is one (outer, inner) pair, numbered outer *
// inner_count + inner; every per-row array is dense in that numbering.
struct Tile {
  int64_t outer, classes, inner;
  int64_t outer_stride, class_stride, inner_stride;
};
struct Strides {
  int64_t outer, classes, inner;
};

// Pointers that are null are outputs not wanted or inputs not given. "Real" is float, or double for double logits.
//
// lse = row_max + log_sum, kept apart and log_sum in double, since the gradient needs both to be right to an ulp.
// `pivot` is in place of row_max, where a caller takes any logit of the row that lse is pivot + log_sum of: the
// target's or the largest. Where neither row_max, lse nor argmax is wanted, the fold may be a faster one that holds out
// the target.
struct RowStatsArgs {
  DType dtype;
  int threads;
  Tile tile;
  const void* logits;
  const int64_t* target;  // the class index of each row
  int64_t ignore_index;
  const void* class_weight;  // Real[classes]: weighs smooth_sum and dense_sum
  const void* dense_target;  // of the logits' dtype and shape
  Strides dense_strides;
  // Outputs, one a row. Of an ignored row: 0, and -1 for argmax and rank.
  void* nll;         // Real: lse - z[target]
  void* lse;         // Real
  void* row_max;     // Real
  void* pivot;       // Real
  double* log_sum;   // double
  void* entropy;     // Real
  int64_t* argmax;   // the first of equal ones
  int64_t* rank;     // how many classes have a larger logit than the target
  void* smooth_sum;  // Real: sum_j w_j (lse - z_j)
  void* dense_sum;   // Real: sum_j t_j w_j (lse - z_j), 0 * inf = 0
  void* dense_mass;  // Real: sum_j t_j w_j
  int64_t* bad_row;  // one value: the first row whose target is no class and not ignored, else -1; such a row gives NaN
};

// dz_j = p_j (a + b (z_j - lse)) + c [j = target] + e t_j w_j + f w_j
//
// Each coefficient X of a row is g * X_scale * X[row], where null X means 1, and g = upstream[row * upstream_stride] or
// 1. With `index_weight`, a and c are further multiplied by class_weight[target]; then a_extra * g is added to a.
struct RowGradArgs {
  DType dtype;
  int threads;
  Tile tile;
  const void* logits;
  Strides grad_strides;
  void* grad;  // same dtype as the logits; may be the logits themselves with the same strides
  const int64_t* target;
  int64_t ignore_index;
  const void* class_weight;
  int index_weight;
  const void* dense_target;
  Strides dense_strides;
  const void* row_max;    // from row_stats, or pivot
  const double* log_sum;  // from row_stats
  const void* upstream;   // Real
  int64_t upstream_stride;
  double a_scale, b_scale, c_scale, e_scale, f_scale, a_extra;
  const void *a, *b, *c, *e, *f;  // Real
};

// A divergence beside those that are told apart by an output of their own, with m = weight p + (1 - weight) q:
// KL(p || m), weight KL(p || m) + (1 - weight) KL(q || m), and sum |p - q| / 2, which has no mixture.
enum class Divergence : int { kNone = 0, kSkewedKl = 1, kWeightedJs = 2, kTotalVariation = 3 };

// Two rows of logits of the same classes, p = softmax(logits), q = softmax(other). `saved` has kPairSaved doubles a
// row, which pair_row_grad needs: the first five of every measure, the rest of kl to entropies, or of one Divergence,
// of which those that begin with kDivergence are.
enum PairSaved {
  kMaxP,
  kLogSumP,
  kMaxQ,
  kLogSumQ,
  kLogSumGap,
  kKl,
  kReverseKl,
  kKlPM,
  kKlQM,
  kCrossEntropy,
  kEntropyP,
  kEntropyQ,
  kPairSaved,

  // Of the skewed KL: it, and sum p (1 - p / m).
  kSkewedKlValue = kKl,
  kSkewedKlShare,
  // Of the weighted JS: KL(p || m) and KL(q || m), as of the JS.
  kWeightedKlPM = kKlPM,
  kWeightedKlQM = kKlQM,
  // Of the total variation, for p and then for q: what sum_k p_k (sign_j - sign_k) is of a class j where p is larger,
  // less the same where q is larger, and where they are equal; sign is that of p - q.
  kVariationP = kKl,
  kVariationQ = kVariationP + 3
};

struct PairRowStatsArgs {
  DType dtype;
  int threads;
  Tile tile;  // of `logits`
  const void* logits;
  const void* other;
  Strides other_strides;
  const int64_t* target;  // for nll_p, nll_q; ignored rows have 0 there, the other outputs do not look at the target
  int64_t ignore_index;
  void *kl, *reverse_kl, *js, *cross_entropy, *entropy_p, *entropy_q, *nll_p, *nll_q;  // Real, one a row
  Divergence divergence;  // kNone, or the one measure that is wanted
  double weight;          // of p in its mixture
  void* divergence_out;   // Real, one a row
  uint8_t* same_top;      // whether the largest class is the same, the first of equal ones
  double* saved;
  int64_t* bad_row;
};

// Upstream gradients: Real, one a row, or null for none.
struct PairRowGradArgs {
  DType dtype;
  int threads;
  Tile tile;
  const void* logits;
  const void* other;
  Strides other_strides;
  const int64_t* target;
  int64_t ignore_index;
  const double* saved;  // from pair_row_stats, which was asked for every measure that has a gradient here
  const void *kl, *reverse_kl, *js, *cross_entropy, *entropy_p, *entropy_q, *nll_p, *nll_q;
  Divergence divergence;  // kNone, or the one measure that has a gradient here
  double weight;
  const void* divergence_grad;
  void* grad;  // null: not wanted
  Strides grad_strides;
  void* other_grad;  // null: not wanted
  Strides other_grad_strides;
};

#define LL_KERNELS(X)                 \
  X(row_stats, RowStatsArgs)          \
  X(row_grad, RowGradArgs)            \
  X(pair_row_stats, PairRowStatsArgs) \
  X(pair_row_grad, PairRowGradArgs)   \
  X(elementwise, ElementwiseArgs)     \
  X(cosine, CosineArgs)               \
  X(cosine_grad, CosineGradArgs)      \
  X(product, ProductArgs)             \
  X(search, SearchArgs)               \
  X(search_ranks, RanksArgs)

struct Kernels {
#define LL_MEMBER(name, Args) void (*name)(const Args&);
  LL_KERNELS(LL_MEMBER)
#undef LL_MEMBER
};

#define LL_DECLARE(name, Args) void name(const Args&);
#define LL_DECLARE_ISA(isa) \
  namespace isa {           \
  LL_KERNELS(LL_DECLARE)    \
  }
LL_DECLARE_ISA(portable)
#if defined(LL_X86)
LL_DECLARE_ISA(avx2)
LL_DECLARE_ISA(avx512)
#endif
#undef LL_DECLARE_ISA

// dispatch.cpp
const Kernels& kernels();  // of the instruction set in use, chosen at the first call
const char* isa_name();
const char* const* isa_names();  // compiled in, best first, null at the end
bool isa_supported(const char* name);
void select_isa(const char* name);  // for tests; throws on a name that this processor cannot run

// True in a child forked after a parallel region ran: libgomp would wait for threads that do not exist there.
bool must_be_serial();
void note_parallel_region();

}  // namespace logitless
