"""The elementwise kernels as torch operators; see `rows`.

`logitless::elementwise` is differentiable in the input, and `logitless::elementwise_grad` is its gradient. A sum leaves
the operator in float64, so that what divides and rounds it around the operator does so once, as outside a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from logitless._operators.rows import backend_of, check_shapes, one_at_a_time
from logitless._rules.unit_interval import check_within_unit_interval
from logitless.kernels.interface import Backend, ElementLoss


def elementwise(
    loss: ElementLoss,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    backend: Backend,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return a loss of each element in `dtype`, or with None their sum in float64; only the input gets a gradient."""
    result: Tensor = _elementwise(input, target, weight, pos_weight, loss, dtype, backend=backend.NAME)
    return result


@torch.library.custom_op(
    "logitless::elementwise",
    mutates_args=(),
    schema="(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, str loss, ScalarType? dtype, *, "
    "str? backend=None) -> Tensor",
)
def _elementwise(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    loss: ElementLoss,
    dtype: torch.dtype | None,
    *,
    backend: str | None = None,
) -> Tensor:
    check_shapes("elementwise", input.shape, target=target)
    kernels = backend_of(backend, input, target, weight, pos_weight)
    if dtype is None:
        total, outside = kernels.elements_sum(loss, input, target, weight, pos_weight)
        result = total if isinstance(total, Tensor) else torch.scalar_tensor(total, dtype=torch.float64)
    else:
        result, outside = kernels.elements(loss, input, target, weight, pos_weight, dtype=dtype)
    if outside:
        check_within_unit_interval(input, target)
    return result


@_elementwise.register_fake
def _(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    loss: str,
    dtype: torch.dtype | None,
    *,
    backend: str | None = None,
) -> Tensor:
    return input.new_empty([], dtype=torch.float64) if dtype is None else torch.empty_like(input, dtype=dtype)


@torch.library.custom_op(
    "logitless::elementwise_grad",
    mutates_args=(),
    schema="(Tensor upstream, Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, str loss, bool summed, "
    "*, str? backend=None) -> Tensor",
)
def _elementwise_grad(
    upstream: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    loss: ElementLoss,
    summed: bool,
    *,
    backend: str | None = None,
) -> Tensor:
    check_shapes("elementwise_grad", input.shape, target=target, upstream=None if summed else upstream)
    kernels = backend_of(backend, input, target, weight, pos_weight)
    values, scale = (None, kernels.scalar(upstream)) if summed else (upstream, 1.0)
    return kernels.elements_grad(loss, input, target, weight, pos_weight, upstream=values, scale=scale)


@_elementwise_grad.register_fake
def _(upstream: Tensor, input: Tensor, *_: Any, backend: str | None = None) -> Tensor:
    return torch.empty_like(input)


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    *tensors, loss, dtype = inputs
    if any(ctx.needs_input_grad[1:4]):
        raise NotImplementedError("logitless::elementwise has a gradient for the input alone")
    ctx.save_for_backward(*tensors)
    ctx.loss, ctx.summed, ctx.backend = loss, dtype is None, keyword_only_inputs["backend"]


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grad = _elementwise_grad(grad_output, *ctx.saved_tensors, ctx.loss, ctx.summed, backend=ctx.backend)
    return grad, *(None,) * 5


_elementwise.register_autograd(_backward, setup_context=_setup)
_elementwise.register_vmap(one_at_a_time(_elementwise))
_elementwise_grad.register_vmap(one_at_a_time(_elementwise_grad))
