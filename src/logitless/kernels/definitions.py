"""The definition of every loss and measure: a plain composition of torch operations, written to be read.

The faster kernels are held to it, and it is what runs where torch must differentiate it (transforms, higher
derivatives), in compilers, and on devices without a kernel of their own. Every function takes tensors already in their
computation dtype (float32 or wider) and already checked; none reduces over rows, and none divides by a count.

Precision policy: a row's log-sum-exp is kept as the pair (top, log_sum) with

    top = max z        log_sum = log1p(sum over the other classes of exp(z - top))

so the loss of a row whose target is the top class is log_sum itself, exact to a relative rounding even when
it is 1e-12. Divergences are sums of terms that cannot be negative. 0 log 0 is 0, in value and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless.kernels.interface import ClassTarget, Divergence, times_zero_safe


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor lies in several processes, without a wait for that part of torch to be read."""
    return type(tensor).__name__ == "DTensor"


def beside(made: Tensor, given: Tensor) -> Tensor:
    """Return a constant as an operand of what was given: over all processes where that is a DTensor."""
    if not is_sharded(given):
        return made
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(given, DTensor)
    mesh = given.device_mesh
    return DTensor.from_local(made, mesh, [Replicate()] * mesh.ndim, run_check=False)


class LogSumExp(NamedTuple):
    """`lse = top + log_sum`, kept apart; both keep the class dimension."""

    top: Tensor
    log_sum: Tensor


def log_sum_exp(logits: Tensor, dim: int) -> LogSumExp:
    """Return the log-sum-exp of each row in two parts; of no classes it is -inf."""
    if logits.shape[dim] == 0:
        nothing = logits.sum(dim, keepdim=True)
        return LogSumExp(nothing - math.inf, nothing)
    top, argmax = logits.max(dim, keepdim=True)
    classes = beside(torch.arange(logits.shape[dim], device=logits.device), logits)
    classes = classes.view([-1 if axis == dim % logits.dim() else 1 for axis in range(logits.dim())])
    others = torch.exp(logits - top).masked_fill(classes == argmax, 0)
    # 1, or NaN where the top is infinite: an overflow shows itself in the value and in every gradient.
    finite = 1 + (top - top).detach()
    return LogSumExp(top, torch.log1p(others.sum(dim, keepdim=True) * finite))


def negative_log_softmax(logits: Tensor, dim: int) -> Tensor:
    """Return `lse - z`, formed without rounding `lse`."""
    top, log_sum = log_sum_exp(logits, dim)
    return (top - logits) + log_sum


class ClassRows(NamedTuple):
    """Per-row losses, and per row what a weighted mean counts it as."""

    loss: Tensor
    weight: Tensor


def cross_entropy(logits: Tensor, target: ClassTarget, weight: Tensor | None, label_smoothing: float) -> ClassRows:
    """Return the cross-entropy of each row: `lse - z[target]`, or `sum_j t_j w_j (lse - z_j)`."""
    if target.probabilities is not None:
        return _soft_cross_entropy(logits, target, weight, label_smoothing)
    dim, indices = target.class_dim, _kept_dim(target)
    if target.classes == 0:
        return _of_no_classes(logits, target)
    if target.ignored is not None:
        logits = logits.masked_fill(target.ignored.view_as(indices), 0)
    top, log_sum = log_sum_exp(logits, dim)
    nll = (top - logits.gather(dim, indices)) + log_sum
    row_weight = _row_weight(target, weight, logits)
    loss = times_zero_safe(row_weight, nll.squeeze(dim))
    if label_smoothing > 0:
        surprise = (top - logits) + log_sum
        if weight is not None:
            surprise = times_zero_safe(_along(weight, logits, dim), surprise)
        kept = (1 - label_smoothing) * loss if label_smoothing < 1 else 0.0  # not 0 * inf
        loss = kept + label_smoothing / target.classes * surprise.sum(dim)
    return _without_ignored(ClassRows(loss, row_weight), target)


