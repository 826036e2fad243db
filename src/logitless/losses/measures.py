"""What torch lacks: per-row measures of one distribution or of two, each given by its logits, dense or lazy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from logitless._autograd import measures as dense_measures
from logitless._autograd.rows import CrossEntropyCall, Reduced
from logitless._autograd.rows import cross_entropy as dense_cross_entropy
from logitless._heads.fold import fold_rows
from logitless._heads.loss_plan import HeadLoss
from logitless._heads.measure_plan import PairFunction, pair_function
from logitless._heads.rows import HeadRows, LogitRows, at_positions, dense_rows
from logitless._heads.sweep import forecast
from logitless._rules import dispatch
from logitless._rules.precision import check_input, check_real, no_autocast, precision_of
from logitless._rules.reduction import count_of, reduce_rows, resolve_reduction
from logitless._rules.targets import checked_values, class_target
from logitless.kernels import definitions
from logitless.kernels.interface import Backend, ClassTarget, Divergence
from logitless.lazy import sparse
from logitless.lazy.logits import HeadLogits, LazyLogits
from logitless.lazy.sparse import SparseLogits
from logitless.lazy.tensor import as_tensor
from logitless.losses import head_classification, head_measures

# What a divergence takes; of two at most one is sparse.
Logits = Tensor | LazyLogits | SparseLogits

# Below it the share of a mixture has too few digits in float32.
_LEAST_WEIGHT = 1e-30


class TokenStats(NamedTuple):
    """One number a row: what one distribution says of one target."""

    nll: Tensor
    lse: Tensor
    entropy: Tensor
    argmax: Tensor
    rank: Tensor


class TopTokenStats(NamedTuple):
    """The same, and the largest log-probabilities with their classes, k a row: what `top_k` gives."""

    nll: Tensor
    lse: Tensor
    entropy: Tensor
    argmax: Tensor
    rank: Tensor
    top_log_probs: Tensor
    top_classes: Tensor


class PairStats(NamedTuple):
    """One number a row: how two distributions p and q differ. `nll_p` and `nll_q` need a target."""

    kl: Tensor
    reverse_kl: Tensor
    js: Tensor
    cross_entropy: Tensor
    entropy_p: Tensor
    entropy_q: Tensor
    same_top: Tensor
    nll_p: Tensor | None
    nll_q: Tensor | None


@overload
def token_stats(
    logits: Tensor | LazyLogits,
    target: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    deterministic: bool = False,
) -> TokenStats: ...
@overload
def token_stats(
    logits: Tensor | LazyLogits,
    target: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    top_k: int,
    deterministic: bool = False,
) -> TopTokenStats: ...
@overload
def token_stats(
    logits: Tensor | LazyLogits,
    target: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    top_k: int | None = None,
    deterministic: bool = False,
) -> TokenStats | TopTokenStats: ...
def token_stats(
    logits: Tensor | LazyLogits,
    target: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    top_k: int | None = None,
    deterministic: bool = False,
) -> TokenStats | TopTokenStats:
    """Return each row's negative log-likelihood, log-sum-exp, entropy, top class and the target's rank.

    Equals, for dense `z` divided by the temperature: `nll = F.cross_entropy(z, target, reduction="none")`,
    `lse = z.logsumexp(-1)`, `entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)`, `argmax = z.argmax(-1)` and
    `rank = (z > z.gather(-1, target[..., None])).sum(-1)`, and `top_log_probs, top_classes =
    z.log_softmax(-1).topk(top_k, -1)`; with LazyLogits in O(rows) and one tile of memory.

    Args:
        logits: (..., classes), floating, or LazyLogits.
        target: class indices (...), any integer dtype.
        ignore_index: rows with this index are never read: their nll, lse and entropy are 0 with no gradient, their
            argmax and rank -1, and so their top log-probabilities and classes.
        temperature: what the logits are divided by, above 0.
        top_k: how many of the largest to give, or None.
        deterministic: have a row's bits whatever other rows there are, on every machine; see docs/numerics.md.

    Returns:
        TokenStats, with a `top_k` TopTokenStats, of the target's shape: nll, lse and entropy in nats, float32 (float64
        for float64 logits) and differentiable with any upstream gradients; argmax and rank int64, rank 0 being the top
        class. The top log-probabilities (..., top_k) are in nats, the largest first, without a gradient; equal ones in
        any order.

    Raises:
        IndexError: a target is not a class. ValueError, RuntimeError, TypeError: shapes, dtypes, temperature, top_k.

    Source: definitions of Shannon (1948); the per-token primitive of perplexity, DPO, GRPO and z-loss. In training
    `nll.mean()` is cross-entropy, `lse.square().mean()` is z-loss, and `-entropy.mean()` keeps a policy exploring.

    >>> import torch, logitless as ll
    >>> stats = ll.token_stats(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([1]))
    >>> stats.nll, stats.rank
    (tensor([2.2395]), tensor([1]))
    """
    check_input("token_stats", logits, target)
    if logits.dim() < 1:
        raise ValueError("token_stats: expected logits (..., classes), got a 0-d tensor")
    meaning = class_target(
        "token_stats", logits.shape, target, ignore_index=ignore_index, class_dim=-1, probabilities_allowed=False
    )
    if top_k is not None and not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(f"token_stats: expected top_k between 1 and {logits.shape[-1]} classes, got {top_k}")
    scale = _inverse("token_stats", temperature)
    stats = _token_stats("token_stats", logits, meaning, scale, top_k or 0, deterministic)
    return TopTokenStats(*stats) if top_k else TokenStats(*stats)


def _token_stats(
    name: str,
    logits: Tensor | LazyLogits,
    meaning: ClassTarget,
    scale: float,
    top_k: int,
    deterministic: bool,
) -> Sequence[Tensor]:
    """Return the fields of TokenStats, or with a `top_k` those of TopTokenStats."""
    logits, scale = _scaled(_computed(logits), scale)

    def definition(z: Tensor | LazyLogits) -> tuple[Tensor, ...]:
        return _token_rows(z, checked_values(name, meaning), scale, top_k)

    if not isinstance(logits, HeadLogits) and scale == 1.0:
        tensors = (logits, meaning.indices)
        backend = _picked(name, tensors, _kernel_obstacle(logits), factors=_factors(deterministic))
        if backend.PLAIN:
            return definition(logits)
        return dense_measures.token_stats(backend, logits, meaning, definition, top_k)
    source = head_measures.rows_of(logits, scale)
    plan = head_measures.token_plan(source, head_measures.wide_dtype(logits), meaning, top_k)
    obstacle, factors = _kernel_obstacle(logits), _factors(deterministic, source)
    backend = _picked(name, (*source.tensors, meaning.indices), obstacle, lambda taken: plan(taken)[0], factors)
    if backend.PLAIN:
        return definition(logits)
    if torch.compiler.is_compiling():
        outputs = TopTokenStats._fields if top_k else TokenStats._fields
        return head_measures.in_graph(backend, name, outputs, logits, target=meaning, scale=scale, top_k=top_k)
    return head_measures.token_stats(*plan(backend), logits.shape[:-1])


def log_probs(
    logits: Tensor | LazyLogits,
    target: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    deterministic: bool = False,
) -> Tensor:
    """Return each row's log-probability of its target: what a policy says of a token that was sampled.

    Equals `(logits / temperature).log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)`, with LazyLogits in
    O(rows) and one tile of memory.

    Args:
        logits: (..., classes), floating, or LazyLogits.
        target: class indices (...), any integer dtype.
        ignore_index: rows with this index are never read: 0, with no gradient.
        temperature: what the logits are divided by, above 0.
        deterministic: have a row's bits whatever other rows there are, on every machine; see docs/numerics.md.

    Returns:
        The target's shape, in nats, float32 (float64 for float64 logits), differentiable with any upstream gradients.

    Raises:
        IndexError: a target is not a class. ValueError, RuntimeError, TypeError: shapes, dtypes, temperature.

    Source: the ratios of PPO (arXiv:1707.06347), DPO and GRPO are differences of these. In training `-log_probs.mean()`
    is cross-entropy; weighted by advantages it is the policy gradient.

    >>> import torch, logitless as ll
    >>> ll.log_probs(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([1]))
    tensor([-2.2395])
    """
    check_input("log_probs", logits, target)
    if logits.dim() < 1:
        raise ValueError("log_probs: expected logits (..., classes), got a 0-d tensor")
    meaning = class_target(
        "log_probs", logits.shape, target, ignore_index=ignore_index, class_dim=-1, probabilities_allowed=False
    )
    logits, scale = _scaled(_computed(logits), _inverse("log_probs", temperature))
    if scale != 1.0:
        return 0.0 - _token_stats("log_probs", logits, meaning, scale, 0, deterministic)[0]
    dtype = precision_of(logits).compute
    if isinstance(logits, HeadLogits):
        asked = HeadLoss(None, 0.0, None, None, None, deterministic)
        return 0.0 - head_classification.cross_entropy("log_probs", logits, meaning, asked, "none", dtype, "nan")

    def definition(z: Tensor) -> Tensor:
        checked = checked_values("log_probs", meaning)
        with no_autocast(z):
            return definitions.cross_entropy(z.to(dtype), checked, None, 0.0).loss

    backend = _picked("log_probs", (logits, target), _kernel_obstacle(logits), factors=_factors(deterministic))
    if backend.PLAIN:
        return 0.0 - definition(logits)
    call = CrossEntropyCall(backend, "log_probs", meaning, None, 0.0, lambda rows: Reduced(rows.loss, 1.0), definition)
    return 0.0 - dense_cross_entropy(logits, call)


def pair_stats(
    p: Tensor | LazyLogits,
    q: Tensor | LazyLogits,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    deterministic: bool = False,
) -> PairStats:
    """Return each row's divergences between two distributions, their entropies, and whether their tops agree.

    Equals, with `P = p.softmax(-1)` and `Q = q.softmax(-1)`: `kl = (P * (P / Q).log()).sum(-1)`,
    `reverse_kl = (Q * (Q / P).log()).sum(-1)`, `js = (KL(P, M) + KL(Q, M)) / 2` with `M = (P + Q) / 2`,
    `cross_entropy = -(P * Q.log()).sum(-1) = entropy_p + kl`, `same_top = p.argmax(-1) == q.argmax(-1)`.

    Args:
        p, q: logits (..., classes) of one shape, each dense or LazyLogits (of any hidden width).
        target: class indices (...) for nll_p and nll_q, or None.
        temperature: what both logits are divided by, above 0.
        deterministic: have a row's bits whatever other rows there are, on every machine; see docs/numerics.md.

    Returns:
        PairStats of shape (...), in nats, float32 (float64 if either is), differentiable but for same_top. A
        divergence is a sum of terms that are not negative: it never is, is 0 for equal rows, and is right to a few
        relative roundings when it is 1e-10. It is infinite where P > 0 and Q = 0.

    Raises:
        ValueError: the shapes differ, or the temperature is not above 0. IndexError: a target is not a class.

    Source: Kullback and Leibler (1951); Lin (1991). In training, `kl` with p fixed makes q cover all of p (forward,
    as distillation); `reverse_kl` makes q settle on a mode of p; `js` lies between and is bounded by log 2.

    >>> import torch, logitless as ll
    >>> stats = ll.pair_stats(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    >>> stats.kl, stats.js, stats.same_top
    (tensor([0.4621]), tensor([0.1109]), tensor([False]))
    """
    check_input("pair_stats", p, q)
    check_real("pair_stats", q=q)
    _check_pair("pair_stats", p, q)
    meaning = None
    if target is not None:
        meaning = class_target(
            "pair_stats", p.shape, target, ignore_index=-100, class_dim=-1, probabilities_allowed=False
        )
    outputs = PairStats._fields if target is not None else PairStats._fields[:-2]
    scale = _inverse("pair_stats", temperature)
    stats = _pair("pair_stats", outputs, p, q, meaning, scale=scale, deterministic=deterministic)
    return PairStats(*stats, *([None, None] if target is None else []))


def entropy(
    logits: Tensor | LazyLogits, *, temperature: float = 1.0, reduction: str = "none", deterministic: bool = False
) -> Tensor:
    """Return the entropy of each row's distribution.

    Equals `torch.distributions.Categorical(logits=logits / temperature).entropy()`.

    Args:
        logits: (..., classes), floating, or LazyLogits.
        temperature: what the logits are divided by, above 0.
        reduction: "none", "mean" (over the rows) or "sum": a scalar of LazyLogits takes a product less to train.
        deterministic: have a row's bits whatever other rows there are, on every machine; see docs/numerics.md.

    Returns:
        (...), or a scalar, in nats, float32 (float64 for float64 logits): 0 for a certain outcome, log(classes) for a
        flat row. A -inf logit counts for nothing, in value and gradient.

    Raises:
        TypeError, NotImplementedError, ValueError: not floating logits of one or more dimensions, or the temperature is
            not above 0.

    Source: Shannon (1948). In training, adding it to the loss makes predictions confident, subtracting it flat.

    >>> import torch, logitless as ll
    >>> ll.entropy(torch.zeros(2, 4))
    tensor([1.3863, 1.3863])
    """
    check_input("entropy", logits, logits)
    if logits.dim() < 1:
        raise ValueError("entropy: expected logits (..., classes), got a 0-d tensor")
    reduction = resolve_reduction(reduction, None, None)
    logits, scale = _scaled(_computed(logits), _inverse("entropy", temperature))
    given, plan = _given(logits, scale), None
    if not isinstance(given, Tensor):
        plan = head_measures.entropy_plan(given, head_measures.wide_dtype(logits), reduction)
    backend = _picked("entropy", _parts(given), _kernel_obstacle(logits), plan, _factors(deterministic, given))
    if backend.PLAIN:
        return _reduced(_entropy_rows(logits, scale)[0], reduction)
    if plan is None:
        assert isinstance(logits, Tensor)
        return _reduced(dense_measures.entropy(backend, logits, _entropy_rows), reduction)
    if torch.compiler.is_compiling():
        return _reduced(head_measures.in_graph(backend, "entropy", ["entropy"], logits, scale=scale)[0], reduction)
    return head_measures.result(plan(backend), logits.shape[:-1], reduction)


def kl(
    p: Logits,
    q: Logits,
    *,
    skew: float = 0.0,
    temperature: float = 1.0,
    reduction: str = "none",
    deterministic: bool = False,
) -> Tensor:
    """Return the Kullback-Leibler divergence of each row from logits: KL(p || q), or KL(p || skew p + (1 - skew) q).

    Equals `(p.softmax(-1) * (p.log_softmax(-1) - m.log())).sum(-1)` with
    `m = skew * p.softmax(-1) + (1 - skew) * q.softmax(-1)`: p is the true distribution.

    Args:
        p, q: logits (..., classes) of one shape, each dense or LazyLogits; one may be SparseLogits, a top-k teacher
            with no gradient, over whose k + 1 buckets the divergence then is (a lower bound of the full one).
        skew: what p weighs in the distribution that it is compared with, 0 to below 1. The skewed reverse divergence,
            KL(q || skew q + (1 - skew) p), is `kl(q, p, skew=skew)`.
        temperature: what both logits are divided by, above 0; a factor of its square is the caller's.
        reduction: "none", "mean" (over the rows) or "sum": a scalar of LazyLogits takes a product less to train.
        deterministic: have a row's bits whatever other rows there are, on every machine; see docs/numerics.md.

    Returns:
        (...), or a scalar, in nats, float32 (float64 if either is); differentiable in both; never negative, 0 for
        equal rows; with a skew at most `-log(skew)`, where q excludes a class of p too.

    Raises:
        ValueError: the shapes differ, skew is not within 0 and 1, or the temperature not above 0. TypeError: one of
            these is no number.

    Source: Kullback and Leibler (1951); arXiv:2402.03898 (DistiLLM) for the skew. In training with p fixed it is
    distillation: q learns to cover all of p, with a skew without being driven by classes that it all but excludes.

    >>> import torch, logitless as ll
    >>> ll.kl(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([0.4621])
    """
    skew = _share("kl", "skew", skew, most="excluded")
    return _divergence(
        "kl", p, q, reduction, temperature, deterministic, Divergence("skewed_kl", skew) if skew else "kl"
    )


def js(
    p: Logits,
    q: Logits,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "none",
    deterministic: bool = False,
) -> Tensor:
    """Return the Jensen-Shannon divergence of each row, from logits, of any weight of p.

    Equals `beta * kl(p, m) + (1 - beta) * kl(q, m)` with `m = (beta * P + (1 - beta) * Q).log()`,
    `P, Q = p.softmax(-1), q.softmax(-1)`, for `0 < beta < 1`. That tends to 0 at both ends, so there it is what the
    quotient by beta (by `1 - beta`) tends to, as trainers have it: `beta=0` is `kl(p, q)`, and `beta=1` is `kl(q, p)`.
    With a teacher p and a student q, beta is that of TRL's `generalized_jsd_loss` and of Liger's JSD.

    Args:
        p, q: logits (..., classes) of one shape, each dense or LazyLogits; one may be SparseLogits, as for `ll.kl`.
        beta: what p weighs in the mixture, 0 to 1.
        temperature: what both logits are divided by, above 0; a factor of its square is the caller's.
        reduction: "none", "mean" (over the rows) or "sum": a scalar of LazyLogits takes a product less to train.
        deterministic: have a row's bits whatever other rows there are, on every machine; see docs/numerics.md.

    Returns:
        (...), or a scalar, in nats, float32 (float64 if either is); differentiable in both; for `0 < beta < 1` between
        0 and `-beta log beta - (1 - beta) log(1 - beta)`, and `js(p, q, beta=b)` is `js(q, p, beta=1 - b)`.

    Raises:
        ValueError: the shapes differ, beta is not within 0 and 1, or the temperature not above 0. TypeError: one of
            these is no number.

    Source: Lin (1991); arXiv:2306.13649 for beta. In training it lies between covering all of p (beta near 0) and
    settling on a mode of it (near 1).

    >>> import torch, logitless as ll
    >>> ll.js(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([0.1109])
    >>> ll.js(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), beta=0.75)
    tensor([0.0840])
    """
    beta = _share("js", "beta", beta, most="included")
    if beta == 0:
        return _divergence("js", p, q, reduction, temperature, deterministic, "kl")
    if beta == 1:
        if not isinstance(p, SparseLogits) and not isinstance(q, SparseLogits):
            _check_pair("js", p, q)
        return _divergence("js", q, p, reduction, temperature, deterministic, "kl")
    return _divergence(
        "js", p, q, reduction, temperature, deterministic, "js" if beta == 0.5 else Divergence("weighted_js", beta)
    )


def tv(
    p: Logits, q: Logits, *, temperature: float = 1.0, reduction: str = "none", deterministic: bool = False
) -> Tensor:
    """Return the total variation distance of each row, from logits.

    Equals `(p.softmax(-1) - q.softmax(-1)).abs().sum(-1) / 2`.

    Args:
        p, q: logits (..., classes) of one shape, each dense or LazyLogits; one may be SparseLogits, as for `ll.kl`.
        temperature: what both logits are divided by, above 0.
        reduction: "none", "mean" (over the rows) or "sum": a scalar of LazyLogits takes a product less to train.
        deterministic: have a row's bits whatever other rows there are, on every machine; see docs/numerics.md.

    Returns:
        (...), or a scalar, between 0 and 1, float32 (float64 if either is); symmetric, and differentiable in both: a
        class in which both have the same probability has the slope 0 of the absolute value there, as in torch.

    Raises:
        ValueError: the shapes differ.

    Source: Levin and Peres, Markov Chains and Mixing Times, chapter 4; arXiv:2307.15190 for distillation. In training
    it is bounded and robust, with a gradient that does not grow with how wrong a class is.

    >>> import torch, logitless as ll
    >>> ll.tv(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([0.4621])
    """
    return _divergence("tv", p, q, reduction, temperature, deterministic, Divergence("total_variation"))


def _divergence(
    name: str,
    p: Logits,
    q: Logits,
    reduction: str,
    temperature: float,
    deterministic: bool,
    asked: str | Divergence,
) -> Tensor:
    """Return a divergence: one of the kernels' own names, or another."""
    reduction, scale = resolve_reduction(reduction, None, None), _inverse(name, temperature)
    if isinstance(p, SparseLogits) or isinstance(q, SparseLogits):
        if deterministic:
            raise RuntimeError(
                f"{name}: deterministic=True cannot be kept: torch's operations serve SparseLogits, and promise no "
                "order of their sums"
            )
        function = pair_function((asked,)) if isinstance(asked, str) else pair_function(("divergence",), asked)
        return _reduced(sparse.divergence(name, _of_two(function), p, q, scale), reduction)
    check_input(name, p, q)
    check_real(name, q=q)
    _check_pair(name, p, q)
    if isinstance(asked, Divergence):
        return _pair(name, ("divergence",), p, q, None, reduction, asked, scale, deterministic)[0]
    return _pair(name, (asked,), p, q, None, reduction, None, scale, deterministic)[0]


def _of_two(function: PairFunction) -> definitions.PairMeasure:
    """Return a measure without a target."""

    def measure(p: Tensor, q: Tensor) -> Tensor:
        (value,) = function(p, q, None)
        assert value is not None
        return value

    return measure


def _inverse(name: str, temperature: float) -> float:
    """Return what logits are multiplied by."""
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(
            f"{name}: temperature must be a number, not {type(temperature).__name__}; logits / temperature takes one"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name}: expected a finite temperature above 0, got {temperature}")
    return 1.0 / temperature


def _scaled(logits: Tensor | LazyLogits, scale: float) -> tuple[Tensor | LazyLogits, float]:
    """Return lazy logits scaled; of others what is left to do, a tile at a time."""
    if scale == 1.0 or not isinstance(logits, HeadLogits):
        return logits, scale
    return logits.scaled(scale), 1.0


def _share(name: str, keyword: str, share: float, *, most: str) -> float:
    """Return a number of 0 to 1 that says what p has of a mixture; `most` says whether 1 is one."""
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise TypeError(f"{name}: {keyword} must be a number, not {type(share).__name__}")
    if not (0 <= share < 1 or (most == "included" and share == 1)):
        raise ValueError(f"{name}: expected 0 <= {keyword} {'<=' if most == 'included' else '<'} 1, got {share}")
    return float(share)


def _reduced(rows: Tensor, reduction: str) -> Tensor:
    denominator = torch.sym_float(rows.numel()) if reduction == "mean" else 1.0
    return reduce_rows(rows, reduction, denominator=denominator, dtype=rows.dtype)


def _check_pair(name: str, p: Tensor | LazyLogits, q: Tensor | LazyLogits) -> None:
    if p.shape != q.shape or p.dim() < 1:
        raise ValueError(
            f"{name}: expected p and q of one shape (..., classes), got {tuple(p.shape)} and {tuple(q.shape)}"
        )


def _pair(
    name: str,
    outputs: tuple[str, ...],
    p: Tensor | LazyLogits,
    q: Tensor | LazyLogits,
    target: ClassTarget | None,
    reduction: str = "none",
    divergence: Divergence | None = None,
    scale: float = 1.0,
    deterministic: bool = False,
) -> Sequence[Tensor]:
    """Return measures of two rows and a target, by whichever backend serves the call.

    With a reduction there is one output.
    """
    (p, _), (q, _) = _scaled(_computed(p), scale), _scaled(_computed(q), scale)

    def definition(p: Tensor | LazyLogits, q: Tensor | LazyLogits) -> tuple[Tensor, ...]:
        checked = None if target is None else checked_values(name, target)
        return _folded_pair(pair_function(outputs, divergence), p, q, checked, scale)

    given = [_given(p, scale), _given(q, scale)]
    tensors = [tensor for each in given for tensor in _parts(each)]
    if target is not None:
        tensors.append(target.indices)
    plan = None
    if not all(isinstance(each, Tensor) for each in given):
        sources = [dense_rows(each) if isinstance(each, Tensor) else each for each in given]
        wide = head_measures.wide_dtype(p, q)
        plan = head_measures.pair_plan(name, sources, wide, outputs, target, divergence, reduction)
    obstacle = _kernel_obstacle(p, q if plan is None else None)
    if obstacle is None and divergence is not None and divergence.weight < _LEAST_WEIGHT:
        obstacle = f"p weighs less than {_LEAST_WEIGHT} in the mixture"
    backend = _picked(name, tensors, obstacle, plan, _factors(deterministic, *given))
    rows: Sequence[Tensor]
    if backend.PLAIN:
        rows = definition(p, q)
    elif plan is None:
        assert isinstance(p, Tensor)
        assert isinstance(q, Tensor)
        call = dense_measures.PairCall(backend, name, outputs, target, divergence, definition)
        rows = dense_measures.pair_stats(p, q, call)
    elif torch.compiler.is_compiling():
        rows = head_measures.in_graph(backend, name, outputs, p, q, target, divergence, scale)
    elif reduction == "none":
        return head_measures.rows(plan(backend), p.shape[:-1])
    else:
        return [head_measures.result(plan(backend), p.shape[:-1], reduction)]
    return rows if reduction == "none" else [_reduced(rows[0], reduction)]


def _kernel_obstacle(logits: Tensor | LazyLogits, other: Tensor | LazyLogits | None = None) -> str | None:
    """Return what about this call the compiled kernels do not do, if anything."""
    if count_of(logits.shape) == 0:
        return "there is nothing to compute"
    if other is not None and other.dtype != logits.dtype:
        return f"p and q differ in dtype ({logits.dtype}, {other.dtype})"
    return None


# --- the definitions: float64, tile by tile


def _token_rows(logits: Tensor | LazyLogits, target: ClassTarget, scale: float, top_k: int) -> tuple[Tensor, ...]:
    rows, kept = head_measures.rows_of(logits, scale), None
    indices, ignored, impossible = (_flat(part) for part in (target.indices, target.ignored, target.impossible))
    if isinstance(rows, HeadRows):
        rows, kept = rows.without(ignored, selectable=impossible is None)
    if kept is not None and indices is not None:
        indices, ignored = indices[kept], None
    exact = _is_exact(logits)

    def function(tile: Tensor, *parts: Tensor | None) -> tuple[Tensor, ...]:
        row_target = ClassTarget(1, target.classes, target.ignore_index, *parts)
        stats = definitions.token_stats(tile.double(), row_target, top_k)
        return tuple(_rounded(value, exact) for value in stats)

    shape = logits.shape[:-1]
    stats = fold_rows(function, [rows], [indices, ignored, impossible])
    return tuple(
        at_positions(value, kept, count_of(shape), 0 if value.is_floating_point() else -1).view(
            (*shape, *value.shape[1:])
        )
        for value in stats
    )


def _entropy_rows(logits: Tensor | LazyLogits, scale: float = 1.0) -> tuple[Tensor, ...]:
    exact = _is_exact(logits)

    def function(tile: Tensor) -> tuple[Tensor, ...]:
        return (_rounded(definitions.entropy(tile.double(), -1), exact),)

    return tuple(value.view(logits.shape[:-1]) for value in fold_rows(function, [head_measures.rows_of(logits, scale)]))


def _folded_pair(
    function: PairFunction,
    p: Tensor | LazyLogits,
    q: Tensor | LazyLogits,
    target: ClassTarget | None,
    scale: float,
) -> tuple[Tensor, ...]:
    parts = (None, None, None) if target is None else (target.indices, target.ignored, target.impossible)
    exact = _is_exact(p, q)

    def rounded(tile_p: Tensor, tile_q: Tensor, *tile_parts: Tensor | None) -> tuple[Tensor, ...]:
        row_target = None if target is None else ClassTarget(1, target.classes, target.ignore_index, *tile_parts)
        stats = function(tile_p.double(), tile_q.double(), row_target)
        return tuple(_rounded(value, exact) for value in stats if value is not None)

    sources = [head_measures.rows_of(p, scale), head_measures.rows_of(q, scale)]
    stats = fold_rows(rounded, sources, [_flat(part) for part in parts])
    return tuple(value.view(p.shape[:-1]) for value in stats)


def _computed(logits: Tensor | LazyLogits) -> Tensor | LazyLogits:
    """Return lazy log-probabilities as the tensor they stand for; lazy logits stay."""
    return logits if isinstance(logits, HeadLogits) else as_tensor(logits, "a measure")


def _picked(
    name: str,
    tensors: Sequence[Tensor | None],
    obstacle: str | None,
    plan: head_measures.Plan | None = None,
    factors: Sequence[Tensor | None] | None = None,
) -> Backend:
    """Return the backend; `plan` is what a call on logits that are not built will do, `factors` as `_factors` says."""
    foreseen = None if plan is None else lambda backend: forecast(plan(backend))
    return dispatch.pick(name, tensors, obstacle=obstacle, forecast=foreseen, compiles=True, deterministic=factors)


def _factors(deterministic: bool, *given: LogitRows | Tensor) -> Sequence[Tensor | None] | None:
    """Return what the products are made of whose order of sums is asked for; None where it is not."""
    if not deterministic:
        return None
    return [factor for rows in given if isinstance(rows, HeadRows) for factor in rows.tensors[:2]]


def _given(logits: Tensor | LazyLogits, scale: float = 1.0) -> LogitRows | Tensor:
    """Return what a call has of its logits: asked once, as each asking looks whether the head was written to.

    Rows, where they are to be made or scaled tile by tile.
    """
    if isinstance(logits, HeadLogits):
        return logits.rows()
    return logits if scale == 1.0 else dense_rows(logits, scale)


def _parts(given: LogitRows | Tensor) -> Sequence[Tensor | None]:
    return (given,) if isinstance(given, Tensor) else given.tensors


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1)


def _is_exact(*logits: Tensor | LazyLogits) -> bool:
    """Say whether what is made of these logits stays in float64."""
    return any(given.dtype == torch.float64 for given in logits)


def _rounded(value: Tensor, exact: bool) -> Tensor:
    """Round once from float64 to what the caller gets; integers and booleans stay."""
    return value if exact or not value.dtype.is_floating_point else value.float()
