"""`logitless bench`: side by side with torch, torch.compile and optax on this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table

from logitless._bench import suite
from logitless._bench.passes import MOVES
from logitless._bench.protocol import Case, GateError, Row, gate, ratios, shares, sizes
from logitless.cli.bench_report import write_report
from logitless.cli.errors import InputError
from logitless.cli.outputs import Outputs
from logitless.cli.progress import Steps

SCHEMA = 1
_PIPED_WIDTH = 150
_QUIET = 0.05


def run_bench(
    json_path: Path | None,
    html_path: Path | None,
    *,
    rounds: int,
    quick: bool,
    only: str | None,
    without: str | None = None,
    threads: int | None,
) -> None:
    """Check every case, time it, print the medians and ratios, and write the files asked for."""
    chosen = [_contested(case, without) for case in _chosen(only, quick)]
    outputs = Outputs({"--json": json_path, "--html": html_path})
    torch.set_num_threads(threads or torch.get_num_threads())
    steps, notes = Steps(), list[str]()

    def note(message: str) -> None:
        notes.append(message)
        steps.note(message)

    rows: list[Row] = []
    try:
        errors = {
            case.name: gate(case)
            for case in steps.track(chosen, "values and gradients against float64, before any timing", len(chosen))
        }
        for index, case in enumerate(chosen, 1):
            with steps.step(f"[{index}/{len(chosen)}] {case.name}"):
                rows += suite.run(case, rounds, errors[case.name], note, quick=quick)
    except GateError as error:
        steps.note(f"nothing is written: {error}")
        raise SystemExit(1) from None
    _print(rows, notes, outputs.table_stream)
    report = json.dumps(_report(rows, notes, quick), indent=1) + "\n"
    outputs.write("--json", lambda file: file.write(report.encode()))
    outputs.write("--html", lambda file: write_report(rows, notes, file))
    outputs.finish()


def _chosen(only: str | None, quick: bool) -> list[Case]:
    everything = list(suite.cases(quick=quick))
    if only is None:
        return everything
    pattern = _expression("--only", only)
    chosen = [case for case in everything if pattern.search(case.name)]
    if not chosen:
        sections = ", ".join(dict.fromkeys(case.section for case in everything))
        raise InputError(
            f"--only {only!r} fits none of the {len(everything)} cases; one is named {everything[0].name!r}, and "
            f"sections are {sections}"
        )
    return chosen


def _contested(case: Case, without: str | None) -> Case:
    """Return the case without the peers that are not asked for."""
    if without is None:
        return case
    pattern = _expression("--without", without)
    kept = [provider for provider in case.providers if provider.kind != "peer" or not pattern.search(provider.name)]
    return replace(case, providers=kept)


def _expression(option: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise InputError(f"{option} {text!r} is not a regular expression: {error}") from None


def _report(rows: Sequence[Row], notes: Sequence[str], quick: bool) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "command": "bench",
        "quick": quick,
        "rows": [row.as_json() for row in rows],
        "left_out": list(notes),
        "ratios": [
            {
                "section": ratio.section,
                "what": ratio.what,
                "mode": ratio.mode,
                "ours": ratio.ours,
                "peer": ratio.peer,
                "geometric_mean": ratio.mean,
                "least": ratio.least,
                "least_at": ratio.least_at,
                "cases": ratio.cases,
                "at_limit": ratio.at_limit,
            }
            for ratio in ratios(rows)
        ],
        "shares_of_limit": [
            {**_case(share.row), "ours": share.row.provider, "limit": share.limit.provider, "share": share.share}
            for share in shares(rows)
        ],
    }


def _case(row: Row) -> dict[str, Any]:
    return {"section": row.section, "what": row.what, "mode": row.mode, "shape": row.shape, "dtype": row.dtype}


def _print(rows: Sequence[Row], notes: Sequence[str], stream: TextIO) -> None:
    console = Console(file=stream)
    if not console.is_terminal:
        console = Console(file=stream, width=_PIPED_WIDTH)
    first = rows[0]
    facts = [f"{name} {value}" for name, value in {**first.machine, **first.versions}.items()]
    console.print(f"{', '.join(facts)}; {first.threads} threads", highlight=False, markup=False)
    for section, group in groupby(rows, key=lambda row: row.section):
        console.print(_timing_table(suite.SECTIONS[section], list(group)))
    console.print(_ratio_table(rows))
    for share in shares(rows):
        limit, row = share.limit, share.row
        moved = MOVES.get(limit.provider, 0) * row.shape[0] * row.shape[-1] * getattr(torch, row.dtype).itemsize
        rate = f" at {moved / limit.median_ms / 1e6:.1f} GB/s" if moved else ""
        console.print(
            f"{row.what} {sizes(row.shape)} {row.dtype}, {row.mode}: {row.provider} takes {1 / share.share:.2f} times "
            f"as long as {limit.provider}{rate}: {share.share:.0%} of the limit",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    for note in [*notes, *_disturbance(rows)]:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _disturbance(rows: Sequence[Row]) -> list[str]:
    """Say how many rows were timed while others used the machine: threads that wait for one another suffer most."""
    shares = [row.busy_elsewhere for row in rows if row.busy_elsewhere is not None]
    disturbed = [share for share in shares if share > _QUIET]
    if not disturbed:
        return []
    return [
        f"{len(disturbed)} of {len(shares)} rows were timed while other processes took more than {_QUIET:.0%} of the "
        f"processors (at most {max(disturbed):.0%}): run it again on a quiet machine"
    ]


def _timing_table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("case, provider")
    measured: list[tuple[str, Callable[[Row], str], bool]] = [
        ("extra MB", lambda row: _megabytes(row.extra_bytes), any(row.extra_bytes is not None for row in rows)),
        (
            "gradient error",
            lambda row: "" if row.gradient_error is None else f"{row.gradient_error:.1e}",
            any(row.gradient_error is not None for row in rows),
        ),
    ]
    shown = [(name, text) for name, text, present in measured if present]
    for name in ("median ms", "fastest", "slowest", "runs", "times ours", *(name for name, _ in shown)):
        table.add_column(name, justify="right", no_wrap=True)
    for _, group in groupby(rows, key=lambda row: row.case):
        case = list(group)
        ours = next(row for row in case if row.kind == "ours")
        table.add_row(f"[bold]{ours.what} {sizes(ours.shape)} {ours.dtype}, {ours.mode}[/bold]")
        for row in case:
            table.add_row(
                f"  {row.provider}",
                f"{row.median_ms:.3f}",
                f"{row.low_ms:.3f}",
                f"{row.high_ms:.3f}",
                str(row.runs),
                f"{row.median_ms / ours.median_ms:.2f}",
                *(text(row) for _, text in shown),
                end_section=row is case[-1],
            )
    return table


def _ratio_table(rows: Sequence[Row]) -> Table:
    table = Table(title="How many times faster than a peer: medians of the same rounds", title_justify="left")
    for name in ("what", "mode", "provider", "against"):
        table.add_column(name)
    for name in ("geometric mean", "at the limit", "least", "at", "cases"):
        table.add_column(name, justify="right")
    for ratio in ratios(rows):
        table.add_row(
            f"{ratio.section}: {ratio.what}",
            ratio.mode,
            ratio.ours,
            ratio.peer,
            f"{ratio.mean:.2f}",
            "" if ratio.at_limit is None else f"{ratio.at_limit:.2f}",
            f"{ratio.least:.2f}",
            ratio.least_at,
            str(ratio.cases),
        )
    return table


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"
