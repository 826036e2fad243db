"""The reference's fold of a row function over tiles of logits.

`fold_rows(function, sources, ...)` equals `function(all logits, ...)` for a function that treats rows
independently, in value and in every gradient, but holds one tile of logits at a time: the forward keeps only
the per-row outputs, the backward makes each tile again. Under transforms and for higher derivatives it is that
plain call, on all rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logitless._heads.rows import HeadRows, LogitRows
from logitless._heads.window import opened
from logitless._rules.derivatives import needs_plain_backward, plain_backward
from logitless._rules.keeping import put_together, taken_apart
from logitless._rules.precision import no_autocast
from logitless._rules.transforms import hold_data, transform_reason
from logitless.kernels import interface
from logitless.kernels.definitions import is_sharded

# How many tile-sized tensors a source costs the reference row functions and their backward at once, at most.
_LIVE_TILES = 16

RowFunction = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Plan:
    """What one fold does, without its tensors."""

    function: RowFunction
    sources: tuple[LogitRows, ...]
    row_inputs: int
    tile_rows: int
    rows: int

    def split(self, tensors: Sequence[Tensor | None]) -> tuple[list[Sequence[Tensor | None]], Any, Any]:
        """Return the tensors of each source, the per-row inputs and the shared inputs."""
        parts, at = [], 0
        for source in self.sources:
            parts.append(tensors[at : at + len(source.tensors)])
            at += len(source.tensors)
        return parts, tensors[at : at + self.row_inputs], tensors[at + self.row_inputs :]

    def opened(self, tensors: Sequence[Tensor | None]) -> AbstractContextManager[object]:
        """Return a context in which the memory of parameters that a wrapper freed is there."""
        stack = ExitStack()
        for source in self.sources:
            if isinstance(source, HeadRows):
                stack.enter_context(opened(source.window, tensors))
        return stack

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Return the row ranges; one empty range when there are no rows, so that outputs have their dtypes."""
        if self.rows == 0:
            yield 0, 0
        for start in range(0, self.rows, self.tile_rows):
            yield start, min(start + self.tile_rows, self.rows)

    def call(self, tensors: Sequence[Tensor | None], start: int, stop: int) -> tuple[Tensor, ...]:
        """Run the row function on rows start to stop, differentiable in every tensor."""
        parts, row_inputs, shared = self.split(tensors)
        logits = [
            source.activate(source.raw(part, start, stop), part)
            for source, part in zip(self.sources, parts, strict=True)
        ]
        return self.function(*logits, *(_rows(row, start, stop) for row in row_inputs), *shared)