def nll(
    log_probs: Tensor,
    target: ClassTarget,
    weight: Tensor | None,
    dtype: torch.dtype,
    gather: Callable[[Tensor, int, Tensor], Tensor] = torch.gather,
) -> ClassRows:
    """Return `-w[target] log_probs[target]` for each row in `dtype`, to which no other element is converted.

    `gather` is torch's or one of the same result.
    """
    dim, indices = target.class_dim, _kept_dim(target)
    if target.classes == 0:
        return _of_no_classes(log_probs.to(dtype), target)
    picked = gather(log_probs, dim, indices).squeeze(dim).to(dtype)
    if target.ignored is not None:
        picked = picked.masked_fill(target.ignored.view_as(picked), 0)
    row_weight = _row_weight(target, weight, picked)
    return _without_ignored(ClassRows(times_zero_safe(-row_weight, picked), row_weight), target)


def _soft_cross_entropy(
    logits: Tensor, target: ClassTarget, weight: Tensor | None, label_smoothing: float
) -> ClassRows:
    dim, probabilities = target.class_dim, target.probabilities
    assert probabilities is not None
    given = coefficient = probabilities.to(logits.dtype)
    if label_smoothing > 0:
        coefficient = given * (1 - label_smoothing) + label_smoothing / target.classes
    if weight is not None:
        along = _along(weight, logits, dim)
        given, coefficient = given * along, coefficient * along
    loss = times_zero_safe(coefficient, negative_log_softmax(logits, dim)).sum(dim)
    # A mean counts a row by its target, as one of class indices: smoothing spreads the loss, not the row's weight.
    return ClassRows(loss, given.sum(dim))


def _of_no_classes(logits: Tensor, target: ClassTarget) -> ClassRows:
    """Return the rows of a target that can name no class: those that are there are ignored."""
    nothing = logits.sum(target.class_dim)
    return _without_ignored(ClassRows(nothing, nothing.detach()), target)


def _kept_dim(target: ClassTarget) -> Tensor:
    assert target.indices is not None
    return target.indices.unsqueeze(target.class_dim)


def _along(weight: Tensor, logits: Tensor, dim: int) -> Tensor:
    return weight.to(logits.dtype).view([-1 if axis == dim else 1 for axis in range(logits.dim())])


def _row_weight(target: ClassTarget, weight: Tensor | None, logits: Tensor) -> Tensor:
    assert target.indices is not None
    if weight is None:
        return torch.ones_like(target.indices, dtype=logits.dtype)
    return weight_at(weight.to(logits.dtype), target.indices)


def weight_at(weight: Tensor, indices: Tensor) -> Tensor:
    """Return the class weight at each index; of one index too, whose value an index of no dimensions would read."""
    return weight[indices.unsqueeze(0)].squeeze(0)


def _without_ignored(rows: ClassRows, target: ClassTarget) -> ClassRows:
    loss, weight = rows
    if target.ignored is not None:
        loss, weight = loss.masked_fill(target.ignored, 0), weight.masked_fill(target.ignored, 0)
    if target.impossible is not None:
        loss = loss.masked_fill(target.impossible, math.nan)
    return ClassRows(loss, weight)


def binary_cross_entropy(probabilities: Tensor, target: Tensor) -> Tensor:
    """Return `-(t log p + (1 - t) log(1 - p))` with torch's clamp of each logarithm at -100.

    The gradient is torch's documented one, `(p - t) / max(p (1 - p), 1e-12)`: at the two ends, where the clamped
    value is flat, it is carried by a parabola with that slope, so that transforms of any order see it too.
    """
    inside = probabilities * (1 - probabilities) >= 1e-12
    p = probabilities.masked_fill(~inside, 0.5)
    interior = -(target * torch.log(p) + (1 - target) * torch.log1p(-p))
    end = probabilities.detach()
    clamped = -(target * torch.log(end).clamp(min=-100) + (1 - target) * torch.log1p(-end).clamp(min=-100))
    parabola = (probabilities * probabilities / 2 - target.detach() * probabilities) * 1e12
    return torch.where(inside, interior, clamped + (parabola - parabola.detach()))


def binary_cross_entropy_with_logits(logits: Tensor, target: Tensor, pos_weight: Tensor | None) -> Tensor:
    """Return `-(w t log sigmoid(z) + (1 - t) log sigmoid(-z))`: two terms of one sign, nothing cancels."""
    positive = target if pos_weight is None else target * pos_weight
    # Softplus, as logsigmoid has no gradient where it is distributed; above 40 no rounding is left of what it adds.
    missed, alarmed = F.softplus(-logits, threshold=40), F.softplus(logits, threshold=40)
    return times_zero_safe(positive, missed) + times_zero_safe(1 - target, alarmed)


