"""Cosines of pairs of vectors, what the embedding loss makes of them, and the gradients, as Triton kernels.

Formula, with n1 and n2 the norms, each at least eps (for the embedding loss sqrt(|x|^2 + 1e-12)):

    cos = x1 . x2 / (n1 n2)
    d cos / d x1 = (x2 / n2 - cos x1 / n1) / n1, where a norm that was raised to eps is a constant

Layout: as in `row_kernels`, a row being a pair of vectors.

Precision policy: float64 from the first product on, so that no square of a float32 overflows or vanishes and 1 - cos
keeps its digits; vectors of float64 are first divided by their largest element. One rounding at the end.
"""

import triton
import triton.language as tl

from logitless.kernels.triton.arithmetic import rounded


@triton.jit
def _largest(value):
    """Return what a vector is divided by: its largest element, but 1 where that is nothing or infinite."""
    return tl.where((value == 0) | (value == float("inf")), 1.0, value)


@triton.jit
def cosine_kernel(
    x1_ptr,
    x2_ptr,
    target_ptr,
    out_ptr,
    saved_ptr,
    rows,
    length,
    inner,
    outer_stride1,
    stride1,
    inner_stride1,
    outer_stride2,
    stride2,
    inner_stride2,
    eps: tl.float64,
    margin: tl.float64,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the cosine of each pair, or its loss."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    begin1 = x1_ptr + (row // inner) * outer_stride1 + (row % inner) * inner_stride1
    begin2 = x2_ptr + (row // inner) * outer_stride2 + (row % inner) * inner_stride2
    least = tl.full([ROWS], eps, tl.float64)
    large1 = tl.full([ROWS], 1.0, tl.float64)
    large2 = tl.full([ROWS], 1.0, tl.float64)
    if SCALED:
        most1 = tl.zeros([ROWS, BLOCK], tl.float64)
        most2 = tl.zeros([ROWS, BLOCK], tl.float64)
        for start in range(0, length, BLOCK):
            place = (start + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
            inside = there[:, None] & (place < length)
            x1 = tl.load(begin1[:, None] + place * stride1, mask=inside, other=0.0).to(tl.float64)
            x2 = tl.load(begin2[:, None] + place * stride2, mask=inside, other=0.0).to(tl.float64)
            most1 = tl.maximum(most1, tl.abs(x1))
            most2 = tl.maximum(most2, tl.abs(x2))
        large1 = _largest(tl.max(most1, 1))
        large2 = _largest(tl.max(most2, 1))
        if target_ptr is not None:  # 1e-12 beside the square: a smaller vector is left as it is
            large1 = tl.maximum(large1, 1.0)
            large2 = tl.maximum(large2, 1.0)
    dots = tl.zeros([ROWS, BLOCK], tl.float64)
    squares1 = tl.zeros([ROWS, BLOCK], tl.float64)
    squares2 = tl.zeros([ROWS, BLOCK], tl.float64)
    for start in range(0, length, BLOCK):
        place = (start + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
        inside = there[:, None] & (place < length)
        x1 = tl.load(begin1[:, None] + place * stride1, mask=inside, other=0.0).to(tl.float64)
        x2 = tl.load(begin2[:, None] + place * stride2, mask=inside, other=0.0).to(tl.float64)
        if SCALED:
            x1 = x1 / large1[:, None]
            x2 = x2 / large2[:, None]
        dots += x1 * x2
        squares1 += x1 * x1
        squares2 += x2 * x2
    square1 = tl.sum(squares1, 1)
    square2 = tl.sum(squares2, 1)
    if target_ptr is not None:
        square1 += 1e-12 / (large1 * large1)
        square2 += 1e-12 / (large2 * large2)
    norm1 = tl.sqrt(square1)
    norm2 = tl.sqrt(square2)
    held1 = norm1
    held2 = norm2
    if target_ptr is None:
        held1 = tl.where(norm1 < least / large1, least / large1, norm1)
        held2 = tl.where(norm2 < least / large2, least / large2, norm2)
    cosine = tl.sum(dots, 1) / held1 / held2
    if saved_ptr is not None:
        tl.store(saved_ptr + row, norm1 * large1, mask=there)
        tl.store(saved_ptr + rows + row, norm2 * large2, mask=there)
        tl.store(saved_ptr + rows + rows + row, cosine, mask=there)
    if target_ptr is not None:
        target = tl.load(target_ptr + row, mask=there, other=0).to(tl.float64)
        above = cosine - tl.full([ROWS], margin, tl.float64)
        above = tl.where(above < 0, 0.0, above)
        value = tl.where(target == 1, 1.0 - cosine, tl.where(target == -1, above, 0.0))
    else:
        value = tl.where(cosine > 1, 1.0, tl.where(cosine < -1, -1.0, cosine))
    tl.store(out_ptr + row, rounded(value, out_ptr), mask=there)


@triton.jit
def cosine_grad_kernel(
    x1_ptr,
    x2_ptr,
    target_ptr,
    saved_ptr,
    upstream_ptr,
    scale_ptr,
    grad1_ptr,
    grad2_ptr,
    rows,
    length,
    inner,
    outer_stride1,
    stride1,
    inner_stride1,
    outer_stride2,
    stride2,
    inner_stride2,
    grad_outer_stride1,
    grad_stride1,
    grad_inner_stride1,
    grad_outer_stride2,
    grad_stride2,
    grad_inner_stride2,
    upstream_stride,
    eps: tl.float64,
    margin: tl.float64,
    scale: tl.float64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients that are wanted."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    begin1 = x1_ptr + (row // inner) * outer_stride1 + (row % inner) * inner_stride1
    begin2 = x2_ptr + (row // inner) * outer_stride2 + (row % inner) * inner_stride2
    norm1 = tl.load(saved_ptr + row, mask=there, other=1.0)
    norm2 = tl.load(saved_ptr + rows + row, mask=there, other=1.0)
    cosine = tl.load(saved_ptr + rows + rows + row, mask=there, other=0.0)
    given = tl.full([ROWS], 1.0, tl.float64)
    if upstream_ptr is not None:
        given = tl.load(upstream_ptr + row * upstream_stride, mask=there, other=0.0).to(tl.float64)
    free1 = tl.full([ROWS], 1.0, tl.float64)
    free2 = tl.full([ROWS], 1.0, tl.float64)
    if target_ptr is not None:
        target = tl.load(target_ptr + row, mask=there, other=0).to(tl.float64)
        sign = tl.where(
            target == 1, -1.0, tl.where((target == -1) & (cosine > tl.full([ROWS], margin, tl.float64)), 1.0, 0.0)
        )
        given = tl.where(sign == 0, 0.0, sign * given)
    else:
        least = tl.full([ROWS], eps, tl.float64)
        # A norm that equals eps pulls halfway, as torch.maximum.
        free1 = tl.where(norm1 > least, 1.0, tl.where(norm1 == least, 0.5, 0.0))
        free2 = tl.where(norm2 > least, 1.0, tl.where(norm2 == least, 0.5, 0.0))
        norm1 = tl.where(norm1 < least, least, norm1)
        norm2 = tl.where(norm2 < least, least, norm2)
    given = given * tl.full([ROWS], scale, tl.float64)
    if scale_ptr is not None:
        given = given * tl.load(scale_ptr).to(tl.float64)
    nothing = (given == 0)[:, None]
    for start in range(0, length, BLOCK):
        place = (start + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
        inside = there[:, None] & (place < length)
        x1 = tl.load(begin1[:, None] + place * stride1, mask=inside, other=0.0).to(tl.float64)
        x2 = tl.load(begin2[:, None] + place * stride2, mask=inside, other=0.0).to(tl.float64)
        unit1 = x1 / norm1[:, None]
        unit2 = x2 / norm2[:, None]
        if grad1_ptr is not None:
            begin = grad1_ptr + (row // inner) * grad_outer_stride1 + (row % inner) * grad_inner_stride1
            slope = given[:, None] * ((unit2 - (free1 * cosine)[:, None] * unit1) / norm1[:, None])
            value = rounded(tl.where(nothing, 0.0, slope), grad1_ptr)
            tl.store(begin[:, None] + place * grad_stride1, value, mask=inside)
        if grad2_ptr is not None:
            begin = grad2_ptr + (row // inner) * grad_outer_stride2 + (row % inner) * grad_inner_stride2
            slope = given[:, None] * ((unit1 - (free2 * cosine)[:, None] * unit2) / norm2[:, None])
            value = rounded(tl.where(nothing, 0.0, slope), grad2_ptr)
            tl.store(begin[:, None] + place * grad_stride2, value, mask=inside)
