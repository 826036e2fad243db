"""What a call of the extension costs, in nanoseconds: rows so small that the arguments are most of the work.

    python benchmarks/call_overhead.py [EXTENSION]

EXTENSION is the file of another build, to compare with.
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from logitless import _native

CALLS, ROUNDS = 20000, 15


def least_ns(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    rounds = []
    for _ in range(ROUNDS):
        start = time.process_time_ns()
        for _ in range(CALLS):
            function(*arguments)
        rounds.append((time.process_time_ns() - start) / CALLS)
    return min(rounds)


def loaded(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    native = loaded(sys.argv[1]) if len(sys.argv) > 1 else _native
    logits, target, grad = torch.randn(1, 4), torch.zeros(1, dtype=torch.int64), torch.empty(1, 4)
    forward = (1, logits, target, None, -100, 0.0, True, None, None, True)
    native.tensors_are(torch.Tensor, torch.Tensor.__dlpack_c_exchange_api__, torch.utils.dlpack.to_dlpack)
    _, _, saved = native.cross_entropy(*forward)
    operand = (logits.data_ptr(), 0, (4, 1))
    calls: dict[str, tuple[Any, ...]] = {
        "backend_is_forced": (),
        "cross_entropy": forward,
        "cross_entropy_grad": (1, logits, target, None, saved, torch.ones(()), grad),
        "elementwise": (0, False, 1, (1, 4), operand, operand, None, None, None, 1.0, (grad.data_ptr(), 0, (4, 1))),
    }
    for name, arguments in calls.items():
        print(f"{name:20s} {len(arguments):2d} arguments {least_ns(getattr(native, name), arguments):6.0f} ns")


if __name__ == "__main__":
    main()
