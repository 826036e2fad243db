"""CoSENT's loss and the losses of triplets, against every pair and every triplet in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll
from test_contrastive import FLOATS, check, vectors
from test_lazy import NoTensorOf


def cosent(scores: Tensor, labels: Tensor, scale: Tensor | float) -> Tensor:
    gaps = scale * (scores[:, None] - scores)
    lower = labels[:, None] < labels
    return torch.log1p(gaps.masked_fill(~lower, -torch.inf).exp().sum())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 2, 7, 65, 1000])
@pytest.mark.parametrize("levels", [2, 6, 10**6])
def test_cosent(n: int, levels: int, dtype: torch.dtype) -> None:
    labels = torch.randint(levels, (n,), generator=torch.Generator().manual_seed(n)) / levels
    scores = vectors(n, dtype=dtype).detach().tanh().requires_grad_()
    scale = torch.tensor(3.7, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
    if len(labels.unique()) < 2:
        loss = ll.cosent_loss(scores, labels, scale=scale)
        assert loss.item() == 0
        assert not any(grad.count_nonzero() for grad in torch.autograd.grad(loss, (scores, scale)))
        return
    check(lambda s, k: ll.cosent_loss(s, labels, scale=k), lambda s, k: cosent(s, labels, k), (scores, scale))


def test_cosent_of_embeddings() -> None:
    first, second = vectors(40, 9), vectors(40, 9, seed=1)
    labels = torch.arange(40) % 7
    check(
        lambda x, y: ll.cosent_loss((x, y), labels),
        lambda x, y: cosent(F.cosine_similarity(x, y), labels, 20.0),
        (first, second),
    )


def test_cosent_of_well_ordered_pairs_keeps_its_digits() -> None:
    scores = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    loss = ll.cosent_loss(scores, torch.arange(3), scale=60.0)
    exact = 2 * torch.tensor(-30.0, dtype=torch.float64).exp() + torch.tensor(-60.0, dtype=torch.float64).exp()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, scores)[0][0].double(), exact * 30, rtol=1e-6, atol=0)


def test_cosent_twice() -> None:
    scores, labels = vectors(9), torch.arange(9) % 4
    assert torch.autograd.gradgradcheck(lambda s: ll.cosent_loss(s, labels, scale=2.0), (scores,))


def test_cosent_makes_no_matrix() -> None:
    scores = vectors(5000)
    with NoTensorOf(5001):
        ll.cosent_loss(scores, torch.arange(5000) % 11).backward()


def distance_matrix(x: Tensor, distance: str) -> Tensor:
    if distance == "cosine":
        unit = x / x.norm(dim=1, keepdim=True)
        return 1 - unit @ unit.T
    return (x[:, None] - x).square().sum(-1).clamp(min=1e-300).sqrt()


def every_triplet(x: Tensor, labels: Tensor, kind: str, margin: float, distance: str) -> Tensor:
    apart = distance_matrix(x, distance)
    total, counted = x.sum() * 0, 0
    for a in range(len(x)):
        positives = [p for p in range(len(x)) if p != a and labels[p] == labels[a]]
        negatives = [n for n in range(len(x)) if labels[n] != labels[a]]
        if not positives or not negatives:
            continue
        if kind == "hard":
            total = total + (apart[a, positives].max() - apart[a, negatives].min() + margin).clamp(min=0)
            counted += 1
            continue
        for p in positives:
            if kind == "semi_hard":
                farther = [n for n in negatives if apart[a, n] > apart[a, p]]
                chosen = apart[a, farther].min() if farther else apart[a, negatives].max()
                total = total + (apart[a, p] - chosen + margin).clamp(min=0)
                counted += 1
            else:
                losses = (apart[a, p] - apart[a, negatives] + margin).clamp(min=0)
                total = total + losses.sum()
                counted += int((losses > 0).sum())
    return total / max(counted, 1)


KINDS = ("hard", "semi_hard", "all")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "margin"), [(1, 1.0), (7, 0.3), (65, 0.2), (65, 0.0)])
def test_triplets(
    n: int, margin: float, kind: Any, distance: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitless._heads.triplets._STRIP", 400)
    features = vectors(n, 5, dtype=dtype, strided=True)
    labels = torch.randint(max(2, n // 5), (n,), generator=torch.Generator().manual_seed(n))
    check(
        lambda x: ll.batch_triplet_loss(x, labels, kind=kind, margin=margin, distance=distance),
        lambda x: every_triplet(x, labels, kind, margin, distance),
        (features,),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_triplets_twice_and_by_transforms(kind: Any) -> None:
    features, labels = vectors(8, 3), torch.arange(8) % 3

    def loss(x: Tensor) -> Tensor:
        return ll.batch_triplet_loss(x, labels, kind=kind, margin=0.5)

    assert torch.autograd.gradgradcheck(loss, (features,))
    plain = torch.autograd.grad(loss(features), features)[0]
    torch.testing.assert_close(torch.func.grad(loss)(features.detach()), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_triplets_of_duplicates_have_finite_gradients(kind: Any) -> None:
    features = torch.ones(6, 3, requires_grad=True)
    loss = ll.batch_triplet_loss(features, torch.arange(6) % 2, kind=kind, margin=1.0)
    assert loss.item() == 1
    assert not torch.autograd.grad(loss, features)[0].count_nonzero()


@pytest.mark.parametrize("kind", KINDS)
def test_distances_of_close_vectors_far_out_are_not_lost(kind: Any) -> None:
    features = (1000 + vectors(30, 4, dtype=torch.float32).detach()).requires_grad_()
    labels = torch.arange(30) % 4
    check(
        lambda x: ll.batch_triplet_loss(x, labels, kind=kind, margin=0.3),
        lambda x: every_triplet(x, labels, kind, 0.3, "euclidean"),
        (features,),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_one_class_has_no_triplet(kind: Any) -> None:
    features = vectors(6, 3)
    loss = ll.batch_triplet_loss(features, torch.zeros(6, dtype=torch.int64), kind=kind)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, features)[0].count_nonzero()


@pytest.mark.parametrize("kind", KINDS)
def test_no_matrix_of_distances_is_made(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitless._heads.triplets._STRIP", 1 << 14)
    features = vectors(1000, 4)
    with NoTensorOf(1000 * 1000 // 20):
        ll.batch_triplet_loss(features, torch.arange(1000) % 10, kind=kind, margin=0.1).backward()


def test_errors_say_what_to_do() -> None:
    x, labels = torch.randn(4, 3), torch.arange(4)
    with pytest.raises(ValueError, match="kind must be 'hard'"):
        ll.batch_triplet_loss(x, labels, kind="easy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels \(N,\), got \(4, 3\) and \(3,\)"):
        ll.batch_triplet_loss(x, labels[:3])
    with pytest.raises(ValueError, match=r"scores and labels must be \(N,\)"):
        ll.cosent_loss(x, labels)
    with pytest.raises(ValueError, match="scale must be above 0"):
        ll.cosent_loss(x[:, 0], labels, scale=0.0)
