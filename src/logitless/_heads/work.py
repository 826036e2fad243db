"""The works of `sweep`: what a backend's kernels compute of a tile of logits, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from logitless._heads.tiles import Backward, Tile, stretch
from logitless._rules.reduction import as_number
from logitless._rules.transforms import values_are_readable
from logitless.kernels.interface import Backend, Divergence, ElementLoss, RowStats, times_zero_safe

# No row of a tile is ignored: those were left out before the tile was made.
NO_INDEX = torch.iinfo(torch.int64).min


def each_row(upstream: Tensor | float, like: Tensor) -> Tensor:
    """Return an upstream gradient a row: the one that is there, or one number for all rows."""
    if isinstance(upstream, Tensor):
        return upstream if upstream.dim() else upstream.to(like.dtype).expand_as(like)
    return torch.full_like(like, upstream)


def statistics_kept(
    stats: RowStats,
    *,
    entropy: Tensor | None = None,
    dense_sum: Tensor | None = None,
    dense_mass: Tensor | None = None,
) -> RowStats:
    """Return what a gradient needs of a tile's statistics, and no output that the caller may write to."""
    return RowStats(stats.row_max, stats.log_sum, None, None, entropy, None, None, None, dense_sum, dense_mass, -1)


@dataclass(frozen=True, slots=True)
class CrossEntropyWork:
    """Cross-entropy of rows with class indices, or with probabilities [rows, classes]; outputs: loss, row weight."""

    backend: Backend
    classes: int
    indices: Tensor | None
    ignore_index: int  # NO_INDEX where no row has it
    row_weight: Tensor | None  # of index targets, where rows differ: by class weight, or since some are ignored
    probabilities: Tensor | None
    class_weight: Tensor | None
    smoothing: float

    @property
    def class_major(self) -> bool:
        """Probabilities lie as the user gave them."""
        return self.probabilities is None

    extra_bytes: ClassVar[int] = 0
    reads_logits: ClassVar[bool] = True
    narrows: ClassVar[bool] = True

    def forward(self, tiles: Sequence[Tile], start: int, stop: int) -> tuple[tuple[Tensor, ...], RowStats]:
        """Return loss and row weight."""
        stats = self.part(tiles[0], start, stop, 0, self.classes)
        return self._outputs(stats, start, stop), statistics_kept(stats, dense_mass=stats.dense_mass)

    def part(self, tile: Tile, start: int, stop: int, first: int, last: int) -> RowStats:
        """Return the statistics of some classes; the nll is of rows whose target is among them, else 0."""
        whole = last - first == self.classes
        indices = None if self.indices is None else stretch(self.indices, start, stop)
        stats = self.backend.row_stats(
            tile.logits,
            indices if whole else None,
            class_dim=tile.class_dim,
            ignore_index=self.ignore_index,
            class_weight=None if self.class_weight is None else self.class_weight[first:last],
            dense_target=self._probabilities(tile, start, stop, first, last),
            smooth=self.smoothing > 0,
        )
        if whole or indices is None:
            return stats
        inside = (indices >= first) & (indices < last)
        place = torch.where(inside, indices - first, 0).unsqueeze(tile.class_dim)
        at_target = tile.logits.gather(tile.class_dim, place).squeeze(tile.class_dim).to(stats.row_max.dtype)
        return stats._replace(nll=torch.where(inside, at_target, 0))  # the logit, until `combine` has the row's lse

    def combine(
        self, parts: Sequence[RowStats], ranges: Sequence[tuple[int, int]], start: int, stop: int
    ) -> tuple[tuple[Tensor, ...], RowStats]:
        """Return what all classes together give: lse = top + log1p(what the parts hold beyond the top)."""
        real = parts[0].row_max.dtype
        tops = torch.stack([part.row_max.double() for part in parts])
        sums = torch.stack([part.log_sum for part in parts])
        top, at = tops.max(0)
        # Of the part that has the top all but the top; of the others everything. A part of -inf alone has nothing.
        masses = torch.exp(tops - top + sums.nan_to_num(nan=0.0)).masked_fill(torch.isneginf(tops), 0)
        beyond = torch.expm1(sums.gather(0, at.unsqueeze(0)))
        masses = masses.scatter(0, at.unsqueeze(0), beyond)
        broken = (torch.isnan(sums) & ~torch.isneginf(tops)).any(0) | torch.isinf(top)
        log_sum = torch.log1p(masses.sum(0)).masked_fill(broken, torch.nan)
        nll = None
        if self.indices is not None:
            at_target = torch.stack([part.nll for part in parts if part.nll is not None]).double().sum(0)
            nll = ((top - at_target) + log_sum).to(real)
        shift = (top - tops) + (log_sum - sums)  # of the row's lse over each part's

        nothing = torch.isneginf(tops)  # of a part's own sums there is none: each class that counts is infinitely far
        shift = shift.masked_fill(nothing, torch.inf)

        def joined(values: Sequence[Tensor | None], weights: Tensor) -> Tensor:
            each = torch.stack([value.double() for value in values if value is not None]).masked_fill(nothing, 0)
            total = (each + times_zero_safe(weights, shift)).sum(0)
            return total.masked_fill(broken & (weights != 0).any(0), torch.nan).to(real)

        dense_sum = dense_mass = smooth_sum = None
        if self.probabilities is not None:
            masses_of = torch.stack([part.dense_mass.double() for part in parts if part.dense_mass is not None])
            dense_sum = joined([part.dense_sum for part in parts], masses_of)
            dense_mass = masses_of.sum(0).to(real)
        if self.smoothing > 0:
            smooth_sum = joined([part.smooth_sum for part in parts], self._mass(ranges, tops.device))
            smooth_sum = smooth_sum.masked_fill(broken, torch.nan)
        stats = parts[0]._replace(
            row_max=top.to(real),
            log_sum=log_sum,
            nll=nll,
            dense_sum=dense_sum,
            dense_mass=dense_mass,
            smooth_sum=smooth_sum,
        )
        if self.indices is not None and self.ignore_index != NO_INDEX:
            ignored = self.indices[start:stop] == self.ignore_index
            assert stats.nll is not None
            stats = stats._replace(
                nll=stats.nll.masked_fill(ignored, 0),
                smooth_sum=None if smooth_sum is None else smooth_sum.masked_fill(ignored, 0),
            )
        return self._outputs(stats, start, stop), statistics_kept(stats, dense_mass=stats.dense_mass)

    def _mass(self, ranges: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        """Return the sum of the class weights of each range."""
        weight = self.class_weight
        if weight is None:
            counts = [as_number(float(last - first), torch.float64, device) for first, last in ranges]
            return torch.stack(counts).unsqueeze(1)
        return torch.stack([weight[first:last].sum().double() for first, last in ranges]).unsqueeze(1)

    def gradient(self, tiles: Sequence[Tile], back: Backward) -> None:
        """Write the gradient of the loss in place of the logits."""
        (tile,) = tiles
        saved: RowStats = back.saved
        given, start, stop, first = back.upstream[0], back.start, back.stop, back.first
        if self.classes == 1:
            torch.mul(tile.logits, 0, out=tile.gradient)  # one class has all the mass, wherever the target lies
            return
        last = first + tile.logits.shape[tile.class_dim]
        indices = None if self.indices is None else stretch(self.indices, start, stop)
        if indices is not None and first:
            indices = indices - first
        row_weight = None if self.row_weight is None else self.row_weight[start:stop]
        weight = None if self.class_weight is None else self.class_weight[first:last]
        spread, kept = self.smoothing / self.classes, 1 - self.smoothing
        dense = self.probabilities is not None
        factor = given if isinstance(given, float) else 1.0
        total: Tensor | float = self.classes
        if self.class_weight is not None and self.smoothing > 0:
            total = self.backend.scalar(self.class_weight.sum(dtype=torch.float64))
        ignore_index = self.ignore_index if self.ignore_index == NO_INDEX else self.ignore_index - first
        self.backend.row_grad(
            tile.logits,
            saved.row_max,
            saved.log_sum,
            indices,
            class_dim=tile.class_dim,
            ignore_index=ignore_index,
            class_weight=weight,
            dense_target=self._probabilities(tile, start, stop, first, last),
            upstream=given if isinstance(given, Tensor) else None,
            a_scale=factor * kept,
            a=saved.dense_mass if dense else row_weight,
            a_extra=factor * spread * total if self.smoothing > 0 else 0.0,
            c_scale=0.0 if dense else -factor * kept,
            c=row_weight,
            e_scale=-factor * kept if dense else 0.0,
            f_scale=-factor * spread if self.smoothing > 0 else 0.0,
            out=tile.gradient,
        )

    def _probabilities(self, tile: Tile, start: int, stop: int, first: int, last: int) -> Tensor | None:
        if self.probabilities is None:
            return None
        return self.probabilities[start:stop, first:last].to(tile.logits.dtype)

    def _outputs(self, stats: RowStats, start: int, stop: int) -> tuple[Tensor, ...]:
        weight = None if self.row_weight is None else self.row_weight[start:stop]
        losses = stats.losses(weight, self.smoothing, self.classes)
        if stats.dense_mass is not None:
            return losses, stats.dense_mass
        return losses, torch.ones_like(losses) if weight is None else weight


def rounded_to(values: Sequence[Tensor], wide: torch.dtype) -> tuple[Tensor, ...]:
    """Return values in their dtype; integers and booleans stay."""
    return tuple(value.to(wide) if value.is_floating_point() else value for value in values)


def top_classes(logits: Tensor, k: int, stats: RowStats, ignored: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities and classes of the k largest of logits (..., classes); 0 and -1 of ignored rows."""
    values, classes = logits.topk(k, -1)
    below = values.double() - stats.row_max.double().unsqueeze(-1)
    log_probs = (below - stats.log_sum.unsqueeze(-1)).to(stats.row_max.dtype)
    if ignored is not None:
        log_probs, classes = (
            log_probs.masked_fill(ignored.unsqueeze(-1), 0),
            classes.masked_fill(ignored.unsqueeze(-1), -1),
        )
    return log_probs, classes


@dataclass(frozen=True, slots=True)
class TokenWork:
    """nll, lse, entropy, argmax and rank of rows with class indices; the entropy alone without.

    With a `top_k` also the log-probabilities and classes of the k largest. Of whole rows: an entropy's digits are lost
    in parts.
    """

    backend: Backend
    indices: Tensor | None
    ignore_index: int  # NO_INDEX where no row has it
    wide: torch.dtype  # of the values
    top_k: int = 0
    class_major: ClassVar[bool] = True
    extra_bytes: ClassVar[int] = 0
    reads_logits: ClassVar[bool] = True
    narrows: ClassVar[bool] = True

    def forward(self, tiles: Sequence[Tile], start: int, stop: int) -> tuple[tuple[Tensor, ...], RowStats]:
        """Return the outputs."""
        (tile,) = tiles
        every = self.indices is not None
        stats = self.backend.row_stats(
            tile.logits,
            None if self.indices is None else self.indices[start:stop],
            class_dim=tile.class_dim,
            ignore_index=self.ignore_index,
            lse=every,
            entropy=True,
            argmax=every,
            rank=every,
        )
        names = ("nll", "lse", "entropy", "argmax", "rank") if every else ("entropy",)
        values = [getattr(stats, name) for name in names]
        if self.top_k:
            logits = tile.logits.movedim(tile.class_dim, 1)
            ignored = None if self.indices is None else self.indices[start:stop] == self.ignore_index
            values += top_classes(logits, self.top_k, stats, ignored)
        return rounded_to(values, self.wide), statistics_kept(stats, entropy=stats.entropy)

    def gradient(self, tiles: Sequence[Tile], back: Backward) -> None:
        """Write the gradient in place of the logits: dH/dz_j = -p_j ((z_j - lse) + H)."""
        (tile,) = tiles
        saved: RowStats = back.saved
        assert saved.entropy is not None
        rows = [None if grad is None else each_row(grad, saved.entropy) for grad in back.upstream]
        nll, lse, spread = rows[:3] if self.indices is not None else (None, None, rows[0])
        parts = [grad for grad in (nll, lse) if grad is not None]
        if spread is not None:
            parts.append(-spread * saved.entropy)
        self.backend.row_grad(
            tile.logits,
            saved.row_max,
            saved.log_sum,
            None if self.indices is None else self.indices[back.start : back.stop],
            class_dim=tile.class_dim,
            ignore_index=self.ignore_index,
            a_scale=1.0,
            a=sum(parts[1:], parts[0]),
            b_scale=0.0 if spread is None else -1.0,
            b=spread,
            c_scale=0.0 if nll is None else -1.0,
            c=nll,
            out=tile.gradient,
        )


@dataclass(frozen=True, slots=True)
class PairWork:
    """Measures of pairs of rows by the names of `PairRowStats`, with class indices where one is an nll.

    `divergence` is what the measure of that name is.

    Of whole rows: their mixture is not known of parts.
    """

    backend: Backend
    names: tuple[str, ...]
    divergence: Divergence | None
    indices: Tensor | None
    ignore_index: int
    class_major: bool  # where no row of the two lies as the user gave it
    wide: torch.dtype  # of the values
    extra_bytes: ClassVar[int] = 0
    reads_logits: ClassVar[bool] = True
    narrows: ClassVar[bool] = True

    def forward(self, tiles: Sequence[Tile], start: int, stop: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the measures."""
        stats = self.backend.pair_row_stats(
            tiles[0].logits,
            tiles[1].logits,
            None if self.indices is None else self.indices[start:stop],
            class_dim=tiles[0].class_dim,
            ignore_index=self.ignore_index,
            kl="kl" in self.names,
            reverse_kl="reverse_kl" in self.names,
            js="js" in self.names,
            cross_entropy="cross_entropy" in self.names,
            entropy="entropy_p" in self.names or "entropy_q" in self.names,
            divergence=self.divergence,
            same_top="same_top" in self.names,
        )
        return rounded_to([getattr(stats, name) for name in self.names], self.wide), stats.saved

    def gradient(self, tiles: Sequence[Tile], back: Backward) -> None:
        """Write the gradients of the tiles that need one in their place."""
        saved: Tensor = back.saved
        given = {
            name: None if grad is None else each_row(grad, saved[..., 0])
            for name, grad in zip(self.names, back.upstream, strict=True)
        }
        self.backend.pair_row_grad(
            tiles[0].logits,
            tiles[1].logits,
            saved,
            None if self.indices is None else self.indices[back.start : back.stop],
            class_dim=tiles[0].class_dim,
            ignore_index=self.ignore_index,
            need_first=back.wanted[0],
            need_second=back.wanted[1],
            out=(tiles[0].gradient, tiles[1].gradient),
            kl=given.get("kl"),
            reverse_kl=given.get("reverse_kl"),
            js=given.get("js"),
            cross_entropy=given.get("cross_entropy"),
            entropy_p=given.get("entropy_p"),
            entropy_q=given.get("entropy_q"),
            nll_p=given.get("nll_p"),
            nll_q=given.get("nll_q"),
            divergence=self.divergence,
            divergence_grad=given.get("divergence"),
        )


class ClassLists(NamedTuple):
    """A sparse matrix [rows, classes]: of row r the classes and values from offsets[r] to offsets[r + 1]."""

    offsets: Tensor
    classes: Tensor
    values: Tensor

    @classmethod
    def of(cls, sparse: Tensor) -> ClassLists:
        """Return the lists of a COO or CSR matrix."""
        if sparse.layout == torch.sparse_csr:
            return cls(sparse.crow_indices(), sparse.col_indices(), sparse.values())
        sparse = sparse.coalesce()
        rows, classes = sparse.indices()
        offsets = torch.searchsorted(rows.contiguous(), torch.arange(sparse.shape[0] + 1, device=rows.device))
        return cls(offsets, classes, sparse.values())

    def tile(self, start: int, stop: int, first: int, last: int, *, reads: bool = True) -> Tensor:
        """Return some rows and classes as a dense matrix; `reads`: the offsets may be read, which looks at less."""
        if not (reads and values_are_readable(self.offsets)):
            return self._tile_of_all(start, stop, first, last)
        offsets = self.offsets[start : stop + 1]
        begin, end = int(offsets[0]), int(offsets[-1])
        classes, values = self.classes[begin:end], self.values[begin:end]
        rows = torch.repeat_interleave(torch.arange(stop - start), offsets.diff())
        tile = torch.zeros(stop - start, last - first, dtype=values.dtype)
        inside = (classes >= first) & (classes < last)
        return tile.index_put_((rows[inside], classes[inside] - first), values[inside])

    def _tile_of_all(self, start: int, stop: int, first: int, last: int) -> Tensor:
        """Return the same, what lies elsewhere being written to one number behind the tile."""
        counts = self.offsets.diff()
        numbers = torch.arange(counts.shape[0], device=counts.device)
        rows = torch.repeat_interleave(numbers, counts, output_size=self.classes.shape[0])
        inside = (rows >= start) & (rows < stop) & (self.classes >= first) & (self.classes < last)
        size = (stop - start) * (last - first)
        place = torch.where(inside, (rows - start) * (last - first) + self.classes - first, size)
        flat = torch.zeros(size + 1, dtype=self.values.dtype, device=self.values.device)
        return flat.index_put_((place,), self.values)[:size].view(stop - start, last - first)


@dataclass(frozen=True, slots=True)
class BinaryWork:
    """Binary cross-entropy with logits, summed; the one output has one number a tile.

    `target` is [rows, classes], or lists of the classes that hold something: then a tile is made beside the logits.
    `weight` and `pos_weight` are [classes], or [rows, classes] or [rows, 1].
    """

    backend: Backend
    target: Tensor | ClassLists
    weight: Tensor | None
    pos_weight: Tensor | None
    class_major: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = True
    narrows: ClassVar[bool] = False

    @property
    def extra_bytes(self) -> int:
        """A sparse target's tile."""
        return self.target.values.dtype.itemsize if isinstance(self.target, ClassLists) else 0

    def forward(self, tiles: Sequence[Tile], start: int, stop: int) -> tuple[tuple[Tensor, ...], None]:
        """Return the sum over the tile."""
        (tile,) = tiles
        return (self.part(tile, start, stop, 0, tile.logits.shape[1]),), None

    def part(self, tile: Tile, start: int, stop: int, first: int, last: int) -> Tensor:
        """Return the sum over some of the classes."""
        operands = self._operands(tile, start, stop, first, last)
        total, _ = self.backend.elements_sum("binary_cross_entropy_with_logits", tile.logits, *operands)
        if isinstance(total, Tensor):
            return total.reshape(1)
        return torch.tensor([total], dtype=torch.float64, device=tile.logits.device)

    def combine(
        self, parts: Sequence[Tensor], ranges: Sequence[tuple[int, int]], start: int, stop: int
    ) -> tuple[tuple[Tensor, ...], None]:
        """Return the sum over all classes."""
        return (torch.stack(list(parts)).sum(0),), None

    def gradient(self, tiles: Sequence[Tile], back: Backward) -> None:
        """Write the gradient in place of the logits."""
        (tile,) = tiles
        (scale,) = back.upstream
        assert scale is not None
        operands = self._operands(tile, back.start, back.stop, back.first, back.first + tile.logits.shape[1])
        loss: ElementLoss = "binary_cross_entropy_with_logits"
        self.backend.elements_grad(loss, tile.logits, *operands, scale=scale, out=tile.gradient)

    def _operands(
        self, tile: Tile, start: int, stop: int, first: int, last: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        def cut(weight: Tensor | None) -> Tensor | None:
            if weight is None:
                return None
            rows = weight if weight.dim() == 1 else weight[start:stop]
            return rows if rows.shape[-1] == 1 else rows[..., first:last]

        if isinstance(self.target, ClassLists):
            target = self.target.tile(start, stop, first, last, reads=self.backend.READS_VALUES)
        else:
            target = self.target[start:stop, first:last]
        return target, cut(self.weight), cut(self.pos_weight)
