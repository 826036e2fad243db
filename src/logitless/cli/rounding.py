"""Round-to-nearest weights, to make a candidate of a known damage out of any model."""

import torch
from torch import Tensor

ROUNDINGS = ("int8", "int4", "bf16")
_GROUP = 32
_BITS = {"int8": 8, "int4": 4}


def round_weight(weight: Tensor, rounding: str) -> Tensor:
    """Return a new float32 matrix with the values that `rounding` can hold.

    `int8`, `int4`: symmetric, each group of 32 along the input dimension scaled by its largest magnitude over
    2^(bits-1) - 1. `bf16`: each value to the nearest bfloat16. What follows computes in float32.
    """
    if rounding == "bf16":
        return weight.to(torch.bfloat16).to(weight.dtype)
    largest = 2 ** (_BITS[rounding] - 1) - 1
    rows, columns = weight.shape
    padding = -columns % _GROUP
    groups = torch.nn.functional.pad(weight, (0, padding)).view(rows, -1, _GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / largest).clamp_min(torch.finfo(weight.dtype).tiny)
    rounded = (groups / scale).round().clamp(-largest - 1, largest) * scale
    whole: Tensor = rounded.view(rows, -1)[:, :columns].contiguous()
    return whole
