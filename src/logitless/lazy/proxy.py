"""What stands for a tensor: the plain object that does so in graphs being traced, and what all such share."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from logitless._rules.reduction import count_of

# Tensors up to this size are computed without a warning: a prompt's last row, a test's toy model.
_SMALL_BYTES = 2**20


# What a function of torch means for logits that are not built; filled by the modules that know.
_MEANINGS: dict[Callable[..., Any], Callable[..., Any]] = {}


def give_meaning(function: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """Let torch's function mean `ours` for a proxy."""
    _MEANINGS[function] = ours


def meaning_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what torch's function means for a proxy."""
    return _MEANINGS[function]


class MaterializeWarning(UserWarning):
    """An operation computed all the logits of LazyLogits; as an error, it proves that none did."""


class TensorProxy:
    """A tensor not computed yet: operations it has a method for are the method's, others compute it.

    It is a plain object, for graphs that are being traced and function transforms, where a `LazyTensor` cannot be. No
    C++ code takes it for a tensor: `isinstance(proxy, torch.Tensor)` is False. Nothing can be written into it.
    """

    __slots__ = ()

    @property
    def shape(self) -> torch.Size:
        """The shape the tensor would have."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the tensor would have."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device the tensor would be on."""
        raise NotImplementedError

    def materialize(self) -> Tensor:
        """Return the tensor."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes the tensor would be."""
        return self.numel() * self.dtype.itemsize

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Return the shape, or one size of it."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Return how many numbers the tensor would be."""
        return count_of(self.shape)

    def element_size(self) -> int:
        """Return how many bytes one number would be."""
        return self.dtype.itemsize

    def is_floating_point(self) -> bool:
        """Return True."""
        return True

    def is_contiguous(self) -> bool:
        """Return True: the tensor, once computed, is."""
        return True

    def __len__(self) -> int:
        """Return the first size."""
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the first dimension."""
        return (self[place] for place in range(self.shape[0]))

    def __getitem__(self, index: Any) -> Any:
        """Return some of it."""
        return self._dense("indexing")[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        """Raise: there is no memory to write to."""
        raise TypeError(f"{type(self).__name__} cannot be written into: call .materialize() first")

    __hash__ = object.__hash__

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """Return the tensor as a numpy array."""
        return self._dense("numpy").__array__(dtype)

    def __getattr__(self, name: str) -> Any:
        """Return what a tensor has under this name, by way of the tensor."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        if name in ("retain_grad", "register_hook") or (name.endswith("_") and not name.endswith("__")):
            raise TypeError(f"{name}: {type(self).__name__} has no memory to change; call .materialize() first")
        if name.startswith("new_"):
            return getattr(torch.empty((), dtype=self.dtype, device=self.device), name)
        if not callable(getattr(Tensor, name)):
            empty = torch.empty((0,) * self.dim(), dtype=self.dtype, device=self.device)
            told = getattr(empty, name)
            return getattr(self._dense(name), name) if isinstance(told, Tensor) else told

        def method(*args: Any, **kwargs: Any) -> Any:
            return getattr(self._dense(name), name)(*args, **kwargs)

        return method

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Send `torch.name(proxy, ...)` to the proxy's method of that name, or compute the proxy for it."""
        kwargs = dict(kwargs or {})
        name = func.__name__
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        if name in COMMUTATIVE and not isinstance(args[0], TensorProxy) and kwargs.get("alpha", 1) == 1:
            args = (args[1], args[0], *args[2:])
        if args and isinstance(args[0], TensorProxy) and any(name in vars(kind) for kind in type(args[0]).__mro__[:-1]):
            return getattr(args[0], name)(*args[1:], **kwargs)

        def dense(value: Any) -> Any:
            if isinstance(value, TensorProxy):
                return value._dense(name)
            return type(value)(map(dense, value)) if type(value) in (list, tuple) else value

        return func(*map(dense, args), **{key: dense(value) for key, value in kwargs.items()})

    def _dense(self, operation: str) -> Tensor:
        """Return the tensor for an operation that needs all of it, and say so unless it is small."""
        warn_of_computing(operation, type(self).__name__.replace("Traced", "Lazy"), self.shape, self.dtype)
        return self.materialize()

    def fall_back(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Return what the tensor's method of that name gives."""
        return getattr(self._dense(name.strip("_")), name)(*args, **kwargs)


def warn_of_computing(operation: str, kind: str, shape: torch.Size, dtype: torch.dtype) -> None:
    """Say that an operation computes all of a lazy tensor, unless it is small or one row a sequence.

    In a backward pass it was said by the forward.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        return
    if not _are_few(shape, dtype):
        size = f"{shape[-1]} classes" if shape else "no dimension"
        instead = "; logitless.entropy(logits) is the entropy, and computes none" if operation in _OF_ENTROPIES else ""
        warnings.warn(
            f"{operation} computes all of {kind} with {size}; call .materialize() to say that this is meant{instead}",
            MaterializeWarning,
            stacklevel=_frames_to_caller(),
        )


_OF_ENTROPIES = ("softmax", "exp")


def _are_few(shape: torch.Size, dtype: torch.dtype) -> bool:
    one_row = len(shape) > 1 and shape[-2] == 1
    return one_row or shape.numel() * dtype.itemsize <= _SMALL_BYTES


# Whose operands change places where the second is the lazy one.
COMMUTATIVE = frozenset(("mul", "multiply", "add", "__mul__", "__rmul__", "__add__", "__radd__"))


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: TensorProxy, *args: Any) -> Any:
        return getattr(self._dense(name.strip("_")), name)(*args)

    operate.__doc__ = f"Return the tensor's `{name}`."
    operate.__name__ = name
    return operate


for _name in (
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__bool__", "__float__", "__int__", "__abs__"),
    *("__neg__", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__"),
    *("__floordiv__", "__rfloordiv__", "__mod__", "__rmod__", "__pow__", "__rpow__", "__matmul__", "__rmatmul__"),
):
    setattr(TensorProxy, _name, _operator(_name))


def callers_line() -> str:
    """Return the place of the first frame outside logitless and torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("logitless", "torch"):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _frames_to_caller() -> int:
    """Return the `stacklevel` of the first frame outside logitless and torch."""
    if torch.compiler.is_compiling():
        return 2
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("logitless", "torch"):
        level, frame = level + 1, frame.f_back
    return level
