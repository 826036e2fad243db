"""One row of logits: its statistics and its gradient, as Triton kernels.

Formula, with top = max z and S the sum of exp(z_j - top) over every class but the one that holds the top:

    log_sum = log1p(S)              lse = top + log_sum
    nll     = (top - z[target]) + log_sum
    H       = log_sum + sum_j exp(z_j - top) (top - z_j) / (1 + S)
    smooth  = sum_j w_j (top - z_j) + log_sum sum_j w_j          (dense: the same with t_j w_j for w_j)
    dz_j    = p_j (A + B (z_j - lse)) + C [j = target] + E t_j w_j + F w_j,   p_j = exp((z_j - top) - log_sum)

No term of a sum is negative but by a negative weight, so nothing cancels, and the loss of a row whose target is the top
is log1p(S) itself, exact when it is 1e-12.

Layout: a program has ROWS rows and passes over their classes in blocks of BLOCK; few long rows are split, a program a
part, and joined by a second kernel. Rows are (outer, inner) with a stride each, offsets are int64, and rows lie on the
first axis of the grid. Where an access is masked out nothing is read: of ignored rows, and beyond the last class.

Precision policy: float32 (float64 of float64 logits) in the loop, with what each rounded difference lost where FINE;
sums of lanes, logarithms and what is one number a row in float64; one rounding at the end. At the target `p - 1` would
cancel, so that element is expm1(z_t - lse), in float64.
"""

import triton
import triton.language as tl

from logitless.kernels.triton.arithmetic import difference, exp, expm1_wide, log1p_wide, rounded, times

# Beyond so large a difference an exponential is 0, and finite numbers stay finite.
FAR = tl.constexpr(1.0e4)
# What one part of a split row hands to the other kernel: top, S, weighted gaps, argmax, first NaN, rank, and the gaps
# and masses of smoothing and of a dense target.
FIELDS = tl.constexpr(10)
NO_CLASS = tl.constexpr(2147483647)


@triton.jit
def _gaps_raised(gaps, masses, delta, weight, gap):
    """Return sum w (top - z) and sum w after the top rose by `delta` and a class of this gap and weight came."""
    raised = gaps + masses * delta
    return raised + tl.where(weight == 0, 0.0, weight * gap), masses + weight


