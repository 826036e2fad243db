"""Losses of triplets as a differentiable operation: mined again in the backward pass, so that no matrix is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from logitless._heads.triplets import Distance, Kind, between, distances, mined, strip_gradients, strips
from logitless._rules.derivatives import needs_plain_backward, plain_backward
from logitless._rules.transforms import transform_reason


def triplets(vectors: Tensor, labels: Tensor, kind: Kind, margin: float, distance: Distance) -> Tensor:
    """Return the mean loss of a batch's triplets; the vectors, in float64, get a gradient."""
    if transform_reason(vectors) is not None:
        return definition(vectors, labels, kind, margin, distance)
    loss: Tensor = _Triplets.apply(vectors, labels, kind, margin, distance)  # type: ignore[no-untyped-call] # torch types it not
    return loss


class _Triplets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, labels: Tensor, kind: Kind, margin: float, distance: Distance) -> Tensor:
        total = vectors.new_zeros(())
        counted = torch.zeros((), dtype=torch.int64, device=vectors.device)
        for top, bottom in strips(len(vectors)):
            strip = mined(kind, distances(vectors, top, bottom, distance), labels, top, margin)
            total += strip.total
            counted += strip.counted
        ctx.save_for_backward(vectors, labels, counted)
        ctx.options = kind, margin, distance
        return total / counted.clamp(min=1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        vectors, labels, counted = ctx.saved_tensors
        kind, margin, distance = ctx.options
        if needs_plain_backward(grad_output):

            def value(x: Tensor) -> tuple[Tensor]:
                return (definition(x, labels, kind, margin, distance),)

            return plain_backward(value, [vectors], [True], [grad_output])[0], None, None, None, None
        gradient = torch.zeros_like(vectors)
        for top, bottom in strips(len(vectors)):
            own, others = strip_gradients(vectors, labels, top, bottom, kind, margin, distance)
            gradient[top:bottom] += own
            gradient += others
        return gradient * (grad_output / counted.clamp(min=1)), None, None, None, None


def definition(vectors: Tensor, labels: Tensor, kind: Kind, margin: float, distance: Distance) -> Tensor:
    """Return the same from the matrix of distances, which is built: each as often as its triplets count it."""
    apart = between(vectors, vectors, distance) if distance == "cosine" else _euclidean(vectors)
    strip = mined(kind, apart.detach(), labels, 0, margin)
    linear = strip.times * apart
    total = linear.sum()
    # The margins are constants: what the strip's sum has beside its distances.
    return (total + (strip.total - total.detach())) / strip.counted.clamp(min=1)


def _euclidean(vectors: Tensor) -> Tensor:
    """Return all distances, differentiable as often as asked: torch differentiates `cdist` once.

    The numbers are `between`'s, and the derivatives those of the products that squared distances are made of.
    """
    apart = between(vectors.detach(), vectors.detach(), "euclidean")
    squares = vectors.square().sum(1)
    squared = squares.unsqueeze(1) + squares - 2 * vectors @ vectors.T
    exact = apart.square() + (squared - squared.detach())
    return torch.where(apart > 0, exact, 1).sqrt() * (apart > 0)
