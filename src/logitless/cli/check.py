"""`logitless check`: the identities between the measures, and the accuracy of each on this machine."""

import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import torch
from rich.console import Console
from rich.table import Table

from logitless._verify.accuracy import Accuracy, accuracy_steps, row_backend
from logitless._verify.identities import Identity, identity_steps
from logitless._verify.truth import BITS
from logitless.cli.outputs import Outputs
from logitless.cli.progress import Steps

SCHEMA = 1


def check_command(json_path: Path | None = None) -> None:
    """Print both tables and write them to `json_path`; exit 1 if one row of one table fails."""
    outputs = Outputs({"--json": json_path})
    steps = Steps()
    identities: list[Identity] = []
    accuracies: list[Accuracy] = []
    work: list[tuple[str, Callable[[], Identity | list[Accuracy]]]] = [*identity_steps(), *accuracy_steps()]
    for _, run in steps.track(work, f"checking against {BITS}-bit arithmetic", len(work)):
        found = run()
        if isinstance(found, Identity):
            identities.append(found)
        else:
            accuracies.extend(found)
    accuracies = _by_measure(accuracies)
    console = Console(file=outputs.table_stream)
    console.print(_identity_table(identities))
    console.print(_accuracy_table(accuracies))
    failed = [row.name for row in identities if not row.passed]
    failed += [f"{row.measure} in {row.dtype}, worst on {row.family}" for row in accuracies if not row.passed]
    total = len(identities) + len(accuracies)
    for name in failed:
        console.print(f"failed: {name}", markup=False, highlight=False)
    console.print(f"{total - len(failed)} of {total} checks passed", highlight=False)
    report = json.dumps(_report(identities, accuracies), indent=1) + "\n"
    outputs.write("--json", lambda file: file.write(report.encode()))
    outputs.finish()
    if failed:
        raise SystemExit(1)


def _by_measure(rows: list[Accuracy]) -> list[Accuracy]:
    """Bring the dtypes of each measure together; measures and dtypes stay in the order in which they ran."""
    first = {row.measure: index for index, row in reversed(list(enumerate(rows)))}
    return sorted(rows, key=lambda row: first[row.measure])


def _identity_table(rows: list[Identity]) -> Table:
    table = Table(title="Identities, in float64 on random and adversarial rows")
    for name in ("identity", "rows", "worst residual", "allowed there", ""):
        table.add_column(name, justify="left" if name in ("identity", "") else "right")
    for row in rows:
        table.add_row(row.name, str(row.rows), f"{row.residual:.1e}", f"{row.allowed:.1e}", _verdict(row.passed))
    return table


def _accuracy_table(rows: list[Accuracy]) -> Table:
    table = Table(
        title="Accuracy: worst error over all rows, in ulp of the dtype that the answer comes in",
        caption=f"Rows of logits ran on the backend {row_backend(torch.float32)!r}. "
        "lost: rows on which torch's formula is NaN, or infinite where the truth is not. "
        "bound: what rounding allows that row. used: the largest share of its own bound that any row takes.",
        caption_justify="left",
    )
    for name in ("measure", "dtype", "rows", "logitless", "torch's formula", "bound", "used", ""):
        table.add_column(name, justify="left" if name in ("measure", "dtype", "") else "right")
    for row in rows:
        table.add_row(
            row.measure,
            row.dtype,
            str(row.rows),
            _ulps(row.ours),
            _ulps(row.theirs) + (f" + {row.theirs_lost} lost" if row.theirs_lost else ""),
            _ulps(row.bound),
            f"{row.used:.0%}",
            _verdict(row.passed),
        )
    return table


def _verdict(passed: bool) -> str:
    return "[green]pass[/green]" if passed else "[bold red]FAIL[/bold red]"


def _ulps(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 1000 else f"{value:.1e}"


def _report(identities: list[Identity], accuracies: list[Accuracy]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "command": "check",
        "made_by": {
            "torch": torch.__version__,
            "mpmath": mpmath.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "truth_bits": BITS,
            "row_backend": row_backend(torch.float32),
        },
        "passed": all(row.passed for row in identities) and all(row.passed for row in accuracies),
        "identities": [
            {
                "identity": row.name,
                "rows": row.rows,
                "worst_residual": _number(row.residual),
                "allowed": _number(row.allowed),
                "passed": row.passed,
            }
            for row in identities
        ],
        "accuracy": [
            {
                "measure": row.measure,
                "dtype": row.dtype,
                "rows": row.rows,
                "worst_ulp": _number(row.ours),
                "worst_ulp_torch_formula": _number(row.theirs),
                "rows_lost_by_torch_formula": row.theirs_lost,
                "bound_ulp": _number(row.bound),
                "worst_family": row.family,
                "passed": row.passed,
            }
            for row in accuracies
        ],
    }


def _number(value: float) -> float | None:
    """JSON has no infinity and no NaN; None says that the value is not finite."""
    return value if math.isfinite(value) else None
