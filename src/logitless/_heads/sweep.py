"""Losses and measures of logits that are not built, by a backend's kernels: one pass over tiles, as one operation.

With a loss reduced to a scalar the gradient of each tile is made while the tile is there (three products); with values
a row, whose upstream gradients are not known yet, the backward pass makes each tile again (four). Where the backend's
rules say so, the last tiles wait for it instead, as many as the call's bytes hold: it begins with these, and their
memory then serves the others. Where a gradient must itself be differentiated the backward pass is the reference's,
differentiated by torch.

Precision policy: a gradient that is made before its upstream gradient is known adds up in float32 or wider, stays so
until the backward pass multiplies it, and is rounded then. What the loss divides by is taken in as it is made where
that moves no number near the ends of float32's range, and left for the backward pass elsewhere: a mean over nothing
would make it infinite. Where no row is left the gradient is exactly 0, whatever comes from above.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from logitless._heads.multiplier import multiplier, who_multiplies
from logitless._heads.rows import DenseRows, HeadRows, LogitRows
from logitless._heads.tiles import Backward, DenseTiles, HeadTiles, Tile, Tiling, tiling
from logitless._heads.window import opened
from logitless._rules.derivatives import applied_directly, needs_plain_backward, plain_backward
from logitless._rules.dispatch import Forecast, explains_a_graph
from logitless._rules.keeping import graph_is_kept, put_together, taken_apart
from logitless._rules.precision import HALF, no_autocast
from logitless._rules.reduction import as_number
from logitless.kernels.interface import Backend

Saved = Any
Memory = list[Tensor | None]  # of one tile's logits, source by source; None: they were given
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

    @property
    def reads_logits(self) -> bool:
        """Whether its gradient is made of the tile's logits: where it is not, they are not made again for it."""
        ...

    @property
    def narrows(self) -> bool:
        """Whether its gradient is made by `row_grad` or `pair_row_grad`; see `Backend.NARROWS`."""
        ...

    def forward(self, tiles: Sequence[Tile], start: int, stop: int) -> tuple[tuple[Tensor, ...], Saved]:
        """Return one value a row for each output, and what `gradient` needs of them."""
        ...

    def gradient(self, tiles: Sequence[Tile], back: Backward) -> None:
        """Write each wanted tile's gradient where the tile says."""
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


class Kept(NamedTuple):
    """The logits of a call's last tiles, from its forward pass."""

    memory: Sequence[Memory]
    stays: bool  # another backward pass may read them


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
    class_major: bool  # the order of its tiles

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

    @property
    def kept_tiles(self) -> int:
        """Of how many tiles, the last, the logits wait for the backward pass of values a row."""
        return self.tiles.kept if self.work.reads_logits and any(self.differentiable) else 0


def head_call(
    backend: Backend,
    sources: Sequence[LogitRows],
    work: RowWork,
    definition: Definition,
    *,
    outputs: Sequence[bool],
    least_dtype: torch.dtype,
    max_bytes: int | None = None,
    gradient: bool | None = None,
    late: bool = False,
) -> HeadCall:
    """Plan a call: `least_dtype` is what the logits are widened to if anything asks for more than they have.

    `gradient` says whether anything needs one; None: what the tensors and the grad mode say. `late` says that it is
    made in the backward pass, for which logits may wait.
    """
    dtype = tile_dtype(sources, least_dtype)
    needed = gradient
    if needed is None:
        needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for s in sources for t in s.tensors)
    row_bytes = sum(HeadTiles.row_bytes(s, dtype, needed) for s in sources if isinstance(s, HeadRows))
    row_bytes += sum(DenseTiles.row_bytes(s, dtype) for s in sources if isinstance(s, DenseRows))
    row_bytes += sources[0].classes * work.extra_bytes
    rules, kept_row_bytes = backend.tile_rules(), 0
    if late and needed and rules.keeps_logits:
        heads = [HeadTiles.kept_row_bytes(s, dtype) for s in sources if isinstance(s, HeadRows)]
        kept_row_bytes = sum(heads) if all(heads) else 0
    class_major = _is_class_major(backend, sources, work)
    tiles = tiling(
        rules,
        sources[0].rows,
        sources[0].classes,
        row_bytes,
        max_bytes=max_bytes,
        gradient=needed,
        cut_classes=_cuts_classes(type(work)),
        class_major=class_major,
        kept_row_bytes=kept_row_bytes,
    )
    return HeadCall(backend, tuple(sources), work, dtype, tiles, definition, tuple(outputs), needed, class_major)


