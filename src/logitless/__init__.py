"""Losses and similarity measures for PyTorch that never need the logits in memory, and are exact."""

from logitless import functional, nn
from logitless._rules.dispatch import BackendStatus, backends, explain
from logitless.lazy.logits import LazyLogits, linear
from logitless.lazy.model_head import LazyHead, lazy_head
from logitless.lazy.proxy import MaterializeWarning
from logitless.lazy.sparse import SparseLogits
from logitless.losses.measures import (
    PairStats,
    TokenStats,
    TopTokenStats,
    entropy,
    js,
    kl,
    log_probs,
    pair_stats,
    token_stats,
    tv,
)

__all__ = [
    "BackendStatus",
    "LazyHead",
    "LazyLogits",
    "MaterializeWarning",
    "PairStats",
    "SparseLogits",
    "TokenStats",
    "TopTokenStats",
    "backends",
    "entropy",
    "explain",
    "functional",
    "js",
    "kl",
    "lazy_head",
    "linear",
    "log_probs",
    "nn",
    "pair_stats",
    "token_stats",
    "tv",
]
