// Python bindings of the pool. A block goes to torch as a DLPack capsule, which is how a tensor is made of foreign
// memory.
#include "binding/module_memory.h"

#include <memory>
#include <vector>

#include "binding/call.h"
#include "binding/dlpack.h"
#include "kernels.h"
#include "memory/pool.h"

using namespace logitless;

namespace {

constexpr const char* kUnused = "dltensor";  // what DLPack calls a capsule that nobody has taken the tensor of yet

// The tensor that torch sees, with what it points to.
struct PooledTensor {
  DLManagedTensor managed{};
  std::vector<std::int64_t> sizes, strides;

  ~PooledTensor() { pool_release(managed.dl_tensor.data); }
};

void delete_tensor(DLManagedTensor* managed) { delete static_cast<PooledTensor*>(managed->manager_ctx); }

void delete_unused(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, kUnused)) return;  // torch has it, and will delete it
  delete_tensor(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kUnused)));
}

DLDataType element_type(int dtype) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat32: return {kDLFloat, 32, 1};
    case DType::kBFloat16: return {kDLBfloat, 16, 1};
    case DType::kFloat16: return {kDLFloat, 16, 1};
    case DType::kFloat64: return {kDLFloat, 64, 1};
  }
  throw std::invalid_argument("pool_block: no such dtype");
}

// A contiguous tensor of the given shape on a pooled block, which returns to the pool when the last tensor on it dies.
LL_PYTHON(Object, pool_block, int dtype, Tuple shape) {
  const DLDataType type = element_type(dtype);
  auto tensor = std::make_unique<PooledTensor>();
  const Py_ssize_t dims = shape.size();
  tensor->sizes.resize(static_cast<std::size_t>(dims));
  tensor->strides.resize(static_cast<std::size_t>(dims));
  std::int64_t elements = 1;
  for (Py_ssize_t d = dims; d-- > 0;) {
    tensor->sizes[d] = element<std::int64_t>(shape, d);
    tensor->strides[d] = elements;
    elements *= tensor->sizes[d];
  }
  DLTensor& view = tensor->managed.dl_tensor;
  view.data = pool_acquire(static_cast<std::size_t>(elements) * type.bits / 8);
  if (!view.data) throw std::bad_alloc();
  view.device = {kDLCPU, 0};
  view.ndim = static_cast<std::int32_t>(dims);
  view.dtype = type;
  view.shape = tensor->sizes.data();
  view.strides = tensor->strides.data();
  tensor->managed.manager_ctx = tensor.get();
  tensor->managed.deleter = delete_tensor;
  Object capsule(PyCapsule_New(&tensor->managed, kUnused, delete_unused));
  static_cast<void>(tensor.release());  // the capsule's now
  return capsule;
}

}  // namespace

void bind_memory(PyObject* module) {
  LL_DEFINE(module, pool_block);
  Exposed<&pool_clear>::add_to(module, "pool_clear", "");
}
