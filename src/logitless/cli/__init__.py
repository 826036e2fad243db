"""The command line: one file a verb, and no arithmetic of its own beyond means and quantiles of per-token rows."""

import importlib.util
import sys

_CLI_EXTRA = (
    "typer",
    "rich",
    "numpy",
    "jinja2",
    "pyarrow",
    "plotly",
    "mpmath",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
)


def main() -> None:
    """Run the command line on `sys.argv`; exit 2 with one line when something given cannot be used."""
    missing = [name for name in _CLI_EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"logitless: the command line needs {', '.join(missing)}, not installed here; "
            'run: pip install "logitless[cli]"\n'
        )
        raise SystemExit(2)
    from logitless.cli.stops import Stopped, end_by, stops_raised

    try:
        with stops_raised():
            from logitless.cli.app import run

            run()
    except Stopped as stopped:
        end_by(stopped)
