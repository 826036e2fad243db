"""The engine of contrastive losses: log-sums over rows and columns of similarity matrices that are never built.

A matrix is cut both ways. Each tile of it is made once a pass, and what is summed along its rows and what is summed
along its columns are folded from the same tile: a symmetric loss makes one product a tile forward and three backward
(the tile again, and its gradient to both sides). Tiles come in one order, so results are the same to the bit each time.

A log-sum is a pair (largest logit, rest), as everywhere here. A tile's part joins it without losing a small rest, and a
positive's logit is read from the tile that the sums are made of, so a loss of 1e-8 beside logits of 100 keeps its
digits. What is left out is -inf before the largest logit is looked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from logitless._heads.multiplier import multiplier
from logitless._heads.pairs_of_rows import Entries, Pairs
from logitless._heads.products import multiply
from logitless._heads.tiles import buffer, view
from logitless._heads.vectors import Vectors
from logitless._rules.transforms import values_are_readable
from logitless.kernels.interface import Backend

# A tile: products of so many rows and columns run at nearly full speed (1024 rows are 6 % faster), and all buffers of a
# pass over vectors of 512 features, with what the products pack, are less than 1 % of a matrix of 16384 rows.
TILE_ROWS = 448
TILE_COLUMNS = 512


@dataclass(frozen=True, slots=True)
class Margin:
    """Leaves out what is more alike than an anchor's own threshold: by the logits, or by a guide's vectors."""

    thresholds: Tensor
    guide: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Hardness:
    """Adds `strength` times the similarity, as a constant, to the logits of negatives.

    `own` are an anchor's own further documents: the only ones that count where `which` is "hard_negatives", and the
    only ones that do not where it is "in_batch_negatives".
    """

    which: str
    strength: float
    own: Pairs | None


@dataclass(frozen=True, slots=True)
class Rule:
    """What an anchor leaves out of a matrix, and what is added to its logits; `mask` is True where left out."""

    pairs: tuple[Pairs, ...] = ()
    mask: Tensor | None = None
    margin: Margin | None = None
    hardness: Hardness | None = None

    @property
    def changes_nothing(self) -> bool:
        """Whether logits stay as they are."""
        return not self.pairs and self.mask is None and self.margin is None and self.hardness is None


@dataclass(frozen=True, slots=True)
class Panel:
    """A matrix: the first `height` vectors of one side times the first `width` of another.

    Its rows are summed into one partition function and its columns into another, where given; column j then belongs to
    anchor j. With `paired`, the right side holds so many vectors for each row, and nobody else's.
    """

    left: int
    right: int
    height: int
    width: int
    rows: int = 0
    columns: int | None = None
    row_rule: Rule = Rule()
    column_rule: Rule | None = None  # None: the rows'
    positives: Pairs | None = None
    paired: int = 0


@dataclass(frozen=True, slots=True)
class Contrast:
    """What a contrastive loss is: of each anchor, the mean of log-partition functions minus that of positive logits.

    `normalize` is said of each matrix of vectors. `positives` counts an anchor's, and an anchor without one has a loss
    of zero. `visitors` counts the anchors of the columns, where these are not the rows'.
    """

    backend: Backend
    anchors: int
    panels: tuple[Panel, ...]
    partitions: int
    normalize: tuple[bool, ...]
    dtype: torch.dtype
    positives: Tensor
    visitors: int | None = None


class Sums(NamedTuple):
    """A log-sum of each anchor, as a pair."""

    top: Tensor
    log_sum: Tensor


class Partitions(NamedTuple):
    """Log-sums of every partition function [partitions, anchors], as pairs; and the sum of the positive logits."""

    top: Tensor
    log_sum: Tensor
    positive: Tensor

    @classmethod
    def of_nothing(cls, call: Contrast, device: torch.device) -> Partitions:
        """Return what sums start from."""
        shape = (call.partitions, call.anchors)
        top = torch.full(shape, -torch.inf, dtype=call.dtype, device=device)
        log_sum = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(top, log_sum, torch.zeros(call.anchors, dtype=torch.float64, device=device))

    def of(self, partition: int) -> Sums:
        """Return one partition function of every anchor; what is written to it is written here."""
        return Sums(self.top[partition], self.log_sum[partition])


class TileRows(NamedTuple):
    """A stretch of a panel's rows: their vectors, times the scale."""

    top: int
    bottom: int
    left: Tensor


