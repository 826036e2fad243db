"""Where a wrapper that shards parameters frees a head's weight, and how to gather it again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from logitless._heads.window import Window


def window_of(head: nn.Module, model: nn.Module) -> Window | None:
    """Return how to have a head's parameters outside its forward; None where no wrapper in the model frees them."""
    if "torch.distributed.fsdp" not in sys.modules or not torch.distributed.is_initialized():
        return None
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    kinds = (FSDPModule, FullyShardedDataParallel)
    owners = [unit for unit in model.modules() if isinstance(unit, kinds) and any(m is head for m in unit.modules())]
    if not owners:
        return None
    innermost: Any = owners[-1]
    return _second(innermost) if isinstance(innermost, FSDPModule) else _first(innermost)


def _in_backward() -> bool:
    """Say whether a backward pass runs: the unit's own hook then frees the parameters after it."""
    return torch._C._current_graph_task_id() != -1


def _second(unit: Any) -> Window:
    @contextmanager
    def window() -> Iterator[None]:
        unit.unshard()
        try:
            yield
        finally:
            if not _in_backward():
                unit.reshard()

    return window


def _first(unit: Any) -> Window:
    from torch.distributed.fsdp import _runtime_utils as runtime  # the same by names of FSDP1's own

    @contextmanager
    def window() -> Iterator[None]:
        runtime._unshard(unit, unit._handle, unit._unshard_stream, unit._pre_unshard_stream)
        try:
            yield
        finally:
            if not _in_backward():
                runtime._reshard(unit, unit._handle, True)

    return window
