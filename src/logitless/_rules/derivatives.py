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
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Return the gradients for the inputs that need one, of plain operations; differentiable again in grad mode.

    One input may have been made from another (`kl(x, x.flip(0))`), or be given twice. So each is differentiated as an
    alias of its own, through which no other input is reached: what lies beyond the inputs is the caller's graph, which
    is run once, by the caller.
    """
    with torch.enable_grad():
        free = [t.view_as(t) if need and t is not None else t for t, need in zip(inputs, needed, strict=True)]
        outputs = function(*free)
    pairs = [
        (out, grad) for out, grad in zip(outputs, grad_outputs, strict=True) if grad is not None and out.requires_grad
    ]
    wanted = [tensor for tensor, need in zip(free, needed, strict=True) if need and tensor is not None]
    if not pairs or not wanted:
        return (None,) * len(free)
    grads = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    )
    return tuple(
        next(grads) if need and tensor is not None else None for tensor, need in zip(free, needed, strict=True)
    )
