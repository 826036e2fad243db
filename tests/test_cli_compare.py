"""`logitless compare` and `score` on tiny models: right numbers, clear refusals, no half-written file."""

from __future__ import annotations

import html.parser
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch

from logitless.cli import main
from logitless.cli.models import load_model, parse_model_name
from models import byte_tokenizer, dense_log_probs, save_model

TEXT = "The quick brown fox <b>jumps</b> over 13 lazy dogs & naïve cats. 😀\n" * 3


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["logitless", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


def brute_force(base: Any, candidate: Any, ids: list[int], window: int, bos: list[int], classes: int) -> dict[str, Any]:
    """Return per-token float64 columns from the two models' own full logits."""
    columns: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(ids) - 1, window):
        inputs, targets = ids[start : start + window], torch.tensor(ids[start + 1 : start + window + 1])
        inputs = inputs[: len(targets)]
        rows = []
        for network in (base, candidate):
            logits = dense_log_probs(network, bos + inputs)[len(bos) :, :classes]
            rows.append(logits.log_softmax(-1))
        p, q = rows
        middle = torch.logaddexp(p, q) - math.log(2)
        found = {
            "kl": (p.exp() * (p - q)).sum(-1),
            "reverse_kl": (q.exp() * (q - p)).sum(-1),
            "js": ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / 2,
            "entropy_base": -(p.exp() * p).sum(-1),
            "entropy_candidate": -(q.exp() * q).sum(-1),
            "cross_entropy": -(p.exp() * q).sum(-1),
            "same_top": (p.argmax(-1) == q.argmax(-1)).double(),
            "nll_base": -p.gather(1, targets[:, None])[:, 0],
            "nll_candidate": -q.gather(1, targets[:, None])[:, 0],
        }
        for name, values in found.items():
            columns.setdefault(name, []).append(values)
    return {name: torch.cat(values).numpy() for name, values in columns.items()}


