"""Two rows of logits z and y: their divergences and the gradients, as Triton kernels; the rows' own log-sums are given.

Formula, with p = softmax z, q = softmax y, d_j = log q_j - log p_j = (y_j - z_j) - K and K = lse(y) - lse(z):

    KL(p || q) = sum p (exp(d) - 1 - d)                   every term is >= 0
    m = w p + (1 - w) q, of p and q `larger` and `smaller` with weights A and B, e = exp(-|d|):
    m / larger = 1 + u, u = -B (1 - e)         m / smaller = 1 + v, v = A (1 - e) / e
    KL(p || m) = sum p psi(m / p - 1), psi(x) = x - log1p(x) >= 0, and of q the same; weight w of the first and 1 - w of
    the second are the JS divergence
    TV = sum over q > p of (q - p)

and the gradients of `reference.pair_row_grad`. Which of them is computed is a constant of the compiled kernel.

Layout: as in `row_kernels`: a program has ROWS rows and passes over their classes in blocks, long rows are split and
joined, offsets are int64. The statistics read each row twice: once by `row_kernels`, once here.

Precision policy: as in `row_kernels`; d is made of two differences of which no rounding is lost. The log-sums were
rounded, which shifts every d of a row alike, by what sum p (exp(d) - 1) shows, as it ought to be 0: its square is taken
out of the divergences, itself out of the total variation and of K, as the gradient has it. log1p(x) = 2 atanh(s) and
psi(x) = s (x - 2 s^2 T(s^2)) with s = x / (2 + x), in which nothing cancels; beyond 1 + u = 1/2 and v = 1 logarithms
are taken, and no cancellation there costs more than three bits.
"""

import triton
import triton.language as tl

from logitless.kernels.triton.arithmetic import (
    atanh_tail,
    difference,
    exp,
    exp_beyond_line,
    expm1_wide,
    rounded,
    times,
)

# Sums of a row, or of a part of one. Of the divergence that is asked for alone the last seven mean something else.
SUMS = tl.constexpr(8)
# What is saved of a row: both tops and log-sums, K, and what the gradient is made of.
SAVED = tl.constexpr(12)

SKEWED_KL = tl.constexpr(1)
WEIGHTED_JS = tl.constexpr(2)
TOTAL_VARIATION = tl.constexpr(3)


@triton.jit
def _log_ratio(z, y, shift, shift_low, REAL: tl.constexpr):
    """Return d = (y - z) - K; 0 of a class that both exclude."""
    if REAL == tl.float64:
        d = (y - z) - shift
    else:
        apart, low = difference(y, z)
        above, lower = difference(apart, shift)
        d = above + (lower + (low - shift_low))
    return tl.where((z == float("-inf")) & (y == float("-inf")), 0.0, d)


@triton.jit
def _probability(z, top, log_sum, log_sum_low, FINE: tl.constexpr):
    if FINE:
        apart, low = difference(z, top)
        below, lower = difference(apart, log_sum)
        return exp(below, low + (lower - log_sum_low), FINE)
    else:
        return exp((z - top) - log_sum, 0.0, FINE)


@triton.jit
def _brackets(d):
    """Return whether d is small, d where it is, and exp(d) - 1 - d there."""
    near = (d < 1.0) & (d > -1.0)
    small = tl.where(near, d, 0.0)
    return near, small, exp_beyond_line(small)


@triton.jit
def _divergence_term(p, q, d, near, bracket):
    """Return p (exp(d) - 1 - d) = q - p - p d."""
    far = (q - p) - p * tl.where(p == 0, 0.0, d)
    return tl.where(near, p * bracket, tl.where(p == 0, q, far))


