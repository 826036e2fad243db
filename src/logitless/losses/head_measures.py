"""The measures of logits that are not built: how a call on LazyLogits becomes rows and a plan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from logitless._heads.measure_plan import entropy_call, pair_call, placed, token_call
from logitless._heads.rows import LogitRows, dense_rows
from logitless._heads.sweep import HeadCall, Reduction, per_row, reduced
from logitless._operators import head_measures as operators
from logitless._rules.precision import precision_of
from logitless._rules.reduction import count_of, reduce_rows
from logitless._rules.targets import checked_values
from logitless.kernels.interface import Backend, ClassTarget, Divergence
from logitless.lazy.logits import HeadLogits, LazyLogits

Plan = Callable[[Backend], HeadCall]


def rows_of(logits: Tensor | LazyLogits, scale: float = 1.0) -> LogitRows:
    """Return logits as rows to be made tile by tile; those that are there times a number."""
    return logits.rows() if isinstance(logits, HeadLogits) else dense_rows(logits, scale)


def token_plan(
    source: LogitRows, wide: torch.dtype, target: ClassTarget, top_k: int
) -> Callable[[Backend], tuple[HeadCall, Tensor | None]]:
    """Return how a backend will make what `token_call` plans; the target is as given."""

    def plan(backend: Backend) -> tuple[HeadCall, Tensor | None]:
        checked = checked_values("token_stats", target, reads=backend.READS_VALUES)
        return token_call(backend, source, checked, wide, top_k)

    return plan


def entropy_plan(source: LogitRows, wide: torch.dtype, reduction: str) -> Plan:
    """Return how a backend will make the entropy of each row."""
    return partial(entropy_call, source=source, wide=wide, late=reduction == "none")


def pair_plan(
    name: str,
    given: Sequence[LogitRows],
    wide: torch.dtype,
    names: tuple[str, ...],
    target: ClassTarget | None,
    divergence: Divergence | None,
    reduction: str,
) -> Plan:
    """Return how a backend will make the measures of that name; the target is as given."""

    def plan(backend: Backend) -> HeadCall:
        if target is not None and backend.READS_VALUES:
            checked_values(name, target)
        return pair_call(backend, given, names, target, divergence, wide, late=reduction == "none")

    return plan


def token_stats(call: HeadCall, kept: Tensor | None, shape: torch.Size) -> tuple[Tensor, ...]:
    """Return the planned statistics; 0 and -1 for ignored rows."""
    return placed(per_row(call), kept, shape)


def rows(call: HeadCall, shape: torch.Size) -> tuple[Tensor, ...]:
    """Return planned measures, one value a row."""
    return tuple(value.view(shape) for value in per_row(call))


def result(call: HeadCall, shape: torch.Size, reduction: str) -> Tensor:
    """Return the one planned measure, reduced."""
    if reduction == "none":
        return rows(call, shape)[0]
    count = torch.sym_float(count_of(shape)) if reduction == "mean" else 1.0

    def value(each: Tensor) -> Tensor:
        return reduce_rows(each, reduction, denominator=count, dtype=each.dtype)

    return reduced(call, Reduction(count, value))


def in_graph(
    backend: Backend,
    name: str,
    outputs: Sequence[str],
    p: Tensor | LazyLogits,
    q: Tensor | LazyLogits | None = None,
    target: ClassTarget | None = None,
    divergence: Divergence | None = None,
    scale: float = 1.0,
    top_k: int = 0,
) -> list[Tensor]:
    """Return measures of logits that are not built, one value a row, by an operator of a compiled graph."""
    sources = [None if logits is None else operators.Source(rows_of(logits, scale), logits.dtype) for logits in (p, q)]
    assert sources[0] is not None
    told = operators.Measures.of(name, outputs, sources[0], sources[1], target, divergence, top_k)
    return [value.view((*p.shape[:-1], *value.shape[1:])) for value in operators.rows(told, backend)]


def wide_dtype(*logits: Tensor | LazyLogits) -> torch.dtype:
    """Return the dtype of the values of these logits."""
    return functools.reduce(torch.promote_types, (precision_of(each).compute for each in logits))