def assert_summary_equals(overall: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Compare the JSON's aggregates with those of brute-force columns."""
    candidate, pair, identity = overall["candidate"], overall["pair"], overall["identity"]
    assert candidate["tokens"] == len(expected["kl"])
    assert candidate["cross_entropy"] == pytest.approx(expected["nll_candidate"].mean(), rel=tolerance)
    assert candidate["perplexity"] == pytest.approx(math.exp(expected["nll_candidate"].mean()), rel=tolerance)
    assert candidate["mean_entropy"] == pytest.approx(expected["entropy_candidate"].mean(), rel=tolerance)
    for name, column in (("kl_base_candidate", "kl"), ("kl_candidate_base", "reverse_kl"), ("js", "js")):
        values = expected[column]
        assert pair[name] == {
            "mean": pytest.approx(values.mean(), rel=tolerance),
            "median": pytest.approx(np.quantile(values, 0.5), rel=tolerance),
            "p90": pytest.approx(np.quantile(values, 0.9), rel=tolerance),
            "p99": pytest.approx(np.quantile(values, 0.99), rel=tolerance),
            "p99_9": pytest.approx(np.quantile(values, 0.999), rel=tolerance),
            "max": pytest.approx(values.max(), rel=tolerance),
        }
    assert pair["same_top"] == expected["same_top"].mean()
    ratio = (expected["nll_candidate"] - expected["nll_base"]).mean()
    assert pair["log_perplexity_ratio"] == pytest.approx(ratio, abs=tolerance * expected["nll_base"].mean())
    assert identity["mean_cross_entropy"] == pytest.approx(expected["cross_entropy"].mean(), rel=tolerance)
    assert identity["mean_entropy"] == pytest.approx(expected["entropy_base"].mean(), rel=tolerance)
    assert identity["largest_relative_residual"] < 1e-12


HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "softcap": ("Gemma2", {"final_logit_softcapping": 3.0, "sliding_window": 64}),
    "multiplied": ("Cohere", {"logit_scale": 0.25}),
    "divided": ("Granite", {"logits_scaling": 4.0}),
    "bias": ("Phi", {"partial_rotary_factor": 0.5}),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("window", [16, 500])
def test_compare_equals_brute_force_over_full_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path, head: str, window: int
) -> None:
    kind, config = HEADS[head]

    def give_bias(model: Any) -> None:
        if head == "bias":
            model.lm_head.bias.normal_()

    long = {"max_position_embeddings": 1024}
    base = save_model(tmp_path / "base", kind, change=give_bias, **(config | long))
    candidate = save_model(tmp_path / "candidate", kind, seed=1, change=give_bias, **(config | long))
    out = tmp_path / "out.json"
    assert command(monkeypatch, "compare", base, candidate, "--text", text, "--json", out, "--window", window) == 0
    results = json.loads(out.read_text())
    networks = [load_model(parse_model_name(str(path))).network for path in (base, candidate)]
    ids = byte_tokenizer()(TEXT)["input_ids"]
    expected = brute_force(*networks, ids, window, [], 257)
    overall = results["candidates"][0]["overall"]
    assert_summary_equals(overall, expected)
    assert overall["candidate"]["bytes"] == len(TEXT.encode()) - 1
    assert results["base"]["overall"]["cross_entropy"] == pytest.approx(expected["nll_base"].mean(), rel=1e-5)
    assert results["plan"]["windows"] == -(-(len(ids) - 1) // window)


def test_bos_precedes_every_window_and_is_not_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    base = save_model(tmp_path / "base", tokenizer=byte_tokenizer(bos=True))
    out = tmp_path / "out.json"
    arguments = ("compare", base, f"{base}:int8", "--text", text, "--json", out, "--window", 30)
    assert command(monkeypatch, *arguments) == 0
    results = json.loads(out.read_text())
    network = load_model(parse_model_name(str(base))).network
    rounded = load_model(parse_model_name(f"{base}:int8")).network
    ids = byte_tokenizer()(TEXT)["input_ids"]
    assert_summary_equals(results["candidates"][0]["overall"], brute_force(network, rounded, ids, 30, [0], 257))
    assert results["plan"]["bos"].startswith("<s> before every window")


def test_padded_heads_are_compared_over_the_tokenizers_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    base = save_model(tmp_path / "base", rows=264)
    candidate = save_model(tmp_path / "candidate", rows=320, seed=1)
    out = tmp_path / "out.json"
    arguments = ("compare", base, candidate, "--text", text, "--json", out, "--window", 100)
    assert command(monkeypatch, *arguments) == 0
    results = json.loads(out.read_text())
    assert results["candidates"][0]["compared_classes"] == 257
    networks = [load_model(parse_model_name(str(path))).network for path in (base, candidate)]
    ids = byte_tokenizer()(TEXT)["input_ids"]
    assert_summary_equals(results["candidates"][0]["overall"], brute_force(*networks, ids, 100, [], 257))


def test_a_model_against_itself_is_exactly_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    base, out = save_model(tmp_path / "base"), tmp_path / "out.json"
    assert command(monkeypatch, "compare", base, base, "--text", text, "--json", out, "--window", 64) == 0
    pair = json.loads(out.read_text())["candidates"][0]["overall"]["pair"]
    assert set(pair["kl_base_candidate"].values()) == {0.0}
    assert set(pair["js"].values()) == {0.0}
    assert pair["same_top"] == 1.0
    assert pair["log_perplexity_ratio"] == 0.0


def test_rounding_in_memory_equals_rounding_after_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    base = save_model(tmp_path / "base", intermediate_size=50)  # 50 is no multiple of the group of 32
    found = {}
    for rounding in ("int4", "int8", "bf16"):
        out = tmp_path / "out.json"
        assert command(monkeypatch, "compare", base, f"{base}:{rounding}", "--text", text, "--json", out) == 2
        arguments = ("--json", out, "--window", 64)
        assert command(monkeypatch, "compare", base, f"{base}:{rounding}", "--text", text, *arguments) == 0
        networks = [load_model(parse_model_name(name)).network for name in (str(base), f"{base}:{rounding}")]
        overall = json.loads(out.read_text())["candidates"][0]["overall"]
        ids = byte_tokenizer()(TEXT)["input_ids"]
        assert_summary_equals(overall, brute_force(*networks, ids, 64, [], 257))
        embeddings = [network.get_input_embeddings().weight for network in networks]
        assert torch.equal(*embeddings)
        assert not torch.equal(*(network.lm_head.weight for network in networks))
        found[rounding] = overall["pair"]["kl_base_candidate"]["mean"]
    assert 0 < found["bf16"] < found["int4"]
    assert 0 < found["int8"] < found["int4"]


class Loads(html.parser.HTMLParser):
    """Collects everything in a page that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.policy = ""
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = str(dict(attrs)["content"])


def test_the_report_loads_nothing_and_escapes_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    base, out = save_model(tmp_path / "base"), tmp_path / "out.html"
    second = tmp_path / "<i>second.txt"
    second.write_text("<script>alert(1)</script> & more of it", "utf-8")
    arguments = ("--text", text, "--text", second, "--html", out, "--window", 64)
    assert command(monkeypatch, "compare", base, f"{base}:int4", *arguments) == 0
    page = out.read_text("utf-8")
    loads = Loads()
    loads.feed(page)
    assert loads.found == []
    assert "default-src 'none'" in loads.policy
    assert "link" not in loads.tags
    assert "<script>alert" not in page
    assert "<i>second" not in page
    assert "&lt;i&gt;second.txt" in page
    assert page.count('id="plot-') == 4
    assert 'class="worst"' in page


def test_json_says_what_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    base, out = save_model(tmp_path / "base"), tmp_path / "out.json"
    arguments = ("--text", text, "--json", out, "--window", 64, "--max-tokens", 70)
    assert command(monkeypatch, "compare", base, f"{base}:int8", *arguments) == 0
    results = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert results["schema"] == {"name": "logitless.comparison", "version": 1}
    assert {"logitless", "torch", "transformers", "python", "platform", "threads"} <= results["made_by"].keys()
    assert results["plan"]["texts"][0]["scored_tokens"] == 70
    assert len(results["plan"]["texts"][0]["sha256"]) == 64
    base_model, candidate = results["base"]["model"], results["candidates"][0]
    assert base_model["sha256"] == candidate["model"]["sha256"]
    assert (base_model["rounding"], candidate["model"]["rounding"]) == (None, "int8")
    assert base_model["dtype"] == "float32"
    assert candidate["memory"]["logits_would_take"] == 4 * 70 * 2 * 257
    assert [text["candidate"]["tokens"] for text in candidate["texts"]] == [70]
    assert candidate["worst_tokens"][0]["kl"] == candidate["overall"]["pair"]["kl_base_candidate"]["max"]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_score_rows_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path, suffix: str) -> None:
    model, out, summary = save_model(tmp_path / "model"), tmp_path / f"rows.{suffix}", tmp_path / "sum.json"
    arguments = ("--text", text, "--out", out, "--json", summary, "--window", 50)
    assert command(monkeypatch, "score", model, *arguments) == 0
    if suffix == "parquet":
        rows = pyarrow.parquet.read_table(out).to_pylist()
    else:
        rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    ids = byte_tokenizer()(TEXT)["input_ids"]
    assert [row["token_id"] for row in rows] == ids[1:]
    assert [row["position"] for row in rows] == list(range(1, len(ids)))
    assert [row["window"] for row in rows] == [index // 50 for index in range(len(ids) - 1)]
    assert {row["file"] for row in rows} == {str(text)}
    assert TEXT[0] + "".join(row["token"] for row in rows) == TEXT
    network = load_model(parse_model_name(str(model))).network
    for start in range(0, len(rows), 50):
        part = rows[start : start + 50]
        log_probs = dense_log_probs(network, ids[start : start + len(part)])
        targets = torch.tensor([row["token_id"] for row in part])[:, None]
        picked = log_probs.gather(1, targets)
        np.testing.assert_allclose([row["nll"] for row in part], -picked[:, 0], rtol=1e-5)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        np.testing.assert_allclose([row["entropy"] for row in part], entropy, rtol=1e-5)
        assert [row["rank"] for row in part] == (log_probs > picked).sum(-1).tolist()
    results = json.loads(summary.read_text())
    assert results["schema"] == {"name": "logitless.score", "version": 1}
    assert results["overall"]["cross_entropy"] == pytest.approx(np.mean([row["nll"] for row in rows]), rel=1e-12)


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object
) -> str:
    """Run a command that must exit 2 with one line of error and leave `folder` as it was."""
    before = sorted(os.listdir(folder))
    assert command(monkeypatch, *arguments, "--json", folder / "never.json") == 2
    assert sorted(os.listdir(folder)) == before
    error = capsys.readouterr().err
    # Steps that were taken say so, a line each; the refusal is the last line and the only one of its kind.
    lines = [line for line in error.splitlines() if line.startswith("logitless: ")]
    assert error.splitlines()[-1:] == lines
    return lines[0]


def _set_nan(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight[3, 4] = math.nan


def test_bad_input_is_one_line_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: Path
) -> None:
    base = save_model(tmp_path / "base")
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("\n")
    short.write_text("x")
    other = save_model(tmp_path / "other", rows=300, tokenizer=byte_tokenizer(swapped=True))
    not_a_number = save_model(tmp_path / "nan", change=_set_nan)
    (tmp_path / "plain.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x01" * 64)
    (tmp_path / "text.gguf").write_text("not at all")
    (tmp_path / "folder").mkdir()

    def said(model: object, candidate: object, *texts: Path, more: tuple[object, ...] = ()) -> str:
        options = [option for path in texts for option in ("--text", path)]
        return refused(monkeypatch, capsys, tmp_path, "compare", model, candidate, *options, *more)

    narrow = ("--window", 64)
    assert "no such model" in said(tmp_path / "none", base, text)
    assert "roundings are :int8, :int4, :bf16" in said(base, f"{base}:int3", text)
    assert "cannot read text" in said(base, base, tmp_path / "none.txt")
    assert "is empty" in said(base, base, empty)
    assert "1 token; two are needed" in said(base, base, short)
    assert "1 token; two are needed" in said(base, base, text, short, more=narrow)
    assert "different vocabularies (257 and 257 tokens; 2 differ, '!' and '\"' for one" in said(
        base, other, text, more=narrow
    )
    assert "layers.0.mlp.up_proj.weight holds NaN" in said(base, not_a_number, text, more=narrow)
    assert "cannot be loaded" in said(tmp_path / "plain.gguf", base, text)
    assert "does not begin with GGUF" in said(tmp_path / "text.gguf", base, text)
    assert "no config.json" in said(tmp_path / "folder", base, text)
    assert "neither a Hugging Face directory nor a .gguf file" in said(text, base, text)
    assert "reads 128 tokens at most, not 212: lower --window" in said(base, base, text, more=("--window", 512))


def test_models_that_predict_no_next_token_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: Path
) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaModel

    small = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    models = {
        "headless": LlamaModel(LlamaConfig(**small, intermediate_size=48, tie_word_embeddings=False)),
        "encoder": BertModel(BertConfig(**small, intermediate_size=48)),
        "masked": BertForMaskedLM(BertConfig(**small, intermediate_size=48)),
    }
    for name, model in models.items():
        with torch.no_grad():  # attention that is not uniform, so that a token's state shows what it sees
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)

    def said(name: str) -> str:
        return refused(monkeypatch, capsys, tmp_path, "score", tmp_path / name, "--text", text, "--window", 64)

    assert "no language head, or misses weights of one" in said("headless")
    assert "no language head, or misses weights of one" in said("encoder")
    assert "not a causal language model: its states depend on the tokens that follow" in said("masked")


def test_a_head_that_is_more_than_linear_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: Path
) -> None:
    from transformers import GraniteForCausalLM

    forward = GraniteForCausalLM.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.001
        return output

    model = save_model(tmp_path / "model", "Granite")
    monkeypatch.setattr(GraniteForCausalLM, "forward", doubled)
    line = refused(monkeypatch, capsys, tmp_path, "score", model, "--text", text, "--window", 64)
    assert "its output head does more to the hidden states" in line


def test_unwritable_output_is_refused_before_a_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: Path
) -> None:
    from logitless.cli import comparison

    monkeypatch.setattr(comparison, "load_model", lambda name: pytest.fail("a model was loaded"))
    base = save_model(tmp_path / "base")
    for option in ("--json", "--html"):
        assert command(monkeypatch, "compare", base, base, "--text", text, option, tmp_path / "no" / "out") == 2
        assert "cannot write" in capsys.readouterr().err
    both = ("--json", tmp_path / "out", "--html", tmp_path / "out")
    assert command(monkeypatch, "compare", base, base, "--text", text, *both) == 2
    assert "same file" in capsys.readouterr().err


def test_score_refuses_another_kind_of_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: Path
) -> None:
    base = save_model(tmp_path / "base")
    line = refused(monkeypatch, capsys, tmp_path, "score", base, "--text", text, "--out", tmp_path / "rows.txt")
    assert ".parquet or a .jsonl" in line


def test_a_pickle_that_runs_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: Path
) -> None:
    model = save_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    torch.save({"model.embed_tokens.weight": Bomb()}, model / "pytorch_model.bin")
    line = refused(monkeypatch, capsys, tmp_path, "score", model, "--text", text)
    assert "cannot be loaded" in line
    assert not ran.exists()


def test_a_missing_extra_is_named_with_the_way_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    assert command(monkeypatch, "demo") == 2
    assert capsys.readouterr().err == (
        'logitless: the command line needs gguf, not installed here; run: pip install "logitless[cli]"\n'
    )
