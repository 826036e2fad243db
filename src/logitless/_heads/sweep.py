"""Losses and measures of logits that are not built, by a backend's kernels: one pass over tiles, as one operation.

With a loss reduced to a scalar the gradient of each tile is made while the tile is there (three products); with values
a row, whose upstream gradients are not known yet, the backward pass makes each tile again (four). Where a gradient must
itself be differentiated the backward pass is the reference's, differentiated by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from logitless._heads.products import widens
from logitless._heads.rows import HeadRows, LogitRows
from logitless._heads.tiles import DenseTiles, HeadTiles, Tile, Tiling, tiling
from logitless._heads.window import opened
from logitless._rules.derivatives import needs_plain_backward, plain_backward
from logitless._rules.dispatch import Forecast
from logitless._rules.precision import HALF, no_autocast
from logitless.kernels.interface import Backend

Saved = Any
Definition = Callable[..., Sequence[Tensor]]


class RowWork(Protocol):
    """What is computed of rows of logits, tile by tile; positions are of the rows that the tiles are made of."""

    @property
    def class_major(self) -> bool:
        """Whether tiles are to lie [classes, rows]."""
        ...

    @property
    def extra_bytes(self) -> int:
        """What it holds beside each logit of a tile."""
        ...

    def forward(self, tiles: Sequence[Tile], start: int, stop: int) -> tuple[tuple[Tensor, ...], Saved]:
        """Return one value a row for each output, and what `gradient` needs of them."""
        ...

    def gradient(
        self,
        tiles: Sequence[Tile],
        saved: Saved,
        upstream: Sequence[Tensor | float | None],
        wanted: Sequence[bool],
        start: int,
        stop: int,
        first: int,
    ) -> None:
        """Write each wanted tile's gradient where the tile says; the tiles' classes begin at `first`."""
        ...


@runtime_checkable
class CutWork(RowWork, Protocol):
    """Work on tiles of some of the classes too: `part` and `combine` then stand for `forward`."""

    def combine(
        self, parts: Sequence[Saved], ranges: Sequence[tuple[int, int]], start: int, stop: int
    ) -> tuple[tuple[Tensor, ...], Saved]:
        """Return the same from what `part` gave for consecutive ranges of classes."""
        ...

    def part(self, tile: Tile, start: int, stop: int, first: int, last: int) -> Saved:
        """Return what `combine` needs of some of the classes."""
        ...


@dataclass(frozen=True, slots=True)
class HeadCall:
    """One call: who computes, its rows, its work, its tiles, and the same in plain operations on all rows."""

    backend: Backend
    sources: tuple[LogitRows, ...]
    work: RowWork
    dtype: torch.dtype
    tiles: Tiling
    definition: Definition
    differentiable: tuple[bool, ...]  # of the outputs
    gradient: bool  # whether anything needs one

    @property
    def tensors(self) -> list[Tensor | None]:
        """What the rows are made of, source by source."""
        return [tensor for source in self.sources for tensor in source.tensors]

    def split(self, values: Sequence[Any]) -> list[Sequence[Any]]:
        """Return what belongs to each source."""
        parts, at = [], 0
        for source in self.sources:
            parts.append(values[at : at + len(source.tensors)])
            at += len(source.tensors)
        return parts

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Return the row ranges; one empty range when there are no rows."""
        rows = self.sources[0].rows
        for start in range(0, max(rows, 1), self.tiles.rows):
            yield start, min(start + self.tiles.rows, rows)

    @property
    def classes(self) -> int:
        """How many classes a row has."""
        return self.sources[0].classes


def head_call(
    backend: Backend,
    sources: Sequence[LogitRows],
    work: RowWork,
    definition: Definition,
    *,
    outputs: Sequence[bool],
    least_dtype: torch.dtype,
    max_bytes: int | None,
    gradient: bool | None = None,
) -> HeadCall:
    """Plan a call: `least_dtype` is what the logits are widened to if anything asks for more than they have.

    `gradient` says whether anything needs one; None: what the tensors and the grad mode say.
    """
    dtype = tile_dtype(backend, sources, least_dtype)
    needed = gradient
    if needed is None:
        needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for s in sources for t in s.tensors)
    row_bytes = sum(HeadTiles.row_bytes(backend, s, dtype, needed) for s in sources if isinstance(s, HeadRows))
    row_bytes += sources[0].classes * work.extra_bytes
    tiles = tiling(
        backend.tile_rules(),
        sources[0].rows,
        sources[0].classes,
        row_bytes,
        max_bytes=max_bytes,
        gradient=needed,
        cut_classes=isinstance(work, CutWork),
    )
    return HeadCall(backend, tuple(sources), work, dtype, tiles, definition, tuple(outputs), needed)


