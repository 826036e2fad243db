"""The compiled kernels as differentiable operations: forward, backward, and where they hand over to the reference.

An operation keeps its inputs and O(rows). Where its gradient must itself be differentiated, or upstream gradients come
in a batch, the backward pass is the reference's, differentiated by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitless._targets import ClassTarget, index_error
from logitless._transforms import transform_reason
from logitless.kernels import cpu, reference


class Reduced(NamedTuple):
    """A reduced loss, and what its sum was divided by."""

    loss: Tensor
    denominator: Tensor | float


RowReduction = Callable[[reference.ClassRows], Reduced]


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


class CrossEntropyCall(NamedTuple):
    """What one call of `cross_entropy` asks of its rows, without its tensors' graph."""

    name: str
    target: ClassTarget
    weight: Tensor | None
    label_smoothing: float
    reduce: RowReduction
    definition: Callable[[Tensor], Tensor]


def cross_entropy(logits: Tensor, call: CrossEntropyCall) -> Tensor:
    """Return the reduced cross-entropy of dense logits on the CPU."""
    result: Tensor = _CrossEntropy.apply(logits, call)  # type: ignore[no-untyped-call] # torch types it not
    return result


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: CrossEntropyCall) -> Tensor:
        target, weight, smoothing = call.target, call.weight, call.label_smoothing
        stats = cpu.row_stats(
            logits,
            target.indices,
            class_dim=target.class_dim,
            ignore_index=target.ignore_index,
            class_weight=weight,
            dense_target=target.probabilities,
            smooth=smoothing > 0,
        )
        if stats.bad_row >= 0:
            raise index_error(call.name, target)
        rows = _cross_entropy_rows(stats, target, weight, smoothing)
        loss, denominator = call.reduce(rows)
        ctx.save_for_backward(logits)
        ctx.call, ctx.stats, ctx.denominator = call, stats, denominator
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None]:
        (logits,) = ctx.saved_tensors
        call: CrossEntropyCall = ctx.call
        if needs_plain_backward(grad_output):
            return plain_backward(lambda z: (call.definition(z),), [logits], [grad_output])[0], None
        stats: cpu.RowStats = ctx.stats
        target, smoothing = call.target, call.label_smoothing
        spread = smoothing / target.classes
        total = target.classes if call.weight is None else float(call.weight.sum(dtype=torch.float64))
        kept = 1 - smoothing
        dense = target.probabilities is not None
        upstream = grad_output.to(stats.row_max.dtype)
        if not (isinstance(ctx.denominator, float) and ctx.denominator == 1.0):
            upstream = upstream / ctx.denominator
        grad = cpu.row_grad(
            logits,
            stats.row_max,
            stats.log_sum,
            target.indices,
            class_dim=target.class_dim,
            ignore_index=target.ignore_index,
            class_weight=call.weight,
            index_weight=call.weight is not None and not dense,
            dense_target=target.probabilities,
            upstream=upstream,
            a_scale=kept,
            a=stats.dense_mass,
            a_extra=spread * total if smoothing > 0 else 0.0,
            c_scale=0.0 if dense else -kept,
            e_scale=-kept if dense else 0.0,
            f_scale=-spread if smoothing > 0 else 0.0,
        )
        return grad, None


def _cross_entropy_rows(
    stats: cpu.RowStats, target: ClassTarget, weight: Tensor | None, smoothing: float
) -> reference.ClassRows:
    """Return per-row losses, and what a weighted mean counts each row as (a number where that is the same for all)."""
    if target.probabilities is not None:
        assert stats.dense_sum is not None
        assert stats.dense_mass is not None
        loss, row_weight = stats.dense_sum, stats.dense_mass
    else:
        assert stats.nll is not None
        loss = stats.nll
        row_weight = _row_weight(target, weight, loss)
        if weight is not None:
            loss = reference.times_zero_safe(row_weight, loss)
    if smoothing > 0:
        assert stats.smooth_sum is not None
        loss = (1 - smoothing) * loss + smoothing / target.classes * stats.smooth_sum
    return reference.ClassRows(loss, row_weight)


def _row_weight(target: ClassTarget, weight: Tensor | None, loss: Tensor) -> Tensor:
    assert target.indices is not None
    ignored = target.indices == target.ignore_index
    if weight is None:
        return ~ignored
    return weight.to(loss.dtype)[target.indices.masked_fill(ignored, 0)].masked_fill(ignored, 0)
