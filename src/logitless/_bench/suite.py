"""Every case of `logitless bench`, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from logitless._bench import heads, losses, search, similarity
from logitless._bench.limits import limit_case
from logitless._bench.memory import extra_bytes_apart, give_back
from logitless._bench.protocol import Case, Row, measure, with_memory
from logitless._bench.providers import Provider

SECTIONS = {
    "limit": "Cross-entropy against memory's limit, and where its time goes",
    "logits": "Cross-entropy of class indices",
    "losses": "Other losses and measures",
    "small": "Small calls: the overhead of a call",
    "heads": "Linear heads: hidden states and a weight in place of logits",
    "similarity": "Contrastive losses: pairs of vectors in place of a matrix of similarities",
    "search": "Exact search: the best rows of a corpus for each query",
}


def cases(*, quick: bool) -> Iterator[Case]:
    """Yield the cases; `quick` ones are small enough for all of them to take a minute or two."""
    dtypes = (torch.float32, torch.bfloat16)
    if quick:
        yield limit_case((512, 32000))
        yield from losses.cross_entropy_cases(((512, 32000), (8192, 1000)), dtypes)
        yield from losses.loss_cases((512, 32000), vectors=(2**17, 128))
        yield from losses.small_cases()
        yield from heads.head_cases((256, 64, 8192), (256, 64, 16384), (1024, 64, 8192), teacher_features=96)
        yield from similarity.similarity_cases(256, 512, 64)
        yield from search.search_cases(100, 64, 20_000)
        return
    yield limit_case(losses.LARGE[0])
    yield from losses.cross_entropy_cases(losses.LARGE, dtypes)
    yield from losses.loss_cases(losses.LARGE[0], vectors=(1_000_000, 128))
    yield from losses.small_cases()
    yield from heads.head_cases(heads.SMOLLM2, heads.GEMMA, heads.LONG, heads.TEACHER_FEATURES)
    yield from similarity.similarity_cases(similarity.PAIRS, similarity.MANY_PAIRS, similarity.FEATURES)
    yield from search.search_cases(search.QUERIES, search.FEATURES, search.ROWS)


def run(case: Case, rounds: int, errors: dict[str, float], note: Callable[[str], None], *, quick: bool) -> list[Row]:
    """Return the rows of a case that passed its gate, with peak memory where the case asks for it."""
    give_back()  # what the case before left in the pool may be what a peer here needs
    rows: list[Row] = []
    for mode in case.modes:
        measured = measure(case, mode, rounds, note, errors)
        if case.memory:
            present = {row.provider for row in measured if row.kind in ("ours", "peer")}
            wanted = [provider for provider in case.providers if provider.name in present]
            peaks = {provider.name: _peak(case, provider, mode, note, quick=quick) for provider in wanted}
            measured = with_memory(measured, peaks)
        rows += measured
    return rows


def _peak(case: Case, provider: Provider, mode: str, note: Callable[[str], None], *, quick: bool) -> int | None:
    try:
        return extra_bytes_apart(case, provider, mode, quick=quick)
    except RuntimeError as error:
        if provider.kind == "ours":
            raise
        note(f"{case.name}, {mode}: {error}")
        return None
