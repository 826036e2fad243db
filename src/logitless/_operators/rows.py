"""The row kernels as torch operators, so that a compiled graph holds them: shapes, gradients, batching.

`logitless::row_stats` is differentiable, and `logitless::row_grad` is its gradient; `pairs` has those of two rows,
`elements` and `cosines` those of single elements and of vectors. An output that is not asked for is an empty tensor.
Outside compiled graphs the kernels are reached by `autograd.Function` (see `_autograd`), which costs less a call.

Every operator is told the name of the backend that computes it; without one it looks for what takes its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from logitless._rules import dispatch
from logitless._rules.targets import index_error
from logitless.kernels.interface import Backend, ClassTarget, RowStats

Outputs = tuple[Tensor, ...]
Operator = Callable[..., Any]
BatchingRule = Callable[..., tuple[Any, Any]]


def row_stats(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    backend: Backend,
    caller: str,
    class_dim: int = -1,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    dense_target: Tensor | None = None,
    lse: bool = False,
    entropy: bool = False,
    argmax: bool = False,
    rank: bool = False,
    smooth: bool = False,
) -> RowStats:
    """Return `Backend.row_stats` as an operator, differentiable in the logits by any sum of its outputs.

    nll, lse, entropy, smooth_sum and dense_sum have gradients. A bad class raises when the operator runs, in the name
    of `caller`; so `bad_row` is -1.
    """
    asked = (lse, entropy, argmax, rank, smooth)
    told = (logits, target, class_weight, dense_target, class_dim, ignore_index, caller, *asked)
    outputs = _row_stats(*told, backend=backend.NAME)
    return RowStats._make([*asked_for(outputs, _row_wanted(target, dense_target, *asked)), -1])


def backend_of(name: str | None, *tensors: Tensor | None) -> Backend:
    """Return the backend an operator was told, or the one that takes these tensors."""
    return dispatch.serving(*tensors) if name is None else dispatch.named(name)


def fake_backend_of(name: str | None, tensor: Tensor) -> Backend:
    """Return the same for tensors without data, of which only the device is known."""
    return dispatch.of_device(tensor.device.type) if name is None else dispatch.named(name)


def asked_for(outputs: Outputs, wanted: Sequence[bool]) -> list[Any]:
    return [value if want else None for value, want in zip(outputs, wanted, strict=True)]


def compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def row_shape(logits: Tensor, class_dim: int) -> list[int]:
    shape = list(logits.shape)
    del shape[class_dim]
    return shape


def fake_outputs(
    logits: Tensor, class_dim: int, fields: Sequence[str], wanted: Sequence[bool], dtypes: dict[str, torch.dtype]
) -> list[Tensor]:
    """Return outputs without data: one value a row in the compute dtype, or in the one named here."""
    shape, real = row_shape(logits, class_dim), compute_dtype(logits)
    return [
        logits.new_empty(shape if want else [0], dtype=dtypes.get(name, real))
        for name, want in zip(fields, wanted, strict=True)
    ]


def with_placeholders(
    logits: Tensor, values: Sequence[Tensor | None], fields: Sequence[str], dtypes: dict[str, torch.dtype]
) -> Outputs:
    real = compute_dtype(logits)
    return tuple(
        logits.new_empty(0, dtype=dtypes.get(name, real)) if value is None else value
        for name, value in zip(fields, values, strict=True)
    )


def check_shapes(operator: str, shape: Sequence[int], **tensors: Tensor | None) -> None:
    """Raise unless each of these tensors has this shape: kernels read as much of one as the logits say there is."""
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise RuntimeError(
                f"logitless::{operator}: expected {name} of shape {tuple(shape)}, got {tuple(tensor.shape)}"
            )


def check_rows(
    operator: str,
    logits: Tensor,
    class_dim: int,
    class_weight: Tensor | None = None,
    dense_target: Tensor | None = None,
    **rows: Tensor | None,
) -> None:
    """Raise unless what lies beside logits fits them; `rows` hold a value a row."""
    if not -logits.dim() <= class_dim < logits.dim():
        raise IndexError(f"logitless::{operator}: class_dim={class_dim} of logits of {logits.dim()} dimensions")
    check_shapes(operator, row_shape(logits, class_dim), **rows)
    check_shapes(operator, logits.shape[class_dim : class_dim + 1 or None], class_weight=class_weight)
    check_shapes(operator, logits.shape, dense_target=dense_target)
    if dense_target is not None and dense_target.dtype != logits.dtype:
        raise RuntimeError(
            f"logitless::{operator}: expected dense_target in {logits.dtype}, as the logits, got {dense_target.dtype}"
        )


def raise_if_bad(
    bad_row: int, caller: str, logits: Tensor, target: Tensor | None, class_dim: int, ignore_index: int
) -> None:
    if bad_row >= 0:
        raise index_error(caller, ClassTarget(class_dim, logits.shape[class_dim], ignore_index, target))


def with_layout_of(grad: Tensor, logits: Tensor) -> Tensor:
    """Return the gradient with the strides that a compiler has been told: those of `empty_like`."""
    strides = torch.empty_like(logits, device="meta").stride()
    return grad if grad.stride() == strides else torch.empty_like(logits).copy_(grad)


def one_at_a_time(operator: Operator) -> BatchingRule:
    """Return a vmap rule that goes through the batch."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any, **by_name: Any) -> tuple[Any, Any]:
        runs = [
            operator(
                *(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)),
                **by_name,
            )
            for i in range(info.batch_size)
        ]
        if isinstance(runs[0], Tensor):
            return torch.stack(runs), 0
        return tuple(torch.stack(values) for values in zip(*runs, strict=True)), (0,) * len(runs[0])

    return rule


