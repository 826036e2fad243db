"""Contrastive losses whose negatives are on other ranks too: what a call of one process is over a process group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from logitless._autograd.contrastive_group import contrast_across, sigmoid_contrast_across, sum_over_ranks
from logitless._heads.across import ANCHORS, KEYS, NEGATIVES, Abroad, Across
from logitless._heads.exchange import peers_of
from logitless._heads.square import Contrast
from logitless._rules.reduction import Empty, reduce_rows

__all__ = ["KEYS", "NEGATIVES", "Seen", "losses_over_ranks", "sigmoid_over_ranks"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What anchors see of other ranks, beside their keys.

    `queries`: an anchor sees other queries; `documents` are the kinds of vectors that its own document sees. `columns`
    is the partition function of keys. `shared` negatives are seen by all ranks, and are `owned` where each is some
    query's; `absent` says which are padding. Guides are of queries, keys and negatives, labels of queries and keys.
    """

    columns: int | None = None
    queries: bool = False
    documents: tuple[int, ...] = ()
    shared: bool = False
    owned: bool = False
    absent: Tensor | None = None
    thresholds: Tensor | None = None
    guides: tuple[Tensor, ...] | None = None
    labels: tuple[Tensor, Tensor] | None = None
    hardness: tuple[str, float] | None = None


def losses_over_ranks(
    name: str,
    own: Contrast,
    scale: Tensor | float,
    vectors: tuple[Tensor, ...],
    seen: Seen,
    *,
    group: dist.ProcessGroup,
    exchange: str,
    given: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Return the losses of own anchors, or what all ranks' are reduced to; `given`: anchors may lack a positive."""
    query, key = vectors[:2]
    negatives = vectors[NEGATIVES] if seen.shared else None
    anchors, keys = query.shape[0], key.shape[0]
    moving = [query, key, *([] if negatives is None else [negatives])]
    guides = () if seen.guides is None else seen.guides[: len(moving)]
    paired = min(anchors, keys)
    peers, (padded,) = peers_of(
        name,
        group,
        exchange,
        [(anchors,), (paired, keys - paired), (0 if negatives is None else negatives.shape[0],)],
        {
            "the length of vectors": query.shape[1],
            "the dtypes of vectors": [str(x.dtype) for x in moving],
            "which vectors require a gradient": _differentiable(*moving, scale),
            "which vectors are normalized": own.normalize[:2],
            "the scale or temperature": "a tensor" if isinstance(scale, Tensor) else scale,
            "the directions and their partition": (seen.columns, seen.queries, seen.documents, own.partitions),
            "whether negatives are shared by all queries": (seen.shared, seen.owned),
            "a margin or guide": seen.thresholds is not None,
            "the guide's vectors": [(x.shape[1], str(x.dtype)) for x in guides],
            "whether labels are the positives, and their dtype": None
            if seen.labels is None
            else str(seen.labels[1].dtype),
            "hardness": seen.hardness,
            "whether positives are given": given,
            "reduction": reduction,
        },
        [seen.absent is not None],
        query.device,
    )
    absent = seen.absent
    if padded and absent is None and negatives is not None:
        absent = torch.zeros(negatives.shape[0], dtype=torch.bool, device=negatives.device)
    differentiable = _differentiable(*moving)
    abroad = Abroad(
        travels=(seen.queries, True, seen.shared),
        wanted=(*differentiable, False)[:3],
        columns=seen.columns,
        documents=seen.documents,
        thresholds=seen.thresholds,
        guides=seen.guides,
        labels=seen.labels,
        absent=absent,
        hardness=seen.hardness,
        owned=seen.owned,
    )
    losses, counts = contrast_across(Across(own, abroad, peers), scale, *vectors)
    if reduction == "none":
        return losses
    total = losses.sum(dtype=torch.float64)
    counted: Tensor | float = float(peers.total(ANCHORS))
    if given:
        total, counted = sum_over_ranks(torch.stack([total, (counts > 0).sum().double()]), peers)
    else:
        total = sum_over_ranks(total, peers)
    empty: Empty = "zero" if given else "nan"
    return reduce_rows(total, reduction, denominator=counted, dtype=own.dtype, empty=empty)


def sigmoid_over_ranks(
    name: str,
    own: Contrast,
    scale: Tensor | float,
    bias: Tensor | float,
    images: Tensor,
    texts: Tensor,
    *,
    group: dist.ProcessGroup,
    exchange: str,
) -> Tensor:
    """Return the sum over all ranks' images and texts, divided by how many images there are."""
    peers, _ = peers_of(
        name,
        group,
        exchange,
        [(images.shape[0],), (texts.shape[0],)],
        {
            "the length of features": images.shape[1],
            "the dtype of features": [str(images.dtype), str(texts.dtype)],
            "which features require a gradient": _differentiable(images, texts, scale, bias),
            "logit_scale and logit_bias": ["a tensor" if isinstance(x, Tensor) else x for x in (scale, bias)],
        },
        [],
        images.device,
    )
    abroad = Abroad(travels=(False, True), wanted=(False, *_differentiable(texts)))
    total = sigmoid_contrast_across(Across(own, abroad, peers), scale, bias, images, texts)
    total = sum_over_ranks(total, peers)
    return reduce_rows(total, "mean", denominator=float(peers.total(ANCHORS)), dtype=own.dtype)


def _differentiable(*tensors: Tensor | float) -> tuple[bool, ...]:
    return tuple(torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad for x in tensors)
