"""Divergences of two rows of logits and their gradients, by the kernels of `pair_kernels`; see `Backend`."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.kernels.checks import first_bad_row
from logitless.kernels.interface import Divergence, DivergenceFamily, PairRowStats
from logitless.kernels.layout import laid_out
from logitless.kernels.triton.launching import (
    PART_CLASSES,
    blocks,
    gradient_part,
    launch,
    parts_of,
    power_of_two,
    shape_of,
)
from logitless.kernels.triton.rows import (
    contiguous,
    gradient_like,
    real_of,
    row_sizes,
    row_stats,
    rows_are_next_to_each_other,
)

_SUMS = 8  # as in pair_kernels
PAIR_SAVED = 12
_FAMILIES: dict[DivergenceFamily, int] = {"skewed_kl": 1, "weighted_js": 2, "total_variation": 3}
# A pair has more numbers in registers than a row, and sums with a mixture twice as many.
_NUMBERS = 1024


def _told(divergence: Divergence | None) -> tuple[int, float]:
    """Return a divergence as the kernels are told it; measures that come together have a mixture of halves."""
    return (0, 0.5) if divergence is None else (_FAMILIES[divergence.family], divergence.weight)


def _same_rows(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or first.dtype != second.dtype:
        raise ValueError(
            f"two-row kernels take logits of one shape and dtype; got {tuple(first.shape)} {first.dtype} "
            f"and {tuple(second.shape)} {second.dtype}"
        )


def pair_row_stats(
    first: Tensor,
    second: Tensor,
    target: Tensor | None = None,
    *,
    class_dim: int = -1,
    ignore_index: int = -100,
    kl: bool = True,
    reverse_kl: bool = False,
    js: bool = False,
    cross_entropy: bool = False,
    entropy: bool = False,
    divergence: Divergence | None = None,
    same_top: bool = True,
) -> PairRowStats:
    """Return `Backend.pair_row_stats`: the rows' own log-sums in one read, the divergences in another."""
    from logitless.kernels.triton import pair_kernels
    from logitless.kernels.triton.language import LANGUAGE_DTYPES

    _same_rows(first, second)
    real, sizes, device = real_of(first.dtype), row_sizes(first, class_dim), first.device
    (first, second), (layout, other), _ = laid_out(class_dim, first, second)
    ours = row_stats(first, class_dim=class_dim, argmax=same_top)
    theirs = row_stats(second, class_dim=class_dim, argmax=same_top)
    outer, classes, inner, *strides = layout
    rows, index = outer * inner, contiguous(target, torch.int64)

    def out(wanted: bool) -> Tensor | None:
        return torch.empty(sizes, dtype=real, device=device) if wanted else None

    aimed = index is not None
    wanted = (kl, reverse_kl, js, cross_entropy, entropy, entropy, aimed, aimed, divergence is not None)
    measures = [out(want) for want in wanted]
    saved = torch.empty([*sizes, PAIR_SAVED], dtype=torch.float64, device=device)
    same = None
    if same_top:
        assert ours.argmax is not None
        assert theirs.argmax is not None
        same = ours.argmax == theirs.argmax
    mixes = js or (divergence is not None and divergence.family != "total_variation")
    most, each = (_NUMBERS // 2, 4) if mixes else (_NUMBERS, 8)
    shape = shape_of(classes, rows_are_next_to_each_other(layout), first.dtype, most=most, each=each)
    parts = parts_of(classes, PART_CLASSES)
    split = parts > 1
    scratch = torch.empty((parts, _SUMS, rows), dtype=torch.float64, device=device) if split else None
    family, weight = _told(divergence)
    common = (
        *(first, second, ours.row_max, ours.log_sum, theirs.row_max, theirs.log_sum, index, *measures, saved, scratch),
        *(rows, classes, inner, *strides, *other[3:], ignore_index),
    )
    launch(
        pair_kernels.pair_stats_kernel,
        (blocks(rows, shape), parts),
        (first, second),
        *common,
        PART_CLASSES if split else max(1, classes),
        weight,
        FAMILY=family,
        SPLIT=split,
        ROWS=shape.rows,
        BLOCK=shape.block,
        REAL=LANGUAGE_DTYPES[real],
        FINE=first.dtype == torch.float32,
        num_warps=shape.warps,
    )
    if split:
        joined = shape_of(parts, False, torch.float64, most=256)
        launch(
            pair_kernels.pair_join_kernel,
            (blocks(rows, joined),),
            (first, second),
            *common,
            parts,
            weight,
            FAMILY=family,
            ROWS=joined.rows,
            PARTS=power_of_two(parts),
            REAL=LANGUAGE_DTYPES[real],
            num_warps=joined.warps,
        )
    return PairRowStats._make([*measures, same, saved, first_bad_row(index, classes, ignore_index)])


def pair_row_grad(
    first: Tensor,
    second: Tensor,
    saved: Tensor,
    target: Tensor | None = None,
    *,
    class_dim: int = -1,
    ignore_index: int = -100,
    kl: Tensor | None = None,
    reverse_kl: Tensor | None = None,
    js: Tensor | None = None,
    cross_entropy: Tensor | None = None,
    entropy_p: Tensor | None = None,
    entropy_q: Tensor | None = None,
    nll_p: Tensor | None = None,
    nll_q: Tensor | None = None,
    divergence: Divergence | None = None,
    divergence_grad: Tensor | None = None,
    need_first: bool = True,
    need_second: bool = True,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return `Backend.pair_row_grad`, in one read of both and one write of each gradient."""
    from logitless.kernels.triton import pair_kernels
    from logitless.kernels.triton.language import LANGUAGE_DTYPES

    _same_rows(first, second)
    real, sizes = real_of(first.dtype), row_sizes(first, class_dim)
    (first, second), (layout, other), split = laid_out(class_dim, first, second)
    wanted = zip((first, second), (need_first, need_second), out or (None, None), strict=True)
    made = [gradient_like(source, class_dim, split, to) if need else None for source, need, to in wanted]
    grads = [None if each is None else each[0] for each in made]
    grad_strides = [stride for each in made for stride in ((0, 0, 0) if each is None else each[1][3:])]
    outer, classes, inner, *strides = layout
    rows = outer * inner
    given = (kl, reverse_kl, js, cross_entropy, entropy_p, entropy_q, nll_p, nll_q, divergence_grad)
    upstream = [None if grad is None else contiguous(grad.expand(sizes), real) for grad in given]
    same_bytes = any(grad is not None and grad.dtype != first.dtype for grad in grads)
    shape = shape_of(classes, rows_are_next_to_each_other(layout), first.dtype, most=_NUMBERS)
    if same_bytes:
        shape = shape._replace(rows=1, block=min(power_of_two(classes), shape.rows * shape.block))
    part = max(1, classes) if same_bytes else gradient_part(classes, shape)
    family, weight = _told(None if divergence_grad is None else divergence)
    launch(
        pair_kernels.pair_grad_kernel,
        (blocks(rows, shape), parts_of(classes, part)),
        (first, second),
        *(first, second, *grads, saved.contiguous(), contiguous(target, torch.int64), *upstream),
        *(rows, classes, inner, *strides, *other[3:], *grad_strides, ignore_index, part, weight),
        FAMILY=family,
        ROWS=shape.rows,
        BLOCK=shape.block,
        REAL=LANGUAGE_DTYPES[real],
        FINE=first.dtype == torch.float32,
        SAME_BYTES=same_bytes,
        num_warps=shape.warps,
    )
    return grads[0], grads[1]
