"""How a call is tied to its gradient; and gradients made of plain operations: differentiated again, or in a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from logitless._rules.transforms import transform_reason


def applied_directly(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return `function.apply` without the Python around it, and take away what stands around its backward.

    Around `apply` torch looks for function transforms, which callers exclude, and around `backward` for a `vjp` in its
    place, which no function here has: of a small loss that is a twentieth of its time.
    """
    node = getattr(function, "_backward_cls", None)  # torch's own name: without it backward works as it always does
    if node is not None:
        node.apply = function.backward
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc] # torch's own base
    return apply


def is_differentiated_again(*grad_outputs: Tensor | None) -> bool:
    """Say whether a gradient is being made that will be differentiated itself, or many of them in a batch."""
    return torch.is_grad_enabled() or transform_reason(*grad_outputs) is not None


def needs_plain_backward(*grad_outputs: Tensor | None) -> bool:
    """Say whether a backward pass must be made of plain differentiable operations.

    So it is of an upstream gradient whose memory holds its negative, as a conjugate's imaginary part does: kernels read
    memory.
    """
    if is_differentiated_again(*grad_outputs):
        return True
    for grad in grad_outputs:  # noqa: SIM110 # any() of a generator takes as long as the rest of this function
        if grad is not None and grad.is_neg():
            return True
    return False


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
