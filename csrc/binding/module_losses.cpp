// A whole loss in one call: where rows are few, the calls around the kernels cost as much as the arithmetic, and where
// they are many and short, so do passes over their losses.
//
// Precision: the row kernels' own; the sum over rows is in double.
#include "binding/module_losses.h"

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>

#include "binding/call.h"
#include "binding/tensor.h"
#include "kernels.h"

using namespace logitless;

namespace {

// Contiguous rows [rows, classes], and what cross-entropy asks of them. Either a target or a dense target is given.
struct Problem {
  DType dtype;
  int threads;
  std::int64_t rows, classes;
  const void* logits;
  const std::int64_t* target;
  std::int64_t ignore_index;
  const void* weight;
  const void* dense_target;
  double smoothing;

  double spread() const { return smoothing / static_cast<double>(classes); }
  Tile tile() const { return {rows, classes, 1, classes, 1, 0}; }
};

// What the gradient needs of the forward pass: this, and for each row what follows; nothing where there will be none.
// Python holds it as bytes, which cost a fraction of a tensor to make.
struct Head {
  double denominator, smoothing;
  std::int64_t ignore_index;
};

struct Saved {
  Head* head = nullptr;
  double* log_sum = nullptr;
  void* pivot = nullptr;
  void* dense_mass = nullptr;  // of a dense target alone

