"""Cross-entropy of logits that are not built, for every kind of class target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from logitless import _dispatch
from logitless._head_ops import HeadCall, Reduction, forecast, head_call, per_row, reduced
from logitless._precision import no_autocast, precision_of
from logitless._reduce import Empty, Normalizer, reduce_rows, upstream_divisor
from logitless._row_work import CrossEntropyWork
from logitless._targets import ClassTarget
from logitless._tiles import at_positions, fold_rows
from logitless.kernels import reference
from logitless.lazy import HeadRows, LazyLogits

Denominator = Callable[[reference.ClassRows], Tensor | float]


class HeadLoss(NamedTuple):
    """What a call asks beside logits and target."""

    weight: Tensor | None
    label_smoothing: float
    normalizer: Normalizer
    max_bytes: int | None
    backend: str | None


class _Rows(NamedTuple):
    """The rows that are not ignored, and their target; `kept` are their positions (None: all)."""

    source: HeadRows
    kept: Tensor | None
    target: ClassTarget
    shape: torch.Size  # of all rows

    def everywhere(self, values: Tensor) -> Tensor:
        """Return values of the kept rows among zeros for the others, in the logits' leading shape."""
        return at_positions(values, self.kept, self.shape.numel()).view(self.shape)


def cross_entropy(
    logits: LazyLogits,
    meaning: ClassTarget,
    asked: HeadLoss,
    reduction: str,
    denominator: Denominator,
    result: torch.dtype,
    empty: Empty,
) -> Tensor:
    """Return the reduced loss; a scalar makes its gradient in the forward pass where its divisor is known by then."""
    rows = _rows(logits, meaning)
    call = _native_call(rows, logits, asked)
    if call is None:
        values = _reference_rows(rows, logits, asked)
    elif reduction == "none" or (reduction == "mean" and _divisor_needs_rows(rows.target, asked)):
        values = reference.ClassRows(*map(rows.everywhere, per_row(call)))
    else:
        divisor = denominator(_weights_alone(rows, asked)) if reduction == "mean" else 1.0

        def value(loss: Tensor) -> Tensor:
            return reduce_rows(loss, reduction, denominator=divisor, dtype=result, empty=empty)

        return reduced(call, Reduction(float(upstream_divisor(divisor, empty)), value))
    divisor = denominator(values) if reduction == "mean" else 1.0
    return reduce_rows(values.loss, reduction, denominator=divisor, dtype=result, empty=empty)


def cross_entropy_rows(logits: LazyLogits, meaning: ClassTarget, asked: HeadLoss) -> reference.ClassRows:
    """Return the rows of `reference.cross_entropy`, on logits made a tile at a time."""
    rows = _rows(logits, meaning)
    call = _native_call(rows, logits, asked)
    if call is None:
        return _reference_rows(rows, logits, asked)
    return reference.ClassRows(*map(rows.everywhere, per_row(call)))


def _rows(logits: LazyLogits, meaning: ClassTarget) -> _Rows:
    if meaning.class_dim != logits.class_dim % logits.dim():
        raise ValueError(
            f"LazyLogits of shape {tuple(logits.shape)} have their classes in dimension "
            f"{logits.class_dim % logits.dim()}, not {meaning.class_dim}: pass class_dim={logits.class_dim}, or "
            "flatten(0, -2) logits and target"
        )
    logits = logits.classes_last()
    ignored = None if meaning.ignored is None else meaning.ignored.reshape(-1)
    source, kept = logits.rows().without(ignored, selectable=meaning.impossible is None)
    indices, impossible, probabilities = meaning.indices, meaning.impossible, meaning.probabilities
    if indices is not None:
        indices = indices.reshape(-1)
    if kept is not None and indices is not None:
        indices, ignored = indices[kept], None
    if impossible is not None:
        impossible = impossible.reshape(-1)
    if probabilities is not None:
        probabilities = probabilities.movedim(meaning.class_dim, -1).reshape(-1, meaning.classes)
    target = ClassTarget(1, meaning.classes, meaning.ignore_index, indices, ignored, impossible, probabilities)
    return _Rows(source, kept, target, logits.shape[:-1])


def _native_call(rows: _Rows, logits: LazyLogits, asked: HeadLoss) -> HeadCall | None:
    """Plan the call for the compiled kernels; None where the reference serves it."""
    target, weight = rows.target, asked.weight
    tensors = (*rows.source.tensors, target.indices, target.probabilities, weight)
    obstacle = _obstacle(target, asked)

    def plan() -> HeadCall:
        compute = precision_of(logits, target.probabilities).compute
        row_weight = None
        if weight is not None and target.indices is not None:
            row_weight = weight.to(compute)[target.indices]
        work = CrossEntropyWork(
            target.classes,
            target.indices,
            row_weight,
            target.probabilities,
            None if weight is None else weight.to(compute),
            asked.label_smoothing,
        )

        def definition(*parts: Tensor | None) -> Sequence[Tensor]:
            source = rows.source
            with no_autocast(logits):
                tile = source.activate(source.raw(parts, 0, source.rows), parts).to(compute)
                return reference.cross_entropy(tile, target, weight, asked.label_smoothing)

        return head_call(
            [rows.source],
            work,
            definition,
            outputs=(True, False),
            least_dtype=compute,
            max_bytes=asked.max_bytes,
        )

    picked = _dispatch.pick(
        "cross_entropy", tensors, asked.backend, obstacle=obstacle, forecast=lambda: forecast(plan())
    )
    return None if picked == "reference" else plan()


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


def _divisor_needs_rows(target: ClassTarget, asked: HeadLoss) -> bool:
    return target.probabilities is not None and asked.normalizer == "weights"


def _weights_alone(rows: _Rows, asked: HeadLoss) -> reference.ClassRows:
    """Return what a mean counts each row as, without the rows' losses."""
    indices = rows.target.indices
    if indices is None:
        nothing = torch.empty(0).expand(0)
        return reference.ClassRows(torch.empty(()).expand(rows.shape), nothing)
    weight = torch.ones(indices.shape) if asked.weight is None else asked.weight[indices]
    wide = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
    return reference.ClassRows(torch.empty(()).expand(rows.shape), rows.everywhere(weight.to(wide)))


def _reference_rows(rows: _Rows, logits: LazyLogits, asked: HeadLoss) -> reference.ClassRows:
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
