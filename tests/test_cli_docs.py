"""docs/command-line.md names every key, column and option that there is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from logitless.cli.rounding import ROUNDINGS
from models import save_model
from test_cli_compare import command

PAGE = (Path(__file__).parent.parent / "docs" / "command-line.md").read_text("utf-8")


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inside in value.items():
            yield key
            yield from keys(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from keys(inside)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_model(tmp_path / "base")
    save_model(tmp_path / "wide", hidden_size=48, num_attention_heads=3)
    (tmp_path / "text.txt").write_text("Some text of no importance.\n" * 3, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_key_and_column_is_documented(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = PAGE[PAGE.index("## The JSON file") : PAGE.index("## The rows of `--out`")]
    columns = set(re.findall(r"`(\w+)`", PAGE[PAGE.index("## The rows of `--out`") :]))
    for verb, models in (("compare", ("base", "wide")), ("score", ("base",))):
        given = ("--text", "text.txt", "--window", 40, "--json", "out.json", "--out", "rows.parquet")
        assert command(monkeypatch, verb, *models, *given) == 0
        told = json.loads(Path("out.json").read_text("utf-8"))
        missing = {key for key in keys(told) if not re.search(rf"\b{key}\b", schema)}
        assert not missing - {"unit", "measured"}
        assert set(pyarrow.parquet.read_schema("rows.parquet").names) <= columns


def test_models_of_different_widths_have_no_cosine(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("--text", "text.txt", "--window", 40, "--json", "out.json", "--out", "rows.parquet", "--html", "page.html")
    assert command(monkeypatch, "compare", "base", "wide", *given) == 0
    told = json.loads(Path("out.json").read_text("utf-8"))
    assert told["candidates"][0]["overall"]["pair"]["mean_hidden_cosine"] is None
    assert set(pyarrow.parquet.read_table("rows.parquet").column("cosine").to_pylist()) == {None}


def test_every_verb_option_and_rounding_is_documented() -> None:
    import typer

    from logitless.cli.app import app

    group = typer.main.get_command(app)
    for name, verb in group.commands.items():
        assert f"`logitless {name}" in PAGE
        if name in ("compare", "score"):
            for option in verb.params:
                if option.opts[0].startswith("--") and option.opts[0] != "--help":
                    assert option.opts[0] in PAGE
    assert "--version" in PAGE
    assert all(f"`:{rounding}`" in PAGE for rounding in ROUNDINGS)


def test_links_of_the_page_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links
    for link in links:
        assert link.startswith("https://") or (Path(__file__).parent.parent / "docs" / link).is_file(), link
