"""`logitless similar`: the cosine of two texts or pictures, or of each pair of two lists."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import logitless.functional as LF
from logitless.cli.encoders import encoder_for
from logitless.cli.errors import InputError
from logitless.cli.items import Items, Kind, is_picture, read_items
from logitless.cli.names import printable
from logitless.cli.outputs import Outputs
from logitless.cli.progress import Steps
from logitless.cli.results import made_by, write_json
from logitless.cli.tables import print_similar
from logitless.losses.search import paired_ranks

SCHEMA_VERSION = 1
_LISTS = (".txt", ".jsonl", ".npy")


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a single text or picture, or a list."""

    name: str
    kind: Kind
    contents: Any
    single: bool
    files: tuple[Path, ...]


def run_similar(a: str, b: str, model: Path | None, field: str, json_path: Path | None) -> None:
    """Say how alike two items are, or the items of each pair, and at which place the other one would be found."""
    sides = _read_side(a, field), _read_side(b, field)
    first, second = sides
    if first.kind != second.kind or first.single != second.single:
        raise InputError(
            f"{_said(first)} cannot be compared with {_said(second)}; give two texts, two pictures, or two lists of "
            "one kind"
        )
    outputs = Outputs({"--json": json_path}, [file for side in sides for file in side.files])
    steps = Steps()
    name: str | None = None
    if first.kind == "vector":
        if model is not None:
            raise InputError("--model makes vectors of texts and pictures; vectors need none")
        vectors = [torch.from_numpy(side.contents.astype("float32")) for side in sides]
    else:
        with steps.step("model"):
            encoder = encoder_for(first.kind, model)
        name = encoder.name
        with steps.step(f"vectors by {encoder.name}"):
            vectors = [encoder.encode(side.contents, "document") for side in sides]
    if vectors[0].shape != vectors[1].shape:
        raise InputError(
            f"two lists need as many items of one size: {printable(a)} has {tuple(vectors[0].shape)} and "
            f"{printable(b)} {tuple(vectors[1].shape)}"
        )
    results = _results(a, b, name, *vectors)
    print_similar(results, outputs.table_stream)
    outputs.write("--json", lambda file: write_json(results, file))
    outputs.finish()


def _read_side(given: str, field: str) -> Side:
    if not given.strip():
        raise InputError("a text is empty")
    path = Path(given)
    try:
        there = path.exists()
    except OSError:  # a text too long for a name
        there = False
    if there and is_picture(path):
        return Side(given, "image", [path], True, (path,))
    if there and (path.is_dir() or path.suffix in _LISTS):
        items: Items = read_items(path, field)
        contents = items.vectors if items.kind == "vector" else items.contents
        return Side(given, items.kind, contents, False, tuple(items.files()))
    return Side(given, "text", [given], True, ())


def _said(side: Side) -> str:
    what = "vectors" if side.kind == "vector" else side.kind
    return f"{'one ' if side.single else 'a list of '}{what} ({printable(side.name)!r})"


def _results(a: str, b: str, model: str | None, first: Tensor, second: Tensor) -> dict[str, Any]:
    cosines = LF.cosine_similarity(first, second, eps=0)
    if bool(cosines.isnan().any()):
        raise InputError("a vector holds NaN or infinity, which has no cosine")
    results: dict[str, Any] = {
        "schema": {"name": "logitless.similar", "version": SCHEMA_VERSION},
        "made_by": made_by(),
        "a": printable(a),
        "b": printable(b),
        "model": None if model is None else printable(model),
        "cosines": cosines.tolist(),
        "mean": cosines.double().mean().item(),
    }
    if len(cosines) > 1:
        ranks = paired_ranks(first, second).metrics()
        results["found"] = {
            key.replace("image_to_text", "a_to_b").replace("text_to_image", "b_to_a"): value
            for key, value in ranks.items()
        }
    return results
