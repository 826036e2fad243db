"""Gradients: any upstream gradient, any size, dense and lazy; nothing written to, ignored rows unread."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import checks
import logitless as ll
import logitless.functional as LF
import oracles
from oracles import assert_exactly_zero

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
short = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=short.get)
wide = pytest.mark.parametrize("dtype", DTYPES[:2], ids=short.get)


@pytest.fixture(params=["as picked", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a call takes by itself on this machine, and the reference forced."""
    if request.param == "reference":
        monkeypatch.setenv("LOGITLESS_BACKEND", "reference")
    else:
        monkeypatch.delenv("LOGITLESS_BACKEND", raising=False)
    return str(request.param)


@pytest.mark.usefixtures("backend")
@dtypes
@pytest.mark.parametrize("name", checks.CHECKS)
def test_value_and_gradient(name: str, dtype: torch.dtype) -> None:
    """Random upstream gradients of both signs, twice through one graph, the inputs unwritten."""
    checks.CHECKS[name](dtype)


@pytest.mark.usefixtures("backend")
@wide
@pytest.mark.parametrize("classes", [1, 7, 65, 1000, 49153])
@pytest.mark.parametrize("name", checks.BY_CLASSES)
def test_odd_class_counts(name: str, classes: int, dtype: torch.dtype) -> None:
    checks.BY_CLASSES[name](dtype, classes)


@pytest.mark.parametrize("scale", [-3.0, 0.0, 1e-6, 1e4])
@pytest.mark.parametrize("name", checks.BY_SCALE)
def test_upstream_gradients_of_any_size(name: str, scale: float) -> None:
    """Negative, zero, tiny and large: the gradient is linear in what comes from above."""
    checks.BY_SCALE[name](torch.float32, scale)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["cross_entropy", "lazy token_stats", "lazy pair_stats"])
def test_threads_change_nothing(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    checks.CHECKS[name](torch.float32)


OUTPUTS = {
    "token_stats": ["nll", "lse", "entropy"],
    "pair_stats": ["kl", "reverse_kl", "js", "cross_entropy", "entropy_p", "entropy_q", "nll_p", "nll_q"],
}


@pytest.mark.parametrize("lazy", [False, True], ids=["dense", "lazy"])
@pytest.mark.parametrize(("measure", "output"), [(m, o) for m, names in OUTPUTS.items() for o in names])
def test_each_output_alone(measure: str, output: str, lazy: bool) -> None:
    """An output that is not used sends no gradient; the one that is sends its own."""
    checks.measure(measure, torch.float64, lazy=lazy, outputs=(output,))
    checks.measure(measure, torch.float32, lazy=lazy, outputs=(output,))


@pytest.mark.parametrize(
    "frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=lambda f: "frozen-" + "".join("hwb"[i] for i in f)
)
@pytest.mark.parametrize("measure", ["token_stats", "linear_cross_entropy", "kl"])
def test_frozen_sides_of_a_lazy_head(measure: str, frozen: tuple[int, ...]) -> None:
    """What is frozen gets no gradient, and what is not gets the same gradient as when nothing is frozen."""
    hidden, head, bias, target = checks.head_problem(torch.float64)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if measure == "linear_cross_entropy":
            return LF.linear_cross_entropy(h, w, target, linear_bias=b)
        logits = ll.linear(h, w, b)
        if measure == "kl":
            return ll.kl(logits, torch.zeros(logits.shape, dtype=torch.float64)).sum()
        stats = ll.token_stats(logits, target)
        return (stats.nll * 2 - stats.entropy).sum()

    free = oracles.leaves((hidden, head, bias))
    expected = torch.autograd.grad(loss(*free), free)
    some = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate((hidden, head, bias))]
    loss(*some).backward()
    for i, (tensor, gradient) in enumerate(zip(some, expected, strict=True)):
        if i in frozen:
            assert tensor.grad is None
        else:
            assert tensor.grad is not None
            oracles.assert_no_worse(tensor.grad, gradient, what="hwb"[i])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("poison", [float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@dtypes
def test_ignored_rows_are_not_read(poison: float, smoothing: float, reduction: str, dtype: torch.dtype) -> None:
    """A2: whatever an ignored row holds, the value is finite and the row's gradient is exactly 0."""
    checks.ignored_rows(dtype, poison, smoothing, reduction)


@pytest.mark.parametrize("poison", [float("nan"), float("-inf")])
@pytest.mark.parametrize("lazy", [False, True], ids=["dense", "lazy"])
def test_ignored_rows_of_token_stats(poison: float, lazy: bool) -> None:
    logits, target = checks.logits_problem(torch.float32, 6, 9)
    target[2], target[4] = -100, -100
    hidden, head = torch.randn(6, 3), torch.randn(9, 3)
    own = [(hidden if lazy else logits).clone()]
    own[0][2] = poison
    own = [*oracles.leaves(own), *oracles.leaves([head] if lazy else [])]
    stats = ll.token_stats(ll.linear(*own) if lazy else own[0], target)
    for values in (stats.nll, stats.lse, stats.entropy):
        assert_exactly_zero(values[[2, 4]], "an ignored row's value")
        assert bool(values.isfinite().all())
    assert stats.argmax[[2, 4]].tolist() == [-1, -1]
    assert stats.rank[[2, 4]].tolist() == [-1, -1]
    grads = torch.autograd.grad((stats.nll + stats.lse * 2 - stats.entropy).sum(), own)
    assert_exactly_zero(grads[0][[2, 4]], "an ignored row's gradient")
    assert all(bool(g.isfinite().all()) for g in grads)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda t: torch.stack([t, t * 7], -1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t),
    "permuted": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "entropy", "token_stats"])
