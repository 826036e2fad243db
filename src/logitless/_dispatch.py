"""Which backend serves a call, and why: nothing falls back in silence."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from logitless._transforms import transform_reason


class Choice(NamedTuple):
    """The backend a call takes, and the reason."""

    backend: str
    reason: str


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine, and what it is or why it cannot."""

    available: bool
    detail: str


_BACKENDS = ("reference",)


def backends() -> dict[str, BackendStatus]:
    """Return every backend with whether it is available here and why.

    Equals what `LOGITLESS_BACKEND` and `backend=` accept on this machine.

    >>> import logitless as ll
    >>> ll.backends()["reference"].available
    True
    """
    return {"reference": BackendStatus(True, "plain torch operations on any device: the definition")}


def pick(operation: str, tensors: tuple[Tensor | None, ...], backend: str | None = None) -> Choice:
    """Return the backend for an operation on these tensors; raise if the one asked for cannot serve it."""
    asked, by = (
        (backend, "backend=") if backend is not None else (os.environ.get("LOGITLESS_BACKEND"), "LOGITLESS_BACKEND")
    )
    if asked and asked not in _BACKENDS:
        raise ValueError(f"{operation}: {by} asks for {asked!r}; expected one of {', '.join(_BACKENDS)}")
    if asked:
        return Choice(asked, f"{by} asks for it")
    reason = transform_reason(*tensors)
    return Choice("reference", reason or "the only backend of this version")


def explain(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Return the backend that `call(*args, **kwargs)` would take and why, without running it.

    Equals the choice the call itself makes: both ask the same function.

    >>> import torch, logitless as ll
    >>> ll.explain(ll.functional.cross_entropy, torch.zeros(1, 2), torch.tensor([0])).backend
    'reference'
    """
    tensors = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return pick(getattr(call, "__name__", repr(call)), tensors, kwargs.get("backend"))
