"""The public elementwise and cosine losses on the compiled kernels: which backend runs, and that both agree.

The kernels themselves are held to mpmath in test_native_elementwise.py; here float64 arithmetic of the reference is the
truth, which test_gradients.py and test_numerics.py hold to formulas and to torch.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import logitless as ll
import logitless.functional as LF
from logitless.kernels import definitions as reference

pytest.importorskip("logitless._native", reason="built without the extension (LOGITLESS_NO_NATIVE)")
from logitless.kernels.cpu import elementwise as cpu_elementwise

pytestmark = [
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
    pytest.mark.filterwarnings("ignore:kl_div. input .* differ and are broadcast:UserWarning"),
]

SIZES = [(1,), (7,), (65,), (1000,), (3, 49153)]
ROUNDING = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
REDUCTIONS = ("none", "mean", "sum")

LOSSES: dict[str, Callable[..., Tensor]] = {
    "binary_cross_entropy": lambda x, t, **options: LF.binary_cross_entropy(x, t, **options),
    "binary_cross_entropy_with_logits": lambda x, t, **options: LF.binary_cross_entropy_with_logits(x, t, **options),
    "kl_div": lambda x, t, **options: LF.kl_div(x, t, **options),
    "kl_div, log target": lambda x, t, **options: LF.kl_div(x, t, log_target=True, **options),
}
REFERENCES = {
    "binary_cross_entropy": "binary_cross_entropy",
    "binary_cross_entropy_with_logits": "binary_cross_entropy_with_logits",
    "kl_div": "kl_div",
    "kl_div, log target": "kl_div",
    "cosine_similarity": "cosine_similarity",
    "cosine_embedding_loss": "cosine_embedding_loss",
}
elementwise = pytest.mark.parametrize("name", LOSSES)


def operands(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """An input and a target that every loss of LOSSES takes."""
    x = torch.randn(shape, dtype=torch.float64) * 3
    if name == "binary_cross_entropy":
        x = x.sigmoid().clamp(0.01, 0.99)
    t = torch.rand(shape, dtype=torch.float64)
    if name == "kl_div, log target":
        t = t.log()
    return x.to(dtype), t.to(dtype)


def negated(tensor: Tensor) -> Tensor:
    """The same numbers as a view of memory that holds their negatives."""
    view = torch.complex(tensor, -tensor).conj().imag
    assert view.is_neg()
    assert torch.equal(view, tensor)
    return view


def of_name(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of two (N, D) tensors."""
    if name == "cosine_similarity":
        return LF.cosine_similarity
    if name == "cosine_embedding_loss":
        return lambda a, b: LF.cosine_embedding_loss(a, b, torch.tensor([1, -1, 1, -1, 1, -1]), margin=0.1)
    return LOSSES[name]


def upstream_of(out: Tensor) -> Tensor:
    """The same numbers of both signs in every dtype."""
    draw = torch.Generator().manual_seed(11)
    return (torch.randn(out.shape, generator=draw, dtype=torch.float64) * 3).to(torch.bfloat16).to(out.dtype)


def value_and_grads(function: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    own = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*own)
    return out.detach(), *torch.autograd.grad(out, own, upstream_of(out))


def assert_close(got: tuple[Tensor, ...], truth: tuple[Tensor, ...], dtype: torch.dtype, least: float = 1e-3) -> None:
    """To a few roundings of the largest element, or of `least` where that is larger."""
    for value, true in zip(got, truth, strict=True):
        assert value.dtype == dtype
        assert value.shape == true.shape
        if bool(true.to(dtype).isinf().any()):  # a sum that float16 does not hold
            assert torch.equal(value, true.to(dtype))
            continue
        error = (value.double() - true.double()).abs().max()
        assert float(error) <= ROUNDING[dtype] * max(float(true.abs().max()), least)