def kl_div(log_probs: Tensor, target: Tensor, log_target: bool) -> Tensor:
    """Return `t (log t - input)` for each element; 0 where the target is 0, in value and gradient."""
    if log_target:
        absent = torch.exp(target) == 0
        log_t = target.masked_fill(absent, 0)
        t = torch.exp(log_t)
    else:
        absent = target == 0
        t = target.masked_fill(absent, 1)
        log_t = torch.log(t)
    return (t * (log_t - log_probs.masked_fill(absent, 0))).masked_fill(absent, 0)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int, eps: float) -> Tensor:
    """Return `x1 . x2 / (max(|x1|, eps) max(|x2|, eps))` within [-1, 1].

    Each vector is first divided by its largest element, so no square overflows or vanishes; the last rounding
    above 1 is cut off without touching the gradient.
    """
    unit1, norm1 = _scaled(x1, dim, eps)
    unit2, norm2 = _scaled(x2, dim, eps)
    cosine = (unit1 * unit2).sum(dim) / (norm1 * norm2)
    return cosine + (cosine.clamp(-1, 1) - cosine).detach()


def _largest(x: Tensor, dim: int) -> Tensor:
    """Return the size of each vector's largest element; 0 of none."""
    size = x.detach().abs()
    return size.amax(dim) if not x.dim() or x.shape[dim] else size.sum(dim)


def _scaled(x: Tensor, dim: int, eps: float) -> tuple[Tensor, Tensor]:
    largest = _largest(x, dim)
    largest = torch.where((largest == 0) | torch.isinf(largest), 1, largest)
    unit = x / largest.unsqueeze(dim)
    return unit, torch.maximum(torch.linalg.vector_norm(unit, dim=dim), eps / largest)


def cosine_embedding_loss(x1: Tensor, x2: Tensor, target: Tensor, margin: float, dim: int) -> Tensor:
    """Return `1 - cos` where the target is 1, `max(0, cos - margin)` where it is -1, and 0 elsewhere.

    torch's own rule for small vectors stands: 1e-12 is added to each squared norm.
    """
    large1, large2 = _largest(x1, dim).clamp(min=1), _largest(x2, dim).clamp(min=1)
    u1, u2 = x1 / large1.unsqueeze(dim), x2 / large2.unsqueeze(dim)
    norm1 = torch.sqrt((u1 * u1).sum(dim) + 1e-12 / large1**2)
    norm2 = torch.sqrt((u2 * u2).sum(dim) + 1e-12 / large2**2)
    cosine = (u1 * u2).sum(dim) / (norm1 * norm2)
    similar = torch.where(target == 1, 1 - cosine, 0)
    return similar + torch.where(target == -1, (cosine - margin).clamp(min=0), 0)


PairMeasure = Callable[[Tensor, Tensor], Tensor]


def entropy(logits: Tensor, dim: int) -> Tensor:
    """Return `sum_j p_j (lse - z_j)` as `log_sum + sum_j p_j (top - z_j)`: no term is negative."""
    top, log_sum = log_sum_exp(logits, dim)
    gap = top - logits
    probabilities = torch.exp(-gap - log_sum)
    return log_sum.squeeze(dim) + times_zero_safe(probabilities, gap).sum(dim)


