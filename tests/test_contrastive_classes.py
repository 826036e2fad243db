"""SigLIP's loss and the supervised contrastive loss: brute force in float64, and their own pitfalls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import contrastive_oracles as oracle
import logitless as ll
from logitless._heads import square
from test_contrastive import FLOATS, check, vectors
from test_contrastive import small_tiles as small_tiles  # a fixture for all tests here
from test_lazy import NoTensorOf


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 7, 65, 200])
def test_siglip_loss(n: int, dtype: torch.dtype) -> None:
    image, text = (
        F.normalize(vectors(n, 21, seed=seed), dim=1).detach().to(dtype).requires_grad_() for seed in range(2)
    )
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    scale, bias = (torch.tensor(value, dtype=kind, requires_grad=True) for value in (11.3, -4.7))
    check(ll.siglip_loss, oracle.siglip, (image, text, scale, bias))


def test_siglip_of_unnormalised_strided_features_without_a_bias() -> None:
    image, text = (vectors(67, 9, seed=seed, strided=True) for seed in range(2))
    check(lambda x, y: ll.siglip_loss(x, y, 0.7), lambda x, y: oracle.siglip(x, y, 0.7), (image, text))
    assert set(ll.siglip_loss(image, text, 0.7, output_dict=True)) == {"contrastive_loss"}


def test_siglip_at_logits_far_out_is_finite_and_keeps_small_losses() -> None:
    image = torch.eye(40).requires_grad_()
    loss = ll.siglip_loss(image, image.detach(), 140.0, -70.0)
    expected = oracle.siglip(torch.eye(40).double(), torch.eye(40).double(), 140.0, -70.0)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-6, atol=0)
    assert 0 < expected.item() < 1e-28
    assert bool(torch.autograd.grad(loss, image)[0].isfinite().all())


def test_siglip_twice_and_by_transforms() -> None:
    image, text = vectors(5, 3), vectors(5, 3, seed=1)
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (2.3, -1.7))
    assert torch.autograd.gradgradcheck(ll.siglip_loss, (image, text, scale, bias))
    got = torch.func.grad(lambda x: ll.siglip_loss(x, text.detach(), 2.3))(image.detach())
    exact = torch.autograd.grad(oracle.siglip(image, text, 2.3), image)[0]
    torch.testing.assert_close(got, exact)


LABELS = torch.tensor([0, 1, 0, 2, 1, 3, 0, 4, 4, 1, 5, 2])  # 3 and 5 are alone


def flat(x: Tensor) -> Tensor:
    return torch.cat(x.unbind(1))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize(("samples", "views"), [(1, 1), (7, 1), (12, 2), (65, 3)])
def test_supcon_loss(samples: int, views: int, mode: Any, dtype: torch.dtype) -> None:
    features = vectors(samples, views, 9, dtype=dtype)
    labels = LABELS.repeat(9)[:samples]
    every = labels.repeat(views)
    positive = (every[:, None] == every) & ~torch.eye(len(every), dtype=torch.bool)
    temperature = torch.tensor(0.9, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    anchors = len(every) if mode == "all" else samples
    check(
        lambda x, t: ll.supcon_loss(x, labels, temperature=t, contrast_mode=mode, reduction="none"),
        lambda x, t: oracle.supcon(flat(x), positive, t, anchors),
        (features, temperature.requires_grad_()),
    )


@pytest.mark.parametrize("views", [1, 2])
def test_supcon_by_a_mask_and_without_labels(views: int) -> None:
    features = vectors(40, views, 9)
    mask = torch.rand(40, 40, generator=torch.Generator().manual_seed(1)) > 0.8
    apart = ~torch.eye(40 * views, dtype=torch.bool)
    check(
        lambda x: ll.supcon_loss(x, mask=mask.float(), temperature=1.3, reduction="none"),
        lambda x: oracle.supcon(flat(x), mask.repeat(views, views) & apart, 1.3, 40 * views),
        (features,),
    )
    if views > 1:
        own = torch.eye(40, dtype=torch.bool).repeat(views, views) & apart
        check(
            lambda x: ll.supcon_loss(x, temperature=1.3, reduction="none"),
            lambda x: oracle.supcon(flat(x), own, 1.3, 40 * views),
            (features,),
        )


def test_supcon_of_long_features_has_no_empty_sum() -> None:
    """The entry of a view with itself, here 10,000 / 0.07, must not be the largest that is subtracted."""
    features = F.normalize(vectors(24, 1, 8), dim=-1).detach().mul_(100).requires_grad_()
    labels = torch.arange(24) // 2
    positive = (labels[:, None] == labels) & ~torch.eye(24, dtype=torch.bool)
    check(
        lambda x: ll.supcon_loss(x, labels, reduction="none"),
        lambda x: oracle.supcon(flat(x), positive, 0.07, 24),
        (features,),
    )


def test_anchors_without_a_positive() -> None:
    features = vectors(12, 1, 5)
    rows = ll.supcon_loss(features, LABELS, temperature=0.5, reduction="none")
    assert rows[5].item() == rows[10].item() == 0
    torch.testing.assert_close(ll.supcon_loss(features, LABELS, temperature=0.5), rows.sum() / 10)
    zero = ll.supcon_loss(features, LABELS, temperature=0.5, without_positive="zero")
    torch.testing.assert_close(zero, rows.sum() / 12)
    alone = ll.supcon_loss(features, torch.arange(12), temperature=0.5)
    assert alone.item() == 0
    assert not torch.autograd.grad(alone, features)[0].count_nonzero()


def test_base_temperature_is_a_factor() -> None:
    features = vectors(12, 1, 5)
    plain = ll.supcon_loss(features, LABELS, temperature=0.1)
    torch.testing.assert_close(ll.supcon_loss(features, LABELS, temperature=0.1, base_temperature=0.07), plain / 0.7)


def test_no_matrix_is_built_or_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(square, "TILE_ROWS", 64)
    monkeypatch.setattr(square, "TILE_COLUMNS", 64)
    monkeypatch.setattr("logitless._heads.pairs_of_rows._LISTED", 1 << 12)
    n = 1000
    image, text = vectors(n, 8), vectors(n, 8, seed=1)
    labels = torch.arange(n) % 10
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (3.0, -2.0))
    with NoTensorOf(n * n // 20), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = (
            ll.siglip_loss(image, text, scale, bias),
            ll.supcon_loss(image, labels),
            ll.supcon_loss(image.unsqueeze(1).expand(-1, 2, -1), labels, contrast_mode="one"),
        )
        for loss in losses:
            loss.backward()
    assert sum(kept.values()) < n * n


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"labels": torch.zeros(3)}, r"labels must be \(4,\)"),
        ({"labels": torch.zeros(4), "mask": torch.eye(4)}, "pass one of them"),
        ({"mask": torch.eye(3)}, r"mask must be \(4, 4\)"),
        ({"contrast_mode": "two"}, "contrast_mode must be"),
        ({"temperature": -0.1}, "temperature must be above 0"),
        ({"without_positive": "nan"}, "without_positive must be"),
    ],
)
def test_errors_say_what_to_do(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ll.supcon_loss(torch.randn(4, 1, 3), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_supcon_is_that_of_pytorch_metric_learning(dtype: torch.dtype) -> None:
    """Of normalized vectors, the mean over anchors that have a positive; theirs adds 1e-7 to a count in float32."""
    from pytorch_metric_learning.losses import SupConLoss

    labels = torch.randint(9, (65,), generator=torch.Generator().manual_seed(1))
    labels[3] = 100  # nobody else's
    for temperature in (0.1, 0.7):
        results = []
        for loss in (
            lambda x, t=temperature: ll.supcon_loss(x, labels, temperature=t, normalize=True),
            lambda x, t=temperature: SupConLoss(temperature=t)(x, labels),
        ):
            features = vectors(65, 16, dtype=dtype)
            value = loss(features)
            results.append((value.detach(), torch.autograd.grad(value * 1.7, features)[0]))
        (value, gradient), (theirs, of_theirs) = results
        torch.testing.assert_close(value, theirs, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)
        limit = (2e-6 if dtype == torch.float32 else 1e-11) * of_theirs.abs().max().item()
        assert (gradient - of_theirs).abs().max().item() <= limit


@pytest.mark.parametrize("kind", ["hard", "semi_hard", "all"])
@pytest.mark.parametrize("apart", [0.0, 1e-12, 1e-7])
def test_vectors_that_are_close_to_each_other(apart: float, kind: str) -> None:
    """Distances far below a rounding of the vectors' squares, with the gradient that their differences give."""
    draw = torch.Generator().manual_seed(5)
    center = torch.randn(1, 33, generator=draw, dtype=torch.float64)
    shift = torch.randn(8, 33, generator=draw, dtype=torch.float64)
    near = (center + apart * shift).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
    loss = ll.batch_triplet_loss(near, labels, kind=kind, margin=0.5)
    upstream = torch.tensor(-1.7, dtype=torch.float64)
    (grad,) = torch.autograd.grad(loss, near, upstream, retain_graph=True)
    (batched,) = torch.autograd.grad(loss, near, upstream.expand(1), is_grads_batched=True)
    if apart == 0:
        assert loss == 0.5
        assert not grad.any()
        assert not batched.any()
        return
    # The same triplets, `apart` of each other in place of 1: from the differences as they were rounded.
    scaled = ((near.detach() - near.detach()[:1]) / apart).requires_grad_()
    truth = ll.batch_triplet_loss(scaled, labels, kind=kind, margin=0.5 / apart)
    (expected,) = torch.autograd.grad(truth, scaled, upstream)
    assert float(loss.detach() - 0.5) == pytest.approx(float(truth.detach() * apart - 0.5), abs=2e-16)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(batched[0], expected, rtol=0, atol=4e-16 / apart)
