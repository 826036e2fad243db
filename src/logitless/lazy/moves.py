"""What moves rows of logits or casts them: the same of the head's hidden states, with the classes left alone.

`MOVES` names, for each method of a tensor, the function here that gives its lazy form. What has none falls back to
torch, which makes a view that is not computed until it is read, or computes the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from logitless._heads.window import opened
from logitless.lazy.tensor import is_here


class Logits(Protocol):
    """Logits of a head, as far as a move asks."""

    @property
    def shape(self) -> torch.Size:
        """Their shape."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Their dtype."""
        ...

    @property
    def device(self) -> torch.device:
        """Their device."""
        ...

    @property
    def class_dim(self) -> int:
        """Where the classes are, counted from the end."""
        ...

    def dim(self) -> int:
        """Return the number of dimensions."""
        ...

    def head(self) -> tuple[Tensor, Tensor, Tensor | None, float | Tensor]:
        """Return hidden, weight, bias and scale."""
        ...

    def changed(self, *, view: bool = False, **changes: Any) -> Any:
        """Return the same logits with other parts or settings; `view`: what dense logits would share memory with."""
        ...

    def fall_back(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Return what torch's method gives."""
        ...


def axis_of(dim: Any, dims: int) -> int:
    """Return a dimension counted from the front; raise as torch does if there is none such."""
    if not isinstance(dim, int):
        raise TypeError(f"expected a dimension, an int, got {dim!r}")
    if not -max(dims, 1) <= dim < max(dims, 1):
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-max(dims, 1)}, {max(dims, 1) - 1}], but got {dim})"
        )
    return dim % max(dims, 1)


def _classes_last(logits: Logits) -> bool:
    return logits.class_dim == -1


