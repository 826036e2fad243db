"""The measures of logits that are not built, in compiled graphs: operators that hold none and give eager's bits."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import logitless as ll
import logitless.functional as LF
from graphs import Graphs, plain_graph
from oracles import leaves

pytest.importorskip("logitless._native", reason="built without the extension (LOGITLESS_NO_NATIVE)")
from logitless._operators.head_measures import Measures, Source
from logitless.kernels import interface
from logitless.kernels.interface import ClassTarget, Divergence
from logitless.losses.head_measures import rows_of
from logitless.losses.measures import PairStats, TokenStats

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # on importing inductor
WIDTH, CLASSES = 8, 1000


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOGITLESS_BACKEND", raising=False)
    torch._dynamo.reset()


def head_of(rows: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Hidden states, weight, bias and scale, all of which ask for a gradient."""
    made = (torch.randn(rows, WIDTH), torch.randn(CLASSES, WIDTH), torch.randn(CLASSES), torch.tensor(1.25))
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def lazy(hidden: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> ll.LazyLogits:
    return ll.linear(hidden, weight, bias, scale=scale, softcap=5.0)


def classes_of(rows: int, ignored: bool = True) -> Tensor:
    target = torch.randint(0, CLASSES, (rows,))
    if ignored and rows > 1:
        target[rows // 2] = -100
    return target


def same_bits(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for mine, wanted in zip(got, want, strict=True):
        assert mine.dtype == wanted.dtype
        assert torch.equal(mine, wanted)


def mixed(values: Sequence[Tensor | None]) -> Tensor:
    """All of them, each with another factor, so that each has an upstream gradient of its own."""
    return torch.stack([(at + 1) * value.double() for at, value in enumerate(values) if value is not None])


def token_stats(rows: int) -> Callable[..., Tensor]:
    target = classes_of(rows)
    return lambda *head: mixed(ll.token_stats(lazy(*head), target))


def pair_stats(rows: int) -> Callable[..., Tensor]:
    target = classes_of(rows, ignored=False)
    return lambda *heads: mixed(ll.pair_stats(lazy(*heads[:4]), lazy(*heads[4:]), target))


def one_head(measure: Callable[..., Tensor]) -> Callable[[int], Callable[..., Tensor]]:
    return lambda rows: lambda *head: measure(lazy(*head))


def two_heads(measure: Callable[..., Tensor]) -> Callable[[int], Callable[..., Tensor]]:
    return lambda rows: lambda *heads: measure(lazy(*heads[:4]), lazy(*heads[4:]))


# Of so many rows a function of so many heads; "dense": the last argument is logits that are built.
MEASURES: dict[str, tuple[Callable[[int], Callable[..., Tensor]], int, bool]] = {
    "token_stats": (token_stats, 1, False),
    "entropy": (one_head(ll.entropy), 1, False),
    "kl": (two_heads(ll.kl), 2, False),
    "js": (two_heads(ll.js), 2, False),
    "js of another weight": (two_heads(lambda p, q: ll.js(p, q, beta=0.9)), 2, False),
    "skewed kl": (two_heads(lambda p, q: ll.kl(p, q, skew=0.1)), 2, False),
    "tv": (two_heads(ll.tv), 2, False),
    "pair_stats": (pair_stats, 2, False),
    "pair_stats without a target": (two_heads(lambda p, q: mixed(ll.pair_stats(p, q))), 2, False),
    "dense teacher": (lambda rows: lambda *args: ll.kl(args[4], lazy(*args[:4])), 1, True),
    "dense student": (lambda rows: lambda *args: ll.js(lazy(*args[:4]), args[4]), 1, True),
}


def problem(name: str, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Callable[..., Tensor], list[Tensor]]:
    make, heads, dense = MEASURES[name]
    args = [part for _ in range(heads) for part in head_of(rows, dtype)]
    if dense:
        args.append((3 * torch.randn(rows, CLASSES)).to(dtype).requires_grad_())
    return make(rows), args


# --- as torch asks


def source(logits: Tensor | ll.LazyLogits) -> Source:
    return Source(rows_of(logits), logits.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["token_stats", "entropy", "kl", "skewed kl", "pair_stats", "dense"])
def test_operators_pass_opcheck(name: str, dtype: torch.dtype) -> None:
    p, q = (lazy(*head_of(7, dtype)) for _ in range(2))
    target = ClassTarget(1, CLASSES, -100, classes_of(7, ignored=name == "token_stats"))
    told = {
        "token_stats": lambda: Measures.of("f", TokenStats._fields, source(p), target=target),
        "entropy": lambda: Measures.of("f", ["entropy"], source(p)),
        "kl": lambda: Measures.of("f", ["kl"], source(p), source(q)),
        "skewed kl": lambda: Measures.of(
            "f", ["divergence"], source(p), source(q), divergence=Divergence("skewed_kl", 0.1)
        ),
        "pair_stats": lambda: Measures.of("f", PairStats._fields, source(p), source(q), target),
        "dense": lambda: Measures.of("f", ["js"], source(torch.randn(7, CLASSES).to(dtype)), source(q)),
    }[name]()
    still = Measures._make(value.detach() if isinstance(value, Tensor) else value for value in told)
    asking = [None if part is None else part.clone().requires_grad_() for part in still.parts]
    torch.library.opcheck(torch.ops.logitless.head_measures, (*asking, *still[len(asking) :], True))
    *values, saved = torch.ops.logitless.head_measures(*still, True)
    upstream = [torch.randn_like(v) if v.numel() and v.dtype == still.compute else None for v in values]
    present = [part is not None for part in still.parts]
    for needed in (present, [*present[:7], False], [*[False] * 4, *present[4:]] if any(present[4:]) else present):
        torch.library.opcheck(torch.ops.logitless.head_measures_grad, (*still, saved, *upstream, *needed))


def test_an_operator_refuses_gradients_that_it_was_not_asked_for() -> None:
    told = Measures.of("f", ["entropy"], source(lazy(*head_of(7))))
    with pytest.raises(NotImplementedError, match="the parts of a head that it was asked for"):
        torch.ops.logitless.head_measures(*told, False)


def test_vmap_goes_through_the_batch() -> None:
    told = Measures.of("f", ["kl"], *(source(lazy(*(part.detach() for part in head_of(7)))) for _ in range(2)))
    batch = torch.stack([told.p_logits, -told.p_logits], 1)
    got = vmap(lambda hidden: torch.ops.logitless.head_measures(hidden, *told[1:], True)[0], in_dims=1)(batch)
    for i, hidden in enumerate(batch.unbind(1)):
        same_bits([got[i]], torch.ops.logitless.head_measures(hidden, *told[1:], True)[:1])


# --- compiled calls are eager's, to the bit


def assert_compiles_to_eager(function: Callable[..., Tensor], args: Sequence[Tensor], backend: str) -> None:
    own, eager = ([t.detach().requires_grad_(t.requires_grad) for t in args] for _ in range(2))
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    assert ll.explain(compiled, *own).backend == "cpu"
    got, want = compiled(*own), function(*eager)
    same_bits([got], [want])
    wrt = [at for at, tensor in enumerate(args) if tensor.requires_grad]
    upstream = 3 * torch.randn_like(want)
    same_bits(
        torch.autograd.grad(got, [own[at] for at in wrt], upstream),
        torch.autograd.grad(want, [eager[at] for at in wrt], upstream),
    )


@pytest.mark.parametrize("name", list(MEASURES))
def test_compiled_is_eager(name: str) -> None:
    for rows in (1, 7, 65):
        torch._dynamo.reset()
        assert_compiles_to_eager(*problem(name, rows), "aot_eager")


@pytest.mark.parametrize("name", list(MEASURES))
def test_compiled_is_eager_in_several_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "DEFAULT_MAX_BYTES", 40 * CLASSES * 4)
    for dtype in (torch.float64, torch.bfloat16):
        torch._dynamo.reset()
        assert_compiles_to_eager(*problem(name, 65, dtype), "aot_eager")


@pytest.mark.parametrize("frozen", [(0,), (1, 2, 3), (0, 1, 2, 3), (4, 5), (0, 1, 2, 4, 6, 7)])
def test_frozen_parts_have_no_gradient(frozen: tuple[int, ...]) -> None:
    function, args = problem("pair_stats", 7)
    assert_compiles_to_eager(
        function, [part.detach().requires_grad_(at not in frozen) for at, part in enumerate(args)], "aot_eager"
    )


def test_leading_dimensions() -> None:
    target = torch.randint(0, CLASSES, (3, 5))
    target[1, 2] = -100

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = ll.linear(hidden, weight).float()
        return mixed(ll.token_stats(logits, target)) + ll.entropy(logits)

    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()
        args = [torch.randn(3, 5, WIDTH).to(dtype).requires_grad_(), head_of(1, dtype)[1]]
        assert_compiles_to_eager(function, args, "aot_eager")


@pytest.mark.parametrize("name", ["token_stats", "kl"])
def test_inductor(name: str) -> None:
    function, args = problem(name, 65)
    own, eager = leaves(args), leaves(args)
    got, want = torch.compile(function, fullgraph=True)(*own), function(*eager)
    same_bits([got], [want])
    upstream = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, own, upstream), torch.autograd.grad(want, eager, upstream))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("measure", "heads"), [(ll.entropy, 1), (ll.kl, 2), (ll.js, 2)])
