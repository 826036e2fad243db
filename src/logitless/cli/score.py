"""`logitless score`: one row for each token of the user's texts, and the summary."""

from functools import partial
from pathlib import Path

import numpy as np

from logitless.cli.comparison import facts_of
from logitless.cli.errors import InputError
from logitless.cli.measure import all_texts, make_plan, read_hidden, score_rows
from logitless.cli.memory import MemoryMeter
from logitless.cli.models import check_model, load_model, open_model, parse_model_name
from logitless.cli.outputs import Outputs, model_files
from logitless.cli.progress import Steps
from logitless.cli.results import (
    SCHEMA_VERSION,
    made_by,
    memory_results,
    model_results,
    plan_results,
    write_json,
)
from logitless.cli.rows import row_writer, score_table
from logitless.cli.statistics import model_summary
from logitless.cli.tables import print_score
from logitless.cli.text import read_texts


def run_score(
    model_name: str,
    text_paths: list[Path],
    out: Path | None,
    json_path: Path | None,
    max_tokens: int | None,
    window: int,
) -> None:
    """Score the texts, print the summary, and write the rows and numbers asked for."""
    write_rows = row_writer(out)
    name = parse_model_name(model_name)
    outputs = Outputs({"--out": out, "--json": json_path}, [*text_paths, *model_files(name.path)])
    texts = read_texts(text_paths)
    steps = Steps()
    source = open_model(name)
    plan = make_plan([source], texts, window, max_tokens)
    steps.note(f"{plan.scored_tokens} tokens to score; beginning-of-text token: {plan.bos.description}")
    for note in plan.notes:
        steps.note(note)
    with steps.step(f"loading {name.label}"):
        model = load_model(name, source)
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
    print_score(results, outputs.table_stream)
    outputs.write("--json", partial(write_json, results))
    outputs.write("--out", partial(write_rows, score_table(plan, per_text)))
    outputs.finish()
