// A tensor as Python gives it, read where it lies: what a small call would otherwise ask of it in Python, attribute by
// attribute, costs more than its arithmetic.
//
// A torch of DLPack 1.3 offers a table of C functions, of which one describes a tensor in place. An older torch makes a
// capsule of DLPack's for the length of the call.
#pragma once

#include <optional>

#include "binding/dlpack.h"
#include "binding/python.h"
#include "kernels.h"

namespace logitless {

class Tensor {
 public:
  Tensor() = default;
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() { Py_XDECREF(capsule_); }

  bool given() const { return given_; }
  int dims() const { return view_.ndim; }
  std::int64_t size(int dim) const { return view_.shape[dim]; }
  std::int64_t elements() const;
  bool same_shape(const Tensor& other) const;

  // Whether it lies in the processor's memory, row by row without gaps.
  bool is_plain() const;
  bool holds(DType dtype) const;
  bool holds_indices() const;  // int64
  std::optional<DType> dtype() const;

  template <class T> T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(view_.data) + view_.byte_offset);
  }

  // False where Python's object is no tensor; None is one that was not given.
  bool read(PyObject* object);

  // What torch's type of tensors is, its table or None, and its function that makes a capsule of a tensor.
  static void are(PyObject* type, PyObject* exchange, PyObject* to_dlpack);

 private:
  bool given_ = false;
  DLTensor view_{};              // of no device where torch cannot describe the tensor
  PyObject* capsule_ = nullptr;  // what keeps the view, if anything does
};

template <> struct Converted<Tensor> {
  static constexpr const char* kName = "object";
  static bool from(PyObject* given, Tensor* value) { return value->read(given); }
};

}  // namespace logitless
