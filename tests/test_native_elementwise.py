"""The compiled elementwise and cosine kernels against mpmath and float64 formulas written here, apart from them."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("logitless._native", reason="built without the extension (LOGITLESS_NO_NATIVE)")
from logitless.kernels.cpu import elementwise as kernels
from logitless.kernels.cpu import native_info, pool_clear

SIZES = (1, 7, 65, 1000, 49153)
INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def poisoned_pool() -> Iterator[None]:
    """What the pool gives out is as full of NaN as what torch.empty gives (conftest)."""
    pool_clear()
    for _ in range(2):
        kernels.bce_logits_grad(torch.full((600, 1024), NAN), torch.full((600, 1024), NAN))
    yield
    pool_clear()


def ulps(got: Tensor, truth: Tensor, terms: Tensor | None = None) -> float:
    """The largest error in units in the last place of got's dtype at the truth, or at `terms` where those cancel.

    Infinite and NaN truths must be met exactly.
    """
    assert got.shape == truth.shape
    info = torch.finfo(got.dtype)
    size = truth.abs().double() if terms is None else torch.maximum(terms.abs(), truth.abs()).double()
    rounded = truth.to(got.dtype)
    odd = ~rounded.isfinite()
    assert torch.equal(got[odd].nan_to_num(nan=7.0), rounded[odd].nan_to_num(nan=7.0))
    exponent = torch.floor(torch.log2(size[~odd].clamp(min=float(info.tiny))))
    error = (got[~odd].double() - truth[~odd].double()).abs() / (torch.exp2(exponent) * info.eps)
    assert not bool(error.isnan().any())
    return float(error.max()) if error.numel() else 0.0


def logits_of(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits of every size from 1e-6 to 1e4."""
    return (torch.randn(size, dtype=torch.float64) * torch.logspace(-6, 4, size, dtype=torch.float64)).to(dtype)


# ---- truths ----------------------------------------------------------------------------------------------------------


def softplus(x: Tensor) -> Tensor:
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def safe(coefficient: Tensor, value: Tensor) -> Tensor:
    return torch.where((coefficient == 0) & value.isinf(), torch.zeros_like(value), coefficient * value)


def bce_logits_truth(x: Tensor, t: Tensor, w: Tensor | float = 1.0, pos: Tensor | float = 1.0) -> Tensor:
    x, t = x.double(), t.double()
    w, pos = (v.double().expand_as(x) if isinstance(v, Tensor) else torch.full_like(x, v) for v in (w, pos))
    return safe(w, safe(pos * t, softplus(-x)) + safe(1 - t, softplus(x)))


