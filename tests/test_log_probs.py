"""`ll.log_probs`, and what `ll.token_stats` says at a temperature and of the top classes, against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

import logitless as ll

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64", "bf16", "f16"])
temperatures = pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
WIDTH = 12


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(classes: int, rows: int = 9) -> tuple[Tensor, Tensor]:
    logits = 3 * draw(classes, rows, classes)
    logits[0, classes // 2] += 20
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(rows))
    target[0] = classes // 2
    target[1::4] = -100
    return logits, target


def picked(logits: Tensor, target: Tensor) -> Tensor:
    """What trainers write."""
    kept = target != -100
    index = target.clamp(min=0)
    return torch.where(kept, logits.log_softmax(-1).gather(-1, index[..., None]).squeeze(-1), 0.0)


def real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@temperatures
@dtypes
@pytest.mark.parametrize("classes", [1, 7, 65, 1000, 49153])
def test_log_probs(classes: int, dtype: torch.dtype, temperature: float) -> None:
    logits, target = problem(classes)
    own = logits.to(dtype).requires_grad_()
    exact = own.detach().double().requires_grad_()
    got, true = ll.log_probs(own, target, temperature=temperature), picked(exact / temperature, target)
    assert got.dtype == real(dtype)
    # The textbook's subtraction rounds the log-sum-exp.
    slack = {torch.float32: (2e-7, 1e-14), torch.float64: (1e-14, 4e-14)}[got.dtype]
    torch.testing.assert_close(got.double(), true, rtol=slack[0], atol=slack[1])
    upstream = 3 * draw(5, len(target))
    grad = torch.autograd.grad(got, own, upstream.to(got.dtype))[0]
    assert grad.dtype == dtype
    assert not bool(grad[target == -100].any())
    limit = max(torch.finfo(dtype).eps, torch.finfo(real(dtype)).eps * 4)
    true_grad = torch.autograd.grad(true, exact, upstream)[0]
    assert float((grad.double() - true_grad).norm()) <= limit * float(true_grad.norm())


@temperatures
@pytest.mark.parametrize("shape", [(2, 3), (5,), ()])
def test_leading_dimensions_and_layouts(shape: tuple[int, ...], temperature: float) -> None:
    logits = draw(3, 65, *shape).float().movedim(0, -1)
    target = torch.randint(65, shape, dtype=torch.int32)
    true = picked(logits.double() / temperature, target.long())
    torch.testing.assert_close(ll.log_probs(logits, target, temperature=temperature).double(), true, rtol=3e-7, atol=0)


@temperatures
def test_lazy(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitless.kernels.interface.DEFAULT_MAX_BYTES", 64 * 65 * 4 * 2)
    _, target = problem(65, 150)
    parts = [draw(7, 150, WIDTH).float().requires_grad_(), draw(8, 65, WIDTH).float().requires_grad_()]
    exact = [z.detach().double().requires_grad_() for z in parts]
    for scale, softcap in ((1.0, None), (0.5, 3.0)):
        lazy = ll.linear(*parts, scale=scale, softcap=softcap)
        dense = exact[0] @ exact[1].T * scale
        dense = dense if softcap is None else softcap * torch.tanh(dense / softcap)
        got, true = ll.log_probs(lazy, target, temperature=temperature), picked(dense / temperature, target)
        torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-6)
        upstream = 3 * draw(9, 150)
        grads = torch.autograd.grad(got, parts, upstream.float())
        for one, other in zip(grads, torch.autograd.grad(true, exact, upstream), strict=True):
            assert float((one.double() - other).norm()) <= 4e-6 * float(other.norm())


@temperatures
@pytest.mark.parametrize("lazy", [False, True])
def test_compiled_and_differentiated_twice(lazy: bool, temperature: float) -> None:
    logits, target = problem(7)
    parts = [draw(1, 9, WIDTH).requires_grad_(), draw(2, 7, WIDTH).requires_grad_()] if lazy else [logits]
    parts = [z.detach().requires_grad_() for z in parts]
    top = False

    def function(*given: Tensor) -> Tensor:
        z = ll.linear(*given) if lazy else given[0]
        stats = ll.token_stats(z, target, temperature=temperature, top_k=3)
        assert stats.top_log_probs is not None
        kept = stats.top_log_probs[:, 1] if top else 0
        return ll.log_probs(z, target, temperature=temperature) + stats.entropy * stats.lse + kept

    assert torch.autograd.gradcheck(lambda *given: function(*given).sum(), parts)
    top = True  # which has no gradient
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, expected = compiled(*parts), function(*parts)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    grads = torch.autograd.grad(got.sum(), parts), torch.autograd.grad(expected.sum(), parts)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)

    def log_probs(*given: Tensor) -> Tensor:
        return ll.log_probs(ll.linear(*given) if lazy else given[0], target, temperature=temperature)

    assert torch.autograd.gradgradcheck(log_probs, parts)


@temperatures
@dtypes
@pytest.mark.parametrize("classes", [1, 7, 1000])
def test_token_stats(classes: int, dtype: torch.dtype, temperature: float) -> None:
    logits, target = problem(classes)
    k = min(classes, 5)
    own = logits.to(dtype)
    exact = own.double() / temperature
    stats = ll.token_stats(own, target, temperature=temperature, top_k=k)
    kept = target != -100
    log_p = exact.log_softmax(-1)
    slack: dict[str, Any] = {"rtol": 4e-7, "atol": 1e-14} if dtype != torch.float64 else {"rtol": 1e-13, "atol": 1e-13}
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    for got, true in (
        (stats.nll, -picked(exact, target)),
        (stats.lse, torch.where(kept, exact.logsumexp(-1), 0.0)),
        (stats.entropy, torch.where(kept, entropy, 0.0)),
    ):
        assert got.dtype == real(dtype)
        torch.testing.assert_close(got.double(), true, **slack)
    assert torch.equal(stats.argmax, torch.where(kept, exact.argmax(-1), -1))
    assert stats.top_log_probs is not None
    assert stats.top_classes is not None
    assert stats.top_log_probs.dtype == real(dtype)
    assert not stats.top_log_probs.requires_grad
    assert stats.top_classes.dtype == torch.int64
    torch.testing.assert_close(stats.top_log_probs[kept].double(), log_p.topk(k, -1).values[kept], **slack)
    torch.testing.assert_close(
        log_p.gather(-1, stats.top_classes.clamp(min=0))[kept], stats.top_log_probs[kept].double(), **slack
    )
    assert bool((stats.top_log_probs[~kept] == 0).all())
    assert bool((stats.top_classes[~kept] == -1).all())


@temperatures
def test_top_classes_of_lazy_logits(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitless.kernels.interface.DEFAULT_MAX_BYTES", 64 * 65 * 4 * 2)
    _, target = problem(65, 150)
    hidden, weight = draw(7, 150, WIDTH).float().requires_grad_(), draw(8, 65, WIDTH).float()
    lazy = ll.linear(hidden, weight)
    stats = ll.token_stats(lazy.view(3, 50, 65), target.view(3, 50), temperature=temperature, top_k=4)
    dense = ll.token_stats(hidden @ weight.T, target, temperature=temperature, top_k=4)
    assert stats.top_log_probs is not None
    assert stats.top_classes is not None
    assert dense.top_log_probs is not None
    assert stats.top_log_probs.shape == stats.top_classes.shape == (3, 50, 4)
    torch.testing.assert_close(stats.top_log_probs.view(150, 4), dense.top_log_probs, rtol=1e-5, atol=1e-6)
    assert torch.equal(stats.top_classes.view(150, 4), dense.top_classes)
    assert torch.equal(stats.top_classes[..., 0], stats.argmax)
    (stats.nll.sum() + stats.entropy.square().sum()).backward()
    assert hidden.grad is not None
    assert not bool(hidden.grad[target == -100].any())


def test_without_top_k_there_is_none() -> None:
    stats = ll.token_stats(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    assert type(stats) is ll.TokenStats
    nll, lse, spread, argmax, rank = stats
    assert [part.shape for part in (nll, lse, spread, argmax, rank)] == [torch.Size([2])] * 5


def test_errors() -> None:
    z, t = torch.zeros(2, 3), torch.tensor([0, 3])
    with pytest.raises(IndexError, match="log_probs: "):
        ll.log_probs(z, t)
    for top_k in (0, 4):
        with pytest.raises(ValueError, match="token_stats: expected top_k between 1 and 3 classes"):
            ll.token_stats(z, t.clamp(max=2), top_k=top_k)
