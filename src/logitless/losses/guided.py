"""A contrastive loss whose false negatives a guide model finds, as GISTEmbed has it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from logitless._autograd.contrastive import contrast
from logitless._heads.pairs_of_rows import Diagonal
from logitless._heads.square import Contrast, Margin, Panel, Rule
from logitless._heads.vectors import inverse_norms
from logitless._rules import dispatch
from logitless._rules.precision import no_autocast, precision_of
from logitless._rules.reduction import reduce_rows
from logitless.losses.contrastive_group import KEYS, Seen, losses_over_ranks

# What a guide's similarities of the same two vectors differ by, made in tiles and made alone: no more alike than that.
_TIE = 1e-6


def guided_loss(
    vectors: Sequence[Tensor],
    guides: Sequence[Tensor],
    *,
    temperature: float,
    margin: float,
    relative: bool,
    contrast_anchors: bool,
    contrast_positives: bool,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the mean cross-entropy of each anchor's positive among what a guide does not take for another positive.

    Vectors and guides are of anchors, positives and, where there are any, negatives, all by their cosines. What the
    guide finds more alike than an anchor and its positive, less the margin (less that part of their similarity, where
    `relative`), is left out: of all positives, of the negatives, and where asked of the anchors with each other and of
    the positives with each other. Of these an anchor's entry with itself is one more, left out by the same rule.
    Anchors do not see those of other ranks.
    """
    anchors = vectors[0].shape[0]
    picked = dispatch.pick("info_nce", tuple(vectors), None)
    dtype = precision_of(*vectors).compute
    flat = [guide.detach() for guide in guides]
    thresholds = _thresholds(flat[0], flat[1], margin, relative).to(dtype)

    def panel(left: int, right: int, positives: Diagonal | None = None) -> Panel:
        rule = Rule(margin=Margin(thresholds, (flat[left], flat[right])))
        return Panel(left, right, anchors, vectors[right].shape[0], row_rule=rule, positives=positives)

    pairs = Diagonal(anchors)
    panels = [panel(0, 1, pairs)]
    if contrast_anchors:
        panels.append(panel(0, 0))
    if contrast_positives:
        panels.append(panel(1, 1))
    if len(vectors) > 2:
        panels.append(panel(0, 2))
    counts = pairs.counts(anchors, anchors, vectors[0].device)
    call = Contrast(picked, anchors, tuple(panels), 1, (True,) * len(vectors), dtype, counts)
    with no_autocast(vectors[0]):
        if group is None:
            losses = contrast(call, 1 / temperature, *vectors)
            return reduce_rows(losses, "mean", denominator=float(anchors), dtype=dtype)
        seen = Seen(
            documents=(KEYS,) if contrast_positives else (),
            shared=len(vectors) > 2,
            thresholds=thresholds,
            guides=tuple(flat),
        )
        return losses_over_ranks(
            "guided_loss", call, 1 / temperature, tuple(vectors), seen, group=group, exchange="gather"
        )


def _thresholds(anchors: Tensor, positives: Tensor, margin: float, relative: bool) -> Tensor:
    first, second = anchors.double(), positives.double()
    similarity = (first * second).sum(1)
    for side in (first, second):
        similarity = similarity * inverse_norms(side, torch.float64).squeeze(1)
    return similarity - (similarity.abs() * margin if relative else margin) + _TIE