class Tile(NamedTuple):
    """A tile's logits as its rows' anchors see them, and as its columns' do; often one tensor."""

    by_row: Tensor
    by_column: Tensor | None
    right: Tensor
    first: int
    last: int
    places: list[tuple[Entries, Tensor]]  # the positives, with their logits in float64


def fold(call: Contrast, scale: Tensor | float, vectors: Sequence[Tensor]) -> Partitions:
    """Return the partition functions of every anchor."""
    sums = Partitions.of_nothing(call, vectors[0].device)
    fold_into(call, Work(call, scale, as_sides(call, vectors, [False] * len(vectors)), gradients=False), sums)
    return sums


def fold_into(call: Contrast, work: Work, sums: Partitions, visitors: Sums | None = None) -> None:
    """Add a call's panels to the partition functions of its anchors; those of the columns are the visitors', if any."""
    for panel in call.panels:
        for rows in work.rows(panel):
            stretch = slice(rows.top, rows.bottom)
            of_rows = sums.of(panel.rows)
            for tile in work.tiles(panel, rows):
                for places, logits in tile.places:
                    places.add_to(sums.positive[stretch], logits)
                join(call.backend, tile.by_row, 1, of_rows.top[stretch], of_rows.log_sum[stretch])
                if panel.columns is not None and tile.by_column is not None:
                    along = slice(tile.first, tile.first + tile.by_column.shape[1])
                    of_columns = sums.of(panel.columns) if visitors is None else visitors
                    join(call.backend, tile.by_column, 0, of_columns.top[along], of_columns.log_sum[along])


def row_losses(call: Contrast, sums: Partitions, positives: Tensor | None = None) -> Tensor:
    """Return the loss of each anchor; the mean positive is taken off the largest logit before anything is added.

    `positives` counts an anchor's, where they are not all in the call.
    """
    counts = call.positives if positives is None else positives
    mean = sums.positive / counts.clamp(min=1)
    losses = ((sums.top.double() - mean) + sums.log_sum).mean(0)
    return losses.masked_fill(counts == 0, 0).to(call.dtype)


