"""Contrastive losses across a process group: a rank's own anchors, against everybody's vectors.

A rank's own part is the call of one process. Then its anchors meet the vectors of other ranks, a block at a time. The
log-sums of its anchors stay at home; those of a block's columns travel with it, so both directions of a symmetric loss
are folded from one tile here too: four products of own rows times everybody's, forward and backward, where a rank that
made its second direction from rows of its own would make eight. In the backward pass a block travels again, with its
columns' log-sums and upstream gradients, and its own gradient comes home complete. Nothing is kept between the passes
but a rank's own vectors and a few numbers an anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from logitless._heads.exchange import Growth, Layout, Load, Peers, exchange
from logitless._heads.pairs_of_rows import SameLabel
from logitless._heads.sigmoid import gradients_of_panels, sum_of_panels
from logitless._heads.square import (
    Contrast,
    Hardness,
    Margin,
    Panel,
    Partitions,
    Rule,
    Shares,
    Side,
    Sums,
    Work,
    as_sides,
    fold_into,
    gradients_into,
    join_sums,
)
from logitless._heads.vectors import Vectors

# The kinds of rows, which are also the places of the vectors in a call.
ANCHORS, KEYS, NEGATIVES = range(3)


@dataclass(frozen=True, slots=True)
class Abroad:
    """What anchors see of the vectors of other ranks.

    `travels` says which of query, key and negatives do, and `wanted` whose gradients come home. `columns` is the
    partition function of the visitors' anchors, where they have one here; `documents` are the kinds that an anchor's
    own document sees. A margin has a threshold for each anchor, and a guide its vectors. Labels are of queries and of
    keys; `absent` is said of negatives, and `owned` of those that are each some query's.
    """

    travels: tuple[bool, ...]
    wanted: tuple[bool, ...]
    columns: int | None = None
    documents: tuple[int, ...] = ()
    thresholds: Tensor | None = None
    guides: tuple[Tensor | None, ...] | None = None
    labels: tuple[Tensor, Tensor] | None = None
    absent: Tensor | None = None
    hardness: tuple[str, float] | None = None
    owned: bool = False

    def loads(self, vectors: Sequence[Tensor]) -> list[Load]:
        """Return what a rank sends of its own."""
        moving = [kind for kind, travels in enumerate(self.travels) if travels]
        loads = [Load(vectors[kind], kind) for kind in moving]
        if self.guides is not None:
            loads += [Load(guide, kind) for kind in moving if (guide := self.guides[kind]) is not None]
        if self.thresholds is not None and self.columns is not None:
            loads.append(Load(self.thresholds, ANCHORS))
        if self.labels is not None:
            loads.append(Load(self.labels[1], KEYS))
        if self.absent is not None:
            loads.append(Load(self.absent, NEGATIVES))
        return loads

    def block(self, own: Contrast, home: int, layout: Layout, tensors: Sequence[Tensor]) -> Block:
        """Return the call of own anchors and visitors; `home` matrices of vectors are one's own."""
        arrived = iter(tensors)
        moving = [kind for kind, travels in enumerate(self.travels) if travels]
        vectors = [next(arrived) for _ in moving]
        guides: dict[int, Tensor] = {}
        if self.guides is not None:
            guides = {kind: next(arrived) for kind in moving if self.guides[kind] is not None}
        theirs = next(arrived) if self.thresholds is not None and self.columns is not None else None
        labels = next(arrived) if self.labels is not None else None
        absent = next(arrived) if self.absent is not None else None
        places = {kind: home + place for place, kind in enumerate(moving)}
        rows = own.anchors

        def rule(left: int, kind: int, *, mask: Tensor | None = None, hardness: Hardness | None = None) -> Rule:
            return Rule((), mask, self._margin(self.thresholds, left, guides.get(kind)), hardness)

        panels = []
        if KEYS in places:
            hard = self._hardness(KEYS)
            plain = rule(ANCHORS, KEYS)
            column_rule = None
            if self.columns is not None and (theirs is not None or hard is not None):
                column_rule = Rule((), None, self._margin(theirs, ANCHORS, guides.get(KEYS)))
            panels.append(
                Panel(
                    ANCHORS,
                    places[KEYS],
                    rows,
                    layout.count(KEYS),
                    columns=self.columns,
                    row_rule=replace(plain, hardness=hard),
                    column_rule=column_rule,
                    positives=None if self.labels is None or labels is None else SameLabel(self.labels[0], labels),
                )
            )
        if NEGATIVES in places:
            width = layout.count(NEGATIVES)
            hard = self._hardness(NEGATIVES)
            panels.append(
                Panel(
                    ANCHORS,
                    places[NEGATIVES],
                    rows,
                    width,
                    row_rule=rule(ANCHORS, NEGATIVES, mask=absent, hardness=hard),
                )
            )
        if ANCHORS in places:
            panels.append(Panel(ANCHORS, places[ANCHORS], rows, layout.count(ANCHORS), row_rule=rule(ANCHORS, ANCHORS)))
        for kind in self.documents:
            row_rule = rule(KEYS, kind, mask=absent if kind == NEGATIVES else None)
            panels.append(Panel(KEYS, places[kind], rows, layout.count(kind), row_rule=row_rule))
        normalize = own.normalize[:1] * len(moving)
        call = replace(
            own,
            panels=tuple(panels),
            normalize=(*own.normalize, *normalize),
            visitors=layout.first_part(KEYS) if self.columns is not None else None,
        )
        return Block(call, vectors, moving)

    def _margin(self, thresholds: Tensor | None, left: int, visiting: Tensor | None) -> Margin | None:
        if thresholds is None:
            return None
        own = None if self.guides is None else self.guides[left]
        return Margin(thresholds, None if own is None or visiting is None else (own, visiting))

    def _hardness(self, kind: int) -> Hardness | None:
        """Return what is added to the logits of visitors; none is an anchor's own further document."""
        if self.hardness is None:
            return None
        which, strength = self.hardness
        # What is shared by all is everybody's own: no negative of the batch.
        idle = "in_batch_negatives" if kind == NEGATIVES and not self.owned else "hard_negatives"
        return None if which == idle else Hardness("all_negatives", strength, None)


