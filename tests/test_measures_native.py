"""The measures of dense logits on the compiled kernels: who serves a call, what it computes, what it promises."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("logitless._native", reason="built without the extension (LOGITLESS_NO_NATIVE)")
import checks
import logitless as ll
from logitless._verify import accuracy
from logitless.kernels import cpu
from logitless.kernels import definitions as reference
from oracles import RejectedError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64", "bf16", "f16"])
CLASSES = 65

# Each measure as a function of two rows; the entropy and token_stats see the first.
MEASURES: dict[str, Callable[..., Sequence[Tensor]]] = {
    "token_stats": lambda p, q, t: ll.token_stats(p, t)[:5],
    "pair_stats": lambda p, q, t: ll.pair_stats(p, q, t),
    "pair_stats without a target": lambda p, q, t: ll.pair_stats(p, q)[:7],
    "entropy": lambda p, q, t: (ll.entropy(p),),
    "kl": lambda p, q, t: (ll.kl(p, q),),
    "js": lambda p, q, t: (ll.js(p, q),),
}
measures = pytest.mark.parametrize("name", MEASURES)


def problem(*leading: int, dtype: torch.dtype = torch.float32, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    p, q = torch.randn(*leading, classes), torch.randn(*leading, classes)
    target = torch.randint(0, classes, leading)
    if leading and leading[0] > 2:
        p[0, ..., 0] += 20
        target[1] = -100
    return p.to(dtype), q.to(dtype), target


def results(name: str, p: Tensor, q: Tensor, target: Tensor, seed: int = 3) -> list[Tensor | None]:
    """Every output, and the gradients of both rows under random upstream gradients of every output at once."""
    p, q = (x.detach().requires_grad_() for x in (p, q))
    outputs = [x for x in MEASURES[name](p, q, target) if x is not None]
    draw = torch.Generator().manual_seed(seed)
    pairs = [(x, 3 * torch.randn(x.shape, generator=draw, dtype=x.dtype)) for x in outputs if x.requires_grad]
    grads = torch.autograd.grad([x for x, _ in pairs], [p, q], [g for _, g in pairs], allow_unused=True)
    return [*(x.detach() for x in outputs), *grads]


def reference_results(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> list[Tensor | None]:
    with monkeypatch.context() as patch:
        patch.setenv("LOGITLESS_BACKEND", "reference")
        return results(*arguments)


def assert_close(got: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            slack = {torch.float64: 1e-13, torch.float32: 3e-6}.get(
                one.dtype, 4 * torch.finfo(one.dtype).eps if one.is_floating_point() else 0
            )
            torch.testing.assert_close(one, other, rtol=slack, atol=slack)


# ---- which backend serves --------------------------------------------------------------------------------------------


@measures
@dtypes
def test_the_kernels_serve_dense_logits(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    p, q, target = problem(5, dtype=dtype)
    assert ll.explain(MEASURES[name], p, q, target).backend == "cpu"

    def unexpected(*args: Any) -> Any:
        raise AssertionError("the reference ran")

    for definition in ("token_stats", "pair_stats", "entropy", "kl", "js"):
        monkeypatch.setattr(reference, definition, unexpected)
    found = results(name, p, q, target)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(x.dtype == real for x in found[:-2] if x is not None and x.is_floating_point())
    assert all(g is None or g.dtype == dtype for g in found[-2:])


@pytest.mark.parametrize("name", ["pair_stats", "kl", "js"])
def test_rows_of_two_dtypes_are_the_references(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, q, target = problem(3)
    choice = ll.explain(MEASURES[name], p, q.double(), target)
    assert choice.backend == "reference"
    assert "p and q differ in dtype (torch.float32, torch.float64)" in choice.reason
    assert MEASURES[name](p, q.double(), target)[0].dtype == torch.float64
    assert MEASURES[name](p.bfloat16(), q, target)[0].dtype == torch.float32
    monkeypatch.setenv("LOGITLESS_BACKEND", "cpu")
    assert MEASURES[name](p, q, target)[0].dtype == torch.float32
    with pytest.raises(RuntimeError, match=rf"{name}: .*'cpu', which cannot serve this call: p and q differ in dtype"):
        MEASURES[name](p, q.double(), target)


@measures
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0, 1)])
def test_nothing_to_compute(name: str, shape: tuple[int, ...]) -> None:
    p, target = torch.zeros(shape), torch.zeros(shape[:-1], dtype=torch.int64)
    choice = ll.explain(MEASURES[name], p, p, target)
    assert choice == ("reference", "there is nothing to compute")
    for value in MEASURES[name](p, p, target):
        assert value.shape == shape[:-1]
    assert all(g is None or g.shape == shape for g in results(name, p, p, target)[-2:])


@measures
def test_a_transform_is_the_references(name: str) -> None:
    p, q, target = problem(3)
    assert name in ("pair_stats", "token_stats") or torch.func.vmap(lambda a, b: MEASURES[name](a, b, None)[0])(
        p, q
    ).allclose(MEASURES[name](p, q, target)[0])
    reasons: list[str] = []

    def inside(a: Tensor) -> Tensor:
        reasons.append(ll.explain(MEASURES[name], a, q, target).reason)
        return MEASURES[name](a, q, target)[0].sum()

    torch.func.grad(inside)(p)
    assert reasons == ["a torch.func transform is active"]


# ---- values and gradients --------------------------------------------------------------------------------------------


@measures
@dtypes
@pytest.mark.parametrize("leading", [(), (1,), (7,), (3, 2), (4, 3, 2)])
def test_any_leading_dimensions(
    name: str, leading: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (name, *problem(*leading, dtype=dtype))
    assert_close(results(*arguments), reference_results(monkeypatch, *arguments))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted by a token": lambda x: x[:, :-1],
    "every second sequence": lambda x: x[::2],
    "every second class": lambda x: x[..., ::2],
    "classes first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "leading dimensions swapped": lambda x: x.transpose(0, 1),
    "one row for all": lambda x: x[:1, :1].expand_as(x),
    "cropped": lambda x: x[1:, 1:-1, 3:-2],
}


@measures
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of_both", [True, False])
def test_strides(name: str, layout: str, of_both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = (LAYOUTS[layout](torch.randn(4, 6, CLASSES)) for _ in range(2))
    target = torch.randint(0, p.shape[-1], p.shape[:-1])
    arguments = (name, p, q if of_both else q.contiguous(), target)
    assert_close(results(*arguments), reference_results(monkeypatch, *arguments))


def test_logits_shifted_by_a_token_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = torch.randn(3, 5, 1000)[:, :-1], torch.randn(3, 4, 1000)
    monkeypatch.setattr(Tensor, "contiguous", lambda self: pytest.fail("copied") if self.dim() > 2 else self.clone())
    target = torch.randint(0, 1000, (3, 4))
    for name in MEASURES:
        results(name, p, q, target)


@pytest.mark.parametrize("name", ["pair_stats", "kl", "js"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_costs_nothing(name: str, frozen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool]] = []
    real = cpu.pair_row_grad

    def noted(*args: Any, **kwargs: Any) -> Any:
        asked.append((kwargs["need_first"], kwargs["need_second"]))
        return real(*args, **kwargs)

    p, q, target = problem(6)
    expected = results(name, p, q, target)[-2 + 1 - frozen]
    monkeypatch.setattr(cpu, "pair_row_grad", noted)
    sides = [p.requires_grad_(frozen != 0), q.requires_grad_(frozen != 1)]
    outputs = [x for x in MEASURES[name](*sides, target) if x is not None and x.requires_grad]
    draw = torch.Generator().manual_seed(3)
    torch.autograd.backward(outputs, [3 * torch.randn(x.shape, generator=draw) for x in outputs])
    assert asked == [(frozen != 0, frozen != 1)]
    assert sides[frozen].grad is None
    assert sides[1 - frozen].grad is not None
    assert torch.equal(sides[1 - frozen].grad, expected)


@pytest.mark.parametrize(
    ("call", "kernels"),
    [
        (lambda p, q: ll.entropy(p), {"row_stats": {"entropy"}}),
        (lambda p, q: ll.kl(p, q), {"pair_row_stats": {"kl"}}),
        (lambda p, q: ll.js(p, q), {"pair_row_stats": {"js"}}),
    ],
    ids=["entropy", "kl", "js"],
)
def test_only_what_is_asked_for_is_computed(
    call: Callable[[Tensor, Tensor], Tensor], kernels: dict[str, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, set[str]] = {}

    def note(kernel: str) -> None:
        real = getattr(cpu, kernel)

        def noted(*args: Any, **kwargs: Any) -> Any:
            assert len([x for x in args if x is not None]) <= 2  # no target
            made[kernel] = {name for name, wanted in kwargs.items() if wanted is True}
            return real(*args, **kwargs)

        monkeypatch.setattr(cpu, kernel, noted)

    note("row_stats")
    note("pair_row_stats")
    call(*problem(4)[:2])
    assert made == kernels


def test_outputs_that_are_not_used_send_nothing() -> None:
    p, q, target = problem(5)
    p.requires_grad_()
    stats = ll.token_stats(p, target)
    assert not stats.argmax.requires_grad
    assert not stats.rank.requires_grad
    assert not ll.pair_stats(p, q).same_top.requires_grad
    (alone,) = torch.autograd.grad(stats.nll, p, torch.ones(5), retain_graph=True)
    (with_zeros,) = torch.autograd.grad(
        [stats.nll, stats.lse, stats.entropy], p, [torch.ones(5), torch.zeros(5), torch.zeros(5)]
    )
    torch.testing.assert_close(alone, with_zeros, rtol=1e-6, atol=1e-7)


def test_a_gradient_that_nobody_asked_for_does_not_poison() -> None:
    """KL is infinite in one row; the JS of that row still has a gradient."""
    p, q = torch.randn(2, 5), torch.randn(2, 5)
    q[0, 2] = -torch.inf
    q.requires_grad_()
    stats = ll.pair_stats(p, q)
    assert stats.kl[0] == torch.inf
    (grad,) = torch.autograd.grad(stats.js.sum() + stats.kl[1], q)
    assert bool(grad.isfinite().all())


@measures
def test_second_derivatives_and_batches_of_upstream_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, q, target = problem(3, dtype=torch.float64, classes=5)

    def found() -> list[Tensor | None]:
        a, b = p.detach().requires_grad_(), q.detach().requires_grad_()
        outputs = [x for x in MEASURES[name](a, b, target) if x is not None and x.requires_grad]
        total = sum(((k + 1) * x.sin()).sum() for k, x in enumerate(outputs))
        first = torch.autograd.grad(total, [a, b], create_graph=True, allow_unused=True)
        bent = sum(g.pow(2).sum() for g in first if g is not None)
        second = torch.autograd.grad(bent, [a, b], allow_unused=True)
        again = MEASURES[name](a, b, target)[0]
        batch = torch.eye(3, dtype=torch.float64)
        rows = torch.autograd.grad(again, [a, b], batch, is_grads_batched=True, allow_unused=True)
        return [*(None if g is None else g.detach() for g in first), *second, *rows]

    got = found()
    monkeypatch.setenv("LOGITLESS_BACKEND", "reference")
    for one, other in zip(got, found(), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("call", [ll.token_stats, lambda p, t: ll.pair_stats(p, p, t)], ids=["token", "pair"])
def test_a_target_that_is_no_class(call: Callable[[Tensor, Tensor], Any]) -> None:
    for bad in (5, -1, 2**40):
        target = torch.tensor([[0, 1, -100], [2, bad, bad]])
        with pytest.raises(
            IndexError, match=rf"Target {bad} is out of bounds at position \(1, 1\) and 1 more: there are 5"
        ):
            call(torch.zeros(2, 3, 5), target)


def test_ignored_rows_of_a_pair_have_no_nll_and_all_else() -> None:
    p, q, target = problem(4)
    stats, whole = ll.pair_stats(p, q, target), ll.pair_stats(p, q)
    assert stats.nll_p is not None
    assert stats.nll_q is not None
    assert stats.nll_p[1] == stats.nll_q[1] == 0
    assert torch.equal(stats.kl, whole.kl)


# How a call of the kernels could be wrong, and the check of test_gradients.py that must notice.
MUTANTS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "entropy of a row too large": (
        "entropy",
        "row_stats",
        lambda real, *a, **k: (s := real(*a, **k))._replace(entropy=s.entropy * 1.0001),
    ),
    "entropy's gradient without its mean": (
        "entropy",
        "row_grad",
        lambda real, *a, **k: real(*a, **(k | {"a_scale": 0.0})),
    ),
    "entropy's gradient without its slope": (
        "entropy",
        "row_grad",
        lambda real, *a, **k: real(*a, **(k | {"b_scale": 0.0})),
    ),
    "no target in a gradient": ("token_stats", "row_grad", lambda real, *a, **k: real(*a, **(k | {"c_scale": 0.0}))),
    "ignored rows of a gradient kept": (
        "token_stats",
        "row_grad",
        lambda real, *a, **k: real(*a, **(k | {"ignore_index": -1})),
    ),
    "KL's arguments exchanged": ("kl", "pair_row_stats", lambda real, p, q, *a, **k: real(q, p, *a, **k)),
    "the gradients of a pair exchanged": ("kl", "pair_row_grad", lambda real, *a, **k: real(*a, **k)[::-1]),
    "an upstream gradient lost": ("pair_stats", "pair_row_grad", lambda real, *a, **k: real(*a, **(k | {"js": None}))),
    "nll of the other row": (
        "pair_stats",
        "pair_row_stats",
        lambda real, *a, **k: (s := real(*a, **k))._replace(nll_p=s.nll_q),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_rejected(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, kernel, broken = MUTANTS[mutant]
    checks.CHECKS[check](torch.float32)
    real = getattr(cpu, kernel)
    monkeypatch.setattr(cpu, kernel, lambda *a, **k: broken(real, *a, **k))
    with pytest.raises(RejectedError):
        checks.CHECKS[check](torch.float32)


# ---- what every call promises ----------------------------------------------------------------------------------------


def everything(p: Tensor, q: Tensor, target: Tensor) -> list[Tensor]:
    return [x for name in MEASURES for x in results(name, p, q, target) if x is not None]


@pytest.mark.parametrize("shape", [(300, 1000), (3, 70_001), (5000, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_threads_and_repetition_change_no_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    p, q, target = problem(shape[0], dtype=dtype, classes=shape[1])
    one = everything(p, q, target)
    torch.set_num_threads(2)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(one, everything(p, q, target), strict=True))


def test_two_python_threads_at_once() -> None:
    torch.set_num_threads(2)
    arguments = problem(200, classes=1000)
    expected = everything(*arguments)
    same: list[bool] = []

    def work() -> None:
        for _ in range(3):
            same.extend(torch.equal(a, b) for a, b in zip(expected, everything(*arguments), strict=True))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert len(same) == 2 * 3 * len(expected)
    assert all(same)


FORKS = """
import os, torch, logitless as ll
from torch.utils.data import DataLoader

