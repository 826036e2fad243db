"""What torch lacks: per-row measures of one distribution or of two, each given by its logits, dense or lazy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from logitless import _dispatch, _head_measures, _library_head_measures, _ops_measures, sparse
from logitless._head_ops import HeadCall, forecast
from logitless._precision import check_input
from logitless._proxy import TensorProxy
from logitless._reduce import reduce_rows, resolve_reduction
from logitless._targets import ClassTarget, checked_values, class_target
from logitless._tiles import LogitRows, at_positions, dense_rows, fold_rows
from logitless.kernels import reference
from logitless.lazy import HeadRows, LazyLogits
from logitless.sparse import SparseLogits


class TokenStats(NamedTuple):
    """One number a row: what one distribution says of one target."""

    nll: Tensor
    lse: Tensor
    entropy: Tensor
    argmax: Tensor
    rank: Tensor


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


def token_stats(logits: Tensor | LazyLogits, target: Tensor, *, ignore_index: int = -100) -> TokenStats:
    """Return each row's negative log-likelihood, log-sum-exp, entropy, top class and the target's rank.

    Equals, for dense `z`: `nll = F.cross_entropy(z, target, reduction="none")`, `lse = z.logsumexp(-1)`,
    `entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)`, `argmax = z.argmax(-1)` and
    `rank = (z > z.gather(-1, target[..., None])).sum(-1)`, with LazyLogits in O(rows) and one tile of memory.

    Args:
        logits: (..., classes), floating, or LazyLogits.
        target: class indices (...), any integer dtype.
        ignore_index: rows with this index are never read: their nll, lse and entropy are 0 with no gradient, their
            argmax and rank -1.

    Returns:
        TokenStats of the target's shape: nll, lse and entropy in nats, float32 (float64 for float64 logits) and
        differentiable with any upstream gradients; argmax and rank int64, rank 0 being the top class.

    Raises:
        IndexError: a target is not a class. ValueError, RuntimeError, TypeError: shapes and dtypes.

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
    logits = _computed(logits)
    if isinstance(logits, LazyLogits):
        return _lazy_token_stats(logits, meaning)

    def definition(z: Tensor) -> tuple[Tensor, ...]:
        return _token_rows(z, checked_values("token_stats", meaning))

    if _dispatch.pick("token_stats", (logits, target), obstacle=_kernel_obstacle(logits), compiles=True) == "cpu":
        return TokenStats(*_ops_measures.token_stats(logits, meaning, definition))
    return TokenStats(*definition(logits))


def _lazy_token_stats(logits: LazyLogits, meaning: ClassTarget) -> TokenStats:
    shape, tensors = logits.shape[:-1], (*logits.rows().tensors, meaning.indices)
    obstacle = _kernel_obstacle(logits)
    if torch.compiler.is_compiling():
        if _picked("token_stats", tensors, obstacle) == "cpu":
            return TokenStats(*_in_graph("token_stats", TokenStats._fields, logits, target=meaning))
        return TokenStats(*_token_rows(logits, checked_values("token_stats", meaning)))
    meaning = checked_values("token_stats", meaning)
    plan = functools.partial(_head_measures.token_call, logits, meaning)
    if _picked("token_stats", tensors, obstacle, lambda: plan()[0]) == "reference":
        return TokenStats(*_token_rows(logits, meaning))
    return TokenStats(*_head_measures.token_stats(*plan(), shape))


def _in_graph(
    name: str,
    outputs: Sequence[str],
    p: Tensor | LazyLogits,
    q: Tensor | LazyLogits | None = None,
    target: ClassTarget | None = None,
) -> list[Tensor]:
    """Return measures of logits that are not built, one value a row, by an operator of a compiled graph."""
    values = _library_head_measures.rows(_library_head_measures.Measures.of(name, outputs, p, q, target))
    return [value.view(p.shape[:-1]) for value in values]


