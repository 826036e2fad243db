"""The case that says how near to memory's limit cross-entropy is, and which stage takes the rest of its time.

The stages are ours, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from logitless import functional
from logitless._bench.losses import indexed_logits
from logitless._bench.passes import copy, limits
from logitless._bench.protocol import Case
from logitless._bench.providers import BOTH, FORWARD, Inputs, bare, ours
from logitless.kernels import cpu

_PAGE_BYTES = 4096


def limit_case(shape: tuple[int, int]) -> Case:
    """Return cross-entropy in float32 beside its limits and its stages."""
    stages = (
        bare("stage: row_stats", "stage", {FORWARD: _row_stats, BOTH: _row_stats}),
        bare("stage: row_grad into mapped memory", "stage", {BOTH: _row_grad}),
        bare("stage: a gradient of the pool, touched", "stage", {BOTH: _pooled}),
        bare("stage: a gradient of the allocator, touched", "stage", {BOTH: _allocated}),
    )
    loss = torch_functional.cross_entropy
    providers = (ours(functional.cross_entropy), *limits(), copy(), *(stages if cpu.missing() is None else ()))
    make = indexed_logits(shape[1], torch.float32)
    return Case("limit", "cross_entropy", shape, torch.float32, make, providers, loss)


def _row_stats(inputs: Inputs) -> Callable[[], object]:
    return lambda: cpu.row_stats(*inputs)


def _row_grad(inputs: Inputs) -> Callable[[], object]:
    logits, target = inputs
    stats, out = cpu.row_stats(logits, target), torch.zeros_like(logits)
    upstream = torch.tensor(1 / logits.shape[0])
    return lambda: cpu.row_grad(
        logits, stats.row_max, stats.log_sum, target, upstream=upstream, a_scale=1, c_scale=-1, out=out
    )


def _pooled(inputs: Inputs) -> Callable[[], object]:
    return lambda: _touch(cpu.empty_like_pooled(inputs[0]))


def _allocated(inputs: Inputs) -> Callable[[], object]:
    return lambda: _touch(torch.empty_like(inputs[0]))


def _touch(tensor: Tensor) -> None:
    """Write to each page, which is when the system gives it."""
    tensor.view(-1)[:: _PAGE_BYTES // tensor.itemsize].zero_()
