"""A cross-entropy of logits that are not built, planned: the same for an eager call and inside an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from logitless._heads.rows import HeadRows, at_positions
from logitless._heads.sweep import HeadCall, Reduction, head_call
from logitless._heads.work import NO_INDEX, CrossEntropyWork
from logitless._rules.precision import no_autocast
from logitless._rules.reduction import Empty, Normalizer, class_denominator, count_of, reduce_rows, upstream_divisor
from logitless._rules.targets import checked_values
from logitless.kernels import definitions
from logitless.kernels.interface import Backend, ClassTarget


class HeadLoss(NamedTuple):
    """What a call asks beside logits and target."""

    weight: Tensor | None
    label_smoothing: float
    normalizer: Normalizer
    max_bytes: int | None
    backend: str | None
    deterministic: bool = False  # rows whose bits nothing beside them decides


class LossRows(NamedTuple):
    """The rows that are not ignored, and their target; `kept` are their positions (None: all).

    Where the target's values may not be read no row is left out: an ignored one has hidden states of 0 and stays.
    """

    source: HeadRows
    kept: Tensor | None
    target: ClassTarget
    shape: torch.Size  # of all rows

    @classmethod
    def of(cls, name: str, source: HeadRows, meaning: ClassTarget, shape: torch.Size, backend: Backend) -> LossRows:
        """Select the rows by a target as given; raise if an index is no class."""
        return cls.of_checked(source, checked_values(name, meaning, reads=backend.READS_VALUES), shape)

    @classmethod
    def of_checked(cls, source: HeadRows, meaning: ClassTarget, shape: torch.Size) -> LossRows:
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
        return at_positions(values, self.kept, count_of(self.shape)).view(self.shape)


def flat_probabilities(meaning: ClassTarget) -> Tensor | None:
    """Return a target's probabilities as [rows, classes]."""
    given = meaning.probabilities
    if given is None:
        return None
    rows = given.movedim(meaning.class_dim, -1)
    return rows.reshape(count_of(rows.shape[:-1]), meaning.classes)


def loss_call(
    backend: Backend,
    rows: LossRows,
    asked: HeadLoss,
    compute: torch.dtype,
    gradient: bool | None = None,
    *,
    late: bool,
) -> HeadCall:
    """Plan the loss and the weight of each row; `gradient` and `late` as in `head_call`."""
    source, target, weight = rows.source, rows.target, asked.weight
    indices, ignore_index = kernel_indices(target)
    work = CrossEntropyWork(
        backend,
        target.classes,
        indices,
        ignore_index,
        _row_weight(target, weight, compute),
        target.probabilities,
        None if weight is None else weight.to(compute),
        asked.label_smoothing,
    )

    def definition(*parts: Tensor | None) -> Sequence[Tensor]:
        hidden = parts[0]
        assert hidden is not None
        with no_autocast(hidden):
            tile = source.activate(source.raw(parts, 0, source.rows), parts).to(compute)
            return definitions.cross_entropy(tile, target, weight, asked.label_smoothing)

    return head_call(
        backend,
        [source],
        work,
        definition,
        outputs=(True, False),
        least_dtype=compute,
        max_bytes=asked.max_bytes,
        gradient=gradient,
        late=late,
    )


def kernel_indices(target: ClassTarget) -> tuple[Tensor | None, int]:
    """Return the indices of a checked target as kernels take them, and what they say of an ignored row.

    Where rows were left out none of the others is ignored. Where none could be, an ignored row is told by its index.
    """
    if target.indices is None or target.ignored is None:
        return target.indices, NO_INDEX
    return target.indices.masked_fill(target.ignored, target.ignore_index), target.ignore_index


def _row_weight(target: ClassTarget, weight: Tensor | None, compute: torch.dtype) -> Tensor | None:
    """Return what the loss of each row is multiplied by, where rows differ: NaN where its class does not exist."""
    if target.indices is None:
        return None
    row_weight = None if weight is None else weight.to(compute)[target.indices]
    if target.ignored is None or target.impossible is None:
        return row_weight
    if row_weight is None:
        row_weight = torch.ones(target.indices.shape, dtype=compute, device=target.indices.device)
    return row_weight.masked_fill(target.ignored, 0).masked_fill(target.impossible, torch.nan)


def divisor_needs_rows(target: ClassTarget, asked: HeadLoss) -> bool:
    """Say whether a mean's divisor is not known before the rows are."""
    return target.probabilities is not None and asked.normalizer == "weights"


def loss_reduction(
    backend: Backend, rows: LossRows, asked: HeadLoss, reduction: str, result: torch.dtype, empty: Empty
) -> Reduction:
    """Return how the losses of the rows become a scalar."""
    divisor: Tensor | float = 1.0
    if reduction == "mean":
        divisor = _divisor(rows, asked)

    def value(loss: Tensor) -> Tensor:
        return reduce_rows(loss, reduction, denominator=divisor, dtype=result, empty=empty)

    above = upstream_divisor(divisor, empty)
    left_out = rows.target.ignored if rows.kept is None else None
    return Reduction(backend.scalar(above) if isinstance(above, Tensor) else float(above), value, left_out)


def _divisor(rows: LossRows, asked: HeadLoss) -> Tensor | float:
    """Return what a mean divides by."""
    target, rule = rows.target, asked.normalizer
    counted = target.indices is not None and target.ignored is None and asked.weight is None
    if counted and (rule is None or isinstance(rule, str)):
        return float(rows.source.rows)  # each row that is left counts as 1, by either rule
    return class_denominator(_weights_alone(rows, asked), target, rule)


def _weights_alone(rows: LossRows, asked: HeadLoss) -> definitions.ClassRows:
    """Return what a mean counts each row as, without the rows' losses."""
    indices = rows.target.indices
    if indices is None:
        nothing = torch.empty(0).expand(0)
        return definitions.ClassRows(torch.empty(()).expand(rows.shape), nothing)
    weight = torch.ones(indices.shape, device=indices.device) if asked.weight is None else asked.weight[indices]
    if rows.target.ignored is not None:
        weight = weight.masked_fill(rows.target.ignored, 0)
    wide = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
    return definitions.ClassRows(torch.empty(()).expand(rows.shape), rows.everywhere(weight.to(wide)))
