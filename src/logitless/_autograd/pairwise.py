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
from logitless._heads.vectors import inverse_norms
from logitless._rules.derivatives import needs_plain_backward, plain_backward
from logitless._rules.transforms import transform_reason
from logitless.kernels.definitions import is_sharded
from logitless.kernels.interface import Backend


class PairwiseCall(NamedTuple):
    """Who multiplies, in which dtype, the least norm, and the dtype of the result."""

    backend: Backend
    dtype: torch.dtype
    eps: float
    result: torch.dtype


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
    units, _ = _units(call, first)
    multiply(call.backend, units, (units if one else _units(call, second)[0]).T, made)
    made.clamp_(-1, 1)
    if out is None:
        return made.to(call.result)
    return out if direct else out.copy_(made)


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
        units, inverse = sides[number]
        gradient = torch.empty(vectors.shape, dtype=call.dtype, device=vectors.device)
        multiply(call.backend, given.T if number else given, sides[1 - number][0], gradient)
        along = (units * gradient).sum(1, keepdim=True)
        if call.eps > 0:  # what is shorter than eps is divided by a constant
            along = along.masked_fill(inverse >= 1 / call.eps, 0)
        found.append(gradient.addcmul_(units, along, value=-1).mul_(inverse).to(vectors.dtype))
    return found


def _units(call: PairwiseCall, vectors: Tensor) -> tuple[Tensor, Tensor]:
    inverse = inverse_norms(vectors, call.dtype, call.eps)
    return vectors * inverse, inverse


def definition(call: PairwiseCall, first: Tensor, second: Tensor) -> Tensor:
    """Return the same in plain torch, which torch differentiates."""
    sides = [_of_length_one(vectors.to(call.dtype), call.eps) for vectors in (first, second)]
    return (sides[0] @ sides[1].T).to(call.result)


def _of_length_one(vectors: Tensor, eps: float) -> Tensor:
    """Return x / max(|x|, eps); no square overflows or vanishes, as each vector is divided by its largest element."""
    largest = vectors.detach().abs().amax(1, keepdim=True)
    largest = largest.masked_fill(largest == 0, 1)
    scaled = vectors / largest
    squares = scaled.square().sum(1, keepdim=True)
    short = squares <= (eps / largest) ** 2
    norms = squares.masked_fill(short, 1).sqrt()
    return torch.where(short, vectors / (eps or 1.0), scaled / norms)