def test_strides(name: str, layout: str) -> None:
    """A23: torch's own NLL backward refuses some of these; the gradient here has the values of the contiguous one."""
    shape = (4, 6, 3, 2) if name in ("cross_entropy", "nll_loss") else (4, 3, 6)
    logits = torch.randn(shape, dtype=torch.float64)
    target = torch.randint(0, 6, (4, 3, 2) if len(shape) == 4 else (4, 3))
    arranged = LAYOUTS[layout](logits)
    call: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "cross_entropy": (
            lambda z: LF.cross_entropy(z, target, reduction="none"),
            lambda z: oracles.cross_entropy(z, target, reduction="none"),
        ),
        "nll_loss": (lambda z: LF.nll_loss(z, target), lambda z: oracles.nll_loss(z, target)),
        "entropy": (ll.entropy, oracles.entropy),
        "token_stats": (lambda z: ll.token_stats(z, target).nll, lambda z: oracles.token_stats(z, target)["nll"]),
    }
    oracles.examine(*call[name], [arranged], what=f"{name} {layout}")


CLASS_WEIGHTED: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda module, z, w: module.cross_entropy(z, torch.tensor([0, 2, 1, -100]), weight=w),
    "cross_entropy smooth": lambda module, z, w: module.cross_entropy(
        z, torch.tensor([0, 2, 1, -100]), weight=w, label_smoothing=0.2
    ),
    "nll_loss": lambda module, z, w: module.nll_loss(z, torch.tensor([0, 2, 1, -100]), weight=w),
    "binary_cross_entropy": lambda module, z, w: module.binary_cross_entropy(
        z.sigmoid(), (z > 0).to(z.dtype).detach(), weight=w
    ),
    "binary_cross_entropy_with_logits": lambda module, z, w: module.binary_cross_entropy_with_logits(
        z, (z > 0).to(z.dtype).detach(), weight=w
    ),
    "pos_weight": lambda module, z, w: module.binary_cross_entropy_with_logits(
        z, (z > 0).to(z.dtype).detach(), pos_weight=w
    ),
}


@wide
@pytest.mark.parametrize("name", CLASS_WEIGHTED)
def test_gradients_of_weights(name: str, dtype: torch.dtype) -> None:
    """A25: torch has no derivative for class weights, weight and pos_weight."""
    logits = torch.randn(4, 3, dtype=torch.float64).to(dtype)
    weight = (torch.rand(3, dtype=torch.float64) + 0.5).to(dtype)
    call = CLASS_WEIGHTED[name]
    oracles.examine(lambda z, w: call(LF, z, w), lambda z, w: call(oracles, z, w), [logits, weight], what=name)


def test_second_backward_after_free_raises() -> None:
    """Without retain_graph a second backward is torch's error, not a wrong gradient."""
    hidden, head, bias, target = checks.head_problem(torch.float32)
    own = oracles.leaves((hidden, head, bias))
    loss = LF.linear_cross_entropy(own[0], own[1], target, linear_bias=own[2])
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