def _is_class_major(backend: Backend, sources: Sequence[LogitRows], work: RowWork) -> bool:
    """Say whether tiles lie [classes, rows]: the work leaves that open, and it suits whoever multiplies each head."""
    if not work.class_major:
        return False
    factors = [source.tensors[0] for source in sources if isinstance(source, HeadRows)]
    taken = [multiplier(backend, hidden.dtype, hidden.shape[1]) for hidden in factors if hidden is not None]
    return all(each.tile_rules().class_major for each in taken or [backend])


@functools.cache
def _cuts_classes(kind: type[RowWork]) -> bool:
    """Say whether a kind of work is `CutWork`; to ask a protocol at each call would take as long as a small tile."""
    return hasattr(kind, "combine")


def tile_dtype(sources: Sequence[LogitRows], least: torch.dtype) -> torch.dtype:
    """Return the dtype of the tiles: float32 of half-precision heads, else theirs if that will do.

    Logits that were given and would be rounded by their scale are scaled in float64, which keeps their differences; a
    head's were rounded when they were made.
    """
    if all(isinstance(s, DenseRows) for s in sources):
        if not all(s.scales_exactly for s in sources if isinstance(s, DenseRows)):
            return torch.float64
        if not all(s.scale == 1.0 for s in sources if isinstance(s, DenseRows)):
            return least
    kinds = {t.dtype for s in sources for t in s.tensors[:1] if t is not None}
    plain = all(
        not isinstance(s, HeadRows) or (s.tensors[3] is None and s.scale == 1.0 and s.softcap is None) for s in sources
    )
    if len(kinds) == 1:
        (kind,) = kinds
        if kind in HALF and least in (kind, torch.float32) and all(isinstance(s, HeadRows) for s in sources):
            return torch.float32
        # Float16 would round away or flush what a loss scale is to lift.
        if kind == least or (kind == torch.bfloat16 and plain and least == torch.float32):
            return kind
    return least


def forecast(call: HeadCall) -> Forecast:
    """Return the tile of a call, and its peak memory beyond inputs and gradients, the backward pass included."""
    tiles, peak = call.tiles, call.tiles.buffer_bytes + call.backend.workspace_bytes()
    kept = 0 if explains_a_graph() else call.kept_tiles  # an operator of a graph makes every tile again
    if kept:
        peak += tiles.kept_bytes - tiles.kept_bytes // kept
    rows = call.sources[0].rows
    for source in call.sources:
        if isinstance(source, HeadRows) and call.gradient:
            peak += HeadTiles.accumulator_bytes(call.backend, source, tiles)
    row_bytes = sum(8 + call.dtype.itemsize for _ in call.differentiable)  # outputs, and what the gradient needs
    kept_bytes = tiles.kept_bytes if kept else 0
    return Forecast((tiles.rows, tiles.classes), peak + rows * row_bytes, _products(call), kept_bytes)


def _products(call: HeadCall) -> str:
    """Return who multiplies each head."""
    factors = [source.tensors[0] for source in call.sources if isinstance(source, HeadRows)]
    said = [who_multiplies(call.backend, hidden.dtype, hidden.shape[1]) for hidden in factors if hidden is not None]
    return "; ".join(dict.fromkeys(said))


def per_row(call: HeadCall) -> tuple[Tensor, ...]:
    """Return the work's outputs, one value a row each, differentiable with any upstream gradients."""
    tensors = call.tensors
    if not needs_graph(tensors):
        return row_values(call, tensors)[0]
    kept, others = taken_apart(call, tensors)
    outputs: tuple[Tensor, ...] = _apply_per_row(call, kept, others, *tensors)
    return outputs


