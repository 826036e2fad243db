"""The compiled kernels as differentiable operations: forward, backward, and where they hand over to the reference.

An operation keeps its inputs and O(rows). Where its gradient must itself be differentiated, or upstream gradients come
in a batch, the backward pass is the reference's, differentiated by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitless._dispatch import cpu_by_default
from logitless._reduce import reduced_sum
from logitless._targets import ClassTarget, checked_values, index_error
from logitless._transforms import surroundings, transform_reason
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


# Above this many logits the arithmetic costs more than the calls around it, and more threads pay.
SMALL_NUMEL = 1 << 16


def small_cross_entropy(logits: object, indices: object, ignore_index: int, reduction: str) -> Tensor | None:
    """Return torch's plain mean or sum over rows [rows, classes] of few logits, or None where this is another case.

    Everything about the call is checked here, as briefly as can be, and done in one kernel call: value and gradient.
    """
    if torch.compiler.is_compiling() or not isinstance(logits, Tensor) or type(indices) is not Tensor:
        return None
    shape = logits.shape
    if (
        len(shape) != 2
        or not 0 < shape[0] * shape[1] <= SMALL_NUMEL
        or indices.shape != shape[:1]
        or type(logits) not in _PLAIN
        or logits.dtype not in _SMALL_DTYPES
        or indices.dtype != torch.int64
        or not (logits.is_cpu and indices.is_cpu and logits.is_contiguous() and indices.is_contiguous())
        or logits.is_neg()
        or not cpu_by_default()
        or surroundings() is not None
    ):
        return None
    loss: Tensor = _apply_small(logits, (indices, ignore_index, reduction))  # type: ignore[no-untyped-call] # torch types it not
    return loss


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_SMALL_DTYPES = frozenset((torch.float32, torch.float64))


class _SmallCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, given: tuple[Tensor, int, str]) -> Tensor:
        indices, ignore_index, reduction = given
        mean = reduction == "mean"
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        bad_row, total, kept = cpu.sum_cross_entropy(logits, indices, ignore_index, grad, mean=mean)
        if bad_row >= 0:
            raise index_error("cross_entropy", ClassTarget(1, logits.shape[1], ignore_index, indices))
        ctx.save_for_backward(logits)
        ctx.grad, ctx.given, ctx.kept = grad, given, kept
        return torch.scalar_tensor(reduced_sum(total, kept, reduction), dtype=logits.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None]:
        grad, plain = ctx.grad, needs_plain_backward(grad_output)
        if grad is not None and not plain:
            ctx.grad = None  # given away: another backward through the same graph makes it anew
            return grad.mul_(grad_output), None
        (logits,) = ctx.saved_tensors
        indices, ignore_index, reduction = ctx.given
        if not plain:
            grad = torch.empty_like(logits)
            cpu.sum_cross_entropy(logits, indices, ignore_index, grad, mean=reduction == "mean")
            return grad.mul_(grad_output), None
        target = checked_values("cross_entropy", ClassTarget(1, logits.shape[1], ignore_index, indices))
        divisor = max(ctx.kept, 1) if reduction == "mean" else 1

        def definition(z: Tensor) -> Sequence[Tensor]:
            return (reference.cross_entropy(z, target, None, 0.0).loss.sum() / divisor,)

        return plain_backward(definition, [logits], [grad_output])[0], None


# Function.apply without its Python wrapper, which looks for the function transforms that are excluded above.
_apply_small = super(torch.autograd.Function, _SmallCrossEntropy).apply
