"""`logitless bench`, never timed: the gate rejects wrong results, rounds interleave, rows and ratios are right."""

from __future__ import annotations

import importlib.machinery
import itertools
import json
import mmap
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless.functional as LF
from logitless._bench import heads, losses, memory, protocol, providers, search, similarity, suite
from logitless._bench.limits import limit_case
from logitless._bench.protocol import Case, GateError, Row, gate, geometric_mean, measure, ratios, shares
from logitless._bench.providers import BOTH, FORWARD, Inputs, Provider, bare, eager, optax, ours
from logitless.cli import bench as cli_bench
from test_cli_compare import Loads, command, refused

MEGABYTE = 2**20


def case(*contestants: Provider, **changes: Any) -> Case:
    make = losses.indexed_logits(7, torch.float32)
    chosen = contestants or (ours(LF.cross_entropy), eager(F.cross_entropy))
    made = Case("logits", "cross_entropy", (5, 7), torch.float32, make, chosen, F.cross_entropy)
    return replace(made, **changes)


def changed(value: float = 1.0, slope: float = 1.0, shift: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a cross-entropy whose value, gradient or target is off."""

    def loss(x: Tensor, target: Tensor) -> Tensor:
        right = F.cross_entropy(x * slope + (x * (1 - slope)).detach(), (target + shift) % x.shape[1])
        return right + right.detach() * (value - 1)

    return loss


def test_the_gate_passes_what_is_right_and_measures_its_gradient() -> None:
    errors = gate(case())
    assert errors.keys() == {"logitless", "torch eager"}
    assert all(0 < error < 1e-6 for error in errors.values())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (changed(value=1.0001), "gives"),
        (changed(slope=1.01), "gradient"),
        (changed(slope=0.0), "gradient"),
        (changed(slope=-1.0), "gradient"),
        (changed(slope=float("nan")), "gives"),
        (changed(shift=1), "gives"),
    ],
)
def test_the_gate_refuses_what_is_wrong(wrong: Callable[[Tensor, Tensor], Tensor], said: str) -> None:
    with pytest.raises(GateError, match=f"logitless.*{said}|{said}.*logitless"):
        gate(case(ours(wrong), eager(F.cross_entropy)))


def test_a_gradient_may_be_as_far_off_as_torch_s_own_and_no_farther() -> None:
    slightly, more = changed(slope=1 + 1e-5), changed(slope=1 + 3e-5)
    gate(case(ours(slightly), eager(slightly)))
    with pytest.raises(GateError):
        gate(case(ours(more), eager(slightly)))


def test_every_case_of_the_quick_suite_is_named_once_and_has_ours_first() -> None:
    for quick in (True, False):
        names = [one.name for one in suite.cases(quick=quick)]
        assert len(set(names)) == len(names)
        assert {name.split(":")[0] for name in names} == suite.SECTIONS.keys()
        assert all(one.providers[0].kind == "ours" for one in suite.cases(quick=quick))


def tiny_cases() -> list[Case]:
    """Return every kind of case in sizes at which nothing takes time, without torch.compile and JAX."""
    made = [
        limit_case((6, 50)),
        *losses.cross_entropy_cases(((5, 7),), (torch.float32, torch.bfloat16)),
        *losses.loss_cases((5, 7), vectors=(6, 9)),
        *heads.head_cases((8, 4, 30), (8, 4, 40), (9, 4, 30), teacher_features=6),
        *similarity.similarity_cases(5, 9, 4),
        *search.search_cases(20, 5, 300),
    ]
    return [
        replace(one, memory=False, providers=[p for p in one.providers if p.plain or p.kind in ("limit", "stage")])
        for one in made
    ]


@pytest.mark.parametrize("number", range(len(tiny_cases())))
def test_every_case_passes_its_gate_and_gives_a_row_for_each_provider(number: int) -> None:
    one = tiny_cases()[number]
    notes: list[str] = []
    rows = suite.run(one, 1, gate(one), notes.append, quick=True)
    assert notes == []
    for mode in one.modes:
        expected = [provider.name for provider in one.providers if mode in provider.modes]
        assert [row.provider for row in rows if row.mode == mode] == expected


class Recorder:
    """Providers that note when they run, on a clock that each call moves on by its own duration."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
        self.log: list[str] = []
        self.now = 0.0
        monkeypatch.setattr(protocol.time, "perf_counter", lambda: self.now)
        kinds = {name: "ours" if name == "logitless" else "peer" for name in seconds}
        self.providers = [Provider(name, kinds[name], self._prepare(name, spent)) for name, spent in seconds.items()]

    def _prepare(self, name: str, spent: float) -> Callable[..., providers.Call]:
        def call() -> None:
            self.log.append(name)
            self.now += spent

        return lambda inputs, leaves, mode: call


def test_rounds_interleave_in_rotated_order_and_the_median_is_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, logitless=0.5, one=1.0, two=2.0)
    rows = measure(case(*recorder.providers), FORWARD, 3, pytest.fail)
    warm_up, rounds = recorder.log[:6], recorder.log[6:]
    assert warm_up == ["logitless", "logitless", "one", "one", "two", "two"]
    assert rounds == ["logitless", "one", "two", "one", "two", "logitless", "two", "logitless", "one"]
    assert [(row.provider, row.median_ms, row.low_ms, row.high_ms, row.runs) for row in rows] == [
        ("logitless", 500.0, 500.0, 500.0, 3),
        ("one", 1000.0, 1000.0, 1000.0, 3),
        ("two", 2000.0, 2000.0, 2000.0, 3),
    ]


