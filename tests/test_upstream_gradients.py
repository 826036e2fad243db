"""Upstream gradients as autograd really makes them: expanded, transposed, or memory that holds its own negative.

The gradient of a conjugate's imaginary part is such a negative, and a sum's is one number expanded. Each must give what
the same numbers give in plain memory.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import logitless as ll
import logitless.functional as F

ROWS, CLASSES, FEATURES = 6, 9, 5
draw = torch.Generator().manual_seed(3)
Z, Y = (torch.randn(ROWS, CLASSES, generator=draw) for _ in range(2))
T = torch.randint(CLASSES, (ROWS,), generator=draw)
P = torch.rand(ROWS, CLASSES, generator=draw)
H, W = torch.randn(ROWS, FEATURES, generator=draw), torch.randn(CLASSES, FEATURES, generator=draw)

CASES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cross_entropy, whole": lambda z, _, __: F.cross_entropy(z, T, reduction="none"),
    "cross_entropy, mean": lambda z, _, __: F.cross_entropy(z, T),
    "cross_entropy": lambda z, _, __: F.cross_entropy(z, T, reduction="none", class_dim=1),
    "nll_loss": lambda z, _, __: F.nll_loss(z, T, reduction="none"),
    "binary_cross_entropy_with_logits": lambda z, _, __: F.binary_cross_entropy_with_logits(z, P, reduction="none"),
    "binary_cross_entropy": lambda z, _, __: F.binary_cross_entropy(z.sigmoid(), P, reduction="none"),
    "kl_div": lambda z, _, __: F.kl_div(z, P, reduction="none"),
    "kl": lambda z, y, _: ll.kl(z, y),
    "js": lambda z, y, _: ll.js(z, y),
    "tv": lambda z, y, _: ll.tv(z, y),
    "entropy": lambda z, _, __: ll.entropy(z),
    "log_probs": lambda z, _, __: ll.log_probs(z, T),
    "cosine_similarity": lambda z, y, _: F.cosine_similarity(z, y),
    "pairwise_cosine": lambda z, y, _: ll.pairwise_cosine(z, y),
    "head": lambda _, __, h: F.cross_entropy(ll.linear(h, W), T, reduction="none"),
    "head, mean": lambda _, __, h: F.cross_entropy(ll.linear(h, W), T),
    "head, log_probs": lambda _, __, h: ll.log_probs(ll.linear(h, W), T),
    "head, kl": lambda z, _, h: ll.kl(ll.linear(h, W), z),
    "info_nce": lambda z, y, _: ll.info_nce(z, y, temperature=0.5, reduction="none"),
    "clip_loss": lambda z, y, _: ll.clip_loss(z, y, 3.0),
    "siglip_loss": lambda z, y, _: ll.siglip_loss(z, y, 3.0, -1.0),
}
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": lambda plain: torch._neg_view(-plain),
    "transposed": lambda plain: plain.mT.contiguous().mT if plain.dim() > 1 else plain.repeat_interleave(2)[::2],
}


def gradients(case: str, upstream: Callable[[Tensor], Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (Z, Y, H)]
    loss = CASES[case](*leaves)
    numbers = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(loss, leaves, upstream(numbers).reshape(loss.shape), allow_unused=True)
    return [grad for grad in found if grad is not None]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_give_the_same_gradient(case: str, form: str) -> None:
    got, expected = gradients(case, FORMS[form]), gradients(case, lambda plain: plain)
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-6)
        assert one.abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_an_expanded_number(case: str) -> None:
    got = gradients(case, lambda plain: torch.full((), 0.7).expand(plain.shape))
    expected = gradients(case, lambda plain: torch.full_like(plain, 0.7))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_a_conjugate(case: str) -> None:
    """As complex numbers make it: with respect to the imaginary part of a conjugate the loss counts negatively."""
    leaves = [x.clone().requires_grad_() for x in (Z, Y, H)]
    loss = CASES[case](*leaves)
    scale = torch.randn(loss.shape, generator=torch.Generator().manual_seed(2))
    (torch.complex(torch.zeros_like(loss), loss).conj().imag * scale).sum().backward()
    again = [x.clone().requires_grad_() for x in (Z, Y, H)]
    (CASES[case](*again) * -scale).sum().backward()
    for one, other in zip(leaves, again, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=2e-6, atol=1e-6)
