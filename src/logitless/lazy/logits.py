"""Logits that are never built: `linear` returns them as a lazy object that every loss and measure accepts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless._heads.fold import fold_rows
from logitless._heads.rows import HeadRows
from logitless._rules.precision import under_autocast
from logitless._rules.transforms import hold_data, transform_reason
from logitless.lazy.proxy import TensorProxy, meaning_of

# How many times smaller than the logits the head's rows of the classes to gather must be to be copied for it.
_FEW = 8


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LazyLogits(TensorProxy):
    """The logits `softcap * tanh((hidden @ weight.T + bias) * scale / softcap)`, not computed.

    Stands wherever logits stand: in every function and module of logitless, and in torch's own losses. Casts,
    scaling by a number or a 0-d tensor, a tanh softcap, sums of two heads, and whatever moves or picks rows stay
    lazy, as methods and as `torch.*` functions. `argmax`, `max`, `topk` and `logsumexp` over the classes, and
    `gather` of a few of them, are computed without the logits. Anything else computes all the logits, after a
    `MaterializeWarning` that says which operation did and where (logits of one row a sequence or of at most 1 MiB
    need none). Nothing can be written into the logits.

    The classes come last but after a transpose: `transpose(1, 2)` keeps them lazy for `cross_entropy`. Made under
    `no_grad`, the logits have no graph, as a tensor has none. A hidden state or weight changed in place since (an
    optimiser's step) raises, as autograd does.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float | Tensor = 1.0
    softcap: float | None = None
    dtype_: torch.dtype | None = None
    class_dim: int = -1
    versions: tuple[int, ...] | None = None

    def _with(self, **changes: Any) -> LazyLogits:
        """Return the same logits with other parts, cut from the graph where the grad mode says so."""
        self._check_unchanged()
        parts = {name: getattr(self, name) for name in _PARTS}
        return _made(LazyLogits(**{**parts, **changes}))

    def _check_unchanged(self) -> None:
        now = _versions(self)
        if self.versions is not None and now is not None and self.versions != now:
            raise RuntimeError(
                "the hidden states or the head of LazyLogits were modified in place since these logits were made: use "
                "them before the optimiser's step, or call .materialize() before it"
            )

    # What they would be

    @property
    def shape(self) -> torch.Size:
        """The logits' shape."""
        leading = self.hidden.shape[:-1]
        axis = self._axis
        return torch.Size((*leading[:axis], self.weight.shape[0], *leading[axis:]))

    @property
    def _axis(self) -> int:
        return self.class_dim % self.hidden.dim()

    @property
    def _last(self) -> bool:
        return self._axis == self.hidden.dim() - 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the logits would have."""
        return self.hidden.dtype if self.dtype_ is None else self.dtype_

    @property
    def device(self) -> torch.device:
        """The device the logits would be on."""
        return self.hidden.device

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return self.weight.shape[0]

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient flows to anything the logits are made of."""
        parts = (self.hidden, self.weight, self.bias, self.scale)
        return any(isinstance(part, Tensor) and part.requires_grad for part in parts)

    @property
    def is_leaf(self) -> bool:
        """Whether no graph leads here."""
        return not self.requires_grad

    @property
    def mT(self) -> LazyLogits | Tensor:  # noqa: N802 # torch's name
        """The logits with their last two dimensions exchanged."""
        return self.transpose(-1, -2)

    def __repr__(self) -> str:
        """Say what the logits would be and what they are made of."""
        parts = [
            f"shape={tuple(self.shape)}",
            f"dtype={self.dtype}",
            f"hidden={tuple(self.hidden.shape)}",
            f"weight={tuple(self.weight.shape)}",
        ]
        if self.bias is not None:
            parts.append("bias=True")
        if isinstance(self.scale, Tensor) or self.scale != 1.0:
            parts.append(f"scale={self.scale.item() if isinstance(self.scale, Tensor) else self.scale}")
        if self.softcap is not None:
            parts.append(f"softcap={self.softcap}")
        if self.device.type != "cpu":
            parts.append(f"device='{self.device}'")
        if self.requires_grad:
            parts.append("requires_grad=True")
        return f"LazyLogits({', '.join(parts)})"

    def __reduce__(self) -> tuple[Callable[..., LazyLogits], tuple[Any, ...]]:
        """Copy and pickle as the parts."""
        self._check_unchanged()
        return _remade, tuple(getattr(self, name) for name in _PARTS if name != "versions")

    # What they are computed by

    def rows(self) -> HeadRows:
        """Return the logits as rows to be made tile by tile."""
        if not self._last:
            raise ValueError(
                f"LazyLogits of shape {tuple(self.shape)} have their classes in dimension {self._axis}, not last: "
                "use .movedim(1, -1), or cross_entropy, which takes them so"
            )
        self._check_unchanged()
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])
        scale = self.scale if isinstance(self.scale, Tensor) else None
        factor = 1.0 if isinstance(self.scale, Tensor) else float(self.scale)
        tensors = (hidden, self.weight, self.bias, scale)
        return HeadRows(hidden.shape[0], self.num_classes, tensors, factor, self.softcap)

    def materialize(self) -> Tensor:
        """Return the logits as a tensor, all of them."""
        rows = self.classes_last().rows()
        logits = rows.activate(rows.raw(rows.tensors, 0, rows.rows), rows.tensors)
        return logits.view(*self.hidden.shape[:-1], self.num_classes).to(self.dtype).movedim(-1, self._axis)

    def classes_last(self) -> LazyLogits:
        """Return the logits with the classes moved to the last dimension."""
        return self if self._last else self._with(class_dim=-1)

    def _per_row(self, function: Callable[..., tuple[Tensor, ...]], *row_inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what a function of rows [rows, classes] gives, in the leading shape, made tile by tile."""
        dtype = self.dtype
        outputs = fold_rows(lambda tile, *inputs: function(tile.to(dtype), *inputs), [self.rows()], row_inputs)
        return tuple(output.view(*self.hidden.shape[:-1], *output.shape[1:]) for output in outputs)

    def log_softmax(self, dim: int | None = None, dtype: torch.dtype | None = None, *, _stacklevel: int = 3) -> Any:
        """Return the log-probabilities, lazy too: `gather` and `sum` over the classes do not compute them all.

        `_stacklevel` is what `F.log_softmax` passes on.
        """
        if not self._last or not self._is_class_dim(dim):
            return F.log_softmax(self._dense("log_softmax"), dim, _stacklevel, dtype)
        logits = self if dtype is None else self.to(dtype)
        return meaning_of(F.log_softmax)(logits) if isinstance(logits, LazyLogits) else logits.log_softmax(-1)

    def _is_class_dim(self, dim: int | None) -> bool:
        return dim is not None and dim % self.dim() == self._axis

    def argmax(self, dim: int | None = None, keepdim: bool = False) -> Tensor:
        """Return the top class of each row without the logits, for the classes' dimension."""
        if not self._is_class_dim(dim):
            return self._dense("argmax").argmax(dim, keepdim)
        (top,) = self.classes_last()._per_row(lambda tile: (tile.argmax(-1),))
        return top.unsqueeze(self._axis) if keepdim else top

    def max(self, dim: int | None = None, keepdim: bool = False) -> Any:
        """Return the largest logit of each row and its class without the logits, for the classes' dimension."""
        if not self._is_class_dim(dim):
            return self._dense("max").max() if dim is None else self._dense("max").max(dim, keepdim)
        values, indices = self.classes_last()._per_row(lambda tile: tuple(tile.max(-1)))
        if keepdim:
            values, indices = values.unsqueeze(self._axis), indices.unsqueeze(self._axis)
        return torch.return_types.max((values, indices))

    def topk(self, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        """Return the k largest logits of each row and their classes without the logits."""
        if not self._last or not self._is_class_dim(dim):
            return self._dense("topk").topk(k, dim, largest, sorted)
        values, indices = self._per_row(lambda tile: tuple(tile.topk(k, -1, largest, sorted)))
        return torch.return_types.topk((values, indices))

    def logsumexp(self, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
        """Return the log-sum-exp of each row without the logits, for the classes' dimension."""
        axis = dim[0] if isinstance(dim, tuple) and len(dim) == 1 else dim
        if not isinstance(axis, int) or not self._is_class_dim(axis):
            return self._dense("logsumexp").logsumexp(dim, keepdim)
        (value,) = self.classes_last()._per_row(lambda tile: (tile.logsumexp(-1),))
        return value.unsqueeze(self._axis) if keepdim else value

    def gather(self, dim: int, index: Tensor) -> Tensor:
        """Return the logits of the classes that `index` names: of a few, one product of vectors each."""
        if not self._last or not self._is_class_dim(dim) or index.shape[:-1] != self.shape[:-1]:
            return self._dense("gather").gather(dim, index)
        rows = self.rows()
        flat = index.reshape(rows.rows, index.shape[-1])
        if flat.shape[-1] * self.hidden.shape[-1] * _FEW > self.num_classes:
            (picked,) = self._per_row(lambda tile, classes: (tile.gather(-1, classes),), flat)
            return picked
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        raw = (rows.tensors[0].unsqueeze(1).to(wide) * self.weight[flat].to(wide)).sum(-1).to(self.hidden.dtype)  # type: ignore[union-attr] # a head's first tensor is its hidden
        if self.bias is not None:
            raw = raw + self.bias[flat]
        return rows.activate(raw, rows.tensors).to(self.dtype).view(index.shape)

    # What moves or picks rows

    def reshape(self, *sizes: Any, shape: Sequence[int] | None = None) -> LazyLogits | Tensor:
        """Return the same logits with other leading dimensions."""
        given = sizes if shape is None else (shape,)
        sizes = tuple(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
        leading = self.hidden.shape[:-1]
        if not self._last or not sizes or not all(isinstance(size, int) for size in sizes):
            return self._dense("reshape").reshape(sizes)
        same_rows = torch.Size(sizes[:-1]).numel() == leading.numel()
        if sizes[-1] != self.num_classes and not (sizes[-1] == -1 and same_rows):
            return self._dense("reshape").reshape(sizes)
        if -1 not in sizes[:-1] and not same_rows:
            raise RuntimeError(f"shape '{list(sizes)}' is invalid for LazyLogits of shape {tuple(self.shape)}")
        return self._with(hidden=self.hidden.reshape(*sizes[:-1], self.hidden.shape[-1]))

    def view(self, *shape: Any) -> LazyLogits | Tensor:
        """Return the same logits with other leading dimensions."""
        if len(shape) == 1 and isinstance(shape[0], torch.dtype):
            return self._dense("view").view(shape[0])
        return self.reshape(*shape)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> LazyLogits | Tensor:
        """Return the logits with the leading dimensions from start_dim to end_dim joined."""
        first, last = start_dim % self.dim(), end_dim % self.dim()
        if first == last:
            return self
        if not self._last or last == self.dim() - 1:
            return self._dense("flatten").flatten(start_dim, end_dim)
        return self._with(hidden=self.hidden.flatten(first, last))

    def squeeze(self, dim: int | tuple[int, ...] | None = None) -> LazyLogits | Tensor:
        """Return the logits without leading dimensions of size 1."""
        dims = range(self.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim
        gone = tuple(at % self.dim() for at in dims if self.shape[at] == 1)
        if not gone:
            return self
        if not self._last or self._axis in gone:
            return self._dense("squeeze").squeeze(gone)
        return self._with(hidden=self.hidden.squeeze(gone))

    def unsqueeze(self, dim: int) -> LazyLogits | Tensor:
        """Return the logits with a leading dimension of size 1 more."""
        at = dim % (self.dim() + 1)
        if not self._last or at == self.dim():
            return self._dense("unsqueeze").unsqueeze(dim)
        return self._with(hidden=self.hidden.unsqueeze(at))

    def permute(self, *dims: Any) -> LazyLogits:
        """Return the logits with their dimensions in another order."""
        given = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
        order = [at % self.dim() for at in given]
        if sorted(order) != list(range(self.dim())):
            raise RuntimeError(f"permute: {tuple(given)} does not order the dimensions of {tuple(self.shape)}")
        leading = [at - (at > self._axis) for at in order if at != self._axis]
        hidden = self.hidden.permute(*leading, self.dim() - 1)
        return self._with(hidden=hidden, class_dim=order.index(self._axis))

    def transpose(self, dim0: int, dim1: int) -> LazyLogits:
        """Return the logits with two dimensions exchanged."""
        order = list(range(self.dim()))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self.permute(order)

    swapaxes = transpose
    swapdims = transpose

    def movedim(self, source: int, destination: int) -> LazyLogits:
        """Return the logits with one dimension moved."""
        order = list(range(self.dim()))
        moved = order.pop(source % self.dim())
        order.insert(destination % self.dim(), moved)
        return self.permute(order)

    def unbind(self, dim: int = 0) -> tuple[LazyLogits | Tensor, ...]:
        """Return the slices along a leading dimension."""
        return self._along("unbind", dim)

    def split(self, split_size: int | list[int], dim: int = 0) -> tuple[LazyLogits | Tensor, ...]:
        """Return pieces along a leading dimension."""
        return self._along("split", dim, split_size)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[LazyLogits | Tensor, ...]:
        """Return a number of pieces along a leading dimension."""
        return self._along("chunk", dim, chunks)

    def _along(self, name: str, dim: int, *args: Any) -> tuple[LazyLogits | Tensor, ...]:
        if not self._last or self._is_class_dim(dim):
            pieces: tuple[Tensor, ...] = getattr(self._dense(name), name)(*args, dim=dim)
            return pieces
        return tuple(self._with(hidden=part) for part in getattr(self.hidden, name)(*args, dim=dim % self.dim()))

    def select(self, dim: int, index: int) -> LazyLogits | Tensor:
        """Return one slice along a dimension."""
        return self[(slice(None),) * (dim % self.dim()) + (index,)]

    def narrow(self, dim: int, start: int, length: int) -> LazyLogits | Tensor:
        """Return a range along a dimension."""
        first = start % self.shape[dim] if start < 0 else start
        if first + length > self.shape[dim]:
            raise RuntimeError(f"narrow: {first} + {length} exceeds dimension size {self.shape[dim]}")
        return self[(slice(None),) * (dim % self.dim()) + (slice(first, first + length),)]

    def index_select(self, dim: int, index: Tensor) -> LazyLogits | Tensor:
        """Return the slices along a dimension that `index` names."""
        return self[(slice(None),) * (dim % self.dim()) + (index,)]

    def __getitem__(self, index: Any) -> LazyLogits | Tensor:
        """Return some rows, and of them all classes or a range; both stay lazy.

        One position of each sequence (`[:, -1, :]`) is what generation asks for, and is computed at once.
        """
        items = index if isinstance(index, tuple) else (index,)
        reach = [_reach(item) for item in items]
        if not self._last or sum(reach) > self.dim():
            return self._dense("indexing")[index]
        at = next((place for place, item in enumerate(items) if item is Ellipsis), len(items))
        items = (*items[:at], *(slice(None),) * (self.dim() - sum(reach)), *items[at + 1 :])
        *leading, classes = items
        if not isinstance(classes, slice) or classes.step not in (None, 1):
            return self._dense("indexing the classes")[index]
        hidden = self.hidden[(*leading, slice(None))]
        if self.dim() > 2 and isinstance(leading[-1], int):
            return self._with(hidden=hidden).materialize()[..., classes]
        if classes.indices(self.num_classes) == (0, self.num_classes, 1):
            return self._with(hidden=hidden)
        bias = None if self.bias is None else self.bias[classes]
        return self._with(hidden=hidden, weight=self.weight[classes], bias=bias)

    # Casts and arithmetic

    def contiguous(self, *, memory_format: torch.memory_format = torch.contiguous_format) -> LazyLogits:
        """Return the same logits."""
        return self

    def atleast_1d(self) -> LazyLogits:
        """Return the same logits."""
        return self

    def cpu(self) -> LazyLogits | Tensor:
        """Return the same logits, computed if they are on another device."""
        return self.to("cpu")

    def clone(self) -> LazyLogits:
        """Return the same logits: nothing can be written into them."""
        return self

    def detach(self) -> LazyLogits:
        """Return the logits cut from the graph of everything they are made of."""
        with torch.no_grad():
            return self._with()

    def float(self) -> LazyLogits:
        """Return the logits as float32."""
        return self._with(dtype_=torch.float32)

    def double(self) -> LazyLogits:
        """Return the logits as float64."""
        return self._with(dtype_=torch.float64)

    def half(self) -> LazyLogits:
        """Return the logits as float16."""
        return self._with(dtype_=torch.float16)

    def bfloat16(self) -> LazyLogits:
        """Return the logits as bfloat16."""
        return self._with(dtype_=torch.bfloat16)

    def to(self, *args: Any, **kwargs: Any) -> LazyLogits | Tensor:
        """Return the logits in another floating dtype; on another device they are computed first."""
        dtype, device = kwargs.get("dtype"), kwargs.get("device")
        for given in (*args, kwargs.get("other")):
            if isinstance(given, torch.dtype):
                dtype = given
            elif isinstance(given, (torch.device, str, int)) and not isinstance(given, bool):
                device = given
            elif isinstance(given, Tensor):
                dtype, device = given.dtype, given.device
        place = self.device if device is None else torch.device(device)
        here = place.type == self.device.type and place.index in (None, self.device.index)
        if not here or (dtype is not None and not dtype.is_floating_point):
            return self._dense("to").to(*args, **kwargs)
        return self if dtype in (None, self.dtype) else self._with(dtype_=dtype)

    def type_as(self, other: Tensor) -> LazyLogits | Tensor:
        """Return the logits in another tensor's dtype."""
        return self.to(other.dtype)

    def mul(self, other: Any) -> LazyLogits | Tensor:
        """Return the logits scaled by a number or a 0-d tensor that gradients may flow to."""
        scaled = self._scaled(other)
        return self._dense("mul") * other if scaled is None else scaled

    def div(self, other: Any, *, rounding_mode: str | None = None) -> LazyLogits | Tensor:
        """Return the logits divided by a number or a 0-d tensor, such as a temperature."""
        scaled = None
        if rounding_mode is None:
            if isinstance(other, Real):
                scaled = self._scaled(1 / float(other)) if other != 0 else None
            elif isinstance(other, Tensor) and other.numel() == 1:
                scaled = self._scaled(other.reciprocal())
        return self._dense("div").div(other, rounding_mode=rounding_mode) if scaled is None else scaled

    def _scaled(self, factor: Any) -> LazyLogits | None:
        """Return the logits times a factor, or None where that is no head's logits."""
        if isinstance(factor, Tensor) and not isinstance(factor, LazyLogits):
            fits = factor.numel() == 1 and factor.dim() <= self.dim() and factor.dtype.is_floating_point
            return self._with(scale=self.scale * factor.reshape(())) if fits and self.softcap is None else None
        if not isinstance(factor, Real) or not isfinite(factor):
            return None
        if self.softcap is None:
            return self._with(scale=self.scale * float(factor))
        # m c tanh(s x / c) is a softcap of |m| c over the scale m s.
        if factor == 0:
            return self._with(scale=0.0, softcap=None)
        return self._with(scale=self.scale * float(factor), softcap=self.softcap * abs(float(factor)))

    def tanh(self) -> LazyLogits | Tensor:
        """Return the hyperbolic tangent: a softcap of 1, which a later factor raises."""
        return self._with(softcap=1.0) if self.softcap is None else self._dense("tanh").tanh()

    def neg(self) -> LazyLogits | Tensor:
        """Return the logits with the other sign."""
        return self.mul(-1.0)

    def add(self, other: Any, *, alpha: Any = 1) -> LazyLogits | Tensor:
        """Return the sum with another head's logits (an adapter's), or with one number a class."""
        total = self._sum(other) if alpha == 1 else None
        return self._dense("add").add(other, alpha=alpha) if total is None else total

    def _sum(self, other: Any) -> LazyLogits | None:
        """Return the sum as one head's logits: of both heads' features side by side; None where it is none."""
        if self.softcap is not None or not self._last:
            return None
        if isinstance(other, LazyLogits):
            return _side_by_side(self, other)
        a_bias = isinstance(other, Tensor) and other.shape[-1:].numel() == other.numel() == self.num_classes
        plain = isinstance(self.scale, float) and self.scale == 1.0
        if not a_bias or not plain or other.dim() > self.dim() or other.dtype != self.weight.dtype:
            return None
        bias = other.reshape(-1)
        return self._with(bias=bias if self.bias is None else self.bias + bias)

    def sub(self, other: Any, *, alpha: Any = 1) -> LazyLogits | Tensor:
        """Return the difference to another head's logits."""
        negative = other._scaled(-1.0) if isinstance(other, LazyLogits) and alpha == 1 else None
        total = None if negative is None else self._sum(negative)
        return self._dense("sub").sub(other, alpha=alpha) if total is None else total

    __mul__ = __rmul__ = mul
    __truediv__ = div
    __add__ = __radd__ = add
    __sub__ = sub
    __neg__ = neg
    __hash__ = object.__hash__
    multiply = mul
    divide = true_divide = div

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Send torch's losses to the functions of the same name here, and joins of one head's logits to one."""
        kwargs = kwargs or {}
        if func in (F.cross_entropy, F.binary_cross_entropy_with_logits):
            return meaning_of(func)(*args, **kwargs)
        if func in (torch.cat, torch.concat, torch.concatenate):
            joined = _joined(*args, **kwargs)
            if joined is not None:
                return joined
        return TensorProxy.__torch_function__(func, types, args, kwargs)


def _made(logits: LazyLogits) -> LazyLogits:
    """Return logits as the grad mode has them: made under no_grad, they have no graph, as a tensor has none."""
    hidden, weight, bias, scale = logits.hidden, logits.weight, logits.bias, logits.scale
    if logits.requires_grad and not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
        scale = scale.detach() if isinstance(scale, Tensor) else scale
    settings = (logits.softcap, logits.dtype_, logits.class_dim)
    return LazyLogits(hidden, weight, bias, scale, *settings, _versions(logits))


def _remade(*parts: Any) -> LazyLogits:
    return _made(LazyLogits(*parts))


_PARTS = tuple(field.name for field in fields(LazyLogits))


def _versions(logits: LazyLogits) -> tuple[int, ...] | None:
    """Return how often each part was written to; None where torch does not count."""
    parts = [part for part in (logits.hidden, logits.weight, logits.bias, logits.scale) if isinstance(part, Tensor)]
    if transform_reason(*parts) is not None or not hold_data(*parts) or any(part.is_inference() for part in parts):
        return None
    return tuple(part._version for part in parts)


def _is_one_tensor(first: Tensor | None, second: Tensor | None) -> bool:
    """Say whether both are one tensor, or two of its detached views."""
    if first is None or second is None or first.requires_grad or second.requires_grad:
        return first is second
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape and first.stride() == second.stride()


def _reach(item: Any) -> int:
    """Return how many dimensions an item of an index takes."""
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, Tensor) and item.dtype == torch.bool:
        return item.dim()
    return 1


def _side_by_side(first: LazyLogits, second: LazyLogits) -> LazyLogits | None:
    """Return the sum of two heads' logits as one head over the features of both."""
    if first.shape != second.shape or second.softcap is not None or not second._last:
        return None
    dtype = torch.promote_types(first.hidden.dtype, second.hidden.dtype)
    hidden, weight, bias = [], [], None
    for head in (first, second):
        plain = isinstance(head.scale, float) and head.scale == 1.0
        hidden.append(head.hidden.to(dtype) if plain else head.hidden.to(dtype) * head.scale)
        weight.append(head.weight.to(dtype))
        if head.bias is not None:
            part = head.bias.to(dtype) * head.scale
            bias = part if bias is None else bias + part
    return first._with(
        hidden=torch.cat(hidden, -1),
        weight=torch.cat(weight, -1),
        bias=bias,
        scale=1.0,
        dtype_=torch.promote_types(first.dtype, second.dtype),
    )


def _joined(tensors: Sequence[Any], dim: int = 0) -> LazyLogits | None:
    """Return one head's logits joined along a leading dimension; None where they are not one head's."""
    first = tensors[0]
    for other in tensors:
        if not isinstance(other, LazyLogits) or not other._last or other._is_class_dim(dim):
            return None
        same = _is_one_tensor(other.weight, first.weight) and _is_one_tensor(other.bias, first.bias)
        numbers = not isinstance(first.scale, Tensor) and not isinstance(other.scale, Tensor)
        same_scale = other.scale == first.scale if numbers else other.scale is first.scale
        if not same or not same_scale or (other.softcap, other.dtype) != (first.softcap, first.dtype):
            return None
    hidden = torch.cat([other.hidden for other in tensors], dim % first.dim())
    joined: LazyLogits = first._with(hidden=hidden)
    return joined


def linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    softcap: float | None = None,
) -> LazyLogits:
    """Return the logits of a classifier head as a lazy object: `F.linear`, not computed.

    Equals `F.linear(hidden, weight, bias) * scale`, and with a softcap `softcap * tanh(that / softcap)`,
    in every loss and measure it is given to; nothing of its size is ever allocated.

    Args:
        hidden: (..., features), floating.
        weight: (classes, features), the dtype of hidden.
        bias: (classes,), or None.
        scale: a number or a 0-d tensor that gradients flow to (an inverse temperature, CLIP's logit scale).
        softcap: a positive number, or None.

    Raises:
        TypeError: a tensor is none.
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
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not isinstance(tensor, Tensor) or isinstance(tensor, TensorProxy):
            raise TypeError(f"linear: {name} must be Tensor, not {type(tensor).__name__}")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "linear: expected hidden (..., features) and weight (classes, features), "
            f"got hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
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
    return _made(LazyLogits(hidden, weight, bias, scale, softcap))
