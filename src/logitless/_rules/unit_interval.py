"""The range that binary cross-entropy asks of probabilities, and the error that names what lies outside."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless._rules.transforms import values_are_readable


def check_within_unit_interval(input: Tensor, target: Tensor) -> None:
    """Raise unless both, where they can be looked at, lie within [0, 1]."""
    for name, tensor in (("input", input), ("target", target)):
        if tensor.dtype == torch.bool or not values_are_readable(tensor):
            continue
        outside = ~((tensor >= 0) & (tensor <= 1))
        if not bool(outside.any()):
            continue
        position = tuple(outside.nonzero()[0].tolist())
        value = tensor[position].item()
        what = "NaN" if value != value else repr(value)
        raise RuntimeError(
            f"binary_cross_entropy: all elements of {name} should be between 0 and 1; {name}{list(position)} is {what}"
        )
