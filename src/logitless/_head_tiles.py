"""Where tiles of logits come from and where their gradients go: a linear head's two products, made by hand.

A tile of a head lies in a buffer that every tile reuses, its gradient in the same place. Where nothing else asks for
another order the tile is class-major, [classes, rows]: the product that makes it then reads the weight in the order in
which it lies, which is the faster one where a tile has far fewer rows than classes.

Precision policy: products are in the hidden state's dtype, and what a tile's gradient gives to the weight and bias adds
up in float32 or wider. Where scale, softcap or the logits' own dtype ask for it, the tile is widened before anything
else; half precision without any of them is read by the kernels as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from logitless import _tiles
from logitless._precision import HALF
from logitless.kernels import cpu
from logitless.lazy import HeadRows

# Of the default bytes, with a gradient and without: rows of 49152 classes enough for products at full speed.
_GRADIENT_SHARE, _VALUE_SHARE = 0.7, 0.455
# Of the bytes a caller allows; the rest is for what the products need and for a few numbers a row.
_BUFFER_SHARE = 15 / 16
# Products of fewer rows run at a fraction of their speed: the classes are cut before the rows get fewer ...
_LEAST_ROWS = 64
_CUT_ROWS = 256  # ... to tiles of this many rows, as long as so many classes fit beside them
_LEAST_CLASSES = 64
_ROUND_ROWS = 16  # a vector of rows, so that no tile but the last has a part of one
_SLAB_CLASSES = 8192  # of a half-precision weight gradient, widened while it is in the cache


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a call's logits are cut: so many rows by so many classes at a time, in so many bytes of buffers."""

    rows: int
    classes: int
    buffer_bytes: int


