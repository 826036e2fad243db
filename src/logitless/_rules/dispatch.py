"""Which backend serves a call, and why: nothing falls back in silence."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from logitless._rules.transforms import TRACED, compile_reason, transform_reason
from logitless.kernels import cpu, native, reference, triton
from logitless.kernels.interface import Backend, WholeCalls
from logitless.kernels.products import of_fixed_order

# In the order in which they are tried; the last one takes what the others do not. A new backend is a line here.
BACKENDS: dict[str, Backend] = {"cpu": cpu, "triton": triton, "reference": reference}
# What the name of a backend ends in that takes no product but those of a fixed order.
_FIXED = ", deterministic"
_DETERMINISTIC = {name: of_fixed_order(backend, name + _FIXED) for name, backend in BACKENDS.items()}
# The one whose calls torch differentiates.
DEFINITION = reference.NAME
# The backend that spares small calls all that stands around its kernels.
WHOLE_CALLS: WholeCalls = cpu


class Forecast(NamedTuple):
    """What a call on logits that are not built will hold: a tile (rows, classes), and at its peak so many bytes.

    And who multiplies, with the reason, and how many of the bytes are logits that wait for the backward pass.
    """

    tile: tuple[int, int]
    peak_bytes: int
    products: str
    kept_bytes: int


class _Answer(NamedTuple):
    backend: str
    reason: str


class Choice(_Answer):
    """The backend a call takes, and the reason: `backend, reason = explain(...)`.

    Of logits that are not built, also the `tile` (rows, classes), the `peak_bytes` beyond inputs and gradients, and
    whose `products` are taken and why; None where the call holds a few numbers a row, or the reference serves it.
    `kept_bytes` of the peak are logits that wait for the backward pass of a loss of each row, so that it need not make
    them again.
    """

    tile: tuple[int, int] | None
    peak_bytes: int | None
    products: str | None
    kept_bytes: int

    def __new__(cls, backend: str, reason: str, forecast: Forecast | None = None) -> Choice:
        """Return the pair, with what was forecast beside it."""
        choice = super().__new__(cls, backend, reason)
        choice.tile, choice.peak_bytes, choice.products, choice.kept_bytes = forecast or (None, None, None, 0)
        return choice

    def __repr__(self) -> str:
        """Say all of it."""
        held = ""
        if self.tile is not None:
            held = f", tile={self.tile}, peak_bytes={self.peak_bytes}, products={self.products!r}"
        if self.kept_bytes:
            held += f", kept_bytes={self.kept_bytes}"
        return f"Choice(backend={self.backend!r}, reason={self.reason!r}{held})"


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine, and what it is or why it cannot."""

    available: bool
    detail: str


class _Explained(Exception):  # noqa: N818 # it carries an answer, not an error
    def __init__(self, choice: Choice) -> None:
        super().__init__(choice)
        self.choice = choice


_explaining: ContextVar[Literal["eager", "compiled"] | None] = ContextVar("_explaining", default=None)


def explains_a_graph() -> bool:
    """Say whether `explain` was asked about a call in a compiled graph."""
    return _explaining.get() == "compiled"


def backends() -> dict[str, BackendStatus]:
    """Return every backend with whether it is available here and why.

    Equals what `LOGITLESS_BACKEND` and `backend=` accept on this machine.

    >>> import logitless as ll
    >>> ll.backends()["reference"].available
    True
    """
    return {name: _status(backend) for name, backend in BACKENDS.items()}


def _status(backend: Backend) -> BackendStatus:
    lacks = backend.lacks()
    return BackendStatus(True, backend.detail()) if lacks is None else BackendStatus(False, lacks)


def whole_calls() -> WholeCalls | None:
    """Return the backend of small calls, where it is there and nobody asks for, or about, a backend."""
    if WHOLE_CALLS.missing() is None and not native.extension.backend_is_forced() and not _explaining.get():
        return WHOLE_CALLS
    return None


def named(backend: str) -> Backend:
    """Return a backend by its name, as an operator in a compiled graph has it."""
    name, _, fixed = backend.partition(_FIXED)
    return _DETERMINISTIC[name] if fixed else BACKENDS[name]


def serving(*tensors: Tensor | None) -> Backend:
    """Return the backend whose kernels take these tensors as they are; raise where none does."""
    backend = of_device(next(tensor.device.type for tensor in tensors if tensor is not None))
    reason = backend.missing() or backend.obstacle(tensors)
    if reason is not None:
        raise RuntimeError(f"no kernel takes these tensors: {reason}")
    return backend


def of_device(kind: str) -> Backend:
    """Return the first backend with kernels for a kind of device; raise where there is none."""
    for backend in BACKENDS.values():
        if kind in backend.DEVICE_TYPES:
            return backend
    raise RuntimeError(f"no backend has kernels for tensors on {kind}")


