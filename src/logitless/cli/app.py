"""The verbs and their options; each verb's work is in the file of its name, imported when the verb runs."""

import errno
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from logitless.cli.errors import InputError
from logitless.cli.names import printable
from logitless.cli.stops import end_by_signal
from logitless.cli.streams import Stream, lasting_streams

app = typer.Typer(
    name="logitless",
    add_completion=False,
    pretty_exceptions_enable=False,
)

_MODEL = "A Hugging Face directory or a .gguf file; append :int8, :int4 or :bf16 to round its weights."

Texts = Annotated[list[Path], typer.Option("--text", help="A UTF-8 text file; repeat it for several, never joined.")]
Json = Annotated[
    Path | None, typer.Option("--json", help="Write every number, and what made it, to this JSON file; - is stdout.")
]
Html = Annotated[Path | None, typer.Option("--html", help="Write a self-contained report with plots to this file.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="Score at most this many tokens of each text.")
]
Window = Annotated[int, typer.Option("--window", min=1, help="Tokens a window holds; windows do not overlap.")]
Out = Annotated[
    Path | None, typer.Option("--out", help="Write a row for each token to a .parquet, .jsonl or .csv file.")
]


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"logitless {version('logitless')}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def logitless(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Measure language models, and search by cosines: no logits in memory, no network, every divergence in nats."""
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")
        raise typer.Exit(2)


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
    candidates: Annotated[list[str], typer.Argument(help="As BASE, one or more; each is compared with BASE.")],
    text: Texts,
    out: Out = None,
    json: Json = None,
    html: Html = None,
    max_tokens: MaxTokens = None,
    window: Window = 512,
) -> None:
    """Say how far each of CANDIDATES is from BASE on the same tokens: KL both ways, JS, perplexity, agreement."""
    from logitless.cli.compare import run_compare

    run_compare(base, candidates, text, out, json, html, max_tokens, window)


@app.command()
def score(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    text: Texts,
    out: Out = None,
    json: Json = None,
    max_tokens: MaxTokens = None,
    window: Window = 512,
) -> None:
    """Score each token of a text: its negative log-likelihood, and the entropy, rank and lse of its row."""
    from logitless.cli.score import run_score

    run_score(model, text, out, json, max_tokens, window)


_MODEL_OF_ITEMS = "A Hugging Face directory of a sentence or image model; else the packaged MiniLM or EfficientNet."
_FIELD = "Which field of a JSON Lines file holds the text."
ItemModel = Annotated[Path | None, typer.Option("--model", help=_MODEL_OF_ITEMS)]
Field = Annotated[str, typer.Option("--field", help=_FIELD)]


@app.command()
def search(
    corpus: Annotated[
        Path, typer.Argument(help="A text file (a line an item), a .jsonl file, a folder of pictures, or a .npy file.")
    ],
    queries: Annotated[
        list[str],
        typer.Argument(metavar="QUERY...", help="Texts, pictures, or .npy files of vectors and numbers of rows."),
    ],
    model: ItemModel = None,
    field: Field = "text",
    top: Annotated[int, typer.Option("--top", min=1, help="How many items to find for each query.")] = 10,
    json: Json = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with the texts or pictures that were found.")
    ] = None,
) -> None:
    """Find the items of CORPUS that are most alike each QUERY, exactly; their vectors are kept beside the corpus."""
    from logitless.cli.search import run_search

    run_search(corpus, queries, model, field, top, json, html)


@app.command()
def similar(
    a: Annotated[str, typer.Argument(help="A text, a picture, or a list of items as `search` takes it.")],
    b: Annotated[str, typer.Argument(help="As A; lists are compared pair by pair.")],
    model: ItemModel = None,
    field: Field = "text",
    json: Json = None,
) -> None:
    """Say how alike A and B are: their cosine, or for two lists that of each pair and where the other one is found."""
    from logitless.cli.similar import run_similar

    run_similar(a, b, model, field, json)


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
    without: Annotated[
        str | None, typer.Option("--without", metavar="PATTERN", help="No peers whose name this expression finds.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Samples of each; slow cases take fewer.")] = 7,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads; torch's own number if none.")
    ] = None,
) -> None:
    """Time every loss side by side with torch, torch.compile and optax, once its result is checked."""
    from logitless.cli.bench import run_bench

    run_bench(json, html, rounds=rounds, quick=quick, only=only, without=without, threads=threads)


def run() -> None:
    """Run the app on `sys.argv`; what cannot be used becomes one line on stderr and exit status 2."""
    with lasting_streams() as (output, errors):
        status = _run_verb()
    # The reader of stderr may go, as in `2>&1 | head`: what was to be told is lost with it, the results are not.
    raise SystemExit(_told(output, errors) or status)


def _run_verb() -> int | str | None:
    try:
        status: int | str | None = app(standalone_mode=False, prog_name="logitless")
    except InputError as error:
        sys.stderr.write(f"logitless: {printable(str(error))}\n")
        return 2
    except typer.TyperException as error:  # an option or an argument
        sys.stderr.write(f"logitless: {printable(error.format_message())} (see logitless --help)\n")
        return error.exit_code
    except SystemExit as end:
        return end.code
    return status


def _told(output: Stream, errors: Stream) -> int:
    """Return 1 if standard output could not be written, saying so; end as others do whose reader went."""
    if output.failure is None:
        return 0
    if output.failure.errno == errno.EPIPE and hasattr(signal, "SIGPIPE"):
        end_by_signal(signal.SIGPIPE)
    errors.write(f"logitless: standard output was not written: {output.failure.strerror}\n")
    return 1
