"""The cosine kernels as torch operators; see `rows`.

`logitless::cosine` is differentiable in both vectors, and `logitless::cosine_grad` is its gradient. A sum leaves the
operator in float64, as in `elements`.

Vectors that are crossed, (N, 1, D) with (1, M, D), are multiplied where they are many: all pairs of them are a matrix
product, and nothing of all three sizes is held. Where they are few the kernel is the faster one. Their sizes may be
unknown in a graph, so crossed vectors save nothing either way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from logitless._heads.cosine_matrix import cosine_matrix, cosine_matrix_gradients
from logitless._heads.multiplier import multiplier
from logitless._operators.rows import backend_of, check_shapes, compute_dtype, one_at_a_time, with_layout_of
from logitless.kernels.interface import Backend, CosineRows

# From so many multiplications on, of as many vectors on each side, the product is the faster one.
_MANY, _LEAST_VECTORS = 1 << 20, 4


def cosine(
    backend: Backend,
    x1: Tensor,
    x2: Tensor,
    target: Tensor | None,
    *,
    dim: int,
    eps: float,
    margin: float,
    summed: bool,
) -> Tensor:
    """Return `rows` of these vectors as an operator, or with `summed` their sum in float64."""
    turned = crossed(x1, x2, target, dim)
    result: Tensor = _cosine(x1, x2, target, dim, eps, margin, summed, turned=turned, backend=backend.NAME)[0]
    return result


def rows(
    backend: Backend,
    x1: Tensor,
    x2: Tensor,
    target: Tensor | None,
    *,
    sizes: torch.Size,
    dim: int,
    eps: float,
    margin: float,
    turned: bool | None,
    save: bool,
) -> CosineRows:
    """Return the similarity along `dim` of vectors that broadcast to `sizes`, or with a target the embedding loss.

    `turned` is what `crossed` says of them.
    """
    if turned is not None:
        if _are_many(sizes):
            dtype = compute_dtype(x1)
            out = cosine_matrix(multiplier(backend, dtype, sizes[2]), dtype, *_matrices(x1, x2, turned), eps)
        else:
            out = backend.cosine_similarity(_expanded(x1, sizes), _expanded(x2, sizes), dim, eps).out
        return CosineRows(out, out.new_empty(0, dtype=torch.float64) if save else None)
    first, second = _expanded(x1, sizes), _expanded(x2, sizes)
    if target is None:
        return backend.cosine_similarity(first, second, dim, eps, save=save)
    return backend.cosine_embedding(first, second, _expanded(target, sizes[:-1]), margin, save=save)


def row_gradients(
    backend: Backend,
    x1: Tensor,
    x2: Tensor,
    target: Tensor | None,
    saved: Tensor,
    *,
    sizes: torch.Size,
    dim: int,
    eps: float,
    margin: float,
    turned: bool | None,
    upstream: Tensor | None,
    scale: Tensor | float,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `rows` that are wanted; that of a vector that is broadcast may be in a wider dtype."""
    if turned is not None and _are_many(sizes):
        dtype, pair = compute_dtype(x1), _matrices(x1, x2, turned)
        given = x1.new_ones((), dtype=dtype) * scale if upstream is None else upstream * scale
        found = cosine_matrix_gradients(
            multiplier(backend, dtype, sizes[2]),
            dtype,
            *pair,
            eps,
            given.expand(sizes[:-1]),
            wanted[::-1] if turned else wanted,
        )
        one, other = found[::-1] if turned else found
        return _shaped(one, x1), _shaped(other, x2)
    first, second = x1, x2
    if not x1.shape == x2.shape == sizes:
        # The gradients of what is broadcast are added up: not in half precision.
        wide = compute_dtype(x1)
        first, second = x1.to(wide).expand(sizes), x2.to(wide).expand(sizes)
    if target is None:
        if turned is not None:
            again = backend.cosine_similarity(_expanded(x1, sizes), _expanded(x2, sizes), dim, eps, save=True).saved
            assert again is not None
            saved = again
        grads = backend.cosine_similarity_grad(
            first, second, saved, dim, eps, upstream=upstream, scale=scale, wanted=wanted
        )
    else:
        labels = _expanded(target, sizes[:-1])
        grads = backend.cosine_embedding_grad(
            first, second, labels, saved, margin, upstream=upstream, scale=scale, wanted=wanted
        )
    return _summed_to(grads[0], x1), _summed_to(grads[1], x2)


def crossed(x1: Tensor, x2: Tensor, target: Tensor | None, dim: int) -> bool | None:
    """Return None unless all pairs of vectors are asked for; then whether the rows of the result are the second's."""
    if target is not None or max(x1.dim(), x2.dim()) != 3 or dim not in (-1, 2) or x1.shape[-1] != x2.shape[-1]:
        return None
    if _is_column(x1) and _is_row(x2):
        return False
    return True if _is_row(x1) and _is_column(x2) else None


def _are_many(sizes: torch.Size) -> bool:
    rows, columns, features = sizes
    return rows * columns * features >= _MANY and min(rows, columns) >= _LEAST_VECTORS


def _is_column(vectors: Tensor) -> bool:
    return vectors.dim() == 3 and _is_literally_one(vectors.shape[1])