  static std::size_t real_bytes(const Problem& p) {
    return p.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  }
  static std::size_t bytes(const Problem& p) {
    return sizeof(Head) + static_cast<std::size_t>(p.rows) * (sizeof(double) + real_bytes(p) * (p.target ? 1 : 2));
  }
  static Object room(const Problem& p, bool save) {
    return Object(PyBytes_FromStringAndSize(nullptr, save ? static_cast<Py_ssize_t>(bytes(p)) : 0));
  }
  Saved(const Bytes& bytes, const Problem& p) {
    if (bytes.size() == 0) return;
    char* const data = bytes.data();
    const std::size_t rows = static_cast<std::size_t>(p.rows);
    head = reinterpret_cast<Head*>(data);
    log_sum = reinterpret_cast<double*>(data + sizeof(Head));
    pivot = log_sum + rows;
    dense_mass = static_cast<char*>(pivot) + rows * real_bytes(p);
  }
};

struct Sum {
  double total, denominator;
};

// Reduce the rows' losses; with `losses` also keep them.
template <class Real>
Sum sum_rows(const Problem& p, const Real* nll, const Real* smooth_sum, const Real* dense_sum, Real* losses) {
  const Real* const weight = static_cast<const Real*>(p.weight);
  const Real kept = static_cast<Real>(1 - p.smoothing), spread = static_cast<Real>(p.spread());
  Sum sum{0, p.target ? 0 : static_cast<double>(p.rows)};
  // The plain case, in four sums that do not wait for each other. The loss of an ignored row is 0.
  if (p.target && !weight && p.smoothing == 0 && !losses) {
    double total[4] = {};
    std::int64_t r = 0, ignored = 0;
    for (; r + 4 <= p.rows; r += 4) {
      for (int k = 0; k < 4; ++k) {
        total[k] += static_cast<double>(nll[r + k]);
        ignored += p.target[r + k] == p.ignore_index;
      }
    }
    for (; r < p.rows; ++r) {
      total[0] += static_cast<double>(nll[r]);
      ignored += p.target[r] == p.ignore_index;
    }
    return {(total[0] + total[1]) + (total[2] + total[3]), static_cast<double>(p.rows - ignored)};
  }
  for (std::int64_t r = 0; r < p.rows; ++r) {
    Real loss = p.target ? nll[r] : dense_sum[r];
    if (p.target && p.target[r] != p.ignore_index) {
      const Real row_weight = weight ? weight[p.target[r]] : Real(1);
      loss = row_weight == 0 ? Real(0) : row_weight * loss;
      sum.denominator += static_cast<double>(row_weight);
    }
    if (p.smoothing > 0) loss = (kept == 0 ? Real(0) : kept * loss) + spread * smooth_sum[r];
    if (losses) losses[r] = loss;
    sum.total += static_cast<double>(loss);
  }
  return sum;
}

template <class Real> double weight_sum(const Problem& p) {
  const Real* const weight = static_cast<const Real*>(p.weight);
  return weight ? std::accumulate(weight, weight + p.classes, 0.0) : static_cast<double>(p.classes);
}

// Cross-entropy over contiguous rows, reduced: their mean, or their sum, into `result` too unless that is null, and
// into `losses` unless that is null each row's loss. Returns (bad_row, loss, saved), the last for cross_entropy_grad
// and empty unless asked for.
template <class Real> Object reduced(const Problem& p, bool mean, Real* result, Real* losses, bool save) {
  // nll or dense_sum, and smooth_sum: one each a row
  const std::unique_ptr<Real[]> scratch(new Real[static_cast<std::size_t>(p.rows) * (p.smoothing > 0 ? 2 : 1)]);
  Real* const loss = scratch.get();
  Real* const smooth_sum = loss + p.rows;
  Object bytes = Saved::room(p, save);
  const Saved saved(Bytes{bytes.get()}, p);
  std::int64_t bad_row = -1;

  RowStatsArgs args{};
  args.dtype = p.dtype;
  args.threads = p.threads;
  args.tile = p.tile();
  args.logits = p.logits;
  args.target = p.target;
  args.ignore_index = p.ignore_index;
  args.class_weight = p.weight;
  args.pivot = saved.pivot;
  args.log_sum = saved.log_sum;
  if (p.target) {
    args.nll = loss;
  } else {
    args.dense_target = p.dense_target;
    args.dense_strides = {p.classes, 1, 0};
    args.dense_sum = loss;
    args.dense_mass = saved.dense_mass;
  }
  if (p.smoothing > 0) args.smooth_sum = smooth_sum;
  args.bad_row = &bad_row;
  Sum sum{};
  without_gil(p.rows * p.classes, [&] {
    kernels().row_stats(args);
    if (bad_row < 0) sum = sum_rows<Real>(p, loss, smooth_sum, loss, losses);
  });
  if (bad_row >= 0) return make_tuple(bad_row, 0.0, std::move(bytes));
  const double denominator = mean ? sum.denominator : 1.0;
  if (saved.head) *saved.head = {denominator, p.smoothing, p.ignore_index};
  // Rounded here: torch refuses to make a float of a double beyond its range, where the answer is infinity.
  const Real value = static_cast<Real>(sum.total / denominator);
  if (result) *result = value;
  return make_tuple(bad_row, static_cast<double>(value), std::move(bytes));
}

DType real_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// The problem that these tensors are, or none: other shapes, dtypes, places, or layouts. One row may come by itself.
std::optional<Problem> problem(const Tensor& logits, const Tensor& target, const Tensor& weight) {
  const int dims = logits.dims();
  const std::optional<DType> dtype = logits.dtype();
  if (!dtype || (dims != 1 && dims != 2) || !logits.is_plain() || !target.is_plain()) return std::nullopt;
  Problem p{};
  p.dtype = *dtype;
  p.rows = dims == 1 ? 1 : logits.size(0);
  p.classes = logits.size(dims - 1);
  if (!p.rows || !p.classes) return std::nullopt;
  p.logits = logits.data<void>();
  if (target.holds_indices()) {
    if (target.dims() != dims - 1 || (dims == 2 && target.size(0) != p.rows)) return std::nullopt;
    p.target = target.data<std::int64_t>();
  } else {
    if (!target.holds(p.dtype) || !target.same_shape(logits)) return std::nullopt;
    p.dense_target = target.data<void>();
  }
  if (weight.given()) {
    if (!weight.holds(real_of(p.dtype)) || weight.dims() != 1 || weight.size(0) != p.classes || !weight.is_plain())
      return std::nullopt;
    p.weight = weight.data<void>();
  }
  return p;
}

// Of fewer logits a thread alone is done before it could ask for another.
int threads_for(const Problem& p, int threads) { return p.rows * p.classes <= kReleaseAt ? 1 : threads; }

// Where so many numbers lie, one after the other; null where they are not asked for.
template <class T> T* room_for(const Tensor& out, std::int64_t elements, DType dtype) {
  if (!out.given()) return nullptr;
  if (!out.holds(dtype) || out.elements() != elements || !out.is_plain())
    throw std::invalid_argument("cross_entropy: memory of another shape, dtype or layout than the logits ask for");
  return out.data<T>();
}

template <class Real>
Object reduced_into(const Problem& p, bool mean, const Tensor& result, const Tensor& losses, bool save) {
  const DType real = real_of(p.dtype);
  return reduced<Real>(p, mean, room_for<Real>(result, 1, real), room_for<Real>(losses, p.rows, real), save);
}

// (bad_row, loss, saved), or None where the tensors are another problem: the caller has other ways for those.
LL_PYTHON(Object, cross_entropy, int threads, const Tensor& logits, const Tensor& target, const Tensor& weight,
          std::int64_t ignore_index, double smoothing, bool mean, const Tensor& result, const Tensor& losses,
          bool save) {
  std::optional<Problem> p = problem(logits, target, weight);
  if (!p || (p->dense_target && ignore_index >= 0)) return Object(Py_NewRef(Py_None));
  p->threads = threads_for(*p, threads);
  p->ignore_index = ignore_index;
  p->smoothing = smoothing;
  return p->dtype == DType::kFloat64 ? reduced_into<double>(*p, mean, result, losses, save)
                                     : reduced_into<float>(*p, mean, result, losses, save);
}

// The gradient of the rows' losses, each times `upstream`, which is one number for all rows or one for each.
LL_PYTHON(void, cross_entropy_grad, int threads, const Tensor& logits, const Tensor& target, const Tensor& weight,
          const Bytes& saved, const Tensor& upstream, const Tensor& grad) {
  std::optional<Problem> given = problem(logits, target, weight);
  if (!given || saved.size() != static_cast<Py_ssize_t>(Saved::bytes(*given)))
    throw std::invalid_argument("cross_entropy_grad: other tensors than cross_entropy was given");
  Problem& p = *given;
  const Saved forward(saved, p);
  p.threads = threads_for(p, threads);
  p.ignore_index = forward.head->ignore_index;
  p.smoothing = forward.head->smoothing;
  const DType real = real_of(p.dtype);
  const bool shared = upstream.elements() == 1;
  const void* const upstreams = room_for<void>(upstream, shared ? 1 : p.rows, real);
  double scale = 1;
  if (shared) scale = real == DType::kFloat64 ? *upstream.data<double>() : *upstream.data<float>();
  scale /= forward.head->denominator;
  const double kept = scale * (1 - p.smoothing), spread = scale * p.spread();
  RowGradArgs args{};
  args.dtype = p.dtype;
  args.threads = p.threads;
  args.tile = p.tile();
  args.logits = p.logits;
  args.grad_strides = {p.classes, 1, 0};
  args.grad = room_for<void>(grad, p.rows * p.classes, p.dtype);
  args.target = p.target;
  args.ignore_index = p.ignore_index;
  args.class_weight = p.weight;
  args.row_max = forward.pivot;
  args.log_sum = forward.log_sum;
  args.upstream = shared ? nullptr : upstreams;
  args.upstream_stride = 1;
  args.a_scale = kept;
  if (p.target) {
    args.index_weight = p.weight != nullptr;
    args.c_scale = -kept;
  } else {
    args.dense_target = p.dense_target;
    args.dense_strides = {p.classes, 1, 0};
    args.a = forward.dense_mass;
    args.e_scale = -kept;
  }
  if (p.smoothing > 0) {
    args.a_extra = spread * (p.dtype == DType::kFloat64 ? weight_sum<double>(p) : weight_sum<float>(p));
    args.f_scale = -spread;
  }
  without_gil(p.rows * p.classes, [&] { kernels().row_grad(args); });
}

// What a tensor of torch's is: asked for once, before any other call that takes one.
LL_PYTHON(void, tensors_are, Any type, Any exchange, Any to_dlpack) {
  Tensor::are(type.object, exchange.object, to_dlpack.object);
}

// os.environ's own look-up encodes the name at each call, at a cost that a small loss notices.
LL_PYTHON(bool, backend_is_forced) { return std::getenv("LOGITLESS_BACKEND") != nullptr; }

}  // namespace

void bind_losses(PyObject* module) {
  LL_DEFINE(module, cross_entropy);
  LL_DEFINE(module, cross_entropy_grad);
  LL_DEFINE(module, tensors_are);
  LL_DEFINE(module, backend_is_forced);
}