def test_a_slow_case_takes_fewer_rounds_and_a_fast_call_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, logitless=10.0, peer=30.0)
    assert {row.runs for row in measure(case(*recorder.providers), BOTH, 7, pytest.fail)} == {3}
    recorder = Recorder(monkeypatch, logitless=0.25, peer=0.125)
    rows = measure(case(*recorder.providers, min_seconds=1.0), BOTH, 2, pytest.fail)
    assert [row.median_ms for row in rows] == [250.0, 125.0]
    assert recorder.log.count("logitless") == 2 + 2 * 4
    assert recorder.log.count("peer") == 2 + 2 * 8


def test_what_others_take_of_the_processors_is_told_apart_from_our_own() -> None:
    share = protocol._busy_elsewhere((10.0, 100.0, 200.0), (12.0, 103.0, 204.0))
    assert share == pytest.approx(0.25)  # of 4 seconds 3 were busy, of which 2 were ours
    assert protocol._busy_elsewhere((10.0, 100.0, 200.0), (12.1, 102.0, 204.0)) == 0.0
    assert protocol._busy_elsewhere((0.0, 0.0, 0.0), (0.1, 0.1, 0.1)) is None
    assert protocol._busy_elsewhere(None, None) is None
    rows = [replace(row("logitless", "ours", 1.0), busy_elsewhere=share) for share in (None, 0.01, 0.3)]
    assert cli_bench._disturbance(rows[:2]) == []
    assert "1 of 2 rows were timed while other processes took more than 5%" in cli_bench._disturbance(rows)[0]


def test_each_call_asks_for_its_gradient_anew() -> None:
    inputs = case().inputs()
    step = eager(F.cross_entropy).prepare(inputs, (0,), BOTH)
    first, second = step(), step()
    assert first is not None
    assert second is not None
    assert torch.equal(first[1][0], second[1][0])  # not added up
    assert first[1][0].data_ptr() != second[1][0].data_ptr()
    assert not inputs[0].requires_grad
    forward = eager(F.cross_entropy).prepare(inputs, (0,), FORWARD)()
    assert forward is not None
    assert not forward[0].requires_grad


def test_torch_compile_is_of_the_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def fake(loss: Any, **options: Any) -> Any:
        asked.append(options)
        return loss

    monkeypatch.setattr(torch, "compile", fake)
    outcome = providers.compiled(F.cross_entropy).prepare(case().inputs(), (0,), BOTH)()
    assert outcome is not None
    assert asked == [{"dynamic": False}]


