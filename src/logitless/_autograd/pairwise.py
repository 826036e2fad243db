"""Cosines of all pairs of two sets of vectors, as a product, and the definition that stands for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitless._heads.cosine_matrix import cosine_matrix, cosine_matrix_gradients
from logitless._heads.vectors import units
from logitless._rules.derivatives import needs_plain_backward, plain_backward
from logitless._rules.transforms import transform_reason
from logitless.kernels.definitions import is_sharded
from logitless.kernels.interface import Backend


class PairwiseCall(NamedTuple):
    """Who multiplies, and in which dtype."""

    backend: Backend
    dtype: torch.dtype


def pairwise(call: PairwiseCall, first: Tensor, second: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the cosine of each of the first vectors [N, D] with each of the second [M, D]; `out` takes no gradient."""
    if transform_reason(first, second, out) is not None or is_sharded(first) or is_sharded(second):
        plain = definition(call, first, second)
        return plain if out is None else out.copy_(plain)
    if out is not None:
        return cosine_matrix(call.backend, call.dtype, first, second, 0.0, out)
    made: Tensor = _Pairwise.apply(call, first, second)  # type: ignore[no-untyped-call] # torch types it not
    return made


class _Pairwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: PairwiseCall, first: Tensor, second: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(first, second)
        return cosine_matrix(call.backend, call.dtype, first, second, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call: PairwiseCall = ctx.call
        first, second = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        if needs_plain_backward(grad_output):
            return None, *plain_backward(lambda *xy: (definition(call, *xy),), [first, second], wanted, [grad_output])
        return None, *cosine_matrix_gradients(call.backend, call.dtype, first, second, 0.0, grad_output, wanted)


def definition(call: PairwiseCall, first: Tensor, second: Tensor) -> Tensor:
    """Return the same in plain torch, which torch differentiates; what a rounding puts beyond 1 is taken off again."""
    made = units(first.to(call.dtype)) @ units(second.to(call.dtype)).T
    return made - (made.detach() - made.detach().clamp(-1, 1))
