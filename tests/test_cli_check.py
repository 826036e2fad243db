"""`logitless check` passes here, writes what it found, and rejects broken measures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import mpmath
import pytest
import torch
from mpmath import mp
from torch import Tensor
from typer.testing import CliRunner

import logitless as ll
import logitless.functional as LF
from logitless._verify import truth
from logitless._verify.accuracy import ulps
from logitless.cli.app import app
from logitless.cli.check import check_command

ALL_SAMPLES = truth.samples
FEW = ("flat, 2 ", "dominant class, 2 ", "spread 1e2, 2 ", "ties, 2 ", "near pair, 2 ", "opposite")


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a row of each kind, so that a mutant is judged in a second or two."""

    def few(dtype: torch.dtype, *, seed: int = 0) -> Iterator[truth.Sample]:
        return (sample for sample in ALL_SAMPLES(dtype, seed=seed) if sample.family.startswith(FEW))

    monkeypatch.setattr(truth, "samples", few)


def exit_status() -> int:
    try:
        check_command()
    except SystemExit as stop:
        return int(str(stop.code))
    return 0


def test_everything_passes_and_is_written(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    path = tmp_path / "check.json"
    check_command(path)
    printed = capsys.readouterr().out
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["schema"] == 1
    assert report["made_by"]["torch"] == torch.__version__
    assert report["passed"] is True
    assert all(row["passed"] for row in report["identities"] + report["accuracy"])
    assert len(report["identities"]) == 15
    assert {row["measure"] for row in report["accuracy"]} >= {
        "kl",
        "js",
        "entropy",
        "token_stats.nll",
        "cosine_similarity",
    }
    for row in report["identities"]:
        assert row["identity"] in printed
    for row in report["accuracy"]:
        assert row["measure"] in printed
        assert row["worst_ulp"] <= row["bound_ulp"]
    assert "FAIL" not in printed
    # What the measures are for: torch's own formula misses rows that ours gets right to a few units.
    by_name = {(row["measure"], row["dtype"]): row for row in report["accuracy"]}
    most = 4 if report["made_by"]["row_backend"] == "cpu" else 0.51
    for name in ("token_stats.nll", "kl"):
        assert by_name[name, "float32"]["worst_ulp"] < most
        assert by_name[name, "float32"]["worst_ulp_torch_formula"] > 1e6
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        assert {measure for measure, of in by_name if of == dtype} == {measure for measure, _ in by_name}
    assert by_name["kl", "float32"]["rows_lost_by_torch_formula"] > 0


@pytest.mark.usefixtures("few_rows")
def test_the_verb_exits_1_and_still_writes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ll, "kl", lambda p, q, kl=ll.kl, **o: kl(p, q, **o) + 1e-3)
    path = tmp_path / "check.json"
    found = CliRunner().invoke(app, ["check", "--json", str(path)])
    assert found.exit_code == 1
    assert json.loads(path.read_text(encoding="utf-8"))["passed"] is False
    assert "failed: kl in float32" in found.stdout


def test_an_unwritable_path_is_found_before_the_work(tmp_path) -> None:
    with pytest.raises(Exception, match="cannot write"):
        check_command(tmp_path / "missing" / "check.json")


def scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with every floating answer 1.0001 times too large."""

    def call(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        if isinstance(found, Tensor):
            return found * 1.0001
        parts = [x * 1.0001 if isinstance(x, Tensor) and x.is_floating_point() else x for x in found]
        return type(found)(*parts)

    return call


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (ll, "token_stats"),
        (ll, "pair_stats"),
        (ll, "entropy"),
        (ll, "kl"),
        (ll, "js"),
        (ll, "tv"),
        (LF, "cross_entropy"),
        (LF, "nll_loss"),
        (LF, "kl_div"),
        (LF, "binary_cross_entropy"),
        (LF, "binary_cross_entropy_with_logits"),
        (LF, "cosine_similarity"),
        (LF, "cosine_embedding_loss"),
    ],
)
def test_a_ten_thousandth_too_much_is_rejected(module, name, monkeypatch) -> None:
    monkeypatch.setattr(module, name, scaled(getattr(module, name)))
    assert exit_status() == 1


def wide(logits: Tensor) -> Tensor:
    return logits.double()


MUTANTS: dict[str, tuple[Any, str, Callable[..., Tensor]]] = {
    "KL as a cross-entropy less an entropy": (
        ll,
        "kl",
        lambda p, q, **_: (
            (wide(p).softmax(-1) * (wide(p).log_softmax(-1) - wide(q).log_softmax(-1)).nan_to_num()).sum(-1).to(p.dtype)
        ),
    ),
    "KL clamped at 0": (
        ll,
        "kl",
        lambda p, q, **_: (
            torch.nn.functional.kl_div(
                wide(q).log_softmax(-1), wide(p).log_softmax(-1), reduction="none", log_target=True
            )
            .nan_to_num()
            .sum(-1)
            .clamp(min=0)
            .to(p.dtype)
        ),
    ),
    "KL the wrong way round": (ll, "kl", lambda p, q, kl=ll.kl, **o: kl(q, p, **o)),
    "KL in bits": (ll, "kl", lambda p, q, kl=ll.kl, **o: kl(p, q, **o) / math.log(2)),
    "JS without its half": (ll, "js", lambda p, q, js=ll.js, **o: 2 * js(p, q, **o)),
    "entropy in float32 by torch's formula": (
        ll,
        "entropy",
        lambda z: torch.distributions.Categorical(logits=z).entropy(),
    ),
    "cross-entropy by torch": (LF, "cross_entropy", torch.nn.functional.cross_entropy),
    "BCE with logits by torch": (
        LF,
        "binary_cross_entropy_with_logits",
        torch.nn.functional.binary_cross_entropy_with_logits,
    ),
    "cosine by torch": (LF, "cosine_similarity", torch.nn.functional.cosine_similarity),
    "target off by one": (
        LF,
        "cross_entropy",
        lambda z, t, *args, ce=LF.cross_entropy, **kwargs: ce(
            z, t if t.is_floating_point() else (t + 1) % z.shape[1], *args, **kwargs
        ),
    ),
}


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_rejected(mutant, monkeypatch, capsys) -> None:
    module, name, broken = MUTANTS[mutant]
    monkeypatch.setattr(module, name, broken)
    assert exit_status() == 1
    assert "failed: " in capsys.readouterr().out


@pytest.mark.usefixtures("few_rows")
def test_the_few_rows_pass_when_nothing_is_broken() -> None:
    assert exit_status() == 0


@pytest.mark.usefixtures("few_rows")
def test_the_reference_is_right_to_half_a_unit(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOGITLESS_BACKEND", "reference")
    check_command(tmp_path / "check.json")
    report = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert report["made_by"]["row_backend"] == "reference"
    rows = [row for row in report["accuracy"] if row["dtype"] == "float32"]
    measured = [row["worst_ulp"] for row in rows if row["measure"] in ("token_stats.nll", "entropy", "kl", "js")]
    assert len(measured) == 4
    assert max(measured) < 0.51


def test_ulps_counts_spacings_of_the_result() -> None:
    eps = 2.0**-23
    assert ulps(1 + eps, mpmath.mpf(1), torch.float32) == 1
    assert ulps(1 - eps / 2, mpmath.mpf(1), torch.float32) == 0.5
    assert ulps(2 + 2 * eps, mpmath.mpf(2), torch.float32) == 1
    assert ulps(0.0, mpmath.mpf(2) ** -149, torch.float32) == 1
    assert ulps(math.inf, mp.inf, torch.float32) == 0
    assert ulps(1e30, mp.inf, torch.float32) == math.inf
    assert ulps(math.inf, mpmath.mpf(10) ** 5, torch.float16) == 0
    assert ulps(math.nan, mpmath.mpf(1), torch.float32) == math.inf
    assert ulps(1e-45, mpmath.mpf(0), torch.float32) == math.inf


def test_truths_match_scipy_where_scipy_is_accurate() -> None:
    special = pytest.importorskip("scipy.special")
    generator = torch.Generator().manual_seed(7)
    p, q = (torch.randn(20, generator=generator, dtype=torch.float64) for _ in range(2))
    with mp.workprec(truth.BITS):
        exact = truth.Exact(truth.Sample("", p, q, 3))
        found = {
            "kl": float(truth.true_kl(exact).value),
            "reverse": float(truth.true_reverse_kl(exact).value),
            "entropy": float(truth.true_entropy(exact).value),
            "nll": float(truth.true_nll(exact).value),
            "lse": float(truth.true_lse(exact).value),
        }
    dense_p, dense_q = special.softmax(p.numpy()), special.softmax(q.numpy())
    expected = {
        "kl": special.rel_entr(dense_p, dense_q).sum(),
        "reverse": special.rel_entr(dense_q, dense_p).sum(),
        "entropy": special.entr(dense_p).sum(),
        "nll": -math.log(dense_p[3]),
        "lse": special.logsumexp(p.numpy()),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-13)
