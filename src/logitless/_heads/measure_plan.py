"""The measures of logits that are not built, planned: the same for an eager call and inside an operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from logitless._heads.loss_plan import kernel_indices
from logitless._heads.rows import HeadRows, LogitRows, at_positions
from logitless._heads.sweep import HeadCall, head_call
from logitless._heads.work import NO_INDEX, PairWork, TokenWork
from logitless._rules.precision import no_autocast
from logitless._rules.reduction import count_of
from logitless.kernels import definitions
from logitless.kernels.interface import Backend, ClassTarget, Divergence

# The values of two tiles of logits and the target of their rows; None where a value needs a target that is not there.
PairFunction = Callable[[Tensor, Tensor, ClassTarget | None], tuple[Tensor | None, ...]]


def token_call(
    backend: Backend,
    source: LogitRows,
    target: ClassTarget,
    wide: torch.dtype,
    top_k: int,
    gradient: bool | None = None,
) -> tuple[HeadCall, Tensor | None]:
    """Plan nll, lse, entropy, argmax and rank of the rows that are not ignored, and say where those are (None: all).

    With a `top_k` also the log-probabilities and classes of the k largest. The target has been checked; `wide` is the
    values' dtype, and `gradient` is as in `head_call`.
    """
    assert target.indices is not None
    ignored, kept = None if target.ignored is None else target.ignored.reshape(-1), None
    if isinstance(source, HeadRows):
        source, kept = source.without(ignored, selectable=target.impossible is None)
    if kept is None:
        given, ignore_index = kernel_indices(target)
        assert given is not None
        indices = given.reshape(-1)
        if target.impossible is not None:  # a class that does not exist, as the kernel will see
            indices = indices.masked_fill(target.impossible.reshape(-1), target.classes)
    else:
        indices, ignore_index = target.indices.reshape(-1)[kept], NO_INDEX

    def definition(*tensors: Tensor | None) -> Sequence[Tensor]:
        meaning = ClassTarget(1, target.classes, -1, indices)
        if kept is None and ignored is not None:
            wrong = target.impossible
            excluded = ignored if wrong is None else ignored | wrong.reshape(-1)
            safe = indices.masked_fill(excluded, 0)
            impossible = None if wrong is None else wrong.reshape(-1)
            meaning = ClassTarget(1, target.classes, ignore_index, safe, ignored, impossible)
        stats = definitions.token_stats(_all(source, tensors), meaning, top_k)
        return [value.to(wide) if value.is_floating_point() else value for value in stats]

    work = TokenWork(backend, indices, ignore_index, wide, top_k)
    outputs = (True, True, True, False, False, *((False, False) if top_k else ()))
    call = head_call(
        backend, [source], work, definition, outputs=outputs, least_dtype=wide, gradient=gradient, late=True
    )
    return call, kept


def placed(values: Sequence[Tensor], kept: Tensor | None, shape: torch.Size) -> tuple[Tensor, ...]:
    """Return values of the kept rows among all, in their shape; 0 elsewhere, or -1 where that is no class."""
    return tuple(
        at_positions(value, kept, count_of(shape), 0 if value.is_floating_point() else -1).view(
            (*shape, *value.shape[1:])
        )
        for value in values
    )


def entropy_call(
    backend: Backend, source: LogitRows, wide: torch.dtype, gradient: bool | None = None, *, late: bool
) -> HeadCall:
    """Plan the entropy of each row; `wide` as in `token_call`, `gradient` and `late` as in `head_call`."""

    def definition(*tensors: Tensor | None) -> Sequence[Tensor]:
        return (definitions.entropy(_all(source, tensors), -1).to(wide),)

    work = TokenWork(backend, None, NO_INDEX, wide)
    return head_call(
        backend, [source], work, definition, outputs=(True,), least_dtype=wide, gradient=gradient, late=late
    )


def pair_call(
    backend: Backend,
    sources: Sequence[LogitRows],
    names: tuple[str, ...],
    target: ClassTarget | None,
    divergence: Divergence | None,
    wide: torch.dtype,
    gradient: bool | None = None,
    *,
    late: bool,
) -> HeadCall:
    """Plan the measures of that name of two sources, the target's values as given; the rest as in `entropy_call`."""
    function = pair_function(names, divergence)
    cut, classes = len(sources[0].tensors), sources[0].classes
    indices = None if target is None or target.indices is None else target.indices.reshape(-1)
    ignore_index = -100 if target is None else target.ignore_index

    def definition(*tensors: Tensor | None) -> Sequence[Tensor]:
        checked = None
        if indices is not None:
            ignored = indices == ignore_index
            checked = ClassTarget(1, classes, ignore_index, indices.masked_fill(ignored, 0), ignored)
        given = tensors[0]
        assert given is not None
        with no_autocast(given):
            first, second = _all(sources[0], tensors[:cut]), _all(sources[1], tensors[cut:])
            values = [value for value in function(first, second, checked) if value is not None]
        return [value.to(wide) if value.is_floating_point() else value for value in values]

    outputs = tuple(name != "same_top" for name in names)
    class_major = all(isinstance(source, HeadRows) for source in sources)
    work = PairWork(backend, names, divergence, indices, ignore_index, class_major, wide)
    return head_call(
        backend, sources, work, definition, outputs=outputs, least_dtype=wide, gradient=gradient, late=late
    )


def pair_function(names: tuple[str, ...], divergence: Divergence | None = None) -> PairFunction:
    """Return the definition of the measures of that name: of one, or of all."""
    if divergence is not None:
        return lambda p, q, _: (definitions.divergence(p, q, divergence),)
    if len(names) > 1:
        return definitions.pair_stats
    measure = {"kl": definitions.kl, "js": definitions.js}[names[0]]
    return lambda p, q, _: (measure(p, q),)


def _all(source: LogitRows, tensors: Sequence[Tensor | None]) -> Tensor:
    return source.activate(source.raw(tensors, 0, source.rows), tensors).double()
