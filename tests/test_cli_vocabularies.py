"""Models are compared over the classes that their tokenizers share, which is decided before any of them reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from gguf_models import Writer
from logitless.cli import comparison
from logitless.cli.models import load_model, parse_model_name
from models import byte_tokenizer, dense_log_probs, save_model
from test_cli_compare import TEXT, command


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


def with_token(*names: str, special: bool = True, extra: int = 0) -> Any:
    tokenizer = byte_tokenizer(extra=extra)
    added = [AddedToken(name, special=special, normalized=False) for name in names]
    tokenizer.backend_tokenizer.add_special_tokens(added) if special else tokenizer.backend_tokenizer.add_tokens(added)
    return tokenizer


def compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *models: Path
) -> tuple[dict[str, Any], str]:
    """Compare models on the text that is there, and return the results with what was said on the way."""
    out = tmp_path / "out.json"
    arguments = ("--text", tmp_path / "text.txt", "--json", out, "--window", 100)
    assert command(monkeypatch, "compare", *models, *arguments) == 0
    return json.loads(out.read_text()), capsys.readouterr().err


def never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "load_model", lambda *_: pytest.fail("a model was loaded"))


def nll(path: Path, classes: int) -> float:
    """Return the mean negative log-likelihood of the text over the first classes, by brute force."""
    network = load_model(parse_model_name(str(path))).network
    ids = byte_tokenizer()(TEXT)["input_ids"]
    total = 0.0
    for start in range(0, len(ids) - 1, 100):
        targets = torch.tensor(ids[start + 1 : start + 101])[:, None]
        rows = dense_log_probs(network, ids[start : start + len(targets)])[:, :classes].log_softmax(-1)
        total -= rows.gather(1, targets).sum().item()
    return total / (len(ids) - 1)


@pytest.mark.usefixtures("text")
def test_a_directory_is_compared_with_its_own_file_whatever_pads_its_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen pads its head: the file names the rows [PADn], the directory has no name for them. Llama 3 has a phantom."""
    qwen = save_model(tmp_path / "qwen", "Qwen2", rows=270, tokenizer=with_token("<|endoftext|>"))
    phantom = save_model(tmp_path / "llama", rows=262, tokenizer=with_token("<|end|>", extra=3))
    for folder, classes in ((qwen, 258), (phantom, 261)):
        file = Writer(folder).write(tmp_path / f"{folder.name}.gguf")
        results, said = compared(tmp_path, monkeypatch, capsys, folder, file)
        pair = results["candidates"][0]
        assert set(pair["overall"]["pair"]["kl_base_candidate"].values()) == {0.0}
        assert pair["compared_classes"] == classes
        rows = json.loads((folder / "config.json").read_text())["vocab_size"]
        assert f"{folder.name}: the last {rows - classes} of {rows} rows of its head belong to no token" in said


@pytest.mark.usefixtures("text")
def test_one_base_has_one_perplexity_however_heads_are_padded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loud(model: Any) -> None:
        model.lm_head.weight[257:] *= 30  # rows without a token that take most of the mass

    base = save_model(tmp_path / "base", rows=300, change=loud)
    others = [save_model(tmp_path / f"rows{rows}", rows=rows, seed=1) for rows in (257, 300, 320)]
    results, _ = compared(tmp_path, monkeypatch, capsys, base, *others)
    found = {candidate["overall"]["pair"]["clusters"] for candidate in results["candidates"]}
    assert len(found) == 1
    perplexity = results["base"]["overall"]["perplexity"]
    assert perplexity == pytest.approx(math.exp(nll(base, 257)), rel=1e-5)
    out = tmp_path / "score.json"
    arguments = ("--text", tmp_path / "text.txt", "--json", out, "--window", 100)
    assert command(monkeypatch, "score", base, *arguments) == 0
    assert json.loads(out.read_text())["overall"]["perplexity"] == pytest.approx(perplexity, rel=1e-12)
    assert "base: the last 43 of 300 rows of its head belong to no token of its tokenizer" in capsys.readouterr().err


@pytest.mark.usefixtures("text")
def test_an_added_token_is_left_out_with_its_mass_divided_among_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(tmp_path / "base")
    tuned = save_model(tmp_path / "tuned", rows=259, seed=1, tokenizer=with_token("<pad>", "<|tool|>"))
    results, said = compared(tmp_path, monkeypatch, capsys, base, tuned)
    pair = results["candidates"][0]
    assert pair["compared_classes"] == 257
    assert pair["overall"]["candidate"]["cross_entropy"] == pytest.approx(nll(tuned, 257), rel=1e-5)
    assert "tuned: measured over the first 257 of its 259 classes, which all models have" in said
    assert "its probabilities are divided by what these classes have together" in said
    turned, _ = compared(tmp_path, monkeypatch, capsys, tuned, base)
    assert turned["base"]["overall"]["cross_entropy"] == pytest.approx(nll(tuned, 257), rel=1e-5)


@pytest.mark.usefixtures("text")
def test_reserved_tokens_that_were_renamed_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(tmp_path / "base", rows=258, tokenizer=with_token("<|reserved_0|>"))
    tuned = save_model(tmp_path / "tuned", rows=258, seed=1, tokenizer=with_token("<|im_start|>"))
    results, said = compared(tmp_path, monkeypatch, capsys, base, tuned)
    assert results["candidates"][0]["compared_classes"] == 258
    assert "name 1 special tokens differently ('<|reserved_0|>' and '<|im_start|>' for one)" in said


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "a text that uses what only one has": (
        {},
        {"rows": 258, "tokenizer": with_token("<|tool|>")},
        "a <|tool|> b",
        "split {text} differently, first at token 2 ('<' and '<|tool|>')",
    ),
    "a text that uses what has no row": (
        {"tokenizer": with_token("<|tool|>")},
        {"tokenizer": with_token("<|tool|>")},
        "a <|tool|> b",
        "has token 257 ('<|tool|>'), which is beyond the 257 classes of base",
    ),
    "another token of the same number": (
        {},
        {"tokenizer": byte_tokenizer(swapped=True)},
        "plain text",
        "have different vocabularies (257 and 257 tokens; 2 differ, '!' and '\"' for one)",
    ),
    "a beginning that only one has": (
        {},
        {"tokenizer": byte_tokenizer(bos=True)},
        "plain text",
        "differ in whether a text begins with a special token",
    ),
    "a window longer than the candidate reads": (
        {"max_position_embeddings": 4096},
        {"max_position_embeddings": 64},
        "plain text " * 20,
        "other reads 64 tokens at most, not 100: lower --window",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_whose_tokens_differ_are_refused_before_one_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    ours, theirs, content, message = REFUSED[case]
    base, other = save_model(tmp_path / "base", **ours), save_model(tmp_path / "other", **theirs)
    text = tmp_path / "text.txt"
    text.write_text(content)
    never(monkeypatch)
    assert command(monkeypatch, "compare", base, other, "--text", text, "--window", 100) == 2
    assert message.format(text=text) in capsys.readouterr().err.splitlines()[-1]