def batching(operator: Operator, class_dim_at: int, weight_at: int | None) -> BatchingRule:
    """Return a vmap rule. Of the arguments, the first is the logits; a batch of class weights is gone through."""
    singly = one_at_a_time(operator)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any, backend: str | None = None) -> tuple[Any, Any]:
        size = info.batch_size
        if weight_at is not None and in_dims[weight_at] is not None:
            return singly(info, in_dims, *args, backend=backend)
        batched = [
            arg
            if not isinstance(arg, Tensor) or position == weight_at
            else arg.expand(size, *arg.shape)
            if dim is None
            else arg.movedim(dim, 0)
            for position, (arg, dim) in enumerate(zip(args, in_dims, strict=True))
        ]
        dims = batched[0].dim() - 1
        batched[class_dim_at] = batched[class_dim_at] % dims + 1
        outputs = operator(*batched, backend=backend)
        if isinstance(outputs, Tensor):
            return outputs, 0
        return outputs, tuple(0 if value.dim() > 1 or value.numel() else None for value in outputs)

    return rule


_ROW_FIELDS = RowStats._fields[:-1]
_ROW_DIFFERENTIABLE = ("nll", "lse", "entropy", "smooth_sum", "dense_sum")
_ROW_DTYPES = {"log_sum": torch.float64, "argmax": torch.int64, "rank": torch.int64}


def _row_wanted(
    target: Tensor | None, dense_target: Tensor | None, lse: bool, entropy: bool, argmax: bool, rank: bool, smooth: bool
) -> list[bool]:
    dense = dense_target is not None
    return [True, True, target is not None, lse, entropy, argmax, rank, smooth, dense, dense]


@torch.library.custom_op(
    "logitless::row_stats",
    mutates_args=(),
    schema="(Tensor logits, Tensor? target, Tensor? class_weight, Tensor? dense_target, int class_dim, "
    "int ignore_index, str caller, bool lse, bool entropy, bool argmax, bool rank, bool smooth, *, "
    "str? backend=None) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _row_stats(
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    dense_target: Tensor | None,
    class_dim: int,
    ignore_index: int,
    caller: str,
    lse: bool,
    entropy: bool,
    argmax: bool,
    rank: bool,
    smooth: bool,
    *,
    backend: str | None = None,
) -> Outputs:
    check_rows("row_stats", logits, class_dim, class_weight, dense_target, target=target)
    stats = backend_of(backend, logits, target, class_weight, dense_target).row_stats(
        logits,
        target,
        class_dim=class_dim,
        ignore_index=ignore_index,
        class_weight=class_weight,
        dense_target=dense_target,
        lse=lse,
        entropy=entropy,
        argmax=argmax,
        rank=rank,
        smooth=smooth,
    )
    raise_if_bad(stats.bad_row, caller, logits, target, class_dim, ignore_index)
    return with_placeholders(logits, stats[:-1], _ROW_FIELDS, _ROW_DTYPES)


@_row_stats.register_fake
def _(
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    dense_target: Tensor | None,
    class_dim: int,
    ignore_index: int,
    caller: str,
    *asked: bool,
    backend: str | None = None,
) -> Outputs:
    return tuple(fake_outputs(logits, class_dim, _ROW_FIELDS, _row_wanted(target, dense_target, *asked), _ROW_DTYPES))


