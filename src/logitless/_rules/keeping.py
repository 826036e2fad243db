"""What an autograd function keeps of its call: the tensors by way of autograd, the rest of it as it is.

A target or a class weight that is held as an attribute can be written to between the two passes without an error, lives
as long as the loss does, and is hidden from saved-tensor hooks. So a call is taken apart before it is kept: its tensors
go through `save_for_backward`, and what is left of it has numbers in their places.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from operator import attrgetter
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

# What holds no tensor; a backend is a module.
_PLAIN = frozenset((int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, ModuleType))


@dataclass(frozen=True, slots=True)
class _Place:
    number: int


_place = functools.cache(_Place)  # few numbers, of all calls


def taken_apart(value: Any, known: Sequence[Tensor | None] = ()) -> tuple[Any, list[Tensor]]:
    """Return a value with places for its tensors, and those that are not among the `known` ones, in their order.

    Looks into tuples, lists, dataclasses, partial functions, and what a function closes over.
    """
    numbers = {id(tensor): number for number, tensor in enumerate(known) if tensor is not None}
    more: list[Tensor] = []

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        number = numbers.get(id(leaf))
        if number is None:
            number = numbers[id(leaf)] = len(known) + len(more)
            more.append(leaf)
        return _place(number)

    return _Walk(place).of(value), more


def put_together(value: Any, tensors: Sequence[Tensor | None]) -> Any:
    """Return what was taken apart with these tensors in its places: the known ones, then the others."""
    return _Refilled(lambda leaf: tensors[leaf.number] if type(leaf) is _Place else leaf).of(value)


@functools.cache
def _fields(kind: type) -> tuple[str, ...]:
    """Return the names of a dataclass's fields; none of another class."""
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else ()


@functools.cache
def _reader(kind: type) -> Callable[[Any], tuple[Any, ...]] | None:
    """Return what reads all fields of a dataclass; None for another class, and for one without fields."""
    names = _fields(kind)
    if len(names) == 1:
        return lambda value: (getattr(value, names[0]),)
    return attrgetter(*names) if names else None


def _of_fields(kind: type, items: Sequence[Any]) -> Any:
    """Return a dataclass of these fields; nothing that it does when it is made is done to places."""
    made: Any = object.__new__(kind)
    write = object.__setattr__
    for name, item in zip(_fields(kind), items, strict=True):
        write(made, name, item)
    return made


class _Walk:
    """Replaces leaves; what holds none that changes is returned as it is."""

    def __init__(self, leaf: Callable[[Any], Any]) -> None:
        self._leaf = leaf
        self._done: dict[
            int, tuple[Any, Any]
        ] = {}  # by identity; what was seen stays, so that no other gets its number

    def of(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is Tensor or kind is _Place or isinstance(value, Tensor):
            return self._leaf(value)
        done = self._done.get(id(value))
        if done is None:
            self._done[id(value)] = value, value  # a function may close over itself
            done = self._done[id(value)] = value, self._inside(kind, value)
        return done[1]

    def _inside(self, kind: type, value: Any) -> Any:
        if kind is FunctionType:
            return self._function(value)
        read = _reader(kind)
        if read is not None:
            items, changed = self._each(read(value))
            return _of_fields(kind, items) if changed else value
        if isinstance(value, (tuple, list)):
            items, changed = self._each(value)
            if not changed:
                return value
            return kind._make(items) if hasattr(kind, "_make") else kind(items)
        if kind is MethodType:
            owner = self.of(value.__self__)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if kind is partial:
            (function, args, options), changed = self._each(
                (value.func, value.args, tuple(value.keywords.items())),
            )
            return partial(function, *args, **dict(options)) if changed else value
        return value

    def _each(self, values: Sequence[Any]) -> tuple[list[Any], bool]:
        items, changed = [], False
        for value in values:
            item = value if type(value) in _PLAIN else self.of(value)  # most are: a call less for each
            changed = changed or item is not value
            items.append(item)
        return items, changed

    def _function(self, function: FunctionType) -> FunctionType:
        cells = function.__closure__
        if cells is None:
            return function
        items, changed = self._each([cell.cell_contents for cell in cells])
        if not changed:
            return function
        closed = tuple(CellType(item) for item in items)
        made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closed)
        made.__kwdefaults__ = function.__kwdefaults__
        return made


class _Refilled(_Walk):
    """Puts a function together when it is called: a definition is called by few backward passes."""

    def _function(self, function: FunctionType) -> Any:
        if function.__closure__ is None:
            return function
        refill = super()._function
        return lambda *args, **options: refill(function)(*args, **options)


def graph_is_kept() -> bool:
    """Say whether another backward pass may read what was saved for the one that runs: `retain_graph`."""
    if torch._C._current_graph_task_id() < 0:
        return True
    kept: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return kept