def test_a_reduced_measure_is_eagers_to_rounding(measure: Callable[..., Tensor], heads: int, reduction: str) -> None:
    """In a graph it is the reduction of the rows, whose gradients are divided before they add up, not after."""

    def function(*parts: Tensor) -> Tensor:
        return measure(*(lazy(*parts[at : at + 4]) for at in range(0, 4 * heads, 4)), reduction=reduction)

    args = [part for _ in range(heads) for part in head_of(65, torch.float64)]
    own, eager = leaves(args), leaves(args)
    got, want = torch.compile(function, backend="aot_eager", fullgraph=True)(*own), function(*eager)
    same_bits([got], [want])
    upstream = torch.tensor(-2.5, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(got, own, upstream), torch.autograd.grad(want, eager, upstream), rtol=1e-11, atol=1e-13
    )


# --- what a compiled graph holds


@pytest.mark.parametrize("name", list(MEASURES))
def test_a_compiled_graph_holds_the_operators(name: str) -> None:
    function, args = problem(name, 7)
    graphs = Graphs()
    out = graphs.compile(function)(*args)
    torch.autograd.grad(out, args, torch.randn_like(out))
    assert graphs.kernels == [["head_measures"], ["head_measures_grad"]]
    assert not any("mm" in operator or "softmax" in operator for graph in graphs.operators for operator in graph)


