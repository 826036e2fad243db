"""`logitless compare` with several candidates: the base reads once, models come and go, failures stay alone."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitless.cli import comparison, states
from logitless.cli.models import LanguageModel, ModelName, load_model
from logitless.cli.states import States
from logitless.cli.statistics import clustered_error, naive_error, pair_summary
from models import save_model
from test_cli_compare import command

TEXT = "The quick brown fox jumps over 13 lazy dogs & naïve cats. 😀\n" * 3


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("base", "one", "two", "three")):
        save_model(tmp_path / name, seed=seed)
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


GIVEN = ("--text", "text.txt", "--window", 50)


def results(path: str = "out.json") -> dict[str, Any]:
    told: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
    return told


def test_candidates_together_have_the_numbers_they_have_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("one", "base:int4", "two", "base")
    assert command(monkeypatch, "compare", "base", *names, *GIVEN, "--json", "out.json") == 0
    together = results()["candidates"]
    assert [candidate["label"] for candidate in together] == ["one", "int4", "two", "base (2)"]
    for name, candidate in zip(names, together, strict=True):
        assert command(monkeypatch, "compare", "base", name, *GIVEN, "--json", "alone.json") == 0
        alone = results("alone.json")["candidates"][0]
        assert candidate["overall"] == alone["overall"]
        assert candidate["worst_tokens"] == alone["worst_tokens"]


def test_the_base_reads_once_and_two_models_are_in_memory_at_most(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    read: list[str] = []
    most = 0

    def counted(name: ModelName, *source: Any) -> LanguageModel:
        nonlocal most
        gc.collect()
        model = load_model(name, *source)
        alive.add(model.network)
        most = max(most, len(alive))
        return model

    original = comparison.read_hidden

    def noting(model: LanguageModel, *others: Any) -> States:
        read.append(model.name.label)
        return original(model, *others)

    monkeypatch.setattr(comparison, "load_model", counted)
    monkeypatch.setattr(comparison, "read_hidden", noting)
    assert command(monkeypatch, "compare", "base", "one", "two", "three", *GIVEN) == 0
    assert read == ["base", "one", "two", "three"]
    # The base's weights go once its states are known, and each candidate's before the next one loads.
    assert most == 2
    gc.collect()
    assert not alive


def test_states_beyond_the_limit_wait_in_a_file_and_change_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(monkeypatch, "compare", "base", "one", "two", *GIVEN, "--json", "kept.json") == 0
    made = []
    temporary = states.tempfile.TemporaryFile
    monkeypatch.setattr(states, "_KEPT_IN_MEMORY", 100)
    monkeypatch.setattr(states.tempfile, "TemporaryFile", lambda **given: made.append(1) or temporary(**given))
    assert command(monkeypatch, "compare", "base", "one", "two", *GIVEN, "--json", "filed.json") == 0
    assert len(made) == 3
    kept, filed = results("kept.json"), results("filed.json")
    for before, after in zip(kept["candidates"], filed["candidates"], strict=True):
        assert before["overall"] == after["overall"]
        assert before["worst_tokens"] == after["worst_tokens"]


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_states_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(states, "_KEPT_IN_MEMORY", limit)
    windows = [torch.randn(size, 7) for size in (5, 1, 3)]
    kept = States(9)
    for window in windows:
        kept.append(window.t().contiguous().t())  # not contiguous
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(kept, windows, strict=True))
    places = [8, 0, 5, 4, 6]
    assert torch.equal(kept.rows(places), torch.cat(windows)[places])


def test_a_folder_without_room_for_states_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(states, "_KEPT_IN_MEMORY", 100)
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(states.tempfile, "TemporaryFile", lambda buffering: full)
        assert command(monkeypatch, "compare", "base", "one", *GIVEN, "--json", "out.json") == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("logitless: the hidden states of ")
    assert "No space left on device): point TMPDIR to another folder" in line
    assert not Path("out.json").exists()


def test_a_candidate_that_fails_late_costs_no_other(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def overflow(model: Any) -> None:
        model.model.norm.weight.fill_(math.nan)

    save_model(place / "broken", change=overflow)
    assert command(monkeypatch, "compare", "base", "one", "broken", "two", *GIVEN, "--json", "out.json") == 1
    told = results()
    assert [candidate["label"] for candidate in told["candidates"]] == ["one", "two"]
    assert [one["name"] for one in told["left_out"]] == ["broken"]
    assert "NaN" in told["left_out"][0]["reason"]
    output, error = capfd.readouterr()
    assert "Left out: broken: " in output
    assert "broken is left out: " in error


def test_if_no_candidate_can_be_measured_nothing_is_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("bad", "worse"):
        save_model(place / name, change=lambda model: model.model.norm.weight.fill_(math.inf))
    assert command(monkeypatch, "compare", "base", "bad", "worse", *GIVEN, "--json", "out.json") == 2
    assert "no candidate could be measured" in capfd.readouterr().err.splitlines()[-1]
    assert not Path("out.json").exists()


def test_the_standard_error_of_kl_is_that_of_its_windows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(monkeypatch, "compare", "base", "one", *GIVEN, "--json", "out.json", "--out", "rows.jsonl") == 0
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text("utf-8").splitlines()]
    windows = np.array([row["window"] for row in rows])
    pair = results()["candidates"][0]["overall"]["pair"]
    for key, column in (
        ("kl_base_candidate", "kl"),
        ("kl_candidate_base", "reverse_kl"),
        ("js", "js"),
        ("same_top", "same_top"),
    ):
        values = np.array([row[column] for row in rows], dtype=float)
        sums = [(values[windows == window] - values.mean()).sum() for window in np.unique(windows)]
        count = len(sums)
        expected = math.sqrt(count / (count - 1) * sum(part**2 for part in sums)) / len(values)
        assert pair[f"{key}_se_clustered"] == pytest.approx(expected, rel=1e-10)


def test_an_infinite_kl_has_no_standard_error() -> None:
    values = np.array([0.1, math.inf, 0.2, 0.4])
    assert naive_error(values) is None
    assert clustered_error(values, np.arange(4)) is None
    ones = np.ones(4)
    columns = dict.fromkeys(("nll_base", "nll_candidate", "reverse_kl", "js", "same_top"), ones)
    pair = pair_summary({**columns, "kl": values, "cluster": np.arange(4)})
    assert pair["kl_base_candidate_se_clustered"] is None
    assert list(pair["kl_base_candidate"].values()) == [math.inf, pytest.approx(0.3), *[math.inf] * 4]


def test_measuring_is_never_said_to_take_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "compare", "base", "one", "two", *GIVEN, "--json", "out.json") == 0
    output = capfd.readouterr().out
    assert " 0 MB" not in output
    for candidate in results()["candidates"]:
        assert candidate["memory"]["measure_growth"] > 0
