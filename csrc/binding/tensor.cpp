#include "binding/tensor.h"

namespace logitless {

namespace {

// The head of DLPack's table; what follows these members is not asked for.
struct ExchangeTable {
  struct {
    std::uint32_t major, minor;
  } version;
  void* older;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*describe)(void* object, DLTensor* out);  // may be null
};

PyObject* tensor_type = nullptr;
PyObject* make_capsule = nullptr;
const ExchangeTable* table = nullptr;

bool is(DLDataType type, std::uint8_t code, int bits) {
  return type.code == code && type.bits == bits && type.lanes == 1;
}

}  // namespace

void Tensor::are(PyObject* type, PyObject* exchange, PyObject* to_dlpack) {
  if (!PyType_Check(type)) throw std::invalid_argument("tensors_are: expected a type of tensors");
  const ExchangeTable* found = nullptr;
  if (exchange != Py_None) {
    found = static_cast<const ExchangeTable*>(PyCapsule_GetPointer(exchange, "dlpack_exchange_api"));
    if (!found) throw PythonError{};
    if (found->version.major != 1 || !found->describe) found = nullptr;
  }
  table = found;
  // As long as Python runs.
  tensor_type = Py_NewRef(type);
  make_capsule = Py_NewRef(to_dlpack);
}

bool Tensor::read(PyObject* object) {
  if (object == Py_None) return true;
  if (!tensor_type || !PyType_IsSubtype(Py_TYPE(object), reinterpret_cast<PyTypeObject*>(tensor_type))) return false;
  given_ = true;
  if (table) {
    if (table->describe(object, &view_) == 0) return true;
  } else {
    capsule_ = PyObject_CallFunctionObjArgs(make_capsule, object, nullptr);
    const void* const managed = capsule_ ? PyCapsule_GetPointer(capsule_, "dltensor") : nullptr;
    if (managed) {
      view_ = static_cast<const DLManagedTensor*>(managed)->dl_tensor;
      return true;
    }
  }
  PyErr_Clear();  // on a device that DLPack has no number for, or without memory
  view_ = DLTensor{};
  return true;
}

std::int64_t Tensor::elements() const {
  std::int64_t count = 1;
  for (int d = 0; d < dims(); ++d) count *= size(d);
  return count;
}

bool Tensor::same_shape(const Tensor& other) const {
  if (dims() != other.dims()) return false;
  for (int d = 0; d < dims(); ++d) {
    if (size(d) != other.size(d)) return false;
  }
  return true;
}

bool Tensor::is_plain() const {
  if (view_.device.device_type != kDLCPU) return false;
  if (!view_.strides) return true;
  std::int64_t stride = 1;
  for (int d = dims(); d-- > 0;) {
    if (size(d) == 1) continue;
    if (view_.strides[d] != stride) return false;
    stride *= size(d);
  }
  return true;
}

std::optional<DType> Tensor::dtype() const {
  const DLDataType type = view_.dtype;
  if (is(type, kDLFloat, 32)) return DType::kFloat32;
  if (is(type, kDLFloat, 64)) return DType::kFloat64;
  if (is(type, kDLFloat, 16)) return DType::kFloat16;
  if (is(type, kDLBfloat, 16)) return DType::kBFloat16;
  return std::nullopt;
}

bool Tensor::holds(DType expected) const { return dtype() == expected; }

bool Tensor::holds_indices() const { return is(view_.dtype, kDLInt, 64); }

}  // namespace logitless
