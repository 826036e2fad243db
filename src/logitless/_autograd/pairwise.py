"""Cosines of all pairs of two sets of vectors, as a product, and the definition that stands for it.

Precision policy: unit vectors and products are float32 (float64 of float64), whatever the vectors are; a cosine is
within [-1, 1]. Beside the matrix of cosines nothing larger than the vectors is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitless._heads.products import multiply
from logitless._heads.vectors import inverse_norms, units
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
        return cosines(call, first, second, out)
    made: Tensor = _Pairwise.apply(call, first, second)  # type: ignore[no-untyped-call] # torch types it not
    return made


def cosines(call: PairwiseCall, first: Tensor, second: Tensor, out: Tensor | None = None) -> Tensor:
    """Return them without a gradient."""
    shape = torch.Size((len(first), len(second)))
    direct = out is not None and out.dtype == call.dtype and 1 in out.stride()
    made = out if direct else call.backend.empty(shape, call.dtype, first.device)
    assert made is not None
    one = first is second
    unit, _ = _units(call, first)
    multiply(call.backend, unit, (unit if one else _units(call, second)[0]).T, made)
    made.clamp_(-1, 1)
    return made if out is None or direct else out.copy_(made)


class _Pairwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: PairwiseCall, first: Tensor, second: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(first, second)
        return cosines(call, first, second)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call: PairwiseCall = ctx.call
        first, second = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        if needs_plain_backward(grad_output):
            return None, *plain_backward(lambda *xy: (definition(call, *xy),), [first, second], wanted, [grad_output])
        return None, *_gradients(call, first, second, grad_output, wanted)


def _gradients(
    call: PairwiseCall, first: Tensor, second: Tensor, upstream: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    given = upstream.to(call.dtype)
    sides = [_units(call, first), _units(call, second)]
    found: list[Tensor | None] = []
    for number, vectors in enumerate((first, second)):
        if not wanted[number]:
            found.append(None)
            continue
        unit, inverse = sides[number]
        gradient = torch.empty(vectors.shape, dtype=call.dtype, device=vectors.device)
        multiply(call.backend, given.T if number else given, sides[1 - number][0], gradient)
        along = (unit * gradient).sum(1, keepdim=True)
        found.append(gradient.addcmul_(unit, along, value=-1).mul_(inverse).to(vectors.dtype))
    return found


def _units(call: PairwiseCall, vectors: Tensor) -> tuple[Tensor, Tensor]:
    inverse = inverse_norms(vectors, call.dtype)
    return vectors * inverse, inverse


def definition(call: PairwiseCall, first: Tensor, second: Tensor) -> Tensor:
    """Return the same in plain torch, which torch differentiates; what a rounding puts beyond 1 is taken off again."""
    made = units(first.to(call.dtype)) @ units(second.to(call.dtype)).T
    return made - (made.detach() - made.detach().clamp(-1, 1))
