"""The compiled elementwise and cosine kernels on CPU tensors: binary cross-entropy, pointwise KL divergence, cosine.

Plain functions without autograd, and without checks of shapes: the caller has made them, and has sent what the kernels
do not take (other devices, subclasses, gradients for a target or a weight) to the reference. Any strides are read in
place; a gradient has its input's layout. Arithmetic is in float64 if any operand is float64, otherwise in float32;
sums are in float64 and do not depend on the number of threads.
"""

import torch
from torch import Tensor

from logitless.kernels.cpu.memory import empty_like_pooled
from logitless.kernels.interface import CosineRows, ElementLoss
from logitless.kernels.native import DTYPES
from logitless.kernels.native import extension as _native

__all__ = [
    "STORAGE",
    "bce",
    "bce_grad",
    "bce_logits",
    "bce_logits_grad",
    "bce_logits_sum",
    "bce_sum",
    "cosine_embedding",
    "cosine_embedding_grad",
    "cosine_similarity",
    "cosine_similarity_grad",
    "elements",
    "elements_grad",
    "elements_sum",
    "first_outside",
    "kl",
    "kl_grad",
    "kl_sum",
]

# What the kernels read, as numbered in binary.h.
STORAGE = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.int16: 6,
    torch.int8: 7,
    torch.uint8: 8,
    torch.bool: 8,
}
_BCE_LOGITS, _BCE_LOGITS_GRAD, _BCE, _BCE_GRAD, _KL, _KL_GRAD, _KL_LOG, _KL_LOG_GRAD = range(8)

_Operand = tuple[int, int, tuple[int, ...]] | None


def _operand(tensor: Tensor | None, shape: torch.Size) -> _Operand:
    """Return a tensor's address, storage and strides over `shape`, 0 where it is broadcast."""
    if tensor is None:
        return None
    storage = STORAGE[tensor.dtype]
    if tensor.dim() == 0:
        return tensor.data_ptr(), storage, ()
    if tensor.shape != shape:
        tensor = tensor.expand(shape)
    return tensor.data_ptr(), storage, tensor.stride()


def _elementwise(
    op: int,
    input: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    upstream: Tensor | None,
    scale: float,
    out: Tensor | None,
) -> tuple[float, int]:
    shape = target.shape
    float64 = torch.float64
    wide = (
        target.dtype is float64
        or (input is not None and input.dtype is float64)
        or (weight is not None and weight.dtype is float64)
        or (pos_weight is not None and pos_weight.dtype is float64)
        or (out is not None and out.dtype is float64)
    )
    return _native.elementwise(
        op,
        wide,
        torch.get_num_threads(),
        shape,
        _operand(input, shape),
        _operand(target, shape),
        _operand(weight, shape),
        _operand(pos_weight, shape),
        _operand(upstream, shape),
        scale,
        _operand(out, shape),
    )


def _like(input: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or dtype == input.dtype:
        return empty_like_pooled(input)
    return torch.empty_like(input, dtype=dtype)


def bce_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return `-weight (pos_weight t logsigmoid(x) + (1 - t) logsigmoid(-x))` of each element.

    `input` and `target` have one shape, and the weights broadcast to it from the right; 0 * inf = 0 as in the
    reference. The result has the input's layout, in `dtype` (the input's where None).
    """
    out = _like(input, dtype)
    _elementwise(_BCE_LOGITS, input, target, weight, pos_weight, None, 1.0, out)
    return out


def bce_logits_sum(
    input: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None
) -> float:
    """Return the sum of `bce_logits` over all elements, in one read of each operand and no memory of their size."""
    return _elementwise(_BCE_LOGITS, input, target, weight, pos_weight, None, 1.0, None)[0]


def bce_logits_grad(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    upstream: Tensor | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Return `scale upstream weight ((1 - t) sigmoid(x) - pos_weight t sigmoid(-x))`: the gradient for the input.

    `upstream` has the input's shape or is one number for all (1 where None); for a mean, scale is 1 / count. The
    result has the input's dtype and layout; `out` may be the input itself.
    """
    out = empty_like_pooled(input) if out is None else out
    _elementwise(_BCE_LOGITS_GRAD, input, target, weight, pos_weight, upstream, scale, out)
    return out


def bce(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, int]:
    """Return `-weight (t log p + (1 - t) log(1 - p))` of each element, each logarithm at least -100, and what is wrong.

    The second value is 0, or has bit 0 set where an input and bit 1 where a target is NaN or outside
    [0, 1]: the first value is then to be discarded, and `first_outside` finds the culprit.
    """
    out = _like(input, dtype)
    _, outside = _elementwise(_BCE, input, target, weight, None, None, 1.0, out)
    return out, outside


