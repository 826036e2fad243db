"""Per-row measures in exact arithmetic, from the binary logits; written apart from the package."""

from typing import Any, NamedTuple

import mpmath
import torch
from mpmath import mp
from torch import Tensor

BITS = 400
PAIR = ("kl", "reverse_kl", "js", "cross_entropy", "entropy_p", "entropy_q")


class Value(NamedTuple):
    """An exact value, and how far moving each logit by its relative size 1 would move it, to first order."""

    exact: Any
    condition: Any


class Row(NamedTuple):
    logits: list[Any]
    p: list[Any]
    surprise: list[Any]  # -log p
    top: Any
    lse: Any


def row(logits: Tensor) -> Row:
    z = [mp.mpf(x) for x in logits.double().tolist()]
    top = max(z)
    weight = [mp.exp(x - top) for x in z]
    others = weight.copy()
    others.pop(z.index(top))
    log_sum = mp.log1p(mpmath.fsum(others))
    total = mpmath.fsum(weight)
    return Row(z, [w / total for w in weight], [(top - x) + log_sum for x in z], top, top + log_sum)


def _condition(of: Row, slopes: list[Any]) -> Any:
    return mpmath.fsum(abs(g * x) for g, x in zip(slopes, of.logits, strict=True) if mp.isfinite(x))


def token_stats(logits: Tensor, target: int) -> dict[str, Value]:
    """nll, lse and entropy."""
    with mp.workprec(BITS):
        r = row(logits)
        entropy = mpmath.fsum(p * s for p, s in zip(r.p, r.surprise, strict=True) if p)
        minus_one = [p - (j == target) for j, p in enumerate(r.p)]
        bent = [p * (s - entropy) if p else mp.mpf(0) for p, s in zip(r.p, r.surprise, strict=True)]
        return {
            "nll": Value(r.surprise[target], _condition(r, minus_one)),
            "lse": Value(r.lse, abs(r.top) + (r.lse - r.top)),  # two terms that may cancel
            "entropy": Value(entropy, _condition(r, bent)),
        }


def pair_stats(first: Tensor, second: Tensor) -> dict[str, Value]:
    """The measures of two rows, in the order of PAIR."""
    with mp.workprec(BITS):
        a, b = row(first), row(second)
        classes = list(zip(a.p, b.p, a.surprise, b.surprise, strict=True))
        entropy_p = mpmath.fsum(p * s for p, _, s, _ in classes if p)
        entropy_q = mpmath.fsum(q * s for _, q, _, s in classes if q)
        cross = mpmath.fsum(p * s for p, _, _, s in classes if p)
        cross_back = mpmath.fsum(q * s for _, q, s, _ in classes if q)
        log_2 = mp.log(2)
        to_p = [mp.log1p(q / p) - log_2 if p else mp.mpf(0) for p, q, _, _ in classes]  # log(m / p)
        to_q = [mp.log1p(p / q) - log_2 if q else mp.mpf(0) for p, q, _, _ in classes]
        from_p = -mpmath.fsum(p * x for (p, *_), x in zip(classes, to_p, strict=True))
        from_q = -mpmath.fsum(q * x for (_, q, *_), x in zip(classes, to_q, strict=True))
        apart = [q - p for p, q, _, _ in classes]

        def sloped(value: Any, on_p: list[Any], on_q: list[Any]) -> Value:
            infinite = not mp.isfinite(value)
            return Value(value, mp.mpf(0) if infinite else _condition(a, on_p) + _condition(b, on_q))

        def centred(weights: list[Any], values: list[Any]) -> list[Any]:
            held = [(w, v) for w, v in zip(weights, values, strict=True) if w and mp.isfinite(v)]
            mean = mpmath.fsum(w * v for w, v in held) / mpmath.fsum(w for w, _ in held) if held else mp.mpf(0)
            return [w * (v - mean) if w and mp.isfinite(v) else mp.mpf(0) for w, v in zip(weights, values, strict=True)]

        ratio = [s - t if mp.isfinite(s) and mp.isfinite(t) else mp.mpf(0) for _, _, s, t in classes]
        zero = [mp.mpf(0)] * len(classes)
        return {
            "kl": sloped(cross - entropy_p, centred(a.p, ratio), apart),
            "reverse_kl": sloped(cross_back - entropy_q, apart, centred(b.p, ratio)),
            "js": sloped((from_p + from_q) / 2, centred(a.p, to_p), centred(b.p, to_q)),
            "cross_entropy": sloped(cross, centred(a.p, b.surprise), apart),
            "entropy_p": sloped(entropy_p, centred(a.p, a.surprise), zero),
            "entropy_q": sloped(entropy_q, zero, centred(b.p, b.surprise)),
        }


def divergences(first: Tensor, second: Tensor, weight: float) -> dict[str, Value]:
    """KL(p || m), the JS divergence of p's weight, both of m = weight p + (1 - weight) q, and the total variation."""
    with mp.workprec(BITS):
        a, b = row(first), row(second)
        w, c = mp.mpf(weight), 1 - mp.mpf(weight)
        m = [w * p + c * q for p, q in zip(a.p, b.p, strict=True)]
        log_p = [mp.log(p / n) if p else mp.mpf(0) for p, n in zip(a.p, m, strict=True)]
        log_q = [mp.log(q / n) if q else mp.mpf(0) for q, n in zip(b.p, m, strict=True)]
        share = [1 - p / n if n else mp.mpf(0) for p, n in zip(a.p, m, strict=True)]
        from_p = mpmath.fsum(p * x for p, x in zip(a.p, log_p, strict=True))
        from_q = mpmath.fsum(q * x for q, x in zip(b.p, log_q, strict=True))
        sign = [mp.sign(p - q) for p, q in zip(a.p, b.p, strict=True)]

        def centred(weights: list[Any], values: list[Any]) -> list[Any]:
            mean = mpmath.fsum(u * v for u, v in zip(weights, values, strict=True))
            return [u * (v - mean) for u, v in zip(weights, values, strict=True)]

        def value(exact: Any, on_p: list[Any], on_q: list[Any]) -> Value:
            if abs(exact) < mp.ldexp(1, 20 - BITS):  # the last roundings of these sums, of rows a constant apart
                exact = mp.mpf(0)
            return Value(exact, _condition(a, on_p) + _condition(b, on_q))

        skewed = [x + w * r for x, r in zip(log_p, share, strict=True)]
        apart = mpmath.fsum(abs(p - q) for p, q in zip(a.p, b.p, strict=True)) / 2
        return {
            "skewed_kl": value(from_p, centred(a.p, skewed), centred(b.p, [c * r for r in share])),
            "weighted_js": value(
                w * from_p + c * from_q,
                [w * x for x in centred(a.p, log_p)],
                [c * x for x in centred(b.p, log_q)],
            ),
            "tv": value(apart, [x / 2 for x in centred(a.p, sign)], [x / 2 for x in centred(b.p, sign)]),
        }


def ulps(value: float, truth: Any, dtype: torch.dtype) -> float:
    """How far a value is from the truth, in units in the last place of the dtype at the truth."""
    with mp.workprec(BITS):
        if not mp.isfinite(truth) or not truth:
            return 0.0 if value == float(truth) else float("inf")
        info = torch.finfo(dtype)
        _, exponent = mp.frexp(truth)
        spacing = max(mp.ldexp(mp.mpf(info.eps), exponent - 1), mp.mpf(info.tiny) * info.eps)
        return float(abs(mp.mpf(value) - truth) / spacing) if value == value else float("inf")
