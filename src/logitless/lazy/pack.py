"""Parts to a lazy tensor and back, as autograd sees it.

    lazy = pack(kind, settings, *parts)        parts = unpack(lazy)

The two are inverse to each other, so the gradient of a lazy tensor is the tuple of its parts' gradients, a
`LazyGradient`. What is made of a lazy tensor without computing it (a slice, a scale, a loss) is made of its parts by
torch's own operations, between an unpack and a pack; their derivatives are torch's. Hooks, `autograd.grad` with respect
to the logits, and the walks of DDP and FSDP meet an ordinary node of an ordinary graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from logitless._heads.window import Window
from logitless._rules.derivatives import applied_directly
from logitless.lazy.gradient import Form, LazyGradient, form_of

Parts = Sequence[Tensor | None]
Settings = tuple[Any, ...]

_ARGUMENTS = 4  # of Pack before the parts


class Kind(Protocol):
    """A class of lazy tensors."""

    def made(self, parts: Parts, wanted: Sequence[bool], settings: Settings, window: Window | None) -> Any:
        """Return the lazy tensor of these parts, without a graph."""
        ...

    def gradients_of_dense(
        self, parts: Parts, wanted: Sequence[bool], settings: Settings, window: Window | None, dense: Tensor
    ) -> Sequence[Tensor | None]:
        """Return the gradients of the parts, of a dense gradient of the values."""
        ...


def _graphless(gradient: Tensor) -> Tensor:
    """Return a gradient outside its graph, where none is recorded; gradients that come in a batch have no `detach`."""
    batched = torch._C._functorch.is_legacy_batchedtensor(gradient)
    return gradient.view_as(gradient) if batched else gradient.detach()


class _PackGradient(torch.autograd.Function):
    """The parts' gradients to the lazy tensor's; differentiable, as its own gradient is unpacked the same way."""

    @staticmethod
    def forward(ctx: Any, form: Form, *gradients: Tensor | None) -> LazyGradient:
        ctx.set_materialize_grads(False)
        return LazyGradient.of(form, [None if g is None else _graphless(g) for g in gradients])

    @staticmethod
    def backward(ctx: Any, gradient: LazyGradient | None) -> Any:
        if gradient is None:
            return (None,) * len(ctx.needs_input_grad)
        return (None, *_UnpackGradient.apply(gradient))  # type: ignore[no-untyped-call] # torch types it not


class _UnpackGradient(torch.autograd.Function):
    """The way back."""

    @staticmethod
    def forward(ctx: Any, gradient: LazyGradient) -> tuple[Tensor | None, ...]:
        ctx.form = form_of(gradient)
        ctx.set_materialize_grads(False)
        return tuple(None if part is None else _graphless(part) for part in gradient.parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if all(gradient is None for gradient in gradients):
            return None
        return _PackGradient.apply(ctx.form, *gradients)  # type: ignore[no-untyped-call] # torch types it not


class _Pack(torch.autograd.Function):
    """The parts as a lazy tensor; it runs where the head's forward runs, so the head has a `grad_fn`."""

    @staticmethod
    def forward(
        ctx: Any,
        kind: Kind,
        settings: Settings,
        inherited: Sequence[bool] | None,
        window: Window | None,
        *parts: Tensor | None,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parts)
        wanted = ctx.needs_input_grad[_ARGUMENTS:]
        ctx.made = (kind, settings, window, wanted)
        return _without_graph(kind, settings, inherited, window, parts, wanted)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        return (*[None] * _ARGUMENTS, *_gradients_of_parts(ctx, gradient))


def pack(
    kind: Kind, settings: Settings, inherited: Sequence[bool] | None, window: Window | None, *parts: Tensor | None
) -> Any:
    """Return the lazy tensor of these parts; `inherited` are the parts that what it is made of wanted a gradient of."""
    wanted = tuple([part is not None and part.requires_grad for part in parts])
    if torch.is_grad_enabled() and True in wanted:
        return _apply_pack(kind, settings, inherited, window, *parts)
    return _without_graph(kind, settings, inherited, window, parts, wanted)


def _without_graph(
    kind: Kind,
    settings: Settings,
    inherited: Sequence[bool] | None,
    window: Window | None,
    parts: Parts,
    wanted: Sequence[bool],
) -> Any:
    if inherited is not None:
        # Made without a graph (in another function's forward), it still wants what its origin wanted.
        wanted = tuple(
            (mine or theirs) and part is not None for mine, theirs, part in zip(wanted, inherited, parts, strict=True)
        )
    return kind.made([None if part is None else part.detach() for part in parts], wanted, settings, window)


def _gradients_of_parts(ctx: Any, gradient: Tensor | None) -> Sequence[Tensor | None]:
    wanted: Sequence[bool]
    kind, settings, window, wanted = ctx.made
    if gradient is None:
        return (None,) * len(wanted)
    parts: Sequence[Tensor | None] = (None,) * len(wanted)
    dense: Tensor | None = gradient
    if isinstance(gradient, LazyGradient):
        again = torch.is_grad_enabled()
        *parts, dense = _UnpackGradient.apply(gradient) if again else gradient.parts  # type: ignore[no-untyped-call] # torch types it not
    if dense is not None:
        more = kind.gradients_of_dense(ctx.saved_tensors, wanted, settings, window, dense)
        parts = [b if a is None else a if b is None else a + b for a, b in zip(parts, more, strict=True)]
    return [part if want else None for part, want in zip(parts, wanted, strict=True)]


class _Unpack(torch.autograd.Function):
    """A lazy tensor's parts; what is computed of them sends their gradients back as the lazy tensor's."""

    @staticmethod
    def forward(ctx: Any, lazy: Any) -> tuple[Tensor | None, ...]:
        ctx.form = lazy.form
        ctx.set_materialize_grads(False)
        parts = tuple([None if part is None else part.detach() for part in lazy.raw])
        if not all(lazy.wanted):
            unwanted = [p for p, want in zip(parts, lazy.wanted, strict=True) if p is not None and not want]
            ctx.mark_non_differentiable(*unwanted)
        return parts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if all(gradient is None for gradient in gradients):
            return None
        if torch.is_grad_enabled():
            return _PackGradient.apply(ctx.form, *gradients, None)  # type: ignore[no-untyped-call] # torch types it not
        return LazyGradient.of(ctx.form, (*gradients, None))


class _Written(torch.autograd.Function):
    """A write: the lazy tensor takes other parts, and autograd is told."""

    @staticmethod
    def forward(ctx: Any, lazy: Any, settings: Settings, *parts: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parts)
        wanted = ctx.needs_input_grad[2:]
        ctx.made = (type(lazy), settings, lazy.window, wanted)
        ctx.mark_dirty(lazy)
        lazy.take_written([None if part is None else part.detach() for part in parts], wanted, settings)
        return lazy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        return (None, None, *_gradients_of_parts(ctx, gradient))


# Called outside function transforms alone.
_apply_pack: Any = applied_directly(_Pack)
unpack: Any = applied_directly(_Unpack)
write: Any = applied_directly(_Written)
