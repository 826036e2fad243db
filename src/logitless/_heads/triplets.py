"""Triplets of a batch: their losses and the gradients of distances, a strip of anchors at a time.

Of every kind a loss is a sum of distances, each some times over: the sum over all triplets of an anchor is read from
its negatives in order, with their running sum, and no triplet is listed. Distances are float64, and Euclidean ones and
their gradient are made of the vectors' differences: what two close vectors differ by is not lost in a product of long
ones, equal vectors are at a distance of 0, and which negative is the nearest is not left to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["hard", "semi_hard", "all"]
Distance = Literal["euclidean", "cosine"]

_STRIP = 1 << 17  # distances at a time


class Strip(NamedTuple):
    """What some anchors add: the sum of their losses, how many are counted, and how often each distance is in it."""

    total: Tensor
    counted: Tensor
    times: Tensor


def strips(anchors: int) -> Iterator[tuple[int, int]]:
    """Yield anchors a strip at a time."""
    step = max(1, _STRIP // max(1, anchors))
    for top in range(0, anchors, step):
        yield top, min(top + step, anchors)


def distances(vectors: Tensor, top: int, bottom: int, kind: Distance) -> Tensor:
    """Return the distances of some float64 vectors (of length 1 for cosines) from all."""
    return between(vectors[top:bottom], vectors, kind)


def between(first: Tensor, second: Tensor, kind: Distance) -> Tensor:
    """Return the distances of each of the first vectors from each of the second."""
    if kind == "cosine":
        return 1 - first @ second.T
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def mined(kind: Kind, apart: Tensor, labels: Tensor, top: int, margin: float) -> Strip:
    """Return the losses of a strip of anchors, given their distances from all."""
    rows = torch.arange(top, top + apart.shape[0], device=labels.device)
    positive = labels[rows].unsqueeze(1) == labels
    negative = ~positive
    positive[rows - top, rows] = False
    if kind == "hard":
        return _hard(apart, positive, negative, margin)
    ordered, order = apart.masked_fill(negative.logical_not(), torch.inf).sort(dim=1, stable=True)
    if kind == "semi_hard":
        return _semi_hard(apart, positive, negative.sum(1, keepdim=True), ordered, order, margin)
    return _all(apart, positive, negative, ordered, margin)


def _hard(apart: Tensor, positive: Tensor, negative: Tensor, margin: float) -> Strip:
    """The farthest positive and the nearest negative of each anchor that has both."""
    farthest, which = apart.masked_fill(~positive, -torch.inf).max(1, keepdim=True)
    nearest, other = apart.masked_fill(~negative, torch.inf).min(1, keepdim=True)
    losses = farthest - nearest + margin
    there = (farthest > -torch.inf) & (nearest < torch.inf)
    active = ((losses > 0) & there).to(apart.dtype)
    times = torch.zeros_like(apart).scatter_add_(1, which, active).scatter_add_(1, other, -active)
    return Strip(losses.masked_fill(active == 0, 0).sum(), there.sum(), times)


def _semi_hard(
    apart: Tensor, positive: Tensor, negatives: Tensor, ordered: Tensor, order: Tensor, margin: float
) -> Strip:
    """For each positive pair the nearest negative that is farther than it, else the farthest negative."""
    farther = torch.searchsorted(ordered, apart, right=True)
    place = torch.where(farther < negatives, farther, negatives - 1).clamp(min=0)
    counted = positive & (negatives > 0)
    losses = (margin + apart - ordered.gather(1, place)).masked_fill(~counted, 0)
    active = (losses > 0).to(apart.dtype)
    times = active.clone().scatter_add_(1, order.gather(1, place), -active)
    return Strip((losses * active).sum(), counted.sum(), times)


def _all(apart: Tensor, positive: Tensor, negative: Tensor, ordered: Tensor, margin: float) -> Strip:
    """Every triplet; those with a loss are counted."""
    within = apart + margin
    closer = torch.searchsorted(ordered, within).masked_fill_(~positive, 0)
    running = torch.nn.functional.pad(ordered.masked_fill(ordered == torch.inf, 0).cumsum(1), (1, 0))
    losses = closer * within - running.gather(1, closer)
    reach = within.masked_fill(~positive, -torch.inf).sort(1).values
    reached = apart.shape[1] - torch.searchsorted(reach, apart, right=True)
    times = closer - reached.masked_fill_(~negative, 0)
    return Strip(losses.masked_fill(~positive, 0).sum(), closer.sum(), times.to(apart.dtype))


def strip_gradients(
    vectors: Tensor, labels: Tensor, top: int, bottom: int, kind: Kind, margin: float, distance: Distance
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the sum of some anchors' losses: of their own vectors, and of all as the others'."""
    with torch.enable_grad():
        own, others = vectors[top:bottom].detach().requires_grad_(), vectors.detach().requires_grad_()
        apart = between(own, others, distance)
    times = mined(kind, apart.detach(), labels, top, margin).times
    first, second = torch.autograd.grad(apart, (own, others), times)
    return first, second
