"""Losses and similarity measures for PyTorch that never need the logits in memory, and are exact."""

from logitless import functional, nn
from logitless._rules.dispatch import BackendStatus, backends, explain
from logitless.integrations.faiss import to_faiss
from logitless.lazy.logits import LazyLogits, linear
from logitless.lazy.model_head import LazyHead, lazy_head
from logitless.lazy.proxy import MaterializeWarning
from logitless.lazy.sparse import SparseLogits
from logitless.losses.contrastive import clip_loss, info_nce, siglip_loss, supcon_loss
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
from logitless.losses.ranking import batch_triplet_loss, cosent_loss
from logitless.losses.search import PairedRanks, cosine_topk, paired_ranks
from logitless.losses.similarity import pairwise_cosine

__all__ = [
    "BackendStatus",
    "LazyHead",
    "LazyLogits",
    "MaterializeWarning",
    "PairStats",
    "PairedRanks",
    "SparseLogits",
    "TokenStats",
    "TopTokenStats",
    "backends",
    "batch_triplet_loss",
    "clip_loss",
    "cosent_loss",
    "cosine_topk",
    "entropy",
    "explain",
    "functional",
    "info_nce",
    "js",
    "kl",
    "lazy_head",
    "linear",
    "log_probs",
    "nn",
    "pair_stats",
    "paired_ranks",
    "pairwise_cosine",
    "siglip_loss",
    "supcon_loss",
    "to_faiss",
    "token_stats",
    "tv",
]
