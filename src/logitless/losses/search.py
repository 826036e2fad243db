"""Exact search by cosines: the best rows of a corpus, and the ranks of pairs, without a matrix of scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from logitless._heads.corpus import Corpus, Rows
from logitless._heads.nearest import RESCORED, SearchPlan, most_found, rescored, search, unit_queries
from logitless._rules import dispatch
from logitless.kernels.interface import DEFAULT_MAX_BYTES


class PairedRanks(NamedTuple):
    """Which place its own text takes for each image, and its own image for each text, from 1: int64 (N,)."""

    image_to_text: Tensor
    text_to_image: Tensor

    def metrics(self) -> dict[str, float]:
        """Return recall at 1, 5 and 10, mean rank and median rank both ways, under open_clip's names.

        Recall at k is the share of ranks of at most k. The median of an even number of ranks is rounded down.
        """
        found: dict[str, float] = {}
        for name, ranks in self._asdict().items():
            if not len(ranks):
                raise ValueError("metrics: there are no pairs")
            found[f"{name}_mean_rank"] = ranks.double().mean().item()
            found[f"{name}_median_rank"] = float(ranks.double().quantile(0.5).floor().item())
            for k in (1, 5, 10):
                found[f"{name}_R@{k}"] = (ranks <= k).double().mean().item()
        return found


@_disable_dynamo  # torch.compiler.disable would import the compiler with the package
@torch.no_grad()
def cosine_topk(
    query: Tensor | Rows,
    corpus: Tensor | Rows,
    k: int,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    normalized: bool = False,
    allowed: Tensor | None = None,
    exclude_self: bool = False,
    rescore: Tensor | Rows | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the k rows of a corpus with the largest cosines for each query, and these cosines, the largest first.

    Equals `ll.pairwise_cosine(query, corpus).sort(dim=1, descending=True, stable=True)`, cut to k columns: exact, and
    of equal scores the lower id comes first. The result does not depend on k, on the number of queries or threads, nor
    on max_bytes.

    Args:
        query: (Q, D), a Tensor or an array of float32, bfloat16, float16, int8 or float64.
        corpus: (N, D), a Tensor, an array, a mapped file (`numpy.load(path, mmap_mode="r")`), a slice of a safetensors
            file or any other object of which `corpus[start:stop]` is a Tensor or an array; float32, bfloat16, float16
            or int8. It is read from the first row to the last, once, and never copied as a whole.
        k: how many rows, at least 1.
        max_bytes: what the search may hold beside its result.
        normalized: the vectors have length 1: scores are the products as they are, of any vectors. Not of int8.
        allowed: which rows may be found, boolean (N,) or, for each query its own, (Q, N).
        exclude_self: query i is row i of the corpus, and does not find itself.
        rescore: (N, D), the vectors that the corpus was rounded from. The best 4 k of the corpus are scored again from
            these, and the best k of them are the result, which is then no longer exact: a row that the corpus does not
            have among its best 4 k is not found.
        backend: force a backend; see `logitless.backends`.

    Returns:
        scores, float32, and ids, int64: (Q, min(k, M)), where M is how many rows the query that may find most may find.
        A query that may find fewer has ids of -1 and scores of -inf after them. A zero vector has the cosine 0 with
        every other, and a NaN comes after every number. No gradient.

    Raises:
        ValueError: shapes that do not fit, k or max_bytes below 1, int8 with `normalized`. TypeError: another dtype.

    Source: Johnson et al., "Billion-scale similarity search with GPUs", 2017, section 5, whose exact search keeps the
    best of each block of rows as this does. In training it finds hard negatives to show a loss; it has no gradient.

    >>> import torch, logitless as ll
    >>> corpus = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [6.0, 8.0]])
    >>> ll.cosine_topk(torch.tensor([[4.0, 3.0]]), corpus, 2)
    (tensor([[0.9600, 0.9600]]), tensor([[1, 3]]))
    """
    for name, number in (("k", k), ("max_bytes", max_bytes)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"cosine_topk: {name} must be an integer of at least 1, got {number!r}")
    asked, rows = Corpus("query", query, "queries"), Corpus("corpus", corpus)
    wide = None if rescore is None else Corpus("rescore", rescore)
    for other in (rows,) if wide is None else (rows, wide):
        if other.depth != asked.depth:
            raise ValueError(
                f"cosine_topk: vectors must have one length, got query {asked.depth} and {other.name} {other.depth}"
            )
    if wide is not None and wide.rows != rows.rows:
        raise ValueError(f"cosine_topk: rescore must have the corpus's {rows.rows} rows, got {wide.rows}")
    if exclude_self and rows.rows < asked.rows:
        raise ValueError(
            f"cosine_topk: exclude_self needs a row of the corpus for each query, got {asked.rows} queries and "
            f"{rows.rows} rows"
        )
    if normalized and rows.is_int8:
        raise ValueError("cosine_topk: int8 vectors do not have length 1; leave normalized out")
    if allowed is not None:
        _check_allowed(allowed, asked.rows, rows.rows)
    tensors = [given if isinstance(given, Tensor) else None for given in (query, corpus, allowed, rescore)]
    picked = dispatch.pick("cosine_topk", tensors, backend, obstacle=_obstacle(tensors))
    k = min(k, most_found(asked.rows, rows.rows, allowed, exclude_self))
    first = k if wide is None else min(RESCORED * k, most_found(asked.rows, rows.rows, allowed, exclude_self))
    found = search(SearchPlan(picked, first, max_bytes, normalized, allowed, exclude_self), asked, rows)
    if wide is None or not k:
        return found
    return rescored(SearchPlan(picked, k, max_bytes, normalized, None, False), asked, wide, found[1])


