"""Losses and similarity measures for PyTorch that never need the logits in memory, and are exact."""

from logitless import functional, nn
from logitless._dispatch import BackendStatus, backends, explain
from logitless.lazy import LazyLogits, linear
from logitless.measures import PairStats, TokenStats, entropy, js, kl, pair_stats, token_stats

__all__ = [
    "BackendStatus",
    "LazyLogits",
    "PairStats",
    "TokenStats",
    "backends",
    "entropy",
    "explain",
    "functional",
    "js",
    "kl",
    "linear",
    "nn",
    "pair_stats",
    "token_stats",
]
