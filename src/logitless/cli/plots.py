"""The report's figures, as plotly draws them."""

import html
import json
import math
import os.path
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from logitless.cli.comparison import Comparison, Pair
from logitless.cli.names import printable

# Eight colours that stay apart for most kinds of colour vision, in light and dark; a symbol of its own for each.
COLOURS = ("#3b82d6", "#e0762f", "#3f9d6b", "#a05fc4", "#c9a227", "#4fb3bf", "#c2487f", "#8a8f98")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
_DASHES = ("solid", "dash", "dot", "dashdot")
_MOST_POINTS = 4000  # a scatter of more is slow to open and no clearer
_MOST_TEXTS = 30
_LABEL_CHARACTERS = 22  # the page shortens labels further where a plot is narrow
_NARROWEST = 2.5  # a logarithmic axis spans at least this factor to either side of the middle, so that it has two ticks
_PART_TICKS = (1, 2, 5)


@dataclass(frozen=True)
class _Series:
    """A candidate as it is drawn: its place in the page's legend, its rows, its name escaped for plotly, its looks."""

    index: int
    pair: Pair
    name: str

    @property
    def marker(self) -> dict[str, Any]:
        return {"color": colour(self.index), "symbol": _SYMBOLS[self.index % len(_SYMBOLS)]}

    @property
    def common(self) -> dict[str, Any]:
        line = {"color": colour(self.index), "width": 2, "dash": _DASHES[self.index // len(COLOURS) % len(_DASHES)]}
        return {"name": self.name, "meta": self.index, "line": line}


def colour(index: int) -> str:
    """Return the colour of a candidate by its number."""
    return COLOURS[index % len(COLOURS)]


def figures(comparison: Comparison, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return each figure with its title and caption; colours that depend on light or dark are left to the page."""
    series = [
        _Series(index, pair, plotly_text(name))
        for index, (pair, name) in enumerate(zip(comparison.pairs, names, strict=True))
    ]
    drawn = [
        (
            "How far each token's prediction moved",
            "Distribution over tokens of KL(base ‖ candidate), in nats, on a logarithmic axis.",
            _kl_distribution(series),
        ),
        (
            "The cost of each token, before and after",
            "Negative log-likelihood of each scored token, in nats; above the diagonal the candidate does worse.",
            _nll_scatter(series),
        ),
        (
            "Where the base is sure, and where it is not",
            "Mean KL over tokens by the entropy of the base's prediction; each point is an equal share of the tokens.",
            _kl_by_entropy(series),
        ),
    ]
    texts = [printable(text.text.name) for text in comparison.plan.texts]
    if len(texts) > 1:
        caption = "Mean KL(base ‖ candidate) of each text, in nats."
        if len(texts) > _MOST_TEXTS:
            caption += f" The {_MOST_TEXTS} texts of largest KL, of {len(texts)}."
        drawn.append(("Text by text", caption, _per_text(texts, series)))
    return [
        {"title": title, "caption": caption, "figure": json.loads(figure.to_json())} for title, caption, figure in drawn
    ]


def plotly_text(name: str) -> str:
    """Return a name that plotly, which reads tags and entities in its texts, shows as it is."""
    return html.escape(name, quote=False)


def short_labels(names: Sequence[str], most: int = _LABEL_CHARACTERS) -> list[str]:
    """Return names of at most `most` characters: without the folder that all are in, and cut where they still differ.

    >>> short_labels(["data/a.txt", "data/" + "b" * 40 + ".txt"], 12)
    ['a.txt', 'bbbbb…bb.txt']
    >>> short_labels(["chapter-1-of-the-book", "chapter-2-of-the-book"], 12)
    ['chapter-1-o…', 'chapter-2-o…']
    """
    folders = [os.path.dirname(name) for name in names]
    folder = os.path.commonpath(folders) if len(names) > 1 and all(folders) else ""
    inside = [os.path.relpath(name, folder) if folder else name for name in names]
    cuts: list[Callable[[str], str]] = [
        lambda name: f"{name[: (most - 1) // 2]}…{name[len(name) - most // 2 :]}",
        lambda name: f"{name[: most - 1]}…",
        lambda name: f"…{name[len(name) - most + 1 :]}",
    ]
    tries = [[name if len(name) <= most else cut(name) for name in inside] for cut in cuts]
    return max(tries, key=lambda labels: len(set(labels)))


def log_axis(values: Sequence[float]) -> dict[str, Any]:
    """Return a logarithmic axis around positive values, with two to seven ticks wherever and however close they are."""
    lowest, highest = math.log10(min(values)), math.log10(max(values))
    middle, half = (lowest + highest) / 2, max((highest - lowest) / 2 * 1.08, math.log10(_NARROWEST))
    lowest, highest = middle - half, middle + half
    first, last = math.ceil(lowest), math.floor(highest)
    if last - first >= 2:
        exponents = range(first, last + 1, -(-(last - first + 1) // 7))
        ticks = [(1, exponent) for exponent in exponents]
    else:
        ticks = [
            (part, exponent)
            for exponent in range(first - 1, last + 1)
            for part in _PART_TICKS
            if lowest <= exponent + math.log10(part) <= highest
        ]
    return {
        "type": "log",
        "range": [lowest, highest],
        "tickmode": "array",
        "tickvals": [part * 10.0**exponent for part, exponent in ticks],
        "ticktext": [_tick(part, exponent) for part, exponent in ticks],
    }


def _tick(part: int, exponent: int) -> str:
    if -4 < exponent < 4:
        return f"{part * 10.0**exponent:g}"
    power = f"10<sup>{exponent}</sup>".replace("-", "−")
    return power if part == 1 else f"{part}·{power}"


def _figure(x_title: str, y_title: str, **layout: Any) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="none",
        margin={"l": 56, "r": 16, "t": 16, "b": 52},
        height=340,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,  # the page has one legend for all plots
        dragmode=False,  # a finger that scrolls the page zooms nothing
        hovermode="closest",
        xaxis={"title": {"text": x_title}, "zeroline": False},
        yaxis={"title": {"text": y_title}, "zeroline": False},
        **layout,
    )
    return figure


def _logarithmic(figure: go.Figure, axis: str, values: Sequence[float]) -> go.Figure:
    """Give `axis` the ticks of these values, since candidates may lie orders of magnitude apart, or say all are 0."""
    positive = [value for value in values if 0 < value < math.inf]
    if positive:
        figure.update_layout({axis: log_axis(positive)})
    else:
        figure.add_annotation(
            text="every token's KL is exactly 0", showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5
        )
        figure.update_layout({axis: {"showticklabels": False}})
    return figure


def _kl_distribution(series: Sequence[_Series]) -> go.Figure:
    figure = _figure("KL (nats)", "share of tokens")
    kept = [one.pair.overall["kl"][_positive(one.pair.overall["kl"])] for one in series]
    everything = np.concatenate(kept)
    if not len(everything):
        return _logarithmic(figure, "xaxis", [])
    low, high = np.log10(everything.min()), np.log10(everything.max())
    if high - low < 0.1:
        low, high = low - 0.05, high + 0.05
    edges = np.linspace(low, high, int(np.clip(10 * (high - low), 20, 120)) + 1)
    width = edges[1] - edges[0]
    centres = 10 ** np.concatenate([[edges[0] - width / 2], (edges[1:] + edges[:-1]) / 2, [edges[-1] + width / 2]])
    for one, values in zip(series, kept, strict=True):
        counts, _ = np.histogram(np.log10(values), edges)
        share = np.concatenate([[0], counts, [0]]) / len(one.pair.overall["kl"])
        figure.add_scatter(
            x=centres.tolist(),
            y=share.tolist(),
            mode="lines",
            **({"fill": "tozeroy"} if len(series) <= 2 else {}),
            hovertemplate="about %{x:.2g} nats: %{y:.2%} of tokens",
            **one.common,
        )
    _logarithmic(figure, "xaxis", [float(centres[0]), float(centres[-1])])
    figure.update_yaxes(tickformat=".0%" if max(figure.data[0].y) > 0.02 else ".1%", rangemode="tozero")
    return figure


def _nll_scatter(series: Sequence[_Series]) -> go.Figure:
    figure = _figure("NLL of the base (nats)", "NLL of the candidate (nats)")
    highest = 0.0
    for one in series:
        columns = one.pair.overall
        count = len(columns["kl"])
        chosen = np.linspace(0, count - 1, min(count, _MOST_POINTS // len(series))).astype(int)
        base, candidate = columns["nll_base"][chosen], columns["nll_candidate"][chosen]
        highest = max(highest, float(base.max()), float(candidate.max()))
        figure.add_scatter(
            x=base.tolist(),
            y=candidate.tolist(),
            mode="markers",
            marker={**one.marker, "size": 4, "opacity": 0.5},
            hovertemplate="base %{x:.3f}, candidate %{y:.3f}",
            **one.common,
        )
    figure.add_shape(type="line", x0=0, y0=0, x1=highest, y1=highest, line={"color": "#888", "width": 1, "dash": "dot"})
    return figure


def _kl_by_entropy(series: Sequence[_Series]) -> go.Figure:
    figure = _figure("entropy of the base's prediction (nats)", "mean KL (nats)")
    drawn = []
    for one in series:
        entropy, kl = one.pair.overall["entropy_base"], one.pair.overall["kl"]
        parts = np.array_split(np.argsort(entropy, kind="stable"), min(8, len(entropy)))
        means = [float(kl[part].mean()) for part in parts]
        drawn += means
        figure.add_scatter(
            x=[float(np.median(entropy[part])) for part in parts],
            y=means,
            mode="lines+markers",
            marker={**one.marker, "size": 8},
            hovertemplate="entropy about %{x:.2f}: mean KL %{y:.3g}",
            **one.common,
        )
    return _logarithmic(figure, "yaxis", drawn)


def _per_text(texts: Sequence[str], series: Sequence[_Series]) -> go.Figure:
    means = [[float(columns["kl"].mean()) for columns in one.pair.per_text] for one in series]
    largest = np.max(np.array(means), axis=0)
    shown = sorted(np.argsort(-largest, kind="stable")[:_MOST_TEXTS].tolist())
    figure = _figure("mean KL (nats)", "")
    for one, values in zip(series, means, strict=True):
        figure.add_scatter(
            x=[values[index] for index in shown],
            y=list(range(len(shown))),
            mode="markers",
            marker={**one.marker, "size": 10},
            text=[plotly_text(texts[index]) for index in shown],
            hovertemplate="%{text}<br>mean KL %{x:.3g}",
            **one.common,
        )
    labels = [plotly_text(label) for label in short_labels([texts[index] for index in shown])]
    figure.update_layout(
        height=110 + 30 * max(len(shown), 4),
        margin={"l": 16},
        yaxis={"tickvals": list(range(len(shown))), "ticktext": labels, "range": [len(shown) - 0.5, -0.5]},
    )
    return _logarithmic(figure, "xaxis", [value for values in means for value in values])


def _positive(values: Any) -> Any:
    return (values > 0) & np.isfinite(values)
