"""The compiled kernels of two rows; see `rows`."""

from typing import Any

import torch
from torch import Tensor

from logitless.kernels.cpu.operands import address, gradient_like, plain, without
from logitless.kernels.interface import Divergence, DivergenceFamily, PairRowStats
from logitless.kernels.layout import laid_out
from logitless.kernels.native import DTYPES
from logitless.kernels.native import extension as _native

# As numbered in kernels.h.
_FAMILIES: dict[DivergenceFamily, int] = {"skewed_kl": 1, "weighted_js": 2, "total_variation": 3}


def _told(divergence: Divergence | None) -> tuple[int, float]:
    return (0, 0.0) if divergence is None else (_FAMILIES[divergence.family], divergence.weight)


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
    divergence: Divergence | None = None,
    same_top: bool = True,
) -> PairRowStats:
    """Divergences of every row of `first` from the same row of `second`, in nats, in one read of both.

    kl = KL(p || q), reverse_kl = KL(q || p), cross_entropy = -sum p log q, entropy gives both rows' entropies, and a
    target the nll of both. kl alone is the cheapest, then kl and js; anything more computes everything. A divergence
    comes alone. Of rows in lanes same_top costs something too.
    """
    _same_rows(first, second)
    real = torch.float64 if first.dtype == torch.float64 else torch.float32
    (first, second), (layout, other), _ = laid_out(class_dim, first, second)
    shape = without(first.shape, class_dim)
    index = plain(target, torch.int64)

    def out(wanted: bool) -> Tensor | None:
        return torch.empty(shape, dtype=real) if wanted else None

    kl_out, reverse_out, js_out, cross_out = out(kl), out(reverse_kl), out(js), out(cross_entropy)
    entropy_p, entropy_q = out(entropy), out(entropy)
    nll_p, nll_q = out(index is not None), out(index is not None)
    alone = out(divergence is not None)
    same = torch.empty(shape, dtype=torch.bool) if same_top else None
    saved = torch.empty([*shape, _native.PAIR_SAVED], dtype=torch.float64)
    bad_row = _native.pair_row_stats(
        DTYPES[first.dtype],
        torch.get_num_threads(),
        first.data_ptr(),
        *layout,
        second.data_ptr(),
        *other[3:],
        address(index),
        ignore_index,
        address(kl_out),
        address(reverse_out),
        address(js_out),
        address(cross_out),
        address(entropy_p),
        address(entropy_q),
        address(nll_p),
        address(nll_q),
        address(same),
        *_told(divergence),
        address(alone),
        saved.data_ptr(),
    )
    return PairRowStats(
        kl_out, reverse_out, js_out, cross_out, entropy_p, entropy_q, nll_p, nll_q, alone, same, saved, bad_row
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
    divergence: Divergence | None = None,
    divergence_grad: Tensor | None = None,
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
    outputs = [gradient_like(source, class_dim, split, to) if need else None for source, need, to in wanted]
    index = plain(target, torch.int64)
    shape = without(first.shape, class_dim)
    upstream = [
        None if g is None else plain(g.expand(shape), real)
        for g in (kl, reverse_kl, js, cross_entropy, entropy_p, entropy_q, nll_p, nll_q, divergence_grad)
    ]
    arguments: list[Any] = [  # integers but for a weight
        *(DTYPES[first.dtype], torch.get_num_threads(), first.data_ptr()),
        *layout,
        second.data_ptr(),
        *other[3:],
        *(address(index), ignore_index, saved.data_ptr()),
        *(address(g) for g in upstream[:-1]),
        *(*_told(None if divergence_grad is None else divergence), address(upstream[-1])),
    ]
    for made in outputs:
        arguments += (0, 0, 0, 0) if made is None else (made[0].data_ptr(), *made[1][3:])
    _native.pair_row_grad(*arguments)
    first_grad, second_grad = (None if made is None else made[0] for made in outputs)
    return first_grad, second_grad
