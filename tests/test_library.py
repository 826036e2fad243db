"""The kernels as torch operators: registered as torch asks, and in every compiled graph that they can serve."""

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
from logitless._operators import pairs as pair_operators
from logitless._operators import rows as row_operators
from logitless.kernels import cpu

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),  # on importing inductor
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
]
LOGITS_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOGITLESS_BACKEND", raising=False)
    torch._dynamo.reset()


def rows_of(rows: int = 7, classes: int = 65, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(rows, classes, dtype=torch.float64)).to(dtype)


def classes_of(rows: int = 7, classes: int = 65, ignored: bool = True) -> Tensor:
    target = torch.randint(0, classes, (rows,))
    if ignored:
        target[rows // 2] = -100
    return target


# --- as torch asks


def row_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of logitless::row_stats."""
    logits, target, weight = rows_of(), classes_of(), torch.rand(65)
    inner = torch.randn(2, 5, 3, 4).transpose(2, 3)  # its rows have no one stride: a copy is made
    flags = {"nll": [False] * 5, "token": [True, True, True, True, False], "smooth": [False] * 4 + [True]}
    return {
        "nll": (logits, target, None, None, -1, -100, "f", *flags["nll"]),
        "everything of a token": (logits.double(), target, None, None, 1, -100, "f", *flags["token"]),
        "weighted smoothing": (logits, target, weight, None, -1, -100, "f", *flags["smooth"]),
        "probabilities": (logits.T, None, weight, torch.rand(65, 7), 0, -100, "f", *flags["smooth"]),
        "bfloat16": (logits.bfloat16(), target, None, None, -1, -100, "f", *flags["token"]),
        "float16": (logits.half(), target, None, None, -1, -100, "f", *flags["nll"]),
        "middle classes": (inner, torch.randint(0, 5, (2, 4, 3)), None, None, 1, -100, "f", *flags["nll"]),
        "one row": (logits[0], target[0], None, None, 0, -100, "f", *flags["nll"]),
        "no row": (logits[:0], target[:0], None, None, -1, -100, "f", *flags["nll"]),
    }


@pytest.mark.parametrize("name", list(row_calls()))
def test_row_operators_pass_opcheck(name: str) -> None:
    args = row_calls()[name]
    logits, target, weight, dense, class_dim, ignore_index = args[:6]
    torch.library.opcheck(torch.ops.logitless.row_stats, (logits.requires_grad_(), *args[1:]))
    logits = logits.detach()
    row_max, log_sum = torch.ops.logitless.row_stats(logits, *args[1:])[:2]
    present = (True, weight is None, target is not None, dense is not None, weight is not None)  # a, b, c, e, f
    given = [torch.randn_like(row_max) if has else None for has in present]
    torch.library.opcheck(
        torch.ops.logitless.row_grad,
        (logits, row_max, log_sum, target, weight, dense, *given, class_dim, ignore_index),
    )


@pytest.mark.parametrize("asked", ["kl", "everything", "skewed_kl", "weighted_js", "total_variation"])
@pytest.mark.parametrize("dtype", LOGITS_DTYPES)
def test_pair_operators_pass_opcheck(dtype: torch.dtype, asked: str) -> None:
    first, second, every = rows_of(dtype=dtype), rows_of(dtype=dtype), asked == "everything"
    target = classes_of() if every else None
    alone = None if every or asked == "kl" else asked
    flags = (alone is None, *(every,) * 4, alone, 0.1)
    args = (first.requires_grad_(), second.requires_grad_(), target, -1, -100, "f", *flags)
    torch.library.opcheck(torch.ops.logitless.pair_row_stats, args)
    first, second = first.detach(), second.detach()
    saved = torch.ops.logitless.pair_row_stats(first, second, *args[2:])[-1]
    upstream = torch.randn(7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for needed in ((True, True), (False, True)):
        measures = [upstream if alone is None and (every or i == 0) else None for i in range(8)]
        told = (*measures, None if alone is None else upstream, alone, 0.1, -1, -100, *needed)
        torch.library.opcheck(torch.ops.logitless.pair_row_grad, (first, second, saved, target, *told))


def test_an_operator_refuses_a_gradient_that_it_does_not_have() -> None:
    weight = torch.rand(65, requires_grad=True)
    with pytest.raises(NotImplementedError, match="the logits alone"):
        row_operators.row_stats(rows_of(), classes_of(), backend=cpu, caller="f", class_weight=weight, smooth=True)


# --- gradients of every output at once, against float64 formulas


def row_formula(logits: Tensor, target: Tensor, weight: Tensor, dense: Tensor) -> list[Tensor]:
    log_p = logits.log_softmax(-1)
    return [
        -log_p.gather(-1, target[..., None])[..., 0],
        logits.logsumexp(-1),
        -(log_p.exp() * log_p).sum(-1),
        -(weight * log_p).sum(-1),
        -(dense * weight * log_p).sum(-1),
    ]


def row_operator(logits: Tensor, target: Tensor, weight: Tensor, dense: Tensor) -> list[Tensor]:
    stats = row_operators.row_stats(
        logits,
        target,
        backend=cpu,
        caller="f",
        class_weight=weight,
        dense_target=dense,
        lse=True,
        entropy=True,
        smooth=True,
    )
    named = (stats.nll, stats.lse, stats.entropy, stats.smooth_sum, stats.dense_sum)
    return [value for value in named if value is not None]


def pair_formula(first: Tensor, second: Tensor, target: Tensor) -> list[Tensor]:
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    p, q = log_p.exp(), log_q.exp()
    return [
        (p * (log_p - log_q)).sum(-1),
        (q * (log_q - log_p)).sum(-1),
        ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2,
        -(p * log_q).sum(-1),
        -(p * log_p).sum(-1),
        -(q * log_q).sum(-1),
        -log_p.gather(-1, target[..., None])[..., 0],
        -log_q.gather(-1, target[..., None])[..., 0],
    ]


def pair_operator(first: Tensor, second: Tensor, target: Tensor) -> list[Tensor]:
    stats = pair_operators.pair_row_stats(
        first, second, target, backend=cpu, caller="f", reverse_kl=True, js=True, cross_entropy=True, entropy=True
    )
    return [value for value in stats[:8] if value is not None]


def assert_gradients(
    ours: Callable[..., list[Tensor]], formula: Callable[..., list[Tensor]], args: Sequence[Tensor], wrt: int
) -> None:
    inputs = [arg.clone().requires_grad_(i < wrt) for i, arg in enumerate(args)]
    truth = [arg.clone().requires_grad_(i < wrt) for i, arg in enumerate(args)]
    got, want = ours(*inputs), formula(*truth)
    assert len(got) == len(want)
    for value, true in zip(got, want, strict=True):
        torch.testing.assert_close(value, true)
    for chosen in (*([i] for i in range(len(want))), range(len(want))):  # each output alone, then all together
        upstream = [torch.randn_like(want[i]) for i in chosen]
        torch.testing.assert_close(
            torch.autograd.grad([got[i] for i in chosen], inputs[:wrt], upstream, retain_graph=True),
            torch.autograd.grad(
                [want[i] for i in chosen], truth[:wrt], upstream, retain_graph=True, materialize_grads=True
            ),
        )


def test_gradients_of_the_row_operator() -> None:
    logits, dense = rows_of(dtype=torch.float64), torch.rand(7, 65, dtype=torch.float64)
    args = (logits, classes_of(ignored=False), torch.rand(65, dtype=torch.float64), dense)
    assert_gradients(row_operator, row_formula, args, wrt=1)


def test_gradients_of_the_pair_operator() -> None:
    args = (rows_of(dtype=torch.float64), rows_of(dtype=torch.float64), classes_of(ignored=False))
    assert_gradients(pair_operator, pair_formula, args, wrt=2)


# --- vmap


@pytest.mark.parametrize("batched", [(0, 0, None, None), (1, None, None, 0), (None, 0, 0, None), (0, 0, 1, 2)])
def test_vmap_of_the_row_operator(batched: tuple[int | None, ...]) -> None:
    """The batch is more rows, whichever arguments have one; a batch of class weights is gone through."""
    args = (
        rows_of(dtype=torch.float64),
        classes_of(ignored=False),
        torch.rand(65, dtype=torch.float64),
        torch.rand(7, 65, dtype=torch.float64),
    )
    stacked = tuple(
        arg if dim is None else torch.stack([arg.roll(i, 0) for i in range(3)], dim)
        for arg, dim in zip(args, batched, strict=True)
    )
    got = vmap(lambda *a: tuple(row_operator(*a)), in_dims=batched)(*stacked)
    want = vmap(lambda *a: tuple(row_formula(*a)), in_dims=batched)(*stacked)
    torch.testing.assert_close(got, want)


def test_vmap_of_the_pair_operator() -> None:
    first, second = torch.randn(3, 7, 65, dtype=torch.float64), torch.randn(7, 65, dtype=torch.float64)
    target = classes_of(ignored=False)
    got = vmap(lambda p: tuple(pair_operator(p, second, target)))(first)
    torch.testing.assert_close(got, vmap(lambda p: tuple(pair_formula(p, second, target)))(first))


def test_vmap_of_the_gradient_operators() -> None:
    """A batch of upstream gradients, through one graph."""
    logits = rows_of(dtype=torch.float64).requires_grad_()
    other = rows_of(dtype=torch.float64)
    args = (classes_of(ignored=False), torch.rand(65).double(), torch.rand(7, 65, dtype=torch.float64))
    upstream = torch.randn(3, 7, dtype=torch.float64)
    for ours, theirs in (
        (row_operator(logits, *args), row_formula(logits, *args)),
        (pair_operator(logits, other, args[0]), pair_formula(logits, other, args[0])),
    ):
        got, want = (
            torch.autograd.grad(values[:3], logits, [upstream] * 3, is_grads_batched=True) for values in (ours, theirs)
        )
        torch.testing.assert_close(got, want)


# --- compiled graphs


def assert_compiles_to_kernels(
    function: Callable[..., Tensor], args: Sequence[Tensor], kernels: list[str], **options: Any
) -> None:
    """One graph each way, which calls the kernels, and no other way of the loss: value and gradients of eager."""
    graphs, own, eager = Graphs(), leaves(args), leaves(args)
    got, want = graphs.compile(function, **options)(*own), function(*eager)
    upstream = torch.randn_like(want)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, own, upstream), torch.autograd.grad(want, eager, upstream))
    assert graphs.kernels == [[name] for name in kernels]
    assert not any("softmax" in name or "logsumexp" in name for graph in graphs.operators for name in graph)


CROSS_ENTROPIES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "rows": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": torch.linspace(0, 2, 65)},
    "weighted and smoothed": {"weight": torch.linspace(0, 2, 65), "label_smoothing": 0.3},
    "over all rows": {"normalizer": "rows"},
    "zero when empty": {"empty": "zero"},
}


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("name", list(CROSS_ENTROPIES))
def test_compiled_cross_entropy_calls_the_kernels(name: str, kind: str) -> None:
    target = classes_of() if kind == "indices" else torch.rand(7, 65)
    assert_compiles_to_kernels(
        lambda z: LF.cross_entropy(z, target, **CROSS_ENTROPIES[name]), [rows_of()], ["row_stats", "row_grad"]
    )


def transposed(logits: Tensor) -> Tensor:
    """The same logits with the classes nearest in memory where they were not, and farthest where they were."""
    return logits.movedim(1, -1).contiguous().movedim(-1, 1) if logits.dim() > 2 else logits.mT.contiguous().mT


@pytest.mark.parametrize("dtype", LOGITS_DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (3, 49153), (2, 5, 3, 4)])
def test_compiled_cross_entropy_of_every_dtype_and_layout(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = torch.randn(shape).to(dtype)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    for given in (logits, transposed(logits), torch.stack([logits, logits], -1)[..., 1]):
        assert_compiles_to_kernels(lambda z: LF.cross_entropy(z, target), [given], ["row_stats", "row_grad"])


MEASURES: dict[str, tuple[Callable[..., Tensor], int, str]] = {
    "nll": (lambda p: ll.token_stats(p, torch.arange(7)).nll, 1, "row"),
    "lse": (lambda p: ll.token_stats(p, torch.arange(7)).lse, 1, "row"),
    "entropy of a token": (lambda p: ll.token_stats(p, torch.arange(7)).entropy, 1, "row"),
    "entropy": (ll.entropy, 1, "row"),
    "kl": (ll.kl, 2, "pair_row"),
    "js": (ll.js, 2, "pair_row"),
    "pair_stats": (
        lambda p, q: torch.stack([v.float() for v in ll.pair_stats(p, q, torch.arange(7)) if v is not None]),
        2,
        "pair_row",
    ),
}


@pytest.mark.parametrize("name", list(MEASURES))
def test_compiled_measures_call_the_kernels(name: str) -> None:
    function, count, kernel = MEASURES[name]
    assert_compiles_to_kernels(function, [rows_of() for _ in range(count)], [f"{kernel}_stats", f"{kernel}_grad"])


def test_one_compiled_graph_serves_any_number_of_rows_and_classes() -> None:
    graphs = Graphs()
    compiled = graphs.compile(LF.cross_entropy, dynamic=True)
    for rows, classes in ((3, 10), (7, 65), (65, 1000)):
        args, target = leaves([rows_of(rows, classes)]), classes_of(rows, classes)
        want = leaves(args)
        upstream = torch.randn(())
        got = torch.autograd.grad(compiled(*args, target), args, upstream)
        torch.testing.assert_close(got, torch.autograd.grad(LF.cross_entropy(*want, target), want, upstream))
    assert graphs.kernels == [["row_stats"], ["row_grad"]]


def test_rows_marked_dynamic_make_one_graph() -> None:
    graphs = Graphs()
    compiled = graphs.compile(ll.kl)
    for rows in (5, 9, 33):
        p, q = rows_of(rows), rows_of(rows)
        for tensor in (p, q):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(compiled(p, q), ll.kl(p, q))
    assert graphs.kernels == [["pair_row_stats"]]


def test_a_compiled_training_step_with_a_head_before_the_loss() -> None:
    """With inductor, which fuses what surrounds the kernels and plans the memory of what they read and write."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = torch.nn.Linear(16, 16), torch.nn.Linear(16, 65)
            self.loss = LN.CrossEntropyLoss(label_smoothing=0.1)

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            logits = self.head(torch.tanh(self.body(x)))
            mean: Tensor = self.loss(2 * logits, target) + 0.01 * ll.entropy(logits).mean()
            return mean

    model = Model()
    x, target = torch.randn(7, 16), classes_of()
    model(x, target).backward()
    eager = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        compiled(x, target).backward()
        torch.testing.assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, eager)


