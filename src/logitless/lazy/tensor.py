"""Tensors that torch owns and that are not computed: what all lazy tensors share.

A `LazyTensor` has a shape, a dtype, a device and a `grad_fn`, and no memory. What is asked of it meets two walls. The
first, `__torch_function__`, knows functions by their names in Python: those with a lazy or an efficient form are
methods of ours. The second, `__torch_dispatch__`, lies below autograd, where all C++ code arrives: copies stay lazy,
writes raise, views are `LazyView`s, and anything else computes the values. Gradients come right by construction: an
operation that computed the values is torch's own node above, whose dense gradient arrives at the head's (see `pack`).
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils.weak import WeakIdKeyDictionary

from logitless._heads.window import Window, is_freed, opened
from logitless._rules.transforms import hold_data, transform_reason
from logitless.lazy.gradient import Form, LazyGradient, aten, without_memory
from logitless.lazy.pack import Parts, Settings, unpack, write
from logitless.lazy.proxy import COMMUTATIVE, TensorProxy, callers_line, warn_of_computing
from logitless.lazy.staleness import Marks

no_torch_functions = torch._C.DisableTorchFunctionSubclass


class _Memory:
    """How often the memory was written that dense tensors would share with their views."""

    __slots__ = ("handed_out", "writes")

    def __init__(self) -> None:
        self.writes = 0
        # Values computed of what is a view of dense tensors, with their versions: who writes to them writes to it.
        self.handed_out: list[tuple[Tensor, int]] = []


class LazyTensor(Tensor):
    """A tensor with a form and parts, and no memory."""

    form: Form
    raw: tuple[Tensor | None, ...]  # the parts without a graph: values to read
    given: tuple[Tensor | None, ...]  # the parts as they were given, with the graph they had
    wanted: tuple[bool, ...]  # which parts a gradient is wanted of
    settings: Settings
    window: Window | None
    _marks: Marks
    _memory: _Memory
    _writes_seen: int
    _unpacked: tuple[Any, tuple[Tensor | None, ...]] | None

    @staticmethod
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Raise: a lazy tensor has no values to be made of."""
        raise TypeError(f"{cls.__name__} is made by logitless.linear(hidden, weight)")

    # What a kind of lazy tensors tells

    @classmethod
    def form_of_parts(cls, parts: Parts, settings: Settings) -> Form:
        """Return what the tensor is from outside."""
        raise NotImplementedError

    @classmethod
    def dense_values(cls, parts: Parts, settings: Settings) -> Tensor:
        """Return the values, differentiable in the parts."""
        raise NotImplementedError

    def cast_below_autograd(self, dtype: torch.dtype) -> Any:
        """Return the same in another dtype, without a graph; None where a cast computes it."""
        return None

    # How one comes to be

    @classmethod
    def made(cls, parts: Parts, wanted: Sequence[bool], settings: Settings, window: Window | None) -> Any:
        """Return the lazy tensor of these parts, without a graph."""
        form = cls.form_of_parts(parts, settings)
        lazy = without_memory(cls, form)
        lazy.form, lazy.window, lazy._memory = form, window, _Memory()
        lazy._take(parts, wanted, settings)
        return lazy

    def _take(self, parts: Parts, wanted: Sequence[bool], settings: Settings) -> None:
        self.raw = self.given = tuple(parts)
        self.wanted, self.settings = tuple(wanted), settings
        self._marks = Marks(self.raw)
        self._unpacked = None
        self._writes_seen = self._memory.writes

    def take_written(self, parts: Parts, wanted: Sequence[bool], settings: Settings) -> None:
        """Become what a write makes of it."""
        self._memory.writes += 1
        self._take(parts, wanted, settings)

    def write(self, new: LazyTensor) -> Any:
        """Take another's value in place, as autograd knows in-place operations."""
        with no_torch_functions():
            if self.requires_grad and not torch.is_grad_enabled():
                raise TypeError(
                    f"{type(self).__name__} that require a gradient are written into under no_grad, at "
                    f"{callers_line()}: make them under no_grad too, or give the result a name of its own (z = z / 2)"
                )
            if any(_holders(values) > _OURS for values, _ in self._memory.handed_out):
                raise TypeError(
                    f"{type(self).__name__} of which a class or a position was computed are written into, at "
                    f"{callers_line()}: those values would not change with it; write first, or give the result a name"
                )
            given = new.given
            write(self, new.settings, *new.parts())
            self.given = given
        return self

    def share_memory_of(self, other: LazyTensor) -> Any:
        """Return this tensor, as what dense tensors call a view of the other."""
        self._memory, self._writes_seen = other._memory, other._writes_seen
        return self

    def hand_out(self, values: Tensor) -> Tensor:
        """Return values that are a view of a dense tensor, and remember them: a write to them is a write to it."""
        with torch.no_grad():
            alias = values.detach()
        if not alias.is_inference():
            handed_out = self._memory.handed_out
            # What only this list still holds, and nobody wrote to, nobody can write to.
            handed_out[:] = [(t, seen) for t, seen in handed_out if t._version != seen or _holders(t) > _OURS]
            handed_out.append((alias, alias._version))
        return values

    # What it is made of

    def check(self) -> None:
        """Raise if what it stands for changed since it was made, or is gone."""
        memory = self._memory
        written = memory.writes != self._writes_seen
        if memory.handed_out and not written:
            written = any(t._version != seen for t, seen in memory.handed_out)
        if written:
            raise RuntimeError(
                f"{type(self).__name__} were written into through another view of them since this one was made (dense "
                "ones share memory): make this view after the write, or call .materialize() before both"
            )
        self._marks.check(self.raw, sharded=self.window is not None)
        if self.window is None and is_freed(self.raw[1]):
            raise RuntimeError(
                f"the head's parameters were freed since these {type(self).__name__} were made (their module is "
                "sharded on its own): compute the loss inside that module's forward, or shard the head with the root"
            )

    def parts(self) -> tuple[Tensor | None, ...]:
        """Return the parts, attached to this tensor's graph."""
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break(
                msg="lazy logits made outside a compiled function are read outside it: for fullgraph=True give it the "
                "hidden states and the head's weight, and call logitless.linear in it; or compile without fullgraph"
            )
            return _parts_outside(self)
        self.check()
        if not torch.is_grad_enabled():
            return self.raw
        with no_torch_functions():
            if not self.requires_grad:
                return self.raw
            if transform_reason(*self.raw) is not None:
                return self.given
            node = self.grad_fn
            if node is None:  # a leaf: kept, its parts would keep it alive
                return cast("tuple[Tensor | None, ...]", unpack(self))
            if self._unpacked is None or self._unpacked[0] is not node:
                self._unpacked = (node, unpack(self))
            return self._unpacked[1]

    def materialize(self) -> Tensor:
        """Return the values as a tensor, all of them."""
        parts = self.parts()
        with opened(self.window, parts):
            return type(self).dense_values(parts, self.settings)

    def computed(self, operation: str, *, told: bool = False) -> Tensor:
        """Return the values without a graph, for an operation that needs them all; say so unless told, or few."""
        self.check()
        if not told:
            warn_of_computing(operation, type(self).__name__, self.form.shape, self.form.dtype)
        with torch.no_grad(), opened(self.window, self.raw):
            return type(self).dense_values(self.raw, self.settings)

    def fall_back(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Return what torch's method of that name gives: the second wall decides."""
        with no_torch_functions():
            return getattr(Tensor, name)(self, *args, **kwargs)

    def _dense(self, operation: str) -> Tensor:
        warn_of_computing(operation, type(self).__name__, self.form.shape, self.form.dtype)
        return self.materialize()

    def same(self) -> Any:
        """Return another lazy tensor of the same parts, without a graph."""
        self.check()
        return type(self).made(self.raw, self.wanted, self.settings, self.window)

    # What is asked often, without the walls

    @property
    def shape(self) -> torch.Size:  # type: ignore[override] # an attribute of torch's
        """The shape."""
        return self.form.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override] # an attribute of torch's
        """The dtype of the values."""
        return self.form.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override] # an attribute of torch's
        """The device the values would be on."""
        return self.form.device

    @property
    def ndim(self) -> int:  # type: ignore[override] # an attribute of torch's
        """The number of dimensions."""
        return len(self.form.shape)

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.form.shape)

    @property
    def data(self) -> Any:
        """The same without a graph; a write to it is one to this tensor."""
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        raise TypeError(
            f"{type(self).__name__} have no memory to replace, at {callers_line()}: give the new values a name"
        )

    # What leaves torch

    def __copy__(self) -> Any:
        """Return another of the same parts, and the same memory."""
        with no_torch_functions():
            return Tensor.view_as(self, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return one of copied parts; as of any tensor only where no graph leads here."""
        if id(self) in memo:
            return memo[id(self)]
        with no_torch_functions():
            if self.requires_grad and not self.is_leaf:
                raise RuntimeError(
                    "Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol at the "
                    "moment: use .detach() first"
                )
            self.check()
            parts = [copy.deepcopy(part, memo) for part in self.raw]
            twin = type(self).made(parts, self.wanted, self.settings, None).requires_grad_(self.requires_grad)
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the parts, or as the values where those are smaller."""
        self.check()
        parts = [None if part is None else _cut_out(part) for part in self.raw]
        with no_torch_functions():
            requires_grad = self.requires_grad
        if self.form.shape.numel() * self.form.dtype.itemsize < sum(p.nbytes for p in parts if p is not None):
            with torch.no_grad():
                values = type(self).dense_values(self.raw, self.settings)
            return values.requires_grad_(requires_grad).__reduce_ex__(protocol)
        return _again, (type(self), parts, self.wanted, self.settings, requires_grad)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """Return the values as an array that cannot be written to."""
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def numpy(self, *, force: bool = False) -> Any:
        """Return the values as an array that cannot be written to."""
        array = self._dense("numpy").numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        """Return the values as nested lists."""
        return self._dense("tolist").tolist()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: a write to what this gave would be lost."""
        raise TypeError(f"{type(self).__name__} have no memory to share by dlpack, at {callers_line()}: {_FIX}")

    def __dlpack_device__(self) -> Any:
        """Raise, as `__dlpack__` does."""
        return self.__dlpack__()

    def untyped_storage(self) -> Any:
        """Raise: there is none."""
        raise TypeError(f"{type(self).__name__} have no memory, at {callers_line()}: {_FIX}")

    def storage(self) -> Any:
        """Raise: there is none."""
        return self.untyped_storage()

    def _typed_storage(self) -> Any:
        return self.untyped_storage()

    def new_tensor(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return a tensor of these values, of this dtype and device."""
        return self._like_this().new_tensor(*args, **kwargs)

    def new(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override] # overloads of torch's
        """Return a tensor of this dtype and device."""
        made: Tensor = self._like_this().new(*args, **kwargs)
        return made

    def _like_this(self) -> Tensor:
        return torch.empty(0, dtype=self.form.dtype, device=self.form.device)

    def resize_as(self, other: Tensor) -> Any:
        """Return them in another shape."""
        return cast("Any", self).reshape(other.shape)

    def share_memory_(self) -> Any:
        """Raise: there is no memory to share."""
        raise TypeError(f"{type(self).__name__} have no memory to share with processes, at {callers_line()}: {_FIX}")

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the first dimension."""
        return iter(self.unbind(0))

    # The walls

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Send a function to the method of its name, if we have one."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if _holds_lazy(kwargs.get("out")):
            raise TypeError(f"{name}: lazy logits have no memory to write to, at {callers_line()}: {_FIX}")
        if not args and isinstance(kwargs.get("input"), LazyTensor):
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)
        if args and "out" not in kwargs and name not in ("__get__", "__set__", "__delete__"):
            first = args[0]
            if (
                name in COMMUTATIVE
                and len(args) == 2
                and not isinstance(first, LazyTensor)
                and kwargs.get("alpha", 1) == 1
            ):
                first, args = args[1], (args[1], first)
            if isinstance(first, LazyTensor):
                method = _method(type(first), name)
                if method is not None:
                    return method(*args, **kwargs)
        with no_torch_functions():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch's stub is of a static method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer what arrives below autograd."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, LazyTensor):
            copied = _copy(func, first, args, kwargs)
            if copied is not None:
                return copied
            empty = _without_values(func, first, args, kwargs)
            if empty is not None:
                return empty
        if _may_write(func):
            _refuse_writes(func, args, kwargs)
        elif isinstance(first, LazyTensor) and _is_view(func):
            return LazyView.of(first, func, args[1:], kwargs)
        name = func.overloadpacket.__name__.strip("_")
        # p * log p: its first factor has said what the second would say again.
        told = func.overloadpacket is aten.mul and any(isinstance(v, Tensor) and v in _PROBABILITIES for v in args)

        def dense(value: Any) -> Any:
            if isinstance(value, LazyTensor):
                return value.computed(name, told=told)
            if isinstance(value, LazyGradient):
                raise TypeError(f"{name}: mixes lazy logits and a gradient of lazy logits, at {callers_line()}")
            return type(value)(map(dense, value)) if type(value) in (list, tuple) else value

        result = func(*map(dense, args), **{key: dense(value) for key, value in kwargs.items()})
        if func.overloadpacket in (aten._softmax, aten.exp):
            _PROBABILITIES[result] = None
        return result


_PROBABILITIES: Any = WeakIdKeyDictionary()  # what was computed of lazy tensors, as long as it lives
_FIX = "write to z.materialize(), or take lazy_head's handle off the model there (handle.remove())"
# Views by another name; and views that are of another kind than their base, or have other elements.
_VIEWS = frozenset((aten.unsafe_split, aten.unsafe_split_with_sizes, aten.unsafe_chunk))
_NO_VIEWS = frozenset((aten._neg_view, aten._conj, aten._nested_view_from_buffer, aten._nested_view_from_jagged))
_STATISTICS = frozenset(("running_mean", "running_var"))  # which normalisations write to, though their schemas hide it


@functools.cache
def _may_write(func: Any) -> bool:
    schema = func._schema
    return schema.is_mutable or func.namespace == "c10d" or any(a.name in _STATISTICS for a in schema.arguments)


def _is_view(func: Any) -> bool:
    packet = func.overloadpacket
    if packet in _NO_VIEWS:
        raise TypeError(
            f"{packet.__name__}: lazy logits have no such view, at {callers_line()}: give it z.materialize(), or take "
            "lazy_head's handle off the model there (handle.remove())"
        )
    return packet in _VIEWS or any(given.alias_info is not None for given in func._schema.returns)


def _written_in_place(name: str) -> Callable[..., Any]:
    def operate(self: LazyTensor, other: Any) -> Any:
        # Not torch's own, whose TypeError Python takes for "not implemented": z -= 1 would then give z another tensor.
        raise TypeError(
            f"{name}: {type(self).__name__} cannot be written into so, at {callers_line()}: {_FIX}, or give the result "
            "a name of its own"
        )

    operate.__name__ = name
    operate.__doc__ = f"Raise for `{name}`: there is no memory to write to."
    return operate


for _name in ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(LazyTensor, f"__i{_name}__", _written_in_place(f"__i{_name}__"))
LazyTensor.__imatmul__ = _written_in_place("__imatmul__")  # type: ignore[attr-defined] # torch has none


# What torch makes by a tensor's dispatch key, which is no backend's here.
_BY_BACKEND = frozenset(("new", "new_tensor", "resize_as"))
_METHODS: dict[tuple[type, str], Any] = {}


def _method(kind: type, name: str) -> Any:
    """Return the method of ours by that name, or None where torch's is not ours to change."""
    key = (kind, name)
    if key not in _METHODS:
        kinds = kind.__mro__[: kind.__mro__.index(LazyTensor) + (name in _BY_BACKEND)]
        ours = (vars(base).get(name) for base in kinds)
        _METHODS[key] = next((method for method in ours if callable(method)), None)
    return _METHODS[key]


def _copy(func: Any, lazy: LazyTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the lazy tensor that an operation which only copies gives, or None if it is none."""
    packet = func.overloadpacket
    if packet in (aten.detach, aten.alias, aten.lift_fresh):
        return lazy.same().share_memory_of(lazy)
    if packet in (aten.view, aten._unsafe_view, aten.expand) and len(args) > 1 and not isinstance(args[1], torch.dtype):
        return lazy.same().share_memory_of(lazy) if tuple(args[1]) == tuple(lazy.form.shape) else None
    if isinstance(lazy, LazyView):
        return None  # computed, with strides of its own
    if packet is aten.clone:
        return lazy.same()
    if packet is not aten._to_copy:
        return None
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    if not is_here(lazy.form.device, device) or not (dtype is None or dtype.is_floating_point):
        return None
    return lazy.same() if dtype is None else lazy.cast_below_autograd(dtype)


_OURS = 2  # holders of memory that only an alias of ours, and the count itself, hold


def _holders(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def is_here(device: torch.device, asked: torch.device | str | int | None) -> bool:
    """Say whether a device asked for is where a tensor is."""
    if asked is None:
        return True
    place = torch.device(asked)
    return place.type == device.type and place.index in (None, device.index)


_LIKE = frozenset((aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like))
_LIKE |= frozenset((aten.randint_like, aten.empty_permuted))
_NEW = frozenset((aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty_strided))
_NEW |= frozenset((aten.is_pinned,))


def _without_values(func: Any, lazy: LazyTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what an operation gives that asks only what the tensor is, not what is in it; None for others."""
    packet = func.overloadpacket
    if packet not in _LIKE and packet not in _NEW:
        return None
    shape, dtype, device = lazy.form
    stand_in = torch.empty(1 if packet in _LIKE else 0, dtype=dtype, device=device)
    return func(stand_in.expand(shape) if packet in _LIKE else stand_in, *args[1:], **kwargs)


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name = func.overloadpacket.__name__
    collective = func.namespace == "c10d" and name.endswith("_")  # whose schemas do not say that the first is written
    for place, argument in enumerate(func._schema.arguments):
        hidden = argument.name in _STATISTICS or (collective and place == 0)
        written = hidden if argument.alias_info is None else argument.alias_info.is_write
        if written and _holds_lazy(args[place] if place < len(args) else kwargs.get(argument.name)):
            raise TypeError(f"{name}: lazy logits have no memory to write to, at {callers_line()}: {_FIX}")


def _holds_lazy(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_lazy, value))
    return isinstance(value, LazyTensor)


def _cut_out(part: Tensor) -> Tensor:
    """Return a part that takes no more memory with it than it has values."""
    return part.clone() if part.untyped_storage().nbytes() > part.nbytes else part


def _again(
    kind: type[LazyTensor], parts: Parts, wanted: Sequence[bool], settings: Settings, requires_grad: bool
) -> Any:
    with no_torch_functions():
        return kind.made(parts, wanted, settings, None).requires_grad_(requires_grad)


@_disable_dynamo  # torch.compiler.disable would import the compiler, half a second, with the package
def _parts_outside(lazy: LazyTensor) -> tuple[Tensor | None, ...]:
    """Read a lazy tensor that was made outside a compiled function, outside it: the graph breaks here."""
    return lazy.parts()


class LazyView(LazyTensor):
    """A view of a lazy tensor that has no lazy form of its own (a diagonal, one class, a reshape over the classes).

    It is computed when it is read, and cannot be written to, so nothing is written and lost. It is made below
    autograd, which knows it as a view; its gradients are dense.
    """

    @classmethod
    def of(cls, base: LazyTensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the view, or the views, that an operation of torch gives of a lazy tensor."""
        base.check()
        like = func(torch.empty(base.form.shape, dtype=base.form.dtype, device="meta"), *args, **kwargs)
        many = isinstance(like, (list, tuple))
        made = []
        for place, one in enumerate(like if many else [like]):
            form = Form(one.shape, one.dtype, base.form.device)
            view = without_memory(cls, form, one.stride())
            view.form, view.window, view._memory = form, base.window, base._memory
            view._take(base.raw, base.wanted, (type(base), base.settings, func, args, kwargs, place if many else None))
            made.append(view.share_memory_of(base))
        return type(like)(made) if many else made[0]

    @classmethod
    def dense_values(cls, parts: Parts, settings: Settings) -> Tensor:
        """Return the view of the base's values."""
        kind, inner, func, args, kwargs, place = settings
        views = func(kind.dense_values(parts, inner), *args, **kwargs)
        result: Tensor = views if place is None else views[place]
        return result

    def same(self) -> Any:
        """Return another view of the same."""
        return LazyView.of(self, aten.alias.default, (), {})

    def parts(self) -> tuple[Tensor | None, ...]:
        """Raise: no gradient of parts reaches a view."""
        raise NotImplementedError

    def materialize(self) -> Tensor:
        """Return the values as a tensor."""
        with no_torch_functions(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Tensor.mul(self, 1)

    def _dense(self, operation: str) -> Tensor:
        warn_of_computing(operation, type(self).__name__, self.form.shape, self.form.dtype)
        return self.materialize()


def as_tensor(value: Any, operation: str) -> Any:
    """Return a tensor as it is, and what a lazy one stands for."""
    return value._dense(operation) if isinstance(value, (TensorProxy, LazyTensor)) else value


def is_eager(*parts: Tensor | None) -> bool:
    """Say whether a lazy tensor of these parts can be one of torch's: outside traced graphs and transforms."""
    if torch.compiler.is_compiling():
        return False
    tensors = [part for part in parts if part is not None]
    return transform_reason(*tensors) is None and hold_data(*tensors)