def gradients(
    call: Contrast,
    scale: Tensor | float,
    vectors: Sequence[Tensor],
    sums: Partitions,
    upstream: Tensor,
    needed: Sequence[bool],
    *,
    needs_scale: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of the scale and of the vectors, given one upstream gradient an anchor."""
    work = Work(call, scale, as_sides(call, vectors, needed), gradients=True)
    to_scale = gradients_into(call, work, Shares.of_call(call, sums, upstream), needs_scale=needs_scale)
    return to_scale / work.scale if needs_scale else None, [each.finish() for each in work.vectors]


def gradients_into(
    call: Contrast, work: Work, shares: Shares, visitors: Side | None = None, *, needs_scale: bool
) -> Tensor:
    """Add to the gradients of the vectors, where they are wanted; return the scale's, times the scale.

    `visitors` are the anchors of the columns, where these are not the rows'.
    """
    to_scale = torch.zeros((), dtype=torch.float64, device=shares.share.device)
    for panel in call.panels:
        wants_left = needs_scale or work.vectors[panel.left].gradient is not None
        if not (wants_left or work.vectors[panel.right].gradient is not None):
            continue
        for rows in work.rows(panel):
            row_sums = shares.of(panel.rows).part(rows.top, rows.bottom)
            to_left = work.side(panel, rows) if wants_left else None
            for tile in work.tiles(panel, rows):
                column_sums = None
                if panel.columns is not None and tile.by_column is not None:
                    of_columns = shares.of(panel.columns) if visitors is None else visitors
                    column_sums = of_columns.part(tile.first, tile.first + tile.by_column.shape[1])
                gradient = work.softmaxes(tile, row_sums, column_sums)
                for places, logits in tile.places:
                    taken = shares.per_positive[places.rows + rows.top]
                    places.write(gradient, _of_positives(places, logits, taken, row_sums, column_sums))
                work.take(panel, rows, tile, gradient, to_left)
            if to_left is not None:
                if needs_scale:
                    to_scale += (rows.left * to_left).sum(1, dtype=torch.float64).sum()
                work.add_left(panel, rows, to_left)
    return to_scale


class Side(NamedTuple):
    """Log-sums of a tile's rows, or of its columns, and what each gives of its upstream gradient."""

    top: Tensor
    log_sum: Tensor
    share: Tensor

    def part(self, first: int, last: int) -> Side:
        """Return those of some anchors."""
        return Side(self.top[first:last], self.log_sum[first:last], self.share[first:last])


class Shares(NamedTuple):
    """Log-sums of every partition function, and what of its upstream gradient each of them, and a positive, gets."""

    top: Tensor
    log_sum: Tensor
    share: Tensor
    per_positive: Tensor

    @classmethod
    def of_call(cls, call: Contrast, sums: Partitions, upstream: Tensor) -> Shares:
        """Return them, given one upstream gradient an anchor."""
        # An anchor that counts for nothing may have no logit at all: its probabilities are then exp(-inf - 0).
        idle = (call.positives == 0) | (sums.top == -torch.inf)
        given = upstream.double().masked_fill(call.positives == 0, 0)
        return cls(
            sums.top.masked_fill(idle, 0),
            sums.log_sum.masked_fill(idle, 0),
            (given / call.partitions).to(call.dtype),
            given / call.positives.clamp(min=1),
        )

    def of(self, partition: int) -> Side:
        """Return one partition function."""
        return Side(self.top[partition], self.log_sum[partition], self.share)


def _of_positives(places: Entries, logits: Tensor, taken: Tensor, rows: Side, columns: Side | None) -> Tensor:
    """Return the gradient of positive logits, p - 1 of a sure one without cancellation.

    It is g_r p_r + g_c p_c - g = g_r (p_r - 1) + g_c (p_c - 1) + (g_r + g_c - g), and the last bracket is 0 where the
    sums are all that there are.
    """

    def less_one(side: Side, which: Tensor) -> tuple[Tensor, Tensor]:
        share = side.share[which].double()
        return share * torch.expm1((logits - side.top[which].double()) - side.log_sum[which]), share

    gradient, rest = less_one(rows, places.rows)
    rest = rest - taken
    if columns is not None:
        inside = places.columns < len(columns.top)
        more, share = less_one(columns, places.columns.clamp(max=len(columns.top) - 1))
        gradient = gradient + more.masked_fill(~inside, 0)
        rest = rest + share.masked_fill(~inside, 0)
    # The shares were rounded on their way to the kernel: what is left of nothing is nothing.
    return gradient + rest.masked_fill(rest.abs() <= 4 * torch.finfo(rows.share.dtype).eps * taken.abs(), 0)


def join(backend: Backend, tile: Tensor, along: int, top: Tensor, log_sum: Tensor) -> None:
    """Add a tile's log-sums along a dimension to those that are there, in place."""
    stats = backend.row_stats(tile, class_dim=along)
    join_sums(Sums(top, log_sum), Sums(stats.row_max, stats.log_sum))


def join_sums(into: Sums, other: Sums) -> None:
    """Add log-sums to those that are there, in place."""
    largest = torch.maximum(into.top, other.top)

    def shifted(their: Sums) -> Tensor:
        none = their.top == -torch.inf
        return (their.log_sum + (their.top.double() - largest.double())).masked_fill(none, -torch.inf)

    joined = torch.logaddexp(shifted(into), shifted(other))
    into.log_sum.copy_(joined.masked_fill(largest == -torch.inf, 0))
    into.top.copy_(largest)


def as_sides(call: Contrast, vectors: Sequence[Tensor], needed: Sequence[bool]) -> list[Vectors]:
    """Return a call's vectors as factors, with room for the gradients that are needed."""
    return [
        Vectors(call.backend, given, call.dtype, normalize=normalize, wanted=want)
        for given, normalize, want in zip(vectors, call.normalize, needed, strict=True)
    ]


class Work:
    """The buffers of a pass, the vectors, and what their gradients add up to."""

    def __init__(
        self,
        call: Contrast,
        scale: Tensor | float,
        vectors: Sequence[Vectors],
        *,
        gradients: bool,
    ) -> None:
        backend, dtype = call.backend, call.dtype
        self.scale = scale if isinstance(scale, float) else backend.scalar(scale.detach().to(dtype))
        self._backend, self._call = backend, call
        self._column_anchors = call.anchors if call.visitors is None else call.visitors
        self.vectors = vectors
        features, device = vectors[0].given.shape[1], vectors[0].given.device
        self._products = multiplier(backend, dtype, features)
        self._reads = backend.READS_VALUES and values_are_readable(vectors[0].given)
        sides = [_shape(panel) for panel in call.panels]
        rows, columns = max(side[0] for side in sides), max(side[1] for side in sides)
        numbers = max(height * width for height, width in sides)
        self._logits = buffer(backend, numbers, dtype, device)
        both = any(panel.columns is not None for panel in call.panels)
        two_rules = any(panel.column_rule is not None for panel in call.panels)
        self._spare = buffer(backend, numbers, dtype, device) if two_rules or (both and gradients) else None
        self._left = buffer(backend, rows * features, dtype, device)
        self._right = buffer(backend, columns * features, dtype, device)
        self._side = buffer(backend, rows * features if gradients else 0, dtype, device)
        self._guide: Tensor | None = None
        self._guides: dict[int, Vectors] = {}

    def rows(self, panel: Panel) -> Iterator[TileRows]:
        """Yield a panel's rows, a stretch at a time."""
        step = _shape(panel)[0]
        for top in range(0, panel.height, step):
            bottom = min(top + step, panel.height)
            yield TileRows(top, bottom, self.vectors[panel.left].block(top, bottom, self._left, self.scale))

    def tiles(self, panel: Panel, rows: TileRows) -> Iterator[Tile]:
        """Yield the tiles of these rows."""
        step = panel.paired or _shape(panel)[1]
        right_side = self.vectors[panel.right]
        for first in range(0, panel.width, step):
            last = min(first + step, panel.width)
            logits = view(self._logits, (rows.bottom - rows.top, last - first))
            if panel.paired:
                right = right_side.block(rows.top * step, rows.bottom * step, None).view(-1, step, rows.left.shape[1])
                torch.bmm(right, rows.left.unsqueeze(2), out=logits.unsqueeze(2))
            else:
                right = right_side.block(first, last, self._right)
                multiply(self._products, rows.left, right.T, logits)
            found = (
                ()
                if panel.positives is None
                else panel.positives.within(rows.top, rows.bottom, first, last, logits.device, reads=self._reads)
            )
            places = [(each, each.of(logits).double()) for each in found]
            by_column, columns = None, min(last, self._column_anchors) - first
            if panel.columns is not None and columns > 0:
                by_column = logits
                if panel.column_rule is not None:
                    assert self._spare is not None
                    by_column = view(self._spare, tuple(logits.shape)).copy_(logits)
                    self._edit(panel, panel.column_rule, rows, first, by_column, 0, places)
            self._edit(panel, panel.row_rule, rows, first, logits, 1, places)
            by_column = None if by_column is None else by_column[:, :columns]
            yield Tile(logits, by_column, right, first, last, places)

    def _edit(
        self,
        panel: Panel,
        rule: Rule,
        rows: TileRows,
        first: int,
        logits: Tensor,
        along: int,
        places: Sequence[tuple[Entries, Tensor]],
    ) -> None:
        """Leave out and add what an anchor's rule says, and put its positives back."""
        guide = None
        if rule.margin is not None and rule.margin.guide is not None:
            guide = self._guided(panel, rule.margin.guide, rows, first, logits)
        edit(rule, logits, self.scale, rows.top, first, along, guide, reads=self._reads)
        if not rule.changes_nothing:
            for each, kept in places:
                each.write(logits, kept)

    def _guided(self, panel: Panel, guide: tuple[Tensor, Tensor], rows: TileRows, first: int, logits: Tensor) -> Tensor:
        """Return a tile of the guide's similarities."""
        sides = []
        for given in guide:
            if id(given) not in self._guides:
                self._guides[id(given)] = Vectors(self._backend, given, self._call.dtype, normalize=True)
            sides.append(self._guides[id(given)])
        left = sides[0].block(rows.top, rows.bottom, None)
        if panel.paired:
            right = sides[1].block(rows.top * panel.paired, rows.bottom * panel.paired, None)
            return torch.bmm(right.view(len(left), panel.paired, -1), left.unsqueeze(2)).squeeze(2)
        if self._guide is None:
            self._guide = torch.empty_like(self._logits)
        tile = view(self._guide, tuple(logits.shape))
        multiply(self._products, left, sides[1].block(first, first + logits.shape[1], None).T, tile)
        return tile

    def softmaxes(self, tile: Tile, rows: Side, columns: Side | None) -> Tensor:
        """Return the gradient of a tile's logits but for its positives: its own memory again."""
        backend, by_row, by_column = self._backend, tile.by_row, tile.by_column
        if columns is None or by_column is None:
            return _softmax(backend, by_row, 1, rows, by_row)
        apart = by_row
        if by_column.data_ptr() == by_row.data_ptr():
            assert self._spare is not None
            apart = view(self._spare, tuple(by_row.shape))
        _softmax(backend, by_row, 1, rows, apart)
        _softmax(backend, by_column, 0, columns, by_column)
        apart[:, : by_column.shape[1]] += by_column
        return apart

    def side(self, panel: Panel, rows: TileRows) -> Tensor:
        """Return where the gradient of a stretch of rows adds up."""
        return view(self._side, tuple(rows.left.shape)).zero_()

    def take(self, panel: Panel, rows: TileRows, tile: Tile, gradient: Tensor, to_left: Tensor | None) -> None:
        """Take a tile's gradient back to both sides."""
        to_right = self.vectors[panel.right].gradient
        if panel.paired:
            if to_left is not None:
                to_left += torch.bmm(gradient.unsqueeze(1), tile.right).squeeze(1)
            if to_right is not None:
                own = to_right[rows.top * panel.paired : rows.bottom * panel.paired].view(tile.right.shape)
                own += gradient.unsqueeze(2) * rows.left.unsqueeze(1)
            return
        if to_left is not None:
            multiply(self._products, gradient, tile.right, to_left, accumulate=True)
        if to_right is not None:
            multiply(self._products, gradient.T, rows.left, to_right[tile.first : tile.last], accumulate=True)

    def add_left(self, panel: Panel, rows: TileRows, to_left: Tensor) -> None:
        """Add what a stretch of rows has: of the vectors before they were scaled."""
        total = self.vectors[panel.left].gradient
        if total is not None:
            total[rows.top : rows.bottom] += to_left.mul_(self.scale)


def edit(
    rule: Rule,
    logits: Tensor,
    scale: Tensor | float,
    top: int,
    first: int,
    along: int,
    guide: Tensor | None,
    *,
    reads: bool,
) -> None:
    """Leave out of a tile what a rule says, and add to it, in place; `along` 1: the rows are the anchors."""
    height, width = logits.shape
    bottom, last = top + height, first + width
    left_out = None
    if rule.margin is not None:
        of_anchors = rule.margin.thresholds[top:bottom] if along else rule.margin.thresholds[first:last]
        if not along and len(of_anchors) < width:  # columns that are nobody's
            of_anchors = torch.nn.functional.pad(of_anchors, (0, width - len(of_anchors)), value=torch.inf)
        thresholds = of_anchors.unsqueeze(along)
        left_out = logits > thresholds * scale if guide is None else guide > thresholds
    if rule.hardness is not None:
        _harden(rule.hardness, logits, scale, top, first, reads=reads)
    if left_out is not None:
        logits.masked_fill_(left_out, -torch.inf)
    if rule.mask is not None:
        mask = rule.mask[first:last] if rule.mask.dim() == 1 else rule.mask[top:bottom, first:last]
        logits.masked_fill_(mask, -torch.inf)
    for pairs in rule.pairs:
        for places in pairs.within(top, bottom, first, last, logits.device, reads=reads):
            places.fill(logits, -torch.inf)


def _harden(hardness: Hardness, logits: Tensor, scale: Tensor | float, top: int, first: int, *, reads: bool) -> None:
    own: list[tuple[Entries, Tensor]] = []
    if hardness.own is not None:
        bottom, last = top + logits.shape[0], first + logits.shape[1]
        found = hardness.own.within(top, bottom, first, last, logits.device, reads=reads)
        own = [(places, places.of(logits)) for places in found]
    factor = 1 + hardness.strength / scale
    if hardness.which == "hard_negatives":
        for places, values in own:
            places.write(logits, values * factor)
        return
    logits.mul_(factor)
    if hardness.which == "in_batch_negatives":
        for places, values in own:
            places.write(logits, values)


def _softmax(backend: Backend, logits: Tensor, along: int, side: Side, out: Tensor) -> Tensor:
    """Write each row's (column's) probabilities times what it gives."""
    return backend.row_grad(logits, side.top, side.log_sum, class_dim=along, upstream=side.share, a_scale=1.0, out=out)


def _shape(panel: Panel) -> tuple[int, int]:
    """Return the rows and columns of a panel's tiles."""
    if panel.paired:
        return max(1, min(panel.height, TILE_ROWS // panel.paired)), panel.paired
    return max(1, min(panel.height, TILE_ROWS)), max(1, min(panel.width, TILE_COLUMNS))
