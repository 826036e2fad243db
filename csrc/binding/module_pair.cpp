// Python bindings of the two-row kernels; addresses, shapes and strides as in binding/module.cpp.
#include "binding/module_pair.h"

#include "binding/call.h"
#include "kernels.h"

using namespace logitless;

namespace {

LL_PYTHON(std::int64_t, pair_row_stats, int dtype, int threads, Address logits, std::int64_t outer,
          std::int64_t classes, std::int64_t inner, std::int64_t outer_stride, std::int64_t class_stride,
          std::int64_t inner_stride, Address other, std::int64_t other_outer_stride, std::int64_t other_class_stride,
          std::int64_t other_inner_stride, Address target, std::int64_t ignore_index, Address kl, Address reverse_kl,
          Address js, Address cross_entropy, Address entropy_p, Address entropy_q, Address nll_p, Address nll_q,
          Address same_top, int divergence, double weight, Address divergence_out, Address saved) {
  std::int64_t bad_row = -1;
  PairRowStatsArgs args{};
  args.dtype = static_cast<DType>(dtype);
  args.threads = threads;
  args.tile = {outer, classes, inner, outer_stride, class_stride, inner_stride};
  args.logits = at<void>(logits);
  args.other = at<void>(other);
  args.other_strides = {other_outer_stride, other_class_stride, other_inner_stride};
  args.target = at<std::int64_t>(target);
  args.ignore_index = ignore_index;
  args.kl = at<void>(kl);
  args.reverse_kl = at<void>(reverse_kl);
  args.js = at<void>(js);
  args.cross_entropy = at<void>(cross_entropy);
  args.entropy_p = at<void>(entropy_p);
  args.entropy_q = at<void>(entropy_q);
  args.nll_p = at<void>(nll_p);
  args.nll_q = at<void>(nll_q);
  args.same_top = at<std::uint8_t>(same_top);
  args.divergence = static_cast<Divergence>(divergence);
  args.weight = weight;
  args.divergence_out = at<void>(divergence_out);
  args.saved = at<double>(saved);
  args.bad_row = &bad_row;
  without_gil(2 * elements_of(args.tile), [&] { kernels().pair_row_stats(args); });
  return bad_row;
}

LL_PYTHON(void, pair_row_grad, int dtype, int threads, Address logits, std::int64_t outer, std::int64_t classes,
          std::int64_t inner, std::int64_t outer_stride, std::int64_t class_stride, std::int64_t inner_stride,
          Address other, std::int64_t other_outer_stride, std::int64_t other_class_stride,
          std::int64_t other_inner_stride, Address target, std::int64_t ignore_index, Address saved, Address kl,
          Address reverse_kl, Address js, Address cross_entropy, Address entropy_p, Address entropy_q, Address nll_p,
          Address nll_q, int divergence, double weight, Address divergence_grad, Address grad,
          std::int64_t grad_outer_stride, std::int64_t grad_class_stride, std::int64_t grad_inner_stride,
          Address other_grad, std::int64_t other_grad_outer_stride, std::int64_t other_grad_class_stride,
          std::int64_t other_grad_inner_stride) {
  PairRowGradArgs args{};
  args.dtype = static_cast<DType>(dtype);
  args.threads = threads;
  args.tile = {outer, classes, inner, outer_stride, class_stride, inner_stride};
  args.logits = at<void>(logits);
  args.other = at<void>(other);
  args.other_strides = {other_outer_stride, other_class_stride, other_inner_stride};
  args.target = at<std::int64_t>(target);
  args.ignore_index = ignore_index;
  args.saved = at<double>(saved);
  args.kl = at<void>(kl);
  args.reverse_kl = at<void>(reverse_kl);
  args.js = at<void>(js);
  args.cross_entropy = at<void>(cross_entropy);
  args.entropy_p = at<void>(entropy_p);
  args.entropy_q = at<void>(entropy_q);
  args.nll_p = at<void>(nll_p);
  args.nll_q = at<void>(nll_q);
  args.divergence = static_cast<Divergence>(divergence);
  args.weight = weight;
  args.divergence_grad = at<void>(divergence_grad);
  args.grad = at<void>(grad);
  args.grad_strides = {grad_outer_stride, grad_class_stride, grad_inner_stride};
  args.other_grad = at<void>(other_grad);
  args.other_grad_strides = {other_grad_outer_stride, other_grad_class_stride, other_grad_inner_stride};
  without_gil(2 * elements_of(args.tile), [&] { kernels().pair_row_grad(args); });
}

}  // namespace

void bind_pair(PyObject* module) {
  if (PyModule_AddIntConstant(module, "PAIR_SAVED", kPairSaved)) throw PythonError{};
  LL_DEFINE(module, pair_row_stats);
  LL_DEFINE(module, pair_row_grad);
}