def test_a_compiled_graph_checks_its_targets_when_it_runs() -> None:
    compiled, logits, target = Graphs().compile(LF.cross_entropy), rows_of(), classes_of()
    compiled(logits, target)
    target[5] = 65
    message = r"cross_entropy: Target 65 is out of bounds at position 5: .* \(0 to 64\) and ignore_index=-100"
    with pytest.raises(IndexError, match=message):
        compiled(logits, target)
    with pytest.raises(IndexError, match="token_stats: Target 65"):
        Graphs().compile(ll.token_stats)(logits, target)


# --- what a compiled graph does not hold


def test_a_compiled_graph_is_plain_where_the_kernels_have_no_derivative() -> None:
    logits, target = rows_of(), classes_of()
    weight = torch.rand(65, requires_grad=True)
    torch.testing.assert_close(
        plain_graph(LF.cross_entropy, logits, target, weight),
        F.cross_entropy(logits, target, weight.detach()),
        check_stride=False,
    )
    batch = torch.stack([logits, logits + logits.roll(1, 0)])
    per_sample = vmap(grad(lambda z: LF.cross_entropy(z, target)))
    torch.testing.assert_close(plain_graph(per_sample, batch), per_sample(batch))
    tangent = torch.randn_like(logits)

    def directional(z: Tensor) -> Tensor:
        return torch.func.jvp(lambda z: LF.cross_entropy(z, target), (z,), (tangent,))[1]

    torch.testing.assert_close(plain_graph(directional, logits), directional(logits))


