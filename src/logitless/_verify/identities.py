"""The identities that tie the measures together, each as a worst residual beside what rounding allows.

A residual and its allowance are compared row by row in float64. What is allowed counts roundings, as in `truth`:
eps times the terms that were added, times the factor by which `exp` magnifies the rounding of its argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import logitless as ll
import logitless.functional as LF
from logitless._verify import truth as _truth

_EPS = torch.finfo(torch.float64).eps
_WEIGHTS = (0.1, 0.75)  # of p in a mixture


@dataclass(frozen=True)
class Residual:
    """How far two sides are apart on one row, and how far rounding may put them."""

    residual: float
    allowed: float


@dataclass(frozen=True)
class Identity:
    """An identity, and what came of it."""

    name: str
    rows: int
    residual: float
    allowed: float
    used: float

    @property
    def passed(self) -> bool:
        """Say whether every row is within its own allowance."""
        return self.rows > 0 and self.used <= 1


def identity_steps() -> Iterator[tuple[str, Callable[[], Identity]]]:
    """Yield each identity's name and the work that checks it."""
    for name, check in _IDENTITIES:
        yield name, partial(_worst, name, check)


def _worst(name: str, check: Callable[[], Iterator[Residual]]) -> Identity:
    worst, used, rows = Residual(0.0, 0.0), 0.0, 0
    for found in check():
        rows += 1
        share = _share(found)
        if share >= used:
            worst, used = found, share
    return Identity(name, rows, worst.residual, worst.allowed, used)


def _share(found: Residual) -> float:
    if found.residual == 0:
        return 0.0
    if math.isnan(found.residual) or found.allowed == 0:
        return math.inf
    return found.residual / found.allowed


def _difference(left: float, right: float) -> float:
    return 0.0 if left == right else abs(left - right)  # equal infinities differ by nothing


def _rows() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for sample in _truth.samples(torch.float64, seed=1):
        yield sample.p.unsqueeze(0), sample.q.unsqueeze(0), torch.tensor([sample.target])


def _surprise(logits: Tensor) -> Tensor:
    return torch.logsumexp(logits, -1, keepdim=True) - logits


def _index_is_softmax_log_nll() -> Iterator[Residual]:
    for p, _, target in _rows():
        left = LF.cross_entropy(p, target).item()
        right = LF.nll_loss(p.log_softmax(-1), target).item()
        # log_softmax subtracts lse, rounded, from the logit: an error of the size of the logits, not of the loss.
        size = p[p.isfinite()].abs().max().item() + math.log(p.shape[-1])
        yield Residual(_difference(left, right), 8 * _EPS * (1 + size))


def _delta_target_is_index() -> Iterator[Residual]:
    for p, _, target in _rows():
        one_hot = torch.nn.functional.one_hot(target, p.shape[-1]).double()
        left, right = LF.cross_entropy(p, target).item(), LF.cross_entropy(p, one_hot).item()
        yield Residual(_difference(left, right), 4 * _EPS * left)


def _cross_entropy_is_entropy_plus_kl() -> Iterator[Residual]:
    for p, q, _ in _rows():
        stats = ll.pair_stats(p, q)
        yield Residual(
            _difference(stats.cross_entropy.item(), stats.entropy_p.item() + stats.kl.item()), _mixed_allowance(p, q)
        )


def _probability_target_is_entropy_plus_kl() -> Iterator[Residual]:
    for p, q, _ in _rows():
        left = LF.cross_entropy(q, p.softmax(-1)).item()
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        kl = LF.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
        size = p[p.isfinite()].abs().max().item() + q[q.isfinite()].abs().max().item() + math.log(p.shape[-1])
        # Probabilities and log-probabilities are rounded by the caller here, each relative to the logits.
        yield Residual(
            _difference(left, ll.entropy(p).item() + kl), _mixed_allowance(p, q) + 8 * _EPS * size * (1 + left)
        )


def _mixed_allowance(p: Tensor, q: Tensor) -> float:
    own, other = _surprise(p), _surprise(q)
    weight = torch.exp(-own)
    held = weight > 0
    if bool((held & torch.isinf(other)).any()):
        return 0.0  # both sides are infinite
    size = (weight * (own + other) * (1 + own))[held].sum()
    moved = ((weight - torch.exp(-other)).abs() * (1 + own + other))[held].sum()
    return 4 * _EPS * (1 + (size + moved).item()) * (4 + math.log2(p.shape[-1]))