def stand_in_for_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give `jax` and `optax`, which only `make bench` installs, the few functions the provider calls, by torch."""

    def value_and_grad(function: Callable[..., Tensor], argnums: Sequence[int]) -> Callable[..., Any]:
        def both(*arrays: Tensor) -> Any:
            leaves = [x.clone().requires_grad_() if i in argnums else x for i, x in enumerate(arrays)]
            value = function(*leaves)
            return value, torch.autograd.grad(value, [leaves[i] for i in argnums])

        return both

    def jit(function: Callable[..., Any]) -> Any:
        lowered = types.SimpleNamespace(compile=lambda: function)
        return types.SimpleNamespace(lower=lambda *arrays: lowered)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        assert labels.dtype == torch.int32
        return F.cross_entropy(logits, labels.long(), reduction="none")

    dlpack = types.SimpleNamespace(from_dlpack=lambda x: x)
    parts: dict[str, dict[str, Any]] = {
        "jax": {"dlpack": dlpack, "jit": jit, "value_and_grad": value_and_grad, "block_until_ready": lambda x: x},
        "optax": {"softmax_cross_entropy_with_integer_labels": loss},
    }
    for name, attributes in parts.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


def test_optax_computes_the_same_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_jax(monkeypatch)
    logits = next(losses.cross_entropy_cases(((5, 7),), (torch.float32,)))
    head = next(heads.head_cases((8, 4, 30), (8, 4, 40), (9, 4, 30), 6))
    for one in (logits, head):
        chosen = replace(one, memory=False, providers=[p for p in one.providers if p.name != "torch.compile"])
        rows = suite.run(chosen, 1, gate(chosen), pytest.fail, quick=True)
        assert [row.mode for row in rows if row.provider == "optax, jax.jit"] == list(chosen.modes)


def test_a_peer_that_cannot_run_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError("not for\nthis")

    missing = replace(optax(lambda library, x, target: x), needs=("no_such_package",))
    large = eager(F.cross_entropy, "large", needs_bytes=10**18)
    notes: list[str] = []
    one = case(ours(LF.cross_entropy), eager(fails, "broken"), missing, large, modes=(FORWARD,))
    rows = measure(one, FORWARD, 1, notes.append)
    assert [row.provider for row in rows] == ["logitless"]
    assert [note.split("forward: ")[1] for note in notes[:2]] == [
        "broken left out: NotImplementedError: not for",
        'optax, jax.jit left out: no_such_package not installed; run: pip install "logitless[bench]"',
    ]
    assert "large left out: it needs 1000000000.0 GB of memory" in notes[2]
    with pytest.raises(NotImplementedError):
        measure(case(ours(fails)), FORWARD, 1, notes.append)


def wrong_on(rows: int, wrong: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a cross-entropy that is `wrong` of so many rows and right of others."""

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return (wrong if len(x) == rows else F.cross_entropy)(x, target)

    return loss


@pytest.mark.parametrize(
    ("wrong", "mode", "said"),
    [
        (changed(value=1.1), FORWARD, "its value is"),
        (changed(value=float("nan")), BOTH, "its value is nan"),
        (changed(slope=1.1), BOTH, "its gradients are off by"),
    ],
)
def test_a_peer_that_is_wrong_on_all_the_rows_is_left_out(
    wrong: Callable[[Tensor, Tensor], Tensor], mode: str, said: str
) -> None:
    notes: list[str] = []
    one = case(ours(LF.cross_entropy), eager(wrong_on(5, wrong), "peer"), eager(F.cross_entropy))
    assert [row.provider for row in measure(one, mode, 1, notes.append)] == ["logitless", "torch eager"]
    assert len(notes) == 1
    assert f"{mode}: peer left out: it is wrong: {said}" in notes[0]


@pytest.mark.parametrize(
    ("wrong", "mode"),
    [(changed(value=1.1), FORWARD), (changed(slope=1.1), BOTH)],
)
def test_ours_that_is_wrong_on_all_the_rows_ends_the_run(wrong: Callable[[Tensor, Tensor], Tensor], mode: str) -> None:
    with pytest.raises(GateError, match="logitless is wrong by float64, torch eager differs"):
        measure(case(ours(wrong_on(5, wrong)), eager(F.cross_entropy)), mode, 1, pytest.fail)
    with pytest.raises(GateError, match="second and logitless differ"):
        measure(case(ours(LF.cross_entropy), ours(wrong_on(5, wrong), "second")), mode, 1, pytest.fail)


def test_providers_that_differ_by_more_than_either_from_float64_end_the_run() -> None:
    more, less = (wrong_on(5, changed(value=value)) for value in (1.0008, 0.9992))
    with pytest.raises(GateError, match="differ by more than either"):
        measure(case(ours(more), eager(less, "peer")), FORWARD, 1, pytest.fail)


def test_a_sample_is_taken_when_the_process_has_come_to_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([0.0, 0.04, 0.04, 0.05, 0.05, 0.051])  # two processors, half of one, then a rest
    slept: list[float] = []
    monkeypatch.setattr(protocol.time, "process_time", lambda: next(used))
    monkeypatch.setattr(protocol.time, "sleep", slept.append)
    protocol._come_to_rest()
    assert slept == [protocol._REST_SECONDS] * 3
    with pytest.raises(StopIteration):
        next(used)