def bce_logits_slopes(x: Tensor, t: Tensor, pos: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """The two terms whose difference is the gradient."""
    x, t = x.double(), t.double()
    pos = pos.double() if isinstance(pos, Tensor) else pos
    down = torch.where(x > 0, torch.exp(-x) / (1 + torch.exp(-x)), 1 / (1 + torch.exp(x)))
    up = torch.where(x > 0, 1 / (1 + torch.exp(-x)), torch.exp(x) / (1 + torch.exp(x)))
    down, up = down.nan_to_num(nan=0.0), up.nan_to_num(nan=0.0)
    return (1 - t) * up, pos * t * down


def bce_truth(p: Tensor, t: Tensor) -> Tensor:
    p, t = p.double(), t.double()
    return -(t * p.log().clamp(min=-100) + (1 - t) * torch.log1p(-p).clamp(min=-100))


def kl_truth(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The elements, and the size of what cancels in them."""
    x, t = x.double(), t.double()
    absent = t == 0
    log_t = torch.where(absent, 0.0, t).log()
    value = torch.where(absent, 0.0, t * (log_t - x))
    return value, torch.where(absent, 0.0, t * (log_t.abs() + x.abs()))


class CosineTruth(NamedTuple):
    """The cosine, its gradients, and the sizes of the terms that cancel in them."""

    cosine: Tensor
    grads: tuple[Tensor, Tensor]
    sizes: tuple[Tensor, Tensor]


def cosine_truth(a: Tensor, b: Tensor, eps: float, embedding: bool = False) -> CosineTruth:
    """The textbook formula along the last dimension in extended precision, where no square overflows or vanishes."""
    x, y = (v.double().numpy().astype(np.longdouble) for v in (a, b))
    assert np.finfo(np.longdouble).nmant > 52
    squares = [(v * v).sum(-1, keepdims=True) for v in (x, y)]
    lengths = [np.sqrt(s + np.longdouble("1e-12")) if embedding else np.sqrt(s) for s in squares]
    norms = lengths if embedding else [np.maximum(n, np.longdouble(eps)) for n in lengths]
    pulls = [1.0 if embedding else (n >= eps) for n in lengths]
    u, v = x / norms[0], y / norms[1]
    cosine = (u * v).sum(-1, keepdims=True)
    grads = ((v - pulls[0] * cosine * u) / norms[0], (u - pulls[1] * cosine * v) / norms[1])
    spread = abs(u * v).sum(-1, keepdims=True)  # the cosine's own terms may cancel too
    sizes = ((abs(v) + spread * abs(u)) / norms[0], (abs(u) + spread * abs(v)) / norms[1])

    def back(z: Any) -> Tensor:
        with np.errstate(over="ignore"):
            return torch.from_numpy(z.astype(np.float64))

    return CosineTruth(back(cosine[..., 0]), (back(grads[0]), back(grads[1])), (back(sizes[0]), back(sizes[1])))


# ---- binary cross-entropy of logits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("hard", [True, False])
def test_bce_logits_is_right_to_4_ulp(size: int, hard: bool) -> None:
    x, t = logits_of(size), torch.rand(size)
    t = t.round() if hard else t
    truth = bce_logits_truth(x, t)
    assert ulps(kernels.bce_logits(x, t), truth) <= 4
    assert kernels.bce_logits_sum(x, t) == pytest.approx(float(truth.sum()), rel=1e-6)
    up, down = bce_logits_slopes(x, t)
    assert ulps(kernels.bce_logits_grad(x, t), up - down, torch.maximum(up, down)) <= 4


def test_bce_logits_at_its_extremes_against_mpmath() -> None:
    points = [0.0, 1e-30, -1e-30, 0.5, 1.0, -1.0, 16.0, 17.5, 27.6, 30.0, 80.0, 87.0, 88.0, 95.0, 103.0, 200.0, 1e4]
    points += [-p for p in points]
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(points, dtype=dtype)
        with mpmath.workdps(60):
            losses = [mpmath.log1p(mpmath.exp(mpmath.mpf(v))) for v in x.tolist()]
            slopes = [1 / (1 + mpmath.exp(-mpmath.mpf(v))) for v in x.tolist()]
        truth = torch.tensor([float(v) for v in losses], dtype=torch.float64)
        slope = torch.tensor([float(v) for v in slopes], dtype=torch.float64)
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        assert ulps(kernels.bce_logits(x, zero), truth) <= 4
        assert ulps(kernels.bce_logits(-x, one), truth) <= 4
        assert ulps(kernels.bce_logits_grad(x, zero), slope) <= 4
        assert ulps(-kernels.bce_logits_grad(-x, one), slope) <= 4


def test_bce_logits_of_infinities_and_nan() -> None:
    x = torch.tensor([INF, INF, INF, -INF, -INF, -INF, NAN, 0.0])
    t = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, 0.5, 1.0, NAN])
    assert kernels.bce_logits(x, t).nan_to_num(nan=-1, posinf=9).tolist() == [0, 9, 9, 0, 9, 9, -1, -1]
    assert kernels.bce_logits_grad(x, t).nan_to_num(nan=9).tolist() == [0, 1, 0.5, 0, -1, -0.5, 9, 9]
    nothing = torch.zeros(8)
    assert kernels.bce_logits(x[:6], t[:6], nothing[:6]).tolist() == [0] * 6
    assert kernels.bce_logits(x, t, nothing)[6:].isnan().all()


@pytest.mark.parametrize("shape", [(5, 7), (300, 129), (4, 3, 11, 13), (1030, 3)])
def test_weights_broadcast_every_way(shape: tuple[int, ...]) -> None:
    x, t = torch.randn(shape), torch.rand(shape)
    for weight_shape in [(), shape, shape[-1:], (1,) * len(shape), shape[:1] + (1,) * (len(shape) - 1), shape[1:]]:
        for pos_shape in [None, (), shape[-1:], (shape[1],) + (1,) * (len(shape) - 2)]:
            w = torch.rand(weight_shape) + 0.5
            pos = None if pos_shape is None else torch.rand(pos_shape) * 3
            truth = bce_logits_truth(x, t, w, 1.0 if pos is None else pos)
            assert ulps(kernels.bce_logits(x, t, w, pos), truth) <= 5
            assert kernels.bce_logits_sum(x, t, w, pos) == pytest.approx(float(truth.sum()), rel=1e-6)
            up, down = bce_logits_slopes(x, t, 1.0 if pos is None else pos)
            g = torch.randn(shape)
            got = kernels.bce_logits_grad(x, t, w, pos, upstream=g, scale=0.25)
            by = g.double() * w.double() * 0.25
            assert ulps(got, by * (up - down), by * torch.maximum(up, down)) <= 6


def arrangements(shape: tuple[int, int, int, int]) -> dict[str, Callable[[Tensor], Tensor]]:
    def strided(x: Tensor) -> Tensor:
        roomy = torch.full((*shape[:-1], 3 * shape[-1]), NAN, dtype=x.dtype)[..., 1::3]
        return roomy.copy_(x)

    return {
        "contiguous": lambda x: x.contiguous(),
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
        "strided": strided,
        "offset": lambda x: torch.cat([x.new_full((1,), NAN), x.flatten()])[1:].view(shape),
    }


@pytest.mark.parametrize("first", ["contiguous", "channels_last", "transposed", "strided", "offset"])
@pytest.mark.parametrize("second", ["contiguous", "channels_last", "strided"])
def test_any_strides_give_the_same_elements(first: str, second: str) -> None:
    shape = (3, 5, 6, 37)
    x, t, w, g = torch.randn(shape), torch.rand(shape), torch.rand(5, 1, 1), torch.randn(shape)
    plain = [kernels.bce_logits(x, t, w), kernels.bce_logits_grad(x, t, w, upstream=g)]
    change = arrangements(shape)
    xs, ts, gs = change[first](x), change[second](t), change[first](g)
    assert torch.equal(kernels.bce_logits(xs, ts, w), plain[0])
    gradient = kernels.bce_logits_grad(xs, ts, w, upstream=gs)
    assert torch.equal(gradient, plain[1])
    assert gradient.stride() == torch.empty_like(xs).stride()
    assert kernels.bce_logits_sum(xs, ts, w) == pytest.approx(float(plain[0].double().sum()), rel=1e-12)


def test_expanded_input_and_scalars() -> None:
    x, t = torch.randn(1, 9).expand(40, 9), torch.rand(40, 9)
    assert torch.equal(kernels.bce_logits(x, t), kernels.bce_logits(x.contiguous(), t))
    assert torch.equal(kernels.bce_logits_grad(x, t), kernels.bce_logits_grad(x.contiguous(), t))
    assert kernels.bce_logits_sum(torch.tensor(0.0), torch.tensor(1.0)) == pytest.approx(math.log(2), rel=1e-7)
    empty = torch.empty(0, 4)
    assert kernels.bce_logits_sum(empty, empty) == 0
    assert kernels.bce_logits_grad(empty, empty).shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", [*DTYPES, torch.int64, torch.bool, torch.uint8])
def test_bce_logits_of_every_pair_of_dtypes(dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    x, t = (torch.randn(33, 67) * 4).to(dtype), torch.rand(33, 67).round().to(target_dtype)
    truth = bce_logits_truth(x, t)
    allowed = 1 if dtype.itemsize == 2 else 4
    assert ulps(kernels.bce_logits(x, t), truth) <= allowed
    assert ulps(kernels.bce_logits(x, t, dtype=torch.float32), truth) <= 4
    up, down = bce_logits_slopes(x, t)
    assert ulps(kernels.bce_logits_grad(x, t), up - down) <= allowed


# ---- binary cross-entropy of probabilities ---------------------------------------------------------------------------


def probabilities_of(size: int) -> Tensor:
    u = torch.rand(size)
    ends = torch.tensor([0.0, 1.0, 1e-45, 1e-38, 1e-7, 1 - 2**-24, 0.5, 0.25, 0.29289323, 0.70710677])
    return torch.cat([u, u**20, 1 - u**20, ends])[torch.randperm(3 * size + len(ends))]


@pytest.mark.parametrize("size", SIZES)
def test_bce_is_right_to_4_ulp(size: int) -> None:
    p = probabilities_of(size)
    for t in (torch.rand_like(p), torch.rand_like(p).round()):
        loss, outside = kernels.bce(p, t)
        assert outside == 0
        assert ulps(loss, bce_truth(p, t)) <= 4
        total, outside = kernels.bce_sum(p, t)
        assert outside == 0
        assert total == pytest.approx(float(bce_truth(p, t).sum()), rel=1e-6)
        q, u = p.double(), t.double()
        assert ulps(kernels.bce_grad(p, t), (q - u) / (q * (1 - q)).clamp(min=1e-12)) <= 5


def test_bce_in_float64_against_mpmath() -> None:
    p = torch.tensor(
        [1e-300, 1e-20, 1e-3, 0.25, 0.2928932188, 0.3, 0.5, 0.7, 0.7071067812, 0.99, 1 - 2**-53], dtype=torch.float64
    )
    with mpmath.workdps(60):
        on = [min(100.0, float(-mpmath.log(v))) for v in p.tolist()]
        off = [min(100.0, float(-mpmath.log1p(-mpmath.mpf(v)))) for v in p.tolist()]
    assert ulps(kernels.bce(p, torch.ones_like(p))[0], torch.tensor(on, dtype=torch.float64)) <= 4
    assert ulps(kernels.bce(p, torch.zeros_like(p))[0], torch.tensor(off, dtype=torch.float64)) <= 4


@pytest.mark.parametrize("bad", [NAN, -1e-6, 1.0000001, INF, -INF])
@pytest.mark.parametrize("size", SIZES)
def test_bce_tells_which_operand_leaves_the_unit_interval(bad: float, size: int) -> None:
    good, t = torch.rand(size), torch.rand(size)
    for position in {0, size // 2, size - 1}:
        p = good.clone()
        p[position] = bad
        for first, second, expected in ((p, t, 1), (t, p, 2), (p, p, 3)):
            assert kernels.bce_sum(first, second)[1] == expected
            assert kernels.bce(first, second)[1] == expected
        assert kernels.first_outside(p) == (position,)
    assert kernels.bce_sum(good, t)[1] == 0
    assert kernels.first_outside(good) is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_bce_checks_integer_targets(dtype: torch.dtype) -> None:
    p, t = torch.rand(5), torch.tensor([0, 1, 1, 1, 0], dtype=dtype)
    assert kernels.bce(p, t)[1] == kernels.bce_sum(p, t)[1] == 0
    t[2] = 2
    assert kernels.bce(p, t)[1] == kernels.bce_sum(p, t)[1] == 2
    assert ulps(kernels.bce(p, t)[0], bce_truth(p, t), bce_truth(p, t).abs() + 5) <= 4


def test_bce_weight() -> None:
    p, t, w = torch.rand(50, 30), torch.rand(50, 30), torch.rand(30)
    assert ulps(kernels.bce(p, t, w)[0], w.double() * bce_truth(p, t)) <= 5
    assert torch.equal(kernels.bce_grad(p, t, w, scale=2.0), kernels.bce_grad(p, t, 2 * w))


# ---- KL divergence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_kl_is_right_to_what_cancels(size: int) -> None:
    x, t = torch.log_softmax(3 * torch.randn(3, size), 1), torch.softmax(30 * torch.randn(3, size), 1)
    truth, terms = kl_truth(x, t)
    assert ulps(kernels.kl(x, t), truth, terms) <= 4
    assert kernels.kl_sum(x, t) == pytest.approx(float(truth.sum()), abs=1e-6 * float(terms.sum()))
    log_t = t.log()
    t64 = log_t.double().exp()
    value = torch.where(log_t.exp() == 0, 0.0, t64 * (log_t.double() - x.double()).nan_to_num())
    assert ulps(kernels.kl(x, log_t, True), value, torch.where(value == 0, 0.0, terms)) <= 6
    assert ulps(kernels.kl_grad(x, t, scale=0.125), -t.double() / 8) <= 0.5  # below the normal range
    assert ulps(kernels.kl_grad(x, log_t, True, upstream=torch.tensor(2.0)), -2 * t64) <= 2


def test_kl_of_zeros_and_infinities() -> None:
    x = torch.tensor([-INF, -INF, 0.0, INF, NAN, -1.0])
    t = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0, -0.5])
    assert kernels.kl(x, t).nan_to_num(nan=7, posinf=8, neginf=9).tolist() == [0, 8, 0, 9, 0, 7]
    assert kernels.kl_grad(x, t, upstream=torch.tensor(INF)).tolist() == [0, -INF, 0, -INF, 0, INF]
    log_t = torch.tensor([-INF, -200.0, 0.0, -200.0, -INF, NAN])
    assert kernels.kl(x, log_t, True).nan_to_num(nan=7, posinf=8, neginf=9).tolist() == [0, 0, 0, 0, 0, 7]
    assert kernels.kl_grad(x, log_t, True).nan_to_num(nan=7).tolist() == [0, 0, -1, 0, 0, 7]


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_dtypes(dtype: torch.dtype) -> None:
    x, t = torch.log_softmax(torch.randn(20, 99), 1).to(dtype), torch.softmax(torch.randn(20, 99), 1).to(dtype)
    truth, terms = kl_truth(x, t)
    # In half the result is one rounding of a float32 that has lost what cancels.
    allowed = 4 if dtype.itemsize > 2 else 1
    assert ulps(kernels.kl(x, t), truth, terms) <= allowed
    assert ulps(kernels.kl_grad(x, t), -t.double()) == 0


# ---- cosine ----------------------------------------------------------------------------------------------------------


def check_gradients(
    got: tuple[Tensor | None, Tensor | None], truth: CosineTruth, up: Tensor, dtype: torch.dtype, allowed: float = 6
) -> None:
    for grad, true, size in zip(got, truth.grads, truth.sizes, strict=True):
        assert grad is not None
        assert grad.dtype == dtype
        assert ulps(grad, up * true, up * size) <= (1 if dtype.itemsize == 2 else allowed)


@pytest.mark.parametrize("length", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cosine_and_its_gradients(length: int, dtype: torch.dtype) -> None:
    rows = 70 if length < 2000 else 3
    a, b = torch.randn(rows, length).to(dtype), torch.randn(rows, length).to(dtype)
    truth = cosine_truth(a, b, 1e-8)
    got, saved = kernels.cosine_similarity(a, b, 1, save=True)
    assert saved is not None
    # float64 has no wider type to add in: its error is relative to the terms, whose sizes sum to at most 1.
    terms = torch.ones_like(truth.cosine) if dtype == torch.float64 else None
    assert ulps(got, truth.cosine, terms) <= (2 if dtype == torch.float64 else 1)
    g = torch.randn(rows).to(got.dtype)
    both = kernels.cosine_similarity_grad(a, b, saved, 1, upstream=g, scale=0.5)
    check_gradients(both, truth, 0.5 * g.double().unsqueeze(1), dtype)
    alone, none = kernels.cosine_similarity_grad(a, b, saved, 1, upstream=g, scale=0.5, wanted=(True, False))
    assert none is None
    assert torch.equal(alone, both[0])
    none, alone = kernels.cosine_similarity_grad(a, b, saved, 1, upstream=g, scale=0.5, wanted=(False, True))
    assert none is None
    assert torch.equal(alone, both[1])


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        *(
            (torch.float32, scales)
            for scales in [(1e-30, 1e30), (1e38, 1e-38), (3e-38, 1.0), (1e38, 1e38), (1e-22, 1e-22)]
        ),
        *((torch.float64, scales) for scales in [(1e-250, 1e250), (1e-300, 1e300), (1e308, 1.0), (1e308, 1e-300)]),
    ],
)
def test_tiny_and_huge_vectors(dtype: torch.dtype, scales: tuple[float, float]) -> None:
    a, b = (torch.rand(9, 33, dtype=torch.float64).add(0.5).mul(s).to(dtype) for s in scales)
    a[:, ::3] *= -1
    truth = cosine_truth(a, b, 0.0)
    got, saved = kernels.cosine_similarity(a, b, 1, 0.0, save=True)
    assert saved is not None
    assert ulps(got, truth.cosine, torch.ones_like(truth.cosine)) <= 4
    # 1 / 1e308 lies below the normal range, and has lost 3 bits.
    allowed = 16 if max(scales) == 1e308 else 6
    check_gradients(kernels.cosine_similarity_grad(a, b, saved, 1, 0.0), truth, torch.ones(9, 1), dtype, allowed)


def test_zero_vectors_and_the_floor() -> None:
    a = torch.tensor([[0.0, 0.0], [1e-9, 0.0], [3.0, 4.0], [0.0, 0.0], [3e-9, 4e-9], [1.0, 0.0]])
    b = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 0.0], [0.0, 0.0], [4e-9, 3e-9], [1.0, 0.0]])
    for dtype in (torch.float32, torch.float64):
        a, b = a.to(dtype), b.to(dtype)
        got, saved = kernels.cosine_similarity(a, b, 1, 1e-8, save=True)
        assert saved is not None
        truth = cosine_truth(a, b, 1e-8)
        assert ulps(got, truth.cosine) <= 1
        check_gradients(kernels.cosine_similarity_grad(a, b, saved, 1, 1e-8), truth, torch.ones(6, 1), dtype)
        assert kernels.cosine_similarity(a, b, 1, 0.0).out[:4].isnan().tolist() == [True, False, True, True]


def test_cosine_at_the_floor_itself_pulls_halfway() -> None:
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 10.0]])
    saved = kernels.cosine_similarity(a, b, 1, 5.0, save=True).saved
    assert saved is not None
    first, _ = kernels.cosine_similarity_grad(a, b, saved, 1, 5.0)
    below, above = (cosine_truth(a, b, eps).grads[0] for eps in (5.0000001, 4.9999999))
    assert first is not None
    torch.testing.assert_close(first.double(), (below + above) / 2)


def test_cosine_never_exceeds_1() -> None:
    a = torch.randn(4096, 3)
    got = kernels.cosine_similarity(a, a * 1.7, 1).out
    assert float(got.max()) <= 1
    assert float(got.min()) == 1
    assert kernels.cosine_similarity(a, -a, 1).out.unique().tolist() == [-1]


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_cosine_over_any_dimension_of_any_strides(dim: int, dtype: torch.dtype) -> None:
    shape = (3, 5, 6, 37)
    a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    truth = cosine_truth(a.movedim(dim, -1), b.movedim(dim, -1), 1e-8)
    for first, change in arrangements(shape).items():
        for second in {"contiguous", first}:
            x, y = change(a), arrangements(shape)[second](b)
            got, saved = kernels.cosine_similarity(x, y, dim, save=True)
            assert saved is not None
            assert ulps(got, truth.cosine, torch.ones_like(truth.cosine)) <= 2
            first_grad, second_grad = kernels.cosine_similarity_grad(x, y, saved, dim, upstream=torch.tensor(1.0))
            assert first_grad is not None
            assert second_grad is not None
            assert first_grad.stride() == torch.empty_like(x).stride()
            moved = (first_grad.movedim(dim, -1), second_grad.movedim(dim, -1))
            check_gradients(moved, truth, torch.tensor(1.0), dtype)


def test_broadcast_vectors_are_not_materialised() -> None:
    a, b = torch.randn(40, 1, 33), torch.randn(1, 50, 33)
    truth = cosine_truth(a.expand(40, 50, 33), b.expand(40, 50, 33), 1e-8).cosine
    assert ulps(kernels.cosine_similarity(a, b, 2).out, truth) <= 1
    assert torch.equal(kernels.cosine_similarity(a, b, -1).out, kernels.cosine_similarity(a, b, 2).out)


def test_infinite_and_nan_vectors_show_themselves() -> None:
    a, b = torch.tensor([[INF, 1.0], [NAN, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0], [INF, -INF]])
    assert kernels.cosine_similarity(a, b).out.isnan().all()
    assert kernels.cosine_similarity(a.double(), b.double()).out.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("margin", [0.0, -0.5, 0.3])
def test_cosine_embedding(dtype: torch.dtype, margin: float) -> None:
    a, b = torch.randn(90, 12).to(dtype), torch.randn(90, 12).to(dtype)
    a[0], b[1], a[2] = 0, 0, 1e-5
    b[3] = a[3]
    target = torch.tensor([1, -1, 0, 1, -1]).repeat(18)
    exact = cosine_truth(a, b, 0.0, embedding=True)
    cosine = exact.cosine
    truth = torch.where(target == 1, 1 - cosine, torch.where(target == -1, (cosine - margin).clamp(min=0), 0.0))
    slope = torch.where(target == 1, -1.0, ((target == -1) & (cosine >= margin)).double()).unsqueeze(1)
    for labels in (target, target.to(dtype), target.to(torch.int8)):
        got, saved = kernels.cosine_embedding(a, b, labels, margin, save=True)
        assert saved is not None
        assert ulps(got, truth, torch.ones_like(truth)) <= (2 if dtype == torch.float64 else 1)
        grads = kernels.cosine_embedding_grad(a, b, labels, saved, margin, scale=0.5)
        check_gradients(grads, exact, 0.5 * slope, dtype)
        for grad in grads:
            assert grad is not None
            assert not bool(grad[slope.squeeze(1) == 0].any())


def test_a_pair_that_costs_nothing_is_never_read_for_its_gradient() -> None:
    a, b = torch.tensor([[INF, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
    target = torch.tensor([0, -1])
    got, saved = kernels.cosine_embedding(a, b, target, save=True)
    assert saved is not None
    assert got.tolist() == [0, 0]
    for grad in kernels.cosine_embedding_grad(a, b, target, saved):
        assert grad is not None
        assert not bool(grad.any())


# ---- threads, sizes that stream, instruction sets --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_threads_nor_on_streaming(dtype: torch.dtype) -> None:
    """4.5 million elements: outputs that bypass the caches, from an address that is not a multiple of a line."""
    x, t = torch.randn(1500 * 3001 + 1)[1:].view(1500, 3001).to(dtype), torch.rand(1500, 3001).to(dtype)
    w = torch.rand(3001)

    def everything() -> list[Tensor]:
        cosine, saved = kernels.cosine_similarity(x, t, 1, save=True)
        grads = [g for flat in ((x, t), (x.view(-1, 3), t.view(-1, 3))) for g in cosine_grads(*flat)]
        columns, _ = kernels.cosine_similarity(x, t, 0, save=True)
        assert saved is not None
        sums = [
            kernels.bce_logits_sum(x, t, w),
            *kernels.bce_sum(t, t),
            kernels.kl_sum(x, t),
            kernels.kl_sum(x, x, True),
        ]
        return [
            kernels.bce_logits(x, t, w), kernels.bce_logits_grad(x, t, w), kernels.bce(t, t)[0], kernels.bce_grad(t, t),
            kernels.kl(x, t), kernels.kl_grad(x, t), kernels.kl_grad(x, x, True), cosine, saved, columns, *grads,
            torch.tensor(sums, dtype=torch.float64),
        ]  # fmt: skip

    def cosine_grads(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        saved = kernels.cosine_similarity(a, b, 1, save=True).saved
        assert saved is not None
        first, second = kernels.cosine_similarity_grad(a, b, saved, 1)
        assert first is not None
        assert second is not None
        return first, second

    torch.set_num_threads(1)
    one = everything()
    torch.set_num_threads(2)
    for got, expected in zip(everything(), one, strict=True):
        assert bool(got.isfinite().all())
        assert torch.equal(got, expected)
    rows = [kernels.bce_logits_grad(x[i], t[i], w) for i in range(0, 1500, 97)]
    assert torch.equal(torch.stack(rows), one[1][::97])
    few = kernels.cosine_similarity(x[:5], t[:5], 1, save=True)
    assert few.saved is not None
    assert torch.equal(kernels.cosine_similarity_grad(x[:5], t[:5], few.saved, 1)[0], one[10][:5])


@pytest.mark.parametrize("isa", native_info()["supported"])
def test_every_instruction_set_passes_this_file(isa: str) -> None:
    if os.environ.get("LOGITLESS_ISA"):
        assert native_info()["isa"] == os.environ["LOGITLESS_ISA"]
        return
    if isa == native_info()["isa"]:
        return
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__],
        env={**os.environ, "LOGITLESS_ISA": isa, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