def _rows(tensor: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if tensor is None else tensor[start:stop]


def tile_rows(classes: int, itemsize: int, sources: int, max_bytes: int | None) -> int:
    """Return how many rows a tile may have so that all that is live with it stays under `max_bytes`."""
    budget = interface.DEFAULT_MAX_BYTES if max_bytes is None else max_bytes
    return max(1, budget // max(1, classes * itemsize * _LIVE_TILES * sources))


def fold_rows(
    function: RowFunction,
    sources: Sequence[LogitRows],
    row_inputs: Sequence[Tensor | None] = (),
    shared: Sequence[Tensor | None] = (),
    *,
    itemsize: int = 8,
    max_bytes: int | None = None,
) -> tuple[Tensor, ...]:
    """Return `function(*logits, *row_inputs, *shared)` without holding more than one tile of the logits.

    The function returns tensors whose first dimension is the rows; those with an integer or boolean dtype are
    not differentiable. `row_inputs` are cut into tiles with the logits, `shared` are given whole.
    """
    rows, classes = sources[0].rows, max(source.classes for source in sources)
    plan = _Plan(function, tuple(sources), len(row_inputs), tile_rows(classes, itemsize, len(sources), max_bytes), rows)
    tensors = [tensor for source in sources for tensor in source.tensors] + [*row_inputs, *shared]
    sharded = any(tensor is not None and is_sharded(tensor) for tensor in tensors)
    if sharded or transform_reason(*tensors) is not None or not hold_data(*tensors):
        return plan.call(tensors, 0, rows)
    outputs: tuple[Tensor, ...] = _Fold.apply(plan, *tensors)  # type: ignore[no-untyped-call] # torch types it not
    return outputs


def fold_gradients(
    function: RowFunction,
    source: LogitRows,
    needed: Sequence[bool],
    gradient: Tensor,
    *,
    itemsize: int = 8,
) -> list[Tensor | None]:
    """Return the gradients of a source's tensors, of the gradient [rows, ...] of what `function` makes of its rows.

    The backward pass of `fold_rows` without its forward: for what was computed in another way.
    """
    plan = _Plan(function, (source,), 0, tile_rows(source.classes, itemsize, 1, None), source.rows)
    with _autocast_off(source.tensors), plan.opened(source.tensors):
        return _tiled_backward(plan, source.tensors, needed, [gradient])


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        if any(ctx.needs_input_grad):
            ctx.kept, others = taken_apart(plan, tensors)
            ctx.save_for_backward(*tensors, *others)
        with _autocast_off(tensors), plan.opened(tensors):
            tiles = [plan.call(tensors, start, stop) for start, stop in plan.tiles()]
        outputs = tuple(torch.cat(parts) for parts in zip(*tiles, strict=True))
        ctx.mark_non_differentiable(*(output for output in outputs if not output.dtype.is_floating_point))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        if all(grad is None for grad in grad_outputs):
            return (None,) * (1 + len(needed))
        tensors = ctx.saved_tensors[: len(needed)]
        plan: _Plan = put_together(ctx.kept, ctx.saved_tensors)
        with _autocast_off(tensors), plan.opened(tensors):
            if needs_plain_backward(*grad_outputs):

                def definition(*given: Tensor | None) -> Sequence[Tensor]:
                    return plan.call(given, 0, plan.rows)

                return (None, *plain_backward(definition, tensors, needed, grad_outputs))
            return (None, *_tiled_backward(plan, tensors, needed, grad_outputs))


def _autocast_off(tensors: Sequence[Tensor | None]) -> AbstractContextManager[object]:
    return no_autocast(next(tensor for tensor in tensors if tensor is not None))


def _tiled_backward(
    plan: _Plan, tensors: Sequence[Tensor | None], needed: Sequence[bool], grad_outputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return gradients tile by tile; what all rows share is accumulated in float32 or wider."""
    grads = [_accumulator(tensor) if need else None for tensor, need in zip(tensors, needed, strict=True)]
    source_grads, row_grads, shared_grads = plan.split(grads)
    for start, stop in plan.tiles():
        _add_tile(plan, tensors, grad_outputs, source_grads, row_grads, shared_grads, start, stop)
    return [
        None if grad is None or tensor is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, tensors, strict=True)
    ]


def _accumulator(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    wide = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
    return torch.zeros(tensor.shape, dtype=wide, device=tensor.device)


def _leaf(tensor: Tensor | None, needed: bool) -> Tensor | None:
    return None if tensor is None else _raw_leaf(tensor, needed)


def _raw_leaf(tensor: Tensor, needed: bool) -> Tensor:
    return tensor.detach().requires_grad_() if needed else tensor


def _add_tile(
    plan: _Plan,
    tensors: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
    source_grads: list[Sequence[Tensor | None]],
    row_grads: Sequence[Tensor | None],
    shared_grads: Sequence[Tensor | None],
    start: int,
    stop: int,
) -> None:
    parts, row_inputs, shared = plan.split(tensors)
    raws = [
        _raw_leaf(source.raw(part, start, stop), any(grad is not None for grad in grads))
        for source, part, grads in zip(plan.sources, parts, source_grads, strict=True)
    ]
    # A source's own shared scalars (a temperature) are small leaves of the tile's graph.
    scalars = [
        [_leaf(t, g is not None) if t is not None and t.dim() == 0 else t for t, g in zip(part, grads, strict=True)]
        for part, grads in zip(parts, source_grads, strict=True)
    ]
    row_leaves = [_leaf(_rows(t, start, stop), g is not None) for t, g in zip(row_inputs, row_grads, strict=True)]
    shared_leaves = [_leaf(t, g is not None) for t, g in zip(shared, shared_grads, strict=True)]
    with torch.enable_grad():
        logits = [source.activate(raw, part) for source, raw, part in zip(plan.sources, raws, scalars, strict=True)]
        outputs = plan.function(*logits, *row_leaves, *shared_leaves)
    pairs = [
        (out, grad[start:stop])
        for out, grad in zip(outputs, grad_outputs, strict=True)
        if grad is not None and out.requires_grad
    ]
    destinations: list[tuple[Tensor, Callable[[Tensor], object]]] = []
    for source, raw, part, leaves, grads in zip(plan.sources, raws, parts, scalars, source_grads, strict=True):
        if raw.requires_grad:
            destinations.append((raw, _accumulate_into(source, grads, part, start, stop)))
        for leaf, grad in zip(leaves, grads, strict=True):
            if leaf is not None and grad is not None and leaf.dim() == 0:
                destinations.append((leaf, grad.add_))
    for leaf, grad in zip(row_leaves, row_grads, strict=True):
        if leaf is not None and grad is not None:
            destinations.append((leaf, grad[start:stop].copy_))
    for leaf, grad in zip(shared_leaves, shared_grads, strict=True):
        if leaf is not None and grad is not None:
            destinations.append((leaf, grad.add_))
    if not pairs or not destinations:
        return
    tile_grads = torch.autograd.grad(
        [out for out, _ in pairs], [leaf for leaf, _ in destinations], [grad for _, grad in pairs], allow_unused=True
    )
    for (_, add), tile_grad in zip(destinations, tile_grads, strict=True):
        if tile_grad is not None:
            add(tile_grad)


def _accumulate_into(
    source: LogitRows, grads: Sequence[Tensor | None], part: Sequence[Tensor | None], start: int, stop: int
) -> Callable[[Tensor], object]:
    return lambda grad_raw: source.accumulate(grads, grad_raw, part, start, stop)
