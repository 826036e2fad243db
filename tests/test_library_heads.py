"""Cross-entropy of logits that are not built, in compiled graphs: operators that hold none and give eager's bits."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
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
from logitless._operators import heads as operators
from logitless._rules import dispatch
from logitless.kernels import cpu

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # on importing inductor
WIDTH, CLASSES = 8, 1000


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOGITLESS_BACKEND", raising=False)
    torch._dynamo.reset()


def head_of(rows: int, classes: int = CLASSES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Hidden states, weight, bias and scale, all of which ask for a gradient."""
    made = (torch.randn(rows, WIDTH), torch.randn(classes, WIDTH), torch.randn(classes), torch.tensor(1.25))
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def classes_of(rows: int, classes: int = CLASSES, ignored: bool = True) -> Tensor:
    target = torch.randint(0, classes, (rows,))
    if ignored and rows > 1:
        target[rows // 2] = -100
    return target


def same_bits(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> None:
    for mine, wanted in zip(got, want, strict=True):
        assert (mine is None) == (wanted is None)
        if mine is not None and wanted is not None:
            assert mine.dtype == wanted.dtype
            assert torch.equal(mine, wanted)


# --- as torch asks


def operator_arguments(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Arguments of both operators that describe the head and the target."""
    hidden, weight, bias, scale = (tensor.detach() for tensor in head_of(7, 65, dtype))
    class_weight, target = torch.linspace(0, 2, 65), classes_of(7, 65)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    soft = torch.rand(7, 65)
    return {
        "indices": (hidden, weight, None, None, 1.0, None, target, None, None, -100, 0.0, compute, None, "f"),
        "everything": (hidden, weight, bias, scale, 1.0, 3.0, target, None, class_weight, -100, 0.1, compute, 900, "f"),
        "probabilities": (
            hidden,
            weight,
            bias,
            None,
            0.5,
            None,
            None,
            soft,
            class_weight,
            -100,
            0.1,
            compute,
            900,
            "f",
        ),
        "turned": (
            hidden.T.contiguous().T,
            weight.T.contiguous().T,
            *(None, None, 1.0, None, target, None, None, -100, 0.0, compute, None, "f"),
        ),
        "no row": (hidden[:0], weight, bias, scale, 1.0, None, target[:0], None, None, -100, 0.0, compute, None, "f"),
        "all ignored": (
            *(hidden, weight, bias, None, 1.0, None, torch.full((7,), -100), None, None, -100, 0.0, compute, None, "f"),
        ),
    }[kind]


KINDS = ("indices", "everything", "probabilities", "turned", "no row", "all ignored")


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in KINDS), ("everything", torch.bfloat16)]
)
def test_operators_pass_opcheck(kind: str, dtype: torch.dtype) -> None:
    args = operator_arguments(kind, dtype)
    parts = args[:4]
    for needed in ([part is not None for part in parts], [True, False, False, False]):
        asking = tuple(
            part if part is None else part.clone().requires_grad_(need)
            for part, need in zip(parts, needed, strict=True)
        )
        reduced = (*asking, *args[4:], None, 3.0, None, "mean", "nan", torch.float32, *needed)
        torch.library.opcheck(torch.ops.logitless.head_loss, reduced)
        torch.library.opcheck(torch.ops.logitless.head_rows, (*asking, *args[4:], True))
        losses, _, *saved = torch.ops.logitless.head_rows(*args, True)
        torch.library.opcheck(torch.ops.logitless.head_rows_grad, (*args, *saved, torch.randn_like(losses), *needed))
    torch.library.opcheck(
        torch.ops.logitless.head_loss,
        (*args, "rows", None, None, "mean", "zero", torch.float64, *[False] * 4),
    )


def test_operators_refuse_gradients_that_they_do_not_have() -> None:
    hidden, *others = operator_arguments("indices")
    weighted = list(operator_arguments("everything"))
    weighted[8] = weighted[8].requires_grad_()
    how = (None, None, None, "sum", "nan", torch.float32)
    for args in ((hidden.requires_grad_(), *others, *how, *[False] * 4), (*weighted, *how, *[True] * 4)):
        with pytest.raises(NotImplementedError, match="the parts of a head that it was asked for"):
            torch.ops.logitless.head_loss(*args)
    with pytest.raises(NotImplementedError, match="the parts of a head that it was asked for"):
        torch.ops.logitless.head_rows(hidden, *others, False)


def test_vmap_goes_through_the_batch() -> None:
    args = operator_arguments("everything")
    batch = torch.stack([args[0], -args[0]], 1)
    how = (None, None, None, "mean", "nan", torch.float32, *[True] * 4)
    got = vmap(lambda hidden: torch.ops.logitless.head_loss(hidden, *args[1:], *how), in_dims=1)(batch)
    for i, hidden in enumerate(batch.unbind(1)):
        same_bits([value[i] for value in got], torch.ops.logitless.head_loss(hidden, *args[1:], *how))


def test_a_batch_of_upstream_gradients_goes_through_one_graph() -> None:
    for reduction in ("sum", "none"):
        own = leaves(operator_arguments("indices")[:2])
        target = classes_of(7, 65)
        compiled = torch.compile(LF.linear_cross_entropy, backend="eager", fullgraph=True)
        out = compiled(*own, target, reduction=reduction)
        upstream = torch.randn(3, *out.shape)
        batched = torch.autograd.grad(out, own, upstream, is_grads_batched=True, retain_graph=True)
        for i, one in enumerate(upstream):
            same_bits([grads[i] for grads in batched], torch.autograd.grad(out, own, one, retain_graph=True))


# --- compiled calls are eager's, to the bit


def assert_compiles_to_eager(
    function: Callable[..., Tensor], args: Sequence[Tensor], backend: str = "aot_eager", **options: Any
) -> None:
    """Values and gradients, under random upstream gradients and under one that is not a number."""
    own, eager = [[t.detach().requires_grad_(t.requires_grad) for t in args] for _ in range(2)]
    compiled = torch.compile(function, backend=backend, fullgraph=True, **options)
    assert ll.explain(compiled, *own).backend == "cpu"
    got, want = compiled(*own), function(*eager)
    same_bits([got], [want])
    wrt = [at for at, tensor in enumerate(args) if tensor.requires_grad]
    if not wrt:
        assert not got.requires_grad
        return
    upstream = 3 * torch.randn_like(want)
    same_bits(
        torch.autograd.grad(got, [own[at] for at in wrt], upstream),
        torch.autograd.grad(want, [eager[at] for at in wrt], upstream),
    )


def loss_of(target: Tensor, **options: Any) -> Callable[..., Tensor]:
    """Cross-entropy of a head with everything in it: bias, scale; softcap among the options."""

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        return LF.linear_cross_entropy(hidden, weight, target, linear_bias=bias, scale=scale, **options)

    return loss


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": {"weight": torch.linspace(0, 2, CLASSES)},
    "smoothed": {"label_smoothing": 0.1},
    "weighted, smoothed, softcap": {"weight": torch.linspace(0, 2, CLASSES), "label_smoothing": 0.3, "softcap": 5.0},
    "tiles of a few rows": {"max_bytes": 70 * 2 * CLASSES * 4},
    "tiles of a few classes": {"max_bytes": 40_000, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_compiled_is_eager(name: str, reduction: str, kind: str) -> None:
    for rows in (1, 7, 150):
        torch._dynamo.reset()
        target = classes_of(rows) if kind == "indices" else torch.rand(rows, CLASSES).softmax(1)
        assert_compiles_to_eager(loss_of(target, reduction=reduction, **OPTIONS[name]), head_of(rows))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_compiled_is_eager_in_other_dtypes(dtype: torch.dtype, reduction: str) -> None:
    target, weight = classes_of(65), torch.linspace(0, 2, CLASSES, dtype=dtype)
    for options in ({}, {"weight": weight}, {"max_bytes": 20_000}):
        torch._dynamo.reset()
        assert_compiles_to_eager(loss_of(target, reduction=reduction, **options), head_of(65, dtype=dtype))
        torch._dynamo.reset()

        def plain(hidden: Tensor, weight: Tensor, options: dict[str, Any] = options) -> Tensor:
            return LF.linear_cross_entropy(hidden, weight, target, reduction=reduction, **options)

        assert_compiles_to_eager(plain, head_of(65, dtype=dtype)[:2])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 2), (1, 2, 3), (0, 1, 2), (0, 1, 2, 3)])
def test_frozen_parts_have_no_gradient(frozen: tuple[int, ...], reduction: str) -> None:
    args = [part.detach().requires_grad_(at not in frozen) for at, part in enumerate(head_of(7))]
    assert_compiles_to_eager(loss_of(classes_of(7), reduction=reduction), args)


NORMALIZERS: dict[str, dict[str, Any]] = {
    "rows": {"normalizer": "rows"},
    "weights": {"normalizer": "weights"},
    "number": {"normalizer": 3},
    "tensor": {"normalizer": torch.tensor(2.5)},
    "zero when empty": {"empty": "zero"},
}


@pytest.mark.parametrize("kind", ["indices", "probabilities", "all ignored", "no rows"])
@pytest.mark.parametrize("name", list(NORMALIZERS))
def test_every_divisor(name: str, kind: str) -> None:
    rows = 0 if kind == "no rows" else 7
    target = torch.rand(rows, CLASSES) if kind == "probabilities" else classes_of(rows)
    if kind == "all ignored":
        target.fill_(-100)
    function = loss_of(target, weight=torch.linspace(0, 2, CLASSES), **NORMALIZERS[name])
    own = head_of(rows)
    eager = leaves(own)
    got, want = torch.compile(function, backend="aot_eager", fullgraph=True)(*own), function(*eager)
    grads, wanted = (
        torch.autograd.grad(got, own, torch.tensor(-1.5)),
        torch.autograd.grad(want, eager, torch.tensor(-1.5)),
    )
    for mine, other in zip((got, *grads), (want, *wanted), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def test_an_ignored_row_has_no_gradient_under_any_upstream_gradient() -> None:
    own = head_of(7)
    loss = torch.compile(loss_of(classes_of(7)), backend="aot_eager", fullgraph=True)(*own)
    (gradient,) = torch.autograd.grad(loss, own[:1], torch.tensor(torch.inf))
    assert torch.equal(gradient[3], torch.zeros(WIDTH))
    assert not gradient[[0, 1, 2, 4, 5, 6]].isfinite().any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_goes_backward_twice(reduction: str) -> None:
    args, function = head_of(65), loss_of(classes_of(65), reduction=reduction)
    own, eager = leaves(args), leaves(args)
    got, want = torch.compile(function, backend="aot_eager", fullgraph=True)(*own), function(*eager)
    for _ in range(2):
        upstream = torch.randn_like(want)
        same_bits(
            torch.autograd.grad(got, own, upstream, retain_graph=True),
            torch.autograd.grad(want, eager, upstream, retain_graph=True),
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_tensor_as_hidden_states_and_weight(reduction: str) -> None:
    both = torch.randn(WIDTH, 65).T.requires_grad_()
    target = classes_of(65, 65)
    assert_compiles_to_eager(lambda x: LF.linear_cross_entropy(x, x, target, reduction=reduction), [both])


def test_inference_mode() -> None:
    target = classes_of(7)
    with torch.inference_mode():
        hidden, weight, *_ = (part.detach().clone() for part in head_of(7))
        compiled = torch.compile(LF.linear_cross_entropy, backend="aot_eager", fullgraph=True)
        same_bits([compiled(hidden, weight, target)], [LF.linear_cross_entropy(hidden, weight, target)])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction: str) -> None:
    def function(hidden: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(classes, reduction=reduction)(hidden, weight, bias, scale)

    classes = classes_of(65)
    assert_compiles_to_eager(function, head_of(65))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_lazy_logits_in_a_graph(reduction: str) -> None:
    """As model code has them: leading dimensions, a cast, torch's own function, a part of the rows."""
    target = torch.randint(0, CLASSES, (3, 5))
    target[0, 1] = -100

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = ll.linear(hidden, weight)[:, :-1].float() / 2
        return F.cross_entropy(logits.view(-1, CLASSES), target[:, 1:].reshape(-1), reduction=reduction)

    def classes_in_the_middle(hidden: Tensor, weight: Tensor) -> Tensor:
        return LF.cross_entropy(ll.linear(hidden, weight).transpose(1, 2), target, reduction=reduction)

    for dtype in (torch.float32, torch.bfloat16):
        args = [torch.randn(3, 5, WIDTH).to(dtype).requires_grad_(), head_of(1, dtype=dtype)[1]]
        for loss in (function, classes_in_the_middle):
            torch._dynamo.reset()
            assert_compiles_to_eager(loss, args)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inductor(reduction: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()
        assert_compiles_to_eager(loss_of(classes_of(65), reduction=reduction), head_of(65, dtype=dtype), "inductor")


def test_a_compiled_training_step_with_inductor() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = torch.nn.Linear(16, 16), torch.nn.Linear(16, CLASSES)
            self.loss = LN.CrossEntropyLoss(label_smoothing=0.1)

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            hidden = torch.tanh(self.body(x))
            mean: Tensor = self.loss(ll.linear(hidden, self.head.weight, self.head.bias, scale=2.0), target)
            return 3 * mean

    model = Model()
    x, target = torch.randn(65, 16), classes_of(65)
    model(x, target).backward()
    eager = {name: parameter.grad for name, parameter in model.named_parameters()}
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        compiled(x, target).backward()
        torch.testing.assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, eager)


# --- what a compiled graph holds


class Shapes(Graphs):
    """Keeps the shapes of everything that the graphs compute too."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def _keep(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            values = node.meta.get("val")
            for value in values if isinstance(values, (tuple, list)) else [values]:
                if isinstance(value, Tensor):
                    self.shapes.add(tuple(value.shape))
        return super()._keep(graph, inputs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_graph_holds_the_operators_and_no_logits(dtype: torch.dtype, reduction: str) -> None:
    graphs, own = Shapes(), head_of(7, dtype=dtype)
    target = classes_of(7)
    out = graphs.compile(loss_of(target, reduction=reduction))(*own)
    torch.autograd.grad(out, own, torch.randn_like(out))
    assert graphs.kernels == ([["head_rows"], ["head_rows_grad"]] if reduction == "none" else [["head_loss"], []])
    assert {(7, WIDTH), (CLASSES, WIDTH)} <= graphs.shapes
    assert not {(7, CLASSES), (CLASSES, 7), (6, CLASSES), (CLASSES, 6)} & graphs.shapes


def test_one_compiled_graph_serves_any_number_of_rows_and_ignored_rows() -> None:
    graphs = Graphs()
    compiled = graphs.compile(LF.linear_cross_entropy, dynamic=True)
    for rows in (3, 7, 65):
        own = head_of(rows)[:2]
        target, want = classes_of(rows), leaves(own)
        upstream = torch.randn(())
        same_bits(
            torch.autograd.grad(compiled(*own, target), own, upstream),
            torch.autograd.grad(LF.linear_cross_entropy(*want, target), want, upstream),
        )
        target[:-1] = -100
        same_bits([compiled(*own, target)], [LF.linear_cross_entropy(*want, target)])
    assert graphs.kernels == [["head_loss"], []]


def test_a_graph_without_gradients_makes_none() -> None:
    hidden, weight, *_ = head_of(7)
    target = classes_of(7)
    with torch.no_grad():
        graphs = Shapes()
        loss = graphs.compile(LF.linear_cross_entropy)(hidden, weight, target)
    assert graphs.kernels == [["head_loss"]]
    same_bits([loss], [LF.linear_cross_entropy(hidden, weight, target).detach()])
    empty = operators.loss(
        cpu,
        operators.Head(
            hidden.detach(),
            weight.detach(),
            None,
            None,
            1.0,
            None,
            target,
            None,
            None,
            -100,
            0.0,
            torch.float32,
            None,
            "f",
        ),
        None,
        "mean",
        torch.float32,
        "nan",
    )
    same_bits([empty], [loss])


def test_a_compiled_graph_checks_its_targets_when_it_runs() -> None:
    hidden, weight, *_ = head_of(7)
    target = classes_of(7)
    message = r"linear_cross_entropy: Target 1000 is out of bounds at position 5: .* \(0 to 999\) and ignore_index=-100"
    for reduction in ("mean", "none"):
        torch._dynamo.reset()
        compiled = torch.compile(LF.linear_cross_entropy, backend="aot_eager", fullgraph=True)
        compiled(hidden, weight, target.clone(), reduction=reduction)
        bad = target.clone()
        bad[5] = CLASSES
        with pytest.raises(IndexError, match=message):
            compiled(hidden, weight, bad, reduction=reduction)
    several = torch.arange(14).view(2, 7)
    several[1, 2] = -3
    lazy = torch.compile(
        lambda h: LF.cross_entropy(ll.linear(h, weight), several, class_dim=-1), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(IndexError, match=r"cross_entropy: Target -3 is out of bounds at position \(1, 2\)"):
        lazy(torch.randn(2, 7, WIDTH))


# --- what a compiled graph leaves to plain operations


def test_second_derivatives_are_the_references() -> None:
    """Of a graph whose backward pass torch runs itself: one that aot_autograd compiles has none."""
    for reduction in ("mean", "none"):
        args = [part.detach() for part in head_of(7, 65, torch.float64)]
        function = loss_of(classes_of(7, 65), reduction=reduction, softcap=3.0)

        def twice(loss: Callable[..., Tensor], args: list[Tensor] = args) -> tuple[Tensor, ...]:
            own = leaves(args)
            out = loss(*own)
            first = torch.autograd.grad(out, own, torch.ones_like(out), create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), own)

        torch._dynamo.reset()
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        same_bits(twice(compiled), twice(function))


def test_a_compiled_graph_is_plain_where_the_kernels_have_no_derivative() -> None:
    hidden, weight, *_ = head_of(7)
    target = classes_of(7)
    class_weight = torch.rand(CLASSES, requires_grad=True)
    for options in ({"weight": class_weight}, {"normalizer": torch.tensor(2.0, requires_grad=True)}):

        def loss(h: Tensor, options: dict[str, Any] = options) -> Tensor:
            return LF.linear_cross_entropy(h, weight, target, **options)

        torch.testing.assert_close(plain_graph(loss, hidden), loss(hidden))
        choice = ll.explain(torch.compile(loss, backend="eager"), hidden)
        assert choice.reason.endswith("requires a gradient")

    known = classes_of(7, ignored=False)

    def per_sample(h: Tensor) -> Tensor:
        return vmap(grad(lambda row, t: LF.linear_cross_entropy(row, weight, t)))(h, known)

    torch.testing.assert_close(plain_graph(per_sample, hidden.detach()), per_sample(hidden.detach()))


def test_a_loss_at_several_positions_is_plain() -> None:
    hidden, weight, target = torch.randn(5, WIDTH), torch.randn(11, 3, WIDTH), torch.randint(0, 11, (5, 3))
    compiled = torch.compile(LF.linear_cross_entropy, backend="eager")
    torch.testing.assert_close(
        plain_graph(LF.linear_cross_entropy, hidden, weight, target), LF.linear_cross_entropy(hidden, weight, target)
    )
    assert ll.explain(compiled, hidden, weight, target) == ("reference", "torch.compile traces plain operations")


def test_an_exported_program_needs_no_logitless() -> None:
    class Loss(torch.nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return LF.linear_cross_entropy(hidden, weight, target)

    hidden, weight, *_ = (part.detach() for part in head_of(7))
    target = classes_of(7)
    program = torch.export.export(Loss(), (hidden, weight, target))
    assert "logitless" not in program.graph_module.code
    torch.testing.assert_close(
        program.module()(hidden, weight, target), LF.linear_cross_entropy(hidden, weight, target)
    )


# --- backends by name, and explain


def test_backend_names_hold_in_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, *_ = (part.detach() for part in head_of(7))
    target = classes_of(7)
    for name, kernels in (("cpu", [["head_loss"]]), ("reference", [[]])):
        torch._dynamo.reset()
        graphs = Graphs()
        graphs.compile(LF.linear_cross_entropy)(hidden, weight, target, backend=name)
        assert graphs.kernels == kernels
        monkeypatch.setenv("LOGITLESS_BACKEND", name)
        torch._dynamo.reset()
        graphs = Graphs()
        graphs.compile(LF.linear_cross_entropy)(hidden, weight, target)
        assert graphs.kernels == kernels
        monkeypatch.delenv("LOGITLESS_BACKEND")
    class_weight = torch.rand(CLASSES, requires_grad=True)
    refused = torch.compile(
        lambda h: LF.linear_cross_entropy(h, weight, target, weight=class_weight, backend="cpu"),
        backend="eager",
        fullgraph=True,
    )
    with pytest.raises(Unsupported, match="backend= asks for 'cpu', which cannot serve this call: weight requires"):
        refused(hidden)


def test_explain_answers_for_the_compiled_graph() -> None:
    hidden, weight, *_ = head_of(7)
    target = classes_of(7)
    compiled = torch.compile(LF.linear_cross_entropy, backend="eager")
    for options in ({}, {"max_bytes": 100_000}, {"reduction": "none"}):
        eager, choice = (
            ll.explain(call, hidden, weight, target, **options) for call in (LF.linear_cross_entropy, compiled)
        )
        assert choice == eager == dispatch.Choice("cpu", "the tensors are on the CPU")
        assert choice.tile is not None
        assert (choice.tile, choice.peak_bytes) == (eager.tile, eager.peak_bytes)


def test_explain_knows_that_gradients_wait_in_float32() -> None:
    """Those of a half-precision head do, of one tile too: their upstream gradient is not known yet."""
    target = classes_of(200)
    kept = int((target != -100).sum())
    compiled = torch.compile(LF.linear_cross_entropy, backend="eager")
    peaks = []
    for wanted in (False, True):
        hidden, weight, *_ = head_of(200, dtype=torch.bfloat16)
        hidden.requires_grad_(wanted)
        weight.requires_grad_(wanted)
        row_bytes = CLASSES * 4
        rows = 300 if wanted else 600  # a budget that holds all rows in one tile, with gradients and without
        eager, graph = (
            ll.explain(call, hidden, weight, target, max_bytes=rows * row_bytes)
            for call in (LF.linear_cross_entropy, compiled)
        )
        assert eager == graph
        assert (eager.tile, eager.peak_bytes) == (graph.tile, graph.peak_bytes)
        assert eager.tile == (kept, CLASSES)
        assert eager.peak_bytes is not None
        peaks.append(eager.peak_bytes)
    assert peaks[1] - peaks[0] >= 4 * (weight.numel() + kept * hidden.shape[1])


# Of a process of its own: the forecast, then the peak of the same call and its backward pass, beyond the gradients.
MEASURE = """
import json, torch, logitless as ll, logitless.functional as LF
from logitless._bench.memory import call_and_growth

torch.set_num_threads(2)
hidden, weight, target = torch.randn(1000, 32), torch.randn(49999, 32), torch.randint(49999, (1000,))
hidden.requires_grad_(), weight.requires_grad_()
compiled = torch.compile(LF.linear_cross_entropy, fullgraph=True)

def run():
    return torch.autograd.grad(compiled(hidden, weight, target), (hidden, weight), torch.tensor(1.5))

run()
grads, growth = call_and_growth(run)
print(json.dumps([ll.explain(compiled, hidden, weight, target).peak_bytes, growth - sum(g.nbytes for g in grads)]))
"""


def test_the_forecast_is_what_a_compiled_call_takes() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    peak, taken = json.loads(done.stdout)
    assert taken == pytest.approx(peak, rel=0.1)
    assert peak < 1000 * 49999 * 4  # what the logits alone would take
