"""What is read of a head's logits without building them: some of them, or a few numbers of each row.

Every logit here is the losses' own: made by the same products of the same tiles (`tiles.HeadTiles`), so that what is
gathered, compared, taken as a maximum or written out agrees bit for bit with what a loss reads. Where the products are
torch's (`products`), whose digits depend on the shape of the call, all that is here makes tiles of one shape, so that
it agrees with itself. Values are rounded to the dtype that the logits have, `dtype`; rows are [rows, classes]. All is
differentiable with any upstream gradient and, but for what it returns, holds one tile at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from logitless._heads.products import shapes_do_not_matter
from logitless._heads.rows import HeadRows
from logitless._heads.sweep import HeadCall, head_call, needs_graph, per_row, row_gradients, row_values, tile_dtype
from logitless._heads.tiles import Backward, HeadTiles, Tile, Tiling, sum_dtype
from logitless._heads.window import opened
from logitless._heads.work import statistics_kept, top_classes
from logitless._rules.derivatives import needs_plain_backward, plain_backward
from logitless._rules.keeping import put_together, taken_apart
from logitless._rules.precision import HALF, no_autocast
from logitless._rules.targets import first_outside
from logitless._rules.transforms import hold_data, may_be_waited_for, transform_reason, values_are_readable
from logitless.kernels import definitions
from logitless.kernels.interface import Backend, RowStats

# Numbers that are rounded at a time, in place.
_ROUNDED = 1 << 18
# Of so many picks together one small head is made: rows times picks a row.
_BLOCK = 64
# Where this times a row's picks is more than its classes, whole tiles are made instead.
_WHOLE = 64
# So many picks a row are compared with each other to find those that name one class.
_PAIRED = 64


def materialize(backend: Backend, rows: HeadRows, dtype: torch.dtype) -> Tensor:
    """Return the logits [rows, classes], all of them."""
    if _is_plain(rows):
        return _defined(rows, dtype, rows.tensors)
    out = backend.empty(torch.Size((rows.rows, rows.classes)), dtype, _device(rows))
    call = _call(backend, rows, dtype, _WrittenWork(out), lambda z: (z,), (True,))
    if not needs_graph(rows.tensors):
        _write(call, out, rows.tensors)
        return out
    kept, others = taken_apart(replace(call, work=_WrittenWork(None)), call.tensors)
    logits: Tensor = _Materialized.apply(call, out, kept, others, *call.tensors)  # type: ignore[no-untyped-call] # torch types it not
    return logits


def gradients_of_all(
    backend: Backend, rows: HeadRows, dtype: torch.dtype, wanted: Sequence[bool], gradient: Tensor
) -> list[Tensor | None]:
    """Return the gradients of the parts that are wanted, of a gradient [rows, classes] of all logits."""
    call = _call(backend, rows, dtype, _WrittenWork(None), lambda z: (z,), (True,))
    return row_gradients(call, rows.tensors, wanted, [gradient], [None for _ in call.ranges()])


def argmax(backend: Backend, rows: HeadRows, dtype: torch.dtype) -> Tensor:
    """Return the first class [rows] that has the largest logit."""
    return _classes(backend, rows, dtype, lambda z: z.argmax(-1))


def largest(backend: Backend, rows: HeadRows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the largest logit [rows] and the first class that has it."""
    at = _classes(backend, rows, dtype, lambda z: z.max(-1).indices)
    return gather(backend, rows, dtype, at.unsqueeze(-1)).squeeze(-1), at


