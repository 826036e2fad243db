"""The gradient contract of logits that are not built: every path, every upstream gradient, against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll
import logitless.functional as LF
import oracles
from logitless.kernels import cpu, interface

ROWS, WIDTH, CLASSES = 150, 9, 131  # more rows than a tile has at least, nothing a multiple of anything

Parts = tuple[Tensor, ...]  # hidden, weight, bias, scale; or hidden, weight and another head's


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TARGET = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(3))
IGNORING = TARGET.clone()
IGNORING[::7] = -100
SOFT = draw(4, ROWS, CLASSES).mul(2).softmax(1)
CLASS_WEIGHT = draw(5, CLASSES).abs() + 0.25
LABELS = (draw(6, ROWS, CLASSES) > 1.5).double()
TEACHER = draw(7, ROWS, CLASSES) * 2
TOP = TEACHER.log_softmax(1).topk(5)


def entropy(z: Tensor) -> Tensor:
    return -(z.softmax(1) * z.log_softmax(1)).sum(1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1)


def js(p: Tensor, q: Tensor) -> Tensor:
    mixture = ((p.softmax(1) + q.softmax(1)) / 2).log()
    return (kl(p, mixture) + kl(q, mixture)) / 2


def token_mix(nll: Tensor, lse: Tensor, spread: Tensor) -> Tensor:
    return 1.5 * nll - 0.25 * lse.square() + 0.5 * spread


def token_stats(z: Any) -> Tensor:
    if isinstance(z, ll.LazyLogits):
        stats = ll.token_stats(z, IGNORING)
        return token_mix(stats.nll, stats.lse, stats.entropy)
    kept = (IGNORING != -100).to(z.dtype)
    nll = F.cross_entropy(z, IGNORING, reduction="none")
    return token_mix(nll, z.logsumexp(1) * kept, entropy(z) * kept)


def pair_stats(p: Any, q: Any) -> Tensor:
    if isinstance(p, ll.LazyLogits):
        stats = ll.pair_stats(p, q, TARGET)
        assert stats.nll_p is not None
        assert stats.nll_q is not None
        return stats.kl - 0.5 * stats.reverse_kl + stats.js + stats.entropy_q + stats.nll_p - 2 * stats.nll_q
    nll_p, nll_q = (F.cross_entropy(z, TARGET, reduction="none") for z in (p, q))
    return kl(p, q) - 0.5 * kl(q, p) + js(p, q) + entropy(q) + nll_p - 2 * nll_q


def bucketed_kl(z: Tensor) -> Tensor:
    values, indices = TOP
    tail_p = torch.log1p(-values.exp().sum(1, keepdim=True))
    log_q = z.log_softmax(1).gather(1, indices)
    tail_q = torch.log1p(-log_q.exp().sum(1, keepdim=True))
    log_p, log_q = torch.cat([values, tail_p], 1), torch.cat([log_q, tail_q], 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def cross_entropy(target: Tensor, **options: Any) -> Callable[..., Tensor]:
    """Rows, or with `reduction` a scalar; torch's own function on the dense logits."""

    def loss(z: Any, reduction: str) -> Tensor:
        given = dict(options)
        if given.get("weight") is not None:
            given["weight"] = given["weight"].to(z.dtype)
        aim = target.to(z.dtype) if target.is_floating_point() else target
        library = LF if isinstance(z, ll.LazyLogits) else F
        return library.cross_entropy(z, aim, reduction=reduction, **given)

    return loss


