"""`logitless bench`: side by side with torch, torch.compile and optax on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from logitless import _bench

_SCHEMA = {"name": "logitless.bench", "version": 1}


def run_bench(out: Path | None, html: Path | None, rounds: int, quick: bool) -> None:
    """Time every case, print the ratios, and write the rows."""
    console = Console()
    dtypes = (torch.float32, torch.bfloat16)
    shapes = ((512, 32000), (8192, 1000)) if quick else _bench.LARGE_SHAPES
    cases = list(_bench.cross_entropy_cases(shapes, dtypes))
    cases += _bench.other_cases(
        *((512, 32000) if quick else (4096, 32000)), vectors=(2**17, 128) if quick else (2**20, 128)
    )
    small = list(_bench.cross_entropy_cases(_bench.SMALL_SHAPES, dtypes[:1]))
    rows: list[_bench.Row] = []
    rates = _bench.bandwidth()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("timing", total=2 * (len(cases) + len(small)))
        for case in [*cases, *small]:
            progress.update(task, description=f"{case.what} {case.shape[0]}x{case.shape[1]} {case.dtype}")
            _bench.check(case)
            for mode in ("forward", "forward+backward"):
                rows += _bench.measure(case, mode, rounds=rounds, min_seconds=0.02 if case in small else 0.0)
                progress.advance(task)
    _print(console, rows, rates)
    if out is not None:
        report = {"schema": _SCHEMA, "bandwidth_gb_s": rates, "rows": [_bench.as_json(row) for row in rows]}
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        console.print(f"rows in {out}")
    if html is not None:
        _plot(rows, html)
        console.print(f"plot in {html}")


def _print(console: Console, rows: Sequence[_bench.Row], rates: dict[str, float]) -> None:
    facts = rows[0].machine
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), f"threads {rows[0].threads}")
    console.print(", ".join(f"{name} {rate:.1f} GB/s" for name, rate in rates.items()))
    table = Table(title="median milliseconds, and how many times faster logitless is")
    for heading in ("what", "mode", "shape", "dtype", "logitless"):
        table.add_column(heading)
    others = list(dict.fromkeys(row.provider for row in rows if row.provider != "logitless"))
    for other in others:
        table.add_column(other, justify="right")
    cases = dict.fromkeys((row.what, row.mode, row.shape, row.dtype) for row in rows)
    for what, mode, shape, dtype in cases:
        group = {
            r.provider: r.median_ms for r in rows if (r.what, r.mode, r.shape, r.dtype) == (what, mode, shape, dtype)
        }
        ours = group["logitless"]
        cells = [f"{group[name]:.3f} ({group[name] / ours:.2f}x)" if name in group else "" for name in others]
        table.add_row(what, mode, f"{shape[0]}x{shape[1]}", dtype, f"{ours:.3f}", *cells)
    console.print(table)
    for (what, mode, provider), by_case in _bench.ratios(rows).items():
        if len(by_case) > 1:
            mean, least = _bench.geometric_mean(list(by_case.values())), min(by_case, key=lambda case: by_case[case])
            console.print(
                f"{what}, {mode}, against {provider}: {mean:.2f}x geometric mean, least {by_case[least]:.2f}x ({least})"
            )


def _plot(rows: Sequence[_bench.Row], html: Path) -> None:
    import plotly.graph_objects as plotly

    figure = plotly.Figure()
    for provider in dict.fromkeys(row.provider for row in rows):
        mine = [row for row in rows if row.provider == provider]
        labels = [f"{row.what} {row.mode}<br>{row.shape[0]}x{row.shape[1]} {row.dtype}" for row in mine]
        figure.add_bar(name=provider, x=labels, y=[row.median_ms for row in mine])
    figure.update_layout(barmode="group", yaxis={"type": "log", "title": "milliseconds, median"})
    html.write_text(figure.to_html(include_plotlyjs=True, full_html=True), encoding="utf-8")
