"""Two arguments made of one tensor: the gradients that are made of plain operations count each path once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

import logitless as ll
import logitless.functional as LF
import oracles

ROWS, CLASSES = 4, 6
TARGET = torch.tensor([0, 5, 2, 3])
SIGNS = torch.tensor([1, -1, 1, -1])
CASES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]] = {
    "kl": (lambda x: ll.kl(x, x.flip(0)), lambda x: oracles.kl(x, x.flip(0))),
    "kl, once": (lambda x: ll.kl(x, x.flip(0).detach()), lambda x: oracles.kl(x, x.flip(0).detach())),
    "js": (lambda x: ll.js(x, x * 2), lambda x: oracles.js(x, x * 2)),
    "pair_stats": (
        lambda x: torch.stack(ll.pair_stats(x, x.flip(1), TARGET)[:6]),
        lambda x: torch.stack(list(oracles.pair_stats(x, x.flip(1), TARGET).values())[:6]),
    ),
    "cosine_similarity": (
        lambda x: LF.cosine_similarity(x, x.flip(0)),
        lambda x: torch.nn.functional.cosine_similarity(x, x.flip(0)),
    ),
    "cosine_embedding_loss": (
        lambda x: LF.cosine_embedding_loss(x, x.roll(1, 0), SIGNS, reduction="none"),
        lambda x: torch.nn.functional.cosine_embedding_loss(x, x.roll(1, 0), SIGNS, reduction="none"),
    ),
    "a head of its own hidden states": (
        lambda x: LF.linear_cross_entropy(x, 2 * x, TARGET.clamp(max=3), reduction="none"),
        lambda x: torch.nn.functional.cross_entropy(2 * x @ x.T, TARGET.clamp(max=3), reduction="none"),
    ),
    "the same, reduced": (
        lambda x: LF.linear_cross_entropy(x, 2 * x, TARGET.clamp(max=3)).reshape(1),
        lambda x: torch.nn.functional.cross_entropy(2 * x @ x.T, TARGET.clamp(max=3)).reshape(1),
    ),
    "two heads of one weight": (
        lambda x: ll.kl(ll.linear(x, x), ll.linear(x.flip(0), x)),
        lambda x: oracles.kl(x @ x.T, x.flip(0) @ x.T),
    ),
    "two heads, on the reference": (
        lambda x: ll.js(ll.linear(x, x[:1]), ll.linear(x.flip(0), x[:1])) + ll.entropy(ll.linear(x, x)),
        lambda x: oracles.js(x @ x[:1].T, x.flip(0) @ x[:1].T) + oracles.entropy(x @ x.T),
    ),
    "token_stats of a head": (
        lambda x: ll.token_stats(ll.linear(x, x.sin(), scale=x[0, 0]), TARGET.clamp(max=3)).nll,
        lambda x: torch.nn.functional.cross_entropy(x @ x.sin().T * x[0, 0], TARGET.clamp(max=3), reduction="none"),
    ),
    "gather": (
        lambda x: ll.linear(x, x.sin()).gather(-1, TARGET.clamp(max=3).unsqueeze(1)).squeeze(1),
        lambda x: (x @ x.sin().T).gather(-1, TARGET.clamp(max=3).unsqueeze(1)).squeeze(1),
    ),
    "log_softmax": (
        lambda x: ll.linear(x, x.sin()).log_softmax(-1).gather(-1, TARGET.clamp(max=3).unsqueeze(1)).squeeze(1),
        lambda x: (x @ x.sin().T).log_softmax(-1).gather(-1, TARGET.clamp(max=3).unsqueeze(1)).squeeze(1),
    ),
    "materialize": (
        lambda x: ll.linear(x, x.sin()).materialize().square().sum(1),
        lambda x: (x @ x.sin().T).square().sum(1),
    ),
    "a fold of classes": (
        lambda x: torch.softmax(ll.linear(x, x.sin()), -1).square().sum(1),
        lambda x: torch.softmax(x @ x.sin().T, -1).square().sum(1),
    ),
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(ROWS, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CASES)
def test_gradients_that_are_plain(name: str, x: Tensor) -> None:
    ours, truth = CASES[name]
    leaf, known = x.clone().requires_grad_(), x.clone().requires_grad_()
    value, expected = ours(leaf), truth(known)
    torch.testing.assert_close(value, expected)
    upstream = torch.randn(3, *value.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    want = torch.stack([torch.autograd.grad(expected, known, g, retain_graph=True)[0] for g in upstream])
    once, again = (
        torch.stack([torch.autograd.grad(value, leaf, g, retain_graph=True, create_graph=c)[0] for g in upstream])
        for c in (False, True)
    )
    (batched,) = torch.autograd.grad(value, leaf, upstream, is_grads_batched=True)
    for got in (once, again.detach(), batched):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_every_kind(name: str, x: Tensor) -> None:
    ours, truth = CASES[name]
    expected = jacobian(truth, x)
    torch.testing.assert_close(jacobian(ours, x, vectorize=True), expected)
    torch.testing.assert_close(torch.func.jacrev(ours)(x), expected)
    second = hessian(lambda x: truth(x).square().sum(), x)
    for vectorize in (False, True):
        torch.testing.assert_close(hessian(lambda x: ours(x).square().sum(), x, vectorize=vectorize), second)
