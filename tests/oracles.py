"""Truths in float64, written apart from the package, and the rules by which a result is judged.

A truth is the textbook formula on float64 copies of the inputs; autograd differentiates it. Nothing here imports
logitless. A candidate is judged by how much further from the truth it is than the naive formula computed in the
candidate's own dtype; the slack is a number of units in the last place of the truth's own norm.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Allowed beyond the naive formula's own error, in machine epsilons of the result's dtype times the truth's norm.
# float64 is its own truth: the slack covers what both lose where numbers of order 10 cancel. A half is rounded once.
SLACK = {torch.float64: 256.0, torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0}


class RejectedError(AssertionError):
    """A check found a result wrong."""


def _norms(x: Tensor) -> tuple[float, float]:
    if x.numel() == 0:
        return 0.0, 0.0
    return float(x.norm()), float(x.abs().max())


def assert_no_worse(
    candidate: Tensor,
    truth: Tensor,
    naive: Tensor | None = None,
    what: str = "result",
    nudged: Tensor | None = None,
    floor: float = 0.0,
) -> None:
    """The candidate is as near to the float64 truth as the naive formula in its dtype, plus a slack in its last place.

    Judged in the 2-norm and in the largest entry. Where the truth, rounded to the candidate's dtype, is infinite or
    NaN the candidate must be exactly that. `nudged` is the truth of inputs moved by half a unit in their last place:
    twice what that changes is allowed too, for results that cancel (logits of 200 have a rounding error of 1e-5
    in float32). `floor` is the size of the terms whose exact sum is 0.
    """
    if candidate.shape != truth.shape:
        raise RejectedError(f"{what}: shape {tuple(candidate.shape)}, expected {tuple(truth.shape)}")
    got, true = candidate.detach().double(), truth.detach().double()
    # A half beyond the largest finite one is infinite for a single rounding too.
    rounded = true.to(candidate.dtype).double()
    odd = ~rounded.isfinite()
    if not torch.equal(got[odd].nan_to_num(nan=math.e), rounded[odd].nan_to_num(nan=math.e)):
        raise RejectedError(f"{what}: {got[odd].tolist()[:8]} where the truth is {rounded[odd].tolist()[:8]}")
    got, true = got[~odd], true[~odd]
    if not bool(got.isfinite().all()):
        raise RejectedError(f"{what}: {int((~got.isfinite()).sum())} entries not finite where the truth is")
    allowed = [SLACK[candidate.dtype] * torch.finfo(candidate.dtype).eps * max(size, floor) for size in _norms(true)]
    if nudged is not None:
        moved = (nudged.detach().double()[~odd] - true).nan_to_num()
        allowed = [a + 2 * m for a, m in zip(allowed, _norms(moved), strict=True)]
    if naive is not None:
        other = naive.detach().double()[~odd]
        if bool(other.isfinite().all()):
            allowed = [a + e for a, e in zip(allowed, _norms(other - true), strict=True)]
    errors = _norms(got - true)
    for name, error, limit, size in zip(("2-norm", "largest"), errors, allowed, _norms(true), strict=True):
        if error > limit:
            raise RejectedError(
                f"{what}: {name} error {error:.3e} above {limit:.3e} (truth's {name} {size:.3e}, {candidate.dtype})"
            )


def nudge(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 tensor with each number moved, up or down, by half a unit in the last place of `dtype`."""
    generator = torch.Generator().manual_seed(tensor.numel())
    signs = torch.randint(0, 2, tensor.shape, generator=generator).to(torch.float64) * 2 - 1
    units = 16.0 if dtype == torch.float64 else 0.5  # a float64 truth is rounded at each of its own steps
    return tensor * (1 + signs * torch.finfo(dtype).eps * units)


def assert_exactly_zero(x: Tensor, what: str) -> None:
    if bool((x != 0).any()) or bool(x.isnan().any()):
        raise RejectedError(f"{what}: expected exactly 0, got {x[(x != 0) | x.isnan()].flatten()[:4].tolist()}")


# ---------------------------------------------------------------------------------------------- torch's losses


def _class_last(x: Tensor) -> Tensor:
    return x.movedim(1 if x.dim() > 1 else 0, -1)


