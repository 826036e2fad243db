"""Memory of the compiled kernels: large blocks outlive a tensor and are reused, so that no page is mapped twice."""

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from logitless.kernels.native import DTYPES
from logitless.kernels.native import extension as _native

if TYPE_CHECKING:
    from logitless._native import NativeInfo

# A smaller gradient comes from the allocator's own free lists, without page faults.
POOLED_BYTES = 1 << 20
POOL_IN_USE = os.environ.get("LOGITLESS_POOL", "1") != "0"


def native_info() -> "NativeInfo":
    """What the extension was built with and found here, and the size of its pool."""
    return _native.native_info()


def pool_clear() -> None:
    """Give the pool's free blocks back to the system."""
    _native.pool_clear()


def empty_like_pooled(tensor: Tensor) -> Tensor:
    """`torch.empty_like(tensor)`, of at least 1 MB on a block of memory that outlives it and is reused.

    The block returns to a bounded pool when the last tensor on it dies; see `native_info()` for the bound.
    """
    if not POOL_IN_USE or tensor.nbytes < POOLED_BYTES:
        return torch.empty_like(tensor)
    if tensor.is_contiguous():
        return empty_pooled(tensor.shape, tensor.dtype)
    strides = torch.empty_like(tensor, device="meta").stride()
    return empty_pooled(torch.Size((tensor.numel(),)), tensor.dtype).as_strided(tensor.shape, strides)


def empty_pooled(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """`torch.empty(shape, dtype=dtype)`, of at least 1 MB on a pooled block; see `empty_like_pooled`."""
    if not POOL_IN_USE or shape.numel() * dtype.itemsize < POOLED_BYTES:
        return torch.empty(shape, dtype=dtype)
    return from_dlpack(_native.pool_block(DTYPES[dtype], shape))
