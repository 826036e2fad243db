"""`logitless search`: the items of a corpus that are most alike a query, found exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import logitless as ll
from logitless.cli.encoders import Encoder, encoder_for
from logitless.cli.errors import InputError
from logitless.cli.items import Items, is_picture, read_items, read_vectors
from logitless.cli.names import printable
from logitless.cli.outputs import Outputs
from logitless.cli.progress import Steps
from logitless.cli.results import made_by, write_json
from logitless.cli.search_report import write_search_report
from logitless.cli.tables import print_found
from logitless.cli.vectors import corpus_vectors

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Query:
    """A text, a picture, or a vector: what it is called, and what is read."""

    name: str
    content: Any


def run_search(
    corpus: Path,
    queries: Sequence[str],
    model: Path | None,
    field: str,
    top: int,
    json_path: Path | None,
    html_path: Path | None,
) -> None:
    """Search, print what was found, and write the files asked for."""
    items = read_items(corpus, field)
    asked = read_queries(items, queries)
    inputs = [*items.files(), *(query.content for query in asked if isinstance(query.content, Path))]
    outputs = Outputs({"--json": json_path, "--html": html_path}, inputs)
    steps = Steps()
    encoder: Encoder | None = None
    if items.kind == "vector":
        if model is not None:
            raise InputError("--model makes vectors of texts and pictures; a corpus of vectors needs none")
        vectors, rows = torch.cat([query.content for query in asked]), items.vectors
    else:
        with steps.step("model"):
            encoder = encoder_for(items.kind, model)
        rows = corpus_vectors(items, encoder, steps)
        vectors = encoder.encode([query.content for query in asked], "query")
    try:
        with steps.step(f"search of {len(items):,} items"):
            scores, ids = ll.cosine_topk(vectors, rows, top)
    except (ValueError, TypeError) as error:  # what a file of vectors holds is known only now
        raise InputError(str(error)) from error
    results = _results(items, asked, encoder, scores, ids)
    print_found(results, outputs.table_stream)
    outputs.write("--json", lambda file: write_json(results, file))
    outputs.write("--html", lambda file: write_search_report(results, items, asked, file))
    outputs.finish()


def read_queries(items: Items, given: Sequence[str]) -> list[Query]:
    """Return the queries: texts, paths of pictures, files of vectors or numbers of rows, as the corpus is."""
    if items.kind == "text":
        for text in given:
            if not text.strip():
                raise InputError("a query is empty")
        return [Query(text, text) for text in given]
    if items.kind == "image":
        for path in map(Path, given):
            if not is_picture(path):
                raise InputError(f"{printable(path)} is no picture; a folder of pictures is searched by a picture")
        return [Query(str(path), path) for path in map(Path, given)]
    return [query for one in given for query in _vector_queries(items, one)]


def _vector_queries(items: Items, given: str) -> list[Query]:
    if given.isdecimal():
        if int(given) >= len(items):
            raise InputError(f"query {given} is no row: the corpus has {len(items)}, counted from 0")
        array = items.vectors[int(given)][None]
    elif given.endswith(".npy"):
        array = read_vectors(Path(given))
    else:
        raise InputError(f"{given!r} is neither a .npy file of vectors nor the number of a row of the corpus")
    if array.dtype.kind not in "fi" or array.shape[1] != items.vectors.shape[1]:
        raise InputError(
            f"{given!r} must be floating or int8 vectors of {items.vectors.shape[1]} elements, got {array.dtype} "
            f"{array.shape}"
        )
    vectors = torch.from_numpy(array.astype("float64"))
    names = [given] if len(array) == 1 else [f"{given}[{i}]" for i in range(len(array))]
    return [Query(name, vectors[i : i + 1]) for i, name in enumerate(names)]


def _results(
    items: Items, queries: Sequence[Query], encoder: Encoder | None, scores: Tensor, ids: Tensor
) -> dict[str, Any]:
    """Return what was found."""

    def found(row: int) -> list[dict[str, Any]]:
        pairs = zip(scores[row].tolist(), ids[row].tolist(), strict=True)
        return [
            {
                "rank": rank,
                "id": number,
                "score": score,
                "item": printable(items.shown(number)),
            }
            for rank, (score, number) in enumerate(pairs, 1)
        ]

    return {
        "schema": {"name": "logitless.search", "version": SCHEMA_VERSION},
        "made_by": made_by(),
        "corpus": {"path": printable(items.path), "kind": items.kind, "items": len(items)},
        "model": None if encoder is None else {"name": printable(encoder.name), "sha256": encoder.digest},
        "score": "cosine, in float32; exact, and of equal scores the lower id first",
        "queries": [{"query": printable(query.name), "found": found(i)} for i, query in enumerate(queries)],
    }