torch.manual_seed(0)
torch.set_num_threads(2)
p, q, target = torch.randn(256, 2000), torch.randn(256, 2000), torch.randint(0, 2000, (256,))

def measured():
    leaf = p.clone().requires_grad_()
    token, pair = ll.token_stats(leaf, target), ll.pair_stats(leaf, q)
    total = token.nll.sum() + token.entropy.sum() + pair.kl.sum() + pair.js.sum()
    (grad,) = torch.autograd.grad(total, leaf)
    return [token.nll.detach(), token.entropy.detach(), pair.kl.detach(), pair.js.detach(), grad]

before = measured()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # torch's own operators wait forever for threads that a fork does not copy
    os._exit(0 if all(map(torch.equal, measured(), before)) else 1)
assert os.waitpid(child, 0)[1] == 0

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        return ll.kl(p, q), ll.token_stats(p, target).entropy

for kl, entropy in DataLoader(Rows(), num_workers=2, multiprocessing_context="fork"):
    assert torch.equal(kl[0], before[2]) and torch.equal(entropy[0], before[1])
assert all(map(torch.equal, measured(), before))
print("forked")
"""


def test_a_process_forked_after_use_gives_the_same_and_does_not_hang() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "forked\n"), done.stderr


PEAK = """
import resource, sys, torch, logitless as ll
torch.set_num_threads(2)
p, q = torch.randn(2048, 16000), torch.randn(2048, 16000)
name = sys.argv[1]
small = torch.randn(64, 16000, requires_grad=True)
for logits in (small, p.requires_grad_()):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    other = q[: len(logits)]
    if name == "entropy":
        ll.entropy(logits).sum().backward()
    elif name == "token_stats":
        stats = ll.token_stats(logits, torch.zeros(len(logits), dtype=torch.int64))
        (stats.nll + stats.lse + stats.entropy).sum().backward()
    else:
        getattr(ll, name)(other, logits).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("name", ["entropy", "kl", "js", "token_stats"])
def test_nothing_of_the_logits_size_but_the_gradient(name: str) -> None:
    """Peak memory of a step is inputs, gradient and at most 32 MB."""
    done = subprocess.run([sys.executable, "-c", PEAK, name], capture_output=True, text=True, timeout=120, check=True)
    assert float(done.stdout) <= 2048 * 16000 * 4 / 2**20 + 32


def test_the_check_says_which_backend_it_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accuracy.row_backend(torch.float32) == "cpu"
    monkeypatch.setenv("LOGITLESS_BACKEND", "reference")
    assert accuracy.row_backend(torch.float32) == "reference"
