"""The gradient of a lazy tensor: the gradients of its parts, as one tensor that adds and scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitless.lazy import no_memory

aten = torch.ops.aten


class Form(NamedTuple):
    """What a tensor is from outside."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def form_of(tensor: Tensor) -> Form:
    """Return a tensor's form."""
    return Form(tensor.shape, tensor.dtype, tensor.device)


def without_memory(kind: type, form: Form, strides: Sequence[int] | None = None) -> Any:
    """Return a tensor that torch owns and that has no memory: C++ code that asks for it gets an error."""
    shape, dtype, device = form
    tensor: Any = Tensor._make_wrapper_subclass(
        kind, shape, strides, dtype=dtype, device=device, _extra_dispatch_keys=no_memory.KEYS
    )
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    return tensor


class LazyGradient(Tensor):
    """The gradient of a lazy tensor: of each of its parts one, and last what arrived as a dense gradient.

    It is added up and scaled by autograd and by hooks as any gradient is, and passes on whole. The values of the dense
    gradient it stands for are not in it.
    """

    parts: tuple[Tensor | None, ...]

    @staticmethod
    def of(form: Form, parts: Sequence[Tensor | None]) -> LazyGradient:
        """Return the gradient of a lazy tensor of this form."""
        gradient: LazyGradient = without_memory(LazyGradient, form)
        gradient.parts = tuple(parts)
        return gradient

    @staticmethod
    def of_dense(form: Form, dense: Tensor | None, parts: int) -> LazyGradient:
        """Return a dense gradient as one of these; of nothing, 0."""
        return LazyGradient.of(form, (*[None] * (parts - 1), dense))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override] # an odd stub
        """Say whose gradient it may be."""
        return f"LazyGradient(shape={tuple(self.shape)}, dtype={self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment] # as in torch

    def _each(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> LazyGradient:
        form = Form(self.shape, dtype or self.dtype, self.device)
        return LazyGradient.of(form, [None if part is None else function(part) for part in self.parts])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch's stub is of a static method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer what autograd, its accumulation and hooks do with gradients; refuse the rest."""
        rule = _RULES.get(func.overloadpacket)
        result = NotImplemented if rule is None else rule(func, *args, **(kwargs or {}))
        if result is NotImplemented:
            raise TypeError(
                f"{func}: the gradient of lazy logits is that of its head's parts, which adds and scales; for the "
                "values of d loss / d logits differentiate with respect to logits.materialize()"
            )
        return result


def _same(func: Any, gradient: Any, *args: Any, **kwargs: Any) -> Any:
    return gradient._each(lambda part: part)


def _viewed(func: Any, gradient: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
    return gradient._each(lambda part: part) if tuple(shape) == tuple(gradient.shape) else NotImplemented


def _cloned(func: Any, gradient: Any, **kwargs: Any) -> Any:
    return gradient._each(torch.clone)


def _cast(func: Any, gradient: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    if device is not None and torch.device(device).type != gradient.device.type:
        return NotImplemented
    return gradient._each(lambda part: part, dtype)


def _negative(func: Any, gradient: Any) -> Any:
    return gradient._each(torch.neg)


def _is_number(value: Any) -> bool:
    return not isinstance(value, Tensor) or (value.dim() == 0 and not isinstance(value, LazyGradient))


def _scaled(func: Any, first: Any, second: Any) -> Any:
    if isinstance(first, LazyGradient) and _is_number(second):
        return first._each(lambda part: func(part, second))
    if func.overloadpacket is aten.mul and isinstance(second, LazyGradient) and _is_number(first):
        return second._each(lambda part: func(part, first))
    return NotImplemented


def _scaled_in_place(func: Any, gradient: Any, factor: Any) -> Any:
    if not isinstance(gradient, LazyGradient) or not _is_number(factor):
        return NotImplemented
    divides = func.overloadpacket is aten.div_
    gradient.parts = gradient._each(lambda part: part / factor if divides else part * factor).parts
    return gradient


def _sum(first: Tensor, second: Tensor, alpha: Any) -> Any:
    known = first if isinstance(first, LazyGradient) else second
    if not isinstance(known, LazyGradient) or not isinstance(second, Tensor) or first.shape != second.shape:
        return NotImplemented

    def parts(of: Any) -> Sequence[Tensor | None]:
        return of.parts if isinstance(of, LazyGradient) else (*[None] * (len(known.parts) - 1), of)

    def added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        if other is None:
            return one
        if one is None:
            return other if alpha == 1 else other * alpha
        return torch.add(one, other, alpha=alpha)

    form = Form(first.shape, torch.promote_types(first.dtype, second.dtype), first.device)
    return LazyGradient.of(form, [added(a, b) for a, b in zip(parts(first), parts(second), strict=True)])


def _added(func: Any, first: Any, second: Any, *, alpha: Any = 1) -> Any:
    return _sum(first, second, alpha)


def _subtracted(func: Any, first: Any, second: Any, *, alpha: Any = 1) -> Any:
    return _sum(first, second, -alpha)


def _added_in_place(func: Any, gradient: Any, other: Any, *, alpha: Any = 1) -> Any:
    total = _sum(gradient, other, alpha) if isinstance(gradient, LazyGradient) else NotImplemented
    if total is NotImplemented:
        return total
    gradient.parts = total.parts
    return gradient


def _zero_like(func: Any, gradient: Any, shape: Any = None, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
    """Return what autograd accumulates into: 0 until a gradient is added or copied."""
    if shape is not None and tuple(shape) != tuple(gradient.shape):
        return NotImplemented
    return LazyGradient.of_dense(
        Form(gradient.shape, dtype or gradient.dtype, gradient.device), None, len(gradient.parts)
    )


def _zeroed(func: Any, gradient: Any) -> Any:
    gradient.parts = (None,) * len(gradient.parts)
    return gradient


def _copied(func: Any, gradient: Any, source: Any, *args: Any) -> Any:
    if not isinstance(gradient, LazyGradient):
        return NotImplemented
    dense = LazyGradient.of_dense(form_of(gradient), source, len(gradient.parts))
    gradient.parts = (source if isinstance(source, LazyGradient) else dense)._each(torch.clone).parts
    return gradient


def _has_nan(func: Any, gradient: Any) -> Tensor:
    """Return whether a part has a NaN, without a dimension: what anomaly detection asks for."""
    found = [part.isnan().any() for part in gradient.parts if part is not None]
    return torch.stack(found).any() if found else torch.zeros((), dtype=torch.bool, device=gradient.device)


_RULES: dict[Any, Callable[..., Any]] = {
    aten.detach: _same,
    aten.alias: _same,
    aten.view: _viewed,
    aten._unsafe_view: _viewed,
    aten.expand: _viewed,
    aten.clone: _cloned,
    aten._to_copy: _cast,
    aten.neg: _negative,
    aten.mul: _scaled,
    aten.div: _scaled,
    aten.mul_: _scaled_in_place,
    aten.div_: _scaled_in_place,
    aten.add: _added,
    aten.sub: _subtracted,
    aten.add_: _added_in_place,
    aten.empty_like: _zero_like,
    aten.zeros_like: _zero_like,
    aten.new_zeros: _zero_like,
    aten.new_empty: _zero_like,
    aten.new_empty_strided: _zero_like,
    aten.zero_: _zeroed,
    aten.copy_: _copied,
    aten.isnan: _has_nan,
}
