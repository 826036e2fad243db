"""The matrix products of a head: by the backend's own where it serves and is the faster one, else by torch's.

Precision policy: a backend's product is added up in float32 (of float64 in float64) and rounded once, to what it is
written to. The order of a sum depends on the depth alone, so a logit has the same bits in whatever tile, beside
whatever other rows and classes it is made. Torch's own products promise no such thing. Float32 is left to torch where
`torch.set_float32_matmul_precision` allows less than float32. Half-precision factors that the backend does not multiply
are widened, a part at a time, for torch's product of float32: its own of them rounds what it writes, and is slow where
there is no instruction for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from logitless._heads.multiplier import multiplier
from logitless._rules.precision import HALF
from logitless.kernels.interface import Backend

# Numbers of a factor, or of a product, that are widened at a time.
_WIDENED = 1 << 20


def shapes_do_not_matter(backend: Backend, tensors: Sequence[Tensor | None]) -> bool:
    """Say whether a head's logits are made by the backend's products, whose bits no call's shape changes."""
    hidden, weight, *_ = tensors
    assert hidden is not None
    assert weight is not None
    taken = multiplier(backend, hidden.dtype, hidden.shape[1])
    return taken.PRODUCT_BITS_STAND and _serves(taken, weight, hidden)


def needs_spare(backend: Backend, dtype: torch.dtype) -> bool:
    """Say whether products of this dtype need a place of their own before they are added up.

    Adding to a matrix of few rows costs torch's of float32 digits.
    """
    return dtype not in backend.PRODUCT_DTYPES and dtype not in HALF


def widened_bytes(backend: Backend, dtype: torch.dtype) -> int:
    """Return what factors and sums take while they are widened for torch's product."""
    return 3 * 4 * _WIDENED if dtype in HALF and dtype not in backend.PRODUCT_DTYPES else 0


def multiply(
    backend: Backend,
    first: Tensor,
    second: Tensor,
    out: Tensor,
    *,
    accumulate: bool = False,
    spare: Tensor | None = None,
) -> None:
    """Write `first @ second` to `out`, or add it.

    Where the backend's product does not serve and `spare` is given, a flat one, the product goes there first, as many
    rows at a time as fit.
    """
    if not out.numel():
        return
    if not first.shape[1]:
        if not accumulate:
            out.zero_()
    elif _serves(backend, first, second):
        backend.product(_readable(first), _readable(second), out, accumulate=accumulate)
    elif first.dtype in HALF or second.dtype in HALF:
        _multiply_widened(first, second, out, accumulate)
    elif spare is not None:
        rows = max(1, spare.numel() // max(1, out.shape[1]))
        for sums, part in zip(out.split(rows), first.split(rows), strict=True):
            rounded = torch.mm(part, second, out=spare[: sums.numel()].view(sums.shape))
            if accumulate:
                sums += rounded
            else:
                sums.copy_(rounded)
    elif accumulate:
        out.addmm_(first, second)
    else:
        torch.mm(first, second, out=out)


def _serves(backend: Backend, first: Tensor, second: Tensor) -> bool:
    if not backend.PRODUCT_DTYPES.issuperset((first.dtype, second.dtype)):
        return False
    single = first.dtype == second.dtype == torch.float32
    return not single or backend.PRODUCTS_ARE_FIXED or torch.get_float32_matmul_precision() == "highest"


def _multiply_widened(first: Tensor, second: Tensor, out: Tensor, accumulate: bool) -> None:
    """Do the same in float32, with a part of the larger factor widened at a time."""
    if second.numel() > first.numel():
        first, second, out = second.T, first.T, out.T
    rows, depth = first.shape
    second = second.float()
    step = max(1, _WIDENED // max(1, depth, second.shape[1]))
    for start in range(0, rows, step):
        product = torch.mm(first[start : start + step].float(), second)
        if accumulate:
            out[start : start + step] += product
        else:
            out[start : start + step] = product


def _readable(factor: Tensor) -> Tensor:
    # Not contiguous(): of one row and one feature any strides are.
    return factor if 1 in factor.stride() else factor.clone(memory_format=torch.contiguous_format)