def smallest(backend: Backend, rows: HeadRows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the smallest logit [rows] and the first class that has it."""
    at = _classes(backend, rows, dtype, lambda z: z.min(-1).indices)
    return gather(backend, rows, dtype, at.unsqueeze(-1)).squeeze(-1), at


def topk(
    backend: Backend, rows: HeadRows, dtype: torch.dtype, k: int, largest: bool = True, sorted: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the k largest (or smallest) logits and their classes, both [rows, k]."""
    if not 0 <= k <= rows.classes:
        raise RuntimeError("selected index k out of range")  # torch's words
    at = _classes(backend, rows, dtype, lambda z: z.topk(k, -1, largest, sorted).indices)
    return gather(backend, rows, dtype, at), at


def top_log_probs(backend: Backend, rows: HeadRows, dtype: torch.dtype, k: int) -> tuple[Tensor, Tensor]:
    """Return `log_softmax(logits)` of the k likeliest classes, and which they are, both [rows, k]; no gradient."""
    with torch.no_grad():
        if _is_plain(rows):
            return likeliest(backend, _wide(rows, dtype, rows.tensors), dtype, k)
        work = _LikeliestWork(backend, dtype, k)
        call = _call(backend, rows, dtype, work, lambda z: likeliest(backend, z, dtype, k), (False, False))
        log_probs, classes = row_values(call, call.tensors)[0]
        return log_probs, classes


def likeliest(backend: Backend, logits: Tensor, dtype: torch.dtype, k: int) -> tuple[Tensor, Tensor]:
    """Return the same of logits [rows, classes] that are there."""
    log_probs, classes = top_classes(logits, k, backend.row_stats(logits), None)
    return log_probs.to(dtype), classes


def logsumexp(backend: Backend, rows: HeadRows, dtype: torch.dtype) -> Tensor:
    """Return the log-sum-exp [rows] of the logits before they are rounded to `dtype`."""
    if _is_plain(rows):
        return _wide(rows, dtype, rows.tensors).logsumexp(-1).to(dtype)
    work = _LogSumExpWork(backend, dtype)
    return per_row(_call(backend, rows, dtype, work, lambda z: (z.logsumexp(-1),), (True,)))[0]


def gather(backend: Backend, rows: HeadRows, dtype: torch.dtype, index: Tensor, *, dim: int = 1) -> Tensor:
    """Return the logits [rows, k] of the classes that `index` [rows, k] names.

    Raises RuntimeError, as torch, where a class does not exist and the index can be read; `dim` is what it calls the
    classes' dimension.
    """
    if _is_plain(rows):
        return _defined(rows, dtype, rows.tensors).gather(-1, index)
    _check_index(backend, index, rows.classes, dim)
    few = 0 < index.shape[1] * _WHOLE <= rows.classes
    if few and backend.READS_VALUES and values_are_readable(index) and shapes_do_not_matter(backend, rows.tensors):
        return _gathered_by_blocks(backend, rows, dtype, index)
    work = _GatherWork(dtype, index)
    return per_row(_call(backend, rows, dtype, work, lambda z: (z.gather(-1, index),), (True,)))[0]


def gather_log_probs(backend: Backend, rows: HeadRows, dtype: torch.dtype, index: Tensor, *, dim: int = 1) -> Tensor:
    """Return `log_softmax(logits)` [rows, k] at the classes that `index` names: never above 0."""
    if _is_plain(rows):
        return -definitions.negative_log_softmax(_wide(rows, dtype, rows.tensors), -1).gather(-1, index).to(dtype)
    _check_index(backend, index, rows.classes, dim)

    def definition(z: Tensor) -> tuple[Tensor]:
        return (-definitions.negative_log_softmax(z, -1).gather(-1, index),)

    return per_row(_call(backend, rows, dtype, _LogProbWork(backend, dtype, index), definition, (True,)))[0]


def sum_log_probs(backend: Backend, rows: HeadRows, dtype: torch.dtype) -> Tensor:
    """Return the sum over the classes of `log_softmax(logits)` [rows]."""

    def definition(z: Tensor) -> tuple[Tensor]:
        return (-definitions.negative_log_softmax(z, -1).sum(-1),)

    if _is_plain(rows):
        return definition(_wide(rows, dtype, rows.tensors))[0].to(dtype)
    return per_row(_call(backend, rows, dtype, _LogProbSumWork(backend, dtype, rows.classes), definition, (True,)))[0]


def of_classes(rows: HeadRows, classes: int | slice | Tensor) -> HeadRows:
    """Return the rows of some classes only, a head of those weight rows: `logits[:, classes]`, still two-dimensional.

    One class stays as a dimension of size 1. A class that does not exist raises IndexError, as torch.
    """
    hidden, weight, bias, scale = rows.tensors
    assert weight is not None
    if isinstance(classes, int):
        if not -rows.classes <= classes < rows.classes:
            raise IndexError(f"index {classes} is out of bounds for dimension 1 with size {rows.classes}")
        first = classes % rows.classes
        classes = slice(first, first + 1)
    picked = weight[classes]
    if picked.dim() != 2:
        raise IndexError(f"classes are named by one dimension of numbers, got {tuple(picked.shape[:-1])}")
    tensors = (hidden, picked, None if bias is None else bias[classes], scale)
    return replace(rows, classes=picked.shape[0], tensors=tensors)


# How a call is planned


def _is_plain(rows: HeadRows) -> bool:
    """Say whether only plain operations on all rows serve: in a graph or a transform, without data, without classes."""
    return rows.classes == 0 or transform_reason(*rows.tensors) is not None or not hold_data(*rows.tensors)


def _device(rows: HeadRows) -> torch.device:
    hidden = rows.tensors[0]
    assert hidden is not None
    return hidden.device


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else dtype


def _wide(rows: HeadRows, dtype: torch.dtype, tensors: Sequence[Tensor | None]) -> Tensor:
    """Return all logits by plain operations, before they are rounded."""
    return rows.activate(rows.raw(tensors, 0, rows.rows), tensors).to(_compute(dtype))


def _defined(rows: HeadRows, dtype: torch.dtype, tensors: Sequence[Tensor | None]) -> Tensor:
    return rows.activate(rows.raw(tensors, 0, rows.rows), tensors).to(dtype)


def _call(
    backend: Backend,
    rows: HeadRows,
    dtype: torch.dtype,
    work: Any,
    definition: Callable[[Tensor], tuple[Tensor, ...]],
    outputs: Sequence[bool],
) -> HeadCall:
    """Plan a pass over the rows. Its tiles do not depend on whether gradients are made, nor on the work."""
    return head_call(
        backend,
        [rows],
        work,
        lambda *tensors: tuple(value.to(dtype) for value in definition(_wide(rows, dtype, tensors))),
        outputs=outputs,
        least_dtype=_compute(dtype),
        max_bytes=None,
        gradient=True,
        late=True,
    )


def _check_index(backend: Backend, index: Tensor, classes: int, dim: int) -> None:
    """Raise where an index names no class and it can be read."""
    if not ((backend.READS_VALUES and values_are_readable(index)) or may_be_waited_for(index)):
        return
    first = first_outside(index, classes)
    if first is not None:
        raise RuntimeError(f"index {first} is out of bounds for dimension {dim} with size {classes}")  # torch's words


def _round(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tile rounded in place to a half precision, a few numbers at a time; in its own dtype still."""
    if dtype in HALF and logits.dtype != dtype:
        for part in logits.view(-1).split(_ROUNDED):
            part.copy_(part.to(dtype))
    return logits


# Classes of each row


def _classes(backend: Backend, rows: HeadRows, dtype: torch.dtype, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the classes [rows, ...] that `pick` names in rows of logits."""
    if _is_plain(rows):
        return pick(_defined(rows, dtype, rows.tensors))
    with torch.no_grad():
        call = _call(backend, rows, dtype, _ClassWork(dtype, pick), lambda z: (pick(z),), (False,))
        return row_values(call, call.tensors)[0][0]


class _Work:
    """What the works here have in common; see `sweep.RowWork`."""

    class_major: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = True
    narrows: ClassVar[bool] = False
    extra_bytes: ClassVar[int] = 0

    def gradient(self, tiles: Sequence[Tile], back: Backward) -> None:
        """Write the gradient in place of the logits."""
        raise NotImplementedError("classes have no gradient")


@dataclass(frozen=True, slots=True)
class _ClassWork(_Work):
    dtype: torch.dtype
    pick: Callable[[Tensor], Tensor]

    def forward(self, tiles: Sequence[Tile], start: int, stop: int) -> tuple[tuple[Tensor, ...], None]:
        return (self.pick(_round(tiles[0].logits, self.dtype)),), None


@dataclass(frozen=True, slots=True)
class _LikeliestWork(_Work):
    backend: Backend
    dtype: torch.dtype
    k: int

    def forward(self, tiles: Sequence[Tile], start: int, stop: int) -> tuple[tuple[Tensor, ...], None]:
        return likeliest(self.backend, tiles[0].logits, self.dtype, self.k), None


@dataclass(frozen=True, slots=True)
class _LogSumExpWork(_Work):
    backend: Backend
    dtype: torch.dtype
    class_major: ClassVar[bool] = True
    narrows: ClassVar[bool] = True

    def forward(self, tiles: Sequence[Tile], start: int, stop: int) -> tuple[tuple[Tensor, ...], RowStats]:
        (tile,) = tiles
        stats = self.backend.row_stats(tile.logits, class_dim=tile.class_dim, lse=True)
        assert stats.lse is not None
        # An infinite logit, or none above -inf: torch's logsumexp is that number.
        lse = torch.where(torch.isinf(stats.row_max), stats.row_max, stats.lse)
        return (lse.to(self.dtype),), statistics_kept(stats)

    def gradient(self, tiles: Sequence[Tile], back: Backward) -> None:
        saved: RowStats = back.saved
        (tile,), (given,) = tiles, back.upstream
        assert isinstance(given, Tensor)
        self.backend.row_grad(
            tile.logits,
            saved.row_max,
            saved.log_sum,
            class_dim=tile.class_dim,
            a_scale=1.0,
            a=given.to(saved.row_max.dtype),
            out=tile.gradient,
        )


@dataclass(frozen=True, slots=True)
class _LogProbSumWork(_Work):
    backend: Backend
    dtype: torch.dtype
    classes: int
    class_major: ClassVar[bool] = True
    narrows: ClassVar[bool] = True

    def forward(self, tiles: Sequence[Tile], start: int, stop: int) -> tuple[tuple[Tensor, ...], RowStats]:
        (tile,) = tiles
        stats = self.backend.row_stats(tile.logits, class_dim=tile.class_dim, smooth=True)
        assert stats.smooth_sum is not None
        return (-stats.smooth_sum.to(self.dtype),), statistics_kept(stats)

    def gradient(self, tiles: Sequence[Tile], back: Backward) -> None:
        saved: RowStats = back.saved
        (tile,), (given,) = tiles, back.upstream
        assert isinstance(given, Tensor)
        given = given.to(saved.row_max.dtype)
        self.backend.row_grad(
            tile.logits,
            saved.row_max,
            saved.log_sum,
            class_dim=tile.class_dim,
            a_scale=-float(self.classes),
            a=given,
            f_scale=1.0,
            f=given,
            out=tile.gradient,
        )


@dataclass(frozen=True, slots=True)
class _GatherWork(_Work):
    dtype: torch.dtype
    index: Tensor
    reads_logits: ClassVar[bool] = False

    def forward(self, tiles: Sequence[Tile], start: int, stop: int) -> tuple[tuple[Tensor, ...], None]:
        return (tiles[0].logits.gather(1, self.index[start:stop]).to(self.dtype),), None

    def gradient(self, tiles: Sequence[Tile], back: Backward) -> None:
        (tile,), (given,) = tiles, back.upstream
        assert isinstance(given, Tensor)
        tile.gradient.zero_().scatter_add_(1, self.index[back.start : back.stop], given.to(tile.gradient.dtype))


@dataclass(frozen=True, slots=True)
class _LogProbWork(_Work):
    backend: Backend
    dtype: torch.dtype
    index: Tensor

    def forward(self, tiles: Sequence[Tile], start: int, stop: int) -> tuple[tuple[Tensor, ...], RowStats]:
        (tile,) = tiles
        index = self.index[start:stop]
        stats = self.backend.row_stats(tile.logits, class_dim=tile.class_dim)
        picked = tile.logits.gather(1, index).double()
        above = stats.row_max.double().unsqueeze(1) - picked  # never below 0, and exact where it is small
        log_probs = -(above + stats.log_sum.unsqueeze(1))
        kept = statistics_kept(stats, dense_sum=log_probs)
        return (log_probs.to(stats.row_max.dtype).to(self.dtype),), kept

    def gradient(self, tiles: Sequence[Tile], back: Backward) -> None:
        """Write `-p_j sum(g)` everywhere, and where a class is picked what its own g leaves of that."""
        saved: RowStats = back.saved
        (tile,), (given,) = tiles, back.upstream
        assert isinstance(given, Tensor)
        assert saved.dense_sum is not None
        index, given = self.index[back.start : back.stop], given.double()
        total = given.sum(1, keepdim=True)
        self.backend.row_grad(
            tile.logits,
            saved.row_max,
            saved.log_sum,
            class_dim=tile.class_dim,
            a_scale=-1.0,
            a=total.squeeze(1).to(saved.row_max.dtype),
            out=tile.gradient,
        )
        if index.shape[1] > _PAIRED:
            tile.gradient.scatter_add_(1, index, given.to(tile.gradient.dtype))
            return
        # g - p sum(g), with 1 - p formed before anything is rounded.
        own = (given.unsqueeze(1) * (index.unsqueeze(2) == index.unsqueeze(1))).sum(2)
        left = (own - total) - total * torch.expm1(saved.dense_sum)
        tile.gradient.scatter_(1, index, left.to(tile.gradient.dtype))


# Few logits of each row: of each block of rows a small head


class _Blocks(NamedTuple):
    """What a gather of few classes a row is told."""

    backend: Backend
    rows: HeadRows
    dtype: torch.dtype
    tile: torch.dtype  # what the logits are made in
    picks: Tensor  # classes [rows, picks]

    def each(self, tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> Iterator[_Block]:
        hidden, weight, bias, scale = tensors
        assert hidden is not None
        assert weight is not None
        at_once = max(1, _BLOCK // self.picks.shape[1])
        for start in range(0, self.rows.rows, at_once):
            stop = min(start + at_once, self.rows.rows)
            classes, place = torch.unique(self.picks[start:stop], return_inverse=True)
            parts = (hidden[start:stop], weight[classes], None if bias is None else bias[classes], scale)
            shape = Tiling(stop - start, classes.shape[0], 0)
            source = HeadRows(shape.rows, shape.classes, parts, self.rows.scale, self.rows.softcap)
            maker = HeadTiles(self.backend, source, parts, needed, shape, self.tile, class_major=False)
            yield _Block(start, stop, classes, place, maker)


class _Block(NamedTuple):
    start: int
    stop: int
    classes: Tensor
    place: Tensor
    maker: HeadTiles

    def tile(self, *, logits: bool) -> Tile:
        make = self.maker.logits if logits else self.maker.place
        return make(0, self.stop - self.start, 0, self.classes.shape[0])


def _gathered_by_blocks(backend: Backend, rows: HeadRows, dtype: torch.dtype, index: Tensor) -> Tensor:
    blocks = _Blocks(backend, rows, dtype, tile_dtype([rows], _compute(dtype)), index)
    if not needs_graph(rows.tensors):
        return _picked(blocks, rows.tensors)
    kept, others = taken_apart(blocks, rows.tensors)
    picked: Tensor = _Gathered.apply(blocks, kept, others, *rows.tensors)  # type: ignore[no-untyped-call] # torch types it not
    return picked


def _picked(blocks: _Blocks, tensors: Sequence[Tensor | None]) -> Tensor:
    picked = torch.empty(blocks.picks.shape, dtype=blocks.dtype, device=blocks.picks.device)
    with opened(blocks.rows.window, tensors), no_autocast(picked):
        for block in blocks.each(tensors, [False] * len(tensors)):
            logits = block.tile(logits=True).logits
            picked[block.start : block.stop] = logits.gather(1, block.place)
    return picked


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: _Blocks, kept: Any, others: Sequence[Tensor], *tensors: Tensor | None) -> Tensor:
        ctx.kept = kept
        ctx.save_for_backward(*tensors, *others)
        return _picked(blocks, tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        everything, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        tensors, blocks = everything[: len(needed)], put_together(ctx.kept, everything)
        with opened(blocks.rows.window, tensors), no_autocast(grad_output):
            if needs_plain_backward(grad_output):
                return (None, None, None, *_plain_gather_backward(blocks, tensors, needed, grad_output))
            return (None, None, None, *_gather_backward(blocks, tensors, needed, grad_output))


def _gather_backward(
    blocks: _Blocks, tensors: Sequence[Tensor | None], needed: Sequence[bool], grad_output: Tensor
) -> list[Tensor | None]:
    sums: list[Tensor | None] = []
    for at, (tensor, need) in enumerate(zip(tensors, needed, strict=True)):
        if tensor is None or not need:
            sums.append(None)
        else:
            sums.append(torch.zeros_like(tensor, dtype=sum_dtype(tensor.dtype) if at < 2 else torch.float64))
    to_hidden, to_weight, to_bias, to_scale = sums
    for block in blocks.each(tensors, needed):
        tile = block.tile(logits=blocks.rows.softcap is not None)
        given = grad_output[block.start : block.stop].to(tile.gradient.dtype)
        tile.gradient.zero_().scatter_add_(1, block.place, given)
        block.maker.take(tile, 0, block.stop - block.start, 0, block.classes.shape[0])
        hidden, weight, bias, scale = block.maker.finish()
        if to_hidden is not None and hidden is not None:
            to_hidden[block.start : block.stop] = hidden
        if to_weight is not None and weight is not None:
            to_weight.index_add_(0, block.classes, weight)
        if to_bias is not None and bias is not None:
            to_bias.index_add_(0, block.classes, bias)
        if to_scale is not None and scale is not None:
            to_scale += scale
    return [
        None if total is None or tensor is None else total.to(tensor.dtype)
        for total, tensor in zip(sums, tensors, strict=True)
    ]


def _plain_gather_backward(
    blocks: _Blocks, tensors: Sequence[Tensor | None], needed: Sequence[bool], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """Return gradients that can be differentiated again."""

    def definition(*given: Tensor | None) -> tuple[Tensor]:
        hidden, weight, bias, _ = given
        assert hidden is not None
        assert weight is not None
        wide = _compute(hidden.dtype)
        raw = (hidden.unsqueeze(1).to(wide) * weight[blocks.picks].to(wide)).sum(-1)
        if bias is not None:
            raw = raw + bias[blocks.picks].to(wide)
        return (blocks.rows.activate(raw, given).to(blocks.dtype),)

    return plain_backward(definition, tensors, needed, [grad_output])


# All logits


@dataclass(frozen=True, slots=True)
class _WrittenWork(_Work):
    out: Tensor | None  # where the logits go; None: there is a gradient to make alone
    reads_logits: ClassVar[bool] = False

    def forward(self, tiles: Sequence[Tile], start: int, stop: int) -> tuple[tuple[Tensor, ...], None]:
        assert self.out is not None
        self.out[start:stop] = tiles[0].logits
        return (), None

    def gradient(self, tiles: Sequence[Tile], back: Backward) -> None:
        (tile,), (given,) = tiles, back.upstream
        assert isinstance(given, Tensor)
        tile.gradient.copy_(given)


def _write(call: HeadCall, out: Tensor, tensors: Sequence[Tensor | None]) -> None:
    """Write all logits to `out`: at once where they are of its dtype and the call's shape changes none of them."""
    (rows,) = call.sources
    assert isinstance(rows, HeadRows)
    in_place = call.dtype == out.dtype and HeadTiles.is_one_buffer(rows, call.dtype)
    if not in_place or not shapes_do_not_matter(call.backend, tensors):
        row_values(call, tensors)
        return
    shape = Tiling(rows.rows, rows.classes, 0)
    with opened(rows.window, tensors), no_autocast(out):
        maker = HeadTiles(
            call.backend,
            rows,
            tensors,
            [False] * len(tensors),
            shape,
            call.dtype,
            class_major=False,
            memory=out.view(-1),
        )
        maker.logits(0, rows.rows, 0, rows.classes)


class _Materialized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: HeadCall, out: Tensor, kept: Any, others: Sequence[Tensor], *tensors: Tensor | None
    ) -> Tensor:
        _write(call, out, tensors)
        ctx.kept = kept
        ctx.save_for_backward(*tensors, *others)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        everything, needed = ctx.saved_tensors, ctx.needs_input_grad[4:]
        tensors, call = everything[: len(needed)], put_together(ctx.kept, everything)
        with no_autocast(grad_output):
            if needs_plain_backward(grad_output):
                return (None, None, None, None, *plain_backward(call.definition, tensors, needed, [grad_output]))
        nothing = [None for _ in call.ranges()]
        return (None, None, None, None, *row_gradients(call, tensors, needed, [grad_output], nothing))
