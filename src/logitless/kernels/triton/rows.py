"""Statistics and gradients of rows of logits, by the kernels of `row_kernels`; see `Backend`.

Allocate the outputs, tell the kernel pointers and strides. No value is read on the host, but where LOGITLESS_CHECK=1
asks for a bad class to be named.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logitless.kernels.checks import first_bad_row
from logitless.kernels.interface import RowStats
from logitless.kernels.layout import Layout, laid_out, layout_of
from logitless.kernels.triton.launching import (
    NUMBERS,
    PART_CLASSES,
    blocks,
    gradient_part,
    launch,
    parts_of,
    power_of_two,
    shape_of,
)

_FIELDS = 10  # as in row_kernels


def real_of(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that logits of this one are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_sizes(tensor: Tensor, class_dim: int) -> list[int]:
    """Return the shape of one value a row."""
    sizes = list(tensor.shape)
    del sizes[class_dim]
    return sizes


def contiguous(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a contiguous tensor of a dtype, if there is one."""
    return None if tensor is None else tensor.to(dtype).contiguous()


def rows_are_next_to_each_other(layout: Layout) -> bool:
    """Say whether it is the rows, not a row's classes, that are consecutive in memory."""
    _, _, inner, _, class_stride, inner_stride = layout
    return inner > 1 and abs(inner_stride) < abs(class_stride)


def row_stats(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    class_dim: int = -1,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    dense_target: Tensor | None = None,
    lse: bool = False,
    entropy: bool = False,
    argmax: bool = False,
    rank: bool = False,
    smooth: bool = False,
) -> RowStats:
    """Return `Backend.row_stats`, in one read of the logits."""
    from logitless.kernels.triton import row_kernels
    from logitless.kernels.triton.language import LANGUAGE_DTYPES

    real = real_of(logits.dtype)
    given = (logits,) if dense_target is None else (logits, dense_target)
    sizes, device = row_sizes(logits, class_dim), logits.device
    (logits, *dense), (layout, *dense_layouts), _ = laid_out(class_dim, *given)
    outer, classes, inner, *strides = layout
    rows = outer * inner
    weight, index = contiguous(class_weight, real), contiguous(target, torch.int64)

    def out(wanted: bool, dtype: torch.dtype = real) -> Tensor | None:
        return torch.empty(sizes, dtype=dtype, device=device) if wanted else None

    row_max = torch.empty(sizes, dtype=real, device=device)
    log_sum = torch.empty(sizes, dtype=torch.float64, device=device)
    stats = RowStats(
        row_max,
        log_sum,
        out(index is not None),
        out(lse),
        out(entropy),
        out(argmax, torch.int64),
        out(rank, torch.int64),
        out(smooth),
        out(dense_target is not None),
        out(dense_target is not None),
        first_bad_row(index, classes, ignore_index),
    )
    parts = parts_of(classes, PART_CLASSES)
    split = parts > 1
    # The place of the largest in a part takes registers that eight warps of sm_80 do not have.
    most = NUMBERS // 2 if split and argmax else NUMBERS
    shape = shape_of(classes, rows_are_next_to_each_other(layout), logits.dtype, most=most)
    scratch = torch.empty((parts, _FIELDS, rows), dtype=torch.float64, device=device) if split else None
    language_real = LANGUAGE_DTYPES[real]
    launch(
        row_kernels.row_stats_kernel,
        (blocks(rows, shape), parts),
        (logits,),
        logits,
        index,
        weight,
        dense[0] if dense else None,
        *stats[:-1],
        scratch,
        rows,
        classes,
        inner,
        *strides,
        *(dense_layouts[0][3:] if dense else (0, 0, 0)),
        ignore_index,
        PART_CLASSES if split else max(1, classes),
        ROWS=shape.rows,
        BLOCK=shape.block,
        SPLIT=split,
        REAL=language_real,
        FINE=logits.dtype == torch.float32,
        num_warps=shape.warps,
    )
    if split:
        joined = shape_of(parts, False, torch.float64, most=256)
        launch(
            row_kernels.row_join_kernel,
            (blocks(rows, joined),),
            (logits,),
            logits,
            index,
            *stats[:-1],
            scratch,
            rows,
            classes,
            inner,
            *strides,
            ignore_index,
            parts,
            ROWS=joined.rows,
            PARTS=power_of_two(parts),
            REAL=language_real,
            num_warps=joined.warps,
        )
    return stats


