"""Cases on logits that are there: cross-entropy against every peer, and the other losses and measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from logitless import functional
from logitless._bench.passes import limits
from logitless._bench.protocol import Case
from logitless._bench.providers import BOTH, Inputs, Loss, compiled, eager, optax, ours
from logitless.losses import measures

_WEIGHT = 0.1  # of the teacher in a mixture

LARGE = ((4096, 32000), (1024, 151936), (262144, 100), (8192, 1000))
SMALL = ((8, 10), (256, 100), (1024, 100))


def cross_entropy_cases(shapes: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Yield cross-entropy with class indices, the loss that every peer has, beside what no loss can beat."""

    def optax_loss(library: Any, logits: Any, target: Any) -> Any:
        return library.softmax_cross_entropy_with_integer_labels(logits, target).mean()

    loss = torch_functional.cross_entropy
    everybody = (ours(functional.cross_entropy), eager(loss), compiled(loss), optax(optax_loss), *limits())
    for dtype in dtypes:
        for rows, classes in shapes:
            make = indexed_logits(classes, dtype)
            yield Case("logits", "cross_entropy", (rows, classes), dtype, make, everybody, loss)


def small_cases() -> Iterator[Case]:
    """Yield calls whose time is the overhead of a call."""
    both = (ours(functional.cross_entropy), eager(torch_functional.cross_entropy))
    for rows, classes in SMALL:
        make = indexed_logits(classes, torch.float32)
        shape, truth = (rows, classes), torch_functional.cross_entropy
        yield Case("small", "cross_entropy", shape, torch.float32, make, both, truth, modes=(BOTH,))


def loss_cases(shape: tuple[int, int], vectors: tuple[int, int]) -> Iterator[Case]:
    """Yield every other loss and measure, forward and backward, with its peak memory."""
    classes, dtype = shape[1], torch.float32
    indexed = indexed_logits(classes, dtype)

    def probabilities(rows: int) -> Inputs:
        return _logits(rows, classes, dtype), _logits(rows, classes, dtype).softmax(1)

    def labelled(rows: int) -> Inputs:
        return _logits(rows, classes, dtype), torch.rand(rows, classes)

    def labelled_probabilities(rows: int) -> Inputs:
        return torch.rand(rows, classes).clamp_(1e-6, 1 - 1e-6), torch.rand(rows, classes)

    def log_probs(rows: int) -> Inputs:
        logits, target = probabilities(rows)
        return logits.log_softmax(1), target

    def both_log_probs(rows: int) -> Inputs:
        log_p, target = log_probs(rows)
        return log_p, target.log_()

    def pairs(rows: int) -> Inputs:
        return torch.randn(rows, vectors[1]), torch.randn(rows, vectors[1])

    def labelled_pairs(rows: int) -> Inputs:
        return *pairs(rows), torch.randint(2, (rows,)) * 2 - 1

    def entropy(x: Tensor) -> Tensor:
        rows: Tensor = torch.distributions.Categorical(logits=x, validate_args=False).entropy()
        return rows.mean()

    Of = Callable[[Any], Loss]  # noqa: N806 # a type
    table: list[tuple[str, tuple[int, int], Callable[[int], Inputs], Of, Sequence[int]]] = [
        ("cross_entropy, probabilities", shape, probabilities, lambda lib: lib.cross_entropy, (0,)),
        (
            "cross_entropy, label_smoothing=0.1",
            shape,
            indexed,
            lambda lib: lambda x, y: lib.cross_entropy(x, y, label_smoothing=0.1),
            (0,),
        ),
        (
            "kl_div",
            shape,
            log_probs,
            lambda lib: lambda x, y: lib.kl_div(x, y, reduction="batchmean"),
            (0,),
        ),
        (
            "kl_div, log_target",
            shape,
            both_log_probs,
            lambda lib: lambda x, y: lib.kl_div(x, y, reduction="batchmean", log_target=True),
            (0,),
        ),
        ("binary_cross_entropy_with_logits", shape, labelled, lambda lib: lib.binary_cross_entropy_with_logits, (0,)),
        ("binary_cross_entropy", shape, labelled_probabilities, lambda lib: lib.binary_cross_entropy, (0,)),
        (
            "cosine_similarity",
            vectors,
            pairs,
            lambda lib: lambda x, y: lib.cosine_similarity(x, y).mean(),
            (0, 1),
        ),
        ("cosine_embedding_loss", vectors, labelled_pairs, lambda lib: lib.cosine_embedding_loss, (0, 1)),
    ]
    for what, size, make, of, leaves in table:
        loss = of(torch_functional)
        providers = (ours(of(functional)), eager(loss))
        yield Case("losses", what, size, dtype, make, providers, loss, leaves, (BOTH,), memory=True)
    yield from _divergence_cases(shape)
    yield Case(
        "losses",
        "entropy",
        shape,
        dtype,
        lambda rows: (_logits(rows, classes, dtype),),
        (ours(lambda x: measures.entropy(x).mean()), eager(entropy)),
        entropy,
        modes=(BOTH,),
        memory=True,
    )