def _kl_is_not_negative() -> Iterator[Residual]:
    for p, q, _ in _rows():
        stats = ll.pair_stats(p, q)
        yield Residual(max(0.0, -stats.kl.item()), 0.0)
        yield Residual(max(0.0, -stats.reverse_kl.item()), 0.0)


def _kl_of_equals_is_zero() -> Iterator[Residual]:
    for p, _, _ in _rows():
        yield Residual(abs(ll.kl(p, p).item()), 0.0)
        yield Residual(abs(ll.js(p, p).item()), 0.0)
        for weight in _WEIGHTS:
            yield Residual(abs(ll.kl(p, p, skew=weight).item()), 0.0)
            yield Residual(abs(ll.js(p, p, beta=weight).item()), 0.0)
        yield Residual(abs(ll.tv(p, p).item()), 0.0)


def _js_is_symmetric() -> Iterator[Residual]:
    for p, q, _ in _rows():
        forward, backward = ll.js(p, q).item(), ll.js(q, p).item()
        yield Residual(_difference(forward, backward), _moved_allowance(p, q, forward))


def _moved_allowance(p: Tensor, q: Tensor, value: float) -> float:
    moved = ((p.softmax(-1) - q.softmax(-1)).abs() * _finite(_surprise(p) + _surprise(q))).sum().item()
    return 4 * _EPS * (value + moved) * (4 + math.log2(p.shape[-1]))


def _weighted_js_is_of_skewed_kls() -> Iterator[Residual]:
    for p, q, _ in _rows():
        for weight in _WEIGHTS:
            left = ll.js(p, q, beta=weight).item()
            right = weight * ll.kl(p, q, skew=weight).item() + (1 - weight) * ll.kl(q, p, skew=1 - weight).item()
            yield Residual(_difference(left, right), _moved_allowance(p, q, left))


def _variation_is_bounded() -> Iterator[Residual]:
    for p, q, _ in _rows():
        forward, backward = ll.tv(p, q).item(), ll.tv(q, p).item()
        yield Residual(_difference(forward, backward), _moved_allowance(p, q, forward))
        yield Residual(max(0.0, forward - 1, -forward), 4 * _EPS)
        # Pinsker's inequality, of either divergence.
        least = min(ll.kl(p, q).item(), ll.kl(q, p).item())
        yield Residual(max(0.0, 2 * forward**2 - least), 16 * _EPS * forward**2)


def _finite(tensor: Tensor) -> Tensor:
    return tensor.masked_fill(torch.isinf(tensor), 1)


def _js_is_at_most_log_2() -> Iterator[Residual]:
    for p, q, _ in _rows():
        stats = ll.pair_stats(p, q)
        yield Residual(max(0.0, stats.js.item() - math.log(2), -stats.js.item()), 2 * _EPS)
        # The mean of the two divergences is never below it either.
        yield Residual(max(0.0, stats.js.item() - (stats.kl + stats.reverse_kl).item() / 4), 4 * _EPS * stats.js.item())


def _lazy_logits_agree() -> Iterator[Residual]:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(1000, 16, generator=generator, dtype=torch.float64)
    hidden = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    target = torch.randint(1000, (8,), generator=generator)
    lazy = ll.linear(hidden, weight)
    dense = hidden @ weight.T
    left, right = ll.token_stats(lazy, target), ll.token_stats(dense, target)
    # The order in which 16 products are added may differ, and what follows magnifies it by the entropy's surprises.
    allowed = 16 * _EPS * dense.abs().max().item() * (1 + math.log(1000))
    for a, b in ((left.nll, right.nll), (left.lse, right.lse), (left.entropy, right.entropy)):
        yield Residual((a - b).abs().max().item(), allowed)
    yield Residual(float((left.rank != right.rank).sum() + (left.argmax != right.argmax).sum()), 0.0)


