"""The HTML report: tables, plots, and the text around the tokens that moved most, in one file that loads nothing."""

import importlib.resources
import math
from typing import Any, BinaryIO

import jinja2
import numpy as np
from plotly.offline import get_plotlyjs

from logitless.cli.comparison import Comparison, Pair, WorstToken
from logitless.cli.names import printable
from logitless.cli.plots import colour, figures
from logitless.cli.tables import number, size

_CONTEXT_TOKENS = 30
_DARKEST = 0.85
_LEGEND_STEPS = (1 / 9, 1 / 3, 1, 3, 9)


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
        colours=[colour(index) for index in range(len(names))],
        worst=[_spans(pair, comparison) for pair in comparison.pairs],
        plotly=get_plotlyjs(),
    )
    file.write(page.encode())


def _spans(pair: Pair, comparison: Comparison) -> dict[str, Any]:
    half = half_shade(pair)
    steps = [half * factor for factor in _LEGEND_STEPS] if half else []
    return {
        "legend": [{"kl": kl, "shade": f"{shade(kl, half):.3f}"} for kl in steps],
        "spans": [_span(worst, pair, comparison, half) for worst in pair.worst],
    }


def _span(worst: WorstToken, pair: Pair, comparison: Comparison, half: float) -> dict[str, Any]:
    columns, text = pair.per_text[worst.text], comparison.plan.texts[worst.text]
    first = max(0, worst.row - _CONTEXT_TOKENS)
    last = min(text.scored_tokens, worst.row + _CONTEXT_TOKENS // 2)
    tokens = [
        {
            # What completes a character shows it; the tokens before, which are bytes of it, show their codes.
            "text": _visible(text.pieces[row + 1]) or comparison.token_names[text.ids[row + 1]],
            "is_bytes": text.pieces[row + 1] == "",
            "kl": float(columns["kl"][row]),
            "nll_base": float(columns["nll_base"][row]),
            "nll_candidate": float(columns["nll_candidate"][row]),
            "shade": f"{shade(float(columns['kl'][row]), half):.3f}",
            "worst": row == worst.row,
        }
        for row in range(first, last)
    ]
    return {
        "text": printable(text.text.name),
        "position": int(columns["position"][worst.row]),
        "base_top": worst.base_top,
        "candidate_top": worst.candidate_top,
        "kl": float(columns["kl"][worst.row]),
        "nll_base": float(columns["nll_base"][worst.row]),
        "nll_candidate": float(columns["nll_candidate"][worst.row]),
        "tokens": tokens,
    }


def half_shade(pair: Pair) -> float:
    """Return the KL that gets half of the darkest shade: what a tenth of this candidate's moved tokens exceed."""
    kl = pair.overall["kl"]
    moved = kl[(kl > 0) & np.isfinite(kl)]
    return float(np.quantile(moved, 0.9)) if len(moved) else 0.0


def shade(kl: float, half: float) -> float:
    """Return an opacity that grows with KL and is half of its most at `half`."""
    if kl == 0:
        return 0.0
    return _DARKEST if math.isinf(kl) else _DARKEST * kl / (kl + half)


def _visible(piece: str) -> str:
    """Show control characters, which a page drops, by their pictures; tabs and line ends keep their meaning."""
    return "".join(chr(0x2400 + ord(one)) if ord(one) < 32 and one not in "\t\n\r" else one for one in piece)
