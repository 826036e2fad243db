"""Exact search: the best rows of a corpus for each query, block by block, in bounded memory.

Precision policy: a query is divided by its length in float64 and rounded once, to float32. Scores are float32, and
depend neither on the block, nor on the number of queries, of threads, nor on k: see `Backend.search`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from logitless._heads.corpus import MOST_ROWS, Corpus
from logitless._heads.vectors import inverse_norms
from logitless.kernels.interface import Backend

# How many times k rows are scored again from the vectors of `rescore`.
RESCORED = 4
_NOWHERE = float("-inf")


@dataclass(frozen=True)
class SearchPlan:
    """What a search means, decided once."""

    backend: Backend
    k: int  # at most what a query can find
    max_bytes: int
    normalized: bool
    allowed: Tensor | None  # boolean, (rows,) or (queries, rows)
    exclude_self: bool


def unit_queries(query: Tensor, normalized: bool) -> Tensor:
    """Return queries in float32, divided by their lengths unless they are to be taken as they are."""
    if normalized:
        return query.float().contiguous()
    parts = [part.double() * inverse_norms(part, torch.float64) for part in query.split(1024)]
    return torch.cat([part.float() for part in parts]) if parts else query.float()


def most_found(queries: int, rows: int, allowed: Tensor | None, exclude_self: bool) -> int:
    """Return how many rows the query that may find most may find."""
    if not queries:
        return rows
    if allowed is None:
        return rows - exclude_self
    counts = allowed.sum(-1).expand(queries)
    if exclude_self:
        own = allowed[:queries] if allowed.dim() == 1 else allowed.diagonal()
        counts = counts - own.to(counts.dtype)
    return int(counts.max())


def search(plan: SearchPlan, query: Corpus, corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Return the scores and numbers of the best rows for each query, the best first; -1 where there is none."""
    units = query.block(0, query.rows)
    scores = torch.full((query.rows, plan.k), _NOWHERE, device=units.device)
    ids = torch.full((query.rows, plan.k), -1, dtype=torch.int64, device=units.device)
    if not plan.k or not query.rows:
        return scores, ids
    queries, rows = _steps(plan, query.rows, corpus)
    for first, block in corpus.blocks(rows):
        for start in range(0, query.rows, queries):
            part = slice(start, start + queries)
            allowed, stretch = plan.allowed, slice(first, first + len(block))
            if allowed is not None:
                allowed = (allowed[stretch] if allowed.dim() == 1 else allowed[part, stretch]).to(units.device)
            plan.backend.search(
                unit_queries(units[part], plan.normalized),
                block.to(units.device),  # of a corpus that lies in a file, say
                scores[part],
                ids[part],
                first_id=first,
                normalized=plan.normalized,
                allowed=allowed,
                self_id=start if plan.exclude_self else None,
            )
    return scores, ids


def _steps(plan: SearchPlan, queries: int, corpus: Corpus) -> tuple[int, int]:
    """Return how many queries and how many rows a call of the backend takes."""
    half = plan.max_bytes // 2
    if plan.backend.PLAIN:  # every operation makes matrices of scores, in float64 and as orders
        queries = min(queries, 64)
        return queries, max(1, plan.max_bytes // (64 * queries + 16 * corpus.depth))
    # A query in float64, float32 and packed, and what each thread keeps for it.
    a_query = 16 * corpus.depth + torch.get_num_threads() * 8 * (3 * plan.k + 64)
    rows = MOST_ROWS if corpus.in_memory else max(1, half // corpus.row_bytes)
    return min(queries, max(1, half // a_query)), rows


def rescored(plan: SearchPlan, query: Corpus, wide: Corpus, found: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best of the rows that were found, scored from other vectors of the same numbers."""
    units = query.block(0, query.rows)
    scores = torch.full((query.rows, plan.k), _NOWHERE, device=units.device)
    ids = torch.full((query.rows, plan.k), -1, dtype=torch.int64, device=units.device)
    at_once = max(1, plan.max_bytes // max(1, 2 * found.shape[1] * wide.row_bytes))
    for start in range(0, query.rows, at_once):
        numbers = torch.unique(found[start : start + at_once])
        numbers = numbers[numbers >= 0]
        if not len(numbers):
            continue
        rows = torch.cat([wide.block(number, number + 1) for number in numbers.tolist()])
        for i in range(start, min(start + at_once, query.rows)):
            own = torch.sort(found[i][found[i] >= 0]).values  # in rising order, by which equal scores are ordered
            if not len(own):
                continue
            places = torch.full_like(ids[i : i + 1], -1)
            plan.backend.search(
                unit_queries(units[i : i + 1], plan.normalized),
                rows[torch.searchsorted(numbers, own).to(rows.device)].to(units.device),
                scores[i : i + 1],
                places,
                first_id=0,
                normalized=plan.normalized,
                allowed=None,
                self_id=None,
            )
            taken = places[0] >= 0
            ids[i][taken] = own[places[0][taken]]
    return scores, ids
