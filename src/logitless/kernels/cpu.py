"""The compiled kernels on CPU tensors: allocate the outputs, pass addresses and strides, nothing else.

Values of targets are not checked here but by the kernel, which reports the first bad row. No autograd: the functions
take and give plain data. `float32` is the compute type of float16 and bfloat16 logits, and what their outputs have.
"""

import os
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from logitless.kernels.layout import Layout, laid_out, layout_of
from logitless.kernels.native import extension as _native

if TYPE_CHECKING:
    from logitless._native import NativeInfo

__all__ = [
    "PRODUCT_DTYPES",
    "PairRowStats",
    "RowStats",
    "cross_entropy",
    "cross_entropy_grad",
    "empty_like_pooled",
    "empty_pooled",
    "native_info",
    "pair_row_grad",
    "pair_row_stats",
    "pool_clear",
    "product",
    "row_grad",
    "row_stats",
    "supports",
]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

# Of which the processor and the instruction set chosen at the start have a product faster than torch's. A set: a graph
# that is being compiled can ask it, and not the extension.
PRODUCT_DTYPES = frozenset(dtype for dtype, code in DTYPES.items() if _native and _native.product_supported(code))

# Of fewer logits a thread alone is done before it could ask for another.
SERIAL_NUMEL = 1 << 14
# A smaller gradient comes from the allocator's own free lists, without page faults.
POOLED_BYTES = 1 << 20
POOL_IN_USE = os.environ.get("LOGITLESS_POOL", "1") != "0"


def native_info() -> "NativeInfo":
    """What the extension was built with and found here, and the size of its pool."""
    return _native.native_info()


def pool_clear() -> None:
    """Give the pool's free blocks back to the system."""
    _native.pool_clear()


def supports(*tensors: Tensor) -> bool:
    """Whether the kernels take these: strided CPU tensors of one floating dtype, neither subclasses nor fake."""
    first = tensors[0]
    return first.dtype in DTYPES and all(
        t.device.type == "cpu" and t.layout == torch.strided and t.dtype == first.dtype and type(t) is Tensor
        for t in tensors
    )


def empty_like_pooled(tensor: Tensor) -> Tensor:
    """`torch.empty_like(tensor)`, of at least 1 MB on a block of memory that outlives it and is reused.

    The block returns to a bounded pool when the last tensor on it dies; see `native_info()` for the bound.
    """
    if not POOL_IN_USE or tensor.nbytes < POOLED_BYTES:
        return torch.empty_like(tensor)
    if tensor.is_contiguous():
        return empty_pooled(tensor.shape, tensor.dtype)
    strides = torch.empty_like(tensor, device="meta").stride()
    return empty_pooled(torch.Size((tensor.numel(),)), tensor.dtype).as_strided(tensor.shape, strides)


