"""The measures of logits that are not built, by the compiled kernels; see `_head_ops`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from logitless._head_ops import HeadCall, Reduction, head_call, per_row, reduced
from logitless._precision import no_autocast, precision_of
from logitless._reduce import reduce_rows
from logitless._row_work import PairWork, TokenWork
from logitless._targets import ClassTarget
from logitless._tiles import LogitRows, at_positions, dense_rows
from logitless.kernels import reference
from logitless.lazy import LazyLogits

# The values of two tiles of logits and the target of their rows; None where a value needs a target that is not there.
PairFunction = Callable[[Tensor, Tensor, ClassTarget | None], tuple[Tensor | None, ...]]


def token_call(logits: LazyLogits, target: ClassTarget, gradient: bool | None = None) -> tuple[HeadCall, Tensor | None]:
    """Plan nll, lse, entropy, argmax and rank of the rows that are not ignored, and say where those are (None: all).

    `gradient` as in `head_call`.
    """
    assert target.indices is not None
    ignored = None if target.ignored is None else target.ignored.reshape(-1)
    source, kept = logits.rows().without(ignored, selectable=True)
    indices = target.indices.reshape(-1)
    if kept is not None:
        indices = indices[kept]
    wide = _wide(logits)

    def definition(*tensors: Tensor | None) -> Sequence[Tensor]:
        stats = reference.token_stats(_all(source, tensors), ClassTarget(1, target.classes, -1, indices))
        return [value.to(wide) if value.is_floating_point() else value for value in stats]

    outputs = (True, True, True, False, False)
    work = TokenWork(indices)
    call = head_call([source], work, definition, outputs=outputs, least_dtype=wide, max_bytes=None, gradient=gradient)
    return call, kept


def token_stats(call: HeadCall, kept: Tensor | None, shape: torch.Size) -> tuple[Tensor, ...]:
    """Return the planned statistics; 0 and -1 for ignored rows."""
    return placed(per_row(call), kept, shape)


def placed(values: Sequence[Tensor], kept: Tensor | None, shape: torch.Size) -> tuple[Tensor, ...]:
    """Return values of the kept rows among all, in their shape; 0 elsewhere, or -1 where that is no class."""
    return tuple(
        at_positions(value, kept, shape.numel(), 0 if value.is_floating_point() else -1).view(shape) for value in values
    )


def entropy_call(logits: LazyLogits, gradient: bool | None = None) -> HeadCall:
    """Plan the entropy of each row."""
    source, wide = logits.rows(), _wide(logits)

    def definition(*tensors: Tensor | None) -> Sequence[Tensor]:
        return (reference.entropy(_all(source, tensors), -1).to(wide),)

    work = TokenWork(None)
    return head_call([source], work, definition, outputs=(True,), least_dtype=wide, max_bytes=None, gradient=gradient)


def pair_call(
    p: Tensor | LazyLogits,
    q: Tensor | LazyLogits,
    names: tuple[str, ...],
    target: ClassTarget | None,
    gradient: bool | None = None,
) -> HeadCall:
    """Plan the measures of that name; the target's values are as given, and `gradient` is as in `head_call`."""
    function = pair_function(names)
    sources = [logits.rows() if isinstance(logits, LazyLogits) else dense_rows(logits) for logits in (p, q)]
    wide = torch.promote_types(_wide(p), _wide(q))
    cut = len(sources[0].tensors)
    indices = None if target is None or target.indices is None else target.indices.reshape(-1)
    ignore_index = -100 if target is None else target.ignore_index

    def definition(*tensors: Tensor | None) -> Sequence[Tensor]:
        checked = None
        if indices is not None:
            ignored = indices == ignore_index
            checked = ClassTarget(1, p.shape[-1], ignore_index, indices.masked_fill(ignored, 0), ignored)
        with no_autocast(p):
            first, second = _all(sources[0], tensors[:cut]), _all(sources[1], tensors[cut:])
            values = [value for value in function(first, second, checked) if value is not None]
        return [value.to(wide) if value.is_floating_point() else value for value in values]

    outputs = tuple(name != "same_top" for name in names)
    class_major = isinstance(p, LazyLogits) and isinstance(q, LazyLogits)
    work = PairWork(names, indices, ignore_index, class_major)
    return head_call(sources, work, definition, outputs=outputs, least_dtype=wide, max_bytes=None, gradient=gradient)


def pair_function(names: tuple[str, ...]) -> PairFunction:
    """Return the definition of the measures of that name: of one, or of all."""
    if len(names) > 1:
        return reference.pair_stats
    measure = {"kl": reference.kl, "js": reference.js}[names[0]]
    return lambda p, q, _: (measure(p, q),)


def rows(call: HeadCall, shape: torch.Size) -> tuple[Tensor, ...]:
    """Return planned measures, one value a row."""
    return tuple(value.view(shape) for value in per_row(call))


def result(call: HeadCall, shape: torch.Size, reduction: str) -> Tensor:
    """Return the one planned measure, reduced."""
    if reduction == "none":
        return rows(call, shape)[0]
    count = float(shape.numel()) if reduction == "mean" else 1.0

    def value(each: Tensor) -> Tensor:
        return reduce_rows(each, reduction, denominator=count, dtype=each.dtype)

    return reduced(call, Reduction(count, value))


def _all(source: LogitRows, tensors: Sequence[Tensor | None]) -> Tensor:
    return source.activate(source.raw(tensors, 0, source.rows), tensors).double()


def _wide(logits: Tensor | LazyLogits) -> torch.dtype:
    return precision_of(logits).compute
