"""Which backend serves a call, and why: nothing falls back in silence."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from logitless._transforms import TRACED, compile_reason, transform_reason
from logitless.kernels.native import MISSING, extension


class Forecast(NamedTuple):
    """What a call on logits that are not built will hold: a tile (rows, classes), and at its peak so many bytes."""

    tile: tuple[int, int]
    peak_bytes: int


class _Answer(NamedTuple):
    backend: str
    reason: str


class Choice(_Answer):
    """The backend a call takes, and the reason: `backend, reason = explain(...)`.

    Of logits that are not built, also the `tile` (rows, classes) and the `peak_bytes` beyond inputs and gradients; None
    where the call holds a few numbers a row, or where the reference serves it.
    """

    tile: tuple[int, int] | None
    peak_bytes: int | None

    def __new__(cls, backend: str, reason: str, forecast: Forecast | None = None) -> Choice:
        """Return the pair, with what was forecast beside it."""
        choice = super().__new__(cls, backend, reason)
        choice.tile, choice.peak_bytes = (None, None) if forecast is None else forecast
        return choice

    def __repr__(self) -> str:
        """Say all of it."""
        tile = "" if self.tile is None else f", tile={self.tile}, peak_bytes={self.peak_bytes}"
        return f"Choice(backend={self.backend!r}, reason={self.reason!r}{tile})"


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine, and what it is or why it cannot."""

    available: bool
    detail: str


class _Explained(Exception):  # noqa: N818 # it carries an answer, not an error
    def __init__(self, choice: Choice) -> None:
        super().__init__(choice)
        self.choice = choice


_NAMES = ("cpu", "reference")
_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_explaining: ContextVar[Literal["eager", "compiled"] | None] = ContextVar("_explaining", default=None)


def backends() -> dict[str, BackendStatus]:
    """Return every backend with whether it is available here and why.

    Equals what `LOGITLESS_BACKEND` and `backend=` accept on this machine.

    >>> import logitless as ll
    >>> ll.backends()["reference"].available
    True
    """
    missing = cpu_missing()
    if missing is None:
        from logitless.kernels import cpu

        facts = ", ".join(f"{name} {value}" for name, value in cpu.native_info().items())
        native = BackendStatus(True, f"compiled kernels for tensors on the CPU: {facts}")
    else:
        native = BackendStatus(False, missing)
    return {
        "cpu": native,
        "reference": BackendStatus(True, "plain torch operations on any device: the definition"),
    }


def cpu_missing() -> str | None:
    """Return why the compiled kernels are not there, or None if they are."""
    return MISSING


def cpu_by_default() -> bool:
    """Say whether the kernels are there and nobody asks for, or about, a backend."""
    return cpu_missing() is None and not extension.backend_is_forced() and not _explaining.get()


def is_about_a_graph() -> bool:
    """Say whether `explain` asks what a compiled graph does."""
    return _explaining.get() == "compiled"


def pick(
    operation: str,
    tensors: Sequence[Tensor | None],
    backend: str | None = None,
    *,
    obstacle: str | None = None,
    forecast: Callable[[], Forecast] | None = None,
    compiles: bool = False,
) -> str:
    """Return the name of the backend for an operation on these tensors; raise if the one asked for cannot serve it.

    `obstacle` is the caller's own reason why the kernels cannot, where there is one; `forecast` says what they will
    hold if they can; `compiles` says that the operation reaches them by an operator of `_library` in a graph that is
    being compiled.
    """
    compiling = torch.compiler.is_compiling()
    explaining = None if compiling else _explaining.get()
    if (compiling or explaining == "compiled") and not compiles:
        obstacle = TRACED
    asked = backend if backend is not None else os.environ.get("LOGITLESS_BACKEND") or None
    if asked is None and not explaining:
        return "reference" if _cpu_obstacle(tensors, obstacle) else "cpu"
    choice = _choose(operation, tensors, asked, "backend=" if backend is not None else "LOGITLESS_BACKEND", obstacle)
    if explaining:
        if choice.backend == "cpu" and forecast is not None:
            choice = Choice(choice.backend, choice.reason, forecast())
        raise _Explained(choice)
    return choice.backend


def _choose(
    operation: str, tensors: Sequence[Tensor | None], asked: str | None, by: str, obstacle: str | None
) -> Choice:
    if asked is not None and asked not in _NAMES:
        raise ValueError(f"{operation}: {by} asks for {asked!r}; expected one of {', '.join(_NAMES)}")
    if asked == "reference":
        return Choice("reference", f"{by} asks for it")
    reason = _cpu_obstacle(tensors, obstacle)
    if asked == "cpu" and reason is not None:
        raise RuntimeError(f"{operation}: {by} asks for 'cpu', which cannot serve this call: {reason}")
    return Choice("cpu", "the tensors are on the CPU") if reason is None else Choice("reference", reason)


def _cpu_obstacle(tensors: Sequence[Tensor | None], obstacle: str | None) -> str | None:
    if obstacle is not None:
        return obstacle
    missing = cpu_missing()
    if missing is not None:
        return missing
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TENSORS:
            return f"a {type(tensor).__name__} is not a plain tensor"
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}"
        if tensor.layout != torch.strided or (tensor.is_floating_point() and tensor.dtype not in _CPU_DTYPES):
            return f"no kernel for {tensor.dtype} in layout {tensor.layout}"
        if not torch.compiler.is_compiling() and tensor.is_neg():  # an operator gets such a tensor written out
            return "a tensor's memory holds its negative; resolve_neg() writes it out"
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
