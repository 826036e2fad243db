"""The compiled search of the best rows."""

import torch
from torch import Tensor

from logitless.kernels.cpu.operands import address
from logitless.kernels.native import DTYPES
from logitless.kernels.native import extension as _native

_ROWS = {**DTYPES, torch.int8: 4}  # kInt8Rows of csrc/search/search.h


def search(
    query: Tensor,
    rows: Tensor,
    scores: Tensor,
    ids: Tensor,
    *,
    first_id: int,
    normalized: bool,
    allowed: Tensor | None,
    self_id: int | None,
) -> None:
    """Do `Backend.search`."""
    mask = None if allowed is None else allowed if allowed.stride(-1) == 1 else allowed.contiguous()
    _native.search(
        *_compared(query, rows, normalized),
        scores.shape[1],
        first_id,
        address(mask),
        0 if mask is None or mask.dim() == 1 else mask.stride(0),
        self_id is not None,
        self_id or 0,
        scores.data_ptr(),
        ids.data_ptr(),
    )


def search_ranks(query: Tensor, rows: Tensor, *, first_query: int, normalized: bool) -> Tensor:
    """Do `Backend.search_ranks`."""
    ranks = torch.empty(len(query), dtype=torch.int64)
    _native.search_ranks(*_compared(query, rows, normalized), first_query, ranks.data_ptr())
    return ranks


def _compared(query: Tensor, rows: Tensor, normalized: bool) -> tuple[int, int, int, int, int, int, int, int, bool]:
    """Return what the kernels are told of vectors whose elements are consecutive."""
    return (
        _ROWS[rows.dtype],
        torch.get_num_threads(),
        *query.shape,
        len(rows),
        query.data_ptr(),
        rows.data_ptr(),
        rows.stride(0),
        normalized,
    )