@triton.jit
def _mixture(p, q, d, weight, WEIGHT_REAL: tl.constexpr):
    """Return of each class p's and q's terms of the divergences from the mixture, log m/p, log m/q, 1 - p/m, and
    log m/p less the last."""
    q_larger = d > 0
    of_p = weight.to(WEIGHT_REAL)
    of_q = (1.0 - weight).to(WEIGHT_REAL)
    larger_weight = tl.where(q_larger, of_q, of_p)  # A
    smaller_weight = tl.where(q_larger, of_p, of_q)  # B
    larger = tl.where(q_larger, q, p)
    smaller = tl.where(q_larger, p, q)
    # Beyond these the smaller is 0 beside any weight.
    nothing = 700.0 if WEIGHT_REAL == tl.float64 else 80.0
    gap = tl.minimum(tl.abs(d), nothing)
    e = exp(-gap, 0.0, True)
    close = gap < 1.0
    small = tl.where(close, gap, 0.0)
    lost = tl.where(close, small - exp_beyond_line(-small), 1.0 - e)  # 1 - e
    ratio = larger_weight + smaller_weight * e  # m / larger
    u = -smaller_weight * lost
    apart = ratio < 0.5
    held = tl.where(apart, 0.0, u)
    s = held / (2.0 + held)
    tail = s * s * atanh_tail(s * s)
    logarithm = tl.log(tl.where(apart, ratio, 1.0))
    log_larger = tl.where(apart, logarithm, s * (2.0 + 2.0 * tail))
    psi = tl.where(apart, u - logarithm, s * (held - 2.0 * tail))
    above = larger_weight * lost  # v e
    far = above > e
    s_small = tl.where(far, 0.0, above / (2.0 * e + above))
    tail_small = s_small * s_small * atanh_tail(s_small * s_small)
    log_smaller = tl.where(far, log_larger + gap, s_small * (2.0 + 2.0 * tail_small))
    rise = above * larger  # smaller v
    of_smaller = tl.where(far, rise - smaller * log_smaller, s_small * (rise - 2.0 * smaller * tail_small))
    of_larger = larger * psi
    part = of_q * lost / ratio
    share = tl.where(q_larger, part, -part)
    log_p = tl.where(q_larger, log_smaller, log_larger)
    log_q = tl.where(q_larger, log_larger, log_smaller)
    bent = tl.where(q_larger, s_small, s) * (share + 2.0 * tl.where(q_larger, tail_small, tail))
    less = tl.where(tl.where(q_larger, far, apart), log_p - share, bent)
    term_p = tl.where(q_larger, of_smaller, of_larger)
    term_q = tl.where(q_larger, of_larger, of_smaller)
    return term_p, term_q, log_p, log_q, share, less


@triton.jit
def _row_of(top_ptr, sum_ptr, row, there, REAL: tl.constexpr):
    """Return a row's top and log-sum, and what the log-sum has beyond float32."""
    top = tl.load(top_ptr + row, mask=there, other=0.0)
    log_sum_wide = tl.load(sum_ptr + row, mask=there, other=0.0)
    log_sum = log_sum_wide.to(REAL)
    return top, log_sum_wide, log_sum, (log_sum_wide - log_sum.to(tl.float64)).to(REAL)


@triton.jit
def _not_negative(value):
    return tl.where(value < 0, 0.0, value)


