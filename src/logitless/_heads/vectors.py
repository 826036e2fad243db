"""Vectors as factors of a similarity matrix: blocks of them as a product reads them, and their gradient.

Precision policy: half precisions are widened to float32, a block at a time; norms, products and gradients are float32
(of float64, float64), and a gradient is rounded once, at the end. A zero vector stays zero and has a gradient of zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from logitless._heads.tiles import view
from logitless._rules.transforms import transform_reason
from logitless.kernels.interface import Backend

BLOCK_ROWS = 1024  # vectors whose copies stay small


class Lengths(NamedTuple):
    """Vectors as they were measured, in float64 times a power of two each, their lengths then, and their own."""

    vectors: Tensor
    lengths: Tensor  # [rows, 1]
    norms: Tensor  # [rows, 1]


def lengths(vectors: Tensor) -> Lengths:
    """Return the lengths of vectors, of which no square overflows or vanishes: in float64 only its own can."""
    wide = vectors.double()
    if vectors.dtype != torch.float64 or not wide.shape[1]:
        norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        return Lengths(wide, norms, norms)
    exponent = (torch.frexp(wide.abs().amax(1, keepdim=True))[1] - 1).clamp(-1000, 1000)
    scaled = torch.ldexp(wide, -exponent)
    found = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return Lengths(scaled, found, torch.ldexp(found, exponent))


def inverse_norms(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 / |x| of each vector [rows, 1], and 0 of a zero vector."""
    # What is traced has no blocks: their number would be a constant.
    blocks = (vectors,) if transform_reason(vectors) is not None else vectors.split(BLOCK_ROWS // 4)
    norms = torch.cat([lengths(block).norms for block in blocks])
    return norms.reciprocal().masked_fill_(norms == 0, 0).to(dtype)


def units(vectors: Tensor) -> Tensor:
    """Return vectors of length 1, and zero vectors as they are, in plain torch, which torch differentiates.

    No square overflows or vanishes, as each vector is divided by its largest element; a zero vector has a gradient of
    zero.
    """
    if vectors.shape[1] == 0:
        return vectors
    largest = vectors.detach().abs().amax(1, keepdim=True)
    zero = largest == 0
    scaled = vectors / largest.masked_fill(zero, 1)
    squares = scaled.square().sum(1, keepdim=True)
    return (scaled / squares.masked_fill(zero, 1).sqrt()).masked_fill(zero, 0)


class Vectors:
    """A matrix of vectors [rows, features]; `wanted` says whether a gradient is made of it."""

    def __init__(
        self, backend: Backend, given: Tensor, dtype: torch.dtype, *, normalize: bool, wanted: bool = False
    ) -> None:
        self.given, self._dtype, self._backend = given, dtype, backend
        self._inverse = inverse_norms(given, dtype) if normalize else None
        self.gradient = torch.zeros(given.shape, dtype=dtype, device=given.device) if wanted else None

    def block(self, start: int, stop: int, memory: Tensor | None, scale: Tensor | float | None = None) -> Tensor:
        """Return some vectors, normalised and times `scale` where asked, in `memory` (else in their own)."""
        part = self.given[start:stop]
        if self._inverse is None and scale is None and part.dtype == self._dtype:
            return part
        out = torch.empty(part.shape, dtype=self._dtype, device=part.device)
        out = out if memory is None else view(memory, tuple(part.shape))
        if self._inverse is None:
            out.copy_(part)
        else:
            torch.mul(part, self._inverse[start:stop], out=out)
        return out if scale is None else out.mul_(scale)

    def finish(self) -> Tensor | None:
        """Return the gradient of the vectors as they were given."""
        gradient = self.gradient
        if gradient is None:
            return None
        if self._inverse is not None:
            for start in range(0, len(gradient), BLOCK_ROWS // 4):
                part = slice(start, start + BLOCK_ROWS // 4)
                unit = self.given[part] * self._inverse[part]
                along = (unit * gradient[part]).sum(1, keepdim=True)
                gradient[part] = torch.addcmul(gradient[part], unit, along, value=-1).mul_(self._inverse[part])
        return gradient.to(self.given.dtype)