def token_stats(logits: Tensor, target: ClassTarget, top_k: int = 0) -> tuple[Tensor, ...]:
    """Return nll, lse, entropy, argmax and rank of rows [rows, classes].

    With a `top_k` also the log-probabilities of the k largest, without a gradient, and their classes.
    """
    indices = _kept_dim(target)
    if target.classes == 0:  # all rows are ignored
        nothing, none = logits.sum(1), torch.full_like(indices.squeeze(1), -1)
        return nothing, nothing, nothing, none, none
    if target.ignored is not None:
        logits = logits.masked_fill(target.ignored.view_as(indices), 0)
    top, log_sum = log_sum_exp(logits, 1)
    at_target = logits.gather(1, indices)
    floats = [((top - at_target) + log_sum).squeeze(1), (top + log_sum).squeeze(1), entropy(logits, 1)]
    integers = [logits.argmax(1), (logits > at_target).sum(1)]
    if target.ignored is not None:
        floats = [value.masked_fill(target.ignored, 0) for value in floats]
        integers = [value.masked_fill(target.ignored, -1) for value in integers]
    if target.impossible is not None:
        floats[0] = floats[0].masked_fill(target.impossible, math.nan)
        integers[1] = integers[1].masked_fill(target.impossible, -1)
    if not top_k:
        return *floats, *integers
    values, classes = logits.detach().topk(top_k, 1)
    log_probs = (values - top.detach()) - log_sum.detach()
    if target.ignored is not None:
        log_probs = log_probs.masked_fill(target.ignored.unsqueeze(1), 0)
        classes = classes.masked_fill(target.ignored.unsqueeze(1), -1)
    return *floats, *integers, log_probs, classes


class Pair(NamedTuple):
    """Two rows' probabilities and surprises `-log p`, and `log_ratio = log q - log p`."""

    p: Tensor
    q: Tensor
    surprise_p: Tensor
    surprise_q: Tensor
    log_ratio: Tensor


def pair_of(logits_p: Tensor, logits_q: Tensor) -> Pair:
    """Return what the measures of two rows, whose classes come last, are made of."""
    surprise_p, surprise_q = negative_log_softmax(logits_p, -1), negative_log_softmax(logits_q, -1)
    # A class both exclude has no ratio; it must not turn inf - inf into NaN, nor into a gradient.
    excluded = torch.isinf(surprise_p) & torch.isinf(surprise_q)
    log_ratio = surprise_p.masked_fill(excluded, 0) - surprise_q.masked_fill(excluded, 0)
    return Pair(torch.exp(-surprise_p), torch.exp(-surprise_q), surprise_p, surprise_q, log_ratio)


def _times_infinite(coefficient: Tensor, value: Tensor) -> Tensor:
    """Return `coefficient * value` where a zero coefficient wins over an infinite value, and a zero upstream gradient.

    The coefficient's gradient is upstream times the value: where that is infinite it is reached in two finite steps, so
    that nothing times it stays nothing. So a row whose divergence is infinite can be masked out of a loss.
    """
    infinite = torch.isinf(value) & (coefficient != 0)
    plain = times_zero_safe(coefficient.masked_fill(infinite, 0), value)
    most = torch.finfo(value.dtype).max
    slope = (coefficient - coefficient.detach()) * most * most * value.detach().sign()
    return torch.where(infinite, coefficient.detach() * value + slope, plain)


