"""Where tiles of logits come from and where their gradients go: a linear head's two products, made by hand.

A tile of a head lies in a buffer that every tile reuses, its gradient in the same place. Where nothing else asks for
another order the tile is class-major, [classes, rows]: the product that makes it then reads the weight in the order in
which it lies, which is the faster one where a tile has far fewer rows than classes.

Precision policy: what a tile's gradient gives to hidden, weight and bias adds up in float32 or wider, and stays so
until its upstream gradient is known. A tile of a half precision is in float32 from the first, and its gradient is a
factor in float32, but that of bfloat16 is rounded to it where the backend multiplies it, in the logits' own bytes where
the backend writes it there. Beside logits that were given in bfloat16 a tile of a head is rounded to that too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitless._heads.multiplier import multiplier
from logitless._heads.products import multiply, needs_spare, widened_bytes
from logitless._heads.rows import DenseRows, HeadRows
from logitless._rules.precision import HALF
from logitless.kernels.interface import Backend, TileRules

# Of the bytes a caller allows; the rest is for what the products need and for a few numbers a row.
_BUFFER_SHARE = 15 / 16
# Of the rows that fit, so many at least are to be kept where not all can be, by tiles of a part of them.
_KEPT_SHARE, _PIECES = 3 / 4, 4
_SPARE_ROWS = 8192  # of a half-precision gradient, widened while it is in the cache
_SCALE_ROWS = 256  # whose float64 copies stay small


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a call's logits are cut: so many rows by so many classes at a time, in so many bytes of buffers.

    In a class-major tile each class has room for `line` rows at least: how a row is read, and so its last digits, must
    not depend on how many there are. Where each row's gradient is made late, the logits of the `kept` last tiles may
    wait for it: one in the buffers, and the others beside them, in as many bytes each as `kept_bytes` has for all.
    """

    rows: int
    classes: int
    buffer_bytes: int
    line: int = 1
    kept: int = 0
    kept_bytes: int = 0


