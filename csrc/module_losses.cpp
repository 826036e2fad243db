// A whole loss in one call, for inputs so small that the calls cost more than the arithmetic.
//
// Precision: the row kernels' own; the sum over rows is in double.
#include "module_losses.h"

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using namespace logitless;
using Address = std::uintptr_t;

namespace {

template <class T> T* at(Address address) { return reinterpret_cast<T*>(address); }

template <class Real> double sum_of_rows(const std::vector<double>& scratch, std::int64_t rows) {
  const Real* nll = reinterpret_cast<const Real*>(scratch.data());
  double total = 0;
  for (std::int64_t r = 0; r < rows; ++r) total += static_cast<double>(nll[r]);
  return total;
}

// Cross-entropy of index targets over contiguous rows: the sum over rows, how many are not ignored, and into `grad`
// unless that is null the gradient of the sum, or with `mean` of the sum over that number. Returns (bad_row, sum, kept).
nb::tuple sum_cross_entropy(int dtype, Address logits, std::int64_t rows, std::int64_t classes, Address target, std::int64_t ignore_index,
                            Address grad, bool mean) {
  thread_local std::vector<double> scratch;  // nll, row_max, log_sum: one each a row
  scratch.resize(static_cast<std::size_t>(3 * rows));
  double* const nll = scratch.data();
  double* const row_max = nll + rows;
  double* const log_sum = row_max + rows;
  const Tile tile{rows, classes, 1, classes, 1, 0};
  const std::int64_t* const index = at<std::int64_t>(target);
  std::int64_t bad_row = -1;

  RowStatsArgs stats{};
  stats.dtype = static_cast<DType>(dtype);
  stats.threads = 1;
  stats.tile = tile;
  stats.logits = at<void>(logits);
  stats.target = index;
  stats.ignore_index = ignore_index;
  stats.nll = nll;
  stats.row_max = row_max;
  stats.log_sum = log_sum;
  stats.bad_row = &bad_row;
  kernels().row_stats(stats);
  if (bad_row >= 0) return nb::make_tuple(bad_row, 0.0, 0);

  std::int64_t kept = 0;
  for (std::int64_t r = 0; r < rows; ++r) kept += index[r] != ignore_index;
  if (grad) {
    RowGradArgs args{};
    args.dtype = stats.dtype;
    args.threads = 1;
    args.tile = tile;
    args.logits = stats.logits;
    args.grad_strides = {classes, 1, 0};
    args.grad = at<void>(grad);
    args.target = index;
    args.ignore_index = ignore_index;
    args.row_max = row_max;
    args.log_sum = log_sum;
    args.a_scale = mean && kept ? 1.0 / static_cast<double>(kept) : 1.0;
    args.c_scale = -args.a_scale;
    kernels().row_grad(args);
  }
  const bool wide = stats.dtype == DType::kFloat64;
  return nb::make_tuple(bad_row, wide ? sum_of_rows<double>(scratch, rows) : sum_of_rows<float>(scratch, rows), kept);
}

}  // namespace

void bind_losses(nb::module_& m) { m.def("sum_cross_entropy", &sum_cross_entropy); }