def _divergence_cases(shape: tuple[int, int]) -> Iterator[Case]:
    """Yield divergences of two rows, both with a gradient, and token_stats, beside what one would write with torch."""
    classes, dtype = shape[1], torch.float32

    def two(rows: int) -> Inputs:
        return _logits(rows, classes, dtype), _logits(rows, classes, dtype)

    def js(p: Tensor, q: Tensor) -> Tensor:
        log_p, log_q = p.log_softmax(1), q.log_softmax(1)
        log_m = torch.logaddexp(log_p + math.log(_WEIGHT), log_q + math.log1p(-_WEIGHT))
        to_m = [torch_functional.kl_div(log_m, log, reduction="batchmean", log_target=True) for log in (log_p, log_q)]
        return _WEIGHT * to_m[0] + (1 - _WEIGHT) * to_m[1]

    def skewed_kl(p: Tensor, q: Tensor) -> Tensor:
        log_p, log_q = p.log_softmax(1), q.log_softmax(1)
        log_m = torch.logaddexp(log_p + math.log(_WEIGHT), log_q + math.log1p(-_WEIGHT))
        return torch_functional.kl_div(log_m, log_p, reduction="batchmean", log_target=True)

    def tv(p: Tensor, q: Tensor) -> Tensor:
        return (p.softmax(1) - q.softmax(1)).abs().sum(1).mean() / 2

    def tokens(logits: Tensor, target: Tensor) -> Tensor:
        log_p = logits.log_softmax(1)
        nll = torch_functional.nll_loss(log_p, target, reduction="none")
        entropy = -(log_p.exp() * log_p).sum(1)
        with torch.no_grad():
            rank = (logits > logits.gather(1, target[:, None])).sum(1)
        return _mixed(nll, logits.logsumexp(1), entropy, logits.argmax(1), rank)

    def token_stats(logits: Tensor, target: Tensor) -> Tensor:
        return _mixed(*measures.token_stats(logits, target)[:5])

    table: list[tuple[str, Callable[[int], Inputs], Loss, Loss, Sequence[int]]] = [
        (f"js, beta={_WEIGHT}", two, lambda p, q: measures.js(p, q, beta=_WEIGHT, reduction="mean"), js, (0, 1)),
        (f"kl, skew={_WEIGHT}", two, lambda p, q: measures.kl(p, q, skew=_WEIGHT, reduction="mean"), skewed_kl, (0, 1)),
        ("tv", two, lambda p, q: measures.tv(p, q, reduction="mean"), tv, (0, 1)),
        ("token_stats", indexed_logits(classes, dtype), token_stats, tokens, (0,)),
    ]
    for what, make, mine, theirs, leaves in table:
        yield Case(
            "losses", what, shape, dtype, make, (ours(mine), eager(theirs)), theirs, leaves, (BOTH,), memory=True
        )


def _mixed(nll: Tensor, lse: Tensor, entropy: Tensor, argmax: Tensor, rank: Tensor) -> Tensor:
    """Return a loss of all that token_stats gives; the integers take part without a gradient."""
    return (nll + 1e-3 * lse.square() - 0.1 * entropy).mean() + 0.0 * (argmax + rank).sum()


def indexed_logits(classes: int, dtype: torch.dtype) -> Callable[[int], Inputs]:
    """Return what makes rows of logits and a class for each."""
    return lambda rows: (_logits(rows, classes, dtype), torch.randint(classes, (rows,)))


def _logits(rows: int, classes: int, dtype: torch.dtype) -> Tensor:
    """Return rows of which one in four is confident, as a trained model's are."""
    logits = torch.randn(rows, classes).mul_(2)
    logits[::4, 0] += 20
    return logits.to(dtype)
