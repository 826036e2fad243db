"""Rows of every difficulty, and the exact value of every measure on them with what rounding may add to it.

The truth is mpmath at 256 bits, from the exact binary inputs. Every bound is the sum of what rounding does to the
steps of the calculation, with no slack for its own sake. With u = half the spacing of the numbers at 1 in the dtype
that the arithmetic runs in, each row gives

    bound = 0.5 ulp (the one rounding of the result) + growth * u * |result|

where `growth` counts roundings, each times the factor by which the formula magnifies it:

- `exp(z - top)` turns the rounding of its argument into a relative error of |z - top| u, plus u for `exp` itself;
- a sum of n terms of one sign, added in pairs, adds log2(n) u;
- a sum whose terms have two signs adds the same relative to the sum of their magnitudes;
- in a divergence the log-ratio d of a class carries an absolute error of about u times the logits it is made of, and
  its term p (exp(d) - 1 - d) has the slope p (exp(d) - 1) = q - p, which is why a divergence of 1e-10 survives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mpmath
import torch
from mpmath import mp
from torch import Tensor

BITS = 256
SMOOTHING = 0.1
NLL_WEIGHT = 0.7
MARGIN = 0.25
_ROUNDINGS = 4  # of a chain of elementary operations on one class: subtract, exp or log, multiply, add


@dataclass(frozen=True)
class Truth:
    """An exact value, and by how many roundings (of relative size u) a careful calculation may miss it."""

    value: Any
    growth: float


@dataclass(frozen=True)
class Sample:
    """A row of logits, a second one, a target among the finite classes, and a family to report it by."""

    family: str
    p: Tensor
    q: Tensor
    target: int


def samples(dtype: torch.dtype, *, seed: int = 0) -> Iterator[Sample]:
    """Yield random and adversarial rows; each is exactly representable in `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(classes: int) -> Tensor:
        return torch.randn(classes, generator=generator, dtype=torch.float64)

    def sample(family: str, p: Tensor, q: Tensor, target: int = 0) -> Sample:
        return Sample(family, p.to(dtype), q.to(dtype), target)

    def dominant(classes: int) -> Sample:
        p, q = normal(classes), normal(classes)
        # The top class is 27.6 = log(1e12) above all others together, so the loss of the row is about 1e-12.
        p[classes // 2] = torch.logsumexp(p, 0) + 27.6
        q[classes // 2] = torch.logsumexp(q, 0) + 26
        return sample(f"dominant class, {classes} classes", p, q, classes // 2)

    yield sample("one class", normal(1), normal(1))
    # The exact arithmetic of 50,000 classes takes seconds, so each dtype gets one of those rows, and not the same one.
    for classes in (2, 1000):
        yield sample(f"flat, {classes} classes", normal(classes), normal(classes))
        yield dominant(classes)
    if dtype == torch.float64:
        yield dominant(50_000)
    else:
        yield sample("flat, 50000 classes", normal(50_000), normal(50_000))
    for classes in (2, 1000):
        for power in (-30, -10, -3, 1, 2, 4):
            spread = 10.0**power
            # Two nearly equal rows are a family of their own; here one of the two has the spread of a real model.
            yield sample(
                f"spread 1e{power}, {classes} classes", normal(classes) * spread, normal(classes) * max(spread, 1)
            )
        yield sample(f"ties, {classes} classes", (normal(classes) * 2).floor(), (normal(classes) * 2).floor())
        yield sample(f"all equal, {classes} classes", torch.full((classes,), 7.25), normal(classes))
        # 2e-5 makes a divergence of about 1e-10.
        for name, distance in (("near", 2e-5), ("close", 0.03), ("related", 0.2)):
            p = normal(classes) * 5
            yield sample(f"{name} pair, {classes} classes", p, p + distance * normal(classes))
    for number in range(20):
        # Where exp(d) - 1 - d is 1e-3 of its parts: no longer for a short series, not yet for subtraction.
        p = normal(5)
        yield sample(f"close pair {number}, 5 classes", p, p + 0.05 * normal(5))
    mask = torch.rand(1000, generator=generator) < 0.3
    other = torch.rand(1000, generator=generator) < 0.3
    mask[0] = other[0] = False
    p, q = normal(1000).masked_fill(mask, -math.inf), normal(1000).masked_fill(mask, -math.inf)
    yield sample("one -inf mask", p, q)
    yield sample("-inf in the second row only", normal(1000), normal(1000).masked_fill(other, -math.inf))
    yield sample("-inf in the first row only", normal(1000).masked_fill(mask, -math.inf), normal(1000))
    yield sample("opposite certainties", torch.tensor([1e4, 0.0]), torch.tensor([0.0, 1e4]))
    yield sample("offset 1e4", 1e4 + normal(1000), normal(1000) - 1e4)


class Row:
    """A row of logits in exact arithmetic."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = [mp.mpf(value) for value in logits.double().tolist()]
        self.top = max(self.logits)
        # Surprise above the top class: 0 or more, and infinite for a masked class.
        self.below = [self.top - value for value in self.logits]
        self.weights = [mp.exp(-value) if mp.isfinite(value) else mp.mpf(0) for value in self.below]

    @cached_property
    def log_sum(self) -> Any:
        """The log-sum-exp less the top logit."""
        return mp.log1p(self.others)

    @cached_property
    def others(self) -> Any:
        """What all classes but one top class weigh; beside the 1 of that class a small rest would be rounded off."""
        weights = self.weights.copy()
        weights.pop(self.below.index(0))
        return mpmath.fsum(weights)

    @cached_property
    def surprises(self) -> list[Any]:
        """`lse - z` of each class."""
        return [value + self.log_sum for value in self.below]

    @cached_property
    def probabilities(self) -> list[Any]:
        """The softmax of the row."""
        total = 1 + self.others
        return [value / total for value in self.weights]

    @cached_property
    def log_sum_growth(self) -> float:
        """Relative roundings of `log_sum`: what `exp` magnifies, weighted by what each other class adds."""
        if not self.others:
            return 0.0
        shift = mpmath.fsum(w * b for w, b in zip(self.weights, self.below, strict=True) if w) / self.others
        return _ROUNDINGS + float(shift) + _pairs(len(self.logits))

    @cached_property
    def error(self) -> list[float]:
        """Absolute error of each surprise, in u: of one subtraction and of `log_sum`."""
        shared = float(self.log_sum) * self.log_sum_growth
        return [2 * float(value) + shared if mp.isfinite(value) else 0.0 for value in self.below]


class Exact:
    """Everything exact about a sample, each part computed when first asked for."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    @cached_property
    def p(self) -> Row:
        """The first row."""
        return Row(self.sample.p)

    @cached_property
    def q(self) -> Row:
        """The second row."""
        return Row(self.sample.q)

    @cached_property
    def ratio_error(self) -> list[float]:
        """Absolute error of `log q - log p` of each class, in u."""
        return [a + b + 1 for a, b in zip(self.p.error, self.q.error, strict=True)]


def _pairs(count: int) -> float:
    return math.log2(count) if count > 1 else 0.0


def _relative(numerator: Any, value: Any) -> float:
    return float(numerator / value) if value else 0.0


def true_nll(exact: Exact) -> Truth:
    row, target = exact.p, exact.sample.target
    below = row.below[target]
    value = below + row.log_sum
    # Two terms of one sign and one addition; relative to their sum.
    return Truth(value, 1 + _relative(below + row.log_sum * row.log_sum_growth, value))


def true_lse(exact: Exact) -> Truth:
    row = exact.p
    value = row.top + row.log_sum
    return Truth(value, 1 + _relative(row.log_sum * row.log_sum_growth, abs(value)))


def _mean_surprise(weights: Row, surprises: Row) -> Truth:
    """Return the sum of p_j s_j: every term is 0 or more, and p_j magnifies the error of its own surprise."""
    terms, errors = [], []
    for p, own, s, error in zip(
        weights.probabilities, weights.error, surprises.surprises, surprises.error, strict=True
    ):
        if p:
            terms.append(p * s)
            errors.append(p * error + p * s * (own + _ROUNDINGS) if mp.isfinite(s) else mp.mpf(0))
    value = mpmath.fsum(terms)
    if not mp.isfinite(value):
        return Truth(value, 0.0)
    return Truth(value, _pairs(len(terms)) + _relative(mpmath.fsum(errors), value))


def true_entropy(exact: Exact) -> Truth:
    return _mean_surprise(exact.p, exact.p)


def true_cross_entropy_of_rows(exact: Exact) -> Truth:
    return _mean_surprise(exact.p, exact.q)


def _kl_rows(first: Row, second: Row, ratio_error: list[float]) -> Truth:
    terms, errors = [], []
    for p, own, a, q, b, error in zip(
        first.probabilities,
        first.error,
        first.surprises,
        second.probabilities,
        second.surprises,
        ratio_error,
        strict=True,
    ):
        term = p * (b - a) if p else mp.mpf(0)
        if p and not mp.isfinite(b):
            return Truth(mp.inf, 0.0)
        terms.append(term)
        # The slope of the term in d is q - p; the term as it is formed is term + q - p, with roundings of its own.
        errors.append(abs(q - p) * (error + 1) + abs(term + q - p) * (own + _ROUNDINGS))
    value = mpmath.fsum(terms)
    return Truth(value, _pairs(len(terms)) + _relative(mpmath.fsum(errors), value))


def true_kl(exact: Exact) -> Truth:
    return _kl_rows(exact.p, exact.q, exact.ratio_error)


def true_reverse_kl(exact: Exact) -> Truth:
    return _kl_rows(exact.q, exact.p, exact.ratio_error)


def true_js(exact: Exact) -> Truth:
    terms, errors = [], []
    for p, own_p, q, own_q, error in zip(
        exact.p.probabilities, exact.p.error, exact.q.probabilities, exact.q.error, exact.ratio_error, strict=True
    ):
        middle = (p + q) / 2
        from_p = p * mp.log(p / middle) if p else mp.mpf(0)
        from_q = q * mp.log(q / middle) if q else mp.mpf(0)
        terms.append((from_p + from_q) / 2)
        # Half the slope of each divergence to the middle, |p - m| = |q - m|; their terms cannot be negative either.
        made = abs(from_p + middle - p) * (own_p + _ROUNDINGS) + abs(from_q + middle - q) * (own_q + _ROUNDINGS)
        errors.append(abs(q - p) / 2 * (error + 1) + made / 2)
    value = mpmath.fsum(terms)
    return Truth(value, _pairs(len(terms)) + _relative(mpmath.fsum(errors), value))


def soft_targets(sample: Sample) -> Tensor:
    """Return probabilities of the sample's dtype, as a user would have them: a rounded softmax of the second row."""
    return sample.q.double().softmax(0).to(sample.q.dtype)


def true_soft_cross_entropy(exact: Exact) -> Truth:
    row = exact.p
    targets = [mp.mpf(value) for value in soft_targets(exact.sample).double().tolist()]
    pairs = [(t, s, e) for t, s, e in zip(targets, row.surprises, row.error, strict=True) if t]
    value = mpmath.fsum(t * s for t, s, _ in pairs)
    if not mp.isfinite(value):
        return Truth(value, 0.0)
    errors = mpmath.fsum(t * e + t * s * _ROUNDINGS for t, s, e in pairs)
    return Truth(value, _pairs(len(pairs)) + _relative(errors, value))


def true_smoothed_cross_entropy(exact: Exact) -> Truth:
    row, smoothing = exact.p, mp.mpf(SMOOTHING)
    classes = len(row.logits)
    value = (1 - smoothing) * row.surprises[exact.sample.target] + smoothing / classes * mpmath.fsum(row.surprises)
    if not mp.isfinite(value):
        return Truth(value, 0.0)
    nll = true_nll(exact)
    # All terms have one sign. The factors 1 - smoothing and smoothing / classes are rounded as well.
    spread = mpmath.fsum(e + s * (_ROUNDINGS + _pairs(classes)) for s, e in zip(row.surprises, row.error, strict=True))
    errors = (1 - smoothing) * nll.value * (nll.growth + _ROUNDINGS) + smoothing / classes * spread
    return Truth(value, 1 + _relative(errors, value))


def log_probs(logits: Tensor) -> Tensor:
    """Return log-probabilities of the dtype, as a user would have them: the rounded log-softmax."""
    return logits.double().log_softmax(0).to(logits.dtype)


def true_nll_loss(exact: Exact) -> Truth:
    picked = log_probs(exact.sample.p)[exact.sample.target]
    weight = torch.tensor(NLL_WEIGHT, dtype=picked.dtype)
    return Truth(-mp.mpf(picked.item()) * mp.mpf(weight.item()), 1.0)


def true_kl_div(exact: Exact) -> Truth:
    inputs = [mp.mpf(value) for value in log_probs(exact.sample.q).double().tolist()]
    targets = [mp.mpf(value) for value in log_probs(exact.sample.p).double().tolist()]
    terms, errors = [], []
    for x, y in zip(inputs, targets, strict=True):
        if not mp.isfinite(y):
            continue
        if not mp.isfinite(x):
            return Truth(mp.inf, 0.0)
        t = mp.exp(y)
        terms.append(t * (y - x))
        # torch's definition takes both as given, so the terms have two signs: exp, the difference, the product.
        errors.append(abs(terms[-1]) * (3 + _pairs(len(inputs))))
    value = mpmath.fsum(terms)
    return Truth(value, _relative(mpmath.fsum(errors), abs(value)))


@dataclass(frozen=True)
class BinarySample:
    """Logits, probabilities and targets of one shape."""

    family: str
    logits: Tensor
    probabilities: Tensor
    target: Tensor


def binary_samples(dtype: torch.dtype, *, seed: int = 0) -> Iterator[BinarySample]:
    """Yield elements of every size, with hard and soft targets."""
    generator = torch.Generator().manual_seed(seed)
    count = 200
    for family, scale in (("tiny logits", 1e-20), ("logits", 3.0), ("confident logits", 25.0)):
        logits = torch.randn(count, generator=generator, dtype=torch.float64) * scale
        target = torch.rand(count, generator=generator, dtype=torch.float64)
        target[::3], target[1::3] = 0, 1
        # Probabilities right up to both ends, where 1 - p is exact and log(1 - p) is not.
        yield BinarySample(family, logits.to(dtype), torch.sigmoid(logits).to(dtype), target.to(dtype))


def true_bce_with_logits(sample: BinarySample) -> list[Truth]:
    found = []
    for z, t in zip(sample.logits.double().tolist(), sample.target.double().tolist(), strict=True):
        positive, negative = mp.log1p(mp.exp(-mp.mpf(z))), mp.log1p(mp.exp(mp.mpf(z)))
        # Two terms of one sign: exp, log1p, the difference 1 - t, a product each, and one sum.
        found.append(Truth(t * positive + (1 - mp.mpf(t)) * negative, 6))
    return found


def true_bce(sample: BinarySample) -> list[Truth]:
    found = []
    for p, t in zip(sample.probabilities.double().tolist(), sample.target.double().tolist(), strict=True):
        positive = max(mp.log(p), mp.mpf(-100)) if p else mp.mpf(-100)
        negative = max(mp.log1p(-mp.mpf(p)), mp.mpf(-100)) if p < 1 else mp.mpf(-100)
        found.append(Truth(-(mp.mpf(t) * positive + (1 - mp.mpf(t)) * negative), 6))
    return found


@dataclass(frozen=True)
class VectorSample:
    """Two vectors, with the sign the embedding loss is asked for."""

    family: str
    x: Tensor
    y: Tensor
    sign: int


def vector_samples(dtype: torch.dtype, *, seed: int = 0) -> Iterator[VectorSample]:
    """Yield pairs of vectors: any angle, nearly parallel, long and short ones."""
    generator = torch.Generator().manual_seed(seed)
    # Half the exponent range and more: the squares of these overflow or vanish.
    huge = {torch.float32: 1e30, torch.float64: 1e300, torch.bfloat16: 1e30, torch.float16: 1e3}[dtype]

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    for size in (2, 64, 1000):
        for sign in (1, -1):
            x, y = normal(size), normal(size)
            yield VectorSample("any angle", x.to(dtype), y.to(dtype), sign)
            yield VectorSample("nearly parallel", x.to(dtype), (x + 0.01 * y).to(dtype), sign)
            yield VectorSample("long", (x * huge).to(dtype), ((x + y) * huge).to(dtype), sign)
            yield VectorSample("long and short", (x * huge).to(dtype), ((x + y) * 1e-5).to(dtype), sign)


def _cosine_parts(sample: VectorSample, norm: Callable[[Any], Any]) -> tuple[Any, float]:
    """Return the cosine and its absolute error in u."""
    x = [mp.mpf(value) for value in sample.x.double().tolist()]
    y = [mp.mpf(value) for value in sample.y.double().tolist()]
    norms = norm(mpmath.fdot(x, x)) * norm(mpmath.fdot(y, y))
    cosine = mpmath.fdot(x, y) / norms
    magnitudes = mpmath.fsum(abs(a * b) for a, b in zip(x, y, strict=True)) / norms
    # The products have two signs. Scaling rounds each vector once, and each norm halves the error of its sum.
    depth = _pairs(len(x))
    return cosine, float(magnitudes) * (depth + 4) + float(abs(cosine)) * (depth + 6)


def true_cosine(sample: VectorSample) -> list[Truth]:
    cosine, error = _cosine_parts(sample, lambda square: max(mp.sqrt(square), mp.mpf(1e-8)))
    return [Truth(cosine, error / float(abs(cosine)))]


def true_cosine_embedding(sample: VectorSample) -> list[Truth]:
    cosine, error = _cosine_parts(sample, lambda square: mp.sqrt(square + mp.mpf(1e-12)))
    value = 1 - cosine if sample.sign == 1 else max(mp.mpf(0), cosine - MARGIN)
    return [Truth(value, (error + 1) / float(value) if value else 0.0)]