def tiling(
    rows: int, classes: int, row_bytes: int, *, max_bytes: int | None, gradient: bool, cut_classes: bool
) -> Tiling:
    """Return the tiles of a call; `row_bytes` is what one row of all classes takes in every buffer."""
    budget = _budget(max_bytes, gradient)
    fit = rows_that_fit(row_bytes, max_bytes=max_bytes, gradient=gradient)
    if fit >= min(rows, _LEAST_ROWS) or not cut_classes:
        fit = max(1, min(fit, rows))
        if rows > fit > _ROUND_ROWS:
            fit = fit // _ROUND_ROWS * _ROUND_ROWS
        even = math.ceil(rows / math.ceil(rows / fit)) if rows else 1
        if even > _ROUND_ROWS:
            even = min(fit, -(-even // _ROUND_ROWS) * _ROUND_ROWS)
        return Tiling(even, classes, even * row_bytes)
    number_bytes = max(1, row_bytes // classes)
    tile_rows = max(1, min(rows, _CUT_ROWS, budget // (_LEAST_CLASSES * number_bytes)))
    tile_classes = max(1, min(classes, budget // (tile_rows * number_bytes)))
    return Tiling(tile_rows, tile_classes, tile_rows * tile_classes * number_bytes)


def rows_that_fit(row_bytes: int, *, max_bytes: int | None, gradient: bool) -> int:
    """Return how many rows of all classes the buffers of a call may hold; so many or fewer are one tile."""
    return _budget(max_bytes, gradient) // max(1, row_bytes)


def _budget(max_bytes: int | None, gradient: bool) -> int:
    if max_bytes is None:
        return int(_tiles.DEFAULT_MAX_BYTES * (_GRADIENT_SHARE if gradient else _VALUE_SHARE))
    return int(max_bytes * _BUFFER_SHARE)


class Tile(NamedTuple):
    """A tile's logits, their classes in dimension `class_dim`, and where their gradient is to be written."""

    logits: Tensor
    class_dim: int
    gradient: Tensor


class HeadTiles:
    """Tiles of a head's logits, and the gradients of its parts; see `lazy.HeadRows`."""

    def __init__(
        self,
        rows: HeadRows,
        tensors: Sequence[Tensor | None],
        needed: Sequence[bool],
        shape: Tiling,
        dtype: torch.dtype,
        class_major: bool,
    ) -> None:
        hidden, weight, self._bias, scale = tensors
        assert hidden is not None
        assert weight is not None
        self._hidden, self._weight = hidden, weight
        self._scale = rows.scale if scale is None else float(scale)
        self._softcap, self._class_major, self._dtype = rows.softcap, class_major, dtype
        self._one_tile = shape.rows >= rows.rows and shape.classes >= rows.classes
        numbers = shape.rows * shape.classes
        self._raw = buffer(numbers, hidden.dtype)
        self._wide = None if dtype == hidden.dtype else buffer(numbers, dtype)
        self._slope = buffer(numbers, dtype) if rows.softcap is not None and any(needed) else None
        self.gradients = _Gradients(tensors, needed, shape, self._one_tile)

    @staticmethod
    def row_bytes(rows: HeadRows, dtype: torch.dtype, gradient: bool) -> int:
        """Return what one row of logits takes in the buffers."""
        hidden = rows.tensors[0]
        assert hidden is not None
        bytes_each = hidden.dtype.itemsize
        if dtype != hidden.dtype:
            bytes_each += dtype.itemsize
        if rows.softcap is not None and gradient:
            bytes_each += dtype.itemsize
        return rows.classes * bytes_each

    @staticmethod
    def accumulator_bytes(rows: HeadRows, shape: Tiling, one_tile: bool) -> int:
        """Return what the gradients take that is not theirs to keep: the products of a tile, and wider sums."""
        hidden, weight, *_ = rows.tensors
        assert hidden is not None
        assert weight is not None
        bytes_held = 0
        if hidden.requires_grad:
            bytes_held += shape.rows * hidden.shape[1] * hidden.dtype.itemsize
            if hidden.dtype in HALF:
                bytes_held += hidden.numel() * 4
        if weight.requires_grad and weight.dtype in HALF and not one_tile:
            bytes_held += weight.numel() * 4 + min(_SLAB_CLASSES, shape.classes) * weight.shape[1] * weight.itemsize
        return bytes_held

    def logits(self, start: int, stop: int, first: int, last: int) -> Tile:
        """Return the logits of some rows and classes."""
        hidden, weight = self._hidden[start:stop], self._weight[first:last]
        bias = None if self._bias is None else self._bias[first:last]
        folded = self._wide is None and self._scale != 1.0
        if folded:
            hidden = hidden * self._scale
            bias = None if bias is None else bias * self._scale
        shape = (last - first, stop - start) if self._class_major else (stop - start, last - first)
        raw = view(self._raw, shape)
        first_factor, second_factor = (weight, hidden.T) if self._class_major else (hidden, weight.T)
        if bias is None:
            torch.mm(first_factor, second_factor, out=raw)
        else:  # before the product is rounded
            spread = bias.unsqueeze(1) if self._class_major else bias
            torch.addmm(spread.expand(shape), first_factor, second_factor, out=raw)
        logits = raw
        if self._wide is not None:
            logits = view(self._wide, shape).copy_(raw)
            if self._scale != 1.0:
                logits *= self._scale
        if self._softcap is not None:
            logits.div_(self._softcap).tanh_().mul_(self._softcap)
        gradient = logits if self._slope is None else view(self._slope, shape)
        return Tile(logits, 0 if self._class_major else 1, gradient)

    def take(self, tile: Tile, start: int, stop: int, first: int, last: int) -> None:
        """Take a tile's gradient back through the head."""
        gradient = tile.gradient
        if self._softcap is not None:
            slope = tile.logits.div_(self._softcap)
            gradient *= slope.mul_(slope).neg_().add_(1)
        if self._wide is not None:
            gradient = view(self._raw, tuple(gradient.shape)).copy_(gradient)
        by_class = gradient if self._class_major else gradient.T
        self.gradients.add(by_class, self._hidden, self._weight, self._bias, self._scale, start, stop, first, last)

    def finish(self) -> list[Tensor | None]:
        """Return the gradients of hidden, weight, bias and scale, in the dtypes they were accumulated in."""
        return self.gradients.finish(self._scale)


class _Gradients:
    """What the tiles' gradients add up to; None: not needed."""

    def __init__(self, tensors: Sequence[Tensor | None], needed: Sequence[bool], shape: Tiling, one_tile: bool) -> None:
        hidden, weight, bias, scale = tensors
        self._needed = tuple(needed)
        assert hidden is not None
        assert weight is not None
        # Products of every tile go to the same place: blocks of their size, freed and asked for again, leave gaps that
        # the allocator does not fill, 17 MB over 22 tiles.
        features = hidden.shape[1]
        self._to_hidden = buffer(shape.rows * features, hidden.dtype) if needed[0] or needed[3] else None
        slab = min(_SLAB_CLASSES, shape.classes) * features
        self._to_slab = buffer(slab, hidden.dtype) if needed[1] and weight.dtype in HALF and not one_tile else None
        self._hidden = torch.zeros_like(hidden, dtype=sum_dtype(hidden.dtype)) if needed[0] else None
        # A half-precision product of all rows at once is rounded once anyway.
        dtype = weight.dtype if one_tile else sum_dtype(weight.dtype)
        self._weight = cpu.empty_pooled(weight.shape, dtype) if needed[1] else None
        self._written = 0  # classes of the weight's gradient that hold something
        self._bias = torch.zeros(bias.shape, dtype=torch.float64) if bias is not None and needed[2] else None
        self._scale = 0.0
        self._scale_like = scale

    def add(
        self,
        gradient: Tensor,  # [classes, rows]
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        start: int,
        stop: int,
        first: int,
        last: int,
    ) -> None:
        part = hidden[start:stop]
        if self._to_hidden is not None:
            rows, features = part.shape
            if gradient.dtype in HALF:
                to_hidden = torch.mm(gradient.T, weight[first:last], out=view(self._to_hidden, (rows, features)))
            else:
                to_hidden = torch.mm(weight[first:last].T, gradient, out=view(self._to_hidden, (features, rows))).T
            if self._hidden is not None:
                self._hidden[start:stop].add_(to_hidden, alpha=scale)
            if self._needed[3]:
                self._scale += float((part.double() * to_hidden.double()).sum())
        if self._weight is not None:
            self._add_weight(gradient, part, first, last)
        if (self._bias is not None or self._needed[3]) and bias is not None:
            sums = gradient.sum(1, dtype=sum_dtype(gradient.dtype)).double()
            if self._bias is not None:
                self._bias[first:last] += sums
            if self._needed[3]:
                self._scale += float((bias[first:last].double() * sums).sum())

    def _add_weight(self, gradient: Tensor, part: Tensor, first: int, last: int) -> None:
        total = self._weight
        assert total is not None
        fresh = last > self._written
        self._written = max(self._written, last)
        if total.dtype == gradient.dtype:
            if fresh:
                torch.mm(gradient, part, out=total[first:last])
            else:
                total[first:last].addmm_(gradient, part)
            return
        for begin in range(first, last, _SLAB_CLASSES):
            end = min(begin + _SLAB_CLASSES, last)
            assert self._to_slab is not None
            place = view(self._to_slab, (end - begin, part.shape[1]))
            product = torch.mm(gradient[begin - first : end - first], part, out=place)
            if fresh:
                total[begin:end].copy_(product)
            else:
                total[begin:end].add_(product)

    def finish(self, scale: float) -> list[Tensor | None]:
        weight = self._weight
        if weight is not None:
            weight[self._written :] = 0
            if scale != 1.0:
                weight *= scale
        bias = None if self._bias is None else self._bias * scale
        scalar = None
        if self._needed[3] and self._scale_like is not None:
            scalar = torch.tensor(self._scale, dtype=torch.float64)
        return [self._hidden, weight, bias, scalar]


class DenseTiles:
    """Tiles of logits that the user gave, row-major; their gradient is written where it stays."""

    def __init__(self, tensors: Sequence[Tensor | None], needed: Sequence[bool], dtype: torch.dtype) -> None:
        (logits,) = tensors
        assert logits is not None
        self._logits, self._dtype = logits, dtype
        self._gradient = cpu.empty_pooled(logits.shape, logits.dtype) if needed[0] else None

    def logits(self, start: int, stop: int, first: int, last: int) -> Tile:
        """Return the rows; all their classes, always."""
        logits = self._logits[start:stop]
        if self._gradient is not None and logits.dtype == self._dtype:
            return Tile(logits, 1, self._gradient[start:stop])
        wide = logits.to(self._dtype)
        return Tile(wide, 1, torch.empty_like(wide) if self._gradient is not None else wide)

    def take(self, tile: Tile, start: int, stop: int, first: int, last: int) -> None:
        """Keep a tile's gradient."""
        if self._gradient is not None and tile.gradient.dtype != self._gradient.dtype:
            self._gradient[start:stop] = tile.gradient

    def finish(self) -> list[Tensor | None]:
        """Return the gradient."""
        return [self._gradient]


def buffer(numbers: int, dtype: torch.dtype) -> Tensor:
    """Return memory for a tile, not initialised, from the pool whose pages are mapped already."""
    return cpu.empty_pooled(torch.Size((numbers,)), dtype)


def view(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the first numbers of a buffer in a shape."""
    return flat[: math.prod(shape)].view(shape)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients of tensors of this one add up."""
    return torch.float32 if dtype in HALF else dtype
