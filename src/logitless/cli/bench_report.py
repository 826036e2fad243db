"""The HTML page of `logitless bench`: a plot and a table for each section, in one file that loads nothing."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any, BinaryIO

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from logitless._bench.protocol import Row, sizes
from logitless._bench.suite import SECTIONS

_COLOURS = ("#e0762f", "#3b82d6", "#3f9d6b", "#a05fc4", "#8a8f98", "#c4a62f", "#4fb3bf", "#b0566f")
_ROW_PIXELS = 22


def write_report(rows: Sequence[Row], notes: Sequence[str], file: BinaryIO) -> None:
    """Write the page; every text in it is escaped, and its content policy forbids it to load anything."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    source = importlib.resources.files("logitless.cli").joinpath("bench.html.jinja").read_text("utf-8")
    groups = [(section, list(group)) for section, group in groupby(rows, key=lambda row: row.section)]
    page = environment.from_string(source).render(
        sections=[{"title": SECTIONS[section], "rows": group} for section, group in groups],
        figures=[json.loads(_timings(group).to_json()) for _, group in groups],
        first=rows[0],
        notes=notes,
        sizes=sizes,
        plotly=get_plotlyjs(),
    )
    file.write(page.encode())


def _timings(rows: Sequence[Row]) -> go.Figure:
    """Draw each provider's medians, the fastest and slowest round as an error bar, on a logarithmic axis."""
    figure = go.Figure()
    for provider, colour in zip(dict.fromkeys(row.provider for row in rows), _COLOURS, strict=False):
        mine = [row for row in rows if row.provider == provider]
        figure.add_bar(
            name=provider,
            orientation="h",
            y=[_label(row) for row in mine],
            x=[row.median_ms for row in mine],
            error_x={
                "array": [row.high_ms - row.median_ms for row in mine],
                "arrayminus": [row.median_ms - row.low_ms for row in mine],
                "thickness": 1,
                "width": 2,
            },
            marker={"color": colour},
            hovertemplate="%{x:.4g} ms",
        )
    layout: dict[str, Any] = {
        "template": "none",
        "barmode": "group",
        "height": 140 + _ROW_PIXELS * len(rows),
        "margin": {"l": 16, "r": 16, "t": 16, "b": 56},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        "xaxis": {"type": "log", "title": {"text": "milliseconds, median"}, "zeroline": False},
        "yaxis": {"autorange": "reversed", "automargin": True},
    }
    figure.update_layout(layout)
    return figure


def _label(row: Row) -> str:
    return f"{row.what}<br>{sizes(row.shape)} {row.dtype}, {row.mode}"
