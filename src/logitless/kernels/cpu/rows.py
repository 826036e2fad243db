"""The compiled kernels on CPU tensors: allocate the outputs, pass addresses and strides, nothing else.

Values of targets are not checked here but by the kernel, which reports the first bad row. No autograd: the functions
take and give plain data. `float32` is the compute type of float16 and bfloat16 logits, and what their outputs have.
"""

import torch
from torch import Tensor

from logitless.kernels.cpu.memory import empty_like_pooled
from logitless.kernels.cpu.operands import address, gradient_like, optional, plain, without
from logitless.kernels.interface import RowStats
from logitless.kernels.layout import laid_out
from logitless.kernels.native import DTYPES
from logitless.kernels.native import extension as _native


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
    """Return `Backend.row_stats`, in one read of the logits.

    nll = lse - z[target] (with a target); smooth_sum = sum_j w_j (lse - z_j) (with `smooth`); with a dense target of
    the logits' shape and dtype, dense_sum = sum_j t_j w_j (lse - z_j) and dense_mass = sum_j t_j w_j, where
    0 * inf = 0. w is class_weight, or 1. The target is int64, of the logits' shape without the class dimension.
    """
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if (entropy or rank) and smooth and dense_target is None:
        raise ValueError("entropy or rank together with smooth needs a dense_target; make two calls")
    given = (logits,) if dense_target is None else (logits, dense_target)
    (logits, *dense), (layout, *dense_layouts), _ = laid_out(class_dim, *given)
    shape = logits.shape[:-1] if class_dim == -1 else without(logits.shape, class_dim)
    weight = plain(class_weight, real)
    index = plain(target, torch.int64)

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
        address(index),
        ignore_index,
        address(weight),
        *optional(dense, dense_layouts),
        address(nll),
        address(lse_out),
        row_max.data_ptr(),
        log_sum.data_ptr(),
        address(entropy_out),
        address(argmax_out),
        address(rank_out),
        address(smooth_sum),
        address(dense_sum),
        address(dense_mass),
    )
    return RowStats(
        row_max, log_sum, nll, lse_out, entropy_out, argmax_out, rank_out, smooth_sum, dense_sum, dense_mass, bad_row
    )


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
    a_extra: Tensor | float = 0.0,
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
    grad, grad_layout = gradient_like(source, class_dim, split, out)
    weight = plain(class_weight, real)
    index = plain(target, torch.int64)
    upstream = plain(upstream, real)
    rows = [plain(x, real) for x in (a, b, c, e, f)]
    _native.row_grad(
        DTYPES[source.dtype],
        torch.get_num_threads(),
        source.data_ptr(),
        *layout,
        grad.data_ptr(),
        *grad_layout[3:],
        address(index),
        ignore_index,
        address(weight),
        int(index_weight),
        *optional(dense, dense_layouts),
        row_max.data_ptr(),
        log_sum.data_ptr(),
        address(upstream),
        0 if upstream is None or upstream.numel() == 1 else 1,
        a_scale,
        b_scale,
        c_scale,
        e_scale,
        f_scale,
        float(a_extra),
        *(address(x) for x in rows),
    )
    return grad


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    mean: bool,
    result: Tensor | None,
    losses: Tensor | None,
    save: bool,
) -> tuple[int, float, bytes] | None:
    """`WholeCalls.cross_entropy`: the reduced loss of contiguous rows, in one call that looks at the tensors itself."""
    threads = torch.get_num_threads()
    return _native.cross_entropy(
        threads, logits, target, class_weight, ignore_index, smoothing, mean, result, losses, save
    )


def cross_entropy_grad(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, saved: bytes, upstream: Tensor
) -> Tensor:
    """The gradient of `cross_entropy` of the same tensors, times the upstream gradient."""
    grad = empty_like_pooled(logits)
    _native.cross_entropy_grad(torch.get_num_threads(), logits, target, class_weight, saved, upstream, grad)
    return grad