def test_threads_that_never_rest_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    slept: list[float] = []
    monkeypatch.setattr(protocol.time, "process_time", lambda: float(next(clock)))
    monkeypatch.setattr(protocol.time, "sleep", slept.append)
    protocol._come_to_rest()
    assert len(slept) == protocol._MOST_RESTS


def test_every_sample_waits_for_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, logitless=1.0, peer=2.0)
    monkeypatch.setattr(protocol, "_come_to_rest", lambda: recorder.log.append("rest"))
    measure(case(*recorder.providers), FORWARD, 2, pytest.fail)
    assert recorder.log[4:] == ["rest", "logitless", "rest", "peer", "rest", "peer", "rest", "logitless"]


def row(provider: str, kind: str, median: float, *, classes: int = 7, section: str = "logits") -> Row:
    numbers = (median, median, median, 1, 1)
    return Row(section, "what", FORWARD, provider, kind, (5, classes), "float32", *numbers, {}, {})


def test_ratios_are_of_medians_by_geometric_mean_and_sections_apart() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    rows = [
        row("logitless", "ours", 2.0),
        row("eager", "peer", 4.0),
        row("bare", "limit", 1.0),
        row("logitless", "ours", 1.0, classes=8),
        row("eager", "peer", 8.0, classes=8),
        row("bare", "limit", 0.5, classes=8),
        row("logitless", "ours", 1.0, section="small"),
        row("eager", "peer", 0.5, section="small"),
    ]
    first, second = ratios(rows)
    assert (first.mean, first.least, first.least_at, first.cases) == (pytest.approx(4.0), 2.0, "5x7 float32", 2)
    assert first.at_limit == pytest.approx(8.0)
    assert (second.section, second.mean, second.cases, second.at_limit) == ("small", pytest.approx(0.5), 1, None)
    assert [(share.limit.provider, share.share) for share in shares(rows)] == [("bare", 0.5), ("bare", 0.5)]
    assert ratios([each for each in rows if each.shape != (5, 8) or each.kind != "limit"])[0].at_limit is None