def tile_dtype(backend: Backend, sources: Sequence[LogitRows], least: torch.dtype) -> torch.dtype:
    """Return the dtype of the tiles: float32 where products need no rounding, else theirs if that will do."""
    kinds = {t.dtype for s in sources for t in s.tensors[:1] if t is not None}
    plain = all(
        not isinstance(s, HeadRows) or (s.tensors[3] is None and s.scale == 1.0 and s.softcap is None) for s in sources
    )
    if len(kinds) == 1:
        (kind,) = kinds
        if widens(backend, kind) and least in (kind, torch.float32) and all(isinstance(s, HeadRows) for s in sources):
            return torch.float32
        half = kind in HALF
        if kind == least or (half and plain and least in (kind, torch.float32)):
            return kind
    return least


def forecast(call: HeadCall) -> Forecast:
    """Return the tile of a call, and its peak memory beyond inputs and gradients, the backward pass included."""
    tiles, peak = call.tiles, call.tiles.buffer_bytes + call.backend.workspace_bytes()
    rows = call.sources[0].rows
    one_tile = tiles.rows >= rows and tiles.classes >= call.classes
    for source in call.sources:
        if isinstance(source, HeadRows) and call.gradient:
            peak += HeadTiles.accumulator_bytes(call.backend, source, tiles, one_tile)
    row_bytes = sum(8 + call.dtype.itemsize for _ in call.differentiable)  # outputs, and what the gradient needs
    return Forecast((tiles.rows, tiles.classes), peak + rows * row_bytes)


def per_row(call: HeadCall) -> tuple[Tensor, ...]:
    """Return the work's outputs, one value a row each, differentiable with any upstream gradients."""
    outputs: tuple[Tensor, ...] = _PerRow.apply(call, *call.tensors)  # type: ignore[no-untyped-call] # torch types it not
    return outputs


class _PerRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: HeadCall, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        outputs, saved = row_values(call, tensors)
        ctx.call, ctx.saved = call, saved
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(o for o, d in zip(outputs, call.differentiable, strict=True) if not d))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        call, tensors, needed = ctx.call, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if all(grad is None for grad in grad_outputs):
            return (None,) * (1 + len(tensors))
        with no_autocast(_first(tensors)):
            if needs_plain_backward(*grad_outputs):
                return (None, *_plain(call.definition, tensors, needed, grad_outputs))
        return (None, *row_gradients(call, tensors, needed, grad_outputs, ctx.saved))


def row_values(call: HeadCall, tensors: Sequence[Tensor | None]) -> tuple[tuple[Tensor, ...], list[Saved]]:
    """Return the work's outputs, without a graph, and what the gradient needs of each tile."""
    with no_autocast(_first(tensors)):
        outputs, saved, _ = _sweep(call, tensors, [False] * len(tensors))
    return outputs, saved


def row_gradients(
    call: HeadCall,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    upstream: Sequence[Tensor | None],
    saved: Sequence[Saved],
) -> list[Tensor | None]:
    """Return the gradients of the tensors that need one, each tile made again."""
    with no_autocast(_first(tensors)):
        _, _, grads = _sweep(call, tensors, needed, upstream, saved)
    return _rounded(grads, tensors, 1.0)


@dataclass(frozen=True, slots=True)
class Reduction:
    """How the first output becomes a scalar: its sum over rows, divided; both known before any row is read."""

    divisor: Tensor | float  # of the gradient
    value: Callable[[Tensor], Tensor]


def reduced(call: HeadCall, reduction: Reduction) -> Tensor:
    """Return the first output reduced to a scalar; its gradient is made on the way."""
    loss: Tensor = _Reduced.apply(call, reduction, *call.tensors)  # type: ignore[no-untyped-call] # torch types it not
    return loss


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: HeadCall, reduction: Reduction, *tensors: Tensor | None) -> Tensor:
        needed = ctx.needs_input_grad[2:]
        loss, grads = value_and_gradients(call, reduction, tensors, needed)
        ctx.call, ctx.reduction, ctx.grads = call, reduction, grads if any(needed) else None
        ctx.save_for_backward(*tensors)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call, reduction, tensors, needed = ctx.call, ctx.reduction, ctx.saved_tensors, ctx.needs_input_grad[2:]
        with no_autocast(_first(tensors)):
            if needs_plain_backward(grad_output):

                def definition(*given: Tensor | None) -> Sequence[Tensor]:
                    return (reduction.value(call.definition(*given)[0]),)

                return (None, None, *_plain(definition, tensors, needed, [grad_output]))
        grads, ctx.grads = ctx.grads, None  # given away: another backward through the same graph makes them anew
        if grads is None:
            _, grads = value_and_gradients(call, reduction, tensors, needed)
        return (None, None, *_rounded(grads, tensors, call.backend.scalar(grad_output)))


