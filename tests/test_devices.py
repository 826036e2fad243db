"""Every loss and measure on each device that is here, the CPU always, against torch in float64 on the CPU."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll
import logitless.functional as LF
import oracles

DEVICES = ("cpu", *(("cuda",) if torch.cuda.is_available() else ()))
ROWS, CLASSES, WIDTH = 65, 1000, 24


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TARGET = torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(7))
TARGET[::6] = -100
WEIGHT = draw(8, CLASSES).abs() + 0.25
SIDES = draw(9, ROWS).sign()
LABELS = (draw(10, ROWS, CLASSES) > 2).double()


def like(constant: Tensor, tensor: Tensor) -> Tensor:
    return constant.to(tensor.device, tensor.dtype if constant.is_floating_point() else None)


def token_losses(z: Tensor) -> Tensor:
    return F.cross_entropy(z, like(TARGET, z), reduction="none")


def entropy(z: Tensor) -> Tensor:
    return torch.special.entr(z.softmax(1)).sum(1)


def js(p: Tensor, q: Tensor) -> Tensor:
    m = ((p.softmax(1) + q.softmax(1)) / 2).log()
    return (F.kl_div(m, p.softmax(1), reduction="none") + F.kl_div(m, q.softmax(1), reduction="none")).sum(1) / 2


def kl(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="none", log_target=True).sum(1)


def mixed(p: Tensor, q: Tensor, weight: float) -> Tensor:
    return (weight * p.softmax(1) + (1 - weight) * q.softmax(1)).log()


def kl_of(p: Tensor, log_m: Tensor) -> Tensor:
    return F.kl_div(log_m, p.log_softmax(1), reduction="none", log_target=True).sum(1)


def pair_stats(p: Tensor, q: Tensor) -> Tensor:
    cross = -(p.softmax(1) * q.log_softmax(1)).sum(1)
    return torch.stack([kl(p, q), kl(q, p), js(p, q), cross, entropy(p), entropy(q)])


# What it is, what is taken, the same in plain torch.
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "cross_entropy": (
        lambda z: LF.cross_entropy(z, like(TARGET, z), weight=like(WEIGHT, z), label_smoothing=0.1),
        lambda z: F.cross_entropy(z, like(TARGET, z), weight=like(WEIGHT, z), label_smoothing=0.1),
        (3 * draw(1, ROWS, CLASSES),),
    ),
    "cross_entropy with probabilities": (
        lambda z, t: LF.cross_entropy(z, t.softmax(1), reduction="none"),
        lambda z, t: F.cross_entropy(z, t.softmax(1), reduction="none"),
        (3 * draw(1, ROWS, CLASSES), draw(2, ROWS, CLASSES)),
    ),
    "nll_loss": (
        lambda z: LF.nll_loss(z.log_softmax(1), like(TARGET, z)),
        lambda z: F.nll_loss(z.log_softmax(1), like(TARGET, z)),
        (draw(1, ROWS, CLASSES),),
    ),
    "kl_div": (
        lambda q, p: LF.kl_div(q.log_softmax(1), p.softmax(1), reduction="batchmean"),
        lambda q, p: F.kl_div(q.log_softmax(1), p.softmax(1), reduction="batchmean"),
        (draw(1, ROWS, CLASSES), draw(2, ROWS, CLASSES)),
    ),
    "binary_cross_entropy": (
        lambda x: LF.binary_cross_entropy(x.sigmoid(), like((SIDES + 1) / 2, x)),
        lambda x: F.binary_cross_entropy(x.sigmoid(), like((SIDES + 1) / 2, x)),
        (draw(1, ROWS),),
    ),
    "binary_cross_entropy_with_logits": (
        lambda x: LF.binary_cross_entropy_with_logits(x, like((SIDES + 1) / 2, x), reduction="none"),
        lambda x: F.binary_cross_entropy_with_logits(x, like((SIDES + 1) / 2, x), reduction="none"),
        (9 * draw(1, ROWS),),
    ),
    "cosine_similarity": (
        LF.cosine_similarity,
        F.cosine_similarity,
        (draw(1, ROWS, WIDTH), draw(2, ROWS, WIDTH)),
    ),
    "cosine_embedding_loss": (
        lambda a, b: LF.cosine_embedding_loss(a, b, like(SIDES, a), margin=0.1, reduction="none"),
        lambda a, b: F.cosine_embedding_loss(a, b, like(SIDES, a), margin=0.1, reduction="none"),
        (draw(1, ROWS, WIDTH), draw(2, ROWS, WIDTH)),
    ),
    "token_stats": (
        lambda z: ll.token_stats(z, like(TARGET, z)).nll,
        token_losses,
        (3 * draw(1, ROWS, CLASSES),),
    ),
    "entropy": (ll.entropy, entropy, (3 * draw(1, ROWS, CLASSES),)),
    "kl": (ll.kl, kl, (draw(1, ROWS, CLASSES), 2 * draw(2, ROWS, CLASSES))),
    "js": (ll.js, js, (draw(1, ROWS, CLASSES), 2 * draw(2, ROWS, CLASSES))),
    "log_probs": (
        lambda z: ll.log_probs(z, like(TARGET, z), temperature=0.7),
        lambda z: -token_losses(z / 0.7),
        (3 * draw(1, ROWS, CLASSES),),
    ),
    "pair_stats": (
        lambda p, q: torch.stack([v for v in ll.pair_stats(p, q) if v is not None and v.is_floating_point()]),
        pair_stats,
        (draw(1, ROWS, CLASSES), 2 * draw(2, ROWS, CLASSES)),
    ),
    "js of another weight": (
        lambda p, q: ll.js(p, q, beta=0.9),
        lambda p, q: 0.9 * kl_of(p, mixed(p, q, 0.9)) + 0.1 * kl_of(q, mixed(p, q, 0.9)),
        (draw(1, ROWS, CLASSES), 2 * draw(2, ROWS, CLASSES)),
    ),
    "skewed kl": (
        lambda p, q: ll.kl(p, q, skew=0.1),
        lambda p, q: kl_of(p, mixed(p, q, 0.1)),
        (draw(1, ROWS, CLASSES), 2 * draw(2, ROWS, CLASSES)),
    ),
    "tv": (
        ll.tv,
        lambda p, q: (p.softmax(1) - q.softmax(1)).abs().sum(1) / 2,
        (draw(1, ROWS, CLASSES), 2 * draw(2, ROWS, CLASSES)),
    ),
    "binary cross-entropy of a head": (
        lambda h, w: LF.binary_cross_entropy_with_logits(ll.linear(h, w), like(LABELS, h), reduction="sum"),
        lambda h, w: F.binary_cross_entropy_with_logits(h @ w.T, like(LABELS, h), reduction="sum"),
        (draw(1, ROWS, WIDTH), draw(2, CLASSES, WIDTH)),
    ),
    "softcapped head with a bias": (
        lambda h, w, b: LF.cross_entropy(ll.linear(h, w, b, softcap=5.0), like(TARGET, h), weight=like(WEIGHT, h)),
        lambda h, w, b: F.cross_entropy(5 * torch.tanh((h @ w.T + b) / 5), like(TARGET, h), weight=like(WEIGHT, h)),
        (draw(1, ROWS, WIDTH), draw(2, CLASSES, WIDTH), draw(3, CLASSES)),
    ),
    "linear_cross_entropy": (
        lambda h, w: LF.linear_cross_entropy(h, w, like(TARGET, h)),
        lambda h, w: F.cross_entropy(h @ w.T, like(TARGET, h)),
        (draw(1, ROWS, WIDTH), draw(2, CLASSES, WIDTH)),
    ),
    "losses of a head": (
        lambda h, w: LF.linear_cross_entropy(h, w, like(TARGET, h), reduction="none"),
        lambda h, w: token_losses(h @ w.T),
        (draw(1, ROWS, WIDTH), draw(2, CLASSES, WIDTH)),
    ),
    "entropy of a head": (
        lambda h, w: ll.entropy(ll.linear(h, w, scale=0.5)),
        lambda h, w: entropy(0.5 * h @ w.T),
        (draw(1, ROWS, WIDTH), draw(2, CLASSES, WIDTH)),
    ),
    "kl of two heads": (
        lambda h, w, g, v: ll.kl(ll.linear(h, w), ll.linear(g, v)),
        lambda h, w, g, v: kl(h @ w.T, g @ v.T),
        (draw(1, ROWS, WIDTH), draw(2, CLASSES, WIDTH), draw(3, ROWS, 16), draw(4, CLASSES, 16)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_value_and_gradients(device: str, name: str, dtype: torch.dtype) -> None:
    ours, theirs, inputs = CASES[name]

    def results(function: Callable[..., Tensor], kind: torch.dtype, place: str) -> list[Tensor]:
        leaves = [x.to(place, dtype).to(kind).requires_grad_() for x in inputs]
        out = function(*leaves)
        upstream = draw(5, *out.shape).to(place, kind)
        grads = torch.autograd.grad(out, leaves, upstream)
        return [t.detach().cpu() for t in (out, *grads)]

    truths, naive = results(theirs, torch.float64, "cpu"), results(theirs, dtype, device)
    for result, truth, plain in zip(results(ours, dtype, device), truths, naive, strict=True):
        oracles.assert_no_worse(result, truth, plain)
