"""FAISS: approximate search is its own; here a corpus is put into one of its indexes, block by block."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from logitless._heads.corpus import Corpus, Rows
from logitless._heads.nearest import unit_queries
from logitless.kernels.interface import DEFAULT_MAX_BYTES

if TYPE_CHECKING:
    import faiss

# Rows that an index with something to learn is trained on: FAISS itself takes no more than 256 a cell.
_TRAINED_ON = 1 << 17


@torch.no_grad()
def to_faiss(
    corpus: Tensor | Rows, kind: str = "Flat", *, max_bytes: int = DEFAULT_MAX_BYTES, normalized: bool = False
) -> faiss.Index:
    """Return a filled FAISS index of a corpus whose inner products are cosines.

    Equals `faiss.index_factory(D, kind, faiss.METRIC_INNER_PRODUCT)` with the vectors of the corpus, divided by their
    lengths, added in order: FAISS's ids are row numbers. Divide queries too: `F.normalize(query, dim=1).numpy()`.

    Args:
        corpus: (N, D), as `ll.cosine_topk` takes it.
        kind: what FAISS's index factory calls it: "Flat" is exact, "HNSW32" a graph, "IVF1024,SQ8" cells with bytes.
            One that has to be trained is, on at most 131072 rows spread over the corpus.
        max_bytes: what is held beside the index while it is filled, and the rows that it is trained on.
        normalized: the vectors have length 1 already, or are to be taken as they are.

    Raises:
        ImportError: faiss-cpu is not installed. ValueError: shapes that do not fit. RuntimeError: what FAISS says of a
            kind that it does not know.

    Source: https://github.com/facebookresearch/faiss/wiki/The-index-factory. In training it finds hard negatives in a
    corpus too large to be read for each query.

    >>> import torch, logitless as ll
    >>> index = ll.to_faiss(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    >>> index.search(torch.tensor([[4.0, 3.0]]).numpy() / 5, 1)[1].tolist()
    [[0]]
    """
    if importlib.util.find_spec("faiss") is None:
        raise ImportError('to_faiss needs faiss-cpu, not installed here; run: pip install "logitless[faiss]"')
    import faiss

    rows = Corpus("corpus", corpus)
    index = faiss.index_factory(rows.depth, kind, faiss.METRIC_INNER_PRODUCT)
    at_once = max(1, max_bytes // (24 * rows.depth))  # in float64 and float32, and as they were

    def vectors(part: Tensor) -> Any:
        return unit_queries(part, normalized).cpu().numpy()

    if not index.is_trained and rows.rows:
        step = -(-rows.rows // _TRAINED_ON)
        sample = [part[-first % step :: step].clone() for first, part in rows.blocks(at_once)]
        index.train(vectors(torch.cat(sample)))
    for _, part in rows.blocks(at_once):
        index.add(vectors(part))
    return index
