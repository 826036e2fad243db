"""The page of `logitless compare`: axes with ticks, labels that fit, shades that tell tokens apart, bytes by code."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitless.cli.plots import COLOURS, log_axis, short_labels
from logitless.cli.report import shade
from logitless.cli.token_names import token_name
from models import save_model
from test_cli_compare import command

TEXT = "The quick brown fox jumps over “lazy” dogs & naïve cats. 😀\n" * 2


def noise(scale: float) -> Any:
    def change(model: Any) -> None:
        generator = torch.Generator().manual_seed(3)
        for weight in model.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=generator))

    return change


class Page:
    """A report, and what its script draws."""

    def __init__(self, path: Path) -> None:
        self.source = path.read_text("utf-8")
        self.figures = json.loads(re.search(r"^const figures = (.*);$", self.source, re.MULTILINE)[1])
        body = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", self.source, flags=re.DOTALL)
        self.text = html.unescape(re.sub(r"<[^>]*>", " ", body))

    def axes(self) -> list[dict[str, Any]]:
        return [figure["layout"][name] for figure in self.figures for name in ("xaxis", "yaxis")]

    def shades(self) -> list[float]:
        return [float(shade) for shade in re.findall(r'<i[^>]*--shade: ([0-9.]+)" title', self.source)]


def compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch, scales: list[float], texts: int = 1, names: str = "quant-{}"
) -> Page:
    base = save_model(folder / "base")
    candidates = [save_model(folder / names.format(number), change=noise(scale)) for number, scale in enumerate(scales)]
    options = []
    for number in range(texts):
        path = folder / f"a rather long name of a text, chapter {number} [draft].txt"
        path.write_text(TEXT + str(number), "utf-8")
        options += ["--text", path]
    out = folder / "page.html"
    assert command(monkeypatch, "compare", base, *candidates, *options, "--window", 100, "--html", out) == 0
    return Page(out)


@pytest.mark.parametrize("scales", [[1e-5], [1e-6, 0.1], [1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3]])
@pytest.mark.parametrize("texts", [1, 2, 8])
def test_every_logarithmic_axis_has_ticks_in_its_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scales: list[float], texts: int
) -> None:
    page = compared(tmp_path, monkeypatch, scales, texts)
    assert len(page.figures) == (3 if texts == 1 else 4)
    for axis in page.axes():
        if axis.get("type") == "log":
            low, high = axis["range"]
            inside = [tick for tick in axis["tickvals"] if low <= math.log10(tick) <= high]
            assert 2 <= len(inside) <= 7
            assert len(axis["ticktext"]) == len(axis["tickvals"])
        for label in axis.get("ticktext", []):
            assert len(re.sub(r"<[^>]*>", "", html.unescape(label))) <= 22
    for figure in page.figures:
        assert len(figure["data"]) == len(scales)
        assert [trace["meta"] for trace in figure["data"]] == list(range(len(scales)))
        assert not figure["layout"]["showlegend"]
    assert page.source.count('<button type="button"') == len(scales)
    logarithmic = [axis for axis in page.axes() if axis.get("type") == "log"]
    assert len(logarithmic) == (2 if texts == 1 else 3)


def test_eight_candidates_have_eight_colours_and_symbols() -> None:
    assert len(set(COLOURS)) == 8


@pytest.mark.parametrize(
    ("low", "high"), [(1e-9, 1e-9), (3.1e-5, 3.3e-5), (1e-4, 9e-4), (0.5, 3), (1e-18, 20), (9.9, 10.1)]
)
def test_a_logarithmic_axis_covers_its_values_with_ticks(low: float, high: float) -> None:
    axis = log_axis([low, high])
    least, most = axis["range"]
    assert least < math.log10(low)
    assert math.log10(high) < most
    assert 2 <= len(axis["tickvals"]) <= 7
    assert all(least <= math.log10(tick) <= most for tick in axis["tickvals"])
    assert len(set(axis["ticktext"])) == len(axis["ticktext"])


def test_labels_stay_apart_when_cut() -> None:
    names = [f"corpora/a rather long name of a text, chapter {number} [draft].txt" for number in range(12)]
    labels = short_labels(names)
    assert len(set(labels)) == 12
    assert max(map(len, labels)) <= 22


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 0.1])
def test_tokens_are_shaded_however_small_the_differences_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    page = compared(tmp_path, monkeypatch, [scale])
    shades = np.array(page.shades())
    assert shades.max() > 0.42  # the most moved token is past half of the darkest shade
    assert (shades > 0.02).mean() > 0.5
    assert shades.std() > 0.05
    legend = re.findall(r'<i style="--shade: ([0-9.]+)">([^<]+)</i>', page.source)
    assert len(legend) == 5
    assert float(legend[2][0]) == 0.425


def test_shades_grow_with_kl() -> None:
    values = [shade(kl, 1e-5) for kl in (0.0, 1e-6, 1e-5, 1e-4, 1.0, math.inf)]
    assert values == sorted(values)
    assert (values[0], values[2], values[-1]) == (0.0, 0.425, 0.85)
    assert shade(0.0, 0.0) == 0.0


def test_a_model_against_itself_says_that_nothing_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = compared(tmp_path, monkeypatch, [0.0])
    assert "No token has a KL above 0" in page.text
    assert set(page.shades()) == {0.0}
    annotations = [figure["layout"].get("annotations", []) for figure in page.figures]
    assert [bool(found) for found in annotations] == [True, False, True]


def test_bytes_of_a_character_show_their_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = compared(tmp_path, monkeypatch, [0.1])
    shown = set(re.findall(r"<b>&lt;0x([0-9A-F]{2})&gt;</b>", page.source))
    parts = {f"{byte:02X}" for character in "“”ï😀" for byte in character.encode()[:-1]}
    assert shown
    assert shown <= parts
    assert not re.search(r'<i[^>]*title="[^"]*">(<b>)?(</b>)?</i>', page.source)  # no token is an empty box
    assert "�" not in page.text


def test_the_standard_error_of_kl_is_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = compared(tmp_path, monkeypatch, [1e-2], texts=2)
    assert re.search(r"± [0-9.e+-]+ nats per token", page.text)
    assert "± by window" in page.text


def test_names_are_shown_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = compared(tmp_path, monkeypatch, [1e-3, 1e-2], texts=2, names="[bold]q{}<br>[red] & :smile:")
    assert "[bold]q1<br>[red] & :smile:" in page.text
    for figure in page.figures:
        assert figure["data"][1]["name"] == "[bold]q1&lt;br&gt;[red] &amp; :smile:"


def test_a_token_is_named_by_its_text_or_its_bytes() -> None:
    class Tokenizer:
        """Byte-level spelling, as in GPT-2, and SentencePiece's for bytes."""

        tokens = ("Ġcafé", "Ã", "âĢ", "<0xE2>", "aâ", "Ċ")

        def decode(self, ids: list[int]) -> str:
            return {0: " café", 5: "\n"}.get(ids[0], "a\ufffd" if ids[0] == 4 else "\ufffd")

        def token(self, index: int) -> str:
            return self.tokens[index]

        convert_ids_to_tokens = token

    names = [token_name(Tokenizer(), index) for index in range(6)]
    assert names == [" café", "<0xC3>", "<0xE2><0x80>", "<0xE2>", "a<0xE2>", "\n"]
