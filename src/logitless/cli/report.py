"""The HTML report: tables, plots, and the text around the tokens that moved most, in one file that loads nothing."""

import importlib.resources
from typing import Any, BinaryIO

import jinja2
from plotly.offline import get_plotlyjs

from logitless.cli.comparison import Comparison, Pair, WorstToken
from logitless.cli.plots import figures
from logitless.cli.tables import number, size

_CONTEXT_TOKENS = 30


def write_report(comparison: Comparison, results: dict[str, Any], file: BinaryIO) -> None:
    """Write the report; every text in it is escaped, and its content policy forbids it to load anything."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["number"] = number
    environment.filters["size"] = size
    source = importlib.resources.files("logitless.cli").joinpath("report.html.jinja").read_text("utf-8")
    names = [candidate["label"] for candidate in results["candidates"]]
    page = environment.from_string(source).render(
        results=results,
        figures=figures(comparison, names),
        worst=[_spans(pair, comparison) for pair in comparison.pairs],
        plotly=get_plotlyjs(),
    )
    file.write(page.encode())


def _spans(pair: Pair, comparison: Comparison) -> list[dict[str, Any]]:
    return [_span(worst, pair, comparison) for worst in pair.worst]


def _span(worst: WorstToken, pair: Pair, comparison: Comparison) -> dict[str, Any]:
    columns, text = pair.per_text[worst.text], comparison.plan.texts[worst.text]
    first = max(0, worst.row - _CONTEXT_TOKENS)
    last = min(text.scored_tokens, worst.row + _CONTEXT_TOKENS // 2)
    tokens = [
        {
            "text": text.pieces[row + 1],
            "kl": float(columns["kl"][row]),
            "nll_base": float(columns["nll_base"][row]),
            "nll_candidate": float(columns["nll_candidate"][row]),
            "shade": _shade(float(columns["kl"][row])),
            "worst": row == worst.row,
        }
        for row in range(first, last)
    ]
    return {
        "text": text.text.name,
        "position": int(columns["position"][worst.row]),
        "base_top": worst.base_top,
        "candidate_top": worst.candidate_top,
        "kl": float(columns["kl"][worst.row]),
        "nll_base": float(columns["nll_base"][worst.row]),
        "nll_candidate": float(columns["nll_candidate"][worst.row]),
        "tokens": tokens,
    }


def _shade(kl: float) -> str:
    """Return an opacity that grows with KL and passes one half at one nat."""
    return f"{0.85 * (1.0 if kl == float('inf') else kl / (kl + 1.0)):.3f}"
