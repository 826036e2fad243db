"""The two-row kernels as torch operators; see `rows`.

`logitless::pair_row_stats` is differentiable in both rows' logits, and `logitless::pair_row_grad` is its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from logitless._operators.rows import (
    Outputs,
    asked_for,
    backend_of,
    batching,
    check_rows,
    check_shapes,
    fake_backend_of,
    fake_outputs,
    raise_if_bad,
    row_shape,
    with_layout_of,
    with_placeholders,
)
from logitless.kernels.interface import Backend, Divergence, PairRowStats


def pair_row_stats(
    first: Tensor,
    second: Tensor,
    target: Tensor | None = None,
    *,
    backend: Backend,
    caller: str,
    class_dim: int = -1,
    ignore_index: int = -100,
    kl: bool = True,
    reverse_kl: bool = False,
    js: bool = False,
    cross_entropy: bool = False,
    entropy: bool = False,
    divergence: Divergence | None = None,
) -> PairRowStats:
    """Return `Backend.pair_row_stats` as an operator, differentiable in both by all its outputs but same_top."""
    family, weight = divergence_told(divergence)
    asked = (kl, reverse_kl, js, cross_entropy, entropy, family)
    told = (first, second, target, class_dim, ignore_index, caller, *asked, weight)
    wanted = _pair_wanted(target, *asked)
    outputs = _pair_row_stats(*told, backend=backend.NAME)
    return PairRowStats._make([*asked_for(outputs, wanted), -1])


_PAIR_FIELDS = PairRowStats._fields[:-1]
_PAIR_MEASURES = _PAIR_FIELDS[:9]  # those with a gradient
_PAIR_DTYPES = {"same_top": torch.bool, "saved": torch.float64}


def divergence_told(divergence: Divergence | None) -> tuple[str | None, float]:
    """Return a divergence as an operator is told it."""
    return (None, 0.0) if divergence is None else (divergence.family, divergence.weight)


def divergence_asked(family: Any, weight: float) -> Divergence | None:
    """Return what `divergence_told` told."""
    return None if family is None else Divergence(family, weight)


def _pair_wanted(
    target: Tensor | None,
    kl: bool,
    reverse_kl: bool,
    js: bool,
    cross_entropy: bool,
    entropy: bool,
    family: str | None,
) -> list[bool]:
    aimed, alone = target is not None, family is not None
    return [kl, reverse_kl, js, cross_entropy, entropy, entropy, aimed, aimed, alone, True, True]


def _check_pairs(operator: str, first: Tensor, second: Tensor, class_dim: int, **rows: Tensor | None) -> None:
    check_rows(operator, first, class_dim, **rows)
    check_shapes(operator, first.shape, second=second)


@torch.library.custom_op(
    "logitless::pair_row_stats",
    mutates_args=(),
    schema="(Tensor first, Tensor second, Tensor? target, int class_dim, int ignore_index, str caller, bool kl, "
    "bool reverse_kl, bool js, bool cross_entropy, bool entropy, str? divergence, float weight, *, "
    "str? backend=None) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _pair_row_stats(
    first: Tensor,
    second: Tensor,
    target: Tensor | None,
    class_dim: int,
    ignore_index: int,
    caller: str,
    kl: bool,
    reverse_kl: bool,
    js: bool,
    cross_entropy: bool,
    entropy: bool,
    divergence: str | None,
    weight: float,
    *,
    backend: str | None = None,
) -> Outputs:
    _check_pairs("pair_row_stats", first, second, class_dim, target=target)
    stats = backend_of(backend, first, second, target).pair_row_stats(
        first,
        second,
        target,
        class_dim=class_dim,
        ignore_index=ignore_index,
        kl=kl,
        reverse_kl=reverse_kl,
        js=js,
        cross_entropy=cross_entropy,
        entropy=entropy,
        divergence=divergence_asked(divergence, weight),
    )
    raise_if_bad(stats.bad_row, caller, first, target, class_dim, ignore_index)
    return with_placeholders(first, stats[:-1], _PAIR_FIELDS, _PAIR_DTYPES)


@_pair_row_stats.register_fake
def _(
    first: Tensor,
    second: Tensor,
    target: Tensor | None,
    class_dim: int,
    ignore_index: int,
    caller: str,
    *asked: Any,
    backend: str | None = None,
) -> Outputs:
    outputs = fake_outputs(first, class_dim, _PAIR_FIELDS, _pair_wanted(target, *asked[:-1]), _PAIR_DTYPES)
    saved = fake_backend_of(backend, first).PAIR_SAVED
    outputs[-1] = first.new_empty([*row_shape(first, class_dim), saved], dtype=torch.float64)
    return tuple(outputs)


@torch.library.custom_op(
    "logitless::pair_row_grad",
    mutates_args=(),
    schema="(Tensor first, Tensor second, Tensor saved, Tensor? target, Tensor? kl, Tensor? reverse_kl, Tensor? js, "
    "Tensor? cross_entropy, Tensor? entropy_p, Tensor? entropy_q, Tensor? nll_p, Tensor? nll_q, "
    "Tensor? divergence_grad, str? divergence, float weight, int class_dim, "
    "int ignore_index, bool need_first, bool need_second, *, str? backend=None) -> (Tensor, Tensor)",
)
def _pair_row_grad(
    first: Tensor,
    second: Tensor,
    saved: Tensor,
    target: Tensor | None,
    kl: Tensor | None,
    reverse_kl: Tensor | None,
    js: Tensor | None,
    cross_entropy: Tensor | None,
    entropy_p: Tensor | None,
    entropy_q: Tensor | None,
    nll_p: Tensor | None,
    nll_q: Tensor | None,
    divergence_grad: Tensor | None,
    divergence: str | None,
    weight: float,
    class_dim: int,
    ignore_index: int,
    need_first: bool,
    need_second: bool,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    upstream = {"kl": kl, "reverse_kl": reverse_kl, "js": js, "cross_entropy": cross_entropy}
    upstream |= {"entropy_p": entropy_p, "entropy_q": entropy_q, "nll_p": nll_p, "nll_q": nll_q}
    upstream["divergence_grad"] = divergence_grad
    _check_pairs("pair_row_grad", first, second, class_dim, target=target, **upstream)
    kernels = backend_of(backend, first, second, target)
    check_shapes("pair_row_grad", [*row_shape(first, class_dim), kernels.PAIR_SAVED], saved=saved)
    grads = kernels.pair_row_grad(
        first,
        second,
        saved.double().contiguous(),
        target,
        class_dim=class_dim,
        ignore_index=ignore_index,
        kl=kl,
        reverse_kl=reverse_kl,
        js=js,
        cross_entropy=cross_entropy,
        entropy_p=entropy_p,
        entropy_q=entropy_q,
        nll_p=nll_p,
        nll_q=nll_q,
        divergence=divergence_asked(divergence, weight),
        divergence_grad=divergence_grad,
        need_first=need_first,
        need_second=need_second,
    )
    grad_first, grad_second = (
        logits.new_empty(0) if grad is None else with_layout_of(grad, logits)
        for grad, logits in zip(grads, (first, second), strict=True)
    )
    return grad_first, grad_second


@_pair_row_grad.register_fake
def _(first: Tensor, second: Tensor, *rest: Any, backend: str | None = None) -> tuple[Tensor, Tensor]:
    need_first, need_second = rest[-2:]
    return (
        torch.empty_like(first) if need_first else first.new_empty([0]),
        torch.empty_like(second) if need_second else second.new_empty([0]),
    )


def _pair_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Outputs) -> None:
    first, second, target, class_dim, ignore_index, _, *asked, weight = inputs
    same_top, saved = output[-2:]
    wanted = _pair_wanted(target, *asked)
    ctx.divergence = asked[-1], weight
    absent = [value for value, want in zip(output, wanted, strict=True) if not want]
    ctx.mark_non_differentiable(same_top, saved, *absent)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(first, second, saved, target)
    ctx.class_dim, ctx.ignore_index = class_dim, ignore_index
    ctx.backend = keyword_only_inputs["backend"]


def _pair_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    upstream = grads[: len(_PAIR_MEASURES)]
    if all(grad is None for grad in upstream):
        return (None,) * 13
    needed = ctx.needs_input_grad[:2]
    told = (*ctx.saved_tensors, *upstream, *ctx.divergence, ctx.class_dim, ctx.ignore_index, *needed)
    both = _pair_row_grad(*told, backend=ctx.backend)
    return *(grad if need else None for grad, need in zip(both, needed, strict=True)), *(None,) * 11


_pair_row_stats.register_autograd(_pair_backward, setup_context=_pair_setup)
_pair_row_stats.register_vmap(batching(_pair_row_stats, 3, None))
_pair_row_grad.register_vmap(batching(_pair_row_grad, 15, None))
