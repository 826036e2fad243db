"""Gradients that are made before their upstream gradient is known, against float64.

Of half-precision heads under a loss scale, and where there is nothing to learn from.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll
import logitless.functional as LF
from logitless._heads import products
from logitless.kernels import interface
from product_choice import pin_torch

ROWS, WIDTH, CLASSES = 4096, 12, 257
SCALES = {"GradScaler's": 65536.0, "one": 1.0, "small": 2.0**-20, "odd": 0.3}
half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(dtype: torch.dtype, rows: int = ROWS) -> list[Tensor]:
    return [t.to(dtype) for t in (draw(1, rows, WIDTH), draw(2, CLASSES, WIDTH), draw(3, CLASSES))]


TARGET = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(4))
TARGET[::5] = -100
SOFT = draw(5, ROWS, CLASSES).softmax(1)
TEACHER = draw(6, ROWS, CLASSES)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).mean()


# Each of float32 logits, lazy or dense, as models hand them to a loss; dense ones in float64 are the truth.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "indices": lambda z, lazy: (LF if lazy else F).cross_entropy(z, TARGET),
    "smoothing": lambda z, lazy: (LF if lazy else F).cross_entropy(z, TARGET, label_smoothing=0.1),
    "probabilities": lambda z, lazy: (LF if lazy else F).cross_entropy(z, SOFT.to(z.dtype)),
    "sum over a count": lambda z, lazy: (LF if lazy else F).cross_entropy(z, TARGET, reduction="sum") / 3277,
    "rows": lambda z, lazy: (LF if lazy else F).cross_entropy(z, TARGET, reduction="none").mean(),
    "labels": lambda z, lazy: (LF if lazy else F).binary_cross_entropy_with_logits(z, (SOFT > 0.01).to(z.dtype)),
    "teacher": lambda z, lazy: ll.kl(TEACHER.to(z.dtype), z, reduction="mean") if lazy else kl(TEACHER.to(z.dtype), z),
}


def gradients(loss: Callable[..., Tensor], parts: list[Tensor], lazy: bool, scale: float) -> list[Tensor]:
    """As a loss scaler makes them: of the loss times the scale, and divided by it in float64."""
    leaves = [part.clone().requires_grad_() for part in parts]
    z = ll.linear(*leaves) if lazy else F.linear(*leaves)
    value = loss(z if parts[0].dtype == torch.float64 else z.float(), lazy)
    assert value.dtype == torch.promote_types(parts[0].dtype, torch.float32)
    (value * scale).backward()
    return [leaf.grad.double() / scale for leaf in leaves if leaf.grad is not None]


def error(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


@half
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("max_bytes", [2**27, 2**20], ids=["one tile", "tiles"])
def test_a_loss_scale_finds_gradients_as_they_were(
    name: str, scale: str, dtype: torch.dtype, max_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part's gradient is no further from float64 than dense logits give it, nor than one rounding of its own."""
    monkeypatch.setattr(interface, "DEFAULT_MAX_BYTES", max_bytes)
    parts = head(dtype)
    truth = gradients(LOSSES[name], [part.double() for part in parts], False, 1.0)
    dense = gradients(LOSSES[name], parts, False, SCALES[scale])
    found = gradients(LOSSES[name], parts, True, SCALES[scale])
    for lazy_one, dense_one, true in zip(found, dense, truth, strict=True):
        rounded = (true * SCALES[scale]).to(dtype).double() / SCALES[scale]
        assert error(lazy_one, true) <= max(1.02 * error(dense_one, true), 1.5 * error(rounded, true))


