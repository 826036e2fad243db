"""The losses of single elements by name: their kernels, and the range that binary cross-entropy checks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from logitless._transforms import values_are_readable
from logitless.kernels import cpu_elementwise as kernels


class Kernel(NamedTuple):
    """The three kernels of an elementwise loss, each of the input and the call's operands."""

    name: str
    elements: Callable[..., Tensor]  # with a `dtype`
    total: Callable[..., float]
    gradient: Callable[..., Tensor]  # with `upstream` and `scale`


def check_within_unit_interval(input: Tensor, target: Tensor) -> None:
    """Raise unless both, where they are floating and can be looked at, lie within [0, 1]."""
    for name, tensor in (("input", input), ("target", target)):
        if not tensor.dtype.is_floating_point or not values_are_readable(tensor):
            continue
        outside = ~((tensor >= 0) & (tensor <= 1))
        if not bool(outside.any()):
            continue
        position = tuple(outside.nonzero()[0].tolist())
        value = tensor[position].item()
        what = "NaN" if value != value else repr(value)
        raise RuntimeError(
            f"binary_cross_entropy: all elements of {name} should be between 0 and 1; {name}{list(position)} is {what}"
        )


def _checked_elements(input: Tensor, target: Tensor, weight: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    loss, outside = kernels.bce(input, target, weight, dtype=dtype)
    if outside:
        check_within_unit_interval(input, target)
    return loss


def _checked_total(input: Tensor, target: Tensor, weight: Tensor | None = None) -> float:
    total, outside = kernels.bce_sum(input, target, weight)
    if outside:
        check_within_unit_interval(input, target)
    return total


def _kl_div(name: str, log_target: bool) -> Kernel:
    return Kernel(
        name,
        partial(kernels.kl, log_target=log_target),
        partial(kernels.kl_sum, log_target=log_target),
        partial(kernels.kl_grad, log_target=log_target),
    )


BCE = Kernel("binary_cross_entropy", _checked_elements, _checked_total, kernels.bce_grad)
BCE_LOGITS = Kernel(
    "binary_cross_entropy_with_logits", kernels.bce_logits, kernels.bce_logits_sum, kernels.bce_logits_grad
)
KL_DIV = _kl_div("kl_div", False)
KL_DIV_LOG_TARGET = _kl_div("kl_div_log_target", True)
KERNELS = {kernel.name: kernel for kernel in (BCE, BCE_LOGITS, KL_DIV, KL_DIV_LOG_TARGET)}