@triton.jit
def _write_row(
    tops,
    sums,
    spreads,
    bests,
    nans,
    aboves,
    smooth_gaps,
    smooth_masses,
    dense_gaps,
    dense_masses,
    row,
    there,
    live,
    known,
    at_target,
    target_ptr,
    row_max_ptr,
    log_sum_ptr,
    nll_ptr,
    lse_ptr,
    entropy_ptr,
    argmax_ptr,
    rank_ptr,
    smooth_sum_ptr,
    dense_sum_ptr,
    dense_mass_ptr,
    LANES: tl.constexpr,
    REAL: tl.constexpr,
):
    """Join the lanes [ROWS, LANES] of each row and write what was asked for."""
    top = tl.max(tops, 1)
    lanes = tl.arange(0, LANES)
    # The top itself is left out of S once, in the first lane that has it.
    first = tl.min(tl.where(tops == top[:, None], lanes[None, :], LANES), 1)
    counted = tl.where(lanes[None, :] == first[:, None], sums, sums + 1.0)
    gap, low = difference(tops, top[:, None])
    factor = exp(gap, low, True)  # 0 of a lane without a class; NaN where the top is infinite
    total = tl.sum((counted * factor).to(tl.float64), 1)
    log_sum = log1p_wide(total)
    top_wide = top.to(tl.float64)
    tl.store(row_max_ptr + row, tl.where(live, top, 0.0).to(REAL), mask=there)
    tl.store(log_sum_ptr + row, tl.where(live, log_sum, 0.0), mask=there)
    if target_ptr is not None:
        nll = (top_wide - at_target.to(tl.float64)) + log_sum
        nll = tl.where(live, tl.where(known, nll, float("nan")), 0.0)
        tl.store(nll_ptr + row, nll.to(REAL), mask=there)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, tl.where(live, top_wide + log_sum, 0.0).to(REAL), mask=there)
    if entropy_ptr is not None:
        below = tl.minimum(-gap, FAR)
        spread = tl.sum((factor * (spreads + below * counted)).to(tl.float64), 1)
        entropy = log_sum + spread / (1.0 + total)
        tl.store(entropy_ptr + row, tl.where(live, entropy, 0.0).to(REAL), mask=there)
    if argmax_ptr is not None:
        best = tl.min(tl.where(tops == top[:, None], bests, NO_CLASS), 1)
        nan = tl.min(nans, 1)
        # Where no class has a probability the first is as good as any.
        best = tl.where(nan < NO_CLASS, nan, tl.where(best < NO_CLASS, best, 0))
        tl.store(argmax_ptr + row, tl.where(live, best, -1).to(tl.int64), mask=there)
    if rank_ptr is not None:
        above = tl.sum(aboves, 1)
        tl.store(rank_ptr + row, tl.where(live & known, above, -1).to(tl.int64), mask=there)
    rise = tl.where(tops == float("-inf"), 0.0, top[:, None] - tops)
    if smooth_sum_ptr is not None:
        mass = tl.sum(smooth_masses.to(tl.float64), 1)
        gaps = tl.sum((smooth_gaps + times(smooth_masses, rise)).to(tl.float64), 1)
        value = gaps + times(mass, log_sum)
        tl.store(smooth_sum_ptr + row, tl.where(live, value, 0.0).to(REAL), mask=there)
    if dense_sum_ptr is not None:
        mass = tl.sum(dense_masses.to(tl.float64), 1)
        gaps = tl.sum((dense_gaps + times(dense_masses, rise)).to(tl.float64), 1)
        value = gaps + times(mass, log_sum)
        tl.store(dense_sum_ptr + row, tl.where(live, value, 0.0).to(REAL), mask=there)
        tl.store(dense_mass_ptr + row, tl.where(live, mass, 0.0).to(REAL), mask=there)


@triton.jit
def _row_target(target_ptr, row, there, ignore_index, classes):
    """Return of each row its class, whether the row counts, and whether the class exists."""
    index = tl.load(target_ptr + row, mask=there, other=0)
    live = there & (index != ignore_index)
    known = live & (index >= 0) & (index < classes)
    return tl.where(known, index, 0), live, known


