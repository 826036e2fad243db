"""The matrix products of a head: by the backend's own where it serves and is the faster one, else by torch's.

Precision policy: a backend's product is added up in float32 and rounded once, to what it is written to. Float32 is left
to torch where `torch.set_float32_matmul_precision` allows less than float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logitless._rules.precision import HALF
from logitless.kernels.interface import Backend


def widens(backend: Backend, dtype: torch.dtype) -> bool:
    """Say whether the backend takes factors of a half precision, and writes or adds their products in float32."""
    return dtype in HALF and dtype in backend.PRODUCT_DTYPES


def needs_spare(backend: Backend, dtype: torch.dtype) -> bool:
    """Say whether products of this dtype need a place of their own before they are added up.

    Torch's are rounded to the factors' dtype, and in float32 adding to a matrix of few rows costs it digits.
    """
    return dtype not in backend.PRODUCT_DTYPES


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
    rows at a time as fit; it must be given where `out` is wider than the factors.
    """
    if not first.shape[1]:
        if not accumulate:
            out.zero_()
    elif _serves(backend, first, second):
        backend.product(_readable(first), _readable(second), out, accumulate=accumulate)
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
    half = first.dtype in HALF or second.dtype in HALF
    return half or torch.get_float32_matmul_precision() == "highest"


def _readable(factor: Tensor) -> Tensor:
    return factor if 1 in factor.stride() else factor.contiguous()