def on_both(loss: Callable[..., Tensor], *leaves: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Value and gradients of `loss(*leaves, backend=)` on the kernels and on the reference."""
    own, expected = (value_and_grads(partial(loss, backend=backend), *leaves) for backend in ("cpu", "reference"))
    return own, expected


# ---- which backend runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFERENCES)
def test_the_kernels_run_by_default_and_the_reference_when_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the other backend ran")

    x, t = operands(name, (6, 5))
    with monkeypatch.context() as patched:
        patched.delenv("LOGITLESS_BACKEND", raising=False)
        patched.setattr(reference, REFERENCES[name], forbidden)
        value_and_grads(lambda x: of_name(name)(x, t), x)
    with monkeypatch.context() as patched:
        patched.setenv("LOGITLESS_BACKEND", "reference")
        for kernel in ("elementwise", "cosine", "cosine_grad"):
            patched.setattr(cpu_elementwise._native, kernel, forbidden)
        value_and_grads(lambda x: of_name(name)(x, t), x)


def test_explain_says_cpu_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOGITLESS_BACKEND", raising=False)
    x, t, signs = torch.rand(4, 3), torch.rand(4, 3), torch.ones(4)
    calls: list[tuple[Any, ...]] = [
        (LF.kl_div, x.log(), t),
        (LF.binary_cross_entropy, x, t),
        (LF.binary_cross_entropy_with_logits, x, t),
        (LF.cosine_similarity, x, t),
        (LF.cosine_embedding_loss, x, t, signs),
        (LF.nll_loss, x, torch.tensor([0, 1, 2, 0])),
    ]
    for call in calls:
        assert ll.explain(*call) == ("cpu", "the tensors are on the CPU")
        assert ll.explain(*call, backend="reference") == ("reference", "backend= asks for it")


def test_what_the_kernels_cannot_serve_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOGITLESS_BACKEND", raising=False)
    x, t = torch.rand(4, 3), torch.rand(4, 3)
    asks = torch.rand(4, 3, requires_grad=True)
    nothing = torch.empty(0, 3)
    logits_loss = LF.binary_cross_entropy_with_logits
    cases: list[tuple[str, Any, tuple[Tensor, ...], dict[str, Any]]] = [
        ("target requires a gradient", LF.kl_div, (x, asks), {"reduction": "sum"}),
        ("the input is broadcast", LF.kl_div, (x[:1], t), {"reduction": "sum"}),
        ("target requires a gradient", LF.binary_cross_entropy, (x, asks), {}),
        ("weight requires a gradient", LF.binary_cross_entropy, (x, t), {"weight": asks}),
        ("pos_weight requires a gradient", logits_loss, (x, t), {"pos_weight": asks}),
        ("normalizer requires a gradient", logits_loss, (x, t), {"normalizer": asks.sum()}),
        ("no kernel reads target in torch.uint16", logits_loss, (x, t.to(torch.uint16)), {}),
        ("there is nothing to compute", logits_loss, (nothing, nothing), {}),
        ("there are no vectors, or none with elements", LF.cosine_similarity, (nothing, nothing), {}),
        ("a tensor's memory holds its negative", LF.cosine_similarity, (x, negated(t)), {}),
    ]
    for reason, call, tensors, options in cases:
        choice = ll.explain(call, *tensors, **options)
        assert choice.backend == "reference"
        assert choice.reason.startswith(reason)
        with pytest.raises(RuntimeError, match="which cannot serve this call"):
            call(*tensors, backend="cpu", **options)


@pytest.mark.parametrize("name", [*REFERENCES, "cross_entropy"])
def test_memory_that_holds_negatives_is_read_as_what_it_stands_for(name: str) -> None:
    """Such a view's address is that of other numbers."""
    x, t = operands(name, (6, 5))
    call = (
        (lambda x, _: LF.cross_entropy(x, torch.tensor([0, 1, 2, 3, 4, 0])))
        if name == "cross_entropy"
        else of_name(name)
    )
    assert torch.equal(call(negated(x), t), call(x, t)) or torch.allclose(call(negated(x), t), call(x, t), rtol=1e-13)


# ---- both agree ------------------------------------------------------------------------------------------------------


@elementwise
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SIZES)
def test_values_and_gradients(name: str, reduction: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, t = operands(name, shape, dtype)
    own = value_and_grads(lambda x: LOSSES[name](x, t, reduction=reduction, backend="cpu"), x)
    picked = value_and_grads(lambda x: LOSSES[name](x, t, reduction=reduction), x)  # few numbers have a shorter way
    for first, second in zip(own, picked, strict=True):
        assert torch.equal(first, second)
    exact = lambda x: LOSSES[name](x, t.double(), reduction=reduction, backend="reference")  # noqa: E731
    assert_close(own, value_and_grads(exact, x.double()), dtype)


def arrangements(shape: tuple[int, ...]) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
        "every second": lambda x: torch.stack([x, x * math.nan], -1)[..., 0],
        "expanded": lambda x: x[:1].expand(shape),
    }


