"""The measures of dense logits by a backend's kernels, as differentiable operations; see `rows`.

An operation keeps its logits and O(rows). What it is asked for is all that is computed, and all that is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitless._heads.work import top_classes
from logitless._operators import pairs as pair_operators
from logitless._operators import rows as row_operators
from logitless._rules.derivatives import needs_plain_backward, plain_backward
from logitless._rules.keeping import put_together, taken_apart
from logitless._rules.targets import index_error
from logitless.kernels.interface import Backend, ClassTarget, Divergence

# The same measure in plain operations: what is differentiated where a gradient must be differentiated again.
Definition = Callable[..., Sequence[Tensor]]


def token_stats(
    backend: Backend, logits: Tensor, target: ClassTarget, definition: Definition, top_k: int
) -> tuple[Tensor, ...]:
    """Return nll, lse, entropy, argmax and rank of each row of logits whose classes come last.

    With a `top_k` also the log-probabilities and classes of the k largest.
    """
    if torch.compiler.is_compiling():
        rows = row_operators.row_stats(
            logits,
            target.indices,
            backend=backend,
            caller="token_stats",
            ignore_index=target.ignore_index,
            lse=True,
            entropy=True,
            argmax=True,
            rank=True,
        )
        values = [getattr(rows, name) for name in ("nll", "lse", "entropy", "argmax", "rank")]
        if top_k:
            values += top_classes(logits.detach(), top_k, rows, _ignored(target))
        return tuple(values)
    stats: tuple[Tensor, ...] = _TokenStats.apply(logits, backend, target, definition, top_k)  # type: ignore[no-untyped-call] # torch types it not
    return stats


def _ignored(target: ClassTarget) -> Tensor:
    assert target.indices is not None
    return target.indices == target.ignore_index


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, backend: Backend, target: ClassTarget, definition: Definition, top_k: int
    ) -> tuple[Tensor | None, ...]:
        stats = backend.row_stats(
            logits,
            target.indices,
            ignore_index=target.ignore_index,
            lse=True,
            entropy=True,
            argmax=True,
            rank=True,
        )
        if stats.bad_row >= 0:
            raise index_error("token_stats", target)
        if ctx.needs_input_grad[0]:
            needed = (backend, target, definition, stats.row_max, stats.log_sum)
            ctx.kept, others = taken_apart(needed, [logits, stats.entropy])
            ctx.save_for_backward(logits, stats.entropy, *others)
        ctx.set_materialize_grads(False)
        top: tuple[Tensor, ...] = ()
        if top_k:
            top = top_classes(logits, top_k, stats, _ignored(target))
        ctx.mark_non_differentiable(stats.argmax, stats.rank, *top)
        return stats.nll, stats.lse, stats.entropy, stats.argmax, stats.rank, *top

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        nll, lse, spread = grad_outputs[:3]
        asked = [grad for grad in (nll, lse, spread) if grad is not None]
        if not asked:
            return (None,) * 5
        logits, entropy, *_ = ctx.saved_tensors
        backend, target, definition, row_max, log_sum = put_together(ctx.kept, ctx.saved_tensors)
        if needs_plain_backward(*asked):
            return plain_backward(definition, [logits], [True], grad_outputs)[0], *(None,) * 4
        # dH/dz_j = -p_j ((z_j - lse) + H)
        parts = [*(g for g in (nll, lse) if g is not None), *(() if spread is None else (-spread * entropy,))]
        grad = backend.row_grad(
            logits,
            row_max,
            log_sum,
            target.indices,
            ignore_index=target.ignore_index,
            a_scale=1.0,
            a=sum(parts[1:], parts[0]),
            b_scale=0.0 if spread is None else -1.0,
            b=spread,
            c_scale=0.0 if nll is None else -1.0,
            c=nll,
        )
        return grad, *(None,) * 4


def entropy(backend: Backend, logits: Tensor, definition: Definition) -> Tensor:
    """Return the entropy of each row of logits whose classes come last."""
    if torch.compiler.is_compiling():
        rows = row_operators.row_stats(logits, backend=backend, caller="entropy", entropy=True).entropy
        assert rows is not None
        return rows
    value: Tensor = _Entropy.apply(logits, backend, definition)  # type: ignore[no-untyped-call] # torch types it not
    return value


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, backend: Backend, definition: Definition) -> Tensor | None:
        stats = backend.row_stats(logits, entropy=True)
        ctx.save_for_backward(logits, stats.entropy, stats.row_max, stats.log_sum)
        ctx.backend, ctx.definition = backend, definition
        return stats.entropy

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None]:
        logits, entropy, row_max, log_sum = ctx.saved_tensors
        if needs_plain_backward(grad_output):
            return plain_backward(ctx.definition, [logits], [True], [grad_output])[0], None, None
        grad = ctx.backend.row_grad(
            logits, row_max, log_sum, upstream=grad_output, a_scale=-1.0, a=entropy, b_scale=-1.0
        )
        return grad, None, None


class PairCall(NamedTuple):
    """What one call asks of its pairs of rows: who computes, its name, outputs in order, and its definition."""

    backend: Backend
    name: str
    outputs: tuple[str, ...]
    target: ClassTarget | None
    divergence: Divergence | None  # what the output of that name is
    definition: Definition


def pair_stats(p: Tensor, q: Tensor, call: PairCall) -> tuple[Tensor, ...]:
    """Return the measures that a call asks for of rows whose classes come last; p and q have one dtype."""
    if torch.compiler.is_compiling():
        arguments = _kernel_arguments(call)
        rows = pair_operators.pair_row_stats(p, q, **arguments, backend=call.backend, caller=call.name)
        return tuple(getattr(rows, name) for name in call.outputs)
    stats: tuple[Tensor, ...] = _PairStats.apply(p, q, call)  # type: ignore[no-untyped-call] # torch types it not
    return stats


def _kernel_arguments(call: PairCall) -> dict[str, Any]:
    target, outputs = call.target, call.outputs
    return {
        "target": None if target is None else target.indices,
        "ignore_index": -100 if target is None else target.ignore_index,
        **{name: name in outputs for name in ("kl", "reverse_kl", "js", "cross_entropy")},
        "entropy": "entropy_p" in outputs,
        "divergence": call.divergence,
    }


class _PairStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, call: PairCall) -> tuple[Tensor, ...]:
        target = call.target
        stats = call.backend.pair_row_stats(p, q, **_kernel_arguments(call), same_top="same_top" in call.outputs)
        if target is not None and stats.bad_row >= 0:
            raise index_error(call.name, target)
        if any(ctx.needs_input_grad):
            ctx.kept, others = taken_apart((call, stats.saved), [p, q])
            ctx.save_for_backward(p, q, *others)
        ctx.set_materialize_grads(False)
        if stats.same_top is not None:
            ctx.mark_non_differentiable(stats.same_top)
        return tuple(getattr(stats, name) for name in call.outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if all(grad is None for grad in grad_outputs):
            return None, None, None
        call: PairCall
        p, q, *_ = ctx.saved_tensors
        call, saved = put_together(ctx.kept, ctx.saved_tensors)
        upstream: dict[str, Any] = {n: g for n, g in zip(call.outputs, grad_outputs, strict=True) if g is not None}
        if "divergence" in upstream:
            upstream["divergence_grad"] = upstream.pop("divergence")
        need_p, need_q = ctx.needs_input_grad[:2]
        if needs_plain_backward(*upstream.values()):
            of_p, of_q = plain_backward(call.definition, [p, q], [need_p, need_q], grad_outputs)
            return of_p, of_q, None
        target = call.target
        grad_p, grad_q = call.backend.pair_row_grad(
            p,
            q,
            saved,
            None if target is None else target.indices,
            ignore_index=-100 if target is None else target.ignore_index,
            divergence=call.divergence,
            need_first=need_p,
            need_second=need_q,
            **upstream,
        )
        return grad_p, grad_q, None
