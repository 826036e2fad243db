"""Whether what a lazy tensor is made of was written to since: torch's version counters, and what goes around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from logitless._rules.transforms import hold_data

_STALE = (
    "the hidden states or the head of LazyLogits were modified in place since these logits were made: use "
    "them before the optimiser's step, or call .materialize() before it"
)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_steps = 0
# What steps wrote to without counting it, by the storage's address, which the reference keeps from being used again.
_uncounted: dict[int, tuple[StorageWeakRef, int]] = {}


def _note_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Note what a step wrote to: fused optimisers, and kernels of others' own, do not count it in tensors' versions."""
    global _steps
    _steps += 1
    foreign = not type(optimizer).__module__.startswith("torch.optim")
    groups = [group for group in optimizer.param_groups if foreign or group.get("fused")]
    if not groups:
        return
    for address in [address for address, (storage, _) in _uncounted.items() if storage.expired()]:
        del _uncounted[address]
    for group in groups:
        for parameter in group["params"]:
            if parameter.grad is None and not foreign:
                continue
            written = StorageWeakRef(parameter.untyped_storage())
            _uncounted[written.cdata] = (written, _steps)


register_optimizer_step_post_hook(_note_step)


class Marks:
    """What was seen of some tensors when a lazy tensor was made of them."""

    __slots__ = ("_seen", "_step")

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        """Look at the tensors."""
        self._seen = [_mark(tensor) for tensor in tensors]
        self._step = _steps

    def check(self, tensors: Sequence[Tensor | None], *, sharded: bool) -> None:
        """Raise if one of them was written to since; `sharded` ones are gathered again after an optimiser's step."""
        for seen, tensor in zip(self._seen, tensors, strict=True):
            if _differs(seen, _mark(tensor)):
                raise RuntimeError(_STALE)
        if self._step != _steps:
            if sharded or _written_by_uncounted_steps(tensors, self._step):
                raise RuntimeError(_STALE)
            self._step = _steps


def check_versions(seen: Tensor, tensors: Sequence[Tensor | None]) -> None:
    """Raise unless the versions are those that a compiled graph saw."""
    *versions, step = seen.tolist()
    present = [tensor for tensor in tensors if tensor is not None]
    if versions != [t._version for t in present] or (step != _steps and _written_by_uncounted_steps(present, step)):
        raise RuntimeError(_STALE)


def _mark(tensor: Tensor | None) -> int | Tensor | None:
    if tensor is None:
        return None
    return _fingerprint(tensor) if tensor.is_inference() else tensor._version


def _fingerprint(tensor: Tensor) -> Tensor | None:
    """Return sums of the bits of each row: a tensor made in inference mode has no version counter."""
    if not hold_data(tensor):
        return None
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()]).sum(-1)


def _differs(seen: int | Tensor | None, now: int | Tensor | None) -> bool:
    if isinstance(seen, Tensor) and isinstance(now, Tensor):
        return not torch.equal(seen, now)
    return seen != now


def _written_by_uncounted_steps(tensors: Sequence[Tensor | None], since: int) -> bool:
    for tensor in tensors:
        if tensor is not None and tensor.untyped_storage()._cdata in _uncounted:
            storage, step = _uncounted[tensor.untyped_storage()._cdata]
            if step > since and not storage.expired():
                return True
    return False


@torch.library.custom_op("logitless::versions", mutates_args=())
def _versions(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([*(tensor._version for tensor in tensors), _steps])


@_versions.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return torch.empty(len(tensors) + 1, dtype=torch.int64)


def versions_in_graph(tensors: Sequence[Tensor | None]) -> Tensor:
    """Return how often tensors were written to by the time a compiled graph runs; removed where nobody asks."""
    seen: Tensor = _versions([tensor.detach() for tensor in tensors if tensor is not None])
    return seen