def pair_stats(p: Tensor | LazyLogits, q: Tensor | LazyLogits, target: Tensor | None = None) -> PairStats:
    """Return each row's divergences between two distributions, their entropies, and whether their tops agree.

    Equals, with `P = p.softmax(-1)` and `Q = q.softmax(-1)`: `kl = (P * (P / Q).log()).sum(-1)`,
    `reverse_kl = (Q * (Q / P).log()).sum(-1)`, `js = (KL(P, M) + KL(Q, M)) / 2` with `M = (P + Q) / 2`,
    `cross_entropy = -(P * Q.log()).sum(-1) = entropy_p + kl`, `same_top = p.argmax(-1) == q.argmax(-1)`.

    Args:
        p, q: logits (..., classes) of one shape, each dense or LazyLogits (of any hidden width).
        target: class indices (...) for nll_p and nll_q, or None.

    Returns:
        PairStats of shape (...), in nats, float32 (float64 if either is), differentiable but for same_top. A
        divergence is a sum of terms that are not negative: it never is, is 0 for equal rows, and is right to a few
        relative roundings when it is 1e-10. It is infinite where P > 0 and Q = 0.

    Raises:
        ValueError: the shapes differ. IndexError: a target is not a class.

    Source: Kullback and Leibler (1951); Lin (1991). In training, `kl` with p fixed makes q cover all of p (forward,
    as distillation); `reverse_kl` makes q settle on a mode of p; `js` lies between and is bounded by log 2.

    >>> import torch, logitless as ll
    >>> stats = ll.pair_stats(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    >>> stats.kl, stats.js, stats.same_top
    (tensor([0.4621]), tensor([0.1109]), tensor([False]))
    """
    check_input("pair_stats", p, q)
    _check_pair("pair_stats", p, q)
    meaning = None
    if target is not None:
        meaning = class_target(
            "pair_stats", p.shape, target, ignore_index=-100, class_dim=-1, probabilities_allowed=False
        )
    outputs = PairStats._fields if target is not None else PairStats._fields[:-2]
    stats = _pair("pair_stats", outputs, p, q, meaning)
    return PairStats(*stats, *([None, None] if target is None else []))


def entropy(logits: Tensor | LazyLogits, *, reduction: str = "none") -> Tensor:
    """Return the entropy of each row's distribution.

    Equals `torch.distributions.Categorical(logits=logits).entropy()`.

    Args:
        logits: (..., classes), floating, or LazyLogits.
        reduction: "none", "mean" (over the rows) or "sum": a scalar of LazyLogits takes a product less to train.

    Returns:
        (...), or a scalar, in nats, float32 (float64 for float64 logits): 0 for a certain outcome, log(classes) for a
        flat row. A -inf logit counts for nothing, in value and gradient.

    Raises:
        TypeError, NotImplementedError, ValueError: not floating logits of one or more dimensions.

    Source: Shannon (1948). In training, adding it to the loss makes predictions confident, subtracting it flat.

    >>> import torch, logitless as ll
    >>> ll.entropy(torch.zeros(2, 4))
    tensor([1.3863, 1.3863])
    """
    check_input("entropy", logits, logits)
    if logits.dim() < 1:
        raise ValueError("entropy: expected logits (..., classes), got a 0-d tensor")
    reduction = resolve_reduction(reduction, None, None)
    logits = _computed(logits)
    obstacle = _kernel_obstacle(logits)
    if isinstance(logits, LazyLogits):
        plan = functools.partial(_head_measures.entropy_call, logits)
        if _picked("entropy", _parts(logits), obstacle, plan) == "cpu":
            if torch.compiler.is_compiling():
                return _reduced(_in_graph("entropy", ["entropy"], logits)[0], reduction)
            return _head_measures.result(plan(), logits.shape[:-1], reduction)
        return _reduced(_entropy_rows(logits)[0], reduction)
    if _picked("entropy", _parts(logits), obstacle) == "cpu":
        return _reduced(_ops_measures.entropy(logits, _entropy_rows), reduction)
    return _reduced(_entropy_rows(logits)[0], reduction)


