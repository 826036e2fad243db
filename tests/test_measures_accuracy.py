"""The measures of rows against exact arithmetic, by the public functions: adversarial rows and rows drawn at random."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import exact_rows
import logitless as ll

INF = math.inf
wide = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])

# What the compiled kernels leave out: a class that weighs less than float32's smallest normal number in its row. A
# divergence, of probabilities, so small that such classes count is not held to 4 ulp.
SMALLEST = {torch.float32: 2.0**-100, torch.float64: 2.0**-990}


def allowed(name: str, value: exact_rows.Value, dtype: torch.dtype) -> float:
    """4 ulp, or what moving each logit by half its last place does: never above 6 in float32, but for an lse.

    Of a total variation 6: the terms of one, q - p, are differences.
    """
    if name == "tv":
        return 6 + 4 * float(value.condition / abs(value.exact)) * (dtype == torch.float64)
    moved = float(value.condition / abs(value.exact)) / 2 if value.exact else 0.0
    if dtype == torch.float32 and name != "lse":
        return max(4, min(moved, 6))
    return 4 + 4 * moved


def assert_right(name: str, got: Tensor, value: exact_rows.Value, dtype: torch.dtype, what: Any) -> None:
    assert got.dtype == dtype
    if not value.exact:
        # Rows a constant apart; equal rows give exactly 0, see below.
        assert 0 <= float(got) < max(SMALLEST[dtype], 1e-100), (name, what)
        return
    if 0 < abs(value.exact) < SMALLEST[dtype]:
        assert 0 <= float(got) < 2 * SMALLEST[dtype], (name, what)
        return
    error = exact_rows.ulps(float(got), value.exact, dtype)
    assert error <= allowed(name, value, dtype), (name, error, allowed(name, value, dtype), what)


def check_rows(p: Tensor, q: Tensor, target: int, what: Any = None) -> None:
    dtype = p.dtype
    stats, pair = ll.token_stats(p[None], torch.tensor([target])), ll.pair_stats(p[None], q[None])
    truth, pair_truth = exact_rows.token_stats(p, target), exact_rows.pair_stats(p, q)
    for name, value in truth.items():
        assert_right(name, getattr(stats, name)[0], value, dtype, what)
    for name, value in pair_truth.items():
        assert_right(name, getattr(pair, name)[0], value, dtype, what)
    alone = {"entropy": ll.entropy(p), "kl": ll.kl(p, q), "js": ll.js(p, q)}
    assert_right("entropy", alone["entropy"], truth["entropy"], dtype, what)
    for name in ("kl", "js"):
        assert_right(name, alone[name], pair_truth[name], dtype, what)
    for weight in (0.1, 0.9):
        mixed = exact_rows.divergences(p, q, weight)
        found = {"skewed_kl": ll.kl(p, q, skew=weight), "weighted_js": ll.js(p, q, beta=weight), "tv": ll.tv(p, q)}
        for name, value in mixed.items():
            assert_right(name, found[name], value, dtype, (what, weight))
            assert bool((found[name] >= 0).all())
    for value in (pair.kl, pair.reverse_kl, pair.js, alone["kl"], alone["js"], ll.kl(q, p)):
        assert bool((value >= 0).all())
    for equal in (
        ll.kl(p, p),
        ll.js(p, p),
        ll.kl(p, p, skew=0.3),
        ll.js(p, p, beta=0.3),
        ll.tv(p, p),
        ll.pair_stats(q, q).reverse_kl,
    ):
        assert float(equal) == 0


def waves(count: int, phase: float = 1.7) -> list[float]:
    return [math.sin(phase * i) for i in range(count)]


def adversarial() -> Iterator[tuple[str, list[float], list[float]]]:
    for spread in (1e-30, 1e-15, 1e-7, 1e-3, 1.0, 30.0, 1e3, 1e4):
        yield f"spread {spread}", [spread * x for x in waves(37)], waves(37, 0.9)
        yield f"spread {spread} of both", [spread * x for x in waves(37)], [spread * x for x in waves(37, 0.9)]
    for margin in (10.0, 27.6, 45.0, 60.0):  # losses of 5e-5 to 1e-26
        certain = [-0.5] * 20 + [margin] + waves(20)
        yield f"certain by {margin} and flat", certain, waves(41)
        yield f"certain by {margin} of the same class", certain, [*waves(20), margin + 1, *waves(20)]
        yield f"certain by {margin} of another class", certain, [margin, *waves(40)]
    for distance in (1e-7, 1e-5, 1e-3, 0.03, 0.2, 1.0):
        p = [3 * x for x in waves(50)]
        yield f"pair {distance} apart", p, [x + distance * y for x, y in zip(p, waves(50, 0.6), strict=True)]
        yield f"pair one class {distance} apart", p, [*p[:20], p[20] + distance, *p[21:]]
    yield "shifted", waves(50), [x + 4.0 for x in waves(50)]
    yield "shifted by what rounds", waves(50), [x + 12.3 for x in waves(50)]
    yield "opposite offsets", [x + 9e3 for x in waves(50)], [x - 9e3 for x in waves(50, 0.3)]
    yield "ties", [1.0, 1.0, 0.0] * 9, [0.0, 1.0, 1.0] * 9
    yield "all equal", [7.25] * 100, [-3.5] * 100
    yield "all equal and one apart", [7.25] * 100, [*[-3.5] * 99, -3.0]
    yield "masked alike", [0.0, -INF, 1.0, 2.0], [0.5, -INF, 1.0, -2.0]
    yield "masked in q", [0.0, 1.0, 2.0], [0.5, -INF, 1.0]
    yield "masked in p", [0.0, -INF, 2.0], [0.5, 3.0, 1.0]
    yield "nothing in common", [0.0, -INF], [-INF, 0.0]
    yield "opposite certainties", [1e4, 0.0], [0.0, 1e4]
    yield "two classes", [0.0, 24.25], [0.0009765625, 0.0]
    yield "q rare in p", [45.0, 13.6, 13.0, 12.5], [25.0, 13.6, 13.0, 12.5]  # p exp(d) with d near 20
    yield "beyond the range of exp", [3e4, 3e4 - 2, -3e4], [3e4 - 1, 3e4, 0.0]
    yield "one class", [3.5], [-2.0]
    yield "a log-sum-exp near 0", [-0.69314718] * 2, [-1.0986123] * 2
    yield "ascending", [float(i) for i in range(90)], [50.0 * i for i in range(90)]


@wide
@pytest.mark.parametrize(("name", "p", "q"), list(adversarial()), ids=[name for name, _, _ in adversarial()])
def test_adversarial_rows(name: str, p: list[float], q: list[float], dtype: torch.dtype) -> None:
    for first, second in ((p, q), (q, p)):
        row, other = torch.tensor(first, dtype=dtype), torch.tensor(second, dtype=dtype)
        finite = [j for j, x in enumerate(first) if x > -INF]
        for target in {finite[0], finite[len(finite) // 2], int(row.argmax())}:
            check_rows(row, other, target, name)


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[float], list[float], int]:
    """A pair of rows: of any two spreads and offsets, or near each other; masks, ties, a class that dominates."""
    seed = draw(st.integers(0, 2**32 - 1))
    make = np.random.default_rng(seed)
    classes = draw(st.one_of(st.integers(1, 8), st.integers(9, 200)))

    def one() -> Any:
        power = draw(st.one_of(st.floats(-1, 1), st.floats(-30, 4)))
        return make.standard_normal(classes) * 10**power + draw(st.sampled_from([0.0, 0.0, 3.7, -40.0, 1e3]))

    p = one()
    if draw(st.booleans()):
        q = p + make.standard_normal(classes) * 10 ** draw(st.floats(-8, 0)) + draw(st.sampled_from([0.0, 0.0, 5.3]))
    else:
        q = one()
    for row in (p, q):
        if draw(st.booleans()):
            row[draw(st.integers(0, classes - 1))] = row.max() + draw(st.floats(0, 60))
    if draw(st.integers(0, 3)) == 0:
        p, q = np.round(p * 2) / 2, np.round(q * 2) / 2
    if classes > 1 and draw(st.integers(0, 3)) == 0:
        hidden = make.random(classes) < 0.4
        hidden[make.integers(classes)] = False
        p[hidden], q[hidden] = -INF, -INF
    finite = np.flatnonzero(np.isfinite(p))
    return p.tolist(), q.tolist(), int(finite[draw(st.integers(0, len(finite) - 1))])


@wide
@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows())
@example(([0.0, 0.0], [0.0, 0.0], 1))
def test_rows_drawn_at_random(dtype: torch.dtype, drawn: tuple[list[float], list[float], int]) -> None:
    p, q, target = drawn
    check_rows(torch.tensor(p, dtype=dtype), torch.tensor(q, dtype=dtype), target, drawn)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="the truth needs an 80-bit or wider long double")
@pytest.mark.parametrize("classes", [50_001, 200_000])
@pytest.mark.parametrize("kind", ["flat", "spread", "certain", "near"])
def test_long_rows(kind: str, classes: int) -> None:
    """Exact arithmetic takes minutes here; 64 bits of mantissa are 40 more than what is tested."""
    p = torch.randn(classes) * (5 if kind == "spread" else 1)
    q = p + 1e-3 * torch.randn(classes) if kind == "near" else torch.randn(classes)
    if kind == "certain":
        p[classes // 2], q[classes // 3] = 40.0, 30.0
    a, b = (x.double().numpy().astype(np.longdouble) for x in (p, q))
    (s, u), (t, v) = ((np.exp(-x), x) for x in map(surprises, (a, b)))
    d = u - v  # log q - log p
    with np.errstate(over="ignore"):
        bend = np.where(
            abs(d) < 1e-2, d * d / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6)))), np.expm1(d) - d
        )
    middle = (s + t) / 2
    truth = {
        "kl": (s * bend).sum(),
        "cross_entropy": (s * v).sum(),
        "entropy_p": (s * u).sum(),
        "js": ((s * np.log(s / middle)).sum() + (t * np.log(t / middle)).sum()) / 2,
    }
    found = ll.pair_stats(p, q)
    stats = ll.token_stats(p, torch.tensor(classes // 2))
    truth_of_p = {"entropy": truth["entropy_p"], "nll": u[classes // 2]}
    for got, exact in [(getattr(found, n), x) for n, x in truth.items()] + [
        (getattr(stats, n), x) for n, x in truth_of_p.items()
    ]:
        if kind == "near" and exact is truth["js"]:
            continue  # its formula cancels; JS of near rows is tested in exact arithmetic
        assert abs(np.longdouble(float(got)) - exact) <= 4 * np.spacing(np.float32(exact))


def surprises(z: Any) -> Any:
    top = z.argmax()
    others = np.exp(z - z[top])
    others[top] = 0
    return (z[top] - z) + np.log1p(others.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision_answers_in_float32(dtype: torch.dtype) -> None:
    """The same logits, and so the same 4 ulp of float32."""
    for name, p, q in adversarial():
        if max(abs(x) for x in (*p, *q) if x > -INF) > 6e4 or len(p) > 50:
            continue
        first, second = torch.tensor(p).to(dtype), torch.tensor(q).to(dtype)
        truth = exact_rows.pair_stats(first, second)
        found = ll.pair_stats(first, second)
        for measure, value in truth.items():
            assert_right(measure, getattr(found, measure), value, torch.float32, name)
