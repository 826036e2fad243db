"""Losses of single elements, their sums and gradients, as Triton kernels; cosines are in `cosine_kernels`.

Formula, for an input x (or probability p) and a target t:

    logits          -(v t log sigmoid(x) + (1 - t) log sigmoid(-x)),   -log sigmoid(x) = max(-x, 0) + log1p(exp(-|x|))
    probabilities   -(t log p + (1 - t) log(1 - p)), each logarithm at least -100
    kl              t (log t - x), 0 where t is; of a log target t (target - x) with t = exp(target)

times the weight, v being `pos_weight`, and for the input the gradients of `reference.elements_grad`. Which loss is a
constant of the compiled kernel.

Layout: elements in the order of the input's memory, up to three dimensions with a stride of each operand (0 where one
is broadcast), a block of elements a program.

Precision policy: float32, or float64 where any operand is; sums of a block in float64, and of these the total.
"""

import triton
import triton.language as tl

from logitless.kernels.triton.arithmetic import exp, log, log1p_near, rounded, times

BCE_LOGITS = tl.constexpr(0)
BCE = tl.constexpr(1)
KL = tl.constexpr(2)
KL_LOG = tl.constexpr(3)


@triton.jit
def _exp_of_any(x):
    return tl.where(x > 80.0, tl.exp(x), exp(tl.where(x > 80.0, 0.0, x), 0.0, True))


@triton.jit
def _value(x, t, positive, LOSS: tl.constexpr):
    if LOSS == BCE_LOGITS:
        softened = log1p_near(exp(-tl.abs(x), 0.0, True))
        below = tl.where(x < 0, -x, 0.0) + softened  # -log sigmoid(x)
        above = tl.where(x > 0, x, 0.0) + softened
        return times(positive, below) + times(1.0 - t, above)
    elif LOSS == BCE:
        small = x <= 0.5
        log_p = log(x)
        log_q = tl.where(small, log1p_near(tl.where(small & (x >= 0), -x, 0.0)), log(1.0 - x))
        log_p = tl.where(log_p < -100.0, -100.0, log_p)
        log_q = tl.where(log_q < -100.0, -100.0, log_q)
        return -(t * log_p + (1.0 - t) * log_q)
    elif LOSS == KL:
        absent = t == 0
        return tl.where(absent, 0.0, t * (log(tl.where(absent, 1.0, t)) - tl.where(absent, 0.0, x)))
    else:
        p = _exp_of_any(t)
        absent = p == 0
        return tl.where(absent, 0.0, p * (tl.where(absent, 0.0, t) - tl.where(absent, 0.0, x)))


@triton.jit
def _slope(x, t, positive, LOSS: tl.constexpr):
    if LOSS == BCE_LOGITS:
        e = exp(-tl.abs(x), 0.0, True)
        high = 1.0 / (1.0 + e)
        low = e / (1.0 + e)
        rising = x >= 0
        return (1.0 - t) * tl.where(rising, high, low) - positive * tl.where(rising, low, high)
    elif LOSS == BCE:
        spread = x * (1.0 - x)
        return (x - t) / tl.where(spread < 1e-12, 1e-12, spread)
    elif LOSS == KL:
        return -t
    else:
        return -_exp_of_any(t)


@triton.jit
def _load(ptr, first, second, third, stride0, stride1, stride2, inside, REAL: tl.constexpr):
    return tl.load(ptr + first * stride0 + second * stride1 + third * stride2, mask=inside, other=0.0).to(REAL)


@triton.jit
def elements_kernel(
    input_ptr,
    target_ptr,
    weight_ptr,
    pos_weight_ptr,
    upstream_ptr,
    out_ptr,
    sums_ptr,
    scale_ptr,
    numel,
    size1,
    size2,
    input_stride0,
    input_stride1,
    input_stride2,
    target_stride0,
    target_stride1,
    target_stride2,
    weight_stride0,
    weight_stride1,
    weight_stride2,
    pos_weight_stride0,
    pos_weight_stride1,
    pos_weight_stride2,
    upstream_stride0,
    upstream_stride1,
    upstream_stride2,
    out_stride0,
    out_stride1,
    out_stride2,
    scale: tl.float64,
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """Write a value or slope of each element, or the sum of a block of them."""
    if WIDE:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    else:
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numel
    first = place * 0
    second = place * 0
    third = place
    if DIMS == 2:
        second = place // size2
        third = place % size2
    if DIMS == 3:
        first = place // size2 // size1
        second = place // size2 % size1
        third = place % size2
    first = first.to(tl.int64)
    second = second.to(tl.int64)
    third = third.to(tl.int64)
    t = _load(target_ptr, first, second, third, target_stride0, target_stride1, target_stride2, inside, REAL)
    if input_ptr is not None:
        x = _load(input_ptr, first, second, third, input_stride0, input_stride1, input_stride2, inside, REAL)
    else:
        x = t
    positive = t
    if pos_weight_ptr is not None:
        positive = t * _load(
            pos_weight_ptr,
            first,
            second,
            third,
            pos_weight_stride0,
            pos_weight_stride1,
            pos_weight_stride2,
            inside,
            REAL,
        )
    if GRADIENT:
        value = _slope(x, t, positive, LOSS)
    else:
        value = _value(x, t, positive, LOSS)
    if weight_ptr is not None:
        weight = _load(weight_ptr, first, second, third, weight_stride0, weight_stride1, weight_stride2, inside, REAL)
        value = value * weight if GRADIENT else times(weight, value)
    if GRADIENT:
        if upstream_ptr is not None:
            given = _load(
                upstream_ptr, first, second, third, upstream_stride0, upstream_stride1, upstream_stride2, inside, REAL
            )
            value = times(value, given)
        factor = tl.full([BLOCK], scale, tl.float64)
        if scale_ptr is not None:
            factor = factor * tl.load(scale_ptr).to(tl.float64)
        value = value * factor.to(REAL)
    if sums_ptr is not None:
        # Where nothing was read there is nothing to add.
        total = tl.sum(tl.where(inside, value, 0.0).to(tl.float64), 0)
        tl.store(sums_ptr + tl.program_id(0), total)
    else:
        to = out_ptr + first * out_stride0 + second * out_stride1 + third * out_stride2
        tl.store(to, rounded(value, out_ptr), mask=inside)
