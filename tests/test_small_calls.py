"""Cross-entropy of contiguous rows, one kernel call each way: what it serves, and the same answers as elsewhere.

The truth is torch's own function in float64; what a call costs is measured by `logitless bench`, not here.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll
import logitless.functional as LF
import logitless.nn as LN
from logitless.kernels import cpu

native = pytest.importorskip("logitless._native", reason="built without the extension (LOGITLESS_NO_NATIVE)")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOGITLESS_BACKEND", raising=False)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each call that took the short way."""
    calls: list[bool] = []
    cross_entropy = cpu.cross_entropy

    def counted(*args: Any) -> Any:
        answer = cross_entropy(*args)
        if answer is not None:
            calls.append(True)
        return answer

    monkeypatch.setattr(cpu, "cross_entropy", counted)
    return calls


@pytest.fixture
def older_torch() -> Iterator[None]:
    """A torch that describes a tensor by a capsule alone: it has no table of functions for it."""
    exchange, to_dlpack = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), torch.utils.dlpack.to_dlpack
    native.tensors_are(torch.Tensor, None, to_dlpack)
    yield
    native.tensors_are(torch.Tensor, exchange, to_dlpack)


def drawn(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, indices of which every third is ignored, probabilities, and class weights with a zero."""
    logits = (3 * torch.randn(rows, classes)).to(dtype).requires_grad_()
    indices = torch.randint(0, classes, (rows,))
    indices[1::3] = -100
    weight = torch.rand(classes) + 0.5
    weight[-1] = 0
    probabilities = torch.rand(rows, classes).softmax(1)
    return logits, indices, probabilities.to(dtype), weight.to(dtype)


def assert_near(got: Tensor, true: Tensor, size: float) -> None:
    """Within a few roundings: of the result's dtype, and of numbers of that size in the dtype that computes."""
    compute = torch.float64 if got.dtype == torch.float64 else torch.float32
    assert got.isfinite().all()
    error = (got.double() - true).abs()
    eps, tiny = torch.finfo(got.dtype).eps, torch.finfo(got.dtype).smallest_normal
    allowed = eps * true.abs() + 16 * torch.finfo(compute).eps * size + tiny
    assert (error <= allowed).all(), (error.max(), allowed.min())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (8, 10), (65, 7), (7, 1000), (1, 49153), (1000, 1025)])
def test_value_and_gradient(
    rows: int,
    classes: int,
    dtype: torch.dtype,
    reduction: str,
    kind: str,
    weighted: bool,
    smoothing: float,
    served: list[bool],
) -> None:
    logits, indices, probabilities, weight = drawn(rows, classes, dtype)
    if classes == 1:
        weight = torch.ones_like(weight)
    target = indices if kind == "indices" else probabilities
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    loss = LF.cross_entropy(logits, target, weight if weighted else None, **options)
    assert served == [True]
    assert loss.dtype == dtype

    true_logits = logits.detach().double().requires_grad_()
    true_target = target if kind == "indices" else target.double()
    true = F.cross_entropy(true_logits, true_target, weight.double() if weighted else None, **options)
    assert_near(loss.detach(), true.detach(), size=20.0 * (rows if reduction == "sum" else 1))

    upstream = torch.randn_like(loss)
    (grad,) = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
    (true_grad,) = torch.autograd.grad(true, true_logits, upstream.double())
    assert_near(grad, true_grad, size=2.0 * float(upstream.abs().max()))
    (again,) = torch.autograd.grad(loss, logits, upstream)
    assert torch.equal(grad, again)
    if kind == "indices":
        assert not grad[1::3].any()  # exactly 0 in the ignored rows


@pytest.mark.usefixtures("older_torch")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_torch_without_the_table_gets_the_same(dtype: torch.dtype, served: list[bool]) -> None:
    for kind in ("indices", "probabilities"):
        test_value_and_gradient(65, 7, dtype, "none", kind, True, 0.1, served)
        served.clear()
    logits, indices, _, _ = drawn(8, 10, dtype)
    columns = logits.detach().T.contiguous().T
    torch.testing.assert_close(LF.cross_entropy(columns, indices), LF.cross_entropy(logits, indices).detach())
    assert served == [True]  # the columns are not rows
    with pytest.raises(ValueError, match="to match target batch_size"):
        LF.cross_entropy(logits, torch.zeros(3, dtype=torch.int64, device="meta"))


