"""Tables on stdout, made of the results that also go to the JSON file."""

import math
from typing import Any, TextIO

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

_LONGEST = 300  # characters of a text in a table
_NARROWEST = 100  # columns; a pipe has no width, and a table cut to 80 loses its numbers


def print_comparison(results: dict[str, Any], stream: TextIO) -> None:
    """Print the models, each pair, the identity, and the memory, and what was left out."""
    left_out = [Text(f"Left out: {one['name']}: {one['reason']}") for one in results["left_out"]]
    _print(stream, _models(results), _pairs(results), _identity(results), _memory(results), *left_out)


def print_score(results: dict[str, Any], stream: TextIO) -> None:
    """Print one model's summary for each text and overall."""
    names = [text["name"] for text in results["plan"]["texts"]]
    rows = [*zip(names, results["texts"], strict=True), ("all", results["overall"])]
    table = _table(f"{results['model']['name']}: every token after the first of a text, once", "text")
    for name in ("tokens", "nats/token", "bits/byte", "perplexity", "mean entropy"):
        table.add_column(name, justify="right")
    for name, summary in rows:
        table.add_row(name, *_summary_cells(summary))
    memory = results["memory"]
    line = (
        f"Memory: scoring took {size(memory['measure_growth'])}; the logits would take "
        f"{size(memory['logits_would_take'])}; peak of the process, model included, {size(memory['process_peak'])}"
    )
    _print(stream, table, Text(line))


def print_found(results: dict[str, Any], stream: TextIO) -> None:
    """Print what was found for each query."""
    for query in results["queries"]:
        table = _table(query["query"], "item")
        for name in ("score", "rank", "id"):
            table.add_column(name, justify="right")
        for hit in query["found"]:
            score = "–" if math.isnan(hit["score"]) else f"{hit['score']:.4f}"
            table.add_row(_shortened(hit["item"]), score, str(hit["rank"]), str(hit["id"]))
        _print(stream, table)


