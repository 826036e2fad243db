"""The only place that divides by a count: what `reduction` means, and how rows become a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import _reduction as torch_reduction

if TYPE_CHECKING:
    from logitless.kernels.definitions import ClassRows
    from logitless.kernels.interface import ClassTarget

Empty = Literal["nan", "zero"]
Normalizer = Literal["weights", "rows"] | float | Tensor | None


def count_of(sizes: Sequence[int]) -> int:
    """Return how many elements these sizes have.

    Not `torch.Size.numel`: it makes a size that a program leaves open (torch.export) a constant.
    """
    return math.prod(sizes)


def resolve_reduction(
    reduction: str, size_average: bool | None, reduce: bool | None, *, extra: tuple[str, ...] = ()
) -> str:
    """Return "none", "mean", "sum" or one of `extra`, from torch's present and deprecated arguments."""
    if size_average is not None or reduce is not None:
        return torch_reduction.legacy_get_string(size_average, reduce)
    if reduction in ("none", "mean", "sum") or reduction in extra:
        return reduction
    if reduction == "elementwise_mean":
        torch_reduction.get_enum(reduction)  # torch's deprecation warning
        return "mean"
    legal = ", ".join(repr(name) for name in ("none", "mean", "sum", *extra))
    raise ValueError(f"{reduction} is not a valid value for reduction; expected one of {legal}")


def check_normalizer(normalizer: Normalizer, reduction: str) -> None:
    """Raise unless `normalizer` is one `mean_denominator` knows and the reduction divides at all."""
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"normalizer={normalizer!r} sets what reduction='mean' divides by, but reduction={reduction!r}"
        )
    if isinstance(normalizer, str) and normalizer not in ("weights", "rows"):
        raise ValueError(f"normalizer must be None, 'weights', 'rows', a number or a 0-d tensor, got {normalizer!r}")
    if isinstance(normalizer, Tensor) and normalizer.dim() != 0:
        raise ValueError(f"normalizer must be a 0-d tensor, got shape {tuple(normalizer.shape)}")


def mean_denominator(
    normalizer: Normalizer, *, default: str, weights: Callable[[], Tensor | float], rows: Callable[[], Tensor | float]
) -> Tensor | float:
    """Return what "mean" divides by; the caller says what each name means for its loss, and which is torch's."""
    rule = default if normalizer is None else normalizer
    if isinstance(rule, str):
        return weights() if rule == "weights" else rows()
    return rule


def class_denominator(rows: ClassRows, meaning: ClassTarget, normalizer: Normalizer) -> Tensor | float:
    """Return what a mean over rows with a class target divides by: torch's rule, or as asked."""

    def kept() -> Tensor | float:
        if meaning.ignored is not None:
            return (~meaning.ignored).sum()
        if meaning.indices is not None:
            return (meaning.indices != meaning.ignore_index).sum()
        return rows.loss.numel()

    default = "rows" if meaning.indices is None else "weights"

    def weights() -> Tensor:
        return rows.weight.sum(dtype=sum_dtype(rows.weight))

    return mean_denominator(normalizer, default=default, weights=weights, rows=kept)


def check_empty(empty: str) -> None:
    """Raise unless `empty` is one of the two answers to a mean over nothing."""
    if empty not in ("nan", "zero"):
        raise ValueError(f"empty must be 'nan' (torch's answer) or 'zero', got {empty!r}")


def sum_dtype(rows: Tensor) -> torch.dtype | None:
    """Return what many rows are added up in: on the CPU float64, where float32 sums depend on the number of threads."""
    return torch.float64 if rows.device.type == "cpu" and rows.dtype.is_floating_point else None


def as_number(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number as a 0-d tensor, made on its device: to copy one from the host would wait for the device."""
    return value.to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)


def reduce_rows(
    rows: Tensor, reduction: str, *, denominator: Tensor | float, dtype: torch.dtype, empty: Empty = "nan"
) -> Tensor:
    """Reduce per-row (or per-element) losses held in an accumulation dtype, and round once to `dtype`."""
    if reduction == "none":
        return rows.to(dtype)
    total = rows.sum(dtype=sum_dtype(rows))
    if reduction == "sum":
        return total.to(dtype)
    if empty == "zero":
        divisor = as_number(denominator, total.dtype, total.device)
        nothing = divisor == 0
        mean = torch.where(nothing, total * 0, total / divisor.masked_fill(nothing, 1))
        return mean.to(dtype)
    if not isinstance(denominator, Tensor) and denominator == 0:
        return (total / total.new_zeros(())).to(dtype)
    return (total / denominator).to(dtype)


def upstream_divisor(denominator: Tensor | float, empty: Empty) -> Tensor | float:
    """Return what the upstream gradient of a reduced loss is divided by before it reaches the rows.

    A mean over nothing that answers zero has a gradient of zero: its divisor is infinite.
    """
    if empty == "nan":
        return denominator
    if not isinstance(denominator, Tensor):
        return denominator or math.inf
    divisor = denominator.double()
    return torch.where(divisor == 0, torch.inf, divisor)


def reduced_sum(total: float, count: float, reduction: str) -> float:
    """Return the "sum" or "mean" of rows already added up."""
    if reduction == "sum":
        return total
    return total / count if count else math.nan
