"""Cosines of all pairs, by name and as torch's broadcast, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as torch_functional
from torch import Tensor

import logitless as ll
import logitless.functional as F
from test_contrastive import CLOSE, FLOATS, assert_near, vectors
from test_lazy import NoTensorOf


def exact(x: Tensor, y: Tensor) -> Tensor:
    return torch_functional.cosine_similarity(x.unsqueeze(1), y.unsqueeze(0), dim=-1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 9, 5), (65, 3, 33), (1, 40, 7), (1000, 65, 129)])
def test_all_pairs(shape: tuple[int, int, int], strided: bool, dtype: torch.dtype) -> None:
    n, m, d = shape
    x, y = (vectors(rows, d, dtype=dtype, seed=seed, strided=strided) for seed, rows in enumerate((n, m)))
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    expected = exact(*wide)
    upstream = torch.randn(n, m, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    truths = torch.autograd.grad(expected, wide, upstream)
    made = {
        "pairwise": ll.pairwise_cosine(x, y),
        "broadcast": F.cosine_similarity(x.unsqueeze(1), y.unsqueeze(0), dim=-1),
        "turned": F.cosine_similarity(y.unsqueeze(0), x.unsqueeze(1), dim=2),
    }
    for name, got in made.items():
        half = name != "pairwise" and dtype == torch.bfloat16
        assert got.dtype == (torch.float32 if dtype == torch.bfloat16 and not half else dtype)
        assert bool((got.abs() <= 1).all())
        near = {torch.float64: 1e-15, torch.float32: 4e-7, torch.bfloat16: 4e-3 if half else 4e-7}[dtype]
        assert (got.double() - expected).abs().max() <= near
        grads = torch.autograd.grad(got, (x, y), upstream.to(got.dtype))
        for grad, truth in zip(grads, truths, strict=True):
            assert grad.dtype == dtype
            assert_near(grad, truth, CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_with_itself(dtype: torch.dtype) -> None:
    x = vectors(40, 9, dtype=dtype)
    wide = x.detach().double().requires_grad_()
    upstream = torch.randn(40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_near(
        torch.autograd.grad(ll.pairwise_cosine(x), x, upstream.to(dtype))[0],
        torch.autograd.grad(exact(wide, wide), wide, upstream)[0],
        CLOSE[dtype],
    )
    torch.testing.assert_close(ll.pairwise_cosine(x).diagonal(), torch.ones(40, dtype=dtype), rtol=2e-7, atol=0)


def test_short_and_zero_vectors() -> None:
    """Those shorter than eps are divided by it, as torch divides them; by name they are divided by their own length."""
    x, y = vectors(6, 4), vectors(5, 4, seed=1)
    with torch.no_grad():
        x[0] = 0
        x[1] *= 1e-12
    upstream = torch.randn(6, 5, dtype=torch.float64)
    got = F.cosine_similarity(x.unsqueeze(1), y.unsqueeze(0), dim=-1)
    each = F.cosine_similarity(x.unsqueeze(1).expand(6, 5, 4), y.unsqueeze(0).expand(6, 5, 4), dim=-1)
    torch.testing.assert_close(got, torch_functional.cosine_similarity(x.unsqueeze(1), y.unsqueeze(0), dim=-1))
    torch.testing.assert_close(got, each, rtol=1e-12, atol=1e-15)
    product, pairs = (torch.autograd.grad(made, (x, y), upstream) for made in (got, each))
    again = torch.autograd.grad(
        F.cosine_similarity(x.unsqueeze(1), y.unsqueeze(0), dim=-1), (x, y), upstream, create_graph=True
    )
    for grad, other, twice in zip(product, pairs, again, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(grad, twice.detach(), rtol=1e-10, atol=1e-12)
    named = ll.pairwise_cosine(x, y)
    assert not named[0].count_nonzero()
    torch.testing.assert_close(named[1], exact(x * 1e12, y)[1])
    assert not torch.autograd.grad(named, x, upstream)[0][0].count_nonzero()


def test_no_temporary_of_all_pairs_and_features() -> None:
    x, y = vectors(60, 50), vectors(70, 50, seed=1)
    with NoTensorOf(60 * 70 + 1):
        ll.pairwise_cosine(x, y).sum().backward()
    x, y = vectors(100, 150), vectors(90, 150, seed=1)
    with NoTensorOf(150 * 100 + 1):
        F.cosine_similarity(x.unsqueeze(1), y, dim=-1).sum().backward()
        F.cosine_similarity(x, y.unsqueeze(1), dim=2).sum().backward()


@pytest.mark.parametrize("sizes", [(7, 3, 5), (130, 70, 129)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_in_a_compiled_graph(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    """The operator there takes the same way: the same bits."""
    n, m, d = sizes
    x, y = vectors(n, d, dtype=dtype), vectors(m, d, dtype=dtype, seed=1)

    def broadcast(x: Tensor, y: Tensor) -> Tensor:
        return F.cosine_similarity(x.unsqueeze(1), y.unsqueeze(0), dim=-1)

    upstream = torch.randn(n, m, dtype=dtype)
    results = []
    for function in (broadcast, torch.compile(broadcast, backend="aot_eager", fullgraph=True, dynamic=True)):
        made = function(x, y)
        results.append((made.detach(), *torch.autograd.grad(made, (x, y), upstream)))
    assert all(map(torch.equal, *results))


def test_lengths_at_the_ends_of_the_range() -> None:
    """Squares that overflow or vanish: the same cosines as of vectors of length 1, by name and broadcast."""
    x, y = vectors(130, 129, dtype=torch.float64).detach(), vectors(70, 129, dtype=torch.float64, seed=1).detach()
    expected = exact(x, y)
    for scale in (1e300, 2.0**1020, 1e-300, 1e-160):
        for made in (
            ll.pairwise_cosine(x * scale, y),
            F.cosine_similarity((x * scale).unsqueeze(1), y.unsqueeze(0), dim=-1, eps=0),
        ):
            torch.testing.assert_close(made, expected, rtol=1e-14, atol=1e-15)
    small = ll.pairwise_cosine((x * 2.0**-130).float(), (y * 2.0**120).float())
    torch.testing.assert_close(
        small.double(), expected, rtol=1e-4, atol=1e-4
    )  # the vectors have lost their last digits
    for scale in (1e300, 1e-300):
        torch.testing.assert_close(
            ll.info_nce(x[:70] * scale, y, temperature=0.1), ll.info_nce(x[:70], y, temperature=0.1), rtol=1e-13, atol=0
        )
    x[0, 1] = torch.nan
    assert ll.pairwise_cosine(x, y)[0].isnan().all()
    assert F.cosine_similarity(x.unsqueeze(1), y.unsqueeze(0), dim=-1)[0].isnan().all()


def test_out() -> None:
    x, y = vectors(9, 4).detach(), vectors(7, 4, seed=1).detach()
    expected = ll.pairwise_cosine(x, y)
    for out in (torch.empty(9, 7, dtype=torch.float64), torch.empty(9, 14, dtype=torch.float32)[:, ::2]):
        assert ll.pairwise_cosine(x, y, out=out) is out
        torch.testing.assert_close(out, expected.to(out.dtype))
    with pytest.raises(RuntimeError, match="out takes no gradient"):
        ll.pairwise_cosine(x.requires_grad_(), y, out=torch.empty(9, 7))


def test_twice_and_by_transforms() -> None:
    x, y = vectors(4, 3), vectors(3, 3, seed=1)
    assert torch.autograd.gradgradcheck(ll.pairwise_cosine, (x, y))
    assert torch.autograd.gradgradcheck(
        lambda a, b: F.cosine_similarity(a.unsqueeze(1), b.unsqueeze(0), dim=-1), (x, y)
    )
    got = torch.func.grad(lambda a: ll.pairwise_cosine(a, y.detach()).square().sum())(x.detach())
    torch.testing.assert_close(got, torch.autograd.grad(exact(x, y).square().sum(), x)[0])


def test_errors_say_what_to_do() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"x must be \(N, D\) and y \(M, D\), got \(4, 3\) and \(4, 2\)"):
        ll.pairwise_cosine(x, x[:, :2])
    with pytest.raises(ValueError, match=r"out must be floating \(4, 4\)"):
        ll.pairwise_cosine(x, out=torch.empty(4, 3))
    with pytest.raises(TypeError, match="y must be a Tensor of a floating dtype"):
        ll.pairwise_cosine(x, x.long())