def needs_graph(tensors: Sequence[Tensor | None]) -> bool:
    """Say whether a backward pass may follow: without one nothing is kept, and autograd need not hear of the call."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class _PerRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: HeadCall, kept: Any, others: Sequence[Tensor], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        outputs, *saved = _row_values(call, tensors, call.kept_tiles)
        ctx.set_materialize_grads(False)
        ctx.states, states = taken_apart(saved)
        ctx.kept, ctx.parts = kept, (len(tensors), len(tensors) + len(others))
        ctx.save_for_backward(*tensors, *others, *states)
        ctx.mark_non_differentiable(*(o for o, d in zip(outputs, call.differentiable, strict=True) if not d))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        if all(grad is None for grad in grad_outputs):
            return (None,) * (3 + len(needed))
        inputs, others = ctx.parts
        everything = ctx.saved_tensors
        tensors = everything[:inputs]
        call: HeadCall = put_together(ctx.kept, everything[:others])
        with no_autocast(_first(tensors)):
            if needs_plain_backward(*grad_outputs):
                return (None, None, None, *plain_backward(call.definition, tensors, needed, grad_outputs))
        saved, logits = put_together(ctx.states, everything[others:])
        given = Kept(logits, stays=graph_is_kept())
        return (None, None, None, *row_gradients(call, tensors, needed, grad_outputs, saved, given))


_apply_per_row: Any = applied_directly(_PerRow)


def row_values(call: HeadCall, tensors: Sequence[Tensor | None]) -> tuple[tuple[Tensor, ...], list[Saved]]:
    """Return the work's outputs, without a graph, and what the gradient needs of each tile beside its logits."""
    outputs, saved, _ = _row_values(call, tensors, 0)
    return outputs, saved


def _row_values(
    call: HeadCall, tensors: Sequence[Tensor | None], keep: int
) -> tuple[tuple[Tensor, ...], list[Saved], list[Memory]]:
    """Return the same, and the memory of the logits of so many last tiles."""
    with no_autocast(_first(tensors)):
        outputs, saved, _, memory = _sweep(call, tensors, [False] * len(tensors), keep=keep)
    # Of one tile too in memory of their own: what the gradient needs may be among them, and the caller may write to it.
    return tuple(torch.cat(values) for values in zip(*outputs, strict=True)), saved, memory


def row_gradients(
    call: HeadCall,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    upstream: Sequence[Tensor | None],
    saved: Sequence[Saved],
    kept: Kept | None = None,
) -> list[Tensor | None]:
    """Return the gradients of the tensors that need one, each tile whose logits were not kept made again."""
    if call.classes == 0:
        return [
            torch.zeros_like(tensor) if need and tensor is not None else None
            for tensor, need in zip(tensors, needed, strict=True)
        ]
    with no_autocast(_first(tensors)):
        grads = _sweep(call, tensors, needed, upstream, saved, kept).gradients
    return _scaled(grads, tensors, 1.0, kept=False)


@dataclass(frozen=True, slots=True)
class Reduction:
    """How the first output becomes a scalar: its sum over rows, divided; both known before any row is read."""

    divisor: Tensor | float  # of the gradient
    value: Callable[[Tensor], Tensor]
    left_out: Tensor | None = None  # rows that no gradient reaches, where they could not be taken out of the call


class Factors(NamedTuple):
    """What the gradient of each row is multiplied by, in two parts.

    Where `late` is exactly 0 the gradient is 0, whatever comes from above.
    """

    early: Tensor | float  # as it is made
    late: Tensor | float  # beside the upstream gradient


# Within these powers of two a factor costs no digit: what it moves below the range of float32 was 2**-100 of the rest.
_LEAST, _MOST = 2.0**-24, 2.0**24


def factors(call: HeadCall, reduction: Reduction) -> Factors:
    """Return the parts of `1 / divisor`; what is not a number of ordinary size is left for the backward pass."""
    divisor, left_out = reduction.divisor, reduction.left_out
    if call.sources[0].rows == 0:
        return Factors(1.0, 0.0)
    if left_out is None and not isinstance(divisor, Tensor):
        factor = 1.0 / divisor if divisor else math.inf
        return Factors(factor, 1.0) if _LEAST <= abs(factor) <= _MOST else Factors(1.0, factor)
    device = left_out.device if left_out is not None else call.tensors[0].device  # type: ignore[union-attr] # never None
    whole = as_number(divisor, torch.float64, device).reciprocal()
    usual = (whole.abs() >= _LEAST) & (whole.abs() <= _MOST)
    early, late = torch.where(usual, whole, 1.0), torch.where(usual, 1.0, whole)
    return Factors(early, late if left_out is None else torch.where(left_out.all(), 0.0, late))


