"""`logitless score`: one row for each token of the user's texts, and the summary."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from logitless.cli.comparison import facts_of
from logitless.cli.errors import InputError
from logitless.cli.measure import ReadingPlan, all_texts, make_plan, read_hidden, score_rows
from logitless.cli.memory import MemoryMeter
from logitless.cli.models import check_model, load_model, parse_model_name
from logitless.cli.outputs import check_distinct, staged
from logitless.cli.progress import Steps
from logitless.cli.results import (
    SCHEMA_VERSION,
    made_by,
    memory_results,
    model_results,
    plan_results,
    strict,
    write_json,
)
from logitless.cli.statistics import Columns, model_summary
from logitless.cli.tables import print_score
from logitless.cli.text import bos_rule, read_texts

_MEASURES = ("nll", "entropy", "rank", "lse")


def run_score(
    model_name: str,
    text_paths: list[Path],
    out: Path | None,
    json_path: Path | None,
    max_tokens: int | None,
    window: int,
) -> None:
    """Score the texts, print the summary, and write the rows and numbers asked for."""
    if out is not None and out.suffix not in (".parquet", ".jsonl"):
        raise InputError(f"--out {out}: the rows go to a .parquet or a .jsonl file")
    texts = read_texts(text_paths)
    name = parse_model_name(model_name)
    check_distinct(out, json_path)
    steps = Steps()
    with staged(out) as rows_file, staged(json_path) as json_file:
        with steps.step(f"loading {name.label}"):
            model = load_model(name)
        plan = make_plan(model, bos_rule(model.tokenizer), texts, window, max_tokens)
        steps.note(f"{plan.scored_tokens} tokens to score; beginning-of-text token: {plan.bos.description}")
        check_model(model, plan.sample)
        hidden = read_hidden(model, plan, steps)
        with MemoryMeter() as meter:
            per_text = score_rows(model.head, hidden, plan, f"scoring with {name.label}", steps)
            memory = meter.use()
        if any(np.isnan(columns["nll"]).any() for columns in per_text):
            raise InputError(f"{name.label} gives NaN for some tokens: its states are not finite")
        overall = all_texts(per_text)
        sizes = [text.scored_bytes for text in plan.texts]
        results = {
            "schema": {"name": "logitless.score", "version": SCHEMA_VERSION},
            "made_by": made_by(),
            "plan": plan_results(plan),
            "model": model_results(facts_of(model)),
            "overall": model_summary(overall["nll"], overall["entropy"], sum(sizes)),
            "texts": [
                model_summary(columns["nll"], columns["entropy"], size)
                for columns, size in zip(per_text, sizes, strict=True)
            ],
            "memory": memory_results(memory, 4 * plan.scored_tokens * model.head.rows),
        }
        if out is not None:
            write_rows(rows_table(plan, per_text), rows_file, out.suffix)
        if json_path is not None:
            write_json(results, json_file)
        print_score(results)


def rows_table(plan: ReadingPlan, per_text: Sequence[Columns]) -> pyarrow.Table:
    """Return the rows of all texts: where a token is, which it is, what it says, and its measures in nats."""
    tables = []
    for text, columns in zip(plan.texts, per_text, strict=True):
        count = len(columns["token"])
        fields: dict[str, Any] = {
            "file": pyarrow.array([text.text.name] * count, pyarrow.string()),
            "window": pyarrow.array(columns["window"], pyarrow.int32()),
            "position": pyarrow.array(columns["position"], pyarrow.int32()),
            "token_id": pyarrow.array(columns["token"], pyarrow.int32()),
            "token": pyarrow.array(text.pieces[1:], pyarrow.string()),
        }
        for name in _MEASURES:
            kind = pyarrow.int32() if name == "rank" else pyarrow.float64()
            fields[name] = pyarrow.array(columns[name], kind)
        tables.append(pyarrow.table(fields))
    return pyarrow.concat_tables(tables)


def write_rows(table: pyarrow.Table, path: Path, suffix: str) -> None:
    """Write the rows as Parquet, or as one JSON object a line."""
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
        return
    with path.open("w", encoding="utf-8") as file:
        for batch in table.to_batches():
            for row in batch.to_pylist():
                file.write(json.dumps(strict(row), ensure_ascii=False, allow_nan=False) + "\n")