def row_grad(
    logits: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    target: Tensor | None = None,
    *,
    class_dim: int = -1,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    index_weight: bool = False,
    dense_target: Tensor | None = None,
    upstream: Tensor | None = None,
    a_scale: float = 0.0,
    b_scale: float = 0.0,
    c_scale: float = 0.0,
    e_scale: float = 0.0,
    f_scale: float = 0.0,
    a_extra: Tensor | float = 0.0,
    a: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
    e: Tensor | None = None,
    f: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return `Backend.row_grad`, in one read of the logits and one write.

    `out` may have a half precision in the first bytes of each row of float32 logits: see `narrow_gradient`.
    """
    from logitless.kernels.triton import row_kernels
    from logitless.kernels.triton.language import LANGUAGE_DTYPES

    real = real_of(logits.dtype)
    given = (logits,) if dense_target is None else (logits, dense_target)
    (source, *dense), (layout, *dense_layouts), split = laid_out(class_dim, *given)
    grad, grad_layout = gradient_like(source, class_dim, split, out)
    outer, classes, inner, *strides = layout
    rows = outer * inner
    same_bytes = grad.dtype != source.dtype
    shape = shape_of(classes, rows_are_next_to_each_other(layout), source.dtype)
    if same_bytes:  # a block of a row may be written once all of it was read, so a program has one row, and all of it
        shape = shape._replace(rows=1, block=min(power_of_two(classes), shape.rows * shape.block))
    part = max(1, classes) if same_bytes else gradient_part(classes, shape)
    has_c, has_e = c_scale != 0 and target is not None, e_scale != 0 and dense_target is not None
    launch(
        row_kernels.row_grad_kernel,
        (blocks(rows, shape), parts_of(classes, part)),
        (source,),
        source,
        grad,
        row_max.contiguous(),
        log_sum.contiguous(),
        contiguous(target, torch.int64),
        contiguous(class_weight, real),
        dense[0] if dense else None,
        contiguous(upstream, real),
        *(contiguous(value, real) for value in (a, b, c, e, f)),
        a_extra if isinstance(a_extra, Tensor) else None,
        rows,
        classes,
        inner,
        *strides,
        *grad_layout[3:],
        *(dense_layouts[0][3:] if dense else (0, 0, 0)),
        0 if upstream is None or upstream.numel() == 1 else 1,
        ignore_index,
        part,
        float(a_scale),
        float(b_scale),
        float(c_scale),
        float(e_scale),
        float(f_scale),
        0.0 if isinstance(a_extra, Tensor) else float(a_extra),
        HAS_B=b_scale != 0,
        HAS_C=has_c,
        HAS_E=has_e,
        HAS_F=f_scale != 0,
        INDEX_WEIGHT=index_weight and class_weight is not None and target is not None,
        ROWS=shape.rows,
        BLOCK=shape.block,
        REAL=LANGUAGE_DTYPES[real],
        FINE=source.dtype == torch.float32,
        SAME_BYTES=same_bytes,
        num_warps=shape.warps,
    )
    return grad


def _lies_in_the_first_bytes(out: Tensor, source: Tensor) -> bool:
    """Say whether each row of a narrower tensor begins where a row of another does."""
    sizes = out.dtype.itemsize, source.dtype.itemsize
    begins = out.storage_offset() * sizes[0] == source.storage_offset() * sizes[1]
    steps = out.dim() == 2 and out.stride(0) * sizes[0] == source.stride(0) * sizes[1] and out.stride(1) == 1
    alias: bool = torch._C._is_alias_of(out, source)  # type: ignore[attr-defined] # torch types it not
    return alias and begins and steps and sizes[0] < sizes[1]


def gradient_like(
    source: Tensor, class_dim: int, split: int | None, out: Tensor | None = None
) -> tuple[Tensor, Layout]:
    """Return memory for the gradient of a tensor that has a layout (`out`, where given), and its layout."""
    if out is not None:
        layout = layout_of(out, class_dim, split)
        if layout is None or out.shape != source.shape:
            raise ValueError(f"out must have the logits' shape {tuple(source.shape)} and a collapsible layout")
        if out.dtype != source.dtype and not _lies_in_the_first_bytes(out, source):
            raise ValueError(f"out must have the logits' dtype {source.dtype}, or a narrower one in their own bytes")
        return out, layout
    grad = torch.empty_like(source)
    layout = layout_of(grad, class_dim, split)
    if layout is None:
        grad = torch.empty(source.shape, dtype=source.dtype, device=source.device)
        layout = layout_of(grad, class_dim, split)
        assert layout is not None
    return grad, layout