def late_factor(late: Tensor | float, grad_output: Tensor | float) -> Tensor | float:
    """Return what gradients that were made early are multiplied by in the end."""
    if isinstance(late, Tensor):
        return torch.where(late == 0, 0.0, late * grad_output)
    return 0.0 if late == 0 else late * grad_output


def reduced(call: HeadCall, reduction: Reduction) -> Tensor:
    """Return the first output reduced to a scalar; its gradient is made on the way.

    But where a dense teacher or student of half precision gets a gradient: one as large as it is cannot wait in
    float32, so it is made in the backward pass.
    """
    if any(_waits(source) for source in call.sources):
        return reduction.value(per_row(call)[0])
    tensors, parts = call.tensors, factors(call, reduction)
    if not needs_graph(tensors):
        return value_and_gradients(call, reduction, parts, tensors, [False] * len(tensors))[0]
    # What the backward pass reads: how the loss is defined, for a gradient to be differentiated again, and the factors.
    needed = call.definition, reduction.value, parts.late, reduction.left_out
    kept, others = taken_apart(needed, tensors)
    loss: Tensor = _apply_reduced(call, reduction, parts, kept, others, *tensors)
    return loss


def _waits(source: LogitRows) -> bool:
    if isinstance(source, HeadRows) or not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.dtype in HALF and tensor.requires_grad for tensor in source.tensors)


