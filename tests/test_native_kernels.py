"""The compiled row kernels against mpmath and extended precision, by formulas written here, apart from the kernels."""

import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("logitless._native", reason="built without the extension (LOGITLESS_NO_NATIVE)")
from logitless import _native
from logitless.kernels import cpu
from logitless.kernels.interface import Divergence, PairRowStats

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (1, 7, 65, 100, 1000, 49153)
# Bits of the mantissa of what is computed in; extended precision must be wider for a truth to be one.
Wide = np.longdouble
pytestmark = pytest.mark.skipif(np.finfo(Wide).nmant < 63, reason="the truths need an 80-bit or wider long double")


@pytest.fixture(params=_native.native_info()["supported"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that is compiled in and that this processor has."""
    before = cpu.native_info()["isa"]
    _native.select_isa(request.param)
    assert cpu.native_info()["isa"] == request.param
    yield request.param
    _native.select_isa(before)


def real_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Any:
    return x.double().numpy().astype(Wide)


def ulps(got: Tensor, truth: Any, terms: Any = 0.0) -> float:
    """The largest error in units in the last place of got's dtype at the truth, or at `terms` where those cancel.

    Where the truth, rounded to got's dtype, is infinite or NaN, got must be the same; where it is below the normal
    range of the compute type, got may be anything that is.
    """
    info = torch.finfo(got.dtype)
    truth = np.asarray(truth, Wide)
    with np.errstate(all="ignore"):
        rounded = torch.from_numpy(truth.astype(np.float64)).to(got.dtype)
    odd = ~rounded.isfinite()
    assert torch.equal(got[odd].nan_to_num(nan=7.0), rounded[odd].nan_to_num(nan=7.0)), (got[odd], rounded[odd])
    if got.dtype != torch.float16:  # whose denormals are float32's normals
        below = (np.asarray(abs(truth)) < info.tiny) & (abs(got.double().numpy()) <= info.tiny)
        odd |= torch.from_numpy(below)
    fine = (~odd).numpy()
    size = np.maximum(np.maximum(abs(truth), np.asarray(terms, Wide) * np.ones_like(truth)), Wide(info.tiny))[fine]
    assert not bool(got[~odd].isnan().any())
    error = abs(wide(got)[fine] - truth[fine]) / (np.exp2(np.floor(np.log2(size))) * Wide(info.eps))
    return float(error.max()) if error.size else 0.0


# ---- truths ----------------------------------------------------------------------------------------------------------


def log_softmax(z: Any) -> tuple[Any, Any, Any]:
    """z - max, log1p(sum of the others) and the maximum, of each row: log p is the first less the second."""
    top = z.max(-1, keepdims=True)
    with np.errstate(all="ignore"):
        e = np.exp(z - top)
    np.put_along_axis(e, z.argmax(-1)[:, None], 0, -1)
    return z - top, np.log1p(e.sum(-1, keepdims=True)), top


def without_inf(coefficient: Any, value: Any) -> Any:
    with np.errstate(all="ignore"):
        return np.where(coefficient == 0, 0, coefficient * value)


def stats_truth(z: Tensor, target: Tensor | None = None, w: Tensor | None = None, t: Tensor | None = None) -> Any:
    """Of [rows, classes]."""
    rows = wide(z)
    gap, log_sum, top = log_softmax(rows)
    log_p = gap - log_sum
    weight = np.ones(z.shape[1], Wide) if w is None else wide(w)
    out = SimpleNamespace(
        lse=(top + log_sum)[:, 0], log_sum=log_sum[:, 0], argmax=rows.argmax(-1), log_p=log_p, p=np.exp(log_p)
    )
    out.entropy = without_inf(out.p, -log_p).sum(-1)
    out.smooth = without_inf(weight[None], -log_p).sum(-1)
    if t is not None:
        out.dense = without_inf(wide(t) * weight, -log_p).sum(-1)
        out.mass = (wide(t) * weight).sum(-1)
    if target is not None:
        at = np.take_along_axis(rows, target.clamp(0).numpy()[:, None], -1)
        out.nll = ((top - at) + log_sum)[:, 0]
        out.rank = (rows > at).sum(-1)
    return out


def p_minus_one_hot(truth: Any, target: Tensor) -> Any:
    out = truth.p.copy()
    for row, j in enumerate(target.tolist()):
        others = truth.p[row].copy()
        others[j] = 0
        out[row, j] = -others.sum()
    return out


def log_p_terms(truth: Any, exact: Any, dtype: torch.dtype) -> Any:
    """How large a float64 gradient's terms are: exp(z - lse) carries half an ulp of lse for each e-fold of 1/p."""
    return abs(exact) * (1 + abs(np.maximum(truth.log_p, -1e30))) if dtype == torch.float64 else 0.0


def rows_of(dtype: torch.dtype, classes: int) -> Tensor:
    """Rows of several spreads, one tied, one masked with -inf and one with finfo.min, one dominated by a class."""
    scales = torch.tensor([[1e-3], [1.0], [10.0], [1000.0], [1.0], [1.0], [1.0], [1.0]], dtype=torch.float64)
    z = torch.randn(8, classes, dtype=torch.float64) * scales
    z[4] = 3.25
    z[5, : classes // 2] = -INF
    z[6, : classes // 2] = torch.finfo(dtype).min
    z[7, classes // 2] = 27.5  # the others' mass is about 1e-12 of it, times the classes
    return z.to(dtype)


# ---- row_stats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_stats(isa: str, dtype: torch.dtype, classes: int) -> None:
    z = rows_of(dtype, classes)
    target = torch.randint(0, classes, (8,))
    target[7] = classes // 2
    target[5] = target[6] = classes - 1
    got = cpu.row_stats(z, target, lse=True, entropy=True, argmax=True, rank=True)
    truth = stats_truth(z, target)
    assert got.bad_row == -1
    assert got.nll is not None
    assert got.lse is not None
    assert got.entropy is not None
    assert got.nll.dtype == got.row_max.dtype == real_of(dtype)
    assert ulps(got.nll, truth.nll) <= 2
    assert ulps(got.lse, truth.lse) <= 1
    # What half an ulp of each logit does to the entropy, beside the 4 ulp.
    moved = without_inf(
        truth.p, abs(np.maximum(truth.log_p, -1e30)) * np.where(np.isinf(wide(z)), 0, abs(wide(z)))
    ).sum(-1)
    assert ulps(got.entropy, truth.entropy, moved if dtype == torch.float64 else 0.0) <= 4
    assert got.argmax is not None
    assert got.rank is not None
    assert got.argmax.tolist() == truth.argmax.tolist()
    assert got.rank.tolist() == truth.rank.tolist()
    assert got.log_sum.dtype == torch.float64
    assert ulps(got.log_sum.to(real_of(dtype)), truth.log_sum) <= 2


def adversarial_rows() -> Iterator[list[float]]:
    for spread in (1e-30, 1e-7, 1.0, 100.0, 1e4):
        yield [spread * math.sin(1.7 * i) for i in range(37)]
    for margin in (10.0, 27.0, 60.0, 80.0):  # nll from 1e-4 to 1e-34
        yield [margin, 0.0, 0.5, -INF, 0.25]
        yield [-5.0] * 20 + [margin] + [-5.0] * 20
    yield [0.0] * 1000
    yield [-INF, -INF, 2.0]
    yield [1e4, 1e4, -1e4]
    yield [3e4, 3e4 - 2.0, -3e4]
    yield [1e30, 1e30, -1e30, 5.0]
    yield [-3e38, -3e38, -3e38]
    yield [-3.4e38] * 200 + [5.0, 4.0]
    yield [float(i) for i in range(300)]  # ascending: every element is a new maximum
    yield [50.0 * i for i in range(100)]
    yield [-0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_row_stats_adversarial(isa: str, dtype: torch.dtype) -> None:
    mpmath.mp.prec = 400
    for values in adversarial_rows():
        z = torch.tensor([values], dtype=dtype)
        exact = [mpmath.mpf(x) for x in z[0].tolist()]
        top = max(exact)
        total = sum(mpmath.exp(x - top) for x in exact)
        tied = [i for i, x in enumerate(exact) if x == top]
        rest = sum((mpmath.exp(x - top) for i, x in enumerate(exact) if i != tied[0]), mpmath.mpf(0))
        log_sum = mpmath.log1p(rest)
        entropy = (
            log_sum + sum((mpmath.exp(x - top) * (top - x) for x in exact if x != -mpmath.inf), mpmath.mpf(0)) / total
        )
        for j in {0, len(values) // 2, len(values) - 1, tied[0]}:
            got = cpu.row_stats(z, torch.tensor([j]), entropy=True)
            assert got.nll is not None
            assert got.entropy is not None
            assert ulps(got.nll, [Wide(mpmath.nstr((top - exact[j]) + log_sum, 25))]) <= 2, (values[:5], j)
            bound = 0.0 if dtype == torch.float32 else float(entropy) * max(abs(x) for x in values if x != -INF)
            assert ulps(got.entropy, [Wide(mpmath.nstr(entropy, 25))], bound) <= 4, values[:5]


def test_a_row_that_has_no_distribution_gives_nan(isa: str) -> None:
    for classes in (3, 200, 5000):
        for bad in ([NAN], [INF], [INF, INF], [NAN, INF], "all"):
            for where in (0, classes // 2, classes - len(bad)):
                z = torch.randn(3, classes)
                z[1, where : where + len(bad)] = torch.tensor(bad) if bad != "all" else 0.0
                if bad == "all":
                    z[1] = -INF
                got = cpu.row_stats(z, torch.tensor([0, 1, 2]), lse=True, entropy=True)
                lanes = cpu.row_stats(z.t().unsqueeze(0).repeat(1, 1, 9), class_dim=1, lse=True)
                assert got.nll is not None
                assert got.entropy is not None
                assert got.nll.isnan().tolist() == got.entropy.isnan().tolist() == [False, True, False]
                assert lanes.lse is not None
                assert lanes.lse[0].isnan().tolist() == [False, True, False] * 9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_smoothing_and_dense_targets(isa: str, dtype: torch.dtype) -> None:
    for classes in (1, 7, 65, 1000):
        z = torch.cat([torch.randn(4, classes), 30 * torch.randn(3, classes)]).to(dtype)
        z[5] = 40 * torch.linspace(-1, 1, classes)
        w = torch.rand(classes, dtype=real_of(dtype))
        dense = torch.rand(7, classes).softmax(-1).to(dtype)
        if classes > 7:
            w[3], dense[:, 5], z[2, 3], z[2, 5] = 0.0, 0.0, -INF, -INF
        for weight in (None, w):
            truth = stats_truth(z, None, weight, dense)
            got = cpu.row_stats(z, class_weight=weight, dense_target=dense, smooth=True)
            alone = cpu.row_stats(z, class_weight=weight, smooth=True)
            only_dense = cpu.row_stats(z, class_weight=weight, dense_target=dense)
            all_of_it = cpu.row_stats(z, class_weight=weight, dense_target=dense, smooth=True, entropy=True)
            for made in (got, alone, all_of_it):
                assert made.smooth_sum is not None
                assert ulps(made.smooth_sum, truth.smooth) <= 4
            for made in (got, only_dense, all_of_it):
                assert made.dense_sum is not None
                assert made.dense_mass is not None
                assert ulps(made.dense_sum, truth.dense) <= 4
                assert ulps(made.dense_mass, truth.mass) <= 2


def layouts(classes: int) -> Iterator[tuple[str, Tensor, int]]:
    """Tensors of the same logical kind in every layout that a kernel takes differently."""
    yield "rows", torch.randn(5, classes), -1
    yield "padded rows", torch.randn(5, classes + 3)[:, :classes], -1
    yield "transposed", torch.randn(classes, 5).t(), 1
    yield "transposed, many", torch.randn(classes, 50).t(), 1
    yield "every second class", torch.randn(5, 2 * classes)[:, ::2], 1
    yield "images", torch.randn(2, classes, 3, 11), 1
    yield "narrow images", torch.randn(2, classes, 1, 3), 1
    yield "channels last", torch.randn(2, classes, 3, 4).to(memory_format=torch.channels_last), 1
    yield "class first", torch.randn(classes, 4, 5), 0
    yield "cropped images", torch.randn(2, classes, 6, 8)[:, :, 1:5, 2:7], 1  # no single stride: copied
    yield "three leading", torch.randn(2, 3, 4, classes), -1


@pytest.mark.parametrize("classes", [1, 13, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(isa: str, dtype: torch.dtype, classes: int) -> None:
    for name, made, class_dim in layouts(classes):
        z = made.to(dtype)
        z = z.as_strided(z.shape, z.stride())
        flat = z.movedim(class_dim, -1).reshape(-1, classes)
        target = torch.randint(0, classes, flat.shape[:1])
        target[0] = -100
        dense = torch.rand_like(z)
        shape = z.select(class_dim, 0).shape
        got = cpu.row_stats(
            z,
            target.view(shape),
            class_dim=class_dim,
            dense_target=dense,
            smooth=True,
            entropy=True,
            argmax=True,
            rank=True,
        )
        t = dense.movedim(class_dim, -1).reshape(-1, classes)
        truth = stats_truth(flat, target, None, t)
        kept = target >= 0
        for field, exact in (("nll", truth.nll), ("entropy", truth.entropy), ("dense_sum", truth.dense)):
            value = getattr(got, field)
            assert value.shape == shape
            assert ulps(value.flatten()[kept], exact[kept.numpy()]) <= 4, (name, field)
            assert value.flatten()[0] == 0
        assert got.argmax is not None
        assert got.rank is not None
        assert got.argmax.flatten()[1:].tolist() == truth.argmax[1:].tolist(), name
        assert got.rank.flatten()[1:].tolist() == truth.rank[1:].tolist(), name
        assert got.argmax.flatten()[0] == got.rank.flatten()[0] == -1

        upstream = torch.randn(shape, dtype=real_of(dtype))
        grad = cpu.row_grad(
            z,
            got.row_max,
            got.log_sum,
            target.view(shape),
            class_dim=class_dim,
            upstream=upstream,
            a_scale=1.0,
            c_scale=-1.0,
        )
        exact = p_minus_one_hot(truth, target.clamp(0)) * wide(upstream.flatten())[:, None] * (wide(kept)[:, None])
        assert grad.shape == z.shape
        terms = log_p_terms(truth, exact, dtype)
        got_rows = grad.movedim(class_dim, -1).reshape(-1, classes)
        assert ulps(got_rows, exact, terms) <= (3 if dtype == real_of(dtype) else 1), name


# ---- row_grad --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_cross_entropy(isa: str, dtype: torch.dtype, classes: int) -> None:
    z = rows_of(dtype, classes)
    target = torch.randint(0, classes, (8,))
    target[2] = -100
    target[7] = classes // 2
    z[2] = NAN
    stats = cpu.row_stats(z, target)
    grad = cpu.row_grad(
        z, stats.row_max, stats.log_sum, target, upstream=torch.tensor(0.375), a_scale=1.0, c_scale=-1.0
    )
    assert torch.equal(grad[2], torch.zeros(classes, dtype=dtype))
    rows = [0, 1, 3, 4, 5, 6, 7]
    exact = p_minus_one_hot(stats_truth(z[rows]), target[rows]) * Wide(0.375)
    terms = log_p_terms(stats_truth(z[rows]), exact, dtype)
    assert ulps(grad[rows], exact, terms) <= (3 if dtype == real_of(dtype) else 1)

    in_place = z.clone()
    assert (
        cpu.row_grad(
            in_place,
            stats.row_max,
            stats.log_sum,
            target,
            upstream=torch.tensor(0.375),
            a_scale=1.0,
            c_scale=-1.0,
            out=in_place,
        ).data_ptr()
        == in_place.data_ptr()
    )
    assert torch.equal(in_place, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_with_every_coefficient(isa: str, dtype: torch.dtype) -> None:
    real = real_of(dtype)
    for classes in (1, 9, 100, 1003):
        z = 3 * torch.randn(6, classes).to(dtype)
        target = torch.randint(0, classes, (6,))
        w = torch.rand(classes, dtype=real)
        dense = torch.rand(6, classes).to(dtype)
        truth = stats_truth(z)
        stats = cpu.row_stats(z, target)
        g, a, b, c, e, f = (torch.randn(6, dtype=real) for _ in range(6))
        one_hot = np.eye(classes, dtype=Wide)[target.numpy()]
        cases: list[dict[str, Any]] = [
            {"a_scale": 0.5},
            {"a_scale": 1.0, "b_scale": -2.0, "c_scale": 1.0, "b": b},
            {"a_scale": 0.9, "c_scale": -0.9, "f_scale": -0.1, "a_extra": 0.1 * float(w.sum()), "index_weight": True},
            {"a_scale": 1.0, "e_scale": -1.0, "a": a, "e": e, "dense_target": dense},
            {"a_scale": 1.0, "e_scale": -1.0, "f_scale": 0.25, "f": f, "dense_target": dense},
            {
                "a_scale": 1.0,
                "b_scale": 1.0,
                "c_scale": 0.5,
                "e_scale": -1.0,
                "f_scale": 0.25,
                "c": c,
                "dense_target": dense,
            },
        ]
        for case in cases:
            for weight in (w, None) if not case.get("index_weight") else (w,):
                got = cpu.row_grad(z, stats.row_max, stats.log_sum, target, upstream=g, class_weight=weight, **case)
                ww = np.ones(classes, Wide) if weight is None else wide(weight)
                v = ww[target.numpy()][:, None] if case.get("index_weight") else 1

                def row(name: str, case: dict[str, Any] = case) -> Any:
                    scale = Wide(case.get(name + "_scale", 0.0))
                    return scale * (wide(case[name])[:, None] if name in case else 1)

                terms = [
                    truth.p * (row("a") * v + Wide(case.get("a_extra", 0.0))),
                    truth.p * row("b") * truth.log_p,
                    row("c") * v * one_hot,
                    row("e") * wide(dense) * ww,
                    row("f") * ww * np.ones_like(truth.p),
                ]
                exact = sum(terms) * wide(g)[:, None]
                size = sum(abs(x) for x in terms) * abs(wide(g))[:, None]
                size = size * (1 + abs(truth.log_p)) if dtype == torch.float64 else size
                assert ulps(got, exact, size if dtype == real else 0.03 * size) <= 4, case


# ---- two rows --------------------------------------------------------------------------------------------------------


def pair_rows(dtype: torch.dtype, classes: int) -> tuple[Tensor, Tensor]:
    """Rows that are the same, nearly the same, far apart, shifted, confident and masked."""
    p = torch.randn(9, classes, dtype=torch.float64)
    p[6] *= 30
    p[7, classes // 2] = 25.0
    near = torch.tensor([0.0, 1e-6, 1e-3, 0.1, 3.0, 30.0, 1.0, 0.5, 1.0], dtype=torch.float64)[:, None]
    q = p + near * torch.randn(9, classes, dtype=torch.float64)
    q[2] += 17.5
    if classes > 2:
        p[8, 0] = q[8, 0] = -INF
    return p.to(dtype), q.to(dtype)


def pair_truth(p: Tensor, q: Tensor) -> Any:
    a, b = wide(p), wide(q)
    (gap_p, sum_p, top_p), (gap_q, sum_q, top_q) = log_softmax(a), log_softmax(b)
    out = SimpleNamespace(log_p=gap_p - sum_p, log_q=gap_q - sum_q)
    out.p, out.q = np.exp(out.log_p), np.exp(out.log_q)
    with np.errstate(all="ignore"):
        d = ((b - a) - (top_q - top_p)) - (sum_q - sum_p)
    out.d = d = np.where(np.isnan(d), 0, d)

    def phi(x: Any) -> Any:  # exp(x) - 1 - x
        series = x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))))
        with np.errstate(all="ignore"):
            return np.where(abs(x) < 1e-3, series, np.expm1(x) - x)

    out.log_m_p = np.maximum(d, 0) + np.log1p(np.expm1(-abs(d)) / 2)
    out.log_q_m = np.minimum(d, 0) - np.log1p(np.expm1(-abs(d)) / 2)
    out.kl = without_inf(out.p, phi(d)).sum(-1)
    out.reverse_kl = without_inf(out.q, phi(-d)).sum(-1)
    out.js = (without_inf(out.p, phi(out.log_m_p)) + without_inf(out.q, phi(-out.log_q_m))).sum(-1) / 2
    out.entropy_p = without_inf(out.p, -out.log_p).sum(-1)
    out.entropy_q = without_inf(out.q, -out.log_q).sum(-1)
    out.cross_entropy = out.entropy_p + out.kl
    out.same_top = a.argmax(-1) == b.argmax(-1)
    return out


def all_measures(p: Tensor, q: Tensor, target: Tensor | None = None, **options: Any) -> PairRowStats:
    return cpu.pair_row_stats(p, q, target, reverse_kl=True, js=True, cross_entropy=True, entropy=True, **options)


MEASURES = ("kl", "reverse_kl", "js", "cross_entropy", "entropy_p", "entropy_q")

in_rows_and_lanes = pytest.mark.parametrize("class_dim", [1, 0], ids=["rows", "lanes"])


@in_rows_and_lanes
@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pair_stats(isa: str, dtype: torch.dtype, classes: int, class_dim: int) -> None:
    p, q = pair_rows(dtype, classes)
    laid = [z.movedim(1, class_dim).contiguous() for z in (p, q)]
    target = torch.randint(0, classes, (9,))
    target[3] = -100
    got, truth = all_measures(*laid, target, class_dim=class_dim), pair_truth(p, q)
    assert got.bad_row == -1
    # Half an ulp of each logit moves the log-ratio by `step`, and a measure by that times its slope.
    eps = torch.finfo(real_of(dtype)).eps / 2
    size = np.where(np.isinf(wide(p)), 0, abs(wide(p))) + np.where(np.isinf(wide(q)), 0, abs(wide(q)))
    step = (np.where(np.isinf(truth.d), 0, abs(truth.d)) * np.maximum(truth.p, truth.q) * (size + 1)).sum(-1) + eps
    for name in MEASURES:
        value = getattr(got, name)
        assert bool((value >= 0).all()), name
        assert ulps(value, getattr(truth, name), step) <= 4, name
        if dtype != torch.float64:
            near = [0, 1, 2, 3, 4, 5, 8]
            assert ulps(value[near], getattr(truth, name)[near]) <= 6, name
    for name in ("kl", "reverse_kl", "js"):
        assert getattr(got, name)[0] == 0
    assert got.same_top is not None
    assert got.same_top.tolist() == truth.same_top.tolist()
    assert got.nll_p is not None
    assert got.nll_q is not None
    kept = target >= 0
    assert got.nll_p[3] == got.nll_q[3] == 0
    assert ulps(got.nll_p[kept], stats_truth(p, target).nll[kept.numpy()]) <= 2
    assert ulps(got.nll_q[kept], stats_truth(q, target).nll[kept.numpy()]) <= 2
    for js, same_top in ((False, True), (False, False), (True, False)):
        less = cpu.pair_row_stats(*laid, class_dim=class_dim, js=js, same_top=same_top)
        assert (less.same_top is None) == (not same_top)
        assert less.kl is not None
        assert got.kl is not None
        assert ulps(less.kl, wide(got.kl), step) <= 4
    mixture = cpu.pair_row_stats(*laid, class_dim=class_dim, js=True).js
    assert mixture is not None
    assert got.js is not None
    assert ulps(mixture, wide(got.js)) <= 4


def test_pair_stats_of_nearly_equal_confident_and_disjoint_rows(isa: str) -> None:
    mpmath.mp.prec = 400
    z = [0.3 * math.sin(i) for i in range(50)]
    one_off = [*z[:20], z[20] + 1e-5, *z[21:]]
    cases = [
        (z, one_off),
        (z, [x + 4.0 for x in z]),
        ([40.0, 0.0, 1.0], [41.0, 0.0, 1.0]),
        ([40.0, 0.0, 1.0], [0.0, 40.0, 1.0]),
        ([0.0, 1.0, -200.0], [0.0, 1.0, 5.0]),
        ([0.0, -INF, 1.0], [0.5, -INF, 1.0]),
        ([0.0, -INF, 1.0], [0.5, 2.0, 1.0]),
        ([1.0, 2.0, 3.0], [1.0, -INF, 3.0]),
    ]
    for first, second in cases:
        p, q = torch.tensor([first]), torch.tensor([second])
        a, b = ([mpmath.mpf(x) for x in row[0].tolist()] for row in (p, q))
        log_p, log_q = ([x - mpmath.log(sum(map(mpmath.exp, row))) for x in row] for row in (a, b))
        pairs = [(mpmath.exp(x), mpmath.exp(y), x, y) for x, y in zip(log_p, log_q, strict=True)]
        kl = sum(u * (x - y) for u, v, x, y in pairs if u)
        reverse = sum(v * (y - x) for u, v, x, y in pairs if v)
        half = mpmath.log(2)
        js = (
            sum(
                (u * (x - mpmath.log(u + v) + half) if u else 0) + (v * (y - mpmath.log(u + v) + half) if v else 0)
                for u, v, x, y in pairs
            )
            / 2
        )
        got = all_measures(p, q)
        for value, exact in ((got.kl, kl), (got.reverse_kl, reverse), (got.js, js)):
            assert value is not None
            number = Wide(mpmath.nstr(exact, 25)) if mpmath.isfinite(exact) else Wide("inf")
            # 7e-7 nats of log-ratio is what half an ulp of logits of size 4 moves.
            assert ulps(value, [number]) <= 4 or float(abs(value[0] - float(exact))) <= 3e-13, (first[:4], second[:4])


@in_rows_and_lanes
@pytest.mark.parametrize("classes", [1, 7, 65, 1000, 20011])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pair_gradients(isa: str, dtype: torch.dtype, classes: int, class_dim: int) -> None:
    p, q = pair_rows(dtype, classes)
    laid = [z.movedim(1, class_dim).contiguous() for z in (p, q)]
    target = torch.randint(0, classes, (9,))
    target[3] = -100
    stats, t = all_measures(*laid, target, class_dim=class_dim), pair_truth(p, q)
    real = real_of(dtype)
    names = (*MEASURES, "nll_p", "nll_q")
    upstream = {name: torch.randn(9, dtype=real) for name in names}

    def sums(x: Any) -> Any:
        return x.sum(-1, keepdims=True)

    d, log_p, log_q = (np.clip(x, -1e30, 1e30) for x in (t.d, t.log_p, t.log_q))
    log_m_p, log_q_m = np.clip(t.log_m_p, -1e30, 1e30), np.clip(t.log_q_m, -1e30, 1e30)
    minus = np.where(abs(d) < 1, t.p * np.expm1(np.clip(d, -1, 1)), t.q - t.p)  # q - p
    kept = wide(target >= 0)[:, None]
    hot = target.clamp(0)
    parts: dict[str, tuple[Any, Any]] = {
        "kl": (t.p * (-d - t.kl[:, None]), minus),
        "reverse_kl": (-minus, t.q * (d - t.reverse_kl[:, None])),
        "js": (t.p * (-log_m_p + sums(t.p * log_m_p)) / 2, t.q * (log_q_m - sums(t.q * log_q_m)) / 2),
        "cross_entropy": (t.p * (-log_q - t.cross_entropy[:, None]), minus),
        "entropy_p": (t.p * (-log_p - t.entropy_p[:, None]), 0 * t.p),
        "entropy_q": (0 * t.p, t.q * (-log_q - t.entropy_q[:, None])),
        "nll_p": (p_minus_one_hot(t, hot) * kept, 0 * t.p),
        "nll_q": (0 * t.p, p_minus_one_hot(SimpleNamespace(p=t.q), hot) * kept),
    }
    # A log-ratio is as right as the logits' own last places; the probabilities carry it into every entry.
    eps = Wide(torch.finfo(real).eps)
    size = 1 + t.cross_entropy[:, None] + t.entropy_q[:, None] + t.reverse_kl[:, None] + abs(log_p) + abs(log_q)
    size += np.where(np.isinf(wide(p)), 0, abs(wide(p))) + np.where(np.isinf(wide(q)), 0, abs(wide(q)))
    carried = without_inf(t.p, size) + without_inf(t.q, size)
    for use in [*([name] for name in names), list(names)]:
        asked = {name: upstream[name] for name in use}
        got = cpu.pair_row_grad(*laid, stats.saved, target, class_dim=class_dim, **asked)
        for k in (0, 1):
            made = got[k]
            assert made is not None
            g = {name: wide(upstream[name])[:, None] for name in use}
            exact = sum(g[name] * parts[name][k] for name in use)
            slack = sum(abs(g[name]) for name in use) * carried * eps + 2 * abs(exact) * eps
            slack += abs(exact) * Wide(torch.finfo(dtype).eps) * (dtype != real)
            # A probability below the normal range is 0, and it multiplies what `size` bounds.
            slack += Wide(torch.finfo(real).tiny) * np.minimum(size, 1e3) + 2.0**-24 * (dtype == torch.float16)
            assert bool((abs(wide(made.movedim(class_dim, 1)) - exact) <= 4 * slack).all()), use
    assert cpu.pair_row_grad(p, q, stats.saved, kl=upstream["kl"], need_first=False)[0] is None


# Of a divergence with p's weight w, m / p = t and r = 1 - 1 / t: its value, and what p's and q's logits get.
def divergence_truth(divergence: Divergence, t: Any) -> tuple[Any, Any, Any]:
    w, c = Wide(divergence.weight), 1 - Wide(divergence.weight)
    if divergence.family == "total_variation":

        def differences(d: Any) -> Any:
            return np.where(abs(d) < 1, t.p * np.expm1(np.clip(d, -1, 1)), t.q - t.p)

        # The differences must add up to 0: what they add up to is the error of the rows' log-sums.
        d = t.d - np.log1p(differences(t.d).sum(-1, keepdims=True))
        apart, sign = differences(d), -np.sign(t.d)
        # Of what has another sign: s_j - sum_k p_k s_k
        up, down = (sign > 0), (sign < 0)

        def centred(p: Any) -> Any:
            above, below = (p * up).sum(-1, keepdims=True), (p * down).sum(-1, keepdims=True)
            tie = (p * (sign == 0)).sum(-1, keepdims=True)
            return p * np.where(up, 2 * below + tie, np.where(down, -2 * above - tie, below - above)) / 2

        return abs(apart).sum(-1) / 2, centred(t.p), -centred(t.q)
    minus = -abs(t.d)
    weight = np.where(t.d > 0, c, w)
    with np.errstate(all="ignore"):
        larger = np.where(
            minus > -0.5, np.log1p((1 - weight) * np.expm1(minus)), np.log(weight + (1 - weight) * np.exp(minus))
        )
        smaller = larger - minus
    log_m_p, log_m_q = np.where(t.d > 0, smaller, larger), np.where(t.d > 0, larger, smaller)

    def phi(x: Any) -> Any:  # exp(x) - 1 - x
        series = x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))))
        with np.errstate(all="ignore"):
            return np.where(abs(x) < 1e-3, series, np.expm1(x) - x)

    def terms(p: Any, log_m: Any) -> Any:  # a class that p excludes has m, the limit of p phi
        with np.errstate(all="ignore"):
            return np.where(p > 0, p * phi(log_m), w * t.p + c * t.q).sum(-1)

    from_p, from_q = terms(t.p, log_m_p), terms(t.q, log_m_q)
    log_m_p, log_m_q = np.clip(log_m_p, -1e30, 1e30), np.clip(log_m_q, -1e30, 1e30)
    if divergence.family == "weighted_js":
        grad_p, grad_q = t.p * (-log_m_p - from_p[:, None]), t.q * (-log_m_q - from_q[:, None])
        return w * from_p + c * from_q, w * grad_p, c * grad_q
    share = -np.expm1(-log_m_p)
    mean = (t.p * share).sum(-1, keepdims=True)
    return from_p, t.p * (-log_m_p - from_p[:, None] + w * (share - mean)), t.q * (c * share + w * mean)


DIVERGENCES = [
    *(Divergence(family, weight) for family in ("skewed_kl", "weighted_js") for weight in (0.1, 0.5, 0.9)),
    Divergence("total_variation"),
]


@in_rows_and_lanes
@pytest.mark.parametrize("classes", [1, 7, 65, 1000, 20011])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divergences(isa: str, dtype: torch.dtype, classes: int, class_dim: int) -> None:
    p, q = pair_rows(dtype, classes)
    laid = [z.movedim(1, class_dim).contiguous() for z in (p, q)]
    t, real = pair_truth(p, q), real_of(dtype)
    eps = torch.finfo(real).eps / 2
    size = np.where(np.isinf(wide(p)), 0, abs(wide(p))) + np.where(np.isinf(wide(q)), 0, abs(wide(q)))
    moved = (np.where(np.isinf(t.d), 0, np.minimum(abs(t.d), 1)) * np.maximum(t.p, t.q) * (size + 1)).sum(-1) + eps
    for divergence in DIVERGENCES:
        got = cpu.pair_row_stats(*laid, class_dim=class_dim, kl=False, divergence=divergence, same_top=False)
        value, *slopes = divergence_truth(divergence, t)
        assert got.kl is None
        assert got.divergence is not None
        assert bool((got.divergence >= 0).all())
        assert got.divergence[0] == 0
        assert ulps(got.divergence, value, moved) <= 6, divergence
        upstream = torch.randn(9, dtype=real)
        grads = cpu.pair_row_grad(
            *laid, got.saved, class_dim=class_dim, divergence=divergence, divergence_grad=upstream
        )
        # What p's and q's factors are made of: a logarithm of m / p, and 1 / weight in what the skewed KL adds.
        most = 2 + np.log1p(1 / divergence.weight) + (divergence.family == "skewed_kl") / divergence.weight
        for made, slope, own in zip(grads, slopes, (t.p, t.q), strict=True):
            assert made is not None
            g = abs(wide(upstream))[:, None]
            exact = wide(upstream)[:, None] * slope
            slack = 2 * eps * (g * own * (most + np.minimum(size, 40.0)) + 2 * abs(exact))
            slack += abs(exact) * Wide(torch.finfo(dtype).eps) * (dtype != real)
            slack += Wide(torch.finfo(real).tiny) * 1e3 + 2.0**-24 * (dtype == torch.float16)
            error = abs(wide(made.movedim(class_dim, 1)) - exact)
            assert bool((error <= 4 * slack).all()), (divergence, float((error / slack).max()))
    one = cpu.pair_row_grad(p, q, got.saved, divergence=divergence, divergence_grad=upstream, need_second=False)
    assert one[1] is None


@pytest.mark.parametrize("divergence", DIVERGENCES[::3], ids=lambda d: d.family)
def test_divergences_in_any_layout_and_number_of_threads(isa: str, divergence: Divergence) -> None:
    for _, p, class_dim in layouts(300):
        q = p + torch.randn_like(p)
        asked: dict[str, Any] = {"kl": False, "divergence": divergence}
        got = cpu.pair_row_stats(p, q.contiguous(), class_dim=class_dim, **asked)
        flat = [x.movedim(class_dim, -1).reshape(-1, 300).contiguous() for x in (p, q)]
        expected = cpu.pair_row_stats(*flat, **asked)
        assert got.divergence is not None
        assert expected.divergence is not None
        torch.testing.assert_close(got.divergence.flatten(), expected.divergence, rtol=1e-6, atol=0)
        g = torch.randn(got.divergence.shape)
        grads = cpu.pair_row_grad(
            p, q.contiguous(), got.saved, class_dim=class_dim, divergence=divergence, divergence_grad=g
        )
        flat_grads = cpu.pair_row_grad(*flat, expected.saved, divergence=divergence, divergence_grad=g.flatten())
        for made, flat_made in zip(grads, flat_grads, strict=True):
            assert made is not None
            assert flat_made is not None
            torch.testing.assert_close(made.movedim(class_dim, -1).reshape(-1, 300), flat_made, rtol=1e-5, atol=1e-7)
    p, q = torch.randn(270, 20011) * 3, torch.randn(270, 20011) * 3
    p[5] = q[5] + 1e-4 * torch.randn(20011)  # which takes more than one pass
    p[7, :3], q[260:262] = -INF, 3e4
    up = torch.randn(270)
    expected = cpu.pair_row_stats(p, q, **asked)
    a, b, results = p.T.contiguous(), q.T.contiguous(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got = cpu.pair_row_stats(a, b, class_dim=0, **asked)
        over = a.clone(), b.clone()
        cpu.pair_row_grad(*over, got.saved, class_dim=0, divergence=divergence, divergence_grad=up, out=over)
        results.append([got.divergence, got.saved, *over])
        torch.testing.assert_close(got.divergence, expected.divergence, rtol=2e-6, atol=1e-12)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True) if x is not None and y is not None)
    grads = cpu.pair_row_grad(p, q, expected.saved, divergence=divergence, divergence_grad=up)
    for made, lane_made in zip(grads, over, strict=True):
        assert made is not None
        torch.testing.assert_close(lane_made.T, made, rtol=1e-5, atol=1e-7)


def test_pair_layouts(isa: str) -> None:
    for _, p, class_dim in layouts(300):
        q = p + torch.randn_like(p)
        got = all_measures(p, q.contiguous(), class_dim=class_dim)
        flat = [x.movedim(class_dim, -1).reshape(-1, 300).contiguous() for x in (p, q)]
        expected = all_measures(*flat)
        assert got.kl is not None
        g = torch.randn(got.kl.shape)
        grads = cpu.pair_row_grad(p, q.contiguous(), got.saved, class_dim=class_dim, kl=g, js=g)
        flat_grads = cpu.pair_row_grad(*flat, expected.saved, kl=g.flatten(), js=g.flatten())
        for name in MEASURES:
            torch.testing.assert_close(getattr(got, name).flatten(), getattr(expected, name), rtol=1e-6, atol=0)
        for made, flat_made in zip(grads, flat_grads, strict=True):
            assert made is not None
            assert flat_made is not None
            torch.testing.assert_close(made.movedim(class_dim, -1).reshape(-1, 300), flat_made, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("rows", "classes"), [(270, 20011), (5000, 9000), (300, 65)])
def test_pair_lanes_of_many_rows_in_place(isa: str, rows: int, classes: int) -> None:
    p, q = torch.randn(rows, classes) * 3, torch.randn(rows, classes) * 3
    p[5], q[5] = q[5], q[5] + 1e-4 * torch.randn(classes)  # which takes more than one pass
    p[7, :3], q[260:262] = -INF, 3e4
    target, up = torch.randint(0, classes, (rows,)), torch.randn(rows)
    expected = all_measures(p, q, target)
    grads = cpu.pair_row_grad(p, q, expected.saved, target, kl=up, js=up, nll_q=up)
    a, b = p.T.contiguous(), q.T.contiguous()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got = all_measures(a, b, target, class_dim=0)
        over = a.clone(), b.clone()
        cpu.pair_row_grad(*over, got.saved, target, class_dim=0, kl=up, js=up, nll_q=up, out=over)
        results.append([*(x for x in got if isinstance(x, Tensor)), *over])
        for name in (*MEASURES, "nll_p", "nll_q", "same_top"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=2e-6, atol=1e-12)
        # Of p's gradient, -d - KL of about 10 nats cancels where it is small; of q's, nothing does.
        for made, by_rows, rounding in zip(over, grads, (1e-6, 1e-8), strict=True):
            assert by_rows is not None
            near = 1e-5 * by_rows.abs() + rounding * by_rows.abs().amax(1, keepdim=True)
            assert bool(((made.T - by_rows).abs() <= near).all())
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


# ---- what every call promises ----------------------------------------------------------------------------------------


def everything(z: Tensor, other: Tensor, target: Tensor, dense: Tensor) -> list[Tensor]:
    stats = cpu.row_stats(z, target, lse=True, entropy=True, argmax=True, rank=True)
    soft = cpu.row_stats(z, dense_target=dense, smooth=True)
    grad = cpu.row_grad(z, stats.row_max, stats.log_sum, target, a_scale=1.0, c_scale=-1.0)
    pair = all_measures(z, other)
    up = torch.ones(z.shape[0], dtype=stats.row_max.dtype)
    grads = cpu.pair_row_grad(z, other, pair.saved, kl=up, js=up)
    out = [*stats, *soft, grad, *pair, *grads]
    return [x for x in out if isinstance(x, Tensor)]


@pytest.mark.parametrize("shape", [(700, 1000), (3, 150001), (20000, 9), (1, 70000)])
def test_threads_and_repetition_change_no_bit(isa: str, shape: tuple[int, int]) -> None:
    z, other, dense = torch.randn(shape), torch.randn(shape), torch.rand(shape)
    target = torch.randint(0, shape[1], shape[:1])
    one = everything(z, other, target, dense)
    torch.set_num_threads(2)
    for _ in range(2):
        for a, b in zip(one, everything(z, other, target, dense), strict=True):
            assert torch.equal(a, b)
    if shape[0] > 16:  # nor do the neighbours of a row, where rows are not cut into parts
        few = everything(z[5:9], other[5:9], target[5:9], dense[5:9])
        if shape[1] < 65536:
            for a, b in zip(one, few, strict=True):
                assert torch.equal(a[5:9], b)


def test_two_python_threads_at_once() -> None:
    torch.set_num_threads(2)
    z, other, dense = torch.randn(400, 3000), torch.randn(400, 3000), torch.rand(400, 3000)
    target = torch.randint(0, 3000, (400,))
    expected = everything(z, other, target, dense)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(5):
            wrong.extend(
                i
                for i, (a, b) in enumerate(zip(expected, everything(z, other, target, dense), strict=True))
                if not torch.equal(a, b)
            )

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_a_target_that_is_no_class_is_reported(isa: str) -> None:
    z = torch.randn(3000, 5)
    target = torch.zeros(3000, dtype=torch.int64)
    target[10] = -100
    assert cpu.row_stats(z, target).bad_row == -1
    for bad in (5, -1, 2**40):
        target[2500] = bad
        got = cpu.row_stats(z, target)
        assert got.bad_row == 2500
        assert got.nll is not None
        assert bool(got.nll[2500].isnan())
        assert bool(got.nll[:2500].isfinite().all())
        assert cpu.pair_row_stats(z, z, target).bad_row == 2500
    assert cpu.row_stats(z, target, ignore_index=2**40).bad_row == 10


def test_no_rows() -> None:
    stats = cpu.row_stats(torch.empty(0, 7), torch.empty(0, dtype=torch.int64))
    assert stats.row_max.shape == (0,)
    assert cpu.row_grad(torch.empty(0, 7), stats.row_max, stats.log_sum, a_scale=1.0).shape == (0, 7)
    assert all_measures(torch.empty(0, 7), torch.empty(0, 7)).saved.shape[0] == 0


# ---- memory and processes --------------------------------------------------------------------------------------------


def test_pool_reuses_and_returns_memory() -> None:
    cpu.pool_clear()
    before = cpu.native_info()["pool_used_bytes"]
    like = torch.randn(1024, 1024)
    block = cpu.empty_like_pooled(like)
    assert (block.shape, block.dtype, block.stride()) == (like.shape, like.dtype, like.stride())
    assert cpu.native_info()["pool_used_bytes"] == before + (4 << 20)
    view = block[3:]
    address = block.data_ptr()
    del block
    assert cpu.native_info()["pool_used_bytes"] == before + (4 << 20)  # the view keeps it
    del view
    assert cpu.native_info()["pool_used_bytes"] == before
    assert cpu.native_info()["pool_free_bytes"] >= 4 << 20
    again = cpu.empty_like_pooled(like)
    assert again.data_ptr() == address
    del again
    cpu.pool_clear()
    assert cpu.native_info()["pool_free_bytes"] == 0
    permuted = torch.randn(64, 8, 4096).to(torch.bfloat16).permute(2, 0, 1)
    other = cpu.empty_like_pooled(permuted)
    assert (other.dtype, other.shape, other.stride()) == (torch.bfloat16, permuted.shape, permuted.stride())
    small = torch.empty(10)
    used = cpu.native_info()["pool_used_bytes"]
    assert cpu.empty_like_pooled(small).shape == (10,)
    assert cpu.native_info()["pool_used_bytes"] == used


def test_autograd_takes_pooled_gradients_and_gives_them_back() -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sum()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return cpu.empty_like_pooled(ctx.saved_tensors[0]).fill_(2.0)

    cpu.pool_clear()
    used = cpu.native_info()["pool_used_bytes"]
    x = torch.randn(1024, 1024, requires_grad=True)
    for _ in range(3):
        x.grad = None
        Scaled.apply(x).backward()
        assert x.grad is not None
        assert x.grad[5, 5] == 2.0
        assert cpu.native_info()["pool_used_bytes"] == used + (4 << 20)  # no copy was made, and one block serves all
        assert cpu.native_info()["pool_free_bytes"] == 0
    x.grad = None
    assert cpu.native_info()["pool_used_bytes"] == used


SWITCHES = """
import torch
from logitless.kernels import cpu
from logitless.kernels.interface import PairRowStats
held = [cpu.empty_like_pooled(torch.empty(1 << 20)) for _ in range(5)]
print(cpu.native_info()["isa"], cpu.native_info()["pool_used_bytes"] >> 20, end=" ")
del held
print(cpu.native_info()["pool_free_bytes"] >> 20)
"""

FORKS = """
import os, torch
from logitless.kernels import cpu
from logitless.kernels.interface import PairRowStats
torch.set_num_threads(2)
z = torch.randn(512, 4096)
before = cpu.row_stats(z).log_sum
grad = cpu.empty_like_pooled(z).fill_(1.0)
for _ in range(2):
    child = os.fork()
    if child == 0:
        here = cpu.row_stats(z).log_sum
        other = cpu.empty_like_pooled(z)
        torch.set_num_threads(1)  # torch's own operators wait forever for threads that a fork does not copy
        same = torch.equal(here, before)
        os._exit(0 if same and other.data_ptr() != grad.data_ptr() and bool((grad == 1.0).all()) else 1)
    assert os.waitpid(child, 0)[1] == 0
assert torch.equal(cpu.row_stats(z).log_sum, before)
print("forked")
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_environment_switches() -> None:
    assert run(SWITCHES, LOGITLESS_ISA="portable", LOGITLESS_POOL_BYTES=str(9 << 20)).stdout == "portable 20 8\n"
    assert run(SWITCHES, LOGITLESS_ISA="portable", LOGITLESS_POOL="0").stdout == "portable 0 0\n"
    wrong = run(SWITCHES, LOGITLESS_ISA="sse9")
    assert wrong.returncode != 0
    assert "sse9: expected one of" in wrong.stderr
    with pytest.raises(RuntimeError, match="sse9: expected one of"):
        _native.select_isa("sse9")


def test_a_child_forked_after_use_does_not_hang() -> None:
    done = run(FORKS, OMP_NUM_THREADS="2")
    assert (done.returncode, done.stdout) == (0, "forked\n"), done.stderr


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("spread", [0.0, 1e-3, 2.0, 30.0])
@pytest.mark.parametrize("classes", [1, 2, 7, 16, 17, 33, 65, 100, 256, 257, 1000, 1025, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_that_are_folded_together_may_lie_far_apart(dtype: torch.dtype, classes: int, spread: float) -> None:
    """Rows of few classes share a unit: neither their own size nor that of their neighbours may show."""
    draw = torch.Generator().manual_seed(classes)
    rows = 67
    base = torch.tensor([0.0, 3.0, -60.0, 39.0, 41.0, -14.0, -16.0, 200.0, -1000.0, 12000.0, -19000.0])
    logits = (spread * torch.randn(rows, classes, generator=draw) + base[torch.arange(rows) % 11, None]).to(dtype)
    for row, lead in enumerate([25.0, 60.0, 90.0, 103.0, 120.0, 400.0], start=20):
        logits[row, row % classes] += lead  # one class dominates
    logits[40, 1:], logits[41, :-1], logits[42, ::2], logits[43, 1::2] = -math.inf, -math.inf, -math.inf, -math.inf
    target = torch.randint(classes, (rows,), generator=draw)
    target[50], target[0], target[33:36] = -100, -100, -100
    stats = cpu.row_stats(logits, target)
    read = target != -100
    finite = read & logits.amax(1).isfinite()
    expected = stats_truth(logits[finite]).log_sum
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert torch.equal(stats.row_max[finite].double(), logits.double().amax(1)[finite])
    assert (abs(wide(stats.log_sum[finite]) - expected) <= 2 * eps * expected + 2.0**-149).all()
    assert bool((stats.log_sum[~read] == 0).all())
    assert stats.log_sum[read & ~finite].isnan().all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("classes", [10, 100, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_many_ignored_rows_after_each_other(dtype: torch.dtype, classes: int) -> None:
    draw = torch.Generator().manual_seed(classes)
    logits = torch.randn(300, classes, generator=draw).to(dtype)
    target = torch.randint(classes, (300,), generator=draw)
    alone = cpu.row_stats(logits, target)
    ignored = torch.zeros(300, dtype=torch.bool)
    ignored[20:283] = True
    logits[ignored] = NAN
    stats = cpu.row_stats(logits, torch.where(ignored, -100, target))
    assert stats.nll is not None
    assert alone.nll is not None
    for got, expected in ((stats.nll, alone.nll), (stats.log_sum, alone.log_sum), (stats.row_max, alone.row_max)):
        assert torch.equal(got[~ignored], expected[~ignored])
        assert bool((got[ignored] == 0).all())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_odd_row_leaves_those_folded_with_it_alone(dtype: torch.dtype, odd: float) -> None:
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 90, generator=draw).to(dtype)
    target = torch.randint(90, (40,), generator=draw)
    alone = cpu.row_stats(logits, target)
    logits[5], logits[16, 3], logits[32] = odd, odd, odd
    odd_ones = torch.zeros(40, dtype=torch.bool)
    odd_ones[[5, 16, 32]] = True
    stats = cpu.row_stats(logits, target)
    assert stats.nll is not None
    assert alone.nll is not None
    assert torch.equal(stats.log_sum[~odd_ones], alone.log_sum[~odd_ones])
    assert torch.equal(stats.nll[~odd_ones], alone.nll[~odd_ones])
    expected = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
    assert torch.allclose(stats.nll[odd_ones].double(), expected[odd_ones], rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "classes"),
    [(torch.float32, 101), (torch.bfloat16, 101), (torch.float64, 509), (torch.bfloat16, 3)],
)
def test_a_gradient_that_bypasses_the_caches_is_the_same(dtype: torch.dtype, classes: int) -> None:
    """Above 64 MB short rows go by way of a buffer."""
    rows = (65 << 20) // (classes * dtype.itemsize) + 3
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(rows, classes, generator=draw).to(dtype)
    target = torch.randint(classes, (rows,), generator=draw)
    target[::97] = -100
    stats = cpu.row_stats(logits, target)

    def grad(part: slice) -> torch.Tensor:
        given = stats.row_max[part], stats.log_sum[part]
        return cpu.row_grad(logits[part], *given, target[part], upstream=torch.tensor(0.375), a_scale=1.0, c_scale=-1.0)

    whole = grad(slice(None))
    half = rows // 2
    assert torch.equal(whole[:half], grad(slice(half)))
    assert torch.equal(whole[half:], grad(slice(half, None)))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("upstream", [0.0, 1e-36, -1e-28, 3e-7, -2.5, 1e25, -1e32])
@pytest.mark.parametrize("classes", [5, 100, 1000, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_any_size_of_upstream(dtype: torch.dtype, classes: int, upstream: float) -> None:
    """Where it or the probability is below 2^-124 a gradient may be 0; at a logit of -inf it must be."""
    draw = torch.Generator().manual_seed(classes)
    logits = (12 * torch.randn(37, classes, generator=draw)).to(dtype)
    logits[:, 1], logits[3, 2:] = -math.inf, -math.inf
    target = torch.zeros(37, dtype=torch.int64)
    stats = cpu.row_stats(logits, target)
    scale = torch.tensor(upstream)
    got = cpu.row_grad(logits, stats.row_max, stats.log_sum, target, upstream=scale, a_scale=1.0, c_scale=-1.0)
    exact = p_minus_one_hot(stats_truth(logits, target), target) * Wide(scale.item())
    eps = torch.finfo(dtype).eps
    error = abs(wide(got) - exact)
    assert (error <= 3 * eps * abs(exact) + Wide(2.0) ** -124 * max(1.0, abs(upstream))).all()
    assert bool((got[:, 1] == 0).all())
    assert bool((got[3] == 0).all())  # all its probability is at the target


# ---- whole losses: the fold that holds out the target ----------------------------------------------------------------


def whole_losses(logits: Tensor, target: Tensor, save: bool = True, mean: bool = True) -> tuple[Tensor, bytes]:
    """Each row's loss, into memory that held NaN, and what the gradient needs."""
    losses = torch.full((len(logits),), NAN, dtype=real_of(logits.dtype))
    answer = cpu.cross_entropy(logits, target, None, -100, 0.0, mean, None, losses, save)
    assert answer is not None
    bad_row, loss, saved = answer
    assert bad_row == -1
    rows = int((target != -100).sum())
    if rows:
        assert loss == pytest.approx(float(losses.double().sum() / (rows if mean else 1)), rel=1e-6, nan_ok=True)
    return losses, saved


def loss_tolerance(dtype: torch.dtype) -> float:
    """Relative; where losses will be rounded to 16 bits, exponentials are to 2^-21; a float64 loss adds two terms."""
    return {2: 2.0**-20, 4: 2 * torch.finfo(dtype).eps, 8: 3 * torch.finfo(dtype).eps}[dtype.itemsize]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("spread", [0.0, 1e-3, 2.0, 30.0])
@pytest.mark.parametrize("classes", [1, 2, 7, 16, 17, 32, 33, 65, 100, 256, 257, 1000, 1025, 2000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_of_rows_that_lie_far_apart(dtype: torch.dtype, classes: int, spread: float) -> None:
    draw = torch.Generator().manual_seed(classes)
    rows = 150
    base = torch.tensor([0.0, 3.0, -60.0, 39.0, 41.0, -14.0, -16.0, 200.0, -1000.0, 12000.0, -19000.0])
    shift = torch.where(torch.arange(rows) < 64, 0.0, base[torch.arange(rows) % 11])  # the first go together
    logits = (spread * torch.randn(rows, classes, generator=draw) + shift[:, None]).to(dtype)
    target = torch.randint(classes, (rows,), generator=draw)
    leads = 25.0, 60.0, 90.0, 103.0, 120.0, 400.0, -25.0, -60.0, -100.0, -600.0, -800.0
    for row, lead in enumerate(leads, start=120):
        logits[row, target[row]] += lead  # the target dominates, or is far below the others
    others = (target[140:144] + 1) % classes
    logits[140, 1:], logits[141, :-1], logits[142, ::2] = -INF, -INF, -INF
    logits[torch.arange(144, 148), others] = INF if classes > 1 else 0.0
    target[50], target[0], target[133:137], target[63:66] = -100, -100, -100, -100
    losses, _ = whole_losses(logits, target)
    read = target != -100
    assert bool((losses[~read] == 0).all())
    with np.errstate(all="ignore"):
        truth = stats_truth(logits[read], target[read]).nll
    expected = torch.nn.functional.cross_entropy(logits[read].double(), target[read], reduction="none")
    odd = ~expected.isfinite()
    assert torch.equal(losses[read][odd].double().nan_to_num(nan=-1.0), expected[odd].nan_to_num(nan=-1.0))
    fine = (~odd).numpy()
    error = abs(wide(losses[read])[fine] - truth[fine])
    assert (error <= loss_tolerance(dtype) * truth[fine] + 2.0**-118).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("classes", [1, 5, 16, 31, 32, 33, 47, 48, 63, 64, 65, 99, 289, 1030])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_class_can_be_the_target(dtype: torch.dtype, classes: int) -> None:
    """One class is 30 nats above the others, which tells whether it or another logit was held out."""
    target = torch.arange(classes)
    logits = torch.linspace(-1, 1, classes).expand(classes, classes).contiguous().to(dtype)
    logits[target, target] = 30.0
    losses, _ = whole_losses(logits, target)
    truth = stats_truth(logits, target).nll
    assert (abs(wide(losses) - truth) <= loss_tolerance(dtype) * truth).all()
    if classes > 1:
        beside = (target + 1) % classes
        losses, _ = whole_losses(logits, beside)
        truth = stats_truth(logits, beside).nll
        assert (abs(wide(losses) - truth) <= loss_tolerance(dtype) * truth).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("odd", [NAN, -NAN, INF, -INF, 300.0, -1e30])
@pytest.mark.parametrize("classes", [9, 90, 1100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loss_does_not_tell_its_neighbours(dtype: torch.dtype, classes: int, odd: float) -> None:
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(200, classes, generator=draw).to(dtype)
    target = torch.randint(classes, (200,), generator=draw)
    alone, _ = whole_losses(logits, target)
    logits[5], logits[70, 3], logits[131, target[131]] = odd, odd, odd
    target[199] = -100
    logits[199] = NAN
    plain = torch.ones(200, dtype=torch.bool)
    plain[[5, 70, 131, 199]] = False
    losses, _ = whole_losses(logits, target)
    assert torch.equal(losses[plain], alone[plain])
    expected = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
    assert torch.allclose(losses[~plain].double(), expected[~plain], rtol=2e-6, atol=1e-15, equal_nan=True)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("share", [0.0, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_masked_logits_and_ignored_rows(dtype: torch.dtype, masked: bool, share: float) -> None:
    draw = torch.Generator().manual_seed(8)
    logits = (3 * torch.randn(700, 130, generator=draw)).to(dtype)
    target = torch.randint(64, (700,), generator=draw)
    if masked:
        logits[:, 64::2], logits[3, 1::2], logits[::7, 65] = -INF, -1e9, -200.0
    ignored = torch.rand(700, generator=draw) < share
    target[ignored] = -100
    logits[ignored] = NAN
    losses, saved = whole_losses(logits, target)
    assert bool((losses[ignored] == 0).all())
    truth = stats_truth(logits[~ignored], target[~ignored]).nll
    assert (abs(wide(losses[~ignored]) - truth) <= loss_tolerance(dtype) * truth).all()
    again, nothing = whole_losses(logits, target, save=False)
    assert torch.equal(again, losses)
    assert (len(saved), nothing) == (24 + 700 * 12, b"")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("gap", [0.0, -30.0, -300.0, 30.0])
@pytest.mark.parametrize("classes", [3, 100, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_of_losses_whose_target_is_far_from_the_others(dtype: torch.dtype, classes: int, gap: float) -> None:
    draw = torch.Generator().manual_seed(classes)
    logits = (4 * torch.randn(70, classes, generator=draw)).to(dtype)
    target = torch.randint(classes, (70,), generator=draw)
    logits[torch.arange(70), target] += gap
    target[13] = -100
    _, saved = whole_losses(logits, target, mean=False)
    upstream = torch.randn(70, generator=draw).to(real_of(dtype))
    got = cpu.cross_entropy_grad(logits, target, None, saved, upstream)
    read = target != -100
    assert bool((got[~read] == 0).all())
    exact = p_minus_one_hot(stats_truth(logits[read], target[read]), target[read]) * wide(upstream[read])[:, None]
    error = abs(wide(got[read]) - exact)
    folds = -stats_truth(logits[read]).log_p
    ulps_allowed = 3 + (folds if dtype == torch.float64 else folds / 44)  # 64 powers of 2, where exp drifts
    assert (error <= ulps_allowed * torch.finfo(dtype).eps * abs(exact) + 2.0**-124).all()
