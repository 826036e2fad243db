"""Peak memory of one call, counted by the operating system; of a provider of a case, in a process of its own.

What the process held before the call, inputs included, and the gradients it returns do not count.
"""

from __future__ import annotations

import ctypes
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from logitless._bench.protocol import Case
from logitless._bench.providers import Provider, as_tensor
from logitless.kernels import cpu

Result = TypeVar("Result")

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # of proc(5): the peak becomes what is resident now
_WARM_ROWS = 8


def call_and_growth(call: Callable[[], Result]) -> tuple[Result, int | None]:
    """Return what a call returns, and how far the resident size rose above what it was before, at its peak, in bytes.

    Memory that nobody uses any more is given back first: it would hide as much of the call's own. Where the system
    cannot reset its peak (all but Linux) only a new peak of the whole process is seen, and None stands for no new one.
    """
    give_back()
    before = _status("VmRSS")
    if before is not None and _reset_peak():
        result = call()
        peak = _status("VmHWM")
        assert peak is not None
        return result, max(0, peak - before)
    before = _process_peak()
    result = call()
    growth = _process_peak() - before
    return result, growth or None


def extra_bytes(case: Case, provider: Provider, mode: str) -> int | None:
    """Return the peak of a call beyond inputs and gradients; meant for a process in which nothing ran before.

    Plain operations run once on few rows first, so that libraries and threads are there; others are compiled by now.
    """
    if provider.plain:
        provider.prepare(case.inputs(_WARM_ROWS), case.leaves, mode)()
    call = provider.prepare(case.inputs(), case.leaves, mode)
    outcome, growth = call_and_growth(call)
    if outcome is None or growth is None:
        return growth
    return max(0, growth - sum(as_tensor(gradient).nbytes for gradient in outcome[1]))


def extra_bytes_apart(case: Case, provider: Provider, mode: str, *, quick: bool) -> int | None:
    """Return `extra_bytes` of a process of its own, on as many threads as this one has."""
    asked = {"case": case.name, "provider": provider.name, "mode": mode, "quick": quick}
    asked["threads"] = torch.get_num_threads()
    command = [sys.executable, "-m", "logitless._bench.peak_of_one", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(f"{case.name}: the memory of {provider.name} could not be measured: {last}")
    found: int | None = json.loads(done.stdout)
    return found


def _status(field: str) -> int | None:
    if not _STATUS.exists():
        return None
    lines = (line.split() for line in _STATUS.read_text("ascii").splitlines())
    return next((int(line[1]) * 1024 for line in lines if line and line[0] == f"{field}:"), None)


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text(_RESET_PEAK, "ascii")
    except OSError:
        return False
    return True


def _process_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back() -> None:
    """Return freed memory to the system: the gradient pool's, and the C library's."""
    if cpu.missing() is None:
        cpu.pool_clear()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