def _bce_with_logits_is_sigmoid_bce() -> Iterator[Residual]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(500, generator=generator, dtype=torch.float64) * 4
    target = torch.rand(500, generator=generator, dtype=torch.float64)
    target[::2] = target[::2].round()
    left = LF.binary_cross_entropy_with_logits(logits, target, reduction="none")
    right = LF.binary_cross_entropy(torch.sigmoid(logits), target, reduction="none")
    # The sigmoid's rounding is magnified by the slope of the logarithm, up to 1 / (1 - p) = 1 + exp(z).
    allowed = 4 * _EPS * (1 + torch.exp(logits.abs()) * torch.finfo(torch.float64).eps + left + torch.exp(logits))
    for a, b, c in zip(left.tolist(), right.tolist(), allowed.tolist(), strict=True):
        yield Residual(_difference(a, b), c)


def _bce_is_two_class_nll() -> Iterator[Residual]:
    generator = torch.Generator().manual_seed(4)
    p = torch.rand(500, generator=generator, dtype=torch.float64)
    target = torch.randint(2, (500,), generator=generator)
    left = LF.binary_cross_entropy(p, target.double(), reduction="none")
    right = LF.nll_loss(torch.stack([1 - p, p], 1).log(), target, reduction="none")
    # 1 - p is rounded by the caller, and a logarithm turns that into an absolute error of at most eps / (1 - p).
    allowed = 4 * _EPS * (left + 1 + 1 / (1 - p))
    for a, b, c in zip(left.tolist(), right.tolist(), allowed.tolist(), strict=True):
        yield Residual(_difference(a, b), c)


def _vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(200, 64, generator=generator, dtype=torch.float64)
    return x, torch.randn(200, 64, generator=generator, dtype=torch.float64)


def _cosine_of_itself_is_one() -> Iterator[Residual]:
    x, _ = _vectors()
    for scale, sign in ((1.0, 1), (1.0, -1), (3.0, 1), (1e200, -1)):
        found = LF.cosine_similarity(x, x * scale * sign)
        # A product and two norms of 64 terms: each addition by halves costs half an eps, six of them in a row.
        yield Residual((found - sign).abs().max().item(), 8 * _EPS)
        yield Residual(max(0.0, found.abs().max().item() - 1), 0.0)


def _embedding_loss_is_of_the_cosine() -> Iterator[Residual]:
    x, y = _vectors()
    cosine = LF.cosine_similarity(x, y)
    for sign, expected in ((1, 1 - cosine), (-1, (cosine - 0.1).clamp(min=0))):
        target = torch.full((200,), sign)
        found = LF.cosine_embedding_loss(x, y, target, margin=0.1, reduction="none")
        # The loss adds 1e-12 to each squared norm where the similarity floors the norm: 1e-12 of 64 or so, twice.
        allowed = 1e-12 * (1 / (x * x).sum(-1) + 1 / (y * y).sum(-1)) + 16 * _EPS
        for residual, limit in zip((found - expected).abs().tolist(), allowed.tolist(), strict=True):
            yield Residual(residual, limit)


_IDENTITIES: tuple[tuple[str, Callable[[], Iterator[Residual]]], ...] = (
    ("cross_entropy = log_softmax, then nll_loss", _index_is_softmax_log_nll),
    ("index target = its one-hot probabilities", _delta_target_is_index),
    ("CE(p, q) = H(p) + KL(p || q)", _cross_entropy_is_entropy_plus_kl),
    ("cross_entropy on probabilities = H + kl_div", _probability_target_is_entropy_plus_kl),
    ("KL(p || q) >= 0", _kl_is_not_negative),
    ("KL(p || p) = JS(p, p) = TV(p, p) = 0 exactly", _kl_of_equals_is_zero),
    ("JS(p, q) = JS(q, p)", _js_is_symmetric),
    ("0 <= JS <= log 2, and JS <= (KL + reverse KL) / 4", _js_is_at_most_log_2),
    ("JS of weight w = w KL(p || m) + (1 - w) KL(q || m)", _weighted_js_is_of_skewed_kls),
    ("TV(p, q) = TV(q, p) <= 1, and 2 TV^2 <= KL", _variation_is_bounded),
    ("lazy logits = dense logits", _lazy_logits_agree),
    ("BCE with logits = sigmoid, then BCE", _bce_with_logits_is_sigmoid_bce),
    ("BCE = two-class NLL", _bce_is_two_class_nll),
    ("cos(x, ax) = sign(a), never beyond 1", _cosine_of_itself_is_one),
    ("embedding loss = 1 - cos, or max(0, cos - margin)", _embedding_loss_is_of_the_cosine),
)