def rows_of(rows: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Reduce by hand what has rows alone."""

    def loss(*arguments: Any) -> Tensor:
        *logits, reduction = arguments
        values = rows(*logits)
        return {"none": values, "mean": values.mean(), "sum": values.sum()}[reduction]

    return loss


def reducing(measure: Callable[..., Tensor], truth: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(*arguments: Any) -> Tensor:
        *logits, reduction = arguments
        if any(isinstance(z, ll.LazyLogits) for z in logits):
            return measure(*logits, reduction=reduction)
        return rows_of(truth)(*arguments)

    return loss


def binary(sparse: bool, **options: Any) -> Callable[..., Tensor]:
    def loss(z: Any, reduction: str) -> Tensor:
        given = {name: tensor.to(z.dtype) for name, tensor in options.items()}
        lazy = isinstance(z, ll.LazyLogits)
        target = LABELS.to(z.dtype)
        library = LF if lazy else F
        return library.binary_cross_entropy_with_logits(
            z, target.to_sparse() if sparse and lazy else target, reduction=reduction, **given
        )

    return loss


# Of one head, each: (loss of logits and a reduction, whether it has values a row).
ONE_HEAD: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "indices": (cross_entropy(TARGET), True),
    "ignored": (cross_entropy(IGNORING), True),
    "weights": (cross_entropy(IGNORING, weight=CLASS_WEIGHT), True),
    "smoothing": (cross_entropy(IGNORING, label_smoothing=0.2), True),
    "weights, smoothing": (cross_entropy(IGNORING, weight=CLASS_WEIGHT, label_smoothing=0.2), True),
    "probabilities": (cross_entropy(SOFT), True),
    "probabilities, weights, smoothing": (cross_entropy(SOFT, weight=CLASS_WEIGHT, label_smoothing=0.2), True),
    "token_stats": (rows_of(token_stats), True),
    "entropy": (reducing(ll.entropy, entropy), True),
    "dense teacher": (
        reducing(lambda z, **r: ll.kl(TEACHER.to(z.dtype), z, **r), lambda z: kl(TEACHER.to(z), z)),
        True,
    ),
    "dense student": (
        reducing(lambda z, **r: ll.js(z, TEACHER.to(z.dtype), **r), lambda z: js(z, TEACHER.to(z))),
        True,
    ),
    "sparse teacher": (
        reducing(
            lambda z, **r: ll.kl(ll.SparseLogits(TOP.values.to(z.dtype), TOP.indices, CLASSES), z, **r), bucketed_kl
        ),
        True,
    ),
    "labels": (binary(False), False),
    "labels, weights": (binary(False, weight=CLASS_WEIGHT, pos_weight=CLASS_WEIGHT), False),
    "labels, row weights": (binary(False, weight=CLASS_WEIGHT[0].expand(ROWS, 1) + draw(8, ROWS, 1).abs()), False),
    "positives": (binary(True, pos_weight=CLASS_WEIGHT), False),
}
TWO_HEADS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "kl of two heads": (reducing(ll.kl, kl), True),
    "js of two heads": (reducing(ll.js, js), True),
    "pair_stats of two heads": (rows_of(pair_stats), True),
}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.75},
    "softcap": {"softcap": 4.0},
}
UPSTREAMS: dict[str, float] = {"one": 1.0, "scalar": 0.3125, "zero": 0.0, "negative": -2.5}
TILES = {"one tile": 2**27, "rows": 66 * CLASSES * 4 * 2, "rows and classes": 40 * CLASSES * 4}


@pytest.fixture(params=TILES, ids=TILES.keys())
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Bytes for one tile, for a few tiles of rows, and for so few that classes are cut."""
    monkeypatch.setattr(interface, "DEFAULT_MAX_BYTES", TILES[request.param])
    return str(request.param)


@pytest.fixture(autouse=True)
def kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is picked here is the kernels; a test says so."""
    monkeypatch.delenv("LOGITLESS_BACKEND", raising=False)


def one_head(dtype: torch.dtype) -> list[Tensor]:
    hidden, weight = draw(1, ROWS, WIDTH), draw(2, CLASSES, WIDTH)
    weight[:40] = hidden[:40]  # confident rows beside flat ones
    return [t.to(dtype) for t in (hidden, weight, draw(9, CLASSES))]


def two_heads(dtype: torch.dtype) -> list[Tensor]:
    return [*one_head(dtype), draw(10, ROWS, 4).to(dtype), draw(11, CLASSES, 4).to(dtype)]


def lazily(parts: list[Tensor], options: dict[str, Any]) -> list[Any]:
    logits = [ll.linear(*parts[:3], **options)]
    return logits if len(parts) == 3 else [*logits, ll.linear(*parts[3:])]


def densely(parts: list[Tensor], options: dict[str, Any]) -> list[Any]:
    z = F.linear(*parts[:3]) * options.get("scale", 1.0)
    cap = options.get("softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    return [z] if len(parts) == 3 else [z, F.linear(*parts[3:])]


def gradients(
    loss: Callable[..., Tensor],
    logits: Callable[..., list[Any]],
    parts: list[Tensor],
    options: dict[str, Any],
    reduction: str,
    upstream: Tensor | float,
    frozen: tuple[int, ...] = (),
    times: int = 1,
) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [t.detach().clone().requires_grad_(i not in frozen) for i, t in enumerate(parts)]
    value = loss(*logits(leaves, options), reduction)
    given = torch.as_tensor(upstream, dtype=torch.float64).to(value.dtype)
    for turn in range(times):
        value.backward(given, retain_graph=turn + 1 < times)
    return value.detach(), [leaf.grad for leaf in leaves]


def assert_contract(
    loss: Callable[..., Tensor],
    parts: Callable[[torch.dtype], list[Tensor]],
    dtype: torch.dtype,
    reduction: str,
    upstream: Tensor | float,
    options: dict[str, Any] | None = None,
    frozen: tuple[int, ...] = (),
    times: int = 1,
) -> None:
    options = options or {}
    given = parts(dtype)
    found, grads = gradients(loss, lazily, given, options, reduction, upstream, frozen, times)
    wide = [t.double() for t in given]
    truth, true_grads = gradients(loss, densely, wide, options, reduction, upstream, frozen, times)
    naive, naive_grads = gradients(loss, densely, given, options, reduction, upstream, frozen, times)
    oracles.assert_no_worse(found, truth, naive, "value")
    size = float(torch.as_tensor(upstream).abs().max()) * times / (ROWS if reduction == "mean" else 1)
    for i, (grad, true, plain) in enumerate(zip(grads, true_grads, naive_grads, strict=True)):
        if i in frozen:
            assert grad is None
            continue
        assert grad is not None
        assert true is not None
        if size == 0:
            oracles.assert_exactly_zero(grad, f"gradient {i}")
            continue
        oracles.assert_no_worse(grad, true, plain, f"gradient {i}", floor=size)


ALL = {
    **{name: (*case, one_head) for name, case in ONE_HEAD.items()},
    **{n: (*c, two_heads) for n, c in TWO_HEADS.items()},
}
wide = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


@wide
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ALL)
def test_scalar_upstream(name: str, reduction: str, upstream: str, dtype: torch.dtype) -> None:
    loss, _, parts = ALL[name]
    assert_contract(loss, parts, dtype, reduction, UPSTREAMS[upstream])


@wide
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", [name for name, (_, has_rows, _) in ALL.items() if has_rows])
def test_vector_upstream(name: str, dtype: torch.dtype) -> None:
    loss, _, parts = ALL[name]
    assert_contract(loss, parts, dtype, "none", draw(12, ROWS) * 3 + 0.25)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("name", ALL)
def test_again_through_one_graph(name: str, times: int) -> None:
    """With retain_graph each pass adds the same gradient; what the first gave away is made anew."""
    loss, _, parts = ALL[name]
    assert_contract(loss, parts, torch.float32, "mean", -0.75, times=times)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ALL)
def test_frozen_sides(name: str, reduction: str, frozen: tuple[int, ...]) -> None:
    loss, has_rows, parts = ALL[name]
    if reduction == "none" and not has_rows:
        reduction = "sum"
    upstream = draw(13, ROWS) if reduction == "none" else 0.5
    assert_contract(loss, parts, torch.float32, reduction, upstream, frozen=frozen)


@wide
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["weights, smoothing", "probabilities", "token_stats", "js of two heads"])
def test_activations(name: str, reduction: str, activation: str, dtype: torch.dtype) -> None:
    loss, _, parts = ALL[name]
    upstream = draw(13, ROWS) if reduction == "none" else 0.5
    assert_contract(loss, parts, dtype, reduction, upstream, ACTIVATIONS[activation])


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("factor", [1.0, -0.5, 0.0])
def test_a_scale_that_is_learnt(factor: float, reduction: str) -> None:
    hidden, weight, bias = one_head(torch.float64)
    upstream = draw(13, ROWS) if reduction == "none" else torch.tensor(0.5, dtype=torch.float64)
    found = []
    for lazy in (True, False):
        leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
        scale = torch.tensor(factor, dtype=torch.float64, requires_grad=True)
        logits = ll.linear(*leaves, scale=scale) if lazy else F.linear(*leaves) * scale
        loss = (LF if lazy else F).cross_entropy(logits, IGNORING, reduction=reduction)
        found.append(torch.autograd.grad(loss, [*leaves, scale], upstream))
    for i, (grad, true) in enumerate(zip(*found, strict=True)):
        oracles.assert_no_worse(grad, true, what=f"gradient {i}", floor=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", ["indices", "weights, smoothing", "probabilities", "labels", "kl of two heads"])
def test_half_precision_is_no_worse_than_autograd(name: str, dtype: torch.dtype) -> None:
    loss, _, parts = ALL[name]
    assert_contract(loss, parts, dtype, "mean", 0.75)


@pytest.mark.parametrize("rows", [0, 1, 65])
@pytest.mark.parametrize("classes", [1, 7, 1000])
def test_odd_sizes(rows: int, classes: int) -> None:
    for reduction in ("sum", "none"):
        hidden, weight = draw(1, rows, 5).requires_grad_(), draw(2, classes, 5).requires_grad_()
        target = torch.randint(classes, (rows,))
        upstream = draw(3, rows) if reduction == "none" else torch.tensor(2.0, dtype=torch.float64)
        found, true = (
            torch.autograd.grad(loss, [hidden, weight], upstream)
            for loss in (
                LF.cross_entropy(ll.linear(hidden, weight), target, reduction=reduction),
                F.cross_entropy(hidden @ weight.T, target, reduction=reduction),
            )
        )
        for grad, expected in zip(found, true, strict=True):
            oracles.assert_no_worse(grad, expected, floor=4.0)


def test_tiles_of_many_classes_on_pooled_memory() -> None:
    """Above 8192 classes rows in lanes are cut into parts; the pool's blocks hold what the last tile left there."""
    cpu.empty_pooled(torch.Size((2**20,)), torch.float32).fill_(float("nan"))
    rows, classes = 70, 20011
    hidden, weight = draw(1, rows, 6).float().requires_grad_(), draw(2, classes, 6).float().requires_grad_()
    target = torch.randint(classes, (rows,))
    upstream = draw(3, rows)
    loss = LF.linear_cross_entropy(hidden, weight, target, reduction="none", max_bytes=66 * classes * 4)
    grads = torch.autograd.grad(loss, [hidden, weight], upstream.float())
    wide_parts = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = F.cross_entropy(wide_parts[0] @ wide_parts[1].T, target, reduction="none")
    oracles.assert_no_worse(loss, truth)
    for grad, true in zip(grads, torch.autograd.grad(truth, wide_parts, upstream), strict=True):
        oracles.assert_no_worse(grad, true)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    logits = draw(1, 20011, 70).float()
    target = torch.randint(20011, (70,), generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(threads)
    stats = cpu.row_stats(logits, target, class_dim=0, entropy=True, rank=True, lse=True, argmax=True)
    by_rows = cpu.row_stats(logits.T.contiguous(), target, entropy=True, rank=True, lse=True, argmax=True)
    grad = cpu.row_grad(logits, stats.row_max, stats.log_sum, target, class_dim=0, a_scale=0.5, c_scale=-0.5)
    torch.set_num_threads(1)
    again = cpu.row_stats(logits, target, class_dim=0, entropy=True, rank=True, lse=True, argmax=True)
    assert torch.equal(stats.log_sum, again.log_sum)
    assert torch.equal(
        grad, cpu.row_grad(logits, again.row_max, again.log_sum, target, class_dim=0, a_scale=0.5, c_scale=-0.5)
    )
    assert stats.argmax is not None
    assert by_rows.argmax is not None
    assert torch.equal(stats.argmax, by_rows.argmax)
    assert stats.rank is not None
    assert by_rows.rank is not None
    assert torch.equal(stats.rank, by_rows.rank)
    wide_logits = logits.double()
    assert stats.lse is not None
    oracles.assert_no_worse(stats.lse, wide_logits.logsumexp(0))
    oracles.assert_no_worse(grad, (wide_logits.softmax(0) - F.one_hot(target, 20011).T) / 2)
