"""A yes or no for each entry of a similarity matrix that is never built: SigLIP's loss, tile by tile.

The logit of a pair is turned round, so that every entry is softplus(x): one read of a tile, and no entry is added that
is taken off again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from logitless._heads.square import Contrast, Panel, Tile, TileRows, Work, as_sides
from logitless.kernels.interface import ElementLoss

_LOSS: ElementLoss = "binary_cross_entropy_with_logits"


class SigmoidGradients(NamedTuple):
    """Gradients of the scale, the bias and the vectors; None: not asked for."""

    scale: Tensor | None
    bias: Tensor | None
    vectors: list[Tensor | None]


def softplus_sum(call: Contrast, scale: Tensor | float, bias: Tensor | float, vectors: Sequence[Tensor]) -> Tensor:
    """Return the sum of all entries' losses, in float64."""
    work = Work(call, scale, as_sides(call, vectors, [False] * len(vectors)), gradients=False)
    return sum_of_panels(call, work, bias)


def sum_of_panels(call: Contrast, work: Work, bias: Tensor | float) -> Tensor:
    """Return the sum of the losses of a call's entries, in float64."""
    total = torch.zeros((), dtype=torch.float64, device=work.vectors[0].given.device)
    for panel in call.panels:
        for rows in work.rows(panel):
            for tile, zeros in _turned(work, panel, rows, bias):
                total += call.backend.elements_sum(_LOSS, tile.by_row, zeros)[0]
    return total


def softplus_gradients(
    call: Contrast,
    scale: Tensor | float,
    bias: Tensor | float,
    vectors: Sequence[Tensor],
    upstream: Tensor,
    needed: Sequence[bool],
    *,
    needs_scale: bool,
    needs_bias: bool,
) -> SigmoidGradients:
    """Return the gradients, given that of the sum."""
    work = Work(call, scale, as_sides(call, vectors, needed), gradients=True)
    to_scale, to_bias = gradients_of_panels(call, work, bias, upstream, needs_scale=needs_scale, needs_bias=needs_bias)
    return SigmoidGradients(
        to_scale / work.scale if needs_scale else None,
        to_bias if needs_bias else None,
        [each.finish() for each in work.vectors],
    )


def gradients_of_panels(
    call: Contrast, work: Work, bias: Tensor | float, upstream: Tensor, *, needs_scale: bool, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """Add to the gradients of the vectors, where wanted; return the scale's, times the scale, and the bias's."""
    to_scale, to_bias = (torch.zeros((), dtype=torch.float64, device=upstream.device) for _ in range(2))
    given = call.backend.scalar(upstream)
    for panel in call.panels:
        for rows in work.rows(panel):
            wants_left = needs_scale or work.vectors[panel.left].gradient is not None
            to_left = work.side(panel, rows) if wants_left else None
            for tile, zeros in _turned(work, panel, rows, bias):
                z = tile.by_row
                gradient = call.backend.elements_grad(_LOSS, z, zeros, scale=given, out=z)
                for places, _ in tile.places:
                    places.write(gradient, -places.of(gradient))
                if needs_bias:
                    to_bias += gradient.sum(1, dtype=torch.float64).sum()
                work.take(panel, rows, tile, gradient, to_left)
            if to_left is not None:
                if needs_scale:
                    to_scale += (rows.left * to_left).sum(1, dtype=torch.float64).sum()
                work.add_left(panel, rows, to_left)
    return to_scale, to_bias


def _turned(work: Work, panel: Panel, rows: TileRows, bias: Tensor | float) -> Iterator[tuple[Tile, Tensor]]:
    """Yield tiles whose pairs' logits are turned round, each with a zero for all: the answer of every entry is no."""
    for tile in work.tiles(panel, rows):
        z = tile.by_row
        z += bias
        for places, _ in tile.places:
            places.write(z, -places.of(z))
        yield tile, z.new_zeros(()).expand(z.shape)
