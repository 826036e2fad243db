"""Torch's Kullback-Leibler divergence between two given distributions; from logits, see `measures.kl`."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor

from logitless._autograd.elements import (
    ElementwiseCall,
    Reduction,
    backend_of_few_numbers,
    elementwise,
    kernel_obstacle,
    of_few_numbers,
)
from logitless._rules import dispatch
from logitless._rules.precision import check_input, check_real, no_autocast, precision_of
from logitless._rules.reduction import count_of, reduce_rows, resolve_reduction
from logitless._rules.targets import resolve_class_dim
from logitless.kernels import definitions
from logitless.kernels.interface import ElementLoss

_MEAN_IS_NOT_THE_DIVERGENCE = (
    "reduction: 'mean' divides the total loss by both the batch size and the support size. "
    "'batchmean' divides only by the batch size, and aligns with the KL div math definition; "
    "'rowmean' divides by the number of rows, which is right for (N, C, d1, ...) too."
)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
    *,
    class_dim: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the Kullback-Leibler divergence KL(target || exp(input)), in nats.

    Equals `torch.nn.functional.kl_div(input, target, ...)`: elementwise `target * (target.log() - input)`. The true
    distribution P is `target`; the predicted one, Q, is `input` and in log space.

    Args:
        input: log-probabilities of Q, any shape.
        target: probabilities of P, or with `log_target` their logarithms; the input's shape (as torch, a shape that
            broadcasts is taken, with a warning).
        size_average, reduce: torch's deprecated spelling of `reduction`.
        reduction: "none", "sum", "batchmean" (the sum over the first size), "rowmean" (the sum over the number of
            rows, right for (N, C, d1, ...) as well), or torch's default "mean", which divides by the number of
            elements and so is *not* the divergence: it warns, as in torch (in a compiled graph nothing does).
        class_dim: for "rowmean", the classes' dimension where it is not 0 of one row, else 1.
        backend: force a backend; see `logitless.backends`.

    Returns:
        A scalar, or with "none" the input's shape, whose single elements may be negative. A zero target gives 0 and
        a gradient of 0, whatever the input.

    Raises:
        RuntimeError: an integer dtype, or shapes that do not broadcast. TypeError: a complex dtype. ValueError: an
            unknown reduction.

    Source: `torch.nn.functional.kl_div`; Kullback and Leibler (1951). In training with a fixed target it has the
    gradient of cross-entropy: it draws the prediction onto the whole target distribution.

    >>> import torch, logitless.functional as F
    >>> F.kl_div(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]), reduction="batchmean")
    tensor(0.6931)
    """
    if reduction == "mean" and size_average is None and reduce is None:
        _warn(_MEAN_IS_NOT_THE_DIVERGENCE)
    loss: ElementLoss = "kl_div_log_target" if log_target else "kl_div"
    if (
        size_average is None
        and reduce is None
        and class_dim is None
        and backend is None
        and (reduction == "mean" or reduction == "sum" or reduction == "batchmean")
        and (quick := backend_of_few_numbers(input, target)) is not None
    ):
        summed = partial(kl_div, log_target=log_target)
        return of_few_numbers(quick, loss, summed, input, target, _denominator(reduction, input, input.shape, None))
    reduction = resolve_reduction(reduction, size_average, reduce, extra=("batchmean", "rowmean"))
    check_real("kl_div", input=input, target=target)
    for tensor in (input, target):
        if isinstance(tensor, Tensor) and not tensor.dtype.is_floating_point:
            raise RuntimeError(f"kl_div: Integral inputs not supported, got {tensor.dtype}")
    check_input("kl_div", input, target)
    sizes = input.shape
    if input.shape != target.shape:
        sizes = torch.broadcast_shapes(input.shape, target.shape)
        _warn(
            f"kl_div: input {tuple(input.shape)} and target {tuple(target.shape)} differ and are broadcast, as in "
            "torch; expand one of them if that is meant"
        )
    precision = precision_of(input, target)
    denominator = torch.sym_float(_denominator(reduction, input, sizes, class_dim))
    kind = reduction if reduction in ("none", "sum") else "mean"

    def definition(input: Tensor, target: Tensor) -> Tensor:
        with no_autocast(input):
            elements = definitions.kl_div(input.to(precision.compute), target.to(precision.compute), log_target)
        return reduce_rows(elements, kind, denominator=denominator, dtype=precision.result)

    obstacle = "the input is broadcast" if input.shape != sizes else kernel_obstacle(input.numel(), target=target)
    picked = dispatch.pick("kl_div", (input, target), backend, obstacle=obstacle, compiles=True)
    if picked.PLAIN:
        return definition(input, target)
    call = ElementwiseCall(picked, loss, Reduction(kind, denominator, precision.result), definition)
    return elementwise(call, input, target if target.shape == sizes else target.expand(sizes))


def _warn(message: str) -> None:
    """Warn the caller of `kl_div`, but not while it is compiled: a warning would cut the graph in two."""
    if not torch.compiler.is_compiling():
        warnings.warn(message, stacklevel=3)


def _denominator(reduction: str, input: Tensor, sizes: torch.Size, class_dim: int | None) -> int:
    """Return what the sum is divided by."""
    if reduction == "batchmean":
        return input.shape[0] if input.dim() else 1
    if reduction == "rowmean":
        classes = sizes[resolve_class_dim("kl_div", len(sizes), class_dim)] if sizes else 1
        return count_of(sizes) // max(classes, 1)
    return count_of(sizes) if reduction == "mean" else 1
