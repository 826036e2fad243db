"""What stands for a tensor without being one: the part of LazyLogits that knows nothing of logits."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

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

    It is a plain object, which no C++ code can take for a tensor without data, and it says it is a `torch.Tensor`
    to `isinstance`, as proxies do: accelerate and transformers ask before they gather, pad or detach an output.
    Nothing can be written into it.
    """

    __slots__ = ()

    @property  # type: ignore[misc] # a proxy's class is read-only
    def __class__(self) -> type:
        """Return torch.Tensor, but to the compiler, which needs the truth to trace."""
        return type(self) if torch.compiler.is_compiling() else Tensor

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

    @property
    def grad_fn(self) -> None:
        """None: what the tensor is made of has a graph, it has none yet."""
        return

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Return the shape, or one size of it."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Return how many numbers the tensor would be."""
        return self.shape.numel()

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
        if name in _COMMUTATIVE and not isinstance(args[0], TensorProxy):
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
        one_row = self.dim() > 1 and self.shape[-2] == 1
        if self.nbytes > _SMALL_BYTES and not one_row:
            warnings.warn(
                f"{operation} computes all of {type(self).__name__} with {self.shape[-1]} classes; "
                "call .materialize() to say that this is meant",
                MaterializeWarning,
                stacklevel=_frames_to_caller(),
            )
        return self.materialize()


def as_tensor(value: Tensor, operation: str) -> Tensor:
    """Return a tensor as it is, and what a proxy stands for."""
    return value._dense(operation) if isinstance(value, TensorProxy) else value


_COMMUTATIVE = ("mul", "multiply", "add")


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


def _frames_to_caller() -> int:
    """Return the `stacklevel` of the first frame outside logitless and torch."""
    if torch.compiler.is_compiling():
        return 2
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("logitless", "torch"):
        level, frame = level + 1, frame.f_back
    return level
