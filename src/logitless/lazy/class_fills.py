"""A constant given to some classes of every row: a head's bias holds it, so that the logits stay unbuilt."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def classes_of_mask(mask: Any, shape: torch.Size) -> Tensor | None:
    """Return the classes of a mask that is the same for every row of logits of this shape; None for others."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() > len(shape) or mask.dim() == 0:
        return None
    if mask.shape[-1] != shape[-1] or mask.numel() != shape[-1]:
        return None
    return mask.reshape(-1).nonzero().squeeze(1)


def classes_filled(
    head: tuple[Tensor, Tensor, Tensor | None, float | Tensor], softcap: float | None, classes: Tensor, value: float
) -> dict[str, Tensor] | None:
    """Return the parts of a head whose logits of these classes are the constant; None where none are.

    -inf without a gradient is a bias alone. Otherwise the constant takes a copy of the weight too, in which these
    classes' rows are 0, so that neither the logit nor a gradient has anything of them.
    """
    hidden, weight, bias, scale = head
    plain = isinstance(scale, float) and (scale == 1.0 or (scale > 0 and value == -math.inf))
    if softcap is not None or not plain or math.isnan(value):
        return None
    offset = weight.new_zeros(weight.shape[0]) if bias is None else bias
    filled = offset.index_fill(0, classes, value)
    learns = any(part is not None and part.requires_grad for part in (hidden, weight, bias))
    if value == -math.inf and not learns:
        return {"bias": filled}
    return {"bias": filled, "weight": weight.index_fill(0, classes, 0)}