def test_an_exported_program_needs_no_logitless() -> None:
    logits, target = rows_of(), classes_of()
    program = torch.export.export(LN.CrossEntropyLoss(), (logits, target))
    assert "logitless" not in program.graph_module.code
    torch.testing.assert_close(program.module()(logits, target), LF.cross_entropy(logits, target))


# --- backends by name, and explain


def test_backend_names_hold_in_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = rows_of(), classes_of()
    graphs = Graphs()
    graphs.compile(lambda z: LF.cross_entropy(z, target, backend="cpu"))(logits)
    assert graphs.kernels == [["row_stats"]]
    plain_graph(lambda z: LF.cross_entropy(z, target, backend="reference"), logits)
    for name, kernels in (("cpu", ["row_stats"]), ("reference", [])):
        monkeypatch.setenv("LOGITLESS_BACKEND", name)
        torch._dynamo.reset()
        graphs = Graphs()
        graphs.compile(LF.cross_entropy)(logits, target)
        assert graphs.kernels == [kernels]


@pytest.mark.parametrize("by", ["backend=", "LOGITLESS_BACKEND"])
def test_a_backend_that_cannot_serve_a_compiled_graph_is_refused(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch where the whole graph is asked for, with our reason in its message; otherwise in our own words."""
    options = {"backend": "cpu"} if by == "backend=" else {}
    if not options:
        monkeypatch.setenv("LOGITLESS_BACKEND", "cpu")
    target = classes_of()
    whole = torch.compile(lambda z: LF.nll_loss(z, target, **options), backend="eager", fullgraph=True)
    with pytest.raises(Unsupported, match=f"{by} asks for 'cpu', which cannot serve this call: torch.compile traces"):
        whole(rows_of())
    refused = rows_of()
    weight = torch.rand(65, requires_grad=True)
    own = torch.compile(lambda z: LF.cross_entropy(z, classes_of(), weight, **options), backend="eager")
    with pytest.raises(RuntimeError, match=f"{by} asks for 'cpu', which cannot serve this call: weight requires"):
        own(refused)


def test_explain_answers_for_the_compiled_graph() -> None:
    logits, target = rows_of(), classes_of()
    compiled = torch.compile(LF.cross_entropy, backend="eager")
    compiled(logits, target)  # a graph that is there already changes no answer
    for call in (LF.cross_entropy, compiled, torch.compile(LN.CrossEntropyLoss(), backend="eager")):
        assert ll.explain(call, logits, target) == ("cpu", "the tensors are on the CPU")
    gathered = torch.compile(LF.nll_loss, backend="eager")
    assert ll.explain(LF.nll_loss, logits, target).backend == "cpu"
    assert ll.explain(gathered, logits, target) == ("reference", "torch.compile traces plain operations")
    torch.testing.assert_close(compiled(logits, target), LF.cross_entropy(logits, target))


def test_explain_inside_a_compiled_graph_is_refused() -> None:
    logits, target = rows_of(), classes_of()
    inside = torch.compile(
        lambda z: z * len(ll.explain(LF.cross_entropy, z, target).reason), backend="eager", fullgraph=True
    )
    with pytest.raises(Unsupported, match="explain cannot be compiled"):
        inside(logits)
