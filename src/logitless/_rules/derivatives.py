"""Gradients that must be differentiated again, or that come in a batch: made of plain operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from logitless._rules.transforms import transform_reason


def needs_plain_backward(*grad_outputs: Tensor | None) -> bool:
    """Say whether a backward pass must be made of plain differentiable operations."""
    return torch.is_grad_enabled() or transform_reason(*grad_outputs) is not None


def plain_backward(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a composition of plain operations, differentiable again."""
    with torch.enable_grad():
        outputs = function(*inputs)
    pairs = [(out, grad) for out, grad in zip(outputs, grad_outputs, strict=True) if grad is not None]
    return torch.autograd.grad(
        [out for out, _ in pairs], inputs, [grad for _, grad in pairs], create_graph=True, allow_unused=True
    )