@triton.jit
def _write_pair(
    shown,
    first_sum,
    second_sum,
    third_sum,
    fourth_sum,
    fifth_sum,
    sixth_sum,
    seventh_sum,
    row,
    there,
    first_ptr,
    second_ptr,
    first_top,
    first_log_sum,
    second_top,
    second_log_sum,
    target_ptr,
    kl_ptr,
    reverse_kl_ptr,
    js_ptr,
    cross_entropy_ptr,
    entropy_p_ptr,
    entropy_q_ptr,
    nll_p_ptr,
    nll_q_ptr,
    divergence_ptr,
    saved_ptr,
    first_class_stride,
    second_class_stride,
    classes,
    ignore_index,
    weight,
    FAMILY: tl.constexpr,
    REAL: tl.constexpr,
):
    """Write the measures of rows, given their sums in float64; `first_ptr` is where each row begins."""
    at = saved_ptr + row * SAVED
    shift = (second_top - first_top) + (second_log_sum - first_log_sum)
    # What shifted every d: exp(shift of d) - 1. It is of the size of a rounding, or nothing is a number.
    small = tl.where(tl.abs(shown) < 0.01, shown, 0.0)
    square = small * small * (0.5 - small / 3.0)
    tl.store(at, first_top, mask=there)
    tl.store(at + 1, first_log_sum, mask=there)
    tl.store(at + 2, second_top, mask=there)
    tl.store(at + 3, second_log_sum, mask=there)
    if FAMILY == TOTAL_VARIATION:
        tl.store(at + 4, shift, mask=there)
        tl.store(at + 5, first_sum, mask=there)
    else:
        tl.store(at + 4, shift + small, mask=there)
    if FAMILY == 0:
        first_sum = _not_negative(first_sum - square)
        second_sum = _not_negative(second_sum - square)
        tl.store(at + 5, first_sum, mask=there)
        js = _not_negative((third_sum + fourth_sum) / 2.0 - square / 4.0)
        if kl_ptr is not None:
            tl.store(kl_ptr + row, first_sum.to(REAL), mask=there)
        if reverse_kl_ptr is not None:
            tl.store(reverse_kl_ptr + row, second_sum.to(REAL), mask=there)
        if js_ptr is not None:
            tl.store(js_ptr + row, js.to(REAL), mask=there)
        if cross_entropy_ptr is not None:
            tl.store(cross_entropy_ptr + row, fifth_sum.to(REAL), mask=there)
        if entropy_p_ptr is not None:
            tl.store(entropy_p_ptr + row, sixth_sum.to(REAL), mask=there)
            tl.store(entropy_q_ptr + row, seventh_sum.to(REAL), mask=there)
    elif FAMILY == SKEWED_KL:
        value = _not_negative(first_sum - (1.0 - weight) * (1.0 - weight) * square)
        second_sum -= small * third_sum
        tl.store(at + 5, value, mask=there)
        tl.store(divergence_ptr + row, value.to(REAL), mask=there)
    elif FAMILY == WEIGHTED_JS:
        value = weight * first_sum + (1.0 - weight) * second_sum
        value = _not_negative(value - weight * (1.0 - weight) * square)
        tl.store(at + 5, first_sum, mask=there)
        tl.store(divergence_ptr + row, value.to(REAL), mask=there)
    else:
        # Here the sums are of q - p where q is larger, of q there, and of p there, where p is larger, where neither is.
        value = _not_negative(first_sum - shown * second_sum)
        tl.store(divergence_ptr + row, value.to(REAL), mask=there)
    tl.store(at + 6, second_sum, mask=there)
    tl.store(at + 7, third_sum, mask=there)
    tl.store(at + 8, fourth_sum, mask=there)
    tl.store(at + 9, fifth_sum, mask=there)
    tl.store(at + 10, sixth_sum, mask=there)
    tl.store(at + 11, seventh_sum, mask=there)
    if target_ptr is not None:
        index = tl.load(target_ptr + row, mask=there, other=0)
        live = there & (index != ignore_index)
        known = live & (index >= 0) & (index < classes)
        place = tl.where(known, index, 0)
        z = tl.load(first_ptr + place * first_class_stride, mask=known, other=0.0).to(tl.float64)
        y = tl.load(second_ptr + place * second_class_stride, mask=known, other=0.0).to(tl.float64)
        nll_p = tl.where(known, (first_top - z) + first_log_sum, float("nan"))
        nll_q = tl.where(known, (second_top - y) + second_log_sum, float("nan"))
        tl.store(nll_p_ptr + row, tl.where(live, nll_p, 0.0).to(REAL), mask=there)
        tl.store(nll_q_ptr + row, tl.where(live, nll_q, 0.0).to(REAL), mask=there)


