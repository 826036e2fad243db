"""Cases of exact search: the best rows of a corpus for each query, beside FAISS and sentence-transformers' form."""

from __future__ import annotations

import heapq
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from logitless._bench.protocol import Case
from logitless._bench.providers import FORWARD, Call, Inputs, Loss, Outcome, Provider, eager, ours
from logitless.losses.search import cosine_topk

QUERIES, FEATURES, ROWS = 1000, 384, 1_000_000
BEST = (10, 100)
# As sentence-transformers' `semantic_search` has them.
_QUERIES_AT_ONCE, _ROWS_AT_ONCE = 100, 500_000
_LOOKED_AT = 8

Found = tuple[Tensor, Tensor]
Search = Callable[[Tensor, Tensor], Found]


def search_cases(queries: int, features: int, rows: int) -> Iterator[Case]:
    """Yield the search of float32 rows beside its peers, and of int8 rows beside the same rows in float32."""
    for k in BEST:
        found = partial(_exact, k=k)
        providers = (
            ours(_told(partial(_ours, k=k)), modes=(FORWARD,)),
            _faiss(k),
            eager(_told(partial(_semantic_search, k=k)), "semantic_search's form", (FORWARD,)),
        )
        yield _case(f"cosine_topk k={k}", (queries, features, rows), providers, _told(found), _units)
        both = (
            ours(_told(partial(_ours_of_bytes, k=k)), modes=(FORWARD,)),
            eager(_told(partial(_ours_widened, k=k)), "the rows in float32", (FORWARD,)),
        )
        yield _case(f"cosine_topk of int8 k={k}", (queries, features, rows), both, _told(found), _with_bytes)


def _case(
    what: str,
    shape: tuple[int, int, int],
    providers: Sequence[Provider],
    truth: Loss,
    make: Callable[[int, int, int], Inputs],
) -> Case:
    def inputs(queries: int) -> Inputs:
        return make(queries, shape[1], shape[2])

    return Case("search", what, shape, torch.float32, inputs, providers, truth, (), (FORWARD,), memory=True)


def _units(queries: int, features: int, rows: int) -> Inputs:
    corpus = torch_functional.normalize(torch.randn(rows, features), dim=1)
    return torch_functional.normalize(torch.randn(queries, features), dim=1), corpus


def _with_bytes(queries: int, features: int, rows: int) -> Inputs:
    """Return queries, and rows of whole numbers, as floats and as bytes."""
    query, corpus = _units(queries, features, rows)
    largest = corpus.abs().max()
    corpus.mul_(127 / largest).round_()
    return query, corpus, corpus.to(torch.int8)


def _told(search: Callable[..., Found]) -> Loss:
    """Return what is compared of a search: the mean score, and the mean cosine of the first queries with their rows.

    A wrong row shows in the second, a wrong score in the first.
    """

    def value(*inputs: Tensor) -> Tensor:
        query, corpus = inputs[:2]
        scores, ids = search(*inputs)
        own = corpus[ids[:_LOOKED_AT]]
        cosines = torch_functional.cosine_similarity(query[:_LOOKED_AT].unsqueeze(1), own, dim=-1)
        return scores.mean() + cosines.mean()

    return value


def _exact(query: Tensor, corpus: Tensor, *_: Tensor, k: int) -> Found:
    found = [(part @ torch_functional.normalize(corpus, dim=1).T).topk(k) for part in query.split(16)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _ours(query: Tensor, corpus: Tensor, *, k: int) -> Found:
    return cosine_topk(query, corpus, k, normalized=True)


def _ours_of_bytes(query: Tensor, corpus: Tensor, rounded: Tensor, *, k: int) -> Found:
    return cosine_topk(query, rounded, k)


def _ours_widened(query: Tensor, corpus: Tensor, rounded: Tensor, *, k: int) -> Found:
    return cosine_topk(query, corpus, k)


def _semantic_search(query: Tensor, corpus: Tensor, *, k: int) -> Found:
    """Search as sentence-transformers does: blocks of cosines, `topk` of each, a heap of Python for each query."""
    best: list[list[tuple[float, int]]] = [[] for _ in range(len(query))]
    for first in range(0, len(query), _QUERIES_AT_ONCE):
        for start in range(0, len(corpus), _ROWS_AT_ONCE):
            queries = torch_functional.normalize(query[first : first + _QUERIES_AT_ONCE], dim=1)
            rows = torch_functional.normalize(corpus[start : start + _ROWS_AT_ONCE], dim=1)
            scores = queries @ rows.T
            top = scores.topk(min(k, scores.shape[1]), dim=1, sorted=False)
            for i, (values, indices) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True), first):
                for value, index in zip(values, indices, strict=True):
                    if len(best[i]) < k:
                        heapq.heappush(best[i], (value, start + index))
                    else:
                        heapq.heappushpop(best[i], (value, start + index))
    ranked = [sorted(own, reverse=True) for own in best]
    scores = torch.tensor([[score for score, _ in own] for own in ranked], dtype=query.dtype)
    return scores, torch.tensor([[number for _, number in own] for own in ranked])


def _faiss(k: int) -> Provider:
    def prepare(inputs: Inputs, leaves: Sequence[int], mode: str) -> Call:
        faiss = importlib.import_module("faiss")
        faiss.omp_set_num_threads(torch.get_num_threads())

        def search(query: Tensor, corpus: Tensor) -> Found:
            found = faiss.knn(query.numpy(), corpus.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
            return torch.from_numpy(found[0]), torch.from_numpy(found[1])

        value = _told(search)

        def call() -> Outcome:
            return value(*inputs), ()

        return call

    return Provider(f"faiss.knn, {_blas_of_faiss()}", "peer", prepare, (FORWARD,), needs=("faiss",))


def _blas_of_faiss() -> str:
    """Return which matrix product FAISS multiplies with: the library that lies beside the package."""
    found = importlib.util.find_spec("faiss")
    if found is None or found.origin is None:
        return "not installed"
    beside = Path(found.origin).parent.parent / "faiss_cpu.libs"
    names = [path.name.lower() for path in beside.glob("*")] if beside.is_dir() else []
    known = {"openblas": "OpenBLAS", "mkl": "MKL"}
    return next((name for part, name in known.items() if any(part in file for file in names)), "BLAS unknown")
