"""The row kernels as differentiable operations: forward, backward, and where they hand over to the definition.

An operation keeps its inputs and O(rows), all of it by way of autograd. Where its gradient must itself be
differentiated, or upstream gradients come in a batch, the backward pass is the definition's, differentiated by torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitless._operators import rows as operators
from logitless._rules import dispatch
from logitless._rules.derivatives import applied_directly, needs_plain_backward, plain_backward
from logitless._rules.keeping import put_together, taken_apart
from logitless._rules.precision import HALF
from logitless._rules.targets import index_error
from logitless._rules.transforms import surroundings
from logitless.kernels.definitions import ClassRows, weight_at
from logitless.kernels.interface import Backend, ClassTarget, RowStats, WholeCalls


class Reduced(NamedTuple):
    """A reduced loss, and what its sum was divided by."""

    loss: Tensor
    denominator: Tensor | float


RowReduction = Callable[[ClassRows], Reduced]


class CrossEntropyCall(NamedTuple):
    """What one call of `cross_entropy` asks of its rows, without its tensors' graph, and who computes it."""

    backend: Backend
    name: str
    target: ClassTarget
    weight: Tensor | None
    label_smoothing: float
    reduce: RowReduction
    definition: Callable[[Tensor], Tensor]


def cross_entropy(logits: Tensor, call: CrossEntropyCall) -> Tensor:
    """Return the reduced cross-entropy of dense logits."""
    if torch.compiler.is_compiling():
        return _compiled_cross_entropy(logits, call)
    result: Tensor = _CrossEntropy.apply(logits, call)  # type: ignore[no-untyped-call] # torch types it not
    return result


def _compiled_cross_entropy(logits: Tensor, call: CrossEntropyCall) -> Tensor:
    target = call.target
    stats = operators.row_stats(
        logits,
        target.indices,
        backend=call.backend,
        caller=call.name,
        class_dim=target.class_dim,
        ignore_index=target.ignore_index,
        class_weight=call.weight,
        dense_target=target.probabilities,
        smooth=call.label_smoothing > 0,
    )
    return call.reduce(_cross_entropy_rows(stats, target, call.weight, call.label_smoothing)).loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: CrossEntropyCall) -> Tensor:
        target, weight, smoothing = call.target, call.weight, call.label_smoothing
        stats = call.backend.row_stats(
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
        if ctx.needs_input_grad[0]:
            needed = (call.backend, target, weight, smoothing, call.definition, denominator)
            statistics = (stats.row_max, stats.log_sum, stats.dense_mass)
            ctx.kept, others = taken_apart((*needed, statistics), [logits])
            ctx.save_for_backward(logits, *others)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None]:
        logits, *_ = ctx.saved_tensors
        backend: Backend
        target: ClassTarget
        backend, target, weight, smoothing, definition, denominator, statistics = put_together(
            ctx.kept, ctx.saved_tensors
        )
        row_max, log_sum, dense_mass = statistics
        if needs_plain_backward(grad_output):
            return plain_backward(lambda z: (definition(z),), [logits], [True], [grad_output])[0], None
        spread = smoothing / target.classes
        total: Tensor | float = target.classes
        if weight is not None and smoothing > 0:
            total = backend.scalar(weight.sum(dtype=torch.float64))
        kept = 1 - smoothing
        dense = target.probabilities is not None
        upstream = grad_output.to(row_max.dtype)
        if not (isinstance(denominator, float) and denominator == 1.0):
            upstream = upstream / denominator
        grad = backend.row_grad(
            logits,
            row_max,
            log_sum,
            target.indices,
            class_dim=target.class_dim,
            ignore_index=target.ignore_index,
            class_weight=weight,
            index_weight=weight is not None and not dense,
            dense_target=target.probabilities,
            upstream=upstream,
            a_scale=kept,
            a=dense_mass,
            a_extra=spread * total if smoothing > 0 else 0.0,
            c_scale=0.0 if dense else -kept,
            e_scale=-kept if dense else 0.0,
            f_scale=-spread if smoothing > 0 else 0.0,
        )
        return grad, None


def _cross_entropy_rows(stats: RowStats, target: ClassTarget, weight: Tensor | None, smoothing: float) -> ClassRows:
    """Return per-row losses, and what a weighted mean counts each row as (a number where that is the same for all)."""
    if target.probabilities is not None:
        assert stats.dense_mass is not None
        return ClassRows(stats.losses(None, smoothing, target.classes), stats.dense_mass)
    assert stats.nll is not None
    row_weight = _row_weight(target, weight, stats.nll)
    losses = stats.losses(None if weight is None else row_weight, smoothing, target.classes)
    return ClassRows(losses, row_weight)


