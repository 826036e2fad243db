"""The elementwise and cosine kernels as torch operators: as torch asks, and the same numbers as outside a graph."""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch.func import grad, vmap

import logitless as ll
import logitless.functional as LF
import logitless.nn as LN
from graphs import Graphs, plain_graph
from oracles import leaves

pytest.importorskip("logitless._native", reason="built without the extension (LOGITLESS_NO_NATIVE)")
from logitless._operators import cosines as cosine_operators
from logitless._operators import elements as element_operators
from logitless.kernels import cpu

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),  # on importing inductor
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
    pytest.mark.filterwarnings("ignore:kl_div. input .* differ and are broadcast:UserWarning"),
]
REDUCTIONS = ("none", "mean", "sum")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = [(1,), (7,), (65,), (1000,), (49157,)]
ELEMENTS = ["elementwise", "elementwise_grad"]
COSINES = ["cosine", "cosine_grad"]

LOSSES: dict[str, Callable[..., Tensor]] = {
    "binary_cross_entropy": LF.binary_cross_entropy,
    "binary_cross_entropy_with_logits": LF.binary_cross_entropy_with_logits,
    "kl_div": LF.kl_div,
    "kl_div_log_target": partial(LF.kl_div, log_target=True),
}
elementwise = pytest.mark.parametrize("name", LOSSES)
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOGITLESS_BACKEND", raising=False)
    torch._dynamo.reset()


def operands(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """An input and a target that every loss of LOSSES takes."""
    x = torch.randn(shape, dtype=torch.float64) * 3
    if name == "binary_cross_entropy":
        x = x.sigmoid().clamp(0.01, 0.99)
    t = torch.rand(shape, dtype=torch.float64)
    return x.to(dtype), (t.log() if name == "kl_div_log_target" else t).to(dtype)


def vectors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


# --- as torch asks


def element_calls() -> dict[str, tuple[str, Tensor, Tensor, Tensor | None, Tensor | None]]:
    """A loss, and its operands."""
    calls: dict[str, tuple[Any, ...]] = {name: (name, *operands(name, (7, 65)), None, None) for name in LOSSES}
    logits = "binary_cross_entropy_with_logits"
    x, t = operands(logits, (2, 3, 4, 5))
    calls["weights"] = (logits, x, t.round().long(), torch.rand(5), torch.rand(3, 1, 1))
    calls["channels last"] = (logits, x.contiguous(memory_format=torch.channels_last), t, None, torch.rand(4, 1))
    calls["transposed"] = (logits, transposed(x), t, None, None)
    calls["every second"] = (logits, torch.stack([x, x], -1)[..., 0], t, None, None)
    calls["an expanded target"] = ("kl_div", x, t[:1].expand(x.shape), None, None)
    calls["bfloat16"] = (logits, x.bfloat16(), t.half(), torch.rand(5), None)
    calls["one number"] = ("binary_cross_entropy", torch.tensor(0.3), torch.tensor(True), torch.rand(()), None)
    return calls


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("call", list(element_calls()))
def test_elementwise_operators_pass_opcheck(call: str, dtype: torch.dtype | None) -> None:
    name, x, *rest = element_calls()[call]
    torch.library.opcheck(torch.ops.logitless.elementwise, (x.requires_grad_(), *rest, name, dtype))
    upstream = torch.randn((), dtype=torch.float64) if dtype is None else torch.randn(x.shape)
    torch.library.opcheck(torch.ops.logitless.elementwise_grad, (upstream, x.detach(), *rest, name, dtype is None))


def cosine_calls() -> dict[str, tuple[Tensor, Tensor, Tensor | None, int]]:
    """Two vectors, a target, and the vectors' dimension."""
    a, b = vectors((7, 65), (7, 65))
    signs = torch.tensor([1, -1, 1, -1, 1, 0, -1])
    return {
        "similarity": (a, b, None, 1),
        "along the first": (a, transposed(b), None, 0),
        "in the middle": (*vectors((2, 5, 3), (5, 1)), None, 1),
        "in the middle, from the right": (*vectors((5, 1), (2, 5, 3), dtype=torch.bfloat16), None, -2),
        "embedding": (a, b, signs, -1),
        "one for all": (a[:1], b.double().float()[3:4], signs.float(), -1),
        "float64": (a.double(), b.double(), signs, -1),
        "one pair": (a[0], b[0], signs[0], -1),
    }


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("call", list(cosine_calls()))
def test_cosine_operators_pass_opcheck(call: str, summed: bool) -> None:
    x1, x2, target, dim = cosine_calls()[call]
    options = (dim, 1e-8, 0.1, summed)
    torch.library.opcheck(torch.ops.logitless.cosine, (x1.requires_grad_(), x2.requires_grad_(), target, *options))
    x1, x2 = x1.detach(), x2.detach()
    out, saved = torch.ops.logitless.cosine(x1, x2, target, *options)
    for needed in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.logitless.cosine_grad, (torch.randn_like(out), x1, x2, target, saved, *options, *needed)
        )