def bce_sum(input: Tensor, target: Tensor, weight: Tensor | None = None) -> tuple[float, int]:
    """Return the sum of `bce` over all elements, with its second value; reads each operand once and writes nothing."""
    return _elementwise(_BCE, input, target, weight, None, None, 1.0, None)


def bce_grad(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    upstream: Tensor | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Return `scale upstream weight (p - t) / max(p (1 - p), 1e-12)`, torch's gradient for the input.

    `upstream` and `scale` are as in `bce_logits_grad`; the result has the input's dtype and layout.
    """
    out = empty_like_pooled(input) if out is None else out
    _elementwise(_BCE_GRAD, input, target, weight, None, upstream, scale, out)
    return out


def first_outside(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the position of the first element, in row-major order, that is NaN or outside [0, 1]; None without one."""
    outside = ~((tensor >= 0) & (tensor <= 1))
    return tuple(outside.nonzero()[0].tolist()) if bool(outside.any()) else None


def kl(input: Tensor, target: Tensor, log_target: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return `t (log t - x)` of each element, with `t = exp(target)` for a log target; 0 where t is 0.

    Both have one shape. The result has the input's layout, in `dtype` (the input's where None).
    """
    out = _like(input, dtype)
    _elementwise(_KL_LOG if log_target else _KL, input, target, None, None, None, 1.0, out)
    return out


def kl_sum(input: Tensor, target: Tensor, log_target: bool = False) -> float:
    """Return the sum of `kl` over all elements, in one read of each operand and no memory of their size."""
    return _elementwise(_KL_LOG if log_target else _KL, input, target, None, None, None, 1.0, None)[0]


def kl_grad(
    input: Tensor,
    target: Tensor,
    log_target: bool = False,
    *,
    upstream: Tensor | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Return `-scale upstream t`, the gradient for the input, with its dtype and layout; its values are not read.

    `upstream` and `scale` are as in `bce_logits_grad`. Exactly 0 where t is 0.
    """
    out = empty_like_pooled(input) if out is None else out
    _elementwise(_KL_LOG_GRAD if log_target else _KL_GRAD, None, target, None, None, upstream, scale, out)
    return out


def elements(
    loss: ElementLoss,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, bool]:
    """Return `Backend.elements`."""
    if loss == "binary_cross_entropy_with_logits":
        return bce_logits(input, target, weight, pos_weight, dtype=dtype), False
    if loss == "binary_cross_entropy":
        values, outside = bce(input, target, weight, dtype=dtype)
        return values, outside != 0
    return kl(input, target, loss == "kl_div_log_target", dtype=dtype), False


def elements_sum(
    loss: ElementLoss,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> tuple[float, bool]:
    """Return `Backend.elements_sum`."""
    if loss == "binary_cross_entropy_with_logits":
        return bce_logits_sum(input, target, weight, pos_weight), False
    if loss == "binary_cross_entropy":
        total, outside = bce_sum(input, target, weight)
        return total, outside != 0
    return kl_sum(input, target, loss == "kl_div_log_target"), False


def elements_grad(
    loss: ElementLoss,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    upstream: Tensor | None = None,
    scale: Tensor | float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Return `Backend.elements_grad`."""
    factor = float(scale)
    if loss == "binary_cross_entropy_with_logits":
        return bce_logits_grad(input, target, weight, pos_weight, upstream=upstream, scale=factor, out=out)
    if loss == "binary_cross_entropy":
        return bce_grad(input, target, weight, upstream=upstream, scale=factor, out=out)
    return kl_grad(input, target, loss == "kl_div_log_target", upstream=upstream, scale=factor, out=out)


def _vectors(tensor: Tensor | None, shape: torch.Size) -> _Operand:
    if tensor is None:
        return None
    if tensor.shape != shape:
        tensor = tensor.expand(shape)
    return tensor.data_ptr(), STORAGE[tensor.dtype], tensor.stride()


def _cosine(
    x1: Tensor, x2: Tensor, dim: int, eps: float, target: Tensor | None, margin: float, save: bool
) -> CosineRows:
    shape = x1.shape if x1.shape == x2.shape else torch.broadcast_shapes(x1.shape, x2.shape)
    dim %= len(shape)
    rows = shape[:dim] + shape[dim + 1 :]
    out = torch.empty(rows, dtype=torch.float64 if x1.dtype is torch.float64 else torch.float32)
    saved = torch.empty((3, *rows), dtype=torch.float64) if save else None
    labels = _labels(target)
    _native.cosine(
        DTYPES[x1.dtype],
        torch.get_num_threads(),
        shape,
        dim,
        _vectors(x1, shape),
        _vectors(x2, shape),
        target is not None,
        eps,
        margin,
        0 if labels is None else labels.data_ptr(),
        out.data_ptr(),
        0 if saved is None else saved.data_ptr(),
    )
    return CosineRows(out, saved)


def _labels(target: Tensor | None) -> Tensor | None:
    """Return a label for each row as float64, which holds every dtype's 1 and -1 and no other value as them."""
    return None if target is None else target.to(torch.float64).contiguous()


def _cosine_grad(
    x1: Tensor,
    x2: Tensor,
    saved: Tensor,
    dim: int,
    eps: float,
    target: Tensor | None,
    margin: float,
    upstream: Tensor | None,
    scale: Tensor | float,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    shape = x1.shape
    dim %= len(shape)
    grad1 = empty_like_pooled(x1) if wanted[0] else None
    grad2 = empty_like_pooled(x2) if wanted[1] else None
    stride = 0
    if upstream is not None:
        if any(upstream.stride()) and upstream.numel() > 1:
            stride, upstream = 1, upstream.contiguous()
        upstream = upstream.to(torch.float64 if x1.dtype is torch.float64 else torch.float32)
    labels = _labels(target)
    _native.cosine_grad(
        DTYPES[x1.dtype],
        torch.get_num_threads(),
        shape,
        dim,
        _vectors(x1, shape),
        _vectors(x2, shape),
        target is not None,
        eps,
        margin,
        0 if labels is None else labels.data_ptr(),
        saved.data_ptr(),
        0 if upstream is None else upstream.data_ptr(),
        stride,
        float(scale),
        _vectors(grad1, shape),
        _vectors(grad2, shape),
    )
    return grad1, grad2


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8, *, save: bool = False) -> CosineRows:
    """Return `x1 . x2 / (max(|x1|, eps) max(|x2|, eps))` within [-1, 1] along `dim`, one read of each.

    Both have one dtype and shapes that broadcast (nothing is materialised). `out` is float64 for float64, otherwise
    float32, of the broadcast shape without `dim`. With `save`, `saved` (float64, (3, *out.shape)) is what
    `cosine_similarity_grad` needs.
    """
    return _cosine(x1, x2, dim, eps, None, 0.0, save)


def cosine_similarity_grad(
    x1: Tensor,
    x2: Tensor,
    saved: Tensor,
    dim: int = 1,
    eps: float = 1e-8,
    *,
    upstream: Tensor | None = None,
    scale: Tensor | float = 1.0,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients for x1 and x2, those that are wanted, in one read of both and one write of each.

    `scale upstream (x2 / (|x1| |x2|) - cos x1 / |x1|^2)` and its mirror image. Both vectors have one shape: a
    broadcast one's gradient is the reference's business. `upstream` has the output's shape or is one number for all
    (1 where None). A norm raised to eps is a constant; one that equals eps pulls halfway, as `torch.maximum`.
    """
    return _cosine_grad(x1, x2, saved, dim, eps, None, 0.0, upstream, scale, wanted)


def cosine_embedding(x1: Tensor, x2: Tensor, target: Tensor, margin: float = 0.0, *, save: bool = False) -> CosineRows:
    """Return `1 - cos` where the target is 1, `max(0, cos - margin)` where it is -1, and 0 elsewhere.

    The vectors lie along the last dimension, in one dtype and in shapes that broadcast; the target has the broadcast
    shape without it. 1e-12 is added to each squared norm, as torch does. `out`, `saved`: as in `cosine_similarity`.
    """
    return _cosine(x1, x2, -1, 0.0, target, margin, save)


def cosine_embedding_grad(
    x1: Tensor,
    x2: Tensor,
    target: Tensor,
    saved: Tensor,
    margin: float = 0.0,
    *,
    upstream: Tensor | None = None,
    scale: Tensor | float = 1.0,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients for x1 and x2 of `cosine_embedding`, those that are wanted; both have one shape.

    Exactly 0 for a pair that costs nothing. `upstream` and `scale` are as in `cosine_similarity_grad`.
    """
    return _cosine_grad(x1, x2, saved, -1, 0.0, target, margin, upstream, scale, wanted)
