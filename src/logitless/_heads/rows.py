"""Rows of logits by what they are made of: a tensor the user gave, or a head whose logits are not built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless._heads.window import Window
from logitless._rules.reduction import count_of


class LogitRows(Protocol):
    """Rows of logits that can be made tile by tile from a few tensors.

    `tensors` are what gradients flow to. A tile is `activate(raw(...), ...)`: `raw` is the part whose gradient
    `accumulate` takes back to the tensors by hand, so that no tile's graph is ever kept.
    """

    @property
    def rows(self) -> int:
        """How many rows there are."""
        ...

    @property
    def classes(self) -> int:
        """How many classes a row has."""
        ...

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the rows are made of."""
        ...

    def raw(self, tensors: Sequence[Tensor | None], start: int, stop: int) -> Tensor:
        """Return rows start to stop before `activate`."""
        ...

    def activate(self, raw: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return the logits of a raw tile; differentiable."""
        ...

    def accumulate(
        self,
        grads: Sequence[Tensor | None],
        grad_raw: Tensor,
        tensors: Sequence[Tensor | None],
        start: int,
        stop: int,
    ) -> None:
        """Add what a raw tile's gradient gives to the gradients of `tensors` (None: not needed)."""
        ...


@dataclass(frozen=True, slots=True)
class DenseRows:
    """Rows of a tensor the user gave, shape [rows, classes], times a number."""

    rows: int
    classes: int
    tensors: tuple[Tensor | None, ...]
    scale: float = 1.0

    @property
    def scales_exactly(self) -> bool:
        """Whether no logit is rounded by the scale, in whatever dtype: of a power of two."""
        return math.frexp(self.scale)[0] == 0.5

    def raw(self, tensors: Sequence[Tensor | None], start: int, stop: int) -> Tensor:
        """Return a view."""
        logits = tensors[0]
        assert logits is not None
        return logits[start:stop]

    def activate(self, raw: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return the rows, scaled in float64."""
        return raw if self.scale == 1.0 else raw.double() * self.scale

    def accumulate(
        self,
        grads: Sequence[Tensor | None],
        grad_raw: Tensor,
        tensors: Sequence[Tensor | None],
        start: int,
        stop: int,
    ) -> None:
        """Write the rows' gradient."""
        if grads[0] is not None:
            grads[0][start:stop] = grad_raw


def dense_rows(logits: Tensor, scale: float = 1.0) -> DenseRows:
    """Return the rows of a dense tensor (..., classes), times a number."""
    flat = logits.reshape(count_of(logits.shape[:-1]), logits.shape[-1])  # of no classes -1 says nothing
    return DenseRows(flat.shape[0], flat.shape[1], (flat,), scale)


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Rows `activate(hidden @ weight.T + bias)`, made a tile at a time; see `LogitRows`."""

    rows: int
    classes: int
    tensors: tuple[Tensor | None, ...]  # hidden [rows, features], weight [classes, features], bias, scale
    scale: float
    softcap: float | None
    window: Window | None = None  # how to have the parameters' memory outside their module's forward

    def without(self, ignored: Tensor | None, *, selectable: bool) -> tuple[HeadRows, Tensor | None]:
        """Return the rows that are not ignored, and their positions (None: every row is there).

        An ignored row's hidden state enters no matrix product, by value or by cost. Where the number of rows may not
        depend on values (`selectable` is False) it stays, as zeros.
        """
        if ignored is None:
            return self, None
        hidden, *others = self.tensors
        assert hidden is not None
        if not selectable:
            return replace(self, tensors=(hidden.masked_fill(ignored.unsqueeze(1), 0), *others)), None
        kept = (~ignored).nonzero().squeeze(1)
        return replace(self, rows=kept.shape[0], tensors=(hidden[kept], *others)), kept

    def raw(self, tensors: Sequence[Tensor | None], start: int, stop: int) -> Tensor:
        """Return the tile of `hidden @ weight.T + bias`."""
        hidden, weight, bias, _ = tensors
        assert hidden is not None
        assert weight is not None
        return F.linear(hidden[start:stop], weight, bias)

    def activate(self, raw: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return `softcap * tanh(raw * scale / softcap)`."""
        if raw.dtype in (torch.float16, torch.bfloat16):
            raw = raw.float()
        scale = self.scale if tensors[3] is None else tensors[3]
        scaled = raw if isinstance(scale, float) and scale == 1.0 else raw * scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def accumulate(
        self,
        grads: Sequence[Tensor | None],
        grad_raw: Tensor,
        tensors: Sequence[Tensor | None],
        start: int,
        stop: int,
    ) -> None:
        """Take a tile's gradient back through the matrix product; the weight's adds up in float32 or wider."""
        hidden, weight, _, _ = tensors
        grad_hidden, grad_weight, grad_bias, _ = grads
        assert hidden is not None
        assert weight is not None
        if grad_hidden is not None:
            grad_hidden[start:stop] = grad_raw @ weight
        if grad_weight is not None:
            grad_weight.addmm_(grad_raw.to(grad_weight.dtype).T, hidden[start:stop].to(grad_weight.dtype))
        if grad_bias is not None:
            grad_bias += grad_raw.sum(0, dtype=grad_bias.dtype)


def at_positions(values: Tensor, kept: Tensor | None, rows: int, fill: int = 0) -> Tensor:
    """Return the values of the kept rows at their positions among all rows, and `fill` elsewhere."""
    return values if kept is None else values.new_full((rows, *values.shape[1:]), fill).index_copy(0, kept, values)