def test_growth_is_the_peak_of_the_call_and_nothing_before_it() -> None:
    dropped = torch.ones(64 * MEGABYTE // 4)
    del dropped

    def needs_sixty_four() -> Tensor:
        # Not a tensor: the allocator may keep what earlier tests' memory had room for.
        with mmap.mmap(-1, 64 * MEGABYTE) as block:
            block[:: mmap.PAGESIZE] = bytes(64 * MEGABYTE // mmap.PAGESIZE)
        return torch.ones(16 * MEGABYTE // 4)

    kept, growth = memory.call_and_growth(needs_sixty_four)
    assert growth is not None
    assert abs(growth - 64 * MEGABYTE) < 4 * MEGABYTE
    _, growth = memory.call_and_growth(lambda: None)
    assert growth is not None
    assert growth < MEGABYTE
    assert kept.sum() == 16 * MEGABYTE // 4


def test_where_the_peak_cannot_be_reset_only_a_new_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CLEAR", Path("/no/such/file"))
    assert memory.call_and_growth(lambda: None)[1] is None


def test_extra_memory_leaves_out_the_gradients() -> None:
    elements = 32 * MEGABYTE // 4

    def make(rows: int) -> Inputs:
        return torch.ones(rows, elements // 8), torch.zeros(rows, dtype=torch.int64)

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return (x * 2.0).sum()  # the product, and in the backward pass its gradient, which is expanded, and x's

    one = case(eager(loss), shape=(8, elements // 8), make=make)
    extra = memory.extra_bytes(one, one.providers[0], BOTH)
    assert extra is not None
    assert extra <= 36 * MEGABYTE
    nothing = bare("nothing", "limit", {BOTH: lambda inputs: lambda: None})
    assert (memory.extra_bytes(one, nothing, BOTH) or 0) < MEGABYTE


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    small = next(one for one in suite.cases(quick=True) if one.section == "small")
    extra = memory.extra_bytes_apart(small, small.providers[0], BOTH, quick=True)
    assert extra is not None
    assert extra < 8 * MEGABYTE
    with pytest.raises(RuntimeError, match="the memory of logitless could not be measured: StopIteration"):
        memory.extra_bytes_apart(replace(small, what="no such case"), small.providers[0], BOTH, quick=True)


def test_a_peer_whose_memory_cannot_be_measured_keeps_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(case: Case, provider: Provider, mode: str, *, quick: bool) -> int:
        if provider.kind == failing:
            raise RuntimeError("it crashed")
        return 5

    monkeypatch.setattr(suite, "extra_bytes_apart", peak)
    one, notes = replace(case(ours(F.cross_entropy), eager(F.cross_entropy), modes=(BOTH,)), memory=True), []
    failing = "peer"
    rows = suite.run(one, 1, gate(one), notes.append, quick=True)
    assert {row.kind: row.extra_bytes for row in rows} == {"ours": 5, "peer": None}
    assert notes == [f"{one.name}, {BOTH}: it crashed"]
    failing = "ours"
    with pytest.raises(RuntimeError, match="it crashed"):
        suite.run(one, 1, gate(one), notes.append, quick=True)


@pytest.fixture
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = replace(optax(lambda library, x, target: x), needs=("no_such_package",))
    tiny = tiny_cases()[:2]
    tiny[1] = replace(tiny[1], providers=[*tiny[1].providers, missing])
    monkeypatch.setattr(suite, "cases", lambda *, quick: iter(tiny))


@pytest.mark.usefixtures("tiny_suite")
def test_the_command_prints_and_writes_every_row(tmp_path, monkeypatch, capsys) -> None:
    out, page = tmp_path / "bench.json", tmp_path / "bench.html"
    assert command(monkeypatch, "bench", "--rounds", 2, "--threads", 1, "--json", out, "--html", page) == 0
    printed = capsys.readouterr().out
    assert "cross_entropy 6x50 float32, forward+backward" in printed
    assert "of the limit" in printed
    report = json.loads(out.read_text("utf-8"), parse_constant=pytest.fail)
    assert (report["schema"], report["command"], report["quick"]) == (1, "bench", False)
    assert len(report["left_out"]) == 2
    assert {found["peer"] for found in report["ratios"]} == {"torch eager"}
    assert {found["limit"] for found in report["shares_of_limit"]} == {
        "one read (sum)",
        "two reads, one write (add)",
    }
    for found in report["rows"]:
        assert found["low_ms"] <= found["median_ms"] <= found["high_ms"]
        assert (found["runs"], found["threads"], found["dtype"]) == (2, 1, "float32")
        assert found["versions"]["torch"] == torch.__version__
        assert found["machine"]["processor"]
    assert {(*found["shape"], found["mode"], found["provider"]) for found in report["rows"]} >= {
        (5, 7, FORWARD, "logitless"),
        (5, 7, BOTH, "torch eager"),
        (6, 50, FORWARD, "stage: row_stats"),
    }
    loads = Loads()
    loads.feed(page.read_text("utf-8"))
    assert loads.found == []


@pytest.mark.usefixtures("tiny_suite")
def test_only_takes_an_expression_and_says_what_there_is(tmp_path, monkeypatch, capsys) -> None:
    assert command(monkeypatch, "bench", "--rounds", 1, "--only", "LOGITS.*5x7") == 0
    assert "6x50" not in capsys.readouterr().out
    none = refused(monkeypatch, capsys, tmp_path, "bench", "--only", "nothing")
    assert "fits none of the 2 cases; one is named 'limit: cross_entropy 6x50 float32'" in none
    assert "is not a regular expression" in refused(monkeypatch, capsys, tmp_path, "bench", "--only", "(")


@pytest.mark.usefixtures("tiny_suite")
def test_without_leaves_peers_out_and_nothing_else(tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "bench.json"
    assert command(monkeypatch, "bench", "--rounds", 1, "--without", "EAGER|logitless|sum|optax", "--json", out) == 0
    report = json.loads(out.read_text("utf-8"))
    present = {found["provider"] for found in report["rows"]}
    assert "torch eager" not in present
    assert {"logitless", "one read (sum)"} <= present
    assert report["left_out"] == []
    wrong = refused(monkeypatch, capsys, tmp_path, "bench", "--without", "(")
    assert "--without '(' is not a regular expression" in wrong


def test_a_wrong_result_ends_it_before_anything_is_timed_or_written(tmp_path, monkeypatch, capsys) -> None:
    recorder = Recorder(monkeypatch, logitless=1.0)
    right = case(*(replace(provider, plain=False) for provider in recorder.providers))
    wrong = case(ours(changed(slope=2.0)), eager(F.cross_entropy))
    monkeypatch.setattr(suite, "cases", lambda *, quick: iter([right, wrong]))
    out = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as stop:
        cli_bench.run_bench(out, None, rounds=1, quick=False, only=None, threads=None)
    assert stop.value.code == 1
    assert "the gradient of logitless is off by" in capsys.readouterr().err
    assert recorder.log == []
    assert not out.exists()
