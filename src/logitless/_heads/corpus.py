"""The rows of a corpus, wherever they lie: a tensor, an array, a file that is mapped to memory, or what cuts to those.

Blocks of a tensor or an array are read where they are. Of a mapped file the pages that were read are given back to the
system, which keeps them as long as it has room and no longer counts them as this process's.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPES = {
    "floats": _FLOATS,
    "rows": _FLOATS | {"int8": torch.int8},
    "queries": _FLOATS | {"int8": torch.int8, "float64": torch.float64},
}
# One call of a kernel numbers its rows in 32 bits.
MOST_ROWS = 2**31 - 1


class Rows(Protocol):
    """Anything of two dimensions that is cut to rows: `corpus[start:stop]` is a tensor or an array."""

    def __getitem__(self, rows: slice, /) -> Any:
        """Return these rows."""
        ...


class _Mapping(NamedTuple):
    """Memory that shows a file, and the address of its first byte."""

    memory: mmap.mmap
    address: int


class Corpus:
    """A matrix of vectors that is read by blocks of rows."""

    def __init__(self, name: str, given: Rows | Tensor, kind: Literal["floats", "rows", "queries"] = "rows") -> None:
        """Check what can be known without reading; `kind` says of which dtypes it may be."""
        self.name, self._given = name, given
        shape = given.get_shape() if hasattr(given, "get_shape") else getattr(given, "shape", None)
        if shape is None or len(shape) != 2:
            got = f"a {type(given).__name__}" if shape is None else f"{type(given).__name__} {tuple(shape)}"
            raise ValueError(
                f"{name} must have two dimensions (rows, features) and be cut to rows by {name}[start:stop], got {got}"
            )
        self.rows, self.depth = (int(size) for size in shape)
        if not self.depth:
            raise ValueError(f"{name} has vectors of no elements: {tuple(shape)}")
        self._dtypes = _DTYPES[kind]
        self._lasts = isinstance(given, Tensor) or hasattr(given, "__array_interface__")
        self._mapping = _mapping_of(given)
        if hasattr(given, "dtype"):
            self._dtype = self._checked(given.dtype)
        else:
            self._dtype = self._checked(given[0:1].dtype) if self.rows else torch.float32

    @property
    def is_int8(self) -> bool:
        """Whether its rows are bytes."""
        return self._dtype == torch.int8

    @property
    def in_memory(self) -> bool:
        """Whether a block is no copy and no page of a file."""
        return self._lasts and self._mapping is None

    @property
    def row_bytes(self) -> int:
        """What a row takes."""
        return self._dtype.itemsize * self.depth

    def blocks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row's number and the rows, at most so many at a time, from the first row to the last."""
        rows = max(1, min(rows, MOST_ROWS))
        for start in range(0, self.rows, rows):
            stop = min(start + rows, self.rows)
            yield start, self.block(start, stop)
            self._give_back(start, stop)

    def block(self, start: int, stop: int) -> Tensor:
        """Return some rows, whose elements are consecutive, as they are or in a copy."""
        cut = self._given[start:stop]
        block = cut.detach() if isinstance(cut, Tensor) else self._tensor(cut)
        self._checked(block.dtype)
        if block.shape != (stop - start, self.depth):
            raise ValueError(
                f"{self.name}[{start}:{stop}] must be ({stop - start}, {self.depth}), got {tuple(block.shape)}"
            )
        return block if block.stride(1) == 1 and not block.is_neg() else block.contiguous().resolve_neg()

    def _tensor(self, array: Any) -> Tensor:
        """Return a tensor on an array's memory: torch warns of memory that may not be written, and none is here."""
        if not hasattr(array, "__array_interface__"):
            raise TypeError(f"{self.name}[start:stop] must be a Tensor or an array, got {type(array).__name__}")
        dtype = self._checked(array.dtype)
        if not array.dtype.isnative or any(stride < 0 or stride % dtype.itemsize for stride in array.strides):
            array = array.astype(array.dtype.newbyteorder("="), order="C")
        sizes, strides = array.shape, [stride // dtype.itemsize for stride in array.strides]
        if 0 in sizes:
            return torch.empty(sizes, dtype=dtype)
        span = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        memory = (ctypes.c_byte * (span * dtype.itemsize)).from_address(array.__array_interface__["data"][0])
        memory.owner = array  # lives as long as the tensor does
        return torch.frombuffer(memory, dtype=dtype).as_strided(sizes, strides)

    def _checked(self, dtype: Any) -> torch.dtype:
        """Return the dtype of these elements, torch's or an array's."""
        name = getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")
        if name not in self._dtypes:
            raise TypeError(
                f"{self.name} must be of {', '.join(self._dtypes)}, got {name}; convert it, a block at a time if it "
                "is large"
            )
        return self._dtypes[name]

    def _give_back(self, start: int, stop: int) -> None:
        """Let the system have the pages of rows that were read."""
        if self._mapping is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        rows: Any = self._given
        stride, first = abs(rows.strides[0]), rows.__array_interface__["data"][0] - self._mapping.address
        ends = first + start * rows.strides[0], first + (stop - 1) * rows.strides[0]
        begin = min(ends) // mmap.PAGESIZE * mmap.PAGESIZE
        length = min(max(ends) + stride, len(self._mapping.memory)) - begin
        if length > 0:
            self._mapping.memory.madvise(mmap.MADV_DONTNEED, begin, length)


def _mapping_of(given: Any) -> _Mapping | None:
    """Return the mapping in which an array lies, if there is one of which pages may be given back.

    A page of a copy-on-write mapping holds what was written to it, and must stay.
    """
    root = given
    while hasattr(getattr(root, "base", None), "__array_interface__"):
        root = root.base
    memory = getattr(root, "base", None)
    if not isinstance(memory, mmap.mmap) or getattr(root, "mode", None) not in ("r", "r+", "w+"):
        return None
    into = root.offset % mmap.ALLOCATIONGRANULARITY
    return _Mapping(memory, root.__array_interface__["data"][0] - into)
