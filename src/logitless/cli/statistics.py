"""Means, quantiles and standard errors of per-token rows."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Columns = dict[str, NDArray[Any]]

_QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p99_9": 0.999}


def model_summary(nll: Floats, entropy: Floats, scored_bytes: int) -> dict[str, Any]:
    """Summarise one model's rows: cross-entropy in nats per token, bits per byte of text, perplexity, mean entropy."""
    mean = float(nll.mean())
    return {
        "tokens": len(nll),
        "bytes": scored_bytes,
        "cross_entropy": mean,
        "bits_per_byte": float(nll.sum()) / math.log(2) / scored_bytes if scored_bytes else math.inf,
        "perplexity": _exp(mean),
        "mean_entropy": float(entropy.mean()),
    }


def pair_summary(columns: Columns) -> dict[str, Any]:
    """Summarise a pair's rows; `clusters` of tokens, the windows, are what the standard error takes as independent."""
    difference = columns["nll_candidate"] - columns["nll_base"]
    ratio = float(difference.mean())
    clustered = clustered_error(difference, columns["cluster"])
    return {
        "kl_base_candidate": distribution(columns["kl"]),
        "kl_base_candidate_se_clustered": clustered_error(columns["kl"], columns["cluster"]),
        "kl_base_candidate_se_naive": naive_error(columns["kl"]),
        "kl_candidate_base": distribution(columns["reverse_kl"]),
        "kl_candidate_base_se_clustered": clustered_error(columns["reverse_kl"], columns["cluster"]),
        "js": distribution(columns["js"]),
        "js_se_clustered": clustered_error(columns["js"], columns["cluster"]),
        "same_top": float(columns["same_top"].mean()),
        "same_top_se_clustered": clustered_error(columns["same_top"].astype(np.float64), columns["cluster"]),
        "mean_hidden_cosine": float(columns["cosine"].mean()) if "cosine" in columns else None,
        "log_perplexity_ratio": ratio,
        "log_perplexity_ratio_se_clustered": clustered,
        "log_perplexity_ratio_se_naive": naive_error(difference),
        "clusters": len(np.unique(columns["cluster"])),
        "perplexity_ratio": _exp(ratio),
    }


def identity_summary(columns: Columns) -> dict[str, Any]:
    """Summarise CE(p, q) = H(p) + KL(p || q): the means, and the worst token's residual."""
    cross_entropy, entropy, kl = columns["cross_entropy"], columns["entropy_base"], columns["kl"]
    finite = np.isfinite(kl) & np.isfinite(cross_entropy)
    residual = np.abs(cross_entropy[finite] - entropy[finite] - kl[finite])
    relative = residual / np.maximum(cross_entropy[finite], np.finfo(np.float64).tiny)
    return {
        "mean_cross_entropy": float(cross_entropy.mean()),
        "mean_entropy": float(entropy.mean()),
        "mean_kl": float(kl.mean()),
        "largest_residual": float(residual.max(initial=0.0)),
        "largest_relative_residual": float(relative.max(initial=0.0)),
        "infinite_tokens": int((~finite).sum()),
    }


def distribution(values: Floats) -> dict[str, float]:
    """Return the mean, the quantiles (linear interpolation, infinite next to infinity) and the largest of `values`."""
    found = {name: _quantile(values, share) for name, share in _QUANTILES.items()}
    return {"mean": float(values.mean()), **found, "max": float(values.max())}


def _quantile(values: Floats, share: float) -> float:
    above = float(np.quantile(values, share, method="higher"))
    return above if math.isinf(above) else float(np.quantile(values, share))


def naive_error(values: Floats) -> float | None:
    """Return the standard error of the mean if every value were independent; none of fewer than two, or of infinity."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def clustered_error(values: Floats, clusters: NDArray[Any]) -> float | None:
    """Return the standard error of the mean if only clusters were independent; none of fewer than two, or of infinity.

    SE² = G/(G-1) Σ_g (Σ_{i in g} (x_i - mean))² / N², with G clusters of N values in all.
    """
    if not np.isfinite(values).all():
        return None
    _, index = np.unique(clusters, return_inverse=True)
    sums = np.bincount(index, weights=values - values.mean())
    count = len(sums)
    if count < 2:
        return None
    return float(math.sqrt(count / (count - 1) * float((sums**2).sum())) / len(values))


def _exp(value: float) -> float:
    return math.exp(value) if value < math.log(np.finfo(np.float64).max) else math.inf