def _row_weight(target: ClassTarget, weight: Tensor | None, loss: Tensor) -> Tensor:
    assert target.indices is not None
    ignored = target.indices == target.ignore_index
    if weight is None:
        return ~ignored
    return weight_at(weight.to(loss.dtype), target.indices.masked_fill(ignored, 0)).masked_fill(ignored, 0)


# Of a whole call's statistics: so many cost less than a tensor does.
_FEW_BYTES = 1 << 14

_PLAIN = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer))
# What a scalar is made like: in a third less time than of a number.
_SCALARS = {dtype: torch.zeros((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}
_REDUCTIONS = frozenset(("mean", "sum", "none"))


def whole_cross_entropy(
    definition: Callable[..., Tensor],
    logits: object,
    target: object,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
) -> Tensor | None:
    """Return torch's own loss over contiguous rows [rows, classes], or None where this is another case.

    What surrounds the call is looked at here, as briefly as can be; the kernel looks at the tensors, and it is one call
    each way. `definition` is `cross_entropy` itself, for the derivatives that the kernels do not have.
    """
    if (
        surroundings() is not None
        or type(logits) not in _PLAIN
        or type(target) is not Tensor
        or not (weight is None or type(weight) in _PLAIN)
        or reduction not in _REDUCTIONS
        or not 0.0 <= smoothing <= 1.0
        or (backend := dispatch.whole_calls()) is None
    ):
        return None
    assert isinstance(logits, Tensor)
    differentiates = torch.is_grad_enabled()
    if (
        logits.is_neg()
        or target.layout is not torch.strided
        or (differentiates and (target.requires_grad or (weight is not None and weight.requires_grad)))
    ):
        return None
    differentiates = differentiates and logits.requires_grad
    dtype, own_weight, result, losses = logits.dtype, weight, None, None
    half = dtype in HALF
    if half:
        if torch.is_autocast_enabled("cpu") or (weight is not None and weight.dtype is not dtype):
            return None  # it asks for another dtype
        own_weight = None if weight is None else weight.float()
    if reduction == "none":
        losses = torch.empty(logits.shape[:-1], dtype=torch.float32 if half else dtype)
    elif dtype in _SCALARS:
        result = torch.empty_like(_SCALARS[dtype])
    answer = backend.cross_entropy(
        logits, target, own_weight, ignore_index, smoothing, reduction == "mean", result, losses, differentiates
    )
    if answer is None:
        return None
    bad_row, value, saved = answer
    if bad_row >= 0:
        raise index_error("cross_entropy", ClassTarget(logits.dim() - 1, logits.shape[-1], ignore_index, target))
    if result is None:
        result = torch.scalar_tensor(value, dtype=dtype) if losses is None else losses.to(dtype)
    if not differentiates:
        return result
    done = result, target, weight, saved, (backend, definition, ignore_index, reduction, smoothing)
    loss: Tensor = _apply_whole(logits, done)
    return loss


class _WholeCrossEntropy(torch.autograd.Function):
    """Gives a loss that is already there its gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, done: tuple[Any, ...]) -> Tensor:
        loss: Tensor
        loss, target, weight, saved, call = done
        if len(saved) > _FEW_BYTES:  # what is large passes saved-tensor hooks
            ctx.save_for_backward(logits, target, weight, torch.frombuffer(bytearray(saved), dtype=torch.uint8))
            saved = b""
        else:
            ctx.save_for_backward(logits, target, weight)
        ctx.call = *call, saved
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None]:
        logits, target, weight, *rows = ctx.saved_tensors
        backend: WholeCalls
        backend, definition, ignore_index, reduction, smoothing, saved = ctx.call
        if needs_plain_backward(grad_output):

            def plain(z: Tensor) -> Sequence[Tensor]:
                options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": smoothing}
                return (definition(z, target, weight, **options, backend=dispatch.DEFINITION),)

            return plain_backward(plain, [logits], [True], [grad_output])[0], None
        if rows:
            saved = ctypes.string_at(rows[0].data_ptr(), rows[0].numel())
        if logits.dtype in HALF:
            grad_output = grad_output.float()
            weight = None if weight is None else weight.float()
        if reduction == "none":
            grad_output = grad_output.contiguous()
        return backend.cross_entropy_grad(logits, target, weight, saved, grad_output), None


_apply_whole = applied_directly(_WholeCrossEntropy)
