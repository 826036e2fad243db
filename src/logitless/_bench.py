"""Side-by-side timings on this machine: the cases, the providers, and the protocol.

Every provider of a case runs on the same tensors in one process, interleaved and in rotated order, and a ratio is one
of medians. A case whose value or gradient is wrong is refused before anything is timed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from logitless import functional, measures

Inputs = tuple[Tensor, ...]
Loss = Callable[..., Tensor]

LARGE_SHAPES = ((4096, 32000), (1024, 151936), (262144, 100), (8192, 1000))
SMALL_SHAPES = ((8, 10), (256, 100), (1024, 100))


@dataclass(frozen=True)
class Case:
    """One thing measured: inputs, of which the first gets the gradient, and a loss for each provider."""

    what: str
    shape: tuple[int, int]
    dtype: torch.dtype
    make: Callable[[], Inputs]
    ours: Loss
    eager: Loss
    truth: Loss
    optax: Callable[[Any, Any], Any] | None = None
    compiled: bool = False


@dataclass(frozen=True)
class Row:
    """One median, with all that is needed to rerun and to doubt it."""

    what: str
    mode: str
    provider: str
    shape: tuple[int, int]
    dtype: str
    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    threads: int
    machine: dict[str, str] = field(default_factory=dict)


class GateError(RuntimeError):
    """A case whose result is wrong: no speed is reported for it."""


def machine() -> dict[str, str]:
    """Return what made the figures: processor, systems and versions."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    facts = {"processor": model, "cores": str(os.cpu_count()), "python": platform.python_version()}
    facts |= {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    for name in ("jax", "optax"):
        if importlib.util.find_spec(name):
            facts[name] = importlib.import_module(name).__version__
    return facts


def cross_entropy_cases(shapes: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Yield cross-entropy with class indices, the case every provider has."""
    for dtype in dtypes:
        for rows, classes in shapes:
            yield Case(
                "cross_entropy",
                (rows, classes),
                dtype,
                lambda rows=rows, classes=classes, dtype=dtype: (  # type: ignore[misc] # defaults bind the loop's values
                    _logits(rows, classes, dtype),
                    torch.randint(classes, (rows,)),
                ),
                functional.cross_entropy,
                torch_functional.cross_entropy,
                lambda x, target: torch_functional.cross_entropy(x.double(), target),
                _optax_cross_entropy,
                compiled=True,
            )


def other_cases(rows: int, classes: int, vectors: tuple[int, int]) -> Iterator[Case]:
    """Yield the other losses and measures, on one shape each."""

    def logits_and_probabilities() -> Inputs:
        return _logits(rows, classes, torch.float32), _logits(rows, classes, torch.float32).softmax(1)

    def log_probs_and_log_probs() -> Inputs:
        first, second = (_logits(rows, classes, torch.float32).log_softmax(1) for _ in range(2))
        return first, second

    def log_probs_and_probabilities() -> Inputs:
        first, second = logits_and_probabilities()
        return first.log_softmax(1), second

    def logits_and_indices() -> Inputs:
        return _logits(rows, classes, torch.float32), torch.randint(classes, (rows,))

    shape, dtype = (rows, classes), torch.float32
    table: list[tuple[str, Callable[[], Inputs], Callable[[Any], Loss]]] = [
        ("cross_entropy, probabilities", logits_and_probabilities, lambda lib: lib.cross_entropy),
        (
            "cross_entropy, smoothing 0.1",
            logits_and_indices,
            lambda lib: lambda x, y: lib.cross_entropy(x, y, label_smoothing=0.1),
        ),
        (
            "kl_div, probabilities",
            log_probs_and_probabilities,
            lambda lib: lambda x, y: lib.kl_div(x, y, reduction="batchmean"),
        ),
        (
            "kl_div, log_target",
            log_probs_and_log_probs,
            lambda lib: lambda x, y: lib.kl_div(x, y, reduction="batchmean", log_target=True),
        ),
        (
            "binary_cross_entropy_with_logits",
            logits_and_probabilities,
            lambda lib: lib.binary_cross_entropy_with_logits,
        ),
    ]
    for what, make, of in table:
        ours, eager = of(functional), of(torch_functional)
        yield Case(what, shape, dtype, make, ours, eager, _in_float64(eager))

    def categorical_entropy(x: Tensor) -> Tensor:
        return torch.distributions.Categorical(logits=x, validate_args=False).entropy().mean()

    yield Case(
        "entropy",
        shape,
        dtype,
        lambda: (_logits(rows, classes, dtype),),
        lambda x: measures.entropy(x).mean(),
        categorical_entropy,
        _in_float64(categorical_entropy),
    )
    yield Case(
        "cosine_similarity",
        vectors,
        dtype,
        lambda: (torch.randn(vectors), torch.randn(vectors)),
        lambda x, y: functional.cosine_similarity(x, y).mean(),
        lambda x, y: torch_functional.cosine_similarity(x, y).mean(),
        _in_float64(lambda x, y: torch_functional.cosine_similarity(x, y).mean()),
    )


def _logits(rows: int, classes: int, dtype: torch.dtype) -> Tensor:
    """Return rows of which one in four is confident, as a trained model's are."""
    logits = torch.randn(rows, classes) * 2
    logits[::4, 0] += 20
    return logits.to(dtype)


def _in_float64(loss: Loss) -> Loss:
    return lambda *inputs: loss(*(x.double() if x.is_floating_point() else x for x in inputs))


def _optax_cross_entropy(logits: Any, target: Any) -> Any:
    import optax

    return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()


def check(case: Case, rows: int = 256) -> None:
    """Raise unless ours is as near to the float64 truth as its dtype allows, in value and gradient."""
    inputs = [tensor[:rows].clone() for tensor in case.make()]
    results = []
    for loss in (case.ours, case.truth):
        leaf = inputs[0].detach().clone().requires_grad_()
        value = loss(leaf, *inputs[1:])
        value.backward()
        results.append((value.double().item(), leaf.grad.double() if leaf.grad is not None else torch.zeros(())))
    (value, grad), (true_value, true_grad) = results
    epsilon = torch.finfo(case.dtype).eps
    if not math.isclose(value, true_value, rel_tol=4 * epsilon + 1e-6, abs_tol=1e-7):
        raise GateError(f"{case.what} {case.shape} {case.dtype}: value {value!r}, truth {true_value!r}")
    error = ((grad - true_grad).norm() / true_grad.norm()).item()
    if not error <= 2 * epsilon + 1e-6:
        raise GateError(f"{case.what} {case.shape} {case.dtype}: gradient is off by {error:.2e} of its norm")


def providers(case: Case, mode: str, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """Return a call for each provider that this machine has; each asks for a new gradient each time."""
    calls = {"logitless": _torch_call(case.ours, mode, inputs), "torch eager": _torch_call(case.eager, mode, inputs)}
    if case.compiled:
        torch._dynamo.reset()
        calls["torch.compile"] = _torch_call(torch.compile(case.eager, dynamic=False), mode, inputs)
    if case.optax is not None and importlib.util.find_spec("optax") and importlib.util.find_spec("jax"):
        calls["optax jit"] = _optax_call(case.optax, mode, inputs)
    return calls


def _torch_call(loss: Loss, mode: str, inputs: Inputs) -> Callable[[], object]:
    if mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return loss(*inputs)

        return forward
    leaf, rest = inputs[0].detach().requires_grad_(), inputs[1:]

    def both() -> object:
        leaf.grad = None
        loss(leaf, *rest).backward()
        return leaf.grad

    return both


def _optax_call(loss: Callable[[Any, Any], Any], mode: str, inputs: Inputs) -> Callable[[], object]:
    import jax

    arrays = [
        jax.dlpack.from_dlpack(tensor.to(torch.int32) if not tensor.is_floating_point() else tensor)
        for tensor in inputs
    ]
    function = jax.jit(loss if mode == "forward" else jax.value_and_grad(loss))
    return lambda: jax.block_until_ready(function(*arrays))


def measure(
    case: Case, mode: str, *, rounds: int, min_seconds: float = 0.0, tick: Callable[[], None] = lambda: None
) -> list[Row]:
    """Return a row for each provider: medians over interleaved rounds, after two warm-up calls each."""
    inputs = case.make()
    calls = providers(case, mode, inputs)
    for call in calls.values():
        call()
        call()
    repeats = {name: _repeats(call, min_seconds) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            for _ in range(repeats[name]):
                calls[name]()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e3)
        tick()
    facts = machine()
    return [
        Row(
            case.what,
            mode,
            name,
            case.shape,
            str(case.dtype).removeprefix("torch."),
            statistics.median(spent),
            min(spent),
            max(spent),
            rounds,
            torch.get_num_threads(),
            facts,
        )
        for name, spent in times.items()
    ]


def _repeats(call: Callable[[], object], min_seconds: float) -> int:
    start = time.perf_counter()
    call()
    return max(1, math.ceil(min_seconds / max(time.perf_counter() - start, 1e-9)))


def bandwidth(rounds: int = 5) -> dict[str, float]:
    """Return this machine's memory bandwidth in GB/s: reading (a sum), and three passes (read, read, write)."""
    source = torch.ones(2**27)
    target = torch.empty_like(source)
    probes = {
        "read": (lambda: source.sum(), source.nbytes),
        "copy": (lambda: target.copy_(source), 2 * source.nbytes),
        "three passes": (lambda: torch.add(source, target, out=target), 3 * source.nbytes),
    }
    rates = {}
    for name, (call, moved) in probes.items():
        call()
        spent = []
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
        rates[name] = moved / statistics.median(spent) / 1e9
    return rates


def ratios(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, float]]:
    """Return how many times faster than each other provider ours is, by (what, mode, provider) and case."""
    ours = {(row.what, row.mode, row.shape, row.dtype): row.median_ms for row in rows if row.provider == "logitless"}
    table: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        if row.provider == "logitless":
            continue
        case = f"{row.shape[0]}x{row.shape[1]} {row.dtype}"
        ratio = row.median_ms / ours[row.what, row.mode, row.shape, row.dtype]
        table.setdefault((row.what, row.mode, row.provider), {})[case] = ratio
    return table


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean, the one for ratios."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def as_json(row: Row) -> dict[str, Any]:
    """Return a row as plain values."""
    return asdict(row)