def _sizes(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else given


def reshape(logits: Logits, *sizes: Any, shape: Sequence[int] | None = None) -> Any:
    """Return the same logits with other leading dimensions."""
    wanted = _sizes(sizes if shape is None else (shape,))
    hidden = logits.head()[0]
    if not _classes_last(logits) or not wanted or not all(isinstance(size, int) for size in wanted):
        return logits.fall_back("reshape", wanted)
    classes, rows = logits.shape[-1], hidden.shape[:-1].numel()
    same_rows = -1 not in wanted[:-1] and torch.Size(wanted[:-1]).numel() == rows
    if classes == 0 or (wanted[-1] != classes and not (wanted[-1] == -1 and same_rows)):
        return logits.fall_back("reshape", wanted)
    if not same_rows and not _inferred(wanted[:-1], rows):
        raise RuntimeError(
            f"shape '{list(wanted)}' is invalid for LazyLogits of shape {tuple(logits.shape)}, "
            f"input of size {logits.shape.numel()}"
        )
    return logits.changed(hidden=hidden.reshape(*wanted[:-1], hidden.shape[-1]), view=True)


def _inferred(leading: tuple[int, ...], rows: int) -> bool:
    """Say whether one -1 among leading sizes can be what is left of the rows."""
    known = torch.Size([size for size in leading if size != -1]).numel()
    return leading.count(-1) == 1 and known > 0 and rows % known == 0


def view(logits: Logits, *shape: Any, **kwargs: Any) -> Any:
    """Return the same logits with other leading dimensions."""
    if kwargs or (len(shape) == 1 and isinstance(shape[0], torch.dtype)):
        return logits.fall_back("view", *shape, **kwargs)
    return reshape(logits, *shape)


def view_as(logits: Logits, other: Tensor) -> Any:
    """Return the same logits with another tensor's leading dimensions."""
    return reshape(logits, tuple(other.shape))


def flatten(logits: Logits, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Return the logits with the leading dimensions from start_dim to end_dim joined."""
    dims = logits.dim()
    first, last = axis_of(start_dim, dims), axis_of(end_dim, dims)
    if first == last and dims > 0:
        return logits
    if not _classes_last(logits) or last == dims - 1 or first > last:
        return logits.fall_back("flatten", start_dim, end_dim)
    return logits.changed(hidden=logits.head()[0].flatten(first, last), view=True)


def squeeze(logits: Logits, dim: int | Sequence[int] | None = None) -> Any:
    """Return the logits without leading dimensions of size 1."""
    dims = range(logits.dim()) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    gone = tuple(at for at in (axis_of(at, logits.dim()) for at in dims) if logits.shape[at] == 1)
    if not _classes_last(logits) or logits.dim() - 1 in gone:
        return logits.fall_back("squeeze", gone)
    return logits.changed(hidden=logits.head()[0].squeeze(gone), view=True) if gone else logits


def unsqueeze(logits: Logits, dim: int) -> Any:
    """Return the logits with a leading dimension of size 1 more."""
    at = axis_of(dim, logits.dim() + 1)
    if not _classes_last(logits) or at == logits.dim():
        return logits.fall_back("unsqueeze", dim)
    return logits.changed(hidden=logits.head()[0].unsqueeze(at), view=True)


def permute(logits: Logits, *dims: Any, **kwargs: Any) -> Any:
    """Return the logits with their dimensions in another order."""
    given = tuple(kwargs["dims"]) if "dims" in kwargs else _sizes(dims)
    count = logits.dim()
    order = [axis_of(at, count) for at in given]
    if sorted(order) != list(range(count)):
        raise RuntimeError(f"permute: {tuple(given)} does not order the dimensions of {tuple(logits.shape)}")
    classes = logits.class_dim % count
    leading = [at - (at > classes) for at in order if at != classes]
    hidden = logits.head()[0].permute(*leading, count - 1)
    return logits.changed(hidden=hidden, class_dim=order.index(classes) - count, view=True)


def transpose(logits: Logits, dim0: int, dim1: int) -> Any:
    """Return the logits with two dimensions exchanged."""
    order = list(range(logits.dim()))
    first, second = axis_of(dim0, logits.dim()), axis_of(dim1, logits.dim())
    order[first], order[second] = order[second], order[first]
    return permute(logits, order)


def t(logits: Logits) -> Any:
    """Return logits of two dimensions with these exchanged."""
    return transpose(logits, 0, 1) if logits.dim() == 2 else logits.fall_back("t")


def movedim(logits: Logits, source: Any, destination: Any) -> Any:
    """Return the logits with dimensions moved."""
    count = logits.dim()
    sources, destinations = (
        [axis_of(at, count) for at in ((given,) if isinstance(given, int) else given)]
        for given in (source, destination)
    )
    if len(sources) != len(destinations) or any(len(set(at)) != len(at) for at in (sources, destinations)):
        return logits.fall_back("movedim", source, destination)
    rest = iter(at for at in range(count) if at not in sources)
    moved = dict(zip(destinations, sources, strict=True))
    return permute(logits, [moved[at] if at in moved else next(rest) for at in range(count)])


def unbind(logits: Logits, dim: int = 0) -> Any:
    """Return the slices along a leading dimension."""
    return _along(logits, "unbind", dim)


def split(logits: Logits, split_size: Any, dim: int = 0) -> Any:
    """Return pieces along a leading dimension."""
    return _along(logits, "split", dim, split_size)


def chunk(logits: Logits, chunks: int, dim: int = 0) -> Any:
    """Return a number of pieces along a leading dimension."""
    return _along(logits, "chunk", dim, chunks)


def tensor_split(logits: Logits, indices_or_sections: Any, dim: int = 0) -> Any:
    """Return pieces along a leading dimension."""
    return _along(logits, "tensor_split", dim, indices_or_sections)


def _along(logits: Logits, name: str, dim: int, *args: Any) -> Any:
    axis = axis_of(dim, logits.dim())
    if not _classes_last(logits) or axis == logits.dim() - 1:
        return logits.fall_back(name, *args, dim=dim)
    return tuple(logits.changed(hidden=part, view=True) for part in getattr(logits.head()[0], name)(*args, dim=axis))


def select(logits: Logits, dim: int, index: int) -> Any:
    """Return one slice along a dimension."""
    axis, size = axis_of(dim, logits.dim()), logits.shape[dim]
    if not -size <= index < size:
        raise IndexError(
            f"select(): index {index} out of range for tensor of size {list(logits.shape)} at dimension {dim}"
        )
    return getitem(logits, (slice(None),) * axis + (index,))


def narrow(logits: Logits, dim: int, start: Any, length: int) -> Any:
    """Return a range along a dimension."""
    axis, first = axis_of(dim, logits.dim()), int(start)
    size = logits.shape[axis]
    first = first + size if first < 0 else first
    if length < 0 or not 0 <= first <= size or first + length > size:
        raise RuntimeError(f"narrow: start {int(start)} and length {length} exceed dimension size {size}")
    return getitem(logits, (slice(None),) * axis + (slice(first, first + length),))


def index_select(logits: Logits, dim: int, index: Tensor) -> Any:
    """Return the slices along a dimension that `index` names."""
    axis = axis_of(dim, logits.dim())
    if not _classes_last(logits) or index.dim() > 1 or index.dtype not in (torch.int64, torch.int32):
        return logits.fall_back("index_select", dim, index)
    hidden, weight, bias, _ = logits.head()
    if axis < logits.dim() - 1:
        return logits.changed(hidden=hidden.index_select(axis, index))
    with opened(getattr(logits, "window", None), (weight, bias)):
        picked = None if bias is None else bias.index_select(0, index)
        return logits.changed(weight=weight.index_select(0, index), bias=picked)


def getitem(logits: Logits, index: Any) -> Any:
    """Return some rows, and of them all classes or some; both stay lazy.

    One class, and one position of each sequence (`[:, -1, :]`, which generation asks for), are computed at once.
    """
    items = index if isinstance(index, tuple) else (index,)
    if not _classes_last(logits) or not all(map(_is_plain, items)):
        return logits.fall_back("__getitem__", index)
    reach = sum(map(_reach, items))
    if reach > logits.dim() or sum(item is Ellipsis for item in items) > 1:
        return logits.fall_back("__getitem__", index)
    at = next((place for place, item in enumerate(items) if item is Ellipsis), len(items))
    items = (*items[:at], *(slice(None),) * (logits.dim() - reach), *items[at + 1 :])
    if not items or items[-1] is None or (isinstance(items[-1], Tensor) and items[-1].dim() != 1):
        return logits.fall_back("__getitem__", index)
    *leading, classes = items
    gathered = any(isinstance(item, (Tensor, list)) for item in leading)
    if not isinstance(classes, slice) and (
        gathered or any(isinstance(item, int) for item in leading) or None in leading
    ):
        return logits.fall_back("__getitem__", index)
    hidden, weight, bias, _ = logits.head()
    rows, view = hidden[(*leading, slice(None))], not gathered and isinstance(classes, slice)
    if isinstance(classes, slice) and classes.indices(weight.shape[0]) == (0, weight.shape[0], 1):
        picked = logits.changed(hidden=rows, view=view)
    else:
        with opened(getattr(logits, "window", None), (weight, bias)):
            picked = _of_classes(logits, rows, weight, bias, classes, view)
    if isinstance(classes, int):
        return logits.hand_out(picked.materialize().squeeze(-1))  # type: ignore[attr-defined] # of both kinds of logits
    if logits.dim() > 2 and leading and isinstance(leading[-1], int):
        return logits.hand_out(picked.materialize())  # type: ignore[attr-defined] # of both kinds of logits
    return picked


def _of_classes(logits: Logits, rows: Tensor, weight: Tensor, bias: Tensor | None, classes: Any, view: bool) -> Any:
    """Return the logits of some rows and classes; one class stays a dimension."""
    if isinstance(classes, int):
        size = weight.shape[0]
        if not -size <= classes < size:
            raise IndexError(f"index {classes} is out of bounds for dimension {logits.dim() - 1} with size {size}")
        classes %= size
        classes = slice(classes, classes + 1)
    few = None if bias is None else bias[classes]
    return logits.changed(hidden=rows, weight=weight[classes], bias=few, view=view)


def _is_plain(item: Any) -> bool:
    """Say whether an item of an index is one whose meaning is the same for the hidden states."""
    if item is None or item is Ellipsis or isinstance(item, slice):
        return True
    if isinstance(item, list):
        return all(isinstance(each, int) and not isinstance(each, bool) for each in item)
    if isinstance(item, Tensor):
        return item.dtype in (torch.int64, torch.int32) or (item.dtype == torch.bool and item.dim() > 0)
    return isinstance(item, int) and not isinstance(item, bool)


def _reach(item: Any) -> int:
    """Return how many dimensions an item of an index takes."""
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, Tensor) and item.dtype == torch.bool:
        return item.dim()
    return 1


def contiguous(logits: Logits, *, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
    """Return the same logits."""
    return logits


def atleast_1d(logits: Logits) -> Any:
    """Return the same logits."""
    return logits


def clone(logits: Logits, *, memory_format: torch.memory_format | None = None) -> Any:
    """Return the same logits, with a memory of their own."""
    return logits.changed()


def cpu(logits: Logits, memory_format: Any = None) -> Any:
    """Return the same logits, computed if they are on another device."""
    return to(logits, "cpu")


def float_(logits: Logits, memory_format: Any = None) -> Any:
    """Return the logits as float32."""
    return to(logits, torch.float32)


def double(logits: Logits, memory_format: Any = None) -> Any:
    """Return the logits as float64."""
    return to(logits, torch.float64)


def half(logits: Logits, memory_format: Any = None) -> Any:
    """Return the logits as float16."""
    return to(logits, torch.float16)


def bfloat16(logits: Logits, memory_format: Any = None) -> Any:
    """Return the logits as bfloat16."""
    return to(logits, torch.bfloat16)


def to(logits: Logits, *args: Any, **kwargs: Any) -> Any:
    """Return the logits in another floating dtype; on another device they are computed first."""
    dtype, device, copies = kwargs.get("dtype"), kwargs.get("device"), bool(kwargs.get("copy"))
    for place, given in enumerate((*args, kwargs.get("other"))):
        if isinstance(given, torch.dtype):
            dtype = given
        elif isinstance(given, Tensor):
            dtype, device = given.dtype, given.device
        elif isinstance(given, bool):  # non_blocking, and after it copy
            copies = copies or (given and place > 0 and isinstance(args[place - 1], bool))
        elif isinstance(given, (torch.device, str, int)):
            device = given
    if not is_here(logits.device, device) or (dtype is not None and not dtype.is_floating_point):
        return logits.fall_back("to", *args, **kwargs)
    if dtype in (None, logits.dtype):
        return logits.changed() if copies else logits
    return logits.changed(dtype=dtype)


def type_as(logits: Logits, other: Tensor) -> Any:
    """Return the logits in another tensor's dtype."""
    return to(logits, other.dtype)


MOVES: dict[str, Callable[..., Any]] = {
    "reshape": reshape,
    "view": view,
    "view_as": view_as,
    "reshape_as": view_as,
    "flatten": flatten,
    "squeeze": squeeze,
    "unsqueeze": unsqueeze,
    "permute": permute,
    "transpose": transpose,
    "swapaxes": transpose,
    "swapdims": transpose,
    "t": t,
    "movedim": movedim,
    "moveaxis": movedim,
    "unbind": unbind,
    "split": split,
    "chunk": chunk,
    "tensor_split": tensor_split,
    "select": select,
    "narrow": narrow,
    "index_select": index_select,
    "__getitem__": getitem,
    "contiguous": contiguous,
    "atleast_1d": atleast_1d,
    "clone": clone,
    "cpu": cpu,
    "float": float_,
    "double": double,
    "half": half,
    "bfloat16": bfloat16,
    "to": to,
    "type_as": type_as,
}
