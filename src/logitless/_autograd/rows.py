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
from torch.compiler import is_compiling

from logitless._operators import rows as operators
from logitless._rules import dispatch
from logitless._rules.derivatives import needs_plain_backward, plain_backward
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

    Everything about the call is checked here, as briefly as can be, and done in one kernel call each way.
    `definition` is `cross_entropy` itself, for the derivatives that the kernels do not have.
    """
    if is_compiling() or type(logits) not in _PLAIN or type(target) is not Tensor:
        return None
    assert isinstance(logits, Tensor)
    shape, dtype = logits.shape, logits.dtype
    if len(shape) == 1:  # one row is read as one of many
        one, at = logits.unsqueeze(0), target.unsqueeze(0)
        whole = whole_cross_entropy(definition, one, at, weight, ignore_index, reduction, smoothing)
        return whole.squeeze(0) if whole is not None and reduction == "none" else whole
    if len(shape) != 2:
        return None
    rows, classes = shape
    if (
        not (rows and classes)
        or dtype not in dispatch.WHOLE_CALLS.WHOLE_DTYPES
        or not (logits.is_cpu and target.is_cpu and logits.is_contiguous() and target.is_contiguous())
        or not (
            target.shape == (rows,)
            if target.dtype is torch.int64
            else _plain_probabilities(target, logits, ignore_index)
        )
        or not (weight is None or _plain_weight(weight, classes, dtype))
        or not (reduction == "mean" or reduction == "sum" or reduction == "none")
        or not 0.0 <= smoothing <= 1.0
        or logits.is_neg()
        or (backend := dispatch.whole_calls()) is None
        or surroundings() is not None
    ):
        return None
    if dtype in HALF and torch.is_autocast_enabled("cpu"):
        return None  # it asks for another dtype
    call = backend, definition, target, weight, ignore_index, reduction, smoothing
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return _whole_loss(logits, call, save=False)[0]
    loss: Tensor = _apply_whole(logits, call)  # type: ignore[no-untyped-call] # torch types it not
    return loss


def _plain_probabilities(target: Tensor, logits: Tensor, ignore_index: int) -> bool:
    return (
        target.dtype is logits.dtype
        and target.shape == logits.shape
        and ignore_index < 0
        and not (target.requires_grad and torch.is_grad_enabled())
    )


def _plain_weight(weight: Tensor, classes: int, dtype: torch.dtype) -> bool:
    return (
        type(weight) in _PLAIN
        and weight.dtype is dtype
        and weight.shape == (classes,)
        and weight.is_cpu
        and weight.is_contiguous()
        and not (weight.requires_grad and torch.is_grad_enabled())
    )


def _whole_loss(logits: Tensor, call: tuple[Any, ...], save: bool) -> tuple[Tensor, tuple[Tensor | None, bytes, float]]:
    """Return the loss, and beside `call` for its gradient: the weight in the compute dtype, saved, denominator."""
    backend: WholeCalls
    backend, _, target, weight, ignore_index, reduction, smoothing = call
    dtype = logits.dtype
    result = losses = None
    if reduction == "none":
        losses = torch.empty(len(logits), dtype=torch.float32 if dtype in HALF else dtype)
    elif dtype not in HALF:
        result = torch.empty_like(_SCALARS[dtype])
    if weight is not None and dtype in HALF:
        weight = weight.float()
    bad_row, loss, denominator, saved = backend.cross_entropy(
        logits, target, weight, ignore_index, smoothing, reduction == "mean", result, losses, save
    )
    if bad_row >= 0:
        raise index_error("cross_entropy", ClassTarget(1, logits.shape[1], ignore_index, target))
    if result is None:
        result = torch.scalar_tensor(loss, dtype=dtype) if losses is None else losses.to(dtype)
    return result, (weight, saved, denominator)


class _WholeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: tuple[Any, ...]) -> Tensor:
        loss, (weight, saved, denominator) = _whole_loss(logits, call, save=True)
        backend, definition, target, given_weight, *options = call
        rows = None
        if len(saved) > _FEW_BYTES:  # what is large passes saved-tensor hooks
            rows, saved = torch.frombuffer(bytearray(saved), dtype=torch.uint8), b""
        ctx.save_for_backward(logits, target, given_weight, weight, rows)
        ctx.call = backend, definition, options, saved, denominator
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None]:
        logits, target, given_weight, weight, rows = ctx.saved_tensors
        backend: WholeCalls
        backend, definition, (ignore_index, reduction, smoothing), saved, denominator = ctx.call
        if rows is not None:
            saved = ctypes.string_at(rows.data_ptr(), rows.numel())
        if needs_plain_backward(grad_output):

            def plain(z: Tensor) -> Sequence[Tensor]:
                options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": smoothing}
                return (definition(z, target, given_weight, **options, backend=dispatch.DEFINITION),)

            return plain_backward(plain, [logits], [True], [grad_output])[0], None
        scale, upstream = 1.0, None
        if reduction != "none":
            scale = float(backend.scalar(grad_output))
        else:
            upstream = (grad_output.float() if logits.dtype in HALF else grad_output).contiguous()
        grad = backend.cross_entropy_grad(
            logits, target, weight, ignore_index, smoothing, saved, scale, denominator, upstream
        )
        return grad, None


# Function.apply without its Python wrapper, which looks for the function transforms that are excluded above.
_apply_whole = super(torch.autograd.Function, _WholeCrossEntropy).apply
