"""Cross-entropy of logits that are not built, for every kind of class target: who serves a call."""

from __future__ import annotations

import torch
from torch import Tensor

from logitless import _dispatch, _library_heads
from logitless._head_ops import HeadCall, forecast, per_row, reduced
from logitless._head_plan import (
    HeadLoss,
    LossRows,
    divisor_needs_rows,
    flat_probabilities,
    loss_call,
    loss_reduction,
)
from logitless._precision import precision_of
from logitless._reduce import Empty, class_denominator, reduce_rows
from logitless._targets import ClassTarget, checked_values
from logitless._tiles import fold_rows
from logitless.kernels import reference
from logitless.lazy import LazyLogits


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
    each_row = reduction == "none" or (reduction == "mean" and divisor_needs_rows(meaning, asked))
    if torch.compiler.is_compiling() and _picked(logits, meaning, asked) == "cpu":
        head = _arguments(name, logits, meaning, asked)
        if not each_row:
            return _library_heads.loss(head, asked.normalizer, reduction, result, empty)
        values = reference.ClassRows(*(value.view(logits.shape[:-1]) for value in _library_heads.rows(head)))
    else:
        rows = LossRows.of(logits.rows(), checked_values(name, meaning), logits.shape[:-1])
        call = None if torch.compiler.is_compiling() else _native_call(rows, logits, asked, compiles=True)
        if call is None:
            values = _reference_rows(rows, logits, asked)
        elif each_row:
            values = reference.ClassRows(*map(rows.everywhere, per_row(call)))
        else:
            return reduced(call, loss_reduction(rows, asked, reduction, result, empty))
    divisor = class_denominator(values, meaning, asked.normalizer) if reduction == "mean" else 1.0
    return reduce_rows(values.loss, reduction, denominator=divisor, dtype=result, empty=empty)


def cross_entropy_rows(logits: LazyLogits, meaning: ClassTarget, asked: HeadLoss) -> reference.ClassRows:
    """Return the rows of `reference.cross_entropy` for a checked target, on logits made a tile at a time."""
    logits = _classes_last(logits, meaning)
    rows = LossRows.of(logits.rows(), meaning, logits.shape[:-1])
    call = _native_call(rows, logits, asked, compiles=False)
    if call is None:
        return _reference_rows(rows, logits, asked)
    return reference.ClassRows(*map(rows.everywhere, per_row(call)))


def _classes_last(logits: LazyLogits, meaning: ClassTarget) -> LazyLogits:
    if meaning.class_dim != logits.class_dim % logits.dim():
        raise ValueError(
            f"LazyLogits of shape {tuple(logits.shape)} have their classes in dimension "
            f"{logits.class_dim % logits.dim()}, not {meaning.class_dim}: pass class_dim={logits.class_dim}, or "
            "flatten(0, -2) logits and target"
        )
    return logits.classes_last()


def _native_call(rows: LossRows, logits: LazyLogits, asked: HeadLoss, *, compiles: bool) -> HeadCall | None:
    """Plan the call for the compiled kernels; None where the reference serves it."""

    compute = precision_of(logits, rows.target.probabilities).compute

    def plan() -> HeadCall:
        return loss_call(rows, asked, compute)

    def foreseen() -> _dispatch.Forecast:
        seen = forecast(plan())
        if not _dispatch.is_about_a_graph():
            return seen
        more = _library_heads.widened_bytes(logits.rows(), rows.source, compute, asked.max_bytes)
        return seen._replace(peak_bytes=seen.peak_bytes + more)

    target = rows.target
    tensors = (*rows.source.tensors, target.indices, target.probabilities, asked.weight)
    picked = _dispatch.pick(
        "cross_entropy",
        tensors,
        asked.backend,
        obstacle=_obstacle(target, asked),
        forecast=foreseen,
        compiles=compiles,
    )
    return None if picked == "reference" else plan()


def _picked(logits: LazyLogits, meaning: ClassTarget, asked: HeadLoss) -> str:
    """Return the backend inside a compiled graph, where no value of the target is known."""
    tensors = (*logits.rows().tensors, meaning.indices, meaning.probabilities, asked.weight)
    obstacle = _obstacle(meaning, asked)
    return _dispatch.pick("cross_entropy", tensors, asked.backend, obstacle=obstacle, compiles=True)


def _arguments(name: str, logits: LazyLogits, meaning: ClassTarget, asked: HeadLoss) -> _library_heads.Head:
    source = logits.rows()
    hidden, weight, bias, factor = source.tensors
    assert hidden is not None
    assert weight is not None
    return _library_heads.Head(
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
        precision_of(logits, meaning.probabilities).compute,
        asked.max_bytes,
        name,
    )


def _obstacle(target: ClassTarget, asked: HeadLoss) -> str | None:
    """Return what about this call the compiled kernels do not do, if anything."""
    if target.impossible is not None:
        return "the targets' values cannot be read"
    if torch.is_grad_enabled():
        given = (("weight", asked.weight), ("target", target.probabilities), ("normalizer", asked.normalizer))
        for name, tensor in given:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                return f"{name} requires a gradient"
    return None


def _reference_rows(rows: LossRows, logits: LazyLogits, asked: HeadLoss) -> reference.ClassRows:
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
        return reference.cross_entropy(tile.to(compute), part, class_weight, asked.label_smoothing)

    per_row = [target.indices, target.ignored, target.impossible, target.probabilities]
    folded = fold_rows(
        function, [rows.source], per_row, [asked.weight], itemsize=compute.itemsize, max_bytes=asked.max_bytes
    )
    return reference.ClassRows(*map(rows.everywhere, folded))
