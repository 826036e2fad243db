// Python binding of the matrix product; addresses, shapes and strides as in binding/module.cpp.
#include "binding/module_product.h"

#include "binding/call.h"
#include "kernels.h"

using namespace logitless;

namespace {

LL_PYTHON(void, product, int a_dtype, int b_dtype, int c_dtype, int threads, std::int64_t rows, std::int64_t depth,
          std::int64_t columns, Address a, std::int64_t a_row_stride, std::int64_t a_depth_stride, Address b,
          std::int64_t b_depth_stride, std::int64_t b_column_stride, Address c, std::int64_t c_row_stride,
          bool accumulate) {
  if (!product_serves(b_dtype))
    throw std::invalid_argument("product: the instruction set in use has none of this dtype");
  const bool half_b = b_dtype == static_cast<int>(DType::kBFloat16) || b_dtype == static_cast<int>(DType::kFloat16);
  if (a_dtype != b_dtype && !(half_b && a_dtype == static_cast<int>(DType::kFloat32)))
    throw std::invalid_argument("product: a and b must have one dtype, or a float32 beside a b of half precision");
  const bool widest = b_dtype == static_cast<int>(DType::kFloat64);
  if (c_dtype != b_dtype && (widest || c_dtype != static_cast<int>(DType::kFloat32)))
    throw std::invalid_argument("product: c has b's dtype, or is float32 beside a b of half precision");
  if (depth < 1) throw std::invalid_argument("product: there is no depth to sum over");
  ProductArgs args{};
  args.a_dtype = a_dtype;
  args.b_dtype = b_dtype;
  args.c_dtype = c_dtype;
  args.threads = threads;
  args.rows = rows;
  args.depth = depth;
  args.columns = columns;
  args.a = at<void>(a);
  args.a_row_stride = a_row_stride;
  args.a_depth_stride = a_depth_stride;
  args.b = at<void>(b);
  args.b_depth_stride = b_depth_stride;
  args.b_column_stride = b_column_stride;
  args.c = at<void>(c);
  args.c_row_stride = c_row_stride;
  args.accumulate = accumulate;
  args.tiles = tiles_in_use();
  without_gil(rows * columns * depth, [&] { kernels().product(args); });
}

}  // namespace

void bind_product(PyObject* module) {
  LL_DEFINE(module, product);
  Exposed<&select_tiles>::add_to(module, "select_tiles", "const char* name");
  Exposed<&product_serves>::add_to(module, "product_serves", "int dtype");
  Exposed<&product_is_faster>::add_to(module, "product_is_faster", "int dtype");
}