@elementwise
@pytest.mark.parametrize("arrangement", arrangements(()))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_strides_of_any_operand(name: str, arrangement: str, reduction: str) -> None:
    shape = (3, 5, 4, 7)
    arrange = arrangements(shape)[arrangement]
    for which in (0, 1, (0, 1)):
        tensors = list(operands(name, shape))
        for i in (which,) if isinstance(which, int) else which:
            tensors[i] = arrange(tensors[i])
        own, expected = on_both(partial(LOSSES[name], t=tensors[1], reduction=reduction), tensors[0])
        assert_close(own, expected, torch.float64)
        if arrangement == "channels_last" and which == (0, 1):
            assert own[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("class_dim", [None, 1])
def test_weights_and_normalizers(reduction: str, class_dim: int | None) -> None:
    shape = (4, 5, 5)
    weight, positive = torch.rand(5, dtype=torch.float64) + 0.5, torch.rand(5, dtype=torch.float64) * 3
    normalizers: tuple[Any, ...] = (None, "weights", "rows", 7, 2.5, torch.tensor(3.0), 0)
    for name, options in (
        ("binary_cross_entropy", {"weight": weight}),
        ("binary_cross_entropy_with_logits", {"weight": weight, "pos_weight": positive}),
        ("binary_cross_entropy_with_logits", {"pos_weight": positive}),
    ):
        x, t = operands(name, shape)
        for normalizer in normalizers if reduction == "mean" else (None,):
            given: dict[str, Any] = {**options, "class_dim": class_dim, "normalizer": normalizer}
            own, expected = on_both(partial(LOSSES[name], t=t, reduction=reduction, **given), x)
            if isinstance(normalizer, int) and normalizer == 0:
                assert torch.equal(own[0], expected[0])
                assert not bool(own[1].isfinite().any() | expected[1].isfinite().any())
            else:
                assert_close(own, expected, torch.float64)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("name", ["binary_cross_entropy", "binary_cross_entropy_with_logits"])
def test_labels_of_every_integer_type(name: str, kind: torch.dtype) -> None:
    x, t = operands(name, (9, 65))
    labels = t.round()
    own = value_and_grads(lambda x: LOSSES[name](x, labels.to(kind), backend="cpu"), x)
    assert_close(own, value_and_grads(lambda x: LOSSES[name](x, labels, backend="reference"), x), torch.float64)


@pytest.mark.parametrize(("first", "second"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)])
@elementwise
def test_dtypes_are_promoted_alike(name: str, first: torch.dtype, second: torch.dtype) -> None:
    for a, b in ((first, second), (second, first)):
        x, t = operands(name, (5, 6))
        x, t = x.to(a), t.to(b)
        own, expected = on_both(partial(LOSSES[name], t=t), x)
        assert [each.dtype for each in own] == [each.dtype for each in expected]
        for value, true in zip(own, expected, strict=True):
            assert torch.allclose(value.double(), true.double(), rtol=1e-2 if a == torch.bfloat16 else 1e-6)


