"""Cases of a linear head: the loss of hidden states and a weight, with or without the logits between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from logitless import functional
from logitless._bench.protocol import Case
from logitless._bench.providers import BOTH, FORWARD, MODES, Inputs, Provider, bare, eager, optax, ours
from logitless.lazy.logits import linear
from logitless.losses import measures

SMOLLM2 = (2048, 576, 49152)
GEMMA = (2048, 640, 262144)
LONG = (8192, 576, 49152)
TEACHER_FEATURES = 640


def head_cases(
    smollm2: tuple[int, int, int], gemma: tuple[int, int, int], long: tuple[int, int, int], teacher_features: int
) -> Iterator[Case]:
    """Yield heads of rows x features x classes."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    everybody = (
        _head(),
        _products(),
        eager(_dense),
        eager(_chunked, "torch, chunked", modes=(BOTH,)),
        optax(_optax),
    )
    for dtype in (float32, bfloat16):
        yield _case(smollm2, dtype, everybody, MODES)
    rows, _, classes = gemma
    dense = eager(_dense, modes=(BOTH,), needs_bytes=4 * rows * classes * float32.itemsize)
    budgets = tuple(_head(max_bytes=megabytes * 10**6) for megabytes in (150, 320))
    yield _case(gemma, float32, (*budgets, _products(), dense), (BOTH,))
    yield _case(long, float32, (_head(max_bytes=100 * 10**6), _products()), (BOTH,))
    yield from _distillation_cases(smollm2, teacher_features)


def _case(shape: tuple[int, int, int], dtype: torch.dtype, providers: Sequence[Provider], modes: Sequence[str]) -> Case:
    def make(rows: int) -> Inputs:
        return head_inputs(rows, *shape[1:], dtype)

    what = "linear_cross_entropy"
    return Case("heads", what, shape, dtype, make, providers, _dense, (0, 1), modes, memory=True)


def _distillation_cases(shape: tuple[int, int, int], teacher_features: int) -> Iterator[Case]:
    """Yield divergences of a student's head from a frozen teacher's of another width."""
    _, features, classes = shape

    def make(rows: int) -> Inputs:
        hidden, weight, target = head_inputs(rows, features, classes, torch.float32)
        teacher_weight = _weight(teacher_features, classes)
        return hidden, weight, _hidden(rows, teacher_weight, target), teacher_weight

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return torch_functional.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="batchmean", log_target=True)

    def tv(p: Tensor, q: Tensor) -> Tensor:
        return (p.softmax(1) - q.softmax(1)).abs().sum(1).mean() / 2

    def js(p: Tensor, q: Tensor) -> Tensor:
        log_p, log_q = p.log_softmax(1), q.log_softmax(1)
        log_m = torch.logaddexp(log_p + math.log(0.1), log_q + math.log(0.9))
        to_m = [torch_functional.kl_div(log_m, log, reduction="batchmean", log_target=True) for log in (log_p, log_q)]
        return 0.1 * to_m[0] + 0.9 * to_m[1]

    table: tuple[tuple[str, Callable[..., Tensor], Callable[..., Tensor]], ...] = (
        ("kl", measures.kl, kl),
        ("js, beta=0.1", partial(measures.js, beta=0.1), js),
        ("tv", measures.tv, tv),
    )
    for name, mine, theirs in table:

        def lazy(
            hidden: Tensor,
            weight: Tensor,
            teacher_hidden: Tensor,
            teacher_weight: Tensor,
            mine: Callable[..., Tensor] = mine,
        ) -> Tensor:
            return mine(linear(teacher_hidden, teacher_weight), linear(hidden, weight), reduction="mean")

        def dense(
            hidden: Tensor,
            weight: Tensor,
            teacher_hidden: Tensor,
            teacher_weight: Tensor,
            theirs: Callable[..., Tensor] = theirs,
        ) -> Tensor:
            teacher = torch_functional.linear(teacher_hidden, teacher_weight)
            return theirs(teacher, torch_functional.linear(hidden, weight))

        providers = (ours(lazy), _products(teacher=True), eager(dense))
        what = f"{name}, teacher of {teacher_features} features"
        yield Case("heads", what, shape, torch.float32, make, providers, dense, (0, 1), (BOTH,), memory=True)


def _head(max_bytes: int | None = None) -> Provider:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return functional.linear_cross_entropy(hidden, weight, target, max_bytes=max_bytes)

    return ours(loss, "logitless" if max_bytes is None else f"logitless, max_bytes {max_bytes // 10**6} MB")


def _products(*, teacher: bool = False) -> Provider:
    """Return the products that the loss is made of, into memory that is kept: one a head, and two for the gradients."""

    def forward(inputs: Inputs) -> Callable[[], object]:
        hidden, weight = inputs[:2]
        logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
        return lambda: torch.mm(hidden, weight.T, out=logits)

    def both(inputs: Inputs) -> Callable[[], object]:
        hidden, weight = inputs[:2]
        logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
        grads = torch.empty_like(hidden), torch.empty_like(weight)

        def products() -> None:
            if teacher:
                torch.mm(inputs[2], inputs[3].T, out=logits)
            torch.mm(hidden, weight.T, out=logits)
            torch.mm(logits, weight, out=grads[0])
            torch.mm(logits.T, hidden, out=grads[1])

        return products

    return bare("bare products", "limit", {BOTH: both} if teacher else {FORWARD: forward, BOTH: both})


def _dense(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return torch_functional.cross_entropy(torch_functional.linear(hidden, weight), target)


def _chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # chunk size and precision as torch chooses them here
    return torch_functional.linear_cross_entropy(hidden, weight, target, options=options)


def _optax(library: Any, hidden: Any, weight: Any, target: Any) -> Any:
    return library.softmax_cross_entropy_with_integer_labels(hidden @ weight.T, target).mean()


def head_inputs(rows: int, features: int, classes: int, dtype: torch.dtype) -> Inputs:
    """Return hidden states, weight and target of a head."""
    weight, target = _weight(features, classes), torch.randint(classes, (rows,))
    return _hidden(rows, weight, target).to(dtype), weight.to(dtype), target


def _weight(features: int, classes: int) -> Tensor:
    """Return a head whose logits, of hidden states of unit variance, have a standard deviation of 2."""
    return torch.randn(classes, features).mul_(2 * features**-0.5)


def _hidden(rows: int, weight: Tensor, target: Tensor) -> Tensor:
    """Return hidden states of which one in four is sure of its target by about 20 nats, as a trained model's are."""
    hidden = torch.randn(rows, weight.shape[1])
    hidden[::4] += 5 * weight[target[::4]]
    return hidden
