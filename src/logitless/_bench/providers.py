"""Who computes a case: logitless, torch, torch.compile, JAX, or a bare operation that bounds them all.

A provider turns a case's inputs into a call without arguments. Each call asks for its gradients anew and keeps none,
as a training step that sets them to None does; giving them back is part of the time.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

FORWARD, BOTH = "forward", "forward+backward"
MODES = (FORWARD, BOTH)

Inputs = tuple[Tensor, ...]
Loss = Callable[..., Tensor]
Outcome = tuple[Any, tuple[Any, ...]] | None  # the value and its gradients; None of a bare operation
Call = Callable[[], Outcome]
Kind = Literal["ours", "peer", "limit", "stage"]


@dataclass(frozen=True)
class Provider:
    """A name, and `prepare(inputs, leaves, mode)`, which returns what is timed; `leaves` are the inputs to derive by.

    A `limit` is work that no loss can do without, a `stage` a part of ours. `plain` providers run torch operations as
    they are called, so they can be held against float64 on other shapes at no cost of compilation.
    """

    name: str
    kind: Kind
    prepare: Callable[[Inputs, Sequence[int], str], Call]
    modes: Sequence[str] = MODES
    plain: bool = True
    needs: Sequence[str] = ()
    needs_bytes: int = 0

    def obstacle(self) -> str | None:
        """Return why this machine cannot run it, or None."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            return f'{", ".join(missing)} not installed; run: pip install "logitless[bench]"'
        available = _available_bytes()
        if available is not None and self.needs_bytes > available:
            return f"it needs {self.needs_bytes / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are available"
        return None


def ours(loss: Loss, name: str = "logitless", modes: Sequence[str] = MODES) -> Provider:
    """Return logitless itself; a longer name says with which option."""
    return Provider(name, "ours", _torch_steps(loss), modes)


def eager(loss: Loss, name: str = "torch eager", modes: Sequence[str] = MODES, needs_bytes: int = 0) -> Provider:
    """Return a loss of torch's as it is called; `needs_bytes` for one that may not fit into memory."""
    return Provider(name, "peer", _torch_steps(loss), modes, needs_bytes=needs_bytes)


def compiled(loss: Loss) -> Provider:
    """Return torch's loss under `torch.compile`, for the one shape."""

    def prepare(inputs: Inputs, leaves: Sequence[int], mode: str) -> Call:
        torch._dynamo.reset()
        return _torch_steps(torch.compile(loss, dynamic=False))(inputs, leaves, mode)

    return Provider("torch.compile", "peer", prepare, plain=False)


def optax(loss: Callable[..., Any], modes: Sequence[str] = MODES) -> Provider:
    """Return `loss(optax, *arrays)` under `jax.jit`."""

    def prepare(inputs: Inputs, leaves: Sequence[int], mode: str) -> Call:
        os.environ["NPROC"] = str(torch.get_num_threads())  # XLA's threads; it reads this once, when first used
        jax, module = importlib.import_module("jax"), importlib.import_module("optax")
        arrays = [jax.dlpack.from_dlpack(x if x.is_floating_point() else x.to(torch.int32)) for x in inputs]

        def value(*arguments: Any) -> Any:
            return loss(module, *arguments)

        function = value if mode == FORWARD else jax.value_and_grad(value, argnums=tuple(leaves))
        run = jax.jit(function).lower(*arrays).compile()
        if mode == FORWARD:
            return lambda: (jax.block_until_ready(run(*arrays)), ())
        return lambda: jax.block_until_ready(run(*arrays))

    return Provider("optax, jax.jit", "peer", prepare, modes, plain=False, needs=("jax", "optax"))


def bare(name: str, kind: Kind, work: Mapping[str, Callable[[Inputs], Callable[[], object]]]) -> Provider:
    """Return operations that give no loss: for each mode, what makes a call of the inputs."""

    def prepare(inputs: Inputs, leaves: Sequence[int], mode: str) -> Call:
        run = work[mode](inputs)

        def call() -> None:
            run()

        return call

    return Provider(name, kind, prepare, tuple(work), plain=False)


def as_tensor(result: Any) -> Tensor:
    """Return a result, of torch or JAX, as a tensor on the same memory."""
    if isinstance(result, Tensor):
        return result.detach()
    tensor: Tensor = torch.utils.dlpack.from_dlpack(result)
    return tensor


def _torch_steps(loss: Loss) -> Callable[[Inputs, Sequence[int], str], Call]:
    def prepare(inputs: Inputs, leaves: Sequence[int], mode: str) -> Call:
        if mode == FORWARD:

            def forward() -> Outcome:
                with torch.no_grad():
                    return loss(*inputs), ()

            return forward
        arguments = [x.detach().requires_grad_() if i in leaves else x for i, x in enumerate(inputs)]
        variables = [arguments[i] for i in leaves]

        def step() -> Outcome:
            value = loss(*arguments)
            value.backward()
            gradients = tuple(variable.grad for variable in variables)
            for variable in variables:
                variable.grad = None
            return value, gradients

        return step

    return prepare


def _available_bytes() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = (line.split() for line in meminfo.read_text("ascii").splitlines())
    return next((int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"), None)
