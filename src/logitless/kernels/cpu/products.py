"""The compiled matrix product."""

import torch
from torch import Tensor

from logitless.kernels.native import DTYPES
from logitless.kernels.native import extension as _native


def product(first: Tensor, second: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """Write `first @ second` to `out`, or add it: matrices of a supported dtype, consecutive in one dimension each.

    Sums are in float32, of float64 in float64. Beside a factor of half precision the one from which `out` has its rows
    (columns where those are consecutive) may be float32; a bfloat16 product rounds it. `out` has the other's dtype, or
    is float32 beside a half precision, which `accumulate` needs. There is a depth.
    """
    rows, columns = out.shape
    if (out.stride(1) == 1 or columns == 1) and first.dtype in (second.dtype, torch.float32):
        left, right, row, column, line = first, second, 0, 1, out.stride(0)
    elif out.stride(0) == 1 or rows == 1:  # out.T = second.T @ first.T, said by strides: a view would be a tensor more
        left, right, row, column, line = second, first, 1, 0, out.stride(1)
        rows, columns = columns, rows
    else:
        raise ValueError("beside a half factor a float32 one must not run along consecutive numbers of out")
    _native.product(
        DTYPES[left.dtype],
        DTYPES[right.dtype],
        DTYPES[out.dtype],
        torch.get_num_threads(),
        rows,
        first.shape[1],
        columns,
        left.data_ptr(),
        left.stride(row),
        left.stride(column),
        right.data_ptr(),
        right.stride(row),
        right.stride(column),
        out.data_ptr(),
        line,
        accumulate,
    )
