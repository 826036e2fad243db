"""What every test runs under: no network, one thread, fixed seeds, and no luck with uninitialised memory."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# A test run times products for itself, once for all of its processes: what a user's cache says is not under test.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _caches = tempfile.TemporaryDirectory(prefix="logitless-tests-")
    os.environ["XDG_CACHE_HOME"] = _caches.name

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed_and_one_thread() -> Iterator[None]:
    """The suite runs one process a core, so each process computes on one thread unless a test asks for more."""
    torch.manual_seed(20240229)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _poisoned(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = real(*args, **kwargs)
        if torch.compiler.is_compiling():  # dynamo must see the real function, not a look at the stack
            return made
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not caller.startswith("logitless") or made.device.type == "meta":
            return made
        with torch.no_grad():
            if made.is_floating_point():
                return made.fill_(float("nan"))
            if made.dtype is torch.bool:
                return made.fill_(True)
            return made.fill_(torch.iinfo(made.dtype).max - 1)

    return allocate


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that logitless asks for uninitialised holds NaN, so that an element never written fails a test.

    Source: flash-linear-attention's tests/conftest.py.
    """
    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