def _is_row(vectors: Tensor) -> bool:
    return vectors.dim() == 2 or (vectors.dim() == 3 and _is_literally_one(vectors.shape[0]))


def _is_literally_one(size: int) -> bool:
    """Say so of a number, and of no symbol that a graph has for one."""
    return isinstance(size, int) and size == 1


def _matrices(x1: Tensor, x2: Tensor, turned: bool) -> tuple[Tensor, Tensor]:
    """Return the vectors of the result's rows, and those of its columns."""
    first, second = x1.reshape(-1, x1.shape[-1]), x2.reshape(-1, x2.shape[-1])
    return (second, first) if turned else (first, second)


def _shaped(grad: Tensor | None, tensor: Tensor) -> Tensor | None:
    return None if grad is None else grad.view(tensor.shape)


def _expanded(tensor: Tensor, sizes: torch.Size) -> Tensor:
    return tensor if tensor.shape == sizes else tensor.expand(sizes)


def _summed_to(grad: Tensor | None, tensor: Tensor) -> Tensor | None:
    return grad if grad is None or grad.shape == tensor.shape else grad.sum_to_size(tensor.shape).to(tensor.dtype)


def _sizes(x1: Tensor, x2: Tensor, target: Tensor | None) -> torch.Size:
    labels = () if target is None else ((*target.shape, 1),)
    sizes: torch.Size = torch.broadcast_shapes(x1.shape, x2.shape, *labels)
    return sizes


@torch.library.custom_op(
    "logitless::cosine",
    mutates_args=(),
    schema="(Tensor x1, Tensor x2, Tensor? target, int dim, float eps, float margin, bool summed, *, "
    "bool? turned=None, str? backend=None) -> (Tensor, Tensor)",
)
def _cosine(
    x1: Tensor,
    x2: Tensor,
    target: Tensor | None,
    dim: int,
    eps: float,
    margin: float,
    summed: bool,
    *,
    turned: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    kernels = backend_of(backend, x1, x2, target)
    sizes = _sizes(x1, x2, target)
    out, saved = rows(kernels, x1, x2, target, sizes=sizes, dim=dim, eps=eps, margin=margin, turned=turned, save=True)
    assert saved is not None
    return out.sum(dtype=torch.float64) if summed else out, saved


@_cosine.register_fake
def _(
    x1: Tensor,
    x2: Tensor,
    target: Tensor | None,
    dim: int,
    eps: float,
    margin: float,
    summed: bool,
    *,
    turned: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    shape = list(_sizes(x1, x2, target))
    del shape[dim]
    saved = x1.new_empty([0] if turned is not None else [3, *shape], dtype=torch.float64)
    if summed:
        return x1.new_empty([], dtype=torch.float64), saved
    return x1.new_empty(shape, dtype=compute_dtype(x1)), saved


@torch.library.custom_op(
    "logitless::cosine_grad",
    mutates_args=(),
    schema="(Tensor upstream, Tensor x1, Tensor x2, Tensor? target, Tensor saved, int dim, float eps, float margin, "
    "bool summed, bool need_first, bool need_second, *, bool? turned=None, str? backend=None) -> (Tensor, Tensor)",
)
def _cosine_grad(
    upstream: Tensor,
    x1: Tensor,
    x2: Tensor,
    target: Tensor | None,
    saved: Tensor,
    dim: int,
    eps: float,
    margin: float,
    summed: bool,
    need_first: bool,
    need_second: bool,
    *,
    turned: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    sizes = _sizes(x1, x2, target)
    rows = list(sizes)
    del rows[dim]
    check_shapes("cosine_grad", [0] if turned is not None else [3, *rows], saved=saved)
    check_shapes("cosine_grad", rows, upstream=None if summed else upstream)
    kernels = backend_of(backend, x1, x2, target)
    grads = row_gradients(
        kernels,
        x1,
        x2,
        target,
        saved.double().contiguous(),
        sizes=sizes,
        dim=dim,
        eps=eps,
        margin=margin,
        turned=turned,
        upstream=None if summed else upstream,
        scale=kernels.scalar(upstream) if summed else 1.0,
        wanted=(need_first, need_second),
    )
    first, second = (
        vector.new_empty(0) if grad is None else with_layout_of(grad.to(vector.dtype), vector)
        for grad, vector in zip(grads, (x1, x2), strict=True)
    )
    return first, second


@_cosine_grad.register_fake
def _(upstream: Tensor, x1: Tensor, x2: Tensor, *rest: Any, **by_name: Any) -> tuple[Tensor, Tensor]:
    first, second = (
        torch.empty_like(vector) if need else vector.new_empty([0])
        for vector, need in zip((x1, x2), rest[-2:], strict=True)
    )
    return first, second


def _setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    x1, x2, target, *options = inputs
    saved = output[1]
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x1, x2, target, saved)
    ctx.options, ctx.by_name = options, keyword_only_inputs


def _backward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    both = _cosine_grad(grad_output, *ctx.saved_tensors, *ctx.options, *needed, **ctx.by_name)
    return *(grad if need else None for grad, need in zip(both, needed, strict=True)), *(None,) * 5


_cosine.register_autograd(_backward, setup_context=_setup)
_cosine.register_vmap(one_at_a_time(_cosine))
_cosine_grad.register_vmap(one_at_a_time(_cosine_grad))
