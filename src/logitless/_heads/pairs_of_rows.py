"""Which entries of a similarity matrix are meant, without the matrix: positives, and what is left out."""

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


class Pairs(Protocol):
    """Entries (row, column) of a matrix, each at most once."""

    def within(self, top: int, bottom: int, left: int, right: int) -> Iterator[Places]:
        """Yield those in rows top to bottom and columns left to right, counted from there."""
        ...

    def counts(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return how many each of so many rows has among so many columns."""
        ...


class Diagonal(NamedTuple):
    """Entry (i, i) of every row i below `size`."""

    size: int

    def within(self, top: int, bottom: int, left: int, right: int) -> Iterator[Places]:
        """Yield the part of the diagonal that crosses the tile."""
        first, last = max(top, left), min(bottom, right, self.size)
        if first < last:
            along = torch.arange(first, last)
            yield Places(along - top, along - left)

    def counts(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return one a row."""
        return (torch.arange(rows, device=device) < self.size).to(torch.int64)


class Listed(NamedTuple):
    """Entries by their numbers, sorted by row: `of` makes one."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, width: int) -> Listed:
        """Return these entries of a matrix of so many columns, each once, sorted."""
        flat = torch.unique(rows.to(torch.int64) * width + columns.to(torch.int64))
        return cls(flat // max(1, width), flat % max(1, width))

    @classmethod
    def of_index(cls, index: Tensor, width: int) -> Listed:
        """Return the entries of an index [rows, some], in which -1 stands for none."""
        index = index.unsqueeze(-1) if index.dim() == 1 else index
        rows, places = (index >= 0).nonzero(as_tuple=True)
        return cls.of(rows, index[rows, places], width)

    def within(self, top: int, bottom: int, left: int, right: int) -> Iterator[Places]:
        """Yield the entries of these rows whose column is among these."""
        first, last = torch.searchsorted(self.rows, self.rows.new_tensor((top, bottom))).tolist()
        rows, columns = self.rows[first:last], self.columns[first:last]
        inside = (columns >= left) & (columns < right)
        if inside.any():
            yield Places(rows[inside] - top, columns[inside] - left)

    def counts(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return how many entries each row has."""
        return torch.bincount(self.rows, minlength=rows)


class SameLabel(NamedTuple):
    """Entries whose row and column have one label; without (i, i) where `others` says so."""

    rows: Tensor
    columns: Tensor
    others: bool = False

    def within(self, top: int, bottom: int, left: int, right: int) -> Iterator[Places]:
        """Yield them, a stretch of rows at a time."""
        labels = self.columns[left:right]
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
        known, which = torch.unique(torch.cat((self.rows, self.columns)), return_inverse=True)
        of_rows, of_columns = which[: len(self.rows)], which[len(self.rows) :]
        found = torch.bincount(of_columns, minlength=len(known))[of_rows]
        return found - 1 if self.others else found


class Masked(NamedTuple):
    """Entries of a boolean matrix that the caller has, repeated both ways; without (i, i) where `others` says so."""

    mask: Tensor
    others: bool = False

    def within(self, top: int, bottom: int, left: int, right: int) -> Iterator[Places]:
        """Yield them, a stretch of rows at a time."""
        size, device = len(self.mask), self.mask.device
        columns_of = torch.arange(left, right, device=device) % size
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
        size = len(self.mask)
        each = self.mask.sum(1) * (columns // size)
        if self.others:
            each = each - self.mask.diagonal().to(each.dtype)
        return each.repeat(rows // size)
