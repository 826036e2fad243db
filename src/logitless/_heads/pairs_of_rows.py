"""Which entries of a similarity matrix are meant, without the matrix: positives, and what is left out.

Of a tile they are listed, `Places`, where numbers may be read: what is done to few entries then costs little. How long
such a list is depends on values, for which a device would be waited for; there they are marked, `Marked`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Numbers of a mask whose places are listed at a time: a place takes sixteen times a mask's byte.
_LISTED = 1 << 17


class Places(NamedTuple):
    """Some entries of a tile: their rows and columns in it."""

    rows: Tensor
    columns: Tensor

    def of(self, tile: Tensor) -> Tensor:
        """Return what the tile has there."""
        return tile[self]

    def write(self, tile: Tensor, values: Tensor) -> None:
        """Write values, one a place, to the tile."""
        tile[self] = values.to(tile.dtype)

    def fill(self, tile: Tensor, value: float) -> None:
        """Write one number everywhere."""
        tile[self] = value

    def add_to(self, sums: Tensor, values: Tensor) -> None:
        """Add values, one a place, to those of their rows."""
        sums.index_add_(0, self.rows, values)


class Marked(NamedTuple):
    """Some entries of a tile: where its mask is True; `rows` [rows, 1] and `columns` [1, columns] number the tile."""

    rows: Tensor
    columns: Tensor
    mask: Tensor

    @classmethod
    def by(cls, mask: Tensor) -> Marked:
        """Return the entries of a mask [rows, columns]."""
        rows, columns = (torch.arange(size, device=mask.device) for size in mask.shape)
        return cls(rows.unsqueeze(1), columns.unsqueeze(0), mask)

    def of(self, tile: Tensor) -> Tensor:
        """Return what the tile has there, and 0 elsewhere."""
        return torch.where(self.mask, tile, 0)

    def write(self, tile: Tensor, values: Tensor) -> None:
        """Write those of values [rows, columns] that are meant to the tile."""
        tile.copy_(torch.where(self.mask, values.to(tile.dtype), tile))

    def fill(self, tile: Tensor, value: float) -> None:
        """Write one number everywhere."""
        tile.masked_fill_(self.mask, value)

    def add_to(self, sums: Tensor, values: Tensor) -> None:
        """Add values [rows, columns], which are 0 elsewhere, to those of their rows."""
        sums += values.sum(1)


Entries = Places | Marked


class Pairs(Protocol):
    """Entries (row, column) of a matrix, each at most once."""

    def within(
        self, top: int, bottom: int, left: int, right: int, device: torch.device, *, reads: bool
    ) -> Iterator[Entries]:
        """Yield those in rows top to bottom and columns left to right, counted from there, on the device.

        `reads` says whether the numbers that name them may be read.
        """
        ...

    def counts(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return how many each of so many rows has among so many columns; no shape depends on values."""
        ...

    def matrix(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return the boolean matrix of so many rows and columns, of which no shape depends on values either."""
        ...


class Diagonal(NamedTuple):
    """Entry (i, i) of every row i below `size`."""

    size: int

    def within(
        self, top: int, bottom: int, left: int, right: int, device: torch.device, *, reads: bool
    ) -> Iterator[Entries]:
        """Yield the part of the diagonal that crosses the tile."""
        first, last = max(top, left), min(bottom, right, self.size)
        if first < last:
            along = torch.arange(first, last, device=device)
            yield Places(along - top, along - left)

    def counts(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return one a row."""
        return (torch.arange(rows, device=device) < self.size).to(torch.int64)

    def matrix(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return the diagonal."""
        return _diagonal(rows, columns, device) & (torch.arange(rows, device=device) < self.size).unsqueeze(1)


class Listed(NamedTuple):
    """Entries by their numbers, sorted by row: `of` makes one.

    Where numbers may not be read, an entry that is none has a row beyond the last, and the order does not matter.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, width: int) -> Listed:
        """Return these entries of a matrix of so many columns, each once, sorted."""
        flat = torch.unique(rows.to(torch.int64) * width + columns.to(torch.int64))
        return cls(flat // max(1, width), flat % max(1, width))

    def within(
        self, top: int, bottom: int, left: int, right: int, device: torch.device, *, reads: bool
    ) -> Iterator[Entries]:
        """Yield the entries of these rows whose column is among these."""
        if not reads:
            yield Marked.by(self._mask(top, bottom, left, right))
            return
        first, last = torch.searchsorted(self.rows, self.rows.new_tensor((top, bottom))).tolist()
        rows, columns = self.rows[first:last], self.columns[first:last]
        inside = (columns >= left) & (columns < right)
        if inside.any():
            yield Places(rows[inside] - top, columns[inside] - left)

    def counts(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return how many entries each row has."""
        counted = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        return counted.index_add(0, self.rows, torch.ones_like(self.rows))[:rows]

    def matrix(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return them written out."""
        there = torch.zeros(rows + 1, columns, dtype=torch.bool, device=device)
        return there.index_put((self.rows, self.columns), torch.ones_like(self.rows, dtype=torch.bool))[:rows]

    def _mask(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """Return those of a tile as a mask; what lies elsewhere goes to one number behind it."""
        inside = (self.rows >= top) & (self.rows < bottom) & (self.columns >= left) & (self.columns < right)
        size = (bottom - top) * (right - left)
        place = torch.where(inside, (self.rows - top) * (right - left) + self.columns - left, size)
        flat = torch.zeros(size + 1, dtype=torch.bool, device=self.rows.device)
        return flat.index_fill_(0, place, True)[:size].view(bottom - top, right - left)


class Indexed(NamedTuple):
    """Entries by the columns of each row [rows, some], in order, each once; -1 stands for none: `of` makes one."""

    columns: Tensor

    @classmethod
    def of(cls, index: Tensor) -> Indexed:
        """Return the entries of an index [rows] or [rows, some], in which -1 stands for none."""
        ordered = (index.unsqueeze(-1) if index.dim() == 1 else index).to(torch.int64).sort(1).values
        again = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (min(1, ordered.shape[1]), 0))
        return cls(ordered.masked_fill(again, -1))

    def within(
        self, top: int, bottom: int, left: int, right: int, device: torch.device, *, reads: bool
    ) -> Iterator[Entries]:
        """Yield the entries of these rows whose column is among these."""
        stretch = self.columns[top:bottom]
        if not reads:
            width = right - left
            places = torch.where((stretch >= left) & (stretch < right), stretch - left, width)
            there = torch.zeros(bottom - top, width + 1, dtype=torch.bool, device=device)
            yield Marked.by(there.scatter_(1, places, True)[:, :width])
            return
        rows, places = ((stretch >= left) & (stretch < right)).nonzero(as_tuple=True)
        if len(rows):
            yield Places(rows, stretch[rows, places] - left)

    def counts(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return how many entries each row has."""
        return (self.columns >= 0).sum(1)

    def matrix(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return them written out; what is none goes to a column that is cut off."""
        there = torch.zeros(rows, columns + 1, dtype=torch.bool, device=device)
        places = torch.where(self.columns < 0, columns, self.columns)
        return there.scatter(1, places, torch.ones_like(places, dtype=torch.bool))[:, :columns]


class SameLabel(NamedTuple):
    """Entries whose row and column have one label; without (i, i) where `others` says so."""

    rows: Tensor
    columns: Tensor
    others: bool = False

    def within(
        self, top: int, bottom: int, left: int, right: int, device: torch.device, *, reads: bool
    ) -> Iterator[Entries]:
        """Yield them, a stretch of rows at a time where they are listed."""
        labels = self.columns[left:right]
        if not reads:
            same = self.rows[top:bottom].unsqueeze(1) == labels
            yield Marked.by(same & ~_diagonal_within(top, bottom, left, right, device) if self.others else same)
            return
        step = max(1, _LISTED // max(1, right - left))
        for start in range(top, bottom, step):
            same = self.rows[start : min(start + step, bottom)].unsqueeze(1) == labels
            rows, columns = same.nonzero(as_tuple=True)
            if self.others:
                kept = rows + start != columns + left
                rows, columns = rows[kept], columns[kept]
            yield Places(rows + (start - top), columns)

    def counts(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return how many columns have the row's label."""
        kind = torch.promote_types(self.rows.dtype, self.columns.dtype)
        kind = torch.uint8 if kind == torch.bool else kind  # which nothing searches
        wanted, ordered = self.rows.to(kind).contiguous(), self.columns.to(kind).sort().values
        found = torch.searchsorted(ordered, wanted, right=True) - torch.searchsorted(ordered, wanted)
        return found - 1 if self.others else found

    def matrix(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return them written out."""
        same = self.rows[:rows].unsqueeze(1) == self.columns[:columns]
        return same & ~_diagonal(rows, columns, device) if self.others else same


class Masked(NamedTuple):
    """Entries of a boolean matrix that the caller has, repeated both ways; without (i, i) where `others` says so."""

    mask: Tensor
    others: bool = False

    def within(
        self, top: int, bottom: int, left: int, right: int, device: torch.device, *, reads: bool
    ) -> Iterator[Entries]:
        """Yield them, a stretch of rows at a time where they are listed."""
        size, device = len(self.mask), self.mask.device
        columns_of = torch.arange(left, right, device=device) % size
        if not reads:
            there = self.mask[(torch.arange(top, bottom, device=device) % size).unsqueeze(1), columns_of]
            yield Marked.by(there & ~_diagonal_within(top, bottom, left, right, device) if self.others else there)
            return
        step = max(1, _LISTED // max(1, right - left))
        for start in range(top, bottom, step):
            rows_of = torch.arange(start, min(start + step, bottom), device=device) % size
            rows, columns = self.mask[rows_of.unsqueeze(1), columns_of].nonzero(as_tuple=True)
            if self.others:
                kept = rows + start != columns + left
                rows, columns = rows[kept], columns[kept]
            yield Places(rows + (start - top), columns)

    def counts(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return how many entries each row has of so many columns."""
        size = self.mask.shape[0]
        each = self.mask.sum(1) * (columns // size)
        if self.others:
            each = each - self.mask.diagonal().to(each.dtype)
        return each.repeat(rows // size)

    def matrix(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return them written out."""
        size = self.mask.shape[0]
        there = self.mask.repeat(rows // size, columns // size)
        return there & ~_diagonal(rows, columns, device) if self.others else there


def _diagonal(rows: int, columns: int, device: torch.device) -> Tensor:
    return _diagonal_within(0, rows, 0, columns, device)


def _diagonal_within(top: int, bottom: int, left: int, right: int, device: torch.device) -> Tensor:
    return torch.arange(top, bottom, device=device).unsqueeze(1) == torch.arange(left, right, device=device)