def _obstacle(tensors: Sequence[Tensor | None]) -> str | None:
    """Return why no kernel can search these, if there is a reason: kernels of a search are the CPU's alone."""
    devices = {tensor.device.type for tensor in tensors if tensor is not None} - {"cpu"}
    return f"no kernel searches on {', '.join(sorted(devices))}" if devices else None


def _check_allowed(allowed: Tensor, queries: int, rows: int) -> None:
    if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
        given = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
        raise TypeError(f"cosine_topk: allowed must be a boolean Tensor, got {given}")
    if allowed.shape not in ((rows,), (queries, rows)):
        raise ValueError(f"cosine_topk: allowed must be ({rows},) or ({queries}, {rows}), got {tuple(allowed.shape)}")


@_disable_dynamo
@torch.no_grad()
def paired_ranks(image: Tensor, text: Tensor, *, normalized: bool = False, backend: str | None = None) -> PairedRanks:
    """Return which place the other one of each pair takes, by cosines, without the matrix of them.

    Equals `1 + (cosines > own).sum(1) + ((cosines == own) & earlier).sum(1)` of `cosines = ll.pairwise_cosine(image,
    text)`, with `own` its diagonal and `earlier[i, j] = j < i`, and the same of its transpose.

    Args:
        image, text: (N, D), float32, bfloat16 or float16; row i of one belongs to row i of the other.
        normalized: the vectors have length 1: products are compared as they are, of any vectors.
        backend: force a backend; see `logitless.backends`.

    Returns:
        PairedRanks of two int64 (N,), from 1; `.metrics()` has recall at 1, 5 and 10, mean and median rank, under
        open_clip's names. Of equal cosines the lower index is before the other. No gradient.

    Raises:
        ValueError: shapes that do not fit. TypeError: another dtype.

    Source: `get_clip_metrics` of open_clip. In training a falling rank says what the contrastive loss does not: which
    share of the pairs would be found.

    >>> import torch, logitless as ll
    >>> pairs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> ll.paired_ranks(pairs, pairs.flip(0)).image_to_text
    tensor([2, 1, 3])
    """
    images, texts = Corpus("image", image, "floats"), Corpus("text", text, "floats")
    if (images.rows, images.depth) != (texts.rows, texts.depth):
        raise ValueError(
            f"paired_ranks: image and text must have one shape, got {(images.rows, images.depth)} and "
            f"{(texts.rows, texts.depth)}"
        )
    picked = dispatch.pick("paired_ranks", (image, text), backend, obstacle=_obstacle((image, text)))
    at_once = 64 if picked.PLAIN else 4096

    def ranks(query: Corpus, rows: Corpus) -> Tensor:
        every, made = rows.block(0, rows.rows), []
        for first, part in query.blocks(at_once):
            units = unit_queries(part, normalized)
            made.append(picked.search_ranks(units, every, first_query=first, normalized=normalized))
        return torch.cat(made) if made else torch.empty(0, dtype=torch.int64, device=every.device)

    return PairedRanks(ranks(images, texts), ranks(texts, images))