@elementwise
def test_half_precision_under_autocast_answers_in_float32(name: str) -> None:
    x, t = operands(name, (6, 65), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        own = value_and_grads(lambda x: LOSSES[name](x, t, backend="cpu"), x)
        expected = value_and_grads(lambda x: LOSSES[name](x, t, backend="reference"), x)
    assert own[0].dtype == expected[0].dtype == torch.float32
    assert own[1].dtype == expected[1].dtype == torch.bfloat16
    assert torch.allclose(own[0], expected[0], rtol=1e-6)


@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 6e4), (torch.float32, 3e38)])
@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_a_sum_beyond_the_dtype_is_infinite(dtype: torch.dtype, large: float, backend: str | None) -> None:
    x = torch.full((3,), large, dtype=dtype)
    for reduction, expected in (("sum", torch.tensor(math.inf, dtype=dtype)), ("none", x)):
        out = LF.binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction=reduction, backend=backend)
        assert torch.equal(out, expected)


def test_a_broadcast_target_of_kl_div() -> None:
    x, t = operands("kl_div", (6, 9))
    for reduction in ("none", "sum", "batchmean", "rowmean", "mean"):
        own, expected = on_both(partial(LF.kl_div, target=t[:1], reduction=reduction), x)
        assert_close(own, expected, torch.float64)


BROADCAST = [
    ((6, 9), (6, 9), 1),
    ((6, 9), (6, 9), 0),
    ((6, 1, 9), (1, 4, 9), -1),
    ((9,), (6, 9), 1),
    ((6, 9), (6, 1), 0),
    ((2, 5, 9), (5, 1), 1),
]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("shape1", "shape2", "dim"), BROADCAST)
def test_cosine_similarity_of_shapes_that_broadcast(
    dtype: torch.dtype, shape1: tuple[int, ...], shape2: tuple[int, ...], dim: int
) -> None:
    a, b = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in (shape1, shape2))
    own = value_and_grads(lambda a, b: LF.cosine_similarity(a, b, dim, backend="cpu"), a, b)
    expected = value_and_grads(
        lambda a, b: LF.cosine_similarity(a, b, dim, backend="reference"), a.double(), b.double()
    )
    assert_close(own, expected, dtype, least=1.0)
    for i in (0, 1):  # one of them frozen
        alone = value_and_grads(
            (lambda x: LF.cosine_similarity(x, b, dim)) if i == 0 else (lambda x: LF.cosine_similarity(a, x, dim)),
            (a, b)[i],
        )
        assert torch.equal(alone[1], own[1 + i])


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "shapes", [((6, 65), (6, 65), (6,)), ((1, 65), (6, 65), (6,)), ((1, 7), (1, 7), (6,)), ((7,), (7,), ())]
)
def test_cosine_embedding_loss(dtype: torch.dtype, reduction: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    a, b = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes[:2])
    target = torch.randint(0, 2, shapes[2]) * 2 - 1
    own = value_and_grads(
        lambda a, b: LF.cosine_embedding_loss(a, b, target, 0.1, reduction=reduction, backend="cpu"), a, b
    )
    expected = value_and_grads(
        lambda a, b: LF.cosine_embedding_loss(a, b, target, 0.1, reduction=reduction, backend="reference"),
        a.double(),
        b.double(),
    )
    assert_close(own, expected, dtype, least=1.0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.int8, torch.int8),
        (torch.int64, torch.float32),
        (torch.float32, torch.float64),
        (torch.bool, torch.float16),
    ],
)
def test_vectors_of_other_dtypes(first: torch.dtype, second: torch.dtype) -> None:
    """Whole numbers compute in the default dtype."""
    a, b = torch.randint(0, 2, (6, 7)), torch.randint(0, 2, (6, 7)) + 1
    target = torch.tensor([1, -1, 1, -1, 1, -1])
    for x, y in ((a.to(first), b.to(second)), (b.to(second), a.to(first))):
        own, expected = (LF.cosine_embedding_loss(x, y, target, backend=backend) for backend in ("cpu", "reference"))
        torch.testing.assert_close(own, expected)
        if second.is_floating_point:
            own, expected = (LF.cosine_similarity(x, y, backend=backend) for backend in ("cpu", "reference"))
            torch.testing.assert_close(own, expected)


