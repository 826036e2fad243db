"""Losses and similarity measures for PyTorch that never need the logits in memory, and are exact."""

from logitless import functional, nn
from logitless._dispatch import BackendStatus, backends, explain
from logitless._proxy import MaterializeWarning
from logitless.heads import LazyHead, lazy_head
from logitless.lazy import LazyLogits, linear
from logitless.measures import PairStats, TokenStats, entropy, js, kl, pair_stats, token_stats
from logitless.sparse import SparseLogits

__all__ = [
    "BackendStatus",
    "LazyHead",
    "LazyLogits",
    "MaterializeWarning",
    "PairStats",
    "SparseLogits",
    "TokenStats",
    "backends",
    "entropy",
    "explain",
    "functional",
    "js",
    "kl",
    "lazy_head",
    "linear",
    "nn",
    "pair_stats",
    "token_stats",
]
