"""Peak memory of `logitless compare` at growing numbers of tokens: it follows neither tokens nor vocabulary.

Each size runs in a process of its own, on SmolLM2-135M and its int8 rounding. `measuring` is the growth of the resident
size while the pair is measured; `process` is the peak of everything, the weights of both models included.
Run: python benchmarks/compare_memory.py [TOKENS ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from logitless.cli.demo import packaged_model, unwrap

TOPICS = ("import", "objects", "naming", "customization", "attribute-access")  # about 8000 tokens, read as one text


def measure(tokens: int, folder: Path) -> dict[str, int]:
    text, out = folder / "text.txt", folder / "out.json"
    text.write_text("\n".join(unwrap(topics[name]) for name in TOPICS), "utf-8")
    model = packaged_model()
    command = [sys.executable, "-c", "from logitless.cli import main; main()", "compare", str(model), f"{model}:int8"]
    options = ["--text", str(text), "--json", str(out), "--max-tokens", str(tokens)]
    subprocess.run([*command, *options], check=True, capture_output=True)
    candidate = json.loads(out.read_text("utf-8"))["candidates"][0]
    if candidate["overall"]["candidate"]["tokens"] != tokens:
        raise SystemExit(f"the text has fewer than {tokens} tokens")
    memory: dict[str, int] = candidate["memory"]
    return memory


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or [1024, 2048, 4096]
    print(f"{'tokens':>8} {'measuring MB':>14} {'logits MB':>12} {'process MB':>12}")
    for tokens in sizes:
        with tempfile.TemporaryDirectory() as folder:
            memory = measure(tokens, Path(folder))
        columns = (memory["measure_growth"], memory["logits_would_take"], memory["process_peak"])
        print(
            f"{tokens:>8} "
            + " ".join(f"{value / 1e6:>{width}.0f}" for value, width in zip(columns, (14, 12, 12), strict=True))
        )


if __name__ == "__main__":
    main()
