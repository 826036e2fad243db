"""How a figure comes about: the gate, the interleaved rounds, the rows, and the ratios of medians.

A case whose value or gradient is wrong is refused before anything is timed. Every provider of a case runs on the same
tensors in one process, in rounds whose order rotates, each sample once the process has come to rest, and a ratio is one
of medians of the same rounds.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from logitless._bench.providers import BOTH, FORWARD, MODES, Call, Inputs, Loss, Outcome, Provider, as_tensor, eager
from logitless._heads.multiplier import processor
from logitless._rules import dispatch
from logitless.kernels import cpu

# A round of a slow case is worth minutes: it gets fewer of them, and at least three.
_SECONDS_A_CASE = 45.0
_LEAST_ROUNDS = 3
_SLOW_SECONDS = 3.0
# Providers of one case compute the same thing; how exactly each does is not what is asked here.
_AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
_GATE_ELEMENTS = 2**24
_LEAST_SECONDS_TO_JUDGE = 0.5  # the system counts in hundredths
# The process is at rest when in so many seconds its threads use less than a tenth of one processor. Some systems add a
# thread's time up every few thousandths of a second only.
_REST_SECONDS, _REST_SHARE = 0.02, 0.1
_MOST_RESTS = 100  # threads that never stop looking for work are not waited for


@dataclass(frozen=True)
class Case:
    """One thing measured: inputs of a number of rows, who computes it, and its definition in float64."""

    section: str
    what: str
    shape: tuple[int, ...]  # rows first, classes last
    dtype: torch.dtype
    make: Callable[[int], Inputs]
    providers: Sequence[Provider]
    truth: Loss
    leaves: Sequence[int] = (0,)
    modes: Sequence[str] = MODES
    memory: bool = False
    min_seconds: float = 0.05  # a sample repeats the call until it is at least this long

    @property
    def name(self) -> str:
        """What `--only` searches."""
        return f"{self.section}: {self.what} {sizes(self.shape)} {dtype_name(self.dtype)}"

    def inputs(self, rows: int | None = None) -> Inputs:
        """Return the inputs, the same ones each time; of the first dimension's size, or of fewer rows."""
        torch.manual_seed(0)
        return self.make(self.shape[0] if rows is None else rows)


@dataclass(frozen=True)
class Row:
    """One median, with all that is needed to rerun it and to doubt it.

    `busy_elsewhere` is the share of the machine's processor time that others took meanwhile; `gradient_error` the
    distance of the gradients from float64's, on some of the rows, over the norm of those; `extra_bytes` the peak of
    memory beyond inputs and gradients. None: not measured.
    """

    section: str
    what: str
    mode: str
    provider: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    threads: int
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    busy_elsewhere: float | None = None
    gradient_error: float | None = None
    extra_bytes: int | None = None

    @property
    def case(self) -> tuple[str, str, tuple[int, ...], str, str]:
        """What rows must share to be compared."""
        return self.section, self.what, self.shape, self.dtype, self.mode

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


class GateError(RuntimeError):
    """A case whose result is wrong: no speed is reported for it."""


def sizes(shape: Sequence[int]) -> str:
    """Return 4096x32000."""
    return "x".join(map(str, shape))


def dtype_name(dtype: torch.dtype) -> str:
    """Return float32."""
    return str(dtype).removeprefix("torch.")


def machine() -> dict[str, str]:
    """Return what the figures were made on: processor, cores, and the backend that serves tensors on the CPU."""
    backend = dispatch.pick("cross_entropy", [torch.zeros(1)]).NAME
    if backend == cpu.NAME:
        backend = f"{backend}, {cpu.native_info()['isa']}"
    return {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "backend": backend,
    }


