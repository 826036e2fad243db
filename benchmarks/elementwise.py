"""The elementwise and cosine losses against torch eager and against memory, in one run, as JSON rows.

Every row holds interleaved medians of both, their ratio, the time that the bytes alone would take at the bandwidth of
the same run, and how much memory the call needed beyond its inputs and gradients. Results are compared before anything
is timed. Run: python benchmarks/elementwise.py [--repeat N] [--threads N] [--small]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import logitless.functional as LF
from logitless.kernels.cpu import native_info, pool_clear

Inputs = tuple[Tensor, ...]
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One measure on one shape: ours and torch's, each a scalar function of the inputs."""

    what: str
    inputs: Inputs
    ours: Loss
    eager: Loss
    gradients: int  # how many of the inputs get one
    reads_in_backward: int


def step(loss: Loss, inputs: Inputs, gradients: int, backward: bool) -> tuple[float, Inputs]:
    """The value, and if told so the gradients of the first inputs."""
    leaves = tuple(x.detach().requires_grad_(backward and i < gradients) for i, x in enumerate(inputs))
    value = loss(*leaves)
    return float(value.detach()), torch.autograd.grad(value, leaves[:gradients]) if backward else ()


def cases(small: bool) -> Iterator[Case]:
    shapes = ((8, 10), (256, 100)) if small else ((4096, 32000), (8192, 1000))
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            x, t = torch.randn(shape).to(dtype), torch.rand(shape).to(dtype)
            logits = (LF.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits)
            yield Case("bce_logits", (x, t), *logits, 1, 2)
            p = torch.rand(shape).to(dtype)
            yield Case("bce", (p, t), LF.binary_cross_entropy, F.binary_cross_entropy, 1, 2)
            del p
            log_p = torch.log_softmax(x.float(), 1).to(dtype)
            for log_target in (False, True):
                q = torch.log_softmax(t.float() * 4, 1)
                q = (q if log_target else q.exp()).to(dtype)
                options: dict[str, Any] = {"reduction": "batchmean", "log_target": log_target}
                what = "kl_div, log target" if log_target else "kl_div"
                yield Case(what, (log_p, q), partial(LF.kl_div, **options), partial(F.kl_div, **options), 1, 1)
    for dtype in (torch.float32, torch.bfloat16):
        pairs = (8, 16) if small else (1_000_000, 128)
        a, b = torch.randn(pairs).to(dtype), torch.randn(pairs).to(dtype)
        target = torch.randint(0, 2, pairs[:1]) * 2 - 1
        cosines = [summed(module.cosine_similarity) for module in (LF, F)]
        yield Case("cosine_similarity", (a, b), cosines[0], cosines[1], 2, 2)
        embedding = [
            partial(summed(module.cosine_embedding_loss), target=target, reduction="none") for module in (LF, F)
        ]
        yield Case("cosine_embedding_loss", (a, b), embedding[0], embedding[1], 2, 2)


def summed(rows: Loss) -> Loss:
    return lambda a, b, **options: rows(a, b, **options).float().sum()


def seconds(run: Callable[[], object], calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def bandwidths() -> tuple[float, float]:
    """Bytes a second of reading once, and of reading and writing memory that is already mapped."""
    source = torch.ones(128 << 20)
    into = torch.zeros_like(source)
    read = min(seconds(source.sum) for _ in range(7))
    copy = min(seconds(lambda: into.copy_(source)) for _ in range(7))
    return source.nbytes / read, 2 * source.nbytes / copy


def memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    assert found is not None
    return int(found[1]) * 1024


def extra_memory(case: Case, backward: bool) -> int:
    """Bytes of the peak beyond inputs and gradients."""
    pool_clear()
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # resets the peak
    before = memory("VmRSS")
    step(case.ours, case.inputs, case.gradients, backward)
    return memory("VmHWM") - before - backward * case.gradients * case.inputs[0].nbytes


def check(case: Case) -> None:
    """Against torch in float32 on the same numbers: a half value or gradient is one rounding away."""
    rounding = 2**-8 if case.inputs[0].dtype.itemsize == 2 else 1e-4
    exact = tuple(x.float() for x in case.inputs)
    value, grads = step(case.ours, case.inputs, case.gradients, True)
    other, others = step(case.eager, exact, case.gradients, True)
    if abs(value - other) > rounding * max(1.0, abs(other)):
        raise SystemExit(f"{case.what}: {value} where torch gives {other}")
    for grad, true in zip(grads, others, strict=True):
        error, largest = float((grad[:64] - true[:64]).abs().max()), float(true[:64].abs().max())
        if error > rounding * largest:
            raise SystemExit(f"{case.what}: a gradient differs by {error} of {largest}")


def measure(case: Case, backward: bool, repeat: int, calls: int) -> dict[str, object]:
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: step(case.ours, case.inputs, case.gradients, backward),
        "eager": lambda: step(case.eager, case.inputs, case.gradients, backward),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            times[name].append(seconds(run, calls))
    ours, torchs = (statistics.median(times[name]) * 1e3 for name in runs)
    return {
        "what": case.what,
        "shape": list(case.inputs[0].shape),
        "dtype": str(case.inputs[0].dtype).removeprefix("torch."),
        "mode": "forward+backward" if backward else "forward",
        "ours_ms": round(ours, 4),
        "eager_ms": round(torchs, 4),
        "ratio": round(torchs / ours, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--small", action="store_true", help="small inputs, where the overhead of a call is what counts"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    read, copy = bandwidths()
    machine = {"isa": native_info()["isa"], "threads": options.threads, "torch": torch.__version__}
    print(json.dumps({**machine, "read_gb_per_s": round(read / 1e9, 1), "copy_gb_per_s": round(copy / 1e9, 1)}))
    for case in cases(options.small):
        check(case)
        size = case.inputs[0].nbytes
        for backward in (False, True):
            row = measure(case, backward, options.repeat, 500 if options.small else 1)
            if not options.small:
                limit = 2 * size / read + backward * (case.reads_in_backward + case.gradients) * size / copy
                row["of_limit"] = round(limit * 1e3 / float(str(row["ours_ms"])), 2)
                row["extra_mb"] = round(extra_memory(case, backward) / 1e6, 1)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