class Block(NamedTuple):
    """Own anchors against visitors: the call, the visiting vectors, and of which kind each is."""

    call: Contrast
    vectors: list[Tensor]
    kinds: list[int]

    def sides(self, gradients: dict[int, Tensor]) -> list[Vectors]:
        """Return the visiting vectors as factors, with these as their gradients."""
        made = []
        for kind, given in zip(self.kinds, self.vectors, strict=True):
            normalize = self.call.normalize[-1]
            side = Vectors(self.call.backend, given, self.call.dtype, normalize=normalize)
            side.gradient = gradients.get(kind)
            made.append(side)
        return made


@dataclass(frozen=True, slots=True)
class Across:
    """A contrastive loss over a group: the call of one's own vectors, what is seen of others', and who these are."""

    own: Contrast
    abroad: Abroad
    peers: Peers


def fold_across(call: Across, scale: Tensor | float, vectors: Sequence[Tensor]) -> tuple[Partitions, Tensor]:
    """Return the partition functions of own anchors, and how many positives each has anywhere."""
    own, abroad, device = call.own, call.abroad, vectors[0].device
    home = as_sides(own, vectors, [False] * len(vectors))
    sums = Partitions.of_nothing(own, device)
    fold_into(own, Work(own, scale, home, gradients=False), sums)
    counts = own.positives.clone()

    def visit(layout: Layout, tensors: list[Tensor], growing: list[Tensor]) -> None:
        block = abroad.block(own, len(home), layout, tensors)
        visitors = Sums(*growing) if growing else None
        fold_into(block.call, Work(block.call, scale, [*home, *block.sides({})], gradients=False), sums, visitors)
        if block.call.panels[0].positives is not None:
            counts.add_(block.call.panels[0].positives.counts(own.anchors, layout.count(KEYS), device))

    def merge(grown: list[Tensor]) -> None:
        assert abroad.columns is not None
        join_sums(sums.of(abroad.columns), Sums(*grown))

    grown = []
    if abroad.columns is not None:
        grown = [Growth(ANCHORS, (), own.dtype, -torch.inf), Growth(ANCHORS, (), torch.float64, 0.0)]
    exchange(call.peers, abroad.loads(vectors), grown, device, visit, merge)
    return sums, counts