def test_one_row_by_itself(served: list[bool]) -> None:
    logits, indices, probabilities, weight = drawn(1, 65, torch.float32)
    for target in (indices, probabilities):
        for reduction in ("mean", "none"):
            row = logits.detach()[0].requires_grad_()
            loss = LF.cross_entropy(row, target[0], weight, reduction=reduction)
            assert loss.shape == ()
            upstream = torch.randn(())
            true = F.cross_entropy(row, target[0], weight, reduction=reduction)
            torch.testing.assert_close(loss, true)
            expected = torch.autograd.grad(true, row, upstream)
            torch.testing.assert_close(torch.autograd.grad(loss, row, upstream), expected)
    assert served == [True] * 4


def test_the_kernel_refuses_what_it_would_misread() -> None:
    logits, indices, _, _ = drawn(8, 10, torch.float32)
    grad, one = torch.empty(8, 10), torch.ones(())
    with pytest.raises(TypeError, match=r"cross_entropy: logits: expected object, got \[\]"):
        native.cross_entropy(1, [], indices, None, -100, 0.0, True, None, None, True)
    for memory in (torch.empty(2), torch.empty((), dtype=torch.float64), torch.empty((), device="meta")):
        with pytest.raises(ValueError, match="memory of another shape, dtype or layout"):
            native.cross_entropy(1, logits, indices, None, -100, 0.0, True, memory, None, True)
    assert native.cross_entropy(1, logits, None, None, -100, 0.0, True, None, None, True) is None
    assert native.cross_entropy(1, logits, indices.to("meta"), None, -100, 0.0, True, None, None, True) is None
    _, _, saved = native.cross_entropy(1, logits, indices, None, -100, 0.0, True, None, None, True)
    for wrong in (saved[:-1], b""):
        with pytest.raises(ValueError, match="other tensors than cross_entropy was given"):
            native.cross_entropy_grad(1, logits, indices, None, wrong, one, grad)
    with pytest.raises(ValueError, match="other tensors than cross_entropy was given"):
        native.cross_entropy_grad(1, logits[:4], indices[:4], None, saved, one, grad[:4])
    for upstream, out in ((torch.ones(3), grad), (one.double(), grad), (one, grad.T), (one, grad[:3])):
        with pytest.raises(ValueError, match="memory of another shape, dtype or layout"):
            native.cross_entropy_grad(1, logits, indices, None, saved, upstream, out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype: torch.dtype, served: list[bool]) -> None:
    logits, indices, _, weight = drawn(1000, 4097, dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            loss = LF.cross_entropy(logits, indices, weight, label_smoothing=0.1)
            found.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    finally:
        torch.set_num_threads(before)
    assert served == [True, True]
    assert all(map(torch.equal, *found))


def test_modules_take_it(served: list[bool]) -> None:
    logits, indices, _, weight = drawn(8, 10, torch.float32)
    for module in (LN.CrossEntropyLoss(), LN.CrossEntropyLoss(weight, label_smoothing=0.1)):
        module(logits, indices).backward()
    assert served == [True, True]


def test_everything_else_goes_the_long_way_to_the_same_answer(served: list[bool]) -> None:
    logits, indices, probabilities, weight = drawn(8, 10, torch.float32)
    plain = LF.cross_entropy(logits, indices)
    assert served.pop()
    nearest = logits.detach().T.contiguous().T
    for got in (
        LF.cross_entropy(logits, indices, backend="cpu"),
        LF.cross_entropy(logits, indices, normalizer="weights"),
        LF.cross_entropy(logits, indices, empty="zero"),
        LF.cross_entropy(logits, indices, class_dim=1),
        LF.cross_entropy(logits, indices.int()),
        LF.cross_entropy(nearest, indices),
        LF.cross_entropy(logits[None].mT, indices[None]),
        LF.cross_entropy(logits, indices, torch.ones(10, requires_grad=True)),
        LF.cross_entropy(torch.stack([logits, logits], 2)[..., 0], indices),
    ):
        torch.testing.assert_close(got.detach(), plain.detach())
    soft = probabilities.clone().requires_grad_()
    LF.cross_entropy(logits, soft, weight).backward()
    assert soft.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert LF.cross_entropy(logits.bfloat16(), indices).dtype == torch.float32
    assert not served
    with pytest.raises(RuntimeError, match="expected scalar type"):
        LF.cross_entropy(logits, indices, weight.double())
    with pytest.raises(RuntimeError, match="label_smoothing must be between"):
        LF.cross_entropy(logits, indices, label_smoothing=1.5)
    with pytest.raises(RuntimeError, match="weight tensor should be defined"):
        LF.cross_entropy(logits, indices, weight[:3])
    with pytest.raises(RuntimeError, match="ignore_index is not supported for floating point target"):
        LF.cross_entropy(logits, probabilities, ignore_index=3)
    with pytest.raises(ValueError, match="not a valid value for reduction"):
        LF.cross_entropy(logits, indices, reduction="average")
    assert not served


def test_a_frozen_weight_or_target_in_no_grad_mode_takes_it(served: list[bool]) -> None:
    logits, indices, probabilities, weight = drawn(8, 10, torch.float32)
    with torch.no_grad():
        LF.cross_entropy(logits, indices, weight.requires_grad_())
        LF.cross_entropy(logits, probabilities.requires_grad_())
    assert served == [True, True]


def test_a_forced_backend_and_a_question_are_heard(monkeypatch: pytest.MonkeyPatch, served: list[bool]) -> None:
    logits, indices, _, _ = drawn(8, 10, torch.float32)
    assert ll.explain(LF.cross_entropy, logits, indices).backend == "cpu"
    monkeypatch.setenv("LOGITLESS_BACKEND", "reference")
    LF.cross_entropy(logits, indices)
    monkeypatch.setenv("LOGITLESS_BACKEND", "abacus")
    with pytest.raises(ValueError, match="LOGITLESS_BACKEND asks for 'abacus'"):
        LF.cross_entropy(logits, indices)
    assert not served
    monkeypatch.delenv("LOGITLESS_BACKEND")
    LF.cross_entropy(logits, indices)
    assert served == [True]


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "none"}, {"weight": torch.rand(10)}])
def test_a_second_derivative_is_that_of_the_definition(options: dict[str, Any], served: list[bool]) -> None:
    logits, indices, _, _ = drawn(8, 10, torch.float32)
    seconds = []
    for function in (LF.cross_entropy, F.cross_entropy):
        leaf = logits.detach().clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf, indices, **options).sum(), leaf, create_graph=True)
        seconds.append(torch.autograd.grad((first * first.roll(1, 1)).sum(), leaf)[0])
    assert served == [True]
    torch.testing.assert_close(*seconds)


def test_a_bad_class_is_named(served: list[bool]) -> None:
    logits, indices, _, weight = drawn(8, 10, torch.float32)
    indices[4], indices[6] = 10, -1
    message = r"Target 10 is out of bounds at position 4 and 1 more: there are 10 classes \(0 to 9\)"
    with pytest.raises(IndexError, match=message):
        LF.cross_entropy(logits, indices)
    with pytest.raises(IndexError, match=message):
        LF.cross_entropy(logits, indices, weight, label_smoothing=0.1, reduction="none")
    assert served == [True, True]


def test_logits_changed_before_the_backward_pass_are_noticed() -> None:
    logits = drawn(8, 10, torch.float32)[0].detach() * 1
    source = logits.requires_grad_() * 1
    loss = LF.cross_entropy(source, torch.arange(8))
    with torch.no_grad():
        source.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_sum_beyond_the_dtype_is_infinite() -> None:
    for dtype, large in ((torch.float16, 6e4), (torch.float32, 3e38)):
        logits = torch.tensor([[large, 0.0]] * 4).to(dtype)
        assert LF.cross_entropy(logits, torch.ones(4, dtype=torch.int64), reduction="sum") == torch.inf