def _product(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value with 0 * anything = 0, in value and gradient."""
    kept = factor != 0
    return torch.where(kept, factor * torch.where(kept, value, torch.zeros_like(value)), torch.zeros_like(value))


def _reduce(loss: Tensor, reduction: str, count: Tensor | float) -> Tensor:
    return {"none": lambda: loss, "sum": lambda: loss.sum(), "mean": lambda: loss.sum() / count}[reduction]()


def nll_loss(
    log_probs: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    rows = _class_last(log_probs)
    classes = rows.shape[-1]
    flat, index = rows.reshape(-1, classes), target.reshape(-1).long()
    valid = (index != ignore_index).nonzero().flatten()
    kept, chosen = flat[valid], index[valid]
    weight = torch.ones(classes, dtype=flat.dtype) if weight is None else weight
    loss = -kept.gather(1, chosen[:, None])[:, 0] * weight[chosen]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing / classes * (kept * weight).sum(1)
    loss = torch.zeros_like(flat[:, 0]).index_put((valid,), loss) if flat.shape[0] else flat.sum(1)
    return _reduce(loss.reshape(target.shape), reduction, weight[chosen].sum())


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    rows = _class_last(logits)
    if not target.is_floating_point():
        flat, index = rows.reshape(-1, rows.shape[-1]), target.reshape(-1)
        valid = (index != ignore_index).nonzero().flatten()
        log_probs = torch.zeros_like(flat).index_put((valid,), flat[valid].log_softmax(1)).reshape(rows.shape)
        log_probs = log_probs.movedim(-1, 1 if logits.dim() > 1 else 0)
        return nll_loss(log_probs, target, weight, ignore_index, reduction, label_smoothing)
    classes = rows.shape[-1]
    soft = _class_last(target) * (1 - label_smoothing) + label_smoothing / classes
    if weight is not None:
        soft = soft * weight
    loss = -_product(soft, rows.log_softmax(-1)).sum(-1)
    return _reduce(loss, reduction, loss.numel())


def kl_div(log_input: Tensor, target: Tensor, reduction: str = "mean", log_target: bool = False) -> Tensor:
    if log_target:
        loss = _product(target.exp(), target - log_input)
    else:
        loss = torch.special.xlogy(target, target) - _product(target, log_input)
    if reduction == "batchmean":
        return loss.sum() / log_input.shape[0]
    return _reduce(loss, reduction, loss.numel())


def binary_cross_entropy(
    probability: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    log_p, log_not_p = probability.log().clamp_min(-100), torch.log1p(-probability).clamp_min(-100)
    loss = -(target * log_p + (1 - target) * log_not_p)
    if weight is not None:
        loss = loss * weight
    return _reduce(loss, reduction, loss.numel())


def binary_cross_entropy_with_logits(
    logit: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    positive = target if pos_weight is None else target * pos_weight
    loss = -(positive * _log_sigmoid(logit) + (1 - target) * _log_sigmoid(-logit))
    if weight is not None:
        loss = loss * weight
    return _reduce(loss, reduction, loss.numel())


def _log_sigmoid(x: Tensor) -> Tensor:
    return -torch.logaddexp(torch.zeros_like(x), -x)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    x1, x2 = torch.broadcast_tensors(x1, x2)
    norm1, norm2 = (x.square().sum(dim).sqrt().clamp_min(eps) for x in (x1, x2))
    return (x1 * x2).sum(dim) / (norm1 * norm2)


def cosine_embedding_loss(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0.0, reduction: str = "mean"
) -> Tensor:
    square1, square2 = ((x * x).sum(-1) + 1e-12 for x in (input1, input2))
    cosine = (input1 * input2).sum(-1) / (square1 * square2).sqrt()
    zero = torch.zeros_like(cosine)
    loss = torch.where(target == 1, 1 - cosine, zero) + torch.where(target == -1, (cosine - margin).clamp_min(0), zero)
    return _reduce(loss, reduction, loss.numel())


# ------------------------------------------------------------------------------------------------ the measures


def linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -_product(log_p.exp(), log_p).sum(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    log_p = p.log_softmax(-1)
    return _product(log_p.exp(), log_p - q.log_softmax(-1)).sum(-1)


def js(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (_product(log_p.exp(), log_p - log_m) + _product(log_q.exp(), log_q - log_m)).sum(-1)


def token_stats(logits: Tensor, target: Tensor, ignore_index: int = -100) -> dict[str, Tensor]:
    flat, index = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    valid = (index != ignore_index).nonzero().flatten()
    kept, chosen = flat[valid], index[valid]
    picked = kept.gather(1, chosen[:, None])
    found = {
        "nll": -kept.log_softmax(1).gather(1, chosen[:, None])[:, 0],  # lse - z loses all of it at 1e30
        "lse": kept.logsumexp(1),
        "entropy": entropy(kept),
        "argmax": kept.argmax(1),
        "rank": (kept > picked).sum(1),
    }
    out = {}
    for name, values in found.items():
        missing = -1 if name in ("argmax", "rank") else 0
        whole = torch.full((flat.shape[0],), missing, dtype=values.dtype)
        out[name] = whole.index_put((valid,), values).reshape(target.shape)
    return out


def pair_stats(p: Tensor, q: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
    out = {
        "kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "js": js(p, q),
        "cross_entropy": entropy(p) + kl(p, q),
        "entropy_p": entropy(p),
        "entropy_q": entropy(q),
        "same_top": p.argmax(-1) == q.argmax(-1),
    }
    if target is not None:
        for name, z in (("nll_p", p), ("nll_q", q)):
            out[name] = -z.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    return out


# ------------------------------------------------------------------------------------------------ the examiner


def leaves(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Fresh leaves that ask for gradients, with the same strides where the dtype stays."""
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def value_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor],
    upstream: Callable[[int, Tensor], Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of `function(*tensors)`, and the gradient of each tensor under the given upstream gradients."""
    out = function(*tensors)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    asked = [o for o in outputs if o.requires_grad]
    grads = torch.autograd.grad(asked, list(tensors), [upstream(i, o) for i, o in enumerate(asked)], allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, grads, strict=True)]
    return outputs, filled


def seeded_upstream(seed: int, scale: float = 1.0) -> Callable[[int, Tensor], Tensor]:
    """Non-unit upstream gradients of both signs, the same numbers in every dtype."""

    def draw(position: int, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed + position)
        numbers = torch.randn(output.shape, generator=generator, dtype=torch.float64) * 3 + 0.25
        return (numbers * scale).to(torch.bfloat16).to(output.dtype)  # exact in every dtype that is tested

    return draw


def examine(
    candidate: Callable[..., Any],
    truth: Callable[..., Any],
    tensors: Sequence[Tensor],
    *,
    seed: int = 5,
    scale: float = 1.0,
    what: str = "",
    floor: float = 0.0,
) -> None:
    """Values and gradients of `candidate` against `truth` in float64, and against the same formula in its own dtype.

    Also: nothing is written to, and the gradients come out the same twice through one graph.
    """
    dtype = tensors[0].dtype
    own = leaves(tensors)
    before = [(t._version, t.detach().clone()) for t in own]
    out = candidate(*own)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    upstream = seeded_upstream(seed, scale)
    asked = [o for o in outputs if o.requires_grad]
    if not asked:
        raise RejectedError(f"{what}: no output asks for a gradient")
    cotangents = [upstream(i, o) for i, o in enumerate(asked)]
    grads = torch.autograd.grad(asked, own, cotangents, retain_graph=True, allow_unused=True)
    again = torch.autograd.grad(asked, own, cotangents, allow_unused=True)
    for i, (tensor, (version, content)) in enumerate(zip(own, before, strict=True)):
        if tensor._version != version or not torch.equal(
            tensor.detach().nan_to_num(nan=math.e), content.nan_to_num(nan=math.e)
        ):
            raise RejectedError(f"{what}: input {i} was written to")
    for i, (first, second) in enumerate(zip(grads, again, strict=True)):
        if (first is None) != (second is None) or (first is not None and not torch.equal(first, second)):
            raise RejectedError(f"{what}: gradient {i} differs on the second backward through one graph")

    true_values, true_grads = value_and_gradients(truth, leaves(tensors, torch.float64), upstream)
    moved = [nudge(t.detach().double(), torch.float64) for t in tensors]
    moved_values, moved_grads = value_and_gradients(truth, [t.requires_grad_() for t in moved], upstream)
    naive_values, naive_grads = true_values, true_grads
    if dtype != torch.float64:
        naive_values, naive_grads = value_and_gradients(truth, leaves(tensors), upstream)
    if len(outputs) != len(true_values):
        raise RejectedError(f"{what}: {len(outputs)} outputs, expected {len(true_values)}")
    for i, (got, true, *others) in enumerate(zip(outputs, true_values, naive_values, moved_values, strict=True)):
        if true.is_floating_point():
            assert_no_worse(got, true, others[0], f"{what} output {i}", others[1])
        elif not torch.equal(got.to(true.dtype), true):
            raise RejectedError(f"{what} output {i}: {got.tolist()[:8]}, expected {true.tolist()[:8]}")
    for i, (grad, true, *others) in enumerate(zip(grads, true_grads, naive_grads, moved_grads, strict=True)):
        if grad is None:
            raise RejectedError(f"{what}: no gradient for input {i}")
        if grad.dtype != dtype:
            raise RejectedError(f"{what}: gradient {i} is {grad.dtype}, expected {dtype}")
        assert_no_worse(grad, true, others[0], f"{what} gradient {i}", others[1], floor)
