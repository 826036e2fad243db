// Python binding of the matrix product; addresses, shapes and strides as in module.cpp.
#include "binding/module_product.h"

#include "binding/gil.h"
#include "kernels.h"

namespace nb = nanobind;
using namespace logitless;
using Address = std::uintptr_t;

namespace {

void product(int a_dtype, int b_dtype, int c_dtype, int threads, std::int64_t rows, std::int64_t depth,
             std::int64_t columns, Address a, std::int64_t a_row_stride, std::int64_t a_depth_stride, Address b,
             std::int64_t b_depth_stride, std::int64_t b_column_stride, Address c, std::int64_t c_row_stride,
             bool accumulate) {
  if (b_dtype != static_cast<int>(DType::kFloat32) && !product_supported(b_dtype))
    throw nb::value_error("product: the instruction set in use has none of this dtype");
  if (a_dtype != b_dtype && a_dtype != static_cast<int>(DType::kFloat32))
    throw nb::value_error("product: a and b must have one dtype, or a float32");
  const ProductArgs args{a_dtype,
                         b_dtype,
                         c_dtype,
                         threads,
                         rows,
                         depth,
                         columns,
                         reinterpret_cast<const void*>(a),
                         a_row_stride,
                         a_depth_stride,
                         reinterpret_cast<const void*>(b),
                         b_depth_stride,
                         b_column_stride,
                         reinterpret_cast<void*>(c),
                         c_row_stride,
                         accumulate};
  without_gil(rows * columns * depth, [&] { kernels().product(args); });
}

}  // namespace

void bind_product(nb::module_& m) {
  m.def("product", &product);
  m.def("product_supported", &product_supported);
}
