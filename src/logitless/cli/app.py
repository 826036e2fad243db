"""The verbs and their options; each verb's work is in the file of its name, imported when the verb runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from logitless.cli.errors import InputError

app = typer.Typer(
    name="logitless",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure language models with logitless: no logits in memory, no network, every number in nats.",
)

_MODEL = "A Hugging Face directory or a .gguf file; append :int8, :int4 or :bf16 to round its weights."

Texts = Annotated[list[Path], typer.Option("--text", help="A UTF-8 text file; repeat it for several, never joined.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write every number, and what made it, to this JSON file.")]
Html = Annotated[Path | None, typer.Option("--html", help="Write a self-contained report with plots to this file.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="Score at most this many tokens of each text.")
]
Window = Annotated[int, typer.Option("--window", min=1, help="Tokens a window holds; windows do not overlap.")]


@app.command()
def demo(
    json: Annotated[Path, typer.Option("--json", help="Where the numbers go.")] = Path("demo.json"),
    html: Annotated[Path, typer.Option("--html", help="Where the report goes.")] = Path("demo.html"),
    max_tokens: MaxTokens = None,
) -> None:
    """Compare SmolLM2-135M with its int8 and int4 roundings on text that ships with Python; needs no arguments."""
    from logitless.cli.demo import run_demo

    run_demo(json, html, max_tokens)


@app.command()
def compare(
    base: Annotated[str, typer.Argument(help=_MODEL)],
    candidate: Annotated[str, typer.Argument(help=_MODEL)],
    text: Texts,
    json: Json = None,
    html: Html = None,
    max_tokens: MaxTokens = None,
    window: Window = 512,
) -> None:
    """Say how far CANDIDATE is from BASE on the same tokens: KL both ways, JS, perplexity, agreement."""
    from logitless.cli.compare import run_compare

    run_compare(base, [candidate], text, json, html, max_tokens, window)


@app.command()
def score(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    text: Texts,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write a row for each token, to a .parquet or a .jsonl file.")
    ] = None,
    json: Json = None,
    max_tokens: MaxTokens = None,
    window: Window = 512,
) -> None:
    """Score each token of a text: its negative log-likelihood, and the entropy, rank and lse of its row."""
    from logitless.cli.score import run_score

    run_score(model, text, out, json, max_tokens, window)


@app.command()
def check(json: Json = None) -> None:
    """Check the identities between the measures, and their accuracy on this machine; exit 1 if one fails."""
    from logitless.cli.check import check_command

    check_command(json)


@app.command()
def bench(
    json: Json = None,
    html: Html = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes: a minute or two, and no claim.")] = False,
    only: Annotated[
        str | None, typer.Option("--only", metavar="PATTERN", help="Only cases whose name this expression finds.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Samples of each; slow cases take fewer.")] = 7,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads; torch's own number if none.")
    ] = None,
) -> None:
    """Time every loss side by side with torch, torch.compile and optax, once its result is checked."""
    from logitless.cli.bench import run_bench

    run_bench(json, html, rounds=rounds, quick=quick, only=only, threads=threads)


def run() -> None:
    """Run the app on `sys.argv`; an `InputError` becomes one line on stderr and exit status 2."""
    try:
        app()
    except InputError as error:
        sys.stderr.write(f"logitless: {error}\n")
        raise SystemExit(2) from None
