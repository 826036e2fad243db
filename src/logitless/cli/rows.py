"""The rows of `--out`: one for each scored token, of one model or of each candidate beside the base."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from logitless.cli.comparison import Comparison
from logitless.cli.errors import InputError
from logitless.cli.measure import ReadingPlan
from logitless.cli.names import printable
from logitless.cli.results import strict
from logitless.cli.statistics import Columns

Write = Callable[[pyarrow.Table, BinaryIO], None]

_SCORED = ("nll", "entropy", "rank", "lse")
_COMPARED = (
    "kl",
    "reverse_kl",
    "js",
    "cross_entropy",
    "nll_base",
    "nll_candidate",
    "entropy_base",
    "entropy_candidate",
    "same_top",
    "cosine",
)
_KINDS = {"rank": pyarrow.int32(), "same_top": pyarrow.bool_()}


def row_writer(path: Path | None) -> Write:
    """Return what writes rows in the format that the name's end asks for; JSON Lines to `-` or a device without one."""
    suffix = ".jsonl" if path is None else path.suffix.lower()
    if path is not None and suffix == "" and (str(path) == "-" or (path.exists() and not path.is_file())):
        suffix = ".jsonl"
    if suffix not in _WRITERS:
        raise InputError(f"--out {printable(path or '')}: the rows go to a .csv, a .parquet or a .jsonl file")
    return _WRITERS[suffix]


def score_table(plan: ReadingPlan, per_text: Sequence[Columns]) -> pyarrow.Table:
    """Return the rows of all texts: where a token is, which it is, what it says, and its measures in nats."""
    return _table(plan, per_text, _SCORED, {})


def comparison_table(comparison: Comparison, labels: Sequence[str]) -> pyarrow.Table:
    """Return the rows of all texts for each candidate, one candidate after another, named in a column of its own."""
    return pyarrow.concat_tables(
        _table(comparison.plan, pair.per_text, _COMPARED, {"candidate": label})
        for pair, label in zip(comparison.pairs, labels, strict=True)
    )


def _table(
    plan: ReadingPlan, per_text: Sequence[Columns], measures: Sequence[str], constants: dict[str, str]
) -> pyarrow.Table:
    tables = []
    for text, columns in zip(plan.texts, per_text, strict=True):
        count = len(columns["token"])
        fields: dict[str, Any] = {
            name: pyarrow.array([value] * count, pyarrow.string())
            for name, value in {**constants, "file": printable(text.text.name)}.items()
        }
        fields["window"] = pyarrow.array(columns["window"], pyarrow.int32())
        fields["position"] = pyarrow.array(columns["position"], pyarrow.int32())
        fields["token_id"] = pyarrow.array(columns["token"], pyarrow.int32())
        fields["token"] = pyarrow.array(text.pieces[1:], pyarrow.string())
        for name in measures:
            kind = _KINDS.get(name, pyarrow.float64())
            # Models of different widths have no cosine: their rows hold null.
            fields[name] = pyarrow.array(columns[name], kind) if name in columns else pyarrow.nulls(count, kind)
        tables.append(pyarrow.table(fields))
    return pyarrow.concat_tables(tables)


def _write_parquet(table: pyarrow.Table, file: BinaryIO) -> None:
    pyarrow.parquet.write_table(table, file)


def _write_json_lines(table: pyarrow.Table, file: BinaryIO) -> None:
    for batch in table.to_batches():
        for row in batch.to_pylist():
            file.write((json.dumps(strict(row), ensure_ascii=False, allow_nan=False) + "\n").encode())


def _write_csv(table: pyarrow.Table, file: BinaryIO) -> None:
    text = io.TextIOWrapper(file, "utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.column_names)
    for batch in table.to_batches():
        writer.writerows(row.values() for row in batch.to_pylist())
    text.flush()
    text.detach()


_WRITERS: dict[str, Write] = {
    ".jsonl": _write_json_lines,
    ".parquet": _write_parquet,
    ".csv": _write_csv,
}