def test_a_dimension_that_does_not_exist() -> None:
    for backend in ("cpu", "reference"):
        with pytest.raises(IndexError, match="Dimension out of range"):
            LF.cosine_similarity(torch.ones(3, 4), torch.ones(3, 4), dim=2, backend=backend)


# ---- gradients of gradients, and what is kept ------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFERENCES)
def test_second_derivatives_and_batched_upstream_gradients(name: str) -> None:
    x, t = operands(name, (6, 3))
    x.requires_grad_()
    call = of_name(name)
    assert torch.autograd.gradgradcheck(lambda x: call(x, t), (x,))
    out = call(x, t)
    assert out.grad_fn is not None
    batch = torch.randn(4, *out.shape, dtype=torch.float64)
    batched = torch.autograd.grad(out, x, batch, is_grads_batched=True, retain_graph=True)[0]
    for upstream, grad in zip(batch, batched, strict=True):
        assert torch.allclose(torch.autograd.grad(out, x, upstream, retain_graph=True)[0], grad, rtol=1e-12)


@pytest.mark.parametrize("name", REFERENCES)
def test_an_operand_changed_before_the_backward_pass_is_noticed(name: str) -> None:
    x, t = operands(name, (6, 3))
    loss = of_name(name)(x.requires_grad_(), t).sum()
    t.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nll_loss_of_many_log_probabilities(dtype: torch.dtype, reduction: str) -> None:
    """Above the size from which the gradient's memory is pooled, in the input's layout."""
    shape = (8, 40, 65, 65)
    x = torch.randn(shape, dtype=torch.float64).log_softmax(1).to(dtype).contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 40, (8, 65, 65))
    target[:, ::3] = -100
    weight = torch.rand(40, dtype=torch.float64) + 0.5
    for w in (None, weight):
        own = value_and_grads(
            lambda x, w=w: LF.nll_loss(x, target, None if w is None else w.to(dtype), reduction=reduction), x
        )
        expected = value_and_grads(lambda x, w=w: LF.nll_loss(x, target, w, reduction=reduction), x.double())
        assert_close(own, expected, dtype)
        assert own[1].is_contiguous(memory_format=torch.channels_last)
    # A second derivative is 0 by itself; through a square it is 2 (d loss)^2.
    leaf = x.double().requires_grad_()
    loss = LF.nll_loss(leaf, target)
    (first,) = torch.autograd.grad(loss * loss, leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    at_targets = torch.zeros_like(leaf).scatter(1, target.clamp(min=0)[:, None], 1.0)
    kept = (target != -100)[:, None]
    assert torch.allclose(second, 2 * at_targets * kept / kept.sum(), rtol=1e-12)


PEAK = r"""
import re, sys, torch
import logitless.functional as LF
def memory(field):
    return int(re.search(field + r":\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
torch.set_num_threads(1)
name, dtype, shape = sys.argv[1], getattr(torch, sys.argv[2]), (2048, 16384)
x, t = torch.rand(shape).to(dtype), torch.rand(shape).to(dtype)
gradients, options = 1, {}
if name == "nll_loss":
    t = torch.randint(0, 4, shape[:1])
elif name == "cosine_similarity":
    gradients = 2
    t.requires_grad_()
elif name == "kl_div":
    options = {"reduction": "batchmean"}
x.requires_grad_()
def step():
    getattr(LF, name)(x, t, **options).sum().backward()
small = torch.rand(4, 4, requires_grad=True)
getattr(LF, name)(small, t[:4] if name == "nll_loss" else torch.rand(4, 4), **options).sum().backward()
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
step()
print(memory("VmHWM") - before - gradients * x.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "cosine_similarity", "nll_loss"]
)
def test_peak_memory_is_inputs_and_gradients(name: str, dtype: str) -> None:
    """Of a forward and backward pass, beyond 32 MB: an element is 134 or 67 MB here."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, name, dtype],
        env={k: v for k, v in os.environ.items() if k != "LOGITLESS_BACKEND"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 32e6