def gradients_across(
    call: Across,
    scale: Tensor | float,
    vectors: Sequence[Tensor],
    sums: Partitions,
    counts: Tensor,
    upstream: Tensor,
    needed: Sequence[bool],
    *,
    needs_scale: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return this rank's share of the scale's gradient, and the whole gradient of its own vectors."""
    own, abroad, device = replace(call.own, positives=counts), call.abroad, vectors[0].device
    home = as_sides(own, vectors, needed)
    shares = Shares.of_call(own, sums, upstream)
    work = Work(own, scale, home, gradients=True)
    to_scale = gradients_into(own, work, shares, needs_scale=needs_scale)
    number = work.scale
    del work  # its buffers
    loads = abroad.loads(vectors)
    first = len(loads)
    if abroad.columns is not None:
        loads += [Load(each, ANCHORS) for each in shares.of(abroad.columns)]
    returning = [kind for kind, travels in enumerate(abroad.travels) if travels and abroad.wanted[kind]]

    def visit(layout: Layout, tensors: list[Tensor], growing: list[Tensor]) -> None:
        block = abroad.block(own, len(home), layout, tensors)
        visitors = Side(*tensors[first:]) if abroad.columns is not None else None
        sides = block.sides(dict(zip(returning, growing, strict=True)))
        there = Work(block.call, scale, [*home, *sides], gradients=True)
        to_scale.add_(gradients_into(block.call, there, shares, visitors, needs_scale=needs_scale))

    def merge(grown: list[Tensor]) -> None:
        for kind, gradient in zip(returning, grown, strict=True):
            total = home[kind].gradient
            if total is not None:
                total += gradient

    grown = [Growth(kind, (vectors[kind].shape[1],), own.dtype, 0.0) for kind in returning]
    exchange(call.peers, loads, grown, device, visit, merge)
    return to_scale / number if needs_scale else None, [each.finish() for each in home]


class SigmoidShares(NamedTuple):
    """This rank's shares of the gradients of scale and bias, and whole gradients of its own vectors."""

    scale: Tensor | None
    bias: Tensor | None
    vectors: list[Tensor | None]


def softplus_sum_across(call: Across, scale: Tensor | float, bias: Tensor | float, vectors: Sequence[Tensor]) -> Tensor:
    """Return the sum of the losses of own rows with everybody's columns, in float64."""
    own, abroad = call.own, call.abroad
    home = as_sides(own, vectors, [False] * len(vectors))
    total = sum_of_panels(own, Work(own, scale, home, gradients=False), bias)

    def visit(layout: Layout, tensors: list[Tensor], growing: list[Tensor]) -> None:
        block = abroad.block(own, len(home), layout, tensors)
        work = Work(block.call, scale, [*home, *block.sides({})], gradients=False)
        total.add_(sum_of_panels(block.call, work, bias))

    exchange(call.peers, abroad.loads(vectors), [], vectors[0].device, visit, lambda grown: None)
    return total


def softplus_gradients_across(
    call: Across,
    scale: Tensor | float,
    bias: Tensor | float,
    vectors: Sequence[Tensor],
    upstream: Tensor,
    needed: Sequence[bool],
    *,
    needs_scale: bool,
    needs_bias: bool,
) -> SigmoidShares:
    """Return the gradients, given that of the sum."""
    own, abroad = call.own, call.abroad
    home = as_sides(own, vectors, needed)
    options = {"needs_scale": needs_scale, "needs_bias": needs_bias}
    work = Work(own, scale, home, gradients=True)
    numbers = list(gradients_of_panels(own, work, bias, upstream, **options))
    factor = work.scale
    del work  # its buffers

    def visit(layout: Layout, tensors: list[Tensor], growing: list[Tensor]) -> None:
        block = abroad.block(own, len(home), layout, tensors)
        sides = block.sides({KEYS: growing[0]} if growing else {})
        there = Work(block.call, scale, [*home, *sides], gradients=True)
        for total, more in zip(numbers, gradients_of_panels(block.call, there, bias, upstream, **options), strict=True):
            total.add_(more)

    def merge(grown: list[Tensor]) -> None:
        total = home[KEYS].gradient
        if total is not None:
            total += grown[0]

    grown = [Growth(KEYS, (vectors[KEYS].shape[1],), own.dtype, 0.0)] if abroad.wanted[KEYS] else []
    exchange(call.peers, abroad.loads(vectors), grown, vectors[0].device, visit, merge)
    return SigmoidShares(
        numbers[0] / factor if needs_scale else None,
        numbers[1] if needs_bias else None,
        [each.finish() for each in home],
    )
