"""Cosines of pairs of vectors and their gradients, by the kernels of `cosine_kernels`; see `Backend`."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.kernels.interface import CosineRows
from logitless.kernels.layout import laid_out
from logitless.kernels.triton.launching import blocks, launch, shape_of
from logitless.kernels.triton.rows import gradient_like, real_of, row_sizes, rows_are_next_to_each_other

_NUMBERS = 1024


def _cosine(
    x1: Tensor, x2: Tensor, dim: int, eps: float, target: Tensor | None, margin: float, save: bool
) -> CosineRows:
    from logitless.kernels.triton import cosine_kernels

    first, second = torch.broadcast_tensors(x1, x2)
    sizes, device = row_sizes(first, dim), x1.device
    (first, second), (layout, other), _ = laid_out(dim % first.dim(), first, second)
    outer, length, inner, *strides = layout
    rows = outer * inner
    out = torch.empty(sizes, dtype=real_of(x1.dtype), device=device)
    saved = torch.empty((3, *sizes), dtype=torch.float64, device=device) if save else None
    shape = shape_of(length, rows_are_next_to_each_other(layout), torch.float32, most=_NUMBERS)
    launch(
        cosine_kernels.cosine_kernel,
        (blocks(rows, shape),),
        (first, second),
        *(first, second, None if target is None else target.contiguous(), out, saved),
        *(rows, length, inner, *strides, *other[3:], eps, margin),
        SCALED=x1.dtype == torch.float64,
        ROWS=shape.rows,
        BLOCK=shape.block,
        num_warps=shape.warps,
    )
    return CosineRows(out, saved)


def _cosine_grad(
    x1: Tensor,
    x2: Tensor,
    saved: Tensor,
    dim: int,
    eps: float,
    target: Tensor | None,
    margin: float,
    upstream: Tensor | None,
    scale: Tensor | float,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    from logitless.kernels.triton import cosine_kernels

    dim %= x1.dim()
    (first, second), (layout, other), split = laid_out(dim, x1, x2)
    sources = zip((first, second), wanted, strict=True)
    made = [gradient_like(source, dim, split) if want else None for source, want in sources]
    grads = [None if each is None else each[0] for each in made]
    grad_strides = [stride for each in made for stride in ((0, 0, 0) if each is None else each[1][3:])]
    outer, length, inner, *strides = layout
    rows = outer * inner
    by_tensor = isinstance(scale, Tensor)
    shape = shape_of(length, rows_are_next_to_each_other(layout), torch.float32, most=_NUMBERS)
    launch(
        cosine_kernels.cosine_grad_kernel,
        (blocks(rows, shape),),
        (first, second),
        *(first, second, None if target is None else target.contiguous(), saved.contiguous()),
        *(None if upstream is None else upstream.contiguous(), scale if by_tensor else None, *grads),
        *(rows, length, inner, *strides, *other[3:], *grad_strides),
        *(0 if upstream is None or upstream.numel() == 1 else 1, eps, margin, 1.0 if by_tensor else float(scale)),
        ROWS=shape.rows,
        BLOCK=shape.block,
        num_warps=shape.warps,
    )
    return grads[0], grads[1]


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8, *, save: bool = False) -> CosineRows:
    """Return `Backend.cosine_similarity`, in one read of both; vectors of float64 are read twice."""
    return _cosine(x1, x2, dim, eps, None, 0.0, save)


def cosine_similarity_grad(
    x1: Tensor,
    x2: Tensor,
    saved: Tensor,
    dim: int = 1,
    eps: float = 1e-8,
    *,
    upstream: Tensor | None = None,
    scale: Tensor | float = 1.0,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Return `Backend.cosine_similarity_grad`, in one read of both and one write of each."""
    return _cosine_grad(x1, x2, saved, dim, eps, None, 0.0, upstream, scale, wanted)


def cosine_embedding(x1: Tensor, x2: Tensor, target: Tensor, margin: float = 0.0, *, save: bool = False) -> CosineRows:
    """Return `Backend.cosine_embedding`."""
    return _cosine(x1, x2, -1, 0.0, target, margin, save)


def cosine_embedding_grad(
    x1: Tensor,
    x2: Tensor,
    target: Tensor,
    saved: Tensor,
    margin: float = 0.0,
    *,
    upstream: Tensor | None = None,
    scale: Tensor | float = 1.0,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Return `Backend.cosine_embedding_grad`."""
    return _cosine_grad(x1, x2, saved, -1, 0.0, target, margin, upstream, scale, wanted)