def versions() -> dict[str, str]:
    """Return what was measured: the versions of Python and of each package that takes part and is installed."""
    found = {"python": platform.python_version()}
    for name in ("logitless", "torch", "jax", "jaxlib", "optax", "faiss-cpu", "sentence-transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gate(case: Case) -> dict[str, float]:
    """Return each plain provider's gradient error; raise unless ours is as near to float64 as its dtype allows.

    That is four roundings for the value, and for the gradient two, or what the same formula in torch's own arithmetic
    gets where that is more.
    """
    rows = min(case.shape[0], max(8, _GATE_ELEMENTS // case.shape[-1]))
    inputs = case.inputs(rows)
    exact = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    mode = BOTH if BOTH in case.modes else FORWARD
    true_value, true_gradients = _tensors(eager(case.truth).prepare(exact, case.leaves, mode)())
    epsilon = torch.finfo(case.dtype).eps
    errors: dict[str, float] = {}
    for provider in sorted(case.providers, key=lambda provider: provider.kind == "ours"):  # peers set the measure
        if not provider.plain or provider.obstacle() is not None:
            continue
        value, gradients = _tensors(provider.prepare(inputs, case.leaves, mode)())
        errors[provider.name] = error = _distance(gradients, true_gradients)
        if provider.kind != "ours":
            continue
        if not math.isclose(value.item(), true_value.item(), rel_tol=4 * epsilon + 1e-6, abs_tol=1e-7):
            raise GateError(f"{case.name}: {provider.name} gives {value.item()!r}, and the truth is {true_value!r}")
        if not error <= max(2 * epsilon + 1e-6, *(errors[other.name] for other in _peers(case, errors)), 0.0):
            raise GateError(f"{case.name}: the gradient of {provider.name} is off by {error:.2e} of its norm")
    return errors


def measure(
    case: Case,
    mode: str,
    rounds: int,
    note: Callable[[str], None],
    errors: Mapping[str, float] | None = None,
) -> list[Row]:
    """Return a row for each provider: medians over interleaved rounds, after a warm-up in which they must agree."""
    calls, seconds = _warm(case, mode, case.inputs(), note)
    repeats = {name: max(1, math.ceil(case.min_seconds / max(spent, 1e-9))) for name, spent in seconds.items()}
    a_round = sum(seconds[name] * repeats[name] for name in calls)
    rounds = min(rounds, max(_LEAST_ROUNDS, int(_SECONDS_A_CASE / max(a_round, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    before = _processor_seconds()
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            _come_to_rest()
            times[name].append(_seconds(calls[name], repeats[name]) * 1e3)
    elsewhere = _busy_elsewhere(before, _processor_seconds())
    kinds = {provider.name: provider.kind for provider in case.providers}
    common = (torch.get_num_threads(), machine(), versions())
    return [
        Row(
            case.section,
            case.what,
            mode,
            name,
            kinds[name],
            case.shape,
            dtype_name(case.dtype),
            statistics.median(spent),
            min(spent),
            max(spent),
            rounds,
            *common,
            busy_elsewhere=elsewhere,
            gradient_error=None if errors is None or mode != BOTH else errors.get(name),
        )
        for name, spent in times.items()
    ]


def with_memory(rows: Sequence[Row], extra_bytes: Mapping[str, int | None]) -> list[Row]:
    """Return the rows of one case with the peak of each provider."""
    return [replace(row, extra_bytes=extra_bytes.get(row.provider)) for row in rows]


@dataclass(frozen=True)
class Ratio:
    """How many times faster ours is than a peer, over every case that has both: geometric mean, and the least.

    `at_limit` is the mean for a loss as fast as the limits measured beside them; None where a case has none.
    """

    section: str
    what: str
    mode: str
    ours: str
    peer: str
    mean: float
    least: float
    least_at: str
    cases: int
    at_limit: float | None


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Return a ratio for each section, measure, mode, provider of ours and peer."""
    found: dict[tuple[str, str, str, str, str], dict[str, float]] = {}
    limited: dict[tuple[str, str, str, str, str], list[float]] = {}
    limits = {row.case: row for row in rows if row.kind == "limit"}
    for mine in rows:
        if mine.kind != "ours":
            continue
        for peer in rows:
            if peer.kind == "peer" and peer.case == mine.case:
                key = (mine.section, mine.what, mine.mode, mine.provider, peer.provider)
                group = found.setdefault(key, {})
                group[f"{sizes(mine.shape)} {mine.dtype}"] = peer.median_ms / mine.median_ms
                if mine.case in limits:
                    limited.setdefault(key, []).append(peer.median_ms / limits[mine.case].median_ms)
    return [
        Ratio(
            *key,
            geometric_mean(list(by_case.values())),
            min(by_case.values()),
            min(by_case, key=by_case.__getitem__),
            len(by_case),
            geometric_mean(limited[key]) if len(limited.get(key, ())) == len(by_case) else None,
        )
        for key, by_case in found.items()
    ]


@dataclass(frozen=True)
class Share:
    """What part of its time ours cannot do without: a limit's median over ours."""

    row: Row
    limit: Row

    @property
    def share(self) -> float:
        """1 is as fast as the machine allows."""
        return self.limit.median_ms / self.row.median_ms


def shares(rows: Sequence[Row]) -> list[Share]:
    """Return a share for each row of ours that was measured beside a limit."""
    limits = [row for row in rows if row.kind == "limit"]
    return [Share(row, limit) for row in rows if row.kind == "ours" for limit in limits if limit.case == row.case]


def geometric_mean(values: Sequence[float]) -> float:
    """Return the mean for ratios: that of the inverses is the inverse."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def _warm(
    case: Case, mode: str, inputs: Inputs, note: Callable[[str], None]
) -> tuple[dict[str, Call], dict[str, float]]:
    """Return each provider's call, run at least once, and the seconds that one takes."""
    calls: dict[str, Call] = {}
    seconds: dict[str, float] = {}
    reference: Outcome = None
    for provider in case.providers:
        if mode not in provider.modes:
            continue
        obstacle = provider.obstacle()
        if obstacle is not None:
            note(f"{case.name}, {mode}: {provider.name} left out: {obstacle}")
            continue
        try:
            call = provider.prepare(inputs, case.leaves, mode)
            start = time.perf_counter()
            outcome = call()
            spent = time.perf_counter() - start
        except Exception as error:
            if provider.kind == "ours":
                raise
            reason = (str(error).strip() or "no message").splitlines()[0]
            note(f"{case.name}, {mode}: {provider.name} left out: {type(error).__name__}: {reason}")
            continue
        if outcome is not None and reference is None:
            reference = outcome
        elif outcome is not None and reference is not None:
            difference = _difference(case, outcome, reference)
            if difference is not None:
                _blame(case, mode, inputs, provider, outcome, reference)
                note(f"{case.name}, {mode}: {provider.name} left out: it is wrong: {difference}")
                continue
        del outcome
        if spent < _SLOW_SECONDS or not provider.plain:
            spent = _seconds(call, 1)
        calls[provider.name], seconds[provider.name] = call, spent
    return calls, seconds


def _difference(case: Case, outcome: Outcome, reference: Outcome) -> str | None:
    """Return how far an outcome is from another of the same loss, in words, or None where it is near enough."""
    (value, gradients), (first_value, first_gradients) = _tensors(outcome), _tensors(reference)
    allowed = _AGREEMENT[case.dtype]
    if not math.isclose(value.item(), first_value.item(), rel_tol=allowed, abs_tol=1e-6):
        return f"its value is {value.item()!r}, not {first_value.item()!r}"
    distance = _distance(gradients, first_gradients)
    return None if distance <= allowed else f"its gradients are off by {distance:.2e} of their norm"


def _blame(case: Case, mode: str, inputs: Inputs, provider: Provider, outcome: Outcome, reference: Outcome) -> None:
    """Return if a provider that differs from ours is a peer and wrong by float64; raise where ours may be."""
    mine = case.providers[0].name
    if provider.kind == "ours":
        raise GateError(f"{case.name}: {provider.name} and {mine} differ: {_difference(case, outcome, reference)}")
    exact = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    truth = eager(case.truth).prepare(exact, case.leaves, mode)()
    difference = _difference(case, reference, truth)
    if difference is not None:
        raise GateError(f"{case.name}: {mine} is wrong by float64, {provider.name} differs from it: {difference}")
    if _difference(case, outcome, truth) is None:
        raise GateError(f"{case.name}: {provider.name} and {mine} differ by more than either does from float64")


def _come_to_rest() -> None:
    """Wait until what the call before has left running in this process has ended.

    A library may give its memory back, or look for more work, on threads of its own after its call has returned. Who
    runs next would pay for that, and in a rotated order that is nearly always the same one.
    """
    for _ in range(_MOST_RESTS):
        before = time.process_time()
        time.sleep(_REST_SECONDS)
        if time.process_time() - before < _REST_SHARE * _REST_SECONDS:
            return


def _tensors(outcome: Outcome) -> tuple[Tensor, list[Tensor]]:
    assert outcome is not None
    value, gradients = outcome
    return as_tensor(value), [as_tensor(gradient) for gradient in gradients]


def _distance(gradients: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """Return the largest distance over the norm of the true gradient; row blocks keep the wider copies small."""

    def one(given: Tensor, exact: Tensor) -> float:
        wide = torch.promote_types(exact.dtype, torch.float32)
        blocks = list(zip(given.split(1024), exact.split(1024), strict=True))
        error = sum(float((a.to(wide) - b.to(wide)).square().sum(dtype=torch.float64)) for a, b in blocks)
        norm = sum(float(b.to(wide).square().sum(dtype=torch.float64)) for _, b in blocks)
        return math.sqrt(error / norm) if norm else math.sqrt(error)

    return max((one(a, b) for a, b in zip(gradients, true, strict=True)), default=0.0)


def _processor_seconds() -> tuple[float, float, float] | None:
    """Return what this process, all processes, and all processors with their idle time have used (Linux)."""
    if not os.path.exists("/proc/stat"):
        return None
    with open("/proc/stat", encoding="ascii") as lines:
        user, nice, system, idle, waiting, *rest = (int(ticks) for ticks in next(lines).split()[1:9])
    busy = user + nice + system + sum(rest)
    tick = os.sysconf("SC_CLK_TCK")
    return time.process_time(), busy / tick, (busy + idle + waiting) / tick


def _busy_elsewhere(
    before: tuple[float, float, float] | None, after: tuple[float, float, float] | None
) -> float | None:
    """Return the share of the processors that went to others, or None where too few clock ticks have passed to say."""
    if before is None or after is None or after[2] - before[2] < _LEAST_SECONDS_TO_JUDGE:
        return None
    own, busy, total = (late - early for early, late in zip(before, after, strict=True))
    return max(0.0, busy - own) / total


def _peers(case: Case, measured: Mapping[str, float]) -> list[Provider]:
    return [provider for provider in case.providers if provider.kind == "peer" and provider.name in measured]


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
