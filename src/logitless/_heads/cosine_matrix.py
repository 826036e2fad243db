"""The cosine of each of some vectors with each of others, as a product of unit vectors, and its gradients.

    cos_ij = u_i . v_j        u = x / max(|x|, eps)
    dx_i   = (sum_j G_ij v_j - share_i (u_i . sum_j G_ij v_j) u_i) / max(|x_i|, eps)

where `share` is 1 for a vector longer than eps, 0 for a shorter one, whose norm is then a constant, and a half for one
of that length, as `torch.maximum` has it. A zero vector with eps 0 stays zero and has a gradient of zero.

Precision policy: a vector is divided by its norm in float64, after an exact scaling by a power of two, so that no
square overflows or vanishes; unit vectors and products are float32 (float64 of float64); a cosine is within [-1, 1].
Beside the matrix of cosines nothing larger than the vectors is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from logitless._heads.products import multiply
from logitless._heads.vectors import lengths
from logitless.kernels.interface import Backend

_BLOCK_ROWS = 256  # vectors whose float64 copies stay small


class _Units(NamedTuple):
    """Unit vectors [rows, features], and of each the norm it was divided by, and its share of the gradient."""

    vectors: Tensor
    norms: Tensor  # float64 [rows, 1]; infinite where the gradient is zero
    share: Tensor  # float64 [rows, 1]


def cosine_matrix(
    backend: Backend, dtype: torch.dtype, first: Tensor, second: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """Return the cosines [N, M] of vectors [N, D] with vectors [M, D], in `dtype`; into `out`, where it is given."""
    shape = torch.Size((len(first), len(second)))
    direct = out is not None and out.dtype == dtype and 1 in out.stride()
    made = out if direct else backend.empty(shape, dtype, first.device)
    assert made is not None
    one = _units(first, dtype, eps)
    other = one if first is second else _units(second, dtype, eps)
    multiply(backend, one.vectors, other.vectors.T, made)
    made.clamp_(-1, 1)
    return made if out is None or direct else out.copy_(made)


def cosine_matrix_gradients(
    backend: Backend,
    dtype: torch.dtype,
    first: Tensor,
    second: Tensor,
    eps: float,
    upstream: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of the vectors that are wanted, in their dtypes."""
    given = upstream.to(dtype)
    one = _units(first, dtype, eps)
    sides = [one, one if first is second else _units(second, dtype, eps)]
    found: list[Tensor | None] = []
    for number, vectors in enumerate((first, second)):
        if not wanted[number]:
            found.append(None)
            continue
        product = torch.empty(vectors.shape, dtype=dtype, device=vectors.device)
        multiply(backend, given.T if number else given, sides[1 - number].vectors, product)
        gradient = torch.empty_like(product, dtype=vectors.dtype)
        blocks = (tensor.split(_BLOCK_ROWS) for tensor in (product, *sides[number], gradient))
        for part, unit, norms, share, to in zip(*blocks, strict=True):
            part, unit = part.double(), unit.double()
            along = (unit * part).sum(1, keepdim=True) * share
            to.copy_(part.addcmul_(unit, along, value=-1).div_(norms))
        found.append(gradient)
    return found


def _units(vectors: Tensor, dtype: torch.dtype, eps: float) -> _Units:
    units = torch.empty(vectors.shape, dtype=dtype, device=vectors.device)
    norms, share = (torch.empty(len(vectors), 1, dtype=torch.float64, device=vectors.device) for _ in range(2))
    blocks = (tensor.split(_BLOCK_ROWS) for tensor in (vectors, units, norms, share))
    for given, unit, norm, part in zip(*blocks, strict=True):
        measured = lengths(given)
        norm.copy_(measured.norms)
        short = norm <= eps  # not so of NaN
        within = given.double() / eps if eps else torch.zeros_like(measured.vectors)
        unit.copy_(torch.where(short, within, measured.vectors / measured.lengths))
        part.copy_((~short).double() + (norm == eps) * 0.5)
        norm.masked_fill_(short, eps if eps else torch.inf)
    return _Units(units, norms, share)
