"""What is read of lazy logits agrees bit for bit with all of them, its gradients with float64, in whatever tiles."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import logitless as ll
from logitless._heads import picks
from logitless._heads.rows import HeadRows
from logitless.kernels import cpu, interface, reference
from product_choice import SERVED, pin_kernel

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 9, 65), (7, 1, 1000), (150, 9, 1000), (70, 580, 1301), (65, 3, 7)]
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.7},
    "softcap": {"softcap": 3.0, "factor": 1.3},
    "bias": {"bias": True, "factor": 1.3},
}
BACKENDS = {"kernels": cpu, "reference": reference}


def rows_of(size: tuple[int, int, int], dtype: torch.dtype, form: dict[str, Any]) -> HeadRows:
    make = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    rows, width, classes = size
    hidden, weight = normal(rows, width).to(dtype), (normal(classes, width) * 4 / width**0.5).to(dtype)
    parts = [hidden, weight, normal(classes).to(dtype) if form.get("bias") else None]
    parts.append(torch.tensor(form["factor"], dtype=dtype) if "factor" in form else None)
    wanted = tuple(None if part is None else part.requires_grad_() for part in parts)
    return HeadRows(rows, classes, wanted, form.get("scale", 1.0), form.get("softcap"))


def numbers(rows: int, k: int, classes: int) -> Tensor:
    return torch.randint(classes, (rows, k), generator=torch.Generator().manual_seed(k))


@pytest.fixture(params=["default", "few rows"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "default":
        monkeypatch.setattr(interface, "DEFAULT_MAX_BYTES", 2**18)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_are_those_of_all_logits(
    size: tuple[int, int, int], form: str, dtype: torch.dtype, backend: str
) -> None:
    rows, given = rows_of(size, dtype, FORMS[form]), BACKENDS[backend]
    z = picks.materialize(given, rows, dtype).detach()
    assert torch.equal(picks.argmax(given, rows, dtype), z.argmax(-1))
    for pick, expected in ((picks.largest, z.max(-1)), (picks.smallest, z.min(-1))):
        values, classes = pick(given, rows, dtype)
        assert torch.equal(values, expected.values)
        assert torch.equal(classes, expected.indices)
    values, classes = picks.topk(given, rows, dtype, 5)
    assert torch.equal(values, z.topk(5, -1).values)
    assert torch.equal(z.gather(-1, classes), values)
    for k in (1, 3, 40):
        index = numbers(rows.rows, k, rows.classes)
        assert torch.equal(picks.gather(given, rows, dtype, index), z.gather(-1, index))
        assert (picks.gather_log_probs(given, rows, dtype, index) <= 0).all()
    assert picks.gather(given, rows, dtype, numbers(rows.rows, 0, rows.classes)).shape == (rows.rows, 0)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype in SERVED])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_and_classes_alone_are_those_of_all_logits(
    size: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel's products, whose sums depend on the depth alone."""
    pin_kernel(monkeypatch)
    rows = rows_of(size, dtype, FORMS["bias"])
    z = picks.materialize(cpu, rows, dtype)
    for classes in (5, -1, slice(2, 6), slice(None, None, 3), torch.tensor([5, 0, 5])):
        some = z[:, [classes]] if isinstance(classes, int) else z[:, classes]
        assert torch.equal(picks.materialize(cpu, picks.of_classes(rows, classes), dtype), some)
    hidden, weight, bias, scale = rows.tensors
    assert hidden is not None
    assert weight is not None
    lazy = ll.linear(hidden, weight, bias, scale=scale if scale is not None else 1.0)
    index = numbers(rows.rows, 1, rows.classes)
    wide = lazy.float() if dtype in (torch.float16, torch.bfloat16) else lazy
    rank = (wide.materialize() > wide.gather(-1, index)).sum(-1)
    assert torch.equal(rank, ll.token_stats(lazy, index.squeeze(-1)).rank)
    assert torch.equal(wide.materialize()[: rows.rows // 2], wide[: rows.rows // 2].materialize())


PICKS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "gather": (picks.gather, lambda z, index: z.gather(-1, index)),
    "log_probs": (picks.gather_log_probs, lambda z, index: z.log_softmax(-1).gather(-1, index)),
    "logsumexp": (lambda b, r, d, _: picks.logsumexp(b, r, d), lambda z, _: z.logsumexp(-1)),
    "sum": (lambda b, r, d, _: picks.sum_log_probs(b, r, d), lambda z, _: z.log_softmax(-1).sum(-1)),
    "largest": (lambda b, r, d, _: picks.largest(b, r, d)[0], lambda z, _: z.max(-1).values),
    "topk": (lambda b, r, d, _: picks.topk(b, r, d, 3)[0], lambda z, _: z.topk(3, -1).values),
    "all": (lambda b, r, d, _: picks.materialize(b, r, d), lambda z, _: z),
}


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PICKS)
def test_gradients_are_those_of_dense_logits(
    name: str, size: tuple[int, int, int], form: str, dtype: torch.dtype
) -> None:
    rows = rows_of(size, dtype, FORMS[form])
    index = numbers(rows.rows, 3, rows.classes)
    index[:, 1] = index[:, 0]  # one class twice
    wide = [None if part is None else part.detach().double().requires_grad_() for part in rows.tensors]
    dense = HeadRows(rows.rows, rows.classes, tuple(wide), rows.scale, rows.softcap)
    truth = PICKS[name][1](dense.activate(dense.raw(wide, 0, rows.rows), wide), index)
    found = PICKS[name][0](cpu, rows, dtype, index)
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given = upstream.to(dtype)
    leaves, true_leaves = ([part for part in parts if part is not None] for parts in (rows.tensors, wide))
    grads = torch.autograd.grad(found, leaves, given, create_graph=dtype == torch.float64 and name != "topk")
    expected = torch.autograd.grad(truth, true_leaves, given.double(), create_graph=True)
    tolerance = 1e-10 if dtype == torch.float64 else 3e-5
    for one, other in zip(grads, expected, strict=True):
        size_of = max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * size_of * (rows.rows**0.5))


