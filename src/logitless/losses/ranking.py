"""Losses over the order of similarities: CoSENT's of pairs, and those of triplets in a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from logitless._autograd.triplets import triplets
from logitless._heads.triplets import Distance, Kind
from logitless._rules.precision import check_real, no_autocast, precision_of
from logitless._rules.sharding import of_the_whole
from logitless.losses.contrastive import one_number
from logitless.losses.similarity import cosine_similarity


@_disable_dynamo  # torch.compiler.disable would import the compiler with the package
@of_the_whole
def cosent_loss(scores: Tensor | Sequence[Tensor], labels: Tensor, *, scale: Tensor | float = 20.0) -> Tensor:
    """Return CoSENT's loss: how far pairs are from being ordered by similarity as their labels order them.

    Equals `log(1 + sum of exp(scale * (s[i] - s[j])) over all i, j with labels[i] < labels[j])`.

    Args:
        scores: (N,) similarities, floating; or two tensors (N, D), whose cosines these then are.
        labels: (N,); the higher, the more alike the pair should be.
        scale: one number above 0; a tensor gets its gradient.

    Returns:
        A scalar; float32, or float64 for float64 scores. Computed in float64, in O(N log N) time and O(N) memory: pairs
        are sorted by label, and no matrix of pairs is made. Labels that are all equal give 0.

    Raises:
        ValueError: shapes that do not fit, a scale that is not above 0. TypeError: scores that are not floating.

    Source: Su, 2022; sentence-transformers' `CoSENTLoss`. In training only the order of similarities matters: the
    worst-ordered pairs of pairs move most, and none is told how alike it should be.

    >>> import torch, logitless as ll
    >>> ll.cosent_loss(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([1.0, 0.0, 0.0]))
    tensor(0.1269)
    """
    if not isinstance(scores, Tensor):
        first, second = scores
        check_real("cosent_loss", scores=first)
        check_real("cosent_loss", scores=second)
        if first.dim() != 2 or first.shape != second.shape:
            raise ValueError(
                f"cosent_loss: pairs must be two tensors (N, D), got {tuple(first.shape)} and {tuple(second.shape)}"
            )
        compute = precision_of(first, second).compute
        scores = cosine_similarity(first.to(compute), second.to(compute))
    check_real("cosent_loss", scores=scores)
    if not scores.is_floating_point():
        raise TypeError(f"cosent_loss: scores must have a floating dtype, got {scores.dtype}")
    if scores.dim() != 1 or labels.shape != scores.shape:
        raise ValueError(
            f"cosent_loss: scores and labels must be (N,), got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    factor = one_number("cosent_loss", "scale", scale)
    with no_autocast(scores):
        logits = scores.double() * (factor.double() if isinstance(factor, Tensor) else factor)
        ordered, order = labels.sort(stable=True)
        logits = logits[order]
        below = torch.searchsorted(ordered, ordered)  # how many have a lower label
        sums = logits.logcumsumexp(0)[(below - 1).clamp(min=0)]
        # Far below every float64 logit, so that a sum over nothing is one, without a gradient.
        each = (sums - logits).masked_fill(below == 0, -1e300)
        total = each.logsumexp(0) if each.shape[0] else logits.sum() - 1e300
        return torch.logaddexp(total, torch.zeros_like(total)).to(precision_of(scores).compute)


@_disable_dynamo  # torch.compiler.disable would import the compiler with the package
@of_the_whole
def batch_triplet_loss(
    features: Tensor,
    labels: Tensor,
    *,
    kind: Kind = "hard",
    margin: float = 5.0,
    distance: Distance = "euclidean",
) -> Tensor:
    """Return the mean of `max(0, d(a, p) - d(a, n) + margin)` over triplets of a batch: anchor, positive, negative.

    Equals, for "hard", the mean over anchors of the loss of their farthest positive and nearest negative; for
    "semi_hard", the mean over positive pairs with the nearest negative farther than the positive, else the farthest
    negative; for "all", the sum over all triplets divided by the number of those with a loss.

    Args:
        features: (N, D), floating.
        labels: (N,), integer; equal ones are positives.
        kind: which triplets: "hard", "semi_hard" or "all".
        margin: how much farther a negative should be, in units of the distance.
        distance: "euclidean", or "cosine": 1 - cos.

    Returns:
        A scalar; float32, or float64 for float64 features. Distances are computed in float64, a strip of anchors at a
        time: O(N^2 log N) time, and memory for neither N x N distances nor triplets. An anchor (a pair) without a
        negative or positive is left out; without any triplet the loss is 0.

    Raises:
        ValueError: shapes or options that do not fit. TypeError: features that are not floating.

    Source: Hermans et al., 2017 ("hard", "all"); Schroff et al., 2015 ("semi_hard"); sentence-transformers'
    `BatchHardTripletLoss`, `BatchSemiHardTripletLoss`, `BatchAllTripletLoss`. In training classes move apart until
    the margin is kept, and then no further.

    >>> import torch, logitless as ll
    >>> ll.batch_triplet_loss(torch.tensor([[0.0], [1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1, 1]), margin=2.0)
    tensor(0.7500)
    """
    if not isinstance(features, Tensor) or not features.is_floating_point():
        given = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"batch_triplet_loss: features must be a Tensor of a floating dtype, got {given}")
    check_real("batch_triplet_loss", features=features)
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"batch_triplet_loss: features must be (N, D) and labels (N,), got {tuple(features.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if kind not in ("hard", "semi_hard", "all"):
        raise ValueError(f"batch_triplet_loss: kind must be 'hard', 'semi_hard' or 'all', got {kind!r}")
    if distance not in ("euclidean", "cosine"):
        raise ValueError(f"batch_triplet_loss: distance must be 'euclidean' or 'cosine', got {distance!r}")
    if not math.isfinite(margin):
        raise ValueError(f"batch_triplet_loss: margin must be finite, got {margin}")
    with no_autocast(features):
        wide = features.double()
        if distance == "cosine":
            squares = wide.square().sum(1, keepdim=True)
            zero = squares == 0
            wide = (wide / squares.masked_fill(zero, 1).sqrt()).masked_fill(zero, 0)
        return triplets(wide, labels, kind, float(margin), distance).to(precision_of(features).compute)