def _divergence_terms(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """Return `p (exp(r) - 1 - r) = q - p - p r` with `r = log q - log p`: never negative, 0 where r is 0.

    Where r is small `q - p - p r` would lose the term to rounding, and where it is tiny so would `expm1(r) - r`.
    """
    near = log_ratio.abs() < 1
    r = log_ratio.masked_fill(~near, 0)
    series = r * r / 2 * (1 + r / 3 * (1 + r / 4 * (1 + r / 5 * (1 + r / 6 * (1 + r / 7)))))
    bracket = torch.where(r.abs() < 0.02, series, torch.expm1(r) - r)
    absent = p == 0
    far = (q - p) - _times_infinite(p, log_ratio)
    return torch.where(near, p * bracket, torch.where(absent, q, far))


def kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Return `KL(p || q)` of rows whose classes come last."""
    pair = pair_of(logits_p, logits_q)
    return _divergence_terms(pair.p, pair.q, pair.log_ratio).sum(-1)


def js(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of rows whose classes come last."""
    return _jensen_shannon(pair_of(logits_p, logits_q))


def _jensen_shannon(pair: Pair) -> Tensor:
    """Return `(KL(p || m) + KL(q || m)) / 2` with `m = (p + q) / 2`, from `log m / p` and `log m / q`.

    The mixture is nearer the larger of the two: `log(m / larger) = log1p(expm1(-|r|) / 2)` lies within [-log 2, 0].
    """
    q_smaller = pair.log_ratio <= 0
    minus = torch.where(q_smaller, pair.log_ratio, -pair.log_ratio)
    to_larger = torch.log1p(torch.expm1(minus) / 2)
    to_smaller = to_larger - minus
    mixture = (pair.p + pair.q) / 2
    from_p = _divergence_terms(pair.p, mixture, torch.where(q_smaller, to_larger, to_smaller))
    from_q = _divergence_terms(pair.q, mixture, torch.where(q_smaller, to_smaller, to_larger))
    return (from_p.sum(-1) + from_q.sum(-1)) / 2


def _same_top(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    if logits_p.shape[-1] == 0:
        return torch.ones(logits_p.shape[:-1], dtype=torch.bool, device=logits_p.device)
    return logits_p.argmax(-1) == logits_q.argmax(-1)


def divergence(logits_p: Tensor, logits_q: Tensor, asked: Divergence) -> Tensor:
    """Return the divergence that is asked for of rows whose classes come last."""
    pair = pair_of(logits_p, logits_q)
    if asked.family == "total_variation":
        return _total_variation(pair)
    mixture = asked.weight * pair.p + (1 - asked.weight) * pair.q
    log_m_p, log_m_q = log_mixture_ratios(pair.log_ratio, asked.weight)
    from_p = _divergence_terms(pair.p, mixture, log_m_p).sum(-1)
    if asked.family == "skewed_kl":
        return from_p
    return asked.weight * from_p + (1 - asked.weight) * _divergence_terms(pair.q, mixture, log_m_q).sum(-1)


def log_mixture_ratios(log_ratio: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Return log m / p and log m / q with m = weight p + (1 - weight) q, by way of the larger of p and q.

    `m / larger` is `1 + its other weight (e - 1)` with `e = exp(-|log_ratio|)`, and `its weight + its other weight e`,
    of which the first keeps a small logarithm and the second a small weight.
    """
    q_smaller = log_ratio <= 0
    minus = torch.where(q_smaller, log_ratio, -log_ratio)
    near = minus > -0.5
    fall, ratio = torch.expm1(minus.masked_fill(~near, 0)), torch.exp(minus)
    small = torch.log1p(torch.where(q_smaller, (1 - weight) * fall, weight * fall))
    mixed = torch.where(q_smaller, weight + (1 - weight) * ratio, (1 - weight) + weight * ratio)
    to_larger = torch.where(near, small, torch.log(mixed))
    to_smaller = to_larger - minus
    return torch.where(q_smaller, to_larger, to_smaller), torch.where(q_smaller, to_smaller, to_larger)


def _total_variation(pair: Pair) -> Tensor:
    """Return `sum |q - p| / 2`, a small difference as `p (exp(log_ratio) - 1)`; its slope where they are equal is 0."""
    near = pair.log_ratio.abs() < 0.5
    small = pair.p * torch.expm1(pair.log_ratio.masked_fill(~near, 0))
    return torch.where(near, small, pair.q - pair.p).abs().sum(-1) / 2


def pair_stats(logits_p: Tensor, logits_q: Tensor, target: ClassTarget | None) -> tuple[Tensor, ...]:
    """Return kl, reverse_kl, js, cross_entropy, entropy_p, entropy_q, same_top, and with a target nll_p and nll_q.

    The cross-entropy is its own sum, not H + KL, so that the identity between them can be checked.
    """
    pair = pair_of(logits_p, logits_q)
    stats = [
        _divergence_terms(pair.p, pair.q, pair.log_ratio).sum(-1),
        _divergence_terms(pair.q, pair.p, -pair.log_ratio).sum(-1),
        _jensen_shannon(pair),
        _times_infinite(pair.p, pair.surprise_q).sum(-1),
        times_zero_safe(pair.p, pair.surprise_p).sum(-1),
        times_zero_safe(pair.q, pair.surprise_q).sum(-1),
        _same_top(logits_p, logits_q),
    ]
    if target is not None:
        for surprise in (pair.surprise_p, pair.surprise_q):
            picked = surprise.gather(-1, _kept_dim(target)).squeeze(-1) if target.classes else surprise.sum(-1)
            if target.ignored is not None:
                picked = picked.masked_fill(target.ignored, 0)
            if target.impossible is not None:
                picked = picked.masked_fill(target.impossible, math.nan)
            stats.append(picked)
    return tuple(stats)
