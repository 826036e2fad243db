"""`logitless compare`: one or more candidates against a base on the user's texts."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from logitless.cli.comparison import compare_models
from logitless.cli.models import parse_model_name
from logitless.cli.outputs import Outputs, model_files
from logitless.cli.progress import Steps
from logitless.cli.report import write_report
from logitless.cli.results import comparison_results, write_json
from logitless.cli.rows import comparison_table, row_writer
from logitless.cli.tables import print_comparison
from logitless.cli.text import Text, read_texts


def run_compare(
    base: str,
    candidates: Sequence[str],
    text_paths: Sequence[Path],
    out: Path | None,
    json_path: Path | None,
    html_path: Path | None,
    max_tokens: int | None,
    window: int,
) -> None:
    """Compare on the texts of files: everything that can be refused early is refused before a model loads."""
    row_writer(out)
    models = [parse_model_name(name).path for name in (base, *candidates)]
    inputs = [*text_paths, *(file for model in models for file in model_files(model))]
    outputs = Outputs({"--out": out, "--json": json_path, "--html": html_path}, inputs)
    compare_texts(base, candidates, read_texts(list(text_paths)), outputs, max_tokens, window, out)


def compare_texts(
    base: str,
    candidates: Sequence[str],
    texts: list[Text],
    outputs: Outputs,
    max_tokens: int | None,
    window: int,
    out: Path | None = None,
) -> None:
    """Compare, print the tables, and write the files asked for; end with status 1 if some of it could not be done."""
    names = [parse_model_name(candidate) for candidate in candidates]
    comparison = compare_models(parse_model_name(base), names, texts, window, max_tokens, Steps())
    results = comparison_results(comparison)
    print_comparison(results, outputs.table_stream)
    labels = [candidate["label"] for candidate in results["candidates"]]
    write_rows = row_writer(out)
    outputs.write("--json", partial(write_json, results))
    outputs.write("--out", lambda file: write_rows(comparison_table(comparison, labels), file))
    outputs.write("--html", partial(write_report, comparison, results))
    outputs.finish()
    if comparison.refused:
        raise SystemExit(1)