def print_similar(results: dict[str, Any], stream: TextIO) -> None:
    """Print one cosine, or what those of many pairs are and where the other one of a pair is found."""
    cosines = results["cosines"]
    if "found" not in results:
        _print(stream, Text(f"cosine {cosines[0]:.4f}"))
        return
    lines = [f"{len(cosines):,} pairs: mean cosine {results['mean']:.4f}, {min(cosines):.4f} to {max(cosines):.4f}"]
    lines += [f"{name.replace('_', ' ')}: {number(value)}" for name, value in results["found"].items()]
    _print(stream, Text("\n".join(lines)))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def number(value: float | None, digits: int = 4) -> str:
    """Format with `digits` significant digits, in scientific notation when very small or large."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-2 <= abs(value) < 1e6:
        return f"{value:#.{digits}g}" if abs(value) < 10 ** (digits - 1) else f"{value:,.0f}"
    return f"{value:.{digits - 1}e}"


def size(count: float | None) -> str:
    """Format bytes in MB, or GB from ten thousand MB on."""
    if count is None:
        return "not measured here"
    if count < 1e6:
        return "under 1 MB"
    return f"{count / 1e6:,.0f} MB" if count < 1e10 else f"{count / 1e9:,.1f} GB"


def _models(results: dict[str, Any]) -> Table:
    plan = results["plan"]
    table = _table(
        f"Models on the same tokens: windows of {plan['window_tokens']}, beginning-of-text token: {plan['bos']}",
        "model",
    )
    for name in ("text", "tokens", "nats/token", "bits/byte", "perplexity", "mean entropy"):
        table.add_column(name, justify="left" if name == "text" else "right")
    base = results["base"]
    models = [(base["label"], base["texts"], base["overall"])]
    for candidate in results["candidates"]:
        texts = [text["candidate"] for text in candidate["texts"]]
        models.append((candidate["label"], texts, candidate["overall"]["candidate"]))
    names = [text["name"] for text in plan["texts"]]
    for label, texts, overall in models:
        rows = [*zip(names, texts, strict=True)] if len(names) > 1 else []
        for index, (name, summary) in enumerate([*rows, ("all" if rows else names[0], overall)]):
            table.add_row(label if index == 0 else "", name, *_summary_cells(summary), style=None)
        table.add_section()
    return table


def _summary_cells(summary: dict[str, Any]) -> list[str]:
    return [
        f"{summary['tokens']:,}",
        f"{summary['cross_entropy']:.4f}",
        f"{summary['bits_per_byte']:.4f}",
        number(summary["perplexity"]),
        f"{summary['mean_entropy']:.4f}",
    ]


def _pairs(results: dict[str, Any]) -> Group:
    base = results["base"]["label"]
    spread = _table(f"Divergence from p = {base}, nats per token", "q")
    for name in ("measure", "mean", "± (windows)", "median", "p90", "p99", "p99.9", "max"):
        spread.add_column(name, justify="left" if name == "measure" else "right")
    single = _table(f"Agreement with {base}", "candidate")
    for name in ("same top token", "cosine of states", "ln PPL ratio", "± (windows)", "± naive"):
        single.add_column(name, justify="right")
    for candidate in results["candidates"]:
        pair, label = candidate["overall"]["pair"], candidate["label"]
        measures = {"KL(p‖q)": "kl_base_candidate", "KL(q‖p)": "kl_candidate_base", "JS(p, q)": "js"}
        for index, (name, key) in enumerate(measures.items()):
            mean, *others = pair[key].values()
            error = number(pair[f"{key}_se_clustered"], 2)
            cells = (number(mean), error, *(number(value) for value in others))
            spread.add_row(label if index == 0 else "", name, *cells)
        spread.add_section()
        single.add_row(
            label,
            f"{pair['same_top']:.2%}",
            "–" if pair["mean_hidden_cosine"] is None else f"{pair['mean_hidden_cosine']:.6f}",
            f"{pair['log_perplexity_ratio']:+.5f}",
            f"{number(pair['log_perplexity_ratio_se_clustered'], 2)} ({pair['clusters']})",
            number(pair["log_perplexity_ratio_se_naive"], 2),
        )
    return Group(spread, "", single)


def _identity(results: dict[str, Any]) -> Table:
    table = _table("CE(p, q) = H(p) + KL(p‖q), in nats; the residual is of the worst token", "q")
    for name in ("CE(p, q)", "H(p)", "KL(p‖q)", "largest residual", "relative to CE"):
        table.add_column(name, justify="right")
    for candidate in results["candidates"]:
        identity = candidate["overall"]["identity"]
        table.add_row(
            candidate["label"],
            f"{identity['mean_cross_entropy']:.6f}",
            f"{identity['mean_entropy']:.6f}",
            f"{identity['mean_kl']:.6f}",
            f"{identity['largest_residual']:.1e}",
            f"{identity['largest_relative_residual']:.1e}",
        )
    return table


def _memory(results: dict[str, Any]) -> Table:
    table = _table("Memory", "q")
    for name in ("measuring took", "both models' logits would take", "peak of the process, models included"):
        table.add_column(name, justify="right")
    for candidate in results["candidates"]:
        memory = candidate["memory"]
        table.add_row(
            candidate["label"],
            size(memory["measure_growth"]),
            size(memory["logits_would_take"]),
            size(memory["process_peak"]),
        )
    return table


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
    table.add_column(first, overflow="fold")
    return table


def _print(stream: TextIO, *parts: Table | Group | Text) -> None:
    # Names of files and tokens are among the cells, and square brackets in them are no markup.
    console = Console(file=stream, markup=False, emoji=False)
    if console.width < _NARROWEST and not console.is_terminal:
        console = Console(file=stream, markup=False, emoji=False, width=_NARROWEST + 20)
    for part in parts:
        console.print()
        console.print(part, highlight=False)
