"""Passes over memory by plain torch operations, which no loss can beat: what limits a loss on logits that are there.

They run on memory that is mapped already, and move float32 words whatever the dtype: torch adds no other as fast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from logitless._bench.providers import BOTH, FORWARD, Inputs, Provider, bare

READ, COPY, THREE_PASSES = "one read (sum)", "one read, one write (copy)", "two reads, one write (add)"
MOVES = {READ: 1, COPY: 2, THREE_PASSES: 3}


def limits() -> tuple[Provider, Provider]:
    """Return one read of the logits, as the forward must, and two reads and one write, as both directions together."""
    return bare(READ, "limit", {FORWARD: _read}), bare(THREE_PASSES, "limit", {BOTH: _three_passes})


def copy() -> Provider:
    """Return a read and a write, as the backward alone must."""
    return bare(COPY, "stage", {BOTH: _copy})


def _words(inputs: Inputs) -> Tensor:
    numbers = inputs[0].view(-1)
    words = numbers.nbytes // torch.float32.itemsize
    return numbers[: words * torch.float32.itemsize // numbers.itemsize].view(torch.float32)


def _read(inputs: Inputs) -> Callable[[], object]:
    return _words(inputs).sum


def _three_passes(inputs: Inputs) -> Callable[[], object]:
    words = _words(inputs)
    target = torch.zeros_like(words)
    return lambda: target.add_(words)


def _copy(inputs: Inputs) -> Callable[[], object]:
    words = _words(inputs)
    target = torch.zeros_like(words)
    return lambda: target.copy_(words)
