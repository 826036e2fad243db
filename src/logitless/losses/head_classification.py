"""Cross-entropy of logits that are not built, for every kind of class target: who serves a call."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless._heads.fold import fold_rows
from logitless._heads.loss_plan import (
    HeadLoss,
    LossRows,
    divisor_needs_rows,
    flat_probabilities,
    loss_call,
    loss_reduction,
)
from logitless._heads.rows import HeadRows
from logitless._heads.sweep import forecast, per_row, reduced
from logitless._operators import heads as operators
from logitless._rules import dispatch
from logitless._rules.precision import precision_of
from logitless._rules.reduction import Empty, class_denominator, reduce_rows
from logitless._rules.targets import checked_values
from logitless.kernels import definitions
from logitless.kernels.interface import Backend, ClassTarget
from logitless.lazy.logits import LazyLogits


def cross_entropy(
    name: str,
    logits: LazyLogits,
    meaning: ClassTarget,
    asked: HeadLoss,
    reduction: str,
    result: torch.dtype,
    empty: Empty,
) -> Tensor:
    """Return the reduced loss; a scalar makes its gradient in the forward pass where its divisor is known by then."""
    logits = _classes_last(logits, meaning)
    source, compute = logits.rows(), precision_of(logits, meaning.probabilities).compute
    each_row = reduction == "none" or (reduction == "mean" and divisor_needs_rows(meaning, asked))
    backend = _picked(name, source, compute, meaning, asked, each_row, compiles=True)
    shape = logits.shape[:-1]
    if backend.PLAIN:
        rows = LossRows.of_checked(source, checked_values(name, meaning), shape)
        values = _reference_rows(rows, logits, asked)
    elif torch.compiler.is_compiling():
        head = _arguments(name, source, compute, meaning, asked)
        if not each_row:
            return operators.loss(backend, head, asked.normalizer, reduction, result, empty)
        values = definitions.ClassRows(*(value.view(shape) for value in operators.rows(backend, head)))
    else:
        rows = LossRows.of(name, source, meaning, shape, backend)
        call = loss_call(backend, rows, asked, compute, late=each_row)
        if not each_row:
            return reduced(call, loss_reduction(backend, rows, asked, reduction, result, empty))
        values = definitions.ClassRows(*map(rows.everywhere, per_row(call)))
    divisor = class_denominator(values, meaning, asked.normalizer) if reduction == "mean" else 1.0
    return reduce_rows(values.loss, reduction, denominator=divisor, dtype=result, empty=empty)


def cross_entropy_rows(name: str, logits: LazyLogits, meaning: ClassTarget, asked: HeadLoss) -> definitions.ClassRows:
    """Return the rows of `definitions.cross_entropy` for a checked target, on logits made a tile at a time."""
    logits = _classes_last(logits, meaning)
    source, compute = logits.rows(), precision_of(logits, meaning.probabilities).compute
    backend = _picked(name, source, compute, meaning, asked, True, compiles=False)
    rows = LossRows.of_checked(source, meaning, logits.shape[:-1])
    if backend.PLAIN:
        return _reference_rows(rows, logits, asked)
    call = loss_call(backend, rows, asked, compute, late=True)
    return definitions.ClassRows(*map(rows.everywhere, per_row(call)))


def _classes_last(logits: LazyLogits, meaning: ClassTarget) -> LazyLogits:
    if meaning.class_dim != logits.class_dim % logits.dim():
        raise ValueError(
            f"LazyLogits of shape {tuple(logits.shape)} have their classes in dimension "
            f"{logits.class_dim % logits.dim()}, not {meaning.class_dim}: pass class_dim={logits.class_dim}, or "
            "flatten(0, -2) logits and target"
        )
    moved: LazyLogits = logits.classes_last()
    return moved


def _picked(
    name: str,
    source: HeadRows,
    compute: torch.dtype,
    meaning: ClassTarget,
    asked: HeadLoss,
    each_row: bool,
    *,
    compiles: bool,
) -> Backend:
    """Return who serves the call."""

    def foreseen(backend: Backend) -> dispatch.Forecast:
        rows = LossRows.of(name, source, meaning, torch.Size((source.rows,)), backend)
        return forecast(loss_call(backend, rows, asked, compute, late=each_row))

    tensors = (*source.tensors, meaning.indices, meaning.probabilities, asked.weight)
    return dispatch.pick(
        "cross_entropy",
        tensors,
        asked.backend,
        obstacle=_obstacle(meaning, asked),
        forecast=foreseen,
        compiles=compiles,
        deterministic=source.tensors[:2] if asked.deterministic else None,
    )


def _arguments(
    name: str, source: HeadRows, compute: torch.dtype, meaning: ClassTarget, asked: HeadLoss
) -> operators.Head:
    hidden, weight, bias, factor = source.tensors
    assert hidden is not None
    assert weight is not None
    return operators.Head(
        hidden,
        weight,
        bias,
        factor,
        source.scale,
        source.softcap,
        meaning.indices,
        flat_probabilities(meaning),
        asked.weight,
        meaning.ignore_index,
        asked.label_smoothing,
        compute,
        asked.max_bytes,
        name,
    )


def _obstacle(target: ClassTarget, asked: HeadLoss) -> str | None:
    """Return what about this call the compiled kernels do not do, if anything."""
    if target.classes == 0:
        return "there are no classes"
    if target.impossible is not None:
        return "the targets' values cannot be read"
    if torch.is_grad_enabled():
        given = (("weight", asked.weight), ("target", target.probabilities), ("normalizer", asked.normalizer))
        for name, tensor in given:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                return f"{name} requires a gradient"
    return None


def _reference_rows(rows: LossRows, logits: LazyLogits, asked: HeadLoss) -> definitions.ClassRows:
    compute = precision_of(logits).compute
    target = rows.target

    def function(
        tile: Tensor,
        indices: Tensor | None,
        ignored: Tensor | None,
        impossible: Tensor | None,
        probabilities: Tensor | None,
        class_weight: Tensor | None,
    ) -> tuple[Tensor, ...]:
        part = ClassTarget(1, target.classes, target.ignore_index, indices, ignored, impossible, probabilities)
        return definitions.cross_entropy(tile.to(compute), part, class_weight, asked.label_smoothing)

    per_row = [target.indices, target.ignored, target.impossible, target.probabilities]
    folded = fold_rows(
        function, [rows.source], per_row, [asked.weight], itemsize=compute.itemsize, max_bytes=asked.max_bytes
    )
    return definitions.ClassRows(*map(rows.everywhere, folded))