def tiling(
    rules: TileRules,
    rows: int,
    classes: int,
    row_bytes: int,
    *,
    max_bytes: int | None,
    gradient: bool,
    cut_classes: bool,
    class_major: bool,
    kept_row_bytes: int = 0,
) -> Tiling:
    """Return the tiles of a call; `row_bytes` is what one row of all classes takes in every buffer.

    `kept_row_bytes` is what its logits take where they may wait for a gradient that is made late; 0: they may not.
    """
    budget = _budget(rules, row_bytes, max_bytes, gradient)
    fit = room = rows_that_fit(rules, row_bytes, max_bytes=max_bytes, gradient=gradient)
    if fit >= min(rows, rules.least_rows) or not cut_classes:
        line = rules.line if class_major and room >= rules.line else 1

        def whole_rows(most: int) -> Tiling:
            even = _even_rows(rows, most, rules.round_rows)
            held = max(even, line)
            room_for_kept = budget - held * (row_bytes - kept_row_bytes)  # the rest of a tile's buffers is there once
            kept = min(-(-rows // even), room_for_kept // (held * kept_row_bytes)) if kept_row_bytes else 0
            return Tiling(even, classes, held * row_bytes, line, max(0, kept), max(0, kept) * held * kept_row_bytes)

        tiles = whole_rows(fit)
        # As many rows again do not fit beside a large tile: smaller ones leave less of the bytes unused.
        for pieces in range(2, min(_PIECES, fit // rules.least_rows) + 1):
            if not tiles.kept or tiles.kept * tiles.rows >= min(rows, _KEPT_SHARE * fit):
                break
            tiles = whole_rows(fit // pieces)
        return tiles
    number_bytes = max(1, row_bytes // classes)
    tile_rows = max(1, min(rows, rules.cut_rows, budget // (rules.least_classes * number_bytes)))
    tile_classes = max(1, min(classes, budget // (tile_rows * number_bytes)))
    return Tiling(tile_rows, tile_classes, tile_rows * tile_classes * number_bytes)


def _even_rows(rows: int, fit: int, unit: int) -> int:
    """Return the rows of tiles that are all alike, of so many rows that fit."""
    fit = max(1, min(fit, rows))
    if rows > fit > unit:
        fit = fit // unit * unit
    even = -(-rows // -(-rows // fit)) if rows else 1
    return min(fit, -(-even // unit) * unit) if even > unit else even


def rows_that_fit(rules: TileRules, row_bytes: int, *, max_bytes: int | None, gradient: bool) -> int:
    """Return how many rows of all classes the buffers of a call may hold; so many or fewer are one tile."""
    return _budget(rules, row_bytes, max_bytes, gradient) // max(1, row_bytes)


def _budget(rules: TileRules, row_bytes: int, max_bytes: int | None, gradient: bool) -> int:
    if max_bytes is None:
        share = rules.gradient_share if gradient else rules.value_share
        return max(int(rules.default_bytes * share), rules.default_rows * row_bytes)
    return int(max_bytes * _BUFFER_SHARE)


class Tile(NamedTuple):
    """A tile's logits, their classes in dimension `class_dim`, and where their gradient is to be written."""

    logits: Tensor
    class_dim: int
    gradient: Tensor


class Backward(NamedTuple):
    """What the gradient of a stretch of rows is made of, beside its tiles, whose classes begin at `first`."""

    saved: Any  # what the forward pass kept of it
    upstream: Sequence[Tensor | float | None]  # of each output
    wanted: Sequence[bool]  # of each tile
    start: int
    stop: int
    first: int


def _product_dtype(factors: torch.dtype, tile: torch.dtype) -> torch.dtype:
    """Return the dtype in which a tile's product is written: float32 of half precisions, where that is of use."""
    return torch.float32 if tile in (torch.float32, torch.float64) and factors in HALF else factors


def _spare_rows(shape: Tiling, dtype: torch.dtype) -> int:
    return min(_SPARE_ROWS, max(shape.rows, shape.classes)) if dtype in HALF else shape.rows


class HeadTiles:
    """Tiles of a head's logits, and the gradients of its parts; see `rows.HeadRows`."""

    def __init__(
        self,
        backend: Backend,
        rows: HeadRows,
        tensors: Sequence[Tensor | None],
        needed: Sequence[bool],
        shape: Tiling,
        dtype: torch.dtype,
        class_major: bool,
        memory: Tensor | None = None,
        narrows: bool = False,
    ) -> None:
        hidden, weight, self._bias, scale = tensors
        assert hidden is not None
        assert weight is not None
        self._hidden, self._weight = hidden, weight
        backend = multiplier(backend, hidden.dtype, hidden.shape[1])
        self._backend = backend
        self._scale = rows.scale if scale is None else backend.scalar(scale)
        self._softcap, self._class_major, self._dtype = rows.softcap, class_major, dtype
        self._line = shape.line if class_major else 1
        numbers = max(shape.rows, self._line) * shape.classes
        raw = _product_dtype(hidden.dtype, dtype)
        self._numbers, self._product_dtype = numbers, raw
        self._raw = memory
        self._wide = None if dtype == raw else buffer(backend, numbers, dtype, hidden.device)
        self._slope = None
        if rows.softcap is not None and any(needed):
            self._slope = buffer(backend, numbers, dtype, hidden.device)
        # A gradient in the factors' dtype, in the first bytes of each row of logits, needs no copy to be multiplied.
        # That of one class is not made by a kernel.
        fits = raw == torch.float32 and hidden.dtype == torch.bfloat16 and not class_major and shape.classes > 1
        self._narrow = hidden.dtype if narrows and backend.NARROWS and fits and self._wide is None else None
        self.gradients = _Gradients(backend, tensors, needed, shape)

    @staticmethod
    def is_one_buffer(rows: HeadRows, dtype: torch.dtype) -> bool:
        """Say whether a tile is made where its product is written; `memory` may then be that place."""
        hidden = rows.tensors[0]
        assert hidden is not None
        return _product_dtype(hidden.dtype, dtype) == dtype

    @staticmethod
    def kept_row_bytes(rows: HeadRows, dtype: torch.dtype) -> int:
        """Return what one row of logits takes that wait for the backward pass; 0: they are made again."""
        return rows.classes * dtype.itemsize if HeadTiles.is_one_buffer(rows, dtype) else 0

    @staticmethod
    def row_bytes(rows: HeadRows, dtype: torch.dtype, gradient: bool) -> int:
        """Return what one row of logits takes in the buffers."""
        hidden = rows.tensors[0]
        assert hidden is not None
        raw = _product_dtype(hidden.dtype, dtype)
        bytes_each = raw.itemsize
        if dtype != raw:
            bytes_each += dtype.itemsize
        if rows.softcap is not None and gradient:
            bytes_each += dtype.itemsize
        return rows.classes * bytes_each

    @staticmethod
    def accumulator_bytes(backend: Backend, rows: HeadRows, shape: Tiling) -> int:
        """Return what the gradients take that is not theirs to keep: the products of a tile, and wider sums."""
        hidden, weight, _, scale = rows.tensors
        assert hidden is not None
        assert weight is not None
        backend = multiplier(backend, hidden.dtype, hidden.shape[1])
        bytes_held = 0
        if hidden.requires_grad and hidden.dtype in HALF:
            bytes_held += hidden.numel() * 4
        elif scale is not None and scale.requires_grad and not hidden.requires_grad:
            bytes_held += hidden.numel() * sum_dtype(hidden.dtype).itemsize
        if weight.requires_grad and weight.dtype in HALF:
            bytes_held += weight.numel() * 4
        bytes_held += widened_bytes(backend, hidden.dtype)
        if needs_spare(backend, hidden.dtype):
            bytes_held += _spare_rows(shape, hidden.dtype) * hidden.shape[1] * hidden.itemsize
        return bytes_held

    def logits(self, start: int, stop: int, first: int, last: int) -> Tile:
        """Return the logits of some rows and classes."""
        hidden, weight = stretch(self._hidden, start, stop), stretch(self._weight, first, last)
        bias = None if self._bias is None else stretch(self._bias, first, last)
        scaled = not _is_one(self._scale)
        folded = self._dtype == hidden.dtype and scaled
        if folded:
            hidden = hidden * self._scale
            bias = None if bias is None else bias * self._scale
        raw = self._view(self._working(), stop - start, last - first)
        first_factor, second_factor = (weight, hidden.T) if self._class_major else (hidden, weight.T)
        if bias is None:
            multiply(self._backend, first_factor, second_factor, raw)
        else:
            spread = (bias.unsqueeze(1) if self._class_major else bias).expand(raw.shape)
            if raw.dtype in HALF:  # before the product is rounded
                torch.addmm(spread, first_factor, second_factor, out=raw)
            else:
                multiply(self._backend, first_factor, second_factor, raw.copy_(spread), accumulate=True)
        logits = raw
        if self._wide is not None:
            logits = self._view(self._wide, stop - start, last - first).copy_(raw)
        if scaled and not folded:
            logits *= self._scale
        if self._softcap is not None:
            logits.div_(self._softcap).tanh_().mul_(self._softcap)
        return self._tile(logits, stop - start, last - first)

    def keep(self) -> Tensor:
        """Return the memory of the tile that was made last, for its logits to stay in; the next is made in another."""
        memory, self._raw = self._working(), None
        return memory

    def kept(self, memory: Tensor | None, start: int, stop: int, *, stays: bool) -> Tile:
        """Return a tile of all classes whose logits were kept, in their memory, which then serves the next tiles.

        With `stays` they are read again: the tile is a copy.
        """
        assert memory is not None
        rows, classes = stop - start, self._weight.shape[0]
        if stays:
            self._view(self._working(), rows, classes).copy_(self._view(memory, rows, classes))
        else:
            self._raw = memory
        return self._tile(self._view(self._working(), rows, classes), rows, classes)

    def place(self, start: int, stop: int, first: int, last: int) -> Tile:
        """Return where a tile lies, for a gradient that is made without it; a softcap's own slope is of the logits."""
        if self._softcap is not None:
            return self.logits(start, stop, first, last)
        logits = self._view(self._working() if self._wide is None else self._wide, stop - start, last - first)
        return Tile(logits, 0 if self._class_major else 1, logits)

    def take(self, tile: Tile, start: int, stop: int, first: int, last: int) -> None:
        """Take a tile's gradient back through the head."""
        gradient = tile.gradient
        if self._softcap is not None:
            slope = tile.logits.div_(self._softcap)
            gradient *= slope.mul_(slope).neg_().add_(1)
            if self._narrow is not None:
                gradient = self._narrowed(tile.logits).copy_(gradient)
        if self._wide is not None:
            gradient = self._view(self._working(), stop - start, last - first).copy_(gradient)
        by_class = gradient if self._class_major else gradient.T
        self.gradients.add(by_class, self._hidden, self._weight, self._bias, start, stop, first, last)

    def finish(self) -> list[Tensor | None]:
        """Return the gradients of hidden, weight, bias and scale, in the dtypes they were accumulated in."""
        return self.gradients.finish(self._scale)

    def _working(self) -> Tensor:
        """Return the buffer that the tiles share."""
        if self._raw is None:
            self._raw = buffer(self._backend, self._numbers, self._product_dtype, self._hidden.device)
        return self._raw

    def _tile(self, logits: Tensor, rows: int, classes: int) -> Tile:
        """Return the logits with the place of their gradient."""
        if self._slope is not None:
            gradient = self._view(self._slope, rows, classes)
        else:
            gradient = logits if self._narrow is None else self._narrowed(logits)
        return Tile(logits, 0 if self._class_major else 1, gradient)

    def _narrowed(self, logits: Tensor) -> Tensor:
        """Return the first bytes of each row as numbers of the factors' dtype."""
        assert self._narrow is not None
        return logits.view(self._narrow)[:, : logits.shape[1]]

    def _view(self, memory: Tensor, rows: int, classes: int) -> Tensor:
        """Return a tile's place in a buffer, in its order."""
        if not self._class_major:
            return view(memory, (rows, classes))
        if rows >= self._line:
            return view(memory, (classes, rows))
        return view(memory, (classes, self._line))[:, :rows]


class _Gradients:
    """What the tiles' gradients add up to; None: not needed."""

    def __init__(
        self,
        backend: Backend,
        tensors: Sequence[Tensor | None],
        needed: Sequence[bool],
        shape: Tiling,
    ) -> None:
        hidden, weight, bias, _ = tensors
        self._backend = backend
        self._needed = tuple(needed)
        assert hidden is not None
        assert weight is not None
        # One place for all tiles: blocks of every tile's own size, freed and asked for again, would leave gaps that the
        # allocator does not fill.
        spare = _spare_rows(shape, hidden.dtype) * hidden.shape[1]
        self._spare = None
        if needs_spare(backend, hidden.dtype) and any(needed):
            self._spare = buffer(backend, spare, hidden.dtype, hidden.device)
        # What the tiles add up to before the scale, from which the scale's own gradient follows.
        sums = needed[0] or needed[3]
        self._hidden = torch.zeros_like(hidden, dtype=sum_dtype(hidden.dtype)) if sums else None
        self._given = hidden
        dtype = sum_dtype(weight.dtype)  # until its upstream gradient is known, of one tile too
        self._weight = backend.empty(weight.shape, dtype, weight.device) if needed[1] else None
        self._written = 0  # classes of the weight's gradient that hold something
        self._bias = None
        if bias is not None and needed[2]:
            self._bias = torch.zeros(bias.shape, dtype=torch.float64, device=bias.device)
        self._bias_inner: Tensor | None = None  # of the scale's gradient, what the bias gives

    def add(
        self,
        gradient: Tensor,  # [classes, rows]
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        start: int,
        stop: int,
        first: int,
        last: int,
    ) -> None:
        part = stretch(hidden, start, stop)
        if self._hidden is not None:
            to_hidden, classes = stretch(self._hidden, start, stop).T, stretch(weight, first, last)
            multiply(self._backend, classes.T, gradient, to_hidden, accumulate=True, spare=self._spare)
        if self._weight is not None:
            self._add_weight(gradient, part, first, last)
        if (self._bias is not None or self._needed[3]) and bias is not None:
            sums = gradient.sum(1, dtype=sum_dtype(gradient.dtype)).double()
            if self._bias is not None:
                self._bias[first:last] += sums
            if self._needed[3]:
                inner = (bias[first:last].double() * sums).sum()
                self._bias_inner = inner if self._bias_inner is None else self._bias_inner + inner

    def _add_weight(self, gradient: Tensor, part: Tensor, first: int, last: int) -> None:
        total = self._weight
        assert total is not None
        fresh = last > self._written
        self._written = max(self._written, last)
        spare = None if total.dtype == gradient.dtype else self._spare
        multiply(self._backend, gradient, part, stretch(total, first, last), accumulate=not fresh, spare=spare)

    def finish(self, scale: Tensor | float) -> list[Tensor | None]:
        hidden, weight = self._hidden, self._weight
        scalar = None
        if self._needed[3] and hidden is not None:
            # Few rows at a time: in float64 all of them would take more than the tiles.
            pairs = zip(self._given.split(_SCALE_ROWS), hidden.split(_SCALE_ROWS), strict=True)
            inner = functools.reduce(
                torch.add, ((given.double() * to_given.double()).sum() for given, to_given in pairs)
            )
            scalar = inner if self._bias_inner is None else self._bias_inner + inner
        if weight is not None and self._written < weight.shape[0]:
            weight[self._written :] = 0
        for grad in (hidden, weight):
            if grad is not None and not _is_one(scale):
                grad *= scale
        bias = None if self._bias is None else self._bias * scale
        return [hidden if self._needed[0] else None, weight, bias, scalar]


class DenseTiles:
    """Tiles of logits that the user gave, row-major; their gradient is written where it stays.

    Scaled ones are a copy, and their gradient is made in its place.
    """

    def __init__(
        self,
        backend: Backend,
        rows: DenseRows,
        tensors: Sequence[Tensor | None],
        needed: Sequence[bool],
        shape: Tiling,
        dtype: torch.dtype,
    ) -> None:
        (logits,) = tensors
        assert logits is not None
        self._logits, self._dtype, self._scale = logits, dtype, rows.scale
        self._copy = None
        if rows.scale != 1.0:
            self._copy = buffer(backend, shape.rows * rows.classes, dtype, logits.device)
        self._gradient = backend.empty(logits.shape, logits.dtype, logits.device) if needed[0] else None

    @staticmethod
    def row_bytes(rows: DenseRows, dtype: torch.dtype) -> int:
        """Return what the copy of one row takes."""
        return rows.classes * dtype.itemsize if rows.scale != 1.0 else 0

    def place(self, start: int, stop: int, first: int, last: int) -> Tile:
        """Return the rows: they are there."""
        return self.logits(start, stop, first, last)

    def keep(self) -> None:
        """Keep nothing: the rows stay where they are."""

    def kept(self, memory: Tensor | None, start: int, stop: int, *, stays: bool) -> Tile:
        """Return the rows."""
        return self.logits(start, stop, 0, 0)

    def logits(self, start: int, stop: int, first: int, last: int) -> Tile:
        """Return the rows; all their classes, always."""
        logits = self._logits[start:stop]
        if self._copy is not None:
            scaled = view(self._copy, tuple(logits.shape)).copy_(logits)
            scaled *= self._scale
            return Tile(scaled, 1, scaled)
        if self._gradient is not None and logits.dtype == self._dtype:
            return Tile(logits, 1, self._gradient[start:stop])
        wide = logits.to(self._dtype)
        return Tile(wide, 1, torch.empty_like(wide) if self._gradient is not None else wide)

    def take(self, tile: Tile, start: int, stop: int, first: int, last: int) -> None:
        """Keep a tile's gradient."""
        if self._gradient is None:
            return
        if self._copy is not None:
            tile.gradient.mul_(self._scale)
        if self._copy is not None or tile.gradient.dtype != self._gradient.dtype:
            self._gradient[start:stop] = tile.gradient

    def finish(self) -> list[Tensor | None]:
        """Return the gradient."""
        return [self._gradient]


def buffer(backend: Backend, numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for a tile, not initialised."""
    return backend.empty(torch.Size((numbers,)), dtype, device)


def _is_one(scale: Tensor | float) -> bool:
    """Say whether a scale changes nothing; one that nobody has read may."""
    return isinstance(scale, float) and scale == 1.0


def view(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the first numbers of a buffer in a shape."""
    return stretch(flat, 0, math.prod(shape)).view(shape)


def stretch(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return `tensor[start:stop]`: the tensor itself where that is all, as a view takes as long as a small product."""
    return tensor if start == 0 and stop == tensor.shape[0] else tensor[start:stop]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients of tensors of this one add up."""
    return torch.float32 if dtype in HALF else dtype
