// Python bindings of the two-row kernels; addresses, shapes and strides as in module.cpp.
#include "binding/module_pair.h"

#include "kernels.h"

namespace nb = nanobind;
using namespace logitless;
using Address = std::uintptr_t;

namespace {

template <class T> T* at(Address address) { return reinterpret_cast<T*>(address); }

template <class Args> void call(void (*kernel)(const Args&), const Args& args) {
  const Tile& t = args.tile;
  if (t.outer * t.inner * t.classes < 8192) return kernel(args);
  const nb::gil_scoped_release release;
  kernel(args);
}

std::int64_t pair_row_stats(int dtype, int threads, Address logits, std::int64_t outer, std::int64_t classes,
                            std::int64_t inner, std::int64_t outer_stride, std::int64_t class_stride,
                            std::int64_t inner_stride, Address other, std::int64_t other_outer_stride,
                            std::int64_t other_class_stride, std::int64_t other_inner_stride, Address target,
                            std::int64_t ignore_index, Address kl, Address reverse_kl, Address js,
                            Address cross_entropy, Address entropy_p, Address entropy_q, Address nll_p, Address nll_q,
                            Address same_top, Address saved) {
  std::int64_t bad_row = -1;
  call(kernels().pair_row_stats, PairRowStatsArgs{static_cast<DType>(dtype),
                                                  threads,
                                                  {outer, classes, inner, outer_stride, class_stride, inner_stride},
                                                  at<void>(logits),
                                                  at<void>(other),
                                                  {other_outer_stride, other_class_stride, other_inner_stride},
                                                  at<std::int64_t>(target),
                                                  ignore_index,
                                                  at<void>(kl),
                                                  at<void>(reverse_kl),
                                                  at<void>(js),
                                                  at<void>(cross_entropy),
                                                  at<void>(entropy_p),
                                                  at<void>(entropy_q),
                                                  at<void>(nll_p),
                                                  at<void>(nll_q),
                                                  at<std::uint8_t>(same_top),
                                                  at<double>(saved),
                                                  &bad_row});
  return bad_row;
}

void pair_row_grad(int dtype, int threads, Address logits, std::int64_t outer, std::int64_t classes, std::int64_t inner,
                   std::int64_t outer_stride, std::int64_t class_stride, std::int64_t inner_stride, Address other,
                   std::int64_t other_outer_stride, std::int64_t other_class_stride, std::int64_t other_inner_stride,
                   Address target, std::int64_t ignore_index, Address saved, Address kl, Address reverse_kl, Address js,
                   Address cross_entropy, Address entropy_p, Address entropy_q, Address nll_p, Address nll_q,
                   Address grad, std::int64_t grad_outer_stride, std::int64_t grad_class_stride,
                   std::int64_t grad_inner_stride, Address other_grad, std::int64_t other_grad_outer_stride,
                   std::int64_t other_grad_class_stride, std::int64_t other_grad_inner_stride) {
  call(kernels().pair_row_grad,
       PairRowGradArgs{static_cast<DType>(dtype),
                       threads,
                       {outer, classes, inner, outer_stride, class_stride, inner_stride},
                       at<void>(logits),
                       at<void>(other),
                       {other_outer_stride, other_class_stride, other_inner_stride},
                       at<std::int64_t>(target),
                       ignore_index,
                       at<double>(saved),
                       at<void>(kl),
                       at<void>(reverse_kl),
                       at<void>(js),
                       at<void>(cross_entropy),
                       at<void>(entropy_p),
                       at<void>(entropy_q),
                       at<void>(nll_p),
                       at<void>(nll_q),
                       at<void>(grad),
                       {grad_outer_stride, grad_class_stride, grad_inner_stride},
                       at<void>(other_grad),
                       {other_grad_outer_stride, other_grad_class_stride, other_grad_inner_stride}});
}

}  // namespace

void bind_pair(nb::module_& m) {
  m.attr("PAIR_SAVED") = static_cast<int>(kPairSaved);
  m.def("pair_row_stats", &pair_row_stats);
  m.def("pair_row_grad", &pair_row_grad);
}
