"""The products of a head: those of torch (cuBLAS, hipBLAS), of half-precision factors with float32 sums and results."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
# Numbers of a factor that are widened at a time.
_WIDENED = 1 << 24
_ADDS_WIDE = torch.__version__ >= "2.10"  # an earlier one wants what it adds to in the factors' dtype


def writes_wide(device: torch.device) -> bool:
    """Say whether this device's products of half-precision factors may be written in float32 as they are."""
    return device.type == "meta" or (device.type == "cuda" and torch.version.hip is None)


def adds_wide() -> bool:
    """Say whether torch adds such a product to what is there in float32: from 2.10 on."""
    return _ADDS_WIDE


def product(first: Tensor, second: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """Return `Backend.product`.

    A float32 factor beside a bfloat16 one is rounded to it, as a gradient is in bfloat16 training. Beside a float16 one
    it stays, since it may be too small or too large for it, and the other is widened, a part at a time. So are both
    where no product of half-precision factors is written in float32.
    """
    kinds = {first.dtype, second.dtype}
    if kinds == {torch.float32, torch.bfloat16}:
        first, second = (factor.to(torch.bfloat16) for factor in (first, second))
    elif len(kinds) > 1:
        _widened(first, second, out, accumulate)
        return
    if first.dtype not in _HALF or out.dtype == first.dtype:
        if accumulate:
            out.addmm_(first, second)
        else:
            torch.mm(first, second, out=out)
    elif not writes_wide(out.device):
        _widened(first, second, out, accumulate)
    elif accumulate and not adds_wide():
        for place, part in zip(out.split(step := max(1, _WIDENED // out.shape[1])), first.split(step), strict=True):
            place += torch.mm(part, second, out_dtype=torch.float32)
    elif accumulate:
        torch.addmm(out, first, second, out_dtype=torch.float32, out=out)
    else:
        torch.mm(first, second, out_dtype=torch.float32, out=out)


def _widened(first: Tensor, second: Tensor, out: Tensor, accumulate: bool) -> None:
    """Do the same in float32: the smaller factor whole, of the larger as much at a time as is widened at once."""
    if second.numel() > first.numel():
        first, second, out = second.T, first.T, out.T
    rows, depth = first.shape
    second = second.float()
    if rows >= depth:
        step = max(1, _WIDENED // depth)
        for start in range(0, rows, step):
            place, part = out[start : start + step], first[start : start + step].float()
            place.copy_(torch.addmm(place, part, second) if accumulate else torch.mm(part, second))
        return
    step = max(1, _WIDENED // max(1, rows))
    for start in range(0, depth, step):
        part = torch.mm(first[:, start : start + step].float(), second[start : start + step])
        if start or accumulate:
            out += part
        else:
            out.copy_(part)
