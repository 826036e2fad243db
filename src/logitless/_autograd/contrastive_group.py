"""Contrastive losses over a process group as differentiable operations.

The gradient of a rank's vectors is that of everybody's losses, and comes home complete; that of a scale or a bias is
this rank's share of it. Sums over all ranks are the same number on each, and multiply their gradient by the number of
ranks: averaged over ranks, as data-parallel training does with parameters, it is then that of one process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from logitless._heads.across import (
    Across,
    fold_across,
    gradients_across,
    softplus_gradients_across,
    softplus_sum_across,
)
from logitless._heads.exchange import Peers
from logitless._heads.square import Partitions, row_losses
from logitless._rules.derivatives import is_differentiated_again
from logitless._rules.keeping import put_together, taken_apart
from logitless._rules.transforms import transform_reason


def contrast_across(call: Across, scale: Tensor | float, *vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each of a rank's own anchors, and how many positives each has."""
    given = scale if isinstance(scale, Tensor) else None
    _refuse_transforms(call.peers, given, *vectors)
    number = 1.0 if isinstance(scale, Tensor) else scale
    found: tuple[Tensor, Tensor] = _Contrast.apply(call, number, given, *vectors)  # type: ignore[no-untyped-call] # torch types it not
    return found


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Across, number: float, scale: Tensor | None, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        sums, counts = fold_across(call, number if scale is None else scale, vectors)
        operands = (scale, *vectors, *sums, counts)
        ctx.call, others = taken_apart(call, operands)
        ctx.number, ctx.vectors = number, len(vectors)
        ctx.save_for_backward(*operands, *others)
        ctx.mark_non_differentiable(counts)
        return row_losses(call.own, sums, counts), counts

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        everything = ctx.saved_tensors
        scale, *vectors = everything[: 1 + ctx.vectors]
        call: Across = put_together(ctx.call, everything)
        _refuse_higher(call.peers, grad_output)
        needs_scale, *needed = ctx.needs_input_grad[2:]
        sums = Partitions(*everything[1 + ctx.vectors : 4 + ctx.vectors])
        to_scale, grads = gradients_across(
            call,
            ctx.number if scale is None else scale,
            vectors,
            sums,
            everything[4 + ctx.vectors],
            grad_output,
            needed,
            needs_scale=needs_scale,
        )
        return None, None, _like(to_scale, scale), *grads


def sigmoid_contrast_across(call: Across, scale: Tensor | float, bias: Tensor | float, *vectors: Tensor) -> Tensor:
    """Return the sum of a yes or no for every entry of a rank's own rows with everybody's columns."""
    numbers = [1.0 if isinstance(each, Tensor) else each for each in (scale, bias)]
    given = [each if isinstance(each, Tensor) else None for each in (scale, bias)]
    _refuse_transforms(call.peers, *given, *vectors)
    total: Tensor = _Sigmoid.apply(call, numbers, *given, *vectors)  # type: ignore[no-untyped-call] # torch types it not
    return total


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Across, numbers: list[float], scale: Tensor | None, bias: Tensor | None, *vectors: Tensor
    ) -> Tensor:
        ctx.call, others = taken_apart(call, (scale, bias, *vectors))
        ctx.numbers, ctx.vectors = numbers, len(vectors)
        ctx.save_for_backward(scale, bias, *vectors, *others)
        return softplus_sum_across(call, *_given(numbers, scale, bias), vectors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        everything = ctx.saved_tensors
        scale, bias, *vectors = everything[: 2 + ctx.vectors]
        call: Across = put_together(ctx.call, everything)
        _refuse_higher(call.peers, grad_output)
        needs_scale, needs_bias, *needed = ctx.needs_input_grad[2:]
        found = softplus_gradients_across(
            call,
            *_given(ctx.numbers, scale, bias),
            vectors,
            grad_output,
            needed,
            needs_scale=needs_scale,
            needs_bias=needs_bias,
        )
        return None, None, _like(found.scale, scale), _like(found.bias, bias), *found.vectors


def sum_over_ranks(total: Tensor, peers: Peers) -> Tensor:
    """Return the sum of all ranks' numbers in float64, the same on each; its gradient is multiplied by their number."""
    summed: Tensor = _Sum.apply(total.double(), peers)  # type: ignore[no-untyped-call] # torch types it not
    return summed


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, peers: Peers) -> Tensor:
        ctx.world = peers.world
        summed = total.detach().clone()
        dist.all_reduce(summed, group=peers.group)
        return summed

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output * ctx.world, None


def _given(numbers: list[float], scale: Tensor | None, bias: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
    return numbers[0] if scale is None else scale, numbers[1] if bias is None else bias


def _like(gradient: Tensor | None, of: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(of.dtype).view(of.shape)


def _refuse_transforms(peers: Peers, *tensors: Tensor | None) -> None:
    reason = transform_reason(*tensors)
    if reason is not None:
        raise RuntimeError(
            f"{peers.name}: with group= ranks send each other numbers, which no transform sees, but {reason}; "
            "transform the loss of one process (group=None)"
        )


def _refuse_higher(peers: Peers, grad_output: Tensor) -> None:
    if is_differentiated_again(grad_output):
        raise RuntimeError(
            f"{peers.name}: with group= the gradient cannot be differentiated again, nor be asked for in batches; "
            "leave out create_graph=True and is_grads_batched=True, or take the loss of one process (group=None)"
        )