def kl(p: Tensor | LazyLogits | SparseLogits, q: Tensor | LazyLogits, *, reduction: str = "none") -> Tensor:
    """Return the Kullback-Leibler divergence KL(p || q) of each row, from logits.

    Equals `(p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)`: p is the true distribution.

    Args:
        p, q: logits (..., classes) of one shape, each dense or LazyLogits; p may be SparseLogits, a top-k teacher with
            no gradient, over whose k + 1 buckets the divergence then is (a lower bound of the full one).
        reduction: "none", "mean" (over the rows) or "sum": a scalar of LazyLogits takes a product less to train.

    Returns:
        (...), or a scalar, in nats, float32 (float64 if either is); differentiable in both; never negative, 0 for
        equal rows.

    Raises:
        ValueError: the shapes differ.

    Source: Kullback and Leibler (1951). In training with p fixed it is distillation: q learns to cover all of p.

    >>> import torch, logitless as ll
    >>> ll.kl(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([0.4621])
    """
    if isinstance(p, SparseLogits):
        return _reduced(sparse.kl(p, q), resolve_reduction(reduction, None, None))
    return _divergence("kl", p, q, reduction)


def js(p: Tensor | LazyLogits, q: Tensor | LazyLogits, *, reduction: str = "none") -> Tensor:
    """Return the Jensen-Shannon divergence of each row, from logits.

    Equals `(kl(p, m) + kl(q, m)) / 2` with `m = ((p.softmax(-1) + q.softmax(-1)) / 2).log()`.

    Args:
        p, q: logits (..., classes) of one shape, each dense or LazyLogits.
        reduction: "none", "mean" (over the rows) or "sum": a scalar of LazyLogits takes a product less to train.

    Returns:
        (...), or a scalar, in nats, float32 (float64 if either is); differentiable in both; between 0 and log 2,
        symmetric.

    Raises:
        ValueError: the shapes differ.

    Source: Lin (1991). In training it lies between covering all of p and settling on a mode of it.

    >>> import torch, logitless as ll
    >>> ll.js(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([0.1109])
    """
    return _divergence("js", p, q, reduction)


def _divergence(name: str, p: Tensor | LazyLogits, q: Tensor | LazyLogits, reduction: str) -> Tensor:
    reduction = resolve_reduction(reduction, None, None)
    check_input(name, p, q)
    _check_pair(name, p, q)

    return _pair(name, (name,), p, q, None, reduction)[0]


def _reduced(rows: Tensor, reduction: str) -> Tensor:
    denominator = float(rows.numel()) if reduction == "mean" else 1.0
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
) -> Sequence[Tensor]:
    """Return measures of two rows and a target, by whichever backend serves the call.

    With a reduction there is one output.
    """
    p, q = _computed(p), _computed(q)

    def definition(p: Tensor | LazyLogits, q: Tensor | LazyLogits) -> tuple[Tensor, ...]:
        checked = None if target is None else checked_values(name, target)
        return _folded_pair(_head_measures.pair_function(outputs), p, q, checked)

    tensors = [tensor for logits in (p, q) for tensor in _parts(logits)]
    if target is not None:
        tensors.append(target.indices)
    rows: Sequence[Tensor]
    if isinstance(p, LazyLogits) or isinstance(q, LazyLogits):
        plan = functools.partial(_head_measures.pair_call, p, q, outputs, target)
        if _picked(name, tensors, _kernel_obstacle(p), plan) == "cpu":
            if torch.compiler.is_compiling():
                rows = _in_graph(name, outputs, p, q, target)
                return rows if reduction == "none" else [_reduced(rows[0], reduction)]
            if target is not None:
                checked_values(name, target)
            if reduction != "none":
                return [_head_measures.result(plan(), p.shape[:-1], reduction)]
            return _head_measures.rows(plan(), p.shape[:-1])
        rows = definition(p, q)
    elif _picked(name, tensors, _kernel_obstacle(p, q)) == "cpu":
        rows = _ops_measures.pair_stats(p, q, _ops_measures.PairCall(name, outputs, target, definition))
    else:
        rows = definition(p, q)
    return rows if reduction == "none" else [_reduced(rows[0], reduction)]