@torch.library.custom_op(
    "logitless::row_grad",
    mutates_args=(),
    schema="(Tensor logits, Tensor row_max, Tensor log_sum, Tensor? target, Tensor? class_weight, "
    "Tensor? dense_target, Tensor? a, Tensor? b, Tensor? c, Tensor? e, Tensor? f, int class_dim, int ignore_index, *, "
    "str? backend=None) -> Tensor",
)
def _row_grad(
    logits: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    dense_target: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    e: Tensor | None,
    f: Tensor | None,
    class_dim: int,
    ignore_index: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """dz_j = p_j (a + b (z_j - lse)) + c [j = target] + e t_j w_j + f w_j, a coefficient that is None being 0."""
    rows = {"row_max": row_max, "log_sum": log_sum, "target": target, "a": a, "b": b, "c": c, "e": e, "f": f}
    check_rows("row_grad", logits, class_dim, class_weight, dense_target, **rows)
    grad = backend_of(backend, logits, target, class_weight, dense_target).row_grad(
        logits,
        row_max.to(compute_dtype(logits)).contiguous(),
        log_sum.double().contiguous(),
        target,
        class_dim=class_dim,
        ignore_index=ignore_index,
        class_weight=class_weight,
        dense_target=dense_target,
        a_scale=float(a is not None),
        b_scale=float(b is not None),
        c_scale=float(c is not None),
        e_scale=float(e is not None),
        f_scale=float(f is not None),
        a=a,
        b=b,
        c=c,
        e=e,
        f=f,
    )
    return with_layout_of(grad, logits)


@_row_grad.register_fake
def _(logits: Tensor, *_: Any, backend: str | None = None) -> Tensor:
    return torch.empty_like(logits)


def _row_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Outputs) -> None:
    logits, target, class_weight, dense_target, class_dim, ignore_index, _, *asked = inputs
    if any(ctx.needs_input_grad[1:4]):
        raise NotImplementedError("logitless::row_stats has a gradient for the logits alone")
    stats = dict(zip(_ROW_FIELDS, output, strict=True))
    wanted = zip(_ROW_FIELDS, _row_wanted(target, dense_target, *asked), strict=True)
    differentiable = {name for name, want in wanted if want and name in _ROW_DIFFERENTIABLE}
    ctx.mark_non_differentiable(*(value for name, value in stats.items() if name not in differentiable))
    ctx.set_materialize_grads(False)
    saved = (stats[name] for name in ("row_max", "log_sum", "entropy", "dense_mass"))
    ctx.save_for_backward(logits, *saved, target, class_weight, dense_target)
    ctx.class_dim, ctx.ignore_index = class_dim, ignore_index
    ctx.backend = keyword_only_inputs["backend"]


def _row_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, row_max, log_sum, entropy, dense_mass, target, class_weight, dense_target = ctx.saved_tensors
    upstream = dict(zip(_ROW_FIELDS, grads, strict=True))
    nll, lse, spread = upstream["nll"], upstream["lse"], upstream["entropy"]
    smooth, dense = upstream["smooth_sum"], upstream["dense_sum"]
    # Of the probabilities: the mass that each sum gives to the log-sum-exp. dH/dz_j = -p_j ((z_j - lse) + H)
    parts = [grad for grad in (nll, lse) if grad is not None]
    if spread is not None:
        parts.append(-spread * entropy)
    if smooth is not None:
        total = logits.shape[ctx.class_dim] if class_weight is None else class_weight.to(smooth.dtype).sum()
        parts.append(smooth * total)
    if dense is not None:
        parts.append(dense * dense_mass)
    if not parts:
        return (None,) * 13
    nll, spread, smooth, dense = (None if grad is None else -grad for grad in (nll, spread, smooth, dense))
    grad = _row_grad(
        logits,
        row_max,
        log_sum,
        target,
        class_weight,
        dense_target,
        sum(parts[1:], parts[0]),
        spread,
        nll,
        dense,
        smooth,
        ctx.class_dim,
        ctx.ignore_index,
        backend=ctx.backend,
    )
    return grad, *(None,) * 12


_row_stats.register_autograd(_row_backward, setup_context=_row_setup)
_row_stats.register_vmap(batching(_row_stats, 4, 2))
_row_grad.register_vmap(batching(_row_grad, 11, 4))