def test_one_compiled_graph_serves_any_number_of_rows() -> None:
    graphs = Graphs()
    compiled = graphs.compile(lambda h, w, t: ll.token_stats(ll.linear(h, w), t).nll, dynamic=True)
    for rows in (3, 7, 65):
        hidden, weight, *_ = (part.detach() for part in head_of(rows))
        target = classes_of(rows)
        same_bits([compiled(hidden, weight, target)], [ll.token_stats(ll.linear(hidden, weight), target).nll])
    assert graphs.kernels == [["head_measures"]]


def test_a_compiled_graph_checks_its_targets_when_it_runs() -> None:
    hidden, weight, *_ = (part.detach() for part in head_of(7))
    target = classes_of(7, ignored=False)
    target[5] = CLASSES
    calls: dict[str, Callable[..., Any]] = {
        "token_stats": lambda h: ll.token_stats(ll.linear(h, weight), target).nll,
        "pair_stats": lambda h: ll.pair_stats(ll.linear(h, weight), ll.linear(h, weight), target).nll_p,
    }
    for name, call in calls.items():
        with pytest.raises(IndexError, match=f"{name}: Target 1000 is out of bounds at position 5"):
            torch.compile(call, backend="aot_eager", fullgraph=True)(hidden)


@pytest.mark.parametrize("name", ["token_stats", "pair_stats", "dense teacher"])
def test_second_derivatives_are_the_references(name: str) -> None:
    """Of a graph whose backward pass torch runs itself: one that aot_autograd compiles has none."""
    function, args = problem(name, 7, torch.float64)

    def twice(measure: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        own = leaves(args)
        out = measure(*own)
        first = torch.autograd.grad(out, own, torch.ones_like(out), create_graph=True)
        norm = torch.stack([gradient.square().sum() for gradient in first]).sum()
        return torch.autograd.grad(norm, own)

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(twice(compiled), twice(function), rtol=1e-9, atol=1e-9)


def test_explain_and_backend_names_hold_in_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MEASURES:
        function, args = problem(name, 7)
        eager, choice = (ll.explain(call, *args) for call in (function, torch.compile(function, backend="eager")))
        assert choice == eager
        assert choice.backend == "cpu"
        assert (choice.tile, choice.peak_bytes) == (eager.tile, eager.peak_bytes)
    monkeypatch.setenv("LOGITLESS_BACKEND", "reference")
    torch._dynamo.reset()
    function, args = problem("token_stats", 7)
    torch.testing.assert_close(plain_graph(function, *args), function(*args))


def test_binary_cross_entropy_of_lazy_logits_is_plain() -> None:
    hidden, weight, *_ = head_of(7)
    labels = (torch.randn(7, CLASSES) > 1).float()

    def loss(h: Tensor) -> Tensor:
        return LF.binary_cross_entropy_with_logits(ll.linear(h, weight), labels)

    torch.testing.assert_close(plain_graph(loss, hidden), loss(hidden))
    choice = ll.explain(torch.compile(loss, backend="eager"), hidden)
    assert choice == ("reference", "torch.compile traces plain operations")
