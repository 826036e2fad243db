"""A cross-entropy of logits that are not built, planned: the same for an eager call and inside an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from logitless._head_ops import HeadCall, Reduction, head_call
from logitless._precision import no_autocast
from logitless._reduce import Empty, Normalizer, class_denominator, reduce_rows, upstream_divisor
from logitless._row_work import CrossEntropyWork
from logitless._targets import ClassTarget
from logitless._tiles import at_positions
from logitless.kernels import reference
from logitless.lazy import HeadRows


class HeadLoss(NamedTuple):
    """What a call asks beside logits and target."""

    weight: Tensor | None
    label_smoothing: float
    normalizer: Normalizer
    max_bytes: int | None
    backend: str | None


class LossRows(NamedTuple):
    """The rows that are not ignored, and their target; `kept` are their positions (None: all)."""

    source: HeadRows
    kept: Tensor | None
    target: ClassTarget
    shape: torch.Size  # of all rows

    @classmethod
    def of(cls, source: HeadRows, meaning: ClassTarget, shape: torch.Size) -> LossRows:
        """Select the rows by a target that has been checked."""
        ignored = None if meaning.ignored is None else meaning.ignored.reshape(-1)
        source, kept = source.without(ignored, selectable=meaning.impossible is None)
        indices, impossible, probabilities = meaning.indices, meaning.impossible, meaning.probabilities
        if indices is not None:
            indices = indices.reshape(-1)
        if kept is not None and indices is not None:
            indices, ignored = indices[kept], None
        if impossible is not None:
            impossible = impossible.reshape(-1)
        if probabilities is not None:
            probabilities = flat_probabilities(meaning)
        target = ClassTarget(1, meaning.classes, meaning.ignore_index, indices, ignored, impossible, probabilities)
        return cls(source, kept, target, shape)

    def everywhere(self, values: Tensor) -> Tensor:
        """Return values of the kept rows among zeros for the others, in the logits' leading shape."""
        return at_positions(values, self.kept, self.shape.numel()).view(self.shape)


def flat_probabilities(meaning: ClassTarget) -> Tensor | None:
    """Return a target's probabilities as [rows, classes]."""
    given = meaning.probabilities
    return None if given is None else given.movedim(meaning.class_dim, -1).reshape(-1, meaning.classes)


def loss_call(rows: LossRows, asked: HeadLoss, compute: torch.dtype, gradient: bool | None = None) -> HeadCall:
    """Plan the loss and the weight of each row; `gradient` as in `head_call`."""
    source, target, weight = rows.source, rows.target, asked.weight
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
        hidden = parts[0]
        assert hidden is not None
        with no_autocast(hidden):
            tile = source.activate(source.raw(parts, 0, source.rows), parts).to(compute)
            return reference.cross_entropy(tile, target, weight, asked.label_smoothing)

    return head_call(
        [source],
        work,
        definition,
        outputs=(True, False),
        least_dtype=compute,
        max_bytes=asked.max_bytes,
        gradient=gradient,
    )


def divisor_needs_rows(target: ClassTarget, asked: HeadLoss) -> bool:
    """Say whether a mean's divisor is not known before the rows are."""
    return target.probabilities is not None and asked.normalizer == "weights"


def loss_reduction(rows: LossRows, asked: HeadLoss, reduction: str, result: torch.dtype, empty: Empty) -> Reduction:
    """Return how the losses of the rows become a scalar."""
    divisor: Tensor | float = 1.0
    if reduction == "mean":
        divisor = class_denominator(_weights_alone(rows, asked), rows.target, asked.normalizer)

    def value(loss: Tensor) -> Tensor:
        return reduce_rows(loss, reduction, denominator=divisor, dtype=result, empty=empty)

    return Reduction(float(upstream_divisor(divisor, empty)), value)


def _weights_alone(rows: LossRows, asked: HeadLoss) -> reference.ClassRows:
    """Return what a mean counts each row as, without the rows' losses."""
    indices = rows.target.indices
    if indices is None:
        nothing = torch.empty(0).expand(0)
        return reference.ClassRows(torch.empty(()).expand(rows.shape), nothing)
    weight = torch.ones(indices.shape) if asked.weight is None else asked.weight[indices]
    wide = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
    return reference.ClassRows(torch.empty(()).expand(rows.shape), rows.everywhere(weight.to(wide)))
