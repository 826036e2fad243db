"""open_clip's own losses, beside the same with ours in their places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import contrastive_ranks
from logitless._heads import square
from logitless.integrations import open_clip as ours
from open_clip_losses import theirs


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(square, "TILE_ROWS", 16)
    monkeypatch.setattr(square, "TILE_COLUMNS", 12)


def features(dtype: torch.dtype, rows: int = 65) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(2, rows, 24, generator=generator, dtype=torch.float64)
    return [F.normalize(x, dim=1).to(dtype).requires_grad_() for x in made]


@pytest.mark.parametrize("rows", [1, 7, 65])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["ClipLoss", "SigLipLoss"])
def test_values_and_gradients(kind: str, dtype: torch.dtype, rows: int) -> None:
    mine, true = (getattr(module, kind)(cache_labels=True) for module in (ours, theirs()))
    results = []
    for loss in (mine, true):
        leaves = [*features(dtype, rows), *(torch.tensor(x, dtype=dtype, requires_grad=True) for x in (9.0, -4.0))]
        value = loss(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value * -1.7, leaves)])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    # A gradient that cancels to nothing, as one pair's and a bias's under a softmax do, is held to the largest.
    largest = max(x.abs().max().item() for x in results[1][1:])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        limit = tolerance * max(expected.abs().max().item(), largest, 1e-2)
        assert (got - expected).abs().max().item() <= limit


@pytest.mark.parametrize("kind", ["ClipLoss", "SigLipLoss"])
def test_output_dict(kind: str) -> None:
    leaves = [*features(torch.float64), 9.0, -4.0]
    mine, true = (getattr(module, kind)()(*leaves, output_dict=True) for module in (ours, theirs()))
    assert list(mine) == list(true) == ["contrastive_loss"]
    torch.testing.assert_close(mine["contrastive_loss"], true["contrastive_loss"], rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_added_up_in_float32(dtype: torch.dtype) -> None:
    leaves = features(dtype)
    for kind in ("ClipLoss", "SigLipLoss"):
        loss = getattr(ours, kind)()(*leaves, torch.tensor(100.0), torch.tensor(-10.0))
        exact = getattr(theirs(), kind)()(*(x.detach().double() for x in leaves), 100.0, -10.0)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


def test_signatures_are_the_same() -> None:
    import inspect

    for kind in ("ClipLoss", "SigLipLoss"):
        for method in ("__init__", "forward"):
            mine, true = (
                [
                    (p.name, p.default)
                    for p in inspect.signature(getattr(getattr(module, kind), method)).parameters.values()
                ]
                for module in (ours, theirs())
            )
            assert mine == true


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: ours.ClipLoss(use_horovod=True), "use_horovod=True is not supported"),
        (lambda: ours.ClipLoss(local_loss=True, world_size=2), "pass gather_with_grad=True as well"),
        (lambda: ours.SigLipLoss(dist_impl="tree"), "dist_impl must be 'bidir', 'shift', 'reduce' or 'gather'"),
        (lambda: ours.ClipLoss(world_size=2)(*features(torch.float64), 1.0), "world_size=2 needs as many processes"),
    ],
)
def test_what_is_not_served_is_refused(make: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make()


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes(world: int) -> None:
    """Of the package's own gather, which wants as many rows on each."""
    wrong = contrastive_ranks.run(world, pattern=contrastive_ranks.CLIPS)
    assert not wrong, "\n".join(wrong.values())