@triton.jit
def pair_stats_kernel(
    first_ptr,
    second_ptr,
    first_top_ptr,
    first_sum_ptr,
    second_top_ptr,
    second_sum_ptr,
    target_ptr,
    kl_ptr,
    reverse_kl_ptr,
    js_ptr,
    cross_entropy_ptr,
    entropy_p_ptr,
    entropy_q_ptr,
    nll_p_ptr,
    nll_q_ptr,
    divergence_ptr,
    saved_ptr,
    parts_ptr,
    rows,
    classes,
    inner,
    first_outer_stride,
    first_class_stride,
    first_inner_stride,
    second_outer_stride,
    second_class_stride,
    second_inner_stride,
    ignore_index,
    part_classes,
    weight: tl.float64,
    FAMILY: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
    FINE: tl.constexpr,
):
    """Add up what the measures of each pair, or of a part of it, are made of."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    first = first_ptr + (row // inner) * first_outer_stride + (row % inner) * first_inner_stride
    second = second_ptr + (row // inner) * second_outer_stride + (row % inner) * second_inner_stride
    top, log_sum_wide, log_sum, log_sum_low = _row_of(first_top_ptr, first_sum_ptr, row, there, REAL)
    top2, log_sum_wide2, log_sum2, log_sum_low2 = _row_of(second_top_ptr, second_sum_ptr, row, there, REAL)
    first_top = top.to(tl.float64)
    second_top = top2.to(tl.float64)
    shift_wide = (second_top - first_top) + (log_sum_wide2 - log_sum_wide)
    shift = shift_wide.to(REAL)
    shift_low = (shift_wide - shift.to(tl.float64)).to(REAL)
    mixed = tl.full([ROWS, BLOCK], weight, tl.float64)

    sum0 = tl.zeros([ROWS, BLOCK], REAL)
    sum1 = tl.zeros([ROWS, BLOCK], REAL)
    sum2 = tl.zeros([ROWS, BLOCK], REAL)
    sum3 = tl.zeros([ROWS, BLOCK], REAL)
    sum4 = tl.zeros([ROWS, BLOCK], REAL)
    sum5 = tl.zeros([ROWS, BLOCK], REAL)
    sum6 = tl.zeros([ROWS, BLOCK], REAL)
    sum7 = tl.zeros([ROWS, BLOCK], REAL)
    part = tl.program_id(1) * part_classes
    stop = tl.minimum(part + part_classes, classes)
    for start in range(part, stop, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = there[:, None] & (column < stop)[None, :]
        place = column.to(tl.int64)[None, :]
        # Beyond the last class there is a class that both exclude.
        z = tl.load(first[:, None] + place * first_class_stride, mask=inside, other=float("-inf")).to(REAL)
        y = tl.load(second[:, None] + place * second_class_stride, mask=inside, other=float("-inf")).to(REAL)
        d = _log_ratio(z, y, shift[:, None], shift_low[:, None], REAL)
        p = _probability(z, top[:, None].to(REAL), log_sum[:, None], log_sum_low[:, None], FINE)
        q = _probability(y, top2[:, None].to(REAL), log_sum2[:, None], log_sum_low2[:, None], FINE)
        near, small, bracket = _brackets(d)
        apart = tl.where(near, p * (bracket + small), q - p)
        sum0 += apart
        if FAMILY == 0:
            if kl_ptr is not None:
                sum1 += _divergence_term(p, q, d, near, bracket)
            if reverse_kl_ptr is not None:
                sum2 += _divergence_term(q, p, -d, near, exp_beyond_line(-small))
            if js_ptr is not None:
                from_p, from_q, _log_p, _log_q, _share, _less = _mixture(p, q, d, mixed, REAL)
                sum3 += from_p
                sum4 += from_q
            if (cross_entropy_ptr is not None) or (entropy_p_ptr is not None):
                surprise_q = (top2[:, None].to(REAL) - y) + log_sum2[:, None]
                if cross_entropy_ptr is not None:
                    sum5 += times(p, surprise_q)
                if entropy_p_ptr is not None:
                    sum6 += times(p, (top[:, None].to(REAL) - z) + log_sum[:, None])
                    sum7 += times(q, surprise_q)
        elif FAMILY == TOTAL_VARIATION:
            sum1 += tl.where(d > 0, apart, 0.0)
            sum2 += tl.where(d > 0, q, 0.0)
            sum3 += tl.where(d > 0, p, 0.0)
            sum4 += tl.where(d < 0, p, 0.0)
            sum5 += tl.where(d < 0, q, 0.0)
            sum6 += tl.where(d == 0, p, 0.0)
            sum7 += tl.where(d == 0, q, 0.0)
        else:
            from_p, from_q, _log_p, _log_q, share, _less = _mixture(p, q, d, mixed, REAL)
            sum1 += from_p
            if FAMILY == SKEWED_KL:
                sum2 += p * share
                # By how much that changes with d.
                sum3 += p * (1.0 - share) * ((1.0 - mixed).to(REAL) + mixed.to(REAL) * share)
            else:
                sum2 += from_q

    shown = tl.sum(sum0.to(tl.float64), 1)
    total1 = tl.sum(sum1.to(tl.float64), 1)
    total2 = tl.sum(sum2.to(tl.float64), 1)
    total3 = tl.sum(sum3.to(tl.float64), 1)
    total4 = tl.sum(sum4.to(tl.float64), 1)
    total5 = tl.sum(sum5.to(tl.float64), 1)
    total6 = tl.sum(sum6.to(tl.float64), 1)
    total7 = tl.sum(sum7.to(tl.float64), 1)
    if SPLIT:
        at = parts_ptr + (tl.program_id(1).to(tl.int64) * SUMS) * rows + row
        tl.store(at, shown, mask=there)
        tl.store(at + rows, total1, mask=there)
        tl.store(at + 2 * rows, total2, mask=there)
        tl.store(at + 3 * rows, total3, mask=there)
        tl.store(at + 4 * rows, total4, mask=there)
        tl.store(at + 5 * rows, total5, mask=there)
        tl.store(at + 6 * rows, total6, mask=there)
        tl.store(at + 7 * rows, total7, mask=there)
    else:
        _write_pair(
            shown,
            total1,
            total2,
            total3,
            total4,
            total5,
            total6,
            total7,
            row,
            there,
            first,
            second,
            first_top,
            log_sum_wide,
            second_top,
            log_sum_wide2,
            target_ptr,
            kl_ptr,
            reverse_kl_ptr,
            js_ptr,
            cross_entropy_ptr,
            entropy_p_ptr,
            entropy_q_ptr,
            nll_p_ptr,
            nll_q_ptr,
            divergence_ptr,
            saved_ptr,
            first_class_stride,
            second_class_stride,
            classes,
            ignore_index,
            tl.full([ROWS], weight, tl.float64),
            FAMILY,
            REAL,
        )


@triton.jit
def pair_join_kernel(
    first_ptr,
    second_ptr,
    first_top_ptr,
    first_sum_ptr,
    second_top_ptr,
    second_sum_ptr,
    target_ptr,
    kl_ptr,
    reverse_kl_ptr,
    js_ptr,
    cross_entropy_ptr,
    entropy_p_ptr,
    entropy_q_ptr,
    nll_p_ptr,
    nll_q_ptr,
    divergence_ptr,
    saved_ptr,
    parts_ptr,
    rows,
    classes,
    inner,
    first_outer_stride,
    first_class_stride,
    first_inner_stride,
    second_outer_stride,
    second_class_stride,
    second_inner_stride,
    ignore_index,
    parts,
    weight: tl.float64,
    FAMILY: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    REAL: tl.constexpr,
):
    """Add up the parts of each pair."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    first = first_ptr + (row // inner) * first_outer_stride + (row % inner) * first_inner_stride
    second = second_ptr + (row // inner) * second_outer_stride + (row % inner) * second_inner_stride
    top, log_sum_wide, _log_sum, _low = _row_of(first_top_ptr, first_sum_ptr, row, there, REAL)
    top2, log_sum_wide2, _log_sum2, _low2 = _row_of(second_top_ptr, second_sum_ptr, row, there, REAL)
    part = tl.arange(0, PARTS)
    inside = there[:, None] & (part < parts)[None, :]
    at = parts_ptr + (part.to(tl.int64) * SUMS * rows)[None, :] + row[:, None]
    _write_pair(
        tl.sum(tl.load(at, mask=inside, other=0.0), 1),
        tl.sum(tl.load(at + rows, mask=inside, other=0.0), 1),
        tl.sum(tl.load(at + 2 * rows, mask=inside, other=0.0), 1),
        tl.sum(tl.load(at + 3 * rows, mask=inside, other=0.0), 1),
        tl.sum(tl.load(at + 4 * rows, mask=inside, other=0.0), 1),
        tl.sum(tl.load(at + 5 * rows, mask=inside, other=0.0), 1),
        tl.sum(tl.load(at + 6 * rows, mask=inside, other=0.0), 1),
        tl.sum(tl.load(at + 7 * rows, mask=inside, other=0.0), 1),
        row,
        there,
        first,
        second,
        top.to(tl.float64),
        log_sum_wide,
        top2.to(tl.float64),
        log_sum_wide2,
        target_ptr,
        kl_ptr,
        reverse_kl_ptr,
        js_ptr,
        cross_entropy_ptr,
        entropy_p_ptr,
        entropy_q_ptr,
        nll_p_ptr,
        nll_q_ptr,
        divergence_ptr,
        saved_ptr,
        first_class_stride,
        second_class_stride,
        classes,
        ignore_index,
        tl.full([ROWS], weight, tl.float64),
        FAMILY,
        REAL,
    )


@triton.jit
def _upstream(values_ptr, row, there, REAL: tl.constexpr):
    return tl.load(values_ptr + row, mask=there, other=0.0).to(REAL)[:, None]


@triton.jit
def _saved(saved_ptr, row, there, PLACE: tl.constexpr, REAL: tl.constexpr):
    return tl.load(saved_ptr + row * SAVED + PLACE, mask=there, other=0.0).to(REAL)[:, None]


@triton.jit
def _bent(p, values):
    """Return p times values, 0 where p is."""
    return tl.where(p == 0, 0.0, p * values)


@triton.jit
def _to_target(p, z_ptr, top, log_sum, index, live, known, class_stride, place, REAL: tl.constexpr):
    """Return p_j - [j = target]: at the target expm1(-nll); 0 of ignored rows, NaN where the class does not exist."""
    z = tl.load(z_ptr + index * class_stride, mask=known, other=0.0).to(tl.float64)
    at_target = expm1_wide((z - top) - log_sum).to(REAL)
    slope = tl.where(place == index[:, None], at_target[:, None], p)
    return tl.where(live[:, None], tl.where(known[:, None], slope, float("nan")), 0.0)


@triton.jit
def pair_grad_kernel(
    first_ptr,
    second_ptr,
    first_grad_ptr,
    second_grad_ptr,
    saved_ptr,
    target_ptr,
    kl_ptr,
    reverse_kl_ptr,
    js_ptr,
    cross_entropy_ptr,
    entropy_p_ptr,
    entropy_q_ptr,
    nll_p_ptr,
    nll_q_ptr,
    divergence_ptr,
    rows,
    classes,
    inner,
    first_outer_stride,
    first_class_stride,
    first_inner_stride,
    second_outer_stride,
    second_class_stride,
    second_inner_stride,
    first_grad_outer_stride,
    first_grad_class_stride,
    first_grad_inner_stride,
    second_grad_outer_stride,
    second_grad_class_stride,
    second_grad_inner_stride,
    ignore_index,
    part_classes,
    weight: tl.float64,
    FAMILY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
    FINE: tl.constexpr,
    SAME_BYTES: tl.constexpr,
):
    """Write the gradients of each pair that are wanted."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    first = first_ptr + (row // inner) * first_outer_stride + (row % inner) * first_inner_stride
    second = second_ptr + (row // inner) * second_outer_stride + (row % inner) * second_inner_stride
    saved = saved_ptr + row * SAVED
    first_top = tl.load(saved, mask=there, other=0.0)
    first_log_sum = tl.load(saved + 1, mask=there, other=0.0)
    second_top = tl.load(saved + 2, mask=there, other=0.0)
    second_log_sum = tl.load(saved + 3, mask=there, other=0.0)
    shift_wide = tl.load(saved + 4, mask=there, other=0.0)
    top = first_top.to(REAL)[:, None]
    top2 = second_top.to(REAL)[:, None]
    log_sum = first_log_sum.to(REAL)
    log_sum_low = (first_log_sum - log_sum.to(tl.float64)).to(REAL)[:, None]
    log_sum2 = second_log_sum.to(REAL)
    log_sum_low2 = (second_log_sum - log_sum2.to(tl.float64)).to(REAL)[:, None]
    shift = shift_wide.to(REAL)
    shift_low = (shift_wide - shift.to(tl.float64)).to(REAL)[:, None]
    mixed = tl.full([ROWS, BLOCK], weight, tl.float64)
    index = tl.zeros([ROWS], tl.int64)
    live = there
    known = there
    if target_ptr is not None:
        index = tl.load(target_ptr + row, mask=there, other=0)
        live = there & (index != ignore_index)
        known = live & (index >= 0) & (index < classes)
        index = tl.where(known, index, 0)

    part = tl.program_id(1) * part_classes
    stop = tl.minimum(part + part_classes, classes)
    for start in range(part, stop, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = there[:, None] & (column < stop)[None, :]
        place = column.to(tl.int64)[None, :]
        z = tl.load(first[:, None] + place * first_class_stride, mask=inside, other=float("-inf")).to(REAL)
        y = tl.load(second[:, None] + place * second_class_stride, mask=inside, other=float("-inf")).to(REAL)
        d = _log_ratio(z, y, shift[:, None], shift_low, REAL)
        p = _probability(z, top, log_sum[:, None], log_sum_low, FINE)
        q = _probability(y, top2, log_sum2[:, None], log_sum_low2, FINE)
        near, small, bracket = _brackets(d)
        apart = tl.where(near, p * (bracket + small), q - p)
        to_first = tl.zeros([ROWS, BLOCK], REAL)
        to_second = tl.zeros([ROWS, BLOCK], REAL)
        if kl_ptr is not None:
            given = _upstream(kl_ptr, row, there, REAL)
            to_first += given * _bent(p, -d - _saved(saved_ptr, row, there, 5, REAL))
            to_second += given * apart
        if reverse_kl_ptr is not None:
            given = _upstream(reverse_kl_ptr, row, there, REAL)
            to_first -= given * apart
            to_second += given * _bent(q, d - _saved(saved_ptr, row, there, 6, REAL))
        if js_ptr is not None:
            given = _upstream(js_ptr, row, there, REAL) * 0.5
            _from_p, _from_q, log_p, log_q, _share, _less = _mixture(p, q, d, mixed, REAL)
            to_first += given * _bent(p, -log_p - _saved(saved_ptr, row, there, 7, REAL))
            to_second += given * _bent(q, -log_q - _saved(saved_ptr, row, there, 8, REAL))
        surprise_q = (top2 - y) + log_sum2[:, None]
        if cross_entropy_ptr is not None:
            given = _upstream(cross_entropy_ptr, row, there, REAL)
            to_first += given * _bent(p, surprise_q - _saved(saved_ptr, row, there, 9, REAL))
            to_second += given * apart
        if entropy_p_ptr is not None:
            surprise_p = (top - z) + log_sum[:, None]
            given = _upstream(entropy_p_ptr, row, there, REAL)
            to_first += given * _bent(p, surprise_p - _saved(saved_ptr, row, there, 10, REAL))
        if entropy_q_ptr is not None:
            given = _upstream(entropy_q_ptr, row, there, REAL)
            to_second += given * _bent(q, surprise_q - _saved(saved_ptr, row, there, 11, REAL))
        if nll_p_ptr is not None:
            slope = _to_target(p, first, first_top, first_log_sum, index, live, known, first_class_stride, place, REAL)
            to_first += _upstream(nll_p_ptr, row, there, REAL) * slope
        if nll_q_ptr is not None:
            slope = _to_target(
                q, second, second_top, second_log_sum, index, live, known, second_class_stride, place, REAL
            )
            to_second += _upstream(nll_q_ptr, row, there, REAL) * slope
        if divergence_ptr is not None:
            given = _upstream(divergence_ptr, row, there, REAL)
            if FAMILY == TOTAL_VARIATION:
                # With s the sign of p - q, s - sum p s: twice what has the other sign, and what has none.
                p_q_larger = _saved(saved_ptr, row, there, 7, REAL)
                p_p_larger = _saved(saved_ptr, row, there, 8, REAL)
                q_p_larger = _saved(saved_ptr, row, there, 9, REAL)
                p_equal = _saved(saved_ptr, row, there, 10, REAL)
                q_equal = _saved(saved_ptr, row, there, 11, REAL)
                q_q_larger = _saved(saved_ptr, row, there, 6, REAL)
                half_p = tl.where(d < 0, p_q_larger + p_equal * 0.5, -p_p_larger - p_equal * 0.5)
                half_p = tl.where(d == 0, (p_q_larger - p_p_larger) * 0.5, half_p)
                half_q = tl.where(d < 0, q_q_larger + q_equal * 0.5, -q_p_larger - q_equal * 0.5)
                half_q = tl.where(d == 0, (q_q_larger - q_p_larger) * 0.5, half_q)
                to_first += given * p * half_p
                to_second -= given * q * half_q
            else:
                _from_p, _from_q, log_p, log_q, share, less = _mixture(p, q, d, mixed, REAL)
                of_first = _saved(saved_ptr, row, there, 5, REAL)
                of_second = _saved(saved_ptr, row, there, 6, REAL)
                of_p = mixed.to(REAL)
                of_q = (1.0 - mixed).to(REAL)
                if FAMILY == SKEWED_KL:
                    to_first += given * _bent(p, (-less - of_q * share) - (of_first + of_p * of_second))
                    to_second += given * _bent(q, of_q * share + of_p * of_second)
                else:
                    to_first += given * of_p * _bent(p, -log_p - of_first)
                    to_second += given * of_q * _bent(q, -log_q - of_second)
        if SAME_BYTES:
            # Narrower gradients lie in the first bytes of the logits: all of this block must have been read.
            tl.debug_barrier()
        if first_grad_ptr is not None:
            begin = first_grad_ptr + (row // inner) * first_grad_outer_stride + (row % inner) * first_grad_inner_stride
            to = begin[:, None] + place * first_grad_class_stride
            tl.store(to, rounded(to_first, first_grad_ptr), mask=inside)
        if second_grad_ptr is not None:
            begin = second_grad_ptr + (row // inner) * second_grad_outer_stride
            begin += (row % inner) * second_grad_inner_stride
            to = begin[:, None] + place * second_grad_class_stride
            tl.store(to, rounded(to_second, second_grad_ptr), mask=inside)
