// The Python module: tensors arrive as addresses, shapes and strides (the cheapest call there is), so every check of a
// tensor belongs to the caller, in src/logitless/kernels.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <vector>

#include "binding/call.h"
#include "binding/module_elementwise.h"
#include "binding/module_losses.h"
#include "binding/module_pair.h"
#include "binding/module_product.h"
#include "kernels.h"
#include "memory/pool.h"

namespace nb = nanobind;
using namespace logitless;

namespace {

std::int64_t row_stats(int dtype, int threads, Address logits, std::int64_t outer, std::int64_t classes,
                       std::int64_t inner, std::int64_t outer_stride, std::int64_t class_stride,
                       std::int64_t inner_stride, Address target, std::int64_t ignore_index, Address class_weight,
                       Address dense_target, std::int64_t dense_outer_stride, std::int64_t dense_class_stride,
                       std::int64_t dense_inner_stride, Address nll, Address lse, Address row_max, Address log_sum,
                       Address entropy, Address argmax, Address rank, Address smooth_sum, Address dense_sum,
                       Address dense_mass) {
  if ((entropy || rank) && (smooth_sum || dense_sum || dense_mass) && !dense_target)
    throw nb::value_error("row_stats: entropy or rank together with smooth_sum needs a dense target; make two calls");
  if ((dense_sum || dense_mass) && !dense_target)
    throw nb::value_error("row_stats: dense_sum and dense_mass need dense_target");
  std::int64_t bad_row = -1;
  RowStatsArgs args{};
  args.dtype = static_cast<DType>(dtype);
  args.threads = threads;
  args.tile = {outer, classes, inner, outer_stride, class_stride, inner_stride};
  args.logits = at<void>(logits);
  args.target = at<std::int64_t>(target);
  args.ignore_index = ignore_index;
  args.class_weight = at<void>(class_weight);
  args.dense_target = at<void>(dense_target);
  args.dense_strides = {dense_outer_stride, dense_class_stride, dense_inner_stride};
  args.nll = at<void>(nll);
  args.lse = at<void>(lse);
  args.row_max = at<void>(row_max);
  args.log_sum = at<double>(log_sum);
  args.entropy = at<void>(entropy);
  args.argmax = at<std::int64_t>(argmax);
  args.rank = at<std::int64_t>(rank);
  args.smooth_sum = at<void>(smooth_sum);
  args.dense_sum = at<void>(dense_sum);
  args.dense_mass = at<void>(dense_mass);
  args.bad_row = &bad_row;
  without_gil(elements_of(args.tile), [&] { kernels().row_stats(args); });
  return bad_row;
}

void row_grad(int dtype, int threads, Address logits, std::int64_t outer, std::int64_t classes, std::int64_t inner,
              std::int64_t outer_stride, std::int64_t class_stride, std::int64_t inner_stride, Address grad,
              std::int64_t grad_outer_stride, std::int64_t grad_class_stride, std::int64_t grad_inner_stride,
              Address target, std::int64_t ignore_index, Address class_weight, int index_weight, Address dense_target,
              std::int64_t dense_outer_stride, std::int64_t dense_class_stride, std::int64_t dense_inner_stride,
              Address row_max, Address log_sum, Address upstream, std::int64_t upstream_stride, double a_scale,
              double b_scale, double c_scale, double e_scale, double f_scale, double a_extra, Address a, Address b,
              Address c, Address e, Address f) {
  if (e_scale != 0 && !dense_target) throw nb::value_error("row_grad: e_scale needs dense_target");
  if (b_scale != 0 && (f_scale != 0 || e_scale != 0) && !dense_target)
    throw nb::value_error("row_grad: b_scale together with f_scale needs a dense target");
  RowGradArgs args{};
  args.dtype = static_cast<DType>(dtype);
  args.threads = threads;
  args.tile = {outer, classes, inner, outer_stride, class_stride, inner_stride};
  args.logits = at<void>(logits);
  args.grad_strides = {grad_outer_stride, grad_class_stride, grad_inner_stride};
  args.grad = at<void>(grad);
  args.target = at<std::int64_t>(target);
  args.ignore_index = ignore_index;
  args.class_weight = at<void>(class_weight);
  args.index_weight = index_weight;
  args.dense_target = at<void>(dense_target);
  args.dense_strides = {dense_outer_stride, dense_class_stride, dense_inner_stride};
  args.row_max = at<void>(row_max);
  args.log_sum = at<double>(log_sum);
  args.upstream = at<void>(upstream);
  args.upstream_stride = upstream_stride;
  args.a_scale = a_scale;
  args.b_scale = b_scale;
  args.c_scale = c_scale;
  args.e_scale = e_scale;
  args.f_scale = f_scale;
  args.a_extra = a_extra;
  args.a = at<void>(a);
  args.b = at<void>(b);
  args.c = at<void>(c);
  args.e = at<void>(e);
  args.f = at<void>(f);
  without_gil(elements_of(args.tile), [&] { kernels().row_grad(args); });
}

// A torch tensor of the given shape on a pooled block; the block returns to the pool when its last tensor dies.
nb::ndarray<nb::pytorch> pool_tensor(int dtype, const std::vector<std::size_t>& shape) {
  static constexpr nb::dlpack::dtype kTypes[] = {{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float), 32, 1},
                                                 {static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1},
                                                 {static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float), 16, 1},
                                                 {static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float), 64, 1}};
  std::size_t bytes = kTypes[dtype].bits / 8;
  for (const std::size_t n : shape) bytes *= n;
  void* block = pool_acquire(bytes);
  if (!block) throw std::bad_alloc();
  nb::capsule owner(block, [](void* p) noexcept { pool_release(p); });
  return nb::ndarray<nb::pytorch>(block, shape.size(), shape.data(), owner, nullptr, kTypes[dtype]);
}

nb::dict native_info() {
  nb::list compiled, supported;
  for (const char* const* name = isa_names(); *name; ++name) {
    compiled.append(*name);
    if (isa_supported(*name)) supported.append(*name);
  }
  const PoolInfo pool = pool_info();
  nb::dict info;
  info["isa"] = isa_name();
  info["compiled"] = compiled;
  info["supported"] = supported;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["pool_limit_bytes"] = pool.limit_bytes;
  info["pool_free_bytes"] = pool.free_bytes;
  info["pool_used_bytes"] = pool.used_bytes;
  info["pool_blocks"] = pool.blocks;
  return info;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "CPU kernels of logitless; call them through logitless.kernels.cpu.";
  m.def("row_stats", &row_stats);
  m.def("row_grad", &row_grad);
  bind_pair(m);
  bind_elementwise(m);
  bind_losses(m);
  bind_product(m);
  m.def("pool_tensor", &pool_tensor);
  m.def("pool_clear", &pool_clear);
  m.def("select_isa", &select_isa);
  m.def("native_info", &native_info);
}