def empty_pooled(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """`torch.empty(shape, dtype=dtype)`, of at least 1 MB on a pooled block; see `empty_like_pooled`."""
    if not POOL_IN_USE or shape.numel() * dtype.itemsize < POOLED_BYTES:
        return torch.empty(shape, dtype=dtype)
    return _native.pool_tensor(DTYPES[dtype], list(shape))


def product(first: Tensor, second: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """Write `first @ second` to `out`, or add it: matrices of a supported dtype, consecutive in one dimension each.

    Sums are in float32. Beside a bfloat16 factor the one from which `out` has its rows (columns where those are
    consecutive) may be float32, and is rounded. `out` is float32, which `accumulate` needs, or has the other's dtype.
    There is a depth.
    """
    rows, columns = out.shape
    if out.stride(1) == 1 and first.dtype in (second.dtype, torch.float32):
        left, right, row, column, line = first, second, 0, 1, out.stride(0)
    elif out.stride(0) == 1:  # out.T = second.T @ first.T, said by strides: a view would be a tensor more
        left, right, row, column, line = second, first, 1, 0, out.stride(1)
        rows, columns = columns, rows
    else:
        raise ValueError("beside a half factor a float32 one must not run along consecutive numbers of out")
    _native.product(
        DTYPES[left.dtype],
        DTYPES[right.dtype],
        DTYPES[out.dtype],
        torch.get_num_threads(),
        rows,
        first.shape[1],
        columns,
        left.data_ptr(),
        left.stride(row),
        left.stride(column),
        right.data_ptr(),
        right.stride(row),
        right.stride(column),
        out.data_ptr(),
        line,
        accumulate,
    )


def _gradient_like(
    source: Tensor, class_dim: int, split: int | None, out: Tensor | None = None
) -> tuple[Tensor, Layout]:
    """Memory for the gradient of a tensor that has a layout (`out`, where given), and its layout of the same sizes."""
    if out is not None:
        layout = layout_of(out, class_dim, split)
        if layout is None or out.shape != source.shape or out.dtype != source.dtype:
            raise ValueError(
                f"out must have the logits' shape {tuple(source.shape)}, dtype {source.dtype} and a collapsible layout"
            )
        return out, layout
    grad = empty_like_pooled(source)
    layout = layout_of(grad, class_dim, split)
    if layout is None:
        grad = torch.empty(source.shape, dtype=source.dtype)
        layout = layout_of(grad, class_dim, split)
        assert layout is not None
    return grad, layout


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _optional(tensors: list[Tensor], layouts: list[Layout]) -> tuple[int, int, int, int]:
    """The address and the strides of a tensor that may not be there."""
    return (tensors[0].data_ptr(), *layouts[0][3:]) if tensors else (0, 0, 0, 0)


def _plain(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


class RowStats(NamedTuple):
    """One value per row, of the logits' shape without the class dimension; what was not asked for is None.

    lse = row_max + log_sum; log_sum is float64 always, so that the gradient can be right to an ulp. An ignored row
    has 0 everywhere and -1 for argmax and rank. `bad_row` is the first row (in row-major order) whose target is
    neither a class nor ignore_index, or -1; such rows have NaN.
    """

    row_max: Tensor
    log_sum: Tensor
    nll: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    argmax: Tensor | None
    rank: Tensor | None
    smooth_sum: Tensor | None
    dense_sum: Tensor | None
    dense_mass: Tensor | None
    bad_row: int


def row_stats(
    logits: Tensor,
    target: Tensor | None = None,
    *,
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
    """Every per-row quantity of the losses, in one read of the logits.

    nll = lse - z[target] (with a target); smooth_sum = sum_j w_j (lse - z_j) (with `smooth`); with a dense target of
    the logits' shape and dtype, dense_sum = sum_j t_j w_j (lse - z_j) and dense_mass = sum_j t_j w_j, where
    0 * inf = 0. w is class_weight, or 1. The target is int64, of the logits' shape without the class dimension.
    """
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if (entropy or rank) and smooth and dense_target is None:
        raise ValueError("entropy or rank together with smooth needs a dense_target; make two calls")
    given = (logits,) if dense_target is None else (logits, dense_target)
    (logits, *dense), (layout, *dense_layouts), _ = laid_out(class_dim, *given)
    shape = logits.shape[:-1] if class_dim == -1 else _without(logits.shape, class_dim)
    weight = _plain(class_weight, real)
    index = _plain(target, torch.int64)

    def out(wanted: bool, dtype: torch.dtype = real) -> Tensor | None:
        return torch.empty(shape, dtype=dtype) if wanted else None

    row_max, log_sum = torch.empty(shape, dtype=real), torch.empty(shape, dtype=torch.float64)
    nll, lse_out, entropy_out = out(index is not None), out(lse), out(entropy)
    argmax_out, rank_out = out(argmax, torch.int64), out(rank, torch.int64)
    smooth_sum, dense_sum, dense_mass = out(smooth), out(dense_target is not None), out(dense_target is not None)
    bad_row = _native.row_stats(
        DTYPES[logits.dtype],
        torch.get_num_threads(),
        logits.data_ptr(),
        *layout,
        _address(index),
        ignore_index,
        _address(weight),
        *_optional(dense, dense_layouts),
        _address(nll),
        _address(lse_out),
        row_max.data_ptr(),
        log_sum.data_ptr(),
        _address(entropy_out),
        _address(argmax_out),
        _address(rank_out),
        _address(smooth_sum),
        _address(dense_sum),
        _address(dense_mass),
    )
    return RowStats(
        row_max, log_sum, nll, lse_out, entropy_out, argmax_out, rank_out, smooth_sum, dense_sum, dense_mass, bad_row
    )


def _without(shape: tuple[int, ...], class_dim: int) -> list[int]:
    sizes = list(shape)
    del sizes[class_dim]
    return sizes


def row_grad(
    logits: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    target: Tensor | None = None,
    *,
    class_dim: int = -1,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    index_weight: bool = False,
    dense_target: Tensor | None = None,
    upstream: Tensor | None = None,
    a_scale: float = 0.0,
    b_scale: float = 0.0,
    c_scale: float = 0.0,
    e_scale: float = 0.0,
    f_scale: float = 0.0,
    a_extra: float = 0.0,
    a: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
    e: Tensor | None = None,
    f: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """dz_j = p_j (A + B (z_j - lse)) + C [j = target] + E t_j w_j + F w_j, of the logits' shape and dtype.

    With g the row's element of `upstream` (one per row, or one for all; 1 when None) and v the target's class weight
    with `index_weight`, else 1: A = g (a_scale a v + a_extra), B = g b_scale b, C = g c_scale c v, E = g e_scale e,
    F = g f_scale f; a to f are one per row, or 1 when None. An ignored row's gradient is exactly 0. `out` may be the
    logits themselves. Cross-entropy of index targets is a_scale = 1, c_scale = -1.
    """
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    given = (logits,) if dense_target is None else (logits, dense_target)
    (source, *dense), (layout, *dense_layouts), split = laid_out(class_dim, *given)
    grad, grad_layout = _gradient_like(source, class_dim, split, out)
    weight = _plain(class_weight, real)
    index = _plain(target, torch.int64)
    upstream = _plain(upstream, real)
    rows = [_plain(x, real) for x in (a, b, c, e, f)]
    _native.row_grad(
        DTYPES[source.dtype],
        torch.get_num_threads(),
        source.data_ptr(),
        *layout,
        grad.data_ptr(),
        *grad_layout[3:],
        _address(index),
        ignore_index,
        _address(weight),
        int(index_weight),
        *_optional(dense, dense_layouts),
        row_max.data_ptr(),
        log_sum.data_ptr(),
        _address(upstream),
        0 if upstream is None or upstream.numel() == 1 else 1,
        a_scale,
        b_scale,
        c_scale,
        e_scale,
        f_scale,
        a_extra,
        *(_address(x) for x in rows),
    )
    return grad


def _problem(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int, smoothing: float
) -> tuple[int, int, int, int, int, int, int, int, int, float]:
    """What the kernels of a whole cross-entropy take first, both ways."""
    rows, classes = logits.shape
    index, address = target.dtype is torch.int64, target.data_ptr()
    return (
        DTYPES[logits.dtype],
        1 if rows * classes <= SERIAL_NUMEL else torch.get_num_threads(),
        logits.data_ptr(),
        rows,
        classes,
        address if index else 0,
        ignore_index,
        0 if class_weight is None else class_weight.data_ptr(),
        0 if index else address,
        smoothing,
    )


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    mean: bool,
    losses: Tensor | None,
    save: bool,
) -> tuple[int, float, float, bytes]:
    """The reduced loss of contiguous rows [rows, classes], in one call.

    The target is int64 [rows], or probabilities of the logits' shape and dtype; `class_weight` is contiguous, in the
    compute dtype; `losses`, in it too, gets each row's own. Returns (bad_row, loss, denominator, saved): the
    denominator is torch's with `mean`, else 1, and `saved` is for `cross_entropy_grad`, and empty unless `save`.
    """
    return _native.cross_entropy(
        *_problem(logits, target, class_weight, ignore_index, smoothing),
        mean,
        0 if losses is None else losses.data_ptr(),
        save,
    )


def cross_entropy_grad(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    saved: bytes,
    scale: float,
    denominator: float,
    upstream: Tensor | None,
) -> Tensor:
    """The gradient of `cross_entropy` of the same arguments, times `scale` and, where given, the row's `upstream`."""
    grad = empty_like_pooled(logits)
    _native.cross_entropy_grad(
        *_problem(logits, target, class_weight, ignore_index, smoothing),
        saved,
        scale,
        denominator,
        0 if upstream is None else upstream.data_ptr(),
        grad.data_ptr(),
    )
    return grad


class PairRowStats(NamedTuple):
    """One value per row for p = softmax(first), q = softmax(second); what was not asked for is None.

    `saved` is what pair_row_grad needs, for the measures asked for here.
    """

    kl: Tensor | None
    reverse_kl: Tensor | None
    js: Tensor | None
    cross_entropy: Tensor | None
    entropy_p: Tensor | None
    entropy_q: Tensor | None
    nll_p: Tensor | None
    nll_q: Tensor | None
    same_top: Tensor | None
    saved: Tensor
    bad_row: int


def _same_rows(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or first.dtype != second.dtype:
        raise ValueError(
            f"two-row kernels take logits of one shape and dtype; got {tuple(first.shape)} {first.dtype} "
            f"and {tuple(second.shape)} {second.dtype}"
        )


def pair_row_stats(
    first: Tensor,
    second: Tensor,
    target: Tensor | None = None,
    *,
    class_dim: int = -1,
    ignore_index: int = -100,
    kl: bool = True,
    reverse_kl: bool = False,
    js: bool = False,
    cross_entropy: bool = False,
    entropy: bool = False,
    same_top: bool = True,
) -> PairRowStats:
    """Divergences of every row of `first` from the same row of `second`, in nats, in one read of both.

    kl = KL(p || q), reverse_kl = KL(q || p), cross_entropy = -sum p log q, entropy gives both rows' entropies, and a
    target the nll of both. kl alone is the cheapest, then kl and js; anything more computes everything. Of rows in
    lanes same_top costs something too.
    """
    _same_rows(first, second)
    real = torch.float64 if first.dtype == torch.float64 else torch.float32
    (first, second), (layout, other), _ = laid_out(class_dim, first, second)
    shape = _without(first.shape, class_dim)
    index = _plain(target, torch.int64)

    def out(wanted: bool) -> Tensor | None:
        return torch.empty(shape, dtype=real) if wanted else None

    kl_out, reverse_out, js_out, cross_out = out(kl), out(reverse_kl), out(js), out(cross_entropy)
    entropy_p, entropy_q = out(entropy), out(entropy)
    nll_p, nll_q = out(index is not None), out(index is not None)
    same = torch.empty(shape, dtype=torch.bool) if same_top else None
    saved = torch.empty([*shape, _native.PAIR_SAVED], dtype=torch.float64)
    bad_row = _native.pair_row_stats(
        DTYPES[first.dtype],
        torch.get_num_threads(),
        first.data_ptr(),
        *layout,
        second.data_ptr(),
        *other[3:],
        _address(index),
        ignore_index,
        _address(kl_out),
        _address(reverse_out),
        _address(js_out),
        _address(cross_out),
        _address(entropy_p),
        _address(entropy_q),
        _address(nll_p),
        _address(nll_q),
        _address(same),
        saved.data_ptr(),
    )
    return PairRowStats(
        kl_out, reverse_out, js_out, cross_out, entropy_p, entropy_q, nll_p, nll_q, same, saved, bad_row
    )


def pair_row_grad(
    first: Tensor,
    second: Tensor,
    saved: Tensor,
    target: Tensor | None = None,
    *,
    class_dim: int = -1,
    ignore_index: int = -100,
    kl: Tensor | None = None,
    reverse_kl: Tensor | None = None,
    js: Tensor | None = None,
    cross_entropy: Tensor | None = None,
    entropy_p: Tensor | None = None,
    entropy_q: Tensor | None = None,
    nll_p: Tensor | None = None,
    nll_q: Tensor | None = None,
    need_first: bool = True,
    need_second: bool = True,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients with respect to both rows' logits, given one upstream gradient per row and measure (None: zero).

    `saved` is of a pair_row_stats call that asked for every measure named here. `out` takes those that are needed, and
    may be the logits themselves.
    """
    _same_rows(first, second)
    real = torch.float64 if first.dtype == torch.float64 else torch.float32
    (first, second), (layout, other), split = laid_out(class_dim, first, second)
    wanted = zip((first, second), (need_first, need_second), out or (None, None), strict=True)
    outputs = [_gradient_like(source, class_dim, split, to) if need else None for source, need, to in wanted]
    index = _plain(target, torch.int64)
    shape = _without(first.shape, class_dim)
    upstream = [
        None if g is None else _plain(g.expand(shape), real)
        for g in (kl, reverse_kl, js, cross_entropy, entropy_p, entropy_q, nll_p, nll_q)
    ]
    arguments = [
        *(DTYPES[first.dtype], torch.get_num_threads(), first.data_ptr()),
        *layout,
        second.data_ptr(),
        *other[3:],
        *(_address(index), ignore_index, saved.data_ptr()),
        *(_address(g) for g in upstream),
    ]
    for made in outputs:
        arguments += (0, 0, 0, 0) if made is None else (made[0].data_ptr(), *made[1][3:])
    _native.pair_row_grad(*arguments)
    first_grad, second_grad = (None if made is None else made[0] for made in outputs)
    return first_grad, second_grad