_ARGUMENTS = 5  # of `_Reduced` before the tensors


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: HeadCall,
        reduction: Reduction,
        factors: Factors,
        kept: Any,
        others: Sequence[Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        loss, grads = value_and_gradients(call, reduction, factors, tensors, ctx.needs_input_grad[_ARGUMENTS:])
        ctx.backend, ctx.kept, ctx.parts = call.backend, kept, (len(tensors), len(tensors) + len(others))
        ctx.save_for_backward(*tensors, *others, *grads)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        everything, needed = ctx.saved_tensors, ctx.needs_input_grad[_ARGUMENTS:]
        inputs, others = ctx.parts
        tensors, grads = everything[:inputs], everything[others:]
        if needs_plain_backward(grad_output):
            define, value, _, _ = put_together(ctx.kept, everything[:others])

            def definition(*given: Tensor | None) -> Sequence[Tensor]:
                return (value(define(*given)[0]),)

            with no_autocast(_first(tensors)):
                return (*[None] * _ARGUMENTS, *plain_backward(definition, tensors, needed, [grad_output]))
        late, left_out = put_together(ctx.kept[2:], everything[:others])
        with no_autocast(_first(tensors)):
            factor = late_factor(late, ctx.backend.scalar(grad_output))
            made = _scaled(grads, tensors, factor, kept=graph_is_kept())
            if left_out is not None and made[0] is not None:  # 0 times an upstream gradient that is not finite
                made[0].masked_fill_(left_out.unsqueeze(1), 0)
        return (*[None] * _ARGUMENTS, *made)


_apply_reduced: Any = applied_directly(_Reduced)


def value_and_gradients(
    call: HeadCall,
    reduction: Reduction,
    factors: Factors,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the reduced first output, and the gradients that are needed, in the dtypes they add up in.

    They are still to be multiplied by the late factor; see `late_factor`.
    """
    upstream: list[Tensor | float | None] | None = None
    if any(needed):
        upstream = [factors.early, *[None] * (len(call.differentiable) - 1)]
    with no_autocast(_first(tensors)):
        outputs, _, grads, _ = _sweep(call, tensors, needed, upstream)
    first = [values[0] for values in outputs]
    return reduction.value(first[0] if len(first) == 1 else torch.cat(first)), grads


def _first(tensors: Sequence[Tensor | None]) -> Tensor:
    return next(tensor for tensor in tensors if tensor is not None)


def _scaled(
    grads: Sequence[Tensor | None], tensors: Sequence[Tensor | None], factor: Tensor | float, *, kept: bool
) -> list[Tensor | None]:
    """Return accumulated gradients times a number, rounded once to their tensors' dtypes.

    `kept`: they will be read again, and are not written to.
    """
    rounded: list[Tensor | None] = []
    for grad, tensor in zip(grads, tensors, strict=True):
        if grad is None or tensor is None:
            rounded.append(None)
            continue
        scaled = grad
        if isinstance(factor, Tensor) or factor != 1.0:
            scaled = grad * factor if kept else grad.mul_(factor)
        elif kept and grad.dtype == tensor.dtype:
            scaled = grad.clone()
        rounded.append(scaled.to(tensor.dtype))
    return rounded


class _Swept(NamedTuple):
    outputs: list[tuple[Tensor, ...]]  # of each tile
    saved: list[Saved]  # what its gradient needs beside its logits
    gradients: list[Tensor | None]
    memory: list[Memory]  # of the logits of the tiles that were to be kept


def _sweep(
    call: HeadCall,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    upstream: Sequence[Tensor | float | None] | None = None,
    saved: Sequence[Saved] | None = None,
    kept: Kept | None = None,
    keep: int = 0,
) -> _Swept:
    """Pass over all tiles once; with upstream gradients also back.

    `saved` spares the rows' statistics, and `kept` the logits of the last tiles; `keep` is how many of these to keep.
    """
    windows = [source.window for source in call.sources if isinstance(source, HeadRows) and source.window is not None]
    if not windows:
        return _swept(call, tensors, needed, upstream, saved, kept, keep)
    with ExitStack() as memory:
        for window in windows:
            memory.enter_context(opened(window, tensors))
        return _swept(call, tensors, needed, upstream, saved, kept, keep)


def _swept(
    call: HeadCall,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    upstream: Sequence[Tensor | float | None] | None,
    saved: Sequence[Saved] | None,
    kept: Kept | None,
    keep: int,
) -> _Swept:
    makers: list[HeadTiles | DenseTiles] = []
    wanted = []
    for source, part, need in zip(call.sources, call.split(tensors), call.split(needed), strict=True):
        wanted.append(upstream is not None and any(need))
        flags = need if upstream is not None else [False] * len(need)
        if isinstance(source, HeadRows):
            narrows = call.work.narrows
            tiles_of = HeadTiles(
                call.backend, source, part, flags, call.tiles, call.dtype, call.class_major, narrows=narrows
            )
            makers.append(tiles_of)
        else:
            assert isinstance(source, DenseRows)
            makers.append(DenseTiles(call.backend, source, part, flags, call.tiles, call.dtype))
    outputs: list[tuple[Tensor, ...]] = []
    states: list[Saved] = []
    memory: list[Memory] = []
    whole = call.tiles.classes >= call.classes
    ranges = [
        (first, min(first + call.tiles.classes, call.classes))
        for first in range(0, max(call.classes, 1), max(call.tiles.classes, 1))
    ]
    turns = list(enumerate(call.ranges()))
    first_kept = len(turns) - (keep if kept is None else len(kept.memory))
    if saved is not None:
        turns.reverse()  # what was kept gives its memory to what is made again
    for turn, (start, stop) in turns:
        known = None if saved is None else saved[turn]
        if whole:
            made = saved is None or call.work.reads_logits
            if kept is not None and turn >= first_kept:
                places = zip(makers, kept.memory[turn - first_kept], strict=True)
                tiles = [maker.kept(place, start, stop, stays=kept.stays) for maker, place in places]
            else:
                tiles = [(maker.logits if made else maker.place)(start, stop, 0, call.classes) for maker in makers]
            if saved is None:
                values, known = call.work.forward(tiles, start, stop)
                outputs.append(values)
                if turn >= first_kept:
                    memory.append([maker.keep() for maker in makers])
            _back(call, makers, tiles, known, upstream, wanted, start, stop, 0, call.classes)
        else:
            (maker,), work = makers, call.work
            assert isinstance(work, CutWork)
            if saved is None:
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
    grads = [grad for maker in makers for grad in maker.finish()]
    return _Swept(outputs, states, grads, memory)


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
    call.work.gradient(tiles, Backward(saved, rows, wanted, start, stop, first))
    for maker, tile, want in zip(makers, tiles, wanted, strict=True):
        if want:
            maker.take(tile, start, stop, first, last)