def pick(
    operation: str,
    tensors: Sequence[Tensor | None],
    backend: str | None = None,
    *,
    obstacle: str | None = None,
    forecast: Callable[[Backend], Forecast] | None = None,
    compiles: bool = False,
    deterministic: Sequence[Tensor | None] | None = None,
) -> Backend:
    """Return the backend for an operation on these tensors; raise if the one asked for cannot serve it.

    `deterministic` asks for rows whose bits nothing beside them decides, and names the factors of their products, if
    any: it raises where nobody promises that.
    `obstacle` is the caller's own reason why no kernel can, where there is one; `forecast` says what a backend will
    hold if it can; `compiles` says that the operation reaches kernels by an operator of `_operators` in a graph that is
    being compiled.
    """
    compiling = torch.compiler.is_compiling()
    explaining = None if compiling else _explaining.get()
    if (compiling or explaining == "compiled") and not compiles:
        obstacle = TRACED
    asked = backend if backend is not None else os.environ.get("LOGITLESS_BACKEND") or None
    by = "backend=" if backend is not None else "LOGITLESS_BACKEND"
    picked, reason = _asked_for(operation, asked, by, tensors, obstacle) if asked else _first_fit(tensors, obstacle)
    if deterministic is not None:
        picked = _deterministic(operation, picked, reason, deterministic)
    if explaining:
        foreseen = None if picked.PLAIN or forecast is None else forecast(picked)
        raise _Explained(Choice(picked.NAME.removesuffix(_FIXED), reason, foreseen))
    return picked


def _asked_for(
    operation: str, asked: str, by: str, tensors: Sequence[Tensor | None], obstacle: str | None
) -> tuple[Backend, str]:
    picked = BACKENDS.get(asked)
    if picked is None:
        raise ValueError(f"{operation}: {by} asks for {asked!r}; expected one of {', '.join(BACKENDS)}")
    if picked.PLAIN:
        return picked, f"{by} asks for it"
    reason = _obstacle(picked, tensors, obstacle)
    if reason is not None:
        raise RuntimeError(f"{operation}: {by} asks for {asked!r}, which cannot serve this call: {reason}")
    return picked, picked.served()


def _first_fit(tensors: Sequence[Tensor | None], obstacle: str | None) -> tuple[Backend, str]:
    """Return the first backend for the tensors' kind of device that takes the call.

    Of the last one, which takes what the others do not, the reason is why the first for the kind does not, or where
    there is none for it, why the first of all.
    """
    kind = next((tensor.device.type for tensor in tensors if tensor is not None), None)
    kernels = [backend for backend in BACKENDS.values() if not backend.PLAIN]
    meant = [backend for backend in kernels if kind in backend.DEVICE_TYPES] or kernels[:1]
    first_reason = None
    for backend in (*meant, *(backend for backend in BACKENDS.values() if backend.PLAIN)):
        if backend.PLAIN:
            return backend, first_reason or backend.served()
        reason = _obstacle(backend, tensors, obstacle)
        if reason is None:
            return backend, backend.served()
        first_reason = first_reason or reason
    raise RuntimeError(f"no backend serves this call: {first_reason}")


def _deterministic(operation: str, picked: Backend, reason: str, factors: Sequence[Tensor | None]) -> Backend:
    """Return the backend with products of a fixed order for these factors; raise where it has none."""
    if picked.PLAIN:
        reason = f"torch's operations serve this call ({reason}), and promise no order of their sums"
        raise RuntimeError(f"{operation}: deterministic=True cannot be kept: {reason}")
    kinds = {factor.dtype for factor in factors if factor is not None}
    for dtype in kinds - picked.FIXED_PRODUCTS:
        raise RuntimeError(
            f"{operation}: deterministic=True cannot be kept: no kernel multiplies {dtype} on this processor, and "
            "torch's product promises no order of its sums; a head in float32 can be multiplied everywhere"
        )
    return _DETERMINISTIC.get(picked.NAME, picked)  # of one that multiplies nothing, itself


def _obstacle(backend: Backend, tensors: Sequence[Tensor | None], obstacle: str | None) -> str | None:
    reason = obstacle or backend.missing() or backend.obstacle(tensors)
    if reason is not None:
        return reason
    return compile_reason() if torch.compiler.is_compiling() else transform_reason(*tensors)


def explain(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Return the backend that `call(*args, **kwargs)` would take and why, without running it.

    Equals the choice the call itself makes: the call is begun, its arguments checked, and stopped at that choice. Of a
    function or module that `torch.compile` made it is the choice inside the compiled graph. Of LazyLogits it also
    forecasts the tile and the peak memory, the backward pass included where there will be one.

    >>> import torch, logitless as ll
    >>> choice = ll.explain(ll.functional.cross_entropy, torch.zeros(1, 2), torch.tensor([0]), backend="reference")
    >>> choice.backend, choice.reason
    ('reference', 'backend= asks for it')
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("explain cannot be compiled: call it on the compiled function, from outside")
    compiled = _is_compiled(call)
    token = _explaining.set("compiled" if compiled else "eager")
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            call(*args, **kwargs)
    except _Explained as answer:
        return answer.choice
    finally:
        _explaining.reset(token)
    raise ValueError(f"{getattr(call, '__name__', call)!r} makes no choice of a backend: it is not a logitless call")


def _is_compiled(call: object) -> bool:
    marks = ("_torchdynamo_orig_callable", "_orig_mod", "_compiled_call_impl")
    return any(getattr(call, mark, None) is not None for mark in marks)
