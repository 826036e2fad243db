"""Logits that are never built: `linear` returns them as a lazy tensor that every loss and measure accepts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless._heads import picks
from logitless._heads.fold import fold_gradients
from logitless._heads.rows import HeadRows
from logitless._heads.window import Window, is_freed, opened
from logitless._rules import dispatch
from logitless._rules.precision import check_real, no_autocast, under_autocast
from logitless._rules.reduction import count_of
from logitless._rules.targets import first_outside
from logitless._rules.transforms import may_be_waited_for, values_are_readable
from logitless.lazy.class_fills import classes_filled, classes_of_mask
from logitless.lazy.gradient import Form
from logitless.lazy.moves import MOVES, axis_of
from logitless.lazy.pack import Parts, Settings, pack
from logitless.lazy.proxy import TensorProxy, callers_line, meaning_of
from logitless.lazy.staleness import check_versions, versions_in_graph
from logitless.lazy.tensor import LazyTensor, is_eager, no_torch_functions


class HeadLogits:
    """The methods of logits that are not computed: LazyLogits are a tensor with them, TracedLogits a plain object.

    Casts, scaling by a number or a 0-d tensor, a tanh softcap, sums of two heads, and whatever moves or picks rows stay
    lazy. `argmax`, `max`, `topk` and `logsumexp` over the classes, and `gather` of a few of them, are computed without
    the logits. What is no method here is torch's, and computes all the logits.

    The classes come last but after a permutation: `transpose(1, 2)` keeps them lazy for `cross_entropy`, which takes
    them so, and for another permutation.
    """

    __slots__ = ()

    # What the two kinds tell: `head()` gives hidden, weight, bias and scale, attached to the graph of these logits;
    # `changed` the same logits with other parts or settings (`view`: what dense logits would share memory with);
    # `fall_back` what torch's method of a name gives; `hand_out` marks values that dense logits share memory with.
    head: Callable[[], tuple[Tensor, Tensor, Tensor | None, float | Tensor]]
    changed: Callable[..., Any]
    fall_back: Callable[..., Any]
    hand_out: Callable[[Tensor], Tensor]

    # What they would be

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return self.shape[self.class_dim]  # type: ignore[attr-defined, no-any-return] # of both kinds

    @property
    def _last(self) -> bool:
        return self.class_dim == -1  # type: ignore[attr-defined, no-any-return] # of both kinds

    @property
    def _axis(self) -> int:
        return self.class_dim % len(self.shape)  # type: ignore[attr-defined, no-any-return] # of both kinds

    @property
    def mT(self) -> Any:  # noqa: N802 # torch's name
        """The logits with their last two dimensions exchanged."""
        return MOVES["transpose"](self, -1, -2)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Say what the logits would be and what they are made of."""
        z: Any = self
        parts = [
            f"shape={tuple(z.shape)}",
            f"dtype={z.dtype}",
            f"hidden={tuple(z.hidden.shape)}",
            f"weight={tuple(z.weight.shape)}",
        ]
        if z.bias is not None:
            parts.append("bias=True")
        if isinstance(z.scale, Tensor) or z.scale != 1.0:
            parts.append(f"scale={z.scale.item() if isinstance(z.scale, Tensor) else z.scale}")
        if z.softcap is not None:
            parts.append(f"softcap={z.softcap}")
        if z.device.type != "cpu":
            parts.append(f"device='{z.device}'")
        if z.requires_grad:
            parts.append("requires_grad=True")
        return f"LazyLogits({', '.join(parts)})"

    # What they are computed by

    def rows(self) -> HeadRows:
        """Return the logits as rows to be made tile by tile."""
        z: Any = self
        if not self._last:
            raise ValueError(
                f"LazyLogits of shape {tuple(z.shape)} have their classes in dimension {self._axis}, not last: "
                "use .movedim(1, -1), or cross_entropy, which takes them so"
            )
        hidden, weight, bias, scale = self.head()
        return _rows_of(hidden, weight, bias, scale, z.softcap, getattr(z, "window", None))

    def classes_last(self) -> Any:
        """Return the logits with the classes moved to the last dimension."""
        return self if self._last else self.changed(class_dim=-1, view=True)

    def picked(self, name: str, pick: Callable[..., Any], *args: Any, dtype: torch.dtype | None = None) -> Any:
        """Return what a function of `_heads.picks` reads of the rows, in the leading shape; `name` is the method's."""
        z: Any = self.classes_last()
        rows, leading = z.rows(), z.shape[:-1]
        read = pick(dispatch.pick(name, rows.tensors), rows, z.dtype if dtype is None else dtype, *args)
        values = read if isinstance(read, tuple) else (read,)
        shaped = tuple(value.view((*leading, *value.shape[1:])) for value in values)
        return shaped if isinstance(read, tuple) else shaped[0]

    def log_softmax(self, dim: int | None = None, dtype: torch.dtype | None = None, *, _stacklevel: int = 3) -> Any:
        """Return the log-probabilities, lazy too: `gather` and `sum` over the classes do not compute them all.

        `_stacklevel` is what `F.log_softmax` passes on.
        """
        if not self._last or not self._is_class_dim(dim):
            return self.fall_back("log_softmax", dim, dtype=dtype)
        logits = self if dtype is None else MOVES["to"](self, dtype)
        return meaning_of(F.log_softmax)(logits) if isinstance(logits, HeadLogits) else logits.log_softmax(-1)

    def _is_class_dim(self, dim: Any) -> bool:
        """Say whether a dimension is the classes'; logits of no class are computed, for which no kernel is made."""
        z: Any = self
        return isinstance(dim, int) and axis_of(dim, z.dim()) == self._axis and self.num_classes > 0

    def argmax(self, dim: int | None = None, keepdim: bool = False) -> Any:
        """Return the top class of each row without the logits, for the classes' dimension."""
        if not self._is_class_dim(dim):
            return self.fall_back("argmax", dim, keepdim)
        top = self.picked("argmax", picks.argmax)
        return top.unsqueeze(self._axis) if keepdim else top

    def max(self, dim: Any = None, keepdim: bool = False) -> Any:
        """Return the largest logit of each row and its class without the logits, for the classes' dimension."""
        if not self._is_class_dim(dim):
            return self.fall_back("max") if dim is None else self.fall_back("max", dim, *([keepdim] if keepdim else []))
        values, indices = self.picked("max", picks.largest)
        if keepdim:
            values, indices = values.unsqueeze(self._axis), indices.unsqueeze(self._axis)
        return torch.return_types.max((values, indices))

    def topk(self, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        """Return the k largest logits of each row and their classes without the logits."""
        if not self._last or not self._is_class_dim(dim) or not 0 <= k <= self.num_classes:
            return self.fall_back("topk", k, dim, largest, sorted)
        values, indices = self.picked("topk", picks.topk, k, largest, sorted)
        return torch.return_types.topk((values, indices))

    def logsumexp(self, dim: Any, keepdim: bool = False) -> Any:
        """Return the log-sum-exp of each row without the logits, for the classes' dimension."""
        axis = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
        if not self._is_class_dim(axis):
            return self.fall_back("logsumexp", dim, keepdim)
        value = self.picked("logsumexp", picks.logsumexp)
        return value.unsqueeze(self._axis) if keepdim else value

    def gather(self, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
        """Return the logits of the classes that `index` names, made with the others a tile at a time."""
        z: Any = self
        fits = isinstance(index, Tensor) and index.dtype == torch.int64 and index.shape[:-1] == z.shape[:-1]
        if not self._last or not self._is_class_dim(dim) or not fits or index.dim() != z.dim():
            return self.fall_back("gather", dim, index)
        check_classes(index, self.num_classes)
        return self.picked("gather", picks.gather, index.reshape(count_of(index.shape[:-1]), index.shape[-1]))

    # Arithmetic

    def mul(self, other: Any) -> Any:
        """Return the logits scaled by a number or a 0-d tensor that gradients may flow to."""
        scaled = self.scaled(other)
        return self.fall_back("mul", other) if scaled is None else scaled

    def div(self, other: Any, *, rounding_mode: str | None = None) -> Any:
        """Return the logits divided by a number or a 0-d tensor, such as a temperature."""
        scaled = self._divided(other) if rounding_mode is None else None
        return self.fall_back("div", other, rounding_mode=rounding_mode) if scaled is None else scaled

    def _divided(self, other: Any) -> Any:
        if isinstance(other, Real):
            return self.scaled(1 / float(other)) if other != 0 else None
        if isinstance(other, Tensor) and other.numel() == 1 and other.dtype.is_floating_point and _is_plain(other):
            return self.scaled(other.reciprocal())
        return None

    def scaled(self, factor: Any) -> Any:
        """Return the logits times a factor, or None where that is no head's logits."""
        z: Any = self
        *_, scale = self.head()
        if isinstance(factor, Tensor):
            fits = factor.numel() == 1 and factor.dim() <= z.dim() and factor.dtype.is_floating_point
            same = factor.dim() == 0 or torch.promote_types(factor.dtype, z.dtype) == z.dtype
            if not fits or not same or z.softcap is not None or not _is_plain(factor) or factor.device != z.device:
                return None
            return self.changed(scale=scale * factor.reshape(()))
        # A comparison, not `isfinite`: a graph may hold the number without knowing it.
        if not isinstance(factor, Real) or not -inf < float(factor) < inf:
            return None
        if z.softcap is None:
            return self.changed(scale=scale * float(factor))
        # m c tanh(s x / c) is a softcap of |m| c over the scale m s.
        if factor == 0:
            return self.changed(scale=0.0, softcap=None)
        return self.changed(scale=scale * float(factor), softcap=z.softcap * abs(float(factor)))

    def tanh(self) -> Any:
        """Return the hyperbolic tangent: a softcap of 1, which a later factor raises."""
        z: Any = self
        return self.changed(softcap=1.0) if z.softcap is None else self.fall_back("tanh")

    def neg(self) -> Any:
        """Return the logits with the other sign."""
        return self.mul(-1.0)

    def add(self, other: Any, *, alpha: Any = 1) -> Any:
        """Return the sum with another head's logits (an adapter's), or with one number a class."""
        total = self.sum_with(other) if alpha == 1 else None
        return self.fall_back("add", other, alpha=alpha) if total is None else total

    def sum_with(self, other: Any) -> Any:
        """Return the sum as one head's logits: of both heads' features side by side; None where it is none."""
        z: Any = self
        if z.softcap is not None or not self._last:
            return None
        if isinstance(other, HeadLogits):
            return _side_by_side(self, other)
        _, weight, bias, scale = self.head()
        a_bias = isinstance(other, Tensor) and _is_plain(other) and other.dim() > 0 and other.shape[-1] == other.numel()
        if not a_bias or not isinstance(scale, float) or scale != 1.0 or other.dim() > z.dim():
            return None
        if other.numel() != self.num_classes or other.dtype != weight.dtype or other.device != weight.device:
            return None
        more = other.reshape(-1)
        return self.changed(bias=more if bias is None else bias + more)

    def sub(self, other: Any, *, alpha: Any = 1) -> Any:
        """Return the difference to another head's logits."""
        negative = other.scaled(-1.0) if isinstance(other, HeadLogits) and alpha == 1 else None
        total = None if negative is None else self.sum_with(negative)
        return self.fall_back("sub", other, alpha=alpha) if total is None else total

    __mul__ = __rmul__ = mul
    __truediv__ = div
    __add__ = __radd__ = add
    __sub__ = sub
    __neg__ = neg
    negative = neg
    multiply = mul
    divide = true_divide = div
    subtract = sub


for _name, _move in MOVES.items():
    setattr(HeadLogits, _name, _move)


def _is_plain(tensor: Tensor) -> bool:
    return not isinstance(tensor, (HeadLogits, LazyTensor))


def check_classes(index: Tensor, classes: int) -> None:
    """Raise, as torch's gather does, if an index is no class and may be looked at."""
    if torch.compiler.is_compiling() or not (values_are_readable(index) or may_be_waited_for(index)):
        return
    first = first_outside(index, classes)
    if first is not None:
        raise RuntimeError(f"index {first} is out of bounds for dimension {index.dim() - 1} with size {classes}")


def _rows_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float | Tensor,
    softcap: float | None,
    window: Window | None,
) -> HeadRows:
    flat = hidden
    if hidden.dim() != 2:
        flat = hidden.reshape(count_of(hidden.shape[:-1]), hidden.shape[-1])
    factor = scale if isinstance(scale, Tensor) else None
    number = 1.0 if isinstance(scale, Tensor) else scale
    return HeadRows(flat.shape[0], weight.shape[0], (flat, weight, bias, factor), number, softcap, window)


def _side_by_side(first: Any, second: Any) -> Any:
    """Return the sum of two heads' logits as one head over the features of both."""
    if first.shape != second.shape or second.softcap is not None or not second._last:
        return None
    parts = (first.head(), second.head())
    dtype = torch.promote_types(parts[0][0].dtype, parts[1][0].dtype)
    hidden, weight, bias = [], [], None
    for features, matrix, offset, scale in parts:
        plain = isinstance(scale, float) and scale == 1.0
        hidden.append(features.to(dtype) if plain else features.to(dtype) * scale)
        weight.append(matrix.to(dtype))
        if offset is not None:
            part = offset.to(dtype) * scale
            bias = part if bias is None else bias + part
    return first.changed(
        hidden=torch.cat(hidden, -1),
        weight=torch.cat(weight, -1),
        bias=bias,
        scale=1.0,
        dtype=torch.promote_types(first.dtype, second.dtype),
    )


def _joined(tensors: Sequence[Any], dim: int = 0) -> Any:
    """Return one head's logits joined along a leading dimension; None where they are not one head's."""
    if not isinstance(tensors, (list, tuple)) or not all(
        isinstance(each, HeadLogits) and each._last for each in tensors
    ):
        return None
    first: Any = tensors[0]
    if first._is_class_dim(dim) or first.num_classes == 0:
        return None
    heads = [each.head() for each in tensors]
    scale, kind = heads[0][3], (first.softcap, first.dtype, first.requires_grad)
    for each, (*_, other_scale) in zip(tensors, heads, strict=True):
        same = _is_one_tensor(each, first, 1) and _is_one_tensor(each, first, 2) and each.dim() == first.dim()
        numbers = not isinstance(scale, Tensor) and not isinstance(other_scale, Tensor)
        same_scale = other_scale == scale if numbers else _is_one_tensor(each, first, 3)
        if not same or not same_scale or (each.softcap, each.dtype, each.requires_grad) != kind:
            return None
    return first.changed(hidden=torch.cat([hidden for hidden, *_ in heads], axis_of(dim, first.dim())))


def _is_one_tensor(first: Any, second: Any, place: int) -> bool:
    """Say whether a part of two heads is one tensor, with one graph."""
    one, other = first.given_parts()[place], second.given_parts()[place]
    if one is other:
        return True
    if one is None or other is None or one.requires_grad or other.requires_grad:
        return False
    return bool(
        one.data_ptr() == other.data_ptr()
        and (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
    )


_PARTS = ("hidden", "weight", "bias", "scale")
_JOINS = (torch.cat, torch.concat, torch.concatenate)
_LOSSES = (F.cross_entropy, F.binary_cross_entropy_with_logits)


class LazyLogits(HeadLogits, LazyTensor):  # type: ignore[misc, override] # torch's methods take more
    """The logits `softcap * tanh((hidden @ weight.T + bias) * scale / softcap)`, not computed: a tensor without memory.

    Stands wherever logits stand: in every function and module of logitless, in torch's own losses, and in whatever
    holds tensors (hooks, checkpoints, DDP, FSDP). See `HeadLogits` for what stays lazy. Anything else computes all the
    logits, after a `MaterializeWarning` that says which operation did and where (logits of one row a sequence or of at
    most 1 MiB need none).

    Scaling in place is a scale, and a constant written to some classes is a bias; other writes raise. Made under
    `no_grad`, the logits have no graph, as a tensor has none. A hidden state or weight changed in place since (an
    optimiser's step) raises, as autograd does. Their gradient is that of the head's parts; its values are those of
    `logits.materialize()`.
    """

    @classmethod
    def form_of_parts(cls, parts: Parts, settings: Settings) -> Form:
        """Return what the logits are from outside."""
        hidden, weight = parts[0], parts[1]
        assert hidden is not None
        assert weight is not None
        _, _, dtype, class_dim = settings
        shape = [*hidden.shape[:-1], weight.shape[0]]
        if class_dim != -1:
            shape.insert(len(shape) + class_dim, shape.pop())
        return Form(torch.Size(shape), dtype or hidden.dtype, hidden.device)

    @classmethod
    def dense_values(cls, parts: Parts, settings: Settings) -> Tensor:
        """Return the logits, differentiable in the parts."""
        hidden, weight, bias, factor = parts
        assert hidden is not None
        assert weight is not None
        number, softcap, dtype, class_dim = settings
        return _values(hidden, weight, bias, number if factor is None else factor, softcap, dtype, class_dim)

    @classmethod
    def gradients_of_dense(
        cls, parts: Parts, wanted: Sequence[bool], settings: Settings, window: Window | None, dense: Tensor
    ) -> Sequence[Tensor | None]:
        """Return the gradients of the parts, of a dense gradient of the logits, a tile at a time."""
        return gradients_of_rows(cls, parts, wanted, settings, window, dense, None)

    @property
    def hidden(self) -> Tensor:
        """The hidden states (..., features), as they were given."""
        return self.given[0]  # type: ignore[return-value] # logits have hidden states

    @property
    def weight(self) -> Tensor:
        """The head's weight (classes, features), as it was given."""
        return self.given[1]  # type: ignore[return-value] # logits have a weight

    @property
    def bias(self) -> Tensor | None:
        """The head's bias (classes,), as it was given."""
        return self.given[2]

    @property
    def scale(self) -> float | Tensor:
        """What the products are multiplied by."""
        factor = self.given[3]
        return self.settings[0] if factor is None else factor

    @property
    def softcap(self) -> float | None:
        """What bounds the logits."""
        return self.settings[1]  # type: ignore[no-any-return] # settings hold anything

    @property
    def class_dim(self) -> int:
        """Where the classes are, counted from the end."""
        return self.settings[3]  # type: ignore[no-any-return] # settings hold anything

    def given_parts(self) -> tuple[Tensor | None, ...]:
        """Return the parts as they were given."""
        return self.given

    def head(self) -> tuple[Tensor, Tensor, Tensor | None, float | Tensor]:
        """Return hidden, weight, bias and scale, attached to the graph of these logits."""
        hidden, weight, bias, factor = self.parts()
        assert hidden is not None
        assert weight is not None
        return hidden, weight, bias, self.settings[0] if factor is None else factor

    def changed(self, *, view: bool = False, **changes: Any) -> Any:
        """Return the same logits with other parts or settings; `view`: what dense logits would share memory with."""
        parts = dict(zip(_PARTS, self.head(), strict=True))
        _, softcap, dtype, class_dim = self.settings
        kept = {"softcap": softcap, "dtype": dtype, "class_dim": class_dim}
        wanted = None if torch.is_grad_enabled() else self.wanted
        made = _made(**{**parts, **kept, **changes}, window=self.window, inherited=wanted)
        if not isinstance(made, LazyLogits):
            return made
        if torch.is_grad_enabled() and self.requires_grad:
            made.given = tuple(
                mine if name not in changes else new
                for name, mine, new in zip(_PARTS, self.given, made.given, strict=True)
            )
        return made.share_memory_of(self) if view else made

    def cast_below_autograd(self, dtype: torch.dtype) -> Any:
        """Return the logits in another dtype, without a graph."""
        number, softcap, _, class_dim = self.settings
        return LazyLogits.made(self.raw, self.wanted, (number, softcap, dtype, class_dim), self.window)

    def detach(self) -> Any:
        """Return the logits cut from the graph of everything they are made of."""
        if not is_eager(*self.raw):
            with torch.no_grad():
                return self.changed()
        with no_torch_functions():
            return Tensor.detach(self)

    def mul_(self, other: Any) -> Any:
        """Scale the logits in place by a number or a 0-d tensor."""
        return self._scaled_in_place("mul_", self.scaled(other))

    def div_(self, other: Any, *, rounding_mode: str | None = None) -> Any:
        """Divide the logits in place by a number or a 0-d tensor."""
        return self._scaled_in_place("div_", self._divided(other) if rounding_mode is None else None)

    def _scaled_in_place(self, name: str, scaled: Any) -> Any:
        if not isinstance(scaled, LazyLogits):
            raise TypeError(
                f"{name}: LazyLogits can be scaled in place by one number only, at {callers_line()}: "
                "write to z.materialize(), or give the result a name of its own"
            )
        return self.write(scaled)

    def add_(self, other: Any, *, alpha: Any = 1) -> Any:
        """Add one number a class, or another head's logits, in place."""
        return self._sum_in_place("add_", self.sum_with(other) if alpha == 1 else None)

    def sub_(self, other: Any, *, alpha: Any = 1) -> Any:
        """Subtract another head's logits, in place."""
        negative = other.scaled(-1.0) if isinstance(other, HeadLogits) and alpha == 1 else None
        return self._sum_in_place("sub_", None if negative is None else self.sum_with(negative))

    def _sum_in_place(self, name: str, total: Any) -> Any:
        if not isinstance(total, LazyLogits) or total.dtype != self.dtype:
            raise TypeError(
                f"{name}: to LazyLogits one number a class, or another head's logits, can be added in place, at "
                f"{callers_line()}: write to z.materialize(), or give the result a name of its own"
            )
        return self.write(total)

    def masked_fill_(self, mask: Tensor, value: Any) -> Any:
        """Give some classes of every row a constant, in place."""
        return self._filled("masked_fill_", classes_of_mask(mask, self.shape) if self._last else None, value)

    def index_fill_(self, dim: int, index: Tensor, value: Any) -> Any:
        """Give some classes of every row a constant, in place."""
        return self._filled("index_fill_", index if self._last and self._is_class_dim(dim) else None, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Give some classes of every row a constant."""
        items = index if isinstance(index, tuple) else (index,)
        *leading, classes = items
        everywhere = all(item is Ellipsis or (isinstance(item, slice) and item == slice(None)) for item in leading)
        fits = self._last and everywhere and (Ellipsis in leading or len(items) == self.dim())
        if fits and isinstance(classes, (slice, int, list)) and not isinstance(classes, bool):
            classes = torch.arange(self.num_classes, device=self.device)[classes].reshape(-1)
        elif not fits or not isinstance(classes, Tensor) or classes.dim() > 1:
            mask = index if isinstance(index, Tensor) and index.dtype == torch.bool else None
            classes = None if mask is None or mask.shape != self.shape else classes_of_mask(mask, self.shape)
        self._filled("__setitem__", classes, value)

    def _filled(self, name: str, classes: Tensor | None, value: Any) -> Any:
        number = value.item() if isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad else value
        filled: dict[str, Any] | None = None
        if classes is not None and isinstance(number, Real):
            filled = classes_filled(self.head(), self.softcap, classes, float(number))
        if filled is None:
            raise TypeError(
                f"{name}: LazyLogits cannot be written into but by a constant to some classes of every row, at "
                f"{callers_line()}: call .materialize() first and write to that, or take lazy_head's handle off the "
                "model there (handle.remove())"
            )
        return self.write(self.changed(**filled))

    __imul__ = mul_
    __itruediv__ = div_
    __iadd__ = add_
    __isub__ = sub_
    __idiv__ = div_
    __hash__ = Tensor.__hash__

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Send torch's losses to the functions of the same name here, and joins of one head's logits to one."""
        special = _special(func, args, kwargs or {})
        return super().__torch_function__(func, types, args, kwargs) if special is None else special


def _special(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in _LOSSES and isinstance(args[0] if args else kwargs.get("input"), HeadLogits):
        return meaning_of(func)(*args, **kwargs)
    if func in _JOINS and "out" not in kwargs:
        return _joined(*args, **kwargs)
    return None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TracedLogits(HeadLogits, TensorProxy):
    """LazyLogits as a plain object, no tensor: in a graph being traced, under a function transform, inside one call."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float | Tensor = 1.0
    softcap: float | None = None
    dtype_: torch.dtype | None = None
    class_dim: int = -1
    made_at: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """The logits' shape."""
        shape = [*self.hidden.shape[:-1], self.weight.shape[0]]
        if self.class_dim != -1:
            shape.insert(len(shape) + self.class_dim, shape.pop())
        return torch.Size(shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the logits would have."""
        return self.hidden.dtype if self.dtype_ is None else self.dtype_

    @property
    def device(self) -> torch.device:
        """The device the logits would be on."""
        return self.hidden.device

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient flows to anything the logits are made of."""
        parts = (self.hidden, self.weight, self.bias, self.scale)
        return any(isinstance(part, Tensor) and part.requires_grad for part in parts)

    @property
    def is_leaf(self) -> bool:
        """Whether no graph leads here."""
        return not self.requires_grad

    def given_parts(self) -> tuple[Tensor | None, ...]:
        """Return the parts as they were given."""
        return self.hidden, self.weight, self.bias, self.scale if isinstance(self.scale, Tensor) else None

    def head(self) -> tuple[Tensor, Tensor, Tensor | None, float | Tensor]:
        """Return hidden, weight, bias and scale; raise if the head was written to since a compiled graph made this."""
        if self.made_at is not None and not torch.compiler.is_compiling():
            check_versions(self.made_at, [self.weight, self.bias])
        return self.hidden, self.weight, self.bias, self.scale

    def changed(self, *, view: bool = False, **changes: Any) -> Any:
        """Return the same logits with other parts or settings."""
        parts = dict(zip(_PARTS, self.head(), strict=True))
        kept = {"softcap": self.softcap, "dtype": self.dtype_, "class_dim": self.class_dim}
        return _made(**{**parts, **kept, **changes})

    def materialize(self) -> Tensor:
        """Return the logits as a tensor, all of them."""
        return _values(*self.head(), self.softcap, self.dtype_, self.class_dim)

    def detach(self) -> Any:
        """Return the logits cut from the graph of everything they are made of."""
        with torch.no_grad():
            return self.changed()

    def hand_out(self, values: Tensor) -> Tensor:
        """Return the values: nothing is written where a graph is traced."""
        return values

    def __copy__(self) -> Any:
        """Return the same logits."""
        return self.changed()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Copy and pickle as the parts."""
        return _made, (*self.head(), self.softcap, self.dtype_, self.class_dim)

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Send torch's losses to the functions of the same name here, and joins of one head's logits to one."""
        special = _special(func, args, kwargs or {})
        return TensorProxy.__torch_function__(func, types, args, kwargs) if special is None else special


def _values(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float | Tensor,
    softcap: float | None,
    dtype: torch.dtype | None,
    class_dim: int,
) -> Tensor:
    """Return the logits, all of them."""
    rows = _rows_of(hidden, weight, bias, scale, softcap, None)
    with no_autocast(hidden):
        backend = dispatch.pick("materialize", rows.tensors)
        logits = picks.materialize(backend, rows, dtype or hidden.dtype).view(*hidden.shape[:-1], rows.classes)
    return logits if class_dim == -1 else logits.movedim(-1, class_dim)


def gradients_of_rows(
    kind: type[LazyLogits],
    parts: Parts,
    wanted: Sequence[bool],
    settings: Settings,
    window: Window | None,
    dense: Tensor,
    function: Callable[[Tensor], Tensor] | None,
) -> Sequence[Tensor | None]:
    """Return the parts' gradients, of a dense gradient of what a function makes of rows of logits, tile by tile.

    The function None stands for the logits themselves.
    """
    number, softcap, dtype, class_dim = settings
    hidden, weight, bias, factor = parts
    assert hidden is not None
    assert weight is not None
    scale = number if factor is None else factor
    if torch.is_grad_enabled() or not is_eager(dense, *parts):
        again = torch.is_grad_enabled()
        with torch.enable_grad(), opened(window, parts):
            leaves = [
                p if p is None else p.view_as(p) if again else p.detach().requires_grad_(w)  # no part within another
                for p, w in zip(parts, wanted, strict=True)
            ]
            value = kind.dense_values(leaves, settings)
            value = value if function is None else function(value)
            chosen = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want and leaf is not None]
            found = iter(torch.autograd.grad(value, chosen, dense, create_graph=again, allow_unused=True))
        return [next(found) if want else None for want in wanted]
    rows = _rows_of(hidden, weight, bias, scale, softcap, window)
    result = dtype or hidden.dtype
    flat = dense.movedim(class_dim, -1).reshape(rows.rows, rows.classes)
    if function is None:
        backend = dispatch.pick("the gradient of logits", rows.tensors)
        grads = picks.gradients_of_all(backend, rows, result, wanted, flat)
    else:
        grads = fold_gradients(lambda tile: (function(tile.to(result)),), rows, wanted, flat)
    return [None if grads[0] is None else grads[0].view(hidden.shape), *grads[1:]]


def _made(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float | Tensor,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
    class_dim: int = -1,
    window: Window | None = None,
    inherited: Sequence[bool] | None = None,
) -> Any:
    """Return logits as the surroundings have them: a tensor of torch's, or where a graph is traced the plain parts."""
    factor = scale if isinstance(scale, Tensor) else None
    if not is_eager(hidden, weight, bias, factor):
        # A trace is the same in either grad mode.
        if not torch.is_grad_enabled() and not torch._C._is_tracing():
            hidden, weight = hidden.detach(), weight.detach()
            bias = None if bias is None else bias.detach()
            scale = scale if factor is None else factor.detach()
        seen = None
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            seen = versions_in_graph([weight, bias])
        return TracedLogits(hidden, weight, bias, scale, softcap, dtype, class_dim, seen)
    settings = (1.0 if factor is not None else float(scale), softcap, dtype, class_dim)
    parts = (hidden, weight, bias, factor)
    with no_torch_functions():
        logits = pack(LazyLogits, settings, inherited, window, *parts)
    if torch.is_grad_enabled():
        logits.given = parts
    return logits


def linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    softcap: float | None = None,
) -> LazyLogits:
    """Return the logits of a classifier head as a lazy tensor: `F.linear`, not computed.

    Equals `F.linear(hidden, weight, bias) * scale`, and with a softcap `softcap * tanh(that / softcap)`,
    in every loss and measure it is given to; nothing of its size is ever allocated.

    Args:
        hidden: (..., features), floating.
        weight: (classes, features), the dtype of hidden.
        bias: (classes,), or one number for all classes as a tensor (1,) or (), or None.
        scale: a number or a 0-d tensor that gradients flow to (an inverse temperature, CLIP's logit scale).
        softcap: a positive number, or None.

    Raises:
        TypeError: a tensor is none, or complex. RuntimeError: the tensors are on several devices.
        ValueError: a shape or dtype does not fit, or the softcap is not positive.

    Source: `torch.nn.functional.linear`; the softcap is Gemma 2's (arXiv:2408.00118, section 2).
    In training, the head's logits and their gradient stop being the largest tensors of a step.

    >>> import torch, logitless as ll
    >>> logits = ll.linear(torch.ones(3, 2), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    >>> logits.shape
    torch.Size([3, 2])
    >>> ll.functional.cross_entropy(logits, torch.tensor([1, 1, 1]))
    tensor(0.1269)
    """
    return head_logits(hidden, weight, bias, scale, softcap, None)


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float | Tensor,
    softcap: float | None,
    window: Window | None,
) -> LazyLogits:
    """Return the logits of a head whose parameters `window` gathers again outside their module's forward."""
    hidden, weight, bias = _checked(hidden, weight, bias, scale, softcap)
    return _made(hidden, weight, bias, scale, softcap, window=window)  # type: ignore[no-any-return] # of either kind


def unheld_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float | Tensor, softcap: float | None
) -> Any:
    """Return the logits as a plain object, for one call that shows them to nobody: no graph needs a node for them."""
    hidden, weight, bias = _checked(hidden, weight, bias, scale, softcap)
    if is_eager(weight) and is_freed(weight):
        raise RuntimeError("linear: the weight's memory was freed (its module is sharded): call inside its forward")
    return TracedLogits(hidden, weight, bias, scale if isinstance(scale, Tensor) else float(scale), softcap)


def _checked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float | Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden, weight and bias as autocast has them; raise where they and the options make no head."""
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not isinstance(tensor, Tensor) or not _is_plain(tensor):
            raise TypeError(f"linear: {name} must be Tensor, not {type(tensor).__name__}")
        if type(tensor).__name__ == "DTensor":
            raise ValueError(
                f"linear: {name} is a DTensor, sharded over several processes (parallelize_module): a sharded head has "
                "no lazy logits yet; leave the head out of the plan, or take lazy_head's handle off (handle.remove())"
            )
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"linear: bias must be Tensor or None, not {type(bias).__name__}")
    check_real("linear", hidden=hidden, weight=weight, bias=bias, scale=scale if isinstance(scale, Tensor) else None)
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "linear: expected hidden (..., features) and weight (classes, features), "
            f"got hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        )
    if bias is not None and bias.numel() == 1 and bias.dim() < 2:
        bias = bias.expand(weight.shape[0])  # one number for all classes, as torch's linear takes it
    # Of the scale torch takes one number from the host.
    factor = scale if isinstance(scale, Tensor) and scale.device.type != "cpu" else None
    given: list[tuple[str, Tensor | None]] = [("weight", weight), ("bias", bias), ("scale", factor)]
    for name, part in given:
        if part is not None and part.device != hidden.device:
            raise RuntimeError(
                f"linear: expected all tensors on one device, got hidden on {hidden.device} and {name} on "
                f"{part.device}; use {name}.to(hidden.device)"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: expected bias ({weight.shape[0]},), got {tuple(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"linear: softcap must be positive, got {softcap}")
    if isinstance(scale, Tensor) and scale.dim() != 0:
        raise ValueError(f"linear: scale must be a number or a 0-d tensor, got shape {tuple(scale.shape)}")
    if under_autocast(hidden.device):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if hidden.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        dtypes = [str(t.dtype) for t in (hidden, weight, bias) if t is not None]
        raise ValueError(f"linear: hidden, weight and bias must share one dtype, got {', '.join(dtypes)}")
    return hidden, weight, bias