def _kernel_obstacle(logits: Tensor | LazyLogits, other: Tensor | LazyLogits | None = None) -> str | None:
    """Return what about this call the compiled kernels do not do, if anything."""
    if logits.numel() == 0:
        return "there is nothing to compute"
    if other is not None and other.dtype != logits.dtype:
        return f"p and q differ in dtype ({logits.dtype}, {other.dtype})"
    return None


# --- the definitions: float64, tile by tile


def _token_rows(logits: Tensor | LazyLogits, target: ClassTarget) -> tuple[Tensor, ...]:
    rows, kept = _rows(logits), None
    indices, ignored, impossible = (_flat(part) for part in (target.indices, target.ignored, target.impossible))
    if isinstance(rows, HeadRows):
        rows, kept = rows.without(ignored, selectable=impossible is None)
    if kept is not None and indices is not None:
        indices, ignored = indices[kept], None

    def function(tile: Tensor, *parts: Tensor | None) -> tuple[Tensor, ...]:
        row_target = ClassTarget(1, target.classes, target.ignore_index, *parts)
        stats = reference.token_stats(tile.double(), row_target)
        return tuple(_rounded(value, logits) for value in stats)

    shape = logits.shape[:-1]
    stats = fold_rows(function, [rows], [indices, ignored, impossible])
    return tuple(
        at_positions(value, kept, shape.numel(), fill).view(shape)
        for value, fill in zip(stats, (0, 0, 0, -1, -1), strict=True)
    )


def _entropy_rows(logits: Tensor | LazyLogits) -> tuple[Tensor, ...]:
    def function(tile: Tensor) -> tuple[Tensor, ...]:
        return (_rounded(reference.entropy(tile.double(), -1), logits),)

    return tuple(value.view(logits.shape[:-1]) for value in fold_rows(function, [_rows(logits)]))


def _folded_pair(
    function: _head_measures.PairFunction,
    p: Tensor | LazyLogits,
    q: Tensor | LazyLogits,
    target: ClassTarget | None,
) -> tuple[Tensor, ...]:
    parts = (None, None, None) if target is None else (target.indices, target.ignored, target.impossible)

    def rounded(tile_p: Tensor, tile_q: Tensor, *tile_parts: Tensor | None) -> tuple[Tensor, ...]:
        row_target = None if target is None else ClassTarget(1, target.classes, target.ignore_index, *tile_parts)
        stats = function(tile_p.double(), tile_q.double(), row_target)
        return tuple(_rounded(value, p, q) for value in stats if value is not None)

    stats = fold_rows(rounded, [_rows(p), _rows(q)], [_flat(part) for part in parts])
    return tuple(value.view(p.shape[:-1]) for value in stats)


def _computed(logits: Tensor | LazyLogits) -> Tensor | LazyLogits:
    """Return lazy log-probabilities as the tensor they stand for; lazy logits stay."""
    if isinstance(logits, TensorProxy) and not isinstance(logits, LazyLogits):
        return logits._dense("a measure")
    return logits


def _picked(
    name: str,
    tensors: Sequence[Tensor | None],
    obstacle: str | None,
    plan: Callable[[], HeadCall] | None = None,
) -> str:
    """Return the backend; `plan` is what a call on logits that are not built will do."""
    foreseen = None if plan is None else lambda: forecast(plan())
    return _dispatch.pick(name, tensors, obstacle=obstacle, forecast=foreseen, compiles=True)


def _parts(logits: Tensor | LazyLogits) -> tuple[Tensor | None, ...]:
    return logits.rows().tensors if isinstance(logits, LazyLogits) else (logits,)


def _rows(logits: Tensor | LazyLogits) -> LogitRows:
    return logits.rows() if isinstance(logits, LazyLogits) else dense_rows(logits)


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1)


def _rounded(value: Tensor, *logits: Tensor | LazyLogits) -> Tensor:
    """Round once from float64 to what the caller gets; integers and booleans stay."""
    if not value.dtype.is_floating_point or any(given.dtype == torch.float64 for given in logits):
        return value
    return value.float()
