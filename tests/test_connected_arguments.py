"""Two arguments made of one tensor: the gradients that are made of plain operations count each path once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

import contrastive_oracles as contrastive
import logitless as ll
import logitless.functional as LF
import oracles

ROWS, CLASSES = 4, 6
TARGET = torch.tensor([0, 5, 2, 3])
SIGNS = torch.tensor([1, -1, 1, -1])
SAME = (torch.cat([SIGNS, SIGNS]).unsqueeze(1) == torch.cat([SIGNS, SIGNS])) & ~torch.eye(2 * ROWS, dtype=torch.bool)
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def skewed(p: Tensor, q: Tensor, skew: float) -> Tensor:
    mixture = (skew * p.softmax(-1) + (1 - skew) * q.softmax(-1)).log()
    return (p.softmax(-1) * (p.log_softmax(-1) - mixture)).sum(-1)


def weighted(p: Tensor, q: Tensor, beta: float) -> Tensor:
    mixture = (beta * p.softmax(-1) + (1 - beta) * q.softmax(-1)).log()
    of_p = (p.softmax(-1) * (p.log_softmax(-1) - mixture)).sum(-1)
    return beta * of_p + (1 - beta) * (q.softmax(-1) * (q.log_softmax(-1) - mixture)).sum(-1)


def cosent(scores: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    apart = (scale * (scores.unsqueeze(1) - scores)).masked_fill(labels.unsqueeze(1) >= labels, -torch.inf)
    return torch.cat([apart.reshape(-1), scores.new_zeros(1)]).logsumexp(0)


def hardest(vectors: Tensor, labels: Tensor, margin: float) -> Tensor:
    apart = (vectors.unsqueeze(1) - vectors + torch.eye(len(vectors), dtype=vectors.dtype).unsqueeze(2)).norm(dim=-1)
    same = labels.unsqueeze(1) == labels
    positive = same & ~torch.eye(len(vectors), dtype=torch.bool)
    farthest = apart.masked_fill(~positive, -torch.inf).amax(1)
    return (farthest - apart.masked_fill(same, torch.inf).amin(1) + margin).clamp(min=0).mean()


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
    "pair_stats, temperature": (
        lambda x: torch.stack(ll.pair_stats(x, x.flip(1), TARGET, temperature=2.0)[:6]),
        lambda x: torch.stack(list(oracles.pair_stats(x / 2, x.flip(1) / 2, TARGET).values())[:6]),
    ),
    "log_probs of a head": (
        lambda x: ll.log_probs(ll.linear(x, x.sin()), TARGET.clamp(max=3), temperature=2.0),
        lambda x: -torch.nn.functional.cross_entropy(x @ x.sin().T / 2, TARGET.clamp(max=3), reduction="none"),
    ),
    "kl, skew": (lambda x: ll.kl(x, x.flip(0), skew=0.25), lambda x: skewed(x, x.flip(0), 0.25)),
    "js, beta": (lambda x: ll.js(x, x * 2, beta=0.25), lambda x: weighted(x, x * 2, 0.25)),
    "tv": (
        lambda x: ll.tv(x, x.sin()),
        lambda x: (x.softmax(-1) - x.sin().softmax(-1)).abs().sum(-1) / 2,
    ),
    "two heads of one weight, beta": (
        lambda x: ll.js(ll.linear(x, x), ll.linear(x.flip(0), x), beta=0.75),
        lambda x: weighted(x @ x.T, x.flip(0) @ x.T, 0.75),
    ),
    "two heads of one weight, skew": (
        lambda x: ll.kl(ll.linear(x, x), ll.linear(x.flip(0), x), skew=0.1),
        lambda x: skewed(x @ x.T, x.flip(0) @ x.T, 0.1),
    ),
    "two heads of one weight, tv": (
        lambda x: ll.tv(ll.linear(x, x), ll.linear(x.sin(), x)),
        lambda x: ((x @ x.T).softmax(-1) - (x.sin() @ x.T).softmax(-1)).abs().sum(-1) / 2,
    ),
    "pairwise_cosine": (
        lambda x: ll.pairwise_cosine(x, x.sin()),
        lambda x: contrastive.units(x) @ contrastive.units(x.sin()).T,
    ),
    "pairwise_cosine of itself": (
        lambda x: ll.pairwise_cosine(x),
        lambda x: contrastive.units(x) @ contrastive.units(x).T,
    ),
    "info_nce": (
        lambda x: ll.info_nce(x, x.sin(), scale=x[0, 0].square() + 1, reduction="none"),
        lambda x: contrastive.info_nce(x, x.sin(), x[0, 0].square() + 1),
    ),
    "info_nce of itself": (
        lambda x: ll.info_nce(x, x, scale=2.0, negatives=x, normalize=False, reduction="none"),
        lambda x: contrastive.info_nce(x, x, 2.0, negatives=x, normalize=False),
    ),
    "info_nce, all directions": (
        lambda x: ll.info_nce(x, x.cos(), scale=2.0, negatives=x.sin(), directions=DIRECTIONS, reduction="none"),
        lambda x: contrastive.info_nce(x, x.cos(), 2.0, negatives=x.sin(), directions=DIRECTIONS),
    ),
    "info_nce, hardness": (
        lambda x: ll.info_nce(
            x,
            x.cos(),
            scale=2.0,
            negatives=torch.stack([x.sin(), x.flip(0)], 1),
            negative_mode="unpaired",
            hardness="hard_negatives",
            hardness_strength=0.5,
            reduction="none",
        ),
        lambda x: contrastive.info_nce(
            x,
            x.cos(),
            2.0,
            negatives=torch.stack([x.sin(), x.flip(0)], 1),
            shared=True,
            hardness="hard_negatives",
            strength=0.5,
        ),
    ),
    "clip_loss": (
        lambda x: ll.clip_loss(x, x.sin(), x[0, 0].exp()).reshape(1),
        lambda x: contrastive.clip(x, x.sin(), x[0, 0].exp()).reshape(1),
    ),
    "siglip_loss": (
        lambda x: ll.siglip_loss(x, x.sin(), x[0, 0].exp(), x[0, 1]).reshape(1),
        lambda x: contrastive.siglip(x, x.sin(), x[0, 0].exp(), x[0, 1]).reshape(1),
    ),
    "supcon_loss": (
        lambda x: ll.supcon_loss(torch.stack([x, x.sin()], 1), SIGNS, temperature=0.5, reduction="none"),
        lambda x: contrastive.supcon(torch.cat([x, x.sin()]), SAME, 0.5, 2 * ROWS),
    ),
    "cosent_loss": (
        lambda x: ll.cosent_loss((x, x.sin()), TARGET, scale=x[0, 0].exp()).reshape(1),
        lambda x: cosent(torch.nn.functional.cosine_similarity(x, x.sin()), TARGET, x[0, 0].exp()).reshape(1),
    ),
    "batch_triplet_loss": (
        lambda x: ll.batch_triplet_loss(torch.cat([x, x.sin()]), torch.cat([SIGNS, SIGNS]), margin=9.0).reshape(1),
        lambda x: hardest(torch.cat([x, x.sin()]), torch.cat([SIGNS, SIGNS]), 9.0).reshape(1),
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
