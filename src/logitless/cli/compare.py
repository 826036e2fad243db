"""`logitless compare`: a candidate against a base on the user's texts."""

from pathlib import Path

from logitless.cli.comparison import compare_models
from logitless.cli.models import parse_model_name
from logitless.cli.outputs import check_distinct, staged
from logitless.cli.progress import Steps
from logitless.cli.report import write_report
from logitless.cli.results import comparison_results, write_json
from logitless.cli.tables import print_comparison
from logitless.cli.text import Text, read_texts


def run_compare(
    base: str,
    candidates: list[str],
    text_paths: list[Path],
    json_path: Path | None,
    html_path: Path | None,
    max_tokens: int | None,
    window: int,
) -> None:
    """Compare, print the tables, and write the files asked for."""
    texts = read_texts(text_paths)
    compare_texts(base, candidates, texts, json_path, html_path, max_tokens, window)


def compare_texts(
    base: str,
    candidates: list[str],
    texts: list[Text],
    json_path: Path | None,
    html_path: Path | None,
    max_tokens: int | None,
    window: int,
) -> None:
    """Compare on texts already read: everything that can be refused early is refused before a model loads."""
    base_name = parse_model_name(base)
    names = [parse_model_name(candidate) for candidate in candidates]
    check_distinct(json_path, html_path)
    with staged(json_path) as json_file, staged(html_path) as html_file:
        comparison = compare_models(base_name, names, texts, window, max_tokens, Steps())
        results = comparison_results(comparison)
        if json_path is not None:
            write_json(results, json_file)
        if html_path is not None:
            write_report(comparison, results, html_file)
        print_comparison(results)