def test_an_operator_refuses_a_gradient_that_it_does_not_have() -> None:
    x, t = operands("kl_div", (7, 65))
    with pytest.raises(NotImplementedError, match="the input alone"):
        element_operators.elementwise("kl_div", x, t.requires_grad_(), backend=cpu, dtype=None)


def test_an_operator_has_no_second_derivative_and_says_so() -> None:
    x, t = operands("kl_div", (7,))
    out = element_operators.elementwise(
        "binary_cross_entropy_with_logits", x.requires_grad_(), t, backend=cpu, dtype=None
    )
    (first,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"elementwise_grad.default but no autograd formula"):
        first.sum().backward()
    (second,) = torch.autograd.grad(LF.binary_cross_entropy_with_logits(x, t), x, create_graph=True)
    assert second.requires_grad  # outside a graph there is one
    compiled = torch.compile(LF.binary_cross_entropy_with_logits, backend="aot_eager", fullgraph=True)
    (first,) = torch.autograd.grad(compiled(x, t), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        first.sum().backward()


# --- vmap


@elementwise
@pytest.mark.parametrize("batched", [(0, 0), (1, None), (None, 2)])
@pytest.mark.parametrize("summed", [False, True])
def test_vmap_of_the_elementwise_operator(name: str, batched: tuple[int | None, ...], summed: bool) -> None:
    """Values, and their gradients for a batch of upstream gradients, against the reference."""
    args = tuple(
        arg if dim is None else torch.stack([arg.roll(i, 0) for i in range(3)], dim)
        for arg, dim in zip(operands(name, (7, 65), torch.float64), batched, strict=True)
    )
    x = args[0].requires_grad_()
    dtype = None if summed else torch.float64
    ours = vmap(lambda x, t: element_operators.elementwise(name, x, t, backend=cpu, dtype=dtype), in_dims=batched)
    definition = partial(LOSSES[name], reduction="sum" if summed else "none", backend="reference")
    theirs = vmap(definition, in_dims=batched)
    got, want = ours(*args), theirs(*args)
    torch.testing.assert_close(got, want, check_stride=False)
    upstream = torch.randn(4, *want.shape, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(got, x, upstream, is_grads_batched=True),
        torch.autograd.grad(want, x, upstream, is_grads_batched=True),
    )


@pytest.mark.parametrize("batched", [(0, None, None), (1, 2, 0), (None, 0, None), (None, None, 0)])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_vmap_of_the_cosine_operator(batched: tuple[int | None, ...], reduction: str) -> None:
    a, b = vectors((7, 65), (7, 65), dtype=torch.float64)
    args = tuple(
        arg if dim is None else torch.stack([arg.roll(i, 0) for i in range(3)], dim)
        for arg, dim in zip((a, b, torch.tensor([1, -1, 1, -1, 1, -1, 1])), batched, strict=True)
    )
    free = [arg.requires_grad_() for arg in args[:2]]
    options: dict[str, Any] = {"dim": -1, "eps": 0.0, "margin": 0.1, "summed": reduction == "sum"}
    got = vmap(lambda x, y, t: cosine_operators.cosine(cpu, x, y, t, **options), in_dims=batched)(*args)
    want = vmap(partial(F.cosine_embedding_loss, margin=0.1, reduction=reduction), in_dims=batched)(*args)
    torch.testing.assert_close(got, want)
    upstream = torch.randn(4, *want.shape, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(got, free, upstream, is_grads_batched=True),
        torch.autograd.grad(want, free, upstream, is_grads_batched=True),
    )


# --- compiled graphs


def assert_same(got: Tensor, want: Tensor) -> None:
    walked = [[step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in (got, want)]
    assert (got.dtype, got.shape, walked[0]) == (want.dtype, want.shape, walked[1])
    assert torch.equal(got.nan_to_num(-7.25, -7.25, 7.25), want.nan_to_num(-7.25, -7.25, 7.25))


def assert_compiles_to_the_same(
    function: Callable[..., Tensor],
    args: Sequence[Tensor],
    kernels: Sequence[str],
    calls: int = 1,
    compiler: Callable[..., Callable[..., Any]] | None = None,
) -> None:
    """One graph each way, which calls the kernels; value and gradients are those of an eager call, bit for bit."""
    graphs, own, eager = Graphs(), leaves(args), leaves(args)
    got, want = (compiler or graphs.compile)(function)(*own), function(*eager)
    upstream = (torch.randn(want.shape, dtype=torch.float64) * 3).to(want.dtype)
    assert_same(got, want)
    for ours, theirs in zip(
        torch.autograd.grad(got, own, upstream), torch.autograd.grad(want, eager, upstream), strict=True
    ):
        assert_same(ours, theirs)
    if compiler is None:
        assert graphs.kernels == [[name] * calls for name in kernels]


def of_every_reduction(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Each reduction of a loss of one tensor, each of an input of its own, in one graph."""
    return lambda *inputs: torch.cat(
        [loss(x, reduction=reduction).reshape(-1) for x, reduction in zip(inputs, REDUCTIONS, strict=True)]
    )


@elementwise
@pytest.mark.parametrize("shape", SIZES)
def test_compiled_elements_are_the_kernels(name: str, shape: tuple[int, ...]) -> None:
    x, t = operands(name, shape)
    assert_compiles_to_the_same(of_every_reduction(partial(LOSSES[name], target=t)), [x] * 3, ELEMENTS, 3)


@elementwise
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_elements_of_every_dtype(name: str, dtype: torch.dtype) -> None:
    x, t = operands(name, (3, 65), dtype)
    assert_compiles_to_the_same(of_every_reduction(partial(LOSSES[name], target=t)), [x] * 3, ELEMENTS, 3)
    for reduction in REDUCTIONS:  # and of a loss that is all there is, whose upstream gradient is what the user gives
        assert_compiles_to_the_same(partial(LOSSES[name], target=t, reduction=reduction), [x], ELEMENTS)


@elementwise
@pytest.mark.parametrize(("first", "second"), [(torch.float32, torch.float64), (torch.float16, torch.bfloat16)])
def test_compiled_elements_of_two_dtypes(name: str, first: torch.dtype, second: torch.dtype) -> None:
    for a, b in ((first, second), (second, first)):
        x, t = operands(name, (5, 6))
        x, t = x.to(a), t.to(b)
        assert_compiles_to_the_same(of_every_reduction(partial(LOSSES[name], target=t)), [x] * 3, ELEMENTS, 3)


ARRANGEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": transposed,
    "every second": lambda x: torch.stack([x, x * math.nan], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "a slice": lambda x: torch.cat([x, x], 2)[:, :, 1:5],
}


@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "kl_div"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled_elements_of_any_strides(name: str, arrangement: str, reduction: str) -> None:
    shape, arrange = (3, 5, 4, 7), ARRANGEMENTS[arrangement]
    for which in ((0,), (1,), (0, 1)):
        x, t = (arrange(tensor) if i in which else tensor for i, tensor in enumerate(operands(name, shape)))
        assert_compiles_to_the_same(lambda x: LOSSES[name](x, t, reduction=reduction), [x], ELEMENTS)  # noqa: B023


@pytest.mark.parametrize(
    "arrange",
    [lambda x: x.mT, lambda x: x[:, ::2], lambda x: x.as_strided((1, 600, 1000), (7, 1000, 1))],
    ids=["transposed", "every second", "a size 1 of an odd stride"],
)
def test_large_results_have_the_strides_that_the_graph_was_told(arrange: Callable[[Tensor], Tensor]) -> None:
    """They come from a pool."""
    x = arrange(torch.randn(600, 1000))
    loss = partial(LF.kl_div, target=torch.ones(x.shape), reduction="none")
    assert_compiles_to_the_same(lambda x: 2 * loss(3 * x), [x], ELEMENTS)
    assert_compiles_to_the_same(
        lambda x: 2 * loss(3 * x), [x], ELEMENTS, compiler=partial(torch.compile, fullgraph=True)
    )


BCE_OPTIONS: dict[str, dict[str, Any]] = {
    "weight": {"weight": torch.linspace(0.5, 2, 5)},
    "a weight for each": {"weight": torch.linspace(0, 2, 100, dtype=torch.float64).reshape(4, 5, 5)},
    "a weight along a dimension": {"weight": torch.linspace(0.5, 2, 5), "class_dim": 1},
    "over the weights": {"weight": torch.linspace(0.5, 2, 5), "normalizer": "weights"},
    "over the weights that there are not": {"normalizer": "weights"},
    "over the rows": {"normalizer": "rows"},
    "over a number": {"normalizer": 2.5},
    "over an integer": {"normalizer": 7},
    "over nothing": {"normalizer": 0},
    "over a tensor": {"normalizer": torch.tensor(3.0)},
    "over a tensor of integers": {"normalizer": torch.tensor(3)},
}


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("options", BCE_OPTIONS)
def test_compiled_weights_and_normalizers(options: str, positive: bool) -> None:
    given, name = dict(BCE_OPTIONS[options]), "binary_cross_entropy"
    if positive:
        name = "binary_cross_entropy_with_logits"
        given["pos_weight"] = torch.linspace(0, 3, 5) if "class_dim" in given else torch.linspace(0, 3, 5)[:, None]
    x, t = operands(name, (4, 5, 5))
    loss = partial(LOSSES[name], target=t, **given)
    if "normalizer" in given:
        assert_compiles_to_the_same(loss, [x], ELEMENTS)
    else:
        assert_compiles_to_the_same(of_every_reduction(loss), [x] * 3, ELEMENTS, 3)


@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.bool])
def test_compiled_labels_of_integer_types(kind: torch.dtype) -> None:
    for name in ("binary_cross_entropy", "binary_cross_entropy_with_logits"):
        x, t = operands(name, (9, 65))
        assert_compiles_to_the_same(partial(LOSSES[name], target=t.round().to(kind)), [x], ELEMENTS)


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "batchmean", "rowmean"])
def test_a_compiled_divergence_of_a_broadcast_target(reduction: str) -> None:
    x, t = operands("kl_div", (6, 9))
    for target in (t, t[:1], t[0], t[:, :1]):
        assert_compiles_to_the_same(partial(LF.kl_div, target=target, reduction=reduction), [x], ELEMENTS)


@pytest.mark.filterwarnings("error")
def test_a_compiled_divergence_does_not_warn_and_so_is_one_graph() -> None:
    x, t = operands("kl_div", (6, 9))
    for target, reduction, said in ((t, "mean", "batchmean"), (t[:1], "sum", "differ and are broadcast")):
        loss = partial(LF.kl_div, reduction=reduction)
        with pytest.warns(UserWarning, match=said) as caught:
            want = loss(x, target)
        assert caught[0].filename == __file__  # the caller's line
        for dynamic in (False, True):
            assert_same(Graphs().compile(loss, dynamic=dynamic)(x, target), want)


@elementwise
def test_compiled_half_precision_under_autocast_answers_in_float32(name: str) -> None:
    x, t = operands(name, (6, 65), torch.bfloat16)

    def loss(x: Tensor, reduction: str) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return LOSSES[name](x, t, reduction=reduction)

    for reduction in REDUCTIONS:
        assert_compiles_to_the_same(partial(loss, reduction=reduction), [x], ELEMENTS)
    assert loss(x, "none").dtype == torch.float32


def test_a_compiled_sum_beyond_the_dtype_is_infinite() -> None:
    for dtype, large in ((torch.float16, 6e4), (torch.float32, 3e38)):
        x = torch.full((3,), large, dtype=dtype)
        loss = partial(LF.binary_cross_entropy_with_logits, target=torch.zeros(3), reduction="sum")
        assert_compiles_to_the_same(lambda x: loss(x).to(dtype), [x], ELEMENTS)  # noqa: B023


SHAPES: list[tuple[tuple[int, ...], tuple[int, ...], int]] = [
    ((6, 9), (6, 9), 1),
    ((6, 9), (6, 9), 0),
    ((6, 1, 9), (1, 4, 9), -1),
    ((9,), (6, 9), 1),
    ((6, 9), (6, 1), 0),
    ((2, 5, 9), (5, 1), 1),
    ((9,), (9,), 0),
    ((3, 49157), (3, 49157), 1),
    ((1000, 7), (1000, 7), 1),
    ((1, 1), (1, 1), 0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape1", "shape2", "dim"), SHAPES)
def test_compiled_similarities_are_the_kernels(
    dtype: torch.dtype, shape1: tuple[int, ...], shape2: tuple[int, ...], dim: int
) -> None:
    a, b = vectors(shape1, shape2, dtype=dtype)
    assert_compiles_to_the_same(lambda a, b: LF.cosine_similarity(a, b, dim), [a, b], COSINES)
    assert_compiles_to_the_same(lambda a: LF.cosine_similarity(a, b, dim, eps=1.5), [a], COSINES)
    assert_compiles_to_the_same(lambda b: LF.cosine_similarity(a, b, dim).sum(), [b], COSINES)


def test_compiled_similarities_of_any_strides_dtypes_and_of_one_tensor() -> None:
    for arrange in ARRANGEMENTS.values():
        a, b = vectors((3, 5, 4, 7), (3, 5, 4, 7))
        assert_compiles_to_the_same(LF.cosine_similarity, [arrange(a), b], COSINES)
        assert_compiles_to_the_same(partial(LF.cosine_similarity, dim=-1), [arrange(a), arrange(b)], COSINES)
    a, b = vectors((6, 9), (6, 9))
    assert_compiles_to_the_same(lambda a: LF.cosine_similarity(a, a + b), [a], COSINES)
    assert_compiles_to_the_same(lambda a: LF.cosine_similarity(a, a), [a], COSINES)
    assert_compiles_to_the_same(LF.cosine_similarity, [a.double(), b], COSINES)
    assert_compiles_to_the_same(LF.cosine_similarity, [a.half(), b.bfloat16()], COSINES)
    assert_compiles_to_the_same(lambda a: LF.cosine_similarity(a, b.long()), [a], COSINES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shapes", [((6, 65), (6, 65), (6,)), ((1, 65), (6, 65), (6,)), ((1, 7), (1, 7), (6,)), ((7,), (7,), ())]
)
def test_compiled_embedding_losses_are_the_kernels(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]) -> None:
    a, b = vectors(*shapes[:2], dtype=dtype)
    target = torch.tensor([1, -1, 1, -1, 0, -1])[: math.prod(shapes[2])].reshape(shapes[2])
    loss = partial(LF.cosine_embedding_loss, target=target, margin=0.1)
    for reduction in REDUCTIONS:
        assert_compiles_to_the_same(partial(loss, reduction=reduction), [a, b], COSINES)
    assert_compiles_to_the_same(of_every_reduction(partial(loss, b)), [a] * 3, COSINES, 3)


@pytest.mark.parametrize("pairs", [1, 7, 65, 1000, 49157])
def test_compiled_embedding_losses_of_many_pairs(pairs: int) -> None:
    a, b = vectors((pairs, 3), (pairs, 3))
    target = 2 * torch.randint(0, 2, (pairs,)) - 1
    for reduction in ("mean", "sum"):
        loss = partial(LF.cosine_embedding_loss, target=target, reduction=reduction)
        assert_compiles_to_the_same(loss, [a, b], COSINES)


def test_one_compiled_graph_serves_any_number_of_elements() -> None:
    graphs = Graphs()
    for loss in (*LOSSES.values(), partial(LF.kl_div, reduction="batchmean"), partial(LF.kl_div, reduction="rowmean")):
        compiled = graphs.compile(loss, dynamic=True)
        for shape in ((3, 10), (7, 65), (65, 1000)):
            x, t = torch.rand(shape).requires_grad_(), torch.rand(shape)
            got, want = compiled(x, t), loss(x, t)
            assert_same(got, want)
            upstream = torch.randn(())
            assert_same(*(torch.autograd.grad(out, x, upstream)[0] for out in (got, want)))
    assert graphs.kernels == [[name] for _ in range(6) for name in ELEMENTS]


def test_one_compiled_graph_serves_any_number_of_pairs() -> None:
    graphs = Graphs()
    similarity = graphs.compile(LF.cosine_similarity, dynamic=True)
    loss = graphs.compile(LF.cosine_embedding_loss, dynamic=True)
    for pairs, size in ((3, 10), (7, 65), (65, 1000)):
        a, b = leaves(vectors((pairs, size), (pairs, size)))
        target = 2 * torch.randint(0, 2, (pairs,)) - 1
        for got, want in (
            (similarity(a, b), LF.cosine_similarity(a, b)),
            (loss(a, b, target), LF.cosine_embedding_loss(a, b, target)),
        ):
            assert_same(got, want)
            upstream = torch.randn_like(want)
            grads = [torch.autograd.grad(out, (a, b), upstream) for out in (got, want)]
            for ours, theirs in zip(*grads, strict=True):
                assert_same(ours, theirs)
    assert sorted(graphs.kernels) == [["cosine"], ["cosine"], ["cosine_grad"], ["cosine_grad"]]


# --- with inductor, which fuses what surrounds the kernels and plans the memory of what they read and write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_gives_the_same_elements(dtype: torch.dtype) -> None:
    given = {name: operands(name, (7, 65), dtype) for name in LOSSES}
    losses = [of_every_reduction(partial(LOSSES[name], target=t)) for name, (_, t) in given.items()]

    def all_of_them(*inputs: Tensor) -> Tensor:
        return torch.cat([loss(*inputs[3 * i : 3 * i + 3]) for i, loss in enumerate(losses)])

    args = [x for x, _ in given.values() for _ in REDUCTIONS]
    assert_compiles_to_the_same(all_of_them, args, ELEMENTS, compiler=partial(torch.compile, fullgraph=True))


def test_inductor_gives_the_same_cosines() -> None:
    a, b = vectors((7, 65), (7, 65))
    target = torch.tensor([1, -1, 1, -1, 1, 0, -1])
    loss = of_every_reduction(lambda a, reduction: LF.cosine_embedding_loss(a, b, target, reduction=reduction))

    def all_of_them(*inputs: Tensor) -> Tensor:
        similarities = LF.cosine_similarity(*inputs[:2]), LF.cosine_similarity(*inputs[2:4])
        return torch.cat([*similarities, loss(*inputs[4:])])

    args = [a, b, transposed(a), b[0], a, a, a]
    assert_compiles_to_the_same(all_of_them, args, COSINES, compiler=partial(torch.compile, fullgraph=True))


def test_a_compiled_training_step_with_all_of_them() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 5)
            self.labels = LN.BCEWithLogitsLoss(pos_weight=torch.linspace(1, 3, 5))
            self.embedding = LN.CosineEmbeddingLoss(margin=0.2)

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            features = self.body(x).tanh().to(memory_format=torch.channels_last)
            logits = self.head(features.mean((2, 3)))
            loss: Tensor = self.labels(logits, target)
            loss = loss + 0.5 * self.embedding(logits, logits.roll(1, 0) + target, target[:, 0] * 2 - 1)
            loss = loss + LF.kl_div(logits.log_softmax(-1), target.softmax(-1), reduction="batchmean")
            return loss + 0.1 * LF.binary_cross_entropy(features.sigmoid(), features > 0)

    model = Model()
    x, target = torch.randn(7, 3, 6, 6), torch.randint(0, 2, (7, 5)).float()
    model(x, target).backward()
    eager = {name: parameter.grad for name, parameter in model.named_parameters()}
    compiled = torch.compile(model, fullgraph=True)
    assert ll.explain(compiled, x, target).backend == "cpu"
    for _ in range(2):
        model.zero_grad()
        compiled(x, target).backward()
        torch.testing.assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, eager)


# --- what a graph checks, and what it does not hold


@reductions
def test_a_compiled_graph_checks_its_probabilities_when_it_runs(reduction: str) -> None:
    graphs = Graphs()
    x, t = operands("binary_cross_entropy", (4, 3))
    compiled = graphs.compile(partial(LF.binary_cross_entropy, reduction=reduction))
    compiled(x, t)
    assert graphs.kernels == [["elementwise"]]
    for which, value, said in ((0, math.nan, "NaN"), (0, -0.5, "-0.5"), (1, 1.5, "1.5")):
        given = [x.clone(), t.clone()]
        given[which][2, 1] = value
        message = (
            f"{('input', 'target')[which]} should be between 0 and 1; {('input', 'target')[which]}[2, 1] is {said}"
        )
        with pytest.raises(RuntimeError, match=re.escape(message)):
            compiled(*given)


def test_a_compiled_graph_is_plain_where_the_kernels_have_no_derivative() -> None:
    x, t = operands("kl_div", (4, 3))
    asks, labels = t.clone().requires_grad_(), LF.binary_cross_entropy_with_logits
    calls: list[tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]] = [
        ("target requires a gradient", partial(LF.kl_div, reduction="sum"), (x, asks)),
        ("the input is broadcast", partial(LF.kl_div, reduction="sum"), (x[:1], t)),
        ("weight requires a gradient", labels, (x, t, asks)),
        ("there is nothing to compute", labels, (x[:0], t[:0])),
        ("no kernel reads target in torch.uint16", labels, (x, torch.ones(4, 3, dtype=torch.uint16))),
        ("there are no vectors, or none with elements", LF.cosine_similarity, (x[:0], t[:0])),
    ]
    for reason, call, args in calls:
        got, want = plain_graph(call, *args), call(*args)
        torch.testing.assert_close(got, want, equal_nan=True)
        compiled = torch.compile(call, backend="eager") if call is not labels else torch.compile(labels)
        assert ll.explain(compiled, *args) == ("reference", reason)
        refused = torch.compile(partial(call, backend="cpu"), backend="eager", fullgraph=True)
        with pytest.raises(Unsupported, match=f"which cannot serve this call: {reason}"):
            refused(*args)


def test_function_transforms_inside_a_graph_are_plain() -> None:
    x, t = operands("kl_div", (4, 3))
    for loss in (
        partial(LF.binary_cross_entropy_with_logits, target=t[0]),
        partial(LF.kl_div, target=t[0]),
        lambda z: LF.cosine_similarity(z, t[0], 0),
    ):
        per_sample = vmap(grad(loss))
        torch.testing.assert_close(plain_graph(per_sample, x), per_sample(x))

        def directional(z: Tensor) -> Tensor:
            return torch.func.jvp(loss, (z,), (t[1],))[1]  # noqa: B023

        torch.testing.assert_close(plain_graph(directional, x[0]), directional(x[0]))


def test_an_exported_program_needs_no_logitless() -> None:
    x, t = operands("kl_div", (4, 3))
    for module, args in (
        (LN.BCEWithLogitsLoss(), (x, t)),
        (LN.KLDivLoss(reduction="batchmean"), (x, t)),
        (LN.CosineSimilarity(), (x, t)),
        (LN.CosineEmbeddingLoss(), (x, t, torch.ones(4))),
    ):
        program = torch.export.export(module, args)
        assert "logitless" not in program.graph_module.code
        torch.testing.assert_close(program.module()(*args), module(*args))


# --- backends by name, and explain


PUBLIC: dict[str, tuple[Callable[..., Tensor], str]] = {
    **{name: (LOSSES[name], "elementwise") for name in LOSSES},
    "cosine_similarity": (LF.cosine_similarity, "cosine"),
    "cosine_embedding_loss": (lambda a, b, **kw: LF.cosine_embedding_loss(a, b, torch.ones(4), **kw), "cosine"),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_backend_names_and_explain_hold_in_a_compiled_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (call, kernel), args = PUBLIC[name], operands(name, (4, 3))
    graphs = Graphs()
    graphs.compile(partial(call, backend="cpu"))(*args)
    assert graphs.kernels == [[kernel]]
    plain_graph(partial(call, backend="reference"), *args)
    compiled = torch.compile(call, backend="eager")
    assert ll.explain(compiled, *args) == ll.explain(call, *args) == ("cpu", "the tensors are on the CPU")
    for backend, kernels in (("cpu", [kernel]), ("reference", [])):
        monkeypatch.setenv("LOGITLESS_BACKEND", backend)
        torch._dynamo.reset()
        graphs = Graphs()
        graphs.compile(call)(*args)
        assert graphs.kernels == [kernels]
        assert ll.explain(compiled, *args) == (backend, ll.explain(call, *args).reason)
