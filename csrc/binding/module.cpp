// The Python module: tensors arrive as addresses, shapes and strides, so every check of a tensor belongs to the caller,
// in src/logitless/kernels. Where all of a small loss is one call, they arrive as they are: see binding/tensor.h.
#include <new>
#include <utility>

#include "binding/call.h"
#include "binding/module_elementwise.h"
#include "binding/module_losses.h"
#include "binding/module_memory.h"
#include "binding/module_pair.h"
#include "binding/module_product.h"
#include "binding/module_search.h"
#include "kernels.h"
#include "memory/pool.h"

using namespace logitless;

namespace {

LL_PYTHON(std::int64_t, row_stats, int dtype, int threads, Address logits, std::int64_t outer, std::int64_t classes,
          std::int64_t inner, std::int64_t outer_stride, std::int64_t class_stride, std::int64_t inner_stride,
          Address target, std::int64_t ignore_index, Address class_weight, Address dense_target,
          std::int64_t dense_outer_stride, std::int64_t dense_class_stride, std::int64_t dense_inner_stride,
          Address nll, Address lse, Address row_max, Address log_sum, Address entropy, Address argmax, Address rank,
          Address smooth_sum, Address dense_sum, Address dense_mass) {
  if ((entropy || rank) && (smooth_sum || dense_sum || dense_mass) && !dense_target)
    throw std::invalid_argument(
        "row_stats: entropy or rank together with smooth_sum needs a dense target; make two calls");
  if ((dense_sum || dense_mass) && !dense_target)
    throw std::invalid_argument("row_stats: dense_sum and dense_mass need dense_target");
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

LL_PYTHON(void, row_grad, int dtype, int threads, Address logits, std::int64_t outer, std::int64_t classes,
          std::int64_t inner, std::int64_t outer_stride, std::int64_t class_stride, std::int64_t inner_stride,
          Address grad, std::int64_t grad_outer_stride, std::int64_t grad_class_stride, std::int64_t grad_inner_stride,
          Address target, std::int64_t ignore_index, Address class_weight, int index_weight, Address dense_target,
          std::int64_t dense_outer_stride, std::int64_t dense_class_stride, std::int64_t dense_inner_stride,
          Address row_max, Address log_sum, Address upstream, std::int64_t upstream_stride, double a_scale,
          double b_scale, double c_scale, double e_scale, double f_scale, double a_extra, Address a, Address b,
          Address c, Address e, Address f) {
  if (e_scale != 0 && !dense_target) throw std::invalid_argument("row_grad: e_scale needs dense_target");
  if (b_scale != 0 && (f_scale != 0 || e_scale != 0) && !dense_target)
    throw std::invalid_argument("row_grad: b_scale together with f_scale needs a dense target");
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

void set(const Object& dict, const char* key, Object value) {
  if (PyDict_SetItemString(dict.get(), key, value.get())) throw PythonError{};
}

void append(const Object& list, Object value) {
  if (PyList_Append(list.get(), value.get())) throw PythonError{};
}

LL_PYTHON(Object, native_info) {
  Object compiled(PyList_New(0)), supported(PyList_New(0));
  for (const char* const* name = isa_names(); *name; ++name) {
    append(compiled, Object(to_python(*name)));
    if (isa_supported(*name)) append(supported, Object(to_python(*name)));
  }
#if defined(_OPENMP)
  constexpr bool openmp = true;
#else
  constexpr bool openmp = false;
#endif
  const PoolInfo pool = pool_info();
  Object info(PyDict_New());
  set(info, "isa", Object(to_python(isa_name())));
  set(info, "tiles", Object(to_python(tiles_name())));
  set(info, "compiled", std::move(compiled));
  set(info, "supported", std::move(supported));
  set(info, "openmp", Object(to_python(openmp)));
  set(info, "pool_limit_bytes", Object(to_python(pool.limit_bytes)));
  set(info, "pool_free_bytes", Object(to_python(pool.free_bytes)));
  set(info, "pool_used_bytes", Object(to_python(pool.used_bytes)));
  set(info, "pool_blocks", Object(to_python(pool.blocks)));
  return info;
}

void bind_all(PyObject* module) {
  LL_DEFINE(module, row_stats);
  LL_DEFINE(module, row_grad);
  LL_DEFINE(module, native_info);
  Exposed<&select_isa>::add_to(module, "select_isa", "const char* name");
  bind_pair(module);
  bind_elementwise(module);
  bind_losses(module);
  bind_product(module);
  bind_search(module);
  bind_memory(module);
}

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_native",
                          "CPU kernels of logitless; call them through logitless.kernels.cpu.",
                          -1,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

// What Python calls when it imports the module.
PyMODINIT_FUNC PyInit__native() {
  try {
    Object module(PyModule_Create(&definition));
    bind_all(module.get());
    return module.release();
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}
