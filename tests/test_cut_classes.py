"""A head whose classes are cut into tiles, of which one or all hold nothing but -inf: the same as of whole rows."""

import math

import pytest
import torch
from torch import Tensor

import logitless as ll
import logitless.functional as LF

ROWS, CLASSES, WIDTH = 64, 4096, 8
TILE = 732  # classes of a tile under LITTLE bytes
LITTLE = 200_000


@pytest.fixture(scope="module")
def parts() -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, WIDTH, generator=make), torch.randn(CLASSES, WIDTH, generator=make)


def masked(where: str) -> Tensor:
    """Return a bias of -inf for blocks of classes."""
    bias = torch.zeros(CLASSES)
    blocks = {
        "a half": slice(CLASSES // 2, None),
        "the first half": slice(0, CLASSES // 2),
        "a tile": slice(TILE, 2 * TILE),
        "all but a tile": [*range(TILE), *range(2 * TILE, CLASSES)],
        "all but one": [*range(1000), *range(1001, CLASSES)],
        "all": slice(None),
    }
    bias[blocks[where]] = -math.inf
    return bias


def probabilities(bias: Tensor) -> Tensor:
    drawn = torch.rand(ROWS, CLASSES, generator=torch.Generator().manual_seed(1)) * (bias == 0)
    return drawn / drawn.sum(1, keepdim=True).clamp(min=1e-30)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("where", ["a half", "the first half", "a tile", "all but a tile", "all but one", "all"])
def test_cut_is_whole(
    where: str, kind: str, weighted: bool, smoothing: float, reduction: str, parts: tuple[Tensor, Tensor]
) -> None:
    hidden, weight = parts
    bias = masked(where)
    target = torch.arange(ROWS) * 64 if kind == "indices" else probabilities(bias)
    options = {
        "linear_bias": bias,
        "weight": (bias == 0).float() if weighted else None,
        "label_smoothing": smoothing,
        "reduction": reduction,
    }
    explained = ll.explain(LF.linear_cross_entropy, hidden, weight, target, **options, max_bytes=LITTLE)
    assert explained.tile is not None
    assert explained.tile[1] < CLASSES
    found = []
    for max_bytes in (LITTLE, None):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = LF.linear_cross_entropy(*leaves, target, **options, max_bytes=max_bytes)
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
    cut, whole = found
    torch.testing.assert_close(cut[0], whole[0], equal_nan=True)
    if bool(whole[0].isfinite().all()):
        for mine, expected in zip(cut[1:], whole[1:], strict=True):
            torch.testing.assert_close(mine, expected, equal_nan=True)
    expected = torch.nn.functional.cross_entropy(
        torch.where(bias == 0, hidden.double() @ weight.double().T, -math.inf),
        target if kind == "indices" else target.double(),
        label_smoothing=smoothing,
        reduction=reduction,
    )
    if not weighted and kind == "indices" and smoothing < 1:
        torch.testing.assert_close(whole[0].double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beside", [-math.inf, 0.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nan_is_not_lost_beside_minus_infinity(beside: float, smoothing: float, dtype: torch.dtype) -> None:
    """A NaN logit in a tile that has no other number."""
    bias = torch.zeros(CLASSES, dtype=dtype)
    bias[TILE : 2 * TILE] = beside
    bias[TILE + 5] = math.nan
    hidden, weight = torch.zeros(ROWS, WIDTH, dtype=dtype), torch.zeros(CLASSES, WIDTH, dtype=dtype)
    for target in (torch.zeros(ROWS, dtype=torch.int64), torch.eye(ROWS, CLASSES, dtype=dtype)):
        for max_bytes in (LITTLE, None):
            loss = LF.linear_cross_entropy(
                hidden,
                weight,
                target,
                linear_bias=bias,
                max_bytes=max_bytes,
                reduction="none",
                label_smoothing=smoothing,
            )
            assert loss.isnan().all()


@pytest.mark.parametrize("classes", [1, 3, 7, 65, 1000, 5000, 70_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_of_nan_and_minus_infinity_is_nan(classes: int, dtype: torch.dtype) -> None:
    for at in {0, classes // 2, classes - 1}:
        logits = torch.full((2, classes), -math.inf, dtype=dtype)
        logits[0, at] = math.nan
        for rows in (logits, logits.T.contiguous().T):
            stats = ll.token_stats(rows, torch.zeros(2, dtype=torch.int64))
            assert stats.lse.isnan().all()
            assert ll.entropy(rows).isnan().all()
            assert int(stats.argmax[0]) == at
        lazy = ll.linear(torch.eye(2, dtype=dtype).nan_to_num(), torch.zeros(classes, 2, dtype=dtype), logits[0])
        assert lazy.logsumexp(-1).isnan().all()


@pytest.mark.parametrize("classes", [2, 3])
def test_the_mean_of_many_positions_does_not_depend_on_threads(classes: int) -> None:
    make = torch.Generator().manual_seed(3)
    logits = torch.randn(1, classes, 1500, 1700, generator=make)
    target = torch.randint(classes, (1, 1500, 1700), generator=make)
    weight = torch.rand(classes, generator=make)
    threads = torch.get_num_threads()
    for given in ((target,), (target, weight), (logits.softmax(1),)):
        expected = torch.nn.functional.cross_entropy(
            logits.double(), *(t.double() if t.is_floating_point() else t for t in given)
        )
        found = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(LF.cross_entropy(logits, *given).item())
        finally:
            torch.set_num_threads(threads)
        assert len(set(found)) == 1
        assert found[0] == pytest.approx(expected.item(), rel=1.2e-7)
