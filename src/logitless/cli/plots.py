"""The report's figures, as plotly draws them."""

import json
from typing import Any

import numpy as np
import plotly.graph_objects as go

from logitless.cli.comparison import Comparison, Pair

COLOURS = ("#3b82d6", "#e0762f", "#3f9d6b", "#a05fc4")
_MOST_POINTS = 4000  # a scatter of more is slow to open and no clearer


def figures(comparison: Comparison, names: list[str]) -> list[dict[str, Any]]:
    """Return each figure with its title and caption; colours that depend on light or dark are left to the page."""
    drawn = [
        (
            "How far each token's prediction moved",
            "Distribution over tokens of KL(base ‖ candidate), in nats, on a logarithmic axis.",
            _kl_distribution(comparison.pairs, names),
        ),
        (
            "The cost of each token, before and after",
            "Negative log-likelihood of each scored token, in nats; above the diagonal the candidate does worse.",
            _nll_scatter(comparison.pairs, names),
        ),
        (
            "Where the base is sure, and where it is not",
            "Mean KL over tokens by the entropy of the base's prediction; each point is an equal share of the tokens.",
            _kl_by_entropy(comparison.pairs, names),
        ),
    ]
    if len(comparison.plan.texts) > 1:
        texts = [text.text.name for text in comparison.plan.texts]
        caption = "Mean KL(base ‖ candidate) of each text, in nats."
        drawn.append(("Text by text", caption, _per_text(texts, comparison.pairs, names)))
    return [
        {"title": title, "caption": caption, "figure": json.loads(figure.to_json())} for title, caption, figure in drawn
    ]


def _figure(x_title: str, y_title: str, **layout: Any) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="none",
        margin={"l": 64, "r": 16, "t": 16, "b": 56},
        height=360,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        xaxis={"title": {"text": x_title}, "zeroline": False},
        yaxis={"title": {"text": y_title}, "zeroline": False},
        **layout,
    )
    return figure


def _kl_distribution(pairs: list[Pair], names: list[str]) -> go.Figure:
    figure = _figure("KL (nats)", "share of tokens", barmode="overlay")
    positive = [pair.overall["kl"][(pair.overall["kl"] > 0) & np.isfinite(pair.overall["kl"])] for pair in pairs]
    logs = [np.log10(values) for values in positive]
    if not any(len(values) for values in logs):
        figure.add_annotation(text="every token's KL is exactly 0", showarrow=False)
        return figure
    lowest = int(np.floor(min(values.min() for values in logs if len(values))))
    highest = int(np.ceil(max(values.max() for values in logs if len(values)))) or 1
    edges = np.linspace(lowest, highest, 10 * (highest - lowest) + 1)
    for pair, name, values, colour in zip(pairs, names, logs, COLOURS, strict=False):
        counts, _ = np.histogram(values, edges)
        figure.add_bar(
            x=((edges[1:] + edges[:-1]) / 2).tolist(),
            y=(counts / len(pair.overall["kl"])).tolist(),
            width=0.1,
            name=name,
            marker={"color": colour, "opacity": 0.65},
            hovertemplate="about 10^%{x:.2f} nats: %{y:.2%} of tokens",
        )
    ticks = list(range(lowest, highest + 1))
    figure.update_xaxes(tickvals=ticks, ticktext=[f"10<sup>{tick}</sup>" if tick else "1" for tick in ticks])
    figure.update_yaxes(tickformat=".0%")
    return figure


def _nll_scatter(pairs: list[Pair], names: list[str]) -> go.Figure:
    figure = _figure("NLL of the base (nats)", "NLL of the candidate (nats)")
    highest = 0.0
    for pair, name, colour in zip(pairs, names, COLOURS, strict=False):
        count = len(pair.overall["kl"])
        chosen = np.linspace(0, count - 1, min(count, _MOST_POINTS)).astype(int)
        base, candidate = pair.overall["nll_base"][chosen], pair.overall["nll_candidate"][chosen]
        highest = max(highest, float(base.max()), float(candidate.max()))
        figure.add_scatter(
            x=base.tolist(),
            y=candidate.tolist(),
            mode="markers",
            name=name,
            marker={"color": colour, "size": 4, "opacity": 0.5},
            hovertemplate="base %{x:.3f}, candidate %{y:.3f}",
        )
    figure.add_shape(type="line", x0=0, y0=0, x1=highest, y1=highest, line={"color": "#888", "width": 1, "dash": "dot"})
    return figure


def _kl_by_entropy(pairs: list[Pair], names: list[str]) -> go.Figure:
    figure = _figure("entropy of the base's prediction (nats)", "mean KL (nats)")
    for pair, name, colour in zip(pairs, names, COLOURS, strict=False):
        entropy, kl = pair.overall["entropy_base"], pair.overall["kl"]
        parts = np.array_split(np.argsort(entropy, kind="stable"), min(8, len(entropy)))
        figure.add_scatter(
            x=[float(np.median(entropy[part])) for part in parts],
            y=[float(kl[part].mean()) for part in parts],
            mode="lines+markers",
            name=name,
            marker={"color": colour, "size": 8},
            hovertemplate="entropy about %{x:.2f}: mean KL %{y:.3g}",
        )
    return _logarithmic(figure)


def _per_text(texts: list[str], pairs: list[Pair], names: list[str]) -> go.Figure:
    figure = _figure("", "mean KL (nats)")
    for pair, name, colour in zip(pairs, names, COLOURS, strict=False):
        means = [float(columns["kl"].mean()) for columns in pair.per_text]
        marker = {"color": colour, "size": 12}
        figure.add_scatter(x=texts, y=means, mode="markers", name=name, marker=marker)
    figure.update_xaxes(type="category")
    return _logarithmic(figure)


def _logarithmic(figure: go.Figure) -> go.Figure:
    """Give the measure a logarithmic axis: candidates may lie orders of magnitude apart."""
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    return figure
