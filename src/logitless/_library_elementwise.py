"""The elementwise kernels as torch operators; see `_library`.

`logitless::elementwise` is differentiable in the input, and `logitless::elementwise_grad` is its gradient. A sum leaves
the operator in float64, so that what divides and rounds it around the operator does so once, as outside a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from logitless._elements import KERNELS, Kernel
from logitless._library import one_at_a_time


def elementwise(
    kernel: Kernel,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return a loss of each element in `dtype`, or with None their sum in float64; only the input gets a gradient."""
    result: Tensor = _elementwise(input, target, weight, pos_weight, kernel.name, dtype)
    return result


def _given(**weights: Tensor | None) -> dict[str, Tensor]:
    """Return the weights that there are: a loss that has none takes none."""
    return {name: weight for name, weight in weights.items() if weight is not None}


@torch.library.custom_op(
    "logitless::elementwise",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, str loss, ScalarType? dtype) -> Tensor",
)
def _elementwise(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    loss: str,
    dtype: torch.dtype | None,
) -> Tensor:
    weights = _given(weight=weight, pos_weight=pos_weight)
    if dtype is None:
        return torch.scalar_tensor(KERNELS[loss].total(input, target, **weights), dtype=torch.float64)
    return KERNELS[loss].elements(input, target, dtype=dtype, **weights)


@_elementwise.register_fake
def _(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    loss: str,
    dtype: torch.dtype | None,
) -> Tensor:
    return input.new_empty([], dtype=torch.float64) if dtype is None else torch.empty_like(input, dtype=dtype)


@torch.library.custom_op(
    "logitless::elementwise_grad",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor upstream, Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, str loss, bool summed) "
    "-> Tensor",
)
def _elementwise_grad(
    upstream: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    loss: str,
    summed: bool,
) -> Tensor:
    weights = _given(weight=weight, pos_weight=pos_weight)
    values, scale = (None, float(upstream)) if summed else (upstream, 1.0)
    return KERNELS[loss].gradient(input, target, upstream=values, scale=scale, **weights)


@_elementwise_grad.register_fake
def _(upstream: Tensor, input: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, loss, dtype = inputs
    if any(ctx.needs_input_grad[1:4]):
        raise NotImplementedError("logitless::elementwise has a gradient for the input alone")
    ctx.save_for_backward(*tensors)
    ctx.loss, ctx.summed = loss, dtype is None


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return _elementwise_grad(grad_output, *ctx.saved_tensors, ctx.loss, ctx.summed), *(None,) * 5


_elementwise.register_autograd(_backward, setup_context=_setup)
_elementwise.register_vmap(one_at_a_time(_elementwise))
_elementwise_grad.register_vmap(one_at_a_time(_elementwise_grad))
