"""What reinforcement learning code does to logits: it works lazily, and where it computes them it says so once."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import logitless as ll
from test_lazy import NoTensorOf

ROWS, CLASSES, WIDTH = 9, 501, 16
TARGET = torch.randint(CLASSES, (3, ROWS), generator=torch.Generator().manual_seed(1))


def tempered_in_place(z: Tensor) -> Tensor:
    z.div_(0.7)
    return z.log_softmax(-1).gather(-1, TARGET.unsqueeze(-1)).squeeze(-1)


def divided_in_place(z: Tensor) -> Tensor:
    z /= 0.7
    return z.log_softmax(-1).gather(-1, TARGET.unsqueeze(-1)).squeeze(-1)


def row_loop(z: Tensor) -> Tensor:
    rows = [F.log_softmax(one, dim=-1).gather(-1, at.unsqueeze(-1)) for one, at in zip(z, TARGET, strict=True)]
    return torch.stack(rows).squeeze(-1)


LAZY: dict[str, Callable[[Tensor], Tensor]] = {
    "tempered in place": tempered_in_place,
    "divided in place": divided_in_place,
    "the last rows": lambda z: z[:, -4:].log_softmax(-1).gather(-1, TARGET[:, -4:].unsqueeze(-1)),
    "all rows but the last": lambda z: z[:, :-1, :].logsumexp(-1),
    "selected minus log-sum-exp": lambda z: (
        z.gather(-1, TARGET.unsqueeze(-1)).squeeze(-1) - torch.stack([torch.logsumexp(one, dim=-1) for one in z])
    ),
    "a loop over rows": row_loop,
    "a loop over chunks": lambda z: torch.cat([one.logsumexp(-1) for one in z.reshape(-1, CLASSES).split(7)]),
    "entropies of chunks": lambda z: torch.cat([ll.entropy(one) for one in z.flatten(0, 1).split(7)]),
}
COMPUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax * log_softmax": lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
    "log_softmax * softmax": lambda z: -(F.log_softmax(z, -1) * F.softmax(z, -1)).sum(-1),
    "exp of log_softmax": lambda z: (lambda log_p: -(torch.exp(log_p) * log_p).sum(-1))(F.log_softmax(z, dim=-1)),
    "mean of the logits": lambda z: z.logsumexp(-1) - (F.softmax(z, -1) * z).sum(-1),
}


def gradients(call: Callable[[Tensor], Tensor], lazy: bool) -> list[Tensor]:
    make = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, ROWS, WIDTH, generator=make, dtype=torch.float64).requires_grad_()
    weight = torch.randn(CLASSES, WIDTH, generator=make, dtype=torch.float64).requires_grad_()
    out = call(ll.linear(hidden, weight) if lazy else hidden @ weight.T)
    upstream = torch.randn(out.shape, generator=make, dtype=torch.float64)
    return [out, *torch.autograd.grad(out, [hidden, weight], upstream)]


def agree(call: Callable[[Tensor], Tensor], found: list[Tensor]) -> None:
    for mine, theirs in zip(found, gradients(call, lazy=False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@pytest.fixture(autouse=True)
def nothing_is_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitless.kernels.interface.DEFAULT_MAX_BYTES", 24 * CLASSES * 8)
    monkeypatch.setattr("logitless.lazy.proxy._SMALL_BYTES", 0)


@pytest.mark.parametrize("name", LAZY)
def test_it_works_lazily(name: str) -> None:
    with NoTensorOf(3 * ROWS * CLASSES):
        found = gradients(LAZY[name], lazy=True)
    agree(LAZY[name], found)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", COMPUTED)
def test_an_entropy_by_hand_is_told_once_what_to_take(name: str, grad: bool) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if grad:
            agree(COMPUTED[name], gradients(COMPUTED[name], lazy=True))
        else:
            with torch.no_grad():
                COMPUTED[name](ll.linear(torch.randn(3, ROWS, WIDTH), torch.randn(CLASSES, WIDTH)))
    assert [type(one.message) for one in told] == [ll.MaterializeWarning]
    assert "logitless.entropy(logits)" in str(told[0].message)
    assert told[0].filename == __file__


def test_another_product_with_lazy_logits_is_told() -> None:
    z = ll.linear(torch.randn(3, ROWS, WIDTH), torch.randn(CLASSES, WIDTH))
    with pytest.warns(ll.MaterializeWarning, match="mul computes all"):
        z * torch.ones(3, ROWS, CLASSES)