def value_and_gradients(
    call: HeadCall, reduction: Reduction, tensors: Sequence[Tensor | None], needed: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the reduced first output, and the gradients that are needed in the dtypes they add up in."""
    upstream: list[Tensor | float | None] | None = None
    if any(needed):
        others = len(call.differentiable) - 1
        upstream = [_reciprocal(reduction.divisor), *[None] * others]
    with no_autocast(_first(tensors)):
        outputs, _, grads = _sweep(call, tensors, needed, upstream)
    return reduction.value(outputs[0]), grads


def _reciprocal(divisor: Tensor | float) -> Tensor | float:
    if isinstance(divisor, Tensor):
        return divisor.double().reciprocal()
    return 1.0 / divisor if divisor else torch.inf


def _first(tensors: Sequence[Tensor | None]) -> Tensor:
    return next(tensor for tensor in tensors if tensor is not None)


def _plain(
    definition: Definition,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return gradients that can be differentiated again."""
    wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need and tensor is not None]
    grads = iter(plain_backward(lambda *_: definition(*tensors), wanted, grad_outputs))
    return [next(grads) if need else None for need in needed]


def _rounded(
    grads: Sequence[Tensor | None], tensors: Sequence[Tensor | None], factor: Tensor | float
) -> list[Tensor | None]:
    """Return accumulated gradients times a number, rounded once to their tensors' dtypes."""
    rounded: list[Tensor | None] = []
    for grad, tensor in zip(grads, tensors, strict=True):
        if grad is None or tensor is None:
            rounded.append(None)
            continue
        if isinstance(factor, Tensor) or factor != 1.0:
            grad.mul_(factor)
        rounded.append(grad.to(tensor.dtype))
    return rounded


def _sweep(
    call: HeadCall,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    upstream: Sequence[Tensor | float | None] | None = None,
    saved: Sequence[Saved] | None = None,
) -> tuple[tuple[Tensor, ...], list[Saved], list[Tensor | None]]:
    """Pass over all tiles once; with upstream gradients also back. `saved` spares the rows' statistics."""
    windows = [source.window for source in call.sources if isinstance(source, HeadRows) and source.window is not None]
    if not windows:
        return _swept(call, tensors, needed, upstream, saved)
    with ExitStack() as memory:
        for window in windows:
            memory.enter_context(opened(window, tensors))
        return _swept(call, tensors, needed, upstream, saved)


def _swept(
    call: HeadCall,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    upstream: Sequence[Tensor | float | None] | None,
    saved: Sequence[Saved] | None,
) -> tuple[tuple[Tensor, ...], list[Saved], list[Tensor | None]]:
    makers: list[HeadTiles | DenseTiles] = []
    wanted = []
    class_major = call.work.class_major and call.backend.tile_rules().class_major
    for source, part, need in zip(call.sources, call.split(tensors), call.split(needed), strict=True):
        wanted.append(upstream is not None and any(need))
        flags = need if upstream is not None else [False] * len(need)
        if isinstance(source, HeadRows):
            makers.append(HeadTiles(call.backend, source, part, flags, call.tiles, call.dtype, class_major))
        else:
            makers.append(DenseTiles(call.backend, part, flags, call.dtype))
    outputs, states = [], []
    whole = call.tiles.classes >= call.classes
    ranges = [
        (first, min(first + call.tiles.classes, call.classes)) for first in range(0, call.classes, call.tiles.classes)
    ]
    for turn, (start, stop) in enumerate(call.ranges()):
        known = None if saved is None else saved[turn]
        if whole:
            tiles = [maker.logits(start, stop, 0, call.classes) for maker in makers]
            if known is None:
                values, known = call.work.forward(tiles, start, stop)
                outputs.append(values)
            _back(call, makers, tiles, known, upstream, wanted, start, stop, 0, call.classes)
        else:
            (maker,), work = makers, call.work
            assert isinstance(work, CutWork)
            if known is None:
                parts = [
                    work.part(maker.logits(start, stop, first, last), start, stop, first, last)
                    for first, last in ranges
                ]
                values, known = work.combine(parts, ranges, start, stop)
                outputs.append(values)
            for first, last in ranges if any(wanted) else ():
                tile = maker.logits(start, stop, first, last)
                _back(call, makers, [tile], known, upstream, wanted, start, stop, first, last)
        states.append(known)
    joined = tuple(torch.cat(values) for values in zip(*outputs, strict=True)) if saved is None else ()
    grads = [grad for maker in makers for grad in maker.finish()]
    return joined, states, grads


def _back(
    call: HeadCall,
    makers: Sequence[HeadTiles | DenseTiles],
    tiles: Sequence[Tile],
    saved: Saved,
    upstream: Sequence[Tensor | float | None] | None,
    wanted: Sequence[bool],
    start: int,
    stop: int,
    first: int,
    last: int,
) -> None:
    if upstream is None or not any(wanted) or start == stop:
        return
    rows = [u[start:stop] if isinstance(u, Tensor) and u.dim() else u for u in upstream]
    call.work.gradient(tiles, saved, rows, wanted, start, stop, first)
    for maker, tile, want in zip(makers, tiles, wanted, strict=True):
        if want:
            maker.take(tile, start, stop, first, last)
