"""Losses of single elements, by the kernels of `element_kernels`; see `Backend`. No range is checked by waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from logitless.kernels.checks import waits
from logitless.kernels.interface import ElementLoss
from logitless.kernels.triton.launching import INTERPRETED, launch

_LOSSES: dict[ElementLoss, int] = {
    "binary_cross_entropy_with_logits": 0,
    "binary_cross_entropy": 1,
    "kl_div": 2,
    "kl_div_log_target": 3,
}
_BLOCK = 1 << 16 if INTERPRETED else 1024
_WARPS = 4
_MOST_DIMS = 3

Strides = tuple[int, ...]


def elements(
    loss: ElementLoss,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, bool]:
    """Return `Backend.elements`."""
    out = torch.empty_like(input, dtype=dtype or input.dtype)
    _run(loss, input, target, weight, pos_weight, None, 1.0, out, gradient=False)
    return out, _outside(loss, input, target)


def elements_sum(
    loss: ElementLoss,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> tuple[Tensor, bool]:
    """Return `Backend.elements_sum`: a block's sum by each program, and the sum of these by torch."""
    total = _run(loss, input, target, weight, pos_weight, None, 1.0, None, gradient=False)
    return total, _outside(loss, input, target)


def elements_grad(
    loss: ElementLoss,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    upstream: Tensor | None = None,
    scale: Tensor | float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Return `Backend.elements_grad`; of a divergence the input is not read."""
    made = torch.empty_like(input) if out is None else out
    _run(loss, input, target, weight, pos_weight, upstream, scale, made, gradient=True)
    return made


def _outside(loss: ElementLoss, input: Tensor, target: Tensor) -> bool:
    """Say whether a probability is none, where LOGITLESS_CHECK=1 asks for it."""
    if loss != "binary_cross_entropy" or not waits() or torch.compiler.is_compiling():
        return False
    outside = ~((input >= 0) & (input <= 1))
    if target.is_floating_point():
        outside |= ~((target >= 0) & (target <= 1))
    return bool(outside.any())


def collapsed(shape: Sequence[int], strides: Sequence[Strides]) -> tuple[list[int], list[list[int]]]:
    """Return sizes and strides of the same elements in fewer dimensions, in the order of the first operand's memory."""
    dims = [dim for dim in range(len(shape)) if shape[dim] != 1]
    dims.sort(key=lambda dim: -strides[0][dim])
    sizes: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    for dim in dims:
        if sizes and all(each[-1] == of[dim] * shape[dim] for each, of in zip(kept, strides, strict=True)):
            sizes[-1] *= shape[dim]
            for each, of in zip(kept, strides, strict=True):
                each[-1] = of[dim]
        else:
            sizes.append(shape[dim])
            for each, of in zip(kept, strides, strict=True):
                each.append(of[dim])
    return sizes, kept


def _run(
    loss: ElementLoss,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    upstream: Tensor | None,
    scale: Tensor | float,
    out: Tensor | None,
    *,
    gradient: bool,
) -> Tensor:
    """Run the kernel; without a place for values, return their sum."""
    from logitless.kernels.triton import element_kernels
    from logitless.kernels.triton.language import LANGUAGE_DTYPES

    shape, device = input.shape, input.device
    numel = input.numel()
    if upstream is not None and upstream.dim() == 0:
        upstream = upstream.expand(shape)
    operands = [None if t is None else t.expand(shape) for t in (input, target, weight, pos_weight, upstream, out)]
    there = [t for t in operands if t is not None]
    sizes, strides = collapsed(shape, [t.stride() for t in there])
    written, copied = out, False
    if len(sizes) > _MOST_DIMS:
        operands = [None if t is None else t.contiguous() for t in operands]
        there = [t for t in operands if t is not None]
        written, copied = operands[-1], True
        sizes, strides = [numel], [[1] for _ in there]
    wide = any(t.dtype == torch.float64 for t in there)
    padded = [1] * (_MOST_DIMS - len(sizes)) + sizes
    of_each = iter([[0] * (_MOST_DIMS - len(sizes)) + each for each in strides])
    told = [stride for t in operands for stride in ([0] * _MOST_DIMS if t is None else next(of_each))]
    blocks = -(-numel // _BLOCK)
    sums = torch.empty(blocks, dtype=torch.float64, device=device) if out is None else None
    by_tensor = isinstance(scale, Tensor)
    unread = gradient and loss in ("kl_div", "kl_div_log_target")
    launch(
        element_kernels.elements_kernel,
        (blocks,),
        there,
        *(None if unread else operands[0], *operands[1:5], written, sums, scale if by_tensor else None),
        *(numel, padded[1], padded[2], *told, 1.0 if by_tensor else float(scale)),
        LOSS=_LOSSES[loss],
        GRADIENT=gradient,
        DIMS=max(1, len(sizes)),
        WIDE=numel + _BLOCK >= 1 << 31,
        BLOCK=_BLOCK,
        REAL=LANGUAGE_DTYPES[torch.float64 if wide else torch.float32],
        num_warps=_WARPS,
    )
    if sums is not None:
        return sums.sum()
    assert out is not None
    assert written is not None
    return out.copy_(written) if copied else out