def test_second_derivatives_are_dense_ones() -> None:
    rows = rows_of((5, 3, 7), torch.float64, FORMS["softcap"])
    index = numbers(5, 2, 7)
    parts = [part for part in rows.tensors if part is not None]

    for name in ("gather", "log_probs", "logsumexp", "sum", "all"):

        def function(hidden: Tensor, weight: Tensor, scale: Tensor, name: str = name) -> Tensor:
            head = HeadRows(5, 7, (hidden, weight, None, scale), 1.0, rows.softcap)
            return PICKS[name][0](cpu, head, torch.float64, index)

        assert torch.autograd.gradcheck(function, parts)
        assert torch.autograd.gradgradcheck(function, parts)


@pytest.mark.parametrize("wrong", [-100, -1, 65])
def test_a_class_that_does_not_exist_raises_as_torch_does(wrong: int) -> None:
    rows = rows_of((4, 3, 65), torch.float32, {})
    index = numbers(4, 2, 65)
    index[2, 1] = wrong
    z = picks.materialize(cpu, rows, torch.float32)
    with pytest.raises(RuntimeError) as dense:
        z.gather(-1, index)
    for pick in (picks.gather, picks.gather_log_probs):
        with pytest.raises(RuntimeError) as lazy:
            pick(cpu, rows, torch.float32, index)
        assert str(lazy.value) == str(dense.value)
    with pytest.raises(IndexError, match="index 65 is out of bounds for dimension 1 with size 65"):
        picks.of_classes(rows, 65)
    with pytest.raises(IndexError):
        picks.of_classes(rows, torch.tensor([3, 65]))
    with pytest.raises(RuntimeError, match="selected index k out of range"):
        picks.topk(cpu, rows, torch.float32, 66)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_logits_that_are_not_finite(value: float) -> None:
    hidden, weight = torch.ones(3, 2), torch.ones(65, 2)
    bias = torch.zeros(65)
    bias[7] = value
    rows = HeadRows(3, 65, (hidden, weight, bias, None), 1.0, None)
    z = picks.materialize(cpu, rows, torch.float32)
    torch.testing.assert_close(picks.logsumexp(cpu, rows, torch.float32), z.logsumexp(-1), equal_nan=True)
    assert torch.equal(picks.argmax(cpu, rows, torch.float32), z.argmax(-1))
    masked = HeadRows(3, 65, (hidden, weight, torch.full((65,), -torch.inf), None), 1.0, None)
    assert torch.isneginf(picks.logsumexp(cpu, masked, torch.float32)).all()


def test_no_rows_and_one_thread_or_two() -> None:
    rows = rows_of((0, 3, 65), torch.float32, {})
    assert picks.materialize(cpu, rows, torch.float32).shape == (0, 65)
    assert picks.gather(cpu, rows, torch.float32, torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2)
    assert picks.argmax(cpu, rows, torch.float32).shape == picks.logsumexp(cpu, rows, torch.float32).shape == (0,)
    many = rows_of((150, 9, 1000), torch.float64, FORMS["softcap"])
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(picks.materialize(cpu, many, torch.float64))
        assert torch.equal(*found)
    finally:
        torch.set_num_threads(before)