@triton.jit
def row_stats_kernel(
    logits_ptr,
    target_ptr,
    weight_ptr,
    dense_ptr,
    row_max_ptr,
    log_sum_ptr,
    nll_ptr,
    lse_ptr,
    entropy_ptr,
    argmax_ptr,
    rank_ptr,
    smooth_sum_ptr,
    dense_sum_ptr,
    dense_mass_ptr,
    parts_ptr,
    rows,
    classes,
    inner,
    outer_stride,
    class_stride,
    inner_stride,
    dense_outer_stride,
    dense_class_stride,
    dense_inner_stride,
    ignore_index,
    part_classes,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    REAL: tl.constexpr,
    FINE: tl.constexpr,
):
    """Fold each row, or a part of it, and write what was asked for."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    begin = logits_ptr + (row // inner) * outer_stride + (row % inner) * inner_stride
    live = there
    known = there
    at_target = tl.zeros([ROWS], REAL)
    if target_ptr is not None:
        index, live, known = _row_target(target_ptr, row, there, ignore_index, classes)
        at_target = tl.load(begin + index * class_stride, mask=known, other=0.0).to(REAL)
    if dense_ptr is not None:
        dense_begin = dense_ptr + (row // inner) * dense_outer_stride + (row % inner) * dense_inner_stride

    # Each lane keeps its own top and sums relative to it, so that lanes meet once, at the end.
    tops = tl.full([ROWS, BLOCK], float("-inf"), REAL)
    sums = tl.zeros([ROWS, BLOCK], REAL)
    spreads = tl.zeros([ROWS, BLOCK], REAL)
    bests = tl.full([ROWS, BLOCK], NO_CLASS, tl.int32)
    nans = tl.full([ROWS, BLOCK], NO_CLASS, tl.int32)
    aboves = tl.zeros([ROWS, BLOCK], tl.int32)
    smooth_gaps = tl.zeros([ROWS, BLOCK], REAL)
    smooth_masses = tl.zeros([ROWS, BLOCK], REAL)
    dense_gaps = tl.zeros([ROWS, BLOCK], REAL)
    dense_masses = tl.zeros([ROWS, BLOCK], REAL)

    part = tl.program_id(1) * part_classes
    stop = tl.minimum(part + part_classes, classes)
    for start in range(part, stop, BLOCK):
        column = start + tl.arange(0, BLOCK)
        within = column < stop
        inside = live[:, None] & within[None, :]
        place = column.to(tl.int64)[None, :]
        # Beyond the last class there is a class without probability.
        z = tl.load(begin[:, None] + place * class_stride, mask=inside, other=float("-inf")).to(REAL)
        nothing = z == float("-inf")
        if FINE:
            apart, low = difference(z, tops)
        else:
            apart = z - tops
            low = tl.zeros([ROWS, BLOCK], REAL)
        apart = tl.where(nothing, float("-inf"), apart)
        higher = apart > 0
        factor = exp(-tl.abs(apart), tl.where(higher, -low, low), FINE)
        if entropy_ptr is not None:
            gap = factor * tl.minimum(tl.abs(apart), FAR)
            spreads = tl.where(higher, spreads * factor + gap * (sums + 1.0), spreads + gap)
        sums = tl.where(higher, (sums + 1.0) * factor, sums + factor)
        if argmax_ptr is not None:
            bests = tl.where(higher, column[None, :], bests)
            nans = tl.minimum(nans, tl.where(z == z, NO_CLASS, column[None, :]))
        if rank_ptr is not None:
            aboves += (z > at_target[:, None]).to(tl.int32)
        if (smooth_sum_ptr is not None) or (dense_sum_ptr is not None):
            delta = tl.where(higher & (tops != float("-inf")), apart, 0.0)
            below = tl.where(higher, 0.0, tl.where(nothing, float("inf"), -apart))
            weight = within.to(REAL)[None, :]
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + column, mask=within, other=0.0).to(REAL)[None, :]
            if smooth_sum_ptr is not None:
                smooth_gaps, smooth_masses = _gaps_raised(smooth_gaps, smooth_masses, delta, weight, below)
            if dense_sum_ptr is not None:
                t = tl.load(dense_begin[:, None] + place * dense_class_stride, mask=inside, other=0.0).to(REAL)
                dense_gaps, dense_masses = _gaps_raised(dense_gaps, dense_masses, delta, t * weight, below)
        tops = tl.where(higher, z, tops)

    if SPLIT:
        _write_part(
            tops,
            sums,
            spreads,
            bests,
            nans,
            aboves,
            smooth_gaps,
            smooth_masses,
            dense_gaps,
            dense_masses,
            row,
            there,
            rows,
            parts_ptr,
            BLOCK,
        )
    else:
        _write_row(
            tops,
            sums,
            spreads,
            bests,
            nans,
            aboves,
            smooth_gaps,
            smooth_masses,
            dense_gaps,
            dense_masses,
            row,
            there,
            live,
            known,
            at_target,
            target_ptr,
            row_max_ptr,
            log_sum_ptr,
            nll_ptr,
            lse_ptr,
            entropy_ptr,
            argmax_ptr,
            rank_ptr,
            smooth_sum_ptr,
            dense_sum_ptr,
            dense_mass_ptr,
            BLOCK,
            REAL,
        )


@triton.jit
def _write_part(
    tops,
    sums,
    spreads,
    bests,
    nans,
    aboves,
    smooth_gaps,
    smooth_masses,
    dense_gaps,
    dense_masses,
    row,
    there,
    rows,
    parts_ptr,
    LANES: tl.constexpr,
):
    """Join the lanes of a part of each row and leave it, in float64, where the other kernel takes it for a lane."""
    top = tl.max(tops, 1)
    lanes = tl.arange(0, LANES)
    first = tl.min(tl.where(tops == top[:, None], lanes[None, :], LANES), 1)
    counted = tl.where(lanes[None, :] == first[:, None], sums, sums + 1.0)
    gap, low = difference(tops, top[:, None])
    # A part of which no class has probability is a lane without one.
    factor = tl.where(tops == float("-inf"), 0.0, exp(gap, low, True))
    below = tl.minimum(tl.where(tops == float("-inf"), 0.0, -gap), FAR)
    rise = tl.where(tops == float("-inf"), 0.0, top[:, None] - tops)
    at = parts_ptr + (tl.program_id(1).to(tl.int64) * FIELDS) * rows + row
    tl.store(at, top.to(tl.float64), mask=there)
    tl.store(at + rows, tl.sum((counted * factor).to(tl.float64), 1), mask=there)
    spread = tl.sum((factor * (spreads + below * counted)).to(tl.float64), 1)
    tl.store(at + 2 * rows, spread, mask=there)
    best = tl.min(tl.where(tops == top[:, None], bests, NO_CLASS), 1)
    tl.store(at + 3 * rows, best.to(tl.float64), mask=there)
    tl.store(at + 4 * rows, tl.min(nans, 1).to(tl.float64), mask=there)
    tl.store(at + 5 * rows, tl.sum(aboves, 1).to(tl.float64), mask=there)
    gaps = tl.sum((smooth_gaps + times(smooth_masses, rise)).to(tl.float64), 1)
    tl.store(at + 6 * rows, gaps, mask=there)
    tl.store(at + 7 * rows, tl.sum(smooth_masses.to(tl.float64), 1), mask=there)
    gaps = tl.sum((dense_gaps + times(dense_masses, rise)).to(tl.float64), 1)
    tl.store(at + 8 * rows, gaps, mask=there)
    tl.store(at + 9 * rows, tl.sum(dense_masses.to(tl.float64), 1), mask=there)


@triton.jit
def row_join_kernel(
    logits_ptr,
    target_ptr,
    row_max_ptr,
    log_sum_ptr,
    nll_ptr,
    lse_ptr,
    entropy_ptr,
    argmax_ptr,
    rank_ptr,
    smooth_sum_ptr,
    dense_sum_ptr,
    dense_mass_ptr,
    parts_ptr,
    rows,
    classes,
    inner,
    outer_stride,
    class_stride,
    inner_stride,
    ignore_index,
    parts,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    REAL: tl.constexpr,
):
    """Join the parts of each row, as if they were lanes."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    live = there
    known = there
    at_target = tl.zeros([ROWS], REAL)
    if target_ptr is not None:
        index, live, known = _row_target(target_ptr, row, there, ignore_index, classes)
        begin = logits_ptr + (row // inner) * outer_stride + (row % inner) * inner_stride
        at_target = tl.load(begin + index * class_stride, mask=known, other=0.0).to(REAL)
    part = tl.arange(0, PARTS)
    inside = there[:, None] & (part < parts)[None, :]
    at = parts_ptr + (part.to(tl.int64) * FIELDS * rows)[None, :] + row[:, None]
    # Numbers stay in float64: a part's sums are as exact as its lanes were.
    tops = tl.load(at, mask=inside, other=float("-inf"))
    sums = tl.load(at + rows, mask=inside, other=0.0)
    spreads = tl.load(at + 2 * rows, mask=inside, other=0.0)
    bests = tl.load(at + 3 * rows, mask=inside, other=2147483647.0).to(tl.int64).to(tl.int32)
    nans = tl.load(at + 4 * rows, mask=inside, other=2147483647.0).to(tl.int64).to(tl.int32)
    aboves = tl.load(at + 5 * rows, mask=inside, other=0.0).to(tl.int32)
    smooth_gaps = tl.load(at + 6 * rows, mask=inside, other=0.0)
    smooth_masses = tl.load(at + 7 * rows, mask=inside, other=0.0)
    dense_gaps = tl.load(at + 8 * rows, mask=inside, other=0.0)
    dense_masses = tl.load(at + 9 * rows, mask=inside, other=0.0)
    _write_row(
        tops,
        sums,
        spreads,
        bests,
        nans,
        aboves,
        smooth_gaps,
        smooth_masses,
        dense_gaps,
        dense_masses,
        row,
        there,
        live,
        known,
        at_target,
        target_ptr,
        row_max_ptr,
        log_sum_ptr,
        nll_ptr,
        lse_ptr,
        entropy_ptr,
        argmax_ptr,
        rank_ptr,
        smooth_sum_ptr,
        dense_sum_ptr,
        dense_mass_ptr,
        PARTS,
        REAL,
    )


@triton.jit
def _coefficient(given, scale, values_ptr, row, live, ROWS: tl.constexpr):
    """Return the row's upstream gradient times a number, times the row's own where there is one."""
    scaled = given * tl.full([ROWS], scale, tl.float64)
    if values_ptr is not None:
        return scaled * tl.load(values_ptr + row, mask=live, other=0.0).to(tl.float64)
    else:
        return scaled


@triton.jit
def row_grad_kernel(
    logits_ptr,
    grad_ptr,
    row_max_ptr,
    log_sum_ptr,
    target_ptr,
    weight_ptr,
    dense_ptr,
    upstream_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    e_ptr,
    f_ptr,
    a_extra_ptr,
    rows,
    classes,
    inner,
    outer_stride,
    class_stride,
    inner_stride,
    grad_outer_stride,
    grad_class_stride,
    grad_inner_stride,
    dense_outer_stride,
    dense_class_stride,
    dense_inner_stride,
    upstream_stride,
    ignore_index,
    part_classes,
    a_scale: tl.float64,
    b_scale: tl.float64,
    c_scale: tl.float64,
    e_scale: tl.float64,
    f_scale: tl.float64,
    a_extra: tl.float64,
    HAS_B: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_E: tl.constexpr,
    HAS_F: tl.constexpr,
    INDEX_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
    FINE: tl.constexpr,
    SAME_BYTES: tl.constexpr,
):
    """Write the gradient of each row, or of a part of it."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    begin = logits_ptr + (row // inner) * outer_stride + (row % inner) * inner_stride
    grad_begin = grad_ptr + (row // inner) * grad_outer_stride + (row % inner) * grad_inner_stride
    live = there
    known = there & (row < 0)
    index = tl.zeros([ROWS], tl.int64)
    if target_ptr is not None:
        index, live, known = _row_target(target_ptr, row, there, ignore_index, classes)
    if dense_ptr is not None:
        dense_begin = dense_ptr + (row // inner) * dense_outer_stride + (row % inner) * dense_inner_stride

    top = tl.load(row_max_ptr + row, mask=live, other=0.0).to(REAL)
    log_sum_wide = tl.load(log_sum_ptr + row, mask=live, other=0.0)
    log_sum = log_sum_wide.to(REAL)
    log_sum_low = (log_sum_wide - log_sum.to(tl.float64)).to(REAL)
    given = tl.full([ROWS], 1.0, tl.float64)
    if upstream_ptr is not None:
        given = tl.load(upstream_ptr + row * upstream_stride, mask=live, other=0.0).to(tl.float64)
    extra = tl.full([ROWS], a_extra, tl.float64)
    if a_extra_ptr is not None:
        extra += tl.load(a_extra_ptr).to(tl.float64)
    picked = tl.full([ROWS], 1.0, tl.float64)
    if INDEX_WEIGHT:
        picked = tl.load(weight_ptr + index, mask=known, other=1.0).to(tl.float64)
    a = _coefficient(given, a_scale, a_ptr, row, live, ROWS) * picked + given * extra
    b = given
    c = given
    e = given
    f = given
    if HAS_B:
        b = _coefficient(given, b_scale, b_ptr, row, live, ROWS)
    if HAS_C:
        c = _coefficient(given, c_scale, c_ptr, row, live, ROWS) * picked
    if HAS_E:
        e = _coefficient(given, e_scale, e_ptr, row, live, ROWS)
    if HAS_F:
        f = _coefficient(given, f_scale, f_ptr, row, live, ROWS)

    # The target's element by itself, in float64: a (p - 1) + (a + c), of which the sum is 0 for cross-entropy.
    at_target = tl.zeros([ROWS], tl.float64)
    if HAS_C:
        z_target = tl.load(begin + index * class_stride, mask=known, other=0.0).to(tl.float64)
        below_target = (z_target - top.to(tl.float64)) - log_sum_wide
        at_target = a * expm1_wide(below_target) + (a + c)
        if HAS_B:
            at_target += b * times(tl.exp(below_target), below_target)
        if HAS_E or HAS_F:
            weight_target = tl.full([ROWS], 1.0, tl.float64)
            if weight_ptr is not None:
                weight_target = tl.load(weight_ptr + index, mask=known, other=0.0).to(tl.float64)
            if HAS_E:
                t_target = tl.load(dense_begin + index * dense_class_stride, mask=known, other=0.0).to(tl.float64)
                at_target += e * (t_target * weight_target)
            if HAS_F:
                at_target += f * weight_target
    of_target = at_target.to(REAL)
    a_real = a.to(REAL)
    b_real = b.to(REAL)
    e_real = e.to(REAL)
    f_real = f.to(REAL)

    part = tl.program_id(1) * part_classes
    stop = tl.minimum(part + part_classes, classes)
    for start in range(part, stop, BLOCK):
        column = start + tl.arange(0, BLOCK)
        within = column < stop
        inside = live[:, None] & within[None, :]
        place = column.to(tl.int64)[None, :]
        z = tl.load(begin[:, None] + place * class_stride, mask=inside, other=float("-inf")).to(REAL)
        if FINE:
            apart, low = difference(z, top[:, None])
            below, lower = difference(apart, log_sum[:, None])
            p = exp(below, low + (lower - log_sum_low[:, None]), FINE)
        else:
            below = (z - top[:, None]) - log_sum[:, None]
            p = exp(below, 0.0, FINE)
        if HAS_B:
            slope = a_real[:, None] + times(b_real[:, None], tl.where(p == 0, 0.0, below))
        else:
            slope = a_real[:, None]
        gradient = tl.where(p == 0, 0.0, p * slope)
        if HAS_E or HAS_F:
            weight = within.to(REAL)[None, :]
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + column, mask=within, other=0.0).to(REAL)[None, :]
            if HAS_E:
                t = tl.load(dense_begin[:, None] + place * dense_class_stride, mask=inside, other=0.0).to(REAL)
                gradient += e_real[:, None] * (t * weight)
            if HAS_F:
                gradient += f_real[:, None] * weight
        if HAS_C:
            hit = known[:, None] & (place == index[:, None])
            gradient = tl.where(hit, of_target[:, None], gradient)
        gradient = tl.where(live[:, None], gradient, 0.0)
        if SAME_BYTES:
            # A narrower gradient lies in the first bytes of the logits: all of this block must have been read.
            tl.debug_barrier()
        to = grad_begin[:, None] + place * grad_class_stride
        tl.store(to, rounded(gradient, grad_ptr), mask=there[:, None] & within[None, :])
