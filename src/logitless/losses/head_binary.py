"""Binary cross-entropy of logits that are not built: how a call on LazyLogits becomes rows and a plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from logitless._autograd.elements import Reduction as ElementReduction
from logitless._heads.sweep import HeadCall, Reduction, head_call, reduced
from logitless._heads.work import BinaryWork, ClassLists
from logitless._rules.precision import no_autocast
from logitless.kernels import definitions
from logitless.kernels.interface import Backend, times_zero_safe
from logitless.lazy.logits import LazyLogits


def binary_call(
    backend: Backend,
    logits: LazyLogits,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    compute: torch.dtype,
) -> HeadCall:
    """Plan the sum over all elements; the target is of the logits' shape, or sparse and [rows, classes]."""
    source = logits.rows()
    flat = target.reshape(-1, source.classes) if target.layout == torch.strided else ClassLists.of(target)
    by_class, positive = _by_rows(weight, logits.shape), _by_rows(pos_weight, logits.shape)

    def definition(*tensors: Tensor | None) -> Sequence[Tensor]:
        given = tensors[0]
        assert given is not None
        with no_autocast(given):
            tile = source.activate(source.raw(tensors, 0, source.rows), tensors).to(compute)
            dense = flat.tile(0, source.rows, 0, source.classes) if isinstance(flat, ClassLists) else flat
            scale = None if positive is None else positive.to(compute)
            loss = definitions.binary_cross_entropy_with_logits(tile, dense.to(compute), scale)
            if by_class is not None:
                loss = times_zero_safe(by_class.to(compute), loss)
            return (loss,)

    work = BinaryWork(backend, flat, by_class, positive)
    return head_call(backend, [source], work, definition, outputs=(True,), least_dtype=compute, max_bytes=None)


def binary_cross_entropy(call: HeadCall, reduction: ElementReduction) -> Tensor:
    """Return the reduced loss."""
    return reduced(call, Reduction(reduction.divisor, reduction.of))


def _by_rows(weight: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Return a weight that broadcasts to the logits as [classes], or with one row a row of the logits."""
    if weight is None or weight.shape[:-1].numel() == 1:
        return None if weight is None else weight.reshape(-1)
    return weight.expand(*shape[:-1], weight.shape[-1]).reshape(-1, weight.shape[-1])
