// The elementwise and cosine kernels as Python functions. A tensor arrives as (address, storage, strides), or None;
// every check of it belongs to the caller, src/logitless/kernels.
#include "binding/module_elementwise.h"

#include <algorithm>
#include <array>
#include <cstdint>

#include "binding/call.h"
#include "kernels.h"

using namespace logitless;

namespace {

int dims_of(const Tuple& shape) {
  if (shape.size() > kMaxDims) throw std::invalid_argument("more than 64 dimensions");
  return static_cast<int>(shape.size());
}

// The strides in the tensor's own order, the outermost first. No strides at all: one element for everything.
Operand operand(const Any& given, int dims) {
  Operand o;
  o.data = nullptr;
  o.storage = Storage::kFloat32;
  for (int d = 0; d < dims; ++d) o.strides[d] = 0;
  if (given.is_none()) return o;
  if (!PyTuple_Check(given.object)) throw std::invalid_argument("a tensor is (address, storage, strides), or None");
  const Tuple parts{given.object};
  o.data = at<void>(element<Address>(parts, 0));
  o.storage = static_cast<Storage>(element<int>(parts, 1));
  const Tuple strides = element<Tuple>(parts, 2);
  if (strides.size() == 0) return o;
  if (static_cast<int>(strides.size()) != dims) throw std::invalid_argument("as many strides as sizes are needed");
  for (int d = 0; d < dims; ++d) o.strides[d] = element<std::int64_t>(strides, d);
  return o;
}

// Keeps `order`'s dimensions of every operand, in that order, and joins neighbours that every operand steps through
// evenly. Returns how many dimensions are left, at least 1.
template <std::size_t N>
int arrange(const std::int64_t* sizes, const std::array<std::int64_t*, N>& strides, const int* order, int kept,
            std::int64_t* new_sizes) {
  std::int64_t old[N][kMaxDims];
  for (std::size_t k = 0; k < N; ++k)
    for (int i = 0; i < kept; ++i) old[k][order[i]] = strides[k][order[i]];
  int dims = 0;
  for (int i = 0; i < kept; ++i) {
    const int d = order[i];
    bool joins = dims > 0;
    for (std::size_t k = 0; k < N && joins; ++k) joins = old[k][d] == strides[k][dims - 1] * new_sizes[dims - 1];
    if (joins) {
      new_sizes[dims - 1] *= sizes[d];
      continue;
    }
    for (std::size_t k = 0; k < N; ++k) strides[k][dims] = old[k][d];
    new_sizes[dims++] = sizes[d];
  }
  if (dims == 0) {
    for (std::size_t k = 0; k < N; ++k) strides[k][0] = 0;
    new_sizes[0] = 1;
    dims = 1;
  }
  return dims;
}

LL_PYTHON(Object, elementwise, int op, bool wide, int threads, const Tuple& shape, const Any& input, const Any& target,
          const Any& weight, const Any& pos_weight, const Any& upstream, double scale, const Any& out) {
  const int dims = dims_of(shape);
  double sum = 0;
  int outside = 0;
  ElementwiseArgs args;
  args.op = static_cast<ElementOp>(op);
  args.wide = wide;
  args.threads = threads;
  args.input = operand(input, dims);
  args.target = operand(target, dims);
  args.weight = operand(weight, dims);
  args.pos_weight = operand(pos_weight, dims);
  args.upstream = operand(upstream, dims);
  args.scale = scale;
  args.out = operand(out, dims);
  args.sum = &sum;
  args.outside = &outside;
  std::int64_t sizes[kMaxDims], elements = 1;
  int order[kMaxDims], kept = 0;
  for (int d = dims; d-- > 0;) {
    sizes[d] = element<std::int64_t>(shape, d);
    elements *= sizes[d];
    if (sizes[d] != 1) order[kept++] = d;
  }
  // In memory's order: the output's, or the input's where only the sum is wanted.
  const Operand& lead = args.out.data ? args.out : args.input.data ? args.input : args.target;
  std::stable_sort(order, order + kept, [&](int a, int b) { return lead.strides[a] < lead.strides[b]; });
  args.dims = arrange<6>(sizes,
                         {args.input.strides, args.target.strides, args.weight.strides, args.pos_weight.strides,
                          args.upstream.strides, args.out.strides},
                         order, kept, args.sizes);
  void (*const kernel)(const ElementwiseArgs&) = kernels().elementwise;
  if (elements) without_gil(elements, [&] { kernel(args); });
  return make_tuple(sum, outside);
}

// A call of the cosine kernels as it arrives: all sizes, and in `order` the dimensions that number the rows, of which
// `kept` have more than one element.
struct VectorPairs {
  CosineArgs args;
  std::int64_t sizes[kMaxDims];
  int order[kMaxDims], kept, dims;
  std::int64_t elements;
};

// A tensor as vectors along dimension `dim`.
void vectors(const Any& given, int dims, int dim, Vectors* v) {
  const Operand o = operand(given, dims);
  v->data = o.data;
  std::copy(o.strides, o.strides + dims, v->strides);
  v->step = o.strides[dim];
}

void read_pairs(int storage, int threads, const Tuple& shape, int dim, const Any& x1, const Any& x2, bool embedding,
                double eps, double margin, Address target, Address out, Address saved, VectorPairs* p) {
  p->dims = dims_of(shape);
  if (dim < 0 || dim >= p->dims) throw std::invalid_argument("no such dimension");
  p->kept = 0;
  p->elements = 1;
  for (int d = p->dims; d-- > 0;) {
    p->sizes[d] = element<std::int64_t>(shape, d);
    p->elements *= p->sizes[d];
    if (d != dim && p->sizes[d] != 1) p->order[p->kept++] = d;
  }
  CosineArgs& a = p->args;
  a.storage = static_cast<Storage>(storage);
  a.threads = threads;
  a.rows.length = p->sizes[dim];
  vectors(x1, p->dims, dim, &a.x1);
  vectors(x2, p->dims, dim, &a.x2);
  a.embedding = embedding;
  a.eps = eps;
  a.margin = margin;
  a.target = at<const double>(target);
  a.out = at<void>(out);
  a.saved = at<double>(saved);
}

LL_PYTHON(void, cosine, int storage, int threads, const Tuple& shape, int dim, const Any& x1, const Any& x2,
          bool embedding, double eps, double margin, Address target, Address out, Address saved) {
  VectorPairs p;
  read_pairs(storage, threads, shape, dim, x1, x2, embedding, eps, margin, target, out, saved, &p);
  p.args.rows.dims = arrange<2>(p.sizes, {p.args.x1.strides, p.args.x2.strides}, p.order, p.kept, p.args.rows.sizes);
  void (*const kernel)(const CosineArgs&) = kernels().cosine;
  without_gil(p.elements, [&] { kernel(p.args); });
}

LL_PYTHON(void, cosine_grad, int storage, int threads, const Tuple& shape, int dim, const Any& x1, const Any& x2,
          bool embedding, double eps, double margin, Address target, Address saved, Address upstream,
          std::int64_t upstream_stride, double upstream_scale, const Any& grad1, const Any& grad2) {
  VectorPairs p;
  read_pairs(storage, threads, shape, dim, x1, x2, embedding, eps, margin, target, 0, saved, &p);
  CosineGradArgs g;
  g.upstream = at<const void>(upstream);
  g.upstream_stride = upstream_stride;
  g.upstream_scale = upstream_scale;
  vectors(grad1, p.dims, dim, &g.grad1);
  vectors(grad2, p.dims, dim, &g.grad2);
  // A gradient that is not wanted gets another one's strides: its own must not keep rows apart.
  if (!g.grad1.data) {
    g.grad1 = g.grad2.data ? g.grad2 : p.args.x1;
    g.grad1.data = nullptr;
  }
  if (!g.grad2.data) {
    g.grad2 = g.grad1;
    g.grad2.data = nullptr;
  }
  p.args.rows.dims = arrange<4>(p.sizes, {p.args.x1.strides, p.args.x2.strides, g.grad1.strides, g.grad2.strides},
                                p.order, p.kept, p.args.rows.sizes);
  g.forward = p.args;
  void (*const kernel)(const CosineGradArgs&) = kernels().cosine_grad;
  without_gil(p.elements, [&] { kernel(g); });
}

}  // namespace

void bind_elementwise(PyObject* module) {
  LL_DEFINE(module, elementwise);
  LL_DEFINE(module, cosine);
  LL_DEFINE(module, cosine_grad);
}