@half
def test_a_float16_gradient_is_widened_where_the_backend_has_no_product(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin_torch(monkeypatch)
    monkeypatch.setattr(products, "_WIDENED", 1000)
    parts = head(dtype, 200)
    target = TARGET[:200]

    def loss(z: Tensor, lazy: bool) -> Tensor:
        return (LF if lazy else F).cross_entropy(z, target)

    truth = gradients(loss, [part.double() for part in parts], False, 1.0)
    dense, found = (gradients(loss, parts, lazy, 65536.0) for lazy in (False, True))
    for lazy_one, dense_one, true in zip(found, dense, truth, strict=True):
        assert error(lazy_one, true) <= 1.1 * error(dense_one, true)


def test_gradients_of_a_small_probability_are_not_flushed() -> None:
    """Classes that no row expects: each of 4096 rows gives a gradient that float16 alone would flush."""
    hidden, weight, bias = head(torch.float16)
    bias[-50:] = -11.0
    truth = gradients(LOSSES["indices"], [part.double() for part in (hidden, weight, bias)], False, 1.0)
    found = gradients(LOSSES["indices"], [hidden, weight, bias], True, 65536.0)
    assert error(found[1][-50:], truth[1][-50:]) < 1e-3


# What has nothing to learn from: no row, no supervised row, or rows that weigh nothing.
IGNORED = torch.full((ROWS,), -100)
NOTHING: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "mean": lambda z, lazy: (LF if lazy else F).cross_entropy(z, IGNORED),
    "sum over 0": lambda z, lazy: (LF if lazy else F).cross_entropy(z, IGNORED, reduction="sum") / 0,
    "sum over tensor 0": lambda z, lazy: (
        (LF if lazy else F).cross_entropy(z, IGNORED, reduction="sum") / torch.tensor(0)
    ),
    "sum times inf": lambda z, lazy: (LF if lazy else F).cross_entropy(z, IGNORED, reduction="sum") * math.inf,
    "sum times nan": lambda z, lazy: (LF if lazy else F).cross_entropy(z, IGNORED, reduction="sum") * math.nan,
    "smoothing": lambda z, lazy: (LF if lazy else F).cross_entropy(z, IGNORED, label_smoothing=0.1),
    "rows over 0": lambda z, lazy: (LF if lazy else F).cross_entropy(z, IGNORED, reduction="none").sum() / 0,
    "one row left": lambda z, lazy: (LF if lazy else F).cross_entropy(z, torch.where(torch.arange(ROWS) == 7, 3, -100)),
    "weights of 0": lambda z, lazy: (LF if lazy else F).cross_entropy(
        z, TARGET, torch.zeros(CLASSES, dtype=z.dtype), reduction="sum"
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "compiled"), [(name, compiled) for name in NOTHING for compiled in (False, True)])
def test_nothing_to_learn_from_gives_what_torch_gives(name: str, compiled: bool, dtype: torch.dtype) -> None:
    results = []
    for lazy in (True, False):
        leaves = [part.requires_grad_() for part in head(dtype)]

        def run(*parts: Tensor, lazy: bool = lazy) -> Tensor:
            return NOTHING[name](ll.linear(*parts) if lazy else F.linear(*parts), lazy)

        if compiled and lazy:
            torch._dynamo.reset()
            run = torch.compile(run, backend="aot_eager")
        value = run(*leaves)
        value.backward()
        results.append((value.detach(), [leaf.grad for leaf in leaves]))
    (value, grads), (expected, dense) = results
    torch.testing.assert_close(value, expected, equal_nan=True, rtol=2e-2, atol=0)
    for grad, true in zip(grads, dense, strict=True):
        assert grad is not None
        assert true is not None
        if not true.any():
            assert not grad.any()
        assert torch.equal(grad.isnan(), true.isnan())


def test_no_rows_at_all() -> None:
    for upstream in (1.0, math.inf, math.nan):
        leaves = [part.requires_grad_() for part in head(torch.float32, 0)]
        loss = LF.cross_entropy(ll.linear(*leaves), IGNORED[:0])
        (loss * upstream).backward()
        assert loss.isnan()
        assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def test_a_mean_over_nothing_that_answers_zero_has_a_gradient_of_zero() -> None:
    for dtype in (torch.float32, torch.float16):
        leaves = [part.requires_grad_() for part in head(dtype)]
        loss = LF.cross_entropy(ll.linear(*leaves), IGNORED, empty="zero")
        (loss * math.inf).backward()
        assert loss == 0
        assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("normalizer", [1e30, 1e-30, torch.tensor(1e12, dtype=torch.float64)])
def test_an_extreme_divisor_waits_for_its_upstream_gradient(normalizer: float | Tensor) -> None:
    """A mean over 1e30 whose gradient is multiplied by as much: no digit is lost on the way."""
    parts = [part.float() for part in head(torch.float32)]
    back = float(normalizer)
    truth = gradients(
        lambda z, lazy: F.cross_entropy(z, TARGET, reduction="sum"), [p.double() for p in parts], False, 1
    )
    leaves = [part.clone().requires_grad_() for part in parts]
    loss = LF.cross_entropy(ll.linear(*leaves), TARGET, normalizer=normalizer)
    found = torch.autograd.grad(loss.double(), leaves, torch.tensor(back, dtype=torch.float64))
    for grad, true in zip(found, truth, strict=True):
        assert error(grad.double(), true) < 1e-5
